//! What the black-box tests share: the two programs as processes, a small NBD client, a model of
//! what a disk may hold, and seeds that are printed and can be replayed.
//!
//! The library is used by tests alone, so a broken expectation panics with a message.
#![allow(clippy::unwrap_used, clippy::expect_used)]

pub mod chunks;
pub mod emulators;
pub mod faulty_store;
pub mod loop_device;
pub mod model;
pub mod nbd;
pub mod order;
pub mod power;
pub mod process;
pub mod seed;
pub mod site;
pub mod tls;
