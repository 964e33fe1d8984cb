//! Which segment has which blocks of a disk at a recovery point.
//!
//! Overview: the directories of all segments are read in parallel; each leaves its extents, merged
//! where they touch, as claims of 16 bytes, and is dropped again with its fingerprints. One sweep
//! over the sorted claims gives disjoint runs: where several segments claim a block, the last one
//! has it. So a first copy of any size costs one run for each segment, and memory grows with the
//! fragments of the changes alone.
//!
//! Blocks behind the end of the disk are left out: it may have been larger once.

use std::collections::BinaryHeap;
use std::sync::{Mutex, PoisonError};

use tracker::extent::{Extent, blocks_of};

use super::segments::Segments;
use super::workers::{Failure, Numbers, directory_threads};
use crate::error::{Error, ErrorKind, Result};
use crate::segment::format::ExtentEntry;

/// Stands in place of a segment for blocks that are zero.
const ZERO: u32 = u32::MAX;
/// Most segments of a disk, so that a segment's rank fits its field.
const SEGMENTS_MAX: usize = 1 << 30;

/// Blocks that a segment says something about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Claim {
    first_block: u64,
    block_count: u32,
    /// Twice the position of the segment, and one more if the blocks are zero. A higher rank wins.
    rank: u32,
}

impl Claim {
    fn end_block(self) -> u64 {
        self.first_block + u64::from(self.block_count)
    }
}

/// Blocks that come from one segment, or are zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    first_block: u64,
    block_count: u32,
    segment: u32,
}

impl Run {
    /// The blocks.
    pub fn extent(self) -> Extent {
        Extent {
            first_block: self.first_block,
            block_count: u64::from(self.block_count),
        }
    }

    /// Position of the segment in the manifest's list; `None` if the blocks are zero.
    pub fn segment(self) -> Option<usize> {
        (self.segment != ZERO).then_some(self.segment as usize)
    }
}

/// The runs of a disk, sorted and disjoint. Blocks of no run were never written: they are zero.
#[derive(Debug, Default)]
pub struct Index {
    runs: Vec<Run>,
}

impl Index {
    /// Reads the directories of all segments.
    ///
    /// # Errors
    ///
    /// A segment is missing, damaged, or not the one that the manifest names.
    pub fn read(segments: &Segments<'_>, threads: usize) -> Result<Self> {
        if segments.count() > SEGMENTS_MAX {
            let name = &segments.disk().name;
            let what = format!("Disk {name} has more segments than this program can handle");
            return Err(Error::new(ErrorKind::Unsupported, what));
        }
        let disk_blocks = blocks_of(segments.disk().size_bytes);
        let failure = Failure::default();
        let numbers = Numbers::new(segments.count(), &failure);
        let claims = Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            for _ in 0..directory_threads(threads) {
                scope.spawn(|| {
                    numbers.work(|number| {
                        let directory = segments.directory(number)?;
                        let found = claims_of(&directory.extents, number as u32, disk_blocks);
                        drop(directory);
                        let mut claims = claims.lock().unwrap_or_else(PoisonError::into_inner);
                        claims.extend_from_slice(&found);
                        Ok(())
                    });
                });
            }
        });
        failure.into_result()?;
        let claims = claims.into_inner().unwrap_or_else(PoisonError::into_inner);
        Ok(Self {
            runs: sweep(claims),
        })
    }

    /// All runs, in the order of the disk.
    pub fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// For each of `count` segments, whether it has data that the disk needs.
    pub fn needed(&self, count: usize) -> Vec<bool> {
        let mut needed = vec![false; count];
        for segment in self.runs.iter().filter_map(|run| run.segment()) {
            needed[segment] = true;
        }
        needed
    }

    /// The entries of a segment's directory with data that the disk needs, cut to the blocks that
    /// it needs, in the order of the frames.
    pub fn needed_entries(&self, segment: usize, entries: &[ExtentEntry]) -> Vec<ExtentEntry> {
        let mut needed = Vec::new();
        for entry in entries.iter().filter(|entry| entry.frame_index().is_some()) {
            let extent = entry.extent();
            let first = self
                .runs
                .partition_point(|run| run.extent().end_block() <= extent.first_block);
            let touching = self.runs[first..]
                .iter()
                .take_while(|run| run.first_block < extent.end_block())
                .filter(|run| run.segment() == Some(segment));
            for run in touching {
                let from = run.first_block.max(extent.first_block);
                let to = run.extent().end_block().min(extent.end_block());
                let skip = (from - extent.first_block) as u32;
                needed.push(ExtentEntry {
                    first_block: from.into(),
                    block_count: ((to - from) as u32).into(),
                    frame_block: (entry.frame_block.get() + skip).into(),
                    ..*entry
                });
            }
        }
        needed.sort_by_key(|entry| entry.frame.get());
        needed
    }
}

/// What a segment claims of a disk of `disk_blocks` blocks, in the order of the disk.
fn claims_of(entries: &[ExtentEntry], segment: u32, disk_blocks: u64) -> Vec<Claim> {
    let mut claims: Vec<Claim> = Vec::new();
    for entry in entries {
        let extent = entry.extent();
        let end = extent.end_block().min(disk_blocks);
        if extent.first_block >= end {
            continue;
        }
        let claim = Claim {
            first_block: extent.first_block,
            block_count: (end - extent.first_block) as u32,
            rank: 2 * segment + u32::from(entry.frame_index().is_none()),
        };
        match claims.last_mut() {
            Some(last) if last.rank == claim.rank && last.end_block() == claim.first_block => {
                match last.block_count.checked_add(claim.block_count) {
                    Some(sum) => last.block_count = sum,
                    None => claims.push(claim),
                }
            }
            _ => claims.push(claim),
        }
    }
    claims
}

/// Gives each block to the claim of the highest rank.
fn sweep(mut claims: Vec<Claim>) -> Vec<Run> {
    claims.sort_unstable_by_key(|claim| claim.first_block);
    let mut runs = Vec::new();
    // Claims that begin at or before `position`, by rank and end; some may have ended.
    let mut open: BinaryHeap<(u32, u64)> = BinaryHeap::new();
    let mut waiting = claims.iter().peekable();
    let mut position = 0;
    loop {
        while let Some(claim) = waiting.next_if(|claim| claim.first_block <= position) {
            open.push((claim.rank, claim.end_block()));
        }
        let next = waiting.peek().map(|claim| claim.first_block);
        match (open.peek(), next) {
            (Some((_, end)), _) if *end <= position => {
                open.pop();
            }
            (Some((rank, end)), next) => {
                let to = next.map_or(*end, |next| next.min(*end));
                push_run(&mut runs, position, to, *rank);
                position = to;
            }
            (None, Some(next)) => position = next,
            (None, None) => return runs,
        }
    }
}

fn push_run(runs: &mut Vec<Run>, from: u64, to: u64, rank: u32) {
    let segment = if rank % 2 == 1 { ZERO } else { rank / 2 };
    // One claim has at most this many blocks.
    let block_count = (to - from) as u32;
    if let Some(last) = runs.last_mut()
        && last.segment == segment
        && last.extent().end_block() == from
        && let Some(sum) = last.block_count.checked_add(block_count)
    {
        last.block_count = sum;
        return;
    }
    runs.push(Run {
        first_block: from,
        block_count,
        segment,
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::segment::format::FRAME_NONE;
    use proptest::prelude::*;

    const _: () = assert!(size_of::<Claim>() == 16 && size_of::<Run>() == 16);
    const BLOCKS: u64 = 200;

    fn entry(first_block: u64, block_count: u32, frame: u32, frame_block: u32) -> ExtentEntry {
        ExtentEntry {
            first_block: first_block.into(),
            block_count: block_count.into(),
            frame: frame.into(),
            frame_block: frame_block.into(),
            reserved: 0.into(),
        }
    }

    /// The extents of a segment: gap before, blocks, whether they are zero.
    type Pieces = Vec<(u64, u32, bool)>;

    fn segment() -> impl Strategy<Value = Pieces> {
        prop::collection::vec((0u64..30, 1u32..20, any::<bool>()), 0..12)
    }

    fn entries(pieces: &Pieces) -> Vec<ExtentEntry> {
        let mut next = 0;
        let mut made = Vec::new();
        for (frame, (gap, count, zero)) in pieces.iter().enumerate() {
            let frame = if *zero { FRAME_NONE } else { frame as u32 };
            made.push(entry(next + gap, *count, frame, 0));
            next += gap + u64::from(*count);
        }
        made
    }

    fn build(segments: &[Vec<ExtentEntry>], disk_blocks: u64) -> Index {
        let claims = segments.iter().zip(0..);
        let claims = claims.flat_map(|(entries, index)| claims_of(entries, index, disk_blocks));
        Index {
            runs: sweep(claims.collect()),
        }
    }

    proptest! {
        #[test]
        fn each_block_is_of_the_last_segment_that_has_it(segments in prop::collection::vec(segment(), 0..8)) {
            let segments: Vec<_> = segments.iter().map(entries).collect();
            let mut model = vec![None; BLOCKS as usize];
            for (index, entries) in segments.iter().enumerate() {
                for entry in entries {
                    let extent = entry.extent();
                    for block in extent.first_block..extent.end_block().min(BLOCKS) {
                        model[block as usize] = Some(entry.frame_index().map(|_| index));
                    }
                }
            }
            let index = build(&segments, BLOCKS);
            let mut found = vec![None; BLOCKS as usize];
            for run in index.runs() {
                let extent = run.extent();
                prop_assert!(extent.block_count > 0);
                for block in extent.first_block..extent.end_block() {
                    prop_assert_eq!(found[block as usize].replace(run.segment()), None);
                }
            }
            prop_assert_eq!(&found, &model);
            for pair in index.runs().windows(2) {
                let (one, two) = (pair[0], pair[1]);
                let touches = one.extent().end_block() == two.first_block;
                prop_assert!(one.extent().end_block() <= two.first_block);
                prop_assert!(!touches || one.segment() != two.segment(), "not merged");
            }
            // What is needed of each segment is exactly its blocks in the model.
            let needed = index.needed(segments.len());
            for (number, entries) in segments.iter().enumerate() {
                let mut blocks = 0;
                for entry in index.needed_entries(number, entries) {
                    for block in entry.extent().first_block..entry.extent().end_block() {
                        prop_assert_eq!(model[block as usize], Some(Some(number)));
                        blocks += 1;
                    }
                }
                let owned = model.iter().filter(|owner| **owner == Some(Some(number))).count();
                prop_assert_eq!(blocks, owned);
                prop_assert_eq!(needed[number], owned > 0);
            }
        }
    }

    #[test]
    fn the_parts_of_an_entry_know_their_place_in_the_frame() {
        let old = vec![entry(10, 8, 3, 2)];
        let new = vec![entry(12, 2, 0, 0), entry(15, 1, FRAME_NONE, 0)];
        let index = build(&[old.clone(), new], BLOCKS);
        let parts: Vec<_> = index
            .needed_entries(0, &old)
            .iter()
            .map(|part| {
                (
                    part.first_block.get(),
                    part.block_count.get(),
                    part.frame.get(),
                    part.frame_block.get(),
                )
            })
            .collect();
        assert_eq!(parts, [(10, 2, 3, 2), (14, 1, 3, 6), (16, 2, 3, 8)]);
    }

    #[test]
    fn zeroes_of_a_huge_disk_are_few_runs() {
        let count = u32::MAX;
        let far = u64::from(count);
        let all = vec![
            entry(0, count, FRAME_NONE, 0),
            entry(far, count, FRAME_NONE, 0),
        ];
        let index = build(&[all, vec![entry(far, 1, 0, 0)]], 1 << 40);
        let ends: Vec<_> = index
            .runs()
            .iter()
            .map(|run| run.extent().end_block())
            .collect();
        assert_eq!(ends, [far, far + 1, 2 * far]);
    }
}
