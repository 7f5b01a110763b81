//! Topics: append-only lists of values in one order for all, bounded in size and count. Pure.
//!
//! ```text
//! a value:  published --> indexed, for ever
//! a wait:   awaited --enough values--> met
//!              |--patience ended, taken back, nobody can publish any more--> over
//! ```
//!
//! Sends nothing and holds no locks. A subscription is one wait after the other: each for the value after the last that
//! its reader has seen.

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
    /// Somebody began to wait for values.
    Awaited {
        /// The call that waits.
        call: CallId,
        /// Who.
        speaker: Speaker,
        /// What it is called.
        label: Arc<str>,
        /// For which topic.
        topic: TopicName,
        /// For which values.
        wanted: Wanted,
        /// With which patience.
        timeout: Duration,
    },
    /// A wait was given up, or whoever waited is over.
    TakenBack {
        /// The call that waited.
        call: CallId,
        /// Why, in a few words.
        reason: String,
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
    /// Note that this call waits now.
    Wait {
        /// The call.
        call: CallId,
    },
    /// A wait is over: tell the call how, unless it was taken back.
    End {
        /// The call.
        call: CallId,
        /// The wait.
        wait: Wait,
        /// How it ended.
        end: End,
    },
    /// Refuse the call.
    Refuse {
        /// The call.
        call: CallId,
        /// Why.
        refusal: Refusal,
    },
}

/// Which values somebody waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// The first so many: at least 1.
    First(u64),
    /// Those from an index on: at least one of them. What a subscription waits for, whose reader may do something else
    /// meanwhile.
    From(u64),
    /// The same for a reader that does nothing else.
    Next(u64),
}

impl Wanted {
    /// How many values the topic must have.
    #[must_use]
    pub fn count(self) -> u64 {
        match self {
            Self::First(count) => count,
            Self::From(index) | Self::Next(index) => index.saturating_add(1),
        }
    }

    /// Whether a subscription waits, for values of which none has come.
    #[must_use]
    pub fn is_subscription(self) -> bool {
        !matches!(self, Self::First(_))
    }

    /// Whether whoever waits may do something else meanwhile.
    #[must_use]
    pub fn listens(self) -> bool {
        matches!(self, Self::From(_))
    }
}

/// A wait for values.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wait {
    /// Who waits.
    pub speaker: Speaker,
    /// What it is called.
    pub label: Arc<str>,
    /// For which topic.
    pub topic: TopicName,
    /// For which values.
    pub wanted: Wanted,
    /// Since when.
    pub began: Instant,
    /// Until when.
    pub deadline: Instant,
}

/// How a wait ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// The values are there.
    Met,
    /// Patience ended: the story.
    TimedOut(String),
    /// Nobody can publish any more: the story.
    GivenUp(String),
    /// Nobody waits any more: why.
    TakenBack(String),
}

#[derive(Debug, Default)]
struct Topic {
    values: Vec<Arc<Value>>,
    size_bytes: usize,
    /// By count, so that a publication looks only at waits that it meets.
    waits: BTreeSet<(u64, CallId)>,
    tokens: HashMap<(Speaker, Arc<str>), u64>,
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
                    }
                }
            }
            Event::Awaited { call, speaker, label, topic, wanted, timeout } => {
                let deadline = now + timeout;
                self.wait(call, Wait { speaker, label, topic, wanted, began: now, deadline }, actions);
            }
            Event::TakenBack { call, reason } => {
                if let Some(wait) = self.forget(call) {
                    actions.push(Action::End { call, wait, end: End::TakenBack(reason) });
                }
            }
            Event::FoundHopeless { call, sentence } => {
                if let Some(wait) = self.forget(call) {
                    let have = self.count(&wait.topic);
                    let sentence = match wait.wanted {
                        Wanted::First(count) => {
                            format!("topic `{}` has {have} of {count} values: {sentence}", wait.topic)
                        }
                        Wanted::From(_) | Wanted::Next(_) => {
                            let have = usize::try_from(have).unwrap_or(usize::MAX);
                            let have = millstream_common::text::counted(have, "value");
                            format!("topic `{}` has {have} and gets no more: {sentence}", wait.topic)
                        }
                    };
                    actions.push(Action::End { call, wait, end: End::GivenUp(sentence) });
                }
            }
            Event::TimePassed => {
                while let Some(&(at, call)) = self.patience.first()
                    && at <= now
                {
                    let Some(wait) = self.forget(call) else { break };
                    let have = self.count(&wait.topic);
                    let waited = millstream_common::text::spoken(now.duration_since(wait.began));
                    let count = wait.wanted.count();
                    let sentence =
                        format!("topic `{}` had {have} of {count} values after {waited}", wait.topic);
                    actions.push(Action::End { call, wait, end: End::TimedOut(sentence) });
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
    pub fn awaited(&self, call: CallId) -> Option<&Wait> {
        self.waits.get(&call)
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
                actions.push(Action::End { call, wait, end: End::Met });
            }
        }
    }

    fn wait(&mut self, call: CallId, wait: Wait, actions: &mut Vec<Action>) {
        let count = wait.wanted.count();
        if self.count(&wait.topic) >= count {
            actions.push(Action::End { call, wait, end: End::Met });
            return;
        }
        if !self.topics.contains_key(&wait.topic) && self.topics.len() >= limits::TOPICS_COUNT_MAX {
            let limit = limits::TOPICS_COUNT_MAX.to_string();
            let refusal = Refusal::Full { what: "too many topics".to_owned(), limit };
            actions.push(Action::Refuse { call, refusal });
            return;
        }
        self.topics.entry(wait.topic.clone()).or_default().waits.insert((count, call));
        self.patience.insert((wait.deadline, call));
        self.waits.insert(call, wait);
        actions.push(Action::Wait { call });
    }

    fn forget(&mut self, call: CallId) -> Option<Wait> {
        let wait = self.waits.remove(&call)?;
        self.patience.remove(&(wait.deadline, call));
        if let Some(topic) = self.topics.get_mut(&wait.topic) {
            topic.waits.remove(&(wait.wanted.count(), call));
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
