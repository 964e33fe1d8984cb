//! Faults at the named places of the real programs: each place is visited with a wait, with a kill and, where
//! something can fail, with errors.
//!
//! The programs are those built with the feature `failpoints`; see `tracker/src/failpoint`. A visit brings a
//! machine to a place and holds a thread there, until whoever must not be held up has been answered; the
//! second time the process is killed there. Then it is started again, each acknowledged write must be on the
//! disk, and a recovery point of it, restored, must be equal to the disk.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "failpoints/copies.rs"]
mod copies;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::Signal;
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use serde_json::Value;
use tests::model::pattern;
use tests::nbd::{Client, Failure};
use tests::process::{Daemon, program_with_failpoints, run};
use tests::site::{Site, assert_same_sparse};
use tracker::journal::format::ALARM_OFFSET;

const MIB: u64 = 1 << 20;
const BLOCK_BYTES: u64 = 4096;
const REGION_BLOCKS: u64 = 256;
/// Sparse, and larger than what can be armed at once.
const DISK_BYTES: u64 = 512 * MIB;
/// Regions that are not armed together with those of the quiet block and of a burst.
const NEW_REGIONS: Range<u64> = 64..256;
/// What is changed at once, so much that it cannot be armed; nothing is ever written there.
const LONG: Range<u64> = 300 * MIB..400 * MIB;
/// The block of those who must not be held up.
const QUIET_BLOCK: u64 = 0;
/// Blocks that each need a record, enough of them that the smallest ring is folded, or full. It takes 384
/// records and is folded from 359 on; one that is full takes no more until it is folded.
const BURST: Burst = Burst {
    folds: 370,
    fills: 600,
};
const PATIENCE: Duration = Duration::from_secs(60);

struct Burst {
    folds: u64,
    fills: u64,
}

/// What brings a machine to a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// A write to a region that is armed.
    Write,
    /// A write to one that is not.
    NewRegion,
    /// Writes to more regions than can be armed.
    ManyRegions,
    /// A write and a FLUSH.
    Flush,
    /// A change of so many regions that it waits for a sync of the ring.
    Long,
    /// Writes until the ring is folded.
    Fold,
    /// Writes until the ring is full.
    Fill,
    /// A recovery point.
    Point,
    /// A recovery point of a journal with a checkpoint.
    FoldedPoint,
    /// A write to a block of an epoch that is closed.
    Overwrite,
    /// The disk grows.
    Grow,
    /// The disk grows so much that the checkpoint moves.
    GrowFar,
}

/// Who goes on while a thread is held at a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Others {
    /// Everybody who writes to armed regions.
    Writers,
    /// The other worker.
    Worker,
}

/// Places on the way of a guest's change; a worker is held.
const OF_WORKERS: &[(&str, Way)] = &[
    ("RecordAfterClaimBeforeFill", Way::Write),
    ("FillAfterMarkBeforeWords", Way::Write),
    ("FillAfterWordsBeforeSequence", Way::Write),
    ("RecordAfterRefusalBeforeAlarm", Way::Fill),
    ("AdmitAfterRecordBeforeMark", Way::Write),
    ("WriteAfterAdmissionBeforeData", Way::Write),
    ("WriteAfterWaitBeforeData", Way::NewRegion),
    ("WriteAfterDataBeforeReply", Way::Write),
    ("FlushAfterDataBeforeSync", Way::Flush),
];

/// Places up to which the data of a single write has not been submitted.
const BEFORE_DATA: &[&str] = &[
    "RecordAfterClaimBeforeFill",
    "FillAfterMarkBeforeWords",
    "FillAfterWordsBeforeSequence",
    "AdmitAfterRecordBeforeMark",
    "WriteAfterAdmissionBeforeData",
    "WriteAfterWaitBeforeData",
    "IntentAfterPlanBeforeWrite",
    "IntentAfterWriteBeforeDurable",
    "CopyAfterReadBeforeWrite",
    "CopyAfterWriteBeforeMark",
];

/// Places behind a guest's back: arming, the background sync and folding.
const OF_KEEPERS: &[(&str, Way)] = &[
    ("IntentAfterEvictionBeforePlan", Way::ManyRegions),
    ("IntentAfterPlanBeforeWrite", Way::NewRegion),
    ("IntentAfterWriteBeforeDurable", Way::NewRegion),
    ("IntentAfterArmBeforeNext", Way::NewRegion),
    ("ArmAfterCommitBeforeRelease", Way::NewRegion),
    ("SyncAfterEraBeforeStores", Way::Long),
    ("SyncAfterStoresBeforeDurable", Way::Long),
    ("SyncAfterDurableBeforeMark", Way::Long),
    ("FoldAfterScanBeforePages", Way::Fold),
    ("FoldAfterPageBeforeNext", Way::Fold),
    ("FoldAfterPagesBeforeSync", Way::Fold),
    ("FoldAfterPagesBeforePublish", Way::Fold),
    ("FoldAfterPublishBeforeSync", Way::Fold),
    ("FoldAfterSyncBeforeTail", Way::Fold),
];

/// Places of a cut, a seal and a commit.
const OF_POINTS: &[(&str, Way)] = &[
    ("PublishAfterMarkBeforeWords", Way::Point),
    ("PublishAmidWords", Way::Point),
    ("PublishAfterWordsBeforeMagic", Way::Point),
    ("UpdateAfterPublishBeforeSync", Way::Point),
    ("UpdateAfterSyncBeforeTail", Way::Point),
    ("UpdateAfterAlarmBeforePunch", Way::Point),
    ("CutAfterGatherBeforeAdvance", Way::Point),
    ("CutAfterSettleBeforeMaps", Way::Point),
    ("CutAfterAdvanceBeforeUpdate", Way::Point),
    ("MachineAfterDiskBeforeNext", Way::Point),
];

/// Places of a journal that is replaced; syncs fail on the way there.
const OF_REPLACEMENT: &[(&str, Way)] = &[
    ("ReplaceAfterBothBeforeCopy", Way::Point),
    ("ReplaceAfterCopyBeforeRename", Way::Point),
    ("ReplaceAfterRenameBeforeSwitch", Way::Point),
    ("ReplaceAfterSwitchBeforeFolder", Way::Point),
];

/// Places of a disk that grows.
const OF_GROWTH: &[(&str, Way)] = &[
    ("ResizeAfterFileBeforeJournal", Way::Grow),
    ("GrowAfterRoomBeforeRecord", Way::Grow),
    ("GrowAfterRecordBeforeSync", Way::Grow),
    ("GrowAfterRecordBeforePublish", Way::Grow),
    ("GrowAfterPublishBeforeSync", Way::Grow),
    ("ResizeAfterJournalBeforeSize", Way::Grow),
    ("GrowAfterCopyBeforeSync", Way::GrowFar),
    ("GrowAfterMoveBeforePunch", Way::GrowFar),
];

/// Places of every start.
const OF_STARTS: &[&str] = &[
    "RecoverAfterHolesBeforeSuspects",
    "RecoverAfterSuspectsBeforeSync",
    "RecoverAfterSyncBeforeChain",
    "RecoverAfterChainBeforePublish",
    "RecoverAfterFirstPublishBeforeSecond",
    "RecoverAfterSecondPublishBeforeGrow",
];

/// Places of a start after a power cut of which nothing is believed.
const OF_DISTRUST: &[&str] = &[
    "DistrustAfterPublishBeforeRing",
    "DistrustAfterRingBeforeSets",
];

/// Places of a clean end.
const OF_ENDS: &[&str] = &["CloseAfterSyncBeforePublish"];

/// Places of the shipper as it reads the journal.
const OF_READERS: &[(&str, Way)] = &[
    ("ReadAfterSuperblockBeforeRing", Way::Point),
    ("ReadAfterSeekBeforePage", Way::FoldedPoint),
];

/// Places at which something fails, as the tests below have it.
const FAILING: &[&str] = &[
    "WriteAfterAdmissionBeforeData",
    "FlushAfterDataBeforeSync",
    "IntentAfterPlanBeforeWrite",
    "IntentAfterWriteBeforeDurable",
    "SyncAfterStoresBeforeDurable",
    "UpdateAfterPublishBeforeSync",
    "FoldAfterScanBeforePages",
    "ReplaceAfterCopyBeforeRename",
    "ReplaceAfterSwitchBeforeFolder",
    "GrowAfterCopyBeforeSync",
    "CutAfterSettleBeforeMaps",
    "CopyAfterReadBeforeWrite",
];

/// A protected machine under the programs with failpoints.
struct Rig {
    site: Site,
    tracker: Option<Daemon>,
    shipper: Option<Daemon>,
    /// What each block may hold: tags, of which zero stands for zeroes.
    blocks: BTreeMap<u64, Vec<u32>>,
    tag: u32,
    pipes: u32,
    /// Where the next of the blocks that need a record lies.
    cursor: u64,
    /// Number of the next region that is not armed.
    region: u64,
    /// The last block that was to be written, and its tag.
    planned: Option<(u64, u32)>,
    left: Option<Child>,
}

/// Something that was begun and may be held.
enum Running {
    Guest(Guest),
    Command(Child),
}

impl Rig {
    fn new() -> Self {
        Self::with_disk(DISK_BYTES)
    }

    fn with_disk(size_bytes: u64) -> Self {
        let mut site = Site::new(&[("disk", size_bytes)]);
        site.tracker_arguments = [
            "--ring-size",
            "16KiB",
            "--intent-cap",
            "64MiB",
            "--workers",
            "2",
        ]
        .map(str::to_owned)
        .into();
        let mut rig = Self {
            site,
            tracker: None,
            shipper: None,
            blocks: BTreeMap::new(),
            tag: 0,
            pipes: 0,
            cursor: 0,
            region: 0,
            planned: None,
            left: None,
        };
        rig.start_tracker("");
        rig.write(&[QUIET_BLOCK]);
        rig.site.protect();
        rig.start_shipper("");
        rig
    }

    fn gate(&self) -> PathBuf {
        self.site.path("gate")
    }

    /// From now on the rules hold, or do not.
    fn set_gate(&self, open: bool) {
        match open {
            true => drop(File::create(self.gate()).unwrap()),
            false => fs::remove_file(self.gate()).unwrap(),
        }
    }

    /// The program with failpoints in the place of the other one.
    fn armed(&self, name: &str, like: &Command, rules: &str) -> Command {
        let mut command = Command::new(program_with_failpoints(name));
        command.args(like.get_args());
        command.env("TIDEMARK_FAILPOINTS", rules);
        command.env("TIDEMARK_FAILPOINTS_WHILE", self.gate());
        command
    }

    fn tracker_command(&self, rules: &str) -> Command {
        self.armed("tracker", &self.site.serve_command(), rules)
    }

    #[track_caller]
    fn start_tracker(&mut self, rules: &str) {
        let mut command = self.tracker_command(rules);
        self.tracker = Some(Daemon::start("tracker", &mut command));
    }

    #[track_caller]
    fn start_shipper(&mut self, rules: &str) {
        let mut command = self.armed("shipper", &self.site.shipper_command(&["run"]), rules);
        self.shipper = Some(Daemon::start("shipper", &mut command));
    }

    fn tracker(&self) -> &Daemon {
        self.tracker.as_ref().unwrap()
    }

    /// A shipper that finds its tracker at once, instead of one that looks for it now and then.
    fn restart(&mut self, rules: &str) {
        let old = [self.tracker.take(), self.shipper.take()];
        old.into_iter().flatten().for_each(Daemon::kill);
        self.start_tracker(rules);
        self.start_shipper("");
    }

    fn pipe(&mut self) -> PathBuf {
        self.pipes += 1;
        let path = self.site.path(&format!("pipe-{}", self.pipes));
        mkfifo(&path, Mode::S_IRWXU).unwrap();
        path
    }

    fn status(&self) -> Value {
        self.site.tracker_status()["machine"]["disks"][0].clone()
    }

    /// Waits until the status says so.
    #[track_caller]
    fn await_status(&self, what: &str, fits: impl Fn(&Value) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !fits(&self.status()) {
            assert!(Instant::now() < deadline, "{what}: {:#}", self.status());
        }
    }

    /// Blocks with what is to be written to them, which they may hold from now on.
    fn plan(&mut self, blocks: impl IntoIterator<Item = u64>) -> Vec<(u64, u32)> {
        let mut plan = Vec::new();
        for block in blocks {
            self.tag += 1;
            let may_hold = self.blocks.entry(block).or_insert_with(|| vec![0]);
            may_hold.push(self.tag);
            plan.push((block, self.tag));
            self.planned = Some((block, self.tag));
        }
        plan
    }

    fn acknowledge(&mut self, (block, tag): (u64, u32)) {
        self.blocks.insert(block, vec![tag]);
    }

    /// Writes now, which must not fail.
    #[track_caller]
    fn write(&mut self, blocks: &[u64]) {
        let plan = self.plan(blocks.iter().copied());
        let mut client = self.site.connect("disk");
        for (block, tag) in plan {
            send(&mut client, (block, tag)).unwrap();
            self.acknowledge((block, tag));
        }
        client.disconnect().unwrap();
    }

    /// So many blocks of the first regions, other ones than before.
    fn next_blocks(&mut self, count: u64) -> Vec<u64> {
        let room = 7 * REGION_BLOCKS;
        let first = self.cursor;
        self.cursor += count;
        let blocks = (first..first + count).map(|number| number % room);
        blocks.map(|block| REGION_BLOCKS + block).collect()
    }

    /// Blocks of so many regions that are not armed.
    fn new_regions(&mut self, count: u64) -> Vec<u64> {
        let first = self.region;
        self.region += count;
        // Not one behind the other, as a stream would have them.
        let regions = NEW_REGIONS.end - NEW_REGIONS.start;
        let number = |number| NEW_REGIONS.start + number * 7 % regions;
        (first..first + count)
            .map(|next| number(next) * REGION_BLOCKS)
            .collect()
    }

    /// Writes until the journal is folded.
    fn fold(&mut self) {
        // One that was full takes no records until it is found to have room.
        self.await_status("not full", |status| status["ring_overflowing"] == false);
        let before = self.status()["folds"].as_u64();
        let blocks = self.next_blocks(BURST.folds);
        self.write(&blocks);
        self.await_status("folded", |status| status["folds"].as_u64() > before);
    }

    fn begin(&mut self, way: Way) -> Running {
        let blocks = match way {
            Way::Write | Way::Flush | Way::Long => self.next_blocks(1),
            Way::NewRegion => self.new_regions(1),
            Way::ManyRegions => self.new_regions(20),
            Way::Fold => self.next_blocks(BURST.folds),
            Way::Fill => self.next_blocks(BURST.fills),
            Way::Overwrite => self.close_over_new_blocks(1).1,
            Way::Point => return self.begin_command("shipper", &["cut", "--config"]),
            Way::FoldedPoint => {
                self.fold();
                return self.begin_command("shipper", &["cut", "--config"]);
            }
            Way::Grow => return self.begin_growth("+1MiB"),
            Way::GrowFar => {
                let size = fs::metadata(self.site.image("disk")).unwrap().len();
                // Twice as much as it has is made room for in advance.
                return self.begin_growth(&format!("+{}", 3 * size));
            }
        };
        let plan = self.plan(blocks);
        Running::Guest(Guest::start(&self.site, plan, way))
    }

    fn begin_growth(&self, size: &str) -> Running {
        let mut command = Command::new(program_with_failpoints("tracker"));
        command.args(["resize", "disk", size, "--control"]);
        Running::Command(quiet(command.arg(self.site.control())))
    }

    fn begin_command(&self, name: &str, arguments: &[&str]) -> Running {
        let mut command = Command::new(program_with_failpoints(name));
        Running::Command(quiet(command.args(arguments).arg(self.site.config())))
    }

    /// Waits until it is done, or whoever carries it out is dead.
    fn finish(&mut self, running: Running, dead: impl Fn(&mut Self) -> bool) {
        match running {
            Running::Guest(guest) => {
                let (written, lost) = guest.finish();
                for written in written {
                    self.acknowledge(written);
                }
                let deadline = Instant::now() + PATIENCE;
                while lost && !dead(self) {
                    assert!(Instant::now() < deadline, "a guest lost its tracker");
                }
            }
            Running::Command(mut child) => {
                let deadline = Instant::now() + PATIENCE;
                while child.try_wait().unwrap().is_none() {
                    if dead(self) {
                        self.left = Some(child);
                        return;
                    }
                    assert!(Instant::now() < deadline, "a command does not end");
                    std::thread::yield_now();
                }
            }
        }
    }

    /// What was acknowledged is on the disk, and a recovery point of it is equal to it.
    #[track_caller]
    fn check(&mut self) {
        self.check_disk();
        let image = self.site.image("disk");
        let point = self.cut();
        let restored = self.site.restore(&point, "disk", "restored");
        assert_same_sparse(&image, &restored);
        fs::remove_file(restored).unwrap();
        if let Some(mut child) = self.left.take() {
            child.wait().unwrap();
        }
    }

    #[track_caller]
    fn check_disk(&mut self) {
        let image = File::open(self.site.image("disk")).unwrap();
        for (&block, may_hold) in &mut self.blocks {
            let mut bytes = vec![0; BLOCK_BYTES as usize];
            image
                .read_exact_at(&mut bytes, block * BLOCK_BYTES)
                .unwrap();
            let found = may_hold.iter().find(|&&tag| bytes == content(block, tag));
            let found = found.copied();
            let tag = found.unwrap_or_else(|| panic!("block {block} has none of {may_hold:?}"));
            *may_hold = vec![tag];
        }
    }

    #[track_caller]
    fn cut(&self) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let outcome = self.site.shipper(&["cut"]);
            if outcome.status.success() {
                return outcome.out.trim().to_owned();
            }
            assert!(Instant::now() < deadline, "no cut: {}", outcome.err);
        }
    }

    /// Both end in good order, and the journal is clean.
    #[track_caller]
    fn end(mut self) {
        self.shipper.take().unwrap().stop();
        self.tracker.take().unwrap().stop();
        let mut command = Command::new(program_with_failpoints("tracker"));
        command.args(["journal", "verify"]);
        run(command.arg(self.site.journal("disk"))).success();
    }
}

fn quiet(command: &mut Command) -> Child {
    let silent = command.stdin(Stdio::null()).stdout(Stdio::null());
    silent.stderr(Stdio::null()).spawn().unwrap()
}

fn content(block: u64, tag: u32) -> Vec<u8> {
    match tag {
        0 => vec![0; BLOCK_BYTES as usize],
        tag => pattern(tag, block * BLOCK_BYTES, BLOCK_BYTES),
    }
}

fn send(client: &mut Client, (block, tag): (u64, u32)) -> Result<(), Failure> {
    client.write(block * BLOCK_BYTES, &content(block, tag))
}

/// Whoever waits at a pipe goes on.
fn release(pipe: &Path) {
    drop(File::options().write(true).open(pipe).unwrap());
}

/// A thread that writes until it is done or has lost its tracker.
struct Guest(JoinHandle<(Vec<(u64, u32)>, bool)>);

impl Guest {
    fn start(site: &Site, plan: Vec<(u64, u32)>, way: Way) -> Self {
        let socket = site.socket();
        Self(std::thread::spawn(move || {
            let mut written = Vec::new();
            let Ok(mut client) = Client::unix(&socket, "disk") else {
                return (written, true);
            };
            for one in plan {
                match send(&mut client, one) {
                    Ok(()) => written.push(one),
                    Err(Failure::Lost(_)) => return (written, true),
                    Err(refused) => panic!("a write failed: {refused:?}"),
                }
            }
            let last = match way {
                Way::Flush => client.flush(),
                Way::Long => client.trim(LONG.start, (LONG.end - LONG.start) as u32),
                _ => Ok(()),
            };
            if let Err(Failure::Refused(error)) = last {
                panic!("refused: {error}");
            }
            (written, last.is_err())
        }))
    }

    /// What was acknowledged, and whether the tracker was lost.
    fn finish(self) -> (Vec<(u64, u32)>, bool) {
        self.0.join().unwrap()
    }
}

/// Two clients, of which each has a worker of its own.
struct Probes {
    clients: Vec<Client>,
}

impl Probes {
    /// A connection goes to the worker that has the fewest; once it was answered it is counted.
    fn new(site: &Site) -> Self {
        let mut clients = Vec::new();
        for _ in 0..2 {
            let mut client = site.connect("disk");
            client.read(0, 4096).unwrap();
            clients.push(client);
        }
        Self { clients }
    }

    /// Everybody who writes to an armed region is answered.
    fn all_write(self, rig: &mut Rig) {
        for mut client in self.clients {
            let plan = rig.plan([QUIET_BLOCK]);
            send(&mut client, plan[0]).expect("the write is not held up");
            rig.acknowledge(plan[0]);
        }
    }

    /// One of two workers is held; the other answers. Both do after the release.
    fn one_reads(self) -> (Receiver<()>, Vec<JoinHandle<()>>) {
        let (answered, answers) = channel();
        let mut threads = Vec::new();
        for mut client in self.clients {
            let answered = answered.clone();
            threads.push(std::thread::spawn(move || {
                // The tracker may be killed while it waits.
                if client.read(0, 4096).is_ok() {
                    let _not_awaited = answered.send(());
                }
            }));
        }
        answers.recv_timeout(PATIENCE).expect("the other worker");
        (answers, threads)
    }
}

/// Holds a thread at the place, then kills there. The rules in `also` lead to it.
fn visit(rig: &mut Rig, place: &str, way: Way, others: Others, also: &str) {
    println!("visit {place}");
    let pipe = rig.pipe();
    let at = pipe.display();
    rig.restart(&format!("{also}{place}@1x1=wait:{at};{place}@2=kill"));
    rig.check();
    rig.write(&[QUIET_BLOCK]);
    let probes = Probes::new(&rig.site);
    rig.set_gate(true);
    let mut running = rig.begin(way);
    let planned = rig.planned;
    rig.tracker()
        .await_text(&format!("Failpoint {place}: Wait"));
    let reading = match others {
        Others::Writers => {
            probes.all_write(rig);
            None
        }
        Others::Worker => Some(probes.one_reads()),
    };
    if BEFORE_DATA.contains(&place) {
        assert_nothing_written(rig, planned.unwrap());
    }
    release(&pipe);
    // Once more, if it was not killed by what followed.
    let deadline = Instant::now() + PATIENCE;
    loop {
        rig.finish(running, |rig| !rig.tracker.as_mut().unwrap().is_running());
        if !rig.tracker.as_mut().unwrap().is_running() {
            break;
        }
        let late = Instant::now() > deadline;
        assert!(!late, "{place} is not reached again");
        running = rig.begin(way);
    }
    for thread in reading.into_iter().flat_map(|(_, threads)| threads) {
        thread.join().unwrap();
    }
    let (status, log) = rig.tracker.take().unwrap().outcome(PATIENCE);
    assert_eq!(status.signal(), Some(Signal::SIGKILL as i32), "{log}");
    assert!(log.contains(&format!("Failpoint {place}: Kill")), "{log}");
    rig.set_gate(false);
}

/// What was planned last is held, and has not reached the disk.
fn assert_nothing_written(rig: &Rig, planned: (u64, u32)) {
    let (block, tag) = planned;
    let mut bytes = vec![0; BLOCK_BYTES as usize];
    let image = File::open(rig.site.image("disk")).unwrap();
    image
        .read_exact_at(&mut bytes, block * BLOCK_BYTES)
        .unwrap();
    assert!(
        bytes != content(block, tag),
        "block {block} was written too early"
    );
}

/// The last visit's machine comes back.
fn come_back(mut rig: Rig) {
    rig.restart("");
    rig.check();
    rig.end();
}

fn visit_all(places: &[(&str, Way)], others: Others, also: &str) {
    let mut rig = Rig::new();
    for &(place, way) in places {
        visit(&mut rig, place, way, others, also);
    }
    come_back(rig);
}

#[test]
fn workers_are_held_and_killed() {
    let mut rig = Rig::new();
    for &(place, way) in OF_WORKERS {
        // A ring that is not folded fills.
        let also = match way {
            Way::Fill => "FoldAfterScanBeforePages=error:ENOSPC;",
            _ => "",
        };
        visit(&mut rig, place, way, Others::Worker, also);
    }
    come_back(rig);
}

#[test]
fn arming_syncing_and_folding_are_held_and_killed() {
    visit_all(OF_KEEPERS, Others::Writers, "");
}

#[test]
fn points_are_held_and_killed() {
    visit_all(OF_POINTS, Others::Writers, "");
}

#[test]
fn replacements_are_held_and_killed() {
    let also = "UpdateAfterPublishBeforeSync=error:EIO;";
    visit_all(OF_REPLACEMENT, Others::Writers, also);
}

#[test]
fn growth_is_held_and_killed() {
    // It becomes many times as large.
    let mut rig = Rig::with_disk(64 * MIB);
    for &(place, way) in OF_GROWTH {
        visit(&mut rig, place, way, Others::Writers, "");
    }
    come_back(rig);
}

/// Holds a start at the place, then kills one there.
fn visit_start(rig: &mut Rig, place: &str, mut prepare: impl FnMut(&Rig)) {
    println!("visit {place}");
    if let Some(shipper) = rig.shipper.take() {
        shipper.kill();
    }
    let pipe = rig.pipe();
    prepare(rig);
    rig.set_gate(true);
    let mut command = rig.tracker_command(&format!("{place}=kill"));
    let (status, log) = Daemon::spawn("tracker", &mut command).outcome(PATIENCE);
    assert_eq!(status.signal(), Some(Signal::SIGKILL as i32), "{log}");
    assert!(log.contains(&format!("Failpoint {place}: Kill")), "{log}");
    prepare(rig);
    let mut command = rig.tracker_command(&format!("{place}@1x1=wait:{}", pipe.display()));
    let tracker = Daemon::spawn("tracker", &mut command);
    tracker.await_text(&format!("Failpoint {place}: Wait"));
    release(&pipe);
    tracker.await_text("Ready");
    rig.set_gate(false);
    rig.tracker = Some(tracker);
    rig.start_shipper("");
    rig.check();
    // Something that the next start has to find.
    let blocks = rig.next_blocks(20);
    rig.write(&blocks);
    rig.tracker.take().unwrap().kill();
}

#[test]
fn starts_are_held_and_killed() {
    let mut rig = Rig::new();
    rig.tracker.take().unwrap().kill();
    for place in OF_STARTS {
        visit_start(&mut rig, place, |rig| {
            // So that the journal has to follow.
            let image = File::options().write(true).open(rig.site.image("disk"));
            let image = image.unwrap();
            image
                .set_len(image.metadata().unwrap().len() + MIB)
                .unwrap();
        });
    }
    come_back(rig);
}

#[test]
fn starts_after_a_power_cut_are_held_and_killed() {
    let folder = tempfile::tempdir().unwrap();
    let boot = folder.path().join("boot");
    fs::write(&boot, boot_text(0)).unwrap();
    if let Err(errno) = cover_boot_id(&boot) {
        println!("left out, mounting is not allowed: {errno}");
        return;
    }
    let mut rig = Rig::new();
    rig.tracker.take().unwrap().kill();
    let mut boots = 0;
    for place in OF_DISTRUST {
        visit_start(&mut rig, place, |rig| {
            boots += 1;
            fs::write(&boot, boot_text(boots)).unwrap();
            let journal = File::options().write(true).open(rig.site.journal("disk"));
            let damage = [0x5a; 8];
            journal
                .unwrap()
                .write_all_at(&damage, ALARM_OFFSET)
                .unwrap();
        });
    }
    come_back(rig);
}

fn boot_text(number: u32) -> String {
    format!("00000000-0000-4000-8000-{number:012}\n")
}

/// Has this thread and what it starts see another boot id.
fn cover_boot_id(file: &Path) -> nix::Result<()> {
    let none = None::<&str>;
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    let id = "/proc/sys/kernel/random/boot_id";
    mount(Some(file), id, none, MsFlags::MS_BIND, none)
}

#[test]
fn ends_are_held_and_killed() {
    let mut rig = Rig::new();
    for place in OF_ENDS {
        let pipe = rig.pipe();
        rig.restart(&format!("{place}=wait:{}", pipe.display()));
        rig.check();
        rig.set_gate(true);
        rig.tracker().signal(Signal::SIGTERM);
        rig.tracker()
            .await_text(&format!("Failpoint {place}: Wait"));
        release(&pipe);
        let (status, log) = rig.tracker.take().unwrap().outcome(PATIENCE);
        assert!(status.success(), "{log}");
        rig.set_gate(false);
        rig.restart(&format!("{place}=kill"));
        rig.check();
        rig.set_gate(true);
        rig.tracker().signal(Signal::SIGTERM);
        let (status, log) = rig.tracker.take().unwrap().outcome(PATIENCE);
        assert_eq!(status.signal(), Some(Signal::SIGKILL as i32), "{log}");
        rig.set_gate(false);
    }
    come_back(rig);
}

/// The shipper is held and killed as it reads; the guest goes on.
#[test]
fn readers_are_held_and_killed() {
    let mut rig = Rig::new();
    for &(place, way) in OF_READERS {
        rig.check();
        let pipe = rig.pipe();
        let at = pipe.display().to_string();
        rig.shipper.take().unwrap().kill();
        rig.start_shipper(&format!("{place}@1x1=wait:{at};{place}@2=kill"));
        rig.write(&[QUIET_BLOCK]);
        rig.set_gate(true);
        let mut running = rig.begin(way);
        let shipper = rig.shipper.as_ref().unwrap();
        shipper.await_text(&format!("Failpoint {place}: Wait"));
        // Enough that the journal is folded under the reader.
        rig.fold();
        release(&pipe);
        loop {
            rig.finish(running, |rig| !rig.shipper.as_mut().unwrap().is_running());
            if !rig.shipper.as_mut().unwrap().is_running() {
                break;
            }
            running = rig.begin(way);
        }
        let (status, log) = rig.shipper.take().unwrap().outcome(PATIENCE);
        assert_eq!(status.signal(), Some(Signal::SIGKILL as i32), "{log}");
        rig.set_gate(false);
        rig.start_shipper("");
    }
    rig.check();
    rig.end();
}

/// A machine that fails as the rules say from now on.
fn fail(rig: &mut Rig, rules: &str) {
    println!("with {rules}");
    rig.restart(rules);
    rig.check();
    rig.write(&[QUIET_BLOCK]);
    rig.set_gate(true);
}

/// It is mended: the journal is safe, a point is whole, and the next start finds it clean.
fn mend(rig: &mut Rig) {
    rig.set_gate(false);
    rig.await_status("safe again", |status| status["power_cut_unsafe"] == false);
    let blocks = rig.new_regions(1);
    rig.write(&blocks);
    rig.check();
    rig.shipper.take().unwrap().stop();
    rig.tracker.take().unwrap().stop();
    let mut command = Command::new(program_with_failpoints("tracker"));
    command.args(["journal", "verify"]);
    run(command.arg(rig.site.journal("disk"))).success();
}

#[track_caller]
fn assert_refused(result: Result<(), Failure>, errno: u32) {
    assert!(
        matches!(result, Err(Failure::Refused(error)) if error == errno),
        "{result:?}"
    );
}

fn restart_cleanly(mut rig: Rig) {
    rig.restart("");
    rig.check();
    rig.end();
}

#[test]
fn what_the_disk_says_of_a_write_goes_to_the_guest() {
    let mut rig = Rig::new();
    for (name, errno) in [("EIO", 5), ("ENOSPC", 28)] {
        for times in ["@1x1", ""] {
            let rule = format!("WriteAfterAdmissionBeforeData{times}=error:{name}");
            fail(&mut rig, &rule);
            let before = rig.status()["open_dirty_blocks"].as_u64().unwrap();
            let blocks = rig.next_blocks(1);
            let plan = rig.plan(blocks);
            let mut client = rig.site.connect("disk");
            assert_refused(send(&mut client, plan[0]), errno);
            // It may have changed all the same.
            let after = rig.status()["open_dirty_blocks"].as_u64().unwrap();
            assert_eq!(after, before + 1);
            match times {
                "" => assert_refused(send(&mut client, plan[0]), errno),
                _ => {
                    send(&mut client, plan[0]).unwrap();
                    rig.acknowledge(plan[0]);
                }
            }
            assert_eq!(rig.status()["journal_replacements"], 0);
            mend(&mut rig);
        }
    }
    restart_cleanly(rig);
}

#[test]
fn after_a_failed_sync_of_the_disk_no_flush_succeeds() {
    let mut rig = Rig::new();
    for (name, errno, times) in [("EIO", 5, "@1x1"), ("ENOSPC", 28, "")] {
        fail(
            &mut rig,
            &format!("FlushAfterDataBeforeSync{times}=error:{name}"),
        );
        let mut client = rig.site.connect("disk");
        assert_refused(client.flush(), errno);
        rig.set_gate(false);
        assert_refused(client.flush(), 5);
        let blocks = rig.new_regions(1);
        rig.write(&blocks);
        assert!(rig.status()["resync"].is_u64(), "{:#}", rig.status());
        rig.check();
        rig.restart("");
        // What was written before is believed as far as it was compared.
        rig.site.connect("disk").flush().unwrap();
        rig.check();
        assert_eq!(rig.status()["resync"], Value::Null);
        rig.tracker.take().unwrap().kill();
    }
    come_back(rig);
}

/// The places at which the journal cannot be written, and what leads there.
const OF_JOURNALS: &[(&str, Way)] = &[
    ("IntentAfterPlanBeforeWrite", Way::NewRegion),
    ("IntentAfterWriteBeforeDurable", Way::NewRegion),
    ("SyncAfterStoresBeforeDurable", Way::Long),
    ("UpdateAfterPublishBeforeSync", Way::Point),
];

#[test]
fn a_journal_that_fails_once_is_replaced() {
    let mut rig = Rig::new();
    for &(place, way) in OF_JOURNALS {
        for error in ["EIO", "ENOSPC"] {
            fail(&mut rig, &format!("{place}@1x1=error:{error}"));
            let running = rig.begin(way);
            rig.finish(running, |_| false);
            rig.await_status("replaced", |status| status["journal_replacements"] == 1);
            assert_eq!(rig.status()["power_cut_unsafe"], false);
            mend(&mut rig);
        }
    }
    restart_cleanly(rig);
}

/// While nothing can be written durably, guests go on and the status says so.
#[test]
fn a_journal_that_always_fails_holds_up_nobody() {
    let mut rig = Rig::new();
    let failing = [
        ("IntentAfterPlanBeforeWrite=error:EIO", Way::NewRegion),
        ("IntentAfterWriteBeforeDurable=error:ENOSPC", Way::NewRegion),
        ("SyncAfterStoresBeforeDurable=error:EIO", Way::Long),
        (
            "SyncAfterStoresBeforeDurable@1x1=error:EIO;ReplaceAfterCopyBeforeRename=error:ENOSPC",
            Way::Long,
        ),
        (
            "SyncAfterStoresBeforeDurable@1x1=error:EIO;ReplaceAfterSwitchBeforeFolder=error:EIO",
            Way::Long,
        ),
        (
            "IntentAfterPlanBeforeWrite@1x1=error:EIO;ReplaceAfterSwitchBeforeFolder@1x1=error:EIO",
            Way::NewRegion,
        ),
    ];
    for (rules, way) in failing {
        fail(&mut rig, rules);
        let running = rig.begin(way);
        rig.finish(running, |_| false);
        rig.tracker()
            .await_text("Cannot put a new journal in the place of");
        if !rules.contains("BeforeFolder@1x1") {
            rig.await_status("unsafe", |status| status["power_cut_unsafe"] == true);
        }
        let mut blocks = rig.new_regions(3);
        blocks.extend(rig.next_blocks(50));
        rig.write(&blocks);
        rig.set_gate(false);
        // Nothing but a file that is whole and has a durable name makes up for it.
        rig.await_status("replaced", |status| status["journal_replacements"] == 1);
        rig.set_gate(true);
        mend(&mut rig);
    }
    restart_cleanly(rig);
}

#[test]
fn what_cannot_be_folded_is_kept_coarsely() {
    let mut rig = Rig::new();
    for rules in [
        "FoldAfterScanBeforePages=error:ENOSPC",
        "FoldAfterScanBeforePages=error:EIO",
    ] {
        fail(&mut rig, rules);
        let running = rig.begin(Way::Fill);
        rig.finish(running, |_| false);
        rig.await_status("full", |status| status["ring_overflowing"] == true);
        assert_eq!(rig.status()["folds"], 0);
        rig.set_gate(false);
        rig.await_status("folded", |status| {
            status["folds"].as_u64() > Some(0) && status["ring_overflowing"] == false
        });
        rig.set_gate(true);
        mend(&mut rig);
    }
    fail(&mut rig, "FoldAfterScanBeforePages@1x1=error:EIO");
    let running = rig.begin(Way::Fold);
    rig.finish(running, |_| false);
    rig.await_status("folded", |status| status["folds"].as_u64() > Some(0));
    mend(&mut rig);
    restart_cleanly(rig);
}

#[test]
fn a_growth_that_fails_is_made_up_for() {
    let mut rig = Rig::new();
    for times in ["@1x1", ""] {
        fail(
            &mut rig,
            &format!("GrowAfterCopyBeforeSync{times}=error:ENOSPC"),
        );
        let before = rig.site.connect("disk").size_bytes();
        let grow = |size: &str| {
            let mut command = Command::new(program_with_failpoints("tracker"));
            command.args(["resize", "disk", size, "--control"]);
            run(command.arg(rig.site.control()))
        };
        let said = grow(&format!("+{}", 2 * before)).failure();
        assert!(said.contains("Cannot make room in journal"), "{said}");
        assert_eq!(rig.site.connect("disk").size_bytes(), before);
        rig.set_gate(false);
        grow(&(3 * before).to_string()).success();
        assert_eq!(rig.site.connect("disk").size_bytes(), 3 * before);
        rig.set_gate(true);
        mend(&mut rig);
    }
    restart_cleanly(rig);
}

#[test]
fn starts_and_ends_whose_syncs_fail_say_so() {
    let mut rig = Rig::new();
    let rules = "SyncAfterStoresBeforeDurable=error:EIO";
    fail(&mut rig, rules);
    rig.tracker().signal(Signal::SIGTERM);
    let (status, log) = rig.tracker.take().unwrap().outcome(PATIENCE);
    assert!(
        status.code() == Some(1) && log.contains("Cannot sync journal"),
        "{log}"
    );
    let mut command = rig.tracker_command(rules);
    let (status, log) = Daemon::spawn("tracker", &mut command).outcome(PATIENCE);
    assert!(
        status.code() == Some(1) && log.contains("Cannot sync journal"),
        "{log}"
    );
    rig.set_gate(false);
    rig.restart("");
    rig.check();
    fail(&mut rig, "SyncAfterStoresBeforeDurable@1x1=error:ENOSPC");
    rig.tracker().signal(Signal::SIGTERM);
    let (status, log) = rig.tracker.take().unwrap().outcome(PATIENCE);
    assert!(
        status.success() && log.contains("another file takes its place"),
        "{log}"
    );
    rig.set_gate(false);
    restart_cleanly(rig);
}

/// The names after this word, up to the full stop.
fn listed<'a>(said: &'a str, after: &str) -> BTreeSet<&'a str> {
    let (_, rest) = said.split_once(after).unwrap();
    let (names, _) = rest.split_once('.').unwrap();
    names.split_whitespace().collect()
}

#[test]
fn every_place_is_visited() {
    let mut command = Command::new(program_with_failpoints("tracker"));
    command.args(["journal", "verify", "none"]);
    let said = run(command.env("TIDEMARK_FAILPOINTS", "Nowhere=kill")).failure();
    let ways = [
        OF_WORKERS,
        OF_KEEPERS,
        OF_POINTS,
        copies::OF_COPIES,
        OF_REPLACEMENT,
        OF_GROWTH,
        OF_READERS,
    ];
    let mut visited: BTreeSet<&str> = [OF_STARTS, OF_DISTRUST, OF_ENDS]
        .concat()
        .into_iter()
        .collect();
    visited.extend(ways.concat().iter().map(|(place, _)| place));
    assert_eq!(visited, listed(&said, "Places:"));
    assert_eq!(
        FAILING.iter().copied().collect::<BTreeSet<_>>(),
        listed(&said, "Those that can fail:")
    );
}

#[test]
fn rules_that_are_not_understood_end_the_program() {
    for (rules, why) in [
        ("CutAfterGatherBeforeAdvance", "no action"),
        ("CutAfterGatherBeforeAdvance=drop", "no such action"),
        ("CutAfterGatherBeforeAdvance=wait:", "no such action"),
        (
            "CutAfterGatherBeforeAdvance=error:EIO",
            "nothing can fail there",
        ),
        ("CutAfterGatherBeforeAdvance@first=kill", "no such numbers"),
        ("CutAfterGatherBeforeAdvance@1x=kill", "no such numbers"),
        (
            "CutAfterGatherBeforeAdvance=kill;Nowhere=kill",
            "no such place",
        ),
    ] {
        for name in ["tracker", "shipper"] {
            let mut command = Command::new(program_with_failpoints(name));
            command.args(["status", "--json"]);
            match name {
                "tracker" => command.args(["--control", "none"]),
                _ => command.args(["--config", "none"]),
            };
            let said = run(command.env("TIDEMARK_FAILPOINTS", rules)).failure();
            let says = said.contains("TIDEMARK_FAILPOINTS") && said.contains(why);
            assert!(
                says && said.contains("MachineAfterDiskBeforeNext"),
                "{said}"
            );
        }
    }
}
