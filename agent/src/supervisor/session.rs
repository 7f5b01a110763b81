//! One session as its supervisor holds it: tasks, queues, lease, and what the door is told of them.
//!
//! Feeds the machines with what happened and performs their actions. It waits for nothing: the loop in `supervisor.rs`
//! does, and the attendants of tasks do the work. It does not know how a process is made.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use millstream_common::{
    clock::World,
    convert::{duration, duration_in, id_in, reason_in, secret_files_in, spec_sha256, timestamp},
    id::{StreamName, TaskId},
    limits,
    outcome::{OutcomeKind, Reason, TaskEnd},
    spec::{FileSource, TaskSpec},
    text::counted,
};
use millstream_proto::{
    supervisor::v1::{
        CloseSession, DoorFrame, KeepLease, LeaseExpired, RelayFrames, ReleaseTasks, Reply, SignalTask,
        StartTask, SupervisorFrame, SupervisorHello, TaskChanged, door_frame, supervisor_frame,
    },
    v1,
};
use prost::Message as _;
use tokio::{io::AsyncWrite, sync::mpsc};
use tonic::Code;
use tracing::{info, warn};

use super::{
    SupervisorConfig, SupervisorError,
    attendant::{
        Attendant, Grown, RECORD_FILE, SPEC_FILE, STARTED_FILE, SharedSpool, Surroundings, Told, locked,
        task_dir, write_record,
    },
    blobs::Blobs,
    cgroup::{self, Group, Hierarchies},
    failed,
    queue::{self, Queue},
    relay::Relay,
    spares::Spares,
    task::{self, Action, Machine, SessionEnd, Stage},
    wire::{FrameWriter, PROTOCOL, WireError},
    workspace,
};

/// How long a state is kept from the door that a task usually leaves at once: a small task is told in one piece.
const PASSING: Duration = Duration::from_millis(5);
/// Survivors that are named when a session is closed.
const SURVIVORS_NAMED_MAX: usize = 64;

/// A session.
pub(super) struct Session {
    config: SupervisorConfig,
    around: Arc<Surroundings>,
    tasks: BTreeMap<TaskId, Task>,
    queues: BTreeMap<StreamName, Queue>,
    lease: Lease,
    /// Requests to close the session that wait for their answer.
    closing: Vec<u64>,
    over: bool,
    /// What the door is told next, oldest first.
    replies: VecDeque<SupervisorFrame>,
    changed: BTreeSet<TaskId>,
    /// Tasks whose state changed on the way to another: told a little later, unless they are told with more before.
    passing: BTreeSet<TaskId>,
    /// When those are told.
    passing_told_at: Option<Instant>,
    /// Moments at which time alone changes something in a task.
    deadlines: BTreeMap<TaskId, Instant>,
    has_door: bool,
    survivors: Vec<String>,
}

/// The lease, counted on the clock that goes on while the host sleeps.
#[derive(Debug)]
struct Lease {
    duration: Duration,
    ends: Duration,
    epoch: u64,
    /// When it was over, once it is.
    over_since: Option<Duration>,
}

/// A task that was accepted and not released.
struct Task {
    spec: Arc<TaskSpec>,
    digest: String,
    machine: Machine,
    /// To its attendant, once there is one and as long as there is.
    orders: Option<mpsc::Sender<Action>>,
    secret_files: Vec<millstream_common::spec::ShippedFile>,
    spool: SharedSpool,
    end: Option<Box<v1::TaskEnd>>,
    changed_ns: u64,
}

impl Session {
    pub(super) fn new(
        config: SupervisorConfig,
        world: World,
        told: mpsc::Sender<Told>,
        relayed: mpsc::Sender<RelayFrames>,
    ) -> Result<Self, SupervisorError> {
        let null = Path::new("/dev/null");
        let null_file =
            fs::OpenOptions::new().read(true).write(true).open(null).map_err(failed("open", null))?;
        let blobs = Blobs::open(&config.blobs_dir).map_err(SupervisorError::Blobs)?;
        let around = Surroundings {
            world: world.clone(),
            session_dir: config.session_dir.clone(),
            base_environment: config.base_environment.clone(),
            relaunch: config.relaunch.clone(),
            cgroup: config.session_cgroup(),
            hierarchies: Hierarchies::find(),
            blobs,
            spares: Spares::default(),
            relay: Relay::new(relayed),
            null: null_file.into(),
            told,
            grown: Arc::new(Grown::default()),
        };
        let lease = Lease {
            duration: config.lease,
            ends: world.clock.since_boot() + config.lease,
            epoch: 0,
            over_since: None,
        };
        let mut session = Self {
            config,
            around: Arc::new(around),
            tasks: BTreeMap::new(),
            queues: BTreeMap::new(),
            lease,
            closing: Vec::new(),
            over: false,
            replies: VecDeque::new(),
            changed: BTreeSet::new(),
            passing: BTreeSet::new(),
            passing_told_at: None,
            deadlines: BTreeMap::new(),
            has_door: false,
            survivors: Vec::new(),
        };
        session.recover();
        Ok(session)
    }

    fn now(&self) -> Instant {
        self.around.world.clock.now().into_std()
    }

    /// Whether nothing is left to do.
    pub(super) fn is_over(&self) -> bool {
        self.over
    }

    /// When the lease is over, on the clock since boot; then, when its results have aged.
    pub(super) fn lease_ends(&self) -> Option<Duration> {
        Some(match self.lease.over_since {
            None => self.lease.ends,
            Some(since) => since + limits::EXPIRED_RESULTS_KEPT,
        })
    }

    /// The next moment at which time alone changes something.
    pub(super) fn next_deadline(&self) -> Option<tokio::time::Instant> {
        let tasks = self.deadlines.values().copied().chain(self.passing_told_at).min();
        let clock = &self.around.world.clock;
        let left = self.lease_ends().map(|ends| clock.now() + ends.saturating_sub(clock.since_boot()));
        tasks.map(tokio::time::Instant::from_std).into_iter().chain(left).min()
    }

    /// Lets time act: the lease first, so that nothing is served for a session that is over.
    pub(super) fn pass_time(&mut self) {
        let since_boot = self.around.world.clock.since_boot();
        match self.lease.over_since {
            None if self.lease.ends <= since_boot => self.expire(since_boot),
            Some(since) if since + limits::EXPIRED_RESULTS_KEPT <= since_boot && self.closing.is_empty() => {
                info!("the results of a session that is over have aged");
                self.close(None);
            }
            _ => {}
        }
        let now = self.now();
        let due = self.deadlines.iter().filter(|&(_, &deadline)| deadline <= now);
        for task in due.map(|(&id, _)| id).collect::<Vec<_>>() {
            self.feed(task, task::Event::TimePassed);
        }
        if self.passing_told_at.is_some_and(|moment| moment <= now) {
            self.passing_told_at = None;
            self.changed.append(&mut self.passing);
        }
    }

    fn expire(&mut self, since_boot: Duration) {
        warn!(tasks = self.unfinished(), "the controller was silent for longer than the lease");
        self.lease.over_since = Some(since_boot);
        self.around.relay.controller_gone();
        self.reply(supervisor_frame::Frame::LeaseExpired(LeaseExpired {}));
        self.end_everything(SessionEnd::LeaseExpired);
    }

    fn unfinished(&self) -> usize {
        self.tasks.values().filter(|task| task.end.is_none()).count()
    }

    fn end_everything(&mut self, why: SessionEnd) {
        let now = self.now();
        for queue in self.queues.values_mut() {
            // A closed queue gives no orders.
            queue.handle(queue::Event::Closed, now, &mut Vec::new());
        }
        for task in self.tasks.keys().copied().collect::<Vec<_>>() {
            self.feed(task, task::Event::SessionEnded(why));
        }
        self.finish_if_done();
    }

    // ---- The door ----

    /// A door is there and must be told everything.
    pub(super) fn door_came(&mut self) {
        self.has_door = true;
        self.around.relay.attached(false);
        self.replies.clear();
        self.changed.clear();
        self.passing.clear();
        self.passing_told_at = None;
        let tasks = self.tasks.iter().map(|(&id, task)| self.describe(id, task)).collect();
        let hello = SupervisorHello {
            protocol: PROTOCOL,
            pid: std::process::id(),
            tasks,
            lease_expired: self.lease.over_since.is_some(),
            lease_left: Some(duration(self.lease_left())),
        };
        self.reply(supervisor_frame::Frame::Hello(hello));
    }

    /// The door is gone; what it was to be told is told to the next one.
    pub(super) fn door_left(&mut self) {
        self.has_door = false;
        self.around.relay.attached(false);
        self.replies.clear();
        self.changed.clear();
        self.passing.clear();
        self.passing_told_at = None;
        // Whoever asked for the end is not there to hear of it, but it goes on.
        for asked in &mut self.closing {
            *asked = 0;
        }
        self.finish_if_done();
    }

    /// Frames of blocks' calls for the controller.
    pub(super) fn relay_to_door(&mut self, frames: RelayFrames) {
        self.reply(supervisor_frame::Frame::Relay(frames));
    }

    fn reply(&mut self, frame: supervisor_frame::Frame) {
        if self.has_door {
            self.replies.push_back(SupervisorFrame { frame: Some(frame) });
        }
    }

    /// Puts what the door is to know into its writer, until `bytes_max` wait there.
    pub(super) fn tell_door<W: AsyncWrite + Unpin>(
        &mut self,
        writer: &mut FrameWriter<W>,
        bytes_max: usize,
    ) -> Result<(), WireError> {
        while writer.pending_bytes() < bytes_max {
            if let Some(reply) = self.replies.pop_front() {
                writer.push(&reply)?;
            } else if let Some(id) = self.changed.pop_first() {
                self.passing.remove(&id);
                let Some(task) = self.tasks.get(&id) else { continue };
                let frame = supervisor_frame::Frame::Task(self.describe(id, task));
                writer.push(&SupervisorFrame { frame: Some(frame) })?;
            } else {
                break;
            }
        }
        Ok(())
    }

    /// Where attendants note that output has grown.
    pub(super) fn grown(&self) -> Arc<Grown> {
        self.around.grown.clone()
    }

    pub(super) fn take_grown(&mut self) {
        if self.has_door {
            self.changed.extend(self.around.grown.take());
        } else {
            self.around.grown.take();
        }
    }

    fn describe(&self, id: TaskId, task: &Task) -> TaskChanged {
        let spool = locked(&task.spool);
        let stage = task.machine.stage();
        let finished = task.end.is_some();
        TaskChanged {
            task_id: id.to_string(),
            stream: task.spec.stream.to_string(),
            block: task.spec.name.to_string(),
            state: wire_state(stage, finished).into(),
            phase: task.machine.phase().map_or(0, |phase| v1::Phase::from(phase).into()),
            pid: task.machine.pid().unwrap_or_default(),
            time: Some(timestamp(task.changed_ns)),
            spool_position: match (&*spool, &task.end) {
                (Some(spool), _) => spool.position(),
                (None, Some(end)) => end.log.as_ref().map_or(0, |log| log.end_position),
                (None, None) => 0,
            },
            end: task.end.as_deref().cloned(),
            explanation: self.explain(id, task),
            logged_bytes: match (&*spool, &task.end) {
                (Some(spool), _) => spool.logged_bytes(),
                (None, Some(end)) => end.log.as_ref().map_or(0, |log| log.stdout_bytes + log.stderr_bytes),
                (None, None) => 0,
            },
            last_line: spool.as_ref().and_then(|spool| spool.last_line()).unwrap_or_default(),
        }
    }

    fn explain(&self, id: TaskId, task: &Task) -> String {
        let queue = self.queues.get(&task.spec.stream);
        let ahead = queue.and_then(|queue| queue.ahead_of(id));
        let current = queue.and_then(|queue| self.tasks.get(&queue.current()?));
        let waits = task.machine.stage() == Stage::Queued;
        match (ahead, current, queue.and_then(Queue::missing)) {
            (Some(ahead), Some(current), _) if waits => {
                let others = if ahead > 1 {
                    format!(" and {} more", counted(ahead - 1, "task"))
                } else {
                    String::new()
                };
                let label = current.machine.label();
                let doing = current.machine.explain();
                format!("waits for {label}{others} before it in stream {}: {label} {doing}", task.spec.stream)
            }
            (Some(_), None, Some(missing)) if waits => {
                format!(
                    "waits for number {missing} of stream {}, which has not arrived yet",
                    task.spec.stream
                )
            }
            _ => task.machine.explain(),
        }
    }

    /// Takes in what the door says.
    pub(super) fn take_frame(&mut self, frame: DoorFrame) {
        // Whatever waited while the host slept must not be served by a session that is over.
        self.pass_time();
        let request_id = frame.request_id;
        let answer = match frame.frame {
            Some(door_frame::Frame::Hello(hello)) => {
                if hello.protocol != PROTOCOL {
                    warn!(theirs = hello.protocol, ours = PROTOCOL, "the door speaks another protocol");
                }
                return;
            }
            Some(door_frame::Frame::Relay(frames)) => return self.around.relay.incoming(frames),
            Some(door_frame::Frame::RelayAttached(relay)) => {
                return self.around.relay.attached(relay.attached);
            }
            Some(door_frame::Frame::Close(CloseSession {})) => return self.close(Some(request_id)),
            Some(door_frame::Frame::Keep(keep)) => self.keep(&keep),
            Some(door_frame::Frame::Start(start)) => self.start(start),
            Some(door_frame::Frame::Signal(signal)) => self.signal(&signal),
            Some(door_frame::Frame::Release(release)) => self.release(&release),
            None => Err((Code::Unimplemented, "this supervisor does not know that request".to_owned())),
        };
        let mut reply =
            answer.unwrap_or_else(|(code, message)| Reply { code: code as u32, message, ..Reply::default() });
        if request_id > 0 {
            reply.request_id = request_id;
            self.reply(supervisor_frame::Frame::Reply(reply));
        }
    }

    fn lease_left(&self) -> Duration {
        match self.lease.over_since {
            Some(_) => Duration::ZERO,
            None => self.lease.ends.saturating_sub(self.around.world.clock.since_boot()),
        }
    }

    fn expired(&self) -> Result<(), Refused> {
        if self.lease.over_since.is_some() || !self.closing.is_empty() {
            return Err((Code::FailedPrecondition, "session expired: open another".to_owned()));
        }
        Ok(())
    }

    fn keep(&mut self, keep: &KeepLease) -> Answer {
        self.expired()?;
        let range = limits::LEASE_MIN..=limits::LEASE_MAX;
        let asked = duration_in("lease_duration", keep.lease_duration.as_ref(), range).map_err(invalid)?;
        // A request of an older epoch that was held up on its way changes nothing.
        if keep.epoch >= self.lease.epoch {
            self.lease.epoch = keep.epoch;
            self.lease.duration = asked.unwrap_or(self.lease.duration);
            self.lease.ends = self.around.world.clock.since_boot() + self.lease.duration;
        }
        Ok(Reply { lease_left: Some(duration(self.lease_left())), ..Reply::default() })
    }

    /// Puts a task into its queue. A put of number and digest: repeated, it answers from what is known.
    fn start(&mut self, start: StartTask) -> Answer {
        self.expired()?;
        let id: TaskId = id_in("task_id", &start.task_id).map_err(invalid)?;
        if let Some(known) = self.tasks.get(&id) {
            return if known.digest == start.spec_sha256 {
                let reply = start_reply(wire_state(known.machine.stage(), known.end.is_some()), false);
                let stream = known.spec.stream.clone();
                self.feed_queue(&stream, queue::Event::Follows { task: id, previous: start.previous_number });
                Ok(reply)
            } else {
                Err((
                    Code::AlreadyExists,
                    format!("task {id} is known with another specification: give the new one another number"),
                ))
            };
        }
        if self.tasks.len() >= limits::SESSION_TASKS_COUNT_MAX {
            return Err((
                Code::ResourceExhausted,
                format!("the session has {} tasks that are not released", limits::SESSION_TASKS_COUNT_MAX),
            ));
        }
        let Some(wire) = start.spec else {
            return Err((Code::InvalidArgument, "spec: is missing".to_owned()));
        };
        let encoded = wire.encode_to_vec();
        let spec = TaskSpec::try_from(wire).map_err(invalid)?;
        let secret_files = secret_files_in(start.secret_files).map_err(invalid)?;
        self.keep_spec(id, &encoded).map_err(|error| {
            (Code::Unavailable, format!("the task cannot be kept in the session's directory: {error}"))
        })?;
        let (stream, number, previous) = (spec.stream.clone(), spec.stream_number, start.previous_number);
        let task = Task {
            machine: Machine::new(&spec),
            spec: Arc::new(spec),
            digest: start.spec_sha256,
            orders: None,
            secret_files,
            spool: SharedSpool::default(),
            end: None,
            changed_ns: self.around.world.clock.wall_ns(),
        };
        self.tasks.insert(id, task);
        self.tell_in_passing(id);
        self.feed_queue(&stream, queue::Event::Added { task: id, number, previous });
        let state =
            self.tasks.get(&id).map_or(v1::TaskState::Queued, |task| wire_state(task.machine.stage(), false));
        Ok(start_reply(state, true))
    }

    /// Keeps the specification, so that whoever finds the directory knows what the task was.
    fn keep_spec(&self, id: TaskId, encoded: &[u8]) -> io::Result<()> {
        use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
        let directory = task_dir(&self.config.session_dir, id);
        match fs::DirBuilder::new().mode(0o711).create(&directory) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        let path = directory.join(SPEC_FILE);
        let mut file =
            fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
        io::Write::write_all(&mut file, encoded)
    }

    fn signal(&mut self, signal: &SignalTask) -> Answer {
        let id: TaskId = id_in("task_id", &signal.task_id).map_err(invalid)?;
        if !self.tasks.contains_key(&id) {
            return Err((Code::NotFound, format!("task {id} is not known in this session")));
        }
        let event = match v1::SignalKind::try_from(signal.kind) {
            Ok(v1::SignalKind::Go) => task::Event::GoOrdered,
            Ok(v1::SignalKind::Cancel) => task::Event::CancelOrdered,
            Ok(v1::SignalKind::Stop) => {
                let range = Duration::ZERO..=limits::GRACE_MAX;
                let grace =
                    duration_in("grace_duration", signal.grace_duration.as_ref(), range).map_err(invalid)?;
                let reason = match signal.reason {
                    0 => Reason::Stopped,
                    number => reason_in("reason", number).map_err(invalid)?,
                };
                task::Event::StopOrdered { grace, deadline: reason == Reason::TestDeadline }
            }
            Ok(v1::SignalKind::Signal) => match i32::try_from(signal.signal) {
                Ok(number @ 1..=64) => task::Event::SignalOrdered(number),
                _ => return Err((Code::InvalidArgument, "signal: must be from 1 to 64".to_owned())),
            },
            _ => return Err((Code::InvalidArgument, format!("kind: {} is no kind of signal", signal.kind))),
        };
        self.feed(id, event);
        let state = self
            .tasks
            .get(&id)
            .map_or(v1::TaskState::Finished, |task| wire_state(task.machine.stage(), task.end.is_some()));
        Ok(Reply { state: state.into(), ..Reply::default() })
    }

    /// Forgets finished tasks and removes their directories. Repeating it succeeds.
    fn release(&mut self, release: &ReleaseTasks) -> Answer {
        let mut directories = Vec::new();
        for id in &release.task_ids {
            let id: TaskId = id_in("task_ids", id).map_err(invalid)?;
            match self.tasks.get(&id) {
                Some(task) if task.end.is_none() => {
                    let message = format!("task {id} has not ended: stop or cancel it first");
                    return Err((Code::FailedPrecondition, message));
                }
                Some(_) => {
                    self.tasks.remove(&id);
                    self.changed.remove(&id);
                    self.passing.remove(&id);
                    directories.push(task_dir(&self.config.session_dir, id));
                }
                None => {}
            }
        }
        if !directories.is_empty() {
            // Not on this thread: there may be many files, and nobody waits for it.
            let spares = self.around.spares.clone();
            drop(tokio::task::spawn_blocking(move || {
                for directory in directories {
                    if let Err(error) = spares.retire(&directory) {
                        warn!(path = %directory.display(), %error, "the directory of a task is left behind");
                    }
                }
            }));
        }
        Ok(Reply::default())
    }

    fn close(&mut self, request_id: Option<u64>) {
        let first = self.closing.is_empty();
        self.closing.push(request_id.unwrap_or(0));
        if first {
            info!(tasks = self.unfinished(), "closing the session");
            self.around.relay.controller_gone();
            self.end_everything(SessionEnd::Closed);
        } else {
            self.finish_if_done();
        }
    }

    /// Once nothing runs any more: answers those who closed the session, and is over.
    fn finish_if_done(&mut self) {
        if self.closing.is_empty() || self.over || self.unfinished() > 0 {
            return;
        }
        self.end_what_escaped();
        self.over = true;
        let survivors = self.survivors.clone();
        for request_id in std::mem::take(&mut self.closing) {
            if request_id > 0 {
                let survivors = survivors.clone();
                self.reply(supervisor_frame::Frame::Reply(Reply {
                    request_id,
                    survivors,
                    ..Reply::default()
                }));
            }
        }
        // So that nothing more is begun.
        self.closing.push(0);
    }

    /// The last net: kills every process that bears the mark of one of this session's tasks, wherever it has gone.
    fn end_what_escaped(&mut self) {
        if self.tasks.is_empty() {
            return;
        }
        let is_ours = |mark: &str| mark.parse().is_ok_and(|id: TaskId| self.tasks.contains_key(&id));
        for (process, described) in cgroup::find_marked(is_ours) {
            warn!(pid = described.pid, command = %described.command, "a process had left its task's containment");
            cgroup::kill_marked(&process);
        }
    }

    /// What is to be removed when the session is over.
    pub(super) fn remains(&self) -> Remains {
        self.around.spares.shut();
        Remains { group: self.config.session_cgroup(), session_dir: self.config.session_dir.clone() }
    }

    // ---- Machines ----

    /// Takes in what an attendant tells.
    pub(super) fn take_told(&mut self, told: Told) {
        match told {
            Told::Happened(id, event) => {
                if let task::Event::TreeEnded { survivors: 1.., leaked, .. } = &event {
                    let named = leaked.iter().map(|process| format!("{} {}", process.pid, process.command));
                    self.survivors.extend(named);
                    self.survivors.truncate(SURVIVORS_NAMED_MAX);
                }
                self.feed(id, event);
            }
            Told::Recorded(id, end) => {
                if let Some(task) = self.tasks.get_mut(&id) {
                    task.end = Some(end);
                    task.orders = None;
                }
                self.feed(id, task::Event::Recorded);
                self.end_turn(id);
                self.finish_if_done();
            }
        }
    }

    /// The next task of the stream may begin.
    fn end_turn(&mut self, id: TaskId) {
        let Some(task) = self.tasks.get(&id) else { return };
        let (stream, drains) = (task.spec.stream.clone(), task.machine.drains());
        self.feed_queue(&stream, queue::Event::Withdrawn { task: id });
        self.feed_queue(&stream, queue::Event::Ended { task: id, drains });
    }

    fn feed_queue(&mut self, stream: &StreamName, event: queue::Event) {
        let now = self.now();
        let mut actions = Vec::new();
        self.queues.entry(stream.clone()).or_default().handle(event, now, &mut actions);
        for action in actions {
            match action {
                queue::Action::Prepare(id) => {
                    // What depends on the state of the host is prepared when the tasks before it have left it so.
                    if self.tasks.get(&id).is_some_and(|task| can_be_prepared_ahead(&task.spec)) {
                        self.feed(id, task::Event::BecameNext);
                    }
                }
                queue::Action::Begin(id) => self.feed(id, task::Event::TurnCame),
                queue::Action::Drain { task, after } => {
                    let after = self
                        .tasks
                        .get(&after)
                        .map_or_else(String::new, |task| task.machine.label().to_owned());
                    self.feed(task, task::Event::Drained { after });
                }
            }
        }
    }

    fn feed(&mut self, id: TaskId, event: task::Event) {
        let now = self.now();
        let Some(task) = self.tasks.get_mut(&id) else { return };
        let mut actions = Vec::new();
        task.machine.handle(event, now, &mut actions);
        match task.machine.next_deadline() {
            Some(deadline) => drop(self.deadlines.insert(id, deadline)),
            None => drop(self.deadlines.remove(&id)),
        }
        for action in actions {
            self.perform(id, action);
        }
    }

    fn tell_in_passing(&mut self, id: TaskId) {
        if self.has_door {
            self.passing.insert(id);
            let now = self.now();
            self.passing_told_at.get_or_insert(now + PASSING);
        }
    }

    fn perform(&mut self, id: TaskId, action: Action) {
        let wall_ns = self.around.world.clock.wall_ns();
        let Some(task) = self.tasks.get_mut(&id) else { return };
        if let Action::Announce = action {
            task.changed_ns = wall_ns;
            let is_held = task.machine.stage() == Stage::Staged && task.machine.pid().is_some();
            if !self.has_door {
                return;
            }
            if task.machine.stage() == Stage::Finished || is_held {
                self.changed.insert(id);
            } else {
                self.tell_in_passing(id);
            }
            return;
        }
        let orders = task.orders.get_or_insert_with(|| {
            let secret_files = std::mem::take(&mut task.secret_files);
            let (around, spec, spool) = (self.around.clone(), task.spec.clone(), task.spool.clone());
            Attendant::start(around, id, spec, secret_files, spool)
        });
        if let Err(refused) = orders.try_send(action) {
            // Only signals can be so many: everything else is ordered one after another.
            warn!(task_id = %id, %refused, "an order was not taken");
        }
    }

    // ---- What an earlier supervisor has left ----

    /// Learns of tasks from their directories. One that was begun and has no record is lost: it is never begun again.
    fn recover(&mut self) {
        let entries = fs::read_dir(self.config.session_dir.join("tasks")).into_iter().flatten().flatten();
        let ids: Vec<TaskId> = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
        for id in ids {
            let directory = task_dir(&self.config.session_dir, id);
            let read = |name: &str| fs::read(directory.join(name));
            let wire = read(SPEC_FILE).ok().and_then(|bytes| v1::TaskSpec::decode(&bytes[..]).ok());
            let Some((digest, Ok(spec))) = wire.map(|wire| (spec_sha256(&wire), TaskSpec::try_from(wire)))
            else {
                warn!(task_id = %id, "the specification of an earlier task cannot be read");
                continue;
            };
            let record = read(RECORD_FILE).ok().and_then(|bytes| v1::TaskEnd::decode(&bytes[..]).ok());
            let end = record.unwrap_or_else(|| {
                let begun = directory.join(STARTED_FILE).exists();
                let (outcome, when) = if begun {
                    (OutcomeKind::Lost, "while the task ran")
                } else {
                    (OutcomeKind::Error, "before the task began")
                };
                let detail = format!("the supervisor of the session died {when}");
                let end = v1::TaskEnd::from(&TaskEnd::never_begun(outcome, Reason::SupervisorDied, detail));
                warn!(task_id = %id, %outcome, "an earlier task has no record");
                if let Err(error) = write_record(&directory, &end) {
                    warn!(task_id = %id, %error, "terminal record not written");
                }
                end
            });
            let machine = Machine::ended(&spec);
            let task = Task {
                machine,
                spec: Arc::new(spec),
                digest,
                orders: None,
                secret_files: Vec::new(),
                spool: SharedSpool::default(),
                end: Some(Box::new(end)),
                changed_ns: self.around.world.clock.wall_ns(),
            };
            self.tasks.insert(id, task);
        }
    }
}

/// What a session that is over leaves behind.
pub(super) struct Remains {
    group: Option<PathBuf>,
    session_dir: PathBuf,
}

impl Remains {
    /// Ends and removes the session's control group with whoever is left in it.
    pub(super) async fn end_group(&self) {
        let Some(Ok(group)) = self.group.clone().map(Group::open) else { return };
        if !group.remove_if_empty() {
            Self::end_inhabited(&group).await;
        }
        // Shared with other sessions: it goes with the last one.
        if let Some(parent) = group.path().parent() {
            let _others: io::Result<()> = fs::remove_dir(parent);
        }
    }

    async fn end_inhabited(group: &Group) {
        let ending = async {
            group.kill()?;
            group.wait_until_empty(limits::KILL_MAX).await?;
            group.remove()
        };
        if let Err(error) = ending.await {
            warn!(%error, "the control group of the session is left behind");
        }
    }

    /// Removes what belongs to the tasks; the rest of the directory is the door's. Blocking.
    pub(super) fn remove(self) {
        for name in ["tasks", "sync", "bin"] {
            let directory = self.session_dir.join(name);
            if let Err(error) = workspace::remove_task(&directory) {
                warn!(path = %directory.display(), %error, "a directory of the session is left behind");
            }
        }
        info!("the session is over");
    }
}

type Refused = (Code, String);
type Answer = Result<Reply, Refused>;

fn invalid(error: impl std::fmt::Display) -> Refused {
    (Code::InvalidArgument, error.to_string())
}

fn start_reply(state: v1::TaskState, accepted: bool) -> Reply {
    let start = v1::StartTaskResponse { state: state.into(), accepted_by_this_call: accepted };
    Reply { start: Some(start), ..Reply::default() }
}

/// A machine has ended a moment before its record is known here.
fn wire_state(stage: Stage, finished: bool) -> v1::TaskState {
    match stage {
        _ if finished => v1::TaskState::Finished,
        Stage::Queued => v1::TaskState::Queued,
        Stage::Staged => v1::TaskState::Staged,
        Stage::Running => v1::TaskState::Running,
        Stage::Ending | Stage::Finished => v1::TaskState::Ending,
    }
}

/// Whether nothing that the tasks before it do can change how its directories are made.
fn can_be_prepared_ahead(spec: &TaskSpec) -> bool {
    !spec.working_directory.starts_with('/')
        && !spec.files.iter().any(|file| matches!(file.source, FileSource::HostPath(_)))
}
