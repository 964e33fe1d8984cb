//! Cutting extents into batches of blocks that are read and compressed together. Pure.

use tracker::extent::Extent;

use crate::error::Result;
use crate::segment::format::FRAME_BLOCKS_MAX;

/// Runs of one batch, so that scattered blocks do not make it endless.
const BATCH_RUNS_MAX: usize = 256;

/// Blocks of one kind, one behind the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The blocks.
    pub extent: Extent,
    /// They are known to be zero without reading them.
    pub hole: bool,
}

/// Blocks that are read and compressed together: at most [`FRAME_BLOCKS_MAX`] that are no holes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// The pieces, in ascending order.
    pub pieces: Vec<Piece>,
}

impl Batch {
    /// Blocks that have to be read.
    pub fn data_blocks(&self) -> usize {
        self.data().map(|extent| extent.block_count as usize).sum()
    }

    /// The extents that have to be read.
    pub fn data(&self) -> impl Iterator<Item = Extent> + '_ {
        let data = self.pieces.iter().filter(|piece| !piece.hole);
        data.map(|piece| piece.extent)
    }

    /// The block after the last one.
    pub fn end_block(&self) -> u64 {
        self.pieces
            .last()
            .map_or(0, |piece| piece.extent.end_block())
    }
}

/// Makes batches of pieces, which come in ascending order.
pub struct Batches<I> {
    pieces: I,
    /// What is left of the piece that did not fit.
    rest: Option<Piece>,
}

impl<I: Iterator<Item = Result<Piece>>> Batches<I> {
    /// Batches of these pieces.
    pub fn new(pieces: I) -> Self {
        Self { pieces, rest: None }
    }
}

impl<I: Iterator<Item = Result<Piece>>> Iterator for Batches<I> {
    type Item = Result<Batch>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut batch = Batch::default();
        let mut room = FRAME_BLOCKS_MAX as u64;
        while batch.pieces.len() < BATCH_RUNS_MAX {
            let next = self.rest.take().map(Ok).or_else(|| self.pieces.next());
            let mut piece = match next {
                None => break,
                Some(Err(error)) => return Some(Err(error)),
                Some(Ok(piece)) => piece,
            };
            if !piece.hole && piece.extent.block_count > room {
                let mut rest = piece;
                rest.extent.first_block += room;
                rest.extent.block_count -= room;
                self.rest = Some(rest);
                piece.extent.block_count = room;
            }
            if !piece.hole {
                room -= piece.extent.block_count;
            }
            if piece.extent.block_count > 0 {
                batch.pieces.push(piece);
            }
            if room == 0 || self.rest.is_some() {
                break;
            }
        }
        (!batch.pieces.is_empty()).then_some(Ok(batch))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn batches_hold_every_block_once_and_in_order(
            steps in prop::collection::vec((0u64..40, 1u64..200, any::<bool>()), 0..60)
        ) {
            let mut block = 0;
            let pieces: Vec<Piece> = steps
                .into_iter()
                .map(|(gap, block_count, hole)| {
                    let first_block = block + gap;
                    block = first_block + block_count;
                    Piece { extent: Extent { first_block, block_count }, hole }
                })
                .collect();
            let blocks = |pieces: &[Piece]| -> Vec<(u64, bool)> {
                let of = |piece: &Piece| {
                    let hole = piece.hole;
                    (piece.extent.first_block..piece.extent.end_block()).map(move |b| (b, hole))
                };
                pieces.iter().flat_map(of).collect()
            };
            let batches: Vec<Batch> =
                Batches::new(pieces.clone().into_iter().map(Ok)).map(|batch| batch.unwrap()).collect();
            for batch in &batches {
                prop_assert!(batch.data_blocks() <= FRAME_BLOCKS_MAX);
                prop_assert!(!batch.pieces.is_empty());
            }
            let all: Vec<Piece> = batches.into_iter().flat_map(|batch| batch.pieces).collect();
            prop_assert_eq!(blocks(&all), blocks(&pieces));
        }
    }
}
