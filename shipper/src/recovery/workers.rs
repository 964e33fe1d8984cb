//! Threads that work on one task and stop together at its first error.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::error::{Error, Result};

/// Threads that read directories at the same time: one may take some 60 MiB while it is decoded.
pub const DIRECTORY_THREADS_MAX: usize = 4;
/// Threads that read data at the same time, each with a few MiB of buffers.
const DATA_THREADS_MAX: usize = 32;

/// How many threads read directories, of those that the caller allows.
pub fn directory_threads(threads: usize) -> usize {
    threads.clamp(1, DIRECTORY_THREADS_MAX)
}

/// How many threads read data, of those that the caller allows.
pub fn data_threads(threads: usize) -> usize {
    threads.clamp(1, DATA_THREADS_MAX)
}

/// The first error of several threads.
#[derive(Debug, Default)]
pub struct Failure {
    failed: AtomicBool,
    first: Mutex<Option<Error>>,
}

impl Failure {
    /// Keeps the error if it is the first one, and tells all threads to stop.
    pub fn set(&self, error: Error) {
        let mut first = self.first.lock().unwrap_or_else(PoisonError::into_inner);
        first.get_or_insert(error);
        drop(first);
        self.failed.store(true, Ordering::Release);
    }

    /// Whether to stop.
    pub fn is_set(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }

    /// The first error, if there was one.
    ///
    /// # Errors
    ///
    /// What was set.
    pub fn into_result(self) -> Result<()> {
        let first = self.first.into_inner();
        let first = first.unwrap_or_else(PoisonError::into_inner);
        first.map_or(Ok(()), Err)
    }
}

/// Numbers from zero on, each given to one thread.
#[derive(Debug)]
pub struct Numbers<'a> {
    next: AtomicUsize,
    end: usize,
    failure: &'a Failure,
}

impl<'a> Numbers<'a> {
    /// The numbers below `end`; none any more after a failure.
    pub fn new(end: usize, failure: &'a Failure) -> Self {
        Self {
            next: AtomicUsize::new(0),
            end,
            failure,
        }
    }

    /// Works on numbers until there are none left; an error ends it for all threads.
    pub fn work(&self, mut work: impl FnMut(usize) -> Result<()>) {
        while !self.failure.is_set() {
            let number = self.next.fetch_add(1, Ordering::Relaxed);
            if number >= self.end {
                return;
            }
            if let Err(error) = work(number) {
                self.failure.set(error);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn each_number_is_worked_on_once() {
        let failure = Failure::default();
        let numbers = Numbers::new(100, &failure);
        let sum = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    numbers.work(|number| {
                        sum.fetch_add(number, Ordering::Relaxed);
                        Ok(())
                    });
                });
            }
        });
        assert_eq!(sum.into_inner(), 4950);
        assert!(failure.into_result().is_ok());
    }

    #[test]
    fn the_first_error_stops_all() {
        let failure = Failure::default();
        let numbers = Numbers::new(100, &failure);
        let mut seen = 0;
        numbers.work(|number| {
            seen += 1;
            Err(Error::new(ErrorKind::Invalid, format!("Error {number}")))
        });
        failure.set(Error::new(ErrorKind::Io, "Later"));
        assert_eq!(seen, 1);
        assert_eq!(failure.into_result().unwrap_err().to_string(), "Error 0");
    }
}
