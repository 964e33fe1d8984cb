//! The segments of one disk and epoch, one after the other.
//!
//! When a segment is full the next one becomes current. Threads that are in the middle of a frame then still make it for
//! the one before, so that both are open until nobody holds the older one any more. In which of them a frame
//! stands does not matter: segments of one epoch have no block in common.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use tracker::extent::Epoch;

use super::format::{Directory, SegmentName};
use super::frame::EncodedFrame;
use super::reference::SegmentRef;
use super::seal::{Current, Owner, SegmentSeal};
use super::writer::SegmentWriter;
use crate::error::Result;

/// How the segments are called, and where their files are.
#[derive(Clone, Debug)]
pub struct Place {
    /// Folder of the files.
    pub folder: PathBuf,
    /// Name of a segment's file.
    pub file: fn(&str, &SegmentName) -> String,
    /// Generation of the shipper.
    pub generation: u64,
    /// The epoch that is captured.
    pub epoch: Epoch,
    /// Numbers of the segments; where they are used up the last one takes whatever comes.
    pub numbers: Range<u32>,
}

/// Segments that are being written.
#[derive(Debug)]
pub struct SegmentRoll {
    place: Place,
    owner: Owner,
    current: Arc<Current>,
    next_number: u32,
    open: Vec<SegmentWriter>,
    made: Vec<(SegmentRef, Directory)>,
}

fn begin(place: &Place, owner: &Owner, number: u32) -> Result<Arc<SegmentSeal>> {
    let name = SegmentName {
        generation: place.generation,
        first_epoch: place.epoch,
        last_epoch: place.epoch,
        number,
    };
    SegmentSeal::begin(name, owner)
}

impl SegmentRoll {
    /// Begins; there is no file before there is a frame.
    ///
    /// # Errors
    ///
    /// The system has no random numbers.
    pub fn new(place: Place, owner: &Owner) -> Result<Self> {
        let first = begin(&place, owner, place.numbers.start)?;
        Ok(Self {
            next_number: place.numbers.start.saturating_add(1),
            place,
            owner: owner.clone(),
            current: Arc::new(Current::new(first)),
            open: Vec::new(),
            made: Vec::new(),
        })
    }

    /// The segment that frames are to be made for.
    pub fn current(&self) -> Arc<Current> {
        Arc::clone(&self.current)
    }

    /// Whether the last segment that there may be is full.
    pub fn is_full(&self) -> bool {
        self.next_number >= self.place.numbers.end
            && self
                .open
                .iter()
                .any(|writer| writer.is_full() && writer.is_of(&self.current.get()))
    }

    /// Adds a frame, none of whose blocks was added before.
    ///
    /// # Errors
    ///
    /// A file cannot be written or synced.
    pub fn append(&mut self, frame: &EncodedFrame) -> Result<()> {
        if frame.runs.is_empty() {
            return Ok(());
        }
        let seal = frame.seal.clone().unwrap_or_else(|| self.current.get());
        let known = self.open.iter().position(|writer| writer.is_of(&seal));
        let index = match known {
            Some(index) => index,
            None => {
                let file = (self.place.file)(&self.owner.disk, &seal.name());
                let path = self.place.folder.join(file);
                self.open
                    .push(SegmentWriter::create(&path, Arc::clone(&seal))?);
                self.open.len() - 1
            }
        };
        let writer = &mut self.open[index];
        writer.append(frame)?;
        if writer.is_full()
            && self.next_number < self.place.numbers.end
            && writer.is_of(&self.current.get())
        {
            self.current
                .set(begin(&self.place, &self.owner, self.next_number)?);
            self.next_number += 1;
        }
        drop(seal);
        self.finish_left()
    }

    /// Finishes the segments that no frame will be made for any more.
    fn finish_left(&mut self) -> Result<()> {
        let current = self.current.get();
        let is_left = |writer: &mut SegmentWriter| !writer.is_of(&current) && writer.is_left();
        while let Some(left) = self.open.extract_if(.., is_left).next() {
            self.made.push(left.finish()?);
        }
        Ok(())
    }

    /// Finishes all segments. Every frame that was made must have been added.
    ///
    /// # Errors
    ///
    /// A file cannot be written or synced.
    pub fn finish(mut self) -> Result<Vec<(SegmentRef, Directory)>> {
        for writer in self.open {
            self.made.push(writer.finish()?);
        }
        // Oldest first is any order within an epoch; by name it is the same each time.
        self.made.sort_by_key(|(segment, _)| segment.name);
        Ok(self.made)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::Keys;
    use crate::keys::aead::Cipher;
    use crate::keys::secret::Secret;
    use crate::segment::codec::{Codec, Compressor};
    use crate::segment::format::FRAME_BLOCKS_MAX;
    use crate::segment::frame::{FrameBuilder, decode_frame};
    use crate::segment::reader::read_directory_file;
    use std::collections::BTreeSet;
    use tracker::extent::BLOCK_SIZE;

    const FRAMES: u64 = 700;
    const THREADS: u64 = 4;

    fn owner(keys: Keys) -> Owner {
        Owner {
            vault_id: [7; 16],
            machine: "m".into(),
            disk: "d".into(),
            check: [1; 16],
            keys,
        }
    }

    fn noise(block: u64) -> Vec<u8> {
        let mut bytes = vec![0; BLOCK_SIZE as usize];
        let mut hasher = blake3::Hasher::new();
        hasher.update(&block.to_le_bytes());
        hasher.finalize_xof().fill(&mut bytes);
        bytes
    }

    fn frame(number: u64, current: &Current, keys: &Keys) -> EncodedFrame {
        let mut builder = FrameBuilder::default();
        let first = number * FRAME_BLOCKS_MAX as u64;
        for block in first..first + FRAME_BLOCKS_MAX as u64 {
            let data = noise(block);
            builder.push_block(block, &data, keys.fingerprint(&data));
        }
        let mut compressor = Compressor::new(Codec::None).unwrap();
        builder.finish(&mut compressor, current).unwrap()
    }

    /// Several threads make frames while segments become full; each frame opens in the segment that it stands in.
    fn rolls(keys: &Keys, numbers: Range<u32>) -> usize {
        let folder = tempfile::tempdir().unwrap();
        let owner = owner(keys.clone());
        let place = Place {
            folder: folder.path().to_owned(),
            file: |disk, name| format!("{disk}-{}", name.number),
            generation: 1,
            epoch: Epoch(5),
            numbers,
        };
        let mut roll = SegmentRoll::new(place, &owner).unwrap();
        let (frames, made) = crossbeam_channel::bounded(8);
        std::thread::scope(|scope| {
            for thread in 0..THREADS {
                let (frames, current) = (frames.clone(), roll.current());
                scope.spawn(move || {
                    for number in (thread..FRAMES).step_by(THREADS as usize) {
                        frames.send(frame(number, &current, keys)).unwrap();
                    }
                });
            }
            drop(frames);
            for frame in made {
                roll.append(&frame).unwrap();
                drop(frame);
                assert!(roll.open.len() <= 2 + THREADS as usize);
            }
        });
        let segments = roll.finish().unwrap();
        assert_eq!(segments[0].0.name.0.number, 3);
        let mut seen = BTreeSet::new();
        for (segment, _) in &segments {
            let path = folder.path().join(format!("d-{}", segment.name.0.number));
            let object = std::fs::read(&path).unwrap();
            let directory = read_directory_file(&path, segment, &owner).unwrap();
            for entry in &directory.extents {
                let frame = &directory.frames[entry.frame_index().unwrap()];
                let range = frame.range();
                let stored = &object[range.start as usize..range.end as usize];
                let raw = decode_frame(&directory, frame, stored, keys).unwrap();
                let first = entry.first_block.get();
                assert!(raw.chunks(BLOCK_SIZE as usize).next() == Some(&noise(first)));
                assert!(seen.insert(first));
            }
        }
        assert_eq!(seen.len() as u64, FRAMES);
        segments.len()
    }

    #[test]
    fn frames_of_several_threads_open_where_they_stand() {
        let count = rolls(&Keys::derive(&[3; 32]), 3..u32::MAX);
        assert!(count >= 3, "{count}");
        let root = Secret::copy_of(&[3; 32]);
        let sealing = Keys::derive_sealing(&root, [7; 16], Cipher::preferred()).unwrap();
        rolls(&sealing, 3..u32::MAX);
        assert_eq!(rolls(&sealing, 3..5), 2);
    }

    #[test]
    fn a_frame_of_another_segment_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let keys = Keys::derive(&[3; 32]);
        let name = |number| SegmentName {
            generation: 1,
            first_epoch: Epoch(1),
            last_epoch: Epoch(1),
            number,
        };
        let begin = |number| SegmentSeal::begin(name(number), &owner(keys.clone())).unwrap();
        let mut writer = SegmentWriter::create(&folder.path().join("s"), begin(0)).unwrap();
        let other = Current::new(begin(1));
        assert!(writer.append(&frame(0, &other, &keys)).is_err());
    }
}
