//! New journal files.
//!
//! Order: the whole file is written and synced under another name, then renamed, then the folder is
//! synced. So a journal is there as a whole or not at all.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use uuid::Uuid;
use zerocopy::IntoBytes;

use super::format::{
    ALARM_OFFSET, DISK_BLOCKS_MAX, INTENT_OFFSET, INTENT_PAGES_RANGE, OVERFLOW_BYTES_RANGE,
    PAGE_BYTES, RECORD_BYTES, REGION_BYTES, RING_BYTES_RANGE, Superblock, checkpoint_room_of,
};
use super::intent::IntentPlace;
use super::overflow::unit_bytes_of;
use super::recovery::JournalOptions;
use super::state::EpochState;
use crate::error::{Error, ErrorKind, Result};
use crate::extent::{BLOCK_SIZE, blocks_of};
use crate::failpoint::made_durable;

/// A ring has overflow bits of this share of its size, both halves together, within what is allowed: so
/// a ring of 1 MiB has room for bits of 64 KiB, which is one MiB each for a disk of 384 GiB.
const OVERFLOW_SHARE: u64 = 16;
/// More than this is not needed: the bits are a way out, not a map.
const OVERFLOW_BYTES_MAX: u64 = 128 << 10;

/// Refuses a disk that no journal can be for.
pub(super) fn check_trackable(disk_size_bytes: u64) -> Result<()> {
    if blocks_of(disk_size_bytes) <= DISK_BLOCKS_MAX {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Unsupported,
        "Disks of more than 4 PiB are not tracked",
    ))
}

/// Makes a new journal for a disk of which every block counts as changed.
///
/// # Errors
///
/// The options allow none, or the file cannot be written.
pub(super) fn create(path: &Path, options: &JournalOptions, boot: [u8; 16]) -> Result<()> {
    let ring_bytes = options.ring_bytes;
    if !RING_BYTES_RANGE.contains(&ring_bytes) || !ring_bytes.is_multiple_of(PAGE_BYTES as u64) {
        return Err(Error::new(
            ErrorKind::Invalid,
            format!("A ring of {ring_bytes} bytes is not a multiple of 4096 from 16 KiB to 4 GiB"),
        ));
    }
    check_trackable(options.disk_size_bytes)?;
    let mut superblock = Superblock::zeroed();
    superblock.sequence = 1.into();
    superblock.journal_id = Uuid::new_v4().into_bytes();
    superblock.disk_identity = options.disk_identity;
    superblock.boot_id = boot;
    superblock.disk_size_bytes = options.disk_size_bytes.into();
    superblock.block_bytes = (BLOCK_SIZE as u32).into();
    superblock.region_bytes = REGION_BYTES.into();
    superblock.intent_offset = INTENT_OFFSET.into();
    let intent_pages = IntentPlace::pages_for(options.intent_regions)
        .clamp(*INTENT_PAGES_RANGE.start(), *INTENT_PAGES_RANGE.end());
    superblock.intent_bytes = (intent_pages * PAGE_BYTES as u64).into();
    let overflow_offset = INTENT_OFFSET + superblock.intent_bytes.get();
    let overflow_bytes = overflow_bytes_of(ring_bytes);
    superblock.overflow_offset = overflow_offset.into();
    superblock.overflow_bytes = overflow_bytes.into();
    let unit = unit_bytes_of(options.disk_size_bytes, overflow_bytes, REGION_BYTES.into());
    superblock.overflow_unit_bytes = unit.into();
    superblock.ring_offset = (overflow_offset + overflow_bytes).into();
    superblock.ring_records = (ring_bytes / RECORD_BYTES).into();
    superblock.checkpoint_offset = superblock.head_bytes().into();
    superblock.checkpoint_pages = checkpoint_room_of(options.disk_size_bytes).into();
    superblock.ring_tail = 1.into();
    for set in &mut superblock.sets {
        set.generation = 1.into();
    }
    EpochState::initial().store(&mut superblock);
    superblock.seal();
    write_new(path, &superblock).map_err(|error| {
        Error::io(
            format!("Cannot make journal {}: free some space?", path.display()),
            error,
        )
    })
}

/// Bytes of the overflow bits beside a ring of so many bytes.
fn overflow_bytes_of(ring_bytes: u64) -> u64 {
    let least = *OVERFLOW_BYTES_RANGE.start();
    let share = ring_bytes / OVERFLOW_SHARE / least * least;
    share.clamp(least, OVERFLOW_BYTES_MAX)
}

fn write_new(path: &Path, superblock: &Superblock) -> std::io::Result<()> {
    let temporary = path.with_added_extension("new");
    let written = (|| {
        let file = write_file(&temporary, superblock)?;
        file.sync_all()?;
        made_durable(&file, 0..u64::MAX);
        std::fs::rename(&temporary, path)?;
        sync_folder(path)
    })();
    if written.is_err() {
        let _not_there = std::fs::remove_file(&temporary);
    }
    written
}

/// Writes a whole file in which nothing is recorded; it is not synced.
pub(super) fn write_file(path: &Path, superblock: &Superblock) -> std::io::Result<File> {
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)?;
    file.write_all(superblock.as_bytes())?;
    file.write_all(superblock.as_bytes())?;
    // Real zeroes: a store into a hole of a mapped file raises SIGBUS when the disk is full.
    let zeroes = vec![0; 1 << 20];
    let mut left = superblock.head_bytes() - ALARM_OFFSET;
    while left > 0 {
        let step = left.min(zeroes.len() as u64);
        file.write_all(&zeroes[..step as usize])?;
        left -= step;
    }
    file.set_len(superblock.file_bytes())?;
    Ok(file)
}

/// Makes the name of a file durable.
pub(super) fn sync_folder(path: &Path) -> std::io::Result<()> {
    let folder = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty());
    let folder = File::open(folder.unwrap_or(Path::new(".")))?;
    folder.sync_all()?;
    made_durable(&folder, 0..u64::MAX);
    Ok(())
}
