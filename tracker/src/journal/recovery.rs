//! Opening a journal: making a new one, or finding out what an old one still says.
//!
//! Order: lock; superblocks; alarm; every slot of the ring; holes filled; superblock published as
//! opened by this boot. A new file is complete and synced before it gets its name.
//!
//! | found | done |
//! |---|---|
//! | no file | a new journal; every block counts as changed |
//! | same boot, or closed cleanly | ring and checkpoint are the truth |
//! | the same, and somebody else wrote to the disk | the same, but none stays closed, every block counts as changed |
//! | another boot, not closed | watermarks are kept, every block counts as changed |
//! | any of these, for a smaller disk | the same, then it is grown: what is new counts as changed |
//! | damage, another or a smaller disk, cut short, a future version | refused, with the way out |
//!
//! Whether somebody else wrote to the disk is told by its times, see `witness`. New times are kept only
//! after a superblock says that every block counts as changed, so that a kill in between loses nothing.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::fcntl::Flock;
use uuid::Uuid;

use super::alarm::Alarm;
use super::checkpoint::SetPlace;
use super::format::{
    ALARM_OFFSET, DISK_BLOCKS_MAX, INTENT_OFFSET, INTENT_TRANSACTIONS, Operation, PAGE_BYTES,
    RECORD_BYTES, REGION_BYTES, RING_BYTES_RANGE, RING_OFFSET, Record, Slot, Superblock,
    checkpoint_room_of,
};
use super::head::{map_checked, read_superblock};
use super::mapping::SharedWords;
use super::ring::read_slot;
use super::state::EpochState;
use super::witness::{Moment, Suspicion, Witness, judge};
use super::writer::{Journal, distrusted};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::{BLOCK_SIZE, Epoch, blocks_of};
use crate::failpoint::{Place, reached};
use crate::lock::lock_exclusive;

/// Looks at the ring until its tail stands still.
const LOOKS_MAX: usize = 1000;

/// What a journal is opened for.
#[derive(Clone, Debug)]
pub struct JournalOptions {
    /// Identity of the disk.
    pub disk_identity: [u8; 16],
    /// Size of the disk in bytes.
    pub disk_size_bytes: u64,
    /// Size of a new ring in bytes.
    pub ring_bytes: u64,
    /// Set an existing journal aside.
    pub rebuild: bool,
    /// The disk's times; `None` where they mean nothing.
    pub seen: Option<Moment>,
}

/// What was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// No journal, or one that was set aside under this name.
    New(Option<PathBuf>),
    /// A journal that was closed.
    Clean,
    /// The tracker died; the ring says what changed.
    Killed,
    /// The machine went down without a clean stop.
    Rebooted,
}

/// What recovery did, for the log.
#[derive(Clone, Debug)]
pub struct RecoveryReport {
    /// The journal.
    pub path: PathBuf,
    /// What was found.
    pub found: Found,
    /// Live records.
    pub records: u64,
    /// Slots that were claimed and never written.
    pub holes: u64,
    /// Size of the disk that the journal was for, where the disk has grown since.
    pub grown_from_bytes: Option<u64>,
    /// Somebody else has written to the disk, or may have.
    pub suspicion: Option<Suspicion>,
}

impl fmt::Display for RecoveryReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.path.display();
        match &self.found {
            Found::New(None) => write!(f, "Journal {path}: new, every block counts as changed"),
            Found::New(Some(old)) => write!(
                f,
                "Journal {path}: new, every block counts as changed; the old one is {}",
                old.display()
            ),
            Found::Clean => write!(
                f,
                "Journal {path}: closed cleanly, {} records",
                self.records
            ),
            Found::Killed => write!(
                f,
                "Journal {path}: the tracker was killed; {} records and {} unused slots recovered",
                self.records, self.holes
            ),
            Found::Rebooted => write!(
                f,
                "Journal {path}: the machine went down without a clean stop; every block counts \
                 as changed"
            ),
        }?;
        if let Some(bytes) = self.grown_from_bytes {
            write!(
                f,
                "; the disk has grown from {bytes} bytes, what is new counts as changed"
            )?;
        }
        match self.suspicion {
            Some(suspicion) => write!(f, "; {suspicion}: every block counts as changed"),
            None => Ok(()),
        }
    }
}

/// A number for this boot of the machine.
///
/// # Errors
///
/// `/proc` is not there.
pub fn boot_id() -> Result<[u8; 16]> {
    let path = "/proc/sys/kernel/random/boot_id";
    let text = std::fs::read_to_string(path)
        .map_err(|error| Error::io(format!("Cannot read {path}"), error))?;
    Uuid::parse_str(text.trim())
        .map(Uuid::into_bytes)
        .map_err(|error| {
            Error::new(ErrorKind::Invalid, format!("{path} does not hold a UUID"))
                .with_source(error)
        })
}

/// Opens the journal of a disk, or makes one.
///
/// # Errors
///
/// It is in use, cannot be read or written, or must not be trusted (see the table above).
pub fn open(path: &Path, options: &JournalOptions) -> Result<(Journal, RecoveryReport)> {
    let boot = boot_id()?;
    let aside = match path.exists() {
        true if options.rebuild => {
            // Locked first: a journal in use is not moved away under its tracker.
            let _held = lock(open_file(path)?, path)?;
            Some(set_aside(path)?)
        }
        true => {
            let file = lock(open_file(path)?, path)?;
            return recover(path, file, options, boot);
        }
        false => None,
    };
    create(path, options, boot)?;
    let file = lock(open_file(path)?, path)?;
    let (journal, mut report) = recover(path, file, options, boot)?;
    report.found = Found::New(aside);
    Ok((journal, report))
}

fn open_file(path: &Path) -> Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .map_err(|error| Error::io(format!("Cannot open journal {}", path.display()), error))
}

fn lock(file: File, path: &Path) -> Result<Flock<File>> {
    lock_exclusive(file).map_err(|errno| {
        Error::new(
            ErrorKind::InUse,
            format!("Journal {} is in use by another tracker", path.display()),
        )
        .with_source(errno)
    })
}

fn set_aside(path: &Path) -> Result<PathBuf> {
    for number in 1.. {
        let mut name = path.as_os_str().to_owned();
        name.push(format!(".broken-{number}"));
        let target = PathBuf::from(name);
        if !target.exists() {
            std::fs::rename(path, &target).map_err(|error| {
                Error::io(
                    format!("Cannot set journal {} aside", path.display()),
                    error,
                )
            })?;
            return Ok(target);
        }
    }
    Err(Error::new(
        ErrorKind::State,
        "No name is free for the old journal",
    ))
}

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

fn create(path: &Path, options: &JournalOptions, boot: [u8; 16]) -> Result<()> {
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
    superblock.intent_bytes = (INTENT_TRANSACTIONS * PAGE_BYTES as u64).into();
    superblock.ring_offset = RING_OFFSET.into();
    superblock.ring_records = (ring_bytes / RECORD_BYTES).into();
    superblock.checkpoint_offset = (RING_OFFSET + ring_bytes).into();
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

/// Writes the whole file under a temporary name, syncs it, and only then gives it its own.
fn write_new(path: &Path, superblock: &Superblock) -> std::io::Result<()> {
    use zerocopy::IntoBytes;
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".new");
    let temporary = PathBuf::from(temporary);
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&temporary)?;
    let written = (|| {
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
        file.sync_all()?;
        std::fs::rename(&temporary, path)?;
        let folder = path
            .parent()
            .filter(|folder| !folder.as_os_str().is_empty());
        File::open(folder.unwrap_or(Path::new(".")))?.sync_all()
    })();
    if written.is_err() {
        let _not_there = std::fs::remove_file(&temporary);
    }
    written
}

/// What a scan of all slots found.
pub(super) struct Scan {
    pub records: Vec<Record>,
    pub head: u64,
}

/// Reads every slot. Any damaged one is an error: it may have been live.
fn scan(path: &Path, words: &SharedWords, superblock: &Superblock) -> Result<Scan> {
    let tail = superblock.ring_tail.get();
    let capacity = superblock.ring_records.get();
    let first_word = superblock.ring_offset.get() as usize / 8;
    // Not those of the disk: when it grows, the record of what is new comes before its size.
    let blocks = superblock.room_blocks();
    let mut records = Vec::new();
    let mut head = tail;
    let slots = words.words()[first_word..]
        .chunks_exact(4)
        .take(capacity as usize);
    for (index, slot) in slots.enumerate() {
        let offset = superblock.ring_offset.get() + index as u64 * RECORD_BYTES;
        let damaged = |what: &str| {
            let what = format!("the record at offset {offset} {what}");
            Err(distrusted(ErrorKind::Corrupt, path, &what))
        };
        let Ok(slot) = slot.try_into() else { continue };
        match read_slot(slot) {
            Slot::Empty | Slot::Writing => {}
            Slot::Damaged => return damaged("is damaged"),
            Slot::Whole(record) => {
                if record.sequence % capacity != index as u64
                    || record.sequence >= tail + capacity
                    || record.first_block + record.block_count > blocks
                {
                    return damaged("does not belong there");
                }
                if record.sequence >= tail {
                    head = head.max(record.sequence + 1);
                    records.push(record);
                }
            }
        }
    }
    records.sort_unstable_by_key(|record| record.sequence);
    Ok(Scan { records, head })
}

/// Reads every slot of a journal whose tracker may be at work: once more if it has reused slots
/// meanwhile.
pub(super) fn scan_live(path: &Path, words: &SharedWords) -> Result<(Superblock, Scan)> {
    for _ in 0..LOOKS_MAX {
        let (superblock, _) = read_superblock(path, words, None)?;
        let scan = scan(path, words, &superblock);
        let (again, _) = read_superblock(path, words, None)?;
        if again.ring_tail.get() == superblock.ring_tail.get() {
            return Ok((superblock, scan?));
        }
    }
    Err(Error::new(
        ErrorKind::State,
        format!(
            "Journal {} changes faster than it can be read",
            path.display()
        ),
    ))
}

fn recover(
    path: &Path,
    file: Flock<File>,
    options: &JournalOptions,
    boot: [u8; 16],
) -> Result<(Journal, RecoveryReport)> {
    let (words, mut superblock, copy) = map_checked(path, &file, true, Some(boot))?;
    check_disk(path, &superblock, options)?;
    let mut state = EpochState::of(&superblock);
    if !state.is_consistent() {
        let what = "the watermarks of its epochs contradict each other";
        return Err(distrusted(ErrorKind::Corrupt, path, what));
    }
    let clean = superblock.flags.get() & super::format::FLAG_CLEAN != 0;
    let same_boot = superblock.boot_id == boot;
    let mut report = RecoveryReport {
        path: path.to_owned(),
        found: Found::Clean,
        records: 0,
        holes: 0,
        grown_from_bytes: None,
        suspicion: None,
    };
    let mut holes = Vec::new();
    let mut head = superblock.ring_tail.get();
    if clean || same_boot {
        report.found = if clean { Found::Clean } else { Found::Killed };
        let scan = scan(path, &words, &superblock)?;
        head = scan.head;
        report.records = scan.records.len() as u64;
        let known = Known::of(&superblock, &scan, read_alarm(path, &words)?);
        state.open = state.open.max(known.newest);
        holes = known.holes;
        report.suspicion = judge(Witness::of(&words).read(), clean, options.seen);
        if report.suspicion.is_some() {
            state.distrust();
        }
    } else {
        report.found = Found::Rebooted;
        head = distrust_everything(path, &file, &words, &mut superblock, head)?;
        state.distrust();
    }
    report.holes = holes.len() as u64;
    state.store(&mut superblock);
    superblock.flags = 0.into();
    superblock.boot_id = boot;
    superblock.openings = (superblock.openings.get() + 1).into();
    remove_excess(path, &file, &superblock)?;
    let journal = Journal::new(path.to_owned(), file, words, superblock, copy, head);
    fill_holes(&journal, holes);
    reached(Place::RecoverAfterHolesBeforePublish);
    // Both copies are replaced before the first write, so that no power cut brings back one that
    // says that the journal was closed cleanly.
    journal.update(|_| {})?;
    reached(Place::RecoverAfterFirstPublishBeforeSecond);
    journal.update(|_| {})?;
    let known_bytes = superblock.disk_size_bytes.get();
    if known_bytes < options.disk_size_bytes {
        reached(Place::RecoverAfterSecondPublishBeforeGrow);
        journal.grow(options.disk_size_bytes, journal.watermarks().open)?;
        report.grown_from_bytes = Some(known_bytes);
    }
    if let Some(seen) = options.seen {
        journal.keep_time(seen);
    }
    Ok((journal, report))
}

/// What ring, alarm and checkpoint sets tell beyond the superblock.
struct Known {
    /// The newest epoch that any of them names. A cut that was under way had opened an epoch that no
    /// superblock tells of.
    newest: Epoch,
    /// Sequences of slots that were claimed and not written.
    holes: Vec<u64>,
}

impl Known {
    fn of(superblock: &Superblock, scan: &Scan, alarms: Vec<Epoch>) -> Self {
        let mut holes = Vec::new();
        let mut expected = superblock.ring_tail.get();
        for record in &scan.records {
            holes.extend(expected..record.sequence);
            expected = record.sequence + 1;
        }
        let recorded = scan.records.iter().map(|record| record.epoch);
        let folded = superblock.sets.map(|set| Epoch(set.highest_epoch.get()));
        let newest = recorded.chain(alarms).chain(folded).max();
        Self {
            newest: newest.unwrap_or_default(),
            holes,
        }
    }
}

/// Cuts off what a growth that did not come to its end has put behind the checkpoint sets.
fn remove_excess(path: &Path, file: &File, superblock: &Superblock) -> Result<()> {
    let failed = |error| {
        let path = path.display();
        Error::io(format!("Cannot set the length of journal {path}"), error)
    };
    if file.metadata().map_err(failed)?.len() > superblock.file_bytes() {
        file.set_len(superblock.file_bytes()).map_err(failed)?;
    }
    Ok(())
}

/// Slots that were claimed and not written tell of writes that were never submitted.
fn fill_holes(journal: &Journal, holes: Vec<u64>) {
    for sequence in holes {
        journal.fill(Record {
            sequence,
            epoch: Epoch::ZERO,
            operation: Operation::Null,
            first_block: 0,
            block_count: 0,
        });
    }
}

/// The epochs as of which every block counts as changed.
pub(super) fn read_alarm(path: &Path, words: &SharedWords) -> Result<Vec<Epoch>> {
    Alarm::of(words)
        .epochs()
        .map_err(|offset| damaged_alarm(path, offset))
}

/// The latest epoch in which the alarm was raised.
pub(super) fn latest_alarm(path: &Path, words: &SharedWords) -> Result<Option<Epoch>> {
    Alarm::of(words)
        .latest()
        .map_err(|offset| damaged_alarm(path, offset))
}

fn damaged_alarm(path: &Path, offset: u64) -> Error {
    let what = format!("the alarm word at offset {offset} is damaged");
    distrusted(ErrorKind::Corrupt, path, &what)
}

fn check_disk(path: &Path, superblock: &Superblock, options: &JournalOptions) -> Result<()> {
    if superblock.disk_identity != options.disk_identity {
        let what = "it belongs to another disk (or the disk is a copy or was restored)";
        return Err(distrusted(ErrorKind::Mismatch, path, what));
    }
    let size = superblock.disk_size_bytes.get();
    if size > options.disk_size_bytes {
        let what = format!(
            "it is for {size} bytes, the disk has only {}",
            options.disk_size_bytes
        );
        return Err(distrusted(ErrorKind::Mismatch, path, &what));
    }
    check_trackable(options.disk_size_bytes)
}

/// After a power cut the ring and the checkpoints mean nothing: they are emptied.
fn distrust_everything(
    path: &Path,
    file: &File,
    words: &SharedWords,
    superblock: &mut Superblock,
    tail: u64,
) -> Result<u64> {
    use std::sync::atomic::Ordering;
    let head_words = superblock.head_bytes() as usize / 8;
    for word in &words.words()[ALARM_OFFSET as usize / 8..head_words] {
        word.store(0, Ordering::Relaxed);
    }
    reached(Place::DistrustAfterRingBeforeCheckpoint);
    for index in 0..2 {
        let generation = superblock.sets[index].generation.get();
        superblock.sets[index].generation = (generation + 1).into();
        superblock.sets[index].lowest_epoch = 0.into();
        superblock.sets[index].highest_epoch = 0.into();
        SetPlace::of(superblock, index)
            .punch(file)
            .map_err(|errno| {
                Error::io(
                    format!("Cannot empty the checkpoints of {}", path.display()),
                    errno,
                )
            })?;
    }
    reached(Place::DistrustAfterCheckpointBeforePublish);
    Ok(tail)
}
