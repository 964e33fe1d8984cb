//! Random lives of a journal against a model: killed at any moment, reopened, damaged, cut short.
//!
//! A kill is simulated by a copy of the file as it is: what SIGKILL leaves is what the page cache
//! holds at that moment, and that is what a copy reads. A kill in the middle of a step is made of
//! the bytes before and after the step, in the order in which the step stores them.
//!
//! The model is the set of all (epoch, block) that were recorded and not committed. A journal may
//! report more, never less.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use zerocopy::{FromBytes, IntoBytes};

use super::format::{
    ALARM_OFFSET, EPOCH_MAX, MAGIC_WRITING, Operation, PAGE_BYTES, RECORD_BYTES, RING_OFFSET,
    Superblock,
};
use super::reader::JournalReader;
use super::state::EpochState;
use super::{Found, Journal, JournalOptions, open};
use crate::error::ErrorKind;
use crate::extent::{BLOCK_SIZE, Epoch, Extent};

/// Blocks of the disk: three checkpoint pages, the last one short.
const BLOCKS: u64 = 70_001;
const RING_BYTES: u64 = 16 << 10;
const RING_RECORDS: u64 = RING_BYTES / RECORD_BYTES;

fn options() -> JournalOptions {
    JournalOptions {
        disk_identity: [7; 16],
        disk_size_bytes: BLOCKS * BLOCK_SIZE,
        ring_bytes: RING_BYTES,
        rebuild: false,
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
        Self(vec![0; BLOCKS.div_ceil(64) as usize])
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
#[derive(Clone, Debug, Default)]
struct Model {
    /// The blocks recorded in each epoch.
    changed: BTreeMap<u64, Blocks>,
    /// Epochs as of which every block must count as changed.
    suspect: BTreeSet<u64>,
    /// Epochs that were sealed, and thus are recovery points once they are committed.
    sealed: BTreeSet<u64>,
}

impl Model {
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
            if extent.end_block() > BLOCKS {
                return Err(format!("{extent:?} ends past the disk"));
            }
            end = Some(extent.end_block());
            reported.insert(extent);
        }
        if dirty.all() {
            return Ok(true);
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
            Some(epoch) => Err(format!("not every block counts as changed as of {epoch}")),
            None => Ok(reported == needed),
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
}

impl World {
    fn new() -> Self {
        let folder = folder();
        let (journal, report) = open(&folder.path().join("0.hrl"), &options()).unwrap();
        assert_eq!(report.found, Found::New(None));
        let mut model = Model::default();
        model.suspect.insert(1);
        Self {
            folder,
            number: 0,
            journal,
            open: 1,
            model,
        }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join(format!("{}.hrl", self.number))
    }

    /// The bytes that SIGKILL would leave.
    fn image(&self) -> Vec<u8> {
        std::fs::read(self.path()).unwrap()
    }

    fn record(&mut self, first_block: u64, block_count: u64) {
        let extent = Extent {
            first_block,
            block_count: block_count.min(BLOCKS - first_block),
        };
        self.model.record(self.open, extent);
        self.journal
            .record(Epoch(self.open), extent, Operation::Write);
    }

    /// What the clock of a machine does at a cut, before any superblock tells of it.
    fn advance(&mut self) {
        self.journal.gather_alarms(Epoch(self.open));
        self.open += 1;
    }

    fn carry_out(&mut self, step: &Step) {
        let state = self.journal.watermarks();
        match *step {
            Step::Record(first_block, block_count) => self.record(first_block, block_count),
            Step::Burst(first_block, count) => {
                for number in 0..count {
                    self.record((first_block + number * 977) % BLOCKS, 1);
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
                self.reopen(self.image(), Found::Clean);
            }
            Step::Kill => self.reopen(self.image(), Found::Killed),
        }
    }

    /// Goes on with a file of these bytes.
    fn reopen(&mut self, image: Vec<u8>, found: Found) {
        self.number += 1;
        std::fs::write(self.path(), image).unwrap();
        let (journal, report) = open(&self.path(), &options()).unwrap();
        assert_eq!(report.found, found);
        self.journal = journal;
        let old = self.folder.path().join(format!("{}.hrl", self.number - 1));
        std::fs::remove_file(old).unwrap();
        let state = self.journal.watermarks();
        assert!(state.is_consistent(), "{state:?}");
        let newest = self.model.changed.keys().last().copied().unwrap_or(0);
        assert!(state.open.0 >= newest, "epoch {newest} is not known");
        self.open = state.open.0;
    }

    /// Compares with the model. Nothing that is committed is reported, unless it was folded with
    /// what is not.
    fn check(&self) -> Result<(), TestCaseError> {
        let exact = self
            .model
            .check_all(&self.path())
            .map_err(TestCaseError::fail)?;
        prop_assert!(exact || self.journal.sets_in_use() > 0);
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
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0..BLOCKS, prop_oneof![1..40u64, 1..40_000u64])
            .prop_map(|(first, count)| Step::Record(first, count)),
        6 => (0..BLOCKS, 1..450u64).prop_map(|(first, count)| Step::Burst(first, count)),
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
    ]
}

/// Offsets of the 8-byte words in which two images differ.
fn differences(before: &[u8], after: &[u8]) -> Vec<usize> {
    let words = before.chunks_exact(8).zip(after.chunks_exact(8));
    let differing = words.enumerate().filter(|(_, (old, new))| old != new);
    differing.map(|(index, _)| index * 8).collect()
}

/// What a kill in the middle of a step leaves, `done` words after its beginning, for steps that
/// publish one superblock: pages of the checkpoint are written before it or punched out after it,
/// the alarm is cleared after it. `None` if the step does not get that far.
fn torn_update(before: &[u8], after: &[u8], done: usize, folds: bool) -> Option<Vec<u8>> {
    let changed = differences(before, after);
    let checkpoint = RING_OFFSET as usize + RING_BYTES as usize;
    let superblocks = 2 * PAGE_BYTES;
    let copy = changed.first().filter(|offset| **offset < superblocks)? / PAGE_BYTES * PAGE_BYTES;
    let mut image = before.to_vec();
    let mut pages: Vec<usize> = changed
        .iter()
        .filter(|offset| **offset >= checkpoint)
        .map(|offset| offset / PAGE_BYTES * PAGE_BYTES)
        .collect();
    pages.dedup();
    let mut steps: Vec<(usize, Vec<u8>)> = Vec::new();
    let page_steps = pages
        .iter()
        .map(|&page| (page, after[page..page + PAGE_BYTES].to_vec()));
    if folds {
        steps.extend(page_steps.clone());
    }
    steps.push((copy, MAGIC_WRITING.to_vec()));
    for word in (copy + 8..copy + PAGE_BYTES).step_by(8) {
        if before[word..word + 8] != after[word..word + 8] {
            steps.push((word, after[word..word + 8].to_vec()));
        }
    }
    steps.push((copy, after[copy..copy + 8].to_vec()));
    let alarm = ALARM_OFFSET as usize..ALARM_OFFSET as usize + 16;
    steps.push((alarm.start, after[alarm.start..alarm.start + 8].to_vec()));
    steps.push((alarm.start + 8, after[alarm.start + 8..alarm.end].to_vec()));
    if !folds {
        steps.extend(page_steps);
    }
    for (offset, bytes) in steps.get(..done)? {
        image[*offset..*offset + bytes.len()].copy_from_slice(bytes);
    }
    Some(image)
}

/// The same for a step that writes one record.
fn torn_record(before: &[u8], after: &[u8], done: usize) -> Option<Vec<u8>> {
    let slot = differences(before, after).first()? / RECORD_BYTES as usize * RECORD_BYTES as usize;
    if slot < RING_OFFSET as usize || done > 4 {
        return None;
    }
    let mut image = before.to_vec();
    if done > 0 {
        image[slot..slot + 8].copy_from_slice(&u64::MAX.to_le_bytes());
    }
    let words = slot + 8..slot + 8 * done.max(1);
    image[words.clone()].copy_from_slice(&after[words]);
    Some(image)
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
    fn whatever_happens_nothing_is_forgotten(steps in prop::collection::vec(step(), 1..60)) {
        let mut world = World::new();
        for step in &steps {
            world.carry_out(step);
            world.check()?;
        }
        world.carry_out(&Step::Kill);
        world.check()?;
    }

    #[test]
    fn a_kill_in_the_middle_of_any_step_forgets_nothing(
        steps in prop::collection::vec((step(), any::<bool>(), 0..60usize), 1..40),
    ) {
        let mut world = World::new();
        for (step, killed, done) in &steps {
            if !killed {
                world.carry_out(step);
                continue;
            }
            let (before, folds) = (world.image(), world.journal.folds());
            let model = world.model.clone();
            world.carry_out(step);
            let after = world.image();
            let torn = match step {
                Step::Record(..) => torn_record(&before, &after, *done),
                Step::Cut | Step::Seal | Step::Abandon | Step::Revert | Step::Commit(_) => {
                    torn_update(&before, &after, *done, false)
                }
                Step::Maintain if world.journal.folds() == folds + 1 => {
                    torn_update(&before, &after, *done, true)
                }
                _ => None,
            };
            if let Some(image) = torn {
                if matches!(step, Step::Record(..)) {
                    // The write was never submitted.
                    world.model = model;
                }
                world.reopen(image, Found::Killed);
                world.check()?;
            }
        }
    }
}

/// A journal in which everything is in use: both checkpoint sets, a lap of the ring, a hole, a
/// closed and a sealed epoch, an alarm of an epoch before the open one.
fn busy_world() -> World {
    let mut world = World::new();
    let steps = [
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
    ];
    for step in &steps {
        world.carry_out(step);
    }
    assert_eq!(world.journal.sets_in_use(), 2);
    assert!(world.journal.ring().head() > RING_RECORDS);
    world.check().unwrap();
    world
}

/// Opens a file that may be damaged. Whether it was taken.
fn judge(path: &Path, model: &Model, what: &str) -> bool {
    let name = path.display().to_string();
    let refused = |error: &crate::error::Error| {
        assert!(error.to_string().contains(&name), "{what}: {error}");
        let kinds = [
            ErrorKind::Corrupt,
            ErrorKind::Unsupported,
            ErrorKind::Mismatch,
        ];
        assert!(kinds.contains(&error.kind()), "{what}: {error:?}");
    };
    // A reader may refuse what an opened journal is refused for; if it does not, it knows all.
    let complaint = model.check_all(path).err();
    assert!(
        complaint.as_ref().is_none_or(|text| text.contains(&name)),
        "{what}: a reader says {complaint:?}"
    );
    match open(path, &options()) {
        Err(error) => {
            refused(&error);
            false
        }
        Ok((journal, _)) => {
            if let Err(error) = model.check_all(path) {
                panic!("{what}: {error}");
            }
            assert!(journal.watermarks().is_consistent(), "{what}");
            true
        }
    }
}

#[test]
fn a_flipped_byte_is_refused_or_costs_nothing_that_is_known() {
    let world = busy_world();
    let image = world.image();
    let path = world.folder.path().join("flipped.hrl");
    std::fs::write(&path, &image).unwrap();
    let ring = RING_OFFSET as usize;
    let checkpoint = ring + RING_BYTES as usize;
    let superblocks_and_alarm = 0..ALARM_OFFSET as usize + 64;
    let intent = (superblocks_and_alarm.end..ring).step_by(4099);
    let slots = ring..checkpoint;
    let pages = (checkpoint..image.len()).step_by(61);
    let (mut taken, mut refused) = (0, 0);
    let places = superblocks_and_alarm
        .chain(intent)
        .chain(slots)
        .chain(pages);
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    for place in places {
        use std::os::unix::fs::FileExt;
        let flipped = image[place] ^ (place % 255 + 1) as u8;
        file.write_all_at(&[flipped], place as u64).unwrap();
        let what = format!("byte {place} of {:#x} as {flipped:#x}", image[place]);
        if judge(&path, &world.model, &what) {
            taken += 1;
            // Opening has written to it.
            file.write_all_at(&image, 0).unwrap();
        } else {
            refused += 1;
            file.write_all_at(&image[place..=place], place as u64)
                .unwrap();
        }
    }
    // Superblocks and slots in use are refused, checkpoint pages and reserved bytes are not.
    assert!(
        refused > 16_000 && taken > 100,
        "{refused} refused, {taken} taken"
    );
}

#[test]
fn a_journal_cut_short_anywhere_is_refused() {
    let world = busy_world();
    let image = world.image();
    let path = world.folder.path().join("short.hrl");
    for length in (0..image.len()).step_by(512) {
        std::fs::write(&path, &image[..length]).unwrap();
        let what = format!("cut short at {length}");
        assert!(!judge(&path, &world.model, &what), "{what}");
    }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn a_superblock_of_any_numbers_is_refused_or_works(
        changes in prop::collection::vec((3..240usize / 4, prop_oneof![
            Just(0u32), Just(u32::MAX), Just(1 << 31), 0..64u32, any::<u32>(),
        ]), 1..4),
        wide in any::<bool>(),
    ) {
        let world = busy_world();
        let mut image = world.image();
        for copy in 0..2 {
            let page = copy * PAGE_BYTES..(copy + 1) * PAGE_BYTES;
            let mut bytes = image[page.clone()].to_vec();
            for (word, value) in &changes {
                bytes[word * 4..word * 4 + 4].copy_from_slice(&value.to_le_bytes());
                if wide {
                    let next = word * 4 + 4;
                    bytes[next..next + 4].copy_from_slice(&value.to_le_bytes());
                }
            }
            let mut superblock = Superblock::read_from_bytes(&bytes).unwrap();
            superblock.seal();
            image[page].copy_from_slice(superblock.as_bytes());
        }
        let path = world.folder.path().join("any.hrl");
        std::fs::write(&path, &image).unwrap();
        // Such numbers were never written by a tracker, so nothing is promised but an answer.
        let mut sink = Vec::new();
        let _ = super::verify(&path);
        let _ = super::dump(&path, &mut sink);
        if let Ok(reader) = JournalReader::open(&path)
            && let Ok(dirty) = reader.dirty(Epoch::ZERO, Epoch(EPOCH_MAX))
        {
            let _ = dirty.block_count();
        }
        if let Ok((journal, _)) = open(&path, &options()) {
            journal.record(Epoch(journal.state().open.0), Extent { first_block: 0, block_count: 9 }, Operation::Trim);
            journal.maintain().unwrap();
            let open = journal.state().open;
            journal.update(|state| state.cut(open.next())).unwrap();
            journal.update(|state| state.commit(open)).unwrap();
            journal.close().unwrap();
        }
    }
}
