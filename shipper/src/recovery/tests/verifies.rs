//! Verification: what is a problem, and what is none.

use std::fs;

use super::site::{Content, MACHINE, Site, blocks, small};
use crate::error::ErrorKind;
use crate::recovery::verify::{VerifyOptions, verify};
use crate::segment::codec::Codec;
use crate::vault::layout::segment_key;

/// Exactly one problem, with all these words.
#[track_caller]
fn assert_problem(site: &Site, data: bool, words: &[&str]) {
    let (_, problems) = site.verify(data);
    assert_eq!(problems.len(), 1, "{problems:?}");
    for word in words {
        assert!(
            problems[0].contains(word),
            "no {word:?} in: {}",
            problems[0]
        );
    }
}

fn remove(site: &Site, ending: &str) {
    let objects = site.objects();
    let path = objects
        .iter()
        .find(|path| path.to_string_lossy().ends_with(ending));
    fs::remove_file(path.unwrap()).unwrap();
}

#[test]
fn a_whole_vault_has_no_problems() {
    let (site, _) = small();
    let (report, problems) = site.verify(false);
    assert_eq!(problems, Vec::<String>::new());
    assert_eq!((report.points, report.segments), (2, 3));
    let (with_data, problems) = site.verify(true);
    assert_eq!(problems, Vec::<String>::new());
    assert!(with_data.bytes > report.bytes);
}

#[test]
fn damaged_data_shows_only_where_data_are_read() {
    let (site, _) = small();
    let segment = site
        .objects()
        .into_iter()
        .find(|path| path.to_string_lossy().ends_with(".segment"));
    let path = segment.unwrap();
    let mut bytes = fs::read(&path).unwrap();
    bytes[20] ^= 1;
    fs::write(&path, bytes).unwrap();
    assert_eq!(site.verify(false).1, Vec::<String>::new());
    let name = path.file_name().unwrap().to_str().unwrap();
    let points = "recovery points 0000000000000001, 0000000000000002";
    assert_problem(&site, true, &[name, points, "damaged"]);
}

#[test]
fn an_object_that_is_gone_or_longer_is_a_problem() {
    let (site, _) = small();
    remove(&site, "0000000000000002-00000001.segment");
    assert_problem(
        &site,
        false,
        &["0000000000000002-00000001.segment", "missing"],
    );
    let (site, _) = small();
    let path = &site.objects()[0];
    let mut bytes = fs::read(path).unwrap();
    bytes.push(0);
    fs::write(path, bytes).unwrap();
    assert_problem(&site, false, &[path.file_name().unwrap().to_str().unwrap()]);
}

#[test]
fn a_point_that_is_gone_is_a_problem_unless_it_was_the_oldest() {
    let site = Site::new();
    let text = vec![(blocks(0, 1), Content::Text(1))];
    let segment = [site.segment("disk", 1, 0, Codec::default(), 32, &text)];
    for epoch in [1, 5, 9] {
        let previous = if epoch == 1 { 0 } else { epoch - 4 };
        site.publish(epoch, previous, &[("disk", 4096, &segment)]);
    }
    assert_eq!(site.verify(true).1, Vec::<String>::new());
    remove(&site, "0000000000000001.manifest");
    assert_eq!(site.verify(true).1, Vec::<String>::new());
    let site = Site::new();
    let segment = [site.segment("disk", 1, 0, Codec::default(), 32, &text)];
    for (epoch, previous) in [(1, 0), (9, 5)] {
        site.publish(epoch, previous, &[("disk", 4096, &segment)]);
    }
    assert_problem(
        &site,
        true,
        &["0000000000000005.manifest", "missing", "0000000000000009"],
    );
}

#[test]
fn manifests_that_contradict_each_other_are_a_problem() {
    let site = Site::new();
    let text = vec![(blocks(0, 1), Content::Text(1))];
    let segment = site.segment("disk", 1, 0, Codec::default(), 32, &text);
    let mut other = segment.clone();
    other.zero_blocks += 1;
    site.publish(1, 0, &[("disk", 4096, std::slice::from_ref(&segment))]);
    site.publish(2, 1, &[("disk", 4096, &[other])]);
    let key = segment_key(MACHINE, "disk", &segment);
    assert_problem(
        &site,
        false,
        &[&key, "0000000000000001", "0000000000000002", "another way"],
    );
}

#[test]
fn a_segment_of_another_disk_is_a_problem() {
    let site = Site::new();
    let text = vec![(blocks(0, 1), Content::Text(1))];
    let segment = site.segment("disk", 1, 0, Codec::default(), 32, &text);
    let (from, to) = (
        segment_key(MACHINE, "disk", &segment),
        segment_key(MACHINE, "other", &segment),
    );
    let to_path = site.object(&to);
    fs::create_dir_all(to_path.parent().unwrap()).unwrap();
    fs::copy(site.object(&from), &to_path).unwrap();
    site.publish(1, 0, &[("other", 4096, &[segment])]);
    assert_problem(&site, false, &[&to, "another disk"]);
}

#[test]
fn many_affected_points_are_counted() {
    let site = Site::new();
    let text = vec![(blocks(0, 1), Content::Text(1))];
    let segment = [site.segment("disk", 1, 0, Codec::default(), 32, &text)];
    for epoch in 1..=9 {
        site.publish(epoch, epoch - 1, &[("disk", 4096, &segment)]);
    }
    remove(&site, ".segment");
    assert_problem(&site, true, &["0000000000000003 and 6 more"]);
}

#[test]
fn segments_of_no_point_are_no_problem() {
    let (site, _) = small();
    let text = vec![(blocks(0, 1), Content::Text(1))];
    site.segment("disk", 7, 0, Codec::default(), 32, &text);
    let (report, problems) = site.verify(true);
    assert_eq!((report.segments, problems), (3, Vec::new()));
}

#[test]
fn a_bad_manifest_does_not_hide_the_rest() {
    let (site, _) = small();
    let path = site.object("machines/machine/points/0000000000000001.manifest");
    fs::write(&path, "no manifest").unwrap();
    remove(&site, "0000000000000002-00000001.segment");
    let (report, mut problems) = site.verify(true);
    problems.sort();
    assert_eq!((report.points, report.segments), (2, 3));
    assert_eq!(problems.len(), 2, "{problems:?}");
    assert!(problems[0].contains("00000001.segment"));
    assert!(problems[1].contains("0000000000000001.manifest"));
}

#[test]
fn machines_are_named_or_found() {
    let (site, _) = small();
    let mut options = VerifyOptions {
        machine: Some(MACHINE.to_owned()),
        data: false,
        threads: 1,
    };
    let report = verify(&site.vault, &options, &mut |_| {}).unwrap();
    assert_eq!(report.points, 2);
    for (name, kind) in [("nobody", ErrorKind::Missing), ("../x", ErrorKind::Invalid)] {
        options.machine = Some(name.to_owned());
        let error = verify(&site.vault, &options, &mut |_| {}).unwrap_err();
        assert_eq!(error.kind(), kind);
        assert!(error.to_string().contains(name), "{error}");
    }
    let empty = Site::new();
    assert_eq!(empty.verify(true).0.points, 0);
    fs::remove_file(site.object("vault.json")).unwrap();
    options.machine = None;
    let error = verify(&site.vault, &options, &mut |_| {}).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
}
