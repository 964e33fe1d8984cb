//! Old vaults stay readable: one that the first version wrote, byte for byte.

use std::fs;
use std::path::{Path, PathBuf};

use tracker::extent::Epoch;

use super::site::{Changes, Content, MACHINE, apply, blocks, put_consistent, put_segment};
use crate::keys::aead::Cipher;
use crate::keys::secret::SecretText;
use crate::keys::slots::{Argon2Cost, UserSecret};
use crate::keys::source::{Access, parse_key};
use crate::recovery::restore::{RestoreOptions, restore};
use crate::recovery::verify::{VerifyOptions, verify};
use crate::segment::codec::Codec;
use crate::segment::format::SegmentName;
use crate::store::{Created, VaultUrl};
use crate::vault::keyring::Change;
use crate::vault::layout::generation_key;
use crate::vault::manifest::Consistency;
use crate::vault::{Protection, Vault, generation};

/// Ten blocks and a sector.
pub const SIZE_BYTES: u64 = 10 * 4096 + 512;
/// BLAKE3 of the disk at each point, without a key.
pub const DISK_HASHES: [(u64, &str); 2] = [
    (
        1,
        "6e0b9cd2473ff412eb311eaf2460d5a285f1a5fcdb1bd4fb5d96238387332380",
    ),
    (
        2,
        "86c7fe04e468e4ac9d38e0818db50fc8f9742ab170dbe0c6695dfd331b58b1d0",
    ),
];

const VAULT_FILE: &str = r#"{
  "format": 1,
  "vault": "54696465206d61726b206578616d706c",
  "created": "2026-01-01T00:00:00Z",
  "root_key": "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f",
  "key_slots": []
}
"#;

const CLAIM: &str = "{\"claimed\":\"2026-01-01T00:00:00Z\",\"holder\":\"example\"}\n";

/// The vault of the first version.
pub fn folder() -> PathBuf {
    fixture("vault-1")
}

pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures")
        .join(name)
}

pub fn open() -> Vault {
    open_at(&folder())
}

fn open_at(folder: &Path) -> Vault {
    Vault::open(&format!("file://{}", folder.display()), &Access::default()).unwrap()
}

/// What the segments hold: point, number, codec, changes.
fn contents() -> Vec<(u64, u32, Codec, Changes)> {
    let first = vec![
        (blocks(0, 3), Content::Text(1)),
        (blocks(4, 4), Content::Zero),
        (blocks(10, 1), Content::Sector(1)),
    ];
    let second = vec![
        (blocks(1, 1), Content::Text(2)),
        (blocks(2, 1), Content::Zero),
    ];
    let third = vec![(blocks(8, 1), Content::Noise(2))];
    vec![
        (1, 0, Codec::Zstd(1), first),
        (2, 0, Codec::Lz4, second),
        (2, 1, Codec::None, third),
    ]
}

/// The disk at a point.
fn model(point: u64) -> Vec<u8> {
    let mut model = vec![0; SIZE_BYTES as usize];
    for (_, _, _, changes) in contents().iter().filter(|(epoch, ..)| *epoch <= point) {
        apply(&mut model, changes);
    }
    model
}

#[test]
fn the_vault_of_version_one_restores() {
    assert_restores(&open());
}

#[test]
fn the_vault_with_manifests_of_version_two_restores() {
    let vault = open_at(&fixture("vault-2"));
    assert_restores(&vault);
    let said = |epoch| {
        let manifest = vault.manifest(MACHINE, Epoch(epoch)).unwrap();
        (manifest.consistency, manifest.reason)
    };
    for (epoch, (consistency, reason)) in (1..).zip(CONSISTENCIES) {
        assert_eq!(said(epoch), (consistency, reason.map(str::to_owned)));
    }
    assert_whole(&vault);
}

#[track_caller]
fn assert_restores(vault: &Vault) {
    let folder = tempfile::tempdir().unwrap();
    for (point, hash) in DISK_HASHES {
        let options = RestoreOptions {
            machine: MACHINE.to_owned(),
            point: Some(Epoch(point)),
            disk: Some("disk".to_owned()),
            target: folder.path().join(format!("disk-{point}")),
            threads: 2,
        };
        restore(vault, &options, &|_, _| {}).unwrap();
        let found = fs::read(&options.target).unwrap();
        assert!(found == model(point), "point {point}");
        assert_eq!(blake3::hash(&found).to_string(), hash, "point {point}");
    }
}

#[test]
fn the_vault_of_version_one_is_whole() {
    assert_whole(&open());
}

#[track_caller]
fn assert_whole(vault: &Vault) {
    let options = VerifyOptions {
        machine: None,
        data: true,
        threads: 2,
    };
    let mut problems = Vec::new();
    let report = verify(vault, &options, &mut |line| problems.push(line.to_owned())).unwrap();
    assert_eq!(problems, Vec::<String>::new());
    assert_eq!((report.points, report.segments), (2, 3));
}

/// What the manifests of version two say.
const CONSISTENCIES: [(Consistency, Option<&str>); 2] = [
    (Consistency::Crash, Some("The guest agent does not answer")),
    (Consistency::Application, None),
];

/// The same vault as this program writes it, with manifests of the newest version. A new version of the format gets a fixture of its own,
/// made by keeping what this writes.
fn write_vault(folder: &Path) -> Vault {
    write_plain_head(folder);
    let vault = open_at(folder);
    let created = vault
        .store()
        .create(&generation_key(MACHINE, 1), CLAIM.into());
    assert_eq!(created.unwrap(), Created::New);
    write_points(vault)
}

/// The key file of the encrypted vault.
const KEY_FILE: &str = "a0a1a2a3a4a5a6a7a8a9aaabacadaeafb0b1b2b3b4b5b6b7b8b9babbbcbdbebf\n";
/// Its passphrase.
const PASSPHRASE: &str = "correct horse battery staple";

/// The same encrypted.
fn write_sealed_vault(folder: &Path) -> Vault {
    let url = format!("file://{}", folder.display());
    let protection = Protection::Sealed {
        secret: UserSecret::KeyFile(parse_key(KEY_FILE.as_bytes()).unwrap()),
        label: "first".to_owned(),
        cost: Argon2Cost::default(),
        cipher: Cipher::Aes256Gcm,
    };
    Vault::create(&url, &protection).unwrap();
    let secret = &UserSecret::Passphrase(SecretText::new(PASSPHRASE.into()));
    let label = "for emergencies";
    let secrets = tempfile::tempdir().unwrap();
    let access = by_key_file(secrets.path());
    Vault::change_keys(&url, &access, &Change::Add { secret, label }).unwrap();
    let vault = Vault::open(&url, &access).unwrap();
    assert_eq!(generation::claim(&vault, MACHINE, "example").unwrap(), 1);
    write_points(vault)
}

fn by_key_file(folder: &Path) -> Access {
    let path = folder.join("key");
    fs::write(&path, KEY_FILE).unwrap();
    Access {
        key_file: Some(path),
        ..Access::default()
    }
}

fn by_passphrase(folder: &Path) -> Access {
    let path = folder.join("passphrase");
    fs::write(&path, PASSPHRASE).unwrap();
    Access {
        passphrase_file: Some(path),
        ..Access::default()
    }
}

/// The encrypted vault, opened by the key file.
pub fn open_sealed() -> Vault {
    let secrets = tempfile::tempdir().unwrap();
    open_sealed_by(&by_key_file(secrets.path()))
}

fn open_sealed_by(access: &Access) -> Vault {
    let url = format!("file://{}", fixture("vault-3").display());
    Vault::open(&url, access).unwrap()
}

#[test]
fn the_encrypted_vault_restores_by_either_secret() {
    let secrets = tempfile::tempdir().unwrap();
    for access in [by_key_file(secrets.path()), by_passphrase(secrets.path())] {
        let vault = open_sealed_by(&access);
        assert_restores(&vault);
        assert_whole(&vault);
    }
}

fn write_plain_head(folder: &Path) {
    VaultUrl::Folder(folder.to_owned()).prepare().unwrap();
    fs::write(folder.join("vault.json"), VAULT_FILE).unwrap();
}

fn write_points(vault: Vault) -> Vault {
    let scratch = tempfile::tempdir().unwrap();
    let mut segments = Vec::new();
    for (epoch, number, codec, changes) in contents() {
        let name = SegmentName {
            generation: 1,
            first_epoch: Epoch(epoch),
            last_epoch: Epoch(epoch),
            number,
        };
        segments.push(put_segment(
            &vault,
            scratch.path(),
            "disk",
            name,
            codec,
            32,
            &changes,
        ));
    }
    let [first, second] = CONSISTENCIES;
    put_consistent(
        &vault,
        Epoch(1),
        Epoch::ZERO,
        first,
        &[("disk", SIZE_BYTES, &segments[..1])],
    );
    put_consistent(
        &vault,
        Epoch(2),
        Epoch(1),
        second,
        &[("disk", SIZE_BYTES, &segments)],
    );
    vault
}

#[test]
fn what_is_written_today_restores_to_the_same() {
    let folder = tempfile::tempdir().unwrap();
    assert_restores(&write_vault(&folder.path().join("vault")));
    assert_restores(&write_sealed_vault(&folder.path().join("sealed")));
}
