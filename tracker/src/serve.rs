//! `tracker serve`: opens the disks of a machine, serves them, and closes cleanly.
//!
//! Order at start: disks (locked), journals (recovered), workers, sockets, ready. A client can
//! connect only when everything behind the socket works.
//!
//! Order at a clean stop (SIGTERM, SIGINT): sockets, so that nobody new comes; workers, which
//! finish and answer what is in flight; journals, marked clean after a sync. SIGKILL at any moment
//! of this leaves journals that are recovered as after a crash.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use nix::sys::signal::{SigSet, Signal, kill};
use nix::unistd::Pid;

use crate::control::server::{self, Context};
use crate::disk::{Disk, DiskKind};
use crate::engine::Engine;
use crate::epoch::{DiskSpec, Machine, MachineOptions};
use crate::error::{Error, ErrorKind, Result};
use crate::nbd::handshake::{Export, negotiate};
use crate::nbd::listener::{Listener, Stream};
use crate::systemd::{self, Activated};

/// Connections at once, those that still negotiate included.
const CONNECTIONS_MAX: usize = 256;
/// Time between two looks at the journals.
const MAINTENANCE_INTERVAL: Duration = Duration::from_millis(100);

/// A disk as it was named on the command line.
#[derive(Clone, Debug)]
pub struct DiskArgument {
    /// Name of the export.
    pub name: String,
    /// Image or device.
    pub path: PathBuf,
}

/// Checked arguments of `tracker serve`.
#[derive(Clone, Debug)]
pub struct ServeOptions {
    /// The disks of the machine.
    pub disks: Vec<DiskArgument>,
    /// Unix socket for NBD; `None` where the service manager listens for us.
    pub socket: Option<PathBuf>,
    /// TCP address for NBD.
    pub listen: Option<SocketAddr>,
    /// Control socket.
    pub control: PathBuf,
    /// Worker threads.
    pub workers: usize,
    /// Size of a new journal's ring in bytes.
    pub ring_bytes: u64,
    /// Folder for the journals of devices.
    pub journal_folder: PathBuf,
    /// Refuse writes.
    pub read_only: bool,
    /// Keep journals.
    pub tracking: bool,
    /// Set the journals aside and check every block.
    pub rebuild: bool,
}

/// Serves until SIGTERM or SIGINT, on the sockets of the options and on those handed over.
///
/// # Errors
///
/// Something cannot be opened or bound, or a worker or journal fails.
pub fn serve(options: &ServeOptions, activated: Activated) -> Result<()> {
    // Blocked before the first thread starts, so that only this one takes them.
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    signals
        .thread_block()
        .map_err(|errno| Error::io("Cannot block signals", errno))?;

    let disks = open_disks(options)?;
    let machine = open_machine(options, &disks)?;
    let exports = disks
        .iter()
        .map(|disk| export_of(disk, options.tracking))
        .collect();
    let engine = Arc::new(Engine::start(options.workers, disks, Arc::clone(&machine))?);
    let house = Arc::new(House {
        exports,
        engine,
        negotiating: AtomicUsize::new(0),
    });

    let (control, listeners) = open_sockets(options, activated)?;
    let description = describe(options, &control, &listeners);
    let stopping = Arc::new(AtomicBool::new(false));
    let maintenance = start_maintenance(&machine, &house.engine, &stopping)?;
    let control = start_control(control, &machine, &house.engine)?;
    let mut doors = Vec::new();
    for listener in listeners {
        doors.push(start_door(listener, &house)?);
    }
    announce(&description);

    signals
        .wait()
        .map_err(|errno| Error::io("Cannot wait for signals", errno))?;
    systemd::stopping();
    let failed = house.engine.has_failed();
    for door in doors.into_iter().chain([control]) {
        door.close();
    }
    stopping.store(true, Ordering::Release);
    maintenance.thread().unpark();
    let maintained = maintenance
        .join()
        .unwrap_or_else(|_| Err(Error::new(ErrorKind::State, "The maintenance panicked")));
    let stopped = house.engine.stop();
    if failed && stopped.is_ok() {
        return Err(Error::new(
            ErrorKind::State,
            "A worker ended early: restart the tracker",
        ));
    }
    stopped.and(maintained).and_then(|()| machine.close())
}

fn open_disks(options: &ServeOptions) -> Result<Vec<Arc<Disk>>> {
    options
        .disks
        .iter()
        .map(|disk| {
            Ok(Arc::new(Disk::open(
                &disk.name,
                &disk.path,
                options.read_only,
            )?))
        })
        .collect()
}

fn open_machine(options: &ServeOptions, disks: &[Arc<Disk>]) -> Result<Arc<Machine>> {
    let specs = disks
        .iter()
        .map(|disk| DiskSpec {
            name: disk.name().to_owned(),
            // Whoever is told of them may stand in another folder.
            image: absolute(disk.path()),
            journal: absolute(&journal_path(options, disk)),
            size_bytes: disk.size_bytes(),
            identity: disk.identity(),
        })
        .collect();
    let (machine, reports) = Machine::open(
        specs,
        &MachineOptions {
            workers: options.workers,
            ring_bytes: options.ring_bytes,
            rebuild: options.rebuild,
            tracking: options.tracking,
        },
    )?;
    for report in reports {
        tracing::info!("{report}");
    }
    Ok(Arc::new(machine))
}

fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

/// The journal lies beside an image; beside a device node there is no place that lasts.
fn journal_path(options: &ServeOptions, disk: &Disk) -> PathBuf {
    match disk.kind() {
        DiskKind::File => {
            let mut path = disk.path().as_os_str().to_owned();
            path.push(".hrl");
            path.into()
        }
        DiskKind::Device => options.journal_folder.join(format!("{}.hrl", disk.name())),
    }
}

fn export_of(disk: &Disk, tracked: bool) -> Export {
    Export {
        name: disk.name().to_owned(),
        size_bytes: disk.size_bytes(),
        read_only: disk.read_only(),
        tracked,
    }
}

/// The control socket and those for NBD.
fn open_sockets(options: &ServeOptions, activated: Activated) -> Result<(Listener, Vec<Listener>)> {
    let control = match activated.control {
        Some(control) => control,
        None => Listener::unix(&options.control, 0o600)?,
    };
    let mut listeners = activated.nbd;
    if let Some(path) = &options.socket {
        listeners.push(Listener::unix(path, 0o660)?);
    }
    if let Some(address) = options.listen {
        listeners.push(Listener::tcp(address)?);
    }
    Ok((control, listeners))
}

fn describe(options: &ServeOptions, control: &Listener, listeners: &[Listener]) -> String {
    let tracking = if options.tracking { "on" } else { "off" };
    let sockets: Vec<String> = listeners.iter().map(Listener::to_string).collect();
    let count = options.disks.len();
    let plural = if count == 1 { "" } else { "s" };
    format!(
        "{count} disk{plural} on {}, control {control}, tracking {tracking}",
        sockets.join(" and "),
    )
}

fn announce(description: &str) {
    systemd::ready(description);
    // Whoever started this may have closed the pipe; serving goes on.
    let _closed = std::io::Write::write_all(
        &mut std::io::stdout(),
        format!("Ready: {description}\n").as_bytes(),
    );
}

/// What an accepted connection needs.
struct House {
    exports: Vec<Export>,
    engine: Arc<Engine>,
    negotiating: AtomicUsize,
}

impl House {
    fn receive(self: &Arc<Self>, stream: Stream) {
        let connected = self.engine.status().connections as usize;
        if self.negotiating.fetch_add(1, Ordering::AcqRel) + connected >= CONNECTIONS_MAX {
            self.negotiating.fetch_sub(1, Ordering::AcqRel);
            tracing::warn!("More than {CONNECTIONS_MAX} connections: one was turned away");
            return;
        }
        let house = Arc::clone(self);
        let spawned = std::thread::Builder::new()
            .name("negotiation".into())
            .spawn(move || {
                house.negotiate(stream);
                house.negotiating.fetch_sub(1, Ordering::AcqRel);
            });
        if let Err(error) = spawned {
            self.negotiating.fetch_sub(1, Ordering::AcqRel);
            tracing::warn!("Cannot start a thread for a connection: {error}");
        }
    }

    fn negotiate(&self, stream: Stream) {
        let chosen = negotiate(&stream, &self.exports).and_then(|chosen| {
            // The deadline was the negotiation's; from here on the worker waits as it likes.
            stream.set_read_timeout(None)?;
            stream.set_write_timeout(None)?;
            Ok(chosen)
        });
        match chosen {
            Ok(Some(session)) => {
                if let Err(error) = self.engine.serve(stream.into(), session) {
                    tracing::error!("{}", error.chain());
                }
            }
            Ok(None) => {}
            Err(error) => tracing::debug!("A negotiation failed: {error}"),
        }
    }
}

/// A thread that accepts, and the socket by which it is ended.
struct Door {
    listener: Arc<Listener>,
    thread: std::thread::JoinHandle<()>,
}

impl Door {
    /// Makes `accept` fail, waits for the thread, and removes the socket.
    fn close(self) {
        self.listener.close();
        let _panicked = self.thread.join();
    }
}

fn start_door(listener: Listener, house: &Arc<House>) -> Result<Door> {
    let listener = Arc::new(listener);
    let (thread_listener, house) = (Arc::clone(&listener), Arc::clone(house));
    spawn("accept", move || {
        loop {
            match thread_listener.accept() {
                Ok(stream) => house.receive(stream),
                Err(error) => match error.raw_os_error() {
                    // A peer that left before it was accepted, or descriptors that ran out.
                    Some(libc::ECONNABORTED | libc::EINTR) => {}
                    Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM) => {
                        tracing::warn!("Cannot accept a connection: {error}");
                        std::thread::park_timeout(MAINTENANCE_INTERVAL);
                    }
                    _ => return,
                },
            }
        }
    })
    .map(|thread| Door { listener, thread })
}

fn start_control(listener: Listener, machine: &Arc<Machine>, engine: &Arc<Engine>) -> Result<Door> {
    let listener = Arc::new(listener);
    let thread_listener = Arc::clone(&listener);
    let context = Arc::new(Context {
        machine: Arc::clone(machine),
        engine: Arc::clone(engine),
    });
    spawn("control", move || {
        let accept = || match thread_listener.accept()? {
            Stream::Unix(stream) => Ok(stream),
            // Not reached: the control socket is a unix socket by its construction.
            Stream::Tcp(_) => Err(std::io::ErrorKind::Unsupported.into()),
        };
        server::serve(&accept, &context);
    })
    .map(|thread| Door { listener, thread })
}

/// Folds and trims the journals while the guest writes, and ends the tracker if a worker dies.
fn start_maintenance(
    machine: &Arc<Machine>,
    engine: &Arc<Engine>,
    stopping: &Arc<AtomicBool>,
) -> Result<std::thread::JoinHandle<Result<()>>> {
    let (machine, engine) = (Arc::clone(machine), Arc::clone(engine));
    let stopping = Arc::clone(stopping);
    spawn("maintenance", move || {
        let mut reported = false;
        while !stopping.load(Ordering::Acquire) {
            match machine.maintain() {
                Ok(()) => reported = false,
                // Coverage is kept without folding; the guest goes on, and so do the attempts.
                Err(error) if !reported => {
                    reported = true;
                    tracing::error!("{}", error.chain());
                }
                Err(_) => {}
            }
            if engine.has_failed() {
                kill(Pid::this(), Signal::SIGTERM)
                    .map_err(|errno| Error::io("Cannot end the tracker", errno))?;
                return Ok(());
            }
            std::thread::park_timeout(MAINTENANCE_INTERVAL);
        }
        Ok(())
    })
}

fn spawn<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<std::thread::JoinHandle<T>> {
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(work)
        .map_err(|error| Error::io(format!("Cannot start the {name} thread"), error))
}
