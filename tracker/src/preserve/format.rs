//! The bytes of a preserve file. Pure.
//!
//! `docs/preserve-format.md` describes the same layout for people. All integers are little-endian. A
//! head of one page; four maps of one bit for each block of the disk, each beginning on a page of its
//! own; the preserved blocks, at the offsets that they have on the disk, behind all that.

use xxhash_rust::xxh3::xxh3_64;
use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::extent::{BLOCK_SIZE, Epoch, blocks_of};
use crate::journal::format::DISK_BLOCKS_MAX;

/// First bytes of a preserve file.
pub const MAGIC: [u8; 8] = *b"TMPRS\r\n\x1a";
/// Bytes of the head, and what maps and blocks are aligned to.
pub const PAGE_BYTES: u64 = 4096;
/// Words of 64 bits in a page of a map.
pub const PAGE_WORDS: u64 = PAGE_BYTES / 8;
/// Flag: every block of the disk is preserved before it changes, not those of the epoch alone.
pub const FLAG_ALL: u32 = 1;

/// Word of the head that says why the epoch is given up: a number of [`Failure`], zero while it is whole.
pub const WORD_FAILURE: usize = 256;
/// Word of the head that counts the bytes that the tracker has preserved.
pub const WORD_COPIED: usize = 257;
/// Word of the head that counts the bytes that the shipper has given back.
pub const WORD_RELEASED: usize = 258;
/// Word of the head that says why only the frozen view is given up: a number of [`Failure`].
pub const WORD_VIEW_FAILURE: usize = 259;

/// Versions of the format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Version {
    /// Four maps and the blocks.
    First = 1,
}

/// Why an epoch cannot be preserved any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Failure {
    /// More would have to be preserved than the budget allows.
    Budget = 1,
    /// The file system of the preserve file is full.
    Space = 2,
    /// The disk or the preserve file could not be read or written.
    Io = 3,
    /// The tracker gave the epoch up.
    GivenUp = 4,
}

impl Failure {
    /// The failure that a word of the head stands for.
    pub fn from_word(word: u64) -> Option<Self> {
        match word {
            0 => None,
            1 => Some(Self::Budget),
            2 => Some(Self::Space),
            4 => Some(Self::GivenUp),
            // A number from nowhere is no good sign.
            _ => Some(Self::Io),
        }
    }

    /// For people.
    pub fn text(self) -> &'static str {
        match self {
            Self::Budget => {
                "guests overwrote more of it, before it was captured, than the budget of the preserve file \
                 allows"
            }
            Self::Space => "the file system of the preserve file is full",
            Self::Io => "a block of it could not be preserved",
            Self::GivenUp => "the tracker gave it up",
        }
    }
}

/// Head of a preserve file. What changes while it is in use are the words behind it.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Header {
    /// [`MAGIC`].
    pub magic: [u8; 8],
    /// A number of [`Version`].
    pub version: U32,
    /// [`FLAG_ALL`] or zero.
    pub flags: U32,
    /// Boot in which it was made.
    pub boot_id: [u8; 16],
    /// The journal of the disk.
    pub journal_id: [u8; 16],
    /// The epoch whose blocks are preserved.
    pub epoch: U64,
    /// Size of the disk at the cut.
    pub disk_size_bytes: U64,
    /// Offset of the map of the blocks that belong to the epoch.
    pub changed_offset: U64,
    /// Offset of the map of those of them that were written more than once.
    pub hot_offset: U64,
    /// Offset of the map of the blocks that are captured; the shipper writes it.
    pub captured_offset: U64,
    /// Offset of the map of the blocks that are preserved.
    pub preserved_offset: U64,
    /// Offset of the block zero of the disk.
    pub data_offset: U64,
    /// xxh3 of everything before it.
    pub check: U64,
}

/// Bytes of a [`Header`].
pub const HEADER_BYTES: usize = size_of::<Header>();
const _: () = assert!(HEADER_BYTES == 112);
const _: () = assert!(HEADER_BYTES <= WORD_FAILURE * 8);
const CHECKED_BYTES: usize = std::mem::offset_of!(Header, check);

/// What a preserve file is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Subject {
    /// Boot in which it was made.
    pub boot_id: [u8; 16],
    /// The journal of the disk.
    pub journal_id: [u8; 16],
    /// The epoch.
    pub epoch: Epoch,
    /// Size of the disk in bytes.
    pub size_bytes: u64,
    /// Every block is preserved before it changes.
    pub all: bool,
}

/// Where things are in the preserve file of a disk of some size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Blocks of the disk.
    pub blocks: u64,
    /// Bytes of each map.
    pub map_bytes: u64,
}

/// The four maps, in their order in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Map {
    /// Blocks of the epoch.
    Changed = 0,
    /// Blocks of the epoch that were written more than once.
    Hot = 1,
    /// Blocks that the shipper needs no more.
    Captured = 2,
    /// Blocks that are to be taken from this file.
    Preserved = 3,
}

impl Layout {
    /// The layout for a disk.
    pub fn of(size_bytes: u64) -> Self {
        let blocks = blocks_of(size_bytes);
        Self {
            blocks,
            map_bytes: blocks.div_ceil(8).next_multiple_of(PAGE_BYTES),
        }
    }

    /// Offset of a map.
    pub fn map_offset(&self, map: Map) -> u64 {
        PAGE_BYTES + self.map_bytes * map as u64
    }

    /// Words of a map.
    pub fn map_words(&self) -> u64 {
        self.map_bytes / 8
    }

    /// Offset of block zero, and the length of all that is mapped.
    pub fn data_offset(&self) -> u64 {
        PAGE_BYTES + self.map_bytes * 4
    }

    /// Length of the file.
    pub fn file_bytes(&self) -> u64 {
        self.data_offset() + self.blocks * BLOCK_SIZE
    }
}

impl Header {
    /// The header for a subject.
    pub fn new(subject: &Subject) -> Self {
        let layout = Layout::of(subject.size_bytes);
        let offset = |map| U64::from(layout.map_offset(map));
        let mut header = Self {
            magic: MAGIC,
            version: (Version::First as u32).into(),
            flags: if subject.all { FLAG_ALL } else { 0 }.into(),
            boot_id: subject.boot_id,
            journal_id: subject.journal_id,
            epoch: subject.epoch.0.into(),
            disk_size_bytes: subject.size_bytes.into(),
            changed_offset: offset(Map::Changed),
            hot_offset: offset(Map::Hot),
            captured_offset: offset(Map::Captured),
            preserved_offset: offset(Map::Preserved),
            data_offset: layout.data_offset().into(),
            check: 0.into(),
        };
        header.check = xxh3_64(&header.as_bytes()[..CHECKED_BYTES]).into();
        header
    }

    /// Reads what a preserve file is for.
    ///
    /// # Errors
    ///
    /// What is wrong with it.
    pub fn decode(bytes: &[u8]) -> Result<Subject, &'static str> {
        let (header, _) = Self::read_from_prefix(bytes).map_err(|_| "it is cut short")?;
        if header.magic != MAGIC {
            return Err("it is no preserve file");
        }
        if header.version.get() != Version::First as u32 {
            return Err("it is of another version");
        }
        if header.check.get() != xxh3_64(&header.as_bytes()[..CHECKED_BYTES]) {
            return Err("its head is damaged");
        }
        let size_bytes = header.disk_size_bytes.get();
        if blocks_of(size_bytes) > DISK_BLOCKS_MAX {
            return Err("it is for a disk that is too large");
        }
        let subject = Subject {
            boot_id: header.boot_id,
            journal_id: header.journal_id,
            epoch: Epoch(header.epoch.get()),
            size_bytes,
            all: header.flags.get() == FLAG_ALL,
        };
        if Self::new(&subject).as_bytes() != header.as_bytes() {
            return Err("it is laid out as this version does not");
        }
        Ok(subject)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    pub(crate) fn subject() -> Subject {
        Subject {
            boot_id: [7; 16],
            journal_id: [9; 16],
            epoch: Epoch(0x1122),
            size_bytes: 100 << 20,
            all: false,
        }
    }

    #[test]
    fn a_header_of_this_version_has_these_bytes() {
        let expected = "544d5052530d0a1a0100000000000000\
            0707070707070707070707070707070709090909090909090909090909090909\
            2211000000000000000040060000000000100000000000000020000000000000\
            0030000000000000004000000000000000500000000000";
        let bytes = Header::new(&subject());
        let text: String = bytes.as_bytes()[..CHECKED_BYTES]
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        let expected: String = expected.chars().filter(|c| !c.is_whitespace()).collect();
        assert_eq!(text, expected + "00");
        assert_eq!(Header::decode(bytes.as_bytes()), Ok(subject()));
    }

    #[test]
    fn areas_follow_each_other_and_hold_every_block() {
        for size in [
            512,
            4096,
            (128 << 20) - 512,
            128 << 20,
            (128 << 20) + 512,
            64 << 40,
        ] {
            let layout = Layout::of(size);
            assert!(layout.map_bytes * 8 >= layout.blocks);
            assert_eq!(
                layout.map_offset(Map::Preserved) + layout.map_bytes,
                layout.data_offset()
            );
            assert_eq!(layout.data_offset() % PAGE_BYTES, 0);
            assert!(layout.file_bytes() >= layout.data_offset() + size);
        }
    }

    proptest! {
        #[test]
        fn any_flipped_bit_of_a_header_is_found(bit in 0..HEADER_BYTES * 8) {
            let mut bytes = Header::new(&subject()).as_bytes().to_vec();
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(Header::decode(&bytes).is_err());
        }
    }
}
