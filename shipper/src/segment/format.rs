//! The bytes of a segment. Pure. What an encrypted one has in another way is in `sealed`.
//!
//! `docs/vault-format.md` describes the same layout for people. All integers are little-endian.
//! Order in the object: header, frames, directory, footer. The directory is the frame table, the
//! extent table and the fingerprints, one behind the other without gaps.
//!
//! What covers what: the footer's check covers the footer, and through the check of the directory
//! in it the directory, and through the checks in the frame table every frame. A manifest names
//! the footer's check, so that no segment can stand for another.

use std::sync::Arc;

use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use tracker::extent::{Epoch, Extent};
use tracker::journal::format::DISK_BLOCKS_MAX;

use super::codec::CodecKind;
use super::seal::SegmentKey;
use crate::keys::{Check, Fingerprint, Keys};

/// First bytes of a segment.
pub const MAGIC: [u8; 8] = *b"TMSEG\r\n\x1a";
/// Last bytes of a segment.
pub const MAGIC_END: [u8; 8] = *b"TMSEGEND";
/// Most blocks of one frame: 128 KiB.
pub const FRAME_BLOCKS_MAX: usize = 32;
/// Size at which a segment is finished and the next one begun, in bytes.
pub const SEGMENT_BYTES_TARGET: u64 = 32 << 20;
/// Stands in place of a frame's number for blocks that are zero and have no data.
pub const FRAME_NONE: u32 = u32::MAX;

/// Versions of the format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Version {
    /// Plain frames and directory, keyed checks.
    First = 1,
    /// Sealed frames and directory; in encrypted vaults.
    Second = 2,
}

/// Head of a segment.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Header {
    /// [`MAGIC`].
    pub magic: [u8; 8],
    /// A number of [`Version`].
    pub version: U32,
    /// Zero.
    pub flags: U32,
}

/// Bytes of a [`Header`].
pub const HEADER_BYTES: usize = size_of::<Header>();
const _: () = assert!(HEADER_BYTES == 16);

impl Header {
    /// The header of every segment of a version.
    pub fn of(version: Version) -> Self {
        Self {
            magic: MAGIC,
            version: (version as u32).into(),
            flags: 0.into(),
        }
    }
}

/// A frame, as the directory of either version describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Offset of the stored bytes in the segment. Frames follow each other without gaps.
    pub offset: u64,
    /// Stored bytes.
    pub stored_bytes: u32,
    /// Blocks in the frame, 1 to [`FRAME_BLOCKS_MAX`].
    pub block_count: u16,
    /// A number of [`CodecKind`].
    pub codec: u8,
    /// Unique in a sealed segment; else zero.
    pub number: u32,
    /// Check of the stored bytes, or their tag where they are sealed.
    pub check: Check,
}

impl Frame {
    /// The range of the stored bytes in the segment.
    pub fn range(&self) -> std::ops::Range<u64> {
        self.offset..self.offset + u64::from(self.stored_bytes)
    }

    fn is_valid(&self) -> bool {
        (1..=FRAME_BLOCKS_MAX).contains(&usize::from(self.block_count))
            && CodecKind::from_number(self.codec).is_some()
    }
}

/// An entry of the frame table.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct FrameEntry {
    /// Offset of the stored bytes in the segment. Frames follow each other without gaps.
    pub offset: U64,
    /// Stored bytes.
    pub stored_bytes: U32,
    /// Blocks in the frame, 1 to [`FRAME_BLOCKS_MAX`].
    pub block_count: U16,
    /// A number of [`CodecKind`].
    pub codec: u8,
    /// Zero.
    pub reserved: u8,
    /// Check of the stored bytes.
    pub check: Check,
}

const _: () = assert!(size_of::<FrameEntry>() == 32);

impl FrameEntry {
    fn of(frame: &Frame) -> Self {
        Self {
            offset: frame.offset.into(),
            stored_bytes: frame.stored_bytes.into(),
            block_count: frame.block_count.into(),
            codec: frame.codec,
            reserved: 0,
            check: frame.check,
        }
    }

    fn frame(&self) -> Option<Frame> {
        (self.reserved == 0).then_some(Frame {
            offset: self.offset.get(),
            stored_bytes: self.stored_bytes.get(),
            block_count: self.block_count.get(),
            codec: self.codec,
            number: 0,
            check: self.check,
        })
    }
}

/// An entry of the extent table. Entries are sorted by block and do not overlap.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ExtentEntry {
    /// First block on the disk.
    pub first_block: U64,
    /// Blocks.
    pub block_count: U32,
    /// Number of the frame that holds them all, or [`FRAME_NONE`]: they are zero.
    pub frame: U32,
    /// Position of the first of them in the frame, in blocks; zero where there is no frame.
    pub frame_block: U32,
    /// Zero.
    pub reserved: U32,
}

const _: () = assert!(size_of::<ExtentEntry>() == 24);

impl ExtentEntry {
    /// The blocks on the disk.
    pub fn extent(&self) -> Extent {
        Extent {
            first_block: self.first_block.get(),
            block_count: u64::from(self.block_count.get()),
        }
    }

    /// The frame that holds the blocks; `None` if they are zero.
    pub fn frame_index(&self) -> Option<usize> {
        let frame = self.frame.get();
        (frame != FRAME_NONE).then_some(frame as usize)
    }
}

/// End of a segment.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Footer {
    /// Identity of the vault.
    pub vault_id: [u8; 16],
    /// Check of `MACHINE/DISK`, the owner of the blocks.
    pub owner: Check,
    /// Generation of the shipper that made it.
    pub generation: U64,
    /// First epoch whose changes are in it.
    pub first_epoch: U64,
    /// Last epoch whose changes are in it.
    pub last_epoch: U64,
    /// Tells segments of the same epochs apart.
    pub number: U32,
    /// Zero in this version.
    pub flags: U32,
    /// Offset of the directory, the end of the last frame.
    pub directory_offset: U64,
    /// Bytes of the directory.
    pub directory_bytes: U64,
    /// Entries of the frame table.
    pub frame_count: U32,
    /// Entries of the extent table.
    pub extent_count: U32,
    /// Blocks with data; as many fingerprints end the directory.
    pub data_blocks: U64,
    /// Blocks that are zero.
    pub zero_blocks: U64,
    /// Check of the directory.
    pub directory_check: Check,
    /// Check of all bytes of the footer before it.
    pub check: Check,
    /// [`MAGIC_END`].
    pub magic: [u8; 8],
}

/// Bytes of a [`Footer`].
pub const FOOTER_BYTES: usize = size_of::<Footer>();
const _: () = assert!(FOOTER_BYTES == 144);
const CHECKED_BYTES: usize = std::mem::offset_of!(Footer, check);
const _: () = assert!(CHECKED_BYTES == 120);

impl Footer {
    /// Sets check and magic.
    pub fn seal(&mut self, keys: &Keys) {
        self.magic = MAGIC_END;
        self.check = keys.check(&[&self.as_bytes()[..CHECKED_BYTES]]);
    }
}

/// What makes a segment one of its disk: part of its name, repeated in its footer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SegmentName {
    /// Generation of the shipper that made it.
    pub generation: u64,
    /// First epoch whose changes are in it.
    pub first_epoch: Epoch,
    /// Last epoch whose changes are in it.
    pub last_epoch: Epoch,
    /// Tells segments of the same epochs apart.
    pub number: u32,
}

/// The directory of a segment, checked.
#[derive(Clone, Debug, Default)]
pub struct Directory {
    /// The frames.
    pub frames: Vec<Frame>,
    /// The extents.
    pub extents: Vec<ExtentEntry>,
    /// Fingerprints of all blocks with data, in the order of the frames.
    pub fingerprints: Vec<Fingerprint>,
    /// For each frame, the position of its first block's fingerprint.
    first_fingerprints: Vec<usize>,
    /// Opens the frames of a sealed segment.
    key: Option<Arc<SegmentKey>>,
}

/// What the tables of a directory have to fit.
#[derive(Clone, Copy, Debug)]
pub(super) struct Totals {
    /// Where the frames end.
    pub frames_end: u64,
    /// Blocks with data.
    pub data_blocks: u64,
    /// Blocks that are zero.
    pub zero_blocks: u64,
}

impl Directory {
    /// A directory from parts that were made here, of a segment that is not sealed.
    pub fn new(
        frames: Vec<Frame>,
        extents: Vec<ExtentEntry>,
        fingerprints: Vec<Fingerprint>,
    ) -> Self {
        let first_fingerprints = starts(&frames);
        Self {
            frames,
            extents,
            fingerprints,
            first_fingerprints,
            key: None,
        }
    }

    /// The same of a sealed segment.
    pub(super) fn with_key(self, key: Arc<SegmentKey>) -> Self {
        Self {
            key: Some(key),
            ..self
        }
    }

    /// A part of this directory, of the same segment.
    pub fn part(
        &self,
        frames: Vec<Frame>,
        extents: Vec<ExtentEntry>,
        fingerprints: Vec<Fingerprint>,
    ) -> Self {
        Self {
            key: self.key.clone(),
            ..Self::new(frames, extents, fingerprints)
        }
    }

    /// What opens the frames; `None`: they are not sealed.
    pub fn key(&self) -> Option<&SegmentKey> {
        self.key.as_deref()
    }

    /// Blocks that are zero.
    pub fn zero_blocks(&self) -> u64 {
        let zero = self
            .extents
            .iter()
            .filter(|entry| entry.frame_index().is_none());
        zero.map(|entry| u64::from(entry.block_count.get())).sum()
    }

    /// The bytes of the directory, as a segment that is not sealed has them.
    pub fn encode(&self) -> Vec<u8> {
        let entries: Vec<_> = self.frames.iter().map(FrameEntry::of).collect();
        let mut bytes = entries.as_bytes().to_vec();
        bytes.extend_from_slice(self.extents.as_bytes());
        bytes.extend_from_slice(self.fingerprints.as_bytes());
        bytes
    }

    /// Fingerprints of `block_count` blocks of a frame from `frame_block` on.
    pub fn fingerprints_of(
        &self,
        frame: usize,
        frame_block: u32,
        block_count: u32,
    ) -> &[Fingerprint] {
        let first = self.first_fingerprints.get(frame).copied();
        first
            .map(|first| first + frame_block as usize)
            .and_then(|from| self.fingerprints.get(from..from + block_count as usize))
            .unwrap_or_default()
    }

    /// Reads the directory and footer of a segment, the bytes from `directory_offset` to its end.
    ///
    /// # Errors
    ///
    /// What is wrong, in words that follow the object's name.
    pub fn decode(tail: &[u8], object_bytes: u64, keys: &Keys) -> Result<(Self, Footer), String> {
        let at = tail
            .len()
            .checked_sub(FOOTER_BYTES)
            .ok_or("it is cut short")?;
        let (directory, footer) = tail.split_at(at);
        let footer = Footer::read_from_bytes(footer).map_err(|_| "it is cut short")?;
        if footer.magic != MAGIC_END {
            return Err("it does not end like a segment".to_owned());
        }
        if footer.check != keys.check(&[&footer.as_bytes()[..CHECKED_BYTES]]) {
            return Err("its footer is damaged".to_owned());
        }
        let directory_end = footer
            .directory_offset
            .get()
            .checked_add(footer.directory_bytes.get());
        if footer.flags.get() != 0
            || footer.directory_bytes.get() != directory.len() as u64
            || directory_end != object_bytes.checked_sub(FOOTER_BYTES as u64)
        {
            return Err("its footer contradicts its size".to_owned());
        }
        if footer.directory_check != keys.check(&[directory]) {
            return Err("its directory is damaged".to_owned());
        }
        let parsed = Self::parse(directory, &footer).ok_or("its directory is malformed")?;
        parsed.validate(Totals {
            frames_end: footer.directory_offset.get(),
            data_blocks: footer.data_blocks.get(),
            zero_blocks: footer.zero_blocks.get(),
        })?;
        Ok((parsed, footer))
    }

    fn parse(bytes: &[u8], footer: &Footer) -> Option<Self> {
        let frames = footer.frame_count.get() as usize;
        let extents = footer.extent_count.get() as usize;
        let blocks = usize::try_from(footer.data_blocks.get()).ok()?;
        let (entries, rest) = <[FrameEntry]>::ref_from_prefix_with_elems(bytes, frames).ok()?;
        let frames: Option<Vec<_>> = entries.iter().map(FrameEntry::frame).collect();
        let (extents, rest) = <[ExtentEntry]>::ref_from_prefix_with_elems(rest, extents).ok()?;
        let fingerprints = <[Fingerprint]>::ref_from_bytes_with_elems(rest, blocks).ok()?;
        Some(Self::new(frames?, extents.to_vec(), fingerprints.to_vec()))
    }

    /// Whether tables fit each other, so that no later step needs to look again.
    pub(super) fn validate(&self, totals: Totals) -> Result<(), String> {
        let mut offset = HEADER_BYTES as u64;
        let mut blocks = 0;
        for (index, frame) in self.frames.iter().enumerate() {
            if frame.offset != offset || !frame.is_valid() {
                return Err(format!("entry {index} of its frame table is invalid"));
            }
            offset += u64::from(frame.stored_bytes);
            blocks += u64::from(frame.block_count);
        }
        if offset != totals.frames_end || blocks != totals.data_blocks {
            return Err("its frame table contradicts its size".to_owned());
        }
        let (mut next_block, mut data_blocks, mut zero_blocks) = (0, 0, 0);
        for (index, entry) in self.extents.iter().enumerate() {
            let extent = entry.extent();
            let fits = match entry.frame_index() {
                None => entry.frame_block.get() == 0,
                Some(frame) => self.frames.get(frame).is_some_and(|frame| {
                    u64::from(entry.frame_block.get()) + extent.block_count
                        <= u64::from(frame.block_count)
                }),
            };
            let sorted = extent.first_block >= next_block
                && extent.block_count > 0
                && extent.first_block < DISK_BLOCKS_MAX
                && extent.end_block() <= DISK_BLOCKS_MAX;
            if !fits || !sorted || entry.reserved.get() != 0 {
                return Err(format!("entry {index} of its extent table is invalid"));
            }
            next_block = extent.end_block();
            match entry.frame_index() {
                None => zero_blocks += extent.block_count,
                Some(_) => data_blocks += extent.block_count,
            }
        }
        if data_blocks != totals.data_blocks || zero_blocks != totals.zero_blocks {
            return Err("its extent table contradicts its size".to_owned());
        }
        Ok(())
    }
}

fn starts(frames: &[Frame]) -> Vec<usize> {
    let mut sum = 0;
    let start = |frame: &Frame| {
        let first = sum;
        sum += usize::from(frame.block_count);
        first
    };
    frames.iter().map(start).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn keys() -> Keys {
        Keys::derive(&[9; 32])
    }

    /// The tail of a small segment: a frame of three blocks, two extents with data, one of zeroes.
    fn tail() -> (Vec<u8>, u64) {
        let frame = Frame {
            offset: HEADER_BYTES as u64,
            stored_bytes: 100,
            block_count: 3,
            codec: 2,
            number: 0,
            check: [5; 16],
        };
        let entry =
            |first_block: u64, block_count: u32, frame: u32, frame_block: u32| ExtentEntry {
                first_block: first_block.into(),
                block_count: block_count.into(),
                frame: frame.into(),
                frame_block: frame_block.into(),
                reserved: 0.into(),
            };
        let extents = vec![
            entry(4, 2, 0, 0),
            entry(6, 1000, FRAME_NONE, 0),
            entry(2000, 1, 0, 2),
        ];
        let directory = Directory::new(vec![frame], extents, vec![Fingerprint([3; 16]); 3]);
        let mut bytes = directory.encode();
        let offset = HEADER_BYTES as u64 + 100;
        let mut footer = Footer::new_zeroed();
        footer.directory_offset = offset.into();
        footer.directory_bytes = (bytes.len() as u64).into();
        footer.frame_count = 1.into();
        footer.extent_count = 3.into();
        footer.data_blocks = 3.into();
        footer.zero_blocks = 1000.into();
        footer.directory_check = keys().check(&[&bytes]);
        footer.seal(&keys());
        bytes.extend_from_slice(footer.as_bytes());
        let object_bytes = offset + bytes.len() as u64;
        (bytes, object_bytes)
    }

    use zerocopy::FromZeros;

    #[test]
    fn a_directory_survives() {
        let (bytes, size) = tail();
        let (directory, footer) = Directory::decode(&bytes, size, &keys()).unwrap();
        assert_eq!(directory.extents.len(), 3);
        assert_eq!(directory.fingerprints_of(0, 2, 1), [Fingerprint([3; 16])]);
        assert!(directory.fingerprints_of(7, 0, 1).is_empty());
        let mut again = directory.encode();
        again.extend_from_slice(footer.as_bytes());
        assert_eq!(again, bytes);
    }

    #[test]
    fn the_key_of_another_vault_is_refused() {
        let (bytes, size) = tail();
        assert!(Directory::decode(&bytes, size, &Keys::derive(&[1; 32])).is_err());
    }

    proptest! {
        #[test]
        fn a_changed_byte_shows(at in any::<prop::sample::Index>(), change in 1u8..) {
            let (mut bytes, size) = tail();
            let at = at.index(bytes.len());
            bytes[at] ^= change;
            prop_assert!(Directory::decode(&bytes, size, &keys()).is_err());
        }

        #[test]
        fn a_cut_tail_shows(keep in any::<prop::sample::Index>()) {
            let (bytes, size) = tail();
            let keep = keep.index(bytes.len());
            prop_assert!(Directory::decode(&bytes[bytes.len() - keep..], size, &keys()).is_err());
        }

        /// Bytes under a right check, as only somebody with the key can make them, are still judged.
        #[test]
        fn garbage_under_a_right_check_never_panics(
            garbage in prop::collection::vec(any::<u8>(), 0..300), frames in 0u32..4, extents in 0u32..4,
            blocks in any::<u64>(), offset in any::<u64>(),
        ) {
            let mut footer = Footer::new_zeroed();
            footer.directory_offset = offset.into();
            footer.directory_bytes = (garbage.len() as u64).into();
            footer.frame_count = frames.into();
            footer.extent_count = extents.into();
            footer.data_blocks = blocks.into();
            footer.directory_check = keys().check(&[&garbage]);
            footer.seal(&keys());
            let size = offset.saturating_add((garbage.len() + FOOTER_BYTES) as u64);
            let mut bytes = garbage;
            bytes.extend_from_slice(footer.as_bytes());
            let _judged = Directory::decode(&bytes, size, &keys());
        }
    }
}
