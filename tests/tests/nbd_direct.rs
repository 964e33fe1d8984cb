//! A disk past the page cache: the block size that clients are told and held to, the same data for
//! every client, and tracking as ever.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;

use tests::loop_device::LoopDevice;
use tests::model::{Change, Model, pattern};
use tests::nbd::{Client, Failure, Raw, command, errno, info_request, option};
use tests::process::{Daemon, require, run};
use tests::seed::Random;
use tests::site::{Site, assert_same};

const MIB: u64 = 1 << 20;
const SECTOR: u64 = 512;

/// A tracker with direct I/O; `None` where the file system has none.
fn start(site: &mut Site) -> Option<Daemon> {
    let path = site.path("probe");
    fs::write(&path, [0; 4096]).unwrap();
    let dd = run(Command::new("dd")
        .arg(format!("if={}", path.display()))
        .args(["iflag=direct", "bs=4096", "count=1", "of=/dev/null"]));
    if !dd.status.success() {
        println!(
            "not run: the file system of {} has no direct I/O",
            path.display()
        );
        return None;
    }
    site.tracker_arguments.push("--direct".to_owned());
    Some(site.start_tracker())
}

fn block_sizes(site: &Site) -> [u32; 3] {
    let mut raw = Raw::unix(&site.socket()).unwrap();
    raw.greet(3).unwrap();
    raw.block_sizes("disk").unwrap()
}

#[track_caller]
fn invalid(result: Result<impl std::fmt::Debug, Failure>) {
    match result {
        Err(Failure::Refused(error)) => assert_eq!(error, errno::EINVAL),
        other => panic!("EINVAL was expected: {other:?}"),
    }
}

/// Descriptors of a process that stand for a file and leave the page cache out.
fn direct_descriptors(process: u32, file: &Path) -> usize {
    const O_DIRECT: u32 = 0o40000;
    let folder = format!("/proc/{process}/fd");
    let is_direct = |entry: &fs::DirEntry| {
        let target = fs::read_link(entry.path()).unwrap_or_default();
        let number = entry.file_name().into_string().unwrap();
        let info = fs::read_to_string(format!("/proc/{process}/fdinfo/{number}"));
        let info = info.unwrap_or_default();
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
        let flags = flags.and_then(|flags| u32::from_str_radix(flags.trim(), 8).ok());
        target == file && flags.is_some_and(|flags| flags & O_DIRECT != 0)
    };
    fs::read_dir(folder)
        .unwrap()
        .flatten()
        .filter(is_direct)
        .count()
}

#[test]
fn direct_io_tells_and_enforces_its_block_size() {
    let mut site = Site::new(&[("disk", 16 * MIB)]);
    let Some(tracker) = start(&mut site) else {
        return;
    };
    let image = site.image("disk").canonicalize().unwrap();
    assert_eq!(direct_descriptors(tracker.pid(), &image), 1);
    let [minimum, preferred, _] = block_sizes(&site);
    assert!(minimum.is_power_of_two() && (512..=4096).contains(&minimum));
    assert_eq!(preferred, 4096);
    let minimum = u64::from(minimum);
    let mut client = site.connect("disk");
    let half = (minimum / 2) as u32;
    for (offset, length) in [(0, half), (minimum / 2, half * 2), (1, 4096), (0, 4097)] {
        invalid(client.read(offset, length));
        invalid(client.write(offset, &vec![1; length as usize]));
        invalid(client.trim(offset, length));
        invalid(client.zero(offset, length));
        invalid(client.call(0, command::CACHE, offset, length, &[]));
    }
    // None of them did anything, and the connection is good for others.
    let data = pattern(7, 5 * minimum, minimum);
    client.write(5 * minimum, &data).unwrap();
    client.flush().unwrap();
    assert_eq!(client.read(5 * minimum, minimum as u32).unwrap(), data);
    assert_eq!(
        client.read(0, minimum as u32).unwrap(),
        vec![0; minimum as usize]
    );
    tracker.stop();
}

/// One random request of an aligned range, carried out on the disk and on the model.
fn step(random: &mut Random, client: &mut Client, model: &mut Model, align: u64, tag: u32) {
    let offset = random.below((model.size_bytes() - MIB) / align) * align;
    let length = (1 + random.below(MIB / align)) * align;
    let change = match random.below(8) {
        0 => Change::Zero,
        1 => Change::Trim,
        2 | 3 => {
            let found = client.read(offset, length as u32).unwrap();
            return model.check(offset, &found).unwrap();
        }
        _ => Change::Write(tag),
    };
    model.change(client, change, offset, length).unwrap();
}

#[test]
fn direct_io_follows_a_model_and_is_replicated() {
    let mut random = Random::from_environment("nbd_direct");
    // Not a whole number of blocks.
    let size = 16 * MIB + 4096 + SECTOR;
    let mut site = Site::new(&[("disk", size)]);
    let Some(tracker) = start(&mut site) else {
        return;
    };
    let align = u64::from(block_sizes(&site)[0]);
    if !size.is_multiple_of(align) {
        println!("not run: sectors of {align} bytes");
        return;
    }
    site.protect();
    let shipper = site.start_shipper();
    let mut model = Model::new(size);
    let mut clients: Vec<Client> = (0..3).map(|_| site.connect("disk")).collect();
    let mut last = String::new();
    for round in 0..3 {
        for tag in 1..150 {
            let client = &mut clients[random.below(3) as usize];
            step(&mut random, client, &mut model, align, round * 1000 + tag);
        }
        last = site.cut();
    }
    for mut client in clients {
        client.flush().unwrap();
        client.disconnect().unwrap();
    }
    shipper.stop();
    tracker.stop();
    let restored = site.restore(&last, "disk", "restored.img");
    assert_same(&site.image("disk"), &restored);
    let found = fs::read(&restored).unwrap();
    model.check(0, &found).unwrap();
}

#[test]
fn direct_io_serves_other_clients() {
    require(&["nbdcopy", "qemu-img"]);
    let mut site = Site::new(&[("disk", 16 * MIB)]);
    let Some(tracker) = start(&mut site) else {
        return;
    };
    let source = site.path("source.img");
    fs::write(&source, Random::new(3).bytes(16 * MIB as usize)).unwrap();
    run(Command::new("nbdcopy").arg(&source).arg(site.uri("disk"))).success();
    run(Command::new("qemu-img")
        .args(["compare", "-f", "raw", "-F", "raw"])
        .arg(&source)
        .arg(site.uri("disk")))
    .success();
    tracker.stop();
    assert_same(&source, &site.image("disk"));
}

#[test]
fn a_device_of_large_sectors_insists_on_its_block_size() {
    if !nix::unistd::geteuid().is_root() {
        println!("not run: a loop device needs root");
        return;
    }
    let mut site = Site::new(&[]);
    let file = site.path("device.img");
    File::create(&file).unwrap().set_len(16 * MIB).unwrap();
    let device = LoopDevice::over(&file, 4096);
    let disk = format!("disk={}", device.path);
    let journals = site.root().display().to_string();
    for argument in ["--direct", "--disk", &disk, "--journal-dir", &journals] {
        site.tracker_arguments.push(argument.to_owned());
    }
    let tracker = site.start_tracker();
    assert_eq!(block_sizes(&site)[0], 4096);
    let mut raw = Raw::unix(&site.socket()).unwrap();
    raw.greet(3).unwrap();
    // Whoever does not ask would send requests of 512 bytes.
    let replies = raw.ask(option::GO, &info_request("disk", &[])).unwrap();
    assert_eq!(replies.last().unwrap().0, option::ERR_BLOCK_SIZE_REQD);
    let replies = raw.ask(option::GO, &info_request("disk", &[3])).unwrap();
    assert_eq!(replies.last().unwrap().0, option::ACK);
    let mut client = Client::after_negotiation(raw, 16 * MIB, 0);
    invalid(client.read(512, 512));
    let data = pattern(9, 8192, 4096);
    client.write(8192, &data).unwrap();
    assert_eq!(client.read(8192, 4096).unwrap(), data);
    client.disconnect().unwrap();
    // An export's name alone cannot be answered with a block size.
    let mut raw = Raw::unix(&site.socket()).unwrap();
    raw.greet(3).unwrap();
    raw.send_option(option::EXPORT_NAME, b"disk").unwrap();
    assert!(raw.until_closed().unwrap().is_empty());
    tracker.stop();
}
