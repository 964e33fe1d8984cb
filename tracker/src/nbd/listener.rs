//! Sockets that clients reach the tracker by: a unix socket, and TCP where asked for.
//!
//! A unix socket that a dead tracker left behind is taken over; one that somebody still answers
//! on is not. A socket may also come from the service manager, and stays its own. Each accepted
//! connection negotiates on a short-lived thread and is then handed to a worker; connections are
//! capped before a thread is spent on them.
//!
//! TCP without TLS stays on this machine unless it was asked for by name, whoever made the socket.

use std::fmt;
use std::fs;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{Shutdown, setsockopt, shutdown, sockopt};

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

    /// Who is on the other side, as far as that can be told.
    pub fn peer(&self) -> String {
        match self {
            Self::Unix(_) => "a unix socket".to_owned(),
            Self::Tcp(stream) => stream
                .peer_addr()
                .map_or_else(|_| "TCP".to_owned(), |address| address.to_string()),
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

/// Where NBD may be spoken over TCP without TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plaintext {
    /// Nowhere: clients must use TLS, and any address will do.
    Nowhere,
    /// On loopback addresses, and no other may be listened on.
    Loopback,
    /// On every address.
    Anywhere,
}

impl Plaintext {
    /// Checks that an address may be listened on.
    ///
    /// # Errors
    ///
    /// It would carry the disk in the clear, and that was not asked for.
    fn require_allowed(self, address: SocketAddr) -> Result<()> {
        if self != Self::Loopback || address.ip().to_canonical().is_loopback() {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::Unsupported,
            format!(
                "Address {address} is not a loopback address, and without TLS everybody on the \
                 way could read and change the disk: give --tls-cert and --tls-key without \
                 --tls allowed, or --allow-plaintext-network where the network is trusted"
            ),
        ))
    }
}

/// A socket that is listened on.
#[derive(Debug)]
pub struct Listener {
    socket: Socket,
    origin: Origin,
}

#[derive(Debug)]
enum Socket {
    Unix(UnixListener),
    Tcp(TcpListener),
}

/// Whose the socket is, and how an `accept` that waits on it is ended.
#[derive(Debug)]
enum Origin {
    /// Ours: shut down, and its path is removed.
    Bound(Option<PathBuf>),
    /// The service manager's, which goes on listening: only we stop to wait.
    Inherited(EventFd),
}

impl Listener {
    /// Listens on a unix socket, as [`bind_unix`].
    ///
    /// # Errors
    ///
    /// Those of [`bind_unix`].
    pub fn unix(path: &Path, mode: u32) -> Result<Self> {
        Ok(Self {
            socket: Socket::Unix(bind_unix(path, mode)?),
            origin: Origin::Bound(Some(path.to_owned())),
        })
    }

    /// Listens on a TCP port, as [`bind_tcp`].
    ///
    /// # Errors
    ///
    /// Those of [`bind_tcp`].
    pub fn tcp(address: SocketAddr, plaintext: Plaintext) -> Result<Self> {
        Ok(Self {
            socket: Socket::Tcp(bind_tcp(address, plaintext)?),
            origin: Origin::Bound(None),
        })
    }

    /// A unix socket that the service manager listens on.
    ///
    /// # Errors
    ///
    /// Descriptors have run out.
    pub fn inherited_unix(listener: UnixListener) -> Result<Self> {
        let socket = listener.set_nonblocking(true).map(|()| listener);
        Self::inherited(socket.map(Socket::Unix))
    }

    /// A TCP port that the service manager listens on. Before the first `accept` it must be
    /// checked by [`Self::require_allowed`].
    ///
    /// # Errors
    ///
    /// Descriptors have run out.
    pub fn inherited_tcp(listener: TcpListener) -> Result<Self> {
        let socket = listener.set_nonblocking(true).map(|()| listener);
        Self::inherited(socket.map(Socket::Tcp))
    }

    fn inherited(socket: io::Result<Socket>) -> Result<Self> {
        let unusable = "Cannot wait on a socket of the service manager";
        Ok(Self {
            socket: socket.map_err(|error| Error::io(unusable, error))?,
            origin: Origin::Inherited(
                EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
                    .map_err(|errno| Error::io(unusable, errno))?,
            ),
        })
    }

    /// Checks the address of a socket that somebody else has bound.
    ///
    /// # Errors
    ///
    /// It is a TCP address that may not be listened on.
    pub fn require_allowed(&self, plaintext: Plaintext) -> Result<()> {
        let Socket::Tcp(listener) = &self.socket else {
            return Ok(());
        };
        let address = listener
            .local_addr()
            .map_err(|error| Error::io("Cannot read the address of a socket", error))?;
        plaintext.require_allowed(address)
    }

    /// It is a TCP port.
    pub fn is_tcp(&self) -> bool {
        matches!(self.socket, Socket::Tcp(_))
    }

    /// Waits for the next connection.
    ///
    /// # Errors
    ///
    /// Those of `accept(2)`; after [`Self::close`] one that is none of a single connection.
    pub fn accept(&self) -> io::Result<Stream> {
        loop {
            if let Origin::Inherited(closed) = &self.origin {
                self.await_arrival(closed)?;
            }
            match self.accept_now() {
                // The peer left between the two.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                accepted => return accepted,
            }
        }
    }

    fn accept_now(&self) -> io::Result<Stream> {
        match &self.socket {
            Socket::Unix(listener) => Ok(Stream::Unix(listener.accept()?.0)),
            Socket::Tcp(listener) => {
                let (stream, _) = listener.accept()?;
                // Replies are sent in batches already; waiting for more only adds latency.
                stream.set_nodelay(true)?;
                notice_silence(&stream)?;
                Ok(Stream::Tcp(stream))
            }
        }
    }

    fn await_arrival(&self, closed: &EventFd) -> io::Result<()> {
        let mut watched = [
            PollFd::new(closed.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.as_fd(), PollFlags::POLLIN),
        ];
        poll(&mut watched, PollTimeout::NONE)?;
        if watched[0].any().unwrap_or(false) {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        Ok(())
    }

    /// Ends every `accept`, now and later.
    pub fn close(&self) {
        match &self.origin {
            Origin::Bound(_) => {
                let _closed = shutdown(self.as_fd().as_raw_fd(), Shutdown::Both);
            }
            Origin::Inherited(closed) => {
                let _full = closed.write(1);
            }
        }
    }

    /// The path of a unix socket.
    pub fn unix_path(&self) -> Option<PathBuf> {
        match &self.socket {
            Socket::Unix(listener) => Some(listener.local_addr().ok()?.as_pathname()?.to_owned()),
            Socket::Tcp(_) => None,
        }
    }
}

impl fmt::Display for Listener {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.socket {
            Socket::Unix(_) => match self.unix_path() {
                Some(path) => write!(formatter, "{}", path.display()),
                None => formatter.write_str("a unix socket without a path"),
            },
            Socket::Tcp(listener) => match listener.local_addr() {
                Ok(address) => write!(formatter, "{address}"),
                Err(_) => formatter.write_str("a TCP socket"),
            },
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.socket {
            Socket::Unix(listener) => listener.as_fd(),
            Socket::Tcp(listener) => listener.as_fd(),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Origin::Bound(Some(path)) = &self.origin {
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

/// Listens on a TCP port.
///
/// # Errors
///
/// The address may not be listened on, or cannot be bound.
pub fn bind_tcp(address: SocketAddr, plaintext: Plaintext) -> Result<TcpListener> {
    plaintext.require_allowed(address)?;
    TcpListener::bind(address)
        .map_err(|error| Error::io(format!("Cannot listen on {address}"), error))
}

/// Has the kernel ask a silent peer whether it still lives, and give a connection up after two
/// minutes without an answer: a machine that lost its power does not say goodbye, and would keep
/// its place among the connections for ever.
fn notice_silence(stream: &TcpStream) -> io::Result<()> {
    setsockopt(stream, sockopt::KeepAlive, &true)?;
    setsockopt(stream, sockopt::TcpKeepIdle, &60)?;
    setsockopt(stream, sockopt::TcpKeepInterval, &10)?;
    setsockopt(stream, sockopt::TcpKeepCount, &6)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A listener as a service manager hands it over, and the manager's own descriptor of it.
    fn inherited(path: &Path) -> (Listener, UnixListener) {
        let manager = bind_unix(path, 0o600).unwrap();
        let ours = manager.try_clone().unwrap();
        (Listener::inherited_unix(ours).unwrap(), manager)
    }

    #[test]
    fn an_inherited_socket_outlives_its_user() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let (listener, manager) = inherited(&path);
        let _client = UnixStream::connect(&path).unwrap();
        listener.accept().unwrap();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| listener.accept());
            listener.close();
            let error = waiting.join().unwrap().unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
        });
        drop(listener);
        // The next user of the socket sees who came in between.
        let _between = UnixStream::connect(&path).unwrap();
        let next = Listener::inherited_unix(manager).unwrap();
        assert_eq!(next.unix_path().as_deref(), Some(path.as_path()));
        next.accept().unwrap();
    }

    #[test]
    fn a_bound_socket_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let listener = Listener::unix(&path, 0o600).unwrap();
        assert_eq!(listener.to_string(), path.display().to_string());
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| listener.accept());
            listener.close();
            assert!(waiting.join().unwrap().is_err());
        });
        drop(listener);
        assert!(!path.exists());
    }

    #[test]
    fn without_tls_only_loopback_is_served() {
        for (address, is_here) in [
            ("0.0.0.0:0", false),
            ("[::]:0", false),
            ("192.0.2.1:1", false),
            ("127.0.0.1:0", true),
            ("127.8.9.1:0", true),
            ("[::1]:0", true),
            ("[::ffff:127.0.0.1]:0", true),
            ("[::ffff:192.0.2.1]:0", false),
        ] {
            let address: SocketAddr = address.parse().unwrap();
            let allowed = Plaintext::Loopback.require_allowed(address);
            assert_eq!(allowed.is_ok(), is_here, "{address}");
            assert!(Plaintext::Nowhere.require_allowed(address).is_ok());
            assert!(Plaintext::Anywhere.require_allowed(address).is_ok());
        }
    }

    #[test]
    fn inherited_sockets_obey_the_same_rule() {
        let everywhere = TcpListener::bind("0.0.0.0:0").unwrap();
        let everywhere = Listener::inherited_tcp(everywhere).unwrap();
        let error = everywhere.require_allowed(Plaintext::Loopback).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(everywhere.require_allowed(Plaintext::Nowhere).is_ok());
        let here = TcpListener::bind("127.0.0.1:0").unwrap();
        let here = Listener::inherited_tcp(here).unwrap();
        assert!(here.require_allowed(Plaintext::Loopback).is_ok());
    }

    #[test]
    fn a_silent_peer_is_asked_whether_it_lives() {
        use nix::sys::socket::getsockopt;
        let address = "127.0.0.1:0".parse().unwrap();
        let listener = Listener::tcp(address, Plaintext::Loopback).unwrap();
        let address: SocketAddr = listener.to_string().parse().unwrap();
        let _client = TcpStream::connect(address).unwrap();
        let Stream::Tcp(stream) = listener.accept().unwrap() else {
            panic!("it is TCP")
        };
        assert!(getsockopt(&stream, sockopt::KeepAlive).unwrap());
        assert_eq!(getsockopt(&stream, sockopt::TcpKeepIdle).unwrap(), 60);
    }
}
