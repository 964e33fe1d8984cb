//! Folding: the oldest records of a ring that is filling up become bits of a checkpoint set.
//!
//! Order: the pages are written and synced; the superblock that describes the set and moves the tail is
//! published and synced; only then are the slots free. A superblock may be written back as soon as it is
//! stored, so the pages are durable before, and the slots are reused only when it is.
//!
//! Crash consistency: pages of a fold that was not published only add bits.

use std::sync::atomic::Ordering;

use super::checkpoint::{Folding, SetPlace};
use super::format::{Operation, SetDescriptor, Slot, Superblock};
use super::writer::{Journal, Published};
use crate::error::{Error, Result};
use crate::extent::Epoch;
use crate::failpoint::{Canary, Place, canary, reached};

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
        if self.ring().used() * 100 > capacity * FOLD_ABOVE_PERCENT {
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

    /// Folds as many records as memory allows, and none that is later than the first of them:
    /// epochs that are folded together can only be dropped together, and with a guest that goes on
    /// writing each would drag the next one along. Returns their number.
    fn fold_some(&self, published: &mut Published) -> Result<u64> {
        let mut superblock = published.superblock;
        let committed = Epoch(superblock.committed.get());
        let core = self.core();
        let start = core.ring.tail();
        let limit = core.ring.head().min(start + core.ring.capacity() / 4);
        let mut folding = Folding::default();
        let (mut lowest, mut highest) = (u64::MAX, 0);
        let mut tail = start;
        while tail < limit && !folding.is_full() {
            let Slot::Whole(record) = core.ring.read(core.words.words(), tail) else {
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
                            self.path().display()
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
        reached(Place::FoldAfterPagesBeforeSync);
        if !canary(Canary::PagesNotSyncedBeforeSuperblock) {
            self.sync_published(published)?;
        }
        if canary(Canary::SlotsFreedBeforeSuperblock) {
            core.ring.set_tail(tail);
        }
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
        folding.write(&self.core().file, place, set)
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
