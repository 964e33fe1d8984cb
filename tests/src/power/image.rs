//! What a file holds, and what a power cut leaves of it; pure.
//!
//! A file is a sparse map of pages. Since its last sync each page that changed keeps the content that
//! is durable and the ones that it has had since: any of them may have been written back before the
//! power went, in any order between pages, whole or by sectors. The size is kept in the same way.
//!
//! A page's history is bounded; what is left out lies in between, never the first or the last.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::seed::Random;

/// Unit of what is kept.
pub const PAGE_BYTES: u64 = 4096;
/// Unit that is never torn.
pub const SECTOR_BYTES: usize = 512;
/// Contents that a page keeps beside the present one.
const HISTORY_MAX: usize = 4;
/// Shares of what was not synced are counted in so many parts.
const SHARE_PARTS: u64 = 8;

type Page = [u8; PAGE_BYTES as usize];
/// `None`: a hole.
type Content = Option<Arc<Page>>;

/// What becomes of that which was not synced.
#[derive(Debug)]
pub enum Fate<'a> {
    /// All of it is lost.
    Lost,
    /// All of it was written back in time.
    Kept,
    /// Chance decides, anew for each file and piece.
    Mixed(&'a mut Random),
}

/// The content of a file.
#[derive(Clone, Debug, Default)]
pub struct Image {
    size: u64,
    pages: BTreeMap<u64, Arc<Page>>,
    /// Durable size and those since, without the present one; empty if the size is durable.
    sizes: Vec<u64>,
    /// The durable content of changed pages and those since, without the present one.
    unsynced: BTreeMap<u64, Vec<Content>>,
}

impl Image {
    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Bytes that are no holes.
    pub fn allocated_bytes(&self) -> u64 {
        self.pages.len() as u64 * PAGE_BYTES
    }

    /// Whether all of it is durable.
    pub fn is_synced(&self) -> bool {
        self.sizes.is_empty() && self.unsynced.is_empty()
    }

    /// At most `length` bytes from `offset` on; fewer at the end.
    pub fn read(&self, offset: u64, length: usize) -> Vec<u8> {
        let end = offset.saturating_add(length as u64).min(self.size);
        let mut bytes = vec![0; end.saturating_sub(offset) as usize];
        for (number, from, to) in pieces(offset, bytes.len() as u64) {
            if let Some(page) = self.pages.get(&number) {
                let begin = (number * PAGE_BYTES + from as u64 - offset) as usize;
                bytes[begin..begin + to - from].copy_from_slice(&page[from..to]);
            }
        }
        bytes
    }

    /// Writes; the file grows as needed.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) {
        let end = offset + bytes.len() as u64;
        for (number, from, to) in pieces(offset, bytes.len() as u64) {
            let begin = (number * PAGE_BYTES + from as u64 - offset) as usize;
            let mut page = self.page(number);
            page[from..to].copy_from_slice(&bytes[begin..begin + to - from]);
            self.replace(number, Some(Arc::new(page)));
        }
        if end > self.size {
            self.resize(end);
        }
    }

    /// Makes a range zeroes, and holes of its whole pages. The size stays.
    pub fn punch(&mut self, offset: u64, length: u64) {
        let end = offset.saturating_add(length).min(self.size);
        self.clear(offset, end);
    }

    /// Sets the size.
    pub fn truncate(&mut self, size: u64) {
        if size < self.size {
            self.clear(size, self.size);
        }
        if size != self.size {
            self.resize(size);
        }
    }

    /// The first byte of data from `offset` on; `None` if there is none.
    pub fn next_data(&self, offset: u64) -> Option<u64> {
        let (number, _page) = self.pages.range(offset / PAGE_BYTES..).next()?;
        let begin = (number * PAGE_BYTES).max(offset);
        (begin < self.size).then_some(begin)
    }

    /// The first byte of a hole from `offset` on; the end counts as one.
    pub fn next_hole(&self, offset: u64) -> Option<u64> {
        if offset >= self.size {
            return None;
        }
        let mut number = offset / PAGE_BYTES;
        while self.pages.contains_key(&number) {
            number += 1;
        }
        Some((number * PAGE_BYTES).max(offset).min(self.size))
    }

    /// Makes all of it durable.
    pub fn sync(&mut self) {
        self.sizes.clear();
        self.unsynced.clear();
    }

    /// Makes a range and the size durable, as a single write with `O_DSYNC` does.
    pub fn sync_range(&mut self, offset: u64, length: u64) {
        self.sizes.clear();
        for (number, _from, _to) in pieces(offset, length) {
            self.unsynced.remove(&number);
        }
    }

    /// What is left after a power cut; all of it is durable.
    #[must_use]
    pub fn after_power_cut(&self, fate: &mut Fate<'_>) -> Self {
        let mut left = self.clone();
        left.sync();
        let mut survivor = Survivor::new(fate);
        left.size = survivor.pick(&self.sizes, &self.size);
        for (number, history) in &self.unsynced {
            let present = self.pages.get(number).cloned();
            match survivor.page(history, present) {
                Some(page) => left.pages.insert(*number, page),
                None => left.pages.remove(number),
            };
        }
        let end = left.size;
        left.pages.retain(|number, _page| number * PAGE_BYTES < end);
        if let Some(page) = left.pages.get_mut(&(end / PAGE_BYTES)) {
            Arc::make_mut(page)[(end % PAGE_BYTES) as usize..].fill(0);
        }
        left
    }

    fn page(&self, number: u64) -> Page {
        self.pages
            .get(&number)
            .map_or([0; PAGE_BYTES as usize], |page| **page)
    }

    fn clear(&mut self, begin: u64, end: u64) {
        let whole = begin.div_ceil(PAGE_BYTES)..end.div_ceil(PAGE_BYTES);
        // The last page is whole too where nothing lies behind the end.
        let whole = if end < self.size {
            whole.start..end / PAGE_BYTES
        } else {
            whole
        };
        let first = begin / PAGE_BYTES;
        let last = end.div_ceil(PAGE_BYTES);
        let numbers: Vec<u64> = self.pages.range(first..last).map(|(n, _)| *n).collect();
        for number in numbers {
            if whole.contains(&number) {
                self.replace(number, None);
                continue;
            }
            let from = begin.saturating_sub(number * PAGE_BYTES) as usize;
            let to = (end - number * PAGE_BYTES).min(PAGE_BYTES) as usize;
            let mut page = self.page(number);
            page[from..to].fill(0);
            self.replace(number, Some(Arc::new(page)));
        }
    }

    fn replace(&mut self, number: u64, content: Content) {
        let before = match content {
            Some(page) => self.pages.insert(number, page),
            None => self.pages.remove(&number),
        };
        let history = self.unsynced.entry(number).or_default();
        if history.len() == HISTORY_MAX {
            history.remove(1);
        }
        history.push(before);
    }

    fn resize(&mut self, size: u64) {
        if self.sizes.len() == HISTORY_MAX {
            self.sizes.remove(1);
        }
        self.sizes.push(self.size);
        self.size = size;
    }
}

/// The pages of a range: number, and where the range begins and ends in it.
fn pieces(offset: u64, length: u64) -> impl Iterator<Item = (u64, usize, usize)> {
    let end = offset + length;
    (offset / PAGE_BYTES..end.div_ceil(PAGE_BYTES)).filter_map(move |number| {
        let base = number * PAGE_BYTES;
        let from = offset.saturating_sub(base) as usize;
        let to = (end - base).min(PAGE_BYTES) as usize;
        (from < to).then_some((number, from, to))
    })
}

/// Chooses for one file. Files differ in how much of them survives and whether pages are torn.
enum Survivor<'a> {
    Lost,
    Kept,
    Mixed {
        random: &'a mut Random,
        share: u64,
        torn: bool,
    },
}

impl<'a> Survivor<'a> {
    fn new(fate: &'a mut Fate<'_>) -> Self {
        match fate {
            Fate::Lost => Self::Lost,
            Fate::Kept => Self::Kept,
            Fate::Mixed(random) => Self::Mixed {
                // All or nothing of one file beside some of another is what hurts most.
                share: match random.below(4) {
                    0 => 0,
                    1 => SHARE_PARTS,
                    _ => random.between(0, SHARE_PARTS),
                },
                torn: random.chance(1, 2),
                random,
            },
        }
    }

    /// One of the durable, the later and the present value.
    fn pick<T: Clone>(&mut self, history: &[T], present: &T) -> T {
        let Some(durable) = history.first() else {
            return present.clone();
        };
        match self {
            Self::Lost => durable.clone(),
            Self::Kept => present.clone(),
            Self::Mixed { random, share, .. } => {
                if !random.chance(*share, SHARE_PARTS) {
                    return durable.clone();
                }
                let later = random.between(1, 2 * history.len() as u64) as usize;
                history.get(later).unwrap_or(present).clone()
            }
        }
    }

    fn page(&mut self, history: &[Content], present: Content) -> Content {
        if !matches!(self, Self::Mixed { torn: true, .. }) {
            return self.pick(history, &present);
        }
        let mut page = [0; PAGE_BYTES as usize];
        let mut is_data = false;
        for (index, sector) in page.chunks_exact_mut(SECTOR_BYTES).enumerate() {
            if let Some(from) = self.pick(history, &present) {
                let begin = index * SECTOR_BYTES;
                sector.copy_from_slice(&from[begin..begin + SECTOR_BYTES]);
                is_data = true;
            }
        }
        is_data.then(|| Arc::new(page))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(tag: u8) -> Vec<u8> {
        vec![tag; 3 * PAGE_BYTES as usize]
    }

    fn image() -> Image {
        let mut image = Image::default();
        image.write(0, &written(1));
        image.sync();
        image
    }

    #[test]
    fn what_is_synced_stays() {
        let mut image = image();
        for seed in 0..50 {
            let mut random = Random::new(seed);
            let left = image.after_power_cut(&mut Fate::Mixed(&mut random));
            assert_eq!(left.read(0, 1 << 20), written(1));
        }
        image.write(PAGE_BYTES, &[2; 100]);
        image.sync_range(PAGE_BYTES, 100);
        image.write(100, &[3; 10]);
        let left = image.after_power_cut(&mut Fate::Lost);
        assert_eq!(left.read(PAGE_BYTES, 101), [&[2; 100][..], &[1]].concat());
        assert_eq!(left.read(100, 10), [1; 10]);
    }

    #[test]
    fn what_is_not_synced_may_be_old_new_in_between_or_torn() {
        let mut image = image();
        image.write(0, &[2; PAGE_BYTES as usize]);
        image.write(0, &[3; PAGE_BYTES as usize]);
        let mut seen = std::collections::BTreeSet::new();
        let mut torn = false;
        for seed in 0..200 {
            let mut random = Random::new(seed);
            let left = image.after_power_cut(&mut Fate::Mixed(&mut random));
            let bytes = left.read(0, PAGE_BYTES as usize);
            seen.insert(bytes[0]);
            torn |= bytes.iter().any(|byte| *byte != bytes[0]);
            for sector in bytes.chunks_exact(SECTOR_BYTES) {
                assert!(sector.iter().all(|byte| *byte == sector[0]));
            }
            assert_eq!(left.read(PAGE_BYTES, 4), [1; 4]);
        }
        assert_eq!(seen.into_iter().collect::<Vec<_>>(), [1, 2, 3]);
        assert!(torn);
    }

    #[test]
    fn the_size_may_be_old_or_new() {
        let mut image = image();
        image.truncate(100);
        image.truncate(2 * PAGE_BYTES);
        assert_eq!(image.read(0, 101), [&[1; 100][..], &[0]].concat());
        let left = image.after_power_cut(&mut Fate::Lost);
        assert_eq!(left.read(0, 1 << 20), written(1));
        let left = image.after_power_cut(&mut Fate::Kept);
        assert_eq!(left.size(), 2 * PAGE_BYTES);
        assert_eq!(left.read(99, 2), [1, 0]);
        let mut sizes = std::collections::BTreeSet::new();
        for seed in 0..100 {
            let mut random = Random::new(seed);
            let left = image.after_power_cut(&mut Fate::Mixed(&mut random));
            sizes.insert(left.size());
        }
        assert_eq!(
            sizes.into_iter().collect::<Vec<_>>(),
            [100, 2 * PAGE_BYTES, 3 * PAGE_BYTES]
        );
    }

    #[test]
    fn holes_are_found() {
        let mut image = image();
        image.truncate(5 * PAGE_BYTES);
        image.punch(100, 2 * PAGE_BYTES);
        assert_eq!(image.read(99, 3), [1, 0, 0]);
        assert_eq!(image.read(2 * PAGE_BYTES + 99, 2), [0, 1]);
        assert_eq!(image.next_hole(0), Some(PAGE_BYTES));
        assert_eq!(image.next_data(PAGE_BYTES), Some(2 * PAGE_BYTES));
        assert_eq!(image.next_hole(2 * PAGE_BYTES), Some(3 * PAGE_BYTES));
        assert_eq!(image.next_data(3 * PAGE_BYTES), None);
        assert_eq!(image.next_hole(5 * PAGE_BYTES), None);
        assert_eq!(image.allocated_bytes(), 2 * PAGE_BYTES);
        assert!(!image.is_synced());
    }
}
