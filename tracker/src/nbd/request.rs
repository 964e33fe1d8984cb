//! Every check of a request and the error number of each, in one place. Pure.
//!
//! Source: NetworkBlockDevice/nbd, `doc/proto.md`, "Request types", "Size constraints" and "Error
//! values", and its branch `extension-ext-header` for payloads and lengths of 64 bits.
//!
//! A request that uses what was not negotiated is refused as invalid like any other: no answer
//! depends on the client keeping to what it may do.

use super::metadata::ContextSet;
use super::reply::Address;
use super::wire::{Mode, ReplyError, RequestHeader, command, command_flags};

/// The largest payload of one READ or WRITE in bytes, as told in the block size information.
pub const PAYLOAD_BYTES_MAX: u32 = 32 << 20;
/// Bytes of the payload of a BLOCK_STATUS before its list of contexts: the length of the range.
const STATUS_PAYLOAD_HEAD_BYTES: u64 = 8;

/// What a valid request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Read the range.
    Read {
        /// The data must come in one piece.
        whole: bool,
    },
    /// Write the payload to the range.
    Write,
    /// Sync what was answered.
    Flush,
    /// Give the range back.
    Trim,
    /// Bring the range into the page cache.
    Cache,
    /// Make the range zero.
    WriteZeroes {
        /// The range must stay allocated.
        no_hole: bool,
        /// Fail rather than write zeroes.
        fast: bool,
    },
    /// Tell what these contexts say of the range.
    BlockStatus {
        /// The contexts to be told of; at least one.
        contexts: ContextSet,
        /// One extent only.
        one: bool,
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
    /// Length in bytes; zero for FLUSH, and at most [`PAYLOAD_BYTES_MAX`] for READ and WRITE.
    pub length: u64,
    /// The effect must be durable before the reply.
    pub force_unit_access: bool,
}

impl Request {
    /// What its replies repeat.
    pub fn address(&self) -> Address {
        Address {
            cookie: self.cookie,
            offset: self.offset,
        }
    }

    /// The offset after its last byte.
    pub fn end(&self) -> u64 {
        self.offset + self.length
    }

    /// Bytes that it moves over the socket.
    pub fn payload_bytes(&self) -> usize {
        match self.command {
            Command::Read { .. } | Command::Write => self.length as usize,
            _ => 0,
        }
    }

    /// Whether it is a READ, whose replies have a form of their own.
    pub fn is_read(&self) -> bool {
        matches!(self.command, Command::Read { .. })
    }
}

/// What is to be done with a request header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Carry it out.
    Accept(Request),
    /// Judge it by [`validate_block_status`] when so many bytes of payload are there.
    NeedsPayload {
        /// A few bytes.
        payload_bytes: usize,
    },
    /// Answer with this error, after `skip_bytes` of payload have been read and thrown away.
    Refuse {
        /// The error of the reply.
        error: ReplyError,
        /// What it says to a person.
        reason: &'static str,
        /// Payload to be skipped.
        skip_bytes: u32,
    },
    /// The client takes its leave: finish what is in flight and close.
    Disconnect,
    /// The client breaks the protocol in a way that has no answer: the same.
    Violation,
}

/// What a request is checked against.
#[derive(Clone, Copy, Debug)]
pub struct Terms {
    /// Size of the disk in bytes.
    pub size_bytes: u64,
    /// Writes are refused.
    pub read_only: bool,
    /// Offsets and lengths are multiples of so many bytes.
    pub alignment: u32,
    /// The headers in use.
    pub mode: Mode,
    /// The contexts that the client has selected.
    pub contexts: ContextSet,
}

/// Why a request is refused.
type Refusal = (ReplyError, &'static str);

/// Judges one request by its header.
pub fn validate(header: &RequestHeader, terms: &Terms) -> Verdict {
    if header.command == command::DISC {
        return Verdict::Disconnect;
    }
    let Some(skip_bytes) = announced_payload(header, terms.mode) else {
        return Verdict::Violation;
    };
    let with_payload = header.flags & command_flags::PAYLOAD_LEN != 0;
    if header.command == command::BLOCK_STATUS && with_payload && terms.mode == Mode::Extended {
        let ids_bytes = u64::from(skip_bytes).checked_sub(STATUS_PAYLOAD_HEAD_BYTES);
        // More numbers than contexts are selected cannot be right, and fewer than one neither.
        let ids_max = 4 * terms.contexts.count() as u64;
        if ids_bytes.is_some_and(|bytes| bytes % 4 == 0 && (4..=ids_max).contains(&bytes)) {
            let payload_bytes = skip_bytes as usize;
            return Verdict::NeedsPayload { payload_bytes };
        }
    }
    match check(header, terms) {
        Ok(request) => Verdict::Accept(request),
        Err((error, reason)) => Verdict::Refuse {
            error,
            reason,
            skip_bytes,
        },
    }
}

/// Judges a BLOCK_STATUS whose payload is there; `payload` has as many bytes as were asked for.
pub fn validate_block_status(header: &RequestHeader, payload: &[u8], terms: &Terms) -> Verdict {
    let refuse = |(error, reason)| Verdict::Refuse {
        error,
        reason,
        skip_bytes: 0,
    };
    let Some((length, ids)) = payload.split_first_chunk::<8>() else {
        return refuse((ReplyError::Invalid, "The payload is too short"));
    };
    let (ids, _) = ids.as_chunks::<4>();
    let ids = ids.iter().map(|id| u32::from_be_bytes(*id));
    let Some(contexts) = terms.contexts.select(ids) else {
        let reason = "The payload names a context twice or one that was not selected";
        return refuse((ReplyError::Invalid, reason));
    };
    let header = RequestHeader {
        length: u64::from_be_bytes(*length),
        flags: header.flags & !command_flags::PAYLOAD_LEN,
        ..*header
    };
    match check(&header, &Terms { contexts, ..*terms }) {
        Ok(request) => Verdict::Accept(request),
        Err(refusal) => refuse(refusal),
    }
}

/// Bytes of payload that follow the header; `None` if they are more than anybody may send.
fn announced_payload(header: &RequestHeader, mode: Mode) -> Option<u32> {
    let writes = header.command == command::WRITE;
    let flagged = header.flags & command_flags::PAYLOAD_LEN != 0;
    match mode {
        // qemu's client leaves the flag out of its WRITE; the data follow all the same.
        Mode::Extended if flagged || writes => u32::try_from(header.length)
            .ok()
            .filter(|length| *length <= PAYLOAD_BYTES_MAX),
        Mode::Simple | Mode::Structured if writes => u32::try_from(header.length).ok(),
        _ => Some(0),
    }
}

fn check(header: &RequestHeader, terms: &Terms) -> Result<Request, Refusal> {
    let (command, flags_allowed) = command_of(header, terms)?;
    if header.flags & !flags_allowed != 0 {
        return Err((ReplyError::Invalid, "The command does not take such a flag"));
    }
    let writes = matches!(
        command,
        Command::Write | Command::Trim | Command::WriteZeroes { .. }
    );
    if writes && terms.read_only {
        return Err((ReplyError::NotPermitted, "The export is read-only"));
    }
    check_range(header, command, terms)?;
    Ok(Request {
        command,
        cookie: header.cookie,
        offset: header.offset,
        length: header.length,
        force_unit_access: writes && header.flags & command_flags::FUA != 0,
    })
}

/// The command and the flags that it takes.
fn command_of(header: &RequestHeader, terms: &Terms) -> Result<(Command, u16), Refusal> {
    let has = |flag: u16| header.flags & flag != 0;
    let only = |allowed: bool, flag: u16| if allowed { flag } else { 0 };
    let (command, flags_allowed) = match header.command {
        command::READ => {
            let whole = has(command_flags::DF);
            let flag = only(terms.mode != Mode::Simple, command_flags::DF);
            (Command::Read { whole }, flag)
        }
        command::WRITE => {
            let extended = terms.mode == Mode::Extended;
            (Command::Write, only(extended, command_flags::PAYLOAD_LEN))
        }
        command::FLUSH => (Command::Flush, 0),
        command::TRIM => (Command::Trim, 0),
        command::CACHE => (Command::Cache, 0),
        command::WRITE_ZEROES => {
            let (no_hole, fast) = (has(command_flags::NO_HOLE), has(command_flags::FAST_ZERO));
            // A read-only export does not offer FAST_ZERO.
            let fast_zero = only(!terms.read_only, command_flags::FAST_ZERO);
            let flags = command_flags::NO_HOLE | fast_zero;
            (Command::WriteZeroes { no_hole, fast }, flags)
        }
        command::BLOCK_STATUS if terms.contexts.is_empty() => {
            return Err((ReplyError::Invalid, "No meta context was selected"));
        }
        command::BLOCK_STATUS => {
            let (contexts, one) = (terms.contexts, has(command_flags::REQ_ONE));
            (
                Command::BlockStatus { contexts, one },
                command_flags::REQ_ONE,
            )
        }
        _ => return Err((ReplyError::Invalid, "There is no such command")),
    };
    // FUA is valid on every command, also where it means nothing.
    Ok((command, flags_allowed | command_flags::FUA))
}

fn check_range(header: &RequestHeader, command: Command, terms: &Terms) -> Result<(), Refusal> {
    let (offset, length) = (header.offset, header.length);
    if command == Command::Flush {
        if offset != 0 || length != 0 {
            return Err((ReplyError::Invalid, "A FLUSH has neither offset nor length"));
        }
        return Ok(());
    }
    let end = offset.checked_add(length);
    if end.is_none_or(|end| end > terms.size_bytes) {
        let error = match command {
            Command::Write | Command::WriteZeroes { .. } => ReplyError::NoSpace,
            _ => ReplyError::Invalid,
        };
        return Err((error, "The range ends after the end of the export"));
    }
    if !(offset | length).is_multiple_of(u64::from(terms.alignment)) {
        let reason = "Offset or length is no multiple of the minimum block size";
        return Err((ReplyError::Invalid, reason));
    }
    match command {
        Command::Read { .. } | Command::Write if length > u64::from(PAYLOAD_BYTES_MAX) => {
            // EOVERFLOW tells a client to try smaller pieces; simple replies do not have it.
            let structured_read = command != Command::Write && terms.mode != Mode::Simple;
            let error = if structured_read {
                ReplyError::Overflow
            } else {
                ReplyError::Invalid
            };
            Err((error, "The length exceeds the largest payload"))
        }
        Command::BlockStatus { .. } if length == 0 => {
            let reason = "The status of no bytes cannot be told";
            Err((ReplyError::Invalid, reason))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nbd::metadata::Context;
    use proptest::prelude::*;

    fn header(number: u16, flags: u16, offset: u64, length: u64) -> RequestHeader {
        RequestHeader {
            flags,
            command: number,
            cookie: *b"12345678",
            offset,
            length,
        }
    }

    const TERMS: Terms = Terms {
        size_bytes: 1 << 20,
        read_only: false,
        alignment: 1,
        mode: Mode::Simple,
        contexts: ContextSet::NONE,
    };

    fn extended_terms() -> Terms {
        let mut contexts = ContextSet::NONE;
        contexts.insert(Context::Allocation);
        contexts.insert(Context::Dirty);
        Terms {
            mode: Mode::Extended,
            contexts,
            ..TERMS
        }
    }

    #[track_caller]
    fn refused(verdict: Verdict, expected: ReplyError) {
        match verdict {
            Verdict::Refuse { error, .. } => assert_eq!(error, expected),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn errors_past_the_end_follow_the_specification() {
        let table = [
            (command::READ, ReplyError::Invalid),
            (command::WRITE, ReplyError::NoSpace),
            (command::TRIM, ReplyError::Invalid),
            (command::CACHE, ReplyError::Invalid),
            (command::WRITE_ZEROES, ReplyError::NoSpace),
        ];
        for (number, expected) in table {
            for (offset, length) in [(1 << 20, 1), ((1 << 20) - 1, 2), (u64::MAX, 1)] {
                refused(
                    validate(&header(number, 0, offset, length), &TERMS),
                    expected,
                );
            }
        }
        let past = header(command::BLOCK_STATUS, 0, 1 << 20, 1);
        refused(validate(&past, &extended_terms()), ReplyError::Invalid);
    }

    #[test]
    fn what_is_not_aligned_is_invalid() {
        let terms = Terms {
            alignment: 512,
            ..TERMS
        };
        for (offset, length) in [(256, 512), (512, 256), (1, 1)] {
            for number in [command::READ, command::WRITE, command::TRIM, command::CACHE] {
                let verdict = validate(&header(number, 0, offset, length), &terms);
                refused(verdict, ReplyError::Invalid);
            }
        }
        for number in [command::READ, command::WRITE, command::FLUSH] {
            let length = if number == command::FLUSH { 0 } else { 512 };
            let offset = length * 3;
            let verdict = validate(&header(number, 0, offset, length), &terms);
            assert!(matches!(verdict, Verdict::Accept(_)), "{verdict:?}");
        }
    }

    #[test]
    fn a_refused_write_skips_its_payload() {
        let terms = Terms {
            read_only: true,
            ..TERMS
        };
        let verdict = validate(&header(command::WRITE, 0, 0, 512), &terms);
        assert!(matches!(
            verdict,
            Verdict::Refuse {
                error: ReplyError::NotPermitted,
                skip_bytes: 512,
                ..
            }
        ));
    }

    #[test]
    fn fua_on_a_read_only_reads() {
        match validate(&header(command::READ, command_flags::FUA, 0, 512), &TERMS) {
            Verdict::Accept(request) => assert!(!request.force_unit_access),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_was_not_negotiated_is_invalid() {
        let status = header(command::BLOCK_STATUS, 0, 0, 512);
        refused(validate(&status, &TERMS), ReplyError::Invalid);
        let none = Terms {
            contexts: ContextSet::NONE,
            ..extended_terms()
        };
        for length in [0, 8, 12, 16, 1 << 20] {
            let payload = header(command::BLOCK_STATUS, command_flags::PAYLOAD_LEN, 0, length);
            match validate(&payload, &none) {
                Verdict::Refuse {
                    error: ReplyError::Invalid,
                    skip_bytes,
                    ..
                } => {
                    assert_eq!(u64::from(skip_bytes), length);
                }
                other => panic!("{other:?}"),
            }
        }
        let fragment = header(command::READ, command_flags::DF, 0, 512);
        refused(validate(&fragment, &TERMS), ReplyError::Invalid);
        let fast = header(command::WRITE_ZEROES, command_flags::FAST_ZERO, 0, 512);
        let read_only = Terms {
            read_only: true,
            ..TERMS
        };
        refused(validate(&fast, &read_only), ReplyError::Invalid);
    }

    #[test]
    fn an_extended_write_has_a_payload_with_and_without_the_flag() {
        for flags in [0, command_flags::PAYLOAD_LEN] {
            let write = header(command::WRITE, flags, 0, 512);
            match validate(&write, &extended_terms()) {
                Verdict::Accept(request) => assert_eq!(request.payload_bytes(), 512),
                other => panic!("{other:?}"),
            }
            let past = header(command::WRITE, flags, 1 << 20, 512);
            assert!(matches!(
                validate(&past, &extended_terms()),
                Verdict::Refuse {
                    skip_bytes: 512,
                    ..
                }
            ));
            let huge = header(command::WRITE, flags, 0, u64::MAX);
            assert_eq!(validate(&huge, &extended_terms()), Verdict::Violation);
        }
    }

    #[test]
    fn oversized_reads_overflow_where_the_reply_is_structured() {
        let size_bytes = 1 << 40;
        let large = header(command::READ, 0, 0, (32 << 20) + 1);
        let simple = Terms {
            size_bytes,
            ..TERMS
        };
        refused(validate(&large, &simple), ReplyError::Invalid);
        let structured = Terms {
            mode: Mode::Structured,
            ..simple
        };
        refused(validate(&large, &structured), ReplyError::Overflow);
    }

    #[test]
    fn payloads_beyond_the_limit_end_the_connection() {
        let flags = command_flags::PAYLOAD_LEN;
        for number in [command::WRITE, command::READ, command::BLOCK_STATUS, 99] {
            for length in [u64::from(PAYLOAD_BYTES_MAX) + 1, u64::MAX] {
                let huge = header(number, flags, 0, length);
                assert_eq!(validate(&huge, &extended_terms()), Verdict::Violation);
            }
        }
    }

    #[test]
    fn a_status_payload_chooses_among_the_selected_contexts() {
        let terms = extended_terms();
        let head = header(command::BLOCK_STATUS, command_flags::PAYLOAD_LEN, 0, 12);
        assert_eq!(
            validate(&head, &terms),
            Verdict::NeedsPayload { payload_bytes: 12 }
        );
        let payload = |length: u64, ids: &[u32]| {
            let mut bytes = length.to_be_bytes().to_vec();
            ids.iter()
                .for_each(|id| bytes.extend_from_slice(&id.to_be_bytes()));
            bytes
        };
        match validate_block_status(&head, &payload(4096, &[2]), &terms) {
            Verdict::Accept(Request {
                command: Command::BlockStatus { contexts, .. },
                length,
                ..
            }) => {
                assert!(contexts.contains(Context::Dirty) && contexts.count() == 1);
                assert_eq!(length, 4096);
            }
            other => panic!("{other:?}"),
        }
        for bad in [
            payload(4096, &[3]),
            payload(4096, &[1, 1]),
            payload(0, &[1]),
            payload(u64::MAX, &[1]),
        ] {
            refused(
                validate_block_status(&head, &bad, &terms),
                ReplyError::Invalid,
            );
        }
    }

    proptest! {
        #[test]
        fn what_is_accepted_lies_inside_the_disk_and_uses_what_was_negotiated(
            number in 0u16..12, flags in any::<u16>(), offset in any::<u64>(), length in any::<u64>(),
            size_bytes in 0u64..1 << 40, near in any::<bool>(), mode in 0usize..3, small in any::<bool>(),
            alignment in prop::sample::select(vec![1u32, 512, 4096]), read_only in any::<bool>(), selected in any::<bool>(), payload in any::<[u8; 16]>(),
        ) {
            let mode = [Mode::Simple, Mode::Structured, Mode::Extended][mode];
            let offset = if near { size_bytes.wrapping_sub(offset % 65536) } else { offset };
            let length = if small { length % 65536 } else { length };
            let length = if mode == Mode::Extended { length } else { length & 0xffff_ffff };
            let contexts = if selected { extended_terms().contexts } else { ContextSet::NONE };
            let terms = Terms { size_bytes, read_only, alignment, mode, contexts };
            let head = header(number, flags % 64, offset, length);
            let verdict = match validate(&head, &terms) {
                Verdict::NeedsPayload { payload_bytes } => {
                    prop_assert!(payload_bytes <= payload.len() && selected && mode == Mode::Extended);
                    validate_block_status(&head, &payload[..payload_bytes], &terms)
                }
                verdict => verdict,
            };
            if let Verdict::Accept(request) = verdict {
                prop_assert!(request.offset + request.length <= size_bytes);
                prop_assert_eq!((request.offset | request.length) % u64::from(alignment), 0);
                prop_assert!(request.payload_bytes() <= PAYLOAD_BYTES_MAX as usize);
                match request.command {
                    Command::Read { whole } => prop_assert!(!whole || mode != Mode::Simple),
                    Command::BlockStatus { contexts, .. } => {
                        prop_assert!(selected && !contexts.is_empty() && request.length > 0);
                    }
                    Command::Write | Command::Trim | Command::WriteZeroes { .. } => {
                        prop_assert!(!read_only);
                    }
                    Command::Flush | Command::Cache => {}
                }
            }
        }
    }
}
