//! Under a service manager: readiness, sockets that are handed over, and the unit files.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tests::nbd::{Client, Raw};
use tests::process::{installed, program, run, workspace};
use tests::site::Site;

const MIB: u64 = 1 << 20;
const DEADLINE: Duration = Duration::from_secs(60);

/// What systemd is to a service: it listens, hands the socket over, and is told how it goes.
struct Manager {
    site: Site,
    listener: UnixListener,
    notifications: UnixDatagram,
}

/// A service that is killed when the test fails.
struct Service(Child);

impl Drop for Service {
    fn drop(&mut self) {
        let _ended = self.0.kill();
        let _reaped = self.0.wait();
    }
}

impl Manager {
    fn new() -> Self {
        let site = Site::new(&[("disk", MIB)]);
        let listener = UnixListener::bind(site.socket()).unwrap();
        let notifications = UnixDatagram::bind(site.path("notify")).unwrap();
        notifications.set_read_timeout(Some(DEADLINE)).unwrap();
        Self {
            site,
            listener,
            notifications,
        }
    }

    fn command(&self, names: &str, arguments: &[&str]) -> Command {
        let socket: OwnedFd = self.listener.try_clone().unwrap().into();
        let mut command = Command::new("sh");
        // The socket comes as standard input and belongs at 3; the variables name the process.
        command
            .args([
                "-c",
                "exec 3<&0 </dev/null; LISTEN_PID=$$ LISTEN_FDS=1 exec \"$@\"",
                "sh",
            ])
            .arg(program("tracker"))
            .args(["serve", "--ring-size", "4MiB", "--disk"])
            .arg(format!("disk={}", self.site.image("disk").display()))
            .args(arguments)
            .env("LISTEN_FDNAMES", names)
            .env("NOTIFY_SOCKET", self.site.path("notify"))
            .stdin(Stdio::from(socket))
            .stdout(Stdio::null());
        command
    }

    fn start(&self, names: &str) -> Service {
        let service = Service(self.command(names, &[]).spawn().unwrap());
        let told = self.notification();
        assert!(told.contains("READY=1\n"), "{told}");
        let socket = self.site.socket().display().to_string();
        assert!(
            told.contains("STATUS=1 disk on ") && told.contains(&socket),
            "{told}"
        );
        service
    }

    fn stop(&self, mut service: Service) {
        kill(Pid::from_raw(service.0.id() as i32), Signal::SIGTERM).unwrap();
        let told = self.notification();
        assert!(told.contains("STOPPING=1\n"), "{told}");
        assert!(service.0.wait().unwrap().success());
    }

    fn notification(&self) -> String {
        let mut buffer = [0; 4096];
        let count = self
            .notifications
            .recv(&mut buffer)
            .expect("a notification");
        String::from_utf8_lossy(&buffer[..count]).into_owned()
    }
}

#[test]
fn a_client_that_comes_between_two_trackers_waits() {
    let manager = Manager::new();
    let first = manager.start("nbd");
    let mut client = Client::unix(&manager.site.socket(), "disk").unwrap();
    client.write(4096, &[7; 4096]).unwrap();
    client.disconnect().unwrap();
    assert!(manager.site.control().exists(), "it lies beside the socket");
    manager.stop(first);
    assert!(manager.site.socket().exists(), "it is the manager's");

    let early = Raw::unix(&manager.site.socket()).unwrap();
    let second = manager.start("nbd");
    let mut early = early;
    early.greet(3).expect("the second tracker greets it");
    let mut client = Client::unix(&manager.site.socket(), "disk").unwrap();
    assert_eq!(client.read(4096, 4096).unwrap(), [7; 4096]);
    client.disconnect().unwrap();
    manager.stop(second);
}

#[test]
fn a_socket_without_a_known_name_is_for_nbd() {
    let manager = Manager::new();
    let tracker = manager.start("tracker.socket");
    let status = manager.site.tracker_status();
    assert!(status["engine"]["workers"].is_u64(), "{status}");
    manager.stop(tracker);
}

#[test]
fn a_control_socket_can_be_handed_over() {
    let manager = Manager::new();
    let nbd = manager.site.path("own.sock");
    let mut command = manager.command("control", &["--socket", nbd.to_str().unwrap()]);
    let tracker = Service(command.spawn().unwrap());
    assert!(manager.notification().contains("READY=1\n"));
    let control = manager.site.socket();
    let status = run(Command::new(program("tracker"))
        .args(["status", "--control"])
        .arg(&control));
    assert!(status.success().contains("disk disk"));
    manager.stop(tracker);
    assert!(control.exists() && !nbd.exists());
}

#[test]
fn without_any_socket_it_says_so() {
    let site = Site::new(&[("disk", MIB)]);
    let error = run(Command::new(program("tracker"))
        .args(["serve", "--disk"])
        .arg(site.image("disk")))
    .failure();
    assert!(error.contains("--socket"), "{error}");
}

#[test]
fn a_descriptor_that_is_no_socket_is_refused() {
    let site = Site::new(&[("disk", MIB)]);
    let error = run(Command::new("sh")
        .args([
            "-c",
            "LISTEN_PID=$$ LISTEN_FDS=1 exec \"$@\" 3</dev/null",
            "sh",
        ])
        .arg(program("tracker"))
        .args(["serve", "--disk"])
        .arg(site.image("disk")))
    .failure();
    assert!(error.contains("Socket 0 of the service manager"), "{error}");
}

#[test]
fn the_unit_files_are_accepted() {
    if !installed("systemd-analyze") {
        eprintln!("left out: systemd-analyze is not installed");
        return;
    }
    // As instances of the templates, with the programs where they were built.
    let folder = tempfile::tempdir().unwrap();
    let programs = program("tracker").parent().unwrap().to_owned();
    let mut units = Vec::new();
    for entry in std::fs::read_dir(workspace().join("scripts/units")).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        let unit = folder.path().join(name.replace('@', "@demo"));
        let text = std::fs::read_to_string(&path).unwrap();
        let place = format!("{}/", programs.display());
        std::fs::write(&unit, text.replace("/usr/bin/", &place)).unwrap();
        units.push(unit);
    }
    assert!(units.len() >= 3, "{units:?}");
    let mut verify = Command::new("systemd-analyze");
    verify
        .args(["verify", "--man=no", "--recursive-errors=no"])
        .args(&units);
    let outcome = run(&mut verify);
    let complaints = complaints_about(&outcome.err, folder.path());
    assert!(
        outcome.status.success() && complaints.is_empty(),
        "{}",
        outcome.err
    );
}

/// Lines about our units; other units of the machine may have their own faults.
fn complaints_about(text: &str, folder: &Path) -> Vec<String> {
    text.lines()
        .filter(|line| line.contains(&folder.display().to_string()) || line.contains("@demo"))
        .map(str::to_owned)
        .collect()
}
