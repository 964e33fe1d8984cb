//! The status of a shipper as OpenMetrics text, for Prometheus and those who read the same. Pure.
//!
//! Counters begin anew with the process, as Prometheus expects.

use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};

use crate::error::{Error, ErrorKind, Result};
use crate::status::{DiskStatus, Health, Part, Phase, Status};

type Labels = [(&'static str, String); 1];

/// All figures of a status.
///
/// # Errors
///
/// The text cannot be written.
pub fn text(status: &Status) -> Result<String> {
    let labels = [("machine".into(), status.machine.clone().into())];
    let mut registry = Registry::with_prefix_and_labels("tidemark_shipper", labels.into_iter());
    state(&mut registry, status);
    points(&mut registry, status);
    vault(&mut registry, status);
    for disk in &status.disks {
        of_disk(&mut registry, disk);
    }
    let mut text = String::new();
    encode(&mut text, &registry).map_err(|error| {
        Error::new(ErrorKind::Invalid, "Cannot write metrics").with_source(error)
    })?;
    Ok(text)
}

fn gauge(registry: &mut Registry, name: &str, help: &str, value: u64) {
    let gauge = Gauge::<i64>::default();
    gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
    registry.register(name, help, gauge);
}

fn gauge_of_bytes(registry: &mut Registry, name: &str, help: &str, value: u64) {
    let gauge = Gauge::<i64>::default();
    gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
    registry.register_with_unit(name, help, Unit::Bytes, gauge);
}

fn counter(registry: &mut Registry, name: &str, help: &str, value: u64) {
    let counter = Counter::<u64>::default();
    counter.inc_by(value);
    registry.register(name, help, counter);
}

fn counter_of_bytes(registry: &mut Registry, name: &str, help: &str, value: u64) {
    let counter = Counter::<u64>::default();
    counter.inc_by(value);
    registry.register_with_unit(name, help, Unit::Bytes, counter);
}

/// A gauge for each of some states, which is 1 where it holds.
fn states(
    registry: &mut Registry,
    name: &str,
    help: &str,
    label: &'static str,
    all: &[(String, bool)],
) {
    let family = Family::<Labels, Gauge>::default();
    for (state, holds) in all {
        let labels = [(label, state.clone())];
        family.get_or_create(&labels).set(i64::from(*holds));
    }
    registry.register(name, help, family);
}

fn state(registry: &mut Registry, status: &Status) {
    let named = |health: Health, name: &str| (name.to_owned(), status.health == health);
    let all = [
        named(Health::Ok, "ok"),
        named(Health::Warning, "warning"),
        named(Health::Critical, "critical"),
    ];
    let help = "Health of the whole: 1 for the state that holds";
    states(registry, "health", help, "state", &all);
    let named = |phase: Phase, name: &str| (name.to_owned(), status.phase == phase);
    let all = [
        named(Phase::Connecting, "connecting"),
        named(Phase::Scanning, "scanning"),
        named(Phase::Waiting, "waiting"),
        named(Phase::Capturing, "capturing"),
    ];
    let help = "What it is doing: 1 for the phase that holds";
    states(registry, "phase", help, "phase", &all);
    let named = |part: Part, name: &str| (name.to_owned(), status.problems.contains_key(&part));
    let all = [
        named(Part::Tracker, "tracker"),
        named(Part::Capture, "capture"),
        named(Part::Spool, "spool"),
        named(Part::Vault, "vault"),
        named(Part::Quiesce, "quiesce"),
    ];
    let help = "Parts in trouble: 1 for each that is";
    states(registry, "trouble", help, "part", &all);
    gauge(
        registry,
        "generation",
        "The generation that it holds",
        status.generation,
    );
}

fn points(registry: &mut Registry, status: &Status) {
    let newest = status.newest_point.map_or(0, |epoch| epoch.0);
    let help = "Number of the newest recovery point in the vault, 0 for none";
    gauge(registry, "newest_point", help, newest);
    let help = "Recovery points made";
    counter(registry, "points", help, status.points);
    let help = "Recovery points given up";
    counter(registry, "points_given_up", help, status.points_given_up);
    let help = "Epochs that wait for upload";
    gauge(registry, "spool_epochs", help, status.spool_epochs);
    let help = "What waits for upload";
    gauge_of_bytes(registry, "spool", help, status.spool_bytes);
    let help = "What may wait for upload";
    gauge_of_bytes(registry, "spool_budget", help, status.spool_budget_bytes);
}

fn vault(registry: &mut Registry, status: &Status) {
    let help = "Segments put into the vault";
    counter(
        registry,
        "uploaded_segments",
        help,
        status.uploaded_segments,
    );
    let help = "Segments put into the vault";
    counter_of_bytes(registry, "uploaded", help, status.uploaded_bytes);
    let requests = Family::<Labels, Counter>::default();
    let bytes = Family::<Labels, Counter>::default();
    for (kind, sum) in status.vault_requests.kinds() {
        let labels = [("kind", kind.to_owned())];
        requests.get_or_create(&labels).inc_by(sum.requests);
        bytes.get_or_create(&labels).inc_by(sum.bytes);
    }
    let help = "Requests to the vault's store";
    registry.register("vault_requests", help, requests);
    let help = "Content that went with requests to the vault's store";
    registry.register_with_unit("vault_requests", help, Unit::Bytes, bytes);
    if let Some(cost) = status.vault_cost {
        let gauge = Gauge::<f64, std::sync::atomic::AtomicU64>::default();
        gauge.set(cost);
        let help = "What the requests cost by the prices of the configuration";
        registry.register("vault_cost", help, gauge);
    }
}

fn of_disk(registry: &mut Registry, disk: &DiskStatus) {
    let label = ("disk".into(), disk.name.clone().into());
    let registry = registry.sub_registry_with_label(label);
    let help = "Size of the disk";
    gauge_of_bytes(registry, "disk_size", help, disk.size_bytes);
    let help = "Read from the disk";
    counter_of_bytes(registry, "disk_read", help, disk.bytes_read);
    let help = "What waits to be shipped";
    gauge_of_bytes(registry, "disk_waiting", help, disk.waiting_bytes);
    let help = "Blocks that a scan has seen; as many as there are where none is needed";
    gauge(registry, "disk_scanned_blocks", help, disk.scanned_blocks);
    gauge(registry, "disk_blocks", "Blocks of the disk", disk.blocks);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::counted::Sum;

    fn example() -> Status {
        let mut status = Status {
            machine: "web".to_owned(),
            newest_point: Some(tracker::extent::Epoch(7)),
            points: 3,
            vault_cost: Some(0.5),
            health: Health::Warning,
            ..Status::default()
        };
        status.problems.insert(Part::Vault, "gone".to_owned());
        status.vault_requests.put = Sum {
            requests: 4,
            bytes: 1000,
        };
        for name in ["root", "data"] {
            status.disks.push(DiskStatus {
                name: name.to_owned(),
                size_bytes: 4096,
                ..DiskStatus::default()
            });
        }
        status
    }

    #[test]
    fn what_is_known_is_in_the_text() {
        let text = text(&example()).unwrap();
        for line in [
            "tidemark_shipper_points_total{machine=\"web\"} 3",
            "tidemark_shipper_newest_point{machine=\"web\"} 7",
            "tidemark_shipper_health{machine=\"web\",state=\"warning\"} 1",
            "tidemark_shipper_health{machine=\"web\",state=\"ok\"} 0",
            "tidemark_shipper_trouble{machine=\"web\",part=\"vault\"} 1",
            "tidemark_shipper_vault_requests_total{machine=\"web\",kind=\"put\"} 4",
            "tidemark_shipper_vault_requests_bytes_total{machine=\"web\",kind=\"put\"} 1000",
            "tidemark_shipper_vault_cost{machine=\"web\"} 0.5",
            "tidemark_shipper_disk_size_bytes{machine=\"web\",disk=\"data\"} 4096",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} in {text}");
        }
        assert!(text.ends_with("# EOF\n"));
    }
}
