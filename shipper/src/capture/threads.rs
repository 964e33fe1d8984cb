//! Reads of one disk at depth by threads, where there is no io_uring.
//!
//! Overview: a job owns its buffer and goes with it to a thread, which carries out its reads one after
//! the other and hands it back. Several jobs are read at the same time, so that the disk is kept busy.
//!
//! Order: jobs are finished in any. The threads end with the reader, after the jobs that they have.
//!
//! Errors: the first of a job comes back with it; a panic is one, too. Where no thread can be had, the
//! caller's thread reads.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::JoinHandle;

use crossbeam_channel::{Receiver, Sender, unbounded};

use super::uring::Job;

/// Jobs that are read at the same time.
const THREADS: usize = 8;

type Finished<T> = (Job<T>, Option<io::Error>);

/// Threads with the reads of one disk.
pub struct ThreadReads<T> {
    file: Arc<File>,
    /// `None` when it ends, which ends the threads.
    jobs: Option<Sender<Job<T>>>,
    report: Sender<Finished<T>>,
    finished: Receiver<Finished<T>>,
    threads: Vec<JoinHandle<()>>,
    in_flight: usize,
}

impl<T: Send + 'static> ThreadReads<T> {
    /// Threads for reads of a file.
    ///
    /// # Errors
    ///
    /// Descriptors are short.
    pub fn new(file: &File) -> io::Result<Self> {
        let file = Arc::new(file.try_clone()?);
        let (jobs, waiting) = unbounded::<Job<T>>();
        let (report, finished) = unbounded();
        let mut threads = Vec::new();
        for _ in 0..THREADS {
            let (file, waiting, report) = (Arc::clone(&file), waiting.clone(), report.clone());
            let started = std::thread::Builder::new()
                .name("read".to_owned())
                .spawn(move || {
                    for job in waiting {
                        if report.send(carry_out(&file, job)).is_err() {
                            return;
                        }
                    }
                });
            match started {
                Ok(thread) => threads.push(thread),
                Err(error) => {
                    let count = threads.len();
                    tracing::warn!("Disks are read with {count} threads: {error}");
                    break;
                }
            }
        }
        Ok(Self {
            file,
            jobs: Some(jobs),
            report,
            finished,
            threads,
            in_flight: 0,
        })
    }

    /// Jobs that are not given out yet.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Begins a job; gives it back at once if it has nothing to read.
    pub fn submit(&mut self, job: Job<T>) -> Option<Job<T>> {
        if job.reads.is_empty() {
            return Some(job);
        }
        self.in_flight += 1;
        let refused = match &self.jobs {
            Some(jobs) if !self.threads.is_empty() => jobs.send(job).err().map(|error| error.0),
            _ => Some(job),
        };
        if let Some(job) = refused {
            // Not lost: this reader holds the other end.
            let _sent = self.report.send(carry_out(&self.file, job));
        }
        None
    }

    /// Waits for at least one job, and gives out all that are finished.
    ///
    /// # Errors
    ///
    /// Nothing is in flight.
    pub fn wait(&mut self, finished: &mut Vec<Finished<T>>) -> io::Result<()> {
        if self.in_flight == 0 {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let first = self.finished.recv().map_err(io::Error::other)?;
        let before = finished.len();
        finished.push(first);
        finished.extend(self.finished.try_iter());
        self.in_flight -= finished.len() - before;
        Ok(())
    }
}

impl<T> Drop for ThreadReads<T> {
    fn drop(&mut self) {
        self.jobs = None;
        for thread in self.threads.drain(..) {
            // A thread catches the panics of its jobs, and has none of its own.
            let _panicked = thread.join();
        }
    }
}

fn carry_out<T>(file: &File, mut job: Job<T>) -> Finished<T> {
    // What a panic leaves behind is bytes in a buffer, which are not used after an error.
    let done = catch_unwind(AssertUnwindSafe(|| read_all(file, &mut job)));
    let failed = match done {
        Ok(result) => result.err(),
        Err(_panic) => Some(io::Error::other("a read panicked")),
    };
    (job, failed)
}

fn read_all<T>(file: &File, job: &mut Job<T>) -> io::Result<()> {
    for read in std::mem::take(&mut job.reads) {
        file.read_exact_at(&mut job.buffer.bytes_mut()[read.target], read.offset)?;
    }
    Ok(())
}
