//! Looking at every block: the first copy, and the comparison with all fingerprints.
//!
//! Order, for each slice, which is some segments: their files are written and synced; the scan's file
//! names them and moves the cursor behind them, durably; the fingerprint table takes them over; they are
//! queued for upload. A kill at any moment costs at most the slice in the making.
//!
//! Guests write meanwhile. What they change is in the journal, in epochs after the scan's, and is
//! captured with the next recovery point, which names the scan's segments before its own.

use std::time::Duration;

use tracker::extent::BLOCK_SIZE;

use super::conductor::{At, BUDGET_PAUSE, Conductor, Trouble};
use super::progress::{DiskScan, Stage};
use crate::capture::pipeline::{Captured, Flow, Settings, run};
use crate::capture::plan::Batches;
use crate::error::{Error, ErrorKind, Result};
use crate::segment::format::{Directory, SEGMENT_BYTES_TARGET};
use crate::segment::reference::SegmentRef;
use crate::segment::roll::{Place, SegmentRoll};
use crate::spool::files::sync_folder;
use crate::spool::segment_file;
use crate::status::{Part, Phase, ResyncStage, ResyncStatus};
use crate::upload::Job;
use crate::upload::retry::Stop;

/// Blocks after which a segment is finished although it is not full, so that the cursor moves on
/// where little has to be copied: 1 GiB.
const SLICE_BLOCKS: u64 = (1 << 30) / 4096;
/// The same where nothing has to be copied, so that no segment is made: 128 MiB.
const EMPTY_SLICE_BLOCKS: u64 = (128 << 20) / 4096;

/// Full segments after which a slice ends: while one ends nothing is captured.
const SLICE_SEGMENTS: u32 = 8;

/// What one slice came to.
struct Slice {
    cursor: u64,
    made: Vec<(SegmentRef, Directory)>,
}

impl Conductor {
    /// Scans up to the end of one slice.
    pub(super) fn scan_some(&mut self) -> std::result::Result<Duration, Trouble> {
        self.enter(Phase::Scanning);
        if self.is_over_budget()? {
            return Ok(BUDGET_PAUSE);
        }
        let Some((index, position)) = self.next_to_scan() else {
            return Ok(Duration::ZERO);
        };
        let slice = self.scan_slice(index, position).at(Part::Capture)?;
        self.board.note(Part::Capture, None);
        self.keep_slice(index, position, slice).at(Part::Spool)?;
        self.show_scan();
        Ok(Duration::ZERO)
    }

    /// The first disk that is not done: its index, and its place in the scan.
    fn next_to_scan(&self) -> Option<(usize, usize)> {
        let position = self.scan.disks.iter().position(DiskScan::is_running)?;
        let name = &self.scan.disks[position].name;
        let index = self
            .disks
            .iter()
            .position(|disk| disk.config.name == *name)?;
        Some((index, position))
    }

    fn scan_slice(&self, index: usize, position: usize) -> Result<Slice> {
        let gone = || Error::new(ErrorKind::State, "The scan has ended");
        let table = self
            .tables
            .as_ref()
            .and_then(|tables| tables.get(index))
            .ok_or_else(gone)?;
        let (disk, progress) = (&self.disks[index], &self.scan.disks[position]);
        let first = next_number(progress);
        let place = Place {
            folder: self.state.copy(),
            file: segment_file,
            generation: self.machine.generation,
            epoch: progress.epoch,
            numbers: first..first.saturating_add(self.segments_of_slice()),
        };
        let mut roll = SegmentRoll::new(place, &disk.owner)?;
        let current = roll.current();
        let settings = Settings {
            keys: self.vault.keys(),
            current: &current,
            codec: self.config.codec,
            workers: self.config.workers,
            table,
            bytes_read: self.board.bytes_read(index),
            frozen: None,
            throttle: &self.config.throttle,
        };
        let begin = progress.cursor;
        let mut cursor = begin;
        let mut empty = true;
        // What is behind these blocks is new on a disk that has grown meanwhile, and recorded as changed.
        let rest = disk.source.range(begin, progress.blocks);
        let batches = Batches::new(disk.source.pieces(std::iter::once(Ok(rest))));
        run(
            &disk.source,
            batches,
            &settings,
            |Captured { frame, end_block }| {
                if self.stop.is_told() {
                    return Err(Stop::error());
                }
                empty &= frame.runs.is_empty();
                roll.append(&frame)?;
                cursor = end_block;
                let slice_blocks = if empty {
                    EMPTY_SLICE_BLOCKS
                } else {
                    SLICE_BLOCKS
                };
                // Whoever asks for something does not wait for the end of a slice.
                let enough =
                    roll.is_full() || cursor - begin >= slice_blocks || !self.events.is_empty();
                Ok(if enough { Flow::Stop } else { Flow::Continue })
            },
        )?;
        let made = roll.finish()?;
        if !made.is_empty() {
            sync_folder(&self.state.copy())?;
        }
        Ok(Slice { cursor, made })
    }

    /// How many segments a slice may have, so that what waits for upload keeps to its budget.
    fn segments_of_slice(&self) -> u32 {
        let budget = self.config.spool_budget_bytes;
        let room = budget.saturating_sub(self.board.status().spool_bytes);
        // Some of them are open at the same time.
        let fitting = (room / SEGMENT_BYTES_TARGET / 2).max(1);
        u32::try_from(fitting).map_or(SLICE_SEGMENTS, |fitting| fitting.min(SLICE_SEGMENTS))
    }

    fn keep_slice(&mut self, index: usize, position: usize, slice: Slice) -> Result<()> {
        let mut scan = self.scan.clone();
        let progress = &mut scan.disks[position];
        progress.cursor = slice.cursor;
        let made = slice.made.iter().map(|(segment, _)| segment.clone());
        progress.segments.extend(made);
        let disk = progress.name.clone();
        self.state.save_scan(&scan)?;
        self.scan = scan;
        for (segment, directory) in slice.made {
            let epoch = segment.name.0.last_epoch;
            self.apply(index, epoch, &directory)?;
            let disk = disk.clone();
            self.uploader.queue(Job::Copied { disk, segment });
        }
        Ok(())
    }

    /// Takes a directory over into a table. If that fails, no table is trusted until all have been
    /// opened again and what is missing was applied.
    pub(super) fn apply(
        &mut self,
        disk: usize,
        epoch: tracker::extent::Epoch,
        directory: &Directory,
    ) -> Result<()> {
        let applied = match self.tables.as_mut().and_then(|tables| tables.get_mut(disk)) {
            Some(table) => table.apply(epoch, directory),
            None => Ok(()),
        };
        if applied.is_err() {
            self.tables = None;
        }
        applied
    }

    /// Shows on the board how far the scans are, and that no other disk needs one.
    pub(super) fn show_scan(&self) {
        self.show_known_scans();
        self.board.update(|status| {
            for disk in &mut status.disks {
                if self.scan.disk(&disk.name).is_none() {
                    disk.scanned_blocks = disk.blocks;
                }
            }
        });
    }

    /// Shows how far the scans are; others may turn out to be needed when the tracker is found.
    pub(super) fn show_known_scans(&self) {
        self.board.update(|status| {
            for disk in &mut status.disks {
                let scan = self.scan.disk(&disk.name);
                if let Some(scan) = scan {
                    let running = scan.is_running();
                    disk.scanned_blocks = if running { scan.cursor } else { disk.blocks };
                }
                let shown = scan.filter(|scan| scan.stage != Stage::Cancelled);
                disk.resync = shown.map(|scan| resync_status(scan, disk.size_bytes));
            }
        });
    }
}

fn resync_status(scan: &DiskScan, size_bytes: u64) -> ResyncStatus {
    let blocks = if scan.stage == Stage::Marked {
        0
    } else {
        scan.blocks
    };
    let bytes = |blocks: u64| blocks.saturating_mul(BLOCK_SIZE).min(size_bytes);
    let compared = bytes(scan.cursor.min(blocks));
    let percent = u128::from(scan.cursor.min(blocks)) * 100 / u128::from(blocks.max(1));
    ResyncStatus {
        reason: scan.reason.name().to_owned(),
        why: scan.reason.to_string(),
        stage: match scan.stage {
            Stage::Marked | Stage::Cancelled => ResyncStage::Marked,
            Stage::Running if scan.is_complete() => ResyncStage::Complete,
            Stage::Running => ResyncStage::Running,
        },
        cancellable: !scan.reason.is_necessary() && !scan.is_complete(),
        compared_bytes: compared,
        total_bytes: if blocks == 0 {
            size_bytes
        } else {
            bytes(blocks)
        },
        percent: percent as u64,
    }
}

/// A number that no segment of this scan has, also where an earlier pass made some.
fn next_number(progress: &DiskScan) -> u32 {
    let used = progress
        .segments
        .iter()
        .map(|segment| segment.name.0.number);
    used.max().map_or(0, |highest| highest + 1)
}
