//! Records: small documents of a machine beside its recovery points, each under a key of its own. Pure.
//!
//! The bytes are a header of 48 bytes and a compressed JSON document, or in an encrypted vault the same document, sealed;
//! `docs/vault-format.md` is the specification. What a record is, of which machine, and under which name it stands is covered:
//! none opens as another.

use serde::Serialize;
use serde::de::DeserializeOwned;
use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::keys::derive::Sealing;
use crate::keys::envelope::Envelope;
use crate::keys::{Check, Keys};

/// First bytes of a record.
pub const MAGIC: [u8; 8] = *b"TMREC\r\n\x1a";
/// Largest document that is read, in bytes.
const DOCUMENT_BYTES_MAX: u64 = 1 << 30;
/// As for manifests.
const ZSTD_LEVEL: i32 = 3;

/// Versions of the format, plain and sealed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
enum Version {
    /// A Zstandard frame of JSON.
    First = 1,
}

/// Head of a record of a plain vault.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Header {
    magic: [u8; 8],
    version: U32,
    flags: U32,
    document_bytes: U64,
    stored_bytes: U64,
    /// Check of the identity, of the header before it and of the stored bytes.
    check: Check,
}

const HEADER_BYTES: usize = size_of::<Header>();
const _: () = assert!(HEADER_BYTES == 48);
const CHECKED_BYTES: usize = std::mem::offset_of!(Header, check);
const _: () = assert!(CHECKED_BYTES == 32);

/// Which record it is.
#[derive(Clone, Copy, Debug)]
pub struct RecordId<'a> {
    /// Its kind, such as `pin`.
    pub kind: &'a str,
    /// Identity of the vault, as 32 hexadecimal digits.
    pub vault: &'a str,
    /// Name of the machine.
    pub machine: &'a str,
    /// The last part of its key.
    pub name: &'a str,
}

impl RecordId<'_> {
    /// What the check of a plain vault covers first.
    fn identity(&self) -> String {
        let Self {
            kind,
            vault,
            machine,
            name,
        } = self;
        format!("tidemark vault 1 {kind}\n{vault}\n{machine}\n{name}\n")
    }

    fn sealed_identity(&self, sealing: &Sealing) -> String {
        sealing.identity(self.kind, &[self.machine, self.name])
    }
}

fn envelope<'a>(sealing: &'a Sealing, identity: &'a str) -> Envelope<'a> {
    Envelope {
        magic: MAGIC,
        version: Version::First as u32,
        cipher: sealing.cipher(),
        material: &sealing.records,
        identity,
    }
}

/// The bytes of the object.
///
/// # Errors
///
/// The document cannot be written, compressed or sealed.
pub fn encode<T: Serialize>(
    document: &T,
    keys: &Keys,
    id: &RecordId<'_>,
) -> std::io::Result<Vec<u8>> {
    let document = serde_json::to_vec(document)?;
    let stored = zstd::bulk::compress(&document, ZSTD_LEVEL)?;
    let document_bytes = document.len() as u64;
    if let Some(sealing) = keys.sealing() {
        let text = [&document_bytes.to_le_bytes()[..], &stored].concat();
        let sealed = envelope(sealing, &id.sealed_identity(sealing)).seal(&text);
        return sealed.map_err(std::io::Error::other);
    }
    let mut header = Header {
        magic: MAGIC,
        version: (Version::First as u32).into(),
        flags: 0.into(),
        document_bytes: document_bytes.into(),
        stored_bytes: (stored.len() as u64).into(),
        check: [0; 16],
    };
    header.check = check(&header, &stored, keys, id);
    Ok([header.as_bytes(), &stored].concat())
}

/// Reads and checks the bytes of an object that is to be this record.
///
/// # Errors
///
/// What is wrong, in words that follow the object's name.
pub fn decode<T: DeserializeOwned>(
    bytes: &[u8],
    keys: &Keys,
    id: &RecordId<'_>,
) -> Result<T, String> {
    if let Some(sealing) = keys.sealing() {
        let text = envelope(sealing, &id.sealed_identity(sealing)).open(bytes)?;
        let (size, stored) = text.split_first_chunk().ok_or("it is cut short")?;
        return decode_document(stored, u64::from_le_bytes(*size));
    }
    let (header, stored) =
        Header::read_from_prefix(bytes).map_err(|_| "it is cut short".to_owned())?;
    if header.magic != MAGIC {
        return Err("it does not begin like what it is named".to_owned());
    }
    if header.check != check(&header, stored, keys, id) {
        return Err("it is damaged, or it stands in another object's place".to_owned());
    }
    let version = header.version.get();
    if version != Version::First as u32 || header.flags.get() != 0 {
        return Err(format!(
            "it has version {version}, which this program does not know: use a newer one"
        ));
    }
    if header.stored_bytes.get() != stored.len() as u64 {
        return Err("its header contradicts its size".to_owned());
    }
    decode_document(stored, header.document_bytes.get())
}

fn check(header: &Header, stored: &[u8], keys: &Keys, id: &RecordId<'_>) -> Check {
    let identity = id.identity();
    keys.check(&[
        identity.as_bytes(),
        &header.as_bytes()[..CHECKED_BYTES],
        stored,
    ])
}

fn decode_document<T: DeserializeOwned>(stored: &[u8], document_bytes: u64) -> Result<T, String> {
    if document_bytes > DOCUMENT_BYTES_MAX {
        return Err("its header contradicts its size".to_owned());
    }
    let document = zstd::bulk::decompress(stored, document_bytes as usize)
        .map_err(|error| format!("it cannot be decompressed: {error}"))?;
    if document.len() as u64 != document_bytes {
        return Err("its header contradicts its size".to_owned());
    }
    serde_json::from_slice(&document).map_err(|error| format!("its document is malformed: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::aead::Cipher;
    use crate::keys::secret::Secret;
    use proptest::prelude::*;

    const VAULT: &str = "00000000000000000000000000000000";

    fn id() -> RecordId<'static> {
        RecordId {
            kind: "pin",
            vault: VAULT,
            machine: "web",
            name: "1",
        }
    }

    fn all_keys() -> [Keys; 2] {
        let root = Secret::copy_of(&[1; 32]);
        [
            Keys::derive(&[1; 32]),
            Keys::derive_sealing(&root, [0; 16], Cipher::Aes256Gcm).unwrap(),
        ]
    }

    #[test]
    fn it_opens_as_what_it_is_and_as_nothing_else() {
        let document = vec!["some".to_owned(), "text".to_owned()];
        let [plain, sealed] = all_keys();
        for (keys, other) in [(&plain, &sealed), (&sealed, &plain)] {
            let bytes = encode(&document, keys, &id()).unwrap();
            assert_eq!(decode(&bytes, keys, &id()).as_ref(), Ok(&document));
            let wrong = [
                RecordId {
                    kind: "pan",
                    ..id()
                },
                RecordId {
                    machine: "wab",
                    ..id()
                },
                RecordId { name: "2", ..id() },
            ];
            for wrong in wrong {
                assert!(decode::<Vec<String>>(&bytes, keys, &wrong).is_err());
            }
            assert!(decode::<Vec<String>>(&bytes, other, &id()).is_err());
            assert!(decode::<u64>(&bytes, keys, &id()).is_err());
        }
        let elsewhere = RecordId {
            vault: "01000000000000000000000000000000",
            ..id()
        };
        let bytes = encode(&document, &plain, &id()).unwrap();
        assert!(decode::<Vec<String>>(&bytes, &plain, &elsewhere).is_err());
    }

    proptest! {
        #[test]
        fn a_changed_byte_shows(text in ".{0,200}", at in any::<prop::sample::Index>(), change in 1u8..) {
            for keys in all_keys() {
                let mut bytes = encode(&text, &keys, &id()).unwrap();
                let at = at.index(bytes.len());
                prop_assert!(decode::<String>(&bytes[..at], &keys, &id()).is_err());
                bytes[at] ^= change;
                prop_assert!(decode::<String>(&bytes, &keys, &id()).is_err());
            }
        }

        #[test]
        fn garbage_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            for keys in all_keys() {
                prop_assert!(decode::<String>(&bytes, &keys, &id()).is_err());
            }
        }
    }
}
