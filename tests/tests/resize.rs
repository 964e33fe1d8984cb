//! A disk grows while it is served: its clients, its journal, its recovery points.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs::{self, File};
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;
use tests::chunks::{ChunkClient, committed_cut};
use tests::loop_device::LoopDevice;
use tests::model::{Change, Model, SECTOR_BYTES};
use tests::nbd::{Client, Failure};
use tests::process::{Daemon, Outcome, program, run};
use tests::seed::Random;
use tests::site::Site;

const MIB: u64 = 1 << 20;
/// Ends in the middle of a block.
const ODD: u64 = 8 * MIB + 3 * 512;
const PATIENCE: Duration = Duration::from_secs(60);
/// Errors of NBD.
const EINVAL: u32 = 22;
const ENOSPC: u32 = 28;
/// A transmission flag of an experimental extension.
const SEND_RESIZE: u16 = 1 << 9;

fn resize_command(site: &Site, arguments: &[&str]) -> Command {
    let mut command = Command::new(program("tracker"));
    command.arg("resize").arg("--control").arg(site.control());
    command.args(arguments);
    command
}

#[track_caller]
fn resize(site: &Site, arguments: &[&str]) -> Outcome {
    run(&mut resize_command(site, arguments))
}

fn length(path: &Path) -> u64 {
    fs::metadata(path).unwrap().len()
}

fn set_length(path: &Path, bytes: u64) {
    let file = File::options().write(true).open(path).unwrap();
    file.set_len(bytes).unwrap();
}

/// What a device may hold behind its old end.
fn append(path: &Path, bytes: &[u8]) {
    let mut file = File::options().write(true).open(path).unwrap();
    file.seek(SeekFrom::End(0)).unwrap();
    file.write_all(bytes).unwrap();
}

fn served_bytes(site: &Site) -> u64 {
    let status = site.tracker_status();
    status["machine"]["disks"][0]["size_bytes"]
        .as_u64()
        .unwrap()
}

/// `shipper status --json`, asked for until it fits.
#[track_caller]
fn await_status(site: &Site, what: &str, fits: impl Fn(&Value) -> bool) -> Value {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let outcome = site.shipper(&["status", "--json"]);
        let status = serde_json::from_str(&outcome.out).unwrap_or(Value::Null);
        if fits(&status) {
            return status;
        }
        assert!(
            Instant::now() < deadline,
            "no status with {what}: {status:#}"
        );
    }
}

fn bytes_read(site: &Site) -> u64 {
    let status = await_status(site, "bytes_read", |status| !status.is_null());
    status["disks"][0]["bytes_read"].as_u64().unwrap()
}

/// `shipper cut`, once the shipper has found its tracker again.
#[track_caller]
fn cut_after_restart(site: &Site) -> String {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let outcome = site.shipper(&["cut"]);
        if outcome.status.success() {
            return outcome.out.trim().to_owned();
        }
        assert!(Instant::now() < deadline, "{}", outcome.err);
    }
}

fn refused(result: Result<(), Failure>) -> u32 {
    match result {
        Err(Failure::Refused(number)) => number,
        other => panic!("it should have been refused: {other:?}"),
    }
}

/// Writes and reads all over what is served at the time, and compares with a model, until told to end.
fn write_along(site: &Site, size_bytes: &AtomicU64, stop: &AtomicBool, model: &mut Model) -> u64 {
    let mut client = site.connect("disk");
    let mut random = Random::from_environment("write_along");
    let (mut tag, mut behind) = (0, 0);
    while !stop.load(Ordering::Acquire) {
        tag += 1;
        let sectors = size_bytes.load(Ordering::Acquire) / SECTOR_BYTES;
        let count = random.between(1, 64);
        let first = random.below(sectors - count + 1);
        let (offset, length) = (first * SECTOR_BYTES, count * SECTOR_BYTES);
        behind += u64::from(offset >= ODD);
        let change = match random.below(6) {
            0 => Change::Zero,
            1 => Change::Trim,
            _ => Change::Write(tag),
        };
        model.change(&mut client, change, offset, length).unwrap();
        let read = client.read(offset, length as u32).unwrap();
        model.check(offset, &read).unwrap();
    }
    behind
}

#[test]
fn a_disk_grows_under_a_client_that_writes() {
    let site = Site::new(&[("disk", ODD)]);
    let tracker = site.start_tracker();
    let mut idle = site.connect("disk");
    assert_eq!(idle.size_bytes(), ODD);
    // No client is offered to do it.
    assert_eq!(idle.flags() & SEND_RESIZE, 0);
    let steps = [
        ("+512", ODD + 512),
        ("+2048", ODD + 2560),
        ("9MiB", 9 * MIB),
        ("+512", 9 * MIB + 512),
        ("400MiB", 400 * MIB),
    ];
    let (size_bytes, stop) = (AtomicU64::new(ODD), AtomicBool::new(false));
    let mut model = Model::new(400 * MIB);
    let behind = std::thread::scope(|scope| {
        let writer = scope.spawn(|| write_along(&site, &size_bytes, &stop, &mut model));
        for (wanted, bytes) in steps {
            let before = served_bytes(&site);
            let said = resize(&site, &["disk", wanted]).success();
            let expected = format!("Disk disk has grown from {before} to {bytes} bytes\n");
            assert_eq!(said, expected);
            assert_eq!(served_bytes(&site), bytes);
            assert_eq!(length(&site.image("disk")), bytes);
            // A new client is told of it, and one that was there may use it.
            assert_eq!(site.connect("disk").size_bytes(), bytes);
            size_bytes.store(bytes, Ordering::Release);
            idle.read(bytes - 512, 512).unwrap();
            assert_eq!(refused(idle.write(bytes - 512, &[1; 1024])), ENOSPC);
            assert_eq!(refused(idle.trim(bytes, 512)), EINVAL);
            assert_eq!(refused(idle.read(bytes - 512, 1024).map(drop)), EINVAL);
        }
        // Some requests more, with the whole disk to choose from.
        let begin = Instant::now();
        while begin.elapsed() < Duration::from_millis(500) {
            idle.flush().unwrap();
        }
        stop.store(true, Ordering::Release);
        writer.join().unwrap()
    });
    assert!(behind > 0, "the writer never wrote behind the old end");
    let mut client = site.connect("disk");
    for offset in (0..400 * MIB).step_by(MIB as usize) {
        let read = client.read(offset, MIB as u32).unwrap();
        model.check(offset, &read).unwrap();
    }
    let verify = Command::new(program("tracker"))
        .args(["journal", "verify"])
        .arg(site.journal("disk"))
        .stdout(Stdio::null())
        .status();
    assert!(verify.unwrap().success());
    tracker.stop();
}

#[test]
fn block_status_knows_what_is_new() {
    let site = Site::new(&[("disk", ODD)]);
    let tracker = site.start_tracker();
    site.protect();
    let shipper = site.start_shipper();
    committed_cut(&site);
    let contexts = ["base:allocation", "tidemark:dirty"];
    let mut client = ChunkClient::connect(&site.socket(), "disk", true, &contexts).unwrap();
    assert_eq!(client.status("tidemark:dirty", 0, ODD), [(ODD, 0)]);
    resize(&site, &["disk", "64MiB"]).success();
    let end = 64 * MIB;
    // The block in which the old end lies has changed as well.
    let changed = ODD / 4096 * 4096;
    let expected = [(changed, 0), (end - changed, 1)];
    assert_eq!(client.status("tidemark:dirty", 0, end), expected);
    client.write(end - 4096, &[7; 4096]);
    let hole = client.status("base:allocation", ODD + 4096, end - ODD - 4096);
    assert_eq!(hole.last().unwrap().1, 0, "what was written is data");
    assert_ne!(hole.first().unwrap().1, 0, "what was not is a hole");
    committed_cut(&site);
    assert_eq!(client.status("tidemark:dirty", 0, end), [(end, 0)]);
    shipper.stop();
    tracker.stop();
}

/// A protected disk of random bytes with one recovery point; tracker and shipper run.
struct Protected {
    site: Site,
    tracker: Daemon,
    shipper: Daemon,
    client: Client,
    random: Random,
    first: String,
    /// The disk as it was at the first point.
    copy: std::path::PathBuf,
}

fn protected(test: &str) -> Protected {
    let mut site = Site::new(&[("disk", ODD)]);
    site.codec = "none".to_owned();
    let mut random = Random::from_environment(test);
    let tracker = site.start_tracker();
    let mut client = site.connect("disk");
    client.write(0, &random.bytes(ODD as usize)).unwrap();
    site.protect();
    let shipper = site.start_shipper();
    committed_cut(&site);
    let first = site.points().pop().unwrap();
    let copy = site.path("copy");
    fs::copy(site.image("disk"), &copy).unwrap();
    Protected {
        site,
        tracker,
        shipper,
        client,
        random,
        first,
        copy,
    }
}

#[test]
fn points_before_a_growth_and_after_it_are_restored_as_they_were() {
    let mut world = protected("points");
    let site = &world.site;
    // The file has more than zeroes behind the old end, as a device may have.
    append(&site.image("disk"), &world.random.bytes(5 * MIB as usize));
    let before = bytes_read(site);
    let said = resize(site, &["disk"]).success();
    let bytes = ODD + 5 * MIB;
    assert!(said.contains(&format!("to {bytes} bytes")), "{said}");
    let second = site.cut();
    let read = bytes_read(site) - before;
    let new = 5 * MIB..5 * MIB + 64 * 1024;
    assert!(
        new.contains(&read),
        "{read} bytes were read for {}",
        5 * MIB
    );
    site.check_restore(&second, &site.image("disk"));
    let at_second = site.path("at-second");
    fs::copy(site.image("disk"), &at_second).unwrap();
    // Growth and writes, and nothing of them is in the points before.
    resize(site, &["disk", "+7MiB"]).success();
    let end = ODD + 12 * MIB;
    world.client.write(end - 512, &[9; 512]).unwrap();
    world
        .client
        .write(ODD - 512, &world.random.bytes(1024))
        .unwrap();
    world.client.trim(MIB, MIB as u32).unwrap();
    let third = site.cut();
    site.check_restore(&third, &site.image("disk"));
    site.check_restore(&second, &at_second);
    site.check_restore(&world.first, &world.copy);
    assert_eq!(length(&world.copy), ODD);
    let status = await_status(site, "a status", |status| !status.is_null());
    assert_eq!(status["disks"][0]["size_bytes"].as_u64(), Some(end));
    // Nothing is new after a restart of both, and nothing is read again.
    world.tracker.stop();
    world.shipper.stop();
    let tracker = site.start_tracker();
    let shipper = site.start_shipper();
    let fourth = site.cut();
    assert!(bytes_read(site) < MIB, "it was scanned again");
    site.check_restore(&fourth, &site.image("disk"));
    site.shipper(&["verify", "--data"]).success();
    shipper.stop();
    tracker.stop();
}

#[test]
fn a_growth_that_the_shipper_did_not_see_costs_no_scan() {
    let mut world = protected("unseen");
    let site = &world.site;
    world.shipper.stop();
    resize(site, &["disk", "32MiB"]).success();
    let bytes = world.random.bytes(MIB as usize);
    world.client.write(32 * MIB - MIB, &bytes).unwrap();
    let shipper = site.start_shipper();
    let second = site.cut();
    assert!(bytes_read(site) < 2 * MIB, "every block was looked at");
    site.check_restore(&second, &site.image("disk"));
    site.check_restore(&world.first, &world.copy);
    shipper.stop();
    world.tracker.stop();
}

#[test]
fn a_first_copy_under_way_ends_right() {
    first_copy(false);
}

#[test]
fn a_first_copy_that_is_killed_goes_on_after_a_growth() {
    first_copy(true);
}

/// The disk grows while its first copy is made, or between two parts of it.
fn first_copy(killed: bool) {
    let mut site = Site::new(&[("disk", 256 * MIB)]);
    site.codec = "none".to_owned();
    let mut random = Random::from_environment("first_copy");
    let tracker = site.start_tracker();
    let mut client = site.connect("disk");
    for offset in (0..256 * MIB).step_by(MIB as usize) {
        client.write(offset, &random.bytes(MIB as usize)).unwrap();
    }
    site.protect();
    let shipper = site.start_shipper();
    let scanned = |status: &Value| status["disks"][0]["scanned_blocks"].as_u64() > Some(0);
    await_status(&site, "a part scanned", scanned);
    let shipper = if killed {
        shipper.kill();
        None
    } else {
        Some(shipper)
    };
    append(&site.image("disk"), &random.bytes(2 * MIB as usize));
    resize(&site, &["disk"]).success();
    resize(&site, &["disk", "300MiB"]).success();
    client.write(300 * MIB - 4096, &random.bytes(4096)).unwrap();
    let shipper = shipper.unwrap_or_else(|| site.start_shipper());
    let point = site.cut();
    let read = bytes_read(&site);
    let most = if killed { 230 * MIB } else { 259 * MIB };
    assert!(read < most, "it began anew: {} MiB read", read / MIB);
    site.check_restore(&point, &site.image("disk"));
    shipper.stop();
    tracker.stop();
}

#[test]
fn an_image_that_grew_while_no_tracker_served_it_is_noted_and_replicated() {
    let mut world = protected("offline");
    let site = &world.site;
    for (round, killed) in [false, true].into_iter().enumerate() {
        if killed {
            world.tracker.kill();
        } else {
            world.tracker.stop();
        }
        append(&site.image("disk"), &world.random.bytes(3 * 512));
        let bytes = ODD + (round as u64 + 1) * 20 * MIB;
        set_length(&site.image("disk"), bytes);
        world.tracker = site.start_tracker();
        world.tracker.await_text("the disk has grown from");
        assert_eq!(served_bytes(site), bytes);
        let point = cut_after_restart(site);
        site.check_restore(&point, &site.image("disk"));
    }
    // Somebody else has written to it, so it may be compared at each start.
    let read = bytes_read(site);
    assert!(read < 3 * ODD + MIB, "it was scanned again: {read} bytes");
    site.check_restore(&world.first, &world.copy);
    world.shipper.stop();
    world.tracker.stop();
}

#[test]
fn a_tracker_that_is_killed_while_a_disk_grows_forgets_nothing() {
    let mut world = protected("killed");
    let mut grown = 0;
    for round in 0..12 {
        let site = &world.site;
        let before = length(&site.image("disk"));
        // Some steps stay in the room of the journal, some do not.
        let more = world.random.between(1, 40) * MIB + 512;
        let mut command = resize_command(site, &["disk", &format!("+{more}")]);
        let mut asked = command
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // The kill comes after so many writes, or after the file is longer and some more.
        let limit = world.random.below(40);
        let mut client = site.connect("disk");
        for _ in 0..limit {
            let offset = world.random.below(before - 4096);
            client.write(offset, &world.random.bytes(4096)).unwrap();
            if round % 2 == 0 && length(&site.image("disk")) > before {
                break;
            }
        }
        world.tracker.kill();
        asked.wait().unwrap();
        world.tracker = site.start_tracker();
        let bytes = served_bytes(site);
        assert_eq!(bytes, length(&site.image("disk")));
        assert!([before, before + more].contains(&bytes), "{bytes} bytes");
        grown += u64::from(bytes > before);
        world.client = site.connect("disk");
        world.client.write(bytes - 512, &[3; 512]).unwrap();
        let point = cut_after_restart(site);
        site.check_restore(&point, &site.image("disk"));
    }
    println!("{grown} of 12 had grown");
    let site = &world.site;
    let read = bytes_read(site);
    assert!(read < 2 * ODD, "a kill cost a scan: {read} bytes");
    site.check_restore(&world.first, &world.copy);
    world.shipper.stop();
    world.tracker.stop();
}

#[test]
fn what_cannot_be_is_refused_and_leaves_the_disk_alone() {
    let mut site = Site::new(&[("disk", ODD), ("other", MIB)]);
    let tracker = site.start_tracker();
    let table: [(&[&str], &str); 9] = [
        (&["disk", "8MiB"], "does not shrink"),
        (&["disk", "0"], "does not shrink"),
        (&["disk", "8388609512"], "multiple of 512"),
        (&["disk", "+1"], "multiple of 512"),
        (&["disk", "8PiB"], "unknown unit"),
        (&["disk", "5000TiB"], "at most"),
        (&["disk", "+"], "not a size"),
        (&["nobody", "+1MiB"], "disk, other"),
        (&[], "required"),
    ];
    for (arguments, says) in table {
        let said = resize(&site, arguments).failure();
        assert!(said.contains(says), "{arguments:?}: {said}");
    }
    set_length(&site.image("disk"), ODD + 4 * MIB);
    let said = resize(&site, &["disk", "+1MiB"]).failure();
    assert!(said.contains("leave the size out"), "{said}");
    set_length(&site.image("disk"), ODD);
    for arguments in [&["disk"][..], &["disk", "+0"], &["disk", &ODD.to_string()]] {
        let said = resize(&site, arguments).success();
        assert_eq!(said, format!("Disk disk has {ODD} bytes already\n"));
    }
    assert_eq!(length(&site.image("disk")), ODD);
    assert_eq!(served_bytes(&site), ODD);
    set_length(&site.image("other"), 512);
    let said = resize(&site, &["other"]).failure();
    assert!(said.contains("cut short"), "{said}");
    set_length(&site.image("other"), MIB);
    tracker.stop();
    for (argument, says) in [
        ("--no-journal", "is not tracked"),
        ("--read-only", "read-only"),
    ] {
        site.tracker_arguments = vec![argument.to_owned()];
        let tracker = site.start_tracker();
        let said = resize(&site, &["disk", "+1MiB"]).failure();
        assert!(said.contains(says), "{argument}: {said}");
        assert_eq!(length(&site.image("disk")), ODD);
        tracker.stop();
    }
    let said = resize(&site, &["disk"]).failure();
    assert!(said.contains("is it running"), "{said}");
}

#[test]
fn a_device_is_taken_with_the_size_that_it_has_by_now() {
    if !nix::unistd::geteuid().is_root() || !Path::new("/dev/loop-control").exists() {
        println!("not run: loop devices need root");
        return;
    }
    let mut site = Site::new(&[("disk", MIB)]);
    let mut random = Random::from_environment("device");
    let backing = site.path("backing");
    fs::write(&backing, random.bytes(8 * MIB as usize)).unwrap();
    let device = LoopDevice::over(&backing, 512);
    fs::remove_file(site.image("disk")).unwrap();
    std::os::unix::fs::symlink(&device.path, site.image("disk")).unwrap();
    let journals = site.path("journals");
    fs::create_dir(&journals).unwrap();
    site.tracker_arguments = vec!["--journal-dir".to_owned(), journals.display().to_string()];
    let tracker = site.start_tracker();
    let mut client = site.connect("disk");
    site.protect();
    let shipper = site.start_shipper();
    let first = site.cut();
    let copy = site.path("copy");
    fs::copy(&backing, &copy).unwrap();
    let said = resize(&site, &["disk", "+4MiB"]).failure();
    assert!(said.contains("grow the device first"), "{said}");
    append(&backing, &random.bytes(4 * MIB as usize));
    let said = resize(&site, &["disk"]).success();
    assert!(said.contains("already"), "{said}");
    device.refresh();
    let before = bytes_read(&site);
    resize(&site, &["disk", "12MiB"]).success();
    client.write(12 * MIB - 4096, &random.bytes(4096)).unwrap();
    client.write(0, &random.bytes(4096)).unwrap();
    client.flush().unwrap();
    let second = site.cut();
    assert_eq!(bytes_read(&site) - before, 4 * MIB + 4096);
    site.check_restore(&first, &copy);
    shipper.stop();
    tracker.stop();
    // What the file says is what the device was told, once nobody has it open.
    drop(device);
    site.check_restore(&second, &backing);
}
