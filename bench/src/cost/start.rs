//! Starts after a crash with as many records as a full ring of 64 MiB holds.
//!
//! Past 70% the tracker folds the oldest records away, so the ring is a larger one, in which that many
//! are less. Half of the starts follow SIGKILL alone, half the same in another boot with the journal out
//! of the page cache, as after a power cut.

use std::fs::File;
use std::path::PathBuf;

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use serde::Serialize;

use super::client::Client;
use super::counters;
use crate::Result;
use crate::pattern::BLOCK_BYTES;
use crate::servers::{Image, Running, ServerKind, Setup};
use crate::settings::{Section, Settings};
use crate::statistics::Spread;

/// Starts of each kind.
const STARTS: u64 = 10;
/// Records of 32 bytes that a ring of 64 MiB takes.
const RECORDS: u64 = (64 << 20) / 32;
/// A ring of which that many are two thirds.
const RING_ARGUMENT: &str = "96MiB";
/// Every other block, so that no two changes become one record.
const STRIDE_BYTES: usize = 2 * BLOCK_BYTES;
const DISK_BYTES: u64 = RECORDS * STRIDE_BYTES as u64;

/// The start of one tracker.
#[derive(Clone, Debug, Serialize)]
pub struct Start {
    /// In another boot, with the journal not in memory.
    pub after_power_cut: bool,
    /// Records in the ring.
    pub records: u64,
    /// Until a read was answered.
    pub seconds: f64,
}

/// Fills a ring, and starts the tracker on it again and again.
///
/// # Errors
///
/// The tracker fails, or its ring does not hold what it should.
pub fn measure(settings: &Settings, section: &Section, power_cuts: bool) -> Result<Vec<Start>> {
    let mut server = Running::start(&Setup {
        kind: ServerKind::Tracker,
        tracker: &settings.tracker,
        folder: &section.folder,
        direct: section.direct,
        image: Image::Sparse(DISK_BYTES),
        arguments: &["--ring-size", RING_ARGUMENT],
    })?;
    let mut client = Client::connect(&server)?;
    client.trim(BLOCK_BYTES, (0..DISK_BYTES).step_by(STRIDE_BYTES))?;
    drop(client);
    let mut starts = Vec::new();
    let kinds = if power_cuts {
        &[false, true][..]
    } else {
        &[false]
    };
    for after_power_cut in kinds.iter().copied() {
        for number in 0..STARTS {
            let status = counters::status(settings, &server)?;
            let records = counters::of_disk(&status, "ring_used_records")?;
            if records < RECORDS {
                return Err(
                    format!("the ring holds {records} records in place of {RECORDS}").into(),
                );
            }
            server.kill()?;
            if after_power_cut {
                forget_journal(&server)?;
            }
            let time = server.start_again(after_power_cut.then_some(number + 1))?;
            starts.push(Start {
                after_power_cut,
                records,
                seconds: time.as_secs_f64(),
            });
        }
        eprintln!("  {}", line(&starts, after_power_cut));
    }
    server.stop()?;
    Ok(starts)
}

/// Takes the journal out of the page cache.
fn forget_journal(server: &Running) -> Result<()> {
    let mut path = server.image().into_os_string();
    path.push(".hrl");
    let journal = File::open(PathBuf::from(path))?;
    journal.sync_all()?;
    posix_fadvise(&journal, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
    Ok(())
}

/// Seconds of the starts of one kind.
pub fn seconds(starts: &[Start], after_power_cut: bool) -> Option<Spread> {
    let starts = starts
        .iter()
        .filter(|start| start.after_power_cut == after_power_cut);
    Spread::of(starts.map(|start| start.seconds).collect())
}

fn line(starts: &[Start], after_power_cut: bool) -> String {
    let Some(spread) = seconds(starts, after_power_cut) else {
        return String::new();
    };
    let what = if after_power_cut {
        "power cut, journal not in memory"
    } else {
        "SIGKILL"
    };
    format!("after {what:<46}{} s", spread.text(3))
}

/// A line for each kind.
pub fn text(starts: &[Start]) -> String {
    let records = starts.iter().map(|start| start.records).min().unwrap_or(0);
    let mut text = format!("Start with {records} records in the ring, until a read is answered\n");
    for after_power_cut in [false, true] {
        let line = line(starts, after_power_cut);
        if !line.is_empty() {
            text.push_str(&format!("  {line}\n"));
        }
    }
    text
}
