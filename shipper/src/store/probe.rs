//! Proves that a store creates an object only where none is.
//!
//! Everything that keeps two writers apart stands on it: generations, and recovery points that exist
//! whole or not at all. Some servers know the request and replace the object all the same, so it is
//! tried, once for each new vault.

use bytes::Bytes;

use super::{Created, Store};
use crate::error::{Error, ErrorKind, Result};

/// Where the objects of the trial are, for its short time.
pub(super) const PREFIX: &str = "probe";

/// Creates one object twice; the second time must not succeed, nor change it. The object is removed,
/// whatever comes out.
///
/// # Errors
///
/// `Unsupported`: the store cannot do it. Others: it cannot be written, read or removed.
pub(super) fn conditional_create(store: &dyn Store) -> Result<()> {
    let key = format!("{PREFIX}/{}", uuid::Uuid::new_v4().simple());
    let found = create_twice(store, &key);
    let removed = store.delete(&key);
    found?;
    match removed? {
        true => Ok(()),
        false => Err(refusal("it lost an object that it had said to be stored")),
    }
}

fn create_twice(store: &dyn Store, key: &str) -> Result<()> {
    let first = Bytes::from_static(b"first");
    if store.create(key, first.clone())? == Created::Exists {
        return Err(refusal(
            "it says that an object exists which was never there",
        ));
    }
    let second = store.create(key, Bytes::from_static(b"second"))?;
    let content = store.read(key, None)?;
    match second {
        Created::Exists if content == first => Ok(()),
        Created::Exists => Err(refusal("it says that an object exists, yet replaces it")),
        Created::New => Err(refusal(
            "it replaces an object where it is told to create one only if there is none",
        )),
    }
}

fn refusal(why: &str) -> Error {
    Error::new(
        ErrorKind::Unsupported,
        format!(
            "This store cannot hold a vault: {why}. Conditional creates (If-None-Match) keep two \
             writers apart; use a store, or a version of it, that has them"
        ),
    )
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::ops::Range;
    use std::sync::Mutex;

    use super::super::Listed;
    use super::*;

    /// How the store of a test behaves.
    #[derive(Clone, Copy, Debug, PartialEq)]
    enum Manner {
        Right,
        Replaces,
        RepliesRightAndReplaces,
        SaysExists,
        Forgets,
        Fails,
    }

    #[derive(Debug)]
    struct Fake(Manner, Mutex<BTreeMap<String, Bytes>>);

    impl Store for Fake {
        fn create(&self, key: &str, content: Bytes) -> Result<Created> {
            let mut objects = self.1.lock().unwrap();
            let there = objects.contains_key(key);
            if !there || matches!(self.0, Manner::Replaces | Manner::RepliesRightAndReplaces) {
                objects.insert(key.to_owned(), content);
            }
            match self.0 {
                Manner::SaysExists => Ok(Created::Exists),
                Manner::Fails if there => Err(Error::new(ErrorKind::Unavailable, "fails")),
                Manner::Replaces => Ok(Created::New),
                _ if there => Ok(Created::Exists),
                _ => Ok(Created::New),
            }
        }

        fn replace(&self, _: &str, _: Bytes) -> Result<()> {
            unreachable!("nothing is replaced")
        }

        fn delete(&self, key: &str) -> Result<bool> {
            let there = self.1.lock().unwrap().remove(key).is_some();
            Ok(there && self.0 != Manner::Forgets)
        }

        fn read(&self, key: &str, _: Option<Range<u64>>) -> Result<Bytes> {
            let missing = || Error::new(ErrorKind::Missing, "missing");
            self.1.lock().unwrap().get(key).cloned().ok_or_else(missing)
        }

        fn size(&self, _: &str) -> Result<Option<u64>> {
            unreachable!("nothing is looked at")
        }

        fn list(&self, _: &str) -> Result<Vec<Listed>> {
            unreachable!("nothing is listed")
        }
    }

    #[test]
    fn a_store_is_refused_that_does_not_hold_its_word() {
        for (manner, expected) in [
            (Manner::Right, None),
            (Manner::Replaces, Some(ErrorKind::Unsupported)),
            (
                Manner::RepliesRightAndReplaces,
                Some(ErrorKind::Unsupported),
            ),
            (Manner::SaysExists, Some(ErrorKind::Unsupported)),
            (Manner::Forgets, Some(ErrorKind::Unsupported)),
            (Manner::Fails, Some(ErrorKind::Unavailable)),
        ] {
            let fake = Fake(manner, Mutex::default());
            let found = conditional_create(&fake).err().map(|error| error.kind());
            assert_eq!(found, expected, "{manner:?}");
            assert!(fake.1.lock().unwrap().is_empty(), "{manner:?} left it");
        }
    }
}
