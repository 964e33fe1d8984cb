//! One client's connection as its worker sees it: input not yet understood, requests in flight,
//! output not yet sent.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use zerocopy::IntoBytes;

use super::buffer::{Buffer, BufferPool, HEAD_BYTES};
use super::uring::{Piece, SendBatch};
use crate::nbd::request::Request;
use crate::nbd::wire::{ReplyError, SIMPLE_REPLY_BYTES, SimpleReply};

/// Requests of one connection that may be in flight; beyond it the socket is not read.
const REQUESTS_MAX: usize = 1024;
/// Payload of one connection in flight or waiting to be sent, in bytes; one request may exceed it.
const PAYLOAD_BYTES_MAX: usize = 32 << 20;
/// Emptied pieces of output kept for reuse.
const SPARE_MAX: usize = 4;
/// Data size of the input buffer.
pub const INPUT_BYTES: usize = 256 << 10;

/// The payload of a WRITE that arrives in pieces.
pub struct Payload {
    /// The request it belongs to.
    pub request: Request,
    /// Where it goes, from [`HEAD_BYTES`] on.
    pub buffer: Buffer,
    /// Bytes that have arrived.
    pub received: usize,
}

/// What the receive in flight is for, while the kernel has the buffer.
#[derive(Clone, Copy, Debug)]
pub enum Receiving {
    /// No receive is in flight.
    Nothing,
    /// Requests; the buffer holds so many bytes already.
    Requests(usize),
    /// The rest of a payload, of which so many bytes are there.
    Payload(Request, usize),
}

/// The input buffer and what is in it.
pub struct Input {
    /// The memory.
    pub buffer: Buffer,
    /// Start of what has not been understood yet.
    pub start: usize,
    /// End of what has been received.
    pub end: usize,
}

impl Input {
    /// What has been received and not been understood yet.
    pub fn pending(&self) -> &[u8] {
        &self.buffer.bytes()[self.start..self.end]
    }

    /// Moves what is pending to the start of the buffer, to make room behind it.
    pub fn compact(&mut self) {
        if self.start > 0 {
            self.buffer.bytes_mut().copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
    }
}

/// One connection. It stays on its worker.
pub struct Connection {
    socket: OwnedFd,
    /// Index of the disk that it chose.
    pub disk: usize,
    /// The input buffer; `None` while the kernel fills it.
    pub input: Option<Input>,
    /// A payload that is being received.
    pub payload: Option<Payload>,
    /// Payload of a refused WRITE still to be thrown away.
    pub skip_bytes: u32,
    /// What the receive in flight is for.
    pub receiving: Receiving,
    /// Output that waits for the send in flight.
    pub output: Box<SendBatch>,
    /// A spare batch, while none is in flight.
    pub spare: Option<Box<SendBatch>>,
    /// Emptied output kept for the next replies.
    spare_bytes: Vec<Vec<u8>>,
    /// A send is in flight.
    pub sending: bool,
    /// Requests that have not been answered.
    pub requests: usize,
    /// Payload bytes of requests and of output that is not sent.
    pub payload_bytes: usize,
    /// Nothing more is received: the client left, or the server stops.
    pub closing: bool,
    /// Nothing more can be sent.
    pub broken: bool,
    /// It waits in the worker's list of connections to look after.
    pub touched: bool,
}

impl Connection {
    /// A connection that has just been negotiated.
    pub fn new(socket: OwnedFd, disk: usize, buffer: Buffer) -> Self {
        Self {
            socket,
            disk,
            input: Some(Input {
                buffer,
                start: 0,
                end: 0,
            }),
            payload: None,
            skip_bytes: 0,
            receiving: Receiving::Nothing,
            output: Box::default(),
            spare: Some(Box::default()),
            spare_bytes: Vec::new(),
            sending: false,
            requests: 0,
            payload_bytes: 0,
            closing: false,
            broken: false,
            touched: false,
        }
    }

    /// The socket's descriptor.
    pub fn socket(&self) -> RawFd {
        self.socket.as_raw_fd()
    }

    /// A receive is in flight.
    pub fn is_receiving(&self) -> bool {
        !matches!(self.receiving, Receiving::Nothing)
    }

    /// As much is in flight as one connection may have.
    pub fn is_full(&self) -> bool {
        self.requests >= REQUESTS_MAX || self.payload_bytes >= PAYLOAD_BYTES_MAX
    }

    /// Nothing is in flight any more and nothing can follow.
    pub fn is_finished(&self) -> bool {
        self.closing
            && !self.is_receiving()
            && !self.sending
            && self.requests == 0
            && (self.broken || self.output.is_empty())
    }

    /// Queues a reply without data.
    pub fn reply(&mut self, cookie: [u8; 8], error: Option<ReplyError>) {
        let reply = SimpleReply::new(cookie, error);
        match self.output.last_bytes() {
            Some(bytes) => bytes.extend_from_slice(reply.as_bytes()),
            None => {
                let mut bytes = self.spare_bytes.pop().unwrap_or_default();
                bytes.extend_from_slice(reply.as_bytes());
                self.output.push(Piece::Bytes(bytes));
            }
        }
    }

    /// Takes over a batch of which `sent_bytes` more have left: what is done with goes to the
    /// pool, what is left stays in the batch.
    pub fn note_sent(&mut self, batch: &mut SendBatch, sent_bytes: usize, pool: &mut BufferPool) {
        let (payload_bytes, spare_bytes) = (&mut self.payload_bytes, &mut self.spare_bytes);
        batch.advance(sent_bytes, |piece| match piece {
            Piece::Bytes(mut bytes) => {
                bytes.clear();
                if spare_bytes.len() < SPARE_MAX {
                    spare_bytes.push(bytes);
                }
            }
            Piece::Data(buffer, range) => {
                *payload_bytes -= range.len() - SIMPLE_REPLY_BYTES;
                pool.put(buffer);
            }
        });
    }

    /// Queues the reply to a READ whose data lie in the buffer from [`HEAD_BYTES`] on.
    pub fn reply_with_data(&mut self, cookie: [u8; 8], mut buffer: Buffer, length: usize) {
        let head = HEAD_BYTES - SIMPLE_REPLY_BYTES;
        let reply = SimpleReply::new(cookie, None);
        buffer.bytes_mut()[head..HEAD_BYTES].copy_from_slice(reply.as_bytes());
        self.payload_bytes += length;
        self.output
            .push(Piece::Data(buffer, head..HEAD_BYTES + length));
    }
}
