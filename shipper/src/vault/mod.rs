//! A vault: what is where in it, and what it says of itself.
//!
//! `docs/vault-format.md` is the specification.

pub mod layout;

pub mod manifest;

pub mod generation;

pub mod keyring;

pub mod record;

pub mod aside;
mod rules;

pub mod boundary;

pub mod pin;

mod points;

pub mod publish;

pub mod retention;

pub mod prune;

mod open;

#[cfg(test)]
mod model_tests;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use tracker::extent::Epoch;

use crate::error::{Error, ErrorKind, Result};
use crate::keys::aead::Cipher;
use crate::keys::slots::{Argon2Cost, KeyTable, SlotPlace, UserSecret};
use crate::keys::source::{Access, PASSPHRASE_VARIABLE};
use crate::keys::{Keys, hex};
use crate::segment::reference::SegmentRef;
use crate::segment::seal::Owner;
use crate::store::{Created, Store, VaultUrl};
use boundary::Boundary;
use keyring::{Change, Keyring, Unlocked};
use layout::VAULT_KEY;
use manifest::PointId;
use open::{Lock, VaultFile};

/// How a new vault is protected from those who can read its store.
#[derive(Debug)]
pub enum Protection {
    /// Not at all.
    Plain,
    /// Encrypted, with one key slot.
    Sealed {
        /// What opens the slot.
        secret: UserSecret,
        /// Its label.
        label: String,
        /// What a passphrase costs.
        cost: Argon2Cost,
        /// What everything is sealed with.
        cipher: Cipher,
    },
}

/// An open vault.
#[derive(Clone)]
pub struct Vault {
    store: Arc<dyn Store>,
    id: [u8; 16],
    keys: Keys,
    url: String,
    /// The newest known boundary of each machine: a later one has a higher number.
    boundaries: Arc<Mutex<BTreeMap<String, Option<Arc<Boundary>>>>>,
}

impl fmt::Debug for Vault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Vault({})", self.url)
    }
}

impl Vault {
    /// Makes a vault at an address that has none, or makes an encrypted one to its end whose keys are not there yet.
    ///
    /// Order: the vault's own file, then its first key table. Whoever creates that has made the vault; before, nobody can have
    /// put anything into it.
    ///
    /// # Errors
    ///
    /// `State`: there is one. Other kinds: the store cannot be written.
    pub fn create(url: &str, protection: &Protection) -> Result<Self> {
        let store: Arc<dyn Store> = Arc::new(VaultUrl::parse(url)?.prepare()?);
        let exists = || {
            let what = format!("There is a vault at {url} already; it was left as it is");
            Error::new(ErrorKind::State, what)
        };
        let mut file = match protection {
            Protection::Plain => VaultFile::plain()?,
            Protection::Sealed { cipher, .. } => VaultFile::sealed(*cipher)?,
        };
        let created = store.create(VAULT_KEY, file.bytes.clone())?;
        let Protection::Sealed {
            secret,
            label,
            cost,
            ..
        } = protection
        else {
            let Created::New = created else {
                return Err(exists());
            };
            return Self::with_file(url, store, &file, &Access::default());
        };
        if created == Created::Exists {
            file = VaultFile::decode(store.read(VAULT_KEY, None)?, url)?;
        }
        let Lock::Sealed(cipher) = file.lock else {
            return Err(exists());
        };
        let begun = created == Created::Exists;
        if begun && !store.list(layout::MACHINES_PREFIX)?.is_empty() {
            return Err(exists());
        }
        let place = SlotPlace {
            vault: file.id,
            cipher,
        };
        Keyring::new(&*store, url, &file, place).create(secret, label, *cost)?;
        let unlocked = Keyring::new(&*store, url, &file, place).unlock(secret)?;
        Ok(Self::new(store, &file, unlocked.keys, url))
    }

    /// Opens the vault at an address. Whoever opens an encrypted one is asked for its secret.
    ///
    /// # Errors
    ///
    /// There is none, or it is damaged or of a future version; or it is encrypted, and there is no secret that opens it.
    pub fn open(url: &str, access: &Access) -> Result<Self> {
        let (store, file) = Self::find(url)?;
        Self::with_file(url, store, &file, access)
    }

    fn find(url: &str) -> Result<(Arc<dyn Store>, VaultFile)> {
        let store: Arc<dyn Store> = Arc::new(VaultUrl::parse(url)?.open()?);
        let bytes = store.read(VAULT_KEY, None).map_err(|error| {
            if error.kind() != ErrorKind::Missing {
                return error;
            }
            let what = format!(
                "There is no vault at {url}: mount what holds it, or make one with `shipper init {url}`"
            );
            Error::new(ErrorKind::Missing, what).with_source(error)
        })?;
        let file = VaultFile::decode(bytes, url)?;
        Ok((store, file))
    }

    fn with_file(
        url: &str,
        store: Arc<dyn Store>,
        file: &VaultFile,
        access: &Access,
    ) -> Result<Self> {
        let keys = match &file.lock {
            Lock::Plain(root) => Keys::derive(root.bytes()),
            Lock::Sealed(cipher) => {
                let place = SlotPlace {
                    vault: file.id,
                    cipher: *cipher,
                };
                Keyring::new(&*store, url, file, place)
                    .unlock(&needed(url, access)?)?
                    .keys
            }
        };
        Ok(Self::new(store, file, keys, url))
    }

    fn new(store: Arc<dyn Store>, file: &VaultFile, keys: Keys, url: &str) -> Self {
        Self {
            store,
            id: file.id,
            keys,
            url: url.to_owned(),
            boundaries: Arc::default(),
        }
    }

    /// The key slots of the vault at an address.
    ///
    /// # Errors
    ///
    /// As for [`Self::open`]; `State`: it is not encrypted.
    pub fn key_table(url: &str, access: &Access) -> Result<KeyTable> {
        Self::with_keyring(url, access, |_, unlocked| Ok(unlocked.table))
    }

    /// Changes the key slots of the vault at an address; returns those that there are from then on.
    ///
    /// # Errors
    ///
    /// As for [`Self::key_table`] and [`Keyring::change`].
    pub fn change_keys(url: &str, access: &Access, change: &Change<'_>) -> Result<KeyTable> {
        Self::with_keyring(url, access, |keyring, unlocked| {
            keyring.change(&unlocked, change)
        })
    }

    fn with_keyring<T>(
        url: &str,
        access: &Access,
        work: impl FnOnce(&Keyring<'_>, Unlocked) -> Result<T>,
    ) -> Result<T> {
        let (store, file) = Self::find(url)?;
        let Lock::Sealed(cipher) = file.lock else {
            let what = format!("The vault at {url} is not encrypted, it has no key slots");
            return Err(Error::new(ErrorKind::State, what));
        };
        let place = SlotPlace {
            vault: file.id,
            cipher,
        };
        let keyring = Keyring::new(&*store, url, &file, place);
        let unlocked = keyring.unlock(&needed(url, access)?)?;
        work(&keyring, unlocked)
    }

    /// What is wrong with the key tables that do not count, one line for each.
    ///
    /// # Errors
    ///
    /// The store cannot be read.
    pub fn key_problems(&self) -> Result<Vec<String>> {
        let Some(sealing) = self.keys.sealing() else {
            return Ok(Vec::new());
        };
        let file = VaultFile::decode(self.store.read(VAULT_KEY, None)?, &self.url)?;
        let place = SlotPlace {
            vault: self.id,
            cipher: sealing.cipher(),
        };
        Keyring::new(&*self.store, &self.url, &file, place).problems()
    }

    /// The objects.
    pub fn store(&self) -> &dyn Store {
        &*self.store
    }

    /// All keys.
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

    /// What makes the segments of a disk its own.
    pub fn owner(&self, machine: &str, disk: &str) -> Owner {
        Owner {
            vault_id: self.id,
            machine: machine.to_owned(),
            disk: disk.to_owned(),
            check: self
                .keys
                .check(&[machine.as_bytes(), b"/", disk.as_bytes()]),
            keys: self.keys.clone(),
        }
    }

    /// Where the claims of a machine are.
    pub fn generations_prefix(&self, machine: &str) -> String {
        layout::generations_prefix(&self.keys.machine_in_keys(machine))
    }

    /// The claim of a generation.
    pub fn generation_key(&self, machine: &str, generation: u64) -> String {
        layout::generation_key(&self.keys.machine_in_keys(machine), generation)
    }

    /// The manifest of a recovery point.
    pub fn manifest_key(&self, machine: &str, epoch: Epoch) -> String {
        layout::manifest_key(&self.keys.machine_in_keys(machine), epoch)
    }

    /// A segment of a disk.
    pub fn segment_key(&self, machine: &str, disk: &str, segment: &SegmentRef) -> String {
        let keys = &self.keys;
        layout::segment_key(
            &keys.machine_in_keys(machine),
            &keys.disk_in_keys(machine, disk),
            segment,
        )
    }

    /// Where everything of a machine is.
    pub fn machine_prefix(&self, machine: &str) -> String {
        format!(
            "{}/{}",
            layout::MACHINES_PREFIX,
            self.keys.machine_in_keys(machine)
        )
    }

    /// Which recovery point a manifest has to be of.
    pub fn point_id(&self, machine: &str, epoch: Epoch) -> PointId {
        PointId {
            vault: self.id(),
            machine: machine.to_owned(),
            epoch,
        }
    }

    /// The newest boundary of a machine that has been read; `None`: they were not looked at yet.
    fn known_boundary(&self, machine: &str) -> Option<Option<Arc<Boundary>>> {
        let known = self.boundaries.lock();
        let known = known.unwrap_or_else(PoisonError::into_inner);
        known.get(machine).cloned()
    }

    fn know_boundary(&self, machine: &str, newest: Option<Arc<Boundary>>) {
        let known = self.boundaries.lock();
        let mut known = known.unwrap_or_else(PoisonError::into_inner);
        known.insert(machine.to_owned(), newest);
    }
}

/// The secret that a vault needs.
fn needed(url: &str, access: &Access) -> Result<UserSecret> {
    access.secret()?.ok_or_else(|| {
        let what = format!(
            "The vault at {url} is encrypted: name what opens it by --key-file or --passphrase-file, by key_file or \
             passphrase_file in the configuration, or by {PASSPHRASE_VARIABLE} in the environment"
        );
        Error::new(ErrorKind::Invalid, what)
    })
}
