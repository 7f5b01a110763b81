//! The front door: decodes, authorises, asks, encodes; runs no user code.
//!
//! Everything that lasts is with the supervisors and on disk, so that this process can be killed and started again without
//! a block noticing. `Shared` holds what all calls share: the machine of sessions, the supervisors, and facts of the
//! host.

pub mod acceptor;
pub mod admission;
pub mod identity;
pub mod reload;
pub(crate) mod service;
pub mod status;
pub(crate) mod store;
pub(crate) mod supervisors;
#[cfg(test)]
mod tests;
pub mod uploads;
pub(crate) mod watch;

use std::{
    collections::BTreeMap,
    fmt, fs, io,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use millstream_common::{
    clock::World, id::SessionId, limits, outcome::Reason, pipe, protocol, text::printable,
};
use millstream_proto::v1::{self, agent_service_server::AgentServiceServer};
use rustix::fs::FlockOperation;
use tokio::sync::{Notify, OnceCell, mpsc, oneshot, watch as watched};
use tokio_stream::{StreamExt as _, wrappers::ReceiverStream};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::Status;
use tracing::{debug, error, info, warn};

pub use self::{
    acceptor::{Connection, Listener},
    admission::Admission,
    supervisors::{StartSupervisor, Starting, Supervisors},
};
use self::{
    service::Service,
    status::{DiskUse, LastErrors},
    store::Store,
    supervisors::{Kept, Notice, SessionDirectory, StartError, Starter, Supervised},
};
use crate::{
    entry::Relaunch,
    host,
    session::{Action, Asking, Event, Found, OpenRefusal, Owner, Secret, Sessions, Ticket},
    supervisor::{
        blobs::BlobError,
        cgroup::{
            Hierarchies, LimitsSource,
            claim::{self, AGENT_GROUP, Claim},
        },
        session_group_name,
    },
};

/// Full names of the services on the agent's port.
pub(crate) const SERVED: &[&str] = &[
    "millstream.v1.AgentService",
    "grpc.health.v1.Health",
    "grpc.reflection.v1.ServerReflection",
    "grpc.reflection.v1alpha.ServerReflection",
];
/// Notices of supervisors that wait for the door: each session has at most three in its life.
const NOTICES_COUNT_MAX: usize = limits::SESSIONS_COUNT_MAX * 4;
/// How long finding the supervisors of an earlier agent may take: they are asked at once, and each answers in a moment.
const FIND_MAX: Duration = Duration::from_secs(15);

/// What the door needs to be told.
#[derive(Debug, Clone)]
pub struct DoorConfig {
    /// Where sessions and blobs lie.
    pub state: PathBuf,
    /// How this program starts itself again.
    pub relaunch: Relaunch,
    /// Environment that every block gets.
    pub base_environment: Vec<(String, String)>,
    /// Where supervisors run.
    pub supervisors: Supervisors,
    /// Bytes that shipped files may take together: [`limits::BLOBS_BYTES_MAX`] for a real agent.
    pub blobs_bytes_max: u64,
}

/// Why the door does not open.
#[derive(Debug, thiserror::Error)]
pub enum DoorError {
    /// The state directory cannot be used.
    #[error("failed to use the state directory `{}`: {}; make it writable for this user, or set `state_directory` to another", path.display(), millstream_common::tls::reason(source))]
    State {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Sockets of blocks could not be bound below it.
    #[error("the state directory `{}` has a path of {length} bytes, but sockets below it leave room for {STATE_PATH_BYTES_MAX}: set `state_directory` (for local streams the variable TMPDIR) to a shorter one", path.display())]
    TooLong {
        /// The directory.
        path: PathBuf,
        /// Bytes of its path.
        length: usize,
    },
    /// The store of shipped files cannot be used.
    #[error("failed to use the store of shipped files: {}", millstream_common::tls::reason(source))]
    Blobs {
        /// Why not.
        #[source]
        source: BlobError,
    },
    /// Another agent uses it.
    #[error("the state directory is in use by the agent with process {pid} (lock `{}`): stop that agent, or set `state_directory` to another", path.display())]
    InUse {
        /// The file that is locked.
        path: PathBuf,
        /// Process that holds it, as it wrote itself down.
        pid: String,
    },
    /// The services cannot be described.
    #[error("failed to prepare reflection")]
    Reflection(#[source] tonic_reflection::server::Error),
    /// Serving ended with an error.
    #[error("failed to serve")]
    Serve(#[source] tonic::transport::Error),
}

/// What all calls share.
pub(crate) struct Shared {
    pub(crate) world: World,
    pub(crate) incarnation: String,
    /// Since the start of the host.
    pub(crate) started: Duration,
    pub(crate) host: v1::HostFacts,
    pub(crate) capabilities: v1::Capabilities,
    pub(crate) state: PathBuf,
    pub(crate) store: Store,
    pub(crate) last_errors: LastErrors,
    pub(crate) disk_use: Arc<DiskUse>,
    starter: Starter,
    sessions: Mutex<Sessions>,
    /// Wakes the loop that tells the sessions about time.
    deadline_changed: Notify,
    askings: Mutex<BTreeMap<Ticket, oneshot::Sender<Result<Admitted, OpenRefusal>>>>,
    next_ticket: AtomicU64,
    supervised: Mutex<BTreeMap<SessionId, Arc<Slot>>>,
    notices: mpsc::Sender<(SessionId, Notice)>,
    status_changed: watched::Sender<u64>,
    tracker: TaskTracker,
    /// This agent's control group, claimed for as long as it lives.
    _claim: Option<Claim>,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("incarnation", &self.incarnation).finish_non_exhaustive()
    }
}

/// The place of one session's supervisor: filled once it runs, whoever asked for it first.
type Slot = OnceCell<Arc<Supervised>>;

/// An asking that was granted.
#[derive(Debug, Clone, Copy)]
struct Admitted {
    epoch: u64,
    resumed: bool,
}

/// A session that was opened.
pub(crate) struct Opened {
    pub(crate) epoch: u64,
    pub(crate) resumed: bool,
    pub(crate) supervised: Arc<Supervised>,
}

/// Counts as one connection of a session for as long as it lives.
pub(crate) struct Holder {
    shared: Arc<Shared>,
    session_id: SessionId,
}

impl Drop for Holder {
    fn drop(&mut self) {
        self.shared.tell(Event::Connected { session_id: self.session_id, came: false });
    }
}

/// Gives an asking up when its caller goes away.
struct AskingGuard<'a> {
    shared: &'a Shared,
    ticket: Ticket,
}

impl Drop for AskingGuard<'_> {
    fn drop(&mut self) {
        let mut askings = self.shared.askings.lock().unwrap_or_else(PoisonError::into_inner);
        if askings.remove(&self.ticket).is_some() {
            drop(askings);
            self.shared.tell(Event::Left { ticket: self.ticket });
        }
    }
}

impl Shared {
    /// The machine of sessions. Held for moments only.
    pub(crate) fn sessions(&self) -> MutexGuard<'_, Sessions> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The supervisor of a session, when it runs.
    pub(crate) fn supervised(&self, session_id: SessionId) -> Option<Arc<Supervised>> {
        let supervised = self.supervised.lock().unwrap_or_else(PoisonError::into_inner);
        supervised.get(&session_id).and_then(|slot| slot.get()).cloned()
    }

    fn slot(&self, session_id: SessionId) -> Arc<Slot> {
        let mut supervised = self.supervised.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(supervised.entry(session_id).or_default())
    }

    /// The supervisor of a session; waits for one that is just being started.
    async fn begun(&self, session_id: SessionId) -> Option<Arc<Supervised>> {
        let slot = {
            let supervised = self.supervised.lock().unwrap_or_else(PoisonError::into_inner);
            supervised.get(&session_id).cloned()?
        };
        // Whoever fills the slot is waited for; when nobody does, it stays empty.
        slot.get_or_try_init(|| async { Err(()) }).await.ok().cloned()
    }

    /// Wakes when something that operators see has changed.
    pub(crate) fn status_changes(&self) -> watched::Receiver<u64> {
        self.status_changed.subscribe()
    }

    fn status_has_changed(&self) {
        self.status_changed.send_modify(|version| *version += 1);
    }

    /// Feeds the machine of sessions and performs what it orders.
    fn tell(&self, event: Event) {
        let mut actions = Vec::new();
        self.sessions().handle(event, self.world.clock.since_boot(), &mut actions);
        let mut askings = self.askings.lock().unwrap_or_else(PoisonError::into_inner);
        for action in actions {
            let (ticket, answer) = match action {
                Action::Admit { ticket, epoch, resumed, .. } => (ticket, Ok(Admitted { epoch, resumed })),
                Action::Refuse { ticket, refusal } => (ticket, Err(refusal)),
            };
            // Whoever asked may have gone; a session that it was given ends with its lease.
            if let Some(asking) = askings.remove(&ticket) {
                let _gone = asking.send(answer);
            }
        }
        drop(askings);
        self.deadline_changed.notify_one();
        self.status_has_changed();
    }

    /// Opens a session or comes back to one: waits for its turn, and for its supervisor.
    pub(crate) async fn open(self: &Arc<Self>, asking: Asking) -> Result<Opened, Status> {
        let ticket = self.next_ticket.fetch_add(1, Ordering::Relaxed);
        let (answer, answered) = oneshot::channel();
        self.askings.lock().unwrap_or_else(PoisonError::into_inner).insert(ticket, answer);
        let guard = AskingGuard { shared: self, ticket };
        let (session_id, lease) = (asking.session_id, asking.lease);
        self.tell(Event::Asked { ticket, asking, wall_ns: self.world.clock.wall_ns() });
        let admitted = answered.await.map_err(|_| Status::unavailable("the agent is ending: try again"))?;
        drop(guard);
        let admitted = admitted.map_err(|refusal| service::open_refused(&refusal))?;
        // Begun things are finished even when the caller goes: otherwise a session would be open without a supervisor.
        let shared = Arc::clone(self);
        let starting = tokio::spawn(async move { shared.start(session_id, lease).await });
        let started = starting.await.map_err(|error| Status::internal(error.to_string()))?;
        let supervised = started.map_err(|error| {
            self.last_errors.add(&*self.world.clock, &error.to_string());
            Status::unavailable(error.to_string())
        })?;
        Ok(Opened { epoch: admitted.epoch, resumed: admitted.resumed, supervised })
    }

    /// The supervisor of an admitted session: the one that runs, or a new one. The session's new epoch is on disk before
    /// anybody hears of it.
    async fn start(&self, session_id: SessionId, lease: Duration) -> Result<Arc<Supervised>, StartError> {
        let directory = self.directory(session_id);
        let failed = {
            let directory = directory.clone();
            move |source| StartError::Directory { path: directory.path().to_owned(), source }
        };
        let slot = self.slot(session_id);
        let started = slot
            .get_or_try_init(|| async {
                directory.create().map_err(&failed)?;
                self.keep(session_id, &directory).map_err(&failed)?;
                info!(session = %session_id, "starting a supervisor");
                self.starter.start(session_id, directory.clone(), lease, self.notices.clone()).await
            })
            .await;
        match started {
            Ok(supervised) => {
                self.keep(session_id, &directory).map_err(failed)?;
                Ok(Arc::clone(supervised))
            }
            Err(error) => {
                error!(session = %session_id, %error, "a session could not begin");
                self.supervised.lock().unwrap_or_else(PoisonError::into_inner).remove(&session_id);
                if let Err(error) = directory.remove() {
                    warn!(session = %session_id, %error, "the directory of a session cannot be removed");
                }
                self.tell(Event::Abandoned { session_id });
                Err(error)
            }
        }
    }

    fn directory(&self, session_id: SessionId) -> SessionDirectory {
        SessionDirectory::of(&self.state, session_id, self.starter.cgroup_of(session_id))
    }

    /// Writes down what the next agent must know of a session.
    fn keep(&self, session_id: SessionId, directory: &SessionDirectory) -> io::Result<()> {
        let kept = {
            let sessions = self.sessions();
            let Some(session) = sessions.get(session_id) else { return Ok(()) };
            Kept {
                owner: session.owner.clone(),
                secret: session.secret().clone(),
                epoch: session.epoch,
                lease_ms: u64::try_from(session.lease.as_millis()).unwrap_or(u64::MAX),
                client: session.client.clone(),
                exclusive: session.exclusive,
                open_time_ns: session.open_time_ns,
                boot_id: self.host.boot_id.clone(),
                cgroup: self.starter.cgroup_of(session_id),
            }
        };
        directory.keep(&kept)
    }

    /// The supervisor has taken a renewal.
    pub(crate) fn kept(&self, session_id: SessionId) {
        self.tell(Event::Kept { session_id });
    }

    /// One more connection holds a session.
    pub(crate) fn hold(self: &Arc<Self>, session_id: SessionId) -> Holder {
        self.tell(Event::Connected { session_id, came: true });
        Holder { shared: Arc::clone(self), session_id }
    }

    /// Ends a session and removes everything of it; answers with what could not be. Once begun it finishes.
    pub(crate) async fn close(self: &Arc<Self>, session_id: SessionId) -> Vec<String> {
        let shared = Arc::clone(self);
        let closing = tokio::spawn(async move {
            shared.tell(Event::Closing { session_id });
            let survivors = match shared.begun(session_id).await {
                Some(supervised) => supervised.close().await,
                None => Vec::new(),
            };
            shared.supervised.lock().unwrap_or_else(PoisonError::into_inner).remove(&session_id);
            shared.make_space();
            if !survivors.is_empty() {
                shared.report_survivors(session_id, &survivors);
            }
            shared.tell(Event::Closed { session_id });
            survivors
        });
        closing.await.unwrap_or_else(|error| vec![format!("closing failed inside the agent: {error}")])
    }

    /// A session holds its shipped files no longer. Nobody waits for what follows from that.
    fn make_space(&self) {
        let store = self.store.clone();
        self.tracker.spawn_blocking(move || store.session_ended());
    }

    fn report_survivors(&self, session_id: SessionId, survivors: &[String]) {
        error!(session = %session_id, ?survivors, "not everything of a session could be removed");
        let shown = survivors.join(", ");
        self.last_errors.add(&*self.world.clock, &format!("session {session_id} left behind: {shown}"));
        let mut all = self.sessions().survivors().to_vec();
        all.extend(survivors.iter().map(|survivor| printable(survivor.as_bytes(), 256)));
        // Enough to say that the host is not clean.
        all.truncate(64);
        self.tell(Event::LeftBehind { survivors: all });
    }

    /// Finds the sessions of an earlier agent: attaches to supervisors that live, recovers what the dead ones have left.
    async fn find_sessions(self: &Arc<Self>) {
        let directory = supervisors::sessions_directory(&self.state);
        let Ok(entries) = fs::read_dir(&directory) else { return };
        let mut finding = tokio::task::JoinSet::new();
        for entry in entries.flatten() {
            let name = entry.file_name();
            let Some(session_id) = name.to_str().and_then(|name| name.parse::<SessionId>().ok()) else {
                warn!(path = %entry.path().display(), "this is no session: remove it by hand");
                continue;
            };
            let shared = Arc::clone(self);
            finding.spawn(async move { shared.find_session(session_id).await });
        }
        if tokio::time::timeout(FIND_MAX, finding.join_all()).await.is_err() {
            warn!(
                "some supervisors do not answer: their sessions are not known until the agent is started again"
            );
        }
    }

    /// Removes empty control groups that killed agents and supervisors have left. Nobody waits for it.
    fn sweep_groups(&self) {
        let Some(own) = self.starter.cgroup.clone() else { return };
        let (sessions, clock) = (supervisors::sessions_directory(&self.state), Arc::clone(&self.world.clock));
        self.tracker.spawn_blocking(move || {
            let entries = fs::read_dir(sessions).into_iter().flatten().flatten();
            let ids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<SessionId>().ok());
            claim::sweep(&own, &ids.map(session_group_name).collect(), &*clock);
        });
    }

    /// Removes this agent's control group, unless sessions outlive the agent.
    fn leave_group(&self) {
        if let Some(group) = &self.starter.cgroup
            && let Err(error) = fs::remove_dir(group)
        {
            debug!(group = %group.display(), %error, "the control group of this agent stays");
        }
    }

    async fn find_session(self: Arc<Self>, session_id: SessionId) {
        let bare = SessionDirectory::of(&self.state, session_id, None);
        let kept = match bare.kept() {
            Ok(kept) => kept,
            Err(error) => {
                // Half made, when an agent died while it opened the session: nobody has it and nothing runs in it.
                warn!(session = %session_id, %error, "a session without a record is removed");
                if supervisors::find_alive(&bare).await.is_some() {
                    warn!(session = %session_id, "a supervisor lives in it: it ends with its lease");
                    return;
                }
                let removed = tokio::task::spawn_blocking(move || bare.remove());
                if !matches!(removed.await, Ok(Ok(()))) {
                    warn!(session = %session_id, "it could not be removed");
                }
                return;
            }
        };
        let directory = SessionDirectory::of(&self.state, session_id, kept.cgroup.clone());
        let rebooted = kept.boot_id != self.host.boot_id;
        let attached = if rebooted { None } else { self.attach(session_id, &directory).await };
        let found = |lease_left| found(session_id, &kept, lease_left);
        match attached {
            Some((supervised, lease_left)) => {
                info!(session = %session_id, owner = %kept.owner, tasks = supervised.mirror().len(), "session found again");
                self.tell(Event::Found(found(lease_left)));
                if lease_left.is_zero() {
                    self.tell(Event::LeaseExpired { session_id });
                }
                self.fill(session_id, supervised);
            }
            None => {
                let reason = if rebooted { Reason::HostRebooted } else { Reason::SupervisorDied };
                let ended = directory.ended();
                if ended.is_some() {
                    info!(session = %session_id, owner = %kept.owner, "results of an ended session found");
                } else {
                    warn!(session = %session_id, owner = %kept.owner, %reason, "session found without a supervisor");
                    directory.kill_everything().await;
                }
                let orphaned =
                    tokio::task::spawn_blocking(move || Supervised::orphaned(session_id, directory, reason));
                let Ok(supervised) = orphaned.await else { return };
                self.tell(Event::Found(found(Duration::ZERO)));
                self.fill(session_id, supervised);
                match ended {
                    None => self.take_notice(session_id, Notice::Died),
                    Some(ended) if ended.lost => {
                        self.tell(Event::SupervisorDied { session_id });
                        self.remove_at(session_id, ended.results_end());
                    }
                    Some(ended) => {
                        self.tell(Event::LeaseExpired { session_id });
                        self.tell(Event::Settled { session_id });
                        self.remove_at(session_id, ended.results_end());
                    }
                }
            }
        }
    }

    /// Connects to a supervisor that an earlier agent has started, or makes sure that it is dead.
    async fn attach(
        &self,
        session_id: SessionId,
        directory: &SessionDirectory,
    ) -> Option<(Arc<Supervised>, Duration)> {
        let stream = supervisors::find_alive(directory).await?;
        let begun = Supervised::begin(
            session_id,
            directory.clone(),
            stream,
            self.incarnation.clone(),
            self.notices.clone(),
            true,
        );
        match begun.await {
            Ok(begun) => Some(begun),
            Err(error) => {
                error!(session = %session_id, %error, "a supervisor does not answer: its tasks are ended");
                None
            }
        }
    }

    fn fill(&self, session_id: SessionId, supervised: Arc<Supervised>) {
        if self.slot(session_id).set(supervised).is_err() {
            warn!(session = %session_id, "a session was found twice");
        }
    }

    /// A supervisor has told something that concerns the whole agent.
    fn take_notice(self: &Arc<Self>, session_id: SessionId, notice: Notice) {
        match notice {
            Notice::LeaseExpired => {
                info!(session = %session_id, "lease expired");
                self.tell(Event::LeaseExpired { session_id });
            }
            Notice::Settled => {
                self.tell(Event::Settled { session_id });
                self.remove_at(session_id, self.world.clock.since_boot() + limits::EXPIRED_RESULTS_KEPT);
            }
            Notice::Died => {
                self.last_errors
                    .add(&*self.world.clock, &format!("the supervisor of session {session_id} is gone"));
                self.tell(Event::SupervisorDied { session_id });
                let now = self.world.clock.since_boot();
                self.directory(session_id).record_loss(now);
                self.remove_at(session_id, now + limits::EXPIRED_RESULTS_KEPT);
            }
            // Whoever watches the status sees that it has no process any more.
            Notice::Gone => self.status_has_changed(),
        }
    }

    /// Nothing of a session will run any more: what was shipped for it is not held. Its results are kept until a moment since
    /// the start of the host, for a controller that was away.
    fn remove_at(self: &Arc<Self>, session_id: SessionId, end: Duration) {
        let (directory, store) = (self.directory(session_id), self.store.clone());
        self.tracker.spawn_blocking(move || {
            directory.release_blobs();
            store.session_ended();
        });
        let shared = Arc::clone(self);
        self.tracker.spawn(async move {
            tokio::time::sleep(end.saturating_sub(shared.world.clock.since_boot())).await;
            let survivors = shared.close(session_id).await;
            info!(session = %session_id, survivors = survivors.len(), "results of an ended session removed");
        });
    }

    /// Tells the sessions about time, exactly when it matters to them.
    async fn tell_time(self: Arc<Self>) {
        loop {
            let deadline = self.sessions().next_deadline();
            let pause = deadline.map(|at| at.saturating_sub(self.world.clock.since_boot()));
            tokio::select! {
                () = self.deadline_changed.notified() => {}
                () = tokio::time::sleep(pause.unwrap_or(limits::WAIT_MAX)), if pause.is_some() => {
                    self.tell(Event::TimePassed);
                }
            }
        }
    }
}

fn found(session_id: SessionId, kept: &Kept, lease_left: Duration) -> Found {
    let (owner, secret): (Owner, Secret) = (kept.owner.clone(), kept.secret.clone());
    Found {
        session_id,
        secret,
        owner,
        client: kept.client.clone(),
        epoch: kept.epoch,
        lease: kept.lease(),
        lease_left,
        exclusive: kept.exclusive,
        open_time_ns: kept.open_time_ns,
    }
}

/// An open door. Dropping it ends nothing: cancel the token that it was given.
#[derive(Debug)]
pub struct Door {
    shared: Arc<Shared>,
    /// Held for as long as this agent uses the state directory.
    _lock: fs::File,
    notices: mpsc::Receiver<(SessionId, Notice)>,
}

impl Door {
    /// Prepares everything but listening: takes the state directory, finds what an earlier agent has left.
    ///
    /// # Errors
    /// When the state directory cannot be used, or another agent uses it.
    pub async fn open(config: DoorConfig, world: World) -> Result<Self, DoorError> {
        let state_error = |source| DoorError::State { path: config.state.clone(), source };
        status::prepare_state(&config.state).map_err(state_error)?;
        let lock = lock_state(&config.state)?;
        let sessions = supervisors::sessions_directory(&config.state);
        let store = Store::open(config.state.join("blobs"), sessions, config.blobs_bytes_max, world.clone())
            .map_err(|source| DoorError::Blobs { source })?;
        let incarnation = world.ids.token();
        let hierarchies = Hierarchies::find();
        let own = match config.supervisors {
            Supervisors::Processes | Supervisors::Inside => own_group(&hierarchies, &config.state),
            // What contains their trees is not this host.
            Supervisors::Elsewhere(_) => None,
        };
        let (cgroup, claim) = own.unzip();
        let (notices_in, notices) = mpsc::channel(NOTICES_COUNT_MAX);
        let starter = Starter {
            relaunch: config.relaunch,
            base_environment: config.base_environment,
            blobs: config.state.join("blobs"),
            cgroup: cgroup.clone(),
            world: world.clone(),
            incarnation: incarnation.clone(),
            supervisors: config.supervisors,
        };
        let shared = Arc::new(Shared {
            started: world.clock.since_boot(),
            world,
            incarnation,
            host: host::facts(),
            capabilities: v1::Capabilities {
                containment: if cgroup.is_some() { "cgroup-v2" } else { "subreaper" }.to_owned(),
                limits: limits_word(hierarchies.limits_source()).to_owned(),
                python: host::python().map(|path| path.display().to_string()).unwrap_or_default(),
                features: protocol::FEATURES.iter().map(|feature| (*feature).to_owned()).collect(),
            },
            state: config.state,
            store,
            last_errors: LastErrors::default(),
            disk_use: Arc::default(),
            starter,
            sessions: Mutex::new(Sessions::new()),
            deadline_changed: Notify::new(),
            askings: Mutex::default(),
            next_ticket: AtomicU64::new(1),
            supervised: Mutex::default(),
            notices: notices_in,
            status_changed: watched::Sender::new(0),
            tracker: TaskTracker::new(),
            _claim: claim,
        });
        shared.find_sessions().await;
        shared.sweep_groups();
        Ok(Self { shared, _lock: lock, notices })
    }

    /// Serves until `shutdown` is cancelled and the calls that run then have ended, or a moment has passed. Connections come
    /// from the listeners, and from whoever holds the sender that `made_elsewhere` gets.
    ///
    /// # Errors
    /// When the services cannot be served.
    pub async fn serve(
        self,
        listeners: Vec<Listener>,
        made_elsewhere: impl FnOnce(mpsc::Sender<Connection>),
        shutdown: CancellationToken,
    ) -> Result<(), DoorError> {
        let Self { shared, _lock, mut notices } = self;
        let tracker = shared.tracker.clone();
        let (accepted, incoming) = acceptor::accept(listeners, &shutdown, &tracker);
        made_elsewhere(accepted);
        let noticing = {
            let shared = Arc::clone(&shared);
            async move {
                while let Some((session_id, notice)) = notices.recv().await {
                    shared.take_notice(session_id, notice);
                }
            }
        };
        let service = AgentServiceServer::new(Service::new(Arc::clone(&shared)))
            .max_decoding_message_size(limits::BULK_MESSAGE_BYTES_MAX)
            .max_encoding_message_size(limits::BULK_MESSAGE_BYTES_MAX);
        let (health, health_service) = tonic_health::server::health_reporter();
        health.set_serving::<AgentServiceServer<Service>>().await;
        let (reflection, reflection_alpha) = reflection().map_err(DoorError::Reflection)?;
        let serving = pipe::server()
            .layer(identity::AuthoriseLayer)
            .add_service(service)
            .add_service(health_service)
            .add_service(reflection)
            .add_service(reflection_alpha)
            .serve_with_incoming_shutdown(
                ReceiverStream::new(incoming).map(Ok::<_, io::Error>),
                shutdown.clone().cancelled_owned(),
            );
        let ended = async {
            shutdown.cancelled().await;
            tokio::time::sleep(limits::CLOSE_MAX).await;
        };
        let served = tokio::select! {
            served = serving => served.map_err(DoorError::Serve),
            // Watchers never end by themselves.
            () = ended => Ok(()),
            () = noticing => Ok(()),
            () = Arc::clone(&shared).tell_time() => Ok(()),
        };
        shared.leave_group();
        served
    }

    /// Ends every session: for an agent whose one controller is gone.
    pub(crate) fn ending(&self) -> Ending {
        Ending { shared: Arc::clone(&self.shared) }
    }
}

/// Ends all sessions of a door that serves.
#[derive(Debug, Clone)]
pub(crate) struct Ending {
    shared: Arc<Shared>,
}

impl Ending {
    /// Closes every session and waits until all that belongs to them is gone.
    pub(crate) async fn close_all(&self) -> Vec<String> {
        self.shared.tell(Event::DrainBegan { reason: "the agent is ending".to_owned() });
        let sessions: Vec<SessionId> = self.shared.sessions().iter().map(|(id, _)| id).collect();
        let mut survivors = Vec::new();
        for session_id in sessions {
            survivors.extend(self.shared.close(session_id).await);
        }
        self.shared.leave_group();
        survivors
    }
}

/// The control group under which this agent's sessions get theirs: beside others of this host, and the same for the next
/// agent on this state directory. None where trees cannot be contained that way.
fn own_group(hierarchies: &Hierarchies, state: &Path) -> Option<(PathBuf, Claim)> {
    let parent = hierarchies.unified.as_ref()?;
    let state = state.canonicalize().unwrap_or_else(|_| state.to_owned());
    let digest = blake3::hash(state.as_os_str().as_encoded_bytes()).to_hex();
    let group = parent.join(format!("{AGENT_GROUP}{}", &digest[..12]));
    match Claim::make(&group) {
        Ok(claim) => Some((group, claim)),
        Err(error) => {
            warn!(group = %group.display(), %error, "no control group can be made: trees are contained by subreapers");
            None
        }
    }
}

/// How limits are set, as operators see it.
fn limits_word(source: LimitsSource) -> &'static str {
    match source {
        LimitsSource::Unified => "cgroup-v2",
        LimitsSource::Legacy => "cgroup-v1",
        LimitsSource::None => "none",
    }
}

/// Path of a state directory. The system takes 107 bytes for the path of a socket, and a block's needs 69 of them:
/// `/sessions/`, 36 digits, `/sync/`, 12 digits, `.sock`.
const STATE_PATH_BYTES_MAX: usize = 107 - 69;

/// Takes the state directory for this process alone.
fn lock_state(state: &Path) -> Result<fs::File, DoorError> {
    let length = state.as_os_str().len();
    if length > STATE_PATH_BYTES_MAX {
        return Err(DoorError::TooLong { path: state.to_owned(), length });
    }
    let path = state.join("agent.lock");
    let failed = |source| DoorError::State { path: state.to_owned(), source };
    let file =
        fs::OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(&path);
    let mut file = file.map_err(failed)?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => {
            let mut pid = String::new();
            io::Read::read_to_string(&mut file, &mut pid).map_err(failed)?;
            let pid = printable(pid.trim().as_bytes(), 16);
            return Err(DoorError::InUse { path, pid });
        }
        Err(error) => return Err(failed(error.into())),
    }
    file.set_len(0).map_err(failed)?;
    io::Write::write_all(&mut file, std::process::id().to_string().as_bytes()).map_err(failed)?;
    Ok(file)
}

/// Reflection of exactly what is served, in the version that tools speak today and in the one that older ones ask for.
fn reflection() -> Result<
    (
        tonic_reflection::server::v1::ServerReflectionServer<
            impl tonic_reflection::server::v1::ServerReflection,
        >,
        tonic_reflection::server::v1alpha::ServerReflectionServer<
            impl tonic_reflection::server::v1alpha::ServerReflection,
        >,
    ),
    tonic_reflection::server::Error,
> {
    let builder = || {
        let mut builder = tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(millstream_proto::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET);
        for service in SERVED.iter().filter(|service| !service.starts_with("grpc.reflection.")) {
            builder = builder.with_service_name(*service);
        }
        builder
    };
    Ok((builder().build_v1()?, builder().build_v1alpha()?))
}

/// The base environment of blocks on a shared agent: what a program needs to find its way, nothing of the agent's own.
#[must_use]
pub fn base_environment() -> Vec<(String, String)> {
    ["PATH", "HOME", "LANG", "USER", "SHELL", "TZ"]
        .into_iter()
        .filter_map(|name| Some((name.to_owned(), std::env::var(name).ok()?)))
        .collect()
}
