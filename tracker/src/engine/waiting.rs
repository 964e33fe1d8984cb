//! Writes that wait until their regions are armed.
//!
//! Order: a write was admitted, so its record stands and its epoch counts it; a cut waits for it as for
//! one that is on its way to the disk. It is left with the journal, which tells this worker by an order
//! when it may look again. Nothing of it goes to the disk before.
//!
//! What it does not handle: arming; see `journal::intent`.

use std::sync::Arc;

use crossbeam_channel::Sender;
use nix::sys::eventfd::EventFd;

use super::operation::{Operation, Outcome};
use super::worker::{Order, TAG_DISK, Worker};
use crate::epoch::Waiter;
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
        if self.orders.send(Order::Armed(token)).is_ok() {
            let _counted = self.wake.write(1);
        }
    }
}

impl Worker {
    /// Leaves a write whose admission said that it has to wait. Returns it if it has not.
    pub(super) fn leave_waiting(&mut self, slot: usize, operation: Operation) -> Option<Operation> {
        let Some(era) = operation.waits else {
            return Some(operation);
        };
        let length = operation.part_bytes() as u64;
        let extent = Extent::covering(operation.part.start, length);
        let machine = Arc::clone(&self.shared.machine);
        let disk = operation.disk;
        self.operations[slot] = Some(operation);
        machine.await_regions(disk, extent, era, &self.bell, slot);
        None
    }

    /// A write that waited may look again.
    pub(super) fn regions_armed(&mut self, slot: usize) {
        let Some(mut operation) = self.operations.get_mut(slot).and_then(Option::take) else {
            return;
        };
        let extent = Extent::covering(operation.part.start, operation.part_bytes() as u64);
        let machine = &self.shared.machine;
        if let Some(era) = operation.waits
            && machine.may_write(operation.disk, extent, era)
        {
            operation.waits = None;
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
