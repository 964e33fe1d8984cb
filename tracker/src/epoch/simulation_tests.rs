//! Random lives of a machine of several disks, killed at any moment, and many threads at once.
//!
//! What a shipper relies on is checked: for the closed epoch, and for all that follows the sealed
//! one, every disk reports each block whose change was stamped with it.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::extent::BLOCK_SIZE;
use crate::extent::blocks_of;
use crate::failpoint::watching;
use crate::journal::format::EPOCH_MAX;
use crate::journal::reader::JournalReader;

const BLOCKS: u64 = 33_000;
const DISKS: usize = 3;
const PATIENCE: Duration = Duration::from_secs(20);

fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap_or_else(|_| tempfile::tempdir().unwrap())
}

fn journal_path(folder: &Path, disk: usize) -> PathBuf {
    folder.join(format!("{disk}.hrl"))
}

fn open(folder: &Path, ring_bytes: u64, sizes: [u64; DISKS]) -> Machine {
    let specs = (0..DISKS).map(|disk| DiskSpec {
        name: disk.to_string(),
        image: folder.join(disk.to_string()),
        journal: journal_path(folder, disk),
        size_bytes: sizes[disk],
        identity: [1; 16],
        seen: None,
        preserve: None,
    });
    let options = MachineOptions {
        workers: 4,
        ring_bytes,
        intent_regions: 64,
        rebuild: false,
        tracking: true,
        preserve_budget_bytes: 0,
        frozen_views: false,
    };
    Machine::open(specs.collect(), &options).unwrap().0
}

/// The changes of one disk: blocks by epoch.
type Changes = BTreeMap<u64, BTreeSet<u64>>;

/// The blocks of an interval that a journal does not report.
fn missing(journal: &Path, changes: &Changes, after: Epoch, through: Epoch) -> Vec<u64> {
    let reader = JournalReader::open(journal).unwrap();
    let dirty = reader.dirty(after, through).unwrap();
    if dirty.all() {
        return Vec::new();
    }
    let extents: Vec<Extent> = dirty.extents().map(Result::unwrap).collect();
    let reported = |block: u64| {
        let next = extents.partition_point(|extent| extent.end_block() <= block);
        extents.get(next).is_some_and(|e| e.first_block <= block)
    };
    let needed = changes
        .range(after.0 + 1..=through.0)
        .flat_map(|(_, blocks)| blocks);
    needed.copied().filter(|&block| !reported(block)).collect()
}

/// Sizes in bytes at the beginning: whole blocks, and a part of one.
const SIZES: [u64; DISKS] = [
    BLOCKS * BLOCK_SIZE,
    BLOCKS * BLOCK_SIZE + 512,
    BLOCKS * BLOCK_SIZE - 512,
];

struct World {
    root: tempfile::TempDir,
    /// Sizes of the disks themselves, which grow before anybody knows of it.
    sizes: [u64; DISKS],
    lives: u32,
    machine: Machine,
    changes: [Changes; DISKS],
    sealed: BTreeSet<u64>,
}

#[derive(Clone, Debug)]
enum Step {
    Write(usize, u64, u64),
    Cut(u64),
    Seal,
    Abandon,
    Commit,
    Revert,
    Maintain,
    Suspect(usize),
    /// By so many sectors.
    Grow(usize, u64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        16 => (0..DISKS, prop_oneof![0..300u64, 0..BLOCKS], 1..250u64)
            .prop_map(|(d, b, n)| Step::Write(d, b, n)),
        8 => (0..9u64).prop_map(Step::Cut),
        6 => Just(Step::Seal),
        2 => Just(Step::Abandon),
        4 => Just(Step::Commit),
        2 => Just(Step::Revert),
        4 => Just(Step::Maintain),
        1 => (0..DISKS).prop_map(Step::Suspect),
        3 => (0..DISKS, prop_oneof![0..9u64, 0..9000u64]).prop_map(|(d, n)| Step::Grow(d, n)),
    ]
}

impl World {
    fn new() -> Self {
        let root = folder();
        let first = root.path().join("0");
        std::fs::create_dir(&first).unwrap();
        let mut world = Self {
            machine: open(&first, 16 << 10, SIZES),
            root,
            sizes: SIZES,
            lives: 0,
            changes: Default::default(),
            sealed: BTreeSet::new(),
        };
        // As of its first epoch every block of a disk counts as changed.
        for step in [Step::Cut(0), Step::Seal, Step::Commit] {
            world.carry_out(&step);
        }
        world
    }

    fn folder(&self) -> PathBuf {
        self.root.path().join(self.lives.to_string())
    }

    fn carry_out(&mut self, step: &Step) {
        let status = self.machine.status();
        match *step {
            Step::Write(disk, first, count) => {
                for number in 0..count {
                    // From the end backwards as well, where the disk has grown.
                    let end = blocks_of(self.sizes[disk]);
                    let block = match first % 2 {
                        0 => (first + number) % end,
                        _ => end - 1 - (first + number) % end,
                    };
                    let extent = Extent {
                        first_block: block,
                        block_count: 1,
                    };
                    let admission = self.machine.admit(1, disk, extent, Operation::Write);
                    let epoch = admission.epoch;
                    self.changes[disk].entry(epoch.0).or_default().insert(block);
                    self.machine.complete(1, admission);
                    // A full ring would make every block count, and hide what is lost.
                    if number % 100 == 99 {
                        self.machine.maintain().unwrap();
                    }
                }
            }
            Step::Cut(more) => {
                let minimum = Epoch(status.open.0 + more);
                let cut = self.machine.cut(minimum, Keep::Changed, PATIENCE);
                assert_eq!(cut.is_err(), status.closed.is_some());
            }
            Step::Seal => {
                if let Some(closed) = status.closed {
                    self.sealed.insert(closed.0);
                    self.machine.seal(closed).unwrap();
                }
            }
            Step::Abandon => {
                if let Some(closed) = status.closed {
                    self.machine.abandon(closed).unwrap();
                }
            }
            Step::Commit => {
                if let Some(epoch) = self.sealed.pop_first() {
                    for changes in &mut self.changes {
                        changes.retain(|of, _| *of > epoch);
                    }
                    self.machine.commit(Epoch(epoch)).unwrap();
                }
            }
            Step::Revert => {
                self.sealed.clear();
                self.machine.revert().unwrap();
            }
            Step::Maintain => self.machine.maintain().unwrap(),
            Step::Grow(disk, sectors) => {
                let before = self.sizes[disk];
                self.sizes[disk] += sectors * 512;
                self.machine.grow(disk, self.sizes[disk]).unwrap();
                self.note_growth(disk, before);
            }
            Step::Suspect(disk) => self.machine.mark_suspect(disk, "a test").unwrap(),
        }
    }

    /// What is new on a disk has changed in the open epoch.
    fn note_growth(&mut self, disk: usize, before: u64) {
        let open = self.machine.status().open;
        let new = Extent::covering(before, self.sizes[disk] - before);
        if new.block_count == 0 {
            return;
        }
        let changes = self.changes[disk].entry(open.0).or_default();
        changes.extend(new.first_block..new.end_block());
    }

    /// Carries a step out and returns the folders that a kill on the way would have left.
    fn watched(&mut self, step: &Step) -> Vec<(Place, PathBuf)> {
        let (from, root) = (self.folder(), self.root.path().to_owned());
        let moments = Rc::new(RefCell::new(Vec::<(Place, PathBuf)>::new()));
        let seen = Rc::clone(&moments);
        let watcher = move |point| {
            let mut seen = seen.borrow_mut();
            // Each disk passes the same places; records are tested with the journal.
            if seen.iter().filter(|(other, _)| *other == point).count() < DISKS {
                let to = root.join(format!("moment-{}", seen.len()));
                copy_folder(&from, &to);
                seen.push((point, to));
            }
        };
        watching(watcher, || self.carry_out(step));
        moments.take()
    }

    /// Goes on with what a kill has left.
    fn resume(&mut self, from: &Path) {
        self.lives += 1;
        copy_folder(from, &self.folder());
        self.machine = open(&self.folder(), 16 << 10, self.sizes);
        let states: Vec<EpochState> = self.machine.states();
        for state in &states {
            assert!(state.is_consistent(), "{state:?}");
            let first = &states[0];
            assert_eq!((state.open, state.closed), (first.open, first.closed));
        }
        assert_eq!(self.machine.clock.open(), states[0].open);
    }

    fn check(&self) {
        let status = self.machine.status();
        for (disk, changes) in self.changes.iter().enumerate() {
            let journal = journal_path(&self.folder(), disk);
            let lacks = |after, through| {
                let missing = missing(&journal, changes, after, through);
                assert!(
                    missing.is_empty(),
                    "disk {disk}, {after} to {through}: {missing:?}"
                );
            };
            if let Some(closed) = status.closed {
                lacks(status.sealed, closed);
            }
            lacks(status.closed.unwrap_or(status.sealed), Epoch(EPOCH_MAX));
            lacks(status.committed, Epoch(EPOCH_MAX));
        }
    }
}

fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for disk in 0..DISKS {
        std::fs::copy(journal_path(from, disk), journal_path(to, disk)).unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn a_machine_that_is_killed_anywhere_forgets_nothing_and_goes_on(
        steps in prop::collection::vec((step(), prop::option::of(any::<prop::sample::Index>())), 1..30),
    ) {
        let mut world = World::new();
        for (step, killed) in &steps {
            let before = (world.changes.clone(), world.sealed.clone());
            let sizes = world.sizes;
            let moments = world.watched(step);
            world.check();
            let Some(killed) = killed.filter(|_| !moments.is_empty()) else { continue };
            let (point, from) = &moments[killed.index(moments.len())];
            if matches!(step, Step::Write(..) | Step::Grow(..)) {
                // What had been recorded by then is not known, so nothing of it is asked for.
                world.changes = before.0;
            }
            world.resume(from);
            // What its requester did not hear of is repeated, as far as it is known still.
            match step {
                Step::Seal => {
                    if let (Some(closed), true) = (world.machine.status().closed, world.sealed != before.1) {
                        world.machine.seal(closed).unwrap();
                    }
                }
                Step::Commit => {
                    if let Some(&epoch) = before.1.first() {
                        world.machine.commit(Epoch(epoch)).unwrap();
                    }
                }
                Step::Revert => world.machine.revert().unwrap(),
                Step::Grow(disk, _) => world.note_growth(*disk, sizes[*disk]),
                _ => {}
            }
            let open = world.machine.status().open.0;
            let newest = world.changes.iter().filter_map(|c| c.keys().last()).max();
            prop_assert!(newest.is_none_or(|newest| *newest <= open), "{:?}", point);
            world.check();
        }
        // It is not stuck.
        for step in [Step::Abandon, Step::Cut(0), Step::Seal, Step::Cut(0)] {
            world.carry_out(&step);
        }
        while !world.sealed.is_empty() {
            world.carry_out(&Step::Commit);
        }
        world.check();
    }
}

/// Ends the other threads, also when this one panics.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

const ROUNDS: usize = 100;
const WORKERS: usize = 3;
const LOOKS: usize = 8;

/// A machine under many threads, and what its writers were told.
struct Storm {
    root: tempfile::TempDir,
    machine: Machine,
    noted: [Mutex<Changes>; DISKS],
    stop: AtomicBool,
    /// Sizes as clients see them.
    sizes: [AtomicU64; DISKS],
    in_flight: [AtomicU64; WORKERS],
}

impl Storm {
    /// Writes until told to stop; notes each write before it completes.
    fn write(&self, worker: usize) {
        let mut state = 0x9e37_79b9 * (worker as u64 + 1);
        while !self.stop.load(Ordering::Relaxed) {
            state = state
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            let disk = (state >> 60) as usize % DISKS;
            // A full ring would make every block count, and hide what is lost.
            let ring = self.machine.disks[disk].journal.ring();
            while ring.used() * 100 > ring.capacity() * 71 && !self.stop.load(Ordering::Relaxed) {
                std::thread::yield_now();
            }
            let (near, block_count) = ((state >> 33) % (BLOCKS / 16), 1 + (state >> 20) % 3);
            let end = blocks_of(self.sizes[disk].load(Ordering::Acquire));
            let first_block = match state >> 19 & 1 {
                0 => near,
                _ => end - block_count - near,
            };
            let extent = Extent {
                first_block,
                block_count,
            };
            let admission = self.machine.admit(worker, disk, extent, Operation::Write);
            let epoch = admission.epoch;
            self.in_flight[worker].store(epoch.0, Ordering::SeqCst);
            let mut changes = self.noted[disk].lock().unwrap();
            let blocks = changes.entry(epoch.0).or_default();
            blocks.extend(extent.first_block..extent.end_block());
            drop(changes);
            self.in_flight[worker].store(0, Ordering::SeqCst);
            self.machine.complete(worker, admission);
        }
    }

    /// Cuts, looks, and gives up, seals or commits. Returns how many sets told blocks apart.
    fn conduct(&self) -> usize {
        let _stop = StopOnDrop(&self.stop);
        let mut exact = 0;
        for round in 0..ROUNDS {
            let closed = self
                .machine
                .cut(Epoch::ZERO, Keep::Changed, PATIENCE)
                .unwrap();
            let busy = |of: &AtomicU64| (1..=closed.0).contains(&of.load(Ordering::SeqCst));
            assert!(
                !self.in_flight.iter().any(busy),
                "{closed} is closed and being written"
            );
            exact += self.look(round, closed);
            // While that epoch is closed, so what is new belongs to the next.
            self.grow(round);
            if round % 7 == 3 {
                self.machine.abandon(closed).unwrap();
                continue;
            }
            self.machine.seal(closed).unwrap();
            // Commits lag behind.
            if round % 3 == 0 {
                self.machine.commit(closed).unwrap();
                for noted in &self.noted {
                    noted.lock().unwrap().retain(|epoch, _| *epoch > closed.0);
                }
            }
        }
        exact
    }

    /// Lets a disk grow under its writers, now and then beyond the room of its journal.
    fn grow(&self, round: usize) {
        let disk = round % DISKS;
        let before = self.sizes[disk].load(Ordering::Acquire);
        let more = if round == ROUNDS / 2 {
            3 * BLOCKS * BLOCK_SIZE
        } else {
            round as u64 * 512
        };
        let new = Extent::covering(before, more);
        let open = self.machine.status().open;
        self.machine.grow(disk, before + more).unwrap();
        let mut noted = self.noted[disk].lock().unwrap();
        let blocks = noted.entry(open.0).or_default();
        blocks.extend(new.first_block..new.end_block());
        drop(noted);
        self.sizes[disk].store(before + more, Ordering::Release);
    }

    fn look(&self, round: usize, closed: Epoch) -> usize {
        let sealed = self.machine.status().sealed;
        let mut exact = 0;
        for (disk, noted) in self.noted.iter().enumerate() {
            let changes = noted.lock().unwrap().clone();
            let journal = journal_path(self.root.path(), disk);
            // Again and again, while records of the next epoch push these out of the ring.
            for _ in 0..LOOKS {
                let missing = missing(&journal, &changes, sealed, closed);
                assert!(
                    missing.is_empty(),
                    "round {round}, disk {disk}: {missing:?}"
                );
            }
            let reader = JournalReader::open(&journal).unwrap();
            exact += usize::from(!reader.dirty(sealed, closed).unwrap().all());
        }
        exact
    }
}

/// Writers, folding, cuts and a reader at once. Each writer notes what it was told before it goes
/// on, so whatever is noted under a closed epoch must be reported for it.
#[test]
fn many_threads_at_once_forget_nothing() {
    let root = folder();
    let storm = Storm {
        machine: open(root.path(), 16 << 10, SIZES),
        sizes: SIZES.map(AtomicU64::new),
        root,
        noted: Default::default(),
        stop: AtomicBool::new(false),
        in_flight: Default::default(),
    };
    let exact = std::thread::scope(|scope| {
        for worker in 0..WORKERS {
            let storm = &storm;
            scope.spawn(move || storm.write(worker));
        }
        scope.spawn(|| {
            while !storm.stop.load(Ordering::Relaxed) {
                storm.machine.maintain().unwrap();
            }
        });
        scope.spawn(|| storm.conduct()).join().unwrap()
    });
    assert!(
        exact > ROUNDS,
        "{exact} of {} sets told blocks apart",
        ROUNDS * DISKS
    );
}
