//! Tests of single behaviours of a journal as a whole.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use zerocopy::IntoBytes;

use super::format::{
    ALARM_OFFSET, ALARM_WORDS, CHECKPOINT_PAGE_BLOCKS, FLAG_CLEAN, Operation, PAGE_BYTES,
    RECORD_BYTES, Superblock, TIME_WORDS, Time,
};
use super::reader::JournalReader;
use super::state::EpochState;
use super::verdict::Why;
use super::{Found, Journal, JournalOptions, Moment, RecoveryReport, Suspicion, open};
use crate::error::ErrorKind;
use crate::extent::{BLOCK_SIZE, Epoch, Extent};
use crate::failpoint::{Place, set_boot, watching};

/// Blocks of the disk: three checkpoint pages, the last one short.
const BLOCKS: u64 = 70_001;
const RING_BYTES: u64 = 16 << 10;

fn options() -> JournalOptions {
    JournalOptions {
        disk_identity: [7; 16],
        disk_size_bytes: BLOCKS * BLOCK_SIZE,
        ring_bytes: RING_BYTES,
        intent_regions: 64,
        rebuild: false,
        seen: None,
    }
}

fn write(journal: &Journal, epoch: u64, first_block: u64, block_count: u64) {
    let extent = Extent {
        first_block,
        block_count,
    };
    journal.record(Epoch(epoch), extent, Operation::Write);
}

fn read_superblocks(path: &Path) -> [Superblock; 2] {
    let file = std::fs::File::open(path).unwrap();
    [0, 1].map(|copy: u64| {
        let mut page = vec![0; PAGE_BYTES];
        file.read_exact_at(&mut page, copy * PAGE_BYTES as u64)
            .unwrap();
        Superblock::decode(&page).unwrap()
    })
}

/// Changes the newest superblock of a journal that nobody has open.
fn rewrite_superblock(path: &Path, change: impl FnOnce(&mut Superblock)) {
    let superblocks = read_superblocks(path);
    let newest = usize::from(superblocks[1].sequence.get() > superblocks[0].sequence.get());
    let mut superblock = superblocks[newest];
    change(&mut superblock);
    superblock.seal();
    let file = std::fs::File::options().write(true).open(path).unwrap();
    let offset = (newest * PAGE_BYTES) as u64;
    file.write_all_at(superblock.as_bytes(), offset).unwrap();
}

fn new_journal(folder: &tempfile::TempDir) -> (PathBuf, Journal) {
    let path = folder.path().join("disk.hrl");
    let (journal, report) = open(&path, &options()).unwrap();
    assert_eq!(report.found, Found::New(None));
    (path, journal)
}

/// Commits the first epoch, as of which every block of a new journal counts as changed.
fn past_first_epoch(journal: &Journal) {
    journal.update(|state| state.cut(Epoch(2))).unwrap();
    journal.update(|state| state.commit(Epoch(1))).unwrap();
    assert_eq!(journal.state().resync, None);
}

#[test]
fn an_alarm_of_the_open_epoch_leaves_that_of_the_closed_one() {
    let folder = tempfile::tempdir().unwrap();
    let (path, journal) = new_journal(&folder);
    past_first_epoch(&journal);
    journal.raise_alarm(Epoch(2));
    journal.update(|state| state.cut(Epoch(3))).unwrap();
    journal.raise_alarm(Epoch(3));
    let reader = JournalReader::open(&path).unwrap();
    assert!(reader.dirty(Epoch(1), Epoch(2)).unwrap().all());
    assert!(reader.dirty(Epoch(2), Epoch(3)).unwrap().all());
    journal.update(|state| state.commit(Epoch(2))).unwrap();
    assert!(!reader.dirty(Epoch(1), Epoch(2)).unwrap().all());
    assert!(reader.dirty(Epoch(2), Epoch(3)).unwrap().all());
}

#[test]
fn no_copy_of_the_superblock_stays_clean_once_the_journal_is_open() {
    let folder = tempfile::tempdir().unwrap();
    let (path, journal) = new_journal(&folder);
    journal.close().unwrap();
    drop(journal);
    assert!(
        read_superblocks(&path)
            .iter()
            .any(|s| s.flags.get() == FLAG_CLEAN)
    );
    let (_journal, report) = open(&path, &options()).unwrap();
    assert_eq!(report.found, Found::Clean);
    // The newer copy may be torn by a power cut while it is rewritten; the older one counts then.
    for superblock in read_superblocks(&path) {
        assert_eq!(superblock.flags.get(), 0);
    }
}

#[test]
fn no_epoch_of_a_checkpoint_is_opened_again() {
    let folder = tempfile::tempdir().unwrap();
    let (path, journal) = new_journal(&folder);
    drop(journal);
    rewrite_superblock(&path, |superblock| {
        superblock.sets[0].lowest_epoch = 3.into();
        superblock.sets[0].highest_epoch = 7.into();
    });
    let (journal, _) = open(&path, &options()).unwrap();
    assert!(journal.state().open >= Epoch(7));
}

#[test]
fn a_boot_without_a_clean_stop_keeps_what_the_spool_holds() {
    let folder = tempfile::tempdir().unwrap();
    let (path, journal) = new_journal(&folder);
    journal.update(|state| state.cut(Epoch(2))).unwrap();
    journal.update(|state| state.seal(Epoch(1))).unwrap();
    journal.update(|state| state.cut(Epoch(3))).unwrap();
    drop(journal);
    rewrite_superblock(&path, |superblock| superblock.boot_id = [1; 16]);
    let (journal, report) = open(&path, &options()).unwrap();
    assert_eq!(report.found, Found::PowerCut);
    let expected = EpochState {
        open: Epoch(3),
        closed: None,
        sealed: Epoch(1),
        committed: Epoch::ZERO,
        resync: Some(Epoch(1)),
    };
    assert_eq!(journal.state(), expected);
    // The recovery point that waits in the spool may still be committed.
    journal.update(|state| state.commit(Epoch(1))).unwrap();
    assert_eq!(journal.state().resync, None);
}

#[test]
fn a_record_in_a_slot_of_another_one_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (path, journal) = new_journal(&folder);
    write(&journal, 1, 5, 1);
    write(&journal, 1, 6, 1);
    drop(journal);
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .open(&path)
        .unwrap();
    let mut record = [0; RECORD_BYTES as usize];
    let ring = read_superblocks(&path)[0].ring_offset.get();
    file.read_exact_at(&mut record, ring + RECORD_BYTES)
        .unwrap();
    file.write_all_at(&record, ring + 2 * RECORD_BYTES).unwrap();
    let reader = JournalReader::open(&path).unwrap();
    let error = reader.dirty(Epoch::ZERO, Epoch(1)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    let error = open(&path, &options()).map(|_| ()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
}

#[test]
fn epochs_leave_the_checkpoint_while_the_guest_goes_on_writing() {
    const EPOCH_BLOCKS: u64 = 700;
    let folder = tempfile::tempdir().unwrap();
    let (path, journal) = new_journal(&folder);
    let reader = JournalReader::open(&path).unwrap();
    let mut block = 0;
    for epoch in 1..30 {
        // Each epoch writes to blocks of its own, more than the ring takes; the one before is
        // committed in the middle of it.
        for number in 0..EPOCH_BLOCKS {
            write(&journal, epoch, block, 1);
            block += 1;
            journal.maintain().unwrap();
            if number == 500 {
                let before = Epoch(epoch - 1);
                journal.update(|state| state.commit(before)).unwrap();
            }
        }
        journal.update(|state| state.cut(Epoch(epoch + 1))).unwrap();
        let dirty = reader.dirty(Epoch(epoch - 1), Epoch(epoch)).unwrap();
        let reported = dirty.block_count().unwrap();
        // What was folded together with the epoch before may still be there.
        assert!(
            (EPOCH_BLOCKS..=3 * EPOCH_BLOCKS).contains(&reported),
            "epoch {epoch}: {reported} blocks"
        );
        journal.update(|state| state.seal(Epoch(epoch))).unwrap();
    }
}

#[test]
fn a_hole_that_a_killed_worker_left_is_filled_and_passed() {
    let folder = tempfile::tempdir().unwrap();
    let (path, journal) = new_journal(&folder);
    write(&journal, 1, 1, 1);
    journal.ring().claim();
    write(&journal, 1, 2, 1);
    journal.update(|state| state.cut(Epoch(2))).unwrap();
    journal.update(|state| state.commit(Epoch(1))).unwrap();
    // A worker that lives may still fill it.
    assert_eq!(journal.ring().used(), 2);
    drop(journal);
    let (journal, report) = open(&path, &options()).unwrap();
    assert_eq!((report.found, report.holes), (Found::Killed, 1));
    assert_eq!(journal.ring().used(), 0);
}

/// The blocks that are reported one by one.
fn reported(path: &Path, after: u64, through: u64) -> Vec<u64> {
    let reader = JournalReader::open(path).unwrap();
    let dirty = reader.dirty(Epoch(after), Epoch(through)).unwrap();
    let extents = dirty.extents().map(Result::unwrap);
    extents
        .flat_map(|extent| extent.first_block..extent.end_block())
        .collect()
}

#[test]
fn a_reader_that_the_tracker_overtakes_looks_again() {
    let folder = tempfile::tempdir().unwrap();
    let (path, journal) = new_journal(&folder);
    past_first_epoch(&journal);
    for block in 0..100 {
        write(&journal, 2, block * 2, 1);
    }
    journal.update(|state| state.cut(Epoch(3))).unwrap();
    let expected = reported(&path, 1, 2);
    assert_eq!(expected.len(), 100);
    let mut fresh = true;
    let overtake = move |place| {
        // The tracker folds these records and uses their slots again, while the reader sleeps.
        for number in 0..1000 {
            if place == Place::ReadAfterSuperblockBeforeRing && fresh {
                write(&journal, 3, 1000 + number, 1);
                journal.maintain().unwrap();
            }
        }
        assert!(journal.ring().tail() > 512);
        fresh = false;
    };
    assert_eq!(watching(overtake, || reported(&path, 1, 2)), expected);
}

#[test]
fn slots_are_reused_only_after_what_they_held_is_published() {
    const RECORDS: u64 = 2048;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.hrl");
    let options = JournalOptions {
        ring_bytes: RECORDS * RECORD_BYTES,
        ..options()
    };
    let (journal, _) = open(&path, &options).unwrap();
    let kept = folder.path().join("kept.hrl");
    let (journal, from, to) = (std::rc::Rc::new(journal), path.clone(), kept.clone());
    for block in 0..RECORDS * 3 / 4 {
        write(&journal, 1, block * 2, 1);
    }
    let (other, mut next, mut killed) = (std::rc::Rc::clone(&journal), RECORDS * 3 / 4, false);
    let fill_and_kill = move |place| {
        if place == Place::FoldAfterPagesBeforePublish && !killed {
            killed = true;
            let mut before = 0;
            while other.records_written() > before {
                before = other.records_written();
                write(&other, 1, next * 2, 1);
                next += 1;
            }
            std::fs::copy(&from, &to).unwrap();
        }
    };
    watching(fill_and_kill, || journal.maintain().unwrap());
    let recorded = journal.records_written();
    let _reopened = open(&kept, &options).unwrap();
    let reported = reported(&kept, 0, 1);
    for block in (0..recorded).map(|number| number * 2) {
        assert!(reported.binary_search(&block).is_ok(), "{block}");
    }
}

#[test]
fn a_power_cut_in_the_middle_of_distrust_is_distrusted_again() {
    let folder = tempfile::tempdir().unwrap();
    let (path, journal) = new_journal(&folder);
    past_first_epoch(&journal);
    write(&journal, 2, 77, 1);
    drop(journal);
    rewrite_superblock(&path, |superblock| superblock.boot_id = [1; 16]);
    // A record that is damaged, not one that is old.
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    let ring = read_superblocks(&path)[0].ring_offset.get();
    file.write_all_at(&[0xa5], ring + RECORD_BYTES + 20)
        .unwrap();
    let (from, to) = (path.clone(), folder.path().to_owned());
    let keep = move |place| {
        std::fs::copy(&from, to.join(format!("{place:?}.hrl"))).unwrap();
    };
    let (journal, report) = watching(keep, || open(&path, &options()).unwrap());
    assert_eq!(report.found, Found::Lost(Why::Ring));
    drop(journal);
    for place in [
        Place::DistrustAfterPublishBeforeRing,
        Place::DistrustAfterRingBeforeSets,
        Place::RecoverAfterSyncBeforeChain,
        Place::RecoverAfterChainBeforePublish,
        Place::PublishAmidWords,
        Place::RecoverAfterFirstPublishBeforeSecond,
    ] {
        let path = folder.path().join(format!("{place:?}.hrl"));
        let (journal, _) = open(&path, &options()).unwrap();
        assert_eq!(journal.state().resync, Some(Epoch(2)), "{place:?}");
    }
}

/// Folds records into a checkpoint set until it is in use.
fn fold(journal: &Journal, epoch: u64, first_block: u64) {
    for number in 0..370 {
        write(journal, epoch, first_block + number * 2, 1);
    }
    journal.maintain().unwrap();
    assert!(journal.sets_in_use() > 0);
}

/// A worker finds the ring full, and before it says so the ring is folded and takes some records of others.
#[test]
fn a_ring_that_was_full_takes_records_again_although_it_is_not_nearly_full_any_more() {
    let folder = tempfile::tempdir().unwrap();
    let (_, journal) = new_journal(&folder);
    let journal = std::sync::Arc::new(journal);
    past_first_epoch(&journal);
    let capacity = journal.ring().capacity();
    let (other, mut refused) = (std::sync::Arc::clone(&journal), false);
    let between = move |place| {
        if place == Place::RecordAfterRefusalBeforeAlarm && !refused {
            refused = true;
            other.maintain().unwrap();
            for number in 0..capacity / 8 {
                write(&other, 2, number * 2, 1);
            }
        }
    };
    watching(between, || {
        for number in 0..capacity + 1 {
            write(&journal, 2, number * 2, 1);
        }
    });
    assert!(journal.is_overflowing());
    let share = journal.ring().used() * 100 / capacity;
    assert!((51..70).contains(&share), "{share}%");
    journal.maintain().unwrap();
    assert!(!journal.is_overflowing());
}

#[test]
fn a_disk_grows_within_its_last_block_its_page_its_room_and_beyond() {
    // Bytes before and after, and the blocks that count as changed then.
    let room = 6 * CHECKPOINT_PAGE_BLOCKS * BLOCK_SIZE;
    let begin = BLOCKS * BLOCK_SIZE;
    let last = BLOCKS - 1;
    let table = [
        (begin - 3584, begin - 3072, last..BLOCKS, false),
        (begin - 512, begin, last..BLOCKS, false),
        (begin, begin + 512, BLOCKS..BLOCKS + 1, false),
        (begin - 512, begin + 512, last..BLOCKS + 1, false),
        (begin, room, BLOCKS..room / BLOCK_SIZE, false),
        (begin, room + 512, BLOCKS..room / BLOCK_SIZE + 1, true),
    ];
    for (before, after, new, moves) in table {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk.hrl");
        let sized = |disk_size_bytes| JournalOptions {
            disk_size_bytes,
            ..options()
        };
        let (journal, _) = open(&path, &sized(before)).unwrap();
        past_first_epoch(&journal);
        fold(&journal, 2, 0);
        journal.update(|state| state.cut(Epoch(3))).unwrap();
        let reader = JournalReader::open(&path).unwrap();
        let folded = reported(&path, 1, 2);
        let length = std::fs::metadata(&path).unwrap().len();
        journal.grow(after, Epoch(3)).unwrap();
        // A reader that was there before sees it as well.
        assert_eq!(reader.disk_size_bytes().unwrap(), after);
        assert_eq!(reported(&path, 2, 3), Vec::from_iter(new.clone()));
        assert_eq!(reported(&path, 1, 2), folded);
        assert_eq!(std::fs::metadata(&path).unwrap().len() > length, moves);
        assert!(super::verify(&path).unwrap().problems.is_empty());
        // It may be repeated, and goes on as any other.
        journal.grow(after, Epoch(3)).unwrap();
        fold(&journal, 3, 1000);
        write(&journal, 3, new.end - 1, 1);
        let error = journal.grow(before, Epoch(3)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        drop(journal);
        let (_journal, report) = open(&path, &sized(after)).unwrap();
        assert_eq!(report.grown_from_bytes, None);
        let holds = |after, through, blocks: &[u64]| {
            let found: BTreeSet<u64> = reported(&path, after, through).into_iter().collect();
            blocks.iter().all(|block| found.contains(block))
        };
        assert!(holds(2, 3, &Vec::from_iter(new)));
        assert!(holds(1, 2, &folded));
    }
}

#[test]
fn a_smaller_disk_than_the_journals_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (path, journal) = new_journal(&folder);
    drop(journal);
    let smaller = JournalOptions {
        disk_size_bytes: BLOCKS * BLOCK_SIZE - 512,
        ..options()
    };
    let error = open(&path, &smaller).map(|_| ()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Mismatch);
}

#[test]
fn a_reader_follows_checkpoint_sets_that_move_under_it() {
    for place in [
        Place::ReadAfterSuperblockBeforeRing,
        Place::ReadAfterSeekBeforePage,
    ] {
        let folder = tempfile::tempdir().unwrap();
        let (path, journal) = new_journal(&folder);
        past_first_epoch(&journal);
        // Pages apart from each other, so that the move comes between two of them.
        fold(&journal, 2, 0);
        fold(&journal, 2, 2 * CHECKPOINT_PAGE_BLOCKS);
        journal.update(|state| state.cut(Epoch(3))).unwrap();
        let expected = reported(&path, 1, 2);
        let mut times = 0;
        let grow = move |reached| {
            if reached == place && times < 3 {
                times += 1;
                let blocks = BLOCKS << (2 * times);
                journal.grow(blocks * BLOCK_SIZE, Epoch(3)).unwrap();
            }
        };
        assert_eq!(watching(grow, || reported(&path, 1, 2)), expected);
    }
}

#[test]
fn a_growth_that_finds_no_room_in_the_ring_counts_coarsely_and_far_beyond_as_all() {
    let folder = tempfile::tempdir().unwrap();
    let (path, journal) = new_journal(&folder);
    past_first_epoch(&journal);
    for block in 0..600 {
        write(&journal, 2, block * 2, 1);
    }
    journal.update(|state| state.cut(Epoch(3))).unwrap();
    journal.grow(2 * BLOCKS * BLOCK_SIZE, Epoch(3)).unwrap();
    assert!(journal.is_overflowing());
    let changed = reported(&path, 2, 3);
    // From the region in which the old end lay.
    let expected: Vec<u64> = (BLOCKS / 256 * 256..2 * BLOCKS).collect();
    assert_eq!(changed, expected);
    let reader = JournalReader::open(&path).unwrap();
    assert!(!reader.dirty(Epoch(2), Epoch(3)).unwrap().all());
    journal.grow(200 * BLOCKS * BLOCK_SIZE, Epoch(3)).unwrap();
    assert!(reader.dirty(Epoch(2), Epoch(3)).unwrap().all());
}

#[test]
fn a_disk_of_which_a_sync_failed_is_not_believed_after_the_next_power_cut() {
    let folder = tempfile::tempdir().unwrap();
    let begin = |name: &str| {
        let path = folder.path().join(name);
        let (journal, _) = open(&path, &options()).unwrap();
        past_first_epoch(&journal);
        journal.note_disk_failure().unwrap();
        (path, journal)
    };
    let (killed, journal) = begin("killed.hrl");
    drop(journal);
    // Within the boot the page cache has what was written.
    let (journal, report) = open(&killed, &options()).unwrap();
    assert_eq!((report.found, report.suspicion), (Found::Killed, None));
    drop(journal);
    let (closed, journal) = begin("closed.hrl");
    journal.close().unwrap();
    drop(journal);
    set_boot(Some([9; 16]));
    let opened = [&killed, &closed].map(|path| open(path, &options()).unwrap());
    set_boot(None);
    let [(first, killed), (second, closed)] = opened;
    assert_eq!(killed.found, Found::Lost(Why::DiskFailed));
    assert_eq!(closed.suspicion, Some(Suspicion::SyncFailed));
    for journal in [first, second] {
        assert_eq!(journal.state().resync, Some(Epoch(2)));
        assert_eq!(journal.superblock().flags.get(), 0);
    }
}

/// A disk that was last modified at this time.
fn seen(modified: i64) -> Moment {
    Moment::now(Time(modified))
}

fn open_seen(path: &Path, modified: i64) -> (Journal, RecoveryReport) {
    let options = JournalOptions {
        seen: Some(seen(modified)),
        ..options()
    };
    open(path, &options).unwrap()
}

fn dump(path: &Path) -> String {
    let mut text = Vec::new();
    super::dump(path, &mut text).unwrap();
    String::from_utf8(text).unwrap()
}

/// A journal past its first epoch with epoch 2 closed, for a disk last modified at 1000.
fn watched_journal(folder: &tempfile::TempDir) -> (PathBuf, Journal) {
    let path = folder.path().join("disk.hrl");
    let (journal, report) = open_seen(&path, 1000);
    assert_eq!((report.found, report.suspicion), (Found::New(None), None));
    past_first_epoch(&journal);
    write(&journal, 2, 5, 1);
    journal.update(|state| state.cut(Epoch(3))).unwrap();
    (path, journal)
}

#[test]
fn a_disk_put_back_counts_as_changed_until_that_is_committed() {
    let folder = tempfile::tempdir().unwrap();
    for closed in [true, false] {
        let (path, journal) = watched_journal(&folder);
        if closed {
            journal.close().unwrap();
        }
        drop(journal);
        let (journal, report) = open_seen(&path, 999);
        let (modified, known) = (Time(999), Time(1000));
        let expected = Suspicion::PutBack { modified, known };
        assert_eq!(report.suspicion, Some(expected));
        assert!(
            report.to_string().contains("every block counts"),
            "{report}"
        );
        // What was closed was not captured; it would be of two minds.
        let state = journal.state();
        assert_eq!((state.closed, state.resync), (None, Some(Epoch(3))));
        // Found once, it stays so, although the time is as it is known now.
        drop(journal);
        let (journal, report) = open_seen(&path, 999);
        assert_eq!(report.suspicion, None);
        assert_eq!(journal.state().resync, Some(Epoch(3)));
        journal.update(|state| state.cut(Epoch(4))).unwrap();
        journal.update(|state| state.commit(Epoch(3))).unwrap();
        drop(journal);
        let (journal, report) = open_seen(&path, 999);
        assert_eq!((report.suspicion, journal.state().resync), (None, None));
        drop(journal);
        std::fs::remove_file(path).unwrap();
    }
}

#[test]
fn a_kill_at_any_place_of_the_start_does_not_lose_what_was_found() {
    let folder = tempfile::tempdir().unwrap();
    let (path, journal) = watched_journal(&folder);
    journal.ring().claim();
    drop(journal);
    let moment = folder.path().join("moment.hrl");
    let images = Rc::new(RefCell::new(Vec::new()));
    let (kept, watched) = (Rc::clone(&images), path.clone());
    let keep = move |place| {
        kept.borrow_mut()
            .push((place, std::fs::read(&watched).unwrap()))
    };
    let (journal, _) = watching(keep, || open_seen(&path, 999));
    drop(journal);
    assert!(images.borrow().len() > 5);
    for (place, image) in images.take() {
        std::fs::write(&moment, image).unwrap();
        let (journal, _) = open_seen(&moment, 999);
        assert_eq!(journal.state().resync, Some(Epoch(3)), "{place:?}");
    }
}

#[test]
fn a_flipped_byte_of_a_time_is_noticed() {
    let folder = tempfile::tempdir().unwrap();
    let (path, journal) = watched_journal(&folder);
    journal.stir();
    assert!(dump(&path).contains("written since then"));
    drop(journal);
    let image = std::fs::read(&path).unwrap();
    let first = ALARM_OFFSET as usize + 8 * ALARM_WORDS;
    for place in first..first + 8 * TIME_WORDS {
        let mut flipped = image.clone();
        flipped[place] ^= (place % 255 + 1) as u8;
        std::fs::write(&path, flipped).unwrap();
        let report = super::verify(&path).unwrap();
        assert!(report.problems[0].contains("is damaged"), "byte {place}");
        assert!(dump(&path).contains("a time of the disk, is damaged"));
        let (journal, report) = open_seen(&path, 1000);
        assert_eq!(report.suspicion, Some(Suspicion::Damaged), "byte {place}");
        assert_eq!(journal.state().resync, Some(Epoch(3)));
        // Opening has put it right.
        assert!(super::verify(&path).unwrap().problems.is_empty());
    }
}

#[test]
fn a_journal_that_keeps_no_times_goes_on_as_before_and_keeps_them_then() {
    let folder = tempfile::tempdir().unwrap();
    let (path, journal) = watched_journal(&folder);
    journal.close().unwrap();
    drop(journal);
    let mut image = std::fs::read(&path).unwrap();
    let first = ALARM_OFFSET as usize + 8 * ALARM_WORDS;
    image[first..first + 8 * TIME_WORDS].fill(0);
    std::fs::write(&path, image).unwrap();
    assert!(dump(&path).contains("no time of the disk is kept"));
    let (journal, report) = open_seen(&path, 7);
    assert_eq!((report.suspicion, journal.state().resync), (None, None));
    drop(journal);
    assert!(dump(&path).contains("disk of 1970-01-01T00:00:00.007Z"));
    let (_, report) = open_seen(&path, 6);
    assert!(report.suspicion.is_some());
}

#[test]
fn a_look_is_kept_only_where_it_tells_something_new() {
    let folder = tempfile::tempdir().unwrap();
    let (path, journal) = watched_journal(&folder);
    let words = || {
        let image = std::fs::read(&path).unwrap();
        let first = ALARM_OFFSET as usize + 8 * ALARM_WORDS;
        image[first..first + 8 * TIME_WORDS].to_vec()
    };
    let at = |modified: i64, later: i64, set: i64| {
        let seen = seen(modified);
        journal.keep_time(Moment {
            modified: seen.modified,
            looked: Time(seen.looked.0 + later),
            booted: Time(seen.booted.0 + set),
        });
        words()
    };
    let before = words();
    assert_eq!(at(1000, 10_000, 0), before, "an idle disk costs no store");
    let modified = at(1001, 20_000, 0);
    assert_ne!(modified, before);
    assert_eq!(at(1001, 30_000, 0), modified);
    journal.stir();
    let stirred = words();
    assert_ne!(stirred, modified);
    journal.stir();
    assert_eq!(words(), stirred, "only the first write leaves its time");
    let looked = at(1001, 40_000, 0);
    assert_eq!(looked[24..], [0; 8]);
    let set = at(1001, 50_000, -3_600_000);
    assert_ne!(set, looked, "the clock was set");
    assert_eq!(at(1001, 60_000, -3_600_000), set);
}
