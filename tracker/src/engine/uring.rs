//! One io_uring and the memory that the kernel works on.
//!
//! Overview: an operation gives its buffer to the ring and gets it back with the completion, so no
//! caller can touch, move or free memory that the kernel is using. That ownership is what makes
//! the raw pointers below sound, and this is the only file of the engine that has any.
//!
//! Order: operations of one ring complete in any order. What must come after something else is
//! submitted only when that has completed; links are not used.
//!
//! What it does not handle: meaning. Tags, short transfers and errors are the worker's.

#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::io;
use std::mem;
use std::ops::Range;
use std::os::fd::RawFd;

use io_uring::{IoUring, opcode, squeue, types};

use super::buffer::Buffer;

/// Entries of the submission queue; more operations than this wait in user space.
const SUBMISSION_ENTRIES: u32 = 512;
/// Most pieces of one send; `UIO_MAXIOV` is 1024.
const PIECES_MAX: usize = 64;

/// One piece of output.
#[derive(Debug)]
pub enum Piece {
    /// Headers without data.
    Bytes(Vec<u8>),
    /// A header and data that lie one behind the other in an operation's buffer.
    Data(Buffer, Range<usize>),
}

impl Piece {
    fn as_slice(&self) -> &[u8] {
        match self {
            Self::Bytes(bytes) => bytes,
            Self::Data(buffer, range) => &buffer.bytes()[range.clone()],
        }
    }
}

/// Output on its way through a socket.
#[derive(Default)]
pub struct SendBatch {
    pieces: VecDeque<Piece>,
    /// Bytes of the first piece that have been sent already.
    sent_of_first: usize,
    vectors: Vec<libc::iovec>,
    message: Option<libc::msghdr>,
}

impl SendBatch {
    /// Adds output at the end.
    pub fn push(&mut self, piece: Piece) {
        self.pieces.push_back(piece);
    }

    /// The last piece if it is plain bytes, to be extended by the next header.
    pub fn last_bytes(&mut self) -> Option<&mut Vec<u8>> {
        match self.pieces.back_mut() {
            Some(Piece::Bytes(bytes)) => Some(bytes),
            _ => None,
        }
    }

    /// Nothing is left to send.
    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// Notes that `count` more bytes are sent; gives finished pieces to `recycle`.
    pub fn advance(&mut self, mut count: usize, mut recycle: impl FnMut(Piece)) {
        while let Some(first) = self.pieces.front() {
            let left = first.as_slice().len() - self.sent_of_first;
            if count < left {
                self.sent_of_first += count;
                return;
            }
            count -= left;
            self.sent_of_first = 0;
            if let Some(piece) = self.pieces.pop_front() {
                recycle(piece);
            }
        }
    }

    fn prepare(&mut self) -> *const libc::msghdr {
        self.vectors.clear();
        let mut skip = self.sent_of_first;
        for piece in self.pieces.iter().take(PIECES_MAX) {
            let bytes = &piece.as_slice()[mem::take(&mut skip)..];
            self.vectors.push(libc::iovec {
                iov_base: bytes.as_ptr().cast_mut().cast(),
                iov_len: bytes.len(),
            });
        }
        // SAFETY: msghdr is a C struct of integers and pointers, for which all zeroes is valid.
        let mut message: libc::msghdr = unsafe { mem::zeroed() };
        message.msg_iov = self.vectors.as_mut_ptr();
        message.msg_iovlen = self.vectors.len();
        std::ptr::from_ref(self.message.insert(message))
    }
}

/// What the kernel works on during one operation.
#[derive(Default)]
pub enum Held {
    /// No memory.
    #[default]
    Nothing,
    /// A buffer that is read from or written to.
    Buffer(Buffer),
    /// Output. Boxed, so that the addresses given to the kernel do not move.
    Send(Box<SendBatch>),
}

/// A finished operation.
pub struct Completion {
    /// What the submitter called it.
    pub tag: u64,
    /// As in the system call: a count, or a negative errno.
    pub result: i32,
    /// The memory, back in the submitter's hands.
    pub held: Held,
}

struct Slot {
    tag: u64,
    held: Held,
    busy: bool,
}

/// An io_uring with the operations in flight on it. Belongs to one thread.
pub struct Ring {
    ring: IoUring,
    slots: Vec<Slot>,
    free: Vec<u32>,
    in_flight: usize,
    features: Vec<&'static str>,
}

impl Ring {
    /// Sets up a ring with the newest flags that this kernel takes.
    ///
    /// # Errors
    ///
    /// The kernel has no io_uring, or it is forbidden here.
    pub fn new() -> io::Result<Self> {
        let (ring, features) = best_ring()?;
        Ok(Self {
            ring,
            slots: Vec::new(),
            free: Vec::new(),
            in_flight: 0,
            features,
        })
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
    pub fn send(&mut self, socket: RawFd, mut batch: Box<SendBatch>, tag: u64) {
        let message = batch.prepare();
        let flags = (libc::MSG_NOSIGNAL | libc::MSG_WAITALL) as u32;
        let entry = opcode::SendMsg::new(types::Fd(socket), message)
            .flags(flags)
            .build();
        self.push(entry, tag, Held::Send(batch));
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

    /// Submits what is queued, waits for a completion if `block` says so, then gives out all.
    ///
    /// # Errors
    ///
    /// The system call fails for a reason that trying again does not mend.
    pub fn wait(&mut self, completions: &mut Vec<Completion>, block: bool) -> io::Result<()> {
        loop {
            match self.ring.submit_and_wait(usize::from(block)) {
                Ok(_) => break,
                Err(error) => match error.raw_os_error() {
                    // EBUSY: the completion queue is full; taking completions out mends it.
                    Some(libc::EBUSY) => break,
                    Some(libc::EINTR | libc::EAGAIN) => {}
                    _ => return Err(error),
                },
            }
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
            completions.push(Completion {
                tag: slot.tag,
                result: entry.result(),
                held,
            });
        }
        Ok(())
    }

    fn push(&mut self, entry: squeue::Entry, tag: u64, held: Held) {
        let slot = Slot {
            tag,
            held,
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
            // SAFETY: every pointer in the entry leads into memory that `held` owns: mapped pages
            // or heap behind a Box, neither of which moves with its owner. The slot keeps it until
            // the completion arrives, and `drop` leaks it if that never happens.
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
