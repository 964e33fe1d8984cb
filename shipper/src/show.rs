//! What the commands print.

use std::fmt::Write;

use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use shipper::error::{Error, ErrorKind, Result};
use shipper::keys::slots::KeySlot;
use shipper::lifecycle::config::Config;
use shipper::lifecycle::progress::Outcome;
use shipper::lifecycle::protect::Protection;
use shipper::lifecycle::resync::ResyncAnswer;
use shipper::status::{DiskStatus, Health, Phase, ResyncStage, RetentionStatus, Status};
use shipper::store::counted::Requests;
use shipper::vault::aside::Aside;
use shipper::vault::manifest::{Consistency, Manifest};
use shipper::vault::pin::{Pin, PinReason};
use shipper::vault::prune::{Removed, Report};
use tracker::extent::Epoch;

/// A value as indented JSON.
///
/// # Errors
///
/// It cannot be written as JSON.
pub fn json<T: Serialize>(value: &T) -> Result<String> {
    serde_json::to_string_pretty(value)
        .map(|text| text + "\n")
        .map_err(|error| Error::new(ErrorKind::Invalid, "Cannot write JSON").with_source(error))
}

/// What `protect` says.
pub fn protection(config: &Config, protection: &Protection) -> String {
    let mut text = String::new();
    for check in &protection.checks {
        text.push_str(&format!("ok  {check}\n"));
    }
    let how = if protection.claimed {
        "claimed"
    } else {
        "held already"
    };
    text.push_str(&format!(
        "Machine {} is protected, generation {} {how}: start `shipper run`\n",
        config.machine, protection.generation
    ));
    text
}

fn mebibytes(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

/// What `status` says.
pub fn status(status: &Status) -> String {
    let phase = match status.phase {
        Phase::Connecting => "looking for the tracker",
        Phase::Scanning => "looking at every block",
        Phase::Waiting => "waiting for the next recovery point",
        Phase::Capturing => "capturing",
    };
    let health = match status.health {
        Health::Ok => "ok",
        Health::Warning => "in trouble, trying again",
        Health::Critical => "critical: it will hardly pass by itself; trying again",
    };
    let newest = status
        .newest_point
        .map_or("none".to_owned(), |epoch| epoch.to_string());
    let mut text = format!(
        "shipper {} (process {}), machine {}, vault {}, generation {}\n\
         health: {health}; {phase}\n\
         newest recovery point: {newest}; {} made, {} given up\n\
         waiting for upload: {} epochs, {} of {}\n\
         uploaded: {} segments, {}\n",
        status.version,
        status.pid,
        status.machine,
        status.vault,
        status.generation,
        status.points,
        status.points_given_up,
        status.spool_epochs,
        mebibytes(status.spool_bytes),
        mebibytes(status.spool_budget_bytes),
        status.uploaded_segments,
        mebibytes(status.uploaded_bytes),
    );
    text.push_str(&requests(&status.vault_requests));
    if let Some(cost) = status.vault_cost {
        text.push_str(&format!(
            "they cost {cost:.4} by the prices of the configuration\n"
        ));
    }
    if let Some(point) = &status.application_point {
        text.push_str(&format!(
            "newest application-consistent recovery point: {}, of {}\n",
            point.epoch,
            shown_time(point.created)
        ));
    }
    text.push_str(&retention(status.retention.as_ref()));
    for (part, problem) in &status.problems {
        text.push_str(&format!("trouble with the {part:?}: {problem}\n"));
    }
    for disk in &status.disks {
        text.push_str(&format!(
            "disk {}: {} bytes, {} read, {} wait to be shipped\n",
            disk.name,
            disk.size_bytes,
            mebibytes(disk.bytes_read),
            mebibytes(disk.waiting_bytes),
        ));
        text.push_str(&resync_status(disk));
    }
    text
}

/// What `status` says of retention.
fn retention(retention: Option<&RetentionStatus>) -> String {
    let Some(shown) = retention else {
        return String::new();
    };
    let last = match shown.last_pass {
        None => "not looked at yet".to_owned(),
        Some(time) => format!(
            "looked at {}, {} points kept",
            shown_time(time),
            shown.kept_points
        ),
    };
    format!(
        "retention: {}; {last}; {} points and {} segments removed, {}; {} segments wait for their grace period\n",
        shown.policy,
        shown.removed_points,
        shown.removed_objects,
        mebibytes(shown.removed_bytes),
        shown.leaving_objects
    )
}

/// What `prune` says.
pub fn pruned(report: &Report, removed: Option<Removed>, tense: &str) -> String {
    let mut text = String::new();
    for point in &report.points {
        let what = if point.keep { "stays" } else { "goes" };
        let created = point.created.map_or_else(String::new, shown_time);
        text.push_str(&format!(
            "{}  {created:20}  {what:5}  {}\n",
            point.epoch, point.reason
        ));
    }
    let (objects, bytes) = match removed {
        Some(removed) => (removed.objects, removed.bytes),
        None => (report.freed_objects, report.freed_bytes),
    };
    text.push_str(&format!(
        "{} of {} points go; {objects} segments, {}, {tense} removed\n",
        report.removed_points,
        report.points.len(),
        mebibytes(bytes)
    ));
    if let Some(why) = &report.held_back {
        text.push_str(&format!("{why}\n"));
    }
    text
}

/// What `status` says of requests to the vault.
fn requests(requests: &Requests) -> String {
    let kinds = requests.kinds().into_iter();
    let shown: Vec<String> = kinds
        .filter(|(_, sum)| sum.requests > 0)
        .map(|(name, sum)| match sum.bytes {
            0 => format!("{} {name}", sum.requests),
            bytes => format!("{} {name} ({})", sum.requests, mebibytes(bytes)),
        })
        .collect();
    match shown.is_empty() {
        true => String::new(),
        false => format!("requests to the vault: {}\n", shown.join(", ")),
    }
}

/// What `status` says of the scan of a disk, if there is one.
fn resync_status(disk: &DiskStatus) -> String {
    let Some(resync) = &disk.resync else {
        return String::new();
    };
    let (compared, total) = (
        mebibytes(resync.compared_bytes),
        mebibytes(resync.total_bytes),
    );
    let stage = match resync.stage {
        ResyncStage::Marked => format!(
            "marked for resynchronization of {total}, which begins when the vault has taken what waits"
        ),
        ResyncStage::Running => {
            format!("{}% looked at, {compared} of {total}", resync.percent)
        }
        ResyncStage::Complete => {
            format!("all of it looked at, {total}; a recovery point follows")
        }
    };
    let why = &resync.why;
    let need = match (resync.stage, resync.cancellable) {
        (ResyncStage::Complete, _) => why.clone(),
        (_, true) => format!("{why}; can be cancelled"),
        (_, false) => format!("{why}; necessary"),
    };
    format!("disk {}: {stage}; reason: {need}\n", disk.name)
}

/// What `resync` says.
pub fn resync(answers: &[&ResyncAnswer]) -> String {
    let mut text = String::new();
    for answer in answers {
        let outcome = match answer.outcome {
            Outcome::Marked => "marked for resynchronization",
            Outcome::MarkedAlready => "marked for resynchronization already",
            Outcome::UnderWay => "every block is being compared already",
            Outcome::Cancelled => "resynchronization cancelled",
            Outcome::Nothing => "no resynchronization to cancel",
            Outcome::Complete => "every block has been compared already",
            Outcome::Refused => "the scan of every block cannot be cancelled",
        };
        let because = match &answer.reason {
            Some(reason) => format!(", because {reason}"),
            None => String::new(),
        };
        text.push_str(&format!("Disk {}: {outcome}{because}\n", answer.disk));
    }
    text
}

/// A recovery point as `points` shows it.
#[derive(Debug, Serialize)]
pub struct Point {
    /// Number.
    epoch: String,
    /// The one before it.
    previous: String,
    /// When it was cut.
    created: jiff::Timestamp,
    /// Generation of the shipper that made it.
    generation: u64,
    /// For whom it is consistent.
    consistency: Consistency,
    /// Why it is not consistent for applications, if that was tried.
    reason: Option<String>,
    /// Who holds it.
    pins: Vec<PointPin>,
    /// Why it is set aside, if it is.
    set_aside: Option<String>,
    /// The disks.
    disks: Vec<PointDisk>,
}

/// A pin of a recovery point.
#[derive(Debug, Serialize)]
struct PointPin {
    id: String,
    reason: Option<PinReason>,
    label: String,
    created: Option<jiff::Timestamp>,
}

impl PointPin {
    fn of(pin: &Pin) -> Self {
        Self {
            id: pin.id.clone(),
            reason: pin.reason,
            label: pin.label.clone(),
            created: pin.created,
        }
    }

    fn text(&self) -> String {
        let reason = self.reason.map_or("unreadable", PinReason::name);
        match self.label.is_empty() {
            true => format!("  pinned: {reason}"),
            false => format!("  pinned: {reason} ({})", self.label),
        }
    }
}

/// A disk of a recovery point.
#[derive(Debug, Serialize)]
struct PointDisk {
    name: String,
    size_bytes: u64,
    /// Blocks that the journal called changed.
    dirty_blocks: u64,
    /// Bytes in the vault that came with this point.
    stored_bytes: u64,
    /// Segments that the point is made of.
    segments: u64,
}

impl Point {
    /// A point from its manifest, with the pins that are its, and why it is set aside.
    pub fn of(manifest: &Manifest, pins: &[Pin], aside: Option<&Aside>) -> Self {
        let its = pins.iter().filter(|pin| pin.epoch == manifest.epoch);
        let disk = |disk: &shipper::vault::manifest::DiskPoint| {
            let new = disk
                .segments
                .iter()
                .filter(|segment| segment.name.0.last_epoch > manifest.previous);
            PointDisk {
                name: disk.name.clone(),
                size_bytes: disk.size_bytes,
                dirty_blocks: disk.dirty_blocks,
                stored_bytes: new.map(|segment| segment.bytes).sum(),
                segments: disk.segments.len() as u64,
            }
        };
        Self {
            epoch: manifest.epoch.to_string(),
            previous: match manifest.previous {
                Epoch::ZERO => String::new(),
                previous => previous.to_string(),
            },
            created: manifest.created,
            generation: manifest.generation,
            consistency: manifest.consistency,
            reason: manifest.reason.clone(),
            set_aside: aside.map(|aside| aside.why.clone()),
            pins: its.map(PointPin::of).collect(),
            disks: manifest.disks.iter().map(disk).collect(),
        }
    }
}

/// What `key list` says.
pub fn key_slots(slots: &[KeySlot]) -> String {
    let mut text = String::new();
    for slot in slots {
        let (kind, created) = (slot.kind.name(), shown_time(slot.created));
        text.push_str(format!("{}  {kind:10}  {created}  {}", slot.id, slot.label).trim_end());
        text.push('\n');
    }
    text
}

/// The same as JSON, without what only a program that opens the slots needs.
///
/// # Errors
///
/// It cannot be written as JSON.
pub fn key_slots_json(slots: &[KeySlot]) -> Result<String> {
    let shown = slots.iter().map(|slot| {
        serde_json::json!({
            "id": slot.id, "kind": slot.kind, "created": slot.created, "label": slot.label,
        })
    });
    json(&shown.collect::<Vec<_>>())
}

fn shown_time(time: jiff::Timestamp) -> String {
    time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// What `points` says.
pub fn points(points: &[Point]) -> String {
    let mut text = String::new();
    for point in points {
        let dirty: u64 = point.disks.iter().map(|disk| disk.dirty_blocks).sum();
        let stored: u64 = point.disks.iter().map(|disk| disk.stored_bytes).sum();
        let created = shown_time(point.created);
        let consistency = match (&point.reason, point.consistency) {
            (Some(reason), _) => format!("  crash-consistent: {reason}"),
            (None, Consistency::Application) => "  application-consistent".to_owned(),
            (None, Consistency::Crash) => String::new(),
        };
        let held: String = point.pins.iter().map(PointPin::text).collect();
        let aside = match &point.set_aside {
            Some(_) => "  SET ASIDE",
            None => "",
        };
        // Writing into a string cannot fail.
        let _written = writeln!(
            text,
            "{}  {created}  {dirty:>10} blocks changed  {:>12} stored  {} disks{consistency}{held}{aside}",
            point.epoch,
            mebibytes(stored),
            point.disks.len()
        );
    }
    text
}

/// A bar on a terminal, nothing elsewhere.
pub struct Bar(ProgressBar);

impl Bar {
    /// A bar that is not shown yet.
    pub fn new() -> Self {
        let bar = ProgressBar::new(0);
        let template = "[{bar:40}] {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("##-"));
        }
        Self(bar)
    }

    /// Shows bytes done of all.
    pub fn show(&self, done: u64, total: u64) {
        self.0.set_length(total);
        self.0.set_position(done);
    }

    /// Takes it away.
    pub fn finish(&self) {
        self.0.finish_and_clear();
    }
}
