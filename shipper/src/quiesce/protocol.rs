//! What shipper and guard say to each other: one order, then reports, as lines of JSON.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Longest line in bytes.
pub const LINE_BYTES_MAX: usize = 1 << 20;
/// The line that has a guard thaw. The end of its input does the same.
pub const THAW: &str = "thaw";

/// Something that freezes and thaws.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Hook {
    /// A mounted file system.
    Fsfreeze {
        /// Its mount point.
        mount: PathBuf,
    },
    /// A guest with the qemu guest agent.
    GuestAgent {
        /// The agent's unix socket.
        socket: PathBuf,
    },
    /// A pair of commands, each a program and its arguments.
    Command {
        /// Freezes; must have done so when it ends.
        freeze: Vec<String>,
        /// Thaws; may be run where nothing is frozen, and more than once.
        thaw: Vec<String>,
    },
}

/// What a guard is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Action {
    /// Freeze, hold, thaw.
    Freeze,
    /// Thaw what may be frozen.
    Thaw,
}

/// The first line that a guard reads.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Order {
    /// What to do.
    pub action: Action,
    /// With what, in this order.
    pub hooks: Vec<Hook>,
    /// Milliseconds for freezing and the time frozen; each thaw may take as long.
    pub time_limit_ms: u64,
    /// File that goes when nothing is frozen any more.
    pub note: PathBuf,
}

/// A line that a guard writes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "report", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Report {
    /// A command will be run by this process, which leads a group of its own.
    Runs {
        /// Process number.
        process: u32,
    },
    /// That command has ended.
    Ran,
    /// Everything is frozen.
    Frozen,
    /// Nothing more will be done.
    Ended {
        /// Why the time in between was not a frozen one.
        reason: Option<String>,
        /// What may still be frozen, and why.
        not_thawed: Option<String>,
    },
}
