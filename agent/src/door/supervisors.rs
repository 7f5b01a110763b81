//! Keeps hold of the supervisors: starts them, finds those that an earlier agent has started, mirrors what they tell, and
//! cleans up behind those that died.
//!
//! The mirror of a session is all that the door knows of its tasks; bytes of logs and archives stay on disk. Nothing polls:
//! a watcher is woken when its session changes. Nothing here decides about leases or queues, and a supervisor goes on
//! without this room.

mod alive;
mod directory;
mod mirror;
mod relayed;
mod start;

use std::{
    collections::HashMap,
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::Ordering},
    time::Duration,
};

use millstream_common::{
    id::{SessionId, TaskId},
    limits,
    outcome::Reason,
};
use millstream_proto::{
    supervisor::v1::{
        DoorFrame, DoorHello, RelayAttached, RelayFrames, Reply, SupervisorFrame, TaskChanged, door_frame,
        supervisor_frame,
    },
    v1,
};
use tokio::{
    net::UnixStream,
    sync::{OnceCell, mpsc, oneshot, watch},
    time::{sleep, timeout},
};
use tonic::{Code, Status};
use tracing::{error, info, warn};

use self::relayed::RelaySink;
pub use self::start::{StartSupervisor, Starting, Supervisors};
pub(crate) use self::{
    alive::find_alive,
    directory::{Kept, SessionDirectory, sessions_directory},
    mirror::{Mirror, TaskView},
    relayed::RelayBatch,
    start::{StartError, Starter},
};
use crate::supervisor::wire::{self, FrameReader, FrameWriter, WireError};

/// How long a supervisor may take to say hello, or to bind its socket.
const HELLO_MAX: Duration = Duration::from_secs(10);
/// Frames that are written in one go at most.
const BATCH_COUNT: usize = 64;
/// Bytes of relayed frames that wait for a slow controller before its relay is ended: its calls are repeated on the next.
const RELAY_BYTES_MAX: usize = 32 * 1024 * 1024;

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
    /// There is no supervisor any more.
    #[error("session ended: its supervisor is gone; open another")]
    Gone,
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
            RequestError::Gone => Self::failed_precondition(message),
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
    ) -> Result<(Arc<Self>, Duration), WireError> {
        let (outgoing, waiting) = mpsc::channel(limits::SUPERVISOR_FRAMES_COUNT_MAX);
        let supervised = Arc::new(Self {
            session_id,
            directory,
            outgoing,
            mirror: Mutex::new(Mirror::new()),
            changed: watch::Sender::new(0),
            relay: Mutex::default(),
            gone: watch::Sender::new(false),
            closed: OnceCell::new(),
        });
        let mut driver = Driver {
            supervised: Arc::clone(&supervised),
            waiting,
            notices,
            incarnation,
            reconnects,
            pending: HashMap::new(),
            next_request: 1,
            lease_told: false,
            settled_told: false,
        };
        let (connected, lease_left) = driver.greet(stream).await?;
        tokio::spawn(driver.run(connected));
        Ok((supervised, lease_left))
    }

    /// A session without a supervisor, of which only the records on disk are left: its lease is over, or it died with the host
    /// or while no agent was there.
    pub(crate) fn orphaned(session_id: SessionId, directory: SessionDirectory, reason: Reason) -> Arc<Self> {
        let (outgoing, _) = mpsc::channel(1);
        let supervised = Arc::new(Self {
            session_id,
            directory,
            outgoing,
            mirror: Mutex::new(Mirror::new()),
            changed: watch::Sender::new(0),
            relay: Mutex::default(),
            gone: watch::Sender::new(true),
            closed: OnceCell::new(),
        });
        for task in supervised.directory.recover_tasks(reason) {
            supervised.mirror().update(task);
        }
        supervised.mirror().supervisor_gone();
        supervised
    }

    /// The mirror. Held for moments only: nothing is awaited meanwhile.
    pub(crate) fn mirror(&self) -> MutexGuard<'_, Mirror> {
        // What panicked while it held the lock had only read, or had finished its change.
        self.mirror.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes at each change of the mirror.
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Asks the supervisor and waits for its reply.
    ///
    /// # Cancel safety
    /// The request may have been sent; every request may be repeated.
    pub(crate) async fn request(&self, frame: door_frame::Frame) -> Result<Reply, RequestError> {
        let (answer, reply) = oneshot::channel();
        if *self.gone.borrow() {
            return Err(RequestError::Gone);
        }
        self.outgoing.try_send(Outgoing::Request(frame, answer)).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => RequestError::Busy,
            mpsc::error::TrySendError::Closed(_) => RequestError::Gone,
        })?;
        let reply = reply
            .await
            .map_err(|_| if *self.gone.borrow() { RequestError::Gone } else { RequestError::Broken })?;
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
        self.outgoing.send(Outgoing::Tell(frame)).await.map_err(|_| RequestError::Gone)
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
                Err(RequestError::Gone) => break,
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
            Err(RequestError::Gone) => {
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

/// Both directions of a connection to a supervisor.
struct Wire {
    reader: FrameReader<tokio::net::unix::OwnedReadHalf>,
    writer: FrameWriter<tokio::net::unix::OwnedWriteHalf>,
}

/// A request that waits for its reply.
struct Pending {
    answer: oneshot::Sender<Reply>,
    /// The task that it starts, as it will be known.
    starts: Option<TaskChanged>,
}

/// The task behind one [`Supervised`].
struct Driver {
    supervised: Arc<Supervised>,
    waiting: mpsc::Receiver<Outgoing>,
    notices: mpsc::Sender<(SessionId, Notice)>,
    incarnation: String,
    /// Whether a lost connection can be made again: not with a supervisor inside this process.
    reconnects: bool,
    pending: HashMap<u64, Pending>,
    next_request: u64,
    lease_told: bool,
    settled_told: bool,
}

impl Driver {
    /// Exchanges the hellos and takes everything over that the supervisor tells.
    async fn greet(&mut self, stream: UnixStream) -> Result<(Wire, Duration), WireError> {
        let (read, write) = stream.into_split();
        let mut connected = Wire { reader: FrameReader::new(read), writer: FrameWriter::new(write) };
        let hello = DoorHello { protocol: wire::PROTOCOL, incarnation: self.incarnation.clone() };
        let frame = DoorFrame { request_id: 0, frame: Some(door_frame::Frame::Hello(hello)) };
        let exchange = async {
            connected.writer.send(&frame).await?;
            connected.reader.next::<SupervisorFrame>().await
        };
        let answer = timeout(HELLO_MAX, exchange).await.map_err(|_| {
            WireError::Broken(io::Error::new(io::ErrorKind::TimedOut, "the supervisor said no hello"))
        })??;
        let Some(SupervisorFrame { frame: Some(supervisor_frame::Frame::Hello(hello)) }) = answer else {
            let unexpected = io::Error::new(io::ErrorKind::InvalidData, "the supervisor said no hello");
            return Err(WireError::Broken(unexpected));
        };
        let lease_left = if hello.lease_expired {
            Duration::ZERO
        } else {
            let left = hello.lease_left.and_then(|left| Duration::try_from(left).ok());
            left.unwrap_or_default()
        };
        {
            let mut mirror = self.supervised.mirror();
            mirror.hello(hello.pid, hello.lease_expired, hello.tasks);
        }
        self.supervised.announce();
        self.tell_lease().await;
        Ok((connected, lease_left))
    }

    async fn run(mut self, mut connected: Wire) {
        let session = self.supervised.session_id;
        loop {
            match self.serve(&mut connected).await {
                Ok(()) => {}
                Err(error) => warn!(%session, %error, "connection to a supervisor broke"),
            }
            self.forget_connection();
            drop(connected);
            match self.connect_again().await {
                Some(again) => connected = again,
                None => break,
            }
        }
        self.finish().await;
    }

    /// Reads and writes until the supervisor closes the connection or it breaks.
    async fn serve(&mut self, connected: &mut Wire) -> Result<(), WireError> {
        let mut batch = Vec::with_capacity(BATCH_COUNT);
        loop {
            tokio::select! {
                frame = connected.reader.next::<SupervisorFrame>() => match frame? {
                    Some(frame) => self.take_in(frame).await,
                    None => return Ok(()),
                },
                // Only taken up when everything before it has been written: the queue is the only place where it waits.
                count = self.waiting.recv_many(&mut batch, BATCH_COUNT), if connected.writer.pending_bytes() == 0 => {
                    if count == 0 {
                        return Ok(());
                    }
                    for outgoing in batch.drain(..) {
                        let frame = self.number(outgoing);
                        connected.writer.push(&frame)?;
                    }
                }
                // Beside the reading, never before it: both ends may have full pipes.
                written = connected.writer.flush(), if connected.writer.pending_bytes() > 0 => written?,
            }
        }
    }

    fn number(&mut self, outgoing: Outgoing) -> DoorFrame {
        match outgoing {
            Outgoing::Request(frame, answer) => {
                let request_id = self.next_request;
                self.next_request += 1;
                let starts = match &frame {
                    door_frame::Frame::Start(start) => Some(TaskChanged {
                        task_id: start.task_id.clone(),
                        stream: start.spec.as_ref().map_or_else(String::new, |spec| spec.stream.clone()),
                        block: start.spec.as_ref().map_or_else(String::new, |spec| spec.name.clone()),
                        ..TaskChanged::default()
                    }),
                    _ => None,
                };
                self.pending.insert(request_id, Pending { answer, starts });
                DoorFrame { request_id, frame: Some(frame) }
            }
            Outgoing::Tell(frame) => DoorFrame { request_id: 0, frame: Some(frame) },
        }
    }

    async fn take_in(&mut self, frame: SupervisorFrame) {
        match frame.frame {
            Some(supervisor_frame::Frame::Reply(reply)) => {
                if let Some(Pending { answer, starts }) = self.pending.remove(&reply.request_id) {
                    self.know(starts, reply.start.as_ref());
                    // Whoever asked may have gone meanwhile.
                    let _gone: Result<(), Reply> = answer.send(reply);
                }
            }
            Some(supervisor_frame::Frame::Task(task)) => {
                self.supervised.mirror().update(task);
                self.supervised.announce();
                self.tell_lease().await;
            }
            Some(supervisor_frame::Frame::Relay(relayed)) => self.pass_on(relayed.frames),
            Some(supervisor_frame::Frame::LeaseExpired(_)) => {
                self.supervised.mirror().lease_expired();
                self.supervised.announce();
                self.tell_lease().await;
            }
            // A second hello, or something of a newer supervisor that an older door can do without.
            Some(supervisor_frame::Frame::Hello(_)) | None => {}
        }
    }

    /// Whoever learns that a task was accepted must find it, though its first change may still be on the way.
    fn know(&self, starts: Option<TaskChanged>, answer: Option<&v1::StartTaskResponse>) {
        let (Some(mut task), Some(answer)) = (starts, answer) else { return };
        if !answer.accepted_by_this_call {
            return;
        }
        {
            let mut mirror = self.supervised.mirror();
            if task.task_id.parse().is_ok_and(|id| mirror.get(id).is_some()) {
                return;
            }
            task.state = answer.state;
            mirror.update(task);
        }
        self.supervised.announce();
    }

    /// Tells the door once that the lease is over, and once that nothing runs any more after that.
    async fn tell_lease(&mut self) {
        let (expired, settled) = {
            let mirror = self.supervised.mirror();
            (mirror.is_lease_expired(), mirror.all_finished())
        };
        if expired && !std::mem::replace(&mut self.lease_told, true) {
            self.notify(Notice::LeaseExpired).await;
        }
        if expired && settled && !std::mem::replace(&mut self.settled_told, true) {
            self.notify(Notice::Settled).await;
        }
    }

    async fn notify(&self, notice: Notice) {
        // The door has ended: nobody is left to be told.
        let _ended = self.notices.send((self.supervised.session_id, notice)).await;
    }

    /// Passes blocks' frames to the controller that has the relay. A controller that does not read loses the relay: reading
    /// from the supervisor must not wait for it, because replies and lease come the same way.
    fn pass_on(&self, frames: Vec<v1::RelayFrame>) {
        let mut relay = self.supervised.relay.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(sink) = relay.as_ref() else { return };
        let bytes = frames.iter().map(prost::Message::encoded_len).sum();
        let before = sink.waiting_bytes.fetch_add(bytes, Ordering::Relaxed);
        let batch = RelayBatch { frames, bytes, waiting_bytes: Arc::clone(&sink.waiting_bytes) };
        if before + bytes > RELAY_BYTES_MAX || sink.frames.try_send(batch).is_err() {
            warn!(session = %self.supervised.session_id, "the controller does not read its relay: it must take it again");
            *relay = None;
            let frame = door_frame::Frame::RelayAttached(RelayAttached { attached: false });
            if self.supervised.outgoing.try_send(Outgoing::Tell(frame)).is_err() {
                warn!(session = %self.supervised.session_id, "the supervisor was not told that the relay is gone");
            }
        }
    }

    /// Whoever waits on the broken connection asks again; a controller takes its relay again, so that calls are repeated.
    fn forget_connection(&mut self) {
        self.pending.clear();
        *self.supervised.relay.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Connects again, or learns for certain that the supervisor is gone: its lock is free.
    async fn connect_again(&mut self) -> Option<Wire> {
        if !self.reconnects {
            return None;
        }
        loop {
            // Without a word a supervisor is not believed to be dead: its lock decides.
            let stream = find_alive(&self.supervised.directory).await?;
            match self.greet(stream).await {
                Ok((connected, _)) => {
                    info!(session = %self.supervised.session_id, "connected to the supervisor again");
                    return Some(connected);
                }
                Err(error) => {
                    warn!(session = %self.supervised.session_id, %error, "a supervisor does not answer");
                    sleep(limits::RECONNECT_PAUSE_MAX).await;
                }
            }
        }
    }

    /// The supervisor is gone. When neither a door nor the lease made it go, its tasks are ended and what cannot be known is
    /// recorded as lost.
    async fn finish(mut self) {
        let supervised = Arc::clone(&self.supervised);
        let directory = supervised.directory.clone();
        let is_closing = supervised.mirror().is_closing();
        let ended = is_closing || directory.ended().is_some();
        if !ended {
            error!(session = %supervised.session_id, "a supervisor died: its tasks are ended");
            directory.kill_everything().await;
        }
        if !is_closing {
            // It may have ended before it could tell everything.
            let recovering =
                tokio::task::spawn_blocking(move || directory.recover_tasks(Reason::SupervisorDied));
            let recovered = recovering.await.unwrap_or_default();
            let mut mirror = supervised.mirror();
            for task in recovered {
                mirror.update(task);
            }
        }
        supervised.mirror().supervisor_gone();
        supervised.announce();
        supervised.gone.send_replace(true);
        self.waiting.close();
        while self.waiting.try_recv().is_ok() {}
        self.pending.clear();
        if ended && !is_closing {
            self.tell_lease().await;
        }
        self.notify(if ended { Notice::Gone } else { Notice::Died }).await;
    }
}
