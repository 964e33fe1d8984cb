//! The tracker's one error type: a kind for programs, a context for people, and a source.

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
    /// The peer broke the protocol.
    Protocol,
    /// The request is valid but not in this state.
    State,
}

/// An error of the tracker crate.
///
/// The context names the file, offset or peer concerned and what to do about it; it does not
/// repeat the source, which [`StdError::source`] returns.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    context: String,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

/// The result type of the tracker crate.
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
