//! What is measured, and how: the command line, and the plan made of it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Parser, ValueEnum};
use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use serde::Serialize;

use crate::Result;
use crate::job::{Job, JobKind};
use crate::servers::{Image, ServerKind, Setup, is_installed};
use crate::vault::Part;

/// Seconds that a run takes besides its load: filling the image, starting and stopping, fio's own start.
const OVERHEAD_SECONDS: f64 = 0.75;
/// Bounds of the seconds of a run that are computed from `--minutes`.
const SECONDS_MIN: f64 = 0.5;
const SECONDS_MAX: f64 = 4.0;

/// Which program makes the requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ClientKind {
    /// fio with its nbd engine
    Fio,
    /// The client of this program, which costs the processors less than fio
    Light,
}

impl ClientKind {
    /// Name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Fio => "fio",
            Self::Light => "light client",
        }
    }
}

/// Compares the tracker with other NBD servers.
///
/// Without --job and --client, every job is measured on the first folder with the light client, the
/// most telling ones with fio, and some on the other folders.
#[derive(Clone, Debug, Parser)]
#[command(name = "bench", version)]
pub struct Settings {
    /// The tracker program
    #[arg(long, value_name = "PATH")]
    pub tracker: PathBuf,
    /// Folder on tmpfs and folder on the disk
    #[arg(long = "folder", value_name = "DIR", required = true)]
    pub folders: Vec<PathBuf>,
    /// Two minutes: 4 KiB random writes at depth 32, tracker and nbdkit, on the first folder
    #[arg(long, conflicts_with_all = ["jobs", "clients"])]
    pub quick: bool,
    /// Fifteen minutes: what tracking costs, on the last folder. Needs --shipper, and root for a part;
    /// takes --rounds, --seconds and --size-mib
    #[arg(long, conflicts_with_all = ["quick", "jobs", "clients", "servers"], requires = "shipper")]
    pub cost: bool,
    /// What taking recovery points costs, on the last folder: an epoch every 5 s on a disk of 8 GiB, against
    /// none. Needs --shipper; takes --rounds, --seconds, --size-mib, --direct and --guest-iops
    #[arg(long, conflicts_with_all = ["quick", "cost", "jobs", "clients", "servers"], requires = "shipper")]
    pub capture: bool,
    /// With --capture: the guest writes so often a second, at a depth of 32 at most, instead of as often as it can
    #[arg(long, value_name = "IOPS", requires = "capture", value_parser = clap::value_parser!(u32).range(1..))]
    pub guest_iops: Option<u32>,
    /// First copies of a disk of 8 GiB, copies of what has changed, and restores, on the last folder, beside restic, borg
    /// and qemu-img. Needs --shipper and 25 GiB; takes --part, --rounds, --size-mib and --direct
    #[arg(long, conflicts_with_all = ["quick", "cost", "capture", "jobs", "clients", "servers"], requires = "shipper")]
    pub vault: bool,
    /// Parts of --vault to measure; those of an earlier report of the same --name stay in it [default: all]
    #[arg(long = "part", value_enum, requires = "vault")]
    pub parts: Vec<Part>,
    /// The shipper program
    #[arg(long, value_name = "PATH")]
    pub shipper: Option<PathBuf>,
    /// Jobs to measure; with --client or this, on all folders with all clients given
    #[arg(long = "job", value_enum)]
    pub jobs: Vec<JobKind>,
    /// Clients to measure with
    #[arg(long = "client", value_enum)]
    pub clients: Vec<ClientKind>,
    /// Servers to measure [default: all that are installed, but threads in place of io_uring]
    #[arg(long = "server", value_enum)]
    pub servers: Vec<ServerKind>,
    /// Past the page cache, with --job or --client; of the servers those that can
    #[arg(long)]
    pub direct: bool,
    /// Rounds; every server runs once in each
    #[arg(long, default_value_t = 5)]
    pub rounds: usize,
    /// Minutes that all should take; the seconds of each run follow from it
    #[arg(long, default_value_t = 15.0)]
    pub minutes: f64,
    /// Seconds of each run, whatever all takes
    #[arg(long)]
    pub seconds: Option<f64>,
    /// Size of the disk in MiB [default: 256, with --quick 512]
    #[arg(long)]
    pub size_mib: Option<u64>,
    /// Count system calls as well, in a short run of its own for each server
    #[arg(long)]
    pub syscalls: bool,
    /// Check what the light client reads, and read back what it wrote
    #[arg(long)]
    pub verify: bool,
    /// Where reports go
    #[arg(long, value_name = "DIR", default_value = "bench/results/local")]
    pub results: PathBuf,
    /// Name of the report's files [default: date and time]
    #[arg(long)]
    pub name: Option<String>,
}

/// One table of the report.
#[derive(Clone, Debug)]
pub struct Section {
    /// Where the image lies.
    pub folder: PathBuf,
    /// What kind of folder that is.
    pub medium: String,
    /// Past the page cache.
    pub direct: bool,
    /// Who makes the requests.
    pub client: ClientKind,
    /// Which requests.
    pub job: Job,
}

/// All that will be done.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The tables.
    pub sections: Vec<Section>,
    /// Who takes part.
    pub servers: Vec<ServerKind>,
    /// Rounds of each table.
    pub rounds: usize,
    /// Length of each run.
    pub duration: Duration,
    /// Size of the disk.
    pub size_bytes: u64,
}

impl Section {
    /// The servers that can do what is measured.
    pub fn servers<'a>(&self, all: &'a [ServerKind]) -> impl Iterator<Item = ServerKind> + 'a {
        let direct = self.direct;
        all.iter()
            .copied()
            .filter(move |server| !direct || server.does_direct())
    }

    /// How a server is started for it, on a fresh image.
    pub fn setup<'a>(&'a self, settings: &'a Settings, plan: &Plan, kind: ServerKind) -> Setup<'a> {
        Setup {
            kind,
            tracker: &settings.tracker,
            folder: &self.folder,
            direct: self.direct,
            image: Image::Filled(plan.size_bytes),
            arguments: &[],
        }
    }
}

impl Settings {
    /// Makes the plan.
    ///
    /// # Errors
    ///
    /// A number is out of range, or a folder is missing.
    pub fn plan(&self) -> Result<Plan> {
        if self.rounds == 0 || self.size_mib == Some(0) {
            return Err("rounds and size must be above zero".into());
        }
        let mut media = Vec::new();
        for folder in &self.folders {
            media.push((folder.clone(), medium_of(folder)?));
        }
        let servers = self.servers_installed();
        if servers.is_empty() {
            return Err("none of these servers is installed".into());
        }
        let sections = self.sections(&media);
        let runs: usize = sections.iter().map(|s| s.servers(&servers).count()).sum();
        let runs = (runs * self.rounds) as f64;
        let seconds = match self.seconds {
            Some(seconds) => seconds,
            None if self.quick => 2.0,
            None => (self.minutes * 60.0 / runs - OVERHEAD_SECONDS).clamp(SECONDS_MIN, SECONDS_MAX),
        };
        if !(0.1..=600.0).contains(&seconds) {
            return Err("a run lasts from 0.1 to 600 seconds".into());
        }
        let size_mib = self.size_mib.unwrap_or(if self.quick { 512 } else { 256 });
        Ok(Plan {
            sections,
            servers,
            rounds: self.rounds,
            duration: Duration::from_secs_f64(seconds),
            size_bytes: size_mib << 20,
        })
    }

    /// The servers that take part; of each that does not, a line says why.
    fn servers_installed(&self) -> Vec<ServerKind> {
        let wanted = match (&self.servers[..], self.quick) {
            ([], true) => vec![
                ServerKind::Tracker,
                ServerKind::Nbdkit,
                ServerKind::TrackerPlain,
                ServerKind::TrackerAgain,
            ],
            ([], false) => {
                let mut all = ServerKind::value_variants().to_vec();
                all.retain(|server| *server != ServerKind::TrackerThreads);
                all
            }
            (chosen, _) => chosen.to_vec(),
        };
        let mut servers = Vec::new();
        for server in wanted {
            match server.program() {
                Some(program) if !is_installed(program) => {
                    eprintln!("{} is left out: {program} is not installed", server.name());
                }
                _ => servers.push(server),
            }
        }
        servers
    }

    fn sections(&self, media: &[(PathBuf, String)]) -> Vec<Section> {
        let mut sections = Vec::new();
        let mut add = |(folder, medium): &(PathBuf, String), direct, client, job| {
            let suffix = if direct { ", direct" } else { "" };
            sections.push(Section {
                folder: folder.clone(),
                medium: format!("{medium}{suffix}"),
                direct,
                client,
                job: Job::of(job),
            });
        };
        let both = [ClientKind::Fio, ClientKind::Light];
        if self.quick {
            for client in both {
                add(&media[0], false, client, JobKind::Write4kDeep);
            }
        } else if self.jobs.is_empty() && self.clients.is_empty() {
            for job in JobKind::value_variants() {
                add(&media[0], false, ClientKind::Light, *job);
            }
            for job in [JobKind::Write4kDeep, JobKind::Write1m, JobKind::Read1m] {
                add(&media[0], false, ClientKind::Fio, job);
            }
            for medium in media.iter().skip(1) {
                for job in [JobKind::Write4kDeep, JobKind::Write4kSync, JobKind::Write1m] {
                    add(medium, false, ClientKind::Light, job);
                }
                add(medium, false, ClientKind::Fio, JobKind::Write4kDeep);
                for job in [JobKind::Write4kDeep, JobKind::Read4kDeep, JobKind::Write1m] {
                    add(medium, true, ClientKind::Light, job);
                }
            }
        } else {
            let jobs = or_all(&self.jobs, JobKind::value_variants());
            for medium in media {
                for client in or_all(&self.clients, &both) {
                    for job in jobs {
                        add(medium, self.direct, *client, *job);
                    }
                }
            }
        }
        sections
    }
}

fn or_all<'a, T>(chosen: &'a [T], all: &'a [T]) -> &'a [T] {
    if chosen.is_empty() { all } else { chosen }
}

/// `tmpfs` or `disk`.
pub fn medium_of(folder: &Path) -> Result<String> {
    if !folder.is_dir() {
        return Err(format!("{} is not a folder", folder.display()).into());
    }
    let kind = statfs(folder)?.filesystem_type();
    Ok(if kind == TMPFS_MAGIC { "tmpfs" } else { "disk" }.to_owned())
}
