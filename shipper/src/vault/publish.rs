//! Publishing a recovery point: the order of requests, and who is stopped by whom.
//!
//! Overview: a shipper holds a generation, and is the only one that publishes as long as no higher one is claimed. It may
//! find out late: a process that was stopped, a virtual machine that was restored from a snapshot, and a
//! copied state folder all go on where they were. They are *fenced*: they stop for good, and overwrite nothing.
//!
//! Order: the generation is checked; segments are put; the generation is checked again; the manifest is made by one
//! create-if-absent; the generation is checked a third time, and the newest boundary is asked whether it accepts the
//! manifest. Only then is the point published, and only then may anybody forget what it holds.
//!
//! | the manifest's key has | done |
//! |---|---|
//! | nothing | the manifest is made |
//! | the same content | it is ours; the answer to an earlier attempt was lost |
//! | a point of our generation or a higher one | fenced |
//! | anything else, and ours is still the newest generation | the number is taken: the point is given up, and its changes are in a later one |
//!
//! Crash consistency: everything may be repeated. A manifest that was made and is not known to be published is either
//! found again with the same content, or accepted by whoever claims next, or void.
//!
//! What it does not handle: which epochs are sealed and follow each other (`lifecycle::reconcile`), and retries of single requests,
//! which the caller brings along ([`Insist`]).

use bytes::Bytes;

use super::manifest::Manifest;
use super::rules::{Rule, holds};
use super::{Vault, boundary, generation};
use crate::error::{Error, ErrorKind, Result};
use crate::store::Created;

/// How a caller repeats what may pass by itself.
pub trait Insist {
    /// Attempts until it succeeds, or fails for good.
    ///
    /// # Errors
    ///
    /// The first error that trying again does not mend, or `Stopped`.
    fn insist<T>(&self, attempt: impl FnMut() -> Result<T>) -> Result<T>;
}

/// How publishing ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Published {
    /// The recovery point is durable in the vault, and nobody has taken over before.
    Done,
    /// Its number is taken by somebody who has lost the machine before; nothing was made.
    Taken,
}

/// Publishes a recovery point; `put_segments` puts what it names, and returns when all of it is durable.
///
/// # Errors
///
/// `Fenced`: this shipper may not write any more. Others: those of `put_segments`, and what `insist` gives up.
pub fn publish(
    vault: &Vault,
    manifest: &Manifest,
    bytes: &Bytes,
    insist: &impl Insist,
    put_segments: impl FnOnce() -> Result<()>,
) -> Result<Published> {
    let (machine, held) = (&manifest.machine, manifest.generation);
    let check = || insist.insist(|| generation::check(vault, machine, held));
    check()?;
    put_segments()?;
    if holds(Rule::GenerationBeforeManifest) {
        check()?;
    }
    if insist.insist(|| create(vault, manifest, bytes))? == Published::Taken {
        // Whoever took it may be newer by now.
        check()?;
        return Ok(Published::Taken);
    }
    if holds(Rule::GenerationAfterManifest) {
        check()?;
    }
    if holds(Rule::BoundaryAfterManifest) {
        insist.insist(|| check_accepted(vault, manifest))?;
    }
    Ok(Published::Done)
}

/// Makes the manifest, or finds out whose is there.
fn create(vault: &Vault, manifest: &Manifest, bytes: &Bytes) -> Result<Published> {
    let (machine, epoch) = (&manifest.machine, manifest.epoch);
    let key = vault.manifest_key(machine, epoch);
    let store = vault.store();
    if store.create(&key, bytes.clone())? == Created::New {
        return Ok(Published::Done);
    }
    let found = store.read(&key, None).map_err(vanished)?;
    if found == bytes || !holds(Rule::OwnContent) {
        return Ok(Published::Done);
    }
    match Manifest::decode(&found, vault.keys(), &vault.point_id(machine, epoch)) {
        Ok(other) if other.generation >= manifest.generation => {
            Err(not_ours(&key, machine, other.generation))
        }
        // A damaged one is nobody's.
        _ => Ok(Published::Taken),
    }
}

/// The error of whoever finds another one's object where its own should be.
pub fn not_ours(key: &str, machine: &str, generation: u64) -> Error {
    let what = format!(
        "Object {key} is in the vault already and is not ours: another shipper writes machine {machine} as generation \
         {generation}, from a copy of this state folder or after it; stop one of the two, then run `shipper protect` \
         where it shall go on"
    );
    Error::new(ErrorKind::Fenced, what)
}

fn check_accepted(vault: &Vault, manifest: &Manifest) -> Result<()> {
    let (machine, epoch) = (&manifest.machine, manifest.epoch);
    match boundary::newest(vault, machine)? {
        Some(boundary) if !boundary.accepts(manifest) => {
            let what = format!(
                "Recovery point {epoch} of machine {machine} came too late: boundary {} of the vault, up to {}, is \
                 without it. Another shipper has gone on with the machine, or this state folder is an old copy; stop \
                 one of the two, then run `shipper protect` where it shall go on",
                boundary.number, boundary.through
            );
            Err(Error::new(ErrorKind::Fenced, what))
        }
        _ => Ok(()),
    }
}

/// A store that says that an object exists and then does not have it is between two answers.
pub fn vanished(error: Error) -> Error {
    match error.kind() {
        ErrorKind::Missing => {
            Error::new(ErrorKind::Unavailable, "The store contradicts itself").with_source(error)
        }
        _ => error,
    }
}
