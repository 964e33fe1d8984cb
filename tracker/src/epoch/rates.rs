//! How fast a ring fills and is folded, over the last seconds. Pure.

use std::collections::VecDeque;
use std::time::Duration;

/// Rates are those of about this time.
const WINDOW: Duration = Duration::from_secs(10);
/// Time between two samples that are kept.
const INTERVAL: Duration = Duration::from_secs(1);

/// The counters of a ring at a moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sample {
    /// Time since the tracker started.
    pub at: Duration,
    /// Records written since then.
    pub written: u64,
    /// Records folded since then.
    pub folded: u64,
}

/// Counts in a second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rate {
    /// Records written.
    pub written: u64,
    /// Records folded.
    pub folded: u64,
}

impl Rate {
    /// Whole seconds until so many free records are written, if nothing becomes free meanwhile.
    pub fn seconds_until(self, free_records: u64) -> Option<u64> {
        free_records.checked_div(self.written)
    }
}

/// Samples of the last seconds, the oldest first.
#[derive(Debug, Default)]
pub struct Rates(VecDeque<Sample>);

impl Rates {
    /// Keeps a sample, unless the last one is of a moment ago.
    pub fn take(&mut self, sample: Sample) {
        let is_due = |last: &Sample| last.at + INTERVAL <= sample.at;
        if self.0.back().is_none_or(is_due) {
            self.0.push_back(sample);
        }
        // The oldest that is kept is as old as the window or older, but for the beginning.
        while self
            .0
            .get(1)
            .is_some_and(|second| second.at + WINDOW <= sample.at)
        {
            self.0.pop_front();
        }
    }

    /// The rates up to this sample.
    pub fn up_to(&self, sample: Sample) -> Rate {
        let first = self.0.front().copied().unwrap_or_default();
        let passed = sample.at.saturating_sub(first.at).as_millis() as u64;
        let rate = |count: u64| {
            let scaled = count.saturating_mul(1000);
            scaled.checked_div(passed).unwrap_or(0)
        };
        Rate {
            written: rate(sample.written.saturating_sub(first.written)),
            folded: rate(sample.folded.saturating_sub(first.folded)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(milliseconds: u64, written: u64, folded: u64) -> Sample {
        let at = Duration::from_millis(milliseconds);
        Sample {
            at,
            written,
            folded,
        }
    }

    #[test]
    fn rates_are_those_of_the_last_seconds() {
        let mut rates = Rates::default();
        assert_eq!(rates.up_to(sample(0, 0, 0)), Rate::default());
        rates.take(sample(0, 0, 0));
        assert_eq!(rates.up_to(sample(0, 7, 0)), Rate::default());
        let half = Rate {
            written: 14,
            folded: 2,
        };
        assert_eq!(rates.up_to(sample(500, 7, 1)), half);
        // A hundred a second for a minute, looked at ten times a second; then nothing.
        for tick in 1..=600 {
            rates.take(sample(tick * 100, tick * 10, tick * 5));
        }
        let full = Rate {
            written: 100,
            folded: 50,
        };
        assert_eq!(rates.up_to(sample(60_000, 6000, 3000)), full);
        assert!(rates.0.len() <= 12, "{}", rates.0.len());
        for tick in 601..=712 {
            rates.take(sample(tick * 100, 6000, 3000));
        }
        assert_eq!(rates.up_to(sample(71_200, 6000, 3000)), Rate::default());
    }

    #[test]
    fn a_ring_is_full_when_its_free_records_are_written() {
        let rate = Rate {
            written: 100,
            folded: 1000,
        };
        assert_eq!(rate.seconds_until(1050), Some(10));
        assert_eq!(rate.seconds_until(0), Some(0));
        assert_eq!(Rate::default().seconds_until(1050), None);
    }
}
