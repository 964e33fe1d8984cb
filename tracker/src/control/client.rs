//! The client side of the control socket, blocking.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::de::DeserializeOwned;

use super::line::LineClient;
use super::protocol::{CaptureOutcome, Request, Resized, Snapshot, Status, encode_request};
use crate::disk::NewSize;
use crate::epoch::{Keep, MachineStatus};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::Epoch;

/// Time that the tracker has for one answer. A cut waits for the guest's writes in flight, twice
/// at worst.
const ANSWER_DEADLINE: Duration = Duration::from_secs(90);

/// A connection to a tracker's control socket.
#[derive(Debug)]
pub struct ControlClient {
    line: LineClient,
    path: PathBuf,
}

impl ControlClient {
    /// Connects.
    ///
    /// # Errors
    ///
    /// Nobody listens there.
    pub fn connect(path: &Path) -> Result<Self> {
        Ok(Self {
            line: LineClient::connect(path, "tracker", Some(ANSWER_DEADLINE))?,
            path: path.to_owned(),
        })
    }

    /// Everything about the tracker.
    pub fn status(&mut self) -> Result<Status> {
        self.ask(&Request::Status {})
    }

    /// The epochs of the machine.
    pub fn epochs(&mut self) -> Result<MachineStatus> {
        self.ask(&Request::Epochs {})
    }

    /// Closes the open epoch and returns its number; the next one is at least `minimum`.
    ///
    /// # Errors
    ///
    /// Of kind `State` where an epoch is closed already.
    pub fn cut(&mut self, minimum: Epoch) -> Result<Epoch> {
        let keep = Keep::Changed;
        self.ask(&Request::Cut { minimum, keep })
    }

    /// Says that the capture of the closed epoch begins.
    pub fn capture_begin(&mut self, epoch: Epoch) -> Result<()> {
        self.ask(&Request::CaptureBegin { epoch })
    }

    /// Says how the capture of the closed epoch ended. May be repeated.
    pub fn capture_end(&mut self, epoch: Epoch, outcome: CaptureOutcome) -> Result<()> {
        self.ask(&Request::CaptureEnd { epoch, outcome })
    }

    /// Says that the recovery point of the epoch is durable. May be repeated.
    pub fn commit(&mut self, epoch: Epoch) -> Result<()> {
        self.ask(&Request::Commit { epoch })
    }

    /// Says that the spool is lost. May be repeated.
    pub fn revert(&mut self) -> Result<()> {
        self.ask(&Request::Revert {})
    }

    /// Closes the open epoch and holds it.
    ///
    /// # Errors
    ///
    /// Of kind `State` where an epoch is closed already.
    pub fn snapshot(&mut self) -> Result<Snapshot> {
        self.ask(&Request::Snapshot {})
    }

    /// Ends a snapshot; with `done` its changes are taken over.
    ///
    /// # Errors
    ///
    /// Of kind `State` where it is not held.
    pub fn release(&mut self, epoch: Epoch, done: bool) -> Result<()> {
        self.ask(&Request::Release { epoch, done })
    }

    /// Lets a disk grow.
    ///
    /// # Errors
    ///
    /// There is no such disk, it is not tracked, or it cannot have that size.
    pub fn resize(&mut self, disk: &str, size: NewSize) -> Result<Resized> {
        let disk = disk.to_owned();
        self.ask(&Request::Resize { disk, size })
    }

    fn ask<T: DeserializeOwned>(&mut self, request: &Request) -> Result<T> {
        let value = self.line.ask(&encode_request(request)?)?;
        serde_json::from_value(value).map_err(|error| {
            let path = self.path.display();
            Error::new(
                ErrorKind::Protocol,
                format!("The answer from {path} is not one of a tracker of this version"),
            )
            .with_source(error)
        })
    }
}
