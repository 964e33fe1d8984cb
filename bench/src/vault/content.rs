//! What stands in the blocks of the disk: text, records, noise and zeroes in files of several sizes. Pure.
//!
//! Made of a seed alone, so that every run has the same. No two blocks are alike but the zero ones: what a peer
//! saves by finding duplicates is not what is compared.

use crate::load::next_random;
use crate::pattern::BLOCK_BYTES;

/// Longest file in blocks.
const FILE_BLOCKS_MAX: u64 = 64;
/// Words that text is made of.
const WORDS: u64 = 4096;
/// Shares of the kinds, in percent; the rest is zero.
const TEXT_PERCENT: u64 = 45;
const RECORDS_PERCENT: u64 = 30;
const NOISE_PERCENT: u64 = 17;

/// Makes content.
#[derive(Debug)]
pub struct Content {
    words: Vec<Vec<u8>>,
    seed: u64,
}

impl Content {
    /// Of a seed.
    pub fn new(seed: u64) -> Self {
        let mut random = seed;
        let words = (0..WORDS).map(|_| word(&mut random)).collect();
        Self { words, seed }
    }

    /// Fills bytes, a multiple of a block, with files; `place` tells these bytes from all others.
    pub fn fill(&self, bytes: &mut [u8], place: u64) {
        let mut random = self.begin(place);
        let mut rest = bytes;
        while !rest.is_empty() {
            let blocks = 1 + next_random(&mut random) % FILE_BLOCKS_MAX;
            let length = rest.len().min(blocks as usize * BLOCK_BYTES);
            let (file, behind) = rest.split_at_mut(length);
            self.fill_file(file, &mut random);
            rest = behind;
        }
    }

    /// A start of the random numbers. Mixed, as the numbers of near starts are the same ones but shifted.
    fn begin(&self, place: u64) -> u64 {
        let mixed = next_random(&mut self.seed.clone());
        next_random(&mut (mixed ^ place))
    }

    fn fill_file(&self, file: &mut [u8], random: &mut u64) {
        let kind = next_random(random) % 100;
        if kind < TEXT_PERCENT {
            self.fill_text(file, random);
        } else if kind < TEXT_PERCENT + RECORDS_PERCENT {
            fill_records(file, random);
        } else if kind < TEXT_PERCENT + RECORDS_PERCENT + NOISE_PERCENT {
            fill_noise(file, random);
        } else {
            file.fill(0);
        }
    }

    /// Words, the first ones of the list far more often than others, in lines.
    fn fill_text(&self, file: &mut [u8], random: &mut u64) {
        let (mut at, mut column) = (0, 0);
        while at < file.len() {
            let number = next_random(random);
            let bound = 1 + number % WORDS;
            let word = &self.words[((number >> 32) % bound) as usize];
            let count = word.len().min(file.len() - at);
            file[at..at + count].copy_from_slice(&word[..count]);
            at += count;
            column += count + 1;
            if let Some(separator) = file.get_mut(at) {
                *separator = if column > 70 { b'\n' } else { b' ' };
                column = if column > 70 { 0 } else { column };
                at += 1;
            }
        }
    }
}

fn word(random: &mut u64) -> Vec<u8> {
    let length = 2 + next_random(random) % 9;
    let letters = b"etaoinshrdlucmfwypvbgkjqxz";
    let letter = |random: &mut u64| {
        let number = next_random(random);
        letters[((number >> 32) % (1 + number % 26)) as usize]
    };
    (0..length).map(|_| letter(random)).collect()
}

/// Rows of 32 bytes as a database has them: a time that grows, a key, a few flags, a measure.
fn fill_records(file: &mut [u8], random: &mut u64) {
    let mut time = next_random(random) >> 20;
    for row in file.chunks_exact_mut(32) {
        let number = next_random(random);
        time += number % 5000;
        row[..8].copy_from_slice(&time.to_le_bytes());
        row[8..12].copy_from_slice(&((number >> 16) as u32 % 50_000).to_le_bytes());
        row[12..16].copy_from_slice(&[1 << (number >> 50 & 3), 0, 7, 0]);
        row[16..24].copy_from_slice(&next_random(random).to_le_bytes());
        row[24..].copy_from_slice(&((number >> 40) % 1000).to_be_bytes());
    }
}

fn fill_noise(file: &mut [u8], random: &mut u64) {
    for piece in file.chunks_exact_mut(8) {
        piece.copy_from_slice(&next_random(random).to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    const BYTES: usize = 8 << 20;

    fn filled(place: u64) -> Vec<u8> {
        let mut bytes = vec![0xee; BYTES];
        Content::new(7).fill(&mut bytes, place);
        bytes
    }

    #[test]
    fn the_same_seed_gives_the_same_and_each_place_its_own() {
        assert!(filled(3) == filled(3));
        let (mut seen, mut zeroes, mut others) = (HashSet::new(), 0, 0);
        for place in 0..4 {
            for block in filled(place).chunks(BLOCK_BYTES) {
                match block.iter().all(|byte| *byte == 0) {
                    true => zeroes += 1,
                    false => others += usize::from(!seen.insert(block.to_vec())),
                }
            }
        }
        assert_eq!(others, 0, "blocks are alike");
        assert!(zeroes > 0, "no zero blocks");
    }

    #[test]
    fn it_compresses_to_about_a_half() {
        let bytes = filled(1);
        let packed: usize = bytes
            .chunks(128 << 10)
            .map(|piece| zstd::bulk::compress(piece, 1).unwrap().len())
            .sum();
        let ratio = bytes.len() as f64 / packed as f64;
        assert!((1.6..2.6).contains(&ratio), "{ratio}");
    }
}
