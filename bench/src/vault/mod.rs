//! What the vault costs, beside restic and borg on the same disk: first copies, copies of what has changed, restores.
//!
//! One image, half of it data. In each round everybody has its turn once, another one first each time, with nothing in
//! the page cache where that can be had, and until what it wrote is durable. What is restored is
//! compared with the image in the first round. All files lie in one folder that goes at the end, also by a signal.

mod baseline;
mod content;
mod contestant;
mod figures;
mod image;
mod interrupt;
mod shipped;
mod timed;

use std::path::{Path, PathBuf};
use std::time::Instant;

use serde_json::{Value, json};

use crate::Result;
use crate::cost::protected::Shipper;
use crate::cost::targets;
use crate::pattern::BLOCK_BYTES;
use crate::report::machine;
use crate::servers::{Running, is_installed};
use crate::settings::Settings;
use contestant::{Contestant, Repository};
pub use figures::Part;
use figures::Run;
use image::DiskImage;
use shipped::VaultFolder;
use timed::{Spent, Work};

/// Size of the disk in MiB.
const SIZE_MIB: u64 = 8192;
/// Of so many blocks one changes.
const UNCHANGED_PER_CHANGED: u64 = 100;
/// Those who keep copies.
const KEEPERS: [Contestant; 5] = [
    Contestant::Shipper,
    Contestant::ShipperEncrypted,
    Contestant::Restic,
    Contestant::Borg,
    Contestant::BorgEncrypted,
];

/// Who is measured, and what was found.
struct Bench<'a> {
    settings: &'a Settings,
    work: Work<'a>,
    image: DiskImage,
    vaults: Vec<(Contestant, VaultFolder<'a>)>,
    repositories: Vec<(Contestant, Repository<'a>)>,
    cold: bool,
    runs: Vec<Run>,
}

/// Measures all of it, prints it and saves it.
///
/// # Errors
///
/// A program is missing or fails, or a file cannot be written.
pub fn run(settings: &Settings) -> Result<()> {
    let folder = settings.folders.last().ok_or("a folder is missing")?;
    if settings.rounds == 0 {
        return Err("rounds must be above zero".into());
    }
    let work = tempfile::Builder::new()
        .prefix("tidemark-bench-")
        .tempdir_in(folder)?;
    interrupt::remove_on_signal(work.path().to_owned())?;
    eprintln!("making the image");
    let size_bytes = settings.size_mib.unwrap_or(SIZE_MIB) << 20;
    let image = DiskImage::make(&work.path().join("disk.img"), size_bytes)?;
    let mut bench = Bench {
        settings,
        work: Work(work.path()),
        image,
        vaults: Vec::new(),
        repositories: Vec::new(),
        cold: true,
        runs: Vec::new(),
    };
    // Restores want the disk as the copies have it, so changes come last.
    for part in [Part::Copy, Part::Restore, Part::Delta] {
        if settings.parts.is_empty() || settings.parts.contains(&part) {
            bench.measure(part)?;
        }
    }
    let path = path_of(settings);
    let mut runs = earlier(&path, size_bytes, &bench.runs)?;
    runs.append(&mut bench.runs);
    let targets = figures::targets(&runs);
    print!("{}\n{}", figures::table(&runs, bench.image.data_bytes()), {
        targets::table("What the vault costs", &targets)
    });
    std::fs::create_dir_all(&settings.results)?;
    let report = json!({
        "date": jiff::Zoned::now().strftime("%F %H:%M %:z").to_string(),
        "machine": machine(),
        "versions": versions(),
        "disk_bytes": size_bytes,
        "data_bytes": bench.image.data_bytes(),
        "cold": bench.cold,
        "direct": settings.direct,
        "targets": targets,
        "runs": runs,
    });
    std::fs::write(&path, serde_json::to_string_pretty(&report)?)?;
    println!("Saved {}", path.display());
    drop(bench);
    work.close()?;
    Ok(())
}

impl Bench<'_> {
    fn measure(&mut self, part: Part) -> Result<()> {
        eprintln!("{}", part.name());
        let mut all = KEEPERS.to_vec();
        match part {
            Part::Copy => all.extend([Contestant::DiskRead, Contestant::Codec]),
            Part::Restore => all.push(Contestant::QemuImg),
            // One tracker has one shipper; with encryption is the harder case.
            Part::Delta => all.retain(|who| *who != Contestant::Shipper),
        }
        all.retain(|who| who.is_present());
        if part != Part::Copy {
            self.provide(&all, part)?;
        }
        match part {
            Part::Delta => self.deltas(&all),
            _ => {
                for round in 0..self.settings.rounds {
                    for who in order(&all, round) {
                        let (spent, stored_bytes) = match part {
                            Part::Copy => self.copy(who)?,
                            _ => (self.restore(who, round == 0)?, None),
                        };
                        self.note(Run {
                            part,
                            who,
                            round,
                            spent,
                            stored_bytes,
                        });
                    }
                }
                Ok(())
            }
        }
    }

    fn note(&mut self, run: Run) {
        eprintln!("{}", run.progress());
        self.runs.push(run);
    }

    /// Makes the copies that are not there yet.
    fn provide(&mut self, all: &[Contestant], part: Part) -> Result<()> {
        for who in all.iter().copied().filter(|who| KEEPERS.contains(who)) {
            let has_copy = self.vaults.iter().any(|(owner, _)| *owner == who)
                || self.repositories.iter().any(|(owner, _)| *owner == who);
            let makes_its_own = part == Part::Delta && who.is_shipper();
            if !has_copy && !makes_its_own {
                eprintln!("  first copy by {}", who.name());
                self.copy(who)?;
            }
        }
        Ok(())
    }

    fn forget_caches(&mut self) -> Result<()> {
        self.cold &= self.work.forget_caches()?;
        Ok(())
    }

    fn copy(&mut self, who: Contestant) -> Result<(Spent, Option<u64>)> {
        self.forget_caches()?;
        let alone = |seconds| Spent {
            seconds,
            peak_bytes: 0,
        };
        match who {
            Contestant::Shipper | Contestant::ShipperEncrypted => {
                self.vaults.retain(|(owner, _)| *owner != who);
                let (vault, spent) = VaultFolder::copy(self.settings, who, self.work, &self.image)?;
                let bytes = vault.bytes()?;
                self.vaults.push((who, vault));
                Ok((spent, Some(bytes)))
            }
            Contestant::Codec => {
                let packed = baseline::pack(&self.image)?;
                Ok((alone(packed.seconds), Some(packed.bytes)))
            }
            Contestant::DiskRead => Ok((alone(baseline::read(&self.image)?), None)),
            _ => {
                self.repositories.retain(|(owner, _)| *owner != who);
                let mut repository = Repository::make(who, self.work)?;
                self.forget_caches()?;
                let spent = repository.copy(self.image.path())?;
                let bytes = repository.bytes()?;
                self.repositories.push((who, repository));
                Ok((spent, Some(bytes)))
            }
        }
    }

    fn restore(&mut self, who: Contestant, compares: bool) -> Result<Spent> {
        let folder = self.work.0.join("restored");
        std::fs::create_dir(&folder)?;
        self.forget_caches()?;
        let target = folder.join("disk");
        let vault = self.vaults.iter().find(|(owner, _)| *owner == who);
        let repository = self.repositories.iter().find(|(owner, _)| *owner == who);
        let spent = match (vault, repository) {
            (Some((_, vault)), _) => vault.restore(&target)?,
            (_, Some((_, repository))) => repository.restore(&folder)?,
            _ => {
                let mut command = std::process::Command::new("qemu-img");
                command.args(["convert", "-f", "raw", "-O", "raw"]);
                self.work.run(command.arg(self.image.path()).arg(&target))?
            }
        };
        if compares {
            image::compare(self.image.path(), &only_file(&folder)?)?;
        }
        std::fs::remove_dir_all(&folder)?;
        Ok(spent)
    }

    /// Rounds of changes, after each of which everybody makes a copy.
    fn deltas(&mut self, all: &[Contestant]) -> Result<()> {
        let server = shipped::serve(self.settings, self.work, &self.image)?;
        let program = self
            .settings
            .shipper
            .as_deref()
            .ok_or("--shipper is missing")?;
        eprintln!("  first copy by {}", Contestant::ShipperEncrypted.name());
        let shipper = Shipper::start(program, &server)?;
        shipper.await_idle()?;
        let blocks = self.image.size_bytes() / BLOCK_BYTES as u64 / UNCHANGED_PER_CHANGED;
        for round in 0..self.settings.rounds {
            self.image.change(&server, blocks, round as u64)?;
            for who in order(all, round) {
                self.forget_caches()?;
                let (spent, stored_bytes) = match who {
                    Contestant::ShipperEncrypted => (self.cut(&shipper, &server)?, None),
                    _ => self.copy_again(who)?,
                };
                self.note(Run {
                    part: Part::Delta,
                    who,
                    round,
                    spent,
                    stored_bytes,
                });
            }
        }
        shipper.stop()?;
        server.stop()
    }

    fn copy_again(&mut self, who: Contestant) -> Result<(Spent, Option<u64>)> {
        let mut repositories = self.repositories.iter_mut();
        let found = repositories.find(|(owner, _)| *owner == who);
        let (_, repository) = found.ok_or("there is no copy to begin with")?;
        let spent = repository.copy(self.image.path())?;
        Ok((spent, Some(repository.bytes()?)))
    }

    /// From the request until the recovery point is in the vault.
    fn cut(&self, shipper: &Shipper, server: &Running) -> Result<Spent> {
        let begin = Instant::now();
        let point = shipper.cut_alone()?;
        self.work.sync()?;
        let spent = Spent {
            seconds: begin.elapsed().as_secs_f64(),
            peak_bytes: timed::peak_of(shipper.pid()).unwrap_or(0),
        };
        // What is left of it must not run into the next ones.
        shipper.await_committed(self.settings, server, point)?;
        Ok(spent)
    }
}

/// Everybody once, starting with another one each round.
fn order(all: &[Contestant], round: usize) -> Vec<Contestant> {
    let mut order = all.to_vec();
    order.rotate_left(round % all.len().max(1));
    order
}

/// The file below a folder, however deep.
fn only_file(folder: &Path) -> Result<PathBuf> {
    let mut entries = std::fs::read_dir(folder)?;
    let entry = entries.next().ok_or("nothing was restored")??;
    match entry.file_type()?.is_dir() {
        true => only_file(&entry.path()),
        false => Ok(entry.path()),
    }
}

fn path_of(settings: &Settings) -> PathBuf {
    let name = settings.name.clone().unwrap_or_else(|| {
        let now = jiff::Zoned::now();
        now.strftime("%Y-%m-%d-%H%M%S-vault").to_string()
    });
    settings.results.join(format!("{name}.json"))
}

/// Runs of a report of the same name and size whose parts were not measured now: what takes long can be measured
/// part by part.
fn earlier(path: &Path, size_bytes: u64, now: &[Run]) -> Result<Vec<Run>> {
    let Ok(text) = std::fs::read_to_string(path) else {
        return Ok(Vec::new());
    };
    let report: Value = serde_json::from_str(&text)?;
    if report.get("disk_bytes").and_then(Value::as_u64) != Some(size_bytes) {
        return Ok(Vec::new());
    }
    let runs = report.get("runs").cloned().unwrap_or_default();
    let mut runs: Vec<Run> = serde_json::from_value(runs)?;
    runs.retain(|run| now.iter().all(|new| new.part != run.part));
    Ok(runs)
}

fn versions() -> Value {
    let of = |program: &str, argument: &str| {
        let output = std::process::Command::new(program).arg(argument).output();
        let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
        let text = text.unwrap_or_default();
        text.lines().next().unwrap_or_default().to_owned()
    };
    let mut versions = serde_json::Map::new();
    for (program, argument) in [
        ("restic", "version"),
        ("borg", "--version"),
        ("qemu-img", "--version"),
    ] {
        if is_installed(program) {
            versions.insert(program.to_owned(), of(program, argument).into());
        }
    }
    versions.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_that_were_not_measured_again_stay() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("report.json");
        let run = |part, round| Run {
            part,
            who: Contestant::Restic,
            round,
            spent: Spent {
                seconds: 1.0,
                peak_bytes: 1,
            },
            stored_bytes: None,
        };
        let before = [run(Part::Copy, 0), run(Part::Restore, 0)];
        let report = json!({"disk_bytes": 4096, "runs": before});
        std::fs::write(&path, report.to_string()).unwrap();
        let kept = |size, now: &[Run]| -> Vec<Part> {
            let runs = earlier(&path, size, now).unwrap();
            runs.iter().map(|run| run.part).collect()
        };
        assert_eq!(kept(4096, &[run(Part::Copy, 1)]), [Part::Restore]);
        assert_eq!(kept(8192, &[]), []);
        assert!(
            earlier(&folder.path().join("none"), 1, &[])
                .unwrap()
                .is_empty()
        );
    }

    #[test]
    fn everybody_is_first_once() {
        let all = [Contestant::Restic, Contestant::Borg];
        assert_eq!(order(&all, 0), all);
        assert_eq!(order(&all, 3), [Contestant::Borg, Contestant::Restic]);
    }

    #[test]
    fn a_restored_file_is_found_below_folders() {
        let folder = tempfile::tempdir().unwrap();
        assert!(only_file(folder.path()).is_err());
        let deep = folder.path().join("var/tmp");
        std::fs::create_dir_all(&deep).unwrap();
        std::fs::write(deep.join("disk"), "").unwrap();
        assert_eq!(only_file(folder.path()).unwrap(), deep.join("disk"));
    }
}
