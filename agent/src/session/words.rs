//! What the machine of sessions is told, what it orders, and why it refuses. Pure.

use std::{fmt, time::Duration};

use millstream_common::{
    id::SessionId,
    protocol::{ASK_AGAIN, SESSION_LOST},
    text::{counted, spoken},
};

/// Number of one asking, by which its answer finds back.
pub type Ticket = u64;

/// Who has a session: the identity in a certificate, or a user of this host. Compared, and shown to people.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct Owner(pub String);

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What only the controller of a session knows. Never shown.
#[derive(Clone, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// Takes 32 lower-case hexadecimal digits.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let is_digit = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
        (text.len() == 32 && text.bytes().all(is_digit)).then(|| Self(text.to_owned()))
    }

    /// Whether both are the same, in a time that does not depend on where they differ.
    pub(super) fn matches(&self, other: &Self) -> bool {
        let differing = self.0.bytes().zip(other.0.bytes()).fold(0, |sum, (a, b)| sum | (a ^ b));
        self.0.len() == other.0.len() && differing == 0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

/// What a controller asks for.
#[derive(Debug, Clone)]
pub struct Asking {
    /// The session.
    pub session_id: SessionId,
    /// Its secret.
    pub secret: Secret,
    /// Who asks.
    pub owner: Owner,
    /// What the controller calls itself.
    pub client: String,
    /// How long the session lives without a word.
    pub lease: Duration,
    /// Whether the host is to be reserved.
    pub exclusive: bool,
    /// Whether the session must exist already.
    pub resume: bool,
    /// How long it may be kept waiting for an answer.
    pub patience: Duration,
}

/// How a call shows that it belongs to a session.
#[derive(Debug, Clone)]
pub struct Key {
    /// The session.
    pub session_id: SessionId,
    /// From the newest opening.
    pub epoch: u64,
    /// The secret.
    pub secret: Secret,
}

/// What a call does to its session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Reads what is there: still possible while the results of an expired session are kept.
    Read,
    /// Changes something.
    Change,
    /// Ends the session: possible with any epoch that it has had, for whoever ends it never comes back to it. A controller
    /// that comes back and does not hear of it must be able to end what it has given up.
    End,
}

/// A session as it was found on disk at the start of the agent.
#[derive(Debug, Clone)]
pub struct Found {
    /// The session.
    pub session_id: SessionId,
    /// Its secret.
    pub secret: Secret,
    /// Who has it.
    pub owner: Owner,
    /// What the controller calls itself.
    pub client: String,
    /// Its newest epoch.
    pub epoch: u64,
    /// Its lease.
    pub lease: Duration,
    /// What is left of it.
    pub lease_left: Duration,
    /// Whether the host is reserved for it.
    pub exclusive: bool,
    /// When it was opened, for people.
    pub open_time_ns: u64,
}

/// That an agent takes nothing new. All of it is for people.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Drain {
    /// Why, as whoever said it has written; may be empty.
    pub reason: String,
    /// Who said it.
    pub by: Owner,
    /// When it began, such as `2026-11-21T22:37:25Z`.
    pub since: String,
}

impl fmt::Display for Drain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "since {} by {}", self.since, self.by)?;
        if self.reason.is_empty() { Ok(()) } else { write!(f, ": {}", self.reason) }
    }
}

/// What has happened.
#[derive(Debug, Clone)]
pub enum Event {
    /// A controller asks for a session. `wall_ns` is shown to people.
    Asked {
        /// By which the answer finds back.
        ticket: Ticket,
        /// What it asks for.
        asking: Asking,
        /// The time, for people.
        wall_ns: u64,
    },
    /// Whoever asked has gone; its place in the line is kept for a while.
    Left {
        /// The asking.
        ticket: Ticket,
    },
    /// A session was found on disk.
    Found(Found),
    /// A controller has renewed the lease of a session.
    Kept {
        /// The session.
        session_id: SessionId,
    },
    /// The supervisor says that the lease is over.
    LeaseExpired {
        /// The session.
        session_id: SessionId,
    },
    /// All tasks of an expired session have ended: it holds the host no longer.
    Settled {
        /// The session.
        session_id: SessionId,
    },
    /// The supervisor of a session is gone without having been told to: nothing of the session runs any more.
    SupervisorDied {
        /// The session.
        session_id: SessionId,
    },
    /// A session is being closed: from now on nothing of it may change.
    Closing {
        /// The session.
        session_id: SessionId,
    },
    /// Everything of a session is gone.
    Closed {
        /// The session.
        session_id: SessionId,
    },
    /// A controller gives up what it asked for, before it got it. Nothing happens to a session that is open.
    Withdrawn {
        /// The session that it asked for.
        key: Key,
        /// Who it is.
        owner: Owner,
    },
    /// A session that was just given could not be begun on this host, or whoever asked for it went before it was: its number
    /// may be used again. Nothing happens when its controller has come back meanwhile.
    Abandoned {
        /// The session.
        session_id: SessionId,
        /// With which it was given.
        epoch: u64,
    },
    /// A controller's connection holds the session, or one less does.
    Connected {
        /// The session.
        session_id: SessionId,
        /// Whether it came or went.
        came: bool,
    },
    /// The agent takes nothing new from now on.
    DrainBegan(Drain),
    /// The agent takes sessions again.
    DrainEnded,
    /// What could not be removed from this host; empty when it is clean again.
    LeftBehind {
        /// Descriptions, for people.
        survivors: Vec<String>,
    },
    /// Time has passed.
    TimePassed,
}

/// What is to be done.
#[derive(Debug, PartialEq, Eq)]
pub enum Action {
    /// Answer an asking: the session is its.
    Admit {
        /// The asking.
        ticket: Ticket,
        /// The session.
        session_id: SessionId,
        /// Its new epoch: to be on disk before the answer is sent.
        epoch: u64,
        /// Whether it existed before.
        resumed: bool,
    },
    /// Answer an asking: no.
    Refuse {
        /// The asking.
        ticket: Ticket,
        /// Why.
        refusal: OpenRefusal,
    },
}

/// Why no session is given. Each says what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OpenRefusal {
    /// The number belongs to somebody else, or the secret is another.
    #[error(
        "the session belongs to another identity, or its secret is another: open one with a number of your own"
    )]
    NotYours,
    /// The session existed and is over.
    #[error(transparent)]
    Over(KeyRefusal),
    /// A session to come back to is not here.
    #[error("session unknown: this host has never had it or has forgotten it; open another")]
    Unknown,
    /// Nothing new is taken.
    #[error("draining {drain}; use another host, or wait for `millstream-agent undrain` there")]
    Draining {
        /// Since when, by whom and why.
        drain: Drain,
    },
    /// Something of an ended task is still here.
    #[error("unclean: an ended session has left {first} behind{}; say `millstream-agent clean` on that host, or open the session without `exclusive`", and_more(*count))]
    Unclean {
        /// How many.
        count: usize,
        /// One of them.
        first: String,
    },
    /// Too many sessions.
    #[error("the host has {limit} sessions, which is its limit: wait until one has ended")]
    TooMany {
        /// How many there may be.
        limit: usize,
    },
    /// The identity has as many as it may have.
    #[error(
        "{owner} has {} here, which is its limit `sessions` on this host: {clients}; end one of them, or ask the administrator to raise `limits` in agent.yaml",
        counted(*limit, "session"))]
    ShareUsedUp {
        /// Who asks.
        owner: Owner,
        /// How many it may have.
        limit: usize,
        /// What those that have them call themselves.
        clients: String,
    },
    /// Somebody else has the host.
    #[error(
        "the host is {} {holder} ({client}) for {}; {}{ASK_AGAIN}",
        how.words(), spoken(*since), in_line(*place, *waiting))]
    Reserved {
        /// Who has it.
        holder: Owner,
        /// What the holder calls itself.
        client: String,
        /// For how long.
        since: Duration,
        /// What it does to be in the way.
        how: Holding,
        /// Place in the line, from 1.
        place: usize,
        /// Length of the line.
        waiting: usize,
    },
    /// The same controller has asked again, on another connection.
    #[error("the same session was asked for again: the newer call gets the answer")]
    Superseded,
}

/// What somebody does who is in the way of an asking.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Holding {
    /// Has reserved the host.
    Reserves,
    /// Has a session, which a reservation must wait for.
    Uses,
    /// Is before it in line.
    Awaits,
}

impl Holding {
    fn words(self) -> &'static str {
        match self {
            Self::Reserves => "reserved by",
            Self::Uses => "in use by",
            Self::Awaits => "awaited by",
        }
    }
}

fn and_more(count: usize) -> String {
    if count < 2 { String::new() } else { format!(", and {} more", count - 1) }
}

/// A place in the line, in words.
fn in_line(place: usize, waiting: usize) -> String {
    match (place, waiting) {
        (1, 1) => "nobody else is in line".to_owned(),
        (1, _) => "this asking is the next in line".to_owned(),
        (2, _) => "1 is before this asking in line".to_owned(),
        (place, _) => format!("{} are before this asking in line", place - 1),
    }
}

/// Why a call's key is not good. Each says what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeyRefusal {
    /// No such session.
    #[error("session unknown: this host has never had it or has forgotten it; open another")]
    Unknown,
    /// The session has been closed.
    #[error("session ended: it was closed; open another")]
    Ended,
    /// Its lease is over.
    #[error("session expired: its controller was silent for longer than the lease of {}; open another", spoken(*lease))]
    Expired {
        /// The lease.
        lease: Duration,
    },
    /// Its supervisor died, and its tasks with it.
    #[error("{SESSION_LOST}: its supervisor died, and what ran was ended; open another")]
    Lost,
    /// The controller has come back on another connection since.
    #[error(
        "session epoch superseded: the call has epoch {given}, the session {newest}; use the newest, or open another session"
    )]
    Superseded {
        /// From the call.
        given: u64,
        /// The session's.
        newest: u64,
    },
    /// Wrong identity or secret: one text for both, so that a guess learns nothing.
    #[error(
        "the session belongs to another identity, or its secret is another: use the certificate that opened it"
    )]
    NotYours,
}
