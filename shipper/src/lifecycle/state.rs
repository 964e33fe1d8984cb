//! The state folder of a machine: which generation this shipper holds, and how far scans are.
//!
//! One process at a time works in it: the folder is locked as long as [`StateFolder`] lives.

use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tracker::extent::Epoch;

use super::config::Config;
use super::progress::ScanState;
use crate::error::{Error, ErrorKind, Result};
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

/// What was published from a state folder, by which an old copy of it is known.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct PublishedState {
    through: Epoch,
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

    /// Forgets the fingerprints of all disks: the next start reads them from the vault.
    ///
    /// # Errors
    ///
    /// They cannot be removed.
    pub fn forget_fingerprints(&self) -> Result<()> {
        let folder = self.root.join("fingerprints");
        match std::fs::remove_dir_all(&folder) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(failed("remove", &folder, error));
            }
            _ => {}
        }
        make_folder(&folder)
    }

    fn machine_file(&self) -> PathBuf {
        self.root.join("machine.json")
    }

    fn fenced_file(&self) -> PathBuf {
        self.root.join("fenced.json")
    }

    /// Fails if the shipper of this folder was fenced.
    ///
    /// # Errors
    ///
    /// `Fenced`, with what was found then; or the mark cannot be read.
    pub fn check_not_fenced(&self) -> Result<()> {
        match load::<String>(&self.fenced_file())? {
            None => Ok(()),
            Some(why) => Err(Error::new(ErrorKind::Fenced, why)),
        }
    }

    /// Marks the folder as one of a shipper that was fenced, or takes the mark away.
    ///
    /// # Errors
    ///
    /// It cannot be written.
    pub fn save_fenced(&self, why: Option<&str>) -> Result<()> {
        match why {
            Some(why) => save(&self.fenced_file(), &why),
            None => remove_if_present(&self.fenced_file()),
        }
    }

    fn published_file(&self) -> PathBuf {
        self.root.join("published.json")
    }

    /// The newest recovery point that was published from here and is not in the spool any more; `None`: not known.
    ///
    /// # Errors
    ///
    /// The file is damaged.
    pub fn published(&self) -> Result<Option<Epoch>> {
        let published: Option<PublishedState> = load(&self.published_file())?;
        Ok(published.map(|published| published.through))
    }

    /// Keeps up to which recovery point all are published; durable when it returns.
    ///
    /// # Errors
    ///
    /// It cannot be written.
    pub fn save_published(&self, through: Epoch) -> Result<()> {
        save(&self.published_file(), &PublishedState { through })
    }

    fn scan_file(&self) -> PathBuf {
        self.root.join("scan.json")
    }

    /// What `shipper protect` left.
    ///
    /// # Errors
    ///
    /// `State`: it has not been run. Otherwise as for [`Self::machine`].
    pub fn protected(&self) -> Result<MachineState> {
        self.machine()?.ok_or_else(|| {
            let shown = self.root.display();
            let what = format!(
                "State folder {shown} is of no machine that is protected: run `shipper protect` first"
            );
            Error::new(ErrorKind::State, what)
        })
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

    /// The scans that are marked, under way or cancelled.
    ///
    /// # Errors
    ///
    /// The file is damaged.
    pub fn scan(&self) -> Result<ScanState> {
        Ok(load(&self.scan_file())?.unwrap_or_default())
    }

    /// Keeps how far the scans are; durable when it returns.
    ///
    /// # Errors
    ///
    /// It cannot be written.
    pub fn save_scan(&self, scan: &ScanState) -> Result<()> {
        if scan.disks.is_empty() {
            remove_if_present(&self.scan_file())
        } else {
            save(&self.scan_file(), scan)
        }
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
