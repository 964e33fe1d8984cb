//! The shipper's side of a preserve file.
//!
//! Order for blocks of the epoch: they are read from the disk; [`PreserveReader::settle`] puts the preserved ones in
//! their place and tells the tracker that all of them are in our hands; then their copies may be given back. A hole is read by
//! looking for it, so [`PreserveReader::split_hole`] comes after that.
//!
//! When every block is settled, [`PreserveReader::failure`] says whether the protocol held until then.
//!
//! What it does not handle: whether the epoch is still closed; the journal knows.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use nix::fcntl::{FallocateFlags, fallocate};

use super::area::{data_pages, read_subject};
use super::format::{
    Failure, Layout, Map, PAGE_BYTES, Subject, WORD_COPIED, WORD_FAILURE, WORD_RELEASED,
};
use super::protocol;
use crate::error::{Error, ErrorKind, Result};
use crate::extent::{BLOCK_SIZE, Epoch, Extent};
use crate::failpoint::{Canary, canary};
use crate::journal::mapping::SharedWords;

/// So much of the room of copies is not given back before the epoch ends: to punch a hole takes longer than the
/// copy did, and keeps the next ones waiting.
const UNPUNCHED_BYTES_MAX: u64 = 64 << 20;
/// Nor a larger part of the disk's size than this.
const UNPUNCHED_PART: u64 = 128;

/// The preserve file of a disk whose epoch is captured.
#[derive(Debug)]
pub struct PreserveReader {
    path: PathBuf,
    file: File,
    words: SharedWords,
    subject: Subject,
    layout: Layout,
    /// With a canary, what was preserved when it was opened.
    early: Option<Vec<u64>>,
}

impl PreserveReader {
    /// Opens the preserve file of an epoch. `journal_id` are the 32 hexadecimal digits of the journal.
    ///
    /// # Errors
    ///
    /// There is none, or it is of something else.
    pub fn open(path: &Path, journal_id: &str, epoch: Epoch) -> Result<Self> {
        let shown = path.display();
        let failed = |error| Error::io(format!("Cannot open preserve file {shown}"), error);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .map_err(failed)?;
        let subject = read_subject(&file, path)?;
        let journal = uuid::Uuid::from_bytes(subject.journal_id)
            .simple()
            .to_string();
        if subject.epoch != epoch || journal != journal_id {
            return Err(Error::new(
                ErrorKind::Mismatch,
                format!(
                    "Preserve file {shown} is of epoch {} of journal {journal}, not of epoch {epoch} of \
                     {journal_id}",
                    subject.epoch
                ),
            ));
        }
        let layout = Layout::of(subject.size_bytes);
        let mut reader = Self {
            words: SharedWords::writable(&file, layout.data_offset()).map_err(failed)?,
            path: path.to_owned(),
            file,
            subject,
            layout,
            early: None,
        };
        if canary(Canary::PreservedBeforeRead) {
            let look = |index| reader.bits(Map::Preserved, index);
            reader.early = Some((0..layout.map_words()).map(look).collect());
        }
        Ok(reader)
    }

    /// Size in bytes of the disk at the cut.
    pub fn size_bytes(&self) -> u64 {
        self.subject.size_bytes
    }

    fn word(&self, map: Map, index: u64) -> Option<&AtomicU64> {
        let first = self.layout.map_offset(map) / 8;
        (index < self.layout.map_words())
            .then(|| self.words.words().get((first + index) as usize))?
    }

    fn bits(&self, map: Map, index: u64) -> u64 {
        self.word(map, index)
            .map_or(0, |word| word.load(Ordering::Acquire))
    }

    /// The blocks of an extent that belong to the epoch: with `hot` those of them that were written more than
    /// once, without it the others. In ascending order.
    pub fn changed(&self, extent: Extent, hot: bool) -> impl Iterator<Item = Extent> + '_ {
        // What is known coarsely may reach beyond the end, where the disk may have grown since.
        let end = extent.end_block().min(self.layout.blocks);
        let on_disk = Extent {
            first_block: extent.first_block,
            block_count: end.saturating_sub(extent.first_block),
        };
        on_disk.runs(move |index| {
            let changed = self.bits(Map::Changed, index);
            let often = self.bits(Map::Hot, index);
            changed & if hot { often } else { !often }
        })
    }

    /// All blocks that belong to the epoch and were written more than once in it, in ascending order.
    ///
    /// # Errors
    ///
    /// The file cannot be read.
    pub fn hot(&self) -> impl Iterator<Item = Result<Extent>> + '_ {
        let begin = self.layout.map_offset(Map::Hot);
        let pages = data_pages(&self.file, begin..begin + self.layout.map_bytes);
        let extents = |page: io::Result<u64>| -> Vec<Result<Extent>> {
            match page {
                Ok(page) => {
                    let blocks = Extent {
                        first_block: page * PAGE_BYTES * 8,
                        block_count: PAGE_BYTES * 8,
                    };
                    self.changed(blocks, true).map(Ok).collect()
                }
                Err(error) => {
                    let what = format!("Cannot read preserve file {}", self.path.display());
                    vec![Err(Error::io(what, error))]
                }
            }
        };
        pages.flat_map(extents)
    }

    /// Why the epoch is given up, if it is. Asked for when all of its blocks are settled.
    pub fn failure(&self) -> Option<Failure> {
        std::sync::atomic::fence(Ordering::SeqCst);
        Failure::from_word(self.words.words()[WORD_FAILURE].load(Ordering::Acquire))
    }

    /// Blocks that were a hole of the disk a moment ago: those that are one in the epoch (`true`) are settled; the
    /// others are preserved, and have to be taken from there as if they had been read.
    pub fn split_hole(&self, extent: Extent) -> Vec<(Extent, bool)> {
        let mut parts = Vec::new();
        let mut next = extent.first_block;
        let preserved = extent.runs(|index| self.to_take(index));
        for run in preserved.chain([Extent {
            first_block: extent.end_block(),
            block_count: 0,
        }]) {
            let zero = Extent {
                first_block: next,
                block_count: run.first_block - next,
            };
            if zero.block_count > 0 {
                self.mark_captured(zero);
                parts.push((zero, true));
            }
            if run.block_count > 0 {
                parts.push((run, false));
            }
            next = run.end_block();
        }
        parts
    }

    /// Blocks that were read from the disk into `bytes` a moment ago: puts those that are preserved in their place, and
    /// tells the tracker that all are captured. Returns those that were preserved.
    ///
    /// # Errors
    ///
    /// The file cannot be read.
    pub fn settle(&self, extent: Extent, bytes: &mut [u8]) -> Result<Vec<Extent>> {
        let preserved: Vec<Extent> = extent.runs(|index| self.to_take(index)).collect();
        for run in &preserved {
            let start = ((run.first_block - extent.first_block) * BLOCK_SIZE) as usize;
            let target = &mut bytes[start..start + run.length_bytes() as usize];
            let offset = self.layout.data_offset() + run.offset_bytes();
            self.file.read_exact_at(target, offset).map_err(|error| {
                Error::io(
                    format!("Cannot read preserve file {}", self.path.display()),
                    error,
                )
            })?;
        }
        self.mark_captured(extent);
        Ok(preserved)
    }

    /// Blocks that were read a moment ago and are preserved.
    fn to_take(&self, index: u64) -> u64 {
        if let Some(early) = &self.early {
            return early.get(index as usize).copied().unwrap_or_default();
        }
        let found = self.word(Map::Preserved, index);
        found.map_or(0, |word| protocol::to_take(u64::MAX, word))
    }

    fn mark_captured(&self, extent: Extent) {
        for (index, mask) in extent.words() {
            // Elsewhere the map may have a hole, which must not be stored to.
            let mask = mask & self.bits(Map::Changed, index);
            if let Some(captured) = self.word(Map::Captured, index).filter(|_| mask != 0) {
                protocol::taken(mask, captured);
            }
        }
    }

    /// Bytes of copies that keep their room until the epoch ends.
    fn unpunched_bytes(&self) -> u64 {
        (self.subject.size_bytes / UNPUNCHED_PART).min(UNPUNCHED_BYTES_MAX)
    }

    /// The room of copies that were taken is not needed any more: gives it back, unless little is kept as yet.
    pub fn give_back(&self, extent: Extent) {
        let head = |word: usize| self.words.words()[word].load(Ordering::Relaxed);
        let kept = head(WORD_COPIED).saturating_sub(head(WORD_RELEASED));
        // A frozen view may still be looked at.
        if self.subject.all || kept <= self.unpunched_bytes() {
            return;
        }
        let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let offset = self.layout.data_offset() + extent.offset_bytes();
        let length = extent.length_bytes();
        // Where there are no holes the file is removed soon, and its room counts until then.
        if fallocate(&self.file, mode, offset as i64, length as i64).is_ok() {
            self.words.words()[WORD_RELEASED].fetch_add(length, Ordering::Relaxed);
        }
    }
}
