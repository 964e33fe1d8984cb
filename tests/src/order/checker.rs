//! Whether a point is closed under what its writes knew.
//!
//! Overview: of each sector the write that is seen in it is kept, and the *floor*: the last write to it that
//! the point must have. What must be in a point is a clock that only grows: all that the writes seen
//! in it knew, and all that had to be in the points before, because points are cut one after the other. A point
//! costs what it changes: its changed sectors, and the writes that its clock newly names.
//!
//! A sector is wrong if the write that is seen in it had been answered before its floor was sent. Writes of one
//! sector that were in flight together may have taken effect in either order. A sector of zeroes does not
//! say which write made it zero: the first that fits is taken, which knew the least. If none fits, it is wrong.
//!
//! What was lost with a tracker is never a floor; it may be seen.

use std::collections::{HashMap, HashSet};
use std::fmt;

use super::history::{History, Kind, Write};
use super::stamp::{Found, Stamp};
use super::{BLOCK_BYTES, BLOCK_SECTORS, Clock, SECTOR_BYTES, WRITERS, merge};

/// What is wrong with a point.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Violation {
    /// A sector is older than others in the point allow.
    Order(String),
    /// A sector holds what no write has left there.
    Content(String),
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Order(what) => write!(f, "not one moment: {what}"),
            Self::Content(what) => write!(f, "not what was written: {what}"),
        }
    }
}

/// What was looked at.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    /// Points that were judged.
    pub points: u64,
    /// Blocks that they had changed.
    pub changed_blocks: u64,
    /// Writes that had to be in one.
    pub required_writes: u64,
}

/// A sector, by disk and number.
type Place = (u32, u32);

/// Why a write must be in a point.
#[derive(Clone, Copy, Debug, Default)]
enum Witness {
    #[default]
    Asked,
    /// A sector knew of it that is seen: of which writer and number.
    Data(Place, u32, u32),
    /// The same of one that was made zero.
    Zero(Place, u32, u32),
}

impl fmt::Display for Witness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Asked => write!(f, "it was answered before a point was asked for"),
            Self::Data(place, writer, sequence) => {
                let place = Shown(*place);
                write!(
                    f,
                    "{place} is of write {sequence} of writer {writer}, which knew of it"
                )
            }
            Self::Zero(place, writer, sequence) => {
                let place = Shown(*place);
                write!(
                    f,
                    "{place} was made zero by write {sequence} of writer {writer} or a later one, which knew of it"
                )
            }
        }
    }
}

/// One disk; both by sector.
#[derive(Debug)]
struct Sectors {
    /// Number of the write that is seen; zero where the sector is zero.
    seen: Vec<u32>,
    /// Number of the last write that must be there; zero if there is none.
    floor: Vec<u32>,
}

/// Judges points in their order.
#[derive(Debug)]
pub struct Checker<'a> {
    history: &'a History,
    writes: [Vec<Write>; WRITERS],
    lost: [HashSet<u32>; WRITERS],
    /// For each block, the writes of its owner that make it zero, in ascending order.
    zeroes: HashMap<(u32, u32), Vec<u32>>,
    disks: Vec<Sectors>,
    required: Clock,
    /// Up to where `required` has become floors.
    settled: Clock,
    /// For each writer, who required the most of it.
    witnesses: [Witness; WRITERS],
    touched: Vec<Place>,
    tally: Tally,
}

impl<'a> Checker<'a> {
    /// Before the first point.
    pub fn new(history: &'a History) -> Self {
        let sectors = |count| Sectors {
            seen: vec![0; count],
            floor: vec![0; count],
        };
        Self {
            writes: Default::default(),
            lost: Default::default(),
            zeroes: HashMap::new(),
            disks: history.areas.sectors().map(sectors).collect(),
            required: Clock::default(),
            settled: Clock::default(),
            witnesses: Default::default(),
            touched: Vec::new(),
            tally: Tally::default(),
            history,
        }
    }

    /// What was looked at so far.
    pub fn tally(&self) -> Tally {
        self.tally
    }

    /// All that a clock names must be in the next point: it was known before the point was asked for.
    pub fn require(&mut self, clock: &Clock) {
        self.require_by(clock, Witness::Asked);
    }

    fn require_by(&mut self, clock: &Clock, witness: Witness) {
        let required = self.required.iter().zip(&mut self.witnesses);
        for ((required, most), wanted) in required.zip(clock) {
            if wanted > required {
                *most = witness;
            }
        }
        merge(&mut self.required, clock);
    }

    /// Judges a point: for each disk, its bytes and the blocks that differ from those of the point before.
    ///
    /// # Errors
    ///
    /// What is wrong. The checker is of no use any more.
    pub fn check(&mut self, disks: &[(&[u8], &[u32])]) -> Result<(), Violation> {
        self.take_history();
        for (disk, (image, changed)) in disks.iter().enumerate() {
            for block in *changed {
                let from = *block as usize * BLOCK_BYTES;
                let bytes = &image[from..from + BLOCK_BYTES];
                let first = block * BLOCK_SECTORS as u32;
                for (sector, bytes) in (first..).zip(bytes.chunks_exact(SECTOR_BYTES)) {
                    self.see((disk as u32, sector), bytes)?;
                }
            }
            self.tally.changed_blocks += changed.len() as u64;
        }
        self.settle()?;
        self.tally.points += 1;
        Ok(())
    }

    /// Whatever is seen in a point was sent before it was read. All logs stand still meanwhile, so that
    /// what a write in one of them knew is in the others.
    fn take_history(&mut self) {
        let history = self.history;
        let logs: [_; WRITERS] = std::array::from_fn(|writer| history.log(writer));
        let known = self.writes.each_ref().map(Vec::len);
        for (writer, log) in logs.iter().enumerate() {
            self.writes[writer].extend_from_slice(&log.writes[known[writer]..]);
            let lost = self.lost[writer].len();
            self.lost[writer].extend(&log.lost[lost..]);
        }
        drop(logs);
        for (writes, known) in self.writes.iter().zip(known) {
            for (write, sequence) in writes[known..].iter().zip(known as u32 + 1..) {
                if write.kind == Kind::Zero {
                    for sector in write.sectors().step_by(BLOCK_SECTORS) {
                        let block = (write.disk, sector / BLOCK_SECTORS as u32);
                        self.zeroes.entry(block).or_default().push(sequence);
                    }
                }
            }
        }
    }

    fn see(&mut self, place: Place, bytes: &[u8]) -> Result<(), Violation> {
        let wrong = |what: &str| Err(Violation::Content(format!("{} {what}", Shown(place))));
        let seen = match Found::of(bytes) {
            Found::Zero => 0,
            Found::Torn => return wrong("is of no one write"),
            Found::Stamp(stamp) => {
                if !self.is_of_history(place, &stamp) {
                    return wrong(&format!("holds {stamp:?}, which was never written there"));
                }
                self.require_by(
                    &stamp.clock,
                    Witness::Data(place, stamp.writer, stamp.sequence),
                );
                stamp.sequence
            }
        };
        self.disks[place.0 as usize].seen[place.1 as usize] = seen;
        self.touched.push(place);
        Ok(())
    }

    fn is_of_history(&self, place: Place, stamp: &Stamp) -> bool {
        let write = self
            .writes
            .get(stamp.writer as usize)
            .and_then(|writes| writes.get((stamp.sequence as usize).checked_sub(1)?));
        let is_of_write = write.is_some_and(|write| {
            write.kind == Kind::Data
                && write.disk == place.0
                && write.sectors().contains(&place.1)
                && write.clock == stamp.clock
        });
        is_of_write && stamp.run == self.history.run && (stamp.disk, stamp.sector) == place
    }

    /// Until everything that is required has its floors, and every sector that this touches is judged.
    fn settle(&mut self) -> Result<(), Violation> {
        loop {
            self.lay_floors();
            let Some(place) = self.touched.pop() else {
                return Ok(());
            };
            self.judge(place)?;
        }
    }

    fn lay_floors(&mut self) {
        for writer in 0..WRITERS {
            for sequence in self.settled[writer] + 1..=self.required[writer] {
                if self.lost[writer].contains(&sequence) {
                    continue;
                }
                self.tally.required_writes += 1;
                let write = self.writes[writer][sequence as usize - 1];
                for sector in write.sectors() {
                    self.disks[write.disk as usize].floor[sector as usize] = sequence;
                    self.touched.push((write.disk, sector));
                }
            }
        }
        self.settled = self.required;
    }

    fn judge(&mut self, place: Place) -> Result<(), Violation> {
        let (disk, sector) = place;
        let sectors = &self.disks[disk as usize];
        let (seen, floor) = (
            sectors.seen[sector as usize],
            sectors.floor[sector as usize],
        );
        if floor == 0 {
            return Ok(());
        }
        let block = sector / BLOCK_SECTORS as u32;
        let owner = self.history.areas.owner(disk as usize, block as usize);
        // What had been answered when the floor was sent can be seen no more.
        let gone = self.writes[owner][floor as usize - 1].clock[owner];
        if seen > gone {
            return Ok(());
        }
        let zeroes = self.zeroes.get(&(disk, block)).filter(|_| seen == 0);
        let zeroes = zeroes.map_or(&[][..], Vec::as_slice);
        let Some(zero) = zeroes.get(zeroes.partition_point(|zero| *zero <= gone)) else {
            let witness = &self.witnesses[owner];
            let holds = if seen == 0 {
                "zeroes".to_owned()
            } else {
                format!("write {seen}")
            };
            return Err(Violation::Order(format!(
                "{} of writer {owner} holds {holds}, write {floor} is missing: {witness}",
                Shown(place)
            )));
        };
        let (clock, zero) = (self.writes[owner][*zero as usize - 1].clock, *zero);
        self.require_by(&clock, Witness::Zero(place, owner as u32, zero));
        Ok(())
    }
}

/// A place in words.
struct Shown(Place);

impl fmt::Display for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (disk, sector) = self.0;
        let block = sector / BLOCK_SECTORS as u32;
        write!(f, "sector {sector} (block {block}) of disk {disk}")
    }
}
