//! `resize`: a disk grows while it is served.
//!
//! Order: the file is made longer and synced; the journal is made ready, in which what is new counts
//! as changed, durably; then clients see the size. New connections are told of it, and those that
//! exist may use it at once.
//!
//! Crash consistency: at the next start a disk that is longer than its journal says is taken for
//! grown, wherever in between the tracker was killed.
//!
//! What it does not handle: a client that wants to resize the disk. The disk is the host's.

use std::sync::Arc;

use super::protocol::Resized;
use crate::disk::{Disk, NewSize};
use crate::epoch::Machine;
use crate::error::{Error, ErrorKind, Result};
use crate::failpoint::{Place, reached};

/// Grows a disk, or finds that it has that size already. May be repeated; one at a time.
pub(super) fn resize(
    disks: &[Arc<Disk>],
    machine: &Machine,
    name: &str,
    wanted: NewSize,
) -> Result<Resized> {
    let mut numbered = disks.iter().enumerate();
    let (index, disk) = numbered
        .find(|(_, disk)| disk.name() == name)
        .ok_or_else(|| no_disk(disks, name))?;
    if !disk.read_only() && machine.journal_path(index).is_none() {
        let what = format!("Disk {name} is not tracked and does not grow: it has no journal");
        return Err(Error::new(ErrorKind::State, what));
    }
    let before_bytes = disk.size_bytes();
    machine.stir(index);
    let size_bytes = disk.prepare_size(wanted)?;
    if size_bytes > before_bytes {
        reached(Place::ResizeAfterFileBeforeJournal);
        machine.grow(index, size_bytes)?;
        reached(Place::ResizeAfterJournalBeforeSize);
        disk.show_size(size_bytes);
        tracing::info!("Disk {name} has grown from {before_bytes} to {size_bytes} bytes");
    }
    Ok(Resized {
        disk: name.to_owned(),
        before_bytes,
        size_bytes,
    })
}

fn no_disk(disks: &[Arc<Disk>], name: &str) -> Error {
    let served: Vec<&str> = disks.iter().map(|disk| disk.name()).collect();
    let what = format!("There is no disk {name:?}: {} is served", served.join(", "));
    Error::new(ErrorKind::Missing, what)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::epoch::{DiskSpec, Keep, MachineOptions, Operation};
    use crate::extent::{BLOCK_SIZE, Epoch, Extent};
    use crate::failpoint::watching;
    use crate::journal::reader::JournalReader;
    use std::cell::RefCell;
    use std::collections::BTreeSet;
    use std::path::Path;
    use std::rc::Rc;
    use std::time::Duration;

    const BEFORE: u64 = 1000 * BLOCK_SIZE + 512;
    const AFTER: u64 = 3000 * BLOCK_SIZE + 1024;

    fn open(folder: &Path) -> (Vec<Arc<Disk>>, Machine) {
        let image = folder.join("disk");
        let disk = Disk::open("disk", &image, false).unwrap();
        let spec = DiskSpec {
            name: "disk".to_owned(),
            image,
            journal: folder.join("disk.hrl"),
            size_bytes: disk.size_bytes(),
            // That of a copy would be another.
            identity: [1; 16],
            seen: None,
            preserve: None,
        };
        let options = MachineOptions {
            workers: 1,
            ring_bytes: 16 << 10,
            intent_regions: 64,
            rebuild: false,
            tracking: true,
            preserve_budget_bytes: 0,
            frozen_views: false,
        };
        let (machine, _) = Machine::open(vec![spec], &options).unwrap();
        (vec![Arc::new(disk)], machine)
    }

    fn new(folder: &Path) -> (Vec<Arc<Disk>>, Machine) {
        let file = std::fs::File::create(folder.join("disk")).unwrap();
        file.set_len(BEFORE).unwrap();
        let (disks, machine) = open(folder);
        let epoch = machine
            .cut(Epoch::ZERO, Keep::Changed, Duration::ZERO)
            .unwrap();
        machine.seal(epoch).unwrap();
        machine.commit(epoch).unwrap();
        (disks, machine)
    }

    fn changed(folder: &Path) -> Vec<Extent> {
        let reader = JournalReader::open(&folder.join("disk.hrl")).unwrap();
        let dirty = reader.dirty(Epoch(1), Epoch(u64::MAX)).unwrap();
        assert!(!dirty.all());
        dirty.extents().map(Result::unwrap).collect()
    }

    fn copy(from: &Path, to: &Path) {
        std::fs::create_dir(to).unwrap();
        for name in ["disk", "disk.hrl"] {
            std::fs::copy(from.join(name), to.join(name)).unwrap();
        }
    }

    #[test]
    fn a_kill_at_any_place_leaves_a_disk_that_has_grown_and_is_tracked() {
        let folder = tempfile::tempdir().unwrap();
        let served = folder.path().join("served");
        std::fs::create_dir(&served).unwrap();
        let (disks, machine) = new(&served);
        let moments = Rc::new(RefCell::new(Vec::new()));
        let (seen, root, disk) = (
            Rc::clone(&moments),
            folder.path().to_owned(),
            disks[0].clone(),
        );
        let from = served.clone();
        let keep = move |place| {
            let mut seen = seen.borrow_mut();
            let to = root.join(format!("moment-{}", seen.len()));
            copy(&from, &to);
            assert_eq!(
                disk.size_bytes(),
                BEFORE,
                "{place:?}: it is shown too early"
            );
            seen.push((place, to));
        };
        let resized = watching(keep, || {
            resize(&disks, &machine, "disk", NewSize::Bytes(AFTER)).unwrap()
        });
        assert_eq!((resized.before_bytes, resized.size_bytes), (BEFORE, AFTER));
        assert_eq!(disks[0].size_bytes(), AFTER);
        let new = Extent {
            first_block: 1000,
            block_count: 2001,
        };
        assert_eq!(changed(&served), [new]);
        let places: BTreeSet<Place> = moments.borrow().iter().map(|(place, _)| *place).collect();
        assert!(places.contains(&Place::ResizeAfterFileBeforeJournal));
        assert!(places.contains(&Place::GrowAfterRecordBeforePublish));
        assert!(places.contains(&Place::ResizeAfterJournalBeforeSize));
        for (place, folder) in moments.borrow().iter() {
            let (disks, machine) = open(folder);
            assert_eq!(disks[0].size_bytes(), AFTER, "{place:?}");
            assert_eq!(machine.status().disks[0].size_bytes, AFTER, "{place:?}");
            assert_eq!(changed(folder), [new], "{place:?}");
            // It goes on, at the new end as well.
            let last = Extent {
                first_block: 3000,
                block_count: 1,
            };
            let epoch = machine
                .cut(Epoch::ZERO, Keep::Changed, Duration::ZERO)
                .unwrap();
            let admitted = machine.admit(0, 0, last, Operation::Write);
            machine.complete(0, admitted);
            machine.seal(epoch).unwrap();
            machine.commit(epoch).unwrap();
            assert_eq!(changed(folder), [last], "{place:?}");
        }
    }

    #[test]
    fn a_growth_that_fails_half_way_is_made_up_for_by_the_next() {
        let folder = tempfile::tempdir().unwrap();
        let (disks, machine) = new(folder.path());
        machine.set_failing(0, true);
        let wanted = NewSize::More(AFTER - BEFORE);
        let error = resize(&disks, &machine, "disk", wanted).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Io);
        assert_eq!(disks[0].size_bytes(), BEFORE);
        machine.set_failing(0, false);
        let resized = resize(&disks, &machine, "disk", wanted).unwrap();
        assert_eq!(resized.size_bytes, AFTER);
        assert_eq!(disks[0].size_bytes(), AFTER);
    }
}
