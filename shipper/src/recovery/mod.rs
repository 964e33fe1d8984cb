//! Recovery points made into disks again, and proof that they can be.
//!
//! [`index`] finds out which segment has which blocks, [`piece`] cuts their frames into pieces of
//! work, [`restore`] brings them to a [`target`], [`verify`] reads them and reports what is wrong,
//! [`repair`] brings back what is lost.

pub mod restore;

pub mod verify;

pub mod repair;

mod target;

mod segments;

mod index;

mod piece;

mod workers;

#[cfg(test)]
mod tests;
