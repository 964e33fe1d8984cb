//! What taking recovery points costs a guest: the tracker with a shipper beside it, against without.
//!
//! One tracker serves one disk all the time, and the first copy is in the vault before anything is
//! measured. Each round of a load has a run with the shipper and one without, in turns the other way round. After a run
//! with it the guest rests until the next epoch is captured: so capture is seen alone, too, and fio then
//! reads the same blocks.

mod figures;
mod fio_reads;
mod load;
mod watch;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::Result;
use crate::cost::counters;
use crate::cost::protected::Shipper;
use crate::pattern::BLOCK_BYTES;
use crate::servers::{Image, Running, ServerKind, Setup, is_installed};
use crate::settings::Settings;
use figures::{Line, Run};
use load::{Places, Write, Zipf};
use watch::Seen;

/// Size of the disk in MiB.
const SIZE_MIB: u64 = 8192;
/// Seconds of a run: two epochs.
const SECONDS: f64 = 12.0;
const EXPONENT: f64 = 0.99;
const INTERVAL: &str = "interval = \"5s\"\n";
/// Time for a capture after the guest has stopped.
const PATIENCE: Duration = Duration::from_secs(120);
/// Time between two looks for its end.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);
/// Seconds of writes that a throttled capture has to copy.
const THROTTLED_SECONDS: f64 = 3.0;
/// Bounds of capture, and what they add to the configuration.
const THROTTLES: [(&str, &str); 3] = [
    ("none", ""),
    ("50 MiB/s", "capture_rate = \"50MiB\"\n"),
    ("20% of the time", "capture_share_percent = 20\n"),
];

/// Who is measured.
struct Bench<'a> {
    settings: &'a Settings,
    program: &'a Path,
    server: Running,
    seconds: f64,
    seed: u64,
}

/// Measures all of it, prints it and saves it.
///
/// # Errors
///
/// A program is missing or fails, or a file cannot be written.
pub fn run(settings: &Settings) -> Result<()> {
    let folder = settings.folders.last().ok_or("a folder is missing")?;
    let program = settings.shipper.as_deref().ok_or("--shipper is missing")?;
    if !is_installed("fio") {
        return Err("fio is not installed".into());
    }
    let size_bytes = settings.size_mib.unwrap_or(SIZE_MIB) << 20;
    eprintln!("making the image and its first copy");
    let server = Running::start(&Setup {
        kind: ServerKind::Tracker,
        tracker: &settings.tracker,
        folder,
        direct: settings.direct,
        image: Image::Filled(size_bytes),
        arguments: &[],
    })?;
    let begin = Instant::now();
    let shipper = Shipper::start_with(program, &server, INTERVAL)?;
    shipper.await_idle()?;
    let copied = begin.elapsed().as_secs_f64();
    shipper.stop()?;
    eprintln!("first copy: {copied:.1} s");
    let mut bench = Bench {
        settings,
        program,
        server,
        seconds: settings.seconds.unwrap_or(SECONDS),
        seed: 1,
    };
    let zipf = Places::Zipf(Zipf::new(size_bytes / BLOCK_BYTES as u64, EXPONENT));
    let loads = [("uniform", Places::Uniform), ("zipf 0.99", zipf)];
    let (mut runs, mut lines) = (Vec::new(), Vec::new());
    for (name, places) in &loads {
        let of_load = bench.rounds(name, places)?;
        let figures = figures::of(name, &of_load);
        eprint!("{}", figures::text(&figures));
        runs.extend(of_load);
        lines.extend(figures);
    }
    for (name, added) in THROTTLES {
        let line = bench.throttled(name, added)?;
        eprint!("{}", figures::text(std::slice::from_ref(&line)));
        lines.push(line);
    }
    print!("{}", figures::text(&lines));
    println!("Saved {}", save(settings, &runs, &lines, copied)?.display());
    Ok(())
}

impl Bench<'_> {
    fn rounds(&mut self, name: &'static str, places: &Places) -> Result<Vec<Run>> {
        let mut runs = Vec::new();
        for round in 0..self.settings.rounds {
            // The other way round every time, so that a drift of the machine hits both alike.
            for with_shipper in [round % 2 == 1, round % 2 == 0] {
                let run = match with_shipper {
                    true => self.protected(name, places, round)?,
                    false => self.alone(name, places, round)?,
                };
                eprintln!("{}", run.progress());
                runs.push(run);
            }
        }
        Ok(runs)
    }

    fn alone(&mut self, name: &'static str, places: &Places, round: usize) -> Result<Run> {
        let (begin, writes, seen) = self.watched(places, None, self.seconds)?;
        Ok(Run::new((name, round, false), begin, &writes, &seen))
    }

    fn protected(&mut self, name: &'static str, places: &Places, round: usize) -> Result<Run> {
        let shipper = Shipper::start_again(self.program, &self.server, INTERVAL)?;
        self.catch_up(&shipper)?;
        let control = shipper.control();
        let (begin, writes, seen) = self.watched(places, Some(control), self.seconds)?;
        shipper.stop()?;
        let mut run = Run::new((name, round, true), begin, &writes, &seen);
        if let Some(tail) = run.tail {
            let blocks = blocks_since(&writes, previous_cut(&seen, tail.begin));
            run.fio_rate = Some(fio_reads::rate(
                &self.server,
                &blocks,
                self.settings.direct,
            )?);
        }
        Ok(run)
    }

    /// What a run without the shipper has changed is captured before anything counts.
    fn catch_up(&self, shipper: &Shipper) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            shipper.await_idle()?;
            let status = counters::status(self.settings, &self.server)?;
            let open = counters::of_disk(&status, "open_dirty_blocks")?;
            if open == 0 && has_no_closed(&status) {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err("the shipper does not catch up".into());
            }
            std::thread::sleep(LOOK_INTERVAL);
        }
    }

    /// The load with an eye on the epochs; with a shipper until the guest's last writes are captured.
    fn watched(
        &mut self,
        places: &Places,
        shipper: Option<PathBuf>,
        seconds: f64,
    ) -> Result<(u64, Vec<Write>, Seen)> {
        self.seed += 1;
        let origin = Instant::now();
        let (ends, captured) = (AtomicBool::new(false), AtomicBool::new(false));
        let with_shipper = shipper.is_some();
        let sockets = (self.server.control(), shipper);
        let iops = self.settings.guest_iops;
        std::thread::scope(|scope| {
            let watcher = scope.spawn(|| {
                watch::watch(sockets, &ends, &captured, origin).map_err(|error| error.to_string())
            });
            let duration = Duration::from_secs_f64(seconds);
            let begin = load::nanoseconds(origin.elapsed());
            let writes = load::run(&self.server, places, self.seed, (duration, iops), origin);
            let rested = match with_shipper {
                true => self.await_rest(&captured, || watcher.is_finished()),
                false => Ok(()),
            };
            ends.store(true, Ordering::Relaxed);
            let seen = watcher.join().map_err(|_| "the watcher panicked")??;
            rested?;
            Ok((begin, writes?, seen))
        })
    }

    fn await_rest(&self, captured: &AtomicBool, failed: impl Fn() -> bool) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline && !failed() {
            let status = counters::status(self.settings, &self.server)?;
            let open = counters::of_disk(&status, "open_dirty_blocks")?;
            if open == 0 && has_no_closed(&status) && captured.load(Ordering::Relaxed) {
                return Ok(());
            }
            std::thread::sleep(LOOK_INTERVAL);
        }
        Err("the last writes of the guest are not captured".into())
    }

    /// A capture with a bound, after some seconds of writes.
    fn throttled(&mut self, name: &str, added: &str) -> Result<Line> {
        let lines = format!("{INTERVAL}{added}");
        let shipper = Shipper::start_again(self.program, &self.server, &lines)?;
        self.catch_up(&shipper)?;
        let control = shipper.control();
        let (_, _, seen) = self.watched(&Places::Uniform, Some(control), THROTTLED_SECONDS)?;
        shipper.stop()?;
        let rates = seen.captures.iter().filter(|c| c.read_bytes > 0);
        let rates = rates.map(figures::rate).collect();
        Ok(Line::new(format!("capture, bound {name}: MB/s"), rates, 1))
    }
}

fn has_no_closed(status: &Value) -> bool {
    let closed = status.pointer("/machine/closed");
    closed.is_some_and(Value::is_null)
}

/// The last look at or before the cut that came before this one; 0 where there was none.
fn previous_cut(seen: &Seen, begin: u64) -> u64 {
    let earlier = seen.captures.iter().filter(|capture| capture.begin < begin);
    earlier.map(|capture| capture.before).max().unwrap_or(0)
}

/// What was written since, in order and each once.
fn blocks_since(writes: &[Write], since: u64) -> Vec<u32> {
    let mut blocks: Vec<u32> = writes
        .iter()
        .filter(|write| write.at >= since)
        .map(|write| write.block)
        .collect();
    blocks.sort_unstable();
    blocks.dedup();
    blocks
}

fn save(settings: &Settings, runs: &[Run], lines: &[Line], copied: f64) -> Result<PathBuf> {
    std::fs::create_dir_all(&settings.results)?;
    let now = jiff::Zoned::now();
    let name = settings.name.clone();
    let name = name.unwrap_or_else(|| now.strftime("%Y-%m-%d-%H%M%S-capture").to_string());
    let path = settings.results.join(format!("{name}.json"));
    let report = json!({
        "date": now.strftime("%F %H:%M %:z").to_string(),
        "direct": settings.direct,
        "guest_iops": settings.guest_iops,
        "disk_bytes": settings.size_mib.unwrap_or(SIZE_MIB) << 20,
        "seconds": settings.seconds.unwrap_or(SECONDS),
        "first_copy_seconds": copied,
        "figures": lines,
        "runs": runs,
    });
    std::fs::write(&path, serde_json::to_string_pretty(&report)?)?;
    Ok(path)
}
