//! A shipper that is not the only one of its machine any more stops for good, says why, and harms nothing. Points that
//! retention does not keep go, and no others.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::Value;
use shipper::vault::Vault;
use tests::nbd::Client;
use tests::process::{Daemon, run};
use tests::site::{Site, assert_same, await_status, files_below, machine_folder, number};
use tracker::extent::Epoch;

const DISK_BYTES: u64 = 4 << 20;
const BLOCK: usize = 4096;

/// A machine with its tracker, and what its disk was at each recovery point.
struct World {
    site: Site,
    _tracker: Daemon,
    client: Client,
    model: Vec<u8>,
    points: Vec<(String, Vec<u8>)>,
    /// Files of the vault when they were seen first.
    seen: BTreeMap<PathBuf, Vec<u8>>,
}

impl World {
    fn new(settings: &str) -> Self {
        let mut site = Site::new(&[("disk", DISK_BYTES)]);
        site.settings = settings.to_owned();
        let tracker = site.start_tracker();
        let client = site.connect("disk");
        site.protect();
        Self {
            site,
            _tracker: tracker,
            client,
            model: vec![0; DISK_BYTES as usize],
            points: Vec::new(),
            seen: BTreeMap::new(),
        }
    }

    fn write(&mut self, block: usize, byte: u8) {
        let offset = block * BLOCK;
        let data = vec![byte; BLOCK];
        self.client.write(offset as u64, &data).unwrap();
        self.model[offset..offset + BLOCK].fill(byte);
    }

    /// Makes a recovery point of something new.
    fn point(&mut self, byte: u8) -> String {
        self.write(usize::from(byte), byte);
        let point = self.site.cut();
        self.points.push((point.clone(), self.model.clone()));
        self.look();
        point
    }

    /// Makes recovery points until retention would remove this one; returns the newest.
    fn outdate(&mut self, point: &str) -> String {
        for byte in 100..=255 {
            let newest = self.point(byte);
            let out = self
                .site
                .shipper(&["prune", "--dry-run", "--json"])
                .success();
            let report: Value = serde_json::from_str(&out).unwrap();
            let points = report["report"]["points"].as_array().unwrap();
            let fate = points.iter().find(|fate| fate["epoch"] == point).unwrap();
            if fate["keep"] == false {
                return newest;
            }
        }
        panic!("{point} stays");
    }

    /// The manifest of a recovery point.
    fn manifest(&self, point: &str) -> PathBuf {
        let machine = machine_folder(&self.site.vault());
        machine.join("points").join(format!("{point}.manifest"))
    }

    /// Nothing that was there is there with other content.
    fn look(&mut self) {
        for path in files_below(&self.site.vault()) {
            let Ok(content) = fs::read(&path) else {
                continue;
            };
            let known = self.seen.entry(path.clone()).or_insert(content.clone());
            assert!(*known == content, "{} was overwritten", path.display());
        }
    }

    /// Every point that there is restores to what the disk was.
    fn check_points(&mut self) {
        self.look();
        for point in self.site.points() {
            let known = self.points.iter().find(|(known, _)| *known == point);
            let (_, model) = known.unwrap_or_else(|| panic!("{point} is nobody's"));
            let expected = self.site.path("expected");
            fs::write(&expected, model).unwrap();
            let restored = self.site.restore(&point, "disk", "restored");
            assert_same(&expected, &restored);
            fs::remove_file(restored).unwrap();
        }
        self.site.shipper(&["verify", "--data"]).success();
    }

    /// The configuration with another state folder.
    fn other_config(&self, state: &Path) -> PathBuf {
        let text = self.site.config_text();
        let own = format!("state = {:?}", self.site.state());
        assert!(text.contains(&own));
        let path = self.site.path("other.toml");
        fs::write(&path, text.replace(&own, &format!("state = {state:?}"))).unwrap();
        path
    }

    fn command(&self, config: &Path, arguments: &[&str]) -> Command {
        let mut command = self.site.shipper_program();
        command.args(arguments).arg("--config").arg(config);
        command
    }

    /// `shipper run` ends with status 1, time and again, and says why.
    fn assert_fenced(&self, config: &Path, word: &str) {
        for _ in 0..2 {
            let outcome = run(&mut self.command(config, &["run"]));
            assert_eq!(outcome.status.code(), Some(1), "{}", outcome.err);
            for word in [word, "shipper protect"] {
                assert!(outcome.err.contains(word), "{word}: {}", outcome.err);
            }
        }
    }
}

fn copy_folder(from: &Path, to: &Path) {
    for path in files_below(from) {
        let target = to.join(path.strip_prefix(from).unwrap());
        fs::create_dir_all(target.parent().unwrap()).unwrap();
        if path.extension().is_none_or(|ending| ending != "sock") {
            fs::copy(&path, target).unwrap();
        }
    }
}

#[test]
fn a_shipper_that_was_taken_over_stops_for_good() {
    let mut world = World::new("");
    let first = world.site.start_shipper();
    world.point(1);
    // Somebody takes over while the first one still runs.
    let other = world.other_config(&world.site.path("other-state"));
    run(&mut world.command(&other, &["protect"])).success();
    world.write(2, 2);
    let refused = world.site.shipper(&["cut"]);
    assert!(!refused.status.success());
    let (status, said) = first.outcome(Duration::from_secs(60));
    assert_eq!(status.code(), Some(1), "{said}");
    let config = world.site.config();
    world.assert_fenced(&config, "taken over");
    // The other one goes on, with all that has changed.
    let _second = Daemon::start("shipper", &mut world.command(&other, &["run"]));
    let out = run(&mut world.command(&other, &["cut"])).success();
    let point = out.split_whitespace().next().unwrap().to_owned();
    world.points.push((point, world.model.clone()));
    world.check_points();
    assert_eq!(world.site.points().len(), 2);
}

#[test]
fn an_old_state_folder_is_known_as_one() {
    let mut world =
        World::new("[retention]\npoints = \"1s for 1s\"\ngrace = \"0s\"\nevery = \"1h\"\n");
    let old = world.site.path("old-state");
    let shipper = world.site.start_shipper();
    world.point(1);
    drop(shipper);
    copy_folder(&world.site.state(), &old);
    // The newer one publishes, and removes what the old one knows.
    let shipper = world.site.start_shipper();
    let removed = world.points[0].0.clone();
    world.point(2);
    let kept = world.outdate(&removed);
    drop(shipper);
    world.site.shipper(&["prune"]).success();
    let points = world.site.points();
    assert!(!points.contains(&removed), "{points:?}");
    assert!(!world.manifest(&removed).exists(), "the object is gone too");
    assert_eq!(points.last(), Some(&kept));
    // A clone in another place, and the old folder in the place of the new one.
    let other = world.other_config(&old);
    world.assert_fenced(&other, "old copy");
    let pruned = run(&mut world.command(&other, &["prune"]));
    assert_eq!(pruned.status.code(), Some(1), "{}", pruned.out);
    let fresh = world.site.path("fresh-state");
    fs::rename(world.site.state(), &fresh).unwrap();
    fs::remove_file(old.join("fenced.json")).unwrap();
    fs::rename(&old, world.site.state()).unwrap();
    let config = world.site.config();
    world.assert_fenced(&config, "old copy");
    assert_eq!(world.site.points(), points);
    world.check_points();
    // Claimed anew it goes on, and the other one does not.
    world.site.shipper(&["protect"]).success();
    let _shipper = world.site.start_shipper();
    world.point(5);
    let other = world.other_config(&fresh);
    world.assert_fenced(&other, "taken over");
    world.check_points();
}

#[test]
fn copies_at_work_stop_each_other() {
    let mut world = World::new("");
    let shipper = world.site.start_shipper();
    world.point(1);
    drop(shipper);
    // A restored machine: disk, journal and state folder are of the same moment, and go on apart.
    let clone = world.site.path("clone");
    fs::create_dir(&clone).unwrap();
    copy_folder(&world.site.state(), &clone.join("state"));
    let _shipper = world.site.start_shipper();
    world.point(2);
    let other = world.other_config(&clone.join("state"));
    world.assert_fenced(&other, "old copy");
    world.point(3);
    world.check_points();
    assert_eq!(world.site.points().len(), 3);
}

#[test]
fn a_number_that_is_taken_stops_nobody() {
    let mut world = World::new("");
    let shipper = world.site.start_shipper();
    let first = world.point(1);
    drop(shipper);
    // A new generation, which has not seen what the one before is about to publish.
    let mark = world.site.state().join("fenced.json");
    fs::write(mark, "\"for a new generation\"").unwrap();
    world.site.shipper(&["protect"]).success();
    let shipper = world.site.start_shipper();
    let vault = Vault::open(&world.site.vault_url(), &world.site.access()).unwrap();
    let first = Epoch(u64::from_str_radix(&first, 16).unwrap());
    let mut late = vault.manifest("m1", first).unwrap();
    for taken in first.0 + 1..first.0 + 8 {
        late.previous = late.epoch;
        late.epoch = Epoch(taken);
        let bytes = late.encode(vault.keys()).unwrap();
        let key = vault.manifest_key("m1", late.epoch);
        fs::write(world.site.vault().join(key), bytes).unwrap();
    }
    let point = world.point(2);
    let point = u64::from_str_radix(&point, 16).unwrap();
    assert!(point >= first.0 + 8, "{point}");
    let status = await_status(&world.site, "points given up", |_| true);
    assert!(number(&status, "/points_given_up") >= 1);
    assert_eq!(world.site.points().len(), 2, "the late ones are none");
    world.check_points();
    drop(shipper);
}

#[test]
fn retention_removes_and_says_so() {
    let mut world =
        World::new("[retention]\npoints = \"1s for 1s\"\ngrace = \"0s\"\nevery = \"1h\"\n");
    let shipper = world.site.start_shipper();
    let pinned = world.point(1);
    for byte in 2..8 {
        world.point(byte);
    }
    world.outdate(&pinned);
    let id = world
        .site
        .shipper(&["pin", "--point", &pinned, "--label", "before the move"])
        .success();
    assert!(id.starts_with(&pinned));
    let shown = world.site.shipper(&["points"]).success();
    assert!(shown.contains("pinned: hold (before the move)"), "{shown}");
    // A rehearsal changes nothing.
    let before = files_below(&world.site.vault());
    let out = world
        .site
        .shipper(&["prune", "--dry-run", "--json"])
        .success();
    let report: Value = serde_json::from_str(&out).unwrap();
    let count = number(&report, "/report/removed_points");
    assert_eq!(files_below(&world.site.vault()), before);
    // The running shipper is asked.
    world.site.shipper(&["prune"]).success();
    await_status(&world.site, "what was removed", |status| {
        number(status, "/retention/removed_points") >= count
    });
    // And removes by itself, when the grace period is over.
    let gone = world.points[1].0.clone();
    let is_gone = |_: &Value| !world.manifest(&gone).exists();
    await_status(&world.site, "a manifest that is gone", is_gone);
    let points = world.site.points();
    assert!(points.contains(&pinned) && points.contains(&world.points.last().unwrap().0));
    assert!(count > 0 && points.len() as u64 == world.points.len() as u64 - count);
    world.check_points();
    world.site.shipper(&["unpin", "--point", &pinned]).success();
    world.point(9);
    drop(shipper);
    let out = world.site.shipper(&["prune"]).success();
    assert!(!world.site.points().contains(&pinned), "{out}");
    let missing = world
        .site
        .restore_to(&pinned, "disk", &world.site.path("gone"));
    assert!(!missing.status.success() && missing.err.contains(&pinned));
    let missing = world.site.shipper(&["pin", "--point", &pinned]);
    assert!(!missing.status.success() && missing.err.contains(&pinned));
    world.check_points();
}

#[test]
fn without_a_policy_nothing_is_ever_removed() {
    let mut world = World::new("");
    let _shipper = world.site.start_shipper();
    world.point(1);
    world.point(2);
    let refused = world.site.shipper(&["prune"]);
    assert!(
        !refused.status.success() && refused.err.contains("[retention]"),
        "{}",
        refused.err
    );
    assert_eq!(world.site.points().len(), 2);
}
