//! What of a disk is a hole: SEEK_DATA and SEEK_HOLE of `lseek(2)`.
//!
//! The disk is opened a second time for it. The kernel takes one lock for every `lseek` on one open
//! file, so that a search for the end of a long run would hold up all others.
//!
//! A disk that cannot be searched, such as most block devices, counts as data throughout. So does
//! what lies beyond the end of a file that was cut short: a hole would pass for zeroes there, while
//! a read tells that the disk fails.

use std::fs::File;
use std::os::fd::AsRawFd;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};

use crate::disk::Disk;

/// A disk as it is searched for holes. Belongs to one thread.
pub struct Survey {
    file: Option<File>,
}

/// A hole and the data after it. Either may be empty, not both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Where the hole ends and the data begin.
    pub hole_end: u64,
    /// Where the data end; it may lie beyond what was asked for, as the search for it may have taken
    /// long and should not be made again.
    pub data_end: u64,
}

impl Survey {
    /// Opens the disk for searching.
    pub fn new(disk: &Disk) -> Self {
        let path = format!("/proc/self/fd/{}", disk.as_raw_fd());
        Self {
            file: File::open(path).ok(),
        }
    }

    /// The hole at `at` and the data after it, up to `end`, which lies after `at`. What is told of
    /// data is never wrong in a way that matters: a hole that appears meanwhile reads as zeroes.
    pub fn run(&self, at: u64, end: u64) -> Run {
        let all_data = Run {
            hole_end: at,
            data_end: end,
        };
        let Some(file) = &self.file else {
            return all_data;
        };
        let hole_end = match seek(file, at, Whence::SeekData) {
            Ok(data) => data.clamp(at, end),
            // No data follow: a hole up to the end of the file.
            Err(Errno::ENXIO) if seek(file, 0, Whence::SeekEnd).is_ok_and(|last| end <= last) => {
                end
            }
            Err(_) => return all_data,
        };
        if hole_end == end {
            return Run {
                hole_end,
                data_end: end,
            };
        }
        let data_end = match seek(file, hole_end, Whence::SeekHole) {
            Ok(hole) if hole > hole_end => hole,
            // A hole was dug in the meantime, or nothing is known.
            _ => end,
        };
        Run { hole_end, data_end }
    }
}

fn seek(file: &File, offset: u64, whence: Whence) -> Result<u64, Errno> {
    let offset = i64::try_from(offset).map_err(|_| Errno::EINVAL)?;
    Ok(lseek(file, offset, whence)?.unsigned_abs())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn holes_and_data_alternate_and_a_file_cut_short_is_data() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        let file = File::create_new(&path).unwrap();
        file.set_len(4 << 20).unwrap();
        file.write_all_at(&[1; 64 << 10], 1 << 20).unwrap();
        let disk = Disk::open("disk", &path, false).unwrap();
        let survey = Survey::new(&disk);
        let run = |hole_end, data_end| Run { hole_end, data_end };
        let data_end = (1 << 20) + (64 << 10);
        assert_eq!(survey.run(0, 4 << 20), run(1 << 20, data_end));
        assert_eq!(survey.run(100, 200), run(200, 200));
        assert_eq!(survey.run(1 << 20, (1 << 20) + 1), run(1 << 20, data_end));
        assert_eq!(survey.run(1 << 20, 4 << 20), run(1 << 20, data_end));
        assert_eq!(survey.run(data_end, 4 << 20), run(4 << 20, 4 << 20));
        file.set_len(1 << 20).unwrap();
        assert_eq!(survey.run(0, 4 << 20), run(0, 4 << 20));
    }
}
