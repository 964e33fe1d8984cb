//! `docs/preserve-format.md` describes what `tracker/src/preserve/format.rs` lays out.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeMap;
use std::mem::offset_of;

use tests::process::workspace;
use tracker::extent::Epoch;
use tracker::journal::format::DISK_BLOCKS_MAX;
use tracker::preserve::format::{
    FLAG_ALL, Failure, HEADER_BYTES, Header, Layout, MAGIC, Map, PAGE_BYTES, Version, WORD_COPIED,
    WORD_FAILURE, WORD_RELEASED, WORD_VIEW_FAILURE,
};

fn document() -> String {
    std::fs::read_to_string(workspace().join("docs/preserve-format.md")).unwrap()
}

/// Rows of the tables of a section, as cells.
fn rows(title: &str) -> Vec<Vec<String>> {
    let text = document();
    let (_, section) = text.split_once(&format!("\n## {title}\n")).expect(title);
    let section = section.split("\n## ").next().unwrap();
    let rows = section.lines().filter(|line| line.starts_with("| "));
    let cells = rows.map(|line| line.trim_matches('|').split('|').map(str::trim));
    cells
        .map(|cells| {
            cells
                .map(|cell| cell.trim_matches('`').to_owned())
                .collect()
        })
        .collect()
}

/// Public fields of the header, in order.
fn fields() -> Vec<String> {
    let path = workspace().join("tracker/src/preserve/format.rs");
    let source = std::fs::read_to_string(path).unwrap();
    let (_, body) = source.split_once("pub struct Header {").unwrap();
    let (body, _) = body.split_once("\n}").unwrap();
    let fields = body
        .lines()
        .filter_map(|line| line.trim().strip_prefix("pub "));
    fields
        .map(|field| field.split_once(':').unwrap().0.to_owned())
        .collect()
}

#[test]
fn every_field_of_the_header_stands_in_its_table_in_order_and_without_gaps() {
    let rows = rows("Header");
    let mut end = 0;
    for row in &rows[1..] {
        assert_eq!(row[0].parse(), Ok(end), "{} does not follow", row[2]);
        end += row[1].parse::<usize>().unwrap();
    }
    assert_eq!(end, HEADER_BYTES);
    let named: Vec<&String> = rows[1..].iter().map(|row| &row[2]).collect();
    assert_eq!(named, fields().iter().collect::<Vec<_>>());
    let offset = |field: &str| {
        let row = rows.iter().find(|row| row[2] == field).expect(field);
        row[0].parse::<usize>().unwrap()
    };
    assert_eq!(offset("flags"), offset_of!(Header, flags));
    assert_eq!(offset("epoch"), offset_of!(Header, epoch));
    assert_eq!(offset("changed_offset"), offset_of!(Header, changed_offset));
    assert_eq!(offset("check"), offset_of!(Header, check));
}

#[test]
fn words_and_areas_are_where_the_program_has_them() {
    let words = rows("Words");
    for (row, (name, word)) in words[1..].iter().zip([
        ("failure", WORD_FAILURE),
        ("copied", WORD_COPIED),
        ("released", WORD_RELEASED),
        ("view failure", WORD_VIEW_FAILURE),
    ]) {
        assert_eq!((row[0].parse(), row[1].as_str()), (Ok(word * 8), name));
    }
    assert_eq!(words.len(), 5);
    let areas = rows("Areas");
    let named: Vec<&str> = areas[1..].iter().map(|row| row[0].as_str()).collect();
    let expected = [
        "0",
        "changed_offset",
        "hot_offset",
        "captured_offset",
        "preserved_offset",
        "data_offset",
    ];
    assert_eq!(named, expected);
    let order = [Map::Changed, Map::Hot, Map::Captured, Map::Preserved];
    let layout = Layout::of(200 << 20);
    for (number, map) in (0..).zip(order) {
        assert_eq!(
            layout.map_offset(map),
            PAGE_BYTES + number * layout.map_bytes
        );
    }
}

#[test]
fn numbers_are_those_of_the_program() {
    let text = document().replace('\n', " ");
    let says = |what: String| assert!(text.contains(&what), "{what:?} is missing");
    assert_eq!(MAGIC, *b"TMPRS\r\n\x1a");
    says("`TMPRS` 0d 0a 1a".to_owned());
    says(format!("describes version {} to", Version::First as u32));
    says(format!("| `flags` | {FLAG_ALL}: every block"));
    says(format!("at most 2^{} blocks", DISK_BLOCKS_MAX.ilog2()));
    says(format!(
        "{}, more would have to be kept",
        Failure::Budget as u64
    ));
    says(format!(
        "{}, the file system is full",
        Failure::Space as u64
    ));
    says(format!("{}, the disk or this file", Failure::Io as u64));
    says(format!(
        "{}, the tracker gave the epoch up",
        Failure::GivenUp as u64
    ));
    says(format!("notes failure {}", Failure::GivenUp as u64));
    let other = Failure::from_word(99).unwrap() as u64;
    says(format!("Any other number counts as {other}"));
}

/// The bytes of the example, by their offsets.
fn example() -> BTreeMap<u64, Vec<u8>> {
    let text = document();
    let block = text.split("```\n").nth(1).expect("an example");
    let bytes = |digits: &str| -> Vec<u8> {
        let pairs = 0..digits.len() / 2;
        pairs
            .map(|index| u8::from_str_radix(&digits[index * 2..][..2], 16).unwrap())
            .collect()
    };
    let lines = block.lines().map(|line| line.split_once(' ').unwrap());
    lines
        .map(|(offset, digits)| (u64::from_str_radix(offset, 16).unwrap(), bytes(digits)))
        .collect()
}

#[test]
fn the_example_is_what_the_program_reads() {
    let lines = example();
    let head: Vec<u8> = (0..4)
        .flat_map(|line| lines[&(line * 32)].clone())
        .collect();
    let subject = Header::decode(&head).unwrap();
    assert_eq!((subject.size_bytes, subject.epoch), (10240, Epoch(4386)));
    assert!(!subject.all);
    let word = |offset: u64| u64::from_le_bytes(lines[&offset][..8].try_into().unwrap());
    let layout = Layout::of(subject.size_bytes);
    assert_eq!(word(layout.map_offset(Map::Changed)), 0b101);
    assert_eq!(word(layout.map_offset(Map::Hot)), 1);
    assert_eq!(word(layout.map_offset(Map::Captured)), 0b100);
    assert_eq!(word(layout.map_offset(Map::Preserved)), 1);
    let words = &lines[&(WORD_FAILURE as u64 * 8)];
    assert_eq!(words[..8], [0; 8]);
    assert_eq!(words[8..16], 4096_u64.to_le_bytes());
    assert_eq!(lines[&layout.data_offset()], [1; 32]);
    // The fixture is the same file.
    let path = workspace().join("tracker/src/preserve/fixtures/version-1.txt");
    let fixture = std::fs::read_to_string(path).unwrap();
    assert_eq!(
        fixture.lines().next(),
        Some(layout.file_bytes().to_string().as_str())
    );
    let text = document();
    let shown = text.split("```\n").nth(1).unwrap();
    let mut of_block = 0;
    for line in fixture.lines().skip(1) {
        let (offset, digits) = line.split_once(' ').unwrap();
        if u64::from_str_radix(offset, 16).unwrap() >= layout.data_offset() {
            assert_eq!(digits, "01".repeat(32));
            of_block += 32;
        } else {
            assert!(
                shown.lines().any(|other| other == line),
                "{line} is missing"
            );
        }
    }
    assert_eq!(of_block, 4096);
}
