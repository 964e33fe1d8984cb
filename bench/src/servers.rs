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
use crate::{qmp, wire};

/// Time that a server has until it listens, and until it has ended.
const DEADLINE: Duration = Duration::from_secs(20);
/// Time between two looks at a server that starts or ends.
const LOOK_INTERVAL: Duration = Duration::from_millis(5);
/// The same where the time of the start is what counts.
const RESTART_LOOK_INTERVAL: Duration = Duration::from_millis(1);
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
    /// The tracker with room for 128 GiB in its intent log; measured by --cost
    #[value(skip)]
    TrackerCovered,
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
            Self::TrackerCovered => "tracker, cap 128 GiB",
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
            Self::Tracker
            | Self::TrackerAgain
            | Self::TrackerCovered
            | Self::TrackerPlain
            | Self::TrackerThreads => None,
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
            Self::Tracker
            | Self::TrackerAgain
            | Self::TrackerCovered
            | Self::TrackerPlain
            | Self::TrackerThreads => {
                command.arg("serve").arg("--disk").arg(image);
                command.arg("--socket").arg(socket);
                if direct {
                    command.arg("--direct");
                }
                match self {
                    Self::TrackerCovered => {
                        command.args(["--intent-cap", "128GiB"]);
                    }
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
const BOOT_FILE: &str = "boot_id";

/// By this file the tracker tells one boot of the machine from another: with another one it takes what
/// happened for a power cut.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

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

/// Where the image of a run comes from.
#[derive(Clone, Copy, Debug)]
pub enum Image<'a> {
    /// A new one of so many bytes, whose blocks are all allocated.
    Filled(u64),
    /// A new one of so many bytes without data.
    Sparse(u64),
    /// This one on the same file system, which stays as the run leaves it.
    Existing(&'a Path),
}

/// What is started, and on what.
#[derive(Clone, Copy, Debug)]
pub struct Setup<'a> {
    /// The server.
    pub kind: ServerKind,
    /// The tracker program.
    pub tracker: &'a Path,
    /// Where a folder is made for all files of the run.
    pub folder: &'a Path,
    /// Past the page cache.
    pub direct: bool,
    /// The image.
    pub image: Image<'a>,
    /// More arguments.
    pub arguments: &'a [&'a str],
}

/// A server that runs. Dropping it kills it and removes its files.
pub struct Running {
    kind: ServerKind,
    tracker: PathBuf,
    arguments: Vec<String>,
    direct: bool,
    process: Process,
    size_bytes: u64,
    folder: TempDir,
}

impl Running {
    /// Makes or takes an image and serves it.
    ///
    /// # Errors
    ///
    /// The image cannot be had, or the server does not listen in time.
    pub fn start(setup: &Setup) -> Result<Self> {
        let kind = setup.kind;
        let folder = tempfile::Builder::new()
            .prefix("tidemark-bench-")
            .tempdir_in(setup.folder)?;
        let size_bytes = provide(&folder.path().join(IMAGE), setup.image)?;
        let mut running = Self {
            kind,
            tracker: setup.tracker.to_owned(),
            arguments: setup.arguments.iter().map(|&a| a.to_owned()).collect(),
            direct: setup.direct,
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
        running.launch(None)?;
        if kind == ServerKind::NbdServer {
            running.follow_into_background()?;
        }
        running.await_socket()?;
        if kind == ServerKind::QemuBitmap {
            qmp::add_bitmap(&running.folder().join(MONITOR), "disk")?;
        }
        Ok(running)
    }

    /// Starts the process, where one is given in another boot of the machine: see [`BOOT_ID`].
    fn launch(&mut self, boot: Option<u64>) -> Result<()> {
        let mut command = self.kind.command(&self.tracker, self.folder(), self.direct);
        command.args(&self.arguments);
        if let Some(boot) = boot {
            let file = self.folder().join(BOOT_FILE);
            std::fs::write(&file, format!("{boot:08x}-0000-4000-8000-000000000000\n"))?;
            command = in_another_boot(&file, &command);
        }
        let log = File::create(self.folder().join(LOG))?;
        let child = command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .map_err(|error| format!("cannot start {}: {error}", self.kind.name()))?;
        self.process = Process::Child(child);
        Ok(())
    }

    /// Kills the server in the middle of whatever it does.
    ///
    /// # Errors
    ///
    /// It cannot be killed.
    pub fn kill(&mut self) -> Result<()> {
        if let Process::Child(child) = &mut self.process {
            child.kill()?;
            child.wait()?;
        }
        Ok(())
    }

    /// Starts it again on the same files, in the boot of this number or in the true one; the time
    /// until it has answered a read.
    ///
    /// # Errors
    ///
    /// It does not start, or does not answer in time.
    pub fn start_again(&mut self, boot: Option<u64>) -> Result<Duration> {
        let begin = Instant::now();
        self.launch(boot)?;
        loop {
            if let Ok(mut stream) = UnixStream::connect(self.socket()) {
                stream.set_read_timeout(Some(DEADLINE))?;
                wire::negotiate(&mut stream, self.export())?;
                wire::read(&mut stream, 0, &mut [0; pattern::BLOCK_BYTES])?;
                return Ok(begin.elapsed());
            }
            if self.has_ended()? || begin.elapsed() > DEADLINE {
                return Err(self.complaint("does not start again"));
            }
            std::thread::sleep(RESTART_LOOK_INTERVAL);
        }
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

    /// Which server it is.
    pub fn kind(&self) -> ServerKind {
        self.kind
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

    /// The control socket, where it is the tracker.
    pub fn control(&self) -> PathBuf {
        self.folder().join(format!("{SOCKET}.control"))
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

/// The command in a mount namespace in which a file stands for the kernel's boot id. The number of the
/// process stays the same.
fn in_another_boot(file: &Path, command: &Command) -> Command {
    let script = format!("mount --bind \"$0\" {BOOT_ID} && exec \"$@\"");
    let mut wrapped = Command::new("unshare");
    wrapped
        .args(["--mount", "--propagation", "private", "sh", "-c", &script])
        .arg(file)
        .arg(command.get_program())
        .args(command.get_args());
    wrapped
}

/// Puts the image in its place, and returns its size.
fn provide(place: &Path, image: Image) -> Result<u64> {
    match image {
        Image::Filled(size_bytes) => {
            fill(place, size_bytes)?;
            Ok(size_bytes)
        }
        Image::Sparse(size_bytes) => {
            File::create_new(place)?.set_len(size_bytes)?;
            Ok(size_bytes)
        }
        // By another name, so that its journal goes with the folder.
        Image::Existing(path) => {
            std::fs::hard_link(path, place)?;
            Ok(std::fs::metadata(path)?.len())
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_finds_itself_in_another_boot() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("left out: mount namespaces need root");
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("boot_id");
        std::fs::write(&file, "another\n").unwrap();
        let before = std::fs::read(BOOT_ID).unwrap();
        let mut command = Command::new("cat");
        command.arg(BOOT_ID);
        let output = in_another_boot(&file, &command).output().unwrap();
        assert_eq!(output.stdout, b"another\n", "{output:?}");
        assert_eq!(
            std::fs::read(BOOT_ID).unwrap(),
            before,
            "it is seen outside"
        );
    }
}
