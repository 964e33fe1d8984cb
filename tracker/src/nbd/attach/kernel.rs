//! Talks to the kernel's nbd client over generic netlink.
//!
//! Every request is acknowledged before the next is sent, so that one number names what is waited
//! for. Descriptors are numbers of this process, which the kernel resolves while it carries out
//! the request.

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto,
    setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;

use super::device::Device;
use super::wire::{self, Message, attribute, command, controller};
use crate::error::{Error, ErrorKind, Result};

/// Time that the kernel has for an answer. A disconnect waits for the device's readers.
const ANSWER_SECONDS: i64 = 60;
/// Larger than any answer: an error quotes the request.
const ANSWER_BYTES_MAX: usize = 16 << 10;

/// A device that is to be made.
#[derive(Debug)]
pub struct Connect<'a> {
    /// Which one.
    pub device: Device,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// Its logical block size in bytes.
    pub block_size: u32,
    /// The export's transmission flags.
    pub server_flags: u16,
    /// Seconds until a request is sent again on another connection.
    pub timeout_seconds: u64,
    /// Seconds that requests wait for a connection.
    pub dead_connection_seconds: u64,
    /// Text that later requests must know.
    pub identifier: &'a str,
}

/// What became of a connection that was offered to a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Offered {
    /// The kernel has answered with success, which it does as well where it needed none.
    Acknowledged,
    /// The device is not attached any more, or by somebody else.
    Gone,
}

/// A netlink socket that knows the nbd family.
#[derive(Debug)]
pub struct Kernel {
    socket: OwnedFd,
    family: u16,
    sequence: u32,
}

impl Kernel {
    /// Opens a netlink socket and looks the family up.
    ///
    /// # Errors
    ///
    /// The kernel has no generic netlink, or its nbd module is not loaded.
    pub fn open() -> Result<Self> {
        let unusable = |errno| Error::io("Cannot use generic netlink", errno);
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkGeneric,
        )
        .map_err(unusable)?;
        let limit = TimeVal::new(ANSWER_SECONDS, 0);
        setsockopt(&socket, sockopt::ReceiveTimeout, &limit).map_err(unusable)?;
        let mut kernel = Self {
            socket,
            family: wire::GENL_ID_CTRL,
            sequence: 0,
        };
        kernel.family = kernel.find_family()?;
        Ok(kernel)
    }

    fn find_family(&mut self) -> Result<u16> {
        let request = self
            .request(controller::CTRL_CMD_GETFAMILY)
            .text(controller::CTRL_ATTR_FAMILY_NAME, "nbd");
        let mut family = None;
        self.exchange(request, |message| {
            let number = message.attribute(controller::CTRL_ATTR_FAMILY_ID);
            family = family.or(number.and_then(|bytes| bytes.try_into().ok()));
        })
        .map_err(|errno| match errno {
            Errno::ENOENT => Error::new(ErrorKind::Missing, no_family()),
            errno => Error::io("Cannot find the kernel's nbd client", errno),
        })?;
        let family = family.ok_or_else(|| {
            Error::new(
                ErrorKind::Protocol,
                "The kernel gives no number for its nbd client",
            )
        })?;
        Ok(u16::from_ne_bytes(family))
    }

    /// Makes a device of connections that are ready for requests.
    ///
    /// # Errors
    ///
    /// The device is in use, or the caller is not root.
    pub fn connect(&mut self, connect: &Connect<'_>, sockets: &[BorrowedFd<'_>]) -> Result<()> {
        let device = connect.device;
        let request = self
            .request(command::NBD_CMD_CONNECT)
            .u32(attribute::NBD_ATTR_INDEX, device.index())
            .u64(attribute::NBD_ATTR_SIZE_BYTES, connect.size_bytes)
            .u64(
                attribute::NBD_ATTR_BLOCK_SIZE_BYTES,
                connect.block_size.into(),
            )
            .u64(
                attribute::NBD_ATTR_SERVER_FLAGS,
                connect.server_flags.into(),
            )
            // The device stays when it is closed, and its node when it is detached.
            .u64(attribute::NBD_ATTR_CLIENT_FLAGS, 0)
            .u64(attribute::NBD_ATTR_TIMEOUT, connect.timeout_seconds)
            .u64(
                attribute::NBD_ATTR_DEAD_CONN_TIMEOUT,
                connect.dead_connection_seconds,
            )
            .text(attribute::NBD_ATTR_BACKEND_IDENTIFIER, connect.identifier);
        let request = with_sockets(request, sockets);
        self.exchange(request, |_| {}).map_err(|errno| match errno {
            Errno::EBUSY => Error::new(
                ErrorKind::InUse,
                format!("{device} is in use: detach it, or choose another device"),
            ),
            errno => refused("attach", device, errno),
        })
    }

    /// Offers a device a connection for one that it has lost.
    ///
    /// # Errors
    ///
    /// The kernel does not want it for another reason than that the device is gone.
    pub fn reconfigure(
        &mut self,
        device: Device,
        identifier: &str,
        socket: BorrowedFd<'_>,
    ) -> Result<Offered> {
        let request = self
            .request(command::NBD_CMD_RECONFIGURE)
            .u32(attribute::NBD_ATTR_INDEX, device.index())
            .text(attribute::NBD_ATTR_BACKEND_IDENTIFIER, identifier);
        match self.exchange(with_sockets(request, &[socket]), |_| {}) {
            Ok(()) => Ok(Offered::Acknowledged),
            Err(Errno::EINVAL | Errno::ENOENT | Errno::ENODEV | Errno::EBUSY) => Ok(Offered::Gone),
            Err(errno) => Err(refused("reconnect", device, errno)),
        }
    }

    /// Tells a device that it is larger by now, also while it is mounted.
    ///
    /// # Errors
    ///
    /// The kernel refuses, or the device is not attached any more.
    pub fn resize(&mut self, device: Device, identifier: &str, size_bytes: u64) -> Result<()> {
        let request = self
            .request(command::NBD_CMD_RECONFIGURE)
            .u32(attribute::NBD_ATTR_INDEX, device.index())
            .u64(attribute::NBD_ATTR_SIZE_BYTES, size_bytes)
            .text(attribute::NBD_ATTR_BACKEND_IDENTIFIER, identifier);
        self.exchange(request, |_| {})
            .map_err(|errno| refused("resize", device, errno))
    }

    /// Takes a device apart. One that is not attached is no error.
    ///
    /// # Errors
    ///
    /// There is no such device, or the caller is not root.
    pub fn disconnect(&mut self, device: Device) -> Result<()> {
        let request = self
            .request(command::NBD_CMD_DISCONNECT)
            .u32(attribute::NBD_ATTR_INDEX, device.index());
        self.exchange(request, |_| {}).map_err(|errno| match errno {
            Errno::EINVAL | Errno::ENOENT | Errno::ENODEV => Error::io(
                format!("There is no device {device}: see /sys/block"),
                errno,
            ),
            errno => refused("detach", device, errno),
        })
    }

    fn request(&mut self, command: u8) -> Message {
        self.sequence = self.sequence.wrapping_add(1);
        Message::new(self.family, command, self.sequence)
    }

    /// Sends a request and reads until it is acknowledged; `see` is shown what comes before.
    fn exchange(
        &self,
        request: Message,
        mut see: impl FnMut(&wire::Received<'_>),
    ) -> nix::Result<()> {
        let kernel = NetlinkAddr::new(0, 0);
        let socket = self.socket.as_raw_fd();
        sendto(socket, &request.finish(), &kernel, MsgFlags::empty())?;
        let mut buffer = vec![0; ANSWER_BYTES_MAX];
        loop {
            let count = match recv(socket, &mut buffer, MsgFlags::empty()) {
                Err(Errno::EINTR) => continue,
                Err(Errno::EAGAIN) => return Err(Errno::ETIMEDOUT),
                count => count?,
            };
            let datagram = buffer.get(..count).unwrap_or_default();
            for message in wire::received(datagram) {
                if message.sequence != self.sequence {
                    continue;
                }
                match message.error_number() {
                    Some(0) => return Ok(()),
                    Some(number) => return Err(Errno::from_raw(number)),
                    None => see(&message),
                }
            }
        }
    }
}

/// Why the family is not there: the module is not, or it is and answers the host alone.
fn no_family() -> &'static str {
    if Path::new("/sys/module/nbd").exists() {
        "The kernel's nbd client cannot be reached from this container: attach on the host"
    } else {
        "The kernel has no nbd client: load it with `modprobe nbd`"
    }
}

fn with_sockets(request: Message, sockets: &[BorrowedFd<'_>]) -> Message {
    request.nest(attribute::NBD_ATTR_SOCKETS, |mut list| {
        for socket in sockets {
            // A descriptor is never negative.
            let number = socket.as_raw_fd() as u32;
            list = list.nest(attribute::NBD_SOCK_ITEM, |item| {
                item.u32(attribute::NBD_SOCK_FD, number)
            });
        }
        list
    })
}

fn refused(what: &str, device: Device, errno: Errno) -> Error {
    let help = match errno {
        Errno::EPERM | Errno::EACCES => ": only root may; use sudo",
        _ => "",
    };
    Error::io(format!("The kernel does not {what} {device}{help}"), errno)
}
