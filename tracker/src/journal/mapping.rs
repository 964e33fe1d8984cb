//! Memory shared with the journal file, and lazily populated private memory, as atomic words.
//!
//! The only unsafe code of the journal. What is handed out are atomics, never plain references,
//! because the same pages are stored to by other threads and read by other processes.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use memmap2::{MmapMut, MmapOptions, MmapRaw, UncheckedAdvice};

/// The head of a journal file, mapped shared.
#[derive(Debug)]
pub struct SharedWords {
    map: MmapRaw,
}

impl SharedWords {
    /// Maps the first `length_bytes` of the file to be read and written. The file must be that
    /// long, and its blocks allocated, or a store may raise SIGBUS.
    pub fn writable(file: &File, length_bytes: u64) -> io::Result<Self> {
        Ok(Self {
            map: options(length_bytes)?.map_raw(file)?,
        })
    }

    /// Maps the first `length_bytes` of the file to be read.
    pub fn readable(file: &File, length_bytes: u64) -> io::Result<Self> {
        Ok(Self {
            map: options(length_bytes)?.map_raw_read_only(file)?,
        })
    }

    /// All words. A map made by [`Self::readable`] must not be stored to.
    pub fn words(&self) -> &[AtomicU64] {
        let count = self.map.len() / size_of::<AtomicU64>();
        // SAFETY: the map is page-aligned, `count` words long, and lives as long as `self`.
        // AtomicU64 has the layout of u64, every bit pattern is valid, and shared mutation, also
        // by other processes, is what atomics allow.
        unsafe { std::slice::from_raw_parts(self.map.as_ptr().cast(), count) }
    }

    /// Copies `target.len()` bytes out from `offset` on, both multiples of eight.
    pub fn copy_out(&self, offset: u64, target: &mut [u8]) -> Option<()> {
        let first = usize::try_from(offset / 8).ok()?;
        let words = self
            .words()
            .get(first..first.checked_add(target.len() / 8)?)?;
        for (chunk, word) in target.chunks_exact_mut(8).zip(words) {
            chunk.copy_from_slice(&word.load(Ordering::Acquire).to_le_bytes());
        }
        Some(())
    }
}

fn options(length_bytes: u64) -> io::Result<MmapOptions> {
    let length = usize::try_from(length_bytes).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut options = MmapOptions::new();
    options.len(length);
    Ok(options)
}

/// Private zeroed words whose pages exist only once they are stored to.
#[derive(Debug)]
pub struct LazyWords {
    map: MmapMut,
}

impl LazyWords {
    /// Address space for `count` words (at least one).
    pub fn new(count: u64) -> io::Result<Self> {
        let mut options = options(count.max(1).saturating_mul(8))?;
        Ok(Self {
            map: options.no_reserve_swap().map_anon()?,
        })
    }

    /// All words.
    pub fn words(&self) -> &[AtomicU64] {
        let count = self.map.len() / size_of::<AtomicU64>();
        // SAFETY: the map is page-aligned, `count` words long, private to this struct, which only
        // ever hands out atomics over it.
        unsafe { std::slice::from_raw_parts(self.map.as_ptr().cast(), count) }
    }

    /// Makes all words zero and gives their memory back. Words stored by others meanwhile may or
    /// may not survive.
    pub fn clear(&self) -> io::Result<()> {
        // SAFETY: the memory is private and anonymous, where DONTNEED means zero on next access
        // (madvise(2)); only atomics point into it, and zero is a valid value for them.
        unsafe { self.map.unchecked_advise(UncheckedAdvice::DontNeed) }
    }
}

/// Whole pages of memory, which lie where direct I/O wants them.
#[derive(Debug)]
pub struct PageBuffer {
    map: MmapMut,
}

impl PageBuffer {
    /// So many bytes, which are zero.
    pub fn new(bytes: usize) -> io::Result<Self> {
        Ok(Self {
            map: MmapMut::map_anon(bytes)?,
        })
    }

    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// Its bytes, to be written.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.map
    }
}
