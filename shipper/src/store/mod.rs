//! Object stores behind one small trait.
//!
//! Everything that the shipper asks of a store is here, blocking and without a notion of time or
//! of listing order. The asynchronous world behind it does not leave this module.

mod object;

use std::fmt::Debug;
use std::ops::Range;
use std::path::PathBuf;

use bytes::Bytes;

use crate::error::{Error, ErrorKind, Result};

pub use object::ObjectStoreBacked;

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
/// Errors name the object. Those of kind `Io`, `Unavailable` and `Full` may pass by themselves.
pub trait Store: Send + Sync + Debug {
    /// Stores an object unless one of this key exists. Durable when it returns.
    fn create(&self, key: &str, content: Bytes) -> Result<Created>;

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
}

/// A checked address of a vault.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VaultUrl {
    /// `file:///FOLDER`.
    Folder(PathBuf),
}

impl VaultUrl {
    /// Reads an address.
    ///
    /// # Errors
    ///
    /// Not an address, of a store that is not offered, or without an absolute path.
    pub fn parse(text: &str) -> Result<Self> {
        let invalid = |why: String| Err(Error::new(ErrorKind::Invalid, why));
        let Some((scheme, rest)) = text.split_once("://") else {
            return invalid(format!(
                "Vault address {text:?} lacks a scheme: use file:///FOLDER"
            ));
        };
        if scheme != "file" {
            return invalid(format!(
                "Vault address {text:?}: stores of kind {scheme:?} are not offered, use file:///FOLDER"
            ));
        }
        let path = PathBuf::from(rest);
        if !path.is_absolute() || path.components().count() < 2 {
            return invalid(format!(
                "Vault address {text:?} lacks an absolute path: use file:///FOLDER"
            ));
        }
        Ok(Self::Folder(path))
    }

    /// Opens the store that exists there.
    ///
    /// # Errors
    ///
    /// `Missing`: the folder does not exist; it is not made by the way, since a file system may
    /// just not be mounted.
    pub fn open(&self) -> Result<ObjectStoreBacked> {
        match self {
            Self::Folder(folder) => ObjectStoreBacked::folder(folder),
        }
    }

    /// Makes the place for a new vault, as far as this kind of store needs it, and opens it.
    ///
    /// # Errors
    ///
    /// The folder cannot be made.
    pub fn prepare(&self) -> Result<ObjectStoreBacked> {
        match self {
            Self::Folder(folder) => {
                std::fs::create_dir_all(folder).map_err(|error| {
                    let shown = folder.display();
                    Error::io(format!("Cannot make the folder {shown} for a vault"), error)
                })?;
                self.open()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_checked() {
        assert_eq!(
            VaultUrl::parse("file:///a/b").unwrap(),
            VaultUrl::Folder("/a/b".into())
        );
        for (text, word) in [
            ("nonsense", "nonsense"),
            ("ftp://x/y", "ftp"),
            ("file://relative/path", "relative"),
            ("file:///", "file:///"),
        ] {
            let error = VaultUrl::parse(text).unwrap_err();
            assert!(error.to_string().contains(word), "{error}");
        }
    }

    #[test]
    fn a_folder_keeps_what_it_is_given() {
        let root = tempfile::tempdir().unwrap();
        let url = VaultUrl::Folder(root.path().join("vault"));
        assert_eq!(url.open().unwrap_err().kind(), ErrorKind::Missing);
        let store = url.prepare().unwrap();
        let content = Bytes::from_static(b"0123456789");
        assert_eq!(store.create("a/b", content.clone()).unwrap(), Created::New);
        let other = Bytes::from_static(b"other");
        assert_eq!(store.create("a/b", other).unwrap(), Created::Exists);
        assert_eq!(store.read("a/b", None).unwrap(), content);
        assert_eq!(store.read("a/b", Some(2..5)).unwrap(), &content[2..5]);
        assert_eq!(store.size("a/b").unwrap(), Some(10));
        assert_eq!(store.size("a/c").unwrap(), None);
        let missing = store.read("a/c", None).unwrap_err();
        assert_eq!(missing.kind(), ErrorKind::Missing);
        let short = store.read("a/b", Some(5..11)).unwrap_err();
        assert_eq!(short.kind(), ErrorKind::Corrupt);
        let listed = store.list("a").unwrap();
        assert_eq!(listed.len(), 1);
        assert_eq!((listed[0].key.as_str(), listed[0].size_bytes), ("a/b", 10));
    }
}
