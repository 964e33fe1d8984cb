//! One run: a fresh server, a load, and what both cost. Runs that others disturbed are repeated.

use std::time::{Duration, Instant};

use serde::Serialize;

use crate::job::JobKind;
use crate::processor::{self, Watcher};
use crate::servers::{Running, ServerKind};
use crate::settings::{ClientKind, Plan, Section, Settings};
use crate::{Result, fio, load};

/// Share of the machine's processors that others may use in a run.
const FOREIGN_SHARE_MAX: f64 = 0.08;
/// Runs that are made of one disturbed run, at most.
const ATTEMPTS_MAX: u32 = 3;

/// What a client has done.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Requests answered without error.
    pub requests: u64,
    /// Time that they took.
    pub seconds: f64,
    /// Time that single requests took.
    pub latency: Latency,
}

/// Percentiles of the time of a request, in microseconds.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Latency {
    /// The median.
    pub p50: f64,
    /// 99 of 100 are faster.
    pub p99: f64,
    /// 999 of 1000 are faster.
    pub p999: f64,
}

/// What one run of one server has shown.
#[derive(Clone, Debug, Serialize)]
pub struct Measurement {
    /// What kind of folder the image lay in.
    pub medium: String,
    /// Who made the requests.
    pub client: ClientKind,
    /// Which requests.
    pub job: JobKind,
    /// Who served them.
    pub server: ServerKind,
    /// In which round, from 0.
    pub round: usize,
    /// Requests answered.
    pub requests: u64,
    /// IOPS or MB/s, as the job counts.
    pub rate: f64,
    /// How long requests took.
    pub latency: Latency,
    /// Processor time of the server per request.
    pub server_microseconds: Option<f64>,
    /// Context switches of the server per request.
    pub switches: Option<f64>,
    /// Share of the processors that neither client, server nor kernel threads used.
    pub foreign_share: f64,
    /// Others used more than is allowed, in each attempt.
    pub disturbed: bool,
    /// How many times this run was made.
    pub attempts: u32,
}

/// Time left for repeating runs.
pub struct Patience(Duration);

impl Patience {
    /// As much as half of what the plan's loads take.
    pub fn of(plan: &Plan) -> Self {
        let sections = plan.sections.iter();
        let servers: usize = sections.map(|s| s.servers(&plan.servers).count()).sum();
        let runs = servers * plan.rounds;
        Self(plan.duration * u32::try_from(runs).unwrap_or(u32::MAX) / 2)
    }
}

/// Runs a server, again if others disturb; the least disturbed run counts.
///
/// # Errors
///
/// The server or the client fails.
pub fn measure(
    settings: &Settings,
    plan: &Plan,
    section: &Section,
    (server, round): (ServerKind, usize),
    patience: &mut Patience,
) -> Result<Measurement> {
    let mut best = attempt(settings, plan, section, server, round)?;
    let mut attempts = 1;
    while best.disturbed && attempts < ATTEMPTS_MAX {
        let begin = Instant::now();
        if patience.0.is_zero() {
            break;
        }
        let again = attempt(settings, plan, section, server, round)?;
        patience.0 = patience.0.saturating_sub(begin.elapsed());
        attempts += 1;
        if again.foreign_share < best.foreign_share {
            best = again;
        }
    }
    best.attempts = attempts;
    Ok(best)
}

fn attempt(
    settings: &Settings,
    plan: &Plan,
    section: &Section,
    kind: ServerKind,
    round: usize,
) -> Result<Measurement> {
    let server = Running::start(&section.setup(settings, plan, kind))?;
    let measurement = observe(settings, plan, section, &server, round)?;
    server.stop()?;
    Ok(measurement)
}

/// Lets the client do its job on a server that runs, and tells what that cost.
///
/// # Errors
///
/// The client fails.
pub fn observe(
    settings: &Settings,
    plan: &Plan,
    section: &Section,
    server: &Running,
    round: usize,
) -> Result<Measurement> {
    let watcher = server.pid().map(Watcher::start);
    let before = Snapshot::take(server)?;
    let load = client(settings, section, server, plan.duration)?;
    let used = Snapshot::take(server)?.since(&before);
    let switches_per_second = watcher.map(Watcher::finish);
    let requests = load.requests.max(1) as f64;
    let foreign_share = used.foreign_share();
    Ok(Measurement {
        medium: section.medium.clone(),
        client: section.client,
        job: section.job.kind,
        server: server.kind(),
        round,
        requests: load.requests,
        rate: section.job.rate(load.requests, load.seconds),
        latency: load.latency,
        server_microseconds: used.server.map(|time| time as f64 / requests),
        switches: switches_per_second.map(|rate| rate * load.seconds / requests),
        foreign_share,
        disturbed: foreign_share > FOREIGN_SHARE_MAX,
        attempts: 1,
    })
}

/// Lets the section's client do its job for a time.
///
/// # Errors
///
/// The client fails.
pub fn client(
    settings: &Settings,
    section: &Section,
    server: &Running,
    duration: Duration,
) -> Result<Load> {
    match section.client {
        ClientKind::Light if server.is_served() => {
            let (socket, export) = (server.socket(), server.export());
            load::run((&socket, export), &section.job, duration, settings.verify)
        }
        // The file itself speaks no NBD.
        ClientKind::Light | ClientKind::Fio => fio::run(server, &section.job, duration),
    }
}

/// Sums of processor time in microseconds, at some moment or between two.
struct Snapshot {
    at: Instant,
    seconds: f64,
    server: Option<u64>,
    client: u64,
    busy: u64,
    kernel: u64,
}

impl Snapshot {
    fn take(server: &Running) -> Result<Self> {
        let (busy, kernel) = processor::machine_microseconds()?;
        Ok(Self {
            at: Instant::now(),
            seconds: 0.0,
            server: server.pid().map(processor::microseconds_of),
            client: processor::own_microseconds()?,
            busy,
            kernel,
        })
    }

    fn since(&self, before: &Self) -> Self {
        Self {
            at: self.at,
            seconds: self.at.duration_since(before.at).as_secs_f64(),
            server: self
                .server
                .zip(before.server)
                .map(|(now, then)| now.saturating_sub(then)),
            client: self.client.saturating_sub(before.client),
            busy: self.busy.saturating_sub(before.busy),
            kernel: self.kernel.saturating_sub(before.kernel),
        }
    }

    fn foreign_share(&self) -> f64 {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let known = self.server.unwrap_or(0) + self.client + self.kernel;
        let foreign = self.busy.saturating_sub(known) as f64 / 1e6;
        foreign / (self.seconds * processors as f64).max(f64::EPSILON)
    }
}
