//! Trying again: what may pass by itself is retried with growing pauses, everything else is not.

use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBuilder};

use crate::error::{Error, ErrorKind, Result};

const DELAY_MIN: Duration = Duration::from_millis(200);
const DELAY_MAX: Duration = Duration::from_secs(30);

/// Tells all threads of a shipper that it is to end.
#[derive(Debug, Default)]
pub struct Stop {
    told: Mutex<bool>,
    changed: Condvar,
}

impl Stop {
    /// Tells them.
    pub fn tell(&self) {
        *self.told.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.changed.notify_all();
    }

    /// Whether they were told.
    pub fn is_told(&self) -> bool {
        *self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits, at most so long; `true` if the shipper is to end.
    pub fn wait(&self, limit: Duration) -> bool {
        let told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.changed.wait_timeout_while(told, limit, |told| !*told);
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }

    /// The error of work that was given up because the shipper is to end.
    pub fn error() -> Error {
        Error::new(ErrorKind::Stopped, "The shipper was told to stop")
    }
}

/// Pauses between attempts: growing from 0.2 s to 30 s, with jitter, without an end.
pub fn pauses() -> impl Iterator<Item = Duration> + Send {
    ExponentialBuilder::default()
        .with_min_delay(DELAY_MIN)
        .with_max_delay(DELAY_MAX)
        .without_max_times()
        .with_jitter()
        .build()
}

/// Attempts until it succeeds. `note` hears of every failure, and of the success after one.
///
/// # Errors
///
/// The first error that trying again does not mend, or `Stopped`.
pub fn until_done<T>(
    stop: &Stop,
    note: impl Fn(Option<&Error>),
    mut attempt: impl FnMut() -> Result<T>,
) -> Result<T> {
    let mut pauses = pauses();
    let mut failed = false;
    loop {
        match attempt() {
            Ok(value) => {
                if failed {
                    note(None);
                }
                return Ok(value);
            }
            Err(error) if error.is_recoverable() => {
                failed = true;
                note(Some(&error));
                if stop.wait(pauses.next().unwrap_or(DELAY_MAX)) {
                    return Err(Stop::error());
                }
            }
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    #[test]
    fn what_may_pass_is_tried_again_and_told() {
        let heard = RefCell::new(Vec::new());
        let mut left = 2;
        let value = until_done(
            &Stop::default(),
            |error| heard.borrow_mut().push(error.map(|e| e.kind())),
            || {
                if left == 0 {
                    return Ok(7);
                }
                left -= 1;
                Err(Error::new(ErrorKind::Full, "full"))
            },
        );
        assert_eq!(value.unwrap(), 7);
        let full = Some(ErrorKind::Full);
        assert_eq!(*heard.borrow(), [full, full, None]);
    }

    #[test]
    fn what_will_not_pass_is_given_up() {
        let mut count = 0;
        let result = until_done::<()>(
            &Stop::default(),
            |_| {},
            || {
                count += 1;
                Err(Error::new(ErrorKind::Fenced, "fenced"))
            },
        );
        assert_eq!((result.unwrap_err().kind(), count), (ErrorKind::Fenced, 1));
    }

    #[test]
    fn a_stop_ends_the_pause() {
        let stop = Stop::default();
        stop.tell();
        let result = until_done::<()>(&stop, |_| {}, || Err(Error::new(ErrorKind::Io, "io")));
        assert_eq!(result.unwrap_err().kind(), ErrorKind::Stopped);
    }

    #[test]
    fn pauses_grow_to_their_limit() {
        let pauses: Vec<Duration> = pauses().take(20).collect();
        assert!(pauses[0] >= DELAY_MIN && pauses[0] <= 2 * DELAY_MIN);
        assert!(pauses[19] >= DELAY_MAX && pauses[19] <= 2 * DELAY_MAX);
    }
}
