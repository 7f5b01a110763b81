//! A supervisor with a door that tests can speak through.

use std::{
    collections::BTreeMap,
    fs,
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use millstream_common::{
    clock::World,
    convert::spec_sha256,
    id::{BlockName, StreamName, TaskId},
    log::LogChannel,
    outcome::{Phase, TaskEnd},
    spec::{Expectation, FailurePolicy, OutputDescriptors, PhaseSpec, ResourceLimits, TaskSpec},
};
use millstream_proto::{
    supervisor::v1::{
        CloseSession, DoorFrame, DoorHello, Reply, SignalTask, StartTask, SupervisorHello, TaskChanged,
        door_frame::Frame as Ask, supervisor_frame::Frame as Told,
    },
    v1,
};
use tokio::task::JoinHandle;

use crate::entry::tests::this_test_binary;
use crate::supervisor::{cgroup::Hierarchies, disk::Disk, spool::SpoolReader, *};

/// Longest wait of a test for something that should come soon.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);

#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Containment {
    Group,
    Shim,
}

/// Both where both are possible. Control groups need a writable one: then the tests run as root, as in CI.
pub(super) fn containments() -> Vec<Containment> {
    match Hierarchies::find().unified {
        Some(_) => vec![Containment::Group, Containment::Shim],
        None => vec![Containment::Shim],
    }
}

/// A disk that may be full.
#[derive(Debug, Default)]
pub(super) struct SmallDisk {
    pub(super) full: AtomicBool,
}

impl Disk for SmallDisk {
    fn admit(&self, _file: &Path, _bytes: usize) -> io::Result<()> {
        if self.full.load(Ordering::Relaxed) { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
    }
}

pub(super) struct Fixture {
    pub(super) world: World,
    pub(super) directory: tempfile::TempDir,
    pub(super) config: SupervisorConfig,
    pub(super) disk: Arc<SmallDisk>,
    pub(super) doors: mpsc::Sender<UnixStream>,
    pub(super) reader: FrameReader<OwnedReadHalf>,
    pub(super) writer: FrameWriter<OwnedWriteHalf>,
    pub(super) running: JoinHandle<Result<(), SupervisorError>>,
    requests: u64,
    pub(super) replies: BTreeMap<u64, Reply>,
    pub(super) tasks: BTreeMap<String, TaskChanged>,
    pub(super) hello: Option<SupervisorHello>,
    pub(super) lease_expired: bool,
    numbers: u32,
}

impl Fixture {
    pub(super) async fn new(containment: Containment) -> Self {
        Self::with_lease(containment, limits::LEASE).await
    }

    pub(super) async fn with_lease(containment: Containment, lease: Duration) -> Self {
        let world = World::system();
        let directory = tempfile::tempdir().unwrap();
        let session_dir = directory.path().join("session");
        fs::create_dir(&session_dir).unwrap();
        let config = SupervisorConfig {
            session_dir,
            session_id: world.ids.session_id(),
            lease,
            base_environment: vec![("PATH".to_owned(), "/usr/bin:/bin".to_owned())],
            relaunch: this_test_binary(),
            cgroup: Hierarchies::find()
                .unified
                .filter(|_| containment == Containment::Group)
                .map(|own| own.join(format!("millstream-test-{}", std::process::id()))),
            blobs_dir: directory.path().join("blobs"),
        };
        let (doors, came) = mpsc::channel(DOORS_COUNT_MAX);
        let (ours, theirs) = UnixStream::pair().unwrap();
        doors.send(theirs).await.unwrap();
        let disk = Arc::<SmallDisk>::default();
        let host = Host { disk: Arc::clone(&disk) as _, ..real_host(&config).unwrap() };
        let running = tokio::spawn(run(config.clone(), world.clone(), host, came));
        let (reader, writer) = ours.into_split();
        let mut fixture = Self {
            world,
            directory,
            config,
            disk,
            doors,
            reader: FrameReader::new(reader),
            writer: FrameWriter::new(writer),
            running,
            requests: 0,
            replies: BTreeMap::new(),
            tasks: BTreeMap::new(),
            hello: None,
            lease_expired: false,
            numbers: 0,
        };
        fixture
            .ask_nothing(Ask::Hello(DoorHello { protocol: wire::PROTOCOL, incarnation: String::new() }))
            .await;
        fixture
    }

    pub(super) async fn new_door(&mut self) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        self.doors.send(theirs).await.unwrap();
        let (reader, writer) = ours.into_split();
        (self.reader, self.writer) = (FrameReader::new(reader), FrameWriter::new(writer));
        self.hello = None;
        self.tasks.clear();
        while self.hello.is_none() {
            self.listen().await;
        }
    }

    pub(super) async fn ask_nothing(&mut self, ask: Ask) {
        self.writer.send(&DoorFrame { request_id: 0, frame: Some(ask) }).await.unwrap();
    }

    pub(super) async fn ask(&mut self, ask: Ask) -> Reply {
        self.requests += 1;
        let request_id = self.requests;
        self.writer.send(&DoorFrame { request_id, frame: Some(ask) }).await.unwrap();
        loop {
            if let Some(reply) = self.replies.remove(&request_id) {
                return reply;
            }
            self.listen().await;
        }
    }

    /// Takes in the next frame.
    pub(super) async fn listen(&mut self) {
        let next = tokio::time::timeout(
            PATIENCE,
            self.reader.next::<millstream_proto::supervisor::v1::SupervisorFrame>(),
        );
        let frame = next.await.expect("something is told in time").unwrap().expect("the supervisor is there");
        match frame.frame.unwrap() {
            Told::Hello(hello) => {
                self.tasks.extend(hello.tasks.iter().map(|task| (task.task_id.clone(), task.clone())));
                self.hello = Some(hello);
            }
            Told::Reply(reply) => drop(self.replies.insert(reply.request_id, reply)),
            Told::Task(task) => drop(self.tasks.insert(task.task_id.clone(), task)),
            Told::Relay(_) => {}
            Told::LeaseExpired(_) => self.lease_expired = true,
        }
    }

    pub(super) async fn until(&mut self, task: TaskId, is_so: impl Fn(&TaskChanged) -> bool) -> TaskChanged {
        loop {
            if let Some(known) = self.tasks.get(&task.to_string()).filter(|task| is_so(task)) {
                return known.clone();
            }
            self.listen().await;
        }
    }

    pub(super) async fn end_of(&mut self, task: TaskId) -> TaskEnd {
        let changed = self.until(task, |task| task.end.is_some()).await;
        assert_eq!(changed.state, i32::from(v1::TaskState::Finished));
        TaskEnd::try_from(changed.end.unwrap()).unwrap()
    }

    pub(super) async fn start(&mut self, spec: &TaskSpec) -> TaskId {
        let task = self.world.ids.task_id();
        self.numbers += 1;
        let spec = TaskSpec { stream_number: self.numbers, ..spec.clone() };
        let reply = self.put(task, &spec).await;
        assert_eq!((reply.code, &*reply.message), (0, ""));
        assert!(reply.start.unwrap().accepted_by_this_call);
        task
    }

    pub(super) async fn put(&mut self, task: TaskId, spec: &TaskSpec) -> Reply {
        let wire = v1::TaskSpec::from(spec);
        let spec_sha256 = spec_sha256(&wire);
        let start =
            StartTask { task_id: task.to_string(), spec: Some(wire), spec_sha256, ..StartTask::default() };
        self.ask(Ask::Start(start)).await
    }

    pub(super) async fn run(&mut self, spec: &TaskSpec) -> TaskEnd {
        let task = self.start(spec).await;
        self.end_of(task).await
    }

    pub(super) async fn signal(&mut self, task: TaskId, kind: v1::SignalKind) -> Reply {
        let signal = SignalTask { task_id: task.to_string(), kind: kind.into(), ..SignalTask::default() };
        self.ask(Ask::Signal(signal)).await
    }

    pub(super) fn log(&self, task: TaskId, channel: LogChannel) -> String {
        let path = attendant::task_dir(&self.config.session_dir, task).join("spool");
        let position = self.tasks[&task.to_string()].spool_position;
        let (records, _) = SpoolReader::open(path).unwrap().read(0, position, 64 << 20).unwrap();
        let all = records.into_iter().filter(|record| record.channel == channel);
        String::from_utf8(all.flat_map(|record| record.data.to_vec()).collect()).unwrap()
    }

    pub(super) async fn close(mut self) {
        let reply = self.ask(Ask::Close(CloseSession {})).await;
        assert_eq!((reply.code, reply.survivors), (0, Vec::new()));
        for name in ["tasks", "sync", "bin"] {
            assert!(!self.config.session_dir.join(name).exists(), "{name} is left behind");
        }
        if let Some(group) = self.config.session_cgroup() {
            assert!(!group.exists(), "the control group is left behind");
        }
        tokio::time::timeout(PATIENCE, self.running).await.unwrap().unwrap().unwrap();
        drop(self.directory);
    }
}

pub(super) fn spec(stream: &str, phases: &[(Phase, &str)]) -> TaskSpec {
    let phase = |&(phase, script): &(Phase, &str)| PhaseSpec {
        phase,
        argv: vec!["bash".to_owned(), "-c".to_owned(), script.to_owned()],
        timeout: None,
        output: OutputDescriptors::Standard,
        reports_phases: false,
    };
    TaskSpec {
        stream: StreamName::new(stream).unwrap(),
        name: BlockName::new("block").unwrap(),
        stream_number: 1,
        test_number: 1,
        files: Vec::new(),
        phases: phases.iter().map(phase).collect(),
        environment: BTreeMap::new(),
        working_directory: String::new(),
        user: None,
        limits: ResourceLimits::default(),
        grace: limits::GRACE,
        log_head_bytes: limits::LOG_HEAD_BYTES,
        log_tail_bytes: limits::LOG_TAIL_BYTES,
        expectation: Expectation::Pass,
        failure_policy: FailurePolicy::Continue,
        hold: false,
    }
}

pub(super) fn script(text: &str) -> TaskSpec {
    spec("stream", &[(Phase::Run, text)])
}

pub(super) fn exec(argv: &[&str]) -> TaskSpec {
    let mut spec = script("");
    spec.phases[0].argv = argv.iter().map(|&word| word.to_owned()).collect();
    spec
}

pub(super) fn is_alive(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
}

/// A supervisor as a process of its own, started as the door starts it.
pub(super) struct Process {
    pub(super) child: Child,
    pub(super) config: SupervisorConfig,
    pub(super) _directory: tempfile::TempDir,
}

impl Process {
    pub(super) fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let config = SupervisorConfig {
            session_dir: directory.path().to_owned(),
            session_id: World::system().ids.session_id(),
            lease: limits::LEASE,
            base_environment: Vec::new(),
            relaunch: this_test_binary(),
            cgroup: None,
            blobs_dir: directory.path().join("blobs"),
        };
        fs::write(directory.path().join(CONFIG_FILE), serde_json::to_vec(&config).unwrap()).unwrap();
        let child = Self::command(&config).spawn().unwrap();
        Self { child, config, _directory: directory }
    }

    pub(super) fn command(config: &SupervisorConfig) -> Command {
        let mut command =
            config.relaunch.command(crate::entry::Role::Supervisor, &[config.session_dir.clone().into()]);
        command.stdout(Stdio::piped()).stderr(Stdio::null());
        command
    }

    pub(super) fn first_words(child: &mut Child) -> String {
        let mut words = String::new();
        io::Read::read_to_string(&mut child.stdout.take().unwrap(), &mut words).unwrap();
        words
    }
}
