//! Making a disk of a recovery point.
//!
//! Overview: the index says which segment has which blocks. A few threads read the directories of
//! the segments that are needed once more, cut their frames into pieces, and put these into a
//! channel; the workers take them out, read them by one request each, check every frame and block,
//! and write the blocks to their place. Blocks of no segment are zero already in a new file, and
//! are made zero on a device before the data come.
//!
//! Errors: the first one stops all threads, and the target does not get its name.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};

use crossbeam_channel::{Receiver, Sender, bounded};
use tracker::extent::{BLOCK_SIZE, Epoch, Extent};

use super::index::Index;
use super::piece::{Limits, Piece, by_frame, cut};
use super::segments::Segments;
use super::target::Target;
use super::workers::{Failure, Numbers, data_threads, directory_threads};
use crate::error::{Error, ErrorKind, Result};
use crate::segment::frame::{checked_part, damaged};
use crate::vault::Vault;
use crate::vault::layout::is_valid_name;
use crate::vault::manifest::{DiskPoint, Manifest};

const LIMITS: Limits = Limits {
    read_bytes_max: 4 << 20,
    gap_bytes_max: 64 << 10,
};
/// Bytes of neighbouring blocks that are gathered for one write.
const WRITE_BYTES_MAX: usize = 1 << 20;
static ZERO_BLOCK: [u8; BLOCK_SIZE as usize] = [0; BLOCK_SIZE as usize];

/// What to restore, and where to.
#[derive(Clone, Debug)]
pub struct RestoreOptions {
    /// Name of the machine.
    pub machine: String,
    /// The recovery point; `None`: the newest one.
    pub point: Option<Epoch>,
    /// Name of the disk; `None`: the only one.
    pub disk: Option<String>,
    /// A new file, or a block device that is not in use.
    pub target: PathBuf,
    /// Threads that read, check and write; at least one.
    pub threads: usize,
}

/// What was restored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RestoreReport {
    /// The recovery point.
    pub epoch: Epoch,
    /// Name of the disk.
    pub disk: String,
    /// Size of the disk in bytes.
    pub size_bytes: u64,
    /// Bytes of it that the vault holds as data; the others are zero.
    pub data_bytes: u64,
    /// Bytes that were read from segments, directories included.
    pub read_bytes: u64,
}

/// Restores one disk of a recovery point. `progress` is told, by many threads and in no strict
/// order, how many bytes of data are done, and of how many.
///
/// # Errors
///
/// `Missing`: no such recovery point, disk, folder or object. `Corrupt`: an object of the vault is
/// damaged; the message names it. `Full`: the target has no room left. `State`, `InUse`,
/// `Mismatch`, `Invalid`: the target exists, is in use, too small, or cannot be one.
pub fn restore(
    vault: &Vault,
    options: &RestoreOptions,
    progress: &(dyn Fn(u64, u64) + Sync),
) -> Result<RestoreReport> {
    let manifest = find_point(vault, options)?;
    let disk = find_disk(&manifest, options.disk.as_deref())?;
    let target = Target::open(&options.target, disk.size_bytes)?;
    let segments = Segments::new(vault, &options.machine, disk);
    let index = Index::read(&segments, options.threads)?;
    let data_bytes = bytes_of(&index, disk.size_bytes);
    progress(0, data_bytes);
    let is_blank = target.is_blank();
    fill(target, &segments, &index, options.threads, &|done| {
        progress(done, data_bytes);
    })
    .map_err(|error| {
        if is_blank {
            return error;
        }
        let shown = options.target.display();
        let what = format!("Device {shown} holds only a part of the disk: restore to it again");
        Error::new(error.kind(), what).with_source(error)
    })?;
    Ok(RestoreReport {
        epoch: manifest.epoch,
        disk: disk.name.clone(),
        size_bytes: disk.size_bytes,
        data_bytes,
        read_bytes: segments.read_bytes(),
    })
}

fn find_point(vault: &Vault, options: &RestoreOptions) -> Result<Manifest> {
    let machine = &options.machine;
    if !is_valid_name(machine) {
        let what = format!("{machine:?} is not the name of a machine");
        return Err(Error::new(ErrorKind::Invalid, what));
    }
    if let Some(epoch) = options.point {
        return vault.manifest(machine, epoch);
    }
    vault.newest_good(machine)?.ok_or_else(|| {
        let url = vault.url();
        let what = format!("Machine {machine} has no recovery point in the vault at {url}");
        Error::new(ErrorKind::Missing, what)
    })
}

fn find_disk<'a>(manifest: &'a Manifest, name: Option<&str>) -> Result<&'a DiskPoint> {
    let names = || {
        let names: Vec<_> = manifest.disks.iter().map(|disk| &*disk.name).collect();
        names.join(", ")
    };
    let (machine, epoch) = (&manifest.machine, manifest.epoch);
    match (name, &manifest.disks[..]) {
        (None, [disk]) => Ok(disk),
        (None, disks) => {
            let what = format!(
                "Recovery point {epoch} of machine {machine} has {} disks, name one of them: {}",
                disks.len(),
                names()
            );
            Err(Error::new(ErrorKind::Invalid, what))
        }
        (Some(name), _) => manifest.disk(name).ok_or_else(|| {
            let what = format!(
                "Recovery point {epoch} of machine {machine} has no disk {name:?}, it has: {}",
                names()
            );
            Error::new(ErrorKind::Missing, what)
        }),
    }
}

/// The bytes of a disk that are data; its last block may be short.
fn bytes_of(index: &Index, size_bytes: u64) -> u64 {
    let data = index.runs().iter().filter(|run| run.segment().is_some());
    data.map(|run| on_disk(run.extent(), size_bytes)).sum()
}

/// How many bytes of an extent lie before the end of the disk.
fn on_disk(extent: Extent, size_bytes: u64) -> u64 {
    let behind = size_bytes.saturating_sub(extent.offset_bytes());
    behind.min(extent.length_bytes())
}

/// Writes everything, and makes it durable.
fn fill(
    mut target: Target,
    segments: &Segments<'_>,
    index: &Index,
    threads: usize,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<()> {
    if !target.is_blank() {
        zero_gaps(&mut target, index, segments.disk().size_bytes)?;
    }
    let needed = index.needed(segments.count());
    let failure = Failure::default();
    let numbers = Numbers::new(segments.count(), &failure);
    let workers = data_threads(threads);
    let (pieces, work) = bounded::<Piece>(2 * workers);
    let copy = Copy {
        segments,
        target: &target,
        done: AtomicU64::new(0),
        progress,
    };
    std::thread::scope(|scope| {
        for _ in 0..directory_threads(threads) {
            let pieces = pieces.clone();
            let (numbers, needed) = (&numbers, &needed);
            scope.spawn(move || {
                numbers.work(|number| {
                    if needed[number] {
                        cut_segment(segments, index, number, &pieces)?;
                    }
                    Ok(())
                });
            });
        }
        drop(pieces);
        for _ in 0..workers {
            let work = work.clone();
            let (copy, failure) = (&copy, &failure);
            scope.spawn(move || copy.work(&work, failure));
        }
        // The threads have the only receivers: when these are gone, sending ends too.
        drop(work);
    });
    failure.into_result()?;
    target.finish()
}

/// Makes everything zero that will not be written.
fn zero_gaps(target: &mut Target, index: &Index, size_bytes: u64) -> Result<()> {
    let mut from = 0;
    for run in index.runs().iter().filter(|run| run.segment().is_some()) {
        let extent = run.extent();
        target.zero(from..extent.offset_bytes())?;
        from = extent.offset_bytes() + extent.length_bytes();
    }
    target.zero(from..size_bytes)
}

fn cut_segment(
    segments: &Segments<'_>,
    index: &Index,
    segment: usize,
    pieces: &Sender<Piece>,
) -> Result<()> {
    let directory = segments.directory(segment)?;
    let entries = index.needed_entries(segment, &directory.extents);
    for piece in cut(segment, &directory, by_frame(&entries), LIMITS) {
        // No receivers are left after a failure, which the failure tells.
        if pieces.send(piece).is_err() {
            break;
        }
    }
    Ok(())
}

/// What the workers share.
struct Copy<'a> {
    segments: &'a Segments<'a>,
    target: &'a Target,
    /// Bytes of data that are done.
    done: AtomicU64,
    progress: &'a (dyn Fn(u64) + Sync),
}

impl Copy<'_> {
    fn work(&self, work: &Receiver<Piece>, failure: &Failure) {
        for piece in work {
            if failure.is_set() {
                return;
            }
            match self.copy(&piece) {
                Ok(bytes) => {
                    let before = self.done.fetch_add(bytes, Ordering::Relaxed);
                    (self.progress)(before + bytes);
                }
                Err(error) => failure.set(error),
            }
        }
    }

    /// Reads, checks and writes a piece; returns its bytes on the disk.
    fn copy(&self, piece: &Piece) -> Result<u64> {
        let vault = self.segments.vault();
        let size_bytes = self.segments.disk().size_bytes;
        let key = self.segments.key(piece.segment);
        let stored = piece.read(vault.store(), &key)?;
        self.segments.count_read(stored.len() as u64);
        let mut writer = Writer::new(self.target);
        let mut bytes = 0;
        for (frame, entries) in piece.frames() {
            let raw = piece
                .decode(frame, &stored, vault.keys())
                .map_err(|what| damaged(&key, &what))?;
            for entry in entries {
                let extent = entry.extent();
                let data = checked_part(&piece.directory, entry, extent, &raw, vault.keys())
                    .map_err(|what| damaged(&key, &what))?;
                let count = on_disk(extent, size_bytes);
                writer.push(extent.offset_bytes(), &data[..count as usize])?;
                bytes += count;
            }
        }
        writer.flush()?;
        Ok(bytes)
    }
}

/// Gathers neighbouring blocks into one write, and leaves holes where a blank target needs no data.
struct Writer<'a> {
    target: &'a Target,
    skips_zeroes: bool,
    offset: u64,
    gathered: Vec<u8>,
}

impl<'a> Writer<'a> {
    fn new(target: &'a Target) -> Self {
        Self {
            target,
            skips_zeroes: target.is_blank(),
            offset: 0,
            gathered: Vec::new(),
        }
    }

    fn push(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        let blocks = bytes.chunks(BLOCK_SIZE as usize);
        let offsets = (offset..).step_by(BLOCK_SIZE as usize);
        for (offset, block) in offsets.zip(blocks) {
            if self.skips_zeroes && *block == ZERO_BLOCK[..block.len()] {
                continue;
            }
            let end = self.offset + self.gathered.len() as u64;
            if offset != end || self.gathered.len() >= WRITE_BYTES_MAX {
                self.flush()?;
                self.offset = offset;
            }
            self.gathered.extend_from_slice(block);
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        if !self.gathered.is_empty() {
            self.target.write(self.offset, &self.gathered)?;
            self.gathered.clear();
        }
        Ok(())
    }
}
