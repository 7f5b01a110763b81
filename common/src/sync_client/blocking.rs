//! The same for blocks that have no runtime: each call holds its thread until it is answered.
//!
//! May be shared between threads. Not to be called from inside a runtime, which would be held too.

use std::time::Duration;

use tokio::runtime::{Builder, Runtime};

use super::{Content, Entry, Released, SyncError, TopicValue};

/// A block's line to its test's barriers and topics.
#[derive(Debug)]
pub struct SyncClient {
    runtime: Runtime,
    client: super::SyncClient,
}

impl SyncClient {
    /// Connects to the socket that MILLSTREAM_SYNC names.
    ///
    /// # Errors
    /// When this process is not a block, or its agent does not listen.
    pub fn from_environment() -> Result<Self, SyncError> {
        let runtime = runtime()?;
        let client = runtime.block_on(super::SyncClient::from_environment())?;
        Ok(Self { runtime, client })
    }

    /// Connects to a socket.
    ///
    /// # Errors
    /// When nobody listens there.
    pub fn connect(path: impl Into<std::path::PathBuf>) -> Result<Self, SyncError> {
        let runtime = runtime()?;
        let client = runtime.block_on(super::SyncClient::connect(path))?;
        Ok(Self { runtime, client })
    }

    /// Waits until all parties have entered this generation of a barrier.
    ///
    /// # Errors
    /// When the meeting broke: the message says by whom, where and why.
    pub fn barrier(&self, name: &str, entry: Entry) -> Result<Released, SyncError> {
        self.runtime.block_on(self.client.barrier(name, entry))
    }

    /// Breaks a barrier with a reason, for everybody.
    ///
    /// # Errors
    /// When the name or the reason cannot be.
    pub fn abort(&self, name: &str, reason: &str) -> Result<(), SyncError> {
        self.runtime.block_on(self.client.abort(name, reason))
    }

    /// Appends a value to a topic and tells its index.
    ///
    /// # Errors
    /// When the topic is full or the value too large.
    pub fn publish(&self, topic: &str, content: impl Into<Content>) -> Result<u64, SyncError> {
        self.runtime.block_on(self.client.publish(topic, content))
    }

    /// Waits until a topic has `count` values and gives the first `count`. Without a timeout: 60 s.
    ///
    /// # Errors
    /// When they do not come in time, or nobody is left who could publish them.
    pub fn wait(
        &self,
        topic: &str,
        count: u32,
        timeout: Option<Duration>,
    ) -> Result<Vec<TopicValue>, SyncError> {
        self.runtime.block_on(self.client.wait(topic, count, timeout))
    }

    /// The values of a topic as they are, without waiting.
    ///
    /// # Errors
    /// When the name cannot be, or nobody answers.
    pub fn get(&self, topic: &str) -> Result<Vec<TopicValue>, SyncError> {
        self.runtime.block_on(self.client.get(topic))
    }

    /// The values of a topic from an index on, those that come later included. Ends with the controller or the topic.
    /// `waits` is asked at each step whether the block does nothing else until the next value comes.
    pub fn subscribe(
        &self,
        topic: &str,
        from_index: u64,
        waits: impl Fn() -> bool,
    ) -> impl Iterator<Item = Result<TopicValue, SyncError>> {
        let mut subscription = self.client.subscribe(topic, from_index);
        let mut over = false;
        std::iter::from_fn(move || {
            if over {
                return None;
            }
            let next = self.runtime.block_on(async {
                if waits() { subscription.wait_next().await } else { subscription.next().await }
            });
            let next = next.transpose();
            over = !matches!(next, Some(Ok(_)));
            next
        })
    }

    /// The same calls as futures, and the runtime to run them on.
    pub(super) fn parts(&self) -> (&Runtime, &super::SyncClient) {
        (&self.runtime, &self.client)
    }
}

fn runtime() -> Result<Runtime, SyncError> {
    Builder::new_current_thread().enable_all().build().map_err(|source| SyncError::Runtime { source })
}
