//! A worker: one thread, one io_uring, the connections that it was given.
//!
//! Overview: every turn of the loop costs one system call. It takes all completions, understands
//! all requests that a socket brought at once, submits their disk operations, and answers what is
//! finished in one send for each connection.
//!
//! Order of a write: payload complete; admission, which stamps the epoch and puts the record into
//! the journal; data to the disk; reply. Admission waits for the payload, so that a client that
//! dawdles in the middle of one cannot hold up a cut. Requests in flight have no order among
//! each other, as the NBD specification allows. A FLUSH is a sync of the file, which covers every
//! write that was answered on any connection.
//!
//! Crash consistency: SIGKILL after admission leaves the record in the page cache of the journal,
//! whether or not the data followed. See `journal` for the rest.
//!
//! What it does not handle: negotiation (`nbd::handshake`), validity (`nbd::request`), epochs.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crossbeam_channel::Receiver;
use nix::sys::eventfd::EventFd;
use nix::sys::socket::{Shutdown, shutdown};
use zerocopy::FromBytes;

use super::buffer::{Buffer, BufferPool, HEAD_BYTES};
use super::connection::{Connection, INPUT_BYTES, Input, Payload, Receiving};
use super::operation::{Operation, Outcome};
use super::uring::{Completion, Held, Ring, SendBatch};
use crate::disk::Disk;
use crate::epoch::Machine;
use crate::error::{Error, Result};
use crate::nbd::request::{Command, ExportLimits, Request, Verdict, validate};
use crate::nbd::wire::{REQUEST_BYTES, REQUEST_MAGIC, ReplyError, RequestHeader};

/// What a worker is told from outside.
pub enum Order {
    /// Serve this negotiated connection to the disk with this index.
    Serve(OwnedFd, usize),
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
    /// TRIM, WRITE_ZEROES and FLUSH requests.
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
}

const TAG_WAKE: u64 = 0;
const TAG_RECEIVE: u64 = 1 << 32;
const TAG_SEND: u64 = 2 << 32;
const TAG_DISK: u64 = 3 << 32;
const TAG_KIND: u64 = !0 << 32;

/// Bytes that a request moves over the socket.
fn payload_bytes(request: &Request) -> usize {
    match request.command {
        Command::Read | Command::Write => request.length as usize,
        _ => 0,
    }
}

/// The state of one worker. Lives on its thread.
pub struct Worker {
    number: usize,
    ring: Ring,
    shared: Arc<Shared>,
    counters: Arc<Counters>,
    orders: Receiver<Order>,
    wake: Arc<EventFd>,
    pool: BufferPool,
    connections: Vec<Option<Box<Connection>>>,
    operations: Vec<Option<Operation>>,
    idle_operations: Vec<usize>,
    touched: Vec<usize>,
    draining: bool,
}

impl Worker {
    /// A worker with no connections.
    pub fn new(
        number: usize,
        ring: Ring,
        shared: Arc<Shared>,
        counters: Arc<Counters>,
        orders: Receiver<Order>,
        wake: Arc<EventFd>,
    ) -> Self {
        Self {
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
            draining: false,
        }
    }

    /// Serves until it has been told to drain and nothing is left.
    ///
    /// # Errors
    ///
    /// The ring fails.
    pub fn run(mut self) -> Result<()> {
        self.ring.poll_readable(self.wake.as_raw_fd(), TAG_WAKE);
        let mut completions = Vec::new();
        while !(self.draining && self.connections.iter().all(Option::is_none)) {
            self.ring
                .wait(&mut completions)
                .map_err(|error| Error::io("Cannot wait on the io_uring of a worker", error))?;
            for completion in completions.drain(..) {
                self.complete(completion);
            }
            while let Some(index) = self.touched.pop() {
                self.look_after(index);
            }
        }
        Ok(())
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
        self.ring.poll_readable(self.wake.as_raw_fd(), TAG_WAKE);
        while let Ok(order) = self.orders.try_recv() {
            match order {
                Order::Serve(socket, disk) => self.adopt(socket, disk),
                Order::Drain => {
                    self.draining = true;
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
                let _gone = shutdown(connection.socket(), how);
                self.touch(index);
            }
        }
    }

    fn adopt(&mut self, socket: OwnedFd, disk: usize) {
        // Without memory for its input the connection is dropped; the client sees it close.
        let Ok(buffer) = self.pool.take(INPUT_BYTES) else {
            return;
        };
        let mut connection = Box::new(Connection::new(socket, disk, buffer));
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

    fn touch(&mut self, index: usize) {
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
            self.connections[index] = Some(connection);
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
                let _gone = shutdown(connection.socket(), Shutdown::Both);
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
        if connection.is_receiving() || connection.closing || connection.is_full() {
            return;
        }
        let tag = TAG_RECEIVE | index as u64;
        let socket = connection.socket();
        if let Some(Payload {
            request,
            buffer,
            received,
        }) = connection.payload.take()
        {
            let range = HEAD_BYTES + received..HEAD_BYTES + request.length as usize;
            self.ring.receive(socket, buffer, range, true, tag);
            connection.receiving = Receiving::Payload(request, received);
        } else if let Some(mut input) = connection.input.take() {
            input.compact();
            let range = input.end..input.buffer.bytes().len();
            self.ring.receive(socket, input.buffer, range, false, tag);
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

    /// Takes whole requests from the input until it runs out or enough is in flight.
    fn understand(&mut self, index: usize, connection: &mut Connection) {
        if let Some(payload) = connection.payload.take() {
            if payload.received < payload.request.length as usize {
                connection.payload = (!connection.closing).then_some(payload);
                return;
            }
            self.begin(index, connection, payload.request, Some(payload.buffer));
        }
        let Some(mut input) = connection.input.take() else {
            return;
        };
        while !connection.closing && connection.payload.is_none() && !connection.is_full() {
            if connection.skip_bytes > 0 {
                let step = (connection.skip_bytes as usize).min(input.pending().len());
                connection.skip_bytes -= step as u32;
                input.start += step;
                if connection.skip_bytes > 0 {
                    break;
                }
            }
            let Ok((header, _)) = RequestHeader::read_from_prefix(input.pending()) else {
                break;
            };
            if header.magic.get() != REQUEST_MAGIC {
                // What follows cannot be told apart any more. The connection closes.
                connection.closing = true;
                break;
            }
            input.start += REQUEST_BYTES;
            let disk = &self.shared.disks[connection.disk];
            let limits = ExportLimits {
                size_bytes: disk.size_bytes(),
                read_only: disk.read_only(),
            };
            match validate(&header, limits) {
                Verdict::Disconnect => connection.closing = true,
                Verdict::Refuse { error, skip_bytes } => {
                    connection.skip_bytes = skip_bytes;
                    self.counters.errors.fetch_add(1, Ordering::Relaxed);
                    connection.reply(header.cookie, Some(error));
                }
                Verdict::Accept(request) => {
                    let available = input.pending().len();
                    let small = request.length as usize <= super::operation::INLINE_BYTES_MAX;
                    if request.command == Command::Write
                        && small
                        && available < request.length as usize
                    {
                        // The rest comes with the next receive, together with what follows it.
                        input.start -= REQUEST_BYTES;
                        break;
                    }
                    self.accept(index, connection, &mut input, request);
                }
            }
        }
        connection.input = Some(input);
    }

    fn accept(
        &mut self,
        index: usize,
        connection: &mut Connection,
        input: &mut Input,
        request: Request,
    ) {
        let length = request.length as usize;
        if length == 0 && request.command != Command::Flush {
            // The specification leaves the effect open; doing nothing is what clients expect.
            connection.reply(request.cookie, None);
            return;
        }
        let counter = match request.command {
            Command::Read => &self.counters.reads,
            Command::Write => &self.counters.writes,
            _ => &self.counters.others,
        };
        counter.fetch_add(1, Ordering::Relaxed);
        match request.command {
            Command::Write => self.accept_write(index, connection, input, request),
            Command::Read => match self.pool.take(length) {
                Ok(buffer) => self.begin(index, connection, request, Some(buffer)),
                Err(_) => connection.reply(request.cookie, Some(ReplyError::NoMemory)),
            },
            _ => self.begin(index, connection, request, None),
        }
    }

    fn accept_write(
        &mut self,
        index: usize,
        connection: &mut Connection,
        input: &mut Input,
        request: Request,
    ) {
        let length = request.length as usize;
        let available = input.pending().len().min(length);
        if available == length && self.writes_inline(connection.disk, &request) {
            let outcome = self.write_inline(connection.disk, &request, &input.pending()[..length]);
            input.start += length;
            connection.reply(request.cookie, outcome.err());
            return;
        }
        let Ok(mut buffer) = self.pool.take(length) else {
            connection.skip_bytes = request.length;
            connection.reply(request.cookie, Some(ReplyError::NoMemory));
            return;
        };
        buffer.bytes_mut()[HEAD_BYTES..HEAD_BYTES + available]
            .copy_from_slice(&input.pending()[..available]);
        input.start += available;
        if available == length {
            self.begin(index, connection, request, Some(buffer));
        } else {
            connection.payload = Some(Payload {
                request,
                buffer,
                received: available,
            });
        }
    }

    /// Admits a request and submits its first disk operation.
    fn begin(
        &mut self,
        index: usize,
        connection: &mut Connection,
        request: Request,
        buffer: Option<Buffer>,
    ) {
        connection.requests += 1;
        connection.payload_bytes += payload_bytes(&request);
        let disk = Arc::clone(&self.shared.disks[connection.disk]);
        let epoch = self.admit(connection.disk, &request);
        let mut operation = Operation::new(index, connection.disk, request, epoch, buffer);
        let slot = self.idle_operations.pop().unwrap_or_else(|| {
            self.operations.push(None);
            self.operations.len() - 1
        });
        let outcome = operation.start(&disk, &mut self.ring, TAG_DISK | slot as u64);
        match outcome {
            Outcome::Pending => self.operations[slot] = Some(operation),
            Outcome::Done(result) => {
                self.idle_operations.push(slot);
                self.finish(connection, operation, result);
            }
        }
    }

    fn disk_done(&mut self, slot: usize, result: i32, held: Held) {
        let Some(mut operation) = self.operations.get_mut(slot).and_then(Option::take) else {
            return;
        };
        let disk = Arc::clone(&self.shared.disks[operation.disk]);
        let tag = TAG_DISK | slot as u64;
        match operation.advance(&disk, &mut self.ring, tag, result, held) {
            Outcome::Pending => self.operations[slot] = Some(operation),
            Outcome::Done(result) => {
                self.idle_operations.push(slot);
                let index = operation.connection;
                if let Some(mut connection) = self.connections.get_mut(index).and_then(Option::take)
                {
                    self.finish(&mut connection, operation, result);
                    self.connections[index] = Some(connection);
                    self.touch(index);
                }
            }
        }
    }

    /// Answers an operation and gives its epoch back.
    fn finish(
        &mut self,
        connection: &mut Connection,
        operation: Operation,
        result: std::result::Result<(), ReplyError>,
    ) {
        let Operation {
            disk,
            request,
            epoch,
            buffer,
            sync_failed,
            ..
        } = operation;
        if sync_failed {
            self.distrust(disk);
        }
        if let Some(epoch) = epoch {
            self.shared.machine.complete(self.number, epoch);
        }
        connection.requests -= 1;
        let length = request.length as usize;
        connection.payload_bytes -= payload_bytes(&request);
        self.count_bytes(&request, result);
        match (request.command, result, buffer) {
            (Command::Read, Ok(()), Some(buffer)) => {
                connection.reply_with_data(request.cookie, buffer, length);
            }
            (_, result, buffer) => {
                if let Some(buffer) = buffer {
                    self.pool.put(buffer);
                }
                connection.reply(request.cookie, result.err());
            }
        }
    }
}

/// What concerns the disk and its tracking.
impl Worker {
    fn admit(&self, disk: usize, request: &Request) -> Option<crate::extent::Epoch> {
        let operation = super::operation::tracked(request.command)?;
        let extent = crate::extent::Extent::covering(request.offset, u64::from(request.length));
        Some(
            self.shared
                .machine
                .admit(self.number, disk, extent, operation),
        )
    }

    fn writes_inline(&self, disk: usize, request: &Request) -> bool {
        request.length as usize <= super::operation::INLINE_BYTES_MAX
            && !request.force_unit_access
            && self.shared.disks[disk].inline_writes()
    }

    fn write_inline(
        &self,
        disk: usize,
        request: &Request,
        data: &[u8],
    ) -> std::result::Result<(), ReplyError> {
        let epoch = self.admit(disk, request);
        let result = super::operation::write_now(&self.shared.disks[disk], request.offset, data);
        if let Some(epoch) = epoch {
            self.shared.machine.complete(self.number, epoch);
        }
        self.count_bytes(request, result);
        result
    }

    fn count_bytes(&self, request: &Request, result: std::result::Result<(), ReplyError>) {
        let counter = match (request.command, result) {
            (_, Err(_)) => {
                self.counters.errors.fetch_add(1, Ordering::Relaxed);
                return;
            }
            (Command::Read, Ok(())) => &self.counters.read_bytes,
            (Command::Write, Ok(())) => &self.counters.written_bytes,
            _ => return,
        };
        counter.fetch_add(u64::from(request.length), Ordering::Relaxed);
    }

    /// After a failed sync the kernel has dropped pages that never reached the disk: what the disk
    /// holds is not what was written, nor perhaps what was captured.
    fn distrust(&self, disk: usize) {
        let path = self.shared.disks[disk].path().display();
        tracing::error!("Sync of disk {path} failed: every later FLUSH fails until a restart");
        if let Err(error) = self
            .shared
            .machine
            .mark_suspect(disk, "a sync of the disk failed")
        {
            tracing::error!("Cannot mark disk {path} as suspect: {}", error.chain());
        }
    }
}
