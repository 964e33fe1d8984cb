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
//! Order of a cut: room to keep the blocks of the old epoch is made (`frozen`); alarms that will be captured with
//! it become its own; the clock moves for all disks at once; when no write is being admitted to the old epoch
//! any more, what belongs to it is known, and told to the shipper; the writes of the old epoch complete; the
//! watermark of each journal is published and synced. A crash before the last one leaves an epoch that is not closed everywhere,
//! which recovery merges into the open one. What is to be done on all disks is tried on all, also
//! where it fails on one, so that only a crash leaves them apart.
//!
//! Order of a growth: no epoch is cut meanwhile, so what is new belongs to the epoch that is open.
//! The filters get room, the journal gets the record and the size (`journal::growth`), and only then
//! may clients see the size.
//!
//! A tracker that is killed leaves a closed epoch and its preserve files, with which the next one goes on. Where
//! one of the files cannot be used, the epoch is merged before the first write is served.
//!
//! What it does not handle: the blocks' content; see `preserve`.

mod clock;

mod copier;

mod filter;

mod flights;

mod frozen;

mod keeping;

mod rates;

mod snapshot;

mod status;

mod tracked;

#[cfg(test)]
mod power_cut_tests;
#[cfg(test)]
mod preserve_tests;
#[cfg(test)]
mod simulation_tests;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind, Result};
use crate::extent::{Epoch, Extent};
use crate::failpoint::{Canary, Place, canary, reached};
use crate::journal::state::{EpochState, reconcile};
use crate::journal::{Journal, Moment, RecoveryReport};
use crate::preserve::area::{BlockSource, discard};
use crate::preserve::format::Failure;
use clock::Clock;
use copier::CopyJob;
use flights::{Flight, Flights};
use frozen::Members;
use snapshot::RELEASE;
use tracked::TrackedDisk;

pub use crate::journal::format::Operation;
pub use crate::journal::{Era, Waiter};
pub use frozen::Frozen;
pub use keeping::Keepers;
pub use status::{DiskStatus, MachineStatus};

/// With a canary, how much later than the first disk the others are cut.
const LATE: Duration = Duration::from_micros(500);

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
    /// Path of its preserve file; `None` where the blocks of closed epochs are not kept.
    pub preserve: Option<PathBuf>,
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
    /// Bytes of blocks that are kept of each disk while an epoch is captured, at most.
    pub preserve_budget_bytes: u64,
    /// Every block is kept while an epoch is captured, so that there is a frozen view of it.
    pub frozen_views: bool,
}

/// A write that was stamped and recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Admission {
    /// Its stamp.
    pub epoch: Epoch,
    /// It has to wait for its regions: the era in which its record stood in the ring.
    pub waits: Option<Era>,
    /// It has to wait until blocks of the epoch before are copied.
    pub copies: bool,
    /// Where it is listed while it is in flight.
    flight: Flight,
}

impl Admission {
    /// Whether its data may go to the disk at once.
    pub fn is_ready(&self) -> bool {
        self.waits.is_none() && !self.copies
    }
}

/// What is kept of a closed epoch while it is captured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Keep {
    /// The blocks that belong to it.
    #[default]
    Changed,
    /// Every block, for whoever looks at the whole disk as it was.
    All,
}

/// Goes on with the closed epoch that an earlier tracker has left. Returns whether all disks could, where there is
/// one; if not, whatever is left of it is discarded.
fn resume(disks: &[TrackedDisk], states: &[EpochState]) -> Result<bool> {
    let resume_one = |(disk, state): (&TrackedDisk, &EpochState)| match state.closed {
        Some(closed) => disk.resume(closed),
        None => Ok(()),
    };
    let closed = states.iter().find_map(|state| state.closed);
    let resumed = disks.iter().zip(states).try_for_each(resume_one);
    if resumed.is_ok() && closed.is_some() {
        return Ok(true);
    }
    for (disk, state) in disks.iter().zip(states) {
        disk.freeze(None);
        if let Some(path) = &disk.spec.preserve {
            disk.filter(Epoch(state.open.0 + 1)).clear()?;
            discard(path)?;
        }
    }
    if let (Err(error), Some(closed)) = (&resumed, closed) {
        tracing::warn!("Epoch {closed} is given up: {}", error.chain());
    }
    Ok(closed.is_none())
}

fn stuck(closing: Epoch, drain_timeout: Duration) -> Error {
    Error::new(
        ErrorKind::State,
        format!(
            "Writes of epoch {closing} did not complete in {} s: try again",
            drain_timeout.as_secs()
        ),
    )
}

/// The disks of one machine. Shared by workers and the control socket.
pub struct Machine {
    clock: Clock,
    /// Of each worker.
    flights: Vec<Flights>,
    disks: Vec<TrackedDisk>,
    /// Held while watermarks move.
    moving: Mutex<()>,
    /// The closed epoch that is a snapshot; zero if none is.
    held: AtomicU64,
    frozen_views: bool,
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
            let (disk, report) = TrackedDisk::open(spec, options)?;
            disks.push(disk);
            reports.push(report);
        }
        let mut states: Vec<EpochState> =
            disks.iter().map(|disk| disk.journal.watermarks()).collect();
        reconcile(&mut states);
        let resumed = resume(&disks, &states)?;
        for (disk, state) in disks.iter().zip(&mut states) {
            if !resumed {
                state.closed = None;
            }
            disk.journal.update(|present| *present = *state)?;
            disk.remember(state)?;
        }
        let open = states.first().map_or(Epoch(1), |state| state.open);
        let machine = Self {
            clock: Clock::new(open, options.workers),
            flights: (0..options.workers.max(1))
                .map(|_| Flights::default())
                .collect(),
            disks,
            moving: Mutex::new(()),
            held: AtomicU64::new(0),
            frozen_views: options.frozen_views,
            merged: AtomicU64::new(u64::from(!resumed)),
        };
        machine.resume_hold();
        Ok((machine, reports))
    }

    /// Stamps and records a write before its data is submitted. Wait-free, no allocation. Every
    /// call is followed by [`Self::complete`] with the admission returned. If that says that the write has to
    /// wait for its regions, [`Self::await_regions`] comes before its data; then, if it says so, or
    /// [`Self::must_copy`] does by then, [`Self::await_copy`].
    pub fn admit(
        &self,
        worker: usize,
        disk: usize,
        extent: Extent,
        operation: Operation,
    ) -> Admission {
        let epoch = self.clock.enter(worker);
        let tracked = self.disks.get(disk);
        let marked = tracked.map(|disk| disk.note(epoch, extent, operation));
        let flight = self.flights_of(worker).list(disk, extent, epoch);
        self.clock.admitted(worker, epoch);
        Admission {
            epoch,
            waits: marked
                .filter(|marked| !marked.armed)
                .map(|marked| marked.era),
            copies: tracked.is_some_and(|disk| disk.must_copy(epoch, extent)),
            flight,
        }
    }

    fn flights_of(&self, worker: usize) -> &Flights {
        &self.flights[worker % self.flights.len()]
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

    /// Whether a write of an epoch has to wait until blocks of the one before are copied.
    pub fn must_copy(&self, disk: usize, extent: Extent, epoch: Epoch) -> bool {
        let tracked = self.disks.get(disk);
        tracked.is_some_and(|disk| disk.must_copy(epoch, extent))
    }

    /// Copies for a write of an epoch the blocks of the one before, if that takes no longer than a write to the page
    /// cache does. Where it returns `false`, [`Self::await_copy`] remains.
    pub fn copy_now(
        &self,
        disk: usize,
        extent: Extent,
        epoch: Epoch,
        source: &dyn BlockSource,
    ) -> bool {
        let Some(tracked) = self.disks.get(disk) else {
            return true;
        };
        // By now its own epoch may be the one that is closed, which has to wait for it.
        let Some(frozen) = tracked.frozen().filter(|frozen| frozen.epoch < epoch) else {
            return true;
        };
        if !frozen.is_settled() || self.is_in_flight(disk, extent, frozen.epoch) {
            return false;
        }
        let members = tracked.members(frozen.epoch);
        tracked.copier.copy_now(&frozen, members, extent, source)
    }

    /// Leaves a write of an epoch that has to wait until blocks of the one before are copied. The waiter is woken once,
    /// with this token, and then the data may go to the disk.
    pub fn await_copy(
        &self,
        disk: usize,
        extent: Extent,
        epoch: Epoch,
        waiter: &Arc<dyn Waiter>,
        token: usize,
    ) {
        let Some(disk) = self.disks.get(disk) else {
            return waiter.wake(token);
        };
        // By now its own epoch may be the one that is closed, which has to wait for it.
        match disk.frozen().filter(|frozen| frozen.epoch < epoch) {
            Some(frozen) => disk.copier.leave(CopyJob {
                frozen,
                extent,
                waiter: Arc::clone(waiter),
                token,
            }),
            None => waiter.wake(token),
        }
    }

    /// Whether a write of an epoch that takes no more writes may still change one of these blocks.
    fn is_in_flight(&self, disk: usize, extent: Extent, epoch: Epoch) -> bool {
        let overlap = |flights: &Flights| flights.overlap(disk, extent, epoch);
        !self.clock.is_drained(epoch) && self.flights.iter().any(overlap)
    }

    /// The write that was admitted has completed, well or not.
    pub fn complete(&self, worker: usize, admission: Admission) {
        let Admission { epoch, flight, .. } = admission;
        self.flights_of(worker).take_off(flight, epoch);
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
    /// epoch is at least `minimum`. Until the closed one is sealed or given up its blocks are kept as they are.
    ///
    /// # Errors
    ///
    /// `State`: an epoch is closed already, or writes do not complete in time (the epoch is then
    /// merged into the next). `Invalid`: no epoch has such a number. `Io`: a preserve file cannot be written,
    /// or a superblock cannot be synced; then the epoch is closed all the same.
    pub fn cut(&self, minimum: Epoch, keep: Keep, drain_timeout: Duration) -> Result<Epoch> {
        let _moving = self.begin()?;
        self.cut_now(minimum, keep, drain_timeout)
    }

    fn cut_now(&self, minimum: Epoch, keep: Keep, drain_timeout: Duration) -> Result<Epoch> {
        if let Some(closed) = self.closed() {
            let what = match self.held() {
                Some(_) => format!("Epoch {closed} is held: {RELEASE}"),
                None => format!("Epoch {closed} is closed and not sealed: end its capture first"),
            };
            return Err(Error::new(ErrorKind::State, what));
        }
        let closing = self.clock.open();
        let next = self.clock.next(minimum).ok_or_else(|| {
            Error::new(
                ErrorKind::Invalid,
                format!("No epoch after {closing} can have the number {minimum} or a higher one"),
            )
        })?;
        // A cut that gave up earlier may have left writes of the parity that comes next.
        if !self.clock.drain(next, drain_timeout) {
            return Err(stuck(closing, drain_timeout));
        }
        let mut frozen = Vec::new();
        for disk in &self.disks {
            frozen.push(disk.prepare(closing, keep == Keep::All || self.frozen_views)?);
        }
        for disk in &self.disks {
            disk.clear(next)?;
            disk.journal.gather_alarms(closing, next);
        }
        let at_once = if canary(Canary::CutPerDisk) {
            1
        } else {
            self.disks.len()
        };
        for (disk, frozen) in self.disks.iter().zip(&frozen).take(at_once) {
            disk.freeze(frozen.clone());
        }
        reached(Place::CutAfterGatherBeforeAdvance);
        self.clock.advance(next);
        let closed = self.close_epoch(&frozen, closing, next, drain_timeout);
        if closed.is_err() && self.closed() != Some(closing) {
            self.merge(closing, Failure::GivenUp);
        }
        closed.map(|()| closing)
    }

    /// The rest of a cut, while writes of the next epoch go on.
    fn close_epoch(
        &self,
        frozen: &[Option<Arc<Frozen>>],
        closing: Epoch,
        next: Epoch,
        drain_timeout: Duration,
    ) -> Result<()> {
        self.clock.settle(closing);
        let kept = || {
            let disks = self.disks.iter().zip(frozen);
            disks.filter_map(|(disk, frozen)| Some((disk, frozen.as_ref()?)))
        };
        for (disk, frozen) in kept() {
            frozen.settle();
            if canary(Canary::CutPerDisk) {
                disk.freeze(Some(Arc::clone(frozen)));
                std::thread::sleep(LATE);
            }
        }
        for (disk, frozen) in kept() {
            disk.publish(frozen)?;
        }
        reached(Place::CutAfterAdvanceBeforeUpdate);
        if !self.clock.drain(closing, drain_timeout) {
            return Err(stuck(closing, drain_timeout));
        }
        self.update(|state| {
            state.open = closing;
            state.cut(next);
        })
    }

    /// A closed epoch is given up: its changes belong to the open one.
    fn merge(&self, epoch: Epoch, why: Failure) {
        self.merged.fetch_add(1, Ordering::Relaxed);
        for disk in &self.disks {
            disk.thaw(Some(why));
            disk.carry(epoch);
        }
    }

    /// What belongs to a closed epoch of a disk.
    fn members(&self, disk: usize, epoch: Epoch) -> Option<Members<'_>> {
        Some(self.disks.get(disk)?.members(epoch))
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
        self.update(|state| state.seal(epoch))?;
        for disk in &self.disks {
            disk.set_down()?;
            disk.thaw(None);
            disk.end(epoch);
        }
        Ok(())
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
            self.merge(epoch, Failure::GivenUp);
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
        self.update(|state| state.commit(epoch))?;
        Ok(())
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
        match self.closed() {
            Some(closed) => self.merge(closed, Failure::GivenUp),
            None if self.states().iter().any(waits) => {
                self.merged.fetch_add(1, Ordering::Relaxed);
            }
            None => {}
        }
        for disk in &self.disks {
            disk.take_back()?;
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
        disk.reach(size_bytes)?;
        let epoch = self.clock.open();
        disk.journal.grow(size_bytes, epoch)?;
        let before = disk.size_bytes.load(Ordering::Acquire);
        let new = Extent::covering(before, size_bytes - before);
        disk.filter(epoch).insert(new);
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
