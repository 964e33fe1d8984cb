//! Restores: right against a model, and nothing left behind where they fail.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};

use proptest::prelude::*;
use tracker::extent::{BLOCK_SIZE, Epoch};

use super::site::{Changes, Content, Site, apply, blocks, small};
use crate::error::{Error, ErrorKind};
use crate::recovery::restore::restore;
use crate::segment::codec::Codec;

/// Nothing may be left but the vault.
#[track_caller]
fn assert_no_target(site: &Site) {
    for name in ["restored", "restored.partial"] {
        assert!(
            fs::symlink_metadata(site.path(name)).is_err(),
            "{name} is there"
        );
    }
}

#[track_caller]
fn assert_says(error: &Error, kind: ErrorKind, words: &[&str]) {
    let line = error.chain();
    assert_eq!(error.kind(), kind, "{line}");
    for word in words {
        assert!(line.contains(word), "no {word:?} in: {line}");
    }
}

fn content() -> impl Strategy<Value = Content> {
    prop_oneof![
        Just(Content::Zero),
        Just(Content::StoredZero),
        any::<u32>().prop_map(Content::Text),
        any::<u32>().prop_map(Content::Noise),
    ]
}

fn changes() -> impl Strategy<Value = Changes> {
    let piece = (0u64..20, 1u64..12, content());
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

fn codec() -> impl Strategy<Value = Codec> {
    prop_oneof![
        Just(Codec::None),
        Just(Codec::Lz4),
        Just(Codec::Zstd(1)),
        Just(Codec::Zstd(9))
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// Any chain of points with any number of segments, on disks of any size: each point restores
    /// to what its changes make of an empty disk.
    #[test]
    fn each_point_is_what_its_changes_make(
        size_sectors in 1u64..900,
        points in prop::collection::vec(
            prop::collection::vec((changes(), codec(), 1u64..=32), 0..3), 1..5),
    ) {
        let size_bytes = size_sectors * 512;
        let site = Site::new();
        let mut model = vec![0; size_bytes as usize];
        let (mut segments, mut models) = (Vec::new(), Vec::new());
        for (epoch, point) in (1..).zip(&points) {
            for (number, (changes, codec, frame_blocks)) in (0..).zip(point) {
                let segment = site.segment("disk", epoch, number, *codec, *frame_blocks, changes);
                segments.push(segment);
                apply(&mut model, changes);
            }
            site.publish(epoch, epoch - 1, &[("disk", size_bytes, &segments)]);
            models.push(model.clone());
        }
        for (epoch, model) in (1..).zip(&models) {
            let (report, found) = site.restore(epoch).unwrap();
            prop_assert_eq!((report.epoch, report.size_bytes), (Epoch(epoch), size_bytes));
            prop_assert!(found == *model, "point {epoch} differs");
        }
        let (report, problems) = site.verify(true);
        prop_assert_eq!(problems, Vec::<String>::new());
        prop_assert_eq!(report.segments, segments.len() as u64);
        let all: u64 = segments.iter().map(|segment| segment.bytes).sum();
        prop_assert_eq!(report.bytes, all);
    }
}

#[test]
fn what_is_not_needed_is_not_read() {
    let site = Site::new();
    let many = vec![(blocks(0, 320), Content::Noise(1))];
    let few = vec![(blocks(0, 300), Content::Zero)];
    let one = site.segment("disk", 1, 0, Codec::None, 32, &many);
    let two = site.segment("disk", 2, 0, Codec::None, 32, &few);
    let size = 320 * BLOCK_SIZE;
    site.publish(2, 0, &[("disk", size, &[one, two])]);
    let (report, found) = site.restore(2).unwrap();
    let mut model = vec![0; size as usize];
    apply(&mut model, &many);
    apply(&mut model, &few);
    assert!(found == model);
    assert_eq!(report.data_bytes, 20 * BLOCK_SIZE);
    // One frame of 32 blocks, and directories.
    assert!(
        report.read_bytes < 32 * BLOCK_SIZE + 20_000,
        "{}",
        report.read_bytes
    );
}

#[test]
fn holes_stay_holes_and_progress_ends_at_the_total() {
    let site = Site::new();
    let changes = vec![
        (blocks(0, 2), Content::Noise(1)),
        (blocks(100, 500), Content::StoredZero),
    ];
    let segment = site.segment("disk", 1, 0, Codec::default(), 32, &changes);
    site.publish(1, 0, &[("disk", 1 << 30, &[segment])]);
    let (last, total) = (AtomicU64::new(0), AtomicU64::new(0));
    let options = site.options(None, "restored");
    let report = restore(&site.vault, &options, &|done, of| {
        last.fetch_max(done, Ordering::Relaxed);
        total.store(of, Ordering::Relaxed);
    })
    .unwrap();
    assert_eq!(report.data_bytes, 502 * BLOCK_SIZE);
    assert_eq!(last.into_inner(), report.data_bytes);
    assert_eq!(total.into_inner(), report.data_bytes);
    let metadata = fs::metadata(site.path("restored")).unwrap();
    assert_eq!(metadata.len(), 1 << 30);
    assert!(metadata.blocks() * 512 < 1 << 20, "{}", metadata.blocks());
}

#[test]
fn points_and_disks_are_named_or_the_only_ones() {
    let site = Site::new();
    let text = vec![(blocks(0, 1), Content::Text(1))];
    let a = site.segment("a", 1, 0, Codec::default(), 32, &text);
    let b = site.segment("b", 2, 0, Codec::default(), 32, &text);
    let mut options = site.options(None, "restored");
    let error = restore(&site.vault, &options, &|_, _| {}).unwrap_err();
    assert_says(&error, ErrorKind::Missing, &["machine"]);
    site.publish(1, 0, &[("a", 4096, std::slice::from_ref(&a))]);
    site.publish(2, 1, &[("a", 4096, &[a]), ("b", 8192, &[b])]);

    let error = restore(&site.vault, &options, &|_, _| {}).unwrap_err();
    assert_says(&error, ErrorKind::Invalid, &["a, b", "0000000000000002"]);
    options.disk = Some("c".to_owned());
    let error = restore(&site.vault, &options, &|_, _| {}).unwrap_err();
    assert_says(&error, ErrorKind::Missing, &["\"c\"", "a, b"]);
    options.point = Some(Epoch(9));
    let error = restore(&site.vault, &options, &|_, _| {}).unwrap_err();
    assert_says(&error, ErrorKind::Missing, &["0000000000000009"]);
    options.machine = "../machine".to_owned();
    let error = restore(&site.vault, &options, &|_, _| {}).unwrap_err();
    assert_says(&error, ErrorKind::Invalid, &["../machine"]);
    assert_no_target(&site);

    let mut options = site.options(None, "restored");
    options.disk = Some("b".to_owned());
    let report = restore(&site.vault, &options, &|_, _| {}).unwrap();
    assert_eq!((report.epoch, report.size_bytes), (Epoch(2), 8192));
    fs::remove_file(site.path("restored")).unwrap();
    let report = restore(&site.vault, &site.options(Some(1), "restored"), &|_, _| {}).unwrap();
    assert_eq!((report.epoch, &*report.disk), (Epoch(1), "a"));
}

#[test]
fn any_changed_byte_is_named_or_does_not_matter() {
    let (site, disks) = small();
    assert_eq!(site.verify(true).1, Vec::<String>::new());
    let objects = site.objects();
    assert_eq!(objects.len(), 5, "{objects:?}");
    let (mut refused, mut right) = (0, 0);
    for path in objects {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let whole = fs::read(&path).unwrap();
        for at in 0..whole.len() {
            let mut broken = whole.clone();
            broken[at] ^= 1 << (at % 8);
            fs::write(&path, &broken).unwrap();
            let (_, problems) = site.verify(true);
            assert_eq!(problems.len(), 1, "byte {at} of {name}: {problems:?}");
            assert!(
                problems[0].contains(&name),
                "byte {at} of {name}: {problems:?}"
            );
            assert!(problems[0].contains("recovery point"), "{problems:?}");
            match site.restore(2) {
                Ok((_, found)) => {
                    assert!(found == disks[&2], "byte {at} of {name}");
                    right += 1;
                }
                Err(error) => {
                    assert_says(&error, ErrorKind::Corrupt, &[&name]);
                    assert_no_target(&site);
                    refused += 1;
                }
            }
        }
        fs::write(&path, &whole).unwrap();
    }
    // Headers of segments, and the other point's manifest.
    assert!(
        refused > right && right > 16,
        "{refused} refused, {right} right"
    );
    for (epoch, disk) in disks {
        assert!(site.restore(epoch).unwrap().1 == disk);
    }
}

#[test]
fn a_changed_byte_of_the_vaults_own_file_never_gives_another_disk() {
    let (site, disks) = small();
    let path = site.object("vault.json");
    let whole = fs::read(&path).unwrap();
    for at in 0..whole.len() {
        let mut broken = whole.clone();
        broken[at] ^= 1 << (at % 8);
        fs::write(&path, &broken).unwrap();
        let Ok(vault) = crate::vault::Vault::open(site.vault.url(), &site.access()) else {
            continue;
        };
        let options = site.options(Some(2), "restored");
        if restore(&vault, &options, &|_, _| {}).is_ok() {
            assert!(fs::read(&options.target).unwrap() == disks[&2], "byte {at}");
            fs::remove_file(&options.target).unwrap();
        }
        assert_no_target(&site);
    }
}

#[test]
fn segments_that_are_missing_short_or_swapped_are_named() {
    let (site, _) = small();
    let segments: Vec<_> = site
        .objects()
        .into_iter()
        .filter(|path| path.to_string_lossy().ends_with(".segment"))
        .collect();
    assert_eq!(segments.len(), 3);
    let whole: Vec<_> = segments
        .iter()
        .map(|path| fs::read(path).unwrap())
        .collect();
    let name = |index: usize| segments[index].file_name().unwrap().to_str().unwrap();
    for (index, path) in segments.iter().enumerate() {
        fs::remove_file(path).unwrap();
        let error = site.restore(2).unwrap_err();
        assert_says(&error, ErrorKind::Missing, &[name(index)]);
        fs::write(path, &whole[index][..whole[index].len() - 1]).unwrap();
        let error = site.restore(2).unwrap_err();
        assert_says(&error, ErrorKind::Corrupt, &[name(index)]);
        let other = (index + 1) % 3;
        fs::write(path, &whole[other]).unwrap();
        let error = site.restore(2).unwrap_err();
        assert_says(&error, ErrorKind::Corrupt, &[name(index)]);
        assert_no_target(&site);
        fs::write(path, &whole[index]).unwrap();
    }
    site.restore(2).unwrap();
}

#[test]
fn a_manifest_that_lies_about_sizes_is_refused() {
    for lie in 0..3 {
        let site = Site::new();
        let text = vec![(blocks(0, 1), Content::Text(1))];
        let mut segment = site.segment("disk", 1, 0, Codec::default(), 32, &text);
        match lie {
            0 => segment.directory_bytes = u64::MAX - 3,
            1 => (segment.bytes, segment.directory_bytes) = (u64::MAX, u64::MAX >> 1),
            _ => segment.bytes = 7,
        }
        site.publish(1, 0, &[("disk", 4096, &[segment])]);
        let error = site.restore(1).unwrap_err();
        assert_says(&error, ErrorKind::Corrupt, &[".segment"]);
        let (_, problems) = site.verify(true);
        assert_eq!(problems.len(), 1, "{problems:?}");
        assert_no_target(&site);
    }
}

#[test]
fn an_existing_target_is_left_alone() {
    let (site, _) = small();
    let options = site.options(None, "restored");
    let target = &options.target;
    fs::write(target, "precious").unwrap();
    let error = restore(&site.vault, &options, &|_, _| {}).unwrap_err();
    assert_says(
        &error,
        ErrorKind::State,
        &["exists", &target.to_string_lossy()],
    );
    assert_eq!(fs::read_to_string(target).unwrap(), "precious");
    fs::remove_file(target).unwrap();

    std::os::unix::fs::symlink("nowhere", target).unwrap();
    let error = restore(&site.vault, &options, &|_, _| {}).unwrap_err();
    assert_says(
        &error,
        ErrorKind::State,
        &["exists", &target.to_string_lossy()],
    );
    fs::remove_file(target).unwrap();

    fs::create_dir(target).unwrap();
    let error = restore(&site.vault, &options, &|_, _| {}).unwrap_err();
    assert_says(
        &error,
        ErrorKind::Invalid,
        &["neither", &target.to_string_lossy()],
    );
    fs::remove_dir(target).unwrap();
    assert_no_target(&site);
}

#[test]
fn a_target_without_a_folder_is_refused() {
    let (site, _) = small();
    fs::write(site.path("file"), "").unwrap();
    for (path, kind, word) in [
        ("no/folder/restored", ErrorKind::Missing, "no/folder "),
        ("file/restored", ErrorKind::Invalid, "not a folder"),
        ("/", ErrorKind::Invalid, "neither"),
        ("/dev/null", ErrorKind::Invalid, "neither"),
    ] {
        let options = site.options(None, path);
        let error = restore(&site.vault, &options, &|_, _| {}).unwrap_err();
        assert_says(&error, kind, &[word, path]);
    }
    assert!(!site.path("no").exists());
}

#[test]
fn a_stale_partial_file_is_replaced_and_one_in_use_is_not() {
    let (site, disks) = small();
    let options = site.options(None, "restored");
    let partial = site.path("restored.partial");
    // The stale file may be a finished disk by another name.
    fs::write(site.path("finished"), "precious").unwrap();
    fs::hard_link(site.path("finished"), &partial).unwrap();

    let holder = File::open(&partial).unwrap();
    holder.try_lock().unwrap();
    let error = restore(&site.vault, &options, &|_, _| {}).unwrap_err();
    assert_says(&error, ErrorKind::InUse, &[&partial.to_string_lossy()]);
    assert!(partial.exists(), "it is the other one's");
    drop(holder);

    restore(&site.vault, &options, &|_, _| {}).unwrap();
    assert!(fs::read(site.path("restored")).unwrap() == disks[&2]);
    assert!(!partial.exists());
    assert_eq!(
        fs::read_to_string(site.path("finished")).unwrap(),
        "precious"
    );
}

#[test]
fn a_partial_file_that_is_a_link_is_not_followed() {
    let (site, _) = small();
    fs::write(site.path("elsewhere"), "precious").unwrap();
    std::os::unix::fs::symlink("elsewhere", site.path("restored.partial")).unwrap();
    let options = site.options(None, "restored");
    let error = restore(&site.vault, &options, &|_, _| {}).unwrap_err();
    assert_says(&error, ErrorKind::Io, &["restored.partial"]);
    assert_eq!(
        fs::read_to_string(site.path("elsewhere")).unwrap(),
        "precious"
    );
}

/// A loop device over a file, detached with its value.
struct Loop(String);

impl Loop {
    /// `None` where loop devices cannot be had.
    fn over(file: &Path) -> Option<Self> {
        let mut command = Command::new("losetup");
        let made = command.args(["--find", "--show"]).arg(file).output().ok()?;
        let name = String::from_utf8_lossy(&made.stdout).trim().to_owned();
        made.status.success().then_some(Self(name))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _gone = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}

#[test]
fn a_device_is_written_wholly() {
    let (site, disks) = small();
    let size = disks[&2].len();
    let length = 1 << 20;
    fs::write(site.path("device"), vec![0xee; length]).unwrap();
    let Some(device) = Loop::over(&site.path("device")) else {
        println!("not run: loop devices need root");
        return;
    };
    let mut options = site.options(None, "restored");
    options.target = device.0.clone().into();
    // The kernel refuses a second exclusive holder, as it does for a mounted device.
    let holder = exclusive(&device.0).unwrap();
    let error = restore(&site.vault, &options, &|_, _| {}).unwrap_err();
    assert_says(&error, ErrorKind::InUse, &["mounted", &device.0]);
    drop(holder);

    restore(&site.vault, &options, &|_, _| {}).unwrap();
    let found = fs::read(&device.0).unwrap();
    assert!(found[..size] == disks[&2]);
    assert!(
        found[size..].iter().all(|byte| *byte == 0xee),
        "not of the disk"
    );
    drop(device);

    fs::write(site.path("tiny"), vec![0xee; 8192]).unwrap();
    let tiny = Loop::over(&site.path("tiny")).unwrap();
    options.target = tiny.0.clone().into();
    let error = restore(&site.vault, &options, &|_, _| {}).unwrap_err();
    assert_says(&error, ErrorKind::Mismatch, &["small", &tiny.0]);
    drop(tiny);
    assert_eq!(fs::read(site.path("tiny")).unwrap(), vec![0xee; 8192]);
}

fn exclusive(device: &str) -> std::io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    let mut options = File::options();
    options
        .read(true)
        .write(true)
        .custom_flags(libc::O_EXCL)
        .open(device)
}

#[test]
fn large_gaps_of_a_device_are_zeroed() {
    let site = Site::new();
    let size: u64 = 32 << 20;
    let changes = vec![
        (blocks(1000, 3), Content::Noise(4)),
        (blocks(5000, 1), Content::StoredZero),
    ];
    let segment = site.segment("disk", 1, 0, Codec::default(), 32, &changes);
    site.publish(1, 0, &[("disk", size, &[segment])]);
    fs::write(site.path("device"), vec![0xee; size as usize]).unwrap();
    let Some(device) = Loop::over(&site.path("device")) else {
        println!("not run: loop devices need root");
        return;
    };
    let mut options = site.options(None, "restored");
    options.target = device.0.clone().into();
    restore(&site.vault, &options, &|_, _| {}).unwrap();
    let mut model = vec![0; size as usize];
    apply(&mut model, &changes);
    assert!(fs::read(&device.0).unwrap() == model);
    // A damaged object leaves a part behind, and the message says so.
    let segment = site.objects().into_iter().find(|path| {
        path.ends_with("0000000000000001-0000000000000001-0000000000000001-00000000.segment")
    });
    let mut bytes = fs::read(segment.as_ref().unwrap()).unwrap();
    bytes[100] ^= 1;
    fs::write(segment.unwrap(), bytes).unwrap();
    let error = restore(&site.vault, &options, &|_, _| {}).unwrap_err();
    assert_says(
        &error,
        ErrorKind::Corrupt,
        &[&device.0, "a part", ".segment", "damaged"],
    );
}
