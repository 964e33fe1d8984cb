//! What must hold after each change of the store.

use std::collections::hash_map::DefaultHasher;
use std::collections::{BTreeMap, BTreeSet};
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use tracker::extent::Epoch;

use super::scenes::{MACHINE, vault_over};
use super::store::Memory;
use crate::store::Store;
use crate::vault::boundary::Boundary;
use crate::vault::generation;
use crate::vault::manifest::Manifest;
use crate::vault::prune::objects_of;

/// What an actor was told, and may rely on.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// A point is published, with this manifest.
    Acknowledged(u64, Epoch, Vec<u8>),
    /// A new generation goes on from this point.
    Based(u64, Epoch),
    /// A point is pinned.
    Pinned(Epoch),
    /// A reader has opened a point.
    Opened(usize),
    /// It has read all of it.
    Read(usize),
    /// A reader found something missing.
    NotRead(Epoch, String),
    /// An actor of this generation was stopped; `true`: it is, or has, a copy.
    Fenced(u64, bool),
}

/// All events, in order.
#[derive(Debug, Default)]
pub struct Journal {
    pub events: Vec<Event>,
    reading: BTreeSet<usize>,
    fresh: bool,
}

impl Journal {
    pub fn note(&mut self, event: Event) {
        match &event {
            Event::Opened(actor) => {
                self.reading.insert(*actor);
            }
            Event::Read(actor) => {
                self.reading.remove(actor);
            }
            _ => {}
        }
        self.events.push(event);
        self.fresh = true;
    }

    /// Whether a reader is at work.
    pub fn is_read(&self) -> bool {
        !self.reading.is_empty()
    }

    pub fn died(&mut self, actor: usize) {
        self.reading.remove(&actor);
    }

    /// Stands for all events.
    pub fn hash(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.events.hash(&mut hasher);
        hasher.finish()
    }

    /// Whether something was noted since it was asked last.
    pub fn is_new(&mut self) -> bool {
        std::mem::take(&mut self.fresh)
    }
}

/// The store as it is.
struct Found {
    boundary: Option<Arc<Boundary>>,
    /// Points that ever left by a decision.
    left: BTreeSet<Epoch>,
    manifests: BTreeMap<Epoch, (Manifest, Vec<u8>)>,
    valid: BTreeSet<Epoch>,
    objects: BTreeSet<String>,
    claimed: u64,
}

pub struct Promises {
    memory: Memory,
}

impl Promises {
    pub fn new(memory: Memory) -> Self {
        Self { memory }
    }

    fn look(&self) -> Found {
        let vault = vault_over(Arc::new(self.memory.clone()));
        let mut found = Found {
            boundary: vault.boundary(MACHINE).unwrap(),
            left: BTreeSet::new(),
            manifests: BTreeMap::new(),
            valid: BTreeSet::new(),
            objects: BTreeSet::new(),
            claimed: generation::claimed(&vault, MACHINE).unwrap().pop().unwrap(),
        };
        for number in 1..=found.boundary.as_ref().map_or(0, |newest| newest.number) {
            let boundary = crate::vault::boundary::at(&vault, MACHINE, number);
            found.left.extend(boundary.unwrap().unwrap().leaving.iter());
        }
        for epoch in vault.listed_manifests(MACHINE).unwrap() {
            let manifest = vault.read_manifest(MACHINE, epoch).unwrap();
            let key = vault.manifest_key(MACHINE, epoch);
            let bytes = self.memory.read(&key, None).unwrap().to_vec();
            let boundary = found.boundary.as_ref();
            if boundary.is_none_or(|boundary| boundary.accepts(&manifest)) {
                found.valid.insert(epoch);
            }
            found.manifests.insert(epoch, (manifest, bytes));
        }
        let prefix = format!("{}/", vault.machine_prefix(MACHINE));
        let objects = self.memory.list(&format!("{prefix}disks")).unwrap();
        let below = objects
            .iter()
            .filter_map(|object| object.key.strip_prefix(&prefix));
        found.objects = below.map(str::to_owned).collect();
        found
    }

    /// The first promise that is broken; `told`: an actor has just been told something.
    pub fn check(&self, journal: &Journal, told: bool) -> Option<String> {
        let found = self.look();
        if let (true, Some(Event::Acknowledged(_, epoch, _))) = (told, journal.events.last())
            && !found.valid.contains(epoch)
        {
            return Some(format!("{epoch} is acknowledged and void"));
        }
        let whole = found
            .valid
            .iter()
            .find_map(|epoch| self.lacks(&found, *epoch));
        whole.or_else(|| check_newest(&found, journal)).or_else(|| {
            journal
                .events
                .iter()
                .find_map(|event| self.broken(&found, journal, event))
        })
    }

    /// What a point names and the store does not have.
    fn lacks(&self, found: &Found, epoch: Epoch) -> Option<String> {
        let vault = vault_over(Arc::new(self.memory.clone()));
        let (manifest, _) = found.manifests.get(&epoch)?;
        let named = objects_of(&vault, MACHINE, manifest).unwrap();
        let missing = named.iter().find(|key| !found.objects.contains(*key))?;
        Some(format!("point {epoch} names {missing}, which is gone"))
    }

    fn broken(&self, found: &Found, journal: &Journal, event: &Event) -> Option<String> {
        match event {
            Event::Acknowledged(generation, epoch, bytes) => {
                let late = journal.events.iter().find(|other| {
                    matches!(other, Event::Based(by, base) if by > generation && base < epoch)
                });
                if let Some(late) = late {
                    return Some(format!("{epoch} was acknowledged, but {late:?}"));
                }
                let same = found.manifests.get(epoch).map(|(_, found)| found == bytes);
                match (same, found.valid.contains(epoch)) {
                    (Some(true), true) => None,
                    _ if found.left.contains(epoch) => None,
                    _ => Some(format!("{epoch} was acknowledged and is no point any more")),
                }
            }
            Event::Pinned(epoch) => {
                let may_return = found.boundary.as_ref().is_some_and(|boundary| {
                    boundary.leaving.contains(epoch) && found.manifests.contains_key(epoch)
                });
                match found.valid.contains(epoch) || may_return {
                    true => self.lacks(found, *epoch),
                    false => Some(format!("{epoch} is pinned and no point any more")),
                }
            }
            Event::NotRead(epoch, what) => Some(format!("a reader of {epoch} found {what}")),
            Event::Fenced(generation, false) if *generation == found.claimed => {
                Some(format!("generation {generation}, the newest, was fenced"))
            }
            _ => None,
        }
    }
}

fn check_newest(found: &Found, journal: &Journal) -> Option<String> {
    let Some(newest) = found.valid.last() else {
        return Some("no point is left".to_owned());
    };
    let (manifest, _) = &found.manifests[newest];
    let acknowledged = journal.events.iter().filter_map(|event| match event {
        Event::Acknowledged(generation, epoch, _) => Some((*generation, *epoch)),
        _ => None,
    });
    for (generation, epoch) in acknowledged {
        if epoch > *newest {
            return Some(format!("{epoch} was the newest point, and {newest} is"));
        }
        if generation > manifest.generation {
            return Some(format!(
                "the newest point, {newest}, is of generation {}, and {generation} has published",
                manifest.generation
            ));
        }
    }
    None
}
