//! Which block belongs to which writer: short runs of blocks, finely interleaved, so that regions of the
//! journal, frames and reads of the shipper hold blocks of all of them. Pure.

use super::{BLOCK_BYTES, BLOCK_SECTORS, WRITERS};
use crate::seed::Random;

/// Lengths of runs in blocks; the longest is as long as the longest write.
const LENGTHS: [u32; 8] = [1, 1, 1, 2, 4, 8, 16, 32];

/// Neighbouring blocks of one writer on one disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Number of the disk.
    pub disk: usize,
    /// The first block.
    pub first_block: u32,
    /// Blocks.
    pub block_count: u32,
}

/// Who owns what.
#[derive(Debug)]
pub struct Areas {
    /// For each disk, the owner of every block.
    owners: Vec<Vec<u8>>,
    /// For each writer, its runs in no order.
    runs: Vec<Vec<Run>>,
}

impl Areas {
    /// Divides disks of these sizes in bytes, which are whole blocks.
    pub fn divide(sizes: &[u64], random: &mut Random) -> Self {
        let mut areas = Self {
            owners: Vec::new(),
            runs: vec![Vec::new(); WRITERS],
        };
        for (disk, size) in sizes.iter().enumerate() {
            let blocks = (size / BLOCK_BYTES as u64) as u32;
            let mut owners = Vec::with_capacity(blocks as usize);
            while (owners.len() as u32) < blocks {
                let first_block = owners.len() as u32;
                let length = LENGTHS[random.below(LENGTHS.len() as u64) as usize];
                let block_count = length.min(blocks - first_block);
                let writer = random.below(WRITERS as u64) as usize;
                owners.resize(owners.len() + block_count as usize, writer as u8);
                areas.runs[writer].push(Run {
                    disk,
                    first_block,
                    block_count,
                });
            }
            areas.owners.push(owners);
        }
        for runs in &mut areas.runs {
            // The first ones are the hot ones: they shall lie anywhere.
            for last in (1..runs.len()).rev() {
                runs.swap(last, random.below(last as u64 + 1) as usize);
            }
        }
        areas
    }

    /// Sizes of the disks in sectors.
    pub fn sectors(&self) -> impl Iterator<Item = usize> {
        self.owners
            .iter()
            .map(|owners| owners.len() * BLOCK_SECTORS)
    }

    /// The owner of a block.
    pub fn owner(&self, disk: usize, block: usize) -> usize {
        usize::from(self.owners[disk][block])
    }

    /// The runs of a writer.
    pub fn runs(&self, writer: usize) -> &[Run] {
        &self.runs[writer]
    }
}
