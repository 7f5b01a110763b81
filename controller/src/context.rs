//! What a Rust block sees of the world: parameters, places for its results, barriers and topics.
//!
//! Everything comes from the environment that the host made for the block; nothing here knows how it got there.

use std::{
    cell::OnceCell,
    env, fmt,
    fs::{self, OpenOptions},
    io::{self, Write as _},
    path::{Path, PathBuf},
};

use millstream_common::id::{IdError, NameError, StreamName, TaskId};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

/// Handed to a function with `#[millstream::block]` as its first argument, when it wants one.
///
/// A block of another language finds the same in its environment.
pub struct BlockContext {
    task: TaskId,
    stream: StreamName,
    output: PathBuf,
    whiteboard: PathBuf,
    parameters_file: PathBuf,
    topology_file: PathBuf,
    parameters: OnceCell<Map<String, Value>>,
}

/// Why a block cannot see or tell something.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ContextError {
    /// A variable that the host sets is missing.
    #[error("the environment lacks {variable}: this is no block of a stream, or it was removed")]
    Variable {
        /// The variable.
        variable: &'static str,
    },
    /// The stream's name is refused.
    #[error("MILLSTREAM_STREAM names no stream")]
    Stream(#[from] NameError),
    /// The task's number is refused.
    #[error("MILLSTREAM_TASK is no number of a task")]
    Task(#[from] IdError),
    /// A file of the block cannot be read or written.
    #[error("failed to {attempt} `{}`", path.display())]
    File {
        /// What was attempted.
        attempt: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A file of the block is no JSON object.
    #[error("`{}` is not the JSON that it should be", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: serde_json::Error,
    },
    /// The block has no such parameter.
    #[error("the block has no parameter `{name}`: {}", offered(near.as_deref()))]
    NoParameter {
        /// Its name.
        name: String,
        /// The nearest one that it has.
        near: Option<String>,
    },
    /// A parameter has another type.
    #[error("parameter `{name}` cannot be read as `{type_name}`")]
    Parameter {
        /// Its name.
        name: String,
        /// The type that was wanted.
        type_name: &'static str,
        /// Why not.
        #[source]
        source: serde_json::Error,
    },
}

fn offered(near: Option<&str>) -> String {
    match near {
        Some(near) => format!("did you mean `{near}`?"),
        None => "give it one with `.param(name, value)`".to_owned(),
    }
}

fn variable(variable: &'static str) -> Result<PathBuf, ContextError> {
    env::var_os(variable).map(PathBuf::from).ok_or(ContextError::Variable { variable })
}

fn text(name: &'static str) -> Result<String, ContextError> {
    env::var(name).map_err(|_| ContextError::Variable { variable: name })
}

impl BlockContext {
    /// Reads the environment of a block.
    pub(crate) fn from_environment() -> Result<Self, ContextError> {
        Ok(Self {
            task: text("MILLSTREAM_TASK")?.parse()?,
            stream: text("MILLSTREAM_STREAM")?.parse()?,
            output: variable("MILLSTREAM_OUTPUT")?,
            whiteboard: variable("MILLSTREAM_WHITEBOARD")?,
            parameters_file: variable("MILLSTREAM_PARAMS")?,
            topology_file: variable("MILLSTREAM_TOPOLOGY")?,
            parameters: OnceCell::new(),
        })
    }

    /// The task that the block runs in.
    #[must_use]
    pub fn task_id(&self) -> TaskId {
        self.task
    }

    /// The stream that the block runs in.
    #[must_use]
    pub fn stream(&self) -> &StreamName {
        &self.stream
    }

    /// A directory; everything in it comes home as `data/`.
    #[must_use]
    pub fn output_dir(&self) -> &Path {
        &self.output
    }

    /// Appends a line to the whiteboard: a short text for people, shown with the outcome; at most 1 MiB together.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn whiteboard(&self, line: impl fmt::Display) -> Result<(), ContextError> {
        let path = &self.whiteboard;
        let write = || {
            let mut file = OpenOptions::new().create(true).append(true).open(path)?;
            file.write_all(format!("{line}\n").as_bytes())
        };
        write().map_err(|source| ContextError::File { attempt: "write", path: path.clone(), source })
    }

    /// A parameter that the block was given.
    ///
    /// # Errors
    /// When there is none of this name, with the nearest that there is, or when it has another type.
    pub fn param<T: DeserializeOwned>(&self, name: &str) -> Result<T, ContextError> {
        let parameters = self.params()?;
        let value = parameters.get(name).ok_or_else(|| ContextError::NoParameter {
            name: name.to_owned(),
            near: millstream_common::text::nearest(name, parameters.keys().map(String::as_str))
                .map(str::to_owned),
        })?;
        let type_name = std::any::type_name::<T>();
        T::deserialize(value).map_err(|source| ContextError::Parameter {
            name: name.to_owned(),
            type_name,
            source,
        })
    }

    /// All parameters that the block was given.
    ///
    /// # Errors
    /// When their file cannot be read.
    pub fn params(&self) -> Result<&Map<String, Value>, ContextError> {
        if let Some(parameters) = self.parameters.get() {
            return Ok(parameters);
        }
        let parameters = read_json(&self.parameters_file)?;
        Ok(self.parameters.get_or_init(|| parameters))
    }

    /// Every defined stream, with its host and its addresses, as JSON.
    ///
    /// # Errors
    /// When its file cannot be read.
    pub fn topology(&self) -> Result<Value, ContextError> {
        read_json(&self.topology_file)
    }
}

impl fmt::Debug for BlockContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BlockContext")
            .field("stream", &self.stream)
            .field("task", &self.task)
            .finish_non_exhaustive()
    }
}

fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T, ContextError> {
    let text = fs::read(path);
    let text =
        text.map_err(|source| ContextError::File { attempt: "read", path: path.to_owned(), source })?;
    serde_json::from_slice(&text).map_err(|source| ContextError::Json { path: path.to_owned(), source })
}
