//! Generations: only the newest shipper of a machine may write its part of the vault.
//!
//! A generation is claimed by creating its object, which only one can do. Claims are dense: each is
//! the one after the highest that was seen. So a shipper is the newest as long as the claim after
//! its own does not exist, which one request tells.
//!
//! In an encrypted vault a claim is sealed, and says which machine it is of, since keys of objects do not.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::{Vault, layout};
use crate::error::{Error, ErrorKind, Result};
use crate::keys::derive::Sealing;
use crate::keys::envelope::Envelope;
use crate::segment::frame::damaged;
use crate::store::Created;

/// Claims that are lost to others before it is given up.
const ATTEMPTS_MAX: u32 = 16;

/// First bytes of a sealed claim.
pub const CLAIM_MAGIC: [u8; 8] = *b"TMCLM\r\n\x1a";

/// Versions of sealed claims.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
enum Version {
    /// JSON with machine, holder and time.
    First = 1,
}

/// What a sealed claim says.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Claim {
    machine: String,
    holder: String,
    claimed: String,
}

/// The generations of a machine that are claimed, in ascending order.
///
/// # Errors
///
/// The store cannot be listed.
pub fn claimed(vault: &Vault, machine: &str) -> Result<Vec<u64>> {
    let listed = vault.store().list(&vault.generations_prefix(machine))?;
    let found = listed
        .iter()
        .filter_map(|object| layout::generation_of(&object.key));
    let mut claimed: Vec<_> = found.collect();
    claimed.sort_unstable();
    Ok(claimed)
}

/// Claims the generation after the highest.
///
/// # Errors
///
/// `State`: others claim at the same time, again and again. Other kinds: the store fails.
pub fn claim(vault: &Vault, machine: &str, holder: &str) -> Result<u64> {
    let mut next = claimed(vault, machine)?.last().unwrap_or(&0) + 1;
    for _ in 0..ATTEMPTS_MAX {
        let key = vault.generation_key(machine, next);
        let content = content(vault, machine, next, holder)?;
        match vault.store().create(&key, content)? {
            Created::New => return Ok(next),
            Created::Exists => next += 1,
        }
    }
    Err(Error::new(
        ErrorKind::State,
        format!("Others claim machine {machine} at the same time: stop them, then try again"),
    ))
}

fn content(vault: &Vault, machine: &str, generation: u64, holder: &str) -> Result<Bytes> {
    let claimed = jiff::Timestamp::now().to_string();
    let Some(sealing) = vault.keys().sealing() else {
        let claim = serde_json::json!({ "holder": holder, "claimed": claimed });
        return Ok(Bytes::from(format!("{claim}\n")));
    };
    let claim = Claim {
        machine: machine.to_owned(),
        holder: holder.to_owned(),
        claimed,
    };
    let text = serde_json::to_vec(&claim).map_err(|error| {
        Error::new(ErrorKind::Invalid, "Cannot write a claim").with_source(error)
    })?;
    let identity = identity(sealing, &vault.keys().machine_in_keys(machine), generation);
    envelope(sealing, &identity).seal(&text).map(Bytes::from)
}

fn identity(sealing: &Sealing, machine_in_keys: &str, generation: u64) -> String {
    sealing.identity("claim", &[machine_in_keys, &format!("{generation:016x}")])
}

fn envelope<'a>(sealing: &'a Sealing, identity: &'a str) -> Envelope<'a> {
    Envelope {
        magic: CLAIM_MAGIC,
        version: Version::First as u32,
        cipher: sealing.cipher(),
        material: &sealing.claims,
        identity,
    }
}

/// The machine that a claim of an encrypted vault names, by what stands for it in keys.
///
/// # Errors
///
/// `Corrupt`: it is damaged, or of another machine, generation or vault. Other kinds: it cannot be read.
pub fn read_machine(vault: &Vault, machine_in_keys: &str, generation: u64) -> Result<String> {
    let key = layout::generation_key(machine_in_keys, generation);
    let plain = || damaged(&key, "the vault is not encrypted");
    let sealing = vault.keys().sealing().ok_or_else(plain)?;
    let object = vault.store().read(&key, None)?;
    let identity = identity(sealing, machine_in_keys, generation);
    let text = envelope(sealing, &identity)
        .open(&object)
        .map_err(|what| damaged(&key, &what))?;
    let claim: Claim = serde_json::from_slice(&text)
        .map_err(|error| damaged(&key, &format!("it is malformed: {error}")))?;
    if vault.keys().machine_in_keys(&claim.machine) != machine_in_keys {
        return Err(damaged(&key, "it names another machine"));
    }
    Ok(claim.machine)
}

/// The error of a shipper that finds a higher generation than its own.
pub(super) fn superseded(machine: &str, held: u64, found: u64) -> Error {
    let what = format!(
        "Another shipper has taken over machine {machine} (generation {found} is claimed, this one has {held}): stop one \
         of the two, then run `shipper protect` where it shall go on"
    );
    Error::new(ErrorKind::Fenced, what)
}

/// Fails unless this generation is the newest.
///
/// # Errors
///
/// `Fenced`: a higher one is claimed. `Unavailable`: not even this one is there, so the vault is not
/// where it was.
pub fn check(vault: &Vault, machine: &str, generation: u64) -> Result<()> {
    vault.check_present()?;
    if vault
        .store()
        .size(&vault.generation_key(machine, generation + 1))?
        .is_some()
    {
        return Err(superseded(machine, generation, generation + 1));
    }
    if vault
        .store()
        .size(&vault.generation_key(machine, generation))?
        .is_none()
    {
        return Err(Error::new(
            ErrorKind::Unavailable,
            format!(
                "Generation {generation} of machine {machine} is not claimed in the vault at {}: \
                 mount what holds the vault, or run `shipper protect`",
                vault.url()
            ),
        ));
    }
    Ok(())
}
