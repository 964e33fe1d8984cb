//! Read, fingerprint, compress, seal, in parallel and in order.
//!
//! Overview: the reader thread takes batches and free buffers, keeps the disk busy, and settles what it has read of
//! a closed epoch; workers make frames of it; the caller's thread puts the frames back into the order of
//! the disk and hands them to its sink. A buffer is free again when its frame was handed over, so
//! nothing can run ahead by more than the buffers.
//!
//! Of a closed epoch far more is read ahead than of a scan: a block that is in our hands need not be
//! copied any more when a guest overwrites it, and reading is several times faster than compressing.
//!
//! Errors: the first one ends it; all threads are joined before it is returned.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::Scope;
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use tracker::extent::{BLOCK_SIZE, Extent};
use tracker::preserve::reader::PreserveReader;

use super::plan::Batch;
use super::source::{Depth, DiskSource};
use super::throttle::{Pace, Throttle, stand_back, take_what_is_left};
use super::uring::{Job, Read, ReadBuffer};
use crate::error::{Error, Result};
use crate::keys::{Fingerprint, Keys};
use crate::segment::codec::{Codec, Compressor};
use crate::segment::format::FRAME_BLOCKS_MAX;
use crate::segment::frame::{EncodedFrame, FrameBuilder};
use crate::segment::seal::Current;
use crate::spool::table::Table;

/// Buffers of 128 KiB each, which all stages of a scan hold together.
const SCAN_BUFFERS: u16 = 64;
/// The same of a capture.
const CAPTURE_BUFFERS: u16 = 512;
const BUFFER_BYTES: usize = FRAME_BLOCKS_MAX * BLOCK_SIZE as usize;
/// Entries of the ring; more reads wait in its queue.
const RING_ENTRIES: u32 = 256;
/// Reads of a closed epoch in flight from which on no other batch is begun: where reads come from the storage, those of guests
/// wait behind them.
const CAPTURE_READS: usize = 8;
/// So long the workers take what guests leave of the processors. Where that does not suffice, as many more join them that get a
/// share: a recovery point that never comes protects nobody.
const PATIENCE: Duration = Duration::from_secs(5);
const ZERO_BLOCK: [u8; BLOCK_SIZE as usize] = [0; BLOCK_SIZE as usize];

/// What is done with the blocks.
#[derive(Debug)]
pub struct Settings<'a> {
    /// Keys of fingerprints.
    pub keys: &'a Keys,
    /// The segment that frames are made for.
    pub current: &'a Current,
    /// Compression.
    pub codec: Codec,
    /// Threads that fingerprint and compress.
    pub workers: usize,
    /// Fingerprints of what the vault holds; blocks with the same one are left out.
    pub table: &'a Table,
    /// Counts the bytes that are read from the disk.
    pub bytes_read: &'a AtomicU64,
    /// Where blocks are kept that guests overwrite before they are read; `None` in a scan.
    pub frozen: Option<&'a PreserveReader>,
    /// How fast the disk may be read.
    pub throttle: &'a Throttle,
}

/// A frame on its way to the sink.
#[derive(Debug)]
pub struct Captured {
    /// What has to be kept of the batch.
    pub frame: EncodedFrame,
    /// The block after the last one of the batch.
    pub end_block: u64,
}

/// Whether the sink wants more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// Go on.
    Continue,
    /// No more batches are begun; what has been begun still comes.
    Stop,
}

struct Numbered {
    number: u64,
    batch: Batch,
}

struct Done {
    number: u64,
    captured: Captured,
    buffer: ReadBuffer,
}

/// Runs batches of a disk through all stages and hands the frames to `sink`, in order.
///
/// # Errors
///
/// The disk cannot be read, a stage fails, or the sink does.
pub fn run<I, S>(
    source: &DiskSource,
    batches: I,
    settings: &Settings<'_>,
    mut sink: S,
) -> Result<()>
where
    I: Iterator<Item = Result<Batch>> + Send,
    S: FnMut(Captured) -> Result<Flow>,
{
    let mut buffers = buffers_for(settings)?;
    let count = buffers.len();
    let stopping = AtomicBool::new(false);
    let (to_workers, from_reader) = bounded::<Job<Numbered>>(count);
    let (to_caller, from_workers) = bounded::<Result<Done>>(count);
    let (free, freed) = bounded::<ReadBuffer>(count);
    std::thread::scope(|scope| {
        let reader_failed = to_caller.clone();
        let (stopping, work) = (&stopping, from_reader);
        scope.spawn(move || {
            if settings.frozen.is_none() {
                // Otherwise each block that waits to be read may make a guest wait for its copy.
                stand_back();
            }
            let result = Depth::new(source, RING_ENTRIES, &mut buffers).and_then(|depth| {
                let mut reader = Reader {
                    source,
                    settings,
                    buffers: count,
                    depth,
                    idle: buffers,
                    freed,
                    to_workers,
                    pace: Pace::new(settings.throttle),
                };
                reader.run(batches, stopping)
            });
            if let Err(error) = result {
                // Where the caller has gone, it has an error already.
                let _gone = reader_failed.send(Err(error));
            }
        });
        start_workers(scope, work, to_caller, settings);
        let result = assemble(&from_workers, &free, stopping, &mut sink);
        // Ends the other threads: their sends and receives fail from here on.
        stopping.store(true, Ordering::Relaxed);
        drop((free, from_workers));
        result
    })
}

/// Starts the threads that make frames.
fn start_workers<'scope>(
    scope: &'scope Scope<'scope, '_>,
    work: Receiver<Job<Numbered>>,
    to_caller: Sender<Result<Done>>,
    settings: &'scope Settings<'_>,
) {
    // Those that take what is left of the processors hold it; the others wait for its end.
    let (working, ended) = bounded::<()>(0);
    for _ in 0..settings.workers.max(1) {
        let (jobs, answers, working) = (work.clone(), to_caller.clone(), working.clone());
        scope.spawn(move || {
            take_what_is_left();
            work_until_closed(&jobs, &answers, settings);
            drop(working);
        });
        let (jobs, answers, ended) = (work.clone(), to_caller.clone(), ended.clone());
        scope.spawn(move || {
            if ended.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
                stand_back();
                work_until_closed(&jobs, &answers, settings);
            }
        });
    }
}

/// As many buffers as a capture or a scan has.
fn buffers_for(settings: &Settings<'_>) -> Result<Vec<ReadBuffer>> {
    let count = match settings.frozen {
        Some(_) if !settings.throttle.is_bound() => CAPTURE_BUFFERS,
        // Read far ahead, most of a small epoch would escape its bounds.
        _ => SCAN_BUFFERS,
    };
    let new = |index| ReadBuffer::new(BUFFER_BYTES, index).map_err(no_memory);
    (0..count).map(new).collect()
}

fn no_memory(error: io::Error) -> Error {
    Error::io("Cannot allocate buffers for a capture", error)
}

struct Reader<'a> {
    source: &'a DiskSource,
    settings: &'a Settings<'a>,
    /// All that there are.
    buffers: usize,
    depth: Depth<'a, Numbered>,
    idle: Vec<ReadBuffer>,
    freed: Receiver<ReadBuffer>,
    to_workers: Sender<Job<Numbered>>,
    pace: Pace<'a>,
}

impl Reader<'_> {
    fn run(
        &mut self,
        mut batches: impl Iterator<Item = Result<Batch>>,
        stopping: &AtomicBool,
    ) -> Result<()> {
        let mut number = 0;
        let mut finished = Vec::new();
        let mut exhausted = false;
        loop {
            self.idle.extend(self.freed.try_iter());
            exhausted |= stopping.load(Ordering::Relaxed);
            while !exhausted && self.may_begin() {
                match batches.next().transpose()? {
                    None => exhausted = true,
                    Some(batch) => {
                        finished.extend(self.begin(number, batch));
                        number += 1;
                    }
                }
            }
            if self.depth.is_busy() {
                self.depth
                    .wait(&mut finished)
                    .map_err(|error| self.source.failed(error))?;
            }
            if !self.pass_on(&mut finished)? {
                return Ok(());
            }
            if self.depth.is_busy() {
                continue;
            } else if exhausted {
                return Ok(());
            } else if self.idle.is_empty() {
                // Every buffer is with the workers or the caller.
                match self.freed.recv() {
                    Ok(buffer) => self.idle.push(buffer),
                    Err(_) => return Ok(()),
                }
            } else if self.pace.is_ahead() {
                // What is read has been passed on, so all that is missing is being worked at.
                let (idle, freed, all) = (self.idle.len(), &self.freed, self.buffers);
                self.pace.pause(|| idle + freed.len() < all);
            }
        }
    }

    /// Whether there is a buffer for another batch, and its reads should be begun before others come back.
    fn may_begin(&self) -> bool {
        let deep = match self.settings.frozen {
            Some(_) => CAPTURE_READS,
            None => RING_ENTRIES as usize,
        };
        !self.idle.is_empty() && self.depth.in_flight() < deep && !self.pace.is_ahead()
    }

    /// Begins to read a batch. Without reads it comes back at once.
    fn begin(&mut self, number: u64, batch: Batch) -> Option<(Job<Numbered>, Option<io::Error>)> {
        let buffer = self.idle.pop()?;
        let reads = self.reads_of(&batch);
        self.pace.count(batch.data_blocks() as u64 * BLOCK_SIZE);
        let content = Numbered { number, batch };
        let job = Job {
            buffer,
            reads,
            content,
        };
        self.depth.submit(job).map(|job| (job, None))
    }

    /// Reads into the front of the buffer, one extent behind the other.
    fn reads_of(&self, batch: &Batch) -> Vec<Read> {
        let mut position = 0;
        let mut reads = Vec::new();
        for extent in batch.data() {
            let length = extent.length_bytes() as usize;
            let on_disk = self
                .source
                .size_bytes()
                .saturating_sub(extent.offset_bytes());
            let present = length.min(usize::try_from(on_disk).unwrap_or(usize::MAX));
            if present > 0 {
                let target = position..position + present;
                reads.push(Read {
                    offset: extent.offset_bytes(),
                    target,
                });
            }
            position += length;
        }
        let bytes: usize = reads.iter().map(|read| read.target.len()).sum();
        let bytes_read = self.settings.bytes_read;
        bytes_read.fetch_add(bytes as u64, Ordering::Relaxed);
        reads
    }

    fn pass_on(&mut self, finished: &mut Vec<(Job<Numbered>, Option<io::Error>)>) -> Result<bool> {
        for (mut job, failed) in finished.drain(..) {
            if let Some(error) = failed {
                return Err(self.source.failed(error));
            }
            self.settle(&mut job)?;
            if self.to_workers.send(job).is_err() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Brings what was read into the state that counts: behind the end of the disk are zeroes, and blocks that guests have
    /// overwritten since the cut come from their copies, of which nobody needs more after that.
    fn settle(&self, job: &mut Job<Numbered>) -> Result<()> {
        let mut position = 0;
        for extent in job.content.batch.data() {
            let length = extent.length_bytes() as usize;
            let bytes = &mut job.buffer.bytes_mut()[position..position + length];
            position += length;
            let on_disk = self
                .source
                .size_bytes()
                .saturating_sub(extent.offset_bytes());
            if on_disk < length as u64 {
                // The buffer has older bytes there.
                bytes[on_disk as usize..].fill(0);
            }
            if let Some(frozen) = self.settings.frozen {
                for preserved in frozen.settle(extent, bytes)? {
                    frozen.give_back(preserved);
                }
            }
        }
        Ok(())
    }
}

fn work_until_closed(
    work: &Receiver<Job<Numbered>>,
    to_caller: &Sender<Result<Done>>,
    settings: &Settings<'_>,
) {
    let mut worker = match Compressor::new(settings.codec) {
        Ok(compressor) => Worker {
            settings,
            compressor,
            builder: FrameBuilder::default(),
        },
        Err(error) => {
            let _gone = to_caller.send(Err(Error::io("Cannot start the compression", error)));
            return;
        }
    };
    for job in work {
        if to_caller.send(worker.encode(job)).is_err() {
            return;
        }
    }
}

struct Worker<'a> {
    settings: &'a Settings<'a>,
    compressor: Compressor,
    builder: FrameBuilder,
}

impl Worker<'_> {
    fn encode(&mut self, mut job: Job<Numbered>) -> Result<Done> {
        let Numbered { number, batch } = job.content;
        let mut position = 0;
        for piece in &batch.pieces {
            if piece.hole {
                self.builder.push_zero(piece.extent);
                continue;
            }
            let length = piece.extent.length_bytes() as usize;
            let range = position..position + length;
            position += length;
            self.push_blocks(piece.extent, &job.buffer.bytes_mut()[range]);
        }
        let frame = self
            .builder
            .finish(&mut self.compressor, self.settings.current)?;
        let captured = Captured {
            frame,
            end_block: batch.end_block(),
        };
        Ok(Done {
            number,
            captured,
            buffer: job.buffer,
        })
    }

    fn push_blocks(&mut self, extent: Extent, bytes: &[u8]) {
        let mut known = [Fingerprint::UNKNOWN; FRAME_BLOCKS_MAX];
        let known = &mut known[..extent.block_count as usize];
        self.settings.table.lookup(extent.first_block, known);
        let blocks = bytes.chunks_exact(BLOCK_SIZE as usize).zip(known);
        for (block, (data, known)) in (extent.first_block..).zip(blocks) {
            if data == ZERO_BLOCK {
                self.builder.push_zero(Extent {
                    first_block: block,
                    block_count: 1,
                });
                continue;
            }
            let fingerprint = self.settings.keys.fingerprint(data);
            if fingerprint != *known {
                self.builder.push_block(block, data, fingerprint);
            }
        }
    }
}

fn assemble(
    from_workers: &Receiver<Result<Done>>,
    free: &Sender<ReadBuffer>,
    stopping: &AtomicBool,
    sink: &mut impl FnMut(Captured) -> Result<Flow>,
) -> Result<()> {
    let mut early = BTreeMap::new();
    let mut next = 0;
    for done in from_workers {
        let done = done?;
        early.insert(done.number, done);
        while let Some(done) = early.remove(&next) {
            next += 1;
            if sink(done.captured)? == Flow::Stop {
                stopping.store(true, Ordering::Relaxed);
            }
            // The reader has gone when it has nothing left to read.
            let _reader_gone = free.try_send(done.buffer);
        }
    }
    Ok(())
}
