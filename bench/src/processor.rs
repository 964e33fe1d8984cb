//! What a server costs and what else the machine does, from `/proc`.
//!
//! The usage of a server is that of its process and of the processes below it, living or reaped.
//! io_uring's workers and all threads that have ended are in a process's own sums. Context switches
//! are told of living threads only, so a watcher looks again and again while the load runs.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use nix::unistd::{SysconfVar, sysconf};
use std::sync::Arc;

use crate::Result;

/// Time between two looks at the context switches.
const WATCH_INTERVAL: Duration = Duration::from_millis(100);
/// The flag of kernel threads in proc_pid_stat(5).
const KERNEL_THREAD: u64 = 0x0020_0000;

/// Processor time of a process and all below it since its start, in microseconds.
pub fn microseconds_of(pid: u32) -> u64 {
    let ticks: u64 = family(pid)
        .iter()
        .filter_map(|pid| {
            let stat = Stat::parse(&std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)?;
            Some(stat.ticks + stat.ticks_of_reaped)
        })
        .sum();
    ticks * microseconds_per_tick()
}

/// Processor time of this process and of its children that have ended, in microseconds.
///
/// # Errors
///
/// The kernel does not tell.
pub fn own_microseconds() -> Result<u64> {
    let mut sum = 0;
    for who in [UsageWho::RUSAGE_SELF, UsageWho::RUSAGE_CHILDREN] {
        let usage = getrusage(who)?;
        sum += usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
    }
    Ok(u64::try_from(sum)?)
}

/// Processor time of the whole machine since its start, in microseconds, as (all that was busy or
/// stolen by the host, that of kernel threads).
///
/// # Errors
///
/// `/proc/stat` has an unknown form.
pub fn machine_microseconds() -> Result<(u64, u64)> {
    let text = std::fs::read_to_string("/proc/stat")?;
    let busy = busy_ticks(&text).ok_or("/proc/stat has an unknown form")?;
    let mut kernel = 0;
    for entry in std::fs::read_dir("/proc")?.flatten() {
        if entry.file_name().to_string_lossy().parse::<u32>().is_err() {
            continue;
        }
        let text = std::fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        if let Some(stat) = Stat::parse(&text)
            && stat.flags & KERNEL_THREAD != 0
        {
            kernel += stat.ticks;
        }
    }
    Ok((
        busy * microseconds_per_tick(),
        kernel * microseconds_per_tick(),
    ))
}

fn microseconds_per_tick() -> u64 {
    let ticks = sysconf(SysconfVar::CLK_TCK).ok().flatten().unwrap_or(100);
    1_000_000 / u64::try_from(ticks).unwrap_or(100).max(1)
}

/// user, nice, system, irq, softirq and steal; idle and iowait are left out.
fn busy_ticks(text: &str) -> Option<u64> {
    let line = text.lines().next()?.strip_prefix("cpu ")?;
    let fields: Vec<u64> = line
        .split_whitespace()
        .filter_map(|field| field.parse().ok())
        .collect();
    [0, 1, 2, 5, 6, 7]
        .iter()
        .map(|index| fields.get(*index).copied())
        .sum()
}

/// The fields of proc_pid_stat(5) that matter here.
#[derive(Debug, PartialEq)]
struct Stat {
    flags: u64,
    /// utime and stime.
    ticks: u64,
    /// cutime and cstime.
    ticks_of_reaped: u64,
}

impl Stat {
    /// The second field is a name in parentheses that may hold anything, so fields are counted after
    /// the last parenthesis.
    fn parse(text: &str) -> Option<Self> {
        let (_, rest) = text.rsplit_once(')')?;
        let fields: Vec<&str> = rest.split_whitespace().collect();
        let number = |index: usize| fields.get(index)?.parse::<u64>().ok();
        Some(Self {
            flags: number(6)?,
            ticks: number(11)? + number(12)?,
            ticks_of_reaped: number(13)? + number(14)?,
        })
    }
}

/// A process and all below it.
fn family(pid: u32) -> Vec<u32> {
    let mut members = vec![pid];
    let mut next = 0;
    while let Some(pid) = members.get(next).copied() {
        next += 1;
        for task in std::fs::read_dir(format!("/proc/{pid}/task"))
            .into_iter()
            .flatten()
            .flatten()
        {
            let text = std::fs::read_to_string(task.path().join("children")).unwrap_or_default();
            members.extend(
                text.split_whitespace()
                    .filter_map(|pid| pid.parse::<u32>().ok()),
            );
        }
    }
    members
}

/// Context switches of each thread, voluntary and not.
fn switches_of(pid: u32, found: &mut HashMap<u32, u64>) {
    for member in family(pid) {
        for task in std::fs::read_dir(format!("/proc/{member}/task"))
            .into_iter()
            .flatten()
            .flatten()
        {
            // A thread may end between the two calls.
            let text = std::fs::read_to_string(task.path().join("status")).unwrap_or_default();
            let switches = text
                .lines()
                .filter(|line| line.contains("voluntary_ctxt_switches"))
                .filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok())
                .sum::<u64>();
            if let Ok(thread) = task.file_name().to_string_lossy().parse()
                && !text.is_empty()
            {
                found.insert(thread, switches);
            }
        }
    }
}

/// Counts the context switches of a server while it runs.
pub struct Watcher {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<f64>,
}

impl Watcher {
    /// Begins to count.
    pub fn start(pid: u32) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&stop);
        let thread = std::thread::spawn(move || watch(pid, &seen));
        Self { stop, thread }
    }

    /// Context switches per second since the start.
    pub fn finish(self) -> f64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.thread().unpark();
        self.thread.join().unwrap_or(0.0)
    }
}

/// Threads end with the load, so the rate is taken up to the last look that saw more switches.
fn watch(pid: u32, stop: &AtomicBool) -> f64 {
    let mut before = HashMap::new();
    switches_of(pid, &mut before);
    let before: u64 = before.values().sum();
    let begin = Instant::now();
    let mut found = HashMap::new();
    let (mut most, mut seconds) = (before, f64::EPSILON);
    while !stop.load(Ordering::Relaxed) {
        std::thread::park_timeout(WATCH_INTERVAL);
        switches_of(pid, &mut found);
        let sum: u64 = found.values().sum();
        if sum > most {
            (most, seconds) = (sum, begin.elapsed().as_secs_f64());
        }
    }
    (most - before) as f64 / seconds
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_with_parentheses_do_not_shift_the_fields() {
        let text = "7 (a) b (c) S 1 2 3 4 5 6 7 8 9 10 40 2 5 6 20";
        let stat = Stat {
            flags: 6,
            ticks: 42,
            ticks_of_reaped: 11,
        };
        assert_eq!(Stat::parse(text), Some(stat));
        assert_eq!(Stat::parse("7 (short) S 1"), None);
    }

    #[test]
    fn waiting_is_not_busy() {
        let text = "cpu  1 2 4 1000 1000 8 16 32 0 0\ncpu0 1";
        assert_eq!(busy_ticks(text), Some(63));
        assert_eq!(busy_ticks("cpu 1 2"), None);
    }

    #[test]
    fn the_own_process_is_found() {
        assert!(family(std::process::id()).contains(&std::process::id()));
        let mut found = HashMap::new();
        switches_of(std::process::id(), &mut found);
        assert!(found.contains_key(&std::process::id()));
        let (busy, _) = machine_microseconds().unwrap();
        assert!(busy > 0);
    }
}
