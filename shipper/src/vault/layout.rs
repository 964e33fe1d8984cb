//! Names of the objects of a vault. Pure.
//!
//! What stands here for a machine or disk is its name in a plain vault, and a hash of it in an encrypted one:
//! [`super::Vault`] knows which.

use tracker::extent::Epoch;

use crate::segment::reference::{SegmentRef, number, segment_name};

/// What the vault says of itself.
pub const VAULT_KEY: &str = "vault.json";

/// Where all machines are.
pub const MACHINES_PREFIX: &str = "machines";

/// A key table of an encrypted vault.
pub fn key_table_key(number: u64) -> String {
    format!("keys/{number}")
}

/// Longest name of a machine or disk in bytes.
const NAME_BYTES_MAX: usize = 63;

/// Whether a name may stand in a key: `[a-z0-9][a-z0-9._-]{0,62}`.
pub fn is_valid_name(name: &str) -> bool {
    let letters = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    name.len() <= NAME_BYTES_MAX
        && name.bytes().next().is_some_and(letters)
        && name
            .bytes()
            .all(|byte| letters(byte) || matches!(byte, b'.' | b'_' | b'-'))
}

/// The claim of a generation.
pub fn generation_key(machine: &str, generation: u64) -> String {
    format!("{}/{generation:016x}", generations_prefix(machine))
}

/// Where the claims of a machine are.
pub fn generations_prefix(machine: &str) -> String {
    format!("{MACHINES_PREFIX}/{machine}/generation")
}

/// The generation that a key claims.
pub fn generation_of(key: &str) -> Option<u64> {
    number(key.rsplit('/').next()?)
}

/// Where the manifests of a machine are.
pub fn points_prefix(machine: &str) -> String {
    format!("{MACHINES_PREFIX}/{machine}/points")
}

/// The manifest of a recovery point.
pub fn manifest_key(machine: &str, epoch: Epoch) -> String {
    format!("{}/{epoch}.manifest", points_prefix(machine))
}

/// The recovery point that a key is the manifest of.
pub fn point_of(key: &str) -> Option<Epoch> {
    let name = key.rsplit('/').next()?.strip_suffix(".manifest")?;
    number(name).map(Epoch)
}

/// Where the records of the recovery points of a machine are that are set aside.
pub fn aside_prefix(machine: &str) -> String {
    format!("{MACHINES_PREFIX}/{machine}/aside")
}

/// The record of a recovery point that is set aside.
pub fn aside_key(machine: &str, epoch: Epoch) -> String {
    format!("{}/{epoch}", aside_prefix(machine))
}

/// The recovery point that a key sets aside.
pub fn aside_of(key: &str) -> Option<Epoch> {
    number(key.rsplit('/').next()?).map(Epoch)
}

/// A segment of a disk.
pub fn segment_key(machine: &str, disk: &str, segment: &SegmentRef) -> String {
    let name = segment_name(&segment.name.0);
    format!("{MACHINES_PREFIX}/{machine}/disks/{disk}/segments/{name}.segment")
}

/// Where the boundaries of a machine are.
pub fn boundaries_prefix(machine: &str) -> String {
    format!("{MACHINES_PREFIX}/{machine}/boundaries")
}

/// A boundary.
pub fn boundary_key(machine: &str, number: u64) -> String {
    format!("{}/{number:016x}", boundaries_prefix(machine))
}

/// The number of a boundary.
pub fn boundary_of(key: &str) -> Option<u64> {
    number(key.rsplit('/').next()?)
}

/// Where the pins of a machine are.
pub fn pins_prefix(machine: &str) -> String {
    format!("{MACHINES_PREFIX}/{machine}/pins")
}

/// Folders of a disk whose objects are removed when no recovery point names them any more.
const OBJECT_FOLDERS: [&str; 1] = ["segments"];

/// Generation of an object of a disk, given its key below that of the machine: `disks/D/FOLDER/G-...`.
/// `None`: it is none that may be removed.
pub fn disk_object_generation(below_machine: &str) -> Option<u64> {
    let mut parts = below_machine.split('/');
    let ("disks", disk, folder, name) =
        (parts.next()?, parts.next()?, parts.next()?, parts.next()?)
    else {
        return None;
    };
    let fits = parts.next().is_none() && is_valid_name(disk) && OBJECT_FOLDERS.contains(&folder);
    fits.then(|| number(name.split('-').next()?)).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn only_objects_of_disks_may_be_removed() {
        let name = "0000000000000002-0000000000000001-0000000000000001-00000000.segment";
        let of = |folder: &str| disk_object_generation(&format!("{folder}/{name}"));
        assert_eq!(of("disks/a/segments"), Some(2));
        for folder in [
            "disks/a/others",
            "disks/../segments",
            "points",
            "disks/a/segments/b",
        ] {
            assert_eq!(of(folder), None, "{folder}");
        }
        assert_eq!(disk_object_generation("disks/a/segments/x.segment"), None);
    }

    #[test]
    fn names_that_may_stand_in_keys() {
        for name in ["a", "web1", "0", "a.b_c-d", &"x".repeat(63)] {
            assert!(is_valid_name(name), "{name}");
        }
        for name in ["", "A", "../a", ".a", "a/b", "a b", "é", &"x".repeat(64)] {
            assert!(!is_valid_name(name), "{name}");
        }
    }

    proptest! {
        #[test]
        fn numbers_round_trip(number: u64) {
            prop_assert_eq!(point_of(&manifest_key("m", Epoch(number))), Some(Epoch(number)));
            prop_assert_eq!(aside_of(&aside_key("m", Epoch(number))), Some(Epoch(number)));
            prop_assert_eq!(generation_of(&generation_key("m", number)), Some(number));
        }

        #[test]
        fn other_texts_are_no_names(text in ".{0,70}") {
            let _judged = (point_of(&text), generation_of(&text), aside_of(&text));
        }
    }
}
