//! Every recovery point is one moment of all disks of the machine: the order oracle over the real programs.
//!
//! A world is two disks under writers that know of each other (`tests::order`), a shipper that cuts as often
//! as it can, and some trouble: kills of either program, a vault that comes and goes, no room for what a
//! capture needs. Every point that is published is brought into memory and judged while the writers go
//! on; now and then one is restored by `shipper restore` and compared with the bytes in memory, so that the
//! short cut proves nothing by itself. Some points are asked for: what was answered before must be in them.
//!
//! `WORLDS=` sets the number of worlds of each kind, `ROUNDS=` the points of each world. The seed replays the
//! load, not the interleaving of threads and processes.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use nix::sys::signal::Signal;
use tests::order::areas::Areas;
use tests::order::checker::{Checker, Tally, Violation};
use tests::order::follower::Follower;
use tests::order::history::{History, Line};
use tests::order::writer::{Target, Writer};
use tests::order::{BLOCK_BYTES, Clock, WRITERS};
use tests::process::{Daemon, program, program_with_failpoints, run};
use tests::seed::Random;
use tests::site::{Site, fast_folder, machine_folder, number, status};
use tracker::extent::Epoch;

const MIB: u64 = 1 << 20;
const DISKS: [(&str, u64); 2] = [("first", 64 * MIB), ("second", 64 * MIB)];
/// Points of a world, unless `ROUNDS` says otherwise. A manifest lists the segments of all points before it,
/// so many short worlds cost less than a long one.
const POINTS: u64 = 160;
/// Worlds of each kind, unless `WORLDS` says otherwise.
const WORLDS: u64 = 3;
/// One point in so many is restored by the program too.
const RESTORE_INTERVAL: u64 = 50;
/// One point in so many is asked for.
const CUT_INTERVAL: u64 = 20;
const PATIENCE: Duration = Duration::from_secs(60);
/// So small that it is folded now and then.
const RING_SIZE: &str = "256KiB";
/// Longest rest of a writer for each write: so much load that a point has some hundred writes, and that the
/// programs that are tested have time for many of them.
const REST_MAX: Duration = Duration::from_millis(2);
/// Free bytes that a file system in memory must have to be used.
const MEMORY_BYTES_MIN: u64 = 2 << 30;

/// What goes wrong in a world.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trouble {
    Nothing,
    /// The shipper is held for a moment, again and again, wherever it is.
    Held,
    ShipperKilled,
    TrackerKilled,
    BothKilled,
    /// The vault is gone, or takes no segments, until some epochs wait in the spool.
    VaultAway,
    /// There is room for few of the blocks that a capture must keep, and the shipper is held up.
    NoRoom,
}

/// A kind of world.
#[derive(Clone, Copy, Debug)]
struct Plan {
    name: &'static str,
    /// Of the first world, the second and so on, and again from the beginning.
    troubles: &'static [Trouble],
    interval: &'static str,
    rest_max: Duration,
    arguments: &'static [&'static str],
    /// A fault that is built in.
    canary: Option<&'static str>,
}

impl Trouble {
    /// How many points, at least and at most, come before the next one.
    fn interval(self) -> (u64, u64) {
        match self {
            Self::Held => (1, 2),
            Self::NoRoom => (15, 60),
            _ => (5, 20),
        }
    }
}

impl Plan {
    fn trouble(&self, world: u64) -> Trouble {
        self.troubles[(world - 1) as usize % self.troubles.len()]
    }
}

const QUIET: Plan = Plan {
    name: "quiet",
    troubles: &[Trouble::Nothing],
    interval: "20ms",
    rest_max: REST_MAX,
    arguments: &[],
    canary: None,
};

#[test]
fn every_point_is_one_moment() {
    worlds(Plan {
        troubles: &[Trouble::Nothing, Trouble::Held, Trouble::Held],
        ..QUIET
    });
}

#[test]
fn with_threads_in_place_of_io_uring() {
    worlds(Plan {
        name: "threads",
        troubles: &[
            Trouble::Nothing,
            Trouble::ShipperKilled,
            Trouble::TrackerKilled,
        ],
        arguments: &["--engine", "threads"],
        ..QUIET
    });
}

#[test]
fn while_the_shipper_is_killed() {
    worlds(Plan {
        name: "shipper killed",
        troubles: &[Trouble::ShipperKilled],
        ..QUIET
    });
}

#[test]
fn while_the_tracker_is_killed() {
    worlds(Plan {
        name: "tracker killed",
        troubles: &[Trouble::TrackerKilled],
        ..QUIET
    });
}

#[test]
fn while_both_are_killed() {
    worlds(Plan {
        name: "both killed",
        troubles: &[Trouble::BothKilled],
        ..QUIET
    });
}

#[test]
fn while_the_vault_comes_and_goes() {
    worlds(Plan {
        name: "vault away",
        troubles: &[Trouble::VaultAway],
        ..QUIET
    });
}

#[test]
fn with_no_room_to_keep_blocks() {
    worlds(Plan {
        name: "no room",
        troubles: &[Trouble::NoRoom],
        arguments: &["--preserve-budget", "256KiB"],
        ..QUIET
    });
}

#[test]
fn a_shipper_that_looks_for_a_kept_block_too_early_is_caught() {
    caught("check-before-read");
}

#[test]
fn a_tracker_that_cuts_one_disk_after_the_other_is_caught() {
    caught("cut-per-disk");
}

/// The oracle itself finds nothing wrong where nothing can be: the images of a tracker that is stopped.
#[test]
fn the_disks_of_a_stopped_tracker_are_one_moment() {
    const MOMENTS: u64 = 40;
    let tally = images("stopped", MOMENTS, true).unwrap();
    assert!(tally.changed_blocks > 20 * MOMENTS, "{tally:?}");
    assert!(tally.required_writes > 20 * MOMENTS, "{tally:?}");
}

/// And it finds a smear: the images of a tracker that goes on while they are read.
#[test]
fn the_disks_of_a_running_tracker_are_not_one_moment() {
    const MOMENTS: u64 = 40;
    let violation = images("running", MOMENTS, false).unwrap_err();
    println!("the images are {violation}");
}

/// Judges the images themselves so many times.
fn images(name: &str, moments: u64, stop: bool) -> Result<Tally, Violation> {
    let mut random = Random::from_environment(name);
    let site = Site::new_in(&fast_folder(MEMORY_BYTES_MIN), &DISKS);
    let tracker = site.start_tracker();
    let (history, line, writers) = start_writers(&site, REST_MAX, &mut random);
    line.up();
    let mut checker = Checker::new(&history);
    let mut disks = DISKS.map(|(_, size)| vec![0; size as usize]);
    let mut judge = || {
        let before = history.sent_count();
        poll("a hundred writes", || history.sent_count() > before + 100);
        let clock = history.clock();
        if stop {
            tracker.signal(Signal::SIGSTOP);
            let state = format!("/proc/{}/status", tracker.pid());
            let is_stopped = || fs::read_to_string(&state).unwrap().contains("T (stopped)");
            poll("a stopped tracker", is_stopped);
        }
        let mut changed = [const { Vec::new() }; DISKS.len()];
        for ((name, _), (disk, changed)) in DISKS.iter().zip(disks.iter_mut().zip(&mut changed)) {
            let now = fs::read(site.image(name)).unwrap();
            let blocks = now
                .chunks_exact(BLOCK_BYTES)
                .zip(disk.chunks_exact(BLOCK_BYTES));
            let differ = blocks
                .enumerate()
                .filter(|(_, (now, before))| now != before);
            changed.extend(differ.map(|(block, _)| block as u32));
            *disk = now;
        }
        tracker.signal(Signal::SIGCONT);
        checker.require(&clock);
        let disks: Vec<_> = disks
            .iter()
            .zip(&changed)
            .map(|(disk, changed)| (&disk[..], &changed[..]))
            .collect();
        checker.check(&disks)
    };
    let judged = (0..moments).try_for_each(|_| judge());
    line.end();
    for writer in writers {
        writer.join().expect("a writer");
    }
    judged.map(|()| checker.tally())
}

/// Waits until something is there.
#[track_caller]
fn poll(what: &str, mut is_there: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_there() {
        assert!(Instant::now() < deadline, "{what} does not come");
        std::thread::park_timeout(Duration::from_millis(2));
    }
}

/// A number from the environment, or the usual one.
fn setting(name: &str, usual: u64) -> u64 {
    std::env::var(name).map_or(usual, |text| text.parse().expect("a number"))
}

/// Worlds of one kind, in all of which every point must be right.
fn worlds(plan: Plan) {
    let points = setting("ROUNDS", POINTS);
    for number in 1..=setting("WORLDS", WORLDS) {
        let begin = Instant::now();
        let ended = world(plan, number, points);
        let report = ended.unwrap_or_else(|(point, violation)| {
            panic!(
                "{}, world {number}: recovery point {point} is {violation}",
                plan.name
            )
        });
        println!(
            "{}, world {number}: {report} in {:.1?}",
            plan.name,
            begin.elapsed()
        );
        report.demand(plan.trouble(number), points);
    }
}

/// Programs with a fault must be found out within a few worlds.
fn caught(canary: &'static str) {
    const WORLDS_MAX: u64 = 10;
    let plan = Plan {
        name: canary,
        canary: Some(canary),
        // Such a fault shows where a guest overwrites what is just being read.
        troubles: &[Trouble::Held],
        rest_max: REST_MAX / 10,
        ..QUIET
    };
    let mut points = 0;
    for number in 1..=WORLDS_MAX {
        match world(plan, number, POINTS) {
            Err((point, violation @ Violation::Order(_))) => {
                println!("{canary}, world {number}: recovery point {point} is {violation}");
                return;
            }
            Err((point, violation)) => panic!("recovery point {point} is {violation}"),
            Ok(report) => points += report.tally.points,
        }
    }
    panic!("{canary}: {points} points, and nothing wrong was found in any of them");
}

/// What a world has come to.
#[derive(Debug, Default)]
struct Report {
    tally: Tally,
    writes: u64,
    restored: u64,
    asked: u64,
    given_up: u64,
    kills: u64,
    holds: u64,
    outages: u64,
    /// Points that were sealed while the vault could take none.
    queued: u64,
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} points, {} asked for, {} restored, {} given up, {} queued; {} blocks, {} writes, {} required; \
             {} kills, {} holds, {} outages",
            self.tally.points,
            self.asked,
            self.restored,
            self.given_up,
            self.queued,
            self.tally.changed_blocks,
            self.writes,
            self.tally.required_writes,
            self.kills,
            self.holds,
            self.outages
        )
    }
}

impl Report {
    /// A world that did nothing proves nothing.
    fn demand(&self, trouble: Trouble, points: u64) {
        assert!(self.tally.points >= points, "{self}");
        assert!(self.asked >= points / CUT_INTERVAL / 2, "{self}");
        assert!(self.restored > points / RESTORE_INTERVAL, "{self}");
        assert!(self.tally.changed_blocks >= 20 * points, "{self}");
        assert!(self.tally.required_writes >= 20 * points, "{self}");
        match trouble {
            Trouble::Nothing => {}
            Trouble::Held => assert!(self.holds > points / 4, "{self}"),
            Trouble::ShipperKilled | Trouble::TrackerKilled | Trouble::BothKilled => {
                assert!(self.kills >= points / 40, "{self}");
            }
            Trouble::VaultAway => {
                assert!(self.outages >= points / 40, "{self}");
                assert!(self.queued >= points / 20, "{self}");
            }
            Trouble::NoRoom => assert!(self.given_up >= points / 160, "{self}"),
        }
    }
}

fn world(plan: Plan, world: u64, points: u64) -> Result<Report, (Epoch, Violation)> {
    let mut random = Random::from_environment(&format!("{}, world {world}", plan.name));
    let mut site = Site::new_in(&fast_folder(MEMORY_BYTES_MIN), &DISKS);
    site.interval = plan.interval.to_owned();
    // The shipper reads all of the ring for every point.
    site.tracker_arguments = ["--ring-size", RING_SIZE].map(str::to_owned).to_vec();
    let engine_is_given = std::env::var_os("TIDEMARK_ENGINE").is_some();
    if !(engine_is_given && plan.arguments.contains(&"--engine")) {
        let arguments = plan.arguments.iter().map(|argument| (*argument).to_owned());
        site.tracker_arguments.extend(arguments);
    }
    let trouble = plan.trouble(world);
    let programs = Programs {
        site,
        canary: plan.canary,
    };
    let tracker = programs.start_tracker();
    let (history, line, writers) = start_writers(&programs.site, plan.rest_max, &mut random);
    line.up();
    programs.site.protect();
    let shipper = programs.start_shipper();
    let (url, access) = (programs.site.vault_url(), programs.site.access());
    let follower = Follower::new(&url, &access, "m1", &DISKS).unwrap();
    let mut world = World {
        elsewhere: programs.site.path("elsewhere"),
        programs,
        random,
        line: Arc::clone(&line),
        history: Arc::clone(&history),
        tracker: Some(tracker),
        shipper: Some(shipper),
        follower,
        required: BTreeMap::new(),
        queued: Vec::new(),
        report: Report::default(),
    };
    let mut checker = Checker::new(&history);
    let ended = world
        .go_on(trouble, points, &mut checker)
        .and_then(|()| world.end(writers, &mut checker));
    line.end();
    ended.map(|()| world.report)
}

/// Writers that wait for their line to come up.
fn start_writers(
    site: &Site,
    rest_max: Duration,
    random: &mut Random,
) -> (Arc<History>, Arc<Line>, Vec<JoinHandle<()>>) {
    let areas = Areas::divide(&DISKS.map(|(_, size)| size), random);
    let history = Arc::new(History::new(random.next_u64(), areas));
    let line = Arc::new(Line::default());
    let target = Target {
        rest_max,
        socket: site.socket(),
        disks: DISKS.iter().map(|(name, _)| (*name).to_owned()).collect(),
    };
    let start = |number| {
        let (history, line) = (Arc::clone(&history), Arc::clone(&line));
        let writer = Writer::new(number, target.clone(), history, line, random.fork());
        std::thread::spawn(move || writer.work())
    };
    let writers = (0..WRITERS).map(start).collect();
    (history, line, writers)
}

/// The two programs, as they are or with a fault that is built in.
struct Programs {
    site: Site,
    canary: Option<&'static str>,
}

impl Programs {
    fn command(&self, name: &str, usual: &Command) -> Command {
        let path = match self.canary {
            Some(_) => program_with_failpoints(name),
            None => program(name),
        };
        let mut command = Command::new(path);
        command.args(usual.get_args());
        if let Some(canary) = self.canary {
            command.env("TIDEMARK_CANARY", canary);
        }
        command
    }

    fn start_tracker(&self) -> Daemon {
        let mut command = self.command("tracker", &self.site.serve_command());
        Daemon::start("tracker", &mut command)
    }

    fn start_shipper(&self) -> Daemon {
        let mut command = self.command("shipper", &self.site.shipper_command(&["run"]));
        Daemon::start("shipper", &mut command)
    }
}

struct World {
    programs: Programs,
    random: Random,
    line: Arc<Line>,
    history: Arc<History>,
    tracker: Option<Daemon>,
    shipper: Option<Daemon>,
    follower: Follower,
    /// What the points that were asked for must have.
    required: BTreeMap<Epoch, Clock>,
    /// Epochs that were sealed in an outage.
    queued: Vec<Epoch>,
    elsewhere: PathBuf,
    report: Report,
}

impl World {
    /// Judges points until there are so many, and makes trouble every now and then.
    fn go_on(
        &mut self,
        trouble: Trouble,
        points: u64,
        checker: &mut Checker<'_>,
    ) -> Result<(), (Epoch, Violation)> {
        let (soonest, latest) = trouble.interval();
        let mut next_trouble = self.random.between(soonest, latest);
        let mut next_cut = CUT_INTERVAL;
        while checker.tally().points < points {
            self.await_point();
            self.judge_all(checker)?;
            let judged = checker.tally().points;
            if judged >= next_cut {
                next_cut = judged + CUT_INTERVAL;
                self.ask();
            }
            if judged >= next_trouble {
                next_trouble = judged + self.random.between(soonest, latest);
                self.make(trouble);
            }
        }
        Ok(())
    }

    /// Waits for a point that was not judged.
    fn await_point(&self) {
        poll("a recovery point", || {
            !self.follower.waiting().unwrap().is_empty()
        });
    }

    fn judge_all(&mut self, checker: &mut Checker<'_>) -> Result<(), (Epoch, Violation)> {
        for point in self.follower.waiting().unwrap() {
            self.follower.take(point).unwrap();
            while let Some(first) = self
                .required
                .first_entry()
                .filter(|first| *first.key() <= point)
            {
                checker.require(&first.remove());
            }
            let disks = self.follower.disks().iter();
            let disks: Vec<_> = disks.map(|disk| (disk.image(), disk.changed())).collect();
            checker
                .check(&disks)
                .map_err(|violation| (point, violation))?;
            if checker.tally().points.is_multiple_of(RESTORE_INTERVAL) {
                self.restore(point);
            }
        }
        Ok(())
    }

    /// The program makes of a point what is in memory.
    fn restore(&mut self, point: Epoch) {
        let site = &self.programs.site;
        for disk in self.follower.disks() {
            let restored = site.restore(&point.to_string(), disk.name(), "restored");
            let bytes = fs::read(&restored).unwrap();
            assert!(
                bytes == disk.image(),
                "disk {} at point {point}",
                disk.name()
            );
            fs::remove_file(restored).unwrap();
        }
        self.report.restored += 1;
    }

    /// Asks for a point: what is known now must be in it.
    fn ask(&mut self) {
        let clock = self.history.clock();
        let point = self.programs.site.cut_soon("a point that is asked for");
        self.required.insert(parse(&point), clock);
        self.report.asked += 1;
    }

    fn make(&mut self, trouble: Trouble) {
        match trouble {
            Trouble::Nothing => {}
            Trouble::Held => self.hold(30),
            Trouble::NoRoom => self.crowd(),
            Trouble::ShipperKilled => self.kill(false, true),
            Trouble::TrackerKilled => self.kill(true, false),
            Trouble::BothKilled => {
                let choice = self.random.below(3);
                self.kill(choice != 0, choice != 1);
            }
            Trouble::VaultAway => self.take_vault_away(),
        }
    }

    /// Kills, at a moment that has nothing to do with any point, and starts again.
    fn kill(&mut self, tracker: bool, shipper: bool) {
        std::thread::park_timeout(Duration::from_micros(self.random.below(40_000)));
        if tracker {
            self.note_given_up();
            self.line.down();
            self.tracker.take().unwrap().kill();
        }
        if shipper {
            self.note_given_up();
            self.shipper.take().unwrap().kill();
        }
        if tracker {
            self.tracker = Some(self.programs.start_tracker());
            self.line.up();
        }
        if shipper {
            self.shipper = Some(self.programs.start_shipper());
        }
        self.report.kills += 1;
    }

    /// Holds the shipper, at a moment that has nothing to do with any point, until guests have sent some writes.
    fn hold(&mut self, writes: u64) {
        std::thread::park_timeout(Duration::from_micros(self.random.below(40_000)));
        let shipper = self.shipper.as_ref().expect("it runs");
        shipper.signal(Signal::SIGSTOP);
        let before = self.history.sent_count();
        poll("more writes", || {
            self.history.sent_count() > before + writes
        });
        shipper.signal(Signal::SIGCONT);
        self.report.holds += 1;
    }

    /// Holds the shipper a few times, at last in the capture of what has gathered meanwhile, and guests overwrite
    /// more than there is room for.
    fn crowd(&mut self) {
        const HOLDS_MAX: u64 = 6;
        const WRITES: u64 = 800;
        let given_up = |site: &Site| status(site).map(|status| number(&status, "/points_given_up"));
        let given_up_before = given_up(&self.programs.site);
        for hold in 0..HOLDS_MAX {
            self.hold(WRITES);
            if hold > 0 && given_up(&self.programs.site) != given_up_before {
                break;
            }
        }
        // However slow this machine is, what waits fits now.
        self.line.rest(true);
        self.ask();
        self.line.rest(false);
    }

    /// A shipper counts since it was started.
    fn note_given_up(&mut self) {
        if let Some(status) = status(&self.programs.site) {
            self.report.given_up += number(&status, "/points_given_up");
        }
    }

    /// Until some epochs wait in the spool. Each of them must be a point in the end.
    fn take_vault_away(&mut self) {
        let site = &self.programs.site;
        let vault = site.vault();
        // Without the vault nothing answers; without this folder nothing can be put.
        let segments = machine_folder(&vault).join("disks");
        let is_gone = self.random.chance(1, 2);
        let taken = if is_gone { &vault } else { &segments };
        fs::write(&self.elsewhere, "in the way").unwrap();
        exchange(taken, &self.elsewhere);
        let wanted = self.random.between(2, 12) as usize;
        let spool = site.state().join("spool");
        poll("epochs that wait", || sealed(&spool).len() >= wanted);
        if self.random.chance(1, 3) {
            self.shipper.take().unwrap().kill();
            self.report.kills += 1;
        }
        self.queued.extend(sealed(&spool));
        exchange(taken, &self.elsewhere);
        if self.shipper.is_none() {
            self.shipper = Some(self.programs.start_shipper());
        }
        self.report.outages += 1;
    }

    /// A last point while writers write, then one when they have ended, which is the disks as they are.
    fn end(
        &mut self,
        writers: Vec<JoinHandle<()>>,
        checker: &mut Checker<'_>,
    ) -> Result<(), (Epoch, Violation)> {
        self.ask();
        self.line.end();
        for writer in writers {
            writer.join().expect("a writer");
        }
        self.ask();
        let last = *self.required.last_key_value().unwrap().0;
        self.note_given_up();
        self.shipper.take().unwrap().stop();
        self.judge_all(checker)?;
        assert!(self.required.is_empty(), "no point after {last}");
        assert_eq!(self.follower.taken(), self.follower.published().unwrap());
        for epoch in &self.queued {
            let is_point = self.follower.taken().binary_search(epoch).is_ok();
            assert!(is_point, "{epoch} was sealed and is no point");
        }
        let site = &self.programs.site;
        for disk in self.follower.disks() {
            let bytes = fs::read(site.image(disk.name())).unwrap();
            assert!(bytes == disk.image(), "disk {} in the end", disk.name());
        }
        self.restore(*self.follower.taken().last().unwrap());
        self.programs.site.shipper(&["verify"]).success();
        self.tracker.take().unwrap().stop();
        for (disk, _) in DISKS {
            let journal = self.programs.site.journal(disk);
            run(Command::new(program("tracker"))
                .args(["journal", "verify"])
                .arg(journal))
            .success();
        }
        self.report.queued = self.queued.len() as u64;
        self.report.tally = checker.tally();
        self.report.writes = self.history.sent_count();
        Ok(())
    }
}

/// Has a folder and a file change places, so that there is no moment at which a folder could be made anew.
fn exchange(folder: &Path, file: &Path) {
    renameat2(
        AT_FDCWD,
        folder,
        AT_FDCWD,
        file,
        RenameFlags::RENAME_EXCHANGE,
    )
    .unwrap();
}

fn parse(point: &str) -> Epoch {
    Epoch(u64::from_str_radix(point, 16).expect("the number of a point"))
}

/// Epochs that are complete in the spool.
fn sealed(spool: &Path) -> Vec<Epoch> {
    let entries = fs::read_dir(spool).unwrap();
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let epochs = names
        .filter(|name| name.len() == 16)
        .map(|name| parse(&name));
    epochs.collect()
}
