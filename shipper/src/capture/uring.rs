//! Reads of one disk at depth through an io_uring with registered buffers.
//!
//! Overview: a job owns its buffer and has several reads into parts of it. It is given to the ring
//! and comes back when the last of its reads has completed, so nobody can touch, move or free
//! memory that the kernel is using. That ownership is what makes the raw pointers here sound, and
//! this is the only file of the shipper that has any.
//!
//! Order: none between reads. Short reads are continued; the end of the disk is the caller's.
//!
//! What it does not handle: kernels that have or allow no io_uring; see [`super::source`].

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::mem;
use std::ops::Range;
use std::os::fd::AsRawFd;

use io_uring::{IoUring, opcode, squeue, types};
use memmap2::MmapMut;

/// A page-aligned piece of memory with a place in the ring's table of registered buffers.
#[derive(Debug)]
pub struct ReadBuffer {
    map: MmapMut,
    index: u16,
}

impl ReadBuffer {
    /// Memory for the buffer with this number.
    ///
    /// # Errors
    ///
    /// Memory is short.
    pub fn new(bytes: usize, index: u16) -> io::Result<Self> {
        let map = MmapMut::map_anon(bytes)?;
        Ok(Self { map, index })
    }

    /// The bytes.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.map
    }
}

/// One read of a job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Read {
    /// Offset on the disk in bytes.
    pub offset: u64,
    /// Where it goes in the buffer.
    pub target: Range<usize>,
}

/// Reads into one buffer, with what the caller needs to know of them.
#[derive(Debug)]
pub struct Job<T> {
    /// The memory.
    pub buffer: ReadBuffer,
    /// The reads that are left to do.
    pub reads: Vec<Read>,
    /// The caller's.
    pub content: T,
}

struct InFlight<T> {
    job: Job<T>,
    pending: usize,
    failed: Option<io::Error>,
}

/// An io_uring with the reads of one disk.
pub struct Reads<'a, T> {
    ring: IoUring,
    file: &'a File,
    jobs: Vec<Option<InFlight<T>>>,
    free: Vec<usize>,
    in_flight: usize,
    registered: bool,
}

/// More buffers are not registered: the kernel would touch and pin the memory of all at once, which takes tens of milliseconds.
const REGISTERED_MAX: usize = 64;
/// Reads of one job have a number of 16 bits each.
const READS_OF_JOB_MAX: usize = 1 << 16;

impl<'a, T> Reads<'a, T> {
    /// A ring for reads of a file into these buffers, which are registered if the system lets us.
    ///
    /// # Errors
    ///
    /// The kernel has no io_uring, or it is forbidden here.
    pub fn new(file: &'a File, entries: u32, buffers: &mut [ReadBuffer]) -> io::Result<Self> {
        let ring = IoUring::builder()
            .setup_cqsize(entries * 4)
            .build(entries)?;
        let vectors: Vec<libc::iovec> = buffers
            .iter_mut()
            .map(|buffer| libc::iovec {
                iov_base: buffer.map.as_mut_ptr().cast(),
                iov_len: buffer.map.len(),
            })
            .collect();
        let few = buffers.len() <= REGISTERED_MAX;
        // SAFETY: the vectors describe live anonymous mappings. The kernel pins their pages, so a
        // buffer that is dropped before the ring leaves the kernel with pages of its own; the index
        // that each buffer keeps is its position in this table.
        let registered = few && unsafe { ring.submitter().register_buffers(&vectors) }.is_ok();
        Ok(Self {
            ring,
            file,
            jobs: Vec::new(),
            free: Vec::new(),
            in_flight: 0,
            registered,
        })
    }

    /// Reads that are in flight.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Begins all reads of a job. A job without reads is given back at once.
    pub fn submit(&mut self, job: Job<T>) -> Option<Job<T>> {
        if job.reads.is_empty() || job.reads.len() > READS_OF_JOB_MAX {
            return Some(job);
        }
        let index = self.free.pop().unwrap_or_else(|| {
            self.jobs.push(None);
            self.jobs.len() - 1
        });
        let count = job.reads.len();
        self.jobs[index] = Some(InFlight {
            job,
            pending: count,
            failed: None,
        });
        for read in 0..count {
            self.push(index, read);
        }
        None
    }

    fn push(&mut self, index: usize, read: usize) {
        let Some(entry) = self.entry(index, read) else {
            return;
        };
        self.in_flight += 1;
        loop {
            // SAFETY: the entry points into the mapping of a buffer that `self.jobs` owns until the
            // last read of its job has completed; mappings do not move with their owner, and `drop`
            // waits for what is in flight or leaks it.
            if unsafe { self.ring.submission().push(&entry) }.is_ok() {
                return;
            }
            // The queue is full: hand over what is in it. An error here shows again in `wait`.
            let _shown_in_wait = self.ring.submit();
        }
    }

    fn entry(&mut self, index: usize, read: usize) -> Option<squeue::Entry> {
        let job = &mut self.jobs.get_mut(index)?.as_mut()?.job;
        let Read { offset, target } = job.reads.get(read)?.clone();
        let buffer_index = job.buffer.index;
        let memory = job.buffer.map.get_mut(target)?;
        let file = types::Fd(self.file.as_raw_fd());
        let (pointer, length) = (memory.as_mut_ptr(), memory.len() as u32);
        let entry = if self.registered {
            opcode::ReadFixed::new(file, pointer, length, buffer_index)
                .offset(offset)
                .build()
        } else {
            opcode::Read::new(file, pointer, length)
                .offset(offset)
                .build()
        };
        Some(entry.user_data((index as u64) << 32 | read as u64))
    }

    /// Waits for at least one read, and gives out the jobs that are finished with it, each with the
    /// first error that one of its reads met.
    ///
    /// # Errors
    ///
    /// The system call fails for a reason that trying again does not mend.
    pub fn wait(&mut self, finished: &mut Vec<(Job<T>, Option<io::Error>)>) -> io::Result<()> {
        loop {
            match self.ring.submit_and_wait(1) {
                Ok(_) => break,
                Err(error) => match error.raw_os_error() {
                    Some(libc::EBUSY) => break,
                    Some(libc::EINTR | libc::EAGAIN) => {}
                    _ => return Err(error),
                },
            }
        }
        let completed: Vec<(u64, i32)> = self
            .ring
            .completion()
            .map(|entry| (entry.user_data(), entry.result()))
            .collect();
        for (tag, result) in completed {
            self.in_flight -= 1;
            self.complete((tag >> 32) as usize, tag as u32 as usize, result, finished);
        }
        Ok(())
    }

    fn complete(
        &mut self,
        index: usize,
        read: usize,
        result: i32,
        finished: &mut Vec<(Job<T>, Option<io::Error>)>,
    ) {
        let Some(Some(in_flight)) = self.jobs.get_mut(index) else {
            return;
        };
        let left = &mut in_flight.job.reads[read];
        let again = match usize::try_from(result) {
            Ok(0) => {
                let kind = io::ErrorKind::UnexpectedEof;
                in_flight.failed.get_or_insert_with(|| kind.into());
                false
            }
            Ok(count) => {
                left.offset += count as u64;
                left.target.start += count;
                !left.target.is_empty()
            }
            Err(_) if matches!(-result, libc::EINTR | libc::EAGAIN) => true,
            Err(_) => {
                let error = io::Error::from_raw_os_error(-result);
                in_flight.failed.get_or_insert(error);
                false
            }
        };
        if again {
            self.push(index, read);
            return;
        }
        in_flight.pending -= 1;
        if in_flight.pending == 0
            && let Some(done) = self.jobs[index].take()
        {
            self.free.push(index);
            finished.push((done.job, done.failed));
        }
    }
}

impl<T> Drop for Reads<'_, T> {
    fn drop(&mut self) {
        let mut finished = Vec::new();
        while self.in_flight > 0 {
            if self.wait(&mut finished).is_err() {
                // The kernel may still write into the buffers, so they are never freed.
                mem::forget(mem::take(&mut self.jobs));
                return;
            }
        }
    }
}
