//! How much of a disk and its machine capture may take, where guests should come first.

use std::time::{Duration, Instant};

use thread_priority::{
    NormalThreadSchedulePolicy, ThreadPriority, ThreadSchedulePolicy,
    set_thread_priority_and_policy, thread_native_id,
};

/// Pauses shorter than this are saved up; a thread does not wake more exactly than that.
const PAUSE_MIN: Duration = Duration::from_millis(2);
/// Longest pause before it is looked again whether others have work.
const SLICE: Duration = Duration::from_millis(4);
/// Steps by which the threads of capture stand back behind those of guests when both want a processor (`nice(2)`).
const NICENESS: i32 = 10;

/// Bounds of capture. Without any it takes what it can get.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Throttle {
    /// Bytes that are read in a second, at most.
    pub bytes_per_second: Option<u64>,
    /// Percent of the time in which is read, 1 to 100.
    pub share_percent: u8,
}

impl Default for Throttle {
    fn default() -> Self {
        Self {
            bytes_per_second: None,
            share_percent: 100,
        }
    }
}

impl Throttle {
    /// Whether there is any bound.
    pub fn is_bound(&self) -> bool {
        *self != Self::default()
    }

    /// How long has passed at least when this was read, in a time of work without pauses of `worked`.
    fn least_time(&self, bytes: u64, worked: Duration) -> Duration {
        let by_rate = self.bytes_per_second.map_or(Duration::ZERO, |rate| {
            Duration::from_secs_f64(bytes as f64 / rate.max(1) as f64)
        });
        let by_share = worked * 100 / u32::from(self.share_percent.clamp(1, 100));
        by_rate.max(by_share)
    }
}

/// One capture that keeps to its bounds.
#[derive(Debug)]
pub struct Pace<'a> {
    throttle: &'a Throttle,
    started: Instant,
    bytes: u64,
    paused: Duration,
}

impl<'a> Pace<'a> {
    /// Begins now.
    pub fn new(throttle: &'a Throttle) -> Self {
        Self {
            throttle,
            started: Instant::now(),
            bytes: 0,
            paused: Duration::ZERO,
        }
    }

    /// So much is read now.
    pub fn count(&mut self, bytes: u64) {
        self.bytes += bytes;
    }

    /// What must pass until more may be read.
    fn ahead(&self) -> Duration {
        let elapsed = self.started.elapsed();
        let worked = elapsed.saturating_sub(self.paused);
        let least = self.throttle.least_time(self.bytes, worked);
        least.saturating_sub(elapsed)
    }

    /// Whether so much was read that a pause is due.
    pub fn is_ahead(&self) -> bool {
        self.ahead() >= PAUSE_MIN
    }

    /// A part of the pause that is due. While `is_busy` others work on what was read before, and that counts as work.
    pub fn pause(&mut self, is_busy: impl Fn() -> bool) {
        let before = Instant::now();
        std::thread::sleep(self.ahead().min(SLICE));
        if !is_busy() {
            self.paused += before.elapsed();
        }
    }
}

/// Lets the threads of guests go before this one.
pub fn stand_back() {
    // A thread that is not let do it competes with them, no more.
    let _as_before = rustix::process::nice(NICENESS);
}

/// Leaves this thread what nobody else wants of the processors (`SCHED_IDLE`). A guest's thread that wakes does not wait
/// for the slice of this one to end, as it does behind one that is merely nice. There is no way back without privileges.
pub fn take_what_is_left() {
    let policy = ThreadSchedulePolicy::Normal(NormalThreadSchedulePolicy::Idle);
    if set_thread_priority_and_policy(thread_native_id(), ThreadPriority::Min, policy).is_err() {
        stand_back();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_give_the_least_time_that_both_allow() {
        let throttle = |bytes_per_second, share_percent| Throttle {
            bytes_per_second,
            share_percent,
        };
        let second = Duration::from_secs(1);
        for (bound, bytes, worked, least) in [
            (Throttle::default(), 1 << 40, second, second),
            (throttle(Some(1 << 20), 100), 5 << 20, second, 5 * second),
            (throttle(None, 25), 5 << 20, second, 4 * second),
            (throttle(Some(1 << 20), 25), 2 << 20, second, 4 * second),
            (throttle(Some(1 << 20), 50), 8 << 20, second, 8 * second),
        ] {
            assert_eq!(bound.least_time(bytes, worked), least, "{bound:?}");
        }
    }

    #[test]
    fn the_work_of_others_counts_for_the_share() {
        let throttle = Throttle {
            bytes_per_second: None,
            share_percent: 20,
        };
        let mut pace = Pace::new(&throttle);
        let begin = Instant::now();
        std::thread::sleep(Duration::from_millis(3));
        pace.count(1);
        // Others work for as long as ten looks take.
        let mut looks = 0;
        while pace.is_ahead() {
            looks += 1;
            pace.pause(|| looks <= 10);
        }
        let worked = pace.started.elapsed() - pace.paused;
        assert!(worked >= 8 * SLICE, "{worked:?}");
        assert!(begin.elapsed() + PAUSE_MIN >= worked * 5, "{worked:?}");
    }

    #[test]
    fn a_pace_takes_the_time_that_its_rate_asks_for() {
        let throttle = Throttle {
            bytes_per_second: Some(100 << 20),
            share_percent: 100,
        };
        let mut pace = Pace::new(&throttle);
        let begin = Instant::now();
        for _ in 0..81 {
            while pace.is_ahead() {
                pace.pause(|| false);
            }
            pace.count(128 << 10);
        }
        // Ten MiB and a rest, less what is saved up.
        assert!(
            begin.elapsed() >= Duration::from_millis(98),
            "{:?}",
            begin.elapsed()
        );
    }
}
