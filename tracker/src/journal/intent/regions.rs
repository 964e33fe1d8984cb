//! Which regions are armed, and in which era each was last written: the part of the intent log that is
//! on the way of every write. No lock, no allocation.
//!
//! A region has one word: zero while it is not armed, else the era of its last mark. Who marks and who
//! takes a region out of the set meet in a compare-and-exchange of that word, so one of them wins: either
//! the mark stands and the region stays, or the writer finds it gone and waits.
//!
//! What it does not handle: the log; see `log`.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};

use super::page::NO_REGION;
use crate::extent::{BLOCK_SIZE, Extent, blocks_of};
use crate::journal::format::REGION_BYTES;
use crate::journal::words::GrowingWords;

/// Blocks of a region.
const REGION_BLOCKS: u64 = REGION_BYTES as u64 / BLOCK_SIZE;
/// An extent over more regions waits for its record to be durable instead: arming so many would drive
/// out what is in use.
const MARKED_MAX: u64 = 64;
/// So many regions written one after the other are a stream; fewer may be chance where much is in use.
const STREAM_REGIONS: u64 = 4;
/// A stream of writes has so many regions armed before it.
const AHEAD_REGIONS: u64 = 64;

/// The time between two syncs of the ring. Eras only grow; the first is 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Era(pub u64);

/// What a mark came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Marked {
    /// Every region is armed: the data may go to the disk.
    pub armed: bool,
    /// The records that stood before the mark are durable once this era is.
    pub era: Era,
    /// Regions that a stream of writes will come to.
    pub ahead: Option<Range<u32>>,
}

/// The regions of a disk.
#[derive(Debug)]
pub struct Regions {
    words: GrowingWords,
    /// Regions of the disk.
    count: AtomicU64,
    era: AtomicU64,
    /// The last era that is durable.
    durable: AtomicU64,
    /// The last era in which a region was marked.
    touched: AtomicU64,
    /// The last era in which something was kept that no armed region covers: a write that has to wait, or an
    /// alarm.
    uncovered: AtomicU64,
    /// Regions cannot be armed at present, and writes go on without.
    unguarded: AtomicBool,
}

/// Regions that a disk has.
fn regions_of(disk_size_bytes: u64) -> u64 {
    blocks_of(disk_size_bytes).div_ceil(REGION_BLOCKS)
}

/// The regions that an extent touches.
pub fn regions_in(extent: Extent) -> Range<u64> {
    extent.first_block / REGION_BLOCKS..extent.end_block().div_ceil(REGION_BLOCKS)
}

/// Whether an extent is over too many regions to be armed.
pub fn is_long(extent: Extent) -> bool {
    let regions = regions_in(extent);
    regions.end - regions.start > MARKED_MAX
}

/// The blocks of a region, those behind the end of the disk too.
pub fn extent_of(region: u32) -> Extent {
    Extent {
        first_block: u64::from(region) * REGION_BLOCKS,
        block_count: REGION_BLOCKS,
    }
}

impl Regions {
    /// The regions of a disk of so many bytes; none is armed.
    ///
    /// # Errors
    ///
    /// The address space cannot be had.
    pub fn new(disk_size_bytes: u64) -> io::Result<Self> {
        let count = regions_of(disk_size_bytes);
        Ok(Self {
            words: GrowingWords::new(count)?,
            count: count.into(),
            era: 1.into(),
            durable: 0.into(),
            touched: 0.into(),
            uncovered: 0.into(),
            unguarded: false.into(),
        })
    }

    /// Makes room for a disk that has grown, while writes go on. One thread at a time.
    ///
    /// # Errors
    ///
    /// The address space cannot be had.
    pub fn reach(&self, disk_size_bytes: u64) -> io::Result<()> {
        let count = regions_of(disk_size_bytes);
        self.words.reach(count)?;
        self.count.fetch_max(count, Ordering::AcqRel);
        Ok(())
    }

    /// Marks the regions of a write whose record stands in the ring.
    pub fn mark(&self, extent: Extent) -> Marked {
        // The record before the era: see the order of eras in `intent`.
        fence(Ordering::SeqCst);
        let era = self.era.load(Ordering::SeqCst);
        let regions = regions_in(extent);
        let mut marked = Marked {
            armed: true,
            era: Era(era),
            ahead: None,
        };
        if is_long(extent) {
            self.touch_uncovered(era);
            marked.armed = self.unguarded.load(Ordering::Acquire);
            return marked;
        }
        for region in regions {
            marked.armed &= self.mark_one(region, era, &mut marked.ahead);
        }
        if !marked.armed {
            self.touch_uncovered(era);
            marked.armed = self.unguarded.load(Ordering::Acquire);
        }
        marked
    }

    fn mark_one(&self, region: u64, era: u64, ahead: &mut Option<Range<u32>>) -> bool {
        let Some(word) = self.words.get(region) else {
            return false;
        };
        let mut present = word.load(Ordering::Acquire);
        loop {
            if present == 0 {
                return false;
            }
            if present >= era {
                return true;
            }
            match word.compare_exchange(present, era, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => {
                    self.touch(era);
                    *ahead = self.stream_at(region, era);
                    return true;
                }
                Err(now) => present = now,
            }
        }
    }

    fn touch_uncovered(&self, era: u64) {
        self.touch(era);
        self.uncovered.fetch_max(era, Ordering::AcqRel);
    }

    /// Something was kept a moment ago that no region tells of.
    pub fn note_uncovered(&self) {
        fence(Ordering::SeqCst);
        self.touch_uncovered(self.era.load(Ordering::SeqCst));
    }

    fn touch(&self, era: u64) {
        if self.touched.load(Ordering::Relaxed) < era {
            self.touched.fetch_max(era, Ordering::AcqRel);
        }
    }

    fn word(&self, region: u64) -> u64 {
        let word = self.words.get(region);
        word.map_or(0, |word| word.load(Ordering::Acquire))
    }

    /// What a stream that has come to this region will need. It counts as one if the regions before were
    /// written in this era or the one before, and the way ahead is armed no longer for half as far as it
    /// should be.
    pub fn stream_at(&self, region: u64, era: u64) -> Option<Range<u32>> {
        let first = region.checked_sub(STREAM_REGIONS)?;
        let count = self.count.load(Ordering::Acquire).min(NO_REGION.into());
        let half = region + AHEAD_REGIONS / 2;
        let recent = |before: u64| self.word(before) + 1 >= era;
        if half >= count || self.word(half) != 0 || !(first..region).all(recent) {
            return None;
        }
        let end = (region + 1 + AHEAD_REGIONS).min(count);
        Some(region as u32 + 1..end as u32)
    }

    /// Whether a write whose record stood in the ring in this era may go to the disk.
    pub fn may_write(&self, extent: Extent, era: Era) -> bool {
        era <= self.durable() || self.mark(extent).armed
    }

    /// Whether a region is armed.
    pub fn is_armed(&self, region: u32) -> bool {
        self.word(region.into()) != 0
    }

    /// A region is armed from now on: its transaction is durable. It counts as marked, since whoever marks
    /// it in this era leaves no other trace.
    pub fn arm(&self, region: u32) {
        let era = self.era.load(Ordering::SeqCst);
        self.touch(era);
        if let Some(word) = self.words.get(region.into()) {
            word.fetch_max(era, Ordering::AcqRel);
        }
    }

    /// The same for one that nobody has asked for: it is the first to make room.
    pub fn arm_unused(&self, region: u32) {
        if let Some(word) = self.words.get(region.into()) {
            word.fetch_max(1, Ordering::AcqRel);
        }
    }

    /// Takes a region out of the set if all of its records are durable, and if its last mark is not later
    /// than `last`. Whether it was done, or the region was not armed.
    pub fn disarm(&self, region: u32, last: Era) -> bool {
        let Some(word) = self.words.get(region.into()) else {
            return true;
        };
        let limit = self.durable().0.min(last.0);
        let present = word.load(Ordering::Acquire);
        present == 0
            || present <= limit
                && word
                    .compare_exchange(present, 0, Ordering::AcqRel, Ordering::Acquire)
                    .is_ok()
    }

    /// The era that ends here, and whether anything was marked since it began; the next one begins.
    /// Called before a sync.
    pub fn end_era(&self) -> Era {
        Era(self.era.fetch_add(1, Ordering::SeqCst))
    }

    /// The present era.
    pub fn era(&self) -> Era {
        Era(self.era.load(Ordering::SeqCst))
    }

    /// Whether something was recorded that is not durable.
    pub fn is_behind(&self) -> bool {
        self.touched.load(Ordering::Acquire) > self.durable().0
    }

    /// All that was recorded up to the end of this era is durable.
    pub fn set_durable(&self, era: Era) {
        self.durable.fetch_max(era.0, Ordering::AcqRel);
    }

    /// The last era that is durable.
    pub fn durable(&self) -> Era {
        Era(self.durable.load(Ordering::Acquire))
    }

    /// Lets writes go on without armed regions, or no longer.
    pub fn set_unguarded(&self, unguarded: bool) {
        self.unguarded.store(unguarded, Ordering::Release);
    }

    /// Whether writes go on without armed regions.
    pub fn is_unguarded(&self) -> bool {
        self.unguarded.load(Ordering::Acquire)
    }

    /// Whether a region has, or may have, records that are not durable.
    pub fn is_fresh(&self, region: u32) -> bool {
        self.word(region.into()) > self.durable().0
    }

    /// Whether something that is not durable lies in no armed region, so that no region tells of it.
    pub fn has_uncovered(&self) -> bool {
        self.uncovered.load(Ordering::Acquire) > self.durable().0
    }

    /// Regions of the disk.
    pub fn count(&self) -> u64 {
        self.count.load(Ordering::Acquire)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn extent(offset: u64, length: u64) -> Extent {
        Extent::covering(offset, length)
    }

    #[test]
    fn a_region_stays_while_a_record_of_it_is_not_durable() {
        let regions = Regions::new(100 * MIB).unwrap();
        let first = regions.mark(extent(3 * MIB, 4096));
        assert!(!first.armed && regions.is_behind());
        regions.arm(3);
        assert!(regions.mark(extent(3 * MIB, 4096)).armed);
        // Two regions, one of them armed.
        assert!(!regions.mark(extent(4 * MIB - 4096, 8192)).armed);
        let last = Era(u64::MAX);
        assert!(!regions.disarm(3, last));
        let ended = regions.end_era();
        assert_eq!(ended, first.era);
        assert!(!regions.disarm(3, last), "the sync has not ended");
        regions.set_durable(ended);
        assert!(!regions.is_behind());
        // Marked again, it stays.
        assert!(regions.mark(extent(3 * MIB, 4096)).armed);
        assert!(!regions.disarm(3, last));
        regions.set_durable(regions.end_era());
        assert!(!regions.disarm(3, ended), "it was in use since");
        assert!(regions.disarm(3, last));
        assert!(!regions.mark(extent(3 * MIB, 4096)).armed);
    }

    #[test]
    fn a_stream_is_seen_and_ends_with_the_disk() {
        let regions = Regions::new(70 * MIB).unwrap();
        (0..6).for_each(|region| regions.arm(region));
        regions.end_era();
        regions.end_era();
        // Each is marked in this era, one after the other.
        for region in 0..4 {
            assert_eq!(regions.mark(extent(region * MIB, 4096)).ahead, None);
        }
        assert_eq!(regions.mark(extent(4 * MIB, 4096)).ahead, Some(5..69));
        assert_eq!(regions.mark(extent(4 * MIB, 4096)).ahead, None);
        (6..69).for_each(|region| regions.arm(region));
        regions.end_era();
        regions.end_era();
        for region in 28..32 {
            regions.mark(extent(region * MIB, 4096));
        }
        let far_enough = regions.mark(extent(32 * MIB, 4096)).ahead;
        assert_eq!(far_enough, None);
        regions.arm(69);
        for region in 60..64 {
            regions.mark(extent(region * MIB, 4096));
        }
        assert_eq!(
            regions.mark(extent(64 * MIB, 4096)).ahead,
            None,
            "the end is near"
        );
    }

    #[test]
    fn a_long_extent_waits_for_its_record_and_the_end_of_the_disk_moves() {
        let regions = Regions::new(MIB).unwrap();
        assert!(!regions.mark(extent(0, 1 << 30)).armed);
        assert!(!regions.mark(extent(500 * MIB, 4096)).armed);
        regions.reach(600 * MIB).unwrap();
        regions.arm(500);
        assert!(regions.mark(extent(500 * MIB, 4096)).armed);
        regions.set_unguarded(true);
        assert!(regions.mark(extent(0, 1 << 30)).armed && regions.mark(extent(7 * MIB, 1)).armed);
    }

    #[test]
    fn marks_and_disarming_never_both_win() {
        let regions = Regions::new(8 * MIB).unwrap();
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while !stop.load(Ordering::Relaxed) {
                        let marked = regions.mark(extent(0, 4096));
                        // An armed region cannot be gone before the era of its mark is durable.
                        if marked.armed && regions.durable() < marked.era {
                            let armed = regions.is_armed(0);
                            assert!(armed || regions.durable() >= marked.era);
                        }
                    }
                });
            }
            for _ in 0..20_000 {
                regions.arm(0);
                let ended = regions.end_era();
                regions.set_durable(ended);
                regions.disarm(0, Era(u64::MAX));
            }
            stop.store(true, Ordering::Relaxed);
        });
    }
}
