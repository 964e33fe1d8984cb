//! The spool: sealed epochs that wait for upload, in order, and what is known of the vault's blocks.
//!
//! Order of a seal: segments are written and synced; the manifest beside them; the folder is synced
//! and gets its name. A folder named `EPOCH` is complete, one named `EPOCH.partial` is none.
//!
//! Crash consistency: a sealed epoch is durable as a whole. Removing one takes its name away first.
//!
//! What it does not handle: which epochs count; that is `lifecycle::reconcile`.

pub mod files;

pub mod table;

use std::fs;
use std::path::{Path, PathBuf};

use tracker::extent::Epoch;

use crate::error::{Error, ErrorKind, Result};
use crate::keys::Keys;
use crate::segment::reference::SegmentRef;
use crate::segment::reference::segment_name;
use crate::vault::manifest::{Manifest, PointId};
use files::{failed, make_folder, sync_folder};

const MANIFEST_FILE: &str = "manifest";
const PARTIAL: &str = "partial";

/// The folder of sealed epochs.
#[derive(Clone, Debug)]
pub struct Spool {
    root: PathBuf,
}

/// Name of a segment's file.
pub fn segment_file(disk: &str, segment: &crate::segment::format::SegmentName) -> String {
    format!("{disk}+{}.segment", segment_name(segment))
}

impl Spool {
    /// Opens or makes the spool, and removes what was never sealed.
    ///
    /// # Errors
    ///
    /// The folder cannot be read or written.
    pub fn open(root: &Path) -> Result<Self> {
        make_folder(root)?;
        let spool = Self {
            root: root.to_owned(),
        };
        for entry in fs::read_dir(root).map_err(|error| failed("read folder", root, error))? {
            let path = entry
                .map_err(|error| failed("read folder", root, error))?
                .path();
            if path.extension().is_some_and(|ending| ending == PARTIAL) {
                fs::remove_dir_all(&path).map_err(|error| failed("remove", &path, error))?;
            }
        }
        Ok(spool)
    }

    /// A spool that others work in, to look at.
    pub fn at(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
        }
    }

    fn partial(&self, epoch: Epoch) -> PathBuf {
        self.root.join(format!("{epoch}.{PARTIAL}"))
    }

    /// The folder of a sealed epoch.
    pub fn folder(&self, epoch: Epoch) -> PathBuf {
        self.root.join(epoch.to_string())
    }

    /// An empty folder for the segments of an epoch that is being captured.
    ///
    /// # Errors
    ///
    /// It cannot be made.
    pub fn begin(&self, epoch: Epoch) -> Result<PathBuf> {
        let folder = self.partial(epoch);
        self.discard(epoch)?;
        make_folder(&folder)?;
        Ok(folder)
    }

    /// Throws away what was captured of an epoch and not sealed.
    ///
    /// # Errors
    ///
    /// It cannot be removed.
    pub fn discard(&self, epoch: Epoch) -> Result<()> {
        let folder = self.partial(epoch);
        match fs::remove_dir_all(&folder) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(failed("remove", &folder, error))
            }
            _ => Ok(()),
        }
    }

    /// Seals an epoch whose segments are written and synced: it is durable when this returns.
    ///
    /// # Errors
    ///
    /// The spool cannot be written; the epoch is then not sealed.
    pub fn seal(&self, manifest: &Manifest, keys: &Keys) -> Result<()> {
        let partial = self.partial(manifest.epoch);
        let bytes = manifest
            .encode(keys)
            .map_err(|error| failed("write the manifest into", &partial, error))?;
        files::replace(&partial.join(MANIFEST_FILE), &bytes)?;
        let folder = self.folder(manifest.epoch);
        fs::rename(&partial, &folder).map_err(|error| failed("seal", &partial, error))?;
        sync_folder(&self.root)
    }

    /// The sealed epochs, in order.
    ///
    /// # Errors
    ///
    /// The folder cannot be read.
    pub fn epochs(&self) -> Result<Vec<Epoch>> {
        let mut epochs = Vec::new();
        for entry in fs::read_dir(&self.root).map_err(|e| failed("read folder", &self.root, e))? {
            let entry = entry.map_err(|error| failed("read folder", &self.root, error))?;
            let name = entry.file_name();
            let name = name.to_string_lossy();
            if name.len() == 16
                && let Ok(number) = u64::from_str_radix(&name, 16)
            {
                epochs.push(Epoch(number));
            }
        }
        epochs.sort_unstable();
        Ok(epochs)
    }

    /// The manifest of a sealed epoch, and its bytes.
    ///
    /// # Errors
    ///
    /// It cannot be read, or is damaged.
    pub fn manifest(&self, id: &PointId, keys: &Keys) -> Result<(Manifest, Vec<u8>)> {
        let path = self.folder(id.epoch).join(MANIFEST_FILE);
        let bytes = fs::read(&path).map_err(|error| failed("read", &path, error))?;
        let manifest = Manifest::decode(&bytes, keys, id).map_err(|what| {
            Error::new(
                ErrorKind::Corrupt,
                format!("Manifest {} of the spool: {what}", path.display()),
            )
        })?;
        Ok((manifest, bytes))
    }

    /// The file of a segment of a sealed epoch, whether or not it is there.
    pub fn segment(&self, epoch: Epoch, disk: &str, segment: &SegmentRef) -> PathBuf {
        self.folder(epoch).join(segment_file(disk, &segment.name.0))
    }

    /// Removes a sealed epoch.
    ///
    /// # Errors
    ///
    /// The folder cannot be written.
    pub fn remove(&self, epoch: Epoch) -> Result<()> {
        let (folder, partial) = (self.folder(epoch), self.partial(epoch));
        self.discard(epoch)?;
        match fs::rename(&folder, &partial) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(failed("remove", &folder, error)),
            Ok(()) => self.discard(epoch),
        }
    }

    /// Bytes of the segments of a disk in the spool.
    ///
    /// # Errors
    ///
    /// A folder cannot be read.
    pub fn bytes_of(&self, disk: &str) -> Result<u64> {
        // No name of a disk has a plus in it.
        let begin = format!("{disk}+");
        let mut sum = 0;
        for epoch in self.epochs()? {
            let is_its = |name: &str| name.starts_with(&begin);
            sum += bytes_where(&self.folder(epoch), is_its)?;
        }
        Ok(sum)
    }

    /// Bytes of everything in the spool.
    ///
    /// # Errors
    ///
    /// A folder cannot be read.
    pub fn bytes(&self) -> Result<u64> {
        let mut sum = 0;
        for epoch in self.epochs()? {
            sum += folder_bytes(&self.folder(epoch))?;
        }
        Ok(sum)
    }
}

/// Bytes of all files of a folder; zero if it is not there.
pub fn folder_bytes(folder: &Path) -> Result<u64> {
    bytes_where(folder, |_| true)
}

fn bytes_where(folder: &Path, counts: impl Fn(&str) -> bool) -> Result<u64> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(failed("read folder", folder, error)),
    };
    // A file that an upload has just removed counts for nothing.
    Ok(entries
        .flatten()
        .filter(|entry| counts(&entry.file_name().to_string_lossy()))
        .filter_map(|entry| entry.metadata().ok())
        .map(|m| m.len())
        .sum())
}
