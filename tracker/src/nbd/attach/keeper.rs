//! Keeps the connections of an attached device alive.
//!
//! The process holds its own descriptor of each socket that it has given to the kernel. When the
//! tracker goes away, or the kernel gives a connection up because a request took too long, the
//! socket hangs up; then a new connection is negotiated and offered to the kernel.
//!
//! A disk that has grown is found at each new connection, and at a SIGHUP, since nothing in the
//! protocol tells a client of it. The kernel is told of the size after it has the connection.
//!
//! Order: the new connection is negotiated first, then offered, and the old descriptor is closed
//! when the kernel has taken the new one. Nothing is written to disk; a kill at any moment leaves a
//! device that works as long as its connections do.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use nix::sys::signalfd::SignalFd;

use super::AttachOptions;
use super::kernel::{Kernel, Offered};
use crate::error::{Error, ErrorKind, Result};
use crate::nbd::client::{self, ExportInfo};
use crate::nbd::handshake::DEADLINE;

/// Time between two attempts to reach a tracker.
const CONNECT_INTERVAL: Duration = Duration::from_millis(100);
/// Time between two offers of a connection to the kernel.
const OFFER_INTERVAL: Duration = Duration::from_millis(20);
/// Offers of one connection: the kernel notices a loss within moments.
const OFFERS_MAX: usize = 250;

/// An attached device with its connections.
#[derive(Debug)]
pub struct Keeper<'a> {
    /// What was asked for.
    pub options: &'a AttachOptions,
    /// What the device is made of; another server must say the same, or of more bytes.
    pub export: ExportInfo,
    /// What the kernel knows the device by.
    pub identifier: String,
    /// The way to the kernel.
    pub kernel: Kernel,
    /// Whether this kernel shows that it has taken a socket.
    pub marks_sockets: bool,
    /// SIGTERM and SIGINT, which end the process, and SIGHUP, at which it looks at the export again.
    pub signals: SignalFd,
    /// One stream for each connection of the kernel.
    pub streams: Vec<UnixStream>,
}

/// Whether the kernel has taken a socket.
///
/// It answers an offer with success also where it has not noticed the loss yet and takes nothing.
/// It sets the device's time limit on each socket that it takes, and by that it is seen.
///
/// # Errors
///
/// The socket cannot be asked.
pub fn is_taken(stream: &UnixStream) -> Result<bool> {
    stream
        .write_timeout()
        .map(|limit| limit.is_some())
        .map_err(|error| Error::io("Cannot read the time limit of a socket", error))
}

/// What ended a wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Event {
    /// The connection of this index hung up.
    Lost(usize),
    /// The process is to end.
    End,
    /// The export is to be looked at.
    Look,
    /// The time ran out.
    Timeout,
}

/// What an attempt to replace a connection led to.
#[derive(Debug)]
enum Attempt {
    Reconnected,
    /// The device is not ours any more.
    Gone,
    /// Not yet; why.
    Failed(Error),
}

impl Keeper<'_> {
    /// Runs until the device is detached, by whomever, or a signal comes.
    ///
    /// # Errors
    ///
    /// No server came back in time; the device is detached then.
    pub fn run(mut self) -> Result<()> {
        let device = self.options.device;
        loop {
            match self.wait(None)? {
                Event::Lost(index) => {
                    if !self.replace(index)? {
                        return Ok(());
                    }
                }
                Event::End => return self.leave(),
                Event::Look => self.look(),
                Event::Timeout => {}
            }
            if !self.is_attached() {
                tracing::info!("{device} was detached");
                return Ok(());
            }
        }
    }

    /// Detaches at a signal, unless the device is in use: pulling a disk from under a file system
    /// is worse than a disk that does not reconnect.
    fn leave(&mut self) -> Result<()> {
        let device = self.options.device;
        if !self.is_attached() {
            return Ok(());
        }
        if device.is_held()? {
            tracing::warn!("{device} is in use and stays attached, but nothing reconnects it now");
            return Ok(());
        }
        self.kernel.disconnect(device)
    }

    /// Replaces a lost connection. False if the process is done.
    fn replace(&mut self, index: usize) -> Result<bool> {
        let options = self.options;
        let (device, socket) = (options.device, options.socket.display());
        let begin = Instant::now();
        let mut reported = false;
        loop {
            let failure = match self.attempt(index, begin + options.dead_connection_timeout)? {
                Attempt::Gone => {
                    tracing::info!("{device} was detached");
                    return Ok(false);
                }
                Attempt::Reconnected => {
                    let seconds = begin.elapsed().as_secs_f64();
                    tracing::info!("{device} is connected to {socket} again after {seconds:.1} s");
                    return Ok(true);
                }
                Attempt::Failed(error) => error,
            };
            if !reported {
                reported = true;
                tracing::warn!(
                    "{device} has lost {socket} and waits for it for {} s: {}",
                    options.dead_connection_timeout.as_secs(),
                    failure.chain()
                );
            }
            if begin.elapsed() >= options.dead_connection_timeout {
                self.kernel.disconnect(device)?;
                return Err(Error::new(
                    ErrorKind::Missing,
                    format!(
                        "{device} lost {socket} for {} s and is detached: start the tracker, \
                         unmount, and attach again",
                        options.dead_connection_timeout.as_secs()
                    ),
                )
                .with_source(failure));
            }
            if self.wait(Some(CONNECT_INTERVAL))? == Event::End {
                self.leave()?;
                return Ok(false);
            }
        }
    }

    /// Tries once to replace a connection.
    fn attempt(&mut self, index: usize, deadline: Instant) -> Result<Attempt> {
        if !self.is_attached() {
            return Ok(Attempt::Gone);
        }
        let options = self.options;
        let deadline = deadline.min(Instant::now() + DEADLINE);
        let (stream, export) = match client::open(&options.socket, &options.name, deadline) {
            Ok(opened) => opened,
            Err(error) => return Ok(Attempt::Failed(error)),
        };
        if !self.is_ours(&export) {
            return Ok(Attempt::Failed(Error::new(
                ErrorKind::Mismatch,
                format!(
                    "The server on {} has another disk now ({} bytes, flags {:#x}; before {} \
                     bytes, flags {:#x})",
                    options.socket.display(),
                    export.size_bytes,
                    export.flags,
                    self.export.size_bytes,
                    self.export.flags
                ),
            )));
        }
        for _ in 0..OFFERS_MAX {
            let offered =
                self.kernel
                    .reconfigure(options.device, &self.identifier, stream.as_fd())?;
            if offered == Offered::Gone {
                return Ok(Attempt::Gone);
            }
            if !self.marks_sockets || is_taken(&stream)? {
                if let Some(old) = self.streams.get_mut(index) {
                    *old = stream;
                }
                self.take_size(&export);
                return Ok(Attempt::Reconnected);
            }
            std::thread::sleep(OFFER_INTERVAL);
        }
        Ok(Attempt::Failed(Error::new(
            ErrorKind::State,
            "The kernel does not take a new connection: see `dmesg`",
        )))
    }

    /// Whether a server serves what the device was made of, which may have grown since.
    fn is_ours(&self, export: &ExportInfo) -> bool {
        let as_before = ExportInfo {
            size_bytes: self.export.size_bytes,
            ..*export
        };
        as_before == self.export && export.size_bytes >= self.export.size_bytes
    }

    /// Asks the server how large the export is by now. Whatever goes wrong leaves the device as it is.
    fn look(&mut self) {
        let options = self.options;
        let deadline = Instant::now() + DEADLINE;
        match client::open(&options.socket, &options.name, deadline) {
            Ok((_stream, export)) if self.is_ours(&export) => self.take_size(&export),
            Ok((_stream, export)) => tracing::warn!(
                "The server on {} has another disk now, of {} bytes: {} stays as it is",
                options.socket.display(),
                export.size_bytes,
                options.device
            ),
            Err(error) => tracing::warn!("{}", error.chain()),
        }
    }

    /// Makes the device as large as the export, if that has grown.
    fn take_size(&mut self, export: &ExportInfo) {
        let (options, size_bytes) = (self.options, export.size_bytes);
        let device = options.device;
        if size_bytes == self.export.size_bytes || !self.is_attached() {
            return;
        }
        if !size_bytes.is_multiple_of(u64::from(options.block_size)) {
            tracing::warn!(
                "{device} cannot take {size_bytes} bytes: they are no multiple of its blocks of {} \
                 bytes",
                options.block_size
            );
            return;
        }
        match self.kernel.resize(device, &self.identifier, size_bytes) {
            Ok(()) => {
                self.export.size_bytes = size_bytes;
                tracing::info!("{device} has {size_bytes} bytes");
            }
            Err(error) => tracing::warn!("{}", error.chain()),
        }
    }

    /// Whether the device is still the one that this process attached.
    fn is_attached(&self) -> bool {
        let device = self.options.device;
        let ours = device
            .backend()
            .is_none_or(|identifier| identifier == self.identifier);
        device.attached_by().is_some() && ours
    }

    /// Waits for a signal, and for a lost connection where no limit is given.
    fn wait(&self, limit: Option<Duration>) -> Result<Event> {
        let mut watched = vec![PollFd::new(self.signals.as_fd(), PollFlags::POLLIN)];
        let mut timeout = PollTimeout::NONE;
        if let Some(limit) = limit {
            timeout = PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX);
        } else {
            // POLLHUP is always reported; the replies are the kernel's to read.
            let hangs_up = |stream| PollFd::new(stream, PollFlags::empty());
            watched.extend(self.streams.iter().map(|stream| hangs_up(stream.as_fd())));
        }
        match poll(&mut watched, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(Error::io("Cannot wait for sockets", errno)),
        }
        let happened = |watched: &PollFd<'_>| watched.any().unwrap_or(false);
        match watched.iter().position(happened) {
            Some(0) => {
                // Taken from the queue, so that a wait that follows is not ended by it again.
                let taken = self.signals.read_signal().ok().flatten();
                let is_look = taken.is_some_and(|info| info.ssi_signo == Signal::SIGHUP as u32);
                Ok(if is_look { Event::Look } else { Event::End })
            }
            Some(place) => Ok(Event::Lost(place - 1)),
            None => Ok(Event::Timeout),
        }
    }
}
