//! The bytes of the intent log: transactions of one page, and what a log of them says. Pure.
//!
//! Overview: the log keeps a table of slots, each of which is empty or holds the number of an armed
//! region. A transaction holds a few slots that change and, as context, a rolling part of the others, so
//! that the last few transactions tell the whole table. Those that do are a chain: the table was empty
//! before the first of it.
//!
//! Tears: a transaction that a power cut tears apart, sector by sector, was never answered, so nothing
//! was written on the strength of it. Each sector carries a tag of its own by which it is told from a
//! page that was whole once and is damaged: that one may have been answered, and then the log does not
//! tell what was armed.

use xxhash_rust::xxh3::xxh3_64;
use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::journal::format::{COUNTER_MAX, PAGE_BYTES};

/// What a disk writes as a whole, at least.
pub const SECTOR_BYTES: usize = 512;
/// Bytes of a sector before its tag.
const SECTOR_DATA_BYTES: usize = SECTOR_BYTES - 4;
const SECTORS: usize = PAGE_BYTES / SECTOR_BYTES;
/// Bytes of a transaction without the tags.
const PAYLOAD_BYTES: usize = SECTORS * SECTOR_DATA_BYTES;

/// Slots that one transaction can change.
pub const UPDATES_MAX: usize = 128;
/// Slots that one transaction tells of besides.
pub const CONTEXT_MAX: usize = 748;
/// Stands in a slot that holds no region. The region of this number is never armed.
pub const NO_REGION: u32 = u32::MAX;

/// A slot and what it holds from this transaction on.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct Update {
    /// The slot.
    pub slot: U32,
    /// The region, or [`NO_REGION`].
    pub region: U32,
}

/// A transaction without the tags of its sectors.
#[derive(Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Transaction {
    /// xxh3-64 of all bytes of the transaction behind it.
    check: U64,
    /// Grows by one with every transaction; its page is this modulo the pages of the log.
    pub sequence: U64,
    /// Sequence of the first transaction of the chain.
    pub chain: U64,
    /// Slots of the table.
    pub slots: U32,
    /// The slot of the first number in `context`; behind the last slot comes the first.
    pub context_first: U32,
    /// Numbers in `updates`.
    pub update_count: U16,
    /// Numbers in `context`.
    pub context_count: U16,
    reserved: [u8; 12],
    /// Slots that change, in order.
    pub updates: [Update; UPDATES_MAX],
    /// What slots hold after the updates.
    pub context: [U32; CONTEXT_MAX],
}

const _: () = assert!(size_of::<Transaction>() == PAYLOAD_BYTES);
const _: () = assert!(std::mem::offset_of!(Transaction, updates) == 48);
const _: () = assert!(std::mem::offset_of!(Transaction, context) == 1072);

/// A log that does not tell which regions were armed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IntentDamaged {
    /// The page that is damaged, or says what cannot be.
    pub page: u64,
    /// A sequence that no transaction in the log can have reached.
    pub next: u64,
}

/// What a log says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Armed {
    /// Sequence that the next transaction gets.
    pub next: u64,
    /// The regions that were armed; some may stand there twice.
    pub regions: Vec<u32>,
}

/// Transactions that it takes to tell a table of so many slots.
pub fn rotation_of(slots: u32) -> u64 {
    u64::from(slots).div_ceil(CONTEXT_MAX as u64)
}

/// Tag of each sector of the transaction with this sequence. Sequences that follow each other on a page
/// differ by little, their tags in most bytes, so that no single damaged byte makes one of the other.
fn tag_of(sequence: u64) -> u32 {
    (xxh3_64(&sequence.to_le_bytes()) >> 32) as u32 | 1
}

impl Transaction {
    /// An empty one.
    pub fn new(sequence: u64, chain: u64, slots: u32) -> Self {
        let mut transaction = Self::new_zeroed();
        transaction.sequence = sequence.into();
        transaction.chain = chain.into();
        transaction.slots = slots.into();
        transaction
    }

    /// Sets the check and writes the transaction and its tags to a page of [`PAGE_BYTES`].
    pub fn seal(&mut self, page: &mut [u8]) {
        self.check = xxh3_64(&self.as_bytes()[8..]).into();
        let tag = tag_of(self.sequence.get()).to_le_bytes();
        let sectors = page.chunks_exact_mut(SECTOR_BYTES);
        for (sector, data) in sectors.zip(self.as_bytes().chunks_exact(SECTOR_DATA_BYTES)) {
            sector[..SECTOR_DATA_BYTES].copy_from_slice(data);
            sector[SECTOR_DATA_BYTES..].copy_from_slice(&tag);
        }
    }

    /// Reads and checks a page; `None` if it is no whole transaction.
    fn decode(page: &[u8]) -> Option<Self> {
        let mut payload = Vec::with_capacity(PAYLOAD_BYTES);
        for sector in page.chunks_exact(SECTOR_BYTES) {
            payload.extend_from_slice(&sector[..SECTOR_DATA_BYTES]);
        }
        let transaction = Self::read_from_bytes(&payload).ok()?;
        let tag = tag_of(transaction.sequence.get());
        let whole = transaction.check.get() == xxh3_64(&payload[8..])
            && tags(page).iter().all(|&found| found == tag);
        whole.then_some(transaction)
    }

    /// Whether its numbers are those that a log of so many pages can hold.
    fn is_sound(&self, pages: u64) -> bool {
        let slots = self.slots.get();
        let counts = [
            usize::from(self.update_count.get()) <= UPDATES_MAX,
            usize::from(self.context_count.get()) <= CONTEXT_MAX,
        ];
        counts == [true; 2]
            && (1..=self.sequence.get()).contains(&self.chain.get())
            && (1..=pages.saturating_sub(2)).contains(&rotation_of(slots))
            && self.context_first.get() < slots
            && u64::from(self.context_count.get()) <= u64::from(slots)
            && self
                .changes()
                .iter()
                .all(|update| update.slot.get() < slots)
    }

    fn changes(&self) -> &[Update] {
        let count = usize::from(self.update_count.get());
        self.updates.get(..count).unwrap_or_default()
    }

    fn apply(&self, table: &mut [u32]) {
        for update in self.changes() {
            table[update.slot.get() as usize] = update.region.get();
        }
        let count = usize::from(self.context_count.get());
        let mut slot = self.context_first.get() as usize;
        for region in &self.context[..count] {
            table[slot] = region.get();
            slot = (slot + 1) % table.len();
        }
    }
}

fn tags(page: &[u8]) -> Vec<u32> {
    page.chunks_exact(SECTOR_BYTES)
        .filter_map(|sector| sector.last_chunk())
        .map(|tag| u32::from_le_bytes(*tag))
        .collect()
}

/// Finds out from the pages of a log which regions were armed when the machine went down.
///
/// # Errors
///
/// A transaction that is needed is damaged, or may have been the last one.
pub fn reconstruct(log: &[u8]) -> Result<Armed, IntentDamaged> {
    let pages: Vec<&[u8]> = log.chunks_exact(PAGE_BYTES).collect();
    let count = pages.len() as u64;
    let page_of = |sequence: u64| sequence % count.max(1);
    let decoded: Vec<Option<Transaction>> =
        pages.iter().map(|page| Transaction::decode(page)).collect();
    let found = decoded
        .iter()
        .enumerate()
        .filter_map(|(page, transaction)| {
            let sequence = transaction.as_ref()?.sequence.get();
            (page_of(sequence) == page as u64 && sequence <= COUNTER_MAX).then_some(sequence)
        });
    let newest = found.max().unwrap_or(0);
    // Above one that was answered and is damaged now.
    let beyond = newest + count + 1;
    let at_fault = |sequence: u64| IntentDamaged {
        page: page_of(sequence),
        next: beyond,
    };
    let at = |sequence: u64| {
        let transaction = decoded
            .get(page_of(sequence) as usize)
            .and_then(Option::as_ref);
        transaction
            .filter(|transaction| {
                transaction.sequence.get() == sequence && transaction.is_sound(count)
            })
            .ok_or(at_fault(sequence))
    };
    let next = newest + 1;
    check_next(&pages, &decoded, next).map_err(|page| IntentDamaged { page, next: beyond })?;
    if newest == 0 {
        return Ok(Armed {
            next,
            regions: Vec::new(),
        });
    }
    let last = at(newest)?;
    let (chain, slots) = (last.chain.get(), last.slots.get());
    // Back to where the contexts tell of every slot, or the table was empty.
    let mut first = newest;
    let mut told = u64::from(last.context_count.get());
    while first > chain && told < u64::from(slots) {
        if newest - first + 1 >= count {
            return Err(at_fault(first));
        }
        first -= 1;
        told += u64::from(at(first)?.context_count.get());
    }
    let mut table = vec![NO_REGION; slots as usize];
    for sequence in first..=newest {
        let transaction = at(sequence)?;
        if transaction.chain.get() != chain || transaction.slots.get() != slots {
            return Err(at_fault(sequence));
        }
        transaction.apply(&mut table);
    }
    table.retain(|&region| region != NO_REGION);
    Ok(Armed {
        next,
        regions: table,
    })
}

/// The page that is written next may hold a transaction that was torn apart, or what it held before. It
/// may not hold one that was whole once; then its number is the error.
fn check_next(pages: &[&[u8]], decoded: &[Option<Transaction>], next: u64) -> Result<(), u64> {
    let count = pages.len() as u64;
    let page = next % count.max(1);
    let (Some(bytes), Some(None)) = (pages.get(page as usize), decoded.get(page as usize)) else {
        return Ok(());
    };
    let before = next.checked_sub(count).filter(|&sequence| sequence > 0);
    let (new, old) = (tag_of(next), before.map_or(0, tag_of));
    let tags = tags(bytes);
    let is_torn = tags.iter().all(|tag| [new, old].contains(tag)) && tags.contains(&old);
    if is_torn { Ok(()) } else { Err(page) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SLOTS: u32 = 1700;
    const PAGES: usize = 8;

    /// A log, and the tables after each of its transactions.
    struct Life {
        log: Vec<u8>,
        tables: Vec<Vec<u32>>,
        before_last: Vec<u8>,
    }

    /// Each number makes a transaction that puts regions into slots.
    fn live(changes: &[(u32, u16)], chain: u64) -> Life {
        let mut log = vec![0; PAGES * PAGE_BYTES];
        let mut before_last = log.clone();
        let mut table = vec![NO_REGION; SLOTS as usize];
        let mut tables = Vec::new();
        let mut context_first = 0;
        for (number, &(seed, count)) in changes.iter().enumerate() {
            let sequence = number as u64 + 1;
            if sequence == chain {
                table.fill(NO_REGION);
                context_first = 0;
            }
            let begun = if sequence < chain { 1 } else { chain };
            let mut transaction = Transaction::new(sequence, begun, SLOTS);
            for index in 0..count {
                let slot = (seed + u32::from(index) * 17) % SLOTS;
                table[slot as usize] = seed ^ u32::from(index);
                let region = table[slot as usize].into();
                transaction.updates[usize::from(index)] = Update {
                    slot: slot.into(),
                    region,
                };
            }
            transaction.update_count = count.into();
            transaction.context_first = context_first.into();
            transaction.context_count = (CONTEXT_MAX as u16).into();
            for entry in &mut transaction.context {
                *entry = table[context_first as usize].into();
                context_first = (context_first + 1) % SLOTS;
            }
            before_last.clone_from(&log);
            let page = sequence as usize % PAGES * PAGE_BYTES;
            transaction.seal(&mut log[page..page + PAGE_BYTES]);
            tables.push(table.clone());
        }
        Life {
            log,
            tables,
            before_last,
        }
    }

    fn sorted(mut regions: Vec<u32>) -> Vec<u32> {
        regions.retain(|&region| region != NO_REGION);
        regions.sort_unstable();
        regions
    }

    fn changes() -> impl Strategy<Value = Vec<(u32, u16)>> {
        prop::collection::vec((0..1_000_000u32, 0..=UPDATES_MAX as u16), 1..30)
    }

    proptest! {
        #[test]
        fn a_log_tells_the_table_whatever_was_torn_of_the_last_transaction(
            changes in changes(), chain in 1u64..30, new in any::<u8>(),
        ) {
            let life = live(&changes, chain);
            let count = changes.len();
            let armed = reconstruct(&life.log).unwrap();
            prop_assert_eq!(armed.next, count as u64 + 1);
            prop_assert_eq!(sorted(armed.regions), sorted(life.tables[count - 1].clone()));
            // Sector by sector.
            let mut torn = life.before_last.clone();
            let page = count % PAGES * PAGE_BYTES;
            for sector in (0..SECTORS).filter(|sector| new >> sector & 1 == 1) {
                let at = page + sector * SECTOR_BYTES;
                torn[at..at + SECTOR_BYTES].copy_from_slice(&life.log[at..at + SECTOR_BYTES]);
            }
            let armed = reconstruct(&torn).unwrap();
            let expected = match new {
                u8::MAX => life.tables[count - 1].clone(),
                _ => count.checked_sub(2).map_or(Vec::new(), |last| life.tables[last].clone()),
            };
            prop_assert_eq!(sorted(armed.regions), sorted(expected));
        }

        #[test]
        fn a_damaged_byte_shows_or_does_not_matter(
            changes in changes(), chain in 1u64..30, at in 0..PAGES * PAGE_BYTES, change in 1u8..,
        ) {
            let mut life = live(&changes, chain);
            life.log[at] ^= change;
            if let Ok(armed) = reconstruct(&life.log) {
                prop_assert_eq!(armed.next, changes.len() as u64 + 1);
                let table = life.tables[changes.len() - 1].clone();
                prop_assert_eq!(sorted(armed.regions), sorted(table));
            }
        }

        #[test]
        fn any_bytes_get_an_answer(mut life in changes().prop_map(|changes| live(&changes, 3).log),
            holes in prop::collection::vec((0..PAGES * PAGE_BYTES, any::<u8>()), 0..20)) {
            for (at, byte) in holes {
                life[at] = byte;
            }
            let _ = reconstruct(&life);
        }
    }

    #[test]
    fn a_log_that_was_never_written_says_that_nothing_was_armed() {
        let nothing = Armed {
            next: 1,
            regions: Vec::new(),
        };
        assert_eq!(reconstruct(&vec![0; PAGES * PAGE_BYTES]), Ok(nothing));
    }

    #[test]
    fn the_last_transaction_is_missed() {
        let changes: Vec<(u32, u16)> = (0..20).map(|number| (number * 31, 40)).collect();
        let mut life = live(&changes, 1);
        let page = 20 % PAGES * PAGE_BYTES;
        life.log[page + 700] ^= 4;
        let damaged = reconstruct(&life.log).unwrap_err();
        assert_eq!(damaged.page, 20 % PAGES as u64);
        assert!(damaged.next > 20);
    }
}
