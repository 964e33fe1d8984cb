//! Writes that wait for their regions, between the workers and the two threads that let them go on: one
//! arms regions, the other syncs the ring.
//!
//! Overview: a worker leaves what it waits for and goes on with other work. The arming thread takes all
//! that has gathered and arms it with one transaction. What finds no slot, or is too long to be armed, is
//! set aside until more of the ring is durable, which the syncing thread sees to at once.
//!
//! What it does not handle: arming and syncing themselves; see `Journal`.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::regions::{Era, Regions, is_long, regions_in};
use crate::extent::Extent;

/// Who waits for regions.
pub trait Waiter: Send + Sync {
    /// What was left with this number may be looked at again. Must not wait.
    fn wake(&self, token: usize);
}

/// A write that waits.
pub struct Wanted {
    extent: Extent,
    /// The era in which its record stood in the ring.
    era: Era,
    waiter: Arc<dyn Waiter>,
    token: usize,
}

impl Wanted {
    fn may_go(&self, regions: &Regions) -> bool {
        self.era <= regions.durable()
            || regions.is_unguarded()
            || !is_long(self.extent)
                && regions_in(self.extent).all(|region| match u32::try_from(region) {
                    Ok(region) => regions.is_armed(region),
                    Err(_beyond_any_slot) => false,
                })
    }
}

/// What the arming thread is to do.
#[derive(Default)]
pub struct Batch {
    wanted: Vec<Wanted>,
    ahead: Vec<Range<u32>>,
}

impl Batch {
    /// The regions that somebody waits for.
    pub fn wanted(&self) -> BTreeSet<u32> {
        let short = self.wanted.iter().filter(|wanted| !is_long(wanted.extent));
        short
            .flat_map(|wanted| regions_in(wanted.extent))
            .filter_map(|region| u32::try_from(region).ok())
            .collect()
    }

    /// The regions that somebody will come to.
    pub fn ahead(&self) -> BTreeSet<u32> {
        self.ahead.iter().cloned().flatten().collect()
    }

    /// Lets those go on that may.
    pub fn release(&mut self, regions: &Regions) {
        self.wanted.retain(|wanted| {
            let stays = !wanted.may_go(regions);
            if !stays {
                wanted.waiter.wake(wanted.token);
            }
            stays
        });
    }

    /// Whether nothing is left to be done.
    pub fn is_empty(&self) -> bool {
        self.wanted.is_empty() && self.ahead.is_empty()
    }
}

#[derive(Default)]
struct Waiting {
    next: Batch,
    /// These wait for a sync.
    aside: Vec<Wanted>,
    sync_wanted: bool,
    stopping: bool,
    /// Writes that had to wait since the journal was opened.
    count: u64,
}

/// The meeting place of workers and threads.
#[derive(Default)]
pub struct Keeper {
    waiting: Mutex<Waiting>,
    /// Something is to be armed.
    to_arm: Condvar,
    /// A sync is wanted now.
    to_sync: Condvar,
}

impl Keeper {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Leaves a write that waits. It is woken once, and then has to look whether it may go on.
    pub fn await_regions(&self, extent: Extent, era: Era, waiter: &Arc<dyn Waiter>, token: usize) {
        let mut waiting = self.lock();
        waiting.count += 1;
        let waiter = Arc::clone(waiter);
        waiting.next.wanted.push(Wanted {
            extent,
            era,
            waiter,
            token,
        });
        self.to_arm.notify_one();
    }

    /// Asks for regions that a stream will come to.
    pub fn arm_ahead(&self, regions: Range<u32>) {
        self.lock().next.ahead.push(regions);
        self.to_arm.notify_one();
    }

    /// Waits until there is something to be armed; `None` when it is over.
    pub fn next_batch(&self) -> Option<Batch> {
        let waiting = self.lock();
        let idle = |waiting: &mut Waiting| waiting.next.is_empty() && !waiting.stopping;
        let waited = self.to_arm.wait_while(waiting, idle);
        let mut waiting = waited.unwrap_or_else(PoisonError::into_inner);
        let batch = std::mem::take(&mut waiting.next);
        (!batch.is_empty() || !waiting.stopping).then_some(batch)
    }

    /// Takes what is to be armed now, if there is something.
    pub fn take_batch(&self) -> Batch {
        std::mem::take(&mut self.lock().next)
    }

    /// Sets aside what only a sync can help, and asks for one.
    pub fn set_aside(&self, batch: Batch) {
        if batch.wanted.is_empty() {
            return;
        }
        let mut waiting = self.lock();
        waiting.aside.extend(batch.wanted);
        waiting.sync_wanted = true;
        self.to_sync.notify_one();
    }

    /// More of the ring is durable, or will not be: what was set aside is tried again.
    pub fn synced(&self) {
        let mut waiting = self.lock();
        let aside = std::mem::take(&mut waiting.aside);
        waiting.next.wanted.extend(aside);
        self.to_arm.notify_one();
    }

    /// Waits until a sync is wanted, at most so long. `false` when it is over.
    pub fn await_sync(&self, interval: Duration) -> bool {
        let end = Instant::now() + interval;
        let mut waiting = self.lock();
        while !waiting.sync_wanted && !waiting.stopping {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let waited = self.to_sync.wait_timeout(waiting, left);
            waiting = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        waiting.sync_wanted = false;
        !waiting.stopping
    }

    /// Ends both threads once nothing waits any more.
    pub fn stop(&self) {
        self.lock().stopping = true;
        self.to_arm.notify_all();
        self.to_sync.notify_all();
    }

    /// Writes that had to wait since the journal was opened.
    pub fn waits(&self) -> u64 {
        self.lock().count
    }
}
