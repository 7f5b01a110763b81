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
