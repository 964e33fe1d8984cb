//! What bounds any copy: reading the disk, and compressing what is read.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Instant;

use super::image::{DiskImage, THREADS, each};
use crate::Result;
use crate::pattern::BLOCK_BYTES;

/// Bytes that are compressed together, as the vault's frames have them.
const PIECE_BYTES: usize = 128 << 10;
const READ_BYTES: usize = 1 << 20;
/// Compression level of the vault unless the configuration says otherwise.
const LEVEL: i32 = 1;

/// Seconds that it takes to read all data of the disk.
///
/// # Errors
///
/// It cannot be read.
pub fn read(image: &DiskImage) -> Result<f64> {
    let file = File::open(image.path())?;
    let begin = Instant::now();
    each(&image.extents(), |extent| {
        let mut bytes = vec![0; READ_BYTES];
        for offset in extent.clone().step_by(READ_BYTES) {
            file.read_exact_at(&mut bytes, offset)?;
        }
        Ok::<(), std::io::Error>(())
    })?;
    Ok(begin.elapsed().as_secs_f64())
}

/// What the codec made of the disk.
#[derive(Clone, Copy, Debug, Default)]
pub struct Packed {
    /// Seconds of compression alone, on all threads at once.
    pub seconds: f64,
    /// Bytes of all frames, of which none is larger than what is in it.
    pub bytes: u64,
}

/// Compresses all data of the disk but its zero blocks. Only the codec's own time counts.
///
/// # Errors
///
/// The disk cannot be read, or the codec fails.
pub fn pack(image: &DiskImage) -> Result<Packed> {
    let file = File::open(image.path())?;
    let mut packed = Packed::default();
    for extents in image.extents().chunks(8 * THREADS) {
        let mut pieces = Vec::new();
        for extent in extents {
            let mut bytes = vec![0; (extent.end - extent.start) as usize];
            file.read_exact_at(&mut bytes, extent.start)?;
            pieces.extend(bytes.chunks(PIECE_BYTES).map(without_zeroes));
        }
        pieces.retain(|piece| !piece.is_empty());
        let begin = Instant::now();
        packed.bytes += pack_all(&pieces)?;
        packed.seconds += begin.elapsed().as_secs_f64();
    }
    Ok(packed)
}

fn without_zeroes(piece: &[u8]) -> Vec<u8> {
    let blocks = piece.chunks(BLOCK_BYTES);
    let kept = blocks.filter(|block| block.iter().any(|byte| *byte != 0));
    kept.flatten().copied().collect()
}

/// Sum of the sizes. The threads share the work by parts that each has a compressor for.
fn pack_all(pieces: &[Vec<u8>]) -> Result<u64> {
    let sum = std::sync::atomic::AtomicU64::new(0);
    let parts: Vec<&[Vec<u8>]> = pieces.chunks(64).collect();
    each(&parts, |part| {
        let mut compressor = zstd::bulk::Compressor::new(LEVEL)?;
        let mut target = vec![0; zstd::zstd_safe::compress_bound(PIECE_BYTES)];
        for piece in *part {
            let count = compressor.compress_to_buffer(piece, &mut target)?;
            sum.fetch_add(
                count.min(piece.len()) as u64,
                std::sync::atomic::Ordering::Relaxed,
            );
        }
        Ok::<(), std::io::Error>(())
    })?;
    Ok(sum.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_blocks_are_left_out_and_noise_is_not_blown_up() {
        let mut piece = vec![0; 3 * BLOCK_BYTES];
        piece[BLOCK_BYTES + 5] = 1;
        assert_eq!(without_zeroes(&piece), piece[BLOCK_BYTES..2 * BLOCK_BYTES]);
        let mut random = 1;
        let noise: Vec<u8> = (0..2048)
            .flat_map(|_| crate::load::next_random(&mut random).to_le_bytes())
            .collect();
        let size = noise.len() as u64;
        assert_eq!(pack_all(&[noise]).unwrap(), size);
    }
}
