//! The disk as capture reads it: where its holes are, and its blocks at depth.

use std::fs::{File, OpenOptions};
use std::io;
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};

use nix::unistd::{Whence, lseek64};
use tracker::extent::{BLOCK_SIZE, Extent, blocks_of};

use super::plan::Piece;
use super::uring::{Job, ReadBuffer, Reads};
use crate::error::{Error, ErrorKind, Result};

/// An open disk.
#[derive(Debug)]
pub struct DiskSource {
    path: PathBuf,
    file: File,
    size_bytes: u64,
    /// Holes can be asked for.
    sparse: bool,
}

impl DiskSource {
    /// Opens an image or device to be read.
    ///
    /// # Errors
    ///
    /// It cannot be opened, or is neither.
    pub fn open(path: &Path) -> Result<Self> {
        let shown = path.display();
        let failed = |error| Error::io(format!("Cannot read disk {shown}"), error);
        let mut file = OpenOptions::new().read(true).open(path).map_err(failed)?;
        let kind = file.metadata().map_err(failed)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!("Disk {shown} is neither a file nor a block device"),
            ));
        }
        let size_bytes = file.seek(SeekFrom::End(0)).map_err(failed)?;
        Ok(Self {
            path: path.to_owned(),
            file,
            size_bytes,
            sparse: kind.is_file(),
        })
    }

    /// Path of the disk.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Size in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// The whole disk from a block on.
    pub fn rest_from(&self, first_block: u64) -> Extent {
        let end = blocks_of(self.size_bytes);
        Extent {
            first_block,
            block_count: end.saturating_sub(first_block),
        }
    }

    pub(super) fn failed(&self, error: io::Error) -> Error {
        Error::io(format!("Cannot read disk {}", self.path.display()), error)
    }

    /// Splits extents, in ascending order, into what is data and what is a hole.
    pub fn pieces<'a, I>(&'a self, extents: I) -> impl Iterator<Item = Result<Piece>> + 'a
    where
        I: Iterator<Item = Result<Extent>> + 'a,
    {
        Pieces {
            source: self,
            extents,
            rest: Extent {
                first_block: 0,
                block_count: 0,
            },
            known: None,
        }
    }

    /// The next run of bytes from `offset` on that is all data or all hole: its kind and its end.
    fn run_at(&self, offset: u64) -> Result<(bool, u64)> {
        if !self.sparse {
            return Ok((false, self.size_bytes));
        }
        let seek = |whence| match lseek64(&self.file, offset as i64, whence) {
            Ok(found) => Ok((found as u64).min(self.size_bytes)),
            // No data up to the end.
            Err(nix::Error::ENXIO) => Ok(self.size_bytes),
            Err(errno) => Err(self.failed(errno.into())),
        };
        let data = seek(Whence::SeekData)?;
        if data > offset {
            return Ok((true, data));
        }
        Ok((false, seek(Whence::SeekHole)?))
    }
}

struct Pieces<'a, I> {
    source: &'a DiskSource,
    extents: I,
    rest: Extent,
    /// The last run that was asked for: its kind, begin and end in bytes.
    known: Option<(bool, u64, u64)>,
}

impl<I: Iterator<Item = Result<Extent>>> Pieces<'_, I> {
    fn run_at(&mut self, offset: u64) -> Result<(bool, u64)> {
        match self.known {
            // Only data is believed again: a hole may have been written since.
            Some((false, begin, end)) if begin <= offset && offset < end => Ok((false, end)),
            _ => {
                let (hole, end) = self.source.run_at(offset)?;
                self.known = Some((hole, offset, end));
                Ok((hole, end))
            }
        }
    }
}

impl<I: Iterator<Item = Result<Extent>>> Iterator for Pieces<'_, I> {
    type Item = Result<Piece>;

    fn next(&mut self) -> Option<Self::Item> {
        while self.rest.block_count == 0 {
            match self.extents.next()? {
                Ok(extent) => self.rest = extent,
                Err(error) => return Some(Err(error)),
            }
        }
        let offset = self.rest.offset_bytes();
        let (hole, end) = match self.run_at(offset) {
            Ok(run) => run,
            Err(error) => return Some(Err(error)),
        };
        // A block that is partly data is data; the last block of a disk may be short.
        let end_block = if hole && end < self.source.size_bytes {
            end / BLOCK_SIZE
        } else {
            end.div_ceil(BLOCK_SIZE)
        };
        let (hole, end_block) = if end_block <= self.rest.first_block {
            (false, self.rest.first_block + 1)
        } else {
            (hole, end_block)
        };
        let block_count = (end_block - self.rest.first_block).min(self.rest.block_count);
        let extent = Extent {
            first_block: self.rest.first_block,
            block_count,
        };
        self.rest.first_block += block_count;
        self.rest.block_count -= block_count;
        Some(Ok(Piece { extent, hole }))
    }
}

/// Reads of a disk: through an io_uring, or one by one where there is none.
pub(super) enum Depth<'a, T> {
    Uring(Box<Reads<'a, T>>),
    Plain(&'a File, Vec<(Job<T>, Option<io::Error>)>),
}

impl<'a, T> Depth<'a, T> {
    pub(super) fn new(source: &'a DiskSource, entries: u32, buffers: &mut [ReadBuffer]) -> Self {
        match Reads::new(&source.file, entries, buffers) {
            Ok(reads) => Self::Uring(Box::new(reads)),
            Err(error) => {
                tracing::warn!(
                    "No io_uring here ({error}): disks are read one block run at a time"
                );
                Self::Plain(&source.file, Vec::new())
            }
        }
    }

    /// Whether a job is being read.
    pub(super) fn is_busy(&self) -> bool {
        match self {
            Self::Uring(reads) => reads.in_flight() > 0,
            Self::Plain(_, done) => !done.is_empty(),
        }
    }

    /// Begins a job; gives it back at once if it has nothing to read.
    pub(super) fn submit(&mut self, mut job: Job<T>) -> Option<Job<T>> {
        match self {
            Self::Uring(reads) => reads.submit(job),
            Self::Plain(file, done) => {
                if job.reads.is_empty() {
                    return Some(job);
                }
                let mut failed = None;
                for read in std::mem::take(&mut job.reads) {
                    let target = &mut job.buffer.bytes_mut()[read.target];
                    if let Err(error) = file.read_exact_at(target, read.offset) {
                        failed.get_or_insert(error);
                    }
                }
                done.push((job, failed));
                None
            }
        }
    }

    /// Waits for jobs to be finished.
    pub(super) fn wait(
        &mut self,
        finished: &mut Vec<(Job<T>, Option<io::Error>)>,
    ) -> io::Result<()> {
        match self {
            Self::Uring(reads) => reads.wait(finished),
            Self::Plain(_, done) => {
                finished.append(done);
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_are_told_from_data() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        let file = File::create(&path).unwrap();
        file.set_len(1024 * BLOCK_SIZE + 512).unwrap();
        file.write_all_at(&[1; 100], 512 * BLOCK_SIZE + 7).unwrap();
        file.write_all_at(&[1; 512], 1024 * BLOCK_SIZE).unwrap();
        let source = DiskSource::open(&path).unwrap();
        let extents = [Ok(Extent {
            first_block: 3,
            block_count: 1022,
        })];
        let pieces: Vec<Piece> = source
            .pieces(extents.into_iter())
            .map(|piece| piece.unwrap())
            .collect();
        let mut next = 3;
        let mut data = Vec::new();
        for piece in pieces {
            assert_eq!(piece.extent.first_block, next);
            next = piece.extent.end_block();
            if !piece.hole {
                data.extend(piece.extent.first_block..next);
            }
        }
        assert_eq!(next, 1025);
        assert!(data.contains(&512) && data.contains(&1024), "{data:?}");
        assert!(data.len() < 600, "holes are not seen");
    }
}
