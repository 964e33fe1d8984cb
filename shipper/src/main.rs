//! The shipper program.

mod ask;

mod cli;

mod retain;

mod show;

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser;
use nix::sys::signal::{SigSet, Signal};
use shipper::error::{Error, ErrorKind, Result};
use shipper::keys::aead::Cipher;
use shipper::keys::slots::Argon2Cost;
use shipper::lifecycle::conductor::{RunOptions, run};
use shipper::lifecycle::config::Config;
use shipper::lifecycle::control::{ask_cut, ask_resync, ask_status};
use shipper::lifecycle::progress::Outcome;
use shipper::lifecycle::protect::protect;
use shipper::metrics;
use shipper::recovery::repair::{RepairOptions, repair};
use shipper::recovery::restore::{RestoreOptions, restore};
use shipper::recovery::verify::{VerifyOptions, verify};
use shipper::store::VaultUrl;
use shipper::upload::retry::Stop;
use shipper::vault::keyring::Change;
use shipper::vault::manifest::Consistency;
use shipper::vault::{Protection, Vault, aside, pin};

use cli::{Cli, Command, KeyCommand, SecretArguments, VaultArguments, parse_point};

fn main() -> ExitCode {
    let arguments = Cli::parse();
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_env("TIDEMARK_LOG")
                .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info")),
        )
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    let checked = tracker::failpoint::check().map_err(Error::from);
    match checked.and_then(|()| carry_out(arguments.command)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("shipper: {}", error.chain());
            ExitCode::FAILURE
        }
    }
}

fn carry_out(command: Command) -> Result<()> {
    match command {
        Command::Init {
            vault,
            secret,
            generate_key_file,
            unencrypted,
        } => init(&vault, &secret, generate_key_file, unencrypted),
        Command::Key(command) => key(&command),
        Command::Protect(config) => {
            let config = config.load()?;
            let protection = protect(&config)?;
            print(&show::protection(&config, &protection))
        }
        Command::Run { config, once } => run_until_signal(config.load()?, once),
        Command::Status {
            config,
            json,
            metrics,
        } => {
            let status = ask_status(&config.load()?.state)?;
            print(&match (json, metrics) {
                (true, _) => show::json(&status)?,
                (_, true) => metrics::text(&status)?,
                _ => show::status(&status),
            })
        }
        Command::Cut { config, quiesce } => cut(&config.load()?, quiesce),
        Command::Resync {
            config,
            disk,
            cancel,
        } => resync(&config.load()?, disk, cancel),
        Command::Points { place, json } => {
            let (vault, machine) = place.open()?;
            points(&vault, &machine, json)
        }
        Command::Restore {
            place,
            point,
            disk,
            to,
        } => {
            let point = parse_point(&point)?;
            let (vault, machine) = place.open()?;
            restore_disk(&vault, machine, point, disk, to)
        }
        Command::Verify {
            place,
            data,
            repair,
        } => {
            let set_aside = match repair {
                true => repair_vault(&place.config()?, data)?,
                false => 0,
            };
            let (vault, machine) = place.open()?;
            verify_vault(&vault, machine, data, set_aside)
        }
        Command::Retain(command) => retain::carry_out(command),
        Command::QuiesceGuard => shipper::quiesce::guard::run(),
        Command::QuiesceExec { words } => shipper::quiesce::become_command(&words),
    }
}

fn init(
    url: &str,
    secret: &SecretArguments,
    generate_key_file: bool,
    unencrypted: bool,
) -> Result<()> {
    // An address that is none shall not leave a key file behind.
    VaultUrl::parse(url)?;
    let protection = match unencrypted {
        true => Protection::Plain,
        false => Protection::Sealed {
            secret: secret.new_secret(generate_key_file)?,
            label: "first".to_owned(),
            cost: Argon2Cost::default(),
            cipher: Cipher::preferred(),
        },
    };
    let vault = Vault::create(url, &protection)?;
    let how = match vault.keys().sealing() {
        None => "not encrypted".to_owned(),
        Some(sealing) => format!(
            "encrypted with {}; without a key file or passphrase of it nothing can be restored, so keep a copy elsewhere",
            sealing.cipher().name()
        ),
    };
    print(&format!(
        "Vault {} made at {}, {how}\n",
        vault.id(),
        vault.url()
    ))
}

fn key(command: &KeyCommand) -> Result<()> {
    let change = |vault: &VaultArguments, change: &Change<'_>| {
        let (url, access) = vault.place()?;
        let table = Vault::change_keys(&url, &access, change)?;
        print(&show::key_slots(&table.slots))
    };
    match command {
        KeyCommand::List { vault, json } => {
            let (url, access) = vault.place()?;
            let table = Vault::key_table(&url, &access)?;
            print(&if *json {
                show::key_slots_json(&table.slots)?
            } else {
                show::key_slots(&table.slots)
            })
        }
        KeyCommand::Add { vault, new, label } => {
            let secret = &new.secret()?;
            change(vault, &Change::Add { secret, label })
        }
        KeyCommand::Remove { vault, slot } => change(vault, &Change::Remove { id: slot }),
        KeyCommand::Rotate { vault, slot, new } => {
            let secret = &new.secret()?;
            change(vault, &Change::Rotate { id: slot, secret })
        }
    }
}

/// What is printed and cannot be: a closed pipe ends a listing without an alarm.
fn print(text: &str) -> Result<()> {
    let mut out = std::io::stdout();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Error::io("Cannot write to standard output", error))
        }
        _ => Ok(()),
    }
}

fn run_until_signal(config: Config, once: bool) -> Result<()> {
    // Blocked before the first thread starts, so that one alone takes them.
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    signals
        .thread_block()
        .map_err(|errno| Error::io("Cannot block signals", errno))?;
    let stop = Arc::new(Stop::default());
    let to_tell = Arc::clone(&stop);
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            if signals.wait().is_ok() {
                to_tell.tell();
            }
        })
        .map_err(|error| Error::io("Cannot start a thread", error))?;
    let ready = |config: &Config| {
        // Whoever started this may have closed the pipe; shipping goes on.
        let _closed = print(&format!(
            "Ready: machine {}, {} disks, vault {}\n",
            config.machine,
            config.disks.len(),
            config.vault
        ));
    };
    match run(config, RunOptions { once }, &stop, ready)? {
        Some(epoch) => print(&format!("{epoch}\n")),
        None => Ok(()),
    }
}

fn cut(config: &Config, quiesce: bool) -> Result<()> {
    let made = ask_cut(&config.state, quiesce)?;
    if !quiesce {
        return print(&format!("{}\n", made.epoch));
    }
    print(&format!("{} {}\n", made.epoch, made.consistency))?;
    match made.consistency {
        Consistency::Application => Ok(()),
        Consistency::Crash => Err(Error::new(
            ErrorKind::State,
            format!(
                "Recovery point {} is only crash-consistent: {}",
                made.epoch,
                made.reason.unwrap_or_default()
            ),
        )),
    }
}

fn resync(config: &Config, disk: Option<String>, cancel: bool) -> Result<()> {
    let answers = ask_resync(&config.state, disk, cancel)?;
    let (refused, done): (Vec<_>, Vec<_>) = answers
        .iter()
        .partition(|answer| answer.outcome == Outcome::Refused);
    print(&show::resync(&done))?;
    if refused.is_empty() {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::State,
        show::resync(&refused).trim_end().replace('\n', "; "),
    ))
}

fn points(vault: &Vault, machine: &str, json: bool) -> Result<()> {
    let mut manifests = Vec::new();
    let mut damaged = 0;
    let epochs = vault.points(machine)?;
    let (pins, set_aside) = (pin::list(vault, machine)?, aside::list(vault, machine)?);
    for epoch in epochs {
        match vault.read_manifest(machine, epoch) {
            Ok(manifest) => {
                manifests.push(show::Point::of(&manifest, &pins, set_aside.get(&epoch)));
            }
            // Retention has removed it a moment ago.
            Err(error) if error.kind() == ErrorKind::Missing => {}
            Err(_) if set_aside.contains_key(&epoch) => {}
            Err(error) => {
                damaged += 1;
                eprintln!("shipper: {}", error.chain());
            }
        }
    }
    print(&if json {
        show::json(&manifests)?
    } else {
        show::points(&manifests)
    })?;
    for (epoch, aside) in &set_aside {
        eprintln!(
            "shipper: Recovery point {epoch} is set aside: {}",
            aside.why
        );
    }
    match damaged {
        0 => Ok(()),
        count => Err(Error::new(
            ErrorKind::Corrupt,
            format!("{count} recovery points cannot be read: run `shipper verify`"),
        )),
    }
}

fn threads() -> usize {
    std::thread::available_parallelism().map_or(2, |count| count.get().max(2))
}

fn restore_disk(
    vault: &Vault,
    machine: String,
    point: Option<tracker::extent::Epoch>,
    disk: Option<String>,
    target: PathBuf,
) -> Result<()> {
    let options = RestoreOptions {
        machine,
        point,
        disk,
        target,
        threads: threads(),
    };
    let bar = show::Bar::new();
    let report = restore(vault, &options, &|done, total| bar.show(done, total))?;
    bar.finish();
    print(&format!(
        "Disk {} at recovery point {} restored to {}: {} bytes, {} of data\n",
        report.disk,
        report.epoch,
        options.target.display(),
        report.size_bytes,
        report.data_bytes
    ))
}

/// Repairs, says what was done, and returns how many recovery points were set aside.
fn repair_vault(config: &Config, data: bool) -> Result<usize> {
    let options = RepairOptions {
        data,
        threads: threads(),
    };
    let report = repair(config, options, &mut |line| eprintln!("{line}"))?;
    let (aside, whole) = (report.set_aside.len(), report.whole_again.len());
    print(&format!(
        "{} objects repaired, {aside} recovery points set aside, {whole} whole again\n",
        report.repaired
    ))?;
    Ok(aside)
}

fn verify_vault(vault: &Vault, machine: String, data: bool, set_aside: usize) -> Result<()> {
    let options = VerifyOptions {
        machine: Some(machine),
        data,
        threads: threads(),
    };
    let report = verify(vault, &options, &mut |problem| eprintln!("{problem}"))?;
    let aside = match report.set_aside {
        0 => String::new(),
        count => format!(" and {count} that are set aside"),
    };
    print(&format!(
        "{} recovery points{aside}, {} segments, {} bytes read: {} problems\n",
        report.points, report.segments, report.bytes, report.problems
    ))?;
    match report.problems {
        0 if set_aside > 0 => Err(Error::new(
            ErrorKind::Corrupt,
            format!(
                "{set_aside} recovery points were set aside: what they have lost could not be brought back"
            ),
        )),
        0 => Ok(()),
        count => Err(Error::new(
            ErrorKind::Corrupt,
            format!("The vault at {} has {count} problems", vault.url()),
        )),
    }
}
