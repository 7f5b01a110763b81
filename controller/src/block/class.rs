//! Python files as blocks: methods of their classes under a harness, and whole files as programs.
//!
//! What is shipped is the file with the modules beside it. The harness is a script of this library; agents know neither
//! of them.

use std::{collections::BTreeMap, path::PathBuf};

use bytes::Bytes;
use millstream_common::{id::BlockName, spec::OutputDescriptors};

use super::{
    BlockError,
    compile::{Files, PROGRAM_VARIABLE, Run, Surroundings, host_path, python_environment, shipped_argv},
};

/// Runs one method of a class with its set-up and tear-down.
const HARNESS: &str = include_str!("python/harness.py");
/// Its place beside the shipped files.
const HARNESS_PLACE: &str = ".millstream/harness.py";

/// A Python file, and what of it is run.
#[derive(Debug, Clone)]
pub(super) struct PythonFile {
    pub(super) path: PathBuf,
    pub(super) run: PythonRun,
}

/// What of a Python file is run.
#[derive(Debug, Clone)]
pub(super) enum PythonRun {
    /// A method of a class: `setUp`, the method, `tearDown`.
    Method { class: String, method: String },
    /// The file itself.
    Program { arguments: Vec<String> },
}

impl PythonFile {
    pub(super) fn derived_name(&self) -> BlockName {
        match &self.run {
            PythonRun::Method { class, method } => BlockName::derived(&format!("{class}.{method}")),
            PythonRun::Program { .. } => {
                BlockName::derived(&self.path.file_stem().unwrap_or_default().to_string_lossy())
            }
        }
    }

    /// A reference to it.
    pub(super) fn described(&self) -> String {
        match &self.run {
            PythonRun::Method { class, method } => format!("{}:{class}.{method}", self.path.display()),
            PythonRun::Program { .. } => self.path.display().to_string(),
        }
    }

    /// The command that runs it, with the files that it needs. Phases of a class are told unless the block has others.
    pub(super) fn command(
        &self,
        surroundings: &Surroundings,
        (directory, no_copy, has_more_phases): (&str, bool, bool),
        files: &mut Files,
        environment: &mut BTreeMap<String, String>,
    ) -> Result<Run, BlockError> {
        let no_python = || BlockError::NoPython { host: surroundings.host.clone() };
        let python = surroundings.python.as_deref().ok_or_else(no_python)?;
        python_environment(environment);
        let is_program = matches!(self.run, PythonRun::Program { .. });
        let file = if no_copy {
            host_path(&self.path)?
        } else {
            files.python_file(&self.path, is_program.then_some(PROGRAM_VARIABLE))?
        };
        match &self.run {
            PythonRun::Program { arguments } => {
                let mut argv = if no_copy {
                    vec![python.to_owned(), file]
                } else {
                    shipped_argv(Some(python), &file, directory)
                };
                argv.extend(arguments.iter().cloned());
                Ok(Run::plain(argv))
            }
            PythonRun::Method { class, method } => {
                files.content(HARNESS_PLACE, PROGRAM_VARIABLE, Bytes::from_static(HARNESS.as_bytes()))?;
                let mut argv = shipped_argv(Some(python), HARNESS_PLACE, directory);
                argv.extend([file, class.clone(), method.clone()]);
                Ok(Run { argv, output: OutputDescriptors::Standard, reports_phases: !has_more_phases })
            }
        }
    }
}
