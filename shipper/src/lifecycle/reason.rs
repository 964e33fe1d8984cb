//! Why every block of a disk is looked at, and when too much waits. Pure.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Why every block of a disk is looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Reason {
    /// Begun by a program that did not keep the reason; those began none without need.
    #[default]
    Unknown,
    /// No recovery point has the disk.
    FirstCopy,
    /// The journal is not the one that the newest recovery point goes by.
    OtherJournal,
    /// The disk is smaller than in the newest recovery point.
    Smaller,
    /// The tracker has dropped the changes of a recovery point that is not there.
    PointLost,
    /// The journal is older than the newest recovery point.
    WentBack,
    /// The tracker calls every block changed.
    EveryBlock,
    /// A capture was larger than what may wait for upload.
    Overrun,
    /// The vault has lost segments of the disk.
    Lost,
    /// More waits to be shipped than the configured share of the disk.
    Share {
        /// What waited.
        waiting_bytes: u64,
        /// The share that it may be.
        share_percent: u8,
    },
    /// The operator asked for it.
    Operator,
}

impl Reason {
    /// Whether the next recovery point would lack something without it, or could not be made.
    pub fn is_necessary(self) -> bool {
        !matches!(self, Self::Share { .. } | Self::Operator)
    }

    /// The name that it has in a status.
    pub fn name(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::FirstCopy => "first-copy",
            Self::OtherJournal => "other-journal",
            Self::Smaller => "smaller",
            Self::PointLost => "point-lost",
            Self::WentBack => "went-back",
            Self::EveryBlock => "every-block",
            Self::Overrun => "overrun",
            Self::Lost => "lost",
            Self::Share { .. } => "share",
            Self::Operator => "operator",
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words = match self {
            Self::Unknown => "a program of an older version began it",
            Self::FirstCopy => "no recovery point has this disk yet",
            Self::OtherJournal => {
                "the tracker keeps another journal than the newest recovery point goes by"
            }
            Self::Smaller => "the disk is smaller than in the newest recovery point",
            Self::PointLost => {
                "the tracker has dropped the changes of a recovery point that is not there"
            }
            Self::WentBack => "the journal is older than the newest recovery point",
            Self::EveryBlock => "the tracker calls every block changed",
            Self::Overrun => "more has changed than may wait for upload",
            Self::Lost => "the vault has lost a part of it",
            Self::Share {
                waiting_bytes,
                share_percent,
            } => {
                return write!(
                    f,
                    "{:.1} MiB wait to be shipped, more than {share_percent}% of the disk",
                    *waiting_bytes as f64 / f64::from(1 << 20)
                );
            }
            Self::Operator => "it was asked for",
        };
        f.write_str(words)
    }
}

/// Whether so many bytes are more than a share of a disk.
pub fn exceeds_share(waiting_bytes: u64, disk_bytes: u64, share_percent: u8) -> bool {
    u128::from(waiting_bytes) * 100 > u128::from(disk_bytes) * u128::from(share_percent)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHARE: Reason = Reason::Share {
        waiting_bytes: 3 << 19,
        share_percent: 50,
    };

    #[test]
    fn what_was_asked_for_alone_is_not_necessary() {
        for reason in [SHARE, Reason::Operator] {
            assert!(!reason.is_necessary(), "{reason:?}");
        }
        for reason in [
            Reason::Unknown,
            Reason::FirstCopy,
            Reason::OtherJournal,
            Reason::Smaller,
            Reason::PointLost,
            Reason::WentBack,
            Reason::EveryBlock,
            Reason::Overrun,
            Reason::Lost,
        ] {
            assert!(reason.is_necessary(), "{reason:?}");
        }
    }

    #[test]
    fn a_reason_survives_being_kept_under_its_name() {
        for reason in [SHARE, Reason::Operator, Reason::EveryBlock] {
            let kept = serde_json::to_value(reason).unwrap();
            assert_eq!(kept["kind"], reason.name());
            assert_eq!(serde_json::from_value::<Reason>(kept).unwrap(), reason);
        }
        let words = "1.5 MiB wait to be shipped, more than 50% of the disk";
        assert_eq!(SHARE.to_string(), words);
    }

    #[test]
    fn a_share_is_exceeded_by_one_byte_and_not_by_less() {
        assert!(!exceeds_share(50, 100, 50));
        assert!(exceeds_share(51, 100, 50));
        assert!(!exceeds_share(100, 100, 100));
        assert!(exceeds_share(101, 100, 100));
        assert!(exceeds_share(2, 101, 1));
        assert!(!exceeds_share(0, 0, 1));
        assert!(!exceeds_share(u64::MAX, u64::MAX, 100));
        assert!(exceeds_share(u64::MAX, u64::MAX - 1, 100));
    }
}
