//! Bad input to both programs: each case ends with an error that says what, where and what to do, with
//! an exit status that is not zero, and with nothing lost.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs::{self, File, Permissions};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use tests::process::{Daemon, Outcome, program, run};
use tests::seed::Random;
use tests::site::{Site, assert_same, files_below};

const MIB: u64 = 1 << 20;
/// Nobody, for cases that root's rights would hide.
const NOBODY: u32 = 65534;

fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// The message must name every one of the words, in any case of letters.
#[track_caller]
fn says(outcome: Outcome, words: &[&str]) {
    let message = outcome.failure();
    let lower = message.to_lowercase();
    for word in words {
        assert!(
            lower.contains(&word.to_lowercase()),
            "no {word:?} in: {message}"
        );
    }
}

fn serve(site: &Site) -> Outcome {
    run(&mut site.serve_command())
}

/// A site with a journal that knows some changes.
fn site_with_journal() -> Site {
    let mut site = Site::new(&[("disk", 16 * MIB)]);
    site.tracker_arguments = vec!["--ring-size".into(), "16KiB".into()];
    let tracker = site.start_tracker();
    let mut client = site.connect("disk");
    for block in 0..40 {
        client.write(block * 12288, &[3; 4096]).unwrap();
    }
    tracker.kill();
    site
}

/// The command as nobody: the program is copied to where nobody may run it.
fn as_nobody(site: &Site, command: &Command) -> Command {
    fs::set_permissions(site.root(), Permissions::from_mode(0o777)).unwrap();
    let name = Path::new(command.get_program()).file_name().unwrap();
    let copy = site.root().join(name);
    if !copy.exists() {
        fs::copy(command.get_program(), &copy).unwrap();
    }
    let mut nobody = Command::new(copy);
    nobody.args(command.get_args()).current_dir(site.root());
    if is_root() {
        nobody.uid(NOBODY).gid(NOBODY);
    }
    nobody
}

// Disks.

#[test]
fn a_disk_that_is_missing() {
    let site = Site::new(&[("disk", MIB)]);
    fs::remove_file(site.image("disk")).unwrap();
    says(serve(&site), &["disk.img", "no such file"]);
    assert!(!site.journal("disk").exists(), "no journal of nothing");
}

#[test]
fn a_disk_that_is_a_folder() {
    let site = Site::new(&[("disk", MIB)]);
    fs::remove_file(site.image("disk")).unwrap();
    fs::create_dir(site.image("disk")).unwrap();
    says(
        serve(&site),
        &["disk.img", "neither a file nor a block device"],
    );
}

#[test]
fn a_disk_that_may_not_be_written() {
    let site = Site::new(&[("disk", MIB)]);
    fs::set_permissions(site.image("disk"), Permissions::from_mode(0o444)).unwrap();
    let mut command = as_nobody(&site, &site.serve_command());
    says(run(&mut command), &["disk.img", "--read-only"]);
}

#[test]
fn a_disk_of_an_odd_size() {
    for size in [0, 1, 511, MIB + 100] {
        let site = Site::new(&[("disk", size)]);
        says(serve(&site), &["disk.img", "512", &size.to_string()]);
    }
}

#[test]
fn a_disk_that_another_tracker_serves() {
    let site = Site::new(&[("disk", MIB)]);
    let _tracker = site.start_tracker();
    let mut client = site.connect("disk");
    client.write(0, &[1; 512]).unwrap();
    let mut second = Command::new(program("tracker"));
    second.args(["serve", "--disk"]).arg(site.image("disk"));
    second.arg("--socket").arg(site.path("other.sock"));
    says(run(&mut second), &["disk.img", "in use"]);
    assert_eq!(
        client.read(0, 512).unwrap(),
        [1; 512],
        "the first one goes on"
    );
}

#[test]
fn two_disks_of_one_name_or_path() {
    let site = Site::new(&[("disk", MIB), ("other", MIB)]);
    let image = site.image("disk");
    let mut command = Command::new(program("tracker"));
    command.arg("serve").arg("--socket").arg(site.socket());
    command.arg("--disk").arg(format!("a={}", image.display()));
    let mut same_name = site.image("other").into_os_string();
    same_name = format!("a={}", same_name.to_string_lossy()).into();
    says(
        run(command.arg("--disk").arg(same_name)),
        &["two disks", "\"a\""],
    );
    let mut command = Command::new(program("tracker"));
    command.arg("serve").arg("--socket").arg(site.socket());
    for name in ["a", "b"] {
        command
            .arg("--disk")
            .arg(format!("{name}={}", image.display()));
    }
    says(run(&mut command), &["twice", "disk.img"]);
}

// Sockets.

#[test]
fn a_socket_path_that_is_taken() {
    let site = Site::new(&[("disk", MIB)]);
    fs::write(site.socket(), "a file").unwrap();
    says(serve(&site), &["nbd.sock", "not a socket"]);
    assert_eq!(fs::read_to_string(site.socket()).unwrap(), "a file");
    fs::remove_file(site.socket()).unwrap();
    let somebody = UnixListener::bind(site.socket()).unwrap();
    says(serve(&site), &["nbd.sock", "in use"]);
    drop(somebody);
    // What a dead process left behind is no obstacle.
    site.start_tracker().stop();
}

#[test]
fn a_socket_path_that_is_too_long_or_nowhere() {
    let site = Site::new(&[("disk", MIB)]);
    for (path, word) in [
        (site.path(&"x".repeat(120)), "107"),
        (site.path("no/such/folder.sock"), "folder.sock"),
    ] {
        let mut command = Command::new(program("tracker"));
        command.args(["serve", "--disk"]).arg(site.image("disk"));
        command.arg("--socket").arg(path);
        says(run(&mut command), &["socket", word]);
    }
}

#[test]
fn the_control_socket_answers_bad_input_with_errors() {
    let site = Site::new(&[("disk", MIB)]);
    let _tracker = site.start_tracker();
    let mode = fs::metadata(site.control()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let mut random = Random::from_environment("control_bad_input");
    let mut lines: Vec<Vec<u8>> = [
        "",
        "{}",
        "[]",
        "null",
        "\"x\"",
        "{\"protocol\":1}",
        "{\"protocol\":99,\"command\":\"status\"}",
        "{\"protocol\":1,\"command\":\"dance\"}",
        "{\"protocol\":1,\"command\":\"commit\",\"epoch\":999999}",
        "{\"protocol\":1,\"command\":\"capture-begin\",\"epoch\":5}",
        "{\"protocol\":1,\"command\":\"capture-end\",\"epoch\":5,\"outcome\":\"sealed\"}",
        "{\"protocol\":1,\"command\":\"commit\",\"epoch\":-1}",
    ]
    .iter()
    .map(|line| line.as_bytes().to_vec())
    .collect();
    lines.push(vec![0xff, 0xfe]);
    lines.push(vec![b'['; 60_000]);
    for _ in 0..50 {
        let length = random.below(300) as usize;
        lines.push(
            random
                .bytes(length)
                .into_iter()
                .filter(|byte| *byte != b'\n')
                .collect(),
        );
    }
    for line in lines {
        let mut stream = UnixStream::connect(site.control()).unwrap();
        stream.write_all(&line).unwrap();
        stream.write_all(b"\n").unwrap();
        let mut answer = String::new();
        BufReader::new(&stream).read_line(&mut answer).unwrap();
        let shown = String::from_utf8_lossy(&line);
        assert!(answer.starts_with("{\"error\":"), "{shown}: {answer}");
    }
    // An endless line is cut off.
    let mut stream = UnixStream::connect(site.control()).unwrap();
    while stream.write_all(&[b'x'; 4096]).is_ok() {}
    site.tracker_status();
}

// Journals.

#[test]
fn a_journal_of_another_disk() {
    let site = Site::new(&[("disk", MIB), ("other", MIB)]);
    site.start_tracker().stop();
    fs::copy(site.journal("disk"), site.journal("other")).unwrap();
    says(serve(&site), &["other.img.hrl", "--resync"]);
}

#[test]
fn a_disk_that_was_replaced_by_a_smaller_one_under_its_journal() {
    let site = Site::new(&[("disk", MIB)]);
    site.start_tracker().stop();
    File::options()
        .write(true)
        .open(site.image("disk"))
        .unwrap()
        .set_len(MIB / 2)
        .unwrap();
    says(serve(&site), &["disk.img.hrl", "--resync"]);
}

#[test]
fn a_truncated_journal() {
    let site = site_with_journal();
    let length = fs::metadata(site.journal("disk")).unwrap().len();
    let whole = fs::read(site.journal("disk")).unwrap();
    for cut in [0, 1, 4095, 4096, 8192, length / 2, length - 1] {
        fs::write(site.journal("disk"), &whole[..cut as usize]).unwrap();
        says(serve(&site), &["disk.img.hrl", "--resync"]);
        let left = fs::metadata(site.journal("disk")).unwrap().len();
        assert_eq!(left, cut, "a refused journal is not touched");
    }
    resync_helps(site);
}

#[test]
fn a_journal_of_a_future_version() {
    let site = site_with_journal();
    let mut bytes = fs::read(site.journal("disk")).unwrap();
    for page in bytes.chunks_exact_mut(4096).take(2) {
        page[8..12].copy_from_slice(&99_u32.to_le_bytes());
        let check = xxhash_rust::xxh3::xxh3_64(&page[..4088]);
        page[4088..].copy_from_slice(&check.to_le_bytes());
    }
    fs::write(site.journal("disk"), &bytes).unwrap();
    says(serve(&site), &["disk.img.hrl", "version 99"]);
    assert_eq!(
        fs::read(site.journal("disk")).unwrap(),
        bytes,
        "it is not touched"
    );
    let verify = run(Command::new(program("tracker"))
        .args(["journal", "verify"])
        .arg(site.journal("disk")));
    assert!(!verify.status.success());
    assert!(verify.out.contains("version 99"), "{}", verify.out);
    resync_helps(site);
}

/// With `--resync` the disk is served, every block counts as changed, the broken file is kept.
fn resync_helps(mut site: Site) {
    site.tracker_arguments.push("--resync".into());
    let tracker = site.start_tracker();
    let status = site.tracker_status();
    assert!(
        status
            .pointer("/machine/disks/0/resync")
            .is_some_and(|resync| !resync.is_null())
    );
    let kept = files_below(site.root())
        .iter()
        .any(|path| path.to_string_lossy().contains(".broken-"));
    assert!(kept, "the broken journal is kept");
    assert_eq!(site.connect("disk").read(0, 4096).unwrap(), [3; 4096]);
    tracker.stop();
}

#[test]
fn a_journal_with_any_byte_changed() {
    let site = site_with_journal();
    let whole = fs::read(site.journal("disk")).unwrap();
    let tracker = site.start_tracker();
    let dirty = site.tracker_status()["machine"]["disks"][0]["open_dirty_blocks"]
        .as_u64()
        .unwrap();
    assert!(dirty >= 40);
    tracker.kill();
    let mut random = Random::from_environment("a_journal_with_any_byte_changed");
    let mut refused = 0;
    for round in 0..120 {
        // Most of a journal is empty; three of four flips hit its head or bytes that are in use.
        let used: Vec<usize> = (0..whole.len()).filter(|at| whole[*at] != 0).collect();
        let at = if round % 4 == 0 {
            random.below(whole.len() as u64) as usize
        } else {
            used[random.below(used.len() as u64) as usize]
        };
        let mut broken = whole.clone();
        broken[at] ^= 1 << random.below(8);
        fs::write(site.journal("disk"), &broken).unwrap();
        if check_flip(&site, at, dirty) {
            refused += 1;
        }
    }
    assert!(refused > 0, "none of the changed bytes was noticed");
}

/// Either refused with the file's name, or served with nothing forgotten. True if refused.
fn check_flip(site: &Site, at: usize, dirty: u64) -> bool {
    let mut command = site.serve_command();
    let begun = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        Daemon::start("tracker", &mut command)
    }));
    match begun {
        Ok(tracker) => {
            let status = site.tracker_status();
            let disk = &status["machine"]["disks"][0];
            let known = disk["open_dirty_blocks"].as_u64().unwrap();
            let all = !disk["resync"].is_null();
            assert!(
                all || known >= dirty,
                "byte {at}: {known} of {dirty} blocks are known"
            );
            tracker.kill();
            false
        }
        Err(_) => {
            says(serve(site), &["disk.img.hrl", "--resync"]);
            true
        }
    }
}

#[test]
fn journal_commands_on_files_that_are_none() {
    let site = Site::new(&[("disk", MIB)]);
    fs::write(site.path("text"), "no journal").unwrap();
    fs::write(site.path("zeroes"), vec![0; 1 << 20]).unwrap();
    for verb in ["verify", "dump"] {
        for name in ["text", "zeroes", "missing"] {
            let outcome = run(Command::new(program("tracker"))
                .args(["journal", verb])
                .arg(site.path(name)));
            says(outcome, &[name]);
        }
    }
}

#[test]
fn a_command_without_its_tracker() {
    let site = Site::new(&[("disk", MIB)]);
    let outcome = run(Command::new(program("tracker"))
        .args(["status", "--control"])
        .arg(site.control()));
    says(outcome, &["nbd.sock.control", "running"]);
}

#[test]
fn usage_errors_have_status_two() {
    for arguments in [
        &["serve"][..],
        &["serve", "--disk", "x", "--socket", "y", "--workers", "0"],
        &[
            "serve",
            "--disk",
            "x",
            "--socket",
            "y",
            "--ring-size",
            "7MB",
        ],
        &["dance"],
    ] {
        let outcome = run(Command::new(program("tracker")).args(arguments));
        assert_eq!(outcome.status.code(), Some(2), "{arguments:?}");
    }
    let outcome = run(Command::new(program("shipper")).arg("dance"));
    assert_eq!(outcome.status.code(), Some(2));
}

// Configurations.

/// A protected machine with one recovery point and everything stopped.
struct Protected {
    site: Site,
    point: String,
}

fn protected() -> Protected {
    let site = Site::new(&[("disk", 4 * MIB)]);
    let tracker = site.start_tracker();
    let mut client = site.connect("disk");
    client.write(0, &Random::new(1).bytes(1 << 20)).unwrap();
    site.protect();
    let shipper = site.start_shipper();
    let point = site.cut();
    shipper.stop();
    tracker.stop();
    Protected { site, point }
}

#[test]
fn configurations_that_are_wrong() {
    let site = Site::new(&[("disk", MIB)]);
    let _tracker = site.start_tracker();
    run(Command::new(program("shipper")).args(site.init(&site.vault_url()))).success();
    let good = site.config_text();
    let twice = format!("{good}[[disk]]\nname = \"disk\"\npath = \"/somewhere/else\"\n");
    let cases: Vec<(String, &[&str])> = vec![
        (format!("surprise = 1\n{good}"), &["surprise"]),
        (good.replace("path =", "paht ="), &["paht"]),
        (good.replace("\"1h\"", "\"1 parsec\""), &["interval"]),
        (good.replace("\"1h\"", "30"), &["interval"]),
        (good.replace("\"1h\"", "\"-5s\""), &["interval"]),
        (
            format!("spool_budget = \"8 bananas\"\n{good}"),
            &["spool_budget"],
        ),
        (good.replace("zstd:1", "zip"), &["codec", "zip"]),
        (good.replace("zstd:1", "zstd:99"), &["codec"]),
        (good.replace("\"m1\"", "\"No Such Name!\""), &["machine"]),
        (good.replace("\"m1\"", "\"../m1\""), &["machine"]),
        (twice, &["disk"]),
        (good.replace("[[disk]]", "[[dusk]]"), &["dusk"]),
        (good.replace("file://", "gopher://"), &["gopher"]),
        ("machine = ".to_owned(), &["config.toml"]),
        (String::new(), &["machine"]),
    ];
    for (text, words) in cases {
        fs::write(site.config(), &text).unwrap();
        for command in [&["protect"][..], &["run", "--once"]] {
            let mut words = words.to_vec();
            words.push("config.toml");
            println!("{text}");
            says(site.shipper(command), &words);
        }
    }
    fs::remove_file(site.config()).unwrap();
    says(site.shipper(&["protect"]), &["config.toml"]);
    assert!(!site.state().exists(), "nothing was begun");
}

#[test]
fn a_configuration_of_another_disk_than_the_trackers() {
    let site = Site::new(&[("disk", MIB)]);
    let _tracker = site.start_tracker();
    run(Command::new(program("shipper")).args(site.init(&site.vault_url()))).success();
    fs::write(
        site.config(),
        site.config_text()
            .replace("name = \"disk\"", "name = \"dusk\""),
    )
    .unwrap();
    says(site.shipper(&["protect"]), &["dusk"]);
}

#[test]
fn commands_of_the_shipper_that_lack_their_counterpart() {
    let Protected { site, .. } = protected();
    says(site.shipper(&["cut"]), &["shipper"]);
    let _tracker = site.start_tracker();
    let _shipper = site.start_shipper();
    says(site.shipper(&["run"]), &["state"]);
    site.cut();
}

// Vaults.

#[test]
fn a_vault_that_is_missing_or_none() {
    let site = Site::new(&[("disk", MIB)]);
    let _tracker = site.start_tracker();
    site.write_config();
    says(site.shipper(&["protect"]), &["vault", "init"]);
    assert!(
        !site.vault().exists(),
        "a missing vault is not made by the way"
    );
    fs::create_dir(site.vault()).unwrap();
    fs::write(site.path("vault/holiday.jpg"), "a picture").unwrap();
    says(site.shipper(&["protect"]), &["vault"]);
    for text in ["", "{}", "not json", "{\"format\": 99}"] {
        fs::write(site.path("vault/vault.json"), text).unwrap();
        says(site.shipper(&["protect"]), &["vault.json"]);
        assert_eq!(
            fs::read_to_string(site.path("vault/vault.json")).unwrap(),
            text
        );
    }
}

#[test]
fn a_vault_is_not_made_twice() {
    let site = Site::new(&[("disk", MIB)]);
    run(Command::new(program("shipper")).args(site.init(&site.vault_url()))).success();
    let before = fs::read(site.path("vault/vault.json")).unwrap();
    says(
        run(Command::new(program("shipper")).args(site.init(&site.vault_url()))),
        &["vault"],
    );
    assert_eq!(fs::read(site.path("vault/vault.json")).unwrap(), before);
    says(
        run(Command::new(program("shipper")).args(site.init("ftp://x/y"))),
        &["ftp"],
    );
    says(
        run(Command::new(program("shipper")).args(site.init("nonsense"))),
        &["nonsense"],
    );
}

#[test]
fn a_vault_that_may_not_be_written() {
    let site = Site::new(&[("disk", MIB)]);
    fs::create_dir(site.path("locked")).unwrap();
    fs::set_permissions(site.path("locked"), Permissions::from_mode(0o555)).unwrap();
    let mut command = Command::new(program("shipper"));
    command
        .arg("init")
        .arg("--unencrypted")
        .arg(format!("file://{}/vault", site.path("locked").display()));
    says(run(&mut as_nobody(&site, &command)), &["locked"]);
    assert_eq!(files_below(&site.path("locked")), Vec::<PathBuf>::new());
}

#[test]
fn a_vault_with_a_changed_byte() {
    let Protected { site, point } = protected();
    site.shipper(&["verify", "--data"]).success();
    let mut random = Random::from_environment("a_vault_with_a_changed_byte");
    let objects: Vec<PathBuf> = files_below(&site.path("vault/machines"))
        .into_iter()
        .filter(|path| {
            path.to_string_lossy().ends_with(".segment")
                || path.to_string_lossy().ends_with(".manifest")
        })
        .collect();
    assert!(objects.len() >= 2, "{objects:?}");
    for path in objects {
        let whole = fs::read(&path).unwrap();
        for _ in 0..10 {
            let mut broken = whole.clone();
            let at = random.below(broken.len() as u64) as usize;
            broken[at] ^= 1 << random.below(8);
            fs::write(&path, &broken).unwrap();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            println!("byte {at} of {name}");
            says(site.shipper(&["verify", "--data"]), &[&name]);
            let target = site.path("restored");
            let outcome = site.restore_to(&point, "disk", &target);
            if outcome.status.success() {
                // A byte that no block of this disk needs.
                assert_same(&site.image("disk"), &target);
                fs::remove_file(&target).unwrap();
            } else {
                outcome.failure();
                assert!(!target.exists(), "a broken restore must not look complete");
            }
        }
        fs::write(&path, &whole).unwrap();
    }
    site.restore(&point, "disk", "restored-at-last");
    assert_same(&site.image("disk"), &site.path("restored-at-last"));
}

#[test]
fn a_vault_that_lacks_an_object() {
    let Protected { site, point } = protected();
    let segment = files_below(&site.path("vault/machines"))
        .into_iter()
        .find(|path| path.to_string_lossy().ends_with(".segment"))
        .expect("a segment");
    fs::remove_file(&segment).unwrap();
    let name = segment.file_name().unwrap().to_string_lossy().into_owned();
    says(site.shipper(&["verify"]), &[&name]);
    says(
        site.restore_to(&point, "disk", &site.path("restored")),
        &[&name],
    );
    assert!(!site.path("restored").exists());
}

// Restores.

#[test]
fn a_restore_of_what_is_not_there() {
    let Protected { site, point } = protected();
    let target = site.path("restored");
    says(
        site.restore_to("00000000000fffff", "disk", &target),
        &["00000000000fffff"],
    );
    says(
        site.restore_to("yesterday", "disk", &target),
        &["yesterday"],
    );
    says(site.restore_to(&point, "dusk", &target), &["dusk"]);
    assert!(!target.exists());
}

#[test]
fn a_restore_onto_an_existing_file() {
    let Protected { site, point } = protected();
    let target = site.path("precious");
    fs::write(&target, "precious").unwrap();
    says(
        site.restore_to(&point, "disk", &target),
        &["precious", "exists"],
    );
    assert_eq!(fs::read_to_string(&target).unwrap(), "precious");
    says(
        site.restore_to(&point, "disk", &site.path("no/such/folder")),
        &["folder"],
    );
}

/// A mount that goes away with its value.
struct Mount {
    folder: PathBuf,
    device: Option<String>,
}

impl Mount {
    fn tmpfs(folder: PathBuf, size: &str) -> Self {
        fs::create_dir(&folder).unwrap();
        run(Command::new("mount")
            .args([
                "-t",
                "tmpfs",
                "-o",
                &format!("size={size},mode=0777"),
                "tmpfs",
            ])
            .arg(&folder))
        .success();
        Self {
            folder,
            device: None,
        }
    }

    /// An ext4 file system on a loop device over a new file.
    fn ext4(site: &Site) -> Self {
        let file = site.path("mounted.img");
        File::create(&file).unwrap().set_len(32 * MIB).unwrap();
        let mut mkfs = Command::new("/sbin/mkfs.ext4");
        run(mkfs.args(["-q", "-F"]).arg(&file)).success();
        let device = run(Command::new("/sbin/losetup")
            .args(["--find", "--show"])
            .arg(&file))
        .success();
        let device = device.trim().to_owned();
        let folder = site.path("mounted");
        fs::create_dir(&folder).unwrap();
        let mount = Self {
            folder,
            device: Some(device.clone()),
        };
        run(Command::new("mount").arg(device).arg(&mount.folder)).success();
        mount
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _not_there = Command::new("umount")
            .arg("--lazy")
            .arg(&self.folder)
            .status();
        if let Some(device) = &self.device {
            let _not_there = Command::new("/sbin/losetup")
                .args(["--detach", device])
                .status();
        }
    }
}

fn can_mount() -> bool {
    if !is_root() {
        println!("not run: mounting needs root");
    }
    is_root()
}

#[test]
fn a_restore_into_a_full_file_system() {
    if !can_mount() {
        return;
    }
    let Protected { site, point } = protected();
    let small = Mount::tmpfs(site.path("small"), "256k");
    let target = small.folder.join("restored");
    says(
        site.restore_to(&point, "disk", &target),
        &["restored", "space"],
    );
    assert!(!target.exists(), "half a disk must not look complete");
    site.restore(&point, "disk", "elsewhere");
}

#[test]
fn a_restore_onto_a_mounted_or_small_device() {
    if !can_mount() || !Path::new("/dev/loop-control").exists() {
        return;
    }
    let Protected { site, point } = protected();
    let mount = Mount::ext4(&site);
    let device = PathBuf::from(mount.device.clone().unwrap());
    fs::write(mount.folder.join("file"), "precious").unwrap();
    says(
        site.restore_to(&point, "disk", &device),
        &["mounted", &device.to_string_lossy()],
    );
    assert_eq!(
        fs::read_to_string(mount.folder.join("file")).unwrap(),
        "precious"
    );
    // A device of 32 MiB is large enough for the disk; once free, it takes it.
    run(Command::new("umount").arg(&mount.folder)).success();
    site.restore_to(&point, "disk", &device).success();
    let size = fs::metadata(site.image("disk")).unwrap().len() as usize;
    let mut found = vec![0; size];
    File::open(&device)
        .unwrap()
        .read_exact_at(&mut found, 0)
        .unwrap();
    assert!(found == fs::read(site.image("disk")).unwrap());
    drop(mount);

    File::create(site.path("small.img"))
        .unwrap()
        .set_len(MIB)
        .unwrap();
    let out = run(Command::new("/sbin/losetup")
        .args(["--find", "--show"])
        .arg(site.path("small.img")));
    let small = Mount {
        folder: site.path("nowhere"),
        device: Some(out.success().trim().to_owned()),
    };
    let device = PathBuf::from(small.device.clone().unwrap());
    says(
        site.restore_to(&point, "disk", &device),
        &["small", &device.to_string_lossy()],
    );
}

#[test]
fn a_vault_that_is_full() {
    if !can_mount() {
        return;
    }
    let site = Site::new(&[("disk", 16 * MIB)]);
    let full = Mount::tmpfs(site.vault(), "4m");
    let tracker = site.start_tracker();
    let mut client = site.connect("disk");
    site.protect();
    let shipper = site.start_shipper();
    let first = site.cut();
    client.write(0, &Random::new(5).bytes(8 << 20)).unwrap();
    let mut cut = site.shipper_command(&["cut"]).spawn().unwrap();
    let noticed = shipper.await_line(std::time::Duration::from_secs(60), |line| {
        line.to_lowercase().contains("space")
    });
    assert!(
        noticed.is_some(),
        "a full vault is not told:\n{}",
        shipper.log()
    );
    // The guest feels nothing, the old recovery point stands, and with room all goes on.
    client.write(9 << 20, &[4; 4096]).unwrap();
    run(Command::new("mount")
        .args(["-o", "remount,size=64m"])
        .arg(&full.folder))
    .success();
    assert!(cut.wait().unwrap().success(), "{}", shipper.log());
    let second = site.cut();
    assert!(second > first);
    assert_same(
        &site.image("disk"),
        &site.restore(&second, "disk", "restored"),
    );
    site.restore(&first, "disk", "restored-first");
    shipper.stop();
    tracker.stop();
}
