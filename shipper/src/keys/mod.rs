//! The keys of a vault and what is computed with them.
//!
//! A fingerprint decides whether a block is unchanged, so it is a keyed hash: nobody can make two
//! blocks with the same one without the key. Checks cover everything else that a plain vault holds; what an
//! encrypted one holds is sealed.
//!
//! [`secret`] wipes what is secret, [`slots`] are the ways to the root key, [`derive`] makes all other keys of it,
//! [`aead`] seals with them, [`envelope`] seals small objects as a whole, [`source`] is where secrets come from.

pub mod aead;

pub mod derive;

pub mod envelope;

pub mod secret;

pub mod slots;

pub mod source;

use std::fmt;

pub use derive::Keys;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

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

/// Bytes as lower-case hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Reads exactly `N` bytes from hexadecimal digits.
pub fn from_hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    // A sign, which the library would take, is none of them.
    if text.len() != 2 * N || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
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
    fn hexadecimal_digits_round_trip() {
        assert_eq!(from_hex::<3>(&hex(&[0, 0xab, 255])), Some([0, 0xab, 255]));
        for bad in ["", "00", "zz00ff", "00ffé", "00ff+1"] {
            assert_eq!(from_hex::<3>(bad), None, "{bad}");
        }
    }
}
