//! The blocks of a closed epoch, kept as they were while they are captured.
//!
//! Overview: at a cut each disk gets a preserve file. It says which blocks belong to the epoch (`Changed`),
//! which of those are written all the time (`Hot`), and takes the old content of those that guests overwrite
//! before the shipper has read them. [`area`] is the tracker's side of it, [`reader`] the shipper's,
//! [`protocol`] what each does in which order.
//!
//! Crash consistency: the file is never synced. It counts in the boot that made it alone; a kill of either
//! program leaves what was written in the page cache, where the other one, or the next one, finds it.
//! After a power cut the epoch is given up.
//!
//! What it does not handle: which epoch is closed (`journal`), when a write has to wait (`epoch`).

pub mod area;

pub mod format;

pub mod protocol;

pub mod reader;

#[cfg(test)]
mod model_tests;
#[cfg(test)]
mod tests;
