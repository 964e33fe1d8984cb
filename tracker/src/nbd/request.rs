//! Every check of a request and the error number of each, in one place. Pure.
//!
//! Source: NetworkBlockDevice/nbd, `doc/proto.md`, "Request types" and "Error values".

use super::wire::{ReplyError, RequestHeader, command, command_flags};

/// The largest payload of one READ or WRITE in bytes, as told in the block size information.
pub const PAYLOAD_BYTES_MAX: u32 = 32 << 20;

/// What a valid request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Read the range.
    Read,
    /// Write the payload to the range.
    Write,
    /// Sync what was answered.
    Flush,
    /// Give the range back.
    Trim,
    /// Make the range zero; with `no_hole` it stays allocated.
    WriteZeroes {
        /// The range must stay allocated.
        no_hole: bool,
    },
}

/// A request that has passed every check: the range lies inside the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// What to do.
    pub command: Command,
    /// The client's cookie, to be returned.
    pub cookie: [u8; 8],
    /// Offset in bytes; the range ends inside the disk.
    pub offset: u64,
    /// Length in bytes; zero for FLUSH.
    pub length: u32,
    /// The effect must be durable before the reply.
    pub force_unit_access: bool,
}

/// What is to be done with a request header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Carry it out.
    Accept(Request),
    /// Answer with this error, after `skip_bytes` of payload have been read and thrown away.
    Refuse {
        /// The error of the reply.
        error: ReplyError,
        /// Payload to be skipped.
        skip_bytes: u32,
    },
    /// The client takes its leave: finish what is in flight and close.
    Disconnect,
}

/// What a request is checked against.
#[derive(Clone, Copy, Debug)]
pub struct ExportLimits {
    /// Size of the disk in bytes.
    pub size_bytes: u64,
    /// Writes are refused.
    pub read_only: bool,
}

/// Judges one request. The caller has checked the magic.
pub fn validate(header: &RequestHeader, limits: ExportLimits) -> Verdict {
    let flags = header.flags.get();
    let length = header.length.get();
    let offset = header.offset.get();
    let number = header.command.get();
    let skip_bytes = if number == command::WRITE { length } else { 0 };
    let refuse = |error| Verdict::Refuse { error, skip_bytes };

    let (command, flags_allowed, past_end) = match number {
        command::READ => (Command::Read, command_flags::FUA, ReplyError::Invalid),
        command::WRITE => (Command::Write, command_flags::FUA, ReplyError::NoSpace),
        command::FLUSH => (Command::Flush, command_flags::FUA, ReplyError::Invalid),
        command::TRIM => (Command::Trim, command_flags::FUA, ReplyError::Invalid),
        command::WRITE_ZEROES => (
            Command::WriteZeroes {
                no_hole: flags & command_flags::NO_HOLE != 0,
            },
            command_flags::FUA | command_flags::NO_HOLE,
            ReplyError::NoSpace,
        ),
        command::DISCONNECT => return Verdict::Disconnect,
        _ => return refuse(ReplyError::Invalid),
    };
    if flags & !flags_allowed != 0 {
        return refuse(ReplyError::Invalid);
    }
    let writes = !matches!(command, Command::Read | Command::Flush);
    if writes && limits.read_only {
        return refuse(ReplyError::NotPermitted);
    }
    if command == Command::Flush {
        // Offset and length of a FLUSH are reserved and must be zero.
        if offset != 0 || length != 0 {
            return refuse(ReplyError::Invalid);
        }
    } else if offset
        .checked_add(u64::from(length))
        .is_none_or(|end| end > limits.size_bytes)
    {
        return refuse(past_end);
    }
    if matches!(command, Command::Read | Command::Write) && length > PAYLOAD_BYTES_MAX {
        return refuse(ReplyError::Invalid);
    }
    Verdict::Accept(Request {
        command,
        cookie: header.cookie,
        offset,
        length,
        force_unit_access: writes && flags & command_flags::FUA != 0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nbd::wire::REQUEST_MAGIC;
    use proptest::prelude::*;

    fn header(number: u16, flags: u16, offset: u64, length: u32) -> RequestHeader {
        RequestHeader {
            magic: REQUEST_MAGIC.into(),
            flags: flags.into(),
            command: number.into(),
            cookie: *b"12345678",
            offset: offset.into(),
            length: length.into(),
        }
    }

    const LIMITS: ExportLimits = ExportLimits {
        size_bytes: 1 << 20,
        read_only: false,
    };

    #[test]
    fn errors_past_the_end_follow_the_specification() {
        let table = [
            (command::READ, ReplyError::Invalid),
            (command::WRITE, ReplyError::NoSpace),
            (command::TRIM, ReplyError::Invalid),
            (command::WRITE_ZEROES, ReplyError::NoSpace),
        ];
        for (number, expected) in table {
            for (offset, length) in [(1 << 20, 1), ((1 << 20) - 1, 2), (u64::MAX, 1)] {
                match validate(&header(number, 0, offset, length), LIMITS) {
                    Verdict::Refuse { error, .. } => assert_eq!(error, expected),
                    other => panic!("command {number} at {offset}: {other:?}"),
                }
            }
        }
    }

    #[test]
    fn a_refused_write_skips_its_payload() {
        let limits = ExportLimits {
            read_only: true,
            ..LIMITS
        };
        assert_eq!(
            validate(&header(command::WRITE, 0, 0, 512), limits),
            Verdict::Refuse {
                error: ReplyError::NotPermitted,
                skip_bytes: 512
            }
        );
    }

    #[test]
    fn fua_on_a_read_only_reads() {
        match validate(&header(command::READ, command_flags::FUA, 0, 512), LIMITS) {
            Verdict::Accept(request) => assert!(!request.force_unit_access),
            other => panic!("{other:?}"),
        }
    }

    proptest! {
        #[test]
        fn what_is_accepted_lies_inside_the_disk(
            number in 0u16..12, flags in any::<u16>(), offset in any::<u64>(), length in any::<u32>(),
            size_bytes in 0u64..1 << 40, near in any::<bool>(),
        ) {
            let offset = if near { size_bytes.wrapping_sub(offset % 65536) } else { offset };
            let limits = ExportLimits { size_bytes, read_only: false };
            if let Verdict::Accept(request) = validate(&header(number, flags % 4, offset, length), limits) {
                prop_assert!(request.offset + u64::from(request.length) <= size_bytes);
            }
        }
    }
}
