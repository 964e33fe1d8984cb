//! Nothing lost: random changes from several connections, SIGKILL of tracker, shipper or both at a
//! random moment, restart, cut, restore, compare with a model of what was acknowledged.
//!
//! Each round ends with a comparison of the images with the model, and of the restored disks with the
//! images. The moment of a kill is a random number of acknowledged requests, so that a seed replays the
//! same load, though not the same interleaving. `WORLDS=` and `ROUNDS=` set other numbers of worlds of each
//! kind and of rounds in each of them.
//!
//! A restore reads the directories of all segments, so a world that grows old is a slow one: there are many
//! of them, and each has disks that are small enough to be compared in every round.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tests::model::{Change, Model, SECTOR_BYTES, Sent, pattern};
use tests::nbd::{Client, command};
use tests::process::{Daemon, program, run};
use tests::seed::Random;
use tests::site::{Site, assert_same, for_each_chunk};

const MIB: u64 = 1 << 20;
/// Worlds of each of the four kinds, and rounds of each world: a thousand rounds in all.
const WORLDS: u64 = 5;
const ROUNDS: u64 = 50;
/// Time for acknowledgements to come, and for a cut to succeed after a restart.
const PATIENCE: Duration = Duration::from_secs(60);

struct Disk {
    name: &'static str,
    model: Arc<Mutex<Model>>,
}

struct World {
    site: Site,
    disks: Vec<Disk>,
    random: Random,
    tags: Arc<AtomicU32>,
    tracker: Option<Daemon>,
    shipper: Option<Daemon>,
    /// A recovery point with copies of the disks as they were.
    kept: Option<String>,
}

#[test]
fn one_disk_cuts_by_hand() {
    worlds(
        "one_disk_cuts_by_hand",
        &[("disk", 16 * MIB)],
        "1h",
        "64MiB",
    );
}

#[test]
fn one_disk_cut_all_the_time() {
    worlds(
        "one_disk_cut_all_the_time",
        &[("disk", 16 * MIB)],
        "50ms",
        "1MiB",
    );
}

#[test]
fn a_tiny_ring_folds_all_the_time() {
    worlds(
        "a_tiny_ring_folds_all_the_time",
        &[("disk", 24 * MIB)],
        "200ms",
        "16KiB",
    );
}

#[test]
fn two_disks_with_odd_sizes() {
    let disks = [("first", 12 * MIB + 512), ("second", 8 * MIB + 3584)];
    worlds("two_disks_with_odd_sizes", &disks, "200ms", "256KiB");
}

/// A number from the environment, or the usual one.
fn setting(name: &str, usual: u64) -> u64 {
    std::env::var(name).map_or(usual, |text| text.parse().expect("a number"))
}

fn worlds(test: &str, disks: &[(&'static str, u64)], interval: &str, ring_size: &str) {
    for number in 1..=setting("WORLDS", WORLDS) {
        world(
            &format!("{test}, world {number}"),
            disks,
            interval,
            ring_size,
        );
    }
}

fn world(test: &str, disks: &[(&'static str, u64)], interval: &str, ring_size: &str) {
    let rounds = setting("ROUNDS", ROUNDS);
    let mut site = Site::new(disks);
    site.interval = interval.to_owned();
    site.tracker_arguments = vec!["--ring-size".into(), ring_size.into()];
    let mut world = World {
        disks: disks
            .iter()
            .map(|(name, size)| Disk {
                name,
                model: Arc::new(Mutex::new(Model::new(*size))),
            })
            .collect(),
        tracker: Some(site.start_tracker()),
        shipper: None,
        random: Random::from_environment(test),
        tags: Arc::new(AtomicU32::new(1)),
        kept: None,
        site,
    };
    world.fill();
    world.site.protect();
    world.shipper = Some(world.site.start_shipper());
    for round in 0..rounds {
        let begin = Instant::now();
        let what = world.round(round);
        println!("round {round}: {what}, {:?}", begin.elapsed());
    }
    world.last();
}

impl World {
    /// Something for the initial replication to copy.
    fn fill(&mut self) {
        for disk in &self.disks {
            let mut client = self.site.connect(disk.name);
            let mut model = disk.model.lock().unwrap();
            for _ in 0..8 {
                let tag = self.tags.fetch_add(1, Ordering::Relaxed);
                let offset = self.random.below(model.size_bytes() / MIB) * MIB;
                let length = MIB.min(model.size_bytes() - offset);
                let sent = model.send(Change::Write(tag), offset, length);
                client.write(offset, &pattern(tag, offset, length)).unwrap();
                model.answered(&sent);
            }
            client.disconnect().unwrap();
        }
    }

    fn round(&mut self, round: u64) -> String {
        let load = Load::start(self);
        let cut = self.random.chance(1, 2).then(|| self.background_cut());
        let moment = match self.random.below(4) {
            0 => self.random.below(4),
            _ => self.random.below(400),
        };
        load.await_answers(moment);
        let what = self.kill(load);
        if let Some(mut cut) = cut {
            // It may have lost its shipper; what counts is that it ends.
            let deadline = Instant::now() + PATIENCE;
            while cut.try_wait().unwrap().is_none() {
                assert!(Instant::now() < deadline, "shipper cut hangs after a kill");
                std::thread::yield_now();
            }
        }
        self.check_images(round);
        self.check_recovery(round);
        format!("{what} after {moment} answers")
    }

    fn background_cut(&self) -> std::process::Child {
        self.site
            .shipper_command(&["cut"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap()
    }

    /// Kills and restarts; afterwards nothing is in flight.
    fn kill(&mut self, load: Load) -> String {
        let choice = self.random.below(5);
        let kills_tracker = choice != 0;
        let kills_shipper = choice != 1 && choice != 2;
        let tracker_first = self.random.chance(1, 2);
        if kills_tracker && tracker_first {
            self.tracker.take().unwrap().kill();
        }
        if kills_shipper {
            self.shipper.take().unwrap().kill();
        }
        if kills_tracker && !tracker_first {
            self.tracker.take().unwrap().kill();
        }
        if kills_tracker {
            load.lost();
            for disk in &self.disks {
                disk.model.lock().unwrap().crashed();
            }
            self.tracker = Some(self.site.start_tracker());
        } else {
            // A dead shipper must not be felt.
            load.await_answers(self.random.below(200));
            load.stop();
        }
        if kills_shipper {
            self.shipper = Some(self.site.start_shipper());
        }
        let victim = match (kills_tracker, kills_shipper) {
            (true, true) => "both killed",
            (true, false) => "tracker killed",
            _ => "shipper killed",
        };
        victim.to_owned()
    }

    fn check_images(&self, round: u64) {
        for disk in &self.disks {
            let path = self.site.image(disk.name);
            let mut model = disk.model.lock().unwrap();
            for_each_chunk(&path, |offset, bytes| {
                if let Err(wrong) = model.check(offset, bytes) {
                    panic!("round {round}, image of {}: {wrong}", disk.name);
                }
            });
            let file = File::open(&path).unwrap();
            model.settle(|sector| {
                let mut bytes = vec![0; SECTOR_BYTES as usize];
                file.read_exact_at(&mut bytes, sector * SECTOR_BYTES)
                    .unwrap();
                bytes
            });
        }
    }

    fn check_recovery(&mut self, round: u64) {
        let point = self.site.cut_soon(&format!("round {round}"));
        for disk in &self.disks {
            let restored = self.site.restore(&point, disk.name, "restored");
            assert_same(&self.site.image(disk.name), &restored);
            std::fs::remove_file(restored).unwrap();
        }
        if round % 10 == 5 {
            self.check_kept();
            for disk in &self.disks {
                std::fs::copy(self.site.image(disk.name), self.kept_copy(disk.name)).unwrap();
            }
            self.kept = Some(point);
        }
    }

    fn kept_copy(&self, disk: &str) -> std::path::PathBuf {
        self.site.path(&format!("{disk}.kept"))
    }

    /// An old recovery point still is what it was.
    fn check_kept(&self) {
        let Some(point) = &self.kept else { return };
        for disk in &self.disks {
            let restored = self.site.restore(point, disk.name, "restored-kept");
            assert_same(&self.kept_copy(disk.name), &restored);
            std::fs::remove_file(restored).unwrap();
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

/// Several connections with random requests in flight.
struct Load {
    stop: Arc<AtomicBool>,
    answers: std::sync::mpsc::Receiver<()>,
    threads: Vec<JoinHandle<()>>,
}

impl Load {
    fn start(world: &mut World) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (answered, answers) = channel();
        let mut threads = Vec::new();
        for index in 0..world.random.between(2, 4) as usize {
            let disk = &world.disks[index % world.disks.len()];
            let mut writer = Writer {
                client: world.site.connect(disk.name),
                model: Arc::clone(&disk.model),
                random: world.random.fork(),
                tags: Arc::clone(&world.tags),
                in_flight: HashMap::new(),
                answered: answered.clone(),
            };
            let (stop, depth) = (Arc::clone(&stop), world.random.between(1, 24) as usize);
            threads.push(std::thread::spawn(move || writer.work(&stop, depth)));
        }
        Self {
            stop,
            answers,
            threads,
        }
    }

    fn await_answers(&self, count: u64) {
        for _ in 0..count {
            self.answers.recv_timeout(PATIENCE).expect("an answer");
        }
    }

    /// The tracker is dead: every connection must have noticed.
    fn lost(self) {
        self.stop();
    }

    fn stop(self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads {
            thread.join().expect("a writer");
        }
    }
}

struct Writer {
    client: Client,
    model: Arc<Mutex<Model>>,
    random: Random,
    tags: Arc<AtomicU32>,
    in_flight: HashMap<u64, Option<Sent>>,
    answered: Sender<()>,
}

impl Writer {
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
            if let Some(Some(sent)) = self.in_flight.remove(&reply.cookie) {
                self.model.lock().unwrap().answered(&sent);
            }
            let _not_awaited = self.answered.send(());
        }
    }

    fn send(&mut self) -> std::io::Result<()> {
        let size = self.model.lock().unwrap().size_bytes();
        // Half of the requests go to one eighth of the disk, so that blocks are overwritten often.
        let area = if self.random.chance(1, 2) {
            size / 8
        } else {
            size
        };
        let unit = if self.random.chance(1, 3) {
            SECTOR_BYTES
        } else {
            4096
        };
        let offset = self.random.below(area / unit) * unit;
        let flags = if self.random.chance(1, 20) {
            command::FUA
        } else {
            0
        };
        let (number, change, units_max) = match self.random.below(20) {
            0 => return self.send_flush(),
            1 | 2 => (command::TRIM, Change::Trim, 256),
            3 | 4 => (command::WRITE_ZEROES, Change::Zero, 256),
            _ => {
                let tag = self.tags.fetch_add(1, Ordering::Relaxed);
                (command::WRITE, Change::Write(tag), 24)
            }
        };
        let length = (self.random.between(1, units_max) * unit).min((size - offset) / 512 * 512);
        let payload = match change {
            Change::Write(tag) => pattern(tag, offset, length),
            _ => Vec::new(),
        };
        let sent = self.model.lock().unwrap().send(change, offset, length);
        let cookie = self
            .client
            .submit(flags, number, offset, length as u32, &payload)?;
        self.in_flight.insert(cookie, Some(sent));
        Ok(())
    }

    fn send_flush(&mut self) -> std::io::Result<()> {
        let cookie = self.client.submit(0, command::FLUSH, 0, 0, &[])?;
        self.in_flight.insert(cookie, None);
        Ok(())
    }
}
