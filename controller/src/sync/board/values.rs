//! The part of the board that passes on what concerns topics: waits for values are noted, counted, answered and put on
//! record. Pure.

use std::time::{Duration, Instant};

use millstream_common::{id::TopicName, limits};

use super::{Action, Answer, Board, Place, TopicWaitRecord};
use crate::sync::{
    CallId, Refusal, Speaker,
    hopeless::Wait,
    topic::{self, End, Wanted},
};

/// Waits for values in the results.
const RECORDED_TOPIC_WAITS_COUNT_MAX: usize = 100_000;

impl Board {
    #[expect(clippy::too_many_arguments, reason = "the request, taken apart by its only caller")]
    pub(super) fn await_values(
        &mut self,
        call: CallId,
        speaker: Speaker,
        topic: TopicName,
        wanted: Wanted,
        timeout: Duration,
        now: Instant,
        actions: &mut Vec<Action>,
    ) {
        let label = self.label(speaker);
        let event = topic::Event::Awaited { call, speaker, label, topic, wanted, timeout };
        self.feed_topics(event, now, actions);
        if self.topics.awaited(call).is_none() {
            return;
        }
        let wait = Wait::Topic(call.0);
        self.remember(call, Place { speaker, wait });
        match speaker {
            // A person who looks on is not told to go.
            Speaker::ByHand if wanted.is_subscription() => {}
            Speaker::Main if wanted.listens() => self.prospects.listener_came(wait, None),
            Speaker::Task(task) if wanted.listens() => {
                self.prospects.listener_came(wait, Some(task));
            }
            Speaker::Main | Speaker::ByHand => self.prospects.wait_needs(wait, None, 1, false),
            Speaker::Task(task) => {
                self.prospects.wait_needs(wait, None, 1, false);
                self.prospects.task_waits(task, wait);
            }
        }
    }

    pub(super) fn feed_topics(&mut self, event: topic::Event, now: Instant, actions: &mut Vec<Action>) {
        let mut orders = Vec::new();
        self.topics.handle(event, now, &mut orders);
        for order in orders {
            let (call, answer) = match order {
                topic::Action::Wait { .. } => continue,
                topic::Action::Indexed { call, index } => (call, Answer::Indexed(index)),
                topic::Action::Refuse { call, refusal } => (call, Answer::Refused(refusal)),
                topic::Action::End { call, wait, end } => {
                    self.record_topic_wait(&wait, &end, now);
                    let answer = match end {
                        End::Met => self.values(&wait.topic, wait.wanted),
                        End::TimedOut(sentence) => Answer::TimedOut(sentence),
                        End::GivenUp(sentence) => Answer::GivenUp(sentence),
                        End::TakenBack(_) => continue,
                    };
                    (call, answer)
                }
            };
            if let Some(place) = self.forget(call) {
                self.prospects.wait_ended(place.wait);
            }
            actions.push(Action::Answer { call, answer });
        }
    }

    fn values(&self, topic: &TopicName, wanted: Wanted) -> Answer {
        let (from, count) = match wanted {
            Wanted::From(index) | Wanted::Next(index) => (index, 1),
            Wanted::First(count) => (0, usize::try_from(count).unwrap_or(usize::MAX)),
        };
        let mut values = self.topics.values(topic, from, limits::SYNC_ANSWER_BYTES_MAX);
        if values.len() < count {
            return Answer::Refused(Refusal::Full {
                what: format!(
                    "the first {count} values of topic `{topic}` do not fit in one answer: subscribe to it"
                ),
                limit: format!("{} bytes", limits::SYNC_ANSWER_BYTES_MAX),
            });
        }
        if let Wanted::First(_) = wanted {
            values.truncate(count);
        }
        Answer::Values(values)
    }

    /// Notes a wait for the results. A subscription that found values had nothing to wait for.
    fn record_topic_wait(&mut self, wait: &topic::Wait, end: &End, now: Instant) {
        if wait.wanted.is_subscription() && wait.began == now && *end == End::Met {
            return;
        }
        if self.topic_waits.len() >= RECORDED_TOPIC_WAITS_COUNT_MAX {
            self.topic_waits_omitted += 1;
            return;
        }
        self.topic_waits.push(TopicWaitRecord {
            speaker: wait.speaker,
            label: wait.label.clone(),
            topic: wait.topic.clone(),
            count: wait.wanted.count(),
            subscribed: wait.wanted.is_subscription(),
            began: wait.began,
            waited: now.duration_since(wait.began),
            failed: match end {
                End::Met => None,
                End::TimedOut(why) | End::GivenUp(why) | End::TakenBack(why) => Some(why.clone()),
            },
        });
    }
}
