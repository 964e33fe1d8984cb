//! The shipper: turns tracked changes into recovery points in a vault.
//!
//! From the disk outwards: `capture` reads and compresses, `segment` is what blocks become, `spool`
//! keeps sealed epochs, `upload` moves them into the `vault`, which stands in a `store`. `lifecycle`
//! steers all of it, `quiesce` brings to rest what writes; `recovery` makes disks of recovery points again.

pub mod error;

pub mod lifecycle;

pub mod quiesce;

pub mod capture;

pub mod spool;

pub mod upload;

pub mod recovery;

pub mod segment;

pub mod vault;

pub mod store;

pub mod keys;

pub mod status;

#[cfg(test)]
mod fuzz_tests;
pub mod metrics;
