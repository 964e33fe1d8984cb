//! Recovery points that are set aside: those of which something is lost that nothing can bring back.
//!
//! A record says so, with the reason. Such a point is shown as what it is, and is never the newest one that counts. Only
//! retention removes it: of several disks, or of what was overwritten since, it may still give much back.
//!
//! The next recovery point is made on the newest manifest that can be read, without the segments that are lost: what
//! they held is compared with the disk and shipped again (`lifecycle::reconcile`). So what is lost costs points of the past
//! and never one of the future.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tracker::extent::Epoch;

use super::manifest::{DiskPoint, Manifest};
use super::record::{self, RecordId};
use super::{Vault, layout};
use crate::error::{Error, ErrorKind, Result};
use crate::segment::frame::damaged;
use crate::segment::reference::NameField;
use crate::store::Created;

/// What the record is called.
const KIND: &str = "aside";

/// A segment that is lost.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LostSegment {
    /// Name of the disk.
    pub disk: String,
    /// Its name.
    pub segment: NameField,
}

/// Why a recovery point is set aside.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Aside {
    /// The recovery point.
    pub epoch: Epoch,
    /// What is wrong with it, for people.
    pub why: String,
    /// When that was found, by the clock of whoever found it; nothing depends on it.
    pub created: jiff::Timestamp,
    /// Its segments that are lost; none where its manifest is.
    pub lost: Vec<LostSegment>,
}

impl Aside {
    /// Whether something of this disk is lost, as far as is known.
    pub fn concerns(&self, disk: &str) -> bool {
        self.lost.is_empty() || self.lost.iter().any(|lost| lost.disk == disk)
    }

    /// Whether this segment of a disk is lost.
    pub fn has_lost(&self, disk: &str, segment: NameField) -> bool {
        let is_it = |lost: &LostSegment| lost.disk == disk && lost.segment == segment;
        self.lost.iter().any(is_it)
    }
}

fn key(vault: &Vault, machine: &str, epoch: Epoch) -> String {
    layout::aside_key(&vault.keys().machine_in_keys(machine), epoch)
}

/// Sets a recovery point aside, or says anew why it is.
///
/// # Errors
///
/// The store fails.
pub fn write(vault: &Vault, machine: &str, aside: &Aside) -> Result<()> {
    let (key, name) = (key(vault, machine, aside.epoch), aside.epoch.to_string());
    let id = vault.id();
    let id = RecordId {
        kind: KIND,
        vault: &id,
        machine,
        name: &name,
    };
    let bytes = record::encode(aside, vault.keys(), &id)
        .map_err(|error| Error::io(format!("Cannot write object {key} of the vault"), error))?;
    let bytes = Bytes::from(bytes);
    match vault.store().create(&key, bytes.clone())? {
        Created::New => Ok(()),
        Created::Exists => vault.store().replace(&key, bytes),
    }
}

/// Takes the record of a recovery point away: it is whole again.
///
/// # Errors
///
/// The store fails.
pub fn remove(vault: &Vault, machine: &str, epoch: Epoch) -> Result<()> {
    vault.store().delete(&key(vault, machine, epoch)).map(drop)
}

/// Reads the record of a recovery point.
///
/// # Errors
///
/// `Missing`: it is not set aside. `Corrupt`: the record is damaged, or another one's.
pub fn read(vault: &Vault, machine: &str, epoch: Epoch) -> Result<Aside> {
    let (key, name) = (key(vault, machine, epoch), epoch.to_string());
    let bytes = vault.store().read(&key, None)?;
    let id = vault.id();
    let id = RecordId {
        kind: KIND,
        vault: &id,
        machine,
        name: &name,
    };
    let aside: Aside =
        record::decode(&bytes, vault.keys(), &id).map_err(|what| damaged(&key, &what))?;
    match aside.epoch == epoch {
        true => Ok(aside),
        false => Err(damaged(&key, "it is of another recovery point")),
    }
}

/// Numbers of the recovery points of a machine that are set aside; the records are not read.
///
/// # Errors
///
/// The store cannot be listed.
pub fn epochs(vault: &Vault, machine: &str) -> Result<BTreeSet<Epoch>> {
    let prefix = layout::aside_prefix(&vault.keys().machine_in_keys(machine));
    let listed = vault.store().list(&prefix)?;
    let epochs = listed
        .iter()
        .filter_map(|object| layout::aside_of(&object.key));
    Ok(epochs.collect())
}

/// The recovery points of a machine that are set aside; of one whose record is damaged, the error.
///
/// # Errors
///
/// The store fails.
pub fn list_each(vault: &Vault, machine: &str) -> Result<Vec<(Epoch, Result<Aside>)>> {
    let mut found = Vec::new();
    for epoch in epochs(vault, machine)? {
        match read(vault, machine, epoch) {
            Err(error) if error.kind() == ErrorKind::Missing => {}
            Err(error) if error.kind() != ErrorKind::Corrupt => return Err(error),
            result => found.push((epoch, result)),
        }
    }
    Ok(found)
}

/// The same where all of them have to be known.
///
/// # Errors
///
/// The store fails, or a record is damaged.
pub fn list(vault: &Vault, machine: &str) -> Result<BTreeMap<Epoch, Aside>> {
    let listed = list_each(vault, machine)?.into_iter();
    listed.map(|(epoch, aside)| Ok((epoch, aside?))).collect()
}

/// What the next recovery point of a machine is made on.
#[derive(Debug, Default)]
pub struct Foundation {
    /// The newest manifest that can be used, without segments that are lost.
    pub base: Option<Manifest>,
    /// The disks from which it lacks some.
    pub lacking: BTreeSet<String>,
    /// The highest epoch that has a name in the vault.
    pub highest: Epoch,
    /// Everything that is lost.
    lost: BTreeSet<LostSegment>,
}

impl Foundation {
    /// Finds it.
    ///
    /// # Errors
    ///
    /// The store fails, or a manifest or record is damaged and not set aside.
    pub fn find(vault: &Vault, machine: &str) -> Result<Self> {
        let aside = list(vault, machine)?;
        let points = vault.points(machine)?;
        let last = [points.last(), aside.keys().next_back()];
        let mut found = Self {
            highest: last
                .into_iter()
                .flatten()
                .copied()
                .max()
                .unwrap_or_default(),
            lost: aside
                .values()
                .flat_map(|aside| aside.lost.clone())
                .collect(),
            ..Self::default()
        };
        for epoch in points.iter().rev() {
            let mut manifest = match vault.manifest(machine, *epoch) {
                Err(error) if aside.contains_key(epoch) && is_lost(&error) => continue,
                result => result.map_err(cannot_be_built_on)?,
            };
            for disk in &mut manifest.disks {
                found.leave_out(disk);
            }
            found.base = Some(manifest);
            break;
        }
        Ok(found)
    }

    fn leave_out(&mut self, disk: &mut DiskPoint) {
        let before = disk.segments.len();
        let name = disk.name.clone();
        disk.segments
            .retain(|segment| !self.has_lost(&name, segment.name));
        if disk.segments.len() < before {
            self.lacking.insert(name);
        }
    }

    fn has_lost(&self, disk: &str, segment: NameField) -> bool {
        let disk = disk.to_owned();
        self.lost.contains(&LostSegment { disk, segment })
    }

    /// Whether a recovery point that is not in the vault yet would lack something.
    pub fn spoils(&self, manifest: &Manifest) -> bool {
        let of_disk = |disk: &DiskPoint| {
            let mut segments = disk.segments.iter();
            segments.any(|segment| self.has_lost(&disk.name, segment.name))
        };
        manifest.disks.iter().any(of_disk)
    }
}

fn cannot_be_built_on(error: Error) -> Error {
    if !is_lost(&error) {
        return error;
    }
    let what = "The newest recovery point cannot be built on: run `shipper verify --repair`";
    Error::new(error.kind(), what).with_source(error)
}

/// Whether an error says that an object is not what it should be, rather than that it cannot be read just now.
pub fn is_lost(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::Missing | ErrorKind::Corrupt)
}
