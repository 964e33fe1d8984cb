//! Key slots: opened by their own secret alone, and nothing of a table changes unnoticed.

use super::*;
use crate::keys::Keys;
use proptest::prelude::*;

const COST: Argon2Cost = Argon2Cost {
    memory_kib: 8,
    iterations: 1,
    parallelism: 1,
};
const FILE: &[u8] = b"{\"format\": 2}";

fn place() -> SlotPlace {
    SlotPlace {
        vault: [7; 16],
        cipher: Cipher::Aes256Gcm,
    }
}

fn root() -> Secret<32> {
    Secret::copy_of(&[9; 32])
}

fn keys() -> Keys {
    Keys::derive_sealing(&root(), place().vault, place().cipher).unwrap()
}

fn passphrase(text: &str) -> UserSecret {
    UserSecret::Passphrase(SecretText::new(text.as_bytes().to_vec()))
}

fn key_file(byte: u8) -> UserSecret {
    UserSecret::KeyFile(Secret::copy_of(&[byte; 32]))
}

fn table() -> KeyTable {
    let slot = |secret, label| KeySlot::new(place(), &root(), secret, label, COST).unwrap();
    KeyTable {
        number: 3,
        slots: vec![slot(&passphrase("one"), "first"), slot(&key_file(2), "")],
    }
}

fn object() -> Vec<u8> {
    table().encode(keys().sealing().unwrap(), FILE).unwrap()
}

fn is_checked(object: &[u8], file: &[u8]) -> bool {
    KeyTable::decode(object, 3).is_ok() && KeyTable::check(object, keys().sealing().unwrap(), file)
}

#[test]
fn each_secret_opens_its_slot() {
    let table = table();
    for secret in [passphrase("one"), key_file(2)] {
        assert_eq!(table.open(place(), &secret).unwrap(), Some(root()));
    }
    for secret in [passphrase("two"), passphrase(""), key_file(3)] {
        assert_eq!(table.open(place(), &secret).unwrap(), None);
    }
}

#[test]
fn a_slot_opens_in_its_vault_alone() {
    let table = table();
    let others = [
        SlotPlace {
            vault: [8; 16],
            ..place()
        },
        SlotPlace {
            cipher: Cipher::ChaCha20Poly1305,
            ..place()
        },
    ];
    for other in others {
        assert_eq!(table.open(other, &key_file(2)).unwrap(), None);
    }
}

#[test]
fn a_table_survives_and_is_of_its_number_vault_and_key() {
    let table = table();
    let object = table.encode(keys().sealing().unwrap(), FILE).unwrap();
    assert_eq!(KeyTable::decode(&object, 3), Ok(table));
    assert!(is_checked(&object, FILE));
    assert!(!is_checked(&object, b"{\"format\": 3}"));
    assert!(KeyTable::decode(&object, 4).is_err());
    let other =
        Keys::derive_sealing(&Secret::copy_of(&[1; 32]), place().vault, place().cipher).unwrap();
    assert!(!KeyTable::check(&object, other.sealing().unwrap(), FILE));
}

#[test]
fn costs_out_of_range_are_refused_before_they_are_paid() {
    let text = String::from_utf8(object()).unwrap();
    let cost = "\"memory_kib\":8,\"iterations\":1,\"parallelism\":1";
    assert!(text.contains(cost));
    for bad in [
        "\"memory_kib\":1048577,\"iterations\":1,\"parallelism\":1",
        "\"memory_kib\":7,\"iterations\":1,\"parallelism\":1",
        "\"memory_kib\":15,\"iterations\":1,\"parallelism\":2",
        "\"memory_kib\":8,\"iterations\":17,\"parallelism\":1",
        "\"memory_kib\":8,\"iterations\":0,\"parallelism\":1",
        "\"memory_kib\":1024,\"iterations\":1,\"parallelism\":17",
        "\"memory_kib\":8,\"iterations\":1,\"parallelism\":0",
        "\"memory_kib\":8,\"iterations\":1,\"parallelism\":536870912",
    ] {
        let object = text.replace(cost, bad);
        assert!(KeyTable::decode(object.as_bytes(), 3).is_err(), "{bad}");
    }
}

#[test]
fn tables_that_cannot_be_are_refused() {
    let good = table();
    let encode = |table: &KeyTable| table.encode(keys().sealing().unwrap(), FILE).unwrap();
    let change = |make: &dyn Fn(&mut KeyTable)| {
        let mut table = good.clone();
        make(&mut table);
        KeyTable::decode(&encode(&table), 3)
    };
    assert!(change(&|_| ()).is_ok());
    assert!(change(&|table| table.slots.clear()).is_err());
    assert!(change(&|table| table.slots[1].id = table.slots[0].id.clone()).is_err());
    assert!(change(&|table| table.slots[0].argon2 = None).is_err());
    assert!(change(&|table| table.slots[1].argon2 = Some(COST)).is_err());
    assert!(change(&|table| table.slots[0].label = "two\nlines".to_owned()).is_err());
    assert!(change(&|table| table.slots[0].label = "x".repeat(LABEL_BYTES_MAX + 1)).is_err());
    assert!(change(&|table| table.slots[0].wrapped.truncate(94)).is_err());
    let slot = &good.slots[1];
    let many = |count: u32| {
        let slots = (0..count).map(|id| KeySlot {
            id: format!("{id:08x}"),
            ..slot.clone()
        });
        KeyTable {
            number: 3,
            slots: slots.collect(),
        }
    };
    assert!(KeyTable::decode(&encode(&many(SLOTS_MAX as u32)), 3).is_ok());
    assert!(KeyTable::decode(&encode(&many(SLOTS_MAX as u32 + 1)), 3).is_err());
    let label = "x".repeat(LABEL_BYTES_MAX + 1);
    let error = KeySlot::new(place(), &root(), &key_file(1), &label, COST).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
}

#[test]
fn every_changed_byte_of_a_table_shows() {
    let whole = object();
    for at in 0..whole.len() {
        for bit in 0..8 {
            let mut changed = whole.clone();
            changed[at] ^= 1 << bit;
            assert!(!is_checked(&changed, FILE), "bit {bit} of byte {at}");
        }
        assert!(!is_checked(&whole[..at], FILE), "cut at {at}");
    }
    let mut longer = whole;
    longer.push(b'\n');
    assert!(!is_checked(&longer, FILE));
}

proptest! {
    #[test]
    fn garbage_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        prop_assert!(KeyTable::decode(&bytes, 3).is_err());
        prop_assert!(!KeyTable::check(&bytes, keys().sealing().unwrap(), FILE));
    }

    #[test]
    fn any_change_of_the_text_never_panics(
        at in any::<prop::sample::Index>(), with in "[0-9a-z\"{}:,\\[\\]-]{0,12}", gone in 0usize..12,
    ) {
        let whole = object();
        let at = at.index(whole.len());
        let end = (at + gone).min(whole.len());
        let changed = [&whole[..at], with.as_bytes(), &whole[end..]].concat();
        if let Ok(table) = KeyTable::decode(&changed, 3) {
            let _judged = table.open(place(), &key_file(2));
        }
        prop_assert!(changed == whole || !is_checked(&changed, FILE));
    }
}
