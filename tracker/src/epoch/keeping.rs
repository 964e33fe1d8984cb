//! The threads that let the writes of a machine go on: three for each disk, one that arms regions, one that syncs
//! the ring (see `journal::intent`), and one that copies blocks of a closed epoch (see `copier`).

use std::sync::Arc;
use std::thread::JoinHandle;

use super::Machine;
use crate::error::{Error, ErrorKind, Result};
use crate::journal::Journal;
use crate::preserve::area::BlockSource;

/// The threads, until they are told to end.
pub struct Keepers {
    machine: Arc<Machine>,
    threads: Vec<JoinHandle<Result<()>>>,
}

impl Keepers {
    /// Starts them. Blocks are copied from `sources`, one for each disk.
    ///
    /// # Errors
    ///
    /// A thread cannot be had.
    pub fn start(machine: &Arc<Machine>, sources: &[Arc<dyn BlockSource>]) -> Result<Self> {
        let mut keepers = Self {
            machine: Arc::clone(machine),
            threads: Vec::new(),
        };
        for (index, source) in (0..machine.disks.len()).zip(sources) {
            if let Err(error) = keepers.start_for(index, source) {
                // This error tells more.
                let _ended = keepers.end();
                return Err(error);
            }
        }
        Ok(keepers)
    }

    fn start_for(&mut self, index: usize, source: &Arc<dyn BlockSource>) -> Result<()> {
        let on_journal = |work: fn(&Journal)| {
            move |machine: &Machine| {
                work(&machine.disks[index].journal);
                Ok(())
            }
        };
        self.spawn(format!("intent-{index}"), on_journal(Journal::arm_regions))?;
        self.spawn(
            format!("sync-{index}"),
            on_journal(Journal::sync_in_background),
        )?;
        let source = Arc::clone(source);
        self.spawn(format!("copy-{index}"), move |machine| {
            machine.disks[index].copier.run(machine, index, &*source)
        })
    }

    fn spawn(
        &mut self,
        name: String,
        work: impl FnOnce(&Machine) -> Result<()> + Send + 'static,
    ) -> Result<()> {
        let machine = Arc::clone(&self.machine);
        let failed = |error| Error::io(format!("Cannot start the thread {name}"), error);
        let thread = std::thread::Builder::new()
            .name(name.clone())
            .spawn(move || work(&machine))
            .map_err(failed)?;
        self.threads.push(thread);
        Ok(())
    }

    /// Ends them. No write may wait any more.
    ///
    /// # Errors
    ///
    /// A thread panicked.
    pub fn end(&mut self) -> Result<()> {
        for disk in &self.machine.disks {
            disk.journal.end_guard();
            disk.copier.end();
        }
        let mut result = Ok(());
        for thread in self.threads.drain(..) {
            let panicked = |_| Err(Error::new(ErrorKind::State, "A thread of a disk panicked"));
            result = result.and(thread.join().unwrap_or_else(panicked));
        }
        result
    }
}
