//! What a status tells of the rings: how full, how fast, and how long it would go on.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;
use tests::process::{program, run};
use tests::site::Site;
use tracker::control::client::ControlClient;
use tracker::control::protocol::CaptureOutcome;
use tracker::extent::Epoch;

const BLOCK_BYTES: u64 = 4096;
const DISK_BLOCKS: u64 = 1 << 20;
/// Records of the smallest ring.
const CAPACITY: u64 = 512;
const PATIENCE: Duration = Duration::from_secs(60);

fn disk(site: &Site) -> Value {
    site.tracker_status()["machine"]["disks"][0].clone()
}

fn number(status: &Value, field: &str) -> u64 {
    let value = status[field].as_u64();
    value.unwrap_or_else(|| panic!("no {field} in {status:#}"))
}

fn small_ring() -> Site {
    let mut site = Site::new(&[("disk", DISK_BLOCKS * BLOCK_BYTES)]);
    site.tracker_arguments = vec!["--ring-size".to_owned(), "16KiB".to_owned()];
    site
}

#[test]
fn a_busy_ring_tells_how_fast_it_fills_and_an_idle_one_does_not() {
    let site = small_ring();
    let tracker = site.start_tracker();
    let status = disk(&site);
    assert_eq!(number(&status, "ring_fill_percent"), 0);
    assert_eq!(number(&status, "records_per_second"), 0);
    assert_eq!(status["ring_full_in_seconds"], Value::Null);
    let mut client = site.connect("disk");
    let (begin, mut written) = (Instant::now(), 0);
    // Blocks of which each needs a record, until they have been folded for a while.
    let status = loop {
        for _ in 0..50 {
            let block = written * 7 % DISK_BLOCKS;
            client
                .trim(block * BLOCK_BYTES, BLOCK_BYTES as u32)
                .unwrap();
            written += 1;
        }
        let status = disk(&site);
        let folded = number(&status, "folded_per_second");
        if folded > 0 && begin.elapsed() > Duration::from_secs(2) {
            break status;
        }
        assert!(begin.elapsed() < PATIENCE, "nothing is folded: {status:#}");
        assert!(written < DISK_BLOCKS, "the blocks are used up");
    };
    let rate = number(&status, "records_per_second");
    // The rate is that of the last seconds, all of which were busy ones.
    let most = number(&status, "records_written");
    assert!((1..=most).contains(&rate), "{status:#}");
    let used = number(&status, "ring_used_records");
    assert_eq!(number(&status, "ring_fill_percent"), used * 100 / CAPACITY);
    let expected = (CAPACITY - used) / rate;
    assert_eq!(number(&status, "ring_full_in_seconds"), expected);
    let mut command = Command::new(program("tracker"));
    command.arg("status").arg("--control").arg(site.control());
    let text = run(&mut command).success();
    assert!(text.contains("records a second"), "{text}");
    assert!(
        text.contains("without folding the ring is full in"),
        "{text}"
    );
    let begin = Instant::now();
    while disk(&site)["ring_full_in_seconds"] != Value::Null {
        assert!(begin.elapsed() < PATIENCE, "it is idle: {:#}", disk(&site));
    }
    assert_eq!(number(&disk(&site), "records_per_second"), 0);
    tracker.stop();
}

#[test]
fn epochs_that_are_merged_are_counted() {
    let site = small_ring();
    let tracker = site.start_tracker();
    let mut control = ControlClient::connect(&site.control()).unwrap();
    let merged = || site.tracker_status()["machine"]["epochs_merged"].as_u64();
    let mut cut = |outcome| {
        let epoch = control.cut(Epoch::ZERO).unwrap();
        control.capture_end(epoch, outcome).unwrap();
        epoch
    };
    let sealed = cut(CaptureOutcome::Sealed);
    assert_eq!(merged(), Some(0));
    let given_up = cut(CaptureOutcome::Abandoned);
    assert!(given_up > sealed);
    assert_eq!(merged(), Some(1));
    // The sealed one waits, and the spool is lost.
    control.revert().unwrap();
    assert_eq!(merged(), Some(2));
    // Said once more, both change nothing.
    control.revert().unwrap();
    assert_eq!(merged(), Some(2));
    tracker.stop();
}
