//! Blocks, extents and epochs: the units in which changes are counted. Pure.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Bytes in one block, the unit of tracking, capture and fingerprints.
pub const BLOCK_SIZE: u64 = 4096;

/// The number of an epoch. Epoch numbers only grow; order is theirs, never a clock's.
///
/// Prints as sixteen hexadecimal digits, so that text order is numeric order. Zero stands
/// before the first epoch.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Epoch(pub u64);

impl Epoch {
    /// Before the first epoch.
    pub const ZERO: Self = Self(0);

    /// The epoch of a text of one to sixteen hexadecimal digits.
    pub fn parse(text: &str) -> Option<Self> {
        let is_number =
            (1..=16).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_hexdigit());
        let number = u64::from_str_radix(text, 16).ok();
        number.filter(|_| is_number).map(Self)
    }

    /// The epoch after this one. None follows the greatest number.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{:016x}", self.0)
    }
}

/// A run of blocks: `block_count` blocks from `first_block` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Extent {
    /// Index of the first block; its byte offset is `first_block * BLOCK_SIZE`.
    pub first_block: u64,
    /// Number of blocks.
    pub block_count: u64,
}

impl Extent {
    /// The blocks that the bytes `offset .. offset + length_bytes` touch, wholly or in part.
    /// Empty for a length of zero. The caller has checked the range against the disk's size.
    pub fn covering(offset: u64, length_bytes: u64) -> Self {
        let first_block = offset / BLOCK_SIZE;
        let end_block = (offset + length_bytes).div_ceil(BLOCK_SIZE);
        let block_count = if length_bytes == 0 {
            0
        } else {
            end_block - first_block
        };
        Self {
            first_block,
            block_count,
        }
    }

    /// The block after the last one.
    pub fn end_block(self) -> u64 {
        self.first_block + self.block_count
    }

    /// Byte offset of the first block.
    pub fn offset_bytes(self) -> u64 {
        self.first_block * BLOCK_SIZE
    }

    /// Length in bytes.
    pub fn length_bytes(self) -> u64 {
        self.block_count * BLOCK_SIZE
    }

    /// The words of a bitmap of blocks that the extent touches, each with the bits that it has there.
    pub fn words(self) -> impl Iterator<Item = (u64, u64)> {
        let (mut block, end) = (self.first_block, self.end_block());
        std::iter::from_fn(move || {
            let first = block % 64;
            let count = (64 - first).min(end.checked_sub(block).filter(|&left| left > 0)?);
            let mask = (u64::MAX >> (64 - count)) << first;
            let index = block / 64;
            block += count;
            Some((index, mask))
        })
    }

    /// The blocks of the extent whose bits are set in a bitmap, given by its words, as runs that do not touch.
    pub fn runs(self, bits: impl Fn(u64) -> u64) -> impl Iterator<Item = Self> {
        let mut words = self.words();
        let mut current = (0, 0);
        let mut pending: Option<Self> = None;
        std::iter::from_fn(move || {
            loop {
                if current.1 == 0 {
                    match words.next() {
                        Some((index, mask)) => current = (index, mask & bits(index)),
                        None => return pending.take(),
                    }
                    continue;
                }
                let first = u64::from(current.1.trailing_zeros());
                let count = u64::from((current.1 >> first).trailing_ones());
                current.1 &= !((u64::MAX >> (64 - count)) << first);
                let run = Self {
                    first_block: current.0 * 64 + first,
                    block_count: count,
                };
                match &mut pending {
                    Some(last) if last.end_block() == run.first_block => last.block_count += count,
                    _ => {
                        if let Some(done) = pending.replace(run) {
                            return Some(done);
                        }
                    }
                }
            }
        })
    }
}

/// Blocks needed to cover a disk of `size_bytes`; the last one may be short.
pub fn blocks_of(size_bytes: u64) -> u64 {
    size_bytes.div_ceil(BLOCK_SIZE)
}

/// Sorts `extents` and merges those that overlap or touch; drops empty ones.
pub fn coalesce(extents: &mut Vec<Extent>) {
    extents.retain(|extent| extent.block_count > 0);
    extents.sort_unstable();
    let mut merged = 0;
    for index in 1..extents.len() {
        let extent = extents[index];
        let last = extents[merged];
        if extent.first_block <= last.end_block() {
            let end = last.end_block().max(extent.end_block());
            extents[merged].block_count = end - last.first_block;
        } else {
            merged += 1;
            extents[merged] = extent;
        }
    }
    extents.truncate(merged + 1);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    #[test]
    fn covering_counts_partial_blocks() {
        assert_eq!(Extent::covering(0, 0).block_count, 0);
        assert_eq!(
            Extent::covering(4095, 2),
            Extent {
                first_block: 0,
                block_count: 2
            }
        );
        assert_eq!(
            Extent::covering(4096, 4096),
            Extent {
                first_block: 1,
                block_count: 1
            }
        );
    }

    proptest! {
        #[test]
        fn runs_are_the_bits_that_are_set(
            words in prop::collection::vec(prop_oneof![Just(0), Just(u64::MAX), any::<u64>()], 1..6),
            first in 0u64..200, count in 0u64..300,
        ) {
            let is_set = |block: u64| {
                words.get((block / 64) as usize).is_some_and(|word| word >> (block % 64) & 1 == 1)
            };
            let extent = Extent { first_block: first, block_count: count };
            let found: Vec<Extent> =
                extent.runs(|index| words.get(index as usize).copied().unwrap_or(0)).collect();
            let blocks: Vec<u64> = found.iter().flat_map(|run| run.first_block..run.end_block()).collect();
            let expected: Vec<u64> = (first..first + count).filter(|&block| is_set(block)).collect();
            prop_assert_eq!(blocks, expected);
            prop_assert!(found.windows(2).all(|pair| pair[0].end_block() < pair[1].first_block));
        }

        #[test]
        fn coalesce_keeps_the_set_of_blocks(pairs in prop::collection::vec((0u64..64, 0u64..9), 0..20)) {
            let mut extents: Vec<Extent> = pairs
                .iter()
                .map(|&(first_block, block_count)| Extent { first_block, block_count })
                .collect();
            let blocks = |extents: &[Extent]| -> BTreeSet<u64> {
                extents.iter().flat_map(|e| e.first_block..e.end_block()).collect()
            };
            let before = blocks(&extents);
            coalesce(&mut extents);
            prop_assert_eq!(before, blocks(&extents));
            for pair in extents.windows(2) {
                prop_assert!(pair[0].end_block() < pair[1].first_block);
            }
        }
    }
}
