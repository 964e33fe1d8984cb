//! Small writes spread over a large sparse disk, tracking off and on.
//!
//! All servers use one image. Before the rounds every block that a run will write is written, as
//! allocation costs more than what is to be seen. Then each run starts a server with a new journal,
//! touches every region once, so that the intent log is as full as it gets, lets the hot blocks
//! become known in a run that does not count, and measures.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use tempfile::NamedTempFile;

use super::Round;
use super::client::Client;
use super::counters::{Counted, Counters};
use crate::Result;
use crate::job::{Job, JobKind};
use crate::pattern::{BLOCK_BYTES, Version};
use crate::report::Report;
use crate::servers::{Image, Running, ServerKind, Setup};
use crate::settings::{Plan, Section, Settings};
use crate::statistics::Spread;
use crate::{fio, measure, order, progress};

/// Size of the disk.
const DISK_BYTES: u64 = 100 << 30;
/// What the tracker arms at once.
const REGION_BYTES: usize = 1 << 20;
/// Requests in a second that no run exceeds, one at a time and deep: so many are written before, so
/// that no run allocates.
const RATE_SINGLE_MAX: f64 = 25_000.0;
const RATE_DEEP_MAX: f64 = 80_000.0;
/// Seed of the run that does not count.
const WARM_SEED: u64 = 2;

/// Those that are compared: off, on, on with all of the disk covered, and noise.
const SERVERS: [ServerKind; 4] = [
    ServerKind::TrackerPlain,
    ServerKind::Tracker,
    ServerKind::TrackerCovered,
    ServerKind::TrackerAgain,
];

/// A run that makes the hot blocks known.
fn warm() -> Job {
    Job {
        zipf_seed: Some(WARM_SEED),
        ..Job::of(JobKind::ZipfDeep)
    }
}

/// The image, without data.
///
/// # Errors
///
/// It cannot be made.
pub fn image(folder: &Path) -> Result<NamedTempFile> {
    let image = tempfile::Builder::new()
        .prefix("tidemark-bench-")
        .tempfile_in(folder)?;
    image.as_file().set_len(DISK_BYTES)?;
    Ok(image)
}

/// Measures the sections on all servers.
///
/// # Errors
///
/// A server or the client fails.
pub fn measure(
    settings: &Settings,
    plan: &Plan,
    (sections, image): (&[&Section], &Path),
    report: &mut Report,
) -> Result<Vec<Counted>> {
    let Some(first) = sections.first() else {
        return Ok(Vec::new());
    };
    let start = |kind| start(settings, first, kind, image);
    eprintln!("allocating what will be written");
    let server = start(ServerKind::TrackerPlain)?;
    touch_regions(&server)?;
    for job in sections.iter().map(|section| section.job).chain([warm()]) {
        // The order of the offsets is the same at every depth.
        let deep = Job { depth: 32, ..job };
        let rate = if job.depth == 1 {
            RATE_SINGLE_MAX
        } else {
            RATE_DEEP_MAX
        };
        let requests = rate * plan.duration.as_secs_f64();
        fio::run_requests(&server, &deep, requests as u64)?;
    }
    server.stop()?;
    std::fs::File::open(image)?.sync_all()?;
    let mut counted = Vec::new();
    for round in 0..plan.rounds {
        for kind in order(SERVERS.into_iter(), round) {
            let server = start(kind)?;
            touch_regions(&server)?;
            fio::run(&server, &warm(), plan.duration)?;
            for section in sections {
                let round = Round {
                    settings,
                    plan,
                    section,
                    round,
                };
                counted.push(observe(&round, &server, report)?);
            }
            server.stop()?;
        }
    }
    Ok(counted)
}

fn start(
    settings: &Settings,
    section: &Section,
    kind: ServerKind,
    image: &Path,
) -> Result<Running> {
    Running::start(&Setup {
        kind,
        tracker: &settings.tracker,
        folder: &section.folder,
        direct: section.direct,
        image: Image::Existing(image),
        arguments: &[],
    })
}

fn touch_regions(server: &Running) -> Result<()> {
    let mut client = Client::connect(server)?;
    let regions = (0..client.size_bytes()).step_by(REGION_BYTES);
    client.write(BLOCK_BYTES, Version::New, regions)
}

fn observe(round: &Round, server: &Running, report: &mut Report) -> Result<Counted> {
    let settings = round.settings;
    let allocated = || -> Result<u64> { Ok(std::fs::metadata(server.image())?.blocks() * 512) };
    let allocated_before = allocated()?;
    let before = Counters::read(settings, server)?;
    let (plan, section) = (round.plan, round.section);
    let measurement = measure::observe(settings, plan, section, server, round.round)?;
    let after = Counters::read(settings, server)?;
    eprintln!("{}", progress(section, &measurement));
    let counted = Counted {
        job: measurement.job,
        server: measurement.server,
        round: measurement.round,
        writes: measurement.requests,
        allocated_bytes: allocated()?.saturating_sub(allocated_before),
        counters: after
            .zip(before)
            .map(|(after, before)| after.since(&before)),
    };
    report.add(measurement);
    Ok(counted)
}

/// Of a counter as much as a write has of it, over the rounds.
pub fn per_write(
    counted: &[Counted],
    job: JobKind,
    server: ServerKind,
    counter: fn(&Counters) -> u64,
) -> Option<Spread> {
    let runs = counted
        .iter()
        .filter(|run| run.job == job && run.server == server);
    Spread::of(runs.filter_map(|run| run.per_write(counter)).collect())
}

/// A line for each job and server that tracks.
pub fn text(counted: &[Counted]) -> String {
    let mut text = format!(
        "Per write of the guest, median (least to most)\n{:<34}{:>28}{:>28}{:>28}{:>12}\n",
        "", "intent commits", "writes that waited", "evictions", "ring syncs"
    );
    for job in [JobKind::ZipfDeep, JobKind::ZipfSingle] {
        for server in SERVERS {
            let spread = |counter| per_write(counted, job, server, counter);
            let words = |counter| spread(counter).map_or(String::new(), |spread| spread.text(4));
            if spread(|counters| counters.ring_syncs).is_none() {
                continue;
            }
            let syncs = spread(|counters| counters.ring_syncs).map_or(0.0, |spread| spread.median);
            text.push_str(&format!(
                "{:<34}{:>28}{:>28}{:>28}{syncs:>12.6}\n",
                format!("depth {}: {}", Job::of(job).depth, server.name()),
                words(|counters| counters.intent_commits),
                words(|counters| counters.intent_waits),
                words(|counters| counters.intent_evictions),
            ));
        }
    }
    text
}
