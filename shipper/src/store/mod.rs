//! Object stores behind one small trait.
//!
//! Everything that the shipper asks of a store is here, blocking and without a notion of time or
//! of listing order. The asynchronous world behind it does not leave this module.

pub mod cloud;

pub mod counted;

mod failure;

mod folder;

mod http;

mod object;

pub mod prices;

mod probe;

mod profile;

mod url;

use std::fmt::Debug;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;

use crate::error::Result;
use counted::Counters;

pub use object::ObjectStoreBacked;
pub use url::{Bucket, Service, VaultUrl};

/// How a create-if-absent ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Created {
    /// The object is durable and was not there before.
    New,
    /// An object of this key was there; it is unchanged.
    Exists,
}

/// An object in a listing.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Listed {
    /// Key below the root of the vault.
    pub key: String,
    /// Size in bytes.
    pub size_bytes: u64,
}

/// What the shipper needs of a place for objects. Keys are relative to the root of the vault.
///
/// Errors name the object. Those of kind `Io`, `Unavailable` and `Full` may pass by themselves;
/// those of kind `Denied` pass when somebody sees to the credentials.
pub trait Store: Send + Sync + Debug {
    /// Stores an object unless one of this key exists. Durable when it returns.
    ///
    /// # Errors
    ///
    /// After one that may pass, the object may have been stored all the same: who tries again and
    /// meets an object has to look whether it is the same.
    fn create(&self, key: &str, content: Bytes) -> Result<Created>;

    /// Stores a file as an object unless one of this key exists, by giving it a second name. Durable when it returns.
    /// `None`: there cannot be one here, and nothing was done. The file must be durable as it is, and nobody may
    /// write to it any more.
    ///
    /// # Errors
    ///
    /// As for [`Store::create`].
    fn adopt(&self, key: &str, file: &Path) -> Result<Option<Created>> {
        let _another_place = (key, file);
        Ok(None)
    }

    /// Stores an object in place of the one of this key, if there is one. A reader finds the old or
    /// the new content, never a part. Durable when it returns.
    fn replace(&self, key: &str, content: Bytes) -> Result<()>;

    /// Removes an object; `false` if there was none. Durable when it returns.
    fn delete(&self, key: &str) -> Result<bool>;

    /// Reads a whole object, or a range of bytes that must lie inside it.
    ///
    /// # Errors
    ///
    /// `Missing`: there is no such object. `Corrupt`: it is shorter than the range.
    fn read(&self, key: &str, range: Option<Range<u64>>) -> Result<Bytes>;

    /// Size of an object in bytes; `None` if there is none.
    fn size(&self, key: &str) -> Result<Option<u64>>;

    /// All objects below a prefix, sorted by key.
    fn list(&self, prefix: &str) -> Result<Vec<Listed>>;

    /// What its requests are counted by, if they are.
    fn counters(&self) -> Option<Arc<Counters>> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn a_folder_is_not_made_by_the_way() {
        let root = tempfile::tempdir().unwrap();
        let url = VaultUrl::Folder(root.path().join("vault"));
        assert_eq!(url.open().unwrap_err().kind(), ErrorKind::Missing);
        let store = url.prepare().unwrap();
        // The trial of creates leaves nothing behind.
        let left: Vec<_> = root.path().join("vault").read_dir().unwrap().collect();
        assert!(left.is_empty(), "{left:?}");
        drop(store);
        let file = root.path().join("file");
        std::fs::write(&file, "").unwrap();
        let error = VaultUrl::Folder(file).open().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
    }

    #[test]
    fn a_file_becomes_an_object_where_there_is_none() {
        let root = tempfile::tempdir().unwrap();
        let store = VaultUrl::Folder(root.path().to_owned()).open().unwrap();
        let file = root.path().join("file");
        std::fs::write(&file, "content").unwrap();
        // The folder of the key comes with the first object that is created in it.
        assert_eq!(store.adopt("a/b", &file).unwrap(), None);
        store.create("a/first", Bytes::from_static(b"1")).unwrap();
        assert_eq!(store.adopt("a/b", &file).unwrap(), Some(Created::New));
        assert_eq!(store.read("a/b", None).unwrap(), "content");
        assert_eq!(
            store.adopt("a/first", &file).unwrap(),
            Some(Created::Exists)
        );
        assert_eq!(store.read("a/first", None).unwrap(), "1");
        std::fs::remove_file(&file).unwrap();
        assert_eq!(store.read("a/b", None).unwrap(), "content");
        assert_eq!(store.adopt("a/c", &file).unwrap(), None);
    }

    #[test]
    fn what_a_folder_is_asked_is_counted() {
        let root = tempfile::tempdir().unwrap();
        let store = VaultUrl::Folder(root.path().to_owned()).open().unwrap();
        let content = Bytes::from_static(b"0123456789");
        store.create("a/b", content.clone()).unwrap();
        store.replace("a/b", content).unwrap();
        store.read("a/b", Some(2..5)).unwrap();
        store.size("a/b").unwrap();
        store.list("a").unwrap();
        store.delete("a/b").unwrap();
        let sums = store.counters().unwrap().sums();
        assert_eq!((sums.put.requests, sums.put.bytes), (2, 20));
        assert_eq!((sums.get.requests, sums.get.bytes), (1, 3));
        let others = [sums.head, sums.list, sums.delete, sums.credentials];
        assert_eq!(others.map(|sum| sum.requests), [1, 1, 1, 0]);
    }
}
