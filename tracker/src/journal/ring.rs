//! The ring of extent records in the mapped head of a journal.
//!
//! Overview: writers claim a sequence number and fill its slot; nobody waits for anybody. The live
//! window is `tail .. head`. The tail moves only in `checkpoint` and at a commit, after a superblock
//! that no longer needs the records before it.
//!
//! Order inside a slot: the first word is set to [`SLOT_WRITING`], then the other words, then the
//! first word to the sequence. Stores of one thread take effect in this order before SIGKILL, so a
//! slot is afterwards what it was, or marked as being written, or whole.
//!
//! Crash consistency: a slot that was claimed and not written ("hole") tells of a write that was
//! never submitted. While the tracker runs, a hole may be about to be filled, so the tail never
//! passes one; recovery fills those of a dead process with null records.
//!
//! What it does not handle: which records are still needed.

use std::sync::atomic::{AtomicU64, Ordering, fence};

use super::format::{Record, SLOT_WRITING, Slot};
use crate::failpoint::{Place, reached};

/// Records kept free, so that every worker that passed the check for room at the same moment finds
/// a slot. Twice the number of workers that there can be.
const MARGIN: u64 = 128;

/// Positions of a ring over the words of its slots.
#[derive(Debug)]
pub struct Ring {
    first_word: usize,
    capacity: u64,
    head: Padded,
    tail: AtomicU64,
}

/// A counter on a cache line of its own.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Padded(AtomicU64);

impl Ring {
    /// A ring of `capacity` records whose slots begin at `first_word`.
    pub fn new(first_word: usize, capacity: u64, tail: u64, head: u64) -> Self {
        Self {
            first_word,
            capacity,
            head: Padded(head.into()),
            tail: tail.into(),
        }
    }

    /// Slots.
    pub fn capacity(&self) -> u64 {
        self.capacity
    }

    /// Sequence that the next record gets.
    pub fn head(&self) -> u64 {
        self.head.0.load(Ordering::Acquire)
    }

    /// Sequence of the first live record.
    pub fn tail(&self) -> u64 {
        self.tail.load(Ordering::Acquire)
    }

    /// Slots in use. The tail is read first: it never passes a head that is read later, while a head
    /// that is read first may be passed by then.
    pub fn used(&self) -> u64 {
        let tail = self.tail();
        self.head() - tail
    }

    /// Frees the slots before `tail`.
    pub fn set_tail(&self, tail: u64) {
        self.tail.store(tail, Ordering::Release);
    }

    /// Appends a record (its `sequence` is set here). `false`: the ring is full, nothing was done.
    pub fn append(&self, words: &[AtomicU64], mut record: Record) -> bool {
        if self.used() + MARGIN >= self.capacity {
            return false;
        }
        record.sequence = self.head.0.fetch_add(1, Ordering::AcqRel);
        reached(Place::RecordAfterClaimBeforeFill);
        self.fill(words, record);
        true
    }

    /// Claims a slot and leaves it as it is, as a worker does that is killed just then.
    #[cfg(test)]
    pub(super) fn claim(&self) {
        self.head.0.fetch_add(1, Ordering::AcqRel);
    }

    /// Writes a record to the slot of its sequence.
    pub fn fill(&self, words: &[AtomicU64], record: Record) {
        let Some(slot) = self.slot(words, record.sequence) else {
            return;
        };
        let [sequence, second, third, check] = record.encode();
        slot[0].store(SLOT_WRITING, Ordering::Relaxed);
        fence(Ordering::Release);
        reached(Place::FillAfterMarkBeforeWords);
        slot[1].store(second, Ordering::Relaxed);
        slot[2].store(third, Ordering::Relaxed);
        slot[3].store(check, Ordering::Relaxed);
        reached(Place::FillAfterWordsBeforeSequence);
        slot[0].store(sequence, Ordering::Release);
    }

    /// Copies out and judges the slot of a sequence.
    pub fn read(&self, words: &[AtomicU64], sequence: u64) -> Slot {
        self.slot(words, sequence).map_or(Slot::Damaged, read_slot)
    }

    fn slot<'a>(&self, words: &'a [AtomicU64], sequence: u64) -> Option<&'a [AtomicU64; 4]> {
        let first = self.first_word + (sequence % self.capacity) as usize * 4;
        words.get(first..first + 4)?.try_into().ok()
    }
}

/// Copies out and judges one slot. A slot that changes meanwhile reads as being written.
pub fn read_slot(slot: &[AtomicU64; 4]) -> Slot {
    let first = slot[0].load(Ordering::Acquire);
    let others = [1, 2, 3].map(|index: usize| slot[index].load(Ordering::Relaxed));
    fence(Ordering::Acquire);
    if slot[0].load(Ordering::Relaxed) != first {
        return Slot::Writing;
    }
    Record::decode([first, others[0], others[1], others[2]])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::extent::Epoch;
    use crate::journal::format::Operation;

    fn record(first_block: u64) -> Record {
        Record {
            sequence: 0,
            epoch: Epoch(1),
            operation: Operation::Write,
            first_block,
            block_count: 1,
        }
    }

    #[test]
    fn laps_are_told_apart_and_a_full_ring_refuses() {
        let words: Vec<AtomicU64> = (0..4 * 512).map(|_| AtomicU64::new(0)).collect();
        let ring = Ring::new(0, 512, 1, 1);
        let mut appended = 0;
        while ring.append(&words, record(appended)) {
            appended += 1;
        }
        assert_eq!(appended, 512 - MARGIN);
        ring.set_tail(appended + 1);
        for block in 0..300 {
            assert!(ring.append(&words, record(1000 + block)));
        }
        match ring.read(&words, appended + 1) {
            Slot::Whole(found) => {
                assert_eq!((found.sequence, found.first_block), (appended + 1, 1000));
            }
            other => panic!("{other:?}"),
        }
    }
}
