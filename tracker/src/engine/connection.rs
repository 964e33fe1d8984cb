//! One client's connection as its worker sees it: input not yet understood, requests in flight,
//! output not yet sent.

use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::buffer::{Buffer, BufferPool, HEAD_BYTES};
use super::transfer::{Piece, SendBatch};
use super::view::View;
use crate::nbd::handshake::Session;
use crate::nbd::reply::{Address, data_head, failure, hole, success};
use crate::nbd::request::Request;
use crate::nbd::wire::ReplyError;

/// Requests of one connection that may be in flight; beyond it the socket is not read.
const REQUESTS_MAX: usize = 1024;
/// BLOCK_STATUS of one connection that may be in flight: all connections of a worker share one
/// thread for them, and each may take a while.
const STATUS_REQUESTS_MAX: usize = 8;
/// Payload of one connection in flight and its output that is not sent, in bytes; one request may
/// exceed it. So a client that never reads its replies costs no more.
const PAYLOAD_BYTES_MAX: usize = 32 << 20;
/// Writes of one connection that are answered on the spot in one turn. Then their replies leave,
/// so that the client can work at them while the next ones are written; more would have the two
/// wait for each other, less would cost a system call for too few.
const TURN_REPLIES_MAX: usize = 16;
/// Emptied pieces of output kept for reuse, and the largest that is kept.
const SPARE_MAX: usize = 4;
const SPARE_BYTES_MAX: usize = 64 << 10;
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
    /// What it negotiated; the export is the index of the disk.
    pub session: Session,
    /// What is read is the disk as it was at a cut.
    pub view: Option<View>,
    /// A range that is known to hold data, so that READs in it need no search for holes. It may
    /// have been dug out since: then its zeroes are sent as data.
    pub known_data: Range<u64>,
    /// The input buffer; `None` while the kernel fills it.
    pub input: Option<Input>,
    /// Requests that were answered on the spot in this turn.
    pub answered_at_once: usize,
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
    /// How many of them are BLOCK_STATUS.
    pub status_requests: usize,
    /// Payload bytes of requests, and bytes of output that is not sent.
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
    pub fn new(socket: OwnedFd, session: Session, view: Option<View>, buffer: Buffer) -> Self {
        Self {
            socket,
            session,
            view,
            known_data: 0..0,
            input: Some(Input {
                buffer,
                start: 0,
                end: 0,
            }),
            answered_at_once: 0,
            payload: None,
            skip_bytes: 0,
            receiving: Receiving::Nothing,
            output: Box::default(),
            spare: Some(Box::default()),
            spare_bytes: Vec::new(),
            sending: false,
            requests: 0,
            status_requests: 0,
            payload_bytes: 0,
            closing: false,
            broken: false,
            touched: false,
        }
    }

    /// The socket.
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Whether the socket has something that was not received. One that cannot be asked counts as if.
    pub fn has_arrivals(&self) -> bool {
        let mut watched = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
        poll(&mut watched, PollTimeout::ZERO) != Ok(0)
    }

    /// A receive is in flight.
    pub fn is_receiving(&self) -> bool {
        !matches!(self.receiving, Receiving::Nothing)
    }

    /// As much is in flight as one connection may have.
    pub fn is_full(&self) -> bool {
        self.requests >= REQUESTS_MAX
            || self.payload_bytes >= PAYLOAD_BYTES_MAX
            || self.status_requests >= STATUS_REQUESTS_MAX
    }

    /// As much was answered on the spot as one turn allows.
    pub fn has_had_its_share(&self) -> bool {
        self.answered_at_once >= TURN_REPLIES_MAX
    }

    /// More of the input is to be understood in the next turn.
    pub fn turn_is_over(&self) -> bool {
        let waits = |input: &Input| !input.pending().is_empty();
        self.has_had_its_share() && self.input.as_ref().is_some_and(waits)
    }

    /// Nothing is in flight any more and nothing can follow.
    pub fn is_finished(&self) -> bool {
        self.closing
            && !self.is_receiving()
            && !self.sending
            && self.requests == 0
            && (self.broken || self.output.is_empty())
    }

    /// Adds what `write` writes behind the output.
    fn add(&mut self, write: impl FnOnce(&mut Vec<u8>)) {
        if let Some(bytes) = self.output.last_bytes() {
            let before = bytes.len();
            write(bytes);
            self.payload_bytes += bytes.len() - before;
        } else {
            let mut bytes = self.spare_bytes.pop().unwrap_or_default();
            write(&mut bytes);
            self.reply_with_bytes(bytes);
        }
    }

    /// Queues the reply to a request that succeeded and has no data.
    pub fn succeed(&mut self, request: &Request) {
        let (mode, address) = (self.session.mode, request.address());
        self.add(|out| success(mode, address, request.is_read(), out));
    }

    /// Queues the reply to a request that failed, at an offset where that is known.
    pub fn fail(&mut self, address: Address, error: ReplyError, text: &str, offset: Option<u64>) {
        let mode = self.session.mode;
        self.add(|out| failure(mode, address, error, text, offset, out));
    }

    /// Queues the part of a READ's reply that says that a range is zero.
    pub fn reply_with_hole(&mut self, request: &Request, range: Range<u64>) {
        let (mode, done) = (self.session.mode, range.end == request.end());
        let length = (range.end - range.start) as u32;
        self.add(|out| hole(mode, request.address(), range.start, length, done, out));
    }

    /// Queues bytes that are a whole reply.
    pub fn reply_with_bytes(&mut self, reply: Vec<u8>) {
        self.payload_bytes += reply.len();
        self.output.push(Piece::Bytes(reply));
    }

    /// Takes over a batch of which `sent_bytes` more have left: what is done with goes to the
    /// pool, what is left stays in the batch.
    pub fn note_sent(&mut self, batch: &mut SendBatch, sent_bytes: usize, pool: &mut BufferPool) {
        let (payload_bytes, spare_bytes) = (&mut self.payload_bytes, &mut self.spare_bytes);
        batch.advance(sent_bytes, |piece| match piece {
            Piece::Bytes(mut bytes) => {
                *payload_bytes -= bytes.len();
                bytes.clear();
                if spare_bytes.len() < SPARE_MAX && bytes.capacity() <= SPARE_BYTES_MAX {
                    spare_bytes.push(bytes);
                }
            }
            Piece::Data(buffer, range) => {
                *payload_bytes -= range.end - HEAD_BYTES;
                pool.put(buffer);
            }
        });
    }

    /// Queues the part of a READ's reply whose data lie in the buffer from [`HEAD_BYTES`] on.
    pub fn reply_with_data(&mut self, request: &Request, range: Range<u64>, mut buffer: Buffer) {
        let (mode, done) = (self.session.mode, range.end == request.end());
        let length = (range.end - range.start) as u32;
        let head = data_head(mode, request.address(), range.start, length, done);
        let head = head.as_slice();
        let start = HEAD_BYTES - head.len();
        buffer.bytes_mut()[start..HEAD_BYTES].copy_from_slice(head);
        self.payload_bytes += length as usize;
        let end = HEAD_BYTES + length as usize;
        self.output.push(Piece::Data(buffer, start..end));
    }
}
