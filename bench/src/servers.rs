//! The contestants: NBD servers on a fresh image each, started and stopped.

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use clap::ValueEnum;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use serde::Serialize;
use tempfile::TempDir;

use crate::Result;
use crate::pattern::{self, Version};
use crate::qmp;

/// Time that a server has until it listens, and until it has ended.
const DEADLINE: Duration = Duration::from_secs(20);
/// Time between two looks at a server that starts or ends.
const LOOK_INTERVAL: Duration = Duration::from_millis(5);
/// The image is filled in pieces of this many bytes.
const FILL_BYTES: u64 = 1 << 20;

/// A server in one configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ServerKind {
    /// The tracker, tracking
    Tracker,
    /// The tracker once more: what differs between the two is noise
    TrackerAgain,
    /// The tracker without a journal
    TrackerPlain,
    /// The tracker with threads in place of io_uring; measured when it is asked for
    TrackerThreads,
    /// nbdkit with its file plugin
    Nbdkit,
    /// nbd-server, the reference implementation
    NbdServer,
    /// qemu-nbd on a raw file
    QemuNbd,
    /// qemu-storage-daemon with a dirty bitmap of 4 KiB granularity: the peer that tracks
    QemuBitmap,
    /// No server: fio's io_uring engine on the raw file
    RawFile,
}

impl ServerKind {
    /// Name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tracker => "tracker",
            Self::TrackerAgain => "tracker (again)",
            Self::TrackerPlain => "tracker --no-journal",
            Self::TrackerThreads => "tracker, threads",
            Self::Nbdkit => "nbdkit file",
            Self::NbdServer => "nbd-server",
            Self::QemuNbd => "qemu-nbd",
            Self::QemuBitmap => "qemu with bitmap",
            Self::RawFile => "raw file, no server",
        }
    }

    /// The program that must be installed; the tracker is built, not installed.
    pub fn program(self) -> Option<&'static str> {
        match self {
            Self::Tracker | Self::TrackerAgain | Self::TrackerPlain | Self::TrackerThreads => None,
            Self::Nbdkit => Some("nbdkit"),
            Self::NbdServer => Some("nbd-server"),
            Self::QemuNbd => Some("qemu-nbd"),
            Self::QemuBitmap => Some("qemu-storage-daemon"),
            Self::RawFile => Some("fio"),
        }
    }

    /// Whether it is a server of someone else.
    pub fn is_peer(self) -> bool {
        self.program().is_some() && self != Self::RawFile
    }

    /// Whether it can leave the page cache out.
    pub fn does_direct(self) -> bool {
        !matches!(self, Self::Nbdkit | Self::NbdServer)
    }

    /// The export that clients ask for.
    fn export(self) -> &'static str {
        // nbd-server serves no export without a name.
        if self == Self::NbdServer { "disk" } else { "" }
    }

    /// The command line; the image, the socket and all other files lie in the folder.
    fn command(self, tracker: &Path, folder: &Path, direct: bool) -> Command {
        let (image, socket) = (folder.join(IMAGE), folder.join(SOCKET));
        let mut command = Command::new(self.program().map_or(tracker, Path::new));
        match self {
            Self::Tracker | Self::TrackerAgain | Self::TrackerPlain | Self::TrackerThreads => {
                command.arg("serve").arg("--disk").arg(image);
                command.arg("--socket").arg(socket);
                if direct {
                    command.arg("--direct");
                }
                match self {
                    Self::TrackerPlain => {
                        command.arg("--no-journal");
                    }
                    Self::TrackerThreads => {
                        command.args(["--engine", "threads"]);
                    }
                    _ => {}
                }
            }
            Self::Nbdkit => {
                command.args(["--foreground", "--unix"]).arg(socket);
                command.arg("file").arg(image);
            }
            Self::NbdServer => {
                command.arg("-C").arg(folder.join(CONFIGURATION));
                command.arg("-p").arg(folder.join(PID_FILE));
            }
            Self::QemuNbd => {
                command.args(["--format=raw", "--persistent"]);
                command.args(match direct {
                    true => &["--cache=none", "--aio=io_uring"][..],
                    false => &["--cache=writeback"],
                });
                command.arg("--shared=16").arg("--socket").arg(socket);
                command.arg(image);
            }
            Self::QemuBitmap => {
                let (image, socket) = (image.display(), socket.display());
                let monitor = folder.join(MONITOR);
                let monitor = monitor.display();
                let cache = match direct {
                    true => ",cache.direct=on,aio=io_uring",
                    false => "",
                };
                command.args([
                    "--blockdev",
                    &format!("driver=file,node-name=disk,filename={image}{cache}"),
                    "--chardev",
                    &format!("socket,id=monitor,path={monitor},server=on,wait=off"),
                    "--monitor",
                    "chardev=monitor",
                    "--nbd-server",
                    &format!("addr.type=unix,addr.path={socket},max-connections=0"),
                    "--export",
                    "type=nbd,id=export,node-name=disk,name=,writable=on",
                ]);
            }
            Self::RawFile => {}
        }
        command
    }
}

/// Names of the files of a run.
const IMAGE: &str = "disk.img";
const SOCKET: &str = "nbd.sock";
const MONITOR: &str = "monitor.sock";
const CONFIGURATION: &str = "nbd-server.conf";
const PID_FILE: &str = "pid";
const LOG: &str = "log";

/// Whether a program is found where commands are looked for.
pub fn is_installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(program).is_file())
}

/// How a server's process was started, and so how it is ended.
enum Process {
    /// A child.
    Child(Child),
    /// It has put itself into the background.
    Daemon(Pid),
    /// There is none: the file itself is measured.
    None,
}

/// A server that runs. Dropping it kills it and removes its files.
pub struct Running {
    kind: ServerKind,
    direct: bool,
    process: Process,
    size_bytes: u64,
    folder: TempDir,
}

impl Running {
    /// Makes an image whose blocks are all allocated, and serves it, past the page cache if `direct`.
    ///
    /// # Errors
    ///
    /// The image cannot be made, or the server does not listen in time.
    pub fn start(
        kind: ServerKind,
        tracker: &Path,
        (folder, direct): (&Path, bool),
        size_bytes: u64,
    ) -> Result<Self> {
        let folder = tempfile::Builder::new()
            .prefix("tidemark-bench-")
            .tempdir_in(folder)?;
        fill(&folder.path().join(IMAGE), size_bytes)?;
        let mut running = Self {
            kind,
            direct,
            process: Process::None,
            size_bytes,
            folder,
        };
        if kind == ServerKind::RawFile {
            return Ok(running);
        }
        if kind == ServerKind::NbdServer {
            running.configure_nbd_server()?;
        }
        let log = File::create(running.folder().join(LOG))?;
        let child = kind
            .command(tracker, running.folder(), direct)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .map_err(|error| format!("cannot start {}: {error}", kind.name()))?;
        running.process = Process::Child(child);
        if kind == ServerKind::NbdServer {
            running.follow_into_background()?;
        }
        running.await_socket()?;
        if kind == ServerKind::QemuBitmap {
            qmp::add_bitmap(&running.folder().join(MONITOR), "disk")?;
        }
        Ok(running)
    }

    /// It listens on TCP besides, whatever it is told, so it gets a port that is free.
    fn configure_nbd_server(&self) -> Result<()> {
        let port = std::net::TcpListener::bind("127.0.0.1:0")?
            .local_addr()?
            .port();
        let text = format!(
            "[generic]\nunixsock = {}\nlistenaddr = 127.0.0.1\nport = {port}\n\
             [disk]\nexportname = {}\nfilesize = {}\nflush = true\nfua = true\n",
            self.socket().display(),
            self.image().display(),
            self.size_bytes
        );
        std::fs::write(self.folder().join(CONFIGURATION), text)?;
        Ok(())
    }

    /// Takes a daemon over. It becomes a child of this process, which is a subreaper.
    fn follow_into_background(&mut self) -> Result<()> {
        if let Process::Child(child) = &mut self.process {
            child.wait()?;
        }
        let deadline = Instant::now() + DEADLINE;
        while Instant::now() < deadline {
            let text = std::fs::read_to_string(self.folder().join(PID_FILE)).unwrap_or_default();
            if let Ok(pid) = text.trim().parse() {
                self.process = Process::Daemon(Pid::from_raw(pid));
                return Ok(());
            }
            std::thread::sleep(LOOK_INTERVAL);
        }
        Err(self.complaint("does not start"))
    }

    fn await_socket(&mut self) -> Result<()> {
        let deadline = Instant::now() + DEADLINE;
        while UnixStream::connect(self.socket()).is_err() {
            if self.has_ended()? || Instant::now() > deadline {
                return Err(self.complaint("does not listen"));
            }
            std::thread::sleep(LOOK_INTERVAL);
        }
        Ok(())
    }

    fn complaint(&self, what: &str) -> Box<dyn std::error::Error> {
        let log = std::fs::read_to_string(self.folder().join(LOG)).unwrap_or_default();
        format!("{} {what}: {log}", self.kind.name()).into()
    }

    fn has_ended(&mut self) -> Result<bool> {
        Ok(match &mut self.process {
            Process::Child(child) => child.try_wait()?.is_some(),
            Process::Daemon(pid) => !matches!(
                waitpid(*pid, Some(WaitPidFlag::WNOHANG)),
                Ok(WaitStatus::StillAlive)
            ),
            Process::None => true,
        })
    }

    /// Process number of the server, if there is one.
    pub fn pid(&self) -> Option<u32> {
        match &self.process {
            Process::Child(child) => Some(child.id()),
            Process::Daemon(pid) => u32::try_from(pid.as_raw()).ok(),
            Process::None => None,
        }
    }

    /// Whether there is a server before the image.
    pub fn is_served(&self) -> bool {
        self.kind != ServerKind::RawFile
    }

    /// Whether the page cache is left out.
    pub fn is_direct(&self) -> bool {
        self.direct
    }

    /// Its unix socket.
    pub fn socket(&self) -> PathBuf {
        self.folder().join(SOCKET)
    }

    /// The name of its export.
    pub fn export(&self) -> &'static str {
        self.kind.export()
    }

    /// Its address.
    pub fn uri(&self) -> String {
        let socket = self.socket();
        format!("nbd+unix:///{}?socket={}", self.export(), socket.display())
    }

    /// The image.
    pub fn image(&self) -> PathBuf {
        self.folder().join(IMAGE)
    }

    /// Bytes of the image.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
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
        let Some(pid) = self.pid() else { return Ok(()) };
        kill(Pid::from_raw(i32::try_from(pid)?), Signal::SIGTERM)?;
        let deadline = Instant::now() + DEADLINE;
        while !self.has_ended()? {
            if Instant::now() > deadline {
                return Err(self.complaint("does not end on SIGTERM"));
            }
            std::thread::sleep(LOOK_INTERVAL);
        }
        if matches!(self.process, Process::Daemon(_)) {
            reap_orphans();
        }
        self.process = Process::None;
        Ok(())
    }
}

/// The children of a daemon that has ended come to this process, too.
fn reap_orphans() {
    while let Ok(status) = waitpid(None, Some(WaitPidFlag::WNOHANG))
        && status != WaitStatus::StillAlive
    {}
}

impl Drop for Running {
    fn drop(&mut self) {
        match &mut self.process {
            Process::Child(child) => {
                let _gone = child.kill();
                let _reaped = child.wait();
            }
            Process::Daemon(pid) => {
                let _gone = kill(*pid, Signal::SIGKILL);
                let _reaped = waitpid(*pid, None);
            }
            Process::None => {}
        }
    }
}

/// Allocation on first write would be measured too, and differently on each file system.
fn fill(image: &Path, size_bytes: u64) -> Result<()> {
    use std::io::Write;
    let mut file = File::create_new(image)?;
    let mut piece = vec![0; FILL_BYTES as usize];
    let mut offset = 0;
    while offset < size_bytes {
        let step = (size_bytes - offset).min(FILL_BYTES);
        piece.truncate(step as usize);
        pattern::fill(&mut piece, offset, Version::Old);
        file.write_all(&piece)?;
        offset += step;
    }
    // Write-back of the filling must not run into the measurement.
    file.sync_all()?;
    Ok(())
}
