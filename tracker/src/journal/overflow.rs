//! The overflow bits: what changed while the ring was full, coarsely.
//!
//! Overview: when the ring is full, a write sets a bit for the unit of the disk in which it lies, one or
//! more regions. There is a half for even and one for odd epochs. The first word of a half is the latest
//! epoch that has set bits in it, written like a word of the alarm; the others hold 48 bits each under 16
//! bits of their own check, so that each is whole or as it was after SIGKILL, and damage shows.
//!
//! Order: the epoch first, then the bits, then the data of the write. A half is emptied when an epoch of
//! its parity is about to be opened, if what is in it is committed; nobody sets bits in it then. If it is
//! not committed it stays, and the new epoch takes its bits over, which adds blocks and loses none.
//!
//! When an epoch closes, the bits of earlier ones that will be captured with it become its own, as with
//! the alarm.
//!
//! What it does not handle: units behind the end of the area, where a disk has grown far; the alarm then
//! stands for all blocks.

use std::sync::atomic::{AtomicU64, Ordering};

use super::alarm::lift;
use super::format::{DISK_BLOCKS_MAX, EPOCH_MAX, Superblock, Version, decode_alarm, encode_alarm};
use super::mapping::SharedWords;
use crate::extent::{BLOCK_SIZE, Epoch, Extent};

/// Bits of a word.
const WORD_BITS: u64 = 48;

/// The unit of the overflow bits for a disk of so many bytes, if both halves take so many: the least
/// power of two of regions with which twice the disk has bits.
pub fn unit_bytes_of(disk_size_bytes: u64, overflow_bytes: u64, region_bytes: u64) -> u64 {
    let bits = (overflow_bytes / 16).saturating_sub(1).max(1) * WORD_BITS;
    let wanted = disk_size_bytes.saturating_mul(2).div_ceil(bits);
    wanted.max(region_bytes).next_power_of_two()
}

/// Where the overflow bits lie, which never changes.
#[derive(Clone, Copy, Debug)]
pub(super) struct OverflowPlace {
    offset: u64,
    /// Words of one half; zero if there is no such area.
    half_words: usize,
    unit_blocks: u64,
}

impl OverflowPlace {
    /// The place that a superblock lays out.
    pub fn of(superblock: &Superblock) -> Self {
        // Before the third version these fields were nobody's, so they are not looked at.
        let is_there = superblock.version.get() >= Version::Third as u32;
        let bytes = if is_there {
            superblock.overflow_bytes.get()
        } else {
            0
        };
        Self {
            offset: superblock.overflow_offset.get(),
            half_words: bytes as usize / 16,
            unit_blocks: (superblock.overflow_unit_bytes.get() / BLOCK_SIZE).max(1),
        }
    }

    /// The bits in the mapped head of a journal.
    pub fn bits(self, head: &SharedWords) -> Overflow<'_> {
        let first = self.offset as usize / 8;
        let words = |index: usize| {
            let begin = first + index * self.half_words;
            let words = head.words().get(begin..begin + self.half_words);
            words.unwrap_or_default()
        };
        Overflow {
            halves: [words(0), words(1)],
            place: self,
        }
    }
}

/// The overflow bits of a mapped journal.
#[derive(Clone, Copy, Debug)]
pub(super) struct Overflow<'a> {
    halves: [&'a [AtomicU64]; 2],
    place: OverflowPlace,
}

impl<'a> Overflow<'a> {
    fn half(self, epoch: Epoch) -> &'a [AtomicU64] {
        self.halves[(epoch.0 & 1) as usize]
    }

    /// Sets the bits of an extent that changes in this epoch. `false` if they have no place.
    pub fn raise(self, epoch: Epoch, extent: Extent) -> bool {
        let half = self.half(epoch);
        let Some((head, bits)) = half.split_first() else {
            return false;
        };
        let (first, last) = (
            extent.first_block / self.place.unit_blocks,
            (extent.end_block() - 1) / self.place.unit_blocks,
        );
        if last / WORD_BITS >= bits.len() as u64 || !lift(head, epoch) {
            return false;
        }
        for number in first / WORD_BITS..=last / WORD_BITS {
            let begin = first.max(number * WORD_BITS) - number * WORD_BITS;
            let end = (last + 1).min((number + 1) * WORD_BITS) - number * WORD_BITS;
            let mask = (u64::MAX >> (64 - (end - begin))) << begin;
            add(&bits[number as usize], mask);
        }
        true
    }

    /// The epochs whose bits are here.
    ///
    /// # Errors
    ///
    /// A word is damaged; its offset in the file is returned.
    pub fn epochs(self) -> Result<Vec<Epoch>, u64> {
        let mut epochs = Vec::new();
        for (index, half) in self.halves.iter().enumerate() {
            let Some(head) = half.first() else { continue };
            let damaged = self.place.offset + (index * half.len() * 8) as u64;
            epochs.extend(decode_alarm(head.load(Ordering::Acquire)).map_err(|_| damaged)?);
        }
        Ok(epochs)
    }

    /// Calls with the extents, in order, of each half whose epoch is after `after` and not after
    /// `through`. A damaged word stands for all of its units.
    pub fn each_extent(self, after: Epoch, through: Epoch, mut visit: impl FnMut(Extent)) {
        for half in self.halves {
            let Some((head, bits)) = half.split_first() else {
                continue;
            };
            let epoch = decode_alarm(head.load(Ordering::Acquire)).ok().flatten();
            if !epoch.is_some_and(|epoch| after < epoch && epoch <= through) {
                continue;
            }
            for (number, word) in bits.iter().enumerate() {
                let set = match decode_alarm(word.load(Ordering::Acquire)) {
                    Ok(set) => set.map_or(0, |Epoch(bits)| bits),
                    Err(_damaged) => EPOCH_MAX,
                };
                for bit in (0..WORD_BITS).filter(|bit| set >> bit & 1 == 1) {
                    let unit = number as u64 * WORD_BITS + bit;
                    let first_block = unit.saturating_mul(self.place.unit_blocks);
                    // No disk reaches as far as the last units of an area may.
                    if first_block < DISK_BLOCKS_MAX {
                        visit(Extent {
                            first_block,
                            block_count: self.place.unit_blocks,
                        });
                    }
                }
            }
        }
    }

    /// Makes those bits the ones of an epoch that is about to close which will be captured with it: of the
    /// epochs after `sealed`.
    pub fn gather(self, sealed: Epoch, closing: Epoch) {
        let (own, other) = (self.half(closing), self.half(closing.next()));
        for half in [own, other] {
            let Some((head, bits)) = half.split_first() else {
                continue;
            };
            let set = decode_alarm(head.load(Ordering::Acquire)).ok().flatten();
            if !set.is_some_and(|set| sealed < set && set < closing) {
                continue;
            }
            if let Some(head) = own.first() {
                lift(head, closing);
            }
            for (from, to) in bits.iter().zip(own.iter().skip(1)) {
                take_over(to, from);
            }
        }
    }

    /// Empties the half of an epoch that is about to be opened, if what is in it is committed. Nobody may
    /// set bits in it meanwhile.
    pub fn clear_for(self, next: Epoch, committed: Epoch) {
        let Some((head, bits)) = self.half(next).split_first() else {
            return;
        };
        if matches!(decode_alarm(head.load(Ordering::Acquire)), Ok(Some(set)) if set <= committed) {
            head.store(0, Ordering::Release);
            bits.iter()
                .for_each(|word| word.store(0, Ordering::Release));
        }
    }

    /// Takes over what other bits say, of a journal of the same layout.
    pub fn absorb(self, other: Overflow<'_>) {
        for (half, from) in self.halves.iter().zip(other.halves) {
            let Some(epoch) = from
                .first()
                .map(|head| decode_alarm(head.load(Ordering::Acquire)))
            else {
                continue;
            };
            // What is damaged there was raised in no epoch that anybody knows; the journal says so.
            let (Some(head), Ok(Some(epoch))) = (half.first(), epoch) else {
                continue;
            };
            lift(head, epoch);
            for (to, from) in half.iter().zip(from).skip(1) {
                take_over(to, from);
            }
        }
    }

    /// Bits that are set in halves whose epoch is not committed.
    pub fn count(self, committed: Epoch) -> u64 {
        let mut count = 0;
        self.each_extent(committed, Epoch(u64::MAX), |_| count += 1);
        count
    }
}

/// Sets in a word what another has; a damaged one has all.
fn take_over(to: &AtomicU64, from: &AtomicU64) {
    match decode_alarm(from.load(Ordering::Acquire)) {
        Ok(None) => {}
        Ok(Some(Epoch(bits))) => add(to, bits),
        Err(_damaged) => add(to, EPOCH_MAX),
    }
}

/// Sets bits of a word; a damaged one gets all.
fn add(word: &AtomicU64, bits: u64) {
    let mut present = word.load(Ordering::Acquire);
    loop {
        let set = match decode_alarm(present) {
            Ok(set) => set.map_or(0, |Epoch(bits)| bits),
            Err(_damaged) => EPOCH_MAX,
        };
        let new = encode_alarm(Epoch(set | bits));
        if new == present {
            return;
        }
        match word.compare_exchange(present, new, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => return,
            Err(now) => present = now,
        }
    }
}
