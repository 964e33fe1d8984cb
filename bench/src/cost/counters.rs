//! What the tracker counts of its journal, and of it the part of an interval.

use std::process::Command;

use serde::Serialize;
use serde_json::Value;

use crate::Result;
use crate::job::JobKind;
use crate::servers::{Running, ServerKind};
use crate::settings::Settings;

/// `tracker status --json` of a server.
///
/// # Errors
///
/// It is not running, or says something else.
pub fn status(settings: &Settings, server: &Running) -> Result<Value> {
    let output = Command::new(&settings.tracker)
        .args(["status", "--json", "--control"])
        .arg(server.control())
        .output()?;
    if !output.status.success() {
        let errors = String::from_utf8_lossy(&output.stderr);
        return Err(format!("the tracker tells no status: {errors}").into());
    }
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// A number of the only disk in a status.
///
/// # Errors
///
/// There is none.
pub fn of_disk(status: &Value, name: &str) -> Result<u64> {
    status
        .pointer("/machine/disks/0")
        .and_then(|disk| disk.get(name)?.as_u64())
        .ok_or_else(|| format!("the tracker's status lacks {name}").into())
}

/// Counters of a disk that is tracked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Counters {
    /// Durable transactions of the intent log.
    pub intent_commits: u64,
    /// Writes that waited for one.
    pub intent_waits: u64,
    /// Regions that made room for others.
    pub intent_evictions: u64,
    /// Syncs of the ring.
    pub ring_syncs: u64,
    /// Records written to the ring.
    pub records_written: u64,
}

impl Counters {
    /// At this moment; nothing where nothing is tracked.
    ///
    /// # Errors
    ///
    /// The tracker does not tell.
    pub fn read(settings: &Settings, server: &Running) -> Result<Option<Self>> {
        let status = status(settings, server)?;
        if status.pointer("/machine/disks/0").is_none() {
            return Ok(None);
        }
        Ok(Some(Self {
            intent_commits: of_disk(&status, "intent_commits")?,
            intent_waits: of_disk(&status, "intent_waits")?,
            intent_evictions: of_disk(&status, "intent_evictions")?,
            ring_syncs: of_disk(&status, "ring_syncs")?,
            records_written: of_disk(&status, "records_written")?,
        }))
    }

    /// What was added since.
    pub fn since(&self, before: &Self) -> Self {
        Self {
            intent_commits: self.intent_commits.saturating_sub(before.intent_commits),
            intent_waits: self.intent_waits.saturating_sub(before.intent_waits),
            intent_evictions: self
                .intent_evictions
                .saturating_sub(before.intent_evictions),
            ring_syncs: self.ring_syncs.saturating_sub(before.ring_syncs),
            records_written: self.records_written.saturating_sub(before.records_written),
        }
    }
}

/// What one run has added to the counters.
#[derive(Clone, Debug, Serialize)]
pub struct Counted {
    /// Which requests.
    pub job: JobKind,
    /// Which server.
    pub server: ServerKind,
    /// In which round, from 0.
    pub round: usize,
    /// Writes of the guest.
    pub writes: u64,
    /// Bytes of the image that the run allocated.
    pub allocated_bytes: u64,
    /// The counters, where there is tracking.
    pub counters: Option<Counters>,
}

impl Counted {
    /// Of a counter, as much as one write of the guest has of it.
    pub fn per_write(&self, counter: fn(&Counters) -> u64) -> Option<f64> {
        let counters = self.counters.as_ref()?;
        Some(counter(counters) as f64 / self.writes.max(1) as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_a_disk_are_found() {
        let status = serde_json::json!({"machine": {"disks": [{"folds": 7}]}});
        assert_eq!(of_disk(&status, "folds").unwrap(), 7);
        assert!(of_disk(&status, "other").is_err());
    }

    #[test]
    fn an_interval_is_counted_per_write() {
        let at = |commits| Counters {
            intent_commits: commits,
            intent_waits: 0,
            intent_evictions: 0,
            ring_syncs: 0,
            records_written: 0,
        };
        let counted = Counted {
            job: JobKind::ZipfDeep,
            server: ServerKind::Tracker,
            round: 0,
            writes: 100,
            allocated_bytes: 0,
            counters: Some(at(12).since(&at(10))),
        };
        let commits: fn(&Counters) -> u64 = |counters| counters.intent_commits;
        assert_eq!(counted.per_write(commits), Some(0.02));
        let off = Counted {
            counters: None,
            ..counted
        };
        assert_eq!(off.per_write(commits), None);
    }
}
