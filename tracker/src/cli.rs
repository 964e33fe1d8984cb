//! The command line: raw arguments, made into checked ones.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use clap::{Args, Parser, Subcommand};
use tracker::error::{Error, ErrorKind, Result};
use tracker::serve::{DiskArgument, ServeOptions};

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
    /// Show what a running tracker does
    Status {
        /// Control socket of the tracker
        #[arg(long, value_name = "PATH")]
        control: PathBuf,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Look into a journal file
    #[command(subcommand)]
    Journal(JournalCommand),
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

/// Arguments of `tracker serve` as they were typed.
#[derive(Debug, Args)]
pub struct ServeArguments {
    /// Raw image or block device; NAME is the export's name, by default the file's name
    #[arg(long = "disk", value_name = "[NAME=]PATH", required = true)]
    disks: Vec<String>,
    /// Unix socket to serve NBD on
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,
    /// Serve NBD over TCP as well; loopback addresses only
    #[arg(long, value_name = "ADDR:PORT")]
    listen: Option<SocketAddr>,
    /// Control socket, mode 0600 [default: SOCKET.control]
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,
    /// Worker threads [default: the number of processors, 4 at most]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    workers: Option<u16>,
    /// Size of the journal's ring, for new journals
    #[arg(long, value_name = "SIZE", default_value = "64MiB", value_parser = parse_size)]
    ring_size: u64,
    /// Folder for journals of block devices; that of a file lies beside it
    #[arg(long, value_name = "DIR", default_value = "/var/lib/tidemark")]
    journal_dir: PathBuf,
    /// Refuse writes
    #[arg(long)]
    read_only: bool,
    /// Do not track changes: for benchmarks; the disk cannot be protected
    #[arg(long, conflicts_with = "resync")]
    no_journal: bool,
    /// Distrust the journals: set them aside, and have every block checked by fingerprints
    #[arg(long)]
    resync: bool,
}

impl ServeArguments {
    /// Checks what the parser could not.
    ///
    /// # Errors
    ///
    /// A disk without a name, or two with the same name or path.
    pub fn checked(self) -> Result<ServeOptions> {
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
        let mut default_control = self.socket.clone().into_os_string();
        default_control.push(".control");
        Ok(ServeOptions {
            disks,
            control: self.control.unwrap_or_else(|| default_control.into()),
            socket: self.socket,
            listen: self.listen,
            workers: self.workers.map_or(processors.min(4), usize::from),
            ring_bytes: self.ring_size,
            journal_folder: self.journal_dir,
            read_only: self.read_only,
            tracking: !self.no_journal && !self.read_only,
            rebuild: self.resync,
        })
    }
}

/// `NAME=PATH`, or a path alone; a name has no slash, so that a path may have an equals sign.
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

/// A size in bytes with an optional unit KiB, MiB or GiB.
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
        other => return Err(format!("unknown unit {other:?}: use B, KiB, MiB or GiB")),
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
    fn sizes_have_units() {
        assert_eq!(parse_size("64MiB"), Ok(64 << 20));
        assert_eq!(parse_size("4096"), Ok(4096));
        assert!(parse_size("64MB").is_err());
        assert!(parse_size("MiB").is_err());
        assert!(parse_size("99999999999GiB").is_err());
    }
}
