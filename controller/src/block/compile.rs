//! From a block to what an agent runs: files, phases, environment.
//!
//! Reads the files that are shipped, so it is called where blocking is allowed. Sends nothing, and decides nothing about
//! when the block runs.

use std::{collections::BTreeMap, io, path::PathBuf, time::Duration};

use bytes::Bytes;
use millstream_common::{
    id::{NameError, StreamName},
    limits,
    spec::{BlobDigest, OutputDescriptors, PathError, Phase, PhaseSpec, ResourceLimits, TaskSpec},
};

use super::{Block, Kind, payload, reference::ResolveError};
use crate::{definition::Defaults, topology::Topology};

mod files;

use files::Collected;
pub(super) use files::{Files, host_path};

/// What a block is compiled for: a stream on a host.
#[derive(Debug, Clone)]
pub(crate) struct Surroundings {
    /// The stream.
    pub(crate) stream: StreamName,
    /// What the host is called in errors.
    pub(crate) host: String,
    /// The host's machine, such as `x86_64`; empty when it is not known.
    pub(crate) architecture: String,
    /// The host's Python 3 interpreter.
    pub(crate) python: Option<String>,
    /// Whether the stream runs on this host as a child of this program.
    pub(crate) is_local: bool,
    /// What the stream's definition says about everything that runs in it.
    pub(crate) defaults: Defaults,
    /// Every defined stream with its host and addresses.
    pub(crate) topology: Topology,
}

/// A block ready to be sent.
#[derive(Debug, Clone)]
pub(crate) struct Compiled {
    /// What to run. The numbers are zero and nothing is held: the driver sets both.
    pub(crate) spec: TaskSpec,
    /// Files that are kept out of the specification and its digest.
    pub(crate) secret_files: Vec<millstream_common::spec::ShippedFile>,
    /// Blobs that the host must have first; each digest once.
    pub(crate) uploads: Vec<Upload>,
}

/// A blob.
#[derive(Debug, Clone)]
pub(crate) struct Upload {
    /// Its digest.
    pub(crate) digest: BlobDigest,
    /// Its length.
    pub(crate) size_bytes: u64,
    /// Where its bytes are.
    pub(crate) source: UploadSource,
}

/// Where the bytes of a blob are.
#[derive(Debug, Clone)]
pub(crate) enum UploadSource {
    /// In a file of this host. When it has changed since it was read, the host refuses it by its digest.
    Path(PathBuf),
    /// In memory.
    Bytes(Bytes),
}

/// Why a block cannot be run in a stream.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BlockError {
    /// The given name is refused.
    #[error("the block cannot have the name it was given")]
    Name(#[source] NameError),
    /// A barrier in `joins` has a name that is refused.
    #[error("the block cannot join a barrier")]
    Barrier(#[source] NameError),
    /// There is no program.
    #[error("the {phase} command of the block is empty: name a program")]
    NoProgram {
        /// The phase.
        phase: Phase,
    },
    /// An argument holds a NUL.
    #[error("the {phase} command of the block has a NUL character in `{}`: the system cannot pass it on", argument.escape_debug())]
    Nul {
        /// The phase.
        phase: Phase,
        /// The argument.
        argument: String,
    },
    /// A command is too long.
    #[error("the {phase} command of the block has {length} bytes: at most {limit} are allowed; ship the text as a file", limit = limits::ARGV_BYTES_MAX)]
    CommandTooLong {
        /// The phase.
        phase: Phase,
        /// Its length.
        length: usize,
    },
    /// A variable's name is refused.
    #[error("the environment variable `{}` is refused: a name is not empty, has at most 255 bytes and neither `=` nor NUL", name.escape_debug())]
    VariableName {
        /// The name.
        name: String,
    },
    /// A variable's value is refused.
    #[error("the value of the environment variable `{name}` is refused: it has {length} bytes (at most {limit}) or holds a NUL", limit = limits::ENVIRONMENT_VALUE_BYTES_MAX)]
    VariableValue {
        /// The name.
        name: String,
        /// Bytes of the value.
        length: usize,
    },
    /// Too many variables.
    #[error("the block has {count} environment variables: at most {limit} are allowed", limit = limits::ENVIRONMENT_COUNT_MAX)]
    TooManyVariables {
        /// How many.
        count: usize,
    },
    /// A parameter has no value, or none that can be written as JSON.
    #[error("parameter `{name}` cannot be given to the block: {reason}")]
    Parameter {
        /// The parameter.
        name: String,
        /// Why.
        reason: String,
    },
    /// Two parameters have one variable.
    #[error("parameters `{first}` and `{second}` would both be the variable `{variable}`: rename one")]
    ParameterClash {
        /// The first.
        first: String,
        /// The second.
        second: String,
        /// The variable.
        variable: String,
    },
    /// Parameters with secrets are too large.
    #[error("the parameters have {length} bytes: with a secret among them, at most {limit} are allowed", limit = limits::INLINE_FILE_BYTES_MAX)]
    SecretsTooLarge {
        /// Bytes.
        length: usize,
    },
    /// A duration is out of bounds.
    #[error("the {what} of the block is {}: at most {} is allowed", millstream_common::text::spoken(*asked), millstream_common::text::spoken(*limit))]
    TooLong {
        /// Which duration.
        what: &'static str,
        /// As asked for.
        asked: Duration,
        /// The limit.
        limit: Duration,
    },
    /// The working directory is refused.
    #[error("the working directory `{}` is refused: it holds a NUL or is longer than 4,096 bytes", directory.escape_debug())]
    WorkingDirectory {
        /// The directory.
        directory: String,
    },
    /// The host has no Python.
    #[error("host {host} has no Python 3, which this block needs: install the package `python3` there")]
    NoPython {
        /// The host.
        host: String,
    },
    /// A file does not exist.
    #[error("{what} `{}` does not exist (the current directory is `{}`)", path.display(), directory.display())]
    NotFound {
        /// What it should be: a script, a file, a directory.
        what: &'static str,
        /// Its path as given.
        path: PathBuf,
        /// The current directory.
        directory: PathBuf,
    },
    /// A file is something else than it should be.
    #[error("`{}` is no {what}: {hint}", path.display())]
    WrongKind {
        /// What it should be.
        what: &'static str,
        /// Its path.
        path: PathBuf,
        /// What to do.
        hint: &'static str,
    },
    /// A file cannot be read.
    #[error("failed to read `{}`", path.display())]
    Read {
        /// Its path.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A script does not say what runs it.
    #[error("script `{}` does not say what runs it: begin it with a line such as `#!/bin/sh`", path.display())]
    NoInterpreter {
        /// Its path.
        path: PathBuf,
    },
    /// A file's name cannot be shipped.
    #[error("`{}` cannot be shipped under its name{}", path.display(), if source.is_none() { ": it is not UTF-8, rename it" } else { "" })]
    FileName {
        /// Its path.
        path: PathBuf,
        /// Why; none when it is not UTF-8.
        #[source]
        source: Option<PathError>,
    },
    /// Something that is neither file, directory nor symbolic link.
    #[error("`{}` is a socket, pipe or device: only files, directories and symbolic links are shipped", path.display())]
    SpecialFile {
        /// Its path.
        path: PathBuf,
    },
    /// A symbolic link leaves the shipped directory.
    #[error("the symbolic link `{}` points to `{}`, outside of the shipped directory: ship its target instead", path.display(), target.display())]
    LinkOutside {
        /// The link.
        path: PathBuf,
        /// Its target.
        target: PathBuf,
    },
    /// Too many files.
    #[error("the block ships too many files: at most {limit}, with at most {names} bytes of names together, are allowed; pack them into one", limit = limits::FILES_COUNT_MAX, names = files::NAMES_BYTES_MAX)]
    TooManyFiles,
    /// A file is too large.
    #[error("`{}` has {length} bytes: at most {limit} are shipped; put it on the host and use `no_copy`", path.display(), limit = limits::BLOB_BYTES_MAX)]
    FileTooLarge {
        /// Its path.
        path: PathBuf,
        /// Its length.
        length: u64,
    },
    /// Two files have one place.
    #[error("the block ships two files as `{place}`: rename one")]
    FileClash {
        /// Where both would be.
        place: String,
    },
    /// A path of the host must be absolute.
    #[error("`{}` is used where it is on the host, by `no_copy`: name it by its absolute path", path.display())]
    RelativeHostPath {
        /// Its path.
        path: PathBuf,
    },
    /// A reference names no block, or several.
    #[error(transparent)]
    Reference(#[from] ResolveError),
    /// A Rust function cannot be run elsewhere.
    #[error("the function cannot be run as a block")]
    Function(#[from] payload::PayloadError),
}

impl Block {
    /// Compiles the block for a stream. Reads files: blocks the thread.
    pub(crate) fn compile(&self, surroundings: &Surroundings) -> Result<Compiled, BlockError> {
        if let Kind::Reference(_) = &self.kind {
            return self.the_one()?.compile(surroundings);
        }
        let name = match &self.name {
            Some(given) => given.clone().map_err(BlockError::Name)?,
            None => self.kind.derived_name(),
        };
        if let Some(Err(error)) = self.joins.iter().flatten().find(|joined| joined.is_err()) {
            return Err(BlockError::Barrier(error.clone()));
        }
        let defaults = &surroundings.defaults;
        let directory = self.working_directory.clone().or_else(|| defaults.cwd.clone()).unwrap_or_default();
        check_directory(&directory)?;

        let mut files = Files::default();
        let mut environment = defaults.env.clone();
        environment.extend(self.environment.iter().map(|(name, value)| (name.clone(), value.clone())));
        for request in &self.files {
            files.request(request, self.no_copy)?;
        }
        let run = self.run_command(surroundings, &directory, &mut files, &mut environment)?;
        let phases = self.phases(run, defaults)?;
        if self.speaks_python(&phases, &files) {
            files.python_module()?;
        }
        self.parameters(&mut files, &mut environment)?;
        files.topology("topology.json", "MILLSTREAM_TOPOLOGY", &surroundings.topology)?;
        check_environment(&environment)?;

        let (head, tail) = self.log_quota.unwrap_or((limits::LOG_HEAD_BYTES, limits::LOG_TAIL_BYTES));
        let Collected { files, secret_files, uploads } = files.finish()?;
        let spec = TaskSpec {
            stream: surroundings.stream.clone(),
            name,
            stream_number: 0,
            test_number: 0,
            files,
            phases,
            environment,
            working_directory: directory,
            user: self.user.clone().or_else(|| defaults.user.clone()),
            limits: merged(self.limits, defaults.limits),
            grace: bounded("grace period", self.grace.unwrap_or(limits::GRACE), limits::GRACE_MAX)?,
            log_head_bytes: head,
            log_tail_bytes: tail,
            expectation: self.expectation,
            failure_policy: defaults.on_failure,
            hold: false,
        };
        Ok(Compiled { spec, secret_files, uploads })
    }

    /// Whether compiling reads files, and so may hold its thread.
    pub(crate) fn reads_files(&self) -> bool {
        !self.files.is_empty() || !matches!(self.kind, Kind::Command(_) | Kind::Python(_))
    }

    /// The command of phase `run`, before it is wrapped, and where it finds its outputs.
    fn run_command(
        &self,
        surroundings: &Surroundings,
        directory: &str,
        files: &mut Files,
        environment: &mut BTreeMap<String, String>,
    ) -> Result<Run, BlockError> {
        match &self.kind {
            Kind::Command(command) => Ok(Run::plain(command.argv())),
            Kind::Python(text) => {
                let no_python = || BlockError::NoPython { host: surroundings.host.clone() };
                let python = surroundings.python.as_deref().ok_or_else(no_python)?;
                files.content(PYTHON_FILE, PROGRAM_VARIABLE, Bytes::copy_from_slice(text.as_bytes()))?;
                python_environment(environment);
                Ok(Run::plain(shipped_argv(Some(python), PYTHON_FILE, directory)))
            }
            Kind::Script { path, arguments } => {
                let mut argv = if self.no_copy {
                    vec![host_path(path)?]
                } else {
                    shipped_argv(None, &files.script(path, PROGRAM_VARIABLE)?, directory)
                };
                argv.extend(arguments.iter().cloned());
                Ok(Run::plain(argv))
            }
            Kind::PythonFile(file) => {
                let how = (directory, self.no_copy, self.has_more_phases());
                file.command(surroundings, how, files, environment)
            }
            Kind::Function(call) => {
                let how = (directory, &self.parameters, self.has_more_phases());
                payload::run(call, surroundings, how, files, environment)
            }
            Kind::Reference(_) => unreachable!("`compile` replaces references by what they name"),
        }
    }

    fn has_more_phases(&self) -> bool {
        self.setup.is_some() || self.teardown.is_some()
    }

    fn phases(&self, run: Run, defaults: &Defaults) -> Result<Vec<PhaseSpec>, BlockError> {
        let timeout = match self.timeout.or(defaults.timeout) {
            Some(timeout) => Some(bounded("timeout", timeout, limits::WAIT_MAX)?),
            None => None,
        };
        let wrap = if self.wrap.is_empty() { &defaults.wrap } else { &self.wrap };
        let run = run.wrapped(wrap);
        let mut phases = Vec::with_capacity(3);
        let mut push = |phase, run: Run, timeout| {
            let Run { argv, output, reports_phases } = run;
            check_argv(phase, &argv)?;
            phases.push(PhaseSpec { phase, argv, timeout, output, reports_phases });
            Ok::<_, BlockError>(())
        };
        if let Some(setup) = &self.setup {
            push(Phase::Setup, Run::plain(setup.argv()), timeout)?;
        }
        push(Phase::Run, run, timeout)?;
        if let Some(teardown) = &self.teardown {
            push(Phase::Teardown, Run::plain(teardown.argv()), Some(limits::TEARDOWN_MAX))?;
        }
        Ok(phases)
    }

    /// Whether the Python module is of use: shipping it to every `true` would cost each of them a file.
    fn speaks_python(&self, phases: &[PhaseSpec], files: &Files) -> bool {
        let is_python = |word: &str| {
            let word = word.rsplit('/').next().unwrap_or(word);
            word.starts_with("python") || word.ends_with(".py")
        };
        let in_command = match &self.kind {
            Kind::Python(_) | Kind::PythonFile(_) => true,
            Kind::Command(command) => command.words().any(is_python),
            Kind::Script { .. } | Kind::Function(_) | Kind::Reference(_) => false,
        };
        let beside = self.setup.iter().chain(&self.teardown).any(|command| command.words().any(is_python));
        in_command
            || beside
            || files.has_python()
            || phases.iter().any(|p| p.argv.iter().any(|w| is_python(w)))
    }

    fn parameters(
        &self,
        files: &mut Files,
        environment: &mut BTreeMap<String, String>,
    ) -> Result<(), BlockError> {
        let mut object = serde_json::Map::new();
        let mut variables: BTreeMap<String, &str> = BTreeMap::new();
        for (name, parameter) in &self.parameters {
            let refused =
                |reason: &String| BlockError::Parameter { name: name.clone(), reason: reason.clone() };
            let value = parameter.value.as_ref().map_err(refused)?;
            object.insert(name.clone(), value.clone());
            if parameter.secret {
                continue;
            }
            let variable = parameter_variable(name);
            if let Some(first) = variables.insert(variable.clone(), name) {
                return Err(BlockError::ParameterClash {
                    first: first.to_owned(),
                    second: name.clone(),
                    variable,
                });
            }
            let text = match value {
                serde_json::Value::String(text) => text.clone(),
                other => other.to_string(),
            };
            // A value that no variable can hold is in the file all the same.
            if text.len() <= limits::ENVIRONMENT_VALUE_BYTES_MAX && !text.contains('\0') {
                environment.insert(variable, text);
            }
        }
        let text = Bytes::from(serde_json::Value::Object(object).to_string());
        if self.parameters.values().any(|parameter| parameter.secret) {
            return files.secret("params.json", "MILLSTREAM_PARAMS", text);
        }
        files.generated("params.json", "MILLSTREAM_PARAMS", text)
    }
}

/// Where Python code is put: no module that somebody imports has this name.
const PYTHON_FILE: &str = "__block__.py";
/// Holds the path of the shipped program.
pub(super) const PROGRAM_VARIABLE: &str = "MILLSTREAM_PROGRAM";

/// The command of phase `run`.
pub(super) struct Run {
    pub(super) argv: Vec<String>,
    pub(super) output: OutputDescriptors,
    pub(super) reports_phases: bool,
}

impl Run {
    pub(super) fn plain(argv: Vec<String>) -> Self {
        Self { argv, output: OutputDescriptors::Standard, reports_phases: false }
    }

    fn wrapped(self, wrap: &[String]) -> Self {
        if wrap.is_empty() || self.argv.is_empty() {
            return self;
        }
        let mut argv = wrap.to_vec();
        if let OutputDescriptors::Moved { stdout, stderr } = self.output {
            // The wrapping program prints on the usual descriptors, so the outputs are moved behind it.
            let text = format!("exec \"$@\" {stdout}>&1 {stderr}>&2 >/dev/null 2>/dev/null");
            argv.extend(["/bin/sh".to_owned(), "-c".to_owned(), text, "sh".to_owned()]);
        }
        argv.extend(self.argv);
        Self { argv, output: OutputDescriptors::Standard, reports_phases: self.reports_phases }
    }
}

/// Lines are seen when they are printed, and no compiled modules are left among the results.
pub(super) fn python_environment(environment: &mut BTreeMap<String, String>) {
    for variable in ["PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE"] {
        environment.entry(variable.to_owned()).or_insert_with(|| "1".to_owned());
    }
}

/// The command that runs a shipped file. It is found beside the shipped files, unless the block runs in another
/// directory: only the host knows its absolute path then, and tells it by a variable.
pub(super) fn shipped_argv(interpreter: Option<&str>, place: &str, directory: &str) -> Vec<String> {
    let mut argv: Vec<String> = Vec::new();
    if directory.is_empty() {
        argv.extend(interpreter.map(str::to_owned));
        argv.push(if interpreter.is_some() { place.to_owned() } else { format!("./{place}") });
        return argv;
    }
    let text = match interpreter {
        Some(_) => format!("program=\"$1\"; shift; exec \"$program\" \"${PROGRAM_VARIABLE}\" \"$@\""),
        None => format!("exec \"${PROGRAM_VARIABLE}\" \"$@\""),
    };
    argv.extend(["/bin/sh".to_owned(), "-c".to_owned(), text, "sh".to_owned()]);
    argv.extend(interpreter.map(str::to_owned));
    argv
}

/// `MILLSTREAM_PARAM_<NAME>`.
fn parameter_variable(name: &str) -> String {
    let upper = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_uppercase() } else { '_' };
    format!("MILLSTREAM_PARAM_{}", name.chars().map(upper).collect::<String>())
}

pub(super) fn merged(own: ResourceLimits, defaults: ResourceLimits) -> ResourceLimits {
    ResourceLimits {
        memory_bytes: own.memory_bytes.or(defaults.memory_bytes),
        pids_count: own.pids_count.or(defaults.pids_count),
        cpu_millis: own.cpu_millis.or(defaults.cpu_millis),
    }
}

fn bounded(what: &'static str, asked: Duration, limit: Duration) -> Result<Duration, BlockError> {
    if asked > limit { Err(BlockError::TooLong { what, asked, limit }) } else { Ok(asked) }
}

fn check_argv(phase: Phase, argv: &[String]) -> Result<(), BlockError> {
    if argv.first().is_none_or(String::is_empty) {
        return Err(BlockError::NoProgram { phase });
    }
    if let Some(argument) = argv.iter().find(|argument| argument.contains('\0')) {
        return Err(BlockError::Nul { phase, argument: argument.chars().take(64).collect() });
    }
    let length = argv.iter().map(|argument| argument.len() + 1).sum();
    if length > limits::ARGV_BYTES_MAX {
        return Err(BlockError::CommandTooLong { phase, length });
    }
    Ok(())
}

fn check_directory(directory: &str) -> Result<(), BlockError> {
    if directory.contains('\0') || directory.len() > limits::PATH_BYTES_MAX {
        return Err(BlockError::WorkingDirectory { directory: directory.chars().take(256).collect() });
    }
    Ok(())
}

fn check_environment(environment: &BTreeMap<String, String>) -> Result<(), BlockError> {
    if environment.len() > limits::ENVIRONMENT_COUNT_MAX {
        return Err(BlockError::TooManyVariables { count: environment.len() });
    }
    for (name, value) in environment {
        if name.is_empty() || name.len() > 255 || name.contains(['=', '\0']) {
            return Err(BlockError::VariableName { name: name.chars().take(256).collect() });
        }
        if value.len() > limits::ENVIRONMENT_VALUE_BYTES_MAX || value.contains('\0') {
            return Err(BlockError::VariableValue { name: name.clone(), length: value.len() });
        }
    }
    Ok(())
}

#[cfg(test)]
#[rustfmt::skip] // expectations are rewritten by their tool, which wants them on one line
mod tests;
