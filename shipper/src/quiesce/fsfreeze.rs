//! A mounted file system at rest, by `fsfreeze` of util-linux.
//!
//! The kernel writes back what is dirty and lets no write in until it thaws; whoever writes stands still
//! and cannot be killed. Thawing what is not frozen is an error (EINVAL) that does no harm. One that
//! somebody else has frozen is refused (EBUSY) and left as it is.
//!
//! A freeze over storage that hangs cannot be ended. It is waited for, for as long as it takes, and
//! thawed then.

use std::path::{Path, PathBuf};
use std::time::Instant;

use crossbeam_channel::Receiver;

use super::command::{Purpose, run};
use super::ground::check_mount_point;
use super::guard::{Failed, Hooked, Reports};

/// Folders of programs for administrators, where `PATH` may lack them.
const MORE_FOLDERS: [&str; 2] = ["/usr/sbin", "/sbin"];
/// What the program says where nothing is frozen.
const NOT_FROZEN: &str = "Invalid argument";

/// A file system by its mount point.
#[derive(Debug)]
pub struct Fsfreeze {
    mount: PathBuf,
    /// A freeze that was killed and is still in the kernel: tells when it is gone.
    stuck: Option<Receiver<()>>,
}

impl Fsfreeze {
    /// The file system that is mounted there.
    pub fn new(mount: PathBuf) -> Self {
        let stuck = None;
        Self { mount, stuck }
    }

    fn words(&self, how: &str) -> Vec<String> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let program = std::env::split_paths(&path)
            .chain(MORE_FOLDERS.iter().map(PathBuf::from))
            .map(|folder| folder.join("fsfreeze"))
            .find(|program| program.is_file());
        let program = program.unwrap_or_else(|| Path::new("fsfreeze").to_owned());
        // Its messages are read, hence the language.
        [
            "env",
            "LC_ALL=C",
            &program.to_string_lossy(),
            how,
            &self.mount.to_string_lossy(),
        ]
        .map(str::to_owned)
        .to_vec()
    }
}

impl Hooked for Fsfreeze {
    fn name(&self) -> String {
        format!("the file system at {}", self.mount.display())
    }

    fn freeze(&mut self, until: Instant, reports: &mut Reports) -> Result<(), Failed> {
        check_mount_point(&self.mount).map_err(|error| Failed::for_sure(error.chain()))?;
        run(Purpose::Freeze, &self.words("--freeze"), until, reports).map_err(|unfinished| {
            self.stuck = unfinished.stuck;
            unfinished.failed
        })
    }

    fn thaw(&mut self, until: Instant, reports: &mut Reports) -> Result<bool, String> {
        if check_mount_point(&self.mount).is_err() {
            return Ok(false);
        }
        if self.stuck.is_some() {
            return Err("it is still being frozen, and will be thawed after that".to_owned());
        }
        match run(Purpose::Thaw, &self.words("--unfreeze"), until, reports) {
            Ok(()) => Ok(true),
            Err(unfinished) if unfinished.failed.reason.ends_with(NOT_FROZEN) => Ok(false),
            Err(unfinished) => Err(unfinished.failed.reason),
        }
    }

    fn settle(&mut self) -> bool {
        let Some(stuck) = self.stuck.take() else {
            return false;
        };
        let _gone = stuck.recv();
        true
    }
}
