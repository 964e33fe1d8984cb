//! One journal file, mapped, and the ring in it: what workers record in.
//!
//! Overview: a journal has one core, and another while a new file is about to take its place. Workers
//! record in the present core and, if there is a later one, in that too (see `replace`).
//!
//! Order when the ring is full: the overflow bits, or else the alarm, before the data of the write. Once
//! the ring was full, all goes to the bits until folding has made room, so that the ring does not fill
//! again with each record that leaves it.

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::fcntl::Flock;

use super::alarm::{Alarm, doubt_of};
use super::format::{Operation, RECORD_BLOCKS_MAX, Record, Superblock};
use super::mapping::SharedWords;
use super::overflow::{Overflow, OverflowPlace};
use super::ring::Ring;
use crate::extent::{Epoch, Extent};
use crate::failpoint::{self, Place, reached};

/// The core of a journal.
pub(super) struct Core {
    pub file: Flock<File>,
    pub words: SharedWords,
    pub ring: Ring,
    overflow: OverflowPlace,
    /// The ring was full, and has not been emptied since.
    direct: AtomicBool,
}

/// How a change was kept.
pub(super) struct Recorded {
    /// Records written.
    pub written: u64,
    /// Changes that found the ring full.
    pub coarse: u64,
}

impl Core {
    /// The core of a file whose ring goes on at `head`.
    pub fn new(file: Flock<File>, words: SharedWords, superblock: &Superblock, head: u64) -> Self {
        let first_word = superblock.ring_offset.get() as usize / 8;
        let (records, tail) = (superblock.ring_records.get(), superblock.ring_tail.get());
        Self {
            file,
            words,
            ring: Ring::new(first_word, records, tail, head),
            overflow: OverflowPlace::of(superblock),
            direct: AtomicBool::new(false),
        }
    }

    /// The alarm.
    pub fn alarm(&self) -> Alarm<'_> {
        Alarm::of(&self.words)
    }

    /// Leaves word for whoever opens this file after a kill that it may not be complete.
    pub fn set_doubt(&self) {
        if let Some(word) = doubt_of(&self.words) {
            word.store(1, Ordering::Release);
        }
    }

    /// The overflow bits.
    pub fn overflow(&self) -> Overflow<'_> {
        self.overflow.bits(&self.words)
    }

    /// Records that blocks change in this epoch, in the ring or, if it is full, coarsely.
    pub fn record(&self, epoch: Epoch, extent: Extent, operation: Operation) -> Recorded {
        let mut written = 0;
        let mut first_block = extent.first_block;
        while first_block < extent.end_block() {
            let block_count = (extent.end_block() - first_block).min(RECORD_BLOCKS_MAX);
            let record = Record {
                sequence: 0,
                epoch,
                operation,
                first_block,
                block_count,
            };
            let appended = !self.direct.load(Ordering::Relaxed)
                && self.ring.append(self.words.words(), record);
            if !appended {
                self.record_coarsely(epoch, extent);
                return Recorded { written, coarse: 1 };
            }
            written += 1;
            first_block += block_count;
        }
        Recorded { written, coarse: 0 }
    }

    #[cold]
    fn record_coarsely(&self, epoch: Epoch, extent: Extent) {
        reached(Place::RecordAfterRefusalBeforeAlarm);
        self.direct.store(true, Ordering::Relaxed);
        if !self.overflow().raise(epoch, extent) {
            self.alarm().raise(epoch);
        }
    }

    /// Lets the ring take records again.
    pub fn end_direct(&self) {
        self.direct.store(false, Ordering::Relaxed);
    }

    /// Whether the ring takes no records at present.
    pub fn is_direct(&self) -> bool {
        self.direct.load(Ordering::Relaxed)
    }

    /// Makes all that was stored to the file durable. Its length is not, unless it has to be.
    pub fn sync(&self) -> io::Result<()> {
        failpoint::attempt(Place::SyncAfterStoresBeforeDurable, &self.file)?;
        reached(Place::SyncAfterStoresBeforeDurable);
        // Writes that were made through the mapping are among what this takes along on Linux.
        self.file.sync_data()?;
        failpoint::made_durable(&self.file, 0..u64::MAX);
        Ok(())
    }

    /// The same, and the length too.
    pub fn sync_all(&self) -> io::Result<()> {
        failpoint::attempt(Place::SyncAfterStoresBeforeDurable, &self.file)?;
        self.file.sync_all()?;
        failpoint::made_durable(&self.file, 0..u64::MAX);
        Ok(())
    }
}
