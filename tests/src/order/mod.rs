//! The order oracle: whether a restored recovery point is one moment of all disks of a machine.
//!
//! Overview: a few [`writer`]s change the disks over connections of their own. Each write has a number and
//! a *clock*: for every writer, up to which number its writes had been answered, and so were known, when
//! this one was sent. A point is *closed* if with every write that is seen in it all those are in it that
//! its clock names. That is all that a guest can ever observe of a moment: a write that nobody knew
//! of may be in it or not.
//!
//! [`stamp`] is what a write leaves in each sector, [`history`] remembers what was sent, lost and answered,
//! [`follower`] brings the points of a vault into memory one after the other, [`checker`] judges them.
//!
//! Every block belongs to one writer (`areas`), so that the order of the writes to it is known. A writer
//! may still overlap a write of its own that is in flight; then either may be the one that stays.
//!
//! What is not judged: a write of several blocks that nobody knew of may be there in part, as on any
//! disk that loses its power. A block is there as a whole or not at all.

pub mod stamp;

pub mod areas;

pub mod history;

pub mod writer;

pub mod follower;

pub mod checker;

#[cfg(test)]
mod tests;

/// Writers, each a thread with a connection to every disk.
pub const WRITERS: usize = 4;
/// Unit of a stamp, in bytes.
pub const SECTOR_BYTES: usize = 512;
/// Unit of ownership and of zeroes, in bytes.
pub const BLOCK_BYTES: usize = 4096;
/// Sectors of a block.
pub const BLOCK_SECTORS: usize = BLOCK_BYTES / SECTOR_BYTES;

/// For each writer, up to which number its writes are known. Numbers begin at one.
pub type Clock = [u32; WRITERS];

/// Makes a clock know all that another one knows.
pub fn merge(clock: &mut Clock, other: &Clock) {
    for (own, other) in clock.iter_mut().zip(other) {
        *own = (*own).max(*other);
    }
}
