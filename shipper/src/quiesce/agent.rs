//! A guest at rest, by its qemu guest agent.
//!
//! Order: bring both sides into step, freeze, ask whether it is frozen; before the thaw ask again,
//! because a guest may thaw by itself (Windows does after 10 s). The connection is kept in between; where
//! it broke, another one thaws.
//!
//! An agent that answers a freeze with an error has thawed by itself. One that does not answer may still
//! be freezing, and is thawed.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Instant;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use serde_json::Value;

use super::guard::{Failed, Hooked, Reports};
use super::lines::{Line, Lines};
use super::protocol::LINE_BYTES_MAX;
use super::wire::{self, Unanswered};

/// A guest, by the socket of its agent.
#[derive(Debug)]
pub struct Agent {
    path: PathBuf,
    lines: Option<Lines<UnixStream>>,
    /// Tells answers of one synchronization from those of another.
    next_id: u64,
}

const LATE: &str = "it does not answer in time";
const GONE: &str = "it closes the connection";

impl Agent {
    /// The agent at this socket; it is not connected to yet.
    pub fn new(path: PathBuf) -> Self {
        Self {
            path,
            lines: None,
            next_id: u64::from(std::process::id()) << 16,
        }
    }

    /// Connects where there is no connection, and brings both sides into step.
    fn in_step(&mut self, until: Instant) -> Result<(), String> {
        let lines = match self.lines.take() {
            Some(lines) => lines,
            None => Lines::new(self.connect()?, LINE_BYTES_MAX),
        };
        let lines = self.lines.insert(lines);
        self.next_id += 1;
        send(lines, &wire::sync_request(self.next_id), until)?;
        loop {
            match lines.next(until) {
                Line::Text(line) if wire::is_in_step(&line, self.next_id) => return Ok(()),
                Line::Text(_) => {}
                Line::Late => return Err(LATE.to_owned()),
                Line::End => return Err(GONE.to_owned()),
            }
        }
    }

    /// Without waiting: a socket on which too many wait would hold us for as long as it likes.
    fn connect(&self) -> Result<UnixStream, String> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let connected = || {
            let stream = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
            let address = UnixAddr::new(&self.path)?;
            connect(std::os::fd::AsRawFd::as_raw_fd(&stream), &address)?;
            Ok(stream)
        };
        let stream = connected().map_err(|errno: nix::errno::Errno| {
            format!("cannot connect to it: {}", errno.desc())
        })?;
        let stream = UnixStream::from(stream);
        stream
            .set_nonblocking(false)
            .map_err(|error| format!("cannot use the connection: {error}"))?;
        Ok(stream)
    }

    fn ask(&mut self, command: &str, until: Instant) -> Result<Value, Unanswered> {
        let lines = self
            .lines
            .as_mut()
            .ok_or(Unanswered::Unknown(GONE.to_owned()))?;
        send(lines, &wire::request(command), until).map_err(Unanswered::Unknown)?;
        match lines.next(until) {
            Line::Text(line) => wire::answer(&line).map_err(|unanswered| match unanswered {
                Unanswered::Refused(what) => Unanswered::Refused(format!("{command}: {what}")),
                Unanswered::Unknown(what) => Unanswered::Unknown(format!("{command}: {what}")),
            }),
            Line::Late => Err(Unanswered::Unknown(format!("{command}: {LATE}"))),
            Line::End => Err(Unanswered::Unknown(format!("{command}: {GONE}"))),
        }
    }

    fn is_frozen(&mut self, until: Instant) -> Result<bool, String> {
        let status = self.ask("guest-fsfreeze-status", until)?;
        Ok(status.as_str() == Some("frozen"))
    }

    fn freeze_all(&mut self, until: Instant) -> Result<(), Failed> {
        self.in_step(until).map_err(Failed::for_sure)?;
        let count = match self.ask("guest-fsfreeze-freeze", until) {
            Ok(count) => count,
            Err(Unanswered::Refused(what)) => return Err(Failed::for_sure(what)),
            Err(Unanswered::Unknown(what)) => return Err(Failed::perhaps(what)),
        };
        if count.as_u64() == Some(0) {
            return Err(Failed::for_sure("it has frozen no file system".to_owned()));
        }
        match self.is_frozen(until) {
            Ok(true) => Ok(()),
            Ok(false) => Err(Failed::perhaps("it says that it is not frozen".to_owned())),
            Err(what) => Err(Failed::perhaps(what)),
        }
    }
}

impl From<Unanswered> for String {
    fn from(unanswered: Unanswered) -> Self {
        match unanswered {
            Unanswered::Refused(what) | Unanswered::Unknown(what) => what,
        }
    }
}

fn send(lines: &mut Lines<UnixStream>, bytes: &[u8], until: Instant) -> Result<(), String> {
    let left = until.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(LATE.to_owned());
    }
    let stream = lines.source();
    stream
        .set_write_timeout(Some(left))
        .and_then(|()| stream.write_all(bytes))
        .map_err(|error| format!("cannot send to it: {error}"))
}

impl Hooked for Agent {
    fn name(&self) -> String {
        format!("the guest agent at {}", self.path.display())
    }

    fn freeze(&mut self, until: Instant, _reports: &mut Reports) -> Result<(), Failed> {
        self.freeze_all(until)
    }

    fn thaw(&mut self, until: Instant, _reports: &mut Reports) -> Result<bool, String> {
        if self.lines.is_some() && self.in_step(until).is_err() {
            self.lines = None;
        }
        if self.lines.is_none() {
            self.in_step(until)?;
        }
        if !self.is_frozen(until)? {
            return Ok(false);
        }
        self.ask("guest-fsfreeze-thaw", until)?;
        match self.is_frozen(until)? {
            true => Err("it is still frozen after guest-fsfreeze-thaw".to_owned()),
            false => Ok(true),
        }
    }
}
