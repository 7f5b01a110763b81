//! Rules for dependencies: no version below a known hole, none that was banned, no licence that was not allowed.

use std::{collections::BTreeSet, fs, process::Command};

use regex::Regex;

use super::{report, root};

/// The oldest versions without known holes in what we use of them.
const FLOORS: [(&str, [u64; 3]); 8] = [
    ("bytes", [1, 11, 1]),
    ("h2", [0, 4, 18]),
    ("hyper", [1, 12, 0]),
    ("rustls", [0, 23, 18]),
    ("rustls-webpki", [0, 103, 13]),
    ("tar", [0, 4, 45]),
    ("tokio", [1, 44, 2]),
    ("tonic", [0, 14, 9]),
];

/// (name, version) of every package in the lock file.
fn locked() -> Vec<(String, [u64; 3])> {
    let entry =
        Regex::new("\\[\\[package\\]\\]\nname = \"([^\"]+)\"\nversion = \"(\\d+)\\.(\\d+)\\.(\\d+)").unwrap();
    let lock = fs::read_to_string(root().join("Cargo.lock")).unwrap();
    let packages: Vec<_> = entry
        .captures_iter(&lock)
        .map(|c| (c[1].to_owned(), [2, 3, 4].map(|part| c[part].parse().unwrap())))
        .collect();
    assert!(packages.len() > 100, "the lock file was not understood: {} packages", packages.len());
    packages
}

/// What stands in quotes below `key = [` in deny.toml, up to the closing bracket.
fn denied(key: &str, pattern: &str) -> BTreeSet<String> {
    let text = fs::read_to_string(root().join("deny.toml")).unwrap();
    let list = text.split_once(&format!("\n{key} = [\n")).unwrap().1.split_once("\n]").unwrap().0;
    let found: BTreeSet<String> =
        Regex::new(pattern).unwrap().captures_iter(list).map(|c| c[1].to_owned()).collect();
    assert!(!found.is_empty(), "nothing found for `{key}` in deny.toml");
    found
}

#[test]
fn no_version_is_below_its_floor() {
    let packages = locked();
    let mut complaints = Vec::new();
    for (name, floor) in FLOORS {
        let versions: Vec<_> = packages.iter().filter(|(package, _)| package == name).collect();
        assert!(!versions.is_empty(), "{name} is not used any more: remove its floor");
        complaints.extend(
            versions
                .iter()
                .filter(|(_, v)| *v < floor)
                .map(|(_, v)| format!("{name} {v:?} is below {floor:?}")),
        );
    }
    report("versions with known holes", &complaints);
}

#[test]
fn no_banned_package_is_in_the_lock_file() {
    let banned = denied("deny", "crate = \"([^\"]+)\"");
    let complaints: Vec<String> =
        locked().into_iter().filter(|(name, _)| banned.contains(name)).map(|(name, _)| name).collect();
    report("banned packages", &complaints);
}

#[test]
fn every_licence_is_allowed() {
    let allowed = denied("allow", "\"([^\"]+)\"");
    let output = Command::new(env!("CARGO"))
        // For this platform alone: the build has fetched no other packages.
        .args(["metadata", "--format-version", "1", "--locked", "--offline", "--filter-platform"])
        .arg("x86_64-unknown-linux-gnu")
        .current_dir(root())
        .output()
        .unwrap();
    assert!(output.status.success(), "cargo metadata: {}", String::from_utf8_lossy(&output.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let mut complaints = Vec::new();
    for package in metadata["packages"].as_array().unwrap() {
        let licence = package["license"].as_str().unwrap_or("none given");
        if !satisfied(licence, &allowed) {
            complaints.push(format!("{} {}: {licence}", package["name"], package["version"]));
        }
    }
    report("licences that are not allowed", &complaints);
}

/// Whether a licence expression can be met: `AND` binds closer than `OR`, and an old slash means `OR`.
fn satisfied(expression: &str, allowed: &BTreeSet<String>) -> bool {
    // Parentheses stand around one side of an AND in practice: cut there, each part must be met.
    let mut depth = 0;
    let mut parts = vec![String::new()];
    for c in expression.replace('/', " OR ").chars() {
        match c {
            '(' => depth += 1,
            ')' => depth -= 1,
            _ => {}
        }
        parts.last_mut().unwrap().push(c);
        if depth == 0 && parts.last().unwrap().ends_with(" AND ") && expression.contains('(') {
            let kept = parts.last().unwrap().trim_end_matches(" AND ").to_owned();
            *parts.last_mut().unwrap() = kept;
            parts.push(String::new());
        }
    }
    parts.iter().all(|part| {
        part.trim_matches(['(', ')', ' '])
            .split(" OR ")
            .any(|choice| choice.split(" AND ").all(|one| allowed.contains(one.trim())))
    })
}

#[test]
fn licence_expressions_are_understood() {
    let allowed: BTreeSet<String> = ["MIT", "Unicode-3.0"].map(str::to_owned).into();
    for (expression, expected) in [
        ("MIT", true),
        ("GPL-3.0", false),
        ("GPL-3.0 OR MIT", true),
        ("MIT/Apache-2.0", true),
        ("MIT AND GPL-3.0", false),
        ("(MIT OR Apache-2.0) AND Unicode-3.0", true),
        ("(MIT OR Apache-2.0) AND GPL-3.0", false),
        ("(GPL-3.0 OR Apache-2.0) AND MIT", false),
    ] {
        assert_eq!(satisfied(expression, &allowed), expected, "{expression}");
    }
}
