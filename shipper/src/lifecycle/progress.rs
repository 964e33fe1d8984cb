//! Scans of disks: marked, under way, cancelled, and what each step makes of them. Pure.
//!
//! | stage | blocks | segments |
//! |---|---|---|
//! | marked | the scan is to begin, and the journal tells what has changed | those of a pass before |
//! | running | before the cursor they were compared; what changed since the scan's epoch is in the journal | made so far |
//! | cancelled | the journal tells what has changed since the recovery point before | made until then |
//!
//! Segments are never thrown away, cancelled or not: the fingerprint table has taken them over, and
//! blocks that are as they have them are left out of what is captured later. The next recovery
//! point names them, before its own.

use serde::{Deserialize, Serialize};
use tracker::extent::Epoch;

use super::reason::Reason;
use crate::segment::reference::SegmentRef;

/// How far scans of the disks are: first copies, and comparisons with all fingerprints.
///
/// Their segments lie between the last recovery point and the next one, which will name them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "KeptState")]
pub struct ScanState {
    /// The disks that are concerned.
    pub disks: Vec<DiskScan>,
}

/// What a file may hold: in the first version all disks had the epoch of the whole.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct KeptState {
    epoch: Option<Epoch>,
    disks: Vec<DiskScan>,
}

impl From<KeptState> for ScanState {
    fn from(kept: KeptState) -> Self {
        let mut disks = kept.disks;
        if let Some(epoch) = kept.epoch {
            disks.iter_mut().for_each(|disk| disk.epoch = epoch);
        }
        Self { disks }
    }
}

/// How far the scan of a disk is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stage {
    /// It is to begin.
    Marked,
    /// It has begun, or is complete and waits for the recovery point that follows.
    #[default]
    Running,
    /// It was ended before its end. The disk is not marked again by its share before less than the
    /// share has waited.
    Cancelled,
}

/// The scan of one disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskScan {
    /// Name of the disk.
    pub name: String,
    /// Why.
    #[serde(default)]
    pub reason: Reason,
    /// How far.
    #[serde(default)]
    pub stage: Stage,
    /// An epoch of its own, above all before it; every change since its end is tracked. If the
    /// journal calls every block changed as of a later epoch, the scan begins anew. A recovery point
    /// of a later epoch has taken the scan over.
    #[serde(default)]
    pub epoch: Epoch,
    /// The journal that tells of changes during the scan.
    pub journal: String,
    /// Blocks before this one are done.
    pub cursor: u64,
    /// Blocks of the disk when the scan began.
    pub blocks: u64,
    /// The segments made, oldest first.
    pub segments: Vec<SegmentRef>,
}

impl DiskScan {
    fn new(name: &str, stage: Stage, reason: Reason, epoch: Epoch) -> Self {
        Self {
            name: name.to_owned(),
            reason,
            stage,
            epoch,
            journal: String::new(),
            cursor: 0,
            blocks: 0,
            segments: Vec::new(),
        }
    }

    /// Whether it has begun and has blocks left to look at.
    pub fn is_running(&self) -> bool {
        self.stage == Stage::Running && self.cursor < self.blocks
    }

    /// Whether every block was looked at.
    pub fn is_complete(&self) -> bool {
        self.stage == Stage::Running && self.cursor >= self.blocks
    }

    /// What it made is lost, and what the fingerprint table had of it is to be forgotten: everything
    /// after `trusted`.
    pub fn lose_segments(&mut self, trusted: Epoch) {
        if self.stage == Stage::Running {
            self.stage = Stage::Marked;
        }
        self.epoch = trusted;
        self.cursor = 0;
        self.segments.clear();
    }
}

/// What became of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// The disk is marked now.
    Marked,
    /// It was marked already.
    MarkedAlready,
    /// Its blocks are being compared already, or were a moment ago.
    UnderWay,
    /// The scan has been ended.
    Cancelled,
    /// There was none.
    Nothing,
    /// Every block has been compared already.
    Complete,
    /// The scan is necessary and goes on.
    Refused,
}

impl ScanState {
    /// The scan of a disk.
    pub fn disk(&self, name: &str) -> Option<&DiskScan> {
        self.disks.iter().find(|disk| disk.name == name)
    }

    fn disk_mut(&mut self, name: &str) -> Option<&mut DiskScan> {
        self.disks.iter_mut().find(|disk| disk.name == name)
    }

    /// Whether there are blocks to look at.
    pub fn is_running(&self) -> bool {
        self.disks.iter().any(DiskScan::is_running)
    }

    /// Whether a scan waits for the recovery point that follows it.
    pub fn is_complete(&self) -> bool {
        !self.is_running() && self.disks.iter().any(DiskScan::is_complete)
    }

    /// Whether a disk is marked whose scan is, or is not, necessary.
    pub fn has_marked(&self, necessary: bool) -> bool {
        self.disks
            .iter()
            .any(|disk| disk.stage == Stage::Marked && disk.reason.is_necessary() == necessary)
    }

    /// The highest epoch of a scan.
    pub fn highest(&self) -> Option<Epoch> {
        self.disks.iter().map(|disk| disk.epoch).max()
    }

    /// Marks a disk, unless its scan is marked or under way already. Returns why it is scanned.
    /// What is necessary is marked whatever is under way, and begins anew.
    pub fn mark(&mut self, name: &str, reason: Reason) -> (Outcome, Reason) {
        let Some(disk) = self.disk_mut(name) else {
            self.disks
                .push(DiskScan::new(name, Stage::Marked, reason, Epoch::ZERO));
            return (Outcome::Marked, reason);
        };
        match disk.stage {
            _ if reason.is_necessary() => {}
            Stage::Marked => return (Outcome::MarkedAlready, disk.reason),
            Stage::Running => return (Outcome::UnderWay, disk.reason),
            Stage::Cancelled => {}
        }
        disk.stage = Stage::Marked;
        disk.reason = reason;
        (Outcome::Marked, reason)
    }

    /// Ends the scan of a disk, unless it is necessary. `necessary` is what is known of that beside
    /// the reason that was kept.
    pub fn cancel(&mut self, name: &str, necessary: Option<Reason>) -> (Outcome, Option<Reason>) {
        let Some(disk) = self.disk_mut(name) else {
            return match necessary {
                Some(reason) => (Outcome::Refused, Some(reason)),
                None => (Outcome::Nothing, None),
            };
        };
        let kept = Some(disk.reason).filter(|reason| reason.is_necessary());
        match (disk.stage, necessary.or(kept)) {
            _ if disk.is_complete() => (Outcome::Complete, Some(disk.reason)),
            (_, Some(reason)) => (Outcome::Refused, Some(reason)),
            (Stage::Cancelled, None) => (Outcome::Nothing, None),
            (Stage::Marked | Stage::Running, None) => {
                disk.stage = Stage::Cancelled;
                (Outcome::Cancelled, Some(disk.reason))
            }
        }
    }

    /// Begins the scan of a disk. What an earlier pass made stays: it is as good as any older
    /// content, and blocks that differ from it are copied again.
    pub fn begin(&mut self, begun: DiskScan) {
        match self.disk_mut(&begun.name) {
            Some(disk) => {
                let segments = std::mem::take(&mut disk.segments);
                *disk = DiskScan { segments, ..begun };
            }
            None => self.disks.push(begun),
        }
    }

    /// So little waits of a disk that it may be marked by its share again, if that was cancelled.
    pub fn forgive(&mut self, name: &str) {
        // Segments that no recovery point names yet must not be lost sight of.
        self.disks.retain(|disk| {
            disk.name != name || disk.stage != Stage::Cancelled || !disk.segments.is_empty()
        });
    }

    /// A recovery point of this epoch names what was made before it. What is marked stays marked,
    /// and what was cancelled stays so.
    pub fn take_over(&mut self, point: Epoch) {
        self.disks.retain_mut(|disk| {
            if disk.epoch >= point {
                return true;
            }
            disk.segments.clear();
            disk.stage != Stage::Running
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::segment::format::SegmentName;
    use crate::segment::reference::CheckField;

    const SHARE: Reason = Reason::Share {
        waiting_bytes: 1,
        share_percent: 50,
    };

    fn running(name: &str, reason: Reason, epoch: u64, cursor: u64) -> DiskScan {
        DiskScan {
            cursor,
            blocks: 100,
            ..DiskScan::new(name, Stage::Running, reason, Epoch(epoch))
        }
    }

    fn segment() -> SegmentRef {
        let name = SegmentName {
            generation: 1,
            first_epoch: Epoch(4),
            last_epoch: Epoch(4),
            number: 0,
        };
        SegmentRef {
            name: name.into(),
            bytes: 1,
            directory_bytes: 1,
            check: CheckField([0; 16]),
            data_blocks: 1,
            zero_blocks: 0,
        }
    }

    fn state_of(disk: DiskScan) -> ScanState {
        ScanState { disks: vec![disk] }
    }

    #[test]
    fn marks_and_cancels_may_be_repeated() {
        let mut scan = ScanState::default();
        let mark = |scan: &mut ScanState, reason| scan.mark("a", reason);
        assert_eq!(mark(&mut scan, SHARE), (Outcome::Marked, SHARE));
        let again = mark(&mut scan, Reason::Operator);
        assert_eq!(again, (Outcome::MarkedAlready, SHARE));
        let cancel = |scan: &mut ScanState| scan.cancel("a", None);
        assert_eq!(cancel(&mut scan), (Outcome::Cancelled, Some(SHARE)));
        let cancelled = scan.clone();
        assert_eq!(cancel(&mut scan), (Outcome::Nothing, None));
        assert_eq!(scan, cancelled);
        assert_eq!(scan.cancel("b", None), (Outcome::Nothing, None));
        let asked = mark(&mut scan, Reason::Operator);
        assert_eq!(asked, (Outcome::Marked, Reason::Operator));
        assert!(scan.has_marked(false) && !scan.has_marked(true));
    }

    #[test]
    fn what_is_necessary_is_not_cancelled() {
        let alarm = Some(Reason::EveryBlock);
        for (reason, necessary, expected) in [
            (Reason::FirstCopy, None, Outcome::Refused),
            (Reason::Operator, alarm, Outcome::Refused),
            (Reason::Operator, None, Outcome::Cancelled),
        ] {
            for stage in [Stage::Marked, Stage::Running] {
                let mut disk = running("a", reason, 7, 3);
                disk.stage = stage;
                let mut scan = state_of(disk.clone());
                assert_eq!(scan.cancel("a", necessary).0, expected);
                let kept = scan.disks[0].stage == stage;
                assert_eq!(kept, expected == Outcome::Refused, "{stage:?}");
            }
        }
        let mut none = ScanState::default();
        let refused = none.cancel("a", alarm);
        assert_eq!(refused, (Outcome::Refused, alarm));
    }

    #[test]
    fn a_scan_under_way_is_marked_by_necessity_alone() {
        let mut scan = state_of(running("a", Reason::Operator, 7, 3));
        let found = scan.mark("a", SHARE);
        assert_eq!(found, (Outcome::UnderWay, Reason::Operator));
        assert!(scan.is_running());
        let found = scan.mark("a", Reason::Overrun);
        assert_eq!(found, (Outcome::Marked, Reason::Overrun));
        assert!(scan.has_marked(true) && !scan.is_running());
    }

    #[test]
    fn the_end_of_one_disk_is_not_the_end_of_all() {
        let mut scan = ScanState {
            disks: vec![
                running("a", Reason::Operator, 7, 100),
                running("b", Reason::Operator, 7, 99),
            ],
        };
        assert!(scan.is_running() && !scan.is_complete());
        let complete = scan.cancel("a", None);
        assert_eq!(complete, (Outcome::Complete, Some(Reason::Operator)));
        assert_eq!(scan.cancel("b", None).0, Outcome::Cancelled);
        assert!(scan.is_complete(), "the point that follows is still wanted");
    }

    #[test]
    fn a_recovery_point_ends_what_came_before_it() {
        let mut scan = ScanState::default();
        for (name, epoch, stage) in [
            ("old", 4, Stage::Running),
            ("cancelled", 4, Stage::Cancelled),
            ("marked", 0, Stage::Marked),
            ("new", 6, Stage::Running),
            ("ended", 6, Stage::Cancelled),
        ] {
            let mut disk = running(name, Reason::Operator, epoch, 3);
            disk.stage = stage;
            disk.segments = vec![segment()];
            scan.begin(disk);
        }
        scan.take_over(Epoch(5));
        let left: Vec<(&str, usize)> = scan
            .disks
            .iter()
            .map(|disk| (disk.name.as_str(), disk.segments.len()))
            .collect();
        let expected = [("cancelled", 0), ("marked", 0), ("new", 1), ("ended", 1)];
        assert_eq!(left, expected);
        for name in ["cancelled", "marked", "new", "ended"] {
            scan.forgive(name);
        }
        let left: Vec<&str> = scan.disks.iter().map(|disk| disk.name.as_str()).collect();
        assert_eq!(left, ["marked", "new", "ended"]);
    }

    #[test]
    fn what_an_earlier_pass_made_stays() {
        let mut first = running("a", Reason::Operator, 4, 3);
        first.segments = vec![segment()];
        let mut scan = state_of(first);
        scan.cancel("a", None);
        scan.mark("a", Reason::Operator);
        scan.begin(running("a", Reason::Operator, 6, 0));
        let disk = scan.disk("a").unwrap();
        assert_eq!((disk.epoch, disk.segments.len()), (Epoch(6), 1));
    }

    #[test]
    fn a_file_of_the_first_version_is_read() {
        let text = "{\"epoch\": 9, \"disks\": [{\"name\": \"a\", \"journal\": \"j\", \"cursor\": 3, \
                    \"blocks\": 8, \"segments\": []}]}";
        let scan: ScanState = serde_json::from_str(text).unwrap();
        let disk = scan.disk("a").unwrap();
        assert_eq!((disk.epoch, disk.reason), (Epoch(9), Reason::Unknown));
        assert!(disk.is_running());
        let kept = serde_json::to_string(&scan).unwrap();
        assert_eq!(serde_json::from_str::<ScanState>(&kept).unwrap(), scan);
    }
}
