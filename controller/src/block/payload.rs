//! This program as the payload of its own blocks: how a registered function is called on a host.
//!
//! On this host the program is used where it is; other hosts get it once, as a blob. That an entry exists is checked
//! before anything is sent: without one the program would do something else and might well end with success.

use std::{
    collections::{BTreeMap, HashMap},
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::{Mutex, OnceLock, PoisonError},
};

use bytes::Bytes;
use millstream_agent::entry::{MOVED_STDERR, MOVED_STDOUT, Role};
use millstream_common::spec::{BlobDigest, OutputDescriptors};

use super::{
    BlockError, Parameter,
    compile::{Files, Run, Surroundings, shipped_argv},
    function::{Call, Function},
};
use crate::entry::{self, EntryError};

/// Holds the path of the arguments of a function.
pub(crate) const ARGUMENTS_VARIABLE: &str = "MILLSTREAM_ARGUMENTS";

/// Why a Rust function cannot be called on a host.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PayloadError {
    /// This program cannot be started as a block.
    #[error("this program cannot be started again")]
    Entry(#[from] EntryError),
    /// An argument cannot be sent.
    #[error("argument `{argument}` of `{function}` cannot be written as JSON: {reason}")]
    Argument {
        /// The function.
        function: &'static str,
        /// The argument.
        argument: &'static str,
        /// Why.
        reason: String,
    },
    /// A function was named by a reference, and an argument is not among the parameters.
    #[error("`{function}` takes `{argument}`: give it to the reference with `.param(\"{argument}\", …)`")]
    NoArgument {
        /// The function.
        function: &'static str,
        /// The argument.
        argument: &'static str,
    },
    /// An argument is a secret.
    #[error(
        "argument `{argument}` of `{function}` is a secret parameter, and arguments are no secrets: let the function read it with `ctx.param`"
    )]
    SecretArgument {
        /// The function.
        function: &'static str,
        /// The argument.
        argument: &'static str,
    },
    /// Two functions cannot be told apart.
    #[error("two functions are registered as `{key}`: give one another name")]
    Ambiguous {
        /// Their key.
        key: &'static str,
    },
    /// The host has another machine.
    #[error(
        "host {host} is {theirs}, this program is built for {ours}: build the test for {theirs}, or use a script or Python"
    )]
    Architecture {
        /// The host.
        host: String,
        /// Its machine.
        theirs: String,
        /// This program's.
        ours: &'static str,
    },
    /// The program's path is no text.
    #[error("the path of this program is not UTF-8: `{}`", program.display())]
    ProgramName {
        /// The program.
        program: PathBuf,
    },
}

/// The command that calls a function, with the files that it needs.
pub(super) fn run(
    call: &Call,
    surroundings: &Surroundings,
    (directory, parameters, has_more_phases): (&str, &BTreeMap<String, Parameter>, bool),
    files: &mut Files,
    environment: &mut BTreeMap<String, String>,
) -> Result<Run, BlockError> {
    let function = call.function();
    let relaunch = entry::relaunch().map_err(PayloadError::Entry)?;
    check_key(function)?;
    let arguments = call.arguments(parameters)?;
    files.generated("arguments.json", ARGUMENTS_VARIABLE, Bytes::from(arguments))?;

    let program = relaunch.program.to_str();
    let program = program.ok_or_else(|| PayloadError::ProgramName { program: relaunch.program.clone() })?;
    let mut argv = if surroundings.is_local {
        vec![program.to_owned()]
    } else {
        check_architecture(surroundings)?;
        let place = format!(".millstream/{}", program.rsplit('/').next().unwrap_or("payload"));
        files.program(&relaunch.program, place.clone(), "MILLSTREAM_PROGRAM")?;
        shipped_argv(None, &place, directory)
    };
    let text = |word: std::ffi::OsString| word.to_string_lossy().into_owned();
    argv.extend(relaunch.arguments.iter().cloned().map(text));
    let variables = relaunch.environment(Role::Block, &[function.key.into()]);
    let variables = variables.into_iter().map(|(name, value)| (text(name), text(value)));
    if has_more_phases {
        // Set-up and tear-down share the environment; only the function's process may take the role.
        let words = variables.map(|(name, value)| format!("{name}={value}"));
        argv = std::iter::once("env".to_owned()).chain(words).chain(argv).collect();
    } else {
        environment.extend(variables);
    }
    let moved = OutputDescriptors::Moved { stdout: MOVED_STDOUT, stderr: MOVED_STDERR };
    let output = if relaunch.moved_output { moved } else { OutputDescriptors::Standard };
    Ok(Run { argv, output, reports_phases: false })
}

fn check_key(function: &'static Function) -> Result<(), PayloadError> {
    let same = super::function::FUNCTIONS.iter().filter(|other| other.key == function.key).count();
    if same > 1 { Err(PayloadError::Ambiguous { key: function.key }) } else { Ok(()) }
}

fn check_architecture(surroundings: &Surroundings) -> Result<(), PayloadError> {
    let theirs = &surroundings.architecture;
    if theirs.is_empty() || theirs == std::env::consts::ARCH {
        return Ok(());
    }
    Err(PayloadError::Architecture {
        host: surroundings.host.clone(),
        theirs: theirs.clone(),
        ours: std::env::consts::ARCH,
    })
}

/// What a file must keep for its digest to stay true.
#[derive(Debug, PartialEq, Eq)]
struct Version {
    device: u64,
    inode: u64,
    size_bytes: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Version {
    fn of(metadata: &fs::Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size_bytes: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

/// Digests that are remembered: a test that ships one program a thousand times reads it once.
const DIGESTS_COUNT_MAX: usize = 1_024;

/// Digest of a file's content, remembered as long as the file does not change.
pub(super) fn digest_of_file(path: &Path, metadata: &fs::Metadata) -> io::Result<BlobDigest> {
    static DIGESTS: OnceLock<Mutex<HashMap<PathBuf, (Version, BlobDigest)>>> = OnceLock::new();
    let digests = || DIGESTS.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner);
    let version = Version::of(metadata);
    let path = std::path::absolute(path)?;
    if let Some((known, digest)) = digests().get(&path)
        && *known == version
    {
        return Ok(*digest);
    }
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(fs::File::open(&path)?)?;
    let digest = BlobDigest::from_bytes(*hasher.finalize().as_bytes());
    let mut digests = digests();
    if digests.len() >= DIGESTS_COUNT_MAX {
        digests.clear();
    }
    digests.insert(path, (version, digest));
    Ok(digest)
}

#[cfg(test)]
pub(crate) mod tests;
