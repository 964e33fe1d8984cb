//! Addresses of vaults.

use std::fmt;
use std::path::PathBuf;

use super::cloud::{self, Environment};
use super::object::ObjectStoreBacked;
use super::{folder, probe};
use crate::error::{Error, ErrorKind, Result};

/// Longest prefix in bytes: keys of a vault have less than 300, the stores allow 1024.
const PREFIX_BYTES_MAX: usize = 512;
/// What the addresses look like.
const FORMS: &str =
    "use file:///FOLDER, s3://BUCKET/PREFIX, az://CONTAINER/PREFIX or gs://BUCKET/PREFIX";

/// A service that keeps objects in buckets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Service {
    /// Amazon S3, or what speaks its protocol.
    S3,
    /// Azure Blob Storage.
    Azure,
    /// Google Cloud Storage.
    Google,
}

impl Service {
    /// The scheme of its addresses.
    pub fn scheme(self) -> &'static str {
        match self {
            Self::S3 => "s3",
            Self::Azure => "az",
            Self::Google => "gs",
        }
    }

    fn of_scheme(scheme: &str) -> Option<Self> {
        [Self::S3, Self::Azure, Self::Google]
            .into_iter()
            .find(|service| service.scheme() == scheme)
    }
}

/// A place in a service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bucket {
    /// Which service.
    pub service: Service,
    /// Name of the bucket; Azure calls it a container.
    pub name: String,
    /// What all keys begin with, without a slash at its end; may be empty.
    pub prefix: String,
}

impl fmt::Display for Bucket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", self.service.scheme(), self.name)?;
        match self.prefix.is_empty() {
            true => Ok(()),
            false => write!(f, "/{}", self.prefix),
        }
    }
}

/// A checked address of a vault.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VaultUrl {
    /// `file:///FOLDER`.
    Folder(PathBuf),
    /// `s3://BUCKET/PREFIX`, `az://CONTAINER/PREFIX`, `gs://BUCKET/PREFIX`; the prefix may be left out.
    Bucket(Bucket),
}

impl VaultUrl {
    /// Reads an address.
    ///
    /// # Errors
    ///
    /// Not an address, or of a store that is not offered; a folder without an absolute path; a bucket
    /// without a name, or with anything but names in its address, such as a password.
    pub fn parse(text: &str) -> Result<Self> {
        let Some((scheme, rest)) = text.split_once("://") else {
            return invalid(format!("Vault address {text:?} lacks a scheme: {FORMS}"));
        };
        if scheme == "file" {
            let path = PathBuf::from(rest);
            if !path.is_absolute() || path.components().count() < 2 {
                return invalid(format!(
                    "Vault address {text:?} lacks an absolute path: use file:///FOLDER"
                ));
            }
            return Ok(Self::Folder(path));
        }
        match Service::of_scheme(scheme) {
            Some(service) => parse_bucket(service, rest).map(Self::Bucket),
            None => invalid(format!(
                "Vaults in stores of kind {scheme:?} are not offered: {FORMS}"
            )),
        }
    }

    /// Opens the store that exists there.
    ///
    /// # Errors
    ///
    /// `Missing`: the folder does not exist; it is not made by the way, since a file system may
    /// just not be mounted. `Invalid`: what the environment says of the service is wrong.
    pub fn open(&self) -> Result<ObjectStoreBacked> {
        self.open_in(&Environment::of_process())
    }

    /// The same with an environment of choice.
    ///
    /// # Errors
    ///
    /// As of [`Self::open`].
    pub fn open_in(&self, environment: &Environment) -> Result<ObjectStoreBacked> {
        match self {
            Self::Folder(folder) => folder::open(folder),
            Self::Bucket(bucket) => cloud::open(bucket, environment),
        }
    }

    /// Makes the place for a new vault, as far as this kind of store needs it, opens it, and proves
    /// that it creates objects only where none is.
    ///
    /// # Errors
    ///
    /// The folder cannot be made, the store cannot be written, or it replaces what it was told to
    /// create (`Unsupported`).
    pub fn prepare(&self) -> Result<ObjectStoreBacked> {
        self.prepare_in(&Environment::of_process())
    }

    /// The same with an environment of choice.
    ///
    /// # Errors
    ///
    /// As of [`Self::prepare`].
    pub fn prepare_in(&self, environment: &Environment) -> Result<ObjectStoreBacked> {
        if let Self::Folder(folder) = self {
            folder::make(folder)?;
        }
        let store = self.open_in(environment)?;
        probe::conditional_create(&store)?;
        if let Self::Folder(folder) = self {
            // Left empty it would be a riddle; if something else is in it, it stays.
            let _in_use = std::fs::remove_dir(folder.join(probe::PREFIX));
        }
        Ok(store)
    }
}

fn invalid<T>(why: String) -> Result<T> {
    Err(Error::new(ErrorKind::Invalid, why))
}

fn parse_bucket(service: Service, rest: &str) -> Result<Bucket> {
    let scheme = service.scheme();
    let (name, prefix) = rest.split_once('/').unwrap_or((rest, ""));
    let prefix = prefix.strip_suffix('/').unwrap_or(prefix);
    let plain = |text: &str, more: &str| {
        text.chars()
            .all(|c| c.is_ascii_alphanumeric() || more.contains(c))
    };
    if name.is_empty() || name.starts_with('.') || !plain(name, "._-$") {
        // It is not repeated, since it may hold a password.
        return invalid(format!(
            "The bucket's name in the vault's address is missing or has characters other than letters, \
             digits, '.', '_' and '-': use {scheme}://BUCKET/PREFIX, and give keys by the environment"
        ));
    }
    let segment_is_good =
        |segment: &str| !matches!(segment, "" | "." | "..") && plain(segment, "._-=");
    if !prefix.is_empty()
        && (prefix.len() > PREFIX_BYTES_MAX || !prefix.split('/').all(segment_is_good))
    {
        return invalid(format!(
            "The prefix in the vault's address in bucket {name} is not made of names of letters, digits, \
             '.', '_', '-' and '=' with single slashes between, {PREFIX_BYTES_MAX} bytes at most"
        ));
    }
    Ok(Bucket {
        service,
        name: name.to_owned(),
        prefix: prefix.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bucket(service: Service, name: &str, prefix: &str) -> VaultUrl {
        VaultUrl::Bucket(Bucket {
            service,
            name: name.into(),
            prefix: prefix.into(),
        })
    }

    #[test]
    fn addresses_are_understood() {
        use Service::{Azure, Google, S3};
        for (text, expected) in [
            ("file:///a/b", VaultUrl::Folder("/a/b".into())),
            ("s3://bucket", bucket(S3, "bucket", "")),
            ("s3://bucket/", bucket(S3, "bucket", "")),
            ("s3://my.bucket-1/a/b", bucket(S3, "my.bucket-1", "a/b")),
            ("az://container/a/", bucket(Azure, "container", "a")),
            ("gs://b_1/x=y", bucket(Google, "b_1", "x=y")),
        ] {
            assert_eq!(VaultUrl::parse(text).unwrap(), expected, "{text}");
        }
    }

    #[test]
    fn other_addresses_are_refused() {
        for (text, word) in [
            ("nonsense", "scheme"),
            ("ftp://x/y", "ftp"),
            ("S3://x/y", "S3"),
            ("file://relative/path", "relative"),
            ("file:///", "file:///"),
            ("s3://", "bucket"),
            ("s3:///prefix", "bucket"),
            ("s3://key:secret@bucket/p", "environment"),
            ("s3://bucket:9000/p", "environment"),
            ("s3://bucket?x=y", "environment"),
            ("s3://..", "bucket"),
            ("s3://bucket//a", "prefix"),
            ("s3://bucket/a//b", "prefix"),
            ("s3://bucket/../b", "prefix"),
            ("s3://bucket/a b", "prefix"),
            ("s3://bucket/a?sig=secret", "prefix"),
            ("az://container/ä", "prefix"),
        ] {
            let error = VaultUrl::parse(text).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid);
            assert!(error.to_string().contains(word), "{text}: {error}");
            assert!(!error.to_string().contains("secret"), "{error}");
        }
        let long = format!("s3://b/{}", "x".repeat(PREFIX_BYTES_MAX + 1));
        assert!(VaultUrl::parse(&long).is_err());
    }

    proptest! {
        #[test]
        fn what_is_shown_is_the_address(text in "(s3|az|gs)://[a-z0-9-]{1,10}(/[a-z0-9]{1,5}){0,3}") {
            match VaultUrl::parse(&text).unwrap() {
                VaultUrl::Bucket(bucket) => prop_assert_eq!(bucket.to_string(), text),
                VaultUrl::Folder(_) => prop_assert!(false),
            }
        }

        #[test]
        fn any_text_is_judged(text in "(s3://|file://|)\\PC{0,40}") {
            let _judged = VaultUrl::parse(&text);
        }
    }
}
