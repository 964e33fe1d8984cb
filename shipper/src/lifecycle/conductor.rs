//! `shipper run`: the one thread that steers a machine's protection.
//!
//! Overview: a loop over what is to be done next: find the tracker and agree with it
//! (`reconcile`), release what was published, mark disks whose blocks are all to be compared and begin
//! with those (`resync`), look at every block of them (`scan`), cut and capture when it is time or
//! somebody asks (`epoch`). Uploads run beside it.
//!
//! Order at start: state folder (locked), vault, generation, spool, base; then the uploader, which
//! goes on with what waits; then the control socket, then ready. The tracker may come later.
//!
//! Crash consistency: every step leaves durable files before it tells the tracker, and every message
//! to the tracker may be repeated; `reconcile` finds out how far both are.
//!
//! Errors: a higher generation ends the shipper; everything else is noted on the board and tried
//! again with growing pauses. Nothing here can be felt by a guest.

use std::collections::{BTreeSet, VecDeque};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, unbounded};
use tracker::control::client::ControlClient;
use tracker::extent::{Epoch, blocks_of};
use tracker::journal::reader::JournalReader;

use super::config::{Config, DiskConfig};
use super::control::{Asked, Door, Made, Reply};
use super::progress::ScanState;
use super::pruning::{Place, Pruning};
use super::rest::{Resting, Wish, thaw_at_start};
use super::resync::{Probe, WATCH_INTERVAL};
use super::state::{MachineState, StateFolder};
use crate::capture::source::DiskSource;
use crate::error::{Error, ErrorKind, Result};
use crate::segment::seal::Owner;
use crate::spool::table::Table;
use crate::spool::{Spool, folder_bytes};
use crate::status::{Board, DiskStatus, Part, Phase, Status};
use crate::upload::retry::{Stop, pauses};
use crate::upload::{Context, Job, Outcome, Uploader};
use crate::vault::manifest::Manifest;
use crate::vault::{Vault, boundary, generation};

/// Longest pause before the tracker is looked for again.
const TRACKER_PAUSE_MAX: Duration = Duration::from_secs(2);
/// Pause while the spool is over its budget.
pub(super) const BUDGET_PAUSE: Duration = Duration::from_millis(200);

/// What the conductor hears of.
pub(super) enum Event {
    Upload(Outcome),
    Asked(Asked),
    Stop,
}

/// Trouble, and which part has it.
pub(super) struct Trouble {
    pub part: Part,
    pub error: Error,
}

/// Names the part that an error belongs to.
pub(super) trait At<T> {
    fn at(self, part: Part) -> std::result::Result<T, Trouble>;
}

impl<T, E: Into<Error>> At<T> for std::result::Result<T, E> {
    fn at(self, part: Part) -> std::result::Result<T, Trouble> {
        self.map_err(|error| Trouble {
            part,
            error: error.into(),
        })
    }
}

/// A disk of the machine.
pub(super) struct Disk {
    pub config: DiskConfig,
    pub source: DiskSource,
    pub owner: Owner,
    /// Where the tracker keeps the blocks of the closed epoch.
    pub preserve_file: Option<PathBuf>,
}

/// A tracker that agrees with us.
pub(super) struct Link {
    pub client: ControlClient,
    /// In the order of the disks.
    pub readers: Vec<JournalReader>,
}

/// Everything that steering needs.
pub struct Conductor {
    pub(super) config: Config,
    pub(super) state: Arc<StateFolder>,
    pub(super) machine: MachineState,
    pub(super) vault: Vault,
    pub(super) spool: Spool,
    pub(super) board: Arc<Board>,
    pub(super) stop: Arc<Stop>,
    pub(super) disks: Vec<Disk>,
    /// `None`: what they say is not to be trusted until they are opened again.
    pub(super) tables: Option<Vec<Table>>,
    /// The newest recovery point, in the spool or in the vault: the next one follows it.
    pub(super) base: Option<Manifest>,
    /// Disks of which the base lacks segments that the vault has lost.
    pub(super) lacking: BTreeSet<String>,
    /// Disks whose blocks are all looked at, or are to be.
    pub(super) scan: ScanState,
    pub(super) probe: Probe,
    pub(super) link: Option<Link>,
    pub(super) uploader: Uploader,
    /// What an uploader is started with, and where its outcomes go.
    context: Context,
    sender: Sender<Event>,
    /// Numbers up to this one are in use in the vault, whoever has them.
    pub(super) floor: Epoch,
    pruning: Pruning,
    /// Sealed epochs that are not released, in order, and whether they are published.
    pub(super) unreleased: VecDeque<(Epoch, bool)>,
    pub(super) events: Receiver<Event>,
    /// Who wants a recovery point that has not been cut.
    pub(super) cuts: Vec<Wish>,
    /// Who waits for one that is not published.
    pub(super) waiting: Vec<(Made, Reply)>,
    /// How to bring to rest what writes.
    pub(super) resting: Resting,
    pub(super) due: Instant,
    /// When the shares are looked at again.
    watch_due: Instant,
    stopping: bool,
}

/// How `shipper run` is to run.
#[derive(Clone, Copy, Debug, Default)]
pub struct RunOptions {
    /// Make one recovery point, then end.
    pub once: bool,
}

/// Runs until `stop` is told. `ready` is called when others can talk to it. Returns the recovery
/// point that was made `once`.
///
/// # Errors
///
/// Something is missing at the start; or `Fenced`: another shipper has taken over, or this folder is not the only one of its kind.
pub fn run(
    config: Config,
    options: RunOptions,
    stop: &Arc<Stop>,
    ready: impl FnOnce(&Config),
) -> Result<Option<Epoch>> {
    let state = Arc::new(StateFolder::open(&config.state)?);
    thaw_at_start(&config);
    state.check_not_fenced()?;
    let result = run_in(&state, config, options, stop, ready);
    if let Err(error) = &result
        && error.kind() == ErrorKind::Fenced
    {
        // For good: whatever is found later, this folder knows less than it believes.
        state.save_fenced(Some(&error.chain()))?;
    }
    result
}

fn run_in(
    state: &Arc<StateFolder>,
    config: Config,
    options: RunOptions,
    stop: &Arc<Stop>,
    ready: impl FnOnce(&Config),
) -> Result<Option<Epoch>> {
    let (sender, events) = unbounded();
    let socket = StateFolder::socket(&config.state);
    let mut conductor = Conductor::start(config, Arc::clone(state), stop, &sender, events)?;
    let to_ask = sender.clone();
    let ask = move |asked| {
        let _ended = to_ask.send(Event::Asked(asked));
    };
    let door = Door::open(&socket, Arc::clone(&conductor.board), ask)?;
    let watched = Arc::clone(stop);
    let to_stop = sender.clone();
    let watcher = std::thread::Builder::new()
        .name("stop".into())
        .spawn(move || {
            while !watched.wait(Duration::from_secs(3600)) {}
            let _ended = to_stop.send(Event::Stop);
        })
        .map_err(|error| Error::io("Cannot start a thread", error))?;
    let (reply, answered) = crossbeam_channel::bounded(1);
    if options.once {
        conductor.cuts.push(Wish::new(false, reply));
    }
    ready(&conductor.config);
    let result = conductor.steer(options.once);
    stop.tell();
    drop(door);
    let _panicked = watcher.join();
    result?;
    match options.once {
        true => answered
            .try_recv()
            .unwrap_or_else(|_| Err(Stop::error()))
            .map(|made| Some(made.epoch)),
        false => Ok(None),
    }
}

impl Conductor {
    fn start(
        config: Config,
        state: Arc<StateFolder>,
        stop: &Arc<Stop>,
        sender: &Sender<Event>,
        events: Receiver<Event>,
    ) -> Result<Self> {
        let machine = state.protected()?;
        let vault = Vault::open(&config.vault, &config.access)?;
        machine.check(&config, &vault)?;
        generation::check(&vault, &config.machine, machine.generation)?;
        // Before anything is looked for in the vault.
        boundary::take_over(&vault, &config.machine, machine.generation)?;
        state.make_folders()?;
        let spool = Spool::open(&state.spool())?;
        let disks = open_disks(&config, &vault)?;
        let board = Board::new(first_status(&config, &machine, &disks));
        let board = Arc::new(board.counting(vault.store().counters(), config.prices));
        let context = Context {
            vault: vault.clone(),
            machine: config.machine.clone(),
            generation: machine.generation,
            spool: spool.clone(),
            copy_folder: state.copy(),
            board: Arc::clone(&board),
            stop: Arc::clone(stop),
        };
        let pruning = start_pruning(&config, &context, sender)?;
        let uploader = start_uploader(context.clone(), sender)?;
        let resting = Resting::start(&config, &board)?;
        let mut conductor = Self {
            due: Instant::now() + config.interval,
            resting,
            watch_due: Instant::now(),
            config,
            state,
            machine,
            vault,
            spool,
            board,
            stop: Arc::clone(stop),
            disks,
            tables: None,
            base: None,
            lacking: BTreeSet::new(),
            scan: ScanState::default(),
            probe: Probe::new(),
            link: None,
            uploader,
            context,
            sender: sender.clone(),
            pruning,
            floor: Epoch::ZERO,
            unreleased: VecDeque::new(),
            events,
            cuts: Vec::new(),
            waiting: Vec::new(),
            stopping: false,
        };
        conductor.load(None)?;
        conductor.show_base_at_start();
        Ok(conductor)
    }

    /// An uploader in place of one that has ended.
    pub(super) fn start_uploader(&self) -> Result<Uploader> {
        start_uploader(self.context.clone(), &self.sender)
    }

    fn steer(&mut self, once: bool) -> Result<()> {
        let mut growing = pauses();
        let mut pause = Duration::ZERO;
        while !self.stopping {
            self.take_events(pause)?;
            if self.stopping || (once && self.cuts.is_empty() && self.waiting.is_empty()) {
                break;
            }
            match self.step() {
                Ok(next) => {
                    growing = pauses();
                    pause = next;
                }
                Err(trouble) => {
                    self.meet(trouble)?;
                    let limit = TRACKER_PAUSE_MAX;
                    pause = growing.next().unwrap_or(limit).min(limit);
                }
            }
        }
        Ok(())
    }

    /// Waits for an event, at most so long, and takes all that are there.
    fn take_events(&mut self, pause: Duration) -> Result<()> {
        let mut next = match pause.is_zero() {
            true => self.events.try_recv().ok(),
            false => self.events.recv_timeout(pause).ok(),
        };
        while let Some(event) = next {
            match event {
                Event::Stop => self.stopping = true,
                Event::Asked(Asked::Cut(quiesce, reply)) => self.cut_asked(quiesce, reply),
                Event::Asked(Asked::Resync(request, reply)) => {
                    let _left = reply.send(self.resync_asked(&request));
                }
                Event::Upload(Outcome::Published(epoch)) => self.published(epoch),
                Event::Upload(Outcome::Taken(epoch)) => self.number_taken(epoch)?,
                Event::Upload(Outcome::Failed(error)) => return Err(error),
                Event::Asked(Asked::Prune(reply)) => self.pruning.ask(reply),
            }
            next = self.events.try_recv().ok();
        }
        Ok(())
    }

    fn step(&mut self) -> std::result::Result<Duration, Trouble> {
        self.thaw_left();
        self.open_tables().at(Part::Spool)?;
        self.connect()?;
        self.release()?;
        self.board.note(Part::Tracker, None);
        self.begin_marked()?;
        if self.scan.is_running() {
            return self.scan_some();
        }
        let now = Instant::now();
        // What was scanned is a recovery point only with the cut that follows.
        let is_due = !self.cuts.is_empty() || self.scan.is_complete() || now >= self.next_due();
        if is_due || now >= self.watch_due {
            self.watch_due = now + WATCH_INTERVAL;
            let marked = self.scan.has_marked(false);
            self.watch_shares()?;
            if self.scan.has_marked(false) != marked {
                return Ok(Duration::ZERO);
            }
        }
        if self.is_draining() {
            self.enter(Phase::Waiting);
            return Ok(BUDGET_PAUSE);
        }
        if !is_due {
            self.enter(Phase::Waiting);
            return Ok((self.next_due() - now).min(WATCH_INTERVAL));
        }
        if self.is_over_budget()? {
            return Ok(BUDGET_PAUSE);
        }
        self.due = now + self.config.interval;
        self.take_quiesce_due(now);
        self.make_point()?;
        Ok(Duration::ZERO)
    }

    /// Notes trouble, and tells those who wait for a cut. The tracker is asked anew.
    fn meet(&mut self, trouble: Trouble) -> Result<()> {
        let Trouble { part, error } = trouble;
        if matches!(error.kind(), ErrorKind::Fenced | ErrorKind::Stopped) {
            self.stopping = error.kind() == ErrorKind::Stopped;
            return if self.stopping { Ok(()) } else { Err(error) };
        }
        self.board.note(part, Some(&error));
        self.link = None;
        self.enter(Phase::Connecting);
        self.tell_late(&error);
        Ok(())
    }

    /// Tells those who have waited for a recovery point for long enough what keeps it from being made. A tracker
    /// that has just been restarted is found in time.
    pub(super) fn tell_late(&mut self, error: &Error) {
        let (late, still): (Vec<_>, Vec<_>) = self.cuts.drain(..).partition(Wish::is_late);
        self.cuts = still;
        for wish in late {
            let _left = wish
                .reply
                .send(Err(Error::new(error.kind(), error.chain())));
        }
    }

    pub(super) fn enter(&self, phase: Phase) {
        self.board.update(|status| status.phase = phase);
    }

    fn published(&mut self, epoch: Epoch) {
        for (sealed, published) in &mut self.unreleased {
            *published |= *sealed == epoch;
        }
        self.board.note(Part::Vault, None);
        self.board.update(|status| {
            status.newest_point = Some(epoch);
            status.points += 1;
        });
        self.show_application_point(epoch);
        let mut still = Vec::new();
        for (wanted, reply) in self.waiting.drain(..) {
            if wanted.epoch <= epoch {
                let _left = reply.send(Ok(wanted));
            } else {
                still.push((wanted, reply));
            }
        }
        self.waiting = still;
    }

    /// Releases published epochs: the fingerprints are synced, then the tracker forgets the changes,
    /// then the spool.
    fn release(&mut self) -> std::result::Result<(), Trouble> {
        while let Some(&(epoch, true)) = self.unreleased.front() {
            for table in self.tables.iter().flatten() {
                table.sync().at(Part::Spool)?;
            }
            if let Some(link) = &mut self.link {
                // A tracker that lost its journal knows of no such epoch; it has nothing to forget.
                if link.client.epochs().at(Part::Tracker)?.sealed >= epoch {
                    link.client.commit(epoch).at(Part::Tracker)?;
                }
            }
            // By this an old copy of the folder is known as one.
            self.state.save_published(epoch).at(Part::Spool)?;
            self.spool.remove(epoch).at(Part::Spool)?;
            self.unreleased.pop_front();
        }
        self.show_spool().at(Part::Spool)
    }

    /// Whether more waits for upload than may; the board shows it.
    pub(super) fn is_over_budget(&mut self) -> std::result::Result<bool, Trouble> {
        self.show_spool().at(Part::Spool)?;
        let status = self.board.status();
        let over = status.spool_bytes >= self.config.spool_budget_bytes;
        let error = Error::new(
            ErrorKind::Full,
            format!(
                "{} MiB wait for upload, as much as the budget allows: no recovery points until the vault \
                 takes some",
                status.spool_bytes >> 20
            ),
        );
        self.board.note(Part::Spool, over.then_some(&error));
        Ok(over)
    }

    fn show_spool(&self) -> Result<()> {
        let bytes = self.spool.bytes()? + folder_bytes(&self.state.copy())?;
        let epochs = self.unreleased.len() as u64;
        self.board.update(|status| {
            status.spool_bytes = bytes;
            status.spool_epochs = epochs;
        });
        Ok(())
    }

    /// The highest epoch that anything here is named by.
    pub(super) fn highest(&self) -> Epoch {
        let base = self.base.as_ref().map(|base| base.epoch);
        let known = base.max(self.scan.highest());
        self.floor.max(known.unwrap_or(Epoch::ZERO))
    }

    /// Queues a sealed epoch for upload.
    pub(super) fn queue_epoch(&mut self, epoch: Epoch) {
        self.unreleased.push_back((epoch, false));
        self.uploader.queue(Job::Epoch(epoch));
    }
}

fn start_uploader(context: Context, sender: &Sender<Event>) -> Result<Uploader> {
    let tell = sender.clone();
    Uploader::start(context, move |outcome| {
        let _ended = tell.send(Event::Upload(outcome));
    })
}

fn start_pruning(config: &Config, context: &Context, sender: &Sender<Event>) -> Result<Pruning> {
    let place = config.retention.clone().map(|retention| Place {
        vault: context.vault.clone(),
        machine: context.machine.clone(),
        generation: context.generation,
        spool: context.spool.clone(),
        retention,
        board: Arc::clone(&context.board),
        stop: Arc::clone(&context.stop),
    });
    let tell = sender.clone();
    Pruning::start(place, move |error| {
        let _ended = tell.send(Event::Upload(Outcome::Failed(error)));
    })
}

fn open_disks(config: &Config, vault: &Vault) -> Result<Vec<Disk>> {
    let open = |disk: &DiskConfig| {
        Ok(Disk {
            config: disk.clone(),
            source: DiskSource::open(&disk.path)?,
            owner: vault.owner(&config.machine, &disk.name),
            preserve_file: None,
        })
    };
    config.disks.iter().map(open).collect()
}

fn first_status(config: &Config, machine: &MachineState, disks: &[Disk]) -> Status {
    let disk_status = |disk: &Disk| DiskStatus {
        name: disk.config.name.clone(),
        size_bytes: disk.source.size_bytes(),
        blocks: blocks_of(disk.source.size_bytes()),
        ..DiskStatus::default()
    };
    Status {
        machine: config.machine.clone(),
        vault: config.vault.clone(),
        generation: machine.generation,
        spool_budget_bytes: config.spool_budget_bytes,
        resync_share_percent: config.resync_share_percent,
        disks: disks.iter().map(disk_status).collect(),
        ..Status::default()
    }
}
