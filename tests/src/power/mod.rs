//! Storage whose power can be cut: a file system in memory that knows what was synced.
//!
//! Overview: `image` keeps of each file what is durable and what came since, `names` does the same for
//! folders, `state` puts both together behind a switch, `file_system` serves them to the kernel by
//! FUSE. `machine` is a computer with such storage, whose boots have their own boot id. `promises`
//! tells what a disk may hold after a power cut.
//!
//! A power cut: the switch is thrown, and from then on the storage neither does nor answers anything.
//! The processes are killed, the mount is torn off together with the connection to the kernel, so
//! that nothing written back later arrives. Chance decides what survives of that which was not
//! synced, and this is mounted anew at the same place. Nothing waits for time to pass.
//!
//! What it does not handle: hard links, symbolic links, devices, access times; a write with
//! `O_DSYNC` makes whole pages durable, and a sync the whole file.

pub mod image;
pub mod promises;

mod file_system;
mod machine;
mod names;
mod state;
#[cfg(test)]
mod tests;

pub use image::Fate;
pub use machine::{Machine, with_machine};
