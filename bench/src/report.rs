//! Measurements, their medians and ratios, as a table and as JSON.

use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;

use crate::Result;
use crate::load::Load;
use crate::processor::Usage;
use crate::servers::ServerKind;
use crate::settings::{ClientKind, Settings};

/// One run of one server.
#[derive(Clone, Debug, Serialize)]
pub struct Measurement {
    #[serde(skip)]
    server_kind: Option<ServerKind>,
    server: &'static str,
    client: &'static str,
    folder: PathBuf,
    round: usize,
    requests: u64,
    requests_per_second: f64,
    processor_microseconds_per_request: f64,
    context_switches_per_request: f64,
}

impl Measurement {
    /// Rates and costs of a run.
    pub fn new(
        server: ServerKind,
        client: ClientKind,
        folder: &Path,
        round: usize,
        load: &Load,
        used: &Usage,
    ) -> Self {
        let requests = load.requests.max(1) as f64;
        Self {
            server_kind: Some(server),
            server: server.name(),
            client: client.name(),
            folder: folder.to_owned(),
            round,
            requests: load.requests,
            requests_per_second: load.requests as f64 / load.seconds.max(f64::EPSILON),
            processor_microseconds_per_request: used.microseconds as f64 / requests,
            context_switches_per_request: used.switches as f64 / requests,
        }
    }

    /// One line for the progress.
    pub fn line(&self) -> String {
        format!(
            "{} {:<6} round {} {:<22} {:>9.0} IOPS {:>7.2} us/request",
            self.folder.display(),
            self.client,
            self.round + 1,
            self.server,
            self.requests_per_second,
            self.processor_microseconds_per_request,
        )
    }
}

/// Median and extremes.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Spread {
    median: f64,
    minimum: f64,
    maximum: f64,
}

impl Spread {
    /// Of a list in any order; zeroes where it is empty.
    pub fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let at = |index: usize| values.get(index).copied().unwrap_or(0.0);
        let middle = values.len() / 2;
        let median = if values.len() % 2 == 1 {
            at(middle)
        } else {
            f64::midpoint(at(middle.saturating_sub(1)), at(middle))
        };
        Self {
            median,
            minimum: at(0),
            maximum: at(values.len().saturating_sub(1)),
        }
    }
}

/// Ratio of two servers, round by round.
#[derive(Clone, Debug, Serialize)]
struct Ratio {
    client: &'static str,
    folder: PathBuf,
    server: &'static str,
    against: &'static str,
    requests_per_second: Spread,
    processor_time_per_request: Spread,
}

/// Everything that was measured in one call.
#[derive(Debug)]
pub struct Report {
    settings: Settings,
    measurements: Vec<Measurement>,
}

/// The ratios that the table shows. The last pair is the same server twice.
const PAIRS: [(ServerKind, ServerKind); 4] = [
    (ServerKind::Tracker, ServerKind::Nbdkit),
    (ServerKind::TrackerPlain, ServerKind::Nbdkit),
    (ServerKind::Tracker, ServerKind::TrackerPlain),
    (ServerKind::NbdkitAgain, ServerKind::Nbdkit),
];

impl Report {
    /// An empty report.
    pub fn new(settings: &Settings) -> Self {
        Self {
            settings: settings.clone(),
            measurements: Vec::new(),
        }
    }

    /// Adds a run.
    pub fn add(&mut self, measurement: Measurement) {
        self.measurements.push(measurement);
    }

    fn runs(
        &self,
        folder: &Path,
        client: ClientKind,
        server: ServerKind,
    ) -> impl Iterator<Item = &Measurement> {
        self.measurements.iter().filter(move |run| {
            run.folder == folder && run.client == client.name() && run.server_kind == Some(server)
        })
    }

    fn spread(
        &self,
        folder: &Path,
        client: ClientKind,
        server: ServerKind,
        value: fn(&Measurement) -> f64,
    ) -> Spread {
        Spread::of(self.runs(folder, client, server).map(value).collect())
    }

    fn ratio(
        &self,
        folder: &Path,
        client: ClientKind,
        (server, against): (ServerKind, ServerKind),
    ) -> Ratio {
        let of = |value: fn(&Measurement) -> f64| {
            Spread::of(
                self.runs(folder, client, server)
                    .zip(self.runs(folder, client, against))
                    .map(|(left, right)| value(left) / value(right).max(f64::EPSILON))
                    .collect(),
            )
        };
        Ratio {
            client: client.name(),
            folder: folder.to_owned(),
            server: server.name(),
            against: against.name(),
            requests_per_second: of(|run| run.requests_per_second),
            processor_time_per_request: of(|run| run.processor_microseconds_per_request),
        }
    }

    fn ratios(&self, folder: &Path, client: ClientKind) -> Vec<Ratio> {
        PAIRS
            .iter()
            .map(|pair| self.ratio(folder, client, *pair))
            .collect()
    }

    /// The report for people.
    pub fn table(&self) -> String {
        let settings = &self.settings;
        let mut text = format!(
            "4 KiB random writes, depth {}, {} MiB disk, {} rounds of {} s; median (least to most)\n",
            settings.depth, settings.size_mib, settings.rounds, settings.seconds
        );
        for folder in &settings.folders {
            for client in &settings.clients {
                text.push_str(&format!(
                    "\n{} with {}\n{:<24}{:>30}{:>24}{:>12}\n",
                    folder.display(),
                    client.name(),
                    "server",
                    "IOPS",
                    "server us/request",
                    "switches"
                ));
                for server in ServerKind::CONTESTANTS {
                    self.server_row(&mut text, folder, *client, server);
                }
                for ratio in self.ratios(folder, *client) {
                    push_ratio(&mut text, &ratio);
                }
            }
        }
        text
    }

    fn server_row(&self, text: &mut String, folder: &Path, client: ClientKind, server: ServerKind) {
        let rate = self.spread(folder, client, server, |run| run.requests_per_second);
        let cost = self.spread(folder, client, server, |run| {
            run.processor_microseconds_per_request
        });
        let switches = self.spread(folder, client, server, |run| {
            run.context_switches_per_request
        });
        text.push_str(&format!(
            "{:<24}{:>30}{:>24}{:>12.3}\n",
            server.name(),
            format!(
                "{:.0} ({:.0} to {:.0})",
                rate.median, rate.minimum, rate.maximum
            ),
            format!(
                "{:.2} ({:.2} to {:.2})",
                cost.median, cost.minimum, cost.maximum
            ),
            switches.median
        ));
    }

    /// Writes the report as JSON into the folder and returns its path.
    ///
    /// # Errors
    ///
    /// The folder or file cannot be written.
    pub fn save(&self, results: &Path) -> Result<PathBuf> {
        let settings = &self.settings;
        let seconds = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
        let ratios: Vec<Ratio> = settings
            .folders
            .iter()
            .flat_map(|folder| {
                settings
                    .clients
                    .iter()
                    .flat_map(move |client| self.ratios(folder, *client))
            })
            .collect();
        let report = serde_json::json!({
            "job": "4k random write",
            "depth": settings.depth,
            "connections_of_the_light_client": settings.connections,
            "disk_bytes": settings.size_bytes(),
            "rounds": settings.rounds,
            "seconds": settings.seconds,
            "unix_time": seconds,
            "processors": std::thread::available_parallelism().map_or(0, usize::from),
            "kernel": std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim(),
            "ratios": ratios,
            "runs": self.measurements,
        });
        std::fs::create_dir_all(results)?;
        let path = results.join(format!("random-write-{seconds}.json"));
        std::fs::write(&path, serde_json::to_string_pretty(&report)?)?;
        Ok(path)
    }
}

fn push_ratio(text: &mut String, ratio: &Ratio) {
    let show = |spread: &Spread| {
        format!(
            "{:.2} ({:.2} to {:.2})",
            spread.median, spread.minimum, spread.maximum
        )
    };
    text.push_str(&format!(
        "  {:<44} IOPS {:<22} time {}\n",
        format!("{} / {}", ratio.server, ratio.against),
        show(&ratio.requests_per_second),
        show(&ratio.processor_time_per_request),
    ));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_of_odd_even_and_no_values() {
        assert_eq!(Spread::of(vec![3.0, 1.0, 2.0]).median, 2.0);
        assert_eq!(Spread::of(vec![4.0, 1.0, 2.0, 3.0]).median, 2.5);
        assert_eq!(Spread::of(Vec::new()).maximum, 0.0);
    }
}
