//! `docs/nbd-support.md` against the source: every constant of `wire.rs` has a row, and every test
//! that a row names exists.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use tests::process::workspace;

fn read(path: &str) -> String {
    std::fs::read_to_string(workspace().join(path)).unwrap()
}

/// The specification's prefix for the constants of a module of `wire.rs`.
fn prefix(module: &str) -> &'static str {
    match module {
        "" => "NBD_",
        "handshake_flags" | "transmission_flags" => "NBD_FLAG_",
        "option" => "NBD_OPT_",
        "option_reply" => "NBD_REP_",
        "info" => "NBD_INFO_",
        "command" => "NBD_CMD_",
        "command_flags" => "NBD_CMD_FLAG_",
        "reply_flags" => "NBD_REPLY_FLAG_",
        "reply_type" => "NBD_REPLY_TYPE_",
        "allocation_state" => "NBD_STATE_",
        other => panic!("module {other} of wire.rs is not known to this test"),
    }
}

/// The constants of `wire.rs` as the specification calls them.
fn constants() -> Vec<String> {
    let text = read("tracker/src/nbd/wire.rs");
    let code = text.split("#[cfg(test)]").next().unwrap();
    let mut module = String::new();
    let mut names = Vec::new();
    for line in code.lines() {
        if let Some(name) = line.strip_prefix("pub mod ") {
            module = name.trim_end_matches(" {").to_owned();
        } else if line == "}" {
            module.clear();
        } else if let Some(rest) = line.trim_start().strip_prefix("pub const ") {
            let name = rest.split(':').next().unwrap();
            // Sizes are ours and not on the wire.
            if !name.ends_with("_BYTES") && !name.ends_with("_BYTES_MAX") && !name.contains("fn ") {
                names.push(format!("{}{name}", prefix(&module)));
            }
        }
    }
    names
}

#[test]
fn every_constant_has_a_row() {
    let document = read("docs/nbd-support.md");
    let names = constants();
    assert!(
        names.len() > 60,
        "only {} constants were found",
        names.len()
    );
    let missing: Vec<&String> = names
        .iter()
        .filter(|name| !document.contains(&format!("`{name}`")))
        .collect();
    assert!(missing.is_empty(), "no row for {missing:?}");
    for error in [
        "EPERM",
        "EIO",
        "ENOMEM",
        "EINVAL",
        "ENOSPC",
        "EOVERFLOW",
        "ENOTSUP",
        "ESHUTDOWN",
    ] {
        assert!(document.contains(&format!("`NBD_{error}`")), "{error}");
    }
}

#[test]
fn every_test_that_a_row_names_exists() {
    let document = read("docs/nbd-support.md");
    let mut sources = String::new();
    for file in [
        "nbd_conformance",
        "nbd_chunks",
        "nbd_clients",
        "nbd_tls",
        "nbd_direct",
        "resize",
        "frozen_view",
    ] {
        sources.push_str(&read(&format!("tests/tests/{file}.rs")));
    }
    let mut count = 0;
    for line in document.lines().filter(|line| line.starts_with("| ")) {
        let shown_by = line.trim_end_matches(" |").rsplit(" | ").next().unwrap();
        let Some(name) = shown_by
            .strip_prefix('`')
            .and_then(|rest| rest.strip_suffix('`'))
        else {
            continue;
        };
        assert!(sources.contains(&format!("fn {name}(")), "no test {name}");
        count += 1;
    }
    assert!(count > 60, "only {count} rows name a test");
}
