//! What tracking costs: the tracker against itself without a journal, the check after a power cut,
//! and starts after a crash.

pub mod client;
pub mod counters;
mod crash;
pub mod protected;
mod start;
pub mod targets;
mod zipf;

use std::time::Duration;

use serde_json::json;

use crate::job::{Job, JobKind};
use crate::measure::{self, Patience};
use crate::report::Report;
use crate::servers::{ServerKind, is_installed};
use crate::settings::{ClientKind, Plan, Section, Settings, medium_of};
use crate::{Result, order, progress, summary};

/// Seconds of each run; all of it then takes less than fifteen minutes.
const SECONDS: f64 = 2.5;
/// Size of the disk of the jobs that keep to a small one, in MiB.
const SIZE_MIB: u64 = 512;

/// The sections on a small disk: job, and whether past the page cache.
const SMALL: [(JobKind, bool); 3] = [
    (JobKind::Write1m, true),
    (JobKind::Write4kSync, false),
    (JobKind::Write4kSync, true),
];
/// Off, on, and noise.
const SMALL_SERVERS: [ServerKind; 3] = [
    ServerKind::TrackerPlain,
    ServerKind::Tracker,
    ServerKind::TrackerAgain,
];

/// A round of a section.
struct Round<'a> {
    settings: &'a Settings,
    plan: &'a Plan,
    section: &'a Section,
    round: usize,
}

/// Measures all of it, prints it and saves it.
///
/// # Errors
///
/// A program is missing or fails, or a file cannot be written.
pub fn run(settings: &Settings) -> Result<()> {
    let plan = plan(settings)?;
    let (large, small): (Vec<&Section>, Vec<&Section>) = plan
        .sections
        .iter()
        .partition(|section| section.job.zipf_seed.is_some());
    let mut report = Report::new(&plan);
    measure_small(settings, &plan, &small, &mut report)?;
    let Some(first) = plan.sections.first() else {
        return Ok(());
    };
    let power_cuts = can_change_boot();
    let checks = if power_cuts {
        eprintln!("check after a power cut");
        crash::measure(settings, first, plan.rounds)?
    } else {
        eprintln!("power cuts are left out: they need root and unshare, for a mount namespace");
        Vec::new()
    };
    report.add_part("checks", json!(checks), crash::text(&checks));
    eprintln!("start with a full ring");
    let starts = start::measure(settings, first, power_cuts)?;
    report.add_part("starts", json!(starts), start::text(&starts));
    for section in &large {
        eprintln!("{}", summary::title(section));
    }
    // Last, as its image has so many extents that removing it would disturb others.
    let image = zipf::image(&first.folder)?;
    let counted = zipf::measure(settings, &plan, (&large, image.path()), &mut report)?;
    report.add_part("counted", json!(counted), zipf::text(&counted));
    let targets = targets::of(&report.summaries(), &counted, &checks, &starts);
    report.add_part("targets", json!(targets), targets::text(&targets));
    print!("{}", report.table());
    for path in report.save(settings)? {
        println!("Saved {}", path.display());
    }
    eprintln!("removing the image of 100 GiB");
    image.close()?;
    Ok(())
}

fn measure_small(
    settings: &Settings,
    plan: &Plan,
    sections: &[&Section],
    report: &mut Report,
) -> Result<()> {
    let mut patience = Patience::of(plan);
    for section in sections {
        eprintln!("{}", summary::title(section));
        for round in 0..plan.rounds {
            for server in order(SMALL_SERVERS.into_iter(), round) {
                let run = (server, round);
                let measurement = measure::measure(settings, plan, section, run, &mut patience)?;
                eprintln!("{}", progress(section, &measurement));
                report.add(measurement);
            }
        }
    }
    Ok(())
}

fn plan(settings: &Settings) -> Result<Plan> {
    if settings.rounds == 0 || settings.size_mib == Some(0) {
        return Err("rounds and size must be above zero".into());
    }
    let folder = settings.folders.last().ok_or("a folder is missing")?;
    let medium = medium_of(folder)?;
    if !is_installed("fio") {
        return Err("fio is not installed".into());
    }
    let section = |job, direct| Section {
        folder: folder.clone(),
        medium: format!("{medium}{}", if direct { ", direct" } else { "" }),
        direct,
        client: ClientKind::Fio,
        job: Job::of(job),
    };
    let large = [JobKind::ZipfDeep, JobKind::ZipfSingle].map(|job| section(job, true));
    let small = SMALL.map(|(job, direct)| section(job, direct));
    Ok(Plan {
        sections: large.into_iter().chain(small).collect(),
        servers: vec![
            ServerKind::TrackerPlain,
            ServerKind::Tracker,
            ServerKind::TrackerCovered,
            ServerKind::TrackerAgain,
        ],
        rounds: settings.rounds,
        duration: Duration::try_from_secs_f64(settings.seconds.unwrap_or(SECONDS))?,
        size_bytes: settings.size_mib.unwrap_or(SIZE_MIB) << 20,
    })
}

/// Whether a process can be given another boot of the machine.
fn can_change_boot() -> bool {
    nix::unistd::geteuid().is_root() && is_installed("unshare")
}
