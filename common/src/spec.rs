//! What is run: the one primitive that agents know, in the words of the domain. Pure.
//!
//! Put these files in place, run these phases, keep what they print and what they leave. Controllers compile every kind of
//! block to this; agents get it from [`crate::convert`] already checked, so that no handler and no supervisor meets a
//! value out of its bounds.

use std::{collections::BTreeMap, fmt, time::Duration};

use bytes::Bytes;

pub use crate::outcome::{Expectation, Phase};
use crate::{
    id::{BlockName, StreamName},
    limits,
};

/// Everything an agent needs to run one block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TaskSpec {
    /// The stream that the task belongs to.
    pub stream: StreamName,
    /// Name of the block, for people.
    pub name: BlockName,
    /// Number of the task in its stream, from 1.
    pub stream_number: u32,
    /// Number of the task in the whole test, from 1.
    pub test_number: u32,
    /// Files to put in place before the first phase.
    pub files: Vec<ShippedFile>,
    /// Phases in their order; `Run` is always there and each kind at most once.
    pub phases: Vec<PhaseSpec>,
    /// Environment added to the host's base environment.
    pub environment: BTreeMap<String, String>,
    /// Working directory: empty, relative to the task's own, or absolute.
    pub working_directory: String,
    /// User to run as; none for the agent's own.
    pub user: Option<String>,
    /// Limits of the whole process tree.
    pub limits: ResourceLimits,
    /// Between SIGTERM and SIGKILL.
    pub grace: Duration,
    /// Output kept from the beginning.
    pub log_head_bytes: u64,
    /// Output kept from the end.
    pub log_tail_bytes: u64,
    /// Which end is expected.
    pub expectation: Expectation,
    /// What becomes of the tasks behind this one when it ends unexpectedly.
    pub failure_policy: FailurePolicy,
    /// Whether the first process is held before its program begins, until told to go.
    pub hold: bool,
}

/// One phase: one command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PhaseSpec {
    /// Which phase this is.
    pub phase: Phase,
    /// Program and arguments; at least one, without NUL.
    pub argv: Vec<String>,
    /// Limit of this phase; none but the test's own when absent.
    pub timeout: Option<Duration>,
    /// Descriptors on which the program finds its output pipes.
    pub output: OutputDescriptors,
    /// Whether the command has set-up and tear-down of its own and tells its phases on a descriptor.
    pub reports_phases: bool,
}

/// Where a program finds its output pipes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OutputDescriptors {
    /// On 1 and 2.
    #[default]
    Standard,
    /// On these two; 1 and 2 are `/dev/null`. For programs whose launcher prints before the block begins.
    Moved {
        /// Descriptor of standard output: 3 to 9.
        stdout: i32,
        /// Descriptor of standard error: 3 to 9, another one.
        stderr: i32,
    },
}

/// One file to put in place before the first phase.
#[derive(Clone, PartialEq, Eq)]
pub struct ShippedFile {
    /// Where to.
    pub path: SafePath,
    /// The directory that `path` is relative to.
    pub place: FilePlace,
    /// Permission bits, within 0777.
    pub mode: u32,
    /// An environment variable that holds the absolute path of the file.
    pub environment_name: Option<String>,
    /// Whether that variable holds the directory of the file instead. When the task's environment has the variable too,
    /// that value follows after a colon.
    pub environment_holds_directory: bool,
    /// Where the content comes from.
    pub source: FileSource,
}

impl fmt::Debug for ShippedFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Inline content may be secret: only its length is shown.
        write!(f, "{}:{} {:o} from {:?}", self.place, self.path, self.mode, self.source)
    }
}

/// Where a shipped file goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FilePlace {
    /// The task's working directory.
    Work,
    /// A directory of mode 0700 beside it.
    Private,
}

impl fmt::Display for FilePlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Work => "work",
            Self::Private => "private",
        })
    }
}

/// Where the content of a shipped file comes from.
#[derive(Clone, PartialEq, Eq)]
pub enum FileSource {
    /// A blob that was uploaded before.
    Blob(BlobDigest),
    /// The content itself.
    Inline(Bytes),
    /// Something that exists on the host: a symbolic link is made to it. Absolute.
    HostPath(String),
    /// A symbolic link to this path of the same place; relative to the place, not to the link.
    Link(SafePath),
}

impl fmt::Debug for FileSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Blob(digest) => write!(f, "blob {digest}"),
            Self::Inline(bytes) => write!(f, "{} inline bytes", bytes.len()),
            Self::HostPath(path) => write!(f, "host path {path}"),
            Self::Link(target) => write!(f, "link to {target}"),
        }
    }
}

/// Limits of a process tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ResourceLimits {
    /// Memory in bytes.
    pub memory_bytes: Option<u64>,
    /// Number of processes and threads.
    pub pids_count: Option<u64>,
    /// Processor time per second of real time, in thousandths of a processor.
    pub cpu_millis: Option<u64>,
}

impl ResourceLimits {
    /// Whether nothing is limited.
    #[must_use]
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }
}

/// What becomes of a stream when one of its tasks ends unexpectedly.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FailurePolicy {
    /// The next task starts.
    #[default]
    Continue,
    /// The tasks that wait behind it are cancelled.
    Drain,
}

/// BLAKE3 digest of a blob.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlobDigest([u8; 32]);

impl BlobDigest {
    /// Takes the 32 bytes of a digest.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// Digest of bytes in memory.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }

    /// Parses 64 lower-case hexadecimal digits.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        if text.len() != 64 || text.bytes().any(|b| !b.is_ascii_digit() && !(b'a'..=b'f').contains(&b)) {
            return None;
        }
        Some(Self(*blake3::Hash::from_hex(text).ok()?.as_bytes()))
    }
}

impl fmt::Display for BlobDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&blake3::Hash::from_bytes(self.0).to_hex())
    }
}

impl fmt::Debug for BlobDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A relative path that cannot leave the directory it is joined to: no `.`, `..`, empty or overlong component, no NUL,
/// not absolute, bounded in depth and length.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SafePath(String);

/// Why a path is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("path `{}` is refused: {reason}", path.escape_debug())]
pub struct PathError {
    path: String,
    reason: &'static str,
}

impl SafePath {
    /// Checks a path.
    ///
    /// # Errors
    /// When joining it to a directory could name anything that is not inside that directory, or when it is out of bounds.
    pub fn new(path: impl Into<String>) -> Result<Self, PathError> {
        let path = path.into();
        match Self::refusal(&path) {
            None => Ok(Self(path)),
            Some(reason) => Err(PathError { path: path.chars().take(256).collect(), reason }),
        }
    }

    fn refusal(path: &str) -> Option<&'static str> {
        if path.is_empty() {
            return Some("it is empty");
        }
        if path.len() > limits::PATH_BYTES_MAX {
            return Some("it is longer than 4,096 bytes");
        }
        if path.contains('\0') {
            return Some("it holds a NUL");
        }
        if path.starts_with('/') {
            return Some("it is absolute");
        }
        let mut depth = 0;
        for component in path.split('/') {
            depth += 1;
            match component {
                "" => return Some("it has an empty component"),
                "." | ".." => return Some("it has a component `.` or `..`"),
                c if c.len() > limits::PATH_COMPONENT_BYTES_MAX => {
                    return Some("a component is longer than 255 bytes");
                }
                _ => {}
            }
        }
        (depth > limits::PATH_DEPTH_MAX).then_some("it is deeper than 64 directories")
    }

    /// The path as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for SafePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for SafePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

impl AsRef<std::path::Path> for SafePath {
    fn as_ref(&self) -> &std::path::Path {
        self.0.as_ref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_that_could_leave_are_refused() {
        for path in [
            "",
            "/etc/passwd",
            "..",
            "a/../b",
            "a//b",
            "./a",
            "a/",
            "a\0b",
            &"x".repeat(300),
            &"a/".repeat(70),
        ] {
            assert!(SafePath::new(path).is_err(), "{path:?}");
        }
        assert!(SafePath::new("a/b c/…").is_ok());
    }

    #[test]
    fn a_digest_has_one_spelling() {
        let digest = BlobDigest::of(b"x");
        assert_eq!(BlobDigest::parse(&digest.to_string()), Some(digest));
        assert_eq!(BlobDigest::parse(&digest.to_string().to_uppercase()), None);
    }
}
