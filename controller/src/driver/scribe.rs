//! The thread that writes results: logs, archives and outcomes go to disk in the order in which they came.
//!
//! Links hand over what arrives and wait while too much of it is unwritten, so that a slow disk slows the reading down
//! and nothing else: leases are kept by others. Lines are made here, too, for `tracing`, for callbacks and for whoever
//! follows a task. Nothing here decides when a task is over.

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    fmt,
    sync::{Arc, Condvar, Mutex, PoisonError, Weak},
    thread::JoinHandle,
};

use bytes::Bytes;
use millstream_common::{
    archive::Extractor,
    id::TaskId,
    log::{LogChannel, LogRecord},
    outcome::TaskEnd,
};
use tokio::sync::Semaphore;
use tracing::info;

use crate::{
    results::{
        lines::{Line, LineSplitter},
        nested::{NestedTask, Within, bring_home},
        report::{TaskReport, TaskSubject},
        timeline::HostClock,
        writer::TaskFiles,
    },
    task::{LogLine, TaskLog, TaskShared},
};

/// Unwritten bytes, in units of [`UNIT_BYTES`]: 8 MiB keep a disk busy for some 10 ms.
const UNITS_COUNT: usize = 8 * 1024;
const UNIT_BYTES: usize = 1024;

/// What is done with each line, besides writing it.
pub(crate) type OnLog = Arc<dyn Fn(&LogLine) + Send + Sync>;

/// The thread.
#[derive(Debug)]
pub(crate) struct Scribe {
    jobs: Arc<Jobs>,
    thread: Option<JoinHandle<()>>,
}

struct Jobs {
    waiting: Mutex<VecDeque<Job>>,
    arrived: Condvar,
    /// Room for bytes that are not written yet.
    room: Semaphore,
    /// Where there is no thread: everything is written by whoever hands it over.
    in_place: Option<Mutex<Desk>>,
}

impl fmt::Debug for Jobs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Jobs").finish_non_exhaustive()
    }
}

impl Jobs {
    fn new(in_place: Option<Mutex<Desk>>) -> Self {
        Self {
            waiting: Mutex::default(),
            arrived: Condvar::new(),
            room: Semaphore::new(UNITS_COUNT),
            in_place,
        }
    }

    fn put(&self, job: Job) {
        if let Some(desk) = &self.in_place {
            let mut desk = desk.lock().unwrap_or_else(PoisonError::into_inner);
            self.room.add_permits(desk.perform(job));
            desk.flush();
            return;
        }
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).push_back(job);
        self.arrived.notify_one();
    }
}

enum Job {
    Begin { task: Arc<TaskShared>, files: Box<TaskFiles>, clock: HostClock },
    Records { task: TaskId, records: Vec<LogRecord>, units: usize },
    ArchiveBegins { task: TaskId, size_bytes: u64, sha256: String },
    ArchivePiece { task: TaskId, data: Bytes, units: usize },
    ArchiveEnds { task: TaskId },
    Finish(Box<Finish>),
    Stop,
}

/// Everything that completes a task's files.
pub(crate) struct Finish {
    pub(crate) subject: TaskSubject,
    pub(crate) end: TaskEnd,
    pub(crate) clock: HostClock,
    pub(crate) caused_by: Option<String>,
    /// What could not be had of it.
    pub(crate) problem: Option<String>,
    /// Whether it may have run streams itself.
    pub(crate) runs_streams: bool,
    /// Its files, when nothing was ever written.
    pub(crate) unopened: Option<TaskFiles>,
    /// Called on the thread when all is written.
    pub(crate) done: Box<dyn FnOnce(Written) + Send>,
}

/// What came of writing.
#[derive(Debug)]
pub(crate) struct Written {
    pub(crate) task: TaskId,
    pub(crate) report: TaskReport,
    pub(crate) end: TaskEnd,
    pub(crate) results: std::path::PathBuf,
    /// What is missing on disk and why.
    pub(crate) problem: Option<String>,
    /// Tasks of the streams that it ran itself.
    pub(crate) nested: Vec<NestedTask>,
}

/// Where a link puts what arrives of one task.
#[derive(Debug, Clone)]
pub(crate) struct Recorder {
    task: TaskId,
    jobs: Arc<Jobs>,
}

impl Recorder {
    /// Takes in output, in order. Waits while too much is unwritten.
    pub(crate) async fn records(&self, records: Vec<LogRecord>) {
        let bytes = records.iter().map(|record| record.data.len()).sum();
        let units = self.room(bytes).await;
        self.jobs.put(Job::Records { task: self.task, records, units });
    }

    /// Takes in a small archive as a whole. Waits for nothing: no task has more than one.
    pub(crate) fn archive_whole(&self, size_bytes: u64, sha256: &str, data: Bytes) {
        self.archive_begins(size_bytes, sha256);
        self.jobs.put(Job::ArchivePiece { task: self.task, data, units: 0 });
        self.archive_ends();
    }

    /// An archive begins.
    pub(crate) fn archive_begins(&self, size_bytes: u64, sha256: &str) {
        self.jobs.put(Job::ArchiveBegins { task: self.task, size_bytes, sha256: sha256.to_owned() });
    }

    /// Takes in the next piece of it. Waits while too much is unwritten.
    pub(crate) async fn archive_piece(&self, data: Bytes) {
        let units = self.room(data.len()).await;
        self.jobs.put(Job::ArchivePiece { task: self.task, data, units });
    }

    /// The archive is complete.
    pub(crate) fn archive_ends(&self) {
        self.jobs.put(Job::ArchiveEnds { task: self.task });
    }

    async fn room(&self, bytes: usize) -> usize {
        let units = (bytes / UNIT_BYTES).min(UNITS_COUNT);
        let wanted = u32::try_from(units).unwrap_or(u32::MAX);
        if let Ok(permit) = self.jobs.room.acquire_many(wanted).await {
            // Given back by the thread when the bytes are written.
            permit.forget();
        }
        units
    }
}

impl Scribe {
    /// Starts the thread.
    ///
    /// # Errors
    /// When the system has no thread to give.
    pub(crate) fn start(on_log: Vec<OnLog>) -> std::io::Result<Self> {
        let jobs = Arc::new(Jobs::new(None));
        let thread = std::thread::Builder::new().name("millstream-results".to_owned()).spawn({
            let jobs = Arc::clone(&jobs);
            move || Desk::new(on_log).run(&jobs)
        })?;
        Ok(Self { jobs, thread: Some(thread) })
    }

    /// A scribe without a thread: it writes at once, in the time of whoever hands something over. For a simulation, whose
    /// clock does not wait for threads.
    pub(crate) fn in_place(on_log: Vec<OnLog>) -> Self {
        Self { jobs: Arc::new(Jobs::new(Some(Mutex::new(Desk::new(on_log))))), thread: None }
    }

    /// Opens the files of a task that is about to be handed over.
    pub(crate) fn begin(&self, task: &Arc<TaskShared>, files: TaskFiles, clock: HostClock) -> Recorder {
        self.jobs.put(Job::Begin { task: Arc::clone(task), files: Box::new(files), clock });
        Recorder { task: task.id, jobs: Arc::clone(&self.jobs) }
    }

    /// Completes the files of a task.
    pub(crate) fn finish(&self, finish: Finish) {
        self.jobs.put(Job::Finish(Box::new(finish)));
    }

    /// Ends the thread after everything that was handed over before.
    pub(crate) fn stop(mut self) {
        self.jobs.put(Job::Stop);
        if let Some(thread) = self.thread.take() {
            // A panic on the thread has been printed; there is nothing to add.
            let _joined = thread.join();
        }
    }
}

/// Files of one task while it runs.
struct Open {
    files: TaskFiles,
    clock: HostClock,
    label: String,
    stream: String,
    number: u32,
    /// Gone when nobody holds the task any more: then its lines need not be kept.
    log: Weak<TaskLog>,
    stdout: LineSplitter,
    stderr: LineSplitter,
    archive: Option<Incoming>,
    problem: Option<String>,
}

struct Incoming {
    extractor: Extractor,
    size_bytes: u64,
    sha256: String,
}

struct Desk {
    on_log: Vec<OnLog>,
    open: HashMap<TaskId, Open>,
    /// Tasks with output that people cannot see yet.
    unflushed: BTreeSet<TaskId>,
}

impl Desk {
    fn new(on_log: Vec<OnLog>) -> Self {
        Self { on_log, open: HashMap::new(), unflushed: BTreeSet::new() }
    }

    fn run(mut self, jobs: &Jobs) {
        loop {
            let job = {
                let mut waiting = jobs.waiting.lock().unwrap_or_else(PoisonError::into_inner);
                if waiting.is_empty() && !self.unflushed.is_empty() {
                    drop(waiting);
                    // A moment of silence: what was printed becomes visible.
                    self.flush();
                    continue;
                }
                loop {
                    match waiting.pop_front() {
                        Some(job) => break job,
                        None => waiting = jobs.arrived.wait(waiting).unwrap_or_else(PoisonError::into_inner),
                    }
                }
            };
            if let Job::Stop = job {
                return self.flush();
            }
            jobs.room.add_permits(self.perform(job));
        }
    }

    /// Does one job. Gives the units of room that it had taken.
    fn perform(&mut self, job: Job) -> usize {
        match job {
            // Nothing is open at the end but what is flushed.
            Job::Stop => {}
            Job::Begin { task, files, clock } => self.begin(&task, *files, clock),
            Job::Records { task, records, units } => {
                self.records(task, &records);
                return units;
            }
            Job::ArchiveBegins { task, size_bytes, sha256 } => self.archive_begins(task, size_bytes, sha256),
            Job::ArchivePiece { task, data, units } => {
                self.archive_piece(task, &data);
                return units;
            }
            Job::ArchiveEnds { task } => self.archive_ends(task),
            Job::Finish(finish) => self.finish(*finish),
        }
        0
    }

    fn flush(&mut self) {
        for task in std::mem::take(&mut self.unflushed) {
            if let Some(open) = self.open.get_mut(&task) {
                let flushed = open.files.flush();
                open.note(flushed);
            }
        }
    }

    fn begin(&mut self, task: &Arc<TaskShared>, mut files: TaskFiles, clock: HostClock) {
        files.set_clock(clock);
        let open = Open {
            files,
            clock,
            label: task.label(),
            stream: task.stream.to_string(),
            number: task.test_number,
            log: task.log.lock().unwrap_or_else(PoisonError::into_inner).clone(),
            stdout: LineSplitter::default(),
            stderr: LineSplitter::default(),
            archive: None,
            problem: None,
        };
        self.open.insert(task.id, open);
    }

    fn records(&mut self, task: TaskId, records: &[LogRecord]) {
        let Some(open) = self.open.get_mut(&task) else { return };
        for record in records {
            let written = open.files.log(record);
            open.note(written);
            open.lines(record, &self.on_log);
        }
        self.unflushed.insert(task);
    }

    fn archive_begins(&mut self, task: TaskId, size_bytes: u64, sha256: String) {
        let Some(open) = self.open.get_mut(&task) else { return };
        let extractor = open.files.extractor();
        if let Some(extractor) = open.note(extractor) {
            open.archive = Some(Incoming { extractor, size_bytes, sha256 });
        }
    }

    fn archive_piece(&mut self, task: TaskId, data: &[u8]) {
        let Some(open) = self.open.get_mut(&task) else { return };
        if let Some(incoming) = &mut open.archive
            && let Err(error) = incoming.extractor.write(data)
        {
            // Dropping it removes what was extracted: a part of an archive is worse than none.
            open.archive = None;
            open.fail(&error);
        }
    }

    fn archive_ends(&mut self, task: TaskId) {
        let Some(open) = self.open.get_mut(&task) else { return };
        if let Some(Incoming { extractor, size_bytes, sha256 }) = open.archive.take()
            && let Err(error) = extractor.finish(size_bytes, &sha256)
        {
            open.fail(&error);
        }
    }

    fn finish(&mut self, finish: Finish) {
        let Finish { subject, end, clock, caused_by, problem, runs_streams, unopened, done } = finish;
        let task = subject.task_id;
        self.unflushed.remove(&task);
        let (mut files, written) = match (self.open.remove(&task), unopened) {
            (Some(mut open), _) => {
                open.finish_lines(&self.on_log);
                (open.files, open.problem)
            }
            (None, Some(files)) => (files, None),
            (None, None) => return,
        };
        files.set_clock(clock);
        let results = files.directory().to_owned();
        let directory = files.relative_directory().to_string_lossy().into_owned();
        let nested = if runs_streams {
            let label = format!("{}/{}-{}", subject.stream, subject.stream_number, subject.block);
            bring_home(Within { label: &label, directory: &results, relative: &directory, clock })
        } else {
            Ok(Vec::new())
        };
        let (nested, unmoved) = match nested {
            Ok(nested) => (nested, None),
            Err(error) => {
                (Vec::new(), Some(format!("the results of its own streams are not in their place: {error}")))
            }
        };
        let report = TaskReport::new(subject, &end, clock, caused_by, directory);
        let finished = files.finish(&report).err().map(|error| with_causes(&error));
        let problem = problem.or(written).or(unmoved).or(finished);
        done(Written { task, report, end, results, problem, nested });
    }
}

/// An error and its causes in one line.
pub(crate) fn with_causes(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        let next_text = next.to_string();
        if !text.ends_with(&next_text) {
            text += ": ";
            text += &next_text;
        }
        cause = next.source();
    }
    text
}

impl Open {
    /// Keeps the first thing that went wrong.
    fn note<T, E: std::error::Error + 'static>(&mut self, result: Result<T, E>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(error) => {
                self.fail(&error);
                None
            }
        }
    }

    fn fail(&mut self, error: &(dyn std::error::Error + 'static)) {
        if self.problem.is_none() {
            self.problem = Some(with_causes(error));
        }
    }

    fn lines(&mut self, record: &LogRecord, on_log: &[OnLog]) {
        let (splitter, channel) = match record.channel {
            LogChannel::Stdout => (&mut self.stdout, LogChannel::Stdout),
            LogChannel::Stderr => (&mut self.stderr, LogChannel::Stderr),
            LogChannel::Mark => return,
        };
        let teller = Teller {
            clock: self.clock,
            label: &self.label,
            stream: &self.stream,
            number: self.number,
            log: self.log.upgrade(),
            on_log,
        };
        if record.skipped_bytes > 0 {
            let note = format!("[millstream: {} bytes were not kept here]", record.skipped_bytes);
            splitter.finish(|line| teller.tell(channel, line));
            splitter
                .push(format!("{note}\n").as_bytes(), record.read_time_ns, |line| teller.tell(channel, line));
        } else {
            splitter.push(&record.data, record.read_time_ns, |line| teller.tell(channel, line));
        }
    }

    fn finish_lines(&mut self, on_log: &[OnLog]) {
        let teller = Teller {
            clock: self.clock,
            label: &self.label,
            stream: &self.stream,
            number: self.number,
            log: self.log.upgrade(),
            on_log,
        };
        self.stdout.finish(|line| teller.tell(LogChannel::Stdout, line));
        self.stderr.finish(|line| teller.tell(LogChannel::Stderr, line));
    }
}

/// Tells a line to everybody who wants it.
struct Teller<'a> {
    clock: HostClock,
    label: &'a str,
    stream: &'a str,
    number: u32,
    log: Option<Arc<TaskLog>>,
    on_log: &'a [OnLog],
}

impl Teller<'_> {
    fn tell(&self, channel: LogChannel, line: Line<'_>) {
        let traced = tracing::enabled!(target: "millstream::log", tracing::Level::INFO);
        if !traced && self.on_log.is_empty() && self.log.is_none() {
            return;
        }
        let line = LogLine {
            stream: self.stream.to_owned(),
            task: self.label.to_owned(),
            test_number: self.number,
            is_stderr: channel == LogChannel::Stderr,
            time_ns: self.clock.to_controller(line.time_ns),
            text: String::from_utf8_lossy(line.text).into_owned(),
        };
        if traced {
            let output = if line.is_stderr { "stderr" } else { "stdout" };
            info!(target: "millstream::log", stream = self.stream, task = self.label, output, "{line}");
        }
        for callback in self.on_log {
            callback(&line);
        }
        if let Some(log) = &self.log {
            log.push(line);
        }
    }
}
