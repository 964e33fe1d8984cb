//! Replies as bytes, in each of the three modes. Pure.
//!
//! Source: NetworkBlockDevice/nbd, `doc/proto.md`, "Simple reply message", "Structured reply chunk
//! message", "Structured reply types", and "Extended reply chunk message" of its branch
//! `extension-ext-header`.
//!
//! In structured mode a success without data is a simple reply, as the specification allows: it is
//! shorter, and the same work as without structure. A READ and every error are answered in chunks.

use zerocopy::IntoBytes;

use super::metadata::Context;
use super::wire::{
    EXTENDED_REPLY_MAGIC, ExtendedChunk, Mode, ReplyError, STRING_BYTES_MAX,
    STRUCTURED_REPLY_MAGIC, SimpleReply, StructuredChunk, reply_flags, reply_type,
};

/// Bytes of the longest head of data: an extended header and the offset.
const DATA_HEAD_BYTES_MAX: usize = size_of::<ExtendedChunk>() + 8;
/// Longest length in one descriptor of 32 bits that keeps to whole blocks.
const DESCRIPTOR_BYTES_MAX: u64 = (u32::MAX - 4095) as u64;

/// What the replies to one request repeat.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address {
    /// The cookie of the request.
    pub cookie: [u8; 8],
    /// The offset of the request.
    pub offset: u64,
}

/// An extent as a meta context describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// Its length in bytes; never zero.
    pub length_bytes: u64,
    /// The context's flags.
    pub flags: u32,
}

/// Bytes that stand right before the data of a READ.
#[derive(Clone, Copy, Debug)]
pub struct DataHead {
    bytes: [u8; DATA_HEAD_BYTES_MAX],
    length: usize,
}

impl DataHead {
    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        &self.bytes[..self.length]
    }

    fn push(&mut self, bytes: &[u8]) {
        self.bytes[self.length..self.length + bytes.len()].copy_from_slice(bytes);
        self.length += bytes.len();
    }
}

/// What stands before `length` bytes of data from `offset` on. In simple mode there is one such
/// piece for a READ; in the others `done` says that it is the last.
pub fn data_head(mode: Mode, address: Address, offset: u64, length: u32, done: bool) -> DataHead {
    let mut head = DataHead {
        bytes: [0; DATA_HEAD_BYTES_MAX],
        length: 0,
    };
    match mode {
        Mode::Simple => head.push(SimpleReply::new(address.cookie, None).as_bytes()),
        Mode::Structured => {
            let kind = reply_type::OFFSET_DATA;
            head.push(structured(address, kind, done, length + 8).as_bytes());
            head.push(&offset.to_be_bytes());
        }
        Mode::Extended => {
            let kind = reply_type::OFFSET_DATA;
            head.push(extended(address, kind, done, u64::from(length) + 8).as_bytes());
            head.push(&offset.to_be_bytes());
        }
    }
    head
}

/// Adds the reply of a request that succeeded and has no data. For a READ of no bytes `chunked`
/// is set: its reply is structured even so.
pub fn success(mode: Mode, address: Address, chunked: bool, out: &mut Vec<u8>) {
    if mode == Mode::Simple || mode == Mode::Structured && !chunked {
        out.extend_from_slice(SimpleReply::new(address.cookie, None).as_bytes());
    } else {
        chunk(mode, address, reply_type::NONE, true, &[], out);
    }
}

/// Adds the reply of a request that failed, with a text for people, and in chunks the offset at
/// which it failed where that is known.
pub fn failure(
    mode: Mode,
    address: Address,
    error: ReplyError,
    text: &str,
    offset: Option<u64>,
    out: &mut Vec<u8>,
) {
    if mode == Mode::Simple {
        out.extend_from_slice(SimpleReply::new(address.cookie, Some(error)).as_bytes());
        return;
    }
    let text = shortened(text);
    let mut payload = (error as u32).to_be_bytes().to_vec();
    payload.extend_from_slice(&(text.len() as u16).to_be_bytes());
    payload.extend_from_slice(text.as_bytes());
    let kind = if let Some(offset) = offset {
        payload.extend_from_slice(&offset.to_be_bytes());
        reply_type::ERROR_OFFSET
    } else {
        reply_type::ERROR
    };
    chunk(mode, address, kind, true, &payload, out);
}

/// Adds a chunk that says that `length` bytes from `offset` on are zero. Not for simple mode.
pub fn hole(mode: Mode, address: Address, offset: u64, length: u32, done: bool, out: &mut Vec<u8>) {
    let mut payload = [0; 12];
    payload[..8].copy_from_slice(&offset.to_be_bytes());
    payload[8..].copy_from_slice(&length.to_be_bytes());
    chunk(mode, address, reply_type::OFFSET_HOLE, done, &payload, out);
}

/// Adds the chunk of one meta context. Not for simple mode.
pub fn block_status(
    mode: Mode,
    address: Address,
    context: Context,
    descriptors: &[Descriptor],
    done: bool,
    out: &mut Vec<u8>,
) {
    let mut payload = context.id().to_be_bytes().to_vec();
    if mode == Mode::Extended {
        payload.extend_from_slice(&(descriptors.len() as u32).to_be_bytes());
        for descriptor in descriptors {
            payload.extend_from_slice(&descriptor.length_bytes.to_be_bytes());
            payload.extend_from_slice(&u64::from(descriptor.flags).to_be_bytes());
        }
        let kind = reply_type::BLOCK_STATUS_EXT;
        return chunk(mode, address, kind, done, &payload, out);
    }
    for descriptor in descriptors {
        let length = descriptor.length_bytes.min(DESCRIPTOR_BYTES_MAX);
        payload.extend_from_slice(&(length as u32).to_be_bytes());
        payload.extend_from_slice(&descriptor.flags.to_be_bytes());
        if length < descriptor.length_bytes {
            // What follows would lie at the wrong place; the client asks for it again.
            break;
        }
    }
    chunk(mode, address, reply_type::BLOCK_STATUS, done, &payload, out);
}

fn chunk(mode: Mode, address: Address, kind: u16, done: bool, payload: &[u8], out: &mut Vec<u8>) {
    if mode == Mode::Extended {
        let head = extended(address, kind, done, payload.len() as u64);
        out.extend_from_slice(head.as_bytes());
    } else {
        let head = structured(address, kind, done, payload.len() as u32);
        out.extend_from_slice(head.as_bytes());
    }
    out.extend_from_slice(payload);
}

fn flags(done: bool) -> u16 {
    if done { reply_flags::DONE } else { 0 }
}

fn structured(address: Address, kind: u16, done: bool, length: u32) -> StructuredChunk {
    StructuredChunk {
        magic: STRUCTURED_REPLY_MAGIC.into(),
        flags: flags(done).into(),
        kind: kind.into(),
        cookie: address.cookie,
        length: length.into(),
    }
}

fn extended(address: Address, kind: u16, done: bool, length: u64) -> ExtendedChunk {
    ExtendedChunk {
        magic: EXTENDED_REPLY_MAGIC.into(),
        flags: flags(done).into(),
        kind: kind.into(),
        cookie: address.cookie,
        offset: address.offset.into(),
        length: length.into(),
    }
}

/// As much of the text as a string of the protocol may have, cut between characters.
fn shortened(text: &str) -> &str {
    let end = text.floor_char_boundary(STRING_BYTES_MAX);
    text.get(..end).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ADDRESS: Address = Address {
        cookie: *b"cookie!!",
        offset: 0x1000,
    };

    #[test]
    fn a_structured_chunk_of_data_has_the_layout_of_the_specification() {
        let head = data_head(Mode::Structured, ADDRESS, 0x2000, 512, true);
        let mut expected = vec![0x66, 0x8e, 0x33, 0xef, 0, 1, 0, 1];
        expected.extend_from_slice(b"cookie!!");
        expected.extend_from_slice(&520u32.to_be_bytes());
        expected.extend_from_slice(&0x2000u64.to_be_bytes());
        assert_eq!(head.as_slice(), expected);
    }

    #[test]
    fn an_extended_chunk_repeats_the_offset_of_the_request() {
        let head = data_head(Mode::Extended, ADDRESS, 0x2000, 512, false);
        let mut expected = vec![0x6e, 0x8a, 0x27, 0x8c, 0, 0, 0, 1];
        expected.extend_from_slice(b"cookie!!");
        expected.extend_from_slice(&0x1000u64.to_be_bytes());
        expected.extend_from_slice(&520u64.to_be_bytes());
        expected.extend_from_slice(&0x2000u64.to_be_bytes());
        assert_eq!(head.as_slice(), expected);
    }

    #[test]
    fn errors_carry_their_text_and_offset() {
        let mut out = Vec::new();
        failure(
            Mode::Structured,
            ADDRESS,
            ReplyError::Io,
            "née",
            Some(7),
            &mut out,
        );
        assert_eq!(out[4..8], [0, 1, 0x80, 2]);
        assert_eq!(out[16..20], 18u32.to_be_bytes());
        assert_eq!(out[20..24], 5u32.to_be_bytes());
        assert_eq!(out[24..26], 4u16.to_be_bytes());
        assert_eq!(&out[26..30], "née".as_bytes());
        assert_eq!(out[30..], 7u64.to_be_bytes());
        out.clear();
        failure(
            Mode::Simple,
            ADDRESS,
            ReplyError::Io,
            "x",
            Some(7),
            &mut out,
        );
        assert_eq!(out.len(), 16);
    }

    #[test]
    fn a_descriptor_of_32_bits_never_wraps() {
        let mut out = Vec::new();
        let long = Descriptor {
            length_bytes: 1 << 40,
            flags: 3,
        };
        let next = Descriptor {
            length_bytes: 4096,
            flags: 0,
        };
        let descriptors = [long, next];
        block_status(
            Mode::Structured,
            ADDRESS,
            Context::Allocation,
            &descriptors,
            true,
            &mut out,
        );
        assert_eq!(out.len(), 20 + 4 + 8, "the second one is left out");
        assert_eq!(out[24..28], 0xffff_f000u32.to_be_bytes());
        out.clear();
        block_status(
            Mode::Extended,
            ADDRESS,
            Context::Dirty,
            &descriptors,
            true,
            &mut out,
        );
        assert_eq!(out.len(), 32 + 8 + 32);
        assert_eq!(out[36..40], 2u32.to_be_bytes());
        assert_eq!(out[40..48], (1u64 << 40).to_be_bytes());
    }

    proptest! {
        #[test]
        fn lengths_tell_chunks_apart(
            text in ".{0,3000}", offset in any::<Option<u64>>(), extended in any::<bool>(),
            pairs in prop::collection::vec((1u64..1 << 34, any::<u32>()), 1..9), length in 1u32..9,
        ) {
            let mode = if extended { Mode::Extended } else { Mode::Structured };
            let descriptors: Vec<Descriptor> = pairs
                .into_iter()
                .map(|(length_bytes, flags)| Descriptor { length_bytes, flags })
                .collect();
            let mut out = Vec::new();
            failure(mode, ADDRESS, ReplyError::Invalid, &text, offset, &mut out);
            block_status(mode, ADDRESS, Context::Allocation, &descriptors, false, &mut out);
            hole(mode, ADDRESS, 3, length, false, &mut out);
            success(mode, ADDRESS, true, &mut out);
            let (head_bytes, length_at) = if extended { (32, 28) } else { (20, 16) };
            let mut rest = &out[..];
            let mut kinds = Vec::new();
            while !rest.is_empty() {
                kinds.push(u16::from_be_bytes([rest[6], rest[7]]) & 0x7fff);
                let length = u32::from_be_bytes(rest[length_at..length_at + 4].try_into().unwrap());
                let payload = &rest[head_bytes..head_bytes + length as usize];
                if kinds.len() == 1 {
                    let count = usize::from(u16::from_be_bytes([payload[4], payload[5]]));
                    prop_assert!(count <= 4096 && std::str::from_utf8(&payload[6..6 + count]).is_ok());
                }
                rest = &rest[head_bytes + length as usize..];
            }
            let status = if extended { 6 } else { 5 };
            prop_assert_eq!(kinds, [if offset.is_some() { 2 } else { 1 }, status, 2, 0]);
        }
    }
}
