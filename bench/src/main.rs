//! Measures the tracker and its peers side by side: fresh server for each run, order rotated each
//! round, one server twice as the noise floor, medians of ratios within a round. With `--cost`, what
//! tracking costs, in the same way and in some others; with `--capture`, what recovery points cost; with
//! `--vault`, what the vault does beside other programs for backups.

mod capture;
mod cost;
mod fio;
mod job;
mod load;
mod measure;
mod pattern;
mod plot;
mod processor;
mod qmp;
mod report;
mod servers;
mod settings;
mod statistics;
mod summary;
mod syscalls;
mod vault;
mod wire;

use std::process::ExitCode;

use clap::Parser;

use measure::{Measurement, Patience};
use report::Report;
use servers::ServerKind;
use settings::{Section, Settings};
use syscalls::Counter;

/// Any failure ends the program with a message, so kinds of errors are not told apart.
type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn main() -> ExitCode {
    match run(&Settings::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(settings: &Settings) -> Result<()> {
    // A server that goes into the background stays below this process, where it can be measured and ended.
    nix::sys::prctl::set_child_subreaper(true)?;
    if settings.cost {
        return cost::run(settings);
    }
    if settings.capture {
        return capture::run(settings);
    }
    if settings.vault {
        return vault::run(settings);
    }
    let plan = settings.plan()?;
    let counter = settings.syscalls.then(Counter::find).transpose()?;
    let mut report = Report::new(&plan);
    let mut patience = Patience::of(&plan);
    for section in &plan.sections {
        eprintln!("{}", summary::title(section));
        for round in 0..plan.rounds {
            for server in order(section.servers(&plan.servers), round) {
                let measurement =
                    measure::measure(settings, &plan, section, (server, round), &mut patience)
                        .map_err(|error| format!("{}: {error}", server.name()))?;
                eprintln!("{}", progress(section, &measurement));
                report.add(measurement);
            }
        }
        if let Some(counter) = counter {
            for server in section.servers(&plan.servers) {
                let calls = syscalls::per_request(counter, settings, &plan, section, server)?;
                report.add_calls(section, server, calls);
            }
        }
    }
    print!("{}", report.table());
    for path in report.save(settings)? {
        println!("Saved {}", path.display());
    }
    Ok(())
}

/// Every server once, starting with another one each round.
fn order(servers: impl Iterator<Item = ServerKind>, round: usize) -> Vec<ServerKind> {
    let mut order: Vec<_> = servers.collect();
    let count = order.len().max(1);
    order.rotate_left(round % count);
    order
}

fn progress(section: &Section, run: &Measurement) -> String {
    let cost = run
        .server_microseconds
        .map_or(String::new(), |time| format!("{time:9.2} us/request"));
    let mark = if run.disturbed { "  disturbed" } else { "" };
    format!(
        "  round {} {:<22}{:>10.0} {}{cost}  others {:.0}%{mark}",
        run.round + 1,
        run.server.name(),
        run.rate,
        section.job.unit(),
        run.foreign_share * 100.0,
    )
}
