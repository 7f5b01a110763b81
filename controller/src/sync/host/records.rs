//! What the board keeps of meetings and topics, as it stands in `test.json`.

use std::time::Instant;

use millstream_common::id::{BarrierName, TaskId, TopicName};
use serde::Serialize;

use crate::sync::{Culprit, Speaker, board::Board};

/// Everything on record, with instants told by the wall clock, which says `wall_ns` at `now`.
pub(super) fn collect(board: &Board, now: Instant, wall_ns: u64) -> SyncRecords {
    let to_wall = |at: Instant| {
        let ago = now.saturating_duration_since(at).as_nanos();
        wall_ns.saturating_sub(u64::try_from(ago).unwrap_or(u64::MAX))
    };
    let barriers = board.records().iter().map(|record| BarrierRecord {
        name: record.name.clone(),
        generation: record.generation,
        parties: record.parties,
        decided_time_ns: to_wall(record.decided),
        released: record.broken.is_none(),
        broken: record.broken.clone(),
        culprit: record.culprit.as_ref().map(|culprit| culprit.label.to_string()),
        culprit_task: record.culprit.as_ref().and_then(Culprit::task),
        last: record.waits.last().map(|wait| wait.label.to_string()),
        by_hand: record.by_hand.clone(),
        waits: record
            .waits
            .iter()
            .map(|wait| WaitRecord {
                party: wait.label.to_string(),
                task: task_of(wait.speaker),
                by_hand: wait.speaker == Speaker::ByHand,
                entered_time_ns: to_wall(wait.entered),
                waited_ns: u64::try_from(wait.waited.as_nanos()).unwrap_or(u64::MAX),
            })
            .collect(),
        omitted_count: record.omitted,
    });
    let barriers = barriers.collect();
    let (waits, waits_omitted_count) = board.topic_waits();
    let waits = waits.iter().map(|wait| TopicWaitRecord {
        topic: wait.topic.clone(),
        party: wait.label.to_string(),
        task: task_of(wait.speaker),
        by_hand: wait.speaker == Speaker::ByHand,
        count: wait.count,
        subscribed: wait.subscribed,
        began_time_ns: to_wall(wait.began),
        waited_ns: u64::try_from(wait.waited.as_nanos()).unwrap_or(u64::MAX),
        failed: wait.failed.clone(),
    });
    let waits = waits.collect();
    let topics = board.topics().list();
    let topics = topics
        .map(|(name, count, size_bytes)| TopicRecord { name: name.clone(), count, size_bytes })
        .collect();
    SyncRecords { barriers, topics, waits, waits_omitted_count }
}

fn task_of(speaker: Speaker) -> Option<TaskId> {
    match speaker {
        Speaker::Task(task) => Some(task),
        Speaker::Main | Speaker::ByHand => None,
    }
}

/// What came of the barriers and topics of a scope, for `test.json`.
#[derive(Debug, Clone, Serialize)]
pub struct SyncRecords {
    /// Every decided meeting, in order of decision.
    pub barriers: Vec<BarrierRecord>,
    /// Every topic.
    pub topics: Vec<TopicRecord>,
    /// Every wait for values of a topic, in the order in which they ended.
    pub waits: Vec<TopicWaitRecord>,
    /// Waits that are not listed, because too many are on record.
    #[serde(skip_serializing_if = "is_zero")]
    pub waits_omitted_count: usize,
}

/// One decided meeting.
#[derive(Debug, Clone, Serialize)]
pub struct BarrierRecord {
    /// Name of the barrier.
    pub name: BarrierName,
    /// Which generation, from 1.
    pub generation: u64,
    /// Parties it needed.
    pub parties: u32,
    /// When it was decided, in nanoseconds since 1970 by the controller's clock.
    pub decided_time_ns: u64,
    /// Whether it was released.
    pub released: bool,
    /// Why it broke.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub broken: Option<String>,
    /// Who broke it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub culprit: Option<String>,
    /// The task that broke it, when it was one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub culprit_task: Option<TaskId>,
    /// Who came last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last: Option<String>,
    /// What people did to it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub by_hand: Vec<String>,
    /// Every party's wait, in order of arrival.
    pub waits: Vec<WaitRecord>,
    /// Parties that are not listed, because too many waits are on record.
    #[serde(skip_serializing_if = "is_zero")]
    pub omitted_count: usize,
}

/// One party's wait.
#[derive(Debug, Clone, Serialize)]
pub struct WaitRecord {
    /// What the party is called.
    pub party: String,
    /// Its task, when it is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub task: Option<TaskId>,
    /// Whether a person entered.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub by_hand: bool,
    /// When it came, in nanoseconds since 1970 by the controller's clock.
    pub entered_time_ns: u64,
    /// How long it waited, in nanoseconds.
    pub waited_ns: u64,
}

/// One topic.
#[derive(Debug, Clone, Serialize)]
pub struct TopicRecord {
    /// Its name.
    pub name: TopicName,
    /// Number of its values.
    pub count: u64,
    /// Bytes of its values.
    pub size_bytes: u64,
}

/// One wait for values of a topic.
#[derive(Debug, Clone, Serialize)]
pub struct TopicWaitRecord {
    /// The topic.
    pub topic: TopicName,
    /// Who waited.
    pub party: String,
    /// Its task, when it is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub task: Option<TaskId>,
    /// Whether a person waited.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub by_hand: bool,
    /// How many values the topic had to have.
    pub count: u64,
    /// Whether it was a subscription that waited for its next value.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub subscribed: bool,
    /// When it began, in nanoseconds since 1970 by the controller's clock.
    pub began_time_ns: u64,
    /// How long it lasted, in nanoseconds.
    pub waited_ns: u64,
    /// Why it ended without the values; none: it got them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failed: Option<String>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks with a reference")]
fn is_zero(count: &usize) -> bool {
    *count == 0
}
