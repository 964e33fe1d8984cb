//! Quiescing: what writes to the disks is brought to rest for the moment of a cut, so that the recovery
//! point is consistent for applications and not only like a disk after a power cut.
//!
//! Overview: hooks freeze something ([`protocol::Hook`]): a mounted file system (`fsfreeze`), a guest by
//! its qemu guest agent (`agent`), anything by a pair of commands (`command`). None of it happens in
//! the shipper. A guard process of its own (`guard`) carries out all hooks, and thaws when it is told,
//! when its time limit is over, or when its standard input ends, which is what the death of the shipper
//! is. The shipper watches the guard (`watch`), and thaws in its place if that one dies.
//!
//! Order: the note in the state folder; the guard; the hooks freeze one after the other; the cut; the
//! hooks thaw in reverse; the note goes. If one fails to freeze, those before it are thawed. A hook that
//! was cut off by the time limit may have frozen, and is thawed too.
//!
//! Crash consistency: the note says what may be frozen. If shipper and guard are both killed, the next
//! shipper finds it and thaws at its start. It is not synced, because nothing that it could tell of
//! outlives the machine. Thawing what is not frozen is harmless.
//!
//! The time limit holds for freezing and the time frozen together. Past it everything is thawed, whether
//! the cut has returned or not. Each thaw may take as long once more.
//!
//! What it does not handle: a file system that holds what the shipper or tracker needs through further
//! layers, such as an image on it that carries the state folder's file system (`ground` looks at one
//! layer). Then the cut hangs until the guard's time limit, and the point is only crash-consistent.

pub mod config;

pub mod protocol;

mod ground;

mod lines;

mod wire;

mod agent;

mod command;

mod fsfreeze;

pub mod guard;

mod watch;

use std::path::{Path, PathBuf};

use crate::error::{Error, ErrorKind, Result};
use crate::spool::files::{read_if_present, replace};

pub use command::become_command;

use config::QuiesceConfig;
use protocol::{Action, Hook, Order};
use watch::Watch;

/// How a freeze and its thaw went.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Why what was cut is not consistent for applications; `None`: all was frozen in time, and still
    /// when it was thawed.
    pub reason: Option<String>,
    /// What may still be frozen, and why.
    pub not_thawed: Option<String>,
}

/// Freezes and thaws as the configuration says.
#[derive(Debug)]
pub struct Quiesce {
    config: QuiesceConfig,
    /// Says what may be frozen, while anything may be.
    note: PathBuf,
}

impl Quiesce {
    /// For the shipper that works in this state folder.
    pub fn new(config: QuiesceConfig, state: &Path) -> Self {
        let note = note_file(state);
        Self { config, note }
    }

    /// Refuses file systems to be frozen that hold one of these, each with what it is.
    ///
    /// # Errors
    ///
    /// `Invalid`: names the file system and what is on it.
    pub fn check_ground(&self, needed: &[(&str, &Path)]) -> Result<()> {
        ground::check(&self.config.hooks, needed)
    }

    /// Brings everything to rest. `needed` is what must not be on a frozen file system.
    ///
    /// # Errors
    ///
    /// Why it could not; what had been frozen is thawed, or the outcome says that it is not.
    pub fn freeze(&self, needed: &[(&str, &Path)]) -> std::result::Result<Frozen, Outcome> {
        let refused = |error: Error| Outcome {
            reason: Some(error.chain()),
            not_thawed: None,
        };
        self.check_ground(needed).map_err(refused)?;
        let left = thaw_left(&self.note).map_err(refused)?;
        if let Some(not_thawed) = left {
            return Err(Outcome {
                reason: Some(format!(
                    "What an earlier attempt froze is not thawed: {not_thawed}"
                )),
                not_thawed: Some(not_thawed),
            });
        }
        let order = Order {
            action: Action::Freeze,
            hooks: self.config.hooks.clone(),
            time_limit_ms: self.config.time_limit.as_millis() as u64,
            note: self.note.clone(),
        };
        let text = serde_json::to_vec(&order.hooks).map_err(|error| {
            refused(Error::new(ErrorKind::Invalid, "Cannot write the hooks").with_source(error))
        })?;
        replace(&self.note, &text).map_err(refused)?;
        Ok(Frozen(Some(Watch::freeze(order)?)))
    }
}

/// What is frozen. Dropping it thaws.
#[derive(Debug)]
pub struct Frozen(Option<Watch>);

impl Frozen {
    /// Thaws, and says whether all was frozen up to now.
    pub fn thaw(mut self) -> Outcome {
        self.0.take().map(Watch::thaw).unwrap_or_default()
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        if let Some(watch) = self.0.take() {
            let outcome = watch.thaw();
            if let Some(not_thawed) = outcome.not_thawed {
                tracing::error!("{not_thawed}");
            }
        }
    }
}

fn note_file(state: &Path) -> PathBuf {
    state.join("frozen.json")
}

/// Thaws what a killed shipper and guard may have left frozen. Returns what may still be.
///
/// # Errors
///
/// The note about it cannot be read.
pub fn recover(state: &Path) -> Result<Option<String>> {
    thaw_left(&note_file(state))
}

fn thaw_left(note: &Path) -> Result<Option<String>> {
    let Some(text) = read_if_present(note)? else {
        return Ok(None);
    };
    let hooks: Vec<Hook> = serde_json::from_slice(&text).map_err(|error| {
        let what = format!(
            "{} is damaged: thaw by hand what may be frozen, then remove it",
            note.display()
        );
        Error::new(ErrorKind::Corrupt, what).with_source(error)
    })?;
    tracing::warn!(
        "Thawing what may have been left frozen, by {}",
        note.display()
    );
    Ok(watch::rescue(&hooks, config::TIME_LIMIT_DEFAULT, note))
}
