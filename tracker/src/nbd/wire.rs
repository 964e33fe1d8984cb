//! Numbers and layouts of the NBD protocol. Pure.
//!
//! Source: NetworkBlockDevice/nbd, `doc/proto.md`, sections "Values", "Transmission" and
//! "Option haggling". All integers on the wire are big-endian.

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
/// Head of every simple reply in transmission.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;

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
    /// A FLUSH on one connection covers what was answered on all others.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
}

/// Options of the negotiation.
pub mod option {
    /// Choose an export and go to transmission; has no error reply.
    pub const EXPORT_NAME: u32 = 1;
    /// End the negotiation.
    pub const ABORT: u32 = 2;
    /// List the exports.
    pub const LIST: u32 = 3;
    /// Describe an export.
    pub const INFO: u32 = 6;
    /// Choose an export and go to transmission.
    pub const GO: u32 = 7;
}

/// Types of option replies.
pub mod option_reply {
    /// The option is done.
    pub const ACK: u32 = 1;
    /// One export of a LIST.
    pub const SERVER: u32 = 2;
    /// One item of information for INFO or GO.
    pub const INFO: u32 = 3;
    /// The option is not known.
    pub const ERR_UNSUPPORTED: u32 = (1 << 31) + 1;
    /// The option's data are malformed.
    pub const ERR_INVALID: u32 = (1 << 31) + 3;
    /// The export does not exist.
    pub const ERR_UNKNOWN: u32 = (1 << 31) + 6;
    /// The request is larger than the server takes.
    pub const ERR_TOO_BIG: u32 = (1 << 31) + 9;
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
    pub const DISCONNECT: u16 = 2;
    /// Sync what was answered.
    pub const FLUSH: u16 = 3;
    /// The range is not needed any more.
    pub const TRIM: u16 = 4;
    /// The range becomes zero.
    pub const WRITE_ZEROES: u16 = 6;
}

/// Flags of a request.
pub mod command_flags {
    /// Force unit access: the data are durable before the reply.
    pub const FUA: u16 = 1 << 0;
    /// WRITE_ZEROES must leave the range allocated.
    pub const NO_HOLE: u16 = 1 << 1;
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
    /// Operation not supported.
    NotSupported = 95,
    /// The server is shutting down.
    ShuttingDown = 108,
}

impl ReplyError {
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

/// A request of the transmission phase; the payload of a WRITE follows.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RequestHeader {
    /// [`REQUEST_MAGIC`].
    pub magic: U32,
    /// Flags of [`command_flags`].
    pub flags: U16,
    /// A number of [`command`].
    pub command: U16,
    /// Chosen by the client, returned in the reply. Not interpreted.
    pub cookie: [u8; 8],
    /// Offset in bytes.
    pub offset: U64,
    /// Length in bytes.
    pub length: U32,
}

/// Bytes of a [`RequestHeader`].
pub const REQUEST_BYTES: usize = size_of::<RequestHeader>();
const _: () = assert!(REQUEST_BYTES == 28);

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

    #[test]
    fn a_request_has_the_layout_of_the_specification() {
        let mut bytes = Vec::new();
        bytes.extend_from_slice(&REQUEST_MAGIC.to_be_bytes());
        bytes.extend_from_slice(&1u16.to_be_bytes());
        bytes.extend_from_slice(&6u16.to_be_bytes());
        bytes.extend_from_slice(b"cookie!!");
        bytes.extend_from_slice(&0x1122_3344_5566_7788u64.to_be_bytes());
        bytes.extend_from_slice(&0x99aa_bbccu32.to_be_bytes());
        let header = RequestHeader::read_from_bytes(&bytes).unwrap();
        assert_eq!(header.command.get(), command::WRITE_ZEROES);
        assert_eq!(header.flags.get(), command_flags::FUA);
        assert_eq!(header.offset.get(), 0x1122_3344_5566_7788);
        assert_eq!(header.length.get(), 0x99aa_bbcc);
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
}
