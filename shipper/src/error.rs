//! The shipper's one error type: a kind for programs, a context for people, and a source.

use std::error::Error as StdError;
use std::fmt;
use std::io;

/// What went wrong, as far as a program needs to tell cases apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// The operating system refused an operation.
    Io,
    /// The named thing does not exist.
    Missing,
    /// Bytes that were read contradict their checks or their format.
    Corrupt,
    /// A format or protocol version from the future, or a feature that is not offered.
    Unsupported,
    /// The thing is held by another process.
    InUse,
    /// The caller's input is out of range or contradicts itself.
    Invalid,
    /// Two things that belong together do not: a journal and a disk, a disk and its size.
    Mismatch,
    /// The request is valid but not in this state.
    State,
    /// The store or the tracker could not be reached, or asked us to come back later.
    Unavailable,
    /// The store does not accept the credentials, or does not allow what was asked with them.
    Denied,
    /// The target has no room left.
    Full,
    /// A higher generation has been claimed: this shipper may not write any more.
    Fenced,
    /// The program was told to stop.
    Stopped,
}

/// An error of the shipper crate.
///
/// The context names the file, offset or peer concerned and what to do about it; it does not
/// repeat the source, which [`StdError::source`] returns.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    context: String,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

/// The result type of the shipper crate.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An error with no underlying cause.
    pub fn new(kind: ErrorKind, context: impl Into<String>) -> Self {
        Self {
            kind,
            context: context.into(),
            source: None,
        }
    }

    /// An error of the operating system, with what was being done to which file.
    pub fn io(context: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self {
            kind: ErrorKind::Io,
            context: context.into(),
            source: Some(Box::new(source.into())),
        }
    }

    /// Attaches the cause.
    #[must_use]
    pub fn with_source(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// The kind of this error.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The context and all causes on one line, for a log or a terminal.
    pub fn chain(&self) -> String {
        let mut line = self.context.clone();
        let mut cause = StdError::source(self);
        while let Some(error) = cause {
            line.push_str(": ");
            line.push_str(&error.to_string());
            cause = error.source();
        }
        line
    }
}

impl Error {
    /// Whether trying the same again later can help: it may pass by itself, or somebody sees to it from
    /// outside, such as to the credentials of a store.
    pub fn is_recoverable(&self) -> bool {
        matches!(
            self.kind,
            ErrorKind::Io | ErrorKind::Unavailable | ErrorKind::Full | ErrorKind::Denied
        )
    }
}

impl From<tracker::error::Error> for Error {
    fn from(error: tracker::error::Error) -> Self {
        use tracker::error::ErrorKind as Tracker;
        let kind = match error.kind() {
            Tracker::Io => ErrorKind::Io,
            Tracker::Missing => ErrorKind::Missing,
            Tracker::Corrupt => ErrorKind::Corrupt,
            Tracker::Unsupported | Tracker::Protocol => ErrorKind::Unsupported,
            Tracker::InUse => ErrorKind::InUse,
            Tracker::Invalid => ErrorKind::Invalid,
            Tracker::Mismatch => ErrorKind::Mismatch,
            Tracker::State => ErrorKind::State,
        };
        Self::new(kind, error.chain())
    }
}

impl fmt::Display for Error {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.context)
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source
            .as_deref()
            .map(|source| source as &(dyn StdError + 'static))
    }
}
