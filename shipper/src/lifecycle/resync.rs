//! Resynchronization of a disk: who asks for it, when it begins, how it is ended.
//!
//! Overview: a disk is marked, by the operator or because more of it waits to be shipped than the
//! configured share, and the mark is kept durably. Its scan (`scan`) begins as soon as it can get
//! anywhere: the vault answers, and has taken every recovery point that waited. Until then the
//! journal goes on telling all that changes. While the vault is away recovery points are made as
//! ever, as long as the spool's budget lasts; while it takes them, no new one delays the scan.
//!
//! What is necessary, such as a first copy, is marked by nobody and waits for nothing: `reconcile`
//! begins it.
//!
//! Crash consistency: every change of marks and scans is durable before anything is done or
//! answered by it. Whether the journal suffices is decided anew whenever the tracker is found, so a
//! mark or a cancel never covers up that it does not.
//!
//! Cancel: what the scan has made is kept, and the next recovery point names it; it captures what
//! the journal calls changed since the one before, as if there had been no scan. So it does not
//! matter that the fingerprint table knows the scan's blocks by then.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tracker::control::client::ControlClient;
use tracker::epoch::{DiskStatus, MachineStatus};
use tracker::extent::BLOCK_SIZE;

use super::conductor::{At, Conductor, Trouble};
use super::progress::{Outcome, ScanState};
use super::reason::{Reason, exceeds_share};
use super::reconcile::find_disk;
use crate::error::{Error, ErrorKind, Result};
use crate::status::Part;
use crate::vault::generation;

/// How often the shares are looked at, and a vault that may be away.
pub(super) const WATCH_INTERVAL: Duration = Duration::from_secs(2);

/// What the operator asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResyncRequest {
    /// Name of the disk; `None` for all.
    pub disk: Option<String>,
    /// End it instead.
    pub cancel: bool,
}

/// What became of it on one disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResyncAnswer {
    /// Name of the disk.
    pub disk: String,
    /// What became of it.
    pub outcome: Outcome,
    /// Why the disk is, or was, to be scanned; in words.
    pub reason: Option<String>,
}

/// When the vault is asked again, and whether it did not answer.
#[derive(Debug)]
pub(super) struct Probe {
    next: Instant,
    failed: bool,
}

impl Probe {
    pub(super) fn new() -> Self {
        Self {
            next: Instant::now(),
            failed: false,
        }
    }
}

impl Conductor {
    /// Marks disks for the operator, or ends their scans.
    ///
    /// # Errors
    ///
    /// There is no such disk, or the change cannot be kept; nothing is changed then.
    pub(super) fn resync_asked(&mut self, request: &ResyncRequest) -> Result<Vec<ResyncAnswer>> {
        let names = self.asked_disks(request.disk.as_deref())?;
        let status = request.cancel.then(|| self.ask_tracker()).flatten();
        let mut scan = self.scan.clone();
        let mut answers = Vec::new();
        for name in names {
            let (outcome, reason) = if request.cancel {
                let necessary = self.necessary_now(&name, status.as_ref());
                scan.cancel(&name, necessary)
            } else {
                let (outcome, reason) = scan.mark(&name, Reason::Operator);
                (outcome, Some(reason))
            };
            answers.push(ResyncAnswer {
                disk: name,
                outcome,
                reason: reason.map(|reason| reason.to_string()),
            });
        }
        self.change_scan(scan)?;
        for answer in &answers {
            let disk = &answer.disk;
            match answer.outcome {
                Outcome::Marked => {
                    tracing::info!("Disk {disk} is marked for resynchronization: it was asked for");
                }
                Outcome::Cancelled => {
                    tracing::info!("The resynchronization of disk {disk} is cancelled");
                }
                _ => {}
            }
        }
        Ok(answers)
    }

    fn asked_disks(&self, disk: Option<&str>) -> Result<Vec<String>> {
        let names: Vec<String> = self.disks.iter().map(|d| d.config.name.clone()).collect();
        match disk {
            None => Ok(names),
            Some(disk) if names.iter().any(|name| name == disk) => Ok(vec![disk.to_owned()]),
            Some(disk) => Err(Error::new(
                ErrorKind::Missing,
                format!(
                    "Machine {} has no disk {disk:?}: it has {}",
                    self.config.machine,
                    names.join(", ")
                ),
            )),
        }
    }

    /// What the tracker says at this moment, or the one that has come in its place. One that does not
    /// answer is looked for again, and decides then whether its journal suffices.
    fn ask_tracker(&mut self) -> Option<MachineStatus> {
        if let Some(status) = self
            .link
            .as_mut()
            .and_then(|link| link.client.epochs().ok())
        {
            return Some(status);
        }
        self.link = None;
        let client = ControlClient::connect(&self.config.tracker);
        client.and_then(|mut client| client.epochs()).ok()
    }

    /// Why a disk has to be scanned, as far as is known.
    fn necessary_now(&self, name: &str, status: Option<&MachineStatus>) -> Option<Reason> {
        match status.and_then(|status| Some((find_disk(status, name).ok()?, status))) {
            Some((served, status)) => self.journal_fails(served, status),
            None => self.base_disk(name).is_none().then_some(Reason::FirstCopy),
        }
    }

    /// Keeps marks and scans durably, then goes by them.
    pub(super) fn change_scan(&mut self, scan: ScanState) -> Result<()> {
        if scan != self.scan {
            self.state.save_scan(&scan)?;
            self.scan = scan;
        }
        self.show_known_scans();
        Ok(())
    }

    /// Marks the disks of which too much waits to be shipped.
    pub(super) fn watch_shares(&mut self) -> std::result::Result<(), Trouble> {
        let Some(link) = &mut self.link else {
            return Ok(());
        };
        let status = link.client.epochs().at(Part::Tracker)?;
        let share_percent = self.config.resync_share_percent;
        let mut scan = self.scan.clone();
        let mut waiting = Vec::new();
        for disk in &self.disks {
            let name = &disk.config.name;
            let served = find_disk(&status, name).at(Part::Tracker)?;
            let spooled = self.spool.bytes_of(name).at(Part::Spool)?;
            let base_bytes = self.base_disk(name).map_or(0, |base| base.size_bytes);
            let waiting_bytes = changed_bytes(served, base_bytes).saturating_add(spooled);
            waiting.push(waiting_bytes);
            if !exceeds_share(waiting_bytes, served.size_bytes, share_percent) {
                scan.forgive(name);
                continue;
            }
            // Without a recovery point, and during a scan, all of it is looked at anyway. One that
            // was cancelled is left alone.
            if scan.disk(name).is_none() && self.base_disk(name).is_some() {
                let reason = Reason::Share {
                    waiting_bytes,
                    share_percent,
                };
                tracing::warn!("Disk {name} is marked for resynchronization: {reason}");
                scan.mark(name, reason);
            }
        }
        self.board.update(|status| {
            for (disk, bytes) in status.disks.iter_mut().zip(waiting) {
                disk.waiting_bytes = bytes;
            }
        });
        self.change_scan(scan).at(Part::Spool)
    }

    /// Begins the scans of marked disks that can get anywhere.
    pub(super) fn begin_marked(&mut self) -> std::result::Result<(), Trouble> {
        let requested = self.scan.has_marked(false) && self.vault_takes_data()?;
        if !self.scan.has_marked(false) && std::mem::take(&mut self.probe.failed) {
            self.board.note(Part::Vault, None);
        }
        if !requested && !self.scan.has_marked(true) {
            return Ok(());
        }
        let Some(mut link) = self.link.take() else {
            return Ok(());
        };
        let status = link.client.epochs().at(Part::Tracker)?;
        self.link = Some(self.settle_scan(link, &status, requested)?);
        Ok(())
    }

    /// Whether the vault has taken all recovery points, and answers.
    fn vault_takes_data(&mut self) -> std::result::Result<bool, Trouble> {
        let now = Instant::now();
        let waits = if self.probe.failed {
            now < self.probe.next
        } else {
            // Segments of a scan before this one may wait as well.
            self.is_vault_away()
        };
        if waits || !self.unreleased.is_empty() {
            return Ok(false);
        }
        let (machine, held) = (&self.config.machine, self.machine.generation);
        match generation::check(&self.vault, machine, held) {
            Ok(()) => {
                if std::mem::take(&mut self.probe.failed) {
                    self.board.note(Part::Vault, None);
                }
                Ok(true)
            }
            Err(error) if error.is_recoverable() => {
                self.probe.failed = true;
                self.probe.next = now + WATCH_INTERVAL;
                self.board.note(Part::Vault, Some(&error));
                Ok(false)
            }
            result => result.map(|()| false).at(Part::Vault),
        }
    }

    /// Whether new recovery points would only delay a scan: it waits for those that the vault is
    /// taking.
    pub(super) fn is_draining(&self) -> bool {
        self.scan.has_marked(false) && !self.unreleased.is_empty() && !self.is_vault_away()
    }

    fn is_vault_away(&self) -> bool {
        self.board.status().problems.contains_key(&Part::Vault)
    }
}

/// What has changed on a disk and is in no sealed epoch. What the tracker says is not trusted to fit.
///
/// A disk that has grown since its newest recovery point counts as changed behind its old end. That
/// part is left out: the vault has nothing to compare it with.
fn changed_bytes(served: &DiskStatus, base_bytes: u64) -> u64 {
    let changed = served
        .open_dirty_blocks
        .saturating_add(served.closed_dirty_blocks)
        .saturating_mul(BLOCK_SIZE);
    changed.saturating_sub(served.size_bytes.saturating_sub(base_bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_disk_has_grown_by_does_not_count() {
        let served = |open: u64, closed: u64, blocks: u64| DiskStatus {
            open_dirty_blocks: open,
            closed_dirty_blocks: closed,
            size_bytes: blocks * BLOCK_SIZE,
            ..DiskStatus::default()
        };
        let changed = |served: &DiskStatus| changed_bytes(served, 10 * BLOCK_SIZE) / BLOCK_SIZE;
        assert_eq!(changed(&served(3, 4, 10)), 7);
        assert_eq!(changed(&served(23, 4, 30)), 7);
        assert_eq!(changed(&served(3, 4, 30)), 0);
        assert_eq!(changed(&served(3, 0, 5)), 3);
        let all = served(u64::MAX, 1, 10);
        assert_eq!(changed_bytes(&all, 0), u64::MAX - 10 * BLOCK_SIZE);
    }
}
