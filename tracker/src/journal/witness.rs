//! What the times of a disk tell about who wrote to it.
//!
//! Overview: a file keeps the time of its last modification. While a disk is served the journal
//! keeps that time, and when it was looked at; at the next start the two are compared, and a disk
//! that somebody else wrote to, or put back, is found out. Every block then counts as changed.
//!
//! | journal | the disk is | verdict |
//! |---|---|---|
//! | keeps no time, or the disk has none | | nothing is known |
//! | closed cleanly | as kept | ours |
//! | closed cleanly | later or earlier than kept | written, or put back |
//! | not closed | from the time kept to [`MARGIN_MS`] after the last sign of a write | ours |
//! | not closed | later or earlier than that | written, or put back |
//! | not closed, and the clock was set since | | cannot be told |
//! | not closed, and the machine went down | the same with wider margins, and the clock is not asked | |
//! | keeps damaged times | | cannot be told |
//!
//! What cannot be told counts as written: a needless comparison costs reads, a missed one costs the
//! recovery points to come.
//!
//! Order: the disk is looked at first; then the words are stored, the time of the look before the
//! sign of a write is taken back. A write that comes in between bears a time shortly after the look.
//!
//! Crash consistency: each word is whole after SIGKILL. With some of them new and some old, the time
//! of the look is the newest, so the bounds are wider by the time between two looks. After a power cut
//! the words are as they were at some moment since the last sync of the journal, and the time of the file
//! as its file system wrote it last; the margins are wider by that.
//!
//! What it does not handle: devices, whose times mean nothing; writes by somebody else while a
//! tracker serves the disk, or within the margin after its last write and a kill; somebody who sets
//! the time of the file back to what it was on purpose.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use nix::time::{ClockId, clock_gettime};

use super::format::{ALARM_OFFSET, ALARM_WORDS, TIME_WORDS, Time, decode_time, encode_time};
use super::mapping::SharedWords;

/// How much later than the last sign of a write the disk may have been written by a tracker that was
/// killed. The kernel sets the time when it begins with a write, so this is what passes between two
/// looks (100 ms), the wait of a request in the queues, and the rest of a trim that the kernel ends
/// after the kill. More than a few seconds is rare and costs a comparison; and nobody opens the image
/// and writes to it so soon after a kill.
pub const MARGIN_MS: i64 = 5_000;
/// The same after a power cut, by which the last signs may be lost: those since the last sync of the
/// journal, which come once a second unless the storage is slow.
pub const POWER_CUT_MARGIN_MS: i64 = 15_000;
/// By how much the time of a file may be older after a power cut than it was: file systems write times
/// back within half a minute.
pub const POWER_CUT_LAG_MS: i64 = 90_000;
/// By how much the two clocks may part before they count as set. Above a leap second, and far above
/// what passes between two questions to the kernel; slewing moves both.
pub const CLOCK_STEP_MS: i64 = 2_000;

/// The words.
const MODIFIED: usize = 0;
const LOOKED: usize = 1;
const BOOTED: usize = 2;
const STIRRED: usize = 3;
const _: () = assert!(STIRRED + 1 == TIME_WORDS);

/// The time of a disk, and the clocks when it was looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moment {
    /// Its last modification.
    pub modified: Time,
    /// When it was looked at.
    pub looked: Time,
    /// When the machine was booted, as the clock has it now. It moves when the clock is set.
    pub booted: Time,
}

impl Moment {
    /// A disk that was last modified at this time, looked at now.
    pub fn now(modified: Time) -> Self {
        let looked = present();
        let running = clock_gettime(ClockId::CLOCK_BOOTTIME)
            .map_or(0, |time| time.tv_sec() * 1000 + time.tv_nsec() / 1_000_000);
        Self {
            modified,
            looked,
            booted: Time(looked.0 - running),
        }
    }
}

fn present() -> Time {
    let now = SystemTime::now();
    let since = now.duration_since(UNIX_EPOCH).unwrap_or_default();
    Time(i64::try_from(since.as_millis()).unwrap_or(i64::MAX))
}

/// What a journal keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Note {
    /// The last look.
    pub seen: Moment,
    /// The first write that was admitted since.
    pub stirred: Option<Time>,
}

/// Why a disk counts as written by somebody else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Suspicion {
    /// It was modified after the last time that can be the tracker's.
    Written {
        /// When it was modified.
        modified: Time,
        /// The last time that can be the tracker's.
        known: Time,
    },
    /// It is older than it was.
    PutBack {
        /// When it was modified.
        modified: Time,
        /// When it had been modified.
        known: Time,
    },
    /// The clock was set after a kill, so times cannot be compared.
    ClockSet,
    /// What is kept of the times is damaged.
    Damaged,
    /// The journal was closed over a disk of which a sync had failed, and the machine went down since: what
    /// the page cache held is gone.
    SyncFailed,
}

impl fmt::Display for Suspicion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Written { modified, known } => write!(
                f,
                "the disk was written while no tracker served it: at {modified}, the tracker's last \
                 time is {known}"
            ),
            Self::PutBack { modified, known } => write!(
                f,
                "the disk was put back while no tracker served it: it is of {modified}, and was of \
                 {known}"
            ),
            Self::ClockSet => write!(
                f,
                "the disk may have been written while no tracker served it: the clock was set after \
                 the tracker was killed"
            ),
            Self::SyncFailed => write!(
                f,
                "the disk may not hold what was written: a sync of it had failed before the machine went \
                 down"
            ),
            Self::Damaged => write!(
                f,
                "the disk may have been written while no tracker served it: what the journal keeps of \
                 its time is damaged"
            ),
        }
    }
}

/// How the tracker that kept the times ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    /// It closed the journal.
    Closed,
    /// It was killed, in this boot of the machine.
    Killed,
    /// The machine went down.
    PowerCut,
}

/// Compares what was kept with the disk as it is now. Pure.
pub(super) fn judge(
    kept: Result<Option<Note>, u64>,
    ending: Ending,
    now: Option<Moment>,
) -> Option<Suspicion> {
    let now = now?;
    let Ok(kept) = kept else {
        return Some(Suspicion::Damaged);
    };
    let Note { seen, stirred } = kept?;
    // A journal that is closed has been told of the last write by the last look.
    let exact = ending == Ending::Closed && stirred.is_none();
    if ending != Ending::PowerCut
        && !exact
        && seen.booted.0.abs_diff(now.booted.0) > CLOCK_STEP_MS as u64
    {
        return Some(Suspicion::ClockSet);
    }
    let modified = now.modified;
    // What the file system had not written of its times is lost with the power.
    let lag = match ending {
        Ending::PowerCut => POWER_CUT_LAG_MS,
        Ending::Closed | Ending::Killed => 0,
    };
    if modified.0.saturating_add(lag) < seen.modified.0 {
        let known = seen.modified;
        return Some(Suspicion::PutBack { modified, known });
    }
    let known = if exact {
        seen.modified
    } else {
        let sign = stirred.map_or(seen.looked, |time| time.max(seen.looked));
        let margin = match ending {
            Ending::PowerCut => POWER_CUT_MARGIN_MS,
            Ending::Closed | Ending::Killed => MARGIN_MS,
        };
        Time(sign.0.saturating_add(margin))
    };
    (modified > known).then_some(Suspicion::Written { modified, known })
}

/// The words of the times in a mapped journal.
#[derive(Clone, Copy, Debug)]
pub(super) struct Witness<'a> {
    words: &'a [AtomicU64],
}

impl<'a> Witness<'a> {
    pub fn of(head: &'a SharedWords) -> Self {
        let first = ALARM_OFFSET as usize / 8 + ALARM_WORDS;
        let words = head.words().get(first..first + TIME_WORDS);
        Self {
            words: words.unwrap_or_default(),
        }
    }

    /// What is kept; `None` if nothing is, as in a journal of an earlier program.
    ///
    /// # Errors
    ///
    /// A word is damaged; its offset in the file is returned.
    pub fn read(self) -> Result<Option<Note>, u64> {
        let mut times = [None; TIME_WORDS];
        for (index, (word, time)) in self.words.iter().zip(&mut times).enumerate() {
            let offset = ALARM_OFFSET + (ALARM_WORDS + index) as u64 * 8;
            *time = decode_time(word.load(Ordering::Acquire)).map_err(|_damaged| offset)?;
        }
        let (Some(modified), Some(looked), Some(booted)) =
            (times[MODIFIED], times[LOOKED], times[BOOTED])
        else {
            return Ok(None);
        };
        let seen = Moment {
            modified,
            looked,
            booted,
        };
        let stirred = times[STIRRED];
        Ok(Some(Note { seen, stirred }))
    }

    /// A write is about to be admitted: where it is the first since the last look, its time is kept.
    pub fn stir(self) {
        if let Some(word) = self.words.get(STIRRED)
            && word.load(Ordering::Relaxed) == 0
        {
            word.store(encode_time(present()), Ordering::Release);
        }
    }

    /// Keeps a look at the disk, unless it tells nothing new: an idle disk costs no store, and so no
    /// write to the journal's own disk.
    pub fn keep(self, seen: Moment) {
        let is_known = self.read().is_ok_and(|note| {
            note.is_some_and(|Note { seen: old, stirred }| {
                stirred.is_none()
                    && old.modified == seen.modified
                    && old.booted.0.abs_diff(seen.booted.0) <= CLOCK_STEP_MS as u64 / 2
            })
        });
        if is_known {
            return;
        }
        let store = |index: usize, word: u64| {
            if let Some(place) = self.words.get(index) {
                place.store(word, Ordering::Release);
            }
        };
        store(LOOKED, encode_time(seen.looked));
        store(BOOTED, encode_time(seen.booted));
        store(MODIFIED, encode_time(seen.modified));
        store(STIRRED, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOOTED: i64 = 1_000_000_000;
    const MODIFIED: i64 = 2_000_000_000;
    const LOOKED: i64 = MODIFIED + 60;
    const LATER: i64 = LOOKED + 100_000;

    fn note(stirred: Option<i64>) -> Note {
        Note {
            seen: Moment {
                modified: Time(MODIFIED),
                looked: Time(LOOKED),
                booted: Time(BOOTED),
            },
            stirred: stirred.map(Time),
        }
    }

    /// The disk at a start much later.
    fn at_start(modified: i64, booted: i64) -> Moment {
        Moment {
            modified: Time(modified),
            looked: Time(LATER + 1_000_000),
            booted: Time(booted),
        }
    }

    #[derive(Debug, PartialEq, Eq)]
    enum Verdict {
        Ours,
        Written,
        PutBack,
        ClockSet,
        Damaged,
    }

    fn verdict(kept: Result<Option<Note>, u64>, ending: Ending, now: Option<Moment>) -> Verdict {
        match judge(kept, ending, now) {
            None => Verdict::Ours,
            Some(Suspicion::Written { .. }) => Verdict::Written,
            Some(Suspicion::PutBack { .. }) => Verdict::PutBack,
            Some(Suspicion::ClockSet) => Verdict::ClockSet,
            Some(Suspicion::Damaged) => Verdict::Damaged,
            Some(Suspicion::SyncFailed) => unreachable!("times do not tell of syncs"),
        }
    }

    #[test]
    fn times_are_judged() {
        use Ending::{Closed, Killed, PowerCut};
        use Verdict::{ClockSet, Ours, PutBack, Written};
        let end = LOOKED + MARGIN_MS;
        let cut_end = LOOKED + POWER_CUT_MARGIN_MS;
        let busy_end = LATER + MARGIN_MS;
        let step = CLOCK_STEP_MS;
        // How it ended; the first write since the last look; the disk's time; by how much the clock
        // was set.
        let table = [
            (Closed, None, MODIFIED, 0, Ours),
            (Closed, None, MODIFIED + 1, 0, Written),
            (Closed, None, MODIFIED - 1, 0, PutBack),
            (Closed, None, i64::MAX, 0, Written),
            (Closed, None, i64::MIN, 0, PutBack),
            // The times of a clean close are equal or not, whatever the clock or the boot is.
            (Closed, None, MODIFIED, 86_400_000, Ours),
            (Closed, None, MODIFIED + 1, -86_400_000, Written),
            (Killed, None, MODIFIED, 0, Ours),
            (Killed, None, MODIFIED - 1, 0, PutBack),
            (Killed, None, LOOKED, 0, Ours),
            (Killed, None, end, 0, Ours),
            (Killed, None, end + 1, 0, Written),
            (Killed, Some(LATER), MODIFIED - 1, 0, PutBack),
            (Killed, Some(LATER), MODIFIED, 0, Ours),
            (Killed, Some(LATER), end + 1, 0, Ours),
            (Killed, Some(LATER), busy_end, 0, Ours),
            (Killed, Some(LATER), busy_end + 1, 0, Written),
            // A sign from before the look: the tracker was killed before it was taken back.
            (Killed, Some(MODIFIED), end, 0, Ours),
            (Killed, Some(MODIFIED), end + 1, 0, Written),
            (Killed, None, MODIFIED, step, Ours),
            (Killed, None, MODIFIED, -step, Ours),
            (Killed, None, MODIFIED, step + 1, ClockSet),
            (Killed, None, MODIFIED, -step - 1, ClockSet),
            (Killed, Some(LATER), MODIFIED - 1, i64::MIN / 2, ClockSet),
            // Closed without a last look.
            (Closed, Some(LATER), busy_end, 0, Ours),
            (Closed, Some(LATER), busy_end + 1, 0, Written),
            (Closed, Some(LATER), MODIFIED, step + 1, ClockSet),
            // Another boot, whose clocks mean nothing to this one.
            (PowerCut, None, MODIFIED, step + 1, Ours),
            (PowerCut, None, cut_end, 0, Ours),
            (PowerCut, None, cut_end + 1, 0, Written),
            (PowerCut, Some(LATER), LATER + POWER_CUT_MARGIN_MS, 0, Ours),
            (
                PowerCut,
                Some(LATER),
                LATER + POWER_CUT_MARGIN_MS + 1,
                0,
                Written,
            ),
            (PowerCut, None, MODIFIED - POWER_CUT_LAG_MS, 0, Ours),
            (PowerCut, None, MODIFIED - POWER_CUT_LAG_MS - 1, 0, PutBack),
        ];
        for (ending, stirred, modified, set, expected) in table {
            let now = Some(at_start(modified, BOOTED + set));
            let found = verdict(Ok(Some(note(stirred))), ending, now);
            let what = format!("{ending:?}, {stirred:?}, {modified}, clock {set}");
            assert_eq!(found, expected, "{what}");
        }
    }

    #[test]
    fn what_is_not_known_is_no_verdict_and_what_is_damaged_is_one() {
        let now = Some(at_start(MODIFIED + 1, BOOTED));
        for ending in [Ending::Closed, Ending::Killed, Ending::PowerCut] {
            assert_eq!(verdict(Ok(None), ending, now), Verdict::Ours);
            assert_eq!(verdict(Ok(Some(note(None))), ending, None), Verdict::Ours);
            assert_eq!(verdict(Err(8216), ending, None), Verdict::Ours);
            assert_eq!(verdict(Err(8216), ending, now), Verdict::Damaged);
        }
    }

    #[test]
    fn the_clocks_of_a_moment_are_those_of_the_machine() {
        let (first, second) = (Moment::now(Time(5)), Moment::now(Time(5)));
        assert!(first.looked <= second.looked);
        assert!(first.booted < first.looked);
        // Preempted between the two questions it is off by as much.
        assert!(first.booted.0.abs_diff(second.booted.0) <= CLOCK_STEP_MS as u64);
    }
}
