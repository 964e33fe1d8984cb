//! Encryption from outside: how a vault is made and opened, key slots, and what the vault shows.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;
use tests::process::{Outcome, program, run};
use tests::seed::Random;
use tests::site::{Site, assert_same, files_below};

const MIB: u64 = 1 << 20;
const VARIABLE: &str = "TIDEMARK_PASSPHRASE";

/// A machine with one recovery point in an encrypted vault.
struct World {
    site: Site,
    point: String,
}

fn world() -> World {
    let site = Site::new(&[("secretdisk", 4 * MIB)]);
    let tracker = site.start_tracker();
    let mut client = site.connect("secretdisk");
    client.write(0, &content()).unwrap();
    site.protect();
    let shipper = site.start_shipper();
    let point = site.cut();
    shipper.stop();
    tracker.stop();
    World { site, point }
}

/// A text that compresses, and bytes that do not.
fn content() -> Vec<u8> {
    let text = b"A line of a file that nobody else shall read.\n";
    let mut bytes: Vec<u8> = text.iter().copied().cycle().take(MIB as usize).collect();
    bytes.extend(Random::new(3).bytes(MIB as usize));
    bytes
}

impl World {
    /// The shipper on the vault alone, without a terminal.
    fn shipper(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(program("shipper"));
        command
            .args(arguments)
            .arg("--vault")
            .arg(self.site.vault_url());
        command.stdin(Stdio::null()).env_remove(VARIABLE);
        command
    }

    fn key(&self, arguments: &[&str]) -> Outcome {
        let words = [&["key"][..], arguments].concat();
        let key_file = self.site.key_file();
        run(self.shipper(&words).arg("--key-file").arg(key_file))
    }

    fn slots(&self) -> Vec<Value> {
        let out = self.key(&["list", "--json"]).success();
        serde_json::from_str(&out).unwrap()
    }

    fn file(&self, name: &str, content: &str) -> PathBuf {
        let path = self.site.path(name);
        fs::write(&path, content).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        path
    }

    /// Restores with these arguments in place of a configuration.
    fn restore(&self, secret: &[&str], variable: Option<&str>) -> Outcome {
        let target = self.site.path("restored");
        let _none = fs::remove_file(&target);
        let mut command = self.shipper(&["restore", "--machine", "m1", "--point", &self.point]);
        command
            .args(["--disk", "secretdisk", "--to"])
            .arg(&target)
            .args(secret);
        command.envs(variable.map(|value| (VARIABLE, value)));
        run(&mut command)
    }

    #[track_caller]
    fn opens(&self, secret: &[&str], variable: Option<&str>) {
        self.restore(secret, variable).success();
        assert_same(&self.site.image("secretdisk"), &self.site.path("restored"));
    }

    #[track_caller]
    fn refuses(&self, secret: &[&str], variable: Option<&str>, words: &[&str]) {
        let said = self.restore(secret, variable).failure();
        for word in words {
            assert!(said.contains(word), "no {word:?} in: {said}");
        }
        assert!(!self.site.path("restored").exists());
    }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn the_vault_shows_neither_names_nor_content() {
    let world = world();
    let content = content();
    let noise = &content[MIB as usize..];
    for path in files_below(&world.site.vault()) {
        let bytes = fs::read(&path).unwrap();
        let shown = path
            .strip_prefix(world.site.vault())
            .unwrap()
            .to_string_lossy();
        for word in ["secretdisk", "/m1/", "\"m1\""] {
            assert!(!shown.contains(word), "{shown}");
        }
        for secret in [
            &b"secretdisk"[..],
            b"\"m1\"",
            b"nobody else",
            &noise[..32],
            &noise[4096..4128],
        ] {
            let shows = bytes.windows(secret.len()).any(|window| window == secret);
            assert!(
                !shows,
                "{shown} shows {:?}",
                String::from_utf8_lossy(secret)
            );
        }
    }
}

#[test]
fn the_spool_holds_what_the_vault_will() {
    let site = Site::new(&[("disk", 4 * MIB)]);
    let tracker = site.start_tracker();
    let mut client = site.connect("disk");
    site.protect();
    let shipper = site.start_shipper();
    site.cut();
    let elsewhere = site.path("elsewhere");
    fs::rename(site.vault(), &elsewhere).unwrap();
    client.write(0, &content()).unwrap();
    let mut cut = site
        .shipper_command(&["cut"])
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    tests::site::await_status(&site, "an epoch in the spool", |status| {
        tests::site::number(status, "/spool_epochs") >= 1
    });
    let spooled = files_below(&site.state());
    let segments: Vec<_> = spooled
        .iter()
        .filter(|path| text(path).ends_with(".segment"))
        .collect();
    assert!(!segments.is_empty(), "{spooled:?}");
    for path in segments {
        let bytes = fs::read(path).unwrap();
        let secret = b"nobody else";
        assert!(
            !bytes.windows(secret.len()).any(|window| window == secret),
            "{}",
            path.display()
        );
    }
    fs::rename(&elsewhere, site.vault()).unwrap();
    assert!(cut.wait().unwrap().success());
    let point = site.points().pop().unwrap();
    site.check_restore(&point, &site.image("disk"));
    site.shipper(&["verify", "--data"]).success();
    shipper.stop();
    tracker.stop();
}

#[test]
fn without_the_right_secret_nothing_opens() {
    let world = world();
    let other = world.file("other.key", &format!("{}\n", "ab".repeat(32)));
    let none = world.file("none.key", "not a key\n");
    let phrase = world.file("phrase", "wrong\n");
    world.opens(&["--key-file", text(&world.site.key_file())], None);
    world.refuses(
        &["--key-file", text(&other)],
        None,
        &["key file opens no key slot"],
    );
    world.refuses(
        &["--key-file", text(&none)],
        None,
        &["none.key", "64 hexadecimal digits"],
    );
    world.refuses(
        &["--key-file", text(&world.site.path("absent"))],
        None,
        &["absent"],
    );
    world.refuses(
        &["--passphrase-file", text(&phrase)],
        None,
        &["passphrase opens no key slot"],
    );
    world.refuses(&[], Some("wrong"), &["passphrase opens no key slot"]);
    world.refuses(
        &[],
        None,
        &["encrypted", "--key-file", "--passphrase-file", VARIABLE],
    );
    // The daemon has it from its configuration.
    let config = world
        .site
        .config_text()
        .replace("key_file =", "passphrase_file =");
    fs::write(world.site.config(), config).unwrap();
    let said = world.site.shipper(&["protect"]).failure();
    assert!(said.contains("passphrase"), "{said}");
}

#[test]
fn slots_are_added_rotated_and_removed_and_nothing_else_changes() {
    let world = world();
    let (one, two) = (
        world.file("one", "correct horse\n"),
        world.file("two", "battery staple"),
    );
    let machines = || -> Vec<_> {
        let files = files_below(&world.site.path("vault/machines"));
        files
            .into_iter()
            .map(|path| (fs::read(&path).unwrap(), path))
            .collect()
    };
    let before = machines();
    let first = world.slots()[0]["id"].as_str().unwrap().to_owned();
    // Added: both open.
    let out = world
        .key(&[
            "add",
            "--new-passphrase-file",
            text(&one),
            "--label",
            "for emergencies",
        ])
        .success();
    assert!(
        out.contains("for emergencies") && out.contains(&first),
        "{out}"
    );
    let slots = world.slots();
    assert_eq!(slots.len(), 2, "{slots:?}");
    assert_eq!(slots[1]["kind"], "passphrase");
    let second = slots[1]["id"].as_str().unwrap();
    world.opens(&["--passphrase-file", text(&one)], None);
    world.opens(&[], Some("correct horse"));
    // Rotated: the new one opens, the old one does not.
    world
        .key(&["rotate", second, "--new-passphrase-file", text(&two)])
        .success();
    world.opens(&["--passphrase-file", text(&two)], None);
    world.refuses(
        &["--passphrase-file", text(&one)],
        None,
        &["opens no key slot"],
    );
    assert_eq!(world.slots()[1]["label"], "for emergencies");
    slots_are_removed(&world, &two, &first, second);
    assert!(before == machines(), "slots change and no data");
}

fn slots_are_removed(world: &World, two: &Path, first: &str, second: &str) {
    // Removed, by the passphrase: the key file does not open any more, nor is its slot in the vault.
    let removed = run(world
        .shipper(&["key", "remove", first])
        .arg("--passphrase-file")
        .arg(two));
    removed.success();
    world.refuses(
        &["--key-file", text(&world.site.key_file())],
        None,
        &["opens no key slot"],
    );
    world.opens(&["--passphrase-file", text(two)], None);
    for path in files_below(&world.site.path("vault/keys")) {
        assert!(
            !fs::read_to_string(&path).unwrap().contains(first),
            "{}",
            path.display()
        );
    }
    // The last one stays.
    let last = run(world
        .shipper(&["key", "remove", second])
        .arg("--passphrase-file")
        .arg(two))
    .failure();
    assert!(last.contains("last key slot"), "{last}");
    world.opens(&["--passphrase-file", text(two)], None);
}

#[test]
fn changes_of_slots_that_cannot_be_made() {
    let world = world();
    let phrase = world.file("phrase", "a passphrase");
    let refused = |arguments: &[&str], word: &str| {
        let said = world.key(arguments).failure();
        assert!(said.contains(word), "no {word:?} in: {said}");
    };
    refused(&["remove", "00000000"], "00000000");
    refused(
        &["rotate", "nonsense", "--new-passphrase-file", text(&phrase)],
        "nonsense",
    );
    refused(&["add"], "--new-key-file");
    refused(
        &[
            "add",
            "--new-passphrase-file",
            text(&phrase),
            "--label",
            &"x".repeat(101),
        ],
        "Label",
    );
    let key_file = world.site.key_file();
    refused(
        &[
            "add",
            "--new-key-file",
            text(&key_file),
            "--generate-key-file",
        ],
        "already",
    );
    assert_eq!(world.slots().len(), 1);
    let plain = world.site.path("plain");
    let url = format!("file://{}", plain.display());
    run(Command::new(program("shipper")).args(["init", "--unencrypted", &url])).success();
    let said =
        run(Command::new(program("shipper")).args(["key", "list", "--vault", &url])).failure();
    assert!(said.contains("not encrypted"), "{said}");
}

#[test]
fn a_slot_that_was_removed_and_put_back_does_not_open() {
    let world = world();
    let phrase = world.file("phrase", "a passphrase");
    world
        .key(&["add", "--new-passphrase-file", text(&phrase)])
        .success();
    let table = world.site.path("vault/keys/2");
    let whole = fs::read_to_string(&table).unwrap();
    // A slot taken away by hand, a label changed, the vault's own file changed: the check shows each.
    let key_file = world.site.key_file();
    let check = |word: &str| {
        world.refuses(&["--key-file", text(&key_file)], None, &[word]);
    };
    fs::write(
        &table,
        whole.replace("\"label\":\"first\"", "\"label\":\"other\""),
    )
    .unwrap();
    check("keys/2");
    let begin = whole.find(",{\"id\"").unwrap();
    let end = whole.find("]}").unwrap();
    fs::write(&table, format!("{}{}", &whole[..begin], &whole[end..])).unwrap();
    check("keys/2");
    fs::write(&table, &whole).unwrap();
    let own = world.site.path("vault/vault.json");
    let before = fs::read_to_string(&own).unwrap();
    fs::write(&own, before.replace("\"created\": \"2", "\"created\": \"1")).unwrap();
    check("vault.json");
    fs::write(&own, before).unwrap();
    world.opens(&["--key-file", text(&key_file)], None);
}

#[test]
fn a_change_that_was_broken_off_is_made_to_its_end_by_the_next() {
    let world = world();
    let phrase = world.file("phrase", "a passphrase");
    let first = world.site.path("vault/keys/1");
    let before = fs::read(&first).unwrap();
    world
        .key(&["add", "--new-passphrase-file", text(&phrase)])
        .success();
    // As if the power had gone before the old table was taken back.
    fs::write(&first, before).unwrap();
    world.opens(&["--passphrase-file", text(&phrase)], None);
    let said = world.site.shipper(&["verify"]).failure();
    assert!(said.contains("keys/1"), "{said}");
    world
        .key(&["add", "--new-passphrase-file", text(&phrase)])
        .success();
    assert_eq!(fs::read_to_string(&first).unwrap(), "{\"replaced_by\":2}\n");
    world.site.shipper(&["verify"]).success();
}

#[test]
fn a_vault_is_encrypted_unless_it_is_said_by_name() {
    let site = Site::new(&[("disk", MIB)]);
    let url = |name: &str| format!("file://{}", site.path(name).display());
    let init = |name: &str, arguments: &[&str], variable: Option<&str>| {
        let mut command = Command::new(program("shipper"));
        command
            .arg("init")
            .arg(url(name))
            .args(arguments)
            .stdin(Stdio::null());
        command
            .env_remove(VARIABLE)
            .envs(variable.map(|value| (VARIABLE, value)));
        run(&mut command)
    };
    let said = init("none", &[], None).failure();
    for word in [
        "--key-file",
        "--generate-key-file",
        "--passphrase-file",
        VARIABLE,
        "--unencrypted",
    ] {
        assert!(said.contains(word), "no {word:?} in: {said}");
    }
    assert!(!site.path("none").exists(), "nothing was made");
    let key_file = site.path("new.key");
    let arguments = ["--key-file", text(&key_file), "--generate-key-file"];
    init("one", &arguments, None).success();
    let mode = fs::metadata(&key_file).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let said = init("two", &arguments, None).failure();
    assert!(
        said.contains("new.key") && !site.path("two").exists(),
        "{said}"
    );
    init("three", &[], Some("of the environment")).success();
    assert!(init("four", &[], Some("")).failure().contains("empty"));
    let file = |name: &str| fs::read_to_string(site.path(name).join("vault.json")).unwrap();
    for name in ["one", "three"] {
        assert!(!file(name).contains("root_key"), "{}", file(name));
    }
    assert!(
        init("five", &["--unencrypted"], None)
            .success()
            .contains("not encrypted")
    );
    assert!(file("five").contains("root_key"));
    let both = init(
        "six",
        &["--unencrypted", "--key-file", text(&key_file)],
        None,
    );
    assert!(!both.status.success());
}

#[test]
fn a_key_file_that_others_may_read_is_warned_about() {
    let world = world();
    let key_file = world.site.key_file();
    fs::set_permissions(&key_file, Permissions::from_mode(0o644)).unwrap();
    let outcome = world.key(&["list"]);
    assert!(outcome.err.contains("chmod 0600"), "{}", outcome.err);
    outcome.success();
    fs::set_permissions(&key_file, Permissions::from_mode(0o600)).unwrap();
    assert!(!world.key(&["list"]).err.contains("chmod"));
}

#[test]
fn making_a_vault_that_was_broken_off_is_made_to_its_end() {
    let site = Site::new(&[("disk", MIB)]);
    let init = || run(site.shipper_program().args(site.init(&site.vault_url())));
    init().success();
    fs::remove_file(site.path("vault/keys/1")).unwrap();
    let said = run(site
        .shipper_program()
        .args(["key", "list", "--vault", &site.vault_url()])
        .arg("--key-file")
        .arg(site.key_file()))
    .failure();
    assert!(said.contains("keys/1") && said.contains("init"), "{said}");
    init().success();
    let said = init().failure();
    assert!(said.contains("already"), "{said}");
    // Where something is in the vault, its keys were lost, and no others may take their place.
    fs::remove_file(site.path("vault/keys/1")).unwrap();
    fs::create_dir_all(site.path("vault/machines/x/generation")).unwrap();
    fs::write(
        site.path("vault/machines/x/generation/0000000000000001"),
        "x",
    )
    .unwrap();
    init().failure();
    assert!(!site.path("vault/keys/1").exists());
}
