//! Frozen views: what other programs read of a disk as it was at a moment, while guests go on writing.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::Value;
use tests::nbd::{Client, Failure};
use tests::process::{Outcome, program, require, run};
use tests::seed::Random;
use tests::site::{Site, assert_same};
use tracker::control::client::ControlClient;
use tracker::control::protocol::CaptureOutcome;
use tracker::extent::Epoch;

const MIB: u64 = 1 << 20;
const BLOCK_BYTES: u64 = 4096;
const PATIENCE: Duration = Duration::from_secs(60);
/// Error of NBD.
const EPERM: u32 = 1;
/// Transmission flags.
const READ_ONLY: u16 = 1 << 1;
const SEND_FUA: u16 = 1 << 3;
const SEND_TRIM: u16 = 1 << 5;
const CAN_MULTI_CONN: u16 = 1 << 8;

fn snapshot(site: &Site, action: &str, arguments: &[&str]) -> Outcome {
    let mut command = Command::new(program("tracker"));
    command.args(["snapshot", action, "--control"]);
    run(command.arg(site.control()).args(arguments))
}

/// Takes a snapshot and returns its epoch.
#[track_caller]
fn take(site: &Site) -> String {
    let out = snapshot(site, "create", &[]).success();
    let is_epoch = |word: &&str| word.len() == 16 && word.chars().all(|c| c.is_ascii_hexdigit());
    let mut words = out.split(|c: char| !c.is_ascii_alphanumeric());
    let epoch = words.find(is_epoch);
    epoch
        .unwrap_or_else(|| panic!("no epoch in {out:?}"))
        .to_owned()
}

fn view(disk: &str, epoch: &str) -> String {
    format!("{disk}@{epoch}")
}

/// What nbdcopy reads of an export.
#[track_caller]
fn copied(site: &Site, export: &str, to: &str) -> PathBuf {
    let target = site.path(to);
    run(Command::new("nbdcopy").arg(site.uri(export)).arg(&target)).success();
    target
}

/// The names that the tracker lists.
#[track_caller]
fn listed(site: &Site) -> String {
    let uri = format!("nbd+unix:///?socket={}", site.socket().display());
    run(Command::new("nbdinfo").args(["--list", "--json", &uri])).success()
}

/// What `nbdinfo` says has changed: offset and length.
#[track_caller]
fn dirty(site: &Site, export: &str, context: &str) -> Vec<(u64, u64)> {
    let option = format!("--map={context}");
    let json = run(Command::new("nbdinfo").args(["--json", &option, &site.uri(export)])).success();
    let extents: Vec<Value> = serde_json::from_str(&json).unwrap();
    let number = |extent: &Value, field: &str| extent[field].as_u64().unwrap();
    extents
        .iter()
        .filter(|extent| number(extent, "type") & 1 != 0)
        .map(|extent| (number(extent, "offset"), number(extent, "length")))
        .collect()
}

/// A guest that overwrites random blocks of a disk until it is told to stop.
struct Writer {
    stopping: Arc<AtomicBool>,
    written: Arc<AtomicU64>,
    thread: JoinHandle<()>,
}

impl Writer {
    fn start(site: &Site, disk: &str, seed: u64) -> Self {
        let (stopping, written) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let (thread_stopping, thread_written) = (Arc::clone(&stopping), Arc::clone(&written));
        let mut client = site.connect(disk);
        let thread = std::thread::spawn(move || {
            let mut random = Random::new(seed);
            let blocks = client.size_bytes() / BLOCK_BYTES;
            while !thread_stopping.load(Ordering::Acquire) {
                let offset = random.below(blocks) * BLOCK_BYTES;
                // Parts of blocks, too.
                let length = random.between(1, 16) as usize * 512;
                let length = length.min((client.size_bytes() - offset) as usize);
                if random.chance(1, 8) {
                    client.zero(offset, length as u32).unwrap();
                } else {
                    client.write(offset, &random.bytes(length)).unwrap();
                }
                thread_written.fetch_add(1, Ordering::AcqRel);
            }
        });
        Self {
            stopping,
            written,
            thread,
        }
    }

    /// Waits until it has written so many times more.
    #[track_caller]
    fn await_more(&self, count: u64) {
        let goal = self.written.load(Ordering::Acquire) + count;
        let deadline = Instant::now() + PATIENCE;
        while self.written.load(Ordering::Acquire) < goal {
            assert!(!self.thread.is_finished(), "the guest has failed");
            assert!(Instant::now() < deadline, "the guest does not go on");
            std::thread::yield_now();
        }
    }

    #[track_caller]
    fn stop(self) {
        self.stopping.store(true, Ordering::Release);
        self.thread.join().unwrap();
    }
}

/// Lets a guest write so many times.
#[track_caller]
fn write_some(site: &Site, disk: &str, seed: u64, count: u64) {
    let writer = Writer::start(site, disk, seed);
    writer.await_more(count);
    writer.stop();
}

#[test]
fn copies_of_a_view_are_the_disk_at_the_moment_of_the_snapshot() {
    require(&["nbdcopy", "qemu-img"]);
    // The second ends in the middle of a block.
    let site = Site::new(&[("data", 16 * MIB), ("log", 4 * MIB + 3 * 512)]);
    let _tracker = site.start_tracker();
    for disk in ["data", "log"] {
        write_some(&site, disk, 1, 500);
    }
    let epoch = take(&site);
    for disk in ["data", "log"] {
        fs::copy(site.image(disk), site.path(&format!("{disk}.moment"))).unwrap();
    }
    let writers = ["data", "log"].map(|disk| Writer::start(&site, disk, 2));
    for writer in &writers {
        writer.await_more(500);
    }
    for disk in ["data", "log"] {
        let moment = site.path(&format!("{disk}.moment"));
        let name = view(disk, &epoch);
        assert_same(&moment, &copied(&site, &name, &format!("{disk}.first")));
        assert_same(&moment, &copied(&site, &name, &format!("{disk}.second")));
        let converted = site.path(&format!("{disk}.converted"));
        run(Command::new("qemu-img")
            .args(["convert", "-f", "raw", "-O", "raw", &site.uri(&name)])
            .arg(&converted))
        .success();
        assert_same(&moment, &converted);
        // Otherwise the disk itself would have done.
        assert!(fs::read(&moment).unwrap() != fs::read(site.image(disk)).unwrap());
    }
    writers.into_iter().for_each(Writer::stop);
    snapshot(&site, "release", &[&epoch]).success();
}

#[test]
fn views_of_two_disks_are_of_one_moment() {
    let site = Site::new(&[("data", MIB), ("log", MIB)]);
    let _tracker = site.start_tracker();
    let stopping = Arc::<AtomicBool>::default();
    let (mut data, mut log) = (site.connect("data"), site.connect("log"));
    let count = Arc::<AtomicU64>::default();
    let (thread_stopping, thread_count) = (Arc::clone(&stopping), Arc::clone(&count));
    // Each number is in the log before it is in the data.
    let guest = std::thread::spawn(move || {
        let mut number = 0_u64;
        while !thread_stopping.load(Ordering::Acquire) {
            number += 1;
            let content = number.to_le_bytes().repeat(64);
            log.write(0, &content).unwrap();
            data.write(0, &content).unwrap();
            thread_count.store(number, Ordering::Release);
        }
    });
    let mut last = 0;
    for _ in 0..20 {
        let deadline = Instant::now() + PATIENCE;
        while count.load(Ordering::Acquire) <= last {
            assert!(Instant::now() < deadline, "the guest does not go on");
        }
        let epoch = take(&site);
        let read = |disk| {
            let bytes = site.connect(&view(disk, &epoch)).read(0, 512).unwrap();
            let number = u64::from_le_bytes(bytes[..8].try_into().unwrap());
            assert_eq!(bytes, number.to_le_bytes().repeat(64), "a torn write");
            number
        };
        // The data first: were it not frozen, the log would be ahead by many.
        let (in_data, in_log) = (read("data"), read("log"));
        assert!(
            in_log == in_data || in_log == in_data + 1,
            "{in_log} in the log, {in_data} in the data"
        );
        assert!(in_data > last);
        last = in_data;
        snapshot(&site, "release", &[&epoch]).success();
    }
    stopping.store(true, Ordering::Release);
    guest.join().unwrap();
}

#[test]
fn what_a_view_calls_changed_makes_the_copy_before_it_the_next_one() {
    require(&["nbdcopy", "nbdinfo"]);
    let size = 32 * MIB;
    let site = Site::new(&[("disk", size)]);
    let _tracker = site.start_tracker();
    write_some(&site, "disk", 1, 200);
    let first = take(&site);
    // Nobody has a copy of any of it.
    let name = view("disk", &first);
    assert_eq!(dirty(&site, &name, "tidemark:dirty"), [(0, size)]);
    let writer = Writer::start(&site, "disk", 2);
    let copy = copied(&site, &name, "copy");
    writer.await_more(200);
    snapshot(&site, "release", &["--done", &first]).success();
    writer.await_more(200);
    for round in 0..3 {
        let epoch = take(&site);
        let name = view("disk", &epoch);
        writer.await_more(200);
        let extents = dirty(&site, &name, "tidemark:dirty");
        let qemus = dirty(&site, &name, "qemu:dirty-bitmap:tidemark");
        assert_eq!(extents, qemus);
        let changed: u64 = extents.iter().map(|(_, length)| length).sum();
        assert!(0 < changed && changed < size, "{changed} of {size} changed");
        let mut client = site.connect(&name);
        let mut bytes = fs::read(&copy).unwrap();
        for (offset, length) in extents {
            let new = client.read(offset, length as u32).unwrap();
            bytes[offset as usize..(offset + length) as usize].copy_from_slice(&new);
        }
        fs::write(&copy, &bytes).unwrap();
        assert_same(&copied(&site, &name, &format!("whole-{round}")), &copy);
        // In the second round the changes are left to the snapshot after it.
        let arguments: &[&str] = match round {
            1 => &[&epoch],
            _ => &["--done", &epoch],
        };
        snapshot(&site, "release", arguments).success();
    }
    writer.stop();
}

#[test]
fn a_snapshot_outlives_a_tracker_that_is_killed() {
    require(&["nbdcopy", "nbdinfo"]);
    let site = Site::new(&[("disk", 8 * MIB)]);
    let tracker = site.start_tracker();
    write_some(&site, "disk", 1, 300);
    let epoch = take(&site);
    let moment = site.path("moment");
    fs::copy(site.image("disk"), &moment).unwrap();
    write_some(&site, "disk", 2, 300);
    tracker.kill();
    let tracker = site.start_tracker();
    let writer = Writer::start(&site, "disk", 3);
    writer.await_more(300);
    let name = view("disk", &epoch);
    assert!(listed(&site).contains(&name));
    assert_same(&moment, &copied(&site, &name, "copy"));
    let list = snapshot(&site, "list", &[]).success();
    assert!(list.contains(&epoch), "{list}");
    let refused = snapshot(&site, "create", &[]).failure();
    assert!(refused.contains(&epoch), "{refused}");
    writer.stop();
    snapshot(&site, "release", &[&epoch]).success();
    assert!(!listed(&site).contains(&name));
    tracker.stop();
}

#[test]
fn reads_of_a_view_that_ends_fail_and_are_never_wrong() {
    for done in [false, true] {
        let site = Site::new(&[("disk", MIB)]);
        let _tracker = site.start_tracker();
        write_some(&site, "disk", 1, 500);
        for round in 0..20 {
            let epoch = take(&site);
            let moment = fs::read(site.image("disk")).unwrap();
            let writer = Writer::start(&site, "disk", 2 + round);
            let mut client = site.connect(&view("disk", &epoch));
            let (reading, begun) = std::sync::mpsc::channel();
            let reader = std::thread::spawn(move || {
                let mut good = 0_u64;
                loop {
                    let block = good * 7 % (MIB / BLOCK_BYTES);
                    let at = (block * BLOCK_BYTES) as usize;
                    match client.read(at as u64, BLOCK_BYTES as u32) {
                        Ok(bytes) => assert!(
                            bytes == moment[at..at + BLOCK_BYTES as usize],
                            "block {block} is not what it was at the snapshot"
                        ),
                        Err(Failure::Refused(error)) => return error,
                        Err(Failure::Lost(error)) => panic!("the connection is lost: {error}"),
                    }
                    good += 1;
                    if good == 20 {
                        reading.send(()).unwrap();
                    }
                }
            });
            begun.recv_timeout(PATIENCE).unwrap();
            let arguments: &[&str] = if done { &["--done", &epoch] } else { &[&epoch] };
            snapshot(&site, "release", arguments).success();
            let deadline = Instant::now() + PATIENCE;
            while !reader.is_finished() {
                assert!(Instant::now() < deadline, "reads of an ended view go on");
                std::thread::yield_now();
            }
            assert_ne!(reader.join().unwrap(), 0);
            writer.stop();
            assert!(Client::unix(&site.socket(), &view("disk", &epoch)).is_err());
        }
    }
}

#[test]
fn a_view_past_its_budget_is_given_up_and_the_guest_goes_on() {
    let mut site = Site::new(&[("disk", 8 * MIB)]);
    site.tracker_arguments = vec!["--preserve-budget".into(), "1MiB".into()];
    let _tracker = site.start_tracker();
    let mut guest = site.connect("disk");
    guest.write(0, &vec![1; MIB as usize]).unwrap();
    let epoch = take(&site);
    let mut client = site.connect(&view("disk", &epoch));
    assert_eq!(client.read(0, 512).unwrap(), [1; 512]);
    for part in 0..8 {
        guest.write(part * MIB, &vec![2; MIB as usize]).unwrap();
    }
    for part in 0..8 {
        let read = client.read(part * MIB, MIB as u32);
        assert!(matches!(read, Err(Failure::Refused(_))), "part {part}");
        assert_eq!(guest.read(part * MIB, 512).unwrap(), [2; 512]);
    }
    let list = snapshot(&site, "list", &[]).success();
    assert!(list.contains(&epoch) && list.contains("given up"), "{list}");
    snapshot(&site, "release", &[&epoch]).success();
    let next = take(&site);
    let mut client = site.connect(&view("disk", &next));
    assert_eq!(client.read(7 * MIB, 512).unwrap(), [2; 512]);
}

#[test]
fn a_view_tells_data_throughout() {
    require(&["nbdinfo"]);
    let site = Site::new(&[("disk", 4 * MIB)]);
    let _tracker = site.start_tracker();
    let mut guest = site.connect("disk");
    guest.write(MIB, &[1; MIB as usize]).unwrap();
    let epoch = take(&site);
    // A hole by now, and data at the snapshot.
    guest.trim(MIB, MIB as u32).unwrap();
    let uri = site.uri(&view("disk", &epoch));
    let json = run(Command::new("nbdinfo").args(["--json", "--map", &uri])).success();
    let extents: Vec<Value> = serde_json::from_str(&json).unwrap();
    assert!(extents.iter().all(|extent| extent["type"] == 0), "{json}");
    let mut client = site.connect(&view("disk", &epoch));
    assert_eq!(client.read(MIB, 4096).unwrap(), [1; 4096]);
}

#[test]
fn a_view_is_read_only_and_listed_while_it_is_there() {
    require(&["nbdinfo"]);
    let site = Site::new(&[("disk", 4 * MIB)]);
    let _tracker = site.start_tracker();
    site.connect("disk").write(0, &[1; 4096]).unwrap();
    let epoch = take(&site);
    let name = view("disk", &epoch);
    assert!(listed(&site).contains(&name));
    let mut client = site.connect(&name);
    assert_eq!(client.size_bytes(), 4 * MIB);
    let flags = client.flags();
    assert_eq!(
        flags & (READ_ONLY | CAN_MULTI_CONN),
        READ_ONLY | CAN_MULTI_CONN
    );
    assert_eq!(flags & (SEND_FUA | SEND_TRIM), 0, "{flags:#x}");
    let refused = |result| matches!(result, Err(Failure::Refused(EPERM)));
    assert!(refused(client.write(0, &[2; 512])));
    assert!(refused(client.zero(0, 4096)));
    assert!(refused(client.trim(0, 4096)));
    assert_eq!(client.read(0, 4096).unwrap(), [1; 4096]);
    assert_eq!(site.connect("disk").read(0, 4096).unwrap(), [1; 4096]);
    // The empty name goes on meaning the disk itself.
    assert_eq!(site.connect("").flags() & READ_ONLY, 0);
    // The short form of the number names it, too; other numbers name nothing.
    let number = u64::from_str_radix(&epoch, 16).unwrap();
    let connect = |export: &str| Client::unix(&site.socket(), export);
    assert!(connect(&format!("disk@{number:x}")).is_ok());
    for wrong in [
        format!("disk@{:x}", number + 1),
        "disk@".to_owned(),
        "disk@+1".to_owned(),
        format!("other@{epoch}"),
        format!("@{epoch}"),
        format!("disk@{epoch}@"),
    ] {
        assert!(connect(&wrong).is_err(), "{wrong}");
    }
    snapshot(&site, "release", &[&epoch]).success();
    assert!(!listed(&site).contains(&name));
    let again = snapshot(&site, "release", &[&epoch]).failure();
    assert!(again.contains(&epoch), "{again}");
}

#[test]
fn a_cut_of_the_shipper_is_refused_while_a_snapshot_is_held() {
    let site = Site::new(&[("disk", 4 * MIB)]);
    let _tracker = site.start_tracker();
    let epoch = take(&site);
    let number = Epoch(u64::from_str_radix(&epoch, 16).unwrap());
    let mut shipper = ControlClient::connect(&site.control()).unwrap();
    let refused = shipper.cut(Epoch::ZERO).unwrap_err().to_string();
    let tells = refused.contains(&epoch) && refused.contains("tracker snapshot release");
    assert!(tells, "{refused}");
    // A shipper that finds a closed epoch must not end what it has not begun.
    for outcome in [CaptureOutcome::Sealed, CaptureOutcome::Abandoned] {
        assert!(shipper.capture_end(number, outcome).is_err(), "{outcome:?}");
    }
    assert!(shipper.revert().is_err());
    assert!(site.connect(&view("disk", &epoch)).read(0, 512).is_ok());
    snapshot(&site, "release", &[&epoch]).success();
    assert!(shipper.cut(Epoch::ZERO).is_ok());
}

#[test]
fn with_frozen_views_each_capture_has_one() {
    require(&["nbdinfo"]);
    for frozen_views in [false, true] {
        let mut site = Site::new(&[("disk", MIB)]);
        if frozen_views {
            site.tracker_arguments = vec!["--frozen-views".into()];
        }
        let _tracker = site.start_tracker();
        let mut guest = site.connect("disk");
        guest.write(0, &[1; 4096]).unwrap();
        let mut shipper = ControlClient::connect(&site.control()).unwrap();
        let epoch = shipper.cut(Epoch::ZERO).unwrap();
        guest.write(0, &[2; 4096]).unwrap();
        // One that the epoch has not changed.
        guest.write(MIB / 2, &[2; 4096]).unwrap();
        let name = view("disk", &epoch.to_string());
        assert_eq!(listed(&site).contains(&name), frozen_views);
        if frozen_views {
            let mut client = site.connect(&name);
            assert_eq!(client.read(0, 4096).unwrap(), [1; 4096]);
            assert_eq!(client.read(MIB / 2, 4096).unwrap(), [0; 4096]);
        }
        shipper.capture_end(epoch, CaptureOutcome::Sealed).unwrap();
        assert!(!listed(&site).contains(&name));
    }
}
