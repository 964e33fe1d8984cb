//! The shipper's part: first copies as a user makes them, and restoring.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::contestant::Contestant;
use super::image::DiskImage;
use super::timed::{Spent, Work, bytes_below};
use crate::Result;
use crate::servers::{Image, Running, ServerKind, Setup};
use crate::settings::Settings;

const MACHINE: &str = "bench";

/// A vault in a folder.
#[derive(Debug)]
pub struct VaultFolder<'a> {
    program: &'a Path,
    who: Contestant,
    work: Work<'a>,
    folder: PathBuf,
}

impl<'a> VaultFolder<'a> {
    /// A new one with the first copy of an image, and what that took. An older one goes.
    ///
    /// # Errors
    ///
    /// The tracker or the shipper fails.
    pub fn copy(
        settings: &'a Settings,
        who: Contestant,
        work: Work<'a>,
        image: &DiskImage,
    ) -> Result<(Self, Spent)> {
        let folder = work.0.join(who.folder());
        if folder.exists() {
            std::fs::remove_dir_all(&folder)?;
        }
        std::fs::create_dir(&folder)?;
        let program = settings.shipper.as_deref().ok_or("--shipper is missing")?;
        let vault = Self {
            program,
            who,
            work,
            folder,
        };
        let server = serve(settings, work, image)?;
        vault.configure(&server)?;
        work.run(&mut vault.init())?;
        work.run(&mut vault.configured("protect"))?;
        work.forget_caches()?;
        let spent = work.run(vault.configured("run").arg("--once"))?;
        server.stop()?;
        Ok((vault, spent))
    }

    /// Restores the newest point to a new file.
    ///
    /// # Errors
    ///
    /// The shipper fails.
    pub fn restore(&self, target: &Path) -> Result<Spent> {
        let mut command = Command::new(self.program);
        command.args([
            "restore",
            "--machine",
            MACHINE,
            "--point",
            "latest",
            "--vault",
        ]);
        command.arg(self.url()).arg("--to").arg(target);
        if let Some(file) = self.key_file() {
            command.arg("--key-file").arg(file);
        }
        self.work.run(&mut command)
    }

    /// Bytes of its files.
    ///
    /// # Errors
    ///
    /// A folder cannot be read.
    pub fn bytes(&self) -> Result<u64> {
        bytes_below(&self.folder.join("vault"))
    }

    fn url(&self) -> String {
        format!("file://{}", self.folder.join("vault").display())
    }

    fn key_file(&self) -> Option<PathBuf> {
        (self.who == Contestant::ShipperEncrypted).then(|| self.folder.join("vault.key"))
    }

    fn init(&self) -> Command {
        let mut init = Command::new(self.program);
        init.arg("init").arg(self.url());
        match self.key_file() {
            Some(file) => init.arg("--key-file").arg(file).arg("--generate-key-file"),
            None => init.arg("--unencrypted"),
        };
        init
    }

    fn configured(&self, what: &str) -> Command {
        let mut command = Command::new(self.program);
        command
            .arg(what)
            .arg("--config")
            .arg(self.folder.join("shipper.toml"));
        command
    }

    fn configure(&self, server: &Running) -> Result<()> {
        let disk = server.image();
        let key_file = self.key_file().map(|file| format!("key_file = {file:?}\n"));
        let text = format!(
            "machine = {MACHINE:?}\ntracker = {:?}\nvault = {:?}\n{}state = {:?}\ninterval = \"24h\"\n\
             [[disk]]\nname = {:?}\npath = {disk:?}\n",
            server.control(),
            self.url(),
            key_file.unwrap_or_default(),
            self.folder.join("state"),
            disk.file_name().unwrap_or_default(),
        );
        Ok(std::fs::write(self.folder.join("shipper.toml"), text)?)
    }
}

/// A tracker before an image, with a new journal.
///
/// # Errors
///
/// It does not start.
pub fn serve(settings: &Settings, work: Work<'_>, image: &DiskImage) -> Result<Running> {
    Running::start(&Setup {
        kind: ServerKind::Tracker,
        tracker: &settings.tracker,
        folder: work.0,
        direct: settings.direct,
        image: Image::Existing(image.path()),
        arguments: &[],
    })
}
