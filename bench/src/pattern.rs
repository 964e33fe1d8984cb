//! What stands in the blocks, so that data read can be checked. Pure.
//!
//! A block of 4 KiB is one 8-byte word over and over, made of the block's number and a version.
//! An image begins with version 0 everywhere; the light client writes version 1. So data in the wrong
//! place, torn data and lost writes are seen.

/// Bytes of one block.
pub const BLOCK_BYTES: usize = 4096;

/// Which writing of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// As the image was made.
    Old,
    /// As the client writes it.
    New,
}

fn word(block: u64, version: Version) -> [u8; 8] {
    let mixed = (block + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed << 1 | u64::from(version == Version::New)).to_le_bytes()
}

/// Fills bytes that will stand at an offset; both are multiples of a block.
pub fn fill(bytes: &mut [u8], offset: u64, version: Version) {
    let first = offset / BLOCK_BYTES as u64;
    for (block, piece) in (first..).zip(bytes.chunks_mut(BLOCK_BYTES)) {
        let word = word(block, version);
        for place in piece.chunks_exact_mut(word.len()) {
            place.copy_from_slice(&word);
        }
    }
}

/// The offset of the first word that is wrong, of bytes read at an offset; both are multiples of a
/// block. Unless only the new version will do, each word may be of either, as a write may be under way.
pub fn first_wrong(bytes: &[u8], offset: u64, only_new: bool) -> Option<u64> {
    let mut at = offset;
    for piece in bytes.chunks(BLOCK_BYTES) {
        let block = at / BLOCK_BYTES as u64;
        let new = word(block, Version::New);
        let old = if only_new {
            new
        } else {
            word(block, Version::Old)
        };
        for found in piece.chunks_exact(new.len()) {
            if *found != new && *found != old {
                return Some(at);
            }
            at += new.len() as u64;
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_filled_is_right_and_one_flipped_bit_is_found() {
        let mut bytes = vec![0; 3 * BLOCK_BYTES];
        let offset = 7 * BLOCK_BYTES as u64;
        fill(&mut bytes, offset, Version::New);
        assert_eq!(first_wrong(&bytes, offset, true), None);
        bytes[5001] ^= 1;
        assert_eq!(first_wrong(&bytes, offset, false), Some(offset + 5000));
    }

    #[test]
    fn another_place_and_an_older_version_are_wrong() {
        let mut bytes = vec![0; BLOCK_BYTES];
        fill(&mut bytes, 0, Version::Old);
        assert_eq!(first_wrong(&bytes, 0, false), None);
        assert_eq!(first_wrong(&bytes, 0, true), Some(0));
        assert_eq!(first_wrong(&bytes, 4096, false), Some(4096));
    }
}
