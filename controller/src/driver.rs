//! The one loop of a test: takes what handles and links say, feeds the queues, performs what they order.
//!
//! Runs on a thread with a runtime of its own, so that a test that blocks its thread loses no lease. It decides what
//! becomes of tasks that no host has; everything else is decided by queues, hosts and the board of barriers. It never
//! waits for a peer or for a disk: links and the scribe do.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use millstream_common::{
    clock::World,
    convert,
    id::{TaskId, TestName},
    limits,
    outcome::{OutcomeKind, Phase, Reason, TaskEnd},
    spec::FailurePolicy,
};
use millstream_proto::v1;
use tokio::{
    sync::oneshot,
    task::JoinHandle,
    time::{Instant, sleep_until},
};
use tracing::{debug, warn};

use crate::{
    block::{
        Block, BlockError,
        compile::{Surroundings, Upload},
    },
    link::{Link, LinkOptions, Opened, Order, Put, Report},
    outcome::{CausedBy, Outcome},
    queue::{Action, Ending, Event, Queue, Standing},
    results::{
        report::{
            BarrierReport, ClockReport, HostReport, Moment, PartyReport, Seconds, StreamReport, TaskReport,
            TaskSubject, TestReport,
        },
        timeline::HostClock,
        writer::ResultsWriter,
    },
    streams::{StreamShared, TestShared},
    sync::host::{SyncHost, TaskFate},
    task::{Stage, TaskShared},
    topology,
};

pub(crate) mod mailbox;
pub(crate) mod scribe;

use mailbox::Mailbox;
use scribe::{Finish, Recorder, Scribe, Written, with_causes};

/// How far the ends of a test's tasks may lie behind its deadline before the test ends without them: the longest grace
/// period that a block gets without asking, its teardown and the killing.
const DEADLINE_GRACE: Duration = Duration::from_secs(90);

/// What the driver is told.
pub(crate) enum Input {
    /// A block was scheduled on a stream.
    Schedule(Box<Schedule>),
    /// Held tasks are to begin.
    Go { tasks: Vec<TaskId> },
    /// Can these held tasks begin together? If so and `start` is set, they are to.
    GoTogether { tasks: Vec<TaskId>, start: bool, answer: oneshot::Sender<Result<(), Blocked>> },
    /// A task is to be taken back.
    Cancel { task: TaskId },
    /// A task is to be ended.
    Stop { task: TaskId, grace: Option<Duration> },
    /// What does it do?
    Explain { task: TaskId, answer: oneshot::Sender<String> },
    /// A block was compiled, or cannot be.
    Compiled { task: TaskId, result: Result<Box<Ready>, BlockError> },
    /// A link says something.
    Link { link: usize, report: Report },
    /// The files of a task are complete.
    Written(Box<Written>),
    /// The test is over.
    Close,
}

/// A block to be scheduled.
pub(crate) struct Schedule {
    pub(crate) task: Arc<TaskShared>,
    pub(crate) stream: Arc<StreamShared>,
    pub(crate) block: Block,
    pub(crate) held: bool,
}

/// A task that cannot begin with others.
#[derive(Debug, Clone)]
pub(crate) struct Blocked {
    /// The one that cannot.
    pub(crate) task: String,
    /// The prepared one before it in its stream.
    pub(crate) behind: String,
}

/// A compiled block.
pub(crate) struct Ready {
    /// All but the session's key and what depends on the queue.
    request: v1::StartTaskRequest,
    uploads: Vec<Upload>,
    commands: BTreeMap<Phase, Vec<String>>,
    drains: bool,
}

/// How handles reach the driver. Works in any thread, with or without a runtime.
#[derive(Clone)]
pub(crate) struct Handle {
    inbox: Arc<Mailbox<Input>>,
    runtime: tokio::runtime::Handle,
}

impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handle").finish_non_exhaustive()
    }
}

impl Handle {
    /// Says something. What is said after the end of the test changes nothing; a block scheduled then comes back.
    pub(crate) fn send(&self, input: Input) {
        if let Err(Input::Schedule(_)) = self.inbox.put(input) {
            debug!("a block was scheduled after the streams were closed");
        }
    }

    /// Schedules a block; false when the test is over.
    pub(crate) fn schedule(&self, schedule: Schedule) -> bool {
        self.inbox.put(Input::Schedule(Box::new(schedule))).is_ok()
    }

    /// Runs work on the driver's runtime, until the result is dropped.
    pub(crate) fn spawn<T: Send + 'static>(
        &self,
        work: impl Future<Output = T> + Send + 'static,
    ) -> Spawned<T> {
        Spawned(self.runtime.spawn(work))
    }
}

/// Work on the driver's runtime; ends when this is dropped. None when the runtime ended first.
pub(crate) struct Spawned<T>(JoinHandle<T>);

impl<T> Future for Spawned<T> {
    type Output = Option<T>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<T>> {
        Pin::new(&mut self.0).poll(context).map(Result::ok)
    }
}

impl<T> Drop for Spawned<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

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

/// Makes the handle of a driver that is about to run.
pub(crate) fn handle(inbox: &Arc<Mailbox<Input>>, runtime: &tokio::runtime::Handle) -> Handle {
    Handle { inbox: Arc::clone(inbox), runtime: runtime.clone() }
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
                let inbox = Arc::clone(&inbox);
                Box::pin(async move {
                    if inbox.offer(Input::Link { link: index, report }).await.is_err() {
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

    fn prepare(&mut self, task: TaskId, stream: usize, link: usize) {
        let topology = Bytes::from(self.topology());
        let (Some(state), Some(work)) = (self.streams.get(&stream), self.works.get_mut(&task)) else {
            return;
        };
        let Some(block) = work.block.take() else { return };
        let opened = &self.links[link].opened;
        let surroundings = Surroundings {
            stream: state.shared.name.clone(),
            host: state.shared.host.clone(),
            architecture: opened.host.architecture.clone(),
            python: Some(opened.capabilities.python.clone()).filter(|path| !path.is_empty()),
            is_local: state.shared.is_local,
            defaults: state.shared.defaults.clone(),
            topology,
        };
        let (shared, inbox) = (Arc::clone(&work.shared), Arc::clone(&self.setup.inbox));
        let reads_files = block.reads_files();
        let compile = move || {
            let result = compile(&block, &surroundings, &shared).map(Box::new);
            if inbox.put(Input::Compiled { task, result }).is_err() {
                debug!("a block was compiled after the end of the test");
            }
        };
        // Files are not read on this thread; without any, going to another would take longer than compiling.
        if reads_files {
            drop(tokio::task::spawn_blocking(compile));
        } else {
            compile();
        }
    }

    fn topology(&self) -> Vec<u8> {
        topology::describe(&self.setup.shared.streams(), |stream| {
            let state = self.streams.get(&stream.index)?;
            Some(self.links[state.link].opened.host.addresses.clone())
        })
    }

    fn compiled(&mut self, task: TaskId, result: Result<Box<Ready>, BlockError>) {
        let Some(work) = self.works.get_mut(&task) else { return };
        let (stream, number) = (work.stream, work.shared.stream_number);
        match result {
            Ok(ready) => {
                let Ready { request, uploads, commands, drains } = *ready;
                work.request = Some(request);
                work.commands = commands;
                work.drains = drains;
                if uploads.is_empty() {
                    self.feed(stream, Event::Prepared { number });
                } else if let Some(state) = self.streams.get(&stream) {
                    self.links[state.link].link.order(Order::Upload { task, uploads });
                }
            }
            Err(error) => {
                let end = TaskEnd::never_begun(OutcomeKind::Error, Reason::InvalidBlock, with_causes(&error));
                self.complete(task, end, None);
                self.feed(stream, Event::Refused { number });
            }
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

    // What links say.

    fn link_said(&mut self, link: usize, report: Report) {
        match report {
            Report::Opened(opened) => {
                self.links[link].opened = *opened;
                self.links[link].phase = LinkPhase::Up;
                self.links[link].lost = None;
                for stream in self.links[link].streams.clone() {
                    self.write_stream(stream);
                    self.feed(stream, Event::SessionOpened);
                }
            }
            Report::Suspended => self.session_changed(link, LinkPhase::Suspended, Event::SessionSuspended),
            Report::Resumed => self.session_changed(link, LinkPhase::Up, Event::SessionResumed),
            Report::Lost { why, reason } => self.lost(link, why, reason),
            Report::Clock(clock) => self.links[link].opened.clock = clock,
            Report::Uploaded { task, result } => self.uploaded(task, result),
            Report::Accepted { task } => self.of_task(task, |number| Event::Accepted { number }),
            Report::Rejected { task, reason, why } => {
                let end = TaskEnd::never_begun(OutcomeKind::Error, reason, why);
                self.complete(task, end, None);
                self.of_task(task, |number| Event::Rejected { number });
            }
            Report::Staged { task } => self.staged(task),
            Report::Began { task, phase, time_ns } => self.began(task, link, phase, time_ns),
            Report::Ended { task, end } => self.ended(task, *end),
            Report::Arrived { task, problem } => {
                if let Some(end) = self.works.get_mut(&task).and_then(|work| work.end.take()) {
                    self.complete(task, end, problem);
                }
                self.links[link].link.order(Order::Release { task });
            }
            Report::Closed { left_behind } => {
                self.links[link].phase = LinkPhase::Closed;
                self.left_behind.extend(left_behind);
                if self.links.iter().all(|link| link.phase == LinkPhase::Closed) {
                    self.finish_remaining();
                }
            }
        }
    }

    fn session_changed(&mut self, link: usize, phase: LinkPhase, event: Event) {
        self.links[link].phase = phase;
        for stream in self.links[link].streams.clone() {
            self.feed(stream, event);
        }
    }

    fn lost(&mut self, link: usize, why: String, reason: Reason) {
        self.links[link].phase = LinkPhase::Idle;
        self.links[link].lost = Some((why.clone(), reason));
        let streams = self.links[link].streams.clone();
        // Tasks that had ended there: only what they left is missing.
        let ended: Vec<TaskId> = self
            .works
            .iter()
            .filter(|(_, work)| work.end.is_some() && streams.contains(&work.stream))
            .map(|(&task, _)| task)
            .collect();
        for task in ended {
            if let Some(end) = self.works.get_mut(&task).and_then(|work| work.end.take()) {
                self.complete(task, end, Some(why.clone()));
            }
        }
        for stream in streams {
            self.feed(stream, Event::SessionLost);
        }
    }

    fn of_task(&mut self, task: TaskId, event: impl FnOnce(u32) -> Event) {
        let Some(work) = self.works.get(&task) else { return };
        let (stream, number) = (work.stream, work.shared.stream_number);
        self.feed(stream, event(number));
    }

    fn uploaded(&mut self, task: TaskId, result: Result<(), String>) {
        match result {
            Ok(()) => self.of_task(task, |number| Event::Prepared { number }),
            Err(why) => {
                let detail = format!("its files could not be brought to the host: {why}");
                let end = TaskEnd::never_begun(OutcomeKind::Error, Reason::FileRefused, detail);
                self.complete(task, end, None);
                self.of_task(task, |number| Event::Refused { number });
            }
        }
    }

    fn staged(&mut self, task: TaskId) {
        if let Some(work) = self.works.get(&task) {
            advance(&work.shared, Stage::Staged);
        }
    }

    fn began(&mut self, task: TaskId, link: usize, phase: Option<Phase>, time_ns: u64) {
        let Some(work) = self.works.get_mut(&task) else { return };
        work.phase = phase;
        work.request = None;
        let time_ns = self.links[link].opened.clock.to_controller(time_ns);
        advance(&work.shared, Stage::Began { time_ns });
        let phase = phase.unwrap_or(Phase::Run);
        self.setup.sync.task_progress(task, format!("runs its phase {phase}"));
        self.of_task(task, |number| Event::Began { number });
    }

    fn ended(&mut self, task: TaskId, mut end: TaskEnd) {
        let Some(work) = self.works.get_mut(&task) else { return };
        if work.end.is_some() || work.finishing {
            return;
        }
        if end.reason == Reason::TestDeadline {
            // A stop that the test's user asked for is no failure; this one is.
            end.outcome = OutcomeKind::TimedOut;
        }
        let drains = work.drains && !end.is_expected(work.shared.expectation);
        work.request = None;
        let number = work.shared.stream_number;
        let stream = work.stream;
        self.tell_end(task, &end);
        if let Some(work) = self.works.get_mut(&task) {
            work.end = Some(end);
        }
        self.feed(stream, Event::Ended { number, drains });
    }

    // Ends.

    /// Tells the board of barriers, once for each task, and learns from it who dragged the task along.
    fn tell_end(&mut self, task: TaskId, end: &TaskEnd) {
        let Some(work) = self.works.get_mut(&task) else { return };
        if std::mem::replace(&mut work.told, true) {
            return;
        }
        let unexpected = !end.is_expected(work.shared.expectation);
        if unexpected && let Some(culprit) = self.setup.sync.broken_by(task) {
            work.caused_by = culprit.task().map(|task| CausedBy::new(task, culprit.label.to_string()));
        }
        let fate = TaskFate { unexpected, sentence: fate(end), last_line: end.last_lines.last().cloned() };
        self.setup.sync.task_ended(task, fate);
    }

    /// The end of a task is decided: its files are completed.
    fn complete(&mut self, task: TaskId, end: TaskEnd, problem: Option<String>) {
        if self.works.get(&task).is_none_or(|work| work.finishing) {
            return;
        }
        self.tell_end(task, &end);
        let Some(work) = self.works.get_mut(&task) else { return };
        work.finishing = true;
        let clock = self
            .streams
            .get(&work.stream)
            .map_or_else(HostClock::default, |state| self.links[state.link].opened.clock);
        let shared = &work.shared;
        let unopened = match &work.recorder {
            Some(_) => None,
            None => Some(self.setup.writer.task(
                &shared.stream,
                shared.stream_number,
                shared.test_number,
                &shared.block,
            )),
        };
        let subject = TaskSubject {
            task_id: task,
            stream: shared.stream.clone(),
            host: shared.host.clone(),
            stream_number: shared.stream_number,
            test_number: shared.test_number,
            block: shared.block.clone(),
            command: work.commands.get(&Phase::Run).cloned().unwrap_or_default(),
            expectation: shared.expectation,
            enqueue_time_ns: shared.schedule_time_ns,
        };
        let inbox = Arc::clone(&self.setup.inbox);
        self.setup.scribe.finish(Finish {
            subject,
            end,
            clock,
            caused_by: work.caused_by.as_ref().map(|cause| cause.task.clone()),
            problem,
            unopened,
            done: Box::new(move |written| {
                if inbox.put(Input::Written(Box::new(written))).is_err() {
                    debug!("a task was written after the end of the test");
                }
            }),
        });
    }

    fn written(&mut self, written: Written) {
        let Written { task, report, end, results, problem } = written;
        let Some(work) = self.works.remove(&task) else { return };
        let clock = match self.streams.get_mut(&work.stream) {
            Some(state) => {
                state.tasks.remove(&work.shared.stream_number);
                self.links[state.link].opened.clock
            }
            None => HostClock::default(),
        };
        self.reports.insert(work.shared.test_number, report);
        let outcome = Arc::new(outcome(&work, end, clock, results, problem));
        if !outcome.is_expected() {
            warn!(task = outcome.label(), stream = %outcome.stream, "{}", outcome.sentence());
        }
        self.debug_line(&outcome.sentence());
        // The outcome is there before anybody is told that it is.
        if work.shared.outcome.set(Arc::clone(&outcome)).is_err() {
            debug!(%task, "a task ended twice");
        }
        self.setup.shared.finished(outcome);
        work.shared.stage.send_replace(Stage::Finished);
    }

    fn debug_line(&self, text: &str) {
        let now = self.setup.world.clock.wall_ns();
        if let Err(error) = self.setup.writer.debug(now, text) {
            debug!("{}", with_causes(&error));
        }
    }

    /// Every session is closed: what had not ended was ended with it.
    fn finish_remaining(&mut self) {
        let mut tasks: Vec<(u32, TaskId)> =
            self.works.iter().map(|(&task, work)| (work.shared.test_number, task)).collect();
        tasks.sort_unstable();
        for (_, task) in tasks {
            let Some(work) = self.works.get_mut(&task) else { continue };
            let (end, problem) = match work.end.take() {
                Some(end) => {
                    (end, Some("the streams were closed before everything of it had arrived".to_owned()))
                }
                None if work.at_deadline => (
                    TaskEnd::never_begun(OutcomeKind::TimedOut, Reason::TestDeadline, self.deadline_text()),
                    None,
                ),
                None if work.recorder.is_some() => {
                    let detail = "the streams were closed while it ran";
                    (TaskEnd::never_begun(OutcomeKind::Stopped, Reason::SessionClosed, detail), None)
                }
                None => {
                    let detail = "the streams were closed before it began";
                    (TaskEnd::never_begun(OutcomeKind::Cancelled, Reason::SessionClosed, detail), None)
                }
            };
            self.complete(task, end, problem);
        }
    }

    fn stream_report(&self, state: &StreamState) -> StreamReport {
        let opened = &self.links[state.link].opened;
        let host = &opened.host;
        let reached = !opened.version.is_empty();
        StreamReport {
            name: state.shared.name.clone(),
            index: state.shared.index,
            definition: state.shared.definition.clone(),
            host: reached.then(|| HostReport {
                host: state.shared.host.clone(),
                hostname: host.hostname.clone(),
                kernel: host.kernel.clone(),
                architecture: host.architecture.clone(),
                distribution: host.distribution.clone(),
                processors_count: host.processors_count,
                memory_bytes: host.memory_bytes,
                addresses: host.addresses.clone(),
                agent_version: opened.version.clone(),
                containment: opened.capabilities.containment.clone(),
                limits: opened.capabilities.limits.clone(),
                python: opened.capabilities.python.clone(),
            }),
            clock: ClockReport::of(opened.clock),
        }
    }

    fn write_stream(&self, stream: usize) {
        if let Some(state) = self.streams.get(&stream)
            && let Err(error) = self.setup.writer.stream(&self.stream_report(state))
        {
            warn!("{}", with_causes(&error));
        }
    }

    /// Writes what came of the test and ends everything that the driver started.
    fn end(self) -> Vec<String> {
        // From here on blocks that are scheduled come back to who schedules them.
        for input in self.setup.inbox.close() {
            if let Input::Schedule(schedule) = input {
                self.setup.shared.refuse(&schedule.task);
            }
        }
        let streams = self.streams.values().map(|state| self.stream_report(state)).collect();
        for &stream in self.streams.keys() {
            self.write_stream(stream);
        }
        let failures = self.setup.shared.report().failures();
        let report = TestReport {
            test: self.setup.test.clone(),
            success: failures.is_none(),
            failures_count: failures.as_ref().map_or(0, |report| report.count()),
            followers_count: failures
                .as_ref()
                .map_or(0, |report| report.failures.iter().map(|failure| failure.followers.len()).sum()),
            version: env!("CARGO_PKG_VERSION"),
            start_time: Moment(self.begin_ns),
            end_time: Moment(self.setup.world.clock.wall_ns()),
            streams,
            tasks: self.reports.into_values().collect(),
            barriers: barriers(&self.setup.sync),
            waits: Vec::new(),
            left_behind: self.left_behind.clone(),
        };
        self.setup.scribe.stop();
        let mut left_behind = self.left_behind;
        if let Err(error) = self.setup.writer.finish_test(&report) {
            left_behind.push(with_causes(&error));
        }
        left_behind
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

/// What a task did, to stand behind its name.
fn fate(end: &TaskEnd) -> String {
    let mut text = end.outcome.to_string();
    match end.exit {
        Some(exit) if end.outcome != OutcomeKind::Passed => text += &format!(" with {exit}"),
        None if end.reason != Reason::Exited => text += &format!(" ({})", end.reason),
        _ => {}
    }
    text
}

fn outcome(
    work: &Work,
    end: TaskEnd,
    clock: HostClock,
    results: std::path::PathBuf,
    results_error: Option<String>,
) -> Outcome {
    let shared = &work.shared;
    let command = work.commands.get(&end.phase.unwrap_or(Phase::Run)).cloned().unwrap_or_default();
    Outcome {
        task_id: shared.id,
        stream: shared.stream.clone(),
        host: shared.host.clone(),
        block: shared.block.clone(),
        stream_number: shared.stream_number,
        test_number: shared.test_number,
        kind: end.outcome,
        reason: end.reason,
        phase: end.phase,
        command,
        exit: end.exit,
        detail: end.detail,
        expectation: shared.expectation,
        schedule_time_ns: shared.schedule_time_ns,
        start_time_ns: end.start_time_ns.map(|time| clock.to_controller(time)),
        end_time_ns: end.end_time_ns.map(|time| clock.to_controller(time)),
        duration: end.run_duration,
        phases: end.phases,
        leaked: end.leaked,
        leaked_count: end.leaked_count,
        log: end.log,
        last_lines: end.last_lines,
        skipped: end.skipped,
        results,
        results_error,
        caused_by: work.caused_by.clone(),
    }
}

/// Compiles a block. Reads its files: blocks the thread.
fn compile(block: &Block, surroundings: &Surroundings, task: &TaskShared) -> Result<Ready, BlockError> {
    let compiled = block.compile(surroundings)?;
    let mut spec = compiled.spec;
    spec.stream_number = task.stream_number;
    spec.test_number = task.test_number;
    let commands = spec.phases.iter().map(|phase| (phase.phase, phase.argv.clone())).collect();
    let drains = spec.failure_policy == FailurePolicy::Drain;
    let spec = v1::TaskSpec::from(&spec);
    let spec_sha256 = convert::spec_sha256(&spec);
    let request = v1::StartTaskRequest {
        session: None,
        task_id: task.id.to_string(),
        spec: Some(spec),
        spec_sha256,
        secret_files: compiled.secret_files.iter().map(v1::ShippedFile::from).collect(),
        previous_number: 0,
    };
    Ok(Ready { request, uploads: compiled.uploads, commands, drains })
}

fn barriers(sync: &SyncHost) -> Vec<BarrierReport> {
    let records = sync.records().barriers.into_iter();
    records
        .map(|record| BarrierReport {
            name: record.name.to_string(),
            generation: record.generation,
            parties_count: record.parties,
            end_time: Some(Moment(record.decided_time_ns)),
            broken: record.broken,
            last: record.last.filter(|_| record.released),
            parties: record
                .waits
                .into_iter()
                .map(|wait| PartyReport {
                    name: wait.party,
                    task_id: wait.task,
                    enter_time: Moment(wait.entered_time_ns),
                    wait_seconds: Seconds(Duration::from_nanos(wait.waited_ns)),
                    by_hand: wait.by_hand,
                })
                .collect(),
        })
        .collect()
}

#[cfg(test)]
mod tests;
