//! Fixed newstyle negotiation, from the greeting to the choice of an export.
//!
//! Source: NetworkBlockDevice/nbd, `doc/proto.md`, "Handshake", "Option haggling". Runs on a
//! thread of its own under one deadline for the whole negotiation, so that a silent or slow
//! client costs nobody else. Nothing is allocated for a length before it has been checked.
//!
//! What it does not handle: structured replies, extended headers, meta contexts and TLS. They are
//! answered as unsupported options, which the specification makes a client accept.

use std::io::{self, Read, Write};
use std::time::{Duration, Instant};

use zerocopy::{FromBytes, IntoBytes};

use super::listener::Stream;
use super::request::PAYLOAD_BYTES_MAX;
use super::wire::{
    INIT_MAGIC, OPTION_MAGIC, OPTION_REPLY_MAGIC, OptionHeader, OptionReplyHeader, handshake_flags,
    info, option, option_reply, transmission_flags,
};
use crate::extent::BLOCK_SIZE;

/// Time that a client has for its whole negotiation.
pub const DEADLINE: Duration = Duration::from_secs(10);
/// Largest data of an option that is read into memory; a name has at most 4096 bytes.
const OPTION_BYTES_MAX: u32 = 16 << 10;
/// Options that one client may send; real ones need fewer than ten.
const OPTIONS_MAX: u32 = 256;
/// Longest export name, by the specification.
const NAME_BYTES_MAX: usize = 4096;

/// An export as the negotiation shows it.
#[derive(Clone, Debug)]
pub struct Export {
    /// Its name.
    pub name: String,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// Writes are refused.
    pub read_only: bool,
}

impl Export {
    fn transmission_flags(&self) -> u16 {
        use transmission_flags as flags;
        let common = flags::HAS_FLAGS | flags::SEND_FLUSH | flags::SEND_FUA | flags::CAN_MULTI_CONN;
        if self.read_only {
            common | flags::READ_ONLY
        } else {
            common | flags::SEND_TRIM | flags::SEND_WRITE_ZEROES
        }
    }
}

/// Negotiates with one client. Returns the index of the export that it chose, or `None` when it
/// took its leave in good order.
///
/// # Errors
///
/// The peer broke the protocol, went away, or was slower than [`DEADLINE`].
pub fn negotiate(stream: &Stream, exports: &[Export]) -> io::Result<Option<usize>> {
    let mut channel = Channel {
        stream,
        deadline: Instant::now() + DEADLINE,
    };
    let mut greeting = Vec::with_capacity(18);
    greeting.extend_from_slice(&INIT_MAGIC.to_be_bytes());
    greeting.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
    let offered = handshake_flags::FIXED_NEWSTYLE | handshake_flags::NO_ZEROES;
    greeting.extend_from_slice(&offered.to_be_bytes());
    channel.send(&greeting)?;

    let mut client_flags = [0; 4];
    channel.receive(&mut client_flags)?;
    let client_flags = u32::from_be_bytes(client_flags);
    if client_flags & !u32::from(offered) != 0 {
        return Err(violation(format!("unknown client flags {client_flags:#x}")));
    }
    let no_zeroes = client_flags & u32::from(handshake_flags::NO_ZEROES) != 0;

    for _ in 0..OPTIONS_MAX {
        let mut header = [0; size_of::<OptionHeader>()];
        channel.receive(&mut header)?;
        let header = OptionHeader::read_from_bytes(&header)
            .map_err(|_| violation("an option header of the wrong size".into()))?;
        if header.magic.get() != OPTION_MAGIC {
            return Err(violation(format!("option magic {:#x}", header.magic.get())));
        }
        let Some(data) = channel.receive_option_data(&header)? else {
            continue;
        };
        match channel.answer(header.option.get(), &data, exports, no_zeroes)? {
            Next::Option => {}
            Next::Transmission(index) => return Ok(Some(index)),
            Next::Close => return Ok(None),
        }
    }
    Err(violation(format!("more than {OPTIONS_MAX} options")))
}

/// What follows an answered option.
enum Next {
    Option,
    Transmission(usize),
    Close,
}

fn violation(what: String) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("the client sent {what}"),
    )
}

/// The socket under the deadline.
struct Channel<'a> {
    stream: &'a Stream,
    deadline: Instant,
}

impl Channel<'_> {
    fn remaining(&self) -> io::Result<Duration> {
        let remaining = self.deadline.saturating_duration_since(Instant::now());
        if remaining.is_zero() {
            return Err(io::Error::new(
                io::ErrorKind::TimedOut,
                "the negotiation took too long",
            ));
        }
        Ok(remaining)
    }

    fn receive(&mut self, mut buffer: &mut [u8]) -> io::Result<()> {
        while !buffer.is_empty() {
            self.stream.set_read_timeout(Some(self.remaining()?))?;
            match (&*self.stream).read(buffer) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => buffer = buffer.get_mut(count..).unwrap_or_default(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn send(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            self.stream.set_write_timeout(Some(self.remaining()?))?;
            match (&*self.stream).write(bytes) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => bytes = bytes.get(count..).unwrap_or_default(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Reads an option's data; too long ones are thrown away and answered, and give `None`.
    fn receive_option_data(&mut self, header: &OptionHeader) -> io::Result<Option<Vec<u8>>> {
        let length = header.length.get();
        if length <= OPTION_BYTES_MAX {
            let mut data = vec![0; length as usize];
            self.receive(&mut data)?;
            return Ok(Some(data));
        }
        let mut left = length as usize;
        let mut waste = [0; 4096];
        while left > 0 {
            let step = left.min(waste.len());
            self.receive(&mut waste[..step])?;
            left -= step;
        }
        if header.option.get() == option::EXPORT_NAME {
            return Err(violation(format!("an export name of {length} bytes")));
        }
        let text = format!("The option's data exceed {OPTION_BYTES_MAX} bytes");
        self.reply(
            header.option.get(),
            option_reply::ERR_TOO_BIG,
            text.as_bytes(),
        )?;
        Ok(None)
    }

    fn reply(&mut self, option: u32, kind: u32, data: &[u8]) -> io::Result<()> {
        let header = OptionReplyHeader {
            magic: OPTION_REPLY_MAGIC.into(),
            option: option.into(),
            kind: kind.into(),
            length: (data.len() as u32).into(),
        };
        let mut message = header.as_bytes().to_vec();
        message.extend_from_slice(data);
        self.send(&message)
    }

    fn answer(
        &mut self,
        number: u32,
        data: &[u8],
        exports: &[Export],
        no_zeroes: bool,
    ) -> io::Result<Next> {
        match number {
            option::EXPORT_NAME => self.export_name(data, exports, no_zeroes),
            option::ABORT => {
                // The client may have closed already; that is its right after ABORT.
                let _gone = self.reply(number, option_reply::ACK, &[]);
                Ok(Next::Close)
            }
            option::LIST => self.list(data, exports),
            option::INFO | option::GO => self.describe(number, data, exports),
            _ => {
                let text = format!("Option {number} is not supported");
                self.reply(number, option_reply::ERR_UNSUPPORTED, text.as_bytes())?;
                Ok(Next::Option)
            }
        }
    }

    fn export_name(
        &mut self,
        data: &[u8],
        exports: &[Export],
        no_zeroes: bool,
    ) -> io::Result<Next> {
        // This option has no error reply: the connection closes.
        let Some(index) = find(exports, data) else {
            return Err(violation(
                "the name of an export that does not exist".into(),
            ));
        };
        let export = &exports[index];
        let mut message = export.size_bytes.to_be_bytes().to_vec();
        message.extend_from_slice(&export.transmission_flags().to_be_bytes());
        if !no_zeroes {
            message.resize(message.len() + 124, 0);
        }
        self.send(&message)?;
        Ok(Next::Transmission(index))
    }

    fn list(&mut self, data: &[u8], exports: &[Export]) -> io::Result<Next> {
        if !data.is_empty() {
            self.reply(
                option::LIST,
                option_reply::ERR_INVALID,
                b"LIST takes no data",
            )?;
            return Ok(Next::Option);
        }
        for export in exports {
            let mut entry = (export.name.len() as u32).to_be_bytes().to_vec();
            entry.extend_from_slice(export.name.as_bytes());
            self.reply(option::LIST, option_reply::SERVER, &entry)?;
        }
        self.reply(option::LIST, option_reply::ACK, &[])?;
        Ok(Next::Option)
    }

    fn describe(&mut self, number: u32, data: &[u8], exports: &[Export]) -> io::Result<Next> {
        let Some((name, wanted)) = parse_info_request(data) else {
            let text = b"The lengths inside the option's data do not add up";
            self.reply(number, option_reply::ERR_INVALID, text)?;
            return Ok(Next::Option);
        };
        let Some(index) = find(exports, name) else {
            let text = format!("There is no export {:?}", String::from_utf8_lossy(name));
            self.reply(number, option_reply::ERR_UNKNOWN, text.as_bytes())?;
            return Ok(Next::Option);
        };
        let export = &exports[index];
        let mut item = info::EXPORT.to_be_bytes().to_vec();
        item.extend_from_slice(&export.size_bytes.to_be_bytes());
        item.extend_from_slice(&export.transmission_flags().to_be_bytes());
        self.reply(number, option_reply::INFO, &item)?;
        if wanted.contains(&info::NAME) {
            let mut item = info::NAME.to_be_bytes().to_vec();
            item.extend_from_slice(export.name.as_bytes());
            self.reply(number, option_reply::INFO, &item)?;
        }
        if wanted.contains(&info::BLOCK_SIZE) {
            let mut item = info::BLOCK_SIZE.to_be_bytes().to_vec();
            for size in [1, BLOCK_SIZE as u32, PAYLOAD_BYTES_MAX] {
                item.extend_from_slice(&size.to_be_bytes());
            }
            self.reply(number, option_reply::INFO, &item)?;
        }
        self.reply(number, option_reply::ACK, &[])?;
        Ok(if number == option::GO {
            Next::Transmission(index)
        } else {
            Next::Option
        })
    }
}

/// The export of this name; the empty name is the default export where there is one disk.
fn find(exports: &[Export], name: &[u8]) -> Option<usize> {
    if name.is_empty() && exports.len() == 1 {
        return Some(0);
    }
    exports
        .iter()
        .position(|export| export.name.as_bytes() == name)
}

/// The name and the wanted kinds of information of INFO and GO; `None` if malformed.
fn parse_info_request(data: &[u8]) -> Option<(&[u8], Vec<u16>)> {
    let (length, rest) = data.split_first_chunk::<4>()?;
    let length = usize::try_from(u32::from_be_bytes(*length)).ok()?;
    if length > NAME_BYTES_MAX {
        return None;
    }
    let (name, rest) = rest.split_at_checked(length)?;
    let (count, rest) = rest.split_first_chunk::<2>()?;
    let count = usize::from(u16::from_be_bytes(*count));
    if rest.len() != count * 2 {
        return None;
    }
    let wanted = rest
        .chunks_exact(2)
        .map(|pair| u16::from_be_bytes([pair[0], pair[1]]))
        .collect();
    Some((name, wanted))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn an_info_request_never_panics(data in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = parse_info_request(&data);
        }
    }

    #[test]
    fn lengths_must_add_up() {
        let mut data = 4u32.to_be_bytes().to_vec();
        data.extend_from_slice(b"disk");
        data.extend_from_slice(&1u16.to_be_bytes());
        assert!(parse_info_request(&data).is_none());
        data.extend_from_slice(&3u16.to_be_bytes());
        assert_eq!(parse_info_request(&data), Some((&b"disk"[..], vec![3])));
        data.push(0);
        assert!(parse_info_request(&data).is_none());
    }
}
