//! What tracking may cost, beside what it does. Pure.

use serde::Serialize;

use super::counters::{Counted, Counters};
use super::crash::{self, Check};
use super::start::{self, Start};
use super::zipf;
use crate::job::{Job, JobKind};
use crate::servers::ServerKind;
use crate::statistics::Spread;
use crate::summary::Summary;

/// Tracking on against off, at least.
const RATE_MIN: f64 = 0.97;
/// Durable transactions of the intent log per write, at most: at depth 1, at depth 32.
const COMMITS_SINGLE_MAX: f64 = 0.02;
const COMMITS_DEEP_MAX: f64 = 0.005;
/// What a check may read, in parts of the cap.
const READ_MAX: f64 = 1.0;
/// The longest start, in seconds.
const START_MAX: f64 = 1.0;

/// Bound of a figure.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Bound {
    /// The median is no less.
    AtLeast(f64),
    /// The median is no more.
    AtMost(f64),
    /// The greatest is no more.
    NeverMore(f64),
}

impl Bound {
    fn text(self) -> String {
        match self {
            Self::AtLeast(bound) => format!("at least {bound}"),
            Self::AtMost(bound) => format!("at most {bound}"),
            Self::NeverMore(bound) => format!("never above {bound}"),
        }
    }

    fn holds(self, spread: &Spread) -> bool {
        match self {
            Self::AtLeast(bound) => spread.median >= bound,
            Self::AtMost(bound) => spread.median <= bound,
            Self::NeverMore(bound) => spread.maximum <= bound,
        }
    }
}

/// A figure and its bound.
#[derive(Clone, Debug, Serialize)]
pub struct Target {
    name: String,
    /// A figure without one is told because others are seen beside it.
    bound: Option<Bound>,
    found: Option<Spread>,
    reached: Option<bool>,
    #[serde(skip)]
    decimals: usize,
}

impl Target {
    /// What was found, if anything, to be shown with so many decimals.
    pub fn new(name: String, bound: Option<Bound>, found: Option<Spread>, decimals: usize) -> Self {
        let reached = bound
            .zip(found.as_ref())
            .map(|(bound, spread)| bound.holds(spread));
        Self {
            name,
            bound,
            found,
            reached,
            decimals,
        }
    }
}

/// All of them.
pub fn of(
    summaries: &[Summary],
    counted: &[Counted],
    checks: &[Check],
    starts: &[Start],
) -> Vec<Target> {
    let mut targets = Vec::new();
    for summary in summaries {
        for ratio in &summary.ratios {
            let has_bound = ratio.against == ServerKind::TrackerPlain.name()
                && !summary.title.ends_with(Job::of(JobKind::ZipfSingle).title);
            let bound = has_bound.then_some(Bound::AtLeast(RATE_MIN));
            let name = format!("{}: {} / {}", summary.title, ratio.server, ratio.against);
            targets.push(Target::new(name, bound, Some(ratio.rate), 2));
        }
    }
    let commits: fn(&Counters) -> u64 = |counters| counters.intent_commits;
    for (job, depth, most) in [
        (JobKind::ZipfDeep, 32, COMMITS_DEEP_MAX),
        (JobKind::ZipfSingle, 1, COMMITS_SINGLE_MAX),
    ] {
        for server in [ServerKind::Tracker, ServerKind::TrackerCovered] {
            let name = format!("intent commits per write, depth {depth}: {}", server.name());
            let found = zipf::per_write(counted, job, server, commits);
            targets.push(Target::new(name, Some(Bound::AtMost(most)), found, 4));
        }
    }
    let read = "check after a power cut: read / intent cap".to_owned();
    let found = crash::share_of_cap(checks);
    targets.push(Target::new(
        read,
        Some(Bound::NeverMore(READ_MAX)),
        found,
        3,
    ));
    let speed = "check after a power cut: speed / fio on the file".to_owned();
    targets.push(Target::new(speed, None, crash::share_of_disk(checks), 2));
    for (after, after_power_cut) in [("SIGKILL", false), ("a power cut", true)] {
        let name = format!("start with a full ring after {after}, s");
        let found = start::seconds(starts, after_power_cut);
        targets.push(Target::new(
            name,
            Some(Bound::NeverMore(START_MAX)),
            found,
            3,
        ));
    }
    targets
}

/// The table.
pub fn text(targets: &[Target]) -> String {
    table("What tracking costs", targets)
}

/// A table of targets with a title.
pub fn table(title: &str, targets: &[Target]) -> String {
    let names = targets.iter().map(|target| target.name.len());
    let width = names.max().unwrap_or(0).max(title.len());
    let mut text = format!(
        "{title:<width$}{:>20}{:>28}{:>9}\n",
        "target", "found", "reached"
    );
    for target in targets {
        let bound = target.bound.map_or(String::new(), Bound::text);
        let found = target.found.map_or("not measured".to_owned(), |found| {
            found.text(target.decimals)
        });
        let reached = match target.reached {
            Some(true) => "yes",
            Some(false) => "no",
            None => "",
        };
        let line = format!("{:<width$}{bound:>20}{found:>28}{reached:>9}", target.name);
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_look_at_median_or_greatest() {
        let spread = Spread {
            median: 0.97,
            minimum: 0.9,
            maximum: 1.1,
        };
        assert!(Bound::AtLeast(0.97).holds(&spread));
        assert!(!Bound::AtLeast(0.98).holds(&spread));
        assert!(Bound::AtMost(0.97).holds(&spread));
        assert!(!Bound::AtMost(0.96).holds(&spread));
        assert!(!Bound::NeverMore(1.0).holds(&spread));
        assert!(Bound::NeverMore(1.1).holds(&spread));
    }

    #[test]
    fn what_was_not_measured_is_said_and_not_reached() {
        let targets = of(&[], &[], &[], &[]);
        assert!(targets.iter().all(|target| target.reached.is_none()));
        let text = text(&targets);
        let mut lines = text.lines().skip(1);
        assert!(lines.all(|line| line.ends_with("not measured")), "{text}");
    }
}
