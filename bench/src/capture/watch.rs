//! When epochs were cut and captured, as the tracker's control socket tells, and what the shipper read for it.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::Value;

use super::load::nanoseconds;
use crate::Result;

/// Time between two looks.
const LOOK_INTERVAL: Duration = Duration::from_millis(2);
const PATIENCE: Duration = Duration::from_secs(15);

/// One epoch that was captured. Times are nanoseconds from the origin.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Capture {
    /// Its number.
    pub epoch: u64,
    /// The last look before it was cut.
    pub before: u64,
    /// The first look after.
    pub begin: u64,
    /// The first look after its capture.
    pub end: u64,
    /// Blocks that the journal names for it, where the looks saw any.
    pub dirty_blocks: u64,
    /// Bytes that the shipper read since the capture before it.
    pub read_bytes: u64,
}

/// What was seen.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// The captures that ended.
    pub captures: Vec<Capture>,
    /// Blocks that were copied before guests overwrote them.
    pub copied_blocks: u64,
}

/// A control socket that stays open.
struct Control(BufReader<UnixStream>);

impl Control {
    fn connect(path: &Path) -> Result<Self> {
        let stream = UnixStream::connect(path)
            .map_err(|error| format!("cannot connect to {}: {error}", path.display()))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Self(BufReader::new(stream)))
    }

    fn ask(&mut self, command: &str) -> Result<Value> {
        let line = format!("{{\"protocol\": 1, \"command\": \"{command}\"}}\n");
        self.0.get_mut().write_all(line.as_bytes())?;
        let mut answer = String::new();
        self.0.read_line(&mut answer)?;
        let mut answer: Value = serde_json::from_str(&answer)?;
        match answer.get_mut("ok") {
            Some(value) => Ok(value.take()),
            None => Err(format!("{command} is answered with {answer}").into()),
        }
    }
}

/// Looks until told to end. Without the shipper's socket the looks at the tracker are the same.
///
/// # Errors
///
/// A socket does not answer, or an answer lacks something.
pub fn watch(
    (tracker, shipper): (PathBuf, Option<PathBuf>),
    ends: &AtomicBool,
    captured: &AtomicBool,
    origin: Instant,
) -> Result<Seen> {
    let mut tracker = Control::connect(&tracker)?;
    let mut shipper = shipper.as_deref().map(Control::connect).transpose()?;
    let mut read = |_: ()| -> Result<u64> {
        let Some(shipper) = &mut shipper else {
            return Ok(0);
        };
        number(&shipper.ask("status")?, "/disks/0/bytes_read")
    };
    let mut last_read = read(())?;
    let (mut seen, mut open, mut first_copied) = (Seen::default(), None::<Capture>, None);
    let mut before = nanoseconds(origin.elapsed());
    while !ends.load(Ordering::Relaxed) {
        let status = tracker.ask("epochs")?;
        let now = nanoseconds(origin.elapsed());
        let copied = number(&status, "/disks/0/copied_blocks")?;
        seen.copied_blocks = copied - *first_copied.get_or_insert(copied);
        let closed = status.get("closed").and_then(Value::as_u64);
        if let Some(mut capture) = open.take_if(|capture| Some(capture.epoch) != closed) {
            let total = read(())?;
            (capture.end, capture.read_bytes) = (now, total - last_read);
            last_read = total;
            seen.captures.push(capture);
            captured.store(true, Ordering::Relaxed);
        }
        if let Some(epoch) = closed {
            let dirty = number(&status, "/disks/0/closed_dirty_blocks")?;
            let capture = open.get_or_insert(Capture {
                epoch,
                before,
                begin: now,
                end: now,
                dirty_blocks: 0,
                read_bytes: 0,
            });
            capture.dirty_blocks = capture.dirty_blocks.max(dirty);
        }
        before = now;
        std::thread::sleep(LOOK_INTERVAL);
    }
    Ok(seen)
}

fn number(value: &Value, path: &str) -> Result<u64> {
    let found = value.pointer(path).and_then(Value::as_u64);
    found.ok_or_else(|| format!("a status lacks {path}").into())
}
