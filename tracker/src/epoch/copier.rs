//! The thread that copies the blocks of a disk before they are overwritten.
//!
//! Overview: writes that have to wait are left here as jobs. One thread for each disk does them in the order in
//! which they come, so that two writes to one block need no lock between them: the second finds it copied.
//!
//! Order: a job of an epoch that has ended is done at once. Any other is done when it is known which blocks belong to the epoch and no write of the epoch to the same
//! blocks is in flight; until then it is set aside, and others go on. Then the blocks are copied and the
//! write is woken, whether or not that succeeded.
//!
//! Errors: whatever fails, a panic included, gives the epoch up and wakes the write.
//!
//! What it does not handle: what a failure means (`preserve::area`).

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, unbounded};

use super::Machine;
use super::frozen::Frozen;
use crate::error::{Error, Result};
use crate::extent::{BLOCK_SIZE, Extent};
use crate::journal::Waiter;
use crate::journal::mapping::PageBuffer;
use crate::preserve::area::{BlockSource, COPY_BLOCKS_MAX};
use crate::preserve::format::Failure;

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

/// The way to the thread, and what it has done.
pub struct Copier {
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
        let bytes = (COPY_BLOCKS_MAX * BLOCK_SIZE) as usize;
        let mut buffer = PageBuffer::new(bytes)
            .map_err(|error| Error::io("Cannot allocate a buffer to preserve blocks", error))?;
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
                let attempt = || self.attempt(machine, disk, job, source, &mut buffer);
                // Whatever goes wrong here, the guest goes on. The buffer holds bytes and has no state to be broken.
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
        buffer: &mut PageBuffer,
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
        if let Some(members) = machine.members(disk, frozen.epoch) {
            let copied = frozen.copy(job.extent, members, source, buffer);
            self.copied_blocks.fetch_add(copied, Ordering::Relaxed);
        }
        job.waiter.wake(job.token);
        true
    }
}
