//! Commands of hooks: run with a time limit, and their last words if they fail.
//!
//! The guard blocks signals, and a program would inherit that: a `kill` in a script could then end
//! nothing. So a command is started by way of `shipper quiesce-exec`, which becomes it with all signals
//! allowed. It waits for a word before that: the shipper must know the process by then, to be able to
//! end it if the guard dies.
//!
//! A command leads a process group, and all of that is killed at the limit. What a command that has
//! ended leaves running is left alone: it may be what holds the freeze.

use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, at, bounded, never, select};
use nix::sys::signal::{SigSet, Signal, killpg};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::Pid;

use super::guard::{Failed, Hooked, Reports};
use super::protocol::Report;
use crate::error::{Error, Result};

/// This program, also after it was replaced by a newer one.
pub const SELF: &str = "/proc/self/exe";
/// What is kept of the end of standard error, in bytes.
const WORDS_BYTES_MAX: usize = 400;
/// Time that a killed command has to be gone. One inside the kernel may take longer.
const KILL_PATIENCE: Duration = Duration::from_secs(1);
/// Time that the last words of a command have to arrive.
const WORDS_PATIENCE: Duration = Duration::from_millis(200);

/// A pair of commands.
#[derive(Debug)]
pub struct CommandPair {
    freeze: Vec<String>,
    thaw: Vec<String>,
}

impl CommandPair {
    /// One that freezes and one that thaws.
    pub fn new(freeze: Vec<String>, thaw: Vec<String>) -> Self {
        Self { freeze, thaw }
    }
}

impl Hooked for CommandPair {
    fn name(&self) -> String {
        format!("the command {}", self.freeze.join(" "))
    }

    fn freeze(&mut self, until: Instant, reports: &mut Reports) -> std::result::Result<(), Failed> {
        run(Purpose::Freeze, &self.freeze, until, reports).map_err(|unfinished| unfinished.failed)
    }

    fn thaw(&mut self, until: Instant, reports: &mut Reports) -> std::result::Result<bool, String> {
        let thawed = run(Purpose::Thaw, &self.thaw, until, reports);
        thawed
            .map(|()| true)
            .map_err(|unfinished| format!("{}: {}", self.thaw.join(" "), unfinished.failed.reason))
    }
}

/// A command that did not succeed.
#[derive(Debug)]
pub struct Unfinished {
    /// Why.
    pub failed: Failed,
    /// It was killed and is still there: this tells when it is gone.
    pub stuck: Option<Receiver<()>>,
}

impl From<Failed> for Unfinished {
    fn from(failed: Failed) -> Self {
        let stuck = None;
        Self { failed, stuck }
    }
}

/// What a command is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// It freezes; nobody needs that any more when it is time to thaw.
    Freeze,
    /// It thaws.
    Thaw,
}

/// Runs a command to its end, which must come in time.
///
/// # Errors
///
/// It cannot be run, ends with another status than 0, or is killed because it takes too long or is
/// not needed any more.
pub fn run(
    purpose: Purpose,
    words: &[String],
    until: Instant,
    reports: &mut Reports,
) -> std::result::Result<(), Unfinished> {
    let cannot = |what: &str, error: &dyn std::fmt::Display| {
        Failed::for_sure(format!("cannot {what} it: {error}"))
    };
    let mut child = Command::new(SELF)
        .arg0("shipper")
        .args(["quiesce-exec", "--"])
        .args(words)
        .process_group(0)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| cannot("start", &error))?;
    let last_words = LastWords::of(&mut child).map_err(|error| cannot("listen to", &error))?;
    let process = child.id();
    let ended = ending(process).map_err(|error| cannot("wait for", &error))?;
    reports.tell(&Report::Runs { process });
    if let Some(mut input) = child.stdin.take() {
        // One that is gone already shows by its status.
        let _gone = input.write_all(b"\n");
    }
    let told = match purpose {
        Purpose::Freeze => reports.told(),
        Purpose::Thaw => &never(),
    };
    let result = select! {
        recv(ended) -> _ => finished(&mut child, &last_words),
        recv(told) -> _ => Err(cut_off(&mut child, &ended, "the shipper did not wait for it")),
        recv(at(until)) -> _ => {
            Err(cut_off(&mut child, &ended, "it did not end within the time limit"))
        }
    };
    reports.tell(&Report::Ran);
    result
}

fn finished(child: &mut Child, last_words: &LastWords) -> std::result::Result<(), Unfinished> {
    let status = child
        .wait()
        .map_err(|error| Failed::perhaps(format!("cannot wait for it: {error}")))?;
    if status.success() {
        return Ok(());
    }
    Err(Failed::for_sure(explained(status, &last_words.take())).into())
}

fn explained(status: ExitStatus, words: &str) -> String {
    let words = words.split_whitespace().collect::<Vec<_>>().join(" ");
    match words.is_empty() {
        true => format!("it ended with {status}"),
        false => format!("it ended with {status}: {words}"),
    }
}

/// Kills what takes too long, or is not needed.
fn cut_off(child: &mut Child, ended: &Receiver<()>, why: &str) -> Unfinished {
    let _gone = killpg(Pid::from_raw(child.id() as i32), Signal::SIGKILL);
    let late = format!("{why} and was killed");
    match ended.recv_timeout(KILL_PATIENCE) {
        Ok(()) => {
            let _reaped = child.wait();
            Failed::perhaps(late).into()
        }
        Err(_) => Unfinished {
            failed: Failed::perhaps(format!("{late}, but process {} is still there", child.id())),
            stuck: Some(ended.clone()),
        },
    }
}

/// Tells when a child has ended. It is not reaped, so that its number stays its own.
fn ending(process: u32) -> std::io::Result<Receiver<()>> {
    let (tell, ended) = bounded(1);
    std::thread::Builder::new()
        .name("wait".into())
        .spawn(move || {
            let process = Pid::from_raw(process as i32);
            let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT;
            while waitid(Id::Pid(process), flags) == Err(nix::errno::Errno::EINTR) {}
            let _not_awaited = tell.send(());
        })?;
    Ok(ended)
}

/// The end of what a command says on standard error.
struct LastWords {
    bytes: Arc<Mutex<Vec<u8>>>,
    complete: Receiver<()>,
}

impl LastWords {
    fn of(child: &mut Child) -> std::io::Result<Self> {
        let bytes = Arc::new(Mutex::new(Vec::new()));
        let (tell, complete) = bounded(1);
        let (pipe, kept) = (child.stderr.take(), Arc::clone(&bytes));
        std::thread::Builder::new()
            .name("listen".into())
            .spawn(move || {
                let mut chunk = [0; 4096];
                let Some(mut pipe) = pipe else { return };
                while let Ok(count @ 1..) = pipe.read(&mut chunk) {
                    let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
                    kept.extend_from_slice(&chunk[..count]);
                    let surplus = kept.len().saturating_sub(WORDS_BYTES_MAX);
                    kept.drain(..surplus);
                }
                let _not_awaited = tell.send(());
            })?;
        Ok(Self { bytes, complete })
    }

    /// Of a command that has ended. Something that it left running may hold the pipe open.
    fn take(&self) -> String {
        let _held_open = self.complete.recv_timeout(WORDS_PATIENCE);
        let bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

/// `shipper quiesce-exec`: waits for a word, then becomes the command with all signals allowed.
///
/// # Errors
///
/// The command cannot be run, or whoever started this is gone.
pub fn become_command(words: &[String]) -> Result<()> {
    let mut word = [0];
    let told = std::io::stdin().read_exact(&mut word);
    told.map_err(|error| Error::io("The guard that started this is gone", error))?;
    SigSet::empty()
        .thread_set_mask()
        .map_err(|errno| Error::io("Cannot allow signals", errno))?;
    let (program, arguments) = words
        .split_first()
        .map_or(("", words), |(program, rest)| (program, rest));
    let error = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .exec();
    Err(Error::io(format!("Cannot run {program:?}"), error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;

    #[test]
    fn last_words_are_on_one_line() {
        let status = ExitStatus::from_raw(3 << 8);
        assert_eq!(explained(status, ""), "it ended with exit status: 3");
        assert_eq!(
            explained(status, "no\n  such thing\n"),
            "it ended with exit status: 3: no such thing"
        );
    }
}
