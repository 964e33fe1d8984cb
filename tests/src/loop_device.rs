//! Loop devices, for tests that need a block device. They need root.

use std::path::Path;
use std::process::Command;

use crate::process::run;

/// A loop device, which is let go of at the end.
pub struct LoopDevice {
    /// Its path, such as `/dev/loop0`.
    pub path: String,
}

impl LoopDevice {
    /// One over a file, with sectors of so many bytes.
    ///
    /// # Panics
    ///
    /// There is none to be had.
    pub fn over(file: &Path, sector_bytes: u32) -> Self {
        let device = run(losetup()
            .args(["--find", "--show", "--sector-size"])
            .arg(sector_bytes.to_string())
            .arg(file))
        .success();
        Self {
            path: device.trim().to_owned(),
        }
    }

    /// Has the device take over the size of its file.
    ///
    /// # Panics
    ///
    /// It does not.
    pub fn refresh(&self) {
        run(losetup().args(["--set-capacity", &self.path])).success();
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _not_there = losetup().args(["--detach", &self.path]).status();
    }
}

fn losetup() -> Command {
    Command::new("/sbin/losetup")
}
