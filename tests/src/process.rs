//! The two programs as processes: started, awaited by their `Ready` line, killed, their logs shown
//! when a test fails. Every wait has a deadline, and none polls.

use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Time that a program has until it is ready. Far above what it needs, for slow machines.
const START_DEADLINE: Duration = Duration::from_secs(60);
/// Time that a command has until it ends.
pub const COMMAND_DEADLINE: Duration = Duration::from_secs(240);
/// Lines of a log that a failing test shows.
const SHOWN_LINES_MAX: usize = 60;

/// Path of one of the built programs, `tracker` or `shipper`.
///
/// They lie beside the test executable's directory. They are built first, unless
/// `TIDEMARK_BUILT=1` says that this was done.
///
/// # Panics
///
/// The build fails.
pub fn program(name: &str) -> PathBuf {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    let folder = FOLDER.get_or_init(|| {
        let test = std::env::current_exe().expect("the path of this test");
        let folder = test
            .parent()
            .and_then(Path::parent)
            .expect("a test stands in target/PROFILE/deps")
            .to_owned();
        if std::env::var("TIDEMARK_BUILT").as_deref() != Ok("1") {
            build(&folder);
        }
        folder
    });
    folder.join(name)
}

/// Path of one of the programs as built with failpoints, which lie below the folder of the others.
///
/// They are built first, unless `TIDEMARK_BUILT=1` says that this was done; all but the two packages
/// themselves is shared with the ordinary build.
///
/// # Panics
///
/// The build fails, or is not there.
pub fn program_with_failpoints(name: &str) -> PathBuf {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    let folder = FOLDER.get_or_init(|| {
        let test = std::env::current_exe().expect("the path of this test");
        let ordinary = test.parent().and_then(Path::parent);
        let ordinary = ordinary.expect("a test stands in target/PROFILE/deps");
        let target = ordinary.parent().expect("target");
        let own = target.join("failpoints");
        let profile = ordinary.file_name().expect("a profile");
        let folder = own.join(profile);
        if std::env::var("TIDEMARK_BUILT").as_deref() != Ok("1") {
            let mut command = cargo_build(ordinary);
            command.args(["--features", "tracker/failpoints"]);
            command.env("CARGO_TARGET_DIR", own);
            run_build(command.env("CARGO_BUILD_BUILD_DIR", target));
        }
        folder
    });
    let path = folder.join(name);
    assert!(path.exists(), "{} was not built", path.display());
    path
}

fn build(folder: &Path) {
    let mut command = cargo_build(folder);
    if let Some(target) = folder.parent() {
        command.env("CARGO_TARGET_DIR", target);
    }
    run_build(&mut command);
}

/// A build of both programs for the tests that lie in this folder.
fn cargo_build(folder: &Path) -> Command {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.args(["build", "--quiet", "-p", "tracker", "-p", "shipper"]);
    if folder.ends_with("release") {
        command.arg("--release");
    }
    command
}

fn run_build(command: &mut Command) {
    let status = command
        .current_dir(workspace())
        .status()
        .expect("cargo runs");
    assert!(status.success(), "the programs cannot be built");
}

/// The root of the source tree.
///
/// # Panics
///
/// Never: this package stands in a folder of the workspace.
pub fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("the workspace")
        .to_owned()
}

/// What a command left behind.
#[derive(Debug)]
pub struct Outcome {
    /// How it ended.
    pub status: ExitStatus,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
}

impl Outcome {
    /// Standard output of a command that must have succeeded.
    ///
    /// # Panics
    ///
    /// It failed.
    #[track_caller]
    pub fn success(self) -> String {
        assert!(
            self.status.success(),
            "{}\nstandard output:\n{}\nstandard error:\n{}",
            self.status,
            self.out,
            self.err
        );
        self.out
    }

    /// Standard error of a command that must have failed in good order.
    ///
    /// # Panics
    ///
    /// It succeeded, was killed by a signal, or panicked.
    #[track_caller]
    pub fn failure(self) -> String {
        assert!(
            !self.status.success() && self.status.signal().is_none(),
            "it should have failed in good order: {}\n{}\n{}",
            self.status,
            self.out,
            self.err
        );
        assert!(!self.err.contains("panicked at"), "{}", self.err);
        self.err
    }
}

/// Runs a command to its end.
///
/// # Panics
///
/// It cannot be started, or does not end in time.
#[track_caller]
pub fn run(command: &mut Command) -> Outcome {
    run_within(command, COMMAND_DEADLINE)
}

/// Runs a command that must end within `deadline`.
///
/// # Panics
///
/// It cannot be started, or does not end in time.
#[track_caller]
pub fn run_within(command: &mut Command, deadline: Duration) -> Outcome {
    let shown = format!("{command:?}");
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{shown}: {error}"));
    let pid = pid_of(&child);
    let out = drain(child.stdout.take());
    let err = drain(child.stderr.take());
    let (ended, has_ended) = channel();
    let waiter = std::thread::spawn(move || {
        let status = child.wait();
        let _receiver_gone = ended.send(());
        status
    });
    let late = has_ended.recv_timeout(deadline).is_err();
    if late {
        let _gone = kill(pid, Signal::SIGKILL);
    }
    let status = waiter.join().expect("the waiter").expect("wait");
    let outcome = Outcome {
        status,
        out: out.join().expect("standard output"),
        err: err.join().expect("standard error"),
    };
    assert!(
        !late,
        "{shown} did not end within {deadline:?}\n{outcome:?}"
    );
    outcome
}

fn drain(pipe: Option<impl Read + Send + 'static>) -> JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            let _closed = pipe.read_to_end(&mut bytes);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

fn pid_of(child: &Child) -> Pid {
    Pid::from_raw(child.id() as i32)
}

/// A program that serves until it is told to stop. Dropping it kills it.
pub struct Daemon {
    name: String,
    child: Child,
    lines: Arc<Mutex<Vec<String>>>,
    arrivals: Receiver<String>,
    readers: Vec<JoinHandle<()>>,
    start_time: Duration,
}

impl Daemon {
    /// Starts a program and waits for its `Ready` line.
    ///
    /// # Panics
    ///
    /// It ends before, or is not ready in time; the message holds its log.
    #[track_caller]
    pub fn start(name: &str, command: &mut Command) -> Self {
        let begin = Instant::now();
        let mut daemon = Self::spawn(name, command);
        let ready = daemon.await_line(START_DEADLINE, |line| line.starts_with("Ready"));
        daemon.start_time = begin.elapsed();
        assert!(
            ready.is_some(),
            "{name} was not ready ({command:?}):\n{}",
            daemon.log()
        );
        daemon
    }

    /// Starts a program that may never be ready.
    ///
    /// # Panics
    ///
    /// It cannot be started.
    #[track_caller]
    pub fn spawn(name: &str, command: &mut Command) -> Self {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let lines = Arc::new(Mutex::new(Vec::new()));
        let (arrived, arrivals) = channel();
        let mut readers = Vec::new();
        if let Some(pipe) = child.stdout.take() {
            let (lines, arrived) = (Arc::clone(&lines), arrived.clone());
            readers.push(std::thread::spawn(move || collect(pipe, &lines, &arrived)));
        }
        if let Some(pipe) = child.stderr.take() {
            let lines = Arc::clone(&lines);
            readers.push(std::thread::spawn(move || collect(pipe, &lines, &arrived)));
        }
        Self {
            name: name.to_owned(),
            child,
            lines,
            arrivals,
            readers,
            start_time: Duration::ZERO,
        }
    }

    /// Time from the start to the `Ready` line.
    pub fn start_time(&self) -> Duration {
        self.start_time
    }

    /// Waits until it has said something with this text, now or before. What goes to standard error
    /// may come later than what went to standard output before it.
    ///
    /// # Panics
    ///
    /// It does not say so in time.
    #[track_caller]
    pub fn await_text(&self, text: &str) {
        let deadline = Instant::now() + START_DEADLINE;
        while !self.log().contains(text) {
            let left = deadline.saturating_duration_since(Instant::now());
            let arrived = self.arrivals.recv_timeout(left);
            // What came before both pipes ended is in the log.
            assert!(
                arrived.is_ok() || self.log().contains(text),
                "{} did not say {text:?}:\n{}",
                self.name,
                self.log()
            );
        }
    }

    /// Waits for a line that fits; `None` if the deadline passes or the program ends before.
    /// Lines are looked at once: a second call starts after the first one's.
    pub fn await_line(&self, limit: Duration, fits: impl Fn(&str) -> bool) -> Option<String> {
        let deadline = Instant::now() + limit;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.arrivals.recv_timeout(left) {
                Ok(line) if fits(&line) => return Some(line),
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return None,
            }
        }
    }

    /// Everything that it has printed, errors among it.
    pub fn log(&self) -> String {
        self.lines
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .join("\n")
    }

    /// Its process number.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        let _gone = kill(pid_of(&self.child), signal);
    }

    /// SIGKILL, and waits until the process is gone.
    pub fn kill(mut self) {
        self.end();
    }

    /// SIGTERM; it must end by itself with success.
    ///
    /// # Panics
    ///
    /// It does not end, or not with success.
    #[track_caller]
    pub fn stop(mut self) {
        self.signal(Signal::SIGTERM);
        // Both pipes close when the process ends; that is what is waited for.
        let ended = self.await_end(Duration::from_secs(60));
        assert!(
            ended,
            "{} did not end on SIGTERM:\n{}",
            self.name,
            self.log()
        );
        let status = self.child.wait().expect("wait");
        assert!(
            status.success(),
            "{} ended with {status}:\n{}",
            self.name,
            self.log()
        );
    }

    /// Waits until it has closed its output, as it does when it ends.
    pub fn await_end(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.arrivals.recv_timeout(left) {
                Ok(_) => {}
                Err(RecvTimeoutError::Disconnected) => return true,
                Err(RecvTimeoutError::Timeout) => return false,
            }
        }
    }

    /// Waits until it has ended; how, and everything that it has printed.
    ///
    /// # Panics
    ///
    /// It does not end in time.
    #[track_caller]
    pub fn outcome(mut self, limit: Duration) -> (ExitStatus, String) {
        let ended = self.await_end(limit);
        assert!(ended, "{} did not end:\n{}", self.name, self.log());
        let status = self.child.wait().expect("wait");
        self.end();
        (status, self.log())
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Memory in bytes by a field of `/proc/PID/status`, such as `VmHWM` or `VmRSS`.
    ///
    /// # Panics
    ///
    /// The process is gone.
    pub fn memory_bytes(&self, field: &str) -> u64 {
        let path = format!("/proc/{}/status", self.pid());
        let text = std::fs::read_to_string(&path).expect("the process runs");
        text.lines()
            .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))
            .and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok())
            .unwrap_or_else(|| panic!("{path} has no {field}"))
            << 10
    }

    fn end(&mut self) {
        let _gone = self.child.kill();
        let _reaped = self.child.wait();
        for reader in self.readers.drain(..) {
            let _panicked = reader.join();
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.end();
        if std::thread::panicking() {
            let log = self.log();
            let lines: Vec<&str> = log.lines().collect();
            let from = lines.len().saturating_sub(SHOWN_LINES_MAX);
            eprintln!(
                "--- last lines of {}:\n{}",
                self.name,
                lines[from..].join("\n")
            );
        }
    }
}

fn collect(pipe: impl Read, lines: &Mutex<Vec<String>>, arrived: &std::sync::mpsc::Sender<String>) {
    for line in BufReader::new(pipe).split(b'\n') {
        let Ok(line) = line else { return };
        let line = String::from_utf8_lossy(&line).into_owned();
        lines
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(line.clone());
        let _not_awaited = arrived.send(line);
    }
}

/// Whether a program is installed; tests that need a foreign client say so when it is not.
pub fn installed(name: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].iter().map(PathBuf::from))
        .any(|folder| folder.join(name).is_file())
}

/// Asserts that a foreign client is installed: a test that cannot run must not pass.
///
/// # Panics
///
/// It is not installed.
#[track_caller]
pub fn require(names: &[&str]) {
    for name in names {
        assert!(
            installed(name),
            "{name} is not installed: scripts/test installs what tests need"
        );
    }
}
