//! The workers: the only place that orders the I/O of a guest.
//!
//! A negotiated connection is given to the worker with the fewest connections and stays there;
//! workers share nothing but the disks, the machine's epochs and counters.

mod buffer;
mod changes;
mod connection;
mod dispatch;
mod driver;
mod operation;
mod patience;
mod pool;
mod status;
mod survey;
mod threads;
mod transfer;
mod uring;
mod view;
mod waiting;
mod worker;

#[cfg(test)]
mod driver_tests;

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use nix::sys::eventfd::{EfdFlags, EventFd};
use serde::{Deserialize, Serialize};

use crate::disk::Disk;
use crate::epoch::Machine;
use crate::error::{Error, ErrorKind, Result};
use crate::nbd::handshake::Session;
use driver::Driver;
use waiting::Bell;
use worker::{Counters, Lines, Order, Shared, Worker};

pub use driver::{EngineChoice, EngineKind};
pub use view::View;

/// Time that clients have to take their last replies when the tracker stops.
const DRAIN_DEADLINE: Duration = Duration::from_secs(5);

/// What the engine is and has done.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EngineStatus {
    /// Worker threads.
    pub workers: usize,
    /// What carries out their I/O.
    #[serde(default)]
    pub engine: EngineKind,
    /// Setup flags of the io_uring that this kernel took.
    pub ring_features: Vec<String>,
    /// Why threads had to take over from io_uring, if they had.
    #[serde(default)]
    pub fallback_reason: Option<String>,
    /// Connections at present.
    pub connections: u64,
    /// READ requests.
    pub reads: u64,
    /// WRITE requests.
    pub writes: u64,
    /// All other requests.
    pub others: u64,
    /// Bytes read by clients.
    pub read_bytes: u64,
    /// Bytes written by clients.
    pub written_bytes: u64,
    /// Requests answered with an error.
    pub errors: u64,
}

impl EngineStatus {
    /// What carries out the I/O, in words.
    pub fn carrier(&self) -> String {
        let Self {
            engine,
            ring_features,
            fallback_reason,
            ..
        } = self;
        match (engine, fallback_reason) {
            (_, Some(reason)) => format!("{engine} ({reason})"),
            (EngineKind::IoUring, None) => format!("{engine} ({})", ring_features.join(", ")),
            (EngineKind::Threads, None) => engine.to_string(),
        }
    }
}

struct WorkerHandle {
    orders: Sender<Order>,
    wake: Arc<EventFd>,
    counters: Arc<Counters>,
    thread: Mutex<Option<JoinHandle<Result<()>>>>,
    assigned: AtomicU64,
}

impl WorkerHandle {
    fn order(&self, order: Order) -> Result<()> {
        let stopped = || {
            Error::new(
                ErrorKind::State,
                "A worker has stopped: restart the tracker",
            )
        };
        self.orders.send(order).map_err(|_| stopped())?;
        self.wake
            .write(1)
            .map_err(|errno| stopped().with_source(errno))?;
        Ok(())
    }
}

/// All workers of a tracker.
pub struct Engine {
    workers: Vec<WorkerHandle>,
    kind: EngineKind,
    ring_features: Vec<String>,
    fallback_reason: Option<String>,
}

impl Engine {
    /// Starts `count` workers (at least one) over the disks.
    ///
    /// Where io_uring was not asked for by name, threads take over for whatever reason it cannot be
    /// had: disks that are served at some cost are better than disks that are not served, and what
    /// both engines lack, such as descriptors, fails the second time as well.
    ///
    /// # Errors
    ///
    /// A thread, or what carries out its I/O, cannot be had.
    pub fn start(
        choice: EngineChoice,
        count: usize,
        disks: &[Arc<Disk>],
        machine: &Arc<Machine>,
    ) -> Result<Self> {
        let error = match choice {
            EngineChoice::Threads => {
                return Self::start_workers(EngineKind::Threads, count, disks, machine);
            }
            EngineChoice::IoUring | EngineChoice::Auto => {
                match Self::start_workers(EngineKind::IoUring, count, disks, machine) {
                    Err(error) if choice == EngineChoice::Auto => error,
                    started => return started,
                }
            }
        };
        let reason = error.chain();
        let mut engine = Self::start_workers(EngineKind::Threads, count, disks, machine)?;
        tracing::warn!("Threads carry out the I/O instead of io_uring, which costs more: {reason}");
        engine.fallback_reason = Some(reason);
        Ok(engine)
    }

    fn start_workers(
        kind: EngineKind,
        count: usize,
        disks: &[Arc<Disk>],
        machine: &Arc<Machine>,
    ) -> Result<Self> {
        let shared = Arc::new(Shared {
            disks: disks.to_vec(),
            machine: Arc::clone(machine),
            draining: AtomicBool::new(false),
        });
        let mut engine = Self {
            workers: Vec::new(),
            kind,
            ring_features: Vec::new(),
            fallback_reason: None,
        };
        for number in 0..count.max(1) {
            match start_worker(kind, number, Arc::clone(&shared)) {
                Ok((handle, features)) => {
                    engine.workers.push(handle);
                    engine.ring_features = features;
                }
                Err(error) => {
                    // Those that have started have nothing to lose; this error tells more.
                    let _stopped = engine.stop();
                    return Err(error);
                }
            }
        }
        Ok(engine)
    }

    /// Gives a negotiated connection, to a disk or a frozen view of it, to the worker with the fewest.
    ///
    /// # Errors
    ///
    /// The worker has stopped.
    pub fn serve(&self, socket: OwnedFd, session: Session, view: Option<View>) -> Result<()> {
        let least = self.workers.iter().min_by_key(|worker| {
            (
                worker.counters.connections.load(Ordering::Relaxed),
                worker.assigned.load(Ordering::Relaxed),
            )
        });
        let Some(worker) = least else { return Ok(()) };
        worker.assigned.fetch_add(1, Ordering::Relaxed);
        worker.order(Order::Serve(socket, session, view))
    }

    /// Sums of all workers.
    pub fn status(&self) -> EngineStatus {
        let sum = |counter: fn(&Counters) -> &AtomicU64| -> u64 {
            self.workers
                .iter()
                .map(|w| counter(&w.counters).load(Ordering::Relaxed))
                .sum()
        };
        EngineStatus {
            workers: self.workers.len(),
            engine: self.kind,
            ring_features: self.ring_features.clone(),
            fallback_reason: self.fallback_reason.clone(),
            connections: sum(|counters| &counters.connections),
            reads: sum(|counters| &counters.reads),
            writes: sum(|counters| &counters.writes),
            others: sum(|counters| &counters.others),
            read_bytes: sum(|counters| &counters.read_bytes),
            written_bytes: sum(|counters| &counters.written_bytes),
            errors: sum(|counters| &counters.errors),
        }
    }

    /// Whether a worker has ended before it was told to.
    pub fn has_failed(&self) -> bool {
        self.workers.iter().any(|worker| {
            let thread = worker.thread.lock().unwrap_or_else(PoisonError::into_inner);
            thread.as_ref().is_some_and(JoinHandle::is_finished)
        })
    }

    /// Finishes what is in flight, sends the replies, closes all connections and ends the workers.
    ///
    /// # Errors
    ///
    /// A worker failed.
    pub fn stop(&self) -> Result<()> {
        for worker in &self.workers {
            // A worker that has stopped already tells why when it is joined.
            let _stopped = worker.order(Order::Drain);
        }
        let deadline = Instant::now() + DRAIN_DEADLINE;
        let mut result = Ok(());
        for worker in &self.workers {
            let taken = worker
                .thread
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .take();
            let Some(thread) = taken else { continue };
            while !thread.is_finished() && Instant::now() < deadline {
                std::thread::park_timeout(Duration::from_millis(2));
            }
            if !thread.is_finished() {
                let _stopped = worker.orders.send(Order::Abort);
                let _stopped = worker.wake.write(1);
            }
            let ended = thread
                .join()
                .unwrap_or_else(|_| Err(Error::new(ErrorKind::State, "A worker panicked")));
            result = result.and(ended);
        }
        result
    }
}

fn start_worker(
    kind: EngineKind,
    number: usize,
    shared: Arc<Shared>,
) -> Result<(WorkerHandle, Vec<String>)> {
    let (orders, receiver) = crossbeam_channel::unbounded();
    let (ready, is_ready) = crossbeam_channel::bounded(1);
    let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
    let wake = Arc::new(
        EventFd::from_value_and_flags(0, flags)
            .map_err(|errno| Error::io("Cannot make an eventfd for a worker", errno))?,
    );
    let counters = Arc::new(Counters::default());
    let thread_counters = Arc::clone(&counters);
    let jobs = status::start(
        number,
        Arc::clone(&shared),
        orders.clone(),
        Arc::clone(&wake),
    )?;
    let lines = Lines {
        orders: receiver,
        wake: Arc::clone(&wake),
        jobs,
        bell: Arc::new(Bell {
            orders: orders.clone(),
            wake: Arc::clone(&wake),
        }),
    };
    let thread = std::thread::Builder::new()
        .name(format!("worker-{number}"))
        .spawn(move || {
            // A ring with SINGLE_ISSUER belongs to the thread that makes it.
            let driver = match Driver::new(kind) {
                Ok(driver) => driver,
                Err(error) => {
                    let _receiver_gone = ready.send(Err(error));
                    return Ok(());
                }
            };
            let features = driver
                .features()
                .iter()
                .map(|name| (*name).to_owned())
                .collect();
            let _receiver_gone = ready.send(Ok(features));
            Worker::new(number, driver, shared, thread_counters, lines).run()
        })
        .map_err(|error| Error::io("Cannot start a worker thread", error))?;
    let features: Vec<String> = is_ready
        .recv()
        .map_err(|_| Error::new(ErrorKind::State, "A worker ended while it started"))?
        .map_err(|error| Error::io(driver::explain(kind, &error), error))?;
    let thread = Mutex::new(Some(thread));
    let handle = WorkerHandle {
        orders,
        wake,
        counters,
        thread,
        assigned: AtomicU64::new(0),
    };
    Ok((handle, features))
}
