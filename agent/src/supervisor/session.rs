//! One session as its supervisor holds it: tasks, queues, lease, and what the door is told of them.
//!
//! Feeds the machines with what happened and performs their actions. It waits for nothing: the loop in `supervisor.rs`
//! does, and the attendants of tasks do the work. It does not know how a process is made.

mod remains;
mod requests;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

use millstream_common::{
    clock::World,
    convert::{duration, timestamp},
    id::{StreamName, TaskId},
    limits,
    spec::{FileSource, TaskSpec},
    text::counted,
};
use millstream_proto::{
    supervisor::v1::{
        LeaseExpired, RelayFrames, Reply, SupervisorFrame, SupervisorHello, TaskChanged, supervisor_frame,
    },
    v1,
};
use tokio::{io::AsyncWrite, sync::mpsc};
use tracing::warn;

use super::{
    SupervisorConfig, SupervisorError,
    attendant::{Attendant, Grown, SharedSpool, Surroundings, Told, locked},
    blobs::Blobs,
    disk::Host,
    queue::{self, Queue},
    relay::Relay,
    spares::Spares,
    task::{self, Action, Machine, SessionEnd, Stage},
    wire::{FrameWriter, PROTOCOL, WireError},
};

use remains::{Remains, Results};

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
    /// Whether its directory was another task's, with what is made in one.
    has_spare: bool,
    spool: SharedSpool,
    end: Option<Box<v1::TaskEnd>>,
    changed_ns: u64,
}

impl Session {
    pub(super) fn new(
        config: SupervisorConfig,
        world: World,
        host: Host,
        told: mpsc::Sender<Told>,
        relayed: mpsc::Sender<RelayFrames>,
    ) -> Result<Self, SupervisorError> {
        let blobs = Blobs::open(&config.blobs_dir).map_err(SupervisorError::Blobs)?;
        let around = Surroundings {
            world: world.clone(),
            session_dir: config.session_dir.clone(),
            base_environment: config.base_environment.clone(),
            host,
            blobs,
            spares: Spares::default(),
            relay: Relay::new(relayed),
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

    /// When the lease is over, on the clock since boot, unless it is.
    pub(super) fn lease_ends(&self) -> Option<Duration> {
        self.lease.over_since.is_none().then_some(self.lease.ends)
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
        if self.lease.over_since.is_none() && self.lease.ends <= since_boot {
            self.expire(since_boot);
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

    fn lease_left(&self) -> Duration {
        match self.lease.over_since {
            Some(_) => Duration::ZERO,
            None => self.lease.ends.saturating_sub(self.around.world.clock.since_boot()),
        }
    }

    /// Once nothing runs any more in a session that is closed or whose lease is over: answers those who closed it, and is
    /// over.
    fn finish_if_done(&mut self) {
        let is_ending = !self.closing.is_empty() || self.lease.over_since.is_some();
        if !is_ending || self.over || self.unfinished() > 0 {
            return;
        }
        self.end_what_escaped();
        self.over = true;
        if self.closing.is_empty() {
            return;
        }
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
        for described in self.around.host.processes.end_marked(&is_ours) {
            warn!(pid = described.pid, command = %described.command, "a process had left its task's containment");
        }
    }

    /// What is to be removed when the session is over, and what is kept.
    pub(super) fn remains(&self) -> Remains {
        self.around.spares.shut();
        let results = match self.lease.over_since {
            Some(since) if self.closing.is_empty() => {
                Some(Results { since, tasks: self.tasks.keys().copied().collect() })
            }
            _ => None,
        };
        Remains {
            group: self.config.session_cgroup(),
            patience: if self.survivors.is_empty() { limits::KILL_MAX } else { Duration::ZERO },
            session_dir: self.config.session_dir.clone(),
            results,
        }
    }

    // ---- Machines ----

    /// Takes in what an attendant tells.
    pub(super) fn take_told(&mut self, told: Told) {
        match told {
            Told::Happened(id, event) => {
                if let task::Event::TreeEnded { survivors: 1.., leaked, .. } = &event {
                    let of = self
                        .tasks
                        .get(&id)
                        .map(|task| format!(" of {}/{}", task.spec.stream, task.spec.name));
                    let of = of.unwrap_or_default();
                    let named =
                        leaked.iter().map(|process| format!("{} {}{of}", process.pid, process.command));
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
            Attendant::start(around, id, spec, secret_files, task.has_spare, spool)
        });
        if let Err(refused) = orders.try_send(action) {
            // Only signals can be so many: everything else is ordered one after another.
            warn!(task_id = %id, %refused, "an order was not taken");
        }
    }
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
