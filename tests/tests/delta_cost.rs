//! What a delta epoch costs: on a disk of 8 GiB with 1% of its blocks changed at random, little more
//! than the changed bytes is read from the disk and uploaded.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeSet;

use serde_json::Value;
use tests::seed::Random;
use tests::site::{Site, assert_same_sparse};

const SIZE: u64 = 8 << 30;
const BLOCKS: u64 = SIZE / 4096;

/// The sum of all numbers of this name, at any depth.
fn sum_of(value: &Value, name: &str) -> u64 {
    match value {
        Value::Object(fields) => fields
            .iter()
            .map(|(key, field)| match field.as_u64() {
                Some(number) if key == name => number,
                _ => sum_of(field, name),
            })
            .sum(),
        Value::Array(items) => items.iter().map(|item| sum_of(item, name)).sum(),
        _ => 0,
    }
}

#[test]
fn one_percent_of_eight_gibibytes() {
    let mut site = Site::new(&[("disk", SIZE)]);
    site.codec = "none".to_owned();
    let mut random = Random::from_environment("delta_cost");
    let _tracker = site.start_tracker();
    let mut client = site.connect("disk");
    site.protect();
    let _shipper = site.start_shipper();
    site.cut();
    let status = || -> Value {
        serde_json::from_str(&site.shipper(&["status", "--json"]).success()).unwrap()
    };
    let before = (site.segment_bytes(), sum_of(&status(), "bytes_read"));

    let mut blocks = BTreeSet::new();
    while (blocks.len() as u64) < BLOCKS / 100 {
        blocks.insert(random.below(BLOCKS));
    }
    let dirtied = blocks.len() as u64 * 4096;
    for block in blocks {
        client.write(block * 4096, &random.bytes(4096)).unwrap();
    }
    let point = site.cut();
    let after = (site.segment_bytes(), sum_of(&status(), "bytes_read"));
    let ratio = |after: u64, before: u64| (after - before) as f64 / dirtied as f64;
    let uploaded = ratio(after.0, before.0);
    let read = ratio(after.1, before.1);
    println!("dirtied {dirtied} bytes; read {read:.3} times, uploaded {uploaded:.3} times as much");
    assert!((1.0..=1.05).contains(&uploaded), "uploaded {uploaded}");
    assert!((1.0..=1.1).contains(&read), "read {read}");
    assert_same_sparse(
        &site.image("disk"),
        &site.restore(&point, "disk", "restored"),
    );
}
