//! `tracker attach` as far as it goes without a kernel that has nbd: its client against the tracker,
//! and its errors. `guest` has the rest.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use tests::process::{program, run};
use tests::site::Site;
use tracker::error::{Error, ErrorKind};
use tracker::nbd::client::{ExportInfo, open};
use tracker::nbd::wire::transmission_flags as flags;

const MIB: u64 = 1 << 20;

fn choose(socket: &Path, name: &str) -> Result<ExportInfo, Error> {
    open(socket, name, Instant::now() + Duration::from_secs(10)).map(|(_, info)| info)
}

#[test]
fn the_client_sees_what_the_tracker_offers() {
    let site = Site::new(&[("first", MIB), ("second", 3 * MIB)]);
    let _tracker = site.start_tracker();
    let info = choose(&site.socket(), "second").unwrap();
    assert_eq!((info.size_bytes, info.block_size_minimum), (3 * MIB, 1));
    assert!(info.has(flags::SEND_FLUSH | flags::SEND_FUA | flags::SEND_TRIM));
    assert!(info.has(flags::CAN_MULTI_CONN) && !info.has(flags::READ_ONLY));
}

#[test]
fn the_client_says_what_is_wrong() {
    let site = Site::new(&[("first", MIB), ("second", MIB)]);
    let error = choose(&site.socket(), "first").unwrap_err();
    assert!(error.chain().contains("is the tracker running"), "{error}");
    let _tracker = site.start_tracker();
    let error = choose(&site.socket(), "third").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Missing);
    assert!(error.chain().contains("no export \"third\""), "{error}");
    let error = choose(&site.socket(), "").unwrap_err();
    assert!(error.chain().contains("--name"), "{error}");
    // Another protocol, on which the server waits for the client to speak first.
    let soon = Instant::now() + Duration::from_millis(300);
    let error = open(&site.control(), "first", soon).unwrap_err();
    assert!(error.chain().starts_with("Cannot negotiate"), "{error}");
}

fn attach(arguments: &[&str]) -> tests::process::Outcome {
    run(Command::new(program("tracker"))
        .args(["attach", "--socket", "/nonexistent"])
        .args(arguments))
}

#[test]
fn wrong_arguments_are_refused() {
    let error = attach(&["/dev/null"]).failure();
    assert!(error.contains("/dev/null is no nbd device"), "{error}");
    let error = attach(&["/dev/nbd0", "--timeout", "0"]).failure();
    assert!(error.contains("is not between 1 s and 24 h"), "{error}");
    let error = attach(&["/dev/nbd0", "--block-size", "100"]).failure();
    assert!(error.contains("512"), "{error}");
}

#[test]
fn without_the_module_both_commands_name_it() {
    if Path::new("/sys/module/nbd").exists() {
        eprintln!("left out: this kernel has nbd");
        return;
    }
    let error = attach(&["/dev/nbd0"]).failure();
    assert!(error.contains("`modprobe nbd`"), "{error}");
    // The command that waits for the background passes its failure on.
    let error = attach(&["/dev/nbd0", "--background"]).failure();
    assert!(error.contains("`modprobe nbd`"), "{error}");
    let error = run(Command::new(program("tracker")).args(["detach", "/dev/nbd0"])).failure();
    assert!(error.contains("`modprobe nbd`"), "{error}");
}
