//! The light client: requests go out in batches, replies come in by the bufferful, and all are checked.
//!
//! Each connection has a thread and a window of `depth` requests. When replies have freed places,
//! they are filled by one send. So the client costs less than the servers it measures. Every reply
//! must name, without error, a request that is in flight. If asked to verify, the client also checks
//! the data of reads, and at the end reads back blocks whose writes were acknowledged.

use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::socket::{MsgFlags, recv, send};

use crate::Result;
use crate::job::{Access, Job};
use crate::measure::{Latency, Load};
use crate::pattern::{self, BLOCK_BYTES, Version};
use crate::wire::{Command, HEADER_BYTES, REPLY_BYTES, cookie_of, header, negotiate};

/// Time that a server has for one reply.
const PATIENCE: Duration = Duration::from_secs(20);
/// A batch is sent when it has grown to this size, so that it stays in the processor's cache.
const BATCH_BYTES_MAX: usize = 1 << 20;
/// Bytes that are received at once, at most.
const RECEIVE_BYTES: usize = 256 << 10;
/// Blocks that each connection reads back at the end, at most.
const READ_BACK_BLOCKS_MAX: usize = 4096;
/// Bits of a cookie that name a place of the window; the others count requests.
const PLACE_BITS: u32 = 16;

/// Does the job on an export of the server behind a socket, for a time.
///
/// # Errors
///
/// A connection is lost, or a reply or its data is wrong.
pub fn run(
    (socket, export): (&Path, &str),
    job: &Job,
    duration: Duration,
    verify: bool,
) -> Result<Load> {
    let start = Barrier::new(job.connections);
    let parts = std::thread::scope(|scope| -> Result<Vec<Part>> {
        let start = &start;
        let threads: Vec<_> = (0..job.connections)
            .map(|number| {
                scope.spawn(move || {
                    let stream = UnixStream::connect(socket).map_err(Into::into);
                    let connection = stream.and_then(|stream| {
                        Connection::open(stream, export, job, number as u64, verify)
                    });
                    start.wait();
                    connection
                        .and_then(|mut connection| connection.run(duration))
                        .map_err(|error| error.to_string())
                })
            })
            .collect();
        let mut parts = Vec::new();
        for thread in threads {
            parts.push(thread.join().map_err(|_| "a client panicked")??);
        }
        Ok(parts)
    })?;
    let mut latencies = new_histogram()?;
    let mut seconds = 0.0_f64;
    for part in &parts {
        latencies.add(&part.latencies)?;
        seconds = seconds.max(part.seconds);
    }
    let microseconds = |quantile| latencies.value_at_quantile(quantile) as f64 / 1000.0;
    Ok(Load {
        requests: latencies.len(),
        seconds,
        latency: Latency {
            p50: microseconds(0.5),
            p99: microseconds(0.99),
            p999: microseconds(0.999),
        },
    })
}

/// What one connection has done.
struct Part {
    latencies: Histogram<u64>,
    seconds: f64,
}

/// Nanoseconds up to a minute, with three digits.
fn new_histogram() -> Result<Histogram<u64>> {
    Ok(Histogram::new_with_bounds(1, 60_000_000_000, 3)?)
}

/// A request in flight.
struct Request {
    command: Command,
    cookie: u64,
    offset: u64,
    since: Instant,
    /// What a read finds must be what this connection wrote.
    only_new: bool,
}

/// What the next byte from the server belongs to.
enum Expect {
    /// A reply, of which so many bytes are here.
    Reply(usize),
    /// The data of the read in this place, of which so many bytes are missing.
    Data(usize, usize),
}

/// Where offsets come from.
enum Source {
    /// The job, until this time.
    Job(Instant),
    /// Blocks to read back.
    ReadBack(Vec<u64>),
}

/// One connection with its window.
struct Connection {
    stream: UnixStream,
    job: Job,
    size_bytes: u64,
    source: Source,
    random: u64,
    next_sequential: u64,
    requests: u64,
    /// A request's place is in the low bits of its cookie.
    places: Vec<Option<Request>>,
    free: Vec<usize>,
    outgoing: Vec<u8>,
    sent: usize,
    incoming: Vec<u8>,
    expect: Expect,
    reply: [u8; REPLY_BYTES],
    latencies: Histogram<u64>,
    checks: Option<Checks>,
}

/// What verifying needs to remember.
struct Checks {
    /// Of each block, whether a write of it was acknowledged.
    acknowledged: Vec<bool>,
    /// Data received for each place.
    data: Vec<Vec<u8>>,
}

impl Connection {
    fn open(
        mut stream: UnixStream,
        export: &str,
        job: &Job,
        seed: u64,
        verify: bool,
    ) -> Result<Self> {
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let size_bytes = negotiate(&mut stream, export)?;
        if size_bytes < job.block_bytes as u64 {
            return Err("the disk is smaller than one request".into());
        }
        let blocks = usize::try_from(size_bytes)? / BLOCK_BYTES;
        Ok(Self {
            stream,
            job: *job,
            size_bytes,
            source: Source::Job(Instant::now()),
            random: seed,
            next_sequential: 0,
            requests: 0,
            places: (0..job.depth).map(|_| None).collect(),
            free: (0..job.depth).collect(),
            outgoing: Vec::with_capacity(BATCH_BYTES_MAX + HEADER_BYTES + job.block_bytes),
            sent: 0,
            incoming: vec![0; RECEIVE_BYTES],
            expect: Expect::Reply(0),
            reply: [0; REPLY_BYTES],
            latencies: new_histogram()?,
            checks: verify.then(|| Checks {
                acknowledged: vec![false; blocks],
                data: vec![Vec::new(); job.depth],
            }),
        })
    }

    fn run(&mut self, duration: Duration) -> Result<Part> {
        let begin = Instant::now();
        self.source = Source::Job(begin + duration);
        self.drive()?;
        let part = Part {
            latencies: self.latencies.clone(),
            seconds: begin.elapsed().as_secs_f64(),
        };
        if self.checks.is_some() {
            self.source = Source::ReadBack(self.blocks_to_read_back());
            self.drive()?;
        }
        self.push(Command::Disconnect, 0, 0, 0);
        while self.sent < self.outgoing.len() {
            self.exchange()?;
        }
        Ok(part)
    }

    /// Makes requests until the source ends, and waits for all replies.
    fn drive(&mut self) -> Result<()> {
        loop {
            if self.sent == self.outgoing.len() {
                self.outgoing.clear();
                self.sent = 0;
                self.fill_window();
            }
            if self.outgoing.is_empty() && self.free.len() == self.places.len() {
                return Ok(());
            }
            self.exchange()?;
        }
    }

    fn fill_window(&mut self) {
        let now = Instant::now();
        while self.outgoing.len() < BATCH_BYTES_MAX {
            let Some(place) = self.free.pop() else { return };
            let Some((command, offset)) = self.next(now) else {
                self.free.push(place);
                return;
            };
            self.request(place, command, offset, now);
        }
    }

    /// The next request of the source, if there is one.
    fn next(&mut self, now: Instant) -> Option<(Command, u64)> {
        match &mut self.source {
            Source::ReadBack(blocks) => {
                let block = blocks.pop()?;
                Some((Command::Read, block * BLOCK_BYTES as u64))
            }
            Source::Job(deadline) if now >= *deadline => None,
            Source::Job(_) => {
                let places = self.size_bytes / self.job.block_bytes as u64;
                let index = if self.job.sequential {
                    let index = self.next_sequential;
                    self.next_sequential = (index + 1) % places;
                    index
                } else {
                    next_random(&mut self.random) % places
                };
                let command = match self.job.access {
                    Access::Write => Command::Write,
                    Access::Read => Command::Read,
                    Access::Mixed(reads) if next_random(&mut self.random) % 100 < reads => {
                        Command::Read
                    }
                    Access::Mixed(_) => Command::Write,
                };
                Some((command, index * self.job.block_bytes as u64))
            }
        }
    }

    fn request_bytes(&self) -> usize {
        match self.source {
            Source::Job(_) => self.job.block_bytes,
            Source::ReadBack(_) => BLOCK_BYTES,
        }
    }

    fn request(&mut self, place: usize, command: Command, offset: u64, since: Instant) {
        self.requests += 1;
        let cookie = self.requests << PLACE_BITS | place as u64;
        let length = self.request_bytes();
        match command {
            // A flush is of the whole disk.
            Command::Flush => self.push(command, cookie, 0, 0),
            _ => self.push(command, cookie, offset, length),
        }
        if command == Command::Write {
            let begin = self.outgoing.len();
            self.outgoing.resize(begin + length, 0);
            let data = self.outgoing.get_mut(begin..).unwrap_or_default();
            pattern::fill(data, offset, Version::New);
        }
        let only_new = match &self.checks {
            Some(checks) if command == Command::Read => {
                let blocks = blocks_of(offset, length);
                let known = checks.acknowledged.get(blocks).unwrap_or_default();
                known.iter().all(|written| *written)
            }
            _ => false,
        };
        if let Some(slot) = self.places.get_mut(place) {
            *slot = Some(Request {
                command,
                cookie,
                offset,
                since,
                only_new,
            });
        }
    }

    fn push(&mut self, command: Command, cookie: u64, offset: u64, length: usize) {
        let length = u32::try_from(length).unwrap_or(u32::MAX);
        let header = header(command, cookie, offset, length);
        self.outgoing.extend_from_slice(&header);
    }

    /// Sends what waits and takes what has come. A server that cannot send its replies may stop
    /// reading, so no send waits without an eye on what comes in.
    fn exchange(&mut self) -> Result<()> {
        let fd = self.stream.as_raw_fd();
        let rest = self.outgoing.get(self.sent..).unwrap_or_default();
        if rest.is_empty() {
            return self.receive(MsgFlags::empty());
        }
        match send(fd, rest, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL) {
            Ok(count) => {
                self.sent += count;
                return Ok(());
            }
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            Err(Errno::EPIPE) => return Err("the server closed the connection".into()),
            Err(error) => return Err(format!("cannot send: {error}").into()),
        }
        let events = PollFlags::POLLIN | PollFlags::POLLOUT;
        let mut fds = [PollFd::new(self.stream.as_fd(), events)];
        let patience = u16::try_from(PATIENCE.as_millis()).unwrap_or(u16::MAX);
        if poll(&mut fds, patience)? == 0 {
            return Err("the server takes nothing and sends nothing".into());
        }
        let came = fds[0].revents().unwrap_or(PollFlags::empty());
        if came.contains(PollFlags::POLLIN) {
            self.receive(MsgFlags::MSG_DONTWAIT)?;
        }
        Ok(())
    }

    fn receive(&mut self, flags: MsgFlags) -> Result<()> {
        let mut incoming = std::mem::take(&mut self.incoming);
        let result = match recv(self.stream.as_raw_fd(), &mut incoming, flags) {
            Ok(0) | Err(Errno::ECONNRESET) => Err("the server closed the connection".into()),
            Ok(count) => self.take(incoming.get(..count).unwrap_or_default()),
            Err(Errno::EINTR) => Ok(()),
            Err(Errno::EAGAIN) => Err("the server does not reply in time".into()),
            Err(error) => Err(format!("cannot receive: {error}").into()),
        };
        self.incoming = incoming;
        result
    }

    fn take(&mut self, mut bytes: &[u8]) -> Result<()> {
        let now = Instant::now();
        while !bytes.is_empty() {
            let step = match self.expect {
                Expect::Reply(have) => (REPLY_BYTES - have).min(bytes.len()),
                Expect::Data(_, missing) => missing.min(bytes.len()),
            };
            let (head, rest) = bytes.split_at(step);
            bytes = rest;
            match self.expect {
                Expect::Reply(have) => {
                    if let Some(space) = self.reply.get_mut(have..have + step) {
                        space.copy_from_slice(head);
                    }
                    self.expect = Expect::Reply(have + step);
                    if have + step == REPLY_BYTES {
                        self.on_reply(now)?;
                    }
                }
                Expect::Data(place, missing) => {
                    let checks = self.checks.as_mut();
                    if let Some(data) = checks.and_then(|checks| checks.data.get_mut(place)) {
                        data.extend_from_slice(head);
                    }
                    self.expect = Expect::Data(place, missing - step);
                    if missing == step {
                        self.expect = Expect::Reply(0);
                        self.on_done(place, now)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// A reply is whole: it must be to a request in flight.
    fn on_reply(&mut self, now: Instant) -> Result<()> {
        let cookie = cookie_of(&self.reply)?;
        let place = (cookie & ((1 << PLACE_BITS) - 1)) as usize;
        let command = match self.places.get(place) {
            Some(Some(request)) if request.cookie == cookie => request.command,
            _ => return Err(format!("a reply to no request: cookie {cookie:#x}").into()),
        };
        if command == Command::Read {
            self.expect = Expect::Data(place, self.request_bytes());
            return Ok(());
        }
        self.expect = Expect::Reply(0);
        self.on_done(place, now)
    }

    /// A request is answered in full.
    fn on_done(&mut self, place: usize, now: Instant) -> Result<()> {
        let slot = self.places.get_mut(place).and_then(Option::take);
        let Some(request) = slot else { return Ok(()) };
        if self.job.sync_each && request.command == Command::Write {
            // The pair of write and flush is what counts; the place stays taken.
            self.request(place, Command::Flush, request.offset, request.since);
            return Ok(());
        }
        self.check(place, &request)?;
        self.free.push(place);
        if matches!(self.source, Source::Job(_)) {
            let nanoseconds = now.duration_since(request.since).as_nanos();
            self.latencies
                .saturating_record(u64::try_from(nanoseconds).unwrap_or(u64::MAX));
        }
        Ok(())
    }

    fn check(&mut self, place: usize, request: &Request) -> Result<()> {
        let bytes = self.request_bytes();
        let Some(checks) = &mut self.checks else {
            return Ok(());
        };
        if request.command != Command::Read {
            let blocks = blocks_of(request.offset, bytes);
            if let Some(written) = checks.acknowledged.get_mut(blocks) {
                written.fill(true);
            }
            return Ok(());
        }
        let Some(data) = checks.data.get_mut(place) else {
            return Ok(());
        };
        let wrong = pattern::first_wrong(data, request.offset, request.only_new);
        data.clear();
        match wrong {
            None => Ok(()),
            Some(at) => Err(format!("wrong data was read at offset {at}").into()),
        }
    }

    /// Blocks whose write was acknowledged, spread over the disk.
    fn blocks_to_read_back(&self) -> Vec<u64> {
        let Some(checks) = &self.checks else {
            return Vec::new();
        };
        let written: Vec<u64> = (0..)
            .zip(&checks.acknowledged)
            .filter_map(|(block, written)| written.then_some(block))
            .collect();
        let step = written.len().div_ceil(READ_BACK_BLOCKS_MAX).max(1);
        written.into_iter().step_by(step).collect()
    }
}

/// Indexes of the blocks of a range.
fn blocks_of(offset: u64, bytes: usize) -> std::ops::Range<usize> {
    let first = usize::try_from(offset).unwrap_or(usize::MAX) / BLOCK_BYTES;
    first..first.saturating_add(bytes / BLOCK_BYTES)
}

/// splitmix64.
pub fn next_random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (*state ^ (*state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests;
