//! Vaults restored by `scripts/vault-restore.py`, which shares nothing with the programs but the document of the format:
//! plain and encrypted ones that the shipper has just written, and those that are kept.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use tests::emulators::tool;
use tests::process::{Outcome, run, workspace};
use tests::seed::Random;
use tests::site::{Site, assert_same, files_below, machine_folder};

const MIB: u64 = 1 << 20;
const PASSPHRASE: &str = "Nobody has this one.";
/// The last block is short.
const SIZES: [(&str, u64); 2] = [("disk", 3 * MIB + 512), ("other", MIB)];
/// What the document says of the vaults that are kept.
const FIXTURE_HASHES: [&str; 2] = [
    "6e0b9cd2473ff412eb311eaf2460d5a285f1a5fcdb1bd4fb5d96238387332380",
    "86c7fe04e468e4ac9d38e0818db50fc8f9742ab170dbe0c6695dfd331b58b1d0",
];

/// The reader and the Python that has its packages.
struct Reader {
    python: PathBuf,
}

impl Reader {
    fn find() -> Option<Self> {
        let python = tool("reader/bin/python")?;
        Some(Self { python })
    }

    fn command(&self, vault: &Path, machine: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.python);
        command.arg(workspace().join("scripts/vault-restore.py"));
        command
            .arg(vault)
            .args(["--machine", machine])
            .args(arguments);
        command
    }

    fn restore(
        &self,
        vault: &Path,
        machine: &str,
        point: &str,
        secret: &[&str],
        to: &Path,
    ) -> Outcome {
        let _none = fs::remove_file(to);
        let disk = ["--point", point, "--disk", "disk"];
        let arguments = [&disk, secret].concat();
        run(self.command(vault, machine, &arguments).arg("--to").arg(to))
    }
}

/// A machine with several recovery points, and its disk `disk` at each.
struct World {
    site: Site,
    points: Vec<(String, PathBuf)>,
}

impl World {
    fn new(codec: &str, encrypted: bool) -> Self {
        let mut site = Site::new(&SIZES);
        site.codec = codec.to_owned();
        let tracker = site.start_tracker();
        match encrypted {
            true => site.protect(),
            false => site.protect_plain(),
        }
        let shipper = site.start_shipper();
        let mut world = Self {
            site,
            points: Vec::new(),
        };
        world.write_points();
        shipper.stop();
        tracker.stop();
        world
    }

    /// Texts that compress, noise that does not, runs that LZ4 repeats from close by, writes of zeroes and trims.
    fn write_points(&mut self) {
        let mut client = self.site.connect("disk");
        let mut random = Random::new(11);
        let line = b"A line of a file, of which there are many.\n";
        let text: Vec<u8> = line.iter().copied().cycle().take(MIB as usize).collect();
        client.write(0, &text).unwrap();
        client.write(MIB, &random.bytes(MIB as usize)).unwrap();
        client.write(2 * MIB, &vec![0x5a; 300_000]).unwrap();
        client.write(3 * MIB, &[7; 512]).unwrap();
        self.keep();
        client.trim(4096, 8 * 4096).unwrap();
        client.zero(MIB, 64 * 4096).unwrap();
        client.write(2 * MIB + 512, &random.bytes(5000)).unwrap();
        self.keep();
        let mixed: Vec<u8> = (0..200_000u32)
            .flat_map(|n| (n / 3).to_le_bytes())
            .collect();
        client.write(2 * MIB, &mixed[..700_000]).unwrap();
        client.write(8192, &text[..10_000]).unwrap();
        client.trim(2 * MIB - 4096, 8192).unwrap();
        self.keep();
    }

    fn keep(&mut self) {
        let point = self.site.cut();
        let copy = self.site.path(&format!("copy-{point}"));
        fs::copy(self.site.image("disk"), &copy).unwrap();
        self.points.push((point, copy));
    }

    fn target(&self) -> PathBuf {
        self.site.path("restored")
    }

    #[track_caller]
    fn check_all(&self, reader: &Reader, secret: &[&str]) {
        let (vault, target) = (self.site.vault(), self.target());
        for (point, copy) in &self.points {
            let said = reader.restore(&vault, "m1", point, secret, &target);
            assert!(said.success().contains(point.as_str()));
            assert_same(copy, &target);
        }
        let (newest, copy) = self.points.last().unwrap();
        let said = reader.restore(&vault, "m1", "latest", secret, &target);
        assert!(said.success().contains(newest.as_str()));
        assert_same(copy, &target);
        let arguments = [&["--list"], secret].concat();
        let listed = run(&mut reader.command(&vault, "m1", &arguments)).success();
        let points: Vec<_> = listed
            .lines()
            .map(|line| line.split(' ').next().unwrap())
            .collect();
        // A first copy may have ended with a point of its own.
        assert_eq!(points, self.site.points());
        let mut kept = self.points.iter();
        assert!(kept.all(|(point, _)| points.contains(&&**point)));
    }
}

#[test]
fn plain_vaults_of_every_codec_are_restored() {
    let Some(reader) = Reader::find() else { return };
    for codec in ["zstd:1", "lz4", "none"] {
        World::new(codec, false).check_all(&reader, &[]);
    }
}

#[test]
fn encrypted_vaults_of_every_codec_are_restored() {
    let Some(reader) = Reader::find() else { return };
    for codec in ["zstd:3", "lz4", "none"] {
        let world = World::new(codec, true);
        let key_file = world.site.key_file();
        let key_file = key_file.to_str().unwrap();
        world.check_all(&reader, &["--key-file", key_file]);
        let passphrase = world.site.path("passphrase");
        fs::write(&passphrase, format!("{PASSPHRASE}\n")).unwrap();
        fs::set_permissions(&passphrase, Permissions::from_mode(0o600)).unwrap();
        let passphrase = passphrase.to_str().unwrap();
        let add = ["key", "add", "--new-passphrase-file", passphrase];
        world.site.shipper(&add).success();
        // The table has been replaced by the next one.
        world.check_all(&reader, &["--passphrase-file", passphrase]);
    }
}

/// BLAKE3 is what the document names the disks by, and Python has none.
#[test]
fn the_vaults_that_are_kept_are_restored() {
    let Some(reader) = Reader::find() else { return };
    let folder = tempfile::tempdir().unwrap();
    let (key_file, passphrase) = (folder.path().join("key"), folder.path().join("passphrase"));
    let digits: String = (0xa0..0xc0).map(|byte| format!("{byte:02x}")).collect();
    fs::write(&key_file, digits + "\n").unwrap();
    fs::write(&passphrase, "correct horse battery staple").unwrap();
    let by_key = ["--key-file", key_file.to_str().unwrap()];
    let by_passphrase = ["--passphrase-file", passphrase.to_str().unwrap()];
    for (name, secret) in [
        ("vault-1", &[][..]),
        ("vault-2", &[]),
        ("vault-3", &by_key),
        ("vault-3", &by_passphrase),
    ] {
        let vault = workspace().join("shipper/tests/fixtures").join(name);
        for (point, hash) in (1..).zip(FIXTURE_HASHES) {
            let target = folder.path().join("restored");
            let point = format!("{point:016x}");
            let said = reader.restore(&vault, "machine", &point, secret, &target);
            said.success();
            let found = blake3::hash(&fs::read(&target).unwrap()).to_string();
            assert_eq!(found, hash, "{name}, point {point}");
        }
    }
}

#[test]
fn a_changed_byte_of_an_encrypted_vault_is_refused() {
    let Some(reader) = Reader::find() else { return };
    let world = World::new("zstd:1", true);
    let key_file = world.site.key_file();
    let secret = ["--key-file", key_file.to_str().unwrap()];
    let (newest, copy) = world.points.last().unwrap();
    let mut random = Random::from_environment("independent_reader");
    let mut refused = 0;
    for path in files_below(&world.site.vault()) {
        let shown = path.to_string_lossy().into_owned();
        // What the newest point is not made of is not read for it.
        let is_other = shown.ends_with(".segment") && shown.contains("other");
        let is_older = shown.ends_with(".manifest") && !shown.contains(newest.as_str());
        if is_other || is_older || shown.contains("/generation/") {
            continue;
        }
        let whole = fs::read(&path).unwrap();
        for _ in 0..3 {
            let mut broken = whole.clone();
            let at = random.below(whole.len() as u64) as usize;
            broken[at] ^= 1 << random.below(8);
            fs::write(&path, &broken).unwrap();
            let vault = world.site.vault();
            let said = reader.restore(&vault, "m1", newest, &secret, &world.target());
            match said.status.success() {
                // Of the other disk, whose name the keys do not show.
                true => assert_same(copy, &world.target()),
                false => {
                    assert!(!world.target().exists());
                    assert!(said.err.starts_with("vault-restore: "), "{}", said.err);
                    refused += 1;
                }
            }
        }
        fs::write(&path, &whole).unwrap();
    }
    // vault.json, the key table, the manifest and the disk's segments at least.
    assert!(refused >= 9, "{refused} were refused");
}

#[test]
fn a_point_that_is_set_aside_is_not_the_latest() {
    let Some(reader) = Reader::find() else { return };
    for encrypted in [true, false] {
        let world = World::new("zstd:1", encrypted);
        let key_file = world.site.key_file();
        let secret = match encrypted {
            true => &["--key-file", key_file.to_str().unwrap()][..],
            false => &[],
        };
        let (vault, target) = (world.site.vault(), world.target());
        let (newest, _) = world.points.last().unwrap();
        let manifest = machine_folder(&vault).join(format!("points/{newest}.manifest"));
        let mut content = fs::read(&manifest).unwrap();
        content[60] ^= 1;
        fs::write(&manifest, content).unwrap();
        world.site.shipper(&["verify", "--repair"]).failure();
        let said = reader
            .restore(&vault, "m1", newest, secret, &target)
            .failure();
        assert!(said.contains("is set aside"), "{said}");
        let (point, copy) = &world.points[1];
        let said = reader.restore(&vault, "m1", "latest", secret, &target);
        assert!(said.success().contains(point.as_str()));
        assert_same(copy, &target);
        let arguments = [&["--list"], secret].concat();
        let listed = run(&mut reader.command(&vault, "m1", &arguments)).success();
        assert!(
            listed.contains(&format!("{newest}  set aside: ")),
            "{listed}"
        );
    }
}

#[test]
fn a_manifest_that_comes_back_is_no_point() {
    let Some(reader) = Reader::find() else { return };
    for encrypted in [true, false] {
        let mut world = World::new("zstd:1", encrypted);
        let key_file = world.site.key_file();
        let secret = match encrypted {
            true => &["--key-file", key_file.to_str().unwrap()][..],
            false => &[],
        };
        let (vault, target) = (world.site.vault(), world.target());
        let (oldest, _) = world.points.first().unwrap().clone();
        let manifest = machine_folder(&vault).join(format!("points/{oldest}.manifest"));
        let content = fs::read(&manifest).unwrap();
        // Of one slot the newest point stays.
        world.site.settings =
            "retention.points = \"1y for 1y\"\nretention.grace = \"0s\"\n".to_owned();
        world.site.write_config();
        world.site.shipper(&["prune"]).success();
        assert!(!manifest.exists(), "it is removed");
        world.points.drain(..2);
        world.check_all(&reader, secret);
        // As a copy of the vault would bring it back, or a shipper that was asleep.
        fs::write(&manifest, content).unwrap();
        world.check_all(&reader, secret);
        let said = reader
            .restore(&vault, "m1", &oldest, secret, &target)
            .failure();
        assert!(said.contains("has no recovery point"), "{said}");
        let (newest, _) = world.points.last().unwrap();
        assert_eq!(&world.site.points(), std::slice::from_ref(newest));
    }
}

#[test]
fn what_cannot_be_done_is_said() {
    let Some(reader) = Reader::find() else { return };
    let world = World::new("lz4", true);
    let (vault, target) = (world.site.vault(), world.target());
    let key_file = world.site.key_file();
    let secret = ["--key-file", key_file.to_str().unwrap()];
    let other = world.site.path("other.key");
    fs::write(&other, "11".repeat(32)).unwrap();
    let other = ["--key-file", other.to_str().unwrap()];
    let point = &*world.points[0].0;
    let missing = "00000000000000ff";
    for (machine, point, secret, words) in [
        ("m1", point, &[][..], "encrypted: give --key-file"),
        ("m1", point, &other, "opens no key slot"),
        ("m2", point, &secret, "no recovery point of machine m2"),
        ("m1", missing, &secret, missing),
        ("m1", "yesterday", &secret, "yesterday"),
        ("../m1", point, &secret, "no name of a machine"),
    ] {
        let said = reader.restore(&vault, machine, point, secret, &target);
        let said = said.failure();
        assert!(said.contains(words), "no {words:?} in: {said}");
        assert!(!target.exists());
    }
    let mut command = reader.command(&vault, "m1", &secret);
    let said = run(command.arg("--to").arg(&target)).failure();
    assert!(said.contains("disk, other"), "{said}");
    fs::write(&target, "precious").unwrap();
    let arguments = [&["--disk", "disk"], &secret[..]].concat();
    let mut command = reader.command(&vault, "m1", &arguments);
    let said = run(command.arg("--to").arg(&target)).failure();
    assert!(said.contains("exists"), "{said}");
    assert_eq!(fs::read(&target).unwrap(), b"precious");
}
