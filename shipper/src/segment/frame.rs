//! Frames: up to 128 KiB of blocks that are compressed together, and sealed in an encrypted vault.
//!
//! A frame is made from blocks as they were read, and taken apart again with every block compared
//! with its fingerprint. Both need no I/O.

use tracker::extent::{BLOCK_SIZE, Extent};

use std::borrow::Cow;
use std::sync::Arc;

use super::codec::{CodecKind, Compressor, decompress};
use super::format::{Directory, ExtentEntry, Frame};
use super::seal::{Current, SegmentSeal};
use crate::error::{Error, ErrorKind, Result};
use crate::keys::{Check, Fingerprint, Keys};

/// A run of blocks of one batch, in the order of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Where the blocks are on the disk.
    pub extent: Extent,
    /// Position of the first block in the frame; `None`: the blocks are zero.
    pub frame_block: Option<u32>,
}

/// What one batch of blocks became.
#[derive(Debug, Default)]
pub struct EncodedFrame {
    /// Runs in ascending order; empty if nothing of the batch has to be kept.
    pub runs: Vec<Run>,
    /// Fingerprints of the blocks with data.
    pub fingerprints: Vec<Fingerprint>,
    /// Stored bytes; empty if no block has data.
    pub stored: Vec<u8>,
    /// How they are stored, as a number of [`CodecKind`].
    pub codec: u8,
    /// Its number in its segment.
    pub number: u32,
    /// Check of the stored bytes, or their tag.
    pub check: Check,
    /// The segment that it was made for; `None`: no block has data, any segment may take it.
    pub seal: Option<Arc<SegmentSeal>>,
}

/// Collects the blocks of one batch that have to be kept.
#[derive(Debug, Default)]
pub struct FrameBuilder {
    runs: Vec<Run>,
    fingerprints: Vec<Fingerprint>,
    raw: Vec<u8>,
}

impl FrameBuilder {
    /// Adds blocks that are zero.
    pub fn push_zero(&mut self, extent: Extent) {
        match self.runs.last_mut() {
            Some(last)
                if last.frame_block.is_none() && last.extent.end_block() == extent.first_block =>
            {
                last.extent.block_count += extent.block_count;
            }
            _ => self.runs.push(Run {
                extent,
                frame_block: None,
            }),
        }
    }

    /// Adds a block with data, of [`BLOCK_SIZE`] bytes. Blocks come in ascending order.
    pub fn push_block(&mut self, block: u64, data: &[u8], fingerprint: Fingerprint) {
        let position = self.fingerprints.len() as u32;
        self.raw.extend_from_slice(data);
        self.fingerprints.push(fingerprint);
        match self.runs.last_mut() {
            Some(last) if last.frame_block.is_some() && last.extent.end_block() == block => {
                last.extent.block_count += 1;
            }
            _ => self.runs.push(Run {
                extent: Extent {
                    first_block: block,
                    block_count: 1,
                },
                frame_block: Some(position),
            }),
        }
    }

    /// Compresses what was added, makes it a frame of the current segment, and starts anew.
    ///
    /// # Errors
    ///
    /// The compressor or the cipher fails.
    pub fn finish(
        &mut self,
        compressor: &mut Compressor,
        current: &Current,
    ) -> Result<EncodedFrame> {
        let mut frame = EncodedFrame {
            runs: std::mem::take(&mut self.runs),
            fingerprints: std::mem::take(&mut self.fingerprints),
            ..EncodedFrame::default()
        };
        if self.raw.is_empty() {
            return Ok(frame);
        }
        let (codec, stored) = compressor
            .compress(&self.raw)
            .map_err(|error| Error::io("Cannot compress a frame", error))?;
        frame.stored = stored.into_owned();
        frame.codec = codec as u8;
        self.raw.clear();
        let seal = current.get();
        let block_count = frame.fingerprints.len() as u16;
        (frame.number, frame.check) =
            seal.seal_frame(frame.codec, block_count, &mut frame.stored)?;
        frame.seal = Some(seal);
        Ok(frame)
    }
}

/// Brings back the blocks of a frame of a segment.
///
/// # Errors
///
/// The stored bytes contradict their check or tag, or do not hold as many blocks as the directory says: in
/// words that follow the object's name.
pub fn decode_frame(
    directory: &Directory,
    frame: &Frame,
    stored: &[u8],
    keys: &Keys,
) -> std::result::Result<Vec<u8>, String> {
    let offset = frame.offset;
    let damaged = || format!("the frame at offset {offset} is damaged");
    let packed = match directory.key() {
        None if frame.check != keys.check(&[stored]) => return Err(damaged()),
        None => Cow::Borrowed(stored),
        Some(key) => {
            let mut opened = stored.to_vec();
            key.open_frame(frame, &mut opened).ok_or_else(damaged)?;
            Cow::Owned(opened)
        }
    };
    let raw_bytes = usize::from(frame.block_count) * BLOCK_SIZE as usize;
    CodecKind::from_number(frame.codec)
        .and_then(|codec| decompress(codec, &packed, raw_bytes))
        .ok_or_else(|| format!("the frame at offset {offset} cannot be decompressed"))
}

/// Compares the blocks of an extent, of which `raw` is the whole frame, with their fingerprints,
/// and returns the bytes of `part` of it.
///
/// # Errors
///
/// A block differs, in words that follow the object's name.
pub fn checked_part<'a>(
    directory: &Directory,
    entry: &ExtentEntry,
    part: Extent,
    raw: &'a [u8],
    keys: &Keys,
) -> std::result::Result<&'a [u8], String> {
    let malformed = || format!("block {} has no place in its frame", part.first_block);
    let frame = entry.frame_index().ok_or_else(malformed)?;
    let skip = part
        .first_block
        .checked_sub(entry.first_block.get())
        .ok_or_else(malformed)?;
    let position = entry.frame_block.get() + skip as u32;
    let fingerprints = directory.fingerprints_of(frame, position, part.block_count as u32);
    let from = position as usize * BLOCK_SIZE as usize;
    let bytes = raw
        .get(from..from + part.length_bytes() as usize)
        .filter(|_| fingerprints.len() as u64 == part.block_count)
        .ok_or_else(malformed)?;
    for (index, (block, expected)) in bytes
        .chunks_exact(BLOCK_SIZE as usize)
        .zip(fingerprints)
        .enumerate()
    {
        if keys.fingerprint(block) != *expected {
            let number = part.first_block + index as u64;
            return Err(format!("block {number} differs from its fingerprint"));
        }
    }
    Ok(bytes)
}

/// The error for an object that contradicts its checks.
pub fn damaged(key: &str, what: &str) -> Error {
    Error::new(
        ErrorKind::Corrupt,
        format!("Object {key} of the vault: {what}"),
    )
}
