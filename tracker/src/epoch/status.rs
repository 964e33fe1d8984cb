//! The epochs of a machine as its control socket shows them.

use std::path::PathBuf;
use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};

use super::Machine;
use super::tracked::TrackedDisk;
use crate::extent::Epoch;
use crate::journal::state::EpochState;

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
    /// The closed epoch, where it is a snapshot.
    #[serde(default)]
    pub held: Option<Epoch>,
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
    /// Where the blocks of the closed epoch are kept while it is captured.
    #[serde(default)]
    pub preserve_file: Option<PathBuf>,
    /// Bytes of blocks that are kept there.
    #[serde(default)]
    pub preserve_used_bytes: u64,
    /// Most bytes that may be kept there.
    #[serde(default)]
    pub preserve_budget_bytes: u64,
    /// Why the closed epoch is given up, if it is.
    #[serde(default)]
    pub preserve_failure: Option<String>,
    /// Why the frozen view of it is given up, if it is.
    #[serde(default)]
    pub view_failure: Option<String>,
    /// Blocks that were copied before guests overwrote them, since the tracker started.
    #[serde(default)]
    pub copied_blocks: u64,
    /// Writes that waited for a copy, since the tracker started.
    #[serde(default)]
    pub copy_waits: u64,
    /// How the disk was changed, or may have been, while no tracker served it, as this one found when
    /// it started.
    pub unserved_change: Option<String>,
}

impl Machine {
    /// The epochs, disks and journals.
    pub fn status(&self) -> MachineStatus {
        let states = self.states();
        let lowest = |of: fn(&EpochState) -> Epoch| states.iter().map(of).min().unwrap_or_default();
        MachineStatus {
            open: self.clock.open(),
            closed: states.iter().filter_map(|state| state.closed).max(),
            held: self.held(),
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
        let frozen = disk.frozen();
        let views = frozen
            .as_ref()
            .is_some_and(|frozen| frozen.area.subject().all);
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
            preserve_file: frozen.as_ref().map(|frozen| frozen.area.path().to_owned()),
            preserve_used_bytes: frozen.as_ref().map_or(0, |frozen| frozen.area.used_bytes()),
            preserve_budget_bytes: disk.preserve_budget_bytes,
            preserve_failure: frozen
                .as_ref()
                .and_then(|frozen| frozen.area.failure())
                .map(|failure| failure.text().to_owned()),
            view_failure: views
                .then(|| frozen.as_ref()?.area.view_failure())
                .flatten()
                .map(|failure| failure.text().to_owned()),
            copied_blocks: disk.copier.copied_blocks.load(Ordering::Relaxed),
            copy_waits: disk.copier.waits.load(Ordering::Relaxed),
            unserved_change: disk.unserved_change.clone(),
        }
    }
}
