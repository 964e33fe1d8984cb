//! Small objects that are sealed as a whole: a header with a salt, and one sealed text. Pure.
//!
//! The header has no field that is not covered. The key is made of the salt and of what the object is, so a
//! text opens as nothing else.

use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::aead::{AeadKey, Cipher, Domain, TAG_BYTES, Tag, nonce};
use super::derive::hkdf;
use super::secret::{Secret, random};
use crate::error::Result;

/// Head of a sealed object.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct SealedHeader {
    magic: [u8; 8],
    version: U32,
    flags: U32,
    salt: [u8; 32],
    sealed_bytes: U64,
    reserved: U64,
}

const HEADER_BYTES: usize = size_of::<SealedHeader>();
const _: () = assert!(HEADER_BYTES == 64);

/// A kind of sealed objects.
#[derive(Clone, Copy, Debug)]
pub struct Envelope<'a> {
    /// First bytes of an object.
    pub magic: [u8; 8],
    /// The version that is written and read.
    pub version: u32,
    /// What the text is sealed with.
    pub cipher: Cipher,
    /// Key material of this kind of objects.
    pub material: &'a Secret<32>,
    /// What the object is.
    pub identity: &'a str,
}

impl Envelope<'_> {
    /// Seals a text; returns the bytes of the object.
    ///
    /// # Errors
    ///
    /// The system has no random numbers, or the text is too long.
    pub fn seal(&self, text: &[u8]) -> Result<Vec<u8>> {
        let header = SealedHeader {
            magic: self.magic,
            version: self.version.into(),
            flags: 0.into(),
            salt: random()?,
            sealed_bytes: ((text.len() + TAG_BYTES) as u64).into(),
            reserved: 0.into(),
        };
        let mut object = header.as_bytes().to_vec();
        object.extend_from_slice(text);
        let key = self.key(&header)?;
        let associated = self.associated(&header);
        let tag = key.seal(
            nonce(Domain::Whole, 0),
            &associated,
            &mut object[HEADER_BYTES..],
        )?;
        object.extend_from_slice(&tag);
        Ok(object)
    }

    /// Opens an object; returns its text.
    ///
    /// # Errors
    ///
    /// What is wrong, in words that follow the object's name.
    pub fn open(&self, object: &[u8]) -> std::result::Result<Vec<u8>, String> {
        let (header, sealed) =
            SealedHeader::read_from_prefix(object).map_err(|_| "it is cut short".to_owned())?;
        if header.magic != self.magic {
            return Err("it does not begin like what it is named".to_owned());
        }
        let version = header.version.get();
        if version != self.version {
            return Err(format!(
                "it has version {version}, which this program does not know in an encrypted vault: use a newer one"
            ));
        }
        let text_bytes = sealed.len().checked_sub(TAG_BYTES);
        let (true, Some(text_bytes)) =
            (header.sealed_bytes.get() == sealed.len() as u64, text_bytes)
        else {
            return Err("its header contradicts its size".to_owned());
        };
        let (text, tag) = sealed.split_at(text_bytes);
        let tag: Tag = tag.try_into().map_err(|_| "it is cut short".to_owned())?;
        let mut text = text.to_vec();
        let key = self.key(&header).map_err(|error| error.chain())?;
        key.open(
            nonce(Domain::Whole, 0),
            &self.associated(&header),
            &tag,
            &mut text,
        )
        .ok_or("it is damaged, or it stands in another object's place")?;
        Ok(text)
    }

    fn key(&self, header: &SealedHeader) -> Result<AeadKey> {
        let key = hkdf(
            self.material.bytes(),
            &header.salt,
            self.identity.as_bytes(),
        )?;
        AeadKey::new(self.cipher, &key)
    }

    fn associated(&self, header: &SealedHeader) -> Vec<u8> {
        [self.identity.as_bytes(), header.as_bytes()].concat()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn envelope<'a>(material: &'a Secret<32>, identity: &'a str) -> Envelope<'a> {
        Envelope {
            magic: *b"MAGICMAG",
            version: 3,
            cipher: Cipher::Aes256Gcm,
            material,
            identity,
        }
    }

    proptest! {
        #[test]
        fn it_opens_as_what_it_is_and_as_nothing_else(
            text in prop::collection::vec(any::<u8>(), 0..300), at in any::<prop::sample::Index>(), change in 1u8..,
        ) {
            let material = Secret::copy_of(&[1; 32]);
            let right = envelope(&material, "this");
            let object = right.seal(&text).unwrap();
            let opened = right.open(&object);
            prop_assert_eq!(opened.as_ref(), Ok(&text));
            prop_assert!(right.seal(&text).unwrap() != object, "another salt");
            let other = Secret::copy_of(&[2; 32]);
            for wrong in [
                envelope(&material, "that"),
                envelope(&other, "this"),
                Envelope { cipher: Cipher::ChaCha20Poly1305, ..right },
                Envelope { version: 4, ..right },
                Envelope { magic: *b"GAMICMAG", ..right },
            ] {
                prop_assert!(wrong.open(&object).is_err());
            }
            let mut changed = object.clone();
            let at = at.index(object.len());
            changed[at] ^= change;
            prop_assert!(right.open(&changed).is_err());
            prop_assert!(right.open(&object[..at]).is_err());
            changed[at] ^= change;
            changed.push(0);
            prop_assert!(right.open(&changed).is_err());
        }

        #[test]
        fn garbage_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let material = Secret::copy_of(&[1; 32]);
            let right = envelope(&material, "this");
            prop_assert!(right.open(&bytes).is_err());
            let mut headed = b"MAGICMAG\x03\0\0\0\0\0\0\0".to_vec();
            headed.extend_from_slice(&bytes);
            prop_assert!(right.open(&headed).is_err());
        }
    }
}
