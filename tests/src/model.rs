//! A model of a disk: for every sector, the contents that it may hold now.
//!
//! A request may take effect at any moment between being sent and being answered, and one that was
//! never answered may have taken effect or not. So a sector has *candidates*: contents with the
//! moments at which their request was sent and answered. The answer to a request sent at `s` rules
//! out every candidate that was answered before `s`. Moments are numbers of a counter, not clocks.
//!
//! Content is named by a tag: zero is the empty sector, any other number a pattern made from tag and
//! sector, so that misplaced data is as visible as stale data.

use std::collections::HashMap;

use crate::nbd::{Client, Failure};
use crate::seed::mix;

/// Unit of the model in bytes.
pub const SECTOR_BYTES: u64 = 512;

/// A content with the time of its request.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    tag: u32,
    answered: Option<u64>,
}

/// What a request does to its range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// The pattern of this tag; never zero.
    Write(u32),
    /// Zeroes.
    Zero,
    /// Zeroes, or left as it was: NBD promises nothing of a trimmed range.
    Trim,
}

/// A request that was sent.
#[derive(Clone, Copy, Debug)]
pub struct Sent {
    change: Change,
    first_sector: u64,
    sector_count: u64,
    sent: u64,
}

/// The model of one disk.
#[derive(Debug)]
pub struct Model {
    /// The one content of a sector without candidates.
    settled: Vec<u32>,
    contested: HashMap<u64, Vec<Candidate>>,
    moment: u64,
}

impl Model {
    /// A disk of zeroes.
    pub fn new(size_bytes: u64) -> Self {
        Self {
            settled: vec![0; (size_bytes / SECTOR_BYTES) as usize],
            contested: HashMap::new(),
            moment: 1,
        }
    }

    /// Size of the disk in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.settled.len() as u64 * SECTOR_BYTES
    }

    /// Call before the request is sent.
    pub fn send(&mut self, change: Change, offset: u64, length_bytes: u64) -> Sent {
        self.moment += 1;
        let sent = Sent {
            change,
            first_sector: offset / SECTOR_BYTES,
            sector_count: length_bytes / SECTOR_BYTES,
            sent: self.moment,
        };
        let tag = match change {
            Change::Write(tag) => tag,
            Change::Zero | Change::Trim => 0,
        };
        for sector in sent.first_sector..sent.first_sector + sent.sector_count {
            let settled = self.settled[sector as usize];
            self.contested
                .entry(sector)
                .or_insert_with(|| {
                    vec![Candidate {
                        tag: settled,
                        answered: Some(0),
                    }]
                })
                .push(Candidate {
                    tag,
                    answered: None,
                });
        }
        sent
    }

    /// Call when the request was answered with success.
    pub fn answered(&mut self, request: &Sent) {
        self.moment += 1;
        let tag = match request.change {
            Change::Write(tag) => tag,
            Change::Zero | Change::Trim => 0,
        };
        for sector in request.first_sector..request.first_sector + request.sector_count {
            let Some(candidates) = self.contested.get_mut(&sector) else {
                continue;
            };
            let own = candidates
                .iter_mut()
                .find(|candidate| candidate.tag == tag && candidate.answered.is_none());
            if let Some(own) = own {
                own.answered = Some(self.moment);
            }
            if request.change != Change::Trim {
                candidates.retain(|c| c.answered.is_none_or(|at| at >= request.sent));
            }
            if let [only] = candidates[..]
                && only.answered.is_some()
            {
                self.settled[sector as usize] = only.tag;
                self.contested.remove(&sector);
            }
        }
    }

    /// Has a client make a change, and notes its answer.
    ///
    /// # Errors
    ///
    /// The client's; whether the change took effect is open then.
    pub fn change(
        &mut self,
        client: &mut Client,
        change: Change,
        offset: u64,
        length_bytes: u64,
    ) -> Result<(), Failure> {
        let sent = self.send(change, offset, length_bytes);
        match change {
            Change::Write(tag) => client.write(offset, &pattern(tag, offset, length_bytes)),
            Change::Zero => client.zero(offset, length_bytes as u32),
            Change::Trim => client.trim(offset, length_bytes as u32),
        }?;
        self.answered(&sent);
        Ok(())
    }

    /// The connections are gone: what was not answered has taken effect by now, or never will.
    pub fn crashed(&mut self) {
        self.moment += 1;
        for candidates in self.contested.values_mut() {
            for candidate in candidates {
                candidate.answered.get_or_insert(self.moment);
            }
        }
    }

    /// Compares a disk's bytes, from `offset` on, with what it may hold.
    ///
    /// # Errors
    ///
    /// The first sector that holds something else, in words.
    pub fn check(&self, offset: u64, bytes: &[u8]) -> Result<(), String> {
        let first = offset / SECTOR_BYTES;
        for (index, found) in bytes.chunks_exact(SECTOR_BYTES as usize).enumerate() {
            let sector = first + index as u64;
            let allowed = |tag: u32| holds(found, tag, sector);
            let right = match self.contested.get(&sector) {
                Some(candidates) => candidates.iter().any(|candidate| allowed(candidate.tag)),
                None => allowed(self.settled[sector as usize]),
            };
            if !right {
                return Err(self.describe(sector, found));
            }
        }
        Ok(())
    }

    /// Takes what a disk holds as the truth from here on; call after [`Model::check`] has passed
    /// and while nothing is in flight.
    pub fn settle(&mut self, mut read_sector: impl FnMut(u64) -> Vec<u8>) {
        for (sector, candidates) in std::mem::take(&mut self.contested) {
            let found = read_sector(sector);
            let tag = candidates
                .iter()
                .find(|candidate| holds(&found, candidate.tag, sector));
            self.settled[sector as usize] = tag.map_or(0, |candidate| candidate.tag);
        }
    }

    /// Sectors with more than one possible content.
    pub fn contested_sectors(&self) -> usize {
        self.contested.len()
    }

    fn describe(&self, sector: u64, found: &[u8]) -> String {
        let allowed: Vec<u32> = match self.contested.get(&sector) {
            Some(candidates) => candidates.iter().map(|candidate| candidate.tag).collect(),
            None => vec![self.settled[sector as usize]],
        };
        let tag = u32::from_le_bytes([found[8], found[9], found[10], found[11]]);
        let seen = if found.iter().all(|byte| *byte == 0) {
            "zeroes".to_owned()
        } else if holds(found, tag, sector) {
            format!("tag {tag}")
        } else {
            format!("{:02x?} and so on", &found[..24])
        };
        format!(
            "sector {sector} (byte {}) holds {seen}, allowed are the tags {allowed:?}",
            sector * SECTOR_BYTES
        )
    }
}

/// The bytes of a write: the pattern of `tag` for every sector of the range.
pub fn pattern(tag: u32, offset: u64, length_bytes: u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(length_bytes as usize);
    for sector in offset / SECTOR_BYTES..(offset + length_bytes) / SECTOR_BYTES {
        bytes.extend_from_slice(&sector_pattern(tag, sector));
    }
    bytes
}

/// A sector shows its tag at byte 8; the rest is one word, repeated.
fn sector_pattern(tag: u32, sector: u64) -> [u8; SECTOR_BYTES as usize] {
    let word = mix((u64::from(tag) << 32) ^ sector).to_le_bytes();
    let mut bytes = [0; SECTOR_BYTES as usize];
    for slot in bytes.chunks_exact_mut(8) {
        slot.copy_from_slice(&word);
    }
    bytes[8..12].copy_from_slice(&tag.to_le_bytes());
    bytes
}

fn holds(found: &[u8], tag: u32, sector: u64) -> bool {
    if tag == 0 {
        return *found == [0; SECTOR_BYTES as usize];
    }
    *found == sector_pattern(tag, sector)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 64 * SECTOR_BYTES;

    fn disk_with(tag: u32) -> Vec<u8> {
        pattern(tag, 0, SIZE)
    }

    #[test]
    fn an_answer_rules_out_what_was_before() {
        let mut model = Model::new(SIZE);
        let first = model.send(Change::Write(1), 0, SIZE);
        assert!(model.check(0, &vec![0; SIZE as usize]).is_ok());
        assert!(model.check(0, &disk_with(1)).is_ok());
        model.answered(&first);
        assert!(model.check(0, &vec![0; SIZE as usize]).is_err());
        assert!(model.check(0, &disk_with(1)).is_ok());
    }

    #[test]
    fn writes_that_overlap_in_time_may_end_either_way() {
        let mut model = Model::new(SIZE);
        let first = model.send(Change::Write(1), 0, SIZE);
        let second = model.send(Change::Write(2), 0, SIZE);
        model.answered(&second);
        model.answered(&first);
        assert!(model.check(0, &disk_with(1)).is_ok());
        assert!(model.check(0, &disk_with(2)).is_ok());
        assert!(model.check(0, &vec![0; SIZE as usize]).is_err());
        let third = model.send(Change::Zero, 0, SIZE);
        model.answered(&third);
        assert!(model.check(0, &disk_with(2)).is_err());
        assert_eq!(model.contested_sectors(), 0);
    }

    #[test]
    fn what_was_in_flight_at_a_crash_is_superseded_later() {
        let mut model = Model::new(SIZE);
        model.send(Change::Write(1), 0, SIZE);
        model.crashed();
        assert!(model.check(0, &disk_with(1)).is_ok());
        let second = model.send(Change::Write(2), 0, SIZE);
        model.answered(&second);
        assert!(model.check(0, &disk_with(1)).is_err());
        assert!(model.check(0, &disk_with(2)).is_ok());
    }

    #[test]
    fn a_trim_promises_nothing() {
        let mut model = Model::new(SIZE);
        let write = model.send(Change::Write(1), 0, SIZE);
        model.answered(&write);
        let trim = model.send(Change::Trim, 0, SIZE);
        model.answered(&trim);
        assert!(model.check(0, &disk_with(1)).is_ok());
        assert!(model.check(0, &vec![0; SIZE as usize]).is_ok());
        model.settle(|_| vec![0; SECTOR_BYTES as usize]);
        assert!(model.check(0, &disk_with(1)).is_err());
    }

    #[test]
    fn misplaced_data_is_seen() {
        let mut model = Model::new(SIZE);
        let write = model.send(Change::Write(1), 0, SIZE);
        model.answered(&write);
        let mut bytes = disk_with(1);
        bytes.swap(0, 512);
        bytes.rotate_left(512);
        assert!(model.check(0, &bytes).is_err());
    }
}
