//! One session with one agent: reach it, open the session, keep it, come back to it, close it.
//!
//! Two connections: *control* carries the session, starts, signals, events and the relay of barriers; *bulk* carries
//! files, long logs and archives, so that none of them can starve a renewal of the lease. The lease as believed here is
//! counted from sending, less a tenth: this belief ends before the host's. Nothing here knows streams or decides what is
//! run: orders come in, reports go out.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    future::Future,
    pin::pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use millstream_common::{
    clock::World,
    id::TaskId,
    limits,
    outcome::{Reason, TaskEnd},
    pipe,
    text::{printable, spoken},
};
use millstream_proto::v1::agent_service_client::AgentServiceClient;
use tokio::{
    sync::watch,
    task::JoinSet,
    time::{Instant, timeout},
};
use tonic::{Status, transport::Channel};
use tracing::{debug, info, warn};

use crate::{
    driver::{mailbox::Mailbox, scribe::Recorder},
    reach::{self, Reach},
    sync::host::SyncHost,
};

mod bulk;
mod calls;
pub(crate) mod close;
mod events;
mod features;
mod line;
mod messages;
mod open;
mod relay;
mod session;

use calls::{begin_in_order, keep, release, signal, start};
use events::watch_session;
use features::Features;
pub(crate) use line::Holdings;
use line::Line;
pub(crate) use messages::{LinkOptions, Opened, Order, Put, Report, Sending};
use open::{Attempt, OpenError, unless_late};
pub(crate) use session::Session;
use session::{session_gone, session_is_gone};

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
            asked: Arc::default(),
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

/// One working connection of a session.
#[derive(Debug, Clone)]
struct Connection {
    /// Grows with each connection, so that who waits for a newer one can tell.
    number: u64,
    control: Client,
    session: Session,
    /// As the host has granted it.
    lease: Duration,
    features: Features,
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
    /// What does not come with the session's events; kept over connections.
    wanted: Arc<Mailbox<events::Wanted>>,
}

/// Why a connection or a session is no more.
#[derive(Debug)]
enum Break {
    /// The connection: coming back may help.
    Connection(String),
    /// The session: it is gone for good.
    Session { why: String, reason: Reason },
    /// The driver wants it closed, and the link to end `for_good`.
    Close { for_good: bool },
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
    /// A session that was lost, or of which nobody knows whether it was opened: closed before another one is opened, so that
    /// its tasks are gone first, and in the end.
    previous: Option<Session>,
    /// Whether the host may have opened the session that is being opened, and nobody heard.
    asked: Arc<AtomicBool>,
}

impl Loop {
    async fn run(mut self) {
        loop {
            let mut connect = false;
            for order in self.orders.take().await {
                match order {
                    Order::Connect => connect = true,
                    Order::Close { for_good } => {
                        connect = false;
                        let left = self.close_previous().await;
                        if self.closed(left, for_good).await {
                            return;
                        }
                    }
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

    /// The session is closed: the link ends when that was for good, which is what comes back.
    async fn closed(&mut self, mut left_behind: Vec<String>, for_good: bool) -> bool {
        self.options.holdings.let_go(&self.reach.describe());
        if for_good {
            self.orders.close();
            left_behind.extend(reach::released(&*self.reach).await);
        } else {
            self.forget_pending();
        }
        self.report(Report::Closed { left_behind, for_good }).await;
        for_good
    }

    /// One session from its opening to its end. True when the link itself is to end.
    async fn session(&mut self) -> bool {
        let session = Session { id: self.world.ids.session_id(), secret: self.world.ids.token(), epoch: 0 };
        self.asked.store(false, Ordering::Relaxed);
        // Whoever cannot be told now will hear of its end from nobody but its lease.
        let entrusted = session.entrusted(self.options.lease, false);
        let _told = timeout(limits::CLOSE_MAX, self.reach.entrust(&entrusted)).await;
        if self.previous.is_some() {
            self.reach.renew();
        }
        let deadline = self.world.clock.now() + self.reach.reach_max();
        let (connection, opened, belief) = match self.reach_host(&session, false, 1, deadline).await {
            Ok(reached) => reached,
            Err(Break::Close { for_good }) => {
                self.doubt(session);
                let left = self.close_previous().await;
                return self.closed(left, for_good).await;
            }
            Err(Break::Connection(why)) => return self.not_opened(session, why, Reason::Unreachable).await,
            Err(Break::Session { why, reason }) => return self.not_opened(session, why, reason).await,
        };
        info!(place = self.reach.describe(), session = %session.id, "session opened");
        self.options.holdings.hold(&self.reach.describe());
        self.report(Report::Opened(Box::new(opened))).await;
        self.keep_session(connection, belief).await
    }

    /// There is no session, and trying again is useless. The link goes on: another task may find the host as it should be.
    async fn not_opened(&mut self, session: Session, why: String, reason: Reason) -> bool {
        self.doubt(session);
        warn!(place = self.reach.describe(), why, "no session");
        self.forget_pending();
        self.report(Report::Lost { why, reason }).await;
        false
    }

    /// Serves a session over as many connections as it takes.
    async fn keep_session(&mut self, first: Connection, belief: Instant) -> bool {
        let (connections, receiver) = watch::channel(Some(first.clone()));
        let shared =
            Shared { progress: Progress::default(), connection: receiver, wanted: Arc::new(Mailbox::new()) };
        let mut session = first.session.clone();
        let belief = Arc::new(Mutex::new(belief));
        let mut bulk = bulk::Bulk::new(Arc::clone(&self.reach), shared.clone(), Arc::clone(&self.reports));
        let mut attempts = BTreeMap::new();
        let mut connection = first;
        loop {
            let why = self.serve(&connection, &shared, &belief, &mut bulk, &mut attempts).await;
            connections.send_replace(None);
            let why = match why {
                Break::Close { for_good } => {
                    let left = self.close(connection.control.clone(), &connection.session).await;
                    drop(bulk);
                    return self.closed(left, for_good).await;
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
                Ok((mut new, opened, new_belief)) => {
                    new.features.also_of(&connection.features);
                    *belief.lock().unwrap_or_else(PoisonError::into_inner) = new_belief;
                    session = new.session.clone();
                    connections.send_replace(Some(new.clone()));
                    connection = new;
                    info!(place = self.reach.describe(), "connection is back");
                    self.sync.session_resumed(&tasks_of(&shared));
                    self.report(Report::Clock(opened.clock)).await;
                    self.report(Report::Resumed).await;
                }
                Err(Break::Close { for_good }) => {
                    drop(bulk);
                    self.previous = Some(session);
                    let left = self.close_previous().await;
                    return self.closed(left, for_good).await;
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

    /// Remembers a session that the host may have opened although nobody heard of it.
    fn doubt(&mut self, session: Session) {
        if self.asked.load(Ordering::Relaxed) {
            self.previous = Some(session);
        }
    }

    async fn lose(&mut self, session: &Session, why: String, reason: Reason) {
        warn!(place = self.reach.describe(), why, "session lost");
        self.options.holdings.let_go(&self.reach.describe());
        self.forget_pending();
        self.previous = Some(session.clone());
        self.report(Report::Lost { why, reason }).await;
    }

    /// Drops orders about tasks that are lost with the session; not those to close.
    fn forget_pending(&mut self) {
        for order in std::mem::take(&mut self.pending) {
            if matches!(order, Order::Close { .. }) && self.orders.put(order).is_err() {
                debug!("the link has ended already");
            }
        }
    }

    /// Dials and opens the session until it works, somebody has to change something first, or time is up.
    async fn reach_host(
        &mut self,
        session: &Session,
        resume: bool,
        number: u64,
        mut deadline: Instant,
    ) -> Result<(Connection, Opened, Instant), Break> {
        let mut begin = self.world.clock.now();
        let mut line: Option<Line> = None;
        let (mut kept, mut decided) = (None, None);
        let mut pause = limits::RECONNECT_PAUSE_MIN;
        let mut attempts = 0_u32;
        let mut last = "it did not answer".to_owned();
        let place = self.reach.describe();
        loop {
            attempts += 1;
            // Asked first, the host says at once who has it.
            let patience = line.as_ref().map_or(Duration::ZERO, |line| line.patience(self.world.clock.now()));
            let attempt = Attempt::of(self, session, resume, number, kept.take(), patience);
            let reach = Arc::clone(&self.reach);
            let attempt = unless_late(Box::pin(attempt.open()), &*reach, &mut deadline, !resume);
            match self.unless_closed(attempt).await? {
                Err(_elapsed) => {}
                Ok(Ok(reached)) => return Ok(reached),
                Ok(Err(OpenError::Final { why, reason })) => {
                    return Err(Break::Session { why: format!("{place}: {why}"), reason });
                }
                Ok(Err(OpenError::InLine { why, control })) => {
                    // Reaching it may take its time again whenever the connection breaks.
                    begin = self.world.clock.now();
                    deadline = begin + limits::REACH_MAX;
                    (attempts, pause) = (0, limits::RECONNECT_PAUSE_MIN);
                    let line = line
                        .get_or_insert_with(|| Line::begin(begin, self.options.wait, self.options.in_block));
                    if let Some(why) = line.over(&place, &self.options.holdings, &why, begin) {
                        self.leave_line(control, session).await;
                        return Err(Break::Session { why, reason: Reason::Unreachable });
                    }
                    if line.is_news(begin) {
                        info!(place, why, "waits in line");
                    }
                    kept = Some(control);
                    self.report(Report::InLine { why }).await;
                }
                Ok(Err(error @ (OpenError::Again(_) | OpenError::Pending(_)))) => {
                    if let OpenError::Again(_) = &error {
                        // However long the decision took: from then on a place has no more time than any other.
                        let decided = *decided.get_or_insert_with(|| self.world.clock.now());
                        deadline = deadline.min(decided + limits::REACH_MAX);
                    }
                    last = error.why();
                    self.report(Report::AttemptFailed { why: last.clone() }).await;
                }
            }
            if self.world.clock.now() + pause >= deadline {
                let took = spoken(self.world.clock.now().saturating_duration_since(begin));
                let times =
                    if attempts == 1 { "1 attempt".to_owned() } else { format!("{attempts} attempts") };
                return Err(Break::Connection(format!(
                    "{place} could not be reached in {took} ({times}): {last}. {}",
                    self.reach.what_to_check()
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
            let close = self.pending.iter().position(|order| matches!(order, Order::Close { .. }));
            if let Some(Order::Close { for_good }) = close.and_then(|place| self.pending.remove(place)) {
                return Err(Break::Close { for_good });
            }
            tokio::select! {
                done = &mut work => return Ok(done),
                orders = self.orders.take() => self.pending.extend(orders),
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
        let why = self.serve_with(&mut jobs, &mut calls, connection, shared, belief, bulk, attempts).await;
        // Nobody of this connection may still take something in when the next one tells the host what is here.
        jobs.shutdown().await;
        calls.shutdown().await;
        why
    }

    #[expect(
        clippy::too_many_arguments,
        reason = "the parts of one connection, which live no longer than it"
    )]
    async fn serve_with(
        &mut self,
        jobs: &mut JoinSet<Break>,
        calls: &mut JoinSet<Result<(), Break>>,
        connection: &Connection,
        shared: &Shared,
        belief: &Arc<Mutex<Instant>>,
        bulk: &mut bulk::Bulk,
        attempts: &mut BTreeMap<TaskId, u32>,
    ) -> Break {
        jobs.spawn(keep(
            connection.clone(),
            self.world.clone(),
            Arc::clone(belief),
            Arc::clone(&self.reports),
            (self.reach.describe(), Arc::clone(&self.options.holdings)),
        ));
        jobs.spawn(watch_session(connection.clone(), shared.clone(), Arc::clone(&self.reports)));
        jobs.spawn(relay::serve(connection.clone(), shared.clone(), self.sync.clone()));
        let mut released: BTreeSet<TaskId> = BTreeSet::new();
        let mut releasing: Option<tokio::task::JoinHandle<()>> = None;
        loop {
            // What is left when the connection breaks stays for the next one.
            while let Some(order) = self.pending.pop_front() {
                let done = self.perform(order, connection, shared, bulk, calls, &mut released, attempts);
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
                wanted = shared.wanted.take() => wanted.into_iter().for_each(|wanted| bulk.begin(wanted)),
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
            Order::Close { for_good } => return Err(Break::Close { for_good }),
            Order::Upload { task, uploads, sending } => bulk.upload(task, uploads, sending),
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
                if let Err(error) = connection.features.admit(&request) {
                    let (reason, why) = (Reason::Unsupported, error.to_string());
                    self.report(Report::Rejected { task, reason, why }).await;
                    return Ok(());
                }
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

/// What the failure of any other call means.
fn broken(status: &Status) -> Break {
    let why = printable(pipe::call_failure(status).as_bytes(), limits::TEXT_BYTES_MAX);
    match session_gone(status) {
        Some(reason) => Break::Session { why, reason },
        None => Break::Connection(why),
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
