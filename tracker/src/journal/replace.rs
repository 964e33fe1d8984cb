//! Another file in the place of a journal whose storage failed, under the workers that write to it.
//!
//! Overview: after a sync that failed nobody knows which pages are durable, and the kernel may drop those
//! that it could not write. So the journal is made anew in another file, from what is in memory and what
//! was durable, and takes the place of the old one by a rename.
//!
//! Order, under both mutexes:
//!
//! 1. A new file with the present superblock, an empty ring, the pages of the sets and an intent log that
//!    tells the present table; it is synced. Then workers record in both.
//! 2. The alarm, the overflow bits and the records of the old ring are copied.
//! 3. Regions that were marked since the last good sync are suspect: their records may be lost. Each
//!    counts as changed in the open and in the closed epoch, and in one that a cut is about to open;
//!    fingerprints tell what really did.
//! 4. The file is synced.
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
use std::path::PathBuf;
use std::sync::atomic::{Ordering, fence};

use super::checkpoint::{SetPlace, copy_pages};
use super::core::Core;
use super::create::{self, sync_folder};
use super::format::{FLAG_DISK_FAILED, FLAG_REPLACED, Operation, Slot, Superblock};
use super::intent::{IntentLog, IntentPlace, extent_of};
use super::mapping::SharedWords;
use super::update::publish;
use super::writer::{Journal, Published};
use crate::error::{Error, Result};
use crate::extent::{Extent, blocks_of};
use crate::failpoint::{self, Place, reached};
use crate::lock::lock_exclusive;

impl Journal {
    /// Puts another file in the place of this one.
    ///
    /// # Errors
    ///
    /// It cannot be made; the old one stays in use.
    pub(super) fn replace(&self, published: &mut Published) -> Result<()> {
        let mut intents = self.lock_intents();
        let failed = |error| {
            let path = self.path().display();
            let what = format!("Cannot put a new journal in the place of {path}: free some space?");
            Error::io(what, error)
        };
        let unused = self.others.iter().position(|other| other.get().is_none());
        let slot = unused.ok_or_else(|| failed(io::ErrorKind::QuotaExceeded.into()))?;
        let ended = self.regions.end_era();
        let (new, log) = self.prepare(published, &intents).map_err(|error| {
            // It would take room that somebody needs.
            let _not_there = std::fs::remove_file(self.temporary());
            failed(error)
        })?;
        let superblock = new.1;
        let core = self.others[slot].get_or_init(|| new.0);
        let begun = self.current.load(Ordering::Acquire);
        self.latest.store(slot + 1, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        reached(Place::ReplaceAfterBothBeforeCopy);
        if let Err(error) = self.complete(core, &superblock, &intents) {
            self.latest.store(begun, Ordering::SeqCst);
            // It has no name that counts.
            let _not_there = std::fs::remove_file(self.temporary());
            return Err(failed(error));
        }
        reached(Place::ReplaceAfterRenameBeforeSwitch);
        *intents = log;
        let old = std::mem::replace(
            published,
            Published {
                superblock,
                copy: 0,
            },
        );
        self.current.store(slot + 1, Ordering::SeqCst);
        // Until the folder is synced a power cut may bring the old file back, in which the set of armed
        // regions is what it was; so nothing may leave the set before, and its superblocks stay whole.
        reached(Place::ReplaceAfterSwitchBeforeFolder);
        let durable = failpoint::attempt(Place::ReplaceAfterSwitchBeforeFolder, &core.file)
            .and_then(|()| sync_folder(self.path()));
        mark_replaced(self.core_at(begun), old);
        if let Err(error) = durable {
            // Whatever failed before: until a file has a durable name, nothing in it is.
            self.sync_failed.store(true, Ordering::Release);
            return Err(failed(error));
        }
        self.regions.set_durable(ended);
        self.sync_failed.store(false, Ordering::Release);
        self.counters.replacements.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn temporary(&self) -> PathBuf {
        self.path().with_added_extension("new")
    }

    /// A new file with what changes under the mutexes alone: superblock, pages of the sets, table of the
    /// intent log. Nobody knows of it yet, so an attempt that fails here costs nothing.
    fn prepare(
        &self,
        published: &Published,
        intents: &IntentLog,
    ) -> io::Result<((Core, Superblock), IntentLog)> {
        #[cfg(test)]
        if self.failing.load(Ordering::Acquire) {
            return Err(io::Error::other("replacing fails in this test"));
        }
        let mut superblock = published.superblock;
        superblock.sequence = (superblock.sequence.get() + 1).into();
        superblock.ring_tail = 1.into();
        superblock.seal();
        let temporary = self.temporary();
        let file = create::write_file(&temporary, &superblock)?;
        let words = SharedWords::writable(&file, superblock.head_bytes())?;
        let file = lock_exclusive(file).map_err(io::Error::from)?;
        let core = Core::new(file, words, &superblock, 1);
        for (index, set) in superblock.sets.iter().enumerate() {
            if set.highest_epoch.get() != 0 {
                let place = SetPlace::of(&superblock, index);
                let generation = set.generation.get();
                copy_pages((&self.core().file, place), (&core.file, place), generation)?;
            }
        }
        let log = intents.moved_to(&temporary, IntentPlace::of(&superblock))?;
        core.sync_all()?;
        Ok(((core, superblock), log))
    }

    /// Brings the rest into a new file and gives it the name of the journal.
    fn complete(&self, new: &Core, superblock: &Superblock, intents: &IntentLog) -> io::Result<()> {
        self.copy_records(new, superblock, intents);
        new.sync_all()?;
        reached(Place::ReplaceAfterCopyBeforeRename);
        failpoint::attempt(Place::ReplaceAfterCopyBeforeRename, &new.file)?;
        std::fs::rename(self.temporary(), self.path())
    }

    /// Copies what workers may be adding to, who record in both files by now.
    fn copy_records(&self, new: &Core, superblock: &Superblock, intents: &IntentLog) {
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
        let epochs = self.epochs_at_work(superblock);
        if self.regions.has_uncovered() {
            // Its record may be in a page that was dropped, and it will go on.
            epochs.iter().for_each(|&epoch| new.alarm().raise(epoch));
        }
        let blocks = blocks_of(superblock.disk_size_bytes.get());
        for region in intents
            .regions()
            .filter(|&region| self.regions.is_fresh(region))
        {
            let mut extent = extent_of(region);
            extent.block_count = extent
                .block_count
                .min(blocks.saturating_sub(extent.first_block));
            for &epoch in &epochs {
                if extent.block_count > 0 {
                    new.record(epoch, extent, Operation::Write);
                }
            }
        }
    }
}

/// Tells readers of the old file, which has no name any more, that it is not the journal. Its superblocks
/// are stored in place, both of them, so that none is left that says otherwise.
fn mark_replaced(old: &Core, mut published: Published) {
    let mut superblock = published.superblock;
    superblock.flags = (superblock.flags.get() & FLAG_DISK_FAILED | FLAG_REPLACED).into();
    for _ in 0..2 {
        publish(old, &mut published, superblock);
    }
}
