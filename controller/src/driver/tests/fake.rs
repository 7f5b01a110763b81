//! An agent that is a script: its service is real gRPC, its tasks are words.

use std::{
    collections::BTreeMap,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use millstream_common::{
    convert, pipe,
    protocol::{Build, Spoken},
};
use millstream_proto::v1::{
    self,
    agent_service_server::{AgentService, AgentServiceServer},
    task_event::Event,
};
use tokio::{net::UnixStream, sync::watch};
use tokio_stream::{Stream, StreamExt as _};
use tonic::{Request, Response, Status, Streaming};

use crate::reach::{DialError, Dialing, Reach};

/// An agent that runs words: `true`, `false`, `hang`, `deaf` (hangs and does not listen), `large` (prints more than comes
/// with the events), `refused`.
#[derive(Debug, Clone, Default)]
pub(super) struct Fake {
    pub(super) shared: Arc<FakeShared>,
}

#[derive(Debug, Default)]
pub(super) struct FakeShared {
    pub(super) state: Mutex<FakeState>,
    /// Changes with every event.
    pub(super) changed: watch::Sender<u64>,
    /// Cuts every connection.
    pub(super) cut: watch::Sender<u64>,
    pub(super) dials: AtomicUsize,
    /// Refuses every dial.
    pub(super) unreachable: AtomicBool,
    pub(super) forgets: AtomicBool,
    /// What it says of itself instead of what this build says.
    pub(super) build: Mutex<Option<Build>>,
    /// Somebody else has the host.
    pub(super) reserved: AtomicBool,
    /// Takes no more of a file than its first piece.
    pub(super) stalls: AtomicBool,
}

#[derive(Debug, Default)]
pub(super) struct FakeState {
    pub(super) epoch: u64,
    pub(super) closed: usize,
    pub(super) released: Vec<String>,
    /// Waiting tasks of each stream, the running one first.
    pub(super) queues: BTreeMap<String, Vec<(String, v1::TaskSpec)>>,
    pub(super) received: Vec<(u32, u32)>,
    /// Starts that came before the one they name as previous: starts may overtake one another on their way.
    pub(super) early: Vec<v1::StartTaskRequest>,
    /// Stream and number of every task that was taken.
    pub(super) taken: Vec<(String, u32)>,
    pub(super) events: Vec<v1::TaskEvent>,
    pub(super) large: Vec<String>,
    /// Digests of the files that came, in the order of their ends.
    pub(super) uploaded: Vec<String>,
}

/// Long enough for a loaded machine, and short enough to wait for its end.
pub(super) const LEASE: Duration = Duration::from_secs(3);
/// What `large` prints: in two pieces, the second by the bulk connection alone.
pub(super) const PIECE: usize = 70_000;

impl Fake {
    pub(super) fn lock(&self) -> std::sync::MutexGuard<'_, FakeState> {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn say(&self, state: &mut FakeState, task: &str, event: Event) {
        state.events.push(v1::TaskEvent { task_id: task.to_owned(), event: Some(event) });
        self.shared.changed.send_modify(|count| *count += 1);
    }

    /// Queues every task whose previous one was taken.
    fn take(&self, state: &mut FakeState) {
        let is_next = |state: &FakeState, early: &v1::StartTaskRequest| {
            let stream = &early.spec.as_ref().expect("checked on receipt").stream;
            early.previous_number == 0 || state.taken.contains(&(stream.clone(), early.previous_number))
        };
        while let Some(index) = state.early.iter().position(|early| is_next(state, early)) {
            let request = state.early.remove(index);
            let spec = request.spec.expect("checked on receipt");
            let stream = spec.stream.clone();
            state.taken.push((stream.clone(), spec.stream_number));
            let queue = state.queues.entry(stream.clone()).or_default();
            queue.push((request.task_id, spec));
            if queue.len() == 1 {
                self.advance(state, &stream);
            }
        }
    }

    /// Begins the first task of a stream, unless it runs or is held.
    fn advance(&self, state: &mut FakeState, stream: &str) {
        while let Some((task, spec)) = state.queues.get(stream).and_then(|queue| queue.first()).cloned() {
            let at = |state| v1::TaskProgress {
                state,
                phase: v1::Phase::Run.into(),
                pid: 1,
                time: Some(convert::timestamp(1_000)),
            };
            if spec.hold {
                return self.say(state, &task, Event::Progress(at(v1::TaskState::Staged.into())));
            }
            self.say(state, &task, Event::Progress(at(v1::TaskState::Running.into())));
            let word = spec.phases[0].argv[0].clone();
            match word.as_str() {
                "true" => self.end(state, stream, 0, v1::OutcomeKind::Passed, Some(0)),
                "false" => self.end(state, stream, 0, v1::OutcomeKind::Failed, Some(1)),
                "large" => {
                    state.large.push(task.clone());
                    self.say(state, &task, Event::Log(chunk(0)));
                    self.say(state, &task, Event::LogContinues(v1::LogContinues { position: 1 }));
                    self.end(state, stream, 0, v1::OutcomeKind::Passed, Some(0));
                }
                word => {
                    self.say(state, &task, Event::Log(text(&format!("{word}\n"))));
                    return;
                }
            }
        }
    }

    fn end(
        &self,
        state: &mut FakeState,
        stream: &str,
        place: usize,
        outcome: v1::OutcomeKind,
        exit_code: Option<i32>,
    ) {
        let Some(queue) = state.queues.get_mut(stream) else { return };
        let (task, _) = queue.remove(place);
        let reason = match outcome {
            v1::OutcomeKind::Stopped => v1::Reason::Stopped,
            v1::OutcomeKind::Cancelled => v1::Reason::Cancelled,
            _ => v1::Reason::Exited,
        };
        let large = state.large.contains(&task);
        let log = v1::LogTotals {
            stdout_bytes: if large { 2 * PIECE as u64 } else { 0 },
            stdout_sha256: "0".repeat(64),
            stderr_sha256: "0".repeat(64),
            end_position: if large { 2 } else { 0 },
            ..Default::default()
        };
        let end = v1::TaskEnd {
            outcome: outcome.into(),
            reason: reason.into(),
            phase: v1::Phase::Run.into(),
            exit_code,
            start_time: Some(convert::timestamp(1_000)),
            end_time: Some(convert::timestamp(2_000)),
            run_duration: Some(convert::duration(Duration::from_millis(5))),
            log: Some(log),
            ..Default::default()
        };
        self.say(state, &task, Event::End(end));
    }

    fn stream_of(state: &FakeState, task: &str) -> Option<String> {
        let has = |queue: &Vec<(String, v1::TaskSpec)>| queue.iter().any(|(id, _)| id == task);
        state.queues.iter().find(|(_, queue)| has(queue)).map(|(stream, _)| stream.clone())
    }
}

fn chunk(position: u64) -> v1::LogChunk {
    let record = v1::LogRecord {
        channel: v1::LogChannel::Stdout.into(),
        offset: position * PIECE as u64,
        read_time: Some(convert::timestamp(1_500)),
        data: vec![b'a' + u8::try_from(position).unwrap(); PIECE].into(),
        skipped_bytes: 0,
    };
    v1::LogChunk { records: vec![record], next_position: position + 1 }
}

fn text(text: &str) -> v1::LogChunk {
    let record = v1::LogRecord {
        channel: v1::LogChannel::Stdout.into(),
        offset: 0,
        read_time: Some(convert::timestamp(1_500)),
        data: text.to_owned().into(),
        skipped_bytes: 0,
    };
    v1::LogChunk { records: vec![record], next_position: 1 }
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl AgentService for Fake {
    type WatchStatusStream = Answers<v1::WatchStatusResponse>;
    type WatchTaskStream = Answers<v1::WatchTaskResponse>;
    type FetchArchiveStream = Answers<v1::FetchArchiveResponse>;
    type RelaySyncStream = Answers<v1::RelaySyncResponse>;
    type ReadLogStream = Answers<v1::ReadLogResponse>;

    async fn get_status(
        &self,
        _: Request<v1::GetStatusRequest>,
    ) -> Result<Response<v1::GetStatusResponse>, Status> {
        Err(Status::unimplemented("not here"))
    }

    async fn watch_status(
        &self,
        _: Request<v1::WatchStatusRequest>,
    ) -> Result<Response<Self::WatchStatusStream>, Status> {
        Err(Status::unimplemented("not here"))
    }

    async fn read_log(
        &self,
        _: Request<v1::ReadLogRequest>,
    ) -> Result<Response<Self::ReadLogStream>, Status> {
        Err(Status::unimplemented("not here"))
    }

    async fn drain(&self, _: Request<v1::DrainRequest>) -> Result<Response<v1::DrainResponse>, Status> {
        Err(Status::unimplemented("not here"))
    }

    async fn undrain(&self, _: Request<v1::UndrainRequest>) -> Result<Response<v1::UndrainResponse>, Status> {
        Err(Status::unimplemented("not here"))
    }

    async fn clean(&self, _: Request<v1::CleanRequest>) -> Result<Response<v1::CleanResponse>, Status> {
        Err(Status::unimplemented("not here"))
    }

    async fn open_session(
        &self,
        request: Request<v1::OpenSessionRequest>,
    ) -> Result<Response<v1::OpenSessionResponse>, Status> {
        let resume = request.get_ref().resume;
        if resume && self.shared.forgets.load(Ordering::SeqCst) {
            return Err(Status::failed_precondition("session unknown"));
        }
        if self.shared.reserved.load(Ordering::SeqCst) {
            return Err(Status::resource_exhausted("the host is reserved by alice (nightly) for 5.0 s"));
        }
        let build = self.shared.build.lock().unwrap().unwrap_or(Build::OURS);
        let spoken = build.spoken;
        let v1::OpenSessionRequest { protocol_min: min, protocol_max: max, version, .. } = request.get_ref();
        let agreed = match spoken.agree(Spoken { min: *min, max: *max, version }) {
            // The oldest of all knows no ranges and goes on.
            _ if spoken.max == 0 => 0,
            agreed => agreed.map_err(|error| Status::failed_precondition(error.to_string()))?,
        };
        let mut state = self.lock();
        state.epoch += 1;
        Ok(Response::new(v1::OpenSessionResponse {
            epoch: state.epoch,
            resumed: resume,
            protocol: agreed,
            version: spoken.version.to_owned(),
            capabilities: Some(v1::Capabilities {
                features: build.features.iter().map(|&feature| feature.to_owned()).collect(),
                ..Default::default()
            }),
            host_time: Some(convert::timestamp(1)),
            ..Default::default()
        }))
    }

    async fn keep_session(
        &self,
        _: Request<v1::KeepSessionRequest>,
    ) -> Result<Response<v1::KeepSessionResponse>, Status> {
        Ok(Response::new(v1::KeepSessionResponse::default()))
    }

    async fn close_session(
        &self,
        _: Request<v1::CloseSessionRequest>,
    ) -> Result<Response<v1::CloseSessionResponse>, Status> {
        let mut state = self.lock();
        state.closed += 1;
        state.queues.clear();
        Ok(Response::new(v1::CloseSessionResponse::default()))
    }

    async fn find_missing_blobs(
        &self,
        request: Request<v1::FindMissingBlobsRequest>,
    ) -> Result<Response<v1::FindMissingBlobsResponse>, Status> {
        Ok(Response::new(v1::FindMissingBlobsResponse { missing_blake3: request.into_inner().blake3 }))
    }

    async fn upload_blob(
        &self,
        request: Request<Streaming<v1::UploadBlobRequest>>,
    ) -> Result<Response<v1::UploadBlobResponse>, Status> {
        let mut pieces = request.into_inner();
        if self.shared.stalls.load(Ordering::SeqCst) {
            pieces.message().await?;
            return std::future::pending().await;
        }
        let first = pieces.message().await?.ok_or_else(|| Status::invalid_argument("an empty upload"))?;
        while pieces.message().await?.is_some() {}
        self.lock().uploaded.push(first.blake3);
        Ok(Response::new(v1::UploadBlobResponse { existed: false }))
    }

    async fn start_task(
        &self,
        request: Request<v1::StartTaskRequest>,
    ) -> Result<Response<v1::StartTaskResponse>, Status> {
        let request = request.into_inner();
        let spec = request.spec.expect("a task has a specification");
        assert_eq!(convert::spec_sha256(&spec), request.spec_sha256);
        if spec.phases[0].argv[0] == "refused" {
            return Err(Status::invalid_argument("spec: refused by name"));
        }
        let mut state = self.lock();
        let known = state.events.iter().any(|event| event.task_id == request.task_id);
        if !known && Self::stream_of(&state, &request.task_id).is_none() {
            state.early.retain(|early| early.task_id != request.task_id);
            state.received.push((spec.stream_number, request.previous_number));
            state.early.push(v1::StartTaskRequest { spec: Some(spec), ..request });
            self.take(&mut state);
        }
        Ok(Response::new(v1::StartTaskResponse::default()))
    }

    async fn watch_task(
        &self,
        request: Request<v1::WatchTaskRequest>,
    ) -> Result<Response<Self::WatchTaskStream>, Status> {
        let request = request.into_inner();
        if !request.task_id.is_empty() {
            // The bulk connection: the second piece, then the end.
            assert_eq!(request.position, 1);
            let state = self.lock();
            let is_end = |event: &&v1::TaskEvent| {
                event.task_id == request.task_id && matches!(event.event, Some(Event::End(_)))
            };
            let end = state.events.iter().find(is_end).cloned().expect("`large` ends at once");
            let log = v1::TaskEvent { task_id: request.task_id, event: Some(Event::Log(chunk(1))) };
            let message = v1::WatchTaskResponse { events: vec![log, end] };
            return Ok(Response::new(Box::pin(tokio_stream::once(Ok(message)))));
        }
        let known: BTreeMap<String, v1::TaskPosition> =
            request.known.into_iter().map(|position| (position.task_id.clone(), position)).collect();
        let fake = self.clone();
        let (sender, receiver) = tokio::sync::mpsc::channel(4);
        tokio::spawn(async move {
            let mut changed = fake.shared.changed.subscribe();
            let mut next = 0;
            loop {
                changed.borrow_and_update();
                let events: Vec<_> = fake.lock().events[next..].to_vec();
                next += events.len();
                let wanted = |event: &v1::TaskEvent| match (known.get(&event.task_id), &event.event) {
                    (Some(known), Some(Event::Log(chunk))) => chunk.next_position > known.position,
                    (Some(known), _) => !known.ended,
                    (None, _) => true,
                };
                let events: Vec<_> = events.into_iter().filter(wanted).collect();
                if !events.is_empty() && sender.send(Ok(v1::WatchTaskResponse { events })).await.is_err() {
                    return;
                }
                tokio::select! {
                    _ = changed.changed() => {}
                    () = sender.closed() => return,
                }
            }
        });
        Ok(Response::new(Box::pin(tokio_stream::wrappers::ReceiverStream::new(receiver))))
    }

    async fn signal_task(
        &self,
        request: Request<v1::SignalTaskRequest>,
    ) -> Result<Response<v1::SignalTaskResponse>, Status> {
        let request = request.into_inner();
        let mut state = self.lock();
        if let Some(stream) = Self::stream_of(&state, &request.task_id) {
            match request.kind() {
                v1::SignalKind::Go => {
                    if let Some(queue) = state.queues.get_mut(&stream) {
                        for (_, spec) in queue.iter_mut().filter(|(task, _)| *task == request.task_id) {
                            spec.hold = false;
                        }
                    }
                    self.advance(&mut state, &stream);
                }
                v1::SignalKind::Stop => {
                    let queue = &state.queues[&stream];
                    let place = queue.iter().position(|(task, _)| *task == request.task_id).expect("found");
                    let runs = place == 0 && !queue[0].1.hold;
                    if runs && queue[0].1.phases[0].argv[0] == "deaf" {
                        return Ok(Response::new(v1::SignalTaskResponse::default()));
                    }
                    let outcome = if runs { v1::OutcomeKind::Stopped } else { v1::OutcomeKind::Cancelled };
                    self.end(&mut state, &stream, place, outcome, None);
                    self.advance(&mut state, &stream);
                }
                _ => {}
            }
        }
        Ok(Response::new(v1::SignalTaskResponse::default()))
    }

    async fn fetch_archive(
        &self,
        _: Request<v1::FetchArchiveRequest>,
    ) -> Result<Response<Self::FetchArchiveStream>, Status> {
        Err(Status::not_found("not here"))
    }

    async fn release_task(
        &self,
        request: Request<v1::ReleaseTaskRequest>,
    ) -> Result<Response<v1::ReleaseTaskResponse>, Status> {
        self.lock().released.extend(request.into_inner().task_ids);
        Ok(Response::new(v1::ReleaseTaskResponse {}))
    }

    async fn relay_sync(
        &self,
        request: Request<Streaming<v1::RelaySyncRequest>>,
    ) -> Result<Response<Self::RelaySyncStream>, Status> {
        let mut frames = request.into_inner();
        let silent = async_stream_until(async move { while let Ok(Some(_)) = frames.message().await {} });
        Ok(Response::new(silent))
    }
}

/// A stream without items that ends when the work does.
fn async_stream_until(work: impl Future<Output = ()> + Send + 'static) -> Answers<v1::RelaySyncResponse> {
    let (sender, receiver) = tokio::sync::mpsc::channel(1);
    tokio::spawn(async move {
        work.await;
        drop(sender);
    });
    Box::pin(tokio_stream::wrappers::ReceiverStream::new(receiver))
}

impl Reach for Fake {
    fn dial(&self) -> Dialing<'_> {
        Box::pin(async {
            self.shared.dials.fetch_add(1, Ordering::SeqCst);
            if self.shared.unreachable.load(Ordering::SeqCst) {
                let source = std::io::Error::from(std::io::ErrorKind::ConnectionRefused);
                return Err(DialError::Connect { address: self.describe(), source });
            }
            let (ours, theirs) = UnixStream::pair().unwrap();
            let mut cut = self.shared.cut.subscribe();
            let (serving, mut forwarded) = UnixStream::pair().unwrap();
            // Between the two: what can be cut.
            tokio::spawn(async move {
                let mut theirs = theirs;
                tokio::select! {
                    _ = tokio::io::copy_bidirectional(&mut theirs, &mut forwarded) => {}
                    _ = cut.changed() => {}
                }
            });
            let service = AgentServiceServer::new(self.clone());
            let incoming =
                tokio_stream::once(Ok::<_, std::io::Error>(serving)).chain(tokio_stream::pending());
            tokio::spawn(pipe::server().add_service(service).serve_with_incoming(incoming));
            Ok(Box::new(ours) as _)
        })
    }

    fn describe(&self) -> String {
        "fake".to_owned()
    }

    fn host(&self) -> String {
        "fakehost".to_owned()
    }
}
