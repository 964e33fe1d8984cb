//! What carries out a worker's operations: an io_uring, or where there is none, threads.
//!
//! Both do the same: an operation takes its memory along and gives it back with its completion,
//! whose result is a count or a negative errno. One worker has one driver, made by its own thread.

use std::fmt;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::buffer::Buffer;
use super::pool::Work;
use super::threads::Threads;
use super::transfer::{Completion, Held, SendBatch};
use super::uring::Ring;
use crate::disk::Disk;

/// What a user may ask for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum EngineChoice {
    /// io_uring, or threads where it cannot be had
    #[default]
    Auto,
    /// io_uring or nothing
    #[value(name = "io_uring")]
    IoUring,
    /// A pool of threads
    Threads,
}

/// What is in use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EngineKind {
    /// io_uring. The only one of trackers that do not say which they have.
    #[default]
    IoUring,
    /// A pool of threads.
    Threads,
}

impl fmt::Display for EngineKind {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::IoUring => "io_uring",
            Self::Threads => "threads",
        })
    }
}

/// What failed when a driver could not be had, and where to look.
pub fn explain(kind: EngineKind, error: &io::Error) -> &'static str {
    match (kind, error.raw_os_error()) {
        (EngineKind::Threads, _) => "Cannot set up a worker without io_uring",
        (EngineKind::IoUring, Some(libc::EPERM | libc::EACCES)) => {
            "Cannot set up an io_uring, which is forbidden here: see the sysctl \
             kernel.io_uring_disabled and the seccomp profile of the container, or use threads with \
             --engine threads"
        }
        (EngineKind::IoUring, Some(libc::ENOSYS)) => {
            "Cannot set up an io_uring, which this kernel lacks or the seccomp profile of the \
             container hides: allow it, or use threads with --engine threads"
        }
        (EngineKind::IoUring, Some(libc::ENOMEM)) => {
            "Cannot set up an io_uring, for which there is no memory: see the memory limit of the \
             container or service"
        }
        (EngineKind::IoUring, _) => "Cannot set up an io_uring: use threads with --engine threads",
    }
}

/// The driver of one worker. Belongs to the thread that makes it.
pub enum Driver {
    /// An io_uring.
    Uring(Box<Ring>),
    /// Epoll and a pool of threads.
    Threads(Box<Threads>),
}

impl Driver {
    /// A driver with nothing in flight.
    ///
    /// # Errors
    ///
    /// The system does not let us have it.
    pub fn new(kind: EngineKind) -> io::Result<Self> {
        Ok(match kind {
            EngineKind::IoUring => Self::Uring(Box::new(Ring::new()?)),
            EngineKind::Threads => Self::Threads(Box::new(Threads::new()?)),
        })
    }

    /// Names of the setup flags of the io_uring.
    pub fn features(&self) -> &[&'static str] {
        match self {
            Self::Uring(ring) => ring.features(),
            Self::Threads(_) => &[],
        }
    }

    /// Takes note of a socket, before anything is done to it.
    ///
    /// # Errors
    ///
    /// Memory or another allowance is exhausted.
    pub fn add_socket(&mut self, socket: BorrowedFd<'_>) -> io::Result<()> {
        match self {
            Self::Uring(_) => Ok(()),
            Self::Threads(threads) => threads.add_socket(socket),
        }
    }

    /// Receives into a range of the buffer; with `all`, until the range is full or the stream ends.
    pub fn receive(
        &mut self,
        socket: BorrowedFd<'_>,
        buffer: Buffer,
        range: Range<usize>,
        all: bool,
        tag: u64,
    ) {
        match self {
            Self::Uring(ring) => ring.receive(socket.as_raw_fd(), buffer, range, all, tag),
            Self::Threads(threads) => threads.receive(socket, buffer, range, all, tag),
        }
    }

    /// Sends the batch, or as much of it as one call takes.
    pub fn send(&mut self, socket: BorrowedFd<'_>, batch: Box<SendBatch>, tag: u64) {
        match self {
            Self::Uring(ring) => ring.send(socket.as_raw_fd(), batch, tag),
            Self::Threads(threads) => threads.send(socket, batch, tag),
        }
    }

    /// Reads from a disk into a range of the buffer.
    pub fn read(
        &mut self,
        disk: &Arc<Disk>,
        offset: u64,
        buffer: Buffer,
        range: Range<usize>,
        tag: u64,
    ) {
        match self {
            Self::Uring(ring) => ring.read(disk.as_raw_fd(), offset, buffer, range, tag),
            Self::Threads(threads) => {
                threads.submit(disk, Work::Read(offset, range), Held::Buffer(buffer), tag);
            }
        }
    }

    /// Writes a range of the buffer to a disk; with `durable`, to the platter.
    pub fn write(
        &mut self,
        disk: &Arc<Disk>,
        offset: u64,
        buffer: Buffer,
        range: Range<usize>,
        durable: bool,
        tag: u64,
    ) {
        match self {
            Self::Uring(ring) => ring.write(disk.as_raw_fd(), offset, buffer, range, durable, tag),
            Self::Threads(threads) => {
                let work = Work::Write(offset, range, durable);
                threads.submit(disk, work, Held::Buffer(buffer), tag);
            }
        }
    }

    /// Syncs the data of a disk.
    pub fn sync(&mut self, disk: &Arc<Disk>, tag: u64) {
        match self {
            Self::Uring(ring) => ring.sync(disk.as_raw_fd(), tag),
            Self::Threads(threads) => threads.submit(disk, Work::Sync, Held::Nothing, tag),
        }
    }

    /// `fallocate(2)` with a mode.
    pub fn allocate(&mut self, disk: &Arc<Disk>, mode: i32, offset: u64, length: u64, tag: u64) {
        match self {
            Self::Uring(ring) => ring.allocate(disk.as_raw_fd(), mode, offset, length, tag),
            Self::Threads(threads) => {
                let work = Work::Allocate(mode, offset, length);
                threads.submit(disk, work, Held::Nothing, tag);
            }
        }
    }

    /// Has a range of a disk brought into the page cache.
    pub fn prefetch(&mut self, disk: &Arc<Disk>, offset: u64, length: u32, tag: u64) {
        match self {
            Self::Uring(ring) => ring.prefetch(disk.as_raw_fd(), offset, length, tag),
            Self::Threads(threads) => {
                let work = Work::Prefetch(offset, length.into());
                threads.submit(disk, work, Held::Nothing, tag);
            }
        }
    }

    /// Completes once when a descriptor can be read; that is asked for anew each time.
    pub fn poll_readable(&mut self, descriptor: BorrowedFd<'_>, tag: u64) {
        match self {
            Self::Uring(ring) => ring.poll_readable(descriptor.as_raw_fd(), tag),
            Self::Threads(threads) => threads.poll_readable(descriptor, tag),
        }
    }

    /// Every write of this driver keeps a thread until it is done; one into the page cache costs
    /// less than the way to another thread.
    pub fn writes_block(&self) -> bool {
        matches!(self, Self::Threads(_))
    }

    /// Looks for a completion without sleeping, for so long at most. Returns whether there is one.
    ///
    /// # Errors
    ///
    /// As [`Self::wait`].
    pub fn watch(&mut self, time: Duration) -> io::Result<bool> {
        match self {
            Self::Uring(ring) => ring.watch(time),
            // Its threads may need the processor.
            Self::Threads(_) => Ok(false),
        }
    }

    /// Waits for a completion if `block` says so, then gives out all that there are.
    ///
    /// # Errors
    ///
    /// Waiting fails for a reason that trying again does not mend.
    pub fn wait(&mut self, completions: &mut Vec<Completion>, block: bool) -> io::Result<()> {
        match self {
            Self::Uring(ring) => ring.wait(completions, block),
            Self::Threads(threads) => threads.wait(completions, block),
        }
    }
}
