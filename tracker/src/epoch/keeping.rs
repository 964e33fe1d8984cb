//! The threads that let the writes of a machine go on: two for each disk, one that arms regions and one
//! that syncs the ring. See `journal::intent`.

use std::sync::Arc;
use std::thread::JoinHandle;

use super::Machine;
use crate::error::{Error, ErrorKind, Result};
use crate::journal::Journal;

/// The threads, until they are told to end.
pub struct Keepers {
    machine: Arc<Machine>,
    threads: Vec<JoinHandle<()>>,
}

impl Keepers {
    /// Starts them.
    ///
    /// # Errors
    ///
    /// A thread cannot be had.
    pub fn start(machine: &Arc<Machine>) -> Result<Self> {
        let mut keepers = Self {
            machine: Arc::clone(machine),
            threads: Vec::new(),
        };
        for index in 0..machine.disks.len() {
            for (name, work) in [
                ("intent", Journal::arm_regions as fn(&Journal)),
                ("sync", Journal::sync_in_background),
            ] {
                match keepers.spawn(index, name, work) {
                    Ok(thread) => keepers.threads.push(thread),
                    Err(error) => {
                        // This error tells more.
                        let _ended = keepers.end();
                        return Err(error);
                    }
                }
            }
        }
        Ok(keepers)
    }

    fn spawn(&self, index: usize, name: &str, work: fn(&Journal)) -> Result<JoinHandle<()>> {
        let machine = Arc::clone(&self.machine);
        std::thread::Builder::new()
            .name(format!("{name}-{index}"))
            .spawn(move || {
                if let Some(disk) = machine.disks.get(index) {
                    work(&disk.journal);
                }
            })
            .map_err(|error| Error::io(format!("Cannot start the {name} thread"), error))
    }

    /// Ends them. No write may wait any more.
    ///
    /// # Errors
    ///
    /// A thread panicked.
    pub fn end(&mut self) -> Result<()> {
        for disk in &self.machine.disks {
            disk.journal.end_guard();
        }
        let mut result = Ok(());
        for thread in self.threads.drain(..) {
            let panicked = |_| Error::new(ErrorKind::State, "A thread of a journal panicked");
            result = result.and(thread.join().map_err(panicked));
        }
        result
    }
}
