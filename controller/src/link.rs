//! One session with one agent: reach it, open the session, keep it, come back to it, close it.
//!
//! Two connections: *control* carries the session, starts, signals, events and the relay of barriers; *bulk* carries
//! files, long logs and archives, so that none of them can starve a renewal of the lease. The lease as believed here is
//! counted from sending, less a tenth: this belief ends before the host's. Nothing here knows streams or decides what is
//! run: orders come in, reports go out.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    future::{Future, poll_fn},
    pin::pin,
    sync::{Arc, Mutex, PoisonError},
    task::Poll,
    time::Duration,
};

use millstream_common::{
    clock::World,
    convert,
    id::{SessionId, TaskId},
    limits,
    outcome::{Phase, Reason, TaskEnd},
    pipe,
    text::{printable, spoken},
};
use millstream_proto::v1::{self, agent_service_client::AgentServiceClient};
use tokio::{
    sync::watch,
    task::JoinSet,
    time::{Instant, timeout, timeout_at},
};
use tonic::{Code, Status, transport::Channel};
use tracing::{debug, info, warn};

use crate::{
    block::compile::Upload,
    driver::{mailbox::Mailbox, scribe::Recorder},
    reach::{DialError, Reach},
    results::timeline::HostClock,
    sync::host::SyncHost,
};

mod bulk;
mod relay;

/// Protocol numbers that this controller speaks.
const PROTOCOL: u32 = 1;

/// Tasks named in one release.
const RELEASE_COUNT_MAX: usize = 1_000;

/// How often a start that the host answers with an unknown failure is tried on new connections.
const START_ATTEMPTS_MAX: u32 = 5;

/// What the driver wants of a link.
#[derive(Debug)]
pub(crate) enum Order {
    /// Open a session, unless one is open or being opened.
    Connect,
    /// Bring these blobs to the host if it lacks them.
    Upload { task: TaskId, uploads: Vec<Upload> },
    /// Hand a task over.
    Put(Box<Put>),
    /// Act on a task.
    Signal { task: TaskId, kind: v1::SignalKind, grace: Option<Duration>, reason: Option<Reason> },
    /// Everything of these tasks is here: the host may forget them.
    Release { task: TaskId },
    /// Close the session and end.
    Close,
}

/// A task to be handed over.
#[derive(Debug)]
pub(crate) struct Put {
    pub(crate) task: TaskId,
    /// All but the session's key.
    pub(crate) request: v1::StartTaskRequest,
    /// Where its output goes.
    pub(crate) recorder: Recorder,
}

/// What a link tells the driver.
#[derive(Debug)]
pub(crate) enum Report {
    /// A new session is open.
    Opened(Box<Opened>),
    /// The connection broke; coming back is being tried.
    Suspended,
    /// The connection and the session are back.
    Resumed,
    /// No session: it could not be opened, or it is over.
    Lost { why: String, reason: Reason },
    /// The clock of the host was measured.
    Clock(HostClock),
    /// The blobs are there, or cannot be.
    Uploaded { task: TaskId, result: Result<(), String> },
    /// The host has taken the task.
    Accepted { task: TaskId },
    /// The host does not take the task.
    Rejected { task: TaskId, reason: Reason, why: String },
    /// The task is prepared and, if it is held, waits.
    Staged { task: TaskId },
    /// A phase began.
    Began { task: TaskId, phase: Option<Phase>, time_ns: u64 },
    /// How the task ended; its output and results may still be under way.
    Ended { task: TaskId, end: Box<TaskEnd> },
    /// All output and results of an ended task were handed to its recorder, or cannot be had.
    Arrived { task: TaskId, problem: Option<String> },
    /// The session is closed, or could not be closed in time.
    Closed { left_behind: Vec<String> },
}

/// What opening a session found.
#[derive(Debug, Clone, Default)]
pub(crate) struct Opened {
    pub(crate) version: String,
    pub(crate) host: v1::HostFacts,
    pub(crate) capabilities: v1::Capabilities,
    pub(crate) clock: HostClock,
}

/// What a link needs to know from its beginning.
#[derive(Debug, Clone)]
pub(crate) struct LinkOptions {
    pub(crate) lease: Duration,
    pub(crate) exclusive: bool,
    /// What the controller calls itself, for people.
    pub(crate) client: String,
}

/// The driver's end of a link.
#[derive(Debug)]
pub(crate) struct Link {
    orders: Arc<Mailbox<Order>>,
}

impl Link {
    /// Starts the link's own loop. It does nothing until told to connect.
    pub(crate) fn start(
        reach: Arc<dyn Reach>,
        world: World,
        options: LinkOptions,
        sync: SyncHost,
        reports: impl Fn(Report) -> ReportFuture + Send + Sync + 'static,
    ) -> Self {
        let orders = Arc::new(Mailbox::new());
        let link = Loop {
            reach,
            world,
            options,
            sync,
            orders: Arc::clone(&orders),
            reports: Arc::new(reports),
            pending: VecDeque::new(),
            previous: None,
        };
        tokio::spawn(link.run());
        Self { orders }
    }

    /// Gives an order. Orders to a link that has ended are dropped: it has reported why.
    pub(crate) fn order(&self, order: Order) {
        if self.orders.put(order).is_err() {
            debug!("an order came after the end of its link");
        }
    }
}

/// Handing a report to the driver; waits while it has too many.
pub(crate) type ReportFuture = std::pin::Pin<Box<dyn Future<Output = ()> + Send>>;

type Reports = Arc<dyn Fn(Report) -> ReportFuture + Send + Sync>;

type Client = AgentServiceClient<Channel>;

/// A session as the host knows it.
#[derive(Debug, Clone)]
struct Session {
    id: SessionId,
    secret: String,
    epoch: u64,
}

impl Session {
    fn key(&self) -> v1::SessionKey {
        v1::SessionKey { session_id: self.id.to_string(), epoch: self.epoch, secret: self.secret.clone() }
    }
}

/// One working connection of a session.
#[derive(Debug, Clone)]
struct Connection {
    /// Grows with each connection, so that who waits for a newer one can tell.
    number: u64,
    control: Client,
    session: Session,
}

/// How far the output and results of the tasks of this session have come.
type Progress = Arc<Mutex<BTreeMap<TaskId, Incoming>>>;

/// What is known of one task's output and results.
#[derive(Debug)]
struct Incoming {
    recorder: Recorder,
    /// How far its log was read.
    position: u64,
    /// Whether the rest of its log comes on the bulk connection.
    in_bulk: bool,
    /// Its end, once it is known.
    end: Option<Box<TaskEnd>>,
    log_arrived: bool,
    archive_arrived: bool,
    /// Whether it was reported as arrived.
    reported: bool,
    /// What of it cannot be had.
    problem: Option<String>,
}

/// What the jobs of a session share.
#[derive(Debug, Clone)]
struct Shared {
    progress: Progress,
    /// The connection that works now.
    connection: watch::Receiver<Option<Connection>>,
}

/// Why a connection or a session is no more.
#[derive(Debug)]
enum Break {
    /// The connection: coming back may help.
    Connection(String),
    /// The session: it is gone for good.
    Session { why: String, reason: Reason },
    /// The driver wants it closed.
    Close,
}

struct Loop {
    reach: Arc<dyn Reach>,
    world: World,
    options: LinkOptions,
    sync: SyncHost,
    orders: Arc<Mailbox<Order>>,
    reports: Reports,
    /// Orders that came while nothing could be done with them.
    pending: VecDeque<Order>,
    /// A session that was lost: closed before another one is opened, so that its tasks are gone first.
    previous: Option<Session>,
}

impl Loop {
    async fn run(mut self) {
        loop {
            let mut connect = false;
            for order in self.orders.take().await {
                match order {
                    Order::Connect => connect = true,
                    Order::Close => return self.end(Vec::new()).await,
                    // They are about a session that is gone, and the driver knows by now.
                    _ => {}
                }
            }
            if connect && self.session().await {
                return;
            }
        }
    }

    async fn report(&self, report: Report) {
        (self.reports)(report).await;
    }

    async fn end(&self, left_behind: Vec<String>) {
        self.orders.close();
        if timeout(limits::CLOSE_MAX, self.reach.release()).await.is_err() {
            warn!(place = self.reach.describe(), "what the reach started did not end in time");
        }
        self.report(Report::Closed { left_behind }).await;
    }

    /// One session from its opening to its end. True when the link itself is to end.
    async fn session(&mut self) -> bool {
        let session = Session { id: self.world.ids.session_id(), secret: self.world.ids.token(), epoch: 0 };
        let deadline = self.world.clock.now() + limits::REACH_MAX;
        let (connection, opened, belief) = match self.reach_host(&session, false, 1, deadline).await {
            Ok(reached) => reached,
            Err(Break::Close) => {
                self.end(Vec::new()).await;
                return true;
            }
            Err(Break::Connection(why) | Break::Session { why, .. }) => {
                warn!(place = self.reach.describe(), why, "host is not reachable");
                self.pending.clear();
                self.report(Report::Lost { why, reason: Reason::Unreachable }).await;
                return false;
            }
        };
        info!(place = self.reach.describe(), session = %session.id, "session opened");
        self.report(Report::Opened(Box::new(opened))).await;
        self.keep_session(connection, belief).await
    }

    /// Serves a session over as many connections as it takes.
    async fn keep_session(&mut self, first: Connection, belief: Instant) -> bool {
        let (connections, receiver) = watch::channel(Some(first.clone()));
        let shared = Shared { progress: Progress::default(), connection: receiver };
        let mut session = first.session.clone();
        let belief = Arc::new(Mutex::new(belief));
        let mut bulk = bulk::Bulk::new(Arc::clone(&self.reach), shared.clone(), Arc::clone(&self.reports));
        let mut attempts = BTreeMap::new();
        let mut connection = first;
        loop {
            let why = self.serve(&connection, &shared, &belief, &mut bulk, &mut attempts).await;
            connections.send_replace(None);
            let why = match why {
                Break::Close => {
                    let left = self.close(&connection).await;
                    drop(bulk);
                    self.end(left).await;
                    return true;
                }
                Break::Session { why, reason } => {
                    self.lose(&session, why, reason).await;
                    return false;
                }
                Break::Connection(why) => why,
            };
            let until = *belief.lock().unwrap_or_else(PoisonError::into_inner);
            debug!(place = self.reach.describe(), why, "connection lost");
            self.report(Report::Suspended).await;
            self.sync.session_suspended(&tasks_of(&shared));
            if !self.reach.survives_disconnect() {
                self.lose(&session, format!("the connection broke: {why}"), Reason::Unreachable).await;
                return false;
            }
            match self.reach_host(&session, true, connection.number + 1, until).await {
                Ok((new, opened, new_belief)) => {
                    *belief.lock().unwrap_or_else(PoisonError::into_inner) = new_belief;
                    session = new.session.clone();
                    connections.send_replace(Some(new.clone()));
                    connection = new;
                    info!(place = self.reach.describe(), "connection is back");
                    self.sync.session_resumed(&tasks_of(&shared));
                    self.report(Report::Clock(opened.clock)).await;
                    self.report(Report::Resumed).await;
                }
                Err(Break::Close) => {
                    drop(bulk);
                    let left = format!(
                        "{} could not be asked to end its session ({why}): it ends by itself within {}",
                        self.reach.describe(),
                        spoken(self.options.lease)
                    );
                    self.end(vec![left]).await;
                    return true;
                }
                Err(Break::Session { why, reason }) => {
                    self.lose(&session, why, reason).await;
                    return false;
                }
                Err(Break::Connection(again)) => {
                    let why = format!(
                        "the connection broke ({why}) and did not come back within the lease: {again}"
                    );
                    self.lose(&session, why, Reason::LeaseExpired).await;
                    return false;
                }
            }
        }
    }

    async fn lose(&mut self, session: &Session, why: String, reason: Reason) {
        warn!(place = self.reach.describe(), why, "session lost");
        // They are about tasks that are lost with it.
        self.pending.clear();
        self.previous = Some(session.clone());
        self.report(Report::Lost { why, reason }).await;
    }

    /// Dials and opens the session until it works, somebody has to change something first, or time is up.
    async fn reach_host(
        &mut self,
        session: &Session,
        resume: bool,
        number: u64,
        deadline: Instant,
    ) -> Result<(Connection, Opened, Instant), Break> {
        let begin = self.world.clock.now();
        let mut pause = limits::RECONNECT_PAUSE_MIN;
        let mut attempts = 0_u32;
        let mut last = "it did not answer".to_owned();
        let place = self.reach.describe();
        loop {
            attempts += 1;
            let attempt = timeout_at(deadline, Attempt::of(self, session, resume, number).open());
            match self.unless_closed(attempt).await? {
                Err(_elapsed) => {}
                Ok(Ok(reached)) => return Ok(reached),
                Ok(Err(OpenError::Final { why, gone })) => {
                    let reason = if gone { Reason::LeaseExpired } else { Reason::Unreachable };
                    return Err(Break::Session { why: format!("{place}: {why}"), reason });
                }
                Ok(Err(OpenError::Again(why))) => last = why,
            }
            if self.world.clock.now() + pause >= deadline {
                let took = spoken(self.world.clock.now().saturating_duration_since(begin));
                let times =
                    if attempts == 1 { "1 attempt".to_owned() } else { format!("{attempts} attempts") };
                return Err(Break::Connection(format!(
                    "{place} could not be reached in {took} ({times}): {last}. Check that `millstream-agent` runs there and \
                     that its address and port are right"
                )));
            }
            self.unless_closed(tokio::time::sleep(pause)).await?;
            pause = (pause * 2).min(limits::RECONNECT_PAUSE_MAX);
        }
    }

    /// Waits, but not past the order to close. Other orders are kept for later.
    async fn unless_closed<T>(&mut self, work: impl Future<Output = T>) -> Result<T, Break> {
        let mut work = pin!(work);
        loop {
            tokio::select! {
                done = &mut work => return Ok(done),
                orders = self.orders.take() => {
                    let mut close = false;
                    for order in orders {
                        match order {
                            Order::Close => close = true,
                            order => self.pending.push_back(order),
                        }
                    }
                    if close {
                        return Err(Break::Close);
                    }
                }
            }
        }
    }

    /// Serves one connection until it breaks, the session is gone, or the driver closes it.
    async fn serve(
        &mut self,
        connection: &Connection,
        shared: &Shared,
        belief: &Arc<Mutex<Instant>>,
        bulk: &mut bulk::Bulk,
        attempts: &mut BTreeMap<TaskId, u32>,
    ) -> Break {
        let mut jobs: JoinSet<Break> = JoinSet::new();
        let mut calls: JoinSet<Result<(), Break>> = JoinSet::new();
        jobs.spawn(keep(
            connection.clone(),
            self.options.lease,
            self.world.clone(),
            Arc::clone(belief),
            Arc::clone(&self.reports),
        ));
        let (bulk_orders, mut bulk_wanted) = tokio::sync::mpsc::channel(limits::STREAM_WINDOW_COUNT);
        jobs.spawn(watch_session(connection.clone(), shared.clone(), Arc::clone(&self.reports), bulk_orders));
        jobs.spawn(relay::serve(connection.clone(), self.sync.clone()));
        let mut released: BTreeSet<TaskId> = BTreeSet::new();
        let mut releasing: Option<tokio::task::JoinHandle<()>> = None;
        loop {
            // What is left when the connection breaks stays for the next one.
            while let Some(order) = self.pending.pop_front() {
                let done = self.perform(order, connection, shared, bulk, &mut calls, &mut released, attempts);
                if let Err(why) = done.await {
                    return why;
                }
            }
            if releasing.as_ref().is_none_or(tokio::task::JoinHandle::is_finished) && !released.is_empty() {
                releasing = Some(tokio::spawn(release(connection.clone(), &mut released)));
            }
            tokio::select! {
                orders = self.orders.take() => self.pending.extend(orders),
                Some(done) = calls.join_next() => {
                    if let Ok(Err(why)) = done {
                        return why;
                    }
                }
                Some(wanted) = bulk_wanted.recv() => bulk.begin(wanted),
                Some(ended) = jobs.join_next() => {
                    return ended.unwrap_or_else(|error| Break::Connection(format!("a part of the link failed: {error}")));
                }
                () = finished(&mut releasing) => {}
            }
        }
    }

    #[expect(
        clippy::too_many_arguments,
        reason = "the parts of one connection, which live no longer than it"
    )]
    async fn perform(
        &self,
        order: Order,
        connection: &Connection,
        shared: &Shared,
        bulk: &mut bulk::Bulk,
        calls: &mut JoinSet<Result<(), Break>>,
        released: &mut BTreeSet<TaskId>,
        attempts: &mut BTreeMap<TaskId, u32>,
    ) -> Result<(), Break> {
        match order {
            // There is a session: nothing to do.
            Order::Connect => {}
            Order::Close => return Err(Break::Close),
            Order::Upload { task, uploads } => bulk.upload(task, uploads),
            Order::Release { task } => {
                lock(&shared.progress).remove(&task);
                attempts.remove(&task);
                released.insert(task);
            }
            Order::Signal { task, kind, grace, reason } => {
                let call = signal(connection.clone(), task, kind, grace, reason);
                begin_in_order(calls, call).await?;
            }
            Order::Put(put) => {
                let Put { task, request, recorder } = *put;
                lock(&shared.progress).entry(task).or_insert_with(|| Incoming {
                    recorder,
                    position: 0,
                    in_bulk: false,
                    end: None,
                    log_arrived: false,
                    archive_arrived: false,
                    reported: false,
                    problem: None,
                });
                let attempt = attempts.entry(task).or_insert(0);
                *attempt += 1;
                let call = start(connection.clone(), task, request, *attempt, Arc::clone(&self.reports));
                begin_in_order(calls, call).await?;
            }
        }
        Ok(())
    }

    /// Asks the host to end everything. What it could not end, or that it could not be asked, comes back as text.
    async fn close(&self, connection: &Connection) -> Vec<String> {
        let mut control = connection.control.clone();
        let request = v1::CloseSessionRequest { session: Some(connection.session.key()) };
        let place = self.reach.describe();
        match timeout(limits::CLOSE_MAX, control.close_session(request)).await {
            Ok(Ok(response)) => {
                let survivors = response.into_inner().survivors;
                survivors.iter().map(|text| format!("{place}: {}", printable(text.as_bytes(), 512))).collect()
            }
            // A session that is gone has left nothing to close.
            Ok(Err(status)) if session_is_gone(&status) => Vec::new(),
            Ok(Err(status)) => vec![format!(
                "{place} could not be asked to end its session ({}): it ends by itself within {}",
                pipe::call_failure(&status),
                spoken(self.options.lease)
            )],
            Err(_elapsed) => vec![format!(
                "{place} did not end its session within {}: it ends by itself within {}",
                spoken(limits::CLOSE_MAX),
                spoken(self.options.lease)
            )],
        }
    }
}

/// One attempt to open a session or to come back to it.
struct Attempt {
    reach: Arc<dyn Reach>,
    world: World,
    options: LinkOptions,
    session: Session,
    previous: Option<Session>,
    resume: bool,
    number: u64,
}

impl Attempt {
    fn of(link: &Loop, session: &Session, resume: bool, number: u64) -> Self {
        Self {
            reach: Arc::clone(&link.reach),
            world: link.world.clone(),
            options: link.options.clone(),
            session: session.clone(),
            previous: link.previous.clone(),
            resume,
            number,
        }
    }

    async fn open(self) -> Result<(Connection, Opened, Instant), OpenError> {
        let mut control = dial(&*self.reach).await?;
        if !self.resume
            && let Some(previous) = &self.previous
        {
            // Whatever still runs in it must be gone before anything new runs beside it. A host that does not know it any
            // more is as clean as one that has just closed it.
            let request = v1::CloseSessionRequest { session: Some(previous.key()) };
            if let Err(status) = control.close_session(request).await
                && pipe::is_transport_failure(&status)
            {
                return Err(OpenError::Again(pipe::call_failure(&status)));
            }
        }
        let request = v1::OpenSessionRequest {
            session_id: self.session.id.to_string(),
            secret: self.session.secret.clone(),
            protocol_min: PROTOCOL,
            protocol_max: PROTOCOL,
            required_features: Vec::new(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            client: self.options.client.clone(),
            lease_duration: Some(convert::duration(self.options.lease)),
            exclusive: self.options.exclusive,
            resume: self.resume,
        };
        let sent = self.world.clock.now();
        let sent_ns = self.world.clock.wall_ns();
        let response = control.open_session(request).await.map_err(|status| refused(&status))?.into_inner();
        let received_ns = self.world.clock.wall_ns();
        let mut clock = HostClock::default();
        if let Some(time) = &response.host_time {
            clock.measure(sent_ns, convert::timestamp_ns(time), received_ns);
        }
        let session = Session { epoch: response.epoch, ..self.session };
        let opened = Opened {
            version: response.version,
            host: response.host.unwrap_or_default(),
            capabilities: response.capabilities.unwrap_or_default(),
            clock,
        };
        Ok((
            Connection { number: self.number, control, session },
            opened,
            sent + believed(self.options.lease),
        ))
    }
}

/// How long this side believes in a lease, counted from sending its renewal.
fn believed(lease: Duration) -> Duration {
    lease - lease / 10
}

fn lock(progress: &Progress) -> std::sync::MutexGuard<'_, BTreeMap<TaskId, Incoming>> {
    progress.lock().unwrap_or_else(PoisonError::into_inner)
}

fn tasks_of(shared: &Shared) -> Vec<TaskId> {
    lock(&shared.progress)
        .iter()
        .filter(|(_, incoming)| incoming.end.is_none())
        .map(|(&task, _)| task)
        .collect()
}

/// Why a session could not be opened.
enum OpenError {
    /// Trying again may help.
    Again(String),
    /// Trying again is useless. `gone`: the session that was to be resumed is over.
    Final { why: String, gone: bool },
}

impl From<DialError> for OpenError {
    fn from(error: DialError) -> Self {
        if error.is_final() {
            Self::Final { why: error.to_string(), gone: false }
        } else {
            Self::Again(error.to_string())
        }
    }
}

/// A channel over a new pipe.
async fn dial(reach: &dyn Reach) -> Result<Client, OpenError> {
    let pipe = timeout(limits::HANDSHAKE_MAX, reach.dial())
        .await
        .map_err(|_| OpenError::Again(format!("no connection within {}", spoken(limits::HANDSHAKE_MAX))))??;
    let channel = pipe::endpoint_channel(|| async { Ok(pipe) })
        .await
        .map_err(|error| OpenError::Again(error.to_string()))?;
    Ok(AgentServiceClient::new(channel)
        .max_decoding_message_size(limits::BULK_MESSAGE_BYTES_MAX)
        .max_encoding_message_size(limits::BULK_MESSAGE_BYTES_MAX))
}

fn session_is_gone(status: &Status) -> bool {
    status.code() == Code::FailedPrecondition && status.message().starts_with("session")
}

/// What the refusal of a session means.
fn refused(status: &Status) -> OpenError {
    let why = printable(pipe::call_failure(status).as_bytes(), limits::TEXT_BYTES_MAX);
    if pipe::is_transport_failure(status) {
        // With TLS 1.3 an agent's refusal of a certificate is seen only now. It will not change its mind.
        return if why.starts_with("the agent refused") {
            OpenError::Final { why, gone: false }
        } else {
            OpenError::Again(why)
        };
    }
    match status.code() {
        Code::FailedPrecondition => OpenError::Final { why, gone: session_is_gone(status) },
        Code::Unauthenticated | Code::PermissionDenied | Code::InvalidArgument => {
            OpenError::Final { why, gone: false }
        }
        Code::Unimplemented => OpenError::Final {
            why: format!(
                "it is no agent of this protocol ({why}): check the address and the version of what runs there"
            ),
            gone: false,
        },
        _ => OpenError::Again(why),
    }
}

/// What the failure of any other call means.
fn broken(status: &Status) -> Break {
    let why = printable(pipe::call_failure(status).as_bytes(), limits::TEXT_BYTES_MAX);
    if session_is_gone(status) {
        Break::Session { why, reason: Reason::LeaseExpired }
    } else {
        Break::Connection(why)
    }
}

/// Begins calls in the order in which they were ordered: each is sent on its way before the next one is looked at, and
/// its answer is awaited beside the others.
async fn begin_in_order(
    calls: &mut JoinSet<Result<(), Break>>,
    call: impl Future<Output = Result<(), Break>> + Send + 'static,
) -> Result<(), Break> {
    let mut call = Box::pin(call);
    let first = poll_fn(|context| Poll::Ready(call.as_mut().poll(context))).await;
    match first {
        Poll::Ready(done) => done,
        Poll::Pending => {
            calls.spawn(call);
            Ok(())
        }
    }
}

/// Renews the lease three times in its course.
async fn keep(
    connection: Connection,
    lease: Duration,
    world: World,
    belief: Arc<Mutex<Instant>>,
    reports: Reports,
) -> Break {
    let mut clock = HostClock::default();
    let mut control = connection.control.clone();
    loop {
        let until = *belief.lock().unwrap_or_else(PoisonError::into_inner);
        tokio::time::sleep(lease / 3).await;
        let sent = world.clock.now();
        let sent_ns = world.clock.wall_ns();
        let request = v1::KeepSessionRequest { session: Some(connection.session.key()) };
        match timeout_at(until, control.keep_session(request)).await {
            Err(_elapsed) => {
                return Break::Connection("the renewal of the lease was not answered".to_owned());
            }
            Ok(Err(status)) => return broken(&status),
            Ok(Ok(response)) => {
                *belief.lock().unwrap_or_else(PoisonError::into_inner) = sent + believed(lease);
                if let Some(time) = &response.into_inner().host_time {
                    let before = clock.uncertainty_ns();
                    clock.measure(sent_ns, convert::timestamp_ns(time), world.clock.wall_ns());
                    if clock.uncertainty_ns() != before {
                        reports(Report::Clock(clock)).await;
                    }
                }
            }
        }
    }
}

/// Hands a task over.
async fn start(
    connection: Connection,
    task: TaskId,
    mut request: v1::StartTaskRequest,
    attempt: u32,
    reports: Reports,
) -> Result<(), Break> {
    request.session = Some(connection.session.key());
    let mut control = connection.control;
    let status = match control.start_task(request).await {
        Ok(_) => {
            reports(Report::Accepted { task }).await;
            return Ok(());
        }
        Err(status) => status,
    };
    let again = pipe::is_transport_failure(&status) || status.code() == Code::Unavailable;
    if session_is_gone(&status) || (again && attempt < START_ATTEMPTS_MAX) {
        return Err(broken(&status));
    }
    let reason = match status.code() {
        Code::InvalidArgument => Reason::InvalidBlock,
        Code::ResourceExhausted => Reason::HostExhausted,
        Code::FailedPrecondition => Reason::FileRefused,
        Code::Unavailable => Reason::Unreachable,
        _ => Reason::Internal,
    };
    let why = printable(pipe::call_failure(&status).as_bytes(), limits::TEXT_BYTES_MAX);
    reports(Report::Rejected { task, reason, why: format!("the host does not take the task: {why}") }).await;
    Ok(())
}

/// Acts on a task.
async fn signal(
    connection: Connection,
    task: TaskId,
    kind: v1::SignalKind,
    grace: Option<Duration>,
    reason: Option<Reason>,
) -> Result<(), Break> {
    let request = v1::SignalTaskRequest {
        session: Some(connection.session.key()),
        task_id: task.to_string(),
        kind: kind.into(),
        signal: 0,
        grace_duration: grace.map(convert::duration),
        reason: match reason {
            Some(Reason::TestDeadline) => v1::Reason::TestDeadline.into(),
            _ => v1::Reason::Unspecified.into(),
        },
    };
    let mut control = connection.control;
    match control.signal_task(request).await {
        Ok(_) => Ok(()),
        Err(status) if pipe::is_transport_failure(&status) || session_is_gone(&status) => {
            Err(broken(&status))
        }
        Err(status) => {
            // A task that the host has never got, or has forgotten, has nothing left to be told.
            debug!(%task, ?kind, why = status.message(), "signal was refused");
            Ok(())
        }
    }
}

/// Lets the host forget tasks. A release that is lost costs the host some space until the session ends.
fn release(
    connection: Connection,
    released: &mut BTreeSet<TaskId>,
) -> impl Future<Output = ()> + Send + 'static {
    let mut task_ids = Vec::new();
    while task_ids.len() < RELEASE_COUNT_MAX
        && let Some(task) = released.pop_first()
    {
        task_ids.push(task.to_string());
    }
    async move {
        let request = v1::ReleaseTaskRequest { session: Some(connection.session.key()), task_ids };
        let mut control = connection.control;
        if let Err(status) = control.release_task(request).await {
            debug!(why = pipe::call_failure(&status), "tasks could not be released");
        }
    }
}

/// Completes when the release that is under way has been answered; never when none is.
async fn finished(releasing: &mut Option<tokio::task::JoinHandle<()>>) {
    match releasing {
        Some(handle) if !handle.is_finished() => {
            let _joined = handle.await;
        }
        _ => std::future::pending().await,
    }
}

/// A part of a task that does not come with the session's events.
#[derive(Debug)]
pub(crate) enum Wanted {
    /// The rest of its log.
    Log { task: TaskId },
    /// Its archive.
    Archive { task: TaskId },
}

/// Reads the events of all tasks of the session.
async fn watch_session(
    connection: Connection,
    shared: Shared,
    reports: Reports,
    wanted: tokio::sync::mpsc::Sender<Wanted>,
) -> Break {
    let known = lock(&shared.progress)
        .iter()
        .map(|(task, incoming)| v1::TaskPosition {
            task_id: task.to_string(),
            position: incoming.position,
            ended: incoming.end.is_some(),
        })
        .collect();
    let request = v1::WatchTaskRequest {
        session: Some(connection.session.key()),
        task_id: String::new(),
        position: 0,
        known,
    };
    let mut control = connection.control.clone();
    let mut events = match control.watch_task(request).await {
        Ok(response) => response.into_inner(),
        Err(status) => return broken(&status),
    };
    loop {
        match events.message().await {
            Ok(Some(message)) => {
                for event in message.events {
                    if let Err(why) = take_event(event, &shared, &reports, &wanted).await {
                        return Break::Connection(why);
                    }
                }
            }
            Ok(None) => return Break::Connection("the agent ended the session's events".to_owned()),
            Err(status) => return broken(&status),
        }
    }
}

/// Takes in one event of one task. An error is a peer that does not keep to the protocol.
async fn take_event(
    event: v1::TaskEvent,
    shared: &Shared,
    reports: &Reports,
    wanted: &tokio::sync::mpsc::Sender<Wanted>,
) -> Result<(), String> {
    use v1::task_event::Event;
    let task: TaskId = convert::id_in("task_id", &event.task_id).map_err(|error| error.to_string())?;
    // Tasks that were released may still have a last word under way.
    let Some(recorder) = lock(&shared.progress).get(&task).map(|incoming| incoming.recorder.clone()) else {
        return Ok(());
    };
    match event.event {
        None => Ok(()),
        Some(Event::Progress(progress)) => {
            let time_ns = progress.time.as_ref().map_or(0, convert::timestamp_ns);
            match progress.state() {
                v1::TaskState::Staged => reports(Report::Staged { task }).await,
                v1::TaskState::Running => {
                    let phase = match progress.phase() {
                        v1::Phase::Unspecified => None,
                        v1::Phase::Setup => Some(Phase::Setup),
                        v1::Phase::Run => Some(Phase::Run),
                        v1::Phase::Teardown => Some(Phase::Teardown),
                    };
                    reports(Report::Began { task, phase, time_ns }).await;
                }
                _ => {}
            }
            Ok(())
        }
        Some(Event::Log(chunk)) => {
            // The rest of a long log comes on the bulk connection, whatever is repeated here.
            if lock(&shared.progress).get(&task).is_none_or(|incoming| incoming.in_bulk) {
                return Ok(());
            }
            let next = chunk.next_position;
            record(&recorder, chunk).await?;
            if let Some(incoming) = lock(&shared.progress).get_mut(&task) {
                incoming.position = next;
            }
            Ok(())
        }
        Some(Event::LogContinues(from)) => {
            let begin = match lock(&shared.progress).get_mut(&task) {
                Some(incoming) if !incoming.in_bulk => {
                    incoming.in_bulk = true;
                    incoming.position = from.position;
                    true
                }
                _ => false,
            };
            if begin {
                let _ended = wanted.send(Wanted::Log { task }).await;
            }
            Ok(())
        }
        Some(Event::End(end)) => {
            let end = TaskEnd::try_from(end).map_err(|error| error.to_string())?;
            take_end(task, end, shared, reports, wanted).await;
            Ok(())
        }
    }
}

async fn take_end(
    task: TaskId,
    end: TaskEnd,
    shared: &Shared,
    reports: &Reports,
    wanted: &tokio::sync::mpsc::Sender<Wanted>,
) {
    let end = Box::new(end);
    let archive = end.archive.clone();
    let is_inline = |size: u64, length: usize| u64::try_from(length).is_ok_and(|length| length == size);
    let fetched = archive.as_ref().filter(|info| !is_inline(info.size_bytes, info.inline.len()));
    let recorder = {
        let mut progress = lock(&shared.progress);
        let Some(incoming) = progress.get_mut(&task) else { return };
        if incoming.end.is_some() {
            return;
        }
        incoming.end = Some(end.clone());
        incoming.log_arrived |= !incoming.in_bulk;
        incoming.archive_arrived = fetched.is_none();
        incoming.recorder.clone()
    };
    reports(Report::Ended { task, end }).await;
    if fetched.is_some() {
        let _ended = wanted.send(Wanted::Archive { task }).await;
    } else if let Some(info) = archive {
        recorder.archive_begins(info.size_bytes, &info.sha256);
        recorder.archive_piece(info.inline).await;
        recorder.archive_ends();
    }
    settle(task, shared, reports).await;
}

/// Reports a task as arrived once its end is known and both its log and its archive are here.
async fn settle(task: TaskId, shared: &Shared, reports: &Reports) {
    let problem = {
        let mut progress = lock(&shared.progress);
        let Some(incoming) = progress.get_mut(&task) else { return };
        let complete = incoming.end.is_some() && incoming.log_arrived && incoming.archive_arrived;
        if !complete || incoming.reported {
            return;
        }
        incoming.reported = true;
        incoming.problem.take()
    };
    reports(Report::Arrived { task, problem }).await;
}

/// Hands records to a task's recorder.
async fn record(recorder: &Recorder, chunk: v1::LogChunk) -> Result<(), String> {
    let records: Result<Vec<_>, _> = chunk.records.into_iter().map(TryInto::try_into).collect();
    recorder.records(records.map_err(|error: convert::ConvertError| error.to_string())?).await;
    Ok(())
}
