//! The small NBD client for replies in chunks: structured replies, meta contexts, extended headers.
//! It checks on every reply what the specification demands of any.
//!
//! Source: NetworkBlockDevice/nbd, `doc/proto.md`, and its branch `extension-ext-header`. As in
//! `nbd`, the numbers are written down a second time on purpose.

use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::nbd::{
    Raw, broken, command, context_request, extended_bytes, info_request, option, request_bytes,
    word,
};
use crate::site::Site;

/// Types of chunks.
pub mod chunk {
    /// Nothing.
    pub const NONE: u16 = 0;
    /// Data.
    pub const OFFSET_DATA: u16 = 1;
    /// A hole.
    pub const OFFSET_HOLE: u16 = 2;
    /// Descriptors of 32 bits.
    pub const BLOCK_STATUS: u16 = 5;
    /// Descriptors of 64 bits.
    pub const BLOCK_STATUS_EXT: u16 = 6;
    /// An error.
    pub const ERROR: u16 = 0x8001;
    /// An error at an offset.
    pub const ERROR_OFFSET: u16 = 0x8002;
}

/// One chunk of a reply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Its type.
    pub kind: u16,
    /// What follows the header.
    pub payload: Vec<u8>,
}

/// A whole reply.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Answer {
    /// The error number of a simple reply; `None` if the reply came in chunks.
    pub simple: Option<u32>,
    /// The chunks.
    pub chunks: Vec<Chunk>,
}

/// Extents of one context: lengths and flags.
pub type Extents = Vec<(u64, u64)>;

impl Answer {
    /// The error number, zero for success.
    ///
    /// # Panics
    ///
    /// An error chunk is malformed.
    pub fn error(&self) -> u32 {
        let failed = self.chunks.iter().find(|chunk| chunk.kind & 0x8000 != 0);
        let Some(failed) = failed else {
            return self.simple.unwrap_or(0);
        };
        let length = usize::from(u16::from_be_bytes([failed.payload[4], failed.payload[5]]));
        let text = std::str::from_utf8(&failed.payload[6..6 + length]).expect("UTF-8");
        assert!(!text.is_empty() && length <= 4096, "an error tells why");
        let rest = if failed.kind == chunk::ERROR_OFFSET {
            8
        } else {
            0
        };
        assert_eq!(failed.payload.len(), 6 + length + rest);
        word(&failed.payload)
    }

    /// The data of a READ and how many of its bytes came as holes.
    ///
    /// # Panics
    ///
    /// The chunks fail, overlap, leave a gap or lie outside the request.
    pub fn assemble(&self, offset: u64, length: usize) -> (Vec<u8>, usize) {
        assert_eq!(self.error(), 0);
        assert_eq!(self.simple, None, "a READ is answered in chunks");
        let (mut data, mut covered) = (vec![0; length], vec![false; length]);
        let mut hole_bytes = 0;
        for Chunk { kind, payload } in &self.chunks {
            if *kind == chunk::NONE {
                continue;
            }
            let at = u64::from_be_bytes(payload[..8].try_into().expect("8 bytes"));
            let start = at.checked_sub(offset).expect("inside the request") as usize;
            let count = if *kind == chunk::OFFSET_HOLE {
                assert_eq!(payload.len(), 12);
                hole_bytes += word(&payload[8..]) as usize;
                word(&payload[8..]) as usize
            } else {
                assert_eq!(*kind, chunk::OFFSET_DATA);
                data[start..start + payload.len() - 8].copy_from_slice(&payload[8..]);
                payload.len() - 8
            };
            assert!(count > 0, "an empty chunk");
            for byte in &mut covered[start..start + count] {
                assert!(!*byte, "chunks overlap");
                *byte = true;
            }
        }
        assert!(covered.iter().all(|byte| *byte), "a gap between chunks");
        (data, hole_bytes)
    }

    /// What each context says, by its number.
    ///
    /// # Panics
    ///
    /// The chunks fail or are malformed.
    pub fn status(&self) -> Vec<(u32, Extents)> {
        assert_eq!(self.error(), 0);
        let long = |bytes: &[u8]| u64::from_be_bytes(bytes.try_into().expect("8 bytes"));
        let extents = |payload: &[u8], kind: u16| -> Extents {
            if kind == chunk::BLOCK_STATUS_EXT {
                assert_eq!(payload.len(), 8 + 16 * word(&payload[4..]) as usize);
                let pairs = payload[8..].chunks_exact(16);
                return pairs.map(|p| (long(&p[..8]), long(&p[8..]))).collect();
            }
            assert_eq!((kind, payload.len() % 8), (chunk::BLOCK_STATUS, 4));
            let pairs = payload[4..].chunks_exact(8);
            pairs
                .map(|p| (word(p).into(), word(&p[4..]).into()))
                .collect()
        };
        self.chunks
            .iter()
            .map(|chunk| {
                let extents = extents(&chunk.payload, chunk.kind);
                assert!(!extents.is_empty() && extents.iter().all(|extent| extent.0 > 0));
                (word(&chunk.payload), extents)
            })
            .collect()
    }
}

/// A connection in transmission whose replies come in chunks.
pub struct ChunkClient {
    raw: Raw,
    extended: bool,
    /// Size of the export in bytes.
    pub size_bytes: u64,
    /// Transmission flags of the export.
    pub flags: u16,
    /// Numbers and names of the selected contexts.
    pub contexts: Vec<(u32, String)>,
    next_cookie: u64,
}

impl ChunkClient {
    /// Connects and chooses an export, with structured replies or extended headers.
    ///
    /// # Errors
    ///
    /// The server does not agree.
    pub fn connect(
        path: &Path,
        export: &str,
        extended: bool,
        contexts: &[&str],
    ) -> io::Result<Self> {
        let mut raw = Raw::unix(path)?;
        raw.greet(3)?;
        let number = if extended {
            option::EXTENDED_HEADERS
        } else {
            option::STRUCTURED_REPLY
        };
        if raw.ask(number, &[])? != [(option::ACK, Vec::new())] {
            return Err(broken("chunks were refused"));
        }
        let mut selected = Vec::new();
        if !contexts.is_empty() {
            selected = select(&mut raw, export, contexts)?;
        }
        let replies = raw.ask(option::GO, &info_request(export, &[]))?;
        let info = replies
            .iter()
            .find(|(kind, data)| *kind == option::REPLY_INFO && data.len() == 12)
            .ok_or_else(|| broken("GO was refused"))?;
        let size: [u8; 8] = info.1[2..10].try_into().map_err(|_| broken("size"))?;
        Ok(Self {
            raw,
            extended,
            size_bytes: u64::from_be_bytes(size),
            flags: u16::from_be_bytes([info.1[10], info.1[11]]),
            contexts: selected,
            next_cookie: 1,
        })
    }

    /// The raw connection, for input that no client should send.
    pub fn raw(&mut self) -> &mut Raw {
        &mut self.raw
    }

    /// The number of a selected context.
    ///
    /// # Panics
    ///
    /// It was not selected.
    pub fn id(&self, name: &str) -> u32 {
        let found = self.contexts.iter().find(|context| context.1 == name);
        found.expect("the context was selected").0
    }

    /// Sends a request as it is; with extended headers a payload sets the flag for it.
    ///
    /// # Errors
    ///
    /// The connection is lost.
    pub fn submit(
        &mut self,
        flags: u16,
        number: u16,
        offset: u64,
        length: u64,
        payload: &[u8],
    ) -> io::Result<u64> {
        let cookie = self.next_cookie;
        self.next_cookie += 1;
        let mut bytes = if self.extended {
            let has_payload = if payload.is_empty() {
                0
            } else {
                command::PAYLOAD_LEN
            };
            extended_bytes(flags | has_payload, number, cookie, offset, length)
        } else {
            request_bytes(flags, number, cookie, offset, length as u32)
        };
        bytes.extend_from_slice(payload);
        self.raw.send(&bytes)?;
        Ok(cookie)
    }

    /// Receives the reply to the only request in flight.
    ///
    /// # Errors
    ///
    /// The connection is lost, or the reply breaks a rule that holds for all.
    pub fn receive(&mut self, cookie: u64, offset: u64) -> io::Result<Answer> {
        let mut answer = Answer::default();
        loop {
            let mut head = self.raw.receive(16)?;
            if !self.extended && word(&head) == 0x6744_6698 && answer.chunks.is_empty() {
                if head[8..] != cookie.to_be_bytes() {
                    return Err(broken("the reply has another cookie"));
                }
                answer.simple = Some(word(&head[4..]));
                return Ok(answer);
            }
            let (magic, rest) = if self.extended {
                (0x6e8a_278c, 16)
            } else {
                (0x668e_33ef, 4)
            };
            head.extend(self.raw.receive(rest)?);
            if word(&head) != magic || head[8..16] != cookie.to_be_bytes() {
                return Err(broken("wrong magic or cookie in a chunk"));
            }
            if self.extended && head[16..24] != offset.to_be_bytes() {
                return Err(broken("a chunk with another offset than its request"));
            }
            if self.extended && head[24..28] != [0; 4] {
                return Err(broken("a chunk of more than 32 bits of length"));
            }
            let length = word(&head[head.len() - 4..]) as usize;
            let kind = u16::from_be_bytes([head[6], head[7]]);
            let done = head[4..6] == [0, 1];
            if head[4..6] != [0, 0] && !done || kind == chunk::NONE && (!done || length > 0) {
                return Err(broken("wrong flags or length in a chunk"));
            }
            let payload = self.raw.receive(length)?;
            answer.chunks.push(Chunk { kind, payload });
            if done {
                return Ok(answer);
            }
        }
    }

    /// One request and its reply.
    ///
    /// # Panics
    ///
    /// The connection is lost or the reply breaks the protocol.
    #[track_caller]
    pub fn call(
        &mut self,
        flags: u16,
        number: u16,
        offset: u64,
        length: u64,
        payload: &[u8],
    ) -> Answer {
        self.submit(flags, number, offset, length, payload)
            .and_then(|cookie| self.receive(cookie, offset))
            .unwrap_or_else(|error| panic!("command {number} at {offset}: {error}"))
    }

    /// Writes; it must succeed.
    #[track_caller]
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        let answer = self.call(0, command::WRITE, offset, data.len() as u64, data);
        assert_eq!(answer.error(), 0);
    }

    /// Reads; it must succeed. The data and how many bytes came as holes.
    #[track_caller]
    pub fn read(&mut self, flags: u16, offset: u64, length: usize) -> (Vec<u8>, usize) {
        self.call(flags, command::READ, offset, length as u64, &[])
            .assemble(offset, length)
    }

    /// What one context says of a range.
    ///
    /// # Panics
    ///
    /// The request fails.
    #[track_caller]
    pub fn status(&mut self, name: &str, offset: u64, length: u64) -> Extents {
        let id = self.id(name);
        let answer = self.call(0, command::BLOCK_STATUS, offset, length, &[]);
        let mut status = answer.status();
        status.retain(|context| context.0 == id);
        assert_eq!(status.len(), 1, "one chunk for each context");
        status.remove(0).1
    }
}

/// Selects contexts; their numbers and names.
///
/// # Errors
///
/// The server refuses, or two have one number.
pub fn select(raw: &mut Raw, export: &str, queries: &[&str]) -> io::Result<Vec<(u32, String)>> {
    let replies = raw.ask(option::SET_META_CONTEXT, &context_request(export, queries))?;
    if replies.last().is_none_or(|reply| reply.0 != option::ACK) {
        return Err(broken("the contexts were refused"));
    }
    let mut selected: Vec<(u32, String)> = Vec::new();
    for (kind, data) in &replies[..replies.len() - 1] {
        let name = String::from_utf8(data[4..].to_vec()).map_err(|_| broken("a name"))?;
        let id = word(data);
        if *kind != option::META_CONTEXT || selected.iter().any(|other| other.0 == id) {
            return Err(broken("contexts without numbers of their own"));
        }
        selected.push((id, name));
    }
    Ok(selected)
}

/// Makes a recovery point and waits until the tracker has dropped what it knew of the changes
/// before it, which follows the point by a moment. The shipper must run.
///
/// # Panics
///
/// That does not come to pass.
#[track_caller]
pub fn committed_cut(site: &Site) {
    let point = u64::from_str_radix(&site.cut(), 16).expect("a number");
    let deadline = Instant::now() + Duration::from_secs(60);
    while site.tracker_status()["machine"]["committed"].as_u64() < Some(point) {
        assert!(Instant::now() < deadline, "point {point} is not committed");
    }
}
