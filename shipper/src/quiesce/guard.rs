//! `shipper quiesce-guard`: carries out the hooks, and thaws whatever becomes of the shipper.
//!
//! Order: the order is read from standard input; the hooks freeze; a report says so; then it waits for a
//! line, the end of its input or the time limit, thaws in reverse, removes the note, and reports.
//!
//! Signals that a terminal or a service manager sends to all processes at once are blocked: it ends
//! when everything is thawed, and the end of the shipper tells it to. Only SIGKILL ends it before that;
//! then the shipper thaws.
//!
//! What it writes goes into a pipe, never into a file, which could be on what it has frozen.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, TryRecvError, bounded};
use nix::sys::signal::{SigSet, Signal};

use super::agent::Agent;
use super::command::CommandPair;
use super::fsfreeze::Fsfreeze;
use super::lines::{Line, Lines};
use super::protocol::{Action, Hook, LINE_BYTES_MAX, Order, Report};
use crate::error::{Error, ErrorKind, Result};
use crate::spool::files::remove_if_present;

/// Time that an order may take to come.
const ORDER_DEADLINE: Duration = Duration::from_secs(10);
/// The longest wait for a word at once.
const LISTEN_INTERVAL: Duration = Duration::from_secs(3600);
/// All that can be blocked and would end or stop it.
const SIGNALS: [Signal; 10] = [
    Signal::SIGHUP,
    Signal::SIGINT,
    Signal::SIGQUIT,
    Signal::SIGTERM,
    Signal::SIGTSTP,
    Signal::SIGTTIN,
    Signal::SIGTTOU,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGALRM,
];

/// Why something is not frozen.
#[derive(Debug)]
pub struct Failed {
    /// In words.
    pub reason: String,
    /// It may be frozen all the same, or become so.
    pub perhaps_frozen: bool,
}

impl Failed {
    /// It is not frozen, for sure.
    pub fn for_sure(reason: String) -> Self {
        let perhaps_frozen = false;
        Self {
            reason,
            perhaps_frozen,
        }
    }

    /// It may be frozen.
    pub fn perhaps(reason: String) -> Self {
        let perhaps_frozen = true;
        Self {
            reason,
            perhaps_frozen,
        }
    }
}

/// Something that freezes and thaws.
pub trait Hooked {
    /// What it is, for messages.
    fn name(&self) -> String;

    /// Freezes, until a moment at most.
    ///
    /// # Errors
    ///
    /// Why not, and whether it has to be thawed.
    fn freeze(&mut self, until: Instant, reports: &mut Reports) -> std::result::Result<(), Failed>;

    /// Thaws, until a moment at most. `false`: it was not frozen any more.
    ///
    /// # Errors
    ///
    /// Why it may still be frozen.
    fn thaw(&mut self, until: Instant, reports: &mut Reports) -> std::result::Result<bool, String>;

    /// Waits for a freeze that could not be ended. Returns whether there was one, and it is to be thawed.
    fn settle(&mut self) -> bool {
        false
    }
}

fn hooked(hook: Hook) -> Box<dyn Hooked> {
    match hook {
        Hook::Fsfreeze { mount } => Box::new(Fsfreeze::new(mount)),
        Hook::GuestAgent { socket } => Box::new(Agent::new(socket)),
        Hook::Command { freeze, thaw } => Box::new(CommandPair::new(freeze, thaw)),
    }
}

/// The two ways between guard and shipper.
#[derive(Debug)]
pub struct Reports {
    output: File,
    /// Nobody sends here: it is closed when the shipper says a word, or is gone.
    told: Receiver<()>,
}

impl Reports {
    /// Closed when it is time to thaw.
    pub fn told(&self) -> &Receiver<()> {
        &self.told
    }

    fn is_told(&self) -> bool {
        self.told.try_recv() == Err(TryRecvError::Disconnected)
    }

    /// A shipper that is gone does not hear it, which changes nothing.
    pub fn tell(&mut self, report: &Report) {
        if let Ok(mut line) = serde_json::to_vec(report) {
            line.push(b'\n');
            let _not_heard = self.output.write_all(&line);
        }
    }
}

/// Freezes and thaws by the order on standard input.
///
/// # Errors
///
/// There is no order, and nothing was done.
pub fn run() -> Result<()> {
    let mut blocked = SigSet::empty();
    blocked.extend(SIGNALS);
    blocked
        .thread_block()
        .map_err(|errno| Error::io("Cannot block signals", errno))?;
    let own = |stream: std::io::Result<std::os::fd::OwnedFd>| {
        let file = stream.map(File::from);
        file.map_err(|error| Error::io("Cannot use the pipes of the shipper", error))
    };
    let input = own(std::io::stdin().as_fd().try_clone_to_owned())?;
    let output = own(std::io::stdout().as_fd().try_clone_to_owned())?;
    let mut input = Lines::new(input, LINE_BYTES_MAX);
    let no_order = || {
        Error::new(
            ErrorKind::Invalid,
            "The guard is started by `shipper run` alone",
        )
    };
    let Line::Text(line) = input.next(Instant::now() + ORDER_DEADLINE) else {
        return Err(no_order());
    };
    let order: Order =
        serde_json::from_slice(&line).map_err(|error| no_order().with_source(error))?;
    let told = listen(input)?;
    let mut reports = Reports { output, told };
    let mut guard = Guard {
        time_limit: Duration::from_millis(order.time_limit_ms),
        hooks: order.hooks.into_iter().map(hooked).collect(),
        to_thaw: Vec::new(),
        reason: None,
        not_thawed: Vec::new(),
    };
    match order.action {
        Action::Freeze => guard.freeze_and_hold(&mut reports),
        Action::Thaw => guard.to_thaw = (0..guard.hooks.len()).collect(),
    }
    guard.thaw(&mut reports);
    guard.forget(&order.note);
    reports.tell(&Report::Ended {
        reason: guard.reason.take(),
        not_thawed: (!guard.not_thawed.is_empty()).then(|| guard.not_thawed.join("; ")),
    });
    guard.settle(&order.note, &mut reports);
    Ok(())
}

/// Waits for a word or the end in a thread of its own.
fn listen(mut input: Lines<File>) -> Result<Receiver<()>> {
    let (open, told) = bounded(0);
    let wait = move || {
        while input.next(Instant::now() + LISTEN_INTERVAL) == Line::Late {}
        drop(open);
    };
    let thread = std::thread::Builder::new().name("listen".into());
    let started = thread.spawn(wait);
    started.map_err(|error| Error::io("Cannot start a thread", error))?;
    Ok(told)
}

struct Guard {
    time_limit: Duration,
    hooks: Vec<Box<dyn Hooked>>,
    /// Hooks that are or may be frozen, in order.
    to_thaw: Vec<usize>,
    reason: Option<String>,
    not_thawed: Vec<String>,
}

impl Guard {
    fn freeze_and_hold(&mut self, reports: &mut Reports) {
        let until = Instant::now() + self.time_limit;
        for (index, hook) in self.hooks.iter_mut().enumerate() {
            // A word before everything is frozen means that nobody wants it any more.
            if reports.is_told() {
                self.reason = Some("The shipper did not wait for it".to_owned());
                return;
            }
            let frozen = hook.freeze(until, reports);
            reports.tell(&Report::Ran);
            if frozen
                .as_ref()
                .map_or_else(|failed| failed.perhaps_frozen, |()| true)
            {
                self.to_thaw.push(index);
            }
            if let Err(failed) = frozen {
                self.reason = Some(format!("Cannot freeze {}: {}", hook.name(), failed.reason));
                return;
            }
        }
        reports.tell(&Report::Frozen);
        let told = reports.told.recv_deadline(until);
        // The shipper counts from the last report how long a step takes.
        reports.tell(&Report::Ran);
        if told == Err(RecvTimeoutError::Timeout) {
            self.reason = Some(format!(
                "The time limit of {} s was over before the cut was made",
                self.time_limit.as_secs_f64()
            ));
        }
    }

    fn thaw(&mut self, reports: &mut Reports) {
        while let Some(index) = self.to_thaw.pop() {
            let hook = &mut self.hooks[index];
            let thawed = hook.thaw(Instant::now() + self.time_limit, reports);
            reports.tell(&Report::Ran);
            let what = match thawed {
                Ok(true) => continue,
                Ok(false) => format!(
                    "By the time of the thaw, {} was not frozen any more",
                    hook.name()
                ),
                Err(why) => {
                    let what = format!("Cannot thaw {}: {why}", hook.name());
                    self.not_thawed.push(what.clone());
                    what
                }
            };
            self.reason.get_or_insert(what);
        }
    }

    /// Removes the note when nothing is frozen.
    fn forget(&mut self, note: &std::path::Path) {
        if self.not_thawed.is_empty()
            && let Err(error) = remove_if_present(note)
        {
            self.not_thawed.push(error.chain());
        }
    }

    /// Stays for freezes that could not be ended, and thaws after them.
    fn settle(&mut self, note: &std::path::Path, reports: &mut Reports) {
        let settled = |(index, hook): (usize, &mut Box<dyn Hooked>)| hook.settle().then_some(index);
        self.to_thaw = self
            .hooks
            .iter_mut()
            .enumerate()
            .filter_map(settled)
            .collect();
        if !self.to_thaw.is_empty() {
            self.not_thawed.clear();
            self.thaw(reports);
            self.forget(note);
        }
    }
}
