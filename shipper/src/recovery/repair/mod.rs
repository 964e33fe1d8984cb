//! Bringing back what a vault has lost, from what the machine still has, and saying what cannot be brought back.
//!
//! Overview: every object that recovery points need is looked at, as `verify` does. What is missing or damaged is made again
//! byte for byte, so that every manifest that names it holds as before: from the file that waits for upload; or, of a
//! segment whose directory is whole, frame by frame from the disk, where it still has blocks of the same fingerprints.
//! Recovery points of which something stays lost are set aside (`vault::aside`).
//!
//! Why it is sound: nothing is written but the very bytes that a manifest names, proven by its check before. In an encrypted
//! vault these are the same texts under the same nonces: another text is never shown. A guest that writes meanwhile changes
//! nothing: a block counts by its fingerprint alone.
//!
//! Order, for what stays lost: the fingerprints of the machine are forgotten, and its scans begun anew, for they go by what
//! the vault had; then the points are set aside. A point that is whole again loses its record in the same order. So a kill
//! at any moment costs a comparison, and no fingerprint ever speaks for what is lost.
//!
//! Who may: only the holder of the machine's newest generation, and not beside `shipper run`: it takes the lock of the state
//! folder, and asks for the generation before each write.
//!
//! What it does not handle: key tables, claims and the vault's own file, which nothing local can prove. A store that cannot
//! be read at the moment ends it: that is no loss.

mod object;

mod source;

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use tracker::extent::Epoch;

use self::object::{check_whole, rebuild};
use self::source::{Disk, Files, NoDisk};
use super::verify::{check_structure, missing_before};
use super::workers::{Failure, Numbers, directory_threads};
use crate::error::{Error, ErrorKind, Result};
use crate::lifecycle::config::Config;
use crate::lifecycle::state::StateFolder;
use crate::segment::reference::SegmentRef;
use crate::segment::seal::Owner;
use crate::store::Store;
use crate::vault::aside::{self, Aside, LostSegment, is_lost};
use crate::vault::manifest::Manifest;
use crate::vault::{Vault, generation};

/// How to repair.
#[derive(Clone, Copy, Debug)]
pub struct RepairOptions {
    /// Whether every byte is looked at, and not only what describes them.
    pub data: bool,
    /// Threads that look; at least one.
    pub threads: usize,
}

/// What came of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RepairReport {
    /// Objects that were made again.
    pub repaired: u64,
    /// Recovery points that were set aside now.
    pub set_aside: Vec<Epoch>,
    /// Recovery points that were set aside before, and are whole again.
    pub whole_again: Vec<Epoch>,
}

/// Repairs what the vault has of a machine. `on_line` is told what was done.
///
/// # Errors
///
/// `InUse`: a shipper runs. `Fenced`: another one holds the machine. `Unsupported`: a newer program has written what is
/// there. Other kinds: vault, disk or state folder cannot be read or written; what was done until then is right.
pub fn repair(
    config: &Config,
    options: RepairOptions,
    on_line: &mut dyn FnMut(&str),
) -> Result<RepairReport> {
    let state = StateFolder::open(&config.state)?;
    let held = state.protected()?;
    let vault = Vault::open(&config.vault, &config.access)?;
    held.check(config, &vault)?;
    state.make_folders()?;
    let mut repair = Repair {
        config,
        options,
        vault: &vault,
        files: Files::open(&state)?,
        state: &state,
        generation: held.generation,
        report: RepairReport::default(),
        on_line,
    };
    repair.check_generation()?;
    repair.run()?;
    Ok(repair.report)
}

struct Repair<'a> {
    config: &'a Config,
    options: RepairOptions,
    vault: &'a Vault,
    files: Files<'a>,
    state: &'a StateFolder,
    generation: u64,
    report: RepairReport,
    on_line: &'a mut dyn FnMut(&str),
}

/// A segment that manifests name.
struct Named {
    key: String,
    owner: Owner,
    segment: SegmentRef,
    points: Vec<Epoch>,
    /// Every byte of it is looked at: it was asked for, or it was lost before.
    whole: bool,
    /// Manifests describe it in different ways, so that no object can be right for all.
    disputed: bool,
}

impl Named {
    /// Fails unless the object is what manifests name.
    fn look_at(&self, store: &dyn Store) -> Result<()> {
        let Self {
            key,
            owner,
            segment,
            ..
        } = self;
        match self.whole {
            true => check_whole(&store.read(key, None)?, key, segment, owner),
            false => check_structure(store, key, segment, owner).map(drop),
        }
    }

    fn lost(&self) -> LostSegment {
        LostSegment {
            disk: self.owner.disk.clone(),
            segment: self.segment.name,
        }
    }
}

/// What is wrong with points.
#[derive(Default)]
struct Losses(BTreeMap<Epoch, (String, BTreeSet<LostSegment>)>);

impl Losses {
    fn add(&mut self, epoch: Epoch, why: &str, lost: Option<LostSegment>) {
        let (_, all) = self
            .0
            .entry(epoch)
            .or_insert_with(|| (why.to_owned(), BTreeSet::new()));
        all.extend(lost);
    }
}

impl Repair<'_> {
    fn run(&mut self) -> Result<()> {
        let Config { machine, .. } = self.config;
        let before = aside::list_each(self.vault, machine)?;
        let lost_before: BTreeSet<LostSegment> = before
            .iter()
            .filter_map(|(_, aside)| aside.as_ref().ok())
            .flat_map(|aside| aside.lost.iter().cloned())
            .collect();
        let mut losses = Losses::default();
        let manifests = self.manifests(&mut losses)?;
        let named = self.catalog(&manifests, &lost_before);
        for (number, problem) in self.examine(&named)? {
            let named = &named[number];
            if let Some(why) = self.mend(named, &problem)? {
                for epoch in &named.points {
                    losses.add(*epoch, &why, Some(named.lost()));
                }
            }
        }
        // A vault that was unmounted looks like one that has lost everything.
        self.vault.check_present()?;
        self.settle(before, losses)
    }

    fn check_generation(&self) -> Result<()> {
        generation::check(self.vault, &self.config.machine, self.generation)
    }

    /// Puts the right bytes in place of an object.
    fn put(&mut self, key: &str, content: Vec<u8>, from: &str) -> Result<()> {
        self.check_generation()?;
        self.vault.store().replace(key, Bytes::from(content))?;
        self.report.repaired += 1;
        (self.on_line)(&format!("Repaired: object {key} of the vault, from {from}"));
        Ok(())
    }

    /// Reads all manifests, and puts those in their place that are lost and still wait for their release.
    fn manifests(&mut self, losses: &mut Losses) -> Result<Vec<Manifest>> {
        let Config { machine, .. } = self.config;
        let points = self.vault.points(machine)?;
        let boundary = self.vault.boundary(machine)?;
        let mut found = Vec::new();
        for epoch in &points {
            match self.vault.manifest(machine, *epoch) {
                Ok(manifest) => found.push(manifest),
                Err(error) if is_lost(&error) => {
                    found.extend(self.mend_manifest(*epoch, &error, losses)?);
                }
                Err(error) => return Err(error),
            }
        }
        let missing: Vec<(Epoch, Epoch)> = found
            .iter()
            .filter_map(|manifest| {
                let missing = missing_before(manifest, &points, boundary.as_deref())?;
                Some((missing, manifest.epoch))
            })
            .collect();
        for (epoch, next) in missing {
            let what =
                format!("its manifest is missing, which point {next} names as the one before it");
            found.extend(self.mend_manifest(
                epoch,
                &Error::new(ErrorKind::Missing, what),
                losses,
            )?);
        }
        Ok(found)
    }

    fn mend_manifest(
        &mut self,
        epoch: Epoch,
        error: &Error,
        losses: &mut Losses,
    ) -> Result<Option<Manifest>> {
        let Config { machine, .. } = self.config;
        let (id, keys) = (self.vault.point_id(machine, epoch), self.vault.keys());
        let key = self.vault.manifest_key(machine, epoch);
        match self.vault.store().read(&key, None) {
            Ok(bytes) if Manifest::is_authentic(&bytes, keys, &id) => {
                let what = format!("{}: nothing was repaired", error.chain());
                return Err(Error::new(ErrorKind::Unsupported, what));
            }
            Err(error) if !is_lost(&error) => return Err(error),
            _ => {}
        }
        if let Some(bytes) = self.files.manifest(&id, keys)? {
            self.put(&key, bytes, "the spool")?;
            return self.vault.manifest(&self.config.machine, epoch).map(Some);
        }
        losses.add(epoch, &error.chain(), None);
        Ok(None)
    }

    /// All distinct segments.
    fn catalog(&self, manifests: &[Manifest], lost: &BTreeSet<LostSegment>) -> Vec<Named> {
        let mut all: Vec<Named> = Vec::new();
        let mut positions: BTreeMap<LostSegment, Vec<usize>> = BTreeMap::new();
        for manifest in manifests {
            for disk in &manifest.disks {
                let owner = self.vault.owner(&self.config.machine, &disk.name);
                for segment in &disk.segments {
                    let name = LostSegment {
                        disk: disk.name.clone(),
                        segment: segment.name,
                    };
                    let whole = self.options.data || lost.contains(&name);
                    let known = positions.entry(name).or_default();
                    let same = known.iter().find(|at| all[**at].segment == *segment);
                    if let Some(at) = same {
                        all[*at].points.push(manifest.epoch);
                        continue;
                    }
                    known.push(all.len());
                    all.push(Named {
                        key: self
                            .vault
                            .segment_key(&self.config.machine, &disk.name, segment),
                        owner: owner.clone(),
                        segment: segment.clone(),
                        points: vec![manifest.epoch],
                        whole,
                        disputed: false,
                    });
                }
            }
        }
        for several in positions.values().filter(|several| several.len() > 1) {
            several.iter().for_each(|at| all[*at].disputed = true);
        }
        all
    }

    /// Looks at all segments; returns the positions of those that are not what they should be, and what is wrong.
    fn examine(&self, named: &[Named]) -> Result<BTreeMap<usize, Error>> {
        let failure = Failure::default();
        let numbers = Numbers::new(named.len(), &failure);
        let (found, problems) = crossbeam_channel::unbounded();
        let store = self.vault.store();
        std::thread::scope(|scope| {
            for _ in 0..directory_threads(self.options.threads) {
                let (found, numbers) = (found.clone(), &numbers);
                scope.spawn(move || {
                    numbers.work(|number| match named[number].look_at(store) {
                        Err(error) if is_lost(&error) => {
                            let _caller_gone = found.send((number, error));
                            Ok(())
                        }
                        result => result,
                    });
                });
            }
        });
        drop(found);
        failure.into_result()?;
        Ok(problems.into_iter().collect())
    }

    /// Brings a segment back; otherwise says why not.
    fn mend(&mut self, named: &Named, problem: &Error) -> Result<Option<String>> {
        let Named {
            key,
            owner,
            segment,
            ..
        } = named;
        let what = match problem.kind() {
            ErrorKind::Missing => format!("Object {key} of the vault is missing"),
            _ => problem.chain(),
        };
        if named.disputed {
            return Ok(Some(format!(
                "{what}, and recovery points describe it in different ways"
            )));
        }
        if let Some(content) = self.files.segment(&owner.disk, segment)?
            && check_whole(&content, key, segment, owner).is_ok()
        {
            self.put(key, content, "the files that wait for upload")?;
            return Ok(None);
        }
        let content = match self.vault.store().read(key, None) {
            Err(error) if is_lost(&error) => return Ok(Some(what)),
            result => result?,
        };
        let disk = Disk::open(self.config, &owner.disk)?;
        let source = disk
            .as_ref()
            .map_or(&NoDisk as &dyn object::Blocks, |disk| disk);
        let codec = self.config.codec;
        match rebuild(&content, key, segment, owner, codec, source) {
            Ok(Ok(made)) => {
                self.put(key, made, "the disk")?;
                Ok(None)
            }
            Ok(Err(offset)) => Ok(Some(format!(
                "{what}; of the frame at offset {offset} the disk has other blocks by now"
            ))),
            Err(error) if is_lost(&error) => Ok(Some(what)),
            Err(error) => Err(error),
        }
    }

    /// Sets aside what is lost, and takes back what is whole again.
    fn settle(&mut self, before: Vec<(Epoch, Result<Aside>)>, losses: Losses) -> Result<()> {
        let Config { machine, .. } = self.config;
        let (mut known, mut gone) = (BTreeMap::new(), BTreeSet::new());
        for (epoch, aside) in before {
            match aside {
                _ if !losses.0.contains_key(&epoch) => {
                    gone.insert(epoch);
                }
                Ok(aside) => {
                    known.insert(epoch, aside);
                }
                Err(_) => {}
            }
        }
        let mut new = Vec::new();
        for (epoch, (why, lost)) in losses.0 {
            let lost: Vec<LostSegment> = lost.into_iter().collect();
            if known.get(&epoch).is_none_or(|aside| aside.lost != lost) {
                let created = jiff::Timestamp::now();
                new.push(Aside {
                    epoch,
                    why,
                    created,
                    lost,
                });
            }
        }
        if new.is_empty() && gone.is_empty() {
            return Ok(());
        }
        self.forget()?;
        for aside in new {
            self.check_generation()?;
            aside::write(self.vault, machine, &aside)?;
            let (epoch, why) = (aside.epoch, &aside.why);
            (self.on_line)(&format!("Set aside: recovery point {epoch}: {why}"));
            self.report.set_aside.push(epoch);
        }
        for epoch in gone {
            self.check_generation()?;
            aside::remove(self.vault, machine, epoch)?;
            (self.on_line)(&format!("Whole again: recovery point {epoch}"));
            self.report.whole_again.push(epoch);
        }
        Ok(())
    }

    /// Everything that goes by what the vault had begins anew.
    fn forget(&self) -> Result<()> {
        self.state.forget_fingerprints()?;
        let mut scan = self.state.scan()?;
        scan.disks
            .iter_mut()
            .for_each(|disk| disk.lose_segments(Epoch::ZERO));
        self.state.save_scan(&scan)
    }
}
