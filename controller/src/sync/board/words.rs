//! What the board is told and what it says: its events, actions and answers. Pure.
//!
//! Words only: [`super::Board`] gives them their meaning.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use millstream_common::{
    id::{BarrierName, BlockName, StreamName, TaskId, TopicName},
    sync_client::Parties,
};

use crate::sync::{
    CallId, Culprit, Refusal, Speaker,
    barrier::{Decided, Decision},
    topic::{Content, Value, Wanted},
};

/// Where a task stands: its stream, its number there, its block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpeakerLabel {
    /// The stream.
    pub stream: StreamName,
    /// Its number in the stream, from 1. A larger number runs later.
    pub number: u32,
    /// The block.
    pub block: BlockName,
}

/// What became of a task.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TaskFate {
    /// Whether nobody had asked for or expected this end.
    pub unexpected: bool,
    /// What it did, to stand behind its name: `failed with exit code 1`.
    pub sentence: String,
    /// The last line it printed.
    pub last_line: Option<String>,
}

/// What a call asks for.
#[derive(Debug, Clone)]
pub enum Request {
    /// Take part in a barrier.
    Enter {
        /// Which.
        barrier: BarrierName,
        /// How many parties it is for.
        parties: Parties,
        /// Patience.
        timeout: Duration,
        /// By what the party is known again.
        token: Option<Arc<str>>,
        /// What it brings.
        payload: Bytes,
        /// What it wants to be called.
        display_name: Option<String>,
    },
    /// Break a barrier.
    Abort {
        /// Which.
        barrier: BarrierName,
        /// Why.
        reason: String,
    },
    /// Make a broken barrier usable again.
    Reset {
        /// Which.
        barrier: BarrierName,
    },
    /// Set a break point or take it away.
    Hold {
        /// Which.
        barrier: BarrierName,
        /// True to let it go.
        release: bool,
    },
    /// Append a value.
    Publish {
        /// Where.
        topic: TopicName,
        /// What.
        content: Content,
        /// Makes a repeat harmless.
        token: Option<Arc<str>>,
    },
    /// Wait for values.
    Await {
        /// Where.
        topic: TopicName,
        /// Which.
        wanted: Wanted,
        /// Patience.
        timeout: Duration,
    },
}

/// What happened.
#[derive(Debug, Clone)]
pub enum Event {
    /// A task was put behind the others of its stream.
    TaskScheduled {
        /// The task.
        task: TaskId,
        /// Where it stands.
        label: SpeakerLabel,
        /// The only barriers it takes part in; none: any.
        joins: Option<Vec<BarrierName>>,
        /// Size of the group that its block was run on.
        group_size: Option<u32>,
    },
    /// There are so many streams now.
    StreamsDefined {
        /// How many.
        count: u32,
    },
    /// A task does something else now.
    TaskProgressed {
        /// The task.
        task: TaskId,
        /// What, as one line.
        text: String,
    },
    /// A task ended.
    TaskEnded {
        /// The task.
        task: TaskId,
        /// What became of it.
        fate: TaskFate,
    },
    /// The host of these tasks does not answer.
    SessionSuspended {
        /// The tasks.
        tasks: Vec<TaskId>,
    },
    /// It answers again.
    SessionResumed {
        /// The tasks.
        tasks: Vec<TaskId>,
    },
    /// Main has begun a wait for the end, or has left one.
    MainWaited {
        /// Whether it has begun one.
        waiting: bool,
    },
    /// Main has said which barriers it will still send somebody to.
    MainDeclared {
        /// The barriers.
        names: Vec<BarrierName>,
    },
    /// Somebody asks for something.
    Asked {
        /// The call that is to be answered.
        call: CallId,
        /// Who.
        speaker: Speaker,
        /// What.
        request: Request,
    },
    /// A call that waited is gone.
    Left {
        /// The call.
        call: CallId,
        /// Whether the connection took it along, not its caller.
        link_down: bool,
    },
    /// Time went by.
    TimePassed,
}

/// What is to be done.
#[derive(Debug)]
pub enum Action {
    /// Answer a call. One that nobody waits for any more needs none.
    Answer {
        /// The call.
        call: CallId,
        /// What to say.
        answer: Answer,
    },
}

/// What a call is told.
#[derive(Debug, Clone)]
pub enum Answer {
    /// Everybody came.
    Released {
        /// The meeting.
        decided: Arc<Decided>,
        /// The caller's place in it.
        arrival: u32,
    },
    /// Not everybody will have come.
    Broken {
        /// The meeting.
        decided: Arc<Decided>,
        /// The caller's place in it; none: it came too late.
        arrival: Option<u32>,
    },
    /// The value has this index.
    Indexed(u64),
    /// The values waited for.
    Values(Vec<Arc<Value>>),
    /// Patience ended.
    TimedOut(String),
    /// Nobody is left who could publish.
    GivenUp(String),
    /// It is done.
    Done,
    /// It is refused.
    Refused(Refusal),
}

/// A meeting as it is kept for the results.
#[derive(Debug, Clone)]
pub struct MeetingRecord {
    /// Name of the barrier.
    pub name: BarrierName,
    /// Which generation.
    pub generation: u64,
    /// Parties it needed.
    pub parties: u32,
    /// When it was decided.
    pub decided: Instant,
    /// Why it broke; none: it was released.
    pub broken: Option<String>,
    /// Who broke it.
    pub culprit: Option<Culprit>,
    /// What people did to it.
    pub by_hand: Vec<String>,
    /// Who came, in order; the last one came last.
    pub waits: Vec<WaitRecord>,
    /// Parties that are not listed, because too many waits are on record.
    pub omitted: usize,
}

/// One party's wait.
#[derive(Debug, Clone)]
pub struct WaitRecord {
    /// Who.
    pub speaker: Speaker,
    /// What it is called.
    pub label: Arc<str>,
    /// When it came.
    pub entered: Instant,
    /// How long it waited.
    pub waited: Duration,
}

/// A wait for values of a topic as it is kept for the results.
#[derive(Debug, Clone)]
pub struct TopicWaitRecord {
    /// Who waited.
    pub speaker: Speaker,
    /// What it is called.
    pub label: Arc<str>,
    /// For which topic.
    pub topic: TopicName,
    /// How many values the topic had to have.
    pub count: u64,
    /// Whether it was a subscription that waited for its next value.
    pub subscribed: bool,
    /// When it began.
    pub began: Instant,
    /// How long it lasted.
    pub waited: Duration,
    /// Why it ended without the values; none: it got them.
    pub failed: Option<String>,
}

impl Answer {
    pub(super) fn of(decided: &Arc<Decided>, arrival: Option<u32>) -> Self {
        match (&decided.decision, arrival) {
            (Decision::Released, Some(arrival)) => Self::Released { decided: decided.clone(), arrival },
            _ => Self::Broken { decided: decided.clone(), arrival },
        }
    }
}

impl Request {
    /// What blocks may not do.
    pub(super) fn reserved(&self) -> Option<&'static str> {
        match self {
            Self::Reset { .. } => Some("reset a barrier"),
            Self::Hold { .. } => Some("hold a barrier"),
            Self::Enter { .. } | Self::Abort { .. } | Self::Publish { .. } | Self::Await { .. } => None,
        }
    }
}
