//! What a disk may hold after a power cut: for every sector the contents that were not ruled out.
//!
//! A write is *kept* once it was answered and a FLUSH that was sent after its answer was answered, or
//! once it was answered and had FUA. A kept write rules out each content that was answered before it
//! was sent. All others stay possible, sector by sector: the writes not kept, the last one that was,
//! and what was in flight. TRIM promises nothing, so it rules out nothing.

use std::collections::BTreeMap;

use super::image::SECTOR_BYTES;
use crate::model::{Change, pattern};

const SECTOR: u64 = SECTOR_BYTES as u64;

#[derive(Clone, Copy, Debug)]
struct Version {
    tag: u32,
    sent: u64,
    answered: Option<u64>,
    /// Whether it rules out others once it is kept.
    rules_out: bool,
    kept: bool,
}

/// A request that was sent.
#[derive(Clone, Copy, Debug)]
pub struct Sent {
    first_sector: u64,
    sector_count: u64,
    moment: u64,
}

/// What one disk may hold.
#[derive(Debug)]
pub struct Promises {
    sectors: u64,
    /// The one content of sectors that are neither empty nor open.
    settled: BTreeMap<u64, u32>,
    open: BTreeMap<u64, Vec<Version>>,
    moment: u64,
    /// Answers to flushes, which ruled out what stood before.
    flushes: u64,
}

impl Promises {
    /// A disk of zeroes.
    pub fn new(size_bytes: u64) -> Self {
        Self {
            sectors: size_bytes / SECTOR,
            settled: BTreeMap::new(),
            open: BTreeMap::new(),
            moment: 1,
            flushes: 0,
        }
    }

    /// Size of the disk in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.sectors * SECTOR
    }

    /// Sectors that may hold more than one content.
    pub fn open_sectors(&self) -> usize {
        self.open.len()
    }

    /// Flushes that were answered.
    pub fn flushes(&self) -> u64 {
        self.flushes
    }

    fn next(&mut self) -> u64 {
        self.moment += 1;
        self.moment
    }

    /// Call before a change is sent.
    pub fn send(&mut self, change: Change, offset: u64, length_bytes: u64) -> Sent {
        let sent = Sent {
            first_sector: offset / SECTOR,
            sector_count: length_bytes / SECTOR,
            moment: self.next(),
        };
        let tag = match change {
            Change::Write(tag) => tag,
            Change::Zero | Change::Trim => 0,
        };
        for sector in sent.first_sector..sent.first_sector + sent.sector_count {
            let before = Version {
                tag: self.settled.get(&sector).copied().unwrap_or_default(),
                sent: 0,
                answered: Some(0),
                rules_out: true,
                kept: true,
            };
            let versions = self.open.entry(sector).or_insert_with(|| vec![before]);
            versions.push(Version {
                tag,
                sent: sent.moment,
                answered: None,
                rules_out: change != Change::Trim,
                kept: false,
            });
        }
        sent
    }

    /// Call when a change was answered with success.
    pub fn answered(&mut self, request: &Sent, fua: bool) {
        let now = self.next();
        for sector in request.first_sector..request.first_sector + request.sector_count {
            let Some(versions) = self.open.get_mut(&sector) else {
                continue;
            };
            for version in versions.iter_mut().filter(|v| v.sent == request.moment) {
                version.answered = Some(now);
                version.kept = fua;
            }
            if fua {
                self.rule_out(sector);
            }
        }
    }

    /// Call before a FLUSH is sent; the number goes to [`Promises::flushed`].
    pub fn send_flush(&mut self) -> u64 {
        self.next()
    }

    /// Call when a FLUSH was answered with success, on whichever connection.
    pub fn flushed(&mut self, sent: u64) {
        self.next();
        self.flushes += 1;
        let sectors: Vec<u64> = self.open.keys().copied().collect();
        for sector in sectors {
            for version in self.open.get_mut(&sector).into_iter().flatten() {
                version.kept |= version.answered.is_some_and(|answered| answered < sent);
            }
            self.rule_out(sector);
        }
    }

    fn rule_out(&mut self, sector: u64) {
        let Some(versions) = self.open.get_mut(&sector) else {
            return;
        };
        let ruling = |v: &&Version| v.kept && v.rules_out;
        let latest = versions.iter().filter(ruling).map(|v| v.sent).max();
        let latest = latest.unwrap_or_default();
        versions.retain(|v| v.sent == latest || v.answered.is_none_or(|at| at >= latest));
        if let [only] = versions[..]
            && only.kept
        {
            settle(&mut self.settled, sector, only.tag);
            self.open.remove(&sector);
        }
    }

    /// Compares a disk's bytes, from `offset` on, with what it may hold.
    ///
    /// # Errors
    ///
    /// The first sector that holds something else, in words.
    pub fn check(&self, offset: u64, bytes: &[u8]) -> Result<(), String> {
        for (index, found) in bytes.chunks_exact(SECTOR_BYTES).enumerate() {
            let sector = offset / SECTOR + index as u64;
            let tag = tag_of(found, sector);
            let allowed = tag.is_some_and(|tag| self.allows(sector, tag));
            if !allowed {
                return Err(self.describe(sector, tag));
            }
        }
        Ok(())
    }

    /// The same for a hole of the disk's file, which is not read.
    ///
    /// # Errors
    ///
    /// The first sector that may not be empty, in words.
    pub fn check_hole(&self, begin: u64, end: u64) -> Result<(), String> {
        let range = begin / SECTOR..end / SECTOR;
        let settled = self.settled.range(range.clone()).map(|(sector, _)| *sector);
        let open = self.open.range(range).map(|(sector, _)| *sector);
        match settled.chain(open).find(|sector| !self.allows(*sector, 0)) {
            Some(sector) => Err(self.describe(sector, Some(0))),
            None => Ok(()),
        }
    }

    fn allows(&self, sector: u64, tag: u32) -> bool {
        match self.open.get(&sector) {
            Some(versions) => versions.iter().any(|version| version.tag == tag),
            None => tag == self.settled.get(&sector).copied().unwrap_or_default(),
        }
    }

    fn describe(&self, sector: u64, found: Option<u32>) -> String {
        let allowed = match self.open.get(&sector) {
            Some(versions) => format!("{versions:?}"),
            None => format!("tag {:?} alone", self.settled.get(&sector)),
        };
        let found = found.map_or("nothing that was ever written".to_owned(), |tag| {
            format!("tag {tag}")
        });
        let place = sector * SECTOR;
        format!("sector {sector} (byte {place}) holds {found}, allowed is {allowed}")
    }

    /// Takes what a disk holds as the truth from here on; call after [`Promises::check`] has passed
    /// for it, after a power cut and before anything is sent.
    pub fn settle(&mut self, mut read_sector: impl FnMut(u64) -> Vec<u8>) {
        for (sector, _versions) in std::mem::take(&mut self.open) {
            let tag = tag_of(&read_sector(sector * SECTOR), sector);
            settle(&mut self.settled, sector, tag.unwrap_or_default());
        }
    }
}

fn settle(settled: &mut BTreeMap<u64, u32>, sector: u64, tag: u32) {
    if tag == 0 {
        settled.remove(&sector);
    } else {
        settled.insert(sector, tag);
    }
}

/// The tag of a sector's content; `None` if it is no tag's, or of another sector.
fn tag_of(bytes: &[u8], sector: u64) -> Option<u32> {
    if bytes.iter().all(|byte| *byte == 0) {
        return Some(0);
    }
    let tag = u32::from_le_bytes([bytes[8], bytes[9], bytes[10], bytes[11]]);
    (bytes == pattern(tag, sector * SECTOR, SECTOR)).then_some(tag)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 16 * SECTOR;

    fn may_hold(promises: &Promises, tag: u32) -> bool {
        let bytes = match tag {
            0 => vec![0; SIZE as usize],
            tag => pattern(tag, 0, SIZE),
        };
        promises.check(0, &bytes).is_ok()
    }

    fn write(promises: &mut Promises, tag: u32, fua: bool) {
        let sent = promises.send(Change::Write(tag), 0, SIZE);
        promises.answered(&sent, fua);
    }

    #[test]
    fn an_answer_promises_nothing_and_a_flush_after_it_does() {
        let mut promises = Promises::new(SIZE);
        let early = promises.send_flush();
        write(&mut promises, 1, false);
        promises.flushed(early);
        assert!(may_hold(&promises, 0) && may_hold(&promises, 1));
        let flush = promises.send_flush();
        promises.flushed(flush);
        assert!(!may_hold(&promises, 0) && may_hold(&promises, 1));
        assert_eq!(promises.open_sectors(), 0);
        write(&mut promises, 2, false);
        write(&mut promises, 3, false);
        assert!((1..=3).all(|tag| may_hold(&promises, tag)) && !may_hold(&promises, 4));
    }

    #[test]
    fn fua_rules_out_what_was_before() {
        let mut promises = Promises::new(SIZE);
        write(&mut promises, 1, false);
        let beside = promises.send(Change::Write(2), 0, SIZE);
        write(&mut promises, 3, true);
        assert!(!may_hold(&promises, 0) && !may_hold(&promises, 1));
        assert!(may_hold(&promises, 2) && may_hold(&promises, 3));
        promises.answered(&beside, false);
        assert!(may_hold(&promises, 2) && may_hold(&promises, 3));
        write(&mut promises, 4, true);
        assert!(!may_hold(&promises, 3) && may_hold(&promises, 4));
    }

    #[test]
    fn a_trim_rules_out_nothing() {
        let mut promises = Promises::new(SIZE);
        write(&mut promises, 1, true);
        let sent = promises.send(Change::Trim, 0, SIZE);
        promises.answered(&sent, true);
        assert!(may_hold(&promises, 0) && may_hold(&promises, 1));
        let flush = promises.send_flush();
        promises.flushed(flush);
        assert!(may_hold(&promises, 0) && may_hold(&promises, 1));
        promises.settle(|_| vec![0; SECTOR_BYTES]);
        assert!(may_hold(&promises, 0) && !may_hold(&promises, 1));
        assert!(promises.check_hole(0, SIZE).is_ok());
        write(&mut promises, 2, false);
        assert!(promises.check_hole(0, SIZE).is_ok());
        write(&mut promises, 3, true);
        assert!(promises.check_hole(0, SIZE).is_err());
    }

    #[test]
    fn sectors_may_be_mixed_and_never_misplaced() {
        let mut promises = Promises::new(SIZE);
        write(&mut promises, 1, false);
        let mut bytes = pattern(1, 0, SIZE);
        bytes[SECTOR_BYTES..2 * SECTOR_BYTES].fill(0);
        assert!(promises.check(0, &bytes).is_ok());
        bytes.copy_within(..SECTOR_BYTES, 2 * SECTOR_BYTES);
        assert!(promises.check(0, &bytes).is_err());
    }
}
