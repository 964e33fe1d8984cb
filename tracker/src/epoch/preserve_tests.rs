//! Closed epochs that are captured while writers overwrite them: a machine with its threads, files as disks, and a
//! reader that does what the shipper does.
//!
//! Oracle: each write leaves its number in all of its blocks, and notes when it began and ended, and its epoch. A
//! block is captured as of an epoch rightly if a write of that epoch or an earlier one has left it, and none such began after
//! that one had ended. Whatever an epoch is sealed with must hold for every block of every disk, also for those
//! that were captured with an earlier epoch.
//!
//! The canaries break a rule; within a few worlds each is found.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::RwLock;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};

use super::*;
use crate::extent::{BLOCK_SIZE, blocks_of};
use crate::failpoint::set_canary;
use crate::journal::reader::JournalReader;
use crate::preserve::area::BlockSource;
use crate::preserve::reader::PreserveReader;

const DISKS: usize = 2;
/// Blocks at the beginning; more than a word of bits, so that runs go over its edge.
const BLOCKS: u64 = 200;
/// Of the second disk the last block is short.
const SIZES: [u64; DISKS] = [BLOCKS * BLOCK_SIZE, BLOCKS * BLOCK_SIZE - 1536];
const WRITERS: usize = 3;
const ROUNDS: u64 = 10;
const PATIENCE: Duration = Duration::from_secs(20);
const AMPLE: u64 = 1 << 30;

/// A small generator (splitmix64): one seed, one sequence.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound.max(1)
    }

    fn one_in(&mut self, bound: u64) -> bool {
        self.below(bound) == 0
    }

    /// Lets others come in between, or not.
    fn dawdle(&mut self) {
        for _ in 0..self.below(4) {
            std::thread::yield_now();
        }
    }
}

/// A disk from which blocks are copied; it may be made to fail.
struct Disk {
    file: File,
    failing: AtomicBool,
}

impl BlockSource for Disk {
    fn read_at(&self, offset_bytes: u64, target: &mut [u8]) -> io::Result<()> {
        std::thread::yield_now();
        if self.failing.load(Ordering::SeqCst) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        self.file.read_exact_at(target, offset_bytes)
    }

    fn read_cached(&self, offset_bytes: u64, target: &mut [u8]) -> bool {
        !self.failing.load(Ordering::SeqCst) && self.read_at(offset_bytes, target).is_ok()
    }
}

/// Wakes one writer.
struct Bell(SyncSender<usize>);

impl Waiter for Bell {
    fn wake(&self, token: usize) {
        // Whoever has been killed listens no more.
        let _listens = self.0.send(token);
    }
}

/// One write as it was for a block.
#[derive(Clone, Copy, Debug)]
struct Written {
    /// What it left there; zero for a trim.
    number: u64,
    epoch: Epoch,
    began: u64,
    ended: u64,
}

/// A rule that is broken on purpose by the writers themselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Break {
    Nothing,
    /// Data goes to the disk before the copy.
    WriteBeforeCopy,
    /// A rule of the product.
    Product(Canary),
}

#[derive(Clone, Copy, Debug)]
struct Plan {
    seed: u64,
    broken: Break,
    budget_bytes: u64,
    /// Sources fail now and then, trackers are killed, disks grow.
    faults: bool,
}

/// What is captured of a disk, by blocks.
type Mirror = Vec<u64>;

struct World {
    plan: Plan,
    folder: tempfile::TempDir,
    disks: [Arc<Disk>; DISKS],
    sizes: [AtomicU64; DISKS],
    /// `None` for the moment between a kill and a start.
    machine: RwLock<Option<Arc<Machine>>>,
    dying: AtomicBool,
    stop: AtomicBool,
    ticks: AtomicU64,
    /// Newest epoch of a write that was answered.
    answered: AtomicU64,
    log: [Mutex<BTreeMap<u64, Vec<Written>>>; DISKS],
    violations: Mutex<Vec<String>>,
}

/// The writer's tracker was killed.
struct Killed;

impl World {
    fn new(plan: Plan) -> Self {
        let folder =
            tempfile::tempdir_in("/dev/shm").unwrap_or_else(|_| tempfile::tempdir().unwrap());
        let disks = [0, 1].map(|disk: usize| {
            let mut options = File::options();
            options.read(true).write(true).create(true);
            let file = options.open(folder.path().join(disk.to_string())).unwrap();
            file.set_len(SIZES[disk]).unwrap();
            Arc::new(Disk {
                file,
                failing: AtomicBool::new(false),
            })
        });
        Self {
            plan,
            folder,
            disks,
            sizes: SIZES.map(AtomicU64::new),
            machine: RwLock::new(None),
            dying: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            ticks: AtomicU64::new(1),
            answered: AtomicU64::new(0),
            log: Default::default(),
            violations: Mutex::default(),
        }
    }

    fn start(&self) -> (Arc<Machine>, Keepers) {
        let specs = (0..DISKS).map(|disk| spec(self.folder.path(), disk, self.size(disk)));
        let options = MachineOptions {
            workers: WRITERS,
            ring_bytes: 16 << 10,
            intent_regions: 64,
            rebuild: false,
            tracking: true,
            preserve_budget_bytes: self.plan.budget_bytes,
            frozen_views: false,
        };
        let machine = Arc::new(Machine::open(specs.collect(), &options).unwrap().0);
        let sources = self.disks.clone().map(|disk| disk as Arc<dyn BlockSource>);
        let keepers = Keepers::start(&machine, &sources).unwrap();
        (machine, keepers)
    }

    fn size(&self, disk: usize) -> u64 {
        self.sizes[disk].load(Ordering::SeqCst)
    }

    fn tick(&self) -> u64 {
        self.ticks.fetch_add(1, Ordering::SeqCst)
    }

    fn complain(&self, what: String) {
        self.violations.lock().unwrap().push(what);
    }

    /// Writes until told to stop.
    fn write_on(&self, worker: usize) {
        let mut random = Random(self.plan.seed ^ (worker as u64 + 1) << 32);
        let (bell, woken) = bell();
        let mut bell = (bell, woken);
        while !self.stop.load(Ordering::SeqCst) {
            let guard = self.machine.read().unwrap();
            let Some(machine) = guard.as_ref() else {
                continue;
            };
            if self
                .write_once(machine, worker, &mut random, &bell)
                .is_err()
            {
                // What was left waiting may still be woken.
                bell = self::bell();
            }
        }
    }

    fn write_once(
        &self,
        machine: &Machine,
        worker: usize,
        random: &mut Random,
        (bell, woken): &(Arc<dyn Waiter>, Receiver<usize>),
    ) -> std::result::Result<(), Killed> {
        let disk = random.below(DISKS as u64) as usize;
        let blocks = blocks_of(self.size(disk));
        // Some are written all the time.
        let range = if random.one_in(3) { blocks } else { 8 };
        let first_block = random.below(range);
        let block_count = (1 + random.below(4)).min(blocks - first_block);
        let extent = Extent {
            first_block,
            block_count,
        };
        let answered = self.answered.load(Ordering::SeqCst);
        let number = self.tick();
        let trims = random.one_in(6);
        let operation = if trims {
            Operation::Trim
        } else {
            Operation::Write
        };
        let admission = machine.admit(worker, disk, extent, operation);
        let epoch = admission.epoch;
        if epoch.0 < answered {
            self.complain(format!(
                "{epoch} was given after {answered} had been answered"
            ));
        }
        random.dawdle();
        let await_turn = || self.await_turn(machine, disk, extent, admission, bell, woken);
        if self.plan.broken == Break::WriteBeforeCopy {
            self.put(disk, extent, number, trims);
            await_turn()?;
        } else {
            await_turn()?;
            if self.dying.load(Ordering::SeqCst) && random.one_in(2) {
                return Err(Killed);
            }
            random.dawdle();
            self.put(disk, extent, number, trims);
        }
        let written = Written {
            number: if trims { 0 } else { number },
            epoch,
            began: number,
            ended: self.tick(),
        };
        let mut log = self.log[disk].lock().unwrap();
        for block in extent.first_block..extent.end_block() {
            log.entry(block).or_default().push(written);
        }
        drop(log);
        machine.complete(worker, admission);
        self.answered.fetch_max(epoch.0, Ordering::SeqCst);
        Ok(())
    }

    /// Waits as a worker does until the data may go to the disk.
    fn await_turn(
        &self,
        machine: &Machine,
        disk: usize,
        extent: Extent,
        admission: Admission,
        bell: &Arc<dyn Waiter>,
        woken: &Receiver<usize>,
    ) -> std::result::Result<(), Killed> {
        let mut copies = admission.copies;
        if let Some(era) = admission.waits {
            while !machine.may_write(disk, extent, era) {
                machine.await_regions(disk, extent, era, bell, 7);
                self.await_bell(woken)?;
            }
            copies = machine.must_copy(disk, extent, admission.epoch);
        }
        // Some find the content in the page cache.
        let copies_now = || {
            let source = &*self.disks[disk];
            self.tick().is_multiple_of(2) && machine.copy_now(disk, extent, admission.epoch, source)
        };
        if copies && !copies_now() {
            machine.await_copy(disk, extent, admission.epoch, bell, 8);
            self.await_bell(woken)?;
        }
        Ok(())
    }

    fn await_bell(&self, woken: &Receiver<usize>) -> std::result::Result<(), Killed> {
        let deadline = std::time::Instant::now() + PATIENCE;
        loop {
            match woken.recv_timeout(Duration::from_millis(1)) {
                Ok(_) => return Ok(()),
                Err(RecvTimeoutError::Disconnected) => unreachable!("the bell is here"),
                Err(RecvTimeoutError::Timeout) if self.dying.load(Ordering::SeqCst) => {
                    return Err(Killed);
                }
                Err(RecvTimeoutError::Timeout) => {
                    assert!(std::time::Instant::now() < deadline, "a write is held up");
                }
            }
        }
    }

    fn put(&self, disk: usize, extent: Extent, number: u64, trims: bool) {
        let offset = extent.offset_bytes();
        let length = extent.length_bytes().min(self.size(disk) - offset);
        let file = &self.disks[disk].file;
        if trims {
            use nix::fcntl::{FallocateFlags, fallocate};
            let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            fallocate(file, mode, offset as i64, length as i64).unwrap();
        } else {
            let bytes = number.to_le_bytes().repeat(length as usize / 8);
            file.write_all_at(&bytes, offset).unwrap();
        }
    }

    /// Whether a block may hold this as of an epoch.
    fn is_right(&self, disk: usize, block: u64, epoch: Epoch, number: u64) -> bool {
        let log = self.log[disk].lock().unwrap();
        let none = Vec::new();
        let writes = || {
            let written = log.get(&block).unwrap_or(&none).iter();
            written.filter(|written| written.epoch <= epoch)
        };
        let newest_beginning = writes().map(|written| written.began).max().unwrap_or(0);
        let untouched = number == 0 && newest_beginning == 0;
        untouched || writes().any(|w| w.number == number && w.ended >= newest_beginning)
    }
}

fn bell() -> (Arc<dyn Waiter>, Receiver<usize>) {
    let (ring, woken) = sync_channel(8);
    (Arc::new(Bell(ring)), woken)
}

fn spec(folder: &Path, disk: usize, size_bytes: u64) -> DiskSpec {
    DiskSpec {
        name: disk.to_string(),
        image: folder.join(disk.to_string()),
        journal: folder.join(format!("{disk}.hrl")),
        size_bytes,
        identity: [disk as u8; 16],
        seen: None,
        preserve: Some(folder.join(format!("{disk}.preserve"))),
    }
}

/// The shipper's side of a world.
struct Shipper<'a> {
    world: &'a World,
    random: Random,
    /// `None` for the moment between a kill and a start.
    running: Option<(Arc<Machine>, Keepers)>,
    mirrors: [Mirror; DISKS],
    committed: [Mirror; DISKS],
    /// Sealed and not committed.
    waiting: BTreeMap<Epoch, [Mirror; DISKS]>,
    sealed: u64,
    given_up: u64,
    preserved: u64,
}

impl<'a> Shipper<'a> {
    fn new(world: &'a World) -> Self {
        let (machine, keepers) = world.start();
        *world.machine.write().unwrap() = Some(Arc::clone(&machine));
        let empty = SIZES.map(|size| vec![0; blocks_of(size) as usize]);
        Self {
            world,
            random: Random(world.plan.seed),
            running: Some((machine, keepers)),
            mirrors: empty.clone(),
            committed: empty,
            waiting: BTreeMap::new(),
            sealed: 0,
            given_up: 0,
            preserved: 0,
        }
    }

    fn machine(&self) -> &Machine {
        &self.running.as_ref().unwrap().0
    }

    /// The tracker is killed, with writes on their way, and another one goes on.
    fn kill_tracker(&mut self) {
        let closed = self.machine().status().closed;
        self.world.dying.store(true, Ordering::SeqCst);
        let mut shared = self.world.machine.write().unwrap();
        *shared = None;
        let (last, mut keepers) = self.running.take().unwrap();
        keepers.end().unwrap();
        drop(keepers);
        // A journal is locked until nobody has it any more.
        assert_eq!(Arc::strong_count(&last), 1);
        drop(last);
        let (machine, keepers) = self.world.start();
        *shared = Some(Arc::clone(&machine));
        let status = machine.status();
        assert!(
            status.closed == closed || status.epochs_merged > 0,
            "{closed:?} was not gone on with"
        );
        self.running = Some((machine, keepers));
        self.world.dying.store(false, Ordering::SeqCst);
    }

    fn grow(&mut self) {
        let world = self.world;
        let size = world.size(0) + (1 + self.random.below(70)) * BLOCK_SIZE;
        world.disks[0].file.set_len(size).unwrap();
        self.machine().grow(0, size).unwrap();
        world.sizes[0].store(size, Ordering::SeqCst);
    }

    /// Something that happens to a machine while an epoch is captured.
    fn meddle(&mut self) {
        if !self.world.plan.faults {
            return;
        }
        match self.random.below(60) {
            0 => self.kill_tracker(),
            1 => self.grow(),
            2 => {
                let disk = self.random.below(DISKS as u64) as usize;
                self.world.disks[disk].failing.store(true, Ordering::SeqCst);
            }
            _ => {}
        }
    }

    /// One epoch. Returns what is wrong with it.
    fn round(&mut self) -> Option<String> {
        for disk in &self.world.disks {
            disk.failing.store(false, Ordering::SeqCst);
        }
        let epoch = self
            .machine()
            .cut(Epoch::ZERO, Keep::Changed, PATIENCE)
            .unwrap();
        let readers = [0, 1].map(|disk: usize| {
            let path = self.world.folder.path().join(format!("{disk}.preserve"));
            let journal = JournalReader::open(self.machine().journal_path(disk).unwrap()).unwrap();
            PreserveReader::open(&path, &journal.journal_id(), epoch).unwrap()
        });
        let mut mirrors = self.mirrors.clone();
        for (disk, reader) in readers.iter().enumerate() {
            mirrors[disk].resize(blocks_of(reader.size_bytes()) as usize, 0);
            for hot in [true, false] {
                self.capture(disk, reader, epoch, hot, &mut mirrors[disk]);
            }
        }
        let failed = readers.iter().any(|reader| reader.failure().is_some());
        let is_closed = self.machine().status().closed == Some(epoch);
        if failed || !is_closed || self.random.one_in(6) {
            self.given_up += 1;
            self.machine().abandon(epoch).unwrap();
            return None;
        }
        self.sealed += 1;
        let wrong = self.judge(epoch, &mirrors);
        self.machine().seal(epoch).unwrap();
        self.mirrors = mirrors;
        self.waiting.insert(epoch, self.mirrors.clone());
        self.commit_or_lose();
        wrong
    }

    fn judge(&self, epoch: Epoch, mirrors: &[Mirror; DISKS]) -> Option<String> {
        for (disk, mirror) in mirrors.iter().enumerate() {
            for (block, &number) in mirror.iter().enumerate() {
                if !self.world.is_right(disk, block as u64, epoch, number) {
                    return Some(format!(
                        "disk {disk} block {block} of epoch {epoch} has {number}, seed {}",
                        self.world.plan.seed
                    ));
                }
            }
        }
        None
    }

    /// Commits lag behind; at times the spool is lost.
    fn commit_or_lose(&mut self) {
        if self.random.one_in(8) {
            self.machine().revert().unwrap();
            self.waiting.clear();
            self.mirrors = self.committed.clone();
        } else if self.random.one_in(2)
            && let Some((epoch, mirrors)) = self.waiting.pop_first()
        {
            self.machine().commit(epoch).unwrap();
            self.committed = mirrors;
        }
    }

    /// What both the journal and the preserve file name, in pieces.
    fn capture(
        &mut self,
        disk: usize,
        reader: &PreserveReader,
        epoch: Epoch,
        hot: bool,
        mirror: &mut Mirror,
    ) {
        let journal = JournalReader::open(self.machine().journal_path(disk).unwrap()).unwrap();
        let sealed = journal.state().unwrap().sealed;
        let whole = Extent {
            first_block: 0,
            block_count: mirror.len() as u64,
        };
        let dirty = journal.dirty(sealed, epoch).unwrap();
        let named: Vec<Extent> = match dirty.all() {
            true => vec![whole],
            false => dirty.extents().map(std::result::Result::unwrap).collect(),
        };
        let members = named
            .into_iter()
            .flat_map(|extent| reader.changed(extent, hot));
        for member in members.collect::<Vec<_>>() {
            let mut next = member.first_block;
            while next < member.end_block() {
                let count = (1 + self.random.below(9)).min(member.end_block() - next);
                let piece = Extent {
                    first_block: next,
                    block_count: count,
                };
                self.take(disk, reader, piece, mirror);
                next += count;
                self.meddle();
            }
        }
    }

    /// Reads and settles a piece.
    fn take(&mut self, disk: usize, reader: &PreserveReader, piece: Extent, mirror: &mut Mirror) {
        let mut bytes = vec![0; piece.length_bytes() as usize];
        let offset = piece.offset_bytes();
        let present = piece.length_bytes().min(self.world.size(disk) - offset) as usize;
        let file = &self.world.disks[disk].file;
        self.random.dawdle();
        file.read_exact_at(&mut bytes[..present], offset).unwrap();
        self.random.dawdle();
        let is_hole = bytes.iter().all(|&byte| byte == 0);
        if !is_hole {
            self.settle(reader, piece, &mut bytes, mirror);
            return;
        }
        for (part, hole) in reader.split_hole(piece) {
            let mut bytes = vec![0; part.length_bytes() as usize];
            match hole {
                true => self.note(reader, part, &bytes, mirror),
                false => self.settle(reader, part, &mut bytes, mirror),
            }
        }
    }

    fn settle(
        &mut self,
        reader: &PreserveReader,
        piece: Extent,
        bytes: &mut [u8],
        mirror: &mut Mirror,
    ) {
        let preserved = reader.settle(piece, bytes).unwrap();
        self.note(reader, piece, bytes, mirror);
        for extent in preserved {
            self.preserved += extent.block_count;
            reader.give_back(extent);
        }
    }

    fn note(&mut self, reader: &PreserveReader, piece: Extent, bytes: &[u8], mirror: &mut Mirror) {
        for (block, content) in (piece.first_block..).zip(bytes.chunks(BLOCK_SIZE as usize)) {
            let present = reader.size_bytes() - block * BLOCK_SIZE;
            let content = &content[..BLOCK_SIZE.min(present) as usize];
            let number = u64::from_le_bytes(content[..8].try_into().unwrap());
            let is_whole = content.chunks(8).all(|word| word == number.to_le_bytes());
            // A number that nobody has written is never right.
            mirror[block as usize] = if is_whole { number } else { u64::MAX };
        }
    }
}

/// What became of a world.
#[derive(Debug, Default)]
struct Outcome {
    wrong: Vec<String>,
    sealed: u64,
    given_up: u64,
    preserved: u64,
}

fn live(plan: Plan) -> Outcome {
    let world = World::new(plan);
    if let Break::Product(canary) = plan.broken {
        set_canary(Some(canary));
    }
    let mut outcome = std::thread::scope(|scope| {
        let mut shipper = Shipper::new(&world);
        let writers: [_; WRITERS] = std::array::from_fn(|worker| {
            let world = &world;
            scope.spawn(move || world.write_on(worker))
        });
        // Writers end also when this thread panics.
        let _stop = StopOnDrop(&world.stop);
        let wrong = (0..ROUNDS).find_map(|_| shipper.round());
        world.stop.store(true, Ordering::SeqCst);
        for writer in writers {
            writer.join().unwrap();
        }
        let (_machine, mut keepers) = shipper.running.take().unwrap();
        keepers.end().unwrap();
        Outcome {
            wrong: wrong.into_iter().collect(),
            sealed: shipper.sealed,
            given_up: shipper.given_up,
            preserved: shipper.preserved,
        }
    });
    set_canary(None);
    outcome.wrong.append(&mut world.violations.lock().unwrap());
    outcome
}

struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Whether there are enough worlds that each thing has happened in some.
fn are_many() -> bool {
    std::env::var("SEED").is_err()
}

/// `SEED=` replays the plan of one world; threads take turns as they like.
fn seeds(worlds: u64) -> Vec<u64> {
    match std::env::var("SEED") {
        Ok(seed) => vec![seed.parse().unwrap()],
        Err(_) => (1..=worlds).collect(),
    }
}

fn plan(seed: u64) -> Plan {
    Plan {
        seed,
        broken: Break::Nothing,
        budget_bytes: AMPLE,
        faults: false,
    }
}

#[test]
fn what_is_captured_is_the_moment_of_the_cut() {
    let (mut sealed, mut preserved) = (0, 0);
    for seed in seeds(20) {
        let outcome = live(plan(seed));
        assert_eq!(outcome.wrong, Vec::<String>::new());
        sealed += outcome.sealed;
        preserved += outcome.preserved;
    }
    assert!(
        !are_many() || sealed > 20 && preserved > 100,
        "{sealed} sealed, {preserved} blocks preserved"
    );
}

#[test]
fn trackers_that_are_killed_and_disks_that_fail_or_grow_give_nothing_wrong() {
    let (mut sealed, mut given_up) = (0, 0);
    for seed in seeds(20) {
        let outcome = live(Plan {
            faults: true,
            ..plan(seed)
        });
        assert_eq!(outcome.wrong, Vec::<String>::new());
        sealed += outcome.sealed;
        given_up += outcome.given_up;
    }
    assert!(
        !are_many() || sealed > 20 && given_up > 20,
        "{sealed} sealed, {given_up} given up"
    );
}

#[test]
fn a_budget_that_does_not_do_gives_the_point_up_and_nothing_wrong() {
    let mut given_up = 0;
    for seed in seeds(10) {
        let outcome = live(Plan {
            budget_bytes: BLOCK_SIZE,
            faults: true,
            ..plan(seed)
        });
        assert_eq!(outcome.wrong, Vec::<String>::new());
        given_up += outcome.given_up;
    }
    assert!(!are_many() || given_up > 30, "{given_up} given up");
}

#[test]
fn a_rule_that_is_broken_is_found() {
    for broken in [
        Break::WriteBeforeCopy,
        Break::Product(Canary::PreservedBeforeRead),
        Break::Product(Canary::CutPerDisk),
    ] {
        let is_wrong = |seed: &u64| {
            !live(Plan {
                broken,
                ..plan(*seed)
            })
            .wrong
            .is_empty()
        };
        assert!(
            (1..=20).any(|seed| is_wrong(&seed)),
            "{broken:?} is not found"
        );
    }
}

/// A machine of one disk, without writers.
fn quiet(folder: &Path) -> (Arc<Machine>, Keepers, Arc<Disk>) {
    let mut options = File::options();
    options.read(true).write(true).create(true);
    let file = options.open(folder.join("0")).unwrap();
    file.set_len(SIZES[0]).unwrap();
    let disk = Arc::new(Disk {
        file,
        failing: AtomicBool::new(false),
    });
    let options = MachineOptions {
        workers: WRITERS,
        ring_bytes: 16 << 10,
        intent_regions: 64,
        rebuild: false,
        tracking: true,
        preserve_budget_bytes: AMPLE,
        frozen_views: false,
    };
    let specs = vec![spec(folder, 0, SIZES[0])];
    let machine = Arc::new(Machine::open(specs, &options).unwrap().0);
    let source: Arc<dyn BlockSource> = Arc::clone(&disk) as _;
    let keepers = Keepers::start(&machine, &[source]).unwrap();
    (machine, keepers, disk)
}

/// A later write that overlaps one in flight of the closed epoch waits for that one alone.
#[test]
fn only_what_overlaps_a_write_in_flight_waits_for_it() {
    let folder = tempfile::tempdir().unwrap();
    let (machine, mut keepers, disk) = quiet(folder.path());
    let blocks = |first_block, block_count| Extent {
        first_block,
        block_count,
    };
    let admit = |extent| machine.admit(0, 0, extent, Operation::Write);
    let slow = admit(blocks(10, 4));
    let done = admit(blocks(50, 1));
    machine.complete(0, done);
    let (rang, woken) = std::thread::scope(|scope| {
        let cut = scope.spawn(|| machine.cut(Epoch::ZERO, Keep::Changed, PATIENCE).unwrap());
        await_settled(&machine, slow.epoch);
        // One that belongs to nobody, one that was written and is not in flight, one that overlaps.
        let (free, other, overlapping) = (
            admit(blocks(100, 3)),
            admit(blocks(50, 1)),
            admit(blocks(13, 2)),
        );
        assert!(free.epoch > slow.epoch && !free.copies);
        assert!(other.copies && overlapping.copies);
        let (bell, woken) = bell();
        machine.await_copy(0, blocks(13, 2), overlapping.epoch, &bell, 1);
        machine.await_copy(0, blocks(50, 1), other.epoch, &bell, 2);
        let first = woken.recv_timeout(PATIENCE).unwrap();
        // Long after the other one was looked at, too.
        let again = admit(blocks(50, 1));
        assert!(!again.copies);
        assert!(woken.try_recv().is_err() && !cut.is_finished());
        disk.file
            .write_all_at(&[7; 4 * BLOCK_SIZE as usize], 10 * BLOCK_SIZE)
            .unwrap();
        machine.complete(0, slow);
        let second = woken.recv_timeout(PATIENCE).unwrap();
        assert_eq!(cut.join().unwrap(), slow.epoch);
        for admission in [free, other, overlapping, again] {
            machine.complete(0, admission);
        }
        ((first, second), woken)
    });
    assert_eq!(rang, (2, 1));
    assert!(woken.try_recv().is_err());
    // Copied when the slow one had completed.
    let journal = JournalReader::open(machine.journal_path(0).unwrap()).unwrap();
    let path = folder.path().join("0.preserve");
    let reader = PreserveReader::open(&path, &journal.journal_id(), slow.epoch).unwrap();
    let mut bytes = vec![0; BLOCK_SIZE as usize];
    let preserved = reader.settle(blocks(13, 1), &mut bytes).unwrap();
    assert_eq!(
        (preserved, bytes),
        (vec![blocks(13, 1)], vec![7; BLOCK_SIZE as usize])
    );
    keepers.end().unwrap();
}

/// Else it could wait for a write of the epoch after the next, and that one for it.
/// What is in the page cache is copied without a wait; what a write of the closed epoch is about to change is not.
#[test]
fn a_write_copies_for_itself_what_is_cached() {
    let folder = tempfile::tempdir().unwrap();
    let (machine, mut keepers, disk) = quiet(folder.path());
    let block = |first_block| Extent {
        first_block,
        block_count: 1,
    };
    let admit = |first_block| machine.admit(0, 0, block(first_block), Operation::Write);
    machine.complete(0, admit(3));
    let stuck = admit(5);
    std::thread::scope(|scope| {
        let cut = scope.spawn(|| machine.cut(Epoch::ZERO, Keep::Changed, PATIENCE).unwrap());
        await_settled(&machine, stuck.epoch);
        let (late, overlapping) = (admit(3), admit(5));
        assert!(late.copies && overlapping.copies);
        // The thread that copies may not be there yet, and nobody else copies for it.
        let deadline = std::time::Instant::now() + PATIENCE;
        while !machine.copy_now(0, block(3), late.epoch, &*disk) {
            assert!(std::time::Instant::now() < deadline, "nothing is copied");
            std::thread::yield_now();
        }
        assert!(!machine.must_copy(0, block(3), late.epoch));
        assert!(!machine.copy_now(0, block(5), overlapping.epoch, &*disk));
        assert!(machine.must_copy(0, block(5), overlapping.epoch));
        machine.complete(0, stuck);
        cut.join().unwrap();
        assert!(machine.copy_now(0, block(5), overlapping.epoch, &*disk));
        disk.failing.store(true, Ordering::SeqCst);
        assert!(!machine.copy_now(0, block(7), overlapping.epoch, &*disk));
        machine.complete(0, late);
        machine.complete(0, overlapping);
        let status = machine.status();
        assert_eq!(
            (status.disks[0].copied_blocks, status.disks[0].copy_waits),
            (2, 0)
        );
    });
    keepers.end().unwrap();
}

#[test]
fn nobody_waits_for_an_epoch_that_is_given_up() {
    let folder = tempfile::tempdir().unwrap();
    let (machine, mut keepers, _disk) = quiet(folder.path());
    let extent = Extent {
        first_block: 5,
        block_count: 1,
    };
    let admit = || machine.admit(0, 0, extent, Operation::Write);
    let stuck = admit();
    let (late, woken) = std::thread::scope(|scope| {
        const BRIEFLY: Duration = Duration::from_millis(200);
        let cut = scope.spawn(|| machine.cut(Epoch::ZERO, Keep::Changed, BRIEFLY));
        await_settled(&machine, stuck.epoch);
        let late = admit();
        assert!(late.copies);
        let (bell, woken) = bell();
        machine.await_copy(0, extent, late.epoch, &bell, 1);
        assert!(cut.join().unwrap().is_err());
        (late, woken)
    });
    let rang = woken.recv_timeout(Duration::from_secs(2));
    machine.complete(0, stuck);
    machine.complete(0, late);
    assert_eq!(rang, Ok(1), "the write waits for nothing");
    keepers.end().unwrap();
}

/// Waits until it is known which blocks belong to an epoch that is being closed.
fn await_settled(machine: &Machine, epoch: Epoch) {
    let is_settled = || {
        let frozen = machine.disks[0].frozen();
        frozen.is_some_and(|frozen| frozen.epoch == epoch && frozen.is_settled())
    };
    let deadline = std::time::Instant::now() + PATIENCE;
    while !is_settled() {
        assert!(std::time::Instant::now() < deadline, "no cut");
        std::thread::yield_now();
    }
}

/// The epoch for which it would have waited may be sealed, and its own closed, before it is left waiting.
#[test]
fn a_write_never_waits_for_itself() {
    let folder = tempfile::tempdir().unwrap();
    let (machine, mut keepers, _disk) = quiet(folder.path());
    let extent = Extent {
        first_block: 5,
        block_count: 1,
    };
    let admit = || machine.admit(0, 0, extent, Operation::Write);
    machine.complete(0, admit());
    let first = machine.cut(Epoch::ZERO, Keep::Changed, PATIENCE).unwrap();
    let late = admit();
    assert!(late.copies && late.epoch > first);
    machine.seal(first).unwrap();
    std::thread::scope(|scope| {
        let cut = scope.spawn(|| machine.cut(Epoch::ZERO, Keep::Changed, PATIENCE).unwrap());
        await_settled(&machine, late.epoch);
        let (bell, woken) = bell();
        machine.await_copy(0, extent, late.epoch, &bell, 1);
        let rang = woken.recv_timeout(Duration::from_secs(2));
        machine.complete(0, late);
        cut.join().unwrap();
        assert_eq!(rang, Ok(1), "the write waits for itself");
    });
    keepers.end().unwrap();
}

/// A tracker that goes on with a closed epoch copies for it what belongs to it, not what was written since.
#[test]
fn after_a_kill_only_what_belongs_to_the_closed_epoch_is_copied() {
    let folder = tempfile::tempdir().unwrap();
    let block = |first_block| Extent {
        first_block,
        block_count: 1,
    };
    let (machine, mut keepers, _disk) = quiet(folder.path());
    let write = |machine: &Machine, first_block| {
        let admission = machine.admit(0, 0, block(first_block), Operation::Write);
        machine.complete(0, admission);
        admission
    };
    // As of its first epoch every block of a disk counts as changed.
    let first = machine.cut(Epoch::ZERO, Keep::Changed, PATIENCE).unwrap();
    machine.seal(first).unwrap();
    machine.commit(first).unwrap();
    write(&machine, 5);
    let closed = machine.cut(Epoch::ZERO, Keep::Changed, PATIENCE).unwrap();
    assert!(!write(&machine, 50).copies);
    keepers.end().unwrap();
    drop(keepers);
    drop(machine);
    let (machine, mut keepers, _disk) = quiet(folder.path());
    assert_eq!(machine.status().closed, Some(closed));
    assert!(write(&machine, 5).copies);
    assert!(
        !write(&machine, 50).copies,
        "it belongs to the open epoch alone"
    );
    keepers.end().unwrap();
}

/// A tracker that cannot go on with a closed epoch merges it, and whoever captures it is told.
#[test]
fn after_a_power_cut_the_epoch_is_merged() {
    let folder = tempfile::tempdir().unwrap();
    let (machine, mut keepers, _disk) = quiet(folder.path());
    let extent = Extent {
        first_block: 5,
        block_count: 1,
    };
    let first = machine.cut(Epoch::ZERO, Keep::Changed, PATIENCE).unwrap();
    machine.seal(first).unwrap();
    machine.commit(first).unwrap();
    let admission = machine.admit(0, 0, extent, Operation::Write);
    machine.complete(0, admission);
    let closed = machine.cut(Epoch::ZERO, Keep::Changed, PATIENCE).unwrap();
    let id = JournalReader::open(machine.journal_path(0).unwrap())
        .unwrap()
        .journal_id();
    let path = folder.path().join("0.preserve");
    let reader = PreserveReader::open(&path, &id, closed).unwrap();
    keepers.end().unwrap();
    drop(keepers);
    drop(machine);
    crate::failpoint::set_boot(Some([3; 16]));
    let (machine, mut keepers, _disk) = quiet(folder.path());
    crate::failpoint::set_boot(None);
    assert_eq!(machine.status().closed, None);
    assert_eq!(reader.failure(), Some(Failure::GivenUp));
    assert!(!path.exists());
    keepers.end().unwrap();
}
