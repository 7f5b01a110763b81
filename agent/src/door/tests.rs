//! The whole agent behind one pipe: door, supervisor inside, real processes.

use std::{collections::BTreeMap, path::Path, sync::Arc, time::Duration};

use millstream_common::{
    clock::{Clock, Ids as _, SystemClock, SystemIds, World},
    convert, limits,
    pipe::{BoxedPipe, endpoint_channel},
    protocol::Build,
    spec::BlobDigest,
    tls::{Identity, Role},
};
use millstream_proto::v1::{
    self, agent_service_client::AgentServiceClient, task_event::Event as TaskEventKind,
};
use tokio::{
    io::duplex,
    sync::{mpsc, oneshot},
    time::timeout,
};
use tokio_util::sync::CancellationToken;
use tonic::{Code, transport::Channel};

mod log;
mod records;
mod upkeep;
mod waiting;

use super::{Connection, Door, DoorConfig, DoorError, Shared, Supervisors, identity::Caller};
use crate::{entry::tests::this_test_binary, session::Bounds};

/// Small enough to be filled.
const BLOBS_BYTES_MAX: u64 = 300;
/// No step takes longer on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(30);

struct Agent {
    connections: mpsc::Sender<Connection>,
    shared: Arc<Shared>,
    shutdown: CancellationToken,
    serving: tokio::task::JoinHandle<Result<(), DoorError>>,
}

fn config(state: &Path, inside: bool) -> DoorConfig {
    DoorConfig {
        state: state.to_owned(),
        relaunch: this_test_binary(),
        base_environment: vec![("PATH".to_owned(), std::env::var("PATH").unwrap())],
        supervisors: if inside { Supervisors::Inside } else { Supervisors::Processes },
        blobs_bytes_max: BLOBS_BYTES_MAX,
        bounds: Bounds::default(),
        build: Build::OURS,
        audit: None,
    }
}

impl Agent {
    async fn start(state: &Path, inside: bool) -> Self {
        Self::start_in(World::system(), state, inside).await
    }

    async fn start_configured(config: DoorConfig) -> Self {
        Self::of(Door::open(config, World::system()).await.unwrap()).await
    }

    async fn start_in(world: World, state: &Path, inside: bool) -> Self {
        Self::of(Door::open(config(state, inside), world).await.unwrap()).await
    }

    async fn of(door: Door) -> Self {
        let shared = Arc::clone(&door.shared);
        let shutdown = CancellationToken::new();
        let (give, connections) = oneshot::channel();
        let serving = tokio::spawn(door.serve(
            Vec::new(),
            move |connections| give.send(connections).unwrap(),
            shutdown.clone(),
        ));
        Self { connections: connections.await.unwrap(), shared, shutdown, serving }
    }

    async fn client(&self, caller: Caller) -> AgentServiceClient<Channel> {
        let (near, far) = duplex(256 * 1024);
        self.connections.send(Connection::from_pipe(Box::new(far), caller)).await.unwrap();
        let channel = endpoint_channel(|| async { Ok(Box::new(near) as BoxedPipe) }).await.unwrap();
        AgentServiceClient::new(channel)
    }

    async fn controller(&self) -> Controller {
        let identity = Identity::new(Role::Controller, "alice").unwrap();
        let client = self.client(Caller::Certified(identity)).await;
        Controller { client, key: v1::SessionKey::default() }
    }

    async fn end(self) {
        self.shutdown.cancel();
        self.serving.await.unwrap().unwrap();
    }
}

/// The clocks of this host when results that are kept now have aged.
#[derive(Debug)]
struct Later(SystemClock);

impl Clock for Later {
    fn now(&self) -> tokio::time::Instant {
        self.0.now()
    }

    fn since_boot(&self) -> Duration {
        self.0.since_boot() + limits::EXPIRED_RESULTS_KEPT
    }

    fn wall_ns(&self) -> u64 {
        self.0.wall_ns()
    }
}

struct Controller {
    client: AgentServiceClient<Channel>,
    key: v1::SessionKey,
}

fn opening() -> v1::OpenSessionRequest {
    v1::OpenSessionRequest {
        session_id: SystemIds.session_id().to_string(),
        secret: SystemIds.token(),
        protocol_min: 1,
        protocol_max: 1,
        client: "a test".to_owned(),
        ..v1::OpenSessionRequest::default()
    }
}

fn spec(number: u32, script: &str) -> v1::TaskSpec {
    let argv = ["sh", "-c", script].map(str::to_owned).into();
    v1::TaskSpec {
        stream: "s".to_owned(),
        name: "b".to_owned(),
        stream_number: number,
        test_number: number,
        phases: vec![v1::PhaseSpec { phase: v1::Phase::Run.into(), argv, ..v1::PhaseSpec::default() }],
        expectation: v1::Expectation::Pass.into(),
        failure_policy: v1::FailurePolicy::Continue.into(),
        ..v1::TaskSpec::default()
    }
}

impl Controller {
    async fn open(&mut self, request: v1::OpenSessionRequest) -> v1::OpenSessionResponse {
        let opened = self.client.open_session(request.clone()).await.unwrap().into_inner();
        self.key =
            v1::SessionKey { session_id: request.session_id, epoch: opened.epoch, secret: request.secret };
        opened
    }

    fn start_request(&self, spec: v1::TaskSpec) -> v1::StartTaskRequest {
        v1::StartTaskRequest {
            session: Some(self.key.clone()),
            task_id: SystemIds.task_id().to_string(),
            spec_sha256: convert::spec_sha256(&spec),
            previous_number: spec.stream_number - 1,
            spec: Some(spec),
            secret_files: Vec::new(),
        }
    }

    async fn start(&mut self, spec: v1::TaskSpec) -> String {
        let request = self.start_request(spec);
        let task = request.task_id.clone();
        let answer = self.client.start_task(request).await.unwrap().into_inner();
        assert!(answer.accepted_by_this_call);
        task
    }

    async fn watch(&mut self, task_id: &str, position: u64) -> tonic::Streaming<v1::WatchTaskResponse> {
        let request = v1::WatchTaskRequest {
            session: Some(self.key.clone()),
            task_id: task_id.to_owned(),
            position,
            known: Vec::new(),
        };
        self.client.watch_task(request).await.unwrap().into_inner()
    }

    /// Reads events until this many tasks have ended.
    async fn ends(&mut self, task_id: &str, count: usize) -> Seen {
        let mut events = self.watch(task_id, 0).await;
        let mut seen = Seen::default();
        while seen.ends.len() < count {
            let message = timeout(PATIENCE, events.message()).await.unwrap().unwrap().unwrap();
            seen.take(message);
        }
        seen
    }

    /// Uploads a blob of 200 equal bytes; tells whether it was there already.
    async fn upload(&mut self, byte: u8) -> Result<bool, tonic::Status> {
        let content = [byte; 200];
        let first = v1::UploadBlobRequest {
            session: Some(self.key.clone()),
            blake3: BlobDigest::of(&content).to_string(),
            size_bytes: 200,
            data: content[..100].to_vec().into(),
        };
        let rest = v1::UploadBlobRequest { data: content[100..].to_vec().into(), ..Default::default() };
        let answer = self.client.upload_blob(tokio_stream::iter([first, rest])).await?;
        Ok(answer.into_inner().existed)
    }

    /// Everything that a task has left is served.
    async fn check_kept(&mut self, task: &str) {
        let seen = self.ends(task, 1).await;
        assert_eq!(seen.output[task], b"kept\n");
        let request = v1::FetchArchiveRequest {
            session: Some(self.key.clone()),
            task_id: task.to_owned(),
            ..v1::FetchArchiveRequest::default()
        };
        let mut pieces = self.client.fetch_archive(request).await.unwrap().into_inner();
        let mut length = 0;
        while let Some(piece) = timeout(PATIENCE, pieces.message()).await.unwrap().unwrap() {
            length += piece.data.len() as u64;
        }
        assert_eq!(length, seen.ends[task].archive.as_ref().unwrap().size_bytes);
    }

    async fn close(&mut self) -> Vec<String> {
        let request = v1::CloseSessionRequest { session: Some(self.key.clone()) };
        self.client.close_session(request).await.unwrap().into_inner().survivors
    }
}

#[derive(Default)]
struct Seen {
    output: BTreeMap<String, Vec<u8>>,
    continues: BTreeMap<String, u64>,
    ends: BTreeMap<String, v1::TaskEnd>,
    order: Vec<String>,
}

impl Seen {
    fn take(&mut self, message: v1::WatchTaskResponse) {
        for event in message.events {
            assert!(!self.ends.contains_key(&event.task_id), "something came after the end");
            match event.event.unwrap() {
                TaskEventKind::Log(chunk) => {
                    let output = self.output.entry(event.task_id).or_default();
                    let stdout = chunk.records.iter().filter(|r| r.channel() == v1::LogChannel::Stdout);
                    stdout.for_each(|record| output.extend_from_slice(&record.data));
                }
                TaskEventKind::LogContinues(continues) => {
                    self.continues.insert(event.task_id, continues.position);
                }
                TaskEventKind::End(end) => {
                    self.order.push(event.task_id.clone());
                    self.ends.insert(event.task_id, end);
                }
                TaskEventKind::Progress(_) => {}
            }
        }
    }
}

#[tokio::test]
async fn a_task_runs_its_output_comes_before_its_end_and_closing_leaves_nothing() {
    let state = tempfile::tempdir().unwrap();
    let agent = Agent::start(state.path(), true).await;
    let mut controller = agent.controller().await;
    controller.open(opening()).await;
    let task = controller.start(spec(1, "echo hello; echo kept > \"$MILLSTREAM_OUTPUT/file\"; exit 3")).await;
    let seen = controller.ends("", 1).await;
    let end = &seen.ends[&task];
    assert_eq!((end.outcome(), end.exit_code), (v1::OutcomeKind::Failed, Some(3)), "{end:?}");
    assert_eq!(seen.output[&task], b"hello\n");
    assert!(!end.archive.as_ref().unwrap().inline.is_empty(), "small results ride with the end");
    assert_eq!(controller.close().await, [] as [&str; 0]);
    assert_eq!(std::fs::read_dir(state.path().join("sessions")).unwrap().count(), 0);
    // Closing again succeeds: nothing of it is here.
    assert_eq!(controller.close().await, [] as [&str; 0]);
    agent.end().await;
}

#[tokio::test]
async fn a_long_log_continues_on_a_stream_of_its_own_and_resumes_anywhere() {
    let state = tempfile::tempdir().unwrap();
    let agent = Agent::start(state.path(), true).await;
    let mut controller = agent.controller().await;
    controller.open(opening()).await;
    let task = controller.start(spec(1, "seq 1 400000")).await;
    let expected: String = (1..=400_000).map(|n| format!("{n}\n")).collect();
    let seen = controller.ends("", 1).await;
    let inline = seen.output.get(&task).map_or(0, Vec::len);
    assert!(inline <= 64 * 1024 && seen.continues.contains_key(&task), "{inline} bytes");
    let whole = controller.ends(&task, 1).await;
    assert!(whole.output[&task] == expected.as_bytes(), "{} bytes", whole.output[&task].len());
    // From where the short stream stopped.
    let mut rest = Seen::default();
    let mut events = controller.watch(&task, seen.continues[&task]).await;
    while let Some(message) = timeout(PATIENCE, events.message()).await.unwrap().unwrap() {
        rest.take(message);
    }
    assert!(rest.output[&task] == expected.as_bytes()[inline..]);
    controller.close().await;
    agent.end().await;
}

#[tokio::test]
async fn a_start_that_is_repeated_starts_nothing_and_another_spec_is_refused() {
    let state = tempfile::tempdir().unwrap();
    let agent = Agent::start(state.path(), true).await;
    let mut controller = agent.controller().await;
    controller.open(opening()).await;
    let request = controller.start_request(spec(1, "echo once"));
    assert!(controller.client.start_task(request.clone()).await.unwrap().into_inner().accepted_by_this_call);
    assert!(!controller.client.start_task(request.clone()).await.unwrap().into_inner().accepted_by_this_call);
    let mut other = controller.start_request(spec(1, "echo twice"));
    other.task_id = request.task_id.clone();
    assert_eq!(controller.client.start_task(other).await.unwrap_err().code(), Code::AlreadyExists);
    let mut forged = controller.start_request(spec(2, "true"));
    forged.spec_sha256 = "0".repeat(64);
    let refused = controller.client.start_task(forged).await.unwrap_err();
    assert!(refused.code() == Code::InvalidArgument && refused.message().starts_with("spec_sha256:"));
    let seen = controller.ends(&request.task_id, 1).await;
    assert_eq!(seen.output[&request.task_id], b"once\n");
    controller.close().await;
    agent.end().await;
}

#[tokio::test]
async fn who_may_do_what_is_decided_before_anything_is_done() {
    let state = tempfile::tempdir().unwrap();
    let agent = Agent::start(state.path(), true).await;
    let certified = |role, name| Caller::Certified(Identity::new(role, name).unwrap());
    let mut operator = agent.client(certified(Role::Operator, "olga")).await;
    assert!(operator.get_status(v1::GetStatusRequest {}).await.is_ok());
    assert_eq!(operator.open_session(opening()).await.unwrap_err().code(), Code::PermissionDenied);
    let mut stolen = agent.client(certified(Role::Agent, "h1")).await;
    assert_eq!(stolen.get_status(v1::GetStatusRequest {}).await.unwrap_err().code(), Code::PermissionDenied);
    let mut controller = agent.controller().await;
    controller.open(opening()).await;
    let mut other = agent.client(certified(Role::Controller, "bob")).await;
    let theft = v1::KeepSessionRequest { session: Some(controller.key.clone()) };
    assert_eq!(other.keep_session(theft.clone()).await.unwrap_err().code(), Code::PermissionDenied);
    assert!(controller.client.keep_session(theft).await.is_ok());
    controller.close().await;
    agent.end().await;
}

#[tokio::test]
async fn coming_back_needs_the_secret_and_makes_the_older_epoch_worthless() {
    let state = tempfile::tempdir().unwrap();
    let agent = Agent::start(state.path(), true).await;
    let mut controller = agent.controller().await;
    let request = opening();
    controller.open(request.clone()).await;
    let old = controller.key.clone();
    let again = controller.open(v1::OpenSessionRequest { resume: true, ..request }).await;
    assert!(again.resumed && again.epoch > old.epoch);
    let late = v1::KeepSessionRequest { session: Some(old) };
    let refused = controller.client.keep_session(late).await.unwrap_err();
    assert!(refused.message().contains("epoch superseded"), "{refused:?}");
    let newer = v1::OpenSessionRequest { protocol_min: 7, protocol_max: 9, ..opening() };
    let refused = controller.client.open_session(newer).await.unwrap_err();
    assert!(refused.message().ends_with("update the agent"), "{refused:?}");
    controller.close().await;
    agent.end().await;
}

/// An agent that can crash: it has a runtime of its own, which is taken from under it.
async fn start_to_crash(state: &Path) -> (Agent, tokio::runtime::Runtime) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let state = state.to_owned();
    let agent = runtime.spawn(async move { Agent::start(&state, false).await }).await.unwrap();
    (agent, runtime)
}

#[tokio::test]
async fn a_task_does_not_notice_that_the_agent_was_killed() {
    let state = tempfile::tempdir().unwrap();
    let fifo = state.path().join("go");
    rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, rustix::fs::Mode::from_raw_mode(0o600)).unwrap();
    let (agent, runtime) = start_to_crash(state.path()).await;
    let mut controller = agent.controller().await;
    let request = opening();
    controller.open(request.clone()).await;
    // Runs until somebody writes.
    let task = controller
        .start(spec(1, &format!("echo before; read line < '{}'; echo $line", fifo.display())))
        .await;
    let mut events = controller.watch(&task, 0).await;
    let mut seen = Seen::default();
    while seen.output.get(&task).is_none_or(|output| output != b"before\n") {
        seen.take(timeout(PATIENCE, events.message()).await.unwrap().unwrap().unwrap());
    }
    drop((events, controller));
    tokio::task::spawn_blocking(move || runtime.shutdown_timeout(PATIENCE)).await.unwrap();
    drop(agent);

    let agent = Agent::start(state.path(), false).await;
    let mut controller = agent.controller().await;
    let again = controller.open(v1::OpenSessionRequest { resume: true, ..request }).await;
    assert!(again.resumed);
    assert_eq!(again.known_tasks.len(), 1);
    assert_eq!(again.known_tasks[0].state(), v1::TaskState::Running);
    let path = fifo.clone();
    tokio::task::spawn_blocking(move || std::fs::write(path, "after\n")).await.unwrap().unwrap();
    let seen = controller.ends(&task, 1).await;
    assert_eq!(seen.output[&task], b"before\nafter\n");
    assert_eq!(seen.ends[&task].outcome(), v1::OutcomeKind::Passed);
    assert_eq!(controller.close().await, [] as [&str; 0]);
    agent.end().await;
}

#[tokio::test]
async fn a_supervisor_that_dies_takes_its_tasks_along_and_they_are_reported_as_lost() {
    let state = tempfile::tempdir().unwrap();
    let agent = Agent::start(state.path(), false).await;
    let mut controller = agent.controller().await;
    controller.open(opening()).await;
    let done = controller.start(spec(1, "echo done")).await;
    let seen = controller.ends("", 1).await;
    assert_eq!(seen.ends[&done].outcome(), v1::OutcomeKind::Passed);
    let running = controller.start(spec(2, "echo $$; exec tail -f /dev/null")).await;
    let mut events = controller.watch(&running, 0).await;
    let mut seen = Seen::default();
    while seen.output.get(&running).is_none_or(|output| !output.ends_with(b"\n")) {
        seen.take(timeout(PATIENCE, events.message()).await.unwrap().unwrap().unwrap());
    }
    let pid: i32 = String::from_utf8_lossy(&seen.output[&running]).trim().parse().unwrap();
    let status =
        controller.client.get_status(v1::GetStatusRequest {}).await.unwrap().into_inner().status.unwrap();
    let supervisor = i32::try_from(status.sessions[0].supervisor_pid).unwrap();
    let supervisor = rustix::process::Pid::from_raw(supervisor).unwrap();
    rustix::process::kill_process(supervisor, rustix::process::Signal::KILL).unwrap();
    let seen = controller.ends("", 2).await;
    assert_eq!(seen.ends[&done].outcome(), v1::OutcomeKind::Passed, "a record that is there stays");
    let lost = &seen.ends[&running];
    assert_eq!(
        (lost.outcome(), lost.reason()),
        (v1::OutcomeKind::Lost, v1::Reason::SupervisorDied),
        "{lost:?}"
    );
    assert_eq!(seen.output[&running], format!("{pid}\n").as_bytes(), "what was printed is there");
    if status.capabilities.unwrap().containment == "cgroup-v2" {
        let gone = rustix::process::test_kill_process(rustix::process::Pid::from_raw(pid).unwrap());
        assert!(gone.is_err() || is_zombie(pid), "process {pid} still runs");
    }
    let refused = controller.client.start_task(controller.start_request(spec(3, "true"))).await.unwrap_err();
    assert!(refused.message().contains("its supervisor died"), "{refused:?}");
    assert_eq!(controller.close().await, [] as [&str; 0]);
    agent.end().await;
}

/// Process 1 of a container may be slow to take note of orphans.
fn is_zombie(pid: i32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    status.is_empty() || status.contains("State:\tZ") || status.contains("State:\tX")
}

#[tokio::test]
async fn results_of_an_expired_session_are_served_without_a_supervisor_and_age_across_agents() {
    let state = tempfile::tempdir().unwrap();
    let (agent, runtime) = start_to_crash(state.path()).await;
    let mut controller = agent.controller().await;
    let lease = Some(convert::duration(Duration::from_secs(1)));
    controller.open(v1::OpenSessionRequest { lease_duration: lease, ..opening() }).await;
    let task = controller
        .start(spec(1, "echo kept; seq 100000 > \"$MILLSTREAM_OUTPUT/file\"; exec sleep 1000"))
        .await;
    let seen = controller.ends("", 1).await;
    assert_eq!(seen.ends[&task].reason(), v1::Reason::LeaseExpired, "nobody has renewed the lease");
    // Its supervisor ends by itself; the agent takes note of it.
    let mut watched = controller.client.watch_status(v1::WatchStatusRequest {}).await.unwrap().into_inner();
    loop {
        let status = timeout(PATIENCE, watched.message()).await.unwrap().unwrap().unwrap().status.unwrap();
        if status.sessions[0].supervisor_pid == 0 {
            break;
        }
    }
    controller.check_kept(&task).await;
    drop((watched, agent));
    tokio::task::spawn_blocking(move || runtime.shutdown_timeout(PATIENCE)).await.unwrap();

    let agent = Agent::start(state.path(), false).await;
    let key = controller.key.clone();
    let mut controller = Controller { key, ..agent.controller().await };
    controller.check_kept(&task).await;
    let request = controller.start_request(spec(2, "true"));
    let refused = controller.client.start_task(request).await.unwrap_err();
    assert!(refused.message().starts_with("session expired: "), "{refused:?}");
    agent.end().await;

    let session = state.path().join("sessions").join(&controller.key.session_id);
    assert!(session.exists());
    let later = World { clock: Arc::new(Later(SystemClock)), ..World::system() };
    let agent = Agent::start_in(later, state.path(), false).await;
    let mut watched =
        agent.controller().await.client.watch_status(v1::WatchStatusRequest {}).await.unwrap().into_inner();
    while !timeout(PATIENCE, watched.message())
        .await
        .unwrap()
        .unwrap()
        .unwrap()
        .status
        .unwrap()
        .sessions
        .is_empty()
    {}
    assert!(!session.exists());
    agent.end().await;
}

#[tokio::test]
async fn two_agents_do_not_share_a_state_directory() {
    let state = tempfile::tempdir().unwrap();
    let agent = Agent::start(state.path(), true).await;
    let refused = Door::open(config(state.path(), true), World::system()).await.unwrap_err().to_string();
    let lock = state.path().join("agent.lock");
    assert!(
        refused.contains(&format!("process {}", std::process::id()))
            && refused.contains(&*lock.to_string_lossy()),
        "{refused}"
    );
    agent.end().await;
}

#[tokio::test]
async fn a_state_directory_without_room_for_sockets_is_refused_at_the_start() {
    let directory = tempfile::tempdir().unwrap();
    let state = directory.path().join("a-directory-with-a-long-name-of-its-own");
    std::fs::create_dir(&state).unwrap();
    let refused = Door::open(config(&state, true), World::system()).await.unwrap_err().to_string();
    assert!(refused.contains("leave room for 38: set `state_directory`"), "{refused}");
}

#[tokio::test]
async fn shipped_files_make_room_for_others_unless_an_open_session_needs_them() {
    let state = tempfile::tempdir().unwrap();
    std::fs::create_dir(state.path().join("blobs")).unwrap();
    std::fs::write(state.path().join("blobs/.arriving-1-1"), "half").unwrap();
    let agent = Agent::start(state.path(), true).await;
    assert_eq!(std::fs::read_dir(state.path().join("blobs")).unwrap().count(), 0, "it will never be whole");
    let (mut first, mut second) = (agent.controller().await, agent.controller().await);
    first.open(opening()).await;
    second.open(opening()).await;
    assert!(!first.upload(1).await.unwrap());
    assert!(second.upload(1).await.unwrap(), "it is there, and from now on both need it");
    assert!(first.close().await.is_empty());
    let refused = second.upload(2).await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused:?}");
    assert!(refused.message().contains("200 of 300 bytes are taken by files that open sessions need"));
    // A task that needs it finds it, whatever was tried meanwhile.
    let file = v1::ShippedFile {
        path: "file".to_owned(),
        place: v1::FilePlace::Work.into(),
        mode: 0o600,
        source: Some(v1::shipped_file::Source::BlobBlake3(BlobDigest::of(&[1; 200]).to_string())),
        ..v1::ShippedFile::default()
    };
    let task = second.start(v1::TaskSpec { files: vec![file], ..spec(1, "wc -c < file") }).await;
    let seen = second.ends("", 1).await;
    assert_eq!(seen.output[&task], b"200\n");
    let status = second.client.get_status(v1::GetStatusRequest {}).await.unwrap().into_inner().status;
    let spool = status.unwrap().spool.unwrap();
    assert_eq!((spool.blobs_bytes, spool.blobs_bytes_max), (200, BLOBS_BYTES_MAX));
    assert!(second.close().await.is_empty());
    first.open(opening()).await;
    assert!(!first.upload(2).await.unwrap(), "nobody needs the other one any more");
    assert!(
        !first
            .client
            .find_missing_blobs(v1::FindMissingBlobsRequest {
                session: Some(first.key.clone()),
                blake3: vec![BlobDigest::of(&[1; 200]).to_string()],
            })
            .await
            .unwrap()
            .into_inner()
            .missing_blake3
            .is_empty()
    );
    assert!(first.close().await.is_empty());
    agent.end().await;
}
