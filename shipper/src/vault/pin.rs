//! Pins, which hold a recovery point against retention, and marks of points that are beyond repair.
//!
//! Order: a pin is made, then the newest boundary is looked at. A boundary that removes the point and was made before is
//! seen then, and the pin is taken back; one that is made later sees the pin, or its successor does, before
//! anything is removed.
//!
//! Crash consistency: whoever dies in between leaves a pin that nobody was told of. It holds the point if that is there, and
//! nothing otherwise.

use std::collections::BTreeMap;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tracker::extent::Epoch;

use super::manifest::short_reason;
use super::record::{self, RecordId};
use super::rules::{Rule, holds};
use super::{Vault, layout};
use crate::error::{Error, ErrorKind, Result};
use crate::keys::hex;
use crate::keys::secret::random;
use crate::segment::reference::number;
use crate::store::Created;

/// Longest label in bytes.
pub const LABEL_BYTES_MAX: usize = 200;

/// Why a point is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PinReason {
    /// A machine runs from it.
    Failover,
    /// It is being tried out.
    Drill,
    /// Somebody wants it to stay.
    Hold,
}

impl PinReason {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Failover => "failover",
            Self::Drill => "drill",
            Self::Hold => "hold",
        }
    }
}

impl std::str::FromStr for PinReason {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        [Self::Failover, Self::Drill, Self::Hold]
            .into_iter()
            .find(|reason| reason.name() == text)
            .ok_or_else(|| format!("{text:?} is none of hold, drill and failover"))
    }
}

/// What a pin says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    epoch: Epoch,
    reason: PinReason,
    label: String,
    created: jiff::Timestamp,
}

/// A pin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pin {
    /// The last part of its key: the point, a hyphen, 8 random hexadecimal digits.
    pub id: String,
    /// The recovery point that it holds.
    pub epoch: Epoch,
    /// Why; `None`: what the pin says cannot be read. It holds all the same.
    pub reason: Option<PinReason>,
    /// What it is called, for people.
    pub label: String,
    /// When it was made; `None`: it cannot be read.
    pub created: Option<jiff::Timestamp>,
}

fn prefix(vault: &Vault, machine: &str) -> String {
    layout::pins_prefix(&vault.keys().machine_in_keys(machine))
}

fn key(vault: &Vault, machine: &str, id: &str) -> String {
    format!("{}/{id}", prefix(vault, machine))
}

fn point_of(id: &str) -> Option<Epoch> {
    let (epoch, rest) = id.split_once('-')?;
    (rest.len() == 8)
        .then(|| number(epoch))
        .flatten()
        .map(Epoch)
}

/// Holds a recovery point; returns the pin's name.
///
/// # Errors
///
/// `Missing`: there is no such point, or it is being removed. `Invalid`: the label is too long. Other kinds: the store fails.
pub fn pin(
    vault: &Vault,
    machine: &str,
    epoch: Epoch,
    reason: PinReason,
    label: &str,
) -> Result<String> {
    if label.len() > LABEL_BYTES_MAX || label != short_reason(label) {
        let what =
            format!("A label has {LABEL_BYTES_MAX} bytes at most, and no control characters");
        return Err(Error::new(ErrorKind::Invalid, what));
    }
    vault.check_present()?;
    let id = format!("{epoch}-{}", hex(&random::<4>()?));
    let document = Document {
        epoch,
        reason,
        label: label.to_owned(),
        created: jiff::Timestamp::now(),
    };
    let vault_id = vault.id();
    let bytes = record::encode(
        &document,
        vault.keys(),
        &record_id("pin", &vault_id, machine, &id),
    )
    .map_err(|error| Error::io("Cannot write a pin", error))?;
    let key = key(vault, machine, &id);
    if vault.store().create(&key, Bytes::from(bytes))? == Created::Exists {
        let what = format!("Object {key} is in the vault already: try again");
        return Err(Error::new(ErrorKind::State, what));
    }
    let found = match holds(Rule::BoundaryAfterPin) {
        true => vault.manifest(machine, epoch).map(drop),
        false => Ok(()),
    };
    match found {
        // A damaged point is there, and can be held.
        Err(error) if error.kind() != ErrorKind::Corrupt => {
            vault.store().delete(&key)?;
            Err(error)
        }
        _ => Ok(id),
    }
}

fn record_id<'a>(
    kind: &'a str,
    vault_id: &'a str,
    machine: &'a str,
    name: &'a str,
) -> RecordId<'a> {
    RecordId {
        kind,
        vault: vault_id,
        machine,
        name,
    }
}

/// Takes pins of a recovery point back: all of them, or those made for a reason. Returns how many.
///
/// # Errors
///
/// The store fails.
pub fn unpin(vault: &Vault, machine: &str, epoch: Epoch, reason: Option<PinReason>) -> Result<u64> {
    let mut count = 0;
    for pin in list(vault, machine)? {
        let wanted = reason.is_none_or(|reason| pin.reason == Some(reason));
        if pin.epoch == epoch && wanted {
            count += u64::from(vault.store().delete(&key(vault, machine, &pin.id))?);
        }
    }
    Ok(count)
}

/// Which points are pinned, by names of pins alone.
pub(super) fn by_point(vault: &Vault, machine: &str) -> Result<BTreeMap<Epoch, Vec<Pin>>> {
    let mut pins: BTreeMap<Epoch, Vec<Pin>> = BTreeMap::new();
    for object in vault.store().list(&prefix(vault, machine))? {
        let id = object.key.rsplit('/').next().unwrap_or_default().to_owned();
        if let Some(epoch) = point_of(&id) {
            pins.entry(epoch).or_default().push(Pin {
                id,
                epoch,
                reason: None,
                label: String::new(),
                created: None,
            });
        }
    }
    Ok(pins)
}

/// All pins of a machine, with what they say.
///
/// # Errors
///
/// The store cannot be read.
pub fn list(vault: &Vault, machine: &str) -> Result<Vec<Pin>> {
    let mut pins = Vec::new();
    for mut pin in by_point(vault, machine)?.into_values().flatten() {
        let bytes = match vault.store().read(&key(vault, machine, &pin.id), None) {
            Err(error) if error.kind() == ErrorKind::Missing => continue,
            result => result?,
        };
        let vault_id = vault.id();
        let id = record_id("pin", &vault_id, machine, &pin.id);
        let document: std::result::Result<Document, String> =
            record::decode(&bytes, vault.keys(), &id);
        if let Ok(document) = document.as_ref() {
            pin.reason = Some(document.reason);
            pin.label.clone_from(&document.label);
            pin.created = Some(document.created);
        }
        pins.push(pin);
    }
    Ok(pins)
}
