//! Compression of frames.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// How the bytes of a frame are stored; the number stands in the directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum CodecKind {
    /// As they are.
    None = 0,
    /// One LZ4 block, without a size in front.
    Lz4 = 1,
    /// One Zstandard frame (RFC 8878).
    Zstd = 2,
}

impl CodecKind {
    /// The kind of this number.
    pub fn from_number(number: u8) -> Option<Self> {
        [Self::None, Self::Lz4, Self::Zstd]
            .into_iter()
            .find(|kind| *kind as u8 == number)
    }
}

/// The compression that is chosen for new frames: `none`, `lz4` or `zstd:LEVEL`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Codec {
    /// No compression.
    None,
    /// LZ4.
    Lz4,
    /// Zstandard with a level from 1 to 19.
    Zstd(i32),
}

/// Levels of Zstandard that make sense for a stream of disk blocks.
const ZSTD_LEVELS: std::ops::RangeInclusive<i32> = 1..=19;

impl Default for Codec {
    fn default() -> Self {
        Self::Zstd(1)
    }
}

impl FromStr for Codec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let unknown = || {
            format!(
                "unknown codec {text:?}: use \"none\", \"lz4\" or \"zstd:LEVEL\" with a level from 1 to 19"
            )
        };
        match text {
            "none" => Ok(Self::None),
            "lz4" => Ok(Self::Lz4),
            "zstd" => Ok(Self::default()),
            _ => {
                let level = text.strip_prefix("zstd:").ok_or_else(unknown)?;
                let level: i32 = level.parse().map_err(|_| unknown())?;
                if ZSTD_LEVELS.contains(&level) {
                    Ok(Self::Zstd(level))
                } else {
                    Err(unknown())
                }
            }
        }
    }
}

impl TryFrom<String> for Codec {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Codec> for String {
    fn from(codec: Codec) -> Self {
        codec.to_string()
    }
}

impl fmt::Display for Codec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::Lz4 => f.write_str("lz4"),
            Self::Zstd(level) => write!(f, "zstd:{level}"),
        }
    }
}

/// A compressor that keeps its state between frames. One for each thread.
pub struct Compressor {
    codec: Codec,
    zstd: Option<zstd::bulk::Compressor<'static>>,
}

impl Compressor {
    /// A compressor for a codec.
    ///
    /// # Errors
    ///
    /// The library cannot allocate its state.
    pub fn new(codec: Codec) -> std::io::Result<Self> {
        let zstd = match codec {
            Codec::Zstd(level) => Some(zstd::bulk::Compressor::new(level)?),
            _ => None,
        };
        Ok(Self { codec, zstd })
    }

    /// Compresses, unless that saves nothing: then the bytes are stored as they are.
    ///
    /// # Errors
    ///
    /// The library fails.
    pub fn compress<'a>(&mut self, raw: &'a [u8]) -> std::io::Result<(CodecKind, Cow<'a, [u8]>)> {
        let (kind, packed) = match (self.codec, &mut self.zstd) {
            (Codec::Lz4, _) => (CodecKind::Lz4, lz4_flex::block::compress(raw)),
            (Codec::Zstd(_), Some(zstd)) => (CodecKind::Zstd, zstd.compress(raw)?),
            _ => return Ok((CodecKind::None, Cow::Borrowed(raw))),
        };
        if packed.len() < raw.len() {
            Ok((kind, Cow::Owned(packed)))
        } else {
            Ok((CodecKind::None, Cow::Borrowed(raw)))
        }
    }
}

/// Brings back exactly `raw_bytes` bytes; `None` if the packed bytes do not hold that.
pub fn decompress(kind: CodecKind, packed: &[u8], raw_bytes: usize) -> Option<Vec<u8>> {
    let raw = match kind {
        CodecKind::None => packed.to_vec(),
        CodecKind::Lz4 => {
            let mut raw = vec![0; raw_bytes];
            let count = lz4_flex::block::decompress_into(packed, &mut raw).ok()?;
            raw.truncate(count);
            raw
        }
        CodecKind::Zstd => zstd::bulk::decompress(packed, raw_bytes).ok()?,
    };
    (raw.len() == raw_bytes).then_some(raw)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names_round_trip_and_others_are_refused() {
        for text in ["none", "lz4", "zstd:1", "zstd:19"] {
            assert_eq!(text.parse::<Codec>().unwrap().to_string(), text);
        }
        for text in ["", "zip", "zstd:0", "zstd:20", "zstd:x", "LZ4"] {
            assert!(text.parse::<Codec>().is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn what_goes_in_comes_out(seed in prop::collection::vec(any::<u8>(), 1..40), repeat in 1usize..300) {
            let raw = seed.repeat(repeat);
            for codec in [Codec::None, Codec::Lz4, Codec::Zstd(1), Codec::Zstd(3)] {
                let mut compressor = Compressor::new(codec).unwrap();
                let (kind, packed) = compressor.compress(&raw).unwrap();
                prop_assert!(packed.len() <= raw.len());
                let unpacked = decompress(kind, &packed, raw.len());
                prop_assert_eq!(unpacked.as_deref(), Some(&raw[..]));
            }
        }

        #[test]
        fn garbage_is_refused_or_has_the_right_length(packed in prop::collection::vec(any::<u8>(), 0..200)) {
            for kind in [CodecKind::None, CodecKind::Lz4, CodecKind::Zstd] {
                if let Some(raw) = decompress(kind, &packed, 4096) {
                    prop_assert_eq!(raw.len(), 4096);
                }
            }
        }
    }
}
