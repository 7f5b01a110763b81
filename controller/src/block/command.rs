//! The kinds of block that are commands or texts, and commands for set-up and tear-down.
//!
//! Nothing is read or looked up here: paths and programs are checked when the block is compiled for a stream.

use std::{fmt, path::PathBuf};

use millstream_common::id::BlockName;

use super::{Block, Kind};

/// A command: text for `sh -c`, or a program with its arguments.
///
/// `"rm -rf cache"` becomes the first, `["rm", "-rf", "cache"]` the second.
#[derive(Clone, PartialEq, Eq)]
pub enum Command {
    /// Text that `/bin/sh` reads.
    Shell(String),
    /// A program and its arguments: no shell is involved.
    Program(Vec<String>),
}

impl Command {
    /// Program and arguments as they are executed.
    pub(crate) fn argv(&self) -> Vec<String> {
        match self {
            Self::Shell(text) => vec!["/bin/sh".to_owned(), "-c".to_owned(), text.clone()],
            Self::Program(argv) => argv.clone(),
        }
    }

    /// Every word that is executed.
    pub(crate) fn words(&self) -> Box<dyn Iterator<Item = &str> + '_> {
        match self {
            Self::Shell(text) => Box::new(text.split(|c: char| c.is_whitespace() || ";&|()'\"`".contains(c))),
            Self::Program(argv) => Box::new(argv.iter().map(String::as_str)),
        }
    }

    pub(super) fn derived_name(&self) -> BlockName {
        match self {
            Self::Shell(text) => BlockName::derived(first_line(text)),
            Self::Program(argv) => {
                let program = argv.first().map_or("", |p| p.rsplit('/').next().unwrap_or(p));
                let words: Vec<&str> =
                    std::iter::once(program).chain(argv.iter().skip(1).map(String::as_str)).collect();
                BlockName::derived(&words.join(" "))
            }
        }
    }
}

impl fmt::Debug for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Shell(text) => write!(f, "shell({text:?})"),
            Self::Program(argv) => write!(f, "exec({argv:?})"),
        }
    }
}

impl From<&str> for Command {
    fn from(text: &str) -> Self {
        Self::Shell(text.to_owned())
    }
}

impl From<String> for Command {
    fn from(text: String) -> Self {
        Self::Shell(text)
    }
}

impl<S: Into<String>, const N: usize> From<[S; N]> for Command {
    fn from(argv: [S; N]) -> Self {
        Self::Program(argv.into_iter().map(Into::into).collect())
    }
}

impl<S: Into<String>> From<Vec<S>> for Command {
    fn from(argv: Vec<S>) -> Self {
        Self::Program(argv.into_iter().map(Into::into).collect())
    }
}

/// The first line that says something: not blank, and no comment of a shell or of Python.
pub(super) fn first_line(text: &str) -> &str {
    text.lines().map(str::trim).find(|line| !line.is_empty() && !line.starts_with('#')).unwrap_or("")
}

/// Text that `/bin/sh -c` runs on the stream's host.
pub fn shell(text: impl Into<String>) -> Block {
    Block::new(Kind::Command(Command::Shell(text.into())))
}

/// A program with its arguments: no shell reads them. A program without a slash is looked up in the host's `PATH`; a
/// relative one is taken from the working directory, where shipped files are.
pub fn exec<S: Into<String>>(argv: impl IntoIterator<Item = S>) -> Block {
    Block::new(Kind::Command(Command::Program(argv.into_iter().map(Into::into).collect())))
}

/// Python code, run by the host's own Python 3. `import millstream` gives it barriers, topics and parameters, and modules
/// that are shipped with [`Block::file`] or [`Block::dir`] can be imported.
pub fn python(text: impl Into<String>) -> Block {
    Block::new(Kind::Python(text.into()))
}

/// A script or program on this host, shipped and executed: its first line must be `#!` and an interpreter, unless it is
/// a binary. A relative path is taken from the current directory when the block is run.
pub fn script(path: impl Into<PathBuf>) -> Block {
    Block::new(Kind::Script { path: path.into(), arguments: Vec::new() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_come_from_the_first_words() {
        let name = |block: Block| block.block_name().to_string();
        assert_eq!(name(shell("# serve\n iperf3 -s | tee log\n exit 1")), "iperf3-s-tee-log");
        assert_eq!(name(exec(["/usr/bin/iperf3", "-s"])), "iperf3-s");
        assert_eq!(name(python("import netperf; netperf.client()")), "import-netperf-netperf.client");
        assert_eq!(name(script("tools/stress test.sh")), "stress-test");
        assert_eq!(name(exec(Vec::<String>::new())), "block");
        assert_eq!(name(shell("true").name("a.b")), "a.b");
    }
}
