//! Snapshots: closed epochs that are held for other programs than the shipper.
//!
//! Overview: a snapshot is a closed epoch of which every block is kept. While it is held no other epoch can be closed, and the
//! shipper can neither seal it nor give it up. Released, its changes belong to the open epoch; released as done they
//! are taken over by whoever has copied them, and the next snapshot tells those that came after.
//!
//! A tracker that is killed leaves it as it leaves any closed epoch; the next one holds it on.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::frozen::Frozen;
use super::{Keep, Machine};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::Epoch;

/// What to do about a snapshot that is in the way.
pub(super) const RELEASE: &str = "it is a snapshot; end it with `tracker snapshot release`";

impl Machine {
    /// Closes the open epoch and holds it.
    ///
    /// # Errors
    ///
    /// As [`Self::cut`].
    pub fn take_snapshot(&self, drain_timeout: Duration) -> Result<Epoch> {
        let _moving = self.begin()?;
        let before = self.closed();
        let cut = self.cut_now(Epoch::ZERO, Keep::All, drain_timeout);
        // Also one that was not closed durably is held until it is released.
        if let Some(closed) = self.closed().filter(|_| before.is_none()) {
            self.held.store(closed.0, Ordering::Release);
        }
        cut
    }

    /// The closed epoch that is held.
    pub fn held(&self) -> Option<Epoch> {
        let held = self.held.load(Ordering::Acquire);
        (held != 0).then_some(Epoch(held))
    }

    /// An earlier tracker may have left a snapshot. One that keeps every block for its shipper as well cannot tell.
    pub(super) fn resume_hold(&self) {
        let keeps_all = |frozen: &Arc<Frozen>| frozen.area.subject().all && !self.frozen_views;
        let left = self
            .disks
            .iter()
            .find_map(|disk| disk.frozen().filter(keeps_all));
        self.held
            .store(left.map_or(0, |frozen| frozen.epoch.0), Ordering::Release);
    }

    /// Refuses what only the shipper of an epoch may do, where the epoch is held.
    ///
    /// # Errors
    ///
    /// `State`: it is.
    pub fn check_not_held(&self, epoch: Epoch) -> Result<()> {
        if self.held() != Some(epoch) {
            return Ok(());
        }
        let what = format!("Epoch {epoch} is held: {RELEASE}");
        Err(Error::new(ErrorKind::State, what))
    }

    /// Ends a snapshot. With `done` its changes are taken over and are no longer known.
    ///
    /// # Errors
    ///
    /// `State`: no snapshot has this number. Otherwise as [`Self::seal`] and [`Self::commit`].
    pub fn release(&self, epoch: Epoch, done: bool) -> Result<()> {
        if self.held() != Some(epoch) {
            let held = self
                .held()
                .map_or("none is".to_owned(), |held| format!("{held} is"));
            let what = format!("Epoch {epoch} is not held: {held}");
            return Err(Error::new(ErrorKind::State, what));
        }
        if done {
            self.seal(epoch)?;
            self.commit(epoch)?;
        } else {
            self.abandon(epoch)?;
        }
        self.held.store(0, Ordering::Release);
        Ok(())
    }

    /// The frozen views that there are: index of the disk and its closed epoch. There is none before the cut is complete:
    /// writes of the epoch may still change the disk until then, and what belongs to it is not told.
    pub fn views(&self) -> Vec<(usize, Arc<Frozen>)> {
        let closed = self.closed();
        let of_disk = |(index, disk): (usize, &super::tracked::TrackedDisk)| {
            let frozen = disk.frozen()?;
            let is_there = frozen.area.subject().all && Some(frozen.epoch) == closed;
            is_there.then_some((index, frozen))
        };
        self.disks.iter().enumerate().filter_map(of_disk).collect()
    }

    /// Whether every block of a disk counts as changed.
    pub fn counts_as_changed(&self, disk: usize) -> bool {
        let tracked = self.disks.get(disk);
        tracked.is_none_or(|disk| disk.journal.state().resync.is_some())
    }
}
