//! One disk of a machine: its journal, what has changed on it in which epoch, and what is kept of the closed one.
//!
//! Which blocks belong to an epoch is known twice. The journal knows it across any crash, but at times by whole
//! units, or together with later ones. The filters know it exactly: `filters` those of the open epoch and the one
//! before, `carried` those that the open one has taken over.
//! Each holds at least what belongs to it, so that what is captured, which is what both name, is complete.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use arc_swap::ArcSwapOption;

use super::copier::Copier;
use super::filter::Filter;
use super::frozen::{Frozen, Members};
use super::rates::{Rates, Sample};
use super::{DiskSpec, MachineOptions, Operation};
use crate::error::Result;
use crate::extent::{Epoch, Extent, blocks_of};
use crate::failpoint::{Place, reached};
use crate::journal::reader::JournalReader;
use crate::journal::recovery::boot_id;
use crate::journal::state::EpochState;
use crate::journal::{self, Journal, JournalOptions, Marked, RecoveryReport};
use crate::preserve::format::{Failure, PAGE_WORDS, Subject};

/// Words of a bitmap that are listed, 16 bytes each, at most.
const LISTED_WORDS_MAX: usize = 256 << 10;

/// One tracked disk.
pub(super) struct TrackedDisk {
    pub spec: DiskSpec,
    /// Size in bytes at present.
    pub size_bytes: AtomicU64,
    pub journal: Journal,
    /// Filters of even and odd epochs.
    pub filters: [Filter; 2],
    /// Blocks that were written more than once in even and odd epochs.
    hot: [Filter; 2],
    /// Blocks of epochs that were merged into the open one.
    carried: Filter,
    /// Number of the closed epoch whose blocks are kept; zero if there is none.
    frozen_epoch: AtomicU64,
    frozen: ArcSwapOption<Frozen>,
    pub copier: Copier,
    pub preserve_budget_bytes: u64,
    pub elided: AtomicU64,
    pub unserved_change: Option<String>,
    started: Instant,
    rates: Mutex<Rates>,
}

impl TrackedDisk {
    /// Opens or makes the journal of a disk.
    ///
    /// # Errors
    ///
    /// As [`journal::open`], or memory is short.
    pub fn open(spec: DiskSpec, options: &MachineOptions) -> Result<(Self, RecoveryReport)> {
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
        let filter = || Filter::new(blocks_of(spec.size_bytes));
        let disk = Self {
            size_bytes: spec.size_bytes.into(),
            journal,
            filters: [filter()?, filter()?],
            hot: [filter()?, filter()?],
            carried: filter()?,
            frozen_epoch: AtomicU64::new(0),
            frozen: ArcSwapOption::empty(),
            copier: Copier::default(),
            preserve_budget_bytes: options.preserve_budget_bytes,
            elided: AtomicU64::new(0),
            started: Instant::now(),
            rates: Mutex::default(),
            unserved_change: report.suspicion.map(|suspicion| suspicion.to_string()),
            spec,
        };
        Ok((disk, report))
    }

    /// The counters of the ring at this moment, and what was kept of them.
    pub fn sample(&self) -> (Sample, MutexGuard<'_, Rates>) {
        let sample = Sample {
            at: self.started.elapsed(),
            written: self.journal.records_written(),
            folded: self.journal.records_folded(),
        };
        let rates = self.rates.lock().unwrap_or_else(PoisonError::into_inner);
        (sample, rates)
    }

    /// Takes over what the journal knows. What belongs to the open set from earlier epochs is recorded once more
    /// when it changes: whoever has looked at every block since such an epoch asks for later ones alone.
    pub fn remember(&self, state: &EpochState) -> Result<()> {
        let filter = self.filter(state.open);
        let after = Epoch(state.open.0.saturating_sub(1));
        self.journal
            .each_extent_after(after, |extent| filter.insert(extent))?;
        if self.spec.preserve.is_none() {
            return Ok(());
        }
        // With a closed epoch nothing is merged into the open one.
        if state.closed.is_none() {
            self.journal
                .each_extent_after(state.sealed, |extent| self.carried.insert(extent))?;
        }
        Ok(())
    }

    /// The filter of an epoch: of the open one, or of the one before it.
    pub fn filter(&self, epoch: Epoch) -> &Filter {
        &self.filters[(epoch.0 & 1) as usize]
    }

    pub fn note(&self, epoch: Epoch, extent: Extent, operation: Operation) -> Marked {
        self.journal.stir();
        let file = self.journal.file_number();
        let filter = self.filter(epoch);
        if filter.contains(extent) {
            self.elided.fetch_add(1, Ordering::Relaxed);
            let hot = &self.hot[(epoch.0 & 1) as usize];
            if self.spec.preserve.is_some() && !hot.contains(extent) {
                hot.insert(extent);
            }
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

    /// Gives the filters room for a disk that has grown.
    pub fn reach(&self, size_bytes: u64) -> Result<()> {
        let blocks = blocks_of(size_bytes);
        let mut filters = self.filters.iter().chain(&self.hot).chain([&self.carried]);
        filters.try_for_each(|filter| filter.reach(blocks))
    }

    fn pages(&self) -> u64 {
        let blocks = blocks_of(self.size_bytes.load(Ordering::Acquire));
        blocks.div_ceil(PAGE_WORDS * 64)
    }
}

/// The closed epoch.
impl TrackedDisk {
    /// The closed epoch whose blocks are kept, if there is one.
    pub fn frozen(&self) -> Option<Arc<Frozen>> {
        self.frozen.load_full()
    }

    /// What belongs to a closed epoch.
    pub fn members(&self, epoch: Epoch) -> Members<'_> {
        Members {
            own: self.filter(epoch),
            carried: &self.carried,
        }
    }

    /// Whether a write of an epoch has to wait until blocks of the one before are copied. Wait-free.
    pub fn must_copy(&self, epoch: Epoch, extent: Extent) -> bool {
        let frozen_epoch = self.frozen_epoch.load(Ordering::Acquire);
        if frozen_epoch == 0 || frozen_epoch >= epoch.0 {
            return false;
        }
        let frozen = self.frozen.load();
        let must_copy = |frozen: &Arc<Frozen>| frozen.must_copy(extent, self.members(frozen.epoch));
        frozen.as_ref().is_some_and(must_copy)
    }

    /// Makes the filters of an epoch that is about to be opened empty.
    pub fn clear(&self, epoch: Epoch) -> Result<()> {
        self.filter(epoch).clear()?;
        self.hot[(epoch.0 & 1) as usize].clear()
    }

    /// Gets ready to keep the blocks of an epoch that is about to be closed.
    pub fn prepare(&self, epoch: Epoch, all: bool) -> Result<Option<Arc<Frozen>>> {
        let Some(path) = &self.spec.preserve else {
            return Ok(None);
        };
        let subject = self.subject(epoch, all)?;
        Frozen::prepare(path, subject, self.preserve_budget_bytes).map(Some)
    }

    fn subject(&self, epoch: Epoch, all: bool) -> Result<Subject> {
        Ok(Subject {
            boot_id: boot_id()?,
            journal_id: self.journal.id_bytes(),
            epoch,
            size_bytes: self.size_bytes.load(Ordering::Acquire),
            all,
        })
    }

    /// From here on writes of later epochs heed it.
    pub fn freeze(&self, frozen: Option<Arc<Frozen>>) {
        let epoch = frozen.as_ref().map_or(0, |frozen| frozen.epoch.0);
        self.frozen.store(frozen);
        self.frozen_epoch.store(epoch, Ordering::SeqCst);
    }

    /// Goes on with a closed epoch that an earlier tracker has left.
    pub fn resume(&self, epoch: Epoch) -> Result<()> {
        let Some(path) = &self.spec.preserve else {
            return Ok(());
        };
        let subject = self.subject(epoch, false)?;
        let own = self.filter(epoch);
        let frozen = Frozen::resume(path, &subject, self.preserve_budget_bytes, own)?;
        self.freeze(Some(frozen));
        Ok(())
    }

    /// Tells the shipper what belongs to the closed epoch.
    pub fn publish(&self, frozen: &Frozen) -> Result<()> {
        let hot = &self.hot[(frozen.epoch.0 & 1) as usize];
        frozen.publish(self.members(frozen.epoch), hot)
    }

    /// Nobody needs the blocks of the closed epoch any more. Whoever reads its view is told before writes stop to heed
    /// it, so that nothing overwritten without a copy passes for what it was.
    pub fn thaw(&self, failure: Option<Failure>) {
        let ended = self.frozen().map_or(Ok(()), |frozen| frozen.end(failure));
        self.freeze(None);
        if let Err(error) = ended {
            tracing::warn!("{}", error.chain());
        }
    }

    /// Nothing is asked of a closed epoch any more, and no write of it is admitted: its filters give their memory back.
    pub fn end(&self, epoch: Epoch) {
        // What is not cleared now is before the next epoch of this parity is opened.
        let _cleared = self.clear(epoch);
    }

    /// A closed epoch, of which nothing is kept any more, is given up: its blocks belong to the open one.
    pub fn carry(&self, epoch: Epoch) {
        let filter = self.filter(epoch);
        // Scattered blocks take far less memory in a list, so that there are never two bitmaps of them.
        match filter.words(self.pages(), LISTED_WORDS_MAX) {
            Some(words) => {
                self.end(epoch);
                for (index, bits) in words {
                    self.carried.insert_word(index, bits);
                }
            }
            None => {
                self.carried.insert_all(filter, self.pages());
                self.end(epoch);
            }
        }
    }

    /// The closed epoch is sealed: its blocks belong to the open one no more, unless the spool is lost.
    pub fn set_down(&self) -> Result<()> {
        self.carried.clear()
    }

    /// The spool is lost: the open epoch takes over whatever the journal knows since the committed one.
    pub fn take_back(&self) -> Result<()> {
        if self.spec.preserve.is_none() {
            return Ok(());
        }
        // Read as a shipper reads it, while writes go on. Where every block counts as changed it is scanned.
        let reader = JournalReader::open(&self.spec.journal)?;
        let dirty = reader.dirty(self.journal.state().committed, Epoch(u64::MAX))?;
        for extent in dirty.extents() {
            self.carried.insert(extent?);
        }
        Ok(())
    }
}
