//! Ending by a signal without leaving gigabytes behind.
//!
//! The signals are blocked in all threads but one, which waits for them. Programs that are started get them unblocked,
//! as the standard library sees to.

use std::path::PathBuf;
use std::time::Duration;

use nix::sys::signal::{SigSet, Signal, kill};
use nix::unistd::Pid;

use crate::Result;

/// Status of a program that was ended by hand.
const STATUS: i32 = 130;
/// The program goes on until it has ended, and may make files meanwhile.
const ATTEMPTS: u32 = 50;
const PAUSE: Duration = Duration::from_millis(20);

/// From here on SIGINT, SIGTERM and SIGHUP end all programs below this one, remove the folder and end this program. To be
/// called before there is any other thread.
///
/// # Errors
///
/// The system refuses.
pub fn remove_on_signal(folder: PathBuf) -> Result<()> {
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        signals.add(signal);
    }
    signals.thread_block()?;
    std::thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || {
            if signals.wait().is_err() {
                return;
            }
            for _ in 0..ATTEMPTS {
                end_below(std::process::id());
                let _again = std::fs::remove_dir_all(&folder);
                if !folder.exists() {
                    break;
                }
                std::thread::sleep(PAUSE);
            }
            std::process::exit(STATUS);
        })?;
    Ok(())
}

/// Kills all programs that this one has started, and those that they have.
fn end_below(parent: u32) {
    for child in children_of(parent) {
        end_below(child);
        if let Ok(number) = i32::try_from(child) {
            let _gone = kill(Pid::from_raw(number), Signal::SIGKILL);
        }
    }
}

fn children_of(parent: u32) -> Vec<u32> {
    let Ok(threads) = std::fs::read_dir(format!("/proc/{parent}/task")) else {
        return Vec::new();
    };
    let lists = threads
        .flatten()
        .filter_map(|thread| std::fs::read_to_string(thread.path().join("children")).ok());
    let numbers = |list: String| -> Vec<u32> {
        list.split_whitespace()
            .filter_map(|word| word.parse().ok())
            .collect()
    };
    lists.flat_map(numbers).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn children_are_found_and_ended() {
        let mut shell = Command::new("sh")
            .args(["-c", "sleep 600 & wait"])
            .spawn()
            .unwrap();
        while children_of(shell.id()).is_empty() {
            std::thread::yield_now();
        }
        assert!(children_of(std::process::id()).contains(&shell.id()));
        end_below(shell.id());
        shell.kill().unwrap();
        assert!(!shell.wait().unwrap().success());
    }
}
