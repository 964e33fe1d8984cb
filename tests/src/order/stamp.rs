//! What a write leaves in a sector. Pure.
//!
//! 64 bytes, repeated to the end of the sector, so that a sector of two writes shows wherever it is cut:
//!
//! ```text
//!  0  magic        8 bytes
//!  8  run          u64, of one world
//! 16  disk         u32
//! 20  sector       u32
//! 24  writer       u32
//! 28  sequence     u32
//! 32  clock        4 x u32
//! 48  check        u64 over the 48 bytes before it
//! 56  the check once more, inverted
//! ```

use super::{Clock, SECTOR_BYTES, WRITERS};
use crate::seed::mix;

const MAGIC: [u8; 8] = *b"TMORDER\x01";
const STAMP_BYTES: usize = 64;
const CHECKED_BYTES: usize = 48;
const CLOCK_OFFSET: usize = 32;
const _: () = assert!(CLOCK_OFFSET + 4 * WRITERS == CHECKED_BYTES);
const _: () = assert!(SECTOR_BYTES.is_multiple_of(STAMP_BYTES));
static ZERO_SECTOR: [u8; SECTOR_BYTES] = [0; SECTOR_BYTES];

/// Who wrote a sector, when, and what was known then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// Number of the world.
    pub run: u64,
    /// Number of the disk.
    pub disk: u32,
    /// Number of the sector.
    pub sector: u32,
    /// Number of the writer.
    pub writer: u32,
    /// Number of the write, among those of its writer.
    pub sequence: u32,
    /// What was known when it was sent.
    pub clock: Clock,
}

/// What a sector holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// Zeroes.
    Zero,
    /// The whole of a stamp.
    Stamp(Stamp),
    /// Nothing that one write leaves.
    Torn,
}

impl Stamp {
    /// Appends the sector.
    pub fn append_to(&self, bytes: &mut Vec<u8>) {
        let mut one = [0; STAMP_BYTES];
        one[..8].copy_from_slice(&MAGIC);
        one[8..16].copy_from_slice(&self.run.to_le_bytes());
        let numbers = [self.disk, self.sector, self.writer, self.sequence];
        for (place, number) in one[16..]
            .chunks_exact_mut(4)
            .zip(numbers.iter().chain(&self.clock))
        {
            place.copy_from_slice(&number.to_le_bytes());
        }
        let check = check_of(&one);
        one[48..56].copy_from_slice(&check.to_le_bytes());
        one[56..].copy_from_slice(&(!check).to_le_bytes());
        bytes.extend_from_slice(&one.repeat(SECTOR_BYTES / STAMP_BYTES));
    }

    fn read(one: &[u8]) -> Option<Self> {
        let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|index| one[at + index]));
        let half = |at: usize| u32::from_le_bytes(std::array::from_fn(|index| one[at + index]));
        let check = check_of(one);
        let right = one[..8] == MAGIC && word(48) == check && word(56) == !check;
        right.then(|| Self {
            run: word(8),
            disk: half(16),
            sector: half(20),
            writer: half(24),
            sequence: half(28),
            clock: std::array::from_fn(|index| half(CLOCK_OFFSET + 4 * index)),
        })
    }
}

impl Found {
    /// Looks at the bytes of a sector.
    pub fn of(sector: &[u8]) -> Self {
        if *sector == ZERO_SECTOR {
            return Self::Zero;
        }
        // Equal to itself one stamp further on: the same stamp all over.
        if sector[STAMP_BYTES..] != sector[..SECTOR_BYTES - STAMP_BYTES] {
            return Self::Torn;
        }
        Stamp::read(&sector[..STAMP_BYTES]).map_or(Self::Torn, Self::Stamp)
    }
}

fn check_of(one: &[u8]) -> u64 {
    one[..CHECKED_BYTES].chunks_exact(8).fold(0, |sum, word| {
        mix(sum ^ u64::from_le_bytes(std::array::from_fn(|index| word[index])))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_changed_byte_shows() {
        let stamp = Stamp {
            run: 7,
            disk: 1,
            sector: 9,
            writer: 3,
            sequence: 11,
            clock: [1, 2, 3, 4],
        };
        let mut bytes = Vec::new();
        stamp.append_to(&mut bytes);
        assert_eq!(bytes.len(), SECTOR_BYTES);
        assert_eq!(Found::of(&bytes), Found::Stamp(stamp));
        for at in 0..SECTOR_BYTES {
            bytes[at] ^= 0x40;
            assert_eq!(Found::of(&bytes), Found::Torn, "byte {at}");
            bytes[at] ^= 0x40;
        }
        bytes[256..].fill(0);
        assert_eq!(Found::of(&bytes), Found::Torn);
        assert_eq!(Found::of(&[0; SECTOR_BYTES]), Found::Zero);
        // The same change in all of them is found by the check.
        let mut other = Vec::new();
        stamp.append_to(&mut other);
        for one in other.chunks_exact_mut(STAMP_BYTES) {
            one[28] ^= 1;
        }
        assert_eq!(Found::of(&other), Found::Torn);
    }
}
