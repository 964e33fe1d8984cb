//! `shipper protect`: checks everything that protection will need, then claims the machine.
//!
//! Nothing is changed before all checks have passed. May be repeated: a claim that still holds is
//! kept.

use tracker::control::client::ControlClient;
use tracker::extent::Epoch;
use tracker::journal::reader::JournalReader;

use super::config::Config;
use super::reconcile::{check_disk, find_disk};
use super::state::{MachineState, StateFolder};
use crate::capture::source::DiskSource;
use crate::error::{ErrorKind, Result};
use crate::vault::{Vault, boundary, generation};

/// What `protect` found and did.
#[derive(Clone, Debug)]
pub struct Protection {
    /// One line for each check that passed.
    pub checks: Vec<String>,
    /// The generation that is held.
    pub generation: u64,
    /// It was claimed just now.
    pub claimed: bool,
}

/// Checks the prerequisites of a machine, and claims it in the vault.
///
/// # Errors
///
/// The first check that fails, with what to do.
pub fn protect(config: &Config) -> Result<Protection> {
    let mut checks = Vec::new();
    let vault = Vault::open(&config.vault, &config.access)?;
    checks.push(format!("Vault {} at {}", vault.id(), config.vault));
    let mut tracker = ControlClient::connect(&config.tracker)?;
    let status = tracker.status()?;
    checks.push(format!(
        "Tracker {} at {}",
        status.version,
        config.tracker.display()
    ));
    for disk in &config.disks {
        let served = find_disk(&status.machine, &disk.name)?;
        let source = DiskSource::open(&disk.path)?;
        check_disk(source.size_bytes(), &disk.path, served)?;
        let journal = disk.journal.as_ref().unwrap_or(&served.journal);
        JournalReader::open(journal)?.state()?;
        checks.push(format!(
            "Disk {} at {}, {} bytes, journal {}",
            disk.name,
            disk.path.display(),
            served.size_bytes,
            journal.display()
        ));
    }
    let points = vault.points(&config.machine)?;
    if let (Some(newest), count) = (points.last(), points.len()) {
        checks.push(format!(
            "Machine {} has {count} recovery points, the newest is {newest}",
            config.machine
        ));
    }
    let folder = StateFolder::make(&config.state)?;
    folder.make_folders()?;
    checks.push(format!("State folder {}", config.state.display()));
    let (generation, claimed) = claim(config, &vault, &folder)?;
    Ok(Protection {
        checks,
        generation,
        claimed,
    })
}

/// Keeps the generation that is held, or claims a new one.
fn claim(config: &Config, vault: &Vault, folder: &StateFolder) -> Result<(u64, bool)> {
    if let Some(held) = folder.machine()? {
        held.check(config, vault)?;
        let checked = generation::check(vault, &config.machine, held.generation);
        match folder.check_not_fenced().and(checked) {
            Ok(()) => return Ok((held.generation, false)),
            Err(error) if error.kind() == ErrorKind::Fenced => {}
            Err(error) if error.kind() == ErrorKind::Unavailable => {}
            Err(error) => return Err(error),
        }
    }
    let holder = nix::sys::utsname::uname()
        .map(|name| name.nodename().to_string_lossy().into_owned())
        .unwrap_or_default();
    // Whoever held it in between may have sent other content for any block.
    folder.forget_fingerprints()?;
    let generation = generation::claim(vault, &config.machine, &holder)?;
    boundary::take_over(vault, &config.machine, generation)?;
    let newest = vault.points(&config.machine)?.pop();
    folder.save_published(newest.unwrap_or(Epoch::ZERO))?;
    folder.save_machine(&MachineState::new(
        vault.id(),
        config.machine.clone(),
        generation,
    ))?;
    folder.save_fenced(None)?;
    Ok((generation, true))
}
