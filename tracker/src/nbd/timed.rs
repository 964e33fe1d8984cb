//! A blocking socket under one deadline, however often and however little the peer sends.
//!
//! It leaves the last time limit behind on the socket; who goes on with it resets it.

use std::io::{self, Read, Write};
use std::time::{Duration, Instant};

use super::listener::Stream;

/// A socket whose reads and writes together end at the deadline.
pub struct Timed<'a> {
    stream: &'a Stream,
    deadline: Instant,
}

impl<'a> Timed<'a> {
    /// The socket with a deadline from now on.
    pub fn new(stream: &'a Stream, deadline: Instant) -> Self {
        Self { stream, deadline }
    }

    fn remaining(&self) -> io::Result<Duration> {
        let remaining = self.deadline.saturating_duration_since(Instant::now());
        if remaining.is_zero() {
            return Err(too_slow());
        }
        Ok(remaining)
    }
}

fn too_slow() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, "the negotiation took too long")
}

/// A time limit that ran out shows as WouldBlock, which whoever reads over TLS would try again.
fn limited(result: io::Result<usize>) -> io::Result<usize> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(too_slow()),
        result => result,
    }
}

impl Read for Timed<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(Some(self.remaining()?))?;
        limited((&*self.stream).read(buffer))
    }
}

impl Write for Timed<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(Some(self.remaining()?))?;
        limited((&*self.stream).write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
