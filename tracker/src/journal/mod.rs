//! The journal file `DISK.hrl`: which blocks of a disk changed in which epoch.
//!
//! `docs/journal-format.md` is its specification. The tracker owns and writes it (`writer`); the
//! shipper looks into it through `reader` alone.

pub mod format;

pub mod state;

pub(crate) mod mapping;

mod words;

mod ring;

mod alarm;

mod overflow;

mod checkpoint;

pub mod intent;

mod witness;

mod core;

mod writer;

mod update;

mod fold;

mod guard;

mod replace;

mod growth;

mod head;

mod create;

pub mod verdict;

mod evidence;

mod report;

pub(crate) mod recovery;

pub mod reader;

mod verify;

#[cfg(test)]
mod damage_tests;
#[cfg(test)]
mod fixture_tests;
#[cfg(test)]
mod recovery_tests;
#[cfg(test)]
mod simulation_tests;
#[cfg(test)]
pub(crate) mod specimen;
#[cfg(test)]
mod tests;

pub use intent::{Era, Marked, Waiter};
pub use recovery::{JournalOptions, open};
pub use report::{Found, RecoveryReport};
pub use verify::{VerifyReport, dump, verify};
pub use witness::{
    CLOCK_STEP_MS, MARGIN_MS, Moment, POWER_CUT_LAG_MS, POWER_CUT_MARGIN_MS, Suspicion,
};
pub use words::GrowingWords;
pub use writer::{IntentStatus, Journal};
