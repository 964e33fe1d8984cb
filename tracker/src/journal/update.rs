//! The superblock of a journal: watermarks moved, published, made durable; the clean end.
//!
//! Order: a superblock is published by rewriting the copy that does not count: its magic is replaced by
//! a mark, its other words are stored, its magic last; then it is synced. What it does not need any more
//! is given up only when it is durable: slots of the ring, pages of sets, the alarm.
//!
//! Crash consistency: after SIGKILL one copy is whole, and one in rewriting carries the mark. After a
//! power cut the copy that was synced last is whole, because the next update rewrites the other one.
//!
//! A sync that failed is believed never again: the kernel calls pages clean that it could not write, and
//! may drop them. Another file takes the place of this one (`replace`); if that fails too, every block
//! counts as changed, and the journal is not marked clean any more.

use std::sync::PoisonError;
use std::sync::atomic::{Ordering, fence};

use zerocopy::IntoBytes;

use super::checkpoint::SetPlace;
use super::core::Core;
use super::format::{
    FLAG_CLEAN, FLAG_DISK_FAILED, MAGIC, MAGIC_WRITING, Operation, PAGE_BYTES, Slot, Superblock,
};
use super::state::EpochState;
use super::writer::{Journal, Published};
use crate::error::{Error, Result};
use crate::extent::Epoch;
use crate::failpoint::{self, Canary, Place, canary, reached};

/// A word of the superblock that stands between those that change.
const SUPERBLOCK_MIDDLE_WORD: usize = std::mem::offset_of!(Superblock, resync) / 8;

impl Journal {
    /// Changes the watermarks, publishes and syncs them, and frees what is committed.
    ///
    /// # Errors
    ///
    /// The sync fails; the change stands for every crash but a power cut.
    pub fn update(&self, change: impl FnOnce(&mut EpochState)) -> Result<()> {
        let mut published = self.lock();
        // If another file takes its place below, that one has tail and pages of its own.
        let core = self.core();
        let mut superblock = published.superblock;
        let mut state = EpochState::of(&superblock);
        change(&mut state);
        state.store(&mut superblock);
        let tail = first_needed(core, state.committed);
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
        reached(Place::UpdateAfterPublishBeforeSync);
        let result = failpoint::attempt(Place::UpdateAfterPublishBeforeSync, &core.file)
            .and_then(|()| self.try_sync(Core::sync));
        self.make_up(&mut published, result)?;
        reached(Place::UpdateAfterSyncBeforeTail);
        core.ring.set_tail(tail);
        self.core().alarm().clear(state.committed);
        reached(Place::UpdateAfterAlarmBeforePunch);
        for set in dropped {
            // Pages of an old generation count for nothing; they only take room.
            if let Err(errno) = SetPlace::of(&superblock, set).punch(&core.file) {
                let path = self.path().display();
                tracing::warn!("Cannot free a checkpoint of {path}: {errno}");
            }
        }
        Ok(())
    }

    /// Changes the superblock otherwise than by an update of the watermarks.
    ///
    /// # Errors
    ///
    /// The sync fails.
    pub(super) fn rewrite(&self, change: impl FnOnce(&mut Superblock)) -> Result<()> {
        let mut published = self.lock();
        let mut superblock = published.superblock;
        change(&mut superblock);
        self.publish(&mut published, superblock);
        self.sync_published(&mut published)
    }

    /// A sync of the disk failed: after a power cut nothing is known of it.
    ///
    /// # Errors
    ///
    /// The sync of the journal fails.
    pub fn note_disk_failure(&self) -> Result<()> {
        self.rewrite(|superblock| superblock.flags = FLAG_DISK_FAILED.into())
    }

    /// Makes the superblock durable that was published, and all that was stored before. Each time, also
    /// where nobody waits for it: otherwise the next update would rewrite the last copy that is.
    ///
    /// # Errors
    ///
    /// It cannot be done, nor could another file take the place of this one.
    pub(super) fn sync_published(&self, published: &mut Published) -> Result<()> {
        let result = self.try_sync(Core::sync);
        self.make_up(published, result)
    }

    /// Makes the whole file durable, its length included.
    ///
    /// # Errors
    ///
    /// It cannot be done.
    pub(super) fn sync_length(&self, published: &mut Published) -> Result<()> {
        let result = self.try_sync(Core::sync_all);
        self.make_up(published, result)
    }

    /// Syncs the file in use. One at a time, and none after one that failed: the kernel tells of a failure
    /// once, and the next sync succeeds over what was lost.
    fn try_sync(&self, sync: fn(&Core) -> std::io::Result<()>) -> std::io::Result<()> {
        let _one = self.syncing.lock().unwrap_or_else(PoisonError::into_inner);
        if self.has_failed() {
            return Err(std::io::Error::other("an earlier sync failed"));
        }
        #[cfg(test)]
        let sync = match self.failing.load(Ordering::Acquire) {
            true => |_: &Core| Err(std::io::Error::from_raw_os_error(libc::EIO)),
            false => sync,
        };
        let core = self.core();
        let result = sync(core);
        if result.is_err() {
            core.set_doubt();
            self.sync_failed.store(true, Ordering::Release);
        }
        result
    }

    /// After a sync that failed, puts another file in the place of this one. If that fails, nothing is
    /// believed that should have become durable.
    fn make_up(&self, published: &mut Published, result: std::io::Result<()>) -> Result<()> {
        let Err(error) = result else { return Ok(()) };
        let path = self.path().display();
        tracing::error!("Cannot sync journal {path}: {error}; another file takes its place");
        self.sync_failed.store(true, Ordering::Release);
        match self.replace(published) {
            Ok(()) => Ok(()),
            Err(replacing) => {
                tracing::error!("{}", replacing.chain());
                for epoch in self.epochs_at_work(&published.superblock) {
                    self.raise_alarm(epoch);
                }
                Err(Error::io(format!("Cannot sync journal {path}"), error))
            }
        }
    }

    /// Epochs in which something may have been recorded that is not sealed: the closed one, the open one,
    /// and one that a cut is about to open.
    pub(super) fn epochs_at_work(&self, superblock: &Superblock) -> Vec<Epoch> {
        let state = EpochState::of(superblock);
        let upcoming = Epoch(self.upcoming.load(Ordering::SeqCst));
        let upcoming = Some(upcoming).filter(|&epoch| epoch > state.open);
        [state.closed, Some(state.open), upcoming]
            .into_iter()
            .flatten()
            .collect()
    }

    /// Syncs the ring and all else, and notes what is durable by that. Writes go on meanwhile.
    ///
    /// # Errors
    ///
    /// The sync fails, and no other file can take the place of this one.
    pub fn sync_ring(&self) -> Result<()> {
        let ended = self.regions.end_era();
        if canary(Canary::WatermarkBeforeSync) {
            self.regions.set_durable(ended);
        }
        reached(Place::SyncAfterEraBeforeStores);
        if let Err(error) = self.try_sync(Core::sync) {
            let mut published = self.lock();
            return self.make_up(&mut published, Err(error));
        }
        reached(Place::SyncAfterDurableBeforeMark);
        self.regions.set_durable(ended);
        self.counters.syncs.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    pub(super) fn publish(&self, published: &mut Published, superblock: Superblock) {
        if self.has_failed() {
            // What was published last never became durable. It is rewritten, and the other copy, which is
            // the last one that did, stays as it is.
            published.copy = 1 - published.copy;
        }
        publish(self.core(), published, superblock);
    }

    /// Syncs everything and marks the journal clean. Nothing may be recorded any more, the disk has
    /// been synced, and its last times are kept.
    ///
    /// # Errors
    ///
    /// This sync or an earlier one failed, and no other file can take the place of this one; the journal then
    /// stays unclean.
    pub fn close(&self) -> Result<()> {
        let mut published = self.lock();
        self.sync_length(&mut published)?;
        self.sync_published(&mut published)?;
        let mut superblock = published.superblock;
        superblock.flags = (superblock.flags.get() & FLAG_DISK_FAILED | FLAG_CLEAN).into();
        reached(Place::CloseAfterSyncBeforePublish);
        self.publish(&mut published, superblock);
        self.sync_published(&mut published)
    }
}

/// Rewrites the copy that does not count.
pub(super) fn publish(core: &Core, published: &mut Published, mut superblock: Superblock) {
    superblock.sequence = (published.superblock.sequence.get() + 1).into();
    superblock.seal();
    let copy = 1 - published.copy;
    let words = core.words.words();
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

/// The first sequence of a ring whose record is of a later epoch, or not written yet.
fn first_needed(core: &Core, committed: Epoch) -> u64 {
    let (mut tail, head) = (core.ring.tail(), core.ring.head());
    while tail < head {
        match core.ring.read(core.words.words(), tail) {
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
