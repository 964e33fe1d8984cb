//! How segments are named, and how others refer to them. Pure.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use tracker::extent::Epoch;

use super::format::SegmentName;
use crate::keys::{Check, from_hex, hex};

/// The name of a segment: generation, first and last epoch, number. Text order is their order.
pub fn segment_name(name: &SegmentName) -> String {
    format!(
        "{:016x}-{}-{}-{:08x}",
        name.generation, name.first_epoch, name.last_epoch, name.number
    )
}

/// Reads a segment's name.
pub fn parse_segment_name(text: &str) -> Option<SegmentName> {
    let mut parts = text.split('-');
    let name = SegmentName {
        generation: number(parts.next()?)?,
        first_epoch: Epoch(number(parts.next()?)?),
        last_epoch: Epoch(number(parts.next()?)?),
        number: u32::try_from(digits(parts.next()?, 8)?).ok()?,
    };
    (parts.next().is_none() && name.first_epoch <= name.last_epoch).then_some(name)
}

/// Exactly sixteen lower-case hexadecimal digits.
pub fn number(text: &str) -> Option<u64> {
    digits(text, 16)
}

fn digits(text: &str, count: usize) -> Option<u64> {
    let valid = text.len() == count
        && text
            .bytes()
            .all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte));
    if valid {
        u64::from_str_radix(text, 16).ok()
    } else {
        None
    }
}

/// A segment's name as it stands in a manifest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NameField(pub SegmentName);

impl From<SegmentName> for NameField {
    fn from(name: SegmentName) -> Self {
        Self(name)
    }
}

impl Serialize for NameField {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&segment_name(&self.0))
    }
}

impl<'de> Deserialize<'de> for NameField {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        parse_segment_name(&text)
            .map(Self)
            .ok_or_else(|| serde::de::Error::custom("not the name of a segment"))
    }
}

/// A check as it stands in a manifest: 32 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CheckField(pub Check);

impl From<Check> for CheckField {
    fn from(check: Check) -> Self {
        Self(check)
    }
}

impl fmt::Debug for CheckField {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(&self.0))
    }
}

impl Serialize for CheckField {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&hex(&self.0))
    }
}

impl<'de> Deserialize<'de> for CheckField {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        from_hex(&text)
            .map(Self)
            .ok_or_else(|| serde::de::Error::custom("not 32 hexadecimal digits"))
    }
}

/// A segment as a manifest names it: enough to read its directory by one request, and to tell it
/// from every other object.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SegmentRef {
    /// Its name.
    pub name: NameField,
    /// Size of the object in bytes.
    pub bytes: u64,
    /// Size of the directory in bytes.
    pub directory_bytes: u64,
    /// The check in its footer.
    pub check: CheckField,
    /// Blocks with data.
    pub data_blocks: u64,
    /// Blocks that are zero.
    pub zero_blocks: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn names_round_trip(generation: u64, first: u64, more in 0u64..1000, number: u32) {
            let name = SegmentName {
                generation,
                first_epoch: Epoch(first),
                last_epoch: Epoch(first.saturating_add(more)),
                number,
            };
            prop_assert_eq!(parse_segment_name(&segment_name(&name)), Some(name));
        }

        #[test]
        fn other_texts_are_no_names(text in ".{0,70}") {
            if let Some(name) = parse_segment_name(&text) {
                prop_assert_eq!(segment_name(&name), text);
            }
        }
    }
}
