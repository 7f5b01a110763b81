//! The task behind one supervisor: speaks with it over its socket, finds out when it is gone, and cleans up behind one that
//! died.

use std::{
    collections::HashMap,
    io,
    sync::{Arc, PoisonError, atomic::Ordering},
    time::Duration,
};

use millstream_common::{id::SessionId, limits, outcome::Reason, text::printable};
use millstream_proto::{
    supervisor::v1::{
        DoorFrame, DoorHello, RelayAttached, Reply, StartTask, SupervisorFrame, TaskChanged, door_frame,
        supervisor_frame,
    },
    v1,
};
use tokio::{
    net::UnixStream,
    sync::{mpsc, oneshot},
    time::{sleep, timeout},
};
use tracing::{error, info, warn};

use super::{HELLO_MAX, Notice, Outgoing, RelayBatch, Supervised, alive::find_alive};
use crate::{
    door::ledger::Accepted,
    supervisor::wire::{self, FrameReader, FrameWriter, WireError},
};

/// Frames that are written in one go at most.
const BATCH_COUNT: usize = 64;
/// Bytes of relayed frames that wait for a slow controller before its relay is ended: its calls are repeated on the next.
const RELAY_BYTES_MAX: usize = 32 * 1024 * 1024;

/// Name of a program on record.
const PROGRAM_BYTES_MAX: usize = 128;

/// Both directions of a connection to a supervisor.
pub(super) struct Wire {
    reader: FrameReader<tokio::net::unix::OwnedReadHalf>,
    writer: FrameWriter<tokio::net::unix::OwnedWriteHalf>,
}

/// A request that waits for its reply.
struct Pending {
    answer: oneshot::Sender<Reply>,
    starts: Option<Starts>,
}

/// The task that a request starts.
struct Starts {
    /// As it will be known.
    task: TaskChanged,
    /// What runs, in one word.
    program: String,
    /// As whom; empty for the agent's own user.
    user: String,
}

impl Starts {
    fn of(start: &StartTask) -> Self {
        let mut starts = Self {
            task: TaskChanged { task_id: start.task_id.clone(), ..TaskChanged::default() },
            program: String::new(),
            user: String::new(),
        };
        if let Some(spec) = &start.spec {
            starts.task.stream.clone_from(&spec.stream);
            starts.task.block.clone_from(&spec.name);
            starts.user.clone_from(&spec.user);
            let run = spec.phases.iter().find(|phase| phase.phase() == v1::Phase::Run);
            let program = run.and_then(|phase| phase.argv.first()).map_or("", String::as_str);
            starts.program = printable(program.as_bytes(), PROGRAM_BYTES_MAX);
        }
        starts
    }
}

/// The task behind one [`Supervised`].
pub(super) struct Driver {
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
    /// Drives a supervisor; `waiting` is what is to be written to it.
    pub(super) fn new(
        supervised: Arc<Supervised>,
        waiting: mpsc::Receiver<Outgoing>,
        notices: mpsc::Sender<(SessionId, Notice)>,
        incarnation: String,
        reconnects: bool,
    ) -> Self {
        Self {
            supervised,
            waiting,
            notices,
            incarnation,
            reconnects,
            pending: HashMap::new(),
            next_request: 1,
            lease_told: false,
            settled_told: false,
        }
    }

    /// Exchanges the hellos and takes everything over that the supervisor tells.
    pub(super) async fn greet(&mut self, stream: UnixStream) -> Result<(Wire, Duration), WireError> {
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
        self.supervised.mirror().hello(hello.pid, hello.lease_expired);
        for task in hello.tasks {
            self.supervised.take_over(task);
        }
        self.supervised.announce();
        self.tell_lease().await;
        Ok((connected, lease_left))
    }

    pub(super) async fn run(mut self, mut connected: Wire) {
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
                    door_frame::Frame::Start(start) => Some(Starts::of(start)),
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
                self.supervised.take_over(task);
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

    /// Whoever learns that a task was accepted must find it, though its first change may still be on the way; and it is on
    /// record, whether anybody learns of it or not.
    fn know(&self, starts: Option<Starts>, answer: Option<&v1::StartTaskResponse>) {
        let (Some(Starts { mut task, program, user }), Some(answer)) = (starts, answer) else { return };
        if !answer.accepted_by_this_call {
            return;
        }
        self.supervised.page.task_accepted(&Accepted {
            task: &task.task_id,
            stream: &task.stream,
            block: &task.block,
            program: &program,
            user: &user,
        });
        if task.task_id.parse().is_ok_and(|id| self.supervised.mirror().get(id).is_some()) {
            return;
        }
        task.state = answer.state;
        self.supervised.take_over(task);
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
        let mut pause = limits::RECONNECT_PAUSE_MIN;
        loop {
            // Without a word a supervisor is not believed to be dead: its lock decides.
            let stream = find_alive(&self.supervised.directory).await?;
            match self.greet(stream).await {
                Ok((connected, _)) => {
                    info!(session = %self.supervised.session_id, "connected to the supervisor again");
                    return Some(connected);
                }
                Err(error) => {
                    // One that is just ending takes connections for a moment still: that is no news.
                    if pause == limits::RECONNECT_PAUSE_MAX {
                        warn!(session = %self.supervised.session_id, %error, "a supervisor does not answer");
                    }
                    sleep(pause).await;
                    pause = (pause * 2).min(limits::RECONNECT_PAUSE_MAX);
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
            for task in recovered {
                supervised.take_over(task);
            }
        }
        supervised.mirror().supervisor_gone(!ended);
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
