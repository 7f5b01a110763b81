//! Attends to one task: its directories, its processes, its output. Follows the orders of the task's machine and tells
//! what came of them.
//!
//! One attendant a task, each in a small loop of its own on the supervisor's thread. It decides nothing: what follows
//! what is written in `task.rs`. What may take long (copying many files, packing results) it hands to other threads.

mod outputs;
mod staging;

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use millstream_common::{
    clock::World,
    id::TaskId,
    limits,
    log::LogChannel,
    outcome::{ArchiveInfo, LeakedProcess, Reason, TaskEnd},
    spec::{ShippedFile, TaskSpec},
};
use millstream_proto::v1;
use prost::Message as _;
use tokio::sync::mpsc;
use tracing::{info, warn};

use super::{
    account::Account,
    blobs::Blobs,
    cgroup::LEAKED_NAMED_MAX,
    disk::{Disk, Host},
    process::{Launch, moved, report_descriptor},
    processes::{Ended, Happened, ProcessTree, Started},
    relay::Relay,
    reports::{REPORTS_VARIABLE, Report, Reports},
    spares::Spares,
    spool::SpoolWriter,
    task::{Action, Event, Refusal, Sealed},
    workspace::Workspace,
};
pub use outputs::OutputEnds;
use outputs::{CHANNELS, Outputs, PIPE_BYTES, REPORT_PIPE_BYTES, Read};

/// Orders that wait for an attendant: a machine gives few before it is told what came of them, and people send signals.
pub(crate) const ORDERS_COUNT_MAX: usize = 64;
/// Where a task's record lies in its directory.
pub(crate) const RECORD_FILE: &str = "end.pb";
/// Where its specification lies.
pub(crate) const SPEC_FILE: &str = "spec.pb";
/// The mark that its first program was about to begin.
pub(crate) const STARTED_FILE: &str = "started";

/// What all attendants of a session share.
#[derive(Debug)]
pub(crate) struct Surroundings {
    /// Clock and numbers.
    pub(crate) world: World,
    /// The session's directory.
    pub(crate) session_dir: PathBuf,
    /// Environment of every block.
    pub(crate) base_environment: Vec<(String, String)>,
    /// Where processes come from and files go.
    pub(crate) host: Host,
    /// Shipped files.
    pub(crate) blobs: Blobs,
    pub(crate) spares: Spares,
    /// Blocks' calls.
    pub(crate) relay: Relay,
    /// Where attendants tell what happened.
    pub(crate) told: mpsc::Sender<Told>,
    /// Tasks whose output has grown.
    pub(crate) grown: Arc<Grown>,
}

/// What an attendant tells.
#[derive(Debug)]
pub(crate) enum Told {
    /// Something happened to a task.
    Happened(TaskId, Event),
    /// The terminal record is written; this is it.
    Recorded(TaskId, Box<v1::TaskEnd>),
}

/// Tasks whose output has grown since they were last looked at.
#[derive(Debug, Default)]
pub(crate) struct Grown {
    tasks: Mutex<Vec<TaskId>>,
    /// Rung when there is one.
    pub(crate) bell: tokio::sync::Notify,
}

impl Grown {
    fn note(&self, task: TaskId) {
        let mut tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        // At most a few tasks run at once, and the newest is the likeliest.
        if !tasks.contains(&task) {
            tasks.push(task);
            self.bell.notify_one();
        }
    }

    /// Takes them out.
    pub(crate) fn take(&self) -> Vec<TaskId> {
        std::mem::take(&mut *self.tasks.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The output of a task, shared by its attendant, which writes, and the supervisor, which tells how far it is.
pub(crate) type SharedSpool = Arc<Mutex<Option<SpoolWriter>>>;

/// The spool behind its lock; a writer that panicked has left a file that is readable as far as it was announced.
pub(crate) fn locked(spool: &SharedSpool) -> MutexGuard<'_, Option<SpoolWriter>> {
    spool.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Directory of a task.
pub(crate) fn task_dir(session_dir: &Path, task: TaskId) -> PathBuf {
    session_dir.join("tasks").join(task.to_string())
}

/// Socket of a task.
pub(crate) fn socket_path(session_dir: &Path, task: TaskId) -> PathBuf {
    session_dir.join("sync").join(format!("{}.sock", task.short()))
}

/// The attendant of one task.
pub(crate) struct Attendant {
    around: Arc<Surroundings>,
    task: TaskId,
    spec: Arc<TaskSpec>,
    secret_files: Vec<ShippedFile>,
    directory: PathBuf,
    has_spare: bool,
    spool: SharedSpool,
    staged: Option<Staged>,
}

/// What a task has from its preparation to its end.
struct Staged {
    workspace: Workspace,
    environment: Vec<(String, String)>,
    account: Option<Account>,
    tree: Box<dyn ProcessTree>,
    outputs: Outputs,
    reports: Reports,
    /// Whether the machine knows of the process of the first phase.
    begun: bool,
    /// The launch of the running phase, to explain why it could not begin.
    launch: Option<Launch>,
    has_socket: bool,
}

impl Attendant {
    /// Starts to attend to a task that was accepted. `has_spare`: its directory was another task's.
    pub(crate) fn start(
        around: Arc<Surroundings>,
        task: TaskId,
        spec: Arc<TaskSpec>,
        secret_files: Vec<ShippedFile>,
        has_spare: bool,
        spool: SharedSpool,
    ) -> mpsc::Sender<Action> {
        let (orders, received) = mpsc::channel(ORDERS_COUNT_MAX);
        let directory = task_dir(&around.session_dir, task);
        let attendant = Self { around, task, spec, secret_files, directory, has_spare, spool, staged: None };
        drop(tokio::spawn(attendant.run(received)));
        orders
    }

    async fn run(mut self, mut orders: mpsc::Receiver<Action>) {
        loop {
            let order = match &mut self.staged {
                None => orders.recv().await,
                Some(staged) => {
                    tokio::select! {
                        biased;
                        order = orders.recv() => order,
                        // What is told before the machine knows of the process would be about nothing.
                        () = staged.outputs.reported(), if staged.begun => {
                            self.take_reports().await;
                            continue;
                        }
                        happened = staged.tree.next() => {
                            self.take_in(happened).await;
                            continue;
                        }
                        channel = staged.outputs.readable() => {
                            self.read_once(channel);
                            continue;
                        }
                    }
                }
            };
            let Some(order) = order else { break };
            let is_last = matches!(order, Action::Record(_));
            self.follow(order).await;
            if is_last {
                break;
            }
        }
    }

    async fn follow(&mut self, order: Action) {
        match order {
            Action::Prepare => {
                let event = match self.prepare().await {
                    Ok(staged) => {
                        self.staged = Some(staged);
                        Event::Prepared
                    }
                    Err(refusal) => Event::NotPrepared(refusal),
                };
                self.tell(event).await;
            }
            Action::StartPhase { index, held } => self.start_phase(index, held).await,
            Action::LetGo => self.let_go().await,
            Action::Signal(signal) => {
                if let Some(staged) = &mut self.staged
                    && let Err(error) = staged.tree.signal(signal).await
                {
                    warn!(task_id = %self.task, signal, %error, "signal not sent");
                }
            }
            Action::EndTree => self.end_tree().await,
            Action::Seal => {
                let sealed = self.seal().await;
                self.tell(Event::Sealed(Box::new(sealed))).await;
            }
            Action::Record(end) => self.record(*end).await,
            // The supervisor's own.
            Action::Announce => {}
        }
    }

    async fn tell(&self, event: Event) {
        self.send(Told::Happened(self.task, event)).await;
    }

    async fn send(&self, told: Told) {
        // A supervisor that has ended has nobody to be told.
        let _gone: Result<(), _> = self.around.told.send(told).await;
    }

    async fn start_phase(&mut self, index: usize, held: bool) {
        let started = self.try_start_phase(index, held).await;
        let wall_ns = self.around.world.clock.wall_ns();
        match started {
            Ok(Some(pid)) => {
                let phase = self.spec.phases[index].phase;
                let user = self.spec.user.as_deref().unwrap_or("the agent's own");
                info!(task_id = %self.task, block = %self.spec.name, stream = %self.spec.stream, %phase, pid, user,
                    held, "started");
                self.tell_started(pid, wall_ns).await;
            }
            // Told later, by the shim.
            Ok(None) => {}
            Err(refusal) => self.tell(Event::PhaseNotStarted(refusal)).await,
        }
    }

    async fn tell_started(&mut self, pid: u32, wall_ns: u64) {
        self.tell(Event::PhaseStarted { pid, wall_ns }).await;
        if let Some(staged) = &mut self.staged {
            staged.begun = true;
        }
    }

    async fn try_start_phase(&mut self, index: usize, held: bool) -> Result<Option<u32>, Refusal> {
        let spec = self.spec.clone();
        let phase = &spec.phases[index];
        if index == 0 && !held {
            self.mark_started()?;
        }
        if index > 0 {
            // What the phase before has left in the pipes belongs before the mark of this one.
            self.drain_now();
        }
        let wall_ns = self.around.world.clock.wall_ns();
        // One that tells its phases marks them by that.
        if !phase.reports_phases
            && let Some(spool) = &mut *locked(&self.spool)
        {
            // What could not be written is on the spool's own record.
            let _noted: io::Result<u64> = spool.mark(phase.phase, wall_ns);
        }
        let staged = self.staged.as_mut().expect("a phase is ordered only of a task that was prepared");
        let mut environment = staged.environment.clone();
        let reports = phase.reports_phases.then(|| report_descriptor(phase.output));
        environment.retain(|(name, _)| name != REPORTS_VARIABLE);
        environment.extend(reports.map(|number| (REPORTS_VARIABLE.to_owned(), number.to_string())));
        let launch = Launch {
            argv: phase.argv.clone(),
            environment,
            working_directory: staged.workspace.working_directory().to_owned(),
            user: staged.account.clone(),
            moved: moved(phase.output),
            held,
            reports,
        };
        let started = staged.tree.start(&launch).await;
        staged.launch = Some(launch);
        Ok(match started? {
            Started::Now(pid) => Some(pid),
            Started::ToldLater => None,
        })
    }

    /// Marks that the task's first program is about to begin. Exclusively: a task runs at most once, whatever happens.
    fn mark_started(&self) -> Result<(), Refusal> {
        let path = self.directory.join(STARTED_FILE);
        let admitted = self.around.host.disk.admit(&path, 0);
        let made = admitted.and_then(|()| fs::OpenOptions::new().write(true).create_new(true).open(&path));
        made.map(drop).map_err(|error| Refusal {
            reason: if error.kind() == io::ErrorKind::AlreadyExists {
                Reason::StateCorrupt
            } else {
                Reason::HostExhausted
            },
            detail: format!("the start of the task cannot be marked in `{}`: {error}", path.display()),
        })
    }

    async fn let_go(&mut self) {
        match self.mark_started() {
            Ok(()) => {
                let wall_ns = self.around.world.clock.wall_ns();
                if let Some(staged) = &mut self.staged {
                    staged.tree.let_go().await;
                }
                self.tell(Event::Went { wall_ns }).await;
            }
            Err(refusal) => self.tell(Event::PhaseNotStarted(refusal)).await,
        }
    }

    async fn take_in(&mut self, happened: Happened) {
        match happened {
            Happened::Started { pid } => {
                let wall_ns = self.around.world.clock.wall_ns();
                self.tell_started(pid, wall_ns).await;
            }
            Happened::NotStarted(refusal) => self.tell(Event::PhaseNotStarted(refusal)).await,
            Happened::Exited { exit, failure } => {
                // Everything that the process itself has told and printed is in the pipes by now.
                self.take_reports().await;
                self.drain_now();
                let staged = self.staged.as_ref().expect("only what was staged can exit");
                let event = match (failure, &staged.launch) {
                    (Some(failure), Some(launch)) => Event::PhaseNotStarted(failure.refusal(launch)),
                    _ => Event::PhaseExited { exit, out_of_memory: staged.tree.out_of_memory() },
                };
                self.tell(event).await;
            }
        }
    }

    /// Takes in what the command has told of its phases.
    async fn take_reports(&mut self) {
        let mut piece = [0; REPORT_PIPE_BYTES];
        let Some(staged) = &mut self.staged else { return };
        let bytes = staged.outputs.read_reports(&mut piece);
        let mut told = Vec::new();
        staged.reports.take(bytes, &mut told);
        for report in told {
            if let Report::Began(phase) = report {
                // What the phase before has printed belongs before the mark of this one.
                self.drain_now();
                let wall_ns = self.around.world.clock.wall_ns();
                if let Some(spool) = &mut *locked(&self.spool) {
                    let _noted: io::Result<u64> = spool.mark(phase, wall_ns);
                }
                self.around.grown.note(self.task);
            }
            self.tell(Event::PhaseReported(report)).await;
        }
    }

    /// Reads one piece of one output.
    fn read_once(&mut self, channel: LogChannel) {
        let Some(staged) = &mut self.staged else { return };
        if let Read::Bytes(_) = staged.outputs.read(channel, &self.spool, &self.around.world) {
            self.around.grown.note(self.task);
        }
    }

    /// Reads what is in the pipes now, but never more than they hold twice over: somebody may go on writing.
    fn drain_now(&mut self) {
        let Some(staged) = &mut self.staged else { return };
        for channel in CHANNELS {
            let mut read = 0;
            while let Read::Bytes(length) = staged.outputs.read(channel, &self.spool, &self.around.world) {
                read += length;
                if read >= 2 * PIPE_BYTES {
                    break;
                }
            }
            if read > 0 {
                self.around.grown.note(self.task);
            }
        }
    }

    async fn end_tree(&mut self) {
        let Some(staged) = &mut self.staged else { return };
        let mut ended = staged.tree.end().await;
        staged.launch = None;
        if let Some(exit) = ended.exit {
            self.tell(Event::PhaseExited { exit, out_of_memory: false }).await;
        }
        let held = self.drain_to_the_end().await;
        if held || ended.uncertain {
            self.find_escaped(&mut ended);
        }
        if let Some(staged) = &mut self.staged {
            staged.tree.remove_limits();
        }
        let wall_ns = self.around.world.clock.wall_ns();
        let Ended { leaked, leaked_count, survivors, .. } = ended;
        if leaked_count > 0 {
            let commands: Vec<_> = leaked.iter().map(|process| process.command.as_str()).collect();
            info!(task_id = %self.task, leaked_count, survivors, ?commands, "ended what the block left running");
        }
        self.tell(Event::TreeEnded { leaked, leaked_count, survivors, wall_ns }).await;
    }

    /// Reads all that is left in the pipes once the tree is dead, and tells whether somebody outside of the tree still
    /// holds one of them. Their end is never waited for.
    async fn drain_to_the_end(&mut self) -> bool {
        let clock = self.around.world.clock.clone();
        let give_up_at = clock.now() + limits::DRAIN_MAX;
        let mut held = false;
        for channel in CHANNELS {
            loop {
                let Some(staged) = &mut self.staged else { return false };
                match staged.outputs.read(channel, &self.spool, &self.around.world) {
                    Read::Bytes(_) => self.around.grown.note(self.task),
                    Read::Nothing => {
                        held = true;
                        break;
                    }
                    Read::End => break,
                }
                if clock.now() >= give_up_at {
                    held = true;
                    break;
                }
                // Somebody may write as fast as we read: the others get their turn.
                tokio::task::yield_now().await;
            }
        }
        held
    }

    /// Ends who left the containment and still holds an output: found by the task's mark.
    fn find_escaped(&self, ended: &mut Ended) {
        let own = self.task.to_string();
        for described in self.around.host.processes.end_marked(&|mark| mark == own) {
            warn!(task_id = %self.task, pid = described.pid, command = %described.command,
                "a process had left the containment of its task");
            name_leaked(&mut ended.leaked, described);
            ended.leaked_count += 1;
        }
    }

    async fn seal(&mut self) -> Sealed {
        let mut sealed = Sealed::default();
        if let Some(spool) = &mut *locked(&self.spool) {
            sealed.log = spool.finish();
            sealed.last_lines = spool.last_lines();
            sealed.trouble =
                spool.first_error().map(|error| format!("some output could not be kept: {error}"));
        }
        let Some(staged) = &self.staged else { return sealed };
        let workspace = staged.workspace.clone();
        let is_empty = |path: &Path| fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_none());
        if is_empty(workspace.output()) && !workspace.whiteboard().exists() {
            // The usual case, and too little to leave this thread for.
            return sealed;
        }
        let packed = tokio::task::spawn_blocking(move || workspace.seal_and_pack()).await;
        match packed {
            Ok(Ok(Some(packed))) => {
                sealed.skipped = packed.skipped;
                sealed.archive = Some(self.with_small_archive_inline(packed.info));
            }
            Ok(Ok(None)) => {}
            Ok(Err(error)) => {
                sealed.trouble.get_or_insert(told_in_full(&error));
            }
            Err(error) => {
                sealed.trouble.get_or_insert(format!("failed to pack the results: {error}"));
            }
        }
        sealed
    }

    /// Small results travel with the record.
    fn with_small_archive_inline(&self, mut info: ArchiveInfo) -> ArchiveInfo {
        if info.inline.is_empty() && info.size_bytes <= limits::ARCHIVE_INLINE_BYTES_MAX {
            match fs::read(super::workspace::archive_path(&self.directory)) {
                Ok(bytes) => info.inline = bytes.into(),
                // It can be fetched all the same, or the fetch tells why not.
                Err(error) => warn!(task_id = %self.task, %error, "archive not read"),
            }
        }
        info
    }

    async fn record(&mut self, end: TaskEnd) {
        info!(task_id = %self.task, block = %self.spec.name, stream = %self.spec.stream, outcome = %end.outcome,
            reason = %end.reason, "ended");
        if self.staged.take().is_some_and(|staged| staged.has_socket) {
            self.around.relay.close(self.task);
        }
        let end = v1::TaskEnd::from(&end);
        if let Err(error) = write_record(&*self.around.host.disk, &self.directory, &end) {
            // It is known as long as this supervisor lives.
            warn!(task_id = %self.task, %error, "terminal record not written");
        }
        self.send(Told::Recorded(self.task, Box::new(end))).await;
    }
}

/// Names one more process, as long as there is room.
pub(crate) fn name_leaked(leaked: &mut Vec<LeakedProcess>, process: LeakedProcess) {
    if leaked.len() < LEAKED_NAMED_MAX {
        leaked.push(process);
    }
}

/// An error with its causes, for the one line that a record has.
pub(super) fn told_in_full(error: &dyn std::error::Error) -> String {
    let mut told = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let sentence = error.to_string();
        // Some errors repeat their cause.
        if !told.ends_with(&sentence) {
            told = format!("{told}: {sentence}");
        }
        cause = error.source();
    }
    told
}

/// Writes the terminal record: it is there completely or not at all.
///
/// # Errors
/// When it cannot be written.
pub(crate) fn write_record(disk: &dyn Disk, directory: &Path, end: &v1::TaskEnd) -> io::Result<()> {
    disk.admit(&directory.join(RECORD_FILE), end.encoded_len())?;
    let fresh = directory.join(".end.pb.new");
    fs::write(&fresh, end.encode_to_vec())?;
    fs::rename(&fresh, directory.join(RECORD_FILE))
}
