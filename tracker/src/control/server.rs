//! The server side of the control socket: what each request does.
//!
//! `line` carries the messages. A lost peer leaves no state behind: epochs are the machine's, and
//! every request but `cut` may be repeated.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::Serialize;
use serde_json::Value;

use super::protocol::{CaptureOutcome, PROTOCOL, Request, Snapshot, Status, decode_request};
use super::{line, resize};
use crate::disk::Disk;
use crate::engine::Engine;
use crate::epoch::Machine;
use crate::error::{Error, ErrorKind, Result};
use crate::extent::Epoch;
use crate::nbd::handshake::view_name;

/// Time that a cut waits for the writes stamped with the epoch that it closes.
const DRAIN_DEADLINE: Duration = Duration::from_secs(30);

/// What requests are about.
pub struct Context {
    /// Epochs and journals.
    pub machine: Arc<Machine>,
    /// The workers.
    pub engine: Arc<Engine>,
    /// The disks.
    pub disks: Vec<Arc<Disk>>,
    /// Held while a disk grows.
    pub resizing: Mutex<()>,
}

/// Accepts and serves peers until accepting fails for good.
pub fn serve(accept: &dyn Fn() -> io::Result<UnixStream>, context: &Arc<Context>) {
    let context = Arc::clone(context);
    let handler = move |line: &str| carry_out(decode_request(line)?, &context);
    line::serve_each(accept, Arc::new(handler));
}

fn carry_out(request: Request, context: &Context) -> Result<Value> {
    let machine = &context.machine;
    match request {
        Request::Status {} => json(&status(context)),
        Request::Epochs {} => json(&machine.status()),
        Request::Cut { minimum, keep } => json(&machine.cut(minimum, keep, DRAIN_DEADLINE)?),
        Request::CaptureBegin { epoch } => {
            let closed = machine.status().closed;
            if closed != Some(epoch) {
                let state = closed.map_or("no epoch is".to_owned(), |e| format!("epoch {e} is"));
                return Err(Error::new(
                    ErrorKind::State,
                    format!("Epoch {epoch} cannot be captured: {state} closed"),
                ));
            }
            Ok(Value::Null)
        }
        Request::CaptureEnd {
            epoch,
            outcome: CaptureOutcome::Sealed,
        } => json(&seal(context, epoch)?),
        Request::CaptureEnd {
            epoch,
            outcome: CaptureOutcome::Abandoned,
        } => {
            machine.check_not_held(epoch)?;
            json(&machine.abandon(epoch)?)
        }
        Request::Commit { epoch } => json(&machine.commit(epoch)?),
        Request::Snapshot {} => json(&snapshot(context)?),
        Request::Release { epoch, done } => {
            if done {
                sync_disks(context)?;
            }
            json(&machine.release(epoch, done)?)
        }
        Request::Revert {} => {
            machine
                .held()
                .map_or(Ok(()), |held| machine.check_not_held(held))?;
            json(&machine.revert()?)
        }
        Request::Resize { disk, size } => {
            // Two that want more at the same moment get both.
            let lock = context.resizing.lock();
            let _one = lock.unwrap_or_else(PoisonError::into_inner);
            json(&resize::resize(&context.disks, machine, &disk, size)?)
        }
    }
}

/// Makes the disks durable before the journal lets go of what a recovery point holds: a power cut must not undo on
/// the disk what the vault has, when nobody would know that they differ. It is done now and not at the cut, so that
/// the blocks of the closed epoch, which have to be copied before they are overwritten, are captured first. A disk
/// that cannot be synced is protected all the more, and the journal keeps in mind that it is one.
fn seal(context: &Context, epoch: Epoch) -> Result<()> {
    context.machine.check_not_held(epoch)?;
    sync_disks(context)?;
    context.machine.seal(epoch)
}

fn sync_disks(context: &Context) -> Result<()> {
    let machine = &context.machine;
    for (index, disk) in context.disks.iter().enumerate() {
        if !disk.sync_failed()
            && let Err(error) = disk.sync_data()
        {
            tracing::error!("{}: every later FLUSH fails until a restart", error.chain());
            machine.note_disk_failure(index)?;
        }
    }
    Ok(())
}

fn snapshot(context: &Context) -> Result<Snapshot> {
    let epoch = context.machine.take_snapshot(DRAIN_DEADLINE)?;
    let name = |disk: &Arc<Disk>| view_name(disk.name(), epoch);
    let exports = context.disks.iter().map(name).collect();
    Ok(Snapshot { epoch, exports })
}

/// Everything about this tracker.
fn status(context: &Context) -> Status {
    Status {
        protocol: PROTOCOL,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
        machine: context.machine.status(),
        engine: context.engine.status(),
    }
}

fn json<T: Serialize>(value: &T) -> Result<Value> {
    serde_json::to_value(value).map_err(|error| {
        Error::new(ErrorKind::Protocol, "Cannot write an answer as JSON").with_source(error)
    })
}
