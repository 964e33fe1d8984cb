//! The control socket of a running shipper: one line of JSON asks, one answers.

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_channel::{Sender, bounded};
use nix::sys::socket::{Shutdown, shutdown};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tracker::control::line::{self, LineClient};
use tracker::control::protocol::{PROTOCOL, WireError, error_of};
use tracker::error::{Error as TrackerError, ErrorKind as TrackerErrorKind};
use tracker::extent::Epoch;
use tracker::nbd::listener::bind_unix;

use super::pruning::PruneReply;
use super::resync::{ResyncAnswer, ResyncRequest};
use super::state::StateFolder;
use crate::error::{Error, ErrorKind, Result};
use crate::status::{Board, Status};
use crate::vault::manifest::Consistency;
use crate::vault::prune::Report;

/// Time that a status may take.
const STATUS_DEADLINE: Duration = Duration::from_secs(10);

/// What can be asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
enum Request {
    /// Everything about the shipper: [`Status`].
    Status {
        /// Version of the protocol.
        protocol: u32,
    },
    /// Make a recovery point; answers with a [`Made`] when it is in the vault.
    Cut {
        /// Version of the protocol.
        protocol: u32,
        /// Bring to rest what the configuration names.
        #[serde(default)]
        quiesce: bool,
    },
    /// Compare every block of a disk with the fingerprints, or end that; answers what became of it.
    Resync {
        /// Version of the protocol.
        protocol: u32,
        /// Name of the disk; all disks without it.
        disk: Option<String>,
        /// End it.
        #[serde(default)]
        cancel: bool,
    },
    /// Decide which recovery points go; answers with a [`Report`] when that is durable.
    Prune {
        /// Version of the protocol.
        protocol: u32,
    },
}

/// A recovery point that was asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Made {
    /// Its number.
    pub epoch: Epoch,
    /// For whom it is consistent.
    pub consistency: Consistency,
    /// Why it is not consistent for applications, if that was tried.
    pub reason: Option<String>,
}

/// Where the answer to a cut goes.
pub type Reply = Sender<Result<Made>>;

/// What the conductor is asked.
pub enum Asked {
    /// For a recovery point, quiesced or not.
    Cut(bool, Reply),
    /// For a comparison of every block, or its end.
    Resync(ResyncRequest, Sender<Result<Vec<ResyncAnswer>>>),
    /// For a pass of retention.
    Prune(PruneReply),
}

/// The socket of a running shipper.
pub struct Door {
    listener: Arc<UnixListener>,
    path: PathBuf,
    thread: Option<JoinHandle<()>>,
}

impl Door {
    /// Listens. `ask` is called with what the conductor is to answer.
    ///
    /// # Errors
    ///
    /// The socket cannot be made.
    pub fn open(
        path: &Path,
        board: Arc<Board>,
        ask: impl Fn(Asked) + Send + Sync + 'static,
    ) -> Result<Self> {
        let listener = Arc::new(bind_unix(path, 0o600)?);
        let handler = Arc::new(move |text: &str| answer(text, &board, &ask));
        let accepting = Arc::clone(&listener);
        let thread = std::thread::Builder::new()
            .name("control".into())
            .spawn(move || line::serve(&accepting, handler))
            .map_err(|error| Error::io("Cannot start the control thread", error))?;
        Ok(Self {
            listener,
            path: path.to_owned(),
            thread: Some(thread),
        })
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        // Makes `accept` fail, which ends the thread.
        let _closed = shutdown(self.listener.as_raw_fd(), Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            let _panicked = thread.join();
        }
        let _gone = std::fs::remove_file(&self.path);
    }
}

fn answer(text: &str, board: &Board, ask: &dyn Fn(Asked)) -> tracker::error::Result<Value> {
    let refused = |what: String| TrackerError::new(TrackerErrorKind::Protocol, what);
    let request: Request =
        serde_json::from_str(text).map_err(|error| refused(format!("Invalid request: {error}")))?;
    let (Request::Status { protocol }
    | Request::Cut { protocol, .. }
    | Request::Resync { protocol, .. }
    | Request::Prune { protocol }) = request;
    if protocol != PROTOCOL {
        return Err(refused(format!(
            "The request speaks protocol {protocol}, this shipper speaks {PROTOCOL}"
        )));
    }
    let value = match request {
        Request::Status { .. } => serde_json::to_value(board.status()),
        Request::Cut { quiesce, .. } => {
            serde_json::to_value(await_answer(|reply| ask(Asked::Cut(quiesce, reply)))?)
        }
        Request::Resync { disk, cancel, .. } => {
            let request = ResyncRequest { disk, cancel };
            serde_json::to_value(await_answer(|reply| ask(Asked::Resync(request, reply)))?)
        }
        Request::Prune { .. } => {
            serde_json::to_value(await_answer(|reply| ask(Asked::Prune(reply)))?)
        }
    };
    value.map_err(|error| refused(format!("Cannot write the answer: {error}")))
}

/// Asks the conductor, and waits for its answer.
fn await_answer<T>(ask: impl FnOnce(Sender<Result<T>>)) -> tracker::error::Result<T> {
    let (reply, answered) = bounded(1);
    ask(reply);
    let ended = || Error::new(ErrorKind::State, "The shipper stops");
    let result = answered.recv().unwrap_or_else(|_| Err(ended()));
    result.map_err(|error| {
        let kind = match error.kind() {
            ErrorKind::Missing => TrackerErrorKind::Missing,
            _ => TrackerErrorKind::State,
        };
        TrackerError::new(kind, error.chain())
    })
}

fn ask(state: &Path, request: Request, deadline: Option<Duration>) -> Result<Value> {
    let socket = StateFolder::socket(state);
    let line = serde_json::to_string(&request).map_err(|error| {
        Error::new(ErrorKind::Invalid, "Cannot write a request").with_source(error)
    })?;
    let mut client = LineClient::connect(&socket, "shipper", deadline)?;
    Ok(client.ask(&line)?)
}

fn garbled(error: serde_json::Error) -> Error {
    let wire = WireError {
        kind: "protocol".into(),
        message: "The answer is not one of a shipper of this version".into(),
    };
    Error::from(error_of(wire)).with_source(error)
}

/// Asks the shipper that works in a state folder for everything about it.
///
/// # Errors
///
/// None runs there.
pub fn ask_status(state: &Path) -> Result<Status> {
    let value = ask(
        state,
        Request::Status { protocol: PROTOCOL },
        Some(STATUS_DEADLINE),
    )?;
    serde_json::from_value(value).map_err(garbled)
}

/// Asks the shipper that works in a state folder for a recovery point, and waits until it is in the
/// vault. With `quiesce` what the configuration names is brought to rest for it; where that fails the
/// point is made all the same, and says so.
///
/// # Errors
///
/// None runs there, it cannot make one, or its configuration names nothing to quiesce.
pub fn ask_cut(state: &Path, quiesce: bool) -> Result<Made> {
    let protocol = PROTOCOL;
    let value = ask(state, Request::Cut { protocol, quiesce }, None)?;
    serde_json::from_value(value).map_err(garbled)
}

/// Asks the shipper that works in a state folder to compare every block of one disk or of all, or to
/// end that.
///
/// # Errors
///
/// None runs there, there is no such disk, or the state folder cannot be written.
pub fn ask_resync(state: &Path, disk: Option<String>, cancel: bool) -> Result<Vec<ResyncAnswer>> {
    let protocol = PROTOCOL;
    let request = Request::Resync {
        protocol,
        disk,
        cancel,
    };
    serde_json::from_value(ask(state, request, None)?).map_err(garbled)
}

/// Asks the shipper that works in a state folder to decide which recovery points go. What only they need is removed
/// when its grace period is over.
///
/// # Errors
///
/// None runs there, its configuration has no retention, or the vault fails.
pub fn ask_prune(state: &Path) -> Result<Report> {
    let protocol = PROTOCOL;
    serde_json::from_value(ask(state, Request::Prune { protocol }, None)?).map_err(garbled)
}
