//! The segments of one disk at a recovery point.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::Result;
use crate::segment::format::{Directory, FOOTER_BYTES};
use crate::segment::reader::read_directory;
use crate::segment::reference::SegmentRef;
use crate::vault::Vault;
use crate::vault::layout::segment_key;
use crate::vault::manifest::DiskPoint;

/// The segments of one disk at a recovery point, and what has been read of them.
#[derive(Debug)]
pub struct Segments<'a> {
    vault: &'a Vault,
    machine: &'a str,
    disk: &'a DiskPoint,
    read_bytes: AtomicU64,
}

impl<'a> Segments<'a> {
    /// The segments that a manifest of this machine lists for a disk.
    pub fn new(vault: &'a Vault, machine: &'a str, disk: &'a DiskPoint) -> Self {
        Self {
            vault,
            machine,
            disk,
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
        segment_key(self.machine, &self.disk.name, self.segment(segment))
    }

    /// Reads a directory.
    ///
    /// # Errors
    ///
    /// The object is missing, damaged, or not the one that the manifest names.
    pub fn directory(&self, segment: usize) -> Result<Directory> {
        let named = self.segment(segment);
        let (store, keys) = (self.vault.store(), self.vault.keys());
        let directory = read_directory(store, &self.key(segment), named, keys)?;
        self.count_read(named.directory_bytes + FOOTER_BYTES as u64);
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
