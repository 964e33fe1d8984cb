//! A journal made to fit a disk that has grown, in place and under its workers.
//!
//! Overview: everything that workers hold, which is alarm and ring, stays where it is. Only the
//! checkpoint sets depend on the size of the disk; they are used under the mutex and by readers that
//! look at the superblock. Where they lack room they move behind the end of the file.
//!
//! Order, all under the mutex, so that nothing is folded meanwhile:
//!
//! 1. Sets that are too small are copied to a larger place; the file is synced; a superblock of
//!    that names the place is published and synced; the old place is punched out.
//! 2. The record of what is new stands in the ring, durably.
//! 3. The superblock with the larger size is published and synced.
//!
//! Crash consistency: before step 3 the journal is one of the smaller disk, and recovery grows it
//! again. A second record of the same blocks is harmless. Were the size published first, a kill
//! before the record would leave a journal that fits and does not know what is new. The old place
//! counts until a superblock names the new one, whose pages are of the same generation; what was
//! copied and is not named is cut off by recovery.
//!
//! What it does not handle: the disk itself, which is larger, durably, before this is called, and
//! shows its size to clients only afterwards.

use std::fs::File;
use std::io;

use super::checkpoint::{SetPlace, copy_pages};
use super::create::check_trackable;
use super::format::{
    CHECKPOINT_OFFSET_MAX, Operation, Superblock, checkpoint_pages_of, checkpoint_room_of,
};
use super::writer::{Journal, Published};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::{Epoch, Extent};
use crate::failpoint::{self, Place, reached};

impl Journal {
    /// Makes this a journal of a disk of so many bytes, in which everything behind the old end
    /// counts as changed in `epoch`, the open one. May be repeated.
    ///
    /// # Errors
    ///
    /// The disk is smaller than the journal says, or too large to be tracked, or the journal cannot
    /// be written; then it is still one of the smaller disk, unless only the last sync has failed.
    pub fn grow(&self, disk_size_bytes: u64, epoch: Epoch) -> Result<()> {
        check_trackable(disk_size_bytes)?;
        let mut published = self.lock();
        let before = published.superblock.disk_size_bytes.get();
        if disk_size_bytes < before {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!(
                    "Journal {} is for {before} bytes and cannot shrink to {disk_size_bytes}",
                    self.path().display()
                ),
            ));
        }
        if disk_size_bytes > before {
            self.make_room(&mut published, disk_size_bytes)?;
            reached(Place::GrowAfterRoomBeforeRecord);
            // The block in which the old end lay is among them.
            let new = Extent::covering(before, disk_size_bytes - before);
            self.record_durably(&mut published, epoch, new)?;
            reached(Place::GrowAfterRecordBeforePublish);
            self.regions.reach(disk_size_bytes).map_err(|error| {
                Error::io("Cannot reserve memory for the regions of the disk", error)
            })?;
        }
        let mut superblock = published.superblock;
        superblock.disk_size_bytes = disk_size_bytes.into();
        self.publish(&mut published, superblock);
        reached(Place::GrowAfterPublishBeforeSync);
        self.sync_published(&mut published)
    }

    /// Records what is new and syncs it: once more if another file had to take the place of this one, since
    /// the sync that failed may have cost the record, and no region is armed for it.
    fn record_durably(&self, published: &mut Published, epoch: Epoch, new: Extent) -> Result<()> {
        loop {
            let core = self.core();
            self.record(epoch, new, Operation::Write);
            reached(Place::GrowAfterRecordBeforeSync);
            self.sync_published(published)?;
            if std::ptr::eq(core, self.core()) {
                return Ok(());
            }
        }
    }

    /// Gives the checkpoint sets room for a disk of so many bytes.
    fn make_room(&self, published: &mut Published, disk_size_bytes: u64) -> Result<()> {
        let old = published.superblock;
        let mut new = old;
        if checkpoint_pages_of(disk_size_bytes) <= old.checkpoint_pages.get() {
            return Ok(());
        }
        new.checkpoint_offset = old.file_bytes().into();
        new.checkpoint_pages = checkpoint_room_of(disk_size_bytes).into();
        let failed = |error| {
            let path = self.path().display();
            Error::io(format!("Cannot make room in journal {path}"), error)
        };
        if old.file_bytes() > CHECKPOINT_OFFSET_MAX {
            return Err(failed(io::ErrorKind::FileTooLarge.into()));
        }
        let core = self.core();
        copy_sets(&core.file, &old, &new)
            .and_then(|()| failpoint::attempt(Place::GrowAfterCopyBeforeSync, &core.file))
            .map_err(failed)?;
        reached(Place::GrowAfterCopyBeforeSync);
        self.sync_length(published)?;
        if !std::ptr::eq(core, self.core()) {
            // Another file has taken its place, where what was copied is not.
            return Err(failed(io::ErrorKind::Interrupted.into()));
        }
        self.publish(published, new);
        self.sync_published(published)?;
        reached(Place::GrowAfterMoveBeforePunch);
        for set in 0..2 {
            // Nothing names these pages any more; they only take room.
            if let Err(errno) = SetPlace::of(&old, set).punch(&core.file) {
                let path = self.path().display();
                tracing::warn!("Cannot free the former checkpoints of {path}: {errno}");
            }
        }
        Ok(())
    }
}

/// Copies the pages of both sets to where a larger superblock has them.
fn copy_sets(file: &File, old: &Superblock, new: &Superblock) -> io::Result<()> {
    // What an attempt that failed has left goes first.
    file.set_len(old.file_bytes())?;
    file.set_len(new.file_bytes())?;
    for index in 0..2 {
        let (from, to) = (SetPlace::of(old, index), SetPlace::of(new, index));
        let generation = old.sets[index].generation.get();
        copy_pages((file, from), (file, to), generation)?;
    }
    Ok(())
}
