//! The other side of the negotiation: chooses an export as a client, for the kernel to use.
//!
//! Source: NetworkBlockDevice/nbd, `doc/proto.md`, "Fixed newstyle negotiation" and "NBD_OPT_GO".
//! One deadline stands over connecting and negotiating, and nothing is allocated for a length
//! before it has been checked: the server may be any.
//!
//! What it does not handle: TLS and structured replies, which the kernel's client does not know.

use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use zerocopy::{FromBytes, IntoBytes};

use super::wire::{
    INIT_MAGIC, OPTION_MAGIC, OPTION_REPLY_MAGIC, OptionHeader, OptionReplyHeader, handshake_flags,
    info, option, option_reply,
};
use crate::error::{Error, ErrorKind, Result};

/// Largest data of an option's reply that is read; texts of errors have some hundred bytes.
const REPLY_BYTES_MAX: u32 = 16 << 10;
/// Replies to one option; a server sends one for each kind of information.
const REPLIES_MAX: usize = 64;
/// Set in the type of every reply that is an error.
const ERROR_BIT: u32 = 1 << 31;

/// What a server says about an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExportInfo {
    /// Size in bytes.
    pub size_bytes: u64,
    /// Bits of [`super::wire::transmission_flags`].
    pub flags: u16,
    /// Smallest request that the server takes.
    pub block_size_minimum: u32,
}

impl ExportInfo {
    /// Whether all of these transmission flags are set.
    pub fn has(&self, flags: u16) -> bool {
        self.flags & flags == flags
    }
}

/// Connects to a server's unix socket and chooses an export; the stream is ready for requests.
///
/// # Errors
///
/// Nobody answers on the socket, the server breaks the protocol or is slower than the deadline, or
/// it has no such export ([`ErrorKind::Missing`]).
pub fn open(path: &Path, name: &str, deadline: Instant) -> Result<(UnixStream, ExportInfo)> {
    let stream = connect_unix(path)?;
    let info = negotiate(&stream, name, deadline).map_err(|failure| failure.explain(path, name))?;
    let unbounded = stream
        .set_read_timeout(None)
        .and_then(|()| stream.set_write_timeout(None));
    unbounded.map_err(|error| Error::io("Cannot reset the time limits of a socket", error))?;
    Ok((stream, info))
}

/// Connects without waiting: where the queue of connections is full, the server is stuck.
fn connect_unix(path: &Path) -> Result<UnixStream> {
    let context = || {
        format!(
            "Cannot connect to socket {}: is the tracker running",
            path.display()
        )
    };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket: OwnedFd = socket(AddressFamily::Unix, SockType::Stream, flags, None)
        .map_err(|errno| Error::io("Cannot make a unix socket", errno))?;
    UnixAddr::new(path)
        .and_then(|address| connect(socket.as_raw_fd(), &address))
        .map_err(|errno| Error::io(context(), errno))?;
    let stream = UnixStream::from(socket);
    stream
        .set_nonblocking(false)
        .map_err(|error| Error::io(context(), error))?;
    Ok(stream)
}

/// Why a negotiation ended without an export.
#[derive(Debug)]
enum Failure {
    /// The connection failed, or the server broke the protocol.
    Channel(io::Error),
    /// The server answered with an error and perhaps a text.
    Refused { kind: u32, text: String },
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Channel(error)
    }
}

impl Failure {
    fn explain(self, path: &Path, name: &str) -> Error {
        let socket = path.display();
        let (kind, text) = match self {
            Self::Channel(error) => {
                return Error::io(
                    format!("Cannot negotiate with the server on {socket}"),
                    error,
                );
            }
            Self::Refused { kind, text } => (kind, text),
        };
        match kind {
            option_reply::ERR_UNKNOWN if name.is_empty() => Error::new(
                ErrorKind::Missing,
                format!("The server on {socket} has no default export: choose one with --name"),
            ),
            option_reply::ERR_UNKNOWN => Error::new(
                ErrorKind::Missing,
                format!("The server on {socket} has no export {name:?}: see its --disk options"),
            ),
            _ => Error::new(
                ErrorKind::Unsupported,
                format!(
                    "The server on {socket} refuses export {name:?} with error {:#x} {text:?}",
                    kind & !ERROR_BIT
                ),
            ),
        }
    }
}

fn violation(what: String) -> Failure {
    Failure::Channel(io::Error::new(
        io::ErrorKind::InvalidData,
        format!("the server sent {what}"),
    ))
}

fn negotiate(
    stream: &UnixStream,
    name: &str,
    deadline: Instant,
) -> std::result::Result<ExportInfo, Failure> {
    let mut channel = Channel { stream, deadline };
    let mut greeting = [0; 18];
    channel.receive(&mut greeting)?;
    let mut expected = INIT_MAGIC.to_be_bytes().to_vec();
    expected.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
    let offered = u16::from_be_bytes([greeting[16], greeting[17]]);
    if greeting[..16] != expected || offered & handshake_flags::FIXED_NEWSTYLE == 0 {
        return Err(violation("no greeting of fixed newstyle NBD".into()));
    }
    let known = handshake_flags::FIXED_NEWSTYLE | handshake_flags::NO_ZEROES;
    channel.send(&u32::from(offered & known).to_be_bytes())?;
    channel.send(&go(name))?;

    let mut export = None;
    let mut minimum = 1;
    for _ in 0..REPLIES_MAX {
        let (kind, data) = channel.receive_reply(option::GO)?;
        match kind {
            option_reply::ACK => {
                let (size_bytes, flags) =
                    export.ok_or_else(|| violation("no size of the export".into()))?;
                return Ok(ExportInfo {
                    size_bytes,
                    flags,
                    block_size_minimum: minimum,
                });
            }
            option_reply::INFO => match parse_info(&data) {
                Some(Info::Export(size_bytes, flags)) => export = Some((size_bytes, flags)),
                Some(Info::BlockSize(size)) => minimum = size,
                Some(Info::Other) => {}
                None => return Err(violation(format!("information of {} bytes", data.len()))),
            },
            kind if kind & ERROR_BIT != 0 => {
                let text = String::from_utf8_lossy(&data).into_owned();
                return Err(Failure::Refused { kind, text });
            }
            kind => return Err(violation(format!("reply type {kind} to GO"))),
        }
    }
    Err(violation(format!("more than {REPLIES_MAX} replies to GO")))
}

/// The option GO for an export, asking for its block sizes.
fn go(name: &str) -> Vec<u8> {
    let mut data = (name.len() as u32).to_be_bytes().to_vec();
    data.extend_from_slice(name.as_bytes());
    data.extend_from_slice(&1_u16.to_be_bytes());
    data.extend_from_slice(&info::BLOCK_SIZE.to_be_bytes());
    let header = OptionHeader {
        magic: OPTION_MAGIC.into(),
        option: option::GO.into(),
        length: (data.len() as u32).into(),
    };
    [header.as_bytes(), &data].concat()
}

/// One item of information.
#[derive(Debug, PartialEq, Eq)]
enum Info {
    Export(u64, u16),
    BlockSize(u32),
    Other,
}

fn parse_info(data: &[u8]) -> Option<Info> {
    let (kind, rest) = data.split_first_chunk::<2>()?;
    match u16::from_be_bytes(*kind) {
        info::EXPORT => {
            let (size, flags) = rest.split_first_chunk::<8>()?;
            let flags = u16::from_be_bytes(flags.try_into().ok()?);
            Some(Info::Export(u64::from_be_bytes(*size), flags))
        }
        info::BLOCK_SIZE => {
            let (minimum, others) = rest.split_first_chunk::<4>()?;
            (others.len() == 8).then(|| Info::BlockSize(u32::from_be_bytes(*minimum)))
        }
        _ => Some(Info::Other),
    }
}

/// The socket under the deadline.
struct Channel<'a> {
    stream: &'a UnixStream,
    deadline: Instant,
}

impl Channel<'_> {
    fn remaining(&self) -> io::Result<Duration> {
        let remaining = self.deadline.saturating_duration_since(Instant::now());
        if remaining.is_zero() {
            let text = "the negotiation took too long";
            return Err(io::Error::new(io::ErrorKind::TimedOut, text));
        }
        Ok(remaining)
    }

    fn receive(&mut self, mut buffer: &mut [u8]) -> io::Result<()> {
        while !buffer.is_empty() {
            self.stream.set_read_timeout(Some(self.remaining()?))?;
            match self.stream.read(buffer) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => buffer = buffer.get_mut(count..).unwrap_or_default(),
                // A time limit that ran out shows as WouldBlock; the next look at the deadline
                // says what it was.
                Err(error) if is_passing(&error) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn send(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            self.stream.set_write_timeout(Some(self.remaining()?))?;
            match self.stream.write(bytes) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => bytes = bytes.get(count..).unwrap_or_default(),
                Err(error) if is_passing(&error) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// The type and data of the next reply to an option.
    fn receive_reply(&mut self, option: u32) -> std::result::Result<(u32, Vec<u8>), Failure> {
        let mut header = [0; size_of::<OptionReplyHeader>()];
        self.receive(&mut header)?;
        let header = OptionReplyHeader::read_from_bytes(&header)
            .map_err(|_| violation("a reply's header of the wrong size".into()))?;
        if header.magic.get() != OPTION_REPLY_MAGIC || header.option.get() != option {
            return Err(violation("a reply to something else".into()));
        }
        let length = header.length.get();
        if length > REPLY_BYTES_MAX {
            return Err(violation(format!("a reply of {length} bytes")));
        }
        let mut data = vec![0; length as usize];
        self.receive(&mut data)?;
        Ok((header.kind.get(), data))
    }
}

fn is_passing(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SOON: Duration = Duration::from_secs(10);

    fn greeting() -> Vec<u8> {
        [
            &INIT_MAGIC.to_be_bytes()[..],
            &OPTION_MAGIC.to_be_bytes(),
            &3_u16.to_be_bytes(),
        ]
        .concat()
    }

    fn reply(kind: u32, data: &[u8]) -> Vec<u8> {
        [
            &OPTION_REPLY_MAGIC.to_be_bytes()[..],
            &option::GO.to_be_bytes(),
            &kind.to_be_bytes(),
            &(data.len() as u32).to_be_bytes(),
            data,
        ]
        .concat()
    }

    /// What the client makes of a server that sends these bytes and then closes.
    fn talk(bytes: &[u8]) -> (std::result::Result<ExportInfo, Failure>, Vec<u8>) {
        let (client, mut server) = UnixStream::pair().unwrap();
        server.write_all(bytes).unwrap();
        server.shutdown(std::net::Shutdown::Write).unwrap();
        let result = negotiate(&client, "disk", Instant::now() + SOON);
        drop(client);
        let mut sent = Vec::new();
        // A client that leaves with replies unread resets the connection.
        let _reset = server.read_to_end(&mut sent);
        (result, sent)
    }

    #[test]
    fn an_export_is_chosen() {
        let export = [&[0, 0][..], &(1_u64 << 30).to_be_bytes(), &[1, 0x0d]].concat();
        let sizes = [&[0, 3][..], &[0, 0, 2, 0], &[0, 0, 16, 0], &[2, 0, 0, 0]].concat();
        let bytes = [
            greeting(),
            reply(option_reply::INFO, &export),
            reply(option_reply::INFO, &[0, 2, b'x']),
            reply(option_reply::INFO, &sizes),
            reply(option_reply::ACK, &[]),
        ]
        .concat();
        let (result, sent) = talk(&bytes);
        let info = result.unwrap();
        assert_eq!((info.size_bytes, info.block_size_minimum), (1 << 30, 512));
        assert!(info.has(1 << 8 | 1 << 3) && !info.has(1 << 1));
        let expected = [
            &[0, 0, 0, 3][..],
            b"IHAVEOPT",
            &[0, 0, 0, 7, 0, 0, 0, 12, 0, 0, 0, 4],
            b"disk",
            &[0, 1, 0, 3],
        ]
        .concat();
        assert_eq!(sent, expected);
    }

    #[test]
    fn refusals_say_what_to_do() {
        let text = b"There is no export";
        let bytes = [greeting(), reply(option_reply::ERR_UNKNOWN, text)].concat();
        let failure = talk(&bytes).0.unwrap_err();
        let error = failure.explain(Path::new("/run/s"), "disk");
        assert_eq!(error.kind(), ErrorKind::Missing);
        assert!(error.chain().contains("no export \"disk\""), "{error}");
    }

    #[test]
    fn servers_that_break_the_protocol_are_left() {
        let long = [
            &OPTION_REPLY_MAGIC.to_be_bytes()[..],
            &[0, 0, 0, 7, 0, 0, 0, 3, 255, 255, 255, 255],
        ]
        .concat();
        let cases = [
            Vec::new(),
            b"SSH-2.0-OpenSSH_9.2 and more of it".to_vec(),
            greeting(),
            [greeting(), reply(option_reply::ACK, &[])].concat(),
            [greeting(), reply(option_reply::INFO, &[0, 0, 1])].concat(),
            [greeting(), reply(9, &[])].concat(),
            [greeting(), long].concat(),
        ];
        for bytes in cases {
            let result = talk(&bytes).0;
            assert!(matches!(result, Err(Failure::Channel(_))), "{result:?}");
        }
    }

    #[test]
    fn a_silent_server_costs_the_deadline() {
        let (client, _server) = UnixStream::pair().unwrap();
        let result = negotiate(&client, "", Instant::now() + Duration::from_millis(30));
        let Err(Failure::Channel(error)) = result else {
            panic!("{result:?}")
        };
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }

    proptest! {
        #[test]
        fn information_never_panics(data in prop::collection::vec(any::<u8>(), 0..32)) {
            let _ = parse_info(&data);
        }
    }
}
