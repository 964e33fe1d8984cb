//! The keys of a vault and what is computed with them.
//!
//! A fingerprint decides whether a block is unchanged, so it is a keyed hash: nobody can make two
//! blocks with the same one without the key. Checks cover everything else that a vault holds.

use std::fmt;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Context for the key of fingerprints, as BLAKE3's key derivation wants it.
const FINGERPRINT_CONTEXT: &str = "tidemark vault 1 fingerprints of blocks";
/// Context for the key of checks.
const CHECK_CONTEXT: &str = "tidemark vault 1 checks of structures";

/// Keyed BLAKE3 of a block of 4 KiB as the vault holds it, cut to 128 bits.
#[derive(
    Clone, Copy, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct Fingerprint(pub [u8; 16]);

impl Fingerprint {
    /// Stands for "not known" in the fingerprint table. No block is expected to have it.
    pub const UNKNOWN: Self = Self([0; 16]);
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", hex(&self.0))
    }
}

/// Keyed BLAKE3 of a structure, cut to 128 bits.
pub type Check = [u8; 16];

/// The keys of one vault.
#[derive(Clone)]
pub struct Keys {
    fingerprint: [u8; 32],
    check: [u8; 32],
}

impl Keys {
    /// Derives the keys from the vault's root key.
    pub fn derive(root: &[u8; 32]) -> Self {
        Self {
            fingerprint: blake3::derive_key(FINGERPRINT_CONTEXT, root),
            check: blake3::derive_key(CHECK_CONTEXT, root),
        }
    }

    /// Fingerprint of one block.
    pub fn fingerprint(&self, block: &[u8]) -> Fingerprint {
        Fingerprint(cut(&blake3::keyed_hash(&self.fingerprint, block)))
    }

    /// Check of the parts of a structure, one behind the other.
    pub fn check(&self, parts: &[&[u8]]) -> Check {
        let mut hasher = blake3::Hasher::new_keyed(&self.check);
        for part in parts {
            hasher.update(part);
        }
        cut(&hasher.finalize())
    }
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Keys")
    }
}

fn cut(hash: &blake3::Hash) -> [u8; 16] {
    let mut half = [0; 16];
    half.copy_from_slice(&hash.as_bytes()[..16]);
    half
}

/// Bytes as lower-case hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Reads exactly `N` bytes from hexadecimal digits.
pub fn from_hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    if text.len() != 2 * N || !text.is_ascii() {
        return None;
    }
    let mut bytes = [0; N];
    for (index, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(text.get(2 * index..2 * index + 2)?, 16).ok()?;
    }
    Some(bytes)
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

    #[test]
    fn hexadecimal_digits_round_trip() {
        assert_eq!(from_hex::<3>(&hex(&[0, 0xab, 255])), Some([0, 0xab, 255]));
        for bad in ["", "00", "zz00ff", "00ffé"] {
            assert_eq!(from_hex::<3>(bad), None, "{bad}");
        }
    }
}
