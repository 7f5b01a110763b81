//! Main's subscription to a topic: one wait after the other, each for what lies after the last value that was given.

use std::sync::Arc;

use millstream_common::{id::TopicName, limits};

use super::{AwaitError, SyncHost, values_of};
use crate::sync::{
    Speaker,
    board::Request,
    topic::{Value, Wanted},
};

/// The values of a topic, one batch after the other. Dropping it ends it.
#[derive(Debug)]
pub struct Subscription {
    host: SyncHost,
    topic: TopicName,
    next: u64,
}

impl Subscription {
    pub(super) fn new(host: SyncHost, topic: TopicName, next: u64) -> Self {
        Self { host, topic, next }
    }

    /// The next values, in order: at least one. Waits until there are some.
    ///
    /// # Errors
    /// When nobody is left who could publish, or none came for 7 days. The subscription may be asked again.
    ///
    /// # Cancel safety
    /// Nothing is lost when the future is dropped.
    pub async fn next(&mut self) -> Result<Vec<Arc<Value>>, AwaitError> {
        let request = Request::Await {
            topic: self.topic.clone(),
            wanted: Wanted::From(self.next),
            timeout: limits::WAIT_MAX,
        };
        let values = values_of(self.host.ask(Speaker::Main, request, None).await, self.topic.clone())?;
        self.next += values.len() as u64;
        Ok(values)
    }
}
