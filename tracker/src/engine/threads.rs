//! The driver for machines without io_uring: epoll for sockets, a pool of threads for disks.
//!
//! Overview: a receive or send is tried at once, without blocking; where the socket is not ready, it
//! waits in the socket's port until epoll says that it is. Sockets are watched edge-triggered from
//! the moment they are added, so that a busy socket costs no call beyond its own transfers. Space for
//! sending is watched only while a send waits for it: else each reply that a client takes would wake
//! the worker. Operations on disks go to the pool.
//!
//! Order: operations complete in any order. Each socket has at most one receive and one send in
//! flight.
//!
//! What it does not handle: meaning. Tags, short transfers and errors are the worker's.

use std::io::{self, IoSlice};
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{MsgFlags, recv, sendmsg};

use super::buffer::Buffer;
use super::pool::{Job, Pool, Work};
use super::transfer::{Completion, Held, PIECES_MAX, SendBatch};
use crate::disk::Disk;

/// Most events that are taken at once; more wait for the next turn.
const EVENTS_MAX: usize = 128;
/// What epoll calls the pool's bell; everything else is called by its descriptor.
const BELL: u64 = u64::MAX;

/// A receive that is not finished.
struct Receive {
    buffer: Buffer,
    range: Range<usize>,
    all: bool,
    received: usize,
    tag: u64,
}

/// A descriptor that is watched, and what waits for it.
#[derive(Default)]
struct Port {
    /// Epoll knows the descriptor.
    watched: bool,
    /// Something may be there that nobody has received; an end or an error, too.
    readable: bool,
    /// Epoll watches for space.
    space_watched: bool,
    receive: Option<Receive>,
    send: Option<(Box<SendBatch>, u64)>,
    /// Tag of whoever waits until it can be read.
    poll: Option<u64>,
}

/// The driver of one worker. Belongs to its thread.
pub struct Threads {
    epoll: Epoll,
    pool: Pool,
    /// By descriptor.
    ports: Vec<Port>,
    /// Finished at once, not yet given out.
    done: Vec<Completion>,
    /// A descriptor cannot be watched that the worker cannot do without.
    broken: Option<Errno>,
}

impl Threads {
    /// A driver with nothing in flight.
    ///
    /// # Errors
    ///
    /// Descriptors or memory are short.
    pub fn new() -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let pool = Pool::new()?;
        epoll.add(pool.bell(), EpollEvent::new(EpollFlags::EPOLLIN, BELL))?;
        Ok(Self {
            epoll,
            pool,
            ports: Vec::new(),
            done: Vec::new(),
            broken: None,
        })
    }

    /// Watches a socket from now on, until it is closed. Whatever was known of its number is
    /// forgotten: it belonged to a socket that has been closed since.
    ///
    /// # Errors
    ///
    /// Memory or the user's allowance of watched descriptors is exhausted.
    pub fn add_socket(&mut self, socket: BorrowedFd<'_>) -> io::Result<()> {
        let descriptor = socket.as_raw_fd();
        let event = EpollEvent::new(interest(false), descriptor as u64);
        self.epoll.add(socket, event)?;
        *self.port(descriptor) = Port {
            watched: true,
            readable: true,
            ..Port::default()
        };
        Ok(())
    }

    /// Receives into a range of the buffer; with `all`, until the range is full.
    pub fn receive(
        &mut self,
        socket: BorrowedFd<'_>,
        buffer: Buffer,
        range: Range<usize>,
        all: bool,
        tag: u64,
    ) {
        let descriptor = socket.as_raw_fd();
        let receive = Receive {
            buffer,
            range,
            all,
            received: 0,
            tag,
        };
        self.port(descriptor).receive = Some(receive);
        self.try_receive(descriptor);
    }

    /// Sends as much of the batch as one system call takes.
    pub fn send(&mut self, socket: BorrowedFd<'_>, batch: Box<SendBatch>, tag: u64) {
        let descriptor = socket.as_raw_fd();
        self.port(descriptor).send = Some((batch, tag));
        self.try_send(descriptor);
        let port = self.port(descriptor);
        let waits = port.send.is_some();
        if port.space_watched == waits {
            return;
        }
        port.space_watched = waits;
        let mut event = EpollEvent::new(interest(waits), descriptor as u64);
        // Where space cannot be watched the send fails, and with it the connection; where it is
        // watched needlessly, nothing is lost.
        if let Err(errno) = self.epoll.modify(socket, &mut event)
            && let Some((batch, tag)) = self.port(descriptor).send.take()
        {
            self.finish(tag, Err(errno), Held::Send(batch));
        }
    }

    /// Has the pool do something to a disk.
    pub fn submit(&mut self, disk: &Arc<Disk>, work: Work, held: Held, tag: u64) {
        let disk = Arc::clone(disk);
        self.pool.submit(Job {
            tag,
            disk,
            work,
            held,
        });
    }

    /// Waits until a descriptor can be read.
    pub fn poll_readable(&mut self, descriptor: BorrowedFd<'_>, tag: u64) {
        let number = descriptor.as_raw_fd();
        let port = self.port(number);
        port.poll = Some(tag);
        let watched = std::mem::replace(&mut port.watched, true);
        let once = EpollFlags::EPOLLIN | EpollFlags::EPOLLONESHOT;
        let mut event = EpollEvent::new(once, number as u64);
        let result = if watched {
            self.epoll.modify(descriptor, &mut event)
        } else {
            self.epoll.add(descriptor, event)
        };
        if let Err(errno) = result {
            self.broken = Some(errno);
        }
    }

    /// Waits for a completion if `block` says so, then gives out all that there are.
    ///
    /// # Errors
    ///
    /// Waiting fails for a reason that trying again does not mend.
    pub fn wait(&mut self, completions: &mut Vec<Completion>, block: bool) -> io::Result<()> {
        completions.append(&mut self.done);
        let mut events = [EpollEvent::empty(); EVENTS_MAX];
        loop {
            if let Some(errno) = self.broken {
                return Err(errno.into());
            }
            // What is finished already does not keep sockets and disks from being looked at: one
            // that always has something must not hold up the others.
            let blocks = block && completions.is_empty();
            let timeout = match blocks {
                true => EpollTimeout::NONE,
                false => EpollTimeout::ZERO,
            };
            let count = match self.epoll.wait(&mut events, timeout) {
                Ok(count) => count,
                Err(Errno::EINTR) => continue,
                Err(errno) => return Err(errno.into()),
            };
            for event in &events[..count] {
                if event.data() == BELL {
                    self.pool.collect(completions);
                } else {
                    self.ready(event.data() as RawFd, event.events());
                }
            }
            completions.append(&mut self.done);
            if !blocks || !completions.is_empty() {
                return Ok(());
            }
        }
    }

    fn port(&mut self, descriptor: RawFd) -> &mut Port {
        let index = descriptor as usize;
        if index >= self.ports.len() {
            self.ports.resize_with(index + 1, Port::default);
        }
        &mut self.ports[index]
    }

    fn ready(&mut self, descriptor: RawFd, events: EpollFlags) {
        let port = self.port(descriptor);
        if let Some(tag) = port.poll.take() {
            self.finish(tag, Ok(1), Held::Nothing);
            return;
        }
        // An end or an error is something to be received as well.
        port.readable |= events != EpollFlags::EPOLLOUT;
        self.try_receive(descriptor);
        self.try_send(descriptor);
    }

    fn finish(&mut self, tag: u64, result: Result<usize, Errno>, held: Held) {
        let result = match result {
            Ok(count) => i32::try_from(count).unwrap_or(i32::MAX),
            Err(errno) => -(errno as i32),
        };
        self.done.push(Completion { tag, result, held });
    }

    /// Receives what is there; the receive goes on waiting if that is not enough.
    fn try_receive(&mut self, descriptor: RawFd) {
        let port = self.port(descriptor);
        if !port.readable {
            return;
        }
        let Some(mut receive) = port.receive.take() else {
            return;
        };
        let result = match receive.attempt(descriptor) {
            // The next edge says that more is there: it had been taken to the last byte.
            Err(Errno::EAGAIN) => {
                port.readable = false;
                port.receive = Some(receive);
                return;
            }
            // What came before it is given out first, as receiving does; the next one meets it.
            Err(_) if receive.received > 0 => Ok(receive.received),
            other => other,
        };
        self.finish(receive.tag, result, Held::Buffer(receive.buffer));
    }

    fn try_send(&mut self, descriptor: RawFd) {
        let Some((batch, tag)) = self.port(descriptor).send.take() else {
            return;
        };
        match send_now(descriptor, &batch) {
            // The next edge says that there is space again.
            Err(Errno::EAGAIN) => self.port(descriptor).send = Some((batch, tag)),
            result => self.finish(tag, result, Held::Send(batch)),
        }
    }
}

impl Receive {
    /// Receives once, or with `all` until the range is full, the stream ends or nothing is there.
    fn attempt(&mut self, socket: RawFd) -> Result<usize, Errno> {
        loop {
            let target =
                &mut self.buffer.bytes_mut()[self.range.start + self.received..self.range.end];
            match recv(socket, target, MsgFlags::MSG_DONTWAIT) {
                Ok(count) => {
                    self.received += count;
                    if !self.all || count == 0 || self.received == self.range.len() {
                        return Ok(self.received);
                    }
                }
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno),
            }
        }
    }
}

fn send_now(socket: RawFd, batch: &SendBatch) -> Result<usize, Errno> {
    let mut slices = [IoSlice::new(&[]); PIECES_MAX];
    let mut count = 0;
    for (slice, bytes) in slices.iter_mut().zip(batch.slices()) {
        *slice = IoSlice::new(bytes);
        count += 1;
    }
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    loop {
        match sendmsg::<()>(socket, &slices[..count], &[], flags, None) {
            Err(Errno::EINTR) => {}
            result => return result,
        }
    }
}

/// What a socket is watched for.
fn interest(space: bool) -> EpollFlags {
    let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLET;
    if space {
        flags | EpollFlags::EPOLLOUT
    } else {
        flags
    }
}
