//! The journal file `DISK.hrl`: which blocks of a disk changed in which epoch.
//!
//! `docs/journal-format.md` is its specification. The tracker owns and writes it (`writer`); the
//! shipper looks into it through `reader` alone.

pub mod format;

pub mod state;

mod mapping;

mod ring;

mod alarm;

mod checkpoint;

mod witness;

mod writer;

mod growth;

mod head;

mod recovery;

pub mod reader;

mod verify;

#[cfg(test)]
mod fixture_tests;
#[cfg(test)]
mod simulation_tests;
#[cfg(test)]
mod tests;

pub use mapping::LazyWords;
pub use recovery::{Found, JournalOptions, RecoveryReport, open};
pub use verify::{VerifyReport, dump, verify};
pub use witness::{CLOCK_STEP_MS, MARGIN_MS, Moment, Suspicion};
pub use writer::Journal;
