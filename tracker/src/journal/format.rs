//! The bytes of a journal file. Pure.
//!
//! `docs/journal-format.md` describes the same layout for people. All integers are little-endian.

use xxhash_rust::xxh3::xxh3_64;
use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::extent::{BLOCK_SIZE, Epoch, blocks_of};

/// First bytes of a superblock.
pub const MAGIC: [u8; 8] = *b"TMJRNL\r\n";
/// Stands in place of [`MAGIC`] while a superblock is being rewritten. It differs from it in every
/// byte, so that no single damaged byte makes one of the other.
pub const MAGIC_WRITING: [u8; 8] = [0xff; 8];
/// Bytes of a superblock, of a page of the intent log and of a checkpoint page.
pub const PAGE_BYTES: usize = 4096;
/// Offset of the alarm page, behind the two superblocks.
pub const ALARM_OFFSET: u64 = 2 * PAGE_BYTES as u64;
/// Words of the alarm, at the beginning of its page: one for even epochs, one for odd ones, and the
/// latest epoch in which it was raised.
pub const ALARM_WORDS: usize = 3;
/// Words behind the alarm that keep times of the disk: its last modification, the last look at it,
/// the boot of the machine, and the first write since the look.
pub const TIME_WORDS: usize = 4;
/// The word behind them, which is not zero once a sync of the journal has failed.
pub const DOUBT_WORD: usize = ALARM_WORDS + TIME_WORDS;
/// Offset of the intent log.
pub const INTENT_OFFSET: u64 = 3 * PAGE_BYTES as u64;
/// Least and greatest number of pages of the intent log.
pub const INTENT_PAGES_RANGE: std::ops::RangeInclusive<u64> = 8..=1 << 12;
/// Pages of the intent log before the third version, which had no use for them.
pub const OLD_INTENT_PAGES: u64 = 61;
/// Offset of the ring before the third version.
const OLD_RING_OFFSET: u64 = INTENT_OFFSET + OLD_INTENT_PAGES * PAGE_BYTES as u64;
/// Least and greatest size of both halves of the overflow bits in new journals; where there are none the
/// alarm stands for them.
pub const OVERFLOW_BYTES_RANGE: std::ops::RangeInclusive<u64> = 2 * PAGE_BYTES as u64..=1 << 24;
/// Bytes of a ring record.
pub const RECORD_BYTES: u64 = 32;
/// Bytes of a region, the unit of the intent log.
pub const REGION_BYTES: u32 = 1 << 20;
/// Least and greatest size of a ring in bytes.
pub const RING_BYTES_RANGE: std::ops::RangeInclusive<u64> = 16 << 10..=4 << 30;

/// Versions of the format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Version {
    /// Superblocks, alarm, reserved intent log, ring, two checkpoint sets.
    First = 1,
    /// The checkpoint sets may have room for a larger disk, and may lie further behind the ring.
    Second = 2,
    /// The intent log is in use, and may be longer; there may be overflow bits before the ring. A journal
    /// of an earlier version becomes one of this when it is opened: whoever does not know the log would
    /// write without arming a region.
    Third = 3,
}

impl Version {
    /// The version of this number, if there is one.
    pub fn of(number: u32) -> Option<Self> {
        [Self::First, Self::Second, Self::Third]
            .into_iter()
            .find(|version| *version as u32 == number)
    }
}

/// The version of new journals.
pub const VERSION: Version = Version::Third;

/// Flag of a superblock: the journal was closed after a sync and nothing was written since.
pub const FLAG_CLEAN: u32 = 1;

/// Flag of a superblock: another file has taken the place of this one.
pub const FLAG_REPLACED: u32 = 2;
/// Flag of a superblock: a sync of the disk has failed in the boot that wrote it.
pub const FLAG_DISK_FAILED: u32 = 4;

/// One of the two checkpoint sets as the superblock describes it.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct SetDescriptor {
    /// Pages with another generation do not belong to the set.
    pub generation: U64,
    /// Lowest epoch folded into it; zero if it is empty.
    pub lowest_epoch: U64,
    /// Highest epoch folded into it; zero if it is empty.
    pub highest_epoch: U64,
}

/// A superblock. The one with the higher sequence counts.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Superblock {
    /// [`MAGIC`].
    pub magic: [u8; 8],
    /// A number of [`Version`].
    pub version: U32,
    /// A sum of [`FLAG_CLEAN`], [`FLAG_REPLACED`] and [`FLAG_DISK_FAILED`].
    pub flags: U32,
    /// Grows with every update.
    pub sequence: U64,
    /// Random number of this journal.
    pub journal_id: [u8; 16],
    /// Identity of the disk.
    pub disk_identity: [u8; 16],
    /// Boot that wrote it last: `/proc/sys/kernel/random/boot_id` without dashes, as bytes.
    pub boot_id: [u8; 16],
    /// Size of the disk in bytes.
    pub disk_size_bytes: U64,
    /// Unit of tracking in bytes.
    pub block_bytes: U32,
    /// Unit of the intent log in bytes.
    pub region_bytes: U32,
    /// Offset of the intent log.
    pub intent_offset: U64,
    /// Bytes of the intent log.
    pub intent_bytes: U64,
    /// Offset of the ring.
    pub ring_offset: U64,
    /// Records that the ring takes.
    pub ring_records: U64,
    /// Offset of the first page of the first checkpoint set; the second set follows.
    pub checkpoint_offset: U64,
    /// Pages that one checkpoint set has room for.
    pub checkpoint_pages: U64,
    /// The open epoch.
    pub open: U64,
    /// The closed epoch, or zero.
    pub closed: U64,
    /// The highest sealed epoch.
    pub sealed: U64,
    /// The highest committed epoch.
    pub committed: U64,
    /// Epoch as of which every block counts as changed, or zero.
    pub resync: U64,
    /// Sequence of the first record that counts.
    pub ring_tail: U64,
    /// The checkpoint sets.
    pub sets: [SetDescriptor; 2],
    /// Times the journal was opened.
    pub openings: U64,
    /// Offset of the overflow bits.
    pub overflow_offset: U64,
    /// Bytes of the overflow bits, both halves together; zero if there are none.
    pub overflow_bytes: U64,
    /// Bytes of the disk that one overflow bit stands for: a power of two of regions.
    pub overflow_unit_bytes: U64,
    reserved: [u8; SUPERBLOCK_RESERVED],
    /// xxh3-64 of all bytes before it.
    pub check: U64,
}

const SUPERBLOCK_RESERVED: usize = PAGE_BYTES - 264 - 8;
const _: () = assert!(size_of::<Superblock>() == PAGE_BYTES);
const _: () = assert!(std::mem::offset_of!(Superblock, reserved) == 264);

/// Why a superblock is not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SuperblockFault {
    /// It was being rewritten when its writer was killed; the other one counts.
    Torn,
    /// Its bytes contradict its check.
    Damaged,
    /// It is whole, of a version that this program does not know.
    Future(u32),
}

impl Superblock {
    /// A superblock of [`VERSION`] and zeroes.
    pub fn zeroed() -> Self {
        let mut superblock = Self::new_zeroed();
        superblock.version = (VERSION as u32).into();
        superblock
    }

    /// Sets magic and check. The version stays: an old journal is read by old programs as long as
    /// its layout is the old one.
    pub fn seal(&mut self) {
        self.magic = MAGIC;
        self.check = xxh3_64(&self.as_bytes()[..PAGE_BYTES - 8]).into();
    }

    /// Reads and checks a superblock.
    ///
    /// # Errors
    ///
    /// What is wrong with it.
    pub fn decode(page: &[u8]) -> Result<Self, SuperblockFault> {
        let superblock = Self::read_from_bytes(page).map_err(|_| SuperblockFault::Damaged)?;
        if superblock.magic == MAGIC_WRITING {
            return Err(SuperblockFault::Torn);
        }
        let check = xxh3_64(&superblock.as_bytes()[..PAGE_BYTES - 8]);
        if superblock.magic != MAGIC || superblock.check.get() != check {
            return Err(SuperblockFault::Damaged);
        }
        let version = superblock.version.get();
        if Version::of(version).is_none() {
            return Err(SuperblockFault::Future(version));
        }
        Ok(superblock)
    }

    /// Bytes of the file up to the end of the ring, all written in advance and mapped. They never
    /// move, so that a disk can grow under workers that hold the mapping.
    pub fn head_bytes(&self) -> u64 {
        self.ring_offset.get() + self.ring_records.get() * RECORD_BYTES
    }

    /// Makes a superblock of an earlier version one of this.
    pub fn upgrade(&mut self) {
        if self.version.get() < Version::Third as u32 {
            self.version = (Version::Third as u32).into();
            self.overflow_offset = self.ring_offset;
            self.overflow_bytes = 0.into();
            self.overflow_unit_bytes = u64::from(REGION_BYTES).into();
        }
    }

    /// Blocks that the checkpoint sets have bits for. No record tells of others.
    pub fn room_blocks(&self) -> u64 {
        self.checkpoint_pages.get() * CHECKPOINT_PAGE_BLOCKS
    }

    /// Bytes of the whole file; it is longer where a growth was cut off.
    pub fn file_bytes(&self) -> u64 {
        self.checkpoint_offset.get() + 2 * self.checkpoint_pages.get() * PAGE_BYTES as u64
    }

    /// Whether offsets and counts are those that this version lays out.
    pub fn layout_is_consistent(&self) -> bool {
        if blocks_of(self.disk_size_bytes.get()) > DISK_BLOCKS_MAX {
            return false;
        }
        let records = self.ring_records.get();
        let Some(ring_bytes) = records.checked_mul(RECORD_BYTES) else {
            return false;
        };
        RING_BYTES_RANGE.contains(&ring_bytes)
            && ring_bytes % PAGE_BYTES as u64 == 0
            && self.head_is_consistent()
            && u64::from(self.block_bytes.get()) == BLOCK_SIZE
            && self.region_bytes.get() == REGION_BYTES
            && self.sets_are_consistent(self.head_bytes())
    }

    /// Whether intent log, overflow bits and ring follow each other.
    fn head_is_consistent(&self) -> bool {
        let page = PAGE_BYTES as u64;
        let (intent, overflow) = (self.intent_bytes.get(), self.overflow_bytes.get());
        if self.version.get() < Version::Third as u32 {
            return self.intent_offset.get() == INTENT_OFFSET
                && self.ring_offset.get() == OLD_RING_OFFSET
                && OLD_RING_OFFSET == INTENT_OFFSET + intent;
        }
        let unit = self.overflow_unit_bytes.get();
        self.intent_offset.get() == INTENT_OFFSET
            && intent.is_multiple_of(page)
            && INTENT_PAGES_RANGE.contains(&(intent / page))
            && self.overflow_offset.get() == INTENT_OFFSET + intent
            && (overflow == 0 || OVERFLOW_BYTES_RANGE.contains(&overflow))
            && overflow.is_multiple_of(2 * page)
            && unit.is_power_of_two()
            && (REGION_BYTES.into()..=DISK_BLOCKS_MAX * BLOCK_SIZE).contains(&unit)
            && self.ring_offset.get() == INTENT_OFFSET + intent + overflow
    }

    fn sets_are_consistent(&self, ring_end: u64) -> bool {
        let (offset, pages) = (self.checkpoint_offset.get(), self.checkpoint_pages.get());
        let needed = checkpoint_pages_of(self.disk_size_bytes.get());
        match Version::of(self.version.get()) {
            Some(Version::First) => offset == ring_end && pages == needed,
            Some(Version::Second | Version::Third) => {
                (ring_end..=CHECKPOINT_OFFSET_MAX).contains(&offset)
                    && offset % PAGE_BYTES as u64 == 0
                    && (needed..=CHECKPOINT_PAGES_MAX).contains(&pages)
            }
            None => false,
        }
    }

    /// Whether every counter is so low that it can go on counting, and the epochs of the
    /// checkpoint sets are in order.
    pub fn counters_are_consistent(&self) -> bool {
        let counters = [&self.sequence, &self.ring_tail, &self.openings];
        let generations = self.sets.iter().map(|set| &set.generation);
        let in_order = self.sets.iter().all(|set| {
            let (lowest, highest) = (set.lowest_epoch.get(), set.highest_epoch.get());
            lowest <= highest && highest <= EPOCH_MAX && (lowest == 0) == (highest == 0)
        });
        in_order
            && counters
                .into_iter()
                .chain(generations)
                .all(|counter| counter.get() <= COUNTER_MAX)
    }
}

/// Greatest value of the counters in a superblock. None comes near it by counting.
pub const COUNTER_MAX: u64 = 1 << 62;

/// What a record tells of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Operation {
    /// Nothing: it fills a slot that was claimed and not written before a crash.
    Null = 0,
    /// The blocks were written.
    Write = 1,
    /// The blocks were given back.
    Trim = 2,
    /// The blocks were made zero.
    WriteZeroes = 3,
}

/// Blocks that one record can tell of; a longer extent takes several.
pub const RECORD_BLOCKS_MAX: u64 = (1 << 24) - 1;
/// Blocks that a disk can have: 4 PiB.
pub const DISK_BLOCKS_MAX: u64 = 1 << 40;
/// Epochs end here, which at one a second is eight million years away.
pub const EPOCH_MAX: u64 = (1 << 48) - 1;

/// A record of the ring, unpacked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// Position in the endless sequence of records; the slot is this modulo the capacity.
    pub sequence: u64,
    /// Epoch of the change.
    pub epoch: Epoch,
    /// What happened.
    pub operation: Operation,
    /// First block.
    pub first_block: u64,
    /// Number of blocks, at most [`RECORD_BLOCKS_MAX`].
    pub block_count: u64,
}

/// First word of a slot that is being written. No sequence comes near it.
pub const SLOT_WRITING: u64 = u64::MAX;

/// What a slot of the ring holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Slot {
    /// It has never been written.
    Empty,
    /// Its writer was killed in the middle of it, or is in the middle of it now.
    Writing,
    /// A record.
    Whole(Record),
    /// Bytes that contradict their check.
    Damaged,
}

impl Record {
    /// The four words of a record: sequence; epoch (48 bits) and operation (8 bits above);
    /// first block (40 bits) and block count (24 bits above); xxh3-64 of these three.
    pub fn encode(&self) -> [u64; 4] {
        let second = self.epoch.0 | u64::from(self.operation as u8) << 48;
        let third = self.first_block | self.block_count << 40;
        [
            self.sequence,
            second,
            third,
            check_of(self.sequence, second, third),
        ]
    }

    /// Judges the four words of a slot, which the caller has copied out of the mapping.
    pub fn decode(words: [u64; 4]) -> Slot {
        let [sequence, second, third, check] = words;
        if words == [0; 4] {
            return Slot::Empty;
        }
        if sequence == SLOT_WRITING {
            return Slot::Writing;
        }
        if check != check_of(sequence, second, third) {
            return Slot::Damaged;
        }
        let operation = match second >> 48 {
            0 => Operation::Null,
            1 => Operation::Write,
            2 => Operation::Trim,
            3 => Operation::WriteZeroes,
            _ => return Slot::Damaged,
        };
        Slot::Whole(Self {
            sequence,
            epoch: Epoch(second & EPOCH_MAX),
            operation,
            first_block: third & (DISK_BLOCKS_MAX - 1),
            block_count: third >> 40,
        })
    }
}

fn check_of(sequence: u64, second: u64, third: u64) -> u64 {
    let mut bytes = [0; 24];
    bytes[..8].copy_from_slice(&sequence.to_le_bytes());
    bytes[8..16].copy_from_slice(&second.to_le_bytes());
    bytes[16..].copy_from_slice(&third.to_le_bytes());
    xxh3_64(&bytes)
}

/// Head of a checkpoint page.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct CheckpointHead {
    /// xxh3-64 of all bytes behind it.
    pub check: U64,
    /// Generation of the set when the page was written.
    pub generation: U64,
    /// Position of the page in its set.
    pub page: U64,
    reserved: U64,
}

/// Bytes of a [`CheckpointHead`].
pub const CHECKPOINT_HEAD_BYTES: usize = size_of::<CheckpointHead>();
const _: () = assert!(CHECKPOINT_HEAD_BYTES == 32);
/// Blocks that one checkpoint page has bits for.
pub const CHECKPOINT_PAGE_BLOCKS: u64 = ((PAGE_BYTES - CHECKPOINT_HEAD_BYTES) * 8) as u64;

/// Pages that one checkpoint set needs for the largest disk.
pub const CHECKPOINT_PAGES_MAX: u64 = DISK_BLOCKS_MAX.div_ceil(CHECKPOINT_PAGE_BLOCKS);
/// Greatest offset of the checkpoint sets. None comes near it by growing.
pub const CHECKPOINT_OFFSET_MAX: u64 = 1 << 50;

/// Pages that one checkpoint set needs for a disk.
pub fn checkpoint_pages_of(disk_size_bytes: u64) -> u64 {
    blocks_of(disk_size_bytes).div_ceil(CHECKPOINT_PAGE_BLOCKS)
}

/// Pages that new checkpoint sets get for a disk: holes cost nothing, and a disk that grows up to
/// twice its size finds room.
pub fn checkpoint_room_of(disk_size_bytes: u64) -> u64 {
    let needed = checkpoint_pages_of(disk_size_bytes);
    (2 * needed).min(CHECKPOINT_PAGES_MAX)
}

/// What a checkpoint page on disk is to a set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageState {
    /// Never written, or written for an earlier generation.
    Foreign,
    /// It belongs to the set.
    Ours,
    /// Its bytes contradict its check: all its blocks count as changed.
    Damaged,
}

/// Judges a checkpoint page of [`PAGE_BYTES`].
pub fn judge_checkpoint_page(page: &[u8], number: u64, generation: u64) -> PageState {
    let Ok((head, _)) = CheckpointHead::read_from_prefix(page) else {
        return PageState::Damaged;
    };
    if page.iter().all(|&byte| byte == 0) {
        return PageState::Foreign;
    }
    if head.check.get() != xxh3_64(&page[8..]) || head.page.get() != number {
        return PageState::Damaged;
    }
    if head.generation.get() == generation {
        PageState::Ours
    } else {
        PageState::Foreign
    }
}

/// Writes the head of a checkpoint page of [`PAGE_BYTES`] over its bits.
pub fn seal_checkpoint_page(page: &mut [u8], number: u64, generation: u64) {
    let mut head = CheckpointHead {
        check: 0.into(),
        generation: generation.into(),
        page: number.into(),
        reserved: 0.into(),
    };
    page[..CHECKPOINT_HEAD_BYTES].copy_from_slice(head.as_bytes());
    head.check = xxh3_64(&page[8..]).into();
    page[..8].copy_from_slice(head.check.as_bytes());
}

/// A word of the alarm: an epoch (48 bits) under 16 bits of its own check, or zero.
///
/// One word, because it is stored by a worker in the middle of a guest's write and must be whole
/// or absent after SIGKILL.
pub fn encode_alarm(epoch: Epoch) -> u64 {
    let low = epoch.0 & EPOCH_MAX;
    low | (xxh3_64(&low.to_le_bytes()) >> 48) << 48
}

/// A word of the alarm or of a time contradicts its own check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AlarmDamaged;

/// Reads the alarm word; `None` if it is not set.
///
/// # Errors
///
/// It is damaged.
pub fn decode_alarm(word: u64) -> Result<Option<Epoch>, AlarmDamaged> {
    match word {
        0 => Ok(None),
        word if encode_alarm(Epoch(word & EPOCH_MAX)) == word => Ok(Some(Epoch(word & EPOCH_MAX))),
        _ => Err(AlarmDamaged),
    }
}

/// Milliseconds since the beginning of 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Time(pub i64);

impl std::fmt::Display for Time {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match jiff::Timestamp::from_millisecond(self.0) {
            Ok(time) => time.fmt(f),
            Err(_beyond_the_calendar) => write!(f, "{} ms", self.0),
        }
    }
}

/// What is added to a time, so that its word is above zero.
const TIME_BIAS: i64 = 1 << 47;

/// A word of a time: the time and 2^47 as an epoch is encoded in the alarm. Times that do not fit
/// become the first or the last that does.
pub fn encode_time(time: Time) -> u64 {
    let biased = time.0.saturating_add(TIME_BIAS);
    encode_alarm(Epoch(biased.clamp(1, EPOCH_MAX as i64) as u64))
}

/// Reads a word of a time; `None` if it is not set.
///
/// # Errors
///
/// It is damaged.
pub fn decode_time(word: u64) -> Result<Option<Time>, AlarmDamaged> {
    decode_alarm(word).map(|time| time.map(|Epoch(biased)| Time(biased as i64 - TIME_BIAS)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn records_survive(
            sequence in 1u64..1 << 50, epoch in 0u64..=EPOCH_MAX, operation in 0u8..4,
            first_block in 0u64..DISK_BLOCKS_MAX, block_count in 0u64..=RECORD_BLOCKS_MAX,
        ) {
            let operation =
                [Operation::Null, Operation::Write, Operation::Trim, Operation::WriteZeroes][usize::from(operation)];
            let record = Record { sequence, epoch: Epoch(epoch), operation, first_block, block_count };
            prop_assert_eq!(Record::decode(record.encode()), Slot::Whole(record));
        }

        #[test]
        fn a_damaged_byte_of_a_record_shows(byte in 0usize..32, change in 1u8.., sequence in 1u64..1 << 40) {
            let record = Record {
                sequence, epoch: Epoch(3), operation: Operation::Write, first_block: 77, block_count: 5,
            };
            let mut words = record.encode();
            words[byte / 8] ^= u64::from(change) << (byte % 8 * 8);
            prop_assert_eq!(Record::decode(words), Slot::Damaged);
        }

        #[test]
        fn a_damaged_byte_of_a_superblock_shows(byte in 0usize..PAGE_BYTES, change in 1u8..) {
            let mut superblock = Superblock::zeroed();
            superblock.open = 5.into();
            superblock.seal();
            let mut bytes = superblock.as_bytes().to_vec();
            bytes[byte] ^= change;
            prop_assert_eq!(Superblock::decode(&bytes).err(), Some(SuperblockFault::Damaged));
        }

        #[test]
        fn a_damaged_byte_of_an_alarm_shows_or_keeps_it_set(byte in 0u32..8, change in 1u8.., epoch in 1u64..1 << 40) {
            let word = encode_alarm(Epoch(epoch)) ^ u64::from(change) << (byte * 8);
            prop_assert_ne!(decode_alarm(word), Ok(None));
        }
    }

    #[test]
    fn times_survive_and_those_that_do_not_fit_become_the_nearest() {
        let (first, last) = (1 - TIME_BIAS, TIME_BIAS - 1);
        for time in [0, 1, -1, 1_795_553_640_123, first, last] {
            assert_eq!(decode_time(encode_time(Time(time))), Ok(Some(Time(time))));
        }
        for (beyond, nearest) in [
            (i64::MIN, first),
            (first - 1, first),
            (last + 1, last),
            (i64::MAX, last),
        ] {
            assert_eq!(
                decode_time(encode_time(Time(beyond))),
                Ok(Some(Time(nearest)))
            );
        }
        assert_eq!(decode_time(0), Ok(None));
        assert_eq!(Time(1_000).to_string(), "1970-01-01T00:00:01Z");
        assert_eq!(Time(i64::MAX).to_string(), "9223372036854775807 ms");
    }

    #[test]
    fn checkpoint_pages_are_judged() {
        let mut page = vec![0; PAGE_BYTES];
        assert_eq!(judge_checkpoint_page(&page, 3, 1), PageState::Foreign);
        page[100] = 0xff;
        seal_checkpoint_page(&mut page, 3, 1);
        assert_eq!(judge_checkpoint_page(&page, 3, 1), PageState::Ours);
        assert_eq!(judge_checkpoint_page(&page, 3, 2), PageState::Foreign);
        assert_eq!(judge_checkpoint_page(&page, 4, 1), PageState::Damaged);
        page[100] = 0xfe;
        assert_eq!(judge_checkpoint_page(&page, 3, 1), PageState::Damaged);
    }
}
