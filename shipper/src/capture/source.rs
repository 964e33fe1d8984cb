//! The disk as capture reads it: where its holes are, and its blocks at depth.

use std::fs::{File, OpenOptions};
use std::io;
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Once;

use nix::unistd::{Whence, lseek64};
use tracker::extent::{BLOCK_SIZE, Extent, blocks_of};

use super::plan::Piece;
use super::threads::ThreadReads;
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

    /// Size in bytes: what was found at the opening, or was set since.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Bytes that the file or device has at this moment.
    ///
    /// # Errors
    ///
    /// The system does not tell.
    pub fn present_bytes(&mut self) -> Result<u64> {
        let end = self.file.seek(SeekFrom::End(0));
        end.map_err(|error| self.failed(error))
    }

    /// From here on it counts as a disk of so many bytes, which is what the tracker serves of it. A
    /// file may be longer for a moment while it grows, or because nobody has told the tracker.
    pub fn set_size(&mut self, size_bytes: u64) {
        self.size_bytes = size_bytes;
    }

    /// The disk from a block on, up to another one.
    pub fn range(&self, first_block: u64, end_block: u64) -> Extent {
        let end = blocks_of(self.size_bytes).min(end_block);
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

/// Reads of a disk: through an io_uring, or by threads where there is none.
pub(super) enum Depth<'a, T> {
    Uring(Box<Reads<'a, T>>),
    Threads(ThreadReads<T>),
}

impl<'a, T: Send + 'static> Depth<'a, T> {
    pub(super) fn new(
        source: &'a DiskSource,
        entries: u32,
        buffers: &mut [ReadBuffer],
    ) -> Result<Self> {
        match Reads::new(&source.file, entries, buffers) {
            Ok(reads) => Ok(Self::Uring(Box::new(reads))),
            Err(error) => {
                // Once: captures are made all the time.
                static WARNED: Once = Once::new();
                WARNED.call_once(|| {
                    tracing::warn!(
                        "Threads read the disks, since an io_uring cannot be had: see the sysctl \
                         kernel.io_uring_disabled and the seccomp profile of the container: {error}"
                    );
                });
                Self::threads(source)
            }
        }
    }

    fn threads(source: &DiskSource) -> Result<Self> {
        let reads = ThreadReads::new(&source.file).map_err(|error| source.failed(error))?;
        Ok(Self::Threads(reads))
    }

    /// Reads in flight, or jobs where threads read them one after the other.
    pub(super) fn in_flight(&self) -> usize {
        match self {
            Self::Uring(reads) => reads.in_flight(),
            Self::Threads(reads) => reads.in_flight(),
        }
    }

    /// Whether a job is being read.
    pub(super) fn is_busy(&self) -> bool {
        self.in_flight() > 0
    }

    /// Begins a job; gives it back at once if it has nothing to read.
    pub(super) fn submit(&mut self, job: Job<T>) -> Option<Job<T>> {
        match self {
            Self::Uring(reads) => reads.submit(job),
            Self::Threads(reads) => reads.submit(job),
        }
    }

    /// Waits for jobs to be finished.
    pub(super) fn wait(
        &mut self,
        finished: &mut Vec<(Job<T>, Option<io::Error>)>,
    ) -> io::Result<()> {
        match self {
            Self::Uring(reads) => reads.wait(finished),
            Self::Threads(reads) => reads.wait(finished),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::capture::uring::Read;

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

    /// Runs a case over an io_uring, where it can be had, and over threads.
    fn over_both(case: impl Fn(&DiskSource, Depth<'_, usize>, Vec<ReadBuffer>)) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        let content: Vec<u8> = (0..DISK_BYTES).map(|at| (at / 1000) as u8).collect();
        std::fs::write(&path, content).unwrap();
        let source = DiskSource::open(&path).unwrap();
        let new_buffers = || {
            let new = |index| ReadBuffer::new(BUFFER_BYTES, index).unwrap();
            (0..BUFFERS).map(new).collect::<Vec<_>>()
        };
        let mut buffers = new_buffers();
        match Depth::new(&source, 8, &mut buffers).unwrap() {
            Depth::Threads(_) => eprintln!("not run over io_uring"),
            depth => case(&source, depth, buffers),
        }
        case(&source, Depth::threads(&source).unwrap(), new_buffers());
    }

    const DISK_BYTES: u64 = 1 << 20;
    const BUFFER_BYTES: usize = 64 << 10;
    const BUFFERS: u16 = 12;

    fn reads_at(offsets: &[u64]) -> Vec<Read> {
        let reads = offsets.iter().enumerate();
        reads
            .map(|(number, offset)| Read {
                offset: *offset,
                target: number * 5000..number * 5000 + 4096,
            })
            .collect()
    }

    #[test]
    fn jobs_come_back_with_what_was_read() {
        over_both(|_, mut depth, buffers| {
            let offsets = |number: usize| [number as u64 * 80_000, 7, number as u64 * 333 + 1];
            for (content, buffer) in buffers.into_iter().enumerate() {
                let reads = reads_at(&offsets(content));
                let job = Job {
                    buffer,
                    reads,
                    content,
                };
                assert!(depth.submit(job).is_none());
            }
            let mut finished = Vec::new();
            while depth.is_busy() {
                depth.wait(&mut finished).unwrap();
            }
            assert_eq!(finished.len(), usize::from(BUFFERS));
            for (mut job, failed) in finished {
                assert!(failed.is_none(), "{failed:?}");
                for (number, offset) in offsets(job.content).into_iter().enumerate() {
                    let bytes = &job.buffer.bytes_mut()[number * 5000..][..4096];
                    let expected = (offset..offset + 4096).map(|at| (at / 1000) as u8);
                    assert!(expected.eq(bytes.iter().copied()), "{offset}");
                }
            }
        });
    }

    #[test]
    fn the_end_of_a_disk_is_an_error_of_its_job_alone() {
        over_both(|_, mut depth, buffers| {
            let lists = [&[0][..], &[0, DISK_BYTES - 4095], &[], &[DISK_BYTES - 4096]];
            let mut idle = 0;
            for ((content, offsets), buffer) in lists.iter().enumerate().zip(buffers) {
                let reads = reads_at(offsets);
                let job = Job {
                    buffer,
                    reads,
                    content,
                };
                idle += usize::from(depth.submit(job).is_some());
            }
            assert_eq!(idle, 1, "a job without reads comes back at once");
            let mut finished = Vec::new();
            while depth.is_busy() {
                depth.wait(&mut finished).unwrap();
            }
            finished.sort_by_key(|(job, _)| job.content);
            let failed: Vec<bool> = finished.iter().map(|(_, error)| error.is_some()).collect();
            assert_eq!(failed, [false, true, false]);
            let error = finished[1].1.as_ref().unwrap();
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        });
    }

    #[test]
    fn a_panic_of_a_thread_is_an_error_of_its_job() {
        over_both(|source, _, buffers| {
            let mut depth = Depth::threads(source).unwrap();
            for (content, buffer) in buffers.into_iter().enumerate() {
                let target = BUFFER_BYTES..2 * BUFFER_BYTES;
                let reads = vec![Read { offset: 0, target }];
                let job = Job {
                    buffer,
                    reads,
                    content,
                };
                assert!(depth.submit(job).is_none());
            }
            let mut finished = Vec::new();
            while depth.is_busy() {
                depth.wait(&mut finished).unwrap();
            }
            assert!(finished.iter().all(|(_, error)| error.is_some()));
        });
    }
}
