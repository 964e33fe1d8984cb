//! Threads that carry out disk operations where there is no io_uring.
//!
//! Overview: each worker has a pool of its own, so that it shares nothing and its pool ends with it. A
//! job owns its buffer; the thread that takes the job hands both back as a completion and rings a
//! bell, which the worker waits for along with its sockets. Threads are started as more jobs wait
//! than there are threads: a tracker at rest has none, and containers limit how many there may be.
//!
//! Order: jobs are taken in the order in which they were given and finish in any. A pool that is
//! dropped finishes all of its jobs first: a write that was handed over is never lost.
//!
//! Errors: a job that panics is answered with EIO, as a disk that fails is. Where no thread can be
//! had, the worker does the job itself.
//!
//! Durable writes are a write and a sync here; which of the two has failed is not told, just as by
//! the one call of io_uring that does both, and so either counts as a failed sync.

use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use crossbeam_channel::{Receiver, Sender, unbounded};
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, PosixFadviseAdvice, fallocate, posix_fadvise};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::transfer::{Completion, Held};
use crate::disk::Disk;

/// Most threads of one pool: how deep one worker reads a disk.
const THREADS_MAX: usize = 16;

/// What is done to a disk.
#[derive(Clone, Debug)]
pub enum Work {
    /// Read into a range of the buffer.
    Read(u64, Range<usize>),
    /// Write a range of the buffer; durably, if so said.
    Write(u64, Range<usize>, bool),
    /// Sync the data.
    Sync,
    /// `fallocate(2)`: mode, offset and length.
    Allocate(i32, u64, u64),
    /// Bring a range into the page cache: offset and length.
    Prefetch(u64, u64),
}

/// One operation on a disk.
pub struct Job {
    /// What the submitter calls it.
    pub tag: u64,
    /// The disk.
    pub disk: Arc<Disk>,
    /// What is done.
    pub work: Work,
    /// The memory.
    pub held: Held,
}

impl Job {
    fn carry_out(mut self) -> Completion {
        // What a panic leaves behind is bytes in a buffer, which have no state to be broken.
        let done = catch_unwind(AssertUnwindSafe(|| self.attempt()));
        Completion {
            tag: self.tag,
            result: match done {
                Ok(Ok(count)) => i32::try_from(count).unwrap_or(i32::MAX),
                Ok(Err(error)) => -error.raw_os_error().unwrap_or(libc::EIO),
                Err(_panic) => -libc::EIO,
            },
            held: self.held,
        }
    }

    fn attempt(&mut self) -> io::Result<usize> {
        let file = self.disk.file();
        match (&self.work, &mut self.held) {
            (Work::Read(offset, range), Held::Buffer(buffer)) => {
                file.read_at(&mut buffer.bytes_mut()[range.clone()], *offset)
            }
            (Work::Write(offset, range, durable), Held::Buffer(buffer)) => {
                let count = file.write_at(&buffer.bytes()[range.clone()], *offset)?;
                if *durable {
                    file.sync_data()?;
                }
                Ok(count)
            }
            (Work::Sync, _) => file.sync_data().map(|()| 0),
            (Work::Allocate(mode, offset, length), _) => {
                let mode = FallocateFlags::from_bits_retain(*mode);
                fallocate(file, mode, signed(*offset)?, signed(*length)?)?;
                Ok(0)
            }
            (Work::Prefetch(offset, length), _) => {
                let advice = PosixFadviseAdvice::POSIX_FADV_WILLNEED;
                posix_fadvise(file, signed(*offset)?, signed(*length)?, advice)?;
                Ok(0)
            }
            (Work::Read(..) | Work::Write(..), _) => Err(Errno::EFAULT.into()),
        }
    }
}

fn signed(value: u64) -> io::Result<i64> {
    i64::try_from(value).map_err(|_| Errno::EINVAL.into())
}

/// Tells the worker that there are completions, once until it has looked.
struct Bell {
    descriptor: EventFd,
    rung: AtomicBool,
}

impl Bell {
    fn ring(&self) {
        if !self.rung.swap(true, Ordering::AcqRel) {
            // Fails only when the counter is full, and then it can be read as well.
            let _full = self.descriptor.write(1);
        }
    }

    /// Before the completions are taken, so that none comes unnoticed after they were.
    fn reset(&self) {
        let _count = self.descriptor.read();
        // A swap, not a store: it makes visible what was reported by whoever found it rung.
        self.rung.swap(false, Ordering::AcqRel);
    }
}

/// The pool of one worker.
pub struct Pool {
    /// `None` when the pool ends, which ends the threads.
    jobs: Option<Sender<Job>>,
    waiting: Receiver<Job>,
    finished: Receiver<Completion>,
    report: Sender<Completion>,
    bell: Arc<Bell>,
    threads: Vec<JoinHandle<()>>,
    in_flight: usize,
    warned: bool,
}

impl Pool {
    /// A pool without threads.
    ///
    /// # Errors
    ///
    /// The eventfd cannot be had.
    pub fn new() -> io::Result<Self> {
        let (jobs, waiting) = unbounded();
        let (report, finished) = unbounded();
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        Ok(Self {
            jobs: Some(jobs),
            waiting,
            finished,
            report,
            bell: Arc::new(Bell {
                descriptor: EventFd::from_value_and_flags(0, flags)?,
                rung: AtomicBool::new(false),
            }),
            threads: Vec::new(),
            in_flight: 0,
            warned: false,
        })
    }

    /// Can be read when there are completions.
    pub fn bell(&self) -> &EventFd {
        &self.bell.descriptor
    }

    /// Has a job done.
    pub fn submit(&mut self, job: Job) {
        self.in_flight += 1;
        if self.in_flight > self.threads.len() && self.threads.len() < THREADS_MAX {
            self.hire();
        }
        let refused = match &self.jobs {
            Some(jobs) if !self.threads.is_empty() => jobs.send(job).err().map(|error| error.0),
            _ => Some(job),
        };
        if let Some(job) = refused {
            // Not lost: this pool holds the other end.
            let _sent = self.report.send(job.carry_out());
            self.bell.ring();
        }
    }

    fn hire(&mut self) {
        let (waiting, report) = (self.waiting.clone(), self.report.clone());
        let bell = Arc::clone(&self.bell);
        let hired = std::thread::Builder::new()
            .name("disk".to_owned())
            .spawn(move || {
                for job in waiting {
                    // Fails when the worker has gone, and nobody is left to be told.
                    let _sent = report.send(job.carry_out());
                    bell.ring();
                }
            });
        match hired {
            Ok(thread) => self.threads.push(thread),
            Err(error) if !self.warned => {
                self.warned = true;
                let count = self.threads.len();
                tracing::warn!("A worker goes on with {count} threads for its disks: {error}");
            }
            Err(_) => {}
        }
    }

    /// Takes what is finished.
    pub fn collect(&mut self, completions: &mut Vec<Completion>) {
        self.bell.reset();
        for completion in self.finished.try_iter() {
            self.in_flight -= 1;
            completions.push(completion);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.jobs = None;
        for thread in self.threads.drain(..) {
            // A thread catches the panics of its jobs, and has none of its own.
            let _panicked = thread.join();
        }
    }
}
