//! Every decoder of bytes from outside, fed with any bytes and with valid ones that were mutated.
//!
//! One registry, one harness: a decoder takes the bytes or refuses them, never panics, and what it
//! takes it takes again after it was encoded. Canaries are decoders with a fault put in; the harness
//! has to find each within the same number of cases, or it would prove nothing.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use proptest::prelude::*;
use proptest::test_runner::{RngAlgorithm, TestError, TestRng, TestRunner};
use xxhash_rust::xxh3::xxh3_64;
use zerocopy::{FromBytes, IntoBytes};

use crate::control::protocol::{Request as ControlRequest, decode_request, encode_request};
use crate::disk::{LiveSize, NewSize};
use crate::extent::{Epoch, Extent};
use crate::failpoint::set_boot;
use crate::journal::format::{
    COUNTER_MAX, DISK_BLOCKS_MAX, EPOCH_MAX, INTENT_PAGES_RANGE, Operation, PAGE_BYTES, PageState,
    RECORD_BLOCKS_MAX, Record, Slot, Superblock, decode_alarm, encode_alarm, judge_checkpoint_page,
    seal_checkpoint_page,
};
use crate::journal::intent::page::Transaction;
use crate::journal::specimen::{self, Account, Blocks, SIZE_BYTES};
use crate::journal::{self, Found};
use crate::nbd::handshake::{Export, negotiate, parse_info_request};
use crate::nbd::listener::Stream;
use crate::nbd::metadata::{Context, ContextRequest, ContextSet};
use crate::nbd::request::{Terms, Verdict, validate, validate_block_status};
use crate::nbd::tls::Encryption;
use crate::nbd::wire::{EXTENDED_REQUEST_MAGIC, Mode, REQUEST_MAGIC, RequestHeader};
use crate::preserve::format::{FLAG_ALL, HEADER_BYTES, Header, Layout as PreserveLayout, Subject};

/// A decoder under test.
struct Target {
    name: &'static str,
    /// Makes valid bytes of any numbers.
    valid: fn(&[u64]) -> Vec<u8>,
    /// Decodes, encodes, decodes. Whether the bytes were taken; an error if the two disagree.
    decode: fn(&[u8]) -> Result<bool, String>,
    /// Times as many cases as usual.
    factor: u32,
}

const TARGETS: [Target; 13] = [
    Target {
        name: "compact request",
        valid: |numbers| valid_request(Mode::Structured, numbers),
        decode: |bytes| request(Mode::Structured, bytes),
        factor: 4,
    },
    Target {
        name: "extended request",
        valid: |numbers| valid_request(Mode::Extended, numbers),
        decode: |bytes| request(Mode::Extended, bytes),
        factor: 4,
    },
    Target {
        name: "INFO and GO",
        valid: valid_info,
        decode: info,
        factor: 4,
    },
    Target {
        name: "meta contexts",
        valid: valid_contexts,
        decode: contexts,
        factor: 4,
    },
    Target {
        name: "negotiation",
        valid: valid_negotiation,
        decode: negotiation,
        factor: 1,
    },
    Target {
        name: "ring record",
        valid: valid_record,
        decode: |bytes| record(bytes, Record::decode),
        factor: 4,
    },
    Target {
        name: "superblock",
        valid: valid_superblock,
        decode: superblock,
        factor: 1,
    },
    Target {
        name: "alarm",
        valid: |numbers| encode_alarm(Epoch(numbers[0])).to_le_bytes().to_vec(),
        decode: alarm,
        factor: 4,
    },
    Target {
        name: "checkpoint page",
        valid: valid_page,
        decode: page,
        factor: 1,
    },
    Target {
        name: "preserve header",
        valid: valid_preserve,
        decode: preserve,
        factor: 4,
    },
    Target {
        name: "preserve header with a good check",
        valid: valid_preserve,
        decode: |bytes| preserve(&with_good_check(bytes)),
        factor: 4,
    },
    Target {
        name: "control request",
        valid: valid_control,
        decode: control,
        factor: 4,
    },
    Target {
        name: "status payload",
        valid: valid_status_payload,
        decode: status_payload,
        factor: 4,
    },
];

/// Recovery as a whole; a case takes milliseconds.
const JOURNAL: Target = Target {
    name: "journal",
    valid: valid_changes,
    decode: |bytes| recovery(bytes, |_| ()),
    factor: 1,
};

// Requests.

fn valid_request(mode: Mode, numbers: &[u64]) -> Vec<u8> {
    let magic = match mode {
        Mode::Extended => EXTENDED_REQUEST_MAGIC,
        _ => REQUEST_MAGIC,
    };
    // Small numbers more often than not, so that many are commands, and inside the disk.
    let mut bytes = magic.to_be_bytes().to_vec();
    bytes.extend_from_slice(&((numbers[0] % 64) as u16).to_be_bytes());
    bytes.extend_from_slice(&((numbers[1] % 10) as u16).to_be_bytes());
    bytes.extend_from_slice(&numbers[2].to_be_bytes());
    bytes.extend_from_slice(&(numbers[3] >> (numbers[4] % 64)).to_be_bytes());
    let length = numbers[5] >> (numbers[6] % 64);
    match mode {
        Mode::Extended => bytes.extend_from_slice(&length.to_be_bytes()),
        _ => bytes.extend_from_slice(&(length as u32).to_be_bytes()),
    }
    bytes
}

fn request(mode: Mode, bytes: &[u8]) -> Result<bool, String> {
    let Ok(Some(header)) = RequestHeader::decode(mode, bytes) else {
        return Ok(false);
    };
    let mut again = match mode {
        Mode::Extended => EXTENDED_REQUEST_MAGIC,
        _ => REQUEST_MAGIC,
    }
    .to_be_bytes()
    .to_vec();
    again.extend_from_slice(&header.flags.to_be_bytes());
    again.extend_from_slice(&header.command.to_be_bytes());
    again.extend_from_slice(&header.cookie);
    again.extend_from_slice(&header.offset.to_be_bytes());
    match mode {
        Mode::Extended => again.extend_from_slice(&header.length.to_be_bytes()),
        _ => again.extend_from_slice(&(header.length as u32).to_be_bytes()),
    }
    if bytes[..RequestHeader::bytes_in(mode)] != again {
        return Err(format!("{header:?} is not what was sent"));
    }
    for read_only in [false, true] {
        for terms in all_terms(mode, read_only) {
            if let Verdict::Accept(request) = validate(&header, &terms) {
                let end = u128::from(request.offset) + u128::from(request.length);
                if end > u128::from(terms.size_bytes) {
                    return Err(format!("{request:?} ends past {}", terms.size_bytes));
                }
            }
        }
    }
    Ok(true)
}

fn all_terms(mode: Mode, read_only: bool) -> Vec<Terms> {
    let mut every = ContextSet::default();
    Context::ALL
        .into_iter()
        .for_each(|context| every.insert(context));
    let sizes = [0, 512, 1 << 20, u64::MAX];
    let sets = [ContextSet::default(), every];
    sizes
        .into_iter()
        .flat_map(|size_bytes| {
            sets.map(|contexts| Terms {
                size_bytes,
                read_only,
                alignment: if read_only { 512 } else { 1 },
                mode,
                contexts,
            })
        })
        .collect()
}

fn valid_status_payload(numbers: &[u64]) -> Vec<u8> {
    let mut bytes = (numbers[0] >> (numbers[1] % 64)).to_be_bytes().to_vec();
    for number in &numbers[2..3 + numbers[3] as usize % 2] {
        let context = Context::ALL[*number as usize % Context::ALL.len()];
        bytes.extend_from_slice(&context.id().to_be_bytes());
    }
    bytes
}

fn status_payload(bytes: &[u8]) -> Result<bool, String> {
    let mut taken = false;
    for terms in all_terms(Mode::Extended, false) {
        let header = RequestHeader {
            flags: 1 << 5,
            command: 7,
            cookie: [0; 8],
            offset: 0,
            length: bytes.len() as u64,
        };
        if let Verdict::NeedsPayload { payload_bytes } = validate(&header, &terms) {
            let payload = bytes
                .get(..payload_bytes)
                .ok_or("more than was announced")?;
            taken |= matches!(
                validate_block_status(&header, payload, &terms),
                Verdict::Accept(_)
            );
        }
    }
    Ok(taken)
}

// Options.

fn string(text: &str) -> Vec<u8> {
    let mut bytes = (text.len() as u32).to_be_bytes().to_vec();
    bytes.extend_from_slice(text.as_bytes());
    bytes
}

fn valid_info(numbers: &[u64]) -> Vec<u8> {
    let mut bytes = string(["", "disk", "another name"][numbers[0] as usize % 3]);
    let wanted = &numbers[1..numbers.len().min(5)];
    bytes.extend_from_slice(&(wanted.len() as u16).to_be_bytes());
    for number in wanted {
        bytes.extend_from_slice(&((number % 5) as u16).to_be_bytes());
    }
    bytes
}

fn info(bytes: &[u8]) -> Result<bool, String> {
    let Some((name, wanted)) = parse_info_request(bytes) else {
        return Ok(false);
    };
    let mut again = (name.len() as u32).to_be_bytes().to_vec();
    again.extend_from_slice(name);
    again.extend_from_slice(&(wanted.len() as u16).to_be_bytes());
    for kind in &wanted {
        again.extend_from_slice(&kind.to_be_bytes());
    }
    if again != bytes || parse_info_request(&again) != Some((name, wanted)) {
        return Err("INFO reads back as something else".to_owned());
    }
    Ok(true)
}

fn valid_contexts(numbers: &[u64]) -> Vec<u8> {
    let mut bytes = string("disk");
    let queries = &numbers[1..numbers.len().min(4)];
    bytes.extend_from_slice(&(queries.len() as u32).to_be_bytes());
    for number in queries {
        bytes.extend(string(
            ["base:allocation", "base:", "x:ü", "qemu:dirty-bitmap:"][*number as usize % 4],
        ));
    }
    bytes
}

fn contexts(bytes: &[u8]) -> Result<bool, String> {
    let Ok(request) = ContextRequest::parse(bytes) else {
        return Ok(false);
    };
    let mut again = (request.export.len() as u32).to_be_bytes().to_vec();
    again.extend_from_slice(request.export);
    again.extend_from_slice(&(request.queries.len() as u32).to_be_bytes());
    request
        .queries
        .iter()
        .for_each(|query| again.extend(string(query)));
    if again != bytes || ContextRequest::parse(&again).as_ref() != Ok(&request) {
        return Err("A context request reads back as something else".to_owned());
    }
    Ok(true)
}

fn valid_negotiation(numbers: &[u64]) -> Vec<u8> {
    let mut bytes = 3u32.to_be_bytes().to_vec();
    for (index, number) in numbers.iter().enumerate() {
        let (option, data) = match number % 7 {
            0 => (3, Vec::new()),
            1 => (6, valid_info(numbers)),
            2 => (8, Vec::new()),
            3 => (9, valid_contexts(numbers)),
            4 => (10, valid_contexts(numbers)),
            5 => (11, Vec::new()),
            _ => (5, vec![1, 2, 3]),
        };
        let last = index + 1 == numbers.len();
        let (option, data) = if last {
            (7, valid_info(&[1]))
        } else {
            (option, data)
        };
        bytes.extend_from_slice(b"IHAVEOPT");
        bytes.extend_from_slice(&(option as u32).to_be_bytes());
        bytes.extend_from_slice(&(data.len() as u32).to_be_bytes());
        bytes.extend(data);
    }
    bytes
}

/// The whole negotiation with a client that has sent all that it will ever send.
fn negotiation(bytes: &[u8]) -> Result<bool, String> {
    let failed = |error: std::io::Error| error.to_string();
    let (mut client, server) = UnixStream::pair().map_err(failed)?;
    client.write_all(bytes).map_err(failed)?;
    client.shutdown(std::net::Shutdown::Write).map_err(failed)?;
    let exports = ["disk", "another name"].map(|name| Export {
        name: name.to_owned(),
        size: LiveSize::new(1 << 20),
        read_only: false,
        alignment: 1,
        tracked: true,
        is_view: false,
    });
    let chosen = negotiate(&Stream::Unix(server), &exports, &Encryption::Off);
    let mut answers = Vec::new();
    match client.read_to_end(&mut answers) {
        // It closed before it had read all.
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {}
        result => drop(result.map_err(failed)?),
    }
    if !answers.starts_with(b"NBDMAGICIHAVEOPT") {
        return Err("The greeting is missing".to_owned());
    }
    match chosen {
        Ok(Some(chosen)) if chosen.session.export >= exports.len() => {
            Err(format!("There is no export {}", chosen.session.export))
        }
        Ok(chosen) => Ok(chosen.is_some()),
        Err(_) => Ok(false),
    }
}

// The journal.

fn valid_record(numbers: &[u64]) -> Vec<u8> {
    let operations = [
        Operation::Null,
        Operation::Write,
        Operation::Trim,
        Operation::WriteZeroes,
    ];
    let record = Record {
        sequence: numbers[0] >> 1,
        epoch: Epoch(numbers[1] >> 16),
        operation: operations[numbers[2] as usize % 4],
        first_block: numbers[3] >> 24,
        block_count: numbers[4] >> 40,
    };
    record
        .encode()
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .collect()
}

fn record(bytes: &[u8], decode: fn([u64; 4]) -> Slot) -> Result<bool, String> {
    let (chunks, _) = bytes.as_chunks::<8>();
    let [first, second, third, check, ..] = chunks else {
        return Ok(false);
    };
    let words = [first, second, third, check].map(|chunk| u64::from_le_bytes(*chunk));
    match decode(words) {
        Slot::Whole(record) if record.encode() == words => Ok(true),
        Slot::Whole(record) => Err(format!("{record:?} is not what was written")),
        Slot::Empty | Slot::Writing | Slot::Damaged => Ok(false),
    }
}

fn valid_superblock(numbers: &[u64]) -> Vec<u8> {
    let mut superblock = Superblock::zeroed();
    superblock.sequence = numbers[0].into();
    superblock.open = numbers[1].into();
    superblock.disk_size_bytes = numbers[2].into();
    superblock.ring_records = numbers[3].into();
    superblock.seal();
    superblock.as_bytes().to_vec()
}

fn superblock(bytes: &[u8]) -> Result<bool, String> {
    let Ok(mut superblock) = Superblock::decode(bytes) else {
        return Ok(false);
    };
    superblock.seal();
    if superblock.as_bytes() != bytes {
        return Err("A superblock reads back as something else".to_owned());
    }
    // Whatever the numbers are, looking at them is safe.
    let _ = (
        superblock.layout_is_consistent(),
        superblock.counters_are_consistent(),
    );
    Ok(true)
}

fn alarm(bytes: &[u8]) -> Result<bool, String> {
    let Some(word) = bytes.first_chunk::<8>() else {
        return Ok(false);
    };
    let word = u64::from_le_bytes(*word);
    match decode_alarm(word) {
        Ok(Some(epoch)) if encode_alarm(epoch) != word => Err(format!("{epoch} is not {word:x}")),
        Ok(epoch) => Ok(epoch.is_some()),
        Err(_damaged) => Ok(false),
    }
}

/// A journal as a whole is told as changes of one that is valid, 8 bytes each.
fn valid_changes(numbers: &[u64]) -> Vec<u8> {
    let count = numbers[0] as usize % 4 + 1;
    let changes = numbers.iter().skip(1).take(count);
    changes.flat_map(|number| number.to_le_bytes()).collect()
}

/// One change of a journal.
#[derive(Clone, Copy, Debug)]
struct Change {
    kind: u64,
    /// Which copy, page or slot, and which field.
    place: u64,
    field: u64,
    value: u64,
}

impl Change {
    fn of(bytes: &[u8; 8]) -> Self {
        let number = u64::from_le_bytes(*bytes);
        Self {
            kind: number % 16,
            field: number >> 4 & 0xff,
            place: number >> 12 & 0xf_ffff,
            value: number >> 32,
        }
    }

    /// A change whose check does not fit.
    fn is_damage(self) -> bool {
        self.kind < 6
    }

    /// A number at one of the borders of something, or near the one that was there.
    fn number(self, before: u64) -> u64 {
        let borders = [
            0,
            SIZE_BYTES,
            u64::from(u32::MAX),
            1 << 40,
            EPOCH_MAX,
            1 << 50,
            COUNTER_MAX,
            u64::MAX,
        ];
        let step = (self.value >> 8) % 8;
        match self.value % 16 {
            0..8 => borders[self.value as usize % 8]
                .wrapping_add(step)
                .wrapping_sub(4),
            8..12 => before.wrapping_add(step).wrapping_sub(4),
            12 => before.wrapping_mul(2),
            13 => 1 << (self.value >> 8 & 63),
            14 => self.value >> 24,
            _ => self.value.wrapping_mul(0x9e37_79b9_7f4a_7c15),
        }
    }

    fn apply(self, bytes: &mut Vec<u8>) {
        match self.kind {
            0..6 => self.damage(bytes),
            6..9 => (0..2)
                .filter(|copy| self.place % 3 != copy + 1)
                .for_each(|copy| self.change_superblock(bytes, copy as usize)),
            9 | 10 => self.change_record(bytes),
            11 | 12 => self.change_transaction(bytes),
            13 => {
                let word = self.place as usize % 2048 * 8;
                let word = if word < 1024 {
                    word % 64 + 8192
                } else {
                    word + 262_144 - 1024
                };
                let epoch = Epoch(self.number(4) & EPOCH_MAX);
                put(bytes, word, &encode_alarm(epoch).to_le_bytes());
            }
            14 => {
                let layout = specimen::superblock(&specimen::left_open().bytes, 0);
                let number = self.place % 32;
                let first = layout.checkpoint_offset.get() as usize + number as usize * PAGE_BYTES;
                if let Some(page) = bytes.get_mut(first..first + PAGE_BYTES) {
                    page[32 + self.field as usize * 8] ^= 0x18;
                    seal_checkpoint_page(page, self.number(number % 16), self.value % 8);
                }
            }
            _ => {
                let length = bytes.len() as u64;
                let new = [
                    self.place,
                    length,
                    length + self.place,
                    length - self.place % length.max(1),
                ];
                bytes.resize(new[self.field as usize % 4] as usize, 0);
            }
        }
    }

    /// Up to three bytes of an area change.
    fn damage(self, bytes: &mut [u8]) {
        let layout = specimen::superblock(&specimen::left_open().bytes, 0);
        let areas = [
            0..8192,
            8192..8192 + 56,
            12_288..layout.overflow_offset.get(),
            layout.overflow_offset.get()..layout.ring_offset.get(),
            layout.ring_offset.get()..layout.head_bytes(),
            layout.checkpoint_offset.get()..layout.file_bytes(),
        ];
        let area = &areas[self.kind as usize % 6];
        let place = area.start + self.place % (area.end - area.start);
        for (offset, change) in self.value.to_le_bytes().iter().take(3).enumerate() {
            if let Some(byte) = bytes.get_mut(place as usize + offset) {
                *byte ^= change | u8::from(offset == 0);
            }
        }
    }

    /// A field of a superblock changes, or several that go together.
    fn change_superblock(self, bytes: &mut [u8], copy: usize) {
        let Some(page) = bytes.get(copy * PAGE_BYTES..(copy + 1) * PAGE_BYTES) else {
            return;
        };
        let Ok(mut superblock) = Superblock::read_from_bytes(page) else {
            return;
        };
        if self.kind == 8 {
            let pages = INTENT_PAGES_RANGE.start() + self.place % 3 * 20;
            superblock.intent_bytes = (pages * 4096).into();
            superblock.overflow_offset = (12_288 + pages * 4096).into();
            superblock.overflow_bytes = (self.place / 3 % 3 * 8192).into();
            let ring = superblock.overflow_offset.get() + superblock.overflow_bytes.get();
            superblock.ring_offset = ring.into();
            superblock.ring_records = (512 + self.place / 9 % 3 * 128).into();
            superblock.overflow_unit_bytes = (1 << (20 + self.field % 34)).into();
            superblock.checkpoint_offset = (superblock.head_bytes() + self.value % 3 * 4096).into();
            superblock.version = (1 + (self.value >> 4) as u32 % 3).into();
        } else {
            let mut all = superblock.as_bytes().to_vec();
            let field = 8 + self.field as usize % 64 * 4;
            let wide = self.value >> 31 == 1 || field >= 88;
            let field = if wide { field / 8 * 8 } else { field };
            let mut word = [0; 8];
            let length = if wide { 8 } else { 4 };
            word[..length].copy_from_slice(&all[field..field + length]);
            let number = self.number(u64::from_le_bytes(word)).to_le_bytes();
            all[field..field + length].copy_from_slice(&number[..length]);
            superblock = Superblock::read_from_bytes(&all).unwrap_or(superblock);
        }
        superblock.seal();
        put(bytes, copy * PAGE_BYTES, superblock.as_bytes());
    }

    fn change_record(self, bytes: &mut [u8]) {
        let layout = specimen::superblock(&specimen::left_open().bytes, 0);
        let slot = self.place % 512;
        let offset = layout.ring_offset.get() + slot * 32;
        let number = |field: u64, before: u64| match self.field % 4 == field {
            true => self.number(before),
            false => before,
        };
        let near = layout.ring_tail.get() / 512 * 512 + slot;
        let record = Record {
            sequence: number(0, near + self.field / 4 % 2 * 512),
            epoch: Epoch(number(1, 4) & EPOCH_MAX),
            operation: Operation::Write,
            first_block: number(2, 77) & (DISK_BLOCKS_MAX - 1),
            block_count: number(3, 9) & RECORD_BLOCKS_MAX,
        };
        let words = record.encode().map(u64::to_le_bytes);
        put(bytes, offset as usize, words.as_flattened());
    }

    fn change_transaction(self, bytes: &mut [u8]) {
        let layout = specimen::superblock(&specimen::left_open().bytes, 0);
        let pages = layout.intent_bytes.get() / PAGE_BYTES as u64;
        let page = self.place % pages;
        let number = |field: u64, before: u64| match self.field % 8 == field {
            true => self.number(before),
            false => before,
        };
        let sequence = number(0, 2 * pages + page - self.field / 8 % 2 * pages);
        let (chain, slots) = (number(1, sequence), number(2, 800));
        let mut transaction = Transaction::new(sequence, chain, slots as u32);
        transaction.context_first = (number(3, 0) as u32).into();
        transaction.update_count = (number(4, 128) as u16).into();
        transaction.context_count = (number(5, 748) as u16).into();
        for (index, update) in transaction.updates.iter_mut().enumerate() {
            update.slot = (number(6, index as u64) as u32).into();
            update.region = (number(7, index as u64) as u32).into();
        }
        let mut sealed = vec![0; PAGE_BYTES];
        transaction.seal(&mut sealed);
        put(bytes, 12_288 + page as usize * PAGE_BYTES, &sealed);
    }
}

fn put(bytes: &mut [u8], place: usize, new: &[u8]) {
    if let Some(target) = bytes.get_mut(place..place + new.len()) {
        target.copy_from_slice(new);
    }
}

/// Bytes of memory that the process may use at once for a journal of half a million bytes, other tests
/// beside it included.
const MEMORY_BYTES_MAX: u64 = 2 << 30;

/// Opens a changed journal in the same and in another boot. Whether one of them took it. `prepare` sees
/// the bytes before.
fn recovery(bytes: &[u8], prepare: fn(&mut [u8])) -> Result<bool, String> {
    let changes: Vec<Change> = bytes
        .as_chunks::<8>()
        .0
        .iter()
        .take(16)
        .map(Change::of)
        .collect();
    let mut journal = specimen::left_open().bytes.clone();
    changes.iter().for_each(|change| change.apply(&mut journal));
    prepare(&mut journal);
    let folder = specimen::folder();
    let path = folder.path().join("disk.hrl");
    let only_damage = changes.iter().all(|change| change.is_damage());
    let mut taken = false;
    for boot in [specimen::BOOT, specimen::NEXT_BOOT] {
        std::fs::write(&path, &journal).map_err(|error| error.to_string())?;
        // Also the peak so far is forgotten.
        let _unless_forbidden = std::fs::write("/proc/self/clear_refs", "5");
        set_boot(Some(boot));
        let lived = live(&path, only_damage, boot == specimen::NEXT_BOOT);
        set_boot(None);
        taken |= lived.map_err(|what| format!("{what} after {changes:?}"))?;
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let peak = peak.and_then(|text| text.trim().strip_suffix(" kB")?.parse::<u64>().ok());
        if peak.unwrap_or(0) << 10 > MEMORY_BYTES_MAX {
            return Err(format!("It took {peak:?} KiB after {changes:?}"));
        }
    }
    Ok(taken)
}

/// What a journal that opens has to be able to do. Whether it opens.
fn live(path: &Path, only_damage: bool, power_cut: bool) -> Result<bool, String> {
    let failed = |error: crate::error::Error| error.chain();
    let _ = (
        journal::verify(path),
        journal::dump(path, &mut std::io::sink()),
    );
    let _ = Account::of(path);
    let Ok((opened, report)) = journal::open(path, &specimen::options()) else {
        return Ok(false);
    };
    let account = Account::of(path).map_err(failed)?;
    if only_damage {
        let known = specimen::left_open().check(&account, power_cut);
        known.map_err(|what| format!("{what} from {report}"))?;
    }
    let open = opened.state().open;
    let extent = Extent {
        first_block: 100,
        block_count: 300,
    };
    opened.record(open, extent, Operation::Trim);
    opened.maintain().map_err(failed)?;
    let mut blocks = Blocks::default();
    blocks.insert(extent);
    let told = Account::of(path).map_err(failed)?.open;
    if !told.all && !told.blocks.contains_all(&blocks) {
        return Err(format!("{extent:?} is forgotten"));
    }
    let marked = opened.mark(extent);
    opened.sync_ring().map_err(failed)?;
    if !opened.may_write(extent, marked.era) {
        return Err("A durable record does not let its write go on".to_owned());
    }
    // The last epoch has no next one.
    if open.0 < EPOCH_MAX {
        opened.gather_alarms(open, open.next());
        opened
            .update(|state| state.cut(open.next()))
            .map_err(failed)?;
        opened.update(|state| state.commit(open)).map_err(failed)?;
    }
    opened.close().map_err(failed)?;
    let state = opened.state();
    drop(opened);
    match journal::open(path, &specimen::options()) {
        Ok((again, report)) if (again.state(), &report.found) == (state, &Found::Clean) => Ok(true),
        Ok((again, report)) => Err(format!("{state:?} is {:?}, {report}", again.state())),
        // Counters that cannot go on are refused.
        Err(error) if error.to_string().contains("a counter") => Ok(true),
        Err(error) => Err(error.chain()),
    }
}

fn valid_page(numbers: &[u64]) -> Vec<u8> {
    let mut bytes = vec![0; PAGE_BYTES];
    for number in numbers {
        bytes[32 + *number as usize % (PAGE_BYTES - 32)] = (number >> 32) as u8;
    }
    seal_checkpoint_page(&mut bytes, 7, 9);
    bytes
}

fn page(bytes: &[u8]) -> Result<bool, String> {
    let state = judge_checkpoint_page(bytes, 7, 9);
    if state != PageState::Ours {
        return Ok(false);
    }
    let mut again = bytes.to_vec();
    seal_checkpoint_page(&mut again, 7, 9);
    // The reserved word is under the check, and written as zero.
    let same = again[..24] == bytes[..24] && again[32..] == bytes[32..];
    same.then_some(true)
        .ok_or_else(|| "A page reads back as something else".to_owned())
}

// Preserve files.

fn valid_preserve(numbers: &[u64]) -> Vec<u8> {
    let subject = Subject {
        boot_id: [numbers[0] as u8; 16],
        journal_id: [numbers[1] as u8; 16],
        epoch: Epoch(numbers[2]),
        size_bytes: numbers[3] >> (12 + numbers[4] % 40),
        all: numbers[5].is_multiple_of(2),
    };
    Header::new(&subject).as_bytes().to_vec()
}

/// Damage that a check does not find.
fn with_good_check(bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    let checked = std::mem::offset_of!(Header, check);
    if bytes.len() >= HEADER_BYTES {
        let check = xxh3_64(&bytes[..checked]);
        bytes[checked..HEADER_BYTES].copy_from_slice(&check.to_le_bytes());
    }
    bytes
}

fn preserve(bytes: &[u8]) -> Result<bool, String> {
    let Ok(subject) = Header::decode(bytes) else {
        return Ok(false);
    };
    if Header::new(&subject).as_bytes() != &bytes[..HEADER_BYTES] {
        return Err(format!("{subject:?} is not what was written"));
    }
    let layout = PreserveLayout::of(subject.size_bytes);
    let room = layout.file_bytes() - layout.data_offset();
    match layout.map_bytes * 8 >= layout.blocks && room >= subject.size_bytes {
        true => Ok(true),
        false => Err(format!("{layout:?} has no room for {subject:?}")),
    }
}

// The control socket.

fn valid_control(numbers: &[u64]) -> Vec<u8> {
    use crate::control::protocol::CaptureOutcome::{Abandoned, Sealed};
    let epoch = Epoch(numbers[0] >> (numbers[1] % 64));
    let requests = [
        ControlRequest::Status {},
        ControlRequest::Epochs {},
        ControlRequest::Cut {
            minimum: epoch,
            keep: crate::epoch::Keep::All,
        },
        ControlRequest::CaptureBegin { epoch },
        ControlRequest::CaptureEnd {
            epoch,
            outcome: if numbers[2].is_multiple_of(2) {
                Sealed
            } else {
                Abandoned
            },
        },
        ControlRequest::Commit { epoch },
        ControlRequest::Revert {},
        ControlRequest::Resize {
            disk: format!("disk {}", numbers[3]),
            size: NewSize::More(numbers[0]),
        },
    ];
    let request = requests[numbers[2] as usize % requests.len()].clone();
    encode_request(&request).unwrap_or_default().into_bytes()
}

fn control(bytes: &[u8]) -> Result<bool, String> {
    let Some(request) = std::str::from_utf8(bytes)
        .ok()
        .and_then(|line| decode_request(line).ok())
    else {
        return Ok(false);
    };
    let line = encode_request(&request).map_err(|error| error.chain())?;
    match decode_request(&line) {
        Ok(again) if again == request => Ok(true),
        other => Err(format!("{request:?} reads back as {other:?}")),
    }
}

// The harness.

/// What is done to valid bytes.
#[derive(Clone, Debug)]
enum Mutation {
    Flip(prop::sample::Index, u8),
    Set(prop::sample::Index, u8),
    Cut(prop::sample::Index),
    Insert(prop::sample::Index, Vec<u8>),
    Number(prop::sample::Index, u32),
}

impl Mutation {
    fn apply(&self, bytes: &mut Vec<u8>) {
        let length = bytes.len().max(1);
        let place = |index: &prop::sample::Index| index.index(length);
        match self {
            Self::Flip(index, bit) => {
                if let Some(byte) = bytes.get_mut(place(index)) {
                    *byte ^= 1 << (bit % 8);
                }
            }
            Self::Set(index, value) => {
                if let Some(byte) = bytes.get_mut(place(index)) {
                    *byte = *value;
                }
            }
            Self::Cut(index) => bytes.truncate(place(index)),
            Self::Insert(index, more) => {
                let place = place(index).min(bytes.len());
                bytes.splice(place..place, more.iter().copied());
            }
            Self::Number(index, value) => {
                let place = place(index);
                if let Some(target) = bytes.get_mut(place..place + 4) {
                    target.copy_from_slice(&value.to_be_bytes());
                }
            }
        }
    }
}

fn mutation() -> impl Strategy<Value = Mutation> {
    let index = any::<prop::sample::Index>;
    prop_oneof![
        (index(), any::<u8>()).prop_map(|(at, bit)| Mutation::Flip(at, bit)),
        (index(), any::<u8>()).prop_map(|(at, value)| Mutation::Set(at, value)),
        index().prop_map(Mutation::Cut),
        (index(), prop::collection::vec(any::<u8>(), 1..9))
            .prop_map(|(at, more)| Mutation::Insert(at, more)),
        (
            index(),
            prop_oneof![Just(u32::MAX), Just(1 << 31), 0..20u32]
        )
            .prop_map(|(at, value)| Mutation::Number(at, value)),
    ]
}

fn inputs(valid: fn(&[u64]) -> Vec<u8>) -> impl Strategy<Value = Vec<u8>> {
    let numbers = prop::collection::vec(any::<u64>(), 7);
    prop_oneof![
        1 => prop::collection::vec(any::<u8>(), 0..200),
        1 => numbers.clone().prop_map(move |numbers| valid(&numbers)),
        4 => (numbers, prop::collection::vec(mutation(), 1..4)).prop_map(move |(numbers, mutations)| {
            let mut bytes = valid(&numbers);
            mutations.iter().for_each(|mutation| mutation.apply(&mut bytes));
            bytes
        }),
    ]
}

fn config(target: &Target) -> ProptestConfig {
    let default = ProptestConfig::default();
    ProptestConfig {
        cases: default.cases * target.factor,
        failure_persistence: None,
        ..default
    }
}

/// Runs a target; the error tells the smallest bytes that were found. Returns how many inputs were
/// taken.
fn run(target: &Target, mut runner: TestRunner) -> Result<u64, String> {
    let taken = AtomicU64::new(0);
    let result = runner.run(&inputs(target.valid), |bytes| {
        match (target.decode)(&bytes) {
            Ok(yes) => {
                taken.fetch_add(u64::from(yes), Ordering::Relaxed);
                Ok(())
            }
            Err(what) => Err(TestCaseError::fail(what)),
        }
    });
    match result {
        Ok(()) => Ok(taken.into_inner()),
        Err(TestError::Fail(reason, bytes)) => {
            Err(format!("{}: {reason} for {bytes:02x?}", target.name))
        }
        Err(TestError::Abort(reason)) => Err(format!("{}: {reason}", target.name)),
    }
}

#[test]
fn every_decoder_takes_or_refuses_and_never_panics() {
    TARGETS.iter().for_each(feed);
}

#[test]
fn every_journal_is_refused_or_works() {
    feed(&JOURNAL);
}

fn feed(target: &Target) {
    let runner = TestRunner::new(config(target));
    let taken = run(target, runner).unwrap_or_else(|found| panic!("{found}"));
    // A decoder that refuses everything is not tested.
    assert!(taken > 10, "{}: {taken} inputs were taken", target.name);
}

/// Trusts a length that it has read.
fn trusting(bytes: &[u8]) -> Result<bool, String> {
    let Some(length) = bytes.first_chunk::<4>() else {
        return Ok(false);
    };
    let length = u32::from_be_bytes(*length) as usize;
    Ok(!bytes[4..4 + length].is_empty())
}

/// Does not look at the upper half of the check.
fn careless(words: [u64; 4]) -> Slot {
    let [sequence, second, third, check] = words;
    let guess = |operation| Record {
        sequence,
        epoch: Epoch(second & ((1 << 48) - 1)),
        operation,
        first_block: third & ((1 << 40) - 1),
        block_count: third >> 40,
    };
    let found = [Operation::Write, Operation::Trim]
        .map(guess)
        .into_iter()
        .find(|record| record.encode()[1] == second);
    match found {
        Some(record) if record.encode()[3] as u32 == check as u32 => Slot::Whole(record),
        _ => Slot::Damaged,
    }
}

/// Does not look at what it does not need.
fn negligent(bytes: &[u8]) -> Result<bool, String> {
    let Ok((header, _)) = Header::read_from_prefix(bytes) else {
        return Ok(false);
    };
    let mut mended = header;
    mended.flags = u32::from(header.flags.get() == FLAG_ALL).into();
    let mended = with_good_check(mended.as_bytes());
    preserve(&mended)?;
    match Header::decode(&mended).is_err() || mended == bytes[..HEADER_BYTES] {
        true => Ok(false),
        false => Err("Flags were passed over".to_owned()),
    }
}

/// Takes damaged records for slots that were never written.
fn forgiving(bytes: &mut [u8]) {
    let layout = specimen::superblock(&specimen::left_open().bytes, 0);
    let ring = layout.ring_offset.get() as usize..layout.head_bytes() as usize;
    for slot in bytes.get_mut(ring).unwrap_or_default().chunks_exact_mut(32) {
        let (words, _) = slot.as_chunks::<8>();
        let words: [u64; 4] = std::array::from_fn(|index| u64::from_le_bytes(words[index]));
        if Record::decode(words) == Slot::Damaged {
            slot.fill(0);
        }
    }
}

#[test]
fn the_harness_finds_decoders_that_are_wrong() {
    let canaries = [
        Target {
            name: "a trusted length",
            valid: valid_info,
            decode: trusting,
            factor: 1,
        },
        Target {
            name: "half a check",
            valid: valid_record,
            decode: |bytes| record(bytes, careless),
            factor: 1,
        },
        Target {
            name: "any flags",
            valid: valid_preserve,
            decode: |bytes| negligent(&with_good_check(bytes)),
            factor: 1,
        },
        Target {
            name: "damaged records passed over",
            valid: valid_changes,
            decode: |bytes| recovery(bytes, forgiving),
            factor: 1,
        },
    ];
    for canary in canaries {
        // Always the same inputs, so that the canary does not depend on luck.
        let random = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
        let found = run(&canary, TestRunner::new_with_rng(config(&canary), random));
        assert!(found.is_err(), "{} was not found", canary.name);
    }
}
