//! A journal as another process reads it while its tracker writes, or after it died.
//!
//! Order: the superblock is copied out, then the ring and the checkpoint pages, then the superblock
//! again. If the tail or a set has moved meanwhile, slots may have been reused under the scan, and
//! everything is read anew. Records of a closed epoch are complete before a cut is answered, so
//! what a reader of closed epochs sees does not change under it in any other way.
//!
//! When the disk grows, the checkpoint sets may move while they are read. After each page the
//! superblock is looked at; if it names another place by then, the page is read there. The old place
//! is given back only after that superblock stands, so a page that was read before is whole.
//!
//! What it does not handle: locking. A journal that is set aside meanwhile goes on being read.

use std::fs::File;
use std::path::{Path, PathBuf};

use super::checkpoint::{SetPlace, extents_of_page};
use super::evidence::{latest_alarm, read_alarm, read_overflow};
use super::format::{FLAG_REPLACED, Operation, PageState, RECORD_BYTES, Slot, Superblock};
use super::head::{Head, map_checked, read_superblock};
use super::mapping::SharedWords;
use super::overflow::OverflowPlace;
use super::ring::read_slot;
use super::state::EpochState;
use super::writer::distrusted;
use crate::error::{Error, ErrorKind, Result};
use crate::extent::{Epoch, Extent, blocks_of, coalesce};
use crate::failpoint::{Place, reached};

/// Attempts to read a set of records that changes under the reader.
const ATTEMPTS_MAX: usize = 1000;

/// A journal, open for reading.
#[derive(Debug)]
pub struct JournalReader {
    path: PathBuf,
    file: File,
    words: SharedWords,
    /// It never changes.
    journal_id: String,
}

impl JournalReader {
    /// Opens a journal.
    ///
    /// # Errors
    ///
    /// It is missing, damaged, cut short or of a future version.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path)
            .map_err(|error| Error::io(format!("Cannot open journal {}", path.display()), error))?;
        let Head {
            words, superblock, ..
        } = map_checked(path, &file, false, None)?;
        let journal_id = uuid::Uuid::from_bytes(superblock.journal_id)
            .simple()
            .to_string();
        Ok(Self {
            path: path.to_owned(),
            file,
            words,
            journal_id,
        })
    }

    /// Random number of the journal, as 32 hexadecimal digits.
    pub fn journal_id(&self) -> String {
        self.journal_id.clone()
    }

    /// Size of the disk in bytes at this moment.
    ///
    /// # Errors
    ///
    /// The superblocks are damaged.
    pub fn disk_size_bytes(&self) -> Result<u64> {
        Ok(self.superblock()?.disk_size_bytes.get())
    }

    fn superblock(&self) -> Result<Superblock> {
        let (superblock, ..) = read_superblock(&self.path, &self.words, None)?;
        if superblock.flags.get() & FLAG_REPLACED == 0 {
            return Ok(superblock);
        }
        Err(Error::new(
            ErrorKind::State,
            format!(
                "Another file has taken the place of journal {}: open it again",
                self.path.display()
            ),
        ))
    }

    /// The watermarks at this moment; `resync` includes the latest alarm.
    ///
    /// # Errors
    ///
    /// The superblocks are damaged.
    pub fn state(&self) -> Result<EpochState> {
        let mut state = EpochState::of(&self.superblock()?);
        state.resync = state.resync.max(latest_alarm(&self.path, &self.words)?);
        Ok(state)
    }

    /// What changed in the epochs after `after`, up to and with `through`. Complete for epochs that
    /// are closed.
    ///
    /// # Errors
    ///
    /// A record is damaged, or the journal changes faster than it can be read.
    pub fn dirty(&self, after: Epoch, through: Epoch) -> Result<DirtySet<'_>> {
        for _ in 0..ATTEMPTS_MAX {
            let superblock = self.superblock()?;
            let alarms = read_alarm(&self.path, &self.words)?;
            reached(Place::ReadAfterSuperblockBeforeRing);
            let ring = self.mapped_extents(&superblock, after, through)?;
            let within = |epoch: Epoch| after < epoch && epoch <= through;
            let resync = EpochState::of(&superblock).resync;
            let all = resync.into_iter().chain(alarms).any(within);
            let again = self.superblock()?;
            let moved = again.ring_tail.get() != superblock.ring_tail.get()
                || (0..2).any(|index| {
                    again.sets[index].generation.get() != superblock.sets[index].generation.get()
                });
            if !moved {
                let wanted = |index: &usize| {
                    let set = &superblock.sets[*index];
                    let (lowest, highest) = (set.lowest_epoch.get(), set.highest_epoch.get());
                    highest != 0 && highest > after.0 && lowest <= through.0
                };
                let as_now = |index: usize| WantedSet {
                    index,
                    place: SetPlace::of(&superblock, index),
                    generation: superblock.sets[index].generation.get(),
                };
                return Ok(DirtySet {
                    reader: self,
                    all,
                    ring,
                    sets: (0..2).filter(wanted).map(as_now).collect(),
                    blocks: blocks_of(superblock.disk_size_bytes.get()),
                });
            }
        }
        Err(Error::new(
            ErrorKind::State,
            format!(
                "Journal {} changes faster than it can be read",
                self.path.display()
            ),
        ))
    }

    /// What ring and overflow bits tell.
    fn mapped_extents(
        &self,
        superblock: &Superblock,
        after: Epoch,
        through: Epoch,
    ) -> Result<Vec<Extent>> {
        let tail = superblock.ring_tail.get();
        let first_word = superblock.ring_offset.get() as usize / 8;
        let capacity = superblock.ring_records.get() as usize;
        let blocks = blocks_of(superblock.disk_size_bytes.get());
        let mut extents = Vec::new();
        let slots = self.words.words().get(first_word..).unwrap_or_default();
        for (index, slot) in slots.chunks_exact(4).take(capacity).enumerate() {
            let Ok(slot) = slot.try_into() else { continue };
            let record = match read_slot(slot) {
                Slot::Empty | Slot::Writing => continue,
                Slot::Whole(record) if record.sequence % capacity as u64 == index as u64 => record,
                Slot::Whole(_) | Slot::Damaged => {
                    let offset = superblock.ring_offset.get() + index as u64 * RECORD_BYTES;
                    let what = format!("the record at offset {offset} is damaged");
                    return Err(distrusted(ErrorKind::Corrupt, &self.path, &what));
                }
            };
            let wanted = record.sequence >= tail
                && record.operation != Operation::Null
                && record.epoch > after
                && record.epoch <= through;
            if wanted && record.first_block < blocks {
                extents.push(Extent {
                    first_block: record.first_block,
                    block_count: record.block_count.min(blocks - record.first_block),
                });
            }
        }
        let overflow = OverflowPlace::of(superblock).bits(&self.words);
        // If one is damaged, its bits may be of any epoch.
        read_overflow(&self.path, &self.words, superblock)?;
        overflow.each_extent(after, through, |mut extent| {
            extent.block_count = extent
                .block_count
                .min(blocks.saturating_sub(extent.first_block));
            if extent.block_count > 0 {
                extents.push(extent);
            }
        });
        coalesce(&mut extents);
        Ok(extents)
    }
}

/// What changed in an interval of epochs.
#[derive(Debug)]
pub struct DirtySet<'a> {
    reader: &'a JournalReader,
    all: bool,
    ring: Vec<Extent>,
    sets: Vec<WantedSet>,
    /// Blocks of the disk when the ring was read.
    blocks: u64,
}

/// A checkpoint set that has to be read.
#[derive(Clone, Copy, Debug)]
struct WantedSet {
    index: usize,
    /// Where it was last seen.
    place: SetPlace,
    generation: u64,
}

impl DirtySet<'_> {
    /// Every block counts as changed; the extents are only what is known besides.
    pub fn all(&self) -> bool {
        self.all
    }

    /// The changed blocks as sorted, disjoint extents that do not touch, except where a run is
    /// longer than what one checkpoint page covers.
    ///
    /// # Errors
    ///
    /// The checkpoint cannot be read.
    pub fn extents(&self) -> impl Iterator<Item = Result<Extent>> + '_ {
        let cursors = self.sets.iter().map(|&set| PageCursor {
            reader: self.reader,
            set,
            next_page: Some(0),
            pending: Vec::new(),
        });
        Merge {
            ring: self.ring.iter().copied().peekable(),
            cursors: cursors.collect(),
            blocks: self.blocks,
            pending: None,
            failed: false,
        }
    }

    /// Number of changed blocks.
    ///
    /// # Errors
    ///
    /// The checkpoint cannot be read.
    pub fn block_count(&self) -> Result<u64> {
        self.extents()
            .try_fold(0, |sum, extent| Ok(sum + extent?.block_count))
    }
}

/// Walks the pages of one checkpoint set; memory for one page at a time.
struct PageCursor<'a> {
    reader: &'a JournalReader,
    set: WantedSet,
    next_page: Option<u64>,
    /// Extents of the present page, in reverse.
    pending: Vec<Extent>,
}

impl PageCursor<'_> {
    fn peek(&mut self) -> Result<Option<Extent>> {
        while self.pending.is_empty() {
            let Some(page) = self.next_page else {
                return Ok(None);
            };
            let Some((page, bytes, state)) = self.read_from(page)? else {
                self.next_page = None;
                return Ok(None);
            };
            self.next_page = Some(page + 1);
            if state == PageState::Damaged {
                let path = self.reader.path.display();
                tracing::warn!("Checkpoint page {page} of {path} is damaged: all its blocks count");
            }
            self.pending = extents_of_page(&bytes, state, page);
            self.pending.reverse();
        }
        Ok(self.pending.last().copied())
    }

    /// The first page from this one on that the file has, from where the set is now.
    fn read_from(&mut self, page: u64) -> Result<Option<(u64, Vec<u8>, PageState)>> {
        let reader = self.reader;
        let failed = |error| {
            let path = reader.path.display();
            Error::io(format!("Cannot read a checkpoint of journal {path}"), error)
        };
        loop {
            let found = match self
                .set
                .place
                .next_page(&reader.file, page)
                .map_err(failed)?
            {
                None => None,
                Some(page) => {
                    reached(Place::ReadAfterSeekBeforePage);
                    let (bytes, state) = self
                        .set
                        .place
                        .read_page(&reader.file, page, self.set.generation)
                        .map_err(failed)?;
                    Some((page, bytes, state))
                }
            };
            // Each move takes a disk that has doubled, so this ends.
            let place = SetPlace::of(&reader.superblock()?, self.set.index);
            if place == self.set.place {
                return Ok(found);
            }
            self.set.place = place;
        }
    }
}

/// Merges the ring's extents with those of the checkpoint sets.
struct Merge<'a, R: Iterator<Item = Extent>> {
    ring: std::iter::Peekable<R>,
    cursors: Vec<PageCursor<'a>>,
    blocks: u64,
    pending: Option<Extent>,
    failed: bool,
}

impl<R: Iterator<Item = Extent>> Merge<'_, R> {
    /// The extent that begins first in any source.
    fn lowest(&mut self) -> Result<Option<Extent>> {
        let mut best = self.ring.peek().copied();
        let mut source = None;
        for (index, cursor) in self.cursors.iter_mut().enumerate() {
            if let Some(extent) = cursor.peek()?
                && best.is_none_or(|best| extent.first_block < best.first_block)
            {
                best = Some(extent);
                source = Some(index);
            }
        }
        match source {
            Some(index) => drop(self.cursors[index].pending.pop()),
            None => drop(self.ring.next()),
        }
        Ok(best)
    }

    fn step(&mut self) -> Result<Option<Extent>> {
        loop {
            let next = self
                .lowest()?
                .filter(|extent| extent.first_block < self.blocks);
            let Some(mut next) = next else {
                return Ok(self.pending.take());
            };
            next.block_count = next.block_count.min(self.blocks - next.first_block);
            match &mut self.pending {
                Some(last) if next.first_block <= last.end_block() => {
                    let end = last.end_block().max(next.end_block());
                    last.block_count = end - last.first_block;
                }
                _ => {
                    if let Some(finished) = self.pending.replace(next) {
                        return Ok(Some(finished));
                    }
                }
            }
        }
    }
}

impl<R: Iterator<Item = Extent>> Iterator for Merge<'_, R> {
    type Item = Result<Extent>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.failed {
            return None;
        }
        let step = self.step();
        self.failed = step.is_err();
        step.transpose()
    }
}
