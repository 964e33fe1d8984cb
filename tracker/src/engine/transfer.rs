//! What is given to a driver with an operation, and what comes back with its completion.
//!
//! Memory moves to the driver and returns with the completion, so that nobody can touch it while the
//! kernel or a thread works on it.

use std::collections::VecDeque;
use std::mem;
use std::ops::Range;

use super::buffer::Buffer;

/// Most pieces of one send; `UIO_MAXIOV` is 1024.
pub const PIECES_MAX: usize = 64;

/// One piece of output.
#[derive(Debug)]
pub enum Piece {
    /// Headers without data.
    Bytes(Vec<u8>),
    /// A header and data that lie one behind the other in an operation's buffer.
    Data(Buffer, Range<usize>),
}

impl Piece {
    fn as_slice(&self) -> &[u8] {
        match self {
            Self::Bytes(bytes) => bytes,
            Self::Data(buffer, range) => &buffer.bytes()[range.clone()],
        }
    }
}

/// Output on its way through a socket.
#[derive(Default)]
pub struct SendBatch {
    pieces: VecDeque<Piece>,
    /// Bytes of the first piece that have been sent already.
    sent_of_first: usize,
}

impl SendBatch {
    /// Adds output at the end.
    pub fn push(&mut self, piece: Piece) {
        self.pieces.push_back(piece);
    }

    /// The last piece if it is plain bytes, to be extended by the next header.
    pub fn last_bytes(&mut self) -> Option<&mut Vec<u8>> {
        match self.pieces.back_mut() {
            Some(Piece::Bytes(bytes)) => Some(bytes),
            _ => None,
        }
    }

    /// Nothing is left to send.
    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// Notes that `count` more bytes are sent; gives finished pieces to `recycle`.
    pub fn advance(&mut self, mut count: usize, mut recycle: impl FnMut(Piece)) {
        while let Some(first) = self.pieces.front() {
            let left = first.as_slice().len() - self.sent_of_first;
            if count < left {
                self.sent_of_first += count;
                return;
            }
            count -= left;
            self.sent_of_first = 0;
            if let Some(piece) = self.pieces.pop_front() {
                recycle(piece);
            }
        }
    }

    /// What is left of the first [`PIECES_MAX`] pieces: as much as one call sends. The memory stays
    /// where it is until the batch is changed or dropped, even if the batch itself moves.
    pub fn slices(&self) -> impl Iterator<Item = &[u8]> {
        let mut skip = self.sent_of_first;
        self.pieces
            .iter()
            .take(PIECES_MAX)
            .map(move |piece| &piece.as_slice()[mem::take(&mut skip)..])
    }
}

/// What is worked on during one operation.
#[derive(Default)]
pub enum Held {
    /// No memory.
    #[default]
    Nothing,
    /// A buffer that is read from or written to.
    Buffer(Buffer),
    /// Output.
    Send(Box<SendBatch>),
}

/// A finished operation.
pub struct Completion {
    /// What the submitter called it.
    pub tag: u64,
    /// As in the system call: a count, or a negative errno.
    pub result: i32,
    /// The memory, back in the submitter's hands.
    pub held: Held,
}
