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
    spec::FailurePolicy,
};
use millstream_proto::v1;
use tokio::{
    sync::oneshot,
    time::{Instant, sleep_until},
};
use tracing::debug;

use crate::{
    block::Block,
    link::{Link, LinkOptions, Opened, Order, Put, Report, Sending},
    nested::Gate,
    outcome::CausedBy,
    queue::{Action, Ending, Event, Queue},
    results::{nested::NestedTask, report::TaskReport, writer::ResultsWriter},
    streams::{StreamShared, TestShared},
    sync::host::SyncHost,
    task::{Stage, TaskShared},
    topology::Topology,
};

mod cut;
mod ends;
mod explain;
mod handle;
mod links;
pub(crate) mod mailbox;
mod prepare;
mod retire;
pub(crate) mod scribe;
mod together;

use cut::Cut;
pub(crate) use handle::{Blocked, Handle, Input, Schedule, handle};
use mailbox::Mailbox;
pub(crate) use prepare::Ready;
use retire::Retired;
use scribe::{Recorder, Scribe};
use together::Together;

/// How far the ends of a test's tasks may lie behind its deadline before the test ends without them: the longest grace
/// period that a block gets without asking, its teardown and the killing.
const DEADLINE_GRACE: Duration = Duration::from_secs(90);

/// What the driver needs from its beginning.
pub(crate) struct Setup {
    pub(crate) world: World,
    pub(crate) test: TestName,
    pub(crate) deadline: Duration,
    /// Whether the first unexpected end ends everything.
    pub(crate) fails_fast: bool,
    pub(crate) link: LinkOptions,
    pub(crate) writer: ResultsWriter,
    pub(crate) scribe: Scribe,
    pub(crate) sync: SyncHost,
    pub(crate) gate: Arc<Gate>,
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
    /// Its session is being closed because no stream needs it now.
    Closing,
    /// For good.
    Closed,
}

struct LinkState {
    link: Link,
    /// The place, as its reach describes it.
    place: String,
    phase: LinkPhase,
    /// Since when it stands there.
    since: Instant,
    /// Why the last attempt to reach the host failed, while it is being tried.
    trouble: Option<String>,
    /// Since when this test waits in line for the host, and what the host says of that.
    line: Option<(Instant, String)>,
    /// How long it does so at most.
    wait: Duration,
    opened: Opened,
    /// Why there is no session, once there was none.
    lost: Option<(String, Reason)>,
    streams: Vec<usize>,
}

impl LinkState {
    fn enter(&mut self, phase: LinkPhase, now: Instant) {
        self.phase = phase;
        self.since = now;
        self.trouble = None;
        self.line = None;
    }

    fn stand_in_line(&mut self, why: String, now: Instant) {
        let since = self.line.take().map_or(now, |(since, _)| since);
        self.line = Some((since, why));
        self.trouble = None;
    }
}

struct StreamState {
    shared: Arc<StreamShared>,
    link: usize,
    queue: Queue,
    /// Tasks that are not over, by their number.
    tasks: HashMap<u32, TaskId>,
    /// The task whose end cancelled those behind it, in a stream that drains.
    drained_by: Option<CausedBy>,
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
    /// The phase that runs, and since when.
    phase: Option<(Phase, Instant)>,
    grace: Option<Duration>,
    /// Why it is being ended from outside, if it is.
    cut: Option<Cut>,
    /// Since when it is being stopped.
    stopping: Option<Instant>,
    /// What of its files has been sent.
    sending: Option<Arc<Sending>>,
    /// Whether the board of barriers knows of its end.
    told: bool,
    /// Whether its files are being completed: its end is decided.
    finishing: bool,
}

impl Work {
    /// Stream, number and block, such as `server/1-netserver`.
    fn path(&self) -> String {
        format!("{}/{}", self.shared.stream, self.shared.label())
    }
}

/// The loop.
pub(crate) struct Driver {
    setup: Setup,
    begin_ns: u64,
    deadline: Instant,
    deadline_passed: bool,
    /// The first task that ended unexpectedly in a test that fails fast, and what became of it.
    first_failure: Option<(CausedBy, String)>,
    /// Whether everything else was told to end because of it.
    failed_fast: bool,
    links: Vec<LinkState>,
    together: Together,
    streams: BTreeMap<usize, StreamState>,
    /// Those that were closed.
    retired: BTreeMap<usize, Retired>,
    /// What blocks are told of the streams, and of how many; none when that has changed.
    topology: Option<(usize, Topology)>,
    works: HashMap<TaskId, Work>,
    reports: BTreeMap<u32, TaskReport>,
    /// Tasks of streams that blocks ran themselves.
    nested: Vec<NestedTask>,
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
            first_failure: None,
            failed_fast: false,
            links: Vec::new(),
            together: Together::default(),
            streams: BTreeMap::new(),
            retired: BTreeMap::new(),
            topology: None,
            works: HashMap::new(),
            reports: BTreeMap::new(),
            nested: Vec::new(),
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
                        self.fail_fast();
                    }
                }
                () = sleep_until(deadline), if !self.closing => self.pass_deadline(),
            }
        }
        let left = self.setup.gate.close().await;
        self.left_behind.extend(left);
        self.release_unused().await;
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
                let now = self.setup.world.clock.now();
                if let Some(work) = self.works.get_mut(&task) {
                    work.grace = grace;
                    work.stopping.get_or_insert(now);
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
            Input::Retire { stream, answer } => self.retire(stream, answer),
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
            let drains = stream.defaults().on_failure == FailurePolicy::Drain;
            let new = if drains { Queue::draining } else { Queue::new };
            let queue = new(limits::STREAM_WINDOW_COUNT);
            self.streams.insert(
                index,
                StreamState { shared: stream, link, queue, tasks: HashMap::new(), drained_by: None },
            );
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
            cut: None,
            stopping: None,
            sending: None,
            told: false,
            finishing: false,
        };
        self.works.insert(task.id, work);
        if self.closing {
            let end =
                TaskEnd::never_begun(OutcomeKind::Cancelled, Reason::SessionClosed, "the streams are closed");
            self.complete(task.id, end, None);
        } else if let Some(cut) = self.cut(index) {
            self.cut_before_it_began(task.id, cut);
        } else {
            if let Some(state) = self.streams.get_mut(&index) {
                state.tasks.insert(number, task.id);
            }
            self.feed(index, Event::Scheduled { number, held });
        }
    }

    /// The link to the place of a stream: streams with one destination share one.
    fn link_of(&mut self, stream: &StreamShared) -> usize {
        let place = stream.reach().describe();
        if let Some(index) = self.links.iter().position(|link| link.place == place) {
            return index;
        }
        let index = self.links.len();
        let inbox = Arc::clone(&self.setup.inbox);
        let others = self.setup.shared.streams();
        let there = |other: &&Arc<StreamShared>| other.reach().describe() == place;
        let exclusive =
            stream.exclusive() || others.iter().filter(|other| other.exclusive()).any(|other| there(&other));
        let waits = others.iter().filter(|other| other.wait().is_some()).filter(there);
        let wait = waits.filter_map(|other| other.wait()).chain(stream.wait()).max();
        let options = self.setup.link.of_host(wait, exclusive);
        let wait = options.wait;
        let link = Link::start(
            Arc::clone(stream.reach()),
            self.setup.world.clone(),
            options,
            self.setup.sync.clone(),
            move |report| {
                let letter = Input::Link { link: index, report };
                let frequent = matches!(
                    letter,
                    Input::Link {
                        report: Report::Began { .. }
                            | Report::Staged { .. }
                            | Report::Clock(_)
                            | Report::AttemptFailed { .. },
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
            since: self.setup.world.clock.now(),
            trouble: None,
            line: None,
            wait,
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

    fn close(&mut self) {
        if self.closing {
            return;
        }
        self.closing = true;
        for link in &self.links {
            link.link.order(Order::Close { for_good: true });
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
        if self.takes_together(link) {
            return;
        }
        match self.links[link].phase {
            LinkPhase::Idle => self.ask_for(link),
            LinkPhase::Opening | LinkPhase::Closing | LinkPhase::Closed => {}
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
        // What else ends a task from outside is no concern of its host.
        let reason = (work.cut == Some(Cut::Deadline)).then_some(Reason::TestDeadline);
        self.links[link].link.order(Order::Signal { task, kind, grace: work.grace, reason });
    }

    /// The record of a task that ends without its host.
    fn ending(&self, task: TaskId, link: usize, ending: Ending) -> TaskEnd {
        let work = self.works.get(&task);
        let link = &self.links[link];
        let (why, reason) = link
            .lost
            .clone()
            .unwrap_or_else(|| (format!("there is no session with {}", link.place), Reason::Unreachable));
        match ending {
            Ending::Cancelled => match work.and_then(|work| work.cut) {
                Some(cut) => self.never_begun(cut),
                None => TaskEnd::never_begun(OutcomeKind::Cancelled, Reason::Cancelled, ""),
            },
            Ending::Drained => {
                let culprit = work.and_then(|work| self.streams.get(&work.stream)?.drained_by.as_ref());
                let culprit = culprit.map_or("a task before it", |cause| cause.task.as_str());
                let detail = format!("{culprit} ended unexpectedly and its stream is drained then");
                TaskEnd::never_begun(OutcomeKind::Cancelled, Reason::Drained, detail)
            }
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
