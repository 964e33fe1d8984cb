//! Requests at chosen offsets, in batches that are answered before the next one goes out.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use crate::Result;
use crate::pattern::{self, Version};
use crate::servers::Running;
use crate::wire::{self, Command, REPLY_BYTES};

/// Time that a server has for one batch.
const PATIENCE: Duration = Duration::from_secs(60);
/// Bounds of a batch.
const BATCH_BYTES_MAX: usize = 8 << 20;
const BATCH_REQUESTS_MAX: usize = 64;

/// A connection.
pub struct Client {
    stream: UnixStream,
    size_bytes: u64,
}

impl Client {
    /// Connects to a server.
    ///
    /// # Errors
    ///
    /// It does not answer, or speaks another protocol.
    pub fn connect(server: &Running) -> Result<Self> {
        let mut stream = UnixStream::connect(server.socket())?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let size_bytes = wire::negotiate(&mut stream, server.export())?;
        Ok(Self { stream, size_bytes })
    }

    /// Bytes of the disk.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Reads one block.
    ///
    /// # Errors
    ///
    /// The connection is lost, or the server answers with an error.
    pub fn read_block(&mut self, offset: u64) -> Result<()> {
        wire::read(&mut self.stream, offset, &mut [0; pattern::BLOCK_BYTES])
    }

    /// Writes a version of the blocks at these offsets, so many bytes at each.
    ///
    /// # Errors
    ///
    /// The connection is lost, or the server answers with an error.
    pub fn write(
        &mut self,
        bytes: usize,
        version: Version,
        offsets: impl Iterator<Item = u64>,
    ) -> Result<()> {
        let fill = |offset, bytes: &mut [u8]| pattern::fill(bytes, offset, version);
        self.send(Command::Write, bytes, Some(fill), offsets)
    }

    /// Writes what `fill` makes for each of these offsets, so many bytes at each.
    ///
    /// # Errors
    ///
    /// The connection is lost, or the server answers with an error.
    pub fn write_data(
        &mut self,
        bytes: usize,
        offsets: impl Iterator<Item = u64>,
        fill: impl Fn(u64, &mut [u8]),
    ) -> Result<()> {
        self.send(Command::Write, bytes, Some(fill), offsets)
    }

    /// Trims so many bytes at each of these offsets.
    ///
    /// # Errors
    ///
    /// The connection is lost, or the server answers with an error.
    pub fn trim(&mut self, bytes: usize, offsets: impl Iterator<Item = u64>) -> Result<()> {
        self.send(Command::Trim, bytes, None::<fn(u64, &mut [u8])>, offsets)
    }

    fn send(
        &mut self,
        command: Command,
        bytes: usize,
        fill: Option<impl Fn(u64, &mut [u8])>,
        offsets: impl Iterator<Item = u64>,
    ) -> Result<()> {
        let batch_requests = (BATCH_BYTES_MAX / bytes.max(1)).clamp(1, BATCH_REQUESTS_MAX);
        let length = u32::try_from(bytes)?;
        let (mut batch, mut count) = (Vec::new(), 0);
        for offset in offsets {
            batch.extend_from_slice(&wire::header(command, offset, offset, length));
            if let Some(fill) = &fill {
                let begin = batch.len();
                batch.resize(begin + bytes, 0);
                fill(offset, &mut batch[begin..]);
            }
            count += 1;
            if count == batch_requests {
                self.exchange(&batch, count)?;
                batch.clear();
                count = 0;
            }
        }
        self.exchange(&batch, count)
    }

    /// Replies to requests without data are short: those of a batch fit into the socket's buffer, so
    /// that a server never waits for this side to take them.
    fn exchange(&mut self, batch: &[u8], count: usize) -> Result<()> {
        self.stream.write_all(batch)?;
        for _ in 0..count {
            let mut reply = [0; REPLY_BYTES];
            self.stream.read_exact(&mut reply)?;
            wire::cookie_of(&reply)?;
        }
        Ok(())
    }
}
