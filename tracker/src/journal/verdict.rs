//! What is believed of a journal that is opened, from what its parts say. Pure.
//!
//! | clean | boot | a superblock | ring, alarm | intent log | disk | verdict |
//! |---|---|---|---|---|---|---|
//! | yes | any | whole | whole | any | as it was | trusted |
//! | yes | any | whole | whole | any | written by others | trusted, but every block counts as changed |
//! | no | same | whole | whole | any | as it was | trusted |
//! | no | same | whole | whole | any | written by others | trusted, but every block counts as changed |
//! | any | same | one damaged | any | any | any | refused |
//! | yes or same boot | | | damaged | any | any | refused |
//! | yes | other | one damaged | whole | any | | as if it were whole |
//! | no | other | whole | whole | whole | as it was, and no sync of it failed | trusted, armed regions are suspect |
//! | no | other | otherwise | | | | nothing is believed, every block counts as changed |
//!
//! A journal in which a failed sync has left its word, or that another file had taken the place of, is not
//! judged: nothing is believed. Refused before that: no superblock whole, a future version, another or a smaller disk, a file cut
//! short, numbers out of range. A damaged page of a checkpoint set stands for its own blocks, whatever
//! else is found.
//!
//! Within one boot the page cache keeps all that was stored, in order, so damage there is none that a
//! crash explains, and the operator decides. A power cut may leave any page old; what it damages beyond
//! that costs a comparison, never a start.

use std::fmt;

/// The intent log of a journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Intents {
    /// It tells which regions were armed.
    Whole,
    /// It does not.
    Damaged,
    /// The program that wrote the journal did not arm any.
    Missing,
}

/// What the parts of a journal say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Findings {
    /// It was closed.
    pub clean: bool,
    /// It was written in this boot of the machine.
    pub same_boot: bool,
    /// One copy of the superblock is damaged, and was not being rewritten.
    pub copy_damaged: bool,
    /// A slot of the ring is damaged.
    pub ring_damaged: bool,
    /// A word of the alarm or an epoch of the overflow bits is damaged.
    pub alarm_damaged: bool,
    /// The intent log.
    pub intents: Intents,
    /// Somebody else wrote to the disk, or put it back, or may have.
    pub written_by_others: bool,
    /// A sync of the disk failed before.
    pub disk_failed: bool,
}

/// What is believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing is done with it until an operator says so.
    Refuse,
    /// Ring, alarm and sets are the truth.
    Trust,
    /// The same, but every block counts as changed.
    TrustAllButBlocks,
    /// The same, and every block of the armed regions counts as changed.
    Suspect,
    /// Nothing that is recorded; every block counts as changed.
    Distrust(Why),
}

/// Why a journal says nothing after a power cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// A copy of the superblock is damaged.
    Superblock,
    /// A slot of the ring is damaged.
    Ring,
    /// A word of the alarm is damaged.
    Alarm,
    /// The intent log is damaged.
    IntentLog,
    /// It comes from a program that has none.
    NoIntentLog,
    /// Somebody else wrote to the disk.
    Disk,
    /// A sync of the disk had failed.
    DiskFailed,
    /// A sync of the journal had failed, or there was another file in its place. Not for [`verdict`]: nothing
    /// else is asked then, in whatever boot.
    JournalFailed,
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Superblock => "a superblock is damaged",
            Self::Ring => "a record is damaged",
            Self::Alarm => "its alarm is damaged",
            Self::IntentLog => "its intent log is damaged",
            Self::NoIntentLog => "it is of a version without an intent log",
            Self::Disk => "the disk is not as the tracker left it",
            Self::DiskFailed => "a sync of the disk had failed",
            Self::JournalFailed => "a sync of the journal had failed",
        })
    }
}

/// Judges.
pub fn verdict(findings: &Findings) -> Verdict {
    let Findings {
        clean,
        same_boot,
        copy_damaged,
        ring_damaged,
        alarm_damaged,
        intents,
        written_by_others,
        disk_failed,
    } = *findings;
    if same_boot && copy_damaged {
        return Verdict::Refuse;
    }
    if clean || same_boot {
        return match (ring_damaged || alarm_damaged, written_by_others) {
            (true, _) => Verdict::Refuse,
            (false, true) => Verdict::TrustAllButBlocks,
            (false, false) => Verdict::Trust,
        };
    }
    let reasons = [
        (intents == Intents::Missing, Why::NoIntentLog),
        (copy_damaged, Why::Superblock),
        (ring_damaged, Why::Ring),
        (alarm_damaged, Why::Alarm),
        (intents == Intents::Damaged, Why::IntentLog),
        (written_by_others, Why::Disk),
        (disk_failed, Why::DiskFailed),
    ];
    match reasons.into_iter().find(|(holds, _)| *holds) {
        Some((_, why)) => Verdict::Distrust(why),
        None => Verdict::Suspect,
    }
}
