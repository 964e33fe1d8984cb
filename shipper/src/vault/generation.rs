//! Generations: only the newest shipper of a machine may write its part of the vault.
//!
//! A generation is claimed by creating its object, which only one can do. Claims are dense: each is
//! the one after the highest that was seen. So a shipper is the newest as long as the claim after
//! its own does not exist, which one request tells.

use bytes::Bytes;

use super::{Vault, layout};
use crate::error::{Error, ErrorKind, Result};
use crate::store::{Created, Store};

/// Claims that are lost to others before it is given up.
const ATTEMPTS_MAX: u32 = 16;

/// The highest generation that is claimed; zero if none is.
///
/// # Errors
///
/// The store cannot be listed.
pub fn highest(store: &dyn Store, machine: &str) -> Result<u64> {
    let listed = store.list(&layout::generations_prefix(machine))?;
    let claimed = listed
        .iter()
        .filter_map(|object| layout::generation_of(&object.key));
    Ok(claimed.max().unwrap_or(0))
}

/// Claims the generation after the highest.
///
/// # Errors
///
/// `State`: others claim at the same time, again and again. Other kinds: the store fails.
pub fn claim(vault: &Vault, machine: &str, holder: &str) -> Result<u64> {
    let mut next = highest(vault.store(), machine)? + 1;
    for _ in 0..ATTEMPTS_MAX {
        let claim = serde_json::json!({
            "holder": holder,
            "claimed": jiff::Timestamp::now().to_string(),
        });
        let key = layout::generation_key(machine, next);
        match vault
            .store()
            .create(&key, Bytes::from(format!("{claim}\n")))?
        {
            Created::New => return Ok(next),
            Created::Exists => next += 1,
        }
    }
    Err(Error::new(
        ErrorKind::State,
        format!("Others claim machine {machine} at the same time: stop them, then try again"),
    ))
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
        .size(&layout::generation_key(machine, generation + 1))?
        .is_some()
    {
        return Err(Error::new(
            ErrorKind::Fenced,
            format!(
                "Another shipper has taken over machine {machine} (generation {} is claimed, this one has \
                 {generation}): stop one of the two, then run `shipper protect` where it shall go on",
                generation + 1
            ),
        ));
    }
    if vault
        .store()
        .size(&layout::generation_key(machine, generation))?
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
