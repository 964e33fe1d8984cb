//! The rules of the source tree, as tests.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::path::{Path, PathBuf};

use tests::process::workspace;

/// Longest file without its inline tests, and longest function, in lines.
const FILE_LINES_MAX: usize = 600;
const FUNCTION_LINES_MAX: usize = 70;

fn files_below(folder: &Path, keep: &dyn Fn(&Path) -> bool, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_dir() {
            if name != "target" && name != ".git" && name != "results" {
                files_below(&path, keep, found);
            }
        } else if keep(&path) {
            found.push(path);
        }
    }
}

/// All Rust sources, with paths relative to the workspace.
fn sources() -> Vec<(String, String)> {
    let root = workspace();
    let mut files = Vec::new();
    for member in ["tracker", "shipper", "bench", "tests"] {
        let is_rust = |path: &Path| path.extension().is_some_and(|ending| ending == "rs");
        files_below(&root.join(member), &is_rust, &mut files);
    }
    files.sort();
    assert!(files.len() > 20, "the sources were not found");
    files
        .into_iter()
        .map(|path| {
            let text = std::fs::read_to_string(&path).unwrap();
            let name = path.strip_prefix(&root).unwrap().to_string_lossy();
            (name.into_owned(), text)
        })
        .collect()
}

/// A file without its inline test module, which stands last.
fn production(text: &str) -> &str {
    text.split_once("\n#[cfg(test)]\nmod ")
        .map_or(text, |(code, _)| code)
}

/// A line without comment and without the contents of strings and characters.
fn code_of(line: &str) -> String {
    let mut code = String::new();
    let mut characters = line.chars().peekable();
    let mut in_string = false;
    while let Some(c) = characters.next() {
        match c {
            '\\' if in_string => {
                characters.next();
            }
            '"' => in_string = !in_string,
            _ if in_string => {}
            '/' if characters.peek() == Some(&'/') => break,
            '\'' => {
                // A character in quotes; a lifetime has no closing quote two places on.
                let rest: String = characters.clone().take(4).collect();
                if rest.starts_with('\\') {
                    characters.nth(1);
                    characters.next_if_eq(&'\'');
                } else if rest.chars().nth(1) == Some('\'') {
                    characters.nth(1);
                }
            }
            _ => code.push(c),
        }
    }
    code
}

fn report(problems: &[String]) {
    assert!(problems.is_empty(), "\n{}", problems.join("\n"));
}

#[test]
fn every_file_says_what_it_is() {
    let silent: Vec<String> = sources()
        .into_iter()
        .filter(|(_, text)| !text.starts_with("//!"))
        .map(|(name, _)| format!("{name} does not begin with //!"))
        .collect();
    report(&silent);
}

#[test]
fn no_leftovers() {
    // Spelled in halves, so that this file does not find itself.
    let words = [
        concat!("TO", "DO"),
        concat!("FIX", "ME"),
        concat!("XX", "X"),
        concat!("todo", "!("),
        concat!("unimplemented", "!("),
        concat!("dbg", "!("),
        concat!("for ", "now,"),
        concat!("simpli", "fied"),
    ];
    let mut problems = Vec::new();
    for (name, text) in sources() {
        for (number, line) in text.lines().enumerate() {
            for word in words.iter().filter(|word| line.contains(**word)) {
                problems.push(format!("{name}:{}: {word}", number + 1));
            }
        }
    }
    report(&problems);
}

#[test]
fn no_machine_paths_and_no_tickets() {
    let words = [
        concat!("/work", "/"),
        concat!("/ro", "ot/"),
        concat!("/ho", "me/"),
        concat!("iss", "ue #"),
        concat!("iss", "ue 2"),
    ];
    let root = workspace();
    let mut files = Vec::new();
    let is_text = |path: &Path| {
        let name = path.to_string_lossy();
        ["rs", "md", "toml", "sh", "py", "yml"]
            .iter()
            .any(|ending| name.ends_with(&format!(".{ending}")))
            || path
                .parent()
                .is_some_and(|folder| folder.ends_with("scripts"))
    };
    files_below(&root, &is_text, &mut files);
    let mut problems = Vec::new();
    for path in files {
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        for word in words.iter().filter(|word| text.contains(**word)) {
            problems.push(format!("{}: {word}", path.display()));
        }
    }
    report(&problems);
}

#[test]
fn unsafe_stands_in_its_rooms_alone() {
    let mut problems = Vec::new();
    for (name, text) in sources() {
        let uses = text.lines().any(|line| {
            code_of(line)
                .split(|c: char| !c.is_alphanumeric() && c != '_')
                .any(|word| word == "unsafe")
        });
        let file = name.rsplit('/').next().unwrap_or_default();
        let allowed = file == "mapping.rs" || file == "uring.rs" || name.contains("/src/engine/");
        let marked = text.lines().any(|line| line == "#![allow(unsafe_code)]");
        if uses && !(allowed && marked) {
            problems.push(format!(
                "{name}: unsafe outside its rooms or without the mark"
            ));
        }
        if marked && !allowed {
            problems.push(format!("{name}: allows unsafe"));
        }
    }
    report(&problems);
}

#[test]
fn crates_point_one_way() {
    let forbidden = [
        ("tracker/", &["shipper::", "bench::", "tests::"][..]),
        ("shipper/", &["bench::", "tests::"][..]),
    ];
    let mut problems = Vec::new();
    for (name, text) in sources() {
        for (folder, targets) in forbidden {
            for line in text.lines().filter(|_| name.starts_with(folder)) {
                let code = code_of(line);
                let code = code.trim_start();
                for target in targets {
                    if code.starts_with(&format!("use {target}")) {
                        problems.push(format!("{name}: {code}"));
                    }
                }
            }
        }
    }
    report(&problems);
}

#[test]
fn pure_modules_do_no_input_or_output() {
    let rooms = [
        "std::fs",
        "std::net",
        "std::time::Instant",
        "SystemTime",
        "std::process",
    ];
    let mut problems = Vec::new();
    for (name, text) in sources() {
        let pure = name.ends_with("/format.rs")
            || name.ends_with("/wire.rs")
            || name.ends_with("/plan.rs");
        for line in production(&text).lines().filter(|_| pure) {
            for room in rooms.iter().filter(|room| code_of(line).contains(**room)) {
                problems.push(format!("{name}: {room}"));
            }
        }
    }
    report(&problems);
}

#[test]
fn tokio_lives_in_its_rooms_alone() {
    let mut problems = Vec::new();
    for (name, text) in sources() {
        let allowed =
            name.contains("/store/") || name.contains("/console/") || name.starts_with("tests/");
        if !allowed && text.lines().any(|line| code_of(line).contains("tokio::")) {
            problems.push(format!("{name}: tokio"));
        }
    }
    report(&problems);
}

#[test]
fn files_are_short() {
    let mut problems = Vec::new();
    for (name, text) in sources() {
        let lines = production(&text).lines().count();
        // Files of tests are lists of cases; there length does not hide anything.
        let of_tests =
            name.contains("/tests/") || name.contains("_tests/") || name.ends_with("tests.rs");
        let limit = if of_tests {
            FILE_LINES_MAX * 2
        } else {
            FILE_LINES_MAX
        };
        if lines > limit {
            problems.push(format!("{name}: {lines} lines, {limit} are allowed"));
        }
    }
    report(&problems);
}

/// Name, first line and length of each function that has a body.
fn functions(text: &str) -> Vec<(String, usize, usize)> {
    let mut found = Vec::new();
    // Open functions with the depth of braces in front of their body.
    let mut open: Vec<(String, usize, usize)> = Vec::new();
    let mut announced: Option<(String, usize)> = None;
    let mut depth = 0_usize;
    let mut brackets = 0;
    for (number, line) in text.lines().enumerate() {
        let code = code_of(line);
        let mut words = code.split_whitespace().peekable();
        while let Some(word) = words.next() {
            let named = words.peek().and_then(|name| name.find(['(', '<']));
            if let (true, Some(end), Some(name)) = (word == "fn", named, words.peek()) {
                announced = Some((name[..end].to_owned(), number));
            }
        }
        for c in code.chars() {
            match c {
                '{' => {
                    if let Some((name, first)) = announced.take() {
                        open.push((name, first, depth));
                    }
                    depth += 1;
                }
                '}' => {
                    depth = depth.saturating_sub(1);
                    if open.last().is_some_and(|(_, _, before)| *before == depth)
                        && let Some((name, first, _)) = open.pop()
                    {
                        found.push((name, first + 1, number - first + 1));
                    }
                }
                '[' => brackets += 1,
                ']' => brackets -= 1,
                // A declaration without a body; `[u8; 4]` in a signature is none.
                ';' if brackets == 0 => announced = None,
                _ => {}
            }
        }
    }
    found
}

#[test]
fn functions_are_short() {
    let mut problems = Vec::new();
    for (name, text) in sources() {
        for (function, first, lines) in functions(&text) {
            if lines > FUNCTION_LINES_MAX {
                problems.push(format!("{name}:{first}: {function} has {lines} lines"));
            }
        }
    }
    report(&problems);
}

#[test]
fn the_scanner_counts_functions() {
    let text = "impl A {\n    fn one(&self) -> char {\n        '{'\n    }\n\n    fn two();\n}\n\
                fn three() {\n    let s = \"}\"; // }\n    if true {\n    }\n}\n";
    let found = functions(text);
    let lengths: Vec<(&str, usize)> = found
        .iter()
        .map(|(name, _, lines)| (name.as_str(), *lines))
        .collect();
    assert_eq!(lengths, [("one", 3), ("three", 5)]);
}

#[test]
fn packages_use_the_lints_of_the_workspace() {
    for member in ["tracker", "shipper", "bench", "tests"] {
        let text = std::fs::read_to_string(workspace().join(member).join("Cargo.toml")).unwrap();
        assert!(text.contains("[lints]\nworkspace = true"), "{member}");
    }
}
