//! Lines from a pipe or socket, under a deadline.

use std::io::{ErrorKind, Read};
use std::os::fd::AsFd;
use std::time::Instant;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

const CHUNK_BYTES: usize = 4096;

/// What came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Line {
    /// A line, without its end.
    Text(Vec<u8>),
    /// Nobody writes any more, or it cannot be read, or the line is too long.
    End,
    /// Nothing in time.
    Late,
}

/// Reads lines of a bounded length.
#[derive(Debug)]
pub struct Lines<R> {
    source: R,
    bytes_max: usize,
    held: Vec<u8>,
}

impl<R: Read + AsFd> Lines<R> {
    /// Lines of `source`.
    pub fn new(source: R, bytes_max: usize) -> Self {
        Self {
            source,
            bytes_max,
            held: Vec::new(),
        }
    }

    /// Where they come from.
    pub fn source(&mut self) -> &mut R {
        &mut self.source
    }

    /// The next line.
    pub fn next(&mut self, until: Instant) -> Line {
        loop {
            if let Some(end) = self.held.iter().position(|byte| *byte == b'\n') {
                let mut line: Vec<u8> = self.held.drain(..=end).collect();
                line.pop();
                return Line::Text(line);
            }
            if self.held.len() > self.bytes_max {
                return Line::End;
            }
            match self.is_readable(until) {
                Ok(true) => {}
                Ok(false) => return Line::Late,
                Err(_) => return Line::End,
            }
            let mut chunk = [0; CHUNK_BYTES];
            match self.source.read(&mut chunk) {
                Ok(0) => return Line::End,
                Ok(count) => self.held.extend_from_slice(&chunk[..count]),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return Line::End,
            }
        }
    }

    fn is_readable(&self, until: Instant) -> Result<bool, Errno> {
        loop {
            let left = until.saturating_duration_since(Instant::now());
            // Rounded up: a wait of zero milliseconds would spin.
            let millis = left.as_nanos().div_ceil(1_000_000);
            let timeout = PollTimeout::try_from(millis).unwrap_or(PollTimeout::MAX);
            let mut polled = [PollFd::new(self.source.as_fd(), PollFlags::POLLIN)];
            match poll(&mut polled, timeout) {
                Ok(0) if Instant::now() >= until => return Ok(false),
                Ok(0) | Err(Errno::EINTR) => {}
                Ok(_) => return Ok(true),
                Err(errno) => return Err(errno),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    #[test]
    fn lines_come_late_or_end() {
        let (mut writer, reader) = UnixStream::pair().unwrap();
        let mut lines = Lines::new(reader, 8);
        let soon = || Instant::now() + Duration::from_millis(5);
        writer.write_all(b"one\ntwo\nth").unwrap();
        assert_eq!(lines.next(soon()), Line::Text(b"one".to_vec()));
        assert_eq!(lines.next(soon()), Line::Text(b"two".to_vec()));
        assert_eq!(lines.next(soon()), Line::Late);
        writer.write_all(b"ree\n123456789").unwrap();
        assert_eq!(lines.next(soon()), Line::Text(b"three".to_vec()));
        assert_eq!(lines.next(soon()), Line::End, "too long");
        let (writer, reader) = UnixStream::pair().unwrap();
        drop(writer);
        assert_eq!(Lines::new(reader, 8).next(soon()), Line::End);
    }
}
