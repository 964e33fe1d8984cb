//! The intent log as its tracker writes it: the table of slots, and its transactions.
//!
//! Overview: one thread at a time arms regions. Each gets a slot that is free, or that of a region whose
//! records are all durable and that was not written lately; the hand of a clock looks for it.
//!
//! Order: the region that has to go is taken out of the set; the transaction is written; the new region is
//! in the set. A write to the old region that comes in between waits for a transaction of its own.
//!
//! Crash consistency: see `page`. What a transaction that failed says is not known: the log is not used
//! any more, and regions are armed again only in a journal that takes its place.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use super::page::{CONTEXT_MAX, NO_REGION, Transaction, UPDATES_MAX, Update, rotation_of};
use super::regions::{Era, Regions};
use crate::failpoint::{self, Place, reached};
use crate::journal::format::{PAGE_BYTES, Superblock};
use crate::journal::mapping::PageBuffer;

/// A region that was written in one of the last so many eras makes room only where nothing else can.
const RECENT_ERAS: u64 = 2;
/// Regions that lie together: the others of a group are armed with the first, where slots are free. They
/// cost nothing, since a transaction is a page, however much it says.
const GROUP_REGIONS: u32 = 64;

/// A region that gets a slot.
#[derive(Clone, Copy, Debug)]
struct Placed {
    slot: usize,
    region: u32,
    /// Somebody waits for it, or is about to.
    wanted: bool,
}

/// Where the log lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IntentPlace {
    /// Offset of its first page in the file.
    pub offset: u64,
    /// Its pages.
    pub pages: u64,
}

impl IntentPlace {
    /// The place that a superblock lays out.
    pub fn of(superblock: &Superblock) -> Self {
        Self {
            offset: superblock.intent_offset.get(),
            pages: superblock.intent_bytes.get() / PAGE_BYTES as u64,
        }
    }

    /// Most slots that a table in a log of this size can have: while it is told once, the transaction
    /// being written may be torn, and the one before it is still needed.
    pub fn slots_max(self) -> u32 {
        let rotation = self.pages.saturating_sub(2).min(1 << 20);
        (rotation * CONTEXT_MAX as u64) as u32
    }

    /// Pages that a log for a table of so many slots needs.
    pub fn pages_for(slots: u32) -> u64 {
        rotation_of(slots) + 2
    }
}

/// What an attempt to arm regions came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Arming {
    /// Some regions found no slot: none is free until more of the ring is durable.
    pub starved: bool,
}

/// The log of one journal.
#[derive(Debug)]
pub struct IntentLog {
    file: File,
    place: IntentPlace,
    page: PageBuffer,
    /// Sequence of the next transaction.
    next: u64,
    chain: u64,
    /// What each slot holds, or [`NO_REGION`].
    slots: Vec<u32>,
    /// Slots that a chain has. A log that was taken over may have had more.
    capacity: usize,
    /// Slots from here on were never used in this chain.
    unused: usize,
    hand: usize,
    context_next: usize,
    /// When a search for a region that can go was in vain: one not written lately, and any.
    in_vain: [Option<(Era, Era)>; 2],
    /// Transactions written.
    commits: u64,
    /// Regions that made room for others.
    evictions: u64,
    failed: bool,
}

/// Opens a file so that what is written is durable, past the page cache where the file system can.
fn open_durable(path: &Path) -> io::Result<File> {
    let open = |flags| {
        OpenOptions::new()
            .write(true)
            .custom_flags(flags)
            .open(path)
    };
    open(libc::O_DIRECT | libc::O_DSYNC).or_else(|error| match error.raw_os_error() {
        Some(libc::EINVAL) => open(libc::O_DSYNC),
        _ => Err(error),
    })
}

impl IntentLog {
    /// The log in the file at `path`, with a table of so many slots, as far as there is room. Nothing is
    /// armed until [`Self::begin_chain`] has said so.
    ///
    /// # Errors
    ///
    /// The file cannot be opened, or there is no memory.
    pub fn open(path: &Path, place: IntentPlace, next: u64, slots: u32) -> io::Result<Self> {
        let slots = slots.min(place.slots_max()).max(1);
        Ok(Self {
            file: open_durable(path)?,
            place,
            page: PageBuffer::new(PAGE_BYTES)?,
            next,
            chain: next,
            slots: vec![NO_REGION; slots as usize],
            capacity: slots as usize,
            unused: 0,
            hand: 0,
            context_next: 0,
            in_vain: [None; 2],
            commits: 0,
            evictions: 0,
            failed: false,
        })
    }

    /// Slots of the table.
    pub fn capacity(&self) -> u64 {
        self.capacity as u64
    }

    /// Slots in use.
    pub fn armed(&self) -> u64 {
        self.slots
            .iter()
            .filter(|&&region| region != NO_REGION)
            .count() as u64
    }

    /// Transactions written since the journal was opened.
    pub fn commits(&self) -> u64 {
        self.commits
    }

    /// Regions that made room for others since the journal was opened.
    pub fn evictions(&self) -> u64 {
        self.evictions
    }

    /// Whether a transaction failed.
    pub fn has_failed(&self) -> bool {
        self.failed
    }

    /// The regions in the table.
    pub fn regions(&self) -> impl Iterator<Item = u32> + '_ {
        self.slots
            .iter()
            .copied()
            .filter(|&region| region != NO_REGION)
    }

    /// Takes over what an earlier log says, so that it goes along if another file takes the place of this one.
    pub fn adopt(&mut self, regions: &Regions, armed: &[u32]) {
        let slots = armed
            .len()
            .clamp(self.slots.len(), self.place.slots_max() as usize);
        self.slots.resize(slots, NO_REGION);
        for (slot, &region) in self.slots.iter_mut().zip(armed) {
            *slot = region;
            regions.arm(region);
        }
        self.unused = armed.len().min(slots);
    }

    /// Empties the table in memory, all of whose records are durable.
    pub fn forget(&mut self, regions: &Regions) {
        for &region in self.slots.iter().filter(|&&region| region != NO_REGION) {
            regions.disarm(region, Era(u64::MAX));
        }
        self.slots.clear();
        self.slots.resize(self.capacity, NO_REGION);
        (self.unused, self.hand, self.context_next) = (0, 0, 0);
    }

    /// Begins a chain with an empty table: what was armed before is not any more.
    ///
    /// # Errors
    ///
    /// The transaction cannot be written.
    pub fn begin_chain(&mut self) -> io::Result<()> {
        self.chain = self.next;
        self.slots.clear();
        self.slots.resize(self.capacity, NO_REGION);
        (self.unused, self.hand, self.context_next) = (0, 0, 0);
        self.in_vain = [None; 2];
        self.commit(&[])
    }

    /// Begins a chain, and writes every page of the log, so that nothing is left of what was damaged.
    ///
    /// # Errors
    ///
    /// A transaction cannot be written.
    pub fn begin_everywhere(&mut self) -> io::Result<()> {
        self.begin_chain()?;
        (1..self.place.pages).try_for_each(|_| self.commit(&[]))
    }

    /// A log in another file that tells the same table.
    ///
    /// # Errors
    ///
    /// The file cannot be opened, or a transaction cannot be written.
    pub fn moved_to(&self, path: &Path, place: IntentPlace) -> io::Result<Self> {
        let mut moved = Self::open(path, place, 1, self.slots.len() as u32)?;
        moved.slots.clone_from(&self.slots);
        moved.capacity = self.capacity;
        moved.unused = self.unused;
        moved.hand = self.hand;
        moved.commits = self.commits;
        moved.evictions = self.evictions;
        for _ in 0..rotation_of(self.slots.len() as u32) {
            moved.commit(&[])?;
        }
        Ok(moved)
    }

    /// Takes all regions out of the set if the records of all are durable, which ends the check after a
    /// power cut for a disk that is idle. Whether it was done.
    ///
    /// # Errors
    ///
    /// The transaction cannot be written.
    pub fn drop_all(&mut self, regions: &Regions) -> io::Result<bool> {
        if self.slots.iter().all(|&region| region == NO_REGION) {
            return Ok(false);
        }
        let mut all = true;
        for slot in &mut self.slots {
            if *slot != NO_REGION && regions.disarm(*slot, Era(u64::MAX)) {
                continue;
            }
            all &= *slot == NO_REGION;
        }
        if !all {
            // Those that are gone from the set may keep their slots; their next write waits for one.
            return Ok(false);
        }
        self.begin_chain().map(|()| true)
    }

    /// Arms regions: those that are asked for, then, as far as there is room, those ahead of streams and
    /// the neighbours of the first.
    ///
    /// # Errors
    ///
    /// A transaction cannot be written.
    pub fn arm(
        &mut self,
        regions: &Regions,
        wanted: &BTreeSet<u32>,
        ahead: &BTreeSet<u32>,
    ) -> io::Result<Arming> {
        let mut arming = Arming::default();
        let mut updates = Vec::new();
        for &region in wanted {
            let evicts = !arming.starved;
            arming.starved |= !self.place_region(regions, region, evicts, &mut updates)?;
        }
        for &region in ahead {
            // A search in vain takes as long as the table.
            if arming.starved || !self.place_region(regions, region, true, &mut updates)? {
                break;
            }
        }
        // Only as many as this transaction has room for, and only into slots that nobody misses.
        for neighbour in wanted
            .iter()
            .flat_map(|&region| group_of(region, regions.count()))
        {
            if updates.len() >= UPDATES_MAX || self.unused == self.slots.len() {
                break;
            }
            self.place_region(regions, neighbour, false, &mut updates)?;
        }
        self.write_updates(regions, &mut updates)?;
        Ok(arming)
    }

    /// Finds a slot for a region. `false` if there is none.
    fn place_region(
        &mut self,
        regions: &Regions,
        region: u32,
        evicts: bool,
        updates: &mut Vec<Placed>,
    ) -> io::Result<bool> {
        if regions.is_armed(region) || updates.iter().any(|placed| placed.region == region) {
            return Ok(true);
        }
        let slot = match self.free_slot() {
            Some(slot) => slot,
            None if evicts => match self.evict(regions, updates) {
                Some(slot) => {
                    reached(Place::IntentAfterEvictionBeforePlan);
                    slot
                }
                None => return Ok(false),
            },
            None => return Ok(false),
        };
        self.slots[slot] = region;
        updates.push(Placed {
            slot,
            region,
            wanted: evicts,
        });
        if updates.len() == UPDATES_MAX {
            self.write_updates(regions, updates)?;
        }
        Ok(true)
    }

    fn free_slot(&mut self) -> Option<usize> {
        let slot = self.unused;
        (slot < self.slots.len()).then(|| {
            self.unused += 1;
            slot
        })
    }

    /// The slot of a region that can go: first one that was not written lately.
    fn evict(&mut self, regions: &Regions, updates: &[Placed]) -> Option<usize> {
        let now = (regions.era(), regions.durable());
        let recent = Era(now.0.0.saturating_sub(RECENT_ERAS));
        for (kind, last) in [recent, Era(u64::MAX)].into_iter().enumerate() {
            // Until the era or what is durable changes, no region becomes one that can go.
            if self.in_vain[kind] == Some(now) {
                continue;
            }
            for _ in 0..self.slots.len() {
                let slot = self.hand;
                self.hand = (self.hand + 1) % self.slots.len();
                // One that was placed a moment ago is not in the set yet, and would seem to be gone.
                let placed = || updates.iter().any(|placed| placed.slot == slot);
                let region = self.slots[slot];
                if (regions.is_armed(region) || !placed()) && regions.disarm(region, last) {
                    self.evictions += 1;
                    return Some(slot);
                }
            }
            self.in_vain[kind] = Some(now);
        }
        None
    }

    fn write_updates(&mut self, regions: &Regions, updates: &mut Vec<Placed>) -> io::Result<()> {
        if updates.is_empty() {
            return Ok(());
        }
        self.commit(updates)?;
        for placed in updates.drain(..) {
            match placed.wanted {
                true => regions.arm(placed.region),
                false => regions.arm_unused(placed.region),
            }
        }
        reached(Place::IntentAfterArmBeforeNext);
        Ok(())
    }

    /// Writes one transaction and waits until it is durable.
    fn commit(&mut self, updates: &[Placed]) -> io::Result<()> {
        let mut transaction = Transaction::new(self.next, self.chain, self.slots.len() as u32);
        for (entry, placed) in transaction.updates.iter_mut().zip(updates) {
            *entry = Update {
                slot: (placed.slot as u32).into(),
                region: placed.region.into(),
            };
        }
        transaction.update_count = (updates.len() as u16).into();
        transaction.context_first = (self.context_next as u32).into();
        let count = CONTEXT_MAX.min(self.slots.len());
        transaction.context_count = (count as u16).into();
        for entry in &mut transaction.context[..count] {
            *entry = self.slots[self.context_next].into();
            self.context_next = (self.context_next + 1) % self.slots.len();
        }
        transaction.seal(self.page.bytes_mut());
        let offset = self.place.offset + self.next % self.place.pages * PAGE_BYTES as u64;
        reached(Place::IntentAfterPlanBeforeWrite);
        let written = failpoint::attempt(Place::IntentAfterPlanBeforeWrite, &self.file)
            .and_then(|()| self.file.write_all_at(self.page.bytes(), offset))
            .and_then(|()| failpoint::attempt(Place::IntentAfterWriteBeforeDurable, &self.file));
        if let Err(error) = written {
            self.failed = true;
            return Err(error);
        }
        reached(Place::IntentAfterWriteBeforeDurable);
        failpoint::made_durable(&self.file, offset..offset + PAGE_BYTES as u64);
        self.next += 1;
        self.commits += 1;
        Ok(())
    }
}

/// The regions that lie with one, itself among them.
fn group_of(region: u32, count: u64) -> std::ops::Range<u32> {
    let first = region - region % GROUP_REGIONS;
    let end = u64::from(first) + u64::from(GROUP_REGIONS);
    first..end.min(count).min(NO_REGION.into()) as u32
}

#[cfg(test)]
mod tests {
    use super::super::page::reconstruct;
    use super::*;
    use crate::extent::Extent;
    use proptest::prelude::*;

    const PLACE: IntentPlace = IntentPlace {
        offset: 4096,
        pages: 6,
    };
    const REGIONS: u32 = 6000;

    fn log_bytes(file: &tempfile::NamedTempFile) -> Vec<u8> {
        std::fs::read(file.path())
            .unwrap()
            .split_off(PLACE.offset as usize)
    }

    fn armed(file: &tempfile::NamedTempFile) -> BTreeSet<u32> {
        reconstruct(&log_bytes(file))
            .unwrap()
            .regions
            .into_iter()
            .collect()
    }

    #[derive(Clone, Debug)]
    enum Step {
        Write(u32, u32),
        Sync,
        DropAll,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            8 => (0..REGIONS, 1..400u32).prop_map(|(region, count)| Step::Write(region, count)),
            4 => Just(Step::Sync),
            1 => Just(Step::DropAll),
        ]
    }

    proptest! {
        // Each step writes transactions.
        #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

        #[test]
        fn what_may_be_written_stands_in_the_log(
            slots in 1u32..2900, steps in prop::collection::vec(step(), 1..40),
        ) {
            let file = tempfile::NamedTempFile::new().unwrap();
            file.as_file().set_len(PLACE.offset + PLACE.pages * 4096).unwrap();
            let regions = Regions::new(u64::from(REGIONS) << 20).unwrap();
            let mut log = IntentLog::open(file.path(), PLACE, 1, slots).unwrap();
            log.begin_chain().unwrap();
            let mut fresh = BTreeSet::new();
            for step in steps {
                match step {
                    Step::Write(first, count) => {
                        let wanted = (first..(first + count).min(REGIONS)).collect();
                        log.arm(&regions, &wanted, &BTreeSet::new()).unwrap();
                        for region in wanted {
                            let block = u64::from(region) * 256;
                            let extent = Extent { first_block: block, block_count: 1 };
                            if regions.mark(extent).armed {
                                fresh.insert(region);
                            }
                        }
                    }
                    Step::Sync => {
                        let era = regions.end_era();
                        regions.set_durable(era);
                        fresh.clear();
                    }
                    Step::DropAll => {
                        log.drop_all(&regions).unwrap();
                    }
                }
                let found = armed(&file);
                prop_assert!(fresh.is_subset(&found));
                prop_assert!(found.len() as u64 <= log.capacity());
                let in_set: BTreeSet<u32> =
                    (0..REGIONS).filter(|&region| regions.is_armed(region)).collect();
                prop_assert!(in_set.is_subset(&found));
            }
        }
    }

    #[test]
    fn a_place_says_how_many_slots_it_has_room_for() {
        for slots in [1, 748, 749, 16384, 131_072] {
            let pages = IntentPlace::pages_for(slots);
            let place = IntentPlace { offset: 0, pages };
            assert!(place.slots_max() >= slots, "{slots}");
            let less = IntentPlace {
                offset: 0,
                pages: pages - 1,
            };
            assert!(less.slots_max() < slots, "{slots}");
        }
    }
}
