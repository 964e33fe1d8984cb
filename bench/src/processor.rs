//! What a server costs: processor time and context switches, from `/proc`.

use nix::unistd::{SysconfVar, sysconf};

use crate::Result;

/// Sums over all threads of a process since its start.
#[derive(Clone, Copy, Debug, Default)]
pub struct Usage {
    /// Processor time, user and system, in microseconds.
    pub microseconds: u64,
    /// Context switches, voluntary and not, of the threads that live now.
    pub switches: u64,
}

impl Usage {
    /// What was used after `before`.
    pub fn since(&self, before: &Self) -> Self {
        Self {
            microseconds: self.microseconds.saturating_sub(before.microseconds),
            switches: self.switches.saturating_sub(before.switches),
        }
    }
}

/// The usage of a process. The kernel threads that io_uring uses for it are counted in.
///
/// # Errors
///
/// The process is gone.
pub fn usage(pid: u32) -> Result<Usage> {
    let path = format!("/proc/{pid}/stat");
    let text = std::fs::read_to_string(&path).map_err(|error| format!("{path}: {error}"))?;
    let ticks = ticks_of(&text).ok_or_else(|| format!("{path} has an unknown form"))?;
    let per_second = sysconf(SysconfVar::CLK_TCK)?.unwrap_or(100).max(1) as u64;
    let mut switches = 0;
    for task in std::fs::read_dir(format!("/proc/{pid}/task"))?.flatten() {
        // A thread may end between the two calls.
        let status = std::fs::read_to_string(task.path().join("status")).unwrap_or_default();
        switches += status
            .lines()
            .filter(|line| line.contains("voluntary_ctxt_switches"))
            .filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok())
            .sum::<u64>();
    }
    Ok(Usage {
        microseconds: ticks * 1_000_000 / per_second,
        switches,
    })
}

/// utime and stime, the 14th and 15th fields of proc_pid_stat(5). The second field is a name in
/// parentheses that may hold anything, so fields are counted after the last parenthesis.
fn ticks_of(text: &str) -> Option<u64> {
    let (_, rest) = text.rsplit_once(')')?;
    let mut fields = rest.split_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some(user + system)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_with_parentheses_do_not_shift_the_fields() {
        let text = "7 (a) b (c) S 1 2 3 4 5 6 7 8 9 10 40 2 0 0 20";
        assert_eq!(ticks_of(text), Some(42));
        assert_eq!(ticks_of("7 (short) S 1"), None);
    }

    #[test]
    fn the_own_process_has_used_something_or_nothing() {
        assert!(usage(std::process::id()).is_ok());
    }
}
