//! The bytes of a segment in an encrypted vault. Pure.
//!
//! `docs/vault-format.md` describes the same layout for people. Frames are sealed one by one; then the directory, with the
//! footer as associated data. The footer has only what is needed to find and open the directory, in which the tags of all
//! frames stand: so the tag of the directory, which the manifest names, covers the whole object behind its header.

use std::sync::Arc;

use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::format::{Directory, ExtentEntry, Frame, HEADER_BYTES, Totals, Version};
use super::reference::SegmentRef;
use super::seal::{Owner, SegmentKey};
use crate::error::Result;
use crate::keys::Fingerprint;
use crate::keys::aead::{TAG_BYTES, Tag};

/// Last bytes of a sealed segment.
pub const SEALED_MAGIC_END: [u8; 8] = *b"TMSEGEN2";

/// End of a sealed segment.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct SealedFooter {
    /// Random; the key of the segment is made with it.
    salt: [u8; 32],
    /// Offset of the directory, the end of the last frame.
    directory_offset: U64,
    /// Bytes of the directory with its tag.
    directory_bytes: U64,
    /// A number of [`Version`].
    version: U32,
    /// Zero.
    flags: U32,
    /// [`SEALED_MAGIC_END`].
    magic: [u8; 8],
}

/// Bytes of a [`SealedFooter`].
pub const SEALED_FOOTER_BYTES: usize = size_of::<SealedFooter>();
const _: () = assert!(SEALED_FOOTER_BYTES == 64);

/// First bytes of the text of a directory.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct DirectoryHead {
    frame_count: U32,
    extent_count: U32,
    data_blocks: U64,
    zero_blocks: U64,
    reserved: U64,
}

/// Bytes of a [`DirectoryHead`].
pub const DIRECTORY_HEAD_BYTES: usize = size_of::<DirectoryHead>();
const _: () = assert!(DIRECTORY_HEAD_BYTES == 32);

/// An entry of the frame table of a sealed segment.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct SealedFrameEntry {
    number: U32,
    stored_bytes: U32,
    block_count: U16,
    codec: u8,
    reserved: [u8; 5],
    tag: Tag,
}

const _: () = assert!(size_of::<SealedFrameEntry>() == 32);

impl SealedFrameEntry {
    fn of(frame: &Frame) -> Self {
        Self {
            number: frame.number.into(),
            stored_bytes: frame.stored_bytes.into(),
            block_count: frame.block_count.into(),
            codec: frame.codec,
            reserved: [0; 5],
            tag: frame.check,
        }
    }

    fn frame(&self, offset: u64) -> Option<Frame> {
        (self.reserved == [0; 5]).then_some(Frame {
            offset,
            stored_bytes: self.stored_bytes.get(),
            block_count: self.block_count.get(),
            codec: self.codec,
            number: self.number.get(),
            check: self.tag,
        })
    }
}

/// Directory and footer of a segment whose frames end at `directory_offset`, and the tag.
///
/// # Errors
///
/// The cipher fails.
pub fn encode(
    directory: &Directory,
    directory_offset: u64,
    salt: &[u8; 32],
    key: &SegmentKey,
) -> Result<(Vec<u8>, Tag)> {
    let entries: Vec<_> = directory.frames.iter().map(SealedFrameEntry::of).collect();
    let head = DirectoryHead {
        frame_count: (directory.frames.len() as u32).into(),
        extent_count: (directory.extents.len() as u32).into(),
        data_blocks: (directory.fingerprints.len() as u64).into(),
        zero_blocks: directory.zero_blocks().into(),
        reserved: 0.into(),
    };
    let mut tail = head.as_bytes().to_vec();
    tail.extend_from_slice(entries.as_bytes());
    tail.extend_from_slice(directory.extents.as_bytes());
    tail.extend_from_slice(directory.fingerprints.as_bytes());
    let footer = SealedFooter {
        salt: *salt,
        directory_offset: directory_offset.into(),
        directory_bytes: ((tail.len() + TAG_BYTES) as u64).into(),
        version: (Version::Second as u32).into(),
        flags: 0.into(),
        magic: SEALED_MAGIC_END,
    };
    let tag = key.seal_directory(footer.as_bytes(), &mut tail)?;
    tail.extend_from_slice(footer.as_bytes());
    Ok((tail, tag))
}

/// Reads directory and footer of the segment that a manifest names, the bytes from `directory_offset` to its end.
///
/// # Errors
///
/// What is wrong, in words that follow the object's name.
pub fn decode(
    tail: &[u8],
    segment: &SegmentRef,
    owner: &Owner,
) -> std::result::Result<Directory, String> {
    let at = tail
        .len()
        .checked_sub(SEALED_FOOTER_BYTES)
        .ok_or("it is cut short")?;
    let (sealed, footer) = tail.split_at(at);
    let footer = SealedFooter::read_from_bytes(footer).map_err(|_| "it is cut short")?;
    if footer.magic != SEALED_MAGIC_END {
        return Err("it does not end like a sealed segment".to_owned());
    }
    let version = footer.version.get();
    if version != Version::Second as u32 || footer.flags.get() != 0 {
        return Err(format!(
            "it has version {version}, which this program does not know in an encrypted vault: use a newer one"
        ));
    }
    let offset = footer.directory_offset.get();
    let end = offset.checked_add(footer.directory_bytes.get());
    if footer.directory_bytes.get() != sealed.len() as u64
        || end != segment.bytes.checked_sub(SEALED_FOOTER_BYTES as u64)
    {
        return Err("its footer contradicts its size".to_owned());
    }
    if !sealed.ends_with(&segment.check.0) {
        return Err("it is not the segment that the manifest names".to_owned());
    }
    let key = SegmentKey::derive(owner, &segment.name.0, &footer.salt)
        .map_err(|error| error.chain())?
        .ok_or("it is sealed, and the vault is not encrypted")?;
    let text = key
        .open_directory(footer.as_bytes(), sealed)
        .ok_or("its directory is damaged, or it belongs to another disk, machine or vault")?;
    let directory = parse(&text, offset)?;
    Ok(directory.with_key(Arc::new(key)))
}

fn parse(text: &[u8], frames_end: u64) -> std::result::Result<Directory, String> {
    let malformed = || "its directory is malformed".to_owned();
    let (head, rest) = DirectoryHead::read_from_prefix(text).map_err(|_| malformed())?;
    let (frames, extents) = (
        head.frame_count.get() as usize,
        head.extent_count.get() as usize,
    );
    let blocks = usize::try_from(head.data_blocks.get()).map_err(|_| malformed())?;
    let (entries, rest) =
        <[SealedFrameEntry]>::ref_from_prefix_with_elems(rest, frames).map_err(|_| malformed())?;
    let (extents, rest) =
        <[ExtentEntry]>::ref_from_prefix_with_elems(rest, extents).map_err(|_| malformed())?;
    let fingerprints =
        <[Fingerprint]>::ref_from_bytes_with_elems(rest, blocks).map_err(|_| malformed())?;
    let mut offset = HEADER_BYTES as u64;
    let place = |entry: &SealedFrameEntry| {
        let frame = entry.frame(offset)?;
        offset = frame.range().end;
        Some(frame)
    };
    let frames: Option<Vec<_>> = entries.iter().map(place).collect();
    let directory = Directory::new(
        frames.ok_or_else(malformed)?,
        extents.to_vec(),
        fingerprints.to_vec(),
    );
    if head.reserved.get() != 0 {
        return Err(malformed());
    }
    directory.validate(Totals {
        frames_end,
        data_blocks: head.data_blocks.get(),
        zero_blocks: head.zero_blocks.get(),
    })?;
    Ok(directory)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The text of a directory: two frames, an extent of zeroes between those with data.
    fn text() -> (Vec<u8>, u64) {
        let frame = |number, block_count| SealedFrameEntry {
            number,
            stored_bytes: 100.into(),
            block_count,
            codec: 2,
            reserved: [0; 5],
            tag: [number.get() as u8; 16],
        };
        let extent = |first: u64, count: u32, frame: u32| ExtentEntry {
            first_block: first.into(),
            block_count: count.into(),
            frame: frame.into(),
            frame_block: 0.into(),
            reserved: 0.into(),
        };
        let head = DirectoryHead {
            frame_count: 2.into(),
            extent_count: 3.into(),
            data_blocks: 3.into(),
            zero_blocks: 7.into(),
            reserved: 0.into(),
        };
        let frames = [frame(1.into(), 1.into()), frame(0.into(), 2.into())];
        let extents = [extent(2, 1, 0), extent(5, 7, u32::MAX), extent(20, 2, 1)];
        let text = [
            head.as_bytes(),
            frames.as_bytes(),
            extents.as_bytes(),
            &[6; 48],
        ]
        .concat();
        (text, HEADER_BYTES as u64 + 200)
    }

    #[test]
    fn a_directory_is_read() {
        let (text, end) = text();
        let directory = parse(&text, end).unwrap();
        let counts = (
            directory.frames.len(),
            directory.extents.len(),
            directory.zero_blocks(),
        );
        assert_eq!(counts, (2, 3, 7));
        assert!(parse(&text, end + 1).is_err());
    }

    proptest! {
        /// A text under a right tag, as only somebody with the key can make it, is still judged.
        #[test]
        fn any_change_of_the_text_never_panics(
            at in any::<prop::sample::Index>(), with in prop::collection::vec(any::<u8>(), 0..40), gone in 0usize..40,
            end in 0u64..400,
        ) {
            let (whole, right) = text();
            let at = at.index(whole.len());
            let behind = (at + gone).min(whole.len());
            let changed = [&whole[..at], &with, &whole[behind..]].concat();
            for end in [end, right] {
                if let Ok(directory) = parse(&changed, end) {
                    let blocks: usize = directory.frames.iter().map(|frame| usize::from(frame.block_count)).sum();
                    prop_assert_eq!(blocks, directory.fingerprints.len());
                }
            }
        }

        #[test]
        fn garbage_never_panics(text in prop::collection::vec(any::<u8>(), 0..400), end: u64) {
            let _judged = parse(&text, end);
        }
    }
}
