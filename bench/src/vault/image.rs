//! The disk: a sparse image, half of it data in runs of several MiB; and guests' changes of it.

use std::collections::BTreeSet;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use super::content::Content;
use crate::Result;
use crate::cost::client::Client;
use crate::load::next_random;
use crate::pattern::BLOCK_BYTES;
use crate::servers::Running;

/// The disk is cut into windows, the first half of each is data.
const WINDOW_BYTES: u64 = 16 << 20;
const DATA_BYTES: u64 = WINDOW_BYTES / 2;
/// Threads that work on it: as many as the machine that the targets are for has processors.
pub const THREADS: usize = 2;
const SEED: u64 = 0x7469_6465_6d61_726b;

/// An image.
#[derive(Clone, Debug)]
pub struct DiskImage {
    path: PathBuf,
    size_bytes: u64,
}

impl DiskImage {
    /// Makes it, and syncs it.
    ///
    /// # Errors
    ///
    /// The size is no multiple of a window, or the file cannot be written.
    pub fn make(path: &Path, size_bytes: u64) -> Result<Self> {
        if size_bytes == 0 || !size_bytes.is_multiple_of(WINDOW_BYTES) {
            return Err("the disk's size must be a multiple of 16 MiB".into());
        }
        let file = File::create_new(path)?;
        file.set_len(size_bytes)?;
        let image = Self {
            path: path.to_owned(),
            size_bytes,
        };
        let content = Content::new(SEED);
        each(&image.extents(), |extent| {
            let mut bytes = vec![0; (extent.end - extent.start) as usize];
            content.fill(&mut bytes, extent.start);
            file.write_all_at(&bytes, extent.start)
        })?;
        file.sync_all()?;
        Ok(image)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its size.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Bytes that are no hole.
    pub fn data_bytes(&self) -> u64 {
        self.size_bytes / WINDOW_BYTES * DATA_BYTES
    }

    /// Where it has data.
    pub fn extents(&self) -> Vec<Range<u64>> {
        let windows = (0..self.size_bytes).step_by(WINDOW_BYTES as usize);
        windows.map(|from| from..from + DATA_BYTES).collect()
    }

    /// A guest writes so many blocks, of those that have data, each once and in no order. `round` makes them others.
    ///
    /// # Errors
    ///
    /// The server fails.
    pub fn change(&self, server: &Running, blocks: u64, round: u64) -> Result<()> {
        let mut random = next_random(&mut (SEED + round + 1));
        let blocks = blocks.min(self.data_bytes() / BLOCK_BYTES as u64 / 2);
        let mut chosen = BTreeSet::new();
        let mut places = Vec::new();
        while (places.len() as u64) < blocks {
            let number = next_random(&mut random) % (self.data_bytes() / BLOCK_BYTES as u64);
            if chosen.insert(number) {
                places.push(offset_of(number));
            }
        }
        let content = Content::new(SEED + round + 1);
        let mut client = Client::connect(server)?;
        client.write_data(BLOCK_BYTES, places.into_iter(), |offset, bytes| {
            content.fill(bytes, offset);
        })?;
        Ok(())
    }
}

/// Offset of a block, counted over the data alone.
fn offset_of(number: u64) -> u64 {
    let bytes = number * BLOCK_BYTES as u64;
    bytes / DATA_BYTES * WINDOW_BYTES + bytes % DATA_BYTES
}

/// Does something with each of these on several threads; the first error of each thread ends it.
///
/// # Errors
///
/// The first error of the first thread that has one.
pub fn each<T: Sync, E>(
    items: &[T],
    work: impl Fn(&T) -> std::result::Result<(), E> + Sync,
) -> Result<()>
where
    E: Into<Box<dyn std::error::Error>> + Send,
{
    let next = AtomicU64::new(0);
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS)
            .map(|_| {
                scope.spawn(|| {
                    while let Some(item) = items.get(next.fetch_add(1, Ordering::Relaxed) as usize)
                    {
                        work(item)?;
                    }
                    Ok(())
                })
            })
            .collect();
        for thread in threads {
            thread
                .join()
                .map_err(|_| "a thread panicked")?
                .map_err(|error: E| error.into())?;
        }
        Ok(())
    })
}

/// Whether two images have the same size and content.
///
/// # Errors
///
/// One cannot be read.
pub fn compare(one: &Path, other: &Path) -> Result<()> {
    let (first, second) = (File::open(one)?, File::open(other)?);
    let size_bytes = first.metadata()?.len();
    if second.metadata()?.len() != size_bytes {
        return Err(format!("{} has another size", other.display()).into());
    }
    let pieces: Vec<u64> = (0..size_bytes).step_by(DATA_BYTES as usize).collect();
    each(&pieces, |offset| {
        let length = (size_bytes - offset).min(DATA_BYTES) as usize;
        let mut both = [vec![0; length], vec![0; length]];
        first.read_exact_at(&mut both[0], *offset)?;
        second.read_exact_at(&mut both[1], *offset)?;
        if both[0] != both[1] {
            let what = format!("{} differs at {offset}", other.display());
            return Err(std::io::Error::other(what));
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_of_an_image_is_data_and_a_changed_byte_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let paths = ["one", "two"].map(|name| folder.path().join(name));
        let image = DiskImage::make(&paths[0], 2 * WINDOW_BYTES).unwrap();
        DiskImage::make(&paths[1], 2 * WINDOW_BYTES).unwrap();
        assert_eq!(image.data_bytes(), WINDOW_BYTES);
        compare(&paths[0], &paths[1]).unwrap();
        let file = File::options().write(true).open(&paths[1]).unwrap();
        file.write_all_at(&[1], 3 * DATA_BYTES).unwrap();
        assert!(compare(&paths[0], &paths[1]).is_err());
        assert!(DiskImage::make(&folder.path().join("odd"), 5 << 20).is_err());
    }

    #[test]
    fn blocks_are_counted_over_the_data() {
        let per_run = DATA_BYTES / BLOCK_BYTES as u64;
        assert_eq!(offset_of(per_run - 1), DATA_BYTES - BLOCK_BYTES as u64);
        assert_eq!(offset_of(per_run), WINDOW_BYTES);
    }
}
