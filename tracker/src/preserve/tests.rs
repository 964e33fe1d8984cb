//! Tests of a preserve file from both of its sides: what is made, gone on with, refused, kept and given back.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use super::area::{Area, BlockSource, COPY_BLOCKS_MAX, MapPage, discard, remove};
use super::format::{
    Failure, HEADER_BYTES, Header, Layout, Map, PAGE_BYTES, PAGE_WORDS, Subject, WORD_FAILURE,
};
use super::reader::PreserveReader;
use crate::error::ErrorKind;
use crate::extent::{BLOCK_SIZE, Epoch, Extent};
use crate::failpoint::{Place, failing};
use crate::journal::mapping::PageBuffer;

const AMPLE: u64 = 1 << 30;
const BLOCKS: u64 = 200;

fn subject() -> Subject {
    Subject {
        boot_id: [7; 16],
        journal_id: [9; 16],
        epoch: Epoch(0x1122),
        size_bytes: BLOCKS * BLOCK_SIZE,
        all: false,
    }
}

fn blocks(first_block: u64, block_count: u64) -> Extent {
    Extent {
        first_block,
        block_count,
    }
}

/// A disk whose blocks hold their own numbers plus one; notes what is asked for.
#[derive(Default)]
struct Source {
    asked: Mutex<Vec<(u64, usize)>>,
    fails: bool,
}

impl BlockSource for Source {
    fn read_at(&self, offset_bytes: u64, target: &mut [u8]) -> io::Result<()> {
        assert_eq!(
            target.as_ptr() as usize % 4096,
            0,
            "not as direct I/O wants it"
        );
        assert!(offset_bytes.is_multiple_of(512) && target.len().is_multiple_of(512));
        let mut asked = self.asked.lock().unwrap();
        asked.push((offset_bytes, target.len()));
        if self.fails {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        let numbers = offset_bytes / BLOCK_SIZE..;
        for (block, bytes) in numbers.zip(target.chunks_mut(BLOCK_SIZE as usize)) {
            bytes.fill(block as u8 + 1);
        }
        Ok(())
    }
}

/// Bits of a page of a map: those of these blocks.
fn page_of(extents: &[Extent]) -> MapPage {
    let mut page = [0; PAGE_WORDS as usize];
    for (index, mask) in extents.iter().flat_map(|extent| extent.words()) {
        page[index as usize] |= mask;
    }
    page
}

struct Scene {
    folder: tempfile::TempDir,
    path: PathBuf,
    source: Source,
    buffer: PageBuffer,
}

impl Scene {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        Self {
            path: folder.path().join("disk.preserve"),
            folder,
            source: Source::default(),
            buffer: PageBuffer::new((COPY_BLOCKS_MAX * BLOCK_SIZE) as usize).unwrap(),
        }
    }

    fn copy(&mut self, area: &Area, extent: Extent) {
        area.copy(extent, |_| u64::MAX, &self.source, &mut self.buffer);
    }

    fn reader(&self) -> PreserveReader {
        PreserveReader::open(&self.path, &"09".repeat(16), Epoch(0x1122)).unwrap()
    }

    fn refused(&self, expected: &Subject) -> ErrorKind {
        Area::resume(&self.path, expected, AMPLE)
            .unwrap_err()
            .kind()
    }
}

fn is_to_copy(area: &Area, block: u64) -> bool {
    area.to_copy(block / 64, 1 << (block % 64), u64::MAX) != 0
}

/// What a shipper has of blocks whose content on the disk is 0xee by now.
fn settled(reader: &PreserveReader, extent: Extent) -> (Vec<Extent>, Vec<u8>) {
    let mut bytes = vec![0xee; extent.length_bytes() as usize];
    let preserved = reader.settle(extent, &mut bytes).unwrap();
    let firsts = bytes.chunks(BLOCK_SIZE as usize).map(|block| {
        assert!(block.iter().all(|byte| byte == &block[0]));
        block[0]
    });
    (preserved, firsts.collect())
}

#[test]
fn a_tracker_goes_on_with_the_file_of_another_one() {
    let mut scene = Scene::new();
    let area = Area::create(&scene.path, subject(), AMPLE).unwrap();
    let (changed, hot) = (
        page_of(&[blocks(60, 8), blocks(100, 1)]),
        page_of(&[blocks(66, 3)]),
    );
    area.write_maps(0, &changed, &hot).unwrap();
    scene.copy(&area, blocks(62, 4));
    let reader = scene.reader();
    drop(area);
    let area = Area::resume(&scene.path, &subject(), AMPLE).unwrap();
    assert_eq!(area.subject(), &subject());
    assert_eq!(area.used_bytes(), 4 * BLOCK_SIZE);
    assert_eq!(area.bits(Map::Changed, 0), 0xf << 60);
    assert!(!is_to_copy(&area, 62) && !is_to_copy(&area, 65) && is_to_copy(&area, 66));
    scene.copy(&area, blocks(66, 1));
    let whole = blocks(0, BLOCKS);
    assert_eq!(
        reader.changed(whole, true).collect::<Vec<_>>(),
        [blocks(66, 2)]
    );
    let others: Vec<Extent> = reader.changed(whole, false).collect();
    assert_eq!(others, [blocks(60, 6), blocks(100, 1)]);
    let hot: Vec<Extent> = reader.hot().map(|extent| extent.unwrap()).collect();
    assert_eq!(hot, [blocks(66, 2)]);
    let (preserved, content) = settled(&reader, blocks(60, 8));
    assert_eq!(preserved, [blocks(62, 5)]);
    assert_eq!(content, [0xee, 0xee, 63, 64, 65, 66, 67, 0xee]);
    // What is captured is copied no more, across a kill as well.
    assert!(!is_to_copy(&area, 60) && is_to_copy(&area, 100));
    assert_eq!((area.failure(), reader.failure()), (None, None));
    assert_eq!(
        area.to_copy(PAGE_WORDS, u64::MAX, u64::MAX),
        0,
        "behind the end"
    );
}

#[test]
fn a_file_of_something_else_is_refused() {
    let scene = Scene::new();
    assert_eq!(scene.refused(&subject()), ErrorKind::Io, "none is there");
    drop(Area::create(&scene.path, subject(), AMPLE).unwrap());
    for other in [
        Subject {
            boot_id: [8; 16],
            ..subject()
        },
        Subject {
            journal_id: [8; 16],
            ..subject()
        },
        Subject {
            epoch: Epoch(0x1123),
            ..subject()
        },
        Subject {
            size_bytes: subject().size_bytes - 512,
            ..subject()
        },
    ] {
        assert_eq!(scene.refused(&other), ErrorKind::Mismatch, "{other:?}");
    }
    // A disk may have grown since the cut.
    let grown = Subject {
        size_bytes: subject().size_bytes * 2,
        ..subject()
    };
    let area = Area::resume(&scene.path, &grown, AMPLE).unwrap();
    assert_eq!(area.subject(), &subject());
    for (id, epoch) in [("09".repeat(16), 1), ("08".repeat(16), 0x1122)] {
        let error = PreserveReader::open(&scene.path, &id, Epoch(epoch)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Mismatch);
    }
    area.fail(Failure::Budget);
    area.fail(Failure::Io);
    assert_eq!(area.failure(), Some(Failure::Budget), "the first one");
    assert_eq!(scene.refused(&subject()), ErrorKind::State);
}

#[test]
fn a_file_that_is_cut_short_or_whose_head_is_damaged_is_refused() {
    let scene = Scene::new();
    drop(Area::create(&scene.path, subject(), AMPLE).unwrap());
    let open = || PreserveReader::open(&scene.path, &"09".repeat(16), Epoch(0x1122));
    let file = File::options().write(true).open(&scene.path).unwrap();
    let head = std::fs::read(&scene.path).unwrap()[..HEADER_BYTES].to_vec();
    for (place, byte) in head.iter().enumerate() {
        for bit in [1, 0x80] {
            file.write_all_at(&[byte ^ bit], place as u64).unwrap();
            assert_eq!(
                scene.refused(&subject()),
                ErrorKind::Corrupt,
                "byte {place}"
            );
            assert_eq!(
                open().unwrap_err().kind(),
                ErrorKind::Corrupt,
                "byte {place}"
            );
        }
        file.write_all_at(&[*byte], place as u64).unwrap();
    }
    drop(open().unwrap());
    let length = file.metadata().unwrap().len();
    assert_eq!(length, Layout::of(subject().size_bytes).file_bytes());
    for short in [length - 1, PAGE_BYTES] {
        file.set_len(short).unwrap();
        assert_eq!(scene.refused(&subject()), ErrorKind::Corrupt);
        assert_eq!(open().unwrap_err().kind(), ErrorKind::Corrupt);
    }
    for short in [HEADER_BYTES as u64 - 1, 0] {
        file.set_len(short).unwrap();
        assert_eq!(scene.refused(&subject()), ErrorKind::Io);
        assert_eq!(open().unwrap_err().kind(), ErrorKind::Io);
    }
}

#[test]
fn what_cannot_be_kept_gives_the_epoch_up() {
    for (place, errno, expected) in [
        (
            Some(Place::CopyAfterReadBeforeWrite),
            libc::ENOSPC,
            Failure::Space,
        ),
        (
            Some(Place::CopyAfterReadBeforeWrite),
            libc::EDQUOT,
            Failure::Space,
        ),
        (
            Some(Place::CopyAfterReadBeforeWrite),
            libc::EIO,
            Failure::Io,
        ),
        (None, libc::EIO, Failure::Io),
    ] {
        let mut scene = Scene::new();
        scene.source.fails = place.is_none();
        let area = Area::create(&scene.path, subject(), AMPLE).unwrap();
        area.write_maps(0, &page_of(&[blocks(0, 9)]), &page_of(&[]))
            .unwrap();
        let fault = move |at, _| match place == Some(at) {
            true => Err(io::Error::from_raw_os_error(errno)),
            false => Ok(()),
        };
        failing(fault, || scene.copy(&area, blocks(3, 1)));
        assert_eq!(area.failure(), Some(expected));
        assert_eq!(area.bits(Map::Preserved, 0), 0);
        assert!(!is_to_copy(&area, 4), "nobody waits any more");
        let reader = scene.reader();
        assert_eq!(settled(&reader, blocks(3, 1)), (vec![], vec![0xee]));
        assert_eq!(reader.failure(), Some(expected));
    }
}

#[test]
fn maps_that_cannot_be_written_are_an_error() {
    let scene = Scene::new();
    let area = Area::create(&scene.path, subject(), AMPLE).unwrap();
    let fault = |place, _| match place {
        Place::CutAfterSettleBeforeMaps => Err(io::Error::from_raw_os_error(libc::ENOSPC)),
        _ => Ok(()),
    };
    let page = page_of(&[blocks(0, 9)]);
    let error = failing(fault, || area.write_maps(0, &page, &page)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io);
    assert!(error.chain().contains("disk.preserve"), "{}", error.chain());
}

#[test]
fn what_is_given_back_counts_no_more_and_takes_no_room() {
    let mut scene = Scene::new();
    let area = Area::create(&scene.path, subject(), 4 * BLOCK_SIZE).unwrap();
    area.write_maps(0, &page_of(&[blocks(0, 90)]), &page_of(&[]))
        .unwrap();
    let room = |scene: &Scene| std::fs::metadata(&scene.path).unwrap().blocks() * 512;
    scene.copy(&area, blocks(62, 4));
    let (full, used) = (room(&scene), area.used_bytes());
    assert_eq!(used, 4 * BLOCK_SIZE);
    let reader = scene.reader();
    for extent in settled(&reader, blocks(60, 5)).0 {
        reader.give_back(extent);
    }
    assert_eq!(area.used_bytes(), BLOCK_SIZE);
    assert_eq!(room(&scene), full - 3 * BLOCK_SIZE);
    scene.copy(&area, blocks(70, 3));
    assert_eq!((area.failure(), area.used_bytes()), (None, used));
    scene.copy(&area, blocks(80, 1));
    assert_eq!(area.failure(), Some(Failure::Budget));
    // What was copied before it is still there.
    assert_eq!(settled(&reader, blocks(70, 1)).1, [71]);
    assert_eq!(reader.failure(), Some(Failure::Budget));
}

/// Of a large disk nothing is given back as long as little is kept.
#[test]
fn a_little_room_is_not_given_back() {
    let mut scene = Scene::new();
    let size_bytes = 128 * 3 * BLOCK_SIZE;
    let large = Subject {
        size_bytes,
        ..subject()
    };
    let area = Area::create(&scene.path, large, AMPLE).unwrap();
    area.write_maps(0, &page_of(&[blocks(0, 90)]), &page_of(&[]))
        .unwrap();
    let reader = scene.reader();
    for (extent, used) in [(blocks(10, 3), 3), (blocks(20, 2), 3)] {
        scene.copy(&area, extent);
        settled(&reader, extent);
        reader.give_back(extent);
        assert_eq!(area.used_bytes(), used * BLOCK_SIZE, "{extent:?}");
    }
}

#[test]
fn many_blocks_are_read_at_once_and_zeroes_take_no_room() {
    let mut scene = Scene::new();
    let area = Area::create(&scene.path, subject(), AMPLE).unwrap();
    scene.copy(&area, blocks(100, COPY_BLOCKS_MAX));
    let asked = std::mem::take(&mut *scene.source.asked.lock().unwrap());
    let length = COPY_BLOCKS_MAX * BLOCK_SIZE;
    assert_eq!(asked, [(100 * BLOCK_SIZE, length as usize)]);
    struct Zeroes;
    impl BlockSource for Zeroes {
        fn read_at(&self, _offset_bytes: u64, target: &mut [u8]) -> io::Result<()> {
            target.fill(0);
            Ok(())
        }
    }
    let before = std::fs::metadata(&scene.path).unwrap().blocks();
    area.copy(blocks(10, 5), |_| u64::MAX, &Zeroes, &mut scene.buffer);
    assert_eq!(std::fs::metadata(&scene.path).unwrap().blocks(), before);
    let parts = scene.reader().split_hole(blocks(8, 8));
    assert_eq!(
        parts,
        [
            (blocks(8, 2), true),
            (blocks(10, 5), false),
            (blocks(15, 1), true)
        ]
    );
    assert_eq!(
        settled(&scene.reader(), blocks(10, 1)),
        (vec![blocks(10, 1)], vec![0])
    );
}

#[test]
fn behind_the_end_of_the_disk_are_zeroes_and_nothing_that_changed() {
    let mut scene = Scene::new();
    let size_bytes = 3 * BLOCK_SIZE + 512;
    let area = Area::create(
        &scene.path,
        Subject {
            size_bytes,
            ..subject()
        },
        AMPLE,
    )
    .unwrap();
    area.write_maps(0, &page_of(&[blocks(0, 9)]), &page_of(&[blocks(2, 9)]))
        .unwrap();
    scene.copy(&area, blocks(2, 2));
    let asked = scene.source.asked.lock().unwrap().clone();
    assert_eq!(asked, [(2 * BLOCK_SIZE, BLOCK_SIZE as usize + 512)]);
    let reader = scene.reader();
    assert_eq!(reader.size_bytes(), size_bytes);
    let mut bytes = vec![0xee; BLOCK_SIZE as usize];
    reader.settle(blocks(3, 1), &mut bytes).unwrap();
    assert!(bytes[..512].iter().all(|&byte| byte == 4) && bytes[512..].iter().all(|&b| b == 0));
    let found: Vec<Extent> = reader.changed(blocks(0, 100), true).collect();
    assert_eq!(found, [blocks(2, 2)]);
    assert_eq!(reader.changed(blocks(4, 9), true).count(), 0);
    drop(scene.folder);
}

/// Where every block is kept, one that nobody captures costs the view alone.
#[test]
fn a_view_that_cannot_be_kept_costs_no_point() {
    let mut scene = Scene::new();
    let kept = Subject {
        all: true,
        ..subject()
    };
    let area = Area::create(&scene.path, kept, 2 * BLOCK_SIZE).unwrap();
    area.write_maps(0, &page_of(&[blocks(5, 1)]), &page_of(&[]))
        .unwrap();
    let of_epoch = |index| if index == 0 { 1 << 5 } else { 0 };
    assert_ne!(area.to_copy(1, 1, of_epoch(1)), 0, "no block of the epoch");
    area.copy(blocks(64, 2), of_epoch, &scene.source, &mut scene.buffer);
    let mut target = vec![0xee; 3 * 512];
    area.overlay(65 * BLOCK_SIZE - 512, &mut target).unwrap();
    assert!(target[..512].iter().all(|&byte| byte == 65));
    assert!(target[512..].iter().all(|&byte| byte == 66));
    // What a view holds is not given back.
    scene.reader().give_back(blocks(64, 1));
    assert_eq!(area.used_bytes(), 2 * BLOCK_SIZE);
    area.copy(blocks(70, 1), of_epoch, &scene.source, &mut scene.buffer);
    assert_eq!(
        (area.view_failure(), area.failure()),
        (Some(Failure::Budget), None)
    );
    assert!(area.overlay(0, &mut target).is_err());
    assert_eq!(area.to_copy(1, 1 << 9, of_epoch(1)), 0);
    assert_ne!(
        area.to_copy(0, 1 << 5, of_epoch(0)),
        0,
        "the point is still kept"
    );
    area.copy(blocks(5, 1), of_epoch, &scene.source, &mut scene.buffer);
    assert_eq!(area.failure(), Some(Failure::Budget));
}

#[test]
fn a_file_is_discarded_under_its_readers_and_replaced_beside_them() {
    let mut scene = Scene::new();
    let area = Area::create(&scene.path, subject(), AMPLE).unwrap();
    area.write_maps(0, &page_of(&[blocks(1, 1)]), &page_of(&[]))
        .unwrap();
    scene.copy(&area, blocks(1, 1));
    let reader = scene.reader();
    let next = Subject {
        epoch: Epoch(0x1123),
        ..subject()
    };
    drop(Area::create(&scene.path, next, AMPLE).unwrap());
    assert_eq!(settled(&reader, blocks(1, 1)).1, [2]);
    assert_eq!(reader.failure(), None);
    let reader = PreserveReader::open(&scene.path, &"09".repeat(16), Epoch(0x1123)).unwrap();
    discard(&scene.path).unwrap();
    assert_eq!(reader.failure(), Some(Failure::GivenUp));
    assert!(!scene.path.exists());
    // There is none any more; what is no preserve file goes, too, untouched.
    discard(&scene.path).unwrap();
    remove(&scene.path).unwrap();
    std::fs::write(&scene.path, [0x55; 9000]).unwrap();
    let kept = File::open(&scene.path).unwrap();
    discard(&scene.path).unwrap();
    let mut word = [0; 8];
    kept.read_exact_at(&mut word, WORD_FAILURE as u64 * 8)
        .unwrap();
    assert_eq!(word, [0x55; 8]);
}

/// A disk of two blocks and a half: block 0 belongs to the epoch, is written often and is preserved; block 2 belongs
/// to it and is captured.
fn specimen(path: &Path) {
    let mut scene = Scene::new();
    let small = Subject {
        size_bytes: 2 * BLOCK_SIZE + 2048,
        ..subject()
    };
    let area = Area::create(path, small, AMPLE).unwrap();
    let changed = page_of(&[blocks(0, 1), blocks(2, 1)]);
    area.write_maps(0, &changed, &page_of(&[blocks(0, 1)]))
        .unwrap();
    scene.copy(&area, blocks(0, 1));
    let reader = PreserveReader::open(path, &"09".repeat(16), Epoch(0x1122)).unwrap();
    reader
        .settle(blocks(2, 1), &mut [0; BLOCK_SIZE as usize])
        .unwrap();
}

const LINE_BYTES: usize = 32;

/// The length, and each line of 32 bytes that are not all zero, behind its offset.
fn text_of(bytes: &[u8]) -> String {
    let mut text = format!("{}\n", bytes.len());
    for (number, line) in bytes.chunks(LINE_BYTES).enumerate() {
        if line.iter().any(|&byte| byte != 0) {
            let digits: String = line.iter().map(|byte| format!("{byte:02x}")).collect();
            text += &format!("{:05x} {digits}\n", number * LINE_BYTES);
        }
    }
    text
}

fn bytes_of(text: &str) -> Vec<u8> {
    let mut lines = text.lines();
    let mut bytes = vec![0; lines.next().unwrap().parse().unwrap()];
    for line in lines {
        let (offset, digits) = line.split_once(' ').unwrap();
        let offset = usize::from_str_radix(offset, 16).unwrap();
        for (index, target) in bytes[offset..][..digits.len() / 2].iter_mut().enumerate() {
            *target = u8::from_str_radix(&digits[index * 2..][..2], 16).unwrap();
        }
    }
    bytes
}

#[test]
fn a_file_of_this_version_has_these_bytes_and_is_read() {
    let mut scene = Scene::new();
    specimen(&scene.path);
    let made = std::fs::read(&scene.path).unwrap();
    let fixture = include_str!("fixtures/version-1.txt");
    assert_eq!(text_of(&made), fixture, "the format has changed");
    // What a file of this text is.
    let bytes = bytes_of(fixture);
    assert!(bytes == made);
    std::fs::write(&scene.path, &bytes).unwrap();
    let small = Header::decode(&bytes).unwrap();
    let area = Area::resume(&scene.path, &small, AMPLE).unwrap();
    assert_eq!(area.used_bytes(), BLOCK_SIZE);
    scene.copy(&area, blocks(1, 1));
    let (preserved, content) = settled(&scene.reader(), blocks(0, 2));
    assert_eq!((preserved, content), (vec![blocks(0, 2)], vec![1, 2]));
    assert!(!is_to_copy(&area, 2));
}
