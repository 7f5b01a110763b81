//! The front door: decodes, authorises, asks, encodes; runs no user code.
//!
//! Everything that lasts is with the supervisors and on disk, so that this process can be killed and started again without
//! a block noticing. `Shared` holds what all calls share: the machine of sessions, the supervisors, and facts of the
//! host.

pub mod acceptor;
pub mod admission;
mod finding;
pub mod identity;
mod ledger;
mod log_tail;
mod metrics;
mod opening;
mod refusals;
pub mod reload;
pub mod renewing;
pub(crate) mod service;
mod shares;
pub mod status;
pub(crate) mod store;
pub(crate) mod supervisors;
mod survivors;
#[cfg(test)]
mod tests;
mod upkeep;
pub mod uploads;
pub(crate) mod watch;

use std::{
    collections::BTreeMap,
    fmt, io,
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use millstream_common::{clock::World, id::SessionId, limits, protocol::Build};
use millstream_proto::v1;
use tokio::sync::{Notify, OnceCell, mpsc, oneshot, watch as watched};
use tokio_util::task::TaskTracker;
use tonic::Status;
use tracing::{error, info, warn};

use self::{
    acceptor::Places,
    identity::Peer,
    ledger::{Ledger, Page, SessionEnd, counts::refusal_word},
    renewing::CertificateNote,
    shares::Starts,
    status::{DiskUse, LastErrors},
    store::Store,
    supervisors::{Kept, Notice, SessionDirectory, StartError, Starter, Supervised},
};
pub use self::{
    acceptor::{Connection, Listener},
    admission::Admission,
    ledger::audit::{AuditError, JOURNAL},
    metrics::Metrics,
    opening::{Door, DoorConfig, DoorError, base_environment},
    supervisors::{StartSupervisor, Starting, Supervisors},
};
pub(crate) use self::{
    finding::has_supervisors,
    opening::{Ending, STATE_PATH_BYTES_MAX},
};
use crate::{
    session::{Action, Asking, Event, Key, OpenRefusal, Owner, Sessions, Stage, Ticket},
    supervisor::cgroup::claim::Claim,
};

/// Full names of the services on the agent's port.
pub(crate) const SERVED: &[&str] = &[
    "millstream.v1.AgentService",
    "grpc.health.v1.Health",
    "grpc.reflection.v1.ServerReflection",
    "grpc.reflection.v1alpha.ServerReflection",
];

/// What all calls share.
pub(crate) struct Shared {
    pub(crate) world: World,
    pub(crate) incarnation: String,
    /// What it says of itself.
    pub(crate) build: Build,
    /// Since the start of the host.
    pub(crate) started: Duration,
    pub(crate) host: v1::HostFacts,
    pub(crate) capabilities: v1::Capabilities,
    pub(crate) state: PathBuf,
    pub(crate) store: Store,
    pub(crate) last_errors: LastErrors,
    pub(crate) ledger: Arc<Ledger>,
    pub(crate) disk_use: Arc<DiskUse>,
    starter: Starter,
    sessions: Mutex<Sessions>,
    /// What is kept about the host itself.
    record: Mutex<survivors::Record>,
    /// Wakes the loop that tells the sessions about time.
    deadline_changed: Notify,
    askings: Mutex<BTreeMap<Ticket, oneshot::Sender<Result<Admitted, OpenRefusal>>>>,
    next_ticket: AtomicU64,
    starts: Starts,
    certificate: Arc<CertificateNote>,
    supervised: Mutex<BTreeMap<SessionId, Arc<Slot>>>,
    notices: mpsc::Sender<(SessionId, Notice)>,
    places: Arc<Places>,
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

/// An asking whose caller may go away at any time: what it has, or gets in that moment, is given back.
struct Asked<'a> {
    shared: &'a Shared,
    ticket: Ticket,
    session_id: SessionId,
    answer: oneshot::Receiver<Result<Admitted, OpenRefusal>>,
}

impl Drop for Asked<'_> {
    fn drop(&mut self) {
        // Answers are given under this lock: there is one already, or there will be none.
        let is_open =
            self.shared.askings.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.ticket).is_some();
        if is_open {
            self.shared.tell(Event::Left { ticket: self.ticket });
        } else if let Ok(Ok(Admitted { epoch, resumed: false })) = self.answer.try_recv() {
            // Nobody will start a supervisor for it, and without one no lease ends it.
            self.shared.tell(Event::Abandoned { session_id: self.session_id, epoch });
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
        self.ledger.changes()
    }

    fn status_has_changed(&self) {
        self.ledger.changed();
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
            if let Some(asking) = askings.remove(&ticket) {
                // Whoever asked takes its asking back before it goes.
                let _never: Result<(), _> = asking.send(answer);
            }
        }
        drop(askings);
        self.deadline_changed.notify_one();
        self.status_has_changed();
    }

    /// Opens a session or comes back to one: waits for its turn, and for its supervisor.
    pub(crate) async fn open(self: &Arc<Self>, asking: Asking, peer: &Peer) -> Result<Opened, Status> {
        let ticket = self.next_ticket.fetch_add(1, Ordering::Relaxed);
        let (session_id, lease, exclusive) = (asking.session_id, asking.lease, asking.exclusive);
        let client = asking.client.clone();
        let (give, answer) = oneshot::channel();
        self.askings.lock().unwrap_or_else(PoisonError::into_inner).insert(ticket, give);
        let mut asked = Asked { shared: self, ticket, session_id, answer };
        self.tell(Event::Asked { ticket, asking, wall_ns: self.world.clock.wall_ns() });
        let answered = (&mut asked.answer).await;
        let admitted = answered.map_err(|_| Status::unavailable("the agent is ending: try again"))?;
        drop(asked);
        let admitted = admitted.map_err(|refusal| {
            if let Some(word) = refusal_word(&refusal) {
                self.ledger.session_refused(peer, &client, word, &refusal);
            }
            service::open_refused(&refusal)
        })?;
        // Begun things are finished even when the caller goes: otherwise a session would be open without a supervisor.
        let shared = Arc::clone(self);
        let starting = tokio::spawn(async move {
            let supervised = shared.start(session_id, admitted.epoch, lease).await?;
            supervised.page.opened(admitted.resumed, exclusive);
            Ok::<_, StartError>(supervised)
        });
        let started = starting.await.map_err(|error| Status::internal(error.to_string()))?;
        let supervised = started.map_err(|error| {
            self.last_errors.add(&*self.world.clock, &error.to_string());
            Status::unavailable(error.to_string())
        })?;
        Ok(Opened { epoch: admitted.epoch, resumed: admitted.resumed, supervised })
    }

    /// The supervisor of an admitted session: the one that runs, or a new one. The session's new epoch is on disk before
    /// anybody hears of it.
    async fn start(
        &self,
        session_id: SessionId,
        epoch: u64,
        lease: Duration,
    ) -> Result<Arc<Supervised>, StartError> {
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
                let page = self.page(session_id);
                self.starter.start(session_id, directory.clone(), lease, self.notices.clone(), page).await
            })
            .await;
        match started {
            Ok(supervised) => {
                self.keep(session_id, &directory).map_err(failed)?;
                Ok(Arc::clone(supervised))
            }
            Err(error) => {
                error!(session = %session_id, %error, "a session could not begin");
                // A controller that has come back meanwhile tries for itself, in the same directory.
                let is_ours = self.sessions().get(session_id).is_some_and(|session| session.epoch == epoch);
                if is_ours {
                    self.supervised.lock().unwrap_or_else(PoisonError::into_inner).remove(&session_id);
                    if let Err(error) = directory.remove() {
                        warn!(session = %session_id, %error, "the directory of a session cannot be removed");
                    }
                    self.tell(Event::Abandoned { session_id, epoch });
                }
                Err(error)
            }
        }
    }

    /// What is put on record about a session that is known.
    fn page(&self, session_id: SessionId) -> Page {
        let sessions = self.sessions();
        let (owner, client) = sessions
            .get(session_id)
            .map_or_else(Default::default, |session| (session.owner.to_string(), session.client.clone()));
        self.ledger.page(session_id, owner, &client)
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

    /// A controller gives up a session that it may only have asked for.
    pub(crate) fn withdraw(&self, key: Key, owner: Owner) {
        self.tell(Event::Withdrawn { key, owner });
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
            let was_over = shared
                .sessions()
                .get(session_id)
                .is_some_and(|session| matches!(session.stage, Stage::Expired | Stage::Settled));
            shared.tell(Event::Closing { session_id });
            let survivors = match shared.begun(session_id).await {
                Some(supervised) => {
                    let told = supervised.close().await;
                    shared.look_behind(&supervised, told.clone()).await;
                    // The end of one whose results have aged is on record already.
                    if !was_over {
                        supervised.page.ended(SessionEnd::Closed);
                    }
                    told
                }
                None => Vec::new(),
            };
            shared.supervised.lock().unwrap_or_else(PoisonError::into_inner).remove(&session_id);
            shared.make_space();
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
