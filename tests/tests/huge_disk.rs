//! A sparse disk of 64 TiB is served, protected and restored within the limits of memory and time.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tests::nbd::Client;
use tests::seed::Random;
use tests::site::{Site, assert_same_sparse};

const MIB: u64 = 1 << 20;
const TIB: u64 = 1 << 40;
const SIZE: u64 = 64 * TIB;
/// The range at either end of the disk that is written to.
const RANGE: u64 = TIB / 4;
/// 64 MiB, and 80 MiB per TiB of range written: twice a quarter of one.
const TRACKER_BYTES_MAX: u64 = (64 + 80 / 2) * MIB;
const SHIPPER_BYTES_MAX: u64 = 512 * MIB;
const START_MAX: Duration = Duration::from_secs(2);

/// A folder whose file system takes files of this size: ext4 ends at 16 TiB, tmpfs and xfs do not.
fn roomy_folder() -> PathBuf {
    let folders = [
        std::env::temp_dir(),
        PathBuf::from("/dev/shm"),
        PathBuf::from("/var/tmp"),
    ];
    folders
        .into_iter()
        .find(|folder| takes(folder))
        .expect("a file system that takes a sparse file of 64 TiB: tmpfs, xfs or btrfs")
}

fn takes(folder: &Path) -> bool {
    let Ok(probe) = tempfile::tempfile_in(folder) else {
        return false;
    };
    probe.set_len(SIZE).is_ok()
}

fn write_somewhere(client: &mut Client, random: &mut Random, count: u64) {
    for index in 0..count {
        let start = if index % 2 == 0 { 0 } else { SIZE - RANGE };
        let offset = start + random.below(RANGE / 4096) * 4096;
        client.write(offset, &random.bytes(4096)).unwrap();
    }
}

#[test]
fn served_protected_and_restored() {
    let site = Site::new_in(&roomy_folder(), &[("huge", SIZE)]);
    let mut random = Random::from_environment("huge_disk");
    let tracker = site.start_tracker();
    assert!(
        tracker.start_time() < START_MAX,
        "{:?}",
        tracker.start_time()
    );
    let mut client = site.connect("huge");
    assert_eq!(client.size_bytes(), SIZE);
    write_somewhere(&mut client, &mut random, 4000);
    client.write(SIZE - 4096, &[7; 4096]).unwrap();
    client.flush().unwrap();

    site.protect();
    let shipper = site.start_shipper();
    let first = site.cut();
    let copy = site.restore(&first, "huge", "restored");
    assert_same_sparse(&site.image("huge"), &copy);
    std::fs::remove_file(copy).unwrap();

    write_somewhere(&mut client, &mut random, 4000);
    client.trim(SIZE - RANGE, 1 << 30).unwrap();
    let second = site.cut();
    assert!(second > first);
    assert_same_sparse(
        &site.image("huge"),
        &site.restore(&second, "huge", "restored"),
    );

    let used = tracker.memory_bytes("VmHWM");
    assert!(
        used < TRACKER_BYTES_MAX,
        "the tracker used {} MiB",
        used / MIB
    );
    let used = shipper.memory_bytes("VmHWM");
    assert!(
        used < SHIPPER_BYTES_MAX,
        "the shipper used {} MiB",
        used / MIB
    );
    check_restart(&site, tracker, client);
}

/// After SIGKILL the tracker starts as fast, and remembers.
fn check_restart(site: &Site, tracker: tests::process::Daemon, mut client: Client) {
    client.write(33 * TIB, &[1; 4096]).unwrap();
    tracker.kill();
    let tracker = site.start_tracker();
    assert!(
        tracker.start_time() < START_MAX,
        "{:?}",
        tracker.start_time()
    );
    let point = site.cut();
    let restored = site.restore(&point, "huge", "restored-again");
    assert_same_sparse(&site.image("huge"), &restored);
    let file = File::open(&restored).unwrap();
    let mut block = [0; 4096];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut block, 33 * TIB).unwrap();
    assert_eq!(block, [1; 4096]);
}
