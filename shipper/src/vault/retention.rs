//! Which recovery points stay: a ladder of intervals, each for a span of time. Pure.
//!
//! Overview: `every 30s for 2h, 15min for 24h, 6h for 7d, 1d for 90d` has four rungs. Each divides time into slots of its
//! interval, and of every slot that is not older than its span the newest point stays, and the newest that is consistent for
//! applications. A point stays if a rung keeps it. The newest good one and those that are pinned stay in any case; one
//! that is beyond repair stays as long as the longest span, and stands for no other.
//!
//! Time: slots are those of the times inside manifests. Age is counted from the newest point back to older ones, from point to
//! point, and never by the clock of whoever asks. A step back counts for nothing; a gap counts for what it is up
//! to an eighth of the longest span (or two of the longest interval, if that is more). So a clock that jumped years
//! ahead for a point, or a machine that was off for long, makes the others only so much older.
//!
//! What it promises, with new points added or not: what is removed once would never be kept later; what is kept is
//! kept again when it is asked twice.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use tracker::extent::Epoch;

use super::manifest::Consistency;

/// Rungs of a ladder at most.
const RUNGS_MAX: usize = 16;
/// Longest span in seconds: a hundred years.
const SPAN_SECONDS_MAX: u64 = 100 * 366 * DAY;
const DAY: u64 = 24 * 3600;

/// One point of every interval, for a span.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rung {
    /// Seconds of a slot, not zero.
    pub interval_seconds: u64,
    /// Seconds from the newest point back.
    pub span_seconds: u64,
}

/// A ladder, its rungs in ascending order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    rungs: Vec<Rung>,
}

/// A recovery point, as far as retention looks at it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Its number, which is the order.
    pub epoch: Epoch,
    /// When it was cut, in seconds; `None`: its manifest cannot be read.
    pub created_seconds: Option<i64>,
    /// For whom it is consistent.
    pub consistency: Consistency,
    /// Somebody holds it.
    pub pinned: bool,
    /// It is beyond repair.
    pub aside: bool,
}

/// What becomes of a point, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is the newest one, or the newest good one.
    Newest,
    /// It is pinned.
    Pinned,
    /// Its manifest cannot be read, so nothing is known of it.
    Unreadable,
    /// No policy is configured.
    NoPolicy,
    /// It is beyond repair, and not older than what is kept.
    Aside,
    /// It is the one of its slot on this rung.
    Rung(Rung),
    /// Another one has its slot on every rung that reaches so far.
    SlotTaken(Epoch),
    /// It is older than every rung reaches.
    TooOld,
}

impl Verdict {
    /// Whether the point stays.
    pub fn keeps(self) -> bool {
        !matches!(self, Self::SlotTaken(_) | Self::TooOld)
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Newest => f.write_str("the newest"),
            Self::Pinned => f.write_str("pinned"),
            Self::Unreadable => f.write_str("its manifest cannot be read: run `shipper verify`"),
            Self::NoPolicy => f.write_str("no retention is configured"),
            Self::Aside => f.write_str("beyond repair"),
            Self::Rung(rung) => write!(f, "one of {rung}"),
            Self::SlotTaken(other) => write!(f, "{other} stands for its time"),
            Self::TooOld => f.write_str("older than all that is kept"),
        }
    }
}

/// A time in its largest unit that fits.
fn shown(seconds: u64) -> String {
    for (unit, name) in [(DAY, "d"), (3600, "h"), (60, "min")] {
        if seconds.is_multiple_of(unit) {
            return format!("{}{name}", seconds / unit);
        }
    }
    format!("{seconds}s")
}

impl fmt::Display for Rung {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (interval, span) = (shown(self.interval_seconds), shown(self.span_seconds));
        write!(f, "{interval} for {span}")
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rungs: Vec<String> = self.rungs.iter().map(Rung::to_string).collect();
        write!(f, "every {}", rungs.join(", "))
    }
}

fn seconds(text: &str) -> Result<u64, String> {
    let invalid = || format!("{text:?} is not a time such as 30s, 15min, 6h, 7d or 2w");
    let digits = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let unit = match unit.trim_start() {
        "s" => 1,
        "m" | "min" => 60,
        "h" => 3600,
        "d" => DAY,
        "w" => 7 * DAY,
        "y" => 365 * DAY,
        _ => return Err(invalid()),
    };
    let number: u64 = number.parse().map_err(|_| invalid())?;
    let seconds = number.checked_mul(unit).ok_or_else(invalid)?;
    if !(1..=SPAN_SECONDS_MAX).contains(&seconds) {
        return Err(format!("{text:?} is not a time from 1s to 100y"));
    }
    Ok(seconds)
}

impl FromStr for Policy {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let example = "such as \"every 30s for 2h, 15min for 24h, 6h for 7d, 1d for 90d\"";
        let mut rungs: Vec<Rung> = Vec::new();
        for part in text.trim().trim_start_matches("every ").split(',') {
            let part = part.trim();
            let Some((interval, span)) = part.split_once(" for ") else {
                return Err(format!(
                    "{part:?} does not say `INTERVAL for SPAN`, {example}"
                ));
            };
            let rung = Rung {
                interval_seconds: seconds(interval.trim())?,
                span_seconds: seconds(span.trim())?,
            };
            if rung.interval_seconds > rung.span_seconds {
                return Err(format!("{part:?} has an interval longer than its span"));
            }
            if let Some(before) = rungs.last()
                && (before.interval_seconds >= rung.interval_seconds
                    || before.span_seconds >= rung.span_seconds)
            {
                return Err(format!(
                    "{part:?} follows \"{before}\": interval and span have to grow"
                ));
            }
            rungs.push(rung);
        }
        if rungs.len() > RUNGS_MAX {
            return Err(format!("{RUNGS_MAX} intervals at most can be kept"));
        }
        Ok(Self { rungs })
    }
}

impl Policy {
    /// The rungs, in ascending order.
    pub fn rungs(&self) -> &[Rung] {
        &self.rungs
    }

    /// Seconds that a gap between two points counts for at most.
    fn gap_seconds_max(&self) -> u64 {
        let last = self.rungs.last();
        last.map_or(0, |rung| {
            (rung.span_seconds / 8).max(2 * rung.interval_seconds)
        })
    }
}

/// Decides about all recovery points of a machine, given in ascending order; the verdicts are in the same order.
pub fn decide(policy: Option<&Policy>, points: &[Candidate]) -> Vec<Verdict> {
    let newest_good = points
        .iter()
        .rposition(|point| !point.aside && point.created_seconds.is_some());
    let newest = points.len().checked_sub(1);
    let ladder = policy.map(|policy| Ladder::of(policy, points));
    let judge = |(position, point): (usize, &Candidate)| match &ladder {
        _ if Some(position) == newest || Some(position) == newest_good => Verdict::Newest,
        _ if point.pinned => Verdict::Pinned,
        None => Verdict::NoPolicy,
        Some(_) if point.created_seconds.is_none() && !point.aside => Verdict::Unreadable,
        Some(ladder) => ladder.verdict(position, points),
    };
    points.iter().enumerate().map(judge).collect()
}

/// Among which points a slot is given away.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Class {
    All,
    Application,
}

/// The classes that a point is in: none if it cannot be restored.
fn classes(point: &Candidate) -> &'static [Class] {
    match (
        point.aside || point.created_seconds.is_none(),
        point.consistency,
    ) {
        (true, _) => &[],
        (false, Consistency::Crash) => &[Class::All],
        (false, Consistency::Application) => &[Class::All, Class::Application],
    }
}

/// Ages of points, and who has which slot.
struct Ladder<'a> {
    policy: &'a Policy,
    /// What each point counts as: its time, or that of the next one.
    times: Vec<i64>,
    ages: Vec<u64>,
    /// The position of the point that has a slot, by rung and slot, among all and among those that are consistent for
    /// applications.
    holders: BTreeMap<(Class, usize, i64), usize>,
}

impl<'a> Ladder<'a> {
    fn of(policy: &'a Policy, points: &[Candidate]) -> Self {
        let times = times(points);
        let mut ages = vec![0_u64; points.len()];
        for position in (1..points.len()).rev() {
            let gap = times[position].saturating_sub(times[position - 1]);
            let gap = u64::try_from(gap).unwrap_or(0);
            let counted = gap.min(policy.gap_seconds_max());
            ages[position - 1] = ages[position].saturating_add(counted);
        }
        let mut holders = BTreeMap::new();
        for (index, rung) in policy.rungs.iter().enumerate() {
            for position in 0..points.len() {
                if ages[position] > rung.span_seconds {
                    continue;
                }
                let slot = slot(rung, times[position]);
                for class in classes(&points[position]) {
                    holders.insert((*class, index, slot), position);
                }
            }
        }
        Self {
            policy,
            times,
            ages,
            holders,
        }
    }

    fn verdict(&self, position: usize, points: &[Candidate]) -> Verdict {
        let mut verdict = Verdict::TooOld;
        for (index, rung) in self.policy.rungs.iter().enumerate() {
            if self.ages[position] > rung.span_seconds {
                continue;
            }
            if points[position].aside {
                return Verdict::Aside;
            }
            let slot = slot(rung, self.times[position]);
            for class in classes(&points[position]) {
                match self.holders.get(&(*class, index, slot)) {
                    Some(holder) if *holder == position => return Verdict::Rung(*rung),
                    Some(holder) => verdict = Verdict::SlotTaken(points[*holder].epoch),
                    None => {}
                }
            }
        }
        verdict
    }
}

fn slot(rung: &Rung, time: i64) -> i64 {
    time.div_euclid(i64::try_from(rung.interval_seconds).unwrap_or(i64::MAX))
}

/// The times of points. One that cannot be read has that of the next one, so that it is not older for what lies before it.
fn times(points: &[Candidate]) -> Vec<i64> {
    let newest = points.iter().rev().find_map(|point| point.created_seconds);
    let mut next = newest.unwrap_or(0);
    let mut times: Vec<i64> = Vec::with_capacity(points.len());
    for point in points.iter().rev() {
        next = point.created_seconds.unwrap_or(next);
        times.push(next);
    }
    times.reverse();
    times
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LADDER: &str = "every 30s for 2h, 15min for 24h, 6h for 7d, 1d for 90d";

    fn policy() -> Policy {
        LADDER.parse().unwrap()
    }

    fn point(epoch: u64, created: i64) -> Candidate {
        Candidate {
            epoch: Epoch(epoch),
            created_seconds: Some(created),
            consistency: Consistency::Crash,
            pinned: false,
            aside: false,
        }
    }

    fn kept(policy: &Policy, points: &[Candidate]) -> Vec<Candidate> {
        let verdicts = decide(Some(policy), points);
        let both = points.iter().zip(verdicts);
        both.filter(|(_, verdict)| verdict.keeps())
            .map(|(point, _)| point.clone())
            .collect()
    }

    #[test]
    fn a_ladder_is_read_and_shown() {
        let policy = policy();
        assert_eq!(policy.rungs().len(), 4);
        assert_eq!(
            policy.to_string(),
            "every 30s for 2h, 15min for 1d, 6h for 7d, 1d for 90d"
        );
        assert_eq!(policy.to_string().parse(), Ok(policy));
        for (text, word) in [
            ("", "INTERVAL for SPAN"),
            ("30s", "INTERVAL for SPAN"),
            ("30s for", "INTERVAL for SPAN"),
            ("30x for 2h", "30x"),
            ("0s for 2h", "0s"),
            ("-1s for 2h", "-1s"),
            ("3h for 2h", "longer"),
            ("1h for 2h, 30min for 24h", "grow"),
            ("1h for 2h, 2h for 2h", "grow"),
            ("1h for 999999999999y", "999999999999y"),
            ("1h for 2h,", "INTERVAL for SPAN"),
        ] {
            let error = text.parse::<Policy>().unwrap_err();
            assert!(error.contains(word), "{text}: {error}");
        }
    }

    #[test]
    fn nothing_is_removed_without_a_policy() {
        let points = [point(1, 0), point(2, 0), point(3, 1 << 40)];
        let verdicts = decide(None, &points);
        assert!(verdicts.iter().all(|verdict| verdict.keeps()));
        assert!(decide(None, &[]).is_empty() && decide(Some(&policy()), &[]).is_empty());
    }

    #[test]
    fn a_year_of_points_becomes_a_ladder() {
        let minute = 60;
        let points: Vec<Candidate> = (0..120 * 24 * 60)
            .map(|at| point(at as u64 + 1, at * minute))
            .collect();
        let kept = kept(&policy(), &points);
        // 121 of two hours, 4 an hour of a day, 4 a day of a week, 1 a day of ninety.
        assert!((280..=330).contains(&kept.len()), "{}", kept.len());
        let oldest = kept.first().and_then(|point| point.created_seconds);
        let span = points.last().unwrap().created_seconds.unwrap() - oldest.unwrap();
        assert!(span <= 90 * DAY as i64 && span > 88 * DAY as i64, "{span}");
    }

    #[test]
    fn a_clock_that_jumped_ahead_removes_little() {
        let day = DAY as i64;
        let mut points: Vec<Candidate> = (1..=60).map(|at| point(at, at as i64 * day)).collect();
        points.push(point(61, 60 * day + 10 * 365 * day));
        assert!(kept(&policy(), &points).len() >= 59);
        // And back again: the one that jumped is only one of many.
        points.extend((62..=70).map(|at| point(at, at as i64 * day)));
        assert!(kept(&policy(), &points).len() >= 68);
    }

    #[test]
    fn what_is_held_or_cannot_be_read_stays() {
        let year = 365 * DAY as i64;
        let mut points: Vec<Candidate> = (1..=400).map(|at| point(at, at as i64 * year)).collect();
        points[0].pinned = true;
        points[1].created_seconds = None;
        points[2].aside = true;
        points[399].aside = true;
        let verdicts = decide(Some(&policy()), &points);
        assert_eq!(verdicts[0], Verdict::Pinned);
        assert_eq!(verdicts[1], Verdict::Unreadable);
        assert_eq!(verdicts[2], Verdict::TooOld);
        assert_eq!(verdicts[398], Verdict::Newest, "the newest good one");
        assert_eq!(verdicts[399], Verdict::Newest);
    }

    #[test]
    fn the_newest_of_either_kind_has_the_slot() {
        let mut points = [
            point(1, 0),
            point(2, 60),
            point(3, 120),
            point(4, 180),
            point(5, 1000),
        ];
        points[1].consistency = Consistency::Application;
        points[3].aside = true;
        let policy: Policy = "15min for 7d".parse().unwrap();
        let rung = Verdict::Rung(policy.rungs()[0]);
        let verdicts = decide(Some(&policy), &points);
        let taken = Verdict::SlotTaken(Epoch(3));
        assert_eq!(
            verdicts,
            [taken, rung, rung, Verdict::Aside, Verdict::Newest]
        );
    }

    prop_compose! {
        fn candidate()(
            step in prop_oneof![8 => 0..4000_i64, 1 => -100_000..0_i64, 1 => 0..10_000_000_000_i64],
            application: bool,
            pinned in prop::bool::weighted(0.05),
            aside in prop::bool::weighted(0.05),
            readable in prop::bool::weighted(0.95),
        ) -> (i64, bool, bool, bool, bool) {
            (step, application, pinned, aside, readable)
        }
    }

    fn history(raw: Vec<(i64, bool, bool, bool, bool)>) -> Vec<Candidate> {
        let mut time = 0_i64;
        let mut points = Vec::new();
        for (epoch, (step, application, pinned, aside, readable)) in (1..).zip(raw) {
            time += step;
            points.push(Candidate {
                created_seconds: readable.then_some(time),
                consistency: match application {
                    true => Consistency::Application,
                    false => Consistency::Crash,
                },
                pinned,
                aside,
                ..point(epoch, time)
            });
        }
        points
    }

    proptest! {
        #[test]
        fn what_is_kept_is_kept_again(raw in prop::collection::vec(candidate(), 0..200)) {
            let points = history(raw);
            let once = kept(&policy(), &points);
            prop_assert_eq!(kept(&policy(), &once), once);
        }

        #[test]
        fn what_is_removed_would_not_be_kept_later(
            raw in prop::collection::vec(candidate(), 1..200),
            cut in any::<prop::sample::Index>(),
        ) {
            let points = history(raw);
            let early = &points[..=cut.index(points.len())];
            let before = kept(&policy(), early);
            let all = kept(&policy(), &points);
            for point in early.iter().filter(|point| all.contains(point)) {
                prop_assert!(before.contains(point), "{:?}", point);
            }
        }

        #[test]
        fn every_slot_in_reach_has_a_point(raw in prop::collection::vec(candidate(), 1..200)) {
            let points = history(raw);
            let policy = policy();
            let ladder = Ladder::of(&policy, &points);
            let verdicts = decide(Some(&policy), &points);
            for (index, rung) in policy.rungs().iter().enumerate() {
                for (position, time) in ladder.times.iter().enumerate() {
                    if ladder.ages[position] > rung.span_seconds {
                        continue;
                    }
                    for class in classes(&points[position]) {
                        let holder = ladder.holders[&(*class, index, slot(rung, *time))];
                        prop_assert!(verdicts[holder].keeps() && holder >= position);
                    }
                }
            }
        }

        #[test]
        fn the_newest_and_the_pinned_stay(raw in prop::collection::vec(candidate(), 1..200)) {
            let points = history(raw);
            let verdicts = decide(Some(&policy()), &points);
            prop_assert!(verdicts.last().unwrap().keeps());
            let good = points.iter().rposition(|p| !p.aside && p.created_seconds.is_some());
            prop_assert!(good.is_none_or(|good| verdicts[good].keeps()));
            for (point, verdict) in points.iter().zip(verdicts) {
                prop_assert!(!point.pinned || verdict.keeps());
            }
        }

        #[test]
        fn texts_never_panic(text in "(every )?[0-9smhd for,]{0,40}") {
            let _read = text.parse::<Policy>();
        }
    }
}
