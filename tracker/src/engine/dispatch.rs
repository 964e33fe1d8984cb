//! From the bytes of a socket to the disk, and from the disk to the reply.
//!
//! Order of a write: payload complete; admission, which stamps the epoch and puts the record into
//! the journal; now and then a wait until its regions are armed, or until blocks of a closed epoch are copied
//! (`waiting`); data to the disk; reply. Admission waits for the payload, so that a client that
//! dawdles in the middle of one cannot hold up a cut. Requests in flight have no order among
//! each other, as the NBD specification allows. A FLUSH is a sync of the file, which covers every
//! write that was answered on any connection.
//!
//! A request is worked at in parts, one after the other (`operation`): each part that changes the
//! disk is admitted by itself, so that no cut waits for a TRIM of terabytes; a READ with a
//! structured reply sends each hole as such and reads the data between them. A request is answered
//! when its last part is done.
//!
//! Crash consistency: SIGKILL after admission leaves the record in the page cache of the journal,
//! whether or not the data followed. See `journal` for the rest.
//!
//! What it does not handle: validity (`nbd::request`), the steps of a request on the disk
//! (`operation`), BLOCK_STATUS (`status`), epochs.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use super::buffer::{Buffer, HEAD_BYTES};
use super::connection::{Connection, Input, Payload};
use super::operation::{INLINE_BYTES_MAX, Operation, Outcome, tracked, write_now};
use super::status::Job;
use super::survey::Survey;
use super::transfer::Held;
use super::view::View;
use super::worker::{TAG_DISK, Worker};
use crate::disk::Disk;
use crate::epoch::Admission;
use crate::extent::Extent;
use crate::failpoint::{Place, reached};
use crate::nbd::reply::Address;
use crate::nbd::request::{Command, Request, Terms, Verdict, validate, validate_block_status};
use crate::nbd::wire::{Mode, ReplyError, RequestHeader};

/// Shortest READ for which holes are searched; the zeroes of a shorter one cost less than that.
const SEARCHED_BYTES_MIN: u64 = 32 << 10;
/// Parts after which the rest of a READ is taken for data.
const READ_PARTS_MAX: u32 = 32;

impl Worker {
    /// Takes whole requests from the input until it runs out or enough is in flight.
    pub(super) fn understand(&mut self, index: usize, connection: &mut Connection) {
        if let Some(payload) = connection.payload.take() {
            if payload.received < payload.request.payload_bytes() {
                connection.payload = (!connection.closing).then_some(payload);
                return;
            }
            self.begin(index, connection, payload.request, Some(payload.buffer));
        }
        let Some(mut input) = connection.input.take() else {
            return;
        };
        connection.answered_at_once = 0;
        while !connection.closing
            && connection.payload.is_none()
            && !connection.is_full()
            && !connection.has_had_its_share()
        {
            if connection.skip_bytes > 0 {
                let step = (connection.skip_bytes as usize).min(input.pending().len());
                connection.skip_bytes -= step as u32;
                input.start += step;
                if connection.skip_bytes > 0 {
                    break;
                }
            }
            if !self.understand_one(index, connection, &mut input) {
                break;
            }
        }
        connection.input = Some(input);
    }

    /// Takes one request from the input; `false` if none can be taken now.
    fn understand_one(
        &mut self,
        index: usize,
        connection: &mut Connection,
        input: &mut Input,
    ) -> bool {
        let mode = connection.session.mode;
        let header = match RequestHeader::decode(mode, input.pending()) {
            Ok(Some(header)) => header,
            Ok(None) => return false,
            Err(_) => {
                // What follows cannot be told apart any more. The connection closes.
                connection.closing = true;
                return false;
            }
        };
        let disk = &self.shared.disks[connection.session.export];
        let view = connection.view.as_ref();
        let terms = Terms {
            size_bytes: view.map_or_else(|| disk.size_bytes(), View::size_bytes),
            read_only: view.is_some() || disk.read_only(),
            alignment: disk.alignment(),
            mode,
            contexts: connection.session.contexts,
        };
        let mut taken_bytes = RequestHeader::bytes_in(mode);
        let mut verdict = validate(&header, &terms);
        if let Verdict::NeedsPayload { payload_bytes } = verdict {
            let end = taken_bytes + payload_bytes;
            let Some(payload) = input.pending().get(taken_bytes..end) else {
                // It comes with the next receive.
                return false;
            };
            verdict = validate_block_status(&header, payload, &terms);
            taken_bytes = end;
        }
        if let Verdict::Accept(request) = &verdict
            && request.command == Command::Write
            && request.length <= INLINE_BYTES_MAX as u64
            && input.pending().len() - taken_bytes < request.payload_bytes()
        {
            // The rest comes with the next receive, together with what follows it.
            return false;
        }
        input.start += taken_bytes;
        match verdict {
            Verdict::Accept(request) => self.accept(index, connection, input, request),
            Verdict::Refuse {
                error,
                reason,
                skip_bytes,
            } => {
                connection.skip_bytes = skip_bytes;
                self.counters.errors.fetch_add(1, Ordering::Relaxed);
                let (cookie, offset) = (header.cookie, header.offset);
                connection.fail(Address { cookie, offset }, error, reason, None);
            }
            // Nothing can follow a payload that nobody may send, no more than a goodbye.
            Verdict::Disconnect | Verdict::Violation | Verdict::NeedsPayload { .. } => {
                connection.closing = true;
            }
        }
        true
    }

    fn accept(
        &mut self,
        index: usize,
        connection: &mut Connection,
        input: &mut Input,
        request: Request,
    ) {
        if request.length == 0 && request.command != Command::Flush {
            // The specification leaves the effect open; doing nothing is what clients expect.
            connection.succeed(&request);
            return;
        }
        self.turn_requests += 1;
        let counter = match request.command {
            Command::Read { .. } => &self.counters.reads,
            Command::Write => &self.counters.writes,
            _ => &self.counters.others,
        };
        counter.fetch_add(1, Ordering::Relaxed);
        match request.command {
            Command::Write => self.accept_write(index, connection, input, request),
            Command::BlockStatus { contexts, one } => {
                let job = Job {
                    connection: index,
                    disk: connection.session.export,
                    mode: connection.session.mode,
                    request,
                    contexts,
                    one,
                    view: connection.view.clone(),
                };
                if self.jobs.send(job).is_ok() {
                    connection.requests += 1;
                    connection.status_requests += 1;
                } else {
                    self.refuse(connection, &request, ReplyError::NoMemory);
                }
            }
            _ => self.begin(index, connection, request, None),
        }
    }

    /// What BLOCK_STATUS found, as a whole reply.
    pub(super) fn status_found(&mut self, index: usize, reply: Vec<u8>) {
        if let Some(Some(connection)) = self.connections.get_mut(index) {
            connection.requests -= 1;
            connection.status_requests -= 1;
            connection.reply_with_bytes(reply);
            self.touch(index);
        }
    }

    fn refuse(&self, connection: &mut Connection, request: &Request, error: ReplyError) {
        self.counters.errors.fetch_add(1, Ordering::Relaxed);
        connection.fail(request.address(), error, error.text(), None);
    }

    fn accept_write(
        &mut self,
        index: usize,
        connection: &mut Connection,
        input: &mut Input,
        request: Request,
    ) {
        let length = request.payload_bytes();
        let available = input.pending().len().min(length);
        let disk = connection.session.export;
        if available == length
            && self.writes_inline(disk, &request)
            && let Some(outcome) = self.write_inline(disk, &request, &input.pending()[..length])
        {
            input.start += length;
            connection.answered_at_once += 1;
            match outcome {
                Ok(()) => connection.succeed(&request),
                Err(error) => connection.fail(request.address(), error, error.text(), None),
            }
            return;
        }
        let Ok(mut buffer) = self.pool.take(length) else {
            connection.skip_bytes = length as u32;
            self.refuse(connection, &request, ReplyError::NoMemory);
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

    /// Begins a request; the payload of a WRITE is in the buffer.
    fn begin(
        &mut self,
        index: usize,
        connection: &mut Connection,
        request: Request,
        buffer: Option<Buffer>,
    ) {
        connection.requests += 1;
        connection.payload_bytes += request.payload_bytes();
        let disk = connection.session.export;
        self.proceed(connection, Operation::new(index, disk, request, buffer));
    }

    /// Works at one part after the other until one waits for the disk or none is left.
    fn proceed(&mut self, connection: &mut Connection, mut operation: Operation) {
        let disk = Arc::clone(&self.shared.disks[operation.disk]);
        let slot = self.idle_operations.pop().unwrap_or_else(|| {
            self.operations.push(None);
            self.operations.len() - 1
        });
        loop {
            let started = match self.prepare(connection, &mut operation) {
                Ok(true) => {
                    let Some(ready) = self.leave_waiting(slot, operation) else {
                        return;
                    };
                    operation = ready;
                    reached(Place::WriteAfterAdmissionBeforeData);
                    self.start(connection, &mut operation, &disk, slot)
                }
                Ok(false) => {
                    self.idle_operations.push(slot);
                    return self.settle(connection, &operation.request, Ok(()));
                }
                Err(error) => Outcome::Done(Err(error)),
            };
            match started {
                Outcome::Pending => {
                    self.operations[slot] = Some(operation);
                    return;
                }
                Outcome::Done(result) => {
                    if !self.part_done(connection, &mut operation, result) {
                        self.idle_operations.push(slot);
                        return;
                    }
                }
            }
        }
    }

    /// Begins a part. The sync of a client that is alone and waits for it is made here and now.
    fn start(
        &mut self,
        connection: &Connection,
        operation: &mut Operation,
        disk: &Arc<Disk>,
        slot: usize,
    ) -> Outcome {
        let alone =
            connection.requests == 1 && self.counters.connections.load(Ordering::Relaxed) == 1;
        let syncs = operation.request.command == Command::Flush && alone;
        if !syncs || !self.patience.syncs_here() {
            return operation.start(disk, &mut self.ring, TAG_DISK | slot as u64);
        }
        let begin = Instant::now();
        let result = operation.sync_now(disk);
        let request_came = connection.has_arrivals();
        self.patience.note_sync(begin.elapsed(), request_came);
        Outcome::Done(result)
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
            Outcome::Done(result) => self.finish_part(slot, operation, result),
        }
    }

    /// A part that was begun earlier is done: the request is answered, or goes on.
    pub(super) fn finish_part(
        &mut self,
        slot: usize,
        mut operation: Operation,
        result: Result<(), ReplyError>,
    ) {
        self.idle_operations.push(slot);
        let index = operation.connection;
        if let Some(mut connection) = self.connections.get_mut(index).and_then(Option::take) {
            if self.part_done(&mut connection, &mut operation, result) {
                self.proceed(&mut connection, operation);
            }
            self.connections[index] = Some(connection);
            self.touch(index);
        }
    }

    /// Sets the next part up: its range, memory and admission. `false` if a hole was the last.
    fn prepare(
        &mut self,
        connection: &mut Connection,
        operation: &mut Operation,
    ) -> Result<bool, ReplyError> {
        let (mut start, mut end) = (operation.part.end, operation.request.end());
        if self.searches_holes(connection, operation) {
            (start, end) = self.skip_hole(connection, operation, start, end);
            if start == end {
                return Ok(false);
            }
        }
        operation.set_part(start, end);
        if operation.request.is_read() {
            let buffer = self.pool.take(operation.part_bytes());
            operation.buffer = Some(buffer.map_err(|_| ReplyError::NoMemory)?);
        }
        let length = operation.part_bytes() as u64;
        operation.admission = self.admit(operation.disk, operation.request.command, start, length);
        Ok(true)
    }

    /// Gives back what a part held, and answers the request if it failed or that was its last part.
    /// Returns whether parts are left.
    fn part_done(
        &mut self,
        connection: &mut Connection,
        operation: &mut Operation,
        result: Result<(), ReplyError>,
    ) -> bool {
        if operation.admission.is_some() {
            reached(Place::WriteAfterDataBeforeReply);
        }
        if operation.sync_failed {
            self.distrust(operation.disk);
        }
        if let Some(admission) = operation.admission.take() {
            self.shared.machine.complete(self.number, admission);
        }
        let request = operation.request;
        let part_bytes = operation.part_bytes();
        let result = result.and_then(|()| match (&connection.view, &mut operation.buffer) {
            (Some(view), Some(buffer)) if request.is_read() => {
                let bytes = &mut buffer.bytes_mut()[HEAD_BYTES..HEAD_BYTES + part_bytes];
                view.settle(operation.part.start, bytes)
            }
            _ => Ok(()),
        });
        match (operation.buffer.take(), result) {
            (Some(buffer), Ok(())) if request.is_read() => {
                connection.reply_with_data(&request, operation.part.clone(), buffer);
            }
            (Some(buffer), _) => self.pool.put(buffer),
            (None, _) => {}
        }
        if result.is_ok() && !operation.is_complete() {
            return true;
        }
        if let Err(error) = result {
            // What was read before this part is good.
            let offset = request.is_read().then_some(operation.part.start);
            connection.fail(request.address(), error, error.text(), offset);
        } else if !request.is_read() {
            connection.succeed(&request);
        }
        self.settle(connection, &request, result);
        false
    }

    /// A request that was begun is answered.
    fn settle(
        &self,
        connection: &mut Connection,
        request: &Request,
        result: Result<(), ReplyError>,
    ) {
        connection.requests -= 1;
        connection.payload_bytes -= request.payload_bytes();
        self.count_bytes(request, result);
    }
}

/// Holes in what is read.
impl Worker {
    fn searches_holes(&self, connection: &Connection, operation: &Operation) -> bool {
        let request = &operation.request;
        request.command == Command::Read { whole: false }
            && connection.session.mode != Mode::Simple
            && connection.view.is_none()
            && request.length >= SEARCHED_BYTES_MIN
            && operation.parts < READ_PARTS_MAX
    }

    /// Sends the hole at `start`, if there is one, and returns the data after it.
    fn skip_hole(
        &mut self,
        connection: &mut Connection,
        operation: &Operation,
        start: u64,
        end: u64,
    ) -> (u64, u64) {
        if connection.known_data.start <= start && end <= connection.known_data.end {
            return (start, end);
        }
        let disk = operation.disk;
        let survey =
            self.surveys[disk].get_or_insert_with(|| Survey::new(&self.shared.disks[disk]));
        let run = survey.run(start, end);
        connection.known_data = run.hole_end..run.data_end;
        if run.hole_end > start {
            connection.reply_with_hole(&operation.request, start..run.hole_end);
        }
        (run.hole_end, run.data_end.min(end))
    }
}

/// What concerns the disk and its tracking.
impl Worker {
    fn admit(&self, disk: usize, command: Command, offset: u64, length: u64) -> Option<Admission> {
        let operation = tracked(command)?;
        let extent = Extent::covering(offset, length);
        Some(
            self.shared
                .machine
                .admit(self.number, disk, extent, operation),
        )
    }

    fn writes_inline(&self, disk: usize, request: &Request) -> bool {
        request.length <= INLINE_BYTES_MAX as u64
            && !request.force_unit_access
            && match self.ring.writes_block() {
                true => self.shared.disks[disk].uses_page_cache(),
                false => self.shared.disks[disk].inline_writes(),
            }
    }

    /// Writes at once; `None` if the write has to wait for its regions or for a copy.
    fn write_inline(
        &self,
        disk: usize,
        request: &Request,
        data: &[u8],
    ) -> Option<Result<(), ReplyError>> {
        let admission = self.admit(disk, request.command, request.offset, request.length)?;
        let extent = Extent::covering(request.offset, request.length);
        let result = self.may_go(disk, extent, admission).then(|| {
            reached(Place::WriteAfterAdmissionBeforeData);
            let result = write_now(&self.shared.disks[disk], request.offset, data);
            reached(Place::WriteAfterDataBeforeReply);
            result
        });
        // One that waits is admitted again on its way there.
        self.shared.machine.complete(self.number, admission);
        if let Some(result) = result {
            self.count_bytes(request, result);
        }
        result
    }

    fn count_bytes(&self, request: &Request, result: Result<(), ReplyError>) {
        let counter = match (request.command, result) {
            (_, Err(_)) => {
                self.counters.errors.fetch_add(1, Ordering::Relaxed);
                return;
            }
            (Command::Read { .. }, Ok(())) => &self.counters.read_bytes,
            (Command::Write, Ok(())) => &self.counters.written_bytes,
            _ => return,
        };
        counter.fetch_add(request.length, Ordering::Relaxed);
    }

    /// After a failed sync the kernel has dropped pages that never reached the disk: what the disk
    /// holds is not what was written, nor perhaps what was captured.
    fn distrust(&self, disk: usize) {
        let path = self.shared.disks[disk].path().display();
        tracing::error!("Sync of disk {path} failed: every later FLUSH fails until a restart");
        if let Err(error) = self.shared.machine.note_disk_failure(disk) {
            tracing::error!("Cannot mark disk {path} as suspect: {}", error.chain());
        }
    }
}
