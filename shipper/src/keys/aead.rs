//! Authenticated encryption: ciphers, nonces, and sealed texts with their tag apart. Pure.
//!
//! Every key seals one object, by a salt of its own; so a nonce only has to be unique in its object.

use aws_lc_rs::aead::{AES_256_GCM, Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use serde::{Deserialize, Serialize};
use zerocopy::byteorder::little_endian::U32;
use zerocopy::{Immutable, IntoBytes, KnownLayout, Unaligned};

use super::secret::Secret;
use crate::error::{Error, ErrorKind, Result};

/// Bytes of a tag, of either cipher.
pub const TAG_BYTES: usize = 16;
/// Bytes of a nonce, of either cipher.
pub const NONCE_BYTES: usize = size_of::<NonceFields>();
const _: () = assert!(NONCE_BYTES == 12);

/// The tag of a sealed text.
pub type Tag = [u8; TAG_BYTES];

/// What everything in a vault is sealed with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Cipher {
    /// AES with a key of 256 bits in Galois/counter mode.
    #[serde(rename = "aes-256-gcm")]
    Aes256Gcm,
    /// ChaCha20 with Poly1305, for processors without instructions for AES.
    #[serde(rename = "chacha20-poly1305")]
    ChaCha20Poly1305,
}

impl Cipher {
    /// The faster one on this processor.
    pub fn preferred() -> Self {
        if has_aes() {
            Self::Aes256Gcm
        } else {
            Self::ChaCha20Poly1305
        }
    }

    /// The name in formats.
    pub fn name(self) -> &'static str {
        match self {
            Self::Aes256Gcm => "aes-256-gcm",
            Self::ChaCha20Poly1305 => "chacha20-poly1305",
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn has_aes() -> bool {
    std::arch::is_x86_feature_detected!("aes") && std::arch::is_x86_feature_detected!("pclmulqdq")
}

#[cfg(target_arch = "aarch64")]
fn has_aes() -> bool {
    std::arch::is_aarch64_feature_detected!("aes")
        && std::arch::is_aarch64_feature_detected!("pmull")
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn has_aes() -> bool {
    false
}

/// What a text is in its object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Domain {
    /// All of a claim or manifest.
    Whole = 0,
    /// A frame of a segment.
    Frame = 1,
    /// The directory of a segment.
    Directory = 2,
}

/// A nonce by its parts.
#[derive(Clone, Copy, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct NonceFields {
    domain: u8,
    zeroes: [u8; 3],
    number: U32,
    zeroes_behind: U32,
}

/// The nonce of a text in its object.
pub fn nonce(domain: Domain, number: u32) -> [u8; NONCE_BYTES] {
    let fields = NonceFields {
        domain: domain as u8,
        zeroes: [0; 3],
        number: number.into(),
        zeroes_behind: 0.into(),
    };
    zerocopy::transmute!(fields)
}

/// A key of a cipher, ready for use. The library wipes it when it is dropped.
pub struct AeadKey(LessSafeKey);

impl std::fmt::Debug for AeadKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("AeadKey")
    }
}

impl AeadKey {
    /// Prepares a key.
    ///
    /// # Errors
    ///
    /// The library has no memory for it.
    pub fn new(cipher: Cipher, key: &Secret<32>) -> Result<Self> {
        let algorithm = match cipher {
            Cipher::Aes256Gcm => &AES_256_GCM,
            Cipher::ChaCha20Poly1305 => &CHACHA20_POLY1305,
        };
        UnboundKey::new(algorithm, key.bytes())
            .map(|key| Self(LessSafeKey::new(key)))
            .map_err(|_| Error::new(ErrorKind::Io, "Cannot prepare a key for encryption"))
    }

    /// Seals a text in place. `associated` is covered as well.
    ///
    /// # Errors
    ///
    /// The text is longer than the cipher takes, 64 GiB.
    pub fn seal(
        &self,
        nonce: [u8; NONCE_BYTES],
        associated: &[u8],
        text: &mut [u8],
    ) -> Result<Tag> {
        let nonce = Nonce::assume_unique_for_key(nonce);
        let failed = || Error::new(ErrorKind::Invalid, "Cannot encrypt: the text is too long");
        let tag = self
            .0
            .seal_in_place_separate_tag(nonce, Aad::from(associated), text)
            .map_err(|_| failed())?;
        tag.as_ref().try_into().map_err(|_| failed())
    }

    /// Opens a text in place. `None`: text, tag, nonce or associated data are not those that were sealed; the
    /// text is zero then.
    pub fn open(
        &self,
        nonce: [u8; NONCE_BYTES],
        associated: &[u8],
        tag: &Tag,
        text: &mut [u8],
    ) -> Option<()> {
        let nonce = Nonce::assume_unique_for_key(nonce);
        let opened = self
            .0
            .open_in_place_separate_tag(nonce, Aad::from(associated), tag, text)
            .is_ok();
        if !opened {
            text.fill(0);
        }
        opened.then_some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const CIPHERS: [Cipher; 2] = [Cipher::Aes256Gcm, Cipher::ChaCha20Poly1305];

    fn key(cipher: Cipher, byte: u8) -> AeadKey {
        AeadKey::new(cipher, &Secret::copy_of(&[byte; 32])).unwrap()
    }

    #[test]
    fn nonces_are_laid_out_as_documented() {
        assert_eq!(
            nonce(Domain::Frame, 0x0403_0201),
            [1, 0, 0, 0, 1, 2, 3, 4, 0, 0, 0, 0]
        );
        assert_eq!(nonce(Domain::Whole, 0), [0; 12]);
        assert_ne!(nonce(Domain::Directory, 0), nonce(Domain::Frame, 0));
    }

    #[test]
    fn names_are_those_of_the_format() {
        for cipher in CIPHERS {
            let text = serde_json::to_string(&cipher).unwrap();
            assert_eq!(text, format!("\"{}\"", cipher.name()));
        }
    }

    /// Test case 16 of the description of AES-GCM by its authors, whose text has no whole last block.
    #[test]
    fn a_known_answer_of_aes_gcm() {
        let bytes = |text: &str| -> Vec<u8> {
            let digit = |at: usize| u8::from_str_radix(&text[at..at + 2], 16).unwrap();
            (0..text.len()).step_by(2).map(digit).collect()
        };
        let half = bytes("feffe9928665731c6d6a8f9467308308");
        let key: [u8; 32] = [&half[..], &half].concat().try_into().unwrap();
        let mut text = bytes(
            "d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a721c3c0c95956809532fcf0e2449a6b525b16aedf5aa0de657ba637b39",
        );
        let key = AeadKey::new(Cipher::Aes256Gcm, &Secret::copy_of(&key)).unwrap();
        let nonce: [u8; 12] = bytes("cafebabefacedbaddecaf888").try_into().unwrap();
        let associated = bytes("feedfacedeadbeeffeedfacedeadbeefabaddad2");
        let tag = key.seal(nonce, &associated, &mut text).unwrap();
        assert_eq!(
            text,
            bytes(
                "522dc1f099567d07f47f37a32a84427d643a8cdcbfe5c0c97598a2bd2555d1aa8cb08e48590dbb3da7b08b1056828838c5f61e6393ba7a0abcc9f662"
            )
        );
        assert_eq!(tag[..], bytes("76fc6ece0f4e1768cddf8853bb2d551b"));
    }

    proptest! {
        #[test]
        fn only_what_was_sealed_opens(
            text in prop::collection::vec(any::<u8>(), 1..300),
            associated in prop::collection::vec(any::<u8>(), 1..100),
            number: u32, at in any::<prop::sample::Index>(), change in 1u8..,
        ) {
            for cipher in CIPHERS {
                let nonce = nonce(Domain::Frame, number);
                let mut sealed = text.clone();
                let tag = key(cipher, 1).seal(nonce, &associated, &mut sealed).unwrap();
                let open = |key: &AeadKey, nonce, associated: &[u8], tag: &Tag, sealed: &[u8]| {
                    let mut opened = sealed.to_vec();
                    let result = key.open(nonce, associated, tag, &mut opened);
                    assert!(result.is_some() || opened.iter().all(|byte| *byte == 0));
                    result.map(|()| opened)
                };
                let right = open(&key(cipher, 1), nonce, &associated, &tag, &sealed);
                prop_assert_eq!(right.as_ref(), Some(&text));
                let changed = |bytes: &[u8]| {
                    let mut bytes = bytes.to_vec();
                    let at = at.index(bytes.len());
                    bytes[at] ^= change;
                    bytes
                };
                let other: [u8; 12] = changed(&nonce).try_into().unwrap();
                let other_tag: Tag = changed(&tag).try_into().unwrap();
                prop_assert_eq!(open(&key(cipher, 2), nonce, &associated, &tag, &sealed), None);
                prop_assert_eq!(open(&key(cipher, 1), other, &associated, &tag, &sealed), None);
                prop_assert_eq!(open(&key(cipher, 1), nonce, &changed(&associated), &tag, &sealed), None);
                prop_assert_eq!(open(&key(cipher, 1), nonce, &associated, &other_tag, &sealed), None);
                prop_assert_eq!(open(&key(cipher, 1), nonce, &associated, &tag, &changed(&sealed)), None);
            }
        }
    }
}
