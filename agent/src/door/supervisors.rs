//! Keeps hold of the supervisors: starts them, finds those that an earlier agent has started, mirrors what they tell, and
//! cleans up behind those that died.
//!
//! The mirror of a session is all that the door knows of its tasks; bytes of logs and archives stay on disk. Nothing polls:
//! a watcher is woken when its session changes. Nothing here decides about leases or queues, and a supervisor goes on
//! without this room.

mod alive;
mod directory;
mod driver;
mod mirror;
mod relayed;
mod start;

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use millstream_common::{
    id::{SessionId, TaskId},
    limits,
    outcome::Reason,
    protocol::SESSION_LOST,
};
use millstream_proto::{
    supervisor::v1::{RelayAttached, RelayFrames, Reply, TaskChanged, door_frame},
    v1,
};
use tokio::{
    net::UnixStream,
    sync::{OnceCell, mpsc, oneshot, watch},
    time::timeout,
};
use tonic::{Code, Status};
use tracing::{error, warn};

pub use self::start::{StartSupervisor, Starting, Supervisors};
pub(crate) use self::{
    alive::find_alive,
    directory::{Kept, SessionDirectory, sessions_directory, write_whole},
    mirror::{Change, Mirror, TaskView},
    relayed::RelayBatch,
    start::{StartError, Starter},
};
use self::{driver::Driver, relayed::RelaySink};
use super::ledger::Page;
use crate::supervisor::wire::WireError;

/// How long a supervisor may take to say hello, or to bind its socket.
const HELLO_MAX: Duration = Duration::from_secs(10);

/// What the door has to know at once about a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Notice {
    /// The lease is over.
    LeaseExpired,
    /// The lease is over, and every task has ended.
    Settled,
    /// The supervisor is gone without having been told to; its tasks have been ended and recorded.
    Died,
    /// The supervisor is gone because the session was closed or its lease is over.
    Gone,
}

/// Why a request was not answered with success.
#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum RequestError {
    /// The connection to the supervisor broke; it may be there again in a moment.
    #[error("the session's supervisor did not answer: try again")]
    Broken,
    /// There is no supervisor any more: the session is over.
    #[error("session ended: its supervisor is gone; open another")]
    Gone,
    /// There is no supervisor any more: it died.
    #[error("{SESSION_LOST}: its supervisor died, and what ran was ended; open another")]
    Died,
    /// Too many requests wait.
    #[error(
        "{} requests wait for the session's supervisor, which is the limit: try again",
        limits::SUPERVISOR_FRAMES_COUNT_MAX
    )]
    Busy,
    /// It said no.
    #[error("{message}")]
    Refused {
        /// Status code.
        code: Code,
        /// Why.
        message: String,
    },
}

impl From<RequestError> for Status {
    fn from(error: RequestError) -> Self {
        let message = error.to_string();
        match error {
            RequestError::Broken => Self::unavailable(message),
            RequestError::Gone | RequestError::Died => Self::failed_precondition(message),
            RequestError::Busy => Self::resource_exhausted(message),
            RequestError::Refused { code, .. } => Self::new(code, message),
        }
    }
}

/// What is written to a supervisor.
enum Outgoing {
    /// Wants a reply.
    Request(door_frame::Frame, oneshot::Sender<Reply>),
    /// Wants none.
    Tell(door_frame::Frame),
}

/// One session's supervisor, as the door sees it.
pub(crate) struct Supervised {
    /// The session.
    pub(crate) session_id: SessionId,
    /// Where everything of the session lies.
    pub(crate) directory: SessionDirectory,
    /// What is put on record about it.
    pub(crate) page: Page,
    outgoing: mpsc::Sender<Outgoing>,
    mirror: Mutex<Mirror>,
    /// Version of the mirror.
    changed: watch::Sender<u64>,
    relay: Mutex<Option<RelaySink>>,
    /// True once the supervisor is gone and everything about it is on record.
    gone: watch::Sender<bool>,
    /// What closing found; filled once, whoever asked.
    closed: OnceCell<Vec<String>>,
}

impl std::fmt::Debug for Supervised {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Supervised").field("session_id", &self.session_id).finish_non_exhaustive()
    }
}

impl Supervised {
    /// Begins with a connection to a supervisor: exchanges the hellos, then goes on in a task of its own. Returns with it
    /// what is left of the lease.
    pub(crate) async fn begin(
        session_id: SessionId,
        directory: SessionDirectory,
        stream: UnixStream,
        incarnation: String,
        notices: mpsc::Sender<(SessionId, Notice)>,
        reconnects: bool,
        page: Page,
    ) -> Result<(Arc<Self>, Duration), WireError> {
        let (outgoing, waiting) = mpsc::channel(limits::SUPERVISOR_FRAMES_COUNT_MAX);
        let supervised = Arc::new(Self {
            session_id,
            directory,
            page,
            outgoing,
            mirror: Mutex::new(Mirror::new()),
            changed: watch::Sender::new(0),
            relay: Mutex::default(),
            gone: watch::Sender::new(false),
            closed: OnceCell::new(),
        });
        let mut driver = Driver::new(Arc::clone(&supervised), waiting, notices, incarnation, reconnects);
        let (connected, lease_left) = driver.greet(stream).await?;
        tokio::spawn(driver.run(connected));
        Ok((supervised, lease_left))
    }

    /// A session without a supervisor, of which only the records on disk are left: its lease is over, or it died with the host
    /// or while no agent was there.
    pub(crate) fn orphaned(
        session_id: SessionId,
        directory: SessionDirectory,
        reason: Reason,
        page: Page,
    ) -> Arc<Self> {
        let (outgoing, _) = mpsc::channel(1);
        let supervised = Arc::new(Self {
            session_id,
            directory,
            page,
            outgoing,
            mirror: Mutex::new(Mirror::new()),
            changed: watch::Sender::new(0),
            relay: Mutex::default(),
            gone: watch::Sender::new(true),
            closed: OnceCell::new(),
        });
        for task in supervised.directory.recover_tasks(reason) {
            supervised.take_over(task);
        }
        let died = supervised.directory.ended().is_none_or(|ended| ended.lost);
        supervised.mirror().supervisor_gone(died);
        supervised
    }

    /// The mirror. Held for moments only: nothing is awaited meanwhile.
    pub(crate) fn mirror(&self) -> MutexGuard<'_, Mirror> {
        // What panicked while it held the lock had only read, or had finished its change.
        self.mirror.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes over what is told of a task, and puts on record what that means.
    fn take_over(&self, told: TaskChanged) {
        // Our own supervisor has checked the number; anything else is not worth a word.
        let Ok(task) = told.task_id.parse() else { return };
        let change = self.mirror().update(task, told);
        self.page.took_over(task, &change);
    }

    /// Wakes at each change of the mirror.
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Why there is no supervisor any more.
    fn absence(&self) -> RequestError {
        if self.mirror().has_died() { RequestError::Died } else { RequestError::Gone }
    }

    /// Asks the supervisor and waits for its reply.
    ///
    /// # Cancel safety
    /// The request may have been sent; every request may be repeated.
    pub(crate) async fn request(&self, frame: door_frame::Frame) -> Result<Reply, RequestError> {
        let (answer, reply) = oneshot::channel();
        if *self.gone.borrow() {
            return Err(self.absence());
        }
        self.outgoing.try_send(Outgoing::Request(frame, answer)).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => RequestError::Busy,
            mpsc::error::TrySendError::Closed(_) => self.absence(),
        })?;
        let reply = reply
            .await
            .map_err(|_| if *self.gone.borrow() { self.absence() } else { RequestError::Broken })?;
        match Code::from(i32::try_from(reply.code).unwrap_or(i32::MAX)) {
            Code::Ok => Ok(reply),
            code => Err(RequestError::Refused { code, message: reply.message }),
        }
    }

    /// Takes the relay for a controller; who had it before loses it. Frames of blocks come out of the receiver, which ends
    /// when the relay is taken by another or the supervisor is gone.
    pub(crate) async fn attach_relay(&self, number: u64) -> Result<mpsc::Receiver<RelayBatch>, RequestError> {
        let (frames, receiver) = mpsc::channel(limits::RELAY_FRAMES_COUNT_MAX);
        let replaced = {
            let sink = RelaySink { number, frames, waiting_bytes: Arc::default() };
            self.relay.lock().unwrap_or_else(PoisonError::into_inner).replace(sink).is_some()
        };
        if replaced {
            // So that the supervisor repeats the calls that the lost relay may not have delivered.
            self.tell(door_frame::Frame::RelayAttached(RelayAttached { attached: false })).await?;
        }
        self.tell(door_frame::Frame::RelayAttached(RelayAttached { attached: true })).await?;
        Ok(receiver)
    }

    /// Gives the relay back, if this controller still has it.
    pub(crate) fn detach_relay(&self, number: u64) {
        let mut relay = self.relay.lock().unwrap_or_else(PoisonError::into_inner);
        if relay.as_ref().is_some_and(|sink| sink.number == number) {
            *relay = None;
            let frame = door_frame::Frame::RelayAttached(RelayAttached { attached: false });
            // A full queue means that the supervisor does not read: its connection is about to be replaced, and the relay
            // with it.
            if self.outgoing.try_send(Outgoing::Tell(frame)).is_err() {
                warn!(session = %self.session_id, "the supervisor was not told that the relay is gone");
            }
        }
    }

    /// Passes frames of the controller on. Waits when the supervisor is slow, and so does the controller then.
    pub(crate) async fn relay(&self, frames: Vec<v1::RelayFrame>) -> Result<(), RequestError> {
        self.tell(door_frame::Frame::Relay(RelayFrames { frames })).await
    }

    async fn tell(&self, frame: door_frame::Frame) -> Result<(), RequestError> {
        self.outgoing.send(Outgoing::Tell(frame)).await.map_err(|_| self.absence())
    }

    /// Closes the session: everything is ended and removed. Answers with what could not be. Once begun it finishes, even
    /// when nobody waits for it; asked again, it gives the same answer.
    pub(crate) async fn close(self: &Arc<Self>) -> Vec<String> {
        let this = Arc::clone(self);
        let closing =
            tokio::spawn(async move { this.closed.get_or_init(|| this.close_once()).await.clone() });
        closing.await.unwrap_or_else(|error| {
            error!(%error, "closing a session failed");
            vec!["closing failed inside the agent: see its log".to_owned()]
        })
    }

    async fn close_once(&self) -> Vec<String> {
        self.mirror().begin_closing();
        let mut survivors = Vec::new();
        loop {
            let frame = door_frame::Frame::Close(millstream_proto::supervisor::v1::CloseSession {});
            match self.request(frame).await {
                Ok(reply) => {
                    survivors = reply.survivors;
                    break;
                }
                Err(RequestError::Broken) => {}
                Err(RequestError::Busy) => self.outgoing.reserve().await.map_or((), drop),
                Err(RequestError::Gone | RequestError::Died) => break,
                Err(RequestError::Refused { message, .. }) => {
                    survivors.push(message);
                    break;
                }
            }
        }
        // The supervisor is gone as soon as it has answered; its directory goes last.
        let mut gone = self.gone.subscribe();
        if timeout(HELLO_MAX, gone.wait_for(|gone| *gone)).await.is_err() {
            survivors.push(format!("the supervisor of session {} does not end", self.session_id));
        }
        let directory = self.directory.clone();
        match tokio::task::spawn_blocking(move || directory.remove()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => survivors.push(format!("{}: {error}", self.directory.path().display())),
            Err(error) => survivors.push(error.to_string()),
        }
        survivors
    }

    /// Removes finished tasks: by the supervisor, or where it is gone by this hand.
    pub(crate) async fn release(&self, tasks: Vec<TaskId>) -> Result<(), RequestError> {
        let task_ids = tasks.iter().map(ToString::to_string).collect();
        let frame = door_frame::Frame::Release(millstream_proto::supervisor::v1::ReleaseTasks { task_ids });
        match self.request(frame).await {
            Ok(_) => {}
            Err(RequestError::Gone | RequestError::Died) => {
                let (directory, tasks) = (self.directory.clone(), tasks.clone());
                // Whether they went or not is for the removal of the whole session to find.
                drop(tokio::task::spawn_blocking(move || directory.remove_tasks(&tasks)).await);
            }
            Err(error) => return Err(error),
        }
        self.mirror().release(&tasks);
        self.announce();
        Ok(())
    }

    fn announce(&self) {
        let version = self.mirror().version();
        self.changed.send_replace(version);
    }
}
