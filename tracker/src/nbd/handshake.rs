//! Fixed newstyle negotiation, from the greeting to the choice of an export.
//!
//! Source: NetworkBlockDevice/nbd, `doc/proto.md`, "Handshake", "Option haggling". Runs on a
//! thread of its own under one deadline for the whole negotiation, so that a silent or slow
//! client costs nobody else. Nothing is allocated for a length before it has been checked.
//!
//! What the options settle is kept in one [`Agreement`] until the client chooses an export.
//!
//! STARTTLS: until it no byte is read beyond the option that is looked at, so that whatever stands
//! behind it in the clear reaches TLS, which refuses it, and never counts as said under TLS. What
//! was settled before it is forgotten. Where TLS is required nothing is told before it.

use std::io::{self, Read, Write};
use std::time::{Duration, Instant};

use zerocopy::{FromBytes, IntoBytes};

use super::listener::Stream;
use super::metadata::{Context, ContextRequest, ContextSet, take_string};
use super::request::PAYLOAD_BYTES_MAX;
use super::timed::Timed;
use super::tls::{Encryption, Secured};
use super::wire::{
    INIT_MAGIC, Mode, OPTION_MAGIC, OPTION_REPLY_MAGIC, OptionHeader, OptionReplyHeader,
    STRING_BYTES_MAX, handshake_flags, info, option, option_reply, transmission_flags,
};
use crate::disk::LiveSize;
use crate::engine::View;
use crate::extent::{BLOCK_SIZE, Epoch};

/// Time that a client has for its whole negotiation.
pub const DEADLINE: Duration = Duration::from_secs(10);
/// Largest data of an option that is read into memory; a name has at most 4096 bytes.
const OPTION_BYTES_MAX: u32 = 16 << 10;
/// Options that one client may send; real ones need fewer than ten.
const OPTIONS_MAX: u32 = 256;

/// What clients align their requests to that were told nothing.
const ALIGNMENT_EXPECTED: u32 = 512;

/// An export as the negotiation shows it.
#[derive(Clone, Debug)]
pub struct Export {
    /// Its name.
    pub name: String,
    /// Its size, which may grow.
    pub size: LiveSize,
    /// Writes are refused.
    pub read_only: bool,
    /// Offsets and lengths must be multiples of so many bytes.
    pub alignment: u32,
    /// A journal remembers its changes.
    pub tracked: bool,
    /// It is a frozen view of another export.
    pub is_view: bool,
}

impl Export {
    /// The export of a frozen view of this one, NAME@EPOCH.
    pub fn frozen(&self, view: &View) -> Self {
        Self {
            name: view_name(&self.name, view.frozen.epoch),
            size: LiveSize::new(view.size_bytes()),
            read_only: true,
            alignment: self.alignment,
            tracked: true,
            is_view: true,
        }
    }

    /// Whether clients must have been told of the alignment before they may come in. Those that do
    /// not ask keep to sectors of 512 bytes ("Size constraints").
    fn needs_block_size(&self) -> bool {
        self.alignment > ALIGNMENT_EXPECTED
    }

    fn transmission_flags(&self, mode: Mode, contexts: ContextSet) -> u16 {
        use transmission_flags as flags;
        let mut offered = flags::HAS_FLAGS
            | flags::SEND_FLUSH
            | flags::SEND_FUA
            | flags::CAN_MULTI_CONN
            | flags::SEND_CACHE;
        if self.read_only {
            offered |= flags::READ_ONLY;
        } else {
            offered |= flags::SEND_TRIM | flags::SEND_WRITE_ZEROES | flags::SEND_FAST_ZERO;
        }
        if self.is_view {
            // Nothing of it can be written, nor ever gets more durable.
            offered &= !flags::SEND_FUA;
        }
        if mode != Mode::Simple {
            offered |= flags::SEND_DF;
        }
        if mode == Mode::Extended && !contexts.is_empty() {
            offered |= flags::BLOCK_STATUS_PAYLOAD;
        }
        offered
    }

    /// The meta contexts that can be selected.
    fn contexts(&self) -> ContextSet {
        let mut available = ContextSet::NONE;
        for context in Context::ALL {
            if self.tracked || !context.tells_changes() {
                available.insert(context);
            }
        }
        available
    }
}

/// Name of the export of a frozen view.
pub fn view_name(disk: &str, epoch: Epoch) -> String {
    format!("{disk}@{epoch}")
}

/// What a client has chosen for its transmission phase.
#[derive(Clone, Copy, Debug)]
pub struct Session {
    /// Index of the export.
    pub export: usize,
    /// The headers in use.
    pub mode: Mode,
    /// The meta contexts in use.
    pub contexts: ContextSet,
}

/// What the options have settled so far.
#[derive(Clone, Copy, Debug, Default)]
struct Agreement {
    /// The 124 zero bytes after EXPORT_NAME are left out.
    no_zeroes: bool,
    mode: Mode,
    /// The export that contexts were selected for, and which.
    selection: Option<(usize, ContextSet)>,
}

impl Agreement {
    /// Contexts count only for the export that they were selected for.
    fn session(&self, export: usize) -> Session {
        let contexts = match self.selection {
            Some((selected, contexts)) if selected == export => contexts,
            _ => ContextSet::NONE,
        };
        let mode = self.mode;
        Session {
            export,
            mode,
            contexts,
        }
    }
}

/// A client that is ready for transmission.
#[derive(Debug)]
pub struct Negotiated {
    /// What it has chosen.
    pub session: Session,
    /// The TLS that it speaks, if it does.
    pub secured: Option<Secured>,
}

/// Negotiates with one client. Returns what it chose, or `None` when it took its leave in good
/// order.
///
/// # Errors
///
/// The peer broke the protocol, went away, or was slower than [`DEADLINE`].
pub fn negotiate(
    stream: &Stream,
    exports: &[Export],
    encryption: &Encryption,
) -> io::Result<Option<Negotiated>> {
    let mut channel = Channel {
        socket: Timed::new(stream, Instant::now() + DEADLINE),
        secured: None,
        encryption,
        agreement: Agreement::default(),
    };
    let outcome = channel.greet().and_then(|()| channel.haggle(exports));
    let Channel {
        mut socket,
        mut secured,
        ..
    } = channel;
    if let Ok(Some(session)) = outcome {
        return Ok(Some(Negotiated { session, secured }));
    }
    if let Some(secured) = &mut secured {
        secured.say_goodbye(&mut socket);
    }
    outcome.map(|_| None)
}

/// What follows an answered option.
enum Next {
    Option,
    Transmission(Session),
    Close,
}

fn violation(what: String) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("the client sent {what}"),
    )
}

/// The socket under the deadline, and what was settled over it.
struct Channel<'a> {
    socket: Timed<'a>,
    /// TLS over the socket, once it has begun.
    secured: Option<Secured>,
    encryption: &'a Encryption,
    agreement: Agreement,
}

impl Channel<'_> {
    fn receive(&mut self, buffer: &mut [u8]) -> io::Result<()> {
        match &mut self.secured {
            Some(secured) => secured.over(&mut self.socket).read_exact(buffer),
            None => self.socket.read_exact(buffer),
        }
    }

    fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        match &mut self.secured {
            Some(secured) => {
                let mut stream = secured.over(&mut self.socket);
                stream.write_all(bytes)?;
                stream.flush()
            }
            None => self.socket.write_all(bytes),
        }
    }

    /// The greeting and the flags that answer it.
    fn greet(&mut self) -> io::Result<()> {
        let mut greeting = Vec::with_capacity(18);
        greeting.extend_from_slice(&INIT_MAGIC.to_be_bytes());
        greeting.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
        let offered = handshake_flags::FIXED_NEWSTYLE | handshake_flags::NO_ZEROES;
        greeting.extend_from_slice(&offered.to_be_bytes());
        self.send(&greeting)?;

        let mut flags = [0; 4];
        self.receive(&mut flags)?;
        let flags = u32::from_be_bytes(flags);
        if flags & !u32::from(offered) != 0 {
            return Err(violation(format!("unknown client flags {flags:#x}")));
        }
        self.agreement.no_zeroes = flags & u32::from(handshake_flags::NO_ZEROES) != 0;
        if flags & u32::from(handshake_flags::FIXED_NEWSTYLE) == 0 {
            // Such a client understands neither STARTTLS nor a demand for it.
            if matches!(self.encryption, Encryption::Required(_)) {
                return Err(violation("no flag of fixed newstyle, without TLS".into()));
            }
            self.encryption = &Encryption::Off;
        }
        Ok(())
    }

    /// Answers options until the client chooses an export or takes its leave.
    fn haggle(&mut self, exports: &[Export]) -> io::Result<Option<Session>> {
        for _ in 0..OPTIONS_MAX {
            let mut header = [0; size_of::<OptionHeader>()];
            self.receive(&mut header)?;
            let header = OptionHeader::read_from_bytes(&header)
                .map_err(|_| violation("an option header of the wrong size".into()))?;
            if header.magic.get() != OPTION_MAGIC {
                return Err(violation(format!("option magic {:#x}", header.magic.get())));
            }
            let (number, length) = (header.option.get(), header.length.get());
            let next = match self.receive_option_data(length)? {
                _ if self.needs_tls(number) => self.demand_tls(number)?,
                Some(data) => self.answer(number, &data, exports)?,
                None => self.refuse_length(number, length)?,
            };
            match next {
                Next::Option => {}
                Next::Transmission(session) => return Ok(Some(session)),
                Next::Close => return Ok(None),
            }
        }
        Err(violation(format!("more than {OPTIONS_MAX} options")))
    }

    /// Whether an option is not answered before TLS has begun.
    fn needs_tls(&self, number: u32) -> bool {
        matches!(self.encryption, Encryption::Required(_))
            && self.secured.is_none()
            && !matches!(number, option::STARTTLS | option::ABORT)
    }

    fn demand_tls(&mut self, number: u32) -> io::Result<Next> {
        if number == option::EXPORT_NAME {
            return Err(violation("the name of an export before STARTTLS".into()));
        }
        let text = "This server requires TLS: begin with STARTTLS";
        self.refuse(number, option_reply::ERR_TLS_REQD, text)
    }

    fn start_tls(&mut self, data: &[u8]) -> io::Result<Next> {
        let number = option::STARTTLS;
        if !data.is_empty() {
            let text = "The option takes no data";
            return self.refuse(number, option_reply::ERR_INVALID, text);
        }
        if self.secured.is_some() {
            let text = "TLS is in use already";
            return self.refuse(number, option_reply::ERR_INVALID, text);
        }
        let (Encryption::Allowed(tls) | Encryption::Required(tls)) = self.encryption else {
            let text = "TLS is not offered on this socket";
            return self.refuse(number, option_reply::ERR_POLICY, text);
        };
        self.reply(number, option_reply::ACK, &[])?;
        self.secured = Some(tls.accept(&mut self.socket)?);
        // The flag is of the greeting, which is not repeated.
        self.agreement = Agreement {
            no_zeroes: self.agreement.no_zeroes,
            ..Agreement::default()
        };
        Ok(Next::Option)
    }

    /// Reads an option's data; too long ones are thrown away and give `None`.
    fn receive_option_data(&mut self, length: u32) -> io::Result<Option<Vec<u8>>> {
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
        Ok(None)
    }

    fn refuse_length(&mut self, number: u32, length: u32) -> io::Result<Next> {
        if number == option::EXPORT_NAME {
            return Err(violation(format!("an export name of {length} bytes")));
        }
        let text = format!("The option's data exceed {OPTION_BYTES_MAX} bytes");
        self.refuse(number, option_reply::ERR_TOO_BIG, &text)
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

    /// Replies with an error and its text; the negotiation goes on.
    fn refuse(&mut self, option: u32, kind: u32, text: &str) -> io::Result<Next> {
        self.reply(option, kind, text.as_bytes())?;
        Ok(Next::Option)
    }

    fn answer(&mut self, number: u32, data: &[u8], exports: &[Export]) -> io::Result<Next> {
        match number {
            option::EXPORT_NAME => self.export_name(data, exports),
            option::ABORT => {
                // The client may have closed already; that is its right after ABORT.
                let _gone = self.reply(number, option_reply::ACK, &[]);
                Ok(Next::Close)
            }
            option::LIST => self.list(data, exports),
            option::STARTTLS => self.start_tls(data),
            option::INFO | option::GO => self.describe(number, data, exports),
            option::STRUCTURED_REPLY => self.set_mode(number, data, Mode::Structured),
            option::EXTENDED_HEADERS => self.set_mode(number, data, Mode::Extended),
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => {
                self.meta_contexts(number, data, exports)
            }
            _ => {
                let text = format!("Option {number} is not supported");
                self.refuse(number, option_reply::ERR_UNSUP, &text)
            }
        }
    }

    fn set_mode(&mut self, number: u32, data: &[u8], mode: Mode) -> io::Result<Next> {
        if !data.is_empty() {
            return self.refuse(
                number,
                option_reply::ERR_INVALID,
                "The option takes no data",
            );
        }
        if mode == Mode::Structured && self.agreement.mode == Mode::Extended {
            let text = "Extended headers are in use and have structured replies";
            return self.refuse(number, option_reply::ERR_EXT_HEADER_REQD, text);
        }
        self.agreement.mode = mode;
        self.reply(number, option_reply::ACK, &[])?;
        Ok(Next::Option)
    }

    fn meta_contexts(&mut self, number: u32, data: &[u8], exports: &[Export]) -> io::Result<Next> {
        let sets = number == option::SET_META_CONTEXT;
        if sets {
            // Whatever comes of it, the selection before it is gone.
            self.agreement.selection = None;
        }
        if self.agreement.mode == Mode::Simple {
            let text = "Meta contexts need structured replies";
            return self.refuse(number, option_reply::ERR_INVALID, text);
        }
        let request = match ContextRequest::parse(data) {
            Ok(request) => request,
            Err(why) => return self.refuse(number, option_reply::ERR_INVALID, why.text()),
        };
        let Some(index) = find(exports, request.export) else {
            return self.unknown_export(number, request.export);
        };
        let available = exports[index].contexts();
        let found = if sets {
            let selected = request.selected(available);
            self.agreement.selection = Some((index, selected));
            selected
        } else {
            request.listed(available)
        };
        for context in found.iter() {
            // In a list the number means nothing and is zero.
            let id = if sets { context.id() } else { 0 };
            let mut item = id.to_be_bytes().to_vec();
            item.extend_from_slice(context.name().as_bytes());
            self.reply(number, option_reply::META_CONTEXT, &item)?;
        }
        self.reply(number, option_reply::ACK, &[])?;
        Ok(Next::Option)
    }

    fn unknown_export(&mut self, number: u32, name: &[u8]) -> io::Result<Next> {
        let text = format!("There is no export {:?}", String::from_utf8_lossy(name));
        let end = text.floor_char_boundary(STRING_BYTES_MAX);
        self.refuse(number, option_reply::ERR_UNKNOWN, &text[..end])
    }

    fn export_name(&mut self, data: &[u8], exports: &[Export]) -> io::Result<Next> {
        if self.agreement.mode == Mode::Extended {
            return Err(violation("EXPORT_NAME after extended headers".into()));
        }
        // This option has no error reply: the connection closes.
        let Some(index) = find(exports, data) else {
            return Err(violation(
                "the name of an export that does not exist".into(),
            ));
        };
        let (export, session) = (&exports[index], self.agreement.session(index));
        if export.needs_block_size() {
            let what = "EXPORT_NAME, which cannot be told the block size of the export";
            return Err(violation(what.into()));
        }
        let flags = export.transmission_flags(session.mode, session.contexts);
        let mut message = export.size.bytes().to_be_bytes().to_vec();
        message.extend_from_slice(&flags.to_be_bytes());
        if !self.agreement.no_zeroes {
            message.resize(message.len() + 124, 0);
        }
        self.send(&message)?;
        Ok(Next::Transmission(session))
    }

    fn list(&mut self, data: &[u8], exports: &[Export]) -> io::Result<Next> {
        if !data.is_empty() {
            return self.refuse(
                option::LIST,
                option_reply::ERR_INVALID,
                "LIST takes no data",
            );
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
            let text = "The lengths inside the option's data do not add up";
            return self.refuse(number, option_reply::ERR_INVALID, text);
        };
        let Some(index) = find(exports, name) else {
            return self.unknown_export(number, name);
        };
        let (export, session) = (&exports[index], self.agreement.session(index));
        let asks = wanted.contains(&info::BLOCK_SIZE);
        if number == option::GO && export.needs_block_size() && !asks {
            let text = format!(
                "Requests must be multiples of {} bytes: ask for the block size first",
                export.alignment
            );
            return self.refuse(number, option_reply::ERR_BLOCK_SIZE_REQD, &text);
        }
        let flags = export.transmission_flags(session.mode, session.contexts);
        let mut item = info::EXPORT.to_be_bytes().to_vec();
        item.extend_from_slice(&export.size.bytes().to_be_bytes());
        item.extend_from_slice(&flags.to_be_bytes());
        self.reply(number, option_reply::INFO, &item)?;
        if wanted.contains(&info::NAME) {
            let mut item = info::NAME.to_be_bytes().to_vec();
            item.extend_from_slice(export.name.as_bytes());
            self.reply(number, option_reply::INFO, &item)?;
        }
        if asks {
            let mut item = info::BLOCK_SIZE.to_be_bytes().to_vec();
            for size in [export.alignment, BLOCK_SIZE as u32, PAYLOAD_BYTES_MAX] {
                item.extend_from_slice(&size.to_be_bytes());
            }
            self.reply(number, option_reply::INFO, &item)?;
        }
        self.reply(number, option_reply::ACK, &[])?;
        Ok(if number == option::GO {
            Next::Transmission(session)
        } else {
            Next::Option
        })
    }
}

/// The export of this name; the empty name is the default export where there is one disk.
fn find(exports: &[Export], name: &[u8]) -> Option<usize> {
    let disks = exports.iter().filter(|export| !export.is_view).count();
    if name.is_empty() && disks == 1 {
        return exports.iter().position(|export| !export.is_view);
    }
    let named = |name: &[u8]| {
        let is_it = |export: &Export| export.name.as_bytes() == name;
        exports.iter().position(is_it)
    };
    named(name).or_else(|| named(full_view_name(name)?.as_bytes()))
}

/// The name of a view whose epoch was given without its leading zeroes.
fn full_view_name(name: &[u8]) -> Option<String> {
    let (disk, epoch) = std::str::from_utf8(name).ok()?.rsplit_once('@')?;
    Some(view_name(disk, Epoch::parse(epoch)?))
}

/// The name and the wanted kinds of information of INFO and GO; `None` if malformed.
pub(crate) fn parse_info_request(data: &[u8]) -> Option<(&[u8], Vec<u16>)> {
    let (name, rest) = take_string(data).ok()?;
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
