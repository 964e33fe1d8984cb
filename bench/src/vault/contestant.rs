//! Who copies disks and restores them, and by which commands.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde::{Deserialize, Serialize};

use super::timed::{Spent, Work, bytes_below};
use crate::Result;
use crate::servers::is_installed;

/// The secret of all that are encrypted. Who benchmarks keeps no secret.
const PASSPHRASE: &str = "benchmark";

/// A program in one configuration, or what bounds all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Contestant {
    /// The shipper with a vault that is not encrypted.
    Shipper,
    /// The shipper with an encrypted vault.
    ShipperEncrypted,
    /// restic, which always encrypts.
    Restic,
    /// borg without encryption.
    Borg,
    /// borg, encrypted.
    BorgEncrypted,
    /// A copy of the image by qemu-img.
    QemuImg,
    /// Reading all data of the disk.
    DiskRead,
    /// Compressing all of it.
    Codec,
}

impl Contestant {
    /// Name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Shipper => "shipper",
            Self::ShipperEncrypted => "shipper, encrypted",
            Self::Restic => "restic",
            Self::Borg => "borg",
            Self::BorgEncrypted => "borg, encrypted",
            Self::QemuImg => "qemu-img convert",
            Self::DiskRead => "reading the disk",
            Self::Codec => "the codec",
        }
    }

    /// Name of its folder.
    pub fn folder(self) -> String {
        self.name().replace([' ', ','], "")
    }

    /// Whether it is the shipper, which is no peer.
    pub fn is_shipper(self) -> bool {
        matches!(self, Self::Shipper | Self::ShipperEncrypted)
    }

    /// The program that has to be installed.
    pub fn program(self) -> Option<&'static str> {
        match self {
            Self::Restic => Some("restic"),
            Self::Borg | Self::BorgEncrypted => Some("borg"),
            Self::QemuImg => Some("qemu-img"),
            _ => None,
        }
    }

    /// Whether it can take part; if not, a line says so.
    pub fn is_present(self) -> bool {
        match self.program() {
            Some(program) if !is_installed(program) => {
                eprintln!("{} is left out: {program} is not installed", self.name());
                false
            }
            _ => true,
        }
    }
}

/// A repository of restic or borg.
#[derive(Debug)]
pub struct Repository<'a> {
    who: Contestant,
    work: Work<'a>,
    folder: PathBuf,
    /// Options that not every version has.
    reads_side_by_side: bool,
    restores_holes: bool,
    copies: u32,
}

impl<'a> Repository<'a> {
    /// A new one; an older one goes.
    ///
    /// # Errors
    ///
    /// The program fails.
    pub fn make(who: Contestant, work: Work<'a>) -> Result<Self> {
        let folder = work.0.join(who.folder());
        if folder.exists() {
            std::fs::remove_dir_all(&folder)?;
        }
        std::fs::create_dir(&folder)?;
        let repository = Self {
            who,
            work,
            folder,
            reads_side_by_side: who == Contestant::Restic && has("backup", "--read-concurrency"),
            restores_holes: who == Contestant::Restic && has("restore", "--sparse"),
            copies: 0,
        };
        let mut init = repository.command();
        match who {
            Contestant::Restic => init.args(["init", "--repository-version", "2"]),
            Contestant::BorgEncrypted => init.args(["init", "--encryption=repokey-blake2"]),
            _ => init.args(["init", "--encryption=none"]),
        };
        if who != Contestant::Restic {
            init.arg(repository.place());
        }
        work.run(&mut init)?;
        Ok(repository)
    }

    /// Copies an image into it.
    ///
    /// # Errors
    ///
    /// The program fails.
    pub fn copy(&mut self, image: &Path) -> Result<Spent> {
        self.copies += 1;
        let mut command = self.command();
        if self.who == Contestant::Restic {
            command.args(["backup", "--quiet", "--compression", "auto"]);
            if self.reads_side_by_side {
                command.args(["--read-concurrency", "2"]);
            }
        } else {
            // What borg's manual says for images of disks: pieces of one size, and no hole is read.
            command.args(["create", "--compression=zstd,1", "--sparse"]);
            command.arg("--chunker-params=fixed,4194304");
            command.arg(self.archive());
        }
        self.work.run(command.arg(image))
    }

    /// Restores the last copy into an empty folder.
    ///
    /// # Errors
    ///
    /// The program fails.
    pub fn restore(&self, target: &Path) -> Result<Spent> {
        let mut command = self.command();
        if self.who == Contestant::Restic {
            command
                .args(["restore", "--quiet", "latest", "--target"])
                .arg(target);
            if self.restores_holes {
                command.arg("--sparse");
            }
        } else {
            command.args(["extract", "--sparse"]).arg(self.archive());
            command.current_dir(target);
        }
        self.work.run(&mut command)
    }

    /// Bytes of its files.
    ///
    /// # Errors
    ///
    /// A folder cannot be read.
    pub fn bytes(&self) -> Result<u64> {
        bytes_below(&self.place())
    }

    fn place(&self) -> PathBuf {
        self.folder.join("repository")
    }

    fn archive(&self) -> String {
        format!("{}::copy{}", self.place().display(), self.copies)
    }

    /// The program with everything that it keeps below the folder.
    fn command(&self) -> Command {
        let cache = self.folder.join("cache");
        let mut command = Command::new(self.who.program().unwrap_or_default());
        if self.who == Contestant::Restic {
            command.env("RESTIC_PASSWORD", PASSPHRASE);
            command
                .arg("--repo")
                .arg(self.place())
                .arg("--cache-dir")
                .arg(cache);
        } else {
            command
                .env("BORG_PASSPHRASE", PASSPHRASE)
                .env("BORG_BASE_DIR", cache);
            command.env("BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK", "yes");
        }
        command
    }
}

/// Whether a command of the installed restic has an option.
fn has(command: &str, option: &str) -> bool {
    let output = Command::new("restic").args([command, "--help"]).output();
    output.is_ok_and(|output| String::from_utf8_lossy(&output.stdout).contains(option))
}
