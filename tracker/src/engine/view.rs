//! Frozen views: a disk as it was at a cut, for other programs.
//!
//! Order of a READ: the disk is read as it is; blocks that are preserved are put in their place; then the view is
//! asked whether it still held. Whatever a guest has overwritten without a copy, it has after the view ended, so
//! that shows; then the READ fails, and nothing wrong is ever returned as data.
//!
//! What it does not handle: when an epoch is kept (`epoch`); the preserve file (`preserve`).

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use crate::epoch::Frozen;
use crate::extent::Extent;
use crate::nbd::wire::ReplyError;

/// A disk as it was at the cut of an epoch.
#[derive(Clone, Debug)]
pub struct View {
    /// Index of the disk.
    pub disk: usize,
    /// The epoch.
    pub frozen: Arc<Frozen>,
}

impl View {
    /// Size in bytes at the cut.
    pub fn size_bytes(&self) -> u64 {
        self.frozen.area.subject().size_bytes
    }

    /// Makes what was read from the disk a moment ago what it was at the cut.
    pub fn settle(&self, offset: u64, bytes: &mut [u8]) -> Result<(), ReplyError> {
        let overlaid = self.frozen.area.overlay(offset, bytes);
        fence(Ordering::SeqCst);
        if overlaid.is_err() || self.frozen.is_over() {
            return Err(ReplyError::Io);
        }
        Ok(())
    }

    /// The blocks of the epoch from byte `start` up to byte `end`, sorted.
    pub fn changed(&self, start: u64, end: u64) -> impl Iterator<Item = Extent> {
        Extent::covering(start, end - start).runs(|index| self.frozen.area.changed(index))
    }
}
