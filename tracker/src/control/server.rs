//! The server side of the control socket.
//!
//! A thread for each peer; peers are few and trusted by the socket's mode 0600, but nothing that
//! they send can do more than give them an error. A lost peer leaves no state behind: epochs are
//! the machine's, and every request but `cut` may be repeated.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use serde::Serialize;
use serde_json::Value;

use super::protocol::{
    CaptureOutcome, LINE_BYTES_MAX, PROTOCOL, Request, Status, answer_of, decode_request,
};
use crate::engine::Engine;
use crate::epoch::Machine;
use crate::error::{Error, ErrorKind, Result};

/// Peers at once.
const PEERS_MAX: usize = 32;
/// Time that a cut waits for the writes stamped with the epoch that it closes.
const DRAIN_DEADLINE: Duration = Duration::from_secs(30);
/// Time that a peer has to take an answer.
const SEND_DEADLINE: Duration = Duration::from_secs(10);

/// What requests are about.
pub struct Context {
    /// Epochs and journals.
    pub machine: Arc<Machine>,
    /// The workers.
    pub engine: Arc<Engine>,
}

/// Accepts and serves peers until the listener is shut down.
pub fn serve(listener: &UnixListener, context: &Arc<Context>) {
    let peers = Arc::new(AtomicUsize::new(0));
    while let Ok((stream, _)) = listener.accept() {
        if peers.fetch_add(1, Ordering::AcqRel) >= PEERS_MAX {
            peers.fetch_sub(1, Ordering::AcqRel);
            continue;
        }
        let (thread_peers, context) = (Arc::clone(&peers), Arc::clone(context));
        let spawned = std::thread::Builder::new()
            .name("control-peer".into())
            .spawn(move || {
                // A peer that goes away in the middle of a line is no event.
                let _gone = serve_peer(&stream, &context);
                thread_peers.fetch_sub(1, Ordering::AcqRel);
            });
        if spawned.is_err() {
            peers.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

fn serve_peer(stream: &UnixStream, context: &Context) -> std::io::Result<()> {
    stream.set_write_timeout(Some(SEND_DEADLINE))?;
    let mut reader = BufReader::new(stream);
    let mut line = Vec::new();
    loop {
        line.clear();
        let limit = LINE_BYTES_MAX as u64 + 1;
        let count = (&mut reader).take(limit).read_until(b'\n', &mut line)?;
        if count == 0 {
            return Ok(());
        }
        let too_long = count > LINE_BYTES_MAX;
        let result = if too_long {
            Err(Error::new(
                ErrorKind::Protocol,
                format!("A request line has more than {LINE_BYTES_MAX} bytes"),
            ))
        } else {
            std::str::from_utf8(&line)
                .map_err(|_| Error::new(ErrorKind::Protocol, "The request is not UTF-8"))
                .and_then(decode_request)
                .and_then(|request| carry_out(request, context))
        };
        let mut answer = serde_json::to_vec(&answer_of(result))?;
        answer.push(b'\n');
        (&mut &*stream).write_all(&answer)?;
        if too_long {
            return Ok(());
        }
    }
}

fn carry_out(request: Request, context: &Context) -> Result<Value> {
    let machine = &context.machine;
    match request {
        Request::Status {} => json(&status(context)),
        Request::Epochs {} => json(&machine.status()),
        Request::Cut { minimum } => json(&machine.cut(minimum, DRAIN_DEADLINE)?),
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
        } => json(&machine.seal(epoch)?),
        Request::CaptureEnd {
            epoch,
            outcome: CaptureOutcome::Abandoned,
        } => json(&machine.abandon(epoch)?),
        Request::Commit { epoch } => json(&machine.commit(epoch)?),
        Request::Revert {} => json(&machine.revert()?),
    }
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
