//! A journal of each version, kept as it was written, still opens and tells the same.
//!
//! A fixture is text: a line for each 32 bytes that are not all zero, offset and bytes in hexadecimal.
//! The first line holds the length of the file.

use std::fmt::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::format::{Operation, Time, Version};
use super::reader::JournalReader;
use super::state::EpochState;
use super::{Found, JournalOptions, Moment, Suspicion, open, verify};
use crate::extent::{BLOCK_SIZE, Epoch, Extent};

const VERSIONS: [Version; 3] = [Version::First, Version::Second, Version::Third];
const BLOCKS: u64 = 256;
const LINE_BYTES: usize = 32;

/// The disk as the fixtures know it, those that keep times.
const SEEN: Moment = Moment {
    modified: Time(1_795_550_000_123),
    looked: Time(1_795_550_000_200),
    booted: Time(1_795_000_000_000),
};

fn options() -> JournalOptions {
    JournalOptions {
        disk_identity: *b"identity of disk",
        disk_size_bytes: BLOCKS * BLOCK_SIZE,
        ring_bytes: 16 << 10,
        intent_regions: 64,
        rebuild: false,
        seen: Some(SEEN),
    }
}

fn fixture_of(version: Version) -> &'static str {
    match version {
        Version::First => include_str!("fixtures/version-1.txt"),
        Version::Second => include_str!("fixtures/version-2.txt"),
        Version::Third => include_str!("fixtures/version-3.txt"),
    }
}

fn decode(text: &str, path: &Path) {
    let mut lines = text.lines();
    let file = std::fs::File::create(path).unwrap();
    let length = lines.next().unwrap().parse().unwrap();
    file.set_len(length).unwrap();
    for line in lines {
        let (offset, digits) = line.split_once(' ').unwrap();
        let offset = u64::from_str_radix(offset, 16).unwrap();
        let bytes: Vec<u8> = (0..digits.len() / 2)
            .map(|index| u8::from_str_radix(&digits[index * 2..index * 2 + 2], 16).unwrap())
            .collect();
        file.write_all_at(&bytes, offset).unwrap();
    }
}

fn encode(path: &Path) -> String {
    let bytes = std::fs::read(path).unwrap();
    let mut text = format!("{}\n", bytes.len());
    for (number, line) in bytes.chunks(LINE_BYTES).enumerate() {
        if line.iter().any(|&byte| byte != 0) {
            write!(text, "{:05x} ", number * LINE_BYTES).unwrap();
            for byte in line {
                write!(text, "{byte:02x}").unwrap();
            }
            text.push('\n');
        }
    }
    text
}

/// What every fixture tells, whatever its version.
fn expected_state() -> EpochState {
    EpochState {
        open: Epoch(5),
        closed: Some(Epoch(4)),
        sealed: Epoch(3),
        committed: Epoch(1),
        resync: Some(Epoch(2)),
    }
}

fn blocks(reader: &JournalReader, after: u64, through: u64) -> Vec<u64> {
    let dirty = reader.dirty(Epoch(after), Epoch(through)).unwrap();
    assert_eq!(dirty.all(), after < 2 && through >= 2);
    let extents = dirty.extents().map(Result::unwrap);
    extents
        .flat_map(|extent| extent.first_block..extent.end_block())
        .collect()
}

fn check(path: &Path) {
    let reader = JournalReader::open(path).unwrap();
    assert_eq!(reader.disk_size_bytes().unwrap(), BLOCKS * BLOCK_SIZE);
    assert_eq!(reader.state().unwrap(), expected_state());
    let folded: Vec<u64> = (0..120).map(|number| number * 2).collect();
    // In the checkpoint set.
    assert_eq!(blocks(&reader, 1, 2), folded);
    assert_eq!(blocks(&reader, 2, 3), [100, 101, 102, 255]);
    assert_eq!(blocks(&reader, 3, 4), [7, 8, 9]);
    assert_eq!(blocks(&reader, 4, u64::MAX), [31]);
}

#[test]
fn every_version_still_opens_and_tells_the_same() {
    for version in VERSIONS {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk.hrl");
        decode(fixture_of(version), &path);
        assert_eq!(encode(&path), fixture_of(version));
        check(&path);
        assert!(verify(&path).unwrap().problems.is_empty());
        let (journal, report) = open(&path, &options()).unwrap();
        // It was closed cleanly, so it counts in every boot.
        assert_eq!((report.found, report.holes), (Found::Clean, 0));
        assert_eq!(report.suspicion, None);
        assert_eq!(journal.state(), expected_state());
        check(&path);
    }
}

#[test]
fn a_disk_written_since_is_found_by_the_versions_that_keep_times() {
    let modified = Time(SEEN.modified.0 + 1);
    let written = JournalOptions {
        seen: Some(Moment { modified, ..SEEN }),
        ..options()
    };
    let known = SEEN.modified;
    for (version, expected) in [
        (Version::First, None),
        (
            Version::Second,
            Some(Suspicion::Written { modified, known }),
        ),
        (Version::Third, Some(Suspicion::Written { modified, known })),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk.hrl");
        decode(fixture_of(version), &path);
        let (journal, report) = open(&path, &written).unwrap();
        assert_eq!(report.suspicion, expected, "{version:?}");
        let state = EpochState {
            closed: None,
            resync: Some(Epoch(5)),
            ..expected_state()
        };
        let expected_state = expected.map_or(expected_state(), |_| state);
        assert_eq!(journal.state(), expected_state, "{version:?}");
    }
}

#[test]
fn a_journal_of_any_version_grows_with_its_disk() {
    for version in VERSIONS {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk.hrl");
        decode(fixture_of(version), &path);
        let reader = JournalReader::open(&path).unwrap();
        let grown = JournalOptions {
            disk_size_bytes: 100_000 * BLOCK_SIZE,
            ..options()
        };
        let (journal, report) = open(&path, &grown).unwrap();
        assert_eq!(report.grown_from_bytes, Some(BLOCKS * BLOCK_SIZE));
        assert_eq!(journal.state(), expected_state());
        let folded: Vec<u64> = (0..120).map(|number| number * 2).collect();
        assert_eq!(blocks(&reader, 1, 2), folded);
        assert_eq!(blocks(&reader, 2, 3), [100, 101, 102, 255]);
        assert_eq!(blocks(&reader, 3, 4), [7, 8, 9]);
        let open_blocks: Vec<u64> = std::iter::once(31).chain(BLOCKS..100_000).collect();
        assert_eq!(blocks(&reader, 4, u64::MAX), open_blocks);
        assert!(verify(&path).unwrap().problems.is_empty());
    }
}

/// What is written today tells the same. With FIXTURE_FOLDER set it is kept there, as the fixture of
/// a new version.
#[test]
fn what_is_written_today_tells_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.hrl");
    let (journal, _) = open(&path, &options()).unwrap();
    let note = |epoch, first_block, block_count, operation| {
        let extent = Extent {
            first_block,
            block_count,
        };
        journal.record(Epoch(epoch), extent, operation);
    };
    journal.update(|state| state.cut(Epoch(2))).unwrap();
    journal.update(|state| state.commit(Epoch(1))).unwrap();
    for number in 0..360 {
        note(2, number % 120 * 2, 1, Operation::Write);
    }
    journal.raise_alarm(Epoch(2));
    journal.maintain().unwrap();
    assert_eq!(journal.sets_in_use(), 1);
    journal.update(|state| state.cut(Epoch(3))).unwrap();
    journal.update(|state| state.seal(Epoch(2))).unwrap();
    note(3, 100, 3, Operation::Trim);
    note(3, 255, 1, Operation::WriteZeroes);
    journal.update(|state| state.cut(Epoch(4))).unwrap();
    journal.update(|state| state.seal(Epoch(3))).unwrap();
    note(4, 7, 2, Operation::Write);
    journal.ring().claim();
    note(4, 9, 1, Operation::Write);
    journal.update(|state| state.cut(Epoch(5))).unwrap();
    note(5, 31, 1, Operation::Write);
    drop(journal);
    // Opened once more, so that the hole is filled.
    let (journal, report) = open(&path, &options()).unwrap();
    assert_eq!(report.holes, 1);
    journal.close().unwrap();
    drop(journal);
    check(&path);
    if let Some(target) = std::env::var_os("FIXTURE_FOLDER") {
        let name = format!("version-{}.txt", super::format::VERSION as u32);
        std::fs::write(Path::new(&target).join(name), encode(&path)).unwrap();
    }
}
