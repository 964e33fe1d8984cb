//! The checker itself: points made by hand that are closed, and others that lack one thing each.

use std::sync::Arc;

use super::areas::Areas;
use super::checker::{Checker, Violation};
use super::history::{History, Kind, Write};
use super::stamp::Stamp;
use super::{BLOCK_BYTES, BLOCK_SECTORS, Clock, SECTOR_BYTES};
use crate::seed::Random;

const RUN: u64 = 5;
const BLOCKS: u64 = 512;
const DISKS: usize = 2;

/// Two disks that a test writes to, and what a point has of them.
struct World {
    history: Arc<History>,
    images: Vec<Vec<u8>>,
}

impl World {
    fn new() -> Self {
        let size = BLOCKS * BLOCK_BYTES as u64;
        let areas = Areas::divide(&[size; DISKS], &mut Random::new(3));
        Self {
            history: Arc::new(History::new(RUN, areas)),
            images: vec![vec![0; size as usize]; DISKS],
        }
    }

    /// The n-th block of a writer on a disk.
    fn block(&self, writer: usize, disk: usize, n: usize) -> u32 {
        let runs = self.history.areas.runs(writer).iter();
        let run = runs.filter(|run| run.disk == disk).nth(n);
        run.expect("a run").first_block
    }

    /// Sends a write of one block, and answers it.
    fn write(&self, writer: usize, disk: usize, n: usize, kind: Kind) -> u32 {
        let sequence = self.send(writer, disk, n, kind);
        self.history.known(writer, sequence);
        sequence
    }

    fn send(&self, writer: usize, disk: usize, n: usize, kind: Kind) -> u32 {
        let write = Write {
            disk: disk as u32,
            first_sector: self.block(writer, disk, n) * BLOCK_SECTORS as u32,
            sector_count: BLOCK_SECTORS as u32,
            kind,
            clock: self.history.clock(),
        };
        self.history.sent(writer, write)
    }

    /// Puts a write into the images.
    fn show(&mut self, writer: usize, sequence: u32) {
        let write = self.history.log(writer).writes[sequence as usize - 1];
        for sector in write.sectors() {
            let stamp = Stamp {
                run: RUN,
                disk: write.disk,
                sector,
                writer: writer as u32,
                sequence,
                clock: write.clock,
            };
            let mut bytes = Vec::new();
            match write.kind {
                Kind::Data => stamp.append_to(&mut bytes),
                Kind::Zero => bytes.resize(SECTOR_BYTES, 0),
            }
            let from = sector as usize * SECTOR_BYTES;
            self.images[write.disk as usize][from..from + SECTOR_BYTES].copy_from_slice(&bytes);
        }
    }

    fn check(&self, checker: &mut Checker<'_>) -> Result<(), Violation> {
        let all: Vec<u32> = (0..BLOCKS as u32).collect();
        let disks: Vec<_> = self
            .images
            .iter()
            .map(|image| (&image[..], &all[..]))
            .collect();
        checker.check(&disks)
    }

    /// A point that shows just these writes.
    fn judge(&mut self, shown: &[(usize, u32)]) -> Result<(), Violation> {
        self.judge_with(shown, &Clock::default())
    }

    fn judge_with(&mut self, shown: &[(usize, u32)], required: &Clock) -> Result<(), Violation> {
        for image in &mut self.images {
            image.fill(0);
        }
        for (writer, sequence) in shown {
            self.show(*writer, *sequence);
        }
        let mut checker = Checker::new(&self.history);
        checker.require(required);
        self.check(&mut checker)
    }
}

fn is_order(result: Result<(), Violation>) -> bool {
    matches!(result, Err(Violation::Order(_)))
}

#[test]
fn what_a_write_knew_must_be_there_on_the_other_disk_too() {
    let mut world = World::new();
    let a = (0, world.write(0, 0, 0, Kind::Data));
    let b = (1, world.write(1, 1, 0, Kind::Data));
    let c = (2, world.write(2, 0, 0, Kind::Data));
    for closed in [&[][..], &[a], &[a, b], &[a, b, c]] {
        assert_eq!(world.judge(closed), Ok(()), "{closed:?}");
    }
    for open in [&[b][..], &[c], &[a, c], &[b, c]] {
        assert!(is_order(world.judge(open)), "{open:?}");
    }
}

#[test]
fn what_nobody_knew_may_be_missing() {
    let mut world = World::new();
    let one = (0, world.send(0, 0, 0, Kind::Data));
    let two = (0, world.send(0, 1, 1, Kind::Data));
    let other = (1, world.send(1, 1, 0, Kind::Data));
    for shown in [&[][..], &[one], &[two], &[other], &[two, other]] {
        assert_eq!(world.judge(shown), Ok(()), "{shown:?}");
    }
    // Asked for after the answer, they must be there.
    world.history.known(0, 1);
    let clock = world.history.clock();
    assert!(is_order(world.judge_with(&[two], &clock)));
    assert_eq!(world.judge_with(&[one], &clock), Ok(()));
}

#[test]
fn a_newer_write_stands_for_an_older_one_of_its_block_alone() {
    let mut world = World::new();
    let old = (0, world.write(0, 0, 0, Kind::Data));
    let new = (0, world.write(0, 0, 0, Kind::Data));
    let seer = (1, world.write(1, 1, 0, Kind::Data));
    let newest = (0, world.write(0, 0, 0, Kind::Data));
    assert!(is_order(world.judge(&[old, seer])));
    assert_eq!(world.judge(&[new, seer]), Ok(()));
    // It knew of the one who saw.
    assert!(is_order(world.judge(&[newest])));
    assert_eq!(world.judge(&[newest, seer]), Ok(()));
}

#[test]
fn writes_in_flight_together_may_end_either_way() {
    let mut world = World::new();
    let one = (0, world.send(0, 0, 0, Kind::Data));
    let two = (0, world.send(0, 0, 0, Kind::Data));
    world.history.known(0, 2);
    let seer = (1, world.write(1, 1, 0, Kind::Data));
    assert_eq!(world.judge(&[one, seer]), Ok(()));
    assert_eq!(world.judge(&[two, seer]), Ok(()));
    assert!(is_order(world.judge(&[seer])));
}

#[test]
fn zeroes_are_writes_of_which_the_first_that_fits_is_taken() {
    let mut world = World::new();
    let data = (0, world.write(0, 0, 0, Kind::Data));
    let other = (1, world.write(1, 1, 0, Kind::Data));
    let zero = (0, world.write(0, 0, 0, Kind::Zero));
    let seer = (2, world.write(2, 1, 0, Kind::Data));
    assert!(is_order(world.judge(&[data, other, seer])));
    assert_eq!(world.judge(&[data, other, zero, seer]), Ok(()));
    // Zero may be from before all of them, or the write that made it zero.
    assert_eq!(world.judge(&[]), Ok(()));
    assert_eq!(world.judge(&[other]), Ok(()));
    // Data, and after it zero, which knew of what is missing.
    let mut world = World::new();
    world.write(0, 0, 0, Kind::Data);
    let seer = (2, world.write(2, 1, 0, Kind::Data));
    world.write(1, 1, 0, Kind::Data);
    world.write(0, 0, 0, Kind::Zero);
    assert!(is_order(world.judge(&[seer])));
}

#[test]
fn what_was_lost_may_be_there_or_not() {
    let mut world = World::new();
    let before = (0, world.write(0, 0, 0, Kind::Data));
    let lost = (0, world.send(0, 0, 0, Kind::Data));
    world.history.lost(0, lost.1);
    world.history.known(0, lost.1);
    let seer = (1, world.write(1, 1, 0, Kind::Data));
    assert_eq!(world.judge(&[before, seer]), Ok(()));
    assert_eq!(world.judge(&[lost, seer]), Ok(()));
    assert!(is_order(world.judge(&[seer])));
    let after = (0, world.write(0, 0, 0, Kind::Data));
    let seer = (1, world.write(1, 1, 1, Kind::Data));
    assert!(is_order(world.judge(&[lost, (1, 1), seer])));
    assert_eq!(world.judge(&[after, (1, 1), seer]), Ok(()));
}

#[test]
fn nothing_is_torn_invented_or_misplaced() {
    let mut world = World::new();
    let write = (0, world.write(0, 0, 0, Kind::Data));
    assert_eq!(world.judge(&[write]), Ok(()));
    let from = world.block(0, 0, 0) as usize * BLOCK_BYTES;
    let content = |world: &World| {
        let mut checker = Checker::new(&world.history);
        matches!(world.check(&mut checker), Err(Violation::Content(_)))
    };
    world.images[0][from + 100] ^= 1;
    assert!(content(&world), "a flipped bit");
    world.images[0][from + 100] ^= 1;
    world.images[0][from + 256..from + 512].fill(0);
    assert!(content(&world), "a torn sector");
    world.show(0, write.1);
    assert!(!content(&world));
    world.images[0].copy_within(from..from + SECTOR_BYTES, from + SECTOR_BYTES);
    assert!(content(&world), "a misplaced sector");
    world.show(0, write.1);
    world.history = World::new().history;
    assert!(content(&world), "a write that is not in the history");
}

#[test]
fn points_do_not_go_back() {
    let mut world = World::new();
    let one = world.write(0, 0, 0, Kind::Data);
    let seer = world.write(1, 1, 0, Kind::Data);
    world.show(0, one);
    world.show(1, seer);
    let history = Arc::clone(&world.history);
    let mut checker = Checker::new(&history);
    assert_eq!(world.check(&mut checker), Ok(()));
    // Both are gone: nothing in this point asks for them any more, but the one before did.
    for image in &mut world.images {
        image.fill(0);
    }
    assert!(is_order(world.check(&mut checker)));
}
