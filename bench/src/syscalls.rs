//! System calls per request, in a short run of its own: by `perf stat` where the kernel lets it count,
//! else by `strace`, which slows the server down and so changes how requests gather in batches.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::Result;
use crate::measure;
use crate::servers::{Running, ServerKind, is_installed};
use crate::settings::{Plan, Section, Settings};

/// Length of the run.
const DURATION: Duration = Duration::from_millis(700);
/// Time that a counter has to attach itself.
const ATTACH_TIME: Duration = Duration::from_millis(400);
/// Perf's name of what is counted.
const EVENT: &str = "raw_syscalls:sys_enter";

/// Who counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counter {
    /// `perf stat`
    Perf,
    /// `strace -c -f`
    Strace,
}

impl Counter {
    /// The better one that works here.
    ///
    /// # Errors
    ///
    /// Neither is installed.
    pub fn find() -> Result<Self> {
        let works = Command::new("perf")
            .args(["stat", "-e", EVENT, "true"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        if works.is_ok_and(|status| status.success()) {
            Ok(Self::Perf)
        } else if is_installed("strace") {
            Ok(Self::Strace)
        } else {
            Err("neither perf nor strace can count system calls here".into())
        }
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Perf => "perf",
            Self::Strace => "strace",
        }
    }

    fn start(self, pid: u32, output: &Path) -> Result<Child> {
        let mut command = Command::new(self.name());
        match self {
            Self::Perf => command.args(["stat", "-x,", "-e", EVENT, "-o"]).arg(output),
            Self::Strace => command.args(["-c", "-f", "-q", "-o"]).arg(output),
        };
        let child = command
            .args(["-p", &pid.to_string()])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        std::thread::sleep(ATTACH_TIME);
        Ok(child)
    }

    fn count(self, text: &str) -> Option<u64> {
        match self {
            // COUNT,UNIT,EVENT,...
            Self::Perf => {
                let line = text.lines().find(|line| line.contains(EVENT))?;
                line.split(',').next()?.parse().ok()
            }
            // % time, seconds, usecs/call, calls, perhaps errors, "total"
            Self::Strace => {
                let line = text.lines().find(|line| line.ends_with(" total"))?;
                line.split_whitespace().nth(3)?.parse().ok()
            }
        }
    }
}

/// System calls per request of a server, or nothing where there is no server.
///
/// # Errors
///
/// The server, the client or the counter fails.
pub fn per_request(
    counter: Counter,
    settings: &Settings,
    plan: &Plan,
    section: &Section,
    kind: ServerKind,
) -> Result<Option<f64>> {
    let server = Running::start(&section.setup(settings, plan, kind))?;
    let Some(pid) = server.pid() else {
        return Ok(None);
    };
    let output = server.folder().join("calls");
    let mut child = counter.start(pid, &output)?;
    let load = measure::client(settings, section, &server, DURATION);
    kill(Pid::from_raw(i32::try_from(child.id())?), Signal::SIGINT)?;
    child.wait()?;
    let text = std::fs::read_to_string(&output)?;
    server.stop()?;
    let calls = counter
        .count(&text)
        .ok_or_else(|| format!("{} says: {text}", counter.name()))?;
    Ok(Some(calls as f64 / load?.requests.max(1) as f64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_counters_print_is_read() {
        let perf = "# started\n\n1234,,raw_syscalls:sys_enter,1,100.00,,\n";
        assert_eq!(Counter::Perf.count(perf), Some(1234));
        let strace = "100.00    0.000123           1        77         3 total\n";
        assert_eq!(Counter::Strace.count(strace), Some(77));
        assert_eq!(Counter::Strace.count(""), None);
    }
}
