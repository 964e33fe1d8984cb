//! Which blocks already have a record in an epoch: the filter that spares rewritten blocks a
//! second record.
//!
//! A flat bitmap over lazily populated memory, so that a disk of 64 TiB costs nothing until it is
//! written. It is a cache: a bit that is missing costs one more record in the ring; a bit that is
//! set means that the record stood in the mapping before the bit was set.
//!
//! When the disk grows, words are added and none is moved, so that workers go on meanwhile without
//! a lock. A block that has no word yet counts as clear.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::{Error, Result};
use crate::extent::Extent;
use crate::journal::GrowingWords;

/// Filter of one epoch of one disk.
#[derive(Debug)]
pub struct Filter {
    words: GrowingWords,
    set_blocks: AtomicU64,
}

impl Filter {
    /// A filter over so many blocks; all are clear.
    ///
    /// # Errors
    ///
    /// The address space cannot be had.
    pub fn new(blocks: u64) -> Result<Self> {
        Ok(Self {
            words: GrowingWords::new(blocks.div_ceil(64)).map_err(no_memory)?,
            set_blocks: AtomicU64::new(0),
        })
    }

    /// Adds room for a disk of so many blocks, while workers use the filter. One thread at a time.
    ///
    /// # Errors
    ///
    /// The address space cannot be had; the filter is as it was, or has a part of the room.
    pub fn reach(&self, blocks: u64) -> Result<()> {
        self.words.reach(blocks.div_ceil(64)).map_err(no_memory)
    }

    /// Whether every block of the extent is set.
    pub fn contains(&self, extent: Extent) -> bool {
        self.each_word(extent, |word, mask| {
            word.load(Ordering::Acquire) & mask == mask
        })
    }

    /// Sets every block of the extent.
    pub fn insert(&self, extent: Extent) {
        let mut added = 0;
        self.each_word(extent, |word, mask| {
            let before = word.fetch_or(mask, Ordering::AcqRel);
            added += (mask & !before).count_ones();
            true
        });
        self.set_blocks
            .fetch_add(u64::from(added), Ordering::Relaxed);
    }

    /// Number of blocks that are set.
    pub fn count(&self) -> u64 {
        self.set_blocks.load(Ordering::Relaxed)
    }

    /// Clears everything and gives the memory back. No worker may be inserting.
    ///
    /// # Errors
    ///
    /// The system refuses, which would leave bits that promise records of an older epoch.
    pub fn clear(&self) -> Result<()> {
        self.words
            .clear()
            .map_err(|error| Error::io("Cannot clear the dirty bitmap", error))?;
        self.set_blocks.store(0, Ordering::Relaxed);
        Ok(())
    }

    /// Calls with every word that the extent touches and the bits it has there, until `false`.
    fn each_word(&self, extent: Extent, mut visit: impl FnMut(&AtomicU64, u64) -> bool) -> bool {
        let (mut block, end) = (extent.first_block, extent.end_block());
        while block < end {
            let first = block % 64;
            let count = (64 - first).min(end - block);
            let mask = (u64::MAX >> (64 - count)) << first;
            let Some(word) = self.words.get(block / 64) else {
                return false;
            };
            if !visit(word, mask) {
                return false;
            }
            block += count;
        }
        true
    }
}

fn no_memory(error: std::io::Error) -> Error {
    Error::io("Cannot reserve memory for the dirty bitmap", error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn it_is_a_set_of_blocks(
            extents in prop::collection::vec((0u64..500, 1u64..200), 1..20), first_blocks in 0u64..800,
        ) {
            let filter = Filter::new(first_blocks).unwrap();
            filter.reach(first_blocks).unwrap();
            filter.reach(700).unwrap();
            let mut model = BTreeSet::new();
            for (first_block, block_count) in extents {
                let extent = Extent { first_block, block_count };
                let known = (first_block..extent.end_block()).all(|block| model.contains(&block));
                prop_assert_eq!(filter.contains(extent), known);
                filter.insert(extent);
                model.extend(first_block..extent.end_block());
                prop_assert_eq!(filter.count(), model.len() as u64);
            }
            filter.clear().unwrap();
            prop_assert_eq!(filter.count(), 0);
            let all = Extent { first_block: 0, block_count: 1 };
            prop_assert!(!filter.contains(all));
        }
    }

    #[test]
    fn a_block_without_room_is_clear_and_what_was_set_stays_when_room_is_added() {
        let filter = Filter::new(100).unwrap();
        let extent = |first_block| Extent {
            first_block,
            block_count: 1,
        };
        filter.insert(extent(99));
        for step in 7..40 {
            let block = (1 << step) - 1;
            filter.reach(block).unwrap();
            filter.insert(extent(block));
            // Rounded up, the room may include it by chance; behind the next step it never does.
            assert!(!filter.contains(extent(block * 4)));
            filter.reach(block + 1).unwrap();
            filter.insert(extent(block));
            assert!(filter.contains(extent(block)) && filter.contains(extent(99)));
        }
        filter.clear().unwrap();
        assert!(!filter.contains(extent(99)) && !filter.contains(extent((1 << 39) - 1)));
    }
}
