//! The fingerprint table of a disk: what the vault and the spool hold, 16 bytes for each block.
//!
//! Overview: a sparse file beside the spool. It is a cache of what the directories of segments say.
//! A block whose fingerprint is not known counts as changed; that is always safe. A fingerprint that
//! is wrong is not: a block would be left out that the vault holds otherwise.
//!
//! Order: a directory is applied only when its segment is durable in the spool and its epoch counts
//! (sealed, or part of the first copy). Before the first page of an epoch is touched, the header
//! says durably that pages of this epoch may exist. The table is synced before an epoch is released.
//!
//! Crash consistency: each page has a check and the highest epoch whose fingerprints are in it. After
//! SIGKILL the page cache has every page whole. After a power cut pages may be older than they were:
//! the spool's directories are applied again at the start, and what was released was synced before.
//! If epochs of the spool are lost, pages of these epochs are forgotten.
//!
//! Blocks that are zero are kept as unknown: they cost no data in a segment, and so a trimmed disk
//! costs no table.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{FallocateFlags, fallocate};
use nix::unistd::{Whence, lseek64};
use xxhash_rust::xxh3::xxh3_64;
use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use tracker::extent::{Epoch, Extent, blocks_of};

use super::files::failed;
use crate::error::Result;
use crate::keys::Fingerprint;
use crate::segment::format::Directory;

const MAGIC: [u8; 8] = *b"TMFPT\r\n\x1a";
const VERSION: u32 = 1;
const PAGE_BYTES: usize = 4096;
/// Fingerprints in one page.
const PAGE_BLOCKS: u64 = ((PAGE_BYTES - size_of::<PageHead>()) / 16) as u64;

/// First page of the file.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Header {
    magic: [u8; 8],
    version: U32,
    reserved: U32,
    /// What the fingerprints are of: vault and disk.
    owner: [u8; 16],
    disk_bytes: U64,
    /// No page holds fingerprints of a later epoch.
    applied_through: U64,
    /// xxh3-64 of all bytes before it.
    check: U64,
}

const HEADER_CHECKED_BYTES: usize = std::mem::offset_of!(Header, check);

/// Head of a page.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct PageHead {
    /// xxh3-64 of all bytes of the page behind it.
    check: U64,
    /// Highest epoch whose fingerprints are in the page.
    epoch: U64,
    /// Position of the page in the table.
    page: U64,
    reserved: U64,
}

const _: () = assert!(size_of::<PageHead>() == 32 && PAGE_BLOCKS == 254);

/// The table of one disk.
#[derive(Debug)]
pub struct Table {
    path: PathBuf,
    file: File,
    owner: [u8; 16],
    disk_bytes: u64,
    applied_through: Epoch,
}

/// One page in memory.
struct Page {
    number: u64,
    bytes: [u8; PAGE_BYTES],
}

impl Page {
    fn head(&self) -> PageHead {
        PageHead::read_from_prefix(&self.bytes)
            .map_or_else(|_| PageHead::new_zeroed(), |(head, _)| head)
    }

    fn is_whole(&self) -> bool {
        let head = self.head();
        head.page.get() == self.number && head.check.get() == xxh3_64(&self.bytes[8..])
    }

    fn entry(&mut self, index: u64) -> &mut [u8] {
        let from = size_of::<PageHead>() + index as usize * 16;
        &mut self.bytes[from..from + 16]
    }

    fn seal(&mut self, epoch: Epoch) {
        let head = PageHead {
            check: 0.into(),
            epoch: epoch.0.max(self.head().epoch.get()).into(),
            page: self.number.into(),
            reserved: 0.into(),
        };
        self.bytes[..size_of::<PageHead>()].copy_from_slice(head.as_bytes());
        let check = xxh3_64(&self.bytes[8..]);
        self.bytes[..8].copy_from_slice(&check.to_le_bytes());
    }
}

fn page_offset(page: u64) -> u64 {
    (page + 1) * PAGE_BYTES as u64
}

impl Table {
    /// Opens the table of a disk. One of another vault or disk, or of a larger one, is begun anew; one
    /// of a smaller disk, which has grown, gets room. Fingerprints of epochs after `trusted_through` are forgotten. `true`: nothing was known before.
    ///
    /// # Errors
    ///
    /// The file cannot be read or written.
    pub fn open(
        path: &Path,
        owner: [u8; 16],
        disk_bytes: u64,
        trusted_through: Epoch,
    ) -> Result<(Self, bool)> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .map_err(|error| failed("open", path, error))?;
        let mut table = Self {
            path: path.to_owned(),
            file,
            owner,
            disk_bytes,
            applied_through: Epoch::ZERO,
        };
        let known = table
            .read_header()
            .map_err(|error| table.failed("read", error))?;
        match known {
            Some((through, known_bytes)) => {
                table.applied_through = through;
                table.disk_bytes = known_bytes;
                table.grow(disk_bytes)?;
                if through > trusted_through {
                    table.forget_after(trusted_through)?;
                }
            }
            None => table.begin_anew()?,
        }
        Ok((table, known.is_none()))
    }

    fn failed(&self, what: &str, error: io::Error) -> crate::error::Error {
        failed(what, &self.path, error)
    }

    /// What the header says: the epoch that it is applied through, and the size of the disk.
    fn read_header(&self) -> io::Result<Option<(Epoch, u64)>> {
        let mut bytes = [0; size_of::<Header>()];
        match self.file.read_exact_at(&mut bytes, 0) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            result => result?,
        }
        let Ok(header) = Header::read_from_bytes(&bytes) else {
            return Ok(None);
        };
        let ours = header.magic == MAGIC
            && header.version.get() == VERSION
            && header.check.get() == xxh3_64(&bytes[..HEADER_CHECKED_BYTES])
            && header.owner == self.owner
            && header.disk_bytes.get() <= self.disk_bytes;
        Ok(ours.then(|| {
            let through = Epoch(header.applied_through.get());
            (through, header.disk_bytes.get())
        }))
    }

    fn write_header(&self) -> Result<()> {
        let mut header = Header::new_zeroed();
        header.magic = MAGIC;
        header.version = VERSION.into();
        header.owner = self.owner;
        header.disk_bytes = self.disk_bytes.into();
        header.applied_through = self.applied_through.0.into();
        header.check = xxh3_64(&header.as_bytes()[..HEADER_CHECKED_BYTES]).into();
        self.file
            .write_all_at(header.as_bytes(), 0)
            .and_then(|()| self.file.sync_data())
            .map_err(|error| self.failed("write", error))
    }

    /// Forgets everything.
    ///
    /// # Errors
    ///
    /// The file cannot be written.
    pub fn begin_anew(&mut self) -> Result<()> {
        let pages = blocks_of(self.disk_bytes).div_ceil(PAGE_BLOCKS);
        self.file
            .set_len(0)
            .and_then(|()| self.file.set_len(page_offset(pages)))
            .map_err(|error| self.failed("write", error))?;
        self.applied_through = Epoch::ZERO;
        self.write_header()
    }

    /// Makes room for a disk that has grown; what is new is not known. The file is longer before its
    /// header says so.
    ///
    /// # Errors
    ///
    /// The file cannot be written.
    pub fn grow(&mut self, disk_bytes: u64) -> Result<()> {
        if disk_bytes <= self.disk_bytes {
            return Ok(());
        }
        let pages = blocks_of(disk_bytes).div_ceil(PAGE_BLOCKS);
        self.file
            .set_len(page_offset(pages))
            .map_err(|error| self.failed("write", error))?;
        self.disk_bytes = disk_bytes;
        self.write_header()
    }

    fn read_page(&self, number: u64) -> io::Result<Page> {
        let mut page = Page {
            number,
            bytes: [0; PAGE_BYTES],
        };
        self.file
            .read_exact_at(&mut page.bytes, page_offset(number))?;
        if !page.is_whole() {
            page.bytes = [0; PAGE_BYTES];
        }
        Ok(page)
    }

    /// Fingerprints of the blocks from `first_block` on; unknown where there is none to be trusted.
    pub fn lookup(&self, first_block: u64, known: &mut [Fingerprint]) {
        let mut done = 0;
        while done < known.len() {
            let block = first_block + done as u64;
            let (number, index) = (block / PAGE_BLOCKS, block % PAGE_BLOCKS);
            let count = ((PAGE_BLOCKS - index) as usize).min(known.len() - done);
            let target = &mut known[done..done + count];
            match self.read_page(number) {
                Ok(page) => {
                    let from = size_of::<PageHead>() + index as usize * 16;
                    target
                        .as_mut_bytes()
                        .copy_from_slice(&page.bytes[from..from + count * 16]);
                }
                // What cannot be read is not known; its blocks are sent.
                Err(_) => target.fill(Fingerprint::UNKNOWN),
            }
            done += count;
        }
    }

    /// Takes over what a directory says, which is durable and counts for `epoch`.
    ///
    /// # Errors
    ///
    /// The file cannot be read or written.
    pub fn apply(&mut self, epoch: Epoch, directory: &Directory) -> Result<()> {
        if epoch > self.applied_through {
            self.applied_through = epoch;
            self.write_header()?;
        }
        let mut cursor = Cursor {
            table: self,
            epoch,
            page: None,
        };
        let mut apply = || {
            for entry in &directory.extents {
                match entry.frame_index() {
                    None => cursor.forget(entry.extent())?,
                    Some(frame) => {
                        let (at, count) = (entry.frame_block.get(), entry.block_count.get());
                        let fingerprints = directory.fingerprints_of(frame, at, count);
                        cursor.set(entry.first_block.get(), fingerprints)?;
                    }
                }
            }
            cursor.leave()
        };
        apply().map_err(|error| self.failed("write", error))
    }

    /// Makes everything applied so far durable.
    ///
    /// # Errors
    ///
    /// The sync fails; then nothing may be released.
    pub fn sync(&self) -> Result<()> {
        self.file
            .sync_data()
            .map_err(|error| self.failed("sync", error))
    }

    /// Forgets every page that has fingerprints of epochs after `epoch`.
    ///
    /// # Errors
    ///
    /// The file cannot be read or written.
    pub fn forget_after(&mut self, epoch: Epoch) -> Result<()> {
        let pages = blocks_of(self.disk_bytes).div_ceil(PAGE_BLOCKS);
        let mut next = 0;
        let mut forget = || -> io::Result<()> {
            while next < pages {
                let at = match lseek64(&self.file, page_offset(next) as i64, Whence::SeekData) {
                    Ok(at) => at as u64,
                    Err(nix::Error::ENXIO) => return Ok(()),
                    Err(errno) => return Err(errno.into()),
                };
                next = (at / PAGE_BYTES as u64 - 1).max(next);
                if next < pages {
                    let page = self.read_page(next)?;
                    if page.head().epoch.get() > epoch.0 {
                        self.file
                            .write_all_at(&[0; PAGE_BYTES], page_offset(next))?;
                    }
                }
                next += 1;
            }
            Ok(())
        };
        forget().map_err(|error| self.failed("write", error))?;
        self.sync()?;
        self.applied_through = self.applied_through.min(epoch);
        self.write_header()
    }
}

/// Changes to pages in ascending order, one page in memory.
struct Cursor<'a> {
    table: &'a Table,
    epoch: Epoch,
    page: Option<Page>,
}

impl Cursor<'_> {
    fn at(&mut self, number: u64) -> io::Result<&mut Page> {
        if self.page.as_ref().is_none_or(|page| page.number != number) {
            self.leave()?;
            self.page = Some(self.table.read_page(number)?);
        }
        self.page
            .as_mut()
            .ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn leave(&mut self) -> io::Result<()> {
        if let Some(mut page) = self.page.take() {
            page.seal(self.epoch);
            self.table
                .file
                .write_all_at(&page.bytes, page_offset(page.number))?;
        }
        Ok(())
    }

    fn set(&mut self, first_block: u64, fingerprints: &[Fingerprint]) -> io::Result<()> {
        for (block, fingerprint) in (first_block..).zip(fingerprints) {
            let page = self.at(block / PAGE_BLOCKS)?;
            page.entry(block % PAGE_BLOCKS)
                .copy_from_slice(&fingerprint.0);
        }
        Ok(())
    }

    fn forget(&mut self, extent: Extent) -> io::Result<()> {
        let end = extent.end_block();
        let mut block = extent.first_block;
        while block < end {
            let number = block / PAGE_BLOCKS;
            let whole_pages = if block.is_multiple_of(PAGE_BLOCKS) {
                end / PAGE_BLOCKS - number
            } else {
                0
            };
            if whole_pages > 0 {
                self.leave()?;
                self.table.erase(number, whole_pages)?;
                block = (number + whole_pages) * PAGE_BLOCKS;
                continue;
            }
            let stop = end.min((number + 1) * PAGE_BLOCKS);
            let loaded = self.page.as_ref().is_some_and(|page| page.number == number);
            if loaded || self.table.has_page(number)? {
                let page = self.at(number)?;
                for index in block % PAGE_BLOCKS..block % PAGE_BLOCKS + (stop - block) {
                    page.entry(index).fill(0);
                }
            }
            block = stop;
        }
        Ok(())
    }
}

impl Table {
    fn has_page(&self, number: u64) -> io::Result<bool> {
        match lseek64(&self.file, page_offset(number) as i64, Whence::SeekData) {
            Ok(at) => Ok((at as u64) < page_offset(number + 1)),
            Err(nix::Error::ENXIO) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Makes whole pages unknown.
    fn erase(&self, number: u64, count: u64) -> io::Result<()> {
        let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let length = count * PAGE_BYTES as u64;
        match fallocate(&self.file, mode, page_offset(number) as i64, length as i64) {
            Ok(()) => Ok(()),
            // A file system that cannot punch: what is there is written over.
            Err(nix::Error::EOPNOTSUPP) => {
                for page in number..number + count {
                    if self.has_page(page)? {
                        self.file
                            .write_all_at(&[0; PAGE_BYTES], page_offset(page))?;
                    }
                }
                Ok(())
            }
            Err(errno) => Err(errno.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::segment::codec::CodecKind;
    use crate::segment::format::{ExtentEntry, FRAME_NONE, Frame};
    use proptest::prelude::*;
    use std::collections::HashMap;

    const DISK_BYTES: u64 = 3000 * 4096 - 512;

    fn print(tag: u64) -> Fingerprint {
        let mut bytes = [1; 16];
        bytes[..8].copy_from_slice(&tag.to_le_bytes());
        Fingerprint(bytes)
    }

    /// A directory that says this of single blocks, in ascending order: a tag, or zero blocks.
    fn directory(changes: &[(u64, u32, Option<u64>)]) -> Directory {
        let (mut frames, mut extents, mut fingerprints) = (Vec::new(), Vec::new(), Vec::new());
        for &(first_block, block_count, tag) in changes {
            let frame = tag.map_or(FRAME_NONE, |_| frames.len() as u32);
            extents.push(ExtentEntry {
                first_block: first_block.into(),
                block_count: block_count.into(),
                frame: frame.into(),
                frame_block: 0.into(),
                reserved: 0.into(),
            });
            if let Some(tag) = tag {
                frames.push(Frame {
                    offset: 0,
                    stored_bytes: 1,
                    block_count: block_count as u16,
                    codec: CodecKind::None as u8,
                    number: 0,
                    check: [0; 16],
                });
                let blocks = first_block..first_block + u64::from(block_count);
                fingerprints.extend(blocks.map(|block| print(tag << 32 | block)));
            }
        }
        Directory::new(frames, extents, fingerprints)
    }

    fn open(path: &Path, through: u64) -> Table {
        Table::open(path, [7; 16], DISK_BYTES, Epoch(through))
            .unwrap()
            .0
    }

    fn all(table: &Table) -> Vec<Fingerprint> {
        let mut known = vec![print(0); 3000];
        table.lookup(0, &mut known);
        known
    }

    #[test]
    fn another_owner_or_size_begins_anew() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("table");
        open(&path, 1)
            .apply(Epoch(1), &directory(&[(5, 1, Some(1))]))
            .unwrap();
        assert_ne!(all(&open(&path, 1))[5], Fingerprint::UNKNOWN);
        let (other, anew) = Table::open(&path, [8; 16], DISK_BYTES, Epoch(1)).unwrap();
        assert!(anew);
        assert_eq!(all(&other)[5], Fingerprint::UNKNOWN);
        drop(other);
        open(&path, 1)
            .apply(Epoch(1), &directory(&[(5, 1, Some(1))]))
            .unwrap();
        let (smaller, anew) = Table::open(&path, [7; 16], DISK_BYTES - 512, Epoch(1)).unwrap();
        assert!(anew);
        assert_eq!(all(&smaller)[5], Fingerprint::UNKNOWN);
    }

    #[test]
    fn a_table_grows_with_its_disk_and_forgets_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("table");
        let last = blocks_of(DISK_BYTES) - 1;
        let mut table = open(&path, 1);
        table
            .apply(Epoch(1), &directory(&[(last, 1, Some(1))]))
            .unwrap();
        let known = |table: &Table, block: u64| {
            let mut known = [print(0)];
            table.lookup(block, &mut known);
            known[0]
        };
        // While it is open, and at the next opening; far behind the old end and just behind it.
        let mut disk_bytes = DISK_BYTES;
        for (step, while_open) in [
            (512, true),
            (4096, false),
            (1 << 30, true),
            (1 << 30, false),
        ] {
            disk_bytes += step;
            if while_open {
                table.grow(disk_bytes).unwrap();
            }
            drop(table);
            let (opened, anew) = Table::open(&path, [7; 16], disk_bytes, Epoch(9)).unwrap();
            assert!(!anew);
            table = opened;
            assert_eq!(known(&table, last), print(1 << 32 | last));
            let end = blocks_of(disk_bytes) - 1;
            if end > last {
                assert_eq!(known(&table, end), Fingerprint::UNKNOWN);
            }
            let change = directory(&[(end, 1, Some(1))]);
            table.apply(Epoch(1), &change).unwrap();
            assert_eq!(known(&table, end), print(1 << 32 | end));
        }
    }

    #[test]
    fn a_damaged_page_is_unknown() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("table");
        let mut table = open(&path, 1);
        table
            .apply(Epoch(1), &directory(&[(5, 1, Some(1)), (300, 1, Some(1))]))
            .unwrap();
        table
            .file
            .write_all_at(&[0xee], page_offset(0) + 2000)
            .unwrap();
        assert_eq!(all(&table)[5], Fingerprint::UNKNOWN);
        assert_eq!(all(&table)[300], print(1 << 32 | 300));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn it_says_what_was_applied_last_or_nothing(
            epochs in prop::collection::vec(
                prop::collection::btree_map(0u64..2950, (1u32..30, any::<bool>()), 1..12), 1..6),
            lost in 0u64..6,
        ) {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("table");
            let mut table = open(&path, 100);
            // What each epoch leaves behind.
            let mut states: Vec<HashMap<u64, u64>> = vec![HashMap::new()];
            for (index, changes) in epochs.iter().enumerate() {
                let epoch = index as u64 + 1;
                let mut state = states[index].clone();
                let mut next = 0;
                let mut list = Vec::new();
                for (&first, &(count, zero)) in changes {
                    if first < next { continue; }
                    next = first + u64::from(count);
                    let count = if zero { count * 30 } else { count };
                    let end = (first + u64::from(count)).min(3000);
                    let count = (end - first) as u32;
                    next = next.max(end);
                    list.push((first, count, (!zero).then_some(epoch)));
                    for block in first..end {
                        if zero { state.remove(&block); } else { state.insert(block, epoch << 32 | block); }
                    }
                }
                table.apply(Epoch(epoch), &directory(&list)).unwrap();
                states.push(state);
            }
            let check = |table: &Table, state: &HashMap<u64, u64>, complete: bool| {
                for (block, known) in all(table).into_iter().enumerate() {
                    let expected = state.get(&(block as u64)).map_or(Fingerprint::UNKNOWN, |tag| print(*tag));
                    let unknown = known == Fingerprint::UNKNOWN && !complete;
                    assert!(unknown || known == expected, "block {block}");
                }
            };
            check(&table, &states[epochs.len()], true);
            drop(table);
            let kept = lost.min(epochs.len() as u64);
            check(&open(&path, kept), &states[kept as usize], kept == epochs.len() as u64);
            check(&open(&path, 100), &states[kept as usize], kept == epochs.len() as u64);
        }
    }
}
