//! Opening a journal: making a new one, or finding out what an old one still says.
//!
//! Order: lock; superblocks; disk; alarm and overflow bits; every slot of the ring; intent log; times of
//! the disk. What is found is judged (`verdict`). Then holes are filled and suspect regions recorded; all
//! is synced; the intent log begins a new chain; superblocks are published as opened by this boot. Growth
//! and new times come last. A new file is complete and synced before it gets its name.
//!
//! Crash consistency: while the superblocks are of the old boot, whatever was done is done again: records
//! of suspect regions only add. The old chain of the intent log ends when they are durable, and before
//! the first write.
//!
//! Whether somebody else wrote to the disk is told by its times, see `witness`. New times are kept only
//! after a superblock says that every block counts as changed, so that a kill in between loses nothing.

use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use nix::fcntl::Flock;
use uuid::Uuid;

use super::checkpoint::SetPlace;
use super::core::Core;
use super::create::{check_trackable, create, sync_folder};
use super::evidence::{Evidence, Known};
use super::format::{ALARM_OFFSET, FLAG_DISK_FAILED, INTENT_OFFSET, Operation, Record, Superblock};
use super::head::{Head, map_checked};
use super::intent::{IntentLog, IntentPlace, Regions, extent_of};
use super::report::{Found, RecoveryReport};
use super::state::EpochState;
use super::verdict::{Findings, Intents, Verdict, Why, verdict};
use super::witness::Moment;
use super::writer::{Journal, distrusted};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::{Epoch, Extent, blocks_of, coalesce};
use crate::failpoint::{self, Canary, Place, reached};
use crate::lock::lock_exclusive;

/// What a journal is opened for.
#[derive(Clone, Debug)]
pub struct JournalOptions {
    /// Identity of the disk.
    pub disk_identity: [u8; 16],
    /// Size of the disk in bytes.
    pub disk_size_bytes: u64,
    /// Size of a new ring in bytes.
    pub ring_bytes: u64,
    /// Regions of 1 MiB that can be armed at once, as far as the file has room: so much has to be compared
    /// after a power cut.
    pub intent_regions: u32,
    /// Set an existing journal aside.
    pub rebuild: bool,
    /// The disk's times; `None` where they mean nothing.
    pub seen: Option<Moment>,
}

/// A number for this boot of the machine.
///
/// # Errors
///
/// `/proc` is not there.
pub fn boot_id() -> Result<[u8; 16]> {
    if let Some(id) = failpoint::simulated_boot() {
        return Ok(id);
    }
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

fn recover(
    path: &Path,
    file: Flock<File>,
    options: &JournalOptions,
    boot: [u8; 16],
) -> Result<(Journal, RecoveryReport)> {
    let Head {
        words,
        mut superblock,
        copy,
        damaged_copy,
    } = map_checked(path, &file, true, Some(boot))?;
    check_disk(path, &superblock, options)?;
    let mut state = EpochState::of(&superblock);
    if !state.is_consistent() {
        let what = "the watermarks of its epochs contradict each other";
        return Err(distrusted(ErrorKind::Corrupt, path, what));
    }
    let mut evidence = Evidence::gather(path, &words, &superblock, options, boot);
    evidence.findings.copy_damaged = damaged_copy;
    let judgement = match evidence.doubt {
        true => Verdict::Distrust(Why::JournalFailed),
        false => verdict(&evidence.findings),
    };
    let known = believe(judgement, &mut evidence, path, &superblock, &mut state)?;
    let suspects = match judgement {
        Verdict::Suspect => evidence.armed_regions(),
        _ => Vec::new(),
    };
    let report = RecoveryReport {
        path: path.to_owned(),
        found: evidence.found(judgement),
        records: known.records,
        holes: known.holes.len() as u64,
        suspect_regions: suspects.len() as u64,
        grown_from_bytes: None,
        suspicion: evidence.suspicion,
    };
    state.store(&mut superblock);
    superblock.upgrade();
    remove_excess(path, &file, &superblock)?;
    let core = Core::new(file, words, &superblock, known.head);
    let journal = assemble(path, core, (superblock, copy), &evidence, options)?;
    if let Verdict::Distrust(_) = judgement {
        forget_everything(&journal)?;
    }
    fill_holes(&journal, known.holes);
    reached(Place::RecoverAfterHolesBeforeSuspects);
    record_suspects(&journal, &suspects)?;
    settle(&journal, &evidence.findings, boot)?;
    let report = follow_disk(&journal, options, report)?;
    Ok((journal, report))
}

/// What is known beyond the superblock, as far as it is believed. Brings the watermarks to what follows.
fn believe(
    judgement: Verdict,
    evidence: &mut Evidence,
    path: &Path,
    superblock: &Superblock,
    state: &mut EpochState,
) -> Result<Known> {
    // A superblock may be an older one, and somebody may know of a later epoch.
    state.open = state.open.max(evidence.newest(superblock));
    match judgement {
        Verdict::Refuse => return Err(evidence.refusal(path)),
        Verdict::Trust => {}
        Verdict::TrustAllButBlocks => state.distrust(),
        // It may have been captured without blocks that are suspect now.
        Verdict::Suspect => state.closed = None,
        Verdict::Distrust(_) => {
            state.distrust();
            return Ok(Known::nothing(superblock.ring_tail.get()));
        }
    }
    evidence.known(path, superblock)
}

/// Where the disk has grown since, or somebody looks at its times: the journal goes along.
fn follow_disk(
    journal: &Journal,
    options: &JournalOptions,
    mut report: RecoveryReport,
) -> Result<RecoveryReport> {
    let known_bytes = journal.disk_size_bytes();
    if known_bytes < options.disk_size_bytes {
        reached(Place::RecoverAfterSecondPublishBeforeGrow);
        journal.grow(options.disk_size_bytes, journal.watermarks().open)?;
        report.grown_from_bytes = Some(known_bytes);
    }
    if let Some(seen) = options.seen {
        journal.keep_time(seen);
    }
    Ok(report)
}

/// Makes all that was recovered durable, and begins to write as this boot.
fn settle(journal: &Journal, findings: &Findings, boot: [u8; 16]) -> Result<()> {
    reached(Place::RecoverAfterSuspectsBeforeSync);
    if !failpoint::canary(Canary::ChainBeforeSuspectsDurable) {
        journal.sync_ring()?;
    }
    // A tracker that was killed may have renamed it without that: the old file must not come back.
    sync_folder(journal.path()).map_err(|error| {
        let path = journal.path().display();
        Error::io(format!("Cannot sync the folder of journal {path}"), error)
    })?;
    reached(Place::RecoverAfterSyncBeforeChain);
    journal.begin_intents(findings.intents != Intents::Whole)?;
    reached(Place::RecoverAfterChainBeforePublish);
    // Both copies are replaced before the first write, so that no power cut brings back one that
    // says that the journal was closed cleanly.
    journal.rewrite(|superblock| {
        // Of a disk that failed in this boot nobody knows what it keeps until the next one.
        let kept = match findings.same_boot {
            true => superblock.flags.get() & FLAG_DISK_FAILED,
            false => 0,
        };
        superblock.flags = kept.into();
        superblock.boot_id = boot;
        superblock.openings = (superblock.openings.get() + 1).into();
    })?;
    reached(Place::RecoverAfterFirstPublishBeforeSecond);
    journal.update(|_| {})
}

/// The journal over what was found. Regions that were armed stay so in memory until all that is recorded is
/// durable: should a sync fail before, they are what is suspect.
fn assemble(
    path: &Path,
    core: Core,
    (superblock, copy): (Superblock, usize),
    evidence: &Evidence,
    options: &JournalOptions,
) -> Result<Journal> {
    let place = IntentPlace::of(&superblock);
    let failed = |error| {
        let path = path.display();
        Error::io(format!("Cannot open the intent log of {path}"), error)
    };
    let next = evidence.next_transaction();
    let mut log = IntentLog::open(path, place, next, options.intent_regions).map_err(failed)?;
    let regions = Regions::new(superblock.disk_size_bytes.get())
        .map_err(|error| Error::io("Cannot reserve memory for the regions of the disk", error))?;
    log.adopt(&regions, &evidence.armed_regions());
    Ok(Journal::new(
        path.to_owned(),
        core,
        superblock,
        copy,
        log,
        regions,
    ))
}

/// Every block of a suspect region counts as changed in the open epoch.
fn record_suspects(journal: &Journal, regions: &[u32]) -> Result<()> {
    let open = journal.watermarks().open;
    let end = blocks_of(journal.disk_size_bytes());
    let mut extents: Vec<Extent> = regions.iter().map(|&region| extent_of(region)).collect();
    coalesce(&mut extents);
    for mut extent in extents {
        // The log may tell of regions that were armed ahead of the end.
        extent.block_count = extent
            .block_count
            .min(end.saturating_sub(extent.first_block));
        if extent.block_count > 0 {
            journal.record(open, extent, Operation::Write);
            // A small ring makes room meanwhile.
            journal.maintain()?;
        }
    }
    Ok(())
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

/// Where nothing that is recorded can be believed, it is emptied; but first a superblock says durably that
/// every block counts as changed, so that whoever finds it half emptied believes no more than that.
fn forget_everything(journal: &Journal) -> Result<()> {
    // The superblock that counts may be known to the page cache alone, and the next one takes the place
    // of the last that is durable.
    journal.sync_ring()?;
    journal.rewrite(|_| {})?;
    reached(Place::DistrustAfterPublishBeforeRing);
    let core = journal.core();
    let superblock = journal.superblock();
    let areas = [
        ALARM_OFFSET..INTENT_OFFSET,
        superblock.overflow_offset.get()..superblock.head_bytes(),
    ];
    for area in areas {
        let words = area.start as usize / 8..area.end as usize / 8;
        for word in core.words.words().get(words).unwrap_or_default() {
            word.store(0, Ordering::Relaxed);
        }
    }
    reached(Place::DistrustAfterRingBeforeSets);
    journal.rewrite(|superblock| {
        for set in &mut superblock.sets {
            set.generation = (set.generation.get() + 1).into();
            set.lowest_epoch = 0.into();
            set.highest_epoch = 0.into();
        }
    })?;
    for index in 0..2 {
        let place = SetPlace::of(&superblock, index);
        place.punch(&core.file).map_err(|errno| {
            let path = journal.path().display();
            Error::io(format!("Cannot empty the checkpoints of {path}"), errno)
        })?;
    }
    Ok(())
}
