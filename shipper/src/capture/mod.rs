//! Copying blocks of a disk into frames: read at depth, fingerprinted, compressed.
//!
//! Overview: [`plan`] cuts extents into batches of at most 128 KiB; they are read through an io_uring
//! with registered buffers, or by threads where there is none; workers compare fingerprints and
//! compress; the caller gets the frames in the order of the disk. All of it is bounded by the number
//! of buffers.
//!
//! Blocks of a closed epoch that guests overwrite meanwhile are taken from its preserve file; see
//! `tracker::preserve`. A scan has none: what changes while it reads is captured again with a later epoch.

pub mod plan;

mod uring;

mod threads;

pub mod frozen;

pub mod throttle;

pub mod source;

pub mod pipeline;
