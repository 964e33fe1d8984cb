//! What the parts of a journal say, each for itself: ring, alarm, overflow bits, intent log, times.

use std::path::Path;

use super::alarm::{Alarm, is_doubtful};
use super::format::{
    FLAG_CLEAN, FLAG_DISK_FAILED, FLAG_REPLACED, INTENT_OFFSET, RECORD_BYTES, Record, Slot,
    Superblock, Version,
};
use super::head::read_superblock;
use super::intent::page;
use super::mapping::SharedWords;
use super::overflow::OverflowPlace;
use super::recovery::JournalOptions;
use super::report::Found;
use super::ring::read_slot;
use super::verdict::{Findings, Intents, Verdict};
use super::witness::{Ending, Suspicion, Witness, judge};
use super::writer::distrusted;
use crate::error::{Error, ErrorKind, Result};
use crate::extent::Epoch;

/// Looks at the ring until its tail stands still.
const LOOKS_MAX: usize = 1000;

/// What a scan of all slots found.
pub(super) struct Scan {
    pub records: Vec<Record>,
    pub head: u64,
}

/// Reads every slot. Any damaged one is an error: it may have been live.
pub(super) fn scan(path: &Path, words: &SharedWords, superblock: &Superblock) -> Result<Scan> {
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
        let (superblock, ..) = read_superblock(path, words, None)?;
        let scan = scan(path, words, &superblock);
        let (again, ..) = read_superblock(path, words, None)?;
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

/// What the parts of a journal say, each for itself.
pub(super) struct Evidence {
    pub findings: Findings,
    ring: Result<Scan>,
    alarms: Result<Vec<Epoch>>,
    intents: std::result::Result<page::Armed, page::IntentDamaged>,
    pub suspicion: Option<Suspicion>,
    /// A sync of the journal failed.
    pub doubt: bool,
}

impl Evidence {
    /// Reads them all.
    pub fn gather(
        path: &Path,
        words: &SharedWords,
        superblock: &Superblock,
        options: &JournalOptions,
        boot: [u8; 16],
    ) -> Self {
        let clean = superblock.flags.get() & FLAG_CLEAN != 0;
        let same_boot = superblock.boot_id == boot;
        let ending = match (clean, same_boot) {
            (true, _) => Ending::Closed,
            (false, true) => Ending::Killed,
            (false, false) => Ending::PowerCut,
        };
        let disk_failed = superblock.flags.get() & FLAG_DISK_FAILED != 0;
        // Within the boot the page cache still has what was written.
        let lost = (disk_failed && clean && !same_boot).then_some(Suspicion::SyncFailed);
        let suspicion = lost.or(judge(Witness::of(words).read(), ending, options.seen));
        let ring = scan(path, words, superblock);
        let alarms = read_alarm(path, words).and_then(|mut epochs| {
            epochs.extend(read_overflow(path, words, superblock)?);
            Ok(epochs)
        });
        let intents = read_intents(words, superblock);
        let findings = Findings {
            clean,
            same_boot,
            copy_damaged: false,
            ring_damaged: ring.is_err(),
            alarm_damaged: alarms.is_err(),
            intents: match (&intents, superblock.version.get() < Version::Third as u32) {
                (_, true) => Intents::Missing,
                (Ok(_), false) => Intents::Whole,
                (Err(_), false) => Intents::Damaged,
            },
            written_by_others: suspicion.is_some(),
            disk_failed,
        };
        Self {
            findings,
            ring,
            alarms,
            intents,
            suspicion,
            // A power cut may bring back a file in whose place there was another.
            doubt: superblock.flags.get() & FLAG_REPLACED != 0 || is_doubtful(words),
        }
    }

    /// What was found, for the log.
    pub fn found(&self, judgement: Verdict) -> Found {
        match judgement {
            Verdict::Distrust(why) => Found::Lost(why),
            _ if self.findings.clean => Found::Clean,
            _ if self.findings.same_boot => Found::Killed,
            _ => Found::PowerCut,
        }
    }

    /// Why the journal is refused.
    pub fn refusal(&mut self, path: &Path) -> Error {
        let ring = std::mem::replace(&mut self.ring, read_twice(path));
        let alarms = std::mem::replace(&mut self.alarms, read_twice(path));
        let damaged = ring.err().or(alarms.err());
        damaged.unwrap_or_else(|| distrusted(ErrorKind::Corrupt, path, "a superblock is damaged"))
    }

    /// What ring, alarm and sets tell beyond the superblock. Once.
    ///
    /// # Errors
    ///
    /// One of them is damaged.
    pub fn known(&mut self, path: &Path, superblock: &Superblock) -> Result<Known> {
        let scan = std::mem::replace(&mut self.ring, read_twice(path))?;
        std::mem::replace(&mut self.alarms, Ok(Vec::new()))?;
        Ok(Known::of(superblock, &scan))
    }

    /// The newest epoch that any part names which is whole, be the others what they may. A cut that was under
    /// way had opened an epoch that no superblock tells of.
    pub fn newest(&self, superblock: &Superblock) -> Epoch {
        let records = self.ring.iter().flat_map(|scan| &scan.records);
        let recorded = records.map(|record| record.epoch);
        let alarms = self.alarms.iter().flatten().copied();
        let folded = superblock.sets.map(|set| Epoch(set.highest_epoch.get()));
        let newest = recorded.chain(alarms).chain(folded).max();
        newest.unwrap_or_default()
    }

    /// The regions that were armed.
    pub fn armed_regions(&self) -> Vec<u32> {
        let armed = self.intents.as_ref();
        let mut regions = armed.map_or(Vec::new(), |armed| armed.regions.clone());
        regions.sort_unstable();
        regions.dedup();
        regions
    }

    /// Sequence of the next transaction of the intent log. After a log that is damaged, one that no page
    /// can have reached.
    pub fn next_transaction(&self) -> u64 {
        match &self.intents {
            Ok(armed) => armed.next,
            Err(damaged) => damaged.next,
        }
    }
}

/// Stands where what was read has been taken.
fn read_twice<T>(path: &Path) -> Result<T> {
    Err(distrusted(ErrorKind::Corrupt, path, "it was read twice"))
}

/// What the intent log says.
pub(super) fn read_intents(
    words: &SharedWords,
    superblock: &Superblock,
) -> std::result::Result<page::Armed, page::IntentDamaged> {
    let mut log = vec![0; superblock.intent_bytes.get() as usize];
    // The head was mapped as far as the superblock lays it out.
    let _mapped = words.copy_out(INTENT_OFFSET, &mut log);
    page::reconstruct(&log)
}

/// What ring, alarm and checkpoint sets tell beyond the superblock.
pub(super) struct Known {
    /// Sequences of slots that were claimed and not written.
    pub holes: Vec<u64>,
    /// Sequence that the next record gets.
    pub head: u64,
    /// Live records.
    pub records: u64,
}

impl Known {
    /// Nothing, of a ring whose next record gets this sequence.
    pub fn nothing(head: u64) -> Self {
        Self {
            holes: Vec::new(),
            head,
            records: 0,
        }
    }

    fn of(superblock: &Superblock, scan: &Scan) -> Self {
        let mut holes = Vec::new();
        let mut expected = superblock.ring_tail.get();
        for record in &scan.records {
            holes.extend(expected..record.sequence);
            expected = record.sequence + 1;
        }
        Self {
            holes,
            head: scan.head,
            records: scan.records.len() as u64,
        }
    }
}

/// The epochs as of which every block counts as changed.
pub(super) fn read_alarm(path: &Path, words: &SharedWords) -> Result<Vec<Epoch>> {
    Alarm::of(words)
        .epochs()
        .map_err(|offset| damaged_alarm(path, offset))
}

/// The epochs of the overflow bits.
pub(super) fn read_overflow(
    path: &Path,
    words: &SharedWords,
    superblock: &Superblock,
) -> Result<Vec<Epoch>> {
    OverflowPlace::of(superblock)
        .bits(words)
        .epochs()
        .map_err(|offset| {
            let what = format!("the overflow word at offset {offset} is damaged");
            distrusted(ErrorKind::Corrupt, path, &what)
        })
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
