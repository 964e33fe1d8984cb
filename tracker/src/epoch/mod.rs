//! The epochs of a machine over the journals of its disks.
//!
//! Overview: `admit` stamps a write, records it and is wait-free; it is called by the workers.
//! Everything else moves watermarks and is called by the control socket, one at a time.
//!
//! Order of an admission: the stamp; the ring record, unless the filter says that every block has
//! one in this epoch; the filter's bits. The bits come after the record, so that another worker
//! that trusts a bit finds the record in the mapping.
//!
//! Why the filter may be trusted: it belongs to one epoch and starts empty, or with what is recorded in that
//! epoch, so a set bit stands for a record of this epoch or a later one. Records leave only by a commit at
//! or above their epoch, or into a checkpoint that counts for their epoch. Giving up a closed
//! epoch, or losing the spool, only moves watermarks down: records of the open set stay in it.
//!
//! Order of a cut: alarms that will be captured with the old epoch become its own; the clock moves
//! for all disks at once; the writes of the old epoch complete; the watermark of each journal is
//! published and synced. A crash before the last one leaves an epoch that is not closed everywhere,
//! which recovery merges into the open one. What is to be done on all disks is tried on all, also
//! where it fails on one, so that only a crash leaves them apart.
//!
//! Order of a growth: no epoch is cut meanwhile, so what is new belongs to the epoch that is open.
//! The filters get room, the journal gets the record and the size (`journal::growth`), and only then
//! may clients see the size.
//!
//! What it does not handle: the blocks' content. A closed epoch's blocks that are written again are
//! not preserved.

mod clock;

mod filter;

mod keeping;

mod rates;

#[cfg(test)]
mod power_cut_tests;
#[cfg(test)]
mod simulation_tests;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind, Result};
use crate::extent::{Epoch, Extent, blocks_of};
use crate::failpoint::{Place, reached};
use crate::journal::state::{EpochState, reconcile};
use crate::journal::{self, Journal, JournalOptions, Marked, Moment, RecoveryReport};
use clock::Clock;
use filter::Filter;
use rates::{Rates, Sample};

pub use crate::journal::format::Operation;
pub use crate::journal::{Era, Waiter};
pub use keeping::Keepers;

/// A disk and its journal.
#[derive(Clone, Debug)]
pub struct DiskSpec {
    /// Name of the export.
    pub name: String,
    /// Path of the disk.
    pub image: PathBuf,
    /// Path of its journal.
    pub journal: PathBuf,
    /// Size in bytes when it is opened.
    pub size_bytes: u64,
    /// What tells it from other disks.
    pub identity: [u8; 16],
    /// Its times when it is opened; `None` where they mean nothing.
    pub seen: Option<Moment>,
}

/// How a machine is opened.
#[derive(Clone, Debug)]
pub struct MachineOptions {
    /// Number of workers; each calls with its own number below it.
    pub workers: usize,
    /// Size of a new ring in bytes.
    pub ring_bytes: u64,
    /// Regions of 1 MiB that can be armed at once.
    pub intent_regions: u32,
    /// Set existing journals aside.
    pub rebuild: bool,
    /// Keep journals; without them nothing can be cut.
    pub tracking: bool,
}

/// The epochs of a machine as its control socket shows them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineStatus {
    /// New writes are stamped with it.
    pub open: Epoch,
    /// It is being captured.
    pub closed: Option<Epoch>,
    /// The highest epoch that is complete in the spool.
    pub sealed: Epoch,
    /// The highest epoch that is a recovery point.
    pub committed: Epoch,
    /// Times that changes of an earlier epoch became those of the open one, since the tracker started.
    #[serde(default)]
    pub epochs_merged: u64,
    /// The disks.
    pub disks: Vec<DiskStatus>,
}

/// One disk as the control socket shows it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskStatus {
    /// Name of the export.
    pub name: String,
    /// Path of the disk.
    pub image: PathBuf,
    /// Path of its journal.
    pub journal: PathBuf,
    /// Random number of the journal: 32 hexadecimal digits.
    pub journal_id: String,
    /// Size in bytes.
    pub size_bytes: u64,
    /// Every block counts as changed as of this epoch.
    pub resync: Option<Epoch>,
    /// Blocks recorded in the open epoch, not in earlier ones that it has taken over.
    pub open_dirty_blocks: u64,
    /// Blocks recorded in the closed epoch.
    pub closed_dirty_blocks: u64,
    /// Records that the ring takes.
    pub ring_capacity_records: u64,
    /// Records in the ring.
    pub ring_used_records: u64,
    /// Records in the ring in percent of those that it takes.
    #[serde(default)]
    pub ring_fill_percent: u64,
    /// Records written in a second, over the last ten.
    #[serde(default)]
    pub records_per_second: u64,
    /// Records folded in a second, over the last ten.
    #[serde(default)]
    pub folded_per_second: u64,
    /// The ring is full: changes are kept by coarse units until it has room again.
    #[serde(default)]
    pub ring_overflowing: bool,
    /// Changes kept by coarse units, since the tracker started.
    #[serde(default)]
    pub coarse_changes: u64,
    /// Coarse units that count as changed.
    #[serde(default)]
    pub coarse_units: u64,
    /// Seconds until the ring is full at this rate, if nothing is folded or committed meanwhile.
    pub ring_full_in_seconds: Option<u64>,
    /// Checkpoint sets in use, of two.
    pub checkpoint_sets: u64,
    /// Records written since the tracker started.
    pub records_written: u64,
    /// Writes that needed no record, since the tracker started.
    pub records_elided: u64,
    /// Times that records were folded, since the tracker started.
    pub folds: u64,
    /// Times that the ring was synced in the background, since the tracker started.
    #[serde(default)]
    pub ring_syncs: u64,
    /// Times that another file took the place of the journal because a sync of it had failed, since the
    /// tracker started.
    #[serde(default)]
    pub journal_replacements: u64,
    /// Regions of 1 MiB that can be armed at once: so many MiB are compared after a power cut, at most.
    #[serde(default)]
    pub intent_regions_max: u64,
    /// Regions that are armed.
    #[serde(default)]
    pub intent_regions: u64,
    /// Transactions of the intent log, since the tracker started.
    #[serde(default)]
    pub intent_commits: u64,
    /// Writes that waited for their regions to be armed, since the tracker started.
    #[serde(default)]
    pub intent_waits: u64,
    /// Regions that made room for others, since the tracker started.
    #[serde(default)]
    pub intent_evictions: u64,
    /// The journal cannot be written durably: a power cut would lose track of what changed.
    #[serde(default)]
    pub power_cut_unsafe: bool,
    /// How the disk was changed, or may have been, while no tracker served it, as this one found when
    /// it started.
    pub unserved_change: Option<String>,
}

/// A write that was stamped and recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Admission {
    /// Its stamp.
    pub epoch: Epoch,
    /// It has to wait for its regions: the era in which its record stood in the ring.
    pub waits: Option<Era>,
}

/// One tracked disk.
struct TrackedDisk {
    spec: DiskSpec,
    /// Size in bytes at present.
    size_bytes: AtomicU64,
    journal: Journal,
    /// Filters of even and odd epochs.
    filters: [Filter; 2],
    elided: AtomicU64,
    unserved_change: Option<String>,
    started: Instant,
    rates: Mutex<Rates>,
}

impl TrackedDisk {
    /// The counters of the ring at this moment, and what was kept of them.
    fn sample(&self) -> (Sample, MutexGuard<'_, Rates>) {
        let sample = Sample {
            at: self.started.elapsed(),
            written: self.journal.records_written(),
            folded: self.journal.records_folded(),
        };
        let rates = self.rates.lock().unwrap_or_else(PoisonError::into_inner);
        (sample, rates)
    }

    /// Takes over what the journal knows of the open epoch. What belongs to the open set from earlier ones is
    /// recorded once more when it changes: whoever has looked at every block since such an epoch asks for
    /// later ones alone.
    fn remember(&self, open: Epoch) -> Result<()> {
        let filter = &self.filters[(open.0 & 1) as usize];
        self.journal
            .each_extent_after(Epoch(open.0.saturating_sub(1)), |extent| {
                filter.insert(extent)
            })
    }

    fn note(&self, epoch: Epoch, extent: Extent, operation: Operation) -> Marked {
        self.journal.stir();
        let file = self.journal.file_number();
        let filter = &self.filters[(epoch.0 & 1) as usize];
        if filter.contains(extent) {
            self.elided.fetch_add(1, Ordering::Relaxed);
        } else {
            self.journal.record(epoch, extent, operation);
            filter.insert(extent);
        }
        reached(Place::AdmitAfterRecordBeforeMark);
        let marked = self.journal.mark(extent);
        if self.journal.file_number() == file {
            return marked;
        }
        // The sync that failed may have cost the record before the mark could tell of it.
        self.journal.record(epoch, extent, operation);
        self.journal.mark(extent)
    }
}

/// The disks of one machine. Shared by workers and the control socket.
pub struct Machine {
    clock: Clock,
    disks: Vec<TrackedDisk>,
    /// Held while watermarks move.
    moving: Mutex<()>,
    merged: AtomicU64,
}

impl Machine {
    /// Opens or makes the journals of all disks, and brings them to one state.
    ///
    /// # Errors
    ///
    /// A journal is in use or must not be trusted; see [`journal::open`].
    pub fn open(
        specs: Vec<DiskSpec>,
        options: &MachineOptions,
    ) -> Result<(Self, Vec<RecoveryReport>)> {
        let mut disks = Vec::new();
        let mut reports = Vec::new();
        for spec in specs.into_iter().filter(|_| options.tracking) {
            let (journal, report) = journal::open(
                &spec.journal,
                &JournalOptions {
                    disk_identity: spec.identity,
                    disk_size_bytes: spec.size_bytes,
                    ring_bytes: options.ring_bytes,
                    intent_regions: options.intent_regions,
                    rebuild: options.rebuild,
                    seen: spec.seen,
                },
            )?;
            let blocks = blocks_of(spec.size_bytes);
            let filters = [Filter::new(blocks)?, Filter::new(blocks)?];
            disks.push(TrackedDisk {
                size_bytes: spec.size_bytes.into(),
                spec,
                journal,
                filters,
                elided: AtomicU64::new(0),
                started: Instant::now(),
                rates: Mutex::default(),
                unserved_change: report.suspicion.map(|suspicion| suspicion.to_string()),
            });
            reports.push(report);
        }
        let mut states: Vec<EpochState> =
            disks.iter().map(|disk| disk.journal.watermarks()).collect();
        reconcile(&mut states);
        for (disk, state) in disks.iter().zip(&states) {
            disk.journal.update(|present| *present = *state)?;
        }
        let open = states.first().map_or(Epoch(1), |state| state.open);
        for disk in &disks {
            disk.remember(open)?;
        }
        let clock = Clock::new(open, options.workers);
        Ok((
            Self {
                clock,
                disks,
                moving: Mutex::new(()),
                merged: AtomicU64::new(0),
            },
            reports,
        ))
    }

    /// Stamps and records a write before its data is submitted. Wait-free, no allocation. Every
    /// call is followed by [`Self::complete`] with the epoch returned. If the admission says that the
    /// write has to wait, [`Self::await_regions`] comes before its data.
    pub fn admit(
        &self,
        worker: usize,
        disk: usize,
        extent: Extent,
        operation: Operation,
    ) -> Admission {
        let epoch = self.clock.enter(worker);
        let marked = self
            .disks
            .get(disk)
            .map(|disk| disk.note(epoch, extent, operation));
        Admission {
            epoch,
            waits: marked
                .filter(|marked| !marked.armed)
                .map(|marked| marked.era),
        }
    }

    /// Leaves a write that has to wait for its regions. The waiter is woken once, with this token, and
    /// then asks [`Self::may_write`].
    pub fn await_regions(
        &self,
        disk: usize,
        extent: Extent,
        era: Era,
        waiter: &Arc<dyn Waiter>,
        token: usize,
    ) {
        if let Some(disk) = self.disks.get(disk) {
            disk.journal.await_regions(extent, era, waiter, token);
        }
    }

    /// Whether the data of a write that had to wait may go to the disk.
    pub fn may_write(&self, disk: usize, extent: Extent, era: Era) -> bool {
        self.disks
            .get(disk)
            .is_none_or(|disk| disk.journal.may_write(extent, era))
    }

    /// The write that was admitted with this epoch has completed, well or not.
    pub fn complete(&self, worker: usize, epoch: Epoch) {
        self.clock.leave(worker, epoch);
    }

    fn begin(&self) -> Result<MutexGuard<'_, ()>> {
        if self.disks.is_empty() {
            return Err(Error::new(
                ErrorKind::State,
                "Nothing is tracked: the tracker was started with --no-journal or --read-only",
            ));
        }
        Ok(self.moving.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The watermarks of the machine; those of its disks agree but for a moment during a change.
    fn states(&self) -> Vec<EpochState> {
        self.disks.iter().map(|disk| disk.journal.state()).collect()
    }

    fn closed(&self) -> Option<Epoch> {
        self.states().iter().filter_map(|state| state.closed).max()
    }

    fn update(&self, change: impl Fn(&mut EpochState)) -> Result<()> {
        self.on_each(|journal| journal.update(&change))
    }

    /// Does it to every journal, also where it fails for one. Returns the first error.
    fn on_each(&self, work: impl Fn(&Journal) -> Result<()>) -> Result<()> {
        let mut result = Ok(());
        for disk in &self.disks {
            result = result.and(work(&disk.journal));
            reached(Place::MachineAfterDiskBeforeNext);
        }
        result
    }

    /// Closes the open epoch on all disks and returns it, once its writes have completed. The next
    /// epoch is at least `minimum`.
    ///
    /// # Errors
    ///
    /// `State`: an epoch is closed already, or writes do not complete in time (the epoch is then
    /// merged into the next). `Invalid`: no epoch has such a number. `Io`: a superblock cannot be
    /// synced; the epoch is closed all the same.
    pub fn cut(&self, minimum: Epoch, drain_timeout: Duration) -> Result<Epoch> {
        let _moving = self.begin()?;
        if let Some(closed) = self.closed() {
            return Err(Error::new(
                ErrorKind::State,
                format!("Epoch {closed} is closed and not sealed: end its capture first"),
            ));
        }
        let closing = self.clock.open();
        let next = self.clock.next(minimum).ok_or_else(|| {
            Error::new(
                ErrorKind::Invalid,
                format!("No epoch after {closing} can have the number {minimum} or a higher one"),
            )
        })?;
        let stuck = || {
            Error::new(
                ErrorKind::State,
                format!(
                    "Writes of epoch {closing} did not complete in {} s: try again",
                    drain_timeout.as_secs()
                ),
            )
        };
        // A cut that gave up earlier may have left writes of the parity that comes next.
        if !self.clock.drain(next, drain_timeout) {
            return Err(stuck());
        }
        for disk in &self.disks {
            disk.filters[(next.0 & 1) as usize].clear()?;
            disk.journal.gather_alarms(closing, next);
        }
        reached(Place::CutAfterGatherBeforeAdvance);
        self.clock.advance(next);
        reached(Place::CutAfterAdvanceBeforeUpdate);
        if !self.clock.drain(closing, drain_timeout) {
            self.merged.fetch_add(1, Ordering::Relaxed);
            return Err(stuck());
        }
        self.update(|state| {
            state.open = closing;
            state.cut(next);
        })?;
        Ok(closing)
    }

    /// The closed epoch is durable in the spool. May be repeated.
    ///
    /// # Errors
    ///
    /// `State`: this epoch is neither closed nor sealed.
    pub fn seal(&self, epoch: Epoch) -> Result<()> {
        let _moving = self.begin()?;
        let states = self.states();
        if states.iter().all(|state| state.sealed >= epoch) {
            return Ok(());
        }
        if self.closed() != Some(epoch) {
            return Err(self.not_closed(epoch));
        }
        self.update(|state| state.seal(epoch))
    }

    /// The closed epoch is given up: its changes belong to the open one. May be repeated.
    ///
    /// # Errors
    ///
    /// `State`: another epoch is closed, or this one is sealed.
    pub fn abandon(&self, epoch: Epoch) -> Result<()> {
        let _moving = self.begin()?;
        let states = self.states();
        let closed = self.closed();
        if states.iter().any(|state| state.sealed >= epoch) || closed.is_some_and(|c| c != epoch) {
            return Err(self.not_closed(epoch));
        }
        if closed.is_some() {
            self.merged.fetch_add(1, Ordering::Relaxed);
        }
        self.update(|state| state.closed = None)
    }

    fn not_closed(&self, epoch: Epoch) -> Error {
        let closed = self
            .closed()
            .map_or("none is".to_owned(), |closed| format!("{closed} is"));
        Error::new(
            ErrorKind::State,
            format!("Epoch {epoch} is not closed: {closed}"),
        )
    }

    /// The epoch's recovery point is durable in the vault: what is known of it and of all before it
    /// is dropped. May be repeated.
    ///
    /// # Errors
    ///
    /// `State`: the epoch is not sealed.
    pub fn commit(&self, epoch: Epoch) -> Result<()> {
        let _moving = self.begin()?;
        if self.states().iter().any(|state| state.sealed < epoch) {
            return Err(Error::new(
                ErrorKind::State,
                format!("Epoch {epoch} is not sealed and cannot be committed"),
            ));
        }
        self.update(|state| state.commit(epoch))
    }

    /// The spool is lost: what is not committed counts as changed in the open epoch. May be
    /// repeated.
    ///
    /// # Errors
    ///
    /// `Io`: a superblock cannot be synced.
    pub fn revert(&self) -> Result<()> {
        let _moving = self.begin()?;
        let waits = |state: &EpochState| state.closed.is_some() || state.sealed > state.committed;
        if self.states().iter().any(waits) {
            self.merged.fetch_add(1, Ordering::Relaxed);
        }
        self.update(EpochState::revert)
    }

    /// Every block of the disk counts as changed as of the open epoch, from this moment on.
    ///
    /// # Errors
    ///
    /// None at present: the mark is one store to the journal.
    pub fn mark_suspect(&self, disk: usize, reason: &str) -> Result<()> {
        if let Some(disk) = self.disks.get(disk) {
            tracing::warn!(
                "Every block of disk {} counts as changed: {reason}",
                disk.spec.name
            );
            // An epoch that is closed meanwhile may have been captured already.
            loop {
                let open = self.clock.open();
                disk.journal.raise_alarm(open);
                if self.clock.open() == open {
                    break;
                }
            }
        }
        Ok(())
    }

    /// A sync of the disk failed: what it holds is not what was written, nor perhaps what was captured, and
    /// after a power cut nobody knows.
    ///
    /// # Errors
    ///
    /// The journal cannot be written durably; every block counts as changed all the same.
    pub fn note_disk_failure(&self, disk: usize) -> Result<()> {
        self.mark_suspect(disk, "a sync of the disk failed")?;
        self.disks
            .get(disk)
            .map_or(Ok(()), |disk| disk.journal.note_disk_failure())
    }

    /// The disk was looked at a moment ago, and had these times. Called often, and a last time when it
    /// changes no more.
    pub fn keep_time(&self, disk: usize, seen: Moment) {
        if let Some(disk) = self.disks.get(disk) {
            disk.journal.keep_time(seen);
        }
    }

    /// The file of the disk is about to be changed otherwise than by a write that is admitted.
    pub fn stir(&self, disk: usize) {
        if let Some(disk) = self.disks.get(disk) {
            disk.journal.stir();
        }
    }

    /// The disk has grown to so many bytes, durably: tracks what is new, and counts it as changed in
    /// the open epoch. After that its size may be shown to clients. May be repeated.
    ///
    /// # Errors
    ///
    /// `State`: nothing is tracked. `Invalid`: the disk was larger. Otherwise the journal cannot be
    /// made ready.
    pub fn grow(&self, disk: usize, size_bytes: u64) -> Result<()> {
        let _moving = self.begin()?;
        let disk = self.disks.get(disk).ok_or_else(|| {
            Error::new(ErrorKind::Missing, format!("No disk has the number {disk}"))
        })?;
        for filter in &disk.filters {
            filter.reach(blocks_of(size_bytes))?;
        }
        let epoch = self.clock.open();
        disk.journal.grow(size_bytes, epoch)?;
        let before = disk.size_bytes.load(Ordering::Acquire);
        let new = Extent::covering(before, size_bytes - before);
        disk.filters[(epoch.0 & 1) as usize].insert(new);
        disk.size_bytes.store(size_bytes, Ordering::Release);
        Ok(())
    }

    /// Folds the journals whose ring is filling up. Called about ten times a second.
    ///
    /// # Errors
    ///
    /// A checkpoint cannot be written; coverage is kept all the same.
    pub fn maintain(&self) -> Result<()> {
        for disk in &self.disks {
            let (sample, mut rates) = disk.sample();
            rates.take(sample);
        }
        self.on_each(Journal::maintain)
    }

    /// The epochs, disks and journals.
    pub fn status(&self) -> MachineStatus {
        let states = self.states();
        let lowest = |of: fn(&EpochState) -> Epoch| states.iter().map(of).min().unwrap_or_default();
        MachineStatus {
            open: self.clock.open(),
            closed: states.iter().filter_map(|state| state.closed).max(),
            sealed: lowest(|state| state.sealed),
            committed: lowest(|state| state.committed),
            epochs_merged: self.merged.load(Ordering::Relaxed),
            disks: self
                .disks
                .iter()
                .zip(&states)
                .map(|(d, s)| self.disk_status(d, s))
                .collect(),
        }
    }

    fn disk_status(&self, disk: &TrackedDisk, state: &EpochState) -> DiskStatus {
        let open = self.clock.open();
        let count = |epoch: Epoch| disk.filters[(epoch.0 & 1) as usize].count();
        let ring = disk.journal.ring();
        let (capacity, used) = (ring.capacity(), ring.used());
        let (sample, rates) = disk.sample();
        let rate = rates.up_to(sample);
        let intents = disk.journal.intent_status();
        DiskStatus {
            name: disk.spec.name.clone(),
            image: disk.spec.image.clone(),
            journal: disk.spec.journal.clone(),
            journal_id: disk.journal.id(),
            size_bytes: disk.size_bytes.load(Ordering::Acquire),
            resync: state.resync,
            open_dirty_blocks: count(open),
            closed_dirty_blocks: state.closed.map_or(0, count),
            ring_capacity_records: capacity,
            ring_used_records: used,
            ring_fill_percent: used * 100 / capacity,
            records_per_second: rate.written,
            folded_per_second: rate.folded,
            ring_full_in_seconds: rate.seconds_until(capacity.saturating_sub(used)),
            checkpoint_sets: disk.journal.sets_in_use(),
            records_written: disk.journal.records_written(),
            records_elided: disk.elided.load(Ordering::Relaxed),
            folds: disk.journal.folds(),
            ring_overflowing: disk.journal.is_overflowing(),
            coarse_changes: disk.journal.coarse_changes(),
            coarse_units: disk.journal.overflow_units(),
            ring_syncs: disk.journal.syncs(),
            journal_replacements: disk.journal.replacements(),
            intent_regions_max: intents.capacity,
            intent_regions: intents.armed,
            intent_commits: intents.commits,
            intent_waits: intents.waits,
            intent_evictions: intents.evictions,
            power_cut_unsafe: disk.journal.is_unsafe(),
            unserved_change: disk.unserved_change.clone(),
        }
    }

    /// Makes every sync of a journal fail from now on, or succeed again.
    #[cfg(test)]
    pub(crate) fn set_failing(&self, disk: usize, failing: bool) {
        self.disks[disk].journal.set_failing(failing);
    }

    /// Path of the journal of a disk; `None` where nothing is tracked.
    pub fn journal_path(&self, disk: usize) -> Option<&Path> {
        Some(&self.disks.get(disk)?.spec.journal)
    }

    /// Syncs all journals and marks them clean. No write may be admitted any more, the disks have been
    /// synced, and their last times are kept.
    ///
    /// # Errors
    ///
    /// A sync fails.
    pub fn close(&self) -> Result<()> {
        self.on_each(Journal::close)
    }
}
