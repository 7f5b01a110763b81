//! Why main did not get what it asked the host for.

use millstream_common::id::{BarrierName, TopicName};

use crate::sync::{Culprit, Refusal};

/// Why main, or whoever else asked for it, did not pass a barrier.
#[derive(Debug, Clone, thiserror::Error)]
pub enum EnterError {
    /// The meeting broke.
    #[error("{message}")]
    Broken {
        /// Who broke it, where, why, and how long was waited.
        message: String,
        /// Who it was, if it was one.
        culprit: Option<Culprit>,
    },
    /// The entry cannot be.
    #[error("barrier `{name}` was not entered")]
    Refused {
        /// The barrier.
        name: BarrierName,
        /// Why.
        #[source]
        source: Refusal,
    },
    /// The test is over.
    #[error("barrier `{name}` was not entered: the test is over")]
    Over {
        /// The barrier.
        name: BarrierName,
    },
}

/// Why a value was not published.
#[derive(Debug, Clone, thiserror::Error)]
pub enum PublishError {
    /// The value cannot be taken.
    #[error("nothing was published to topic `{topic}`")]
    Refused {
        /// The topic.
        topic: TopicName,
        /// Why.
        #[source]
        source: Refusal,
    },
    /// The test is over.
    #[error("nothing was published to topic `{topic}`: the test is over")]
    Over {
        /// The topic.
        topic: TopicName,
    },
}

/// Why a wait for values ended without them.
#[derive(Debug, Clone, thiserror::Error)]
pub enum AwaitError {
    /// Patience ended.
    #[error("{0}")]
    TimedOut(String),
    /// Nobody is left who could publish.
    #[error("{0}")]
    GivenUp(String),
    /// It cannot be waited for.
    #[error("topic `{topic}` was not waited for")]
    Refused {
        /// The topic.
        topic: TopicName,
        /// Why.
        #[source]
        source: Refusal,
    },
    /// The test is over.
    #[error("topic `{topic}` was not waited for: the test is over")]
    Over {
        /// The topic.
        topic: TopicName,
    },
}
