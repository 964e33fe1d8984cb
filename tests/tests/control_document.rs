//! `docs/control-protocol.md` describes what `tracker/src/control/protocol.rs` understands.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeSet;

use serde_json::{Value, json};
use tests::process::workspace;
use tracker::control::line::PEERS_MAX;
use tracker::control::protocol::{
    Answer, CaptureOutcome, LINE_BYTES_MAX, PROTOCOL, Request, Status, decode_request,
    encode_request, error_of,
};
use tracker::engine::EngineStatus;
use tracker::epoch::{DiskStatus, MachineStatus};
use tracker::extent::Epoch;

fn read(path: &str) -> String {
    std::fs::read_to_string(workspace().join(path)).unwrap()
}

/// The part of the document about one of the two programs.
fn part(program: &str) -> String {
    let text = read("docs/control-protocol.md");
    let (tracker, shipper) = text.split_once("\n## Commands of the shipper\n").unwrap();
    match program {
        "tracker" => tracker,
        _ => shipper,
    }
    .to_owned()
}

/// The variants of an enum in a source, as they are written on the wire.
fn variants(source: &str, name: &str) -> Vec<String> {
    let start = format!("enum {name} {{");
    let (_, body) = source.split_once(&start).expect("the enum is there");
    let (body, _) = body.split_once("\n}").unwrap();
    let is_variant = |line: &&str| {
        line.strip_prefix("    ")
            .is_some_and(|line| line.starts_with(|c: char| c.is_ascii_uppercase()))
    };
    body.lines()
        .filter(is_variant)
        .map(|line| {
            let name = line
                .trim()
                .split(|c: char| !c.is_alphanumeric())
                .next()
                .unwrap();
            let mut wire = String::new();
            for c in name.chars() {
                if c.is_uppercase() && !wire.is_empty() {
                    wire.push('-');
                }
                wire.push(c.to_ascii_lowercase());
            }
            wire
        })
        .collect()
}

#[test]
fn every_command_and_outcome_is_described() {
    let tracker = part("tracker");
    let source = read("tracker/src/control/protocol.rs");
    let commands = variants(&source, "Request");
    assert!(commands.len() >= 7);
    for command in commands {
        assert!(
            tracker.contains(&format!("\n| `{command}` |")),
            "{command} has no row"
        );
        assert!(
            tracker.contains(&format!("\n### {command}\n")),
            "{command} has no section"
        );
        assert!(
            tracker.contains(&format!("\"command\": \"{command}\"")),
            "{command} has no example"
        );
    }
    for outcome in variants(&source, "CaptureOutcome") {
        assert!(tracker.contains(&format!("\"{outcome}\"")), "{outcome}");
    }
    let shipper = part("shipper");
    for command in variants(&read("shipper/src/lifecycle/control.rs"), "Request") {
        assert!(
            shipper.contains(&format!("\n| `{command}` |")),
            "{command} of the shipper"
        );
    }
}

#[test]
fn every_kind_of_error_is_described_and_survives_the_wire() {
    let text = part("tracker");
    for kind in variants(&read("tracker/src/error.rs"), "ErrorKind") {
        let wire = kind.replace('-', "");
        assert!(
            text.contains(&format!("\n| `{wire}` |")),
            "{wire} has no row"
        );
        let answer = json!({ "kind": wire, "message": "text" });
        let error = error_of(serde_json::from_value(answer).unwrap());
        assert_eq!(format!("{:?}", error.kind()).to_lowercase(), wire);
    }
}

#[test]
fn every_field_of_a_status_is_described() {
    let text = part("tracker");
    let machine = MachineStatus {
        disks: vec![DiskStatus::default()],
        ..MachineStatus::default()
    };
    let status = Status {
        protocol: PROTOCOL,
        version: String::new(),
        pid: 0,
        machine,
        engine: EngineStatus::default(),
    };
    let mut fields = BTreeSet::new();
    collect(&serde_json::to_value(status).unwrap(), &mut fields);
    assert!(fields.len() > 25);
    let in_tables: String = text
        .lines()
        .filter(|line| line.starts_with("| `"))
        .collect();
    for field in fields {
        assert!(
            in_tables.contains(&format!("`{field}`")),
            "{field} has no row"
        );
    }
}

fn collect(value: &Value, fields: &mut BTreeSet<String>) {
    match value {
        Value::Object(members) => {
            for (name, value) in members {
                fields.insert(name.clone());
                collect(value, fields);
            }
        }
        Value::Array(values) => values.iter().for_each(|value| collect(value, fields)),
        _ => {}
    }
}

#[test]
fn examples_are_lines_of_the_protocol() {
    let text = part("tracker");
    let examples = |mark: &str| -> Vec<String> {
        text.lines()
            .filter_map(|line| line.trim_start().strip_prefix(mark))
            .map(str::to_owned)
            .collect()
    };
    let requests = examples("> ");
    assert!(requests.len() >= 8);
    for line in requests {
        match decode_request(&line) {
            Ok(request) => {
                let again = decode_request(&encode_request(&request).unwrap()).unwrap();
                assert_eq!(again, request);
            }
            Err(error) => assert!(error.to_string().contains("dance"), "{line}: {error}"),
        }
    }
    for line in examples("< ") {
        let _: Answer = serde_json::from_str(&line).unwrap_or_else(|e| panic!("{line}: {e}"));
    }
    let closed = Request::CaptureEnd {
        epoch: Epoch(7),
        outcome: CaptureOutcome::Sealed,
    };
    let line =
        "{\"protocol\": 1, \"command\": \"capture-end\", \"epoch\": 7, \"outcome\": \"sealed\"}";
    assert!(text.contains(line));
    assert_eq!(decode_request(line).unwrap(), closed);
}

#[test]
fn limits_are_those_of_the_program() {
    let text = part("tracker");
    assert!(text.contains(&format!("Version {PROTOCOL}.")));
    assert!(text.contains(&format!("| peers at once | {PEERS_MAX} |")));
    assert!(text.contains(&format!("less than {LINE_BYTES_MAX} bytes")));
    assert!(text.contains(&format!("| {} and the line feed |", LINE_BYTES_MAX - 1)));
}
