//! What is said to a qemu guest agent, and what it answers. Pure.
//!
//! Both sides may hold bytes of an exchange that somebody else has broken off. A byte of 0xff, which no
//! JSON has, makes the agent forget what it holds; its answer to `guest-sync-delimited` begins with the
//! same byte, and what comes before that answer is stale.

use serde_json::{Value, json};

/// Parts what is stale from what is not.
const DELIMITER: u8 = 0xff;

/// The request that brings both sides into step.
pub fn sync_request(id: u64) -> Vec<u8> {
    let mut bytes = vec![DELIMITER];
    let arguments = json!({ "id": id });
    let request = json!({ "execute": "guest-sync-delimited", "arguments": arguments });
    bytes.extend_from_slice(request.to_string().as_bytes());
    bytes.push(b'\n');
    bytes
}

/// A request without arguments.
pub fn request(command: &str) -> Vec<u8> {
    let mut bytes = json!({ "execute": command }).to_string().into_bytes();
    bytes.push(b'\n');
    bytes
}

/// Whether a line is the answer to `sync_request`. All others are stale.
pub fn is_in_step(line: &[u8], id: u64) -> bool {
    let Some(at) = line.iter().rposition(|byte| *byte == DELIMITER) else {
        return false;
    };
    let answer: Option<Value> = serde_json::from_slice(&line[at + 1..]).ok();
    answer.and_then(|answer| answer.get("return")?.as_u64()) == Some(id)
}

/// Why a question has no answer that helps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unanswered {
    /// The agent said no, in these words.
    Refused(String),
    /// Nobody knows what it does.
    Unknown(String),
}

/// What an answer returns.
///
/// # Errors
///
/// The agent's own words, or that it is no answer.
pub fn answer(line: &[u8]) -> Result<Value, Unanswered> {
    let garbled = || {
        let shown: String = String::from_utf8_lossy(line).chars().take(80).collect();
        Unanswered::Unknown(format!(
            "it answers {shown:?}, which is no answer of a guest agent"
        ))
    };
    let mut value: Value = serde_json::from_slice(line).map_err(|_| garbled())?;
    if let Some(error) = value.get("error") {
        let words = error.get("desc").and_then(Value::as_str);
        let words = words.map_or_else(|| error.to_string(), str::to_owned);
        return Err(Unanswered::Refused(words));
    }
    value.get_mut("return").map(Value::take).ok_or_else(garbled)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn only_the_right_answer_is_in_step() {
        let sent = sync_request(77);
        assert_eq!(sent[0], 0xff);
        assert_eq!(sent.last(), Some(&b'\n'));
        let asked: Value = serde_json::from_slice(&sent[1..]).unwrap();
        assert_eq!(asked["arguments"]["id"], 77);
        assert!(is_in_step(b"\xff{\"return\": 77}", 77));
        assert!(is_in_step(b"half an ans\xff{\"return\": 77}", 77));
        assert!(is_in_step(b"\xff{\"return\": 1}\xff{\"return\": 77}\r", 77));
        for stale in [
            &b"{\"return\": 77}"[..],
            b"\xff{\"return\": 76}",
            b"\xff{\"return\": \"77\"}",
            b"\xff{\"return\": 77}\xff",
            b"\xff{\"error\": {}}",
            b"",
        ] {
            assert!(!is_in_step(stale, 77), "{stale:?}");
        }
    }

    #[test]
    fn answers_are_values_or_words() {
        assert_eq!(answer(b"{\"return\": 3}"), Ok(json!(3)));
        assert_eq!(answer(b"{\"return\": \"frozen\"}"), Ok(json!("frozen")));
        let error = b"{\"error\": {\"class\": \"GenericError\", \"desc\": \"failed to open /\"}}";
        let refused = |words: &str| Err(Unanswered::Refused(words.to_owned()));
        assert_eq!(answer(error), refused("failed to open /"));
        assert_eq!(answer(b"{\"error\": 5}"), refused("5"));
        for garbled in [&b"hello"[..], b"{}", b"[]", b"\xff{\"return\": 1}"] {
            let unanswered = answer(garbled).unwrap_err();
            assert!(matches!(unanswered, Unanswered::Unknown(_)), "{garbled:?}");
        }
    }

    proptest! {
        #[test]
        fn garbage_never_panics(line in prop::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(answer(&line).is_err());
            prop_assert!(!is_in_step(&line, 77));
        }

        #[test]
        fn whatever_is_stale_is_passed_over(
            stale in prop::collection::vec(any::<u8>().prop_filter("", |byte| *byte != b'\n'), 0..200),
            id in any::<u64>(),
        ) {
            let mut line = stale;
            line.extend_from_slice(format!("\u{0}{{\"return\": {id}}}").as_bytes());
            let at = line.iter().rposition(|byte| *byte == 0).unwrap();
            line[at] = 0xff;
            prop_assert!(is_in_step(&line, id));
            prop_assert!(!is_in_step(&line, id ^ 1));
        }
    }
}
