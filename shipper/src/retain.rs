//! The commands on retention: prune, pin, unpin.

use shipper::error::{Error, ErrorKind, Result};
use shipper::lifecycle::config::{Config, RetentionConfig};
use shipper::lifecycle::control::ask_prune;
use shipper::lifecycle::pruning::{no_retention, waiting_objects};
use shipper::lifecycle::state::StateFolder;
use shipper::spool::Spool;
use shipper::upload::retry::Stop;
use shipper::vault::pin::{self, PinReason};
use shipper::vault::prune::{Pruner, Removed, Report};
use shipper::vault::{Vault, generation};
use tracker::extent::Epoch;

use crate::cli::{RetainCommand, parse_point};
use crate::{print, show};

/// Carries one of them out.
///
/// # Errors
///
/// What the command says.
pub fn carry_out(command: RetainCommand) -> Result<()> {
    match command {
        RetainCommand::Prune {
            config,
            dry_run,
            json,
        } => prune(&config.load()?, dry_run, json),
        RetainCommand::Pin {
            place,
            point,
            reason,
            label,
        } => {
            let (vault, machine) = place.open()?;
            pin(&vault, &machine, parse_point(&point)?, reason, &label)
        }
        RetainCommand::Unpin {
            place,
            point,
            reason,
        } => {
            let (vault, machine) = place.open()?;
            unpin(&vault, &machine, parse_point(&point)?, reason)
        }
    }
}

/// Removes what retention does not keep, or says what it would remove.
///
/// # Errors
///
/// There is no retention, another generation has taken over, or the vault fails.
fn prune(config: &Config, dry_run: bool, json: bool) -> Result<()> {
    let retention = config.retention.as_ref().ok_or_else(no_retention)?;
    if dry_run {
        let report = rehearse(config, retention)?;
        return show_report(&report, None, "would be", json);
    }
    let state = match StateFolder::open(&config.state) {
        // A shipper works there: it has the word.
        Err(error) if error.kind() == ErrorKind::InUse => {
            let report = ask_prune(&config.state)?;
            return show_report(&report, None, "will, after the grace period, be", json);
        }
        state => state?,
    };
    state.check_not_fenced()?;
    let machine = state.protected()?;
    let vault = Vault::open(&config.vault, &config.access)?;
    machine.check(config, &vault)?;
    let spool = Spool::open(&state.spool())?;
    let pruner = Pruner {
        vault: &vault,
        machine: &config.machine,
        generation: machine.generation,
        policy: Some(&retention.policy),
        waiting: &|| waiting_objects(&spool, &vault, &config.machine),
    };
    // Told by nobody: the signal ends the process, and the next pass goes on.
    let never = Stop::default();
    let pruned = pruner.run(retention.grace, &mut |grace, _| {
        if !grace.is_zero() {
            eprintln!("shipper: decided; waiting {grace:?} for whoever reads a point that goes");
        }
        never.wait(grace);
        Ok(())
    });
    if let Err(error) = &pruned
        && error.kind() == ErrorKind::Fenced
    {
        state.save_fenced(Some(&error.chain()))?;
    }
    let (report, removed) = pruned?;
    show_report(&report, Some(removed), "have been", json)
}

/// Needs no state folder: whoever may read the vault may ask.
fn rehearse(config: &Config, retention: &RetentionConfig) -> Result<Report> {
    let vault = Vault::open(&config.vault, &config.access)?;
    let machine = &config.machine;
    let spool = config.state.join("spool");
    let waiting = || match spool.is_dir() {
        true => waiting_objects(&Spool::at(&spool), &vault, machine),
        false => Ok(std::collections::BTreeSet::new()),
    };
    let newest = generation::claimed(&vault, machine)?.pop();
    let pruner = Pruner {
        vault: &vault,
        machine,
        generation: newest.unwrap_or(0),
        policy: Some(&retention.policy),
        waiting: &waiting,
    };
    pruner.rehearse()
}

fn show_report(report: &Report, removed: Option<Removed>, tense: &str, json: bool) -> Result<()> {
    print(&if json {
        show::json(&serde_json::json!({ "report": report, "removed": removed }))?
    } else {
        show::pruned(report, removed, tense)
    })
}

/// Holds a point; prints the pin's name.
///
/// # Errors
///
/// There is no such point.
fn pin(
    vault: &Vault,
    machine: &str,
    point: Option<Epoch>,
    reason: PinReason,
    label: &str,
) -> Result<()> {
    let none = || {
        let what = format!("Machine {machine} has no recovery point");
        Error::new(ErrorKind::Missing, what)
    };
    let epoch = match point {
        Some(epoch) => epoch,
        None => vault.newest(machine)?.ok_or_else(none)?.epoch,
    };
    let id = pin::pin(vault, machine, epoch, reason, label)?;
    print(&format!("{id}\n"))
}

/// Takes pins back.
///
/// # Errors
///
/// There are none.
fn unpin(
    vault: &Vault,
    machine: &str,
    point: Option<Epoch>,
    reason: Option<PinReason>,
) -> Result<()> {
    let epoch = point.ok_or_else(|| {
        let what = "Name the point by its number: `latest` may be another one by now";
        Error::new(ErrorKind::Invalid, what)
    })?;
    match pin::unpin(vault, machine, epoch, reason)? {
        0 => {
            let what = format!("Recovery point {epoch} of machine {machine} has no such pin");
            Err(Error::new(ErrorKind::Missing, what))
        }
        count => print(&format!(
            "{count} pins of recovery point {epoch} taken back\n"
        )),
    }
}
