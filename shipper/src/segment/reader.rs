//! Reading segments, from a store or from a file of the spool.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use zerocopy::IntoBytes;

use tracker::extent::BLOCK_SIZE;

use super::format::{Directory, Footer, HEADER_BYTES, Header, Version};
use super::frame::damaged;
use super::seal::Owner;
use super::sealed;
use crate::error::{Error, Result};
use crate::segment::reference::SegmentRef;
use crate::store::Store;

/// Largest directory that is read, in bytes: several times what a segment of the target size can
/// have, so that no manifest makes this program ask for more memory than there is.
pub const DIRECTORY_BYTES_MAX: u64 = 256 << 20;

/// Bytes of directory and footer of a segment.
pub fn tail_bytes(segment: &SegmentRef, owner: &Owner) -> u64 {
    segment
        .directory_bytes
        .saturating_add(owner.footer_bytes() as u64)
}

/// The directory of a segment in a store, by one ranged read.
///
/// # Errors
///
/// The object is missing, damaged, or not the one that the manifest names.
pub fn read_directory(
    store: &dyn Store,
    key: &str,
    segment: &SegmentRef,
    owner: &Owner,
) -> Result<Directory> {
    let tail = store.read(key, Some(tail_start(key, segment, owner)?..segment.bytes))?;
    decode_tail(&tail, key, segment, owner)
}

/// The directory of a segment in a file.
///
/// # Errors
///
/// As for [`read_directory`].
pub fn read_directory_file(path: &Path, segment: &SegmentRef, owner: &Owner) -> Result<Directory> {
    let key = path.display().to_string();
    let start = tail_start(&key, segment, owner)?;
    let mut tail = vec![0; (segment.bytes - start) as usize];
    File::open(path)
        .and_then(|file| file.read_exact_at(&mut tail, start))
        .map_err(|error| Error::io(format!("Cannot read segment {key}"), error))?;
    decode_tail(&tail, &key, segment, owner)
}

fn tail_start(key: &str, segment: &SegmentRef, owner: &Owner) -> Result<u64> {
    if segment.directory_bytes > DIRECTORY_BYTES_MAX {
        return Err(damaged(
            key,
            "the manifest says that its directory is larger than one can be",
        ));
    }
    segment
        .bytes
        .checked_sub(tail_bytes(segment, owner))
        .filter(|start| *start >= HEADER_BYTES as u64)
        .ok_or_else(|| damaged(key, "the manifest contradicts itself about its size"))
}

/// Reads directory and footer of the segment that the manifest names.
///
/// # Errors
///
/// It is damaged, or another one.
pub fn decode_tail(
    tail: &[u8],
    key: &str,
    segment: &SegmentRef,
    owner: &Owner,
) -> Result<Directory> {
    let directory = match owner.version() {
        Version::First => decode_plain(tail, segment, owner),
        Version::Second => sealed::decode(tail, segment, owner),
    };
    let directory = directory.map_err(|what| damaged(key, &what))?;
    if directory.fingerprints.len() as u64 != segment.data_blocks
        || directory.zero_blocks() != segment.zero_blocks
    {
        return Err(damaged(
            key,
            "the manifest is wrong about how many blocks it has",
        ));
    }
    // Whoever reads a frame asks for memory by its size, so it has to be plausible.
    let oversized = directory
        .frames
        .iter()
        .find(|frame| u64::from(frame.stored_bytes) > u64::from(frame.block_count) * BLOCK_SIZE);
    if let Some(frame) = oversized {
        let what = format!("the frame at offset {} is too large", frame.offset);
        return Err(damaged(key, &what));
    }
    Ok(directory)
}

fn decode_plain(
    tail: &[u8],
    segment: &SegmentRef,
    owner: &Owner,
) -> std::result::Result<Directory, String> {
    let (directory, footer) = Directory::decode(tail, segment.bytes, &owner.keys)?;
    if !is_named(&footer, segment) {
        return Err("it is not the segment that the manifest names".to_owned());
    }
    if footer.vault_id != owner.vault_id || footer.owner != owner.check {
        return Err("it belongs to another disk, machine or vault".to_owned());
    }
    Ok(directory)
}

fn is_named(footer: &Footer, segment: &SegmentRef) -> bool {
    let name = segment.name.0;
    footer.check == segment.check.0
        && footer.generation.get() == name.generation
        && footer.first_epoch.get() == name.first_epoch.0
        && footer.last_epoch.get() == name.last_epoch.0
        && footer.number.get() == name.number
}

/// Whether an object begins like a segment of this owner.
///
/// # Errors
///
/// It does not.
pub fn check_header(object: &[u8], key: &str, owner: &Owner) -> Result<()> {
    if object.get(..HEADER_BYTES) == Some(Header::of(owner.version()).as_bytes()) {
        return Ok(());
    }
    Err(damaged(
        key,
        "it does not begin like a segment of a version that is known here",
    ))
}
