//! The state folder of a machine: which generation this shipper holds, and how far the first copy is.
//!
//! One process at a time works in it: the folder is locked as long as [`StateFolder`] lives.

use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tracker::extent::Epoch;

use super::config::Config;
use crate::error::{Error, ErrorKind, Result};
use crate::segment::reference::SegmentRef;
use crate::spool::files::{failed, make_folder, read_if_present, remove_if_present, replace};
use crate::vault::Vault;

const VERSION: u32 = 1;

/// What `shipper protect` leaves for `shipper run`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineState {
    /// Version of the folder.
    pub version: u32,
    /// Identity of the vault.
    pub vault: String,
    /// Name of the machine.
    pub machine: String,
    /// The generation that this shipper holds.
    pub generation: u64,
}

impl MachineState {
    /// The state of a machine whose generation has just been claimed.
    pub fn new(vault: String, machine: String, generation: u64) -> Self {
        Self {
            version: VERSION,
            vault,
            machine,
            generation,
        }
    }

    /// Fails unless it is of this configuration's machine and of this vault.
    ///
    /// # Errors
    ///
    /// `Mismatch`: it is of another one.
    pub fn check(&self, config: &Config, vault: &Vault) -> Result<()> {
        let mismatch = |what: String| {
            let shown = config.state.display();
            let advice = "use another state folder, or run `shipper protect` in a new one";
            Err(Error::new(
                ErrorKind::Mismatch,
                format!("State folder {shown} is of {what}: {advice}"),
            ))
        };
        if self.machine != config.machine {
            return mismatch(format!("machine {}, not {}", self.machine, config.machine));
        }
        if self.vault != vault.id() {
            return mismatch(format!("another vault than {}", config.vault));
        }
        Ok(())
    }
}

/// How far a scan of the disks is: the first copy, or a comparison with all fingerprints.
///
/// Its segments lie between the last recovery point and the next one, which will name them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScanState {
    /// An epoch of its own, above all before it; every change since its end is tracked. If the
    /// journal calls every block changed as of a later epoch, the scan begins anew.
    pub epoch: Epoch,
    /// The disks that are scanned.
    pub disks: Vec<DiskScan>,
}

/// How far the scan of one disk is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskScan {
    /// Name of the disk.
    pub name: String,
    /// The journal that tells of changes during the scan.
    pub journal: String,
    /// Blocks before this one are done.
    pub cursor: u64,
    /// Blocks of the disk when the scan began.
    pub blocks: u64,
    /// The segments made, oldest first.
    pub segments: Vec<SegmentRef>,
}

impl DiskScan {
    /// Whether the whole disk was seen.
    pub fn is_done(&self) -> bool {
        self.cursor >= self.blocks
    }
}

impl ScanState {
    /// Whether all disks were seen.
    pub fn is_done(&self) -> bool {
        self.disks.iter().all(DiskScan::is_done)
    }

    /// The scan of a disk.
    pub fn disk(&self, name: &str) -> Option<&DiskScan> {
        self.disks.iter().find(|disk| disk.name == name)
    }
}

/// The locked state folder.
#[derive(Debug)]
pub struct StateFolder {
    root: PathBuf,
    _lock: Flock<File>,
}

impl StateFolder {
    /// Opens the folder that `shipper protect` has made.
    ///
    /// # Errors
    ///
    /// `State`: it does not exist. `InUse`: another shipper works in it.
    pub fn open(root: &Path) -> Result<Self> {
        if !root.is_dir() {
            return Err(Error::new(
                ErrorKind::State,
                format!(
                    "State folder {} does not exist: run `shipper protect` first",
                    root.display()
                ),
            ));
        }
        Self::lock(root)
    }

    /// Makes the folder if it is not there, and opens it.
    ///
    /// # Errors
    ///
    /// It cannot be made or is in use.
    pub fn make(root: &Path) -> Result<Self> {
        make_folder(root)?;
        Self::lock(root)
    }

    fn lock(root: &Path) -> Result<Self> {
        let path = root.join("lock");
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(|error| failed("open", &path, error))?;
        let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| {
            Error::new(
                ErrorKind::InUse,
                format!(
                    "State folder {} is in use by another shipper: stop that one first",
                    root.display()
                ),
            )
            .with_source(errno)
        })?;
        Ok(Self {
            root: root.to_owned(),
            _lock: lock,
        })
    }

    /// The control socket of the shipper that works in a folder.
    pub fn socket(root: &Path) -> PathBuf {
        root.join("shipper.sock")
    }

    /// Folder of the spool.
    pub fn spool(&self) -> PathBuf {
        self.root.join("spool")
    }

    /// Folder for segments of a scan that wait for upload.
    pub fn copy(&self) -> PathBuf {
        self.root.join("copy")
    }

    /// The fingerprint table of a disk.
    pub fn table(&self, disk: &str) -> PathBuf {
        self.root.join("fingerprints").join(format!("{disk}.table"))
    }

    /// Makes the folders.
    ///
    /// # Errors
    ///
    /// One cannot be made.
    pub fn make_folders(&self) -> Result<()> {
        for name in ["spool", "copy", "fingerprints"] {
            make_folder(&self.root.join(name))?;
        }
        Ok(())
    }

    fn machine_file(&self) -> PathBuf {
        self.root.join("machine.json")
    }

    fn scan_file(&self) -> PathBuf {
        self.root.join("scan.json")
    }

    /// What `shipper protect` left; `None` if it has not been run.
    ///
    /// # Errors
    ///
    /// The file is damaged or from a newer program.
    pub fn machine(&self) -> Result<Option<MachineState>> {
        let state: Option<MachineState> = load(&self.machine_file())?;
        match state {
            Some(state) if state.version != VERSION => Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "{} has version {}, this program knows {VERSION}: use a newer one",
                    self.machine_file().display(),
                    state.version
                ),
            )),
            state => Ok(state),
        }
    }

    /// Keeps what `shipper run` needs.
    ///
    /// # Errors
    ///
    /// It cannot be written.
    pub fn save_machine(&self, state: &MachineState) -> Result<()> {
        save(&self.machine_file(), state)
    }

    /// The scan that is under way.
    ///
    /// # Errors
    ///
    /// The file is damaged.
    pub fn scan(&self) -> Result<Option<ScanState>> {
        load(&self.scan_file())
    }

    /// Keeps how far the scan is; durable when it returns.
    ///
    /// # Errors
    ///
    /// It cannot be written.
    pub fn save_scan(&self, scan: &ScanState) -> Result<()> {
        save(&self.scan_file(), scan)
    }

    /// The scan's segments are named by a recovery point, or it is given up.
    ///
    /// # Errors
    ///
    /// It cannot be removed.
    pub fn end_scan(&self) -> Result<()> {
        remove_if_present(&self.scan_file())
    }
}

fn load<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    let Some(bytes) = read_if_present(path)? else {
        return Ok(None);
    };
    serde_json::from_slice(&bytes).map(Some).map_err(|error| {
        Error::new(
            ErrorKind::Corrupt,
            format!(
                "{} is damaged: move the state folder away and run `shipper protect`; every block will be \
                 compared with the vault once",
                path.display()
            ),
        )
        .with_source(error)
    })
}

fn save<T: Serialize>(path: &Path, value: &T) -> Result<()> {
    let text = serde_json::to_vec_pretty(value).map_err(|error| {
        Error::new(
            ErrorKind::Invalid,
            format!("Cannot write {}", path.display()),
        )
        .with_source(error)
    })?;
    replace(path, &text)
}
