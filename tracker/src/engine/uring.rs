//! One io_uring and the memory that the kernel works on.
//!
//! Overview: an operation gives its buffer to the ring and gets it back with the completion, so no
//! caller can touch, move or free memory that the kernel is using. That ownership is what makes
//! the raw pointers below sound, and this is the only file of the engine that has any.
//!
//! Order: operations of one ring complete in any order. What must come after something else is
//! submitted only when that has completed; links are not used.
//!
//! What it does not handle: meaning. Tags, short transfers and errors are the worker's. Machines
//! without io_uring; see [`super::threads`].

#![allow(unsafe_code)]

use std::io;
use std::mem;
use std::ops::Range;
use std::os::fd::RawFd;
use std::time::{Duration, Instant};

use io_uring::{IoUring, Probe, opcode, squeue, types};

use super::buffer::Buffer;
use super::transfer::{Completion, Held, PIECES_MAX, SendBatch};

/// Entries of the submission queue; more operations than this wait in user space.
const SUBMISSION_ENTRIES: u32 = 512;
/// `IORING_ENTER_GETEVENTS` of `io_uring_enter(2)`.
const ENTER_GETEVENTS: u32 = 1;
/// Every operation that this file submits.
const OPERATIONS: [(&str, u8); 8] = [
    ("POLL_ADD", opcode::PollAdd::CODE),
    ("FSYNC", opcode::Fsync::CODE),
    ("SENDMSG", opcode::SendMsg::CODE),
    ("RECV", opcode::Recv::CODE),
    ("READ", opcode::Read::CODE),
    ("WRITE", opcode::Write::CODE),
    ("FALLOCATE", opcode::Fallocate::CODE),
    ("FADVISE", opcode::Fadvise::CODE),
];

/// What a message to be sent consists of, for the kernel. Boxed, so that the addresses given to the
/// kernel do not move, and kept for the next send.
struct Message {
    vectors: Vec<libc::iovec>,
    header: libc::msghdr,
}

impl Message {
    fn new() -> Box<Self> {
        Box::new(Self {
            vectors: Vec::with_capacity(PIECES_MAX),
            // SAFETY: msghdr is a C struct of integers and pointers, for which all zeroes is valid.
            header: unsafe { mem::zeroed() },
        })
    }

    fn fill(&mut self, batch: &SendBatch) -> *const libc::msghdr {
        self.vectors.clear();
        self.vectors.extend(batch.slices().map(|bytes| libc::iovec {
            iov_base: bytes.as_ptr().cast_mut().cast(),
            iov_len: bytes.len(),
        }));
        self.header.msg_iov = self.vectors.as_mut_ptr();
        self.header.msg_iovlen = self.vectors.len();
        &raw const self.header
    }
}

struct Slot {
    tag: u64,
    held: Held,
    /// The message that describes what is held, for a send.
    message: Option<Box<Message>>,
    busy: bool,
}

/// An io_uring with the operations in flight on it. Belongs to one thread.
pub struct Ring {
    ring: IoUring,
    slots: Vec<Slot>,
    free: Vec<u32>,
    // The boxes go on to slots, and what is in one must not move then.
    #[allow(clippy::vec_box)]
    idle_messages: Vec<Box<Message>>,
    in_flight: usize,
    features: Vec<&'static str>,
}

impl Ring {
    /// Sets up a ring with the newest flags that this kernel takes.
    ///
    /// # Errors
    ///
    /// The kernel has no io_uring or not all that is needed of it, or it is forbidden here.
    pub fn new() -> io::Result<Self> {
        let (ring, features) = best_ring()?;
        require_operations(&ring)?;
        let mut ring = Self {
            ring,
            slots: Vec::new(),
            free: Vec::new(),
            idle_messages: Vec::new(),
            in_flight: 0,
            features,
        };
        // A filter may let a ring be set up and forbid its use.
        ring.push(opcode::Nop::new().build(), 0, Held::Nothing);
        ring.wait(&mut Vec::new(), true)?;
        Ok(ring)
    }

    /// Names of the setup flags in use.
    pub fn features(&self) -> &[&'static str] {
        &self.features
    }

    /// Receives into a range of the buffer; with `all`, until the range is full.
    pub fn receive(
        &mut self,
        socket: RawFd,
        mut buffer: Buffer,
        range: Range<usize>,
        all: bool,
        tag: u64,
    ) {
        let target = &mut buffer.bytes_mut()[range];
        let flags = if all { libc::MSG_WAITALL } else { 0 };
        let entry = opcode::Recv::new(
            types::Fd(socket),
            target.as_mut_ptr(),
            target.len().min(i32::MAX as usize) as u32,
        )
        .flags(flags)
        .build();
        self.push(entry, tag, Held::Buffer(buffer));
    }

    /// Sends as much of the batch as one system call takes.
    pub fn send(&mut self, socket: RawFd, batch: Box<SendBatch>, tag: u64) {
        let mut message = self.idle_messages.pop().unwrap_or_else(Message::new);
        let header = message.fill(&batch);
        let flags = (libc::MSG_NOSIGNAL | libc::MSG_WAITALL) as u32;
        let entry = opcode::SendMsg::new(types::Fd(socket), header)
            .flags(flags)
            .build();
        self.push_with(entry, tag, Held::Send(batch), Some(message));
    }

    /// Reads from a file into a range of the buffer.
    pub fn read(
        &mut self,
        file: RawFd,
        offset: u64,
        mut buffer: Buffer,
        range: Range<usize>,
        tag: u64,
    ) {
        let target = &mut buffer.bytes_mut()[range];
        let entry = opcode::Read::new(types::Fd(file), target.as_mut_ptr(), target.len() as u32)
            .offset(offset)
            .build();
        self.push(entry, tag, Held::Buffer(buffer));
    }

    /// Writes a range of the buffer to a file; with `durable`, to the platter.
    pub fn write(
        &mut self,
        file: RawFd,
        offset: u64,
        buffer: Buffer,
        range: Range<usize>,
        durable: bool,
        tag: u64,
    ) {
        let source = &buffer.bytes()[range];
        let flags = if durable { libc::RWF_DSYNC } else { 0 };
        let entry = opcode::Write::new(types::Fd(file), source.as_ptr(), source.len() as u32)
            .offset(offset)
            .rw_flags(flags)
            .build();
        self.push(entry, tag, Held::Buffer(buffer));
    }

    /// Syncs the data of a file.
    pub fn sync(&mut self, file: RawFd, tag: u64) {
        let entry = opcode::Fsync::new(types::Fd(file))
            .flags(types::FsyncFlags::DATASYNC)
            .build();
        self.push(entry, tag, Held::Nothing);
    }

    /// `fallocate(2)` with a mode.
    pub fn allocate(&mut self, file: RawFd, mode: i32, offset: u64, length: u64, tag: u64) {
        let entry = opcode::Fallocate::new(types::Fd(file), length)
            .offset(offset)
            .mode(mode)
            .build();
        self.push(entry, tag, Held::Nothing);
    }

    /// Has a range of a file brought into the page cache.
    pub fn prefetch(&mut self, file: RawFd, offset: u64, length: u32, tag: u64) {
        let advice = libc::POSIX_FADV_WILLNEED;
        let entry = opcode::Fadvise::new(types::Fd(file), length.into(), advice)
            .offset(offset)
            .build();
        self.push(entry, tag, Held::Nothing);
    }

    /// Waits until a descriptor can be read.
    pub fn poll_readable(&mut self, descriptor: RawFd, tag: u64) {
        let entry = opcode::PollAdd::new(types::Fd(descriptor), libc::POLLIN as u32).build();
        self.push(entry, tag, Held::Nothing);
    }

    /// Submits what is queued, then looks for a completion without sleeping, for so long at most.
    /// Returns whether there is one.
    ///
    /// # Errors
    ///
    /// As [`Self::wait`].
    pub fn watch(&mut self, time: Duration) -> io::Result<bool> {
        let end = Instant::now() + time;
        self.enter(0)?;
        while self.ring.completion().is_empty() {
            if Instant::now() >= end {
                return Ok(false);
            }
            // A client that waits for this processor gets it.
            std::thread::yield_now();
            // SAFETY: the kernel is given no memory: nothing is submitted and there is no argument.
            // It does what it has put off for this thread.
            let entered = unsafe {
                self.ring
                    .submitter()
                    .enter::<libc::sigset_t>(0, 0, ENTER_GETEVENTS, None)
            };
            match entered {
                Err(error) if !is_passing(&error) => return Err(error),
                _ => {}
            }
        }
        Ok(true)
    }

    fn enter(&mut self, completions: usize) -> io::Result<()> {
        loop {
            match self.ring.submit_and_wait(completions) {
                Ok(_) => return Ok(()),
                // The completion queue is full; taking completions out mends it.
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => return Ok(()),
                Err(error) if is_passing(&error) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Submits what is queued, waits for a completion if `block` says so, then gives out all.
    ///
    /// # Errors
    ///
    /// The system call fails for a reason that trying again does not mend.
    pub fn wait(&mut self, completions: &mut Vec<Completion>, block: bool) -> io::Result<()> {
        // What `watch` has found needs no further call.
        if !self.ring.submission().is_empty() || self.ring.completion().is_empty() {
            self.enter(usize::from(block))?;
        }
        for entry in self.ring.completion() {
            let index = entry.user_data() as usize;
            let Some(slot) = self.slots.get_mut(index).filter(|slot| slot.busy) else {
                continue;
            };
            slot.busy = false;
            self.in_flight -= 1;
            self.free.push(index as u32);
            let held = mem::take(&mut slot.held);
            self.idle_messages.extend(slot.message.take());
            completions.push(Completion {
                tag: slot.tag,
                result: entry.result(),
                held,
            });
        }
        Ok(())
    }

    fn push(&mut self, entry: squeue::Entry, tag: u64, held: Held) {
        self.push_with(entry, tag, held, None);
    }

    fn push_with(
        &mut self,
        entry: squeue::Entry,
        tag: u64,
        held: Held,
        message: Option<Box<Message>>,
    ) {
        let slot = Slot {
            tag,
            held,
            message,
            busy: true,
        };
        let index = match self.free.pop() {
            Some(index) => {
                self.slots[index as usize] = slot;
                index
            }
            None => {
                self.slots.push(slot);
                (self.slots.len() - 1) as u32
            }
        };
        self.in_flight += 1;
        let entry = entry.user_data(u64::from(index));
        loop {
            // SAFETY: every pointer in the entry leads into memory that `held` or `message` owns:
            // mapped pages or heap behind a Box or Vec, none of which moves with its owner. The slot
            // keeps both until the completion arrives, and `drop` leaks them if that never happens.
            if unsafe { self.ring.submission().push(&entry) }.is_ok() {
                return;
            }
            // The queue is full: hand over what is in it. An error here shows again in `wait`.
            let _shown_in_wait = self.ring.submit();
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        if self.in_flight > 0 {
            // The kernel may still write into what the slots hold, so it is never freed.
            mem::forget(mem::take(&mut self.slots));
        }
    }
}

/// Refuses a kernel whose io_uring lacks an operation.
fn require_operations(ring: &IoUring) -> io::Result<()> {
    let mut probe = Probe::new();
    ring.submitter().register_probe(&mut probe)?;
    let missing: Vec<&str> = OPERATIONS
        .iter()
        .filter(|(_, code)| !probe.is_supported(*code))
        .map(|(name, _)| *name)
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let text = format!("this kernel's io_uring lacks {}", missing.join(", "));
    Err(io::Error::new(io::ErrorKind::Unsupported, text))
}

/// Whether a call that failed so is made again.
fn is_passing(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)
    )
}

/// Tries the sets of flags from the newest to the plain one; a kernel refuses a flag that it does
/// not know with EINVAL.
fn best_ring() -> io::Result<(IoUring, Vec<&'static str>)> {
    let mut last = None;
    for level in (0..=3).rev() {
        let mut builder = IoUring::builder();
        let mut features = Vec::new();
        builder.setup_cqsize(SUBMISSION_ENTRIES * 4);
        if level >= 1 {
            builder.setup_submit_all().setup_coop_taskrun();
            features = vec!["SUBMIT_ALL", "COOP_TASKRUN"];
        }
        if level >= 2 {
            builder = IoUring::builder();
            builder.setup_cqsize(SUBMISSION_ENTRIES * 4);
            builder
                .setup_submit_all()
                .setup_single_issuer()
                .setup_defer_taskrun();
            features = vec!["SUBMIT_ALL", "SINGLE_ISSUER", "DEFER_TASKRUN"];
        }
        if level >= 3 {
            builder.setup_no_sqarray();
            features.push("NO_SQARRAY");
        }
        match builder.build(SUBMISSION_ENTRIES) {
            Ok(ring) => return Ok((ring, features)),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => last = Some(error),
            Err(error) => return Err(error),
        }
    }
    Err(last.unwrap_or_else(|| io::ErrorKind::Unsupported.into()))
}
