//! The calls of `AgentService`: checks what came, asks who may, passes on, answers.
//!
//! Every message becomes a value of the domain before anything is done with it, and every call that belongs to a session
//! shows its key first. A handler may be dropped at any point: what must finish is done by the supervisor, or in a task of
//! its own that nobody drops.

mod relay;

use std::{
    collections::HashMap,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use millstream_common::{
    convert::{self, ConvertError},
    id::TaskId,
    limits,
    protocol::{Build, ProtocolError, Spoken},
    spec::{BlobDigest, FileSource, TaskSpec},
    text::printable,
};
use millstream_proto::{
    supervisor::v1::{KeepLease, SignalTask, StartTask, door_frame::Frame},
    v1::{self, agent_service_server::AgentService},
};
use tokio::sync::mpsc;
use tokio_stream::{Stream, StreamExt as _, wrappers::ReceiverStream};
use tonic::{Request, Response, Status, Streaming};
use tracing::info;

use self::relay::Relay;
use super::{
    Shared,
    identity::{Caller, Peer, caller_of, peer_of},
    ledger::counts::VERSION_REFUSAL,
    log_tail,
    supervisors::Supervised,
    survivors::Survivor,
    uploads::{self, ArchivePieces},
    watch,
};
use crate::session::{Access, Asking, Key, KeyRefusal, OpenRefusal, Secret};

/// Longest name that a controller gives itself.
const CLIENT_BYTES_MAX: usize = 256;
/// Tasks of one call to release.
const RELEASE_COUNT_MAX: usize = 1_000;
/// Messages that wait for a slow reader.
const MESSAGES_COUNT_MAX: usize = 4;
/// Shortest time between two messages of a watched status.
const STATUS_PAUSE: Duration = Duration::from_secs(1);

/// A stream of answers.
type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// The service. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Service {
    shared: Arc<Shared>,
    /// Numbers the holders of relays.
    relays: Arc<AtomicU64>,
}

impl Service {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self { shared, relays: Arc::default() }
    }

    /// The lease of the session that a key belongs to.
    fn check(&self, peer: &Peer, key: &Key, access: Access) -> Result<Duration, KeyRefusal> {
        let now = self.shared.world.clock.since_boot();
        let checked = self.shared.sessions().check(key, &peer.caller.owner(), access, now).map(|of| of.lease);
        checked.inspect_err(|refusal| {
            if *refusal == KeyRefusal::NotYours {
                self.shared.ledger.key_refused(peer, key.session_id, refusal);
            }
        })
    }

    /// The session that a key belongs to.
    fn session(&self, peer: &Peer, key: Option<v1::SessionKey>, access: Access) -> Result<Held, Status> {
        let key = key_in(key)?;
        let lease = self.check(peer, &key, access).map_err(|refusal| key_refused(&refusal))?;
        // A session without a supervisor is one that just begins; the opening call has not been answered yet.
        let supervised = self.shared.supervised(key.session_id);
        let supervised =
            supervised.ok_or_else(|| Status::unavailable("the session is not ready yet: try again"))?;
        Ok(Held { key, lease, supervised })
    }
}

/// A session that a call may touch.
struct Held {
    key: Key,
    lease: Duration,
    supervised: Arc<Supervised>,
}

fn invalid(error: &ConvertError) -> Status {
    Status::invalid_argument(error.to_string())
}

pub(super) fn field(name: &str, problem: &str) -> Status {
    Status::invalid_argument(format!("{name}: {problem}"))
}

fn key_in(key: Option<v1::SessionKey>) -> Result<Key, Status> {
    let key = key.ok_or_else(|| field("session", "is missing"))?;
    Ok(Key {
        session_id: convert::id_in("session.session_id", &key.session_id).map_err(|error| invalid(&error))?,
        epoch: key.epoch,
        secret: secret_in("session.secret", &key.secret)?,
    })
}

fn secret_in(name: &str, text: &str) -> Result<Secret, Status> {
    Secret::parse(text).ok_or_else(|| field(name, "is not 32 lower-case hexadecimal digits"))
}

pub(super) fn task_in(name: &str, text: &str) -> Result<TaskId, Status> {
    convert::id_in(name, text).map_err(|error| invalid(&error))
}

fn key_refused(refusal: &KeyRefusal) -> Status {
    let message = refusal.to_string();
    match refusal {
        KeyRefusal::Unknown
        | KeyRefusal::Ended
        | KeyRefusal::Expired { .. }
        | KeyRefusal::Lost
        | KeyRefusal::Superseded { .. } => Status::failed_precondition(message),
        KeyRefusal::NotYours => Status::permission_denied(message),
    }
}

/// The status of a session that is not given.
pub(super) fn open_refused(refusal: &OpenRefusal) -> Status {
    let message = refusal.to_string();
    match refusal {
        OpenRefusal::NotYours => Status::permission_denied(message),
        OpenRefusal::Over(refusal) => key_refused(refusal),
        OpenRefusal::Unknown
        | OpenRefusal::Draining { .. }
        | OpenRefusal::ShareUsedUp { .. }
        | OpenRefusal::Unclean { .. } => Status::failed_precondition(message),
        OpenRefusal::TooMany { .. } | OpenRefusal::Reserved { .. } => Status::resource_exhausted(message),
        OpenRefusal::Superseded => Status::aborted(message),
    }
}

/// The protocol number for a session that is asked for.
fn agreed_with(build: &Build, request: &v1::OpenSessionRequest) -> Result<u32, ProtocolError> {
    let v1::OpenSessionRequest { protocol_min: min, protocol_max: max, version, .. } = request;
    let number = build.spoken.agree(Spoken { min: *min, max: *max, version })?;
    build.require(request.required_features.iter().map(String::as_str), version)?;
    Ok(number)
}

fn asking_in(
    request: v1::OpenSessionRequest,
    caller: &Caller,
    lease_max: Duration,
) -> Result<Asking, Status> {
    if request.client.len() > CLIENT_BYTES_MAX {
        return Err(field("client", &format!("has more than {CLIENT_BYTES_MAX} bytes")));
    }
    let lease = convert::duration_in(
        "lease_duration",
        request.lease_duration.as_ref(),
        limits::LEASE_MIN..=limits::LEASE_MAX,
    );
    let wait = request.wait_duration.as_ref();
    let wait = convert::duration_in("wait_duration", wait, Duration::ZERO..=limits::OPEN_WAIT_MAX);
    Ok(Asking {
        session_id: convert::id_in("session_id", &request.session_id).map_err(|error| invalid(&error))?,
        secret: secret_in("secret", &request.secret)?,
        owner: caller.owner(),
        client: printable(request.client.as_bytes(), CLIENT_BYTES_MAX),
        lease: lease.map_err(|error| invalid(&error))?.unwrap_or(limits::LEASE).min(lease_max),
        exclusive: request.exclusive,
        resume: request.resume,
        patience: wait.map_err(|error| invalid(&error))?.unwrap_or(limits::OPEN_WAIT_MAX),
    })
}

/// Everything of a task that is checked before its supervisor hears of it.
fn start_in(request: v1::StartTaskRequest) -> Result<(StartTask, TaskSpec), Status> {
    let task_id = task_in("task_id", &request.task_id)?;
    let spec = request.spec.ok_or_else(|| field("spec", "is missing"))?;
    if convert::spec_sha256(&spec) != request.spec_sha256 {
        return Err(field("spec_sha256", "is not the digest of `spec` as it arrived: send both again"));
    }
    if request.previous_number >= spec.stream_number.max(1) {
        return Err(field("previous_number", "must be lower than `spec.stream_number`"));
    }
    let checked = TaskSpec::try_from(spec.clone()).map_err(|error| invalid(&error.under("spec")))?;
    convert::secret_files_in(request.secret_files.clone()).map_err(|error| invalid(&error))?;
    let start = StartTask {
        task_id: task_id.to_string(),
        spec: Some(spec),
        spec_sha256: request.spec_sha256,
        secret_files: request.secret_files,
        previous_number: request.previous_number,
    };
    Ok((start, checked))
}

fn signal_in(request: &v1::SignalTaskRequest) -> Result<SignalTask, Status> {
    let kind = request.kind();
    if kind == v1::SignalKind::Unspecified {
        return Err(field("kind", "is not set, or of a newer protocol"));
    }
    if kind == v1::SignalKind::Signal && !(1..=64).contains(&request.signal) {
        return Err(field("signal", "must be between 1 and 64"));
    }
    let reason = request.reason();
    if !matches!(reason, v1::Reason::Unspecified | v1::Reason::Stopped | v1::Reason::TestDeadline) {
        return Err(field("reason", "must be REASON_STOPPED or REASON_TEST_DEADLINE"));
    }
    let grace = request.grace_duration.as_ref();
    convert::duration_in("grace_duration", grace, Duration::ZERO..=limits::GRACE_MAX)
        .map_err(|error| invalid(&error))?;
    Ok(SignalTask {
        task_id: task_in("task_id", &request.task_id)?.to_string(),
        kind: kind.into(),
        signal: request.signal,
        grace_duration: request.grace_duration,
        reason: reason.into(),
    })
}

fn known_in(known: Vec<v1::TaskPosition>) -> Result<HashMap<TaskId, watch::Cursor>, Status> {
    if known.len() > limits::SESSION_TASKS_COUNT_MAX {
        return Err(field("known", &format!("has more than {} entries", limits::SESSION_TASKS_COUNT_MAX)));
    }
    let cursor = |entry: v1::TaskPosition| {
        Ok((task_in("known.task_id", &entry.task_id)?, watch::Cursor::at(entry.position, entry.ended)))
    };
    known.into_iter().map(cursor).collect()
}

/// Says where blobs of a task come from, for the check that they are there.
fn blobs_of(spec: &TaskSpec) -> Vec<BlobDigest> {
    let blob = |file: &millstream_common::spec::ShippedFile| match &file.source {
        FileSource::Blob(digest) => Some(*digest),
        FileSource::Inline(_) | FileSource::HostPath(_) | FileSource::Link(_) => None,
    };
    spec.files.iter().filter_map(blob).collect()
}

#[tonic::async_trait]
impl AgentService for Service {
    async fn get_status(
        &self,
        _: Request<v1::GetStatusRequest>,
    ) -> Result<Response<v1::GetStatusResponse>, Status> {
        Ok(Response::new(v1::GetStatusResponse { status: Some(self.shared.status().await) }))
    }

    type WatchStatusStream = Answers<v1::WatchStatusResponse>;

    async fn watch_status(
        &self,
        _: Request<v1::WatchStatusRequest>,
    ) -> Result<Response<Self::WatchStatusStream>, Status> {
        let (sender, answers) = mpsc::channel(1);
        let shared = Arc::clone(&self.shared);
        tokio::spawn(async move {
            let mut changes = shared.status_changes();
            loop {
                changes.borrow_and_update();
                let status = Some(shared.status().await);
                if sender.send(Ok(v1::WatchStatusResponse { status })).await.is_err() {
                    return;
                }
                tokio::time::sleep(STATUS_PAUSE).await;
                tokio::select! {
                    changed = changes.changed() => if changed.is_err() { return },
                    () = sender.closed() => return,
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(answers))))
    }

    type ReadLogStream = Answers<v1::ReadLogResponse>;

    async fn read_log(
        &self,
        request: Request<v1::ReadLogRequest>,
    ) -> Result<Response<Self::ReadLogStream>, Status> {
        let lines = log_tail::read(&self.shared, &request.into_inner())?;
        Ok(Response::new(Box::pin(ReceiverStream::new(lines))))
    }

    async fn open_session(
        &self,
        request: Request<v1::OpenSessionRequest>,
    ) -> Result<Response<v1::OpenSessionResponse>, Status> {
        let peer = peer_of(&request)?;
        let caller = &peer.caller;
        let request = request.into_inner();
        let protocol = agreed_with(&self.shared.build, &request).map_err(|error| {
            let client = printable(request.client.as_bytes(), CLIENT_BYTES_MAX);
            self.shared.ledger.session_refused(&peer, &client, VERSION_REFUSAL, &error);
            Status::failed_precondition(error.to_string())
        })?;
        let lease_max = self.shared.sessions().bounds().lease_max;
        let wanted = request.lease_duration;
        let asking = asking_in(request, caller, lease_max)?;
        let (session_id, lease) = (asking.session_id, asking.lease);
        let opened = self.shared.open(asking, &peer).await?;
        let known_tasks = if opened.resumed {
            let mirror = opened.supervised.mirror();
            let known = |(id, task): (TaskId, &Arc<super::supervisors::TaskView>)| v1::KnownTask {
                task_id: id.to_string(),
                state: task.state.into(),
            };
            mirror.iter().map(known).collect()
        } else {
            Vec::new()
        };
        if !opened.resumed && wanted.is_some_and(|wanted| wanted != convert::duration(lease)) {
            info!(session = %session_id, %caller, ?lease, "a session was granted a shorter lease than it asked for");
        }
        info!(session = %session_id, %caller, epoch = opened.epoch, resumed = opened.resumed, "session opened");
        Ok(Response::new(v1::OpenSessionResponse {
            epoch: opened.epoch,
            resumed: opened.resumed,
            protocol,
            lease_duration: Some(convert::duration(lease)),
            incarnation: self.shared.incarnation.clone(),
            version: self.shared.build.spoken.version.to_owned(),
            host: Some(self.shared.host.clone()),
            capabilities: Some(self.shared.capabilities.clone()),
            host_time: Some(convert::timestamp(self.shared.world.clock.wall_ns())),
            known_tasks,
        }))
    }

    async fn keep_session(
        &self,
        request: Request<v1::KeepSessionRequest>,
    ) -> Result<Response<v1::KeepSessionResponse>, Status> {
        let peer = peer_of(&request)?;
        let held = self.session(&peer, request.into_inner().session, Access::Change)?;
        let keep = KeepLease { epoch: held.key.epoch, lease_duration: Some(convert::duration(held.lease)) };
        let reply = held.supervised.request(Frame::Keep(keep)).await?;
        self.shared.kept(held.key.session_id);
        let waiting = self.shared.sessions().waiting_count();
        Ok(Response::new(v1::KeepSessionResponse {
            lease_left: reply.lease_left,
            host_time: Some(convert::timestamp(self.shared.world.clock.wall_ns())),
            waiting_count: u32::try_from(waiting).unwrap_or(u32::MAX),
        }))
    }

    async fn close_session(
        &self,
        request: Request<v1::CloseSessionRequest>,
    ) -> Result<Response<v1::CloseSessionResponse>, Status> {
        let peer = peer_of(&request)?;
        let key = key_in(request.into_inner().session)?;
        match self.check(&peer, &key, Access::End) {
            Ok(_) => {}
            // Nothing of it is here: that is what was asked for. It may still be in line.
            Err(KeyRefusal::Unknown | KeyRefusal::Ended) => {
                self.shared.withdraw(key, peer.caller.owner());
                return Ok(Response::new(v1::CloseSessionResponse::default()));
            }
            Err(refusal) => return Err(key_refused(&refusal)),
        }
        let survivors = self.shared.close(key.session_id).await;
        info!(session = %key.session_id, caller = %peer.caller, survivors = survivors.len(), "session closed");
        Ok(Response::new(v1::CloseSessionResponse { survivors }))
    }

    async fn find_missing_blobs(
        &self,
        request: Request<v1::FindMissingBlobsRequest>,
    ) -> Result<Response<v1::FindMissingBlobsResponse>, Status> {
        let peer = peer_of(&request)?;
        let request = request.into_inner();
        let held = self.session(&peer, request.session, Access::Change)?;
        let directory = &held.supervised.directory;
        let missing = uploads::find_missing(&self.shared.store, directory, request.blake3).await;
        let missing_blake3 = missing.map_err(|error| error.status())?;
        Ok(Response::new(v1::FindMissingBlobsResponse { missing_blake3 }))
    }

    async fn upload_blob(
        &self,
        request: Request<Streaming<v1::UploadBlobRequest>>,
    ) -> Result<Response<v1::UploadBlobResponse>, Status> {
        let peer = peer_of(&request)?;
        let mut messages = request.into_inner();
        let mut first =
            messages.message().await?.ok_or_else(|| field("session", "is missing: no message came"))?;
        let held = self.session(&peer, first.session.take(), Access::Change)?;
        let directory = &held.supervised.directory;
        let received = uploads::receive(&self.shared.store, directory, first, messages).await;
        let existed = received.map_err(|error| error.status())?;
        Ok(Response::new(v1::UploadBlobResponse { existed }))
    }

    async fn start_task(
        &self,
        request: Request<v1::StartTaskRequest>,
    ) -> Result<Response<v1::StartTaskResponse>, Status> {
        let peer = peer_of(&request)?;
        let mut request = request.into_inner();
        let held = self.session(&peer, request.session.take(), Access::Change)?;
        let (start, spec) = start_in(request)?;
        // A look at the directory for each: no task has so many that another thread would be worth it.
        let missing = self.shared.store.missing(&held.supervised.directory, &blobs_of(&spec));
        if let Some(digest) = missing.first() {
            let message = format!("blob {digest} is missing: upload it and start the task again");
            return Err(Status::failed_precondition(message));
        }
        let task = start.task_id.clone();
        let task_id = task_in("task_id", &task)?;
        let counted = self.shared.count_start(&peer.caller.owner(), held.key.session_id, task_id);
        counted.map_err(|reason| {
            held.supervised.page.task_refused(&peer, task_id, &reason);
            Status::resource_exhausted(reason)
        })?;
        let reply = held.supervised.request(Frame::Start(start)).await;
        let reply = reply.inspect_err(|_| self.shared.starts.forget(&[task_id]))?;
        let answer =
            reply.start.ok_or_else(|| Status::internal("the supervisor gave no answer to a start"))?;
        Ok(Response::new(answer))
    }

    type WatchTaskStream = Answers<v1::WatchTaskResponse>;

    async fn watch_task(
        &self,
        request: Request<v1::WatchTaskRequest>,
    ) -> Result<Response<Self::WatchTaskStream>, Status> {
        let peer = peer_of(&request)?;
        let request = request.into_inner();
        let held = self.session(&peer, request.session, Access::Read)?;
        if request.task_id.is_empty() {
            let known = known_in(request.known)?;
            // The stream of all tasks is how a controller holds its session.
            let holder = self.shared.hold(held.key.session_id);
            let events = ReceiverStream::new(watch::session(held.supervised, known)).map(move |event| {
                let _holds = &holder;
                event
            });
            return Ok(Response::new(Box::pin(events)));
        }
        let task = task_in("task_id", &request.task_id)?;
        if held.supervised.mirror().get(task).is_none() {
            return Err(unknown_task(task));
        }
        let events = watch::task(held.supervised, task, request.position);
        Ok(Response::new(Box::pin(ReceiverStream::new(events))))
    }

    async fn signal_task(
        &self,
        request: Request<v1::SignalTaskRequest>,
    ) -> Result<Response<v1::SignalTaskResponse>, Status> {
        let peer = peer_of(&request)?;
        let mut request = request.into_inner();
        let held = self.session(&peer, request.session.take(), Access::Change)?;
        let signal = signal_in(&request)?;
        let reply = held.supervised.request(Frame::Signal(signal)).await?;
        Ok(Response::new(v1::SignalTaskResponse { state: reply.state }))
    }

    type FetchArchiveStream = Answers<v1::FetchArchiveResponse>;

    async fn fetch_archive(
        &self,
        request: Request<v1::FetchArchiveRequest>,
    ) -> Result<Response<Self::FetchArchiveStream>, Status> {
        let peer = peer_of(&request)?;
        let request = request.into_inner();
        let held = self.session(&peer, request.session, Access::Read)?;
        let task = task_in("task_id", &request.task_id)?;
        let view = held.supervised.mirror().get(task).cloned().ok_or_else(|| unknown_task(task))?;
        let end = view.end.as_ref().ok_or_else(|| {
            Status::failed_precondition(format!(
                "task {task} is not finished: fetch its archive after its end"
            ))
        })?;
        let archive = end.archive.as_ref();
        let archive = archive.ok_or_else(|| Status::not_found(format!("task {task} left no results")))?;
        if request.offset > archive.size_bytes {
            let problem = format!("is beyond the {} bytes of the archive", archive.size_bytes);
            return Err(field("offset", &problem));
        }
        let path = held.supervised.directory.archive(task);
        let pieces = ArchivePieces::open(&path, request.offset).await.map_err(|error| error.status())?;
        let (sender, answers) = mpsc::channel(MESSAGES_COUNT_MAX);
        tokio::spawn(hand_out(pieces, sender));
        Ok(Response::new(Box::pin(ReceiverStream::new(answers))))
    }

    async fn release_task(
        &self,
        request: Request<v1::ReleaseTaskRequest>,
    ) -> Result<Response<v1::ReleaseTaskResponse>, Status> {
        let peer = peer_of(&request)?;
        let request = request.into_inner();
        let held = self.session(&peer, request.session, Access::Read)?;
        if request.task_ids.len() > RELEASE_COUNT_MAX {
            return Err(field("task_ids", &format!("has more than {RELEASE_COUNT_MAX} entries")));
        }
        let mut tasks = Vec::with_capacity(request.task_ids.len());
        for text in &request.task_ids {
            let task = task_in("task_ids", text)?;
            match held.supervised.mirror().get(task) {
                Some(view) if !view.is_finished() => {
                    let message = format!("task {task} is not finished: stop it first");
                    return Err(Status::failed_precondition(message));
                }
                Some(_) => tasks.push(task),
                // Released before.
                None => {}
            }
        }
        if !tasks.is_empty() {
            self.shared.starts.forget(&tasks);
            held.supervised.release(tasks).await?;
        }
        Ok(Response::new(v1::ReleaseTaskResponse {}))
    }

    async fn drain(&self, request: Request<v1::DrainRequest>) -> Result<Response<v1::DrainResponse>, Status> {
        let caller = caller_of(&request)?;
        let sessions_count = self.shared.drain(&request.into_inner().reason, &caller)?;
        Ok(Response::new(v1::DrainResponse { sessions_count }))
    }

    async fn undrain(
        &self,
        request: Request<v1::UndrainRequest>,
    ) -> Result<Response<v1::UndrainResponse>, Status> {
        let was_draining = self.shared.undrain(&caller_of(&request)?)?;
        Ok(Response::new(v1::UndrainResponse { was_draining }))
    }

    async fn clean(&self, request: Request<v1::CleanRequest>) -> Result<Response<v1::CleanResponse>, Status> {
        let caller = caller_of(&request)?;
        let left = self.shared.clean(request.into_inner().force, &caller).await?;
        Ok(Response::new(v1::CleanResponse { survivors: left.iter().map(Survivor::status).collect() }))
    }

    type RelaySyncStream = Answers<v1::RelaySyncResponse>;

    async fn relay_sync(
        &self,
        request: Request<Streaming<v1::RelaySyncRequest>>,
    ) -> Result<Response<Self::RelaySyncStream>, Status> {
        let peer = peer_of(&request)?;
        let mut messages = request.into_inner();
        let first =
            messages.message().await?.ok_or_else(|| field("session", "is missing: no message came"))?;
        let held = self.session(&peer, first.session, Access::Change)?;
        let number = self.relays.fetch_add(1, Ordering::Relaxed);
        let batches = held.supervised.attach_relay(number).await?;
        let relay = Relay { number, supervised: held.supervised, session_id: held.key.session_id };
        let (sender, answers) = mpsc::channel(MESSAGES_COUNT_MAX);
        tokio::spawn(relay.run(first.frames, messages, batches, sender));
        Ok(Response::new(Box::pin(ReceiverStream::new(answers))))
    }
}

/// Sends an archive piece by piece, as fast as it is taken.
async fn hand_out(mut pieces: ArchivePieces, sender: mpsc::Sender<Result<v1::FetchArchiveResponse, Status>>) {
    loop {
        let message = match pieces.next().await {
            Ok(Some(data)) => Ok(v1::FetchArchiveResponse { data }),
            Ok(None) => return,
            Err(error) => Err(error.status()),
        };
        let last = message.is_err();
        if sender.send(message).await.is_err() || last {
            return;
        }
    }
}

pub(super) fn unknown_task(task: TaskId) -> Status {
    Status::not_found(format!("task {task} is not known here: it was never started, or it was released"))
}
