//! What a vault says of itself: `vault.json`, of either format. Pure.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::layout::VAULT_KEY;
use crate::error::{Error, ErrorKind, Result};
use crate::keys::aead::Cipher;
use crate::keys::secret::{Secret, random};
use crate::keys::{from_hex, hex};

/// Formats of vaults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Format {
    /// Plain: the root key stands in the vault's own file.
    First = 1,
    /// Encrypted: key tables hold the root key.
    Second = 2,
}

/// What `vault.json` of a plain vault says.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct PlainFile {
    format: u64,
    vault: String,
    created: jiff::Timestamp,
    /// The root key, of which all keys are derived, in hexadecimal digits.
    root_key: String,
    /// Empty.
    key_slots: Vec<serde_json::Value>,
}

/// What `vault.json` of an encrypted vault says.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SealedFile {
    format: u64,
    vault: String,
    created: jiff::Timestamp,
    cipher: Cipher,
}

/// The format number alone, so that a vault of the future is named as one.
#[derive(Deserialize)]
struct FormatOnly {
    format: u64,
}

/// How a vault keeps its root key.
#[derive(Debug)]
pub enum Lock {
    /// It is plain, and this is the key.
    Plain(Secret<32>),
    /// It is sealed with this cipher, and key tables hold the key.
    Sealed(Cipher),
}

/// The vault's own file, read.
#[derive(Debug)]
pub struct VaultFile {
    /// Identity of the vault.
    pub id: [u8; 16],
    /// How it keeps its root key.
    pub lock: Lock,
    /// All bytes, which the check of a key table covers.
    pub bytes: Bytes,
}

impl VaultFile {
    /// The file of a new plain vault.
    ///
    /// # Errors
    ///
    /// The system has no random numbers.
    pub fn plain() -> Result<Self> {
        let (id, root) = (new_id(), Secret::random()?);
        let file = PlainFile {
            format: Format::First as u64,
            vault: hex(&id),
            created: jiff::Timestamp::now(),
            root_key: hex(root.bytes()),
            key_slots: Vec::new(),
        };
        Ok(Self {
            id,
            lock: Lock::Plain(root),
            bytes: encode(&file)?,
        })
    }

    /// The file of a new encrypted vault.
    ///
    /// # Errors
    ///
    /// The system has no random numbers.
    pub fn sealed(cipher: Cipher) -> Result<Self> {
        let id = random()?;
        let file = SealedFile {
            format: Format::Second as u64,
            vault: hex(&id),
            created: jiff::Timestamp::now(),
            cipher,
        };
        Ok(Self {
            id,
            lock: Lock::Sealed(cipher),
            bytes: encode(&file)?,
        })
    }

    /// Reads the file of the vault at an address.
    ///
    /// # Errors
    ///
    /// `Corrupt`: it is damaged, or belongs to something else. `Unsupported`: its format is not known.
    pub fn decode(bytes: Bytes, url: &str) -> Result<Self> {
        let invalid = |what: &str| {
            Error::new(
                ErrorKind::Corrupt,
                format!("{VAULT_KEY} of the vault at {url} {what}"),
            )
        };
        let damaged = |error: serde_json::Error| invalid("is damaged").with_source(error);
        let only: FormatOnly = serde_json::from_slice(&bytes).map_err(|error| {
            invalid("is damaged or belongs to something else").with_source(error)
        })?;
        let (vault, lock) = if only.format == Format::First as u64 {
            let file: PlainFile = serde_json::from_slice(&bytes).map_err(damaged)?;
            if !file.key_slots.is_empty() {
                return Err(invalid("has key slots, which this program does not know"));
            }
            let root = from_hex(&file.root_key).ok_or_else(|| invalid("has no valid root key"))?;
            (file.vault, Lock::Plain(Secret::copy_of(&root)))
        } else if only.format == Format::Second as u64 {
            let file: SealedFile = serde_json::from_slice(&bytes).map_err(damaged)?;
            (file.vault, Lock::Sealed(file.cipher))
        } else {
            let what = format!(
                "{VAULT_KEY} of the vault at {url} has format {}, this program knows {} and {}: use a newer one",
                only.format,
                Format::First as u64,
                Format::Second as u64
            );
            return Err(Error::new(ErrorKind::Unsupported, what));
        };
        let id = from_hex(&vault).ok_or_else(|| invalid("has no valid identity"))?;
        Ok(Self { id, lock, bytes })
    }
}

fn new_id() -> [u8; 16] {
    uuid::Uuid::new_v4().into_bytes()
}

fn encode(file: &impl Serialize) -> Result<Bytes> {
    let text = serde_json::to_string_pretty(file).map_err(|error| {
        Error::new(ErrorKind::Invalid, "Cannot write vault.json").with_source(error)
    })?;
    Ok(Bytes::from(text + "\n"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn new_files_are_read_again() {
        let plain = VaultFile::plain().unwrap();
        let again = VaultFile::decode(plain.bytes.clone(), "x").unwrap();
        let (Lock::Plain(one), Lock::Plain(two)) = (&plain.lock, &again.lock) else {
            panic!("not plain");
        };
        assert_eq!((plain.id, one), (again.id, two));
        for cipher in [Cipher::Aes256Gcm, Cipher::ChaCha20Poly1305] {
            let sealed = VaultFile::sealed(cipher).unwrap();
            let again = VaultFile::decode(sealed.bytes.clone(), "x").unwrap();
            assert_eq!(sealed.id, again.id);
            assert!(matches!(again.lock, Lock::Sealed(found) if found == cipher));
            let text = String::from_utf8(sealed.bytes.to_vec()).unwrap();
            assert!(!text.contains("root_key"), "{text}");
        }
    }

    #[test]
    fn others_are_refused_and_named() {
        for (text, kind, word) in [
            ("", ErrorKind::Corrupt, "damaged"),
            ("{\"format\": 3}", ErrorKind::Unsupported, "format 3"),
            (
                "{\"format\": 2, \"vault\": \"\"}",
                ErrorKind::Corrupt,
                "damaged",
            ),
            (
                "{\"format\": 2, \"vault\": \"00\", \"created\": \"2026-01-01T00:00:00Z\", \"cipher\": \"none\"}",
                ErrorKind::Corrupt,
                "damaged",
            ),
            (
                "{\"format\": 2, \"vault\": \"00\", \"created\": \"2026-01-01T00:00:00Z\", \"cipher\": \"aes-256-gcm\"}",
                ErrorKind::Corrupt,
                "identity",
            ),
        ] {
            let error = VaultFile::decode(Bytes::from(text), "file:///v").unwrap_err();
            assert_eq!(error.kind(), kind, "{text}");
            assert!(
                error.to_string().contains(word) && error.to_string().contains("file:///v"),
                "{error}"
            );
        }
    }

    proptest! {
        #[test]
        fn garbage_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(VaultFile::decode(Bytes::from(bytes), "x").is_err());
        }

        #[test]
        fn any_change_of_the_text_never_panics(
            at in any::<prop::sample::Index>(), with in "[0-9a-z\"{}:,\\[\\]-]{0,12}", gone in 0usize..12,
        ) {
            for whole in [VaultFile::plain().unwrap(), VaultFile::sealed(Cipher::Aes256Gcm).unwrap()] {
                let whole = &whole.bytes[..];
                let at = at.index(whole.len());
                let end = (at + gone).min(whole.len());
                let changed = [&whole[..at], with.as_bytes(), &whole[end..]].concat();
                if let Ok(file) = VaultFile::decode(Bytes::from(changed.clone()), "x") {
                    prop_assert_eq!(&file.bytes[..], &changed[..]);
                }
            }
        }
    }
}
