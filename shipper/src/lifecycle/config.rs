//! The configuration file of a machine.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::SignedDuration;
use serde::Deserialize;

use crate::capture::throttle::Throttle;
use crate::error::{Error, ErrorKind, Result};
use crate::keys::source::Access;
use crate::quiesce::config::{QuiesceConfig, RawQuiesce};
use crate::segment::codec::Codec;
use crate::store::VaultUrl;
use crate::store::prices::Prices;
use crate::vault::layout::is_valid_name;
use crate::vault::retention::Policy;

/// Longest interval between recovery points.
const INTERVAL_MAX: Duration = Duration::from_secs(366 * 24 * 3600);
/// Shortest interval between recovery points.
const INTERVAL_MIN: Duration = Duration::from_millis(10);
/// What may wait for upload unless the configuration says otherwise.
const SPOOL_BUDGET_DEFAULT: u64 = 8 << 30;
/// Least budget of the spool: a segment and its neighbours.
const SPOOL_BUDGET_MIN: u64 = 64 << 20;
const WORKERS_MAX: usize = 256;
/// Least rate at which a disk may be captured, in bytes a second.
const CAPTURE_RATE_MIN: u64 = 1 << 20;
/// Share of a disk that may wait to be shipped unless the configuration says otherwise.
const RESYNC_SHARE_DEFAULT: u64 = 50;
/// Grace period, and time between two decisions, unless the configuration says otherwise.
const RETENTION_TIME_DEFAULT: Duration = Duration::from_secs(3600);

/// What the file says, as it was typed.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawConfig {
    machine: String,
    tracker: PathBuf,
    vault: String,
    key_file: Option<PathBuf>,
    passphrase_file: Option<PathBuf>,
    state: PathBuf,
    interval: String,
    codec: Option<String>,
    spool_budget: Option<String>,
    workers: Option<usize>,
    resync_share_percent: Option<u64>,
    capture_rate: Option<String>,
    capture_share_percent: Option<u64>,
    prices: Option<Prices>,
    quiesce: Option<RawQuiesce>,
    retention: Option<RawRetention>,
    #[serde(default, rename = "disk")]
    disks: Vec<RawDisk>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawRetention {
    points: String,
    grace: Option<String>,
    every: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawDisk {
    name: String,
    path: PathBuf,
    journal: Option<PathBuf>,
}

/// A checked configuration.
#[derive(Clone, Debug)]
pub struct Config {
    /// Name of the machine in the vault.
    pub machine: String,
    /// The tracker's control socket.
    pub tracker: PathBuf,
    /// Address of the vault.
    pub vault: String,
    /// Where the secret of an encrypted vault comes from.
    pub access: Access,
    /// Folder for spool, fingerprints and cursors.
    pub state: PathBuf,
    /// Time between recovery points.
    pub interval: Duration,
    /// Compression.
    pub codec: Codec,
    /// Bytes that may wait for upload.
    pub spool_budget_bytes: u64,
    /// Threads that fingerprint and compress.
    pub workers: usize,
    /// How much of the machine capture may take.
    pub throttle: Throttle,
    /// A disk of which more than this share waits to be shipped is resynchronized.
    pub resync_share_percent: u8,
    /// What requests to the vault's store cost.
    pub prices: Option<Prices>,
    /// What is brought to rest for a cut, and how often.
    pub quiesce: Option<QuiesceConfig>,
    /// Which recovery points stay; `None`: all.
    pub retention: Option<RetentionConfig>,
    /// The disks.
    pub disks: Vec<DiskConfig>,
}

/// Which recovery points stay, and how the others go.
#[derive(Clone, Debug)]
pub struct RetentionConfig {
    /// Which stay.
    pub policy: Policy,
    /// Time that readers have between a decision and the removal of what only removed points need.
    pub grace: Duration,
    /// Time between two decisions of a running shipper.
    pub every: Duration,
}

/// One disk of a configuration.
#[derive(Clone, Debug)]
pub struct DiskConfig {
    /// The tracker's export name, and its name in the vault.
    pub name: String,
    /// Image or device.
    pub path: PathBuf,
    /// Where its journal is, if not where the tracker says.
    pub journal: Option<PathBuf>,
}

impl Config {
    /// Reads and checks a configuration file.
    ///
    /// # Errors
    ///
    /// The file cannot be read, or says something wrong: the message names file, key and value.
    pub fn load(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|error| {
            Error::io(
                format!("Cannot read configuration {}", path.display()),
                error,
            )
        })?;
        Self::parse(&text).map_err(|what| {
            Error::new(
                ErrorKind::Invalid,
                format!("Configuration {}: {what}", path.display()),
            )
        })
    }

    fn parse(text: &str) -> std::result::Result<Self, String> {
        let raw: RawConfig =
            toml::from_str(text).map_err(|error| error.to_string().trim_end().to_owned())?;
        if !is_valid_name(&raw.machine) {
            return Err(format!(
                "machine {:?} is not a valid name: {NAME_RULE}",
                raw.machine
            ));
        }
        VaultUrl::parse(&raw.vault).map_err(|error| error.to_string())?;
        let codec = match &raw.codec {
            Some(text) => text.parse().map_err(|what| format!("codec: {what}"))?,
            None => Codec::default(),
        };
        let spool_budget_bytes = match &raw.spool_budget {
            Some(text) => parse_size(text).map_err(|what| format!("spool_budget: {what}"))?,
            None => SPOOL_BUDGET_DEFAULT,
        };
        if spool_budget_bytes < SPOOL_BUDGET_MIN {
            return Err(format!(
                "spool_budget: at least {} MiB are needed",
                SPOOL_BUDGET_MIN >> 20
            ));
        }
        let processors = std::thread::available_parallelism().map_or(1, |count| count.get());
        let workers = raw.workers.unwrap_or(processors);
        if !(1..=WORKERS_MAX).contains(&workers) {
            return Err(format!(
                "workers: {workers} is not a number from 1 to {WORKERS_MAX}"
            ));
        }
        if raw.key_file.is_some() && raw.passphrase_file.is_some() {
            return Err("key_file and passphrase_file: give one of the two".to_owned());
        }
        let share = raw.resync_share_percent.unwrap_or(RESYNC_SHARE_DEFAULT);
        let resync_share_percent = checked_percent("resync_share_percent", share)?;
        let throttle = checked_throttle(&raw)?;
        Ok(Self {
            interval: parse_interval(&raw.interval)?,
            prices: raw.prices.map(Prices::checked).transpose()?,
            quiesce: raw.quiesce.map(RawQuiesce::checked).transpose()?,
            retention: raw.retention.map(RawRetention::checked).transpose()?,
            disks: checked_disks(raw.disks)?,
            machine: raw.machine,
            tracker: raw.tracker,
            vault: raw.vault,
            access: Access {
                key_file: raw.key_file,
                passphrase_file: raw.passphrase_file,
                ask: None,
            },
            state: raw.state,
            codec,
            spool_budget_bytes,
            workers,
            resync_share_percent,
            throttle,
        })
    }
}

impl RawRetention {
    fn checked(self) -> std::result::Result<RetentionConfig, String> {
        let time = |key: &str, text: Option<&str>, least: Duration| {
            let invalid = || {
                format!(
                    "retention.{key} {text:?} is not a time such as \"30min\" or \"1h\", up to 366 days"
                )
            };
            let Some(text) = text else {
                return Ok(RETENTION_TIME_DEFAULT);
            };
            let duration: SignedDuration = text.parse().map_err(|_| invalid())?;
            let duration = Duration::try_from(duration).map_err(|_| invalid())?;
            let fits = (least..=INTERVAL_MAX).contains(&duration);
            fits.then_some(duration).ok_or_else(invalid)
        };
        Ok(RetentionConfig {
            policy: self
                .points
                .parse()
                .map_err(|what| format!("retention.points: {what}"))?,
            grace: time("grace", self.grace.as_deref(), Duration::ZERO)?,
            every: time("every", self.every.as_deref(), INTERVAL_MIN)?,
        })
    }
}

fn checked_percent(key: &str, value: u64) -> std::result::Result<u8, String> {
    let percent = u8::try_from(value)
        .ok()
        .filter(|percent| (1..=100).contains(percent));
    percent.ok_or_else(|| format!("{key}: {value} is not a number from 1 to 100"))
}

fn checked_throttle(raw: &RawConfig) -> std::result::Result<Throttle, String> {
    let bytes_per_second = match &raw.capture_rate {
        Some(text) => Some(parse_size(text).map_err(|what| format!("capture_rate: {what}"))?),
        None => None,
    };
    if bytes_per_second.is_some_and(|rate| rate < CAPTURE_RATE_MIN) {
        return Err("capture_rate: at least 1MiB, in a second, are needed".to_owned());
    }
    let share = raw.capture_share_percent.unwrap_or(100);
    Ok(Throttle {
        bytes_per_second,
        share_percent: checked_percent("capture_share_percent", share)?,
    })
}

const NAME_RULE: &str = "up to 63 of a-z, 0-9, '.', '_' and '-', beginning with a letter or digit";

fn checked_disks(raw: Vec<RawDisk>) -> std::result::Result<Vec<DiskConfig>, String> {
    if raw.is_empty() {
        return Err("it names no disk: add a section [[disk]] with name and path".to_owned());
    }
    let (mut names, mut paths) = (BTreeSet::new(), BTreeSet::new());
    for disk in &raw {
        if !is_valid_name(&disk.name) {
            return Err(format!(
                "disk name {:?} is not valid: {NAME_RULE}",
                disk.name
            ));
        }
        if !names.insert(&disk.name) {
            return Err(format!("two disks are named {:?}", disk.name));
        }
        if !paths.insert(&disk.path) {
            return Err(format!("disk path {} is given twice", disk.path.display()));
        }
    }
    let checked = raw.into_iter().map(|disk| DiskConfig {
        name: disk.name,
        path: disk.path,
        journal: disk.journal,
    });
    Ok(checked.collect())
}

/// A time between recovery points.
///
/// # Errors
///
/// It is none, or out of range.
pub fn parse_interval(text: &str) -> std::result::Result<Duration, String> {
    let invalid = || {
        format!(
            "interval {text:?} is not a time such as \"30s\", \"5m\" or \"1h\", from 10ms to 366 days"
        )
    };
    let duration: SignedDuration = text.parse().map_err(|_| invalid())?;
    let duration = Duration::try_from(duration).map_err(|_| invalid())?;
    if (INTERVAL_MIN..=INTERVAL_MAX).contains(&duration) {
        Ok(duration)
    } else {
        Err(invalid())
    }
}

/// A size in bytes with a unit B, KiB, MiB, GiB or TiB.
fn parse_size(text: &str) -> std::result::Result<u64, String> {
    let invalid = || format!("{text:?} is not a size such as \"512MiB\" or \"8GiB\"");
    let digits = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let shift = match unit.trim() {
        "B" => 0,
        "KiB" => 10,
        "MiB" => 20,
        "GiB" => 30,
        "TiB" => 40,
        _ => return Err(invalid()),
    };
    let number: u64 = number.parse().map_err(|_| invalid())?;
    number.checked_mul(1 << shift).ok_or_else(invalid)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "machine = \"m1\"\ntracker = \"/t\"\nvault = \"file:///v\"\nstate = \"/s\"\n\
        interval = \"30s\"\n[[disk]]\nname = \"root\"\npath = \"/d\"\n";

    #[test]
    fn a_good_one_has_defaults() {
        let config = Config::parse(GOOD).unwrap();
        assert_eq!(config.interval, Duration::from_secs(30));
        assert_eq!(config.codec, Codec::Zstd(1));
        assert_eq!(config.spool_budget_bytes, 8 << 30);
        assert!(config.workers >= 1);
        assert_eq!(config.resync_share_percent, 50);
        assert_eq!(config.quiesce, None);
        assert!(config.retention.is_none());
    }

    #[test]
    fn retention_has_defaults_but_its_points() {
        let section = "[retention]\npoints = \"every 1h for 2d\"\n[[disk]]";
        let config = Config::parse(&GOOD.replace("[[disk]]", section)).unwrap();
        let retention = config.retention.unwrap();
        assert_eq!(retention.policy.to_string(), "every 1h for 2d");
        assert_eq!(
            (retention.grace.as_secs(), retention.every.as_secs()),
            (3600, 3600)
        );
    }

    #[test]
    fn bad_ones_are_named() {
        for (from, to, word) in [
            ("machine", "mashine", "mashine"),
            ("\"30s\"", "\"0s\"", "interval"),
            ("\"30s\"", "\"1000y\"", "interval"),
            ("\"30s\"", "\"5m\"\nspool_budget = \"1MiB\"", "spool_budget"),
            (
                "\"30s\"",
                "\"5m\"\nspool_budget = \"99999999999TiB\"",
                "spool_budget",
            ),
            ("\"30s\"", "\"5m\"\nworkers = 0", "workers"),
            (
                "\"30s\"",
                "\"5m\"\nresync_share_percent = 0",
                "resync_share_percent",
            ),
            (
                "\"30s\"",
                "\"5m\"\nresync_share_percent = 101",
                "resync_share_percent",
            ),
            (
                "\"30s\"",
                "\"5m\"\nresync_share_percent = -1",
                "resync_share_percent",
            ),
            ("\"30s\"", "\"5m\"\ncapture_rate = \"1KiB\"", "capture_rate"),
            ("\"30s\"", "\"5m\"\ncapture_rate = \"fast\"", "capture_rate"),
            (
                "\"30s\"",
                "\"5m\"\ncapture_share_percent = 0",
                "capture_share_percent",
            ),
            (
                "\"30s\"",
                "\"5m\"\nkey_file = \"/k\"\npassphrase_file = \"/p\"",
                "key_file",
            ),
            ("\"root\"", "\"Root\"", "Root"),
            ("[[disk]]", "[quiesce]\n[[disk]]", "quiesce"),
            ("[[disk]]", "[retention]\n[[disk]]", "points"),
            (
                "[[disk]]",
                "[retention]\npoints = \"1h for ever\"\n[[disk]]",
                "retention.points",
            ),
            (
                "[[disk]]",
                "[retention]\npoints = \"1h for 2d\"\ngrace = \"-1h\"\n[[disk]]",
                "retention.grace",
            ),
            (
                "[[disk]]",
                "[retention]\npoints = \"1h for 2d\"\nevery = \"0s\"\n[[disk]]",
                "retention.every",
            ),
            ("[[disk]]", "[quiesce]\nsoon = 1\n[[disk]]", "soon"),
            ("[[disk]]\nname = \"root\"\npath = \"/d\"\n", "", "disk"),
        ] {
            let error = Config::parse(&GOOD.replace(from, to)).unwrap_err();
            assert!(error.contains(word), "{error}");
        }
    }

    #[test]
    fn sizes_have_units() {
        assert_eq!(parse_size("8GiB"), Ok(8 << 30));
        assert_eq!(parse_size("12 B"), Ok(12));
        for text in ["", "8", "8GB", "GiB", "-1MiB", "99999999TiB"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }
}
