//! The disks that are served: raw image files and block devices.

mod direct;
mod growth;

use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use nix::fcntl::Flock;
use nix::sys::statfs;
use rustix::io::{ReadWriteFlags, preadv2};
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_128;

use crate::error::{Error, ErrorKind, Result};
use crate::journal::Moment;
use crate::journal::format::Time;
use crate::lock::lock_exclusive;
use crate::preserve::area::BlockSource;

/// Sizes of disks are multiples of this many bytes.
const SECTOR_BYTES: u64 = 512;

/// Whether a disk is a file or a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskKind {
    /// A raw image file.
    File,
    /// A block device.
    Device,
}

/// The size of a disk as its clients see it at this moment. It only grows.
#[derive(Clone, Debug)]
pub struct LiveSize(Arc<AtomicU64>);

impl LiveSize {
    /// A size of so many bytes.
    pub fn new(bytes: u64) -> Self {
        Self(Arc::new(bytes.into()))
    }

    /// Bytes at this moment.
    pub fn bytes(&self) -> u64 {
        self.0.load(Ordering::Acquire)
    }

    fn grow_to(&self, bytes: u64) {
        self.0.fetch_max(bytes, Ordering::Release);
    }
}

/// What a disk is to grow to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NewSize {
    /// The size that the file or device has already.
    Present,
    /// So many bytes.
    Bytes(u64),
    /// So many bytes more than are served.
    More(u64),
}

/// One open disk. It is locked against a second tracker as long as it lives.
#[derive(Debug)]
pub struct Disk {
    name: String,
    path: PathBuf,
    file: Flock<File>,
    kind: DiskKind,
    size: LiveSize,
    read_only: bool,
    identity: [u8; 16],
    inline_writes: bool,
    /// In memory altogether, so that a sync has nothing to wait for.
    volatile: bool,
    /// With direct I/O, what requests are aligned to.
    direct_alignment: Option<u32>,
    sync_failed: AtomicBool,
}

impl Disk {
    /// Opens a disk under an export name.
    ///
    /// # Errors
    ///
    /// The path is missing, not a file or block device, not writable (unless `read_only`), of a
    /// size that is zero or not a multiple of 512 bytes, or held by another tracker or mount.
    pub fn open(name: &str, path: &Path, read_only: bool) -> Result<Self> {
        let shown = path.display();
        let metadata = std::fs::metadata(path)
            .map_err(|error| Error::io(format!("Cannot open disk {shown}"), error))?;
        let kind = if metadata.is_file() {
            DiskKind::File
        } else if metadata.file_type().is_block_device() {
            DiskKind::Device
        } else {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!("Disk {shown} is neither a file nor a block device"),
            ));
        };
        let mut options = OpenOptions::new();
        options.read(true).write(!read_only);
        if kind == DiskKind::Device && !read_only {
            // On a block device O_EXCL without O_CREAT fails while it is mounted (open(2)).
            options.custom_flags(libc::O_EXCL);
        }
        let file = options
            .open(path)
            .map_err(|error| Self::explain_open(path, read_only, error))?;
        let mut file = lock_exclusive(file).map_err(|errno| {
            Error::new(
                ErrorKind::InUse,
                format!("Disk {shown} is in use by another tracker: stop that one first"),
            )
            .with_source(errno)
        })?;
        let size_bytes = file
            .seek(SeekFrom::End(0))
            .map_err(|error| Error::io(format!("Cannot find the size of disk {shown}"), error))?;
        if size_bytes == 0 || size_bytes % SECTOR_BYTES != 0 {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!(
                    "Disk {shown} has {size_bytes} bytes; a size above zero and a multiple of \
                     {SECTOR_BYTES} is needed: resize it first"
                ),
            ));
        }
        Ok(Self {
            name: name.to_owned(),
            path: path.to_owned(),
            inline_writes: kind == DiskKind::File && !takes_async_buffered_writes(&file),
            volatile: statfs::fstatfs(&*file)
                .is_ok_and(|status| status.filesystem_type() == statfs::TMPFS_MAGIC),
            direct_alignment: None,
            file,
            kind,
            size: LiveSize::new(size_bytes),
            read_only,
            identity: identity(path, kind, &metadata),
            sync_failed: AtomicBool::new(false),
        })
    }

    fn explain_open(path: &Path, read_only: bool, error: std::io::Error) -> Error {
        let advice = match error.raw_os_error() {
            Some(libc::EACCES | libc::EROFS | libc::EPERM) if !read_only => {
                " for writing: grant write access, or serve it with --read-only"
            }
            Some(libc::EBUSY) => ": it is mounted or otherwise in use",
            _ => "",
        };
        Error::io(
            format!("Cannot open disk {}{advice}", path.display()),
            error,
        )
    }

    /// Name of the export.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Path of the file or device.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// File or device.
    pub fn kind(&self) -> DiskKind {
        self.kind
    }

    /// Size in bytes as it is served at this moment.
    pub fn size_bytes(&self) -> u64 {
        self.size.bytes()
    }

    /// The same for whoever does not hold the disk.
    pub fn size(&self) -> LiveSize {
        self.size.clone()
    }

    /// Writes are refused.
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// What tells this disk from another: for a file its inode and time of birth, so that a copy
    /// or a restored file is another disk; for a device its path.
    pub fn identity(&self) -> [u8; 16] {
        self.identity
    }

    /// The open file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Small page-cache writes are made by the worker itself instead of through the ring.
    ///
    /// Where the file system cannot write to the page cache without blocking, io_uring hands each
    /// write to a kernel thread, which costs more than the write.
    pub fn inline_writes(&self) -> bool {
        self.inline_writes && self.uses_page_cache()
    }

    /// Reads and writes go through the page cache.
    pub fn uses_page_cache(&self) -> bool {
        self.direct_alignment.is_none()
    }

    /// A sync has nothing to wait for, and is made by the worker itself.
    pub fn syncs_at_once(&self) -> bool {
        self.volatile
    }

    /// Its times at this moment; `None` for a device, whose node bears those of other things.
    ///
    /// # Errors
    ///
    /// They cannot be found out.
    pub fn moment(&self) -> Result<Option<Moment>> {
        if self.kind == DiskKind::Device {
            return Ok(None);
        }
        let metadata = self.file.metadata().map_err(|error| {
            let shown = self.path.display();
            Error::io(format!("Cannot find the time of disk {shown}"), error)
        })?;
        let seconds = metadata.mtime().saturating_mul(1000);
        let modified = seconds.saturating_add(metadata.mtime_nsec() / 1_000_000);
        Ok(Some(Moment::now(Time(modified))))
    }

    /// Makes everything durable that was written, and the size.
    ///
    /// # Errors
    ///
    /// The kernel has lost some of it.
    pub fn sync(&self) -> Result<()> {
        self.file.sync_all().map_err(|error| {
            // The kernel tells of a failed sync once; the next FLUSH of a guest must know of it.
            self.set_sync_failed();
            Error::io(format!("Cannot sync disk {}", self.path.display()), error)
        })
    }

    /// Makes everything durable that was written.
    ///
    /// # Errors
    ///
    /// As [`Self::sync`].
    pub fn sync_data(&self) -> Result<()> {
        self.file.sync_data().map_err(|error| {
            self.set_sync_failed();
            Error::io(format!("Cannot sync disk {}", self.path.display()), error)
        })
    }

    /// Remembers that a sync failed: the kernel has dropped the pages that it could not write and
    /// calls them clean, so a later sync proves nothing.
    pub fn set_sync_failed(&self) {
        self.sync_failed.store(true, Ordering::Release);
    }

    /// Whether a sync has failed since the disk was opened.
    pub fn sync_failed(&self) -> bool {
        self.sync_failed.load(Ordering::Acquire)
    }
}

impl BlockSource for Disk {
    fn read_at(&self, offset_bytes: u64, target: &mut [u8]) -> std::io::Result<()> {
        self.file.read_exact_at(target, offset_bytes)
    }

    fn read_cached(&self, offset_bytes: u64, target: &mut [u8]) -> bool {
        let length = target.len();
        let mut parts = [std::io::IoSliceMut::new(target)];
        let mut read = || {
            preadv2(
                &*self.file,
                &mut parts,
                offset_bytes,
                ReadWriteFlags::NOWAIT,
            )
        };
        // An error is met by whoever reads it with time.
        self.uses_page_cache() && read().is_ok_and(|count| count == length)
    }
}

impl AsRawFd for Disk {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

/// xfs and btrfs take buffered writes that do not block (`FOP_BUFFER_WASYNC` in the kernel); for
/// all other file systems io_uring falls back to a kernel thread.
fn takes_async_buffered_writes(file: &File) -> bool {
    statfs::fstatfs(file).is_ok_and(|status| {
        let kind = status.filesystem_type();
        kind == statfs::XFS_SUPER_MAGIC || kind == statfs::BTRFS_SUPER_MAGIC
    })
}

fn identity(path: &Path, kind: DiskKind, metadata: &std::fs::Metadata) -> [u8; 16] {
    let text = match kind {
        DiskKind::File => {
            let born = metadata
                .created()
                .ok()
                .and_then(|time| time.duration_since(std::time::UNIX_EPOCH).ok())
                .map_or(0, |age| age.as_nanos());
            format!("file {} {born}", metadata.ino())
        }
        DiskKind::Device => {
            let canonical = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
            format!("device {}", canonical.display())
        }
    };
    xxh3_128(text.as_bytes()).to_le_bytes()
}
