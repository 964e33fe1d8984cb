//! The intent log: which regions of the disk may change without a durable record.
//!
//! Overview: a record of the ring outlives the process, not a power cut. So a write waits until its
//! region is *armed*: named by a transaction of the intent log that is durable. After a power cut every
//! block of an armed region is suspect. A region that is armed once stays so while it is written, so
//! that nearly no write waits.
//!
//! Order of a write: its record in the mapped ring; the mark of its regions ([`regions`]); if one of
//! them is not armed, the write waits for a transaction ([`log`]) or for a sync of the ring, whichever
//! comes first; then its data.
//!
//! Eras: the ring is synced in the background, about once a second. A sync ends an era: what was recorded
//! in it, or before, is durable. A region whose last mark is of a durable era has only durable records,
//! so it can make room for another. The record is stored before the era is read and the region marked,
//! and the sync begins after the era has changed; therefore a record whose mark is of an era before the
//! sync was in the mapping when the sync began.
//!
//! Crash consistency: transactions are written one at a time, past the page cache, and are durable when
//! they are answered. Their pages are told apart from torn ones ([`page`]). After a power cut recovery
//! turns armed regions into records of the open epoch, makes them durable, and begins a new chain.
//!
//! What it does not handle: a journal on storage that loses what it called durable.

mod keeper;
mod log;
pub mod page;
mod regions;

pub use keeper::{Batch, Keeper, Waiter};
pub use log::{IntentLog, IntentPlace};
pub use regions::{Era, Marked, Regions, extent_of};
