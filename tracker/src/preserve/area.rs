//! The tracker's side of a preserve file.
//!
//! Order of a copy: the old block is read; written to the file; its bit is set (`protocol::copied`). Only the
//! thread that copies the blocks of a disk sets bits, so pages of the map are made ready by it alone,
//! without a lock.
//!
//! A page of a map is written before it is stored to through the mapping: a store into a hole of a file on a
//! full disk would be SIGBUS, a write is an error that can be met.
//!
//! Failure: the first one is noted in the head, where the shipper sees it, and nothing is copied after it. It is
//! noted before the block is overwritten, so whoever finds no failure after it has read a block knows that
//! the protocol held until then.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use nix::errno::Errno;
use nix::unistd::{Whence, lseek64};
use zerocopy::IntoBytes;

use super::format::{
    Failure, HEADER_BYTES, Header, Layout, Map, PAGE_BYTES, PAGE_WORDS, Subject, WORD_COPIED,
    WORD_FAILURE, WORD_RELEASED, WORD_VIEW_FAILURE,
};
use super::protocol;
use crate::error::{Error, ErrorKind, Result};
use crate::extent::{BLOCK_SIZE, Extent};
use crate::failpoint::{self, Place, reached};
use crate::journal::mapping::{PageBuffer, SharedWords};

/// Blocks that are copied at once, at most.
pub const COPY_BLOCKS_MAX: u64 = 32;

/// A page of a map.
pub type MapPage = [u64; PAGE_WORDS as usize];

/// From where the old content of blocks is copied.
pub trait BlockSource: Send + Sync {
    /// Fills the target, which is aligned as direct I/O wants it, with what the disk has at the offset.
    ///
    /// # Errors
    ///
    /// It cannot be read.
    fn read_at(&self, offset_bytes: u64, target: &mut [u8]) -> io::Result<()>;

    /// The same, if nobody has to wait for the storage; otherwise `false`, and what the target holds means nothing.
    fn read_cached(&self, offset_bytes: u64, target: &mut [u8]) -> bool {
        let _not_known = (offset_bytes, target);
        false
    }
}

/// Blocks that have been read.
pub struct InMemory<'a> {
    /// Offset of the first byte.
    pub offset_bytes: u64,
    /// The bytes.
    pub bytes: &'a [u8],
}

impl BlockSource for InMemory<'_> {
    fn read_at(&self, offset_bytes: u64, target: &mut [u8]) -> io::Result<()> {
        let start = offset_bytes
            .checked_sub(self.offset_bytes)
            .map(|start| start as usize);
        let found = start.and_then(|start| self.bytes.get(start..start + target.len()));
        target.copy_from_slice(found.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

/// The preserve file of one disk and epoch.
#[derive(Debug)]
pub struct Area {
    path: PathBuf,
    file: File,
    words: SharedWords,
    subject: Subject,
    layout: Layout,
    budget_bytes: u64,
    /// Pages of the map of preserved blocks that may be stored to.
    ready: Vec<AtomicBool>,
}

fn failed(path: &Path, what: &str, error: impl Into<io::Error>) -> Error {
    Error::io(
        format!("Cannot {what} preserve file {}", path.display()),
        error,
    )
}

impl Area {
    /// Makes the preserve file of an epoch in place of whatever is at the path. Up to `budget_bytes` of
    /// blocks are kept in it at a time.
    ///
    /// # Errors
    ///
    /// The file cannot be made.
    pub fn create(path: &Path, subject: Subject, budget_bytes: u64) -> Result<Self> {
        let making = |error| failed(path, "make", error);
        // Whoever still reads the one before goes on with it.
        remove(path)?;
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(0o600);
        let file = options.open(path).map_err(making)?;
        let layout = Layout::of(subject.size_bytes);
        let mut page = [0; PAGE_BYTES as usize];
        page[..HEADER_BYTES].copy_from_slice(Header::new(&subject).as_bytes());
        file.set_len(layout.file_bytes())
            .and_then(|()| file.write_all_at(&page, 0))
            .map_err(making)?;
        Self::map(path, file, subject, budget_bytes)
    }

    /// Goes on with the preserve file that an earlier tracker has left.
    ///
    /// # Errors
    ///
    /// There is none, it is of another boot, journal or epoch, or its epoch is given up.
    pub fn resume(path: &Path, expected: &Subject, budget_bytes: u64) -> Result<Self> {
        let opening = |error| failed(path, "open", error);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .map_err(opening)?;
        let subject = read_subject(&file, path)?;
        let same = Subject {
            size_bytes: subject.size_bytes,
            all: subject.all,
            ..*expected
        } == subject;
        if !same || subject.size_bytes > expected.size_bytes {
            let what = format!("Preserve file {} is of another epoch", path.display());
            return Err(Error::new(ErrorKind::Mismatch, what));
        }
        let area = Self::map(path, file, subject, budget_bytes)?;
        if let Some(failure) = area.failure() {
            let what = format!("Epoch {} is given up: {}", subject.epoch, failure.text());
            return Err(Error::new(ErrorKind::State, what));
        }
        Ok(area)
    }

    fn map(path: &Path, file: File, subject: Subject, budget_bytes: u64) -> Result<Self> {
        let layout = Layout::of(subject.size_bytes);
        let pages = layout.map_bytes / PAGE_BYTES;
        Ok(Self {
            words: SharedWords::writable(&file, layout.data_offset())
                .map_err(|error| failed(path, "map", error))?,
            path: path.to_owned(),
            file,
            subject,
            layout,
            budget_bytes,
            ready: (0..pages).map(|_| AtomicBool::new(false)).collect(),
        })
    }

    /// Path of the file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The epoch whose blocks are kept.
    pub fn subject(&self) -> &Subject {
        &self.subject
    }

    /// Pages of each map.
    pub fn pages(&self) -> u64 {
        self.ready.len() as u64
    }

    fn word(&self, map: Map, index: u64) -> Option<&AtomicU64> {
        let first = self.layout.map_offset(map) / 8;
        (index < self.layout.map_words())
            .then(|| self.words.words().get((first + index) as usize))?
    }

    fn head(&self, word: usize) -> &AtomicU64 {
        // The head is a page, and the mapping has at least that.
        &self.words.words()[word]
    }

    /// Bits of the blocks of a map that an earlier tracker has written.
    pub fn bits(&self, map: Map, index: u64) -> u64 {
        self.word(map, index)
            .map_or(0, |word| word.load(Ordering::Acquire))
    }

    /// Calls with every word of the map of the epoch's blocks that may have bits: its number, and the bits. The rest of
    /// the map is a hole, which is not looked at: it may be large.
    ///
    /// # Errors
    ///
    /// The file cannot be read.
    pub fn each_changed_word(&self, mut visit: impl FnMut(u64, u64)) -> Result<()> {
        let begin = self.layout.map_offset(Map::Changed);
        for page in data_pages(&self.file, begin..begin + self.layout.map_bytes) {
            let page = page.map_err(|error| failed(&self.path, "read", error))?;
            for index in page * PAGE_WORDS..(page + 1) * PAGE_WORDS {
                visit(index, self.bits(Map::Changed, index));
            }
        }
        Ok(())
    }

    /// Bits of the blocks that belong to the epoch, as they were written down.
    pub fn changed(&self, index: u64) -> u64 {
        self.bits(Map::Changed, index)
    }

    /// Writes what belongs to the epoch in one page of the maps, and makes room for what the shipper will write
    /// there.
    ///
    /// # Errors
    ///
    /// The file cannot be written.
    pub fn write_maps(&self, page: u64, changed: &MapPage, hot: &MapPage) -> Result<()> {
        const EMPTY: &MapPage = &[0; PAGE_WORDS as usize];
        reached(Place::CutAfterSettleBeforeMaps);
        for (map, content) in [
            (Map::Captured, EMPTY),
            (Map::Hot, hot),
            (Map::Changed, changed),
        ] {
            let offset = self.layout.map_offset(map) + page * PAGE_BYTES;
            failpoint::attempt(Place::CutAfterSettleBeforeMaps, &self.file)
                .and_then(|()| self.file.write_all_at(content.as_bytes(), offset))
                .map_err(|error| failed(&self.path, "write", error))?;
        }
        Ok(())
    }

    /// Which of these blocks of a word have to be copied before they are overwritten; `of_epoch` are those that
    /// belong to the epoch. None after a failure.
    pub fn to_copy(&self, index: u64, blocks: u64, of_epoch: u64) -> u64 {
        let Some(preserved) = self.word(Map::Preserved, index) else {
            // Behind the end of the disk as it was.
            return 0;
        };
        let for_view = match self.subject.all && !self.is_given_up(WORD_VIEW_FAILURE) {
            true => protocol::uncopied(blocks, preserved),
            false => 0,
        };
        for_view | self.to_copy_for_point(index, blocks & of_epoch)
    }

    fn to_copy_for_point(&self, index: u64, blocks: u64) -> u64 {
        let words = (
            self.word(Map::Captured, index),
            self.word(Map::Preserved, index),
        );
        match words {
            (Some(captured), Some(preserved)) if blocks != 0 && !self.is_given_up(WORD_FAILURE) => {
                protocol::to_copy(blocks, captured, preserved)
            }
            _ => 0,
        }
    }

    fn is_given_up(&self, word: usize) -> bool {
        protocol::is_given_up(self.head(word))
    }

    /// Copies blocks, up to [`COPY_BLOCKS_MAX`] one behind the other, of which each has to be copied. Where it fails,
    /// the epoch is given up, or the frozen view alone if nobody else needs them. One thread at a time.
    pub fn copy(
        &self,
        extent: Extent,
        of_epoch: impl Fn(u64) -> u64,
        source: &dyn BlockSource,
        buffer: &mut PageBuffer,
    ) {
        let Err(failure) = self.try_copy(extent, source, buffer) else {
            return;
        };
        let needed = |(index, mask)| self.to_copy_for_point(index, mask & of_epoch(index)) != 0;
        match extent.words().any(needed) {
            true => self.fail(failure),
            false => self.note(WORD_VIEW_FAILURE, failure),
        }
    }

    fn try_copy(
        &self,
        extent: Extent,
        source: &dyn BlockSource,
        buffer: &mut PageBuffer,
    ) -> std::result::Result<(), Failure> {
        let length = extent.length_bytes();
        if self.used_bytes() + length > self.budget_bytes {
            return Err(Failure::Budget);
        }
        let offset = extent.offset_bytes();
        let present = length.min(self.subject.size_bytes.saturating_sub(offset));
        let bytes = &mut buffer.bytes_mut()[..length as usize];
        bytes[present as usize..].fill(0);
        source
            .read_at(offset, &mut bytes[..present as usize])
            .map_err(|error| self.met(&error))?;
        reached(Place::CopyAfterReadBeforeWrite);
        self.make_ready(extent).map_err(|error| self.met(&error))?;
        // A hole of this file reads as zeroes, too.
        if bytes.iter().any(|&byte| byte != 0) {
            failpoint::attempt(Place::CopyAfterReadBeforeWrite, &self.file)
                .and_then(|()| {
                    self.file
                        .write_all_at(bytes, self.layout.data_offset() + offset)
                })
                .map_err(|error| self.met(&error))?;
        }
        self.head(WORD_COPIED).fetch_add(length, Ordering::Relaxed);
        reached(Place::CopyAfterWriteBeforeMark);
        for (index, mask) in extent.words() {
            if let Some(preserved) = self.word(Map::Preserved, index) {
                protocol::copied(mask, preserved);
            }
        }
        Ok(())
    }

    fn met(&self, error: &io::Error) -> Failure {
        tracing::warn!(
            "Cannot preserve a block of epoch {} in {}: {error}",
            self.subject.epoch,
            self.path.display()
        );
        match error.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT) => Failure::Space,
            _ => Failure::Io,
        }
    }

    /// Makes the pages of the map of preserved blocks ready to be stored to.
    fn make_ready(&self, extent: Extent) -> io::Result<()> {
        let page_of = |block: u64| block / (PAGE_BYTES * 8);
        for page in page_of(extent.first_block)..=page_of(extent.end_block() - 1) {
            let Some(ready) = self.ready.get(page as usize) else {
                continue;
            };
            if ready.load(Ordering::Relaxed) {
                continue;
            }
            let words = page * PAGE_WORDS..(page + 1) * PAGE_WORDS;
            // Where a bit is set, an earlier tracker has written the page.
            if words
                .into_iter()
                .all(|index| self.bits(Map::Preserved, index) == 0)
            {
                let offset = self.layout.map_offset(Map::Preserved) + page * PAGE_BYTES;
                self.file.write_all_at(&[0; PAGE_BYTES as usize], offset)?;
            }
            ready.store(true, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Bytes of blocks that are kept at this moment.
    pub fn used_bytes(&self) -> u64 {
        let copied = self.head(WORD_COPIED).load(Ordering::Relaxed);
        copied.saturating_sub(self.head(WORD_RELEASED).load(Ordering::Relaxed))
    }

    /// Why the epoch is given up, if it is.
    pub fn failure(&self) -> Option<Failure> {
        Failure::from_word(self.head(WORD_FAILURE).load(Ordering::Acquire))
    }

    /// Why the frozen view of it is given up, if it is.
    pub fn view_failure(&self) -> Option<Failure> {
        Failure::from_word(self.head(WORD_VIEW_FAILURE).load(Ordering::Acquire))
    }

    /// Gives the epoch up, unless it is already.
    pub fn fail(&self, failure: Failure) {
        self.note(WORD_VIEW_FAILURE, failure);
        self.note(WORD_FAILURE, failure);
    }

    /// Only the first failure is kept. It is seen by whoever sees a block that is overwritten after it.
    fn note(&self, word: usize, failure: Failure) {
        let word = self.head(word);
        let _kept = word.compare_exchange(0, failure as u64, Ordering::AcqRel, Ordering::Acquire);
        std::sync::atomic::fence(Ordering::SeqCst);
    }

    /// Fills the target with blocks as they were at the cut, where they are preserved. What is not is left as it
    /// was read from the disk a moment ago. `offset_bytes` and the target's length are whole sectors.
    ///
    /// # Errors
    ///
    /// The file cannot be read, or the view is given up.
    pub fn overlay(&self, offset_bytes: u64, target: &mut [u8]) -> io::Result<()> {
        let covering = Extent::covering(offset_bytes, target.len() as u64);
        let end = offset_bytes + target.len() as u64;
        for (index, mask) in covering.words() {
            let Some(preserved) = self.word(Map::Preserved, index) else {
                continue;
            };
            let mut left = protocol::to_take(mask, preserved);
            while left != 0 {
                let block = index * 64 + u64::from(left.trailing_zeros());
                left &= left - 1;
                let from = (block * BLOCK_SIZE).max(offset_bytes);
                let to = ((block + 1) * BLOCK_SIZE).min(end);
                let part =
                    &mut target[(from - offset_bytes) as usize..(to - offset_bytes) as usize];
                self.file
                    .read_exact_at(part, self.layout.data_offset() + from)?;
            }
        }
        match self.view_failure() {
            Some(failure) => Err(io::Error::other(failure.text())),
            None => Ok(()),
        }
    }
}

/// The pages of a part of a file that are no holes, counted from its begin.
pub(super) fn data_pages(
    file: &File,
    part: Range<u64>,
) -> impl Iterator<Item = io::Result<u64>> + '_ {
    let mut offset = part.start;
    std::iter::from_fn(move || {
        if offset >= part.end {
            return None;
        }
        let data = match lseek64(file, offset as i64, Whence::SeekData) {
            Ok(data) => (data as u64).max(offset),
            Err(Errno::ENXIO) => part.end,
            Err(errno) => {
                offset = part.end;
                return Some(Err(errno.into()));
            }
        };
        let page = (data.min(part.end) - part.start) / PAGE_BYTES;
        offset = part.start + (page + 1) * PAGE_BYTES;
        (data < part.end).then_some(Ok(page))
    })
}

/// What a preserve file is for.
pub(super) fn read_subject(file: &File, path: &Path) -> Result<Subject> {
    let mut head = [0; HEADER_BYTES];
    file.read_exact_at(&mut head, 0)
        .map_err(|error| failed(path, "read", error))?;
    let wrong = |what: &str| {
        Error::new(
            ErrorKind::Corrupt,
            format!("Preserve file {}: {what}", path.display()),
        )
    };
    let subject = Header::decode(&head).map_err(wrong)?;
    let length = file
        .metadata()
        .map_err(|error| failed(path, "read", error))?
        .len();
    if length < Layout::of(subject.size_bytes).file_bytes() {
        return Err(wrong("it is cut short"));
    }
    Ok(subject)
}

/// Gives up the epoch of the preserve file at a path, if there is one, for whoever reads it, and removes it.
///
/// # Errors
///
/// It cannot be removed.
pub fn discard(path: &Path) -> Result<()> {
    if let Ok(file) = OpenOptions::new().read(true).write(true).open(path) {
        // A file that is none has no reader.
        let word = (Failure::GivenUp as u64).to_le_bytes();
        if read_subject(&file, path).is_ok() {
            file.write_all_at(&word, WORD_FAILURE as u64 * 8)
                .map_err(|error| failed(path, "write", error))?;
        }
    }
    remove(path)
}

/// Removes the preserve file at a path, if there is one.
///
/// # Errors
///
/// It cannot be removed.
pub fn remove(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed(path, "remove", error)),
        _ => Ok(()),
    }
}
