//! Pieces of work: consecutive frames of one segment that one read brings.
//!
//! A piece carries the part of the directory that it needs, so that the directory itself can be
//! dropped while its pieces wait. Cutting is pure.

use std::iter::Peekable;
use std::ops::Range;

use bytes::Bytes;
use tracker::extent::BLOCK_SIZE;

use crate::error::Result;
use crate::keys::Keys;
use crate::segment::format::{Directory, ExtentEntry, Frame};
use crate::segment::frame::decode_frame;
use crate::store::Store;

/// Blocks of one piece, however well they are compressed: 16 MiB.
const BLOCKS_MAX: usize = 4096;

/// How pieces are cut.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Most bytes of one read.
    pub read_bytes_max: u64,
    /// Most bytes between two frames that are read through rather than left out.
    pub gap_bytes_max: u64,
}

/// A frame that is wanted, by its number, and the extents that are wanted of it.
pub type Wanted<'a> = (usize, &'a [ExtentEntry]);

/// Consecutive frames of a segment.
#[derive(Debug)]
pub struct Piece {
    /// Which segment it is of, as whoever cut it counts them.
    pub segment: usize,
    /// Bytes of the object, from the first frame to the end of the last one.
    pub range: Range<u64>,
    /// The wanted part of the directory; frames are numbered anew.
    pub directory: Directory,
}

impl Piece {
    /// Reads the frames.
    ///
    /// # Errors
    ///
    /// The object is missing or too short, or the store fails.
    pub fn read(&self, store: &dyn Store, key: &str) -> Result<Bytes> {
        store.read(key, Some(self.range.clone()))
    }

    /// The blocks of a frame, from the bytes of the piece.
    ///
    /// # Errors
    ///
    /// It is damaged, in words that follow the object's name.
    pub fn decode(
        &self,
        frame: &Frame,
        bytes: &[u8],
        keys: &Keys,
    ) -> std::result::Result<Vec<u8>, String> {
        let stored = frame.range();
        let start = (stored.start - self.range.start) as usize;
        let end = (stored.end - self.range.start) as usize;
        let stored = bytes
            .get(start..end)
            .ok_or_else(|| format!("it ends within the frame at offset {}", stored.start))?;
        decode_frame(&self.directory, frame, stored, keys)
    }

    /// Position in a frame of the first block that differs from its fingerprint.
    pub fn differing(&self, frame: usize, raw: &[u8], keys: &Keys) -> Option<usize> {
        let blocks = raw.chunks(BLOCK_SIZE as usize);
        let count = blocks.len() as u32;
        let mut expected = self.directory.fingerprints_of(frame, 0, count).iter();
        blocks
            .into_iter()
            .position(|block| expected.next() != Some(&keys.fingerprint(block)))
    }

    /// The frames, each with its extents.
    pub fn frames(&self) -> impl Iterator<Item = (&Frame, &[ExtentEntry])> {
        let mut rest = &self.directory.extents[..];
        self.directory
            .frames
            .iter()
            .zip(0..)
            .map(move |(frame, number)| {
                let count = rest.partition_point(|entry| entry.frame.get() <= number);
                let (of_frame, behind) = rest.split_at(count);
                rest = behind;
                (frame, of_frame)
            })
    }
}

/// Cuts the wanted frames of a segment, in ascending order, into pieces.
pub fn cut<'a>(
    segment: usize,
    directory: &'a Directory,
    wanted: impl Iterator<Item = Wanted<'a>> + 'a,
    limits: Limits,
) -> impl Iterator<Item = Piece> + 'a {
    let mut wanted = wanted.peekable();
    std::iter::from_fn(move || next_piece(segment, directory, &mut wanted, limits))
}

/// Entries in the order of their frames, one group for each frame.
pub fn by_frame(entries: &[ExtentEntry]) -> impl Iterator<Item = Wanted<'_>> {
    entries
        .chunk_by(|one, other| one.frame == other.frame)
        .filter_map(|group| Some((group.first()?.frame_index()?, group)))
}

fn next_piece<'a>(
    segment: usize,
    directory: &Directory,
    wanted: &mut Peekable<impl Iterator<Item = Wanted<'a>>>,
    limits: Limits,
) -> Option<Piece> {
    // A checked directory has all the frames that its extents name.
    let (first, _) = wanted.peek()?;
    let mut range = directory.frames[*first].range();
    range.end = range.start;
    let (mut frames, mut extents, mut fingerprints) = (Vec::new(), Vec::new(), Vec::new());
    while let Some((number, entries)) = wanted.next_if(|(number, _)| {
        let next = directory.frames[*number].range();
        let fits = next.end - range.start <= limits.read_bytes_max
            && next.start - range.end <= limits.gap_bytes_max
            && fingerprints.len() < BLOCKS_MAX;
        frames.is_empty() || fits
    }) {
        let frame = directory.frames[number];
        range.end = frame.range().end;
        let count = u32::from(frame.block_count);
        fingerprints.extend_from_slice(directory.fingerprints_of(number, 0, count));
        let position = frames.len() as u32;
        extents.extend(entries.iter().map(|entry| ExtentEntry {
            frame: position.into(),
            ..*entry
        }));
        frames.push(frame);
    }
    Some(Piece {
        segment,
        range,
        directory: directory.part(frames, extents, fingerprints),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::Fingerprint;
    use proptest::prelude::*;

    const LIMITS: Limits = Limits {
        read_bytes_max: 1000,
        gap_bytes_max: 100,
    };

    /// Frames of these sizes in bytes and blocks, one behind the other, one extent in each.
    fn directory(sizes: &[(u32, u16)]) -> Directory {
        let (mut offset, mut block) = (16, 0);
        let (mut frames, mut extents, mut fingerprints) = (vec![], vec![], vec![]);
        for (number, (bytes, blocks)) in sizes.iter().enumerate() {
            frames.push(Frame {
                offset,
                stored_bytes: *bytes,
                block_count: *blocks,
                codec: 0,
                number: 0,
                check: [number as u8; 16],
            });
            extents.push(ExtentEntry {
                first_block: block.into(),
                block_count: u32::from(*blocks).into(),
                frame: (number as u32).into(),
                frame_block: 0.into(),
                reserved: 0.into(),
            });
            fingerprints.extend((0..*blocks).map(|_| Fingerprint([number as u8; 16])));
            offset += u64::from(*bytes);
            block += u64::from(*blocks);
        }
        Directory::new(frames, extents, fingerprints)
    }

    proptest! {
        #[test]
        fn pieces_hold_what_is_wanted(
            frames in prop::collection::vec((1u32..400, 1u16..=32, any::<bool>()), 1..60),
        ) {
            let sizes: Vec<_> = frames.iter().map(|(bytes, blocks, _)| (*bytes, *blocks)).collect();
            let directory = directory(&sizes);
            let wanted: Vec<_> = directory.extents.iter().zip(&frames)
                .filter(|(_, (_, _, wanted))| *wanted)
                .map(|(entry, _)| *entry)
                .collect();
            let pieces: Vec<_> = cut(7, &directory, by_frame(&wanted), LIMITS).collect();
            let mut found = Vec::new();
            let mut end = 0;
            for piece in &pieces {
                prop_assert_eq!(piece.segment, 7);
                prop_assert!(piece.range.start >= end);
                end = piece.range.end;
                let length = end - piece.range.start;
                prop_assert!(length <= LIMITS.read_bytes_max || piece.directory.frames.len() == 1);
                let mut before = piece.range.start;
                for (position, (frame, entries)) in piece.frames().enumerate() {
                    prop_assert!(frame.offset - before <= LIMITS.gap_bytes_max);
                    before = frame.range().end;
                    prop_assert_eq!(entries.len(), 1);
                    let count = u32::from(frame.block_count);
                    let fingerprints = piece.directory.fingerprints_of(position, 0, count);
                    prop_assert_eq!(fingerprints.len(), count as usize);
                    prop_assert!(fingerprints.iter().all(|one| one.0 == frame.check));
                    found.push((frame.check[0], entries[0].first_block.get()));
                }
                prop_assert_eq!(before, end);
            }
            let expected: Vec<_> = wanted.iter()
                .map(|entry| (entry.frame.get() as u8, entry.first_block.get()))
                .collect();
            prop_assert_eq!(found, expected);
        }
    }

    #[test]
    fn a_piece_has_a_limit_of_blocks() {
        let directory = directory(&[(1, 32); 300]);
        let all = (0..300).map(|frame| (frame, &[][..]));
        let counts: Vec<_> = cut(0, &directory, all, LIMITS)
            .map(|piece| piece.directory.frames.len())
            .collect();
        assert_eq!(counts, [128, 128, 44]);
    }
}
