//! Where a shipper finds that it may not go on, and what it gives up so that it may.
//!
//! A state folder that is an old copy, or has a copy that is at work, knows less of the vault than it believes: its
//! fingerprints are of older content, and blocks would be left out by them. It is told by the vault's newest point: if
//! that is of our own generation, it was sealed in this folder or recorded here when it left the spool. Whoever
//! is fenced leaves a mark in the folder and never runs again from it, until `shipper protect` has claimed the machine anew.

use std::time::Instant;

use tracker::extent::Epoch;

use super::conductor::Conductor;
use super::rest::Wish;
use crate::error::{Error, ErrorKind, Result};
use crate::vault::manifest::{Consistency, Manifest};

impl Conductor {
    /// Fails if the vault has a point of our generation that was never sealed here.
    pub(super) fn check_is_known(&self, newest: Option<&Manifest>) -> Result<()> {
        let held = self.machine.generation;
        let Some(newest) = newest.filter(|newest| newest.generation == held) else {
            return Ok(());
        };
        let Some(published) = self.state.published()? else {
            // A folder from before this was kept.
            return self.state.save_published(newest.epoch);
        };
        let sealed = self.spool.epochs()?.pop();
        if newest.epoch <= published.max(sealed.unwrap_or(published)) {
            return Ok(());
        }
        let what = format!(
            "The vault has recovery point {} of machine {} of this generation ({held}), and state folder {} knows \
             nothing of it: the folder is an old copy, or another shipper works with a copy of it. Stop the other \
             one, then run `shipper protect` where it shall go on",
            newest.epoch,
            self.config.machine,
            self.config.state.display()
        );
        Err(Error::new(ErrorKind::Fenced, what))
    }

    /// No point of ours gets a number that anything in the vault has, the highest that is known among it, or that a
    /// boundary has decided about.
    pub(super) fn raise_floor(&mut self, highest: Epoch) -> Result<()> {
        let machine = &self.config.machine;
        let listed = self.vault.listed_manifests(machine)?.pop();
        let boundary = self.vault.boundary(machine)?;
        let decided = boundary.map(|boundary| boundary.through);
        self.floor = self
            .floor
            .max(highest)
            .max(listed.max(decided).unwrap_or_default());
        Ok(())
    }

    /// Whether a sealed epoch was published, and removed since.
    pub(super) fn is_removed(&self, epoch: Epoch) -> Result<bool> {
        let boundary = self.vault.boundary(&self.config.machine)?;
        Ok(boundary.is_some_and(|boundary| boundary.keeps(epoch) == Some(false)))
    }

    /// The number of a sealed epoch is taken in the vault, by a manifest that came late from a shipper that has lost
    /// the machine. It and all after it are given up, and the tracker takes their changes back: nothing of the other one is overwritten, and
    /// no guest notices.
    pub(super) fn number_taken(&mut self, taken: Epoch) -> Result<()> {
        tracing::warn!(
            "The number of recovery point {taken} is taken in the vault by a shipper that has lost the machine: its \
             changes will be in a later one"
        );
        self.uploader = self.start_uploader()?;
        self.board.update(|status| status.points_given_up += 1);
        for (made, reply) in std::mem::take(&mut self.waiting) {
            let quiesce = made.consistency == Consistency::Application || made.reason.is_some();
            self.cuts.push(Wish::new(quiesce, reply));
        }
        self.unreleased.clear();
        self.tables = None;
        self.link = None;
        self.load(Some(taken))?;
        self.due = Instant::now();
        Ok(())
    }
}
