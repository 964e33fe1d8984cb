//! A disk that somebody else writes to, or puts back, while no tracker serves it: it is noticed at
//! the next start, every block is compared, and hardly anything is uploaded.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use serde_json::Value;
use tests::chunks::committed_cut;
use tests::process::{Daemon, run};
use tests::seed::Random;
use tests::site::{Site, assert_same};
use tracker::journal::MARGIN_MS;

const MIB: u64 = 1 << 20;
const DISK_BYTES: u64 = 16 * MIB;
const BLOCK_BYTES: u64 = 4096;
const PATIENCE: Duration = Duration::from_secs(60);
/// Well past the time after a kill in which a write may still be the tracker's.
const PAST_MARGIN: Duration = Duration::from_millis(6 * MARGIN_MS as u64);

/// How the tracker ends.
#[derive(Clone, Copy, Debug)]
enum End {
    Stopped,
    Killed,
}

const ENDS: [End; 2] = [End::Stopped, End::Killed];

/// A protected disk of random bytes with one recovery point; tracker and shipper run.
struct Protected {
    site: Site,
    tracker: Option<Daemon>,
    shipper: Option<Daemon>,
    random: Random,
    first: String,
    /// The disk as it was at the first point, with its time.
    copy: PathBuf,
}

impl Protected {
    fn new(test: &str) -> Self {
        let mut site = Site::new(&[("disk", DISK_BYTES)]);
        site.codec = "none".to_owned();
        let mut random = Random::from_environment(test);
        let tracker = site.start_tracker();
        let mut client = site.connect("disk");
        for offset in (0..DISK_BYTES).step_by(MIB as usize) {
            client.write(offset, &random.bytes(MIB as usize)).unwrap();
        }
        site.protect();
        let shipper = site.start_shipper();
        committed_cut(&site);
        let first = site.points().pop().unwrap();
        let copy = site.path("copy");
        copy_over(&site.image("disk"), &copy);
        Self {
            site,
            tracker: Some(tracker),
            shipper: Some(shipper),
            random,
            first,
            copy,
        }
    }

    fn write(&mut self, blocks: u64) {
        let mut client = self.site.connect("disk");
        for _ in 0..blocks {
            let offset = self.random.below(DISK_BYTES / BLOCK_BYTES) * BLOCK_BYTES;
            let bytes = self.random.bytes(BLOCK_BYTES as usize);
            client.write(offset, &bytes).unwrap();
        }
    }

    /// Both programs end.
    fn end(&mut self, how: End) {
        let daemons = [self.tracker.take(), self.shipper.take()];
        for daemon in daemons.into_iter().flatten() {
            match how {
                End::Stopped => daemon.stop(),
                End::Killed => daemon.kill(),
            }
        }
    }

    /// Both start again. What the tracker says that it has found.
    fn start(&mut self) -> Option<String> {
        let tracker = self.site.start_tracker();
        let found = found(&self.site);
        if let Some(found) = &found {
            tracker.await_text(found);
        }
        self.tracker = Some(tracker);
        self.shipper = Some(self.site.start_shipper());
        found
    }

    /// A recovery point of the disk as it is now. Every block was compared for it, all points are
    /// there, and not more than so many bytes were uploaded.
    #[track_caller]
    fn check_compared(&self, uploaded_max: u64) {
        let site = &self.site;
        let (points, before) = (site.points(), site.segment_bytes());
        committed_cut(site);
        let after = site.points();
        let point = after.last().unwrap();
        assert!(
            points.iter().all(|point| after.contains(point)),
            "{after:?}"
        );
        assert!(bytes_read(site) >= DISK_BYTES, "not every block was read");
        let uploaded = site.segment_bytes() - before;
        assert!(uploaded <= uploaded_max, "{uploaded} bytes were uploaded");
        site.check_restore(point, &site.image("disk"));
        site.check_restore(&self.first, &self.copy);
        assert_eq!(disk_status(site)["resync"], Value::Null);
    }
}

impl Drop for Protected {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.end(End::Stopped);
        }
    }
}

fn disk_status(site: &Site) -> Value {
    site.tracker_status()["machine"]["disks"][0].clone()
}

/// What the tracker found at its start; every block then counts as changed, else none does.
#[track_caller]
fn found(site: &Site) -> Option<String> {
    let status = disk_status(site);
    let found = status["unserved_change"].as_str().map(str::to_owned);
    assert_eq!(found.is_some(), status["resync"].is_u64(), "{status:#}");
    found
}

fn bytes_read(site: &Site) -> u64 {
    let status: Value =
        serde_json::from_str(&site.shipper(&["status", "--json"]).success()).unwrap();
    status["disks"][0]["bytes_read"].as_u64().unwrap()
}

/// Copies a file with its time; over an old one in place, so that it stays the same file.
fn copy_over(from: &Path, to: &Path) {
    let mut copy = Command::new("cp");
    run(copy.arg("--preserve=timestamps").arg(from).arg(to)).success();
}

/// Writes random blocks into the image, as somebody does who knows nothing of trackers.
fn write_behind(world: &mut Protected, blocks: u64) {
    let source = world.site.path("foreign");
    for _ in 0..blocks {
        fs::write(&source, world.random.bytes(BLOCK_BYTES as usize)).unwrap();
        let block = world.random.below(DISK_BYTES / BLOCK_BYTES);
        let mut command = Command::new("dd");
        command.args(["bs=4096", "conv=notrunc", &format!("seek={block}")]);
        command.arg(format!("if={}", source.display()));
        command.arg(format!("of={}", world.site.image("disk").display()));
        run(&mut command).success();
    }
}

fn set_modified(path: &Path, time: SystemTime) {
    let file = File::options().write(true).open(path).unwrap();
    file.set_modified(time).unwrap();
}

#[test]
fn a_write_behind_our_back_is_found_and_replicated() {
    let mut world = Protected::new("written");
    for end in ENDS {
        world.write(20);
        world.end(end);
        write_behind(&mut world, 5);
        if matches!(end, End::Killed) {
            // Instead of waiting so long before it is written.
            set_modified(&world.site.image("disk"), SystemTime::now() + PAST_MARGIN);
        }
        let found = world.start().expect("it is noticed");
        assert!(found.contains("was written while no tracker"), "{found}");
        // 25 blocks and what tells of them.
        world.check_compared(40 * BLOCK_BYTES);
    }
}

#[test]
fn an_old_image_put_back_in_place_is_found_and_replicated() {
    let mut world = Protected::new("put_back");
    for end in ENDS {
        world.write(20);
        committed_cut(&world.site);
        world.end(end);
        copy_over(&world.copy, &world.site.image("disk"));
        let found = world.start().expect("it is noticed");
        assert!(found.contains("was put back"), "{found}");
        // What was written since is as it was before.
        world.check_compared(40 * BLOCK_BYTES);
        assert_same(&world.copy, &world.site.image("disk"));
    }
}

#[test]
fn an_image_that_was_only_touched_is_compared_and_not_uploaded() {
    let mut world = Protected::new("touched");
    for end in ENDS {
        world.end(end);
        set_modified(&world.site.image("disk"), SystemTime::now() + PAST_MARGIN);
        assert!(world.start().is_some(), "it is noticed");
        world.check_compared(0);
    }
}

#[test]
fn a_tracker_that_tracked_nothing_is_somebody_else() {
    let mut world = Protected::new("untracked");
    world.end(End::Stopped);
    world.site.tracker_arguments = vec!["--no-journal".to_owned()];
    let tracker = world.site.start_tracker();
    world.write(5);
    tracker.stop();
    world.site.tracker_arguments.clear();
    let found = world.start().expect("it is noticed");
    assert!(found.contains("was written while no tracker"), "{found}");
    world.check_compared(10 * BLOCK_BYTES);
}

#[test]
fn the_text_of_a_status_tells_of_it() {
    let mut world = Protected::new("text");
    world.end(End::Stopped);
    write_behind(&mut world, 1);
    let found = world.start().expect("it is noticed");
    let mut command = Command::new(tests::process::program("tracker"));
    command
        .arg("status")
        .arg("--control")
        .arg(world.site.control());
    let text = run(&mut command).success();
    assert!(text.contains(&found), "{found} is not in {text}");
    world.check_compared(5 * BLOCK_BYTES);
}

/// Writes until the tracker is gone.
fn write_along(site: &Site, written: &AtomicU64) {
    let mut random = Random::from_environment("write_along");
    let mut client = site.connect("disk");
    loop {
        let offset = random.below(DISK_BYTES / BLOCK_BYTES) * BLOCK_BYTES;
        let bytes = random.bytes(BLOCK_BYTES as usize);
        let done = match random.below(3) {
            0 => client.zero(offset, BLOCK_BYTES as u32),
            1 => client.trim(offset, BLOCK_BYTES as u32),
            _ => client.write(offset, &bytes),
        };
        if done.is_err() {
            return;
        }
        written.fetch_add(1, Ordering::AcqRel);
    }
}

#[test]
fn what_the_tracker_wrote_itself_costs_nothing() {
    let mut world = Protected::new("ours");
    for round in 0..6 {
        let end = ENDS[round % 2];
        let written = AtomicU64::new(0);
        let (tracker, shipper) = (world.tracker.take(), world.shipper.take());
        std::thread::scope(|scope| {
            scope.spawn(|| write_along(&world.site, &written));
            let begin = Instant::now();
            while written.load(Ordering::Acquire) < 300 {
                assert!(begin.elapsed() < PATIENCE, "nothing is written");
                std::thread::yield_now();
            }
            for daemon in [tracker, shipper].into_iter().flatten() {
                match end {
                    End::Stopped => daemon.stop(),
                    End::Killed => daemon.kill(),
                }
            }
        });
        assert_eq!(world.start(), None, "{end:?}");
    }
    // Nothing is written, and the tracker ends nevertheless.
    for end in ENDS {
        world.end(end);
        assert_eq!(world.start(), None, "{end:?}");
    }
    let site = &world.site;
    let point = site.cut();
    let read = bytes_read(site);
    assert!(read < DISK_BYTES, "every block was read: {read} bytes");
    site.check_restore(&point, &site.image("disk"));
}
