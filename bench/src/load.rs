//! A light client: requests go out in batches, replies come in by the bufferful and are checked.
//!
//! Each connection has a thread and a window of `depth` requests. When replies have freed places,
//! all of them are filled by one send. So the client costs less than the servers it measures.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::Result;
use crate::settings::Settings;

/// Bytes of one request's payload.
const PAYLOAD_BYTES: usize = 4096;
/// Bytes of a request header and of a simple reply.
const HEADER_BYTES: usize = 28;
const REPLY_BYTES: usize = 16;
/// Time that a server has for one reply.
const PATIENCE: Duration = Duration::from_secs(20);

/// What was done in which time.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Requests answered without error.
    pub requests: u64,
    /// Time that they took.
    pub seconds: f64,
}

/// 4 KiB random writes for the settings' time, at their depth on each connection.
///
/// # Errors
///
/// A connection is lost, or a reply is wrong.
pub fn random_writes(socket: &Path, settings: &Settings) -> Result<Load> {
    let begin = Instant::now();
    let mut requests = 0;
    std::thread::scope(|scope| -> Result<()> {
        let threads: Vec<_> = (0..settings.connections)
            .map(|number| {
                scope.spawn(move || {
                    Connection::open(socket, settings.depth, number as u64)
                        .and_then(|mut connection| connection.run(settings.duration()))
                        .map_err(|error| error.to_string())
                })
            })
            .collect();
        for thread in threads {
            requests += thread.join().map_err(|_| "a client panicked")??;
        }
        Ok(())
    })?;
    Ok(Load {
        requests,
        seconds: begin.elapsed().as_secs_f64(),
    })
}

/// One connection with its window.
struct Connection {
    stream: UnixStream,
    blocks: u64,
    random: u64,
    /// Places of the window that are free; a request's cookie is its place.
    free: Vec<usize>,
    taken: Vec<bool>,
    outgoing: Vec<u8>,
    incoming: Vec<u8>,
    received: usize,
}

impl Connection {
    fn open(socket: &Path, depth: usize, seed: u64) -> Result<Self> {
        let mut stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let size_bytes = negotiate(&mut stream)?;
        let blocks = size_bytes / PAYLOAD_BYTES as u64;
        if blocks == 0 {
            return Err("the disk is smaller than one block".into());
        }
        Ok(Self {
            stream,
            blocks,
            random: seed,
            free: (0..depth).collect(),
            taken: vec![false; depth],
            outgoing: Vec::with_capacity(depth * (HEADER_BYTES + PAYLOAD_BYTES)),
            incoming: vec![0; depth * REPLY_BYTES],
            received: 0,
        })
    }

    fn run(&mut self, duration: Duration) -> Result<u64> {
        let deadline = Instant::now() + duration;
        let mut answered = 0;
        while Instant::now() < deadline {
            self.fill_window()?;
            answered += self.take_replies()?;
        }
        while self.free.len() < self.taken.len() {
            answered += self.take_replies()?;
        }
        self.stream.write_all(&header(2, 0, 0, 0))?;
        Ok(answered)
    }

    fn fill_window(&mut self) -> Result<()> {
        self.outgoing.clear();
        while let Some(place) = self.free.pop() {
            let block = next_random(&mut self.random) % self.blocks;
            let offset = block * PAYLOAD_BYTES as u64;
            let length = PAYLOAD_BYTES as u32;
            self.outgoing
                .extend_from_slice(&header(1, place as u64, offset, length));
            self.outgoing
                .resize(self.outgoing.len() + PAYLOAD_BYTES, block as u8);
            if let Some(taken) = self.taken.get_mut(place) {
                *taken = true;
            }
        }
        self.stream.write_all(&self.outgoing)?;
        Ok(())
    }

    /// Takes what has come, at least one reply; the number of replies.
    fn take_replies(&mut self) -> Result<u64> {
        let space = self.incoming.get_mut(self.received..).unwrap_or_default();
        let count = self.stream.read(space)?;
        if count == 0 {
            return Err("the server closed the connection".into());
        }
        self.received += count;
        let whole = self.received / REPLY_BYTES * REPLY_BYTES;
        let mut answered = 0;
        for reply in self
            .incoming
            .get(..whole)
            .unwrap_or_default()
            .chunks(REPLY_BYTES)
        {
            let (head, cookie) = reply.split_at(8);
            if *head != [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0] {
                return Err(format!("a reply is wrong or an error: {head:02x?}").into());
            }
            let place = usize::try_from(u64::from_be_bytes(cookie.try_into()?))?;
            match self.taken.get_mut(place) {
                Some(taken) if *taken => *taken = false,
                _ => return Err("a reply to no request".into()),
            }
            self.free.push(place);
            answered += 1;
        }
        self.incoming.copy_within(whole..self.received, 0);
        self.received -= whole;
        Ok(answered)
    }
}

/// Chooses the default export; its size in bytes.
fn negotiate(stream: &mut UnixStream) -> Result<u64> {
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting)?;
    let mut answer = 3_u32.to_be_bytes().to_vec();
    answer.extend_from_slice(b"IHAVEOPT");
    answer.extend_from_slice(&1_u32.to_be_bytes());
    answer.extend_from_slice(&0_u32.to_be_bytes());
    stream.write_all(&answer)?;
    let mut export = [0; 10];
    stream.read_exact(&mut export)?;
    let [size @ .., _, _] = export;
    Ok(u64::from_be_bytes(size))
}

fn header(command: u16, cookie: u64, offset: u64, length: u32) -> [u8; HEADER_BYTES] {
    let mut bytes = [0; HEADER_BYTES];
    bytes[..4].copy_from_slice(&0x2560_9513_u32.to_be_bytes());
    bytes[6..8].copy_from_slice(&command.to_be_bytes());
    bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
    bytes[16..24].copy_from_slice(&offset.to_be_bytes());
    bytes[24..].copy_from_slice(&length.to_be_bytes());
    bytes
}

/// splitmix64.
fn next_random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (*state ^ (*state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_has_the_layout_of_the_specification() {
        let bytes = header(1, 2, 3, 4);
        assert_eq!(bytes[..8], [0x25, 0x60, 0x95, 0x13, 0, 0, 0, 1]);
        assert_eq!((bytes[15], bytes[23], bytes[27]), (2, 3, 4));
    }
}
