//! Rules of the house that no compiler checks: purity of rooms, file headers, no sleeping tests, honest documents, a
//! documented protocol, errors that tests have seen, allowed dependencies. Reads the sources; runs nothing of them.

mod dependencies;
mod documents;
mod errors;
mod protocol;
mod sources;

use std::{
    fs,
    path::{Path, PathBuf},
};

/// The top of the repository.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the package lies in the workspace").to_path_buf()
}

/// Every file below the root that ends with `suffix`, as (path relative to the root, content), in order.
fn files(suffix: &str) -> Vec<(String, String)> {
    fn walk(directory: &Path, suffix: &str, found: &mut Vec<PathBuf>) {
        let mut entries: Vec<_> =
            fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
        entries.sort();
        for path in entries {
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if path.is_dir() {
                // What cargo and test runs leave at the top is not ours to judge.
                let left_behind =
                    directory == root() && matches!(name.as_str(), "target" | ".git" | "results");
                if !left_behind {
                    walk(&path, suffix, found);
                }
            } else if name.ends_with(suffix) {
                found.push(path);
            }
        }
    }
    let mut found = Vec::new();
    walk(&root(), suffix, &mut found);
    assert!(!found.is_empty(), "no file ends with {suffix}");
    found
        .into_iter()
        .map(|path| {
            let name = path.strip_prefix(root()).unwrap().to_string_lossy().into_owned();
            (name, fs::read_to_string(path).unwrap())
        })
        .collect()
}

/// Fails with all complaints at once.
fn report(rule: &str, complaints: &[String]) {
    assert!(complaints.is_empty(), "{rule}:\n  {}", complaints.join("\n  "));
}
