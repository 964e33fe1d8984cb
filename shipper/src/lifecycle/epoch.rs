//! Making one recovery point: cut, capture, seal.
//!
//! Order: the epoch is cut on all disks at once; each disk's changed blocks become segments in the
//! spool; the manifest beside them; the seal, after which the epoch is durable here; the upload is
//! queued; the fingerprint tables take over what was captured; the tracker is told.
//!
//! Crash consistency: before the seal nothing counts, and the epoch is given up. After it the epoch
//! will be published, whoever dies: `reconcile` repeats what follows.
//!
//! The size of each disk is asked for after the cut. A disk grows within one epoch, because the tracker
//! does not let a cut and a growth overlap; whatever was written behind the old end was written after
//! that. So a size from before the cut could be too small for writes of the epoch, and these would be
//! cut off. One from after the cut may be that of a growth which came in between: then the end of the
//! disk reads as zeroes in this point, which holds nothing of the epoch, and the next point has it all.
//!
//! If a capture fails the recovery point is given up, and its changes belong to the next one.
//!
//! What it does not handle: blocks that guests overwrite while they are captured are in the point
//! with their later content. The next point has them again.

use std::sync::atomic::{AtomicU64, Ordering};

use tracker::control::protocol::CaptureOutcome;
use tracker::extent::{Epoch, Extent, blocks_of};
use tracker::journal::reader::JournalReader;

use super::conductor::{At, Conductor, Trouble};
use super::progress::DiskScan;
use super::reason::Reason;
use crate::capture::pipeline::{Captured, Flow, Settings, run};
use crate::capture::plan::Batches;
use crate::error::{Error, ErrorKind, Result};
use crate::segment::format::{Directory, SegmentName};
use crate::segment::reference::SegmentRef;
use crate::segment::writer::SegmentWriter;
use crate::spool::files::sync_folder;
use crate::spool::segment_file;
use crate::status::{Part, Phase};
use crate::upload::retry::Stop;
use crate::vault::manifest::{DiskPoint, Manifest};

/// Why a captured epoch is not sealed.
enum GivenUp {
    /// Something failed.
    Failed(Error),
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
struct CapturedDisk {
    made: Vec<(SegmentRef, Directory)>,
    dirty_blocks: u64,
}

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
        let epoch = match self.cut() {
            Ok(epoch) => epoch,
            Err(trouble) => {
                self.cuts = cuts;
                return Err(trouble);
            }
        };
        let sized = self.ask_for_sizes().map_err(GivenUp::Failed);
        match sized.and_then(|()| self.capture(epoch)) {
            Ok((manifest, captured)) => {
                self.waiting
                    .extend(cuts.into_iter().map(|(_, reply)| (epoch, reply)));
                self.sealed(manifest, captured)
            }
            Err(why) => {
                self.cuts = cuts;
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
    fn cut(&mut self) -> std::result::Result<Epoch, Trouble> {
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

    fn capture(&self, epoch: Epoch) -> std::result::Result<(Manifest, Vec<CapturedDisk>), GivenUp> {
        let folder = self.spool.begin(epoch)?;
        let no_link = || Error::new(ErrorKind::Unavailable, "The tracker is not known");
        let link = self.link.as_ref().ok_or_else(no_link)?;
        let budget = AtomicU64::new(self.config.spool_budget_bytes);
        let mut disks = Vec::new();
        let mut captured = Vec::new();
        for (index, reader) in link.readers.iter().enumerate() {
            let one = self.capture_disk(index, reader, epoch, &folder, &budget)?;
            disks.push(self.disk_point(index, reader, &one));
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
            disks,
        };
        self.spool.seal(&manifest, self.vault.keys())?;
        Ok((manifest, captured))
    }

    fn capture_disk(
        &self,
        index: usize,
        reader: &JournalReader,
        epoch: Epoch,
        folder: &std::path::Path,
        budget: &AtomicU64,
    ) -> std::result::Result<CapturedDisk, GivenUp> {
        let disk = &self.disks[index];
        let name = &disk.config.name;
        // A scan has seen whatever changed before it began, unless it did not get to its end.
        let scanned = self.scan.disk(name).filter(|scan| scan.is_complete());
        let after = reader
            .state()?
            .sealed
            .max(scanned.map_or(Epoch::ZERO, |scan| scan.epoch));
        let dirty = reader.dirty(after, epoch)?;
        // Looked at after the records: what the ring could not take shows here.
        if reader
            .state()?
            .resync
            .is_some_and(|resync| !self.is_covered(name, resync))
        {
            return Err(GivenUp::NeedsScan(index, Reason::EveryBlock));
        }
        let no_table = || Error::new(ErrorKind::State, "The fingerprints are not open");
        let table = self.tables.as_ref().and_then(|tables| tables.get(index));
        let settings = Settings {
            keys: self.vault.keys(),
            codec: self.config.codec,
            workers: self.config.workers,
            table: table.ok_or_else(no_table)?,
            bytes_read: self.board.bytes_read(index),
        };
        let dirty_blocks = AtomicU64::new(0);
        // A journal knows of a growth that came after the size of this point was asked for, and a
        // checkpoint does not tell epochs apart.
        let blocks = blocks_of(disk.source.size_bytes());
        let extents = dirty.extents().map(|extent| {
            let extent = before_block(extent.map_err(Error::from)?, blocks);
            dirty_blocks.fetch_add(extent.block_count, Ordering::Relaxed);
            Ok(extent)
        });
        let batches = Batches::new(disk.source.pieces(extents));
        let mut roll = Roll {
            conductor: self,
            index,
            epoch,
            folder,
            writer: None,
            made: Vec::new(),
            over_budget: false,
        };
        run(&disk.source, batches, &settings, |captured| {
            roll.take(&captured, budget)
        })?;
        if roll.over_budget {
            return Err(GivenUp::NeedsScan(index, Reason::Overrun));
        }
        roll.finish_one()?;
        let made = roll.made;
        Ok(CapturedDisk {
            made,
            dirty_blocks: dirty_blocks.into_inner(),
        })
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
            size_bytes: disk.source.size_bytes(),
            block_bytes: tracker::extent::BLOCK_SIZE,
            journal: reader.journal_id(),
            dirty_blocks: captured.dirty_blocks,
            segments: before.chain(copied).chain(new).cloned().collect(),
        }
    }

    /// What follows a seal. None of it can take the epoch back.
    fn sealed(
        &mut self,
        manifest: Manifest,
        captured: Vec<CapturedDisk>,
    ) -> std::result::Result<(), Trouble> {
        let epoch = manifest.epoch;
        self.base = Some(manifest);
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

/// The part of an extent that lies before a block.
fn before_block(extent: Extent, end_block: u64) -> Extent {
    let behind = end_block.saturating_sub(extent.first_block);
    Extent {
        block_count: extent.block_count.min(behind),
        ..extent
    }
}

/// The segments of one disk and epoch, one after the other.
struct Roll<'a> {
    conductor: &'a Conductor,
    index: usize,
    epoch: Epoch,
    folder: &'a std::path::Path,
    writer: Option<SegmentWriter>,
    made: Vec<(SegmentRef, Directory)>,
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
        self.append(&captured.frame)?;
        Ok(Flow::Continue)
    }

    fn append(&mut self, frame: &crate::segment::frame::EncodedFrame) -> Result<()> {
        if frame.runs.is_empty() {
            return Ok(());
        }
        let disk = &self.conductor.disks[self.index];
        let mut writer = match self.writer.take() {
            Some(writer) => writer,
            None => {
                let name = SegmentName {
                    generation: self.conductor.machine.generation,
                    first_epoch: self.epoch,
                    last_epoch: self.epoch,
                    number: self.made.len() as u32,
                };
                let file = segment_file(&disk.config.name, &name);
                SegmentWriter::create(&self.folder.join(file), name)?
            }
        };
        writer.append(frame)?;
        let full = writer.is_full();
        self.writer = Some(writer);
        if full { self.finish_one() } else { Ok(()) }
    }

    fn finish_one(&mut self) -> Result<()> {
        if let Some(writer) = self.writer.take() {
            let owner = &self.conductor.disks[self.index].owner;
            self.made
                .push(writer.finish(owner, self.conductor.vault.keys())?);
        }
        Ok(())
    }
}
