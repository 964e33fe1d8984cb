//! Read, fingerprint, compress, in parallel and in order.
//!
//! Overview: the reader thread takes batches and free buffers and keeps the disk busy; workers take
//! what has been read and make frames; the caller's thread puts the frames back into the order of
//! the disk and hands them to its sink. A buffer is free again when its frame was handed over, so
//! nothing can run ahead by more than the buffers.
//!
//! Errors: the first one ends it; all threads are joined before it is returned.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crossbeam_channel::{Receiver, Sender, bounded};
use tracker::extent::{BLOCK_SIZE, Extent};
use tracker::preserve::reader::PreserveReader;

use super::plan::Batch;
use super::source::{Depth, DiskSource};
use super::throttle::{Pace, Throttle, stand_back};
use super::uring::{Job, Read, ReadBuffer};
use crate::error::{Error, Result};
use crate::keys::{Fingerprint, Keys};
use crate::segment::codec::{Codec, Compressor};
use crate::segment::format::FRAME_BLOCKS_MAX;
use crate::segment::frame::{EncodedFrame, FrameBuilder};
use crate::spool::table::Table;

/// Buffers of 128 KiB each: how deep the disk is read, and what all stages hold together.
const BUFFERS: usize = 64;
const BUFFER_BYTES: usize = FRAME_BLOCKS_MAX * BLOCK_SIZE as usize;
/// Entries of the ring; more reads wait in its queue.
const RING_ENTRIES: u32 = 256;
const ZERO_BLOCK: [u8; BLOCK_SIZE as usize] = [0; BLOCK_SIZE as usize];

/// What is done with the blocks.
#[derive(Debug)]
pub struct Settings<'a> {
    /// Keys of fingerprints and checks.
    pub keys: &'a Keys,
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
    let mut buffers = Vec::new();
    for index in 0..BUFFERS {
        buffers.push(ReadBuffer::new(BUFFER_BYTES, index as u16).map_err(no_memory)?);
    }
    let stopping = AtomicBool::new(false);
    let (to_workers, from_reader) = bounded::<Job<Numbered>>(BUFFERS);
    let (to_caller, from_workers) = bounded::<Result<Done>>(BUFFERS);
    let (free, freed) = bounded::<ReadBuffer>(BUFFERS);
    std::thread::scope(|scope| {
        let reader_failed = to_caller.clone();
        let (stopping, work) = (&stopping, from_reader);
        scope.spawn(move || {
            stand_back();
            let result = Depth::new(source, RING_ENTRIES, &mut buffers).and_then(|depth| {
                let mut reader = Reader {
                    source,
                    bytes_read: settings.bytes_read,
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
        for _ in 0..settings.workers.max(1) {
            let (work, to_caller) = (work.clone(), to_caller.clone());
            scope.spawn(move || work_until_closed(&work, &to_caller, source, settings));
        }
        drop((work, to_caller));
        let result = assemble(&from_workers, &free, stopping, &mut sink);
        // Ends the other threads: their sends and receives fail from here on.
        stopping.store(true, Ordering::Relaxed);
        drop((free, from_workers));
        result
    })
}

fn no_memory(error: io::Error) -> Error {
    Error::io("Cannot allocate buffers for a capture", error)
}

struct Reader<'a> {
    source: &'a DiskSource,
    bytes_read: &'a AtomicU64,
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
            while !exhausted && let Some(buffer) = self.idle.pop() {
                match batches.next().transpose()? {
                    None => {
                        self.idle.push(buffer);
                        exhausted = true;
                    }
                    Some(batch) => {
                        let reads = self.reads_of(&batch);
                        let (idle, freed) = (self.idle.len(), &self.freed);
                        // All but the one that is about to be filled.
                        let is_busy = || idle + freed.len() + 1 < BUFFERS;
                        self.pace
                            .read(batch.data_blocks() as u64 * BLOCK_SIZE, is_busy);
                        let content = Numbered { number, batch };
                        number += 1;
                        let job = Job {
                            buffer,
                            reads,
                            content,
                        };
                        if let Some(job) = self.depth.submit(job)
                            && self.to_workers.send(job).is_err()
                        {
                            return Ok(());
                        }
                    }
                }
            }
            if self.depth.is_busy() {
                self.depth
                    .wait(&mut finished)
                    .map_err(|error| self.source.failed(error))?;
                if !self.pass_on(&mut finished)? {
                    return Ok(());
                }
            } else if exhausted {
                return Ok(());
            } else {
                // Every buffer is with the workers or the caller.
                match self.freed.recv() {
                    Ok(buffer) => self.idle.push(buffer),
                    Err(_) => return Ok(()),
                }
            }
        }
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
        self.bytes_read.fetch_add(bytes as u64, Ordering::Relaxed);
        reads
    }

    fn pass_on(&mut self, finished: &mut Vec<(Job<Numbered>, Option<io::Error>)>) -> Result<bool> {
        for (job, failed) in finished.drain(..) {
            if let Some(error) = failed {
                return Err(self.source.failed(error));
            }
            if self.to_workers.send(job).is_err() {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

fn work_until_closed(
    work: &Receiver<Job<Numbered>>,
    to_caller: &Sender<Result<Done>>,
    source: &DiskSource,
    settings: &Settings<'_>,
) {
    stand_back();
    let mut worker = match Compressor::new(settings.codec) {
        Ok(compressor) => Worker {
            source,
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
    source: &'a DiskSource,
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
            let bytes = &mut job.buffer.bytes_mut()[range.clone()];
            position += length;
            // What lies behind the end of the disk counts as zero; the buffer has older bytes there.
            let on_disk = self
                .source
                .size_bytes()
                .saturating_sub(piece.extent.offset_bytes());
            if on_disk < length as u64 {
                bytes[on_disk as usize..].fill(0);
            }
            let preserved = match self.settings.frozen {
                Some(frozen) => frozen.settle(piece.extent, bytes)?,
                None => Vec::new(),
            };
            self.push_blocks(piece.extent, &job.buffer.bytes_mut()[range]);
            for extent in preserved {
                // The content is in our hands; its copy may go.
                self.settings
                    .frozen
                    .iter()
                    .for_each(|frozen| frozen.give_back(extent));
            }
        }
        let frame = self
            .builder
            .finish(&mut self.compressor, self.settings.keys)?;
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
