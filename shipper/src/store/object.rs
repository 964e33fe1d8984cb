//! A store through `object_store`, driven from plain threads.
//!
//! Many threads may call at once: each blocks on its own request, and one runtime with a single
//! worker thread drives them all.

use std::error::Error as StdError;
use std::io;
use std::ops::Range;
use std::path::Path;

use bytes::Bytes;
use futures_util::TryStreamExt;
use object_store::local::LocalFileSystem;
use object_store::path::Path as Key;
use object_store::{ObjectStore, ObjectStoreExt, PutMode, PutOptions};
use tokio::runtime::Runtime;

use super::{Created, Listed, Store};
use crate::error::{Error, ErrorKind, Result};

/// A store of the `object_store` library.
#[derive(Debug)]
pub struct ObjectStoreBacked {
    runtime: Runtime,
    store: Box<dyn ObjectStore>,
    /// Where it is, for messages.
    place: String,
}

impl ObjectStoreBacked {
    /// The store in a folder. Objects are synced, and linked without replacing.
    pub(super) fn folder(folder: &Path) -> Result<Self> {
        let place = folder.display().to_string();
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
            .map_err(|error| wrap(format!("Cannot open the vault's folder {place}"), error))?
            .with_fsync(true);
        Ok(Self {
            runtime: runtime()?,
            store: Box::new(store),
            place,
        })
    }

    fn failed(&self, what: &str, key: &str, error: object_store::Error) -> Error {
        wrap(
            format!("Cannot {what} object {key} in {}", self.place),
            error,
        )
    }
}

fn runtime() -> Result<Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .thread_name("store")
        .enable_all()
        .build()
        .map_err(|error| Error::io("Cannot start the threads of the object store", error))
}

impl Store for ObjectStoreBacked {
    fn create(&self, key: &str, content: Bytes) -> Result<Created> {
        let options = PutOptions::from(PutMode::Create);
        let path = Key::from(key);
        let put = self.store.put_opts(&path, content.into(), options);
        match self.runtime.block_on(put) {
            Ok(_) => Ok(Created::New),
            Err(object_store::Error::AlreadyExists { .. }) => Ok(Created::Exists),
            Err(error) => Err(self.failed("write", key, error)),
        }
    }

    fn read(&self, key: &str, range: Option<Range<u64>>) -> Result<Bytes> {
        let path = Key::from(key);
        let read = async {
            match range.clone() {
                None => self.store.get(&path).await?.bytes().await,
                Some(range) => self.store.get_range(&path, range).await,
            }
        };
        let cut_short = |source| {
            let range = range.clone().unwrap_or_default();
            let what = format!(
                "Object {key} in {} ends before byte {}",
                self.place, range.end
            );
            let error = Error::new(ErrorKind::Corrupt, what);
            match source {
                Some(source) => error.with_source(source),
                None => error,
            }
        };
        let bytes = match self.runtime.block_on(read) {
            Ok(bytes) => bytes,
            Err(error) => {
                let error = self.failed("read", key, error);
                // Stores differ in what they call a range past the end; the size tells.
                let size = range
                    .as_ref()
                    .map(|_| self.size(key))
                    .transpose()?
                    .flatten();
                return match (size, &range) {
                    (Some(size), Some(range)) if size < range.end => Err(cut_short(Some(error))),
                    _ => Err(error),
                };
            }
        };
        match &range {
            Some(range) if bytes.len() as u64 != range.end - range.start => Err(cut_short(None)),
            _ => Ok(bytes),
        }
    }

    fn size(&self, key: &str) -> Result<Option<u64>> {
        match self.runtime.block_on(self.store.head(&Key::from(key))) {
            Ok(metadata) => Ok(Some(metadata.size)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(self.failed("look at", key, error)),
        }
    }

    fn list(&self, prefix: &str) -> Result<Vec<Listed>> {
        let prefix_key = Key::from(prefix);
        let stream = self.store.list(Some(&prefix_key));
        let found = self
            .runtime
            .block_on(stream.try_collect::<Vec<_>>())
            .map_err(|error| self.failed("list", prefix, error))?;
        let mut listed: Vec<Listed> = found
            .into_iter()
            .map(|metadata| Listed {
                key: metadata.location.to_string(),
                size_bytes: metadata.size,
            })
            .collect();
        listed.sort();
        Ok(listed)
    }
}

/// Gives an error of the library its kind here: what may pass by itself, and what will not.
fn wrap(context: String, error: object_store::Error) -> Error {
    let kind = match &error {
        object_store::Error::NotFound { .. } => ErrorKind::Missing,
        object_store::Error::InvalidPath { .. } => ErrorKind::Invalid,
        _ => match system_error(&error) {
            Some(libc::ENOSPC | libc::EDQUOT) => ErrorKind::Full,
            Some(_) => ErrorKind::Io,
            None => ErrorKind::Unavailable,
        },
    };
    Error::new(kind, context).with_source(error)
}

/// The operating system's error number somewhere down the chain of causes.
fn system_error(error: &(dyn StdError + 'static)) -> Option<i32> {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(error) = error.downcast_ref::<io::Error>() {
            return error.raw_os_error();
        }
        cause = error.source();
    }
    None
}
