//! The order of `protocol` under a model checker: every interleaving of a shipper and a tracker, and every value
//! that the memory model lets a load return, within the bounds of a few blocks and writes.
//!
//! A block of the disk and its copy are words that are loaded and stored without any order, as a transfer
//! through the page cache is. Whatever order holds between them has to come from the protocol.
//! The canaries keep another order, or leave the fences out; the checker has to find each.

use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;

use loom::sync::atomic::{AtomicU64, Ordering, fence};
use loom::sync::{Arc, Mutex};
use loom::thread;

use super::protocol::{self, Word};

/// A word of which the checker tries the accesses in every order.
///
/// The checker remembers the last access to a word alone, so a thread that loads a word and then stores to it hides
/// from it that another one has loaded it before. A store to a neighbour that nobody loads comes before each
/// access: it orders nothing, and stores are never hidden.
struct Shared {
    step: AtomicU64,
    word: AtomicU64,
}

impl Shared {
    fn new(content: u64) -> Self {
        Self {
            step: AtomicU64::new(0),
            word: AtomicU64::new(content),
        }
    }

    fn step(&self) -> &AtomicU64 {
        self.step.store(0, Ordering::Relaxed);
        &self.word
    }

    fn load(&self) -> u64 {
        self.step().load(Ordering::Relaxed)
    }

    fn store(&self, content: u64) {
        self.step().store(content, Ordering::Relaxed);
    }
}

thread_local! {
    /// Stored to before each fence of an execution, so that another thread may come between it and what stands
    /// before it. An execution is one thread of the system.
    static FENCES: RefCell<Option<Rc<AtomicU64>>> = const { RefCell::new(None) };
}

trait New: Word + Send + Sync + 'static {
    fn new() -> Self;
}

/// A word of bits as both processes see it.
struct Fenced(Shared);

impl New for Fenced {
    fn new() -> Self {
        Self(Shared::new(0))
    }
}

impl Word for Fenced {
    fn load_acquire(&self) -> u64 {
        self.0.step().load(Ordering::Acquire)
    }

    fn set_release(&self, bits: u64) {
        self.0.step().fetch_or(bits, Ordering::AcqRel);
    }

    fn fence() {
        let fences = FENCES.with_borrow(Clone::clone);
        fences.unwrap().store(0, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }
}

/// The same without fences.
struct Unfenced(Fenced);

impl New for Unfenced {
    fn new() -> Self {
        Self(Fenced::new())
    }
}

impl Word for Unfenced {
    fn load_acquire(&self) -> u64 {
        self.0.load_acquire()
    }

    fn set_release(&self, bits: u64) {
        self.0.set_release(bits);
    }

    fn fence() {}
}

/// In which order the sides do what they do.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Order {
    /// As the protocol has it.
    Kept,
    /// The shipper looks at the preserved bits before it reads.
    LooksBeforeItReads,
    /// The shipper says that it has a block before it reads it.
    SaysBeforeItReads,
    /// The tracker overwrites a block before it says that it is copied.
    OverwritesBeforeItSays,
    /// The tracker says that a block is copied before it is.
    SaysBeforeItCopies,
    /// A thread of the tracker that finds a bit, or a failure, of another one has no fence of its own.
    TrustsOthers,
}

const BLOCKS: usize = 2;

/// What a block holds at the cut. New content is larger.
const fn old(block: usize) -> u64 {
    block as u64 + 1
}

/// A disk of two blocks, both of the epoch, and its preserve file.
struct Machine<W> {
    order: Order,
    disk: [Shared; BLOCKS],
    copies: [Shared; BLOCKS],
    captured: W,
    preserved: W,
    /// Set where a block could not be copied.
    failure: W,
    /// Stands for the one thread that copies the blocks.
    copier: Mutex<()>,
}

impl<W: New> Machine<W> {
    fn new(order: Order) -> Self {
        FENCES.set(Some(Rc::new(AtomicU64::new(0))));
        Self {
            order,
            disk: std::array::from_fn(|block| Shared::new(old(block))),
            copies: std::array::from_fn(|_| Shared::new(0)),
            captured: W::new(),
            preserved: W::new(),
            failure: W::new(),
            copier: Mutex::new(()),
        }
    }

    fn must_copy(&self, block: usize) -> bool {
        if self.order == Order::TrustsOthers {
            let bits = self.preserved.load_acquire() | self.captured.load_acquire();
            return bits >> block & 1 == 0;
        }
        protocol::to_copy(1 << block, &self.captured, &self.preserved) != 0
    }

    /// Tracker: a write of a later epoch.
    fn write(&self, block: usize, content: u64) {
        let overwrite = || self.disk[block].store(content);
        if self.must_copy(block) {
            let _copier = self.copier.lock().unwrap();
            // Another write may have had it copied meanwhile.
            if self.must_copy(block) {
                match self.order {
                    Order::OverwritesBeforeItSays => {
                        self.copy(block);
                        overwrite();
                        return protocol::copied(1 << block, &self.preserved);
                    }
                    Order::SaysBeforeItCopies => {
                        protocol::copied(1 << block, &self.preserved);
                        self.copy(block);
                    }
                    _ => {
                        self.copy(block);
                        protocol::copied(1 << block, &self.preserved);
                    }
                }
            }
        }
        overwrite();
    }

    fn copy(&self, block: usize) {
        let content = self.disk[block].load();
        self.copies[block].store(content);
    }

    /// Tracker: a write whose block cannot be copied; its epoch is given up. One that comes after it is not kept
    /// waiting.
    fn write_uncopied(&self, block: usize, content: u64) {
        let is_given_up = match self.order {
            Order::TrustsOthers => self.failure.load_acquire() != 0,
            _ => protocol::is_given_up(&self.failure),
        };
        if !is_given_up {
            protocol::copied(1, &self.failure);
        }
        self.disk[block].store(content);
    }

    /// Shipper: takes blocks that it reads at once.
    fn take(&self, blocks: &[usize]) -> Vec<u64> {
        let mask = blocks.iter().fold(0, |mask, block| mask | 1 << block);
        if self.order == Order::SaysBeforeItReads {
            protocol::taken(mask, &self.captured);
        }
        let looked = (self.order == Order::LooksBeforeItReads)
            .then(|| protocol::to_take(mask, &self.preserved));
        let read: Vec<u64> = blocks
            .iter()
            .map(|&block| self.disk[block].load())
            .collect();
        let from_copies = looked.unwrap_or_else(|| protocol::to_take(mask, &self.preserved));
        let content =
            blocks
                .iter()
                .zip(read)
                .map(|(&block, read)| match from_copies >> block & 1 {
                    1 => self.copies[block].load(),
                    _ => read,
                });
        let content = content.collect();
        protocol::taken(mask, &self.captured);
        content
    }

    fn has_failed(&self) -> bool {
        protocol::to_take(u64::MAX, &self.failure) != 0
    }
}

/// A model of this many switches of threads at most, where they do not come by themselves; without a number of all.
fn explore(switches_max: Option<usize>, model: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = switches_max;
    builder.check(model);
}

/// A shipper takes `reads` one after the other, and each list of `writes` is carried out by a worker of the tracker.
/// What the shipper takes is the old content.
fn check<W: New>(
    order: Order,
    switches_max: Option<usize>,
    reads: &[&'static [usize]],
    writes: &[&'static [usize]],
) {
    let (reads, writes) = (reads.to_vec(), writes.to_vec());
    explore(switches_max, move || {
        let machine = Arc::new(Machine::<W>::new(order));
        for (number, blocks) in writes.iter().copied().enumerate() {
            let machine = Arc::clone(&machine);
            thread::spawn(move || {
                for (turn, &block) in blocks.iter().enumerate() {
                    machine.write(block, 100 + 10 * number as u64 + turn as u64);
                }
            });
        }
        for blocks in &reads {
            let expected: Vec<u64> = blocks.iter().map(|&block| old(block)).collect();
            assert_eq!(machine.take(blocks), expected, "not the old content");
        }
    });
}

/// Two workers overwrite blocks that cannot be copied; the shipper takes one of them. A failure is noted as a copied
/// block is, and looked at when everything is taken.
fn check_failure(order: Order) {
    explore(Some(3), move || {
        let machine = Arc::new(Machine::<Fenced>::new(order));
        for block in 0..BLOCKS {
            let machine = Arc::clone(&machine);
            thread::spawn(move || machine.write_uncopied(block, 100));
        }
        let taken = machine.take(&[1]);
        assert!(
            taken == [old(1)] || machine.has_failed(),
            "not the old content"
        );
    });
}

/// Whether the checker finds what is wrong.
fn is_found(check: impl FnOnce()) -> bool {
    let Err(said) = catch_unwind(AssertUnwindSafe(check)) else {
        return false;
    };
    let said = said
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| said.downcast_ref::<&str>().copied());
    said.is_some_and(|said| said.contains("not the old content"))
}

#[test]
fn one_block_and_one_write() {
    check::<Fenced>(Order::Kept, None, &[&[0]], &[&[0]]);
}

#[test]
fn two_writes_to_one_block() {
    check::<Fenced>(Order::Kept, None, &[&[0]], &[&[0, 0]]);
}

#[test]
fn two_blocks_of_one_word() {
    check::<Fenced>(Order::Kept, Some(4), &[&[0, 1]], &[&[0, 1]]);
}

#[test]
fn two_blocks_of_one_word_and_two_writes_to_one_of_them() {
    check::<Fenced>(Order::Kept, Some(3), &[&[0], &[1]], &[&[0, 1, 0]]);
}

#[test]
fn two_workers_of_which_one_finds_the_block_copied_by_the_other() {
    check::<Fenced>(Order::Kept, Some(3), &[&[0]], &[&[0], &[0]]);
}

#[test]
fn two_workers_at_two_blocks_of_one_word() {
    check::<Fenced>(Order::Kept, Some(2), &[&[0, 1]], &[&[0], &[1]]);
}

#[test]
fn whoever_takes_what_was_not_preserved_finds_the_failure() {
    check_failure(Order::Kept);
}

#[test]
fn an_order_that_is_not_kept_is_found() {
    for order in [
        Order::LooksBeforeItReads,
        Order::SaysBeforeItReads,
        Order::OverwritesBeforeItSays,
        Order::SaysBeforeItCopies,
    ] {
        assert!(is_found(|| check::<Fenced>(order, None, &[&[0]], &[&[0]])));
    }
}

#[test]
fn fences_that_are_left_out_are_found() {
    assert!(is_found(|| check::<Unfenced>(
        Order::Kept,
        None,
        &[&[0]],
        &[&[0]]
    )));
    let two = &[&[0][..], &[0]];
    let trusting = || check::<Fenced>(Order::TrustsOthers, Some(3), &[&[0]], two);
    assert!(is_found(trusting));
    assert!(is_found(|| check_failure(Order::TrustsOthers)));
}
