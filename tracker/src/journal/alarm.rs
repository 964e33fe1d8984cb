//! The alarm: every block counts as changed as of an epoch.
//!
//! Overview: a worker that finds the ring full raises it in the middle of a guest's write, so it is
//! one store. It stays until the epoch is committed.
//!
//! Why there are two words, for even and for odd epochs: an alarm of the open epoch must not cover
//! up that of the closed one, which is being captured and has to learn of it. Epochs that follow
//! each other differ in parity, and while one is closed no further one is opened.
//!
//! Why one word is enough for all epochs of a parity: the closed set may hold earlier epochs that
//! were given up. Their alarms are gathered in the word of the epoch that closes, before a next one
//! is opened ([`Alarm::gather`]). What is sealed is asked for again only when it is merged into the
//! open set, where a later alarm stands for all of it.
//!
//! A third word holds the latest epoch in which the alarm was raised, and is never gathered: whoever
//! has looked at every block since then knows by it whether anything was lost meanwhile.
//!
//! Crash consistency: a word is whole or absent after SIGKILL, and carries a check of its own.

use std::sync::atomic::{AtomicU64, Ordering};

use super::format::{ALARM_OFFSET, ALARM_WORDS, DOUBT_WORD, decode_alarm, encode_alarm};
use super::mapping::SharedWords;
use crate::extent::Epoch;

/// The word in which a failed sync leaves its mark: the kernel may have dropped pages of the file, so
/// whoever opens it after a kill does not believe that it is complete. It never goes over into the file that
/// takes the place of this one.
pub(super) fn doubt_of(head: &SharedWords) -> Option<&AtomicU64> {
    head.words().get(ALARM_OFFSET as usize / 8 + DOUBT_WORD)
}

/// Whether a sync of the journal has failed.
pub(super) fn is_doubtful(head: &SharedWords) -> bool {
    doubt_of(head).is_some_and(|word| word.load(Ordering::Acquire) != 0)
}

/// Stores the epoch in a word unless a later one is there. `false` if the word is damaged, which stays, so
/// that nobody takes the journal for whole.
pub(super) fn lift(word: &AtomicU64, epoch: Epoch) -> bool {
    let mut present = word.load(Ordering::Acquire);
    loop {
        match decode_alarm(present) {
            Err(_damaged) => return false,
            Ok(Some(set)) if set >= epoch => return true,
            Ok(_) => {}
        }
        let new = encode_alarm(epoch);
        match word.compare_exchange(present, new, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => return true,
            Err(now) => present = now,
        }
    }
}

/// The word of the latest alarm.
const LATEST: usize = 2;
const _: () = assert!(LATEST + 1 == ALARM_WORDS);

/// The alarm words of a mapped journal.
#[derive(Clone, Copy, Debug)]
pub struct Alarm<'a> {
    words: &'a [AtomicU64],
}

impl<'a> Alarm<'a> {
    /// The alarm in the mapped head of a journal.
    pub fn of(head: &'a SharedWords) -> Self {
        let first = ALARM_OFFSET as usize / 8;
        let words = head.words().get(first..first + ALARM_WORDS);
        Self {
            words: words.unwrap_or_default(),
        }
    }

    /// The epochs as of which every block counts as changed.
    ///
    /// # Errors
    ///
    /// A word is damaged; its offset in the file is returned.
    pub fn epochs(self) -> Result<Vec<Epoch>, u64> {
        let mut epochs = std::collections::BTreeSet::new();
        for (index, word) in self.words.iter().enumerate() {
            match decode_alarm(word.load(Ordering::Acquire)) {
                Ok(epoch) => epochs.extend(epoch),
                Err(_damaged) => return Err(ALARM_OFFSET + index as u64 * 8),
            }
        }
        Ok(epochs.into_iter().collect())
    }

    /// The latest epoch in which the alarm was raised.
    ///
    /// # Errors
    ///
    /// The word is damaged; its offset in the file is returned.
    pub fn latest(self) -> Result<Option<Epoch>, u64> {
        let word = self
            .words
            .get(LATEST)
            .map(|word| word.load(Ordering::Acquire));
        decode_alarm(word.unwrap_or_default()).map_err(|_damaged| ALARM_OFFSET + LATEST as u64 * 8)
    }

    /// Makes every block count as changed as of this epoch. Wait-free but for other raisers.
    pub fn raise(self, epoch: Epoch) {
        self.lift(LATEST, epoch);
        self.lift((epoch.0 & 1) as usize, epoch);
    }

    fn lift(self, index: usize, epoch: Epoch) {
        if let Some(word) = self.words.get(index) {
            lift(word, epoch);
        }
    }

    /// Raises the alarm of an epoch that is about to close if one of those that will be captured
    /// with it, which are the ones after `sealed`, has raised it.
    pub fn gather(self, sealed: Epoch, closing: Epoch) {
        for word in &self.words[..LATEST.min(self.words.len())] {
            let set = decode_alarm(word.load(Ordering::Acquire)).ok().flatten();
            if set.is_some_and(|set| sealed < set && set < closing) {
                self.lift((closing.0 & 1) as usize, closing);
            }
        }
    }

    /// Takes over what another alarm says.
    pub fn absorb(self, other: Alarm<'_>) {
        for (index, word) in other.words.iter().enumerate() {
            if let Ok(Some(epoch)) = decode_alarm(word.load(Ordering::Acquire)) {
                self.lift(index, epoch);
            }
        }
    }

    /// Clears what was raised in epochs up to `committed`. What is raised meanwhile for a later one
    /// stays.
    pub fn clear(self, committed: Epoch) {
        for word in self.words {
            let present = word.load(Ordering::Acquire);
            if matches!(decode_alarm(present), Ok(Some(epoch)) if epoch <= committed) {
                let _raised =
                    word.compare_exchange(present, 0, Ordering::AcqRel, Ordering::Acquire);
            }
        }
    }
}
