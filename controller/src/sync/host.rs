//! The host of one scope's barriers and topics: one board behind one lock, a wake-up for each call that waits, and one
//! timer for all of them.
//!
//! It asks the clock, numbers the calls, feeds the board and tells each waiting call its answer; nothing is decided
//! here and nothing polls. Handles are cheap to clone; the last one that is dropped ends the timer.

use std::{
    collections::HashMap,
    fmt,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use millstream_common::{
    clock::World,
    id::{BarrierName, TaskId, TopicName},
    limits,
    sync_client::{Parties, Party, Released},
};
use millstream_proto::v1;
use tokio::{
    runtime::Handle,
    sync::{Notify, mpsc, oneshot},
};
use tokio_stream::Stream;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::{
    CallId, Culprit, Speaker,
    barrier::{Barrier, Decided},
    board::{Action, Answer, Board, Event, Request},
    port::{self, ListenError},
    relay,
    service::BlockService,
    story,
    topic::{Content, Topics, Value, Wanted},
};

mod errors;
mod records;
mod subscription;

pub use super::board::{SpeakerLabel, TaskFate};
pub use errors::{AwaitError, EnterError, PublishError};
pub use records::{BarrierRecord, SyncRecords, TopicRecord, TopicWaitRecord, WaitRecord};
pub use subscription::Subscription;

/// A handle to the barriers and topics of one scope.
#[derive(Debug, Clone)]
pub struct SyncHost {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    world: World,
    calls: AtomicU64,
    inner: Mutex<Inner>,
    timer: Arc<Notify>,
    over: CancellationToken,
    /// What else blocks may call.
    beside: OnceLock<Arc<dyn BlockService>>,
}

#[derive(Debug, Default)]
struct Inner {
    board: Board,
    waiters: HashMap<CallId, Waiter>,
    /// When the timer will wake up by itself.
    armed: Option<Instant>,
    /// Kept between turns so that a turn allocates nothing.
    actions: Vec<Action>,
}

/// How a waiting call is told its answer.
pub(crate) type Reply = Box<dyn FnOnce(Answer) + Send>;

enum Waiter {
    /// A future waits.
    Future(oneshot::Sender<Answer>),
    /// Nobody waits: the answer is handed on by whoever brought it about.
    Reply(Reply),
}

impl fmt::Debug for Waiter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Future(_) => "Future",
            Self::Reply(_) => "Reply",
        })
    }
}

impl Waiter {
    fn tell(self, answer: Answer) {
        match self {
            // Whoever gave up meanwhile finds the decision on record when it comes back.
            Self::Future(waiting) => drop(waiting.send(answer)),
            Self::Reply(reply) => reply(answer),
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.over.cancel();
    }
}

/// A connection that calls came through: whether it was lost tells a caller that gave up from one that may return.
#[derive(Debug, Clone, Default)]
pub(crate) struct Line {
    down: Arc<AtomicBool>,
}

impl Line {
    /// Says that the connection is lost. Before the calls on it are dropped.
    pub(crate) fn lose(&self) {
        self.down.store(true, Ordering::Release);
    }

    fn is_down(&self) -> bool {
        self.down.load(Ordering::Acquire)
    }
}

impl SyncHost {
    /// An empty board, with its timer on the given runtime.
    #[must_use]
    pub fn new(world: World, runtime: &Handle) -> Self {
        let timer = Arc::new(Notify::new());
        let over = CancellationToken::new();
        let shared = Arc::new(Shared {
            world,
            calls: AtomicU64::new(1),
            inner: Mutex::new(Inner::default()),
            timer: timer.clone(),
            over: over.clone(),
            beside: OnceLock::new(),
        });
        let host = Arc::downgrade(&shared);
        // Ends when the last handle is dropped; nobody waits for it.
        drop(runtime.spawn(async move {
            tokio::select! {
                () = over.cancelled() => {}
                () = keep_time(host, timer) => {}
            }
        }));
        Self { shared }
    }

    /// Serves another service for blocks beside this one. The first to be said counts.
    pub(crate) fn serve_beside(&self, service: Arc<dyn BlockService>) {
        if self.shared.beside.set(service).is_err() {
            debug!("another service is served beside this one already");
        }
    }

    /// The service that has such a method, beside this one.
    pub(crate) fn beside(&self, method: &str) -> Option<Arc<dyn BlockService>> {
        self.shared.beside.get().filter(|service| service.serves(method)).cloned()
    }

    /// A task was put behind the others of its stream. `joins` are the only barriers it takes part in; none: any.
    pub fn task_scheduled(
        &self,
        task: TaskId,
        label: SpeakerLabel,
        joins: Option<Vec<BarrierName>>,
        group_size: Option<u32>,
    ) {
        self.tell(Event::TaskScheduled { task, label, joins, group_size });
    }

    /// So many streams are defined now: what `all` means to the parties of a barrier.
    pub fn streams_defined(&self, count: usize) {
        self.tell(Event::StreamsDefined { count: u32::try_from(count).unwrap_or(u32::MAX) });
    }

    /// A task does something else now: one line for people, such as `runs its setup`.
    pub fn task_progress(&self, task: TaskId, text: impl Into<String>) {
        self.tell(Event::TaskProgressed { task, text: text.into() });
    }

    /// A task ended. Its parties break what they waited for, and what can no longer be met ends.
    pub fn task_ended(&self, task: TaskId, fate: TaskFate) {
        self.tell(Event::TaskEnded { task, fate });
    }

    /// The host of these tasks does not answer: their parties count as entered until it does, or until they end.
    pub fn session_suspended(&self, tasks: &[TaskId]) {
        self.tell(Event::SessionSuspended { tasks: tasks.to_vec() });
    }

    /// It answers again: their parties have the reconnection grace to come back.
    pub fn session_resumed(&self, tasks: &[TaskId]) {
        self.tell(Event::SessionResumed { tasks: tasks.to_vec() });
    }

    /// Main has begun `wait`, `join` or `close`, or has left it: inside, it sends nobody. Each beginning has its own end.
    pub fn main_waiting(&self, waiting: bool) {
        self.tell(Event::MainWaited { waiting });
    }

    /// Main will still send somebody to these barriers, whatever happens.
    pub fn main_declared(&self, names: Vec<BarrierName>) {
        self.tell(Event::MainDeclared { names });
    }

    /// Main takes part in a barrier like any stream.
    ///
    /// # Errors
    /// When the meeting broke, or could not be entered.
    ///
    /// # Cancel safety
    /// Dropping the future takes main back, which breaks the meeting.
    pub async fn enter_as_main(
        &self,
        name: BarrierName,
        parties: impl Into<Parties>,
        timeout: Duration,
        payload: Bytes,
    ) -> Result<Released, EnterError> {
        let timeout = timeout.min(limits::WAIT_MAX);
        let (barrier, parties) = (name.clone(), parties.into());
        let request = Request::Enter { barrier, parties, timeout, token: None, payload, display_name: None };
        match self.ask(Speaker::Main, request, None).await {
            Some(Answer::Released { decided, arrival }) => Ok(released(&decided, arrival)),
            Some(Answer::Broken { decided, arrival }) => Err(EnterError::Broken {
                message: story::broken(&decided, arrival),
                culprit: decided.as_break().and_then(|cause| cause.culprit.clone()),
            }),
            Some(Answer::Refused(source)) => Err(EnterError::Refused { name, source }),
            _ => Err(EnterError::Over { name }),
        }
    }

    /// Main breaks a barrier with a reason.
    pub fn abort_as_main(&self, barrier: BarrierName, reason: impl Into<String>) {
        self.command(Request::Abort { barrier, reason: reason.into() });
    }

    /// Main makes a broken barrier usable again.
    pub fn reset_as_main(&self, barrier: BarrierName) {
        self.command(Request::Reset { barrier });
    }

    /// Main publishes a value and learns its index.
    ///
    /// # Errors
    /// When the topic or the value is too large.
    pub fn publish_as_main(&self, topic: TopicName, content: Content) -> Result<u64, PublishError> {
        match self.command(Request::Publish { topic: topic.clone(), content, token: None }) {
            Some(Answer::Indexed(index)) => Ok(index),
            Some(Answer::Refused(source)) => Err(PublishError::Refused { topic, source }),
            _ => Err(PublishError::Over { topic }),
        }
    }

    /// Main waits for the first `count` values of a topic.
    ///
    /// # Errors
    /// When they did not come in time, or nobody is left who could publish them.
    ///
    /// # Cancel safety
    /// Dropping the future takes the wait back.
    pub async fn wait_as_main(
        &self,
        topic: TopicName,
        count: u64,
        timeout: Duration,
    ) -> Result<Vec<Arc<Value>>, AwaitError> {
        let timeout = timeout.min(limits::WAIT_MAX);
        let wanted = Wanted::First(count.max(1));
        let request = Request::Await { topic: topic.clone(), wanted, timeout };
        values_of(self.ask(Speaker::Main, request, None).await, topic)
    }

    /// The values of a topic from an index on, and those that come later.
    #[must_use]
    pub fn subscribe_as_main(&self, topic: TopicName, from: u64) -> Subscription {
        Subscription::new(self.clone(), topic, from)
    }

    /// Who broke the barrier that this task was told to be broken last; none if it was the task itself, or nobody.
    #[must_use]
    pub fn broken_by(&self, task: TaskId) -> Option<Culprit> {
        self.lock().board.broken_by(task).cloned()
    }

    /// Where a task waits, for how long and for whom, as the rest of a sentence about it; none when it waits nowhere.
    #[must_use]
    pub fn waiting(&self, task: TaskId) -> Option<String> {
        let now = self.now();
        self.lock().board.waiting(task, now)
    }

    /// Every decided meeting and every topic, for the results.
    #[must_use]
    pub fn records(&self) -> SyncRecords {
        let (now, wall_ns) = (self.now(), self.shared.world.clock.wall_ns());
        records::collect(&self.lock().board, now, wall_ns)
    }

    /// Serves one session's relay until `inbound` ends, for whatever task its agent vouches for. Returns when the last
    /// call of it was let go.
    pub async fn serve_relay(
        &self,
        inbound: impl Stream<Item = Vec<v1::RelayFrame>> + Send,
        outbound: mpsc::Sender<Vec<v1::RelayFrame>>,
    ) {
        self.serve_relay_of(|_| true, inbound, outbound).await;
    }

    /// The same for the tasks that `speaks_for` says are this session's: an agent cannot speak for another's tasks.
    pub async fn serve_relay_of(
        &self,
        speaks_for: impl Fn(TaskId) -> bool + Send,
        inbound: impl Stream<Item = Vec<v1::RelayFrame>> + Send,
        outbound: mpsc::Sender<Vec<v1::RelayFrame>>,
    ) {
        relay::serve(self.clone(), speaks_for, inbound, outbound).await;
    }

    /// Opens the debugging port: the same service on a loopback address, for people. Whatever is done there is marked
    /// "by hand". It is served until the last handle is dropped.
    ///
    /// # Errors
    /// When the address is not a loopback address, or cannot be listened on.
    pub async fn listen(&self, address: SocketAddr) -> Result<SocketAddr, ListenError> {
        port::listen(self, address).await
    }

    /// Asks for something that may have to be waited for. None: the board is gone.
    pub(crate) async fn ask(
        &self,
        speaker: Speaker,
        request: Request,
        line: Option<&Line>,
    ) -> Option<Answer> {
        let call = self.next_call();
        let (tx, waiting) = oneshot::channel();
        self.turn(Event::Asked { call, speaker, request }, Some((call, Waiter::Future(tx))));
        let mut guard = Guard { host: self, call, line, armed: true };
        let answer = waiting.await.ok();
        guard.armed = false;
        answer
    }

    /// Asks for something that is answered at once.
    fn command(&self, request: Request) -> Option<Answer> {
        let call = self.next_call();
        let (tx, mut answered) = oneshot::channel();
        let event = Event::Asked { call, speaker: Speaker::Main, request };
        self.turn(event, Some((call, Waiter::Future(tx))));
        answered.try_recv().ok()
    }

    /// Asks for something with a number that was taken before; `reply` is given the answer, now or later, on whichever
    /// thread brings it about, so that thousands of calls need no task each.
    pub(crate) fn ask_with(&self, call: CallId, speaker: Speaker, request: Request, reply: Reply) {
        self.turn(Event::Asked { call, speaker, request }, Some((call, Waiter::Reply(reply))));
    }

    /// A call that waits for its reply is gone.
    pub(crate) fn leave(&self, call: CallId, link_down: bool) {
        drop(self.lock().waiters.remove(&call));
        self.tell(Event::Left { call, link_down });
    }

    /// Reads topics.
    pub(crate) fn with_topics<T>(&self, read: impl FnOnce(&Topics) -> T) -> T {
        read(self.lock().board.topics())
    }

    /// Reads the barriers from an index on, with who is missing, until `read` has seen enough.
    pub(crate) fn with_barriers<T>(
        &self,
        from: usize,
        mut read: impl FnMut(&Barrier, Vec<String>, &dyn Fn(Instant) -> u64) -> Option<T>,
    ) -> Vec<T> {
        let (now, wall_ns) = (self.now(), self.shared.world.clock.wall_ns());
        let to_wall = |at: Instant| {
            let nanos = |d: Duration| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX);
            wall_ns
                .saturating_sub(nanos(now.saturating_duration_since(at)))
                .saturating_add(nanos(at.saturating_duration_since(now)))
        };
        let inner = self.lock();
        inner
            .board
            .barriers()
            .skip(from)
            .map_while(|barrier| {
                let missing = match barrier.meeting() {
                    Some(_) => inner.board.missing(barrier, limits::MISSING_LISTED_COUNT_MAX, now),
                    None => Vec::new(),
                };
                read(barrier, missing, &to_wall)
            })
            .collect()
    }

    pub(crate) fn downgrade(&self) -> WeakHost {
        WeakHost { shared: Arc::downgrade(&self.shared) }
    }

    /// Is cancelled when the last handle is dropped.
    pub(crate) fn over(&self) -> CancellationToken {
        self.shared.over.clone()
    }

    /// A number for a call.
    pub(crate) fn next_call(&self) -> CallId {
        CallId(self.shared.calls.fetch_add(1, Ordering::Relaxed))
    }

    fn now(&self) -> Instant {
        self.shared.world.clock.now().into_std()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // A panic in the board leaves it as it was between two statements; whoever waits is better told than left.
        self.shared.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self, event: Event) {
        self.turn(event, None);
    }

    /// One turn: feed the board, tell who is answered. `own` is the call that asks, and who waits for it.
    fn turn(&self, event: Event, own: Option<(CallId, Waiter)>) {
        let mut told: Vec<(Waiter, Answer)> = Vec::new();
        let mut inner = self.lock();
        if let Some((call, waiter)) = own {
            inner.waiters.insert(call, waiter);
        }
        // The clock is asked under the lock, so that time never goes backwards for the board.
        let now = self.now();
        let mut actions = std::mem::take(&mut inner.actions);
        inner.board.handle(event, now, &mut actions);
        for action in actions.drain(..) {
            let Action::Answer { call, answer } = action;
            if let Some(waiter) = inner.waiters.remove(&call) {
                told.push((waiter, answer));
            }
        }
        actions.shrink_to(ACTIONS_KEPT_COUNT);
        inner.actions = actions;
        let next = inner.board.next_deadline();
        let sooner = match (next, inner.armed) {
            (Some(next), Some(armed)) => next < armed,
            (Some(_), None) => true,
            (None, _) => false,
        };
        if sooner {
            inner.armed = next;
            self.shared.timer.notify_one();
        }
        drop(inner);
        for (waiter, answer) in told {
            waiter.tell(answer);
        }
    }
}

/// Actions whose room is kept between two turns.
const ACTIONS_KEPT_COUNT: usize = 1_024;

/// A handle that keeps nothing alive.
#[derive(Debug, Clone)]
pub(crate) struct WeakHost {
    shared: Weak<Shared>,
}

impl WeakHost {
    /// The host, if a handle is left.
    pub(crate) fn upgrade(&self) -> Option<SyncHost> {
        self.shared.upgrade().map(|shared| SyncHost { shared })
    }
}

/// Takes a call back when its future is dropped before the answer.
struct Guard<'a> {
    host: &'a SyncHost,
    call: CallId,
    line: Option<&'a Line>,
    armed: bool,
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        if self.armed {
            self.host.leave(self.call, self.line.is_some_and(Line::is_down));
        }
    }
}

/// Tells the board that time has passed, when it said that this would matter.
async fn keep_time(shared: Weak<Shared>, timer: Arc<Notify>) {
    loop {
        let deadline = {
            let Some(shared) = shared.upgrade() else { return };
            let host = SyncHost { shared };
            let now = host.now();
            let mut inner = host.lock();
            let next = inner.board.next_deadline();
            inner.armed = next;
            drop(inner);
            if next.is_some_and(|at| at <= now) {
                host.tell(Event::TimePassed);
                continue;
            }
            next
        };
        match deadline {
            None => timer.notified().await,
            Some(at) => {
                let at = tokio::time::Instant::from_std(at);
                tokio::select! {
                    () = tokio::time::sleep_until(at) => {}
                    () = timer.notified() => {}
                }
            }
        }
    }
}

/// What main is told of a wait for values.
fn values_of(answer: Option<Answer>, topic: TopicName) -> Result<Vec<Arc<Value>>, AwaitError> {
    match answer {
        Some(Answer::Values(values)) => Ok(values),
        Some(Answer::TimedOut(told)) => Err(AwaitError::TimedOut(told)),
        Some(Answer::GivenUp(told)) => Err(AwaitError::GivenUp(told)),
        Some(Answer::Refused(source)) => Err(AwaitError::Refused { topic, source }),
        _ => Err(AwaitError::Over { topic }),
    }
}

/// What a party learns at the release.
pub(crate) fn released(decided: &Decided, arrival: u32) -> Released {
    Released {
        generation: decided.meeting.generation,
        arrival,
        parties: roll(decided)
            .map(|(number, party)| Party {
                name: party.label.to_string(),
                arrival: number,
                payload: party.payload.clone(),
            })
            .collect(),
        waited: decided.waited(arrival),
    }
}

/// Who is listed to everybody: all, or in a large meeting those who brought something.
pub(crate) fn roll(decided: &Decided) -> impl Iterator<Item = (u32, &super::barrier::Arrival)> {
    let all = decided.meeting.arrivals.len() <= limits::BARRIER_ROLL_PARTIES_MAX;
    (0..).zip(&decided.meeting.arrivals).filter(move |(_, party)| all || !party.payload.is_empty())
}
