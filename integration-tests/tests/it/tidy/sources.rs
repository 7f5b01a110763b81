//! Rules for Rust sources.

use regex::Regex;

use super::{files, report};

/// Rooms that must be pure. Others may be; they say so with the word `Pure.` in their header and are held to it.
const PURE_ROOMS: [&str; 15] = [
    "agent/src/session.rs",
    "agent/src/supervisor/queue.rs",
    "agent/src/supervisor/task.rs",
    "common/src/id.rs",
    "common/src/limits.rs",
    "common/src/outcome.rs",
    "common/src/spec.rs",
    "common/src/text.rs",
    "controller/src/definition.rs",
    "controller/src/params.rs",
    "controller/src/queue.rs",
    "controller/src/results/layout.rs",
    "controller/src/sync/barrier.rs",
    "controller/src/sync/hopeless.rs",
    "controller/src/sync/topic.rs",
];

/// What a pure room must not name.
const IMPURE: &str = r"\btokio\b|\btonic\b|\bprost\b|std::fs|std::net|std::process|Instant::now|SystemTime::now|\basync\b|\.await\b";

/// Whether the file is nothing but tests.
fn is_test_file(path: &str) -> bool {
    path.contains("/tests/") || path.ends_with("/tests.rs") || path.starts_with("integration-tests/")
}

/// Number of lines above the tests that stand in the file itself.
fn lines_above_tests(content: &str) -> usize {
    let lines: Vec<&str> = content.lines().collect();
    let begins =
        |pair: &[&str]| pair[0] == "#[cfg(test)]" && pair[1].contains("mod ") && pair[1].ends_with('{');
    lines.windows(2).position(begins).unwrap_or(lines.len())
}

/// Lines with their numbers, comments left out.
fn numbered<'a>(lines: impl Iterator<Item = (usize, &'a str)>) -> impl Iterator<Item = (usize, &'a str)> {
    lines.filter(|(_, line)| !line.trim_start().starts_with("//")).map(|(index, line)| (index + 1, line))
}

/// Lines of the file above its tests.
fn code(content: &str) -> impl Iterator<Item = (usize, &str)> {
    numbered(content.lines().enumerate().take(lines_above_tests(content)))
}

/// Lines of the file's tests.
fn tests<'a>(path: &str, content: &'a str) -> impl Iterator<Item = (usize, &'a str)> {
    let above = if is_test_file(path) { 0 } else { lines_above_tests(content) };
    numbered(content.lines().enumerate().skip(above))
}

fn header(content: &str) -> String {
    content.lines().take_while(|line| line.starts_with("//!")).collect::<Vec<_>>().join("\n")
}

#[test]
fn every_file_says_what_it_answers_for() {
    let complaints: Vec<String> = files(".rs")
        .iter()
        .filter(|(_, content)| !content.starts_with("//! "))
        .map(|(path, _)| path.clone())
        .collect();
    report("files that do not begin with `//!`", &complaints);
}

#[test]
fn pure_rooms_name_no_runtime_no_wire_no_files_and_no_clock() {
    let impure = Regex::new(IMPURE).unwrap();
    let mut complaints = Vec::new();
    let sources = files(".rs");
    for room in PURE_ROOMS {
        if !sources.iter().any(|(path, _)| path == room) {
            complaints.push(format!("{room}: there is no such file; is it still called so?"));
        }
    }
    for (path, content) in &sources {
        if !PURE_ROOMS.contains(&path.as_str()) && !header(content).contains("Pure.") {
            continue;
        }
        for (number, line) in code(content) {
            if impure.is_match(line) {
                complaints.push(format!("{path}:{number}: {}", line.trim()));
            }
        }
    }
    report("pure rooms that are not", &complaints);
}

#[test]
fn no_test_sleeps() {
    let sleep = Regex::new(r"\bthread::sleep\b|\btime::sleep\b|\bsleep_until\b|(^|[^.\w])sleep\(").unwrap();
    let mut complaints = Vec::new();
    // The one bounded poll, for what has no event: processes that are not ours, files of others. And programs that pass
    // simulated time.
    const ALLOWED: [&str; 2] =
        ["integration-tests/src/wait.rs", "integration-tests/tests/simulation/scripts.rs"];
    for (path, content) in files(".rs") {
        if ALLOWED.contains(&path.as_str()) || path.starts_with("integration-tests/tests/it/tidy") {
            continue;
        }
        for (number, line) in tests(&path, &content) {
            if sleep.is_match(line) {
                complaints.push(format!("{path}:{number}: {}", line.trim()));
            }
        }
    }
    report("tests that sleep", &complaints);
}

#[test]
fn no_file_is_too_long() {
    const LINES_MAX: usize = 600;
    let complaints: Vec<String> = files(".rs")
        .iter()
        .filter(|(path, _)| !path.ends_with("/tests.rs"))
        .map(|(path, content)| (path, lines_above_tests(content)))
        .filter(|(_, lines)| *lines > LINES_MAX)
        .map(|(path, lines)| format!("{path}: {lines} lines"))
        .collect();
    report(&format!("files of more than {LINES_MAX} lines above their tests"), &complaints);
}

#[test]
fn no_channel_is_unbounded() {
    let unbounded = Regex::new(r"unbounded_channel|mpsc::unbounded|mpsc::channel\(\)|unbounded\(\)").unwrap();
    let mut complaints = Vec::new();
    for (path, content) in files(".rs") {
        if path.starts_with("integration-tests/tests/it/tidy") {
            continue;
        }
        for (number, line) in code(&content) {
            if unbounded.is_match(line) {
                complaints.push(format!("{path}:{number}: {}", line.trim()));
            }
        }
    }
    report("channels without a bound", &complaints);
}

#[test]
fn the_controller_uses_the_agent_for_local_streams_only() {
    // A Rust function is started through the entry that the agent's own roles use.
    const ALLOWED: [&str; 3] =
        ["controller/src/block/payload.rs", "controller/src/entry.rs", "controller/src/reach/local.rs"];
    let mut complaints = Vec::new();
    for (path, content) in files(".rs") {
        if !path.starts_with("controller/src/") || is_test_file(&path) || ALLOWED.contains(&path.as_str()) {
            continue;
        }
        for (number, line) in code(&content) {
            if line.contains("millstream_agent") {
                complaints.push(format!("{path}:{number}: {}", line.trim()));
            }
        }
    }
    report("rooms of the controller that name the agent", &complaints);
}

#[test]
fn the_agent_knows_no_kind_of_block() {
    // It may tell whether there is a Python interpreter, which is a fact about the host.
    const ALLOWED: [&str; 3] =
        ["agent/src/cli/status/shown.rs", "agent/src/door/opening.rs", "agent/src/host.rs"];
    let kinds = Regex::new(r"(?i)\bpython\b|\bBlockContext\b|\blinkme\b").unwrap();
    let mut complaints = Vec::new();
    for (path, content) in files(".rs") {
        if !path.starts_with("agent/src/") || is_test_file(&path) || ALLOWED.contains(&path.as_str()) {
            continue;
        }
        for (number, line) in code(&content) {
            if kinds.is_match(line) {
                complaints.push(format!("{path}:{number}: {}", line.trim()));
            }
        }
    }
    report("rooms of the agent that know a kind of block", &complaints);
}
