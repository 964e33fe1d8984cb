//! Protection over time: a first copy that is killed, outages, lost folders, a second shipper.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use tests::nbd::Client;
use tests::process::{Daemon, program, run};
use tests::seed::Random;
use tests::site::{Site, await_status, files_below, machine_folder, number, status};

const MIB: u64 = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(60);

fn fill(client: &mut Client, random: &mut Random, bytes: u64) {
    for offset in (0..bytes).step_by(MIB as usize) {
        client.write(offset, &random.bytes(MIB as usize)).unwrap();
    }
}

/// A machine with a disk of random bytes, protected; the tracker runs, the shipper does not.
struct Filled {
    site: Site,
    tracker: Daemon,
    client: Client,
    random: Random,
}

fn filled(test: &str, mib: u64) -> Filled {
    let mut site = Site::new(&[("disk", mib * MIB)]);
    site.codec = "none".to_owned();
    let mut random = Random::from_environment(test);
    let tracker = site.start_tracker();
    let mut client = site.connect("disk");
    fill(&mut client, &mut random, mib * MIB);
    site.protect();
    Filled {
        site,
        tracker,
        client,
        random,
    }
}

#[test]
fn a_first_copy_goes_on_where_it_was_killed() {
    let Filled {
        site,
        tracker,
        mut client,
        mut random,
    } = filled("first_copy", 256);
    let shipper = site.start_shipper();
    await_status(&site, "a segment scanned", |status| {
        number(status, "/disks/0/scanned_blocks") > 0
    });
    shipper.kill();
    // What changes meanwhile is tracked, also before the place where the copy goes on.
    client.write(0, &random.bytes(4096)).unwrap();
    client.trim(8 * MIB, 1 << 20).unwrap();
    let shipper = site.start_shipper();
    let point = site.cut();
    let read = number(&status(&site).unwrap(), "/disks/0/bytes_read");
    assert!(read < 230 * MIB, "it began anew: {} MiB read", read / MIB);
    site.check_restore(&point, &site.image("disk"));
    site.shipper(&["verify", "--data"]).success();
    shipper.stop();
    tracker.stop();
}

#[test]
fn recovery_points_wait_for_a_vault_that_is_away() {
    let Filled {
        mut site,
        tracker,
        mut client,
        mut random,
    } = filled("outage", 16);
    let shipper = site.start_shipper();
    site.cut();
    shipper.stop();
    site.interval = "50ms".to_owned();
    site.write_config();
    let shipper = site.start_shipper();
    let elsewhere = site.path("elsewhere");
    fs::rename(site.vault(), &elsewhere).unwrap();
    for wanted in 1..=4 {
        client
            .write(random.below(16) * MIB, &random.bytes(4096))
            .unwrap();
        await_status(&site, "an epoch in the spool", |status| {
            number(status, "/spool_epochs") >= wanted
        });
    }
    assert!(
        !site.vault().join("machines").exists(),
        "nothing is written where no vault is"
    );
    let before: Vec<PathBuf> = files_below(&machine_folder(&elsewhere).join("points"));
    fs::rename(&elsewhere, site.vault()).unwrap();
    await_status(&site, "an empty spool", |status| {
        number(status, "/spool_epochs") == 0
    });
    assert!(
        site.points().len() >= before.len() + 4,
        "each of them is a recovery point"
    );
    let point = site.cut();
    site.check_restore(&point, &site.image("disk"));
    site.shipper(&["verify", "--data"]).success();
    shipper.stop();
    tracker.stop();
}

/// What waits to be read, or was read and waits, must not count as work for ever.
#[test]
fn a_capture_that_may_take_a_share_of_the_time_comes_to_its_end() {
    let Filled {
        mut site,
        tracker,
        mut client,
        mut random,
    } = filled("share", 16);
    site.settings = "capture_share_percent = 10\n".to_owned();
    site.write_config();
    let shipper = site.start_shipper();
    site.cut();
    for _ in 0..400 {
        let offset = random.below(16 * 256) * 4096;
        client.write(offset, &random.bytes(4096)).unwrap();
    }
    let point = site.cut();
    site.check_restore(&point, &site.image("disk"));
    shipper.stop();
    tracker.stop();
}

#[test]
fn a_lost_spool_loses_no_change() {
    let Filled {
        mut site,
        tracker,
        mut client,
        mut random,
    } = filled("lost_spool", 16);
    let shipper = site.start_shipper();
    site.cut();
    let old = random.bytes(4096);
    client.write(5 * MIB, &old).unwrap();
    let kept = site.cut();
    let copy = site.path("copy");
    fs::copy(site.image("disk"), &copy).unwrap();
    shipper.stop();
    site.interval = "50ms".to_owned();
    site.write_config();
    let elsewhere = site.path("elsewhere");
    let shipper = site.start_shipper();
    fs::rename(site.vault(), &elsewhere).unwrap();
    // New content is sealed and never uploaded, then the old content comes back: a fingerprint that
    // was kept of the lost epoch, or of the one before it, must not hide either change.
    client.write(5 * MIB, &random.bytes(4096)).unwrap();
    client.write(9 * MIB, &random.bytes(4096)).unwrap();
    await_status(&site, "an epoch in the spool", |status| {
        number(status, "/spool_epochs") >= 1
    });
    shipper.kill();
    fs::remove_dir_all(site.state().join("spool")).unwrap();
    client.write(5 * MIB, &old).unwrap();
    fs::rename(&elsewhere, site.vault()).unwrap();
    let shipper = site.start_shipper();
    let point = site.cut();
    site.check_restore(&point, &site.image("disk"));
    site.check_restore(&kept, &copy);
    shipper.stop();
    tracker.stop();
}

#[test]
fn a_lost_state_folder_costs_a_comparison_and_no_upload() {
    let Filled {
        site,
        tracker,
        mut client,
        mut random,
    } = filled("lost_state", 64);
    let shipper = site.start_shipper();
    let first = site.cut();
    shipper.stop();
    let before = site.segment_bytes();
    fs::remove_dir_all(site.state()).unwrap();
    client.write(7 * MIB, &random.bytes(8192)).unwrap();
    site.shipper(&["protect"]).success();
    let shipper = site.start_shipper();
    let second = site.cut();
    assert!(second > first);
    let uploaded = site.segment_bytes() - before;
    assert!(
        uploaded < MIB,
        "{uploaded} bytes uploaded for two changed blocks"
    );
    site.check_restore(&second, &site.image("disk"));
    shipper.stop();
    tracker.stop();
}

#[test]
fn a_new_journal_costs_a_comparison_and_no_upload() {
    let Filled {
        mut site,
        tracker,
        mut client,
        mut random,
    } = filled("new_journal", 64);
    let shipper = site.start_shipper();
    site.cut();
    let first = site.cut();
    let before = site.segment_bytes();
    client.write(11 * MIB, &random.bytes(4096)).unwrap();
    tracker.kill();
    site.tracker_arguments.push("--resync".into());
    let tracker = site.start_tracker();
    let deadline = Instant::now() + PATIENCE;
    let second = loop {
        // The shipper has to find its tracker again.
        let outcome = site.shipper(&["cut"]);
        if outcome.status.success() {
            break outcome.out.trim().to_owned();
        }
        assert!(Instant::now() < deadline, "{}", outcome.err);
    };
    assert!(
        second > first,
        "numbers of recovery points only grow: {first}, {second}"
    );
    let uploaded = site.segment_bytes() - before;
    assert!(
        uploaded < MIB,
        "{uploaded} bytes uploaded for one changed block"
    );
    site.check_restore(&second, &site.image("disk"));
    shipper.stop();
    tracker.stop();
}

/// What a ring cannot take counts as changed by coarse units: that costs reads, and no scan.
#[test]
fn a_ring_that_overflows_costs_coarse_changes_and_no_scan() {
    let Filled {
        mut site, tracker, ..
    } = filled("overflow", 64);
    tracker.stop();
    std::fs::remove_file(site.journal("disk")).unwrap();
    site.tracker_arguments = vec!["--ring-size".into(), "16KiB".into()];
    site.settings = "resync_share_percent = 100".to_owned();
    site.write_config();
    let tracker = site.start_tracker();
    let shipper = site.start_shipper();
    site.cut();
    let disk = |site: &Site| site.tracker_status()["machine"]["disks"][0].clone();
    // The tracker hears of the point when it is in the vault.
    let deadline = Instant::now() + PATIENCE;
    while !disk(&site)["resync"].is_null() {
        assert!(Instant::now() < deadline, "the first copy does not end");
    }
    let mut client = site.connect("disk");
    let mut random = Random::from_environment("overflow_load");
    let deadline = Instant::now() + PATIENCE;
    let overflowed = || disk(&site)["coarse_changes"].as_u64() > Some(0);
    while !overflowed() {
        assert!(Instant::now() < deadline, "the ring takes everything");
        // Faster than the ring is folded: all of them in flight at once.
        let blocks: Vec<u64> = (0..2000).map(|_| random.below(16 << 10)).collect();
        for block in &blocks {
            client
                .submit(
                    0,
                    tests::nbd::command::WRITE_ZEROES,
                    block * 4096,
                    4096,
                    &[],
                )
                .unwrap();
        }
        for _ in &blocks {
            client.receive().unwrap();
        }
    }
    let point = site.cut();
    site.check_restore(&point, &site.image("disk"));
    assert!(disk(&site)["resync"].is_null());
    let status = status(&site).unwrap();
    assert_eq!(number(&status, "/points_given_up"), 0, "{status:#?}");
    shipper.stop();
    tracker.stop();
}

#[test]
fn the_older_of_two_shippers_stops_for_good() {
    let Filled {
        site,
        tracker,
        mut client,
        mut random,
    } = filled("two_shippers", 16);
    let older = site.start_shipper();
    let first = site.cut();
    let other = site.path("other.toml");
    let state = format!("{:?}", site.state());
    let text = site
        .config_text()
        .replace(&state, &format!("{:?}", site.path("other-state")));
    fs::write(&other, text).unwrap();
    let with_other = |command: &str| {
        let mut shipper = Command::new(program("shipper"));
        shipper.arg(command).arg("--config").arg(&other);
        shipper
    };
    run(&mut with_other("protect")).success();
    client.write(MIB, &random.bytes(4096)).unwrap();
    let refused = site.shipper(&["cut"]);
    assert!(!refused.status.success(), "the older one still writes");
    assert!(older.await_end(PATIENCE), "the older one still runs");
    older.await_text("taken over");
    drop(older);
    // It stays stopped.
    let again = site.shipper(&["run"]);
    assert!(again.failure().contains("protect"));
    assert_eq!(site.points(), [first]);
    let newer = Daemon::start("shipper", &mut with_other("run"));
    let second = run(&mut with_other("cut")).success().trim().to_owned();
    site.check_restore(&second, &site.image("disk"));
    site.shipper(&["verify", "--data"]).success();
    newer.stop();
    tracker.stop();
}

#[test]
fn run_once_makes_one_recovery_point_and_ends() {
    let Filled { site, tracker, .. } = filled("once", 8);
    let out = site.shipper(&["run", "--once"]).success();
    let point = out.lines().last().unwrap().to_owned();
    assert_eq!(site.points().last(), Some(&point));
    site.check_restore(&point, &site.image("disk"));
    tracker.stop();
}

#[test]
fn a_status_tells_what_requests_cost() {
    let Filled { site, tracker, .. } = filled("cost", 2);
    let mut site = site;
    site.settings = "prices.put_per_1000 = 10.0\n".to_owned();
    site.write_config();
    let shipper = site.start_shipper();
    site.cut();
    let status = status(&site).unwrap();
    let puts = number(&status, "/vault_requests/put/requests");
    let cost = status["vault_cost"].as_f64().unwrap();
    assert!(
        puts > 0 && (cost - puts as f64 / 100.0).abs() < 1e-9,
        "{status}"
    );
    let metrics = site.shipper(&["status", "--metrics"]).success();
    for line in [
        "tidemark_shipper_points_total{machine=\"m1\"} ",
        "tidemark_shipper_vault_requests_total{machine=\"m1\",kind=\"put\"} ",
        "tidemark_shipper_vault_cost{machine=\"m1\"} ",
        "tidemark_shipper_health{machine=\"m1\",state=\"ok\"} 1",
    ] {
        let is_there = metrics.lines().any(|found| found.starts_with(line));
        assert!(is_there, "{line} in {metrics}");
    }
    assert!(metrics.ends_with("# EOF\n"), "{metrics}");
    let text = site.shipper(&["status"]).success();
    assert!(text.contains("they cost "), "{text}");
    shipper.stop();
    tracker.stop();
    site.settings = "prices.put_per_1000 = -1.0\n".to_owned();
    site.write_config();
    let refused = site.shipper(&["status"]);
    assert!(!refused.status.success() && refused.err.contains("put_per_1000"));
}
