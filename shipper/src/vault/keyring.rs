//! The key tables of an encrypted vault in its store: which one counts, and how another takes its place.
//!
//! Tables are numbered without gaps, and the highest that exists counts. So one is found without a listing, and of two
//! who change the slots at the same time one alone makes the next table.
//!
//! Order of a change: the next table is created, which is durable then; the one before is replaced by a line that names
//! it. In between both are there, and the new one counts. What was left of tables below is replaced by the next change.
//!
//! What it does not handle: a copy of a table that somebody has kept, or that the store keeps as an older version.

use bytes::Bytes;

use super::layout::key_table_key;
use super::open::VaultFile;
use crate::error::{Error, ErrorKind, Result};
use crate::keys::Keys;
use crate::keys::secret::Secret;
use crate::keys::slots::{
    Argon2Cost, KeySlot, KeyTable, SLOTS_MAX, SlotPlace, TABLE_BYTES_MAX, UserSecret, replaced_line,
};
use crate::segment::frame::damaged;
use crate::store::{Created, Store};

/// Tables that a vault may have had.
const TABLES_MAX: u64 = 1 << 20;
/// Times that a table is looked for again because another took its place meanwhile.
const ATTEMPTS_MAX: u32 = 16;

/// An unlocked vault.
pub struct Unlocked {
    /// The slots.
    pub table: KeyTable,
    /// All keys.
    pub keys: Keys,
    root: Secret<32>,
}

/// The key tables of one vault.
pub struct Keyring<'a> {
    store: &'a dyn Store,
    url: &'a str,
    file: &'a VaultFile,
    place: SlotPlace,
}

/// A change of the slots.
#[derive(Debug)]
pub enum Change<'a> {
    /// Another slot.
    Add {
        /// What opens it.
        secret: &'a UserSecret,
        /// For people.
        label: &'a str,
    },
    /// One slot less.
    Remove {
        /// Its name.
        id: &'a str,
    },
    /// Another secret for a slot.
    Rotate {
        /// Its name.
        id: &'a str,
        /// What opens it from then on.
        secret: &'a UserSecret,
    },
}

impl<'a> Keyring<'a> {
    /// The key tables of a vault that is encrypted like this.
    pub(super) fn new(
        store: &'a dyn Store,
        url: &'a str,
        file: &'a VaultFile,
        place: SlotPlace,
    ) -> Self {
        Self {
            store,
            url,
            file,
            place,
        }
    }

    /// Makes the first table, with one slot.
    ///
    /// # Errors
    ///
    /// `State`: there is one. Others: the store cannot be written.
    pub(super) fn create(&self, secret: &UserSecret, label: &str, cost: Argon2Cost) -> Result<()> {
        let root = Secret::random()?;
        let keys = Keys::derive_sealing(&root, self.place.vault, self.place.cipher)?;
        let slot = KeySlot::new(self.place, &root, secret, label, cost)?;
        let table = KeyTable {
            number: 1,
            slots: vec![slot],
        };
        match self.put(&table, &keys)? {
            Created::New => Ok(()),
            Created::Exists => Err(Error::new(
                ErrorKind::State,
                format!(
                    "There is a vault at {} already; it was left as it is",
                    self.url
                ),
            )),
        }
    }

    /// Finds the table that counts; returns its number and its bytes.
    fn newest(&self) -> Result<(u64, Bytes)> {
        for _ in 0..ATTEMPTS_MAX {
            let mut number = 0;
            let mut size = 0;
            while let Some(found) = self.store.size(&key_table_key(number + 1))? {
                (number, size) = (number + 1, found);
                if number == TABLES_MAX {
                    return Err(damaged(
                        &key_table_key(number),
                        "there are too many key tables",
                    ));
                }
            }
            let key = key_table_key(number.max(1));
            if number == 0 {
                let what = format!(
                    "Object {key} of the vault at {} is missing: the vault was not made to its end, for which \
                     `shipper init` is to be repeated, or its keys were removed",
                    self.url
                );
                return Err(Error::new(ErrorKind::Missing, what));
            }
            if size > TABLE_BYTES_MAX as u64 {
                return Err(damaged(&key, "it is too large for a key table"));
            }
            let object = self.store.read(&key, None)?;
            if object != replaced_line(number + 1) {
                return Ok((number, object));
            }
        }
        let what = format!(
            "The key table that counts is missing in the vault at {}: the one before says that there is another",
            self.url
        );
        Err(Error::new(ErrorKind::Missing, what))
    }

    /// Opens a slot, and proves the table and the vault's own file.
    ///
    /// # Errors
    ///
    /// `Invalid`: the secret opens no slot. `Corrupt`: the table or the vault's own file was changed.
    pub fn unlock(&self, secret: &UserSecret) -> Result<Unlocked> {
        let (number, object) = self.newest()?;
        let key = key_table_key(number);
        let table = KeyTable::decode(&object, number).map_err(|what| damaged(&key, &what))?;
        let root = table.open(self.place, secret)?.ok_or_else(|| {
            let kind = match secret {
                UserSecret::Passphrase(_) => "passphrase",
                UserSecret::KeyFile(_) => "key file",
            };
            let slots: Vec<_> = table.slots.iter().map(|slot| slot.kind.name()).collect();
            let what = format!(
                "The {kind} opens no key slot of the vault at {}, which has: {}. It is wrong, or vault.json or {key} was changed",
                self.url,
                slots.join(", ")
            );
            Error::new(ErrorKind::Invalid, what)
        })?;
        let keys = Keys::derive_sealing(&root, self.place.vault, self.place.cipher)?;
        let is_right = |sealing| KeyTable::check(&object, sealing, &self.file.bytes);
        if !keys.sealing().is_some_and(is_right) {
            return Err(damaged(
                &key,
                "it or vault.json was changed by somebody who does not have the vault's key",
            ));
        }
        Ok(Unlocked { table, keys, root })
    }

    /// Makes a change; returns the table that counts from then on.
    ///
    /// # Errors
    ///
    /// `Missing`: there is no such slot. `State`: it is the last one, or somebody else made a change at the same time.
    /// `Invalid`: too many slots, or a label that is none. Others: the store cannot be written; the change is then either
    /// made as a whole or not at all.
    pub fn change(&self, unlocked: &Unlocked, change: &Change<'_>) -> Result<KeyTable> {
        self.take_back(unlocked.table.number)?;
        let mut table = KeyTable {
            number: unlocked.table.number + 1,
            ..unlocked.table.clone()
        };
        self.apply(&mut table, &unlocked.root, change)?;
        if self.put(&table, &unlocked.keys)? == Created::Exists {
            let what = format!(
                "Somebody else changed the key slots of the vault at {} at the same time: look at `shipper key list`, \
                 then try again",
                self.url
            );
            return Err(Error::new(ErrorKind::State, what));
        }
        self.take_back(table.number).map_err(|error| {
            let what = format!(
                "Key table {} is in force, but the one before it is still in the vault at {}: repeat the command, so \
                 that it is taken back",
                table.number, self.url
            );
            Error::new(error.kind(), what).with_source(error)
        })?;
        Ok(table)
    }

    fn apply(&self, table: &mut KeyTable, root: &Secret<32>, change: &Change<'_>) -> Result<()> {
        let slots = &mut table.slots;
        let find = |slots: &[KeySlot], id: &str| {
            slots.iter().position(|slot| slot.id == id).ok_or_else(|| {
                let what = format!(
                    "The vault at {} has no key slot {id:?}: `shipper key list` shows them",
                    self.url
                );
                Error::new(ErrorKind::Missing, what)
            })
        };
        match *change {
            Change::Add { .. } if slots.len() >= SLOTS_MAX => {
                let what = format!("A vault has {SLOTS_MAX} key slots at most: remove one first");
                Err(Error::new(ErrorKind::Invalid, what))
            }
            Change::Add { secret, label } => {
                slots.push(KeySlot::new(
                    self.place,
                    root,
                    secret,
                    label,
                    Argon2Cost::default(),
                )?);
                Ok(())
            }
            Change::Remove { id } => {
                let index = find(slots, id)?;
                if slots.len() == 1 {
                    let what =
                        "The last key slot cannot be removed: nothing would open the vault again";
                    return Err(Error::new(ErrorKind::State, what));
                }
                slots.remove(index);
                Ok(())
            }
            Change::Rotate { id, secret } => {
                let index = find(slots, id)?;
                let label = slots[index].label.clone();
                slots[index] =
                    KeySlot::with_id(id, self.place, root, secret, &label, Argon2Cost::default())?;
                Ok(())
            }
        }
    }

    /// Creates a table. One that an earlier attempt has left, whose answer was lost, is ours.
    fn put(&self, table: &KeyTable, keys: &Keys) -> Result<Created> {
        let key = key_table_key(table.number);
        let plain = || Error::new(ErrorKind::Invalid, "A plain vault has no key table");
        let sealing = keys.sealing().ok_or_else(plain)?;
        let object = table.encode(sealing, &self.file.bytes).map_err(|error| {
            Error::new(ErrorKind::Invalid, "Cannot write a key table").with_source(error)
        })?;
        let object = Bytes::from(object);
        match self.store.create(&key, object.clone())? {
            Created::Exists if self.store.read(&key, None)? == object => Ok(Created::New),
            created => Ok(created),
        }
    }

    /// Replaces every table below this one by a line that names the next.
    fn take_back(&self, number: u64) -> Result<()> {
        for below in 1..number {
            let key = key_table_key(below);
            let line = Bytes::from(replaced_line(below + 1));
            if self.store.read(&key, None)? != line {
                self.store.replace(&key, line)?;
            }
        }
        Ok(())
    }

    /// What is wrong with the tables that do not count: one line for each.
    ///
    /// # Errors
    ///
    /// The store cannot be read.
    pub(super) fn problems(&self) -> Result<Vec<String>> {
        let (number, _) = self.newest()?;
        let mut problems = Vec::new();
        for below in 1..number {
            let key = key_table_key(below);
            if self.store.read(&key, None)? != replaced_line(below + 1) {
                problems.push(format!(
                    "Object {key} of the vault: it is still a key table, or damaged, although {} has taken its place; \
                     the next change of the key slots takes it back",
                    key_table_key(number)
                ));
            }
        }
        Ok(problems)
    }
}
