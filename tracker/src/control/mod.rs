//! The control socket: how the shipper and people ask the tracker for status and epochs.
//!
//! One request and one answer are a line of JSON each; see `docs/control-protocol.md`.

pub mod line;

pub mod client;
pub mod protocol;
mod resize;
pub mod server;
