//! A journal in which everything is in use, and what it has to tell: for tests that damage it.
//!
//! Epoch 1 is committed, 2 sealed with an alarm, 3 closed, 4 open. Both checkpoint sets, both halves of the
//! overflow bits and several laps of the ring and of the intent log are in use; the ring is full and has a
//! hole, and regions were evicted from the set of armed ones.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::OnceLock;

use zerocopy::IntoBytes;

use super::format::{
    EPOCH_MAX, INTENT_OFFSET, OLD_INTENT_PAGES, Operation, PAGE_BYTES, Superblock, Time,
};
use super::intent::extent_of;
use super::reader::JournalReader;
use super::state::EpochState;
use super::{Journal, JournalOptions, Moment, open};
use crate::error::Result;
use crate::extent::{BLOCK_SIZE, Epoch, Extent, blocks_of};
use crate::failpoint::set_boot;

/// Size of the disk: eight checkpoint pages, the last of them, the last region and the last block short.
pub const SIZE_BYTES: u64 = 230_300 * BLOCK_SIZE - 1536;
/// What it may grow to.
pub const LARGER_BYTES: u64 = 231_000 * BLOCK_SIZE;
const REGIONS: u32 = 900;
/// Slots of the table of armed regions: it takes two transactions to tell it, and it is too small.
const SLOTS: u32 = 800;
/// The boot that wrote it.
pub const BOOT: [u8; 16] = [0xaa; 16];
/// The boots after it.
pub const NEXT_BOOT: [u8; 16] = [0xbb; 16];
pub const LAST_BOOT: [u8; 16] = [0xcc; 16];
pub const IDENTITY: [u8; 16] = *b"identity of disk";

/// The disk as the journal knows it.
pub const SEEN: Moment = Moment {
    modified: Time(1_795_550_000_123),
    looked: Time(1_795_550_000_200),
    booted: Time(1_795_000_000_000),
};

pub fn options() -> JournalOptions {
    JournalOptions {
        disk_identity: IDENTITY,
        disk_size_bytes: SIZE_BYTES,
        ring_bytes: 16 << 10,
        intent_regions: SLOTS,
        rebuild: false,
        seen: Some(SEEN),
    }
}

/// A folder in memory where there is one.
pub fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap_or_else(|_| tempfile::tempdir().unwrap())
}

/// A set of blocks of the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blocks(Vec<u64>);

impl Default for Blocks {
    fn default() -> Self {
        Self(vec![0; LARGER_BYTES.div_ceil(BLOCK_SIZE * 64) as usize])
    }
}

impl Blocks {
    pub fn insert(&mut self, extent: Extent) {
        let (mut block, end) = (extent.first_block, extent.end_block());
        while let Some(word) = self.0.get_mut(block as usize / 64).filter(|_| block < end) {
            let bits = (64 - block % 64).min(end - block);
            *word |= (u64::MAX >> (64 - bits)) << (block % 64);
            block += bits;
        }
    }

    pub fn insert_all(&mut self, other: &Self) {
        for (word, other) in self.0.iter_mut().zip(&other.0) {
            *word |= other;
        }
    }

    /// Takes out what lies behind the end of a disk of so many bytes.
    pub fn end_with(&mut self, size_bytes: u64) {
        for block in blocks_of(size_bytes)..self.0.len() as u64 * 64 {
            self.0[block as usize / 64] &= !(1 << (block % 64));
        }
    }

    pub fn contains_all(&self, other: &Self) -> bool {
        self.0
            .iter()
            .zip(&other.0)
            .all(|(word, other)| other & !word == 0)
    }
}

/// What a journal tells of an interval of epochs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Told {
    pub all: bool,
    pub blocks: Blocks,
}

impl Told {
    pub fn covers(&self, other: &Self) -> bool {
        self.all || !other.all && self.blocks.contains_all(&other.blocks)
    }
}

/// What a journal tells as a whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Account {
    pub state: EpochState,
    /// What is not committed.
    pub uncommitted: Told,
    pub open: Told,
    pub closed: Option<Told>,
}

impl Account {
    pub fn of(path: &Path) -> Result<Self> {
        let reader = JournalReader::open(path)?;
        let state = reader.state()?;
        let tell = |after: Epoch, through: Epoch| {
            let dirty = reader.dirty(after, through)?;
            let mut told = Told {
                all: dirty.all(),
                ..Told::default()
            };
            for extent in dirty.extents() {
                told.blocks.insert(extent?);
            }
            Ok(told)
        };
        Ok(Self {
            uncommitted: tell(state.committed, Epoch(EPOCH_MAX))?,
            open: tell(state.open_after(), Epoch(EPOCH_MAX))?,
            closed: match state.closed {
                Some(closed) => Some(tell(state.sealed, closed)?),
                None => None,
            },
            state,
        })
    }
}

/// What has to be told.
#[derive(Clone, Debug, Default)]
pub struct Model {
    /// The blocks recorded in each epoch.
    pub changed: BTreeMap<u64, Blocks>,
    /// The regions in which changes were kept coarsely, by epoch.
    pub coarse: BTreeMap<u64, BTreeSet<u32>>,
    /// The regions that are armed.
    pub armed: BTreeSet<u32>,
}

impl Model {
    /// The blocks of the epochs after this one up to that, coarsely where they were kept so.
    pub fn blocks(&self, after: u64, through: u64) -> Blocks {
        let mut blocks = Blocks::default();
        for (_, changed) in self.changed.range(after + 1..=through) {
            blocks.insert_all(changed);
        }
        for (_, regions) in self.coarse.range(after + 1..=through) {
            blocks.insert_all(&blocks_of_regions(regions));
        }
        blocks
    }
}

/// The blocks of regions, as far as the disk reaches.
pub fn blocks_of_regions<'a>(regions: impl IntoIterator<Item = &'a u32>) -> Blocks {
    let mut blocks = Blocks::default();
    for &region in regions {
        blocks.insert(extent_of(region));
    }
    blocks.end_with(SIZE_BYTES);
    blocks
}

/// The bytes of a journal, and what they have to tell.
#[derive(Clone, Debug)]
pub struct Specimen {
    pub bytes: Vec<u8>,
    pub model: Model,
}

impl Specimen {
    /// Whether what is told of it is no less than there is: after a power cut the armed regions too, and
    /// no epoch stays closed.
    ///
    /// # Errors
    ///
    /// What is missing.
    pub fn check(&self, account: &Account, power_cut: bool) -> std::result::Result<(), String> {
        let state = account.state;
        if state.committed > Epoch(1) || state.sealed > Epoch(2) {
            return Err(format!("{state:?} is more than there is"));
        }
        if account.open.all && state.closed.is_none() {
            return Ok(());
        }
        let mut open = self.model.blocks(state.open_after().0, EPOCH_MAX);
        let mut uncommitted = self.model.blocks(1, EPOCH_MAX);
        if power_cut {
            let armed = blocks_of_regions(&self.model.armed);
            open.insert_all(&armed);
            uncommitted.insert_all(&armed);
        }
        let closed = self.model.blocks(2, 3);
        let known = [
            account.open.blocks.contains_all(&open),
            account.uncommitted.blocks.contains_all(&uncommitted),
            account.uncommitted.all,
            account
                .closed
                .as_ref()
                .is_none_or(|told| told.blocks.contains_all(&closed) && !power_cut),
        ];
        match known == [true; 4] {
            true => Ok(()),
            false => Err(format!("{known:?} of {state:?}")),
        }
    }
}

/// A journal whose tracker was killed or lost its power.
pub fn left_open() -> &'static Specimen {
    static SPECIMEN: OnceLock<Specimen> = OnceLock::new();
    SPECIMEN.get_or_init(|| live(false))
}

/// A journal that was closed.
pub fn closed() -> &'static Specimen {
    static SPECIMEN: OnceLock<Specimen> = OnceLock::new();
    SPECIMEN.get_or_init(|| live(true))
}

struct Life {
    journal: Journal,
    model: Model,
    open: u64,
    written: u64,
}

impl Life {
    /// Records single blocks all over the disk.
    fn record(&mut self, count: u64) {
        for _ in 0..count {
            let first_block = self.written * 601 % blocks_of(SIZE_BYTES);
            self.written += 1;
            let extent = Extent {
                first_block,
                block_count: 1,
            };
            let coarse = self.journal.coarse_changes();
            self.journal
                .record(Epoch(self.open), extent, Operation::Write);
            if self.journal.coarse_changes() > coarse {
                let regions = self.model.coarse.entry(self.open).or_default();
                regions.insert((first_block / 256) as u32);
            } else {
                self.model
                    .changed
                    .entry(self.open)
                    .or_default()
                    .insert(extent);
            }
        }
    }

    fn cut(&mut self) {
        let (closing, next) = (Epoch(self.open), Epoch(self.open + 1));
        self.journal.gather_alarms(closing, next);
        self.journal.update(|state| state.cut(next)).unwrap();
        self.open += 1;
    }

    /// Arms all regions, more than there are slots, in more transactions than there are pages.
    fn arm(&mut self) {
        let all: Vec<u32> = (0..REGIONS).collect();
        let (first, others) = all.split_at(SLOTS as usize);
        for regions in first.chunks(100).chain(others.chunks(1)) {
            let (wanted, ahead) = (regions.iter().copied().collect(), BTreeSet::new());
            let mut log = self.journal.lock_intents();
            log.arm(&self.journal.regions, &wanted, &ahead).unwrap();
            drop(log);
            self.journal.sync_ring().unwrap();
        }
        let log = self.journal.lock_intents();
        let (commits, evictions) = (log.commits(), log.evictions());
        assert!(commits > 61 && evictions > 50, "{commits}, {evictions}");
        self.model.armed = log.regions().collect();
    }
}

fn live(closed: bool) -> Specimen {
    let folder = folder();
    let path = folder.path().join("disk.hrl");
    set_boot(Some(BOOT));
    let (journal, _) = open(&path, &options()).unwrap();
    let mut life = Life {
        journal,
        model: Model::default(),
        open: 1,
        written: 0,
    };
    life.cut();
    life.journal.update(|state| state.commit(Epoch(1))).unwrap();
    life.record(380);
    life.journal.raise_alarm(Epoch(2));
    life.journal.maintain().unwrap();
    life.cut();
    life.journal.update(|state| state.seal(Epoch(2))).unwrap();
    for count in [130, 128, 300] {
        life.record(count);
        life.journal.maintain().unwrap();
    }
    life.arm();
    life.cut();
    life.record(60);
    life.journal.ring().claim();
    life.record(150);
    let ring = life.journal.ring();
    assert!(life.journal.sets_in_use() == 2 && ring.tail() > ring.capacity());
    assert_eq!(Vec::from_iter(life.model.coarse.keys()), [&3, &4]);
    if closed {
        life.journal.close().unwrap();
    }
    let bytes = std::fs::read(&path).unwrap();
    set_boot(None);
    Specimen {
        bytes,
        model: life.model,
    }
}

/// The superblock in a copy that is whole.
pub fn superblock(bytes: &[u8], copy: usize) -> Superblock {
    let page = &bytes[copy * PAGE_BYTES..(copy + 1) * PAGE_BYTES];
    Superblock::decode(page).unwrap()
}

/// The copy that counts.
pub fn newest_copy(bytes: &[u8]) -> usize {
    let [first, second] = [0, 1].map(|copy| superblock(bytes, copy).sequence.get());
    usize::from(second > first)
}

/// Puts a superblock into a copy, with a check that fits.
pub fn put_superblock(bytes: &mut [u8], copy: usize, mut superblock: Superblock) {
    superblock.seal();
    bytes[copy * PAGE_BYTES..(copy + 1) * PAGE_BYTES].copy_from_slice(superblock.as_bytes());
}

/// Makes it a journal of the second version, which has neither an intent log nor overflow bits.
pub fn of_second_version(specimen: &Specimen) -> Specimen {
    let Specimen { mut bytes, model } = specimen.clone();
    let ring = superblock(&bytes, 0).ring_offset.get() as usize;
    let intents = OLD_INTENT_PAGES * PAGE_BYTES as u64;
    let zeroes = vec![0; intents as usize];
    bytes.splice(INTENT_OFFSET as usize..ring, zeroes);
    for copy in 0..2 {
        let mut superblock = superblock(&bytes, copy);
        let behind = superblock.checkpoint_offset.get() - superblock.ring_offset.get();
        superblock.version = 2.into();
        superblock.intent_bytes = intents.into();
        superblock.ring_offset = (INTENT_OFFSET + intents).into();
        superblock.checkpoint_offset = (INTENT_OFFSET + intents + behind).into();
        superblock.overflow_offset = 0.into();
        superblock.overflow_bytes = 0.into();
        superblock.overflow_unit_bytes = 0.into();
        put_superblock(&mut bytes, copy, superblock);
    }
    let model = Model {
        coarse: BTreeMap::new(),
        armed: BTreeSet::new(),
        ..model
    };
    Specimen { bytes, model }
}
