//! A store through `object_store`, driven from plain threads.
//!
//! Overview: many threads may call at once: each blocks on its own request, and one runtime with a
//! single worker thread drives them all. The library itself retries nothing, so that every request is
//! seen here.
//!
//! Retries: what failed and may pass in a moment is tried again a few times, for those that have no patience of
//! their own. Outages belong to the caller, who can wait for hours and be told to stop.
//!
//! Creating is the one request that may not be blindly repeated: it may have been carried out although no
//! answer came. Where a later attempt then finds an object, its content tells whose it is.
//!
//! Time: a request may take a minute, and as long as its bytes need on a slow line. Where that was too short, the
//! next ones have more, so that a line far slower than expected gets there too. A peer that is gone is noticed
//! much sooner, by the kernel.
//!
//! Not handled: an answer that is wrong. Checks in the objects find that.

use std::future::Future;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use backon::{BackoffBuilder, ExponentialBuilder};
use bytes::Bytes;
use futures_util::TryStreamExt;
use object_store::path::Path as Key;
use object_store::{ObjectStore, ObjectStoreExt, PutMode, PutOptions};
use tokio::runtime::Runtime;

use super::counted::{Counters, Kind};
use super::failure::{Cause, Failure, of_folder};
use super::folder;
use super::http::listening;
use super::url::{Bucket, Service};
use super::{Created, Listed, Store};
use crate::error::{Error, ErrorKind, Result};

/// Attempts of one operation after the first one.
const RETRIES_MAX: usize = 4;
const RETRY_PAUSE_MIN: Duration = Duration::from_millis(100);
const RETRY_PAUSE_MAX: Duration = Duration::from_secs(3);
/// An operation that has taken so long is not tried again.
const RETRY_TIME_MAX: Duration = Duration::from_secs(60);

/// Time for a request without content.
const REQUEST_TIME: Duration = Duration::from_secs(60);
/// Bytes per second that a line is taken to carry at least: a megabit.
const LINE_RATE_MIN: u64 = 128 << 10;
/// So often is that halved: down to 8 KiB per second.
const PATIENCE_MAX: u32 = 4;

/// Where a store is.
#[derive(Debug)]
pub(super) enum Place {
    /// In a folder.
    Folder(PathBuf),
    /// In a bucket of a service.
    Bucket(Bucket),
}

/// A store of the `object_store` library.
#[derive(Debug)]
pub struct ObjectStoreBacked {
    runtime: Runtime,
    store: Box<dyn ObjectStore>,
    place: Place,
    counters: Arc<Counters>,
    /// How often the expected rate of the line is halved.
    patience: AtomicU32,
}

/// Whether an operation before may have been carried out without an answer.
#[derive(Clone, Copy, PartialEq)]
enum Before {
    Nothing,
    Unclear,
}

impl ObjectStoreBacked {
    pub(super) fn new(store: Box<dyn ObjectStore>, place: Place) -> Result<Self> {
        Self::counting(store, place, Arc::default())
    }

    /// A store whose requests are counted by others, who see them better.
    pub(super) fn counting(
        store: Box<dyn ObjectStore>,
        place: Place,
        counters: Arc<Counters>,
    ) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("store")
            .enable_all()
            .build()
            .map_err(|error| Error::io("Cannot start the threads of the object store", error))?;
        Ok(Self {
            runtime,
            store,
            place,
            counters,
            patience: AtomicU32::new(0),
        })
    }

    /// Counts what a folder is asked; requests to a service are counted on the line.
    fn count(&self, kind: Kind, bytes: u64) {
        if let Place::Folder(_) = self.place {
            self.counters.request(kind);
            self.counters.bytes(kind, bytes);
        }
    }

    fn failed(&self, what: &str, key: &str, failure: Failure) -> Error {
        let what = format!("{what} object {key}");
        let Failure { cause, heard } = failure;
        match (&self.place, cause) {
            (Place::Folder(folder), Cause::Store(error)) => {
                of_folder(format!("Cannot {what} in {}", folder.display()), error)
            }
            (Place::Folder(folder), Cause::Late(_)) => Error::new(
                ErrorKind::Unavailable,
                format!("Cannot {what} in {} in time", folder.display()),
            ),
            (Place::Bucket(bucket), cause) => Failure { cause, heard }.in_bucket(&what, bucket),
        }
    }

    /// Time that a request with so many bytes may take.
    fn time_for(&self, bytes: u64) -> Duration {
        let rate = LINE_RATE_MIN >> self.patience.load(Ordering::Relaxed).min(PATIENCE_MAX);
        REQUEST_TIME + Duration::from_secs(bytes / rate.max(1))
    }

    /// Waits for a step of an operation, as long as it may take.
    async fn within<T>(
        &self,
        bytes: u64,
        step: impl Future<Output = object_store::Result<T>>,
    ) -> std::result::Result<T, Cause> {
        if let Place::Folder(_) = self.place {
            return step.await.map_err(Cause::Store);
        }
        let limit = self.time_for(bytes);
        match tokio::time::timeout(limit, step).await {
            Ok(result) => result.map_err(Cause::Store),
            Err(_) => {
                if bytes > LINE_RATE_MIN {
                    let patience = self.patience.load(Ordering::Relaxed);
                    let more = (patience + 1).min(PATIENCE_MAX);
                    self.patience.store(more, Ordering::Relaxed);
                }
                Err(Cause::Late(limit))
            }
        }
    }

    /// Carries out an operation once.
    fn once<T>(
        &self,
        operation: impl Future<Output = std::result::Result<T, Cause>>,
    ) -> std::result::Result<T, Box<Failure>> {
        let (result, heard) = self.runtime.block_on(listening(operation));
        result.map_err(|cause| Box::new(Failure { cause, heard }))
    }

    /// Carries out an operation that may be repeated, a few times if need be. The attempts are told what
    /// was before.
    fn insist<T, F>(
        &self,
        mut operation: impl FnMut(Before) -> F,
    ) -> std::result::Result<T, Box<Failure>>
    where
        F: Future<Output = std::result::Result<T, Cause>>,
    {
        let mut retries = Retries::new();
        let mut before = Before::Nothing;
        loop {
            match self.once(operation(before)) {
                Err(failure) if failure.may_pass() && retries.pause() => before = Before::Unclear,
                result => return result,
            }
        }
    }

    /// After a create that met an object: whether it is ours. `None`: there is none after all.
    fn whose(
        &self,
        key: &str,
        content: &Bytes,
        conflict: &Failure,
        before: Before,
    ) -> Result<Option<Created>> {
        if before == Before::Nothing && conflict.is_sure_conflict() {
            return Ok(Some(Created::Exists));
        }
        match self.size(key)? {
            None => Ok(None),
            Some(size) if before == Before::Unclear && size == content.len() as u64 => {
                match self.read(key, None) {
                    Ok(found) if found == content => Ok(Some(Created::New)),
                    Ok(_) => Ok(Some(Created::Exists)),
                    Err(error) if error.kind() == ErrorKind::Missing => Ok(None),
                    Err(error) => Err(error),
                }
            }
            Some(_) => Ok(Some(Created::Exists)),
        }
    }

    /// An object without a range, or the range of it that there is.
    async fn fetch(
        &self,
        path: &Key,
        range: Option<Range<u64>>,
    ) -> std::result::Result<Bytes, Cause> {
        if let Some(range) = range {
            let bytes = range.end.saturating_sub(range.start);
            return self.within(bytes, self.store.get_range(path, range)).await;
        }
        let found = self.within(0, self.store.get(path)).await?;
        self.within(found.meta.size, found.bytes()).await
    }

    fn short(&self, key: &str, end: u64) -> Error {
        let place = match &self.place {
            Place::Folder(folder) => folder.display().to_string(),
            Place::Bucket(bucket) => bucket.to_string(),
        };
        Error::new(
            ErrorKind::Corrupt,
            format!("Object {key} in {place} ends before byte {end}"),
        )
    }
}

/// Pauses of an operation that is tried again.
struct Retries {
    begin: Instant,
    pauses: backon::ExponentialBackoff,
}

impl Retries {
    fn new() -> Self {
        Self {
            begin: Instant::now(),
            pauses: ExponentialBuilder::default()
                .with_min_delay(RETRY_PAUSE_MIN)
                .with_max_delay(RETRY_PAUSE_MAX)
                .with_factor(3.0)
                .with_max_times(RETRIES_MAX)
                .with_jitter()
                .build(),
        }
    }

    /// Pauses before the next attempt; `false` if there shall be none.
    fn pause(&mut self) -> bool {
        match self.pauses.next() {
            Some(pause) if self.begin.elapsed() + pause < RETRY_TIME_MAX => {
                std::thread::sleep(pause);
                true
            }
            _ => false,
        }
    }
}

impl Store for ObjectStoreBacked {
    fn create(&self, key: &str, content: Bytes) -> Result<Created> {
        let path = Key::from(key);
        let bytes = content.len() as u64;
        let mut retries = Retries::new();
        let mut before = Before::Nothing;
        loop {
            self.count(Kind::Put, bytes);
            let options = PutOptions::from(PutMode::Create);
            let put = self.store.put_opts(&path, content.clone().into(), options);
            let failure = match self.once(self.within(bytes, put)) {
                Ok(_) => return Ok(Created::New),
                Err(failure) => failure,
            };
            if failure.is_conflict() {
                if let Some(created) = self.whose(key, &content, &failure, before)? {
                    return Ok(created);
                }
            } else if failure.may_pass() {
                before = Before::Unclear;
            } else {
                return Err(self.write_failed(key, *failure));
            }
            if !retries.pause() {
                return Err(self.write_failed(key, *failure));
            }
        }
    }

    fn adopt(&self, key: &str, file: &Path) -> Result<Option<Created>> {
        let Place::Folder(folder) = &self.place else {
            return Ok(None);
        };
        let created = folder::adopt(folder, key, file)?;
        if created == Some(Created::New) {
            self.count(Kind::Put, file.metadata().map_or(0, |file| file.len()));
        }
        Ok(created)
    }

    fn replace(&self, key: &str, content: Bytes) -> Result<()> {
        let path = Key::from(key);
        let bytes = content.len() as u64;
        self.count(Kind::Put, bytes);
        self.insist(|_| self.within(bytes, self.store.put(&path, content.clone().into())))
            .map(drop)
            .map_err(|failure| self.write_failed(key, *failure))
    }

    fn delete(&self, key: &str) -> Result<bool> {
        // S3 says nothing of whether there was one.
        let tells = !matches!(&self.place, Place::Bucket(bucket) if bucket.service == Service::S3);
        if !tells && self.size(key)?.is_none() {
            return Ok(false);
        }
        self.count(Kind::Delete, 0);
        let path = Key::from(key);
        let removed = self.insist(async |before| {
            let delete = self.within(0, self.store.delete(&path));
            match delete.await {
                Ok(()) => Ok(true),
                // An attempt before may have removed it.
                Err(Cause::Store(object_store::Error::NotFound { .. })) => {
                    Ok(before == Before::Unclear)
                }
                Err(cause) => Err(cause),
            }
        });
        let removed = removed.map_err(|failure| self.failed("remove", key, *failure))?;
        if let (Place::Folder(folder), true) = (&self.place, removed) {
            folder::sync_removal(folder, key)?;
        }
        Ok(removed)
    }

    fn read(&self, key: &str, range: Option<Range<u64>>) -> Result<Bytes> {
        let path = Key::from(key);
        let bytes = match self.insist(|_| self.fetch(&path, range.clone())) {
            Ok(bytes) => bytes,
            Err(failure) => {
                let error = self.failed("read", key, *failure);
                // Stores differ in what they call a range past the end; the size tells.
                return match &range {
                    Some(range) if error.kind() != ErrorKind::Missing => match self.size(key) {
                        Ok(Some(size)) if size < range.end => {
                            Err(self.short(key, range.end).with_source(error))
                        }
                        _ => Err(error),
                    },
                    _ => Err(error),
                };
            }
        };
        self.count(Kind::Get, bytes.len() as u64);
        match &range {
            Some(range) if bytes.len() as u64 != range.end - range.start => {
                Err(self.short(key, range.end))
            }
            _ => Ok(bytes),
        }
    }

    fn size(&self, key: &str) -> Result<Option<u64>> {
        self.count(Kind::Head, 0);
        let path = Key::from(key);
        match self.insist(|_| self.within(0, self.store.head(&path))) {
            Ok(metadata) => Ok(Some(metadata.size)),
            Err(failure) if failure.is_missing() => Ok(None),
            Err(failure) => Err(self.failed("look at", key, *failure)),
        }
    }

    fn list(&self, prefix: &str) -> Result<Vec<Listed>> {
        self.count(Kind::List, 0);
        let prefix_key = Key::from(prefix);
        let found = self.insist(async |_| {
            let mut found = Vec::new();
            let mut stream = self.store.list(Some(&prefix_key));
            // Time is for each page.
            while let Some(metadata) = self.within(0, stream.try_next()).await? {
                found.push(Listed {
                    key: metadata.location.to_string(),
                    size_bytes: metadata.size,
                });
            }
            Ok(found)
        });
        let mut listed = found.map_err(|failure| self.failed("list", prefix, *failure))?;
        listed.sort();
        Ok(listed)
    }

    fn counters(&self) -> Option<Arc<Counters>> {
        Some(Arc::clone(&self.counters))
    }
}

impl ObjectStoreBacked {
    /// A write that finds nothing finds no bucket; one that meets an object time and again, and then finds none,
    /// meets others who write.
    fn write_failed(&self, key: &str, failure: Failure) -> Error {
        let error = self.failed("write", key, failure);
        match (&self.place, error.kind()) {
            (Place::Bucket(_), ErrorKind::Missing) => {
                Error::new(ErrorKind::Unavailable, error.chain())
            }
            _ => error,
        }
    }
}
