//! Moving the spool into the vault.
//!
//! Overview: one coordinator takes jobs in order; a pool of threads puts segments, several at once.
//!
//! Order, for a sealed epoch: that of [`publish`]; its segments are all that are in the spool, and all that
//! the first copy has left. Epochs are published one after the other, so that a recovery point is never
//! there before the one that it follows. Where the number of one is taken, it and those behind it are given up.
//!
//! Retries: what may pass by itself is retried for ever, with growing pauses (`retry`). An object
//! that exists already is right if it is the same one: its put may have been answered to nobody.
//!
//! Crash consistency: every job may be repeated. A segment is removed from the spool only when its
//! manifest is in the vault, or, of the first copy, when it is stored itself and its name is kept.

pub mod retry;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;

use bytes::Bytes;
use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use tracker::extent::Epoch;

use crate::error::{Error, ErrorKind, Result};
use crate::segment::reader::read_directory;
use crate::segment::reference::SegmentRef;
use crate::spool::files::{failed, remove_if_present};
use crate::spool::{Spool, segment_file};
use crate::status::{Board, Part};
use crate::store::Created;
use crate::vault::Vault;
use crate::vault::publish::{Insist, Published, not_ours, publish, vanished};
use retry::{Stop, until_done};

/// Threads that put segments; each holds one segment in memory.
const THREADS: usize = 3;

/// What is to be moved.
#[derive(Debug)]
pub enum Job {
    /// A segment of the first copy, which is in no recovery point yet.
    Copied {
        /// Name of the disk.
        disk: String,
        /// The segment.
        segment: SegmentRef,
    },
    /// A sealed epoch.
    Epoch(Epoch),
}

/// What the uploader tells.
#[derive(Debug)]
pub enum Outcome {
    /// The recovery point is durable in the vault.
    Published(Epoch),
    /// The number of this epoch is taken by somebody who has lost the machine; nothing more is published until
    /// the uploader is started anew.
    Taken(Epoch),
    /// Something that trying again does not mend.
    Failed(Error),
}

/// Everything that an upload needs to know.
#[derive(Clone, Debug)]
pub struct Context {
    /// Where to.
    pub vault: Vault,
    /// Name of the machine.
    pub machine: String,
    /// The generation that this shipper holds.
    pub generation: u64,
    /// Sealed epochs.
    pub spool: Spool,
    /// Segments of the first copy.
    pub copy_folder: PathBuf,
    /// Health and counters.
    pub board: Arc<Board>,
    /// Tells when to end.
    pub stop: Arc<Stop>,
}

/// The uploader's threads.
pub struct Uploader {
    jobs: Option<Sender<Job>>,
    coordinator: Option<JoinHandle<()>>,
}

impl Uploader {
    /// Starts the threads. `tell` is called from one of them.
    ///
    /// # Errors
    ///
    /// A thread cannot be started.
    pub fn start(context: Context, tell: impl Fn(Outcome) + Send + 'static) -> Result<Self> {
        let (jobs, to_do) = unbounded();
        let coordinator = std::thread::Builder::new()
            .name("upload".into())
            .spawn(move || coordinate(&context, &to_do, &tell))
            .map_err(|error| Error::io("Cannot start the upload", error))?;
        Ok(Self {
            jobs: Some(jobs),
            coordinator: Some(coordinator),
        })
    }

    /// Queues a job behind all others.
    pub fn queue(&self, job: Job) {
        if let Some(jobs) = &self.jobs {
            // Where the coordinator has ended, it has told why.
            let _ended = jobs.send(job);
        }
    }
}

impl Drop for Uploader {
    /// Waits for what is being put; what is queued is left to the next start.
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(coordinator) = self.coordinator.take() {
            let _panicked = coordinator.join();
        }
    }
}

/// A segment on its way.
struct Put {
    key: String,
    disk: String,
    path: PathBuf,
    segment: SegmentRef,
    /// Remove the file when the segment is stored.
    remove: bool,
}

fn coordinate(context: &Context, jobs: &Receiver<Job>, tell: &(impl Fn(Outcome) + Send)) {
    let (to_pool, puts) = bounded::<Put>(THREADS);
    let (done, results) = unbounded::<Result<()>>();
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            let (puts, done) = (puts.clone(), done.clone());
            scope.spawn(move || {
                for put in puts {
                    if done.send(store(context, &put)).is_err() {
                        return;
                    }
                }
            });
        }
        drop((puts, done));
        let mut pool = Pool {
            to_pool,
            results,
            outstanding: 0,
        };
        for job in jobs {
            let result = match job {
                Job::Copied { disk, segment } => pool.copied(context, &disk, &segment),
                Job::Epoch(epoch) => match publish_sealed(context, epoch, &mut pool) {
                    Ok(Published::Done) => {
                        tell(Outcome::Published(epoch));
                        Ok(())
                    }
                    // What is queued behind it follows it.
                    Ok(Published::Taken) => return tell(Outcome::Taken(epoch)),
                    Err(error) => Err(error),
                },
            };
            match result {
                Ok(()) => {}
                Err(error) if error.kind() == ErrorKind::Stopped => return,
                Err(error) => return tell(Outcome::Failed(error)),
            }
        }
        if let Err(error) = pool.wait()
            && error.kind() != ErrorKind::Stopped
        {
            tell(Outcome::Failed(error));
        }
    });
}

/// The threads that put segments, as the coordinator sees them.
struct Pool {
    to_pool: Sender<Put>,
    results: Receiver<Result<()>>,
    outstanding: usize,
}

impl Pool {
    fn put(&mut self, put: Put) -> Result<()> {
        for result in self.results.try_iter() {
            self.outstanding -= 1;
            result?;
        }
        self.to_pool.send(put).map_err(|_| Stop::error())?;
        self.outstanding += 1;
        Ok(())
    }

    fn wait(&mut self) -> Result<()> {
        while self.outstanding > 0 {
            let result = self.results.recv().map_err(|_| Stop::error())?;
            self.outstanding -= 1;
            result?;
        }
        Ok(())
    }

    /// Puts a segment of the first copy, if it is still to be put.
    fn copied(&mut self, context: &Context, disk: &str, segment: &SegmentRef) -> Result<()> {
        let path = context
            .copy_folder
            .join(segment_file(disk, &segment.name.0));
        if !path.exists() {
            return Ok(());
        }
        let key = context.vault.segment_key(&context.machine, disk, segment);
        self.put(Put {
            key,
            disk: disk.to_owned(),
            path,
            segment: segment.clone(),
            remove: true,
        })
    }

    /// Puts a segment of a sealed epoch, if it is in the spool.
    fn sealed(
        &mut self,
        context: &Context,
        epoch: Epoch,
        disk: &str,
        segment: &SegmentRef,
    ) -> Result<()> {
        let path = context.spool.segment(epoch, disk, segment);
        if !path.exists() {
            return Ok(());
        }
        self.put(Put {
            key: context.vault.segment_key(&context.machine, disk, segment),
            disk: disk.to_owned(),
            path,
            segment: segment.clone(),
            remove: false,
        })
    }
}

impl Insist for Context {
    fn insist<T>(&self, attempt: impl FnMut() -> Result<T>) -> Result<T> {
        persist(self, attempt)
    }
}

/// Retries, and keeps the board informed.
fn persist<T>(context: &Context, attempt: impl FnMut() -> Result<T>) -> Result<T> {
    let note = |error: Option<&Error>| context.board.note(Part::Vault, error);
    until_done(&context.stop, note, attempt)
}

fn publish_sealed(context: &Context, epoch: Epoch, pool: &mut Pool) -> Result<Published> {
    let id = context.vault.point_id(&context.machine, epoch);
    let (manifest, bytes) = context.spool.manifest(&id, context.vault.keys())?;
    let bytes = Bytes::from(bytes);
    publish(&context.vault, &manifest, &bytes, context, || {
        for disk in &manifest.disks {
            for segment in &disk.segments {
                pool.copied(context, &disk.name, segment)?;
                pool.sealed(context, epoch, &disk.name, segment)?;
            }
        }
        pool.wait()
    })
}

fn store(context: &Context, put: &Put) -> Result<()> {
    persist(context, || put_segment(context, put))?;
    context.board.count_upload(put.segment.bytes);
    if put.remove {
        remove_if_present(&put.path)?;
    }
    Ok(())
}

fn put_segment(context: &Context, put: &Put) -> Result<()> {
    if put.remove && !put.path.exists() {
        // It was queued twice, and the first put has stored and removed it.
        return Ok(());
    }
    let store = context.vault.store();
    check_size(&put.path, &put.segment)?;
    // A second name costs nothing, where store and spool are on one file system.
    let adopted = store.adopt(&put.key, &put.path)?;
    let created = match adopted {
        Some(created) => created,
        None => store.create(&put.key, read_segment(&put.path, &put.segment)?)?,
    };
    match created {
        Created::New => Ok(()),
        // Only the same segment leads to the same check.
        Created::Exists => {
            let owner = context.vault.owner(&context.machine, &put.disk);
            match read_directory(store, &put.key, &put.segment, &owner) {
                Ok(_) => Ok(()),
                Err(error) if error.kind() == ErrorKind::Corrupt => {
                    Err(not_ours(&put.key, &context.machine, context.generation).with_source(error))
                }
                Err(error) => Err(vanished(error)),
            }
        }
    }
}

fn read_segment(path: &Path, segment: &SegmentRef) -> Result<Bytes> {
    let content = fs::read(path).map_err(|error| failed("read", path, error))?;
    has_size(path, segment, content.len() as u64)?;
    Ok(Bytes::from(content))
}

fn check_size(path: &Path, segment: &SegmentRef) -> Result<()> {
    let metadata = fs::metadata(path).map_err(|error| failed("look at", path, error))?;
    has_size(path, segment, metadata.len())
}

fn has_size(path: &Path, segment: &SegmentRef, bytes: u64) -> Result<()> {
    if bytes == segment.bytes {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Corrupt,
        format!(
            "Segment {} of the spool has {bytes} bytes where {} are expected: stop the shipper, remove the \
             folder of this epoch, and start it again; its changes will be captured anew",
            path.display(),
            segment.bytes
        ),
    ))
}
