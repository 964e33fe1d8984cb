//! Files that are whole or not there: written beside, synced, renamed, the folder synced.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use crate::error::{Error, ErrorKind, Result};

/// The error for a file of the state folder, with its kind made clear where the disk is full.
pub fn failed(what: &str, path: &Path, error: std::io::Error) -> Error {
    let kind = match error.raw_os_error() {
        Some(libc::ENOSPC | libc::EDQUOT) => ErrorKind::Full,
        _ => ErrorKind::Io,
    };
    Error::new(kind, format!("Cannot {what} {}", path.display())).with_source(error)
}

/// Syncs a folder, so that names made or removed in it last.
pub fn sync_folder(folder: &Path) -> Result<()> {
    File::open(folder)
        .and_then(|folder| folder.sync_all())
        .map_err(|error| failed("sync folder", folder, error))
}

/// Replaces a file as a whole; durable when it returns.
pub fn replace(path: &Path, content: &[u8]) -> Result<()> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(".new");
    let written = File::create(&beside).and_then(|mut file| {
        file.write_all(content)?;
        file.sync_all()
    });
    written
        .and_then(|()| fs::rename(&beside, path))
        .map_err(|error| failed("write", path, error))?;
    path.parent().map_or(Ok(()), sync_folder)
}

/// Reads a file; `None` if there is none.
pub fn read_if_present(path: &Path) -> Result<Option<Vec<u8>>> {
    match fs::read(path) {
        Ok(content) => Ok(Some(content)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(failed("read", path, error)),
    }
}

/// Removes a file if it is there; durable when it returns.
pub fn remove_if_present(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Ok(()) => path.parent().map_or(Ok(()), sync_folder),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(failed("remove", path, error)),
    }
}

/// Makes a folder and those above it; durable when it returns.
pub fn make_folder(folder: &Path) -> Result<()> {
    if folder.is_dir() {
        return Ok(());
    }
    fs::create_dir_all(folder).map_err(|error| failed("make folder", folder, error))?;
    folder.parent().map_or(Ok(()), sync_folder)
}
