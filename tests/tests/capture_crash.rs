//! What becomes of a recovery point when a program is killed, or room ends, while it is captured. Capture is
//! held back by its own throttle, so that there is time for it.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;
use tests::nbd::Client;
use tests::process::{Daemon, Outcome, program, run};
use tests::seed::Random;
use tests::site::{Site, await_status, number};

const BLOCK: u64 = 4096;
const DISKS: [(&str, u64); 2] = [("one", 32 << 20), ("two", 32 << 20)];
/// Blocks of each disk that belong to the epoch.
const BLOCKS: u64 = 640;
const PATIENCE: Duration = Duration::from_secs(60);

/// Two disks of which one epoch is being captured, slowly.
struct Scene {
    site: Site,
    tracker: Daemon,
    shipper: Option<Daemon>,
    clients: Vec<Client>,
    random: Random,
    /// The epoch, as the tracker counts it.
    epoch: u64,
    /// Copies of the disks at the cut.
    moment: Vec<PathBuf>,
    /// Asks for the point of the epoch.
    asking: Option<std::thread::JoinHandle<Outcome>>,
}

fn closed(site: &Site) -> Option<u64> {
    site.tracker_status()["machine"]["closed"].as_u64()
}

fn disk_sum(site: &Site, field: &str) -> u64 {
    let status = site.tracker_status();
    let disks = status["machine"]["disks"]
        .as_array()
        .expect("disks")
        .clone();
    disks
        .iter()
        .map(|disk| disk[field].as_u64().expect("a number"))
        .sum()
}

#[track_caller]
fn poll(what: &str, mut is_there: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_there() {
        assert!(Instant::now() < deadline, "{what} does not come");
    }
}

impl Scene {
    fn new(seed: u64, arguments: &[&str]) -> Self {
        let mut site = Site::new(&DISKS);
        site.settings = "capture_rate = \"1MiB\"\n".to_owned();
        site.tracker_arguments = arguments
            .iter()
            .map(|&argument| argument.to_owned())
            .collect();
        let tracker = site.start_tracker();
        site.protect();
        let shipper = Some(site.start_shipper());
        site.cut();
        let mut clients: Vec<Client> = DISKS.iter().map(|(name, _)| site.connect(name)).collect();
        let mut random = Random::new(seed);
        for client in &mut clients {
            write_blocks(client, &mut random, 0..BLOCKS);
        }
        let moment = copies(&site, "moment");
        let mut command = site.shipper_command(&["cut"]);
        let asking = Some(std::thread::spawn(move || run(&mut command)));
        poll("the cut", || closed(&site).is_some());
        let epoch = closed(&site).expect("a slow capture");
        Self {
            site,
            tracker,
            shipper,
            clients,
            random,
            epoch,
            moment,
            asking,
        }
    }

    /// Overwrites blocks of the epoch from the end, which is captured last.
    fn overwrite(&mut self, blocks: std::ops::Range<u64>) {
        for client in &mut self.clients {
            write_blocks(client, &mut self.random, blocks.clone());
        }
    }

    /// The answer to whoever asked for the point.
    fn answer(&mut self) -> Outcome {
        self.asking.take().expect("asked once").join().unwrap()
    }

    /// The point of the epoch is not there, another one is in its place, and the one after that has everything.
    #[track_caller]
    fn check_given_up(&mut self) {
        let point = self.answer().success();
        assert!(!point.contains(&self.name()), "{point}");
        let points = self.site.points();
        assert!(!points.contains(&self.name()), "{points:?}");
        // Guests may have written while that one was cut, so the one after it is compared.
        let next = self.site.cut_soon("the next point");
        check(&self.site, &next, &copies(&self.site, "now"));
    }

    fn name(&self) -> String {
        format!("{:016x}", self.epoch)
    }
}

fn write_blocks(client: &mut Client, random: &mut Random, blocks: std::ops::Range<u64>) {
    for block in blocks {
        let bytes = random.bytes(BLOCK as usize);
        // Every other block of the disk, so that extents are short.
        client.write(2 * block * BLOCK, &bytes).unwrap();
    }
}

fn copies(site: &Site, name: &str) -> Vec<PathBuf> {
    let copy = |(disk, _): &(&str, u64)| {
        let path = site.path(&format!("{name}-{disk}"));
        std::fs::copy(site.image(disk), &path).expect("a copy");
        path
    };
    DISKS.iter().map(copy).collect()
}

#[track_caller]
fn check(site: &Site, point: &str, expected: &[PathBuf]) {
    for ((disk, _), expected) in DISKS.iter().zip(expected) {
        let restored = site.restore(point, disk, &format!("restored-{disk}"));
        tests::site::assert_same(&restored, expected);
        std::fs::remove_file(restored).unwrap();
    }
}

fn json(site: &Site) -> Value {
    let out = run(&mut site.shipper_command(&["status", "--json"])).success();
    serde_json::from_str(&out).expect("JSON")
}

#[test]
fn a_tracker_that_is_killed_goes_on_with_the_same_point() {
    let mut scene = Scene::new(1, &[]);
    let begin = Instant::now();
    scene.overwrite(BLOCKS - 200..BLOCKS);
    assert!(
        disk_sum(&scene.site, "copied_blocks") > 0,
        "the capture was not slow"
    );
    scene.tracker.kill();
    scene.tracker = scene.site.start_tracker();
    assert_eq!(closed(&scene.site), Some(scene.epoch));
    scene.clients = DISKS
        .iter()
        .map(|(name, _)| scene.site.connect(name))
        .collect();
    // Those that were copied before the kill are not copied again, the others are.
    scene.overwrite(BLOCKS - 300..BLOCKS);
    let copied = disk_sum(&scene.site, "copied_blocks");
    assert!((1..=200).contains(&copied), "{copied} blocks were copied");
    let point = scene.answer().success();
    assert!(point.contains(&scene.name()), "{point}");
    // Both disks have 2.5 MiB in the epoch, and what is written while it is captured does not count.
    assert!(
        begin.elapsed() > Duration::from_secs(3),
        "the throttle did not hold"
    );
    check(&scene.site, &scene.name(), &scene.moment);
    let status = json(&scene.site);
    assert_eq!(number(&status, "/points_given_up"), 0, "{status:#}");
    // What came after is in the next one, and nothing is left of the first.
    let next = scene.site.cut_soon("the next point");
    check(&scene.site, &next, &copies(&scene.site, "now"));
    poll("the end of the preserve files", || {
        !DISKS
            .iter()
            .any(|(disk, _)| scene.site.journal(disk).with_extension("hrp").exists())
    });
}

#[test]
fn a_shipper_that_is_killed_begins_another_point_at_once() {
    let mut scene = Scene::new(2, &[]);
    scene.overwrite(BLOCKS - 200..BLOCKS);
    scene.shipper.take().expect("a shipper").kill();
    let _refused = scene.answer();
    // Nobody captures, and guests go on all the same.
    scene.overwrite(0..BLOCKS);
    assert_eq!(closed(&scene.site), Some(scene.epoch));
    let now = copies(&scene.site, "now");
    scene.shipper = Some(scene.site.start_shipper());
    let status = await_status(&scene.site, "another point", |status| {
        number(status, "/points") > 0
    });
    let points = scene.site.points();
    assert!(!points.contains(&scene.name()), "{points:?} {status:#}");
    check(&scene.site, points.last().unwrap(), &now);
}

#[test]
fn a_point_whose_blocks_do_not_find_room_is_given_up_and_no_write_fails() {
    let mut scene = Scene::new(3, &["--preserve-budget", "256KiB"]);
    // By one write: the next point is cut at once, and shall not be given up for what still comes.
    let bytes = scene.random.bytes(400 * BLOCK as usize);
    let offset = (2 * BLOCKS - 400) * BLOCK;
    scene.clients[1].write(offset, &bytes).unwrap();
    await_status(&scene.site, "the end of it", |status| {
        number(status, "/points_given_up") > 0
    });
    let shipper = scene.shipper.as_ref().expect("a shipper");
    shipper.await_text("than the budget of the preserve file allows");
    // It was asked for, so another one is made in its place, of a moment at which nothing is overwritten.
    scene.check_given_up();
}

#[test]
fn a_tracker_that_finds_no_preserve_file_gives_the_point_up() {
    let mut scene = Scene::new(4, &[]);
    scene.tracker.kill();
    std::fs::remove_file(scene.site.journal("two").with_extension("hrp")).unwrap();
    scene.tracker = scene.site.start_tracker();
    assert_eq!(closed(&scene.site), None);
    scene.clients = DISKS
        .iter()
        .map(|(name, _)| scene.site.connect(name))
        .collect();
    scene.overwrite(0..BLOCKS);
    scene.check_given_up();
}

#[test]
fn preserve_files_lie_where_they_are_told_to() {
    let folder = tempfile::tempdir().unwrap();
    let mut scene = Scene::new(5, &["--preserve-dir", folder.path().to_str().unwrap()]);
    let names: Vec<String> = std::fs::read_dir(folder.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert_eq!(names.len(), 2, "{names:?}");
    assert!(names.iter().all(|name| name.ends_with(".hrp")), "{names:?}");
    let point = scene.answer().success();
    assert!(point.contains(&scene.name()), "{point}");
    let mut command = Command::new(program("tracker"));
    command
        .arg("status")
        .arg("--control")
        .arg(scene.site.control());
    run(&mut command).success();
    check(&scene.site, &scene.name(), &scene.moment);
}
