//! Recovery against its table: every combination of what can be found, first as pure values, then as files.

use std::path::Path;

use super::format::{
    ALARM_OFFSET, CHECKPOINT_PAGE_BLOCKS, FLAG_CLEAN, INTENT_OFFSET, MAGIC_WRITING, PAGE_BYTES,
    RECORD_BYTES, Record, Slot, Superblock, Time,
};
use super::intent::extent_of;
use super::intent::page::{SECTOR_BYTES, Transaction};
use super::specimen::{
    Account, BOOT, Blocks, LARGER_BYTES, LAST_BOOT, Model, NEXT_BOOT, SEEN, SIZE_BYTES, Specimen,
    blocks_of_regions, closed, folder, left_open, newest_copy, of_second_version, options,
    superblock,
};
use super::state::EpochState;
use super::verdict::{Findings, Intents, Verdict, Why, verdict};
use super::{Found, JournalOptions, Moment, RecoveryReport, Suspicion, open, verify};
use crate::error::ErrorKind;
use crate::extent::{Epoch, Extent};
use crate::failpoint::set_boot;

/// The table of `verdict` once more. Columns: closed (y, n); same boot or other (s, o); superblocks, ring,
/// alarm each whole or damaged (w, d); intent log (w, d, or missing: m); disk as it was or written by others
/// (a, o); a sync of it failed (y, n). A dot is any of them.
const TABLE: [(&str, Verdict); 17] = [
    (". s d . . . . .", Verdict::Refuse),
    (". s w d . . . .", Verdict::Refuse),
    (". s w w d . . .", Verdict::Refuse),
    (". s w w w . a .", Verdict::Trust),
    (". s w w w . o .", Verdict::TrustAllButBlocks),
    ("y o . d . . . .", Verdict::Refuse),
    ("y o . w d . . .", Verdict::Refuse),
    ("y o . w w . a .", Verdict::Trust),
    ("y o . w w . o .", Verdict::TrustAllButBlocks),
    ("n o w w w w a n", Verdict::Suspect),
    ("n o . . . m . .", Verdict::Distrust(Why::NoIntentLog)),
    ("n o d . . wd . .", Verdict::Distrust(Why::Superblock)),
    ("n o w d . wd . .", Verdict::Distrust(Why::Ring)),
    ("n o w w d wd . .", Verdict::Distrust(Why::Alarm)),
    ("n o w w w d . .", Verdict::Distrust(Why::IntentLog)),
    ("n o w w w w o .", Verdict::Distrust(Why::Disk)),
    ("n o w w w w a y", Verdict::Distrust(Why::DiskFailed)),
];

const INTENTS: [(char, Intents); 3] = [
    ('w', Intents::Whole),
    ('d', Intents::Damaged),
    ('m', Intents::Missing),
];

/// Findings in the letters of the table.
fn letters(findings: &Findings) -> [char; 8] {
    let choose = |is: bool, yes, no| if is { yes } else { no };
    let intents = INTENTS
        .iter()
        .find(|(_, intents)| *intents == findings.intents);
    [
        choose(findings.clean, 'y', 'n'),
        choose(findings.same_boot, 's', 'o'),
        choose(findings.copy_damaged, 'd', 'w'),
        choose(findings.ring_damaged, 'd', 'w'),
        choose(findings.alarm_damaged, 'd', 'w'),
        intents.unwrap().0,
        choose(findings.written_by_others, 'o', 'a'),
        choose(findings.disk_failed, 'y', 'n'),
    ]
}

fn all_findings() -> Vec<Findings> {
    let mut all = Vec::new();
    for bits in 0..1 << 7 {
        let bit = |number: u32| bits >> number & 1 == 1;
        for (_, intents) in INTENTS {
            all.push(Findings {
                clean: bit(0),
                same_boot: bit(1),
                copy_damaged: bit(2),
                ring_damaged: bit(3),
                alarm_damaged: bit(4),
                intents,
                written_by_others: bit(5),
                disk_failed: bit(6),
            });
        }
    }
    all
}

/// The one row of the table that tells of these findings.
fn judged(findings: &Findings) -> Verdict {
    let letters = letters(findings);
    let rows: Vec<Verdict> = TABLE
        .iter()
        .filter(|(row, _)| {
            let columns = row.split(' ').zip(&letters);
            columns
                .into_iter()
                .all(|(column, letter)| column == "." || column.contains(*letter))
        })
        .map(|(_, verdict)| *verdict)
        .collect();
    let [row] = rows[..] else {
        panic!("{letters:?} has the rows {rows:?}");
    };
    row
}

#[test]
fn every_combination_has_one_row_and_gets_its_verdict() {
    let all = all_findings();
    assert_eq!(all.len(), 384);
    let mut seen = std::collections::BTreeSet::new();
    for findings in &all {
        let expected = judged(findings);
        assert_eq!(verdict(findings), expected, "{findings:?}");
        seen.insert(format!("{expected:?}"));
    }
    // No row is there for nothing.
    assert_eq!(seen.len(), 11);
}

/// How much is believed.
fn belief(verdict: Verdict) -> u32 {
    match verdict {
        Verdict::Refuse | Verdict::Distrust(_) => 0,
        Verdict::TrustAllButBlocks => 1,
        Verdict::Suspect => 2,
        Verdict::Trust => 3,
    }
}

#[test]
fn more_damage_never_leads_to_more_belief() {
    for findings in all_findings() {
        let mut worse = [findings; 7];
        worse[0].copy_damaged = true;
        worse[1].ring_damaged = true;
        worse[2].alarm_damaged = true;
        worse[3].written_by_others = true;
        worse[4].disk_failed = true;
        worse[5].intents = match findings.intents {
            Intents::Whole => Intents::Damaged,
            worse => worse,
        };
        // A power cut leaves less than a kill, and a kill less than a clean stop.
        worse[6].clean = false;
        let before = verdict(&findings);
        for worse in worse {
            let after = verdict(&worse);
            assert!(belief(after) <= belief(before), "{findings:?}, {worse:?}");
            // An operator who has to decide is not passed over because there is more damage.
            let is_damage = worse.clean == findings.clean;
            let refused = before == Verdict::Refuse;
            assert!(
                !refused || !is_damage || after == Verdict::Refuse,
                "{worse:?}"
            );
        }
    }
}

/// What the document says is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Done {
    Truth,
    AllChanged,
    Suspects,
    Nothing,
    Refused,
    AsIfWhole,
}

/// Whether a cell of the document's table tells of findings.
fn cell_holds(column: usize, cell: &str, found: &Findings) -> bool {
    let whole_ring = !found.ring_damaged && !found.alarm_damaged;
    match (column, cell) {
        (_, "" | "any") => true,
        (0, "set") => found.clean,
        (0, "not set") => !found.clean,
        (0, "set, or this boot") => found.clean || found.same_boot,
        (1, "this") => found.same_boot,
        (1, "another") => !found.same_boot,
        (2, "both whole") => !found.copy_damaged,
        (2, "one damaged") => found.copy_damaged,
        (3, "whole") => whole_ring,
        (3, "damaged") => !whole_ring,
        (4, "whole") => found.intents == Intents::Whole,
        (5, "as it was") => !found.written_by_others,
        (5, "as it was, flag 4 not set") => !found.written_by_others && !found.disk_failed,
        (5, "written by somebody else") => found.written_by_others,
        other => panic!("The document says {other:?}"),
    }
}

/// Whether the last row of the document's table holds, whose cells are joined by "or".
fn some_cell_holds(cells: &[&str], found: &Findings) -> bool {
    assert_eq!(
        cells[2..6],
        [
            "one damaged, or",
            "damaged, or",
            "damaged or of version 1 or 2, or",
            "written by somebody else, or flag 4"
        ]
    );
    found.copy_damaged
        || found.ring_damaged
        || found.alarm_damaged
        || found.intents != Intents::Whole
        || found.written_by_others
        || found.disk_failed
}

/// The rows of the table in the document.
fn document() -> Vec<(Vec<&'static str>, Done)> {
    let text = include_str!("../../../docs/journal-format.md");
    let (_, rest) = text.split_once("\n## Recovery\n").unwrap();
    let rows = rest.lines().skip_while(|line| !line.starts_with('|'));
    let rows = rows.take_while(|line| line.starts_with('|')).skip(2);
    rows.map(|line| {
        let mut cells: Vec<&str> = line.split('|').skip(1).map(str::trim).collect();
        assert_eq!((cells.len(), cells.pop()), (8, Some("")), "{line}");
        let done = match cells.pop().unwrap() {
            "all is the truth" | "the same; holes are filled" => Done::Truth,
            "the same, but none stays closed and `resync` is the open epoch" => Done::AllChanged,
            "refused" => Done::Refused,
            "as if it were whole" => Done::AsIfWhole,
            text if text.contains("every block of an armed region") => Done::Suspects,
            text if text.contains("are emptied") => Done::Nothing,
            text => panic!("The document says {text:?}"),
        };
        (cells, done)
    })
    .collect()
}

fn documented(findings: &Findings) -> Done {
    let mut found: Vec<Done> = document()
        .iter()
        .filter(
            |(cells, _)| match cells.iter().any(|cell| cell.ends_with(", or")) {
                true => {
                    cell_holds(0, cells[0], findings)
                        && cell_holds(1, cells[1], findings)
                        && some_cell_holds(cells, findings)
                }
                false => (0..6).all(|column| cell_holds(column, cells[column], findings)),
            },
        )
        .map(|(_, done)| *done)
        .collect();
    found.dedup();
    match found[..] {
        [Done::AsIfWhole] => documented(&Findings {
            copy_damaged: false,
            ..*findings
        }),
        [done] => done,
        _ => panic!("{findings:?}: the document says {found:?}"),
    }
}

#[test]
fn the_document_says_the_same_of_every_combination() {
    for findings in all_findings() {
        let expected = match verdict(&findings) {
            Verdict::Refuse => Done::Refused,
            Verdict::Trust => Done::Truth,
            Verdict::TrustAllButBlocks => Done::AllChanged,
            Verdict::Suspect => Done::Suspects,
            Verdict::Distrust(_) => Done::Nothing,
        };
        assert_eq!(documented(&findings), expected, "{findings:?}");
    }
}

// On files.

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ending {
    Closed,
    /// Closed, and the machine was booted again.
    ClosedBefore,
    Killed,
    PowerCut,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Superblocks {
    Whole,
    FirstDamaged,
    SecondDamaged,
    /// The one that does not count was being rewritten.
    Torn,
    NoneWhole,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ring {
    Whole,
    LiveDamaged,
    StaleDamaged,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Alarms {
    Whole,
    AlarmDamaged,
    OverflowDamaged,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Log {
    Whole,
    NeededDamaged,
    LastTorn,
    Missing,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Disk {
    AsItWas,
    PutBack,
    WrittenLater,
    Another,
    Smaller,
    Larger,
}

#[derive(Clone, Copy, Debug)]
struct Case {
    ending: Ending,
    superblocks: Superblocks,
    ring: Ring,
    alarms: Alarms,
    log: Log,
    page_damaged: bool,
    disk: Disk,
}

fn cases(ending: Ending) -> Vec<Case> {
    let mut cases = Vec::new();
    let superblocks = [
        Superblocks::Whole,
        Superblocks::FirstDamaged,
        Superblocks::SecondDamaged,
        Superblocks::Torn,
        Superblocks::NoneWhole,
    ];
    let disks = [
        Disk::AsItWas,
        Disk::PutBack,
        Disk::WrittenLater,
        Disk::Another,
        Disk::Smaller,
        Disk::Larger,
    ];
    for superblocks in superblocks {
        for ring in [Ring::Whole, Ring::LiveDamaged, Ring::StaleDamaged] {
            for alarms in [Alarms::Whole, Alarms::AlarmDamaged, Alarms::OverflowDamaged] {
                for log in [Log::Whole, Log::NeededDamaged, Log::LastTorn, Log::Missing] {
                    for (page_damaged, disk) in
                        disks.iter().flat_map(|&disk| [(false, disk), (true, disk)])
                    {
                        cases.push(Case {
                            ending,
                            superblocks,
                            ring,
                            alarms,
                            log,
                            page_damaged,
                            disk,
                        });
                    }
                }
            }
        }
    }
    cases
}

/// Templates of one ending, with and without an intent log.
struct Templates {
    third: Specimen,
    second: Specimen,
}

impl Templates {
    fn of(ending: Ending) -> Self {
        let third = match ending {
            Ending::Closed | Ending::ClosedBefore => closed(),
            Ending::Killed | Ending::PowerCut => left_open(),
        };
        Self {
            third: third.clone(),
            second: of_second_version(third),
        }
    }

    fn choose(&self, log: Log) -> &Specimen {
        match log {
            Log::Missing => &self.second,
            _ => &self.third,
        }
    }
}

/// Offset of a slot of the ring that tells, or does not tell any more.
fn slot_of(bytes: &[u8], live: bool) -> usize {
    let superblock = superblock(bytes, newest_copy(bytes));
    let ring = superblock.ring_offset.get() as usize;
    let slots = bytes[ring..superblock.head_bytes() as usize].chunks_exact(RECORD_BYTES as usize);
    let index = slots.into_iter().position(|slot| {
        let (words, _) = slot.as_chunks::<8>();
        let words: [u64; 4] = std::array::from_fn(|index| u64::from_le_bytes(words[index]));
        matches!(Record::decode(words),
            Slot::Whole(record) if (record.sequence >= superblock.ring_tail.get()) == live)
    });
    ring + index.unwrap() * RECORD_BYTES as usize
}

/// The page of the intent log with this transaction, and the newest sequence in it.
fn newest_transaction(bytes: &[u8]) -> (u64, u64) {
    let superblock = superblock(bytes, newest_copy(bytes));
    let pages = superblock.intent_bytes.get() / PAGE_BYTES as u64;
    let newest = (0..pages)
        .filter_map(|page| {
            let offset = INTENT_OFFSET as usize + page as usize * PAGE_BYTES + 8;
            let sequence = u64::from_le_bytes(*bytes[offset..].first_chunk().unwrap());
            (sequence % pages == page).then_some(sequence)
        })
        .max();
    (newest.unwrap(), pages)
}

fn page_of(sequence: u64, pages: u64) -> usize {
    INTENT_OFFSET as usize + (sequence % pages) as usize * PAGE_BYTES
}

/// Tears the transaction that follows the newest: some of its sectors are there.
fn tear_next(bytes: &mut [u8]) {
    let (newest, pages) = newest_transaction(bytes);
    let mut page = vec![0; PAGE_BYTES];
    Transaction::new(newest + 1, newest, 1).seal(&mut page);
    let offset = page_of(newest + 1, pages);
    for sector in [0, 3, 7].map(|sector| sector * SECTOR_BYTES) {
        bytes[offset + sector..offset + sector + SECTOR_BYTES]
            .copy_from_slice(&page[sector..sector + SECTOR_BYTES]);
    }
}

/// A page of the first checkpoint set that is in use, and the set's place.
const DAMAGED_PAGE: u64 = 3;

impl Case {
    fn bytes(&self, templates: &Templates) -> Vec<u8> {
        let mut bytes = templates.choose(self.log).bytes.clone();
        let newest = newest_copy(&bytes);
        let layout = superblock(&bytes, newest);
        let mut flip = |offset: usize| bytes[offset] ^= 0x5a;
        if self.page_damaged {
            let page = layout.checkpoint_offset.get() as usize + DAMAGED_PAGE as usize * PAGE_BYTES;
            flip(page + 1000);
        }
        match self.alarms {
            Alarms::Whole => {}
            Alarms::AlarmDamaged => flip(ALARM_OFFSET as usize + 3),
            // The second version has none; its alarm stands for them.
            Alarms::OverflowDamaged if self.log == Log::Missing => flip(ALARM_OFFSET as usize + 9),
            Alarms::OverflowDamaged => flip(layout.overflow_offset.get() as usize + 1),
        }
        match self.ring {
            Ring::Whole => {}
            Ring::LiveDamaged => bytes[slot_of(&templates.choose(self.log).bytes, true) + 17] ^= 1,
            Ring::StaleDamaged => bytes[slot_of(&templates.choose(self.log).bytes, false) + 8] ^= 1,
        }
        match self.log {
            Log::Whole | Log::Missing => {}
            Log::NeededDamaged => {
                // The table is told by the last two.
                let (newest, pages) = newest_transaction(&bytes);
                bytes[page_of(newest - 1, pages) + 2000] ^= 4;
            }
            Log::LastTorn => tear_next(&mut bytes),
        }
        match self.superblocks {
            Superblocks::Whole => {}
            Superblocks::FirstDamaged => bytes[200] ^= 1,
            Superblocks::SecondDamaged => bytes[PAGE_BYTES + 200] ^= 1,
            Superblocks::Torn => {
                let other = (1 - newest) * PAGE_BYTES;
                bytes[other..other + 8].copy_from_slice(&MAGIC_WRITING);
            }
            Superblocks::NoneWhole => [0, PAGE_BYTES].iter().for_each(|at| bytes[at + 200] ^= 1),
        }
        bytes
    }

    fn options(&self) -> JournalOptions {
        let day = 86_400_000;
        let at = |modified: i64| {
            Some(Moment {
                modified: Time(modified),
                looked: Time(modified.max(SEEN.looked.0) + 10),
                ..SEEN
            })
        };
        let mut options = options();
        match self.disk {
            Disk::AsItWas => {}
            Disk::PutBack => options.seen = at(SEEN.modified.0 - day),
            Disk::WrittenLater => options.seen = at(SEEN.modified.0 + day),
            Disk::Another => options.disk_identity[3] ^= 1,
            Disk::Smaller => options.disk_size_bytes -= 512,
            Disk::Larger => options.disk_size_bytes = LARGER_BYTES,
        }
        options
    }

    /// The superblock that counts, if there is one.
    fn survivor(&self, templates: &Templates) -> Option<Superblock> {
        let bytes = &templates.choose(self.log).bytes;
        let copy = match self.superblocks {
            Superblocks::NoneWhole => return None,
            Superblocks::FirstDamaged => 1,
            Superblocks::SecondDamaged => 0,
            Superblocks::Whole | Superblocks::Torn => newest_copy(bytes),
        };
        Some(superblock(bytes, copy))
    }

    fn findings(&self, survivor: &Superblock) -> Findings {
        Findings {
            clean: survivor.flags.get() == FLAG_CLEAN,
            same_boot: matches!(self.ending, Ending::Closed | Ending::Killed),
            copy_damaged: matches!(
                self.superblocks,
                Superblocks::FirstDamaged | Superblocks::SecondDamaged
            ),
            ring_damaged: self.ring != Ring::Whole,
            alarm_damaged: self.alarms != Alarms::Whole,
            intents: match self.log {
                Log::Whole | Log::LastTorn => Intents::Whole,
                Log::NeededDamaged => Intents::Damaged,
                Log::Missing => Intents::Missing,
            },
            written_by_others: matches!(self.disk, Disk::PutBack | Disk::WrittenLater),
            disk_failed: false,
        }
    }

    /// The kind of error, or what is believed of the journal.
    fn expected(&self, templates: &Templates) -> Result<(Verdict, Superblock), ErrorKind> {
        let survivor = self.survivor(templates).ok_or(ErrorKind::Corrupt)?;
        let findings = self.findings(&survivor);
        if findings.same_boot && findings.copy_damaged {
            return Err(ErrorKind::Corrupt);
        }
        if matches!(self.disk, Disk::Another | Disk::Smaller) {
            return Err(ErrorKind::Mismatch);
        }
        match judged(&findings) {
            Verdict::Refuse => Err(ErrorKind::Corrupt),
            verdict => Ok((verdict, survivor)),
        }
    }
}

/// What is to be seen of a journal once it is open.
struct Opened<'a> {
    case: &'a Case,
    verdict: Verdict,
    old: &'a Superblock,
    model: &'a Model,
}

impl Opened<'_> {
    fn believed(&self) -> bool {
        !matches!(self.verdict, Verdict::Distrust(_))
    }

    fn state(&self) -> EpochState {
        let mut state = EpochState::of(self.old);
        let (ring, words) = (self.case.ring, self.case.alarms);
        // Records and overflow bits tell of epoch 4, each where it is whole.
        let bits = words == Alarms::Whole && self.case.log != Log::Missing;
        if ring == Ring::Whole || bits {
            state.open = Epoch(4);
        }
        match self.verdict {
            Verdict::Trust => {}
            Verdict::Suspect => state.closed = None,
            _ => (state.closed, state.resync) = (None, Some(state.open)),
        }
        // The alarm of an epoch that is not committed.
        state.resync = state.resync.max(self.believed().then_some(Epoch(2)));
        if self.alarm_of_growth() {
            state.resync = Some(Epoch(4));
        }
        state
    }

    /// Whether what is new of the disk finds no room in a full ring, and there are no overflow bits.
    fn alarm_of_growth(&self) -> bool {
        self.believed() && self.case.log == Log::Missing && self.case.disk == Disk::Larger
    }

    fn found(&self) -> Found {
        match (self.verdict, self.case.ending) {
            (Verdict::Distrust(why), _) => Found::Lost(why),
            (_, Ending::Closed | Ending::ClosedBefore) => Found::Clean,
            (_, Ending::Killed) => Found::Killed,
            (_, Ending::PowerCut) => Found::PowerCut,
        }
    }

    /// What is told of besides the records: of damaged pages, of armed regions, of a disk that has grown.
    fn beyond_records(&self) -> Blocks {
        let mut blocks = Blocks::default();
        if self.case.page_damaged && self.believed() {
            blocks.insert(Extent {
                first_block: DAMAGED_PAGE * CHECKPOINT_PAGE_BLOCKS,
                block_count: CHECKPOINT_PAGE_BLOCKS,
            });
        }
        if self.verdict == Verdict::Suspect {
            blocks.insert_all(&blocks_of_regions(&self.model.armed));
        }
        if self.case.disk == Disk::Larger && !self.alarm_of_growth() {
            blocks.insert(Extent::covering(SIZE_BYTES, LARGER_BYTES - SIZE_BYTES));
        }
        blocks
    }

    fn check_report(&self, report: &RecoveryReport) {
        let what = format!("{:?}: {report}", self.case);
        assert_eq!(report.found, self.found(), "{what}");
        let suspects = match self.verdict {
            Verdict::Suspect => self.model.armed.len() as u64,
            _ => 0,
        };
        assert_eq!(report.suspect_regions, suspects, "{what}");
        let grown = (self.case.disk == Disk::Larger).then_some(SIZE_BYTES);
        assert_eq!(report.grown_from_bytes, grown, "{what}");
        let suspicion = match (self.case.disk, report.suspicion) {
            (Disk::PutBack, Some(Suspicion::PutBack { .. }))
            | (Disk::WrittenLater, Some(Suspicion::Written { .. })) => true,
            (Disk::PutBack | Disk::WrittenLater, _) => false,
            (_, suspicion) => suspicion.is_none(),
        };
        assert!(suspicion, "{what}");
        let all = matches!(
            self.verdict,
            Verdict::Distrust(_) | Verdict::TrustAllButBlocks
        );
        let says = report.to_string();
        assert_eq!(says.contains("every block counts"), all, "{what}");
        assert!(says.contains("disk.hrl"), "{what}");
    }

    fn check_account(&self, account: &Account) {
        let what = format!("{:?}: {:?}", self.case, account.state);
        assert_eq!(account.state, self.state(), "{what}");
        let all = self.verdict == Verdict::TrustAllButBlocks
            || !self.believed()
            || self.alarm_of_growth();
        assert!(account.uncommitted.all && account.open.all == all, "{what}");
        assert!(account.closed.as_ref().is_none_or(|told| !told.all));
        let of_epochs = |after: u64, through: u64| match self.believed() {
            true => self.model.blocks(after, through),
            false => Blocks::default(),
        };
        let beyond = self.beyond_records();
        let mut least = of_epochs(1, u64::MAX);
        least.insert_all(&beyond);
        let told = &account.uncommitted.blocks;
        assert!(told.contains_all(&least), "{what}");
        let mut most = least.clone();
        if self.case.disk == Disk::Larger {
            // Where the ring is full, from the region on in which the old end lies.
            most.insert_all(&region_of_end());
        }
        assert!(most.contains_all(told), "{what}: more than there is");
        let mut open = of_epochs(account.state.open_after().0, u64::MAX);
        if self.verdict == Verdict::Suspect {
            open.insert_all(&blocks_of_regions(&self.model.armed));
        }
        assert!(account.open.blocks.contains_all(&open), "{what}");
        assert!(told.contains_all(&account.open.blocks), "{what}");
        if let Some(closed) = &account.closed {
            assert!(closed.blocks.contains_all(&of_epochs(2, 3)), "{what}");
        }
    }
}

/// The blocks of the region in which the disk ended.
fn region_of_end() -> Blocks {
    let mut blocks = Blocks::default();
    let region = ((SIZE_BYTES - 1) >> 20) as u32;
    blocks.insert(extent_of(region));
    blocks
}

/// Opens a journal in another boot, or once more in this one, and looks at what it tells.
fn reopen(path: &Path, options: &JournalOptions, boot: [u8; 16]) -> (RecoveryReport, Account) {
    set_boot(Some(boot));
    let (journal, report) = open(path, options).unwrap();
    assert!(journal.watermarks().is_consistent());
    drop(journal);
    (report, Account::of(path).unwrap())
}

/// Opened once more it tells the same, and after a power cut no less.
fn check_what_follows(case: &Case, path: &Path, boot: [u8; 16], first: &Account) {
    let options = case.options();
    let (report, second) = reopen(path, &options, boot);
    assert_eq!((report.found, report.suspicion), (Found::Killed, None));
    assert!(second == *first, "{case:?}: {:?}", second.state);
    let (report, third) = reopen(path, &options, LAST_BOOT);
    assert_eq!(report.found, Found::PowerCut, "{case:?}: {report}");
    assert_eq!(report.suspect_regions, 0);
    let state = EpochState {
        closed: None,
        ..first.state
    };
    assert_eq!(third.state, state, "{case:?}");
    let before = [
        Some(&first.uncommitted),
        Some(&first.open),
        first.closed.as_ref(),
    ];
    let after = [&third.uncommitted, &third.open, &third.open];
    for (before, after) in before.into_iter().zip(after) {
        assert!(before.is_none_or(|told| after.covers(told)), "{case:?}");
    }
}

/// Every combination of one ending. Returns how many were opened.
fn try_all(ending: Ending) -> usize {
    let (folder, templates) = (folder(), Templates::of(ending));
    let path = folder.path().join("disk.hrl");
    let boot = match ending {
        Ending::Closed | Ending::Killed => BOOT,
        Ending::ClosedBefore | Ending::PowerCut => NEXT_BOOT,
    };
    let mut count = 0;
    for case in cases(ending) {
        let bytes = case.bytes(&templates);
        std::fs::write(&path, &bytes).unwrap();
        set_boot(Some(boot));
        let expected = case.expected(&templates);
        match (expected, open(&path, &case.options())) {
            (Ok(expected), Ok((journal, report))) => {
                let (verdict, old) = &expected;
                let opened = Opened {
                    case: &case,
                    verdict: *verdict,
                    old,
                    model: &templates.choose(case.log).model,
                };
                opened.check_report(&report);
                drop(journal);
                let account = Account::of(&path).unwrap();
                opened.check_account(&account);
                let problems = verify(&path).unwrap().problems;
                let damaged = usize::from(case.page_damaged && opened.believed());
                assert_eq!(problems.len(), damaged, "{case:?}: {problems:?}");
                check_what_follows(&case, &path, boot, &account);
                count += 1;
            }
            (Err(kind), Err(error)) => {
                assert_eq!(error.kind(), kind, "{case:?}: {error}");
                let says = error.to_string();
                assert!(
                    says.contains("disk.hrl") && says.contains("--resync"),
                    "{says}"
                );
            }
            (Ok((verdict, _)), Err(error)) => panic!("{case:?}: {verdict:?}, {error}"),
            (Err(kind), Ok((_, report))) => panic!("{case:?}: {kind:?}, {report}"),
        }
    }
    set_boot(None);
    count
}

#[test]
fn every_combination_of_a_closed_journal_is_opened_as_the_table_says() {
    // With whole superblocks, ring and alarm, whatever else is damaged.
    assert_eq!(try_all(Ending::Closed), 2 * 4 * 2 * 4);
}

#[test]
fn every_combination_of_a_closed_journal_in_another_boot_is_opened_as_the_table_says() {
    // The same, and where the older superblock is damaged. Without the newer it was never closed.
    assert_eq!(
        try_all(Ending::ClosedBefore),
        3 * 4 * 2 * 4 + 3 * 3 * 4 * 2 * 4
    );
}

#[test]
fn every_combination_after_a_kill_is_opened_as_the_table_says() {
    assert_eq!(try_all(Ending::Killed), 2 * 4 * 2 * 4);
}

#[test]
fn every_combination_after_a_power_cut_is_opened_as_the_table_says() {
    // All but those of another or a smaller disk, or without a superblock.
    assert_eq!(try_all(Ending::PowerCut), 4 * 3 * 3 * 4 * 2 * 4);
}
