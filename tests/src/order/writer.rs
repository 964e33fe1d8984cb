//! A writer: one thread with a connection to each disk and several writes in flight.
//!
//! It works in spells, each with its own depth, heat and kinds of writes: long ones and short ones, whole
//! blocks and parts of them, most of them to a few hot runs, now and then a burst over cold ones. Outside of
//! bursts it sends as many as may be in flight, awaits all answers, and rests in proportion: it is to leave
//! the processors to those who are tested, and a point shall be small, so that there are many.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::areas::Run;
use super::history::{History, Kind, Line, Write};
use super::stamp::Stamp;
use super::{BLOCK_SECTORS, SECTOR_BYTES};
use crate::nbd::{Client, command};
use crate::seed::Random;

/// Time for a killed tracker to come back.
const PATIENCE: Duration = Duration::from_secs(60);
const DEPTH_MAX: u64 = 12;

/// Where a writer writes to, and how fast.
#[derive(Clone, Debug)]
pub struct Target {
    /// Longest rest for each write outside of bursts.
    pub rest_max: Duration,
    /// The tracker's socket.
    pub socket: PathBuf,
    /// The exports, in the order of their numbers.
    pub disks: Vec<String>,
}

/// One writer.
pub struct Writer {
    number: usize,
    target: Target,
    history: Arc<History>,
    line: Arc<Line>,
    random: Random,
    clients: Vec<Client>,
    /// By sequence: disk and cookie.
    in_flight: BTreeMap<u32, (usize, u64)>,
    last: u32,
    spell: Spell,
}

/// How a writer works for a while.
#[derive(Clone, Copy, Debug)]
struct Spell {
    left: u64,
    depth: usize,
    /// For each write; none in a burst.
    rest: Duration,
    /// The greater, the hotter are the first runs.
    heat: i32,
    /// Of sixteen writes, how many are as long as their run.
    long: u64,
    /// Of sixteen writes, how many are parts of blocks.
    parts: u64,
}

impl Spell {
    fn new(rest_max: Duration, random: &mut Random) -> Self {
        let is_burst = random.chance(1, 16);
        let rest_max = rest_max.as_micros() as u64;
        let rest = random.between(rest_max / 8, rest_max);
        Self {
            left: random.between(16, 128),
            depth: random.between(1, DEPTH_MAX) as usize,
            rest: Duration::from_micros(if is_burst { 0 } else { rest }),
            heat: if is_burst { 1 } else { 6 },
            long: if is_burst { 4 } else { random.below(2) },
            parts: random.below(6),
        }
    }
}

impl Writer {
    /// A writer that has not begun.
    pub fn new(
        number: usize,
        target: Target,
        history: Arc<History>,
        line: Arc<Line>,
        mut random: Random,
    ) -> Self {
        Self {
            number,
            spell: Spell::new(target.rest_max, &mut random),
            target,
            history,
            line,
            random,
            clients: Vec::new(),
            in_flight: BTreeMap::new(),
            last: 0,
        }
    }

    /// Writes until the line ends; then all answers are awaited.
    ///
    /// # Panics
    ///
    /// A write is refused, or a connection is lost that should not be.
    pub fn work(mut self) {
        let mut life = 0;
        while let Some(next) = self.line.await_after(life, PATIENCE) {
            life = next;
            if self.connect().is_ok() && self.serve().is_ok() {
                return;
            }
            self.note_losses();
        }
    }

    fn connect(&mut self) -> std::io::Result<()> {
        let socket = &self.target.socket;
        let connect = |disk: &String| Client::unix(socket, disk);
        self.clients = self
            .target
            .disks
            .iter()
            .map(connect)
            .collect::<Result<_, _>>()?;
        Ok(())
    }

    /// Until the end, or until a connection is lost.
    fn serve(&mut self) -> std::io::Result<()> {
        let mut volley = 0;
        loop {
            let is_over = self.line.is_over();
            if self.in_flight.is_empty() {
                self.line.await_rest();
            }
            let is_resting = is_over || self.line.is_resting();
            let first = self.in_flight.first_key_value();
            let first = first.map(|(_, (disk, _))| *disk);
            let is_burst = self.spell.rest.is_zero();
            match first {
                None if is_over => return Ok(()),
                Some(disk) if is_resting || self.in_flight.len() >= self.spell.depth => {
                    self.receive(disk)?;
                }
                Some(disk) if volley == 0 && !is_burst => self.receive(disk)?,
                None if volley == 0 && !is_burst => {
                    volley = self.spell.depth;
                    std::thread::park_timeout(self.spell.rest * volley as u32);
                }
                _ => {
                    volley = volley.saturating_sub(1);
                    self.send()?;
                }
            }
        }
    }

    fn receive(&mut self, disk: usize) -> std::io::Result<()> {
        let reply = self.clients[disk].receive()?;
        assert_eq!(reply.error, 0, "a valid write was refused");
        self.in_flight
            .retain(|_, (of, cookie)| (*of, *cookie) != (disk, reply.cookie));
        self.note_known();
        Ok(())
    }

    /// Everything is known before the first that is in flight.
    fn note_known(&self) {
        let first = self.in_flight.keys().next();
        let known = first.map_or(self.last, |first| first - 1);
        self.history.known(self.number, known);
    }

    /// The tracker is dead: answers that it has given still count, all else is lost.
    fn note_losses(&mut self) {
        for disk in 0..self.clients.len() {
            while self.clients[disk].in_flight() > 0 && self.receive(disk).is_ok() {}
        }
        for sequence in std::mem::take(&mut self.in_flight).into_keys() {
            self.history.lost(self.number, sequence);
        }
        self.note_known();
        self.clients.clear();
    }

    fn send(&mut self) -> std::io::Result<()> {
        self.spell.left = self.spell.left.saturating_sub(1);
        if self.spell.left == 0 {
            self.spell = Spell::new(self.target.rest_max, &mut self.random);
        }
        let (run, kind, sectors) = self.choose();
        let write = Write {
            disk: run.disk as u32,
            first_sector: sectors.start,
            sector_count: sectors.end - sectors.start,
            kind,
            clock: self.history.clock(),
        };
        let sequence = self.history.sent(self.number, write);
        let payload = match kind {
            Kind::Data => self.payload(&write, sequence),
            Kind::Zero => Vec::new(),
        };
        let number = match kind {
            Kind::Data => command::WRITE,
            Kind::Zero if self.random.chance(1, 2) => command::TRIM,
            Kind::Zero => command::WRITE_ZEROES,
        };
        self.last = sequence;
        // Lost if it is not sent as a whole; the cookie zero is nobody's.
        self.in_flight.insert(sequence, (run.disk, 0));
        let offset = u64::from(write.first_sector) * SECTOR_BYTES as u64;
        let length = write.sector_count * SECTOR_BYTES as u32;
        let client = &mut self.clients[run.disk];
        let cookie = client.submit(0, number, offset, length, &payload)?;
        self.in_flight.insert(sequence, (run.disk, cookie));
        Ok(())
    }

    fn payload(&self, write: &Write, sequence: u32) -> Vec<u8> {
        let mut payload = Vec::with_capacity(write.sector_count as usize * SECTOR_BYTES);
        for sector in write.sectors() {
            let stamp = Stamp {
                run: self.history.run,
                disk: write.disk,
                sector,
                writer: self.number as u32,
                sequence,
                clock: write.clock,
            };
            stamp.append_to(&mut payload);
        }
        payload
    }

    /// A run, what to do to it, and to which sectors.
    fn choose(&mut self) -> (Run, Kind, std::ops::Range<u32>) {
        let random = &mut self.random;
        let runs = self.history.areas.runs(self.number);
        let uniform = random.below(1 << 32) as f64 / (1_u64 << 32) as f64;
        let run = runs[(uniform.powi(self.spell.heat) * runs.len() as f64) as usize];
        let (mut first, mut count) = (run.first_block, run.block_count);
        if !random.chance(self.spell.long, 16) {
            count = random.between(1, u64::from(count.min(2))) as u32;
            first += random.below(u64::from(run.block_count - count) + 1) as u32;
        }
        let unit = BLOCK_SECTORS as u32;
        let sectors = first * unit..(first + count) * unit;
        if random.chance(1, 12) {
            return (run, Kind::Zero, sectors);
        }
        if random.chance(self.spell.parts, 16) {
            let length = u64::from(sectors.end - sectors.start);
            let from = random.below(length);
            let some = random.between(1, length - from);
            let start = sectors.start + from as u32;
            return (run, Kind::Data, start..start + some as u32);
        }
        (run, Kind::Data, sectors)
    }
}
