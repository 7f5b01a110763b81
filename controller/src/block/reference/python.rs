//! References to Python files, their classes and methods.
//!
//! Classes are found by reading the file, never by running it: a script for `python3` of this machine lists them.

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use millstream_common::text::{nearest, printable};
use serde::Deserialize;

use super::{
    BlockReference, Resolution, Resolver,
    programs::{missing_file, without_ending},
};
use crate::block::{
    Block, Kind,
    class::{PythonFile, PythonRun},
};

/// The script that lists classes.
const DISCOVER: &str = include_str!("../python/discover.py");

/// `file.py`, `file.py:Class` and `file.py:Class.method`.
pub(super) struct Python;

/// What the script prints.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Listed {
    Classes(Vec<Class>),
    Error { line: u32, message: String },
}

#[derive(Debug, Deserialize)]
struct Class {
    name: String,
    /// Found only when it is named.
    hidden: bool,
    /// It may have methods that are not listed.
    open: bool,
    methods: Vec<String>,
}

impl Resolver for Python {
    fn name(&self) -> &str {
        "python"
    }

    fn resolve(&self, reference: &BlockReference) -> Resolution {
        let text = reference.text();
        // The ending may be left out where a class is named and the file is there.
        let (file, inside) = match text.split_once(".py:").or_else(|| without_ending(text)) {
            Some((file, inside)) => (format!("{file}.py"), Some(inside)),
            None => match reference.words().ok().and_then(|words| words.into_iter().next()) {
                Some(first) if first.ends_with(".py") => (first, None),
                _ => {
                    let tried = "not of the form `file.py`, `file.py:Class` or `file.py:Class.method`";
                    return Resolution::not_found(tried, None);
                }
            },
        };
        let path = PathBuf::from(file);
        let named = inside.map(|inside| match inside.split_once('.') {
            Some((class, method)) => (class, Some(method)),
            None => (inside, None),
        });
        if !path.is_file() {
            return match named {
                // What is on the host alone cannot be looked into: the host tells if it is not there.
                Some((class, Some(method))) if reference.is_on_host() => {
                    Resolution::Found(vec![method_of(&path, class, method)])
                }
                _ if reference.is_on_host() => Resolution::Refused {
                    reason: format!(
                        "`{}` is not on this machine, so that its classes cannot be listed: name class and method, as in `file.py:Class.method`",
                        path.display()
                    ),
                },
                _ => missing_file(&path, |name| name.ends_with(".py")),
            };
        }
        let classes = match list(&path) {
            Ok(classes) => classes,
            Err(reason) => return Resolution::Refused { reason },
        };
        match named {
            None => in_file(&path, reference, &classes),
            Some((name, method)) => in_class(&path, name, method, &classes),
        }
    }
}

/// Everything in a file, or the file itself as a program.
fn in_file(path: &Path, reference: &BlockReference, classes: &[Class]) -> Resolution {
    let arguments: Vec<String> = reference.words().unwrap_or_default().into_iter().skip(1).collect();
    let all = || classes.iter().filter(|class| !class.methods.is_empty());
    let mut visible = all().filter(|class| !class.hidden).peekable();
    if visible.peek().is_none() {
        return match all().next() {
            None => Resolution::Found(vec![Block::new(Kind::PythonFile(PythonFile {
                path: path.to_owned(),
                run: PythonRun::Program { arguments },
            }))]),
            Some(hidden) => Resolution::not_found(
                format!("all classes in `{}` are hidden, and found only by their names", path.display()),
                Some(&format!("{}:{}", path.display(), hidden.name)),
            ),
        };
    }
    if !arguments.is_empty() {
        let reason = "a file with classes takes no arguments: give parameters with `param`".to_owned();
        return Resolution::Refused { reason };
    }
    Resolution::Found(visible.flat_map(|class| methods_of(path, class)).collect())
}

fn in_class(path: &Path, name: &str, method: Option<&str>, classes: &[Class]) -> Resolution {
    let Some(class) = classes.iter().find(|class| class.name == name) else {
        let near = nearest(name, classes.iter().map(|class| class.name.as_str()));
        let near = near.map(|near| format!("{}:{near}", path.display()));
        let tried = format!("`{}` has no class `{name}` with methods that begin with `test`", path.display());
        return Resolution::not_found(tried, near.as_deref());
    };
    match method {
        Some(method) if class.open || class.methods.iter().any(|known| known == method) => {
            Resolution::Found(vec![method_of(path, name, method)])
        }
        Some(method) => {
            let near = nearest(method, class.methods.iter().map(String::as_str));
            let near = near.map(|near| format!("{}:{name}.{near}", path.display()));
            let tried = format!("class `{name}` in `{}` has no method `{method}`", path.display());
            Resolution::not_found(tried, near.as_deref())
        }
        None if class.methods.is_empty() => Resolution::Refused {
            reason: format!(
                "class `{name}` has no methods of its own, and those that it inherits from another file are not known here: name one, as in `{}:{name}.test`",
                path.display()
            ),
        },
        None => Resolution::Found(methods_of(path, class).collect()),
    }
}

fn methods_of<'a>(path: &'a Path, class: &'a Class) -> impl Iterator<Item = Block> + 'a {
    class.methods.iter().map(move |method| method_of(path, &class.name, method))
}

fn method_of(path: &Path, class: &str, method: &str) -> Block {
    let run = PythonRun::Method { class: class.to_owned(), method: method.to_owned() };
    Block::new(Kind::PythonFile(PythonFile { path: path.to_owned(), run }))
}

/// The classes in a file, or why they cannot be listed.
fn list(path: &Path) -> Result<Vec<Class>, String> {
    let shown = path.display();
    let listing =
        Command::new("python3").args(["-I", "-c", DISCOVER]).arg(path).stdin(Stdio::null()).output();
    let output = listing.map_err(|error| {
        format!("the classes in `{shown}` are listed by `python3` of this machine, which cannot be started: {error}; install it")
    })?;
    let listed: Listed = match serde_json::from_slice(&output.stdout) {
        Ok(listed) if output.status.success() => listed,
        _ => {
            let told = String::from_utf8_lossy(&output.stderr).into_owned();
            let last = printable(told.lines().last().unwrap_or("it said nothing").as_bytes(), 256);
            return Err(format!("`python3` of this machine cannot list the classes in `{shown}`: {last}"));
        }
    };
    match listed {
        Listed::Classes(classes) => Ok(classes),
        Listed::Error { line, message } => Err(format!("`{shown}`, line {line}: {message}")),
    }
}
