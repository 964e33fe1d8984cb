//! Which blocks already have a record in an epoch: the filter that spares rewritten blocks a
//! second record.
//!
//! A flat bitmap over lazily populated memory, so that a disk of 64 TiB costs nothing until it is
//! written. It is a cache: a bit that is missing costs one more record in the ring; a bit that is
//! set means that the record stood in the mapping before the bit was set.
//!
//! A second, much smaller bitmap has a bit for each page of words that was ever stored to, so that the whole
//! can be gone through without looking at what is empty.
//!
//! When the disk grows, words are added and none is moved, so that workers go on meanwhile without
//! a lock. A block that has no word yet counts as clear.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::{Error, Result};
use crate::extent::Extent;
use crate::journal::GrowingWords;
use crate::preserve::format::PAGE_WORDS;

/// Blocks of a page of words.
const PAGE_BLOCKS: u64 = PAGE_WORDS * 64;

/// Filter of one epoch of one disk.
#[derive(Debug)]
pub struct Filter {
    words: GrowingWords,
    /// Pages of [`PAGE_WORDS`] words that have bits.
    pages: GrowingWords,
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
            pages: GrowingWords::new(blocks.div_ceil(PAGE_BLOCKS * 64)).map_err(no_memory)?,
            set_blocks: AtomicU64::new(0),
        })
    }

    /// Adds room for a disk of so many blocks, while workers use the filter. One thread at a time.
    ///
    /// # Errors
    ///
    /// The address space cannot be had; the filter is as it was, or has a part of the room.
    pub fn reach(&self, blocks: u64) -> Result<()> {
        self.pages
            .reach(blocks.div_ceil(PAGE_BLOCKS * 64))
            .and_then(|()| self.words.reach(blocks.div_ceil(64)))
            .map_err(no_memory)
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
        self.note_pages(extent);
        self.each_word(extent, |word, mask| {
            let before = word.fetch_or(mask, Ordering::AcqRel);
            added += (mask & !before).count_ones();
            true
        });
        self.set_blocks
            .fetch_add(u64::from(added), Ordering::Relaxed);
    }

    fn note_pages(&self, extent: Extent) {
        let last = extent.end_block().saturating_sub(1).max(extent.first_block);
        for page in extent.first_block / PAGE_BLOCKS..=last / PAGE_BLOCKS {
            let bit = 1 << (page % 64);
            // Set once, looked at often.
            if let Some(word) = self.pages.get(page / 64)
                && word.load(Ordering::Relaxed) & bit == 0
            {
                word.fetch_or(bit, Ordering::Relaxed);
            }
        }
    }

    /// The bits of 64 blocks, from block `index * 64` on.
    pub fn word(&self, index: u64) -> u64 {
        let word = self.words.get(index);
        word.map_or(0, |word| word.load(Ordering::Acquire))
    }

    /// Whether a page of [`PAGE_WORDS`] words has bits, or had.
    pub fn has_page(&self, page: u64) -> bool {
        let word = self.pages.get(page / 64);
        word.is_some_and(|word| word.load(Ordering::Acquire) >> (page % 64) & 1 == 1)
    }

    /// The words that have bits, among so many pages; `None` if there are more than `most`.
    pub fn words(&self, pages: u64, most: usize) -> Option<Vec<(u64, u64)>> {
        let mut words = Vec::new();
        for page in (0..pages).filter(|&page| self.has_page(page)) {
            for index in page * PAGE_WORDS..(page + 1) * PAGE_WORDS {
                let bits = self.word(index);
                if bits != 0 {
                    words.push((index, bits));
                }
            }
            if words.len() > most {
                return None;
            }
        }
        Some(words)
    }

    /// Sets every block of another filter that covers as many, up to `pages` pages.
    pub fn insert_all(&self, other: &Self, pages: u64) {
        for page in (0..pages).filter(|&page| other.has_page(page)) {
            for index in page * PAGE_WORDS..(page + 1) * PAGE_WORDS {
                self.insert_word(index, other.word(index));
            }
        }
    }

    /// Sets blocks among the 64 from block `index * 64` on.
    pub fn insert_word(&self, index: u64, bits: u64) {
        if bits != 0
            && let Some(word) = self.words.get(index)
        {
            let first_block = index * 64;
            let block_count = 1;
            self.note_pages(Extent {
                first_block,
                block_count,
            });
            let added = bits & !word.fetch_or(bits, Ordering::AcqRel);
            self.set_blocks
                .fetch_add(added.count_ones().into(), Ordering::Relaxed);
        }
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
            .and_then(|()| self.pages.clear())
            .map_err(|error| Error::io("Cannot clear the dirty bitmap", error))?;
        self.set_blocks.store(0, Ordering::Relaxed);
        Ok(())
    }

    /// Calls with every word that the extent touches and the bits it has there, until `false`.
    fn each_word(&self, extent: Extent, mut visit: impl FnMut(&AtomicU64, u64) -> bool) -> bool {
        for (index, mask) in extent.words() {
            let Some(word) = self.words.get(index) else {
                return false;
            };
            if !visit(word, mask) {
                return false;
            }
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
