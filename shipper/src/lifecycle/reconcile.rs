//! Agreement about how far everything is, after any crash of anybody.
//!
//! At the start, what is on our side ([`Conductor::load`]):
//!
//! | found | done |
//! |---|---|
//! | sealed epochs that follow each other and are whole | queued for upload |
//! | one that was published, and that retention has removed since | released |
//! | the newest recovery point is set aside | its manifest without lost segments is the base, or an older one where it cannot be read |
//! | one that is damaged, names a lost segment, lacks a segment, follows none, is of another generation, or whose number is taken | it and all after it are removed |
//! | a point of our generation in the vault that was never published from here | fenced: this folder is an old copy, or a copy of it is at work |
//! | a scan that a sealed or published epoch has taken over | ended; a mark stays |
//! | a scan that lacks a segment, or of another generation | begun anew; its fingerprints are forgotten |
//! | a scan that was cancelled | its segments are for the next recovery point |
//! | a scan or mark of a disk that is not in the configuration | ended |
//!
//! With a tracker, every time one is found ([`Conductor::connect`]):
//!
//! | the tracker says | done |
//! |---|---|
//! | closed E, and E is sealed here | it is told so |
//! | closed E, and E is not sealed here | given up; its changes are in the open epoch |
//! | sealed E, and nothing at or after E is sealed or published here | the spool is lost: it takes the changes back |
//! | another journal than the base's or one that is older, committed more than the base, every block changed after the base | every block of the disk is scanned |
//! | the base lacks lost segments of a disk | every block of it is scanned |
//! | every block changed after the scan began | the scan begins anew |
//! | a disk is larger than the base's or the scan's | nothing: its journal calls what is new changed |
//! | a disk is smaller | every block of it is scanned |
//! | none of this, and a disk is marked (`resync`) | its scan waits until it can get anywhere |
//!
//! A sealed epoch is a recovery point of its own and is uploaded whatever the tracker remembers of it:
//! what the tracker forgot it calls changed, which is more than needed and never less.

use std::path::PathBuf;
use std::time::Instant;

use tracker::control::client::ControlClient;
use tracker::control::protocol::CaptureOutcome;
use tracker::epoch::{DiskStatus, MachineStatus};
use tracker::extent::{Epoch, blocks_of};
use tracker::journal::reader::JournalReader;

use super::conductor::{At, Conductor, Link, Trouble};
use super::progress::{DiskScan, Stage};
use super::reason::Reason;
use crate::error::{Error, ErrorKind, Result};
use crate::segment::reader::{read_directory, read_directory_file};
use crate::segment::reference::SegmentRef;
use crate::spool::segment_file;
use crate::spool::table::Table;
use crate::status::Part;
use crate::upload::Job;
use crate::vault::aside::Foundation;
use crate::vault::manifest::{DiskPoint, Manifest};

/// Cuts that are tried until the open epoch is above everything.
const CUTS_MAX: u32 = 8;

impl Conductor {
    /// Finds out what is sealed and how far a scan is, and queues what waits for upload. The number `taken`, and
    /// those after it, are given up.
    pub(super) fn load(&mut self, taken: Option<Epoch>) -> Result<()> {
        let mut found = Foundation::find(&self.vault, &self.config.machine)?;
        let mut base = found.base.take();
        self.check_is_known(base.as_ref())?;
        self.raise_floor(found.highest)?;
        self.lacking = std::mem::take(&mut found.lacking);
        let mut broken = false;
        for epoch in self.spool.epochs()? {
            if self.is_removed(epoch)? && !broken {
                // Its fingerprints may not be durable: it is released like any other.
                self.unreleased.push_back((epoch, true));
                continue;
            }
            broken |= taken.is_some_and(|taken| epoch >= taken);
            let manifest = match self.spool_manifest(epoch) {
                Ok((manifest, _))
                    if !broken
                        && !found.spoils(&manifest)
                        && self.follows(&manifest, base.as_ref())? =>
                {
                    manifest
                }
                result => {
                    broken = true;
                    let why = result
                        .err()
                        .map_or(String::new(), |error| format!(": {}", error.chain()));
                    tracing::warn!(
                        "Epoch {epoch} of the spool cannot be used; its changes will be captured anew{why}"
                    );
                    self.spool.remove(epoch)?;
                    continue;
                }
            };
            self.queue_epoch(epoch);
            if base.as_ref().is_none_or(|base| base.epoch < manifest.epoch) {
                base = Some(manifest);
                // It was made when what is lost had been shipped again.
                self.lacking.clear();
            }
        }
        self.base = base;
        self.load_scan(broken)?;
        let newest = self.base.as_ref().map(|base| base.epoch);
        self.board.update(|status| status.newest_point = newest);
        self.remove_orphans()
    }

    /// The manifest of a sealed epoch, and its bytes.
    fn spool_manifest(&self, epoch: Epoch) -> Result<(Manifest, Vec<u8>)> {
        let id = self.vault.point_id(&self.config.machine, epoch);
        self.spool.manifest(&id, self.vault.keys())
    }

    /// Whether a sealed epoch can be uploaded after `base`, and is whole.
    fn follows(&self, manifest: &Manifest, base: Option<&Manifest>) -> Result<bool> {
        let present = base.map_or(Epoch::ZERO, |base| base.epoch);
        if manifest.generation != self.machine.generation {
            return Ok(false);
        }
        if manifest.epoch <= present {
            // Published, and the shipper died before it was released.
            let key = self
                .vault
                .manifest_key(&self.config.machine, manifest.epoch);
            return Ok(self.vault.store().size(&key)?.is_some());
        }
        if manifest.previous != present {
            return Ok(false);
        }
        let fresh = |segment: &&SegmentRef| segment.name.0.last_epoch > manifest.previous;
        for disk in &manifest.disks {
            for segment in disk.segments.iter().filter(fresh) {
                if !self.has_segment(&disk.name, segment)? {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    /// The file of a segment, of a sealed epoch or of a scan, if it is here and whole.
    fn local_segment(&self, disk: &str, segment: &SegmentRef) -> Option<PathBuf> {
        let epoch = segment.name.0.last_epoch;
        let name = segment_file(disk, &segment.name.0);
        [
            self.spool.folder(epoch).join(&name),
            self.state.copy().join(&name),
        ]
        .into_iter()
        .find(|path| {
            path.metadata()
                .is_ok_and(|metadata| metadata.len() == segment.bytes)
        })
    }

    /// Whether a segment is here or in the vault.
    fn has_segment(&self, disk: &str, segment: &SegmentRef) -> Result<bool> {
        if self.local_segment(disk, segment).is_some() {
            return Ok(true);
        }
        let key = self.vault.segment_key(&self.config.machine, disk, segment);
        Ok(self.vault.store().size(&key)? == Some(segment.bytes))
    }

    /// Finds out how far scans are. If an epoch of the spool was removed, fingerprints of it may be among
    /// those that a later scan vouches for, and the scans have skipped blocks by them.
    fn load_scan(&mut self, epoch_was_removed: bool) -> Result<()> {
        let found = self.state.scan()?;
        let mut scan = found.clone();
        let newest = self.base.as_ref().map_or(Epoch::ZERO, |base| base.epoch);
        scan.take_over(newest);
        scan.disks.retain(|disk| {
            self.disks
                .iter()
                .any(|known| known.config.name == disk.name)
        });
        for disk in &mut scan.disks {
            if epoch_was_removed || !self.scan_is_whole(disk)? {
                disk.lose_segments(newest);
            }
            for segment in &disk.segments {
                let (disk, segment) = (disk.name.clone(), segment.clone());
                self.uploader.queue(Job::Copied { disk, segment });
            }
        }
        if scan != found {
            self.state.save_scan(&scan)?;
        }
        self.scan = scan;
        self.show_known_scans();
        Ok(())
    }

    fn scan_is_whole(&self, disk: &DiskScan) -> Result<bool> {
        let fits = self.disks.iter().any(|known| {
            known.config.name == disk.name && blocks_of(known.source.size_bytes()) >= disk.blocks
        });
        for segment in &disk.segments {
            let ours = segment.name.0.generation == self.machine.generation;
            if !fits || !ours || !self.has_segment(&disk.name, segment)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Removes files of scans that nothing names any more.
    fn remove_orphans(&self) -> Result<()> {
        let folder = self.state.copy();
        let mut named = Vec::new();
        for disk in &self.scan.disks {
            named.extend(
                disk.segments
                    .iter()
                    .map(|s| segment_file(&disk.name, &s.name.0)),
            );
        }
        for disk in self.base.iter().flat_map(|base| &base.disks) {
            named.extend(
                disk.segments
                    .iter()
                    .map(|s| segment_file(&disk.name, &s.name.0)),
            );
        }
        let failed = |error| Error::io(format!("Cannot read folder {}", folder.display()), error);
        for entry in std::fs::read_dir(&folder).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            if !named.iter().any(|name| entry.file_name() == name.as_str()) {
                crate::spool::files::remove_if_present(&entry.path())?;
            }
        }
        Ok(())
    }

    /// Opens the fingerprint tables unless they are open, and applies what may be missing in them.
    pub(super) fn open_tables(&mut self) -> Result<()> {
        if self.tables.is_some() {
            return Ok(());
        }
        // Everything up to the recovery point before the oldest unreleased one was synced.
        let synced = match self.unreleased.front() {
            Some(&(epoch, _)) => self.spool_manifest(epoch)?.0.previous,
            None => self.base.as_ref().map_or(Epoch::ZERO, |base| base.epoch),
        };
        let mut tables = Vec::new();
        for disk in &self.disks {
            let name = &disk.config.name;
            let path = self.state.table(name);
            let (owner, size) = (disk.owner.check, disk.source.size_bytes());
            let base = self.base.as_ref().map(|base| base.epoch);
            let scan = self.scan.disk(name);
            let trusted = base.max(scan.map(|scan| scan.epoch));
            let (mut table, anew) = Table::open(&path, owner, size, trusted.unwrap_or_default())?;
            let base = self.base_disk(name);
            let chain = base.into_iter().flat_map(|disk| &disk.segments);
            for segment in chain.chain(scan.into_iter().flat_map(|disk| &disk.segments)) {
                if anew || segment.name.0.last_epoch > synced {
                    self.replay(&mut table, name, segment)?;
                }
            }
            table.sync()?;
            tables.push(table);
        }
        self.tables = Some(tables);
        Ok(())
    }

    fn replay(&self, table: &mut Table, disk: &str, segment: &SegmentRef) -> Result<()> {
        let owner = self.vault.owner(&self.config.machine, disk);
        let directory = match self.local_segment(disk, segment) {
            Some(path) => read_directory_file(&path, segment, &owner)?,
            None => {
                let key = self.vault.segment_key(&self.config.machine, disk, segment);
                read_directory(self.vault.store(), &key, segment, &owner)?
            }
        };
        table.apply(segment.name.0.last_epoch, &directory)
    }

    /// Finds the tracker, unless it is known, and agrees with it about epochs.
    pub(super) fn connect(&mut self) -> std::result::Result<(), Trouble> {
        if self.link.is_some() {
            return Ok(());
        }
        let mut client = ControlClient::connect(&self.config.tracker).at(Part::Tracker)?;
        let mut status = client.epochs().at(Part::Tracker)?;
        self.take_sizes(&status).at(Part::Tracker)?;
        let readers = self.readers(&status).at(Part::Tracker)?;
        if let Some(epoch) = status.closed {
            let sealed = self.unreleased.iter().any(|(sealed, _)| *sealed == epoch)
                && self.journals_are_the_bases(&status);
            let outcome = if sealed {
                CaptureOutcome::Sealed
            } else {
                CaptureOutcome::Abandoned
            };
            if !sealed {
                // What was captured of it is lost. Its blocks are captured with the next point, which is made now.
                self.due = Instant::now();
            }
            client.capture_end(epoch, outcome).at(Part::Tracker)?;
            self.spool.discard(epoch).at(Part::Spool)?;
            status = client.epochs().at(Part::Tracker)?;
        }
        let newest = self.base.as_ref().map_or(Epoch::ZERO, |base| base.epoch);
        if status.sealed > status.committed && status.sealed > newest {
            tracing::warn!(
                "Epoch {} is not in the spool any more: its changes are captured anew",
                status.sealed
            );
            client.revert().at(Part::Tracker)?;
        }
        let link = self.settle_scan(Link { client, readers }, &status, false)?;
        self.link = Some(link);
        Ok(())
    }

    /// Checks that our disks are those that the tracker serves, and takes over how large they are, in
    /// all that depends on it.
    pub(super) fn take_sizes(&mut self, status: &MachineStatus) -> Result<()> {
        for (index, disk) in self.disks.iter_mut().enumerate() {
            let served = find_disk(status, &disk.config.name)?;
            let size_bytes = served.size_bytes;
            disk.preserve_file = served.preserve_file.clone();
            check_disk(disk.source.present_bytes()?, &disk.config.path, served)?;
            if disk.source.size_bytes() == size_bytes {
                continue;
            }
            disk.source.set_size(size_bytes);
            if let Some(table) = self
                .tables
                .as_mut()
                .and_then(|tables| tables.get_mut(index))
            {
                table.grow(size_bytes)?;
            }
            tracing::info!("Disk {} has {size_bytes} bytes", disk.config.name);
            self.board.update(|status| {
                if let Some(shown) = status.disks.get_mut(index) {
                    shown.size_bytes = size_bytes;
                    shown.blocks = blocks_of(size_bytes);
                }
            });
        }
        Ok(())
    }

    /// The journals of the disks, in their order, compared with what the tracker says.
    fn readers(&self, status: &MachineStatus) -> Result<Vec<JournalReader>> {
        let mut readers = Vec::new();
        for disk in &self.disks {
            let name = &disk.config.name;
            let served = find_disk(status, name)?;
            let path = disk.config.journal.as_ref().unwrap_or(&served.journal);
            let reader = JournalReader::open(path)?;
            if reader.journal_id() != served.journal_id {
                return Err(Error::new(
                    ErrorKind::Mismatch,
                    format!(
                        "Journal {} is not the one that the tracker keeps for disk {name}: correct `journal` \
                         in the configuration",
                        path.display()
                    ),
                ));
            }
            readers.push(reader);
        }
        Ok(readers)
    }

    pub(super) fn base_disk(&self, name: &str) -> Option<&DiskPoint> {
        self.base.as_ref().and_then(|base| base.disk(name))
    }

    fn journals_are_the_bases(&self, status: &MachineStatus) -> bool {
        self.disks.iter().all(|disk| {
            let name = &disk.config.name;
            let served = find_disk(status, name).ok();
            match (self.base_disk(name), served) {
                (Some(base), Some(served)) => base.journal == served.journal_id,
                _ => false,
            }
        })
    }

    /// Why the journal of a disk does not tell everything that has changed since the base; `None` if
    /// it does. That a disk has grown since then is among what it tells: the base's size was asked for
    /// after its cut, so the growth belongs to a later epoch, in which what is new is recorded as changed.
    pub(super) fn journal_fails(
        &self,
        served: &DiskStatus,
        status: &MachineStatus,
    ) -> Option<Reason> {
        let base = self.base.as_ref().map(|base| base.epoch);
        let (Some(base), Some(disk)) = (base, self.base_disk(&served.name)) else {
            return Some(Reason::FirstCopy);
        };
        let fails = [
            (self.lacking.contains(&served.name), Reason::Lost),
            (disk.journal != served.journal_id, Reason::OtherJournal),
            (disk.size_bytes > served.size_bytes, Reason::Smaller),
            (status.committed > base, Reason::PointLost),
            // It was cut from this journal, which then opened a later one and has come back older.
            (status.open <= base, Reason::WentBack),
            (
                served.resync.is_some_and(|resync| resync > base),
                Reason::EveryBlock,
            ),
        ];
        let failing = fails.into_iter().find(|(fails, _)| *fails);
        failing.map(|(_, reason)| reason)
    }

    /// Whether a scan still counts for a disk.
    fn scan_counts(scan: &DiskScan, served: &DiskStatus) -> bool {
        scan.journal == served.journal_id
            && scan.blocks <= blocks_of(served.size_bytes)
            && served.resync.is_none_or(|resync| resync <= scan.epoch)
    }

    /// Why a scan of a disk is to begin now, if it is.
    fn scan_wanted(
        &self,
        served: &DiskStatus,
        status: &MachineStatus,
        requested: bool,
    ) -> Option<Reason> {
        let fails = self.journal_fails(served, status);
        match self.scan.disk(&served.name) {
            Some(scan) if scan.stage == Stage::Running => {
                let begins_anew = !Self::scan_counts(scan, served);
                begins_anew.then(|| fails.unwrap_or(scan.reason))
            }
            Some(scan) if scan.stage == Stage::Marked => {
                let begins = requested || scan.reason.is_necessary();
                fails.or(begins.then_some(scan.reason))
            }
            _ => fails,
        }
    }

    /// Begins the scans that are needed and not under way, and with `requested` those that were asked
    /// for.
    pub(super) fn settle_scan(
        &mut self,
        mut link: Link,
        status: &MachineStatus,
        requested: bool,
    ) -> std::result::Result<Link, Trouble> {
        let mut wanted = Vec::new();
        for disk in &self.disks {
            let served = find_disk(status, &disk.config.name).at(Part::Tracker)?;
            if let Some(reason) = self.scan_wanted(served, status, requested) {
                wanted.push((served.name.clone(), reason));
            }
        }
        if wanted.is_empty() {
            self.show_scan();
            return Ok(link);
        }
        let (epoch, status) = self.open_above(&mut link)?;
        self.take_sizes(&status).at(Part::Tracker)?;
        self.begin_scan(epoch, &wanted, &status).at(Part::Spool)?;
        self.show_scan();
        Ok(link)
    }

    /// Cuts and gives up until an epoch above everything is open, so that whatever is lost from here
    /// on shows as a later one. Returns the epoch before it.
    fn open_above(&self, link: &mut Link) -> std::result::Result<(Epoch, MachineStatus), Trouble> {
        let highest = self.highest();
        for _ in 0..CUTS_MAX {
            let closed = link.client.cut(highest.next()).at(Part::Tracker)?;
            link.client
                .capture_end(closed, CaptureOutcome::Abandoned)
                .at(Part::Tracker)?;
            let status = link.client.epochs().at(Part::Tracker)?;
            let settled = status
                .disks
                .iter()
                .all(|disk| disk.resync.is_none_or(|resync| resync <= closed));
            if closed > highest && settled {
                return Ok((closed, status));
            }
        }
        let what =
            "The tracker's ring overflows faster than a scan can begin: give it a larger ring";
        Err(Trouble {
            part: Part::Tracker,
            error: Error::new(ErrorKind::Unavailable, what),
        })
    }

    /// Scans of these disks from their beginning.
    fn begin_scan(
        &mut self,
        epoch: Epoch,
        wanted: &[(String, Reason)],
        status: &MachineStatus,
    ) -> Result<()> {
        let mut scan = self.scan.clone();
        for (name, reason) in wanted {
            let served = find_disk(status, name)?;
            scan.begin(DiskScan {
                name: name.clone(),
                reason: *reason,
                stage: Stage::Running,
                epoch,
                journal: served.journal_id.clone(),
                cursor: 0,
                blocks: blocks_of(served.size_bytes),
                segments: Vec::new(),
            });
            tracing::info!("Every block of disk {name} is looked at: {reason}");
        }
        self.change_scan(scan)
    }
}

/// The tracker's word on a disk.
///
/// # Errors
///
/// It serves no disk of this name.
pub(super) fn find_disk<'a>(status: &'a MachineStatus, name: &str) -> Result<&'a DiskStatus> {
    status
        .disks
        .iter()
        .find(|disk| disk.name == name)
        .ok_or_else(|| {
            let served: Vec<&str> = status.disks.iter().map(|disk| disk.name.as_str()).collect();
            let what = match served.is_empty() {
                true => "it tracks none: start it without --no-journal and --read-only".to_owned(),
                false => format!("it serves {}", served.join(", ")),
            };
            Error::new(
                ErrorKind::Mismatch,
                format!("The tracker serves no disk {name:?}: {what}"),
            )
        })
}

/// Whether the disk that we read is the one that the tracker serves, all of it.
pub(super) fn check_disk(
    size_bytes: u64,
    path: &std::path::Path,
    served: &DiskStatus,
) -> Result<()> {
    let canonical = |path: &std::path::Path| std::fs::canonicalize(path).ok();
    let same = canonical(path).is_some() && canonical(path) == canonical(&served.image);
    if same && size_bytes >= served.size_bytes {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Mismatch,
        format!(
            "Disk {} is {} of {size_bytes} bytes in the configuration, the tracker serves {} of {} bytes",
            served.name,
            path.display(),
            served.image.display(),
            served.size_bytes
        ),
    ))
}
