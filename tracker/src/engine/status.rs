//! BLOCK_STATUS: what the meta contexts say of a range. Runs on a thread beside each worker.
//!
//! Overview: searching a disk for holes and reading a journal may wait for a disk, and other
//! connections of the worker must not wait with it. A job holds what was asked; its answer goes back
//! to the worker as bytes ready to be sent.
//!
//! Order: an answered write is in the page cache and in the journal's ring before its reply is
//! sent, so whoever asks after that reply is told of it.
//!
//! Bounds: an answer has at most [`DESCRIPTORS_MAX`] descriptors for each context; a client asks
//! again for what follows. A connection has a few jobs at a time. A journal that cannot be read
//! counts as changed throughout, which is what is safe for whoever copies the changes.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crossbeam_channel::{Receiver, Sender};
use nix::sys::eventfd::EventFd;

use super::changes::Changes;
use super::survey::Survey;
use super::view::View;
use super::worker::{Order, Shared};
use crate::error::{Error, Result};
use crate::nbd::metadata::{Context, ContextSet};
use crate::nbd::reply::{Descriptor, block_status, failure};
use crate::nbd::request::Request;
use crate::nbd::wire::{Mode, ReplyError, allocation_state};

/// Most descriptors of one context in one answer.
const DESCRIPTORS_MAX: usize = 1024;
/// Flag of `tidemark:dirty` and of qemu's bitmaps: the extent has changed.
const DIRTY: u32 = 1;

/// One BLOCK_STATUS.
pub struct Job {
    /// Index of the connection that asked.
    pub connection: usize,
    /// Index of the disk.
    pub disk: usize,
    /// The headers in use.
    pub mode: Mode,
    /// What was asked.
    pub request: Request,
    /// The contexts to be told of.
    pub contexts: ContextSet,
    /// One extent only.
    pub one: bool,
    /// It is of the disk as it was at a cut.
    pub view: Option<View>,
}

/// What is needed to answer, kept from job to job.
struct Clerk {
    shared: Arc<Shared>,
    surveys: Vec<Option<Survey>>,
    changes: Vec<Option<Changes>>,
}

/// Starts the thread of a worker; it ends when the sender of jobs is dropped.
///
/// # Errors
///
/// The thread cannot be had.
pub fn start(
    number: usize,
    shared: Arc<Shared>,
    answers: Sender<Order>,
    wake: Arc<EventFd>,
) -> Result<Sender<Job>> {
    let (sender, jobs): (Sender<Job>, Receiver<Job>) = crossbeam_channel::unbounded();
    std::thread::Builder::new()
        .name(format!("status-{number}"))
        .spawn(move || {
            let count = shared.disks.len();
            let mut clerk = Clerk {
                shared,
                surveys: (0..count).map(|_| None).collect(),
                changes: (0..count).map(|_| None).collect(),
            };
            for job in jobs {
                let reply = clerk.answer(&job);
                let order = Order::Status {
                    connection: job.connection,
                    reply,
                };
                // A worker that has ended has no connection left to be answered.
                if answers.send(order).is_err() || wake.write(1).is_err() {
                    return;
                }
            }
        })
        .map_err(|error| Error::io("Cannot start a thread for block status", error))?;
    Ok(sender)
}

impl Clerk {
    fn answer(&mut self, job: &Job) -> Vec<u8> {
        if self.shared.draining.load(Ordering::Acquire) {
            // The workers wait for this thread, and others may have asked much of it.
            let (error, mut reply) = (ReplyError::ShuttingDown, Vec::new());
            let address = job.request.address();
            failure(job.mode, address, error, error.text(), None, &mut reply);
            return reply;
        }
        let (start, end) = (job.request.offset, job.request.end());
        let count_max = if job.one { 1 } else { DESCRIPTORS_MAX };
        let mut dirty = None;
        let mut reply = Vec::new();
        let last = job.contexts.iter().last();
        for context in job.contexts.iter() {
            let descriptors = match context {
                Context::Allocation if job.view.is_some() => {
                    // What is a hole now need not have been one.
                    let mut list = List::new(start, end, count_max);
                    list.push(end, 0);
                    list.descriptors
                }
                Context::Allocation => self.allocation(job.disk, start, end, count_max),
                Context::Dirty | Context::QemuDirty => dirty
                    .get_or_insert_with(|| match &job.view {
                        Some(view) => self.dirty_in(view, start, end, count_max),
                        None => self.dirty(job.disk, start, end, count_max),
                    })
                    .clone(),
            };
            let done = Some(context) == last;
            let address = job.request.address();
            block_status(job.mode, address, context, &descriptors, done, &mut reply);
        }
        reply
    }

    fn allocation(
        &mut self,
        disk: usize,
        start: u64,
        end: u64,
        count_max: usize,
    ) -> Vec<Descriptor> {
        let survey =
            self.surveys[disk].get_or_insert_with(|| Survey::new(&self.shared.disks[disk]));
        let mut list = List::new(start, end, count_max);
        while !list.is_full() {
            let run = survey.run(list.at, end);
            list.push(
                run.hole_end,
                allocation_state::HOLE | allocation_state::ZERO,
            );
            list.push(run.data_end.min(end), 0);
        }
        list.descriptors
    }

    fn dirty_in(&self, view: &View, start: u64, end: u64, count_max: usize) -> Vec<Descriptor> {
        let mut list = List::new(start, end, count_max);
        let all = self.shared.machine.counts_as_changed(view.disk) || view.frozen.is_over();
        if !all {
            for extent in view.changed(start, end) {
                list.push(extent.offset_bytes(), 0);
                list.push(extent.offset_bytes() + extent.length_bytes(), DIRTY);
                if list.is_full() {
                    break;
                }
            }
        }
        list.push(end, if all { DIRTY } else { 0 });
        list.descriptors
    }

    fn dirty(&mut self, disk: usize, start: u64, end: u64, count_max: usize) -> Vec<Descriptor> {
        self.changed(disk, start, end, count_max)
            .unwrap_or_else(|error| {
                // Opened anew at the next request.
                self.changes[disk] = None;
                tracing::warn!("Every block counts as changed: {}", error.chain());
                let mut list = List::new(start, end, count_max);
                list.push(end, DIRTY);
                list.descriptors
            })
    }

    fn changed(
        &mut self,
        disk: usize,
        start: u64,
        end: u64,
        count_max: usize,
    ) -> Result<Vec<Descriptor>> {
        let mut list = List::new(start, end, count_max);
        let machine = &self.shared.machine;
        let slot = &mut self.changes[disk];
        if slot.is_none()
            && let Some(path) = machine.journal_path(disk)
        {
            *slot = Some(Changes::open(disk, path)?);
        }
        let Some(changes) = slot else {
            // Nothing is tracked; the negotiation does not offer the context then.
            list.push(end, DIRTY);
            return Ok(list.descriptors);
        };
        let all = changes.each(machine, start, |extent| {
            list.push(extent.offset_bytes(), 0);
            list.push(extent.offset_bytes() + extent.length_bytes(), DIRTY);
            !list.is_full()
        })?;
        list.push(end, if all { DIRTY } else { 0 });
        Ok(list.descriptors)
    }
}

/// Descriptors from one place on, without gaps.
struct List {
    at: u64,
    end: u64,
    count_max: usize,
    descriptors: Vec<Descriptor>,
}

impl List {
    fn new(start: u64, end: u64, count_max: usize) -> Self {
        Self {
            at: start,
            end,
            count_max,
            descriptors: Vec::new(),
        }
    }

    /// Whether nothing can be added, not even more of the same.
    fn is_full(&self) -> bool {
        self.at >= self.end
    }

    /// The bytes up to `until` have these flags.
    fn push(&mut self, until: u64, flags: u32) {
        let until = until.min(self.end);
        if until <= self.at {
            return;
        }
        let length_bytes = until - self.at;
        let count = self.descriptors.len();
        match self.descriptors.last_mut() {
            Some(last) if last.flags == flags => last.length_bytes += length_bytes,
            // It would be one too many.
            _ if count == self.count_max => {
                self.end = self.at;
                return;
            }
            _ => self.descriptors.push(Descriptor {
                length_bytes,
                flags,
            }),
        }
        self.at = until;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_full_list_takes_nothing_more() {
        let mut list = List::new(100, 1000, 2);
        list.push(50, 1);
        list.push(200, 0);
        list.push(300, 0);
        list.push(400, 1);
        list.push(500, 0);
        assert!(list.is_full());
        list.push(600, 1);
        let lengths: Vec<u64> = list.descriptors.iter().map(|d| d.length_bytes).collect();
        assert_eq!(lengths, [200, 100]);
    }

    proptest! {
        #[test]
        fn descriptors_cover_without_gaps_and_alternate(
            steps in prop::collection::vec((0u64..40, 0u32..2), 0..40), count_max in 1usize..9,
        ) {
            let mut list = List::new(10, 600, count_max);
            let mut model = Vec::new();
            let mut at = 0;
            for (step, flags) in steps {
                at += step;
                model.resize(at as usize, flags);
                list.push(at, flags);
            }
            list.push(600, 0);
            model.resize(600, 0);
            prop_assert!(list.is_full());
            prop_assert!(!list.descriptors.is_empty() && list.descriptors.len() <= count_max);
            let mut at = 10;
            for (index, descriptor) in list.descriptors.iter().enumerate() {
                prop_assert!(descriptor.length_bytes > 0);
                prop_assert!(index == 0 || list.descriptors[index - 1].flags != descriptor.flags);
                for _ in 0..descriptor.length_bytes {
                    prop_assert_eq!(model[at], descriptor.flags);
                    at += 1;
                }
            }
            prop_assert!(at == 600 || list.descriptors.len() == count_max);
        }
    }
}
