//! Manifests: one for each recovery point, complete in itself.
//!
//! The bytes are a header of 48 bytes and a compressed JSON document, or in an encrypted vault the same
//! document, sealed; `docs/vault-format.md` is the specification. A manifest lists all segments of each disk, oldest first: a block is what the
//! last segment says that has it, and zero if none has.

use serde::{Deserialize, Serialize};
use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use tracker::extent::{BLOCK_SIZE, Epoch};

use crate::keys::derive::Sealing;
use crate::keys::envelope::Envelope;
use crate::keys::{Check, Keys};
use crate::segment::reference::SegmentRef;

/// First bytes of a manifest.
pub const MAGIC: [u8; 8] = *b"TMMAN\r\n\x1a";
/// Largest document that is read, in bytes.
const DOCUMENT_BYTES_MAX: u64 = 1 << 30;
/// Documents are repetitive; a higher level hardly makes them smaller.
const ZSTD_LEVEL: i32 = 3;

/// Versions of the format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Version {
    /// A Zstandard frame of JSON under a keyed check.
    First = 1,
    /// The document may have `consistency` and `reason`. Written only where it has.
    Second = 2,
    /// Sealed; in encrypted vaults.
    Third = 3,
}

/// Head of a manifest.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Header {
    magic: [u8; 8],
    version: U32,
    flags: U32,
    document_bytes: U64,
    stored_bytes: U64,
    /// Check of the header before it and of the stored bytes.
    check: Check,
}

const HEADER_BYTES: usize = size_of::<Header>();
const _: () = assert!(HEADER_BYTES == 48);
const CHECKED_BYTES: usize = std::mem::offset_of!(Header, check);
const _: () = assert!(CHECKED_BYTES == 32);

/// Longest reason in a manifest, in bytes.
pub const REASON_BYTES_MAX: usize = 500;

/// For whom a recovery point is consistent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Consistency {
    /// The disks are as a power cut would have left them at that moment.
    #[default]
    Crash,
    /// What writes to them was brought to rest for the moment of the cut.
    Application,
}

impl Consistency {
    fn is_crash(&self) -> bool {
        *self == Self::Crash
    }
}

impl std::fmt::Display for Consistency {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Crash => "crash-consistent",
            Self::Application => "application-consistent",
        })
    }
}

/// A reason as a manifest takes it: without control characters, and not too long.
pub fn short_reason(reason: &str) -> String {
    let plain = |c: char| if c.is_control() { ' ' } else { c };
    let mut text: String = reason.chars().map(plain).collect();
    text.truncate(text.floor_char_boundary(REASON_BYTES_MAX));
    text
}

/// One disk at a recovery point.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskPoint {
    /// Name.
    pub name: String,
    /// Size in bytes.
    pub size_bytes: u64,
    /// Unit of the segments in bytes.
    pub block_bytes: u64,
    /// Journal that told what changed, as 32 hexadecimal digits.
    pub journal: String,
    /// Blocks that the journal called changed since the point before.
    pub dirty_blocks: u64,
    /// All segments, oldest first.
    pub segments: Vec<SegmentRef>,
}

/// What a manifest says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Identity of the vault.
    pub vault: String,
    /// Name of the machine.
    pub machine: String,
    /// Generation of the shipper that made it.
    pub generation: u64,
    /// The epoch that it is the end of.
    pub epoch: Epoch,
    /// The recovery point before it; zero if it is the first.
    pub previous: Epoch,
    /// When it was cut, by the clock of the machine; nothing depends on it.
    pub created: jiff::Timestamp,
    /// For whom it is consistent.
    #[serde(default, skip_serializing_if = "Consistency::is_crash")]
    pub consistency: Consistency,
    /// Why it is not consistent for applications, although that was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The disks of the machine.
    pub disks: Vec<DiskPoint>,
}

/// Which recovery point a manifest has to be of.
#[derive(Clone, Debug)]
pub struct PointId {
    /// Identity of the vault.
    pub vault: String,
    /// Name of the machine.
    pub machine: String,
    /// The epoch.
    pub epoch: Epoch,
}

fn identity(sealing: &Sealing, machine: &str, epoch: Epoch) -> String {
    sealing.identity("manifest", &[machine, &epoch.to_string()])
}

fn envelope<'a>(sealing: &'a Sealing, identity: &'a str) -> Envelope<'a> {
    Envelope {
        magic: MAGIC,
        version: Version::Third as u32,
        cipher: sealing.cipher(),
        material: &sealing.manifests,
        identity,
    }
}

impl Manifest {
    /// The bytes of the object.
    ///
    /// # Errors
    ///
    /// The document cannot be written, compressed or sealed.
    pub fn encode(&self, keys: &Keys) -> std::io::Result<Vec<u8>> {
        let document = serde_json::to_vec(self)?;
        let stored = zstd::bulk::compress(&document, ZSTD_LEVEL)?;
        if let Some(sealing) = keys.sealing() {
            let identity = identity(sealing, &self.machine, self.epoch);
            let mut text = (document.len() as u64).to_le_bytes().to_vec();
            text.extend_from_slice(&stored);
            let sealed = envelope(sealing, &identity).seal(&text);
            return sealed.map_err(std::io::Error::other);
        }
        let mut header = Header {
            magic: MAGIC,
            version: (self.version() as u32).into(),
            flags: 0.into(),
            document_bytes: (document.len() as u64).into(),
            stored_bytes: (stored.len() as u64).into(),
            check: [0; 16],
        };
        header.check = keys.check(&[&header.as_bytes()[..CHECKED_BYTES], &stored]);
        let mut bytes = header.as_bytes().to_vec();
        bytes.extend_from_slice(&stored);
        Ok(bytes)
    }

    /// Reads and checks the bytes of an object that is to be the manifest of this recovery point.
    ///
    /// # Errors
    ///
    /// What is wrong, in words that follow the object's name.
    pub fn decode(bytes: &[u8], keys: &Keys, id: &PointId) -> Result<Self, String> {
        let manifest = match keys.sealing() {
            None => Self::decode_plain(bytes, keys)?,
            Some(sealing) => Self::decode_sealed(bytes, sealing, id)?,
        };
        manifest.validate()?;
        manifest.expect(id)?;
        Ok(manifest)
    }

    /// Whether the bytes are whole, and of this recovery point in an encrypted vault: what whole bytes do not decode, a newer
    /// program has written.
    pub fn is_authentic(bytes: &[u8], keys: &Keys, id: &PointId) -> bool {
        let Ok((header, stored)) = Header::read_from_prefix(bytes) else {
            return false;
        };
        match keys.sealing() {
            None => header.check == keys.check(&[&header.as_bytes()[..CHECKED_BYTES], stored]),
            Some(sealing) => {
                let identity = identity(sealing, &id.machine, id.epoch);
                let version = header.version.get();
                let envelope = Envelope {
                    version,
                    ..envelope(sealing, &identity)
                };
                envelope.open(bytes).is_ok()
            }
        }
    }

    fn decode_sealed(bytes: &[u8], sealing: &Sealing, id: &PointId) -> Result<Self, String> {
        let identity = identity(sealing, &id.machine, id.epoch);
        let text = envelope(sealing, &identity).open(bytes)?;
        let (size, stored) = text.split_first_chunk().ok_or("it is cut short")?;
        Self::decode_document(stored, u64::from_le_bytes(*size))
    }

    fn decode_document(stored: &[u8], document_bytes: u64) -> Result<Self, String> {
        if document_bytes > DOCUMENT_BYTES_MAX {
            return Err("its header contradicts its size".to_owned());
        }
        let document = zstd::bulk::decompress(stored, document_bytes as usize)
            .map_err(|error| format!("it cannot be decompressed: {error}"))?;
        serde_json::from_slice(&document)
            .map_err(|error| format!("its document is malformed: {error}"))
    }

    fn decode_plain(bytes: &[u8], keys: &Keys) -> Result<Self, String> {
        let (header, stored) =
            Header::read_from_prefix(bytes).map_err(|_| "it is cut short".to_owned())?;
        if header.magic != MAGIC {
            return Err("it is no manifest".to_owned());
        }
        let version = header.version.get();
        let expected = keys.check(&[&header.as_bytes()[..CHECKED_BYTES], stored]);
        if header.check != expected {
            return Err("it is damaged".to_owned());
        }
        let known = [Version::First as u32, Version::Second as u32].contains(&version);
        if !known || header.flags.get() != 0 {
            return Err(format!(
                "it has version {version}, which this program does not know: use a newer one"
            ));
        }
        if header.stored_bytes.get() != stored.len() as u64 {
            return Err("its header contradicts its size".to_owned());
        }
        let manifest = Self::decode_document(stored, header.document_bytes.get())?;
        if manifest.version() as u32 > version {
            return Err(format!(
                "its document has fields that version {version} lacks"
            ));
        }
        Ok(manifest)
    }

    /// The lowest version of a plain vault that can say all of it.
    fn version(&self) -> Version {
        match self.consistency.is_crash() && self.reason.is_none() {
            true => Version::First,
            false => Version::Second,
        }
    }

    fn validate(&self) -> Result<(), String> {
        let is_fit = |reason: &String| {
            self.consistency.is_crash() && !reason.is_empty() && *reason == short_reason(reason)
        };
        if !self.reason.as_ref().is_none_or(is_fit) {
            return Err("its reason is too long, empty or has no place in it".to_owned());
        }
        let mut names = std::collections::BTreeSet::new();
        for disk in &self.disks {
            if !names.insert(&disk.name) {
                return Err(format!("it holds two disks named {}", disk.name));
            }
            if disk.block_bytes != BLOCK_SIZE || disk.size_bytes == 0 || disk.size_bytes % 512 != 0
            {
                return Err(format!("its sizes of disk {} are invalid", disk.name));
            }
            if !super::layout::is_valid_name(&disk.name) {
                return Err("it holds a disk with an invalid name".to_owned());
            }
        }
        Ok(())
    }

    /// Whether it is of this recovery point, and not of another one under its name.
    fn expect(&self, id: &PointId) -> Result<(), String> {
        if self.vault == id.vault && self.machine == id.machine && self.epoch == id.epoch {
            return Ok(());
        }
        Err(format!(
            "it belongs to recovery point {} of machine {} in vault {}",
            self.epoch, self.machine, self.vault
        ))
    }

    /// A disk by its name.
    pub fn disk(&self, name: &str) -> Option<&DiskPoint> {
        self.disks.iter().find(|disk| disk.name == name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::segment::format::SegmentName;
    use proptest::prelude::*;

    fn example() -> Manifest {
        let name = SegmentName {
            generation: 1,
            first_epoch: Epoch(2),
            last_epoch: Epoch(3),
            number: 4,
        };
        Manifest {
            vault: "00".repeat(16),
            machine: "m".into(),
            generation: 1,
            epoch: Epoch(3),
            previous: Epoch(1),
            created: jiff::Timestamp::UNIX_EPOCH,
            consistency: Consistency::Crash,
            reason: None,
            disks: vec![DiskPoint {
                name: "root".into(),
                size_bytes: 1 << 20,
                block_bytes: BLOCK_SIZE,
                journal: "11".repeat(16),
                dirty_blocks: 9,
                segments: vec![SegmentRef {
                    name: name.into(),
                    bytes: 1000,
                    directory_bytes: 100,
                    check: [7; 16].into(),
                    data_blocks: 5,
                    zero_blocks: 4,
                }],
            }],
        }
    }

    fn id() -> PointId {
        PointId {
            vault: "00".repeat(16),
            machine: "m".into(),
            epoch: Epoch(3),
        }
    }

    fn sealing(byte: u8, vault: u8) -> Keys {
        let root = crate::keys::secret::Secret::copy_of(&[byte; 32]);
        let cipher = crate::keys::aead::Cipher::preferred();
        Keys::derive_sealing(&root, [vault; 16], cipher).unwrap()
    }

    #[test]
    fn a_sealed_manifest_is_of_its_vault_machine_and_point() {
        let (manifest, keys) = (example(), sealing(1, 0));
        let bytes = manifest.encode(&keys).unwrap();
        assert_eq!(version_of(&bytes), 3);
        assert_eq!(Manifest::decode(&bytes, &keys, &id()).unwrap(), manifest);
        for wrong in [
            PointId {
                machine: "n".into(),
                ..id()
            },
            PointId {
                epoch: Epoch(4),
                ..id()
            },
            PointId {
                vault: "01".repeat(16),
                ..id()
            },
        ] {
            assert!(Manifest::decode(&bytes, &keys, &wrong).is_err());
        }
        for other in [sealing(2, 0), sealing(1, 1), self::keys()] {
            assert!(Manifest::decode(&bytes, &other, &id()).is_err());
        }
        // A plain one is none in an encrypted vault, whoever made it.
        let plain = manifest.encode(&self::keys()).unwrap();
        assert!(Manifest::decode(&plain, &keys, &id()).is_err());
    }

    fn keys() -> Keys {
        Keys::derive(&[3; 32])
    }

    #[test]
    fn a_manifest_survives() {
        let manifest = example();
        let bytes = manifest.encode(&keys()).unwrap();
        assert_eq!(Manifest::decode(&bytes, &keys(), &id()).unwrap(), manifest);
        assert!(Manifest::decode(&bytes, &Keys::derive(&[4; 32]), &id()).is_err());
    }

    fn version_of(bytes: &[u8]) -> u32 {
        u32::from_le_bytes(bytes[8..12].try_into().unwrap())
    }

    #[test]
    fn consistency_needs_the_second_version() {
        let mut manifest = example();
        assert_eq!(version_of(&manifest.encode(&keys()).unwrap()), 1);
        manifest.consistency = Consistency::Application;
        let bytes = manifest.encode(&keys()).unwrap();
        assert_eq!(version_of(&bytes), 2);
        assert_eq!(Manifest::decode(&bytes, &keys(), &id()).unwrap(), manifest);
        manifest.consistency = Consistency::Crash;
        manifest.reason = Some("the guest agent does not answer".to_owned());
        let bytes = manifest.encode(&keys()).unwrap();
        assert_eq!(version_of(&bytes), 2);
        assert_eq!(Manifest::decode(&bytes, &keys(), &id()).unwrap(), manifest);
        // The same document under the number of the version that does not have these fields.
        let mut old = bytes;
        old[8] = 1;
        let check = keys().check(&[&old[..CHECKED_BYTES], &old[HEADER_BYTES..]]);
        old[CHECKED_BYTES..HEADER_BYTES].copy_from_slice(&check);
        let error = Manifest::decode(&old, &keys(), &id()).unwrap_err();
        assert!(error.contains("version 1 lacks"), "{error}");
    }

    #[test]
    fn reasons_have_their_place_and_length() {
        let long = "x".repeat(REASON_BYTES_MAX + 1);
        for (consistency, reason) in [
            (Consistency::Application, "none is needed"),
            (Consistency::Crash, ""),
            (Consistency::Crash, "two\nlines"),
            (Consistency::Crash, long.as_str()),
        ] {
            let mut manifest = example();
            manifest.consistency = consistency;
            manifest.reason = Some(reason.to_owned());
            let bytes = manifest.encode(&keys()).unwrap();
            let error = Manifest::decode(&bytes, &keys(), &id()).unwrap_err();
            assert!(error.contains("reason"), "{error}");
        }
    }

    #[test]
    fn another_points_manifest_is_refused() {
        let mut id = id();
        assert!(example().expect(&id).is_ok());
        id.epoch = Epoch(4);
        assert!(example().expect(&id).is_err());
    }

    proptest! {
        #[test]
        fn any_short_reason_survives(reason in "\\PC{1,300}|(?s).{1,600}") {
            let mut manifest = example();
            let short = short_reason(&reason);
            prop_assert!(short.len() <= REASON_BYTES_MAX);
            manifest.reason = Some(short);
            let bytes = manifest.encode(&keys()).unwrap();
            prop_assert_eq!(Manifest::decode(&bytes, &keys(), &id()).unwrap(), manifest);
        }

        #[test]
        fn a_changed_byte_shows(at in any::<prop::sample::Index>(), change in 1u8..) {
            let mut bytes = example().encode(&keys()).unwrap();
            let at = at.index(bytes.len());
            bytes[at] ^= change;
            prop_assert!(Manifest::decode(&bytes, &keys(), &id()).is_err());
        }

        #[test]
        fn garbage_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(Manifest::decode(&bytes, &keys(), &id()).is_err());
        }
    }
}
