//! Retention of a running shipper: a thread that prunes now and then, and when it is asked.
//!
//! Overview: a pass decides durably, which takes a few requests; what it allows to be removed is removed when the grace
//! period is over. No guest, no recovery point and no upload waits for either.
//!
//! Order: while something waits for the end of its grace period no new pass begins by itself, so that passes that come more often than the period
//! do not put it off for ever. One that is asked for begins at once, and the period anew.
//!
//! Crash consistency: that of `vault::prune`.
//!
//! Errors: another generation ends the shipper; everything else is noted on the board and tried again.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, unbounded};

use super::config::RetentionConfig;
use crate::error::{Error, ErrorKind, Result};
use crate::spool::Spool;
use crate::status::{Board, Part, RetentionStatus};
use crate::upload::retry::Stop;
use crate::vault::Vault;
use crate::vault::prune::{Decision, Pruner, Removed, Report, objects_of};

/// Longest time from the start, and from a failure, to the next pass.
const SOON: Duration = Duration::from_secs(60);

/// Who asks for a pass is told what it decided.
pub type PruneReply = Sender<Result<Report>>;

/// What pruning needs to know.
pub(super) struct Place {
    pub vault: Vault,
    pub machine: String,
    pub generation: u64,
    pub spool: Spool,
    pub retention: RetentionConfig,
    pub board: Arc<Board>,
    pub stop: Arc<Stop>,
}

/// The thread.
pub(super) struct Pruning {
    asks: Option<Sender<PruneReply>>,
    thread: Option<JoinHandle<()>>,
}

impl Pruning {
    /// Starts the thread; without a place, which is without retention, there is none. `tell` hears of what ends the shipper.
    pub fn start(place: Option<Place>, tell: impl Fn(Error) + Send + 'static) -> Result<Self> {
        let Some(place) = place else {
            return Ok(Self {
                asks: None,
                thread: None,
            });
        };
        let (asks, asked) = unbounded();
        let thread = std::thread::Builder::new()
            .name("prune".into())
            .spawn(move || {
                let mut passes = Passes::new(place);
                if let Err(error) = passes.go_on(&asked) {
                    tell(error);
                }
            })
            .map_err(|error| Error::io("Cannot start the thread for retention", error))?;
        Ok(Self {
            asks: Some(asks),
            thread: Some(thread),
        })
    }

    /// Asks for a pass.
    pub fn ask(&self, reply: PruneReply) {
        let Some(asks) = &self.asks else {
            let _left = reply.send(Err(no_retention()));
            return;
        };
        // Where the thread has ended, the reply is dropped, which tells.
        let _ended = asks.send(reply);
    }
}

impl Drop for Pruning {
    fn drop(&mut self) {
        self.asks = None;
        if let Some(thread) = self.thread.take() {
            let _panicked = thread.join();
        }
    }
}

/// The error of whoever asks for retention where none is configured.
pub fn no_retention() -> Error {
    let what = "The configuration has no [retention], so nothing is ever removed: say what stays by `points`";
    Error::new(ErrorKind::State, what)
}

/// What is removed when its time has come.
struct Pending {
    decision: Decision,
    due: Instant,
}

struct Passes {
    place: Place,
    due: Instant,
    pending: Option<Pending>,
}

impl Passes {
    fn new(place: Place) -> Self {
        let policy = place.retention.policy.to_string();
        place.board.update(|status| {
            status.retention = Some(RetentionStatus {
                policy,
                ..RetentionStatus::default()
            });
        });
        Self {
            due: Instant::now() + place.retention.every.min(SOON),
            place,
            pending: None,
        }
    }

    fn go_on(&mut self, asked: &Receiver<PruneReply>) -> Result<()> {
        loop {
            let next = self
                .pending
                .as_ref()
                .map_or(self.due, |pending| pending.due);
            match asked.recv_timeout(next.saturating_duration_since(Instant::now())) {
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
                _ if self.place.stop.is_told() => return Ok(()),
                Ok(reply) => {
                    let decided = self.decide();
                    let told = decided.as_ref().map(Report::clone).map_err(copy_of);
                    let _left = reply.send(told);
                    self.meet(decided.map(drop))?;
                }
                Err(RecvTimeoutError::Timeout) => {
                    let done = match self.pending.take() {
                        Some(pending) => self.carry_out(&pending.decision),
                        None => self.decide().map(drop),
                    };
                    self.meet(done)?;
                }
            }
        }
    }

    /// Notes what came of a step; fails if that ends the shipper.
    fn meet(&mut self, result: Result<()>) -> Result<()> {
        let part = Part::Retention;
        match result {
            Ok(()) => self.place.board.note(part, None),
            Err(error) if error.kind() == ErrorKind::Fenced => return Err(error),
            Err(error) => {
                self.place.board.note(part, Some(&error));
                self.due = Instant::now() + self.place.retention.every.min(SOON);
            }
        }
        Ok(())
    }

    fn with_pruner<T>(&self, work: impl FnOnce(&Pruner<'_>) -> Result<T>) -> Result<T> {
        let place = &self.place;
        work(&Pruner {
            vault: &place.vault,
            machine: &place.machine,
            generation: place.generation,
            policy: Some(&place.retention.policy),
            waiting: &|| waiting_objects(&place.spool, &place.vault, &place.machine),
        })
    }

    fn decide(&mut self) -> Result<Report> {
        let decision = self.with_pruner(|pruner| pruner.decide())?;
        let report = decision.report.clone();
        self.due = Instant::now() + self.place.retention.every;
        self.show(&report);
        self.pending = decision.boundary.map(|_| Pending {
            decision,
            due: Instant::now() + self.place.retention.grace,
        });
        Ok(report)
    }

    fn carry_out(&mut self, decision: &Decision) -> Result<()> {
        let removed = self.with_pruner(|pruner| pruner.carry_out(decision))?;
        let Removed { objects, bytes, .. } = removed;
        self.place.board.update(|status| {
            if let Some(shown) = &mut status.retention {
                shown.removed_objects += objects;
                shown.removed_bytes += bytes;
                shown.leaving_objects = 0;
            }
        });
        Ok(())
    }

    fn show(&self, report: &Report) {
        let kept = report.points.iter().filter(|point| point.keep).count();
        self.place.board.update(|status| {
            if let Some(shown) = &mut status.retention {
                shown.last_pass = Some(jiff::Timestamp::now());
                shown.kept_points = kept as u64;
                shown.removed_points += report.removed_points;
                shown.leaving_objects = report.freed_objects;
            }
        });
    }
}

fn copy_of(error: &Error) -> Error {
    Error::new(error.kind(), error.chain())
}

/// What sealed epochs name that wait for upload: keys below that of the machine.
///
/// # Errors
///
/// The spool cannot be read, or is damaged.
pub fn waiting_objects(spool: &Spool, vault: &Vault, machine: &str) -> Result<BTreeSet<String>> {
    let mut names = BTreeSet::new();
    for epoch in spool.epochs()? {
        match spool.manifest(&vault.point_id(machine, epoch), vault.keys()) {
            Ok((manifest, _)) => names.extend(objects_of(vault, machine, &manifest)?),
            // It was released a moment ago.
            Err(_) if !spool.folder(epoch).exists() => {}
            Err(error) => return Err(error),
        }
    }
    Ok(names)
}
