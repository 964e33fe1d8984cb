//! What the runs come to. Pure.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::contestant::Contestant;
use super::timed::Spent;
use crate::cost::targets::{Bound, Target};
use crate::statistics::Spread;

/// Speed against restic and borg, at least: of a copy, of a copy of what has changed, of a restore.
const COPY_MIN: f64 = 1.5;
const DELTA_MIN: f64 = 50.0;
const RESTORE_MIN: f64 = 1.5;
/// Of what bounds a copy, and a restore.
const OF_BOUND_MIN: f64 = 0.8;
/// Bytes of the vault, in parts of what the codec makes of the disk.
const SIZE_MAX: f64 = 1.02;
/// Memory of the shipper in MiB.
const MEMORY_MAX: f64 = 256.0;

/// A part of the benchmark.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Part {
    /// The first copy of the disk, its size, and what bounds it
    Copy,
    /// Restoring the disk
    Restore,
    /// A copy after 1% of the blocks have changed
    Delta,
}

impl Part {
    /// Name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Copy => "first copy",
            Self::Restore => "restore",
            Self::Delta => "1% changed",
        }
    }
}

/// One run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Run {
    /// What was done.
    pub part: Part,
    /// Who did it.
    pub who: Contestant,
    /// From zero on.
    pub round: usize,
    /// What it took.
    #[serde(flatten)]
    pub spent: Spent,
    /// Bytes of all that the copies have so far.
    pub stored_bytes: Option<u64>,
}

impl Run {
    /// A line for who waits.
    pub fn progress(&self) -> String {
        let stored = self.stored_bytes.map_or(String::new(), |bytes| {
            format!("{:>9.1} MiB stored", mebibytes(bytes))
        });
        format!(
            "  round {} {:<12}{:<20}{:>8.2} s{:>9.1} MiB of memory{stored}",
            self.round + 1,
            self.part.name(),
            self.who.name(),
            self.spent.seconds,
            mebibytes(self.spent.peak_bytes),
        )
    }
}

fn mebibytes(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// Those of a part by one of them.
fn by(runs: &[Run], part: Part, who: Contestant) -> impl Iterator<Item = &Run> {
    runs.iter()
        .filter(move |run| run.part == part && run.who == who)
}

/// A value of two runs in the same round.
fn compared(
    runs: &[Run],
    part: Part,
    (one, other): (Contestant, Contestant),
    value: impl Fn(&Run, &Run) -> Option<f64>,
) -> Option<Spread> {
    let pairs = by(runs, part, one).filter_map(|run| {
        let beside = by(runs, part, other).find(|other| other.round == run.round)?;
        value(run, beside)
    });
    Spread::of(pairs.collect())
}

/// How many times as fast one is.
fn speed(runs: &[Run], part: Part, pair: (Contestant, Contestant)) -> Option<Spread> {
    compared(runs, part, pair, |one, other| {
        Some(other.spent.seconds / one.spent.seconds)
    })
}

/// The figures that have a bound.
pub fn targets(runs: &[Run]) -> Vec<Target> {
    use Contestant::{Borg, BorgEncrypted, QemuImg, Restic, Shipper, ShipperEncrypted};
    let plain = (Shipper, [Restic, Borg]);
    let sealed = (ShipperEncrypted, [Restic, BorgEncrypted]);
    let mut targets = Vec::new();
    let mut faster = |part: Part, one: Contestant, other: Contestant, least| {
        let name = format!("{}: {} / {}", part.name(), one.name(), other.name());
        let found = speed(runs, part, (one, other));
        targets.push(Target::new(name, Some(Bound::AtLeast(least)), found, 2));
    };
    for (part, least) in [(Part::Copy, COPY_MIN), (Part::Restore, RESTORE_MIN)] {
        for (one, peers) in [plain, sealed] {
            for peer in peers {
                faster(part, one, peer, least);
            }
        }
    }
    for one in [Shipper, ShipperEncrypted] {
        faster(Part::Restore, one, QemuImg, OF_BOUND_MIN);
    }
    for peer in [Restic, Borg, BorgEncrypted] {
        faster(Part::Delta, ShipperEncrypted, peer, DELTA_MIN);
    }
    for one in [Shipper, ShipperEncrypted] {
        targets.push(of_bound(runs, one));
        targets.push(size(runs, one));
    }
    targets.push(memory(runs));
    targets
}

/// A first copy against the slower of reading and compressing.
fn of_bound(runs: &[Run], who: Contestant) -> Target {
    let seconds = |round, who| {
        let mut found = by(runs, Part::Copy, who).filter(|run| run.round == round);
        found.next().map(|run| run.spent.seconds)
    };
    let shares = by(runs, Part::Copy, who).filter_map(|run| {
        let read = seconds(run.round, Contestant::DiskRead)?;
        let codec = seconds(run.round, Contestant::Codec)?;
        Some(read.max(codec) / run.spent.seconds)
    });
    let name = format!("first copy: {} / slower of disk and codec", who.name());
    let found = Spread::of(shares.collect());
    Target::new(name, Some(Bound::AtLeast(OF_BOUND_MIN)), found, 2)
}

fn size(runs: &[Run], who: Contestant) -> Target {
    let found = compared(runs, Part::Copy, (who, Contestant::Codec), |one, codec| {
        Some(one.stored_bytes? as f64 / codec.stored_bytes? as f64)
    });
    let name = format!("size of the vault / compressed data: {}", who.name());
    Target::new(name, Some(Bound::AtMost(SIZE_MAX)), found, 4)
}

fn memory(runs: &[Run]) -> Target {
    let shippers = runs.iter().filter(|run| run.who.is_shipper());
    let found = Spread::of(
        shippers
            .map(|run| mebibytes(run.spent.peak_bytes))
            .collect(),
    );
    let name = "memory of the shipper, MiB".to_owned();
    Target::new(name, Some(Bound::NeverMore(MEMORY_MAX)), found, 1)
}

/// Times of everybody.
pub fn table(runs: &[Run], data_bytes: u64) -> String {
    let mut text = format!(
        "{:<12}{:<20}{:>26}{:>10}{:>12}{:>12}\n",
        "", "", "seconds", "MB/s", "stored MiB", "memory MiB"
    );
    let mut seen = Vec::new();
    for run in runs {
        let key = (run.part, run.who);
        if seen.contains(&key) {
            continue;
        }
        seen.push(key);
        let of = |value: fn(&Run) -> Option<f64>| {
            Spread::of(by(runs, run.part, run.who).filter_map(value).collect())
        };
        let Some(seconds) = of(|run| Some(run.spent.seconds)) else {
            continue;
        };
        let number =
            |found: Option<f64>| found.map_or(String::new(), |value| format!("{value:.1}"));
        let stored = of(|run| run.stored_bytes.map(mebibytes)).map(|found| found.median);
        let memory = of(|run| Some(mebibytes(run.spent.peak_bytes))).map(|found| found.maximum);
        let line = format!(
            "{:<12}{:<20}{:>26}{:>10.0}{:>12}{:>12}",
            run.part.name(),
            run.who.name(),
            seconds.text(2),
            data_bytes as f64 / 1e6 / seconds.median,
            number(stored),
            number(memory.filter(|memory| *memory > 0.0)),
        );
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(part: Part, who: Contestant, round: usize, seconds: f64, stored: u64) -> Run {
        let spent = Spent {
            seconds,
            peak_bytes: 64 << 20,
        };
        Run {
            part,
            who,
            round,
            spent,
            stored_bytes: Some(stored),
        }
    }

    #[test]
    fn each_round_is_compared_with_itself() {
        let runs = [
            run(Part::Copy, Contestant::Shipper, 0, 10.0, 102),
            run(Part::Copy, Contestant::DiskRead, 0, 4.0, 0),
            run(Part::Copy, Contestant::Codec, 0, 9.0, 100),
            run(Part::Copy, Contestant::Restic, 0, 20.0, 0),
            run(Part::Copy, Contestant::Restic, 1, 1.0, 0),
            run(Part::Delta, Contestant::Shipper, 0, 1.0, 0),
        ];
        let pair = (Contestant::Shipper, Contestant::Restic);
        let found = speed(&runs, Part::Copy, pair).unwrap();
        assert_eq!((found.minimum, found.maximum), (2.0, 2.0));
        assert_eq!(speed(&runs, Part::Delta, pair), None);
        let text = crate::cost::targets::table("Vault", &targets(&runs));
        let has = |name: &str, end: &str| {
            let mut lines = text.lines().filter(|line| line.starts_with(name));
            lines.any(|line| line.ends_with(end))
        };
        assert!(has("first copy: shipper / restic", "yes"), "{text}");
        assert!(has("first copy: shipper / slower", "yes"), "{text}");
        assert!(
            has("size of the vault / compressed data: shipper ", "yes"),
            "{text}"
        );
        assert!(has("memory", "yes"), "{text}");
        assert!(has("restore", "not measured"), "{text}");
    }

    #[test]
    fn runs_come_back_from_a_report() {
        let before = run(Part::Restore, Contestant::QemuImg, 1, 2.5, 7);
        let text = serde_json::to_string(&before).unwrap();
        let after: Run = serde_json::from_str(&text).unwrap();
        assert_eq!(
            (after.part, after.who, after.round),
            (before.part, before.who, 1)
        );
        assert_eq!(after.spent, before.spent);
        let table = table(&[after], 5_000_000);
        assert!(
            table
                .lines()
                .nth(1)
                .unwrap()
                .contains("2.50 (2.50 to 2.50)"),
            "{table}"
        );
    }
}
