//! A worker: one thread, one driver of its I/O, the connections that it was given.
//!
//! Overview: every turn of the loop costs one system call with an io_uring, and a few with threads. It
//! takes all completions, understands all requests that a socket brought at once, submits their disk
//! operations, and answers what is finished in one send for each connection. This file moves bytes
//! and looks after connections; what the bytes ask for is carried out in `dispatch`.
//!
//! Order: what a completion brought is noted first and the connection marked as touched; when all
//! completions are taken, each touched connection is looked after once.
//!
//! What it does not handle: negotiation (`nbd::handshake`), requests (`dispatch`).

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crossbeam_channel::{Receiver, Sender};
use nix::sys::eventfd::EventFd;
use nix::sys::socket::{Shutdown, shutdown};

use super::buffer::{Buffer, BufferPool, HEAD_BYTES};
use super::connection::{Connection, INPUT_BYTES, Input, Payload, Receiving};
use super::driver::Driver;
use super::operation::Operation;
use super::patience::Patience;
use super::status::Job;
use super::survey::Survey;
use super::transfer::{Completion, Held, SendBatch};
use super::view::View;
use crate::disk::Disk;
use crate::epoch::{Machine, Waiter};
use crate::error::{Error, Result};
use crate::nbd::handshake::Session;

/// What a worker is told from outside.
pub enum Order {
    /// Serve this negotiated connection, which may be to a frozen view.
    Serve(OwnedFd, Session, Option<View>),
    /// Answer a BLOCK_STATUS of the connection with this index.
    Status {
        /// Index of the connection.
        connection: usize,
        /// The whole reply.
        reply: Vec<u8>,
    },
    /// The write in this slot has waited.
    GoOn(usize),
    /// Receive nothing more, finish what is in flight, then end.
    Drain,
    /// Cut the connections that are still there.
    Abort,
}

/// What a worker has done, read by others while it runs.
#[derive(Debug, Default)]
pub struct Counters {
    /// Connections at present.
    pub connections: AtomicU64,
    /// READ requests.
    pub reads: AtomicU64,
    /// WRITE requests.
    pub writes: AtomicU64,
    /// All other requests.
    pub others: AtomicU64,
    /// Bytes read by clients.
    pub read_bytes: AtomicU64,
    /// Bytes written by clients.
    pub written_bytes: AtomicU64,
    /// Requests that were answered with an error.
    pub errors: AtomicU64,
}

/// What all workers share.
pub struct Shared {
    /// The disks, in the order of the exports.
    pub disks: Vec<Arc<Disk>>,
    /// Epochs and journals.
    pub machine: Arc<Machine>,
    /// The workers have been told to end.
    pub draining: AtomicBool,
}

/// How a worker hears from others and asks them.
pub struct Lines {
    /// What it is told.
    pub orders: Receiver<Order>,
    /// Readable when it is told something.
    pub wake: Arc<EventFd>,
    /// To the thread that answers BLOCK_STATUS.
    pub jobs: Sender<Job>,
    /// By this the journals tell that a write may go on.
    pub bell: Arc<dyn Waiter>,
}

const TAG_WAKE: u64 = 0;
const TAG_RECEIVE: u64 = 1 << 32;
const TAG_SEND: u64 = 2 << 32;
pub(super) const TAG_DISK: u64 = 3 << 32;
const TAG_KIND: u64 = !0 << 32;

/// The state of one worker. Lives on its thread.
pub struct Worker {
    pub(super) number: usize,
    pub(super) ring: Driver,
    pub(super) shared: Arc<Shared>,
    pub(super) counters: Arc<Counters>,
    orders: Receiver<Order>,
    wake: Arc<EventFd>,
    /// To the thread that answers BLOCK_STATUS.
    pub(super) jobs: Sender<Job>,
    /// By this the journals tell that a write may go on.
    pub(super) bell: Arc<dyn Waiter>,
    /// Where the holes of each disk are searched.
    pub(super) surveys: Vec<Option<Survey>>,
    pub(super) pool: BufferPool,
    pub(super) connections: Vec<Option<Box<Connection>>>,
    pub(super) operations: Vec<Option<Operation>>,
    pub(super) idle_operations: Vec<usize>,
    touched: Vec<usize>,
    /// Requests that this turn took.
    pub(super) turn_requests: usize,
    pub(super) patience: Patience,
    draining: bool,
}

impl Worker {
    /// A worker with no connections.
    pub fn new(
        number: usize,
        ring: Driver,
        shared: Arc<Shared>,
        counters: Arc<Counters>,
        lines: Lines,
    ) -> Self {
        let Lines {
            orders,
            wake,
            jobs,
            bell,
        } = lines;
        Self {
            jobs,
            bell,
            surveys: shared.disks.iter().map(|_| None).collect(),
            number,
            ring,
            shared,
            counters,
            orders,
            wake,
            pool: BufferPool::default(),
            connections: Vec::new(),
            operations: Vec::new(),
            idle_operations: Vec::new(),
            touched: Vec::new(),
            turn_requests: 0,
            patience: Patience::default(),
            draining: false,
        }
    }

    /// Serves until it has been told to drain and nothing is left.
    ///
    /// # Errors
    ///
    /// Waiting for completions fails.
    pub fn run(mut self) -> Result<()> {
        self.ring.poll_readable(self.wake.as_fd(), TAG_WAKE);
        let mut completions = Vec::new();
        let mut turn = Vec::new();
        while !(self.draining && self.connections.iter().all(Option::is_none)) {
            self.wait(&mut completions)
                .map_err(|error| Error::io("Cannot wait for the I/O of a worker", error))?;
            for completion in completions.drain(..) {
                self.complete(completion);
            }
            std::mem::swap(&mut self.touched, &mut turn);
            for index in turn.drain(..) {
                self.look_after(index);
            }
        }
        Ok(())
    }

    fn wait(&mut self, completions: &mut Vec<Completion>) -> std::io::Result<()> {
        self.patience
            .note_turn(std::mem::take(&mut self.turn_requests));
        // Whoever has more to be understood does not wait for others.
        let sleeps = self.touched.is_empty();
        if sleeps && let Some(time) = self.patience.time_awake() {
            let came = self.ring.watch(time)?;
            self.patience.note_awake(came);
        }
        self.ring.wait(completions, sleeps)
    }

    fn complete(&mut self, completion: Completion) {
        let index = (completion.tag & !TAG_KIND) as usize;
        match (completion.tag & TAG_KIND, completion.held) {
            (TAG_RECEIVE, Held::Buffer(buffer)) => {
                self.received(index, completion.result, buffer);
            }
            (TAG_SEND, Held::Send(batch)) => self.sent(index, completion.result, batch),
            (TAG_DISK, held) => self.disk_done(index, completion.result, held),
            _ => self.take_orders(),
        }
    }

    fn take_orders(&mut self) {
        // Reading resets the counter; an empty one only means that nothing is to be reset.
        let _count = self.wake.read();
        self.ring.poll_readable(self.wake.as_fd(), TAG_WAKE);
        while let Ok(order) = self.orders.try_recv() {
            match order {
                Order::Serve(socket, session, view) => self.adopt(socket, session, view),
                Order::Status { connection, reply } => self.status_found(connection, reply),
                Order::GoOn(slot) => self.go_on(slot),
                Order::Drain => {
                    self.draining = true;
                    self.shared.draining.store(true, Ordering::Release);
                    self.shut_sockets(Shutdown::Read);
                }
                Order::Abort => self.shut_sockets(Shutdown::Both),
            }
        }
    }

    fn shut_sockets(&mut self, how: Shutdown) {
        for index in 0..self.connections.len() {
            if let Some(connection) = &mut self.connections[index] {
                connection.closing = true;
                // The peer may have gone already, which is as good.
                let _gone = shutdown(connection.socket().as_raw_fd(), how);
                self.touch(index);
            }
        }
    }

    fn adopt(&mut self, socket: OwnedFd, session: Session, view: Option<View>) {
        // Without memory for its input the connection is dropped; the client sees it close.
        let Ok(buffer) = self.pool.take(INPUT_BYTES) else {
            return;
        };
        if let Err(error) = self.ring.add_socket(socket.as_fd()) {
            tracing::warn!("A connection was dropped: {error}");
            self.pool.put(buffer);
            return;
        }
        let mut connection = Box::new(Connection::new(socket, session, view, buffer));
        connection.closing = self.draining;
        let index = self
            .connections
            .iter()
            .position(Option::is_none)
            .unwrap_or_else(|| {
                self.connections.push(None);
                self.connections.len() - 1
            });
        self.connections[index] = Some(connection);
        self.counters.connections.fetch_add(1, Ordering::Relaxed);
        self.touch(index);
    }

    /// Has the connection looked after at the end of this turn.
    pub(super) fn touch(&mut self, index: usize) {
        if let Some(Some(connection)) = self.connections.get_mut(index)
            && !connection.touched
        {
            connection.touched = true;
            self.touched.push(index);
        }
    }

    /// After a batch: understand what could not be taken before, send, receive, or let go.
    fn look_after(&mut self, index: usize) {
        let Some(slot) = self.connections.get_mut(index) else {
            return;
        };
        let Some(mut connection) = slot.take() else {
            return;
        };
        connection.touched = false;
        self.understand(index, &mut connection);
        self.send(index, &mut connection);
        self.receive(index, &mut connection);
        if connection.is_finished() {
            if let Some(input) = connection.input.take() {
                self.pool.put(input.buffer);
            }
            self.counters.connections.fetch_sub(1, Ordering::Relaxed);
        } else {
            let goes_on = connection.turn_is_over() && !connection.closing;
            self.connections[index] = Some(connection);
            if goes_on {
                self.touch(index);
            }
        }
    }

    fn send(&mut self, index: usize, connection: &mut Connection) {
        if connection.sending || connection.output.is_empty() {
            return;
        }
        if connection.broken {
            return;
        }
        let spare = connection.spare.take().unwrap_or_default();
        let batch = std::mem::replace(&mut connection.output, spare);
        connection.sending = true;
        self.ring
            .send(connection.socket(), batch, TAG_SEND | index as u64);
    }

    fn sent(&mut self, index: usize, result: i32, mut batch: Box<SendBatch>) {
        let Some(Some(connection)) = self.connections.get_mut(index) else {
            return;
        };
        connection.sending = false;
        match usize::try_from(result) {
            Ok(count) if count > 0 => connection.note_sent(&mut batch, count, &mut self.pool),
            _ if matches!(-result, libc::EINTR | libc::EAGAIN) => {}
            _ => {
                connection.broken = true;
                connection.closing = true;
                // Wakes the receive that may still be in flight.
                let _gone = shutdown(connection.socket().as_raw_fd(), Shutdown::Both);
            }
        }
        if !batch.is_empty() && !connection.broken {
            connection.sending = true;
            self.ring
                .send(connection.socket(), batch, TAG_SEND | index as u64);
        } else {
            connection.spare = Some(batch);
        }
        self.touch(index);
    }

    fn receive(&mut self, index: usize, connection: &mut Connection) {
        if connection.is_receiving()
            || connection.closing
            || connection.is_full()
            || connection.turn_is_over()
        {
            return;
        }
        let tag = TAG_RECEIVE | index as u64;
        if let Some(Payload {
            request,
            buffer,
            received,
        }) = connection.payload.take()
        {
            let range = HEAD_BYTES + received..HEAD_BYTES + request.payload_bytes();
            self.ring
                .receive(connection.socket(), buffer, range, true, tag);
            connection.receiving = Receiving::Payload(request, received);
        } else if let Some(mut input) = connection.input.take() {
            input.compact();
            let range = input.end..input.buffer.bytes().len();
            self.ring
                .receive(connection.socket(), input.buffer, range, false, tag);
            connection.receiving = Receiving::Requests(input.end);
        }
    }

    fn received(&mut self, index: usize, result: i32, buffer: Buffer) {
        let Some(Some(connection)) = self.connections.get_mut(index) else {
            return;
        };
        let count = match usize::try_from(result) {
            Ok(count) if count > 0 => count,
            _ if matches!(-result, libc::EINTR | libc::EAGAIN) => 0,
            _ => {
                // The end of the stream, or an error: nothing more will come.
                connection.closing = true;
                0
            }
        };
        match std::mem::replace(&mut connection.receiving, Receiving::Nothing) {
            Receiving::Payload(request, received) => {
                connection.payload = Some(Payload {
                    request,
                    buffer,
                    received: received + count,
                });
            }
            Receiving::Requests(end) => {
                connection.input = Some(Input {
                    buffer,
                    start: 0,
                    end: end + count,
                });
            }
            Receiving::Nothing => self.pool.put(buffer),
        }
        self.touch(index);
    }
}
