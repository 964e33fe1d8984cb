//! Measures the tracker and its peers side by side: fresh server for each run, order rotated each
//! round, one server twice as the noise floor, medians of ratios within a round.

mod fio;
mod load;
mod processor;
mod report;
mod servers;
mod settings;

use std::process::ExitCode;

use clap::Parser;

use report::{Measurement, Report};
use servers::{Running, ServerKind};
use settings::{ClientKind, Settings};

/// Any failure ends the program with a message, so kinds of errors are not told apart.
type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn main() -> ExitCode {
    match measure(&Settings::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::FAILURE
        }
    }
}

fn measure(settings: &Settings) -> Result<()> {
    settings.check()?;
    let mut report = Report::new(settings);
    for folder in &settings.folders {
        for client in &settings.clients {
            for round in 0..settings.rounds {
                one_round(settings, folder, *client, round, &mut report)?;
            }
        }
    }
    print!("{}", report.table());
    let path = report.save(&settings.results)?;
    println!("\nSaved as {}", path.display());
    Ok(())
}

/// Every contestant once, starting with another one each round.
fn one_round(
    settings: &Settings,
    folder: &std::path::Path,
    client: ClientKind,
    round: usize,
    report: &mut Report,
) -> Result<()> {
    let mut order = ServerKind::CONTESTANTS.to_vec();
    let count = order.len();
    order.rotate_left(round % count);
    for kind in order {
        let server = Running::start(kind, settings, folder)?;
        let before = processor::usage(server.pid())?;
        let load = match client {
            ClientKind::Fio => fio::random_writes(&server, settings)?,
            ClientKind::Light => load::random_writes(server.socket(), settings)?,
        };
        let used = processor::usage(server.pid())?.since(&before);
        server.stop()?;
        let measurement = Measurement::new(kind, client, folder, round, &load, &used);
        eprintln!("{}", measurement.line());
        report.add(measurement);
    }
    Ok(())
}
