//! Capturing a closed epoch: its blocks, as they were at the cut, become segments in the spool.
//!
//! Overview: what belongs to the epoch is what the journal and the preserve file both name; each of them names at least
//! that. The journal may name more, by whole units or of later epochs; the preserve file may name what a scan has seen. Blocks
//! that guests write all the time are captured first, on all disks, as the preserve file alone names them, so that few have to
//! be copied before they are overwritten; then the rest.
//!
//! Order: when the blocks of all disks are in the spool, the preserve files are asked whether they held until then,
//! and the journals whether the epoch is still closed; only then is it sealed. The tracker may be killed
//! meanwhile; the next one goes on with the same files.
//!
//! The size of a disk in the point is that at the cut, which its preserve file says; a growth never overlaps a cut.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use tracker::extent::{Epoch, Extent};
use tracker::journal::reader::JournalReader;
use tracker::preserve::reader::PreserveReader;

use super::conductor::Conductor;
use super::progress::DiskScan;
use super::reason::Reason;
use super::rest::Rest;
use crate::capture::frozen::settle_holes;
use crate::capture::pipeline::{Captured, Flow, Settings, run};
use crate::capture::plan::Batches;
use crate::error::{Error, ErrorKind, Result};
use crate::segment::format::Directory;
use crate::segment::reference::SegmentRef;
use crate::segment::roll::{Place, SegmentRoll};
use crate::spool::files::sync_folder;
use crate::spool::segment_file;
use crate::spool::table::Table;
use crate::upload::retry::Stop;
use crate::vault::manifest::{DiskPoint, Manifest};

/// Why a captured epoch is not sealed.
pub(super) enum GivenUp {
    /// Something failed.
    Failed(Error),
    /// The tracker could not keep its blocks as they were.
    NotKept(Error),
    /// More changed than may wait for upload, or changes were lost: every block of the disk with this
    /// index is to be scanned.
    NeedsScan(usize, Reason),
}

impl<E: Into<Error>> From<E> for GivenUp {
    fn from(error: E) -> Self {
        Self::Failed(error.into())
    }
}

/// What was captured of one disk.
pub(super) struct CapturedDisk {
    pub made: Vec<(SegmentRef, Directory)>,
    dirty_blocks: u64,
    size_bytes: u64,
}

/// One disk while it is captured.
struct Capture<'a> {
    index: usize,
    reader: &'a JournalReader,
    frozen: PreserveReader,
    /// Changes after this epoch are captured.
    after: Epoch,
    dirty_blocks: AtomicU64,
    roll: Roll<'a>,
}

impl Conductor {
    pub(super) fn capture(
        &self,
        epoch: Epoch,
        rest: &Rest,
    ) -> std::result::Result<(Manifest, Vec<CapturedDisk>), GivenUp> {
        let folder = self.spool.begin(epoch)?;
        let no_link = || Error::new(ErrorKind::Unavailable, "The tracker is not known");
        let link = self.link.as_ref().ok_or_else(no_link)?;
        let budget = AtomicU64::new(self.config.spool_budget_bytes);
        let mut captures = Vec::new();
        for (index, reader) in link.readers.iter().enumerate() {
            captures.push(self.begin_capture(index, reader, epoch, &folder)?);
        }
        for hot in [true, false] {
            for index in 0..captures.len() {
                self.capture_blocks(&mut captures[index], epoch, hot, &budget)?;
                // The rest of an epoch that is given up is not worth the trouble. The last look is the one that counts.
                captures
                    .iter()
                    .try_for_each(|capture| check_whole(capture, epoch))?;
            }
        }
        let mut disks = Vec::new();
        let mut captured = Vec::new();
        for capture in captures {
            let one = CapturedDisk {
                made: capture.roll.segments.finish()?,
                dirty_blocks: capture.dirty_blocks.into_inner(),
                size_bytes: capture.frozen.size_bytes(),
            };
            disks.push(self.disk_point(capture.index, capture.reader, &one));
            captured.push(one);
        }
        sync_folder(&folder)?;
        let manifest = Manifest {
            vault: self.vault.id(),
            machine: self.config.machine.clone(),
            generation: self.machine.generation,
            epoch,
            previous: self.base.as_ref().map_or(Epoch::ZERO, |base| base.epoch),
            created: jiff::Timestamp::now(),
            consistency: rest.consistency(),
            reason: rest.reason(),
            disks,
        };
        self.spool.seal(&manifest, self.vault.keys())?;
        Ok((manifest, captured))
    }

    fn begin_capture<'a>(
        &'a self,
        index: usize,
        reader: &'a JournalReader,
        epoch: Epoch,
        folder: &Path,
    ) -> std::result::Result<Capture<'a>, GivenUp> {
        let disk = &self.disks[index];
        let name = &disk.config.name;
        let nothing_kept = || {
            let what =
                format!("The tracker does not keep the blocks of epoch {epoch} of disk {name}");
            Error::new(ErrorKind::State, what)
        };
        let path = disk.preserve_file.as_ref().ok_or_else(nothing_kept)?;
        // A scan has seen whatever changed before it began, unless it did not get to its end.
        let scanned = self.scan.disk(name).filter(|scan| scan.is_complete());
        let seen = scanned.map_or(Epoch::ZERO, |scan| scan.epoch);
        let newest = self.base.as_ref().map_or(Epoch::ZERO, |base| base.epoch);
        if reader.state()?.sealed > newest.max(seen) {
            let what = format!(
                "Changes of disk {name} up to epoch {} were taken over by somebody else: every block is compared",
                reader.state()?.sealed
            );
            return Err(Error::new(ErrorKind::Mismatch, what).into());
        }
        let after = reader.state()?.sealed.max(seen);
        let place = Place {
            folder: folder.to_owned(),
            file: segment_file,
            generation: self.machine.generation,
            epoch,
            numbers: 0..u32::MAX,
        };
        Ok(Capture {
            index,
            reader,
            frozen: PreserveReader::open(path, &reader.journal_id(), epoch)?,
            after,
            dirty_blocks: AtomicU64::new(0),
            roll: Roll {
                conductor: self,
                segments: SegmentRoll::new(place, &disk.owner)?,
                over_budget: false,
            },
        })
    }

    /// Captures the blocks that are written all the time, or the others.
    fn capture_blocks(
        &self,
        capture: &mut Capture<'_>,
        epoch: Epoch,
        hot: bool,
        budget: &AtomicU64,
    ) -> std::result::Result<(), GivenUp> {
        let Capture {
            index,
            reader,
            frozen,
            after,
            dirty_blocks,
            roll,
        } = capture;
        let (index, frozen) = (*index, &*frozen);
        let disk = &self.disks[index];
        let dirty = match hot {
            // To read the journal takes longer than to capture these, and guests are about to overwrite them.
            true => None,
            false => Some(reader.dirty(*after, epoch)?),
        };
        // Looked at after the records: what the ring could not take shows here.
        if reader
            .state()?
            .resync
            .is_some_and(|resync| !self.is_covered(&disk.config.name, resync))
        {
            return Err(GivenUp::NeedsScan(index, Reason::EveryBlock));
        }
        let current = roll.segments.current();
        let settings = Settings {
            keys: self.vault.keys(),
            current: &current,
            codec: self.config.codec,
            workers: self.config.workers,
            table: self.table(index)?,
            bytes_read: self.board.bytes_read(index),
            frozen: Some(frozen),
            throttle: &self.config.throttle,
        };
        let named = |extent: tracker::error::Result<Extent>| match extent {
            Ok(extent) => frozen.changed(extent, false).map(Ok).collect(),
            Err(error) => vec![Err(Error::from(error))],
        };
        let named = dirty
            .iter()
            .flat_map(|dirty| dirty.extents())
            .flat_map(named);
        let hot = hot.then(|| frozen.hot().map(|extent| extent.map_err(Error::from)));
        let extents = hot.into_iter().flatten().chain(named).inspect(|extent| {
            let count = extent.as_ref().map_or(0, |extent| extent.block_count);
            dirty_blocks.fetch_add(count, Ordering::Relaxed);
        });
        let pieces = settle_holes(disk.source.pieces(extents), frozen);
        run(
            &disk.source,
            Batches::new(pieces),
            &settings,
            |captured| match frozen.failure() {
                Some(_) => Ok(Flow::Stop),
                None => roll.take(&captured, budget),
            },
        )?;
        if roll.over_budget {
            return Err(GivenUp::NeedsScan(index, Reason::Overrun));
        }
        Ok(())
    }

    fn table(&self, index: usize) -> Result<&Table> {
        let table = self.tables.as_ref().and_then(|tables| tables.get(index));
        let no_table = || Error::new(ErrorKind::State, "The fingerprints are not open");
        table.ok_or_else(no_table)
    }

    /// Whether "every block changed as of this epoch" is taken care of by the base or a scan.
    fn is_covered(&self, name: &str, resync: Epoch) -> bool {
        let by_base = self
            .base
            .as_ref()
            .is_some_and(|base| base.disk(name).is_some() && resync <= base.epoch);
        let covers = |scan: &DiskScan| scan.is_complete() && resync <= scan.epoch;
        let by_scan = self.scan.disk(name).is_some_and(covers);
        by_base || by_scan
    }

    fn disk_point(
        &self,
        index: usize,
        reader: &JournalReader,
        captured: &CapturedDisk,
    ) -> DiskPoint {
        let disk = &self.disks[index];
        let name = &disk.config.name;
        let base = self.base.as_ref().and_then(|base| base.disk(name));
        let scan = self.scan.disk(name);
        let before = base.into_iter().flat_map(|disk| &disk.segments);
        let copied = scan.into_iter().flat_map(|disk| &disk.segments);
        let new = captured.made.iter().map(|(segment, _)| segment);
        DiskPoint {
            name: name.clone(),
            size_bytes: captured.size_bytes,
            block_bytes: tracker::extent::BLOCK_SIZE,
            journal: reader.journal_id(),
            dirty_blocks: captured.dirty_blocks,
            segments: before.chain(copied).chain(new).cloned().collect(),
        }
    }
}

/// Whether what was captured of a disk is the epoch, all of it, as it was at the cut.
fn check_whole(capture: &Capture<'_>, epoch: Epoch) -> std::result::Result<(), GivenUp> {
    let given_up = |why: &str| {
        let name = &capture.roll.conductor.disks[capture.index].config.name;
        let what = format!("Recovery point {epoch} is given up at disk {name}: {why}");
        GivenUp::NotKept(Error::new(ErrorKind::State, what))
    };
    // Asked in this order: a tracker that gives an epoch up says so before it lets a guest overwrite its blocks.
    if let Some(failure) = capture.frozen.failure() {
        return Err(given_up(failure.text()));
    }
    if capture.reader.state()?.closed != Some(epoch) {
        return Err(given_up(
            "the tracker was started anew and could not go on with it",
        ));
    }
    Ok(())
}

/// The segments of one disk and epoch, one after the other.
struct Roll<'a> {
    conductor: &'a Conductor,
    segments: SegmentRoll,
    over_budget: bool,
}

impl Roll<'_> {
    fn take(&mut self, captured: &Captured, budget: &AtomicU64) -> Result<Flow> {
        if self.conductor.stop.is_told() {
            return Err(Stop::error());
        }
        let bytes = captured.frame.stored.len() as u64;
        self.over_budget |= budget.load(Ordering::Relaxed) < bytes;
        if self.over_budget {
            return Ok(Flow::Stop);
        }
        budget.fetch_sub(bytes, Ordering::Relaxed);
        self.segments.append(&captured.frame)?;
        Ok(Flow::Continue)
    }
}
