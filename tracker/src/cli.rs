//! The command line: raw arguments, made into checked ones.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use tracker::disk::NewSize;
use tracker::engine::EngineChoice;
use tracker::error::{Error, ErrorKind, Result};
use tracker::extent::Epoch;
use tracker::nbd::attach::{AttachOptions, Device};
use tracker::nbd::listener::{Listener, Plaintext};
use tracker::nbd::tls::TlsFiles;
use tracker::serve::{DiskArgument, ServeOptions, TlsOptions};
use tracker::systemd::Activated;

/// Longest time on the command line; far below where the kernel's clock ticks overflow.
const SECONDS_MAX: u64 = 24 * 3600;

/// Below, every other write would wait; above, a comparison takes longer than of any disk in use.
const INTENT_CAP_RANGE: std::ops::RangeInclusive<u64> = 64 << 20..=1 << 40;

/// Serves Linux disks over NBD and remembers what has changed.
#[derive(Debug, Parser)]
#[command(name = "tracker", version, about, propagate_version = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands of the tracker.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve one or several disks of one machine over NBD
    Serve(ServeArguments),
    /// Make a served disk a device of this machine, by the kernel's nbd client
    Attach(AttachArguments),
    /// Take a device made by attach away
    Detach {
        /// The device, such as /dev/nbd0
        device: PathBuf,
        /// Even if it is mounted: its users see errors
        #[arg(long)]
        force: bool,
    },
    /// Show what a running tracker does
    Status {
        /// Control socket of the tracker
        #[arg(long, value_name = "PATH")]
        control: PathBuf,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Hold the disks as they are at one moment, for programs that copy them over NBD
    #[command(subcommand)]
    Snapshot(SnapshotCommand),
    /// Let a served disk grow
    Resize {
        /// Control socket of the tracker
        #[arg(long, value_name = "PATH")]
        control: PathBuf,
        /// Name of the disk
        disk: String,
        /// Size that its file gets, such as 20GiB, or +5GiB for so much more [default: the size that
        /// the file or device has by now]
        #[arg(value_parser = parse_new_size)]
        size: Option<NewSize>,
    },
    /// Look into a journal file
    #[command(subcommand)]
    Journal(JournalCommand),
}

/// The commands on snapshots.
#[derive(Debug, Subcommand)]
pub enum SnapshotCommand {
    /// Take a snapshot of all disks; prints its epoch and its exports
    Create {
        /// Control socket of the tracker
        #[arg(long, value_name = "PATH")]
        control: PathBuf,
    },
    /// Show the snapshot that is held
    List {
        /// Control socket of the tracker
        #[arg(long, value_name = "PATH")]
        control: PathBuf,
    },
    /// End a snapshot
    Release {
        /// Control socket of the tracker
        #[arg(long, value_name = "PATH")]
        control: PathBuf,
        /// Its epoch, as create has printed it
        #[arg(value_parser = parse_epoch)]
        epoch: Epoch,
        /// It was copied: the next snapshot tells the changes since this one. Not beside a shipper, which would have
        /// to compare every block
        #[arg(long)]
        done: bool,
    },
}

/// The commands on journal files.
#[derive(Debug, Subcommand)]
pub enum JournalCommand {
    /// Check every structure of a journal; the exit status is 1 if something is wrong
    Verify {
        /// The journal, DISK.hrl
        file: PathBuf,
    },
    /// Print what a journal holds
    Dump {
        /// The journal, DISK.hrl
        file: PathBuf,
    },
}

/// Arguments of `tracker attach` as they were typed.
#[derive(Debug, Args)]
pub struct AttachArguments {
    /// The device, such as /dev/nbd0
    device: PathBuf,
    /// Unix socket of the tracker
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,
    /// Name of the export [default: the only one]
    #[arg(
        long,
        value_name = "EXPORT",
        default_value = "",
        hide_default_value = true
    )]
    name: String,
    /// Time that requests wait for a tracker that went away, before they fail
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = parse_seconds)]
    dead_conn_timeout: Duration,
    /// Time after which an unanswered request is sent again; more than the disk ever takes
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = parse_seconds)]
    timeout: Duration,
    /// Connections to the tracker
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=16))]
    connections: u8,
    /// Logical block size of the device
    #[arg(long, value_name = "BYTES", default_value = "512", value_parser = ["512", "1024", "2048", "4096"])]
    block_size: String,
    /// Return when the device is ready, and keep its connections alive in the background
    #[arg(long)]
    pub background: bool,
    /// What the program started with --background gets instead
    #[arg(long, hide = true, conflicts_with = "background")]
    pub in_background: bool,
}

impl AttachArguments {
    /// Checks what the parser could not.
    ///
    /// # Errors
    ///
    /// The path names no nbd device.
    pub fn checked(self) -> Result<AttachOptions> {
        let block_size = self.block_size.parse().map_err(|error| {
            Error::new(ErrorKind::Invalid, "The block size is no number").with_source(error)
        })?;
        Ok(AttachOptions {
            device: Device::parse(&self.device)?,
            // The background has another folder.
            socket: std::path::absolute(&self.socket).unwrap_or(self.socket),
            name: self.name,
            block_size,
            timeout: self.timeout,
            dead_connection_timeout: self.dead_conn_timeout,
            connections: usize::from(self.connections),
        })
    }
}

/// Arguments of `tracker serve` as they were typed.
#[derive(Debug, Args)]
pub struct ServeArguments {
    /// Raw image or block device; NAME is the export's name, by default the file's name
    #[arg(long = "disk", value_name = "[NAME=]PATH", required = true)]
    disks: Vec<String>,
    /// Unix socket to serve NBD on; may be left out where systemd hands a socket over
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Serve NBD over TCP as well; addresses other than loopback need TLS
    #[arg(long, value_name = "ADDR:PORT")]
    listen: Option<SocketAddr>,
    #[command(flatten)]
    tls: TlsArguments,
    /// Control socket, mode 0600 [default: SOCKET.control]
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,
    /// Worker threads [default: the number of processors, 4 at most]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    workers: Option<u16>,
    /// What carries out the I/O
    #[arg(long, value_name = "ENGINE", value_enum, default_value_t)]
    engine: EngineChoice,
    /// Size of the journal's ring, for new journals
    #[arg(long, value_name = "SIZE", default_value = "64MiB", value_parser = parse_size)]
    ring_size: u64,
    /// How much of each disk can be in use at once without a write waiting for the journal; also what
    /// is compared after a power cut, at most
    #[arg(long, value_name = "SIZE", default_value = "16GiB", value_parser = parse_size)]
    intent_cap: u64,
    /// Folder for journals of block devices; that of a file lies beside it
    #[arg(long, value_name = "DIR", default_value = "/var/lib/tidemark")]
    journal_dir: PathBuf,
    /// Folder for the blocks that are kept while a recovery point is captured [default: beside the journals]
    #[arg(long, value_name = "DIR")]
    preserve_dir: Option<PathBuf>,
    /// How much of each disk is kept at most while a recovery point is captured: where guests overwrite more,
    /// the recovery point is given up
    #[arg(long, value_name = "SIZE", default_value = "8GiB", value_parser = parse_size)]
    preserve_budget: u64,
    /// While a recovery point is captured, keep every block and export the disks as they were, NAME@EPOCH;
    /// costs more copies
    #[arg(long)]
    frozen_views: bool,
    /// Refuse writes
    #[arg(long)]
    read_only: bool,
    /// Leave the page cache out (O_DIRECT); clients must keep to the block size that they are told
    #[arg(long)]
    direct: bool,
    /// Do not track changes: for benchmarks; the disk cannot be protected
    #[arg(long, conflicts_with = "resync")]
    no_journal: bool,
    /// Distrust the journals: set them aside, and have every block checked by fingerprints
    #[arg(long)]
    resync: bool,
}

/// What `tracker serve` is told of TLS.
#[derive(Debug, Args)]
struct TlsArguments {
    /// Certificate for TLS over TCP, followed by those between it and its authority
    #[arg(long, value_name = "PEM", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// Key of the certificate; no other account may read it
    #[arg(long, value_name = "PEM", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// Authorities of client certificates: clients without one of theirs are refused
    #[arg(long, value_name = "PEM", requires = "tls_cert")]
    tls_client_ca: Option<PathBuf>,
    /// Whether clients over TCP must use TLS [default: required, where there is a certificate]
    #[arg(long, value_name = "HOW", value_parser = ["required", "allowed"], requires = "tls_cert")]
    tls: Option<String>,
    /// Serve NBD over TCP without TLS on any address: everybody on the way can read and change the disk
    #[arg(long)]
    allow_plaintext_network: bool,
}

impl TlsArguments {
    /// TLS, and where TCP may go without it.
    ///
    /// # Errors
    ///
    /// The arguments contradict each other, or there is no TCP that they could be for.
    fn checked(self, serves_tcp: bool) -> Result<(Option<TlsOptions>, Plaintext)> {
        let invalid = |text| Err(Error::new(ErrorKind::Invalid, text));
        let tls = match (self.tls_cert, self.tls_key) {
            (Some(certificate), Some(key)) => Some(TlsOptions {
                files: TlsFiles {
                    certificate,
                    key,
                    client_authorities: self.tls_client_ca,
                },
                required: self.tls.is_none_or(|how| how == "required"),
            }),
            _ => None,
        };
        if !serves_tcp && (tls.is_some() || self.allow_plaintext_network) {
            return invalid(
                "TLS and --allow-plaintext-network are for TCP, which is not served: give an \
                 address with --listen ADDR:PORT",
            );
        }
        let required = tls.as_ref().is_some_and(|tls| tls.required);
        match (required, self.allow_plaintext_network) {
            (true, true) => invalid(
                "TLS is required, so that --allow-plaintext-network allows nothing: leave it out, \
                 or give --tls allowed",
            ),
            (true, false) => Ok((tls, Plaintext::Nowhere)),
            (false, false) => Ok((tls, Plaintext::Loopback)),
            (false, true) => Ok((tls, Plaintext::Anywhere)),
        }
    }
}

impl ServeArguments {
    /// Checks what the parser could not.
    ///
    /// # Errors
    ///
    /// A disk without a name, two with the same name or path, or no socket.
    pub fn checked(self, activated: &Activated) -> Result<ServeOptions> {
        let mut disks = Vec::new();
        let mut names = BTreeSet::new();
        let mut paths = BTreeSet::new();
        for argument in &self.disks {
            let disk = parse_disk(argument)?;
            if !names.insert(disk.name.clone()) {
                return Err(Error::new(
                    ErrorKind::Invalid,
                    format!(
                        "Two disks are named {:?}: name them with NAME=PATH",
                        disk.name
                    ),
                ));
            }
            let canonical = std::fs::canonicalize(&disk.path).unwrap_or_else(|_| disk.path.clone());
            if !paths.insert(canonical) {
                return Err(Error::new(
                    ErrorKind::Invalid,
                    format!("Disk {} is given twice", disk.path.display()),
                ));
            }
            disks.push(disk);
        }
        let processors = std::thread::available_parallelism().map_or(1, |count| count.get());
        let control = control_path(self.control, self.socket.as_deref(), activated)?;
        let serves_tcp = self.listen.is_some() || activated.nbd.iter().any(Listener::is_tcp);
        let (tls, plaintext) = self.tls.checked(serves_tcp)?;
        Ok(ServeOptions {
            disks,
            control,
            socket: self.socket,
            listen: self.listen,
            tls,
            plaintext,
            workers: self.workers.map_or(processors.min(4), usize::from),
            engine: self.engine,
            ring_bytes: self.ring_size,
            intent_bytes: checked_intent_cap(self.intent_cap)?,
            journal_folder: self.journal_dir,
            preserve_folder: self.preserve_dir,
            preserve_budget_bytes: self.preserve_budget,
            frozen_views: self.frozen_views,
            read_only: self.read_only,
            direct: self.direct,
            tracking: !self.no_journal && !self.read_only,
            rebuild: self.resync,
        })
    }
}

/// The path that was given, or the one beside the first unix socket for NBD.
fn control_path(
    given: Option<PathBuf>,
    socket: Option<&Path>,
    activated: &Activated,
) -> Result<PathBuf> {
    let handed_over = activated.nbd.iter().find_map(Listener::unix_path);
    if socket.is_none() && activated.nbd.is_empty() {
        return Err(Error::new(
            ErrorKind::Invalid,
            "There is no socket to serve NBD on: give one with --socket PATH",
        ));
    }
    let beside = socket.map(Path::to_owned).or(handed_over).map(|path| {
        let mut path = path.into_os_string();
        path.push(".control");
        path.into()
    });
    // One that was handed over needs no path.
    let handed_over = activated.control.as_ref().and_then(Listener::unix_path);
    given.or(handed_over).or(beside).ok_or_else(|| {
        Error::new(
            ErrorKind::Invalid,
            "There is no path for the control socket: give one with --control PATH",
        )
    })
}

fn parse_epoch(text: &str) -> std::result::Result<Epoch, String> {
    let epoch = Epoch::parse(text).filter(|&epoch| epoch > Epoch::ZERO);
    epoch.ok_or_else(|| {
        format!("{text:?} is not an epoch: up to sixteen hexadecimal digits above zero")
    })
}

fn checked_intent_cap(bytes: u64) -> Result<u64> {
    if INTENT_CAP_RANGE.contains(&bytes) {
        return Ok(bytes);
    }
    Err(Error::new(
        ErrorKind::Invalid,
        format!("An intent cap of {bytes} bytes is not from 64 MiB to 1 TiB"),
    ))
}

fn parse_disk(argument: &str) -> Result<DiskArgument> {
    let (name, path) = match argument.split_once('=') {
        Some((name, path)) if !name.contains('/') && !name.is_empty() => (name.to_owned(), path),
        _ => {
            let name = Path::new(argument)
                .file_name()
                .and_then(|name| name.to_str());
            let name = name.ok_or_else(|| {
                Error::new(
                    ErrorKind::Invalid,
                    format!("Disk {argument:?} has no name: give one with NAME=PATH"),
                )
            })?;
            (name.to_owned(), argument)
        }
    };
    Ok(DiskArgument {
        name,
        path: PathBuf::from(path),
    })
}

/// A time of whole seconds with an optional unit s, m or h; the kernel counts no less.
fn parse_seconds(text: &str) -> std::result::Result<Duration, String> {
    let digits = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let factor: u64 = match unit.trim() {
        "" | "s" => 1,
        "m" => 60,
        "h" => 3600,
        other => return Err(format!("unknown unit {other:?}: use s, m or h")),
    };
    let number: u64 = number
        .parse()
        .map_err(|_| format!("{text:?} is not a time"))?;
    match number.checked_mul(factor) {
        Some(seconds @ 1..=SECONDS_MAX) => Ok(Duration::from_secs(seconds)),
        _ => Err(format!(
            "{text:?} is not between 1 s and {} h",
            SECONDS_MAX / 3600
        )),
    }
}

/// A size, or what is to be added to one.
fn parse_new_size(text: &str) -> std::result::Result<NewSize, String> {
    match text.strip_prefix('+') {
        Some(more) => parse_size(more).map(NewSize::More),
        None => parse_size(text).map(NewSize::Bytes),
    }
}

/// A size in bytes with an optional unit KiB, MiB, GiB or TiB.
fn parse_size(text: &str) -> std::result::Result<u64, String> {
    let digits = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let factor: u64 = match unit.trim() {
        "" | "B" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        "TiB" => 1 << 40,
        other => {
            return Err(format!(
                "unknown unit {other:?}: use B, KiB, MiB, GiB or TiB"
            ));
        }
    };
    let number: u64 = number
        .parse()
        .map_err(|_| format!("{text:?} is not a size"))?;
    number
        .checked_mul(factor)
        .ok_or_else(|| format!("{text:?} is too large"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn names_and_paths_of_disks() {
        let disk = parse_disk("root=/images/a.img").unwrap();
        assert_eq!(
            (disk.name.as_str(), disk.path.to_str()),
            ("root", Some("/images/a.img"))
        );
        let disk = parse_disk("/images/a=b.img").unwrap();
        assert_eq!(
            (disk.name.as_str(), disk.path.to_str()),
            ("a=b.img", Some("/images/a=b.img"))
        );
        assert!(parse_disk("/").is_err());
    }

    #[test]
    fn times_are_whole_seconds() {
        assert_eq!(parse_seconds("60s"), Ok(Duration::from_secs(60)));
        assert_eq!(parse_seconds("5m"), Ok(Duration::from_secs(300)));
        assert_eq!(parse_seconds("7"), Ok(Duration::from_secs(7)));
        for wrong in ["0", "500ms", "s", "25h", "99999999999999999999h", "-1s"] {
            assert!(parse_seconds(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn sizes_have_units() {
        assert_eq!(parse_size("64MiB"), Ok(64 << 20));
        assert_eq!(parse_size("4096"), Ok(4096));
        assert_eq!(parse_size("2TiB"), Ok(2 << 40));
        assert!(parse_size("64MB").is_err());
        assert!(parse_size("MiB").is_err());
        assert!(parse_size("99999999999GiB").is_err());
    }

    #[test]
    fn a_new_size_is_absolute_or_more() {
        assert_eq!(parse_new_size("20GiB"), Ok(NewSize::Bytes(20 << 30)));
        assert_eq!(parse_new_size("+5GiB"), Ok(NewSize::More(5 << 30)));
        for wrong in ["", "+", "-5GiB", "++1", "5 gigabytes"] {
            assert!(parse_new_size(wrong).is_err(), "{wrong}");
        }
    }
}
