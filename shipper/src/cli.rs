//! The command line: raw arguments, made into checked ones.

use std::path::{Path, PathBuf};

use clap::{Args, Parser, Subcommand};
use shipper::error::{Error, ErrorKind, Result};
use shipper::keys::slots::UserSecret;
use shipper::keys::source::{
    Access, PASSPHRASE_VARIABLE, generate_key_file, read_key_file, read_passphrase_file,
};
use shipper::lifecycle::config::Config;
use shipper::vault::Vault;
use shipper::vault::layout::is_valid_name;
use shipper::vault::pin::PinReason;
use tracker::extent::Epoch;

use crate::ask;

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
        #[command(flatten)]
        secret: SecretArguments,
        /// Make the key file; there must be none of its name
        #[arg(long, requires = "key_file")]
        generate_key_file: bool,
        /// Do not encrypt: whoever can read the vault can read the disks
        #[arg(long, conflicts_with_all = ["key_file", "passphrase_file"])]
        unencrypted: bool,
    },
    /// Show and change what opens an encrypted vault
    #[command(subcommand)]
    Key(KeyCommand),
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
        /// Print OpenMetrics text, as Prometheus and others collect it
        #[arg(long, conflicts_with = "json")]
        metrics: bool,
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
        /// Bring back what is damaged or missing from the machine's disks and from what waits for upload, and set aside the
        /// recovery points of which something stays lost; on the machine itself, while `shipper run` does not
        #[arg(long, requires = "config")]
        repair: bool,
    },
    #[command(flatten)]
    Retain(RetainCommand),
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

/// The commands on what stays and what goes.
#[derive(Debug, Subcommand)]
pub enum RetainCommand {
    /// Remove the recovery points that [retention] in the configuration does not keep, and what only they need
    Prune {
        #[command(flatten)]
        config: ConfigArgument,
        /// Say what would go, and remove nothing
        #[arg(long)]
        dry_run: bool,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Hold a recovery point against retention
    Pin {
        #[command(flatten)]
        place: PlaceArguments,
        /// Number of the recovery point, or `latest`
        #[arg(long, value_name = "EPOCH")]
        point: String,
        /// Why: hold, drill or failover
        #[arg(long, value_name = "REASON", default_value = "hold")]
        reason: PinReason,
        /// What it is called, for people
        #[arg(long, value_name = "TEXT", default_value = "")]
        label: String,
    },
    /// Take the pins of a recovery point back
    Unpin {
        #[command(flatten)]
        place: PlaceArguments,
        /// Number of the recovery point
        #[arg(long, value_name = "EPOCH")]
        point: String,
        /// Those for this reason alone
        #[arg(long, value_name = "REASON")]
        reason: Option<PinReason>,
    },
}

/// The commands on key slots.
#[derive(Debug, Subcommand)]
pub enum KeyCommand {
    /// List the key slots
    List {
        #[command(flatten)]
        vault: VaultArguments,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Add a key slot: one more secret opens the vault
    Add {
        #[command(flatten)]
        vault: VaultArguments,
        #[command(flatten)]
        new: NewSecretArguments,
        /// What it is called, for people; everybody with access to the store can read it
        #[arg(long, value_name = "TEXT", default_value = "")]
        label: String,
    },
    /// Remove a key slot: its secret opens the vault no longer
    Remove {
        #[command(flatten)]
        vault: VaultArguments,
        /// Name of the slot, as `shipper key list` shows it
        slot: String,
    },
    /// Give a key slot another secret
    Rotate {
        #[command(flatten)]
        vault: VaultArguments,
        /// Name of the slot, as `shipper key list` shows it
        slot: String,
        #[command(flatten)]
        new: NewSecretArguments,
    },
}

/// What opens an encrypted vault. Without any, TIDEMARK_PASSPHRASE of the environment counts, and then the terminal is
/// asked.
#[derive(Clone, Debug, Default, Args)]
pub struct SecretArguments {
    /// A key file: 64 hexadecimal digits
    #[arg(long, value_name = "FILE", conflicts_with = "passphrase_file")]
    key_file: Option<PathBuf>,
    /// A file with the passphrase
    #[arg(long, value_name = "FILE")]
    passphrase_file: Option<PathBuf>,
}

impl SecretArguments {
    /// Where the secret comes from, if that is asked for.
    pub fn access(&self) -> Access {
        Access {
            key_file: self.key_file.clone(),
            passphrase_file: self.passphrase_file.clone(),
            ask: Some(ask::passphrase),
        }
    }

    /// The secret of a new vault.
    ///
    /// # Errors
    ///
    /// There is none, or it cannot be read.
    pub fn new_secret(&self, generate: bool) -> Result<UserSecret> {
        if let (Some(path), true) = (&self.key_file, generate) {
            return generate_key_file(path).map(UserSecret::KeyFile);
        }
        let access = Access {
            ask: Some(ask::new_passphrase),
            ..self.access()
        };
        access.secret()?.ok_or_else(|| {
            let what = format!(
                "A vault is encrypted, and nothing says what opens it: give --key-file FILE, with --generate-key-file for \
                 a new one, or --passphrase-file FILE, or {PASSPHRASE_VARIABLE} in the environment; or --unencrypted, if \
                 whoever can read the vault may read the disks"
            );
            Error::new(ErrorKind::Invalid, what)
        })
    }
}

/// What opens a key slot from now on. Without any, the terminal is asked.
#[derive(Debug, Args)]
pub struct NewSecretArguments {
    /// A key file: 64 hexadecimal digits
    #[arg(long, value_name = "FILE", conflicts_with = "new_passphrase_file")]
    new_key_file: Option<PathBuf>,
    /// A file with the passphrase
    #[arg(long, value_name = "FILE")]
    new_passphrase_file: Option<PathBuf>,
    /// Make the key file; there must be none of its name
    #[arg(long, requires = "new_key_file")]
    generate_key_file: bool,
}

impl NewSecretArguments {
    /// The secret.
    ///
    /// # Errors
    ///
    /// There is none, or it cannot be read.
    pub fn secret(&self) -> Result<UserSecret> {
        match (&self.new_key_file, &self.new_passphrase_file) {
            (Some(path), _) if self.generate_key_file => {
                generate_key_file(path).map(UserSecret::KeyFile)
            }
            (Some(path), _) => read_key_file(path).map(UserSecret::KeyFile),
            (None, Some(path)) => read_passphrase_file(path).map(UserSecret::Passphrase),
            (None, None) => match ask::new_passphrase()? {
                Some(passphrase) => Ok(UserSecret::Passphrase(passphrase)),
                None => Err(Error::new(
                    ErrorKind::Invalid,
                    "Nothing says what opens the slot: give --new-key-file FILE, with --generate-key-file for a new one, or \
                     --new-passphrase-file FILE",
                )),
            },
        }
    }
}

/// A vault: by a configuration, or by its address.
#[derive(Debug, Args)]
pub struct VaultArguments {
    /// Configuration file of a machine
    #[arg(long, value_name = "FILE", required_unless_present = "vault")]
    config: Option<PathBuf>,
    /// Address of the vault, instead of a configuration
    #[arg(long, value_name = "URL", conflicts_with = "config")]
    vault: Option<String>,
    #[command(flatten)]
    secret: SecretArguments,
}

impl VaultArguments {
    /// Its address, and where its secret comes from.
    ///
    /// # Errors
    ///
    /// The configuration is wrong.
    pub fn place(&self) -> Result<(String, Access)> {
        place(self.config.as_deref(), self.vault.as_deref(), &self.secret)
    }
}

/// A vault by its configuration or address. What the command line says of the secret goes before the configuration.
fn place(
    config: Option<&Path>,
    vault: Option<&str>,
    secret: &SecretArguments,
) -> Result<(String, Access)> {
    let Some(path) = config else {
        return Ok((vault.unwrap_or_default().to_owned(), secret.access()));
    };
    let config = Config::load(path)?;
    let given = secret.access();
    let access = match (&given.key_file, &given.passphrase_file) {
        (None, None) => Access {
            ask: given.ask,
            ..config.access
        },
        _ => given,
    };
    Ok((config.vault, access))
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
    #[command(flatten)]
    secret: SecretArguments,
}

impl PlaceArguments {
    /// The configuration, with what the command line says of the secret.
    ///
    /// # Errors
    ///
    /// There is none, or it is wrong.
    pub fn config(&self) -> Result<Config> {
        let missing = || {
            Error::new(
                ErrorKind::Invalid,
                "This needs the configuration of the machine: --config FILE",
            )
        };
        let path = self.config.as_deref().ok_or_else(missing)?;
        let mut config = Config::load(path)?;
        (_, config.access) = place(Some(path), None, &self.secret)?;
        Ok(config)
    }

    /// Opens the vault; returns the machine's name beside it.
    ///
    /// # Errors
    ///
    /// The configuration is wrong, the name is invalid, or there is no vault.
    pub fn open(&self) -> Result<(Vault, String)> {
        let machine = match (&self.config, &self.machine) {
            (Some(path), _) => Config::load(path)?.machine,
            (None, Some(machine)) if is_valid_name(machine) => machine.clone(),
            (_, machine) => {
                let name = machine.as_deref().unwrap_or_default();
                let what = format!("{name:?} is no name of a machine");
                return Err(Error::new(ErrorKind::Invalid, what));
            }
        };
        let (url, access) = place(self.config.as_deref(), self.vault.as_deref(), &self.secret)?;
        Ok((Vault::open(&url, &access)?, machine))
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
