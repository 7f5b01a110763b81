//! Barriers and topics over a Unix socket, as a block uses them.
//!
//! Each entry and publication has a token, so that a call which the network lost is simply made again: the controller
//! takes the repeat as the same party and delivers what was decided meanwhile. Patience is the controller's to judge;
//! nothing here counts time but the pauses between attempts.

use std::{
    env, io,
    path::{Path, PathBuf},
    time::Duration,
};

use bytes::Bytes;
use hyper_util::rt::TokioIo;
use millstream_proto::v1::{self, sync_service_client::SyncServiceClient};
use tokio::net::UnixStream;
use tonic::{
    Code, Status, Streaming,
    transport::{Channel, Endpoint, Uri},
};

use crate::{clock::World, convert, limits};

pub mod blocking;
pub mod command;
mod parties;

pub use parties::{Parties, PartiesError};

/// A barrier was passed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Released {
    /// Generation of the barrier, from 1.
    pub generation: u64,
    /// In which place this party came, from 0.
    pub arrival: u32,
    /// Everybody, in order of arrival; in a large meeting only those who brought a payload.
    pub parties: Vec<Party>,
    /// How long this party waited.
    pub waited: Duration,
}

/// One party of a meeting.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Party {
    /// What it is called, such as `server/1-netserver`, `main` or `by hand`.
    pub name: String,
    /// In which place it came, from 0.
    pub arrival: u32,
    /// What it brought.
    pub payload: Bytes,
}

/// One value of a topic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TopicValue {
    /// Its index, from 0.
    pub index: u64,
    /// What it is.
    pub content: Content,
    /// Who published it.
    pub publisher: String,
}

/// What a value is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// Text, shown as such.
    Text(String),
    /// Anything else.
    Data(Bytes),
}

impl Content {
    /// Its size in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.bytes().len()
    }

    /// Whether nothing is in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Its bytes, whichever it is.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        match self {
            Self::Text(text) => text.as_bytes(),
            Self::Data(data) => data,
        }
    }
}

impl From<&str> for Content {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<String> for Content {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

/// How a block enters a barrier. The default: the size of the group, 60 s, nothing brought.
#[derive(Debug, Clone, Default)]
pub struct Entry {
    /// How many parties there are, this one included; the size of the group that the block was run on unless set.
    pub parties: Parties,
    /// Patience; none: 60 s.
    pub timeout: Option<Duration>,
    /// What every other party gets: at most 64 KiB.
    pub payload: Bytes,
    /// What the party is called on the board; none: stream and block.
    pub display_name: Option<String>,
}

/// Why a call did not do what it was made for.
#[derive(Debug, thiserror::Error)]
pub enum SyncError {
    /// This process is not a block.
    #[error("MILLSTREAM_SYNC is not set: barriers and topics are reached from inside a block only")]
    NoSocket,
    /// Nobody listens on the socket.
    #[error("failed to reach the agent on `{}`", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the transport said.
        #[source]
        source: tonic::transport::Error,
    },
    /// No runtime could be made to make calls on.
    #[error("failed to start a runtime for calls")]
    Runtime {
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The barrier is broken, or nobody is left who could publish: the message says by whom, where and why.
    #[error("{0}")]
    Broken(String),
    /// Patience ended.
    #[error("{0}")]
    TimedOut(String),
    /// The controller is gone, and the block is about to be ended.
    #[error("{0}")]
    Gone(String),
    /// The call cannot be.
    #[error("{message}")]
    Refused {
        /// The status code.
        code: Code,
        /// What is wrong, and what would be right.
        message: String,
    },
}

impl From<Status> for SyncError {
    fn from(status: Status) -> Self {
        let message = match status.message() {
            "" => status.code().description().to_owned(),
            message => message.to_owned(),
        };
        match status.code() {
            Code::Aborted => Self::Broken(message),
            Code::DeadlineExceeded => Self::TimedOut(message),
            Code::Unavailable => Self::Gone(message),
            code => Self::Refused { code, message },
        }
    }
}

/// A block's line to its test's barriers and topics. Cheap to clone.
#[derive(Debug, Clone)]
pub struct SyncClient {
    client: SyncServiceClient<Channel>,
    world: World,
}

/// Attempts at one call when nothing answers. With doubling pauses from 50 ms to 2 s they last about 9 s: longer than a
/// lost party counts as entered.
const ATTEMPTS_COUNT_MAX: u32 = 9;

/// How the answer of an agent begins whose controller is gone for good.
pub const CONTROLLER_GONE: &str = "controller gone";

impl SyncClient {
    /// Connects to the socket that MILLSTREAM_SYNC names.
    ///
    /// # Errors
    /// When this process is not a block, or its agent does not listen.
    pub async fn from_environment() -> Result<Self, SyncError> {
        let path = env::var_os("MILLSTREAM_SYNC").ok_or(SyncError::NoSocket)?;
        Self::connect(path).await
    }

    /// Connects to a socket.
    ///
    /// # Errors
    /// When nobody listens there.
    pub async fn connect(path: impl Into<PathBuf>) -> Result<Self, SyncError> {
        Self::connect_in(path, World::system()).await
    }

    /// Connects to a socket, with numbers from somewhere else.
    ///
    /// # Errors
    /// When nobody listens there.
    pub async fn connect_in(path: impl Into<PathBuf>, world: World) -> Result<Self, SyncError> {
        let channel = channel(path).await?;
        let client = SyncServiceClient::new(channel)
            .max_decoding_message_size(limits::RELAY_MESSAGE_BYTES_MAX)
            .max_encoding_message_size(limits::RELAY_MESSAGE_BYTES_MAX);
        Ok(Self { client, world })
    }

    /// Waits until all parties have entered this generation of a barrier.
    ///
    /// # Errors
    /// When the meeting broke: the message says by whom, where and why.
    ///
    /// # Cancel safety
    /// Dropping the future gives the entry up, which breaks the meeting after the reconnection grace.
    pub async fn barrier(&self, name: &str, entry: Entry) -> Result<Released, SyncError> {
        let (parties, all, more_parties) = match entry.parties {
            Parties::Count(0) => {
                return Err(Status::invalid_argument("parties must be 1 to 100,000").into());
            }
            Parties::Count(count) => (count, false, 0),
            Parties::Group { more } => (0, false, more),
            Parties::All { more } => (0, true, more),
        };
        let request = v1::EnterRequest {
            name: name.to_owned(),
            parties,
            all,
            more_parties,
            timeout: entry.timeout.map(convert::duration),
            party_token: self.world.ids.token(),
            payload: entry.payload,
            display_name: entry.display_name.unwrap_or_default(),
        };
        let answer = self
            .again(|mut client| {
                let request = request.clone();
                async move { client.enter(request).await }
            })
            .await?;
        let party =
            |party: v1::Party| Party { name: party.name, arrival: party.arrival, payload: party.payload };
        let waited = answer.wait_duration.and_then(|waited| Duration::try_from(waited).ok());
        Ok(Released {
            generation: answer.generation,
            arrival: answer.arrival,
            parties: answer.parties.into_iter().map(party).collect(),
            waited: waited.unwrap_or_default(),
        })
    }

    /// Breaks a barrier with a reason, for everybody.
    ///
    /// # Errors
    /// When the name or the reason cannot be.
    pub async fn abort(&self, name: &str, reason: &str) -> Result<(), SyncError> {
        let request = v1::AbortRequest { name: name.to_owned(), reason: reason.to_owned() };
        self.again(|mut client| {
            let request = request.clone();
            async move { client.abort(request).await }
        })
        .await?;
        Ok(())
    }

    /// Appends a value to a topic and tells its index.
    ///
    /// # Errors
    /// When the topic is full or the value too large.
    pub async fn publish(&self, topic: &str, content: impl Into<Content>) -> Result<u64, SyncError> {
        let (text, data) = match content.into() {
            Content::Text(text) => (text, Bytes::new()),
            Content::Data(data) => (String::new(), data),
        };
        let publish_token = self.world.ids.token();
        let request = v1::PublishRequest { topic: topic.to_owned(), text, data, publish_token };
        Ok(self
            .again(|mut client| {
                let request = request.clone();
                async move { client.publish(request).await }
            })
            .await?
            .index)
    }

    /// Waits until a topic has `count` values and gives the first `count`. Without a timeout: 60 s.
    ///
    /// # Errors
    /// When they do not come in time, or nobody is left who could publish them.
    pub async fn wait(
        &self,
        topic: &str,
        count: u32,
        timeout: Option<Duration>,
    ) -> Result<Vec<TopicValue>, SyncError> {
        let request =
            v1::WaitRequest { topic: topic.to_owned(), count, timeout: timeout.map(convert::duration) };
        let answer = self
            .again(|mut client| {
                let request = request.clone();
                async move { client.wait(request).await }
            })
            .await?;
        Ok(answer.values.into_iter().map(value).collect())
    }

    /// The values of a topic as they are, without waiting.
    ///
    /// # Errors
    /// When the name cannot be, or nobody answers.
    pub async fn get(&self, topic: &str) -> Result<Vec<TopicValue>, SyncError> {
        let mut values: Vec<TopicValue> = Vec::new();
        loop {
            let request = v1::GetRequest { topic: topic.to_owned(), from_index: values.len() as u64 };
            let answer = self
                .again(|mut client| {
                    let request = request.clone();
                    async move { client.get(request).await }
                })
                .await?;
            if answer.values.is_empty() {
                return Ok(values);
            }
            values.extend(answer.values.into_iter().map(value));
        }
    }

    /// The values of a topic from an index on, those that come later included.
    #[must_use]
    pub fn subscribe(&self, topic: &str, from_index: u64) -> Subscription {
        Subscription {
            client: self.clone(),
            topic: topic.to_owned(),
            next_index: from_index,
            once: false,
            stream: None,
            ready: Vec::new().into_iter(),
        }
    }

    /// Every barrier of the test.
    ///
    /// # Errors
    /// When nobody answers.
    pub async fn barriers(&self) -> Result<Vec<v1::BarrierStatus>, SyncError> {
        let mut barriers = Vec::new();
        let mut request = v1::ListBarriersRequest { from_index: 0 };
        loop {
            let answer = self.again(|mut client| async move { client.list_barriers(request).await }).await?;
            barriers.extend(answer.barriers);
            // An index that does not grow would be asked for without end.
            if answer.next_index <= request.from_index {
                return Ok(barriers);
            }
            request.from_index = answer.next_index;
        }
    }

    /// Every topic of the test.
    ///
    /// # Errors
    /// When nobody answers.
    pub async fn topics(&self) -> Result<Vec<v1::TopicStatus>, SyncError> {
        let mut topics = Vec::new();
        let mut request = v1::ListTopicsRequest { from_index: 0 };
        loop {
            let answer = self.again(|mut client| async move { client.list_topics(request).await }).await?;
            topics.extend(answer.topics);
            if answer.next_index <= request.from_index {
                return Ok(topics);
            }
            request.from_index = answer.next_index;
        }
    }

    /// Makes a call again until something answers. Every call here may be repeated: by its token, or because it changes
    /// nothing.
    async fn again<T, F>(&self, call: impl Fn(SyncServiceClient<Channel>) -> F) -> Result<T, SyncError>
    where
        F: Future<Output = Result<tonic::Response<T>, Status>>,
    {
        let mut attempt = 1;
        loop {
            match call(self.client.clone()).await {
                Ok(answer) => return Ok(answer.into_inner()),
                Err(status) if may_answer_later(&status) && attempt < ATTEMPTS_COUNT_MAX => {
                    pause(attempt).await;
                    attempt += 1;
                }
                Err(status) => return Err(status.into()),
            }
        }
    }
}

/// A connection for calls to the services behind a task's socket.
///
/// # Errors
/// When nobody listens there.
pub async fn channel(path: impl Into<PathBuf>) -> Result<Channel, SyncError> {
    let path = path.into();
    let dialled = path.clone();
    let connector = tower::service_fn(move |_: Uri| {
        let path = dialled.clone();
        async move { Ok::<_, io::Error>(TokioIo::new(dial(&path).await?)) }
    });
    // The name is never resolved; it becomes the `:authority` of every call.
    Endpoint::from_static("http://localhost")
        .http2_max_local_error_reset_streams(limits::HTTP2_LOCAL_RESETS_MAX)
        .connect_with_connector(connector)
        .await
        .map_err(|source| SyncError::Connect { path, source })
}

async fn dial(path: &Path) -> io::Result<UnixStream> {
    UnixStream::connect(path).await
}

async fn pause(attempt: u32) {
    let pause = limits::RECONNECT_PAUSE_MIN.saturating_mul(1 << (attempt - 1).min(16));
    tokio::time::sleep(pause.min(limits::RECONNECT_PAUSE_MAX)).await;
}

fn may_answer_later(status: &Status) -> bool {
    let lost = matches!(status.code(), Code::Unavailable)
        // A connection that was reset while a call was on it is told as unknown, with its cause.
        || (status.code() == Code::Unknown && std::error::Error::source(status).is_some());
    lost && !status.message().starts_with(CONTROLLER_GONE)
}

fn value(value: v1::TopicValue) -> TopicValue {
    let content = if value.data.is_empty() { Content::Text(value.text) } else { Content::Data(value.data) };
    TopicValue { index: value.index, content, publisher: value.publisher }
}

/// The values of a topic, one after the other, each once. Dropping it ends it.
#[derive(Debug)]
pub struct Subscription {
    client: SyncClient,
    topic: String,
    next_index: u64,
    /// How the stream was asked for.
    once: bool,
    stream: Option<Streaming<v1::SubscribeResponse>>,
    ready: std::vec::IntoIter<v1::TopicValue>,
}

impl Subscription {
    /// The next value; none when the controller has ended the topic. The block may do something else meanwhile, so it
    /// counts as one that could still publish or come to a barrier.
    ///
    /// # Errors
    /// When nobody answers any more, or no other task is left that could publish.
    ///
    /// # Cancel safety
    /// Nothing is lost when the future is dropped.
    pub async fn next(&mut self) -> Result<Option<TopicValue>, SyncError> {
        self.advance(false).await
    }

    /// As [`Subscription::next`], for a block that does nothing else meanwhile: blocks that wait for each other's values
    /// are told.
    ///
    /// # Errors
    /// When nobody answers any more, or no task is left that could publish.
    ///
    /// # Cancel safety
    /// Nothing is lost when the future is dropped.
    pub async fn wait_next(&mut self) -> Result<Option<TopicValue>, SyncError> {
        self.advance(true).await
    }

    /// The values that are there, from the next index on: waits for the first of them as [`Subscription::wait_next`].
    ///
    /// # Errors
    /// When nobody answers any more, or no task is left that could publish.
    ///
    /// # Cancel safety
    /// Nothing is lost when the future is dropped.
    pub async fn wait_batch(&mut self) -> Result<Vec<TopicValue>, SyncError> {
        let first = self.wait_next().await?;
        let values = first.into_iter().chain(self.ready.by_ref().map(value)).collect::<Vec<_>>();
        self.next_index = values.last().map_or(self.next_index, |last| last.index + 1);
        Ok(values)
    }

    async fn advance(&mut self, once: bool) -> Result<Option<TopicValue>, SyncError> {
        let mut attempt = 1;
        // Of a stream that was asked for once, the end says nothing about the topic.
        let mut asked = false;
        if self.once != once && self.ready.as_slice().is_empty() {
            self.stream = None;
            self.once = once;
        }
        loop {
            if let Some(next) = self.ready.next() {
                self.next_index = next.index + 1;
                return Ok(Some(value(next)));
            }
            let answer = match &mut self.stream {
                Some(stream) => stream.message().await,
                None => {
                    asked = true;
                    let request =
                        v1::SubscribeRequest { topic: self.topic.clone(), from_index: self.next_index, once };
                    match self.client.client.clone().subscribe(request).await {
                        Ok(answer) => {
                            self.stream = Some(answer.into_inner());
                            continue;
                        }
                        Err(status) => Err(status),
                    }
                }
            };
            match answer {
                Ok(Some(batch)) => {
                    attempt = 1;
                    self.ready = batch.values.into_iter();
                }
                Ok(None) if once && !asked => self.stream = None,
                Ok(None) => return Ok(None),
                Err(status) if may_answer_later(&status) && attempt < ATTEMPTS_COUNT_MAX => {
                    // Whatever came before is not asked for again: the next index is known.
                    self.stream = None;
                    pause(attempt).await;
                    attempt += 1;
                }
                Err(status) => return Err(status.into()),
            }
        }
    }
}
