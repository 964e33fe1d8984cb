//! Proof that recovery points can be restored, without restoring them.
//!
//! Overview: all manifests are read, and from them the list of distinct segments, each with the
//! recovery points that need it. A few threads look at each segment once: size, header, footer and
//! directory. With `data` they also cut it into pieces, and workers read these, check every frame,
//! and compare every block with its fingerprint. Problems come to the caller's thread as lines.
//!
//! A problem does not stop the rest. Segments that no manifest names are none: a point that is not
//! published yet has some.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crossbeam_channel::{Receiver, Sender, bounded};
use tracker::extent::Epoch;

use super::piece::{Limits, Piece, cut};
use super::workers::{Failure, Numbers, data_threads, directory_threads};
use crate::error::{Error, ErrorKind, Result};
use crate::segment::format::{Directory, HEADER_BYTES};
use crate::segment::frame::damaged;
use crate::segment::reader::{check_header, read_directory, tail_bytes};
use crate::segment::reference::{NameField, SegmentRef};
use crate::segment::seal::Owner;
use crate::store::Store;
use crate::vault::boundary::Boundary;
use crate::vault::layout::{MACHINES_PREFIX, generation_of, is_valid_name};
use crate::vault::manifest::{DiskPoint, Manifest};
use crate::vault::{Vault, aside, generation};

/// All bytes are read, so there are no gaps.
const LIMITS: Limits = Limits {
    read_bytes_max: 8 << 20,
    gap_bytes_max: 0,
};
/// Recovery points that a problem lists; of the others it says how many they are.
const POINTS_SHOWN: usize = 3;

/// What to verify.
#[derive(Clone, Debug)]
pub struct VerifyOptions {
    /// Name of the machine; `None`: all that the vault has.
    pub machine: Option<String>,
    /// Whether the data are read too, and not only what describes them.
    pub data: bool,
    /// Threads that read and check; at least one.
    pub threads: usize,
}

/// What was verified.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VerifyReport {
    /// Recovery points, without those that are set aside.
    pub points: u64,
    /// Recovery points that are set aside. What is lost of them is no problem any more; it is not looked at.
    pub set_aside: u64,
    /// Distinct segments that they name.
    pub segments: u64,
    /// Bytes that were read of these segments.
    pub bytes: u64,
    /// Problems that were found.
    pub problems: u64,
}

/// Verifies the recovery points of one machine or all. `on_problem` gets one line for each
/// problem, with the object's key and the recovery points that it affects.
///
/// # Errors
///
/// `Missing`: the vault has nothing of the machine. `Unavailable`: the vault has gone meanwhile.
/// Other kinds: the vault cannot be listed. What is wrong with objects is a problem, not an error.
pub fn verify(
    vault: &Vault,
    options: &VerifyOptions,
    on_problem: &mut dyn FnMut(&str),
) -> Result<VerifyReport> {
    let mut report = VerifyReport::default();
    let mut problems = 0;
    let mut problem = |line: String| {
        problems += 1;
        on_problem(&line);
    };
    vault.key_problems()?.into_iter().for_each(&mut problem);
    for machine in machines(vault, options, &mut problem)? {
        let mut catalog = Catalog::default();
        if vault.keys().sealing().is_some() {
            catalog.claimed = Some(check_claims(vault, &machine, &mut problem)?);
        }
        let (points, set_aside) = catalog.read(vault, &machine, &mut problem)?;
        let task = Task {
            vault,
            machine: &machine,
            segments: &catalog.segments,
            options,
            bytes: AtomicU64::new(0),
        };
        task.run(&mut problem);
        report.points += points;
        report.set_aside += set_aside;
        report.segments += catalog.segments.len() as u64;
        report.bytes += task.bytes.into_inner();
    }
    report.problems = problems;
    // A vault that was unmounted looks like one that has lost everything.
    vault.check_present()?;
    Ok(report)
}

fn machines(
    vault: &Vault,
    options: &VerifyOptions,
    problem: &mut dyn FnMut(String),
) -> Result<BTreeSet<String>> {
    let Some(machine) = &options.machine else {
        return all_machines(vault, problem);
    };
    if !is_valid_name(machine) {
        let what = format!("{machine:?} is not the name of a machine");
        return Err(Error::new(ErrorKind::Invalid, what));
    }
    if vault
        .store()
        .list(&vault.machine_prefix(machine))?
        .is_empty()
    {
        let url = vault.url();
        let what = format!("The vault at {url} has nothing of machine {machine}");
        return Err(Error::new(ErrorKind::Missing, what));
    }
    Ok(BTreeSet::from([machine.clone()]))
}

/// Names of all machines. In an encrypted vault their claims say them.
fn all_machines(vault: &Vault, problem: &mut dyn FnMut(String)) -> Result<BTreeSet<String>> {
    let listed = vault.store().list(MACHINES_PREFIX)?;
    let mut claims: BTreeMap<&str, Option<u64>> = BTreeMap::new();
    for object in &listed {
        let mut parts = object.key.split('/');
        if let Some(name) = parts.nth(1).filter(|name| is_valid_name(name)) {
            let is_claim = parts.next() == Some("generation");
            let claim = generation_of(&object.key).filter(|_| is_claim);
            let first = claims.entry(name).or_default();
            *first = (*first).or(claim);
        }
    }
    if vault.keys().sealing().is_none() {
        return Ok(claims.into_keys().map(str::to_owned).collect());
    }
    let mut machines = BTreeSet::new();
    for (name, claim) in claims {
        match claim.map(|claim| generation::read_machine(vault, name, claim)) {
            Some(Ok(machine)) => {
                machines.insert(machine);
            }
            Some(Err(error)) => problem(format!(
                "{}; which machine it is cannot be told, name it",
                error.chain()
            )),
            None => problem(format!(
                "Objects below {MACHINES_PREFIX}/{name} of the vault are of a machine without a claim, name it"
            )),
        }
    }
    Ok(machines)
}

/// Looks at the claims of a machine of an encrypted vault; returns the highest.
fn check_claims(vault: &Vault, machine: &str, problem: &mut dyn FnMut(String)) -> Result<u64> {
    let claimed = generation::claimed(vault, machine)?;
    let name = vault.keys().machine_in_keys(machine);
    for (expected, found) in (1..).zip(&claimed) {
        if expected != *found {
            let missing = vault.generation_key(machine, expected);
            problem(format!(
                "Object {missing} of the vault is missing: {found} is claimed"
            ));
            break;
        }
        if let Err(error) = generation::read_machine(vault, &name, *found) {
            problem(error.chain());
        }
    }
    Ok(claimed.last().copied().unwrap_or(0))
}

/// The recovery points that a problem affects.
#[derive(Debug, Default)]
struct Points {
    first: Vec<Epoch>,
    count: usize,
}

impl Points {
    fn add(&mut self, epoch: Epoch) {
        if self.first.len() < POINTS_SHOWN {
            self.first.push(epoch);
        }
        self.count += 1;
    }
}

impl fmt::Display for Points {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown: Vec<_> = self.first.iter().map(Epoch::to_string).collect();
        let plural = if self.count == 1 { "" } else { "s" };
        write!(f, "recovery point{plural} {}", shown.join(", "))?;
        match self.count - self.first.len() {
            0 => Ok(()),
            more => write!(f, " and {more} more"),
        }
    }
}

/// A segment that manifests name.
#[derive(Debug)]
struct Named {
    key: String,
    disk: String,
    segment: SegmentRef,
    points: Points,
}

impl Named {
    /// A problem of this segment as a line.
    fn line(&self, error: &Error) -> String {
        let (key, points, what) = (&self.key, &self.points, error.chain());
        if what.contains(key) {
            format!("{what}; affects {points}")
        } else {
            format!("Object {key} of the vault: {what}; affects {points}")
        }
    }

    fn error(&self, what: &str) -> Error {
        damaged(&self.key, what)
    }
}

/// All distinct segments of a machine.
#[derive(Debug, Default)]
struct Catalog {
    segments: Vec<Named>,
    /// The highest generation that is claimed, where that counts.
    claimed: Option<u64>,
    /// The newest boundary.
    boundary: Option<Arc<Boundary>>,
    /// Positions by disk and name.
    positions: HashMap<String, HashMap<NameField, usize>>,
}

impl Catalog {
    /// Reads all manifests of a machine that are not set aside; returns how many these are, and how many the others.
    fn read(
        &mut self,
        vault: &Vault,
        machine: &str,
        problem: &mut dyn FnMut(String),
    ) -> Result<(u64, u64)> {
        let mut points = vault.points(machine)?;
        self.boundary = vault.boundary(machine)?;
        self.check_kept(vault, machine, &points, problem)?;
        let mut set_aside = BTreeSet::new();
        for (epoch, aside) in aside::list_each(vault, machine)? {
            match aside {
                Ok(aside) => drop(set_aside.insert(aside.epoch)),
                Err(error) => problem(format!(
                    "{}; it sets recovery point {epoch} aside",
                    error.chain()
                )),
            }
        }
        let good: Vec<Epoch> = points
            .iter()
            .filter(|epoch| !set_aside.contains(*epoch))
            .copied()
            .collect();
        // That one is gone was known when it was set aside.
        points.extend(&set_aside);
        points.sort_unstable();
        for epoch in &good {
            let key = vault.manifest_key(machine, *epoch);
            match vault.read_manifest(machine, *epoch) {
                Ok(manifest) => self.take(vault, &key, &manifest, &points, problem),
                Err(error) => {
                    let what = error.chain();
                    problem(if what.contains(&key) {
                        format!("{what}; affects recovery point {epoch}")
                    } else {
                        format!("Object {key} of the vault: {what}; affects recovery point {epoch}")
                    });
                }
            }
        }
        Ok((good.len() as u64, set_aside.len() as u64))
    }

    /// Looks for the manifests that the newest boundary keeps.
    fn check_kept(
        &self,
        vault: &Vault,
        machine: &str,
        points: &[Epoch],
        problem: &mut dyn FnMut(String),
    ) -> Result<()> {
        for epoch in self.boundary.iter().flat_map(|boundary| &boundary.kept) {
            let missing = vault.manifest_key(machine, *epoch);
            // One that came after the listing is there by now.
            if points.binary_search(epoch).is_err() && vault.store().size(&missing)?.is_none() {
                problem(format!(
                    "Object {missing} of the vault is missing: it was not removed by retention; affects recovery point {epoch}"
                ));
            }
        }
        Ok(())
    }

    fn take(
        &mut self,
        vault: &Vault,
        key: &str,
        manifest: &Manifest,
        points: &[Epoch],
        problem: &mut dyn FnMut(String),
    ) {
        let (epoch, previous) = (manifest.epoch, manifest.previous);
        // What retention has decided about was looked at already.
        let boundary = self.boundary.as_deref();
        let is_decided = boundary.is_some_and(|boundary| boundary.keeps(previous).is_some());
        if previous >= epoch {
            problem(format!(
                "Object {key} of the vault: it calls {previous} the one before it; affects recovery point {epoch}"
            ));
        } else if !is_decided && missing_before(manifest, points, boundary).is_some() {
            let missing = vault.manifest_key(&manifest.machine, previous);
            problem(format!(
                "Object {missing} of the vault is missing: {key} names it as the one before it; \
                 affects recovery point {previous}"
            ));
        }
        if let Some(claimed) = self
            .claimed
            .filter(|claimed| manifest.generation > *claimed)
        {
            let missing = vault.generation_key(&manifest.machine, claimed + 1);
            problem(format!(
                "Object {missing} of the vault is missing: {key} is of generation {}",
                manifest.generation
            ));
        }
        let mut names = BTreeSet::new();
        for disk in &manifest.disks {
            if !names.insert(&disk.name) {
                let name = &disk.name;
                problem(format!(
                    "Object {key} of the vault: it lists disk {name} twice; affects recovery point {epoch}"
                ));
            }
            self.take_disk(vault, manifest, disk, problem);
        }
    }

    fn take_disk(
        &mut self,
        vault: &Vault,
        manifest: &Manifest,
        disk: &DiskPoint,
        problem: &mut dyn FnMut(String),
    ) {
        let epoch = manifest.epoch;
        let positions = self.positions.entry(disk.name.clone()).or_default();
        for segment in &disk.segments {
            let position = *positions.entry(segment.name).or_insert_with(|| {
                self.segments.push(Named {
                    key: vault.segment_key(&manifest.machine, &disk.name, segment),
                    disk: disk.name.clone(),
                    segment: segment.clone(),
                    points: Points::default(),
                });
                self.segments.len() - 1
            });
            let named = &mut self.segments[position];
            if named.segment == *segment {
                named.points.add(epoch);
            } else {
                let (key, others) = (&named.key, &named.points);
                problem(format!(
                    "Object {key} of the vault: recovery point {epoch} describes it in another way than {others}"
                ));
            }
        }
    }
}

/// The point that a manifest calls the one before it, where that should be there and is not. `points` are in ascending order.
pub(super) fn missing_before(
    manifest: &Manifest,
    points: &[Epoch],
    boundary: Option<&Boundary>,
) -> Option<Epoch> {
    let previous = manifest.previous;
    if boundary.is_some_and(|boundary| boundary.keeps(previous) == Some(false)) {
        return None;
    }
    let is_kept = points.binary_search(&previous).is_ok();
    let is_older = points.first().is_some_and(|oldest| previous < *oldest);
    (!is_kept && !is_older && previous < manifest.epoch).then_some(previous)
}

/// Looks at size, header, footer and directory of a segment.
///
/// # Errors
///
/// `Missing`, `Corrupt`: it is not what a manifest names. Other kinds: the store fails.
pub(super) fn check_structure(
    store: &dyn Store,
    key: &str,
    segment: &SegmentRef,
    owner: &Owner,
) -> Result<Directory> {
    match store.size(key)? {
        None => return Err(Error::new(ErrorKind::Missing, "it is missing")),
        Some(size) if size != segment.bytes => {
            let what = format!("it has {size} bytes instead of {}", segment.bytes);
            return Err(damaged(key, &what));
        }
        Some(_) => {}
    }
    let header = store.read(key, Some(0..HEADER_BYTES as u64))?;
    check_header(&header, key, owner)?;
    read_directory(store, key, segment, owner)
}

/// The segments of a machine that are verified.
struct Task<'a> {
    vault: &'a Vault,
    machine: &'a str,
    segments: &'a [Named],
    options: &'a VerifyOptions,
    /// Bytes that were read.
    bytes: AtomicU64,
}

impl Task<'_> {
    fn run(&self, problem: &mut dyn FnMut(String)) {
        // Nothing fails as a whole here.
        let failure = Failure::default();
        let numbers = Numbers::new(self.segments.len(), &failure);
        let workers = if self.options.data {
            data_threads(self.options.threads)
        } else {
            0
        };
        let (pieces, work) = bounded::<Piece>(2 * workers);
        let (found, lines) = bounded::<String>(workers + 1);
        std::thread::scope(|scope| {
            for _ in 0..directory_threads(self.options.threads) {
                let (pieces, found, numbers) = (pieces.clone(), found.clone(), &numbers);
                scope.spawn(move || {
                    numbers.work(|number| {
                        self.check_segment(number, &pieces, &found);
                        Ok(())
                    });
                });
            }
            for _ in 0..workers {
                let (work, found) = (work.clone(), found.clone());
                scope.spawn(move || self.check_pieces(&work, &found));
            }
            drop((pieces, work, found));
            for line in lines {
                problem(line);
            }
        });
    }

    /// Looks at a segment, and hands on its pieces if all of it is to be read.
    fn check_segment(&self, number: usize, pieces: &Sender<Piece>, found: &Sender<String>) {
        let named = &self.segments[number];
        let directory = match self.check_structure(named) {
            Ok(directory) => directory,
            Err(error) => {
                let _caller_gone = found.send(named.line(&error));
                return;
            }
        };
        if !self.options.data {
            return;
        }
        let all = (0..directory.frames.len()).map(|frame| (frame, &[][..]));
        for piece in cut(number, &directory, all, LIMITS) {
            let _workers_gone = pieces.send(piece);
        }
    }

    fn check_structure(&self, named: &Named) -> Result<Directory> {
        let (key, segment) = (&*named.key, &named.segment);
        let owner = self.vault.owner(self.machine, &named.disk);
        let directory = check_structure(self.vault.store(), key, segment, &owner)?;
        let read = HEADER_BYTES as u64 + tail_bytes(segment, &owner);
        self.bytes.fetch_add(read, Ordering::Relaxed);
        Ok(directory)
    }

    fn check_pieces(&self, work: &Receiver<Piece>, found: &Sender<String>) {
        for piece in work {
            let named = &self.segments[piece.segment];
            if let Err(error) = self.check_piece(named, &piece) {
                let _caller_gone = found.send(named.line(&error));
            }
        }
    }

    /// Reads a piece and checks all its frames and blocks; the error is about all of them.
    fn check_piece(&self, named: &Named, piece: &Piece) -> Result<()> {
        let stored = piece.read(self.vault.store(), &named.key)?;
        self.bytes.fetch_add(stored.len() as u64, Ordering::Relaxed);
        let frames = piece.directory.frames.iter().enumerate();
        let mut bad = frames.filter_map(|(number, frame)| {
            let raw = match piece.decode(frame, &stored, self.vault.keys()) {
                Ok(raw) => raw,
                Err(what) => return Some(what),
            };
            let keys = self.vault.keys();
            piece.differing(number, &raw, keys).map(|block| {
                let offset = frame.offset;
                format!(
                    "block {block} of the frame at offset {offset} differs from its fingerprint"
                )
            })
        });
        let Some(first) = bad.next() else {
            return Ok(());
        };
        match bad.count() {
            0 => Err(named.error(&first)),
            more => Err(named.error(&format!("{first}, and {more} frames behind it are bad"))),
        }
    }
}
