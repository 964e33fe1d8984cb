//! Resynchronization: by the share that waits, by the operator; cancelled, killed, refused; one disk
//! of several. Recovery points from before stay, and the next one is the disk.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use serde_json::Value;
use tests::nbd::Client;
use tests::process::Daemon;
use tests::seed::Random;
use tests::site::{Site, assert_same, await_status, machine_folder, number, status};

const MIB: u64 = 1 << 20;
/// The least that a spool can be given: what a scan gets done while nothing can be uploaded.
const BUDGET: u64 = 64 * MIB;

/// What the status says of the scan of the first disk.
fn resync(status: &Value) -> &Value {
    &status["disks"][0]["resync"]
}

fn spooled(status: &Value) -> u64 {
    number(status, "/spool_epochs")
}

/// A machine with the disks `disk` and `other`, both full of random bytes, and one recovery point.
struct World {
    site: Site,
    tracker: Option<Daemon>,
    shipper: Option<Daemon>,
    client: Client,
    random: Random,
    /// The recovery point, and what `disk` was then.
    first: String,
    copy: PathBuf,
    /// Bytes of its segments.
    bytes: u64,
}

const OTHER_MIB: u64 = 4;

impl World {
    fn new(test: &str, mib: u64, settings: &str) -> Self {
        let mut site = Site::new(&[("disk", mib * MIB), ("other", OTHER_MIB * MIB)]);
        site.codec = "none".to_owned();
        site.settings = format!("spool_budget = \"64MiB\"\n{settings}");
        let mut random = Random::from_environment(test);
        for (disk, mib) in [("disk", mib), ("other", OTHER_MIB)] {
            let image = OpenOptions::new()
                .write(true)
                .open(site.image(disk))
                .unwrap();
            for number in 0..mib {
                let bytes = random.bytes(MIB as usize);
                image.write_all_at(&bytes, number * MIB).unwrap();
            }
        }
        let tracker = Some(site.start_tracker());
        let client = site.connect("disk");
        site.protect();
        let copy = site.path("copy");
        fs::copy(site.image("disk"), &copy).unwrap();
        Self {
            site,
            tracker,
            shipper: None,
            client,
            random,
            first: String::new(),
            copy,
            bytes: 0,
        }
    }

    fn protected(test: &str, mib: u64, settings: &str) -> Self {
        let mut world = Self::new(test, mib, settings);
        world.start();
        world.first = world.site.cut();
        world.bytes = world.site.segment_bytes();
        world
    }

    fn start(&mut self) {
        self.shipper = Some(self.site.start_shipper());
    }

    fn shipper(&self) -> &Daemon {
        self.shipper.as_ref().expect("it runs")
    }

    /// Stops the shipper and starts one that makes a recovery point whenever something has changed.
    fn start_hasty(&mut self) {
        // One that has not released its point reads the vault when it starts again, which may be away by then.
        await_status(&self.site, "a release", |status| spooled(status) == 0);
        self.shipper.take().unwrap().stop();
        self.site.interval = "50ms".to_owned();
        self.site.write_config();
        self.start();
        await_status(&self.site, "a tracker that agrees", |status| {
            status["phase"] == "waiting"
        });
    }

    fn write(&mut self, offset: u64, bytes: u64) {
        for offset in (offset..offset + bytes).step_by(MIB as usize) {
            let bytes = self.random.bytes(bytes.min(MIB) as usize);
            self.client.write(offset, &bytes).unwrap();
        }
    }

    /// Bytes read of a disk since the shipper was started.
    fn read(&self, disk: usize) -> u64 {
        let status = status(&self.site).expect("it answers");
        number(&status, &format!("/disks/{disk}/bytes_read"))
    }

    /// Where the segments are kept. A file in its place lets nothing be uploaded, while the vault
    /// answers as ever.
    fn segments(&self) -> PathBuf {
        machine_folder(&self.site.vault()).join("disks")
    }

    fn forbid_uploads(&self) {
        let there = self.segments();
        if there.exists() {
            fs::rename(&there, self.site.path("segments")).unwrap();
        }
        fs::write(&there, "in the way").unwrap();
    }

    fn allow_uploads(&self) {
        let there = self.segments();
        fs::remove_file(&there).unwrap();
        let kept = self.site.path("segments");
        if kept.exists() {
            fs::rename(kept, &there).unwrap();
        }
    }

    /// Has a scan that cannot go on, because the spool is full and nothing can be uploaded.
    #[track_caller]
    fn await_full_spool(&self) -> Value {
        await_status(&self.site, "a scan that cannot go on", |status| {
            number(status, "/spool_bytes") >= BUDGET
                && resync(status)["stage"] == "running"
                && status["problems"]["vault"].is_string()
        })
    }

    /// The next recovery point is the disk, and that from before is what it was.
    #[track_caller]
    fn check(self) {
        let site = &self.site;
        let point = site.cut();
        site.check_restore(&point, &site.image("disk"));
        let other = site.restore(&point, "other", "restored-other");
        assert_same(&site.image("other"), &other);
        if !self.first.is_empty() {
            site.check_restore(&self.first, &self.copy);
        }
        site.shipper(&["verify", "--data"]).success();
        if let Some(shipper) = self.shipper {
            shipper.stop();
        }
        self.tracker.unwrap().stop();
    }
}

/// More than half of the disk waits while the vault is away: the disk is marked, recovery points go on,
/// and when the vault is back that disk alone is looked at.
#[test]
fn a_disk_of_which_too_much_waits_is_marked_and_scanned() {
    let mut world = World::protected("share", 64, "");
    world.start_hasty();
    let elsewhere = world.site.path("elsewhere");
    fs::rename(world.site.vault(), &elsewhere).unwrap();
    world.write(0, 4096);
    await_status(&world.site, "an epoch in the spool", |s| spooled(s) > 0);
    world.write(0, 40 * MIB);
    let marked = await_status(&world.site, "a mark", |status| !resync(status).is_null());
    assert_eq!(resync(&marked)["stage"], "marked", "{marked:#?}");
    assert_eq!(resync(&marked)["reason"], "share");
    assert!(marked["disks"][1]["resync"].is_null(), "{marked:#?}");
    let waiting = |status: &Value| number(status, "/disks/0/waiting_bytes");
    assert!(waiting(&marked) > 32 * MIB, "{marked:#?}");
    world
        .shipper()
        .await_text("Disk disk is marked for resynchronization");
    let text = world.site.shipper(&["status"]).success();
    assert!(text.contains("more than 50% of the disk"), "{text}");
    // Recovery points go on as long as there is room for them.
    for _ in 0..2 {
        let before = spooled(&status(&world.site).unwrap());
        world.write(50 * MIB, 4096);
        let more = |status: &Value| spooled(status) > before;
        await_status(&world.site, "another epoch in the spool", more);
    }
    assert_eq!(resync(&status(&world.site).unwrap())["stage"], "marked");
    let before: Vec<u64> = (0..2).map(|disk| world.read(disk)).collect();
    assert!(before[0] < 64 * MIB, "it was scanned without a vault");
    // Whoever comes next finds the mark.
    world.shipper.take().unwrap().kill();
    fs::rename(&elsewhere, world.site.vault()).unwrap();
    world.start();
    await_status(&world.site, "the end of the scan", |status| {
        resync(status).is_null() && spooled(status) == 0 && number(status, "/points") > 0
    });
    world.shipper().await_text("Every block of disk disk");
    assert!(world.read(0) >= 64 * MIB, "it was not scanned");
    assert!(world.read(1) < MIB, "the other disk was scanned as well");
    assert!(world.site.points().len() >= 5, "each is a recovery point");
    world.check();
}

/// More than half of it changes within one interval, and the vault takes data: it is scanned at once.
#[test]
fn a_disk_that_is_rewritten_is_scanned_before_it_is_time() {
    let mut world = World::protected("rewritten", 32, "");
    let before = world.read(0);
    world.write(8 * MIB, 20 * MIB);
    await_status(&world.site, "a recovery point", |status| {
        number(status, "/points") == 2 && resync(status).is_null()
    });
    world.shipper().await_text("Every block of disk disk");
    assert!(world.read(0) - before >= 32 * MIB, "it was not scanned");
    assert!(world.read(1) <= OTHER_MIB * MIB, "the other was as well");
    world.check();
}

/// A mark that was cancelled does not come back with the next recovery point, and nothing is scanned.
#[test]
fn a_mark_that_is_cancelled_does_not_come_back_at_once() {
    let mut world = World::protected("share_cancelled", 32, "resync_share_percent = 25");
    world.start_hasty();
    let elsewhere = world.site.path("elsewhere");
    fs::rename(world.site.vault(), &elsewhere).unwrap();
    world.write(0, 12 * MIB);
    let marked = |status: &Value| resync(status)["stage"] == "marked";
    await_status(&world.site, "a mark", marked);
    let out = world.site.shipper(&["resync", "--cancel"]).success();
    assert!(out.contains("Disk disk: resynchronization cancelled"));
    assert!(out.contains("Disk other: no resynchronization to cancel"));
    for _ in 0..3 {
        let before = spooled(&status(&world.site).unwrap());
        world.write(20 * MIB, 4096);
        let more = |status: &Value| spooled(status) > before;
        let after = await_status(&world.site, "another epoch in the spool", more);
        assert!(resync(&after).is_null(), "{after:#?}");
    }
    fs::rename(&elsewhere, world.site.vault()).unwrap();
    await_status(&world.site, "an empty spool", |s| spooled(s) == 0);
    assert!(world.read(0) < 20 * MIB, "it was scanned");
    // What was cancelled is forgotten when little waits; then the rule holds again.
    await_status(&world.site, "little that waits", |status| {
        number(status, "/disks/0/waiting_bytes") < MIB
    });
    fs::rename(world.site.vault(), &elsewhere).unwrap();
    world.write(0, 12 * MIB);
    await_status(&world.site, "another mark", marked);
    fs::rename(&elsewhere, world.site.vault()).unwrap();
    world.check();
}

#[test]
fn an_operator_compares_every_block_and_uploads_what_differs() {
    let mut world = World::protected("operator", 64, "");
    let site = &world.site;
    let (read, other) = (world.read(0), world.read(1));
    let before = site.segment_bytes();
    let out = site.shipper(&["resync", "--disk", "disk"]).success();
    let expected = "Disk disk: marked for resynchronization, because it was asked for\n";
    assert_eq!(out, expected);
    let ended = |points: u64| {
        move |status: &Value| resync(status).is_null() && number(status, "/points") == points
    };
    await_status(site, "a recovery point after the scan", ended(2));
    assert!(world.read(0) - read >= 64 * MIB, "not every block was read");
    assert_eq!(world.read(1), other, "the other disk was scanned as well");
    let uploaded = site.segment_bytes() - before;
    assert!(uploaded < 64 << 10, "{uploaded} bytes uploaded for nothing");
    // What changed without a trace is found.
    let image = OpenOptions::new()
        .write(true)
        .open(site.image("disk"))
        .unwrap();
    let bytes = world.random.bytes(4096);
    image.write_all_at(&bytes, 33 * MIB).unwrap();
    site.shipper(&["resync"]).success();
    await_status(site, "another recovery point", ended(3));
    assert!(world.read(1) - other >= OTHER_MIB * MIB, "not all disks");
    let uploaded = site.segment_bytes() - before;
    assert!((4096..128 << 10).contains(&uploaded), "{uploaded} bytes");
    let refused = site.shipper(&["resync", "--disk", "dsk"]).failure();
    assert!(refused.contains("no disk \"dsk\": it has disk, other"));
    world.check();
}

#[test]
fn a_mark_that_was_answered_survives_a_kill() {
    let mut world = World::protected("answered", 8, "");
    let elsewhere = world.site.path("elsewhere");
    fs::rename(world.site.vault(), &elsewhere).unwrap();
    let marked = world.site.shipper(&["resync", "--disk", "disk"]).success();
    world.shipper.take().unwrap().kill();
    assert!(marked.contains("Disk disk: marked"), "{marked}");
    fs::rename(&elsewhere, world.site.vault()).unwrap();
    world.start();
    await_status(&world.site, "a recovery point", |status| {
        number(status, "/points") == 1 && resync(status).is_null()
    });
    assert_eq!(world.read(0), 8 * MIB);
    world.check();
}

#[test]
fn without_a_shipper_nothing_is_marked() {
    let world = World::new("alone", 1, "");
    for arguments in [&["resync"][..], &["resync", "--cancel"]] {
        let message = world.site.shipper(arguments).failure();
        assert!(message.contains("shipper.sock"), "{message}");
    }
    world.tracker.unwrap().stop();
}

/// A scan that was asked for and has got to the middle of a disk that was written before and is
/// written meanwhile.
fn in_the_middle(test: &str) -> World {
    let mut world = World::protected(test, 128, "resync_share_percent = 100");
    world.forbid_uploads();
    world.write(0, 120 * MIB);
    world.site.shipper(&["resync", "--disk", "disk"]).success();
    let found = world.await_full_spool();
    assert_eq!(resync(&found)["reason"], "operator");
    assert_eq!(resync(&found)["cancellable"], true);
    let compared = number(&found, "/disks/0/resync/compared_bytes");
    let percent = number(&found, "/disks/0/resync/percent");
    assert!((BUDGET..120 * MIB).contains(&compared), "{found:#?}");
    assert_eq!(percent, compared * 100 / (128 * MIB));
    let again = world.site.shipper(&["resync", "--disk", "disk"]).success();
    assert!(again.contains("every block is being compared already"));
    world.write(MIB, 4096);
    world.write(110 * MIB, 8192);
    world.write(127 * MIB, 4096);
    world
}

#[test]
fn a_scan_that_is_cancelled_costs_no_change_and_no_upload() {
    let mut world = in_the_middle("cancel");
    for outcome in ["resynchronization cancelled", "no resynchronization"] {
        let out = world.site.shipper(&["resync", "--cancel"]).success();
        assert!(out.contains(&format!("Disk disk: {outcome}")), "{out}");
    }
    assert!(resync(&status(&world.site).unwrap()).is_null());
    // The shipper may die before the next recovery point, and more may change.
    world.shipper.take().unwrap().kill();
    world.allow_uploads();
    world.start();
    world.write(2 * MIB, 4096);
    let point = world.site.cut();
    let read = world.read(0);
    assert!(read < 124 * MIB, "{read} bytes read: every block");
    let uploaded = world.site.segment_bytes() - world.bytes;
    assert!(uploaded < 122 * MIB, "{uploaded} bytes: some went twice");
    world.site.check_restore(&point, &world.site.image("disk"));
    world.check();
}

#[test]
fn a_scan_that_is_killed_goes_on_where_it_was() {
    let mut world = in_the_middle("killed");
    let before = status(&world.site).unwrap();
    let compared = number(&before, "/disks/0/resync/compared_bytes");
    world.shipper.take().unwrap().kill();
    world.start();
    let after = world.await_full_spool();
    assert_eq!(resync(&after)["reason"], "operator");
    let cursor = number(&after, "/disks/0/resync/compared_bytes");
    assert!(cursor >= compared, "{compared}, after the kill {cursor}");
    world.allow_uploads();
    let point = world.site.cut();
    let read = world.read(0);
    let left = 128 * MIB - compared;
    let expected = left..left + 4 * MIB;
    assert!(expected.contains(&read), "{read} bytes read, {left} left");
    world.site.check_restore(&point, &world.site.image("disk"));
    world.check();
}

#[test]
fn a_first_copy_cannot_be_cancelled() {
    let mut world = World::new("first_copy", 96, "");
    world.forbid_uploads();
    world.start();
    let found = world.await_full_spool();
    assert_eq!(resync(&found)["reason"], "first-copy");
    assert_eq!(resync(&found)["cancellable"], false);
    let refused = world.site.shipper(&["resync", "--cancel"]).failure();
    let expected = "Disk disk: the scan of every block cannot be cancelled, because no recovery \
                    point has this disk yet";
    assert!(refused.contains(expected), "{refused}");
    let already = world.site.shipper(&["resync", "--disk", "disk"]).success();
    assert!(already.contains("being compared already"), "{already}");
    let still = status(&world.site).unwrap();
    let compared = |status: &Value| number(status, "/disks/0/resync/compared_bytes");
    assert_eq!(compared(&still), compared(&found));
    world.allow_uploads();
    world.check();
}

/// A new journal tells nothing of what was written before it: that makes a scan necessary that was
/// asked for.
#[test]
fn a_scan_that_becomes_necessary_cannot_be_cancelled() {
    let mut world = in_the_middle("necessary");
    world.tracker.take().unwrap().kill();
    world.site.tracker_arguments.push("--resync".into());
    world.tracker = Some(world.site.start_tracker());
    let refused = world.site.shipper(&["resync", "--cancel"]).failure();
    let expected = "because the tracker keeps another journal";
    assert!(refused.contains(expected), "{refused}");
    world.allow_uploads();
    world
        .shipper()
        .await_text("Every block of disk disk is looked at: the tracker keeps another journal");
    world.check();
}

/// A capture that the spool cannot take costs a scan of its disk, not of all.
#[test]
fn a_capture_beyond_the_budget_scans_its_disk_alone() {
    let mut world = World::protected("overrun", 128, "resync_share_percent = 100");
    world.write(0, 80 * MIB);
    let before = world.read(1);
    let point = world.site.cut();
    world
        .shipper()
        .await_text("disk disk is scanned: more has changed than may wait for upload");
    assert!(world.read(1) - before < MIB, "the other disk was scanned");
    world.site.check_restore(&point, &world.site.image("disk"));
    world.check();
}

/// Fingerprints are only as good as their recovery points: a shipper that takes a machine back from
/// another one forgets what it knew, since the other one may have sent something else.
#[test]
fn a_shipper_that_comes_back_does_not_trust_what_it_knew() {
    let mut world = World::protected("comes_back", 4, "");
    let old = fs::read(&world.copy).unwrap();
    world.shipper.take().unwrap().stop();
    let (ours, other) = (world.site.config_text(), world.site.path("other-state"));
    let state = format!("{:?}", world.site.state());
    let theirs = ours.replace(&state, &format!("{other:?}"));
    fs::write(world.site.config(), theirs).unwrap();
    world.site.shipper(&["protect"]).success();
    world.start();
    world.write(2 * MIB, 4096);
    world.site.cut();
    world.shipper.take().unwrap().stop();
    world.site.write_config();
    world.site.shipper(&["protect"]).success();
    world.start();
    let at = (2 * MIB) as usize;
    world.client.write(2 * MIB, &old[at..at + 4096]).unwrap();
    world.check();
}
