//! The kernel's nbd client in a virtual machine: see `scripts/guest` for what happens in it.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::process::Command;
use std::time::Duration;

use tests::process::{program, run_within, workspace};

/// The script's own deadline is shorter.
const DEADLINE: Duration = Duration::from_secs(360);
/// How the script says that it cannot run on this machine.
const NOT_RUN: i32 = 77;

#[test]
fn a_killed_tracker_is_a_pause_for_the_kernel() {
    let script = workspace().join("scripts/guest");
    let outcome = run_within(
        Command::new(script).env("TIDEMARK_TRACKER", program("tracker")),
        DEADLINE,
    );
    if outcome.status.code() == Some(NOT_RUN) {
        eprintln!("left out: {}", outcome.out);
        return;
    }
    let out = outcome.success();
    let sum = out.lines().last().unwrap_or_default();
    assert!(sum.ends_with(" passed, 0 failed"), "{out}");
}
