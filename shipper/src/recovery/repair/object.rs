//! Segments as whole objects: whether one is what a manifest names, and frames that are made again.
//!
//! A frame is made again from its blocks: each is proven by its fingerprint, wherever it comes from, and the frame by its
//! check or tag. Compressors of other versions may pack the same blocks in another way; then it cannot be made again.

use tracker::extent::BLOCK_SIZE;
use zerocopy::IntoBytes;

use crate::error::{Error, Result};
use crate::keys::{Fingerprint, Keys};
use crate::segment::codec::{Codec, CodecKind, Compressor};
use crate::segment::format::{Directory, Frame, HEADER_BYTES, Header};
use crate::segment::frame::decode_frame;
use crate::segment::reader::{check_header, decode_tail, tail_bytes};
use crate::segment::reference::SegmentRef;
use crate::segment::seal::Owner;

/// Levels of Zstandard that a frame may have been packed with.
const ZSTD_LEVELS: std::ops::RangeInclusive<i32> = 1..=19;

/// Where the blocks of a frame may be found.
pub trait Blocks {
    /// A block of the disk as it is somewhere at this moment; `None`: it is not there. It may be any bytes.
    ///
    /// # Errors
    ///
    /// What holds it cannot be read.
    fn block(&self, number: u64) -> Result<Option<Vec<u8>>>;
}

/// The directory of an object, if its end is whole.
///
/// # Errors
///
/// It is damaged, or another one.
pub fn directory_of(
    content: &[u8],
    key: &str,
    segment: &SegmentRef,
    owner: &Owner,
) -> Result<Directory> {
    let damaged = |what: &str| crate::segment::frame::damaged(key, what);
    let end = usize::try_from(segment.bytes).ok();
    let start = segment.bytes.checked_sub(tail_bytes(segment, owner));
    let tail = start
        .filter(|start| *start >= HEADER_BYTES as u64)
        .zip(end)
        .and_then(|(start, end)| content.get(start as usize..end));
    let tail = tail.ok_or_else(|| damaged("it is cut short"))?;
    decode_tail(tail, key, segment, owner)
}

/// Looks at every byte of an object.
///
/// # Errors
///
/// `Corrupt`: it is not the segment that a manifest names.
pub fn check_whole(content: &[u8], key: &str, segment: &SegmentRef, owner: &Owner) -> Result<()> {
    let damaged = |what: &str| crate::segment::frame::damaged(key, what);
    if content.len() as u64 != segment.bytes {
        let (found, named) = (content.len(), segment.bytes);
        return Err(damaged(&format!("it has {found} bytes instead of {named}")));
    }
    check_header(content, key, owner)?;
    let directory = directory_of(content, key, segment, owner)?;
    for (number, frame) in directory.frames.iter().enumerate() {
        if raw_of(content, &directory, number, &owner.keys).is_none() {
            let offset = frame.offset;
            return Err(damaged(&format!("the frame at offset {offset} is damaged")));
        }
    }
    Ok(())
}

fn stored_of<'a>(content: &'a [u8], frame: &Frame) -> Option<&'a [u8]> {
    let range = frame.range();
    content.get(usize::try_from(range.start).ok()?..usize::try_from(range.end).ok()?)
}

fn fingerprints_of<'a>(
    directory: &'a Directory,
    number: usize,
    frame: &Frame,
) -> &'a [Fingerprint] {
    directory.fingerprints_of(number, 0, u32::from(frame.block_count))
}

/// The blocks of a frame, if all of it is as it was written.
fn raw_of(content: &[u8], directory: &Directory, number: usize, keys: &Keys) -> Option<Vec<u8>> {
    let frame = directory.frames.get(number)?;
    let raw = decode_frame(directory, frame, stored_of(content, frame)?, keys).ok()?;
    let expected = fingerprints_of(directory, number, frame);
    let blocks = raw.chunks(BLOCK_SIZE as usize);
    let same = blocks.len() == expected.len()
        && blocks
            .zip(expected)
            .all(|(block, print)| keys.fingerprint(block) == *print);
    same.then_some(raw)
}

/// Makes an object again whose end is whole; `None`, and the offset of the first frame that cannot be: something of it is
/// nowhere to be found.
///
/// # Errors
///
/// Blocks cannot be read, or the library fails. `Corrupt`: its end is damaged.
pub fn rebuild(
    content: &[u8],
    key: &str,
    segment: &SegmentRef,
    owner: &Owner,
    codec: Codec,
    source: &dyn Blocks,
) -> Result<std::result::Result<Vec<u8>, u64>> {
    let directory = directory_of(content, key, segment, owner)?;
    let start = (segment.bytes - tail_bytes(segment, owner)) as usize;
    let mut made = Vec::with_capacity(segment.bytes as usize);
    made.extend_from_slice(Header::of(owner.version()).as_bytes());
    for (number, frame) in directory.frames.iter().enumerate() {
        if let (Some(_), Some(stored)) = (
            raw_of(content, &directory, number, &owner.keys),
            stored_of(content, frame),
        ) {
            made.extend_from_slice(stored);
            continue;
        }
        let damaged = Damaged {
            directory: &directory,
            number,
            frame,
            stored: stored_of(content, frame).unwrap_or_default(),
            keys: &owner.keys,
        };
        let Some(raw) = damaged.gather(source)? else {
            return Ok(Err(frame.offset));
        };
        let Some(stored) = damaged.pack(&raw, codec)? else {
            return Ok(Err(frame.offset));
        };
        made.extend_from_slice(&stored);
    }
    let tail = content.get(start..segment.bytes as usize);
    made.extend_from_slice(tail.unwrap_or_default());
    check_whole(&made, key, segment, owner)?;
    Ok(Ok(made))
}

/// A frame that is to be made again.
struct Damaged<'a> {
    directory: &'a Directory,
    number: usize,
    frame: &'a Frame,
    /// What is there in its place.
    stored: &'a [u8],
    keys: &'a Keys,
}

impl Damaged<'_> {
    /// Finds its blocks.
    fn gather(&self, source: &dyn Blocks) -> Result<Option<Vec<u8>>> {
        let expected = fingerprints_of(self.directory, self.number, self.frame);
        let mut raw = Vec::with_capacity(expected.len() * BLOCK_SIZE as usize);
        for (position, print) in expected.iter().enumerate() {
            let Some(block) = self.find(position, print, source)? else {
                return Ok(None);
            };
            raw.extend_from_slice(&block);
        }
        Ok(Some(raw))
    }

    fn find(
        &self,
        position: usize,
        print: &Fingerprint,
        source: &dyn Blocks,
    ) -> Result<Option<Vec<u8>>> {
        let is_it = |block: &[u8]| self.keys.fingerprint(block) == *print;
        // Of a frame that is stored as it is, the other blocks are still right.
        let is_plain = self.frame.codec == CodecKind::None as u8 && self.directory.key().is_none();
        let here = self.stored.chunks_exact(BLOCK_SIZE as usize).nth(position);
        if let Some(block) = here.filter(|block| is_plain && is_it(block)) {
            return Ok(Some(block.to_vec()));
        }
        let Some(number) = self.place_of(position) else {
            return Ok(None);
        };
        Ok(source.block(number)?.filter(|block| is_it(block)))
    }

    /// Where on the disk a block of the frame belongs.
    fn place_of(&self, position: usize) -> Option<u64> {
        let of_frame = |entry: &&crate::segment::format::ExtentEntry| {
            let first = entry.frame_block.get() as usize;
            let count = entry.block_count.get() as usize;
            entry.frame_index() == Some(self.number) && (first..first + count).contains(&position)
        };
        let entry = self.directory.extents.iter().find(of_frame)?;
        let skip = position as u64 - u64::from(entry.frame_block.get());
        Some(entry.first_block.get() + skip)
    }

    /// Packs its blocks as they were packed; `None`: no way of packing them that is known here leads to the same bytes.
    fn pack(&self, raw: &[u8], codec: Codec) -> Result<Option<Vec<u8>>> {
        let kind = CodecKind::from_number(self.frame.codec);
        let codecs: Vec<Codec> = match kind {
            Some(CodecKind::Lz4) => vec![Codec::Lz4],
            Some(CodecKind::Zstd) => {
                let known = Some(codec).filter(|codec| matches!(codec, Codec::Zstd(_)));
                known
                    .into_iter()
                    .chain(ZSTD_LEVELS.map(Codec::Zstd))
                    .collect()
            }
            Some(CodecKind::None) => vec![Codec::None],
            None => Vec::new(),
        };
        for codec in codecs {
            let failed = |error| Error::io("Cannot compress a frame", error);
            let mut compressor = Compressor::new(codec).map_err(failed)?;
            let (found, packed) = compressor.compress(raw).map_err(failed)?;
            if Some(found) != kind || packed.len() as u64 != u64::from(self.frame.stored_bytes) {
                continue;
            }
            let mut packed = packed.into_owned();
            if self.is_same(&mut packed)? {
                return Ok(Some(packed));
            }
        }
        Ok(None)
    }

    /// Whether packed blocks are those of the frame; where they are sealed, they are sealed in place.
    fn is_same(&self, packed: &mut [u8]) -> Result<bool> {
        match self.directory.key() {
            None => Ok(self.keys.check(&[packed]) == self.frame.check),
            Some(key) => Ok(key.seal_again(self.frame, packed)?.is_some()),
        }
    }
}
