//! The names of a file system, and what a power cut leaves of them; pure.
//!
//! A step, such as a rename, is durable once every folder that it touches was synced after it. Of the
//! others any may be lost, also one that comes before one that is kept, as far as the rest makes
//! sense: what was never made cannot be renamed. A step happens whole or not at all.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ffi::{OsStr, OsString};

use super::image::Fate;

/// The number of a file or folder.
pub type NodeId = u64;
/// The folder that holds all others.
pub const ROOT: NodeId = 1;

type Place = (NodeId, OsString);
type Folders = HashMap<NodeId, BTreeMap<OsString, NodeId>>;

#[derive(Clone, Debug)]
struct Step {
    node: NodeId,
    /// Where its name was; `None` if it is new.
    from: Option<Place>,
    /// Where its name is; `None` if it is gone.
    to: Option<Place>,
    /// Folders that were not synced since.
    waits_for: BTreeSet<NodeId>,
}

impl Step {
    fn places(&self) -> impl Iterator<Item = &Place> {
        self.from.iter().chain(&self.to)
    }

    /// Takes the step where it is possible.
    fn take(&self, folders: &mut Folders) {
        if let Some((folder, name)) = &self.from {
            let found = folders.get(folder).and_then(|entries| entries.get(name));
            if found != Some(&self.node) {
                return;
            }
        }
        if let Some((folder, name)) = &self.to {
            let Some(entries) = folders.get_mut(folder) else {
                return;
            };
            if self.from.is_none() && entries.contains_key(name) {
                return;
            }
            entries.insert(name.clone(), self.node);
        }
        if let Some((folder, name)) = &self.from
            && self.from != self.to
            && let Some(entries) = folders.get_mut(folder)
        {
            entries.remove(name);
        }
    }
}

/// All names.
#[derive(Debug)]
pub struct Names {
    present: Folders,
    durable: Folders,
    unsynced: Vec<Step>,
}

impl Default for Names {
    fn default() -> Self {
        let root = HashMap::from([(ROOT, BTreeMap::new())]);
        Self {
            present: root.clone(),
            durable: root,
            unsynced: Vec::new(),
        }
    }
}

impl Names {
    /// What a name stands for.
    pub fn find(&self, folder: NodeId, name: &OsStr) -> Option<NodeId> {
        self.entries(folder)?.get(name).copied()
    }

    /// The names in a folder; `None` if it is none.
    pub fn entries(&self, folder: NodeId) -> Option<&BTreeMap<OsString, NodeId>> {
        self.present.get(&folder)
    }

    /// Notes a new folder; its name is given to it by [`Names::step`].
    pub fn add_folder(&mut self, node: NodeId) {
        self.present.insert(node, BTreeMap::new());
        self.durable.insert(node, BTreeMap::new());
    }

    /// Gives a node a name, takes it away, or changes it.
    pub fn step(&mut self, node: NodeId, from: Option<Place>, to: Option<Place>) {
        let mut step = Step {
            node,
            from,
            to,
            waits_for: BTreeSet::new(),
        };
        step.waits_for = step.places().map(|(folder, _name)| *folder).collect();
        step.take(&mut self.present);
        self.unsynced.push(step);
    }

    /// Makes a folder's names durable.
    pub fn sync(&mut self, folder: NodeId) {
        for step in &mut self.unsynced {
            step.waits_for.remove(&folder);
        }
        // A step before one that is durable is too, where both are about the same name.
        let mut settled = BTreeSet::new();
        for step in self.unsynced.iter_mut().rev() {
            if step.waits_for.is_empty() || step.places().any(|place| settled.contains(place)) {
                step.waits_for.clear();
                settled.extend(step.places().cloned());
            }
        }
        let durable = &mut self.durable;
        self.unsynced.retain(|step| {
            if step.waits_for.is_empty() {
                step.take(durable);
            }
            !step.waits_for.is_empty()
        });
    }

    /// Every node that has a name, or may have one again after a power cut.
    pub fn reachable(&self) -> BTreeSet<NodeId> {
        let named = |folders: &Folders| -> Vec<NodeId> {
            folders
                .values()
                .flat_map(|names| names.values().copied())
                .collect()
        };
        let mut nodes = BTreeSet::from([ROOT]);
        nodes.extend(named(&self.present));
        nodes.extend(named(&self.durable));
        nodes.extend(self.unsynced.iter().map(|step| step.node));
        nodes
    }

    /// Forgets folders that nothing leads to any more.
    pub fn retain(&mut self, nodes: &BTreeSet<NodeId>) {
        self.present.retain(|node, _names| nodes.contains(node));
        self.durable.retain(|node, _names| nodes.contains(node));
    }

    /// What is left after a power cut; all of it is durable.
    #[must_use]
    pub fn after_power_cut(&self, fate: &mut Fate<'_>) -> Self {
        let mut left = self.durable.clone();
        let count = self.unsynced.len();
        let chosen: Vec<bool> = match fate {
            Fate::Lost => vec![false; count],
            Fate::Kept => vec![true; count],
            Fate::Mixed(random) => {
                // Half of the time as a file system with a journal does it: all up to some step.
                let kept = random.between(0, count as u64) as usize;
                let in_order = random.chance(1, 2);
                let mut keep = |index| {
                    if in_order {
                        index < kept
                    } else {
                        random.chance(1, 2)
                    }
                };
                (0..count).map(&mut keep).collect()
            }
        };
        for (step, _) in self.unsynced.iter().zip(&chosen).filter(|(_, kept)| **kept) {
            step.take(&mut left);
        }
        let mut found = BTreeSet::from([ROOT]);
        let mut waiting = vec![ROOT];
        while let Some(folder) = waiting.pop() {
            for node in left
                .get(&folder)
                .into_iter()
                .flat_map(|names| names.values())
            {
                if found.insert(*node) {
                    waiting.push(*node);
                }
            }
        }
        left.retain(|node, _names| found.contains(node));
        Self {
            present: left.clone(),
            durable: left,
            unsynced: Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seed::Random;

    fn place(folder: NodeId, name: &str) -> Option<Place> {
        Some((folder, name.into()))
    }

    /// `old` and `new`, durable; then `new` is renamed to `old`.
    fn replaced() -> Names {
        let mut names = Names::default();
        names.step(2, None, place(ROOT, "old"));
        names.step(3, None, place(ROOT, "new"));
        names.sync(ROOT);
        names.step(3, place(ROOT, "new"), place(ROOT, "old"));
        names
    }

    fn listing(names: &Names) -> Vec<(String, NodeId)> {
        let entries = names.entries(ROOT).expect("the root").iter();
        entries
            .map(|(name, node)| (name.to_string_lossy().into_owned(), *node))
            .collect()
    }

    #[test]
    fn a_rename_is_old_or_new_and_never_half() {
        let names = replaced();
        let old = vec![("new".to_owned(), 3), ("old".to_owned(), 2)];
        let new = vec![("old".to_owned(), 3)];
        let mut seen = BTreeSet::new();
        for seed in 0..100 {
            let mut random = Random::new(seed);
            let left = listing(&names.after_power_cut(&mut Fate::Mixed(&mut random)));
            assert!(left == old || left == new, "{left:?}");
            seen.insert(left);
        }
        assert_eq!(seen.len(), 2);
    }

    #[test]
    fn a_synced_folder_keeps_its_names() {
        let mut names = replaced();
        names.sync(ROOT);
        let left = names.after_power_cut(&mut Fate::Lost);
        assert_eq!(listing(&left), [("old".to_owned(), 3)]);
        assert_eq!(names.reachable(), BTreeSet::from([ROOT, 3]));
    }

    #[test]
    fn a_step_between_folders_needs_both() {
        let mut names = Names::default();
        names.add_folder(2);
        names.step(2, None, place(ROOT, "folder"));
        names.step(3, None, place(ROOT, "file"));
        names.sync(ROOT);
        names.step(3, place(ROOT, "file"), place(2, "file"));
        names.sync(2);
        assert_eq!(listing(&names.after_power_cut(&mut Fate::Lost)).len(), 2);
        names.sync(ROOT);
        assert_eq!(listing(&names.after_power_cut(&mut Fate::Lost)).len(), 1);
    }

    #[test]
    fn what_lies_in_a_lost_folder_is_lost() {
        let mut names = Names::default();
        names.add_folder(2);
        names.step(2, None, place(ROOT, "folder"));
        names.step(3, None, place(2, "file"));
        names.sync(2);
        let left = names.after_power_cut(&mut Fate::Lost);
        assert_eq!(left.reachable(), BTreeSet::from([ROOT]));
        names.sync(ROOT);
        let left = names.after_power_cut(&mut Fate::Lost);
        assert_eq!(left.reachable(), BTreeSet::from([ROOT, 2, 3]));
    }
}
