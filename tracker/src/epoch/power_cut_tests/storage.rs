//! The storage under the journals: what the page cache holds, what is durable, what a power cut leaves.
//!
//! Overview: the files in a folder in memory are the page cache. Beside each stands its platter, an image
//! of what is durable. A sync takes over what the file holds; at any other moment a page may be written
//! back, as a whole or by sectors; a power cut keeps of each page that differs what chance decides.
//!
//! Names: a rename that no sync of the folder followed may come out either way.
//!
//! Errors: after a sync that failed the kernel calls pages clean that it could not write. They are not
//! written any more until they change again, and at any time fall back to what is durable.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::failpoint::Place;
use crate::journal::format::{INTENT_OFFSET, INTENT_PAGES_RANGE, PAGE_BYTES};

const SECTOR_BYTES: usize = 512;

/// Numbers that a seed tells in advance.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    /// A number below `end`, which is above zero.
    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    pub fn index(&mut self, length: usize) -> usize {
        self.below(length as u64) as usize
    }

    /// True once in so many times.
    pub fn once_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }
}

/// How a machine goes down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Down {
    PowerCut,
    Kill,
}

/// A file: its page cache is the file itself.
struct Stored {
    /// Files are taken in this order: what numbers inodes get is not ours.
    serial: u64,
    file: File,
    platter: Vec<u8>,
    /// Pages that could not be written and count as clean, as they were then.
    given_up: BTreeMap<usize, Vec<u8>>,
}

/// A file at some moment.
#[derive(Clone)]
struct Frozen {
    serial: u64,
    ram: Vec<u8>,
    platter: Vec<u8>,
    given_up: BTreeMap<usize, Vec<u8>>,
}

/// Inode numbers of a journal and of the one that is to take its place.
type Names = [Option<u64>; 2];

/// All files at some moment.
pub struct Frame {
    files: BTreeMap<u64, Frozen>,
    names: Vec<Names>,
    durable_names: Vec<Names>,
}

pub struct Storage {
    folder: PathBuf,
    folder_inode: u64,
    rng: Rng,
    files: BTreeMap<u64, Stored>,
    durable_names: Vec<Names>,
    next_serial: u64,
    /// Syncs may fail.
    pub faulty: bool,
}

/// Path of the journal of a disk.
pub fn journal_path(folder: &Path, disk: usize) -> PathBuf {
    folder.join(format!("{disk}.hrl"))
}

fn read_all(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

/// The part of a page that an image has.
fn page_range(page: usize, length: usize) -> Range<usize> {
    let begin = (page * PAGE_BYTES).min(length);
    begin..(begin + PAGE_BYTES).min(length)
}

impl Storage {
    /// An empty folder for so many disks.
    pub fn new(folder: &Path, disks: usize, rng: Rng) -> Self {
        for entry in std::fs::read_dir(folder).unwrap() {
            std::fs::remove_file(entry.unwrap().path()).unwrap();
        }
        Self {
            folder: folder.to_owned(),
            folder_inode: std::fs::metadata(folder).unwrap().ino(),
            rng,
            files: BTreeMap::new(),
            durable_names: vec![[None; 2]; disks],
            next_serial: 0,
            faulty: false,
        }
    }

    fn path(&self, disk: usize, kind: usize) -> PathBuf {
        let path = journal_path(&self.folder, disk);
        match kind {
            0 => path,
            _ => path.with_added_extension("new"),
        }
    }

    fn names(&self) -> Vec<Names> {
        let inode = |disk, kind| {
            let metadata = std::fs::metadata(self.path(disk, kind));
            metadata.ok().map(|metadata| metadata.ino())
        };
        let disks = 0..self.durable_names.len();
        disks.map(|disk| [inode(disk, 0), inode(disk, 1)]).collect()
    }

    /// Opens files that have a name and are not known yet; nothing of them is durable.
    fn meet(&mut self) -> Vec<Names> {
        let names = self.names();
        for (disk, pair) in names.iter().enumerate() {
            for (kind, inode) in pair.iter().enumerate() {
                if let Some(inode) = inode
                    && !self.files.contains_key(inode)
                {
                    let path = self.path(disk, kind);
                    let file = OpenOptions::new()
                        .read(true)
                        .write(true)
                        .open(path)
                        .unwrap();
                    self.next_serial += 1;
                    let stored = Stored {
                        serial: self.next_serial,
                        file,
                        platter: Vec::new(),
                        given_up: BTreeMap::new(),
                    };
                    self.files.insert(*inode, stored);
                }
            }
        }
        names
    }

    /// These bytes of a file are durable, or the names in a folder.
    pub fn made_durable(&mut self, inode: u64, bytes: Range<u64>) {
        if inode == self.folder_inode {
            self.durable_names = self.meet();
            let named: Vec<u64> = self
                .durable_names
                .iter()
                .flatten()
                .flatten()
                .copied()
                .collect();
            self.files.retain(|inode, _| named.contains(inode));
            return;
        }
        if !self.files.contains_key(&inode) {
            self.meet();
        }
        let Some(stored) = self.files.get_mut(&inode) else {
            return;
        };
        if bytes.end == u64::MAX {
            stored.sync();
        } else {
            let page = bytes.start as usize / PAGE_BYTES;
            stored.write_back(page, None);
        }
    }

    /// Something may be written back now, or fall back if it could not be.
    pub fn drift(&mut self) {
        if !self.rng.once_in(24) {
            return;
        }
        let Some(stored) = pick(&mut self.files, &mut self.rng) else {
            return;
        };
        let page = stored.likely_page(&mut self.rng);
        if stored.given_up.contains_key(&page) && self.rng.once_in(2) {
            stored.fall_back(page);
            return;
        }
        // A page that falls back after a failure is one that was written as a whole.
        let torn = self.rng.once_in(2) && !self.faulty;
        let sectors = torn.then(|| self.rng.next() as u8);
        stored.write_back(page, sectors);
    }

    /// What is done with a file at this place fails, or not.
    pub fn attempt(&mut self, place: Place, inode: u64) -> std::io::Result<()> {
        if !self.faulty || !self.rng.once_in(12) {
            return Ok(());
        }
        // A write past the page cache leaves that as it is.
        if place == Place::SyncAfterStoresBeforeDurable
            && let Some(stored) = self.files.get_mut(&inode)
        {
            stored.fail(&mut self.rng);
        }
        Err(std::io::Error::from_raw_os_error(libc::EIO))
    }

    /// All files as they are now.
    pub fn freeze(&mut self) -> Frame {
        let names = self.meet();
        let frozen = |(inode, stored): (&u64, &Stored)| {
            let frozen = Frozen {
                serial: stored.serial,
                ram: read_all(&stored.file),
                platter: stored.platter.clone(),
                given_up: stored.given_up.clone(),
            };
            (*inode, frozen)
        };
        Frame {
            files: self.files.iter().map(frozen).collect(),
            names,
            durable_names: self.durable_names.clone(),
        }
    }

    /// The machine went down at this moment: makes the files what it finds when it is up again.
    pub fn resume(&mut self, frame: Frame, down: Down) {
        let mut names = frame.names;
        let mut durable_names = frame.durable_names;
        let mut files = frame.files;
        if down == Down::PowerCut {
            for (name, durable) in names.iter_mut().zip(&durable_names) {
                let either = [*name, *durable, [durable[0], name[1]]];
                *name = either[self.rng.index(3)];
            }
            durable_names.clone_from(&names);
            let mut in_order: Vec<&mut Frozen> = files.values_mut().collect();
            in_order.sort_by_key(|frozen| frozen.serial);
            for frozen in in_order {
                frozen.cut_power(&mut self.rng);
            }
        }
        let mut moved = BTreeMap::new();
        for (disk, wanted) in names.iter().enumerate() {
            for kind in [1, 0] {
                self.put(disk, kind, wanted[kind], &files, &mut moved);
            }
        }
        // A file without a name, which the platter still knows by one.
        for inode in durable_names.iter().flatten().flatten().copied() {
            moved.entry(inode).or_insert_with(|| {
                let path = self.folder.join("unnamed");
                let new = self.make(&path, &files[&inode]);
                std::fs::remove_file(&path).unwrap();
                new
            });
        }
        for inode in durable_names.iter_mut().flatten().flatten() {
            *inode = moved[inode];
        }
        self.durable_names = durable_names;
        let kept: Vec<u64> = moved.into_values().collect();
        self.files.retain(|inode, _| kept.contains(inode));
    }

    /// Gives a name to a file with this content: to the one that has it now, or to a new one.
    fn put(
        &mut self,
        disk: usize,
        kind: usize,
        wanted: Option<u64>,
        files: &BTreeMap<u64, Frozen>,
        moved: &mut BTreeMap<u64, u64>,
    ) {
        let path = self.path(disk, kind);
        let present = std::fs::metadata(&path).ok().map(|metadata| metadata.ino());
        let Some(wanted) = wanted else {
            if present.is_some() {
                std::fs::remove_file(&path).unwrap();
            }
            return;
        };
        let frozen = &files[&wanted];
        if present == Some(wanted) {
            let stored = self.files.get_mut(&wanted).unwrap();
            stored.become_frozen(frozen);
            moved.insert(wanted, wanted);
            return;
        }
        let temporary = self.folder.join("made");
        let inode = self.make(&temporary, frozen);
        std::fs::rename(&temporary, &path).unwrap();
        moved.insert(wanted, inode);
    }

    fn make(&mut self, path: &Path, frozen: &Frozen) -> u64 {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(true);
        let file = options.open(path).unwrap();
        file.write_all_at(&frozen.ram, 0).unwrap();
        let inode = file.metadata().unwrap().ino();
        self.next_serial += 1;
        let stored = Stored {
            serial: self.next_serial,
            file,
            platter: frozen.platter.clone(),
            given_up: frozen.given_up.clone(),
        };
        self.files.insert(inode, stored);
        inode
    }
}

fn pick<'a>(files: &'a mut BTreeMap<u64, Stored>, rng: &mut Rng) -> Option<&'a mut Stored> {
    let mut in_order: Vec<&mut Stored> = files.values_mut().collect();
    in_order.sort_by_key(|stored| stored.serial);
    let length = in_order.len();
    (length > 0).then(|| in_order.swap_remove(rng.index(length)))
}

impl Stored {
    /// A sync: everything that the kernel does not call clean. The intent log is durable transaction by
    /// transaction, so it is looked at only when the file is new.
    fn sync(&mut self) {
        let length = self.file.metadata().unwrap().len() as usize;
        let intent = INTENT_OFFSET as usize;
        let behind = intent + *INTENT_PAGES_RANGE.start() as usize * PAGE_BYTES;
        let areas = match self.platter.is_empty() {
            true => [0..intent, intent..length],
            false => [0..intent, behind..length],
        };
        self.platter.resize(length, 0);
        let mut ram = Vec::new();
        for area in areas {
            ram.resize(area.len(), 0);
            self.file
                .read_exact_at(&mut ram, area.start as u64)
                .unwrap();
            for (index, page) in ram.chunks(PAGE_BYTES).enumerate() {
                self.take_page(area.start / PAGE_BYTES + index, page, None);
            }
        }
    }

    /// Writes a page back, or these sectors of it.
    fn write_back(&mut self, page: usize, sectors: Option<u8>) {
        let range = page_range(page, self.platter.len());
        let mut ram = vec![0; range.len()];
        // The file may be shorter at this moment.
        let read = self.file.read_at(&mut ram, range.start as u64);
        if read.is_ok_and(|count| count == ram.len()) {
            self.take_page(page, &ram, sectors);
        }
    }

    fn take_page(&mut self, page: usize, ram: &[u8], sectors: Option<u8>) {
        let range = page_range(page, self.platter.len());
        let platter = &mut self.platter[range];
        if platter == ram {
            return;
        }
        if self.given_up.get(&page).is_some_and(|then| then == ram) {
            return;
        }
        self.given_up.remove(&page);
        mix(platter, ram, sectors.unwrap_or(u8::MAX));
    }

    /// The page is dropped and read again.
    fn fall_back(&mut self, page: usize) {
        let Some(then) = self.given_up.remove(&page) else {
            return;
        };
        let range = page_range(page, self.platter.len());
        let mut ram = vec![0; range.len()];
        let read = self.file.read_at(&mut ram, range.start as u64);
        if read.is_ok_and(|count| count == ram.len()) && ram == then {
            let platter = &self.platter[range.clone()];
            self.file.write_all_at(platter, range.start as u64).unwrap();
        }
    }

    /// A sync that fails: some pages stay dirty, some are durable, some count as clean and are not.
    fn fail(&mut self, rng: &mut Rng) {
        let ram = read_all(&self.file);
        let length = ram.len().min(self.platter.len());
        for page in 0..length.div_ceil(PAGE_BYTES) {
            let range = page_range(page, length);
            if range.len() < PAGE_BYTES || ram[range.clone()] == self.platter[range.clone()] {
                continue;
            }
            match rng.below(4) {
                0 => {}
                1 => self.take_page(page, &ram[range], None),
                2 => drop(self.given_up.insert(page, ram[range].to_vec())),
                _ => {
                    self.given_up.insert(page, ram[range].to_vec());
                    self.fall_back(page);
                }
            }
        }
    }

    /// A page that is written often.
    fn likely_page(&self, rng: &mut Rng) -> usize {
        let pages = self.platter.len().div_ceil(PAGE_BYTES).max(1);
        let behind_intents =
            INTENT_OFFSET as usize / PAGE_BYTES + *INTENT_PAGES_RANGE.start() as usize;
        match rng.below(3) {
            0 => rng.index(3),
            _ if behind_intents < pages => behind_intents + rng.index(pages - behind_intents),
            _ => 0,
        }
    }

    fn become_frozen(&mut self, frozen: &Frozen) {
        self.platter.clone_from(&frozen.platter);
        self.given_up.clone_from(&frozen.given_up);
        self.file.set_len(frozen.ram.len() as u64).unwrap();
        let ram = read_all(&self.file);
        for (index, page) in frozen.ram.chunks(PAGE_BYTES).enumerate() {
            let begin = index * PAGE_BYTES;
            if ram[begin..begin + page.len()] != *page {
                self.file.write_all_at(page, begin as u64).unwrap();
            }
        }
    }
}

fn mix(platter: &mut [u8], ram: &[u8], sectors: u8) {
    let pieces = platter
        .chunks_mut(SECTOR_BYTES)
        .zip(ram.chunks(SECTOR_BYTES));
    for (sector, (old, new)) in pieces.enumerate() {
        if sectors >> sector & 1 == 1 {
            old.copy_from_slice(new);
        }
    }
}

impl Frozen {
    /// What is left of it.
    fn cut_power(&mut self, rng: &mut Rng) {
        let mode = rng.below(5);
        let mut left = std::mem::take(&mut self.platter);
        if mode != 0 && rng.once_in(2) {
            left.resize(self.ram.len(), 0);
        }
        let length = left.len().min(self.ram.len());
        let share = [2, 2, 8][rng.index(3)];
        for page in 0..length.div_ceil(PAGE_BYTES) {
            let range = page_range(page, length);
            let (old, new) = (&mut left[range.clone()], &self.ram[range]);
            if *old == *new || self.given_up.get(&page).is_some_and(|then| then == new) {
                continue;
            }
            let sectors = match mode {
                0 => 0,
                1 => u8::MAX,
                2 => rng.next() as u8,
                3 if rng.once_in(share) => 0,
                4 if rng.once_in(share) => rng.next() as u8,
                3 => u8::MAX,
                _ => 0,
            };
            mix(old, new, sectors);
        }
        self.ram.clone_from(&left);
        self.platter = left;
        self.given_up.clear();
    }
}
