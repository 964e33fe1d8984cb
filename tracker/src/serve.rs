//! `tracker serve`: opens the disks of a machine, serves them, and closes cleanly.
//!
//! Order at start: disks (locked), journals (recovered), workers, sockets, ready. A client can
//! connect only when everything behind the socket works.
//!
//! Order at a clean stop (SIGTERM, SIGINT): sockets, so that nobody new comes; workers, which
//! finish and answer what is in flight; disks, synced, and their last times kept; journals, marked
//! clean after a sync. SIGKILL at any moment of this leaves journals that are recovered as after a
//! crash.

mod house;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::sys::signal::{SigSet, Signal, kill};
use nix::unistd::Pid;
use xxhash_rust::xxh3::xxh3_64;

use crate::control::server::{self, Context};
use crate::disk::{Disk, DiskKind};
use crate::engine::{Engine, EngineChoice};
use crate::epoch::{DiskSpec, Keepers, Machine, MachineOptions};
use crate::error::{Error, ErrorKind, Result};
use crate::journal::Found;
use crate::journal::format::REGION_BYTES;
use crate::nbd::handshake::Export;
use crate::nbd::listener::{Listener, Plaintext, Stream};
use crate::nbd::tls::{Encryption, Tls, TlsFiles};
use crate::preserve::area::BlockSource;
use crate::systemd::{self, Activated};
use house::House;

/// Connections at once, those that still negotiate included.
const CONNECTIONS_MAX: usize = 256;
/// Time between two looks at the journals.
const MAINTENANCE_INTERVAL: Duration = Duration::from_millis(100);
/// Time that the relays of TLS have after the workers, to deliver the last replies.
const RELAYS_DEADLINE: Duration = Duration::from_secs(2);

/// A disk as it was named on the command line.
#[derive(Clone, Debug)]
pub struct DiskArgument {
    /// Name of the export.
    pub name: String,
    /// Image or device.
    pub path: PathBuf,
}

/// TLS as it was asked for on the command line.
#[derive(Clone, Debug)]
pub struct TlsOptions {
    /// Certificate, key and authorities.
    pub files: TlsFiles,
    /// Clients over TCP must use it.
    pub required: bool,
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
    /// TLS for TCP.
    pub tls: Option<TlsOptions>,
    /// Where TCP may go without TLS.
    pub plaintext: Plaintext,
    /// Control socket.
    pub control: PathBuf,
    /// Worker threads.
    pub workers: usize,
    /// What carries out their I/O.
    pub engine: EngineChoice,
    /// Size of a new journal's ring in bytes.
    pub ring_bytes: u64,
    /// Bytes of each disk that can be armed at once: so much is compared after a power cut, at most.
    pub intent_bytes: u64,
    /// Folder for the journals of devices.
    pub journal_folder: PathBuf,
    /// Folder for preserve files; beside the journals without it.
    pub preserve_folder: Option<PathBuf>,
    /// Bytes of blocks that are kept of each disk while an epoch is captured, at most.
    pub preserve_budget_bytes: u64,
    /// Keep every block while an epoch is captured, and export the disks as they were.
    pub frozen_views: bool,
    /// Refuse writes.
    pub read_only: bool,
    /// Leave the page cache out.
    pub direct: bool,
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

    let encryption = open_encryption(options)?;
    let disks = open_disks(options)?;
    let machine = open_machine(options, &disks)?;
    let exports = disks
        .iter()
        .map(|disk| export_of(disk, options.tracking))
        .collect();
    let engine = Arc::new(Engine::start(
        options.engine,
        options.workers,
        &disks,
        &machine,
    )?);
    let house = Arc::new(House {
        exports,
        machine: Arc::clone(&machine),
        encryption,
        engine,
        negotiating: AtomicUsize::new(0),
        relays: Arc::default(),
    });

    let (control, listeners) = open_sockets(options, activated)?;
    let description = describe(options, &control, &listeners);
    let mut keepers = Keepers::start(&machine, &sources(&disks))?;
    let upkeep = start_upkeep(&machine, &house.engine, &disks)?;
    let control = start_control(control, &machine, &house.engine, disks.clone())?;
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
    let maintained = upkeep.end();
    // Writes that wait for their regions are answered before the keepers end.
    let stopped = house.engine.stop().and(keepers.end());
    if failed && stopped.is_ok() {
        return Err(Error::new(
            ErrorKind::State,
            "A worker ended early: restart the tracker",
        ));
    }
    let deadline = Instant::now() + RELAYS_DEADLINE;
    let closed = stopped
        .and(maintained)
        .and_then(|()| close(&machine, &disks));
    // They deliver while the journals are closed.
    if !house.relays.wait(deadline) {
        tracing::warn!("A client over TLS did not take its last replies");
    }
    closed
}

/// Syncs the disks, so that the journals do not say of anything that it has not changed while a power
/// cut may still undo it, and closes the journals.
fn close(machine: &Machine, disks: &[Arc<Disk>]) -> Result<()> {
    let mut synced = Ok(());
    for (index, disk) in disks.iter().enumerate() {
        if machine.journal_path(index).is_none() {
            continue;
        }
        // One that failed before has lost what it could not write, whatever this one says.
        let failed_before = disk.sync_failed();
        let result = disk.sync();
        if failed_before || result.is_err() {
            machine.mark_suspect(index, "a sync of it failed")?;
        }
        synced = synced.and(result);
        if let Some(seen) = disk.moment()? {
            machine.keep_time(index, seen);
        }
    }
    synced.and(machine.close())
}

fn open_encryption(options: &ServeOptions) -> Result<Encryption> {
    let Some(tls) = &options.tls else {
        return Ok(Encryption::Off);
    };
    let loaded = Tls::load(&tls.files)?;
    Ok(if tls.required {
        Encryption::Required(loaded)
    } else {
        Encryption::Allowed(loaded)
    })
}

fn open_disks(options: &ServeOptions) -> Result<Vec<Arc<Disk>>> {
    options
        .disks
        .iter()
        .map(|argument| {
            let disk = Disk::open(&argument.name, &argument.path, options.read_only)?;
            Ok(Arc::new(match options.direct {
                true => disk.past_page_cache()?,
                false => disk,
            }))
        })
        .collect()
}

fn open_machine(options: &ServeOptions, disks: &[Arc<Disk>]) -> Result<Arc<Machine>> {
    let spec = |disk: &Arc<Disk>| {
        Ok(DiskSpec {
            name: disk.name().to_owned(),
            // Whoever is told of them may stand in another folder.
            image: absolute(disk.path()),
            journal: absolute(&journal_path(options, disk)),
            size_bytes: disk.size_bytes(),
            identity: disk.identity(),
            seen: disk.moment()?,
            preserve: Some(absolute(&preserve_path(options, disk))),
        })
    };
    let (machine, reports) = Machine::open(
        disks.iter().map(spec).collect::<Result<_>>()?,
        &MachineOptions {
            workers: options.workers,
            ring_bytes: options.ring_bytes,
            intent_regions: (options.intent_bytes / u64::from(REGION_BYTES)) as u32,
            rebuild: options.rebuild,
            tracking: options.tracking,
            preserve_budget_bytes: options.preserve_budget_bytes,
            frozen_views: options.frozen_views,
        },
    )?;
    for report in reports {
        match (&report.found, report.suspicion) {
            (Found::Lost(_), _) | (_, Some(_)) => tracing::warn!("{report}"),
            _ => tracing::info!("{report}"),
        }
    }
    Ok(Arc::new(machine))
}

/// From where blocks of closed epochs are copied.
fn sources(disks: &[Arc<Disk>]) -> Vec<Arc<dyn BlockSource>> {
    let source = |disk: &Arc<Disk>| Arc::clone(disk) as Arc<dyn BlockSource>;
    disks.iter().map(source).collect()
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

/// The preserve file lies beside the journal, or in the folder for such; there its name tells machines apart that have
/// disks of one name.
fn preserve_path(options: &ServeOptions, disk: &Disk) -> PathBuf {
    let journal = journal_path(options, disk);
    let Some(folder) = &options.preserve_folder else {
        return journal.with_extension("hrp");
    };
    let owner = xxh3_64(absolute(&journal).as_os_str().as_encoded_bytes());
    folder.join(format!("{}-{owner:016x}.hrp", disk.name()))
}

fn export_of(disk: &Disk, tracked: bool) -> Export {
    Export {
        name: disk.name().to_owned(),
        size: disk.size(),
        read_only: disk.read_only(),
        alignment: disk.alignment(),
        tracked,
        is_view: false,
    }
}

/// The control socket and those for NBD.
fn open_sockets(options: &ServeOptions, activated: Activated) -> Result<(Listener, Vec<Listener>)> {
    let control = match activated.control {
        Some(control) => control,
        None => Listener::unix(&options.control, 0o600)?,
    };
    let mut listeners = activated.nbd;
    for listener in &listeners {
        listener.require_allowed(options.plaintext)?;
    }
    if let Some(path) = &options.socket {
        listeners.push(Listener::unix(path, 0o660)?);
    }
    if let Some(address) = options.listen {
        listeners.push(Listener::tcp(address, options.plaintext)?);
    }
    Ok((control, listeners))
}

fn describe(options: &ServeOptions, control: &Listener, listeners: &[Listener]) -> String {
    let tracking = if options.tracking { "on" } else { "off" };
    let tls = match &options.tls {
        Some(tls) if tls.required => " (TLS required)",
        Some(_) => " (TLS allowed)",
        None => "",
    };
    let sockets: Vec<String> = listeners
        .iter()
        .map(|listener| format!("{listener}{}", if listener.is_tcp() { tls } else { "" }))
        .collect();
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

fn start_control(
    listener: Listener,
    machine: &Arc<Machine>,
    engine: &Arc<Engine>,
    disks: Vec<Arc<Disk>>,
) -> Result<Door> {
    let listener = Arc::new(listener);
    let thread_listener = Arc::clone(&listener);
    let context = Arc::new(Context {
        machine: Arc::clone(machine),
        engine: Arc::clone(engine),
        disks,
        resizing: Mutex::new(()),
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

/// Threads that work while the disks are served, until they are told to end.
struct Upkeep {
    stopping: Arc<AtomicBool>,
    threads: Vec<std::thread::JoinHandle<Result<()>>>,
}

impl Upkeep {
    /// Returns the first error.
    fn end(self) -> Result<()> {
        self.stopping.store(true, Ordering::Release);
        let mut result = Ok(());
        for thread in self.threads {
            thread.thread().unpark();
            let ended = thread
                .join()
                .unwrap_or_else(|_| Err(Error::new(ErrorKind::State, "The maintenance panicked")));
            result = result.and(ended);
        }
        result
    }
}

fn start_upkeep(
    machine: &Arc<Machine>,
    engine: &Arc<Engine>,
    disks: &[Arc<Disk>],
) -> Result<Upkeep> {
    let stopping = Arc::default();
    let threads = vec![
        start_maintenance(machine, engine, &stopping)?,
        start_looking(machine, disks, &stopping)?,
    ];
    Ok(Upkeep { stopping, threads })
}

/// Keeps the times of the disks in their journals. A thread of its own, because the maintenance may
/// stand in a sync for longer than a disk may be newer than the last look at it.
fn start_looking(
    machine: &Arc<Machine>,
    disks: &[Arc<Disk>],
    stopping: &Arc<AtomicBool>,
) -> Result<std::thread::JoinHandle<Result<()>>> {
    let (machine, disks) = (Arc::clone(machine), disks.to_vec());
    let stopping = Arc::clone(stopping);
    spawn("times", move || {
        while !stopping.load(Ordering::Acquire) {
            for (index, disk) in disks.iter().enumerate() {
                // One that cannot be looked at is compared after a kill.
                if let Ok(Some(seen)) = disk.moment() {
                    machine.keep_time(index, seen);
                }
            }
            std::thread::park_timeout(MAINTENANCE_INTERVAL);
        }
        Ok(())
    })
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
