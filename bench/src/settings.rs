//! What is measured, and how: the command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, ValueEnum};

use crate::Result;

/// Which program makes the requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, ValueEnum)]
pub enum ClientKind {
    /// fio with its nbd engine.
    Fio,
    /// The load generator of this program, which costs the processors less than fio.
    Light,
}

impl ClientKind {
    /// Name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Fio => "fio",
            Self::Light => "light",
        }
    }
}

/// Compares the tracker with other NBD servers on 4 KiB random writes.
#[derive(Clone, Debug, Parser)]
#[command(name = "bench", version)]
pub struct Settings {
    /// The tracker program
    #[arg(long, value_name = "PATH")]
    pub tracker: PathBuf,
    /// Folder on tmpfs and folder on the disk; one section of the report each
    #[arg(long = "folder", value_name = "DIR", required = true)]
    pub folders: Vec<PathBuf>,
    /// Where the JSON report goes
    #[arg(long, value_name = "DIR", default_value = "bench/results")]
    pub results: PathBuf,
    /// Rounds; every server runs once in each
    #[arg(long, default_value_t = 5)]
    pub rounds: usize,
    /// Seconds of one run
    #[arg(long, default_value_t = 4)]
    pub seconds: u64,
    /// Requests in flight on each connection
    #[arg(long, default_value_t = 32)]
    pub depth: usize,
    /// Connections of the light client
    #[arg(long, default_value_t = 1)]
    pub connections: usize,
    /// Size of the disk in MiB; a multiple of four kilobytes in any case
    #[arg(long, default_value_t = 1024)]
    pub size_mib: u64,
    /// Clients to measure with
    #[arg(long = "client", value_enum, default_values_t = [ClientKind::Fio, ClientKind::Light])]
    pub clients: Vec<ClientKind>,
}

impl Settings {
    /// Checks what the parser could not.
    ///
    /// # Errors
    ///
    /// A number is zero or out of range, or a folder is missing.
    pub fn check(&self) -> Result<()> {
        if self.rounds == 0 || self.seconds == 0 || self.size_mib == 0 {
            return Err("rounds, seconds and size must be above zero".into());
        }
        if !(1..=1024).contains(&self.depth) || !(1..=64).contains(&self.connections) {
            return Err("depth must be 1 to 1024, connections 1 to 64".into());
        }
        for folder in &self.folders {
            if !folder.is_dir() {
                return Err(format!("{} is not a folder", folder.display()).into());
            }
        }
        Ok(())
    }

    /// Length of one run.
    pub fn duration(&self) -> Duration {
        Duration::from_secs(self.seconds)
    }

    /// Size of the disk in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.size_mib << 20
    }
}
