//! The head of a journal: its superblocks read, its length and layout checked, its ring mapped.
//!
//! What it does not handle: locking. A tracker may be at work on the file meanwhile.

use std::fs::File;
use std::path::Path;

use super::alarm::is_doubtful;
use super::format::{INTENT_OFFSET, PAGE_BYTES, Superblock, SuperblockFault, VERSION};
use super::mapping::SharedWords;
use super::writer::distrusted;
use crate::error::{Error, ErrorKind, Result};

/// Looks at the superblocks until they stand still.
const LOOKS_MAX: usize = 1000;

/// Copies both superblocks out, so that they belong to one moment: twice, until nothing has changed
/// in between. A tracker may be at work. Were one copy read, then the other while it is rewritten,
/// the first might have been replaced by then, and an old state would pass for the present one.
fn copy_superblocks(words: &SharedWords) -> Option<[Vec<u8>; 2]> {
    let copy = || {
        let mut pages = [vec![0; PAGE_BYTES], vec![0; PAGE_BYTES]];
        for (index, page) in pages.iter_mut().enumerate() {
            words.copy_out((index * PAGE_BYTES) as u64, page)?;
        }
        Some(pages)
    };
    let mut before = copy()?;
    for _ in 0..LOOKS_MAX {
        let after = copy()?;
        if before == after {
            break;
        }
        before = after;
    }
    Some(before)
}

/// Both superblocks, or what is wrong with each.
pub(super) fn decode_superblocks(
    words: &SharedWords,
) -> [std::result::Result<Superblock, SuperblockFault>; 2] {
    copy_superblocks(words).map_or(
        [Err(SuperblockFault::Damaged), Err(SuperblockFault::Damaged)],
        |pages| pages.map(|page| Superblock::decode(&page)),
    )
}

/// The superblock that counts, where it stands, and whether the other one is damaged. The latter is an
/// error unless it is of another boot than this, or a sync has failed.
pub(super) fn read_superblock(
    path: &Path,
    words: &SharedWords,
    boot: Option<[u8; 16]>,
) -> Result<(Superblock, usize, bool)> {
    let decoded = decode_superblocks(words);
    for (copy, result) in decoded.iter().enumerate() {
        if let Err(SuperblockFault::Future(version)) = result {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "Journal {}: the superblock at offset {} is of version {version}, this tracker \
                     knows versions up to {}: use the tracker that made it",
                    path.display(),
                    copy * PAGE_BYTES,
                    VERSION as u32
                ),
            ));
        }
    }
    let newest = decoded
        .iter()
        .enumerate()
        .filter_map(|(copy, result)| result.as_ref().ok().map(|superblock| (*superblock, copy)))
        .max_by_key(|(superblock, _)| superblock.sequence.get());
    let damaged = decoded
        .iter()
        .position(|r| r.as_ref().err() == Some(&SuperblockFault::Damaged));
    match (newest, damaged) {
        // After a power cut a torn copy is nothing unusual.
        (Some((newest, copy)), Some(_))
            if boot.is_some_and(|boot| newest.boot_id != boot || is_doubtful(words)) =>
        {
            Ok((newest, copy, true))
        }
        (_, Some(copy)) => Err(distrusted(
            ErrorKind::Corrupt,
            path,
            &format!("the superblock at offset {} is damaged", copy * PAGE_BYTES),
        )),
        (Some((newest, copy)), None) => Ok((newest, copy, false)),
        (None, None) => Err(distrusted(
            ErrorKind::Corrupt,
            path,
            "no superblock is whole",
        )),
    }
}

/// The mapped head of a journal.
pub(super) struct Head {
    pub words: SharedWords,
    /// The superblock that counts.
    pub superblock: Superblock,
    /// Which copy it is.
    pub copy: usize,
    /// The other one is damaged.
    pub damaged_copy: bool,
}

/// Maps the head of a journal and checks that it is all there.
pub(super) fn map_checked(
    path: &Path,
    file: &File,
    writable: bool,
    boot: Option<[u8; 16]>,
) -> Result<Head> {
    let io = |error| Error::io(format!("Cannot map journal {}", path.display()), error);
    let length = || Ok(file.metadata().map_err(io)?.len());
    if length()? < INTENT_OFFSET {
        let what = format!("it is cut short at {} bytes", length()?);
        return Err(distrusted(ErrorKind::Corrupt, path, &what));
    }
    let words = SharedWords::readable(file, INTENT_OFFSET).map_err(io)?;
    let (superblock, copy, damaged_copy) = read_superblock(path, &words, boot)?;
    if !superblock.layout_is_consistent() {
        let what = "the superblock lays out areas that this version does not have";
        return Err(distrusted(ErrorKind::Corrupt, path, what));
    }
    if !superblock.counters_are_consistent() {
        let what = "a counter of the superblock is out of range";
        return Err(distrusted(ErrorKind::Corrupt, path, what));
    }
    // Looked at after the superblock: a tracker at work makes the file longer before it says so, and
    // one that was killed in between leaves it longer.
    let length = length()?;
    if length < superblock.file_bytes() {
        let what = format!(
            "it has {length} bytes where {} are expected",
            superblock.file_bytes()
        );
        return Err(distrusted(ErrorKind::Corrupt, path, &what));
    }
    let map = if writable {
        SharedWords::writable
    } else {
        SharedWords::readable
    };
    Ok(Head {
        words: map(file, superblock.head_bytes()).map_err(io)?,
        superblock,
        copy,
        damaged_copy,
    })
}
