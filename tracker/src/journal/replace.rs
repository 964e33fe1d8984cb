//! Another file in the place of a journal whose storage failed, under the workers that write to it.
//!
//! Overview: after a sync that failed nobody knows which pages are durable, and the kernel may drop those
//! that it could not write. So the journal is made anew in another file, from what is in memory and what
//! was durable, and takes the place of the old one by a rename.
//!
//! Order, under both mutexes:
//!
//! 1. A new file with the present superblock and an empty ring. From here on workers record in both.
//! 2. The alarm, the overflow bits, the records of the old ring and the pages of the sets are copied.
//! 3. Regions that were marked since the last good sync are suspect: their records may be lost. Each
//!    counts as changed in the open and in the closed epoch; fingerprints tell what really did.
//! 4. The file is synced; its intent log tells the present table.
//! 5. The rename, and a sync of the folder. The old superblocks are marked, so that readers open the new
//!    file.
//!
//! Crash consistency: before the rename the old file counts. After SIGKILL it is complete in the page
//! cache. After a power cut it holds what was durable, and its intent log all regions that may have
//! changed since, because none leaves the set without a sync that succeeds.
//!
//! What it does not handle: a folder in which nothing can be written. Then the old file stays, and the
//! caller says so.

use std::io;
use std::sync::atomic::Ordering;

use super::checkpoint::{SetPlace, copy_pages};
use super::core::Core;
use super::create::{self, sync_folder};
use super::format::{FLAG_REPLACED, Operation, Slot, Superblock};
use super::intent::{IntentLog, IntentPlace, extent_of};
use super::mapping::SharedWords;
use super::recovery::lock;
use super::state::EpochState;
use super::writer::{Journal, Published};
use crate::error::{Error, Result};
use crate::extent::{Extent, blocks_of};
use crate::failpoint::{Place, reached};

impl Journal {
    /// Puts another file in the place of this one.
    ///
    /// # Errors
    ///
    /// It cannot be made; the old one stays in use.
    pub(super) fn replace(&self, published: &mut Published) -> Result<()> {
        #[cfg(test)]
        if self.failing.load(Ordering::Acquire) {
            return Err(Error::io(
                "Replacing fails in this test",
                io::Error::other("as told"),
            ));
        }
        let mut intents = self.lock_intents();
        let failed = |error| {
            let path = self.path().display();
            let what = format!("Cannot put a new journal in the place of {path}: free some space?");
            Error::io(what, error)
        };
        // The one after those that were used, or after one that was begun and given up.
        let Some(slot) = self.others.iter().position(|other| other.get().is_none()) else {
            return Err(failed(io::ErrorKind::QuotaExceeded.into()));
        };
        let mut superblock = published.superblock;
        superblock.sequence = (superblock.sequence.get() + 1).into();
        superblock.ring_tail = 1.into();
        superblock.seal();
        let temporary = self.path().with_added_extension("new");
        let ended = self.regions.end_era();
        let file = create::write_file(&temporary, &superblock).map_err(failed)?;
        let words = SharedWords::writable(&file, superblock.head_bytes()).map_err(failed)?;
        let core = Core::new(lock(file, &temporary)?, words, &superblock, 1);
        let _was_empty = self.others[slot].set(core);
        let begun = self.current.load(Ordering::Acquire);
        self.latest.store(slot + 1, Ordering::SeqCst);
        std::sync::atomic::fence(Ordering::SeqCst);
        reached(Place::ReplaceAfterBothBeforeCopy);
        let place = IntentPlace::of(&superblock);
        let moved = self.others[slot]
            .get()
            .map_or(Err(io::ErrorKind::NotFound.into()), |new| {
                self.fill_new(new, &superblock, &intents)?;
                let log = intents.moved_to(&temporary, place)?;
                reached(Place::ReplaceAfterCopyBeforeRename);
                std::fs::rename(&temporary, self.path())?;
                Ok(log)
            });
        let log = match moved {
            Ok(log) => log,
            Err(error) => {
                self.latest.store(begun, Ordering::SeqCst);
                // It has no name that counts.
                let _not_there = std::fs::remove_file(&temporary);
                return Err(failed(error));
            }
        };
        reached(Place::ReplaceAfterRenameBeforeSwitch);
        *intents = log;
        self.mark_replaced(published);
        *published = Published {
            superblock,
            copy: 0,
        };
        self.current.store(slot + 1, Ordering::SeqCst);
        // Until the folder is synced a power cut may bring the old file back, in which the set of armed
        // regions is what it was; so nothing may leave the set before.
        sync_folder(self.path()).map_err(failed)?;
        self.regions.set_durable(ended);
        self.sync_failed.store(false, Ordering::Release);
        self.counters.replacements.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// Brings into a new file what the present one knows.
    fn fill_new(&self, new: &Core, superblock: &Superblock, intents: &IntentLog) -> io::Result<()> {
        let old = self.core();
        new.alarm().absorb(old.alarm());
        new.overflow().absorb(old.overflow());
        for sequence in old.ring.tail()..old.ring.head() {
            // A writer that is at work there records in the new file as well.
            if let Slot::Whole(record) = old.ring.read(old.words.words(), sequence)
                && record.operation != Operation::Null
            {
                let extent = Extent {
                    first_block: record.first_block,
                    block_count: record.block_count,
                };
                new.record(record.epoch, extent, record.operation);
            }
        }
        for (index, set) in superblock.sets.iter().enumerate() {
            if set.highest_epoch.get() != 0 {
                let place = SetPlace::of(superblock, index);
                copy_pages((&old.file, place), (&new.file, place), set.generation.get())?;
            }
        }
        let state = EpochState::of(superblock);
        let blocks = blocks_of(superblock.disk_size_bytes.get());
        for region in intents
            .regions()
            .filter(|&region| self.regions.is_fresh(region))
        {
            let mut extent = extent_of(region);
            extent.block_count = extent
                .block_count
                .min(blocks.saturating_sub(extent.first_block));
            for epoch in [Some(state.open), state.closed].into_iter().flatten() {
                if extent.block_count > 0 {
                    new.record(epoch, extent, Operation::Write);
                }
            }
        }
        new.sync_all()
    }

    /// Tells readers of the old file, which has no name any more, that it is not the journal.
    fn mark_replaced(&self, published: &Published) {
        let mut superblock = published.superblock;
        superblock.flags = FLAG_REPLACED.into();
        let mut last = Published {
            superblock,
            copy: published.copy,
        };
        // Both copies, so that none is left that says otherwise.
        for _ in 0..2 {
            self.publish(&mut last, superblock);
        }
    }
}
