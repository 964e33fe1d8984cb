//! What lets writes go on: regions are armed, and the ring is synced in the background.
//!
//! Overview: two threads for each journal. One takes the writes that wait and arms their regions; the
//! other ends an era about once a second, or as soon as somebody waits for it.
//!
//! Errors: a transaction or a sync that fails makes another file take the place of this one. Where that
//! fails too, writes go on unguarded, because no guest waits for a journal or fails with it: status and
//! log say so, and the attempt is repeated with every sync until it succeeds.

use std::sync::Arc;
use std::time::Duration;

use super::intent::{Batch, Era, Waiter};
use super::writer::Journal;
use crate::error::{Error, Result};
use crate::extent::Extent;
use crate::failpoint::{Place, reached};

/// Time between two syncs of the ring while the disk is written. After a power cut, and for a region that
/// has to make room, it is what counts; each costs a flush of the storage's cache.
const SYNC_INTERVAL: Duration = Duration::from_secs(1);
/// A disk that was not written for so many intervals has no armed regions, so that nothing has to be
/// checked after a power cut.
const IDLE_INTERVALS: u32 = 30;

impl Journal {
    /// Begins a chain of the intent log in which nothing is armed; in all of its pages, if some may be
    /// damaged. All that is recorded is durable.
    ///
    /// # Errors
    ///
    /// The log cannot be written.
    pub(super) fn begin_intents(&self, everywhere: bool) -> Result<()> {
        let mut intents = self.lock_intents();
        intents.forget(&self.regions);
        let begun = match everywhere {
            true => intents.begin_everywhere(),
            false => intents.begin_chain(),
        };
        drop(intents);
        let Err(error) = begun else { return Ok(()) };
        let path = self.path().display();
        tracing::error!(
            "Cannot write the intent log of {path}: {error}; another file takes its place"
        );
        // Its log tells the empty table.
        self.replace(&mut self.lock())
    }

    /// Leaves a change whose regions are not armed. The waiter is woken when it may look again.
    pub fn await_regions(&self, extent: Extent, era: Era, waiter: &Arc<dyn Waiter>, token: usize) {
        self.keeper.await_regions(extent, era, waiter, token);
    }

    /// Arms regions until [`Self::end_guard`]; the work of a thread of its own.
    pub fn arm_regions(&self) {
        while let Some(batch) = self.keeper.next_batch() {
            self.arm(batch);
        }
    }

    /// Arms what writes wait for, on the caller's thread.
    pub fn arm_now(&self) {
        self.arm(self.keeper.take_batch());
    }

    fn arm(&self, mut batch: Batch) {
        batch.release(&self.regions);
        if batch.is_empty() {
            return;
        }
        let (wanted, ahead) = (batch.wanted(), batch.ahead());
        let armed = self.lock_intents().arm(&self.regions, &wanted, &ahead);
        reached(Place::ArmAfterCommitBeforeRelease);
        if let Err(error) = armed {
            self.arming_failed(error);
        }
        batch.release(&self.regions);
        self.keeper.set_aside(batch);
    }

    fn arming_failed(&self, error: std::io::Error) {
        let path = self.path().display();
        if !self.regions.is_unguarded() {
            tracing::error!("Cannot write the intent log of {path}: {error}");
        }
        let mut published = self.lock();
        // Another thread may have put a new file there already.
        if self.lock_intents().has_failed() {
            let replaced = self.replace(&mut published);
            self.note_guard(&replaced);
        }
    }

    /// Notes whether the journal can be written durably.
    fn note_guard(&self, result: &Result<()>) {
        let was = self.regions.is_unguarded();
        self.regions.set_unguarded(result.is_err());
        let path = self.path().display();
        match result {
            Ok(()) if was => tracing::info!("Journal {path} is safe against a power cut again"),
            Err(error) if !was => tracing::error!(
                "{}: until this is mended, a power cut would lose track of what changed",
                error.chain()
            ),
            _ => {}
        }
    }

    /// Syncs the ring about once a second until [`Self::end_guard`]; the work of a thread of its own.
    pub fn sync_in_background(&self) {
        let mut idle = 0;
        while self.keeper.await_sync(SYNC_INTERVAL) {
            if self.regions.is_behind() || self.is_broken() {
                idle = 0;
                // Said where it happened; the attempts go on.
                let _noted = self.sync_now();
                continue;
            }
            idle += 1;
            if idle == IDLE_INTERVALS
                && let Err(error) = self.disarm_idle()
            {
                tracing::error!("{}", error.chain());
            }
            // A sync may have come between their look and their wait.
            self.keeper.synced();
        }
    }

    /// Whether a sync or a transaction failed, and no other file has taken the place of this one.
    fn is_broken(&self) -> bool {
        self.has_failed() || self.lock_intents().has_failed()
    }

    /// Whether a power cut would lose track of what changed.
    pub fn is_unsafe(&self) -> bool {
        self.has_failed() || self.regions.is_unguarded()
    }

    /// Syncs the ring, and lets those try again that waited for it.
    ///
    /// # Errors
    ///
    /// It fails, and no other file can take the place of this one; writes go on unguarded.
    pub fn sync_now(&self) -> Result<()> {
        let result = match self.is_broken() {
            true => self.replace(&mut self.lock()),
            false => self.sync_ring(),
        };
        self.note_guard(&result);
        self.keeper.synced();
        result
    }

    /// Takes all regions out of the set of a disk that was not written lately.
    ///
    /// # Errors
    ///
    /// The intent log cannot be written.
    pub(crate) fn disarm_idle(&self) -> Result<()> {
        let dropped = self.lock_intents().drop_all(&self.regions);
        dropped.map(|_| ()).map_err(|error| {
            let path = self.path().display();
            Error::io(format!("Cannot write the intent log of {path}"), error)
        })
    }

    /// Ends the threads. No write may wait any more.
    pub fn end_guard(&self) {
        self.keeper.stop();
    }
}
