//! References to programs of the host and to scripts of this machine, with arguments.

use std::{
    env, fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use millstream_common::text::nearest;

use super::{BlockReference, Resolution, Resolver};
use crate::block::{Block, Kind, exec};

/// Programs of the host: by an absolute path, or by a name that this machine has on its `PATH`.
pub(super) struct Programs;

impl Resolver for Programs {
    fn name(&self) -> &str {
        "programs"
    }

    fn resolve(&self, reference: &BlockReference) -> Resolution {
        let words = match reference.words() {
            Ok(words) => words,
            Err(error) => return Resolution::not_found(error.to_string(), None),
        };
        let Some(program) = words.first() else {
            return Resolution::not_found("the reference is empty", None);
        };
        if is_python(program) {
            return Resolution::not_found("not for Python files", None);
        }
        if program.starts_with('/') {
            return Resolution::Found(vec![exec(words)]);
        }
        if program.contains('/') {
            return Resolution::not_found("neither a name nor an absolute path", None);
        }
        let path = env::var_os("PATH").unwrap_or_default();
        let directories: Vec<PathBuf> = env::split_paths(&path).collect();
        if directories.iter().any(|directory| is_executable(&directory.join(program))) {
            return Resolution::Found(vec![exec(words)]);
        }
        let known = names_in(&directories);
        let near = nearest(program, known.iter().map(String::as_str));
        let tried = format!(
            "`{program}` is not on the PATH of this machine (for one that only the host has, use its absolute path)"
        );
        Resolution::not_found(tried, near)
    }
}

/// What has this form is a Python file, or a mistake in one.
fn is_python(word: &str) -> bool {
    word.ends_with(".py") || word.contains(".py:") || without_ending(word).is_some()
}

/// The file and what is inside of it, where the file's ending was left out.
pub(super) fn without_ending(word: &str) -> Option<(&str, &str)> {
    word.split_once(':').filter(|(file, _)| Path::new(&format!("{file}.py")).is_file())
}

fn is_executable(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o111 != 0)
}

fn names_in(directories: &[PathBuf]) -> Vec<String> {
    let entries = directories.iter().filter_map(|directory| fs::read_dir(directory).ok()).flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
}

/// Scripts of this machine, by a relative path.
pub(super) struct Scripts;

impl Resolver for Scripts {
    fn name(&self) -> &str {
        "scripts"
    }

    fn resolve(&self, reference: &BlockReference) -> Resolution {
        let Ok(mut words) = reference.words() else {
            return Resolution::not_found("a quote is not closed", None);
        };
        if words.is_empty() {
            return Resolution::not_found("the reference is empty", None);
        }
        if is_python(&words[0]) {
            return Resolution::not_found("not for Python files", None);
        }
        let path = PathBuf::from(words.remove(0));
        if path.is_file() {
            return Resolution::Found(vec![Block::new(Kind::Script { path, arguments: words })]);
        }
        missing_file(&path, |_| true)
    }
}

/// What is said of a file that does not exist, with the nearest one beside it.
pub(super) fn missing_file(path: &Path, wanted: impl Fn(&str) -> bool) -> Resolution {
    let here = env::current_dir().unwrap_or_else(|_| PathBuf::from("?"));
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let beside = names_in(&[parent.unwrap_or(Path::new(".")).to_owned()]);
    let near = nearest(&name, beside.iter().map(String::as_str).filter(|name| wanted(name)));
    let near = near.map(|near| parent.map_or_else(|| PathBuf::from(near), |parent| parent.join(near)));
    let tried = match path.is_dir() {
        true => format!("`{}` is a directory", path.display()),
        false => format!(
            "file `{}` does not exist (the current directory is `{}`)",
            path.display(),
            here.display()
        ),
    };
    Resolution::NotFound { tried, nearest: near.map(|near| near.display().to_string()) }
}
