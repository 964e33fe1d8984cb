//! One world: a machine, its storage, its guest and its shipper, from a seed.
//!
//! Every call of the tracker is a step. It may go down between two steps, and at each place and each sync
//! inside of one: what there is at that moment is kept, the step runs to its end, and what came after the
//! moment is thrown away. While the tracker is at work on one thing, the guest and the other threads of
//! the tracker go on at its places.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use super::guest::{self, Guest};
use super::shipper::{Checked, DRAIN, Request, Shipper};
use super::storage::{Down, Frame, Rng, Storage, journal_path};
use super::{Break, Mode, Violation};
use crate::epoch::{DiskSpec, Keep, Machine, MachineOptions};
use crate::extent::Epoch;
use crate::failpoint::{Event, Place, failing, set_boot, set_canary, watching_all};
use crate::journal::format::{INTENT_OFFSET, INTENT_PAGES_RANGE, PAGE_BYTES, Superblock};
use crate::journal::intent::page::reconstruct;
use crate::journal::state::EpochState;
use crate::journal::{Found, RecoveryReport};

/// Recoveries that may be cut off one after the other.
const NESTED_MAX: u32 = 3;
/// Steps until everything has come to rest at the end.
const REST_MAX: usize = 3000;

/// What many worlds came to.
#[derive(Clone, Debug, Default)]
pub struct Tally(pub BTreeMap<&'static str, u64>);

impl Tally {
    pub fn add(&mut self, what: &'static str, count: u64) {
        *self.0.entry(what).or_default() += count;
    }

    pub fn of(&self, what: &str) -> u64 {
        self.0.get(what).copied().unwrap_or(0)
    }

    pub fn merge(&mut self, other: &Self) {
        other
            .0
            .iter()
            .for_each(|(what, count)| self.add(what, *count));
    }
}

/// A moment inside of a step.
struct Moment {
    frame: Frame,
    guest: Guest,
    /// A journal could not be written durably, and said so.
    unguarded: bool,
}

/// What the tracker does in a step, which decides what may come in between.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Work {
    /// Nothing else is done meanwhile.
    Alone,
    Guest,
    /// It holds no lock that arming or syncing needs.
    Sync,
    Arm,
    Other,
}

/// When a step ends before its time, and what is seen of the storage.
struct Fate {
    /// Events until the machine goes down.
    left: Option<u64>,
    moment: Option<Moment>,
    storage: Rc<RefCell<Storage>>,
    guest: Rc<RefCell<Guest>>,
    machine: Option<Rc<Machine>>,
}

impl Fate {
    fn tell(&mut self, event: &Event) {
        if let Some(left) = &mut self.left {
            *left = left.saturating_sub(1);
            if *left == 0 && self.moment.is_none() {
                self.moment = Some(self.freeze());
            }
        }
        let mut storage = self.storage.borrow_mut();
        match event {
            Event::Durable(inode, bytes) => storage.made_durable(*inode, bytes.clone()),
            Event::Reached(_) => storage.drift(),
        }
    }

    fn freeze(&self) -> Moment {
        Moment {
            frame: self.storage.borrow_mut().freeze(),
            guest: self.guest.borrow().clone(),
            unguarded: self.machine.as_deref().is_some_and(is_unguarded),
        }
    }
}

/// What happens during a step.
struct Watch {
    rng: Rng,
    work: Work,
    faulty: bool,
    fate: Rc<RefCell<Fate>>,
    guest: Rc<RefCell<Guest>>,
    machine: Option<Rc<Machine>>,
}

impl Watch {
    fn tell(&mut self, event: &Event) {
        self.fate.borrow_mut().tell(event);
        if let Event::Reached(place) = event {
            self.interrupt(*place);
        }
    }

    /// Others come in between.
    fn interrupt(&mut self, place: Place) {
        let Some(machine) = self.machine.clone() else {
            return;
        };
        let waits = place == Place::CutAfterAdvanceBeforeUpdate;
        let syncs = matches!(
            place,
            Place::SyncAfterEraBeforeStores | Place::SyncAfterDurableBeforeMark
        ) && self.work == Work::Sync;
        // A superblock by which slots of the ring will be free is not durable yet.
        let frees = matches!(
            place,
            Place::UpdateAfterPublishBeforeSync | Place::FoldAfterPublishBeforeSync
        );
        let often = match self.work {
            Work::Alone => return,
            _ if waits => 1,
            _ if syncs => 2,
            Work::Guest => 40,
            Work::Arm => 3,
            _ => 8,
        };
        if !self.rng.once_in(often) {
            return;
        }
        let fate = Rc::clone(&self.fate);
        // This is looked at as well.
        let tell = move |event| fate.borrow_mut().tell(&event);
        watching_all(tell, || match self.rng.below(4) {
            _ if waits => self.finish_writes(&machine),
            _ if syncs => self.arm_meanwhile(&machine),
            _ if frees && self.rng.once_in(2) => {
                (0..3).for_each(|_| guest::burst(&self.guest, &machine));
            }
            0 | 1 => guest::write(&self.guest, &machine),
            2 => self.guest.borrow_mut().go_on(&machine),
            _ => self.other_threads(place, &machine),
        });
    }

    /// The ring is being synced, and regions are armed.
    fn arm_meanwhile(&mut self, machine: &Machine) {
        for _ in 0..1 + self.rng.below(3) {
            guest::write(&self.guest, machine);
        }
        for disk in &machine.disks {
            disk.journal.arm_now();
        }
        self.guest.borrow_mut().go_on_all(machine);
    }

    fn other_threads(&mut self, place: Place, machine: &Machine) {
        let disk = self.rng.index(machine.disks.len());
        let journal = &machine.disks[disk].journal;
        match self.work {
            // These hold the mutex of what is published, which only a failure needs.
            Work::Other if !self.faulty && !replaces(place) => {
                // One syncs at a time.
                let syncs = place == Place::SyncAfterStoresBeforeDurable;
                if syncs || self.rng.once_in(2) {
                    journal.arm_now();
                } else if journal.sync_now().is_err() {
                    broken("a sync fails that nothing lets fail".to_owned());
                }
            }
            _ => {}
        }
    }

    /// While a cut waits, the writes of its epoch complete.
    fn finish_writes(&mut self, machine: &Machine) {
        if self.rng.once_in(8) {
            return;
        }
        for _ in 0..4 {
            self.guest.borrow_mut().go_on_all(machine);
            for disk in &machine.disks {
                disk.journal.arm_now();
                let _goes_on_unguarded = disk.journal.sync_now();
            }
        }
        self.guest.borrow_mut().go_on_all(machine);
    }
}

fn replaces(place: Place) -> bool {
    matches!(
        place,
        Place::ReplaceAfterBothBeforeCopy
            | Place::ReplaceAfterCopyBeforeRename
            | Place::ReplaceAfterRenameBeforeSwitch
            | Place::ReplaceAfterSwitchBeforeFolder
            | Place::IntentAfterEvictionBeforePlan
            | Place::IntentAfterPlanBeforeWrite
            | Place::IntentAfterWriteBeforeDurable
            | Place::IntentAfterArmBeforeNext
    )
}

fn is_unguarded(machine: &Machine) -> bool {
    machine.disks.iter().any(|disk| disk.journal.is_unsafe())
}

/// Does it while the storage is looked at, and others come in between. Returns the moment at which the
/// machine went down too.
fn watched<T>(
    mut watch: Watch,
    storage: &Rc<RefCell<Storage>>,
    work: impl FnOnce() -> T,
) -> (T, Option<Moment>) {
    let fate = Rc::clone(&watch.fate);
    let storage = Rc::clone(storage);
    let fault = move |place: Place, inode: u64| storage.borrow_mut().attempt(place, inode);
    let faulty = watch.faulty;
    let tell = move |event| watch.tell(&event);
    let result = match faulty {
        true => watching_all(tell, || failing(fault, work)),
        false => watching_all(tell, work),
    };
    let mut fate = fate.borrow_mut();
    let moment = fate.moment.take();
    // It came later than in the midst of the step.
    let ends = || fate.left.is_some().then(|| fate.freeze());
    let moment = moment.or_else(ends);
    (result, moment)
}

pub struct World {
    folder: PathBuf,
    rng: Rng,
    mode: Mode,
    boot: u64,
    options: MachineOptions,
    storage: Rc<RefCell<Storage>>,
    guest: Rc<RefCell<Guest>>,
    shipper: Shipper,
    machine: Option<Rc<Machine>>,
    faulty: bool,
    /// Nobody writes any more.
    resting: bool,
    /// How often a step is the last one of a boot.
    danger: u64,
    /// What was answered: epochs open, sealed and committed.
    answered: [Epoch; 3],
    pub tally: Tally,
    trace: bool,
}

fn boot_id(boot: u64) -> [u8; 16] {
    let mut id = [9; 16];
    id[..8].copy_from_slice(&boot.to_le_bytes());
    id
}

fn broken(what: String) -> ! {
    std::panic::resume_unwind(Box::new(Violation(what)))
}

fn require(checked: Checked) {
    if let Err(what) = checked {
        broken(what);
    }
}

impl World {
    pub fn new(seed: u64, folder: &Path, mode: Mode, trace: bool) -> Self {
        let mut rng = Rng::new(seed);
        let disks = [1, 1, 1, 2, 2, 3][rng.index(6)];
        let ring_bytes = [16 << 10, 16 << 10, 32 << 10][rng.index(3)];
        let guest = Guest::new(disks, mode, Rng::new(rng.next()));
        let storage = Storage::new(folder, disks, Rng::new(rng.next()));
        let shipper = Shipper::new(&guest, mode, Rng::new(rng.next()));
        let faulty = rng.once_in(4);
        Self {
            folder: folder.to_owned(),
            mode,
            boot: 1,
            options: MachineOptions {
                workers: 1,
                ring_bytes,
                intent_regions: [2, 8, 16, 64, 800][rng.index(5)],
                rebuild: false,
                tracking: true,
                preserve_budget_bytes: 0,
                frozen_views: false,
            },
            storage: Rc::new(RefCell::new(storage)),
            guest: Rc::new(RefCell::new(guest)),
            shipper,
            machine: None,
            faulty,
            resting: false,
            danger: [12, 24, 60][rng.index(3)],
            answered: [Epoch::ZERO; 3],
            tally: Tally::default(),
            trace,
            rng,
        }
    }

    fn say(&self, what: impl FnOnce() -> String) {
        if self.trace {
            eprintln!("{}", what());
        }
    }

    /// Lives to the end.
    pub fn live(&mut self) {
        if let Break::Product(canary) = self.mode.broken {
            set_canary(Some(canary));
        }
        set_boot(Some(boot_id(self.boot)));
        self.open(0);
        self.storage.borrow_mut().faulty = self.faulty;
        let steps = 20 + self.rng.below(80);
        for _ in 0..steps {
            self.step();
            if self.machine.is_none() {
                // Unguarded when the power was cut: nothing is promised.
                self.tally.add("given up", 1);
                return self.end();
            }
        }
        self.rest();
        self.end();
    }

    fn end(&mut self) {
        self.leave_machine();
        self.tally.add("worlds", 1);
        self.tally.add("points", self.shipper.points);
        set_boot(None);
        set_canary(None);
    }

    fn specs(&self) -> Vec<DiskSpec> {
        let guest = self.guest.borrow();
        let spec = |(disk, known): (usize, &guest::Disk)| DiskSpec {
            name: disk.to_string(),
            image: self.folder.join(disk.to_string()),
            journal: journal_path(&self.folder, disk),
            size_bytes: known.size_bytes,
            identity: [1; 16],
            seen: None,
            preserve: None,
        };
        guest.disks.iter().enumerate().map(spec).collect()
    }

    /// Does it as one step, which may be the last one of a boot.
    fn watched<T>(
        &mut self,
        work: Work,
        left: Option<u64>,
        call: impl FnOnce() -> T,
    ) -> (T, Option<Moment>) {
        let work = if self.resting { Work::Alone } else { work };
        let fate = Fate {
            left,
            moment: None,
            storage: Rc::clone(&self.storage),
            guest: Rc::clone(&self.guest),
            machine: self.machine.clone(),
        };
        let watch = Watch {
            rng: Rng::new(self.rng.next()),
            work,
            faulty: self.faulty,
            fate: Rc::new(RefCell::new(fate)),
            guest: Rc::clone(&self.guest),
            machine: self.machine.clone(),
        };
        watched(watch, &self.storage, call)
    }

    /// When the machine goes down in a step, if it does: after so many events.
    fn doom(&mut self) -> Option<u64> {
        if !self.rng.once_in(self.danger) {
            return None;
        }
        let reach = [3, 10, 40, 200][self.rng.index(4)];
        Some(1 + self.rng.below(reach))
    }

    fn down(&mut self) -> Down {
        match self.rng.below(3) {
            0 => Down::Kill,
            _ => Down::PowerCut,
        }
    }

    /// The tracker does something. `None`: the machine went down meanwhile, and is up again.
    fn call<T>(&mut self, work: Work, name: &str, call: impl FnOnce(&Machine) -> T) -> Option<T> {
        let machine = self.machine.clone()?;
        let doom = self.doom();
        self.say(|| {
            format!(
                "{name}{}",
                if doom.is_some() { ", the last one" } else { "" }
            )
        });
        let (result, moment) = self.watched(work, doom, || call(&machine));
        if self.faulty {
            let replaced = machine.disks.iter().map(|disk| disk.journal.replacements());
            let replaced: Vec<u64> = replaced.collect();
            self.say(|| {
                format!(
                    "  replaced {replaced:?}, unguarded {}",
                    is_unguarded(&machine)
                )
            });
        }
        let Some(moment) = moment else {
            return Some(result);
        };
        drop((machine, result));
        self.go_down(moment, 0);
        None
    }

    /// The machine goes down, and is started again.
    fn go_down(&mut self, moment: Moment, nested: u32) {
        let down = self.down();
        self.say(|| format!("{down:?}"));
        self.leave_machine();
        self.storage.borrow_mut().resume(moment.frame, down);
        *self.guest.borrow_mut() = moment.guest;
        self.guest.borrow_mut().go_down(down);
        match down {
            Down::PowerCut => {
                self.tally.add("power cuts", 1);
                self.boot += 1;
                set_boot(Some(boot_id(self.boot)));
                self.shipper.cut_power();
                if moment.unguarded {
                    return;
                }
            }
            Down::Kill => {
                self.tally.add("kills", 1);
                self.shipper.leave();
            }
        }
        self.open(nested + 1);
    }

    fn open(&mut self, nested: u32) {
        let doom = if nested < NESTED_MAX && nested > 0 {
            self.doom()
        } else {
            None
        };
        let specs = self.specs();
        for attempt in 0.. {
            self.show_superblocks();
            let (options, specs) = (self.options.clone(), specs.clone());
            let open = || Machine::open(specs, &options);
            let (opened, moment) = self.watched(Work::Alone, doom, open);
            if let Some(moment) = moment {
                drop(opened);
                self.tally.add("recoveries cut off", 1);
                return self.go_down(moment, nested);
            }
            match opened {
                Ok((machine, reports)) => return self.opened(machine, &reports),
                Err(error) if !self.faulty || attempt > 3 => {
                    broken(format!("the tracker does not start: {}", error.chain()));
                }
                Err(error) => {
                    self.say(|| format!("the tracker does not start: {}", error.chain()));
                    self.tally.add("starts that failed", 1);
                    self.storage.borrow_mut().faulty = attempt < 2;
                }
            }
        }
    }

    /// Tells what the superblocks say.
    fn show_superblocks(&self) {
        for disk in 0..self.guest.borrow().disks.len() {
            let Ok(bytes) = std::fs::read(journal_path(&self.folder, disk)) else {
                continue;
            };
            let log = INTENT_OFFSET as usize
                ..INTENT_OFFSET as usize + *INTENT_PAGES_RANGE.start() as usize * PAGE_BYTES;
            self.say(|| format!("  armed {:?}", bytes.get(log).map(reconstruct)));
            for page in bytes.chunks_exact(PAGE_BYTES).take(2) {
                self.say(|| match Superblock::decode(page) {
                    Ok(superblock) => format!(
                        "  disk {disk}: {} {:?} flags {} boot {} tail {} sets {:?}",
                        superblock.sequence.get(),
                        EpochState::of(&superblock),
                        superblock.flags.get(),
                        superblock.boot_id[0],
                        superblock.ring_tail.get(),
                        superblock
                            .sets
                            .map(|set| (set.lowest_epoch.get(), set.highest_epoch.get())),
                    ),
                    Err(fault) => format!("  disk {disk}: {fault:?}"),
                });
            }
        }
    }

    fn opened(&mut self, machine: Machine, reports: &[RecoveryReport]) {
        self.storage.borrow_mut().faulty = self.faulty;
        for report in reports {
            self.say(|| report.to_string());
            let what = match &report.found {
                Found::New(_) => "new",
                Found::Clean => "clean",
                Found::Killed => "killed",
                Found::PowerCut if report.suspect_regions > 0 => "exact, with suspects",
                Found::PowerCut => "exact",
                Found::Lost(why) => {
                    self.say(|| why.to_string());
                    "lost"
                }
            };
            self.tally.add(what, 1);
        }
        let status = machine.status();
        let found = [status.open, status.sealed, status.committed];
        self.say(|| format!("{found:?}, closed {:?}", status.closed));
        self.machine = Some(Rc::new(machine));
        let lower = found
            .iter()
            .zip(&self.answered)
            .any(|(found, answered)| found < answered);
        if lower {
            broken(format!(
                "epochs are {found:?}, {:?} was answered",
                self.answered
            ));
        }
        self.check();
    }

    fn check(&self) {
        if let Some(machine) = &self.machine {
            let guest = self.guest.borrow();
            require(self.shipper.check_coverage(machine, &guest, &self.folder));
        }
    }

    fn leave_machine(&mut self) {
        let Some(machine) = self.machine.take() else {
            return;
        };
        for disk in machine.status().disks {
            let counts = [
                ("folds", disk.folds),
                ("coarse", disk.coarse_changes),
                ("evictions", disk.intent_evictions),
                ("commits", disk.intent_commits),
                ("waits", disk.intent_waits),
                ("replacements", disk.journal_replacements),
            ];
            counts
                .into_iter()
                .for_each(|(what, count)| self.tally.add(what, count));
        }
        assert_eq!(Rc::strong_count(&machine), 1);
    }

    fn step(&mut self) {
        let guest = Rc::clone(&self.guest);
        let disk = self.rng.index(guest.borrow().disks.len());
        self.tally.add("steps", 1);
        match self.rng.below(100) {
            0..26 => drop(self.call(Work::Guest, "write", |machine| {
                guest::write(&guest, machine)
            })),
            26..38 => self.go_on(),
            38..42 => self.flush(disk),
            42..54 => drop(self.call(Work::Arm, "arm", |machine| {
                machine.disks[disk].journal.arm_now()
            })),
            54..61 => drop(self.call(Work::Sync, "sync", |machine| {
                machine.disks[disk].journal.sync_now().is_ok()
            })),
            61..64 => drop(self.call(Work::Arm, "disarm", |machine| {
                machine.disks[disk].journal.disarm_idle().is_ok()
            })),
            64..68 => drop(self.call(Work::Guest, "burst", |machine| {
                guest::burst(&guest, machine)
            })),
            68..73 => drop(self.call(Work::Other, "maintain", |machine| {
                machine.maintain().is_ok()
            })),
            73..75 => self.grow(disk),
            75 => self.shipper.restart(),
            76 => self.shipper.lose_spool(),
            77 => self.stop_and_start(),
            _ => self.ship(),
        }
    }

    fn go_on(&mut self) {
        if let Some(machine) = &self.machine {
            self.guest.borrow_mut().go_on(machine);
            self.guest.borrow_mut().go_on(machine);
        }
    }

    fn flush(&mut self, disk: usize) {
        self.guest.borrow_mut().disks[disk].flush();
    }

    fn grow(&mut self, disk: usize) {
        let more_mib = 1 + self.rng.below(6) + 140 * u64::from(self.rng.once_in(8));
        let size_bytes = self.guest.borrow_mut().grow(disk, more_mib);
        let grown = self.call(Work::Other, "grow", |machine| {
            machine.grow(disk, size_bytes).is_ok()
        });
        match grown {
            Some(true) => self.guest.borrow_mut().show_sizes(),
            Some(false) => self.crash_by_hand(),
            None => {}
        }
    }

    /// The operator ends the tracker, which did not do what was asked.
    fn crash_by_hand(&mut self) {
        let (_, moment) = self.watched(Work::Alone, Some(u64::MAX), || ());
        if let Some(moment) = moment {
            self.go_down(moment, NESTED_MAX);
        }
    }

    /// The tracker is stopped cleanly and started again.
    fn stop_and_start(&mut self) {
        self.settle_writes();
        if !self.guest.borrow().is_idle() {
            return;
        }
        self.guest
            .borrow_mut()
            .disks
            .iter_mut()
            .for_each(guest::Disk::flush);
        if self
            .call(Work::Alone, "close", |machine| machine.close().is_ok())
            .is_some()
        {
            self.shipper.leave();
            self.leave_machine();
            self.guest.borrow_mut().show_sizes();
            self.open(NESTED_MAX);
        }
    }

    /// All writes come to their end.
    fn settle_writes(&mut self) {
        let Some(machine) = self.machine.clone() else {
            return;
        };
        let storage = Rc::clone(&self.storage);
        let guest = Rc::clone(&self.guest);
        storage.borrow_mut().faulty = false;
        self.watched(Work::Alone, None, || {
            for _ in 0..8 {
                guest.borrow_mut().go_on_all(&machine);
                for disk in &machine.disks {
                    disk.journal.arm_now();
                    let _goes_on_unguarded = disk.journal.sync_now();
                }
            }
            guest.borrow_mut().go_on_all(&machine);
        });
        storage.borrow_mut().faulty = self.faulty;
    }

    fn ship(&mut self) {
        let Some(machine) = self.machine.clone() else {
            return;
        };
        let Some(request) = self.shipper.request else {
            let guest = self.guest.borrow();
            require(self.shipper.step(&machine, &guest, &self.folder));
            return;
        };
        drop(machine);
        match request {
            Request::Cut(_) => self.guest.borrow_mut().note_cut(),
            // The tracker makes the disks durable before it lets go of anything.
            Request::Seal(_) if !self.mode.breaks(Break::SealBeforeDiskDurable) => {
                let mut guest = self.guest.borrow_mut();
                guest.disks.iter_mut().for_each(guest::Disk::flush);
            }
            // What was sealed and is lost counts no more, whether the answer comes or not.
            Request::Revert => self.answered[1] = self.answered[2],
            _ => {}
        }
        let answer = self.call(Work::Other, &format!("{request:?}"), |machine| {
            ask(machine, request)
        });
        let Some(answer) = answer else { return };
        self.say(|| format!("  {answer:?}"));
        let Some(machine) = self.machine.clone() else {
            return;
        };
        let mut guest = self.guest.borrow_mut();
        self.shipper.answered(request, answer, &machine, &mut guest);
        if let Some(epoch) = answer {
            let status = machine.status();
            let [open, sealed, committed] = &mut self.answered;
            match request {
                // A cut that gave up has opened an epoch too, which nobody was told of.
                Request::Cut(_) | Request::CutForScan(_) => *open = (*open).max(status.open),
                Request::Seal(_) => *sealed = epoch.max(*sealed),
                Request::Commit(_) => {
                    *committed = epoch.max(*committed);
                    *sealed = epoch.max(*sealed);
                }
                _ => {}
            }
        }
    }

    /// Everything comes to rest: one more point, and the vault has what the disks have.
    fn rest(&mut self) {
        self.danger = u64::MAX;
        self.faulty = false;
        self.resting = true;
        self.settle_writes();
        let points = self.shipper.points;
        for _ in 0..REST_MAX {
            self.ship();
            self.shipper.draining = self.shipper.points >= points + 2;
            if self.shipper.draining && self.shipper.is_quiet() {
                return require(self.shipper.check_end(&self.guest.borrow()));
            }
        }
        broken("the shipper makes no recovery points any more".to_owned());
    }
}

fn ask(machine: &Machine, request: Request) -> Option<Epoch> {
    let done = |epoch: Epoch, result: crate::error::Result<()>| result.ok().map(|()| epoch);
    match request {
        Request::Cut(minimum) | Request::CutForScan(minimum) => {
            machine.cut(minimum, Keep::Changed, DRAIN).ok()
        }
        Request::Seal(epoch) => done(epoch, machine.seal(epoch)),
        Request::Abandon(epoch) | Request::AbandonForScan(epoch) => {
            done(epoch, machine.abandon(epoch))
        }
        Request::Commit(epoch) => done(epoch, machine.commit(epoch)),
        Request::Revert => done(Epoch::ZERO, machine.revert()),
    }
}
