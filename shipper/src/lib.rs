//! The shipper: turns tracked changes into recovery points in a vault.

pub mod capture;
pub mod error;
pub mod lifecycle;
pub mod recovery;
pub mod segment;
pub mod spool;
pub mod store;
pub mod upload;
pub mod vault;
