//! Key slots: each is one way to the root key, by a passphrase or a key file. Pure, but for random numbers.
//!
//! A key table holds the slots of a vault, and a check by the root key over itself and the vault's own file. Whoever
//! cannot open a slot cannot add, remove or change one unnoticed. Adding and removing slots rewrites the table alone:
//! the root key stays, and so does all that is sealed.

use std::collections::BTreeSet;

use argon2::{Algorithm, Argon2, Params, Version};
use serde::{Deserialize, Serialize};

use super::aead::{AeadKey, Cipher, NONCE_BYTES, TAG_BYTES, Tag};
use super::derive::{CONTEXT, Sealing, hkdf};
use super::secret::{Secret, SecretText, random};
use super::{from_hex, hex};
use crate::error::{Error, ErrorKind, Result};

/// Largest table that is read, in bytes.
pub const TABLE_BYTES_MAX: usize = 64 << 10;
/// Most slots of a table.
pub const SLOTS_MAX: usize = 32;
/// Longest label in bytes.
pub const LABEL_BYTES_MAX: usize = 100;
/// Most memory that a passphrase may take, in KiB.
pub const MEMORY_KIB_MAX: u32 = 1 << 20;
/// Most passes over that memory.
pub const ITERATIONS_MAX: u32 = 16;
/// Most lanes.
pub const PARALLELISM_MAX: u32 = 16;
const ROOT_BYTES: usize = 32;
const WRAPPED_BYTES: usize = ROOT_BYTES + TAG_BYTES;

/// What a slot is opened with.
#[derive(Clone, Debug)]
pub enum UserSecret {
    /// A passphrase, as it was typed.
    Passphrase(SecretText),
    /// The content of a key file.
    KeyFile(Secret<32>),
}

impl UserSecret {
    /// The kind of slots that it opens.
    pub fn kind(&self) -> SlotKind {
        match self {
            Self::Passphrase(_) => SlotKind::Passphrase,
            Self::KeyFile(_) => SlotKind::KeyFile,
        }
    }
}

/// Kinds of slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SlotKind {
    /// By a passphrase.
    Passphrase,
    /// By a key file.
    KeyFile,
}

impl SlotKind {
    /// The name in formats.
    pub fn name(self) -> &'static str {
        match self {
            Self::Passphrase => "passphrase",
            Self::KeyFile => "key-file",
        }
    }
}

/// How much it costs to try a passphrase.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Argon2Cost {
    /// Memory in KiB.
    pub memory_kib: u32,
    /// Passes over the memory.
    pub iterations: u32,
    /// Lanes.
    pub parallelism: u32,
}

impl Default for Argon2Cost {
    fn default() -> Self {
        Self {
            memory_kib: 64 << 10,
            iterations: 3,
            parallelism: 1,
        }
    }
}

impl Argon2Cost {
    fn is_valid(&self) -> bool {
        (1..=PARALLELISM_MAX).contains(&self.parallelism)
            && (1..=ITERATIONS_MAX).contains(&self.iterations)
            && (8 * self.parallelism..=MEMORY_KIB_MAX).contains(&self.memory_kib)
    }

    fn stretch(&self, passphrase: &SecretText, salt: &[u8; 16]) -> Result<Secret<32>> {
        let failed = |error: argon2::Error| {
            Error::new(ErrorKind::Io, "Cannot compute the key of a passphrase")
                .with_source(error.to_string())
        };
        let Self {
            memory_kib,
            iterations,
            parallelism,
        } = *self;
        let parameters =
            Params::new(memory_kib, iterations, parallelism, Some(32)).map_err(failed)?;
        let argon2 = Argon2::new(Algorithm::Argon2id, Version::V0x13, parameters);
        Secret::filled(|bytes| argon2.hash_password_into(passphrase.bytes(), salt, bytes))
            .map_err(failed)
    }
}

/// One way to the root key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeySlot {
    /// Tells it from the others of the table.
    pub id: String,
    /// What it is opened with.
    pub kind: SlotKind,
    /// For people.
    pub label: String,
    /// When its secret was set; for people.
    pub created: jiff::Timestamp,
    /// Only of a passphrase.
    #[serde(skip_serializing_if = "Option::is_none")]
    argon2: Option<Argon2Cost>,
    salt: String,
    nonce: String,
    wrapped: String,
}

/// The vault that a slot belongs to.
#[derive(Clone, Copy, Debug)]
pub struct SlotPlace {
    /// Identity of the vault.
    pub vault: [u8; 16],
    /// What the vault is sealed with.
    pub cipher: Cipher,
}

impl KeySlot {
    /// A slot that this secret opens.
    ///
    /// # Errors
    ///
    /// `Invalid`: the label is too long or has control characters, the passphrase is empty. `Io`: there are no random
    /// numbers, or not the memory that a passphrase takes.
    pub fn new(
        place: SlotPlace,
        root: &Secret<32>,
        secret: &UserSecret,
        label: &str,
        cost: Argon2Cost,
    ) -> Result<Self> {
        Self::with_id(&hex(&random::<4>()?), place, root, secret, label, cost)
    }

    /// The same with the name of a slot whose place it takes.
    ///
    /// # Errors
    ///
    /// As for [`Self::new`].
    pub fn with_id(
        id: &str,
        place: SlotPlace,
        root: &Secret<32>,
        secret: &UserSecret,
        label: &str,
        cost: Argon2Cost,
    ) -> Result<Self> {
        if !is_valid_label(label) {
            let what = format!(
                "Label {label:?} is not valid: up to {LABEL_BYTES_MAX} bytes without control characters"
            );
            return Err(Error::new(ErrorKind::Invalid, what));
        }
        let nonce: [u8; NONCE_BYTES] = random()?;
        let mut slot = Self {
            id: id.to_owned(),
            kind: secret.kind(),
            label: label.to_owned(),
            created: jiff::Timestamp::now(),
            argon2: (secret.kind() == SlotKind::Passphrase).then_some(cost),
            salt: hex(&random::<16>()?),
            nonce: hex(&nonce),
            wrapped: String::new(),
        };
        let mut wrapped = root.bytes().to_vec();
        let tag = slot.key(place, secret)?.seal(
            nonce,
            slot.associated(place).as_bytes(),
            &mut wrapped,
        )?;
        wrapped.extend_from_slice(&tag);
        slot.wrapped = hex(&wrapped);
        Ok(slot)
    }

    /// The root key; `None`: the secret is not this slot's.
    ///
    /// # Errors
    ///
    /// `Io`: there is not the memory that a passphrase takes. `Corrupt`: the slot is malformed.
    pub fn open(&self, place: SlotPlace, secret: &UserSecret) -> Result<Option<Secret<32>>> {
        if self.kind != secret.kind() {
            return Ok(None);
        }
        let malformed = || {
            Error::new(
                ErrorKind::Corrupt,
                format!("Key slot {} is malformed", self.id),
            )
        };
        let wrapped: [u8; WRAPPED_BYTES] = from_hex(&self.wrapped).ok_or_else(malformed)?;
        let nonce: [u8; NONCE_BYTES] = from_hex(&self.nonce).ok_or_else(malformed)?;
        let key = self.key(place, secret)?;
        let (root, tag) = wrapped.split_at(ROOT_BYTES);
        let tag: Tag = tag.try_into().map_err(|_| malformed())?;
        let associated = self.associated(place);
        let opened = Secret::filled(|bytes| {
            bytes.copy_from_slice(root);
            key.open(nonce, associated.as_bytes(), &tag, bytes)
                .ok_or(())
        });
        Ok(opened.ok())
    }

    fn key(&self, place: SlotPlace, secret: &UserSecret) -> Result<AeadKey> {
        let malformed = || {
            Error::new(
                ErrorKind::Corrupt,
                format!("Key slot {} is malformed", self.id),
            )
        };
        let salt: [u8; 16] = from_hex(&self.salt).ok_or_else(malformed)?;
        let stretched = match (secret, self.argon2) {
            (UserSecret::Passphrase(passphrase), Some(cost)) => cost.stretch(passphrase, &salt)?,
            (UserSecret::KeyFile(key), None) => key.clone(),
            _ => return Err(malformed()),
        };
        let info = format!("{CONTEXT}key slot");
        let key = hkdf(stretched.bytes(), &salt, info.as_bytes())?;
        AeadKey::new(place.cipher, &key)
    }

    fn associated(&self, place: SlotPlace) -> String {
        let (memory, iterations, parallelism) = self.argon2.map_or((0, 0, 0), |cost| {
            (cost.memory_kib, cost.iterations, cost.parallelism)
        });
        let (vault, id) = (hex(&place.vault), &self.id);
        let (kind, cipher) = (self.kind.name(), place.cipher.name());
        format!(
            "{CONTEXT}key slot\n{vault}\n{id}\n{kind}\n{cipher}\n{memory}\n{iterations}\n{parallelism}\n"
        )
    }

    fn is_valid(&self) -> bool {
        let has_cost = match self.kind {
            SlotKind::Passphrase => self.argon2.is_some_and(|cost| cost.is_valid()),
            SlotKind::KeyFile => self.argon2.is_none(),
        };
        has_cost
            && from_hex::<4>(&self.id).is_some()
            && is_valid_label(&self.label)
            && from_hex::<16>(&self.salt).is_some()
            && from_hex::<NONCE_BYTES>(&self.nonce).is_some()
            && from_hex::<WRAPPED_BYTES>(&self.wrapped).is_some()
    }
}

fn is_valid_label(label: &str) -> bool {
    label.len() <= LABEL_BYTES_MAX && !label.chars().any(char::is_control)
}

/// The slots of a vault.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeyTable {
    /// Number of the table, as in its key.
    pub number: u64,
    /// The slots.
    pub slots: Vec<KeySlot>,
}

/// The line that stands in place of a table that another one has replaced.
pub fn replaced_line(next: u64) -> String {
    format!("{{\"replaced_by\":{next}}}\n")
}

fn check_line(check: &[u8; 32]) -> String {
    format!("{{\"check\":\"{}\"}}\n", hex(check))
}

/// Splits the first line off, with its line feed.
fn split(object: &[u8]) -> Option<(&[u8], &[u8])> {
    let end = object.iter().position(|byte| *byte == b'\n')? + 1;
    Some(object.split_at(end))
}

impl KeyTable {
    /// Reads a table. What it says is not to be believed before [`Self::check`].
    ///
    /// # Errors
    ///
    /// What is wrong, in words that follow the object's name.
    pub fn decode(object: &[u8], number: u64) -> std::result::Result<Self, String> {
        if object.len() > TABLE_BYTES_MAX {
            return Err("it is too large for a key table".to_owned());
        }
        let (line, _) = split(object).ok_or("it is cut short")?;
        let table: Self =
            serde_json::from_slice(line).map_err(|error| format!("it is no key table: {error}"))?;
        let mut ids = BTreeSet::new();
        if table.number != number {
            return Err(format!("it is key table {}", table.number));
        }
        if !(1..=SLOTS_MAX).contains(&table.slots.len())
            || !table
                .slots
                .iter()
                .all(|slot| slot.is_valid() && ids.insert(&slot.id))
        {
            return Err("its key slots are invalid".to_owned());
        }
        Ok(table)
    }

    /// Whether the object with a table was made by somebody who had the root key, for this vault.
    pub fn check(object: &[u8], sealing: &Sealing, vault_file: &[u8]) -> bool {
        split(object).is_some_and(|(line, behind)| {
            behind == check_line(&sealing.table_check(vault_file, line)).as_bytes()
        })
    }

    /// The bytes of the object.
    ///
    /// # Errors
    ///
    /// It cannot be written as JSON.
    pub fn encode(&self, sealing: &Sealing, vault_file: &[u8]) -> std::io::Result<Vec<u8>> {
        let mut object = serde_json::to_vec(self)?;
        object.push(b'\n');
        let check = check_line(&sealing.table_check(vault_file, &object));
        object.extend_from_slice(check.as_bytes());
        Ok(object)
    }

    /// The root key, by the first slot that the secret opens.
    ///
    /// # Errors
    ///
    /// As for [`KeySlot::open`].
    pub fn open(&self, place: SlotPlace, secret: &UserSecret) -> Result<Option<Secret<32>>> {
        for slot in &self.slots {
            if let Some(root) = slot.open(place, secret)? {
                return Ok(Some(root));
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
#[path = "slots_tests.rs"]
mod tests;
