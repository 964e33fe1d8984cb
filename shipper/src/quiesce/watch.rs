//! The shipper's side of a guard: starts it, hears its reports, and thaws in its place if it dies.
//!
//! A thread hears the reports, so that a guard which dies is noticed while the shipper waits for the
//! cut. It is lost if its output ends too early, or if it is silent for longer than any single step may
//! take; then it is killed, with the command that it was running, and a second guard thaws.

use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use super::Outcome;
use super::command::SELF;
use super::lines::{Line, Lines};
use super::protocol::{Action, Hook, LINE_BYTES_MAX, Order, Report, THAW};
use crate::error::{Error, ErrorKind, Result};
use crate::spool::files::remove_if_present;

/// Time beyond its limit in which a guard must have ended a step.
const GRACE: Duration = Duration::from_secs(3);
/// Pause between looks at a process that was killed.
const LOOK_PAUSE: Duration = Duration::from_millis(5);

/// A guard that has frozen everything.
#[derive(Debug)]
pub struct Watch {
    input: Option<ChildStdin>,
    outcomes: Receiver<Heard>,
    thread: Option<JoinHandle<()>>,
}

/// What comes of a guard.
#[derive(Debug)]
enum Heard {
    Frozen,
    Ended(Outcome),
}

impl Watch {
    /// Has everything frozen.
    ///
    /// # Errors
    ///
    /// Why it is not.
    pub fn freeze(order: Order) -> std::result::Result<Self, Outcome> {
        let nothing_done = |error: Error| {
            let left = remove_if_present(&order.note).err();
            Outcome {
                reason: Some(error.chain()),
                not_thawed: left.map(|error| error.chain()),
            }
        };
        let (guard, input) = Guard::start(&order).map_err(nothing_done)?;
        let (tell, outcomes) = bounded(2);
        let to_watch = order.clone();
        let thread = std::thread::Builder::new()
            .name("quiesce".into())
            .spawn(move || guard.attend(&to_watch, &tell))
            .map_err(|error| nothing_done(Error::io("Cannot start a thread", error)))?;
        let watch = Self {
            input: Some(input),
            outcomes,
            thread: Some(thread),
        };
        match watch.outcomes.recv() {
            Ok(Heard::Frozen) => Ok(watch),
            Ok(Heard::Ended(outcome)) => Err(outcome),
            Err(_) => Err(watch.thaw()),
        }
    }

    /// Has everything thawed, and waits for that.
    pub fn thaw(mut self) -> Outcome {
        if let Some(mut input) = self.input.take() {
            // One that is gone has been noticed. The end of its input says the same as the word.
            let _gone = input.write_all(format!("{THAW}\n").as_bytes());
        }
        let outcome = self.outcomes.iter().find_map(|heard| match heard {
            Heard::Ended(outcome) => Some(outcome),
            Heard::Frozen => None,
        });
        let lost = "The thread that watches the guard is gone";
        outcome.unwrap_or_else(|| Outcome {
            reason: Some(lost.to_owned()),
            not_thawed: Some(lost.to_owned()),
        })
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        drop(self.input.take());
        if let Some(thread) = self.thread.take() {
            let _panicked = thread.join();
        }
    }
}

/// Thaws by a guard that does nothing else. Returns what may still be frozen.
pub fn rescue(hooks: &[Hook], time_limit: Duration, note: &Path) -> Option<String> {
    let order = Order {
        action: Action::Thaw,
        hooks: hooks.to_vec(),
        time_limit_ms: time_limit.as_millis() as u64,
        note: note.to_owned(),
    };
    let (mut guard, _input) = match Guard::start(&order) {
        Ok(started) => started,
        Err(error) => return Some(error.chain()),
    };
    match guard.hear(time_limit) {
        Ok(Report::Ended { not_thawed, .. }) => {
            guard.let_go();
            not_thawed
        }
        Ok(_) => Some(guard.end("it answers out of turn", time_limit)),
        Err(why) => Some(guard.end(&why, time_limit)),
    }
}

/// A guard process.
#[derive(Debug)]
struct Guard {
    child: Child,
    lines: Lines<ChildStdout>,
    /// The command that it is running, which leads a process group.
    runs: Option<u32>,
}

impl Guard {
    fn start(order: &Order) -> Result<(Self, ChildStdin)> {
        let failed = |error| Error::io("Cannot start the guard that freezes and thaws", error);
        let mut text = serde_json::to_vec(order).map_err(|error| {
            Error::new(ErrorKind::Invalid, "Cannot write an order").with_source(error)
        })?;
        text.push(b'\n');
        let mut child = Command::new(SELF)
            .arg0("shipper")
            .arg("quiesce-guard")
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(failed)?;
        let (Some(mut input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(failed(std::io::ErrorKind::BrokenPipe.into()));
        };
        let sent = input.write_all(&text);
        let mut guard = Self {
            child,
            lines: Lines::new(output, LINE_BYTES_MAX),
            runs: None,
        };
        match sent {
            Ok(()) => Ok((guard, input)),
            Err(error) => {
                guard.kill();
                Err(failed(error))
            }
        }
    }

    /// The next report that is not about commands.
    fn hear(&mut self, time_limit: Duration) -> std::result::Result<Report, String> {
        loop {
            let line = match self.lines.next(Instant::now() + time_limit + GRACE) {
                Line::Text(line) => line,
                Line::End => return Err("it ended before it had thawed".to_owned()),
                Line::Late => return Err("it was silent for too long".to_owned()),
            };
            match serde_json::from_slice(&line) {
                Ok(Report::Runs { process }) => self.runs = Some(process),
                Ok(Report::Ran) => self.runs = None,
                Ok(report) => return Ok(report),
                Err(error) => return Err(format!("its report is garbled: {error}")),
            }
        }
    }

    /// Hears a guard that freezes to its end.
    fn attend(mut self, order: &Order, tell: &Sender<Heard>) {
        let time_limit = Duration::from_millis(order.time_limit_ms);
        let outcome = loop {
            match self.hear(time_limit) {
                Ok(Report::Ended { reason, not_thawed }) => {
                    self.let_go();
                    break Outcome { reason, not_thawed };
                }
                Ok(_) => {
                    let _not_awaited = tell.send(Heard::Frozen);
                }
                Err(why) => {
                    let reason = self.end(&why, time_limit);
                    tracing::warn!("{reason}; thawing");
                    let not_thawed = rescue(&order.hooks, time_limit, &order.note);
                    break Outcome {
                        reason: Some(reason),
                        not_thawed,
                    };
                }
            }
        };
        let _not_awaited = tell.send(Heard::Ended(outcome));
    }

    /// Ends a guard that is lost, and what it was running: a freeze must not come after the thaw.
    fn end(&mut self, why: &str, time_limit: Duration) -> String {
        self.kill();
        // What it had said before it died.
        while let Line::Text(line) = self.lines.next(Instant::now()) {
            match serde_json::from_slice(&line) {
                Ok(Report::Runs { process }) => self.runs = Some(process),
                Ok(Report::Ran) => self.runs = None,
                _ => {}
            }
        }
        let mut reason = format!("The guard process {} was lost: {why}", self.child.id());
        if let Some(process) = self.runs.take() {
            let _gone = killpg(Pid::from_raw(process as i32), Signal::SIGKILL);
            if !is_gone(process, Instant::now() + time_limit) {
                reason.push_str(&format!(
                    "; its command, process {process}, cannot be killed"
                ));
            }
        }
        reason
    }

    fn kill(&mut self) {
        let _gone = self.child.kill();
        let _reaped = self.child.wait();
    }

    /// It has said its last word and ends by itself, most often at once.
    fn let_go(mut self) {
        let reaper = std::thread::Builder::new().name("reap".into());
        // Without the thread it is reaped when the shipper ends.
        let _none = reaper.spawn(move || self.child.wait());
    }
}

/// Waits until a process that is not our child is gone, or dead and not yet reaped.
fn is_gone(process: u32, until: Instant) -> bool {
    loop {
        let stat = std::fs::read_to_string(format!("/proc/{process}/stat"));
        // The state stands behind the name, which is in parentheses.
        let state = stat
            .ok()
            .and_then(|stat| stat.rsplit(") ").next()?.chars().next());
        if matches!(state, None | Some('Z' | 'X')) {
            return true;
        }
        if Instant::now() >= until {
            return false;
        }
        std::thread::sleep(LOOK_PAUSE);
    }
}
