//! Commands with the time that they take until what they wrote is durable, and the memory that they take at most.

use std::fs::File;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::unistd::syncfs;
use serde::{Deserialize, Serialize};

use crate::Result;

/// Time between two looks at a command.
const LOOK_INTERVAL: Duration = Duration::from_millis(2);
const DROP_CACHES: &str = "/proc/sys/vm/drop_caches";

/// What a command took.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Spent {
    /// From its start until the file system was synced after its end.
    pub seconds: f64,
    /// The most memory that it had at any look.
    pub peak_bytes: u64,
}

/// The folder of a benchmark, in which everything lies.
#[derive(Clone, Copy, Debug)]
pub struct Work<'a>(pub &'a Path);

impl Work<'_> {
    /// Runs a command to its end. What it says goes to a file, and is part of the error if it fails.
    ///
    /// # Errors
    ///
    /// It cannot be started, or fails.
    pub fn run(&self, command: &mut Command) -> Result<Spent> {
        let path = self.0.join("said.log");
        let log = File::create(&path)?;
        command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let begin = Instant::now();
        let mut child = command
            .spawn()
            .map_err(|error| format!("cannot start {command:?}: {error}"))?;
        let mut peak_bytes = 0;
        let status = loop {
            peak_bytes = peak_bytes.max(peak_of(child.id()).unwrap_or(0));
            if let Some(status) = child.try_wait()? {
                break status;
            }
            std::thread::sleep(LOOK_INTERVAL);
        };
        self.sync()?;
        let seconds = begin.elapsed().as_secs_f64();
        if !status.success() {
            let said = std::fs::read_to_string(&path).unwrap_or_default();
            return Err(format!("{command:?} failed: {said}").into());
        }
        Ok(Spent {
            seconds,
            peak_bytes,
        })
    }

    /// Syncs the file system of the folder: no peer is faster because it leaves that to others.
    ///
    /// # Errors
    ///
    /// The system fails.
    pub fn sync(&self) -> Result<()> {
        Ok(syncfs(File::open(self.0)?)?)
    }

    /// The next one begins with nothing in the page cache, if that can be had: whether it was.
    ///
    /// # Errors
    ///
    /// The file system cannot be synced.
    pub fn forget_caches(&self) -> Result<bool> {
        self.sync()?;
        Ok(std::fs::write(DROP_CACHES, "3").is_ok())
    }
}

/// The most memory that a process ever had, in bytes.
pub fn peak_of(pid: u32) -> Option<u64> {
    peak_in(&std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?)
}

/// The same in the text of its status.
fn peak_in(status: &str) -> Option<u64> {
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kibibytes << 10)
}

/// Bytes of all files below a folder.
///
/// # Errors
///
/// A folder cannot be read.
pub fn bytes_below(folder: &Path) -> Result<u64> {
    let mut sum = 0;
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        sum += match metadata.is_dir() {
            true => bytes_below(&entry.path())?,
            false => metadata.len(),
        };
    }
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_found_in_a_status() {
        let text = "Name:\tcat\nVmPeak:\t    9000 kB\nVmHWM:\t    2048 kB\nVmRSS:\t 1 kB\n";
        assert_eq!(peak_in(text), Some(2 << 20));
        assert_eq!(peak_in("Name:\tkthreadd\n"), None);
        assert!(peak_of(std::process::id()).unwrap() > 0);
    }

    #[test]
    fn a_command_that_fails_says_why() {
        let folder = tempfile::tempdir().unwrap();
        let work = Work(folder.path());
        let mut command = Command::new("sh");
        let error = work
            .run(command.args(["-c", "echo reason >&2; exit 3"]))
            .unwrap_err();
        assert!(error.to_string().contains("reason"), "{error}");
        let spent = work.run(Command::new("sh").args(["-c", ":"])).unwrap();
        assert!(spent.seconds > 0.0);
    }

    #[test]
    fn files_are_summed_up_through_folders() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(folder.path().join("a/b")).unwrap();
        std::fs::write(folder.path().join("a/b/c"), [0; 10]).unwrap();
        std::fs::write(folder.path().join("d"), [0; 5]).unwrap();
        assert_eq!(bytes_below(folder.path()).unwrap(), 15);
    }
}
