//! The blocks that writes in flight are about to change, so that a later write can wait for those alone that it
//! overlaps.
//!
//! Each worker has a table of its own and is the only one that stores to it; the thread that copies blocks
//! looks at all of them while an epoch is being closed. A write is listed before the worker counts as done with
//! its admission, and taken off when it has completed. After the last admission of an epoch its entries only vanish,
//! so whoever looks then sees them all.
//!
//! A worker with more writes in flight than entries counts the rest; then every block counts as one of
//! theirs until they have completed.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::extent::{Epoch, Extent};

/// Entries of one worker.
const ENTRIES: usize = 256;
/// Entries that are looked at for a free one.
const LOOKS_MAX: usize = 16;
const TAKEN: u64 = 1 << 63;
const DISK_SHIFT: u32 = 48;
const COUNT_SHIFT: u32 = 1;

/// Where a write is listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flight(u16);

const UNLISTED: Flight = Flight(u16::MAX);

#[derive(Debug, Default)]
struct Entry {
    first_block: AtomicU64,
    /// Zero if the entry is free; else [`TAKEN`], disk, number of blocks and parity of the epoch.
    what: AtomicU64,
}

/// The table of one worker.
#[derive(Debug)]
#[repr(align(128))]
pub struct Flights {
    entries: Vec<Entry>,
    /// Where a free entry is looked for first.
    next: AtomicU64,
    /// Writes of even and odd epochs that found no entry.
    unlisted: [AtomicU64; 2],
}

impl Default for Flights {
    fn default() -> Self {
        Self {
            entries: (0..ENTRIES).map(|_| Entry::default()).collect(),
            next: AtomicU64::new(0),
            unlisted: Default::default(),
        }
    }
}

fn parity(epoch: Epoch) -> u64 {
    epoch.0 & 1
}

impl Flights {
    /// Lists a write. Called by the worker alone.
    pub fn list(&self, disk: usize, extent: Extent, epoch: Epoch) -> Flight {
        let start = self.next.load(Ordering::Relaxed) as usize;
        for look in 0..LOOKS_MAX {
            let index = (start + look) % ENTRIES;
            let entry = &self.entries[index];
            if entry.what.load(Ordering::Relaxed) == 0 {
                let count = extent.block_count.min(u64::from(u32::MAX));
                let what = TAKEN
                    | (disk as u64 & 0x7fff) << DISK_SHIFT
                    | count << COUNT_SHIFT
                    | parity(epoch);
                entry
                    .first_block
                    .store(extent.first_block, Ordering::Relaxed);
                entry.what.store(what, Ordering::Release);
                self.next.store(index as u64, Ordering::Relaxed);
                return Flight(index as u16);
            }
        }
        self.next
            .store((start + LOOKS_MAX) as u64, Ordering::Relaxed);
        self.unlisted[parity(epoch) as usize].fetch_add(1, Ordering::Release);
        UNLISTED
    }

    /// Takes a write off that has completed. Called by the worker alone.
    pub fn take_off(&self, flight: Flight, epoch: Epoch) {
        if flight == UNLISTED {
            self.unlisted[parity(epoch) as usize].fetch_sub(1, Ordering::Release);
        } else if let Some(entry) = self.entries.get(usize::from(flight.0)) {
            entry.what.store(0, Ordering::Release);
        }
    }

    /// Whether a write of this worker and of an epoch that takes no more writes may still change one of these
    /// blocks.
    pub fn overlap(&self, disk: usize, extent: Extent, epoch: Epoch) -> bool {
        if self.unlisted[parity(epoch) as usize].load(Ordering::Acquire) > 0 {
            return true;
        }
        self.entries.iter().any(|entry| {
            let what = entry.what.load(Ordering::Acquire);
            if what == 0
                || what & 1 != parity(epoch)
                || what >> DISK_SHIFT & 0x7fff != disk as u64 & 0x7fff
            {
                return false;
            }
            // Not stored to again before `what` is, and that only for another epoch.
            let first = entry.first_block.load(Ordering::Relaxed);
            let count = what >> COUNT_SHIFT & u64::from(u32::MAX);
            first < extent.end_block() && extent.first_block < first.saturating_add(count)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blocks(first_block: u64, block_count: u64) -> Extent {
        Extent {
            first_block,
            block_count,
        }
    }

    #[test]
    fn only_what_overlaps_on_the_same_disk_and_in_the_same_epoch_is_waited_for() {
        let flights = Flights::default();
        let epoch = Epoch(7);
        let flight = flights.list(1, blocks(10, 5), epoch);
        for (disk, extent, at, expected) in [
            (1, blocks(14, 1), epoch, true),
            (1, blocks(0, 11), epoch, true),
            (1, blocks(15, 9), epoch, false),
            (1, blocks(0, 10), epoch, false),
            (0, blocks(12, 1), epoch, false),
            (1, blocks(12, 1), Epoch(8), false),
        ] {
            assert_eq!(
                flights.overlap(disk, extent, at),
                expected,
                "{disk} {extent:?} {at}"
            );
        }
        flights.take_off(flight, epoch);
        assert!(!flights.overlap(1, blocks(12, 1), epoch));
    }

    #[test]
    fn writes_that_find_no_entry_are_waited_for_all_the_same() {
        let flights = Flights::default();
        let epoch = Epoch(4);
        let listed: Vec<Flight> = (0..2 * ENTRIES as u64)
            .map(|block| flights.list(0, blocks(block, 1), epoch))
            .collect();
        assert!(listed.contains(&UNLISTED));
        assert!(flights.overlap(0, blocks(1 << 30, 1), epoch));
        assert!(!flights.overlap(0, blocks(1 << 30, 1), Epoch(5)));
        for flight in listed {
            flights.take_off(flight, epoch);
        }
        assert!(!flights.overlap(0, blocks(0, 1 << 30), epoch));
    }
}
