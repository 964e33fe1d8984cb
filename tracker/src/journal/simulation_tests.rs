//! Random lives of a journal against a model: killed at any moment, reopened.
//!
//! A kill is simulated by a copy of the file as it is: what SIGKILL leaves is what the page cache
//! holds at that moment, and that is what a copy reads. Copies are made between steps, and in the
//! middle of them at the places that `failpoint` names.
//!
//! The model is the set of all (epoch, block) that were recorded and not committed. A journal may
//! report more, never less.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use proptest::prelude::*;

use super::format::{EPOCH_MAX, Operation};
use super::reader::JournalReader;
use super::state::EpochState;
use super::{Found, Journal, JournalOptions, open};
use crate::extent::{BLOCK_SIZE, Epoch, Extent, blocks_of};
use crate::failpoint::{Place, watching};

/// Blocks of the disk in the beginning: three checkpoint pages, the last one short.
const BLOCKS: u64 = 70_001;
/// Blocks that it may grow to: its checkpoint sets have to move.
const BLOCKS_MAX: u64 = 260_000;
const RING_BYTES: u64 = 16 << 10;
/// Moments at one place in one step that are looked at.
const MOMENTS_MAX: usize = 3;

fn options(disk_size_bytes: u64) -> JournalOptions {
    JournalOptions {
        disk_identity: [7; 16],
        disk_size_bytes,
        ring_bytes: RING_BYTES,
        intent_regions: 64,
        rebuild: false,
        seen: None,
    }
}

/// A folder in memory where there is one: there a sync costs nothing, and no power is cut here.
fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap_or_else(|_| tempfile::tempdir().unwrap())
}

/// A set of blocks of the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Blocks(Vec<u64>);

impl Default for Blocks {
    fn default() -> Self {
        Self(vec![0; BLOCKS_MAX.div_ceil(64) as usize])
    }
}

impl Blocks {
    fn insert(&mut self, extent: Extent) {
        for block in extent.first_block..extent.end_block() {
            self.0[block as usize / 64] |= 1 << (block % 64);
        }
    }

    fn insert_all(&mut self, other: &Self) {
        for (word, other) in self.0.iter_mut().zip(&other.0) {
            *word |= other;
        }
    }

    fn lacks(&self, other: &Self) -> bool {
        self.0
            .iter()
            .zip(&other.0)
            .any(|(word, other)| other & !word != 0)
    }
}

/// What must be known.
#[derive(Clone, Debug)]
struct Model {
    /// Size of the disk.
    size_bytes: u64,
    /// The blocks recorded in each epoch.
    changed: BTreeMap<u64, Blocks>,
    /// Epochs as of which every block must count as changed.
    suspect: BTreeSet<u64>,
    /// Epochs that were sealed, and thus are recovery points once they are committed.
    sealed: BTreeSet<u64>,
}

impl Model {
    fn new() -> Self {
        Self {
            size_bytes: BLOCKS * BLOCK_SIZE,
            changed: BTreeMap::new(),
            suspect: BTreeSet::from([1]),
            sealed: BTreeSet::new(),
        }
    }

    /// The disk is larger, and what is new has changed in this epoch.
    fn grow(&mut self, epoch: u64, size_bytes: u64) {
        let new = Extent::covering(self.size_bytes, size_bytes - self.size_bytes);
        self.size_bytes = size_bytes;
        if new.block_count > 0 {
            self.record(epoch, new);
        }
    }

    fn blocks(&self) -> u64 {
        blocks_of(self.size_bytes)
    }

    fn record(&mut self, epoch: u64, extent: Extent) {
        self.changed.entry(epoch).or_default().insert(extent);
    }

    fn commit(&mut self, committed: u64) {
        self.changed.retain(|epoch, _| *epoch > committed);
        self.suspect.retain(|epoch| *epoch > committed);
    }

    /// Compares what a journal reports of the epochs after `after` up to `through`. Whether it
    /// reports nothing else.
    fn check(&self, reader: &JournalReader, after: u64, through: u64) -> Result<bool, String> {
        let dirty = reader
            .dirty(Epoch(after), Epoch(through))
            .map_err(|error| error.chain())?;
        let mut reported = Blocks::default();
        let mut end = None;
        for extent in dirty.extents() {
            let extent = extent.map_err(|error| error.chain())?;
            if end.is_some_and(|end| extent.first_block < end) || extent.block_count == 0 {
                return Err(format!("extents out of order at {extent:?}"));
            }
            if extent.end_block() > self.blocks() {
                return Err(format!("{extent:?} ends past the disk"));
            }
            end = Some(extent.end_block());
            reported.insert(extent);
        }
        let mut needed = Blocks::default();
        for (epoch, blocks) in self.changed.range(after + 1..=through) {
            if reported.lacks(blocks) {
                return Err(format!(
                    "changes of epoch {epoch} of {after}..={through} are missing"
                ));
            }
            needed.insert_all(blocks);
        }
        match self.suspect.range(after + 1..=through).next() {
            Some(epoch) if !dirty.all() => {
                Err(format!("not every block counts as changed as of {epoch}"))
            }
            _ => Ok(reported == needed),
        }
    }

    /// Whether the journal covers the model in every set that can be asked for. Returns whether
    /// nothing more was reported, which holds at least where no checkpoint set is in use.
    fn check_all(&self, path: &Path) -> Result<bool, String> {
        let reader = JournalReader::open(path).map_err(|error| error.chain())?;
        let state = reader.state().map_err(|error| error.chain())?;
        // What is sealed is asked for when the spool is lost, together with all that follows.
        let mut exact = self.check(&reader, state.committed.0, EPOCH_MAX)?;
        if let Some(closed) = state.closed {
            exact &= self.check(&reader, state.sealed.0, closed.0)?;
        }
        exact &= self.check(&reader, state.open_after().0, EPOCH_MAX)?;
        Ok(exact)
    }
}

/// A journal with its model.
struct World {
    folder: tempfile::TempDir,
    number: u32,
    journal: Journal,
    /// Writes are stamped with it.
    open: u64,
    model: Model,
    /// Size of the disk itself, which grows before anybody knows of it.
    size_bytes: u64,
    /// The model knows all that was recorded, not only what must be known.
    is_exact: bool,
}

impl World {
    fn new() -> Self {
        let folder = folder();
        let (journal, report) =
            open(&folder.path().join("0.hrl"), &options(BLOCKS * BLOCK_SIZE)).unwrap();
        assert_eq!(report.found, Found::New(None));
        Self {
            folder,
            number: 0,
            journal,
            open: 1,
            model: Model::new(),
            size_bytes: BLOCKS * BLOCK_SIZE,
            is_exact: true,
        }
    }

    /// A world in whose journal not every block counts as changed any more, or a new one.
    fn begin(settled: bool) -> Self {
        let mut world = Self::new();
        for step in [Step::Cut, Step::Seal, Step::Commit(0)] {
            if settled {
                world.carry_out(&step);
            }
        }
        world
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join(format!("{}.hrl", self.number))
    }

    /// The bytes that SIGKILL would leave.
    fn image(&self) -> Vec<u8> {
        std::fs::read(self.path()).unwrap()
    }

    fn record(&mut self, first_block: u64, block_count: u64) {
        let first_block = first_block % self.model.blocks();
        let extent = Extent {
            first_block,
            block_count: block_count.min(self.model.blocks() - first_block),
        };
        let coarse = self.journal.coarse_changes();
        self.journal
            .record(Epoch(self.open), extent, Operation::Write);
        self.model.record(self.open, extent);
        // Where the ring is full more counts as changed.
        self.is_exact &= self.journal.coarse_changes() == coarse;
    }

    /// What the clock of a machine does at a cut, before any superblock tells of it.
    fn advance(&mut self) {
        self.journal
            .gather_alarms(Epoch(self.open), Epoch(self.open + 1));
        self.open += 1;
    }

    fn carry_out(&mut self, step: &Step) {
        let state = self.journal.watermarks();
        match *step {
            Step::Record(first_block, block_count) => self.record(first_block, block_count),
            Step::Burst(first_block, count) => {
                for number in 0..count {
                    self.record(first_block + number * 977, 1);
                }
            }
            Step::Hole => self.journal.ring().claim(),
            Step::Alarm => {
                self.journal.raise_alarm(Epoch(self.open));
                self.model.suspect.insert(self.open);
            }
            Step::Maintain => self.journal.maintain().unwrap(),
            // A cut is refused while an epoch is closed, also one that will give up waiting.
            Step::Cut | Step::Advance if state.closed.is_some() => {}
            Step::Advance => self.advance(),
            Step::Cut => {
                let closing = self.open;
                self.advance();
                let change = |state: &mut EpochState| {
                    state.open = Epoch(closing);
                    state.cut(Epoch(closing + 1));
                };
                self.journal.update(change).unwrap();
            }
            Step::Seal => {
                if let Some(closed) = state.closed {
                    self.model.sealed.insert(closed.0);
                    self.journal.update(|state| state.seal(closed)).unwrap();
                }
            }
            Step::Abandon => self.journal.update(|state| state.closed = None).unwrap(),
            Step::Revert => {
                self.model.sealed.clear();
                self.journal.update(|state| state.revert()).unwrap();
            }
            Step::Commit(back) => {
                if let Some(&epoch) = self.model.sealed.iter().rev().nth(back) {
                    self.model.sealed = self.model.sealed.split_off(&(epoch + 1));
                    self.model.commit(epoch);
                    let change = |state: &mut EpochState| state.commit(Epoch(epoch));
                    self.journal.update(change).unwrap();
                }
            }
            Step::Close => {
                self.journal.close().unwrap();
                self.reopen(self.image(), Some(Found::Clean));
            }
            Step::Kill => self.reopen(self.image(), Some(Found::Killed)),
            Step::Grow(sectors) => {
                self.grow_disk(sectors);
                let open = Epoch(self.open);
                let coarse = self.journal.coarse_changes();
                self.journal.grow(self.size_bytes, open).unwrap();
                self.is_exact &= self.journal.coarse_changes() == coarse;
                self.model.grow(self.open, self.size_bytes);
            }
            Step::GrowWhileStopped(sectors) => {
                let image = self.image();
                self.grow_disk(sectors);
                self.reopen(image, Some(Found::Killed));
            }
        }
    }

    fn grow_disk(&mut self, sectors: u64) {
        let most = BLOCKS_MAX * BLOCK_SIZE;
        self.size_bytes = (self.size_bytes + sectors * 512).min(most);
    }

    /// Carries a step out and returns what a kill would have left at each place on the way.
    fn watched(&mut self, step: &Step) -> Vec<(Place, Vec<u8>)> {
        let moments = Rc::new(RefCell::new(Vec::new()));
        // A step that reopens writes to the next file.
        let paths = [self.number + 1, self.number]
            .map(|number| self.folder.path().join(format!("{number}.hrl")));
        let seen = Rc::clone(&moments);
        let watcher = move |point| {
            let mut seen: std::cell::RefMut<'_, Vec<(Place, Vec<u8>)>> = seen.borrow_mut();
            // A step of hundreds of records passes the same places again and again.
            if seen.iter().filter(|(other, _)| *other == point).count() < MOMENTS_MAX {
                let image = paths.iter().find_map(|path| std::fs::read(path).ok());
                seen.push((point, image.unwrap()));
            }
        };
        watching(watcher, || self.carry_out(step));
        moments.take()
    }

    /// Goes on with a file of these bytes.
    fn reopen(&mut self, image: Vec<u8>, found: Option<Found>) {
        self.number += 1;
        std::fs::write(self.path(), image).unwrap();
        let (journal, report) = open(&self.path(), &options(self.size_bytes)).unwrap();
        assert!(found.is_none_or(|found| report.found == found));
        self.journal = journal;
        let old = self.folder.path().join(format!("{}.hrl", self.number - 1));
        std::fs::remove_file(old).unwrap();
        let state = self.journal.watermarks();
        assert!(state.is_consistent(), "{state:?}");
        let newest = self.model.changed.keys().last().copied().unwrap_or(0);
        assert!(state.open.0 >= newest, "epoch {newest} is not known");
        self.open = state.open.0;
        // Whether it knew of the growth already or not: what is new has changed.
        self.is_exact &= self.journal.coarse_changes() == 0;
        self.model.grow(self.open, self.size_bytes);
    }

    /// Compares with the model. Nothing that is committed is reported, unless it was folded with
    /// what is not.
    fn check(&self) -> Result<(), TestCaseError> {
        let exact = self
            .model
            .check_all(&self.path())
            .map_err(TestCaseError::fail)?;
        prop_assert!(exact || !self.is_exact || self.journal.sets_in_use() > 0);
        Ok(())
    }
}

/// What can happen to a journal.
#[derive(Clone, Debug)]
enum Step {
    Record(u64, u64),
    Burst(u64, u64),
    Hole,
    Alarm,
    Maintain,
    Cut,
    Advance,
    Seal,
    Abandon,
    Revert,
    Commit(usize),
    Close,
    Kill,
    /// By so many sectors, while it is served.
    Grow(u64),
    /// The same after a kill.
    GrowWhileStopped(u64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0..BLOCKS_MAX, prop_oneof![1..40u64, 1..40_000u64])
            .prop_map(|(first, count)| Step::Record(first, count)),
        6 => (0..BLOCKS_MAX, 1..450u64).prop_map(|(first, count)| Step::Burst(first, count)),
        1 => Just(Step::Hole),
        1 => Just(Step::Alarm),
        4 => Just(Step::Maintain),
        4 => Just(Step::Cut),
        1 => Just(Step::Advance),
        4 => Just(Step::Seal),
        1 => Just(Step::Abandon),
        1 => Just(Step::Revert),
        3 => (0..3usize).prop_map(Step::Commit),
        1 => Just(Step::Close),
        2 => Just(Step::Kill),
        3 => sectors().prop_map(Step::Grow),
        1 => sectors().prop_map(Step::GrowWhileStopped),
    ]
}

/// Growth within a block, within a checkpoint page, and over several.
fn sectors() -> impl Strategy<Value = u64> {
    prop_oneof![0..20u64, 0..3000u64, 0..800_000u64]
}

/// A step costs milliseconds, so there are fewer cases than elsewhere; `PROPTEST_CASES` scales them.
fn config() -> ProptestConfig {
    let default = ProptestConfig::default();
    ProptestConfig {
        cases: default.cases.div_ceil(4),
        ..default
    }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn whatever_happens_nothing_is_forgotten(
        settled in any::<bool>(), steps in prop::collection::vec(step(), 1..60),
    ) {
        let mut world = World::begin(settled);
        for step in &steps {
            world.carry_out(step);
            world.check()?;
        }
        world.carry_out(&Step::Kill);
        world.check()?;
    }

    #[test]
    fn a_kill_in_the_middle_of_any_step_forgets_nothing(
        settled in any::<bool>(),
        steps in prop::collection::vec((step(), prop::option::of(any::<prop::sample::Index>())), 1..40),
    ) {
        let mut world = World::begin(settled);
        for (step, killed) in &steps {
            let before = world.model.clone();
            let moments = world.watched(step);
            world.check()?;
            // Going on from one of the moments stands for all that follow from it.
            let Some(killed) = killed.filter(|_| !moments.is_empty()) else { continue };
            let (point, image) = &moments[killed.index(moments.len())];
            if !matches!(step, Step::Commit(_)) {
                // What was being recorded was not submitted; what was being committed was durable.
                world.model = before;
            }
            // A commit that was killed leaves what it was about to drop.
            world.is_exact &=
                !matches!(step, Step::Record(..) | Step::Burst(..) | Step::Commit(_));
            world.reopen(image.clone(), None);
            world.check().map_err(|error| TestCaseError::fail(format!("{point:?}: {error}")))?;
        }
    }
}

/// Places that other tests visit.
const VISITED_ELSEWHERE: &[Place] = &[
    // See `tests/tests/failpoints`.
    Place::CutAfterSettleBeforeMaps,
    Place::CopyAfterReadBeforeWrite,
    Place::CopyAfterWriteBeforeMark,
    // Of another boot; see `tests`.
    Place::DistrustAfterPublishBeforeRing,
    Place::DistrustAfterRingBeforeSets,
    // Of writes that wait, and of syncs that fail.
    Place::AdmitAfterRecordBeforeMark,
    Place::WriteAfterAdmissionBeforeData,
    Place::WriteAfterWaitBeforeData,
    Place::WriteAfterDataBeforeReply,
    Place::FlushAfterDataBeforeSync,
    Place::IntentAfterEvictionBeforePlan,
    Place::IntentAfterArmBeforeNext,
    Place::ArmAfterCommitBeforeRelease,
    Place::ReplaceAfterBothBeforeCopy,
    Place::ReplaceAfterCopyBeforeRename,
    Place::ReplaceAfterRenameBeforeSwitch,
    Place::ReplaceAfterSwitchBeforeFolder,
    // Of a machine; see the tests of `epoch`.
    Place::CutAfterGatherBeforeAdvance,
    Place::CutAfterAdvanceBeforeUpdate,
    Place::MachineAfterDiskBeforeNext,
    // Of a disk; see `control::resize`.
    Place::ResizeAfterFileBeforeJournal,
    Place::ResizeAfterJournalBeforeSize,
    // Of a reader.
    Place::ReadAfterSuperblockBeforeRing,
    Place::ReadAfterSeekBeforePage,
];

#[test]
fn every_place_of_a_kill_is_visited() {
    let mut visited = BTreeSet::new();
    let mut world = World::new();
    let mut steps = busy_steps().to_vec();
    // An alarm for the full ring, a commit that drops a set, a hole to be filled, a clean end.
    steps.extend([
        Step::Burst(1, 400),
        Step::Seal,
        Step::Commit(0),
        Step::Kill,
        Step::Close,
        // Within the block, within the room, and into a new place.
        Step::Burst(11, 360),
        Step::Maintain,
        Step::Grow(1),
        Step::GrowWhileStopped(500_000),
        Step::Grow(1_000_000),
        Step::GrowWhileStopped(1_500_000),
    ]);
    for step in &steps {
        let before = world.model.clone();
        for (point, image) in world.watched(step) {
            visited.insert(point);
            let path = world.folder.path().join("moment.hrl");
            std::fs::write(&path, image).unwrap();
            let (journal, _) = open(&path, &options(world.size_bytes)).unwrap();
            assert!(journal.watermarks().is_consistent(), "{point:?}");
            let mut model = match step {
                Step::Commit(_) => world.model.clone(),
                _ => before.clone(),
            };
            model.grow(journal.watermarks().open.0, world.size_bytes);
            if let Err(error) = model.check_all(&path) {
                panic!("{point:?} in {step:?}: {error}");
            }
        }
    }
    visited.extend(VISITED_ELSEWHERE);
    let missed: Vec<_> = Place::ALL
        .iter()
        .filter(|point| !visited.contains(point))
        .collect();
    assert!(missed.is_empty(), "{missed:?}");
}

/// Steps after which everything is in use: both checkpoint sets, a lap of the ring, a hole, a closed and a
/// sealed epoch, an alarm of an epoch before the open one.
fn busy_steps() -> [Step; 16] {
    [
        Step::Cut,
        Step::Seal,
        Step::Commit(0),
        Step::Burst(11, 360),
        Step::Maintain,
        Step::Cut,
        Step::Seal,
        Step::Alarm,
        Step::Burst(5000, 150),
        Step::Maintain,
        Step::Burst(33_000, 110),
        Step::Maintain,
        Step::Cut,
        Step::Record(40_000, 30_000),
        Step::Hole,
        Step::Burst(20_000, 100),
    ]
}
