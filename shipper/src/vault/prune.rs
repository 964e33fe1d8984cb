//! Removing recovery points that retention does not keep, and what only they needed.
//!
//! Overview: only the holder of the newest generation prunes, from its own state folder. The policy (`retention`) says which
//! points stay; a boundary (`boundary`) says it durably; after a grace period what no point names is removed.
//!
//! Order:
//!
//! 1. The generation is checked.
//! 2. The newest boundary is read, then points, pins and marks are listed.
//! 3. The policy decides. The newest good point and pinned ones always stay.
//! 4. The next boundary is made by create-if-absent: points that go are *leaving*. If another one has its number, all begins anew.
//! 5. The generation is checked: who has lost it stops here, and the next one goes on from the boundary.
//! 6. Pins are listed again, and one more boundary is made: what is pinned by now is kept again, the rest is gone for good.
//! 7. The grace period is waited for, by this process's own clock from the moment at which it knew that boundary. Who opened
//!    a point before finishes within it.
//! 8. The generation is checked, and that the boundary is the newest still.
//! 9. Void manifests are removed, then segments that were named by removed points alone, then leftovers: those of earlier generations that
//!    no point names.
//! 10. The next boundary no longer names what is gone.
//!
//! Why nothing is removed that is needed: a point after the boundary follows its newest point, which stays, or is void; it names
//! what that names and what was made since. So what neither the points up to the boundary nor those after it name is never named
//! again. What our own generation made and no point names yet may be on its way, and stays. That a manifest is void
//! is never taken back once nothing is leaving, so a pruner that was asleep in the middle of step 9 removes nothing else when it goes on.
//!
//! Crash consistency: everything may be repeated at every request. Boundaries carry on what is to be removed (`doomed`), and the wait begins anew.
//!
//! What it does not handle: a point whose manifest cannot be read might name anything; as long as there is one that is
//! not marked as beyond repair, manifests are removed and segments are not. Segments that our own generation
//! put and that no point came to name stay until another generation follows. Readers that take longer than the grace period see an error.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tracker::extent::Epoch;

use super::boundary::{self, View};
use super::manifest::{Consistency, Manifest};
use super::retention::{Candidate, Policy, Verdict, decide};
use super::rules::{Rule, holds};
use super::{Vault, aside, generation, layout};
use crate::error::{Error, ErrorKind, Result};
use crate::store::Created;

/// Boundaries that others make first before it is given up.
const ATTEMPTS_MAX: u32 = 16;

/// Who prunes, and by what.
pub struct Pruner<'a> {
    /// The vault.
    pub vault: &'a Vault,
    /// Name of the machine.
    pub machine: &'a str,
    /// The generation that is held.
    pub generation: u64,
    /// What stays; `None`: everything.
    pub policy: Option<&'a Policy>,
    /// Objects that sealed epochs name which wait for upload: keys below that of the machine.
    pub waiting: &'a dyn Fn() -> Result<BTreeSet<String>>,
}

/// What becomes of one point.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fate {
    /// Its number, 16 hexadecimal digits.
    pub epoch: String,
    /// When it was cut; nothing where its manifest cannot be read.
    pub created: Option<jiff::Timestamp>,
    /// Whether it stays.
    pub keep: bool,
    /// Why.
    pub reason: String,
}

/// What a pass came to, or would.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// All points, in ascending order.
    pub points: Vec<Fate>,
    /// Points that go.
    pub removed_points: u64,
    /// Objects that go with them, or went before and are there still.
    pub freed_objects: u64,
    /// Bytes of these.
    pub freed_bytes: u64,
    /// Why segments stay although no point names them, if they do.
    pub held_back: Option<String>,
}

/// A pass that has been decided durably and is to be carried out after the grace period.
#[derive(Clone, Debug)]
pub struct Decision {
    /// What it comes to.
    pub report: Report,
    /// Number of the boundary by which things are removed; `None`: there is nothing to remove.
    pub boundary: Option<u64>,
}

/// What was removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Removed {
    /// Void manifests.
    pub manifests: u64,
    /// Segments and what else belongs to a disk.
    pub objects: u64,
    /// Bytes of these.
    pub bytes: u64,
}

/// Everything that is known of a machine before a decision.
struct Survey {
    view: View,
    asides: BTreeSet<Epoch>,
    manifests: BTreeMap<Epoch, Option<Manifest>>,
    /// What each readable point names.
    named: BTreeMap<Epoch, BTreeSet<String>>,
    /// What waits for upload names.
    waiting: BTreeSet<String>,
    /// Objects of disks in the store, with their sizes.
    objects: BTreeMap<String, u64>,
}

impl Survey {
    /// A point that cannot be read and is not known to be beyond repair.
    fn unreadable(&self, removed: &BTreeSet<Epoch>) -> Option<Epoch> {
        let unread = self.manifests.iter().filter(|(_, found)| found.is_none());
        let mut unread = unread.map(|(epoch, _)| *epoch);
        unread.find(|epoch| !removed.contains(epoch) && !self.asides.contains(epoch))
    }

    /// What has to stay when these points go.
    fn needed(&self, removed: &BTreeSet<Epoch>) -> BTreeSet<&String> {
        let kept = self
            .named
            .iter()
            .filter(|(epoch, _)| !removed.contains(epoch) || !holds(Rule::NamedStays));
        let names = kept.flat_map(|(_, names)| names);
        if !holds(Rule::NamedStays) {
            return self.waiting.iter().collect();
        }
        names.chain(&self.waiting).collect()
    }

    /// What is in the store and may go when these points do.
    fn doomed(&self, removed: &BTreeSet<Epoch>) -> BTreeSet<String> {
        let needed = self.needed(removed);
        let before = self.view.before.iter().flat_map(|before| &before.doomed);
        let going = removed.iter().filter_map(|epoch| self.named.get(epoch));
        let all = before.chain(going.flatten());
        let fits = |key: &&String| self.objects.contains_key(*key) && !needed.contains(key);
        all.filter(fits).cloned().collect()
    }

    /// What earlier generations have left and nothing names.
    fn leftovers(&self, generation: u64, removed: &BTreeSet<Epoch>) -> BTreeSet<String> {
        let needed = self.needed(removed);
        let is_earlier = |key: &str| {
            layout::disk_object_generation(key)
                .is_some_and(|made| made < generation || !holds(Rule::OwnGenerationStays))
        };
        let left = self.objects.keys();
        left.filter(|key| is_earlier(key) && !needed.contains(key))
            .cloned()
            .collect()
    }

    fn bytes_of(&self, keys: &BTreeSet<String>) -> u64 {
        keys.iter().filter_map(|key| self.objects.get(key)).sum()
    }
}

/// Keys of what a manifest names, below that of the machine.
///
/// # Errors
///
/// What names segments cannot be read.
pub fn objects_of(vault: &Vault, machine: &str, manifest: &Manifest) -> Result<BTreeSet<String>> {
    let prefix = format!("{}/", vault.machine_prefix(machine));
    let mut keys = BTreeSet::new();
    for disk in &manifest.disks {
        for segment in vault.segments_of(machine, disk)? {
            let key = vault.segment_key(machine, &disk.name, &segment);
            keys.extend(key.strip_prefix(&prefix).map(str::to_owned));
        }
    }
    Ok(keys)
}

impl Pruner<'_> {
    fn survey(&self) -> Result<Survey> {
        let (vault, machine) = (self.vault, self.machine);
        let waiting = (self.waiting)()?;
        let mut view = View::read(vault, machine)?;
        let asides = aside::epochs(vault, machine)?;
        let mut manifests = BTreeMap::new();
        let mut named = BTreeMap::new();
        for (epoch, found) in std::mem::take(&mut view.points) {
            let manifest = match found {
                Some(manifest) => Some(manifest),
                None => match vault.read_manifest(machine, epoch) {
                    Ok(manifest) => Some(manifest),
                    // A pruner of before is still at work; it is no point any more.
                    Err(error) if error.kind() == ErrorKind::Missing => continue,
                    Err(error) if error.kind() == ErrorKind::Corrupt => None,
                    Err(error) => return Err(error),
                },
            };
            if let Some(manifest) = &manifest {
                named.insert(epoch, objects_of(vault, machine, manifest)?);
            }
            manifests.insert(epoch, manifest);
            view.points.insert(epoch, None);
        }
        Ok(Survey {
            view,
            asides,
            manifests,
            named,
            waiting,
            objects: self.objects()?,
        })
    }

    /// Objects of disks in the store.
    fn objects(&self) -> Result<BTreeMap<String, u64>> {
        let prefix = format!("{}/", self.vault.machine_prefix(self.machine));
        let listed = self.vault.store().list(&format!("{prefix}disks"))?;
        let objects = listed.into_iter().filter_map(|object| {
            let key = object.key.strip_prefix(&prefix)?;
            layout::disk_object_generation(key)?;
            Some((key.to_owned(), object.size_bytes))
        });
        Ok(objects.collect())
    }

    fn verdicts(&self, survey: &Survey) -> Vec<(Epoch, Verdict)> {
        let pinned = |epoch: &Epoch| survey.view.pins.contains_key(epoch);
        let candidates: Vec<Candidate> = survey
            .manifests
            .iter()
            .map(|(epoch, manifest)| Candidate {
                epoch: *epoch,
                created_seconds: manifest.as_ref().map(|found| found.created.as_second()),
                consistency: manifest
                    .as_ref()
                    .map_or(Consistency::Crash, |found| found.consistency),
                pinned: pinned(epoch),
                aside: survey.asides.contains(epoch),
            })
            .collect();
        let mut verdicts = decide(self.policy, &candidates);
        if !holds(Rule::NewestStays)
            && let Some(newest) = verdicts.last_mut()
        {
            *newest = Verdict::TooOld;
        }
        candidates
            .iter()
            .map(|point| point.epoch)
            .zip(verdicts)
            .collect()
    }

    fn report(&self, survey: &Survey, verdicts: &[(Epoch, Verdict)]) -> Report {
        let removed = removed_by(verdicts);
        let mut going = survey.doomed(&removed);
        going.extend(survey.leftovers(self.generation, &removed));
        let held_back = survey.unreadable(&removed).map(|epoch| {
            going.clear();
            format!(
                "Recovery point {epoch} cannot be read and may need any segment, so all of them stay: run `shipper verify`"
            )
        });
        let fate = |(epoch, verdict): &(Epoch, Verdict)| Fate {
            epoch: epoch.to_string(),
            created: survey.manifests[epoch].as_ref().map(|found| found.created),
            keep: verdict.keeps(),
            reason: verdict.to_string(),
        };
        Report {
            points: verdicts.iter().map(fate).collect(),
            removed_points: removed.len() as u64,
            freed_objects: going.len() as u64,
            freed_bytes: survey.bytes_of(&going),
            held_back,
        }
    }

    /// What a pass would come to; nothing is changed.
    ///
    /// # Errors
    ///
    /// The store cannot be read.
    pub fn rehearse(&self) -> Result<Report> {
        let survey = self.survey()?;
        let verdicts = self.verdicts(&survey);
        Ok(self.report(&survey, &verdicts))
    }

    /// Decides, durably: steps 1 to 6.
    ///
    /// # Errors
    ///
    /// `Fenced`: another generation has taken over. Other kinds: the store fails; it may be repeated.
    pub fn decide(&self) -> Result<Decision> {
        let (vault, machine) = (self.vault, self.machine);
        let mut report: Option<Report> = None;
        let mut settled = false;
        for _ in 0..ATTEMPTS_MAX {
            generation::check(vault, machine, self.generation)?;
            let survey = self.survey()?;
            survey.view.check_generation(machine, self.generation)?;
            let verdicts = self.verdicts(&survey);
            let before = survey.view.before.as_ref();
            let leaving = before.is_some_and(|before| !before.leaving.is_empty());
            // A boundary that removes is followed by one that removes nothing more.
            let removed = match leaving || settled {
                true => BTreeSet::new(),
                false => removed_by(&verdicts),
            };
            let shown = report.get_or_insert_with(|| self.report(&survey, &verdicts));
            if leaving {
                self.settle(shown, &survey);
                settled = true;
            } else if removed.is_empty() {
                let report = std::mem::take(shown);
                return Ok(self.decided(&survey, report));
            }
            let doomed = survey.doomed(&removed);
            let next = survey.view.next(self.generation, &removed, doomed);
            if !holds(Rule::BoundaryBeforeRemoval) {
                self.remove(&survey, &removed)?;
            }
            // Where another one was made first, all begins anew.
            if boundary::publish(vault, machine, &next)? == Created::New {
                generation::check(vault, machine, self.generation)?;
            }
        }
        Err(boundary::contended(machine))
    }

    /// What was pinned in the last moment stays.
    fn settle(&self, report: &mut Report, survey: &Survey) {
        let none = BTreeSet::new();
        let mut going = survey.doomed(&none);
        going.extend(survey.leftovers(self.generation, &none));
        if report.held_back.is_none() {
            report.freed_objects = going.len() as u64;
            report.freed_bytes = survey.bytes_of(&going);
        }
        for epoch in &survey.view.returning {
            let name = epoch.to_string();
            if let Some(fate) = report
                .points
                .iter_mut()
                .find(|fate| fate.epoch == name && !fate.keep)
            {
                fate.keep = true;
                fate.reason = Verdict::Pinned.to_string();
                report.removed_points = report.removed_points.saturating_sub(1);
            }
        }
    }

    fn decided(&self, survey: &Survey, report: Report) -> Decision {
        let before = survey.view.before.as_ref();
        let none = BTreeSet::new();
        let something = !survey.view.void.is_empty()
            || !survey.doomed(&none).is_empty()
            || !survey.leftovers(self.generation, &none).is_empty();
        Decision {
            report,
            boundary: before.filter(|_| something).map(|before| before.number),
        }
    }

    /// Removes what a decision allows: steps 8 and 9, after the grace period.
    ///
    /// # Errors
    ///
    /// `Fenced`: another generation has taken over. `State`: another boundary has come; decide again. Other kinds: the store fails.
    pub fn carry_out(&self, decision: &Decision) -> Result<Removed> {
        let Some(number) = decision.boundary else {
            return Ok(Removed::default());
        };
        if holds(Rule::ValidatedRemoval) {
            generation::check(self.vault, self.machine, self.generation)?;
        }
        let survey = self.survey()?;
        let before = survey.view.before.as_ref();
        if holds(Rule::ValidatedRemoval) && before.is_none_or(|newest| newest.number != number) {
            let what = format!(
                "Boundary {number} of machine {} is not the newest any more",
                self.machine
            );
            return Err(Error::new(ErrorKind::State, what));
        }
        self.remove(&survey, &BTreeSet::new())
    }

    fn remove(&self, survey: &Survey, removed: &BTreeSet<Epoch>) -> Result<Removed> {
        let (vault, machine) = (self.vault, self.machine);
        let mut done = Removed::default();
        for epoch in survey.view.void.iter().chain(removed) {
            let leaving = survey
                .view
                .before
                .as_ref()
                .is_some_and(|before| before.leaving.binary_search(epoch).is_ok());
            if leaving {
                continue;
            }
            let key = vault.manifest_key(machine, *epoch);
            done.manifests += u64::from(vault.store().delete(&key)?);
            if survey.asides.contains(epoch) {
                aside::remove(vault, machine, *epoch)?;
            }
        }
        if survey.unreadable(removed).is_some() {
            return Ok(done);
        }
        let mut going = survey.doomed(removed);
        going.extend(survey.leftovers(self.generation, removed));
        let prefix = vault.machine_prefix(machine);
        for key in &going {
            // A boundary is not believed to name anything but objects of disks.
            if layout::disk_object_generation(key).is_none() {
                continue;
            }
            if vault.store().delete(&format!("{prefix}/{key}"))? {
                done.objects += 1;
                done.bytes += survey.objects.get(key).copied().unwrap_or(0);
            }
        }
        Ok(done)
    }

    /// A whole pass. `wait` waits for the grace period.
    ///
    /// # Errors
    ///
    /// As for [`Self::decide`] and [`Self::carry_out`], or what `wait` says.
    pub fn run(
        &self,
        grace: Duration,
        wait: &mut dyn FnMut(Duration, &Report) -> Result<()>,
    ) -> Result<(Report, Removed)> {
        for _ in 0..ATTEMPTS_MAX {
            let decision = self.decide()?;
            if decision.boundary.is_some() && holds(Rule::Grace) {
                wait(grace, &decision.report)?;
            }
            match self.carry_out(&decision) {
                Err(error) if error.kind() == ErrorKind::State => {}
                result => return Ok((decision.report, result?)),
            }
        }
        Err(boundary::contended(self.machine))
    }
}

fn removed_by(verdicts: &[(Epoch, Verdict)]) -> BTreeSet<Epoch> {
    let removed = verdicts.iter().filter(|(_, verdict)| !verdict.keeps());
    removed.map(|(epoch, _)| *epoch).collect()
}
