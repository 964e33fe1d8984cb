//! The keys of a vault, all derived from its root key. Pure.
//!
//! A plain vault has two, by BLAKE3. An encrypted one has one for each use, by HKDF; those of single objects are
//! made of them with a salt and with a text that says what the object is.

use std::fmt;
use std::sync::Arc;

use aws_lc_rs::hkdf::{HKDF_SHA256, Salt};
use aws_lc_rs::hmac;

use super::aead::Cipher;
use super::secret::Secret;
use super::{Check, Fingerprint, hex};
use crate::error::{Error, ErrorKind, Result};

/// Context for the key of fingerprints of a plain vault, as BLAKE3's key derivation wants it.
const FINGERPRINT_CONTEXT: &str = "tidemark vault 1 fingerprints of blocks";
/// Context for the key of checks of a plain vault.
const CHECK_CONTEXT: &str = "tidemark vault 1 checks of structures";
/// Begin of all contexts of an encrypted vault.
pub const CONTEXT: &str = "tidemark vault 2 ";

/// HKDF with SHA-256, RFC 5869: 32 bytes.
///
/// # Errors
///
/// The library fails.
pub fn hkdf(material: &[u8], salt: &[u8], info: &[u8]) -> Result<Secret<32>> {
    let extracted = Salt::new(HKDF_SHA256, salt).extract(material);
    let failed = |_| Error::new(ErrorKind::Io, "Cannot derive a key");
    let parts = [info];
    let expanded = extracted.expand(&parts, HKDF_SHA256).map_err(failed)?;
    Secret::filled(|bytes| expanded.fill(bytes).map_err(failed))
}

/// The keys of one vault. Clones share them; the last one wipes them.
#[derive(Clone)]
pub struct Keys(Arc<KeySet>);

struct KeySet {
    fingerprint: Secret<32>,
    check: Secret<32>,
    sealing: Option<Sealing>,
}

/// What an encrypted vault has beyond a plain one.
pub struct Sealing {
    vault: [u8; 16],
    cipher: Cipher,
    tables: Secret<32>,
    names: Secret<32>,
    /// Key material of claims.
    pub claims: Secret<32>,
    /// Key material of manifests.
    pub manifests: Secret<32>,
    /// Key material of segments.
    pub segments: Secret<32>,
    /// Key material of records.
    pub records: Secret<32>,
}

impl Keys {
    /// The keys of a plain vault.
    pub fn derive(root: &[u8; 32]) -> Self {
        let derive = |context| Secret::copy_of(&blake3::derive_key(context, root));
        Self(Arc::new(KeySet {
            fingerprint: derive(FINGERPRINT_CONTEXT),
            check: derive(CHECK_CONTEXT),
            sealing: None,
        }))
    }

    /// The keys of an encrypted vault.
    ///
    /// # Errors
    ///
    /// The library fails.
    pub fn derive_sealing(root: &Secret<32>, vault: [u8; 16], cipher: Cipher) -> Result<Self> {
        let derive = |what: &str| hkdf(root.bytes(), &vault, format!("{CONTEXT}{what}").as_bytes());
        Ok(Self(Arc::new(KeySet {
            fingerprint: derive("fingerprints")?,
            check: derive("checks")?,
            sealing: Some(Sealing {
                vault,
                cipher,
                tables: derive("key tables")?,
                names: derive("names")?,
                claims: derive("claims")?,
                manifests: derive("manifests")?,
                segments: derive("segments")?,
                records: derive("records")?,
            }),
        })))
    }

    /// Fingerprint of one block.
    pub fn fingerprint(&self, block: &[u8]) -> Fingerprint {
        Fingerprint(cut(&blake3::keyed_hash(self.0.fingerprint.bytes(), block)))
    }

    /// Check of the parts of a structure, one behind the other.
    pub fn check(&self, parts: &[&[u8]]) -> Check {
        let mut hasher = blake3::Hasher::new_keyed(self.0.check.bytes());
        for part in parts {
            hasher.update(part);
        }
        cut(&hasher.finalize())
    }

    /// What the vault is sealed with; `None`: it is plain.
    pub fn sealing(&self) -> Option<&Sealing> {
        self.0.sealing.as_ref()
    }

    /// What stands for a machine in keys of objects.
    pub fn machine_in_keys(&self, machine: &str) -> String {
        match self.sealing() {
            None => machine.to_owned(),
            Some(sealing) => sealing.name(&format!("machine\n{machine}")),
        }
    }

    /// What stands for a disk in keys of objects.
    pub fn disk_in_keys(&self, machine: &str, disk: &str) -> String {
        match self.sealing() {
            None => disk.to_owned(),
            Some(sealing) => sealing.name(&format!("disk\n{machine}\n{disk}")),
        }
    }
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Keys")
    }
}

impl Sealing {
    /// What everything is sealed with.
    pub fn cipher(&self) -> Cipher {
        self.cipher
    }

    /// What an object is, as its key and its associated data say it.
    pub fn identity(&self, kind: &str, parts: &[&str]) -> String {
        let mut text = format!("{CONTEXT}{kind}\n{}\n", hex(&self.vault));
        for part in parts {
            text.push_str(part);
            text.push('\n');
        }
        text
    }

    /// Check of a key table: of the vault's own file, and of the line of the table.
    pub fn table_check(&self, vault_file: &[u8], line: &[u8]) -> [u8; 32] {
        let length = (vault_file.len() as u64).to_le_bytes();
        mac(&self.tables, &[&length, vault_file, line])
    }

    fn name(&self, text: &str) -> String {
        let [half @ .., _, _, _, _, _, _, _, _, _, _, _, _, _, _, _, _] =
            mac(&self.names, &[text.as_bytes()]);
        let half: [u8; 16] = half;
        hex(&half)
    }
}

fn mac(key: &Secret<32>, parts: &[&[u8]]) -> [u8; 32] {
    let key = hmac::Key::new(hmac::HMAC_SHA256, key.bytes());
    let mut context = hmac::Context::with_key(&key);
    parts.iter().for_each(|part| context.update(part));
    let mut bytes = [0; 32];
    bytes.copy_from_slice(context.sign().as_ref());
    bytes
}

fn cut(hash: &blake3::Hash) -> [u8; 16] {
    let mut half = [0; 16];
    half.copy_from_slice(&hash.as_bytes()[..16]);
    half
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_differ_by_vault_and_use() {
        let (one, two) = (Keys::derive(&[1; 32]), Keys::derive(&[2; 32]));
        let block = [7; 4096];
        assert_eq!(one.fingerprint(&block), one.fingerprint(&block));
        assert_ne!(one.fingerprint(&block), two.fingerprint(&block));
        assert_ne!(one.fingerprint(&block).0, one.check(&[&block]));
        assert_eq!(one.check(&[b"ab", b"c"]), one.check(&[b"abc"]));
    }

    fn sealing(root: u8, vault: u8) -> Keys {
        let root = Secret::copy_of(&[root; 32]);
        Keys::derive_sealing(&root, [vault; 16], Cipher::Aes256Gcm).unwrap()
    }

    #[test]
    fn keys_of_encrypted_vaults_differ_by_root_vault_and_use() {
        let all = [sealing(1, 1), sealing(1, 2), sealing(2, 1)];
        let mut seen = std::collections::HashSet::new();
        for keys in &all {
            let it = keys.sealing().unwrap();
            let set = [&keys.0.fingerprint, &keys.0.check, &it.tables, &it.names];
            let objects = [&it.claims, &it.manifests, &it.segments, &it.records];
            for key in set.into_iter().chain(objects) {
                assert!(seen.insert(*key.bytes()));
            }
            for name in ["zeta", "yotta"] {
                assert!(seen.insert(mac(&it.names, &[name.as_bytes()])));
                let machine = keys.machine_in_keys(name);
                assert!(machine.len() == 32 && !machine.contains(name));
                assert_ne!(machine, keys.disk_in_keys(name, name));
                assert_ne!(
                    keys.disk_in_keys("zeta", name),
                    keys.disk_in_keys("yotta", name)
                );
            }
        }
        assert_eq!(Keys::derive(&[1; 32]).machine_in_keys("a"), "a");
    }

    /// The first test case of RFC 5869, cut to 32 bytes, and the second of RFC 4231.
    #[test]
    fn known_answers() {
        let info: Vec<u8> = (0xf0..=0xf9).collect();
        let salt: Vec<u8> = (0..=0x0c).collect();
        let made = hkdf(&[0x0b; 22], &salt, &info).unwrap();
        assert_eq!(
            hex(made.bytes()),
            "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf"
        );
        let mut key = [0; 32];
        key[..4].copy_from_slice(b"Jefe");
        let made = mac(
            &Secret::copy_of(&key),
            &[b"what do ya want ", b"for nothing?"],
        );
        assert_eq!(
            hex(&made),
            "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"
        );
    }
}
