//! Power cuts: disks, journals and the shipper's state lie on storage that forgets what was not
//! synced, and again and again the power goes for tracker, shipper and storage at once.
//!
//! After each cut the tracker must start by itself, on the journal that it had; the disks must hold what
//! was promised, that is every write acknowledged before an acknowledged FLUSH or with FUA, unless
//! something later was written over it; and the next recovery point, restored, must equal the disks:
//! what the tracker forgot, or the shipper believed too early, is missing in it. The vault is far away
//! and keeps its power.
//!
//! The moment of a cut is a number of answers or a number of requests to the storage. A seed
//! replays loads, moments and what survives, though not how threads interleave. `ROUNDS=` sets
//! another number of rounds.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tests::model::{Change, SECTOR_BYTES, pattern};
use tests::nbd::{Client, command};
use tests::power::promises::{Promises, Sent};
use tests::power::{Fate, Machine, with_machine};
use tests::process::{Daemon, program, require, run};
use tests::seed::Random;
use tests::site::{Site, assert_same_sparse, data_ranges, files_below};

const MIB: u64 = 1 << 20;
/// Rounds of each world.
const ROUNDS: u64 = 12;
/// Time for answers to come, for the storage to reach a moment, and for a cut to succeed.
const PATIENCE: Duration = Duration::from_secs(60);

/// What sets one world apart from another.
#[derive(Clone, Copy)]
struct Plan {
    test: &'static str,
    disks: &'static [(&'static str, u64)],
    interval: &'static str,
    ring_size: &'static str,
    /// More arguments of the tracker.
    arguments: &'static [&'static str],
    /// Whether fio is the client.
    fio: bool,
}

const PLAN: Plan = Plan {
    test: "",
    disks: &[("disk", 32 * MIB)],
    interval: "1h",
    ring_size: "16KiB",
    arguments: &[],
    fio: false,
};

#[test]
fn a_tiny_ring_and_points_made_by_hand() {
    world(Plan {
        test: "a_tiny_ring_and_points_made_by_hand",
        ..PLAN
    });
}

#[test]
fn a_large_ring_and_points_all_the_time() {
    world(Plan {
        test: "a_large_ring_and_points_all_the_time",
        ring_size: "4MiB",
        interval: "50ms",
        ..PLAN
    });
}

#[test]
fn three_disks_with_odd_sizes() {
    world(Plan {
        test: "three_disks_with_odd_sizes",
        disks: &[
            ("first", 24 * MIB + 512),
            ("second", 16 * MIB + 3584),
            ("third", 8 * MIB),
        ],
        ring_size: "256KiB",
        interval: "200ms",
        ..PLAN
    });
}

#[test]
fn writes_all_over_a_sparse_disk() {
    world(Plan {
        test: "writes_all_over_a_sparse_disk",
        disks: &[("disk", 2 << 30)],
        ring_size: "1MiB",
        interval: "400ms",
        arguments: &["--intent-cap", "64MiB"],
        ..PLAN
    });
}

#[test]
fn past_the_page_cache() {
    world(Plan {
        test: "past_the_page_cache",
        disks: &[("first", 24 * MIB), ("second", 24 * MIB)],
        ring_size: "64KiB",
        interval: "300ms",
        arguments: &["--direct"],
        ..PLAN
    });
}

#[test]
fn fio_with_syncs() {
    require(&["fio"]);
    world(Plan {
        test: "fio_with_syncs",
        disks: &[("disk", 64 * MIB)],
        ring_size: "64KiB",
        fio: true,
        ..PLAN
    });
}

struct Disk {
    name: &'static str,
    promises: Arc<Mutex<Promises>>,
}

struct World<'a> {
    machine: &'a mut Machine,
    plan: Plan,
    site: Site,
    disks: Vec<Disk>,
    random: Random,
    tags: Arc<AtomicU32>,
    tracker: Option<Daemon>,
    shipper: Option<Daemon>,
    /// A recovery point with copies of the disks as they were.
    kept: Option<String>,
}

fn world(plan: Plan) {
    with_machine(move |machine| {
        let rounds = std::env::var("ROUNDS").map_or(ROUNDS, |text| text.parse().expect("a number"));
        let mut world = World::new(machine, plan);
        world.fill();
        world.site.protect();
        world.shipper = Some(world.site.start_shipper());
        for round in 0..rounds {
            let begin = Instant::now();
            let what = world.round(round);
            println!("round {round}: {what}, {:?}", begin.elapsed());
        }
        world.last();
    });
}

impl<'a> World<'a> {
    fn new(machine: &'a mut Machine, plan: Plan) -> Self {
        let mut site = Site::new_on(&machine.storage(), plan.disks);
        site.interval = plan.interval.to_owned();
        site.tracker_arguments = vec!["--ring-size".into(), plan.ring_size.into()];
        let more = plan.arguments.iter().map(|word| (*word).to_owned());
        site.tracker_arguments.extend(more);
        for (name, _) in plan.disks {
            File::open(site.image(name)).unwrap().sync_all().unwrap();
        }
        File::open(machine.storage()).unwrap().sync_all().unwrap();
        let disk = |(name, size): &(&'static str, u64)| Disk {
            name,
            promises: Arc::new(Mutex::new(Promises::new(*size))),
        };
        Self {
            tracker: Some(site.start_tracker()),
            shipper: None,
            disks: plan.disks.iter().map(disk).collect(),
            random: Random::from_environment(plan.test),
            tags: Arc::new(AtomicU32::new(1)),
            kept: None,
            machine,
            plan,
            site,
        }
    }

    /// Something for the first copy, of which half is synced.
    fn fill(&mut self) {
        for disk in &self.disks {
            let mut client = self.site.connect(disk.name);
            let mut promises = disk.promises.lock().unwrap();
            for index in 0..8 {
                let tag = self.tags.fetch_add(1, Ordering::Relaxed);
                let offset = self.random.below(promises.size_bytes() / MIB) * MIB;
                let sent = promises.send(Change::Write(tag), offset, MIB);
                client.write(offset, &pattern(tag, offset, MIB)).unwrap();
                promises.answered(&sent, false);
                if index == 4 {
                    let flush = promises.send_flush();
                    client.flush().unwrap();
                    promises.flushed(flush);
                }
            }
            client.disconnect().unwrap();
        }
    }

    fn round(&mut self, round: u64) -> String {
        let point = match self.random.below(4) {
            0 => Some(self.site.cut_soon(&format!("round {round}"))),
            _ => None,
        };
        let load = Load::start(self);
        let background = self.random.chance(1, 3).then(|| self.background_cut());
        let mut what = self.cut_power(&load, point.is_some());
        if let Some(background) = background {
            end(background);
            what.push_str(", during a cut");
        }
        let asked = self.finish(load);
        self.power_on();
        while self.random.chance(1, 3) {
            what.push_str(&self.cut_power_while_starting());
        }
        self.start_tracker(round);
        if self.random.chance(1, 8) {
            // A tracker that starts after a power cut and does nothing, then another one.
            self.tracker.take().unwrap().kill();
            self.machine.power_off();
            self.power_on();
            self.start_tracker(round);
            what.push_str(", again while idle");
        }
        self.check_images(round);
        self.shipper = Some(self.site.start_shipper());
        self.check_recovery(round);
        format!("{what}; {asked}")
    }

    /// Waits for a random moment and cuts the power of all.
    fn cut_power(&mut self, load: &Load, soon: bool) -> String {
        let requests = self.random.chance(1, 2);
        let moment = match self.random.below(4) {
            _ if soon => self.random.below(12),
            // So many come from fio alone.
            _ if self.plan.fio => self.random.between(300, 1500),
            0 => self.random.below(6),
            _ if requests => self.random.below(1500),
            _ => self.random.below(600),
        };
        let tracker_first = self.random.chance(1, 2);
        let mut programs = vec![self.tracker.take().unwrap(), self.shipper.take().unwrap()];
        if !tracker_first {
            programs.reverse();
        }
        let soon = if soon { "soon after a point, " } else { "" };
        if requests || self.plan.fio {
            self.machine.freeze_after(moment);
            let is_frozen = self.machine.await_frozen(PATIENCE);
            assert!(is_frozen, "the storage is idle:\n{}", programs[0].log());
            self.stop_at_once(programs);
            return format!("{soon}power cut at request {moment} of the storage");
        }
        let journals: Vec<PathBuf> = self
            .disks
            .iter()
            .map(|d| self.site.journal(d.name))
            .collect();
        for _ in 0..moment {
            load.await_answer();
            if self.random.chance(1, 64) {
                let which = self.random.below(journals.len() as u64) as usize;
                self.machine.write_back(&journals[which]);
            }
        }
        if self.random.chance(1, 2) {
            self.machine.freeze();
            self.stop_at_once(programs);
        } else {
            // What they stored to mappings is written back before the power goes, or not: then it
            // is the storage that chooses.
            for program in programs {
                program.kill();
            }
            self.machine.power_off();
        }
        format!("{soon}power cut after {moment} answers")
    }

    /// The storage is frozen: nothing happens any more, and nobody may wait for its answers.
    fn stop_at_once(&mut self, programs: Vec<Daemon>) {
        for program in &programs {
            program.signal(Signal::SIGKILL);
        }
        self.machine.power_off();
        for program in programs {
            program.kill();
        }
    }

    fn power_on(&mut self) {
        let mut random = self.random.fork();
        self.machine.power_on(Fate::Mixed(&mut random));
    }

    /// The power goes again while the tracker starts.
    fn cut_power_while_starting(&mut self) -> String {
        let moment = self.random.below(60);
        self.machine.freeze_after(moment);
        let mut tracker = self
            .site
            .serve_command()
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let (ready, is_ready) = channel();
        let mut lines = BufReader::new(tracker.stdout.take().unwrap()).lines();
        let reader = std::thread::spawn(move || {
            // Until it ends; the first line is the one that counts.
            while let Some(Ok(line)) = lines.next() {
                let _not_awaited = ready.send(line.starts_with("Ready"));
            }
        });
        let begin = Instant::now();
        while !self.machine.await_frozen(Duration::from_millis(1)) {
            match is_ready.try_recv() {
                Ok(true) => break,
                Ok(false) => {}
                Err(_) => assert!(
                    begin.elapsed() < PATIENCE && tracker.try_wait().unwrap().is_none(),
                    "a tracker does not start after a power cut"
                ),
            }
        }
        self.machine.freeze();
        let _gone = tracker.kill();
        self.machine.power_off();
        tracker.wait().unwrap();
        reader.join().unwrap();
        self.power_on();
        format!(", again at request {moment} of a start")
    }

    /// It must start on the journals that it had.
    fn start_tracker(&mut self, round: u64) {
        let tracker = self.site.start_tracker();
        let log = tracker.log();
        assert!(
            !log.contains(": new,"),
            "round {round}: a new journal\n{log}"
        );
        let aside = files_below(&self.machine.storage())
            .into_iter()
            .find(|path| path.to_string_lossy().contains(".broken"));
        assert_eq!(aside, None, "round {round}: a journal was set aside\n{log}");
        self.tracker = Some(tracker);
    }

    fn background_cut(&self) -> Child {
        self.site
            .shipper_command(&["cut"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap()
    }

    /// Ends the load, whose server is gone; how much was promised.
    fn finish(&self, load: Load) -> String {
        load.stop();
        if self.plan.fio {
            return "fio".to_owned();
        }
        let mut told = Vec::new();
        for disk in &self.disks {
            let promises = disk.promises.lock().unwrap();
            let (open, flushes) = (promises.open_sectors(), promises.flushes());
            told.push(format!(
                "{}: {open} sectors open, {flushes} flushes",
                disk.name
            ));
        }
        told.join(", ")
    }

    fn check_images(&self, round: u64) {
        if self.plan.fio {
            return;
        }
        for disk in &self.disks {
            let path = self.site.image(disk.name);
            let mut promises = disk.promises.lock().unwrap();
            let file = File::open(&path).unwrap();
            if let Err(wrong) = check(&promises, &path, &file) {
                panic!("round {round}, disk {}: {wrong}", disk.name);
            }
            promises.settle(|offset| {
                let mut bytes = vec![0; SECTOR_BYTES as usize];
                file.read_exact_at(&mut bytes, offset).unwrap();
                bytes
            });
        }
    }

    fn check_recovery(&mut self, round: u64) {
        let point = self.site.cut_soon(&format!("round {round}"));
        for disk in &self.disks {
            let restored = self.site.restore(&point, disk.name, "restored");
            assert_same_sparse(&self.site.image(disk.name), &restored);
            fs::remove_file(restored).unwrap();
        }
        if round % 8 == 3 {
            self.check_kept();
            for disk in &self.disks {
                copy(&self.site.image(disk.name), &self.kept_copy(disk.name));
            }
            self.kept = Some(point);
        }
    }

    fn kept_copy(&self, disk: &str) -> PathBuf {
        self.site.path(&format!("{disk}.kept"))
    }

    /// An old recovery point still is what it was.
    fn check_kept(&self) {
        let Some(point) = &self.kept else { return };
        for disk in &self.disks {
            let restored = self.site.restore(point, disk.name, "restored-kept");
            assert_same_sparse(&self.kept_copy(disk.name), &restored);
            fs::remove_file(restored).unwrap();
        }
    }

    fn last(mut self) {
        self.check_kept();
        self.site.shipper(&["verify", "--data"]).success();
        let points = self.site.points();
        assert!(points.is_sorted(), "{points:?}");
        self.shipper.take().unwrap().stop();
        self.tracker.take().unwrap().stop();
        for disk in &self.disks {
            run(Command::new(program("tracker"))
                .args(["journal", "verify"])
                .arg(self.site.journal(disk.name)))
            .success();
        }
    }
}

/// Copies the data of a sparse file.
fn copy(from: &Path, to: &Path) {
    let (from_file, to_file) = (File::open(from).unwrap(), File::create(to).unwrap());
    to_file
        .set_len(from_file.metadata().unwrap().len())
        .unwrap();
    for (begin, end) in data_ranges(from) {
        let mut bytes = vec![0; (end - begin) as usize];
        from_file.read_exact_at(&mut bytes, begin).unwrap();
        to_file.write_all_at(&bytes, begin).unwrap();
    }
}

/// Compares an image with what was promised.
fn check(promises: &Promises, path: &Path, file: &File) -> Result<(), String> {
    let mut buffer = vec![0; MIB as usize];
    let mut checked = 0;
    for (begin, end) in data_ranges(path) {
        promises.check_hole(checked, begin)?;
        for offset in (begin..end).step_by(MIB as usize) {
            let bytes = &mut buffer[..MIB.min(end - offset) as usize];
            file.read_exact_at(bytes, offset).unwrap();
            promises.check(offset, bytes)?;
        }
        checked = end;
    }
    promises.check_hole(checked, promises.size_bytes())
}

/// Ends a command of which nothing is expected but that.
fn end(mut child: Child) {
    let _gone = kill(Pid::from_raw(child.id() as i32), Signal::SIGKILL);
    child.wait().unwrap();
}

/// Requests in flight: several connections of ours with promises noted, or fio.
struct Load {
    stop: Arc<AtomicBool>,
    answers: Receiver<()>,
    threads: Vec<JoinHandle<()>>,
    fio: Option<Child>,
}

impl Load {
    fn start(world: &mut World<'_>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (answered, answers) = channel();
        let mut threads = Vec::new();
        let mut fio = None;
        if world.plan.fio {
            fio = Some(start_fio(world));
        } else {
            for index in 0..world.random.between(1, 4) as usize {
                let mut writer = Writer::new(world, index, answered.clone());
                let depth = match world.random.below(4) {
                    0 => 1,
                    _ => world.random.between(1, 24) as usize,
                };
                let stop = Arc::clone(&stop);
                threads.push(std::thread::spawn(move || writer.work(&stop, depth)));
            }
        }
        Self {
            stop,
            answers,
            threads,
            fio,
        }
    }

    fn await_answer(&self) {
        self.answers.recv_timeout(PATIENCE).expect("an answer");
    }

    fn stop(self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads {
            thread.join().expect("a writer");
        }
        if let Some(fio) = self.fio {
            end(fio);
        }
    }
}

fn start_fio(world: &mut World<'_>) -> Child {
    let random = &mut world.random;
    let pattern = ["randwrite", "write", "randrw"][random.below(3) as usize];
    let block = ["512", "4k", "4k-64k"][random.below(3) as usize];
    Command::new("fio")
        .args([
            "--name=power",
            "--ioengine=nbd",
            "--time_based",
            "--runtime=1h",
        ])
        .arg(format!("--uri={}", world.site.uri(world.disks[0].name)))
        .arg(format!("--rw={pattern}"))
        .arg(format!("--bs={block}").replace("--bs=4k-64k", "--bsrange=4k-64k"))
        .arg(format!("--fsync={}", random.between(1, 16)))
        .arg(format!("--iodepth={}", random.between(1, 32)))
        .arg(format!("--randseed={}", random.below(1 << 32)))
        .args(["--randrepeat=0", "--refill_buffers"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

enum Asked {
    Change(Sent, bool),
    Flush(u64),
}

struct Writer {
    client: Client,
    promises: Arc<Mutex<Promises>>,
    random: Random,
    tags: Arc<AtomicU32>,
    in_flight: HashMap<u64, Asked>,
    answered: Sender<()>,
    /// Unit of offsets and lengths.
    unit: u64,
    /// One of so many requests is a FLUSH.
    flush_every: u64,
}

impl Writer {
    fn new(world: &mut World<'_>, index: usize, answered: Sender<()>) -> Self {
        let disk = &world.disks[index % world.disks.len()];
        Self {
            client: world.site.connect(disk.name),
            promises: Arc::clone(&disk.promises),
            flush_every: [4, 20, 100][world.random.below(3) as usize],
            random: world.random.fork(),
            tags: Arc::clone(&world.tags),
            in_flight: HashMap::new(),
            answered,
            unit: if world.plan.arguments.contains(&"--direct") {
                4096
            } else {
                SECTOR_BYTES
            },
        }
    }

    /// Until told to stop, when all answers are awaited, or until the connection is lost.
    fn work(&mut self, stop: &AtomicBool, depth: usize) {
        loop {
            let stopping = stop.load(Ordering::Relaxed);
            if stopping && self.in_flight.is_empty() {
                return;
            }
            if !stopping && self.in_flight.len() < depth {
                if self.send().is_err() {
                    return;
                }
                continue;
            }
            let Ok(reply) = self.client.receive() else {
                return;
            };
            assert_eq!(reply.error, 0, "a valid request was refused");
            let mut promises = self.promises.lock().unwrap();
            match self.in_flight.remove(&reply.cookie) {
                Some(Asked::Change(sent, fua)) => promises.answered(&sent, fua),
                Some(Asked::Flush(sent)) => promises.flushed(sent),
                None => panic!("an answer to nothing"),
            }
            drop(promises);
            let _not_awaited = self.answered.send(());
        }
    }

    fn send(&mut self) -> std::io::Result<()> {
        if self.random.chance(1, self.flush_every) {
            let sent = self.promises.lock().unwrap().send_flush();
            let cookie = self.client.submit(0, command::FLUSH, 0, 0, &[])?;
            self.in_flight.insert(cookie, Asked::Flush(sent));
            return Ok(());
        }
        let size = self.promises.lock().unwrap().size_bytes();
        // Half of the requests go to a sixteenth of the disk, so that blocks are overwritten often.
        let area = if self.random.chance(1, 2) {
            size / 16
        } else {
            size
        };
        let unit = if self.random.chance(1, 3) {
            self.unit
        } else {
            4096
        };
        let offset = self.random.below(area / unit) * unit;
        let fua = self.random.chance(1, 16);
        let flags = if fua { command::FUA } else { 0 };
        let (number, change, units_max) = match self.random.below(20) {
            0 | 1 => (command::TRIM, Change::Trim, 128),
            2 | 3 => (command::WRITE_ZEROES, Change::Zero, 128),
            _ => {
                let tag = self.tags.fetch_add(1, Ordering::Relaxed);
                (command::WRITE, Change::Write(tag), 24)
            }
        };
        let length = (self.random.between(1, units_max) * unit).min((size - offset) / unit * unit);
        let payload = match change {
            Change::Write(tag) => pattern(tag, offset, length),
            _ => Vec::new(),
        };
        let sent = self.promises.lock().unwrap().send(change, offset, length);
        let cookie = self
            .client
            .submit(flags, number, offset, length as u32, &payload)?;
        self.in_flight.insert(cookie, Asked::Change(sent, fua));
        Ok(())
    }
}
