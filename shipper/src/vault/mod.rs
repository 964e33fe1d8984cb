//! A vault: what is where in it, and what it says of itself.
//!
//! `docs/vault-format.md` is the specification.

pub mod layout;

pub mod manifest;

pub mod generation;

use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind, Result};
use crate::keys::{Keys, from_hex, hex};
use crate::segment::writer::Owner;
use crate::store::{Created, Store, VaultUrl};
use layout::VAULT_KEY;
use manifest::{Manifest, PointId};

/// Version of the vault's layout that is written and read.
pub const FORMAT: u64 = 1;

/// What `vault.json` says.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct VaultFile {
    format: u64,
    vault: String,
    created: jiff::Timestamp,
    /// The root key, of which all keys are derived, in hexadecimal digits.
    root_key: String,
    /// Locks around the root key; none in a vault that is not encrypted.
    key_slots: Vec<serde_json::Value>,
}

/// The format number alone, so that a vault of the future is named as one.
#[derive(Deserialize)]
struct FormatOnly {
    format: u64,
}

/// An open vault.
#[derive(Clone)]
pub struct Vault {
    store: Arc<dyn Store>,
    id: [u8; 16],
    keys: Keys,
    url: String,
}

impl fmt::Debug for Vault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Vault({})", self.url)
    }
}

impl Vault {
    /// Makes a vault at an address that has none.
    ///
    /// # Errors
    ///
    /// `State`: there is one. Other kinds: the store cannot be written.
    pub fn create(url: &str) -> Result<Self> {
        let store = VaultUrl::parse(url)?.prepare()?;
        let file = VaultFile {
            format: FORMAT,
            vault: uuid::Uuid::new_v4().simple().to_string(),
            created: jiff::Timestamp::now(),
            root_key: format!(
                "{}{}",
                uuid::Uuid::new_v4().simple(),
                uuid::Uuid::new_v4().simple()
            ),
            key_slots: Vec::new(),
        };
        let text = serde_json::to_string_pretty(&file).map_err(|error| {
            Error::new(ErrorKind::Invalid, "Cannot write vault.json").with_source(error)
        })?;
        match store.create(VAULT_KEY, Bytes::from(text + "\n"))? {
            Created::New => Self::with_store(url, Arc::new(store)),
            Created::Exists => Err(Error::new(
                ErrorKind::State,
                format!("There is a vault at {url} already; it was left as it is"),
            )),
        }
    }

    /// Opens the vault at an address.
    ///
    /// # Errors
    ///
    /// There is none, or it is damaged or of a future version.
    pub fn open(url: &str) -> Result<Self> {
        Self::with_store(url, Arc::new(VaultUrl::parse(url)?.open()?))
    }

    fn with_store(url: &str, store: Arc<dyn Store>) -> Result<Self> {
        let bytes = store.read(VAULT_KEY, None).map_err(|error| {
            if error.kind() != ErrorKind::Missing {
                return error;
            }
            let what = format!(
                "There is no vault at {url}: mount what holds it, or make one with `shipper init {url}`"
            );
            Error::new(ErrorKind::Missing, what).with_source(error)
        })?;
        let invalid = |what: &str| {
            Error::new(
                ErrorKind::Corrupt,
                format!("{VAULT_KEY} of the vault at {url} {what}"),
            )
        };
        let only: FormatOnly = serde_json::from_slice(&bytes).map_err(|error| {
            invalid("is damaged or belongs to something else").with_source(error)
        })?;
        if only.format != FORMAT {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "{VAULT_KEY} of the vault at {url} has format {}, this program knows {FORMAT}: use a newer one",
                    only.format
                ),
            ));
        }
        let file: VaultFile = serde_json::from_slice(&bytes)
            .map_err(|error| invalid("is damaged").with_source(error))?;
        if !file.key_slots.is_empty() {
            return Err(invalid("has key slots, which this program does not know"));
        }
        let id = from_hex(&file.vault).ok_or_else(|| invalid("has no valid identity"))?;
        let root: [u8; 32] =
            from_hex(&file.root_key).ok_or_else(|| invalid("has no valid root key"))?;
        Ok(Self {
            store,
            id,
            keys: Keys::derive(&root),
            url: url.to_owned(),
        })
    }

    /// The objects.
    pub fn store(&self) -> &dyn Store {
        &*self.store
    }

    /// Keys of fingerprints and checks.
    pub fn keys(&self) -> &Keys {
        &self.keys
    }

    /// Identity, as hexadecimal digits.
    pub fn id(&self) -> String {
        hex(&self.id)
    }

    /// The address, as it was given.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Fails unless the vault is still where it was, which an unmounted folder is not.
    ///
    /// # Errors
    ///
    /// `Unavailable`: the vault is not there; it may come back.
    pub fn check_present(&self) -> Result<()> {
        match self.store.size(VAULT_KEY)? {
            Some(_) => Ok(()),
            None => Err(Error::new(
                ErrorKind::Unavailable,
                format!("The vault at {} is gone: mount what holds it", self.url),
            )),
        }
    }

    /// What the footers of a disk's segments say of their owner.
    pub fn owner(&self, machine: &str, disk: &str) -> Owner {
        Owner {
            vault_id: self.id,
            check: self
                .keys
                .check(&[machine.as_bytes(), b"/", disk.as_bytes()]),
        }
    }

    /// Numbers of the recovery points of a machine, in ascending order.
    ///
    /// # Errors
    ///
    /// The store cannot be listed.
    pub fn points(&self, machine: &str) -> Result<Vec<tracker::extent::Epoch>> {
        let listed = self.store.list(&layout::points_prefix(machine))?;
        let mut points: Vec<_> = listed
            .iter()
            .filter_map(|object| layout::point_of(&object.key))
            .collect();
        points.sort_unstable();
        Ok(points)
    }

    /// Reads and checks the manifest of a recovery point.
    ///
    /// # Errors
    ///
    /// `Missing`: there is no such point. `Corrupt`: the manifest is damaged or another one's.
    pub fn manifest(&self, machine: &str, epoch: tracker::extent::Epoch) -> Result<Manifest> {
        let key = layout::manifest_key(machine, epoch);
        let bytes = self.store.read(&key, None).map_err(|error| {
            if error.kind() != ErrorKind::Missing {
                return error;
            }
            let what = format!("Machine {machine} has no recovery point {epoch}");
            Error::new(ErrorKind::Missing, what).with_source(error)
        })?;
        let expected = PointId {
            vault: self.id(),
            machine: machine.to_owned(),
            epoch,
        };
        Manifest::decode(&bytes, &self.keys)
            .and_then(|manifest| manifest.expect(&expected).map(|()| manifest))
            .map_err(|what| crate::segment::frame::damaged(&key, &what))
    }

    /// The newest recovery point of a machine; `None` if it has none.
    ///
    /// # Errors
    ///
    /// The store cannot be read, or the newest manifest is damaged.
    pub fn newest(&self, machine: &str) -> Result<Option<Manifest>> {
        let newest = self.points(machine)?.pop();
        newest
            .map(|epoch| self.manifest(machine, epoch))
            .transpose()
    }
}
