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
use crate::epoch::Waiter;
use crate::extent::{Epoch, Extent};
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
        let Some(admission) = operation
            .admission
            .filter(|admission| !admission.is_ready())
        else {
            return Some(operation);
        };
        let (disk, extent) = (operation.disk, operation.part_blocks());
        if admission.waits.is_none() && self.copies_now(disk, extent, admission.epoch) {
            return Some(operation);
        }
        let machine = Arc::clone(&self.shared.machine);
        self.operations[slot] = Some(operation);
        match admission.waits {
            Some(era) => machine.await_regions(disk, extent, era, &self.bell, slot),
            None => machine.await_copy(disk, extent, admission.epoch, &self.bell, slot),
        }
        None
    }

    /// Copies here and now what a write would overwrite of the closed epoch, if that can be done without a wait.
    pub(super) fn copies_now(&self, disk: usize, extent: Extent, epoch: Epoch) -> bool {
        let source = &*self.shared.disks[disk];
        self.shared.machine.copy_now(disk, extent, epoch, source)
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
