//! Numbers and layouts of the NBD protocol. Pure.
//!
//! Source: NetworkBlockDevice/nbd, `doc/proto.md`, sections "Values", "Transmission" and
//! "Option haggling", and its branch `extension-ext-header` for extended headers. All integers on
//! the wire are big-endian. `docs/nbd-support.md` has a row for each constant.

use zerocopy::byteorder::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// First eight bytes that a server sends: `NBDMAGIC`.
pub const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// Second eight bytes of newstyle negotiation, and the head of every option: `IHAVEOPT`.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Head of every reply to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Head of every request in transmission.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Head of every request in transmission after extended headers were negotiated.
pub const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// Head of every simple reply in transmission.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Head of every chunk of a structured reply.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
/// Head of every chunk of a reply after extended headers were negotiated.
pub const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;
/// Longest string of the protocol: a name, a query or the text of an error.
pub const STRING_BYTES_MAX: usize = 4096;

/// Handshake flags, sent by the server and echoed by the client.
pub mod handshake_flags {
    /// Fixed newstyle negotiation.
    pub const FIXED_NEWSTYLE: u16 = 1 << 0;
    /// The 124 zero bytes after EXPORT_NAME are left out.
    pub const NO_ZEROES: u16 = 1 << 1;
}

/// Transmission flags of an export.
pub mod transmission_flags {
    /// The other flags mean something.
    pub const HAS_FLAGS: u16 = 1 << 0;
    /// Writes are refused.
    pub const READ_ONLY: u16 = 1 << 1;
    /// FLUSH is offered.
    pub const SEND_FLUSH: u16 = 1 << 2;
    /// The FUA flag is offered.
    pub const SEND_FUA: u16 = 1 << 3;
    /// TRIM is offered.
    pub const SEND_TRIM: u16 = 1 << 5;
    /// WRITE_ZEROES is offered.
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    /// The flag DF of READ is offered.
    pub const SEND_DF: u16 = 1 << 7;
    /// A FLUSH on one connection covers what was answered on all others.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    /// CACHE is offered.
    pub const SEND_CACHE: u16 = 1 << 10;
    /// The flag FAST_ZERO of WRITE_ZEROES is offered.
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
    /// BLOCK_STATUS takes a payload that names the contexts wanted.
    pub const BLOCK_STATUS_PAYLOAD: u16 = 1 << 12;
}

/// Options of the negotiation.
pub mod option {
    /// Choose an export and go to transmission; has no error reply.
    pub const EXPORT_NAME: u32 = 1;
    /// End the negotiation.
    pub const ABORT: u32 = 2;
    /// List the exports.
    pub const LIST: u32 = 3;
    /// Go on over TLS.
    pub const STARTTLS: u32 = 5;
    /// Describe an export.
    pub const INFO: u32 = 6;
    /// Choose an export and go to transmission.
    pub const GO: u32 = 7;
    /// Replies to READ come in chunks.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// List the meta contexts of an export.
    pub const LIST_META_CONTEXT: u32 = 9;
    /// Select meta contexts of an export.
    pub const SET_META_CONTEXT: u32 = 10;
    /// Requests have lengths of 64 bits, and all replies come in chunks.
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// Types of option replies.
pub mod option_reply {
    /// The option is done.
    pub const ACK: u32 = 1;
    /// One export of a LIST.
    pub const SERVER: u32 = 2;
    /// One item of information for INFO or GO.
    pub const INFO: u32 = 3;
    /// One meta context.
    pub const META_CONTEXT: u32 = 4;
    /// The option is not known.
    pub const ERR_UNSUP: u32 = (1 << 31) + 1;
    /// The option is known and not allowed here.
    pub const ERR_POLICY: u32 = (1 << 31) + 2;
    /// The option's data are malformed.
    pub const ERR_INVALID: u32 = (1 << 31) + 3;
    /// Nothing goes on without TLS.
    pub const ERR_TLS_REQD: u32 = (1 << 31) + 5;
    /// The export does not exist.
    pub const ERR_UNKNOWN: u32 = (1 << 31) + 6;
    /// The client must ask for the block size first.
    pub const ERR_BLOCK_SIZE_REQD: u32 = (1 << 31) + 8;
    /// The request is larger than the server takes.
    pub const ERR_TOO_BIG: u32 = (1 << 31) + 9;
    /// Extended headers are in use, and the option would go back from them.
    pub const ERR_EXT_HEADER_REQD: u32 = (1 << 31) + 10;
}

/// Kinds of information in INFO and GO.
pub mod info {
    /// Size and transmission flags; always sent.
    pub const EXPORT: u16 = 0;
    /// The canonical name; sent if asked for.
    pub const NAME: u16 = 1;
    /// Minimum, preferred and maximum block sizes; sent if asked for.
    pub const BLOCK_SIZE: u16 = 3;
}

/// Commands of the transmission phase.
pub mod command {
    /// Read.
    pub const READ: u16 = 0;
    /// Write; the payload follows the request.
    pub const WRITE: u16 = 1;
    /// Disconnect; has no reply.
    pub const DISC: u16 = 2;
    /// Sync what was answered.
    pub const FLUSH: u16 = 3;
    /// The range is not needed any more.
    pub const TRIM: u16 = 4;
    /// The range will be read soon.
    pub const CACHE: u16 = 5;
    /// The range becomes zero.
    pub const WRITE_ZEROES: u16 = 6;
    /// Tell what the selected meta contexts say of the range.
    pub const BLOCK_STATUS: u16 = 7;
}

/// Flags of a request.
pub mod command_flags {
    /// Force unit access: the data are durable before the reply.
    pub const FUA: u16 = 1 << 0;
    /// WRITE_ZEROES must leave the range allocated.
    pub const NO_HOLE: u16 = 1 << 1;
    /// The data of a READ come in one chunk.
    pub const DF: u16 = 1 << 2;
    /// BLOCK_STATUS tells of one extent only.
    pub const REQ_ONE: u16 = 1 << 3;
    /// WRITE_ZEROES fails unless it is faster than a WRITE.
    pub const FAST_ZERO: u16 = 1 << 4;
    /// The length of an extended request is that of a payload.
    pub const PAYLOAD_LEN: u16 = 1 << 5;
}

/// Flags of a chunk of a reply.
pub mod reply_flags {
    /// It is the last one of its reply.
    pub const DONE: u16 = 1 << 0;
}

/// Types of the chunks of a reply.
pub mod reply_type {
    /// Nothing more to say.
    pub const NONE: u16 = 0;
    /// An offset and the data there.
    pub const OFFSET_DATA: u16 = 1;
    /// An offset and how many zero bytes lie there.
    pub const OFFSET_HOLE: u16 = 2;
    /// What one meta context says, in descriptors of 32 bits.
    pub const BLOCK_STATUS: u16 = 5;
    /// What one meta context says, in descriptors of 64 bits.
    pub const BLOCK_STATUS_EXT: u16 = 6;
    /// The request failed.
    pub const ERROR: u16 = (1 << 15) + 1;
    /// The request failed at an offset.
    pub const ERROR_OFFSET: u16 = (1 << 15) + 2;
}

/// Flags that the context `base:allocation` gives to an extent.
pub mod allocation_state {
    /// It takes no space on the disk.
    pub const HOLE: u32 = 1 << 0;
    /// It reads as zeroes.
    pub const ZERO: u32 = 1 << 1;
}

/// What headers the two sides use in transmission.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// Compact requests, simple replies.
    #[default]
    Simple,
    /// Compact requests; replies in chunks for READ, errors and BLOCK_STATUS.
    Structured,
    /// Extended requests; all replies in extended chunks.
    Extended,
}

/// Error numbers of replies: the protocol's own, equal to Linux's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum ReplyError {
    /// Operation not permitted: a write to a read-only export.
    NotPermitted = 1,
    /// Input or output error.
    Io = 5,
    /// Cannot allocate memory.
    NoMemory = 12,
    /// Invalid argument.
    Invalid = 22,
    /// No space left on the device.
    NoSpace = 28,
    /// Value too large: a READ beyond the largest payload.
    Overflow = 75,
    /// Operation not supported: a range that cannot be made zero fast.
    NotSupported = 95,
    /// The server is shutting down.
    ShuttingDown = 108,
}

impl ReplyError {
    /// What it says to a person.
    pub fn text(self) -> &'static str {
        match self {
            Self::NotPermitted => "Operation not permitted",
            Self::Io => "The disk failed",
            Self::NoMemory => "Out of memory",
            Self::Invalid => "Invalid argument",
            Self::NoSpace => "No space left on the disk",
            Self::Overflow => "Value too large",
            Self::NotSupported => "Not supported",
            Self::ShuttingDown => "The server is shutting down",
        }
    }

    /// The error number that stands for an errno of a disk operation.
    pub fn from_errno(errno: i32) -> Self {
        match errno {
            libc::EPERM | libc::EACCES | libc::EROFS => Self::NotPermitted,
            libc::ENOMEM => Self::NoMemory,
            libc::EINVAL => Self::Invalid,
            libc::ENOSPC | libc::EFBIG | libc::EDQUOT => Self::NoSpace,
            libc::EOPNOTSUPP => Self::NotSupported,
            _ => Self::Io,
        }
    }
}

/// A request with compact headers; the payload of a WRITE follows.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct CompactRequest {
    magic: U32,
    flags: U16,
    command: U16,
    cookie: [u8; 8],
    offset: U64,
    length: U32,
}

const _: () = assert!(size_of::<CompactRequest>() == 28);

/// A request with extended headers; with PAYLOAD_LEN so many bytes of payload follow.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct ExtendedRequest {
    magic: U32,
    flags: U16,
    command: U16,
    cookie: [u8; 8],
    offset: U64,
    length: U64,
}

const _: () = assert!(size_of::<ExtendedRequest>() == 32);

/// The header of a request of the transmission phase, of either form. Nothing in it is checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestHeader {
    /// Flags of [`command_flags`].
    pub flags: u16,
    /// A number of [`command`].
    pub command: u16,
    /// Chosen by the client, returned in the reply. Not interpreted.
    pub cookie: [u8; 8],
    /// Offset in bytes.
    pub offset: u64,
    /// Length in bytes, of the range or of the payload.
    pub length: u64,
}

/// A request begins with another number than the magic; what follows cannot be told apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WrongMagic;

impl RequestHeader {
    /// Bytes of a header.
    pub fn bytes_in(mode: Mode) -> usize {
        match mode {
            Mode::Simple | Mode::Structured => size_of::<CompactRequest>(),
            Mode::Extended => size_of::<ExtendedRequest>(),
        }
    }

    /// The header at the start of `bytes`; `None` if they are too few.
    pub fn decode(mode: Mode, bytes: &[u8]) -> Result<Option<Self>, WrongMagic> {
        if mode != Mode::Extended {
            let Ok((raw, _)) = CompactRequest::read_from_prefix(bytes) else {
                return Ok(None);
            };
            let header = Self {
                flags: raw.flags.get(),
                command: raw.command.get(),
                cookie: raw.cookie,
                offset: raw.offset.get(),
                length: raw.length.get().into(),
            };
            return (raw.magic.get() == REQUEST_MAGIC)
                .then_some(Some(header))
                .ok_or(WrongMagic);
        }
        let Ok((raw, _)) = ExtendedRequest::read_from_prefix(bytes) else {
            return Ok(None);
        };
        let header = Self {
            flags: raw.flags.get(),
            command: raw.command.get(),
            cookie: raw.cookie,
            offset: raw.offset.get(),
            length: raw.length.get(),
        };
        (raw.magic.get() == EXTENDED_REQUEST_MAGIC)
            .then_some(Some(header))
            .ok_or(WrongMagic)
    }
}

/// A simple reply; the data of a successful READ follow.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct SimpleReply {
    magic: U32,
    error: U32,
    cookie: [u8; 8],
}

/// Bytes of a [`SimpleReply`].
pub const SIMPLE_REPLY_BYTES: usize = size_of::<SimpleReply>();
const _: () = assert!(SIMPLE_REPLY_BYTES == 16);

impl SimpleReply {
    /// The reply to the request with this cookie.
    pub fn new(cookie: [u8; 8], error: Option<ReplyError>) -> Self {
        let error = error.map_or(0, |error| error as u32);
        Self {
            magic: SIMPLE_REPLY_MAGIC.into(),
            error: error.into(),
            cookie,
        }
    }
}

/// The head of one chunk of a structured reply; the payload follows.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct StructuredChunk {
    /// [`STRUCTURED_REPLY_MAGIC`].
    pub magic: U32,
    /// Flags of [`reply_flags`].
    pub flags: U16,
    /// A number of [`reply_type`].
    pub kind: U16,
    /// That of the request.
    pub cookie: [u8; 8],
    /// Bytes of payload that follow.
    pub length: U32,
}

const _: () = assert!(size_of::<StructuredChunk>() == 20);

/// The head of one chunk of a reply with extended headers; the payload follows.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ExtendedChunk {
    /// [`EXTENDED_REPLY_MAGIC`].
    pub magic: U32,
    /// Flags of [`reply_flags`].
    pub flags: U16,
    /// A number of [`reply_type`].
    pub kind: U16,
    /// That of the request.
    pub cookie: [u8; 8],
    /// That of the request.
    pub offset: U64,
    /// Bytes of payload that follow.
    pub length: U64,
}

const _: () = assert!(size_of::<ExtendedChunk>() == 32);

/// The head of an option that the client sends.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct OptionHeader {
    /// [`OPTION_MAGIC`].
    pub magic: U64,
    /// A number of [`option`].
    pub option: U32,
    /// Bytes of data that follow.
    pub length: U32,
}

const _: () = assert!(size_of::<OptionHeader>() == 16);

/// The head of a reply to an option.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct OptionReplyHeader {
    /// [`OPTION_REPLY_MAGIC`].
    pub magic: U64,
    /// The option that is answered.
    pub option: U32,
    /// A number of [`option_reply`].
    pub kind: U32,
    /// Bytes of data that follow.
    pub length: U32,
}

const _: () = assert!(size_of::<OptionReplyHeader>() == 20);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The bytes of a header, the way back from [`RequestHeader::decode`].
    fn encode(mode: Mode, header: &RequestHeader) -> Vec<u8> {
        let (flags, command) = (header.flags.into(), header.command.into());
        let (cookie, offset) = (header.cookie, header.offset.into());
        if mode == Mode::Extended {
            let (magic, length) = (EXTENDED_REQUEST_MAGIC.into(), header.length.into());
            let raw = ExtendedRequest {
                magic,
                flags,
                command,
                cookie,
                offset,
                length,
            };
            return raw.as_bytes().to_vec();
        }
        let (magic, length) = (REQUEST_MAGIC.into(), (header.length as u32).into());
        let raw = CompactRequest {
            magic,
            flags,
            command,
            cookie,
            offset,
            length,
        };
        raw.as_bytes().to_vec()
    }

    const MODES: [Mode; 3] = [Mode::Simple, Mode::Structured, Mode::Extended];

    #[test]
    fn a_compact_request_has_the_layout_of_the_specification() {
        let mut bytes = Vec::new();
        bytes.extend_from_slice(&REQUEST_MAGIC.to_be_bytes());
        bytes.extend_from_slice(&1u16.to_be_bytes());
        bytes.extend_from_slice(&6u16.to_be_bytes());
        bytes.extend_from_slice(b"cookie!!");
        bytes.extend_from_slice(&0x1122_3344_5566_7788u64.to_be_bytes());
        bytes.extend_from_slice(&0x99aa_bbccu32.to_be_bytes());
        let header = RequestHeader::decode(Mode::Simple, &bytes)
            .unwrap()
            .unwrap();
        assert_eq!(header.command, command::WRITE_ZEROES);
        assert_eq!(header.flags, command_flags::FUA);
        assert_eq!(header.offset, 0x1122_3344_5566_7788);
        assert_eq!(header.length, 0x99aa_bbcc);
    }

    #[test]
    fn an_extended_request_has_the_layout_of_the_specification() {
        let mut bytes = vec![0x21, 0xe4, 0x1c, 0x71, 0, 0x20, 0, 1];
        bytes.extend_from_slice(b"cookie!!");
        bytes.extend_from_slice(&7u64.to_be_bytes());
        bytes.extend_from_slice(&(1u64 << 40).to_be_bytes());
        let header = RequestHeader::decode(Mode::Extended, &bytes)
            .unwrap()
            .unwrap();
        assert_eq!(header.command, command::WRITE);
        assert_eq!(header.flags, command_flags::PAYLOAD_LEN);
        assert_eq!((header.offset, header.length), (7, 1 << 40));
        assert_eq!(RequestHeader::decode(Mode::Simple, &bytes), Err(WrongMagic));
    }

    #[test]
    fn a_reply_has_the_layout_of_the_specification() {
        let reply = SimpleReply::new(*b"cookie!!", Some(ReplyError::NoSpace));
        assert_eq!(
            &reply.as_bytes()[..8],
            &[0x67, 0x44, 0x66, 0x98, 0, 0, 0, 28]
        );
        assert_eq!(&reply.as_bytes()[8..], b"cookie!!");
    }

    proptest! {
        #[test]
        fn decode_encode_decode(
            flags in any::<u16>(), command in any::<u16>(), cookie in any::<[u8; 8]>(),
            offset in any::<u64>(), length in any::<u32>(), mode in 0usize..3, rest in 0usize..9,
        ) {
            let mode = MODES[mode];
            let header = RequestHeader { flags, command, cookie, offset, length: length.into() };
            let mut bytes = encode(mode, &header);
            prop_assert_eq!(bytes.len(), RequestHeader::bytes_in(mode));
            for cut in 0..bytes.len() {
                prop_assert_eq!(RequestHeader::decode(mode, &bytes[..cut]), Ok(None));
            }
            bytes.resize(bytes.len() + rest, 0xee);
            prop_assert_eq!(RequestHeader::decode(mode, &bytes), Ok(Some(header)));
        }

        #[test]
        fn any_bytes_decode_to_something_that_encodes_to_them(
            mut bytes in prop::collection::vec(any::<u8>(), 32), mode in 0usize..3, good in any::<bool>(),
        ) {
            let mode = MODES[mode];
            if good {
                let magic = if mode == Mode::Extended { EXTENDED_REQUEST_MAGIC } else { REQUEST_MAGIC };
                bytes[..4].copy_from_slice(&magic.to_be_bytes());
            }
            if let Ok(Some(header)) = RequestHeader::decode(mode, &bytes) {
                let again = encode(mode, &header);
                prop_assert_eq!(&again, &bytes[..again.len()]);
            }
        }
    }
}
