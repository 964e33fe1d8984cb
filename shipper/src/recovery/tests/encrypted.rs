//! Encrypted vaults: they restore, and whatever is changed, removed or swapped in one is found and named.

use std::fs;
use std::path::PathBuf;

use proptest::prelude::*;

use super::site::{Changes, Content, MACHINE, Site, apply, blocks, files_below, fill};
use crate::error::Result;
use crate::keys::aead::Cipher;
use crate::recovery::restore::restore;
use crate::recovery::verify::{VerifyOptions, verify};
use crate::segment::codec::Codec;
use crate::vault::Vault;
use crate::vault::aside::{self, Aside};
use tracker::extent::Epoch;

fn site() -> Site {
    Site::sealed(Cipher::preferred())
}

/// All objects of the vault, with paths below it.
pub fn objects(site: &Site) -> Vec<(PathBuf, String)> {
    let root = site.path("vault");
    let mut found = Vec::new();
    files_below(&root, &mut found);
    found.sort();
    let named = |path: PathBuf| {
        let key = path
            .strip_prefix(&root)
            .unwrap()
            .to_string_lossy()
            .into_owned();
        (path, key)
    };
    found.into_iter().map(named).collect()
}

/// What an open and a verification of all data find wrong with a machine.
pub fn problems(site: &Site) -> Vec<String> {
    let options = VerifyOptions {
        machine: Some(MACHINE.to_owned()),
        data: true,
        threads: 2,
    };
    let mut problems = Vec::new();
    let result = Vault::open(site.vault.url(), &site.access())
        .and_then(|vault| verify(&vault, &options, &mut |line| problems.push(line.to_owned())));
    problems.extend(result.err().map(|error| error.chain()));
    problems
}

/// A restore of a point by a newly opened vault.
pub fn restored(site: &Site, point: u64) -> Result<Vec<u8>> {
    let vault = Vault::open(site.vault.url(), &site.access())?;
    let options = site.options(Some(point), "restored");
    restore(&vault, &options, &|_, _| {})?;
    let found = fs::read(&options.target).unwrap();
    fs::remove_file(&options.target).unwrap();
    Ok(found)
}

/// Sets a third point aside, of which not even a manifest is left.
pub fn set_aside(site: &Site) {
    let record = Aside {
        epoch: Epoch(3),
        why: "Its manifest is gone".to_owned(),
        created: jiff::Timestamp::UNIX_EPOCH,
        lost: Vec::new(),
    };
    aside::write(&site.vault, MACHINE, &record).unwrap();
}

#[test]
fn both_ciphers_restore_and_verify() {
    for cipher in [Cipher::Aes256Gcm, Cipher::ChaCha20Poly1305] {
        let site = Site::sealed(cipher);
        let disks = fill(&site);
        for (point, disk) in &disks {
            assert!(restored(&site, *point).unwrap() == *disk, "{cipher:?}");
        }
        assert_eq!(problems(&site), Vec::<String>::new());
        let (report, lines) = site.verify(true);
        assert_eq!(
            (report.points, report.segments),
            (2, 3),
            "found by its claim"
        );
        assert_eq!(lines, Vec::<String>::new());
    }
}

#[test]
fn every_changed_byte_of_every_object_is_found_and_named() {
    let site = site();
    let disks = fill(&site);
    set_aside(&site);
    let objects = objects(&site);
    // The vault's own file, a key table, a claim, a record, two manifests, three segments.
    assert_eq!(objects.len(), 9, "{objects:?}");
    for (path, key) in objects {
        let whole = fs::read(&path).unwrap();
        for at in 0..whole.len() {
            let mut broken = whole.clone();
            broken[at] ^= 1 << (at % 8);
            fs::write(&path, &broken).unwrap();
            let problems = problems(&site);
            assert_eq!(problems.len(), 1, "byte {at} of {key}: {problems:?}");
            assert!(
                problems[0].contains(&key),
                "byte {at} of {key}: {problems:?}"
            );
            if let Ok(found) = restored(&site, 2) {
                assert!(found == disks[&2], "byte {at} of {key}");
            }
        }
        fs::write(&path, &whole).unwrap();
    }
    assert_eq!(problems(&site), Vec::<String>::new());
}

#[test]
fn every_removed_object_is_found_and_named() {
    let site = site();
    fill(&site);
    for (path, key) in objects(&site) {
        let whole = fs::read(&path).unwrap();
        fs::remove_file(&path).unwrap();
        // That a newest or oldest point was there cannot be known; whoever asks for it is told.
        let manifest = key.ends_with(".manifest");
        let point = if key.ends_with("01.manifest") { 1 } else { 2 };
        let found = match manifest {
            true => vec![restored(&site, point).unwrap_err().chain()],
            false => problems(&site),
        };
        let is_named = |line: &String| {
            line.contains(&key) || (key == "vault.json" && line.contains("no vault"))
        };
        assert!(found.iter().any(is_named), "{key}: {found:?}");
        fs::write(&path, &whole).unwrap();
    }
}

#[test]
fn every_object_in_the_place_of_another_is_found_and_named() {
    let site = site();
    let disks = fill(&site);
    set_aside(&site);
    let objects = objects(&site);
    for (path, key) in &objects {
        let whole = fs::read(path).unwrap();
        for (other, _) in objects.iter().filter(|(other, _)| other != path) {
            fs::copy(other, path).unwrap();
            let problems = problems(&site);
            assert!(
                problems.iter().any(|line| line.contains(key.as_str())),
                "{key}: {problems:?}"
            );
            if let Ok(found) = restored(&site, 2) {
                assert!(found == disks[&2], "{key}");
            }
        }
        fs::write(path, &whole).unwrap();
    }
}

#[test]
fn nothing_of_another_vault_machine_or_disk_opens() {
    let (one, two) = (site(), site());
    fill(&one);
    fill(&two);
    let (one_objects, two_objects) = (objects(&one), objects(&two));
    for ((path, key), (other, _)) in one_objects.iter().zip(&two_objects) {
        let whole = fs::read(path).unwrap();
        fs::copy(other, path).unwrap();
        assert!(
            restored(&one, 2).is_err() || !problems(&one).is_empty(),
            "{key}"
        );
        fs::write(path, &whole).unwrap();
    }
    // The same vault, another disk: the segment is copied to where the other one's would be.
    let site = site();
    let text = vec![(blocks(0, 1), Content::Text(1))];
    let segment = site.segment("disk", 1, 0, Codec::default(), 32, &text);
    let from = site.object(&site.vault.segment_key(MACHINE, "disk", &segment));
    let to = site.object(&site.vault.segment_key(MACHINE, "other", &segment));
    fs::create_dir_all(to.parent().unwrap()).unwrap();
    fs::copy(from, &to).unwrap();
    site.publish(1, 0, &[("other", 4096, &[segment])]);
    let error = restored(&site, 1).unwrap_err().chain();
    assert!(error.contains("another disk"), "{error}");
}

#[test]
fn nothing_in_the_vault_tells_names_or_content() {
    let site = site();
    let changes = vec![
        (blocks(0, 8), Content::Text(1)),
        (blocks(8, 8), Content::Noise(1)),
    ];
    let segment = site.segment("secret-disk", 1, 0, Codec::None, 4, &changes);
    site.publish(1, 0, &[("secret-disk", 16 * 4096, &[segment])]);
    let noise = Content::Noise(1).block(8);
    let print = site.vault.keys().fingerprint(&noise).0;
    for (path, key) in objects(&site) {
        let content = fs::read(&path).unwrap();
        let secrets: [&[u8]; 5] = [b"secret-disk", b"Block 0 of", &noise[..16], &print, b"here"];
        for secret in secrets {
            let shows = content.windows(secret.len()).any(|window| window == secret);
            assert!(!shows, "{key} shows {:?}", String::from_utf8_lossy(secret));
        }
        assert!(
            !key.contains("secret-disk") && !key.contains(&format!("/{MACHINE}/")),
            "{key}"
        );
    }
}

#[test]
fn a_segment_that_is_made_again_is_sealed_in_another_way() {
    let site = site();
    let text = vec![(blocks(0, 4), Content::Text(1))];
    let made = || {
        let segment = site.segment("disk", 1, 0, Codec::None, 32, &text);
        let path = site.object(&site.vault.segment_key(MACHINE, "disk", &segment));
        let content = fs::read(&path).unwrap();
        fs::remove_file(&path).unwrap();
        content
    };
    let (one, two) = (made(), made());
    assert_eq!(one.len(), two.len());
    let frame = 16..16 + 4 * 4096;
    let same = frame.clone().filter(|at| one[*at] == two[*at]).count();
    assert!(same < frame.len() / 16, "{same} bytes are the same");
}

fn changes() -> impl Strategy<Value = Changes> {
    let content = prop_oneof![
        Just(Content::Zero),
        Just(Content::StoredZero),
        any::<u32>().prop_map(Content::Noise)
    ];
    let piece = (0u64..20, 1u64..12, content);
    prop::collection::vec(piece, 1..8).prop_map(|pieces| {
        let mut next = 0;
        let place = |(gap, count, content)| {
            let extent = blocks(next + gap, count);
            next = extent.end_block();
            (extent, content)
        };
        pieces.into_iter().map(place).collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20))]

    #[test]
    fn any_changes_restore(
        points in prop::collection::vec((changes(), 1u64..=32), 1..4), size_sectors in 1u64..900,
    ) {
        let site = site();
        let size_bytes = size_sectors * 512;
        let mut model = vec![0; size_bytes as usize];
        let mut segments = Vec::new();
        for (epoch, (changes, frame_blocks)) in (1..).zip(&points) {
            segments.push(site.segment("disk", epoch, 0, Codec::default(), *frame_blocks, changes));
            apply(&mut model, changes);
            site.publish(epoch, epoch - 1, &[("disk", size_bytes, &segments)]);
            prop_assert!(restored(&site, epoch).unwrap() == model);
        }
        prop_assert_eq!(problems(&site), Vec::<String>::new());
    }
}
