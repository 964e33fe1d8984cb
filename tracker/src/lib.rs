//! The tracker: serves disks over NBD and remembers, across any crash, what has changed.
//!
//! From the guest inwards: `nbd` understands the protocol, `engine` orders the I/O, `epoch`
//! stamps and remembers changes, `journal` keeps them across a crash, `preserve` keeps the blocks of a
//! closed epoch as they were, `disk` is what is served.
//! `control` is the way in for the shipper and for people.

pub mod error;
pub mod extent;

pub mod failpoint;

pub mod nbd;

pub mod engine;

pub mod epoch;

pub mod journal;

pub mod preserve;

pub mod disk;

mod lock;

pub mod control;

pub mod serve;

pub mod systemd;

#[cfg(test)]
mod fuzz_tests;
