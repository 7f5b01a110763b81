//! What a Rust block sees of the world: parameters, places for its results, barriers and topics.
//!
//! Everything comes from the environment that the host made for the block; nothing here knows how it got there.

use std::{
    env, fmt,
    fs::{self, OpenOptions},
    io::{self, Write as _},
    panic,
    path::{Path, PathBuf},
    sync::OnceLock,
    thread,
    time::Duration,
};

use millstream_common::{
    id::{IdError, NameError, StreamName, TaskId},
    sync_client::{Content, Entry, Parties, Released, SyncError, TopicValue, blocking::SyncClient},
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Map, Value};

/// Handed to a function with `#[millstream::block]` as its first argument, when it wants one.
///
/// A block of another language finds the same in its environment.
pub struct BlockContext {
    task: TaskId,
    stream: StreamName,
    /// The block's own thread.
    thread: thread::ThreadId,
    output: PathBuf,
    whiteboard: PathBuf,
    parameters_file: PathBuf,
    topology_file: PathBuf,
    parameters: OnceLock<Map<String, Value>>,
    sync: OnceLock<SyncClient>,
}

/// The value that a function returned, in the output directory.
pub(crate) const VALUE_FILE: &str = ".millstream/value.json";

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
    /// A barrier broke, or a topic could not be used: the message says by whom, where and why.
    #[error(transparent)]
    Sync(#[from] SyncError),
    /// A value cannot be published.
    #[error("the value for topic `{topic}` cannot be written as JSON")]
    Publish {
        /// The topic.
        topic: String,
        /// Why not.
        #[source]
        source: serde_json::Error,
    },
    /// A published value has another type.
    #[error("value {index} of topic `{topic}`, published by {publisher}, cannot be read as `{type_name}`")]
    Value {
        /// The topic.
        topic: String,
        /// Its place in the topic.
        index: u64,
        /// Who published it.
        publisher: String,
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
            thread: thread::current().id(),
            output: variable("MILLSTREAM_OUTPUT")?,
            whiteboard: variable("MILLSTREAM_WHITEBOARD")?,
            parameters_file: variable("MILLSTREAM_PARAMS")?,
            topology_file: variable("MILLSTREAM_TOPOLOGY")?,
            parameters: OnceLock::new(),
            sync: OnceLock::new(),
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

    /// Leaves what the function returned where the outcome looks for it.
    pub(crate) fn leave_value(&self, text: &str) -> Result<(), ContextError> {
        let path = self.output.join(VALUE_FILE);
        let directory = path.parent().unwrap_or(&self.output);
        let written = fs::create_dir_all(directory).and_then(|()| fs::write(&path, text));
        written.map_err(|source| ContextError::File { attempt: "write", path: path.clone(), source })
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

    /// Waits until `parties` have entered the barrier, this block included; at most 60 s. A number, or
    /// [`Parties::group`] in a block that was run on a group, or [`Parties::all`].
    ///
    /// # Errors
    /// When the meeting broke: the message says by whom, where and why.
    pub fn barrier(&self, name: &str, parties: impl Into<Parties>) -> Result<Released, ContextError> {
        self.barrier_with(name, Entry { parties: parties.into(), ..Entry::default() })
    }

    /// Enters a barrier with a payload for the others, or another patience.
    ///
    /// # Errors
    /// When the meeting broke: the message says by whom, where and why.
    pub fn barrier_with(&self, name: &str, entry: Entry) -> Result<Released, ContextError> {
        self.call(|sync| sync.barrier(name, entry))
    }

    /// Breaks a barrier with a reason, for everybody.
    ///
    /// # Errors
    /// When the name or the reason cannot be.
    pub fn abort(&self, name: &str, reason: &str) -> Result<(), ContextError> {
        self.call(|sync| sync.abort(name, reason))
    }

    /// Appends a value to a topic and tells its index, from 0: a rank that nobody else gets. A text is published as it
    /// is, everything else as JSON.
    ///
    /// # Errors
    /// When the topic is full, or the value too large or no JSON.
    pub fn publish(&self, topic: &str, value: impl Serialize) -> Result<u64, ContextError> {
        let value = serde_json::to_value(value);
        let value = value.map_err(|source| ContextError::Publish { topic: topic.to_owned(), source })?;
        let text = match value {
            Value::String(text) => text,
            other => other.to_string(),
        };
        self.call(|sync| sync.publish(topic, text))
    }

    /// Waits until a topic has `count` values, at most 60 s, and gives the first `count`.
    ///
    /// # Errors
    /// When they do not come in time, nobody is left who could publish them, or one has another type.
    pub fn wait<T: DeserializeOwned>(&self, topic: &str, count: usize) -> Result<Vec<T>, ContextError> {
        self.wait_for(topic, count, millstream_common::limits::BARRIER_TIMEOUT)
    }

    /// As [`BlockContext::wait`], with another patience: at most 7 days.
    ///
    /// # Errors
    /// When they do not come in time, nobody is left who could publish them, or one has another type.
    pub fn wait_for<T: DeserializeOwned>(
        &self,
        topic: &str,
        count: usize,
        timeout: Duration,
    ) -> Result<Vec<T>, ContextError> {
        let count = u32::try_from(count).unwrap_or(u32::MAX);
        let values = self.call(|sync| sync.wait(topic, count, Some(timeout)))?;
        values.into_iter().map(|value| read_value(topic, value)).collect()
    }

    /// The values of a topic as they are, without waiting.
    ///
    /// # Errors
    /// When one has another type.
    pub fn get<T: DeserializeOwned>(&self, topic: &str) -> Result<Vec<T>, ContextError> {
        let values = self.call(|sync| sync.get(topic))?;
        values.into_iter().map(|value| read_value(topic, value)).collect()
    }

    /// The values of a topic from the first on, those that come later included. Not to be used inside an asynchronous
    /// runtime: each step holds the thread.
    ///
    /// On the thread that the block's function runs on, the block waits for each value, as by [`BlockContext::wait`]: blocks
    /// that wait for each other's values are told at once. On another thread it listens, and may do something else
    /// meanwhile.
    ///
    /// # Errors
    /// When the agent cannot be reached. The iterator ends with an error when no other task is left that could publish.
    pub fn subscribe<T: DeserializeOwned>(
        &self,
        topic: &str,
    ) -> Result<impl Iterator<Item = Result<T, ContextError>>, ContextError> {
        let own = self.thread;
        let values = self.sync()?.subscribe(topic, 0, move || thread::current().id() == own);
        Ok(values.map(move |value| read_value(topic, value?)))
    }

    /// Prints a line on standard error at once: it is in the block's log with its time.
    pub fn log(&self, line: impl fmt::Display) {
        // Nobody is left to be told when standard error is closed.
        let _written: io::Result<()> = io::stderr().write_all(format!("{line}\n").as_bytes());
    }

    fn sync(&self) -> Result<&SyncClient, ContextError> {
        if let Some(sync) = self.sync.get() {
            return Ok(sync);
        }
        let sync = outside_of_runtimes(SyncClient::from_environment)?;
        Ok(self.sync.get_or_init(|| sync))
    }

    fn call<T: Send>(
        &self,
        call: impl FnOnce(&SyncClient) -> Result<T, SyncError> + Send,
    ) -> Result<T, ContextError> {
        let sync = self.sync()?;
        Ok(outside_of_runtimes(|| call(sync))?)
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

/// Makes a call that holds its thread. A thread that drives a runtime must not: then another one is held.
pub(crate) fn outside_of_runtimes<T: Send>(call: impl FnOnce() -> T + Send) -> T {
    if tokio::runtime::Handle::try_current().is_err() {
        return call();
    }
    thread::scope(|scope| scope.spawn(call).join().unwrap_or_else(|panic| panic::resume_unwind(panic)))
}

/// A value that was published as text is had as that text; what is no text is JSON.
fn read_value<T: DeserializeOwned>(topic: &str, value: TopicValue) -> Result<T, ContextError> {
    let text = match &value.content {
        Content::Text(text) => text.clone(),
        Content::Data(data) => String::from_utf8_lossy(data).into_owned(),
    };
    let read = serde_json::from_value(Value::String(text.clone())).or_else(|_| serde_json::from_str(&text));
    read.map_err(|source| ContextError::Value {
        topic: topic.to_owned(),
        index: value.index,
        publisher: value.publisher,
        type_name: std::any::type_name::<T>(),
        source,
    })
}

fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T, ContextError> {
    let text = fs::read(path);
    let text =
        text.map_err(|source| ContextError::File { attempt: "read", path: path.to_owned(), source })?;
    serde_json::from_slice(&text).map_err(|source| ContextError::Json { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_that_holds_its_thread_does_not_hold_a_runtime() {
        let runtime = || tokio::runtime::Builder::new_current_thread().build().unwrap();
        let within = || outside_of_runtimes(|| runtime().block_on(async { 7 }));
        assert_eq!(within(), 7);
        assert_eq!(runtime().block_on(async { within() }), 7);
    }

    #[test]
    fn what_was_published_is_had_as_it_was() {
        fn had<T: DeserializeOwned>(text: &str) -> Result<T, String> {
            let content = Content::Text(text.to_owned());
            let value = TopicValue { index: 3, content, publisher: "server/1-netserver".to_owned() };
            read_value("port", value).map_err(|error| error.to_string())
        }
        assert_eq!(had::<u16>("5201"), Ok(5201));
        assert_eq!(had::<String>("5201").as_deref(), Ok("5201"));
        assert_eq!(had::<String>("\"quoted\"").as_deref(), Ok("\"quoted\""));
        assert_eq!(had::<Vec<u8>>("[1,2]"), Ok(vec![1, 2]));
        let refused = had::<u16>("x").unwrap_err();
        assert_eq!(
            refused,
            "value 3 of topic `port`, published by server/1-netserver, cannot be read as `u16`"
        );
    }
}
