//! Locks on files that one process may use at a time.

use std::fs::File;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

/// Time that a holder that is just ending may take. The kernel ends the io_uring of a killed process
/// in the background, and what was in flight holds the file, and with it the lock, until then.
const PATIENCE: Duration = Duration::from_secs(5);
const LOOK_INTERVAL: Duration = Duration::from_millis(5);

/// Locks a file against every other process. Waits for a holder that is just ending.
///
/// # Errors
///
/// `EWOULDBLOCK`: it is held by a process that does not end.
pub fn lock_exclusive(mut file: File) -> Result<Flock<File>, Errno> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err((returned, Errno::EWOULDBLOCK)) if Instant::now() < deadline => file = returned,
            Err((_, errno)) => return Err(errno),
        }
        std::thread::sleep(LOOK_INTERVAL);
    }
}
