//! The epochs of a disk as four watermarks, and what belongs to which. Pure.
//!
//! `open > closed > sealed >= committed`; every record carries its epoch, and sets are intervals:
//! open: after the closed (or else the sealed) one; closed: after the sealed one up to the closed
//! one; sealed: after the committed one up to the sealed one. Giving up a closed epoch, or losing
//! the spool, moves a watermark and thereby merges; no record is touched.

use serde::{Deserialize, Serialize};

use super::format::{EPOCH_MAX, Superblock};
use crate::extent::Epoch;

/// The watermarks of a disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EpochState {
    /// New writes are stamped with it.
    pub open: Epoch,
    /// It is being captured.
    pub closed: Option<Epoch>,
    /// The highest epoch that is complete and durable in the spool.
    pub sealed: Epoch,
    /// The highest epoch whose recovery point is durable in the vault.
    pub committed: Epoch,
    /// Every block counts as changed as of this epoch.
    pub resync: Option<Epoch>,
}

impl EpochState {
    /// The state of a new journal: nothing is in the vault, so every block counts as changed.
    pub fn initial() -> Self {
        Self {
            open: Epoch(1),
            resync: Some(Epoch(1)),
            ..Self::default()
        }
    }

    /// Epochs after this one belong to the open set.
    pub fn open_after(&self) -> Epoch {
        self.closed.unwrap_or(self.sealed)
    }

    /// Closes the open epoch; the next one is `next`, which the caller has chosen above it.
    pub fn cut(&mut self, next: Epoch) {
        self.closed = Some(self.open);
        self.open = next;
    }

    /// The closed epoch is durable in the spool.
    pub fn seal(&mut self, epoch: Epoch) {
        self.sealed = self.sealed.max(epoch);
        if self.closed.is_some_and(|closed| closed <= epoch) {
            self.closed = None;
        }
    }

    /// The epoch's recovery point is durable in the vault.
    pub fn commit(&mut self, epoch: Epoch) {
        self.seal(epoch);
        self.committed = self.committed.max(epoch);
        if self.resync.is_some_and(|resync| resync <= self.committed) {
            self.resync = None;
        }
    }

    /// The machine went down, and what was recorded may be lost with it: every block counts as
    /// changed. What is sealed stands, because it was durable before.
    pub fn distrust(&mut self) {
        self.closed = None;
        self.resync = Some(self.open);
    }

    /// The spool is lost.
    pub fn revert(&mut self) {
        self.closed = None;
        self.sealed = self.committed;
    }

    /// Whether the watermarks are in order and can go on growing.
    pub fn is_consistent(&self) -> bool {
        self.committed <= self.sealed
            && self.sealed < self.open
            && self.open.0 <= EPOCH_MAX
            && self
                .closed
                .is_none_or(|closed| self.sealed < closed && closed < self.open)
            && self
                .resync
                .is_none_or(|resync| self.committed < resync && resync <= self.open)
    }

    /// The state that a superblock holds.
    pub fn of(superblock: &Superblock) -> Self {
        let some = |epoch: u64| (epoch != 0).then_some(Epoch(epoch));
        Self {
            open: Epoch(superblock.open.get()),
            closed: some(superblock.closed.get()),
            sealed: Epoch(superblock.sealed.get()),
            committed: Epoch(superblock.committed.get()),
            resync: some(superblock.resync.get()),
        }
    }

    /// Puts the state into a superblock.
    pub fn store(&self, superblock: &mut Superblock) {
        superblock.open = self.open.0.into();
        superblock.closed = self.closed.map_or(0, |epoch| epoch.0).into();
        superblock.sealed = self.sealed.0.into();
        superblock.committed = self.committed.0.into();
        superblock.resync = self.resync.map_or(0, |epoch| epoch.0).into();
    }
}

/// One state for all disks of a machine, made from what each journal holds after a crash that may
/// have come in the middle of an update of all of them.
///
/// | found | done |
/// |---|---|
/// | the open epoch reached some disks | the highest is open on all |
/// | a cut reached some disks | not answered: the epoch is merged into the open one |
/// | a seal reached some disks | not answered: the epoch is closed on all, to be sealed again |
/// | an epoch given up on some disks, or the spool on some | the same on all |
/// | a commit reached some disks | it stands there, and will be repeated |
/// | a disk of which all counts as changed in the open epoch | it takes the watermarks of the others |
///
/// The last is a disk whose journal is new, or that alone was not stopped cleanly. Its epochs tell
/// nothing, so they must not hold up the recovery points of the others; no closed epoch was captured
/// with it, so none stays closed. In all other cases watermarks are only lowered, which merges.
pub fn reconcile(states: &mut [EpochState]) {
    let Some(open) = states.iter().map(|state| state.open).max() else {
        return;
    };
    let (suspect, known): (Vec<_>, Vec<_>) = states
        .iter_mut()
        .partition(|state| state.resync.is_some_and(|epoch| epoch > state.open_after()));
    let closed = known.iter().filter_map(|state| state.closed).max();
    let kept = closed.filter(|&epoch| {
        suspect.is_empty()
            && known
                .iter()
                .all(|state| state.closed == Some(epoch) || state.sealed == epoch)
    });
    let sealed = known.iter().map(|state| state.sealed).min();
    let committed = known.iter().map(|state| state.committed).min();
    for state in known {
        state.open = open;
        state.sealed = sealed.unwrap_or_default().max(state.committed);
        state.closed = kept.filter(|&epoch| epoch > state.sealed);
    }
    for state in suspect {
        state.open = open;
        state.closed = None;
        state.resync = Some(open);
        state.sealed = sealed.unwrap_or_default().max(state.sealed);
        state.committed = committed.unwrap_or_default().max(state.committed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_cut_that_did_not_reach_every_disk_is_merged() {
        let mut first = EpochState::initial();
        let second = first;
        first.cut(Epoch(2));
        let mut states = [first, second];
        reconcile(&mut states);
        for state in states {
            assert_eq!((state.open, state.closed), (Epoch(2), None));
        }
    }

    #[test]
    fn a_seal_that_did_not_reach_every_disk_keeps_the_epoch_closed() {
        let mut first = EpochState::initial();
        first.cut(Epoch(2));
        let second = first;
        first.seal(Epoch(1));
        let mut states = [first, second];
        reconcile(&mut states);
        for state in states {
            assert_eq!((state.sealed, state.closed), (Epoch::ZERO, Some(Epoch(1))));
        }
    }

    #[test]
    fn a_new_disk_takes_the_watermarks_of_the_others() {
        let mut old = EpochState::initial();
        for epoch in 1..5 {
            old.cut(Epoch(epoch + 1));
            old.seal(Epoch(epoch));
        }
        old.commit(Epoch(3));
        let mut states = [EpochState::initial(), old];
        reconcile(&mut states);
        assert_eq!(states[1], old);
        let expected = EpochState {
            resync: Some(Epoch(5)),
            ..old
        };
        assert_eq!(states[0], expected);
    }

    /// What a machine does to all of its disks.
    fn change(state: &mut EpochState, number: u8) {
        match number {
            0 if state.closed.is_none() => state.cut(state.open.next()),
            1 => state.closed.map_or((), |closed| state.seal(closed)),
            2 => state.closed = None,
            3 => state.commit(state.sealed),
            4 => state.revert(),
            5 => state.distrust(),
            _ => *state = EpochState::initial(),
        }
    }

    proptest! {
        #[test]
        fn disks_that_an_update_left_apart_are_brought_together_without_loss(
            numbers in prop::collection::vec(0..5u8, 0..40),
            last in 0..7u8,
            reached in prop::collection::vec(any::<bool>(), 3),
            kept in prop::collection::vec(any::<bool>(), 3),
        ) {
            let mut states = [EpochState::initial(); 3];
            for number in numbers {
                states.iter_mut().for_each(|state| change(state, number));
            }
            for (state, _) in states.iter_mut().zip(&reached).filter(|(_, reached)| **reached) {
                change(state, last);
            }
            let once = brought_together(states)?;
            // The next crash may come while only some disks have been told.
            for ((state, once), _) in states.iter_mut().zip(once).zip(&kept).filter(|(_, kept)| **kept) {
                *state = once;
            }
            brought_together(states)?;
        }
    }

    fn brought_together(before: [EpochState; 3]) -> Result<[EpochState; 3], TestCaseError> {
        let mut states = before;
        reconcile(&mut states);
        for (state, before) in states.iter().zip(&before) {
            prop_assert!(state.is_consistent(), "{:?}", state);
            let first = states[0];
            prop_assert_eq!((state.open, state.closed), (first.open, first.closed));
            prop_assert!(state.open >= before.open);
            let all_is_open = state.resync == Some(state.open) && state.closed.is_none();
            prop_assert!(all_is_open || state.resync == before.resync);
            // Nothing that was to be captured counts as sealed or committed.
            prop_assert!(all_is_open || state.sealed <= before.sealed);
            prop_assert!(all_is_open || state.committed == before.committed);
        }
        Ok(states)
    }

    #[test]
    fn a_commit_drops_an_older_resync() {
        let mut state = EpochState::initial();
        state.cut(Epoch(2));
        state.seal(Epoch(1));
        assert_eq!(state.resync, Some(Epoch(1)));
        state.commit(Epoch(1));
        assert_eq!(state.resync, None);
        assert!(state.is_consistent());
    }
}
