//! The segments of one disk at a recovery point.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::Result;
use crate::segment::format::Directory;
use crate::segment::reader::{read_directory, tail_bytes};
use crate::segment::reference::SegmentRef;
use crate::segment::seal::Owner;
use crate::vault::Vault;
use crate::vault::manifest::DiskPoint;

/// The segments of one disk at a recovery point, and what has been read of them.
#[derive(Debug)]
pub struct Segments<'a> {
    vault: &'a Vault,
    disk: &'a DiskPoint,
    owner: Owner,
    read_bytes: AtomicU64,
}

impl<'a> Segments<'a> {
    /// The segments that a manifest of this machine lists for a disk.
    pub fn new(vault: &'a Vault, machine: &str, disk: &'a DiskPoint) -> Self {
        Self {
            vault,
            disk,
            owner: vault.owner(machine, &disk.name),
            read_bytes: AtomicU64::new(0),
        }
    }

    /// Where they are.
    pub fn vault(&self) -> &'a Vault {
        self.vault
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.disk.segments.len()
    }

    /// The disk that they make.
    pub fn disk(&self) -> &'a DiskPoint {
        self.disk
    }

    /// Key of a segment.
    pub fn key(&self, segment: usize) -> String {
        let Owner { machine, disk, .. } = &self.owner;
        self.vault.segment_key(machine, disk, self.segment(segment))
    }

    /// Reads a directory.
    ///
    /// # Errors
    ///
    /// The object is missing, damaged, or not the one that the manifest names.
    pub fn directory(&self, segment: usize) -> Result<Directory> {
        let named = self.segment(segment);
        let store = self.vault.store();
        let directory = read_directory(store, &self.key(segment), named, &self.owner)?;
        self.count_read(tail_bytes(named, &self.owner));
        Ok(directory)
    }

    /// Adds to the bytes that were read from the vault.
    pub fn count_read(&self, bytes: u64) {
        self.read_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Bytes that were read from the vault so far.
    pub fn read_bytes(&self) -> u64 {
        self.read_bytes.load(Ordering::Relaxed)
    }

    fn segment(&self, segment: usize) -> &'a SegmentRef {
        &self.disk.segments[segment]
    }
}
