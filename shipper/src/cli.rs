//! The command line: raw arguments, made into checked ones.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use shipper::error::{Error, ErrorKind, Result};
use shipper::lifecycle::config::Config;
use shipper::vault::Vault;
use shipper::vault::layout::is_valid_name;
use tracker::extent::Epoch;

/// Turns tracked changes of Linux disks into recovery points in a vault.
#[derive(Debug, Parser)]
#[command(name = "shipper", version, about, propagate_version = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands of the shipper.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make a new vault
    Init {
        /// Address of the vault, such as file:///backup/vault
        vault: String,
    },
    /// Check everything that a machine needs, and claim it in the vault
    Protect(ConfigArgument),
    /// Make recovery points until SIGTERM or SIGINT
    Run {
        #[command(flatten)]
        config: ConfigArgument,
        /// Make one recovery point, print its number, then end
        #[arg(long)]
        once: bool,
    },
    /// Show what the running shipper does
    Status {
        #[command(flatten)]
        config: ConfigArgument,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Ask the running shipper for a recovery point now, and print its number when it is in the vault
    Cut {
        #[command(flatten)]
        config: ConfigArgument,
        /// Bring to rest what [quiesce] in the configuration names, for a point that is consistent for
        /// applications; status 1 if it is only crash-consistent
        #[arg(long)]
        quiesce: bool,
    },
    /// Ask the running shipper to compare every block of a disk with the vault, and to upload what differs
    Resync {
        #[command(flatten)]
        config: ConfigArgument,
        /// Name of the disk; all disks without it
        #[arg(long, value_name = "NAME")]
        disk: Option<String>,
        /// End a comparison that was asked for, or that began because too much waits
        #[arg(long)]
        cancel: bool,
    },
    /// List the recovery points of a machine
    Points {
        #[command(flatten)]
        place: PlaceArguments,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Restore a disk as it was at a recovery point
    Restore {
        #[command(flatten)]
        place: PlaceArguments,
        /// Number of the recovery point, sixteen hexadecimal digits, or `latest`
        #[arg(long, value_name = "EPOCH")]
        point: String,
        /// Name of the disk; may be left out where there is one
        #[arg(long, value_name = "NAME")]
        disk: Option<String>,
        /// A new file, or a block device that is not in use
        #[arg(long, value_name = "PATH")]
        to: PathBuf,
    },
    /// Check the vault; the exit status is 1 if something is wrong
    Verify {
        #[command(flatten)]
        place: PlaceArguments,
        /// Read and check every byte, not the structure alone
        #[arg(long)]
        data: bool,
    },
    /// Freeze, hold and thaw; `run` starts it
    #[command(hide = true)]
    QuiesceGuard,
    /// Become a command of a hook; the guard starts it
    #[command(hide = true)]
    QuiesceExec {
        /// The command and its arguments
        #[arg(last = true, required = true)]
        words: Vec<String>,
    },
}

/// The configuration of a machine.
#[derive(Debug, Args)]
pub struct ConfigArgument {
    /// Configuration file of the machine
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
}

impl ConfigArgument {
    /// Reads and checks the file.
    ///
    /// # Errors
    ///
    /// It cannot be read, or says something wrong.
    pub fn load(&self) -> Result<Config> {
        Config::load(&self.config)
    }
}

/// A machine in a vault: by its configuration, or named, for which nothing but the vault is needed.
#[derive(Debug, Args)]
pub struct PlaceArguments {
    /// Configuration file of the machine
    #[arg(long, value_name = "FILE", required_unless_present = "vault")]
    config: Option<PathBuf>,
    /// Address of the vault, instead of a configuration
    #[arg(
        long,
        value_name = "URL",
        conflicts_with = "config",
        requires = "machine"
    )]
    vault: Option<String>,
    /// Name of the machine, with --vault
    #[arg(long, value_name = "NAME", requires = "vault")]
    machine: Option<String>,
}

impl PlaceArguments {
    /// Opens the vault; returns the machine's name beside it.
    ///
    /// # Errors
    ///
    /// The configuration is wrong, the name is invalid, or there is no vault.
    pub fn open(&self) -> Result<(Vault, String)> {
        let (url, machine) = match (&self.config, &self.vault, &self.machine) {
            (Some(path), _, _) => {
                let config = Config::load(path)?;
                (config.vault, config.machine)
            }
            (None, Some(vault), Some(machine)) if is_valid_name(machine) => {
                (vault.clone(), machine.clone())
            }
            (_, _, machine) => {
                let name = machine.as_deref().unwrap_or_default();
                let what = format!("{name:?} is no name of a machine");
                return Err(Error::new(ErrorKind::Invalid, what));
            }
        };
        Ok((Vault::open(&url)?, machine))
    }
}

/// The number of a recovery point; `None` for the latest.
///
/// # Errors
///
/// It is neither.
pub fn parse_point(text: &str) -> Result<Option<Epoch>> {
    if text == "latest" {
        return Ok(None);
    }
    let number = (1..=16)
        .contains(&text.len())
        .then(|| u64::from_str_radix(text, 16).ok());
    number.flatten().map(|number| Some(Epoch(number))).ok_or_else(|| {
        let what = format!(
            "{text:?} is no recovery point: use `latest` or a number that `shipper points` prints"
        );
        Error::new(ErrorKind::Invalid, what)
    })
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
    fn points_are_numbers_or_the_latest() {
        assert_eq!(parse_point("latest").unwrap(), None);
        assert_eq!(parse_point("00000000000000ff").unwrap(), Some(Epoch(255)));
        assert_eq!(parse_point("ff").unwrap(), Some(Epoch(255)));
        for text in ["", "yesterday", "-1", "00000000000000000"] {
            assert!(parse_point(text).is_err(), "{text}");
        }
    }
}
