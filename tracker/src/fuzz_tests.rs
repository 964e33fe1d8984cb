//! Every decoder of bytes from outside, fed with any bytes and with valid ones that were mutated.
//!
//! One registry, one harness: a decoder takes the bytes or refuses them, never panics, and what it
//! takes it takes again after it was encoded. Canaries are decoders with a fault put in; the harness
//! has to find each within the same number of cases, or it would prove nothing.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};

use proptest::prelude::*;
use proptest::test_runner::{RngAlgorithm, TestError, TestRng, TestRunner};
use zerocopy::IntoBytes;

use crate::control::protocol::{Request as ControlRequest, decode_request, encode_request};
use crate::disk::{LiveSize, NewSize};
use crate::extent::Epoch;
use crate::journal::format::{
    Operation, PAGE_BYTES, PageState, Record, Slot, Superblock, decode_alarm, encode_alarm,
    judge_checkpoint_page, seal_checkpoint_page,
};
use crate::nbd::handshake::{Export, negotiate, parse_info_request};
use crate::nbd::listener::Stream;
use crate::nbd::metadata::{Context, ContextRequest, ContextSet};
use crate::nbd::request::{Terms, Verdict, validate, validate_block_status};
use crate::nbd::tls::Encryption;
use crate::nbd::wire::{EXTENDED_REQUEST_MAGIC, Mode, REQUEST_MAGIC, RequestHeader};

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

const TARGETS: [Target; 11] = [
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

// The control socket.

fn valid_control(numbers: &[u64]) -> Vec<u8> {
    use crate::control::protocol::CaptureOutcome::{Abandoned, Sealed};
    let epoch = Epoch(numbers[0] >> (numbers[1] % 64));
    let requests = [
        ControlRequest::Status {},
        ControlRequest::Epochs {},
        ControlRequest::Cut { minimum: epoch },
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
    for target in &TARGETS {
        let runner = TestRunner::new(config(target));
        let taken = run(target, runner).unwrap_or_else(|found| panic!("{found}"));
        // A decoder that refuses everything is not tested.
        assert!(taken > 10, "{}: {taken} inputs were taken", target.name);
    }
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
    ];
    for canary in canaries {
        // Always the same inputs, so that the canary does not depend on luck.
        let random = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
        let found = run(&canary, TestRunner::new_with_rng(config(&canary), random));
        assert!(found.is_err(), "{} was not found", canary.name);
    }
}
