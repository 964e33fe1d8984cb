//! What the opening of a journal came to, for the log.

use std::fmt;
use std::path::PathBuf;

use super::verdict::Why;
use super::witness::Suspicion;

/// What was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// No journal, or one that was set aside under this name.
    New(Option<PathBuf>),
    /// A journal that was closed.
    Clean,
    /// The tracker died; the ring says what changed.
    Killed,
    /// The machine went down without a clean stop; the ring and the intent log say what may have
    /// changed.
    PowerCut,
    /// The same, and they do not tell.
    Lost(Why),
}

/// What recovery did, for the log.
#[derive(Clone, Debug)]
pub struct RecoveryReport {
    /// The journal.
    pub path: PathBuf,
    /// What was found.
    pub found: Found,
    /// Live records.
    pub records: u64,
    /// Slots that were claimed and never written.
    pub holes: u64,
    /// Regions of 1 MiB that count as changed because they were armed when the machine went down.
    pub suspect_regions: u64,
    /// Size of the disk that the journal was for, where the disk has grown since.
    pub grown_from_bytes: Option<u64>,
    /// Somebody else has written to the disk, or may have.
    pub suspicion: Option<Suspicion>,
}

impl fmt::Display for RecoveryReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.path.display();
        match &self.found {
            Found::New(None) => write!(f, "Journal {path}: new, every block counts as changed"),
            Found::New(Some(old)) => write!(
                f,
                "Journal {path}: new, every block counts as changed; the old one is {}",
                old.display()
            ),
            Found::Clean => write!(
                f,
                "Journal {path}: closed cleanly, {} records",
                self.records
            ),
            Found::Killed => write!(
                f,
                "Journal {path}: the tracker was killed; {} records and {} unused slots recovered",
                self.records, self.holes
            ),
            Found::PowerCut => write!(
                f,
                "Journal {path}: the machine went down without a clean stop; {} records recovered, \
                 {} regions of 1 MiB are to be compared",
                self.records, self.suspect_regions
            ),
            Found::Lost(why) => write!(
                f,
                "Journal {path}: it was not closed, and {why}: every block counts as changed"
            ),
        }?;
        if let Some(bytes) = self.grown_from_bytes {
            write!(
                f,
                "; the disk has grown from {bytes} bytes, what is new counts as changed"
            )?;
        }
        match self.suspicion {
            Some(suspicion) => write!(f, "; {suspicion}: every block counts as changed"),
            None => Ok(()),
        }
    }
}
