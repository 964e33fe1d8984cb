//! Private words in great number, of which only those in use take memory, and which can become more
//! while others use them without a lock.
//!
//! When more are needed, memory is added and none is moved. Each piece doubles what there is, so a word
//! is found by the length of its number.

use std::io;
use std::sync::OnceLock;
use std::sync::atomic::AtomicU64;

use super::mapping::LazyWords;

/// Pieces that can be added: more than a number of 64 bits can tell apart.
const PIECES_MAX: usize = u64::BITS as usize;

/// Words that are zero until they are stored to.
#[derive(Debug)]
pub struct GrowingWords {
    first: LazyWords,
    /// Words of the first piece: a power of two.
    first_count: u64,
    /// The words added since; piece N has as many as all before it.
    more: [OnceLock<LazyWords>; PIECES_MAX],
}

impl GrowingWords {
    /// At least so many words, and at least one.
    ///
    /// # Errors
    ///
    /// The address space cannot be had.
    pub fn new(count: u64) -> io::Result<Self> {
        let first_count = count.max(1).next_power_of_two();
        Ok(Self {
            first: LazyWords::new(first_count)?,
            first_count,
            more: std::array::from_fn(|_| OnceLock::new()),
        })
    }

    /// Adds words, while others use those that are there. One thread at a time.
    ///
    /// # Errors
    ///
    /// The address space cannot be had; all is as it was, or a part of the words is there.
    pub fn reach(&self, count: u64) -> io::Result<()> {
        let mut present = self.first_count;
        for piece in &self.more {
            if present >= count {
                break;
            }
            if piece.get().is_none() {
                let _was_empty = piece.set(LazyWords::new(present)?);
            }
            present *= 2;
        }
        Ok(())
    }

    /// The word of this number, if there is room for it.
    pub fn get(&self, number: u64) -> Option<&AtomicU64> {
        self.first
            .words()
            .get(number as usize)
            .or_else(|| self.beyond_first(number))
    }

    #[cold]
    fn beyond_first(&self, number: u64) -> Option<&AtomicU64> {
        let piece = (number / self.first_count).checked_ilog2()?;
        let words = self.more.get(piece as usize)?.get()?.words();
        words.get((number - (self.first_count << piece)) as usize)
    }

    /// Makes all words zero and gives their memory back. What is stored meanwhile may or may not stay.
    ///
    /// # Errors
    ///
    /// The system refuses; then words may be as they were.
    pub fn clear(&self) -> io::Result<()> {
        let more = self.more.iter().filter_map(OnceLock::get);
        std::iter::once(&self.first)
            .chain(more)
            .try_for_each(LazyWords::clear)
    }
}
