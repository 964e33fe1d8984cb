//! What was sent, what is known to have been answered, and what was lost with a connection.
//!
//! Order: a write is in the history before it is sent, so whatever can be seen of it is explained; it is
//! known only after its answer has come. A writer is known up to the last of its writes before which none
//! is in flight. What was in flight when a tracker was killed is *lost*: it may be there or not, for ever.
//! It is noted as lost before anything behind it is known.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::areas::Areas;
use super::{Clock, WRITERS};

/// What a write does to its sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Stamps them.
    Data,
    /// Makes them zero, by WRITE_ZEROES or by TRIM: the disks of a world lie on file systems that punch
    /// holes, where whole blocks that were trimmed are zero.
    Zero,
}

/// One write.
#[derive(Clone, Copy, Debug)]
pub struct Write {
    /// Number of the disk.
    pub disk: u32,
    /// The first sector.
    pub first_sector: u32,
    /// Sectors.
    pub sector_count: u32,
    /// What it does.
    pub kind: Kind,
    /// What was known when it was sent.
    pub clock: Clock,
}

impl Write {
    /// Its sectors.
    pub fn sectors(&self) -> std::ops::Range<u32> {
        self.first_sector..self.first_sector + self.sector_count
    }
}

/// All writes of one writer; the number of a write is its position and one.
#[derive(Debug, Default)]
pub struct Log {
    /// Everything that was sent.
    pub writes: Vec<Write>,
    /// Numbers of those that were lost, in ascending order.
    pub lost: Vec<u32>,
}

/// The history of a world.
#[derive(Debug)]
pub struct History {
    /// Number of the world.
    pub run: u64,
    /// Who owns what.
    pub areas: Areas,
    logs: [Mutex<Log>; WRITERS],
    known: [AtomicU32; WRITERS],
}

impl History {
    /// The beginning: all disks are zero.
    pub fn new(run: u64, areas: Areas) -> Self {
        Self {
            run,
            areas,
            logs: Default::default(),
            known: Default::default(),
        }
    }

    /// What is known now.
    pub fn clock(&self) -> Clock {
        std::array::from_fn(|writer| self.known[writer].load(Ordering::Acquire))
    }

    /// Makes a write part of the history; its number. Call before it is sent.
    pub fn sent(&self, writer: usize, write: Write) -> u32 {
        let mut log = self.log(writer);
        log.writes.push(write);
        log.writes.len() as u32
    }

    /// A write of this writer was lost.
    pub fn lost(&self, writer: usize, sequence: u32) {
        self.log(writer).lost.push(sequence);
    }

    /// All writes of a writer up to this one are answered or lost.
    pub fn known(&self, writer: usize, sequence: u32) {
        self.known[writer].store(sequence, Ordering::Release);
    }

    /// The writes of a writer.
    pub fn log(&self, writer: usize) -> MutexGuard<'_, Log> {
        self.logs[writer]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes that were sent.
    pub fn sent_count(&self) -> u64 {
        let count = |writer| self.log(writer).writes.len() as u64;
        (0..WRITERS).map(count).sum()
    }
}

/// Whether the tracker is there, so that writers who have lost it know when to come back.
#[derive(Debug, Default)]
pub struct Line {
    state: Mutex<LineState>,
    changed: Condvar,
}

#[derive(Clone, Copy, Debug, Default)]
struct LineState {
    /// Lives of the tracker so far.
    life: u64,
    is_up: bool,
    is_resting: bool,
    is_over: bool,
}

impl Line {
    /// The tracker is ready.
    pub fn up(&self) {
        self.change(|state| {
            state.life += 1;
            state.is_up = true;
        });
    }

    /// The tracker is about to be killed.
    pub fn down(&self) {
        self.change(|state| state.is_up = false);
    }

    /// Nobody shall write until it is time again.
    pub fn rest(&self, is_resting: bool) {
        self.change(|state| state.is_resting = is_resting);
    }

    /// Whether nobody shall write.
    pub fn is_resting(&self) -> bool {
        self.state().is_resting
    }

    /// Waits until it is time to write, or to end.
    pub fn await_rest(&self) {
        let mut state = self.state();
        while state.is_resting && !state.is_over {
            let waited = self.changed.wait(state);
            state = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Everybody shall come to an end.
    pub fn end(&self) {
        self.change(|state| state.is_over = true);
    }

    /// Whether everybody shall come to an end.
    pub fn is_over(&self) -> bool {
        self.state().is_over
    }

    /// Waits for a tracker after that of `life`; which one it is, and `None` at the end.
    ///
    /// # Panics
    ///
    /// The tracker of that life was not to be killed, or none comes in time.
    pub fn await_after(&self, life: u64, patience: Duration) -> Option<u64> {
        let deadline = Instant::now() + patience;
        let mut state = self.state();
        let is_killed = life == 0 || !state.is_up || state.life > life;
        assert!(is_killed || state.is_over, "a connection was lost");
        while !(state.is_over || (state.is_up && state.life > life)) {
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "no tracker comes back");
            let waited = self.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        (!state.is_over).then_some(state.life)
    }

    fn change(&self, change: impl FnOnce(&mut LineState)) {
        change(&mut self.state());
        self.changed.notify_all();
    }

    fn state(&self) -> MutexGuard<'_, LineState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
