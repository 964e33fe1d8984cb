//! A guest that writes 4 KiB at a depth and notes of each write when it was answered and how long that took.

use std::io::{Read, Write as _};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;

use crate::Result;
use crate::load::next_random;
use crate::pattern::BLOCK_BYTES;
use crate::servers::Running;
use crate::wire::{self, Command, HEADER_BYTES, REPLY_BYTES};

/// Writes in flight. Their replies fit into the socket's buffer, so that the server never waits for this side.
const DEPTH: u64 = 32;
/// Time that the server has for one reply.
const PATIENCE: Duration = Duration::from_secs(60);
/// Random bytes of which each write gets a part.
const NOISE_BYTES: usize = 1 << 20;
/// Of each block so much is random; the rest is zero, so that it compresses to about half.
const RANDOM_BYTES: usize = BLOCK_BYTES / 2;

/// One write.
#[derive(Clone, Copy, Debug)]
pub struct Write {
    /// Nanoseconds from the origin to the reply.
    pub at: u64,
    /// Nanoseconds from the request to the reply.
    pub latency: u32,
    /// The block that was written.
    pub block: u32,
}

/// Where the writes go.
#[derive(Clone, Debug)]
pub enum Places {
    /// Every block as likely as the others.
    Uniform,
    /// By zipf's law, scattered over the disk.
    Zipf(Zipf),
}

impl Places {
    fn next(&self, random: &mut u64, blocks: u64) -> u64 {
        match self {
            Self::Uniform => next_random(random) % blocks,
            // As YCSB scatters its items: by a hash, so that hot blocks are no neighbours.
            Self::Zipf(zipf) => next_random(&mut zipf.rank(random)) % blocks,
        }
    }
}

/// Ranks by zipf's law, as YCSB draws them (Gray and others, 1994). Pure.
#[derive(Clone, Debug)]
pub struct Zipf {
    items: f64,
    theta: f64,
    sum: f64,
    alpha: f64,
    eta: f64,
}

impl Zipf {
    /// Of so many items, with an exponent below 1.
    pub fn new(items: u64, theta: f64) -> Self {
        let sum: f64 = (1..=items).map(|rank| (rank as f64).powf(-theta)).sum();
        let two = 1.0 + 0.5_f64.powf(theta);
        let eta = (1.0 - (2.0 / items as f64).powf(1.0 - theta)) / (1.0 - two / sum);
        Self {
            items: items as f64,
            theta,
            sum,
            alpha: 1.0 / (1.0 - theta),
            eta,
        }
    }

    /// From 0, which is the most frequent.
    fn rank(&self, random: &mut u64) -> u64 {
        let uniform = (next_random(random) >> 11) as f64 / (1_u64 << 53) as f64;
        let scaled = uniform * self.sum;
        if scaled < 1.0 {
            return 0;
        }
        if scaled < 1.0 + 0.5_f64.powf(self.theta) {
            return 1;
        }
        (self.items * (self.eta * uniform - self.eta + 1.0).powf(self.alpha)) as u64
    }
}

/// How often a guest writes.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// Writes a second; `None`: as many as are answered.
    iops: Option<u32>,
    begin: Duration,
    /// Writes that were sent.
    sent: u64,
}

impl Pace {
    /// From a moment on.
    pub fn new(iops: Option<u32>, begin: Duration) -> Self {
        Self {
            iops,
            begin,
            sent: 0,
        }
    }

    /// When the next write is due; what could not be sent in time is sent later.
    fn due(&self) -> Duration {
        let Some(iops) = self.iops else {
            return self.begin;
        };
        self.begin + Duration::from_secs_f64(self.sent as f64 / f64::from(iops))
    }

    /// Counts a write, if it is time for it.
    fn take(&mut self, now: Duration) -> bool {
        let is_due = self.due() <= now;
        self.sent += u64::from(is_due);
        is_due
    }
}

/// Waits until something can be read, or for so long.
fn await_readable(stream: &UnixStream, most: Duration) -> Result<bool> {
    let mut wanted = [PollFd::new(stream.as_fd(), PollFlags::POLLIN)];
    Ok(ppoll(&mut wanted, Some(TimeSpec::from_duration(most)), None)? > 0)
}

/// A connection, and the blocks of the disk.
fn connect(server: &Running) -> Result<(UnixStream, u64)> {
    let mut stream = UnixStream::connect(server.socket())?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let bytes = wire::negotiate(&mut stream, server.export())?;
    Ok((stream, bytes / BLOCK_BYTES as u64))
}

fn noise(random: &mut u64) -> Vec<u8> {
    let mut noise = Vec::with_capacity(NOISE_BYTES);
    while noise.len() < NOISE_BYTES {
        noise.extend_from_slice(&next_random(random).to_le_bytes());
    }
    noise
}

/// Writes for a time; all writes, by the time of their replies.
///
/// # Errors
///
/// The connection is lost, or a write fails.
pub fn run(
    server: &Running,
    places: &Places,
    seed: u64,
    (duration, iops): (Duration, Option<u32>),
    origin: Instant,
) -> Result<Vec<Write>> {
    let (mut stream, blocks) = connect(server)?;
    let mut random = seed;
    let noise = noise(&mut random);
    let mut flying = [(Duration::ZERO, 0_u64); DEPTH as usize];
    let mut free: Vec<u64> = (0..DEPTH).collect();
    let (mut outgoing, mut incoming) = (Vec::new(), vec![0; REPLY_BYTES * DEPTH as usize]);
    let (mut have, mut writes) = (0, Vec::with_capacity(1 << 20));
    let mut pace = Pace::new(iops, origin.elapsed());
    let end = pace.begin + duration;
    loop {
        let now = origin.elapsed();
        outgoing.clear();
        while now < end
            && !free.is_empty()
            && pace.take(now)
            && let Some(place) = free.pop()
        {
            let block = places.next(&mut random, blocks);
            flying[place as usize] = (now, block);
            let offset = block * BLOCK_BYTES as u64;
            outgoing.extend_from_slice(&wire::header(
                Command::Write,
                place,
                offset,
                BLOCK_BYTES as u32,
            ));
            push_data(&mut outgoing, &noise, next_random(&mut random));
        }
        stream.write_all(&outgoing)?;
        if now >= end && free.len() as u64 == DEPTH {
            stream.write_all(&wire::header(Command::Disconnect, 0, 0, 0) as &[u8; HEADER_BYTES])?;
            return Ok(writes);
        }
        if now < end && !free.is_empty() {
            let left = pace.due().min(end).saturating_sub(origin.elapsed());
            if !await_readable(&stream, left)? {
                continue;
            }
        }
        let count = stream.read(&mut incoming[have..])?;
        if count == 0 {
            return Err("the server closed the connection".into());
        }
        have += count;
        let now = origin.elapsed();
        let (replies, _) = incoming[..have].as_chunks::<REPLY_BYTES>();
        let whole = replies.len() * REPLY_BYTES;
        for reply in replies {
            let place = wire::cookie_of(reply)?;
            let known = flying.get(place as usize);
            let (since, block) = known.ok_or("a reply to no request")?;
            writes.push(Write {
                at: nanoseconds(now),
                latency: u32::try_from(nanoseconds(now - *since)).unwrap_or(u32::MAX),
                block: *block as u32,
            });
            free.push(place);
        }
        incoming.copy_within(whole..have, 0);
        have -= whole;
    }
}

/// A block that differs from all that were written before, as what has not changed is not shipped.
fn push_data(outgoing: &mut Vec<u8>, noise: &[u8], number: u64) {
    let begin = number as usize % (noise.len() - RANDOM_BYTES);
    outgoing.extend_from_slice(&number.to_le_bytes());
    outgoing.extend_from_slice(&noise[begin..begin + RANDOM_BYTES - 8]);
    outgoing.resize(outgoing.len() + BLOCK_BYTES - RANDOM_BYTES, 0);
}

/// Nanoseconds of a time that a run takes.
pub fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_are_as_frequent_as_zipf_says() {
        let zipf = Zipf::new(1000, 0.99);
        let (mut random, mut counts) = (1, vec![0.0; 1000]);
        for _ in 0..200_000 {
            counts[zipf.rank(&mut random) as usize] += 1.0 / 200_000.0;
        }
        assert!((counts[0] - 1.0 / zipf.sum).abs() < 0.01, "{}", counts[0]);
        let tail: f64 = counts[500..].iter().sum();
        let expected: f64 = (501..=1000)
            .map(|rank| (rank as f64).powf(-0.99) / zipf.sum)
            .sum();
        assert!((tail - expected).abs() < 0.01, "{tail} {expected}");
    }

    #[test]
    fn writes_that_are_late_are_made_up_for() {
        let second = Duration::from_secs(1);
        let mut pace = Pace::new(Some(10), second);
        let mut taken = |now| std::iter::from_fn(|| pace.take(now).then_some(())).count();
        assert_eq!(taken(second / 2), 0);
        assert_eq!(taken(second), 1);
        assert_eq!(taken(second), 0);
        assert_eq!(taken(2 * second), 10);
        let mut unbound = Pace::new(None, second);
        assert!((0..1000).all(|_| unbound.take(second)));
    }

    #[test]
    fn no_two_blocks_are_alike() {
        let noise = vec![7; NOISE_BYTES];
        let (mut one, mut other) = (Vec::new(), Vec::new());
        push_data(&mut one, &noise, 1);
        push_data(&mut other, &noise, 2);
        assert_eq!((one.len(), other.len()), (BLOCK_BYTES, BLOCK_BYTES));
        assert_ne!(one, other);
    }
}
