//! `tracker attach`: a disk of a tracker as `/dev/nbdN`, by the kernel's own client.
//!
//! Overview: this process connects and negotiates (`client`), hands the sockets to the kernel by
//! generic netlink (`kernel`, `wire`), and stays to replace a connection that dies (`keeper`).
//! No data pass through it: the kernel and the tracker talk over the sockets directly.
//!
//! What a lost connection means: requests that were not sent yet wait for the next connection;
//! those that were sent and not answered are sent again when they are older than the time limit
//! of a request. Both are a pause to whoever has mounted the device. Only where no tracker comes
//! back in time do they become errors.
//!
//! A disk that grows: the device takes the new size at a SIGHUP, and whenever it is connected anew.
//!
//! What it does not handle: the end of this process. The device works on without it, but then
//! nobody reconnects.

mod device;
mod keeper;
mod kernel;
mod wire;

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

pub use device::Device;

use self::keeper::Keeper;
use self::kernel::{Connect, Kernel};
use super::client::{self, ExportInfo};
use super::handshake::DEADLINE;
use super::wire::transmission_flags;
use crate::error::{Error, ErrorKind, Result};

/// Time between two looks at a device that is on its way out.
const DETACH_INTERVAL: Duration = Duration::from_millis(20);
/// Time for it.
const DETACH_DEADLINE: Duration = Duration::from_secs(10);

/// Checked arguments of `tracker attach`.
#[derive(Clone, Debug)]
pub struct AttachOptions {
    /// The device.
    pub device: Device,
    /// The tracker's unix socket.
    pub socket: PathBuf,
    /// The export's name; empty for the only one.
    pub name: String,
    /// Logical block size in bytes.
    pub block_size: u32,
    /// Time that a request may take; whole seconds, not zero.
    pub timeout: Duration,
    /// Time that requests wait for a tracker to come back; whole seconds, not zero.
    pub dead_connection_timeout: Duration,
    /// Connections.
    pub connections: usize,
}

/// Attaches a device and keeps its connections alive until it is detached.
///
/// `ready` is called with a description once the device can be used.
///
/// # Errors
///
/// The server or the kernel refuses, or no server came back in time after the last one was lost.
pub fn attach(options: &AttachOptions, ready: impl FnOnce(&str)) -> Result<()> {
    let signals = block_signals()?;
    let mut kernel = Kernel::open()?;
    let device = options.device;
    if let Some(process) = device.attached_by() {
        return Err(Error::new(
            ErrorKind::InUse,
            format!(
                "{device} is attached already, by process {process}: `tracker detach {device}`, \
                 or choose another device"
            ),
        ));
    }
    let (streams, export) = connect_all(options)?;
    let block_size = block_size(options, &export)?;
    // Only who knows it may give the device connections: an attach that outlived its device must
    // not touch what somebody else has attached since.
    let identifier = format!("tidemark-{}", uuid::Uuid::new_v4());
    let connect = Connect {
        device,
        size_bytes: export.size_bytes,
        block_size,
        server_flags: export.flags,
        timeout_seconds: options.timeout.as_secs(),
        dead_connection_seconds: options.dead_connection_timeout.as_secs(),
        identifier: &identifier,
    };
    let sockets: Vec<_> = streams.iter().map(AsFd::as_fd).collect();
    kernel.connect(&connect, &sockets)?;
    let marks_sockets = streams.first().map_or(Ok(false), keeper::is_taken)?;
    ready(&describe(options, &export));
    Keeper {
        options,
        export,
        identifier,
        kernel,
        marks_sockets,
        signals,
        streams,
    }
    .run()
}

/// Detaches a device.
///
/// # Errors
///
/// It is not attached, or mounted and not `force`d, or the caller is not root.
pub fn detach(device: Device, force: bool) -> Result<()> {
    let mut kernel = Kernel::open()?;
    if device.attached_by().is_none() {
        return Err(Error::new(
            ErrorKind::State,
            format!("{device} is not attached: see `lsblk`"),
        ));
    }
    if !force && device.is_held()? {
        return Err(Error::new(
            ErrorKind::InUse,
            format!("{device} is mounted or in use: unmount it first"),
        ));
    }
    let identifier = device.backend();
    kernel.disconnect(device)?;
    // The kernel lets go of it when the last reader has closed it.
    let deadline = Instant::now() + DETACH_DEADLINE;
    while device.attached_by().is_some() && device.backend() == identifier {
        if Instant::now() >= deadline {
            return Err(Error::new(
                ErrorKind::InUse,
                format!("{device} is disconnected but still open: close who has it open"),
            ));
        }
        std::thread::sleep(DETACH_INTERVAL);
    }
    Ok(())
}

/// The signals that the keeper takes as a descriptor, before anything is attached.
fn block_signals() -> Result<SignalFd> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    signals.add(Signal::SIGHUP);
    signals
        .thread_block()
        .and_then(|()| SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC))
        .map_err(|errno| Error::io("Cannot block signals", errno))
}

fn connect_all(options: &AttachOptions) -> Result<(Vec<UnixStream>, ExportInfo)> {
    let open = || client::open(&options.socket, &options.name, Instant::now() + DEADLINE);
    let (first, export) = open()?;
    if options.connections > 1 && !export.has(transmission_flags::CAN_MULTI_CONN) {
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!(
                "The server on {} does not offer several connections: use --connections 1",
                options.socket.display()
            ),
        ));
    }
    let mut streams = vec![first];
    while streams.len() < options.connections {
        let (stream, other) = open()?;
        if other != export {
            return Err(Error::new(
                ErrorKind::Mismatch,
                format!(
                    "The server on {} changed while it was connected to: try again",
                    options.socket.display()
                ),
            ));
        }
        streams.push(stream);
    }
    Ok((streams, export))
}

/// The block size that was asked for, if the server takes requests of it.
fn block_size(options: &AttachOptions, export: &ExportInfo) -> Result<u32> {
    let wanted = options.block_size;
    if export.block_size_minimum > wanted {
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!(
                "The server takes requests of {} bytes at least: use --block-size",
                export.block_size_minimum
            ),
        ));
    }
    if !export.size_bytes.is_multiple_of(u64::from(wanted)) {
        return Err(Error::new(
            ErrorKind::Invalid,
            format!(
                "The export has {} bytes, no multiple of {wanted}: use a smaller --block-size",
                export.size_bytes
            ),
        ));
    }
    Ok(wanted)
}

fn describe(options: &AttachOptions, export: &ExportInfo) -> String {
    let access = if export.has(transmission_flags::READ_ONLY) {
        "read-only"
    } else {
        "read-write"
    };
    let count = options.connections;
    let plural = if count == 1 { "" } else { "s" };
    format!(
        "{} is export {:?} of {}, {} bytes, {access}, {count} connection{plural}",
        options.device,
        options.name,
        options.socket.display(),
        export.size_bytes,
    )
}
