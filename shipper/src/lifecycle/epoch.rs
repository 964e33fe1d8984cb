//! Making one recovery point: cut, capture (`capture`), seal.
//!
//! Order: the epoch is cut on all disks at once; each disk's changed blocks become segments in the
//! spool; the manifest beside them; the seal, after which the epoch is durable here; the upload is
//! queued; the fingerprint tables take over what was captured; the tracker is told.
//!
//! Crash consistency: before the seal nothing counts, and the epoch is given up. After it the epoch
//! will be published, whoever dies: `reconcile` repeats what follows.
//!
//! If a capture fails the recovery point is given up, and its changes belong to the next one.

use std::time::Instant;

use tracker::control::protocol::CaptureOutcome;
use tracker::extent::Epoch;

use super::capture::{CapturedDisk, GivenUp};
use super::conductor::{At, Conductor, Trouble};
use super::rest::Wish;
use crate::error::{Error, ErrorKind, Result};
use crate::status::{Part, Phase};
use crate::vault::manifest::Manifest;

impl Conductor {
    /// Makes a recovery point, unless nobody asked for one and nothing has changed.
    pub(super) fn make_point(&mut self) -> std::result::Result<(), Trouble> {
        if self.cuts.is_empty()
            && !self.scan.is_complete()
            && self.is_unchanged().at(Part::Tracker)?
        {
            return Ok(());
        }
        self.enter(Phase::Capturing);
        let cuts = std::mem::take(&mut self.cuts);
        let (epoch, rest) = match self.cut_at_rest(&cuts) {
            Ok(cut) => cut,
            Err(trouble) => {
                self.cuts = cuts;
                return Err(trouble);
            }
        };
        let sized = self.ask_for_sizes().map_err(GivenUp::Failed);
        match sized.and_then(|()| self.capture(epoch, &rest)) {
            Ok((manifest, captured)) => {
                self.waiting
                    .extend(cuts.into_iter().map(|wish| (rest.made(epoch), wish.reply)));
                self.rested(epoch, &rest, manifest.created);
                self.sealed(manifest, captured)
            }
            Err(why) => {
                self.cuts = cuts.into_iter().map(Wish::wait_again).collect();
                self.give_up(epoch, why)
            }
        }
    }

    /// Whether the open epoch has no change. Counts of the tracker begin anew when it does, so the
    /// journal is asked as well.
    fn is_unchanged(&mut self) -> Result<bool> {
        let Some(link) = &mut self.link else {
            return Ok(false);
        };
        let status = link.client.epochs()?;
        if self.base.is_none() || status.disks.iter().any(|disk| disk.open_dirty_blocks > 0) {
            return Ok(false);
        }
        for reader in &link.readers {
            let state = reader.state()?;
            let dirty = reader.dirty(state.open_after(), Epoch(u64::MAX))?;
            if dirty.all() || dirty.extents().next().is_some() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Cuts an epoch whose number is above everything that has been named.
    pub(super) fn cut(&mut self) -> std::result::Result<Epoch, Trouble> {
        let highest = self.highest();
        let no_link = || Error::new(ErrorKind::Unavailable, "The tracker is not known");
        let link = self.link.as_mut().ok_or_else(no_link).at(Part::Tracker)?;
        let mut epoch = link.client.cut(highest.next()).at(Part::Tracker)?;
        if epoch <= highest {
            // The numbers of a new journal begin anew; the next one is above.
            link.client
                .capture_end(epoch, CaptureOutcome::Abandoned)
                .at(Part::Tracker)?;
            epoch = link.client.cut(highest.next()).at(Part::Tracker)?;
        }
        link.client.capture_begin(epoch).at(Part::Tracker)?;
        Ok(epoch)
    }

    /// Learns how large the disks are after the cut.
    fn ask_for_sizes(&mut self) -> Result<()> {
        let no_link = || Error::new(ErrorKind::Unavailable, "The tracker is not known");
        let link = self.link.as_mut().ok_or_else(no_link)?;
        let status = link.client.epochs()?;
        self.take_sizes(&status)
    }

    /// What follows a seal. None of it can take the epoch back.
    fn sealed(
        &mut self,
        manifest: Manifest,
        captured: Vec<CapturedDisk>,
    ) -> std::result::Result<(), Trouble> {
        let epoch = manifest.epoch;
        self.base = Some(manifest);
        // What was lost is in the scans that it has taken over.
        self.lacking.clear();
        self.scan.take_over(epoch);
        self.queue_epoch(epoch);
        for (index, disk) in captured.iter().enumerate() {
            for (_, directory) in &disk.made {
                self.apply(index, epoch, directory).at(Part::Spool)?;
            }
        }
        self.state.save_scan(&self.scan).at(Part::Spool)?;
        self.show_scan();
        if let Some(link) = &mut self.link {
            let sealed = CaptureOutcome::Sealed;
            link.client.capture_end(epoch, sealed).at(Part::Tracker)?;
        }
        self.board.note(Part::Capture, None);
        self.board.note(Part::Spool, None);
        Ok(())
    }

    fn give_up(&mut self, epoch: Epoch, why: GivenUp) -> std::result::Result<(), Trouble> {
        self.board.update(|status| status.points_given_up += 1);
        let discarded = self.spool.discard(epoch);
        if let Some(link) = &mut self.link {
            let given_up = CaptureOutcome::Abandoned;
            link.client.capture_end(epoch, given_up).at(Part::Tracker)?;
        }
        discarded.at(Part::Spool)?;
        match why {
            GivenUp::NotKept(error) => {
                self.board.note(Part::Capture, Some(&error));
                self.tell_late(&error);
                // The sooner the next one is cut, the fewer blocks it has to keep.
                self.due = Instant::now();
                Ok(())
            }
            GivenUp::Failed(error) => Err(Trouble {
                part: Part::Capture,
                error,
            }),
            GivenUp::NeedsScan(index, why) => {
                let disk = &self.disks[index].config.name;
                tracing::warn!("Recovery point {epoch} is given up, disk {disk} is scanned: {why}");
                let mut scan = self.scan.clone();
                scan.mark(disk, why);
                self.change_scan(scan).at(Part::Spool)
            }
        }
    }
}
