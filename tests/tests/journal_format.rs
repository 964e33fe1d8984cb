//! `docs/journal-format.md` describes what `tracker/src/journal/format.rs` lays out.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeMap;
use std::mem::offset_of;

use tests::process::workspace;
use tracker::journal::format::{
    ALARM_OFFSET, ALARM_WORDS, CHECKPOINT_HEAD_BYTES, CHECKPOINT_PAGE_BLOCKS, COUNTER_MAX,
    CheckpointHead, DOUBT_WORD, EPOCH_MAX, FLAG_CLEAN, FLAG_REPLACED, INTENT_OFFSET,
    INTENT_PAGES_RANGE, MAGIC, OLD_INTENT_PAGES, PAGE_BYTES, RECORD_BYTES, REGION_BYTES,
    RING_BYTES_RANGE, SetDescriptor, Superblock, TIME_WORDS, Time, VERSION, encode_time,
};
use tracker::journal::intent::page::{CONTEXT_MAX, NO_REGION, Transaction, UPDATES_MAX};
use tracker::journal::{CLOCK_STEP_MS, MARGIN_MS, POWER_CUT_LAG_MS, POWER_CUT_MARGIN_MS};

fn document() -> String {
    std::fs::read_to_string(workspace().join("docs/journal-format.md")).unwrap()
}

/// Sections of the document by their titles.
fn sections() -> BTreeMap<String, String> {
    document()
        .split("\n## ")
        .skip(1)
        .map(|section| {
            let (title, text) = section.split_once('\n').unwrap();
            (title.to_owned(), text.to_owned())
        })
        .collect()
}

/// The rows of the tables of offsets in a section: offset, size and field. A table begins where
/// offsets start anew.
fn tables(section: &str) -> Vec<Vec<(usize, usize, String)>> {
    let mut tables = Vec::new();
    for line in section.lines().filter(|line| line.starts_with('|')) {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        let (Ok(offset), Ok(size)) = (cells[1].parse::<usize>(), cells[2].parse::<usize>()) else {
            continue;
        };
        if offset == 0 {
            tables.push(Vec::new());
        }
        let field = cells[3].trim_matches('`').to_owned();
        let table: &mut Vec<_> = tables.last_mut().expect("a table begins at offset 0");
        table.push((offset, size, field));
    }
    tables
}

/// Public and private fields of a structure of the format, in order.
fn fields_of(structure: &str) -> Vec<String> {
    let source: String = ["format.rs", "intent/page.rs"]
        .iter()
        .map(|name| workspace().join("tracker/src/journal").join(name))
        .map(|path| std::fs::read_to_string(path).unwrap())
        .collect();
    let start = format!("pub struct {structure} {{");
    let (_, body) = source.split_once(&start).expect("the structure is there");
    let (body, _) = body.split_once("\n}").unwrap();
    let declarations = body
        .lines()
        .map(str::trim)
        .filter(|line| !line.starts_with("//"));
    declarations
        .filter_map(|line| line.split_once(':'))
        .map(|(name, _)| name.trim_start_matches("pub ").to_owned())
        .collect()
}

#[test]
fn every_field_stands_in_its_table_in_order_and_without_gaps() {
    let sections = sections();
    let bits = PAGE_BYTES - CHECKPOINT_HEAD_BYTES;
    // The structure, its section, its table there, its size, and what the table shows besides.
    let places = [
        ("Superblock", "Superblock", 0, size_of::<Superblock>(), 0),
        (
            "SetDescriptor",
            "Superblock",
            1,
            size_of::<SetDescriptor>(),
            0,
        ),
        ("Transaction", "Intent log", 0, size_of::<Transaction>(), 0),
        ("Record", "Ring", 0, RECORD_BYTES as usize, 0),
        ("CheckpointHead", "Checkpoint sets", 0, PAGE_BYTES, bits),
    ];
    for (structure, section, number, size, more) in places {
        let table = &tables(&sections[section])[number];
        let mut end = 0;
        for (offset, size, field) in table {
            assert_eq!(*offset, end, "{structure}: {field} does not follow");
            end = offset + size;
        }
        assert_eq!(end, size, "{structure} has another size");
        let mut named: Vec<&str> = table.iter().map(|row| row.2.as_str()).collect();
        if more > 0 {
            assert_eq!(table.last().unwrap().1, more);
            named.pop();
        }
        let mut declared = fields_of(structure);
        if structure == "Record" {
            // Unpacked; the check is not part of what it tells.
            declared.push("check".to_owned());
        }
        assert_eq!(named, declared, "{structure}");
    }
}

#[test]
fn offsets_are_those_of_the_program() {
    let sections = sections();
    let row = |section: &str, number: usize, field: &str| -> usize {
        let tables = tables(&sections[section]);
        let row = tables[number].iter().find(|row| row.2 == field);
        row.unwrap_or_else(|| panic!("{field} is missing")).0
    };
    let superblock = |field| row("Superblock", 0, field);
    assert_eq!(superblock("journal_id"), offset_of!(Superblock, journal_id));
    assert_eq!(superblock("boot_id"), offset_of!(Superblock, boot_id));
    assert_eq!(
        superblock("ring_records"),
        offset_of!(Superblock, ring_records)
    );
    assert_eq!(superblock("open"), offset_of!(Superblock, open));
    assert_eq!(superblock("ring_tail"), offset_of!(Superblock, ring_tail));
    assert_eq!(superblock("sets"), offset_of!(Superblock, sets));
    assert_eq!(superblock("check"), offset_of!(Superblock, check));
    assert_eq!(
        row("Superblock", 1, "highest_epoch"),
        offset_of!(SetDescriptor, highest_epoch)
    );
    assert_eq!(
        row("Intent log", 0, "context"),
        offset_of!(Transaction, context)
    );
    assert_eq!(
        superblock("overflow_offset"),
        offset_of!(Superblock, overflow_offset)
    );
    assert_eq!(
        row("Checkpoint sets", 0, "page"),
        offset_of!(CheckpointHead, page)
    );
    let alarm = &tables(&sections["Alarm"])[0];
    assert_eq!(alarm[ALARM_WORDS].0, ALARM_WORDS * 8);
    assert_eq!(alarm[DOUBT_WORD].0, DOUBT_WORD * 8);
    assert_eq!(DOUBT_WORD, ALARM_WORDS + TIME_WORDS);
    assert_eq!(alarm.len(), DOUBT_WORD + 2);
}

#[test]
fn numbers_are_those_of_the_program() {
    let text = document();
    let says = |what: String| assert!(text.contains(&what), "{what:?} is missing");
    assert_eq!(MAGIC, *b"TMJRNL\r\n");
    says("`TMJRNL` 0d 0a".to_owned());
    says(format!("describes version {} to", VERSION as u32));
    says(format!("| `flags` | {FLAG_CLEAN}: closed"));
    says(format!("| {ALARM_OFFSET} | {PAGE_BYTES} | alarm |"));
    says(format!("| {INTENT_OFFSET} | `intent_bytes` | intent log |"));
    says(format!(
        "| `ring_offset` | `ring_records` * {RECORD_BYTES} | ring |"
    ));
    let (least, most) = (INTENT_PAGES_RANGE.start(), INTENT_PAGES_RANGE.end());
    says(format!(
        ": {least} to {most} pages; before version 3 always {OLD_INTENT_PAGES}"
    ));
    says(format!("| {UPDATES_MAX} entries: slot"));
    says(format!("| {CONTEXT_MAX} numbers of 4 bytes"));
    says(format!("(pages - 2) * {CONTEXT_MAX} slots"));
    says(format!("{NO_REGION:x} in a slot"));
    says(format!("; {FLAG_REPLACED}: another file"));
    says(format!("from {} s before", POWER_CUT_LAG_MS / 1000));
    says(format!("to {} s after", POWER_CUT_MARGIN_MS / 1000));
    says(format!("| `region_bytes` | {REGION_BYTES}, "));
    says(format!("/ {CHECKPOINT_PAGE_BLOCKS}, rounded up"));
    let least = RING_BYTES_RANGE.start() / RECORD_BYTES;
    let most = (RING_BYTES_RANGE.end() / RECORD_BYTES).ilog2();
    says(format!("slots of the ring: {least} to 2^{most}, "));
    says(format!("from 1 to 2^{} - 1", (EPOCH_MAX + 1).ilog2()));
    says(format!("at most 2^{}.", COUNTER_MAX.ilog2()));
    let bias = encode_time(Time(0)) & EPOCH_MAX;
    says(format!(
        "milliseconds since the beginning of 1970 and 2^{},",
        bias.ilog2()
    ));
    says(format!("to {} s after the later of look", MARGIN_MS / 1000));
    says(format!("differs by more than {} s |", CLOCK_STEP_MS / 1000));
}
