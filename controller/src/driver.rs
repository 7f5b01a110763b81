//! The one loop of a test: takes what handles and links say, feeds the queues, performs what they order.
//!
//! Runs on a thread with a runtime of its own, so that a test that blocks its thread loses no lease. It decides what
//! becomes of tasks that no host has; everything else is decided by queues, hosts and the board of barriers. It never
//! waits for a peer or for a disk: links and the scribe do.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use millstream_common::{
    clock::World,
    convert,
    id::{TaskId, TestName},
    limits,
    outcome::{OutcomeKind, Phase, Reason, TaskEnd},
};
use millstream_proto::v1;
use tokio::{
    sync::oneshot,
    time::{Instant, sleep_until},
};
use tracing::{debug, warn};

use crate::{
    block::Block,
    link::{Link, LinkOptions, Opened, Order, Put, Report},
    outcome::CausedBy,
    queue::{Action, Ending, Event, Queue, Standing},
    results::{report::TaskReport, writer::ResultsWriter},
    streams::{StreamShared, TestShared},
    sync::host::SyncHost,
    task::{Stage, TaskShared},
};

mod ends;
mod handle;
mod links;
pub(crate) mod mailbox;
mod prepare;
pub(crate) mod scribe;

pub(crate) use handle::{Blocked, Handle, Input, Schedule, handle};
use mailbox::Mailbox;
pub(crate) use prepare::Ready;
use scribe::{Recorder, Scribe};

/// How far the ends of a test's tasks may lie behind its deadline before the test ends without them: the longest grace
/// period that a block gets without asking, its teardown and the killing.
const DEADLINE_GRACE: Duration = Duration::from_secs(90);

/// What the driver needs from its beginning.
pub(crate) struct Setup {
    pub(crate) world: World,
    pub(crate) test: TestName,
    pub(crate) deadline: Duration,
    pub(crate) link: LinkOptions,
    pub(crate) writer: ResultsWriter,
    pub(crate) scribe: Scribe,
    pub(crate) sync: SyncHost,
    pub(crate) shared: Arc<TestShared>,
    pub(crate) inbox: Arc<Mailbox<Input>>,
}

/// Where a link stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum LinkPhase {
    Idle,
    Opening,
    Up,
    Suspended,
    Closed,
}

struct LinkState {
    link: Link,
    /// The place, as its reach describes it.
    place: String,
    phase: LinkPhase,
    opened: Opened,
    /// Why there is no session, once there was none.
    lost: Option<(String, Reason)>,
    streams: Vec<usize>,
}

struct StreamState {
    shared: Arc<StreamShared>,
    link: usize,
    queue: Queue,
    /// Tasks that are not over, by their number.
    tasks: HashMap<u32, TaskId>,
}

/// A task that is not over.
struct Work {
    shared: Arc<TaskShared>,
    stream: usize,
    /// Until it is compiled.
    block: Option<Block>,
    /// Until it begins: until then it may have to be handed over again.
    request: Option<v1::StartTaskRequest>,
    commands: BTreeMap<Phase, Vec<String>>,
    drains: bool,
    recorder: Option<Recorder>,
    /// The host's own record of its end.
    end: Option<TaskEnd>,
    caused_by: Option<CausedBy>,
    phase: Option<Phase>,
    grace: Option<Duration>,
    at_deadline: bool,
    /// Whether the board of barriers knows of its end.
    told: bool,
    /// Whether its files are being completed: its end is decided.
    finishing: bool,
}

/// The loop.
pub(crate) struct Driver {
    setup: Setup,
    begin_ns: u64,
    deadline: Instant,
    deadline_passed: bool,
    links: Vec<LinkState>,
    streams: BTreeMap<usize, StreamState>,
    works: HashMap<TaskId, Work>,
    reports: BTreeMap<u32, TaskReport>,
    closing: bool,
    left_behind: Vec<String>,
    actions: Vec<Action>,
}

impl Driver {
    pub(crate) fn new(setup: Setup) -> Self {
        let now = setup.world.clock.now();
        Self {
            begin_ns: setup.world.clock.wall_ns(),
            deadline: now.checked_add(setup.deadline).unwrap_or(now + limits::WAIT_MAX),
            setup,
            deadline_passed: false,
            links: Vec::new(),
            streams: BTreeMap::new(),
            works: HashMap::new(),
            reports: BTreeMap::new(),
            closing: false,
            left_behind: Vec::new(),
            actions: Vec::new(),
        }
    }

    /// Runs until the test is closed and everything of it is on disk. Comes back with what could not be tidied.
    pub(crate) async fn run(mut self) -> Vec<String> {
        let inbox = Arc::clone(&self.setup.inbox);
        while !(self.closing && self.is_done()) {
            let deadline = self.deadline;
            tokio::select! {
                inputs = inbox.take() => {
                    for input in inputs {
                        self.handle(input);
                    }
                }
                () = sleep_until(deadline), if !self.closing => self.pass_deadline(),
            }
        }
        self.end()
    }

    fn is_done(&self) -> bool {
        self.works.is_empty() && self.links.iter().all(|link| link.phase == LinkPhase::Closed)
    }

    fn handle(&mut self, input: Input) {
        match input {
            Input::Schedule(schedule) => self.schedule(*schedule),
            Input::Go { tasks } => self.go(&tasks),
            Input::GoTogether { tasks, start, answer } => self.go_together(&tasks, start, answer),
            Input::Cancel { task } => self.wish(task, |number| Event::CancelAsked { number }),
            Input::Stop { task, grace } => {
                if let Some(work) = self.works.get_mut(&task) {
                    work.grace = grace;
                }
                self.wish(task, |number| Event::StopAsked { number });
            }
            Input::Explain { task, answer } => {
                // Whoever asked may have gone.
                let _told = answer.send(self.explain(task));
            }
            Input::Compiled { task, result } => self.compiled(task, result),
            Input::Link { link, report } => self.link_said(link, report),
            Input::Written(written) => self.written(*written),
            Input::Close => self.close(),
        }
    }

    // What handles ask for.

    fn schedule(&mut self, schedule: Schedule) {
        let Schedule { task, stream, block, held } = schedule;
        let index = stream.index;
        let number = task.stream_number;
        if !self.streams.contains_key(&index) {
            let link = self.link_of(&stream);
            self.links[link].streams.push(index);
            let queue = Queue::new(limits::STREAM_WINDOW_COUNT);
            self.streams.insert(index, StreamState { shared: stream, link, queue, tasks: HashMap::new() });
        }
        let work = Work {
            shared: Arc::clone(&task),
            stream: index,
            block: Some(block),
            request: None,
            commands: BTreeMap::new(),
            drains: false,
            recorder: None,
            end: None,
            caused_by: None,
            phase: None,
            grace: None,
            at_deadline: self.deadline_passed,
            told: false,
            finishing: false,
        };
        self.works.insert(task.id, work);
        if self.closing {
            let end =
                TaskEnd::never_begun(OutcomeKind::Cancelled, Reason::SessionClosed, "the streams are closed");
            self.complete(task.id, end, None);
        } else if self.deadline_passed {
            let end = TaskEnd::never_begun(OutcomeKind::Error, Reason::TestDeadline, self.deadline_text());
            self.complete(task.id, end, None);
        } else {
            if let Some(state) = self.streams.get_mut(&index) {
                state.tasks.insert(number, task.id);
            }
            self.feed(index, Event::Scheduled { number, held });
        }
    }

    fn deadline_text(&self) -> String {
        let limit = millstream_common::text::spoken(self.setup.deadline);
        format!("the test reached its deadline of {limit}: give it more with `deadline`")
    }

    /// The link to the place of a stream: streams with one destination share one.
    fn link_of(&mut self, stream: &StreamShared) -> usize {
        let place = stream.reach.describe();
        if let Some(index) = self.links.iter().position(|link| link.place == place) {
            return index;
        }
        let index = self.links.len();
        let inbox = Arc::clone(&self.setup.inbox);
        let there = |other: &Arc<StreamShared>| other.exclusive && other.reach.describe() == place;
        let exclusive = stream.exclusive || self.setup.shared.streams().iter().any(there);
        let link = Link::start(
            Arc::clone(&stream.reach),
            self.setup.world.clone(),
            LinkOptions { exclusive, ..self.setup.link.clone() },
            self.setup.sync.clone(),
            move |report| {
                let letter = Input::Link { link: index, report };
                let frequent = matches!(
                    letter,
                    Input::Link {
                        report: Report::Began { .. } | Report::Staged { .. } | Report::Clock(_),
                        ..
                    }
                );
                let inbox = Arc::clone(&inbox);
                // What a task depends on is said at once, even if whoever says it is dropped at its next wait; what a peer
                // could repeat without end waits for room.
                let left = if frequent {
                    Some(letter)
                } else {
                    if inbox.put(letter).is_err() {
                        debug!("a link spoke after the end of the test");
                    }
                    None
                };
                Box::pin(async move {
                    if let Some(letter) = left
                        && inbox.offer(letter).await.is_err()
                    {
                        debug!("a link spoke after the end of the test");
                    }
                })
            },
        );
        self.links.push(LinkState {
            link,
            place,
            phase: LinkPhase::Idle,
            opened: Opened::default(),
            lost: None,
            streams: Vec::new(),
        });
        index
    }

    fn go(&mut self, tasks: &[TaskId]) {
        for &task in tasks {
            self.wish(task, |number| Event::GoAsked { number });
        }
    }

    fn go_together(&mut self, tasks: &[TaskId], start: bool, answer: oneshot::Sender<Result<(), Blocked>>) {
        for &task in tasks {
            let Some(work) = self.works.get(&task) else { continue };
            let Some(state) = self.streams.get(&work.stream) else { continue };
            let numbers: Vec<u32> = tasks
                .iter()
                .filter_map(|other| self.works.get(other))
                .filter(|other| other.stream == work.stream)
                .map(|other| other.shared.stream_number)
                .collect();
            if let Some(held) = state.queue.held_before(work.shared.stream_number, &numbers) {
                let behind = self.label_in(state, held);
                let _told = answer.send(Err(Blocked { task: self.name_of(work), behind }));
                return;
            }
        }
        if start {
            self.go(tasks);
        }
        let _told = answer.send(Ok(()));
    }

    fn name_of(&self, work: &Work) -> String {
        format!("task {} on stream {}", work.shared.label(), work.shared.stream)
    }

    fn label_in(&self, state: &StreamState, number: u32) -> String {
        match state.tasks.get(&number).and_then(|task| self.works.get(task)) {
            Some(work) => format!("task {}", work.shared.label()),
            None => format!("task {number}"),
        }
    }

    fn wish(&mut self, task: TaskId, event: impl FnOnce(u32) -> Event) {
        let Some(work) = self.works.get(&task) else { return };
        let (stream, number) = (work.stream, work.shared.stream_number);
        self.feed(stream, event(number));
    }

    fn explain(&self, task: TaskId) -> String {
        let Some(work) = self.works.get(&task) else { return "it is over".to_owned() };
        let Some(state) = self.streams.get(&work.stream) else { return "it is not scheduled yet".to_owned() };
        let link = &self.links[state.link];
        let name = self.name_of(work);
        if work.finishing || work.end.is_some() {
            return format!("{name} has ended; its output and results are being brought home");
        }
        match state.queue.standing(work.shared.stream_number) {
            Standing::WaitsForHost if link.phase == LinkPhase::Suspended => {
                format!("{name} waits until the connection to {} is back", link.place)
            }
            Standing::WaitsForHost => format!("{name} waits until {} is reached", link.place),
            Standing::Preparing => {
                format!("{name} is being prepared: its files are under way to {}", link.place)
            }
            Standing::Behind { number } => format!("{name} waits for {}", self.label_in(state, number)),
            Standing::BehindHeld { number } => {
                format!(
                    "{name} waits for {}, which is prepared and was not started",
                    self.label_in(state, number)
                )
            }
            Standing::Held => format!("{name} is prepared and was not started"),
            Standing::Next => format!("{name} is about to begin on {}", link.place),
            Standing::Running => match work.phase {
                Some(phase) => format!("{name} runs its phase {phase} on {}", link.place),
                None => format!("{name} runs on {}", link.place),
            },
            Standing::Unknown => format!("{name} is being ended"),
        }
    }

    fn pass_deadline(&mut self) {
        if self.deadline_passed {
            // What did not end within its grace is not waited for: closing the sessions ends it.
            warn!("tasks did not end in time after the deadline of the test");
            self.close();
            return;
        }
        warn!("{}", self.deadline_text());
        self.deadline_passed = true;
        self.deadline = self.setup.world.clock.now() + DEADLINE_GRACE;
        let mut tasks: Vec<(u32, TaskId)> =
            self.works.iter().map(|(&task, work)| (work.shared.test_number, task)).collect();
        // The last first, so that none of them moves up meanwhile.
        tasks.sort_unstable_by(|a, b| b.cmp(a));
        for (_, task) in tasks {
            if let Some(work) = self.works.get_mut(&task) {
                work.at_deadline = true;
            }
            self.wish(task, |number| Event::StopAsked { number });
        }
    }

    fn close(&mut self) {
        if self.closing {
            return;
        }
        self.closing = true;
        for link in &self.links {
            link.link.order(Order::Close);
        }
        if self.links.is_empty() {
            self.finish_remaining();
        }
    }

    // The queues.

    fn feed(&mut self, stream: usize, event: Event) {
        let mut actions = std::mem::take(&mut self.actions);
        if let Some(state) = self.streams.get_mut(&stream) {
            state.queue.handle(event, &mut actions);
        }
        for action in actions.drain(..) {
            self.perform(stream, action);
        }
        self.actions = actions;
    }

    fn perform(&mut self, stream: usize, action: Action) {
        let Some(state) = self.streams.get(&stream) else { return };
        let link = state.link;
        let task = |number: u32| state.tasks.get(&number).copied();
        match action {
            Action::Connect => self.connect(stream, link),
            Action::Prepare { number } => {
                if let Some(task) = task(number) {
                    self.prepare(task, stream, link);
                }
            }
            Action::Put { number, previous, held } => {
                if let Some(task) = task(number) {
                    self.put(task, link, previous, held);
                }
            }
            Action::Go { number } => self.signal(link, task(number), v1::SignalKind::Go),
            Action::Cancel { number } => self.signal(link, task(number), v1::SignalKind::Cancel),
            Action::Stop { number } => self.signal(link, task(number), v1::SignalKind::Stop),
            Action::Finish { number, ending } => {
                if let Some(task) = task(number) {
                    let end = self.ending(task, link, ending);
                    self.complete(task, end, None);
                }
            }
        }
    }

    fn connect(&mut self, stream: usize, link: usize) {
        let state = &mut self.links[link];
        match state.phase {
            LinkPhase::Idle => {
                state.phase = LinkPhase::Opening;
                state.link.order(Order::Connect);
            }
            LinkPhase::Opening | LinkPhase::Closed => {}
            LinkPhase::Up => self.feed_later(stream, &[Event::SessionOpened]),
            LinkPhase::Suspended => self.feed_later(stream, &[Event::SessionOpened, Event::SessionSuspended]),
        }
    }

    /// Feeds a queue from within the performance of its own actions.
    fn feed_later(&mut self, stream: usize, events: &[Event]) {
        let Some(state) = self.streams.get_mut(&stream) else { return };
        let mut actions = Vec::new();
        for &event in events {
            state.queue.handle(event, &mut actions);
        }
        for action in actions {
            self.perform(stream, action);
        }
    }

    fn put(&mut self, task: TaskId, link: usize, previous: u32, held: bool) {
        let Some(work) = self.works.get_mut(&task) else { return };
        let Some(request) = &mut work.request else { return };
        request.previous_number = previous;
        if let Some(spec) = &mut request.spec
            && (spec.hold != held || request.spec_sha256.is_empty())
        {
            spec.hold = held;
            request.spec_sha256 = convert::spec_sha256(spec);
        }
        let request = request.clone();
        let shared = &work.shared;
        let recorder = work.recorder.get_or_insert_with(|| {
            let files = self.setup.writer.task(
                &shared.stream,
                shared.stream_number,
                shared.test_number,
                &shared.block,
            );
            self.setup.scribe.begin(shared, files, self.links[link].opened.clock)
        });
        let put = Put { task, request, recorder: recorder.clone() };
        self.links[link].link.order(Order::Put(Box::new(put)));
    }

    fn signal(&self, link: usize, task: Option<TaskId>, kind: v1::SignalKind) {
        let Some((task, work)) = task.and_then(|task| Some((task, self.works.get(&task)?))) else { return };
        let reason = work.at_deadline.then_some(Reason::TestDeadline);
        self.links[link].link.order(Order::Signal { task, kind, grace: work.grace, reason });
    }

    /// The record of a task that ends without its host.
    fn ending(&self, task: TaskId, link: usize, ending: Ending) -> TaskEnd {
        let at_deadline = self.works.get(&task).is_some_and(|work| work.at_deadline);
        let link = &self.links[link];
        let (why, reason) = link
            .lost
            .clone()
            .unwrap_or_else(|| (format!("there is no session with {}", link.place), Reason::Unreachable));
        match ending {
            Ending::Cancelled if at_deadline => {
                TaskEnd::never_begun(OutcomeKind::Error, Reason::TestDeadline, self.deadline_text())
            }
            Ending::Cancelled => TaskEnd::never_begun(OutcomeKind::Cancelled, Reason::Cancelled, ""),
            Ending::Drained => TaskEnd::never_begun(
                OutcomeKind::Cancelled,
                Reason::Drained,
                "a task before it failed, and its stream drains then",
            ),
            Ending::Unreachable => TaskEnd::never_begun(OutcomeKind::Error, reason, why),
            Ending::Lost => TaskEnd::never_begun(OutcomeKind::Lost, reason, why),
        }
    }
}

/// Moves a task on, never back.
fn advance(task: &TaskShared, stage: Stage) {
    task.stage.send_if_modified(|now| {
        let forward = std::mem::discriminant(now) != std::mem::discriminant(&stage) && *now < stage;
        if forward {
            *now = stage;
        }
        forward
    });
}

#[cfg(test)]
mod tests;
