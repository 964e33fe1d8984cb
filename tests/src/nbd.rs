//! A small NBD client: enough for well-behaved requests at depth, and raw access for the others.
//!
//! Source: NetworkBlockDevice/nbd, `doc/proto.md`. Its numbers are written down here a second time
//! on purpose: a constant that is wrong in the tracker must not be wrong in its tests too.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, StreamOwned};

/// Longest time that a peer may leave the client waiting.
const PATIENCE: Duration = Duration::from_secs(30);

/// Option and option reply numbers.
pub mod option {
    /// Choose an export without a reply to the option.
    pub const EXPORT_NAME: u32 = 1;
    /// End the negotiation.
    pub const ABORT: u32 = 2;
    /// List exports.
    pub const LIST: u32 = 3;
    /// Ask for TLS.
    pub const STARTTLS: u32 = 5;
    /// Describe an export.
    pub const INFO: u32 = 6;
    /// Choose an export.
    pub const GO: u32 = 7;
    /// Ask for structured replies.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// List meta contexts.
    pub const LIST_META_CONTEXT: u32 = 9;
    /// Select meta contexts.
    pub const SET_META_CONTEXT: u32 = 10;
    /// Ask for extended headers.
    pub const EXTENDED_HEADERS: u32 = 11;
    /// Reply: done.
    pub const ACK: u32 = 1;
    /// Reply: one export.
    pub const SERVER: u32 = 2;
    /// Reply: one item of information.
    pub const REPLY_INFO: u32 = 3;
    /// Reply: one meta context.
    pub const META_CONTEXT: u32 = 4;
    /// Reply: unknown option.
    pub const ERR_UNSUPPORTED: u32 = 0x8000_0001;
    /// Reply: not allowed.
    pub const ERR_POLICY: u32 = 0x8000_0002;
    /// Reply: malformed data.
    pub const ERR_INVALID: u32 = 0x8000_0003;
    /// Reply: not without TLS.
    pub const ERR_TLS_REQD: u32 = 0x8000_0005;
    /// Reply: no such export.
    pub const ERR_UNKNOWN: u32 = 0x8000_0006;
    /// Reply: the block size must be asked for.
    pub const ERR_BLOCK_SIZE_REQD: u32 = 0x8000_0008;
    /// Reply: too much data.
    pub const ERR_TOO_BIG: u32 = 0x8000_0009;
    /// Reply: extended headers are in use.
    pub const ERR_EXT_HEADER_REQD: u32 = 0x8000_000a;
}

/// Numbers of commands.
pub mod command {
    /// Read.
    pub const READ: u16 = 0;
    /// Write.
    pub const WRITE: u16 = 1;
    /// Disconnect.
    pub const DISCONNECT: u16 = 2;
    /// Flush.
    pub const FLUSH: u16 = 3;
    /// Trim.
    pub const TRIM: u16 = 4;
    /// Bring into the cache.
    pub const CACHE: u16 = 5;
    /// Write zeroes.
    pub const WRITE_ZEROES: u16 = 6;
    /// Ask meta contexts.
    pub const BLOCK_STATUS: u16 = 7;
    /// Flag: durable before the reply.
    pub const FUA: u16 = 1;
    /// Flag: stay allocated.
    pub const NO_HOLE: u16 = 2;
    /// Flag: data in one chunk.
    pub const DF: u16 = 4;
    /// Flag: one extent.
    pub const REQ_ONE: u16 = 8;
    /// Flag: zero fast or not at all.
    pub const FAST_ZERO: u16 = 16;
    /// Flag: the length is that of a payload.
    pub const PAYLOAD_LEN: u16 = 32;
}

/// Error numbers of replies.
pub mod errno {
    /// Not permitted.
    pub const EPERM: u32 = 1;
    /// Invalid argument.
    pub const EINVAL: u32 = 22;
    /// No space.
    pub const ENOSPC: u32 = 28;
    /// Too large.
    pub const EOVERFLOW: u32 = 75;
    /// Not supported.
    pub const ENOTSUP: u32 = 95;
    /// The server is shutting down.
    pub const ESHUTDOWN: u32 = 108;
}

/// A stream of either kind.
trait Channel: Read + Write + Send {
    /// Bounds every following write.
    fn limit_writes(&self, limit: Duration) -> io::Result<()>;
}

impl Channel for UnixStream {
    fn limit_writes(&self, limit: Duration) -> io::Result<()> {
        self.set_write_timeout(Some(limit))
    }
}

impl Channel for TcpStream {
    fn limit_writes(&self, limit: Duration) -> io::Result<()> {
        self.set_write_timeout(Some(limit))
    }
}

impl Channel for StreamOwned<ClientConnection, Box<dyn Channel>> {
    fn limit_writes(&self, limit: Duration) -> io::Result<()> {
        self.sock.limit_writes(limit)
    }
}

/// A connection before and during the negotiation. Everything on it can be made wrong.
pub struct Raw {
    channel: Box<dyn Channel>,
}

impl Raw {
    /// Connects to a unix socket and sends nothing.
    pub fn unix(path: &Path) -> io::Result<Self> {
        let stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(Self {
            channel: Box::new(stream),
        })
    }

    /// Connects to a TCP port and sends nothing.
    pub fn tcp(address: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect(address)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        stream.set_nodelay(true)?;
        Ok(Self {
            channel: Box::new(stream),
        })
    }

    /// Asks for TLS and goes on over it.
    ///
    /// # Errors
    ///
    /// The server refuses the option or the handshake.
    pub fn start_tls(mut self, config: &Arc<ClientConfig>) -> io::Result<Self> {
        let replies = self.ask(option::STARTTLS, &[])?;
        if replies != [(option::ACK, Vec::new())] {
            return Err(broken(&format!("STARTTLS was refused: {replies:?}")));
        }
        self.over_tls(config)
    }

    /// Begins TLS without having asked.
    ///
    /// # Errors
    ///
    /// The server refuses the handshake.
    pub fn over_tls(self, config: &Arc<ClientConfig>) -> io::Result<Self> {
        let name = ServerName::try_from("localhost").map_err(io::Error::other)?;
        let connection = ClientConnection::new(Arc::clone(config), name);
        let connection = connection.map_err(io::Error::other)?;
        let mut stream = StreamOwned::new(connection, self.channel);
        while stream.conn.is_handshaking() {
            stream.conn.complete_io(&mut stream.sock)?;
        }
        Ok(Self {
            channel: Box::new(stream),
        })
    }

    /// Sends bytes as they are.
    pub fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.channel.write_all(bytes)
    }

    /// Sends bytes as they are, and fails rather than wait long for the peer to take them.
    pub fn send_now(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.channel.limit_writes(Duration::from_millis(500))?;
        self.channel.write_all(bytes)
    }

    /// Receives exactly so many bytes.
    pub fn receive(&mut self, count: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; count];
        self.channel.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    /// Reads until the peer closes; the bytes that came before. A reset counts as closed.
    ///
    /// # Errors
    ///
    /// The peer neither sends nor closes.
    pub fn until_closed(&mut self) -> io::Result<Vec<u8>> {
        let mut all = Vec::new();
        let mut buffer = [0; 4096];
        loop {
            match self.channel.read(&mut buffer) {
                Ok(0) => return Ok(all),
                Ok(count) => all.extend_from_slice(&buffer[..count]),
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(all),
                Err(error) => return Err(error),
            }
        }
    }

    /// Receives the greeting, returns its flags, and answers with `client_flags`.
    pub fn greet(&mut self, client_flags: u32) -> io::Result<u16> {
        let greeting = self.receive(18)?;
        if &greeting[..16] != b"NBDMAGICIHAVEOPT" {
            return Err(broken("the greeting is not that of newstyle NBD"));
        }
        self.send(&client_flags.to_be_bytes())?;
        Ok(u16::from_be_bytes([greeting[16], greeting[17]]))
    }

    /// Asks by INFO for the minimum, preferred and maximum block size of an export, after the greeting.
    ///
    /// # Errors
    ///
    /// The connection is lost, or the answer has none.
    pub fn block_sizes(&mut self, export: &str) -> io::Result<[u32; 3]> {
        let replies = self.ask(option::INFO, &info_request(export, &[3]))?;
        match replies.last() {
            Some((option::ACK, _)) => {}
            _ => return Err(broken("INFO was not acknowledged")),
        }
        replies
            .iter()
            .find(|(kind, data)| *kind == option::REPLY_INFO && data.starts_with(&[0, 3]))
            .map(|(_, data)| [2, 6, 10].map(|at| word(&data[at..])))
            .ok_or_else(|| broken("block sizes were asked for"))
    }

    /// Sends an option.
    pub fn send_option(&mut self, number: u32, data: &[u8]) -> io::Result<()> {
        self.send(&option_bytes(number, data.len() as u32, data))
    }

    /// Receives one reply to an option: its type and data.
    pub fn receive_option_reply(&mut self, number: u32) -> io::Result<(u32, Vec<u8>)> {
        let head = self.receive(20)?;
        if head[..8] != 0x0003_e889_0455_65a9_u64.to_be_bytes() {
            return Err(broken("wrong magic in an option reply"));
        }
        if word(&head[8..]) != number {
            return Err(broken("the reply is to another option"));
        }
        let length = word(&head[16..]);
        if length > 1 << 20 {
            return Err(broken("an option reply is too long"));
        }
        Ok((word(&head[12..]), self.receive(length as usize)?))
    }

    /// Sends an option and receives all replies up to the final one.
    pub fn ask(&mut self, number: u32, data: &[u8]) -> io::Result<Vec<(u32, Vec<u8>)>> {
        self.send_option(number, data)?;
        let mut replies = Vec::new();
        loop {
            let reply = self.receive_option_reply(number)?;
            let last = reply.0 == option::ACK || reply.0 & 0x8000_0000 != 0;
            replies.push(reply);
            if last {
                return Ok(replies);
            }
        }
    }
}

/// Bytes of an option with any length field.
pub fn option_bytes(number: u32, length: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = b"IHAVEOPT".to_vec();
    bytes.extend_from_slice(&number.to_be_bytes());
    bytes.extend_from_slice(&length.to_be_bytes());
    bytes.extend_from_slice(data);
    bytes
}

/// Data of INFO and GO.
pub fn info_request(name: &str, wanted: &[u16]) -> Vec<u8> {
    let mut data = (name.len() as u32).to_be_bytes().to_vec();
    data.extend_from_slice(name.as_bytes());
    data.extend_from_slice(&(wanted.len() as u16).to_be_bytes());
    for kind in wanted {
        data.extend_from_slice(&kind.to_be_bytes());
    }
    data
}

/// Bytes of a request header.
pub fn request_bytes(flags: u16, number: u16, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
    let mut bytes = 0x2560_9513_u32.to_be_bytes().to_vec();
    bytes.extend_from_slice(&flags.to_be_bytes());
    bytes.extend_from_slice(&number.to_be_bytes());
    bytes.extend_from_slice(&cookie.to_be_bytes());
    bytes.extend_from_slice(&offset.to_be_bytes());
    bytes.extend_from_slice(&length.to_be_bytes());
    bytes
}

/// Data of LIST_META_CONTEXT and SET_META_CONTEXT.
pub fn context_request(export: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = (export.len() as u32).to_be_bytes().to_vec();
    data.extend_from_slice(export.as_bytes());
    data.extend_from_slice(&(queries.len() as u32).to_be_bytes());
    for query in queries {
        data.extend_from_slice(&(query.len() as u32).to_be_bytes());
        data.extend_from_slice(query.as_bytes());
    }
    data
}

/// Bytes of an extended request header.
pub fn extended_bytes(flags: u16, number: u16, cookie: u64, offset: u64, length: u64) -> Vec<u8> {
    let mut bytes = 0x21e4_1c71_u32.to_be_bytes().to_vec();
    bytes.extend_from_slice(&flags.to_be_bytes());
    bytes.extend_from_slice(&number.to_be_bytes());
    bytes.extend_from_slice(&cookie.to_be_bytes());
    bytes.extend_from_slice(&offset.to_be_bytes());
    bytes.extend_from_slice(&length.to_be_bytes());
    bytes
}

pub(crate) fn word(bytes: &[u8]) -> u32 {
    u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

pub(crate) fn broken(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// Why a request has no good answer.
#[derive(Debug)]
pub enum Failure {
    /// The server answered with this error number.
    Refused(u32),
    /// The connection is lost or out of step.
    Lost(io::Error),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Lost(error)
    }
}

/// An answer to one request.
#[derive(Debug)]
pub struct Reply {
    /// The cookie of the request.
    pub cookie: u64,
    /// Zero, or an error number.
    pub error: u32,
    /// What a READ read.
    pub data: Vec<u8>,
}

/// A connection in transmission.
pub struct Client {
    raw: Raw,
    size_bytes: u64,
    flags: u16,
    next_cookie: u64,
    reads: HashMap<u64, usize>,
    in_flight: usize,
}

impl Client {
    /// Connects to a unix socket and chooses an export; the empty name is the default one.
    pub fn unix(path: &Path, export: &str) -> io::Result<Self> {
        Self::negotiate(Raw::unix(path)?, export)
    }

    /// Connects to a TCP port and chooses an export.
    pub fn tcp(address: SocketAddr, export: &str) -> io::Result<Self> {
        Self::negotiate(Raw::tcp(address)?, export)
    }

    /// Connects to a TCP port, goes over to TLS and chooses an export.
    pub fn tls(address: SocketAddr, export: &str, config: &Arc<ClientConfig>) -> io::Result<Self> {
        let mut raw = Raw::tcp(address)?;
        raw.greet(3)?;
        Self::choose(raw.start_tls(config)?, export)
    }

    fn negotiate(mut raw: Raw, export: &str) -> io::Result<Self> {
        raw.greet(3)?;
        Self::choose(raw, export)
    }

    /// Chooses an export by GO.
    ///
    /// # Errors
    ///
    /// The server refuses or breaks the protocol.
    pub fn choose(mut raw: Raw, export: &str) -> io::Result<Self> {
        let replies = raw.ask(option::GO, &info_request(export, &[]))?;
        let described = replies
            .iter()
            .find(|(kind, data)| *kind == option::REPLY_INFO && data.starts_with(&[0, 0]));
        let (Some((_, data)), Some((option::ACK, _))) = (described, replies.last()) else {
            return Err(broken(&format!("GO was refused: {replies:?}")));
        };
        if data.len() != 12 {
            return Err(broken("the description of the export is malformed"));
        }
        let size: [u8; 8] = data[2..10].try_into().map_err(|_| broken("size"))?;
        Ok(Self::after_negotiation(
            raw,
            u64::from_be_bytes(size),
            u16::from_be_bytes([data[10], data[11]]),
        ))
    }

    /// A client on a connection that was negotiated by hand.
    pub fn after_negotiation(raw: Raw, size_bytes: u64, flags: u16) -> Self {
        Self {
            raw,
            size_bytes,
            flags,
            next_cookie: 1,
            reads: HashMap::new(),
            in_flight: 0,
        }
    }

    /// Size of the export in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Transmission flags of the export.
    pub fn flags(&self) -> u16 {
        self.flags
    }

    /// The raw connection, for input that no client should send.
    pub fn raw(&mut self) -> &mut Raw {
        &mut self.raw
    }

    /// Requests without a reply yet.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Sends a request and returns its cookie. `payload` is empty for all but WRITE.
    pub fn submit(
        &mut self,
        flags: u16,
        number: u16,
        offset: u64,
        length: u32,
        payload: &[u8],
    ) -> io::Result<u64> {
        let cookie = self.next_cookie;
        self.next_cookie += 1;
        let mut bytes = request_bytes(flags, number, cookie, offset, length);
        bytes.extend_from_slice(payload);
        self.raw.send(&bytes)?;
        if number == command::READ {
            self.reads.insert(cookie, length as usize);
        }
        self.in_flight += 1;
        Ok(cookie)
    }

    /// Receives the next reply, of whichever request.
    pub fn receive(&mut self) -> io::Result<Reply> {
        let head = self.raw.receive(16)?;
        if word(&head) != 0x6744_6698 {
            return Err(broken("wrong magic in a reply"));
        }
        let cookie: [u8; 8] = head[8..].try_into().map_err(|_| broken("cookie"))?;
        let cookie = u64::from_be_bytes(cookie);
        if cookie == 0 || cookie >= self.next_cookie || self.in_flight == 0 {
            return Err(broken("a reply that nobody waits for"));
        }
        self.in_flight -= 1;
        let error = word(&head[4..]);
        let data = match self.reads.remove(&cookie) {
            Some(length) if error == 0 => self.raw.receive(length)?,
            _ => Vec::new(),
        };
        Ok(Reply {
            cookie,
            error,
            data,
        })
    }

    /// One request and its reply; nothing else may be in flight.
    pub fn call(
        &mut self,
        flags: u16,
        number: u16,
        offset: u64,
        length: u32,
        payload: &[u8],
    ) -> Result<Vec<u8>, Failure> {
        let cookie = self.submit(flags, number, offset, length, payload)?;
        let reply = self.receive()?;
        if reply.cookie != cookie {
            return Err(broken("the reply has another cookie").into());
        }
        if reply.error == 0 {
            Ok(reply.data)
        } else {
            Err(Failure::Refused(reply.error))
        }
    }

    /// Reads.
    pub fn read(&mut self, offset: u64, length: u32) -> Result<Vec<u8>, Failure> {
        self.call(0, command::READ, offset, length, &[])
    }

    /// Writes.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result<(), Failure> {
        self.call(0, command::WRITE, offset, data.len() as u32, data)
            .map(drop)
    }

    /// Flushes.
    pub fn flush(&mut self) -> Result<(), Failure> {
        self.call(0, command::FLUSH, 0, 0, &[]).map(drop)
    }

    /// Trims.
    pub fn trim(&mut self, offset: u64, length: u32) -> Result<(), Failure> {
        self.call(0, command::TRIM, offset, length, &[]).map(drop)
    }

    /// Writes zeroes.
    pub fn zero(&mut self, offset: u64, length: u32) -> Result<(), Failure> {
        self.call(0, command::WRITE_ZEROES, offset, length, &[])
            .map(drop)
    }

    /// Says goodbye, and waits until the server has closed.
    ///
    /// # Errors
    ///
    /// The server sends something or does not close.
    pub fn disconnect(mut self) -> io::Result<()> {
        self.raw
            .send(&request_bytes(0, command::DISCONNECT, 0, 0, 0))?;
        let rest = self.raw.until_closed()?;
        if rest.is_empty() {
            Ok(())
        } else {
            Err(broken("bytes after the last reply"))
        }
    }
}
