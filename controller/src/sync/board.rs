//! All barriers and topics of one scope, and what is known of its tasks: the machine that the host holds. Pure.
//!
//! It passes each event to the barrier or topic it concerns, adds evidence to what they decide, keeps count of who can
//! still come ([`super::hopeless`]) and ends at once what can no longer be met. Sends nothing, holds no locks, reads no
//! clock, starts no task: it believes what it is told of them.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use indexmap::IndexMap;
use millstream_common::{
    id::{BarrierName, BlockName, StreamName, TaskId, TopicName},
    limits,
};

use super::{
    CallId, Culprit, Refusal, Speaker,
    barrier::{self, Barrier, Decided, Decision, Entry, Grace},
    hopeless::{Finding, Prospects, Wait},
    story::{self, Ended},
    topic::{self, Content, Topics, Value},
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
        /// Parties; none: the size of the speaker's group, or for main and people what those who wait have said.
        parties: Option<u32>,
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
        /// How many: at least 1.
        count: u64,
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
    /// Main waits for the end, or has stopped doing so.
    MainWaited {
        /// Whether it waits.
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
    /// Wake whoever reads this topic.
    Grew {
        /// The topic.
        topic: TopicName,
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
}

#[derive(Debug, Default)]
struct Main {
    waiting: bool,
    declared: BTreeSet<BarrierName>,
}

/// The board of one scope.
#[derive(Debug, Default)]
pub struct Board {
    tasks: HashMap<TaskId, Task>,
    lines: IndexMap<StreamName, ()>,
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
}

impl Board {
    /// Takes in one event. Never blocks and never reads a clock.
    pub fn handle(&mut self, event: Event, now: Instant, actions: &mut Vec<Action>) {
        match event {
            Event::TaskScheduled { task, label, joins, group_size } => {
                self.schedule(task, &label, joins, group_size)
            }
            Event::TaskProgressed { task, text } => {
                if let Some(task) = self.tasks.get_mut(&task) {
                    task.doing = Some((text, now));
                }
            }
            Event::TaskEnded { task, fate } => self.end_task(task, fate, now, actions),
            Event::SessionSuspended { tasks } => self.suspend(&tasks, true, now, actions),
            Event::SessionResumed { tasks } => self.suspend(&tasks, false, now, actions),
            Event::MainWaited { waiting } => self.main.waiting = waiting,
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

    /// Whether this task may still speak.
    #[must_use]
    pub fn knows(&self, task: TaskId) -> bool {
        self.tasks.contains_key(&task)
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

    /// Tasks that could still come to a barrier and what they do now, one line each, at most `count_max`.
    #[must_use]
    pub fn missing(&self, barrier: &Barrier, count_max: usize, now: Instant) -> Vec<String> {
        let inside: BTreeSet<Speaker> =
            barrier.meeting().into_iter().flat_map(|meeting| &meeting.arrivals).map(|a| a.speaker).collect();
        self.prospects
            .unfinished(barrier.name())
            .filter(|&(task, may)| may && !inside.contains(&Speaker::Task(task)))
            .take(count_max)
            .filter_map(|(task, _)| {
                self.tasks.get(&task).map(|t| format!("{}: {}", t.label, self.doing(task, now)))
            })
            .collect()
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
                    self.feed_topics(topic::Event::TakenBack { call }, now, actions);
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
            Request::Await { topic, count, timeout } => {
                self.feed_topics(topic::Event::Awaited { call, topic, count, timeout }, now, actions);
                if self.topics.awaited(call).is_some() {
                    let wait = Wait::Topic(call.0);
                    self.remember(call, Place { speaker, wait });
                    self.prospects.wait_needs(wait, None, 1, false);
                    if let Speaker::Task(task) = speaker {
                        self.prospects.task_waits(task, wait);
                    }
                }
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
                self.feed_topics(topic::Event::TakenBack { call }, now, actions);
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
            barrier::Action::Deliver { call, decided, arrival } => {
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

    fn record(&mut self, decided: &Decided) {
        let meeting = &decided.meeting;
        let room = RECORDED_WAITS_COUNT_MAX.saturating_sub(self.recorded_waits);
        let listed = meeting.arrivals.len().min(room);
        self.recorded_waits += listed;
        if self.records.len() >= RECORDED_WAITS_COUNT_MAX {
            return;
        }
        let waits = meeting.arrivals.iter().take(listed).map(|arrival| WaitRecord {
            speaker: arrival.speaker,
            label: arrival.label.clone(),
            entered: arrival.entered,
            waited: decided.at.duration_since(arrival.entered),
        });
        let broken = decided.as_break();
        self.records.push(MeetingRecord {
            name: meeting.name.clone(),
            generation: meeting.generation,
            parties: meeting.parties,
            decided: decided.at,
            broken: broken.map(|cause| cause.sentence.clone()),
            culprit: broken.and_then(|cause| cause.culprit.clone()),
            by_hand: meeting.by_hand.clone(),
            waits: waits.collect(),
            omitted: meeting.arrivals.len() - listed,
        });
    }

    /// Bounds what can be asked for again: whole meetings go, oldest first.
    fn keep_latched(&mut self, index: usize, decided: Arc<Decided>) {
        self.latched_parties += decided.meeting.arrivals.len();
        self.latched_bytes += decided.payload_bytes();
        self.latched.push_back((index, decided));
        while self.latched.len() > 1
            && (self.latched_parties > LATCHED_PARTIES_COUNT_MAX
                || self.latched_bytes > LATCHED_PAYLOADS_BYTES_MAX
                || self.latched.len() > LATCHED_PARTIES_COUNT_MAX)
        {
            let Some((index, old)) = self.latched.pop_front() else { break };
            self.latched_parties -= old.meeting.arrivals.len();
            self.latched_bytes -= old.payload_bytes();
            self.barriers[index].barrier.forget(&old);
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

    fn feed_topics(&mut self, event: topic::Event, now: Instant, actions: &mut Vec<Action>) {
        let mut orders = Vec::new();
        self.topics.handle(event, now, &mut orders);
        for order in orders {
            let (call, answer) = match order {
                topic::Action::Wait { .. } => continue,
                topic::Action::Grew { topic } => {
                    actions.push(Action::Grew { topic });
                    continue;
                }
                topic::Action::Indexed { call, index } => (call, Answer::Indexed(index)),
                topic::Action::Met { call, topic, count } => (call, self.values(&topic, count)),
                topic::Action::TimedOut { call, sentence } => (call, Answer::TimedOut(sentence)),
                topic::Action::GiveUp { call, sentence } => (call, Answer::GivenUp(sentence)),
                topic::Action::Refuse { call, refusal } => (call, Answer::Refused(refusal)),
            };
            if let Some(place) = self.forget(call) {
                self.prospects.wait_ended(place.wait);
            }
            actions.push(Action::Answer { call, answer });
        }
    }

    fn values(&self, topic: &TopicName, count: u64) -> Answer {
        let mut values = self.topics.values(topic, 0, limits::SYNC_ANSWER_BYTES_MAX);
        let wanted = usize::try_from(count).unwrap_or(usize::MAX);
        if values.len() < wanted {
            return Answer::Refused(Refusal::Full {
                what: format!(
                    "the first {count} values of topic `{topic}` do not fit in one answer: subscribe to it"
                ),
                limit: format!("{} bytes", limits::SYNC_ANSWER_BYTES_MAX),
            });
        }
        values.truncate(wanted);
        Answer::Values(values)
    }

    /// Ends every wait that can no longer be met. Each round ends at least one, so it comes to an end.
    fn end_hopeless(&mut self, now: Instant, actions: &mut Vec<Action>) {
        loop {
            if !self.main.waiting && !self.any_unexpected {
                return;
            }
            let declared = &self.main.declared;
            let main = |barrier: Option<&BarrierName>| barrier.is_some_and(|name| declared.contains(name));
            let Finding { absent, circle } = self.prospects.search(main);
            let mut stories: Vec<(Wait, String, Option<Culprit>)> = Vec::new();
            for wait in absent {
                let (sentence, culprit) = self.tell_absence(wait, now);
                stories.push((wait, sentence, culprit));
            }
            if !circle.is_empty() {
                let told = story::circle(&circle, |wait| self.place_name(wait), |task| self.long(task));
                for link in &circle {
                    let sentence = match self.counts(link.wait) {
                        Some((entered, parties)) => format!("{entered} of {parties} entered; {told}"),
                        None => told.clone(),
                    };
                    stories.push((link.wait, sentence, None));
                }
            }
            if stories.is_empty() {
                return;
            }
            for (wait, sentence, culprit) in stories {
                match wait {
                    Wait::Barrier(index) => {
                        self.feed(index, barrier::Event::FoundHopeless { sentence, culprit }, now, actions);
                    }
                    Wait::Topic(call) => {
                        let call = CallId(call);
                        if let (Some(culprit), Some(Place { speaker: Speaker::Task(task), .. })) =
                            (culprit, self.calls.get(&call))
                        {
                            self.followers.insert(*task, culprit);
                        }
                        self.feed_topics(topic::Event::FoundHopeless { call, sentence }, now, actions);
                    }
                }
            }
        }
    }

    /// Why too few are left for a wait, and whose end that was.
    fn tell_absence(&self, wait: Wait, now: Instant) -> (String, Option<Culprit>) {
        let left = self.prospects.left_for(wait);
        let name = match wait {
            Wait::Barrier(index) => Some(self.barriers[index].barrier.name()),
            Wait::Topic(_) => None,
        };
        let (reason, culprit) = story::absence(name, &self.unexpected, &self.ended, self.tasks.len(), now);
        match self.counts(wait) {
            Some((entered, parties)) => (story::too_few(entered, parties, left, &reason), culprit),
            None => (format!("nobody is left who could publish: {reason}"), culprit),
        }
    }

    fn counts(&self, wait: Wait) -> Option<(usize, u32)> {
        let Wait::Barrier(index) = wait else { return None };
        let meeting = self.barriers[index].barrier.meeting()?;
        Some((meeting.arrivals.len(), meeting.parties))
    }

    fn place_name(&self, wait: Wait) -> String {
        match wait {
            Wait::Barrier(index) => format!("barrier `{}`", self.barriers[index].barrier.name()),
            Wait::Topic(call) => self
                .topics
                .awaited(CallId(call))
                .map_or_else(String::new, |(topic, _)| format!("topic `{topic}`")),
        }
    }

    fn long(&self, task: TaskId) -> String {
        self.tasks.get(&task).map_or_else(|| "a task".to_owned(), |t| t.long.clone())
    }

    /// What a task does now, as half a sentence.
    fn doing(&self, task: TaskId, now: Instant) -> String {
        let Some(task) = self.tasks.get(&task) else { return "has ended".to_owned() };
        let waits = task.calls.first().and_then(|call| {
            let place = self.calls.get(call)?;
            let since = match place.wait {
                Wait::Barrier(index) => self.barriers[index].barrier.arrival(*call)?.entered,
                Wait::Topic(_) => self.topics.awaited(*call)?.1,
            };
            Some((self.place_name(place.wait), since))
        });
        story::doing(waits, task.doing.as_ref(), task.suspended, now)
    }

    /// Puts what only the board knows behind the sentence of a break, before it is told to anybody.
    fn add_evidence(&self, index: usize, decided: &mut Decided, now: Instant) {
        let Decision::Broken(cause) = &mut decided.decision else { return };
        match cause.cause {
            barrier::Cause::TimedOut => {
                let inside: BTreeSet<Speaker> = decided.meeting.arrivals.iter().map(|a| a.speaker).collect();
                let name = self.barriers[index].barrier.name();
                let missing = self
                    .prospects
                    .unfinished(name)
                    .filter(|&(task, may)| may && !inside.contains(&Speaker::Task(task)))
                    .take(EVIDENCE_COUNT_MAX)
                    .map(|(task, _)| format!("{} {}", self.long(task), self.doing(task, now)));
                story::append_missing(&mut cause.sentence, missing);
            }
            barrier::Cause::Lost | barrier::Cause::Aborted | barrier::Cause::OtherCount => {
                if let Some(task) = cause.culprit.as_ref().and_then(Culprit::task)
                    && let Some((text, since)) = self.tasks.get(&task).and_then(|t| t.doing.as_ref())
                {
                    story::append_doing(&mut cause.sentence, text, now.duration_since(*since));
                }
            }
            barrier::Cause::Died | barrier::Cause::Hopeless => {}
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
        let slot = Slot { barrier: Barrier::new(name.clone()), timer: None };
        Ok(self.barriers.insert_full(name.clone(), slot).0)
    }

    fn parties(&self, speaker: Speaker, index: usize, asked: Option<u32>) -> Result<u32, Refusal> {
        let waiting = self.barriers[index].barrier.meeting().map(|meeting| meeting.parties);
        let known = match speaker {
            Speaker::Task(task) => self.tasks.get(&task).and_then(|task| task.group_size),
            Speaker::Main | Speaker::ByHand => waiting,
        };
        let problem = match speaker {
            Speaker::Task(_) => {
                "is missing, and the block was not run on a group: say how many parties there are"
            }
            Speaker::Main | Speaker::ByHand => {
                "is missing, and nobody waits at this barrier who has said it: say how many parties there are"
            }
        };
        asked.or(known).ok_or_else(|| Refusal::Invalid { field: "parties", problem: problem.to_owned() })
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
/// Missing tasks named when patience ends.
const EVIDENCE_COUNT_MAX: usize = 3;
/// Waits in the results; of later ones only the meetings are kept.
const RECORDED_WAITS_COUNT_MAX: usize = 200_000;
/// Parties whose decision can be asked for again: twice the largest meeting.
const LATCHED_PARTIES_COUNT_MAX: usize = 2 * limits::BARRIER_PARTIES_MAX as usize;
/// Payloads kept for that.
const LATCHED_PAYLOADS_BYTES_MAX: usize = 16 * 1024 * 1024;

/// What stands at the beginning of tokens that the relay makes up: no caller can send it.
pub const IMPLICIT_TOKEN: char = '\0';

fn is_implicit(token: &str) -> bool {
    token.starts_with(IMPLICIT_TOKEN)
}

fn refuse(call: CallId, refusal: Refusal) -> Action {
    Action::Answer { call, answer: Answer::Refused(refusal) }
}

impl Answer {
    fn of(decided: &Arc<Decided>, arrival: Option<u32>) -> Self {
        match (&decided.decision, arrival) {
            (Decision::Released, Some(arrival)) => Self::Released { decided: decided.clone(), arrival },
            _ => Self::Broken { decided: decided.clone(), arrival },
        }
    }
}

impl Request {
    /// What blocks may not do.
    fn reserved(&self) -> Option<&'static str> {
        match self {
            Self::Reset { .. } => Some("reset a barrier"),
            Self::Hold { .. } => Some("hold a barrier"),
            Self::Enter { .. } | Self::Abort { .. } | Self::Publish { .. } | Self::Await { .. } => None,
        }
    }
}
