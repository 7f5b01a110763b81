//! One named barrier: generations of parties that meet, each decided once. Pure.
//!
//! ```text
//! idle --entered--> waiting --the last one entered, not held--> released, latched; idle in the next generation
//!   |                  |
//!   +---- aborted -----+--timed out, lost, died, aborted, other count, hopeless--> broken, latched --reset--> idle
//!
//! beside it: held (nothing is released, patience stands still) <-> let go
//! ```
//!
//! Knows nothing of tasks, logs and connections: whoever feeds it says what became of a call, and adds evidence to the
//! sentence of a break before the decision is latched. Sends nothing, holds no locks, reads no clock.

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    sync::{Arc, OnceLock},
    time::Instant,
};

use millstream_common::{id::BarrierName, limits, text};

use super::{CallId, Culprit, Refusal, Speaker};

mod words;

pub use words::{Action, Arrival, Break, Cause, Connection, Decided, Decision, Entry, Event, Grace, Meeting};

#[derive(Debug)]
enum State {
    Idle,
    Waiting(Box<Waiting>),
    Broken(Arc<Decided>),
}

/// The open meeting and its indexes.
#[derive(Debug)]
struct Waiting {
    meeting: Meeting,
    by_call: HashMap<CallId, u32>,
    by_token: HashMap<Arc<str>, u32>,
    patience: BTreeSet<(Instant, u32)>,
    graces: BTreeSet<(Instant, u32)>,
    payload_bytes: usize,
}

/// A named barrier through all its generations.
#[derive(Debug)]
pub struct Barrier {
    name: BarrierName,
    generation: u64,
    state: State,
    /// Since when it is held.
    held: Option<Instant>,
    /// Who came while a full meeting was held: they belong to the next one. Bounded by the parties of a meeting.
    early: VecDeque<Entry>,
    /// Decisions that can still be asked for by token. The owner bounds them with [`Barrier::forget`].
    latched: HashMap<Arc<str>, (Arc<Decided>, u32)>,
    by_hand: Vec<String>,
}

/// Marks of people kept for one generation.
const MARKS_COUNT_MAX: usize = 64;

impl Barrier {
    /// A name that nobody has used.
    #[must_use]
    pub fn new(name: BarrierName) -> Self {
        Self {
            name,
            generation: 1,
            state: State::Idle,
            held: None,
            early: VecDeque::new(),
            latched: HashMap::new(),
            by_hand: Vec::new(),
        }
    }

    /// Takes in one event. Never blocks and never reads a clock.
    pub fn handle(&mut self, event: Event, now: Instant, actions: &mut Vec<Action>) {
        match event {
            Event::Entered(entry) => self.enter(entry, now, actions),
            Event::Lost { call, grace } => self.lose(call, grace, now, actions),
            Event::Regraced { call, grace } => {
                let lost = self.arrival(call).is_some_and(|a| a.connection != Connection::Up);
                if lost {
                    self.lose(call, grace, now, actions);
                }
            }
            Event::Died { call, sentence } => {
                if let Some(arrival) = self.arrival(call) {
                    let culprit = Culprit { speaker: arrival.speaker, label: arrival.label.clone() };
                    self.decide_broken(Cause::Died, Some(culprit), sentence, now, actions);
                } else {
                    self.early.retain(|entry| entry.call != call);
                }
            }
            Event::Aborted { by, reason } => {
                if by.speaker == Speaker::ByHand {
                    self.mark(format!("aborted: {reason}"));
                }
                if !matches!(self.state, State::Broken(_)) {
                    let sentence = match by.speaker {
                        Speaker::ByHand => format!("it was aborted by hand: {reason}"),
                        _ => format!("{by} aborted it: {reason}"),
                    };
                    self.decide_broken(Cause::Aborted, Some(by), sentence, now, actions);
                }
            }
            Event::FoundHopeless { sentence, culprit } => {
                if matches!(self.state, State::Waiting(_)) {
                    self.decide_broken(Cause::Hopeless, culprit, sentence, now, actions);
                }
            }
            Event::Reset => {
                if matches!(self.state, State::Broken(_)) {
                    self.state = State::Idle;
                }
            }
            Event::Held => {
                if self.held.is_none() {
                    self.held = Some(now);
                    self.mark("held".to_owned());
                }
            }
            Event::LetGo => self.let_go(now, actions),
            Event::TimePassed => self.pass_time(now, actions),
        }
    }

    /// The next moment at which time alone changes something.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Instant> {
        let State::Waiting(waiting) = &self.state else { return None };
        let grace = waiting.graces.first().map(|&(at, _)| at);
        let patience = match self.held {
            Some(_) => None,
            None => waiting.patience.first().map(|&(at, _)| at),
        };
        [grace, patience].into_iter().flatten().min()
    }

    /// Puts a decision on record: whoever asks later with a token of this meeting gets it again.
    pub fn latch(&mut self, decided: &Arc<Decided>) {
        for (arrival, number) in decided.meeting.arrivals.iter().zip(0..) {
            if let Some(token) = &arrival.token {
                self.latched.insert(token.clone(), (decided.clone(), number));
            }
        }
        if let State::Broken(broken) = &mut self.state
            && broken.meeting.generation == decided.meeting.generation
        {
            *broken = decided.clone();
        }
    }

    /// Forgets the tokens of an old meeting, so that memory stays bounded.
    pub fn forget(&mut self, decided: &Decided) {
        for token in decided.meeting.arrivals.iter().filter_map(|a| a.token.as_ref()) {
            let same =
                |(latched, _): &(Arc<Decided>, u32)| latched.meeting.generation == decided.meeting.generation;
            if self.latched.get(token).is_some_and(same) {
                self.latched.remove(token);
            }
        }
    }

    /// The meeting that waits, if one does.
    #[must_use]
    pub fn meeting(&self) -> Option<&Meeting> {
        match &self.state {
            State::Waiting(waiting) => Some(&waiting.meeting),
            State::Idle | State::Broken(_) => None,
        }
    }

    /// Why it is broken, if it is.
    #[must_use]
    pub fn broken(&self) -> Option<&Break> {
        match &self.state {
            State::Broken(decided) => decided.as_break(),
            State::Idle | State::Waiting(_) => None,
        }
    }

    /// Whether this call is the last one of a party of the open meeting.
    #[must_use]
    pub fn is_party(&self, call: CallId) -> bool {
        self.arrival(call).is_some()
    }

    /// Who came early with this call, for the meeting after the one that is held.
    #[must_use]
    pub fn early(&self, call: CallId) -> Option<Speaker> {
        self.early.iter().find(|entry| entry.call == call).map(|entry| entry.speaker)
    }

    /// Whether a break point is set.
    #[must_use]
    pub fn is_held(&self) -> bool {
        self.held.is_some()
    }

    /// The current generation, from 1.
    #[must_use]
    pub fn generation(&self) -> u64 {
        match &self.state {
            State::Broken(decided) => decided.meeting.generation,
            State::Idle | State::Waiting(_) => self.generation,
        }
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &BarrierName {
        &self.name
    }

    /// The party of the open meeting whose last call this is.
    #[must_use]
    pub fn arrival(&self, call: CallId) -> Option<&Arrival> {
        let State::Waiting(waiting) = &self.state else { return None };
        waiting.by_call.get(&call).map(|&number| &waiting.meeting.arrivals[number as usize])
    }

    fn mark(&mut self, what: String) {
        if self.by_hand.len() < MARKS_COUNT_MAX {
            self.by_hand.push(what);
        }
    }

    fn enter(&mut self, entry: Entry, now: Instant, actions: &mut Vec<Action>) {
        if let Some(token) = &entry.token
            && self.known(token, &entry, actions)
        {
            return;
        }
        match &mut self.state {
            State::Broken(decided) => actions.push(Action::Deliver {
                call: entry.call,
                speaker: entry.speaker,
                decided: decided.clone(),
                arrival: None,
            }),
            State::Waiting(waiting) if entry.parties != waiting.meeting.parties => {
                let first = &waiting.meeting.arrivals[0];
                let sentence = format!(
                    "{} came for {}, {} for {}",
                    first.label,
                    counted_parties(waiting.meeting.parties),
                    entry.label,
                    counted_parties(entry.parties)
                );
                let culprit = Culprit { speaker: entry.speaker, label: entry.label.clone() };
                self.decide_broken(Cause::OtherCount, Some(culprit), sentence, now, actions);
                // The one who asked for another number is told what everybody is told, from the record.
                self.early.push_back(entry);
            }
            State::Waiting(waiting) if waiting.is_full() => {
                if self.early.len() >= limits::BARRIER_PARTIES_MAX as usize {
                    let refusal = Refusal::Full {
                        what: format!("barrier `{}` is held and has too many early parties", self.name),
                        limit: limits::BARRIER_PARTIES_MAX.to_string(),
                    };
                    actions.push(Action::Refuse { call: entry.call, refusal });
                } else {
                    actions.push(Action::Wait { call: entry.call });
                    self.early.push_back(entry);
                }
            }
            State::Waiting(_) | State::Idle => self.admit(entry, now, actions),
        }
    }

    /// Handles a token that is known. False when it is new.
    fn known(&mut self, token: &Arc<str>, entry: &Entry, actions: &mut Vec<Action>) -> bool {
        let call = entry.call;
        let taken = |owner: &Arrival| Action::Refuse {
            call,
            refusal: Refusal::TokenTaken {
                token: token.to_string(),
                barrier: self.name.to_string(),
                owner: owner.label.to_string(),
            },
        };
        if let State::Waiting(waiting) = &mut self.state
            && let Some(&number) = waiting.by_token.get(token)
        {
            let arrival = &mut waiting.meeting.arrivals[number as usize];
            if arrival.speaker != entry.speaker {
                actions.push(taken(arrival));
                return true;
            }
            if let Connection::Lost { until: Some(until) } = arrival.connection {
                waiting.graces.remove(&(until, number));
            }
            let old = std::mem::replace(&mut arrival.call, call);
            arrival.connection = Connection::Up;
            waiting.by_call.remove(&old);
            waiting.by_call.insert(call, number);
            actions.push(Action::Supersede { old, call });
            return true;
        }
        if let Some((decided, number)) = self.latched.get(token) {
            let arrival = &decided.meeting.arrivals[*number as usize];
            actions.push(if arrival.speaker == entry.speaker {
                Action::Deliver {
                    call,
                    speaker: entry.speaker,
                    decided: decided.clone(),
                    arrival: Some(*number),
                }
            } else {
                taken(arrival)
            });
            return true;
        }
        false
    }

    /// Takes a new party into the open meeting, which it opens if it is the first.
    fn admit(&mut self, entry: Entry, now: Instant, actions: &mut Vec<Action>) {
        if matches!(self.state, State::Idle) {
            let open = Waiting::open(self.name.clone(), self.generation, entry.parties);
            self.state = State::Waiting(Box::new(open));
        }
        let State::Waiting(waiting) = &mut self.state else {
            unreachable!("the state was idle or waiting, and idle has just become waiting")
        };
        if entry.speaker == Speaker::ByHand && self.by_hand.len() < MARKS_COUNT_MAX {
            self.by_hand.push(format!("entered as {}", entry.label));
        }
        let call = entry.call;
        match waiting.add(entry, now) {
            Ok(()) => actions.push(Action::Wait { call }),
            Err(refusal) => actions.push(Action::Refuse { call, refusal }),
        }
        if waiting.is_full() && self.held.is_none() {
            self.decide(Decision::Released, now, actions);
        } else if waiting.meeting.arrivals.is_empty() {
            self.state = State::Idle;
        }
    }

    fn lose(&mut self, call: CallId, grace: Grace, now: Instant, actions: &mut Vec<Action>) {
        let State::Waiting(waiting) = &mut self.state else { return };
        let Some(&number) = waiting.by_call.get(&call) else {
            self.early.retain(|entry| entry.call != call);
            return;
        };
        let arrival = &mut waiting.meeting.arrivals[number as usize];
        if let Connection::Lost { until: Some(until) } = arrival.connection {
            waiting.graces.remove(&(until, number));
        }
        match grace {
            Grace::None => {
                let waited = text::spoken(now.duration_since(arrival.entered));
                let sentence = format!("{} went away after waiting for {waited}", arrival.label);
                let culprit = Culprit { speaker: arrival.speaker, label: arrival.label.clone() };
                self.decide_broken(Cause::Lost, Some(culprit), sentence, now, actions);
            }
            Grace::Suspended => arrival.connection = Connection::Lost { until: None },
            Grace::For(duration) => {
                let until = now + duration;
                arrival.connection = Connection::Lost { until: Some(until) };
                waiting.graces.insert((until, number));
            }
        }
    }

    fn let_go(&mut self, now: Instant, actions: &mut Vec<Action>) {
        let Some(since) = self.held.take() else { return };
        self.mark(format!("let go after {}", text::spoken(now.duration_since(since))));
        let State::Waiting(waiting) = &mut self.state else { return };
        waiting.patience.clear();
        for (arrival, number) in waiting.meeting.arrivals.iter_mut().zip(0..) {
            arrival.deadline += now.duration_since(since.max(arrival.entered));
            waiting.patience.insert((arrival.deadline, number));
        }
        if waiting.is_full() {
            self.decide(Decision::Released, now, actions);
        }
    }

    fn pass_time(&mut self, now: Instant, actions: &mut Vec<Action>) {
        let State::Waiting(waiting) = &self.state else { return };
        if let Some(&(at, number)) = waiting.graces.first()
            && at <= now
        {
            let arrival = &waiting.meeting.arrivals[number as usize];
            let sentence = format!(
                "{} lost its connection and did not come back within {}",
                arrival.label,
                text::spoken(limits::RECONNECTION_GRACE)
            );
            let culprit = Culprit { speaker: arrival.speaker, label: arrival.label.clone() };
            self.decide_broken(Cause::Lost, Some(culprit), sentence, now, actions);
            return;
        }
        if let (None, Some(&(at, number))) = (self.held, waiting.patience.first())
            && at <= now
        {
            let arrival = &waiting.meeting.arrivals[number as usize];
            let sentence = format!(
                "{} of {} entered before {} had waited for {}",
                waiting.meeting.arrivals.len(),
                waiting.meeting.parties,
                arrival.label,
                text::spoken(now.duration_since(arrival.entered))
            );
            let culprit = Culprit { speaker: arrival.speaker, label: arrival.label.clone() };
            self.decide_broken(Cause::TimedOut, Some(culprit), sentence, now, actions);
        }
    }

    fn decide_broken(
        &mut self,
        cause: Cause,
        culprit: Option<Culprit>,
        sentence: String,
        now: Instant,
        actions: &mut Vec<Action>,
    ) {
        self.decide(Decision::Broken(Break { cause, culprit, sentence }), now, actions);
    }

    /// The one place where a meeting ends.
    fn decide(&mut self, decision: Decision, now: Instant, actions: &mut Vec<Action>) {
        let mut meeting = match std::mem::replace(&mut self.state, State::Idle) {
            State::Waiting(waiting) => waiting.meeting,
            State::Idle | State::Broken(_) => Waiting::open(self.name.clone(), self.generation, 0).meeting,
        };
        meeting.by_hand = std::mem::take(&mut self.by_hand);
        self.generation += 1;
        let broken = matches!(decision, Decision::Broken(_));
        let decided = Decided { meeting, at: now, decision, encoded: OnceLock::new() };
        if broken {
            // Replaced by the same decision with evidence when it is latched; until then nobody can ask.
            self.state = State::Broken(Arc::new(decided.clone()));
        }
        actions.push(Action::Decide(Box::new(decided)));
    }

    /// Who came early for the meeting that has just ended. To be entered again, in this order, after the decision was
    /// latched: the next generation takes them, or tells them that the name is broken.
    pub fn take_early(&mut self) -> Vec<Entry> {
        match &self.state {
            State::Waiting(_) => Vec::new(),
            State::Idle | State::Broken(_) => self.early.drain(..).collect(),
        }
    }

    #[cfg(test)]
    pub(crate) fn assert_invariants(&self) {
        let State::Waiting(waiting) = &self.state else {
            assert!(self.early.is_empty(), "nobody comes early for a meeting that is over");
            return;
        };
        let arrivals = &waiting.meeting.arrivals;
        assert!(!arrivals.is_empty(), "a meeting is opened by its first party");
        assert!(arrivals.len() <= waiting.meeting.parties as usize, "nobody enters a full meeting");
        assert!(!waiting.is_full() || self.held.is_some(), "a full meeting is released unless it is held");
        assert!(self.early.is_empty() || waiting.is_full(), "only a full meeting sends parties to the next");
        assert_eq!(waiting.by_call.len(), arrivals.len(), "one call a party");
        assert_eq!(waiting.patience.len(), arrivals.len(), "everybody has a deadline");
        assert_eq!(waiting.meeting.generation, self.generation);
        let graced = |a: &&Arrival| matches!(a.connection, Connection::Lost { until: Some(_) });
        assert_eq!(waiting.graces.len(), arrivals.iter().filter(graced).count());
    }
}

impl Waiting {
    fn open(name: BarrierName, generation: u64, parties: u32) -> Self {
        Self {
            meeting: Meeting { name, generation, parties, arrivals: Vec::new(), by_hand: Vec::new() },
            by_call: HashMap::new(),
            by_token: HashMap::new(),
            patience: BTreeSet::new(),
            graces: BTreeSet::new(),
            payload_bytes: 0,
        }
    }

    fn is_full(&self) -> bool {
        self.meeting.arrivals.len() >= self.meeting.parties as usize
    }

    fn add(&mut self, entry: Entry, now: Instant) -> Result<(), Refusal> {
        let payload_bytes = self.payload_bytes + entry.payload.len();
        if payload_bytes > limits::BARRIER_PAYLOADS_BYTES_MAX {
            return Err(Refusal::Full {
                what: format!(
                    "with this payload the parties of barrier `{}` bring {payload_bytes} bytes",
                    self.meeting.name
                ),
                limit: format!("{} bytes", limits::BARRIER_PAYLOADS_BYTES_MAX),
            });
        }
        let number = u32::try_from(self.meeting.arrivals.len()).expect("bounded by the number of parties");
        let deadline = now + entry.timeout;
        self.payload_bytes = payload_bytes;
        self.by_call.insert(entry.call, number);
        self.patience.insert((deadline, number));
        if let Some(token) = &entry.token {
            self.by_token.insert(token.clone(), number);
        }
        self.meeting.arrivals.push(Arrival {
            call: entry.call,
            speaker: entry.speaker,
            label: entry.label,
            token: entry.token,
            payload: entry.payload,
            entered: now,
            deadline,
            connection: Connection::Up,
        });
        Ok(())
    }
}

fn counted_parties(count: u32) -> String {
    if count == 1 { "1 party".to_owned() } else { format!("{count} parties") }
}

#[cfg(test)]
mod tests;
