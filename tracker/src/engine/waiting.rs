//! Writes that wait until their regions are armed, and until blocks of the closed epoch are copied.
//!
//! Order: a write was admitted, so its record stands and its epoch counts it; a cut waits for it as for
//! one that is on its way to the disk. It is left with the journal, and after that with the thread that copies,
//! each of which tells this worker by an order when it may go on. Nothing of it goes to the disk before.
//!
//! What it does not handle: arming (`journal::intent`), copying (`epoch`).

use std::sync::Arc;

use crossbeam_channel::Sender;
use nix::sys::eventfd::EventFd;

use super::operation::{Operation, Outcome};
use super::worker::{Order, TAG_DISK, Worker};
use crate::epoch::{Admission, Waiter};
use crate::extent::Extent;
use crate::failpoint::{Place, reached};

/// By this a worker is told that a write may go on.
pub struct Bell {
    /// Its orders.
    pub orders: Sender<Order>,
    /// Wakes it.
    pub wake: Arc<EventFd>,
}

impl Waiter for Bell {
    fn wake(&self, token: usize) {
        // A worker that has ended has no write left that waits.
        if self.orders.send(Order::GoOn(token)).is_ok() {
            let _counted = self.wake.write(1);
        }
    }
}

impl Worker {
    /// Leaves a write whose admission said that it has to wait. Returns it if it has not.
    pub(super) fn leave_waiting(&mut self, slot: usize, operation: Operation) -> Option<Operation> {
        let (disk, extent) = (operation.disk, operation.part_blocks());
        let waits = |admission: &Admission| !self.may_go(disk, extent, *admission);
        let Some(admission) = operation.admission.filter(waits) else {
            return Some(operation);
        };
        let machine = Arc::clone(&self.shared.machine);
        self.operations[slot] = Some(operation);
        match admission.waits {
            Some(era) => machine.await_regions(disk, extent, era, &self.bell, slot),
            None => machine.await_copy(disk, extent, admission.epoch, &self.bell, slot),
        }
        None
    }

    /// Whether the data of a write may go to the disk. What it would overwrite of the closed epoch is copied here and now, if
    /// that alone is missing and can be done without a wait.
    pub(super) fn may_go(&self, disk: usize, extent: Extent, admission: Admission) -> bool {
        let copied = || {
            let source = &*self.shared.disks[disk];
            let machine = &self.shared.machine;
            machine.copy_now(disk, extent, admission.epoch, source)
        };
        admission.is_ready() || admission.waits.is_none() && copied()
    }

    /// A write that waited may look again.
    pub(super) fn go_on(&mut self, slot: usize) {
        let Some(mut operation) = self.operations.get_mut(slot).and_then(Option::take) else {
            return;
        };
        let (disk, extent) = (operation.disk, operation.part_blocks());
        let machine = &self.shared.machine;
        if let Some(admission) = &mut operation.admission {
            match admission.waits {
                Some(era) if machine.may_write(disk, extent, era) => {
                    admission.waits = None;
                    admission.copies = machine.must_copy(disk, extent, admission.epoch);
                }
                // Woken to look once more.
                Some(_) => {}
                None => admission.copies = false,
            }
        }
        let Some(mut operation) = self.leave_waiting(slot, operation) else {
            return;
        };
        reached(Place::WriteAfterWaitBeforeData);
        let disk = Arc::clone(&self.shared.disks[operation.disk]);
        match operation.start(&disk, &mut self.ring, TAG_DISK | slot as u64) {
            Outcome::Pending => self.operations[slot] = Some(operation),
            Outcome::Done(result) => self.finish_part(slot, operation, result),
        }
    }
}
