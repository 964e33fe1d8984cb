//! Holes of the disk among the blocks of a closed epoch.

use tracker::preserve::reader::PreserveReader;

use super::plan::Piece;
use crate::error::Result;

/// Looks at pieces that were found on the disk a moment ago: holes that guests have made, or filled, since the cut
/// become blocks to be read, whose content is preserved; all other holes are captured with that.
pub fn settle_holes<'a>(
    pieces: impl Iterator<Item = Result<Piece>> + 'a,
    frozen: &'a PreserveReader,
) -> impl Iterator<Item = Result<Piece>> + 'a {
    pieces.flat_map(|piece| match piece {
        Ok(Piece { extent, hole: true }) => {
            let parts = frozen.split_hole(extent);
            let pieces = parts
                .into_iter()
                .map(|(extent, hole)| Ok(Piece { extent, hole }));
            pieces.collect()
        }
        other => vec![other],
    })
}
