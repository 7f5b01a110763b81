//! What a barrier is told and what it says, and what a meeting is. Pure.
//!
//! Words only: [`super::Barrier`] gives them their meaning.

use std::{
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use bytes::Bytes;
use millstream_common::id::BarrierName;

use crate::sync::{CallId, Culprit, Refusal, Speaker};

/// A wish to take part.
#[derive(Debug, Clone)]
pub struct Entry {
    /// The call that waits for the decision.
    pub call: CallId,
    /// Who enters.
    pub speaker: Speaker,
    /// What it is called on the board.
    pub label: Arc<str>,
    /// By what it is known again.
    pub token: Option<Arc<str>>,
    /// Parties that it expects, itself included.
    pub parties: u32,
    /// Its patience.
    pub timeout: Duration,
    /// What it brings.
    pub payload: Bytes,
}

/// What happened.
#[derive(Debug, Clone)]
pub enum Event {
    /// A party came, or came again.
    Entered(Entry),
    /// A party's call ended before the decision.
    Lost {
        /// The call.
        call: CallId,
        /// How long the party still counts as entered.
        grace: Grace,
    },
    /// The grace of a party that is lost is another from now on; a party that is not lost is not touched.
    Regraced {
        /// Its last call.
        call: CallId,
        /// How long it still counts as entered.
        grace: Grace,
    },
    /// What stood behind a party is over.
    Died {
        /// Its last call.
        call: CallId,
        /// What became of it.
        sentence: String,
    },
    /// Somebody broke the barrier on purpose.
    Aborted {
        /// Who.
        by: Culprit,
        /// Why.
        reason: String,
    },
    /// Whoever is missing cannot come.
    FoundHopeless {
        /// Why, in one sentence.
        sentence: String,
        /// Whose end it was.
        culprit: Option<Culprit>,
    },
    /// Main or a person made the name usable again.
    Reset,
    /// A break point was set.
    Held,
    /// A break point was taken away.
    LetGo,
    /// Time went by.
    TimePassed,
}

/// How long a lost party still counts as entered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Grace {
    /// It cannot come back.
    None,
    /// Until its host answers again: the lease decides.
    Suspended,
    /// For a while.
    For(Duration),
}

/// What is to be done.
#[derive(Debug)]
pub enum Action {
    /// Note that this call waits now.
    Wait {
        /// The call.
        call: CallId,
    },
    /// Tell the older call that a newer one stands for the same party.
    Supersede {
        /// The older call.
        old: CallId,
        /// The newer one, which waits now.
        call: CallId,
    },
    /// Answer from the record: the decision fell before.
    Deliver {
        /// The call.
        call: CallId,
        /// Who asked.
        speaker: Speaker,
        /// What was decided.
        decided: Arc<Decided>,
        /// Its place, when it was a party.
        arrival: Option<u32>,
    },
    /// Refuse the call.
    Refuse {
        /// The call.
        call: CallId,
        /// Why.
        refusal: Refusal,
    },
    /// Add evidence, hand the decision to `Barrier::latch`, then tell every arrival.
    Decide(Box<Decided>),
}

/// One meeting.
#[derive(Debug, Clone)]
pub struct Meeting {
    /// Name of the barrier.
    pub name: BarrierName,
    /// Which generation, from 1.
    pub generation: u64,
    /// Parties it needs. Zero when it was broken before anybody came.
    pub parties: u32,
    /// Who came, in order.
    pub arrivals: Vec<Arrival>,
    /// What people did to it.
    pub by_hand: Vec<String>,
}

/// A party that has come.
#[derive(Debug, Clone)]
pub struct Arrival {
    /// Its last call.
    pub call: CallId,
    /// Who it is.
    pub speaker: Speaker,
    /// What it is called.
    pub label: Arc<str>,
    /// By what it is known again.
    pub token: Option<Arc<str>>,
    /// What it brought.
    pub payload: Bytes,
    /// When it came.
    pub entered: Instant,
    /// When its patience ends.
    pub deadline: Instant,
    /// Whether it is there.
    pub connection: Connection,
}

/// Whether a party is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Connection {
    /// Its call waits.
    Up,
    /// Its call is gone; it counts as entered until then. None: until its host answers again.
    Lost {
        /// The end of the grace.
        until: Option<Instant>,
    },
}

/// A meeting and what was decided, for ever.
#[derive(Debug, Clone)]
pub struct Decided {
    /// The meeting as it was.
    pub meeting: Meeting,
    /// When.
    pub at: Instant,
    /// What.
    pub decision: Decision,
    /// Room for what the owner sends to all parties alike, made once.
    pub encoded: OnceLock<Bytes>,
}

/// The two ends of a meeting.
#[derive(Debug, Clone)]
pub enum Decision {
    /// All came.
    Released,
    /// Not all will have come.
    Broken(Break),
}

/// Why a meeting broke.
#[derive(Debug, Clone)]
pub struct Break {
    /// What kind of end it was.
    pub cause: Cause,
    /// Who broke it, if it was one.
    pub culprit: Option<Culprit>,
    /// The whole story but for how long the reader waited.
    pub sentence: String,
}

/// The kinds of a break.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// A party's patience ended.
    TimedOut,
    /// A party was away for longer than the grace.
    Lost,
    /// A party's task ended.
    Died,
    /// On purpose.
    Aborted,
    /// Two parties expected different numbers.
    OtherCount,
    /// Whoever is missing cannot come.
    Hopeless,
}

impl Decided {
    /// Why it broke, if it did.
    #[must_use]
    pub fn as_break(&self) -> Option<&Break> {
        match &self.decision {
            Decision::Released => None,
            Decision::Broken(cause) => Some(cause),
        }
    }

    /// Bytes of payload that it keeps alive.
    #[must_use]
    pub fn payload_bytes(&self) -> usize {
        self.meeting.arrivals.iter().map(|a| a.payload.len()).sum()
    }

    /// How long the party at this place waited.
    #[must_use]
    pub fn waited(&self, arrival: u32) -> Duration {
        let entered = self.meeting.arrivals.get(arrival as usize).map_or(self.at, |a| a.entered);
        self.at.duration_since(entered)
    }
}
