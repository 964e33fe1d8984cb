//! `tracker journal verify` and `tracker journal dump`: a journal looked at from outside.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::atomic::Ordering;

use super::checkpoint::SetPlace;
use super::evidence::{read_alarm, read_intents, scan_live};
use super::format::{
    ALARM_OFFSET, ALARM_WORDS, DOUBT_WORD, FLAG_CLEAN, INTENT_OFFSET, PAGE_BYTES, PageState,
    RECORD_BYTES, Slot, Superblock, SuperblockFault, TIME_WORDS, Version, decode_alarm,
};
use super::head::{Head, decode_superblocks, map_checked};
use super::mapping::SharedWords;
use super::overflow::OverflowPlace;
use super::ring::read_slot;
use super::state::EpochState;
use super::witness::{Note, Witness};
use crate::error::{Error, Result};
use crate::extent::Epoch;

/// What `verify` found.
#[derive(Clone, Debug, Default)]
pub struct VerifyReport {
    /// One line for each thing that is wrong, with its offset.
    pub problems: Vec<String>,
}

fn open(path: &Path) -> Result<File> {
    File::open(path)
        .map_err(|error| Error::io(format!("Cannot open journal {}", path.display()), error))
}

/// Checks every structure of a journal.
///
/// # Errors
///
/// The file cannot be read at all. What is wrong inside it is in the report.
pub fn verify(path: &Path) -> Result<VerifyReport> {
    let file = open(path)?;
    let mut report = VerifyReport::default();
    let io = |error| Error::io(format!("Cannot read journal {}", path.display()), error);
    if file.metadata().map_err(io)?.len() < INTENT_OFFSET {
        report.problems.push(format!(
            "It is shorter than the {INTENT_OFFSET} bytes of its head"
        ));
        return Ok(report);
    }
    let head = SharedWords::readable(&file, INTENT_OFFSET).map_err(io)?;
    verify_superblocks(&head, &mut report);
    let Head {
        words, superblock, ..
    } = match map_checked(path, &file, false, None) {
        Ok(head) => head,
        Err(error) => {
            if report.problems.is_empty() {
                report.problems.push(error.to_string());
            }
            return Ok(report);
        }
    };
    if !EpochState::of(&superblock).is_consistent() {
        report
            .problems
            .push("The watermarks of its epochs contradict each other".to_owned());
    }
    verify_words(&words, &superblock, &mut report);
    if superblock.version.get() >= Version::Third as u32
        && let Err(damaged) = read_intents(&words, &superblock)
    {
        let offset = INTENT_OFFSET + damaged.page * PAGE_BYTES as u64;
        report.problems.push(format!(
            "The page at offset {offset} of the intent log is damaged"
        ));
    }
    verify_ring(path, &words, &superblock, &mut report);
    verify_checkpoints(&file, &superblock, &mut report).map_err(io)?;
    Ok(report)
}

fn verify_superblocks(head: &SharedWords, report: &mut VerifyReport) {
    for (copy, decoded) in decode_superblocks(head).into_iter().enumerate() {
        let offset = copy * PAGE_BYTES;
        match decoded {
            Ok(_) | Err(SuperblockFault::Torn) => {}
            Err(SuperblockFault::Damaged) => {
                report
                    .problems
                    .push(format!("The superblock at offset {offset} is damaged"));
            }
            Err(SuperblockFault::Future(version)) => {
                let line = format!("The superblock at offset {offset} is of version {version}");
                report.problems.push(line);
            }
        }
    }
}

/// The words that carry a check of their own: alarm, times, overflow bits. Others stay zero.
fn verify_words(words: &SharedWords, superblock: &Superblock, report: &mut VerifyReport) {
    let checked = (ALARM_WORDS + TIME_WORDS) as u64 * 8;
    let doubt = ALARM_OFFSET + DOUBT_WORD as u64 * 8;
    let overflow = superblock.overflow_offset.get();
    let areas = [
        (ALARM_OFFSET..ALARM_OFFSET + checked, true),
        (doubt + 8..INTENT_OFFSET, false),
        (overflow..overflow + superblock.overflow_bytes.get(), true),
    ];
    for (area, is_checked) in areas {
        for offset in area.step_by(8) {
            let Some(word) = words.words().get(offset as usize / 8) else {
                return;
            };
            let word = word.load(Ordering::Acquire);
            let whole = match is_checked {
                true => decode_alarm(word).is_ok(),
                false => word == 0,
            };
            if !whole {
                let line = format!("The word at offset {offset} is damaged");
                report.problems.push(line);
            }
        }
    }
}

fn verify_ring(
    path: &Path,
    words: &SharedWords,
    superblock: &Superblock,
    report: &mut VerifyReport,
) {
    let before = report.problems.len();
    let first_word = superblock.ring_offset.get() as usize / 8;
    let slots = words.words()[first_word..].chunks_exact(4);
    for (index, slot) in slots
        .take(superblock.ring_records.get() as usize)
        .enumerate()
    {
        if let Ok(slot) = slot.try_into()
            && read_slot(slot) == Slot::Damaged
        {
            let offset = superblock.ring_offset.get() + index as u64 * RECORD_BYTES;
            report
                .problems
                .push(format!("The record at offset {offset} is damaged"));
        }
    }
    if report.problems.len() == before
        && let Err(error) = scan_live(path, words)
    {
        report.problems.push(error.to_string());
    }
}

fn verify_checkpoints(
    file: &File,
    superblock: &Superblock,
    report: &mut VerifyReport,
) -> std::io::Result<()> {
    for index in 0..2 {
        let place = SetPlace::of(superblock, index);
        let generation = superblock.sets[index].generation.get();
        let mut page = 0;
        while let Some(found) = place.next_page(file, page)? {
            let (_, state) = place.read_page(file, found, generation)?;
            if state == PageState::Damaged {
                let line = format!("Page {found} of checkpoint set {index} is damaged");
                report.problems.push(line);
            }
            page = found + 1;
        }
    }
    Ok(())
}

/// Prints a journal: superblock, watermarks, checkpoint sets, and every live record.
///
/// # Errors
///
/// It cannot be read or trusted, or `out` cannot be written to.
pub fn dump(path: &Path, out: &mut dyn Write) -> Result<()> {
    let file = open(path)?;
    let Head { words, .. } = map_checked(path, &file, false, None)?;
    let (superblock, scan) = scan_live(path, &words)?;
    let alarms = read_alarm(path, &words)?;
    let printed = print(out, &superblock, &alarms, &scan.records)
        .and_then(|()| print_coarse(out, &words, &superblock))
        .and_then(|()| print_times(out, Witness::of(&words).read()));
    match printed {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Error::io("Cannot print the journal", error))
        }
        _ => Ok(()),
    }
}

fn print(
    out: &mut dyn Write,
    superblock: &Superblock,
    alarms: &[Epoch],
    records: &[super::format::Record],
) -> std::io::Result<()> {
    let state = EpochState::of(superblock);
    let clean = superblock.flags.get() & FLAG_CLEAN != 0;
    let shown = |epoch: Option<Epoch>| epoch.map_or("none".to_owned(), |epoch| epoch.to_string());
    let id = uuid::Uuid::from_bytes(superblock.journal_id).simple();
    writeln!(
        out,
        "journal {id}, superblock sequence {}",
        superblock.sequence.get()
    )?;
    writeln!(
        out,
        "disk of {} bytes, clean: {clean}",
        superblock.disk_size_bytes.get()
    )?;
    writeln!(
        out,
        "open {}, closed {}, sealed {}, committed {}, resync {}",
        state.open,
        shown(state.closed),
        state.sealed,
        state.committed,
        shown(state.resync)
    )?;
    for epoch in alarms {
        writeln!(out, "alarm: every block counts as of epoch {epoch}")?;
    }
    for (index, set) in superblock.sets.iter().enumerate() {
        writeln!(
            out,
            "checkpoint set {index}: generation {}, epochs {:016x} to {:016x}",
            set.generation.get(),
            set.lowest_epoch.get(),
            set.highest_epoch.get()
        )?;
    }
    writeln!(
        out,
        "ring of {} records, tail {}, {} live",
        superblock.ring_records.get(),
        superblock.ring_tail.get(),
        records.len()
    )?;
    for record in records {
        writeln!(
            out,
            "{} epoch {} {:?} block {} count {}",
            record.sequence, record.epoch, record.operation, record.first_block, record.block_count
        )?;
    }
    Ok(())
}

/// Prints what is known by the region or by coarser units.
fn print_coarse(
    out: &mut dyn Write,
    words: &SharedWords,
    superblock: &Superblock,
) -> std::io::Result<()> {
    match read_intents(words, superblock) {
        Ok(armed) => {
            writeln!(
                out,
                "intent log: transaction {}, {} regions armed",
                armed.next - 1,
                armed.regions.len()
            )?;
            for region in armed.regions {
                writeln!(out, "armed region {region}")?;
            }
        }
        Err(damaged) => writeln!(out, "intent log: page {} is damaged", damaged.page)?,
    }
    let mut result = Ok(());
    let bits = OverflowPlace::of(superblock).bits(words);
    bits.each_extent(Epoch::ZERO, Epoch(u64::MAX), |extent| {
        let line = writeln!(
            out,
            "overflow: block {} count {}",
            extent.first_block, extent.block_count
        );
        result = std::mem::replace(&mut result, Ok(())).and(line);
    });
    result
}

fn print_times(
    out: &mut dyn Write,
    kept: std::result::Result<Option<Note>, u64>,
) -> std::io::Result<()> {
    match kept {
        Ok(Some(Note { seen, stirred })) => {
            writeln!(
                out,
                "disk of {}, looked at {}, machine booted {}",
                seen.modified, seen.looked, seen.booted
            )?;
            match stirred {
                Some(time) => writeln!(out, "written since then, first at {time}"),
                None => Ok(()),
            }
        }
        Ok(None) => writeln!(out, "no time of the disk is kept"),
        Err(offset) => writeln!(
            out,
            "the word at offset {offset}, a time of the disk, is damaged"
        ),
    }
}
