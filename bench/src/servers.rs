//! The contestants: NBD servers on a fresh image each, started and stopped.

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::Result;
use crate::settings::Settings;

/// Time that a server has until it listens, and until it has ended.
const DEADLINE: Duration = Duration::from_secs(20);
/// Time between two attempts to connect.
const ATTEMPT_INTERVAL: Duration = Duration::from_millis(10);
/// The image is filled in pieces of this many bytes.
const FILL_BYTES: usize = 1 << 20;

/// A server in one configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ServerKind {
    /// The tracker, tracking.
    Tracker,
    /// The tracker without a journal.
    TrackerPlain,
    /// `nbdkit file`.
    Nbdkit,
    /// `nbdkit file` once more: what differs between the two is noise.
    NbdkitAgain,
}

impl ServerKind {
    /// All of them, in the order of the table.
    pub const CONTESTANTS: [Self; 4] = [
        Self::Tracker,
        Self::TrackerPlain,
        Self::Nbdkit,
        Self::NbdkitAgain,
    ];

    /// Name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tracker => "tracker",
            Self::TrackerPlain => "tracker --no-journal",
            Self::Nbdkit => "nbdkit file",
            Self::NbdkitAgain => "nbdkit file (again)",
        }
    }

    fn command(self, settings: &Settings, image: &Path, socket: &Path) -> Command {
        match self {
            Self::Tracker | Self::TrackerPlain => {
                let mut command = Command::new(&settings.tracker);
                command.arg("serve").arg("--disk").arg(image);
                command.arg("--socket").arg(socket);
                if self == Self::TrackerPlain {
                    command.arg("--no-journal");
                }
                command
            }
            Self::Nbdkit | Self::NbdkitAgain => {
                let mut command = Command::new("nbdkit");
                command.args(["--foreground", "--unix"]).arg(socket);
                command.arg("file").arg(image);
                command
            }
        }
    }
}

/// A server that runs. Dropping it kills it and removes its files.
pub struct Running {
    child: Child,
    socket: PathBuf,
    folder: TempDir,
}

impl Running {
    /// Makes an image whose blocks are all allocated, and serves it.
    ///
    /// # Errors
    ///
    /// The image cannot be made, or the server does not listen in time.
    pub fn start(kind: ServerKind, settings: &Settings, folder: &Path) -> Result<Self> {
        let folder = tempfile::Builder::new()
            .prefix("tidemark-bench-")
            .tempdir_in(folder)?;
        let image = folder.path().join("disk.img");
        fill(&image, settings.size_bytes())?;
        let socket = folder.path().join("nbd.sock");
        let log = File::create(folder.path().join("log"))?;
        let child = kind
            .command(settings, &image, &socket)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .map_err(|error| format!("cannot start {}: {error}", kind.name()))?;
        let mut running = Self {
            child,
            socket,
            folder,
        };
        running.await_socket(kind)?;
        Ok(running)
    }

    fn await_socket(&mut self, kind: ServerKind) -> Result<()> {
        let deadline = Instant::now() + DEADLINE;
        while UnixStream::connect(&self.socket).is_err() {
            let ended = self.child.try_wait()?.is_some();
            if ended || Instant::now() > deadline {
                let log = std::fs::read_to_string(self.folder.path().join("log"));
                return Err(format!(
                    "{} does not listen: {}",
                    kind.name(),
                    log.unwrap_or_default()
                )
                .into());
            }
            std::thread::sleep(ATTEMPT_INTERVAL);
        }
        Ok(())
    }

    /// Process number of the server.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Its unix socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// A folder for other files of this run.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Ends the server in good order.
    ///
    /// # Errors
    ///
    /// It does not end in time.
    pub fn stop(mut self) -> Result<()> {
        kill(Pid::from_raw(self.child.id() as i32), Signal::SIGTERM)?;
        let deadline = Instant::now() + DEADLINE;
        while self.child.try_wait()?.is_none() {
            if Instant::now() > deadline {
                return Err("a server does not end on SIGTERM".into());
            }
            std::thread::sleep(ATTEMPT_INTERVAL);
        }
        Ok(())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _gone = self.child.kill();
        let _reaped = self.child.wait();
    }
}

/// Allocation on first write would be measured too, and differently on each file system.
fn fill(image: &Path, size_bytes: u64) -> Result<()> {
    use std::io::Write;
    let mut file = File::create_new(image)?;
    let piece = vec![0x5a; FILL_BYTES];
    let mut left = size_bytes;
    while left > 0 {
        let step = left.min(FILL_BYTES as u64);
        file.write_all(piece.get(..step as usize).unwrap_or_default())?;
        left -= step;
    }
    // Write-back of the filling must not run into the measurement.
    file.sync_all()?;
    Ok(())
}
