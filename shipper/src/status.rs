//! What the shipper is doing and how well: a board that its threads write and others read.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tracker::extent::Epoch;

use crate::error::{Error, ErrorKind};
use crate::store::counted::{Counters, Requests};
use crate::store::prices::Prices;

/// The same trouble is logged again after this time.
const REPEAT_INTERVAL: Duration = Duration::from_secs(60);

/// What can be in trouble by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Part {
    /// The tracker cannot be reached or refuses.
    Tracker,
    /// A disk cannot be read, or a recovery point had to be given up.
    Capture,
    /// The spool is full or cannot be written.
    Spool,
    /// The vault cannot be reached or is full.
    Vault,
    /// What was to be at rest for a cut was not, or does not thaw.
    Quiesce,
    /// Recovery points that are to go cannot be removed.
    Retention,
}

/// What the shipper is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// It looks for its tracker.
    #[default]
    Connecting,
    /// Every block is read: the first copy, or a comparison with all fingerprints.
    Scanning,
    /// It waits for the next recovery point.
    Waiting,
    /// An epoch is being captured.
    Capturing,
}

/// Health of the whole.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Health {
    /// Nothing is in trouble.
    #[default]
    Ok,
    /// Something is retried; nothing is lost.
    Warning,
    /// Something is retried and will hardly pass by itself: the vault refuses the credentials.
    Critical,
}

/// Everything about a running shipper.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Status {
    /// Version of the program.
    pub version: String,
    /// Process number.
    pub pid: u32,
    /// Name of the machine.
    pub machine: String,
    /// Address of the vault.
    pub vault: String,
    /// The generation that it holds.
    pub generation: u64,
    /// What it is doing.
    pub phase: Phase,
    /// How well.
    pub health: Health,
    /// What is in trouble, in words.
    pub problems: BTreeMap<Part, String>,
    /// The newest recovery point in the vault that this process knows.
    pub newest_point: Option<Epoch>,
    /// The newest of them that is consistent for applications, and that this process knows.
    #[serde(default)]
    pub application_point: Option<ApplicationPoint>,
    /// Recovery points made since it was started.
    pub points: u64,
    /// Recovery points given up since it was started; their changes are in the next one.
    pub points_given_up: u64,
    /// Epochs that wait for upload.
    pub spool_epochs: u64,
    /// Bytes that wait for upload.
    pub spool_bytes: u64,
    /// Bytes that may wait for upload.
    pub spool_budget_bytes: u64,
    /// A disk of which more than this share waits to be shipped is resynchronized.
    pub resync_share_percent: u8,
    /// Segments put into the vault since it was started.
    pub uploaded_segments: u64,
    /// Bytes of them.
    pub uploaded_bytes: u64,
    /// Requests to the vault's store since it was started.
    #[serde(default)]
    pub vault_requests: Requests,
    /// What they cost by the prices of the configuration, in the currency of these; `None` where there are none.
    #[serde(default)]
    pub vault_cost: Option<f64>,
    /// What is removed, if anything ever is.
    #[serde(default)]
    pub retention: Option<RetentionStatus>,
    /// The disks.
    pub disks: Vec<DiskStatus>,
}

/// Retention.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RetentionStatus {
    /// What stays.
    pub policy: String,
    /// When it was decided last which points go.
    pub last_pass: Option<jiff::Timestamp>,
    /// Points that stayed then.
    pub kept_points: u64,
    /// Points removed since the shipper was started.
    pub removed_points: u64,
    /// Segments removed since then, which no point needed any more.
    pub removed_objects: u64,
    /// Bytes of them.
    pub removed_bytes: u64,
    /// Segments that are removed when the grace period is over.
    pub leaving_objects: u64,
}

/// A recovery point that is consistent for applications.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApplicationPoint {
    /// Its number.
    pub epoch: Epoch,
    /// When it was cut.
    pub created: jiff::Timestamp,
}

/// One disk.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct DiskStatus {
    /// Name.
    pub name: String,
    /// Size in bytes.
    pub size_bytes: u64,
    /// Bytes read from it since the shipper was started.
    pub bytes_read: u64,
    /// Blocks that a scan has seen; as many as there are when none is needed.
    pub scanned_blocks: u64,
    /// Blocks of the disk.
    pub blocks: u64,
    /// Bytes that wait to be shipped: changed blocks, and what the spool has of this disk.
    pub waiting_bytes: u64,
    /// The scan that looks at every block, or will.
    pub resync: Option<ResyncStatus>,
}

/// How far a scan is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ResyncStage {
    /// It begins when the vault has taken what waits.
    #[default]
    Marked,
    /// Blocks are read and compared.
    Running,
    /// Every block was looked at; the recovery point that follows ends it.
    Complete,
}

/// The scan of one disk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResyncStatus {
    /// Why, as a name for programs.
    pub reason: String,
    /// Why, in words.
    pub why: String,
    /// How far.
    pub stage: ResyncStage,
    /// Whether it can be cancelled.
    pub cancellable: bool,
    /// Bytes that were looked at.
    pub compared_bytes: u64,
    /// Bytes that are to be looked at.
    pub total_bytes: u64,
    /// The first in percent of the second.
    pub percent: u64,
}

struct Logged {
    message: String,
    at: Instant,
}

#[derive(Default)]
struct Inner {
    status: Status,
    logged: BTreeMap<Part, Logged>,
    /// What needs somebody.
    refused: BTreeSet<Part>,
}

/// The board.
pub struct Board {
    inner: Mutex<Inner>,
    bytes_read: Vec<AtomicU64>,
    vault_requests: Option<Arc<Counters>>,
    prices: Option<Prices>,
}

impl std::fmt::Debug for Board {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Board")
    }
}

impl Board {
    /// A board that begins with this; there is one counter of bytes read for each of its disks.
    pub fn new(mut status: Status) -> Self {
        env!("CARGO_PKG_VERSION").clone_into(&mut status.version);
        status.pid = std::process::id();
        let bytes_read = status.disks.iter().map(|_| AtomicU64::new(0)).collect();
        Self {
            inner: Mutex::new(Inner {
                status,
                ..Inner::default()
            }),
            bytes_read,
            vault_requests: None,
            prices: None,
        }
    }

    /// Shows the requests that these count, and what they cost.
    #[must_use]
    pub fn counting(
        mut self,
        vault_requests: Option<Arc<Counters>>,
        prices: Option<Prices>,
    ) -> Self {
        self.vault_requests = vault_requests;
        self.prices = prices;
        self
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The counter of bytes read from a disk.
    pub fn bytes_read(&self, disk: usize) -> &AtomicU64 {
        &self.bytes_read[disk]
    }

    /// Everything at this moment.
    pub fn status(&self) -> Status {
        let inner = self.lock();
        let (mut status, refused) = (inner.status.clone(), !inner.refused.is_empty());
        drop(inner);
        for (disk, read) in status.disks.iter_mut().zip(&self.bytes_read) {
            disk.bytes_read = read.load(Ordering::Relaxed);
        }
        if let Some(counters) = &self.vault_requests {
            status.vault_requests = counters.sums();
            status.vault_cost = self
                .prices
                .map(|prices| prices.cost(&status.vault_requests));
        }
        status.health = match status.problems.is_empty() {
            true => Health::Ok,
            false if refused => Health::Critical,
            false => Health::Warning,
        };
        status
    }

    /// Changes what it says.
    pub fn update(&self, change: impl FnOnce(&mut Status)) {
        change(&mut self.lock().status);
    }

    /// Notes trouble of a part, or that it is over. New trouble is logged, lasting trouble once a
    /// minute.
    pub fn note(&self, part: Part, error: Option<&Error>) {
        let mut inner = self.lock();
        match error.map(Error::kind) {
            Some(ErrorKind::Denied) => inner.refused.insert(part),
            _ => inner.refused.remove(&part),
        };
        let Some(error) = error else {
            if inner.status.problems.remove(&part).is_some() {
                inner.logged.remove(&part);
                tracing::info!("Over: trouble with the {part:?}");
            }
            return;
        };
        let message = error.chain();
        let known = inner.logged.get(&part).is_some_and(|logged| {
            logged.message == message && logged.at.elapsed() < REPEAT_INTERVAL
        });
        if !known {
            tracing::warn!("{message}; trying again");
            let logged = Logged {
                message: message.clone(),
                at: Instant::now(),
            };
            inner.logged.insert(part, logged);
        }
        inner.status.problems.insert(part, message);
    }

    /// Counts a segment that was put into the vault.
    pub fn count_upload(&self, bytes: u64) {
        self.update(|status| {
            status.uploaded_segments += 1;
            status.uploaded_bytes += bytes;
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_needs_somebody_is_critical_until_it_is_over() {
        let counters = Arc::new(Counters::default());
        let board = Board::new(Status::default()).counting(Some(Arc::clone(&counters)), None);
        assert_eq!(board.status().health, Health::Ok);
        for (kind, health) in [
            (ErrorKind::Unavailable, Health::Warning),
            (ErrorKind::Denied, Health::Critical),
            (ErrorKind::Unavailable, Health::Warning),
            (ErrorKind::Denied, Health::Critical),
        ] {
            board.note(Part::Vault, Some(&Error::new(kind, "trouble")));
            assert_eq!(board.status().health, health);
        }
        board.note(Part::Spool, Some(&Error::new(ErrorKind::Full, "full")));
        assert_eq!(board.status().health, Health::Critical);
        board.note(Part::Vault, None);
        assert_eq!(board.status().health, Health::Warning);
        counters.request(crate::store::counted::Kind::List);
        assert_eq!(board.status().vault_requests.list.requests, 1);
    }
}
