//! A file system without room under disk and journal: the guest is told what the disk says, and the journal
//! goes on in the room that it has.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::unistd::geteuid;
use serde_json::Value;
use tests::nbd::{Client, Failure, errno};
use tests::process::{program, run};
use tests::seed::Random;
use tests::site::{Site, assert_same};

const MIB: u64 = 1 << 20;
const BLOCK_BYTES: u64 = 4096;
/// Sparse, and larger than the file system.
const DISK_BYTES: u64 = 64 * MIB;
const STORAGE_MIB: u64 = 24;
/// What is freed in the end.
const FILLER_BYTES: usize = 4 << 20;
const PATIENCE: Duration = Duration::from_secs(60);

/// A mount that goes away with its value.
struct Mount(PathBuf);

impl Mount {
    fn new(folder: &Path, arguments: &[&str]) -> Self {
        fs::create_dir(folder).unwrap();
        run(Command::new("mount").args(arguments).arg(folder)).success();
        Self(folder.to_owned())
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let mut umount = Command::new("umount");
        let _not_there = umount.arg("--lazy").arg(&self.0).status();
    }
}

fn disk_status(site: &Site) -> Value {
    site.tracker_status()["machine"]["disks"][0].clone()
}

/// Writes other bytes to blocks that have room.
fn rewrite(client: &mut Client, blocks: &[u64], random: &mut Random) {
    for block in blocks {
        let bytes = random.bytes(BLOCK_BYTES as usize);
        client.write(block * BLOCK_BYTES, &bytes).unwrap();
    }
    client.flush().unwrap();
}

/// A recovery point of the disk as it is.
fn check_point(site: &Site) {
    let point = site.cut();
    let restored = site.restore(&point, "disk", "restored");
    assert_same(&site.image("disk"), &restored);
    fs::remove_file(restored).unwrap();
}

/// Writes one block after the other until there is no room; those that were written.
fn fill(client: &mut Client, random: &mut Random) -> Vec<u64> {
    let mut written = Vec::new();
    for block in 0..DISK_BYTES / BLOCK_BYTES {
        let bytes = random.bytes(BLOCK_BYTES as usize);
        match client.write(block * BLOCK_BYTES, &bytes) {
            Ok(()) => written.push(block),
            Err(Failure::Refused(error)) => {
                assert_eq!(error, errno::ENOSPC);
                return written;
            }
            Err(lost) => panic!("{lost:?}"),
        }
    }
    panic!("there is room for all");
}

/// On a file system that is mounted here.
fn goes_on_without_room(storage: &Path, random: &mut Random) {
    let filler = storage.join("filler");
    fs::write(&filler, vec![1; FILLER_BYTES]).unwrap();
    let mut site = Site::new_on(storage, &[("disk", DISK_BYTES)]);
    let small = ["--ring-size", "16KiB", "--intent-cap", "64MiB"];
    site.tracker_arguments = small.map(str::to_owned).into();
    // The shipper has room, and so have the blocks that are kept for it.
    fs::create_dir(site.path("elsewhere")).unwrap();
    let kept = site.path("elsewhere").to_str().unwrap().to_owned();
    site.tracker_arguments
        .extend(["--preserve-dir".to_owned(), kept]);
    symlink(site.path("elsewhere"), site.state()).unwrap();
    let tracker = site.start_tracker();
    site.protect();
    let shipper = site.start_shipper();
    check_point(&site);
    let mut client = site.connect("disk");
    let written = fill(&mut client, random);
    assert!(written.len() > 1000, "{} blocks", written.len());
    // More changes than the ring has records, with and without a recovery point between.
    for _ in 0..2 {
        rewrite(&mut client, &written, random);
        let status = disk_status(&site);
        assert_eq!(status["power_cut_unsafe"], false, "{status:#}");
        assert_eq!(status["journal_replacements"], 0, "{status:#}");
        check_point(&site);
    }
    fs::remove_file(filler).unwrap();
    let folds = disk_status(&site)["folds"].as_u64();
    rewrite(&mut client, &written, random);
    let deadline = Instant::now() + PATIENCE;
    while disk_status(&site)["folds"].as_u64() == folds {
        assert!(Instant::now() < deadline, "{:#}", disk_status(&site));
    }
    // What was refused can be written now.
    rewrite(&mut client, &[written.last().unwrap() + 1], random);
    check_point(&site);
    client.disconnect().unwrap();
    shipper.stop();
    tracker.stop();
    let mut verify = Command::new(program("tracker"));
    run(verify.args(["journal", "verify"]).arg(site.journal("disk"))).success();
}

#[test]
fn a_journal_goes_on_in_a_full_file_system() {
    if !geteuid().is_root() {
        println!("not run: mounting needs root");
        return;
    }
    let mut random = Random::from_environment("full_file_system");
    let folder = tempfile::tempdir().unwrap();
    let size = format!("size={STORAGE_MIB}m");
    let memory = Mount::new(
        &folder.path().join("tmpfs"),
        &["-t", "tmpfs", "-o", &size, "none"],
    );
    goes_on_without_room(&memory.0, &mut random);
    drop(memory);
    if !Path::new("/dev/loop-control").exists() {
        println!("left out: there are no loop devices");
        return;
    }
    let image = folder.path().join("image");
    let file = File::create(&image).unwrap();
    file.set_len(STORAGE_MIB * MIB).unwrap();
    run(Command::new("/sbin/mkfs.ext4")
        .args(["-q", "-F"])
        .arg(&image))
    .success();
    let image = image.to_str().unwrap();
    let real = Mount::new(&folder.path().join("ext4"), &["-o", "loop", image]);
    goes_on_without_room(&real.0, &mut random);
}
