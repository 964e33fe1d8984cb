//! What a disk is restored to: a new file, or a block device.
//!
//! Overview: a new file is written as `TARGET.partial`, synced, and then given its name without
//! replacing anything; the folder is synced too. So a file under the target's name is complete.
//! What fails on the way takes the partial file with it. One that a killed restore left behind is
//! removed by the next one, never written into, since it may be the same file as a finished target
//! by another name. A lock on it keeps two restores to one target apart.
//!
//! A block device is opened exclusively, which fails while it is mounted or otherwise in use. It
//! cannot be replaced in one step: an interrupted restore leaves it with a part of the disk.
//!
//! What it does not handle: bytes of a device behind the end of the disk stay as they are.

use std::ffi::OsString;
use std::fs::{File, Metadata, OpenOptions, TryLockError};
use std::io::{self, Seek, SeekFrom};
use std::ops::Range;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, FallocateFlags, RenameFlags, fallocate, renameat2};

use crate::error::{Error, ErrorKind, Result};

/// Ends the name of a file that is not complete.
const PARTIAL_SUFFIX: &str = ".partial";
/// A disk's content is its owner's business.
const FILE_MODE: u32 = 0o600;
/// Times that another process may take the partial file away in front of us.
const ATTEMPTS_MAX: u32 = 16;
/// Ranges of a device that are shorter are zeroed by writing, which costs less than a discard.
const ZERO_WRITE_BYTES_MAX: u64 = 64 << 10;
/// Longest range of a device that is zeroed by one call.
const ZERO_CALL_BYTES_MAX: u64 = 1 << 30;
/// Zeroes that are written by one call.
static ZEROES: [u8; 256 << 10] = [0; 256 << 10];

/// How a device makes a range zero; each is tried when the one before it is not offered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Zeroing {
    /// The device forgets the range and reads it as zeroes.
    Punch,
    /// The kernel writes zeroes, or the device does.
    ZeroRange,
    /// Zeroes are written like data.
    Write,
}

#[derive(Debug)]
enum Kind {
    NewFile { partial: PathBuf, is_named: bool },
    Device { zeroing: Zeroing },
}

/// A file or device that a disk is written to.
#[derive(Debug)]
pub struct Target {
    /// Under its final name.
    path: PathBuf,
    /// Holds the lock on a partial file.
    file: File,
    kind: Kind,
}

impl Target {
    /// Makes the partial file, or opens the device. Nothing is written yet.
    ///
    /// # Errors
    ///
    /// A file of this name exists; its folder does not; a device is in use or too small; the path
    /// is neither; another restore writes to it.
    pub fn open(path: &Path, size_bytes: u64) -> Result<Self> {
        let shown = path.display();
        match std::fs::symlink_metadata(path) {
            Err(error) if is_missing(&error) => Self::new_file(path, size_bytes),
            Err(error) => Err(Error::io(format!("Cannot look at target {shown}"), error)),
            Ok(_) => {
                // A link to nothing counts as a file.
                let found = std::fs::metadata(path).ok();
                let is = |test: fn(&Metadata) -> bool| found.as_ref().is_none_or(test);
                if is(Metadata::is_file) {
                    Err(exists(path))
                } else if is(is_block_device) {
                    Self::device(path, size_bytes)
                } else {
                    let what = format!(
                        "Target {shown} exists and is neither a file nor a block device: name a new file"
                    );
                    Err(Error::new(ErrorKind::Invalid, what))
                }
            }
        }
    }

    fn new_file(path: &Path, size_bytes: u64) -> Result<Self> {
        let shown = path.display();
        let Some(name) = path.file_name() else {
            let what = format!("Target {shown} has no name of a file: name a new file");
            return Err(Error::new(ErrorKind::Invalid, what));
        };
        let folder = folder_of(path);
        check_folder(folder, path)?;
        let mut partial_name = OsString::from(name);
        partial_name.push(PARTIAL_SUFFIX);
        let partial = folder.join(partial_name);
        let target = Self {
            path: folder.join(name),
            file: create_locked(&partial)?,
            kind: Kind::NewFile {
                partial,
                is_named: false,
            },
        };
        let sized = target.file.set_len(size_bytes);
        sized.map_err(|error| target.failed(&format!("give {size_bytes} bytes to"), error))?;
        Ok(target)
    }

    fn device(path: &Path, size_bytes: u64) -> Result<Self> {
        let shown = path.display();
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_EXCL)
            .open(path)
            .map_err(|error| {
                if error.raw_os_error() == Some(libc::EBUSY) {
                    let what = format!(
                        "Device {shown} is mounted or otherwise in use: unmount it, or stop what holds it"
                    );
                    return Error::new(ErrorKind::InUse, what).with_source(error);
                }
                Error::io(format!("Cannot open device {shown}"), error)
            })?;
        let look = |error| Error::io(format!("Cannot look at device {shown}"), error);
        if !is_block_device(&file.metadata().map_err(look)?) {
            let what = format!("Target {shown} was replaced by something else just now");
            return Err(Error::new(ErrorKind::State, what));
        }
        let device_bytes = file.seek(SeekFrom::End(0)).map_err(look)?;
        if device_bytes < size_bytes {
            let what = format!(
                "Device {shown} is too small: it has {device_bytes} bytes, the disk has {size_bytes}"
            );
            return Err(Error::new(ErrorKind::Mismatch, what));
        }
        Ok(Self {
            path: path.to_owned(),
            file,
            kind: Kind::Device {
                zeroing: Zeroing::Punch,
            },
        })
    }

    /// Whether all of it reads as zeroes before anything is written.
    pub fn is_blank(&self) -> bool {
        matches!(self.kind, Kind::NewFile { .. })
    }

    /// Writes bytes at an offset. May be called by many threads.
    ///
    /// # Errors
    ///
    /// `Full`: no room is left. Other kinds: the system refuses.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        let written = self.file.write_all_at(bytes, offset);
        written.map_err(|error| self.failed("write", error))
    }

    /// Makes a range of bytes zero.
    ///
    /// # Errors
    ///
    /// As for [`Target::write`].
    pub fn zero(&mut self, range: Range<u64>) -> Result<()> {
        let mut offset = range.start;
        while offset < range.end {
            let length = (range.end - offset).min(ZERO_CALL_BYTES_MAX);
            self.zero_some(offset, length)?;
            offset += length;
        }
        Ok(())
    }

    fn zero_some(&mut self, offset: u64, length: u64) -> Result<()> {
        if self.is_blank() {
            return Ok(());
        }
        while let Kind::Device { zeroing } = &mut self.kind {
            let (flags, next) = match zeroing {
                _ if length <= ZERO_WRITE_BYTES_MAX => break,
                Zeroing::Punch => (
                    FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE,
                    Zeroing::ZeroRange,
                ),
                Zeroing::ZeroRange => (FallocateFlags::FALLOC_FL_ZERO_RANGE, Zeroing::Write),
                Zeroing::Write => break,
            };
            match fallocate(&self.file, flags, offset as i64, length as i64) {
                Ok(()) => return Ok(()),
                Err(Errno::EINTR) => {}
                // Not offered by the kernel or the device, or not for this alignment.
                Err(Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::EINVAL | Errno::ENODEV) => {
                    *zeroing = next;
                }
                Err(error) => return Err(self.failed("zero", error.into())),
            }
        }
        let (mut offset, end) = (offset, offset + length);
        while offset < end {
            let count = (end - offset).min(ZEROES.len() as u64);
            self.write(offset, &ZEROES[..count as usize])?;
            offset += count;
        }
        Ok(())
    }

    /// Makes what was written durable, and gives a new file its name.
    ///
    /// # Errors
    ///
    /// The target cannot be synced, or somebody else has made a file of this name meanwhile.
    pub fn finish(mut self) -> Result<()> {
        self.file
            .sync_all()
            .map_err(|error| self.failed("sync", error))?;
        if let Kind::NewFile { partial, is_named } = &mut self.kind {
            rename_without_replacing(partial, &self.path)?;
            *is_named = true;
            let folder = folder_of(&self.path);
            sync_folder(folder).map_err(|error| {
                let (shown, folder) = (self.path.display(), folder.display());
                let what = format!(
                    "The disk is complete in {shown}, but folder {folder} cannot be synced: \
                     the file may lose its name if the machine stops now"
                );
                Error::io(what, error)
            })?;
        }
        Ok(())
    }

    fn failed(&self, verb: &str, error: io::Error) -> Error {
        let shown = self.path.display();
        match error.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT) => {
                let what = format!("Cannot {verb} target {shown}: make room, or choose another");
                Error::new(ErrorKind::Full, what).with_source(error)
            }
            _ => Error::io(format!("Cannot {verb} target {shown}"), error),
        }
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        if let Kind::NewFile { partial, is_named } = &self.kind
            && !is_named
            && let Err(error) = std::fs::remove_file(partial)
        {
            tracing::warn!("Cannot remove {}: {error}", partial.display());
        }
    }
}

fn is_missing(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
    )
}

fn is_block_device(metadata: &Metadata) -> bool {
    metadata.file_type().is_block_device()
}

fn exists(path: &Path) -> Error {
    let shown = path.display();
    let what = format!("Target {shown} exists: it was left as it is, name a new file");
    Error::new(ErrorKind::State, what)
}

fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

fn check_folder(folder: &Path, target: &Path) -> Result<()> {
    let (folder_shown, shown) = (folder.display(), target.display());
    match std::fs::metadata(folder) {
        Ok(metadata) if metadata.is_dir() => Ok(()),
        Ok(_) => {
            let what = format!("{folder_shown}, where target {shown} shall be, is not a folder");
            Err(Error::new(ErrorKind::Invalid, what))
        }
        Err(error) if is_missing(&error) => {
            let what = format!("Folder {folder_shown} of target {shown} does not exist: make it");
            Err(Error::new(ErrorKind::Missing, what).with_source(error))
        }
        Err(error) => {
            let what = format!("Cannot look at folder {folder_shown} of target {shown}");
            Err(Error::io(what, error))
        }
    }
}

/// Makes a new partial file that is locked; one that a killed restore left is removed.
fn create_locked(partial: &Path) -> Result<File> {
    let shown = partial.display();
    // Stays locked until its successor is, so that no third one comes in between.
    let mut stale: Option<File> = None;
    for _ in 0..ATTEMPTS_MAX {
        let mut options = OpenOptions::new();
        options.read(true).write(true).mode(FILE_MODE);
        let created = options.clone().create_new(true).open(partial);
        let (file, is_new) = match created {
            Ok(file) => (file, true),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                match options.custom_flags(libc::O_NOFOLLOW).open(partial) {
                    Ok(file) => (file, false),
                    Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                    Err(error) => return Err(Error::io(format!("Cannot open {shown}"), error)),
                }
            }
            Err(error) => return Err(cannot_create(partial, error)),
        };
        lock(&file, partial)?;
        if !is_same_file(&file, partial)? {
            continue;
        }
        if is_new {
            return Ok(file);
        }
        std::fs::remove_file(partial)
            .map_err(|error| Error::io(format!("Cannot remove stale file {shown}"), error))?;
        stale = Some(file);
    }
    drop(stale);
    let what = format!("Others make and remove {shown} all the time: stop them");
    Err(Error::new(ErrorKind::InUse, what))
}

fn cannot_create(partial: &Path, error: io::Error) -> Error {
    let what = format!("Cannot make file {}", partial.display());
    match error.raw_os_error() {
        Some(libc::ENOSPC | libc::EDQUOT) => {
            Error::new(ErrorKind::Full, what + ": make room").with_source(error)
        }
        _ => Error::io(what, error),
    }
}

fn lock(file: &File, partial: &Path) -> Result<()> {
    let shown = partial.display();
    file.try_lock().map_err(|error| match error {
        TryLockError::WouldBlock => Error::new(
            ErrorKind::InUse,
            format!("Another restore is writing {shown}: wait for it, or name another target"),
        ),
        TryLockError::Error(error) => Error::io(format!("Cannot lock {shown}"), error),
    })
}

/// Whether the name still belongs to the open file.
fn is_same_file(file: &File, path: &Path) -> Result<bool> {
    let failed = |error| Error::io(format!("Cannot look at {}", path.display()), error);
    let opened = file.metadata().map_err(failed)?;
    match std::fs::symlink_metadata(path) {
        Ok(named) => Ok(named.dev() == opened.dev() && named.ino() == opened.ino()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(failed(error)),
    }
}

fn rename_without_replacing(from: &Path, to: &Path) -> Result<()> {
    let renamed = renameat2(AT_FDCWD, from, AT_FDCWD, to, RenameFlags::RENAME_NOREPLACE);
    let renamed = match renamed {
        // The file system does not know the flag; a link does not replace either.
        Err(Errno::EINVAL | Errno::ENOSYS) => {
            std::fs::hard_link(from, to).and_then(|()| std::fs::remove_file(from))
        }
        other => other.map_err(io::Error::from),
    };
    renamed.map_err(|error| {
        if error.kind() == io::ErrorKind::AlreadyExists {
            return exists(to);
        }
        let (from, to) = (from.display(), to.display());
        Error::io(format!("Cannot rename {from} to {to}"), error)
    })
}

fn sync_folder(folder: &Path) -> io::Result<()> {
    match File::open(folder)?.sync_all() {
        // The file system does not sync folders.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file stands for the device: it takes the same calls.
    fn device(zeroing: Zeroing, bytes: usize) -> (tempfile::TempDir, Target) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("device");
        std::fs::write(&path, vec![0xee; bytes]).unwrap();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        let kind = Kind::Device { zeroing };
        (folder, Target { path, file, kind })
    }

    #[test]
    fn each_way_of_zeroing_gives_zeroes_and_nothing_else() {
        const BYTES: usize = 2 << 20;
        for zeroing in [Zeroing::Punch, Zeroing::ZeroRange, Zeroing::Write] {
            for range in [
                4096..8192,
                8192..1_000_448,
                512..1024,
                5..5,
                0..BYTES as u64,
            ] {
                let (folder, mut target) = device(zeroing, BYTES);
                target.zero(range.clone()).unwrap();
                let found = std::fs::read(folder.path().join("device")).unwrap();
                assert_eq!(found.len(), BYTES);
                for (at, byte) in (0..).zip(found) {
                    let expected = if range.contains(&at) { 0 } else { 0xee };
                    assert_eq!(byte, expected, "{zeroing:?} {range:?} byte {at}");
                }
            }
        }
    }

    #[test]
    fn what_is_given_up_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        let target = Target::open(&path, 8192).unwrap();
        target.write(0, b"half a disk").unwrap();
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        let second = Target::open(&path, 8192).unwrap_err();
        assert_eq!(second.kind(), ErrorKind::InUse);
        drop(target);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_file_that_appears_meanwhile_is_not_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        let target = Target::open(&path, 8192).unwrap();
        std::fs::write(&path, "precious").unwrap();
        let error = target.finish().unwrap_err();
        assert!(error.to_string().contains("exists"), "{error}");
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_full_file_system_is_told() {
        let full = |error| {
            let (_folder, target) = device(Zeroing::Write, 1);
            target.failed("write", io::Error::from_raw_os_error(error))
        };
        let error = full(libc::ENOSPC);
        assert_eq!(error.kind(), ErrorKind::Full);
        let line = error.chain();
        assert!(
            line.contains("device") && line.contains("No space left on device"),
            "{line}"
        );
        assert_eq!(full(libc::EIO).kind(), ErrorKind::Io);
    }

    #[test]
    fn a_bare_name_is_in_the_current_folder() {
        assert_eq!(folder_of(Path::new("disk")), Path::new("."));
        assert_eq!(folder_of(Path::new("/disk")), Path::new("/"));
    }
}
