//! The runs of one section, summed up: a row for each server, a ratio for each pair. Pure.

use serde::Serialize;

use crate::measure::Measurement;
use crate::servers::ServerKind;
use crate::settings::{Plan, Section};
use crate::statistics::Spread;

/// Pairs besides those of the tracker with each peer. The last is the same server twice: noise.
const PAIRS: [(ServerKind, ServerKind); 5] = [
    (ServerKind::Tracker, ServerKind::RawFile),
    (ServerKind::TrackerPlain, ServerKind::Nbdkit),
    (ServerKind::Tracker, ServerKind::TrackerPlain),
    (ServerKind::TrackerCovered, ServerKind::TrackerPlain),
    (ServerKind::TrackerAgain, ServerKind::Tracker),
];

/// A section in figures.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// Medium, client and job, for people.
    pub title: String,
    /// What rates are counted in.
    pub unit: &'static str,
    /// A row for each server.
    pub rows: Vec<Row>,
    /// The peer with the highest median rate.
    pub best_peer: Option<&'static str>,
    /// A ratio for each pair that took part.
    pub ratios: Vec<Ratio>,
}

/// A server in figures.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// Which one.
    pub server: &'static str,
    /// IOPS or MB/s.
    pub rate: Spread,
    /// Median time of a request in microseconds.
    pub p50: Spread,
    /// Time of the slowest in a hundred.
    pub p99: Spread,
    /// Time of the slowest in a thousand.
    pub p999: Spread,
    /// Processor time of the server per request, in microseconds.
    pub server_microseconds: Option<Spread>,
    /// Context switches of the server per request.
    pub switches: Option<Spread>,
    /// System calls of the server per request.
    pub calls: Option<f64>,
    /// Runs that others disturbed.
    pub disturbed: usize,
}

/// One server against another, from ratios within rounds.
#[derive(Clone, Debug, Serialize)]
pub struct Ratio {
    /// Whose figures are divided.
    pub server: &'static str,
    /// By whose.
    pub against: &'static str,
    /// Of the rates; above 1 is faster.
    pub rate: Spread,
    /// Of the processor time per request; below 1 is cheaper.
    pub server_microseconds: Option<Spread>,
}

/// Medium, client and job.
pub fn title(section: &Section) -> String {
    format!(
        "{}, {}: {}",
        section.medium,
        section.client.name(),
        section.job.title
    )
}

impl Summary {
    /// Of the runs of a section; `calls` are the system calls per request that were counted.
    pub fn of(
        plan: &Plan,
        section: &Section,
        all: &[Measurement],
        calls: impl Fn(ServerKind) -> Option<f64>,
    ) -> Self {
        let runs: Vec<&Measurement> = all
            .iter()
            .filter(|run| {
                run.medium == section.medium
                    && run.client == section.client
                    && run.job == section.job.kind
            })
            .collect();
        let rows: Vec<(ServerKind, Row)> = plan
            .servers
            .iter()
            .filter_map(|server| Some((*server, row(*server, &runs, calls(*server))?)))
            .collect();
        let best_peer = rows
            .iter()
            .filter(|(server, _)| server.is_peer())
            .max_by(|(_, left), (_, right)| left.rate.median.total_cmp(&right.rate.median))
            .map(|(server, _)| server.name());
        let peers = rows
            .iter()
            .filter(|(server, _)| server.is_peer())
            .map(|(server, _)| (ServerKind::Tracker, *server));
        let ratios = peers
            .chain(PAIRS)
            .filter_map(|pair| ratio(pair, &runs))
            .collect();
        Self {
            title: title(section),
            unit: section.job.unit(),
            rows: rows.into_iter().map(|(_, row)| row).collect(),
            best_peer,
            ratios,
        }
    }
}

fn row(server: ServerKind, runs: &[&Measurement], calls: Option<f64>) -> Option<Row> {
    let runs: Vec<&&Measurement> = runs.iter().filter(|run| run.server == server).collect();
    let spread = |value: fn(&Measurement) -> Option<f64>| {
        Spread::of(runs.iter().filter_map(|run| value(run)).collect())
    };
    Some(Row {
        server: server.name(),
        rate: spread(|run| Some(run.rate))?,
        p50: spread(|run| Some(run.latency.p50))?,
        p99: spread(|run| Some(run.latency.p99))?,
        p999: spread(|run| Some(run.latency.p999))?,
        server_microseconds: spread(|run| run.server_microseconds),
        switches: spread(|run| run.switches),
        calls,
        disturbed: runs.iter().filter(|run| run.disturbed).count(),
    })
}

fn ratio((server, against): (ServerKind, ServerKind), runs: &[&Measurement]) -> Option<Ratio> {
    let of = |value: fn(&Measurement) -> Option<f64>| {
        let quotients = runs.iter().filter(|run| run.server == server);
        Spread::of(
            quotients
                .filter_map(|run| {
                    let other = runs
                        .iter()
                        .find(|other| other.server == against && other.round == run.round)?;
                    Some(value(run)? / value(other)?.max(f64::EPSILON))
                })
                .collect(),
        )
    };
    Some(Ratio {
        server: server.name(),
        against: against.name(),
        rate: of(|run| Some(run.rate))?,
        server_microseconds: of(|run| run.server_microseconds),
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::job::{Job, JobKind};
    use crate::measure::Latency;
    use crate::settings::ClientKind;

    fn run(server: ServerKind, round: usize, rate: f64, cost: Option<f64>) -> Measurement {
        Measurement {
            medium: "tmpfs".to_owned(),
            client: ClientKind::Light,
            job: JobKind::Write4kDeep,
            server,
            round,
            requests: 1,
            rate,
            latency: Latency {
                p50: 1.0,
                p99: 2.0,
                p999: 3.0,
            },
            server_microseconds: cost,
            switches: None,
            foreign_share: 0.0,
            disturbed: round == 1,
            attempts: 1,
        }
    }

    #[test]
    fn ratios_are_taken_within_rounds() {
        let section = Section {
            folder: "/tmp".into(),
            medium: "tmpfs".to_owned(),
            direct: false,
            client: ClientKind::Light,
            job: Job::of(JobKind::Write4kDeep),
        };
        let plan = Plan {
            sections: vec![section.clone()],
            servers: vec![
                ServerKind::Tracker,
                ServerKind::Nbdkit,
                ServerKind::NbdServer,
            ],
            rounds: 2,
            duration: Duration::from_secs(1),
            size_bytes: 4096,
        };
        let runs = [
            run(ServerKind::Tracker, 0, 30.0, Some(1.0)),
            run(ServerKind::Nbdkit, 0, 10.0, Some(4.0)),
            run(ServerKind::Nbdkit, 1, 20.0, Some(4.0)),
            run(ServerKind::Tracker, 1, 20.0, Some(2.0)),
        ];
        let summary = Summary::of(&plan, &section, &runs, |_| None);
        assert_eq!(
            (summary.rows.len(), summary.best_peer),
            (2, Some("nbdkit file"))
        );
        assert_eq!(summary.rows[0].disturbed, 1);
        let [ratio] = &summary.ratios[..] else {
            panic!("one pair took part");
        };
        assert_eq!((ratio.rate.minimum, ratio.rate.maximum), (1.0, 3.0));
        let cost = ratio.server_microseconds.unwrap();
        assert_eq!((cost.minimum, cost.maximum), (0.25, 0.5));
    }
}
