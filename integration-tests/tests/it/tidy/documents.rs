//! Rules for the documents: what they point at exists, and the code map is complete.

use std::collections::BTreeSet;

use regex::Regex;

use super::{files, report, root};

/// Links and quoted paths of one document that should be files of the repository. A quoted path counts when its first
/// component is an entry of the top level; what stands in code fences is example text.
fn mentioned(text: &str) -> Vec<String> {
    let mut prose = String::new();
    let mut fenced = false;
    for line in text.lines() {
        if line.trim_start().starts_with("```") {
            fenced = !fenced;
        } else if !fenced {
            prose.push_str(line);
            prose.push('\n');
        }
    }
    let link = Regex::new(r"\]\(([^)#\s]+)(#[^)]*)?\)").unwrap();
    let quoted = Regex::new(r"`([A-Za-z0-9_.][A-Za-z0-9_./-]*)`").unwrap();
    let mut found: Vec<String> = link
        .captures_iter(&prose)
        .map(|c| c[1].to_owned())
        .filter(|target| !target.contains("://"))
        .collect();
    found.extend(quoted.captures_iter(&prose).map(|c| c[1].to_owned()).filter(|path| {
        let first = path.split('/').next().unwrap_or_default();
        path.contains('/')
            && root().join(first).exists()
            && !matches!(first, "." | ".." | "target" | "results")
    }));
    found
}

#[test]
fn documents_mention_only_files_that_exist() {
    let mut complaints = Vec::new();
    for (path, text) in files(".md") {
        let beside = root().join(&path).parent().unwrap().to_path_buf();
        for mention in mentioned(&text) {
            if !root().join(&mention).exists() && !beside.join(&mention).exists() {
                complaints.push(format!("{path}: {mention}"));
            }
        }
    }
    report("documents that mention what is not there", &complaints);
}

#[test]
fn the_code_map_names_every_room() {
    let map: BTreeSet<String> =
        mentioned(&std::fs::read_to_string(root().join("ARCHITECTURE.md")).unwrap()).into_iter().collect();
    let complaints: Vec<String> = files(".rs")
        .into_iter()
        .map(|(path, _)| path)
        .filter(|path| path.contains("/src/") && !path.contains("/src/bin/"))
        .filter(|path| !map.contains(path))
        // Files below a room that is named belong to it.
        .filter(|path| {
            !map.iter().any(|room| {
                room.strip_suffix(".rs").is_some_and(|room| path.starts_with(&format!("{room}/")))
            })
        })
        .collect();
    report("rooms that ARCHITECTURE.md does not name", &complaints);
}

#[test]
fn the_readme_shows_the_first_test_as_it_is() {
    let first = std::fs::read_to_string(root().join("integration-tests/tests/first.rs")).unwrap();
    let (_header, shown) = first.split_once("\n\n").unwrap();
    let readme = std::fs::read_to_string(root().join("README.md")).unwrap();
    assert!(
        readme.contains(&format!("```rust\n{shown}```\n")),
        "README.md shows another text than tests/first.rs"
    );
    assert!(shown.lines().count() <= 40, "{} lines", shown.lines().count());
}

#[test]
fn the_readme_names_commands_that_exist() {
    let readme = std::fs::read_to_string(root().join("README.md")).unwrap();
    assert!(readme.contains("cargo run --example netperf -p millstream"));
    assert!(readme.contains("\nintegration-tests/run\n"));
}

/// Code of a document with the example that it says it is from.
fn quoted(text: &str) -> Vec<(String, String)> {
    let from = Regex::new(r"(?m)^From \[([^\]]+)\]").unwrap();
    let code = Regex::new(r"(?ms)^```rust\n(.*?)^```$").unwrap();
    let sources: Vec<(usize, String)> =
        from.captures_iter(text).map(|c| (c.get(0).unwrap().start(), c[1].to_owned())).collect();
    code.captures_iter(text)
        .map(|c| {
            let at = c.get(0).unwrap().start();
            let source = sources.iter().rev().find(|(start, _)| *start < at);
            (source.map(|(_, path)| path.clone()).unwrap_or_default(), c[1].to_owned())
        })
        .collect()
}

#[test]
fn the_guide_quotes_the_examples_word_for_word() {
    let guide = std::fs::read_to_string(root().join("docs/guide.md")).unwrap();
    let quoted = quoted(&guide);
    assert!(quoted.len() >= 8, "{} pieces of code", quoted.len());
    let complaints: Vec<String> = quoted
        .into_iter()
        .filter(|(path, code)| {
            std::fs::read_to_string(root().join(path)).map_or(true, |example| !example.contains(code))
        })
        .map(|(path, code)| format!("{path}: {}", code.lines().next().unwrap_or_default()))
        .collect();
    report("pieces of code in docs/guide.md that are not in the example they name", &complaints);
}

#[test]
fn every_test_that_the_requirements_name_exists() {
    let page = std::fs::read_to_string(root().join("docs/requirements.md")).unwrap();
    let test =
        Regex::new(r"#\[(?:tokio::)?test[^\]]*\]\s*(?:#\[[^\]]*\]\s*)*(?:async )?fn ([a-z0-9_]+)").unwrap();
    let mut tests: BTreeSet<String> = BTreeSet::new();
    for (_, text) in files(".rs") {
        tests.extend(test.captures_iter(&text).filter_map(|c| c.get(1)).map(|name| name.as_str().to_owned()));
    }
    let row = Regex::new(r"(?m)^\| R\d+ \|.*\| ([^|]*) \|$").unwrap();
    let name = Regex::new(r"`([a-z0-9_]+)`").unwrap();
    let mut rows = 0;
    let mut complaints = Vec::new();
    for line in row.captures_iter(&page) {
        rows += 1;
        for name in name.captures_iter(&line[1]) {
            if !tests.contains(&name[1]) {
                complaints.push(name[1].to_owned());
            }
        }
    }
    assert!(rows > 150, "{rows} rows");
    report("tests that docs/requirements.md names and nobody wrote", &complaints);
}
