//! Blocks: the pieces of code that streams run, and how they become tasks.
//!
//! A [`Block`] is a value: it names what to run and how, touches nothing and reports nothing. What is wrong with it is
//! found when it is compiled for a stream, so that `run_bg` never fails and a bad block ends as an outcome. Agents know
//! none of the kinds listed here: [`compile`] turns each into files, phases and an environment.

pub(crate) mod builder;
mod class;
pub(crate) mod command;
pub(crate) mod compile;
pub(crate) mod function;
pub(crate) mod payload;
pub(crate) mod reference;

use std::{collections::BTreeMap, fmt, path::PathBuf, time::Duration};

use millstream_common::{
    id::{BarrierName, BlockName},
    spec::{Expectation, ResourceLimits},
};

use self::{class::PythonFile, function::Call, reference::Unresolved};
pub use self::{
    command::{Command, exec, python, script, shell},
    compile::BlockError,
    reference::{BlockReference, Resolution, ResolveError, Resolver, Tried, reference},
};

/// A piece of code to run in a stream: shell text, a program, Python, a script file, a class or a Rust function.
///
/// Made by [`shell`], [`exec`], [`python`], [`script`], [`reference`](reference()) or a function with
/// `#[millstream::block]`; refined by the methods below, each of which takes the block and gives it back.
#[derive(Clone)]
#[must_use = "a block does nothing until a stream runs it"]
pub struct Block {
    kind: Kind,
    name: Option<Result<BlockName, millstream_common::id::NameError>>,
    parameters: BTreeMap<String, Parameter>,
    environment: BTreeMap<String, String>,
    timeout: Option<Duration>,
    files: Vec<FileRequest>,
    no_copy: bool,
    user: Option<String>,
    working_directory: Option<String>,
    wrap: Vec<String>,
    limits: ResourceLimits,
    setup: Option<Command>,
    teardown: Option<Command>,
    grace: Option<Duration>,
    expectation: Expectation,
    joins: Option<Vec<Result<BarrierName, millstream_common::id::NameError>>>,
    log_quota: Option<(u64, u64)>,
    may_run_streams: bool,
}

/// What a block runs.
#[derive(Clone)]
enum Kind {
    Command(Command),
    Python(String),
    Script { path: PathBuf, arguments: Vec<String> },
    PythonFile(PythonFile),
    Function(Call),
    Reference(Unresolved),
}

/// One parameter of a block.
#[derive(Clone)]
struct Parameter {
    /// The value, or why it cannot be had or written as JSON.
    value: Result<serde_json::Value, String>,
    secret: bool,
}

/// A file or directory to be shipped.
#[derive(Debug, Clone)]
struct FileRequest {
    path: PathBuf,
    directory: bool,
}

impl Block {
    fn new(kind: Kind) -> Self {
        Self {
            kind,
            name: None,
            parameters: BTreeMap::new(),
            environment: BTreeMap::new(),
            timeout: None,
            files: Vec::new(),
            no_copy: false,
            user: None,
            working_directory: None,
            wrap: Vec::new(),
            limits: ResourceLimits::default(),
            setup: None,
            teardown: None,
            grace: None,
            expectation: Expectation::Pass,
            joins: None,
            log_quota: None,
            may_run_streams: false,
        }
    }

    /// The name under which results are kept: the given one, or one derived from what the block runs.
    ///
    /// A name that is refused is reported when the block is run; until then it is shown as near as possible.
    #[must_use]
    pub fn block_name(&self) -> BlockName {
        match &self.name {
            Some(Ok(name)) => name.clone(),
            Some(Err(_)) | None => self.kind.derived_name(),
        }
    }

    /// Which end is expected.
    pub(crate) fn expectation(&self) -> Expectation {
        self.expectation
    }

    /// Whether the block may run streams itself.
    pub(crate) fn runs_streams(&self) -> bool {
        self.may_run_streams
    }

    /// The barriers that the block declared to take part in; none when it may enter any. Names that are refused are left
    /// out here and reported by [`Block::compile`].
    pub(crate) fn declared_barriers(&self) -> Option<Vec<BarrierName>> {
        let names = self.joins.as_ref()?;
        Some(names.iter().filter_map(|name| name.as_ref().ok().cloned()).collect())
    }
}

impl Kind {
    fn derived_name(&self) -> BlockName {
        match self {
            Self::Command(command) => command.derived_name(),
            Self::Python(text) => BlockName::derived(command::first_line(text)),
            Self::Script { path, .. } => {
                BlockName::derived(&path.file_stem().unwrap_or_default().to_string_lossy())
            }
            Self::PythonFile(file) => file.derived_name(),
            Self::Function(call) => BlockName::derived(call.function().name()),
            Self::Reference(unresolved) => unresolved.derived_name(),
        }
    }

    /// As a reference would name it, where one could.
    fn described(&self) -> String {
        match self {
            Self::Script { path, .. } => path.display().to_string(),
            Self::PythonFile(file) => file.described(),
            Self::Function(call) => call.function().path().to_owned(),
            Self::Reference(unresolved) => unresolved.text().to_owned(),
            Self::Command(_) | Self::Python(_) => self.derived_name().to_string(),
        }
    }
}

impl fmt::Debug for Block {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Parameters may be secret: only their names are shown.
        f.debug_struct("Block")
            .field("name", &self.block_name())
            .field("kind", &self.kind)
            .field("parameters", &self.parameters.keys())
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Command(command) => command.fmt(f),
            Self::Python(text) => write!(f, "python({:?})", command::first_line(text)),
            Self::Script { path, .. } => write!(f, "script({path:?})"),
            Self::Function(call) => write!(f, "{}(…)", call.function().name()),
            Self::PythonFile(_) | Self::Reference(_) => write!(f, "reference({:?})", self.described()),
        }
    }
}
