//! The relay of one TLS connection: it decrypts for the worker and encrypts for the client.
//!
//! Overview: the worker has one end of a pair of unix sockets and serves it as any other client.
//! One thread for each connection waits by poll(2) for whichever side can go on, so that a worker
//! never computes a cipher for one client while others wait.
//!
//! Order: bytes of each direction keep their order. Nothing is read from a side as long as the
//! other has not taken what came before, so that a client that never reads holds two buffers and
//! its thread, and then its worker stops to read it as it does without TLS.
//!
//! The end: a client that has finished, with or without saying so, is told to the worker as the
//! end of its input; requests that arrived whole are carried out and answered. When the worker
//! closes, what it sent is delivered, then TLS and the connection are closed. A record that does
//! not prove its origin ends all at once, and so does a client that does not take its last replies
//! within [`PARTING_DEADLINE`].
//!
//! Crash consistency: none is needed. A reply passes here after the worker gave it, so that what
//! was answered holds whatever becomes of the relay.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustls::server::ServerConnection;

use super::Secured;

/// Size of each buffer: some records of 16 KiB, to be moved by one system call.
const BUFFER_BYTES: usize = 128 << 10;
/// Time that a client has to take its last replies after its worker has closed.
const PARTING_DEADLINE: Duration = Duration::from_secs(5);
/// Time that a client has to close after that: what it still sends would otherwise make the
/// kernel throw away the replies on their way to it.
const LINGER: Duration = Duration::from_secs(1);

/// What poll(2) says of a socket that has closed or failed.
const ENDED: PollFlags = PollFlags::POLLHUP.union(PollFlags::POLLERR);

/// All relays of a tracker.
#[derive(Debug, Default)]
pub struct Relays {
    running: Mutex<usize>,
    ended: Condvar,
    parting: AtomicUsize,
}

impl Relays {
    /// Relays whose worker has closed already.
    pub fn parting(&self) -> usize {
        self.parting.load(Ordering::Acquire)
    }

    /// Waits until all relays have ended; whether they did before the deadline.
    pub fn wait(&self, deadline: Instant) -> bool {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        while *running > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let waited = self.ended.wait_timeout(running, left);
            running = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    fn add(self: &Arc<Self>) -> Counted {
        *self.running.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        Counted {
            relays: Arc::clone(self),
            parting: false,
        }
    }
}

/// One relay among all, until it is dropped.
#[derive(Debug)]
struct Counted {
    relays: Arc<Relays>,
    parting: bool,
}

impl Counted {
    fn part(&mut self) {
        if !self.parting {
            self.parting = true;
            self.relays.parting.fetch_add(1, Ordering::AcqRel);
        }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        let relays = &self.relays;
        if self.parting {
            relays.parting.fetch_sub(1, Ordering::AcqRel);
        }
        *relays
            .running
            .lock()
            .unwrap_or_else(PoisonError::into_inner) -= 1;
        relays.ended.notify_all();
    }
}

/// Bytes that one side has sent and the other has not taken.
#[derive(Debug)]
struct Buffer {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Buffer {
    fn new() -> Self {
        Self {
            bytes: vec![0; BUFFER_BYTES].into_boxed_slice(),
            start: 0,
            end: 0,
        }
    }

    fn is_empty(&self) -> bool {
        self.start == self.end
    }

    fn pending(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    fn room(&mut self) -> &mut [u8] {
        &mut self.bytes[self.end..]
    }

    fn add(&mut self, count: usize) {
        self.end = (self.end + count).min(self.bytes.len());
    }

    fn remove(&mut self, count: usize) {
        self.start = (self.start + count).min(self.end);
        if self.is_empty() {
            self.clear();
        }
    }

    fn clear(&mut self) {
        (self.start, self.end) = (0, 0);
    }
}

/// One TLS connection in transmission.
#[derive(Debug)]
pub struct Relay {
    socket: TcpStream,
    tls: Box<ServerConnection>,
    worker: UnixStream,
    /// Received from the client, not decrypted.
    arrived: Buffer,
    /// Decrypted, not taken by the worker.
    inbound: Buffer,
    /// Where the worker's replies are read to; encrypted at once.
    outbound: Buffer,
    /// What the last poll(2) said.
    socket_readable: bool,
    worker_readable: bool,
    /// Nothing more comes from the client.
    client_ended: bool,
    /// The worker takes nothing more, or has been told that nothing comes.
    worker_deaf: bool,
    /// Nothing more comes from the worker.
    worker_ended: bool,
    /// When the client must have taken its last replies; set once the worker has closed.
    deadline: Option<Instant>,
    counted: Counted,
}

impl Relay {
    /// A relay for a connection that has been negotiated, and the socket for its worker.
    ///
    /// # Errors
    ///
    /// Descriptors have run out.
    pub fn new(
        relays: &Arc<Relays>,
        socket: TcpStream,
        secured: Secured,
    ) -> io::Result<(Self, OwnedFd)> {
        let (worker, for_worker) = UnixStream::pair()?;
        worker.set_nonblocking(true)?;
        socket.set_nonblocking(true)?;
        let mut tls = secured.connection;
        // More is never written than one buffer, and only when the one before has left.
        tls.set_buffer_limit(None);
        let relay = Self {
            socket,
            tls,
            worker,
            arrived: Buffer::new(),
            inbound: Buffer::new(),
            outbound: Buffer::new(),
            socket_readable: false,
            worker_readable: false,
            client_ended: false,
            worker_deaf: false,
            worker_ended: false,
            deadline: None,
            counted: relays.add(),
        };
        Ok((relay, for_worker.into()))
    }

    /// Passes bytes on until the connection has ended.
    ///
    /// # Errors
    ///
    /// It ended by a failure of either side, and not by one of them closing.
    pub fn run(mut self) -> io::Result<()> {
        loop {
            self.pass_requests()?;
            self.pass_replies()?;
            if self.worker_ended && !self.tls.wants_write() {
                return self.linger();
            }
            self.wait()?;
        }
    }

    /// From the client to the worker, as far as both go without waiting.
    fn pass_requests(&mut self) -> io::Result<()> {
        self.receive()?;
        loop {
            self.decrypt()?;
            if self.inbound.is_empty() || !self.deliver()? {
                break;
            }
        }
        if self.client_ended && self.inbound.is_empty() && !self.worker_deaf {
            self.worker_deaf = true;
            // A worker that has closed needs no word.
            let _closed = self.worker.shutdown(Shutdown::Write);
        }
        Ok(())
    }

    fn receive(&mut self) -> io::Result<()> {
        if !self.socket_readable || !self.wants_requests() {
            return Ok(());
        }
        self.socket_readable = false;
        match (&self.socket).read(self.arrived.room()) {
            // The library tells an end that was announced from one that was not.
            Ok(0) => {
                self.tls.read_tls(&mut io::empty())?;
                self.process()
            }
            Ok(count) => {
                self.arrived.add(count);
                Ok(())
            }
            Err(error) if is_passing(&error) => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn wants_requests(&self) -> bool {
        !self.client_ended && !self.worker_deaf && self.arrived.is_empty()
    }

    /// Decrypts what has arrived, as far as there is room for it.
    fn decrypt(&mut self) -> io::Result<()> {
        while !self.client_ended && !self.inbound.room().is_empty() {
            match self.tls.reader().read(self.inbound.room()) {
                Ok(0) => self.client_ended = true,
                Ok(count) => self.inbound.add(count),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if self.arrived.is_empty() {
                        return Ok(());
                    }
                    self.feed_arrived()?;
                }
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                    tracing::debug!("A client closed without closing TLS");
                    self.client_ended = true;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn feed_arrived(&mut self) -> io::Result<()> {
        let mut pending = self.arrived.pending();
        let before = pending.len();
        self.tls.read_tls(&mut pending)?;
        let taken = before - pending.len();
        if taken == 0 {
            // After the word that nothing comes the library takes nothing either.
            self.arrived.clear();
        }
        self.arrived.remove(taken);
        self.process()
    }

    fn process(&mut self) -> io::Result<()> {
        if let Err(error) = self.tls.process_new_packets() {
            // The client is told why, if it still listens.
            let _gone = self.tls.write_tls(&mut &self.socket);
            return Err(io::Error::new(io::ErrorKind::InvalidData, error));
        }
        Ok(())
    }

    /// Gives the worker what is decrypted; whether it took all.
    fn deliver(&mut self) -> io::Result<bool> {
        while !self.inbound.is_empty() {
            match (&self.worker).write(self.inbound.pending()) {
                Ok(count) => self.inbound.remove(count),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                // It has closed, or the tracker stops; there may be replies left.
                Err(_) => {
                    self.worker_deaf = true;
                    self.inbound.clear();
                    self.arrived.clear();
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    /// From the worker to the client, as far as both go without waiting.
    fn pass_replies(&mut self) -> io::Result<()> {
        if self.wants_replies() && self.worker_readable {
            self.worker_readable = false;
            match (&self.worker).read(self.outbound.room()) {
                Ok(0) => self.end_of_replies(),
                Ok(count) => {
                    self.outbound.add(count);
                    self.tls.writer().write_all(self.outbound.pending())?;
                    self.outbound.clear();
                }
                Err(error) if is_passing(&error) => {}
                // Requests that it had not read are lost with it.
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                    self.end_of_replies();
                }
                Err(error) => return Err(error),
            }
        }
        while self.tls.wants_write() {
            match self.tls.write_tls(&mut &self.socket) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn wants_replies(&self) -> bool {
        !self.worker_ended && !self.tls.wants_write()
    }

    fn end_of_replies(&mut self) {
        self.worker_ended = true;
        self.part();
        self.tls.send_close_notify();
    }

    fn part(&mut self) {
        self.counted.part();
        let now = Instant::now();
        self.deadline.get_or_insert(now + PARTING_DEADLINE);
    }

    /// Waits until one of the sockets can do what is wanted of it.
    fn wait(&mut self) -> io::Result<()> {
        let mut of_socket = PollFlags::empty();
        of_socket.set(PollFlags::POLLIN, self.wants_requests());
        of_socket.set(PollFlags::POLLOUT, self.tls.wants_write());
        let mut of_worker = PollFlags::empty();
        of_worker.set(PollFlags::POLLIN, self.wants_replies());
        of_worker.set(PollFlags::POLLOUT, !self.inbound.is_empty());
        // Poll tells of a socket that has closed even where nothing is asked of it: of the worker
        // once, to begin the parting, and of the client only where something follows from it.
        let watches_worker = !of_worker.is_empty() || self.deadline.is_none();
        let mut watched = Vec::with_capacity(2);
        if watches_worker {
            watched.push(PollFd::new(self.worker.as_fd(), of_worker));
        }
        if !of_socket.is_empty() {
            watched.push(PollFd::new(self.socket.as_fd(), of_socket));
        }
        match poll(&mut watched, time_left(self.deadline)?) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let mut events = watched.iter().map(|fd| fd.revents());
        let worker = (watches_worker.then(|| events.next()).flatten().flatten())
            .unwrap_or(PollFlags::empty());
        let socket = events.next().flatten().unwrap_or(PollFlags::empty());
        // Whatever else happened to a socket, reading it finds out.
        self.worker_readable = worker.intersects(ENDED | PollFlags::POLLIN);
        self.socket_readable = socket.intersects(ENDED | PollFlags::POLLIN);
        if worker.intersects(ENDED) {
            self.part();
        }
        Ok(())
    }

    /// After the last byte for the client: waits until it has closed, and throws away what it sends.
    fn linger(&mut self) -> io::Result<()> {
        if self.socket.shutdown(Shutdown::Write).is_err() {
            // The client was faster.
            return Ok(());
        }
        let deadline = Some(Instant::now() + LINGER);
        loop {
            let mut watched = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
            match poll(&mut watched, time_left(deadline)?) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
            match (&self.socket).read(self.arrived.room()) {
                Ok(0) => return Ok(()),
                Ok(_) => {}
                Err(error) if is_passing(&error) => {}
                Err(error) => return Err(error),
            }
        }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        // Before it is counted as ended: who waits for that may end the process.
        let _closed = self.socket.shutdown(Shutdown::Both);
    }
}

fn is_passing(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock
    )
}

fn time_left(deadline: Option<Instant>) -> io::Result<PollTimeout> {
    let Some(deadline) = deadline else {
        return Ok(PollTimeout::NONE);
    };
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        let text = "the client was too slow to take its last replies or to close";
        return Err(io::Error::new(io::ErrorKind::TimedOut, text));
    }
    // Rounded up, so that the last part of a millisecond is not spent in turns without a wait.
    let milliseconds = left.as_millis().saturating_add(1);
    Ok(PollTimeout::try_from(milliseconds).unwrap_or(PollTimeout::MAX))
}
