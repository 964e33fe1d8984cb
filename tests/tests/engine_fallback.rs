//! Machines where io_uring is forbidden, as in most containers: a seccomp filter stands between the
//! programs and the kernel.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::ops::RangeInclusive;
use std::process::Command;

use nix::errno::Errno;
use nix::libc::SYS_fdatasync;
use tests::nbd::{Client, Failure, command};
use tests::process::{Daemon, Outcome, program, require, run};
use tests::seed::Random;
use tests::site::{Site, assert_same};

const DISK_BYTES: u64 = 8 << 20;
/// Longest request of the random ones.
const LENGTH_MAX: u64 = 300 << 10;
/// Requests of each kind in flight at once.
const DEPTH: usize = 24;

/// Starts a program under a filter. Its arguments: an error, the first and the last number of the
/// system calls that get it for an answer, the program and its arguments. System calls of another
/// convention on the same machine, which a real filter must look at, are not made here.
const FILTER: &str = r#"
import ctypes, os, struct, sys
RETURN, ALLOW, ERRNO = 0x06, 0x7fff0000, 0x00050000
program = b"".join([
    struct.pack("HBBI", 0x20, 0, 0, 0),
    struct.pack("HBBI", 0x35, 0, 2, int(sys.argv[2])),
    struct.pack("HBBI", 0x25, 1, 0, int(sys.argv[3])),
    struct.pack("HBBI", RETURN, 0, 0, ERRNO | int(sys.argv[1])),
    struct.pack("HBBI", RETURN, 0, 0, ALLOW),
])
text = ctypes.create_string_buffer(program)
class Filter(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("text", ctypes.c_void_p)]
filter = Filter(len(program) // 8, ctypes.addressof(text))
libc = ctypes.CDLL(None, use_errno=True)
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
for call in [(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(filter), 0, 0)]:
    if libc.prctl(*call) != 0:
        sys.exit("no filter: " + os.strerror(ctypes.get_errno()))
os.execv(sys.argv[4], sys.argv[4:])
"#;

/// The three system calls of io_uring have the same numbers on every architecture.
const URING_CALLS: RangeInclusive<i64> = 425..=427;

/// The command as it runs where these system calls fail with this error.
fn without_calls(calls: RangeInclusive<i64>, error: Errno, inner: &Command) -> Command {
    require(&["python3"]);
    let mut command = Command::new("python3");
    command.arg("-c").arg(FILTER);
    let numbers = [error as i64, *calls.start(), *calls.end()];
    command.args(numbers.map(|number| number.to_string()));
    command.arg(inner.get_program()).args(inner.get_args());
    command
}

/// The command as it runs where io_uring fails: with EPERM, as the sysctl and the profiles of
/// containers have it, or with ENOSYS, as a kernel without io_uring.
fn without_uring(error: Errno, inner: &Command) -> Command {
    without_calls(URING_CALLS, error, inner)
}

/// A site whose tracker runs with this engine, whatever the environment says.
fn site_with(engine: &str) -> (Site, Command) {
    let site = Site::new(&[("disk", DISK_BYTES)]);
    let mut command = Command::new(program("tracker"));
    command
        .arg("serve")
        .arg("--disk")
        .arg(format!("disk={}", site.image("disk").display()));
    command.arg("--socket").arg(site.socket());
    command.args(["--engine", engine]);
    (site, command)
}

fn status_text(site: &Site) -> String {
    run(Command::new(program("tracker"))
        .args(["status", "--control"])
        .arg(site.control()))
    .success()
}

/// A range within the disk.
fn range(random: &mut Random) -> (u64, u32) {
    let offset = random.below(DISK_BYTES);
    let length = random.between(1, LENGTH_MAX).min(DISK_BYTES - offset);
    (offset, length as u32)
}

/// Writes that do not overlap are in flight together, then reads of anything: all must fit a model.
fn write_and_read(client: &mut Client, model: &mut [u8], random: &mut Random) {
    let lane = DISK_BYTES / DEPTH as u64;
    for number in 0..DEPTH as u64 {
        let length = random.between(1, LENGTH_MAX);
        let offset = number * lane + random.below(lane - length);
        let place = offset as usize..(offset + length) as usize;
        let flags = if random.chance(1, 3) { command::FUA } else { 0 };
        if random.chance(1, 4) {
            model[place].fill(0);
            client
                .submit(flags, command::WRITE_ZEROES, offset, length as u32, &[])
                .unwrap();
        } else {
            model[place.clone()].copy_from_slice(&random.bytes(length as usize));
            client
                .submit(flags, command::WRITE, offset, length as u32, &model[place])
                .unwrap();
        }
    }
    while client.in_flight() > 0 {
        assert_eq!(client.receive().unwrap().error, 0);
    }
    client.flush().unwrap();
    let mut asked = Vec::new();
    for _ in 0..DEPTH {
        let (offset, length) = range(random);
        let cookie = client
            .submit(0, command::READ, offset, length, &[])
            .unwrap();
        asked.push((cookie, offset as usize..offset as usize + length as usize));
    }
    while client.in_flight() > 0 {
        let reply = client.receive().unwrap();
        let (_, place) = asked
            .iter()
            .find(|(cookie, _)| *cookie == reply.cookie)
            .unwrap();
        assert!(reply.data == model[place.clone()], "{place:?}");
    }
}

#[test]
fn threads_take_over_where_io_uring_is_forbidden() {
    let (site, serve) = site_with("auto");
    let mut random = Random::from_environment("threads_take_over");
    let tracker = Daemon::start("tracker", &mut without_uring(Errno::EPERM, &serve));
    tracker.await_text("Threads carry out the I/O instead of io_uring");
    let log = tracker.log();
    for word in ["WARN", "kernel.io_uring_disabled", "seccomp"] {
        assert!(log.contains(word), "{log}");
    }
    let status = site.tracker_status();
    assert_eq!(status["engine"]["engine"], "threads");
    let reason = status["engine"]["fallback_reason"].as_str().unwrap();
    assert!(reason.contains("Operation not permitted"), "{reason}");
    let text = status_text(&site);
    assert!(
        text.contains("engine threads (Cannot set up an io_uring"),
        "{text}"
    );
    let mut model = vec![0; DISK_BYTES as usize];
    let mut client = site.connect("disk");
    for _ in 0..12 {
        write_and_read(&mut client, &mut model, &mut random);
    }
    client.disconnect().unwrap();
    tracker.stop();
    assert!(std::fs::read(site.image("disk")).unwrap() == model);
}

#[test]
fn what_was_answered_outlives_a_kill() {
    let (site, serve) = site_with("auto");
    let mut random = Random::from_environment("outlives_a_kill");
    let mut model = vec![0; DISK_BYTES as usize];
    for _ in 0..4 {
        let tracker = Daemon::start("tracker", &mut without_uring(Errno::ENOSYS, &serve));
        let mut client = site.connect("disk");
        write_and_read(&mut client, &mut model, &mut random);
        tracker.kill();
        assert!(std::fs::read(site.image("disk")).unwrap() == model);
    }
}

#[test]
fn io_uring_by_name_or_nothing() {
    let (site, serve) = site_with("io_uring");
    for (error, said) in [
        (Errno::EPERM, "kernel.io_uring_disabled"),
        (Errno::ENOSYS, "lacks"),
    ] {
        let outcome: Outcome = run(&mut without_uring(error, &serve));
        let text = outcome.failure();
        assert!(
            text.contains("tracker: Cannot set up an io_uring") && text.contains(said),
            "{text}"
        );
        assert!(!site.socket().exists());
    }
}

#[test]
fn threads_may_be_asked_for() {
    let (site, mut serve) = site_with("threads");
    let tracker = Daemon::start("tracker", &mut serve);
    assert!(!tracker.log().contains("WARN"), "{}", tracker.log());
    let status = site.tracker_status();
    assert_eq!(status["engine"]["engine"], "threads");
    assert!(status["engine"]["fallback_reason"].is_null());
    assert!(status_text(&site).contains("\nengine threads\n"));
    let mut client = site.connect("disk");
    client.write(4096, &[7; 100_000]).unwrap();
    // Beyond the end: an error of the request, as with io_uring.
    assert!(matches!(
        client.read(DISK_BYTES, 1),
        Err(Failure::Refused(_))
    ));
    assert!(client.read(4096, 100_000).unwrap() == [7; 100_000]);
    tracker.stop();
}

#[test]
fn a_machine_is_protected_where_io_uring_is_forbidden() {
    let (site, serve) = site_with("auto");
    let mut random = Random::from_environment("is_protected");
    let _tracker = Daemon::start("tracker", &mut without_uring(Errno::EPERM, &serve));
    let mut client = site.connect("disk");
    for offset in (0..DISK_BYTES).step_by(1 << 20) {
        client.write(offset, &random.bytes(1 << 20)).unwrap();
    }
    site.protect();
    let run_shipper = site.shipper_command(&["run"]);
    let shipper = Daemon::start("shipper", &mut without_uring(Errno::EPERM, &run_shipper));
    site.cut();
    client.write(4096 * 100, &random.bytes(50_000)).unwrap();
    let point = site.cut();
    let restored = site.restore(&point, "disk", "restored");
    assert_same(&restored, &site.image("disk"));
    shipper.await_text("Threads read the disks");
    assert!(shipper.log().contains("WARN"), "{}", shipper.log());
    shipper.stop();
}

#[test]
fn a_sync_that_fails_fails_the_write_that_asked_for_it() {
    let (site, mut serve) = site_with("threads");
    serve.arg("--no-journal");
    let call = SYS_fdatasync;
    let mut command_line = without_calls(call..=call, Errno::EIO, &serve);
    let tracker = Daemon::start("tracker", &mut command_line);
    let mut client = site.connect("disk");
    client.write(0, &[1; 4096]).unwrap();
    let durable = client.call(command::FUA, command::WRITE, 4096, 4096, &[2; 4096]);
    let refused = |result| matches!(result, Err(Failure::Refused(5)));
    assert!(refused(durable));
    assert!(refused(client.flush().map(|()| Vec::new())));
    tracker.await_text("every later FLUSH fails");
    // The disk can still be read and written, and nobody is told that it is safe.
    client.write(8192, &[3; 4096]).unwrap();
    assert!(client.read(8192, 4096).unwrap() == [3; 4096]);
    tracker.stop();
}

#[test]
fn a_sync_made_for_a_lone_client_fails_as_any_other() {
    let (site, mut serve) = site_with("io_uring");
    serve.arg("--no-journal");
    let call = SYS_fdatasync;
    let mut command_line = without_calls(call..=call, Errno::EIO, &serve);
    let tracker = Daemon::start("tracker", &mut command_line);
    let refused = |result: Result<(), Failure>| matches!(result, Err(Failure::Refused(5)));
    let mut client = site.connect("disk");
    // io_uring's own sync is no such call. Only when the worker knows its client does it sync itself.
    let mut writes = 0;
    while !refused(client.flush()) {
        client.write(0, &[1; 4096]).unwrap();
        writes += 1;
        assert!(writes < 1000, "the worker never synced itself");
    }
    // With others around it would not be the worker who syncs; they are told no better.
    let mut other = site.connect("disk");
    for client in [&mut other, &mut client] {
        assert!(refused(client.flush()));
        client.write(4096, &[2; 4096]).unwrap();
    }
    tracker.await_text("every later FLUSH fails");
    tracker.stop();
}
