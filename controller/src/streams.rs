//! All streams of one test, as its user holds them.
//!
//! A handle numbers blocks and hands them to the driver; it decides nothing about when and where they run. Opening
//! connects nothing: hosts are reached when their streams are first used.

use std::{
    collections::BTreeMap,
    env, fmt,
    ops::{Bound, RangeBounds},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    time::Duration,
};

use bytes::Bytes;
pub use millstream_common::sync_client::Released;
use millstream_common::{
    clock::World,
    id::{BarrierName, NameError, StreamName, TestName, TopicName},
    limits,
    outcome::{LogTotals, OutcomeKind, Reason},
    text::{self, counted, spoken},
};
use tokio::sync::watch;
use tracing::warn;

use crate::{
    block::Block,
    blocking::block_on_for,
    definition::{self, DEFAULT_PATH, Defaults, DefineStreamError, Definition, Definitions, Kinds},
    driver::{
        self, Driver, Handle, Input, Schedule, Setup,
        mailbox::Mailbox,
        scribe::{OnLog, Scribe},
    },
    link::LinkOptions,
    outcome::{FailureReport, Outcome, Report},
    params::{DefineStreamsError, Origin, Params, sources::Sources},
    reach::{self, Place, PlaceError, Reach, local::Local},
    results::{Layout, WriteResultsError, writer::ResultsWriter},
    stream::{Stream, StreamGroup},
    sync::{
        host::{AwaitError, EnterError, PublishError, Subscription, SyncHost},
        topic::{Content, Value},
    },
    task::{LogLine, Stage, Task, TaskLog, TaskShared},
};

/// Variable with the directory of results, when the test names none.
const RESULTS_VARIABLE: &str = "MILLSTREAM_RESULTS_DIR";
/// Directory of results when nobody names one.
const RESULTS_DIRECTORY: &str = "results";
/// Threads of the driver's runtime: one may be busy while the other renews leases.
const WORKERS_COUNT: usize = 2;

/// What the driver and the handles know of a stream.
#[derive(Debug)]
pub(crate) struct StreamShared {
    pub(crate) name: StreamName,
    pub(crate) index: usize,
    pub(crate) reach: Arc<dyn Reach>,
    pub(crate) host: String,
    /// Its definition as one line.
    pub(crate) definition: String,
    pub(crate) defaults: Defaults,
    pub(crate) is_local: bool,
    /// Whether the host is to be reserved.
    pub(crate) exclusive: bool,
}

/// What the driver and the handles of a test share.
#[derive(Debug)]
pub(crate) struct TestShared {
    pub(crate) test: TestName,
    registry: Mutex<Registry>,
    /// Number of tasks without an outcome.
    unfinished: watch::Sender<usize>,
}

#[derive(Debug, Default)]
struct Registry {
    streams: Vec<Arc<StreamShared>>,
    by_name: BTreeMap<StreamName, usize>,
    /// Number of tasks of each stream.
    counts: Vec<u32>,
    tasks_count: u32,
    /// By number in the test.
    outcomes: BTreeMap<u32, Arc<Outcome>>,
    /// Tasks without an outcome, by number in the test.
    unfinished: BTreeMap<u32, Arc<TaskShared>>,
}

impl TestShared {
    fn lock(&self) -> MutexGuard<'_, Registry> {
        self.registry.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Every defined stream, in its order.
    pub(crate) fn streams(&self) -> Vec<Arc<StreamShared>> {
        self.lock().streams.clone()
    }

    /// A task has its outcome.
    pub(crate) fn finished(&self, outcome: Arc<Outcome>) {
        let mut registry = self.lock();
        registry.unfinished.remove(&outcome.test_number);
        registry.outcomes.insert(outcome.test_number, outcome);
        drop(registry);
        self.unfinished.send_modify(|count| *count = count.saturating_sub(1));
    }

    /// A task came after the end of the test.
    pub(crate) fn refuse(&self, task: &TaskShared) {
        let outcome = Arc::new(never_run(task, Reason::SessionClosed, "the streams are closed"));
        if task.outcome.set(Arc::clone(&outcome)).is_ok() {
            self.finished(outcome);
            task.stage.send_replace(Stage::Finished);
        }
    }

    /// The driver has failed: nobody will say anything of these tasks any more.
    fn abandon(&self) {
        let unfinished = std::mem::take(&mut self.lock().unfinished);
        for task in unfinished.values() {
            let detail = "the driver of the test failed; please report it with its message";
            let outcome = Arc::new(never_run(task, Reason::Internal, detail));
            if task.outcome.set(Arc::clone(&outcome)).is_ok() {
                self.finished(outcome);
                task.stage.send_replace(Stage::Finished);
            }
        }
    }

    /// Everything that has an outcome.
    pub(crate) fn report(&self) -> Report {
        Report { test: self.test.clone(), outcomes: self.lock().outcomes.values().cloned().collect() }
    }
}

fn never_run(task: &TaskShared, reason: Reason, detail: &str) -> Outcome {
    let kind = if reason == Reason::SessionClosed { OutcomeKind::Cancelled } else { OutcomeKind::Error };
    Outcome {
        task_id: task.id,
        stream: task.stream.clone(),
        host: task.host.clone(),
        block: task.block.clone(),
        stream_number: task.stream_number,
        test_number: task.test_number,
        kind,
        reason,
        phase: None,
        command: Vec::new(),
        exit: None,
        detail: detail.to_owned(),
        expectation: task.expectation,
        schedule_time_ns: task.schedule_time_ns,
        start_time_ns: None,
        end_time_ns: None,
        duration: Duration::ZERO,
        phases: Vec::new(),
        leaked: Vec::new(),
        leaked_count: 0,
        log: LogTotals::default(),
        last_lines: Vec::new(),
        skipped: Vec::new(),
        results: PathBuf::new(),
        results_error: None,
        caused_by: None,
    }
}

/// What handles need: the driver and what they share with it.
#[derive(Debug)]
pub(crate) struct Core {
    shared: Arc<TestShared>,
    driver: Handle,
    sync: SyncHost,
    world: World,
    writer: ResultsWriter,
    reaches: reach::Surroundings,
    strict: bool,
    /// What could not be tidied, once the driver has ended.
    ended: watch::Receiver<Option<Vec<String>>>,
}

impl Core {
    /// Schedules a block. Numbers, the board of barriers and the driver's inbox agree on the order.
    pub(crate) fn schedule(
        &self,
        stream: &Arc<StreamShared>,
        block: Block,
        held: bool,
        group_size: Option<u32>,
    ) -> Task {
        let log = Arc::new(TaskLog::new());
        let mut registry = self.shared.lock();
        registry.tasks_count += 1;
        let count = &mut registry.counts[stream.index];
        *count += 1;
        let stream_number = *count;
        let task = Arc::new(TaskShared {
            id: self.world.ids.task_id(),
            stream: stream.name.clone(),
            stream_number,
            test_number: registry.tasks_count,
            block: block.block_name(),
            expectation: block.expectation(),
            schedule_time_ns: self.world.clock.wall_ns(),
            host: stream.host.clone(),
            outcome: OnceLock::new(),
            stage: watch::Sender::new(Stage::Queued),
            log: Mutex::new(Arc::downgrade(&log)),
        });
        let too_many =
            usize::try_from(registry.tasks_count).unwrap_or(usize::MAX) > limits::TEST_TASKS_COUNT_MAX;
        self.shared.unfinished.send_modify(|count| *count += 1);
        registry.unfinished.insert(task.test_number, Arc::clone(&task));
        let handle = Task { shared: Arc::clone(&task), log, driver: self.driver.clone() };
        if too_many {
            drop(registry);
            let detail = format!("a test has at most {} tasks", limits::TEST_TASKS_COUNT_MAX);
            let outcome = Arc::new(never_run(&task, Reason::InvalidBlock, &detail));
            if task.outcome.set(Arc::clone(&outcome)).is_ok() {
                self.shared.finished(outcome);
                task.stage.send_replace(Stage::Finished);
            }
            return handle;
        }
        let label = crate::sync::host::SpeakerLabel {
            stream: stream.name.clone(),
            number: stream_number,
            block: task.block.clone(),
        };
        // Known to the board before anybody can wait for it.
        self.sync.task_scheduled(task.id, label, block.declared_barriers(), group_size);
        let scheduled = self.driver.schedule(Schedule {
            task: Arc::clone(&task),
            stream: Arc::clone(stream),
            block,
            held,
        });
        drop(registry);
        if !scheduled {
            self.shared.refuse(&task);
        }
        handle
    }

    fn define(&self, definition: Definition) -> Result<Arc<StreamShared>, StreamError> {
        let mut registry = self.shared.lock();
        self.define_in(&mut registry, definition)
    }

    fn define_in(
        &self,
        registry: &mut Registry,
        definition: Definition,
    ) -> Result<Arc<StreamShared>, StreamError> {
        if registry.by_name.contains_key(&definition.name) {
            return Err(StreamError::Taken { name: definition.name });
        }
        let index = registry.streams.len();
        let stream = Arc::new(stream_of(definition, index, &self.reaches)?);
        registry.by_name.insert(stream.name.clone(), index);
        registry.streams.push(Arc::clone(&stream));
        registry.counts.push(0);
        Ok(stream)
    }

    /// The stream at an index; those that are missing before it are defined on the way.
    fn at(&self, index: usize) -> Result<Arc<StreamShared>, StreamError> {
        let mut registry = self.shared.lock();
        if let Some(stream) = registry.streams.get(index) {
            return Ok(Arc::clone(stream));
        }
        if self.strict || index >= limits::STREAMS_COUNT_MAX {
            return Err(StreamError::NoIndex { index, count: registry.streams.len() });
        }
        loop {
            let next = registry.streams.len();
            let name = free_name(&registry, next);
            let origin = Origin::named("the test");
            let stream = self.define_in(&mut registry, Definition::local(name, origin))?;
            if next == index {
                return Ok(stream);
            }
        }
    }

    fn named(&self, name: &str) -> Result<Arc<StreamShared>, StreamError> {
        let name = StreamName::new(name).map_err(StreamError::Name)?;
        let mut registry = self.shared.lock();
        if let Some(&index) = registry.by_name.get(&name) {
            return Ok(Arc::clone(&registry.streams[index]));
        }
        if self.strict {
            let known: Vec<String> =
                registry.streams.iter().map(|stream| format!("`{}`", stream.name)).collect();
            let names = registry.streams.iter().map(|stream| stream.name.as_str());
            let nearest = text::nearest(name.as_str(), names).map(str::to_owned);
            return Err(StreamError::Unknown { name, known: known.join(", "), nearest });
        }
        self.define_in(&mut registry, Definition::local(name, Origin::named("the test")))
    }
}

/// A name for the stream at an index: its number, with a suffix where that is taken.
fn free_name(registry: &Registry, index: usize) -> StreamName {
    let mut name = index.to_string();
    loop {
        let parsed = StreamName::new(&name).expect("digits and underscores are valid in names");
        if !registry.by_name.contains_key(&parsed) {
            return parsed;
        }
        name.push('_');
    }
}

fn stream_of(
    definition: Definition,
    index: usize,
    reaches: &reach::Surroundings,
) -> Result<StreamShared, StreamError> {
    let line = definition.to_string();
    let Definition { name, kind, address, options, exclusive, defaults, origin } = definition;
    let place = Place { kind, address, options };
    let reach = reach::resolve(&place, reaches).map_err(|source| StreamError::Place {
        name: name.clone(),
        origin: origin.to_string(),
        source,
    })?;
    let host = reach.host();
    let is_local = place.kind == "local";
    Ok(StreamShared { name, index, host, definition: line, defaults, is_local, exclusive, reach })
}

/// Why a stream cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StreamError {
    /// It cannot have this name.
    #[error(transparent)]
    Name(NameError),
    /// Nobody defined it, and the test is strict.
    #[error("stream `{name}` is not defined: there are {known}{}", nearest.as_ref().map(|word| format!(" (did you mean `{word}`?)")).unwrap_or_default())]
    Unknown {
        /// Its name.
        name: StreamName,
        /// The streams that there are.
        known: String,
        /// The one that was probably meant.
        nearest: Option<String>,
    },
    /// There are not as many.
    #[error("there is no stream {index}: {} defined", counted_are(*count))]
    NoIndex {
        /// The index.
        index: usize,
        /// How many there are.
        count: usize,
    },
    /// There is one of this name already.
    #[error("stream `{name}` is defined already: give the new one another name")]
    Taken {
        /// Its name.
        name: StreamName,
    },
    /// Its definition is not valid.
    #[error(transparent)]
    Definition(#[from] DefineStreamError),
    /// Its definition leads nowhere.
    #[error("stream `{name}`, defined by {origin}: {source}")]
    Place {
        /// Its name.
        name: StreamName,
        /// Where it was defined.
        origin: String,
        /// What is wrong.
        source: PlaceError,
    },
    /// The pattern is no regular expression.
    #[error("`{pattern}` selects no streams: {reason}")]
    Pattern {
        /// The pattern.
        pattern: String,
        /// What is wrong with it.
        reason: String,
    },
}

fn counted_are(count: usize) -> String {
    let verb = if count == 1 { "is" } else { "are" };
    format!("{} {verb}", counted(count, "stream"))
}

/// Why streams cannot be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The test cannot have this name.
    #[error(transparent)]
    Name(NameError),
    /// A definition is not valid.
    #[error(transparent)]
    Definition(#[from] DefineStreamError),
    /// A stream cannot be had.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// Definitions cannot be read, or one of them is not valid.
    #[error(transparent)]
    Definitions(#[from] DefineStreamsError),
    /// There is no place for results.
    #[error(transparent)]
    Results(#[from] WriteResultsError),
    /// The deadline or the lease is out of its bounds.
    #[error("{what} of {given} is not possible: at least {min}, at most {max}")]
    Span {
        /// Which.
        what: &'static str,
        /// What was given.
        given: String,
        /// The least.
        min: String,
        /// The most.
        max: String,
    },
    /// The system has no thread to give.
    #[error("the driver cannot be started")]
    Driver(#[source] std::io::Error),
}

/// Why closing was not clean.
#[derive(Debug, Clone, thiserror::Error)]
#[error("not everything could be tidied: {}", .left_behind.join("; "))]
pub struct CloseError {
    /// What was left behind, in words.
    pub left_behind: Vec<String>,
}

/// A name or an index of a stream.
pub trait StreamKey: sealed::Sealed {}

impl<T: sealed::Sealed> StreamKey for T {}

mod sealed {
    /// What a key says.
    #[derive(Debug, Clone, Copy)]
    pub enum Key<'a> {
        Name(&'a str),
        Index(usize),
    }

    pub trait Sealed {
        fn key(&self) -> Key<'_>;
    }

    impl Sealed for &str {
        fn key(&self) -> Key<'_> {
            Key::Name(self)
        }
    }

    impl Sealed for String {
        fn key(&self) -> Key<'_> {
            Key::Name(self)
        }
    }

    impl Sealed for &String {
        fn key(&self) -> Key<'_> {
            Key::Name(self)
        }
    }

    impl Sealed for usize {
        fn key(&self) -> Key<'_> {
            Key::Index(*self)
        }
    }
}

/// How streams are to be opened.
#[must_use = "nothing is opened before `open`"]
pub struct StreamsBuilder {
    name: String,
    params: Params,
    path: String,
    urls: Vec<(String, String)>,
    results: Option<PathBuf>,
    layout: Layout,
    strict: bool,
    deadline: Duration,
    lease: Duration,
    on_log: Vec<OnLog>,
    environment: bool,
    world: World,
}

impl fmt::Debug for StreamsBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StreamsBuilder").field("name", &self.name).finish_non_exhaustive()
    }
}

impl StreamsBuilder {
    /// Parameters: they define streams at `/streams/*`.
    pub fn params(self, params: Params) -> Self {
        self.params_at(params, DEFAULT_PATH)
    }

    /// Parameters that define streams at another path, such as `/second/streams/*`.
    pub fn params_at(mut self, params: Params, path: impl Into<String>) -> Self {
        self.params = params;
        self.path = path.into();
        self
    }

    /// One stream by its name and URL, such as `tls://foo.example.com:7433` or `local`. The variable `MILLSTREAM_STREAMS`
    /// comes before it, parameters and configuration files after it.
    pub fn stream(mut self, name: impl Into<String>, url: impl Into<String>) -> Self {
        self.urls.push((name.into(), url.into()));
        self
    }

    /// Directory of results; without it the variable `MILLSTREAM_RESULTS_DIR`, else `results`.
    pub fn results_dir(mut self, directory: impl Into<PathBuf>) -> Self {
        self.results = Some(directory.into());
        self
    }

    /// How results are laid out.
    pub fn layout(mut self, layout: Layout) -> Self {
        self.layout = layout;
        self
    }

    /// Streams that nobody defined are errors. Otherwise they are defined on first use, on this machine.
    pub fn strict(mut self) -> Self {
        self.strict = true;
        self
    }

    /// How long the whole test may take: one hour unless set, at most 7 days. Then every task is stopped, and fails.
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// How long hosts keep the tasks of a controller that they do not hear: 30 s unless set, from 1 s to 24 h.
    pub fn lease(mut self, lease: Duration) -> Self {
        self.lease = lease;
        self
    }

    /// Called for each line that any block prints, on a thread of the library. Output is not read while it runs, so that a
    /// slow one slows the reading down, and nothing else.
    pub fn on_log(mut self, callback: impl Fn(&LogLine) + Send + Sync + 'static) -> Self {
        self.on_log.push(Arc::new(callback));
        self
    }

    /// Takes no streams from the variable `MILLSTREAM_STREAMS` and from configuration files: only what the test says.
    pub fn only_given(mut self) -> Self {
        self.environment = false;
        self
    }

    fn definitions(&self) -> Result<Vec<Definition>, OpenError> {
        let kinds = Kinds { registered: reach::registered() };
        let mut code = Definitions::default();
        for (name, url) in &self.urls {
            code.add(definition::from_url(name, url, Origin::named("the test"), &kinds)?)?;
        }
        let sources = if self.environment { Sources::of_this_process() } else { Sources::default() };
        Ok(sources.definitions(code.in_order(), &self.params, &self.path, &kinds)?)
    }

    /// Opens the streams. Connects nothing: a host is reached when a stream on it is first used.
    ///
    /// # Errors
    /// When a definition or a name is not valid, or the results have no place.
    pub fn open(self) -> Result<Streams, OpenError> {
        let test = TestName::new(&self.name).map_err(OpenError::Name)?;
        let spans = [
            ("a deadline", self.deadline, Duration::from_millis(1), limits::WAIT_MAX),
            ("a lease", self.lease, limits::LEASE_MIN, limits::LEASE_MAX),
        ];
        for (what, given, min, max) in spans {
            if given < min || given > max {
                return Err(OpenError::Span {
                    what,
                    given: spoken(given),
                    min: spoken(min),
                    max: spoken(max),
                });
            }
        }
        let definitions = self.definitions()?;
        let reaches = reach::Surroundings { local: Arc::new(Local::new()) };
        let mut registry = Registry::default();
        for definition in definitions {
            let index = registry.streams.len();
            let stream = Arc::new(stream_of(definition, index, &reaches)?);
            registry.by_name.insert(stream.name.clone(), index);
            registry.streams.push(stream);
            registry.counts.push(0);
        }
        let results = self
            .results
            .or_else(|| env::var_os(RESULTS_VARIABLE).filter(|path| !path.is_empty()).map(PathBuf::from))
            .unwrap_or_else(|| PathBuf::from(RESULTS_DIRECTORY));
        let writer = ResultsWriter::create(&results, &test, self.layout)?;
        let scribe = Scribe::start(self.on_log).map_err(OpenError::Driver)?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(WORKERS_COUNT)
            .thread_name("millstream-driver")
            .enable_all()
            .build()
            .map_err(OpenError::Driver)?;
        let shared = Arc::new(TestShared {
            test: test.clone(),
            registry: Mutex::new(registry),
            unfinished: watch::Sender::new(0),
        });
        let inbox = Arc::new(Mailbox::new());
        let driver = driver::handle(&inbox, runtime.handle());
        let sync = SyncHost::new(self.world.clone(), runtime.handle());
        let (ended, receiver) = watch::channel(None);
        let setup = Setup {
            world: self.world.clone(),
            test: test.clone(),
            deadline: self.deadline,
            link: LinkOptions { lease: self.lease, exclusive: false, client: client_name(&test) },
            writer: writer.clone(),
            scribe,
            sync: sync.clone(),
            shared: Arc::clone(&shared),
            inbox: Arc::clone(&inbox),
        };
        let watched = Arc::clone(&shared);
        std::thread::Builder::new()
            .name("millstream".to_owned())
            .spawn(move || {
                // As a task of the runtime, and not on this thread, it is woken by its neighbours without a detour.
                let driving = runtime.spawn(async move { Driver::new(setup).run().await });
                let left_behind = runtime.block_on(driving).unwrap_or_else(|error| {
                    inbox.close();
                    watched.abandon();
                    vec![format!("the driver failed: {error}")]
                });
                runtime.shutdown_background();
                ended.send_replace(Some(left_behind));
            })
            .map_err(OpenError::Driver)?;
        let core = Arc::new(Core {
            shared,
            driver,
            sync,
            world: self.world,
            writer,
            reaches,
            strict: self.strict,
            ended: receiver,
        });
        Ok(Streams { core, closed: false })
    }
}

/// What operators see of this controller.
fn client_name(test: &TestName) -> String {
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    format!("{test} on {host}, process {}", std::process::id())
}

/// All streams of one test.
///
/// Dropping it ends every session and all that runs in them, and waits for that at most 5 s; what cannot be reached is
/// left to its lease, and said so. [`Streams::close`] does the same and says what came of it.
#[derive(Debug)]
pub struct Streams {
    core: Arc<Core>,
    closed: bool,
}

impl Streams {
    /// Begins to open the streams of a test. The name becomes a directory of the results.
    pub fn builder(name: impl Into<String>) -> StreamsBuilder {
        StreamsBuilder {
            name: name.into(),
            params: Params::empty(),
            path: DEFAULT_PATH.to_owned(),
            urls: Vec::new(),
            results: None,
            layout: Layout::default(),
            strict: false,
            deadline: limits::TEST_DEADLINE,
            lease: limits::LEASE,
            on_log: Vec::new(),
            environment: true,
            world: World::system(),
        }
    }

    /// Opens the streams of a test with nothing but its name: see [`StreamsBuilder::open`].
    ///
    /// # Errors
    /// When a definition or a name is not valid, or the results have no place.
    pub fn open(name: impl Into<String>) -> Result<Self, OpenError> {
        Self::builder(name).open()
    }

    fn stream(&self, shared: Arc<StreamShared>) -> Stream {
        Stream { shared, core: Arc::clone(&self.core) }
    }

    /// The stream of a name or at an index. One that nobody defined is defined now, on this machine, and so are those
    /// before its index; in strict mode that is an error.
    ///
    /// # Errors
    /// When there is none.
    pub fn get(&self, key: impl StreamKey) -> Result<Stream, StreamError> {
        let shared = match key.key() {
            sealed::Key::Name(name) => self.core.named(name),
            sealed::Key::Index(index) => self.core.at(index),
        };
        shared.map(|shared| self.stream(shared))
    }

    /// Defines another stream, such as `tls://foo.example.com:7433`.
    ///
    /// # Errors
    /// When the name is taken, or name or URL are not valid.
    pub fn add(&self, name: impl AsRef<str>, url: impl AsRef<str>) -> Result<Stream, StreamError> {
        let kinds = Kinds { registered: reach::registered() };
        let definition =
            definition::from_url(name.as_ref(), url.as_ref(), Origin::named("the test"), &kinds)?;
        self.core.define(definition).map(|shared| self.stream(shared))
    }

    /// Every defined stream, in order.
    #[must_use]
    pub fn all(&self) -> StreamGroup {
        StreamGroup::new(self.core.shared.streams().into_iter().map(|shared| self.stream(shared)).collect())
    }

    /// The streams whose whole name matches a regular expression, such as `client-\d+`.
    ///
    /// # Errors
    /// When it is none.
    pub fn select(&self, pattern: &str) -> Result<StreamGroup, StreamError> {
        let whole = regex::Regex::new(&format!("^(?:{pattern})$")).map_err(|error| StreamError::Pattern {
            pattern: pattern.to_owned(),
            reason: error.to_string(),
        })?;
        let streams = self.all().into_iter().filter(|stream| whole.is_match(stream.name().as_str()));
        Ok(StreamGroup::new(streams.collect()))
    }

    /// The streams at a range of indexes. Those that nobody defined are defined as by [`Streams::get`].
    ///
    /// # Errors
    /// When one of them does not exist and the test is strict.
    pub fn slice(&self, range: impl RangeBounds<usize>) -> Result<StreamGroup, StreamError> {
        let begin = match range.start_bound() {
            Bound::Included(&begin) => begin,
            Bound::Excluded(&before) => before.saturating_add(1),
            Bound::Unbounded => 0,
        };
        let end = match range.end_bound() {
            Bound::Included(&last) => last.saturating_add(1),
            Bound::Excluded(&end) => end,
            Bound::Unbounded => self.len(),
        };
        (begin..end).map(|index| self.get(index)).collect::<Result<_, _>>().map(StreamGroup::new)
    }

    /// Number of defined streams.
    #[must_use]
    pub fn len(&self) -> usize {
        self.core.shared.lock().streams.len()
    }

    /// Whether no stream is defined.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Number of streams that something was scheduled on.
    #[must_use]
    pub fn initialized(&self) -> usize {
        self.core.shared.lock().counts.iter().filter(|&&count| count > 0).count()
    }

    /// Runs a single block somewhere, in a stream of its own.
    ///
    /// # Errors
    /// When the URL is not valid.
    pub fn run_bg(&self, place: impl AsRef<str>, block: impl Into<Block>) -> Result<Task, StreamError> {
        let mut number = self.len();
        loop {
            let name = free_name(&self.core.shared.lock(), number);
            match self.add(name.as_str(), place.as_ref()) {
                // Another thread took the name.
                Err(StreamError::Taken { .. }) => number += 1,
                added => return added.map(|stream| stream.run_bg(block)),
            }
        }
    }

    /// Waits until all tasks of all streams have ended.
    ///
    /// # Errors
    /// When any ended unexpectedly: one failure for each cause.
    ///
    /// # Cancel safety
    /// Dropping the future changes nothing.
    pub async fn wait(&self) -> Result<Report, FailureReport> {
        let report = self.join().await;
        match report.failures() {
            Some(failures) => Err(failures),
            None => Ok(report),
        }
    }

    /// Waits until all tasks of all streams have ended, and tells what came of them, failures or not.
    ///
    /// # Cancel safety
    /// Dropping the future changes nothing.
    pub async fn join(&self) -> Report {
        let _waiting = MainWaits::begin(&self.core.sync);
        let mut unfinished = self.core.shared.unfinished.subscribe();
        // The sender lives as long as this does.
        let _none = unfinished.wait_for(|&count| count == 0).await;
        self.core.shared.report()
    }

    /// Whether no task has ended unexpectedly so far.
    #[must_use]
    pub fn success(&self) -> bool {
        self.core.shared.report().success()
    }

    /// What came of all tasks so far, as JSON.
    ///
    /// # Panics
    /// Never: outcomes have no values that JSON has not.
    #[must_use]
    pub fn results(&self) -> serde_json::Value {
        let report = self.core.shared.report();
        let outcomes: Vec<&Outcome> = report.outcomes.iter().map(AsRef::as_ref).collect();
        serde_json::json!({
            "test": report.test.as_str(),
            "success": report.success(),
            "tasks": serde_json::to_value(outcomes).expect("outcomes are plain data"),
        })
    }

    /// Directory of this run's results.
    #[must_use]
    pub fn results_dir(&self) -> &std::path::Path {
        self.core.writer.directory()
    }

    /// Appends a line to main's own whiteboard in the results.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn whiteboard(&self, line: impl fmt::Display) -> Result<(), WriteResultsError> {
        self.core.writer.whiteboard(&line.to_string())
    }

    /// Main's own directory in the results, for whatever the test wants to keep.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn data_dir(&self) -> Result<PathBuf, WriteResultsError> {
        self.core.writer.data_directory()
    }

    /// Takes part in a barrier as blocks do: waits until `parties` have entered, at most 60 s.
    ///
    /// # Errors
    /// When the barrier broke, or was refused.
    ///
    /// # Cancel safety
    /// Dropping the future takes main back, which breaks the barrier for all.
    pub async fn barrier(&self, name: &str, parties: u32) -> Result<Released, MeetError> {
        self.barrier_with(name, parties, limits::BARRIER_TIMEOUT, Bytes::new()).await
    }

    /// The same with a time of its own, and something for every other party.
    ///
    /// # Errors
    /// When the barrier broke, or was refused.
    ///
    /// # Cancel safety
    /// Dropping the future takes main back, which breaks the barrier for all.
    pub async fn barrier_with(
        &self,
        name: &str,
        parties: u32,
        timeout: Duration,
        payload: impl Into<Bytes>,
    ) -> Result<Released, MeetError> {
        let name = BarrierName::new(name)?;
        Ok(self.core.sync.enter_as_main(name, Some(parties), timeout, payload.into()).await?)
    }

    /// Makes a broken barrier usable again.
    ///
    /// # Errors
    /// When the name is none.
    pub fn reset_barrier(&self, name: &str) -> Result<(), MeetError> {
        self.core.sync.reset_as_main(BarrierName::new(name)?);
        Ok(())
    }

    /// Publishes a value and gives its index: a rank that nobody else gets.
    ///
    /// # Errors
    /// When topic or value are refused.
    pub fn publish(&self, topic: &str, value: impl fmt::Display) -> Result<u64, MeetError> {
        Ok(self.core.sync.publish_as_main(TopicName::new(topic)?, Content::Text(value.to_string()))?)
    }

    /// Waits until a topic has `count` values, at most 60 s, and gives them.
    ///
    /// # Errors
    /// When they do not come in time, or nobody is left who could publish them.
    ///
    /// # Cancel safety
    /// Dropping the future changes nothing.
    pub async fn wait_topic(&self, topic: &str, count: u64) -> Result<Vec<Arc<Value>>, MeetError> {
        let topic = TopicName::new(topic)?;
        Ok(self.core.sync.wait_as_main(topic, count, limits::BARRIER_TIMEOUT).await?)
    }

    /// The values of a topic from the first on, and those that come later.
    ///
    /// # Errors
    /// When the name is none.
    pub fn subscribe(&self, topic: &str) -> Result<Subscription, MeetError> {
        Ok(self.core.sync.subscribe_as_main(TopicName::new(topic)?, 0))
    }

    /// Opens a loopback address where a person may look at barriers, with `grpcurl` for example, and take part by hand.
    /// It is open until the streams are closed.
    ///
    /// # Errors
    /// When the address is none of this machine's own, or cannot be listened on.
    pub async fn listen(
        &self,
        address: std::net::SocketAddr,
    ) -> Result<std::net::SocketAddr, crate::sync::port::ListenError> {
        let sync = self.core.sync.clone();
        let listening = self.core.driver.spawn(async move { sync.listen(address).await });
        match listening.await {
            Some(result) => result,
            // The driver ends only by closing, which consumes this.
            None => std::future::pending().await,
        }
    }

    /// Ends every session and everything that runs in them, and waits until hosts are clean and results complete.
    ///
    /// # Errors
    /// [`Error::Close`](crate::Error::Close) when something could not be tidied or written.
    ///
    /// # Cancel safety
    /// Dropping the future is as dropping the streams.
    pub async fn close(mut self) -> crate::Result<()> {
        self.core.sync.main_waiting(true);
        self.core.driver.send(Input::Close);
        let mut ended = self.core.ended.clone();
        let left_behind = match ended.wait_for(Option::is_some).await {
            Ok(left_behind) => left_behind.clone().unwrap_or_default(),
            Err(_) => vec!["the driver failed: see its message above".to_owned()],
        };
        self.closed = true;
        if left_behind.is_empty() { Ok(()) } else { Err(CloseError { left_behind }.into()) }
    }
}

impl Drop for Streams {
    fn drop(&mut self) {
        if self.closed {
            return;
        }
        self.core.sync.main_waiting(true);
        self.core.driver.send(Input::Close);
        let mut ended = self.core.ended.clone();
        let waiting = async move {
            // An error means that the driver is gone: nothing to wait for.
            let ended = ended.wait_for(Option::is_some).await;
            ended.ok().and_then(|left_behind| left_behind.clone()).unwrap_or_default()
        };
        match block_on_for(waiting, limits::CLOSE_MAX, &*self.core.world.clock) {
            Some(left_behind) if left_behind.is_empty() => {}
            Some(left_behind) => warn!("not everything could be tidied: {}", left_behind.join("; ")),
            None => {
                warn!("not every host has ended its session in time: each ends it when its lease is over")
            }
        }
    }
}

/// Main is inside a wait: it sends nobody to barriers meanwhile.
struct MainWaits<'a>(&'a SyncHost);

impl<'a> MainWaits<'a> {
    fn begin(sync: &'a SyncHost) -> Self {
        sync.main_waiting(true);
        Self(sync)
    }
}

impl Drop for MainWaits<'_> {
    fn drop(&mut self) {
        self.0.main_waiting(false);
    }
}

/// Why main did not meet others, or was not told anything.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MeetError {
    /// A name is none.
    #[error(transparent)]
    Name(#[from] NameError),
    /// A barrier was not passed.
    #[error(transparent)]
    Enter(#[from] EnterError),
    /// A value was not published.
    #[error(transparent)]
    Publish(#[from] PublishError),
    /// Values did not come.
    #[error(transparent)]
    Await(#[from] AwaitError),
}
