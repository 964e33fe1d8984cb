//! Checkpoint sets: bitmaps into which the oldest records of a full ring are folded.
//!
//! Overview: there are two sets, so that one can wait for its commit while the other takes what is
//! folded. A set knows the lowest and highest epoch folded into it, not which bit came with which
//! epoch; it is dropped as a whole by raising its generation.
//!
//! Order of a fold: see `fold`. Dropping: the superblock with the new generation is published and
//! synced, then the pages are punched out.
//!
//! Crash consistency: pages written by a fold that was not published only add bits. A page whose
//! check is wrong stands for all its blocks; a power cut may tear a page that a later fold adds to.
//!
//! What it does not handle: syncs.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use nix::fcntl::{FallocateFlags, fallocate};
use nix::unistd::{Whence, lseek64};

use super::format::{
    CHECKPOINT_HEAD_BYTES, CHECKPOINT_PAGE_BLOCKS, PAGE_BYTES, PageState, SetDescriptor,
    Superblock, judge_checkpoint_page, seal_checkpoint_page,
};
use crate::extent::Extent;
use crate::failpoint::{Place, reached};

/// Pages of bits that a fold collects before it writes them: 16 MiB.
const PAGES_IN_MEMORY_MAX: usize = 4096;

/// Where one set lies in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SetPlace {
    offset: u64,
    pages: u64,
}

impl SetPlace {
    /// The place of set 0 or 1.
    pub fn of(superblock: &Superblock, set: usize) -> Self {
        let pages = superblock.checkpoint_pages.get();
        let bytes = pages * PAGE_BYTES as u64;
        Self {
            offset: superblock.checkpoint_offset.get() + set as u64 * bytes,
            pages,
        }
    }

    /// Offset of a page in the file.
    pub fn page_offset(self, page: u64) -> u64 {
        self.offset + page * PAGE_BYTES as u64
    }

    fn end(self) -> u64 {
        self.page_offset(self.pages)
    }

    /// Gives the pages back to the file system.
    pub fn punch(self, file: &File) -> nix::Result<()> {
        let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let length = self.pages * PAGE_BYTES as u64;
        if length == 0 {
            return Ok(());
        }
        fallocate(file.as_fd(), mode, self.offset as i64, length as i64)
    }

    /// The first page at or after `page` that the file system has; `None` past the last.
    pub fn next_page(self, file: &File, page: u64) -> io::Result<Option<u64>> {
        if page >= self.pages {
            return Ok(None);
        }
        match lseek64(
            file.as_fd(),
            self.page_offset(page) as i64,
            Whence::SeekData,
        ) {
            Ok(offset) if (offset as u64) < self.end() => {
                Ok(Some((offset as u64 - self.offset) / PAGE_BYTES as u64))
            }
            Ok(_) | Err(nix::Error::ENXIO) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Calls with the extents of all pages of a set, in order.
    pub fn each_extent(
        self,
        file: &File,
        generation: u64,
        mut visit: impl FnMut(Extent),
    ) -> io::Result<()> {
        let mut next = 0;
        while let Some(page) = self.next_page(file, next)? {
            let (bytes, state) = self.read_page(file, page, generation)?;
            extents_of_page(&bytes, state, page)
                .into_iter()
                .for_each(&mut visit);
            next = page + 1;
        }
        Ok(())
    }

    /// Reads and judges a page. A page past the end of the file is zero.
    pub fn read_page(
        self,
        file: &File,
        page: u64,
        generation: u64,
    ) -> io::Result<(Vec<u8>, PageState)> {
        let mut bytes = vec![0; PAGE_BYTES];
        let mut filled = 0;
        while filled < PAGE_BYTES {
            let offset = self.page_offset(page) + filled as u64;
            match file.read_at(&mut bytes[filled..], offset) {
                Ok(0) => break,
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        let state = judge_checkpoint_page(&bytes, page, generation);
        Ok((bytes, state))
    }
}

/// Copies the pages of a set to another place, where they are of the same generation.
///
/// # Errors
///
/// A file cannot be read or written.
pub fn copy_pages(
    (from_file, from): (&File, SetPlace),
    (to_file, to): (&File, SetPlace),
    generation: u64,
) -> io::Result<()> {
    let mut next = 0;
    while let Some(page) = from.next_page(from_file, next)? {
        let (bytes, state) = from.read_page(from_file, page, generation)?;
        // A damaged page stays one: all its blocks go on to count.
        if state != PageState::Foreign {
            to_file.write_all_at(&bytes, to.page_offset(page))?;
        }
        next = page + 1;
    }
    Ok(())
}

/// The blocks of one page that are set, as extents in order.
pub fn extents_of_page(bytes: &[u8], state: PageState, page: u64) -> Vec<Extent> {
    let base = page * CHECKPOINT_PAGE_BLOCKS;
    match state {
        PageState::Foreign => Vec::new(),
        PageState::Damaged => {
            vec![Extent {
                first_block: base,
                block_count: CHECKPOINT_PAGE_BLOCKS,
            }]
        }
        PageState::Ours => {
            let mut extents: Vec<Extent> = Vec::new();
            let bytes = bytes[CHECKPOINT_HEAD_BYTES..].iter().enumerate();
            for (index, &byte) in bytes.filter(|(_, byte)| **byte != 0) {
                for bit in (0..8).filter(|bit| byte >> bit & 1 == 1) {
                    let block = base + index as u64 * 8 + bit;
                    match extents.last_mut() {
                        Some(last) if last.end_block() == block => last.block_count += 1,
                        _ => extents.push(Extent {
                            first_block: block,
                            block_count: 1,
                        }),
                    }
                }
            }
            extents
        }
    }
}

/// Bits on their way into a set, page by page, in bounded memory.
#[derive(Debug, Default)]
pub struct Folding {
    pages: BTreeMap<u64, Box<[u8]>>,
}

impl Folding {
    /// Whether the collected pages should be written before more is added.
    pub fn is_full(&self) -> bool {
        self.pages.len() >= PAGES_IN_MEMORY_MAX
    }

    /// Adds the blocks of one record from `first_block` on, as far as memory allows; returns the
    /// first block that was not added.
    pub fn add(&mut self, first_block: u64, end_block: u64) -> u64 {
        let mut block = first_block;
        while block < end_block && !self.is_full() {
            let page = block / CHECKPOINT_PAGE_BLOCKS;
            let end = end_block.min((page + 1) * CHECKPOINT_PAGE_BLOCKS);
            let bits = self
                .pages
                .entry(page)
                .or_insert_with(|| vec![0; PAGE_BYTES - CHECKPOINT_HEAD_BYTES].into());
            let base = page * CHECKPOINT_PAGE_BLOCKS;
            for index in block - base..end - base {
                bits[index as usize / 8] |= 1 << (index % 8);
            }
            block = end;
        }
        block
    }

    /// Adds the collected bits to the pages of a set, and starts anew. Returns the pages written.
    ///
    /// # Errors
    ///
    /// The file cannot be read or written; what has been written only adds bits.
    pub fn write(&mut self, file: &File, place: SetPlace, set: &SetDescriptor) -> io::Result<u64> {
        let generation = set.generation.get();
        let mut written = 0;
        for (page, bits) in std::mem::take(&mut self.pages) {
            let (mut bytes, state) = place.read_page(file, page, generation)?;
            match state {
                PageState::Ours => {}
                PageState::Foreign => bytes.fill(0),
                PageState::Damaged => bytes.fill(0xff),
            }
            for (target, &source) in bytes[CHECKPOINT_HEAD_BYTES..].iter_mut().zip(&bits) {
                *target |= source;
            }
            seal_checkpoint_page(&mut bytes, page, generation);
            file.write_all_at(&bytes, place.page_offset(page))?;
            written += 1;
            reached(Place::FoldAfterPageBeforeNext);
        }
        Ok(written)
    }
}
