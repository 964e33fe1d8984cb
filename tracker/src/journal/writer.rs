//! The journal of one disk as its tracker writes it.
//!
//! Overview: `record` and `mark` are on the way of every write and take no lock. Everything else is done
//! by one thread at a time under the mutex: superblocks (`update`), folding (`fold`), growth (`growth`),
//! another file (`replace`). Arming and the background sync are in `guard`.
//!
//! Order of locks: the mutex of what is published, then that of the intent log.
//!
//! Crash consistency: after SIGKILL the page cache holds every store up to it, in order. When the ring is
//! full, overflow bits or the alarm say so before the write goes on, so coverage is never lost. After a
//! power cut each page of the file is as it was at some moment since the last sync; see `intent` for the
//! records that are lost with it. Slots of the ring and pages of sets are used again only when the
//! superblock that does not need them any more is durable, and whatever a superblock relies on is durable
//! before it is stored, since it may be written back at once.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use super::checkpoint::SetPlace;
use super::core::Core;
use super::format::{Operation, Record, Slot, Superblock};
use super::intent::{Era, IntentLog, Keeper, Marked, Regions};
use super::ring::Ring;
use super::state::EpochState;
use super::witness::{Moment, Witness};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::{Epoch, Extent};

/// Files that can take the place of the first one while a tracker runs. Each failed sync costs one.
pub(super) const REPLACEMENTS_MAX: usize = 63;

/// The superblock as last published, and which copy holds it.
pub(super) struct Published {
    pub(super) superblock: Superblock,
    pub(super) copy: usize,
}

/// What has been done since the journal was opened.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub folds: AtomicU64,
    pub folded: AtomicU64,
    pub written: AtomicU64,
    pub coarse: AtomicU64,
    pub syncs: AtomicU64,
    pub replacements: AtomicU64,
}

/// What the intent log has done since the journal was opened, and how much it covers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IntentStatus {
    /// Regions that can be armed at once.
    pub capacity: u64,
    /// Regions that are armed.
    pub armed: u64,
    /// Transactions written.
    pub commits: u64,
    /// Writes that waited for one, or for a sync.
    pub waits: u64,
    /// Regions that made room for others.
    pub evictions: u64,
}

/// The journal of one disk, locked by its tracker.
pub struct Journal {
    path: PathBuf,
    /// The file that was opened.
    first: Box<Core>,
    /// Those that have taken or are about to take its place. None is given up while the tracker runs: a
    /// worker may be about to store to it.
    pub(super) others: Box<[OnceLock<Core>]>,
    /// The one in use: zero is the first.
    pub(super) current: AtomicUsize,
    /// The one in use, or the one that is about to be.
    pub(super) latest: AtomicUsize,
    published: Mutex<Published>,
    pub(super) regions: Regions,
    pub(super) intents: Mutex<IntentLog>,
    pub(super) keeper: Keeper,
    /// Held while the file is synced.
    pub(super) syncing: Mutex<()>,
    pub(super) sync_failed: AtomicBool,
    /// The epoch that the latest cut was to open.
    pub(super) upcoming: AtomicU64,
    pub(super) counters: Counters,
    #[cfg(test)]
    pub(super) failing: AtomicBool,
}

impl Journal {
    /// A journal over a file that recovery has checked; `copy` is the superblock that counts.
    pub(super) fn new(
        path: PathBuf,
        core: Core,
        superblock: Superblock,
        copy: usize,
        intents: IntentLog,
        regions: Regions,
    ) -> Self {
        Self {
            path,
            first: Box::new(core),
            others: (0..REPLACEMENTS_MAX).map(|_| OnceLock::new()).collect(),
            current: AtomicUsize::new(0),
            latest: AtomicUsize::new(0),
            published: Mutex::new(Published { superblock, copy }),
            regions,
            intents: Mutex::new(intents),
            keeper: Keeper::default(),
            syncing: Mutex::new(()),
            sync_failed: AtomicBool::new(false),
            upcoming: AtomicU64::new(0),
            counters: Counters::default(),
            #[cfg(test)]
            failing: AtomicBool::new(false),
        }
    }

    /// Path of the file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn core_at(&self, index: usize) -> &Core {
        let other = index
            .checked_sub(1)
            .and_then(|index| self.others.get(index));
        other.and_then(OnceLock::get).unwrap_or(&self.first)
    }

    /// The core in use.
    pub(super) fn core(&self) -> &Core {
        self.core_at(self.current.load(Ordering::Acquire))
    }

    /// Does it to the core in use, and to the one that is about to be.
    ///
    /// Order: what is stored to the one in use, then the look for a later one. Whoever makes a later one
    /// lets it be seen, then copies what is in the one before; so either it finds the store or the store
    /// finds it.
    fn on_cores(&self, work: impl Fn(&Core)) {
        let current = self.current.load(Ordering::Acquire);
        work(self.core_at(current));
        fence(Ordering::SeqCst);
        let latest = self.latest.load(Ordering::SeqCst);
        if latest != current {
            work(self.core_at(latest));
        }
    }

    /// Positions of the ring.
    pub fn ring(&self) -> &Ring {
        &self.core().ring
    }

    /// Times that records were folded since the journal was opened.
    pub fn folds(&self) -> u64 {
        self.counters.folds.load(Ordering::Relaxed)
    }

    /// Records folded since the journal was opened.
    pub fn records_folded(&self) -> u64 {
        self.counters.folded.load(Ordering::Relaxed)
    }

    /// Records written since the journal was opened.
    pub fn records_written(&self) -> u64 {
        self.counters.written.load(Ordering::Relaxed)
    }

    /// Changes kept coarsely because the ring was full, since the journal was opened.
    pub fn coarse_changes(&self) -> u64 {
        self.counters.coarse.load(Ordering::Relaxed)
    }

    /// Times that the ring was synced in the background since the journal was opened.
    pub fn syncs(&self) -> u64 {
        self.counters.syncs.load(Ordering::Relaxed)
    }

    /// Times that another file took the place of this journal, because a sync had failed.
    pub fn replacements(&self) -> u64 {
        self.counters.replacements.load(Ordering::Relaxed)
    }

    /// Whether a sync has failed and nothing has made up for it.
    pub fn has_failed(&self) -> bool {
        self.sync_failed.load(Ordering::Acquire)
    }

    /// Whether the ring is full, and changes are kept coarsely.
    pub fn is_overflowing(&self) -> bool {
        self.core().is_direct()
    }

    /// Coarse units that count as changed because the ring was full.
    pub fn overflow_units(&self) -> u64 {
        let committed = self.watermarks().committed;
        self.core().overflow().count(committed)
    }

    /// Records that blocks change in this epoch. Takes no lock and allocates nothing. If the ring is
    /// full, more counts as changed than does.
    pub fn record(&self, epoch: Epoch, extent: Extent, operation: Operation) {
        self.on_cores(|core| {
            let recorded = core.record(epoch, extent, operation);
            let counters = &self.counters;
            counters
                .written
                .fetch_add(recorded.written, Ordering::Relaxed);
            if recorded.coarse > 0 {
                counters.coarse.fetch_add(1, Ordering::Relaxed);
            }
        });
    }

    /// Fills a hole that a dead writer left.
    pub(super) fn fill(&self, record: Record) {
        let core = self.core();
        core.ring.fill(core.words.words(), record);
    }

    /// Marks the regions of a change that has been recorded. Takes no lock and allocates nothing. The
    /// change may be made if they are armed; else [`Self::await_regions`].
    pub fn mark(&self, extent: Extent) -> Marked {
        let marked = self.regions.mark(extent);
        if let Some(ahead) = &marked.ahead {
            self.keeper.arm_ahead(ahead.clone());
        }
        marked
    }

    /// Whether a change may be made that had to wait, and was recorded in this era.
    pub fn may_write(&self, extent: Extent, era: Era) -> bool {
        self.regions.may_write(extent, era)
    }

    /// The disk is about to change. Called before that is recorded, or submitted without a record.
    pub fn stir(&self) {
        self.on_cores(|core| Witness::of(&core.words).stir());
    }

    /// Keeps the disk's times as they were when they were looked at a moment ago.
    pub fn keep_time(&self, seen: Moment) {
        self.on_cores(|core| Witness::of(&core.words).keep(seen));
    }

    /// Makes every block count as changed as of this epoch.
    pub fn raise_alarm(&self, epoch: Epoch) {
        self.on_cores(|core| core.alarm().raise(epoch));
        // Should the next sync fail and the kernel drop the page, it is raised again.
        self.regions.note_uncovered();
    }

    /// Tells apart the files that took the place of each other.
    pub fn file_number(&self) -> usize {
        self.current.load(Ordering::SeqCst)
    }

    /// Prepares the end of an epoch, and the beginning of the `next`: the alarms and overflow bits of
    /// those that are captured with it become its own. Called before writes are stamped with the next
    /// one; no write of the one before it may be in flight.
    pub fn gather_alarms(&self, closing: Epoch, next: Epoch) {
        let state = self.watermarks();
        self.upcoming.store(next.0, Ordering::SeqCst);
        self.on_cores(|core| {
            core.overflow().clear_for(next, state.committed);
            core.alarm().gather(state.sealed, closing);
            core.overflow().gather(state.sealed, closing);
        });
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Published> {
        self.published
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn lock_intents(&self) -> MutexGuard<'_, IntentLog> {
        self.intents.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the intent log covers and has done.
    pub fn intent_status(&self) -> IntentStatus {
        let waits = self.keeper.waits();
        let log = self.lock_intents();
        IntentStatus {
            capacity: log.capacity(),
            armed: log.armed(),
            commits: log.commits(),
            waits,
            evictions: log.evictions(),
        }
    }

    /// The superblock as it was last published.
    pub(super) fn superblock(&self) -> Superblock {
        self.lock().superblock
    }

    /// Size in bytes of the disk that it is for.
    pub fn disk_size_bytes(&self) -> u64 {
        self.superblock().disk_size_bytes.get()
    }

    /// The watermarks as the superblock holds them.
    pub fn watermarks(&self) -> EpochState {
        EpochState::of(&self.superblock())
    }

    /// The watermarks; `resync` includes the latest alarm.
    pub fn state(&self) -> EpochState {
        let mut state = self.watermarks();
        let latest = self.core().alarm().latest().unwrap_or_default();
        state.resync = state.resync.max(latest);
        state
    }

    /// Calls with the extents of all records after an epoch, some of them more than once. Reads the
    /// live part of the ring alone. Nothing may be recorded meanwhile.
    ///
    /// # Errors
    ///
    /// A checkpoint cannot be read.
    pub fn each_extent_after(&self, epoch: Epoch, mut visit: impl FnMut(Extent)) -> Result<()> {
        let core = self.core();
        for sequence in core.ring.tail()..core.ring.head() {
            if let Slot::Whole(record) = core.ring.read(core.words.words(), sequence)
                && record.operation != Operation::Null
                && record.epoch > epoch
            {
                visit(Extent {
                    first_block: record.first_block,
                    block_count: record.block_count,
                });
            }
        }
        core.overflow()
            .each_extent(epoch, Epoch(u64::MAX), &mut visit);
        let superblock = self.superblock();
        for (index, set) in superblock.sets.iter().enumerate() {
            if set.highest_epoch.get() <= epoch.0 {
                continue;
            }
            let place = SetPlace::of(&superblock, index);
            place
                .each_extent(&core.file, set.generation.get(), &mut visit)
                .map_err(|error| {
                    let path = self.path.display();
                    Error::io(format!("Cannot read a checkpoint of journal {path}"), error)
                })?;
        }
        Ok(())
    }

    /// Random number of this journal, as 32 hexadecimal digits.
    pub fn id(&self) -> String {
        uuid::Uuid::from_bytes(self.id_bytes()).simple().to_string()
    }

    /// Random number of this journal.
    pub fn id_bytes(&self) -> [u8; 16] {
        self.lock().superblock.journal_id
    }

    /// Pages that are set in the checkpoint sets: none, one or both of them are in use.
    pub fn sets_in_use(&self) -> u64 {
        let published = self.lock();
        published
            .superblock
            .sets
            .iter()
            .filter(|set| set.highest_epoch.get() != 0)
            .count() as u64
    }

    /// Makes every sync and every fold fail from now on, or succeed again.
    #[cfg(test)]
    pub(crate) fn set_failing(&self, failing: bool) {
        self.failing.store(failing, Ordering::Release);
    }
}

/// The error for a journal that must not be trusted.
pub(super) fn distrusted(kind: ErrorKind, path: &Path, what: &str) -> Error {
    Error::new(
        kind,
        format!(
            "Journal {}: {what}: start again with --resync to set it aside and have every block \
             checked by fingerprints",
            path.display()
        ),
    )
}
