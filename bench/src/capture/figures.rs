//! What the writes and captures of the runs come to. Pure.

use serde::Serialize;

use super::load::Write;
use super::watch::{Capture, Seen};
use crate::pattern::BLOCK_BYTES;
use crate::statistics::Spread;

/// Length of the window in which a stall by a cut is looked for.
const WINDOW: u64 = 50_000_000;
/// A phase shorter than this says nothing about a rate.
const PHASE_SECONDS_MIN: f64 = 0.25;

/// A part of a run.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Phase {
    seconds: f64,
    writes: u64,
    p50_us: f64,
    p99_us: f64,
    longest_us: f64,
}

impl Phase {
    fn of(nanoseconds: u64, mut latencies: Vec<u32>) -> Self {
        latencies.sort_unstable();
        let quantile = |share: f64| {
            let index = (latencies.len() as f64 * share) as usize;
            let found = latencies.get(index).or(latencies.last());
            found.map_or(0.0, |latency| f64::from(*latency) / 1000.0)
        };
        Self {
            seconds: nanoseconds as f64 / 1e9,
            writes: latencies.len() as u64,
            p50_us: quantile(0.5),
            p99_us: quantile(0.99),
            longest_us: quantile(1.0),
        }
    }

    fn rate(&self) -> Option<f64> {
        (self.seconds >= PHASE_SECONDS_MIN).then(|| self.writes as f64 / self.seconds)
    }
}

/// One run of a load.
#[derive(Clone, Debug, Serialize)]
pub struct Run {
    load: &'static str,
    round: usize,
    with_shipper: bool,
    whole: Phase,
    capturing: Phase,
    between: Phase,
    /// The longest latencies of the writes in flight in the windows after cuts, or in all windows without any, in microseconds.
    windows_us: Vec<f64>,
    copied_blocks: u64,
    /// Captures while the guest wrote for at least a part of them.
    captures: Vec<Capture>,
    /// The first that began after the guest's last write.
    pub tail: Option<Capture>,
    /// Bytes a second that fio reads of the blocks of the tail.
    pub fio_rate: Option<f64>,
}

impl Run {
    /// Of what was seen while the guest wrote from `begin` on.
    pub fn new(
        (load, round, with_shipper): (&'static str, usize, bool),
        begin: u64,
        writes: &[Write],
        seen: &Seen,
    ) -> Self {
        let end = writes.last().map_or(begin, |write| write.at);
        let captures = seen.captures.iter().filter(|capture| capture.begin < end);
        let captures: Vec<Capture> = captures.copied().collect();
        let within = |at: u64| captures.iter().any(|c| (c.before..c.end).contains(&at));
        let split = |inside| {
            let chosen = writes.iter().filter(|write| within(write.at) == inside);
            chosen.map(|write| write.latency).collect()
        };
        let captured_time = captures
            .iter()
            .map(|c| c.end.min(end).saturating_sub(c.before.max(begin)))
            .sum();
        let whole_time = end - begin;
        let windows: Vec<u64> = match with_shipper {
            true => captures.iter().map(|capture| capture.before).collect(),
            false => (begin..end).step_by(WINDOW as usize).collect(),
        };
        Self {
            load,
            round,
            with_shipper,
            whole: Phase::of(whole_time, writes.iter().map(|w| w.latency).collect()),
            capturing: Phase::of(captured_time, split(true)),
            between: Phase::of(whole_time - captured_time, split(false)),
            windows_us: windows.iter().map(|from| longest(writes, *from)).collect(),
            copied_blocks: seen.copied_blocks,
            tail: seen
                .captures
                .iter()
                .copied()
                .find(|capture| capture.begin >= end),
            captures,
            fio_rate: None,
        }
    }

    /// A line for who waits.
    pub fn progress(&self) -> String {
        let rate = |phase: &Phase| phase.rate().unwrap_or(0.0);
        format!(
            "  round {} {:<10}{:<14}{:>8.0} IOPS, capturing {:>8.0} ({:.1} s), between {:>8.0}; p99 {:.0} us",
            self.round + 1,
            self.load,
            if self.with_shipper {
                "shipper"
            } else {
                "no shipper"
            },
            rate(&self.whole),
            rate(&self.capturing),
            self.capturing.seconds,
            rate(&self.between),
            self.whole.p99_us,
        )
    }
}

/// The longest latency of the writes in flight in a window, in microseconds; one that outlasts it is what is looked
/// for. They are in the order of their replies.
fn longest(writes: &[Write], from: u64) -> f64 {
    let first = writes.partition_point(|write| write.at < from);
    let last = from + WINDOW + u64::from(u32::MAX);
    let answered = writes[first..].iter().take_while(|write| write.at < last);
    let window =
        answered.filter(|write| write.at.saturating_sub(u64::from(write.latency)) < from + WINDOW);
    f64::from(window.map(|write| write.latency).max().unwrap_or(0)) / 1000.0
}

/// Bytes a second of a capture.
pub fn rate(capture: &Capture) -> f64 {
    capture.read_bytes as f64 * 1e3 / (capture.end - capture.before).max(1) as f64
}

/// A figure.
#[derive(Clone, Debug, Serialize)]
pub struct Line {
    name: String,
    found: Option<Spread>,
    #[serde(skip)]
    decimals: usize,
}

impl Line {
    /// Of the values of the runs.
    pub fn new(name: String, values: Vec<f64>, decimals: usize) -> Self {
        Self {
            name,
            found: Spread::of(values),
            decimals,
        }
    }
}

/// The figures of one load.
pub fn of(load: &str, runs: &[Run]) -> Vec<Line> {
    let mut lines = guest(load, runs);
    lines.extend(cuts(load, runs));
    lines.extend(captures(load, runs));
    lines
}

/// Each run with the shipper, and the one without in the same round.
fn pairs(runs: &[Run]) -> impl Iterator<Item = (&Run, &Run)> {
    let shipped = runs.iter().filter(|run| run.with_shipper);
    shipped.filter_map(|run| {
        let mut others = runs.iter().filter(|other| !other.with_shipper);
        Some((run, others.find(|other| other.round == run.round)?))
    })
}

/// What the guest gets.
fn guest(load: &str, runs: &[Run]) -> Vec<Line> {
    let line =
        |name: &str, values, decimals| Line::new(format!("{load}: {name}"), values, decimals);
    let rates = |phase: fn(&Run) -> &Phase| {
        let ratios = pairs(runs);
        ratios
            .filter_map(|(on, off)| Some(phase(on).rate()? / off.whole.rate()?))
            .collect()
    };
    let slow = |phase: fn(&Run) -> &Phase| {
        let ratios = pairs(runs);
        ratios
            .map(|(on, off)| phase(on).p99_us / off.whole.p99_us)
            .collect()
    };
    let without = || pairs(runs).map(|(_, off)| &off.whole);
    let share = pairs(runs).map(|(run, _)| run.capturing.seconds / run.whole.seconds);
    vec![
        line(
            "IOPS without a shipper",
            without().filter_map(Phase::rate).collect(),
            0,
        ),
        line("IOPS capturing / without", rates(|run| &run.capturing), 3),
        line("IOPS between / without", rates(|run| &run.between), 3),
        line(
            "IOPS of the whole run / without",
            rates(|run| &run.whole),
            3,
        ),
        line(
            "p99 without, us",
            without().map(|whole| whole.p99_us).collect(),
            0,
        ),
        line("p99 capturing / without", slow(|run| &run.capturing), 2),
        line("p99 between / without", slow(|run| &run.between), 2),
        line("share of the time captured", share.collect(), 2),
    ]
}

/// Stalls and copies.
fn cuts(load: &str, runs: &[Run]) -> Vec<Line> {
    let line =
        |name: &str, values, decimals| Line::new(format!("{load}: {name}"), values, decimals);
    let windows = |with_shipper| {
        let chosen = runs
            .iter()
            .filter(move |run| run.with_shipper == with_shipper);
        let windows = chosen.flat_map(|run| &run.windows_us);
        windows.map(|us| us / 1000.0).collect()
    };
    let copied = pairs(runs)
        .map(|(run, _)| run.copied_blocks as f64 * 100.0 / run.whole.writes.max(1) as f64);
    vec![
        line("longest in 50 ms after a cut, ms", windows(true), 2),
        line("longest in any 50 ms without, ms", windows(false), 2),
        line("copied blocks / writes, %", copied.collect(), 3),
    ]
}

/// How fast capture is, and what it reads.
fn captures(load: &str, runs: &[Run]) -> Vec<Line> {
    let line =
        |name: &str, values, decimals| Line::new(format!("{load}: {name}"), values, decimals);
    let beside = || pairs(runs).flat_map(|(run, _)| &run.captures);
    let tails = || pairs(runs).filter_map(|(run, _)| Some((run.tail.as_ref()?, run.fio_rate?)));
    let share = tails().map(|(tail, fio)| rate(tail) * 1e6 / fio);
    let read = beside()
        .filter(|capture| capture.dirty_blocks > 0)
        .map(|capture| {
            let changed = capture.dirty_blocks * BLOCK_BYTES as u64;
            capture.read_bytes as f64 / changed as f64
        });
    vec![
        line(
            "capture beside the guest, MB/s",
            beside().map(rate).collect(),
            1,
        ),
        line(
            "capture alone, MB/s",
            tails().map(|(tail, _)| rate(tail)).collect(),
            1,
        ),
        line(
            "fio on the same blocks, MB/s",
            tails().map(|(_, fio)| fio / 1e6).collect(),
            1,
        ),
        line("capture alone / fio", share.collect(), 2),
        line("bytes read / changed", read.collect(), 3),
    ]
}

/// A table.
pub fn text(lines: &[Line]) -> String {
    let mut text = String::new();
    for line in lines {
        let found = line
            .found
            .map_or("not measured".to_owned(), |found| found.text(line.decimals));
        text.push_str(&format!("{:<46}{found:>36}\n", line.name));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_are_put_into_the_phase_of_their_reply() {
        let write = |at, latency| Write {
            at,
            latency,
            block: 0,
        };
        let (second, capture) = (
            1_000_000_000,
            Capture {
                epoch: 1,
                before: 1_000_000_000,
                begin: 1_001_000_000,
                end: 3_000_000_000,
                dirty_blocks: 2,
                read_bytes: 8192,
            },
        );
        let seen = Seen {
            captures: vec![capture],
            copied_blocks: 1,
        };
        let writes = [
            write(1, 1000),
            write(second, 9000),
            write(second + 100_000_000, 120_000_000),
            write(2 * second, 7000),
            write(4 * second, 2000),
        ];
        let run = Run::new(("load", 0, true), 0, &writes, &seen);
        assert_eq!((run.capturing.writes, run.between.writes), (3, 2));
        assert!((run.capturing.seconds - 2.0).abs() < 1e-9);
        assert!((run.between.seconds - 2.0).abs() < 1e-9);
        assert_eq!(run.windows_us, [120_000.0]);
        assert!(run.tail.is_none());
    }
}
