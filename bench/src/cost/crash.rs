//! The check after a power cut: what it reads, how fast, and what guests feel of it.
//!
//! A benchmark cannot cut the power. It kills the tracker and starts it where the machine has another
//! boot id, so that the tracker does after it what it does after a power cut. More than the cap of the
//! intent log is written before, and all of it is in the vault but for some blocks, so that there is
//! something to find.

use std::fs::File;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use serde::Serialize;

use super::client::Client;
use super::counters;
use super::protected::Shipper;
use crate::Result;
use crate::fio;
use crate::job::{Job, JobKind};
use crate::load::next_random;
use crate::measure::Latency;
use crate::pattern::{BLOCK_BYTES, Version};
use crate::servers::{Image, Running, ServerKind, Setup};
use crate::settings::{Section, Settings};
use crate::statistics::Spread;

/// Cap of the intent log.
const CAP_BYTES: u64 = 1 << 30;
const CAP_ARGUMENT: &str = "1GiB";
/// Size of the disk, all of which is written.
const DISK_BYTES: u64 = 3 * CAP_BYTES;
const PIECE_BYTES: usize = 1 << 20;
/// Blocks that change after the last recovery point. They lie in what was written last, of which the
/// regions are armed: others would be read because of their records, and be none of the check's.
const CHANGED_BLOCKS: usize = 4096;
const CHANGED_FROM: u64 = DISK_BYTES - CAP_BYTES / 2;
/// Time in which reads are timed with nothing beside them.
const ALONE: Duration = Duration::from_secs(2);
/// Rounds, at most: one takes ten seconds and more.
const ROUNDS_MAX: usize = 3;

/// What one power cut has cost.
#[derive(Clone, Debug, Serialize)]
pub struct Check {
    /// Bytes of the regions that were armed at the end, which is what is compared.
    pub armed_bytes: u64,
    /// From the start of the tracker until it has answered a read.
    pub start_seconds: f64,
    /// Bytes that count as changed after it.
    pub suspect_bytes: u64,
    /// Bytes that the recovery point read.
    pub read_bytes: u64,
    /// Bytes that it put into the vault.
    pub uploaded_bytes: u64,
    /// Bytes that had changed.
    pub changed_bytes: u64,
    /// From the request for the recovery point until it was in the vault.
    pub seconds: f64,
    /// Reading, in MB/s.
    pub rate: f64,
    /// fio's on the file itself, 1 MiB sequential reads past the page cache, in MB/s.
    pub disk_rate: f64,
    /// Of 4 KiB reads of a guest, one at a time, with nothing beside them.
    pub latency_alone: Latency,
    /// The same during the check.
    pub latency_meanwhile: Latency,
}

/// Cuts the power so many times.
///
/// # Errors
///
/// A program fails, or does not do its part in time.
pub fn measure(settings: &Settings, section: &Section, rounds: usize) -> Result<Vec<Check>> {
    let program = settings.shipper.as_ref().ok_or("--shipper is missing")?;
    let mut server = Running::start(&Setup {
        kind: ServerKind::Tracker,
        tracker: &settings.tracker,
        folder: &section.folder,
        direct: true,
        image: Image::Filled(DISK_BYTES),
        arguments: &["--intent-cap", CAP_ARGUMENT],
    })?;
    let shipper = Shipper::start(program, &server)?;
    shipper.await_idle()?;
    let mut checks = Vec::new();
    for round in 0..rounds.min(ROUNDS_MAX) {
        let check = measure_once(settings, section, (&mut server, &shipper), round)?;
        eprintln!("  round {}: {}", round + 1, line(&check));
        checks.push(check);
    }
    shipper.stop()?;
    server.stop()?;
    Ok(checks)
}

fn measure_once(
    settings: &Settings,
    section: &Section,
    (server, shipper): (&mut Running, &Shipper),
    round: usize,
) -> Result<Check> {
    // Other data each round, so that the blocks that change do change.
    let versions = [Version::New, Version::Old];
    let (all, some) = (versions[round % 2], versions[(round + 1) % 2]);
    let mut client = Client::connect(server)?;
    client.write(PIECE_BYTES, all, (0..DISK_BYTES).step_by(PIECE_BYTES))?;
    shipper.cut(settings, server)?;
    let mut random = round as u64;
    client.write(
        BLOCK_BYTES,
        some,
        (0..CHANGED_BLOCKS).map(|_| any_block(&mut random, CHANGED_FROM)),
    )?;
    drop(client);
    let armed = counters::of_disk(&counters::status(settings, server)?, "intent_regions")?;
    server.kill()?;
    // The machine that has lost its power has nothing in its page cache.
    forget(server)?;
    let start = server.start_again(Some(round as u64 + 1))?;
    let dirty = counters::of_disk(&counters::status(settings, server)?, "open_dirty_blocks")?;
    shipper.await_idle()?;
    let latency_alone = read_during(server, || {
        std::thread::sleep(ALONE);
        Ok(())
    })?;
    let before = shipper.shipped()?;
    let begin = Instant::now();
    let latency_meanwhile = read_during(server, || shipper.cut_alone().map(drop))?;
    let seconds = begin.elapsed().as_secs_f64();
    let after = shipper.shipped()?;
    shipper.cut(settings, server)?;
    let read_bytes = after.read_bytes.saturating_sub(before.read_bytes);
    Ok(Check {
        armed_bytes: armed * PIECE_BYTES as u64,
        start_seconds: start.as_secs_f64(),
        suspect_bytes: dirty * BLOCK_BYTES as u64,
        read_bytes,
        uploaded_bytes: after.uploaded_bytes.saturating_sub(before.uploaded_bytes),
        changed_bytes: (CHANGED_BLOCKS * BLOCK_BYTES) as u64,
        seconds,
        rate: read_bytes as f64 / 1e6 / seconds,
        disk_rate: disk_rate(settings, section, server, read_bytes)?,
        latency_alone,
        latency_meanwhile,
    })
}

/// The offset of a block from an offset on.
fn any_block(random: &mut u64, from: u64) -> u64 {
    let block = BLOCK_BYTES as u64;
    from + next_random(random) % ((DISK_BYTES - from) / block) * block
}

/// Takes the image out of the page cache.
fn forget(server: &Running) -> Result<()> {
    let image = File::open(server.image())?;
    image.sync_all()?;
    posix_fadvise(&image, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
    Ok(())
}

/// Reads blocks at random, one at a time, while something is done.
fn read_during(server: &Running, work: impl FnOnce() -> Result<()>) -> Result<Latency> {
    let mut client = Client::connect(server)?;
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let read = read_until(&mut client, &done);
            read.map_err(|error| error.to_string())
        });
        let worked = work();
        done.store(true, Ordering::Relaxed);
        let latency = reader.join().map_err(|_| "the reader panicked")??;
        worked.map(|()| latency)
    })
}

fn read_until(client: &mut Client, done: &AtomicBool) -> Result<Latency> {
    let mut times = Histogram::<u64>::new_with_bounds(1, 60_000_000_000, 3)?;
    let mut random = 0;
    while !done.load(Ordering::Relaxed) {
        let begin = Instant::now();
        client.read_block(any_block(&mut random, 0))?;
        times.saturating_record(u64::try_from(begin.elapsed().as_nanos()).unwrap_or(u64::MAX));
    }
    let microseconds = |quantile| times.value_at_quantile(quantile) as f64 / 1000.0;
    Ok(Latency {
        p50: microseconds(0.5),
        p99: microseconds(0.99),
        p999: microseconds(0.999),
    })
}

/// What fio reads of the file in a second, where it reads as much.
fn disk_rate(settings: &Settings, section: &Section, server: &Running, bytes: u64) -> Result<f64> {
    let image = server.image();
    let raw = Running::start(&Setup {
        kind: ServerKind::RawFile,
        tracker: &settings.tracker,
        folder: &section.folder,
        direct: true,
        image: Image::Existing(&image),
        arguments: &[],
    })?;
    let job = Job::of(JobKind::Read1m);
    let requests = bytes.div_ceil(job.block_bytes as u64).max(1);
    let load = fio::run_requests(&raw, &job, requests)?;
    Ok(job.rate(load.requests, load.seconds))
}

fn line(check: &Check) -> String {
    let mib = |bytes: u64| bytes >> 20;
    format!(
        "started in {:.2} s, {} MiB armed, {} MiB read, {:.1} MiB uploaded, {:.0} MB/s (disk {:.0}), \
         reads p99 {:.0} us (alone {:.0})",
        check.start_seconds,
        mib(check.armed_bytes),
        mib(check.read_bytes),
        check.uploaded_bytes as f64 / f64::from(1 << 20),
        check.rate,
        check.disk_rate,
        check.latency_meanwhile.p99,
        check.latency_alone.p99,
    )
}

/// Bytes read at most, in parts of the cap.
pub fn share_of_cap(checks: &[Check]) -> Option<Spread> {
    let shares = checks.iter();
    Spread::of(
        shares
            .map(|check| check.read_bytes as f64 / CAP_BYTES as f64)
            .collect(),
    )
}

/// Speed of the check in parts of the disk's.
pub fn share_of_disk(checks: &[Check]) -> Option<Spread> {
    let shares = checks.iter();
    Spread::of(
        shares
            .map(|check| check.rate / check.disk_rate.max(f64::EPSILON))
            .collect(),
    )
}

/// A line for each figure.
pub fn text(checks: &[Check]) -> String {
    let mut text = format!(
        "Check after a power cut: cap {} MiB, disk {} MiB, {} MiB changed\n",
        CAP_BYTES >> 20,
        DISK_BYTES >> 20,
        (CHANGED_BLOCKS * BLOCK_BYTES) >> 20
    );
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let mut add = |name: &str, decimals, figure: &dyn Fn(&Check) -> f64| {
        if let Some(spread) = Spread::of(checks.iter().map(figure).collect()) {
            text.push_str(&format!("  {name:<52}{}\n", spread.text(decimals)));
        }
    };
    add("start until a read is answered, s", 3, &|check| {
        check.start_seconds
    });
    add("armed when the power went, MiB", 0, &|check| {
        mib(check.armed_bytes)
    });
    add("counts as changed after it, MiB", 0, &|check| {
        mib(check.suspect_bytes)
    });
    add("read by the recovery point, MiB", 0, &|check| {
        mib(check.read_bytes)
    });
    add("uploaded by it, MiB", 2, &|check| mib(check.uploaded_bytes));
    add("until it was in the vault, s", 2, &|check| check.seconds);
    add("speed, MB/s", 0, &|check| check.rate);
    add("fio on the file itself, MB/s", 0, &|check| check.disk_rate);
    for (name, of) in [
        (
            "alone",
            (|check| check.latency_alone) as fn(&Check) -> Latency,
        ),
        ("meanwhile", |check| check.latency_meanwhile),
    ] {
        add(&format!("4 KiB read p50, {name}, us"), 0, &|check| {
            of(check).p50
        });
        add(&format!("4 KiB read p99, {name}, us"), 0, &|check| {
            of(check).p99
        });
        add(&format!("4 KiB read p99.9, {name}, us"), 0, &|check| {
            of(check).p999
        });
    }
    text
}
