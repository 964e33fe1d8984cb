//! A disk that is served grows.
//!
//! Order: the file is made longer, or the device has been, durably; whoever tracks the disk makes
//! itself ready; only then is the size shown to clients.
//!
//! Crash consistency: a kill in between leaves a disk that is longer than it was served, which the
//! next start finds.
//!
//! What it does not handle: shrinking. What clients have written would be lost.

use super::{Disk, DiskKind, NewSize, SECTOR_BYTES};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::BLOCK_SIZE;
use crate::journal::format::DISK_BLOCKS_MAX;
use std::io::{Seek, SeekFrom};

/// Largest disk that can be tracked.
const SIZE_BYTES_MAX: u64 = DISK_BLOCKS_MAX * BLOCK_SIZE;

impl Disk {
    /// Makes the file longer, or finds out how long it or the device is by now, and returns the size
    /// that it is to be served with. Clients do not see it yet. May be repeated.
    ///
    /// # Errors
    ///
    /// It is read-only, the size is impossible or less than what is served or than the file has, a
    /// device has another size, or the file system refuses.
    pub fn prepare_size(&self, wanted: NewSize) -> Result<u64> {
        if self.read_only {
            let what = format!("Disk {} is served read-only and does not grow", self.name);
            return Err(Error::new(ErrorKind::State, what));
        }
        let present = self.present_bytes()?;
        let bytes = self.check_size(wanted, present)?;
        if bytes == self.size_bytes() {
            return Ok(bytes);
        }
        if present < bytes {
            self.file.set_len(bytes).map_err(|error| {
                let shown = self.path.display();
                Error::io(
                    format!("Cannot make disk {shown} {bytes} bytes long"),
                    error,
                )
            })?;
        }
        self.sync()?;
        Ok(bytes)
    }

    /// Shows clients a size that was prepared, and that whoever tracks the disk knows of.
    pub fn show_size(&self, bytes: u64) {
        self.size.grow_to(bytes);
    }

    /// Bytes that the file or device has, whatever is served of it.
    fn present_bytes(&self) -> Result<u64> {
        (&*self.file).seek(SeekFrom::End(0)).map_err(|error| {
            let shown = self.path.display();
            Error::io(format!("Cannot find the size of disk {shown}"), error)
        })
    }

    /// The size that is meant, if the disk may get it. `present`: what the file or device has.
    fn check_size(&self, wanted: NewSize, present: u64) -> Result<u64> {
        let (name, served) = (&self.name, self.size_bytes());
        let refuse = |kind, what: String| Err(Error::new(kind, what));
        if present < served {
            let what = format!(
                "Disk {name} was cut short: it has {present} bytes and is served with {served}"
            );
            return refuse(ErrorKind::Mismatch, what);
        }
        let bytes = match wanted {
            NewSize::Present => present,
            NewSize::Bytes(bytes) => bytes,
            NewSize::More(bytes) => served.saturating_add(bytes),
        };
        // Past the page cache a part of a sector could not be used.
        let unit = SECTOR_BYTES.max(self.alignment().into());
        if !bytes.is_multiple_of(unit) || bytes > SIZE_BYTES_MAX {
            let what = format!(
                "Disk {name} cannot have {bytes} bytes: a size is a multiple of {unit} and \
                 at most {SIZE_BYTES_MAX}"
            );
            return refuse(ErrorKind::Invalid, what);
        }
        if bytes < served {
            let what = format!(
                "Disk {name} is served with {served} bytes and does not shrink to {bytes}: its \
                 clients would lose what they have written"
            );
            return refuse(ErrorKind::Invalid, what);
        }
        if bytes == served {
            return Ok(bytes);
        }
        if bytes < present {
            let what = format!(
                "Disk {name} has {present} bytes by now, more than {bytes}: leave the size out to \
                 serve all of them"
            );
            return refuse(ErrorKind::Invalid, what);
        }
        if bytes > present && self.kind == DiskKind::Device {
            let what = format!(
                "Disk {name} is a device of {present} bytes: grow the device first, for example by \
                 lvextend, and leave the size out"
            );
            return refuse(ErrorKind::Invalid, what);
        }
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A disk of 10 sectors in a file of so many bytes.
    fn disk(folder: &tempfile::TempDir, present: u64) -> Disk {
        let path = folder.path().join("disk");
        let file = std::fs::File::create(&path).unwrap();
        file.set_len(10 * SECTOR_BYTES).unwrap();
        let disk = Disk::open("disk", &path, false).unwrap();
        file.set_len(present).unwrap();
        disk
    }

    #[test]
    fn past_the_page_cache_a_size_is_aligned() {
        let folder = tempfile::tempdir().unwrap();
        let mut disk = disk(&folder, 10 * SECTOR_BYTES);
        disk.direct_alignment = Some(4096);
        let error = disk.prepare_size(NewSize::Bytes(6144)).unwrap_err();
        assert!(error.to_string().contains("multiple of 4096"), "{error}");
        assert_eq!(disk.prepare_size(NewSize::Bytes(8192)).unwrap(), 8192);
    }

    #[test]
    fn sizes_are_taken_or_refused() {
        use NewSize::{Bytes, More, Present};
        // What the file has, what is wanted, and what is served then, in sectors.
        let table = [
            (10, Present, Ok(10)),
            (10, Bytes(10 * 512), Ok(10)),
            (10, More(0), Ok(10)),
            (10, Bytes(11 * 512), Ok(11)),
            (10, More(512), Ok(11)),
            (12, Present, Ok(12)),
            (12, Bytes(12 * 512), Ok(12)),
            (12, Bytes(20 * 512), Ok(20)),
            (12, Bytes(10 * 512), Ok(10)),
            (12, Bytes(11 * 512), Err("leave the size out")),
            (10, Bytes(9 * 512), Err("does not shrink")),
            (10, Bytes(0), Err("does not shrink")),
            (10, Bytes(11 * 512 + 1), Err("multiple of 512")),
            (10, More(1), Err("multiple of 512")),
            (10, More(u64::MAX - 511), Err("at most")),
            (10, Bytes(SIZE_BYTES_MAX + 512), Err("at most")),
            (9, Present, Err("cut short")),
            (9, Bytes(20 * 512), Err("cut short")),
        ];
        for (present, wanted, expected) in table {
            let folder = tempfile::tempdir().unwrap();
            let disk = disk(&folder, present * 512);
            let length = || std::fs::metadata(disk.path()).unwrap().len();
            match (disk.prepare_size(wanted), expected) {
                (Ok(bytes), Ok(sectors)) => {
                    assert_eq!(bytes, sectors * 512, "{wanted:?}");
                    assert_eq!(length(), bytes.max(present * 512), "{wanted:?}");
                }
                (Err(error), Err(text)) => {
                    assert!(error.to_string().contains(text), "{wanted:?}: {error}");
                    assert_eq!(length(), present * 512, "it is left alone");
                }
                (found, _) => panic!("{wanted:?} with {present} sectors: {found:?}"),
            }
            assert_eq!(disk.size_bytes(), 10 * 512, "nobody has shown it yet");
        }
    }
}
