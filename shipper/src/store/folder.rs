//! Stores in a folder: opening, and what the library leaves undone there.

use std::fs::File;
use std::io;
use std::path::Path;

use object_store::local::LocalFileSystem;

use super::Created;
use super::failure::of_folder;
use super::object::{ObjectStoreBacked, Place};
use crate::error::{Error, ErrorKind, Result};

/// Makes the folder for a new vault, unless it is there.
pub(super) fn make(folder: &Path) -> Result<()> {
    std::fs::create_dir_all(folder).map_err(|error| {
        let shown = folder.display();
        Error::io(format!("Cannot make the folder {shown} for a vault"), error)
    })
}

/// The store in a folder. Objects are synced, and linked without replacing.
pub(super) fn open(folder: &Path) -> Result<ObjectStoreBacked> {
    let place = folder.display();
    let metadata = std::fs::metadata(folder).map_err(|error| {
        let kind = match error.kind() {
            io::ErrorKind::NotFound => ErrorKind::Missing,
            _ => ErrorKind::Io,
        };
        Error::new(
            kind,
            format!("Cannot open the vault's folder {place}: mount what holds it, or make a vault with `shipper init`"),
        )
        .with_source(error)
    })?;
    if !metadata.is_dir() {
        return Err(Error::new(
            ErrorKind::Invalid,
            format!("The vault's address names {place}, which is not a folder"),
        ));
    }
    let store = LocalFileSystem::new_with_prefix(folder)
        .map_err(|error| of_folder(format!("Cannot open the vault's folder {place}"), error))?
        .with_fsync(true);
    ObjectStoreBacked::new(Box::new(store), Place::Folder(folder.to_owned()))
}

/// Gives a durable file a second name as an object. `None`: it cannot have one, for example because it is on another file
/// system, or because there is no folder for the object yet.
pub(super) fn adopt(folder: &Path, key: &str, file: &Path) -> Result<Option<Created>> {
    match std::fs::hard_link(file, folder.join(key)) {
        Ok(()) => {
            sync_parent(folder, key)?;
            Ok(Some(Created::New))
        }
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(Some(Created::Exists)),
        // What is wrong with the folder shows when the object is written.
        Err(_) => Ok(None),
    }
}

/// Makes the removal of an object durable: the library syncs what it writes, not what it removes.
pub(super) fn sync_removal(folder: &Path, key: &str) -> Result<()> {
    sync_parent(folder, key)
}

fn sync_parent(folder: &Path, key: &str) -> Result<()> {
    let path = folder.join(key);
    let Some(parent) = path.parent() else {
        return Ok(());
    };
    File::open(parent)
        .and_then(|parent| parent.sync_all())
        .map_err(|error| {
            let shown = parent.display();
            Error::io(format!("Cannot sync folder {shown} of the vault"), error)
        })
}
