//! The tracker program.

mod background;
mod cli;

use std::io::{IsTerminal, Write};
use std::path::Path;
use std::process::ExitCode;

use clap::Parser;
use tracker::control::client::ControlClient;
use tracker::control::protocol::Status;
use tracker::disk::NewSize;
use tracker::epoch::DiskStatus;
use tracker::error::{Error, ErrorKind, Result};
use tracker::nbd::attach;
use tracker::nbd::handshake::view_name;
use tracker::{failpoint, journal, serve, systemd};

use cli::{AttachArguments, Cli, Command, JournalCommand, SnapshotCommand};

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
    let result = failpoint::check().and_then(|()| carry_out(arguments.command));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("tracker: {}", error.chain());
            ExitCode::FAILURE
        }
    }
}

fn carry_out(command: Command) -> Result<()> {
    match command {
        Command::Serve(arguments) => systemd::activated().and_then(|activated| {
            let options = arguments.checked(&activated)?;
            serve::serve(&options, activated)
        }),
        Command::Attach(arguments) => attach(arguments),
        Command::Detach { device, force } => {
            attach::Device::parse(&device).and_then(|device| attach::detach(device, force))
        }
        Command::Status { control, json } => status(&control, json),
        Command::Snapshot(command) => snapshot(command),
        Command::Resize {
            control,
            disk,
            size,
        } => resize(&control, &disk, size.unwrap_or(NewSize::Present)),
        Command::Journal(JournalCommand::Verify { file }) => verify(&file),
        Command::Journal(JournalCommand::Dump { file }) => {
            journal::dump(&file, &mut std::io::stdout().lock())
        }
    }
}

/// What is printed and cannot be: a closed pipe ends a listing without an alarm.
fn print(text: &str) -> Result<()> {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Error::io("Cannot write to standard output", error))
        }
        _ => Ok(()),
    }
}

fn attach(arguments: AttachArguments) -> Result<()> {
    if arguments.background {
        // Checked here, where the user's folder is still known.
        arguments.checked()?;
        return background::start();
    }
    if arguments.in_background {
        background::settle()?;
    }
    let options = arguments.checked()?;
    attach::attach(&options, |description| {
        systemd::ready(description);
        let _closed = print(&format!("Ready: {description}\n"));
    })
}

fn status(control: &Path, json: bool) -> Result<()> {
    let status = ControlClient::connect(control)?.status()?;
    if json {
        let text = serde_json::to_string_pretty(&status).map_err(|error| {
            Error::new(ErrorKind::Protocol, "Cannot write the status as JSON").with_source(error)
        })?;
        return print(&format!("{text}\n"));
    }
    print(&describe(&status))
}

fn snapshot(command: SnapshotCommand) -> Result<()> {
    match command {
        SnapshotCommand::Create { control } => {
            let snapshot = ControlClient::connect(&control)?.snapshot()?;
            print(&format!(
                "{}\nExports: {}\n",
                snapshot.epoch,
                snapshot.exports.join(" ")
            ))
        }
        SnapshotCommand::List { control } => list_snapshot(&control),
        SnapshotCommand::Release {
            control,
            epoch,
            done,
        } => {
            ControlClient::connect(&control)?.release(epoch, done)?;
            print(&format!("Snapshot {epoch} is released\n"))
        }
    }
}

fn list_snapshot(control: &Path) -> Result<()> {
    let status = ControlClient::connect(control)?.epochs()?;
    let Some(epoch) = status.held else {
        return print("No snapshot is held\n");
    };
    let mut text = String::new();
    for disk in &status.disks {
        let used = disk.preserve_used_bytes >> 20;
        let budget = disk.preserve_budget_bytes >> 20;
        text += &format!(
            "{}: {used} of {budget} MiB kept",
            view_name(&disk.name, epoch)
        );
        if let Some(failure) = &disk.view_failure {
            text += &format!("; given up: {failure}");
        }
        text.push('\n');
    }
    print(&text)
}

fn resize(control: &Path, disk: &str, size: NewSize) -> Result<()> {
    let resized = ControlClient::connect(control)?.resize(disk, size)?;
    let (before, after) = (resized.before_bytes, resized.size_bytes);
    if before == after {
        return print(&format!("Disk {disk} has {after} bytes already\n"));
    }
    print(&format!(
        "Disk {disk} has grown from {before} to {after} bytes\n"
    ))
}

fn describe(status: &Status) -> String {
    let Status {
        machine, engine, ..
    } = status;
    let closed = machine
        .closed
        .map_or("none".to_owned(), |epoch| epoch.to_string());
    let mut text = format!(
        "tracker {} (process {}), {} workers, {} connections\n\
         engine {}\n\
         epochs: open {}, closed {closed}, sealed {}, committed {}, {} merged\n\
         requests: {} reads, {} writes, {} others, {} errors; {} MiB read, {} MiB written\n",
        status.version,
        status.pid,
        engine.workers,
        engine.connections,
        engine.carrier(),
        machine.open,
        machine.sealed,
        machine.committed,
        machine.epochs_merged,
        engine.reads,
        engine.writes,
        engine.others,
        engine.errors,
        engine.read_bytes >> 20,
        engine.written_bytes >> 20,
    );
    for disk in &machine.disks {
        text.push_str(&describe_disk(disk));
    }
    text
}

fn describe_disk(disk: &DiskStatus) -> String {
    let resync = disk.resync.map_or(String::new(), |epoch| {
        format!(", every block to be checked since epoch {epoch}")
    });
    let full = disk.ring_full_in_seconds.map_or(String::new(), |seconds| {
        format!("; without folding the ring is full in {seconds} s")
    });
    let mut text = format!(
        "disk {} at {}: {} bytes, {} blocks changed in the open epoch{resync}\n    \
         journal {}: ring {} of {} records ({}%), {} checkpoint sets\n    \
         {} records a second, {} folded{full}\n    \
         {} of {} MiB armed, {} writes waited for {} transactions\n",
        disk.name,
        disk.image.display(),
        disk.size_bytes,
        disk.open_dirty_blocks,
        disk.journal.display(),
        disk.ring_used_records,
        disk.ring_capacity_records,
        disk.ring_fill_percent,
        disk.checkpoint_sets,
        disk.records_per_second,
        disk.folded_per_second,
        disk.intent_regions,
        disk.intent_regions_max,
        disk.intent_waits,
        disk.intent_commits,
    );
    if disk.ring_overflowing || disk.coarse_units > 0 {
        text.push_str(&format!(
            "    the ring was full: {} coarse units count as changed\n",
            disk.coarse_units
        ));
    }
    if disk.power_cut_unsafe {
        text.push_str(
            "    the journal cannot be written: a power cut now would lose track of what changed\n",
        );
    }
    if let Some(change) = &disk.unserved_change {
        text.push_str(&format!("    found at the start: {change}\n"));
    }
    text
}

fn verify(file: &Path) -> Result<()> {
    let report = journal::verify(file)?;
    for problem in &report.problems {
        print(&format!("{problem}\n"))?;
    }
    if report.problems.is_empty() {
        return print(&format!("{}: no errors found\n", file.display()));
    }
    Err(Error::new(
        ErrorKind::Corrupt,
        format!(
            "Journal {} has {} errors",
            file.display(),
            report.problems.len()
        ),
    ))
}
