//! Writing a segment into a file of the spool.
//!
//! Order: header; frames as they come; directory and footer; sync. A file without its footer is
//! none: the spool gives it its name only after [`SegmentWriter::finish`].

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use zerocopy::{FromZeros, IntoBytes};

use tracker::extent::Extent;

use super::format::{
    Directory, ExtentEntry, FOOTER_BYTES, FRAME_NONE, Footer, Frame, FrameEntry, HEADER_BYTES,
    Header, SEGMENT_BYTES_TARGET,
};
use super::frame::EncodedFrame;
use super::seal::SegmentSeal;
use super::sealed;
use crate::error::{Error, ErrorKind, Result};
use crate::keys::{Check, Fingerprint};
use crate::segment::reference::SegmentRef;

/// Whenever so much has been added the system is told to write it to the disk, so that little is left for the sync. While that
/// lasts, nothing else of the capture goes on for long.
const WRITE_OUT_BYTES: u64 = 4 << 20;

/// A segment that is being written.
#[derive(Debug)]
pub struct SegmentWriter {
    path: PathBuf,
    file: BufWriter<File>,
    seal: Arc<SegmentSeal>,
    offset: u64,
    /// So far the system was told to write to the disk.
    written_out: u64,
    frames: Vec<Frame>,
    extents: Vec<ExtentEntry>,
    fingerprints: Vec<Fingerprint>,
    zero_blocks: u64,
}

impl SegmentWriter {
    /// Begins a segment. A file that is there goes: it is not written to, since the same file may be an object of
    /// the vault by another name.
    ///
    /// # Errors
    ///
    /// The file cannot be made.
    pub fn create(path: &Path, seal: Arc<SegmentSeal>) -> Result<Self> {
        let failed = |error| Error::io(format!("Cannot write segment {}", path.display()), error);
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
        let created = File::create_new(path).map_err(failed)?;
        let mut file = BufWriter::with_capacity(256 << 10, created);
        let header = Header::of(seal.owner().version());
        file.write_all(header.as_bytes()).map_err(failed)?;
        Ok(Self {
            path: path.to_owned(),
            file,
            seal,
            offset: HEADER_BYTES as u64,
            written_out: 0,
            frames: Vec::new(),
            extents: Vec::new(),
            fingerprints: Vec::new(),
            zero_blocks: 0,
        })
    }

    fn failed(&self, error: std::io::Error) -> Error {
        Error::io(
            format!("Cannot write segment {}", self.path.display()),
            error,
        )
    }

    /// Whether it is this segment.
    pub fn is_of(&self, seal: &Arc<SegmentSeal>) -> bool {
        Arc::ptr_eq(&self.seal, seal)
    }

    /// Whether nobody else can make frames for it.
    pub fn is_left(&self) -> bool {
        Arc::strong_count(&self.seal) == 1
    }

    /// Enough is in it.
    pub fn is_full(&self) -> bool {
        self.stored_bytes() >= SEGMENT_BYTES_TARGET
    }

    /// Bytes that the segment has so far, the directory included.
    pub fn stored_bytes(&self) -> u64 {
        self.offset
            + (self.frames.len() * size_of::<FrameEntry>()
                + self.extents.len() * size_of::<ExtentEntry>()
                + self.fingerprints.len() * 16
                + FOOTER_BYTES) as u64
    }

    /// Adds a frame that was made for it, none of whose blocks was added before.
    ///
    /// # Errors
    ///
    /// `Invalid`: it was made for another segment, and could not be opened here. Other kinds: the file cannot be
    /// written.
    pub fn append(&mut self, frame: &EncodedFrame) -> Result<()> {
        if frame.seal.as_ref().is_some_and(|seal| !self.is_of(seal)) {
            let shown = self.path.display();
            let what = format!("A frame of another segment was to be added to {shown}");
            return Err(Error::new(ErrorKind::Invalid, what));
        }
        let index = self.frames.len() as u32;
        if !frame.stored.is_empty() {
            self.file
                .write_all(&frame.stored)
                .map_err(|error| self.failed(error))?;
            self.frames.push(Frame {
                offset: self.offset,
                stored_bytes: frame.stored.len() as u32,
                block_count: frame.fingerprints.len() as u16,
                codec: frame.codec,
                number: frame.number,
                check: frame.check,
            });
            self.offset += frame.stored.len() as u64;
            self.fingerprints.extend_from_slice(&frame.fingerprints);
            self.write_out();
        }
        for run in &frame.runs {
            match run.frame_block {
                Some(frame_block) => self.extents.push(ExtentEntry {
                    first_block: run.extent.first_block.into(),
                    block_count: (run.extent.block_count as u32).into(),
                    frame: index.into(),
                    frame_block: frame_block.into(),
                    reserved: 0.into(),
                }),
                None => self.append_zero(run.extent),
            }
        }
        Ok(())
    }

    /// Tells the system to begin with what has been added.
    fn write_out(&mut self) {
        let written = self.offset - self.file.buffer().len() as u64;
        let added = written.saturating_sub(self.written_out);
        if added < WRITE_OUT_BYTES {
            return;
        }
        let (from, length) = (self.written_out as i64, added as i64);
        // A hint: what fails here fails in the sync, too.
        let _hint = posix_fadvise(
            self.file.get_ref(),
            from,
            length,
            PosixFadviseAdvice::POSIX_FADV_DONTNEED,
        );
        self.written_out = written;
    }

    /// Adds blocks that are zero, none of which was added before.
    pub fn append_zero(&mut self, extent: Extent) {
        self.zero_blocks += extent.block_count;
        let mut left = extent;
        if let Some(last) = self.extents.last_mut()
            && last.frame_index().is_none()
            && last.extent().end_block() == left.first_block
        {
            let room = u64::from(u32::MAX - last.block_count.get()).min(left.block_count);
            last.block_count = (last.block_count.get() + room as u32).into();
            left.first_block += room;
            left.block_count -= room;
        }
        while left.block_count > 0 {
            let count = left.block_count.min(u64::from(u32::MAX)) as u32;
            self.extents.push(ExtentEntry {
                first_block: left.first_block.into(),
                block_count: count.into(),
                frame: FRAME_NONE.into(),
                frame_block: 0.into(),
                reserved: 0.into(),
            });
            left.first_block += u64::from(count);
            left.block_count -= u64::from(count);
        }
    }

    /// Writes directory and footer, and syncs the file.
    ///
    /// # Errors
    ///
    /// The file cannot be written or synced.
    pub fn finish(mut self) -> Result<(SegmentRef, Directory)> {
        // What is captured first need not lie in front.
        self.extents.sort_by_key(|entry| entry.first_block.get());
        let directory = Directory::new(
            std::mem::take(&mut self.frames),
            std::mem::take(&mut self.extents),
            std::mem::take(&mut self.fingerprints),
        );
        let (directory, tail, check) = match self.seal.key() {
            Some((salt, key)) => {
                let (tail, tag) = sealed::encode(&directory, self.offset, salt, key)?;
                (directory.with_key(Arc::clone(key)), tail, tag)
            }
            None => {
                let (tail, check) = self.plain_tail(&directory);
                (directory, tail, check)
            }
        };
        let written = self
            .file
            .write_all(&tail)
            .and_then(|()| self.file.flush())
            .and_then(|()| self.file.get_ref().sync_all());
        written.map_err(|error| self.failed(error))?;
        let segment = SegmentRef {
            name: self.seal.name().into(),
            bytes: self.offset + tail.len() as u64,
            directory_bytes: (tail.len() - self.seal.owner().footer_bytes()) as u64,
            check: check.into(),
            data_blocks: directory.fingerprints.len() as u64,
            zero_blocks: self.zero_blocks,
        };
        Ok((segment, directory))
    }

    /// Directory and footer of a segment that is not sealed, and the check.
    fn plain_tail(&self, directory: &Directory) -> (Vec<u8>, Check) {
        let (name, owner) = (self.seal.name(), self.seal.owner());
        let mut bytes = directory.encode();
        let mut footer = Footer::new_zeroed();
        footer.vault_id = owner.vault_id;
        footer.owner = owner.check;
        footer.generation = name.generation.into();
        footer.first_epoch = name.first_epoch.0.into();
        footer.last_epoch = name.last_epoch.0.into();
        footer.number = name.number.into();
        footer.directory_offset = self.offset.into();
        footer.directory_bytes = (bytes.len() as u64).into();
        footer.frame_count = (directory.frames.len() as u32).into();
        footer.extent_count = (directory.extents.len() as u32).into();
        footer.data_blocks = (directory.fingerprints.len() as u64).into();
        footer.zero_blocks = self.zero_blocks.into();
        footer.directory_check = owner.keys.check(&[&bytes]);
        footer.seal(&owner.keys);
        bytes.extend_from_slice(footer.as_bytes());
        (bytes, footer.check)
    }
}
