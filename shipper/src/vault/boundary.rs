//! Boundaries: which recovery points there are still, said durably before anything is removed.
//!
//! Overview: create-if-absent protects only what still exists. A shipper that was asleep could publish a point whose
//! segments are gone, or one that was removed long ago. So deletion leaves a mark that lasts: the boundary with the
//! highest number counts, and manifests that it does not accept are *void*, whoever wrote them and
//! whenever:
//!
//! | epoch of the manifest | void, unless |
//! |---|---|
//! | up to `through` | it is in `kept` |
//! | after it | it is of the boundary's generation or a higher one, and follows `through` or a later point |
//!
//! Order: a boundary is made from the one before it, which is read *before* points and pins are listed; its number is
//! the next one, by create-if-absent. So none is ever made from an older view than its predecessor's. A new
//! generation makes one before its first point ([`take_over`]): what the generation before was about to publish is void from then on.
//!
//! Crash consistency: points that are removed are first `leaving`. The boundary after that, whoever makes it, has looked at
//! the pins again: what is pinned by then is kept again, the rest is gone for good. Nothing that is leaving is
//! removed from the store, so a pin that somebody was told of holds whoever dies in between.
//!
//! What it does not handle: two copies of one state folder, both of the same generation and each with a tracker of its own, that
//! publish points of different numbers by turns. Each of these points is whole; the copies are told apart
//! as soon as they meet in one number, at a boundary, or when one of them starts again.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tracker::extent::Epoch;

use super::manifest::Manifest;
use super::record::{self, RecordId};
use super::rules::{Rule, holds};
use super::{Vault, generation, layout, pin};
use crate::error::{Error, ErrorKind, Result};
use crate::segment::frame::damaged;
use crate::store::Created;

/// Boundaries that others make first before it is given up.
const ATTEMPTS_MAX: u32 = 16;
/// Kind of the records.
const KIND: &str = "boundary";

/// What a boundary says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Boundary {
    /// Its number, from 1 on without gaps.
    pub number: u64,
    /// Generation of the shipper that made it.
    pub generation: u64,
    /// The newest recovery point when it was made.
    pub through: Epoch,
    /// The points up to that one that are recovery points still, in ascending order.
    pub kept: Vec<Epoch>,
    /// Points that were removed with this boundary; the next one may keep them again.
    pub leaving: Vec<Epoch>,
    /// Objects that no point names any more and that may be in the store still: keys below that of the machine.
    pub doomed: Vec<String>,
    /// When it was made, by the machine's clock; nothing depends on it.
    pub created: jiff::Timestamp,
}

impl Boundary {
    /// Whether an epoch is a recovery point; `None`: it is later, and its manifest decides.
    pub fn keeps(&self, epoch: Epoch) -> Option<bool> {
        (epoch <= self.through).then(|| self.kept.binary_search(&epoch).is_ok())
    }

    /// Whether a manifest is that of a recovery point.
    pub fn accepts(&self, manifest: &Manifest) -> bool {
        self.keeps(manifest.epoch).unwrap_or_else(|| {
            manifest.generation >= self.generation && manifest.previous >= self.through
        })
    }

    fn validate(&self, number: u64) -> std::result::Result<(), String> {
        let ascending = |epochs: &[Epoch]| epochs.is_sorted_by(|a, b| a < b);
        let decided = self.kept.iter().chain(&self.leaving);
        let fits = self.number == number
            && ascending(&self.kept)
            && ascending(&self.leaving)
            && decided.clone().all(|epoch| *epoch <= self.through);
        if !fits {
            return Err("its numbers contradict each other".to_owned());
        }
        Ok(())
    }
}

fn id<'a>(vault_id: &'a str, machine: &'a str, name: &'a str) -> RecordId<'a> {
    RecordId {
        kind: KIND,
        vault: vault_id,
        machine,
        name,
    }
}

fn key(vault: &Vault, machine: &str, number: u64) -> String {
    layout::boundary_key(&vault.keys().machine_in_keys(machine), number)
}

fn read(vault: &Vault, machine: &str, number: u64) -> Result<Option<Arc<Boundary>>> {
    let key = key(vault, machine, number);
    let bytes = match vault.store().read(&key, None) {
        Err(error) if error.kind() == ErrorKind::Missing => return Ok(None),
        result => result?,
    };
    let (vault_id, name) = (vault.id(), format!("{number:016x}"));
    let boundary: std::result::Result<Boundary, String> =
        record::decode(&bytes, vault.keys(), &id(&vault_id, machine, &name));
    let checked = boundary.and_then(|boundary| boundary.validate(number).map(|()| boundary));
    let boundary = checked.map_err(|what| damaged(&key, &what))?;
    Ok(Some(Arc::new(boundary)))
}

/// A boundary by its number.
#[cfg(test)]
pub fn at(vault: &Vault, machine: &str, number: u64) -> Result<Option<Arc<Boundary>>> {
    read(vault, machine, number)
}

/// The newest boundary of a machine; `None` if it has none. One request where a vault has been asked before and none came since.
///
/// # Errors
///
/// `Corrupt`: it is damaged. Other kinds: the store cannot be read.
pub fn newest(vault: &Vault, machine: &str) -> Result<Option<Arc<Boundary>>> {
    let mut newest = match vault.known_boundary(machine) {
        Some(known) => known,
        None => listed(vault, machine)?,
    };
    loop {
        let next = newest.as_ref().map_or(1, |newest| newest.number + 1);
        match read(vault, machine, next)? {
            Some(found) => newest = Some(found),
            None => break,
        }
    }
    // That there is none is known as well: nothing is listed for each point.
    vault.know_boundary(machine, newest.clone());
    Ok(newest)
}

fn listed(vault: &Vault, machine: &str) -> Result<Option<Arc<Boundary>>> {
    let prefix = layout::boundaries_prefix(&vault.keys().machine_in_keys(machine));
    let listed = vault.store().list(&prefix)?;
    let numbers = listed
        .iter()
        .filter_map(|object| layout::boundary_of(&object.key));
    match numbers.max() {
        None => Ok(None),
        Some(highest) => read(vault, machine, highest),
    }
}

/// Makes a boundary, unless another one has its number.
///
/// # Errors
///
/// The store cannot be written; it may have been made all the same.
pub fn publish(vault: &Vault, machine: &str, boundary: &Boundary) -> Result<Created> {
    let (vault_id, name) = (vault.id(), format!("{:016x}", boundary.number));
    let bytes = record::encode(boundary, vault.keys(), &id(&vault_id, machine, &name))
        .map_err(|error| Error::io("Cannot write a boundary", error))?;
    let key = key(vault, machine, boundary.number);
    vault.store().create(&key, Bytes::from(bytes))
}

/// The points that a new boundary is made from: what its predecessor accepts, and what that had leave and is pinned.
#[derive(Debug)]
pub struct View {
    /// The predecessor.
    pub before: Option<Arc<Boundary>>,
    /// Recovery points, with their manifests where they had to be read.
    pub points: BTreeMap<Epoch, Option<Manifest>>,
    /// Those of them that were leaving and are kept again.
    pub returning: BTreeSet<Epoch>,
    /// Manifests in the store that are void for good.
    pub void: Vec<Epoch>,
    /// Pins by point.
    pub pins: BTreeMap<Epoch, Vec<pin::Pin>>,
}

impl View {
    /// Looks at a machine: the newest boundary first, then the points, then the pins.
    ///
    /// # Errors
    ///
    /// The store cannot be read, or the boundary is damaged.
    pub fn read(vault: &Vault, machine: &str) -> Result<Self> {
        let before = match holds(Rule::BoundaryFollows) {
            true => newest(vault, machine)?,
            false => None,
        };
        let listed = vault.listed_manifests(machine)?;
        let before = match holds(Rule::BoundaryFollows) {
            true => before,
            false => newest(vault, machine)?,
        };
        let pins = pin::by_point(vault, machine)?;
        let mut view = Self {
            before,
            points: BTreeMap::new(),
            returning: BTreeSet::new(),
            void: Vec::new(),
            pins,
        };
        for epoch in listed {
            view.take(vault, machine, epoch)?;
        }
        Ok(view)
    }

    fn take(&mut self, vault: &Vault, machine: &str, epoch: Epoch) -> Result<()> {
        let Some(before) = &self.before else {
            self.points.insert(epoch, None);
            return Ok(());
        };
        let pinned = self.pins.contains_key(&epoch) && holds(Rule::PinsAfterBoundary);
        match before.keeps(epoch) {
            Some(true) => {
                self.points.insert(epoch, None);
            }
            Some(false) if pinned && before.leaving.binary_search(&epoch).is_ok() => {
                self.points.insert(epoch, None);
                self.returning.insert(epoch);
            }
            Some(false) => self.void.push(epoch),
            None => match vault.read_manifest(machine, epoch) {
                Ok(manifest) if before.accepts(&manifest) => {
                    self.points.insert(epoch, Some(manifest));
                }
                // Void, but another one may get its number; it is removed when a boundary has come to decide about that.
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::Missing => {}
                // Whatever it was, it is not for us to say that it is none.
                Err(error) if error.kind() == ErrorKind::Corrupt => {
                    self.points.insert(epoch, None);
                }
                Err(error) => return Err(error),
            },
        }
        Ok(())
    }

    /// Fails if its boundary is of a higher generation than this one.
    ///
    /// # Errors
    ///
    /// `Fenced`.
    pub fn check_generation(&self, machine: &str, generation: u64) -> Result<()> {
        match &self.before {
            Some(before) if before.generation > generation => Err(generation::superseded(
                machine,
                generation,
                before.generation,
            )),
            _ => Ok(()),
        }
    }

    /// The next boundary, which removes these points.
    pub fn next(
        &self,
        generation: u64,
        removed: &BTreeSet<Epoch>,
        doomed: BTreeSet<String>,
    ) -> Boundary {
        let before = self.before.as_ref();
        let through = before.map_or(Epoch::ZERO, |before| before.through);
        let newest = self.points.keys().next_back().copied();
        let kept = self.points.keys().filter(|epoch| !removed.contains(epoch));
        Boundary {
            number: before.map_or(1, |before| before.number + 1),
            generation,
            through: through.max(newest.unwrap_or(through)),
            kept: kept.copied().collect(),
            leaving: removed.iter().copied().collect(),
            doomed: doomed.into_iter().collect(),
            created: jiff::Timestamp::now(),
        }
    }
}

/// Makes the boundary of a new generation, unless there is one: from then on what the generations before have
/// not published yet is void. Has to be done before the point is looked for from which the generation goes on.
///
/// # Errors
///
/// `Fenced`: there is a higher generation. Other kinds: the store fails; it may be repeated.
pub fn take_over(vault: &Vault, machine: &str, generation: u64) -> Result<()> {
    if !holds(Rule::BoundaryAtTakeover) {
        return Ok(());
    }
    for _ in 0..ATTEMPTS_MAX {
        generation::check(vault, machine, generation)?;
        let view = View::read(vault, machine)?;
        view.check_generation(machine, generation)?;
        let held = view.before.as_ref().map_or(1, |before| before.generation);
        if held == generation {
            return Ok(());
        }
        let doomed = view.before.iter().flat_map(|before| &before.doomed);
        let doomed = doomed.cloned().collect();
        let next = view.next(generation, &BTreeSet::new(), doomed);
        if publish(vault, machine, &next)? == Created::New {
            return Ok(());
        }
    }
    Err(contended(machine))
}

/// Others make boundaries all the time.
pub(super) fn contended(machine: &str) -> Error {
    Error::new(
        ErrorKind::State,
        format!(
            "Others change the recovery points of machine {machine} at the same time: stop them, then try again"
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn boundary() -> Boundary {
        Boundary {
            number: 2,
            generation: 3,
            through: Epoch(9),
            kept: vec![Epoch(4), Epoch(9)],
            leaving: vec![Epoch(5)],
            doomed: Vec::new(),
            created: jiff::Timestamp::UNIX_EPOCH,
        }
    }

    fn manifest(epoch: u64, generation: u64, previous: u64) -> Manifest {
        Manifest {
            vault: String::new(),
            machine: "m".to_owned(),
            generation,
            epoch: Epoch(epoch),
            previous: Epoch(previous),
            created: jiff::Timestamp::UNIX_EPOCH,
            consistency: super::super::manifest::Consistency::Crash,
            reason: None,
            disks: Vec::new(),
        }
    }

    #[test]
    fn what_is_void() {
        for (epoch, generation, previous, accepted) in [
            (4, 1, 3, true),
            (5, 3, 4, false),
            (8, 9, 9, false),
            (9, 3, 5, true),
            (10, 3, 9, true),
            (12, 4, 10, true),
            (10, 2, 9, false),
            (10, 3, 8, false),
        ] {
            let manifest = manifest(epoch, generation, previous);
            assert_eq!(boundary().accepts(&manifest), accepted, "{manifest:?}");
        }
    }

    #[test]
    fn numbers_that_contradict_each_other_are_refused() {
        assert!(boundary().validate(2).is_ok());
        let wrong = [
            boundary(),
            Boundary {
                kept: vec![Epoch(9), Epoch(4)],
                number: 1,
                ..boundary()
            },
            Boundary {
                kept: vec![Epoch(10)],
                number: 1,
                ..boundary()
            },
            Boundary {
                leaving: vec![Epoch(5), Epoch(5)],
                number: 1,
                ..boundary()
            },
        ];
        for boundary in wrong {
            assert!(boundary.validate(1).is_err(), "{boundary:?}");
        }
    }

    proptest! {
        #[test]
        fn what_is_void_stays_void(
            points in prop::collection::vec((1..30_u64, 1..5_u64, 0..30_u64), 0..20),
            removed in prop::collection::btree_set((1..30_u64).prop_map(Epoch), 0..8),
        ) {
            let before = boundary();
            let manifests: Vec<Manifest> = points
                .into_iter()
                .map(|(epoch, generation, previous)| manifest(epoch, generation, previous))
                .collect();
            let valid = manifests.iter().filter(|manifest| before.accepts(manifest));
            let view = View {
                points: valid.map(|manifest| (manifest.epoch, None)).collect(),
                before: Some(Arc::new(before.clone())),
                returning: BTreeSet::new(),
                void: Vec::new(),
                pins: BTreeMap::new(),
            };
            let next = view.next(3, &removed, BTreeSet::new());
            for manifest in &manifests {
                let known = view.points.contains_key(&manifest.epoch);
                prop_assert!(!next.accepts(manifest) || known || manifest.epoch > next.through);
                prop_assert!(before.accepts(manifest) || !next.accepts(manifest) || known);
            }
        }
    }
}
