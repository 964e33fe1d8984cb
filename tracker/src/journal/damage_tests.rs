//! A journal in which every byte is flipped, one at a time, and one that is cut short anywhere.
//!
//! Each byte of each area is flipped and what its decoder makes of it is compared with the truth. For as
//! many of them the journal is opened as a whole, closed or left by a kill or a power cut; outside of an
//! optimized build only for some.

use std::collections::BTreeSet;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::checkpoint::SetPlace;
use super::evidence::{Evidence, read_intents, scan};
use super::format::{
    ALARM_OFFSET, ALARM_WORDS, INTENT_OFFSET, PAGE_BYTES, PageState, Superblock, SuperblockFault,
    TIME_WORDS, judge_checkpoint_page,
};
use super::head::{Head, decode_superblocks, map_checked, read_superblock};
use super::mapping::SharedWords;
use super::overflow::OverflowPlace;
use super::recovery::JournalOptions;
use super::specimen::{
    Account, BOOT, Blocks, NEXT_BOOT, Specimen, closed, folder, left_open, newest_copy, options,
    superblock,
};
use super::verdict::Intents;
use super::{Found, RecoveryReport, Suspicion, open};
use crate::error::{Error, ErrorKind};
use crate::extent::Epoch;
use crate::failpoint::set_boot;

/// Only each so many bytes where each costs milliseconds. Prime, so that every byte of a word and of a slot
/// has its turn.
const STEP: usize = if cfg!(debug_assertions) { 61 } else { 1 };

/// What a byte becomes: a different change at each place.
fn flipped(byte: u8, place: usize) -> u8 {
    byte ^ (place % 255 + 1) as u8
}

/// A file with the bytes of a journal, of which one is damaged at a time.
struct Victim {
    _folder: tempfile::TempDir,
    path: PathBuf,
    file: File,
    bytes: &'static [u8],
    layout: Superblock,
}

impl Victim {
    fn of(specimen: &'static Specimen) -> Self {
        let folder = folder();
        let path = folder.path().join("disk.hrl");
        let bytes = &specimen.bytes[..];
        std::fs::write(&path, bytes).unwrap();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        Self {
            _folder: folder,
            path,
            file,
            bytes,
            layout: superblock(bytes, newest_copy(bytes)),
        }
    }

    fn flip(&self, place: usize) {
        let byte = flipped(self.bytes[place], place);
        self.file.write_all_at(&[byte], place as u64).unwrap();
    }

    fn mend(&self, place: usize) {
        let byte = &self.bytes[place..=place];
        self.file.write_all_at(byte, place as u64).unwrap();
    }

    fn head(&self) -> Head {
        map_checked(&self.path, &self.file, true, None).unwrap()
    }

    fn gather(&self, words: &SharedWords) -> Evidence {
        Evidence::gather(&self.path, words, &self.layout, &options(), BOOT)
    }

    fn alarm(&self) -> Range<usize> {
        ALARM_OFFSET as usize..ALARM_OFFSET as usize + 8 * ALARM_WORDS
    }

    fn times(&self) -> Range<usize> {
        self.alarm().end..self.alarm().end + 8 * TIME_WORDS
    }

    fn intents(&self) -> Range<usize> {
        INTENT_OFFSET as usize..self.layout.overflow_offset.get() as usize
    }

    fn overflow(&self) -> Range<usize> {
        self.intents().end..self.layout.ring_offset.get() as usize
    }

    fn ring(&self) -> Range<usize> {
        self.overflow().end..self.layout.head_bytes() as usize
    }

    fn checkpoints(&self) -> Range<usize> {
        self.layout.checkpoint_offset.get() as usize..self.layout.file_bytes() as usize
    }

    /// The first words of both halves of the overflow bits.
    fn is_overflow_epoch(&self, place: usize) -> bool {
        let overflow = self.overflow();
        overflow.contains(&place) && (place - overflow.start) % (overflow.len() / 2) < 8
    }

    /// The pages of the intent log that tell the table, that of the transaction before them, and that
    /// which is written next.
    fn telling_pages(&self) -> BTreeSet<usize> {
        let words = self.head().words;
        let next = read_intents(&words, &self.layout).unwrap().next as usize;
        let pages = self.intents().len() / PAGE_BYTES;
        (next - 3..=next).map(|sequence| sequence % pages).collect()
    }
}

#[test]
fn every_byte_of_a_superblock_that_is_flipped_shows() {
    let victim = Victim::of(left_open());
    let Head { words, .. } = victim.head();
    for place in 0..2 * PAGE_BYTES {
        victim.flip(place);
        let copy = place / PAGE_BYTES;
        let decoded = decode_superblocks(&words);
        let fault = decoded[copy].as_ref().err();
        assert_eq!(fault, Some(&SuperblockFault::Damaged), "byte {place}");
        for boot in [None, Some(BOOT)] {
            let error = read_superblock(&victim.path, &words, boot).err().unwrap();
            assert_eq!(error.kind(), ErrorKind::Corrupt, "byte {place}");
        }
        // Only after a power cut the other one counts.
        let (other, found, damaged) =
            read_superblock(&victim.path, &words, Some(NEXT_BOOT)).unwrap();
        assert_eq!((found, damaged), (1 - copy, true), "byte {place}");
        let kept = superblock(victim.bytes, found);
        assert_eq!(other.sequence.get(), kept.sequence.get(), "byte {place}");
        victim.mend(place);
    }
}

#[test]
fn every_byte_of_the_ring_that_is_flipped_shows() {
    let victim = Victim::of(left_open());
    let Head { words, .. } = victim.head();
    let look = || scan(&victim.path, &words, &victim.layout);
    let truth = look().unwrap();
    for place in victim.ring() {
        victim.flip(place);
        let found = look().err().map(|error| error.kind());
        assert_eq!(found, Some(ErrorKind::Corrupt), "byte {place}");
        victim.mend(place);
    }
    assert_eq!(look().unwrap().records, truth.records);
}

#[test]
fn every_byte_of_alarm_and_times_that_is_flipped_shows() {
    let victim = Victim::of(left_open());
    let Head { words, .. } = victim.head();
    let epochs = victim.overflow();
    let epochs = epochs.filter(|&place| victim.is_overflow_epoch(place));
    let places = victim.alarm().chain(victim.times()).chain(epochs);
    for place in places {
        victim.flip(place);
        let evidence = victim.gather(&words);
        let found = evidence.findings;
        let alarm = victim.alarm().contains(&place) || victim.is_overflow_epoch(place);
        let time = victim.times().contains(&place);
        assert_eq!(found.alarm_damaged, alarm, "byte {place}");
        assert!(!found.ring_damaged, "byte {place}");
        let suspicion = time.then_some(Suspicion::Damaged);
        assert_eq!(evidence.suspicion, suspicion, "byte {place}");
        assert_eq!(found.intents, Intents::Whole);
        victim.mend(place);
    }
    // What has no meaning is not looked at.
    for place in (victim.times().end..INTENT_OFFSET as usize).step_by(STEP) {
        victim.flip(place);
        let found = victim.gather(&words).findings;
        assert!(!found.alarm_damaged && !found.ring_damaged && !found.written_by_others);
        victim.mend(place);
    }
}

#[test]
fn every_byte_of_the_intent_log_that_is_flipped_shows_or_does_not_matter() {
    let victim = Victim::of(left_open());
    let Head { words, .. } = victim.head();
    let truth = read_intents(&words, &victim.layout).unwrap();
    let sorted = |mut regions: Vec<u32>| {
        regions.sort_unstable();
        regions
    };
    let armed = sorted(truth.regions);
    let expected: Vec<u32> = left_open().model.armed.iter().copied().collect();
    assert_eq!(armed, expected);
    let telling = victim.telling_pages();
    let (mut damaged, mut unharmed) = (0, 0);
    for place in victim.intents() {
        let page = (place - victim.intents().start) / PAGE_BYTES;
        if !telling.contains(&page) && !place.is_multiple_of(3 * STEP - 2) {
            continue;
        }
        victim.flip(place);
        match read_intents(&words, &victim.layout) {
            Ok(found) => {
                assert_eq!(found.next, truth.next, "byte {place}");
                assert_eq!(sorted(found.regions), armed, "byte {place}");
                unharmed += 1;
            }
            Err(found) => {
                assert!(found.next > truth.next, "byte {place}");
                damaged += 1;
            }
        }
        victim.mend(place);
    }
    // Two pages tell the table; a third is where the next would stand, had it been answered.
    assert!((2 * PAGE_BYTES..=3 * PAGE_BYTES).contains(&damaged));
    assert!(unharmed > PAGE_BYTES);
}

#[test]
fn every_byte_of_the_overflow_bits_that_is_flipped_shows_or_only_adds() {
    let victim = Victim::of(left_open());
    let Head { words, .. } = victim.head();
    let bits = OverflowPlace::of(&victim.layout).bits(&words);
    let told = |after: u64, through: u64| {
        let mut blocks = Blocks::default();
        bits.each_extent(Epoch(after), Epoch(through), |extent| blocks.insert(extent));
        blocks
    };
    let truth = [told(2, 3), told(3, 4)];
    for place in victim.overflow() {
        if victim.is_overflow_epoch(place) {
            continue;
        }
        victim.flip(place);
        assert!(told(2, 3).contains_all(&truth[0]), "byte {place}");
        assert!(told(3, 4).contains_all(&truth[1]), "byte {place}");
        victim.mend(place);
    }
}

#[test]
fn every_byte_of_a_checkpoint_page_that_is_flipped_shows() {
    let victim = Victim::of(left_open());
    let mut ours = 0;
    for set in 0..2 {
        let (place, generation) = (
            SetPlace::of(&victim.layout, set),
            victim.layout.sets[set].generation.get(),
        );
        for page in 0..victim.layout.checkpoint_pages.get() {
            let (mut bytes, state) = place.read_page(&victim.file, page, generation).unwrap();
            assert_ne!(state, PageState::Damaged);
            ours += u32::from(state == PageState::Ours);
            // All pages that were never written are alike.
            for at in (0..PAGE_BYTES).filter(|_| state == PageState::Ours || page == 15) {
                let kept = bytes[at];
                bytes[at] = flipped(kept, at);
                let state = judge_checkpoint_page(&bytes, page, generation);
                assert_eq!(state, PageState::Damaged, "byte {at} of page {page}");
                bytes[at] = kept;
            }
        }
    }
    assert!(ours > 8);
}

/// How a journal was left, and what opens it.
struct Setting {
    specimen: &'static Specimen,
    boot: [u8; 16],
    power_cut: bool,
}

impl Setting {
    fn killed() -> Self {
        Self {
            specimen: left_open(),
            boot: BOOT,
            power_cut: false,
        }
    }

    fn power_cut() -> Self {
        Self {
            specimen: left_open(),
            boot: NEXT_BOOT,
            power_cut: true,
        }
    }

    fn closed(boot: [u8; 16]) -> Self {
        Self {
            specimen: closed(),
            boot,
            power_cut: false,
        }
    }

    fn check(&self, account: &Account, opened: bool) -> Result<(), String> {
        self.specimen.check(account, opened && self.power_cut)
    }

    /// Opens a damaged journal: what it was taken for, or nothing if it was refused.
    fn judge(&self, path: &Path, options: &JournalOptions, what: &str) -> Option<RecoveryReport> {
        let refused = |error: &Error| {
            let says = error.to_string();
            assert!(
                says.contains("disk.hrl") && says.contains("--resync"),
                "{what}: {says}"
            );
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{what}: {says}");
        };
        match Account::of(path) {
            Ok(account) => {
                let known = self.check(&account, false);
                assert_eq!(known, Ok(()), "{what}: to a reader");
            }
            Err(error) => refused(&error),
        }
        match open(path, options) {
            Err(error) => {
                refused(&error);
                None
            }
            Ok((journal, report)) => {
                assert!(journal.watermarks().is_consistent(), "{what}");
                let account = Account::of(path).unwrap();
                let known = self.check(&account, true);
                assert_eq!(known, Ok(()), "{what}: {report}");
                let says = report.to_string().contains("every block counts");
                assert_eq!(says, account.open.all, "{what}: {report}");
                Some(report)
            }
        }
    }

    /// Flips each of these bytes in turn and opens the journal; what each was taken for.
    fn flip(
        &self,
        places: impl IntoIterator<Item = usize>,
        mut see: impl FnMut(usize, Option<RecoveryReport>),
    ) {
        let victim = Victim::of(self.specimen);
        set_boot(Some(self.boot));
        for place in places {
            victim.flip(place);
            let what = format!("byte {place} of {:#x}", victim.bytes[place]);
            let report = self.judge(&victim.path, &options(), &what);
            victim.mend(place);
            if report.is_some() {
                // Opening has written to it.
                victim.file.write_all_at(victim.bytes, 0).unwrap();
            } else {
                assert!(
                    std::fs::read(&victim.path).unwrap() == victim.bytes,
                    "{what}"
                );
            }
            see(place, report);
        }
        set_boot(None);
    }

    /// The same with bytes of all areas, and as many of each as matter.
    fn flip_all(&self, see: impl FnMut(usize, Option<RecoveryReport>)) {
        let victim = Victim::of(self.specimen);
        let (intents, checkpoints) = (victim.intents(), victim.checkpoints());
        let telling = victim.telling_pages();
        let telling = telling.iter().flat_map(|page| {
            let offset = intents.start + page * PAGE_BYTES;
            offset..offset + PAGE_BYTES
        });
        let fields = (0..264).chain(PAGE_BYTES - 8..PAGE_BYTES + 264);
        let words = fields
            .filter(|place| place % 3 == 0)
            .chain(victim.alarm())
            .chain(victim.times());
        let epochs = victim
            .overflow()
            .filter(|&place| victim.is_overflow_epoch(place));
        let others = (0..2 * PAGE_BYTES)
            .chain(telling)
            .chain(victim.overflow())
            .chain(victim.ring())
            .step_by(STEP);
        let rest = intents
            .clone()
            .step_by(61 * STEP)
            .chain(checkpoints.step_by(13 * STEP));
        let places: BTreeSet<usize> = words.chain(epochs).chain(others).chain(rest).collect();
        self.flip(places, see);
    }
}

/// What a flipped byte of an area may lead to.
fn is_in(victim: &Victim, place: usize) -> &'static str {
    if place < 2 * PAGE_BYTES {
        "superblock"
    } else if victim.alarm().contains(&place) || victim.is_overflow_epoch(place) {
        "alarm"
    } else if victim.times().contains(&place) {
        "time"
    } else if victim.ring().contains(&place) {
        "ring"
    } else {
        "other"
    }
}

#[test]
fn a_flipped_byte_after_a_kill_is_refused_or_only_adds() {
    let victim = Victim::of(left_open());
    Setting::killed().flip_all(|place, report| match (is_in(&victim, place), report) {
        ("superblock" | "alarm" | "ring", None) => {}
        ("time", Some(report)) => assert_eq!(report.suspicion, Some(Suspicion::Damaged)),
        ("other", Some(report)) => {
            assert_eq!((report.found, report.suspicion), (Found::Killed, None))
        }
        (area, report) => panic!("byte {place} of {area}: {report:?}"),
    });
}

#[test]
fn a_flipped_byte_of_a_closed_journal_is_refused_or_only_adds() {
    let victim = Victim::of(closed());
    Setting::closed(BOOT).flip_all(|place, report| match (is_in(&victim, place), report) {
        ("superblock" | "alarm" | "ring", None) => {}
        ("time", Some(report)) => assert_eq!(report.suspicion, Some(Suspicion::Damaged)),
        ("other", Some(report)) => {
            assert_eq!((report.found, report.suspicion), (Found::Clean, None))
        }
        (area, report) => panic!("byte {place} of {area}: {report:?}"),
    });
}

#[test]
fn a_flipped_byte_of_a_journal_closed_in_another_boot_is_refused_or_only_adds() {
    let victim = Victim::of(closed());
    let newest = newest_copy(victim.bytes);
    Setting::closed(NEXT_BOOT).flip_all(|place, report| match (is_in(&victim, place), report) {
        ("alarm" | "ring", None) => {}
        ("superblock", Some(report)) => {
            // The older one says that it was not closed.
            let lost = matches!(report.found, Found::Lost(_));
            assert_eq!(lost, place / PAGE_BYTES == newest, "byte {place}: {report}");
        }
        ("time", Some(report)) => assert_eq!(report.suspicion, Some(Suspicion::Damaged)),
        ("other", Some(report)) => {
            assert_eq!((report.found, report.suspicion), (Found::Clean, None))
        }
        (area, report) => panic!("byte {place} of {area}: {report:?}"),
    });
}

#[test]
fn a_flipped_byte_after_a_power_cut_is_never_refused_and_only_adds() {
    let victim = Victim::of(left_open());
    Setting::power_cut().flip_all(|place, report| {
        let Some(report) = report else {
            panic!("byte {place} is refused");
        };
        let lost = matches!(report.found, Found::Lost(_));
        match is_in(&victim, place) {
            "other" if !lost => assert_eq!(report.found, Found::PowerCut),
            "other" => assert!(victim.intents().contains(&place), "byte {place}: {report}"),
            area => assert!(lost, "byte {place} of {area}: {report}"),
        }
    });
}

/// All lengths that are tried: each byte of the first pages, each sector, and around each border.
fn lengths(victim: &Victim) -> BTreeSet<usize> {
    let pages = (0..=victim.bytes.len()).step_by(PAGE_BYTES);
    let borders = pages.flat_map(|border| [border.saturating_sub(1), border, border + 1]);
    let sectors = (0..victim.bytes.len()).step_by(512);
    let all = (0..INTENT_OFFSET as usize + 2)
        .chain(sectors)
        .chain(borders);
    all.chain(victim.bytes.len() - 600..victim.bytes.len() + 600)
        .collect()
}

#[test]
fn a_journal_cut_short_anywhere_is_refused_and_one_that_is_longer_is_cut() {
    for setting in [
        Setting::killed(),
        Setting::power_cut(),
        Setting::closed(BOOT),
        Setting::closed(NEXT_BOOT),
    ] {
        let victim = Victim::of(setting.specimen);
        set_boot(Some(setting.boot));
        let whole = victim.bytes.len();
        // From the longest on, so that nothing has to be put back.
        for length in lengths(&victim)
            .into_iter()
            .rev()
            .filter(|length| *length < whole)
        {
            victim.file.set_len(length as u64).unwrap();
            let what = format!("cut short at {length}");
            let report = setting.judge(&victim.path, &options(), &what);
            assert!(report.is_none(), "{what}: {report:?}");
            assert_eq!(victim.file.metadata().unwrap().len(), length as u64);
        }
        for length in [whole, whole + 1, whole + 512, whole + PAGE_BYTES, 2 * whole] {
            victim.file.set_len(0).unwrap();
            victim.file.write_all_at(victim.bytes, 0).unwrap();
            victim.file.set_len(length as u64).unwrap();
            let what = format!("{length} bytes");
            assert!(setting.judge(&victim.path, &options(), &what).is_some());
            assert_eq!(
                victim.file.metadata().unwrap().len(),
                whole as u64,
                "{what}"
            );
        }
        set_boot(None);
    }
}
