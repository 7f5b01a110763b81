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

mod bounds;
#[cfg(test)]
mod tests;
mod words;

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use millstream_common::{id::SessionId, limits};

pub use bounds::{Bounds, Share};
pub use words::{
    Access, Action, Asking, Drain, Event, Found, Holding, Key, KeyRefusal, OpenRefusal, Owner, Secret, Ticket,
};

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
    /// When it asked first, for people.
    wall_ns: u64,
    /// The same, since the start of the host.
    since: Duration,
    /// None while nobody waits for the answer: the place is kept until `until`.
    ticket: Option<Ticket>,
    /// When the present asking is answered with a refusal, or the place is given up.
    until: Duration,
}

/// Somebody who waits in line for the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Waiting<'a> {
    /// Who it is.
    pub owner: &'a Owner,
    /// What the controller calls itself.
    pub client: &'a str,
    /// Whether it wants the host for itself.
    pub exclusive: bool,
    /// When it asked first, for people.
    pub asked_time_ns: u64,
}

/// How many closed sessions are remembered, so that their numbers are never used again by mistake.
const CLOSED_COUNT_MAX: usize = 1_024;

/// All sessions of one agent, and the line of those who wait.
#[derive(Debug, Default)]
pub struct Sessions {
    sessions: BTreeMap<SessionId, Session>,
    waiting: VecDeque<Waiter>,
    closed: VecDeque<SessionId>,
    draining: Option<Drain>,
    survivors: Vec<String>,
    bounds: Bounds,
}

impl Sessions {
    /// None yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// None yet, and no more than these bounds allow.
    #[must_use]
    pub fn within(bounds: Bounds) -> Self {
        Self { bounds, ..Self::default() }
    }

    /// What the host's administrator allows.
    #[must_use]
    pub fn bounds(&self) -> &Bounds {
        &self.bounds
    }

    /// How many wait in line for this host.
    #[must_use]
    pub fn waiting_count(&self) -> usize {
        self.waiting.len()
    }

    /// Those who wait, in the order in which they are let in.
    pub fn waiting(&self) -> impl Iterator<Item = Waiting<'_>> {
        self.waiting.iter().map(|Waiter { asking, wall_ns, .. }| Waiting {
            owner: &asking.owner,
            client: &asking.client,
            exclusive: asking.exclusive,
            asked_time_ns: *wall_ns,
        })
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
            Event::Withdrawn { key, owner } => self.withdraw(&key, &owner, actions),
            Event::Abandoned { session_id, epoch } => self.abandon(session_id, epoch),
            Event::Connected { session_id, came } => {
                if let Some(session) = self.sessions.get_mut(&session_id) {
                    let change = if came { u32::checked_add } else { u32::checked_sub };
                    session.connections = change(session.connections, 1).unwrap_or(session.connections);
                }
            }
            Event::DrainBegan(drain) => self.drain(drain, actions),
            Event::DrainEnded => self.draining = None,
            Event::LeftBehind { survivors } => self.left_behind(survivors, actions),
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
        match session.over(now) {
            Some(why) if access == Access::Change => Err(why),
            _ => Ok(session),
        }
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

    /// How many sessions have something to run, or may have.
    #[must_use]
    pub fn holding_count(&self) -> usize {
        self.sessions.values().filter(|session| session.holds_host()).count()
    }

    /// Whether nothing runs in any session, and nothing will: of those that there are, only the results are kept.
    #[must_use]
    pub fn all_settled(&self) -> bool {
        self.holding_count() == 0
    }

    /// Why nothing new is taken, if so.
    #[must_use]
    pub fn draining(&self) -> Option<&Drain> {
        self.draining.as_ref()
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
        let until = now + asking.patience;
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
            None => {
                self.waiting.push_back(Waiter { asking, wall_ns, since: now, ticket: Some(ticket), until })
            }
        }
    }

    /// What time will not change.
    fn refusal_at_once(&self, asking: &Asking) -> Option<OpenRefusal> {
        if self.closed.contains(&asking.session_id) {
            return Some(OpenRefusal::Over(KeyRefusal::Ended));
        }
        if asking.resume {
            return Some(OpenRefusal::Unknown);
        }
        if let Some(drain) = &self.draining {
            return Some(OpenRefusal::Draining { drain: drain.clone() });
        }
        if asking.exclusive
            && let Some(refusal) = self.unclean()
        {
            return Some(refusal);
        }
        if self.sessions.len() + self.waiting.len() >= limits::SESSIONS_COUNT_MAX {
            return Some(OpenRefusal::TooMany { limit: limits::SESSIONS_COUNT_MAX });
        }
        self.share_used_up(asking)
    }

    /// Whether the asking's identity has all that it may have of this host.
    fn share_used_up(&self, asking: &Asking) -> Option<OpenRefusal> {
        let limit = self.bounds.of(&asking.owner).sessions?;
        let open =
            self.sessions.values().filter(|session| session.owner == asking.owner && session.holds_host());
        let waiting = self
            .waiting
            .iter()
            .map(|waiter| &waiter.asking)
            .filter(|other| other.owner == asking.owner && other.session_id != asking.session_id);
        let clients: Vec<&str> = open
            .map(|session| session.client.as_str())
            .chain(waiting.map(|other| other.client.as_str()))
            .collect();
        (clients.len() >= limit).then(|| OpenRefusal::ShareUsedUp {
            owner: asking.owner.clone(),
            limit,
            clients: few(&clients),
        })
    }

    /// Gives up a place in the line: whoever knows the session's secret and has its identity may.
    fn withdraw(&mut self, key: &Key, owner: &Owner, actions: &mut Vec<Action>) {
        let own = |waiter: &Waiter| {
            let asking = &waiter.asking;
            asking.session_id == key.session_id
                && asking.owner == *owner
                && asking.secret.matches(&key.secret)
        };
        if let Some(place) = self.waiting.iter().position(own)
            && let Some(Waiter { ticket: Some(ticket), .. }) = self.waiting.remove(place)
        {
            actions.push(Action::Refuse { ticket, refusal: OpenRefusal::Over(KeyRefusal::Ended) });
        }
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
            let Some(Waiter { asking, wall_ns, since, .. }) = self.waiting.pop_front() else { break };
            let session_id = asking.session_id;
            let waited_ns = u64::try_from(now.saturating_sub(since).as_nanos()).unwrap_or(u64::MAX);
            let open_time_ns = wall_ns.saturating_add(waited_ns);
            self.sessions.insert(session_id, Session::begin(asking, open_time_ns, now));
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
        let (holder, client, since, how) = match self.in_the_way(asking) {
            Some(session) if session.exclusive => {
                (&session.owner, &session.client, session.since, Holding::Reserves)
            }
            Some(session) => (&session.owner, &session.client, session.since, Holding::Uses),
            // Nobody but those who are before it in line.
            None => {
                let Waiter { asking: first, since, .. } = &self.waiting[0];
                (&first.owner, &first.client, *since, Holding::Awaits)
            }
        };
        OpenRefusal::Reserved {
            holder: holder.clone(),
            client: client.clone(),
            since: now.saturating_sub(since),
            how,
            place: place + 1,
            waiting,
        }
    }

    /// A session that keeps this asking from being granted.
    fn in_the_way(&self, asking: &Asking) -> Option<&Session> {
        self.sessions.values().find(|session| session.holds_host() && (asking.exclusive || session.exclusive))
    }

    fn drain(&mut self, drain: Drain, actions: &mut Vec<Action>) {
        for ticket in self.waiting.drain(..).filter_map(|waiter| waiter.ticket) {
            let refusal = OpenRefusal::Draining { drain: drain.clone() };
            actions.push(Action::Refuse { ticket, refusal });
        }
        self.draining = Some(drain);
    }

    /// Whoever waits to have the host alone would get one that is not as it was.
    fn left_behind(&mut self, survivors: Vec<String>, actions: &mut Vec<Action>) {
        self.survivors = survivors;
        let Some(refusal) = self.unclean() else { return };
        let (refused, waiting): (VecDeque<_>, _) =
            self.waiting.drain(..).partition(|waiter| waiter.asking.exclusive);
        self.waiting = waiting;
        for ticket in refused.into_iter().filter_map(|waiter| waiter.ticket) {
            actions.push(Action::Refuse { ticket, refusal: refusal.clone() });
        }
    }

    fn unclean(&self) -> Option<OpenRefusal> {
        let first = self.survivors.first()?.clone();
        Some(OpenRefusal::Unclean { count: self.survivors.len(), first })
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

    fn abandon(&mut self, session_id: SessionId, epoch: u64) {
        if self.sessions.get(&session_id).is_some_and(|session| session.epoch == epoch) {
            self.sessions.remove(&session_id);
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
    fn begin(asking: Asking, open_time_ns: u64, now: Duration) -> Self {
        Self {
            secret: asking.secret,
            owner: asking.owner,
            client: asking.client,
            epoch: 1,
            lease: asking.lease,
            lease_end: now + asking.lease,
            exclusive: asking.exclusive,
            open_time_ns,
            since: now,
            stage: Stage::Open,
            connections: 0,
            lost: false,
        }
    }

    /// Why nothing can be changed in it any more.
    fn over(&self, now: Duration) -> Option<KeyRefusal> {
        match self.stage {
            Stage::Open if now < self.lease_end => None,
            Stage::Closing => Some(KeyRefusal::Ended),
            Stage::Settled if self.lost => Some(KeyRefusal::Lost),
            Stage::Open | Stage::Expired | Stage::Settled => Some(KeyRefusal::Expired { lease: self.lease }),
        }
    }
}

/// Some of what controllers call themselves, for people.
fn few(clients: &[&str]) -> String {
    const SHOWN: usize = 4;
    let mut text = clients.iter().take(SHOWN).copied().collect::<Vec<_>>().join(", ");
    if clients.len() > SHOWN {
        text += &format!(" and {} more", clients.len() - SHOWN);
    }
    text
}

/// Gives a session back to its controller, with a higher epoch.
fn come_back(session: &mut Session, asking: &Asking, now: Duration) -> Result<u64, OpenRefusal> {
    if session.owner != asking.owner || !session.secret.matches(&asking.secret) {
        return Err(OpenRefusal::NotYours);
    }
    if let Some(why) = session.over(now) {
        return Err(OpenRefusal::Over(why));
    }
    session.epoch += 1;
    session.lease = asking.lease;
    session.lease_end = now + asking.lease;
    Ok(session.epoch)
}
