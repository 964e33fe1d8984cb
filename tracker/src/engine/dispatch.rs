//! From the bytes of a socket to the disk, and from the disk to the reply.
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
//! What it does not handle: validity (`nbd::request`), the steps of a request on the disk
//! (`operation`), epochs.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use zerocopy::FromBytes;

use super::buffer::{Buffer, HEAD_BYTES};
use super::connection::{Connection, Input, Payload};
use super::operation::{INLINE_BYTES_MAX, Operation, Outcome, tracked, write_now};
use super::uring::Held;
use super::worker::{TAG_DISK, Worker};
use crate::extent::{Epoch, Extent};
use crate::nbd::request::{Command, ExportLimits, Request, Verdict, validate};
use crate::nbd::wire::{REQUEST_BYTES, REQUEST_MAGIC, ReplyError, RequestHeader};

/// Bytes that a request moves over the socket.
fn payload_bytes(request: &Request) -> usize {
    match request.command {
        Command::Read | Command::Write => request.length as usize,
        _ => 0,
    }
}

impl Worker {
    /// Takes whole requests from the input until it runs out or enough is in flight.
    pub(super) fn understand(&mut self, index: usize, connection: &mut Connection) {
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
                    let small = request.length as usize <= INLINE_BYTES_MAX;
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

    /// A disk operation's step has completed.
    pub(super) fn disk_done(&mut self, slot: usize, result: i32, held: Held) {
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
        result: Result<(), ReplyError>,
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
    fn admit(&self, disk: usize, request: &Request) -> Option<Epoch> {
        let operation = tracked(request.command)?;
        let extent = Extent::covering(request.offset, u64::from(request.length));
        Some(
            self.shared
                .machine
                .admit(self.number, disk, extent, operation),
        )
    }

    fn writes_inline(&self, disk: usize, request: &Request) -> bool {
        request.length as usize <= INLINE_BYTES_MAX
            && !request.force_unit_access
            && self.shared.disks[disk].inline_writes()
    }

    fn write_inline(&self, disk: usize, request: &Request, data: &[u8]) -> Result<(), ReplyError> {
        let epoch = self.admit(disk, request);
        let result = write_now(&self.shared.disks[disk], request.offset, data);
        if let Some(epoch) = epoch {
            self.shared.machine.complete(self.number, epoch);
        }
        self.count_bytes(request, result);
        result
    }

    fn count_bytes(&self, request: &Request, result: Result<(), ReplyError>) {
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
