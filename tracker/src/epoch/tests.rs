//! Tests of the epochs of a machine: cuts that fail half way, disks that differ, many threads.

use std::path::Path;
use std::time::Duration;

use super::*;
use crate::extent::BLOCK_SIZE;
use crate::journal::format::{EPOCH_MAX, Time};
use crate::journal::reader::JournalReader;

const SHORT: Duration = Duration::from_millis(1);
const BLOCKS: u64 = 40_000;

fn machine(folder: &Path, names: &[&str]) -> Machine {
    let specs = names.iter().map(|name| DiskSpec {
        name: (*name).to_owned(),
        image: folder.join(name),
        journal: folder.join(format!("{name}.hrl")),
        size_bytes: BLOCKS * BLOCK_SIZE,
        identity: [1; 16],
        seen: None,
        preserve: None,
    });
    let options = MachineOptions {
        workers: 4,
        ring_bytes: 16 << 10,
        intent_regions: 64,
        rebuild: false,
        tracking: true,
        preserve_budget_bytes: 0,
        frozen_views: false,
    };
    Machine::open(specs.collect(), &options).unwrap().0
}

fn reader(machine: &Machine, disk: usize) -> JournalReader {
    JournalReader::open(&machine.disks[disk].spec.journal).unwrap()
}

fn change(machine: &Machine, disk: usize, first_block: u64) -> Epoch {
    let extent = Extent {
        first_block,
        block_count: 1,
    };
    let admission = machine.admit(0, disk, extent, Operation::Write);
    machine.complete(0, admission);
    admission.epoch
}

fn cut(machine: &Machine) -> Epoch {
    machine.cut(Epoch::ZERO, Keep::Changed, SHORT).unwrap()
}

/// Seals and commits what counts as changed wholly in a new journal.
fn past_first_epoch(machine: &Machine) {
    let epoch = cut(machine);
    machine.seal(epoch).unwrap();
    machine.commit(epoch).unwrap();
}

#[test]
fn an_epoch_that_cannot_be_recorded_is_not_opened() {
    let folder = tempfile::tempdir().unwrap();
    let machine = machine(folder.path(), &["a"]);
    for minimum in [u64::MAX, u64::MAX - 1, EPOCH_MAX + 1, EPOCH_MAX] {
        let error = machine
            .cut(Epoch(minimum), Keep::Changed, SHORT)
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{minimum:x}");
    }
    assert_eq!(cut(&machine), Epoch(1));
}

#[test]
fn a_cut_whose_sync_fails_reaches_every_disk() {
    let folder = tempfile::tempdir().unwrap();
    let machine = machine(folder.path(), &["a", "b", "c"]);
    past_first_epoch(&machine);
    let epoch = change(&machine, 2, 5);
    machine.disks[0].journal.set_failing(true);
    let error = machine.cut(Epoch::ZERO, Keep::Changed, SHORT).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io);
    for disk in &machine.disks {
        let state = disk.journal.watermarks();
        assert!(state.is_consistent(), "{state:?}");
        assert_eq!(state.closed, Some(epoch));
    }
    // What of the ring of the first disk was not written may be dropped by the kernel.
    assert!(reader(&machine, 0).dirty(Epoch(1), epoch).unwrap().all());
    assert!(!reader(&machine, 2).dirty(Epoch(1), epoch).unwrap().all());
    assert!(machine.seal(epoch).is_err() && machine.commit(epoch).is_err());
    assert!(machine.close().is_err());
    drop(machine);
    assert_eq!(flags(folder.path(), "a"), [0, 0]);
    // The others are closed all the same.
    assert_ne!(flags(folder.path(), "b"), [0, 0]);
    assert_ne!(flags(folder.path(), "c"), [0, 0]);
}

/// The flags of both superblocks.
fn flags(folder: &Path, disk: &str) -> [u8; 2] {
    let path = folder.join(format!("{disk}.hrl"));
    crate::journal::verify(&path).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    [0, 1].map(|copy: usize| bytes[copy * 4096 + 12])
}

/// Whoever has looked at every block after an epoch asks for later ones alone.
#[test]
fn a_change_after_a_restart_is_recorded_also_where_an_earlier_epoch_has_it() {
    let folder = tempfile::tempdir().unwrap();
    let machine = machine(folder.path(), &["a"]);
    past_first_epoch(&machine);
    let looked = change(&machine, 0, 5);
    assert_eq!(cut(&machine), looked);
    machine.abandon(looked).unwrap();
    drop(machine);
    let machine = self::machine(folder.path(), &["a"]);
    let later = change(&machine, 0, 5);
    assert!(later > looked);
    let reader = reader(&machine, 0);
    let dirty = reader.dirty(looked, Epoch(u64::MAX)).unwrap();
    assert_eq!(dirty.block_count().unwrap(), 1);
}

#[test]
fn another_file_takes_the_place_of_a_journal_whose_sync_failed() {
    let folder = tempfile::tempdir().unwrap();
    let machine = machine(folder.path(), &["a"]);
    past_first_epoch(&machine);
    let old = reader(&machine, 0);
    let first = change(&machine, 0, 5);
    machine.disks[0].journal.set_failing(true);
    assert!(machine.cut(Epoch::ZERO, Keep::Changed, SHORT).is_err());
    change(&machine, 0, 7000);
    assert!(machine.status().disks[0].power_cut_unsafe);
    machine.disks[0].journal.set_failing(false);
    // The next sync finds that an earlier one failed.
    machine.seal(first).unwrap();
    let status = machine.status();
    assert_eq!(status.disks[0].journal_replacements, 1);
    assert!(!status.disks[0].power_cut_unsafe);
    let error = old.state().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::State);
    let new = reader(&machine, 0);
    assert_eq!(new.journal_id(), old.journal_id());
    assert_eq!(new.state().unwrap().sealed, first);
    let dirty = new.dirty(first, Epoch(u64::MAX)).unwrap();
    let extents: Vec<Extent> = dirty.extents().map(Result::unwrap).collect();
    assert!(extents.iter().any(|extent| extent.first_block == 7000));
    machine.commit(first).unwrap();
    machine.close().unwrap();
    drop(machine);
    assert_ne!(flags(folder.path(), "a"), [0, 0]);
}

#[test]
fn a_disk_that_cannot_be_folded_does_not_keep_the_others_from_it() {
    let folder = tempfile::tempdir().unwrap();
    let machine = machine(folder.path(), &["a", "b"]);
    machine.disks[0].journal.set_failing(true);
    for block in 0..380 {
        change(&machine, 0, block * 2);
        change(&machine, 1, block * 2);
    }
    assert!(machine.maintain().is_err());
    assert_eq!(machine.disks[0].journal.folds(), 0);
    assert_ne!(machine.disks[1].journal.folds(), 0);
}

#[test]
fn the_alarm_of_an_epoch_that_was_given_up_is_captured_with_the_next() {
    let folder = tempfile::tempdir().unwrap();
    let machine = machine(folder.path(), &["a"]);
    past_first_epoch(&machine);
    machine.mark_suspect(0, "a test").unwrap();
    let given_up = cut(&machine);
    machine.abandon(given_up).unwrap();
    let closed = cut(&machine);
    machine.mark_suspect(0, "a test").unwrap();
    let dirty = |after, through| {
        let reader = reader(&machine, 0);
        reader.dirty(after, through).unwrap().all()
    };
    assert!(dirty(Epoch(1), closed));
    assert!(dirty(closed, closed.next()));
    machine.seal(closed).unwrap();
    machine.commit(closed).unwrap();
    assert!(!dirty(Epoch(1), closed));
    assert!(dirty(closed, closed.next()));
}

#[test]
fn a_disk_that_is_new_to_the_machine_does_not_hold_up_the_others() {
    let folder = tempfile::tempdir().unwrap();
    let before = machine(folder.path(), &["a"]);
    past_first_epoch(&before);
    let sealed = cut(&before);
    before.seal(sealed).unwrap();
    let closed = cut(&before);
    drop(before);
    let after = machine(folder.path(), &["a", "b"]);
    let status = after.status();
    // The new disk was not there when the epoch was closed.
    assert_eq!((status.closed, status.sealed), (None, sealed));
    assert_eq!(status.open, closed.next());
    assert_eq!(status.disks[1].resync, Some(status.open));
    after.commit(sealed).unwrap();
    assert_eq!(after.status().disks[1].resync, Some(status.open));
    let closed = cut(&after);
    assert!(reader(&after, 1).dirty(sealed, closed).unwrap().all());
    assert!(!reader(&after, 0).dirty(sealed, closed).unwrap().all());
}

#[test]
fn a_cut_that_gives_up_waiting_is_made_up_for_by_the_next() {
    let folder = tempfile::tempdir().unwrap();
    let machine = machine(folder.path(), &["a"]);
    past_first_epoch(&machine);
    let extent = Extent {
        first_block: 9,
        block_count: 1,
    };
    let slow = machine.admit(1, 0, extent, Operation::Write);
    assert_eq!(
        machine
            .cut(Epoch::ZERO, Keep::Changed, SHORT)
            .unwrap_err()
            .kind(),
        ErrorKind::State
    );
    change(&machine, 0, 20);
    // The write of the epoch before is still in flight, and its filter is still needed.
    assert_eq!(
        machine
            .cut(Epoch::ZERO, Keep::Changed, SHORT)
            .unwrap_err()
            .kind(),
        ErrorKind::State
    );
    machine.complete(1, slow);
    let closed = cut(&machine);
    assert!(closed > slow.epoch);
    let reader = reader(&machine, 0);
    let dirty = reader.dirty(Epoch(1), closed).unwrap();
    let blocks: Vec<u64> = dirty.extents().map(|e| e.unwrap().first_block).collect();
    assert_eq!(blocks, [9, 20]);
    change(&machine, 0, 9);
    let dirty = reader.dirty(closed, machine.status().open).unwrap();
    assert_eq!(dirty.block_count().unwrap(), 1);
}

#[test]
fn every_write_leaves_its_time_also_one_that_needs_no_record() {
    let folder = tempfile::tempdir().unwrap();
    let machine = machine(folder.path(), &["a"]);
    let stirred = || {
        let mut text = Vec::new();
        crate::journal::dump(&machine.disks[0].spec.journal, &mut text).unwrap();
        String::from_utf8(text).unwrap().contains("written since")
    };
    let look = || machine.keep_time(0, Moment::now(Time(7)));
    look();
    assert!(!stirred());
    for _ in 0..3 {
        change(&machine, 0, 5);
        assert!(stirred());
        look();
        assert!(!stirred());
    }
    assert_eq!(machine.status().disks[0].records_elided, 2);
    machine.stir(0);
    assert!(stirred());
}
