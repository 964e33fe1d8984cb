//! The thread that copies the blocks of a disk before they are overwritten.
//!
//! Overview: writes that have to wait are left here as jobs. One thread for each disk does them in the order in
//! which they come, so that two writes to one block need no lock between them: the second finds it copied.
//!
//! Order: a job of an epoch that has ended is done at once. Any other is done when it is known which blocks belong to the epoch and no write of the epoch to the same
//! blocks is in flight; until then it is set aside, and others go on. Then the blocks are copied and the
//! write is woken, whether or not that succeeded.
//!
//! Where the old content is in the page cache, the worker copies the block itself ([`Copier::copy_now`]): that takes less time
//! than to wake a thread, let alone one that has to wait for a processor. One thread at a time copies.
//!
//! Errors: whatever fails, a panic included, gives the epoch up and wakes the write.
//!
//! What it does not handle: what a failure means (`preserve::area`).

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, unbounded};

use super::Machine;
use super::frozen::{Frozen, Members};
use crate::error::{Error, Result};
use crate::extent::{BLOCK_SIZE, Extent};
use crate::journal::Waiter;
use crate::journal::mapping::PageBuffer;
use crate::preserve::area::{BlockSource, COPY_BLOCKS_MAX, InMemory};
use crate::preserve::format::Failure;

/// Blocks of a write for which the worker copies itself, at most.
const NOW_BLOCKS_MAX: u64 = 4;
/// Time between two looks at what has been set aside.
const LOOK_INTERVAL: Duration = Duration::from_micros(50);

/// A write that waits.
pub struct CopyJob {
    /// The epoch whose blocks it would overwrite.
    pub frozen: Arc<Frozen>,
    /// The blocks.
    pub extent: Extent,
    /// Who is told.
    pub waiter: Arc<dyn Waiter>,
    /// What the write is called there.
    pub token: usize,
}

enum Order {
    Copy(CopyJob),
    End,
}

/// Memory for blocks that are copied, and for those that were read beforehand.
struct Buffers {
    copied: PageBuffer,
    read: PageBuffer,
}

/// The way to the thread, and what it has done.
pub struct Copier {
    /// Held by whoever copies. There is no memory before the thread runs.
    buffers: Mutex<Option<Buffers>>,
    orders: Sender<Order>,
    to_do: Receiver<Order>,
    /// Blocks that were copied.
    pub copied_blocks: AtomicU64,
    /// Writes that had to wait.
    pub waits: AtomicU64,
}

impl Default for Copier {
    fn default() -> Self {
        let (orders, to_do) = unbounded();
        Self {
            buffers: Mutex::default(),
            orders,
            to_do,
            copied_blocks: AtomicU64::new(0),
            waits: AtomicU64::new(0),
        }
    }
}

impl Copier {
    /// Leaves a write that waits. It is woken once.
    pub fn leave(&self, job: CopyJob) {
        self.waits.fetch_add(1, Ordering::Relaxed);
        // Never refused: the receiver is here too.
        let _sent = self.orders.send(Order::Copy(job));
    }

    /// Copies on the caller's thread what a write would overwrite, if the old content is in the page cache and nobody else
    /// copies at this moment. Returns whether it is done. The epoch is settled, and no write of it to
    /// these blocks is in flight.
    pub fn copy_now(
        &self,
        frozen: &Frozen,
        members: Members<'_>,
        extent: Extent,
        source: &dyn BlockSource,
    ) -> bool {
        let size_bytes = frozen.area.subject().size_bytes;
        let offset = extent.offset_bytes();
        if extent.block_count > NOW_BLOCKS_MAX || offset + extent.length_bytes() > size_bytes {
            return false;
        }
        let Ok(mut buffers) = self.buffers.try_lock() else {
            return false;
        };
        let Some(Buffers { copied, read }) = &mut *buffers else {
            return false;
        };
        let bytes = &mut read.bytes_mut()[..extent.length_bytes() as usize];
        if !source.read_cached(offset, bytes) {
            return false;
        }
        let read = InMemory {
            offset_bytes: offset,
            bytes,
        };
        let count = frozen.copy(extent, members, &read, copied);
        self.copied_blocks.fetch_add(count, Ordering::Relaxed);
        true
    }

    fn lock(&self) -> MutexGuard<'_, Option<Buffers>> {
        // They hold bytes and have no state to be broken.
        self.buffers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the thread. No write may wait any more.
    pub fn end(&self) {
        let _sent = self.orders.send(Order::End);
    }

    /// Copies until it is told to end.
    ///
    /// # Errors
    ///
    /// Memory is short.
    pub fn run(&self, machine: &Machine, disk: usize, source: &dyn BlockSource) -> Result<()> {
        let buffer = |blocks: u64| {
            PageBuffer::new((blocks * BLOCK_SIZE) as usize)
                .map_err(|error| Error::io("Cannot allocate a buffer to preserve blocks", error))
        };
        *self.lock() = Some(Buffers {
            copied: buffer(COPY_BLOCKS_MAX)?,
            read: buffer(NOW_BLOCKS_MAX)?,
        });
        let mut aside: Vec<CopyJob> = Vec::new();
        loop {
            let order = match aside.is_empty() {
                true => self.to_do.recv().ok(),
                false => self.to_do.recv_timeout(LOOK_INTERVAL).ok(),
            };
            match order {
                Some(Order::Copy(job)) => aside.push(job),
                Some(Order::End) => return Ok(()),
                None => {}
            }
            aside.retain(|job| {
                let attempt = || self.attempt(machine, disk, job, source);
                // Whatever goes wrong here, the guest goes on.
                let done = catch_unwind(AssertUnwindSafe(attempt));
                !done.unwrap_or_else(|_| {
                    job.frozen.area.fail(Failure::Io);
                    job.waiter.wake(job.token);
                    true
                })
            });
        }
    }

    /// Does a job, if it can be done now.
    fn attempt(
        &self,
        machine: &Machine,
        disk: usize,
        job: &CopyJob,
        source: &dyn BlockSource,
    ) -> bool {
        let frozen = &job.frozen;
        if frozen.is_over() {
            // Writes of the epoch after the next count as its own, and may wait for this one.
            job.waiter.wake(job.token);
            return true;
        }
        if !frozen.is_settled() || machine.is_in_flight(disk, job.extent, frozen.epoch) {
            return false;
        }
        if let (Some(members), Some(buffers)) =
            (machine.members(disk, frozen.epoch), &mut *self.lock())
        {
            let copied = frozen.copy(job.extent, members, source, &mut buffers.copied);
            self.copied_blocks.fetch_add(copied, Ordering::Relaxed);
        }
        job.waiter.wake(job.token);
        true
    }
}
