//! A model of the shipper: what it does in which order, and what of it is durable.
//!
//! Spool, scans and vault are durable as soon as a step says so. The fingerprint tables are not: an entry
//! is durable when its table is synced, which is before an epoch is released; a power cut keeps any of
//! what an entry held since. At the start what is in the spool is applied again.
//!
//! Each call of [`Shipper::step`] ends with at most one request to the tracker, so that either of them can
//! go down between any two.

use std::collections::VecDeque;
use std::path::Path;
use std::time::Duration;

use super::guest::Guest;
use super::storage::{Rng, journal_path};
use super::{Break, Mode};
use crate::epoch::{Machine, MachineStatus};
use crate::extent::{Epoch, Extent};
use crate::journal::reader::JournalReader;

/// Blocks that a scan looks at in one step.
const SLICE_BLOCKS: usize = 24;

/// Blocks and what they hold.
type Copied = Vec<(usize, u32)>;

/// A recovery point without its data.
#[derive(Clone, Debug)]
struct Point {
    epoch: Epoch,
    journals: Vec<String>,
}

#[derive(Clone, Debug)]
struct Sealed {
    point: Point,
    /// For each disk: of its scan, and captured.
    copied: Vec<Copied>,
    /// Fingerprints that are applied.
    published: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Marked,
    Running,
}

#[derive(Clone, Debug)]
struct Scan {
    stage: Stage,
    epoch: Epoch,
    journal: String,
    cursor: usize,
    blocks: usize,
    copied: Copied,
}

/// A fingerprint, and the epoch of what it is of.
type Print = Option<(u32, Epoch)>;

#[derive(Clone, Debug, Default)]
struct Entry {
    /// The first is durable, the last is what the table says.
    prints: Vec<Print>,
}

impl Entry {
    fn print(&self) -> Print {
        self.prints.last().copied().flatten()
    }

    fn sync(&mut self) {
        self.prints = vec![self.print()];
    }
}

/// An epoch that is being captured.
#[derive(Debug)]
struct Capture {
    epoch: Epoch,
    copied: Vec<Copied>,
}

struct Link {
    readers: Vec<JournalReader>,
}

pub struct Shipper {
    mode: Mode,
    rng: Rng,
    /// What the newest recovery point holds.
    vault: Vec<Vec<u32>>,
    newest: Option<Point>,
    spool: VecDeque<Sealed>,
    scans: Vec<Option<Scan>>,
    tables: Vec<Vec<Entry>>,
    link: Option<Link>,
    capture: Option<Capture>,
    /// What is about to be asked of the tracker.
    pub request: Option<Request>,
    /// When the bit of each block was cleared last: see [`Break::ReleaseByBit`].
    released: Vec<Vec<u64>>,
    pub points: u64,
    /// No more points are made.
    pub draining: bool,
}

/// What the tracker is asked for, and what follows the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    Cut(Epoch),
    /// A cut whose epoch is given up at once, so that a scan has one of its own.
    CutForScan(Epoch),
    Seal(Epoch),
    Abandon(Epoch),
    /// The same; then the scans begin.
    AbandonForScan(Epoch),
    Commit(Epoch),
    Revert,
}

/// What is not as it must be.
pub type Checked = Result<(), String>;

impl Shipper {
    pub fn new(guest: &Guest, mode: Mode, rng: Rng) -> Self {
        let lengths: Vec<usize> = guest.disks.iter().map(|disk| disk.blocks.len()).collect();
        let entry = Entry { prints: vec![None] };
        Self {
            mode,
            rng,
            vault: lengths.iter().map(|&length| vec![0; length]).collect(),
            newest: None,
            spool: VecDeque::new(),
            scans: vec![None; lengths.len()],
            tables: lengths
                .iter()
                .map(|&length| vec![entry.clone(); length])
                .collect(),
            link: None,
            capture: None,
            request: None,
            released: lengths.iter().map(|&length| vec![0; length]).collect(),
            points: 0,
            draining: false,
        }
    }

    fn base(&self) -> Option<&Point> {
        let sealed = self.spool.back().map(|sealed| &sealed.point);
        sealed.or(self.newest.as_ref())
    }

    fn base_epoch(&self) -> Epoch {
        self.base().map_or(Epoch::ZERO, |base| base.epoch)
    }

    fn highest(&self) -> Epoch {
        let scans = self.scans.iter().flatten().map(|scan| scan.epoch);
        scans.max().unwrap_or_default().max(self.base_epoch())
    }

    /// What vault and spool hold of a block, and a scan of it if that is to be counted.
    fn held(&self, disk: usize, index: usize, with_scan: bool) -> u32 {
        let of = |copied: &Copied| {
            let last = copied.iter().rev().find(|entry| entry.0 == index);
            last.map(|entry| entry.1)
        };
        let scanned = self.scans[disk].as_ref().filter(|_| with_scan);
        scanned
            .and_then(|scan| of(&scan.copied))
            .or_else(|| {
                self.spool
                    .iter()
                    .rev()
                    .find_map(|sealed| of(&sealed.copied[disk]))
            })
            .unwrap_or(self.vault[disk][index])
    }

    fn apply(&mut self, disk: usize, epoch: Epoch, copied: &Copied) {
        for &(index, content) in copied {
            // What is zero is kept as unknown.
            let print = (content != 0).then_some((content, epoch));
            self.tables[disk][index].prints.push(print);
        }
    }

    /// The process begins: what is in the spool is applied again, and what is of lost epochs forgotten.
    fn open_tables(&mut self) {
        for disk in 0..self.tables.len() {
            let scanned = self.scans[disk].as_ref().map(|scan| scan.epoch);
            let trusted = self.base_epoch().max(scanned.unwrap_or_default());
            for entry in &mut self.tables[disk] {
                if entry.print().is_some_and(|(_, epoch)| epoch > trusted) {
                    entry.prints.push(None);
                }
            }
            for number in 0..self.spool.len() {
                let sealed = &self.spool[number];
                let (epoch, copied) = (sealed.point.epoch, sealed.copied[disk].clone());
                self.apply(disk, epoch, &copied);
            }
            if let Some(scan) = &self.scans[disk] {
                let (epoch, copied) = (scan.epoch, scan.copied.clone());
                self.apply(disk, epoch, &copied);
            }
        }
        self.sync_tables();
    }

    fn sync_tables(&mut self) {
        self.tables.iter_mut().flatten().for_each(Entry::sync);
    }

    /// The process is killed, and starts again.
    pub fn restart(&mut self) {
        self.leave();
        self.open_tables();
    }

    /// The tracker is gone, or what it answered is.
    pub fn leave(&mut self) {
        self.link = None;
        self.capture = None;
        self.request = None;
    }

    /// The machine lost its power.
    pub fn cut_power(&mut self) {
        let mode = self.rng.below(3);
        for entry in self.tables.iter_mut().flatten() {
            let last = entry.prints.len() - 1;
            let left = match mode {
                0 => 0,
                1 => last,
                _ => self.rng.index(last + 1),
            };
            entry.prints = vec![entry.prints[left]];
        }
        self.restart();
    }

    /// The spool is lost, from some epoch on.
    pub fn lose_spool(&mut self) {
        let kept = self.rng.index(self.spool.len() + 1);
        while self.spool.len() > kept && self.spool.back().is_some_and(|sealed| !sealed.published) {
            self.spool.pop_back();
        }
        let base = self.base_epoch();
        for scan in self.scans.iter_mut().flatten() {
            // It compared with fingerprints of what is lost.
            scan.stage = Stage::Marked;
            scan.epoch = base;
            scan.copied.clear();
        }
        self.restart();
    }

    pub fn is_scanning(&self) -> bool {
        self.scans
            .iter()
            .flatten()
            .any(|scan| scan.stage == Stage::Running && scan.cursor < scan.blocks)
    }

    /// Whether all that was captured is released, and nothing is under way.
    pub fn is_quiet(&self) -> bool {
        self.spool.is_empty()
            && self.capture.is_none()
            && self.request.is_none()
            && self.scans.iter().all(Option::is_none)
    }

    /// Does something, or prepares a request.
    pub fn step(&mut self, machine: &Machine, guest: &Guest, folder: &Path) -> Checked {
        if self.request.is_some() {
            return Ok(());
        }
        if self.link.is_none() {
            self.connect(machine, folder);
            return Ok(());
        }
        if self.capture.is_some() {
            return self.capture_some(guest);
        }
        let upload = self.spool.iter().any(|sealed| !sealed.published);
        match self.rng.below(4) {
            0 if upload => self.upload(),
            1 if self.spool.front().is_some_and(|sealed| sealed.published) => self.release(machine),
            _ if self.is_scanning() => self.scan_some(guest),
            _ if self.spool.len() < 4 && !self.draining => {
                self.request = Some(Request::Cut(self.highest().next()));
            }
            _ => {}
        }
        Ok(())
    }

    fn connect(&mut self, machine: &Machine, folder: &Path) {
        let status = machine.status();
        let readers =
            (0..status.disks.len()).map(|disk| JournalReader::open(&journal_path(folder, disk)));
        let Ok(readers) = readers.collect::<Result<Vec<_>, _>>() else {
            return;
        };
        if let Some(epoch) = status.closed {
            let sealed = self.seals(epoch, &status);
            self.request = Some(if sealed {
                Request::Seal(epoch)
            } else {
                Request::Abandon(epoch)
            });
            return;
        }
        if self.is_lost(&status) {
            self.request = Some(Request::Revert);
            return;
        }
        if self.wanted_scans(&status).iter().any(|&wanted| wanted) {
            self.request = Some(Request::CutForScan(self.highest().next()));
            return;
        }
        self.link = Some(Link { readers });
    }

    /// Whether a closed epoch is sealed here, with the journals that the tracker has.
    fn seals(&self, epoch: Epoch, status: &MachineStatus) -> bool {
        let same = |point: &Point| {
            let served = status.disks.iter().map(|disk| &disk.journal_id);
            served.eq(&point.journals)
        };
        self.spool.iter().any(|sealed| sealed.point.epoch == epoch) && self.base().is_some_and(same)
    }

    fn is_lost(&self, status: &MachineStatus) -> bool {
        status.sealed > status.committed && status.sealed > self.base_epoch()
    }

    /// Which disks have to be scanned from their beginning.
    fn wanted_scans(&self, status: &MachineStatus) -> Vec<bool> {
        let disks = status.disks.iter().enumerate();
        let wanted = disks.map(|(disk, served)| {
            let fails = self.base().is_none_or(|base| {
                base.journals[disk] != served.journal_id
                    || status.committed > base.epoch
                    || served.resync.is_some_and(|resync| resync > base.epoch)
            });
            match &self.scans[disk] {
                Some(scan) if scan.stage == Stage::Running => {
                    scan.journal != served.journal_id
                        || served.resync.is_some_and(|resync| resync > scan.epoch)
                }
                Some(_) => true,
                None => fails,
            }
        });
        wanted.collect()
    }

    /// The tracker answered; `None`: with an error.
    pub fn answered(
        &mut self,
        request: Request,
        cut: Option<Epoch>,
        machine: &Machine,
        guest: &mut Guest,
    ) {
        self.request = None;
        match (request, cut) {
            (Request::Cut(minimum), Some(epoch)) => {
                if epoch < minimum {
                    // The numbers of a new journal begin anew; the next one is above.
                    self.request = Some(Request::Abandon(epoch));
                } else {
                    let copied = Vec::new();
                    self.capture = Some(Capture { epoch, copied });
                }
            }
            (Request::CutForScan(_), Some(epoch)) => {
                self.request = Some(Request::AbandonForScan(epoch))
            }
            (Request::AbandonForScan(epoch), Some(_)) => self.begin_scans(epoch, machine, guest),
            (Request::Commit(epoch), Some(_)) => {
                self.released_bits(epoch, guest);
                self.spool.pop_front();
            }
            (_, Some(_)) => {}
            (_, None) => self.leave(),
        }
    }

    fn begin_scans(&mut self, closed: Epoch, machine: &Machine, guest: &Guest) {
        let status = machine.status();
        let settled = |resync: Option<Epoch>| resync.is_none_or(|resync| resync <= closed);
        if closed <= self.highest() || !status.disks.iter().all(|disk| settled(disk.resync)) {
            return;
        }
        for (disk, wanted) in self.wanted_scans(&status).into_iter().enumerate() {
            if wanted {
                let before = self.scans[disk].take();
                self.scans[disk] = Some(Scan {
                    stage: Stage::Running,
                    epoch: closed,
                    journal: status.disks[disk].journal_id.clone(),
                    cursor: 0,
                    blocks: guest.disks[disk].present(),
                    copied: before.map_or(Vec::new(), |scan| scan.copied),
                });
            }
        }
    }

    fn scan_some(&mut self, guest: &Guest) {
        for disk in 0..self.scans.len() {
            let Some(scan) = &self.scans[disk] else {
                continue;
            };
            if scan.cursor >= scan.blocks {
                continue;
            }
            let (epoch, end) = (scan.epoch, (scan.cursor + SLICE_BLOCKS).min(scan.blocks));
            let copied = self.differing(disk, scan.cursor..end, guest);
            self.apply(disk, epoch, &copied);
            if let Some(scan) = &mut self.scans[disk] {
                scan.copied.extend(copied);
                scan.cursor = end;
            }
            return;
        }
    }

    /// The blocks that do not have the content that their fingerprints say.
    fn differing(&self, disk: usize, range: std::ops::Range<usize>, guest: &Guest) -> Copied {
        let content = |index: usize| (index, guest.disks[disk].content(index));
        let known = |&(index, content): &(usize, u32)| {
            self.tables[disk][index]
                .print()
                .is_some_and(|print| print.0 == content)
        };
        range.map(content).filter(|block| !known(block)).collect()
    }

    /// Captures one disk; after the last one the epoch is sealed here.
    fn capture_some(&mut self, guest: &Guest) -> Checked {
        let Some(mut capture) = self.capture.take() else {
            return Ok(());
        };
        let disk = capture.copied.len();
        match self.capture_disk(disk, capture.epoch, guest) {
            Ok(copied) => capture.copied.push(copied),
            Err(needs_scan) => {
                if needs_scan {
                    self.mark(disk);
                }
                self.leave();
                self.request = Some(Request::Abandon(capture.epoch));
                return Ok(());
            }
        }
        if capture.copied.len() < self.tables.len() {
            self.capture = Some(capture);
            return Ok(());
        }
        self.seal(capture, guest)
    }

    fn mark(&mut self, disk: usize) {
        let before = self.scans[disk].take();
        self.scans[disk] = Some(Scan {
            stage: Stage::Marked,
            epoch: before.as_ref().map_or(Epoch::ZERO, |scan| scan.epoch),
            journal: String::new(),
            cursor: 0,
            blocks: 0,
            copied: before.map_or(Vec::new(), |scan| scan.copied),
        });
    }

    /// What has to be copied of a disk; the error is whether it has to be scanned.
    fn capture_disk(&self, disk: usize, epoch: Epoch, guest: &Guest) -> Result<Copied, bool> {
        let reader = &self.link.as_ref().ok_or(false)?.readers[disk];
        let scan = self.scans[disk].as_ref();
        let scanned = scan
            .filter(|scan| scan.stage == Stage::Running)
            .map(|scan| scan.epoch);
        let sealed = reader.state().map_err(|_| false)?.sealed;
        let after = sealed.max(scanned.unwrap_or_default());
        let dirty = dirty_blocks(reader, after, epoch, guest, disk).map_err(|_| false)?;
        let resync = reader.state().map_err(|_| false)?.resync;
        let covered = |resync: Epoch| resync <= self.base_epoch() || Some(resync) <= scanned;
        if resync.is_some_and(|resync| !covered(resync)) {
            return Err(true);
        }
        let copied = dirty
            .1
            .into_iter()
            .filter(|&index| self.bit_is_set(disk, index, guest));
        let copied = copied.flat_map(|index| self.differing(disk, index..index + 1, guest));
        Ok(copied.collect())
    }

    fn seal(&mut self, capture: Capture, guest: &Guest) -> Checked {
        let Some(link) = &self.link else {
            return Ok(());
        };
        let epoch = capture.epoch;
        let journals = link.readers.iter().map(JournalReader::journal_id).collect();
        let mut copied = Vec::new();
        for (disk, captured) in capture.copied.iter().enumerate() {
            let scanned = self.scans[disk]
                .as_ref()
                .map_or(Vec::new(), |scan| scan.copied.clone());
            copied.push(
                scanned
                    .into_iter()
                    .chain(captured.iter().copied())
                    .collect(),
            );
        }
        self.spool.push_back(Sealed {
            point: Point { epoch, journals },
            copied,
            published: false,
        });
        for scan in &mut self.scans {
            if let Some(scan) = scan.as_mut().filter(|scan| scan.epoch < epoch) {
                scan.copied.clear();
            }
            if scan
                .as_ref()
                .is_some_and(|scan| scan.epoch < epoch && scan.stage == Stage::Running)
            {
                *scan = None;
            }
        }
        for (disk, captured) in capture.copied.iter().enumerate() {
            self.apply(disk, epoch, captured);
        }
        self.points += 1;
        self.request = Some(Request::Seal(epoch));
        self.check_point(guest)
    }

    /// Every block of the newest point is as it was at a moment since its cut.
    fn check_point(&self, guest: &Guest) -> Checked {
        for (number, disk) in guest.disks.iter().enumerate() {
            for index in 0..disk.present() {
                let held = self.held(number, index, false);
                if !disk.held_since_cut(index, held) {
                    let (block, now) = (disk.blocks[index], disk.content(index));
                    let epoch = self.base_epoch();
                    return Err(format!(
                        "point {epoch} has content {held} of block {block} of disk {number}, which had none \
                         such since the cut and has {now}"
                    ));
                }
            }
        }
        Ok(())
    }

    fn upload(&mut self) {
        let Some(sealed) = self.spool.iter_mut().find(|sealed| !sealed.published) else {
            return;
        };
        sealed.published = true;
        for (disk, copied) in sealed.copied.iter().enumerate() {
            for &(index, content) in copied {
                self.vault[disk][index] = content;
            }
        }
        self.newest = Some(sealed.point.clone());
    }

    fn release(&mut self, machine: &Machine) {
        if !self.mode.breaks(Break::FingerprintBeforeDurable) {
            self.sync_tables();
        }
        let Some(epoch) = self.spool.front().map(|sealed| sealed.point.epoch) else {
            return;
        };
        // A tracker that lost its journal knows of no such epoch; it has nothing to forget.
        if machine.status().sealed >= epoch {
            self.request = Some(Request::Commit(epoch));
        } else {
            self.spool.pop_front();
        }
    }

    /// With one bit for each block a release clears those of the blocks that were captured.
    fn released_bits(&mut self, epoch: Epoch, guest: &mut Guest) {
        guest.time += 1;
        let front = self
            .spool
            .front()
            .filter(|sealed| sealed.point.epoch == epoch);
        for (disk, copied) in front
            .iter()
            .flat_map(|sealed| sealed.copied.iter().enumerate())
        {
            for &(index, _) in copied {
                self.released[disk][index] = guest.time;
            }
        }
    }

    fn bit_is_set(&self, disk: usize, index: usize, guest: &Guest) -> bool {
        !self.mode.breaks(Break::ReleaseByBit)
            || guest.admitted[disk][index] > self.released[disk][index]
    }

    /// After a crash: every block that differs from what vault and spool hold is reported for what the
    /// shipper will ask for.
    pub fn check_coverage(&self, machine: &Machine, guest: &Guest, folder: &Path) -> Checked {
        let status = machine.status();
        let wanted = self.wanted_scans(&status);
        for (disk, _) in wanted.iter().enumerate().filter(|(_, wanted)| !**wanted) {
            let reader =
                JournalReader::open(&journal_path(folder, disk)).map_err(|error| error.chain())?;
            let after = match status.closed {
                Some(closed) if self.seals(closed, &status) => closed,
                _ if self.is_lost(&status) => status.committed,
                _ => status.sealed,
            };
            self.check_disk(disk, &reader, after, guest)?;
        }
        Ok(())
    }

    fn check_disk(
        &self,
        disk: usize,
        reader: &JournalReader,
        after: Epoch,
        guest: &Guest,
    ) -> Checked {
        let scan = self.scans[disk].as_ref();
        let after = scan.map_or(after, |scan| after.max(scan.epoch));
        let (all, dirty) = dirty_blocks(reader, after, Epoch(u64::MAX), guest, disk)?;
        let looked_at = scan.map_or(guest.disks[disk].present(), |scan| scan.cursor);
        for index in 0..looked_at {
            let (held, content) = (
                self.held(disk, index, true),
                guest.disks[disk].content(index),
            );
            let reported =
                all || dirty.binary_search(&index).is_ok() && self.bit_is_set(disk, index, guest);
            if held != content && !reported {
                let block = guest.disks[disk].blocks[index];
                return Err(format!(
                    "block {block} of disk {disk} is {content}, held is {held}, and it is not reported as \
                     changed after {after}"
                ));
            }
        }
        Ok(())
    }

    /// At the end: the vault has what the disks have.
    pub fn check_end(&self, guest: &Guest) -> Checked {
        for (number, disk) in guest.disks.iter().enumerate() {
            for index in 0..disk.present() {
                let (held, content) = (self.vault[number][index], disk.content(index));
                if held != content {
                    let block = disk.blocks[index];
                    return Err(format!(
                        "at the end block {block} of disk {number} is {content}, the vault has {held}"
                    ));
                }
            }
        }
        Ok(())
    }
}

/// The blocks looked at that a journal reports, in order, and whether it reports all.
fn dirty_blocks(
    reader: &JournalReader,
    after: Epoch,
    through: Epoch,
    guest: &Guest,
    disk: usize,
) -> Result<(bool, Vec<usize>), String> {
    let dirty = reader
        .dirty(after, through)
        .map_err(|error| error.chain())?;
    let mut blocks = Vec::new();
    let present = guest.disks[disk].present();
    for extent in dirty.extents() {
        let extent: Extent = extent.map_err(|error| error.chain())?;
        blocks.extend(
            guest.disks[disk]
                .within(extent)
                .filter(|&index| index < present),
        );
    }
    blocks.dedup();
    Ok((dirty.all(), blocks))
}

/// How long a cut waits for writes: in a world of one thread nothing comes by waiting.
pub const DRAIN: Duration = Duration::ZERO;
