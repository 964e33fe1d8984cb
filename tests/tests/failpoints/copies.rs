//! Blocks of a closed epoch that are copied before they are overwritten.

use tracker::control::client::ControlClient;
use tracker::control::protocol::CaptureOutcome;
use tracker::extent::Epoch;

use super::*;

/// Places on the way of a copy.
pub const OF_COPIES: &[(&str, Way)] = &[
    ("CopyAfterReadBeforeWrite", Way::Overwrite),
    ("CopyAfterWriteBeforeMark", Way::Overwrite),
];

impl Rig {
    fn control(&self) -> ControlClient {
        ControlClient::connect(&self.site.control()).unwrap()
    }

    /// Ends the capture of whatever epoch is closed.
    fn give_up(&self) {
        let mut control = self.control();
        if let Some(closed) = control.epochs().unwrap().closed {
            control
                .capture_end(closed, CaptureOutcome::Abandoned)
                .unwrap();
        }
    }

    /// Closes an epoch whose blocks are so many new ones, and which nobody captures.
    pub fn close_over_new_blocks(&mut self, count: u64) -> (Epoch, Vec<u64>) {
        self.give_up();
        // What was given up would belong to it.
        self.cut();
        let blocks = self.next_blocks(count);
        self.write(&blocks);
        (self.control().cut(Epoch::ZERO).unwrap(), blocks)
    }
}

/// The worker copies what is in the page cache: while it is held the other one goes on, and the write is not on the disk.
#[test]
fn copies_are_held_and_killed() {
    let mut rig = Rig::new();
    for &(place, way) in OF_COPIES {
        visit(&mut rig, place, way, Others::Worker, "");
    }
    come_back(rig);
}

/// The guest goes on, and the epoch is given up.
#[test]
fn a_block_that_cannot_be_copied_is_written_all_the_same() {
    let mut rig = Rig::new();
    for (error, says) in [("EIO", "could not be preserved"), ("ENOSPC", "is full")] {
        fail(&mut rig, &format!("CopyAfterReadBeforeWrite=error:{error}"));
        let (closed, blocks) = rig.close_over_new_blocks(3);
        let plan = rig.plan(blocks);
        let mut client = rig.site.connect("disk");
        for one in plan {
            send(&mut client, one).unwrap();
            rig.acknowledge(one);
        }
        let failure = rig.status()["preserve_failure"].clone();
        let failure = failure.as_str().expect("a failure");
        assert!(failure.contains(says), "{failure}");
        assert_eq!(rig.control().epochs().unwrap().closed, Some(closed));
        rig.give_up();
        mend(&mut rig);
    }
    restart_cleanly(rig);
}

/// A cut that cannot tell what belongs to its epoch is none; what it would have held belongs to the next.
#[test]
fn a_cut_whose_maps_cannot_be_written_is_made_up_for() {
    let mut rig = Rig::new();
    for error in ["EIO", "ENOSPC"] {
        fail(&mut rig, &format!("CutAfterSettleBeforeMaps=error:{error}"));
        let blocks = rig.next_blocks(3);
        rig.write(&blocks);
        let said = rig.control().cut(Epoch::ZERO).unwrap_err().to_string();
        assert!(said.contains("Cannot write preserve file"), "{said}");
        assert_eq!(rig.control().epochs().unwrap().closed, None);
        // Nobody waits for copies of an epoch that is none.
        rig.write(&blocks);
        rig.set_gate(false);
        let closed = rig.control().cut(Epoch::ZERO).unwrap();
        let dirty = rig.status()["closed_dirty_blocks"].as_u64();
        assert!(dirty >= Some(3), "{closed}: {dirty:?}");
        rig.give_up();
        rig.set_gate(true);
        mend(&mut rig);
    }
    restart_cleanly(rig);
}
