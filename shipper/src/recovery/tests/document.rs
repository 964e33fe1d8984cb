//! The document of the format: it names every field at its place, and its example is real.

use std::fs;
use std::path::Path;

use super::fixture::{DISK_HASHES, fixture, folder, open, open_sealed};
use super::site::{Content, MACHINE};
use crate::keys::aead::{AeadKey, Cipher, Domain, nonce};
use crate::keys::derive::hkdf;
use crate::keys::hex;
use crate::keys::secret::Secret;
use crate::keys::slots::KeyTable;
use crate::segment::reference::segment_name;
use crate::vault::layout::{manifest_key, segment_key};
use tracker::extent::Epoch;

const FORMAT: &str = include_str!("../../segment/format.rs");
const REFERENCE: &str = include_str!("../../segment/reference.rs");
const MANIFEST: &str = include_str!("../../vault/manifest.rs");
const VAULT: &str = include_str!("../../vault/open.rs");
const ASIDE: &str = include_str!("../../vault/aside.rs");
const SEALED: &str = include_str!("../../segment/sealed.rs");
const SEAL: &str = include_str!("../../segment/seal.rs");
const ENVELOPE: &str = include_str!("../../keys/envelope.rs");
const AEAD: &str = include_str!("../../keys/aead.rs");
const SLOTS: &str = include_str!("../../keys/slots.rs");

fn document() -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/vault-format.md");
    fs::read_to_string(path).unwrap()
}

/// The part of the document below a heading, up to the next one.
#[track_caller]
fn section(heading: &str) -> String {
    let document = document();
    let start = document.find(&format!("\n{heading}\n"));
    let (_, text) = document.split_at(start.unwrap_or_else(|| panic!("no {heading:?}")));
    let text = &text[heading.len() + 2..];
    text[..text.find("\n#").unwrap_or(text.len())].to_owned()
}

/// Names and types of the fields of a struct in a source.
#[track_caller]
fn fields<'a>(source: &'a str, name: &str) -> Vec<(&'a str, &'a str)> {
    let (_, body) = source
        .split_once(&format!("struct {name} {{\n"))
        .unwrap_or_else(|| panic!("no struct {name}"));
    let (body, _) = body.split_once("\n}\n").unwrap();
    let fields: Vec<_> = body
        .lines()
        .map(str::trim)
        .filter(|line| !line.starts_with("//") && !line.starts_with('#'))
        .map(|line| line.strip_prefix("pub ").unwrap_or(line))
        .filter_map(|line| line.trim_end_matches(',').split_once(": "))
        .collect();
    assert!(fields.len() > 1, "{name}: {fields:?}");
    fields
}

fn size_of_type(name: &str) -> usize {
    match name {
        "u8" => 1,
        "[u8; 3]" => 3,
        "[u8; 5]" => 5,
        "[u8; 32]" => 32,
        "U16" => 2,
        "U32" => 4,
        "U64" | "[u8; 8]" => 8,
        "[u8; 16]" | "Check" | "Tag" => 16,
        other => panic!("a type of unknown size: {other}"),
    }
}

/// The rows of tables that must be there, word for word up to the meaning.
#[track_caller]
fn assert_rows(heading: &str, rows: &[String]) {
    let text = section(heading);
    for row in rows {
        let is_there = text.lines().any(|line| line.starts_with(row.as_str()));
        assert!(is_there, "no {row:?} in section {heading:?}");
    }
}

#[test]
fn the_document_names_every_field() {
    let structures = [
        ("### Header", FORMAT, "Header"),
        ("### Footer", FORMAT, "Footer"),
        ("### Frame table", FORMAT, "FrameEntry"),
        ("### Extent table", FORMAT, "ExtentEntry"),
        ("## Manifest", MANIFEST, "Header"),
        ("### Sealing", AEAD, "NonceFields"),
        ("### Sealed objects", ENVELOPE, "SealedHeader"),
        ("### Sealed segments", SEALED, "SealedFooter"),
        ("### Sealed segments", SEALED, "DirectoryHead"),
        ("### Sealed segments", SEALED, "SealedFrameEntry"),
        ("### Sealed segments", SEAL, "AssociatedTail"),
    ];
    for (heading, source, name) in structures {
        let mut offset = 0;
        let mut rows = Vec::new();
        for (field, kind) in fields(source, name) {
            let size = size_of_type(kind);
            rows.push(format!("| {offset} | {size} | `{field}` |"));
            offset += size;
        }
        assert_rows(heading, &rows);
    }
    let objects = [
        ("## Manifest", MANIFEST, "Manifest"),
        ("## Manifest", MANIFEST, "DiskPoint"),
        ("## Manifest", REFERENCE, "SegmentRef"),
        ("### Points that are set aside", ASIDE, "Aside"),
        ("### Points that are set aside", ASIDE, "LostSegment"),
        ("## vault.json", VAULT, "PlainFile"),
        ("### vault.json of an encrypted vault", VAULT, "SealedFile"),
        ("### Key tables", SLOTS, "KeyTable"),
        ("### Key tables", SLOTS, "KeySlot"),
        ("### Key tables", SLOTS, "Argon2Cost"),
    ];
    for (heading, source, name) in objects {
        let rows: Vec<_> = fields(source, name)
            .iter()
            .map(|(field, kind)| {
                let kind = match *kind {
                    "u64" | "u32" | "Epoch" => "number",
                    "Option<Argon2Cost>" => "object",
                    "Cipher" | "SlotKind" => "string",
                    "String" | "jiff::Timestamp" | "NameField" | "CheckField" => "string",
                    "Consistency" | "Option<String>" => "string",
                    list if list.starts_with("Vec<") => "array",
                    other => panic!("a type of unknown notation: {other}"),
                };
                format!("| `{field}` | {kind} |")
            })
            .collect();
        assert_rows(heading, &rows);
    }
}

#[test]
fn the_document_has_the_numbers_of_the_code() {
    use crate::keys::slots::{
        ITERATIONS_MAX, LABEL_BYTES_MAX, MEMORY_KIB_MAX, PARALLELISM_MAX, SLOTS_MAX,
        TABLE_BYTES_MAX,
    };
    use crate::segment::codec::CodecKind;
    use crate::segment::format::{FOOTER_BYTES, FRAME_BLOCKS_MAX, HEADER_BYTES, MAGIC, MAGIC_END};
    use crate::segment::reader::DIRECTORY_BYTES_MAX;
    use crate::segment::sealed::{DIRECTORY_HEAD_BYTES, SEALED_FOOTER_BYTES, SEALED_MAGIC_END};
    use crate::vault::generation::CLAIM_MAGIC;
    let document = document();
    let spaced = |bytes: &[u8]| {
        let digits: Vec<_> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        digits.join(" ")
    };
    for text in [
        spaced(&MAGIC),
        spaced(&MAGIC_END),
        spaced(&crate::vault::manifest::MAGIC),
        spaced(&SEALED_MAGIC_END),
        spaced(&CLAIM_MAGIC),
        format!("the last {SEALED_FOOTER_BYTES} bytes"),
        format!("a head of {DIRECTORY_HEAD_BYTES} bytes"),
        format!("{} KiB at most", TABLE_BYTES_MAX >> 10),
        format!("the key slots, 1 to {SLOTS_MAX} "),
        format!("{LABEL_BYTES_MAX} bytes at most, without control characters"),
        format!("8 × `parallelism` to {MEMORY_KIB_MAX} "),
        format!("passes: 1 to {ITERATIONS_MAX} "),
        format!("lanes: 1 to {PARALLELISM_MAX} "),
        format!("header      {HEADER_BYTES} bytes"),
        format!("the last {FOOTER_BYTES} bytes"),
        format!("{} bytes at most", crate::vault::manifest::REASON_BYTES_MAX),
        format!("blocks in the frame, 1 to {FRAME_BLOCKS_MAX} "),
        format!("{} MiB at most", DIRECTORY_BYTES_MAX >> 20),
        format!(
            "{}: stored as they are; {}: LZ4; {}: Zstandard",
            CodecKind::None as u8,
            CodecKind::Lz4 as u8,
            CodecKind::Zstd as u8
        ),
    ] {
        assert!(document.contains(&text), "no {text:?}");
    }
}

/// A file as the document shows it.
fn dump(path: &Path) -> String {
    dump_bytes(&fs::read(path).unwrap())
}

fn dump_bytes(bytes: &[u8]) -> String {
    let mut text = String::new();
    for (offset, line) in (0..).step_by(16).zip(bytes.chunks(16)) {
        let digits: Vec<_> = line.iter().map(|byte| format!("{byte:02x}")).collect();
        text.push_str(&format!("    {offset:08x}  {}\n", digits.join(" ")));
    }
    text + &format!("    {:08x}\n", bytes.len())
}

/// What comes out of the slots on the way to the root key.
fn slot_example() -> Vec<String> {
    let table = fs::read_to_string(fixture("vault-3").join("keys/2")).unwrap();
    let table = KeyTable::decode(table.as_bytes(), 2).unwrap();
    let salt = |slot: usize| {
        let digits = serde_json::to_value(&table.slots[slot]).unwrap()["salt"].clone();
        crate::keys::from_hex::<16>(digits.as_str().unwrap()).unwrap()
    };
    let wrapping = |secret: &[u8; 32], slot: usize| {
        hkdf(secret, &salt(slot), b"tidemark vault 2 key slot").unwrap()
    };
    let cost = argon2::Params::new(65536, 3, 1, Some(32)).unwrap();
    let argon2 = argon2::Argon2::new(argon2::Algorithm::Argon2id, argon2::Version::V0x13, cost);
    let mut stretched = [0; 32];
    let passphrase = b"correct horse battery staple";
    argon2
        .hash_password_into(passphrase, &salt(1), &mut stretched)
        .unwrap();
    let key_file: Vec<u8> = (0xa0..0xc0).collect();
    let key_file = key_file.try_into().unwrap();
    vec![
        format!(
            "W of the first slot     {}",
            hex(wrapping(&key_file, 0).bytes())
        ),
        format!("S of the passphrase     {}", hex(&stretched)),
        format!(
            "W of the second slot    {}",
            hex(wrapping(&stretched, 1).bytes())
        ),
    ]
}

/// The texts of the first segment: its directory, and its only frame.
fn opened_example(object: &[u8], key: &Secret<32>, identity: &str) -> [Vec<u8>; 2] {
    let key = AeadKey::new(Cipher::Aes256Gcm, key).unwrap();
    let (sealed, footer) = object.split_at(object.len() - 64);
    let open = |domain, stored: &[u8], tag: &[u8], behind: &[u8]| {
        let mut text = stored.to_vec();
        let associated = [identity.as_bytes(), behind].concat();
        let tag = tag.try_into().unwrap();
        key.open(nonce(domain, 0), &associated, &tag, &mut text)
            .unwrap();
        text
    };
    let (directory, tag) = sealed[0x57..].split_at(sealed.len() - 0x57 - 16);
    let behind = [&[2, 0, 0, 0, 0, 0, 0, 0], footer].concat();
    let directory = open(Domain::Directory, directory, tag, &behind);
    let frame = &object[16..0x57];
    let frame = open(
        Domain::Frame,
        frame,
        &directory[48..64],
        &[1, 2, 4, 0, 0, 0, 0, 0],
    );
    [directory, frame]
}

/// What the document shows of the encrypted vault: its files, and what comes out on the way to a directory.
fn sealed_example() -> Vec<String> {
    let vault = open_sealed();
    let root = fixture("vault-3");
    let manifest = vault.manifest(MACHINE, Epoch(1)).unwrap();
    let segment = &manifest.disks[0].segments[0];
    let sealing = vault.keys().sealing().unwrap();
    let manifest_key = vault.manifest_key(MACHINE, Epoch(1));
    let segment_key = vault.segment_key(MACHINE, "disk", segment);
    let object = fs::read(root.join(&segment_key)).unwrap();
    let salt: [u8; 32] = object[object.len() - 64..object.len() - 32]
        .try_into()
        .unwrap();
    let name = segment_name(&segment.name.0);
    let identity = sealing.identity("segment", &[MACHINE, "disk", &name]);
    let key = hkdf(sealing.segments.bytes(), &salt, identity.as_bytes()).unwrap();
    let [directory, frame] = opened_example(&object, &key, &identity);
    let point = fs::read(root.join(&manifest_key)).unwrap();
    let of_point = sealing.identity("manifest", &[MACHINE, "0000000000000001"]);
    let point_key = hkdf(
        sealing.manifests.bytes(),
        &point[16..48],
        of_point.as_bytes(),
    )
    .unwrap();
    let read = |key: &str| fs::read_to_string(root.join(key)).unwrap();
    let indented = |text: String| {
        let lines: Vec<_> = text.lines().map(|line| format!("    {line}\n")).collect();
        lines.concat()
    };
    vec![
        indented(read("vault.json")),
        indented(read("keys/1")),
        indented(read("keys/2")),
        format!("segments      {}", hex(sealing.segments.bytes())),
        format!("manifests     {}", hex(sealing.manifests.bytes())),
        format!("claims        {}", hex(sealing.claims.bytes())),
        format!("M             {}", vault.keys().machine_in_keys(MACHINE)),
        format!(
            "D             {}",
            vault.keys().disk_in_keys(MACHINE, "disk")
        ),
        manifest_key.clone(),
        dump(&root.join(&manifest_key)),
        segment_key.clone(),
        dump(&root.join(&segment_key)),
        format!("    {}\n", identity.replace('\n', "\\n")),
        format!("key of the segment      {}", hex(key.bytes())),
        serde_json::to_string(segment).unwrap(),
        format!("    {}\n", of_point.replace('\n', "\\n")),
        format!("key of the manifest     {}", hex(point_key.bytes())),
        dump_bytes(&directory),
        dump_bytes(&frame),
    ]
}

#[test]
fn the_second_example_is_the_encrypted_vault() {
    let example = section("## Example of an encrypted vault");
    for text in sealed_example().into_iter().chain(slot_example()) {
        assert!(example.contains(&text), "the example lacks:\n{text}");
    }
}

#[test]
fn the_example_is_the_vault_of_version_one() {
    let document = document();
    let vault = open();
    let manifest = vault.manifest(MACHINE, Epoch(1)).unwrap();
    let segment = &manifest.disks[0].segments[0];
    let (manifest_key, segment_key) = (
        manifest_key(MACHINE, Epoch(1)),
        segment_key(MACHINE, "disk", segment),
    );
    let vault_file = fs::read_to_string(folder().join("vault.json")).unwrap();
    let indented: Vec<_> = vault_file
        .lines()
        .map(|line| format!("    {line}\n"))
        .collect();
    let root: Vec<u8> = (0..32).collect();
    let key = |context| hex(&blake3::derive_key(context, &root));
    let block = Content::Text(1).block(0);
    for text in [
        dump(&folder().join(&manifest_key)),
        dump(&folder().join(&segment_key)),
        manifest_key,
        segment_key,
        indented.concat(),
        key("tidemark vault 1 fingerprints of blocks"),
        key("tidemark vault 1 checks of structures"),
        hex(&vault.keys().fingerprint(&block).0),
        DISK_HASHES[0].1.to_owned(),
        DISK_HASHES[1].1.to_owned(),
    ] {
        assert!(document.contains(&text), "the example lacks:\n{text}");
    }
    let unbroken: String = section("## Example").lines().map(str::trim).collect();
    let json = serde_json::to_string(&manifest).unwrap();
    assert!(unbroken.contains(&json), "{json}");
}
