//! The journal of one disk as its tracker writes it.
//!
//! Overview: `record` is on the way of every write and takes no lock. Everything else (superblock
//! updates, folding, trimming) is done by one thread at a time under the mutex.
//!
//! Order: a superblock is published by rewriting the copy that does not count: its magic is
//! replaced by a mark, its other words are stored, its magic last. Slots of the ring are freed
//! only after the superblock that no longer needs them is published.
//!
//! Crash consistency: after SIGKILL the page cache holds every store up to it, in order. One copy
//! of the superblock is always whole; a copy in rewriting carries the mark. When the ring is full
//! the alarm is raised before the write goes on, so coverage is never lost: every block then
//! counts as changed.
//!
//! What it does not handle: power cuts. The superblock is synced each time, the ring only at a clean
//! close; after a boot without one every block counts as changed. A sync that failed is believed
//! never again: the kernel calls pages clean that it could not write, and may drop them. Every block
//! then counts as changed, and the journal is not marked clean any more.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::fcntl::Flock;
use zerocopy::IntoBytes;

use super::alarm::Alarm;
use super::checkpoint::{Folding, SetPlace};
use super::format::{
    ALARM_OFFSET, FLAG_CLEAN, MAGIC, MAGIC_WRITING, Operation, PAGE_BYTES, RECORD_BLOCKS_MAX,
    Record, SetDescriptor, Slot, Superblock,
};
use super::mapping::SharedWords;
use super::ring::Ring;
use super::state::EpochState;
use super::witness::{Moment, Witness};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::{Epoch, Extent};
use crate::failpoint::{Place, reached};

/// Past this share of the ring, in percent, the oldest records are folded.
const FOLD_ABOVE_PERCENT: u64 = 70;
/// Folding goes on down to this share.
const FOLD_DOWN_TO_PERCENT: u64 = 50;

/// A word of the superblock that stands between those that change.
const SUPERBLOCK_MIDDLE_WORD: usize = std::mem::offset_of!(Superblock, resync) / 8;

/// The superblock as last published, and which copy holds it.
pub(super) struct Published {
    pub(super) superblock: Superblock,
    copy: usize,
}

/// The journal of one disk, locked by its tracker.
pub struct Journal {
    path: PathBuf,
    pub(super) file: Flock<File>,
    words: SharedWords,
    ring: Ring,
    published: Mutex<Published>,
    sync_failed: AtomicBool,
    folds: AtomicU64,
    folded: AtomicU64,
    written: AtomicU64,
    #[cfg(test)]
    failing: AtomicBool,
}

impl Journal {
    /// A journal over a file that recovery has checked; `copy` is the superblock that counts.
    pub(super) fn new(
        path: PathBuf,
        file: Flock<File>,
        words: SharedWords,
        superblock: Superblock,
        copy: usize,
        head: u64,
    ) -> Self {
        let first_word = superblock.ring_offset.get() as usize / 8;
        let ring = Ring::new(
            first_word,
            superblock.ring_records.get(),
            superblock.ring_tail.get(),
            head,
        );
        Self {
            path,
            file,
            words,
            ring,
            published: Mutex::new(Published { superblock, copy }),
            sync_failed: AtomicBool::new(false),
            folds: AtomicU64::new(0),
            folded: AtomicU64::new(0),
            written: AtomicU64::new(0),
            #[cfg(test)]
            failing: AtomicBool::new(false),
        }
    }

    /// Path of the file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Positions of the ring.
    pub fn ring(&self) -> &Ring {
        &self.ring
    }

    /// Times that records were folded since the journal was opened.
    pub fn folds(&self) -> u64 {
        self.folds.load(Ordering::Relaxed)
    }

    /// Records folded since the journal was opened.
    pub fn records_folded(&self) -> u64 {
        self.folded.load(Ordering::Relaxed)
    }

    /// Records written since the journal was opened.
    pub fn records_written(&self) -> u64 {
        self.written.load(Ordering::Relaxed)
    }

    /// Fills a hole that a dead writer left, or tells of a change at recovery.
    pub(super) fn fill(&self, record: Record) {
        self.ring.fill(self.words.words(), record);
    }

    /// Records that blocks change in this epoch. Takes no lock and allocates nothing. If the ring
    /// is full, every block counts as changed as of this epoch.
    pub fn record(&self, epoch: Epoch, extent: Extent, operation: Operation) {
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
            if !self.ring.append(self.words.words(), record) {
                reached(Place::RecordAfterRefusalBeforeAlarm);
                self.raise_alarm(epoch);
                return;
            }
            self.written.fetch_add(1, Ordering::Relaxed);
            first_block += block_count;
        }
    }

    /// The disk is about to change. Called before that is recorded, or submitted without a record.
    pub fn stir(&self) {
        Witness::of(&self.words).stir();
    }

    /// Keeps the disk's times as they were when they were looked at a moment ago.
    pub fn keep_time(&self, seen: Moment) {
        Witness::of(&self.words).keep(seen);
    }

    /// Makes every block count as changed as of this epoch.
    pub fn raise_alarm(&self, epoch: Epoch) {
        Alarm::of(&self.words).raise(epoch);
    }

    /// Prepares the end of an epoch: the alarms of those that are captured with it become its own.
    /// Called before writes are stamped with a next one; no write of the one before it may be in
    /// flight.
    pub fn gather_alarms(&self, closing: Epoch) {
        Alarm::of(&self.words).gather(self.watermarks().sealed, closing);
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Published> {
        self.published
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The watermarks as the superblock holds them.
    pub fn watermarks(&self) -> EpochState {
        EpochState::of(&self.lock().superblock)
    }

    /// The watermarks; `resync` includes the latest alarm.
    pub fn state(&self) -> EpochState {
        let mut state = self.watermarks();
        let latest = Alarm::of(&self.words).latest().unwrap_or_default();
        state.resync = state.resync.max(latest);
        state
    }

    /// Calls with the extents of all records after an epoch, some of them more than once. Reads the
    /// live part of the ring alone. Nothing may be recorded meanwhile.
    ///
    /// # Errors
    ///
    /// A checkpoint cannot be read.
    pub fn each_extent_after(&self, epoch: Epoch, mut visit: impl FnMut(Extent)) -> Result<()> {
        for sequence in self.ring.tail()..self.ring.head() {
            if let Slot::Whole(record) = self.ring.read(self.words.words(), sequence)
                && record.operation != Operation::Null
                && record.epoch > epoch
            {
                visit(Extent {
                    first_block: record.first_block,
                    block_count: record.block_count,
                });
            }
        }
        let superblock = self.lock().superblock;
        for (index, set) in superblock.sets.iter().enumerate() {
            if set.highest_epoch.get() <= epoch.0 {
                continue;
            }
            let place = SetPlace::of(&superblock, index);
            place
                .each_extent(&self.file, set.generation.get(), &mut visit)
                .map_err(|error| {
                    let path = self.path.display();
                    Error::io(format!("Cannot read a checkpoint of journal {path}"), error)
                })?;
        }
        Ok(())
    }

    /// Random number of this journal, as 32 hexadecimal digits.
    pub fn id(&self) -> String {
        uuid::Uuid::from_bytes(self.lock().superblock.journal_id)
            .simple()
            .to_string()
    }

    /// Pages that are set in the checkpoint sets: none, one or both of them are in use.
    pub fn sets_in_use(&self) -> u64 {
        let published = self.lock();
        published
            .superblock
            .sets
            .iter()
            .filter(|set| set.highest_epoch.get() != 0)
            .count() as u64
    }

    /// Changes the watermarks, publishes them, frees what is committed, and syncs the superblock.
    ///
    /// # Errors
    ///
    /// The sync fails; the change stands for every crash but a power cut.
    pub fn update(&self, change: impl FnOnce(&mut EpochState)) -> Result<()> {
        let mut published = self.lock();
        let mut superblock = published.superblock;
        let mut state = EpochState::of(&superblock);
        change(&mut state);
        state.store(&mut superblock);
        let tail = self.first_needed(self.ring.tail(), state.committed);
        superblock.ring_tail = tail.into();
        let mut dropped = Vec::new();
        for (index, set) in superblock.sets.iter_mut().enumerate() {
            let highest = set.highest_epoch.get();
            if highest != 0 && highest <= state.committed.0 {
                set.generation = (set.generation.get() + 1).into();
                set.highest_epoch = 0.into();
                set.lowest_epoch = 0.into();
                dropped.push(index);
            }
        }
        self.publish(&mut published, superblock);
        self.ring.set_tail(tail);
        reached(Place::UpdateAfterPublishBeforeAlarm);
        Alarm::of(&self.words).clear(state.committed);
        reached(Place::UpdateAfterAlarmBeforePunch);
        for set in dropped {
            // Pages of an old generation count for nothing; they only take room.
            if let Err(errno) = SetPlace::of(&superblock, set).punch(&self.file) {
                tracing::warn!(
                    "Cannot free a checkpoint of {}: {errno}",
                    self.path.display()
                );
            }
        }
        reached(Place::UpdateAfterPunchBeforeSync);
        self.sync_superblock(&published)
    }

    /// Makes the copy durable that counts. Each time, also where nobody waits for it: otherwise the
    /// next update would rewrite the last copy that is.
    pub(super) fn sync_superblock(&self, published: &Published) -> Result<()> {
        let offset = published.copy as u64 * PAGE_BYTES as u64;
        self.sync(&published.superblock, offset, PAGE_BYTES as u64)
    }

    fn sync(&self, superblock: &Superblock, offset: u64, length_bytes: u64) -> Result<()> {
        self.sync_words(offset, length_bytes)
            .map_err(|error| self.distrust_sync(superblock, error))
    }

    /// Makes the whole file durable, its length included.
    pub(super) fn sync_file(&self, superblock: &Superblock) -> Result<()> {
        self.file
            .sync_all()
            .map_err(|error| self.distrust_sync(superblock, error))
    }

    /// What a failed sync means: nothing that should have become durable is believed.
    fn distrust_sync(&self, superblock: &Superblock, error: std::io::Error) -> Error {
        self.sync_failed.store(true, Ordering::Release);
        let state = EpochState::of(superblock);
        for epoch in [Some(state.open), state.closed].into_iter().flatten() {
            self.raise_alarm(epoch);
        }
        let path = self.path.display();
        Error::io(format!("Cannot sync journal {path}"), error)
    }

    fn sync_words(&self, offset: u64, length_bytes: u64) -> std::io::Result<()> {
        #[cfg(test)]
        if self.failing.load(Ordering::Acquire) {
            return Err(std::io::Error::from_raw_os_error(libc::EIO));
        }
        self.words.sync(offset, length_bytes)
    }

    /// Makes every sync and every fold fail from now on, or succeed again.
    #[cfg(test)]
    pub(crate) fn set_failing(&self, failing: bool) {
        self.failing.store(failing, Ordering::Release);
    }

    /// The first sequence from `tail` on whose record is of a later epoch, or not written yet.
    fn first_needed(&self, mut tail: u64, committed: Epoch) -> u64 {
        let head = self.ring.head();
        while tail < head {
            match self.ring.read(self.words.words(), tail) {
                Slot::Whole(record)
                    if record.sequence == tail
                        && (record.epoch <= committed || record.operation == Operation::Null) =>
                {
                    tail += 1;
                }
                _ => break,
            }
        }
        tail
    }

    pub(super) fn publish(&self, published: &mut Published, mut superblock: Superblock) {
        superblock.sequence = (published.superblock.sequence.get() + 1).into();
        superblock.seal();
        let copy = 1 - published.copy;
        let words = self.words.words();
        let first = copy * PAGE_BYTES / 8;
        let load = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().unwrap_or_default());
        words[first].store(u64::from_le_bytes(MAGIC_WRITING), Ordering::Relaxed);
        fence(Ordering::SeqCst);
        reached(Place::PublishAfterMarkBeforeWords);
        for (index, chunk) in superblock.as_bytes().chunks_exact(8).enumerate().skip(1) {
            words[first + index].store(load(chunk), Ordering::Relaxed);
            if index == SUPERBLOCK_MIDDLE_WORD {
                reached(Place::PublishAmidWords);
            }
        }
        fence(Ordering::SeqCst);
        reached(Place::PublishAfterWordsBeforeMagic);
        words[first].store(u64::from_le_bytes(MAGIC), Ordering::Release);
        published.superblock = superblock;
        published.copy = copy;
    }

    /// Folds the oldest records into a checkpoint set if the ring is filling up.
    ///
    /// # Errors
    ///
    /// The checkpoint cannot be written. The ring goes on; when it is full the alarm keeps
    /// coverage.
    pub fn maintain(&self) -> Result<()> {
        let capacity = self.ring.capacity();
        if self.ring.used() * 100 <= capacity * FOLD_ABOVE_PERCENT {
            return Ok(());
        }
        let mut published = self.lock();
        while self.ring.used() * 100 > capacity * FOLD_DOWN_TO_PERCENT {
            if self.fold_some(&mut published)? == 0 {
                break;
            }
        }
        Ok(())
    }

    /// Folds as many records as memory allows, and none that is later than the first of them:
    /// epochs that are folded together can only be dropped together, and with a guest that goes on
    /// writing each would drag the next one along. Returns their number.
    fn fold_some(&self, published: &mut Published) -> Result<u64> {
        let mut superblock = published.superblock;
        let committed = Epoch(superblock.committed.get());
        let start = self.ring.tail();
        let limit = self.ring.head().min(start + self.ring.capacity() / 4);
        let mut folding = Folding::default();
        let (mut lowest, mut highest) = (u64::MAX, 0);
        let mut tail = start;
        while tail < limit && !folding.is_full() {
            let Slot::Whole(record) = self.ring.read(self.words.words(), tail) else {
                break;
            };
            if record.sequence != tail {
                break;
            }
            if record.operation != Operation::Null && record.epoch > committed {
                if highest != 0 && record.epoch.0 > highest {
                    break;
                }
                let end = record.first_block + record.block_count;
                lowest = lowest.min(record.epoch.0);
                highest = highest.max(record.epoch.0);
                if folding.add(record.first_block, end) < end {
                    break;
                }
            }
            tail += 1;
        }
        if tail == start {
            return Ok(0);
        }
        if highest != 0 {
            let index = choose_set(&superblock, lowest);
            let set = &mut superblock.sets[index];
            let place = SetPlace::of(&published.superblock, index);
            self.write_checkpoint(&mut folding, place, set)
                .map_err(|error| {
                    Error::io(
                        format!(
                            "Cannot write a checkpoint into {}: free some space",
                            self.path.display()
                        ),
                        error,
                    )
                })?;
            let previous = set.lowest_epoch.get();
            set.lowest_epoch = if previous == 0 {
                lowest
            } else {
                previous.min(lowest)
            }
            .into();
            set.highest_epoch = set.highest_epoch.get().max(highest).into();
        }
        superblock.ring_tail = tail.into();
        reached(Place::FoldAfterPagesBeforePublish);
        self.publish(published, superblock);
        reached(Place::FoldAfterPublishBeforeTail);
        self.ring.set_tail(tail);
        self.folds.fetch_add(1, Ordering::Relaxed);
        self.folded.fetch_add(tail - start, Ordering::Relaxed);
        self.sync_superblock(published)?;
        Ok(tail - start)
    }

    fn write_checkpoint(
        &self,
        folding: &mut Folding,
        place: SetPlace,
        set: &SetDescriptor,
    ) -> std::io::Result<u64> {
        #[cfg(test)]
        if self.failing.load(Ordering::Acquire) {
            return Err(std::io::Error::from_raw_os_error(libc::ENOSPC));
        }
        folding.write(&self.file, place, set)
    }

    /// Syncs everything and marks the journal clean. Nothing may be recorded any more, the disk has
    /// been synced, and its last times are kept.
    ///
    /// # Errors
    ///
    /// This sync or an earlier one failed; the journal then stays unclean.
    pub fn close(&self) -> Result<()> {
        let failed = |error| Error::io(format!("Cannot sync {}", self.path.display()), error);
        let mut published = self.lock();
        let mut superblock = published.superblock;
        self.sync(&superblock, 0, superblock.head_bytes())?;
        self.file.sync_all().map_err(failed)?;
        if self.sync_failed.load(Ordering::Acquire) {
            return Err(Error::new(
                ErrorKind::State,
                format!(
                    "Journal {} is not marked clean, because a sync of it has failed",
                    self.path.display()
                ),
            ));
        }
        superblock.flags = FLAG_CLEAN.into();
        reached(Place::CloseAfterSyncBeforePublish);
        self.publish(&mut published, superblock);
        self.sync(&superblock, 0, ALARM_OFFSET)?;
        self.file.sync_all().map_err(failed)
    }
}

/// The set that takes records of `lowest` and later epochs: an empty one, so that what is already
/// in use can be dropped by an earlier commit; where none is empty, the one that waits longer.
fn choose_set(superblock: &Superblock, lowest: u64) -> usize {
    let highest = [0, 1].map(|index: usize| superblock.sets[index].highest_epoch.get());
    match highest {
        [0, 0] => 0,
        [first, 0] => usize::from(first < lowest),
        [0, second] => usize::from(second >= lowest),
        [first, second] => usize::from(second > first),
    }
}

/// The error for a journal that must not be trusted.
pub(super) fn distrusted(kind: ErrorKind, path: &Path, what: &str) -> Error {
    Error::new(
        kind,
        format!(
            "Journal {}: {what}: start again with --resync to set it aside and have every block \
             checked by fingerprints",
            path.display()
        ),
    )
}
