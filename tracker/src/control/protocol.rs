//! The messages of the control socket. Pure.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::disk::NewSize;
use crate::engine::EngineStatus;
use crate::epoch::{Keep, MachineStatus};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::Epoch;

/// Version of the protocol; a request names the one that it speaks.
pub const PROTOCOL: u32 = 1;
/// Longest line in bytes, in both directions for requests; answers may be longer.
pub const LINE_BYTES_MAX: usize = 64 << 10;

/// How a capture ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CaptureOutcome {
    /// The epoch is complete and durable in the spool.
    Sealed,
    /// The epoch is given up; its changes belong to the open one.
    Abandoned,
}

/// What can be asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// Everything about the tracker: [`Status`].
    Status {},
    /// The epochs alone: [`MachineStatus`].
    Epochs {},
    /// Close the open epoch on all disks; answers with its number. The next one is at least
    /// `minimum`. Its blocks are kept as they are until its capture has ended.
    Cut {
        /// Least number of the epoch that is opened.
        minimum: Epoch,
        /// Which blocks are kept.
        #[serde(default)]
        keep: Keep,
    },
    /// The shipper begins to capture the closed epoch.
    CaptureBegin {
        /// The closed epoch.
        epoch: Epoch,
    },
    /// The capture of the closed epoch has ended.
    CaptureEnd {
        /// The closed epoch.
        epoch: Epoch,
        /// How.
        outcome: CaptureOutcome,
    },
    /// The recovery point of this epoch is durable in the vault.
    Commit {
        /// The epoch.
        epoch: Epoch,
    },
    /// The spool is lost: what was sealed and not committed counts as changed again.
    Revert {},
    /// Close the open epoch and hold it for other programs: [`Snapshot`].
    Snapshot {},
    /// End a snapshot.
    Release {
        /// The epoch that is held.
        epoch: Epoch,
        /// Its changes are taken over: the next snapshot tells those that came after.
        done: bool,
    },
    /// Let a disk grow: [`Resized`].
    Resize {
        /// Name of the disk.
        disk: String,
        /// Its new size.
        size: NewSize,
    },
}

/// A closed epoch that is held.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// The epoch.
    pub epoch: Epoch,
    /// Names of its exports.
    pub exports: Vec<String>,
}

/// What became of a disk that was to grow.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resized {
    /// Name of the disk.
    pub disk: String,
    /// Size in bytes that it had.
    pub before_bytes: u64,
    /// Size in bytes that it has.
    pub size_bytes: u64,
}

/// Everything about a tracker.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Status {
    /// Version of the control protocol.
    pub protocol: u32,
    /// Version of the program.
    pub version: String,
    /// Process number.
    pub pid: u32,
    /// Epochs, disks and journals.
    pub machine: MachineStatus,
    /// Workers and their counters.
    pub engine: EngineStatus,
}

/// An error as it crosses the socket.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct WireError {
    /// Name of the kind.
    pub kind: String,
    /// The whole chain of messages.
    pub message: String,
}

/// An answer.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// The request was carried out.
    Ok(Value),
    /// It was not.
    Error(WireError),
}

/// Writes a request as a line without its end.
pub fn encode_request(request: &Request) -> Result<String> {
    let mut value = serde_json::to_value(request).map_err(encoding)?;
    if let Some(fields) = value.as_object_mut() {
        fields.insert("protocol".into(), PROTOCOL.into());
    }
    Ok(value.to_string())
}

/// Reads a request from a line.
///
/// # Errors
///
/// Not JSON, another protocol version, an unknown command, missing or unknown fields.
pub fn decode_request(line: &str) -> Result<Request> {
    let invalid = |what: String| Error::new(ErrorKind::Protocol, what);
    let mut value: Value = serde_json::from_str(line)
        .map_err(|error| invalid(format!("The request is not a line of JSON: {error}")))?;
    let fields = value
        .as_object_mut()
        .ok_or_else(|| invalid("The request is not a JSON object".to_owned()))?;
    match fields
        .remove("protocol")
        .and_then(|version| version.as_u64())
    {
        Some(version) if version == u64::from(PROTOCOL) => {}
        Some(version) => {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("The request speaks protocol {version}, this tracker speaks {PROTOCOL}"),
            ));
        }
        None => {
            return Err(invalid(
                "The request lacks a number \"protocol\"".to_owned(),
            ));
        }
    }
    serde_json::from_value(value).map_err(|error| invalid(format!("Invalid request: {error}")))
}

/// The answer that stands for a result.
pub fn answer_of(result: Result<Value>) -> Answer {
    match result {
        Ok(value) => Answer::Ok(value),
        Err(error) => Answer::Error(WireError {
            kind: format!("{:?}", error.kind()).to_lowercase(),
            message: error.chain(),
        }),
    }
}

/// The error that an answer from the socket stands for.
pub fn error_of(wire: WireError) -> Error {
    let kind = match wire.kind.as_str() {
        "io" => ErrorKind::Io,
        "missing" => ErrorKind::Missing,
        "corrupt" => ErrorKind::Corrupt,
        "unsupported" => ErrorKind::Unsupported,
        "inuse" => ErrorKind::InUse,
        "invalid" => ErrorKind::Invalid,
        "mismatch" => ErrorKind::Mismatch,
        "state" => ErrorKind::State,
        _ => ErrorKind::Protocol,
    };
    Error::new(kind, wire.message)
}

fn encoding(error: serde_json::Error) -> Error {
    Error::new(
        ErrorKind::Protocol,
        "Cannot write a control message as JSON",
    )
    .with_source(error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn requests_survive_the_wire() {
        let requests = [
            Request::Status {},
            Request::Epochs {},
            Request::Cut {
                minimum: Epoch(7),
                keep: Keep::Changed,
            },
            Request::Cut {
                minimum: Epoch(8),
                keep: Keep::All,
            },
            Request::CaptureBegin { epoch: Epoch(1) },
            Request::CaptureEnd {
                epoch: Epoch(1),
                outcome: CaptureOutcome::Abandoned,
            },
            Request::Commit {
                epoch: Epoch(u64::MAX),
            },
            Request::Revert {},
            Request::Snapshot {},
            Request::Release {
                epoch: Epoch(3),
                done: true,
            },
            Request::Resize {
                disk: "root".to_owned(),
                size: NewSize::Present,
            },
            Request::Resize {
                disk: String::new(),
                size: NewSize::More(u64::MAX),
            },
        ];
        for request in requests {
            let line = encode_request(&request).unwrap();
            assert_eq!(decode_request(&line).unwrap(), request, "{line}");
        }
    }

    #[test]
    fn bad_requests_say_what_is_wrong() {
        let table = [
            ("", "not a line of JSON"),
            ("[]", "not a JSON object"),
            ("{\"command\":\"status\"}", "lacks a number \"protocol\""),
            ("{\"protocol\":2,\"command\":\"status\"}", "protocol 2"),
            ("{\"protocol\":1,\"command\":\"dance\"}", "dance"),
            ("{\"protocol\":1,\"command\":\"commit\"}", "epoch"),
            ("{\"protocol\":1,\"command\":\"revert\",\"more\":1}", "more"),
        ];
        for (line, expected) in table {
            let error = decode_request(line).unwrap_err();
            assert!(error.to_string().contains(expected), "{line}: {error}");
        }
    }

    proptest! {
        #[test]
        fn any_line_is_answered_and_none_panics(line in ".{0,200}") {
            let _ = decode_request(&line);
        }
    }
}
