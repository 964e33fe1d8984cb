//! Who is at work in the scenes, and what the search says of them.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tracker::extent::{BLOCK_SIZE, Epoch};

use super::promises::{Event, Journal};
use super::search::{Act, Scene, search};
use super::store::{Door, Memory, Wait};
use crate::error::{ErrorKind, Result};
use crate::keys::Keys;
use crate::segment::format::SegmentName;
use crate::segment::reference::SegmentRef;
use crate::store::Store;
use crate::vault::manifest::{Consistency, DiskPoint, Manifest};
use crate::vault::open::{Lock, VaultFile};
use crate::vault::pin::{PinReason, pin};
use crate::vault::prune::Pruner;
use crate::vault::publish::{Insist, Published, publish};
use crate::vault::retention::Policy;
use crate::vault::rules::{Rule, forget};
use crate::vault::{Vault, boundary, generation};

pub const MACHINE: &str = "m";
/// Points that are there at the beginning.
const POINTS: u64 = 3;

pub fn vault_over(store: Arc<dyn Store>) -> Vault {
    static FILE: OnceLock<(VaultFile, Keys)> = OnceLock::new();
    let (file, keys) = FILE.get_or_init(|| {
        let file = VaultFile::plain().unwrap();
        let Lock::Plain(root) = &file.lock else {
            panic!("it is plain");
        };
        let keys = Keys::derive(root.bytes());
        (file, keys)
    });
    Vault::new(store, file, keys.clone(), "memory:")
}

fn segment(generation: u64, epoch: u64) -> SegmentRef {
    let name = SegmentName {
        generation,
        first_epoch: Epoch(epoch),
        last_epoch: Epoch(epoch),
        number: 0,
    };
    SegmentRef {
        name: name.into(),
        bytes: 1,
        directory_bytes: 1,
        check: [0; 16].into(),
        data_blocks: 1,
        zero_blocks: 0,
    }
}

fn manifest(
    vault: &Vault,
    generation: u64,
    epoch: u64,
    previous: u64,
    segments: Vec<SegmentRef>,
) -> Manifest {
    Manifest {
        vault: vault.id(),
        machine: MACHINE.to_owned(),
        generation,
        epoch: Epoch(epoch),
        previous: Epoch(previous),
        created: jiff::Timestamp::from_second(epoch as i64 * 1000).unwrap(),
        consistency: Consistency::Crash,
        reason: None,
        disks: vec![DiskPoint {
            name: "d".to_owned(),
            size_bytes: 1 << 20,
            block_bytes: BLOCK_SIZE,
            journal: "00".repeat(16),
            dirty_blocks: 1,
            segments,
        }],
    }
}

fn put(vault: &Vault, segment: &SegmentRef) -> Result<()> {
    let key = vault.segment_key(MACHINE, "d", segment);
    vault
        .store()
        .create(&key, Bytes::from_static(b"segment"))
        .map(drop)
}

/// A machine of generation 1 with three points: each has a segment of its own and that of the one before, as if older ones
/// had been merged into it.
fn site() -> Memory {
    let memory = Memory::default();
    let vault = vault_over(Arc::new(memory.clone()));
    memory
        .create("vault.json", Bytes::from_static(b"vault"))
        .unwrap();
    assert_eq!(generation::claim(&vault, MACHINE, "first").unwrap(), 1);
    for epoch in 1..=POINTS {
        let mut segments = vec![segment(1, epoch)];
        if epoch > 1 {
            segments.insert(0, segment(1, epoch - 1));
        }
        put(&vault, &segment(1, epoch)).unwrap();
        let manifest = manifest(&vault, 1, epoch, epoch - 1, segments);
        let bytes = Bytes::from(manifest.encode(vault.keys()).unwrap());
        let key = vault.manifest_key(MACHINE, Epoch(epoch));
        vault.store().create(&key, bytes).unwrap();
    }
    memory
}

/// Attempts again where the store is between two answers, which others see to.
struct Again;

impl Insist for Again {
    fn insist<T>(&self, mut attempt: impl FnMut() -> Result<T>) -> Result<T> {
        loop {
            match attempt() {
                Err(error) if error.kind() == ErrorKind::Unavailable => {}
                result => return result,
            }
        }
    }
}

/// A shipper as an actor.
struct Shipper<'a> {
    door: &'a Arc<Door>,
    journal: &'a Mutex<Journal>,
    vault: Vault,
    generation: u64,
    /// It is a copy, or has one.
    copied: bool,
}

impl<'a> Shipper<'a> {
    fn new(door: &'a Arc<Door>, journal: &'a Mutex<Journal>, generation: u64) -> Self {
        Self {
            door,
            journal,
            vault: vault_over(Arc::clone(door) as Arc<dyn Store>),
            generation,
            copied: false,
        }
    }

    fn note(&self, event: Event) {
        self.journal.lock().unwrap().note(event);
    }

    fn met<T>(&self, result: Result<T>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(error) if error.kind() == ErrorKind::Fenced => {
                self.note(Event::Fenced(self.generation, self.copied));
                None
            }
            Err(error) if error.kind() == ErrorKind::Stopped => None,
            Err(error) => panic!("{}", error.chain()),
        }
    }

    /// Publishes the point of this number after `base`, whose last segment and a new one it names.
    fn publish(&self, base: &Manifest, epoch: u64, mark: u64) -> Option<Option<Manifest>> {
        let new = segment(self.generation, epoch);
        let mut segments: Vec<_> = base.disks[0].segments.last().cloned().into_iter().collect();
        segments.push(new.clone());
        let previous = base.epoch.0;
        let mut manifest = manifest(&self.vault, self.generation, epoch, previous, segments);
        manifest.disks[0].dirty_blocks = mark;
        let bytes = Bytes::from(manifest.encode(self.vault.keys()).unwrap());
        let put = || put(&self.vault, &new);
        let published = publish(&self.vault, &manifest, &bytes, &Again, put);
        match self.met(published)? {
            Published::Taken => Some(None),
            Published::Done => {
                let (generation, epoch) = (self.generation, manifest.epoch);
                self.note(Event::Acknowledged(generation, epoch, bytes.to_vec()));
                Some(Some(manifest))
            }
        }
    }

    /// Claims the machine and goes on with it.
    fn take_over(&mut self) -> Option<Manifest> {
        self.generation = self.met(generation::claim(&self.vault, MACHINE, "next"))?;
        self.met(boundary::take_over(&self.vault, MACHINE, self.generation))?;
        let base = self.met(self.vault.newest(MACHINE))??;
        self.note(Event::Based(self.generation, base.epoch));
        Some(base)
    }

    /// Publishes one point with the first number that is free.
    fn go_on(&self, base: &Manifest) -> Option<Manifest> {
        let listed = self.met(self.vault.listed_manifests(MACHINE))?.pop();
        let decided = self.met(self.vault.boundary(MACHINE))?;
        let decided = decided.map(|boundary| boundary.through);
        let mut number = listed.max(decided).unwrap().0;
        loop {
            number += 1;
            if let Some(published) = self.publish(base, number, 7)? {
                return Some(published);
            }
        }
    }

    /// Keeps the newest point alone.
    fn prune(&self) -> Option<()> {
        let policy: Policy = "1s for 1s".parse().unwrap();
        let pruner = Pruner {
            vault: &self.vault,
            machine: MACHINE,
            generation: self.generation,
            policy: Some(&policy),
            waiting: &|| Ok(BTreeSet::new()),
        };
        let pruned = pruner.run(Duration::ZERO, &mut |_, _| self.door.wait(Wait::Readers));
        self.met(pruned).map(drop)
    }
}

/// Publishes points of these numbers, one after the other.
fn publisher(numbers: &'static [u64], mark: u64, copied: bool, prunes: bool) -> Act {
    Arc::new(move |door, journal| {
        let mut shipper = Shipper::new(door, journal, 1);
        shipper.copied = copied;
        let segments = vec![segment(1, POINTS - 1), segment(1, POINTS)];
        let mut base = manifest(&shipper.vault, 1, POINTS, POINTS - 1, segments);
        for number in numbers {
            match shipper.publish(&base, *number, mark) {
                Some(Some(published)) => base = published,
                _ => return,
            }
        }
        if prunes {
            shipper.prune();
        }
    })
}

/// Claims, publishes, prunes, publishes.
fn newcomer(prunes: bool, again: bool) -> Act {
    Arc::new(move |door, journal| {
        let mut shipper = Shipper::new(door, journal, 0);
        let Some(base) = shipper.take_over() else {
            return;
        };
        let Some(mut base) = shipper.go_on(&base) else {
            return;
        };
        if prunes && shipper.prune().is_none() {
            return;
        }
        if again && let Some(next) = shipper.go_on(&base) {
            base = next;
        }
        drop(base);
    })
}

/// Claims and prunes.
fn successor() -> Act {
    Arc::new(move |door, journal| {
        let mut shipper = Shipper::new(door, journal, 0);
        if shipper.take_over().is_some() {
            shipper.prune();
        }
    })
}

/// Prunes as generation 1.
fn pruner(copied: bool) -> Act {
    Arc::new(move |door, journal| {
        let mut shipper = Shipper::new(door, journal, 1);
        shipper.copied = copied;
        shipper.prune();
    })
}

/// Pins a point.
fn pinner(epoch: u64) -> Act {
    Arc::new(move |door, journal| {
        let vault = vault_over(Arc::clone(door) as Arc<dyn Store>);
        if pin(&vault, MACHINE, Epoch(epoch), PinReason::Hold, "").is_ok() {
            journal.lock().unwrap().note(Event::Pinned(Epoch(epoch)));
        }
    })
}

/// Opens a point and reads all of it.
fn reader(epoch: u64) -> Act {
    Arc::new(move |door, journal| {
        let vault = vault_over(Arc::clone(door) as Arc<dyn Store>);
        let Ok(manifest) = vault.manifest(MACHINE, Epoch(epoch)) else {
            return;
        };
        journal.lock().unwrap().note(Event::Opened(door.actor));
        for segment in vault.segments_of(MACHINE, &manifest.disks[0]).unwrap() {
            let key = vault.segment_key(MACHINE, "d", &segment);
            if let Ok(None) = vault.store().size(&key) {
                let what = format!("no {key}");
                journal
                    .lock()
                    .unwrap()
                    .note(Event::NotRead(Epoch(epoch), what));
            }
        }
        journal.lock().unwrap().note(Event::Read(door.actor));
    })
}

fn scene(name: &'static str, preemptions_max: u32, deaths_max: u32, actors: Vec<Act>) -> Scene {
    Scene {
        name,
        memory: site(),
        actors,
        preemptions_max,
        deaths_max,
    }
}

/// All scenes.
fn scenes() -> Vec<Scene> {
    vec![
        scene(
            "a zombie publishes while another takes over and prunes",
            2,
            0,
            vec![publisher(&[4], 1, false, false), newcomer(true, true)],
        ),
        scene(
            "a zombie with a higher number",
            2,
            0,
            vec![publisher(&[6], 1, false, false), newcomer(true, true)],
        ),
        scene(
            "three writers, two of which claim",
            2,
            0,
            vec![
                publisher(&[4], 1, false, false),
                newcomer(false, false),
                newcomer(false, false),
            ],
        ),
        scene(
            "two copies of one state folder",
            2,
            0,
            vec![
                publisher(&[4, 5], 1, true, true),
                publisher(&[4], 2, true, false),
            ],
        ),
        scene(
            "a shipper that prunes while it publishes, and a reader",
            2,
            0,
            vec![pruner(false), publisher(&[4], 1, false, false), reader(1)],
        ),
        scene(
            "a pruner that may die, and a pinner",
            2,
            1,
            vec![pruner(false), pinner(1)],
        ),
        scene(
            "two pruners of one folder beside its uploads",
            2,
            0,
            vec![pruner(true), publisher(&[4], 1, true, true)],
        ),
        scene(
            "a pruner that may die, a pinner, and one who takes over and prunes",
            1,
            1,
            vec![pruner(false), pinner(1), successor()],
        ),
    ]
}

fn forgetting(scene: Scene, rule: Rule) -> Scene {
    let forgetful = |act: Act| -> Act {
        Arc::new(move |door: &Arc<Door>, journal: &Mutex<Journal>| {
            forget(Some(rule));
            act(door, journal);
        })
    };
    Scene {
        actors: scene.actors.into_iter().map(forgetful).collect(),
        ..scene
    }
}

fn hold(number: usize) {
    let scene = scenes().remove(number);
    let begin = Instant::now();
    let found = search(&scene);
    println!(
        "{}: {} schedules in {:?}",
        scene.name,
        found.schedules,
        begin.elapsed()
    );
    assert_eq!(found.broken, None);
    assert!(found.schedules > 50, "the search goes through many orders");
}

#[test]
fn promises_hold_with_a_zombie() {
    hold(0);
    hold(1);
}

#[test]
fn promises_hold_with_three_writers() {
    hold(2);
}

#[test]
fn promises_hold_with_copies() {
    hold(3);
}

#[test]
fn promises_hold_with_a_reader() {
    hold(4);
}

#[test]
fn promises_hold_with_a_pin_and_a_death() {
    hold(5);
}

#[test]
fn promises_hold_with_two_pruners() {
    hold(6);
}

#[test]
fn promises_hold_with_a_pin_a_death_and_a_takeover() {
    hold(7);
}

#[test]
fn each_rule_is_needed() {
    let mut silent = Vec::new();
    for (rule, number) in [
        (Rule::GenerationAfterManifest, 0),
        (Rule::BoundaryAtTakeover, 1),
        (Rule::BoundaryAfterManifest, 3),
        (Rule::OwnContent, 3),
        (Rule::Grace, 4),
        (Rule::OwnGenerationStays, 4),
        (Rule::NamedStays, 4),
        (Rule::NewestStays, 4),
        (Rule::BoundaryBeforeRemoval, 4),
        (Rule::PinsAfterBoundary, 5),
        (Rule::BoundaryAfterPin, 5),
        (Rule::BoundaryFollows, 6),
    ] {
        let begin = Instant::now();
        let found = search(&forgetting(scenes().remove(number), rule));
        let shown = found.broken.clone().unwrap_or_default();
        println!(
            "without {rule:?}: {} schedules in {:?}: {shown}",
            found.schedules,
            begin.elapsed()
        );
        if found.broken.is_none() {
            silent.push(rule);
        }
    }
    assert!(silent.is_empty(), "nothing notices the lack of {silent:?}");
}

/// These save work, and keep what is of no use out of the vault; the promises do not rest on them.
#[test]
fn some_rules_are_a_courtesy() {
    for rule in [Rule::GenerationBeforeManifest, Rule::ValidatedRemoval] {
        for number in [0, 3] {
            let found = search(&forgetting(scenes().remove(number), rule));
            assert_eq!(found.broken, None, "without {rule:?}");
        }
    }
}
