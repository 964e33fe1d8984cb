//! Named places at which a kill leaves something half done, or at which others may come in between.
//!
//! A test watches them and looks at what SIGKILL would leave at each, or does there what another
//! thread might do; see the tests of `journal` and `epoch`. A program built with the feature `failpoints`
//! does at them what its environment says (`armed`). In all others a place is nothing at all.

#[cfg(feature = "failpoints")]
mod armed;

use crate::error::Result;

/// A place between two steps of something that must survive what happens in between.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[allow(missing_docs)]
pub enum Place {
    RecordAfterClaimBeforeFill,
    FillAfterMarkBeforeWords,
    FillAfterWordsBeforeSequence,
    RecordAfterRefusalBeforeAlarm,
    AdmitAfterRecordBeforeMark,
    WriteAfterAdmissionBeforeData,
    WriteAfterWaitBeforeData,
    WriteAfterDataBeforeReply,
    FlushAfterDataBeforeSync,
    IntentAfterEvictionBeforePlan,
    IntentAfterPlanBeforeWrite,
    IntentAfterWriteBeforeDurable,
    IntentAfterArmBeforeNext,
    ArmAfterCommitBeforeRelease,
    SyncAfterEraBeforeStores,
    SyncAfterStoresBeforeDurable,
    SyncAfterDurableBeforeMark,
    PublishAfterMarkBeforeWords,
    PublishAmidWords,
    PublishAfterWordsBeforeMagic,
    UpdateAfterPublishBeforeSync,
    UpdateAfterSyncBeforeTail,
    UpdateAfterAlarmBeforePunch,
    FoldAfterScanBeforePages,
    FoldAfterPageBeforeNext,
    FoldAfterPagesBeforeSync,
    FoldAfterPagesBeforePublish,
    FoldAfterPublishBeforeSync,
    FoldAfterSyncBeforeTail,
    ReplaceAfterBothBeforeCopy,
    ReplaceAfterCopyBeforeRename,
    ReplaceAfterRenameBeforeSwitch,
    ReplaceAfterSwitchBeforeFolder,
    DistrustAfterPublishBeforeRing,
    DistrustAfterRingBeforeSets,
    RecoverAfterHolesBeforeSuspects,
    RecoverAfterSuspectsBeforeSync,
    RecoverAfterSyncBeforeChain,
    RecoverAfterChainBeforePublish,
    RecoverAfterFirstPublishBeforeSecond,
    RecoverAfterSecondPublishBeforeGrow,
    GrowAfterCopyBeforeSync,
    GrowAfterMoveBeforePunch,
    GrowAfterRoomBeforeRecord,
    GrowAfterRecordBeforeSync,
    GrowAfterRecordBeforePublish,
    GrowAfterPublishBeforeSync,
    CloseAfterSyncBeforePublish,
    CutAfterGatherBeforeAdvance,
    CutAfterSettleBeforeMaps,
    CutAfterAdvanceBeforeUpdate,
    CopyAfterReadBeforeWrite,
    CopyAfterWriteBeforeMark,
    MachineAfterDiskBeforeNext,
    ResizeAfterFileBeforeJournal,
    ResizeAfterJournalBeforeSize,
    ReadAfterSuperblockBeforeRing,
    ReadAfterSeekBeforePage,
}

impl Place {
    /// All of them.
    #[cfg(any(test, feature = "failpoints"))]
    pub const ALL: [Self; 58] = [
        Self::RecordAfterClaimBeforeFill,
        Self::FillAfterMarkBeforeWords,
        Self::FillAfterWordsBeforeSequence,
        Self::RecordAfterRefusalBeforeAlarm,
        Self::AdmitAfterRecordBeforeMark,
        Self::WriteAfterAdmissionBeforeData,
        Self::WriteAfterWaitBeforeData,
        Self::WriteAfterDataBeforeReply,
        Self::FlushAfterDataBeforeSync,
        Self::IntentAfterEvictionBeforePlan,
        Self::IntentAfterPlanBeforeWrite,
        Self::IntentAfterWriteBeforeDurable,
        Self::IntentAfterArmBeforeNext,
        Self::ArmAfterCommitBeforeRelease,
        Self::SyncAfterEraBeforeStores,
        Self::SyncAfterStoresBeforeDurable,
        Self::SyncAfterDurableBeforeMark,
        Self::PublishAfterMarkBeforeWords,
        Self::PublishAmidWords,
        Self::PublishAfterWordsBeforeMagic,
        Self::UpdateAfterPublishBeforeSync,
        Self::UpdateAfterSyncBeforeTail,
        Self::UpdateAfterAlarmBeforePunch,
        Self::FoldAfterScanBeforePages,
        Self::FoldAfterPageBeforeNext,
        Self::FoldAfterPagesBeforeSync,
        Self::FoldAfterPagesBeforePublish,
        Self::FoldAfterPublishBeforeSync,
        Self::FoldAfterSyncBeforeTail,
        Self::ReplaceAfterBothBeforeCopy,
        Self::ReplaceAfterCopyBeforeRename,
        Self::ReplaceAfterRenameBeforeSwitch,
        Self::ReplaceAfterSwitchBeforeFolder,
        Self::DistrustAfterPublishBeforeRing,
        Self::DistrustAfterRingBeforeSets,
        Self::RecoverAfterHolesBeforeSuspects,
        Self::RecoverAfterSuspectsBeforeSync,
        Self::RecoverAfterSyncBeforeChain,
        Self::RecoverAfterChainBeforePublish,
        Self::RecoverAfterFirstPublishBeforeSecond,
        Self::RecoverAfterSecondPublishBeforeGrow,
        Self::GrowAfterCopyBeforeSync,
        Self::GrowAfterMoveBeforePunch,
        Self::GrowAfterRoomBeforeRecord,
        Self::GrowAfterRecordBeforeSync,
        Self::GrowAfterRecordBeforePublish,
        Self::GrowAfterPublishBeforeSync,
        Self::CloseAfterSyncBeforePublish,
        Self::CutAfterGatherBeforeAdvance,
        Self::CutAfterSettleBeforeMaps,
        Self::CutAfterAdvanceBeforeUpdate,
        Self::CopyAfterReadBeforeWrite,
        Self::CopyAfterWriteBeforeMark,
        Self::MachineAfterDiskBeforeNext,
        Self::ResizeAfterFileBeforeJournal,
        Self::ResizeAfterJournalBeforeSize,
        Self::ReadAfterSuperblockBeforeRing,
        Self::ReadAfterSeekBeforePage,
    ];
}

/// A rule that a test switches off on its thread, to see that the break is noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Canary {
    WatermarkBeforeSync,
    ChainBeforeSuspectsDurable,
    PreservedBeforeRead,
    CutPerDisk,
}

/// Whether a rule is switched off: by the test that runs on this thread, or by the environment of a program that
/// heeds it. In all others never.
#[inline(always)]
pub fn canary(_canary: Canary) -> bool {
    #[cfg(test)]
    return watch::canary() == Some(_canary);
    #[cfg(all(feature = "failpoints", not(test)))]
    return armed::canary() == Some(_canary);
    #[cfg(not(any(test, feature = "failpoints")))]
    false
}

/// Reads what the environment asks for at the places, where this program was built to heed it.
///
/// # Errors
///
/// It is not understood.
pub fn check() -> Result<()> {
    #[cfg(feature = "failpoints")]
    armed::check()?;
    Ok(())
}

/// Tells the test that runs on this thread, if it watches, that a place is reached.
#[inline(always)]
pub fn reached(_place: Place) {
    #[cfg(test)]
    watch::tell(watch::Event::Reached(_place));
    #[cfg(feature = "failpoints")]
    armed::reached(_place);
}

/// What the storage of this file would do at this place: a test may have it fail.
///
/// # Errors
///
/// Only in tests.
#[inline(always)]
pub fn attempt(_place: Place, _file: &std::fs::File) -> std::io::Result<()> {
    #[cfg(test)]
    watch::attempt(_place, _file)?;
    #[cfg(feature = "failpoints")]
    armed::attempt(_place)?;
    Ok(())
}

/// Tells the test that runs on this thread which bytes of a file are durable from now on, as they are.
#[inline(always)]
pub fn made_durable(_file: &std::fs::File, _bytes: std::ops::Range<u64>) {
    #[cfg(test)]
    watch::tell(watch::Event::Durable(watch::inode_of(_file), _bytes));
}

/// The boot that a test on this thread pretends.
#[inline(always)]
pub fn simulated_boot() -> Option<[u8; 16]> {
    #[cfg(test)]
    return watch::boot();
    #[cfg(not(test))]
    None
}

#[cfg(test)]
pub use watch::{Event, failing, set_boot, set_canary, watching, watching_all};

#[cfg(test)]
mod watch {
    use super::{Canary, Place};
    use std::cell::{Cell, RefCell};
    use std::io;
    use std::ops::Range;
    use std::os::unix::fs::MetadataExt;

    /// What a watcher is told.
    #[derive(Clone, Debug, PartialEq, Eq)]
    pub enum Event {
        /// A place is reached.
        Reached(Place),
        /// Bytes of the file with this inode number are durable.
        Durable(u64, Range<u64>),
    }

    type Watcher = Box<dyn FnMut(Event)>;
    type Fault = Box<dyn FnMut(Place, u64) -> io::Result<()>>;

    thread_local! {
        static WATCHER: RefCell<Option<Watcher>> = const { RefCell::new(None) };
        static FAULT: RefCell<Option<Fault>> = const { RefCell::new(None) };
        static BOOT: Cell<Option<[u8; 16]>> = const { Cell::new(None) };
        static CANARY: Cell<Option<Canary>> = const { Cell::new(None) };
    }

    pub fn tell(event: Event) {
        // Taken out while it runs, so that what it does itself is not watched.
        if let Some(mut watcher) = WATCHER.take() {
            watcher(event);
            WATCHER.set(Some(watcher));
        }
    }

    pub fn attempt(place: Place, file: &std::fs::File) -> io::Result<()> {
        FAULT.with_borrow_mut(|fault| {
            let fault = fault.as_mut();
            fault.map_or(Ok(()), |fault| fault(place, inode_of(file)))
        })
    }

    pub fn canary() -> Option<Canary> {
        CANARY.get()
    }

    /// Switches a rule off on this thread, or all on again.
    pub fn set_canary(canary: Option<Canary>) {
        CANARY.set(canary);
    }

    pub fn inode_of(file: &std::fs::File) -> u64 {
        file.metadata().map_or(0, |metadata| metadata.ino())
    }

    pub fn boot() -> Option<[u8; 16]> {
        BOOT.get()
    }

    /// Pretends another boot of the machine on this thread.
    pub fn set_boot(boot: Option<[u8; 16]>) {
        BOOT.set(boot);
    }

    /// Does `work`, and calls `watcher` at everything that happens.
    pub fn watching_all<T>(watcher: impl FnMut(Event) + 'static, work: impl FnOnce() -> T) -> T {
        WATCHER.set(Some(Box::new(watcher)));
        let result = work();
        WATCHER.set(None);
        result
    }

    /// Does `work`, and calls `watcher` at every place that is reached.
    pub fn watching<T>(mut watcher: impl FnMut(Place) + 'static, work: impl FnOnce() -> T) -> T {
        let places = move |event| {
            if let Event::Reached(place) = event {
                watcher(place);
            }
        };
        watching_all(places, work)
    }

    /// Does `work` while `fault` decides what fails, from the place and the inode number of the file.
    pub fn failing<T>(
        fault: impl FnMut(Place, u64) -> io::Result<()> + 'static,
        work: impl FnOnce() -> T,
    ) -> T {
        FAULT.set(Some(Box::new(fault)));
        let result = work();
        FAULT.set(None);
        result
    }
}
