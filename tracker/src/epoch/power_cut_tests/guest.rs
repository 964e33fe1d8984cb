//! The disks of the machine and who writes to them.
//!
//! A disk is known by some of its blocks: hot regions, their ends, a few far away. Each has a history of
//! contents since the last flush that counts for it; a power cut leaves any of them. Contents are few, so
//! that a block often has one again that it had before.

use std::rc::Rc;
use std::sync::{Arc, Mutex};

use super::storage::{Down, Rng};
use super::{Break, Mode};
use crate::epoch::{Admission, Era, Machine, Operation, Waiter};
use crate::extent::{BLOCK_SIZE, Extent};

const MIB: u64 = 1 << 20;
const REGION_BLOCKS: u64 = MIB / BLOCK_SIZE;
/// Contents that writes choose from; zero is what trims leave.
const CONTENTS: u64 = 4;
/// Contents that a torn write leaves begin here. None comes twice.
const TORN: u32 = 1 << 20;

/// A block.
#[derive(Clone, Debug)]
struct Cell {
    /// Contents that it may have after a power cut, and the write of each. The last is what it has now.
    history: Vec<(u32, usize)>,
    /// The last write in the history that was answered.
    answered: usize,
    /// Contents that it had since the last cut.
    since_cut: Vec<u32>,
}

impl Cell {
    fn content(&self) -> u32 {
        self.history.last().map_or(0, |last| last.0)
    }

    fn change(&mut self, content: u32, token: usize) {
        self.history.push((content, token));
        self.since_cut.push(content);
    }

    fn answer(&mut self, token: usize) {
        if let Some(at) = self.history.iter().position(|entry| entry.1 == token) {
            self.answered = self.answered.max(at);
        }
    }

    fn flush(&mut self) {
        self.history.drain(..self.answered);
        self.answered = 0;
    }

    fn cut_power(&mut self, rng: &mut Rng, torn: &mut u32) {
        if self.history.len() == 1 {
            return;
        }
        let mut left = self.history[rng.index(self.history.len())].0;
        if rng.once_in(10) {
            *torn += 1;
            left = *torn;
        }
        self.history = vec![(left, 0)];
        self.answered = 0;
    }
}

/// A disk.
#[derive(Clone, Debug)]
pub struct Disk {
    pub size_bytes: u64,
    /// Clients know of so much.
    shown_bytes: u64,
    /// The blocks that are looked at, in order; some lie behind the end.
    pub blocks: Rc<Vec<u64>>,
    cells: Vec<Cell>,
}

impl Disk {
    fn new(size_mib: u64, rng: &mut Rng) -> Self {
        let mut blocks = Vec::new();
        let regions = size_mib.max(1);
        for _ in 0..2 + rng.below(5) {
            let first = rng.below(regions) * REGION_BLOCKS;
            blocks.extend([first, first + 1, first + 2, first + REGION_BLOCKS - 1]);
            blocks.push(first + REGION_BLOCKS + rng.below(4));
        }
        for _ in 0..rng.below(16) {
            blocks.push(rng.below(regions) * REGION_BLOCKS + rng.below(REGION_BLOCKS));
        }
        // Where the disk will grow to.
        for _ in 0..3 {
            blocks.push((regions + rng.below(12)) * REGION_BLOCKS);
        }
        blocks.sort_unstable();
        blocks.dedup();
        let cells = blocks.iter().map(|_| {
            let content = rng.below(CONTENTS) as u32;
            Cell {
                history: vec![(content, 0)],
                answered: 0,
                since_cut: vec![content],
            }
        });
        let mut disk = Self {
            size_bytes: size_mib * MIB,
            shown_bytes: size_mib * MIB,
            cells: cells.collect(),
            blocks: Rc::new(blocks),
        };
        for index in disk.present()..disk.cells.len() {
            disk.cells[index].history = vec![(0, 0)];
        }
        disk
    }

    /// How many of the blocks are on the disk.
    pub fn present(&self) -> usize {
        let end = self.size_bytes / BLOCK_SIZE;
        self.blocks.partition_point(|&block| block < end)
    }

    /// What a block holds.
    pub fn content(&self, index: usize) -> u32 {
        self.cells[index].content()
    }

    /// Whether a block held this at a moment since the last cut.
    pub fn held_since_cut(&self, index: usize, content: u32) -> bool {
        self.cells[index].since_cut.contains(&content)
    }

    /// The blocks that lie in an extent.
    pub fn within(&self, extent: Extent) -> std::ops::Range<usize> {
        let at = |block| self.blocks.partition_point(|&known| known < block);
        at(extent.first_block)..at(extent.end_block())
    }

    pub fn flush(&mut self) {
        self.cells.iter_mut().for_each(Cell::flush);
    }
}

/// How far a write is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// It waits for its regions; its record stood in the ring in this era.
    Waiting(Era),
    Submitted,
    Done,
}

#[derive(Clone, Debug)]
struct Write {
    token: usize,
    disk: usize,
    extent: Extent,
    /// For each block in the extent that is looked at.
    contents: Vec<u32>,
    admission: Admission,
    stage: Stage,
}

impl Write {
    fn waits(&self) -> bool {
        matches!(self.stage, Stage::Waiting(_))
    }
}

/// The writes that were woken.
#[derive(Debug, Default)]
struct Woken(Mutex<Vec<usize>>);

impl Waiter for Woken {
    fn wake(&self, token: usize) {
        self.0.lock().unwrap().push(token);
    }
}

#[derive(Clone, Debug)]
pub struct Guest {
    pub disks: Vec<Disk>,
    rng: Rng,
    mode: Mode,
    writes: Vec<Write>,
    woken: Arc<Woken>,
    next_token: usize,
    torn: u32,
    /// Each admission and each commit takes the next number: see [`Break::ReleaseByBit`].
    pub time: u64,
    /// When each block was admitted last.
    pub admitted: Vec<Vec<u64>>,
}

/// What is about to be written.
struct Plan {
    disk: usize,
    extent: Extent,
    operation: Operation,
    contents: Vec<u32>,
    token: usize,
}

impl Guest {
    pub fn new(disks: usize, mode: Mode, mut rng: Rng) -> Self {
        let disks: Vec<Disk> = (0..disks)
            .map(|_| {
                let size_mib = 5 + rng.below(100) + 120 * rng.below(2);
                Disk::new(size_mib, &mut rng)
            })
            .collect();
        Self {
            admitted: disks
                .iter()
                .map(|disk| vec![0; disk.blocks.len()])
                .collect(),
            disks,
            rng,
            mode,
            writes: Vec::new(),
            woken: Arc::default(),
            next_token: 1,
            torn: TORN,
            time: 1,
        }
    }

    fn plan(&mut self) -> Option<Plan> {
        if self.writes.len() > 8 {
            return None;
        }
        let disk = self.rng.index(self.disks.len());
        let known = &self.disks[disk];
        let end = known.shown_bytes / BLOCK_SIZE;
        let first = known.blocks[self.rng.index(known.present().max(1))];
        let length = match self.rng.below(16) {
            0..11 => 1 + self.rng.below(3),
            11..14 => 1 + self.rng.below(600),
            14 => self.rng.below(10) * REGION_BLOCKS + 1,
            _ => (60 + self.rng.below(8)) * REGION_BLOCKS,
        };
        let block_count = length.min(end.saturating_sub(first));
        if block_count == 0 {
            return None;
        }
        let mut disk = disk;
        let mut extent = Extent {
            first_block: first,
            block_count,
        };
        // Where one waits another comes often.
        if self.rng.once_in(4)
            && let Some(waiting) = self.writes.iter().find(|write| write.waits())
        {
            (disk, extent) = (waiting.disk, waiting.extent);
        }
        let operation = match self.rng.below(8) {
            0 => Operation::Trim,
            1 => Operation::WriteZeroes,
            _ => Operation::Write,
        };
        let content = match operation {
            Operation::Write => self.rng.below(CONTENTS) as u32,
            _ => 0,
        };
        let contents = vec![content; self.disks[disk].within(extent).len()];
        self.next_token += 1;
        Some(Plan {
            disk,
            extent,
            operation,
            contents,
            token: self.next_token,
        })
    }

    /// The admission of a write.
    fn admitted(&mut self, machine: &Machine, plan: Plan, admission: Admission) {
        self.time += 1;
        for index in self.disks[plan.disk].within(plan.extent) {
            self.admitted[plan.disk][index] = self.time;
        }
        let guarded = !self.mode.breaks(Break::DataBeforeIntent);
        let stage = match admission.waits.filter(|_| guarded) {
            Some(era) => {
                let waiter: Arc<dyn Waiter> = self.woken.clone();
                machine.await_regions(plan.disk, plan.extent, era, &waiter, plan.token);
                Stage::Waiting(era)
            }
            None => Stage::Submitted,
        };
        self.writes.push(Write {
            token: plan.token,
            disk: plan.disk,
            extent: plan.extent,
            contents: plan.contents,
            admission,
            stage,
        });
        if stage == Stage::Submitted && self.rng.once_in(2) {
            self.reach_disk(self.writes.len() - 1);
        }
    }

    /// The data of a write that was submitted reaches the disk.
    fn reach_disk(&mut self, number: usize) {
        let write = &mut self.writes[number];
        if write.stage != Stage::Submitted {
            return;
        }
        write.stage = Stage::Done;
        let disk = &mut self.disks[write.disk];
        for (index, &content) in disk.within(write.extent).zip(&write.contents) {
            disk.cells[index].change(content, write.token);
        }
    }

    /// The answer of a write whose data reached the disk.
    fn answer(&mut self, machine: &Machine, number: usize) {
        if self.writes[number].stage != Stage::Done {
            return;
        }
        let write = self.writes.remove(number);
        let disk = &mut self.disks[write.disk];
        for index in disk.within(write.extent) {
            disk.cells[index].answer(write.token);
        }
        machine.complete(0, write.admission);
    }

    /// Those that were woken look whether they may go on.
    pub fn look_again(&mut self, machine: &Machine) {
        let woken = std::mem::take(&mut *self.woken.0.lock().unwrap());
        for token in woken {
            let Some(number) = self.writes.iter().position(|write| write.token == token) else {
                continue;
            };
            let write = &mut self.writes[number];
            let Stage::Waiting(era) = write.stage else {
                continue;
            };
            if machine.may_write(write.disk, write.extent, era) {
                write.stage = Stage::Submitted;
            } else {
                let waiter: Arc<dyn Waiter> = self.woken.clone();
                machine.await_regions(write.disk, write.extent, era, &waiter, token);
            }
        }
    }

    /// Moves some write on.
    pub fn go_on(&mut self, machine: &Machine) {
        self.look_again(machine);
        if self.writes.is_empty() {
            return;
        }
        let number = self.rng.index(self.writes.len());
        match self.writes[number].stage {
            Stage::Submitted => self.reach_disk(number),
            Stage::Done => self.answer(machine, number),
            Stage::Waiting(_) => {}
        }
    }

    /// Moves all writes on that can.
    pub fn go_on_all(&mut self, machine: &Machine) {
        self.look_again(machine);
        for number in (0..self.writes.len()).rev() {
            self.reach_disk(number);
            self.answer(machine, number);
        }
    }

    pub fn is_idle(&self) -> bool {
        self.writes.is_empty()
    }

    /// A cut is about to come.
    pub fn note_cut(&mut self) {
        for cell in self.disks.iter_mut().flat_map(|disk| &mut disk.cells) {
            cell.since_cut = vec![cell.content()];
        }
    }

    /// The disk is larger, durably.
    pub fn grow(&mut self, disk: usize, more_mib: u64) -> u64 {
        let disk = &mut self.disks[disk];
        disk.size_bytes += more_mib * MIB;
        disk.size_bytes
    }

    /// Clients see the size that the disk has.
    pub fn show_sizes(&mut self) {
        for disk in &mut self.disks {
            disk.shown_bytes = disk.size_bytes;
        }
    }

    /// What was left of everything.
    pub fn go_down(&mut self, down: Down) {
        for number in 0..self.writes.len() {
            // What was submitted goes on when its sender is dead.
            if down == Down::Kill && self.rng.once_in(2) {
                self.reach_disk(number);
            }
        }
        self.writes.clear();
        self.woken = Arc::default();
        self.show_sizes();
        if down == Down::PowerCut {
            for cell in self.disks.iter_mut().flat_map(|disk| &mut disk.cells) {
                cell.cut_power(&mut self.rng, &mut self.torn);
            }
        }
        for cell in self.disks.iter_mut().flat_map(|disk| &mut disk.cells) {
            // No write of a dead machine is answered any more; what reached the disk is complete.
            cell.history.iter_mut().for_each(|entry| entry.1 = 0);
            cell.answered = cell.history.len() - 1;
        }
    }
}

/// A write comes. The guest is not borrowed while the machine is at work.
pub fn write(guest: &std::cell::RefCell<Guest>, machine: &Machine) {
    let Some(plan) = guest.borrow_mut().plan() else {
        return;
    };
    if guest.borrow().mode.breaks(Break::DataBeforeRecord) {
        let mut guest = guest.borrow_mut();
        let disk = &mut guest.disks[plan.disk];
        for (index, &content) in disk.within(plan.extent).zip(&plan.contents) {
            disk.cells[index].change(content, plan.token);
        }
    }
    let admission = machine.admit(0, plan.disk, plan.extent, plan.operation);
    guest.borrow_mut().admitted(machine, plan, admission);
}

/// Many small writes whose data nobody looks at: they fill the ring.
pub fn burst(guest: &std::cell::RefCell<Guest>, machine: &Machine) {
    let (disk, near, end, count) = {
        let mut guest = guest.borrow_mut();
        let disks = guest.disks.len();
        let disk = guest.rng.index(disks);
        let known = &guest.disks[disk];
        let (near, end) = (known.blocks[0], known.shown_bytes / BLOCK_SIZE);
        (disk, near, end, 20 + guest.rng.below(300))
    };
    for number in 0..count {
        let extent = Extent {
            first_block: (near + 3 + 2 * number) % end,
            block_count: 1,
        };
        let admission = machine.admit(0, disk, extent, Operation::Write);
        machine.complete(0, admission);
    }
}
