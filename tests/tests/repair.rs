//! `shipper verify --repair` from outside: what the machine still has comes back byte for byte; what it has not sets points
//! aside, and the next point is whole.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;
use tests::nbd::Client;
use tests::process::Daemon;
use tests::seed::Random;
use tests::site::{Site, assert_same, files_below, machine_folder};

const MIB: u64 = 1 << 20;
/// Bytes that belong to one point, of the disk `disk`.
const AREA: u64 = MIB;
/// Areas that the first point fills: more than the others together.
const FIRST_AREAS: u64 = 4;

/// A machine with three recovery points, each with an area of its own, and no shipper.
struct World {
    site: Site,
    _tracker: Daemon,
    client: Client,
    random: Random,
    points: Vec<(String, PathBuf)>,
}

impl World {
    fn new(test: &str, codec: &str, encrypted: bool) -> Self {
        let mut site = Site::new(&[("disk", 8 * AREA + 512), ("other", MIB)]);
        site.codec = codec.to_owned();
        let tracker = site.start_tracker();
        match encrypted {
            true => site.protect(),
            false => site.protect_plain(),
        }
        let client = site.connect("disk");
        let random = Random::from_environment(test);
        let mut world = Self {
            site,
            _tracker: tracker,
            client,
            random,
            points: Vec::new(),
        };
        let mut other = world.site.connect("other");
        other.write(0, &world.content(MIB)).unwrap();
        let shipper = world.site.start_shipper();
        world.write(0, FIRST_AREAS * AREA);
        world.client.write(8 * AREA, &[9; 512]).unwrap();
        world.keep();
        for point in 0..2 {
            world.write((FIRST_AREAS + point) * AREA, AREA);
            world.keep();
        }
        shipper.stop();
        world
    }

    /// Half of it compresses, and no block is ever the same.
    fn content(&mut self, bytes: u64) -> Vec<u8> {
        let mut content = self.random.bytes(bytes as usize);
        for block in content.chunks_mut(8192) {
            let (half, front) = (block.len() / 2, 16.min(block.len()));
            block[front..half.max(front)].fill(b'x');
        }
        content
    }

    fn write(&mut self, offset: u64, bytes: u64) {
        for at in (0..bytes).step_by(MIB as usize) {
            let content = self.content(MIB.min(bytes - at));
            self.client.write(offset + at, &content).unwrap();
        }
    }

    /// Makes a recovery point and keeps the disk as it is.
    #[track_caller]
    fn keep(&mut self) -> String {
        let point = self.site.cut_soon("a point");
        let copy = self.site.path(&format!("copy-{point}"));
        fs::copy(self.site.image("disk"), &copy).unwrap();
        self.points.push((point.clone(), copy));
        point
    }

    fn point(&self, index: usize) -> &str {
        &self.points[index].0
    }

    /// All objects with their content.
    fn objects(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        let files = files_below(&self.site.vault()).into_iter();
        files
            .map(|path| (path.clone(), fs::read(path).unwrap()))
            .collect()
    }

    /// The largest segment that came with a point: of the disk `disk`.
    fn segment(&self, index: usize) -> PathBuf {
        let disks = machine_folder(&self.site.vault()).join("disks");
        let before = index.checked_sub(1).map(|before| self.number(before));
        let is_its = |path: &&PathBuf| {
            let name = path.file_name().unwrap().to_str().unwrap();
            let epoch = u64::from_str_radix(&name[17..33], 16).unwrap();
            epoch <= self.number(index) && before.is_none_or(|before| epoch > before)
        };
        let files = files_below(&disks);
        let its = files.iter().filter(is_its);
        its.max_by_key(|path| path.metadata().unwrap().len())
            .unwrap()
            .clone()
    }

    fn number(&self, index: usize) -> u64 {
        u64::from_str_radix(self.point(index), 16).unwrap()
    }

    fn manifest(&self, index: usize) -> PathBuf {
        let folder = machine_folder(&self.site.vault()).join("points");
        folder.join(format!("{}.manifest", self.point(index)))
    }

    #[track_caller]
    fn check_restore(&self, index: usize) {
        let (point, copy) = &self.points[index];
        self.site.check_restore(point, copy);
    }

    #[track_caller]
    fn check_all(&self) {
        (0..self.points.len()).for_each(|index| self.check_restore(index));
        self.check_latest(self.points.len() - 1);
    }

    #[track_caller]
    fn check_latest(&self, index: usize) {
        let target = self.site.path("latest");
        let said = self.site.restore_to("latest", "disk", &target).success();
        assert!(said.contains(self.point(index)), "{said}");
        assert_same(&self.points[index].1, &target);
        fs::remove_file(target).unwrap();
    }

    #[track_caller]
    fn is_clean(&self) {
        for arguments in [&["verify"][..], &["verify", "--data"]] {
            let said = self.site.shipper(arguments).success();
            assert!(said.contains(": 0 problems"), "{said}");
        }
    }

    /// A repair that brings everything back.
    #[track_caller]
    fn repaired(&self, arguments: &[&str], objects: usize) {
        let words = [&["verify", "--repair"], arguments].concat();
        let said = self.site.shipper(&words).success();
        let expected = format!("{objects} objects repaired, 0 recovery points set aside");
        assert!(said.contains(&expected), "{said}");
        self.is_clean();
    }

    /// A repair that sets these points aside; returns what it says of it.
    #[track_caller]
    fn set_aside(&self, arguments: &[&str], points: &[usize]) -> String {
        let words = [&["verify", "--repair"], arguments].concat();
        let said = self.site.shipper(&words).failure();
        for index in 0..self.points.len() {
            let line = format!("Set aside: recovery point {}", self.point(index));
            assert_eq!(
                said.contains(&line),
                points.contains(&index),
                "{index}: {said}"
            );
        }
        // It is known now, and asked again nothing changes.
        let before = self.objects();
        self.site.shipper(&words).success();
        assert!(before == self.objects());
        self.is_clean();
        let shown: Value =
            serde_json::from_str(&self.site.shipper(&["points", "--json"]).success()).unwrap();
        for shown in shown.as_array().unwrap() {
            // The shipper makes one of its own after a scan.
            let is_it = |(point, _): &(String, PathBuf)| shown["epoch"] == **point;
            let index = self.points.iter().position(is_it);
            let is_aside = index.is_some_and(|index| points.contains(&index));
            assert!(
                index.is_none() || shown["set_aside"].is_string() == is_aside,
                "{shown}"
            );
        }
        said
    }

    /// It is refused, with the reason.
    #[track_caller]
    fn refuses(&self, index: usize, words: &[&str]) {
        let target = self.site.path("refused");
        let said = self.site.restore_to(self.point(index), "disk", &target);
        let said = said.failure();
        for word in [&["is set aside", self.point(index)], words].concat() {
            assert!(said.contains(word), "no {word:?} in: {said}");
        }
        assert!(!target.exists());
    }

    /// The shipper makes a point that is whole, and after another start one more; returns what the first added to the segments.
    #[track_caller]
    fn goes_on(&mut self) -> u64 {
        let before = self.site.segment_bytes();
        let shipper = self.site.start_shipper();
        self.keep();
        shipper.stop();
        let added = self.site.segment_bytes() - before;
        self.check_restore(self.points.len() - 1);
        self.check_latest(self.points.len() - 1);
        self.is_clean();
        let shipper = self.site.start_shipper();
        self.write(7 * AREA, 100_000);
        self.keep();
        shipper.stop();
        self.check_restore(self.points.len() - 1);
        self.check_latest(self.points.len() - 1);
        self.is_clean();
        added
    }
}

fn change(path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let mut content = fs::read(path).unwrap();
    change(&mut content);
    fs::write(path, content).unwrap();
}

/// Flips bits of frames: of the first and others.
fn damage_frames(path: &Path) {
    change(path, |content| {
        // Frames fill most of a segment, from its header on.
        for at in [16, content.len() / 2, content.len() * 3 / 4] {
            content[at] ^= 0x10;
        }
    });
}

#[test]
fn damaged_frames_come_back_from_the_disk() {
    for (codec, encrypted) in [
        ("zstd:1", true),
        ("zstd:1", false),
        ("lz4", true),
        ("lz4", false),
        ("none", true),
        ("none", false),
    ] {
        let world = World::new("frames", codec, encrypted);
        let before = world.objects();
        for index in 0..3 {
            damage_frames(&world.segment(index));
        }
        world.site.shipper(&["verify"]).success();
        world.site.shipper(&["verify", "--data"]).failure();
        world.repaired(&["--data"], 3);
        assert!(world.objects() == before, "{codec}, {encrypted}");
        world.check_all();
    }
}

#[test]
fn headers_and_ends_that_do_not_fit_come_back() {
    for encrypted in [true, false] {
        let world = World::new("headers", "zstd:1", encrypted);
        let before = world.objects();
        change(&world.segment(0), |content| content[3] ^= 1);
        change(&world.segment(1), |content| {
            content.extend_from_slice(b"more")
        });
        world.site.shipper(&["verify"]).failure();
        world.repaired(&[], 2);
        assert!(world.objects() == before);
        world.check_all();
    }
}

/// What a shipper that was killed before it released a point leaves, and one that had just uploaded a scan's segment.
fn leave_files(world: &World, index: usize) {
    let state = world.site.state();
    let spool = state.join("spool").join(world.point(index));
    fs::create_dir_all(&spool).unwrap();
    fs::copy(world.manifest(index), spool.join("manifest")).unwrap();
    for (which, folder) in [(index, spool), (0, state.join("copy"))] {
        let segment = world.segment(which);
        let name = segment.file_name().unwrap().to_str().unwrap();
        fs::copy(&segment, folder.join(format!("disk+{name}"))).unwrap();
    }
}

#[test]
fn what_still_waits_for_upload_brings_objects_back() {
    for encrypted in [true, false] {
        let world = World::new("files", "zstd:1", encrypted);
        let before = world.objects();
        leave_files(&world, 2);
        fs::remove_file(world.segment(0)).unwrap();
        // The end of the other: nothing but the file can bring it back.
        let segment = world.segment(2);
        change(&segment, |content| content.truncate(content.len() - 100));
        change(&world.manifest(2), |content| content[60] ^= 1);
        world.site.shipper(&["verify"]).failure();
        world.repaired(&[], 3);
        assert!(world.objects() == before);
        world.check_all();
    }
}

#[test]
fn a_file_that_is_damaged_itself_brings_nothing_back() {
    let world = World::new("bad-files", "zstd:1", true);
    leave_files(&world, 2);
    for path in files_below(&world.site.state()) {
        if path.extension().is_some_and(|ending| ending == "segment") {
            damage_frames(&path);
        }
    }
    fs::remove_file(world.segment(2)).unwrap();
    world.set_aside(&[], &[2]);
}

#[test]
fn a_lost_segment_costs_the_points_that_have_it_and_none_after() {
    for encrypted in [true, false] {
        let mut world = World::new("lost", "none", encrypted);
        let lost = world.segment(1);
        fs::remove_file(&lost).unwrap();
        let said = world.set_aside(&[], &[1, 2]);
        let name = lost.file_name().unwrap().to_str().unwrap();
        assert!(said.contains(name) && said.contains("missing"), "{said}");
        world.refuses(1, &[name]);
        world.refuses(2, &[name]);
        world.check_restore(0);
        world.check_latest(0);
        let added = world.goes_on();
        // What was lost is shipped again, and nothing else.
        assert!(
            (AREA..2 * AREA).contains(&added),
            "{added} bytes were added"
        );
        world.check_restore(0);
        world.refuses(2, &[name]);
        let said = world.site.shipper(&["verify"]).success();
        assert!(said.contains("2 that are set aside"), "{said}");
    }
}

#[test]
fn a_disk_of_which_nothing_is_lost_is_restored_from_a_point_that_is_set_aside() {
    let world = World::new("other", "lz4", true);
    fs::remove_file(world.segment(1)).unwrap();
    world.set_aside(&[], &[1, 2]);
    let restored = world
        .site
        .restore(world.point(2), "other", "other-restored");
    assert_same(&world.site.image("other"), &restored);
}

#[test]
fn without_its_first_copy_a_machine_begins_anew() {
    let mut world = World::new("first", "zstd:1", true);
    fs::remove_file(world.segment(0)).unwrap();
    world.set_aside(&["--data"], &[0, 1, 2]);
    let target = world.site.path("none");
    let said = world.site.restore_to("latest", "disk", &target).failure();
    assert!(said.contains("are set aside"), "{said}");
    world.goes_on();
}

#[test]
fn a_frame_that_the_disk_no_longer_has_sets_points_aside() {
    for (codec, encrypted) in [("zstd:1", true), ("none", false)] {
        let mut world = World::new("changed", codec, encrypted);
        damage_frames(&world.segment(1));
        world.write(FIRST_AREAS * AREA, AREA);
        let said = world.set_aside(&["--data"], &[1, 2]);
        assert!(said.contains("the disk has other blocks by now"), "{said}");
        world.refuses(2, &["the frame at offset 16"]);
        world.check_latest(0);
        world.goes_on();
    }
}

#[test]
fn what_was_overwritten_since_is_not_missed() {
    let mut world = World::new("overwritten", "zstd:1", true);
    let shipper = world.site.start_shipper();
    world.write(FIRST_AREAS * AREA, AREA);
    world.keep();
    shipper.stop();
    damage_frames(&world.segment(1));
    world.set_aside(&["--data"], &[1, 2, 3]);
    world.refuses(2, &[]);
    world.check_restore(3);
    world.goes_on();
}

#[test]
fn blocks_that_went_back_to_what_they_were_are_right_after_a_loss() {
    for encrypted in [true, false] {
        let mut world = World::new("back", "zstd:1", encrypted);
        let area = world.client.read(0, AREA as u32).unwrap();
        let shipper = world.site.start_shipper();
        // One block changes and becomes zero, of others the vault loses the change.
        world.write(0, AREA);
        world.client.zero(AREA, AREA as u32).unwrap();
        world.keep();
        shipper.stop();
        fs::remove_file(world.segment(3)).unwrap();
        world.set_aside(&[], &[3]);
        world.client.write(0, &area[..MIB as usize / 2]).unwrap();
        world.goes_on();
    }
}

#[test]
fn a_damaged_manifest_costs_its_point_alone() {
    for (encrypted, index) in [(true, 2), (false, 2), (true, 1), (false, 1)] {
        let mut world = World::new("manifest", "zstd:1", encrypted);
        change(&world.manifest(index), |content| content[70] ^= 4);
        let said = world.site.shipper(&["verify", "--repair"]).failure();
        let line = format!("Set aside: recovery point {}", world.point(index));
        assert!(said.contains(&line), "{said}");
        world.is_clean();
        world.refuses(index, &["damaged"]);
        let listed = world.site.shipper(&["points"]);
        assert!(listed.status.success(), "{}", listed.err);
        assert!(listed.err.contains("is set aside"), "{}", listed.err);
        world.check_latest(if index == 2 { 1 } else { 2 });
        world.goes_on();
        (0..3)
            .filter(|other| *other != index)
            .for_each(|other| world.check_restore(other));
    }
}

#[test]
fn a_manifest_that_is_gone_costs_its_point_alone() {
    let mut world = World::new("gone", "zstd:1", true);
    fs::remove_file(world.manifest(1)).unwrap();
    world.site.shipper(&["verify"]).failure();
    let said = world.site.shipper(&["verify", "--repair"]).failure();
    assert!(said.contains(&format!("Set aside: recovery point {}", world.point(1))));
    world.is_clean();
    world.check_restore(0);
    world.check_restore(2);
    world.goes_on();
}

#[test]
fn what_is_put_back_makes_points_whole_again() {
    for encrypted in [true, false] {
        let mut world = World::new("again", "zstd:1", encrypted);
        let before = world.objects();
        let segment = world.segment(1);
        let (whole, manifest) = (fs::read(&segment).unwrap(), world.manifest(0));
        damage_frames(&segment);
        change(&manifest, |content| content.truncate(40));
        world.write(FIRST_AREAS * AREA, AREA);
        world
            .site
            .shipper(&["verify", "--data", "--repair"])
            .failure();
        fs::write(&segment, whole).unwrap();
        fs::write(&manifest, &before[&manifest]).unwrap();
        // Also where nobody asks for all data: that it was lost is reason enough to look at it.
        let said = world.site.shipper(&["verify", "--repair"]).success();
        assert!(said.contains("3 whole again"), "{said}");
        assert!(world.objects() == before);
        world.check_all();
        world.goes_on();
    }
}

#[test]
fn a_damaged_record_is_found_and_written_anew() {
    for encrypted in [true, false] {
        let world = World::new("record", "zstd:1", encrypted);
        fs::remove_file(world.segment(2)).unwrap();
        world.set_aside(&[], &[2]);
        let record = machine_folder(&world.site.vault())
            .join("aside")
            .join(world.point(2));
        let whole = fs::read(&record).unwrap();
        for at in (0..whole.len()).step_by(7) {
            change(&record, |content| content[at] ^= 1);
            let said = world.site.shipper(&["verify"]).failure();
            assert!(
                said.contains(&format!("aside/{}", world.point(2))),
                "{at}: {said}"
            );
            fs::write(&record, &whole).unwrap();
        }
        change(&record, |content| content.truncate(30));
        world.site.shipper(&["verify", "--repair"]).failure();
        world.is_clean();
        world.refuses(2, &["missing"]);
    }
}

#[test]
fn only_the_holder_of_the_machine_repairs() {
    let world = World::new("holder", "zstd:1", true);
    damage_frames(&world.segment(0));
    let before = world.objects();
    let shipper = world.site.start_shipper();
    let said = world
        .site
        .shipper(&["verify", "--data", "--repair"])
        .failure();
    assert!(said.contains("in use"), "{said}");
    shipper.stop();
    // Another state folder takes the machine over.
    let (state, kept) = (world.site.state(), world.site.path("kept"));
    fs::rename(&state, &kept).unwrap();
    world.site.shipper(&["protect"]).success();
    fs::remove_dir_all(&state).unwrap();
    fs::rename(&kept, &state).unwrap();
    let said = world
        .site
        .shipper(&["verify", "--data", "--repair"])
        .failure();
    assert!(said.contains("generation"), "{said}");
    let after = world.objects();
    assert!(before.iter().all(|(path, content)| after[path] == *content));
    let url = world.site.vault_url();
    let mut command = world.site.shipper_program();
    command.args(["verify", "--repair", "--vault", &url, "--machine", "m1"]);
    let said = tests::process::run(&mut command);
    assert!(
        !said.status.success() && said.err.contains("--config"),
        "{}",
        said.err
    );
}

/// Begins a repair and kills it at the first line like this.
fn kill_repair(world: &World, line: &str) {
    let mut command = world
        .site
        .shipper_command(&["verify", "--data", "--repair"]);
    let repair = Daemon::spawn("repair", &mut command);
    let found = repair.await_line(Duration::from_secs(60), |said| said.starts_with(line));
    assert!(found.is_some(), "{}", repair.log());
    repair.kill();
}

#[test]
fn a_repair_that_is_killed_goes_on() {
    for encrypted in [true, false] {
        let mut world = World::new("killed", "zstd:1", encrypted);
        let before = world.objects();
        (0..3).for_each(|index| damage_frames(&world.segment(index)));
        kill_repair(&world, "Repaired");
        world
            .site
            .shipper(&["verify", "--data", "--repair"])
            .success();
        assert!(world.objects() == before);
        fs::remove_file(world.segment(1)).unwrap();
        kill_repair(&world, "Set aside");
        // It may have got to its end before that.
        let _said = world.site.shipper(&["verify", "--data", "--repair"]);
        world.is_clean();
        world.refuses(1, &["missing"]);
        world.refuses(2, &["missing"]);
        world.check_latest(0);
        world.goes_on();
    }
}

#[test]
fn guests_write_on_while_their_disk_is_read() {
    let mut world = World::new("guests", "zstd:1", true);
    let before = world.objects();
    for _ in 0..4 {
        (0..3).for_each(|index| damage_frames(&world.segment(index)));
        let mut command = world
            .site
            .shipper_command(&["verify", "--data", "--repair"]);
        let mut repair = Daemon::spawn("repair", &mut command);
        while repair.is_running() {
            // Beside what was shipped, and a block of it with what it has.
            let content = world.content(64 << 10);
            world.client.write(6 * AREA, &content).unwrap();
            let same = world.client.read(0, 4096).unwrap();
            world.client.write(0, &same).unwrap();
        }
        let (status, said) = repair.outcome(Duration::from_secs(60));
        assert!(status.success(), "{said}");
        assert!(world.objects() == before);
    }
    world.goes_on();
}

#[test]
fn a_vault_that_is_away_is_no_loss() {
    let world = World::new("away", "zstd:1", true);
    let (vault, elsewhere) = (world.site.vault(), world.site.path("elsewhere"));
    fs::rename(&vault, &elsewhere).unwrap();
    world.site.shipper(&["verify", "--repair"]).failure();
    fs::rename(&elsewhere, &vault).unwrap();
    world.is_clean();
    world.check_all();
}
