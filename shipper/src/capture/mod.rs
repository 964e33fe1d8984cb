//! Copying blocks of a disk into frames: read at depth, fingerprinted, compressed.
//!
//! Overview: [`plan`] cuts extents into batches of at most 128 KiB; they are read through an io_uring
//! with registered buffers, or by threads where there is none; workers compare fingerprints and
//! compress; the caller gets the frames in the order of the disk. All of it is bounded by the number
//! of buffers.
//!
//! What it does not handle: blocks that change while they are read. The change belongs to a later
//! epoch, which holds the block again.

pub mod plan;

mod uring;

mod threads;

pub mod source;

pub mod pipeline;
