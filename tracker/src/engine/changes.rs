//! What has changed on a disk since its last committed recovery point, as its journal says.
//!
//! Overview: reading a journal means to walk its whole ring. What was found is kept, and holds until
//! a write adds a record or a watermark moves; so a client that asks piece by piece about a quiet
//! disk has the ring walked once.
//!
//! Order: the stamp is taken before the journal is read. A record that comes in between may be in
//! what was found; the next stamp differs in any case, because a write counts its record before it
//! is answered.

use std::path::Path;

use crate::epoch::Machine;
use crate::error::Result;
use crate::extent::{Epoch, Extent};
use crate::journal::reader::JournalReader;
use crate::journal::state::EpochState;

/// Most extents that are kept, 16 bytes each.
const KEPT_EXTENTS_MAX: usize = 256 << 10;

/// What changes whenever the answer may.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Stamp {
    state: EpochState,
    size_bytes: u64,
    records_written: u64,
    coarse_changes: u64,
    folds: u64,
}

/// What a journal said.
struct Found {
    stamp: Stamp,
    /// Every block counts as changed.
    all: bool,
    /// Sorted and disjoint.
    extents: Vec<Extent>,
}

/// The changes of one disk. Belongs to one thread.
pub struct Changes {
    disk: usize,
    journal: JournalReader,
    found: Option<Found>,
}

impl Changes {
    /// Opens the journal of a disk.
    ///
    /// # Errors
    ///
    /// It cannot be read.
    pub fn open(disk: usize, path: &Path) -> Result<Self> {
        Ok(Self {
            disk,
            journal: JournalReader::open(path)?,
            found: None,
        })
    }

    /// Calls with the changed extents from `start` on, sorted, until `false`. Returns whether every
    /// block counts as changed; nothing is called then.
    ///
    /// # Errors
    ///
    /// The journal is damaged or cannot be read.
    pub fn each(
        &mut self,
        machine: &Machine,
        start: u64,
        mut visit: impl FnMut(Extent) -> bool,
    ) -> Result<bool> {
        let stamp = self.stamp(machine)?;
        if let Some(found) = self.found.as_ref().filter(|found| found.stamp == stamp) {
            let begin = |extent: &Extent| extent.end_block() * crate::extent::BLOCK_SIZE <= start;
            let first = found.extents.partition_point(begin);
            let rest = found.extents.get(first..).unwrap_or_default();
            let _all_visited = rest.iter().all(|extent| visit(*extent));
            return Ok(found.all);
        }
        self.found = None;
        let changes = self.journal.dirty(stamp.state.committed, Epoch(u64::MAX))?;
        let all = changes.all();
        let mut extents = Vec::new();
        let (mut wanted, mut kept) = (!all, true);
        // Of a disk that is changed throughout the extents tell nothing.
        let mut sources = changes.extents().take_while(|_| !all);
        while wanted || kept {
            let Some(extent) = sources.next().transpose()? else {
                break;
            };
            wanted = wanted && visit(extent);
            kept = kept && extents.len() < KEPT_EXTENTS_MAX;
            if kept {
                extents.push(extent);
            }
        }
        drop(sources);
        if kept {
            self.found = Some(Found {
                stamp,
                all,
                extents,
            });
        }
        Ok(all)
    }

    fn stamp(&self, machine: &Machine) -> Result<Stamp> {
        let status = machine.status();
        let disk = status.disks.get(self.disk);
        Ok(Stamp {
            state: self.journal.state()?,
            // What is new on a disk that grows is recorded before the journal has the size.
            size_bytes: disk.map_or(0, |disk| disk.size_bytes),
            records_written: disk.map_or(0, |disk| disk.records_written),
            coarse_changes: disk.map_or(0, |disk| disk.coarse_changes),
            folds: disk.map_or(0, |disk| disk.folds),
        })
    }
}
