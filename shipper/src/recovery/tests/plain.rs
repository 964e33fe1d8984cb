//! Plain vaults: whatever is changed, removed or swapped in one is found and named, as far as its checks go.
//!
//! They do not go to the vault's own file, which holds their key, and not to whether an object that nothing else names is there.

use std::fs;

use super::encrypted::{objects, problems, restored, set_aside};
use super::site::{Content, Site, blocks, fill};
use crate::segment::codec::Codec;

/// Objects of a small vault, with a point that is set aside.
fn site() -> (Site, std::collections::BTreeMap<u64, Vec<u8>>) {
    let site = Site::new();
    let disks = fill(&site);
    set_aside(&site);
    (site, disks)
}

#[test]
fn every_changed_byte_of_every_object_is_found_and_named() {
    let (site, disks) = site();
    let objects = objects(&site);
    // The vault's own file, a record, two manifests, three segments.
    assert_eq!(objects.len(), 7, "{objects:?}");
    for (path, key) in objects {
        let whole = fs::read(&path).unwrap();
        for at in 0..whole.len() {
            let mut broken = whole.clone();
            broken[at] ^= 1 << (at % 8);
            fs::write(&path, &broken).unwrap();
            let problems = problems(&site);
            let is_named = problems.iter().any(|line| line.contains(&key));
            // The time in the vault's own file, and spaces between fields, are nothing that counts.
            assert!(
                is_named || key == "vault.json",
                "byte {at} of {key}: {problems:?}"
            );
            match restored(&site, 2) {
                Ok(found) => assert!(found == disks[&2], "byte {at} of {key}"),
                Err(_) => assert!(!problems.is_empty(), "byte {at} of {key}"),
            }
        }
        for cut in [0, 1, whole.len() / 2, whole.len() - 1] {
            fs::write(&path, &whole[..cut]).unwrap();
            if whole[cut..] == *b"\n" {
                // The last line feed of the vault's own file.
                continue;
            }
            assert!(!problems(&site).is_empty(), "{key} cut at {cut}");
        }
        fs::write(&path, &whole).unwrap();
    }
    assert_eq!(problems(&site), Vec::<String>::new());
}

#[test]
fn every_removed_object_is_found_and_named() {
    let (site, _) = site();
    for (path, key) in objects(&site) {
        let whole = fs::read(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let found = match key.rsplit_once('.') {
            // That a newest or oldest point was there cannot be known; whoever asks for it is told.
            Some((name, "manifest")) => {
                let point = if name.ends_with("01") { 1 } else { 2 };
                vec![restored(&site, point).unwrap_err().chain()]
            }
            _ => problems(&site),
        };
        let is_named = |line: &String| {
            line.contains(&key) || (key == "vault.json" && line.contains("no vault"))
        };
        // A record that is gone says nothing more; its point is not there either.
        let is_record = key.contains("/aside/");
        assert!(is_record || found.iter().any(is_named), "{key}: {found:?}");
        fs::write(&path, &whole).unwrap();
    }
}

#[test]
fn every_object_in_the_place_of_another_is_found_and_named() {
    let (site, disks) = site();
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
fn nothing_of_another_vault_is_taken() {
    let ((one, _), (two, _)) = (site(), site());
    let (one_objects, two_objects) = (objects(&one), objects(&two));
    for ((path, key), (other, _)) in one_objects.iter().zip(&two_objects) {
        let whole = fs::read(path).unwrap();
        fs::copy(other, path).unwrap();
        assert!(!problems(&one).is_empty(), "{key}");
        fs::write(path, &whole).unwrap();
    }
}

#[test]
fn a_point_that_is_set_aside_is_not_the_newest_and_no_problem() {
    for site in [
        Site::new(),
        Site::sealed(crate::keys::aead::Cipher::preferred()),
    ] {
        let disks = fill(&site);
        let text = vec![(blocks(0, 2), Content::Text(9))];
        let segment = site.segment("disk", 3, 0, Codec::default(), 32, &text);
        fs::remove_file(site.object(&site.vault.segment_key("machine", "disk", &segment))).unwrap();
        site.publish(3, 2, &[("disk", disks[&1].len() as u64, &[segment])]);
        assert_eq!(problems(&site).len(), 1);
        set_aside(&site);
        assert_eq!(problems(&site), Vec::<String>::new());
        let newest = site.vault.newest("machine").unwrap().unwrap();
        assert_eq!(newest.epoch.0, 2);
        let report = site.verify(true).0;
        assert_eq!((report.points, report.set_aside), (2, 1));
        let said = restored(&site, 3).unwrap_err().chain();
        assert!(
            said.contains("set aside") && said.contains("Its manifest is gone"),
            "{said}"
        );
    }
}
