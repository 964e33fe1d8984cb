//! A computer: its storage, its boots, and the moment when its power goes.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use fuser::{BackgroundSession, Config, Session, SessionACL};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use tempfile::TempDir;

use super::file_system::PowerFs;
use super::image::Fate;
use super::state::Storehouse;

/// Where the kernel tells the number of its boot.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// A computer, which exists in the mount namespace of the thread that it was made for.
pub struct Machine {
    folder: TempDir,
    house: Arc<Storehouse>,
    session: Option<BackgroundSession>,
    boots: u128,
}

/// Hands a computer to a thread of its own, in a mount namespace of its own: what is started there
/// sees the storage and the boot id, and nothing is left of either when all of it has ended.
///
/// Says on standard error why it cannot be had, if so, and does not call then: mounting takes root.
///
/// # Panics
///
/// `work` panics.
pub fn with_machine<T: Send + 'static>(
    work: impl FnOnce(&mut Machine) -> T + Send + 'static,
) -> Option<T> {
    let thread = std::thread::spawn(|| match Machine::new() {
        Ok(mut machine) => Some(work(&mut machine)),
        Err(why) => {
            eprintln!("left out: {why}");
            None
        }
    });
    thread.join().unwrap_or_else(|panic| resume_unwind(panic))
}

impl Machine {
    fn new() -> Result<Self, String> {
        if !nix::unistd::geteuid().is_root() {
            return Err("power cuts need root, for mounting".to_owned());
        }
        unshare(CloneFlags::CLONE_NEWNS)
            .map_err(|errno| format!("no mount namespace can be made: {errno}"))?;
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(None::<&str>, "/", None::<&str>, private, None::<&str>)
            .map_err(|errno| format!("mounts cannot be made private: {errno}"))?;
        let folder = tempfile::Builder::new()
            .prefix("tidemark-power-")
            .tempdir()
            .map_err(|error| format!("no temporary folder: {error}"))?;
        let mut machine = Self {
            folder,
            house: Arc::default(),
            session: None,
            boots: 0,
        };
        machine
            .boot()
            .map_err(|error| format!("no boot id: {error}"))?;
        let from = Some(machine.boot_file());
        mount(
            from.as_deref(),
            BOOT_ID,
            None::<&str>,
            MsFlags::MS_BIND,
            None::<&str>,
        )
        .map_err(|errno| format!("the boot id cannot be covered: {errno}"))?;
        fs::create_dir(machine.storage()).map_err(|error| format!("no folder: {error}"))?;
        machine
            .mount()
            .map_err(|error| format!("FUSE cannot be mounted: {error}"))?;
        Ok(machine)
    }

    /// The folder with the storage.
    pub fn storage(&self) -> PathBuf {
        self.folder.path().join("storage")
    }

    fn boot_file(&self) -> PathBuf {
        self.folder.path().join("boot_id")
    }

    /// Another boot, with another number.
    fn boot(&mut self) -> io::Result<()> {
        self.boots += 1;
        // As the kernel writes it. Kept in one file, which covers the kernel's.
        let hex = format!("{:032x}", 0x4000_8000_u128 << 64 | self.boots);
        let (a, b, c, d, e) = (
            &hex[..8],
            &hex[8..12],
            &hex[12..16],
            &hex[16..20],
            &hex[20..],
        );
        fs::write(self.boot_file(), format!("{a}-{b}-{c}-{d}-{e}\n"))
    }

    fn mount(&mut self) -> io::Result<()> {
        let device = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/fuse")?;
        let options = format!(
            "fd={},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions",
            device.as_raw_fd()
        );
        let flags = MsFlags::MS_NODEV | MsFlags::MS_NOSUID | MsFlags::MS_NOATIME;
        mount(
            Some("power"),
            &self.storage(),
            Some("fuse"),
            flags,
            Some(options.as_str()),
        )?;
        let storage = PowerFs(Arc::clone(&self.house));
        let config = Config::default();
        let device = OwnedFd::from(device);
        let session = Session::from_fd(storage, device, SessionACL::All, config)?;
        self.session = Some(session.spawn()?);
        Ok(())
    }

    /// From now on the storage does nothing any more, and answers nobody.
    pub fn freeze(&self) {
        self.house.freeze();
    }

    /// Freezes at a request to come, after so many that change something or make it durable.
    pub fn freeze_after(&self, changes: u64) {
        self.house.freeze_after(changes);
    }

    /// Waits until the storage is frozen; false if it is not within the time.
    pub fn await_frozen(&self, limit: Duration) -> bool {
        self.house.await_frozen(limit)
    }

    /// Requests so far that changed something or made it durable.
    pub fn changes(&self) -> u64 {
        self.house.changes()
    }

    /// Has the kernel write back what is stored to mappings of a file, as it may at any time.
    ///
    /// # Panics
    ///
    /// The file cannot be opened.
    pub fn write_back(&self, path: &Path) {
        // Every close does so in FUSE, and none of them syncs.
        drop(File::open(path).expect("the file can be opened"));
    }

    /// Cuts the power of the storage. Processes that wait for it can end after that.
    ///
    /// # Panics
    ///
    /// The mount cannot be torn off.
    pub fn power_off(&mut self) {
        self.house.freeze();
        let how = MntFlags::MNT_FORCE | MntFlags::MNT_DETACH;
        umount2(&self.storage(), how).expect("the storage is unmounted");
        if let Some(session) = self.session.take() {
            // It ends with an error where the connection is cut in a read.
            let _cut = session.join();
        }
    }

    /// Powers up again, with another boot id: what was not synced has met its fate.
    ///
    /// # Panics
    ///
    /// The storage cannot be mounted.
    pub fn power_on(&mut self, mut fate: Fate<'_>) {
        assert!(self.session.is_none(), "the power is on");
        self.house.cut(&mut fate);
        self.boot().expect("another boot id");
        self.mount().expect("the storage is mounted");
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if self.session.is_some() {
            self.power_off();
        }
        let _in_use = umount2(BOOT_ID, MntFlags::MNT_DETACH);
    }
}
