//! What a machine still has of what it once shipped: its disks, and the files that wait for upload.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use tracker::extent::{BLOCK_SIZE, Epoch};

use super::object::Blocks;
use crate::error::{Error, Result};
use crate::keys::Keys;
use crate::lifecycle::config::Config;
use crate::lifecycle::state::StateFolder;
use crate::segment::reference::SegmentRef;
use crate::spool::files::read_if_present;
use crate::spool::{Spool, segment_file};
use crate::vault::manifest::PointId;

/// The disk that a machine's users write to. They may go on with it: what is read is compared with a fingerprint.
#[derive(Debug)]
pub struct Disk {
    file: File,
    shown: String,
}

impl Disk {
    /// Opens the disk of this name; `None`: the machine has none.
    ///
    /// # Errors
    ///
    /// It cannot be opened.
    pub fn open(config: &Config, name: &str) -> Result<Option<Self>> {
        let Some(disk) = config.disks.iter().find(|disk| disk.name == name) else {
            return Ok(None);
        };
        let shown = disk.path.display().to_string();
        let file = File::open(&disk.path)
            .map_err(|error| Error::io(format!("Cannot read disk {shown}"), error))?;
        Ok(Some(Self { file, shown }))
    }
}

impl Blocks for Disk {
    fn block(&self, number: u64) -> Result<Option<Vec<u8>>> {
        let Some(offset) = number.checked_mul(BLOCK_SIZE) else {
            return Ok(None);
        };
        // What is behind the end of the disk counts as zero.
        let mut block = vec![0; BLOCK_SIZE as usize];
        let mut done = 0;
        while done < block.len() {
            match self.file.read_at(&mut block[done..], offset + done as u64) {
                Ok(0) => break,
                Ok(count) => done += count,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => {
                    return Err(Error::io(format!("Cannot read disk {}", self.shown), error));
                }
            }
        }
        Ok((done > 0).then_some(block))
    }
}

/// A disk that is not there any more.
#[derive(Debug)]
pub struct NoDisk;

impl Blocks for NoDisk {
    fn block(&self, _: u64) -> Result<Option<Vec<u8>>> {
        Ok(None)
    }
}

/// The files of a state folder.
#[derive(Debug)]
pub struct Files<'a> {
    state: &'a StateFolder,
    spool: Spool,
}

impl<'a> Files<'a> {
    /// Those of this folder.
    ///
    /// # Errors
    ///
    /// It cannot be read.
    pub fn open(state: &'a StateFolder) -> Result<Self> {
        let spool = Spool::open(&state.spool())?;
        Ok(Self { state, spool })
    }

    /// The file of a segment, if one of its size is here.
    ///
    /// # Errors
    ///
    /// It cannot be read.
    pub fn segment(&self, disk: &str, segment: &SegmentRef) -> Result<Option<Vec<u8>>> {
        let name = segment_file(disk, &segment.name.0);
        let mut folders = vec![self.state.copy()];
        // A segment lies with the point that it was made for, or with one that has taken a scan over.
        folders.extend(
            self.spool
                .epochs()?
                .into_iter()
                .map(|epoch| self.spool.folder(epoch)),
        );
        for folder in folders {
            if let Some(content) = self.file(&folder.join(&name), segment.bytes)? {
                return Ok(Some(content));
            }
        }
        Ok(None)
    }

    fn file(&self, path: &Path, bytes: u64) -> Result<Option<Vec<u8>>> {
        match fs::metadata(path) {
            Ok(metadata) if metadata.len() == bytes => read_if_present(path),
            _ => Ok(None),
        }
    }

    /// The bytes of the manifest of a recovery point that is not released yet, if it is whole.
    ///
    /// # Errors
    ///
    /// The folder cannot be read.
    pub fn manifest(&self, id: &PointId, keys: &Keys) -> Result<Option<Vec<u8>>> {
        let epochs: Vec<Epoch> = self.spool.epochs()?;
        if !epochs.contains(&id.epoch) {
            return Ok(None);
        }
        Ok(self.spool.manifest(id, keys).ok().map(|(_, bytes)| bytes))
    }
}
