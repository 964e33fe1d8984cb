//! The disk operations that one request takes, one after the other.
//!
//! Order: data first, then, for a request with FUA, the sync; a step begins when the one before
//! has completed. A range to be made zero is punched out (or, with NO_HOLE, zeroed in place); where
//! the file system can do neither, zeroes are written, unless FAST_ZERO forbids it.
//!
//! A request is worked at in parts, one after the other: a long TRIM or WRITE_ZEROES in bounded
//! pieces, a READ from one hole to the next. Who drives the parts is `dispatch`.
//!
//! Errors of the disk go to the client as they are. A failed sync is never retried: the kernel
//! calls the pages clean that it failed to write, so a second sync would succeed over lost data.

use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::buffer::{Buffer, BufferPool, HEAD_BYTES};
use super::driver::Driver;
use super::transfer::Held;
use crate::disk::Disk;
use crate::epoch::{self, Admission};
use crate::extent::Extent;
use crate::failpoint::{self, Place, reached};
use crate::nbd::request::{Command, Request};
use crate::nbd::wire::ReplyError;

/// Largest write that a worker makes itself, where the ring would hand it to a kernel thread. A
/// larger one takes long enough that other connections gain from the kernel thread.
pub const INLINE_BYTES_MAX: usize = 64 << 10;
/// Zeroes that are written at once where a range cannot be punched out.
const ZERO_BYTES: usize = 256 << 10;

/// Most bytes of a TRIM, WRITE_ZEROES or CACHE that are worked at in one part: so much is done in
/// one call of the kernel, and so much a cut of an epoch may have to wait for.
const PART_BYTES_MAX: u64 = 1 << 30;
/// Most bytes that one CACHE brings into the page cache; it is advice, and more would drive out
/// what others use.
const CACHE_BYTES_MAX: u64 = 64 << 20;

/// How a step left an operation.
pub enum Outcome {
    /// Another step is in flight.
    Pending,
    /// The part is done.
    Done(Result<(), ReplyError>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Transfer,
    Allocate,
    Zero,
    Prefetch,
    Sync,
}

/// A request that is being carried out.
pub struct Operation {
    /// Index of the connection that asked.
    pub connection: usize,
    /// Index of the disk.
    pub disk: usize,
    /// What was asked.
    pub request: Request,
    /// The bytes that are being worked at; what lies before them is done.
    pub part: Range<u64>,
    /// Parts that were begun.
    pub parts: u32,
    /// What admission said, if the part changes the disk.
    pub admission: Option<Admission>,
    /// Data of the part from [`HEAD_BYTES`] on; gone while the kernel has them.
    pub buffer: Option<Buffer>,
    /// A sync that belonged to this request failed.
    pub sync_failed: bool,
    done_bytes: usize,
    step: Step,
}

/// How the journal calls a command; `None` if it changes nothing.
pub fn tracked(command: Command) -> Option<epoch::Operation> {
    match command {
        Command::Write => Some(epoch::Operation::Write),
        Command::Trim => Some(epoch::Operation::Trim),
        Command::WriteZeroes { .. } => Some(epoch::Operation::WriteZeroes),
        Command::Read { .. } | Command::Flush | Command::Cache | Command::BlockStatus { .. } => {
            None
        }
    }
}

/// Writes at once, on the caller's thread.
pub fn write_now(disk: &Disk, offset: u64, data: &[u8]) -> Result<(), ReplyError> {
    failpoint::attempt(Place::WriteAfterAdmissionBeforeData, disk.file())
        .and_then(|()| disk.file().write_all_at(data, offset))
        .map_err(|error| ReplyError::from_errno(errno_of(&error)))
}

fn errno_of(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(libc::EIO)
}

impl Operation {
    /// An operation that has not begun.
    pub fn new(connection: usize, disk: usize, request: Request, buffer: Option<Buffer>) -> Self {
        Self {
            connection,
            disk,
            request,
            part: request.offset..request.offset,
            parts: 0,
            admission: None,
            buffer,
            sync_failed: false,
            done_bytes: 0,
            step: Step::Transfer,
        }
    }

    /// Whether every byte of the request is done.
    pub fn is_complete(&self) -> bool {
        self.part.end == self.request.end()
    }

    /// Goes on to the next part: up to `end`, or less where the command is long.
    pub fn set_part(&mut self, start: u64, end: u64) {
        let (step, bytes_max) = match self.request.command {
            Command::Read { .. } | Command::Write => (Step::Transfer, u64::MAX),
            Command::Trim | Command::WriteZeroes { .. } => (Step::Allocate, PART_BYTES_MAX),
            Command::Cache => (Step::Prefetch, PART_BYTES_MAX),
            Command::Flush | Command::BlockStatus { .. } => (Step::Sync, u64::MAX),
        };
        self.part = start..end.min(start.saturating_add(bytes_max));
        self.parts += 1;
        self.step = step;
        self.done_bytes = 0;
    }

    /// The blocks that the part touches.
    pub fn part_blocks(&self) -> Extent {
        Extent::covering(self.part.start, self.part_bytes() as u64)
    }

    /// Length of the part.
    pub fn part_bytes(&self) -> usize {
        (self.part.end - self.part.start) as usize
    }

    /// Submits the first step of the part.
    pub fn start(&mut self, disk: &Arc<Disk>, ring: &mut Driver, tag: u64) -> Outcome {
        if self.admission.is_some()
            && let Err(error) =
                failpoint::attempt(Place::WriteAfterAdmissionBeforeData, disk.file())
        {
            return self.advance(disk, ring, tag, -errno_of(&error), Held::Nothing);
        }
        self.submit(disk, ring, tag)
    }

    /// Takes the result of the step in flight and submits the next one.
    pub fn advance(
        &mut self,
        disk: &Arc<Disk>,
        ring: &mut Driver,
        tag: u64,
        result: i32,
        held: Held,
    ) -> Outcome {
        if let Held::Buffer(buffer) = held {
            self.buffer = Some(buffer);
        }
        if matches!(-result, libc::EINTR | libc::EAGAIN) {
            return self.submit(disk, ring, tag);
        }
        match (self.step, usize::try_from(result)) {
            // A read or write that moves nothing has met the end of a file that was cut short.
            (Step::Transfer | Step::Zero, Ok(0)) => Outcome::Done(Err(ReplyError::Io)),
            (Step::Transfer | Step::Zero, Ok(count)) => {
                self.done_bytes += count;
                if self.done_bytes < self.part_bytes() {
                    self.submit(disk, ring, tag)
                } else {
                    self.data_done(disk, ring, tag)
                }
            }
            (Step::Allocate, Ok(_)) => self.data_done(disk, ring, tag),
            // Advice that cannot be followed is no failure.
            (Step::Prefetch, _) => Outcome::Done(Ok(())),
            (Step::Allocate, Err(_)) => self.allocation_failed(disk, ring, tag, -result),
            (Step::Sync, Ok(_)) => Outcome::Done(self.synced(disk)),
            (Step::Sync, Err(_)) => {
                self.note_failed_sync(disk);
                Outcome::Done(Err(ReplyError::from_errno(-result)))
            }
            (Step::Transfer | Step::Zero, Err(_)) => {
                if self.request.force_unit_access {
                    // Writing and syncing are one call here, and either may have failed.
                    self.note_failed_sync(disk);
                }
                Outcome::Done(Err(ReplyError::from_errno(-result)))
            }
        }
    }

    fn submit(&mut self, disk: &Arc<Disk>, ring: &mut Driver, tag: u64) -> Outcome {
        let durable = self.request.force_unit_access;
        let (offset, length) = (self.part.start, self.part_bytes());
        let at = offset + self.done_bytes as u64;
        match self.step {
            Step::Transfer => {
                let range = HEAD_BYTES + self.done_bytes..HEAD_BYTES + length;
                let Some(buffer) = self.buffer.take() else {
                    return Outcome::Done(Err(ReplyError::NoMemory));
                };
                if self.request.is_read() {
                    ring.read(disk, at, buffer, range, tag);
                } else {
                    ring.write(disk, at, buffer, range, durable, tag);
                }
            }
            Step::Zero => {
                let range = HEAD_BYTES..HEAD_BYTES + self.zero_step();
                let Some(buffer) = self.buffer.take() else {
                    return Outcome::Done(Err(ReplyError::NoMemory));
                };
                ring.write(disk, at, buffer, range, durable, tag);
            }
            Step::Allocate => {
                ring.allocate(disk, self.allocation_mode(), offset, length as u64, tag);
            }
            Step::Prefetch => {
                let begun = offset - self.request.offset;
                let left = CACHE_BYTES_MAX.saturating_sub(begun).min(length as u64);
                if left == 0 {
                    return Outcome::Done(Ok(()));
                }
                ring.prefetch(disk, offset, left as u32, tag);
            }
            Step::Sync => {
                if disk.syncs_at_once() {
                    return Outcome::Done(self.sync_now(disk));
                }
                if disk.sync_failed() {
                    return Outcome::Done(Err(ReplyError::Io));
                }
                reached(Place::FlushAfterDataBeforeSync);
                if let Err(error) = failpoint::attempt(Place::FlushAfterDataBeforeSync, disk.file())
                {
                    return self.advance(disk, ring, tag, -errno_of(&error), Held::Nothing);
                }
                ring.sync(disk, tag);
            }
        }
        Outcome::Pending
    }

    fn zero_step(&self) -> usize {
        (self.part_bytes() - self.done_bytes).min(ZERO_BYTES)
    }

    fn allocation_mode(&self) -> i32 {
        match self.request.command {
            Command::WriteZeroes { no_hole: true, .. } => {
                libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE
            }
            _ => libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
        }
    }

    fn allocation_failed(
        &mut self,
        disk: &Arc<Disk>,
        ring: &mut Driver,
        tag: u64,
        errno: i32,
    ) -> Outcome {
        // EINVAL: a device that only takes whole sectors.
        if !matches!(
            errno,
            libc::EOPNOTSUPP | libc::EINVAL | libc::ENODEV | libc::ENOSYS
        ) {
            return Outcome::Done(Err(ReplyError::from_errno(errno)));
        }
        match self.request.command {
            // A TRIM is advice; what is not supported is not done.
            Command::Trim => return Outcome::Done(Ok(())),
            // In a later part something was done already, and then the rest is done too.
            Command::WriteZeroes { fast: true, .. } if self.parts == 1 => {
                return Outcome::Done(Err(ReplyError::NotSupported));
            }
            _ => {}
        }
        self.step = Step::Zero;
        self.buffer = BufferPool::default().take(ZERO_BYTES).ok();
        self.submit(disk, ring, tag)
    }

    fn data_done(&mut self, disk: &Arc<Disk>, ring: &mut Driver, tag: u64) -> Outcome {
        if !self.request.force_unit_access {
            return Outcome::Done(Ok(()));
        }
        if self.step == Step::Allocate {
            self.step = Step::Sync;
            return self.submit(disk, ring, tag);
        }
        Outcome::Done(self.synced(disk))
    }

    /// A sync succeeded; that counts only if none has failed before it.
    fn synced(&self, disk: &Disk) -> Result<(), ReplyError> {
        if disk.sync_failed() {
            Err(ReplyError::Io)
        } else {
            Ok(())
        }
    }

    /// Syncs on the caller's thread, in place of the step in which a FLUSH consists.
    pub fn sync_now(&mut self, disk: &Disk) -> Result<(), ReplyError> {
        if disk.sync_failed() {
            return Err(ReplyError::Io);
        }
        reached(Place::FlushAfterDataBeforeSync);
        failpoint::attempt(Place::FlushAfterDataBeforeSync, disk.file())
            .and_then(|()| disk.file().sync_data())
            .map_err(|error| {
                self.note_failed_sync(disk);
                ReplyError::from_errno(errno_of(&error))
            })
    }

    fn note_failed_sync(&mut self, disk: &Disk) {
        disk.set_sync_failed();
        self.sync_failed = true;
    }
}
