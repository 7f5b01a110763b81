//! Leases, epochs, exclusivity: who may touch what. Pure.
//!
//! ```text
//!   asked ──> waiting ──> open ──lease expired──> expired ──> settled ──> (forgotten: closed)
//!                │          └──────────close──────────┴────────────────────^
//!                └──> refused
//! ```
//!
//! The machine decides who gets a session, in which order those wait for whom the host is reserved, and whether a call's
//! key is good. It enforces no lease (each supervisor does that for itself), starts nothing, sends nothing and keeps
//! nothing on disk. Time is the host's since its start, time asleep included: a process that slept past a lease finds it
//! over before it serves anything.

use std::{
    collections::{BTreeMap, VecDeque},
    fmt,
    time::Duration,
};

use millstream_common::{
    id::SessionId,
    limits,
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
    fn matches(&self, other: &Self) -> bool {
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
    /// A session could not be begun on this host: its number may be used again.
    Abandoned {
        /// The session.
        session_id: SessionId,
    },
    /// A controller's connection holds the session, or one less does.
    Connected {
        /// The session.
        session_id: SessionId,
        /// Whether it came or went.
        came: bool,
    },
    /// The agent takes nothing new from now on; the reason is for people.
    DrainBegan {
        /// Why.
        reason: String,
    },
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
    #[error("session ended: it was closed, or its lease is over; open another")]
    Ended,
    /// A session to come back to is not here.
    #[error("session unknown: this host has never had it or has forgotten it; open another")]
    Unknown,
    /// Nothing new is taken.
    #[error("draining: {reason}; use another host, or wait until the agent has been started again")]
    Draining {
        /// Why, from the person who began it.
        reason: String,
    },
    /// Something of an ended task is still here.
    #[error("unclean: {} could not be ended ({first}); end it by hand, or open the session without `exclusive`", counted(*count, "process"))]
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
    /// Somebody else has the host.
    #[error(
        "the host is {} {holder} ({client}) for {}; this asking is number {place} of {waiting} in line: ask again, the place is kept",
        if *exclusive { "reserved by" } else { "in use by" }, spoken(*since))]
    Reserved {
        /// Who has it.
        holder: Owner,
        /// What the holder calls itself.
        client: String,
        /// For how long.
        since: Duration,
        /// Whether the holder has reserved it, or only stands in the way of a reservation.
        exclusive: bool,
        /// Place in the line, from 1.
        place: usize,
        /// Length of the line.
        waiting: usize,
    },
    /// The same controller has asked again, on another connection.
    #[error("the same session was asked for again: the newer call gets the answer")]
    Superseded,
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
    #[error("session lost: its supervisor died, and what ran was ended; open another")]
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

/// Where a session is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Its controller has it.
    Open,
    /// Its lease is over and its tasks are being ended.
    Expired,
    /// Its lease is over and its tasks have ended: only its results are kept.
    Settled,
    /// It is being closed.
    Closing,
}

/// One session.
#[derive(Debug, Clone)]
pub struct Session {
    secret: Secret,
    /// Who has it.
    pub owner: Owner,
    /// What the controller calls itself.
    pub client: String,
    /// Newest epoch.
    pub epoch: u64,
    /// How long it lives without a word.
    pub lease: Duration,
    /// When that is over, since the start of the host.
    pub lease_end: Duration,
    /// Whether the host is reserved for it.
    pub exclusive: bool,
    /// When it was opened, for people.
    pub open_time_ns: u64,
    /// When it was opened or found, since the start of the host.
    since: Duration,
    /// Where it is in its life.
    pub stage: Stage,
    /// Connections that hold it.
    pub connections: u32,
    /// Whether it is over because its supervisor died.
    lost: bool,
}

impl Session {
    /// The secret, to be kept where the session is kept.
    #[must_use]
    pub fn secret(&self) -> &Secret {
        &self.secret
    }

    /// Whether it keeps others from reserving the host.
    fn holds_host(&self) -> bool {
        self.stage != Stage::Settled
    }
}

#[derive(Debug)]
struct Waiter {
    asking: Asking,
    wall_ns: u64,
    /// None while nobody waits for the answer: the place is kept until `until`.
    ticket: Option<Ticket>,
    /// When the present asking is answered with a refusal, or the place is given up.
    until: Duration,
}

/// How many closed sessions are remembered, so that their numbers are never used again by mistake.
const CLOSED_COUNT_MAX: usize = 1_024;

/// All sessions of one agent, and the line of those who wait.
#[derive(Debug, Default)]
pub struct Sessions {
    sessions: BTreeMap<SessionId, Session>,
    waiting: VecDeque<Waiter>,
    closed: VecDeque<SessionId>,
    draining: Option<String>,
    survivors: Vec<String>,
}

impl Sessions {
    /// None yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes in one event. Never blocks and never reads a clock: `now` is the time since the start of the host.
    pub fn handle(&mut self, event: Event, now: Duration, actions: &mut Vec<Action>) {
        match event {
            Event::Asked { ticket, asking, wall_ns } => self.ask(ticket, asking, wall_ns, now, actions),
            Event::Left { ticket } => self.leave(ticket, now),
            Event::Found(found) => self.found(found, now),
            Event::Kept { session_id } => self.keep(session_id, now),
            Event::LeaseExpired { session_id } => self.expire(session_id),
            Event::Settled { session_id } => self.settle(session_id),
            Event::SupervisorDied { session_id } => {
                if let Some(session) = self.sessions.get_mut(&session_id) {
                    session.stage = Stage::Settled;
                    session.lost = true;
                }
            }
            Event::Closing { session_id } => {
                // One that has settled stands in nobody's way and must not come to.
                let session = self.sessions.get_mut(&session_id);
                if let Some(session) = session.filter(|session| session.stage != Stage::Settled) {
                    session.stage = Stage::Closing;
                }
            }
            Event::Closed { session_id } => self.forget(session_id),
            Event::Abandoned { session_id } => drop(self.sessions.remove(&session_id)),
            Event::Connected { session_id, came } => {
                if let Some(session) = self.sessions.get_mut(&session_id) {
                    let change = if came { u32::checked_add } else { u32::checked_sub };
                    session.connections = change(session.connections, 1).unwrap_or(session.connections);
                }
            }
            Event::DrainBegan { reason } => self.drain(reason, actions),
            Event::LeftBehind { survivors } => self.survivors = survivors,
            Event::TimePassed => {}
        }
        self.admit_waiting(now, actions);
    }

    /// The next moment at which time alone changes something.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Duration> {
        self.waiting.iter().map(|waiter| waiter.until).min()
    }

    /// Checks a call's key. The order matters: who knows neither identity nor secret learns nothing about the session.
    ///
    /// # Errors
    /// When the call may not touch the session.
    pub fn check(
        &self,
        key: &Key,
        owner: &Owner,
        access: Access,
        now: Duration,
    ) -> Result<&Session, KeyRefusal> {
        let Some(session) = self.sessions.get(&key.session_id) else {
            let closed = self.closed.contains(&key.session_id);
            return Err(if closed { KeyRefusal::Ended } else { KeyRefusal::Unknown });
        };
        if session.owner != *owner || !session.secret.matches(&key.secret) {
            return Err(KeyRefusal::NotYours);
        }
        if session.epoch != key.epoch && (access != Access::End || key.epoch > session.epoch) {
            return Err(KeyRefusal::Superseded { given: key.epoch, newest: session.epoch });
        }
        // The supervisor enforces the lease; this clock is asked as well, because its message may still be on the way.
        let over = session.stage != Stage::Open || now >= session.lease_end;
        if over && access == Access::Change {
            return Err(match session.stage {
                Stage::Closing => KeyRefusal::Ended,
                Stage::Settled if session.lost => KeyRefusal::Lost,
                Stage::Open | Stage::Expired | Stage::Settled => KeyRefusal::Expired { lease: session.lease },
            });
        }
        Ok(session)
    }

    /// One session.
    #[must_use]
    pub fn get(&self, session_id: SessionId) -> Option<&Session> {
        self.sessions.get(&session_id)
    }

    /// All sessions, oldest first.
    pub fn iter(&self) -> impl Iterator<Item = (SessionId, &Session)> {
        self.sessions.iter().map(|(id, session)| (*id, session))
    }

    /// Why nothing new is taken, if so.
    #[must_use]
    pub fn draining(&self) -> Option<&str> {
        self.draining.as_deref()
    }

    /// What could not be removed from this host.
    #[must_use]
    pub fn survivors(&self) -> &[String] {
        &self.survivors
    }

    fn ask(
        &mut self,
        ticket: Ticket,
        asking: Asking,
        wall_ns: u64,
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        if let Some(session) = self.sessions.get_mut(&asking.session_id) {
            match come_back(session, &asking, now) {
                Ok(epoch) => {
                    let session_id = asking.session_id;
                    actions.push(Action::Admit { ticket, session_id, epoch, resumed: true });
                }
                Err(refusal) => actions.push(Action::Refuse { ticket, refusal }),
            }
            return;
        }
        if let Some(refusal) = self.refusal_at_once(&asking) {
            actions.push(Action::Refuse { ticket, refusal });
            return;
        }
        let until = now + limits::OPEN_WAIT_MAX;
        let place = self.waiting.iter_mut().find(|waiter| waiter.asking.session_id == asking.session_id);
        match place {
            Some(waiter)
                if waiter.asking.owner != asking.owner || !waiter.asking.secret.matches(&asking.secret) =>
            {
                actions.push(Action::Refuse { ticket, refusal: OpenRefusal::NotYours });
            }
            Some(waiter) => {
                if let Some(older) = waiter.ticket.replace(ticket) {
                    actions.push(Action::Refuse { ticket: older, refusal: OpenRefusal::Superseded });
                }
                waiter.until = until;
                waiter.asking = asking;
            }
            None => self.waiting.push_back(Waiter { asking, wall_ns, ticket: Some(ticket), until }),
        }
    }

    /// What time will not change.
    fn refusal_at_once(&self, asking: &Asking) -> Option<OpenRefusal> {
        if self.closed.contains(&asking.session_id) {
            return Some(OpenRefusal::Ended);
        }
        if asking.resume {
            return Some(OpenRefusal::Unknown);
        }
        if let Some(reason) = &self.draining {
            return Some(OpenRefusal::Draining { reason: reason.clone() });
        }
        if asking.exclusive
            && let Some(first) = self.survivors.first()
        {
            return Some(OpenRefusal::Unclean { count: self.survivors.len(), first: first.clone() });
        }
        if self.sessions.len() + self.waiting.len() >= limits::SESSIONS_COUNT_MAX {
            return Some(OpenRefusal::TooMany { limit: limits::SESSIONS_COUNT_MAX });
        }
        None
    }

    /// Lets in whoever is first in line as long as nobody stands in the way, and answers those who have waited enough.
    fn admit_waiting(&mut self, now: Duration, actions: &mut Vec<Action>) {
        // A place that nobody came back for is given up.
        self.waiting.retain(|waiter| waiter.ticket.is_some() || now < waiter.until);
        // Strictly in order: otherwise small askings would starve a reservation for ever.
        while let Some(first) = self.waiting.front() {
            if self.in_the_way(&first.asking).is_some() {
                break;
            }
            // One whose controller is just asking again keeps its turn until its place is given up.
            let Some(ticket) = first.ticket else { break };
            let Some(Waiter { asking, wall_ns, .. }) = self.waiting.pop_front() else { break };
            let session_id = asking.session_id;
            self.sessions.insert(session_id, Session::begin(asking, wall_ns, now));
            actions.push(Action::Admit { ticket, session_id, epoch: 1, resumed: false });
        }
        self.answer_patient(now, actions);
    }

    fn answer_patient(&mut self, now: Duration, actions: &mut Vec<Action>) {
        let waiting = self.waiting.len();
        for place in 0..waiting {
            if now < self.waiting[place].until || self.waiting[place].ticket.is_none() {
                continue;
            }
            let refusal = self.reserved(place, now);
            let waiter = &mut self.waiting[place];
            waiter.until = now + limits::OPEN_PLACE_KEPT;
            if let Some(ticket) = waiter.ticket.take() {
                actions.push(Action::Refuse { ticket, refusal });
            }
        }
    }

    fn reserved(&self, place: usize, now: Duration) -> OpenRefusal {
        let asking = &self.waiting[place].asking;
        let waiting = self.waiting.len();
        let (holder, client, since, exclusive) = match self.in_the_way(asking) {
            Some(session) => {
                (&session.owner, &session.client, now.saturating_sub(session.since), session.exclusive)
            }
            // Nobody but those who are before it in line.
            None => {
                let first = &self.waiting[0].asking;
                (&first.owner, &first.client, Duration::ZERO, first.exclusive)
            }
        };
        let (holder, client) = (holder.clone(), client.clone());
        OpenRefusal::Reserved { holder, client, since, exclusive, place: place + 1, waiting }
    }

    /// A session that keeps this asking from being granted.
    fn in_the_way(&self, asking: &Asking) -> Option<&Session> {
        self.sessions.values().find(|session| session.holds_host() && (asking.exclusive || session.exclusive))
    }

    fn drain(&mut self, reason: String, actions: &mut Vec<Action>) {
        for ticket in self.waiting.drain(..).filter_map(|waiter| waiter.ticket) {
            actions
                .push(Action::Refuse { ticket, refusal: OpenRefusal::Draining { reason: reason.clone() } });
        }
        self.draining = Some(reason);
    }

    fn leave(&mut self, ticket: Ticket, now: Duration) {
        if let Some(waiter) = self.waiting.iter_mut().find(|waiter| waiter.ticket == Some(ticket)) {
            waiter.ticket = None;
            waiter.until = now + limits::OPEN_PLACE_KEPT;
        }
    }

    fn found(&mut self, found: Found, now: Duration) {
        let session = Session {
            secret: found.secret,
            owner: found.owner,
            client: found.client,
            epoch: found.epoch,
            lease: found.lease,
            lease_end: now + found.lease_left,
            exclusive: found.exclusive,
            open_time_ns: found.open_time_ns,
            since: now,
            stage: Stage::Open,
            connections: 0,
            lost: false,
        };
        self.sessions.insert(found.session_id, session);
    }

    fn keep(&mut self, session_id: SessionId, now: Duration) {
        if let Some(session) =
            self.sessions.get_mut(&session_id).filter(|session| session.stage == Stage::Open)
        {
            session.lease_end = now + session.lease;
        }
    }

    fn expire(&mut self, session_id: SessionId) {
        if let Some(session) =
            self.sessions.get_mut(&session_id).filter(|session| session.stage == Stage::Open)
        {
            session.stage = Stage::Expired;
        }
    }

    fn settle(&mut self, session_id: SessionId) {
        if let Some(session) =
            self.sessions.get_mut(&session_id).filter(|session| session.stage == Stage::Expired)
        {
            session.stage = Stage::Settled;
        }
    }

    fn forget(&mut self, session_id: SessionId) {
        if self.sessions.remove(&session_id).is_some() {
            if self.closed.len() == CLOSED_COUNT_MAX {
                self.closed.pop_front();
            }
            self.closed.push_back(session_id);
        }
    }
}

impl Session {
    fn begin(asking: Asking, wall_ns: u64, now: Duration) -> Self {
        Self {
            secret: asking.secret,
            owner: asking.owner,
            client: asking.client,
            epoch: 1,
            lease: asking.lease,
            lease_end: now + asking.lease,
            exclusive: asking.exclusive,
            open_time_ns: wall_ns,
            since: now,
            stage: Stage::Open,
            connections: 0,
            lost: false,
        }
    }
}

/// Gives a session back to its controller, with a higher epoch.
fn come_back(session: &mut Session, asking: &Asking, now: Duration) -> Result<u64, OpenRefusal> {
    if session.owner != asking.owner || !session.secret.matches(&asking.secret) {
        return Err(OpenRefusal::NotYours);
    }
    if session.stage != Stage::Open || now >= session.lease_end {
        return Err(OpenRefusal::Ended);
    }
    session.epoch += 1;
    session.lease = asking.lease;
    session.lease_end = now + asking.lease;
    Ok(session.epoch)
}

#[cfg(test)]
mod tests {
    use expect_test::{Expect, expect};
    use proptest::prelude::*;
    use uuid::Uuid;

    use super::*;

    impl Sessions {
        fn assert_invariants(&self) {
            let holding: Vec<_> = self.sessions.values().filter(|session| session.holds_host()).collect();
            let reserved = holding.iter().any(|session| session.exclusive);
            assert!(!reserved || holding.len() == 1, "a reserved host has one session: {holding:?}");
            assert!(self.sessions.len() <= limits::SESSIONS_COUNT_MAX);
            for waiter in &self.waiting {
                assert!(!self.sessions.contains_key(&waiter.asking.session_id), "waits and has");
            }
            for id in &self.closed {
                assert!(!self.sessions.contains_key(id), "a closed number lives again");
            }
        }
    }

    fn id(number: u8) -> SessionId {
        SessionId::from_uuid(Uuid::from_u128(0x7000_8000_0000_0000_0000 | u128::from(number)))
    }

    fn secret(number: u8) -> Secret {
        Secret::parse(&format!("{number:032x}")).unwrap()
    }

    fn asking(number: u8) -> Asking {
        Asking {
            session_id: id(number),
            secret: secret(number),
            owner: Owner(format!("owner-{number}")),
            client: format!("test-{number}"),
            lease: Duration::from_secs(30),
            exclusive: false,
            resume: false,
        }
    }

    fn asked(ticket: Ticket, asking: Asking) -> Event {
        Event::Asked { ticket, asking, wall_ns: 0 }
    }

    fn exclusive(number: u8) -> Asking {
        Asking { exclusive: true, ..asking(number) }
    }

    /// Feeds events at their seconds and writes down what is answered.
    fn check(script: Vec<(u64, Event)>, expected: &Expect) -> Sessions {
        let mut sessions = Sessions::new();
        let mut transcript = String::new();
        for (second, event) in script {
            let mut actions = Vec::new();
            sessions.handle(event, Duration::from_secs(second), &mut actions);
            sessions.assert_invariants();
            for action in actions {
                let line = match action {
                    Action::Admit { ticket, epoch, resumed, .. } => {
                        format!("{second} s: {ticket} admitted, epoch {epoch}, resumed {resumed}\n")
                    }
                    Action::Refuse { ticket, refusal } => {
                        format!("{second} s: {ticket} refused: {refusal}\n")
                    }
                };
                transcript.push_str(&line);
            }
        }
        expected.assert_eq(&transcript);
        sessions
    }

    #[test]
    fn coming_back_raises_the_epoch_and_nobody_else_can() {
        let thief = Asking { owner: Owner("thief".into()), ..asking(1) };
        let guesser = Asking { secret: secret(9), ..asking(1) };
        let sessions = check(
            vec![
                (0, asked(1, asking(1))),
                (1, asked(2, thief)),
                (1, asked(3, guesser)),
                (2, asked(4, Asking { resume: true, ..asking(1) })),
                (3, asked(5, Asking { resume: true, ..asking(2) })),
            ],
            &expect![[r#"
                0 s: 1 admitted, epoch 1, resumed false
                1 s: 2 refused: the session belongs to another identity, or its secret is another: open one with a number of your own
                1 s: 3 refused: the session belongs to another identity, or its secret is another: open one with a number of your own
                2 s: 4 admitted, epoch 2, resumed true
                3 s: 5 refused: session unknown: this host has never had it or has forgotten it; open another
            "#]],
        );
        assert_eq!(sessions.get(id(1)).unwrap().epoch, 2);
    }

    #[test]
    fn a_reserved_host_is_given_on_in_the_order_of_asking() {
        check(
            vec![
                (0, asked(1, exclusive(1))),
                (1, asked(2, asking(2))),
                (2, asked(3, exclusive(3))),
                (3, asked(4, asking(4))),
                (6, Event::TimePassed),
                (7, asked(5, asking(2))),
                (8, Event::Closed { session_id: id(1) }),
                (9, Event::Closed { session_id: id(2) }),
            ],
            &expect![[r#"
                0 s: 1 admitted, epoch 1, resumed false
                6 s: 2 refused: the host is reserved by owner-1 (test-1) for 6.0 s; this asking is number 1 of 3 in line: ask again, the place is kept
                7 s: 3 refused: the host is reserved by owner-1 (test-1) for 7.0 s; this asking is number 2 of 3 in line: ask again, the place is kept
                8 s: 5 admitted, epoch 1, resumed false
                8 s: 4 refused: the host is reserved by owner-3 (test-3) for 0.0 s; this asking is number 2 of 2 in line: ask again, the place is kept
            "#]],
        );
    }

    #[test]
    fn a_place_that_nobody_comes_back_for_is_given_up() {
        check(
            vec![
                (0, asked(1, exclusive(1))),
                (0, asked(2, exclusive(2))),
                (1, Event::Left { ticket: 2 }),
                (2, asked(3, asking(3))),
                (3, Event::Closed { session_id: id(1) }),
                (6, Event::TimePassed),
                (11, asked(4, asking(3))),
            ],
            &expect![[r#"
                0 s: 1 admitted, epoch 1, resumed false
                11 s: 3 refused: the same session was asked for again: the newer call gets the answer
                11 s: 4 admitted, epoch 1, resumed false
            "#]],
        );
    }

    #[test]
    fn nothing_new_is_taken_while_draining_or_reserved_while_unclean() {
        check(
            vec![
                (0, Event::LeftBehind { survivors: vec!["1234 (dd)".into()] }),
                (0, asked(1, exclusive(1))),
                (0, asked(2, asking(2))),
                (1, Event::DrainBegan { reason: "kernel update".into() }),
                (1, asked(3, asking(3))),
                (1, asked(4, Asking { resume: true, ..asking(2) })),
            ],
            &expect![[r#"
                0 s: 1 refused: unclean: 1 process could not be ended (1234 (dd)); end it by hand, or open the session without `exclusive`
                0 s: 2 admitted, epoch 1, resumed false
                1 s: 3 refused: draining: kernel update; use another host, or wait until the agent has been started again
                1 s: 4 admitted, epoch 2, resumed true
            "#]],
        );
    }

    #[test]
    fn a_closed_number_is_never_used_again_but_one_that_never_began_may_be() {
        check(
            vec![
                (0, asked(1, asking(1))),
                (1, Event::Closed { session_id: id(1) }),
                (1, asked(2, asking(1))),
                (2, asked(3, asking(2))),
                (2, Event::Abandoned { session_id: id(2) }),
                (3, asked(4, asking(2))),
            ],
            &expect![[r#"
                0 s: 1 admitted, epoch 1, resumed false
                1 s: 2 refused: session ended: it was closed, or its lease is over; open another
                2 s: 3 admitted, epoch 1, resumed false
                3 s: 4 admitted, epoch 1, resumed false
            "#]],
        );
    }

    fn key(number: u8, epoch: u64) -> Key {
        Key { session_id: id(number), epoch, secret: secret(number) }
    }

    #[test]
    fn every_wrong_key_is_refused_for_its_own_reason() {
        let mut sessions = Sessions::new();
        let mut actions = Vec::new();
        let at = Duration::from_secs;
        sessions.handle(asked(1, asking(1)), at(0), &mut actions);
        sessions.handle(asked(2, asking(1)), at(1), &mut actions);
        let owner = Owner("owner-1".into());
        let refusal = |sessions: &Sessions, key: Key, owner: &Owner, access, now| {
            sessions.check(&key, owner, access, now).err()
        };
        let changed = Access::Change;
        assert_eq!(refusal(&sessions, key(1, 2), &owner, changed, at(2)), None);
        assert_eq!(refusal(&sessions, key(2, 1), &owner, changed, at(2)), Some(KeyRefusal::Unknown));
        let old = KeyRefusal::Superseded { given: 1, newest: 2 };
        assert_eq!(refusal(&sessions, key(1, 1), &owner, changed, at(2)), Some(old));
        // Whoever has given a session up may end it, whether or not it heard how often it came back; nobody guesses ahead.
        assert_eq!(refusal(&sessions, key(1, 0), &owner, Access::End, at(2)), None);
        let ahead = KeyRefusal::Superseded { given: 3, newest: 2 };
        assert_eq!(refusal(&sessions, key(1, 3), &owner, Access::End, at(2)), Some(ahead));
        let guess = Key { secret: secret(7), ..key(1, 2) };
        assert_eq!(refusal(&sessions, guess, &owner, changed, at(2)), Some(KeyRefusal::NotYours));
        let thief = Owner("thief".into());
        assert_eq!(refusal(&sessions, key(1, 2), &thief, changed, at(2)), Some(KeyRefusal::NotYours));
        // The supervisor has not said so yet, but the lease is over.
        let expired = KeyRefusal::Expired { lease: at(30) };
        assert_eq!(refusal(&sessions, key(1, 2), &owner, changed, at(31)), Some(expired));
        assert_eq!(refusal(&sessions, key(1, 2), &owner, Access::Read, at(31)), None);
        sessions.handle(Event::Closed { session_id: id(1) }, at(32), &mut actions);
        assert_eq!(refusal(&sessions, key(1, 2), &owner, changed, at(32)), Some(KeyRefusal::Ended));
    }

    #[test]
    fn a_lease_that_is_over_cannot_be_renewed() {
        let mut sessions = Sessions::new();
        let mut actions = Vec::new();
        sessions.handle(asked(1, asking(1)), Duration::ZERO, &mut actions);
        sessions.handle(Event::LeaseExpired { session_id: id(1) }, Duration::from_secs(30), &mut actions);
        sessions.handle(Event::Kept { session_id: id(1) }, Duration::from_secs(31), &mut actions);
        assert_eq!(sessions.get(id(1)).unwrap().stage, Stage::Expired);
        sessions.handle(asked(2, asking(1)), Duration::from_secs(32), &mut actions);
        assert!(matches!(actions.last(), Some(Action::Refuse { refusal: OpenRefusal::Ended, .. })));
    }

    fn any_event() -> impl Strategy<Value = Event> {
        let number = 0..6_u8;
        prop_oneof![
            4 => (number.clone(), any::<bool>(), any::<bool>()).prop_map(|(n, exclusive, resume)| asked(
                0, Asking { exclusive, resume, ..asking(n) })),
            1 => (0..200_u64).prop_map(|ticket| Event::Left { ticket }),
            1 => number.clone().prop_map(|n| Event::Kept { session_id: id(n) }),
            1 => number.clone().prop_map(|n| Event::LeaseExpired { session_id: id(n) }),
            1 => number.clone().prop_map(|n| Event::Settled { session_id: id(n) }),
            1 => number.clone().prop_map(|n| Event::Closing { session_id: id(n) }),
            2 => number.clone().prop_map(|n| Event::Closed { session_id: id(n) }),
            1 => number.prop_map(|n| Event::Abandoned { session_id: id(n) }),
            2 => Just(Event::TimePassed),
        ]
    }

    proptest! {
        #[test]
        fn every_asking_is_answered_once_and_a_reservation_holds(
            script in prop::collection::vec((any_event(), 0..4_u64), 1..120)
        ) {
            let mut sessions = Sessions::new();
            let mut now = Duration::ZERO;
            let (mut open, mut left) = (std::collections::BTreeSet::new(), std::collections::BTreeSet::new());
            for (number, (mut event, pause)) in (1..).zip(script) {
                if let Event::Asked { ticket, .. } = &mut event {
                    *ticket = number;
                    open.insert(number);
                }
                if let Event::Left { ticket } = &event {
                    left.insert(*ticket);
                }
                now += Duration::from_secs(pause);
                let mut actions = Vec::new();
                sessions.handle(event, now, &mut actions);
                sessions.assert_invariants();
                for action in actions {
                    let (Action::Admit { ticket, .. } | Action::Refuse { ticket, .. }) = action;
                    prop_assert!(open.remove(&ticket), "{ticket} answered twice or never asked");
                }
            }
            // Whoever still waits is answered by time alone.
            while let Some(deadline) = sessions.next_deadline() {
                let mut actions = Vec::new();
                sessions.handle(Event::TimePassed, deadline, &mut actions);
                for action in actions {
                    let (Action::Admit { ticket, .. } | Action::Refuse { ticket, .. }) = action;
                    prop_assert!(open.remove(&ticket));
                }
            }
            prop_assert!(open.is_subset(&left), "never answered: {open:?}");
        }
    }
}
