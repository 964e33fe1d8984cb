//! The order that two processes keep over a block without a lock. Generic over the words, so that a model
//! checker runs the same lines.
//!
//! Two words have a bit for the block. `preserved` is set by the tracker alone, `captured` by the shipper alone;
//! neither is ever cleared.
//!
//! Tracker, before it overwrites a block of the epoch: where one of the bits is set, nothing. Otherwise it
//! copies the block to the preserve file; sets `preserved`; only then overwrites.
//!
//! Shipper: reads the block from the disk; looks at `preserved`; where that is set, takes the copy instead; sets
//! `captured`.
//!
//! Why it is right: if the shipper finds `preserved` clear, the overwrite had not been submitted when it had
//! finished reading, so it read the old content. If it finds it set, the copy is complete. The tracker
//! skips the copy only where the shipper has its content already, or where the copy is made. Each side
//! does two things, a transfer and a look at what the other does next, in opposite order; that needs the
//! full fences below, since a transfer through the page cache orders nothing by itself. Any thread of the tracker
//! that overwrites a block because it has found a bit set has a fence of its own in between.
//!
//! Where a block cannot be copied, the failure is noted as a bit is, before the block is overwritten; the shipper looks
//! at it, behind a fence, when it has read everything.

use std::sync::atomic::{AtomicU64, Ordering};

/// A word that both processes see.
pub trait Word {
    /// What it holds; what was written before its bits were set is seen after this.
    fn load_acquire(&self) -> u64;
    /// Sets bits; what was written before is seen by whoever sees them.
    fn set_release(&self, bits: u64);
    /// A full fence between what comes before and after.
    fn fence();
}

impl Word for AtomicU64 {
    fn load_acquire(&self) -> u64 {
        self.load(Ordering::Acquire)
    }

    fn set_release(&self, bits: u64) {
        self.fetch_or(bits, Ordering::AcqRel);
    }

    fn fence() {
        std::sync::atomic::fence(Ordering::SeqCst);
    }
}

/// Tracker: which of these blocks have to be copied before they are overwritten.
pub fn to_copy<W: Word>(blocks: u64, captured: &W, preserved: &W) -> u64 {
    let left = uncopied(blocks, preserved);
    if left == 0 {
        return 0;
    }
    left & !captured.load_acquire()
}

/// Tracker: which of these blocks are not copied. Those that are may be overwritten.
pub fn uncopied<W: Word>(blocks: u64, preserved: &W) -> u64 {
    let copied = blocks & preserved.load_acquire();
    if copied != 0 {
        // The thread that has set the bits a moment ago may not have come to its fence.
        W::fence();
    }
    blocks & !copied
}

/// Tracker: whether the epoch is given up, by whatever thread. Then blocks of it may be overwritten.
pub fn is_given_up<W: Word>(failure: &W) -> bool {
    let given_up = failure.load_acquire() != 0;
    if given_up {
        W::fence();
    }
    given_up
}

/// Tracker: the copies of these blocks are complete. After it the blocks may be overwritten.
pub fn copied<W: Word>(blocks: u64, preserved: &W) {
    preserved.set_release(blocks);
    W::fence();
}

/// Shipper: which of these blocks, that were read a moment ago, have to be taken from their copies.
pub fn to_take<W: Word>(blocks: u64, preserved: &W) -> u64 {
    W::fence();
    blocks & preserved.load_acquire()
}

/// Shipper: the content of these blocks is in its hands; the tracker need not copy them any more.
pub fn taken<W: Word>(blocks: u64, captured: &W) {
    captured.set_release(blocks);
}
