//! The rules by which several who write, remove and read one machine's part of a vault never hurt each other.
//!
//! Each is a request or a comparison in `publish`, `boundary`, `pin` and `prune`, and stands there under its name. A
//! program follows them all. In tests of the protocol a thread can be made to forget one, to prove that
//! it is needed and that its lack would be found.

/// What must not be forgotten.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// Whoever publishes looks for a higher generation before the manifest is made.
    GenerationBeforeManifest,
    /// And after it.
    GenerationAfterManifest,
    /// And whether a boundary has made the manifest void meanwhile.
    BoundaryAfterManifest,
    /// A manifest that is there already is never taken for ours unless it is the same.
    OwnContent,
    /// A new generation publishes a boundary before its first recovery point.
    BoundaryAtTakeover,
    /// Nothing is removed before a boundary says so.
    BoundaryBeforeRemoval,
    /// Pins are looked at again when the boundary is durable.
    PinsAfterBoundary,
    /// Who pins looks at the boundary when the pin is durable.
    BoundaryAfterPin,
    /// Readers that opened a point before the boundary are given time.
    Grace,
    /// The newest recovery point stays.
    NewestStays,
    /// What other points name stays.
    NamedStays,
    /// What no point names and our own generation made may be on its way.
    OwnGenerationStays,
    /// Who removes looks once more whether it may, and by what.
    ValidatedRemoval,
    /// A boundary follows the one that was read before the points were listed, and no other.
    BoundaryFollows,
}

/// Whether a rule is followed: always.
#[cfg(not(test))]
pub const fn holds(_rule: Rule) -> bool {
    true
}

#[cfg(test)]
pub use forgetful::{forget, holds};

#[cfg(test)]
mod forgetful {
    use super::Rule;
    use std::cell::Cell;

    thread_local! {
        static FORGOTTEN: Cell<Option<Rule>> = const { Cell::new(None) };
    }

    /// Makes this thread forget a rule, or follow all again.
    pub fn forget(rule: Option<Rule>) {
        FORGOTTEN.set(rule);
    }

    /// Whether this thread follows a rule.
    pub fn holds(rule: Rule) -> bool {
        FORGOTTEN.get() != Some(rule)
    }
}
