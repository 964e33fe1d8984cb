//! Every decoder of what lies in vaults, spools and state folders, fed with any bytes and with valid ones that were mutated.
//!
//! One registry, one harness, as in the tracker: a decoder takes the bytes or refuses them, never panics, and what it takes it
//! takes again after it was encoded. Where a check or tag covers the bytes, the text below it is mutated as well, as only somebody
//! with the key can. Canaries are decoders with a fault put in; the harness has to find each.
//!
//! Beside the formats that have mutation tests in their own files: directories under a right check (`segment::format`), those
//! that are sealed (`segment::sealed`), `vault.json` (`vault::open`), key tables (`keys::slots_tests`), names in keys.

use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestError, TestRng, TestRunner};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tracker::extent::{BLOCK_SIZE, Epoch};

use crate::keys::aead::Cipher;
use crate::keys::secret::Secret;
use crate::keys::source::parse_key;
use crate::keys::{Fingerprint, Keys};
use crate::lifecycle::progress::ScanState;
use crate::lifecycle::state::MachineState;
use crate::segment::codec::{Codec, CodecKind, Compressor, decompress};
use crate::segment::format::SegmentName;
use crate::segment::reader::decode_tail;
use crate::segment::reference::{SegmentRef, parse_segment_name, segment_name};
use crate::segment::seal::Owner;
use crate::spool::table::Table;
use crate::vault::aside::{Aside, LostSegment};
use crate::vault::manifest::{Consistency, DiskPoint, Manifest, PointId};
use crate::vault::record::{self, RecordId};

const VAULT: &str = "00000000000000000000000000000000";

/// A decoder under test.
struct Target {
    name: &'static str,
    /// Makes valid bytes of any number.
    valid: fn(u64) -> Vec<u8>,
    /// Decodes, encodes, decodes. Whether the bytes were taken; an error if the two disagree.
    decode: fn(&[u8]) -> Result<bool, String>,
    cases: u32,
}

const TARGETS: [Target; 13] = [
    Target {
        name: "manifest, plain",
        valid: |number| manifest(number).encode(&plain()).unwrap(),
        decode: |bytes| decode_manifest(bytes, &plain()),
        cases: 2000,
    },
    Target {
        name: "manifest, sealed",
        valid: |number| manifest(number).encode(&sealed()).unwrap(),
        decode: |bytes| decode_manifest(bytes, &sealed()),
        cases: 1000,
    },
    Target {
        name: "document of a manifest",
        valid: |number| serde_json::to_vec(&manifest(number)).unwrap(),
        decode: document_of_manifest,
        cases: 4000,
    },
    Target {
        name: "record, plain",
        valid: |number| record::encode(&aside(number), &plain(), &RECORD).unwrap(),
        decode: |bytes| decode_record(bytes, &plain()),
        cases: 2000,
    },
    Target {
        name: "record, sealed",
        valid: |number| record::encode(&aside(number), &sealed(), &RECORD).unwrap(),
        decode: |bytes| decode_record(bytes, &sealed()),
        cases: 1000,
    },
    Target {
        name: "document of a point that is set aside",
        valid: |number| serde_json::to_vec(&aside(number)).unwrap(),
        decode: json::<Aside>,
        cases: 4000,
    },
    Target {
        name: "end of a segment, plain",
        valid: |number| vec![number as u8; 300],
        decode: |bytes| tail(bytes, plain()),
        cases: 2000,
    },
    Target {
        name: "end of a segment, sealed",
        valid: |number| {
            let mut bytes = vec![number as u8; 300];
            bytes.extend_from_slice(b"TMSEGEN2");
            bytes
        },
        decode: |bytes| tail(bytes, sealed()),
        cases: 1000,
    },
    Target {
        name: "frame",
        valid: packed,
        decode: unpack,
        cases: 2000,
    },
    Target {
        name: "name of a segment",
        valid: |number| segment_name(&name(number)).into_bytes(),
        decode: |bytes| {
            let text = String::from_utf8_lossy(bytes);
            let found = parse_segment_name(&text);
            agree(
                found.map(|name| segment_name(&name)),
                Some(text.into_owned()),
            )
        },
        cases: 4000,
    },
    Target {
        name: "scans of a state folder",
        valid: |number| {
            let segment = serde_json::to_string(&segment(number)).unwrap();
            format!(
                "{{\"disks\": [{{\"name\": \"a\", \"reason\": {{\"kind\": \"operator\"}}, \"stage\": \"marked\", \
                 \"epoch\": {number}, \"journal\": \"j\", \"cursor\": 3, \"blocks\": 8, \"segments\": [{segment}]}}]}}"
            )
            .into_bytes()
        },
        decode: json::<ScanState>,
        cases: 4000,
    },
    Target {
        name: "machine of a state folder",
        valid: |number| {
            let state = MachineState::new(VAULT.to_owned(), "m".to_owned(), number);
            serde_json::to_vec(&state).unwrap()
        },
        decode: json::<MachineState>,
        cases: 4000,
    },
    Target {
        name: "key file",
        valid: |number| format!("{number:064x}\n").into_bytes(),
        decode: |bytes| Ok(parse_key(bytes).is_some()),
        cases: 4000,
    },
];

/// A file, so that a case costs more.
const TABLE: Target = Target {
    name: "table of fingerprints",
    valid: |_| {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("table");
        drop(Table::open(&path, [1; 16], 100 * BLOCK_SIZE, Epoch(9)).unwrap());
        std::fs::read(path).unwrap()
    },
    decode: open_table,
    cases: 200,
};

const RECORD: RecordId<'_> = RecordId {
    kind: "aside",
    vault: VAULT,
    machine: "m",
    name: "0000000000000003",
};

fn plain() -> Keys {
    Keys::derive(&[3; 32])
}

fn sealed() -> Keys {
    let root = Secret::copy_of(&[3; 32]);
    Keys::derive_sealing(&root, [0; 16], Cipher::Aes256Gcm).unwrap()
}

fn name(number: u64) -> SegmentName {
    SegmentName {
        generation: 1,
        first_epoch: Epoch(1),
        last_epoch: Epoch(1 + number % 9),
        number: number as u32,
    }
}

fn segment(number: u64) -> SegmentRef {
    SegmentRef {
        name: name(number).into(),
        bytes: number,
        directory_bytes: number % 1000,
        check: [number as u8; 16].into(),
        data_blocks: 5,
        zero_blocks: number >> 7,
    }
}

fn manifest(number: u64) -> Manifest {
    let disk = |name: &str| DiskPoint {
        name: name.to_owned(),
        size_bytes: 512 * (1 + number % 1000),
        block_bytes: BLOCK_SIZE,
        journal: "11".repeat(16),
        dirty_blocks: number,
        segments: (0..number % 4).map(segment).collect(),
    };
    Manifest {
        vault: VAULT.to_owned(),
        machine: "m".to_owned(),
        generation: 1,
        epoch: Epoch(3),
        previous: Epoch(number % 3),
        created: jiff::Timestamp::UNIX_EPOCH,
        consistency: Consistency::Crash,
        reason: number
            .is_multiple_of(2)
            .then(|| "the agent is gone".to_owned()),
        disks: vec![disk("a"), disk("b")],
    }
}

fn aside(number: u64) -> Aside {
    let lost = |number| LostSegment {
        disk: "a".to_owned(),
        segment: name(number).into(),
    };
    Aside {
        epoch: Epoch(3),
        why: format!("{number} is \u{fc}ber all"),
        created: jiff::Timestamp::UNIX_EPOCH,
        lost: (0..number % 3).map(lost).collect(),
    }
}

fn agree<T: PartialEq + std::fmt::Debug>(
    found: Option<T>,
    again: Option<T>,
) -> Result<bool, String> {
    match (&found, &again) {
        (None, _) => Ok(false),
        (found, again) if found == again => Ok(true),
        _ => Err(format!("{found:?} became {again:?}")),
    }
}

fn json<T: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug>(
    bytes: &[u8],
) -> Result<bool, String> {
    let found: Option<T> = serde_json::from_slice(bytes).ok();
    let text = found
        .as_ref()
        .map(|found| serde_json::to_vec(found).unwrap());
    agree(
        found,
        text.and_then(|text| serde_json::from_slice(&text).ok()),
    )
}

fn point() -> PointId {
    PointId {
        vault: VAULT.to_owned(),
        machine: "m".to_owned(),
        epoch: Epoch(3),
    }
}

fn decode_manifest(bytes: &[u8], keys: &Keys) -> Result<bool, String> {
    let found = Manifest::decode(bytes, keys, &point()).ok();
    if found.is_some() && !Manifest::is_authentic(bytes, keys, &point()) {
        return Err("it is taken and not authentic".to_owned());
    }
    let again = found.as_ref().map(|found| found.encode(keys).unwrap());
    let again = again.and_then(|bytes| Manifest::decode(&bytes, keys, &point()).ok());
    agree(found, again)
}

/// Its text, as somebody with the key may have written it, is judged like any other.
fn document_of_manifest(bytes: &[u8]) -> Result<bool, String> {
    json::<Manifest>(bytes)?;
    let Ok(found) = serde_json::from_slice::<Manifest>(bytes) else {
        return Ok(false);
    };
    let mut taken = Vec::new();
    for keys in [plain(), sealed()] {
        let object = found.encode(&keys).unwrap();
        let decoded = Manifest::decode(&object, &keys, &point());
        if decoded.as_ref().is_ok_and(|decoded| *decoded != found) {
            return Err(format!("{found:?} became {decoded:?}"));
        }
        taken.push(decoded.is_ok());
    }
    match taken[0] == taken[1] {
        true => Ok(taken[0]),
        false => Err(format!("{found:?} is taken in one kind of vault alone")),
    }
}

fn decode_record(bytes: &[u8], keys: &Keys) -> Result<bool, String> {
    let found: Option<Aside> = record::decode(bytes, keys, &RECORD).ok();
    let again = found
        .as_ref()
        .map(|found| record::encode(found, keys, &RECORD).unwrap());
    agree(
        found,
        again.and_then(|bytes| record::decode(&bytes, keys, &RECORD).ok()),
    )
}

/// Nothing that is not right to a bit is the end of the segment that a manifest names.
fn tail(bytes: &[u8], keys: Keys) -> Result<bool, String> {
    let owner = Owner {
        vault_id: [0; 16],
        machine: "m".to_owned(),
        disk: "a".to_owned(),
        check: [7; 16],
        keys,
    };
    let named = SegmentRef {
        bytes: 16 + bytes.len() as u64,
        ..segment(5)
    };
    match decode_tail(bytes, "key", &named, &owner) {
        Ok(_) => Err("a directory that nobody has made is taken".to_owned()),
        Err(_) => Ok(false),
    }
}

fn packed(number: u64) -> Vec<u8> {
    let (kind, codec) = match number % 3 {
        0 => (0, Codec::None),
        1 => (1, Codec::Lz4),
        _ => (2, Codec::Zstd(1)),
    };
    let raw: Vec<u8> = number
        .to_le_bytes()
        .into_iter()
        .cycle()
        .take(4096)
        .collect();
    let mut compressor = Compressor::new(codec).unwrap();
    let (_, packed) = compressor.compress(&raw).unwrap();
    [&[kind], &packed[..]].concat()
}

fn unpack(bytes: &[u8]) -> Result<bool, String> {
    let Some((kind, packed)) = bytes.split_first() else {
        return Ok(false);
    };
    let kind = CodecKind::from_number(kind % 4);
    let raw = kind.and_then(|kind| decompress(kind, packed, 4096));
    match raw.map(|raw| raw.len()) {
        Some(4096) => Ok(true),
        Some(other) => Err(format!("{other} bytes")),
        None => Ok(false),
    }
}

/// A table that was damaged knows less, and never something else: this one knows nothing.
fn open_table(bytes: &[u8]) -> Result<bool, String> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("table");
    std::fs::write(&path, bytes).unwrap();
    let (table, anew) =
        Table::open(&path, [1; 16], 100 * BLOCK_SIZE, Epoch(9)).map_err(|error| error.chain())?;
    let mut known = [Fingerprint([9; 16]); 100];
    table.lookup(0, &mut known);
    match known.iter().all(|known| *known == Fingerprint::UNKNOWN) {
        true => Ok(!anew),
        false => Err("it knows what nobody has told it".to_owned()),
    }
}

// The harness.

#[derive(Clone, Debug)]
enum Mutation {
    Flip(prop::sample::Index, u8),
    Insert(prop::sample::Index, Vec<u8>),
    Remove(prop::sample::Index, usize),
    Cut(prop::sample::Index),
    Repeat(prop::sample::Index, usize),
}

fn mutation() -> impl Strategy<Value = Mutation> {
    let index = any::<prop::sample::Index>;
    // Digits and signs of JSON lead further than other bytes.
    let byte = prop_oneof![
        any::<u8>(),
        prop::sample::select(&b"0123456789-e.\"{}[],:"[..])
    ];
    prop_oneof![
        (index(), 1u8..).prop_map(|(at, change)| Mutation::Flip(at, change)),
        (index(), prop::collection::vec(byte, 1..20))
            .prop_map(|(at, with)| Mutation::Insert(at, with)),
        (index(), 1usize..20).prop_map(|(at, count)| Mutation::Remove(at, count)),
        index().prop_map(Mutation::Cut),
        (index(), 1usize..40).prop_map(|(at, count)| Mutation::Repeat(at, count)),
    ]
}

fn mutate(bytes: &mut Vec<u8>, mutation: &Mutation) {
    let place = |at: &prop::sample::Index, bytes: &[u8]| at.index(bytes.len() + 1);
    let end = |at: usize, count: usize, bytes: &[u8]| (at + count).min(bytes.len());
    match mutation {
        Mutation::Flip(at, change) => {
            let at = place(at, bytes);
            if let Some(byte) = bytes.get_mut(at) {
                *byte ^= change;
            }
        }
        Mutation::Insert(at, with) => {
            let at = place(at, bytes);
            bytes.splice(at..at, with.iter().copied());
        }
        Mutation::Remove(at, count) => {
            let at = place(at, bytes);
            bytes.drain(at..end(at, *count, bytes));
        }
        Mutation::Cut(at) => bytes.truncate(place(at, bytes)),
        Mutation::Repeat(at, count) => {
            let at = place(at, bytes);
            let again = bytes[at..end(at, *count, bytes)].to_vec();
            bytes.splice(at..at, again);
        }
    }
}

/// Feeds a decoder; the error names the first bytes that are treated wrongly.
fn hunt(target: &Target) -> Result<(), String> {
    let config = Config {
        cases: target.cases,
        failure_persistence: None,
        max_shrink_iters: 200,
        ..Config::default()
    };
    let random = TestRng::from_seed(RngAlgorithm::ChaCha, &[7; 32]);
    let mut runner = TestRunner::new_with_rng(config, random);
    let garbage = prop::collection::vec(any::<u8>(), 0..300);
    let mutations = (any::<u64>(), prop::collection::vec(mutation(), 0..4));
    let valid = target.valid;
    let mutated = mutations.prop_map(move |(number, mutations)| {
        let mut bytes = valid(number);
        mutations.iter().for_each(|one| mutate(&mut bytes, one));
        bytes
    });
    let bytes = prop_oneof![1 => garbage.boxed(), 3 => mutated.boxed()];
    let outcome = runner.run(&bytes, |bytes| {
        (target.decode)(&bytes)
            .map(drop)
            .map_err(TestCaseError::fail)
    });
    outcome.map_err(|error| match error {
        TestError::Fail(why, bytes) => format!("{}: {why}: {bytes:02x?}", target.name),
        other @ TestError::Abort(_) => format!("{}: {other}", target.name),
    })
}

#[test]
fn every_decoder_takes_or_refuses() {
    for target in &TARGETS {
        hunt(target).unwrap_or_else(|what| panic!("{what}"));
        // What is valid is taken, where a decoder takes anything that can be made here.
        if !target.name.starts_with("end of a segment") {
            for number in 0..20 {
                let taken = (target.decode)(&(target.valid)(number));
                assert_eq!(taken, Ok(true), "{}", target.name);
            }
        }
    }
}

#[test]
fn a_table_of_any_bytes_knows_nothing() {
    hunt(&TABLE).unwrap_or_else(|what| panic!("{what}"));
    assert_eq!(open_table(&(TABLE.valid)(0)), Ok(true));
}

#[test]
fn the_harness_finds_faults() {
    let canaries = [
        Target {
            name: "a size that is believed",
            valid: |number| vec![number as u8 % 8; 8],
            decode: |bytes| Ok(bytes.first().is_some_and(|at| bytes[usize::from(*at)] > 0)),
            cases: 1000,
        },
        Target {
            name: "a check that covers too little",
            valid: |number| record::encode(&aside(number), &plain(), &RECORD).unwrap(),
            decode: |bytes| {
                // As if the magic were not looked at.
                let mut whole = bytes.to_vec();
                let head = whole.len().min(8);
                whole[..head].copy_from_slice(&record::MAGIC[..head]);
                match decode_record(&whole, &plain())? {
                    true if whole != bytes => Err("changed bytes are taken".to_owned()),
                    taken => Ok(taken),
                }
            },
            cases: 2000,
        },
        Target {
            name: "a number that is rounded",
            valid: |number| number.to_string().into_bytes(),
            decode: |bytes| {
                let found: Option<u64> = serde_json::from_slice(bytes).ok();
                agree(found, found.map(|number| (number as f64) as u64))
            },
            cases: 1000,
        },
    ];
    for canary in &canaries {
        // It is meant to panic, and need not say so.
        let found = hunt(canary);
        assert!(found.is_err(), "{} is not found", canary.name);
    }
}
