//! Rules for what users read when something is wrong: every text is seen by a test.

use regex::Regex;

use super::{files, report};

/// What nobody but a developer of this library can bring about.
const UNSEEN: &[&str] = &["failed to describe the service for reflection"];

/// The tests of a source file, and the rest.
fn parted<'a>(path: &str, text: &'a str) -> (&'a str, &'a str) {
    if path.contains("/tests/") || path.ends_with("/tests.rs") {
        return (text, "");
    }
    match text.find("#[cfg(test)]\nmod tests {") {
        Some(at) => (&text[at..], &text[..at]),
        None => ("", text),
    }
}

/// A text as one line, without what only breaks it in the source.
fn plain(text: &str) -> String {
    let joined = Regex::new(r"\\\n\s*").unwrap().replace_all(text, "").replace("\\\"", "\"");
    joined.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The longest words of a format string between its arguments.
fn words(format: &str) -> String {
    let pieces = Regex::new(r"\{[^{}]*\}").unwrap();
    let format = plain(format);
    pieces.split(&format).max_by_key(|piece| piece.len()).unwrap_or_default().trim().to_owned()
}

#[test]
fn every_error_of_the_controller_is_read_by_a_test() {
    let text = Regex::new(r#"#\[error\(\s*"((?:[^"\\]|\\.)*)""#).unwrap();
    let sources = files(".rs");
    let tests: Vec<String> = sources.iter().map(|(path, text)| plain(parted(path, text).0)).collect();
    let mut count = 0;
    let mut complaints = Vec::new();
    for (path, source) in sources.iter().filter(|(path, _)| path.starts_with("controller/src/")) {
        for found in text.captures_iter(parted(path, source).1) {
            let words = words(&found[1]);
            // What only passes on what another one says has no words of its own.
            if words.len() < 6 || UNSEEN.contains(&words.as_str()) {
                continue;
            }
            count += 1;
            if !tests.iter().any(|test| test.contains(&words)) {
                complaints.push(format!("{path}: {words}"));
            }
        }
    }
    assert!(count > 100, "{count} texts");
    report("errors whose text no test has seen", &complaints);
}
