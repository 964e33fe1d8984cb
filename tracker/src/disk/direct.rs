//! A disk past the page cache.
//!
//! What the guest writes goes to the disk at once instead of being kept in memory twice, in the guest's
//! page cache and in ours. In return the kernel takes whole sectors only: offsets, lengths and
//! memory are multiples of an alignment that depends on file system and device. It is found by
//! trying, as the kernel tells it (`STATX_DIOALIGN` of `statx(2)`) from Linux 6.1 on only and not for every
//! file system.
//!
//! What it does not handle: requests that are not aligned. Clients are told the alignment as the
//! minimum block size, and such requests are refused (`nbd::request`): to serve them through the page
//! cache besides would have two views of one page overwrite each other.

use std::os::unix::fs::FileExt;

use memmap2::MmapMut;
use nix::fcntl::{FcntlArg, OFlag, fcntl};

use super::{Disk, SECTOR_BYTES};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::BLOCK_SIZE;

impl Disk {
    /// The same disk, with `O_DIRECT` from here on.
    ///
    /// # Errors
    ///
    /// The file system has no direct I/O, needs an alignment above 4096 bytes, or one that the
    /// size of the disk is no multiple of.
    pub fn past_page_cache(mut self) -> Result<Self> {
        let shown = self.path.display();
        fcntl(&*self.file, FcntlArg::F_SETFL(OFlag::O_DIRECT)).map_err(|errno| {
            Error::io(
                format!(
                    "Disk {shown} cannot be served with --direct: its file system has no direct I/O"
                ),
                errno,
            )
        })?;
        let alignment = self.find_alignment()?;
        let size = self.size_bytes();
        if !size.is_multiple_of(u64::from(alignment)) {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!(
                    "Disk {shown} has {size} bytes; with --direct a multiple of {alignment} is \
                     needed: resize it first"
                ),
            ));
        }
        self.direct_alignment = Some(alignment);
        Ok(self)
    }

    /// The smallest length that can be read.
    fn find_alignment(&self) -> Result<u32> {
        let shown = self.path.display();
        let failed = |error| Error::io(format!("Cannot read disk {shown} with --direct"), error);
        let mut memory = MmapMut::map_anon(BLOCK_SIZE as usize).map_err(failed)?;
        let mut length = SECTOR_BYTES as usize;
        loop {
            match self.file.read_at(&mut memory[..length], 0) {
                Ok(_) => return Ok(length as u32),
                Err(error)
                    if error.raw_os_error() == Some(libc::EINVAL) && length < memory.len() =>
                {
                    length *= 2;
                }
                Err(error) => return Err(failed(error)),
            }
        }
    }

    /// Offsets and lengths of requests are multiples of so many bytes: 1 where the page cache
    /// takes any.
    pub fn alignment(&self) -> u32 {
        self.direct_alignment.unwrap_or(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    #[test]
    fn the_alignment_is_a_power_of_two_and_the_size_fits_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        File::create_new(&path).unwrap().set_len(1 << 20).unwrap();
        let disk = Disk::open("disk", &path, false).unwrap();
        assert_eq!(disk.alignment(), 1);
        let disk = match disk.past_page_cache() {
            Ok(disk) => disk,
            // Some file systems have none.
            Err(error) => return assert!(error.to_string().contains("direct"), "{error}"),
        };
        assert!(disk.alignment().is_power_of_two());
        assert!((512..=4096).contains(&disk.alignment()));
        assert!(!disk.inline_writes());
        let mut memory = MmapMut::map_anon(4096).unwrap();
        memory.fill(7);
        disk.file().write_all_at(&memory, 8192).unwrap();
        let mut found = MmapMut::map_anon(4096).unwrap();
        disk.file().read_exact_at(&mut found, 8192).unwrap();
        assert_eq!(&found[..], &memory[..]);
    }
}
