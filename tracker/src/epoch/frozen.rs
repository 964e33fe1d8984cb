//! A closed epoch of one disk whose blocks are kept as they are until they are captured.
//!
//! Overview: a write of a later epoch asks [`Frozen::must_copy`]. Where it has to wait it is left with the thread
//! that copies the blocks of the disk (`copier`), and goes on when that wakes it.
//!
//! Order: it is there before the clock moves, so every write of the next epoch finds it. It is settled when no
//! write of its own epoch is being admitted any more; only then it is known which blocks belong to it.
//! Until then, for the time of an admission, writes that come are left waiting. A write of its own that is still on its way to
//! the disk holds up only those that overlap it (`flights`), and only they wait for it.
//!
//! On any failure the epoch is given up and nothing waits for it any more: the guest goes first.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, fence};

use super::filter::Filter;
use crate::error::Result;
use crate::extent::{Epoch, Extent};
use crate::journal::mapping::PageBuffer;
use crate::preserve::area::{Area, BlockSource, COPY_BLOCKS_MAX, remove};
use crate::preserve::format::{Failure, PAGE_WORDS, Subject};

/// The blocks of the closed epoch, as sets that take no more.
#[derive(Clone, Copy)]
pub struct Members<'a> {
    /// Blocks that were written in it.
    pub own: &'a Filter,
    /// Blocks of earlier epochs that were merged into it.
    pub carried: &'a Filter,
}

impl Members<'_> {
    fn word(&self, index: u64) -> u64 {
        self.own.word(index) | self.carried.word(index)
    }

    fn has_page(&self, page: u64) -> bool {
        self.own.has_page(page) || self.carried.has_page(page)
    }
}

/// The closed epoch of one disk.
#[derive(Debug)]
pub struct Frozen {
    /// Its number.
    pub epoch: Epoch,
    /// Where its blocks are kept.
    pub area: Area,
    settled: AtomicBool,
    over: AtomicBool,
}

impl Frozen {
    /// Gets everything ready for an epoch that is about to be closed.
    ///
    /// # Errors
    ///
    /// The preserve file cannot be made.
    pub fn prepare(path: &Path, subject: Subject, budget_bytes: u64) -> Result<Arc<Self>> {
        Ok(Arc::new(Self {
            epoch: subject.epoch,
            area: Area::create(path, subject, budget_bytes)?,
            settled: AtomicBool::new(false),
            over: AtomicBool::new(false),
        }))
    }

    /// Goes on with a closed epoch that an earlier tracker has left, and tells which blocks belong to it.
    ///
    /// # Errors
    ///
    /// Its preserve file is not there, not of this epoch, or the epoch is given up.
    pub fn resume(
        path: &Path,
        subject: &Subject,
        budget_bytes: u64,
        own: &Filter,
    ) -> Result<Arc<Self>> {
        let area = Area::resume(path, subject, budget_bytes)?;
        area.each_changed_word(|index, bits| own.insert_word(index, bits))?;
        Ok(Arc::new(Self {
            epoch: subject.epoch,
            area,
            settled: AtomicBool::new(true),
            over: AtomicBool::new(false),
        }))
    }

    /// No write of the epoch is being admitted any more.
    pub fn settle(&self) {
        self.settled.store(true, Ordering::Release);
    }

    /// Tells the shipper which blocks belong to the epoch.
    ///
    /// # Errors
    ///
    /// The preserve file cannot be written.
    pub fn publish(&self, members: Members<'_>, hot: &Filter) -> Result<()> {
        for page in (0..self.area.pages()).filter(|&page| members.has_page(page)) {
            let words = |of: &dyn Fn(u64) -> u64| {
                std::array::from_fn(|offset| of(page * PAGE_WORDS + offset as u64))
            };
            let changed = words(&|index| members.word(index));
            self.area
                .write_maps(page, &changed, &words(&|index| hot.word(index)))?;
        }
        Ok(())
    }

    /// Nobody needs the blocks any more. With a failure, whoever reads them is told.
    pub fn end(&self, failure: Option<Failure>) -> Result<()> {
        if let Some(failure) = failure {
            self.area.fail(failure);
        }
        self.over.store(true, Ordering::Release);
        remove(self.area.path())
    }

    /// Whether a write of a later epoch has to wait until blocks are copied.
    pub fn must_copy(&self, extent: Extent, members: Members<'_>) -> bool {
        if self.is_over() {
            return false;
        }
        if !self.settled.load(Ordering::Acquire) {
            return true;
        }
        let to_copy = |(index, mask)| self.area.to_copy(index, mask, members.word(index));
        extent.words().any(|word| to_copy(word) != 0)
    }

    /// Whether it is known which blocks belong to the epoch.
    pub fn is_settled(&self) -> bool {
        self.settled.load(Ordering::Acquire)
    }

    /// Whether nobody needs its blocks any more. Whoever finds it so may overwrite them; whoever has read one, and finds it
    /// not so after a fence, has read what nobody had overwritten without a copy.
    pub fn is_over(&self) -> bool {
        let over = self.over.load(Ordering::Acquire);
        if over {
            fence(Ordering::SeqCst);
        }
        over
    }

    /// Copies what has to be copied of an extent. Returns the number of blocks. One thread at a time.
    pub fn copy(
        &self,
        extent: Extent,
        members: Members<'_>,
        source: &dyn BlockSource,
        buffer: &mut PageBuffer,
    ) -> u64 {
        let mut copied = 0;
        let (mut next, end) = (extent.first_block, extent.end_block());
        while next < end {
            let Some(run) = self.next_run(next, end, members) else {
                break;
            };
            self.area
                .copy(run, |index| members.word(index), source, buffer);
            copied += run.block_count;
            next = run.end_block();
        }
        copied
    }

    /// The next blocks that have to be copied, as many as are copied at once.
    fn next_run(&self, first_block: u64, end: u64, members: Members<'_>) -> Option<Extent> {
        if self.is_over() {
            return None;
        }
        let needed = |block: u64| {
            let index = block / 64;
            self.area
                .to_copy(index, 1 << (block % 64), members.word(index))
                != 0
        };
        let first_block = (first_block..end).find(|&block| needed(block))?;
        let last = end.min(first_block + COPY_BLOCKS_MAX);
        let after = (first_block + 1..last)
            .find(|&block| !needed(block))
            .unwrap_or(last);
        Some(Extent {
            first_block,
            block_count: after - first_block,
        })
    }
}
