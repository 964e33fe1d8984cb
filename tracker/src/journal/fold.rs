//! Folding: the oldest records of a ring that is filling up become bits of a checkpoint set.
//!
//! Order: the pages are written and synced; the superblock that describes the set and moves the tail is
//! published and synced; only then are the slots free. A superblock may be written back as soon as it is
//! stored, so the pages are durable before, and the slots are reused only when it is.
//!
//! Crash consistency: pages of a fold that was not published only add bits.

use std::sync::atomic::Ordering;

use super::checkpoint::{Folding, SetPlace};
use super::core::Core;
use super::format::{Operation, Record, SetDescriptor, Slot, Superblock};
use super::writer::{Journal, Published};
use crate::error::{Error, Result};
use crate::extent::Epoch;
use crate::failpoint::{self, Place, reached};

/// Past this share of the ring, in percent, the oldest records are folded.
const FOLD_ABOVE_PERCENT: u64 = 70;
/// Folding goes on down to this share, and from there on a ring that was full takes records again.
const FOLD_DOWN_TO_PERCENT: u64 = 50;

impl Journal {
    /// Folds the oldest records into a checkpoint set if the ring is filling up.
    ///
    /// # Errors
    ///
    /// The checkpoint cannot be written. The ring goes on; when it is full the overflow bits keep
    /// coverage.
    pub fn maintain(&self) -> Result<()> {
        let capacity = self.ring().capacity();
        // A worker that was refused may say so when others have filled a ring again that was folded meanwhile. It takes
        // no records from then on, so it would never come to be folded for its fill.
        let above = match self.core().is_direct() {
            true => FOLD_DOWN_TO_PERCENT,
            false => FOLD_ABOVE_PERCENT,
        };
        if self.ring().used() * 100 > capacity * above {
            let mut published = self.lock();
            while self.ring().used() * 100 > capacity * FOLD_DOWN_TO_PERCENT {
                if self.fold_some(&mut published)? == 0 {
                    break;
                }
            }
        }
        if self.ring().used() * 100 <= capacity * FOLD_DOWN_TO_PERCENT {
            self.core().end_direct();
        }
        Ok(())
    }

    /// Folds some records. Returns their number.
    fn fold_some(&self, published: &mut Published) -> Result<u64> {
        let mut superblock = published.superblock;
        let core = self.core();
        let start = core.ring.tail();
        let mut oldest = Oldest::of(core, Epoch(superblock.committed.get()));
        let tail = oldest.tail;
        if tail == start {
            return Ok(0);
        }
        if let Some((lowest, highest)) = oldest.epochs {
            let index = choose_set(&superblock, lowest);
            let set = &mut superblock.sets[index];
            let place = SetPlace::of(&published.superblock, index);
            self.write_checkpoint(&mut oldest.folding, place, set)
                .map_err(|error| {
                    let path = self.path().display();
                    let what = format!("Cannot write a checkpoint into {path}: free some space");
                    Error::io(what, error)
                })?;
            let previous = set.lowest_epoch.get();
            let lowest = if previous == 0 {
                lowest
            } else {
                previous.min(lowest)
            };
            set.lowest_epoch = lowest.into();
            set.highest_epoch = set.highest_epoch.get().max(highest).into();
        }
        superblock.ring_tail = tail.into();
        reached(Place::FoldAfterPagesBeforeSync);
        self.sync_published(published)?;
        if !std::ptr::eq(core, self.core()) {
            // Another file has taken its place, where these pages are not.
            return Ok(0);
        }
        reached(Place::FoldAfterPagesBeforePublish);
        self.publish(published, superblock);
        reached(Place::FoldAfterPublishBeforeSync);
        self.sync_published(published)?;
        reached(Place::FoldAfterSyncBeforeTail);
        core.ring.set_tail(tail);
        self.counters.folds.fetch_add(1, Ordering::Relaxed);
        self.counters
            .folded
            .fetch_add(tail - start, Ordering::Relaxed);
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
        reached(Place::FoldAfterScanBeforePages);
        failpoint::attempt(Place::FoldAfterScanBeforePages, &self.core().file)?;
        folding.write(&self.core().file, place, set)
    }
}

/// The oldest records of a ring, about to be folded.
struct Oldest {
    folding: Folding,
    /// Sequence of the first record that is not among them.
    tail: u64,
    /// Lowest and highest epoch of those that still count.
    epochs: Option<(u64, u64)>,
}

impl Oldest {
    /// As many as memory allows, and none that is later than the first of them: epochs that are folded
    /// together can only be dropped together, and with a guest that goes on writing each would drag the
    /// next one along.
    fn of(core: &Core, committed: Epoch) -> Self {
        let ring = &core.ring;
        let limit = ring.head().min(ring.tail() + ring.capacity() / 4);
        let mut oldest = Self {
            folding: Folding::default(),
            tail: ring.tail(),
            epochs: None,
        };
        while oldest.tail < limit && !oldest.folding.is_full() {
            match ring.read(core.words.words(), oldest.tail) {
                Slot::Whole(record) if record.sequence == oldest.tail => {
                    let counts = record.operation != Operation::Null && record.epoch > committed;
                    if counts && !oldest.take(&record) {
                        break;
                    }
                }
                _ => break,
            }
            oldest.tail += 1;
        }
        oldest
    }

    /// Takes a record as a whole; `false` if it has to wait.
    fn take(&mut self, record: &Record) -> bool {
        let epoch = record.epoch.0;
        let (lowest, highest) = self.epochs.unwrap_or((epoch, epoch));
        if epoch > highest {
            return false;
        }
        self.epochs = Some((lowest.min(epoch), highest));
        let end = record.first_block + record.block_count;
        self.folding.add(record.first_block, end) == end
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
