//! The open epoch of a machine, and who still works in the one before.
//!
//! Order: a worker counts itself into the epoch that it has read and reads the epoch again; only if
//! it is still the same is the stamp valid. A cut raises the epoch and then waits until the counts
//! of the old one are zero. Both are sequentially consistent, so either the worker sees the new
//! epoch, or the cut sees the worker's count: no write stamped with a closed epoch is unknown to
//! the cut. New writes are never held.
//!
//! Counts are kept for even and odd epochs apart, on a cache line for each worker. Numbers of epochs
//! that follow each other therefore differ in parity, also where a cut skips some. Their upper half counts
//! the writes whose admission is not finished: those that nobody may know of yet.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::extent::Epoch;
use crate::journal::format::EPOCH_MAX;

/// Time between two looks at the counts while a cut waits.
const LOOK_INTERVAL: Duration = Duration::from_micros(50);

/// A write whose admission is not finished counts as this besides.
const ADMITTING: u64 = 1 << 32;

#[derive(Debug, Default)]
#[repr(align(128))]
struct InFlight([AtomicU64; 2]);

/// The open epoch, shared by all workers and disks.
#[derive(Debug)]
pub struct Clock {
    open: AtomicU64,
    in_flight: Vec<InFlight>,
}

impl Clock {
    /// A clock at this epoch for so many workers.
    pub fn new(open: Epoch, workers: usize) -> Self {
        let in_flight = (0..workers.max(1)).map(|_| InFlight::default()).collect();
        Self {
            open: open.0.into(),
            in_flight,
        }
    }

    /// The open epoch.
    pub fn open(&self) -> Epoch {
        Epoch(self.open.load(Ordering::SeqCst))
    }

    /// Stamps a write of this worker. It counts as in flight until [`Self::leave`], and as being admitted
    /// until [`Self::admitted`].
    pub fn enter(&self, worker: usize) -> Epoch {
        let counts = &self.in_flight[worker % self.in_flight.len()].0;
        loop {
            let epoch = self.open.load(Ordering::SeqCst);
            let count = &counts[(epoch & 1) as usize];
            count.fetch_add(ADMITTING + 1, Ordering::SeqCst);
            if self.open.load(Ordering::SeqCst) == epoch {
                return Epoch(epoch);
            }
            count.fetch_sub(ADMITTING + 1, Ordering::SeqCst);
        }
    }

    /// Everything that others have to know of the write that was stamped with this epoch stands.
    pub fn admitted(&self, worker: usize, epoch: Epoch) {
        let counts = &self.in_flight[worker % self.in_flight.len()].0;
        counts[(epoch.0 & 1) as usize].fetch_sub(ADMITTING, Ordering::Release);
    }

    /// The write that was stamped with this epoch has completed.
    pub fn leave(&self, worker: usize, epoch: Epoch) {
        let counts = &self.in_flight[worker % self.in_flight.len()].0;
        counts[(epoch.0 & 1) as usize].fetch_sub(1, Ordering::Release);
    }

    /// The epoch that would follow the open one if it has to be at least `minimum`. `None` if no
    /// record could hold its number.
    pub fn next(&self, minimum: Epoch) -> Option<Epoch> {
        let open = self.open();
        let next = open.next().max(minimum);
        // The parity must change.
        let same_parity = next.0 % 2 == open.0 % 2;
        let next = if same_parity { next.next() } else { next };
        (next.0 <= EPOCH_MAX).then_some(next)
    }

    /// Opens an epoch that [`Self::next`] gave.
    pub fn advance(&self, next: Epoch) {
        self.open.store(next.0, Ordering::SeqCst);
    }

    /// Waits until no write of epochs with this one's parity is in flight. `false` after the
    /// deadline.
    pub fn drain(&self, epoch: Epoch, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        while self.counts(epoch) != 0 {
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(LOOK_INTERVAL);
        }
        true
    }

    /// Waits until the admissions to epochs with this one's parity are finished, which takes no I/O.
    pub fn settle(&self, epoch: Epoch) {
        while self.counts(epoch) >= ADMITTING {
            std::thread::yield_now();
        }
    }

    /// Whether a write of epochs with this one's parity is in flight.
    pub fn is_drained(&self, epoch: Epoch) -> bool {
        self.counts(epoch) == 0
    }

    fn counts(&self, epoch: Epoch) -> u64 {
        let parity = (epoch.0 & 1) as usize;
        let load = |counts: &InFlight| counts.0[parity].load(Ordering::SeqCst);
        self.in_flight.iter().map(load).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parity_changes_also_where_numbers_are_skipped() {
        let clock = Clock::new(Epoch(4), 1);
        assert_eq!(clock.next(Epoch(0)), Some(Epoch(5)));
        assert_eq!(clock.next(Epoch(9)), Some(Epoch(9)));
        assert_eq!(clock.next(Epoch(10)), Some(Epoch(11)));
        assert_eq!(clock.next(Epoch(EPOCH_MAX)), Some(Epoch(EPOCH_MAX)));
        assert_eq!(clock.next(Epoch(EPOCH_MAX + 1)), None);
        assert_eq!(clock.next(Epoch(u64::MAX)), None);
    }

    #[test]
    fn a_cut_waits_for_the_writes_of_its_epoch_alone() {
        let clock = Clock::new(Epoch(1), 2);
        let first = clock.enter(0);
        clock.advance(clock.next(Epoch::ZERO).unwrap());
        clock.admitted(0, first);
        clock.settle(first);
        let second = clock.enter(1);
        clock.admitted(1, second);
        assert_eq!((first, second), (Epoch(1), Epoch(2)));
        assert!(!clock.drain(first, Duration::from_millis(1)));
        clock.leave(0, first);
        assert!(clock.drain(first, Duration::from_millis(1)));
        clock.leave(1, second);
    }
}
