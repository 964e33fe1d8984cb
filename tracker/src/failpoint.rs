//! Named places at which a kill leaves something half done, or at which others may come in between.
//!
//! A test watches them and looks at what SIGKILL would leave at each, or does there what another
//! thread might do; see the tests of `journal` and `epoch`. Outside of tests a place is nothing at
//! all.

/// A place between two steps of something that must survive what happens in between.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[allow(missing_docs)]
pub enum Place {
    RecordAfterClaimBeforeFill,
    FillAfterMarkBeforeWords,
    FillAfterWordsBeforeSequence,
    RecordAfterRefusalBeforeAlarm,
    PublishAfterMarkBeforeWords,
    PublishAmidWords,
    PublishAfterWordsBeforeMagic,
    UpdateAfterPublishBeforeAlarm,
    UpdateAfterAlarmBeforePunch,
    UpdateAfterPunchBeforeSync,
    FoldAfterPageBeforeNext,
    FoldAfterPagesBeforePublish,
    FoldAfterPublishBeforeTail,
    DistrustAfterRingBeforeCheckpoint,
    DistrustAfterCheckpointBeforePublish,
    RecoverAfterHolesBeforePublish,
    RecoverAfterFirstPublishBeforeSecond,
    RecoverAfterSecondPublishBeforeGrow,
    GrowAfterCopyBeforeSync,
    GrowAfterMoveBeforePunch,
    GrowAfterRoomBeforeRecord,
    GrowAfterRecordBeforePublish,
    GrowAfterPublishBeforeSync,
    CloseAfterSyncBeforePublish,
    CutAfterGatherBeforeAdvance,
    CutAfterAdvanceBeforeUpdate,
    MachineAfterDiskBeforeNext,
    ResizeAfterFileBeforeJournal,
    ResizeAfterJournalBeforeSize,
    ReadAfterSuperblockBeforeRing,
    ReadAfterSeekBeforePage,
}

impl Place {
    /// All of them.
    #[cfg(test)]
    pub const ALL: [Self; 31] = [
        Self::RecordAfterClaimBeforeFill,
        Self::FillAfterMarkBeforeWords,
        Self::FillAfterWordsBeforeSequence,
        Self::RecordAfterRefusalBeforeAlarm,
        Self::PublishAfterMarkBeforeWords,
        Self::PublishAmidWords,
        Self::PublishAfterWordsBeforeMagic,
        Self::UpdateAfterPublishBeforeAlarm,
        Self::UpdateAfterAlarmBeforePunch,
        Self::UpdateAfterPunchBeforeSync,
        Self::FoldAfterPageBeforeNext,
        Self::FoldAfterPagesBeforePublish,
        Self::FoldAfterPublishBeforeTail,
        Self::DistrustAfterRingBeforeCheckpoint,
        Self::DistrustAfterCheckpointBeforePublish,
        Self::RecoverAfterHolesBeforePublish,
        Self::RecoverAfterFirstPublishBeforeSecond,
        Self::RecoverAfterSecondPublishBeforeGrow,
        Self::GrowAfterCopyBeforeSync,
        Self::GrowAfterMoveBeforePunch,
        Self::GrowAfterRoomBeforeRecord,
        Self::GrowAfterRecordBeforePublish,
        Self::GrowAfterPublishBeforeSync,
        Self::CloseAfterSyncBeforePublish,
        Self::CutAfterGatherBeforeAdvance,
        Self::CutAfterAdvanceBeforeUpdate,
        Self::MachineAfterDiskBeforeNext,
        Self::ResizeAfterFileBeforeJournal,
        Self::ResizeAfterJournalBeforeSize,
        Self::ReadAfterSuperblockBeforeRing,
        Self::ReadAfterSeekBeforePage,
    ];
}

/// Tells the test that runs on this thread, if it watches, that a place is reached.
#[inline(always)]
pub fn reached(_point: Place) {
    #[cfg(test)]
    watch::tell(_point);
}

#[cfg(test)]
pub use watch::watching;

#[cfg(test)]
mod watch {
    use super::Place;
    use std::cell::RefCell;

    type Watcher = Box<dyn FnMut(Place)>;

    thread_local! {
        static WATCHER: RefCell<Option<Watcher>> = const { RefCell::new(None) };
    }

    pub fn tell(point: Place) {
        // Taken out while it runs, so that what it does itself is not watched.
        if let Some(mut watcher) = WATCHER.take() {
            watcher(point);
            WATCHER.set(Some(watcher));
        }
    }

    /// Does `work`, and calls `watcher` at every place that is reached.
    pub fn watching<T>(watcher: impl FnMut(Place) + 'static, work: impl FnOnce() -> T) -> T {
        WATCHER.set(Some(Box::new(watcher)));
        let result = work();
        WATCHER.set(None);
        result
    }
}
