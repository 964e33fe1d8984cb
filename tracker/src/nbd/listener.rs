//! Sockets that clients reach the tracker by: a unix socket, and TCP where asked for.
//!
//! A unix socket that a dead tracker left behind is taken over; one that somebody still answers
//! on is not. Each accepted connection negotiates on a short-lived thread and is then handed to
//! a worker; connections are capped before a thread is spent on them.

use std::fs;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::error::{Error, ErrorKind, Result};

/// Longest path of a unix socket in bytes: `sun_path` of `unix(7)` less its final zero.
const SOCKET_PATH_BYTES_MAX: usize = 107;

/// One connection of either kind.
#[derive(Debug)]
pub enum Stream {
    /// Over a unix socket.
    Unix(UnixStream),
    /// Over TCP.
    Tcp(TcpStream),
}

impl Stream {
    /// Bounds every following read; `None` waits for ever.
    pub fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        match self {
            Self::Unix(stream) => stream.set_read_timeout(timeout),
            Self::Tcp(stream) => stream.set_read_timeout(timeout),
        }
    }

    /// Bounds every following write; `None` waits for ever.
    pub fn set_write_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        match self {
            Self::Unix(stream) => stream.set_write_timeout(timeout),
            Self::Tcp(stream) => stream.set_write_timeout(timeout),
        }
    }
}

impl Read for &Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Unix(stream) => (&*stream).read(buffer),
            Stream::Tcp(stream) => (&*stream).read(buffer),
        }
    }
}

impl Write for &Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Stream::Unix(stream) => (&*stream).write(bytes),
            Stream::Tcp(stream) => (&*stream).write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl From<Stream> for OwnedFd {
    fn from(stream: Stream) -> Self {
        match stream {
            Stream::Unix(stream) => stream.into(),
            Stream::Tcp(stream) => stream.into(),
        }
    }
}

/// A socket that is listened on.
#[derive(Debug)]
pub enum Listener {
    /// A unix socket and its path, which is removed at the end.
    Unix(UnixListener, PathBuf),
    /// A TCP port.
    Tcp(TcpListener),
}

impl Listener {
    /// Waits for the next connection.
    pub fn accept(&self) -> io::Result<Stream> {
        match self {
            Self::Unix(listener, _) => Ok(Stream::Unix(listener.accept()?.0)),
            Self::Tcp(listener) => {
                let (stream, _) = listener.accept()?;
                // Replies are sent in batches already; waiting for more only adds latency.
                stream.set_nodelay(true)?;
                Ok(Stream::Tcp(stream))
            }
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(listener, _) => listener.as_fd(),
            Self::Tcp(listener) => listener.as_fd(),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Self::Unix(_, path) = self {
            // A socket that stays behind is taken over at the next start.
            let _left = fs::remove_file(path);
        }
    }
}

/// Listens on a unix socket with the given permission bits.
///
/// # Errors
///
/// The path is too long, its directory is missing, something else stands there, or another
/// process answers on it.
pub fn bind_unix(path: &Path, mode: u32) -> Result<UnixListener> {
    let length = path.as_os_str().len();
    if length > SOCKET_PATH_BYTES_MAX {
        return Err(Error::new(
            ErrorKind::Invalid,
            format!(
                "Socket path {} has {length} bytes, unix sockets take {SOCKET_PATH_BYTES_MAX}: \
                 choose a shorter one",
                path.display()
            ),
        ));
    }
    if let Ok(metadata) = fs::symlink_metadata(path) {
        if !metadata.file_type().is_socket() {
            return Err(Error::new(
                ErrorKind::InUse,
                format!(
                    "{} exists and is not a socket: choose another path",
                    path.display()
                ),
            ));
        }
        if UnixStream::connect(path).is_ok() {
            return Err(Error::new(
                ErrorKind::InUse,
                format!(
                    "Socket {} is in use by a running process: stop it or choose another path",
                    path.display()
                ),
            ));
        }
        fs::remove_file(path).map_err(|error| {
            Error::io(
                format!("Cannot remove the stale socket {}", path.display()),
                error,
            )
        })?;
    }
    let listener = UnixListener::bind(path)
        .map_err(|error| Error::io(format!("Cannot listen on socket {}", path.display()), error))?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(|error| {
        Error::io(
            format!("Cannot set the permissions of socket {}", path.display()),
            error,
        )
    })?;
    Ok(listener)
}

/// Listens on a TCP port. Without TLS only loopback addresses are taken.
///
/// # Errors
///
/// The address is not a loopback address, or cannot be bound.
pub fn bind_tcp(address: SocketAddr) -> Result<TcpListener> {
    if !address.ip().is_loopback() {
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!(
                "Address {address} is not a loopback address: without TLS the disk is served on \
                 loopback and unix sockets only"
            ),
        ));
    }
    TcpListener::bind(address)
        .map_err(|error| Error::io(format!("Cannot listen on {address}"), error))
}
