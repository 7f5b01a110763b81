//! All barriers and topics of one scope, and what is known of its tasks: the machine that the host holds. Pure.
//!
//! It passes each event to the barrier or topic it concerns, adds evidence to what they decide, keeps count of who can
//! still come ([`super::hopeless`]) and ends at once what can no longer be met. Sends nothing, holds no locks, reads no
//! clock, starts no task: it believes what it is told of them.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    sync::Arc,
    time::Instant,
};

use indexmap::IndexMap;
use millstream_common::{
    id::{BarrierName, StreamName, TaskId},
    limits,
    sync_client::Parties,
};

use super::{
    CallId, Culprit, Refusal, Speaker,
    barrier::{self, Barrier, Decided, Entry, Grace},
    hopeless::{Prospects, Wait},
    story::{self, Ended},
    topic::{self, Topics},
};

mod evidence;
mod keeping;
mod values;
mod words;

pub use words::{
    Action, Answer, Event, MeetingRecord, Request, SpeakerLabel, TaskFate, TopicWaitRecord, WaitRecord,
};

#[derive(Debug)]
struct Task {
    /// `server/1-netserver`.
    label: Arc<str>,
    /// `task 1-netserver on stream server`.
    long: String,
    joins: Option<BTreeSet<BarrierName>>,
    group_size: Option<u32>,
    /// What it does, and since when.
    doing: Option<(String, Instant)>,
    suspended: bool,
    /// Its calls that wait.
    calls: Vec<CallId>,
}

#[derive(Debug, Clone, Copy)]
struct Place {
    speaker: Speaker,
    wait: Wait,
}

#[derive(Debug)]
struct Slot {
    barrier: Barrier,
    timer: Option<Instant>,
    /// What `all` means in a generation, as its first party found it.
    all: Option<(u64, u32)>,
}

#[derive(Debug, Default)]
struct Main {
    /// Waits for the end that main is inside of: several when it does several things at once.
    waits: usize,
    declared: BTreeSet<BarrierName>,
}

/// The board of one scope.
#[derive(Debug, Default)]
pub struct Board {
    tasks: HashMap<TaskId, Task>,
    lines: IndexMap<StreamName, ()>,
    streams_count: u32,
    /// The last tasks that ended, oldest first: the unexpected ones apart, so that many good ends do not hide a bad one.
    ended: VecDeque<Ended>,
    unexpected: VecDeque<Ended>,
    any_unexpected: bool,
    prospects: Prospects,
    barriers: IndexMap<BarrierName, Slot>,
    topics: Topics,
    calls: HashMap<CallId, Place>,
    timers: BTreeSet<(Instant, usize)>,
    main: Main,
    followers: BTreeMap<TaskId, Culprit>,
    latched: VecDeque<(usize, Arc<Decided>)>,
    latched_parties: usize,
    latched_bytes: usize,
    records: Vec<MeetingRecord>,
    recorded_waits: usize,
    topic_waits: Vec<TopicWaitRecord>,
    topic_waits_omitted: usize,
}

impl Board {
    /// Takes in one event. Never blocks and never reads a clock.
    pub fn handle(&mut self, event: Event, now: Instant, actions: &mut Vec<Action>) {
        match event {
            Event::TaskScheduled { task, label, joins, group_size } => {
                self.schedule(task, &label, joins, group_size)
            }
            Event::StreamsDefined { count } => self.streams_count = count,
            Event::TaskProgressed { task, text } => {
                if let Some(task) = self.tasks.get_mut(&task) {
                    task.doing = Some((text, now));
                }
            }
            Event::TaskEnded { task, fate } => self.end_task(task, fate, now, actions),
            Event::SessionSuspended { tasks } => self.suspend(&tasks, true, now, actions),
            Event::SessionResumed { tasks } => self.suspend(&tasks, false, now, actions),
            Event::MainWaited { waiting: true } => self.main.waits += 1,
            Event::MainWaited { waiting: false } => self.main.waits = self.main.waits.saturating_sub(1),
            Event::MainDeclared { names } => self.main.declared.extend(names),
            Event::Asked { call, speaker, request } => self.ask(call, speaker, request, now, actions),
            Event::Left { call, link_down } => self.leave(call, link_down, now, actions),
            Event::TimePassed => self.pass_time(now, actions),
        }
        self.end_hopeless(now, actions);
    }

    /// The next moment at which time alone changes something.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Instant> {
        let barriers = self.timers.first().map(|&(at, _)| at);
        [barriers, self.topics.next_deadline()].into_iter().flatten().min()
    }

    /// The topics.
    #[must_use]
    pub fn topics(&self) -> &Topics {
        &self.topics
    }

    /// Every barrier, in order of first use.
    pub fn barriers(&self) -> impl Iterator<Item = &Barrier> {
        self.barriers.values().map(|slot| &slot.barrier)
    }

    /// Who broke the barrier that this task was told to be broken last, if that was somebody else.
    #[must_use]
    pub fn broken_by(&self, task: TaskId) -> Option<&Culprit> {
        self.followers.get(&task)
    }

    /// Every decided meeting, in order.
    #[must_use]
    pub fn records(&self) -> &[MeetingRecord] {
        &self.records
    }

    /// Every wait for values of a topic that is over, in order, and how many more are not on record.
    #[must_use]
    pub fn topic_waits(&self) -> (&[TopicWaitRecord], usize) {
        (&self.topic_waits, self.topic_waits_omitted)
    }

    /// What a speaker is called.
    #[must_use]
    pub fn label(&self, speaker: Speaker) -> Arc<str> {
        match speaker {
            Speaker::Task(task) => {
                self.tasks.get(&task).map_or_else(|| "a finished task".into(), |t| t.label.clone())
            }
            Speaker::Main => "main".into(),
            Speaker::ByHand => "by hand".into(),
        }
    }

    fn schedule(
        &mut self,
        task: TaskId,
        label: &SpeakerLabel,
        joins: Option<Vec<BarrierName>>,
        group_size: Option<u32>,
    ) {
        if self.tasks.contains_key(&task) {
            return;
        }
        let joins: Option<BTreeSet<BarrierName>> = joins.map(|names| names.into_iter().collect());
        let (line, _) = self.lines.insert_full(label.stream.clone(), ());
        self.prospects.task_came(task, line, label.number.into(), joins.clone());
        let SpeakerLabel { stream, number, block } = label;
        self.tasks.insert(
            task,
            Task {
                label: format!("{stream}/{number}-{block}").into(),
                long: format!("task {number}-{block} on stream {stream}"),
                joins,
                group_size,
                doing: None,
                suspended: false,
                calls: Vec::new(),
            },
        );
    }

    fn end_task(&mut self, id: TaskId, fate: TaskFate, now: Instant, actions: &mut Vec<Action>) {
        let Some(task) = self.tasks.remove(&id) else { return };
        self.any_unexpected |= fate.unexpected;
        let ended = Ended {
            culprit: Culprit { speaker: Speaker::Task(id), label: task.label },
            long: task.long,
            fate,
            at: now,
            joins: task.joins,
            follower: self.followers.contains_key(&id),
        };
        // What it waited for first: whoever met it there is told of this very end, not of its consequences.
        for call in task.calls {
            let Some(place) = self.calls.remove(&call) else { continue };
            match place.wait {
                Wait::Barrier(index) => {
                    let sentence = story::died(self.barriers[index].barrier.meeting(), &ended, now);
                    self.feed(index, barrier::Event::Died { call, sentence }, now, actions);
                }
                Wait::Topic(_) => {
                    self.prospects.wait_ended(place.wait);
                    let reason = format!("its task is over: it {}", ended.fate.sentence);
                    self.feed_topics(topic::Event::TakenBack { call, reason }, now, actions);
                }
            }
        }
        self.prospects.task_ended(id);
        let list = if ended.fate.unexpected { &mut self.unexpected } else { &mut self.ended };
        if list.len() >= ENDED_COUNT_MAX {
            // The first failure explains most of what follows: the second oldest goes.
            list.remove(1);
        }
        list.push_back(ended);
    }

    fn suspend(&mut self, tasks: &[TaskId], suspended: bool, now: Instant, actions: &mut Vec<Action>) {
        let grace = if suspended { Grace::Suspended } else { Grace::For(limits::RECONNECTION_GRACE) };
        for task in tasks {
            let Some(task) = self.tasks.get_mut(task) else { continue };
            task.suspended = suspended;
            for call in task.calls.clone() {
                if let Some(&Place { wait: Wait::Barrier(index), .. }) = self.calls.get(&call) {
                    self.feed(index, barrier::Event::Regraced { call, grace }, now, actions);
                }
            }
        }
    }

    fn ask(
        &mut self,
        call: CallId,
        speaker: Speaker,
        request: Request,
        now: Instant,
        actions: &mut Vec<Action>,
    ) {
        if let Speaker::Task(task) = speaker {
            if !self.tasks.contains_key(&task) {
                actions.push(refuse(call, Refusal::NotATask { task }));
                return;
            }
            self.prospects.task_spoke(task);
        }
        if let (Speaker::Task(_), Some(what)) = (speaker, request.reserved()) {
            actions.push(refuse(call, Refusal::NotForBlocks { what }));
            return;
        }
        match request {
            Request::Enter { barrier, parties, timeout, token, payload, display_name } => {
                let label = self.display(speaker, display_name);
                let index = match self.slot(&barrier) {
                    Ok(index) => index,
                    Err(refusal) => return actions.push(refuse(call, refusal)),
                };
                let parties = match self.parties(speaker, index, parties) {
                    Ok(parties) => parties,
                    Err(refusal) => return actions.push(refuse(call, refusal)),
                };
                let entry = Entry { call, speaker, label, token, parties, timeout, payload };
                self.feed(index, barrier::Event::Entered(entry), now, actions);
            }
            Request::Abort { barrier, reason } => {
                let by = Culprit { speaker, label: self.label(speaker) };
                self.command(call, &barrier, barrier::Event::Aborted { by, reason }, now, actions);
            }
            Request::Reset { barrier } => {
                self.command(call, &barrier, barrier::Event::Reset, now, actions);
            }
            Request::Hold { barrier, release } => {
                let event = if release { barrier::Event::LetGo } else { barrier::Event::Held };
                self.command(call, &barrier, event, now, actions);
            }
            Request::Publish { topic, content, token } => {
                let label = self.label(speaker);
                let event = topic::Event::Published { call, speaker, label, topic, content, token };
                self.feed_topics(event, now, actions);
            }
            Request::Await { topic, wanted, timeout } => {
                self.await_values(call, speaker, topic, wanted, timeout, now, actions);
            }
        }
    }

    /// Does something to a barrier that needs no waiting.
    fn command(
        &mut self,
        call: CallId,
        name: &BarrierName,
        event: barrier::Event,
        now: Instant,
        actions: &mut Vec<Action>,
    ) {
        match self.slot(name) {
            Err(refusal) => actions.push(refuse(call, refusal)),
            Ok(index) => {
                self.feed(index, event, now, actions);
                actions.push(Action::Answer { call, answer: Answer::Done });
            }
        }
    }

    fn leave(&mut self, call: CallId, link_down: bool, now: Instant, actions: &mut Vec<Action>) {
        let Some(&Place { speaker, wait }) = self.calls.get(&call) else { return };
        let suspended = match speaker {
            Speaker::Task(task) => self.tasks.get(&task).is_some_and(|task| task.suspended),
            Speaker::Main | Speaker::ByHand => false,
        };
        match wait {
            Wait::Topic(_) => {
                self.forget(call);
                self.prospects.wait_ended(wait);
                let reason = if link_down { "its connection broke" } else { "it was given up" };
                self.feed_topics(topic::Event::TakenBack { call, reason: reason.into() }, now, actions);
            }
            Wait::Barrier(index) => {
                let barrier = &self.barriers[index].barrier;
                let Some(arrival) = barrier.arrival(call) else {
                    // It came early for a meeting that is held: it has not entered anything yet.
                    self.forget(call);
                    self.feed(index, barrier::Event::Lost { call, grace: Grace::None }, now, actions);
                    return;
                };
                let grace = match &arrival.token {
                    None => Grace::None,
                    Some(token) if is_implicit(token) && !link_down => Grace::None,
                    Some(_) if suspended => Grace::Suspended,
                    Some(_) => Grace::For(limits::RECONNECTION_GRACE),
                };
                self.feed(index, barrier::Event::Lost { call, grace }, now, actions);
            }
        }
    }

    fn pass_time(&mut self, now: Instant, actions: &mut Vec<Action>) {
        while let Some(&(at, index)) = self.timers.first()
            && at <= now
        {
            self.feed(index, barrier::Event::TimePassed, now, actions);
        }
        self.feed_topics(topic::Event::TimePassed, now, actions);
    }

    /// Passes an event to a barrier and does what it says.
    fn feed(&mut self, index: usize, event: barrier::Event, now: Instant, actions: &mut Vec<Action>) {
        let mut events = VecDeque::from([event]);
        let mut orders = Vec::new();
        while let Some(event) = events.pop_front() {
            self.barriers[index].barrier.handle(event, now, &mut orders);
            for order in orders.drain(..) {
                self.follow(index, order, now, actions);
            }
            let early = self.barriers[index].barrier.take_early();
            events.extend(early.into_iter().map(|entry| {
                self.forget(entry.call);
                barrier::Event::Entered(entry)
            }));
        }
        self.refresh(index);
    }

    fn follow(&mut self, index: usize, order: barrier::Action, now: Instant, actions: &mut Vec<Action>) {
        let wait = Wait::Barrier(index);
        match order {
            barrier::Action::Wait { call } => self.note_wait(index, call),
            barrier::Action::Supersede { old, call } => {
                if let Some(place) = self.forget(old) {
                    self.remember(call, place);
                }
                actions.push(refuse(old, Refusal::Superseded));
            }
            barrier::Action::Deliver { call, speaker, decided, arrival } => {
                if let Speaker::Task(task) = speaker {
                    let broken = decided.as_break();
                    self.follow_up(task, broken.is_some(), broken.and_then(|cause| cause.culprit.as_ref()));
                }
                actions.push(Action::Answer { call, answer: Answer::of(&decided, arrival) });
            }
            barrier::Action::Refuse { call, refusal } => actions.push(refuse(call, refusal)),
            barrier::Action::Decide(mut decided) => {
                self.prospects.wait_ended(wait);
                self.add_evidence(index, &mut decided, now);
                let decided = Arc::new(*decided);
                self.barriers[index].barrier.latch(&decided);
                self.record(&decided);
                self.tell(&decided, actions);
                self.keep_latched(index, decided);
            }
        }
    }

    /// Notes that a call waits at a barrier now. A meeting that this very call has completed is over already.
    fn note_wait(&mut self, index: usize, call: CallId) {
        let barrier = &self.barriers[index].barrier;
        let wait = Wait::Barrier(index);
        match barrier.arrival(call).map(|arrival| arrival.speaker) {
            Some(speaker) => {
                self.remember(call, Place { speaker, wait });
                self.refresh(index);
                if let Speaker::Task(task) = speaker {
                    self.prospects.task_waits(task, wait);
                }
            }
            None => {
                if let Some(speaker) = barrier.early(call) {
                    self.remember(call, Place { speaker, wait });
                }
            }
        }
    }

    fn tell(&mut self, decided: &Arc<Decided>, actions: &mut Vec<Action>) {
        let culprit = decided.as_break().and_then(|cause| cause.culprit.as_ref());
        actions.reserve(decided.meeting.arrivals.len());
        for (arrival, number) in decided.meeting.arrivals.iter().zip(0..) {
            self.forget(arrival.call);
            if let Speaker::Task(task) = arrival.speaker {
                self.follow_up(task, decided.as_break().is_some(), culprit);
            }
            let answer = Answer::of(decided, Some(number));
            actions.push(Action::Answer { call: arrival.call, answer });
        }
    }

    /// Keeps in mind whose break a task was told of last; a barrier that it passed makes that history.
    fn follow_up(&mut self, task: TaskId, broken: bool, culprit: Option<&Culprit>) {
        match culprit {
            Some(culprit) if culprit.speaker != Speaker::Task(task) => {
                self.followers.insert(task, culprit.clone());
            }
            None if !broken && !self.followers.is_empty() => {
                self.followers.remove(&task);
            }
            _ => {}
        }
    }

    /// Tells the count and the timer what a barrier needs now.
    fn refresh(&mut self, index: usize) {
        let slot = &mut self.barriers[index];
        if let Some(meeting) = slot.barrier.meeting() {
            let need = (meeting.parties as usize).saturating_sub(meeting.arrivals.len());
            let held = slot.barrier.is_held();
            self.prospects.wait_needs(Wait::Barrier(index), Some(slot.barrier.name()), need, held);
        }
        let timer = slot.barrier.next_deadline();
        if timer != slot.timer {
            if let Some(old) = slot.timer {
                self.timers.remove(&(old, index));
            }
            if let Some(new) = timer {
                self.timers.insert((new, index));
            }
            slot.timer = timer;
        }
    }

    fn display(&self, speaker: Speaker, display_name: Option<String>) -> Arc<str> {
        match (display_name, speaker) {
            (None, _) => self.label(speaker),
            (Some(name), Speaker::ByHand) => format!("{name} (by hand)").into(),
            (Some(name), Speaker::Task(_) | Speaker::Main) => name.into(),
        }
    }

    fn slot(&mut self, name: &BarrierName) -> Result<usize, Refusal> {
        if let Some(index) = self.barriers.get_index_of(name) {
            return Ok(index);
        }
        if self.barriers.len() >= limits::BARRIERS_COUNT_MAX {
            let what = "too many barriers".to_owned();
            return Err(Refusal::Full { what, limit: limits::BARRIERS_COUNT_MAX.to_string() });
        }
        let slot = Slot { barrier: Barrier::new(name.clone()), timer: None, all: None };
        Ok(self.barriers.insert_full(name.clone(), slot).0)
    }

    /// How many parties there are for this speaker at this barrier.
    fn parties(&mut self, speaker: Speaker, index: usize, asked: Parties) -> Result<u32, Refusal> {
        let problem = |problem: &str| Refusal::Invalid { field: "parties", problem: problem.to_owned() };
        let count = match asked {
            Parties::Count(count) => count,
            Parties::All { more } => {
                let slot = &mut self.barriers[index];
                let generation = slot.barrier.generation();
                let now = self.streams_count;
                let all = match slot.all {
                    Some((of, all)) if of == generation => all,
                    _ => now,
                };
                slot.all = Some((generation, all));
                all.saturating_add(more)
            }
            Parties::Group { more } => match speaker {
                Speaker::Task(task) => {
                    let size = self.tasks.get(&task).and_then(|task| task.group_size);
                    size.map(|size| size.saturating_add(more)).ok_or_else(|| {
                        problem("is missing, and the block was not run on a group: say how many parties there are")
                    })?
                }
                Speaker::Main | Speaker::ByHand => {
                    let waiting = self.barriers[index].barrier.meeting().map(|meeting| meeting.parties);
                    waiting.ok_or_else(|| {
                        problem(
                            "is missing, and nobody waits at this barrier who has said it: say how many parties there are",
                        )
                    })?
                }
            },
        };
        if count == 0 || count > limits::BARRIER_PARTIES_MAX {
            return Err(problem("must be 1 to 100,000"));
        }
        Ok(count)
    }

    fn remember(&mut self, call: CallId, place: Place) {
        self.calls.insert(call, place);
        if let Speaker::Task(task) = place.speaker
            && let Some(task) = self.tasks.get_mut(&task)
        {
            task.calls.push(call);
        }
    }

    fn forget(&mut self, call: CallId) -> Option<Place> {
        let place = self.calls.remove(&call)?;
        if let Speaker::Task(task) = place.speaker
            && let Some(task) = self.tasks.get_mut(&task)
            && let Some(at) = task.calls.iter().position(|&own| own == call)
        {
            task.calls.swap_remove(at);
        }
        Some(place)
    }

    #[cfg(test)]
    pub(crate) fn assert_invariants(&self) {
        self.topics.assert_invariants();
        for slot in self.barriers.values() {
            slot.barrier.assert_invariants();
            assert_eq!(
                slot.timer,
                slot.barrier.next_deadline(),
                "the timer of a barrier is its next deadline"
            );
            for arrival in slot.barrier.meeting().into_iter().flat_map(|meeting| &meeting.arrivals) {
                assert!(self.calls.contains_key(&arrival.call), "a party can be found by its call");
                if let Speaker::Task(task) = arrival.speaker {
                    assert!(self.tasks.contains_key(&task), "nobody waits with the dead");
                }
            }
        }
    }
}

/// Ended tasks that a story can be told of, of each kind.
const ENDED_COUNT_MAX: usize = 64;
/// What stands at the beginning of tokens that the relay makes up: no caller can send it.
pub const IMPLICIT_TOKEN: char = '\0';

fn is_implicit(token: &str) -> bool {
    token.starts_with(IMPLICIT_TOKEN)
}

fn refuse(call: CallId, refusal: Refusal) -> Action {
    Action::Answer { call, answer: Answer::Refused(refusal) }
}

#[cfg(test)]
mod tests;
