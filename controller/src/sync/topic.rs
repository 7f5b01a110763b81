//! Topics: append-only lists of values in one order for all, bounded in size and count. Pure.
//!
//! ```text
//! a value:  published --> indexed, for ever
//! a wait:   awaited --enough values--> met
//!              |--patience ended, taken back, nobody can publish any more--> over
//! ```
//!
//! Sends nothing and holds no locks. Who subscribes is not known here: a topic that grew is reported, and whoever reads
//! asks for what lies after the last index it has seen.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
    time::{Duration, Instant},
};

use indexmap::IndexMap;
pub use millstream_common::sync_client::Content;
use millstream_common::{id::TopicName, limits};

use super::{CallId, Refusal, Speaker};

/// One value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Value {
    /// Its index, from 0.
    pub index: u64,
    /// What it is.
    pub content: Content,
    /// What its publisher is called.
    pub publisher: Arc<str>,
}

/// What happened.
#[derive(Debug, Clone)]
pub enum Event {
    /// Somebody published a value.
    Published {
        /// The call that asked.
        call: CallId,
        /// Who.
        speaker: Speaker,
        /// What the publisher is called.
        label: Arc<str>,
        /// Where.
        topic: TopicName,
        /// What.
        content: Content,
        /// Makes a repeat of the same publisher harmless.
        token: Option<Arc<str>>,
    },
    /// Somebody began to wait for a number of values.
    Awaited {
        /// The call that waits.
        call: CallId,
        /// For which topic.
        topic: TopicName,
        /// For how many values: at least 1.
        count: u64,
        /// With which patience.
        timeout: Duration,
    },
    /// A wait was given up, or whoever waited is over.
    TakenBack {
        /// The call that waited.
        call: CallId,
    },
    /// Nobody is left who could publish what this call waits for.
    FoundHopeless {
        /// The call that waits.
        call: CallId,
        /// Why.
        sentence: String,
    },
    /// Time went by.
    TimePassed,
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Tell the publisher its index.
    Indexed {
        /// The call.
        call: CallId,
        /// The index, from 0.
        index: u64,
    },
    /// Wake whoever reads this topic.
    Grew {
        /// The topic.
        topic: TopicName,
    },
    /// Note that this call waits now.
    Wait {
        /// The call.
        call: CallId,
    },
    /// Give the call the first `count` values.
    Met {
        /// The call.
        call: CallId,
        /// The topic.
        topic: TopicName,
        /// How many.
        count: u64,
    },
    /// Tell the call that its patience ended.
    TimedOut {
        /// The call.
        call: CallId,
        /// The story.
        sentence: String,
    },
    /// Tell the call that nobody can publish any more.
    GiveUp {
        /// The call.
        call: CallId,
        /// The story.
        sentence: String,
    },
    /// Refuse the call.
    Refuse {
        /// The call.
        call: CallId,
        /// Why.
        refusal: Refusal,
    },
}

#[derive(Debug, Default)]
struct Topic {
    values: Vec<Arc<Value>>,
    size_bytes: usize,
    /// By count, so that a publication looks only at waits that it meets.
    waits: BTreeSet<(u64, CallId)>,
    tokens: HashMap<(Speaker, Arc<str>), u64>,
}

#[derive(Debug, Clone)]
struct Wait {
    topic: TopicName,
    count: u64,
    began: Instant,
    deadline: Instant,
}

/// All topics of a scope.
#[derive(Debug, Default)]
pub struct Topics {
    topics: IndexMap<TopicName, Topic>,
    waits: BTreeMap<CallId, Wait>,
    patience: BTreeSet<(Instant, CallId)>,
    size_bytes: usize,
}

impl Topics {
    /// Takes in one event. Never blocks and never reads a clock.
    pub fn handle(&mut self, event: Event, now: Instant, actions: &mut Vec<Action>) {
        match event {
            Event::Published { call, speaker, label, topic, content, token } => {
                match self.publish(speaker, label, &topic, content, token) {
                    Err(refusal) => actions.push(Action::Refuse { call, refusal }),
                    Ok((index, false)) => actions.push(Action::Indexed { call, index }),
                    Ok((index, true)) => {
                        actions.push(Action::Indexed { call, index });
                        self.meet(&topic, index + 1, actions);
                        actions.push(Action::Grew { topic });
                    }
                }
            }
            Event::Awaited { call, topic, count, timeout } => {
                self.wait(call, topic, count, timeout, now, actions)
            }
            Event::TakenBack { call } => {
                self.forget(call);
            }
            Event::FoundHopeless { call, sentence } => {
                if let Some(wait) = self.forget(call) {
                    let have = self.count(&wait.topic);
                    let sentence =
                        format!("topic `{}` has {have} of {} values: {sentence}", wait.topic, wait.count);
                    actions.push(Action::GiveUp { call, sentence });
                }
            }
            Event::TimePassed => {
                while let Some(&(at, call)) = self.patience.first()
                    && at <= now
                {
                    let Some(wait) = self.forget(call) else { break };
                    let have = self.count(&wait.topic);
                    let waited = millstream_common::text::spoken(now.duration_since(wait.began));
                    let sentence =
                        format!("topic `{}` had {have} of {} values after {waited}", wait.topic, wait.count);
                    actions.push(Action::TimedOut { call, sentence });
                }
            }
        }
    }

    /// The next moment at which time alone changes something.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Instant> {
        self.patience.first().map(|&(at, _)| at)
    }

    /// The values of a topic from an index on: as many as fit in `size_bytes_max`, but at least one if there is one.
    #[must_use]
    pub fn values(&self, topic: &TopicName, from: u64, size_bytes_max: usize) -> Vec<Arc<Value>> {
        let Some(topic) = self.topics.get(topic) else { return Vec::new() };
        let from = usize::try_from(from).unwrap_or(usize::MAX).min(topic.values.len());
        let mut size_bytes = 0;
        let fits = |value: &&Arc<Value>| {
            let first = size_bytes == 0;
            size_bytes += envelope_bytes(value);
            first || size_bytes <= size_bytes_max
        };
        topic.values[from..].iter().take_while(fits).cloned().collect()
    }

    /// Number of values of a topic.
    #[must_use]
    pub fn count(&self, topic: &TopicName) -> u64 {
        self.topics.get(topic).map_or(0, |t| t.values.len() as u64)
    }

    /// What a call waits for, if it waits.
    #[must_use]
    pub fn awaited(&self, call: CallId) -> Option<(&TopicName, Instant)> {
        self.waits.get(&call).map(|wait| (&wait.topic, wait.began))
    }

    /// Every topic in order of first publication: name, values, bytes.
    pub fn list(&self) -> impl Iterator<Item = (&TopicName, u64, u64)> {
        self.topics
            .iter()
            .filter(|(_, topic)| !topic.values.is_empty())
            .map(|(name, topic)| (name, topic.values.len() as u64, topic.size_bytes as u64))
    }

    /// Appends a value. The flag is false when it was there already.
    fn publish(
        &mut self,
        speaker: Speaker,
        publisher: Arc<str>,
        name: &TopicName,
        content: Content,
        token: Option<Arc<str>>,
    ) -> Result<(u64, bool), Refusal> {
        let full = |what: String, limit: String| Err(Refusal::Full { what, limit });
        if let (Some(token), Some(topic)) = (&token, self.topics.get(name))
            && let Some(&index) = topic.tokens.get(&(speaker, token.clone()))
        {
            return Ok((index, false));
        }
        if content.len() > limits::TOPIC_VALUE_BYTES_MAX {
            let what = format!("the value for topic `{name}` has {} bytes", content.len());
            return full(what, format!("{} bytes", limits::TOPIC_VALUE_BYTES_MAX));
        }
        if self.size_bytes + content.len() > limits::TOPICS_BYTES_MAX {
            let what = format!("the topics of this test are full with {} bytes", self.size_bytes);
            return full(what, format!("{} bytes", limits::TOPICS_BYTES_MAX));
        }
        if !self.topics.contains_key(name) && self.topics.len() >= limits::TOPICS_COUNT_MAX {
            return full("too many topics".to_owned(), limits::TOPICS_COUNT_MAX.to_string());
        }
        let topic = self.topics.entry(name.clone()).or_default();
        if topic.values.len() >= limits::TOPIC_VALUES_COUNT_MAX {
            return full(
                format!("topic `{name}` is full"),
                format!("{} values", limits::TOPIC_VALUES_COUNT_MAX),
            );
        }
        let index = topic.values.len() as u64;
        topic.size_bytes += content.len();
        self.size_bytes += content.len();
        if let Some(token) = token {
            topic.tokens.insert((speaker, token), index);
        }
        topic.values.push(Arc::new(Value { index, content, publisher }));
        Ok((index, true))
    }

    /// Answers every wait that `have` values are enough for.
    fn meet(&mut self, name: &TopicName, have: u64, actions: &mut Vec<Action>) {
        let Some(topic) = self.topics.get_mut(name) else { return };
        while let Some(&(count, call)) = topic.waits.first()
            && count <= have
        {
            topic.waits.pop_first();
            if let Some(wait) = self.waits.remove(&call) {
                self.patience.remove(&(wait.deadline, call));
            }
            actions.push(Action::Met { call, topic: name.clone(), count });
        }
    }

    fn wait(
        &mut self,
        call: CallId,
        name: TopicName,
        count: u64,
        timeout: Duration,
        now: Instant,
        actions: &mut Vec<Action>,
    ) {
        if self.count(&name) >= count {
            actions.push(Action::Met { call, topic: name, count });
            return;
        }
        if !self.topics.contains_key(&name) && self.topics.len() >= limits::TOPICS_COUNT_MAX {
            let limit = limits::TOPICS_COUNT_MAX.to_string();
            actions.push(Action::Refuse {
                call,
                refusal: Refusal::Full { what: "too many topics".to_owned(), limit },
            });
            return;
        }
        let deadline = now + timeout;
        self.topics.entry(name.clone()).or_default().waits.insert((count, call));
        self.patience.insert((deadline, call));
        self.waits.insert(call, Wait { topic: name, count, began: now, deadline });
        actions.push(Action::Wait { call });
    }

    fn forget(&mut self, call: CallId) -> Option<Wait> {
        let wait = self.waits.remove(&call)?;
        self.patience.remove(&(wait.deadline, call));
        if let Some(topic) = self.topics.get_mut(&wait.topic) {
            topic.waits.remove(&(wait.count, call));
        }
        Some(wait)
    }

    #[cfg(test)]
    pub(crate) fn assert_invariants(&self) {
        assert_eq!(self.waits.len(), self.patience.len(), "every wait has a deadline");
        let waiting: usize = self.topics.values().map(|t| t.waits.len()).sum();
        assert_eq!(self.waits.len(), waiting, "every wait is known to its topic");
        let size_bytes: usize = self.topics.values().map(|t| t.size_bytes).sum();
        assert_eq!(self.size_bytes, size_bytes);
        for topic in self.topics.values() {
            let have = topic.values.len() as u64;
            assert!(topic.waits.iter().all(|&(count, _)| count > have), "a wait that is met is answered");
            assert!(
                topic.values.iter().zip(0..).all(|(value, index)| value.index == index),
                "one order for all"
            );
        }
    }
}

/// Upper bound of a value's size in a message.
fn envelope_bytes(value: &Value) -> usize {
    value.content.len() + value.publisher.len() + 32
}
