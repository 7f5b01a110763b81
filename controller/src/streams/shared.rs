//! What the handles of a test share with each other and with the driver: numbers, definitions, outcomes.

use std::{
    collections::BTreeMap,
    fmt,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    time::Duration,
};

use millstream_common::{
    clock::World,
    id::{StreamName, TestName},
    limits,
    outcome::{LogTotals, OutcomeKind, Reason},
    text,
};
use tokio::sync::watch;

use super::StreamError;
use crate::{
    block::{Block, reference::Chain},
    definition::{self, Defaults, DefineStreamError, Definition, Kinds},
    driver::{Handle, Schedule},
    nested::Gate,
    outcome::{Outcome, Report},
    params::{Origin, Params},
    reach::{self, PlaceError, Reach},
    results::writer::ResultsWriter,
    sync::host::{SpeakerLabel, SyncHost},
    task::{Stage, Task, TaskLog, TaskShared},
};
/// What the driver and the handles know of a stream.
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

impl fmt::Debug for StreamShared {
    /// Without the reach: its author may not have thought of secrets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StreamShared")
            .field("name", &self.name)
            .field("definition", &self.definition)
            .finish_non_exhaustive()
    }
}

/// What the driver and the handles of a test share.
#[derive(Debug)]
pub(crate) struct TestShared {
    pub(crate) test: TestName,
    pub(super) registry: Mutex<Registry>,
    /// Number of tasks without an outcome.
    pub(super) unfinished: watch::Sender<usize>,
}

#[derive(Debug, Default)]
pub(super) struct Registry {
    pub(super) streams: Vec<Arc<StreamShared>>,
    pub(super) by_name: BTreeMap<StreamName, usize>,
    /// Number of tasks of each stream.
    pub(super) counts: Vec<u32>,
    pub(super) tasks_count: u32,
    /// By number in the test.
    pub(super) outcomes: BTreeMap<u32, Arc<Outcome>>,
    /// Tasks without an outcome, by number in the test.
    pub(super) unfinished: BTreeMap<u32, Arc<TaskShared>>,
}

impl TestShared {
    pub(super) fn lock(&self) -> MutexGuard<'_, Registry> {
        self.registry.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The stream of a name, when it is defined.
    fn defined(&self, name: &StreamName) -> Option<Arc<StreamShared>> {
        let registry = self.lock();
        registry.by_name.get(name).map(|&index| Arc::clone(&registry.streams[index]))
    }

    /// Outcomes of the tasks of one stream that have ended, in their order.
    pub(crate) fn outcomes_of(&self, stream: &StreamName) -> Vec<Arc<Outcome>> {
        self.lock().outcomes.values().filter(|outcome| outcome.stream == *stream).cloned().collect()
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
    pub(super) fn abandon(&self) {
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
    pub(super) shared: Arc<TestShared>,
    pub(super) params: Params,
    pub(super) driver: Handle,
    pub(super) sync: SyncHost,
    pub(super) gate: Arc<Gate>,
    pub(super) world: World,
    pub(super) writer: ResultsWriter,
    pub(super) reaches: reach::Surroundings,
    pub(super) strict: bool,
    pub(crate) resolvers: Chain,
    /// What could not be tidied, once the driver has ended.
    pub(super) ended: watch::Receiver<Option<Vec<String>>>,
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
        let block = block.resolved_by(&self.resolvers);
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
            runs_streams: block.runs_streams(),
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
        let label =
            SpeakerLabel { stream: stream.name.clone(), number: stream_number, block: task.block.clone() };
        // Known to the board before anybody can wait for it.
        if block.runs_streams() {
            self.gate.allow(task.id, stream.is_local);
        }
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

    /// Outcomes of the tasks of one stream that have ended, in their order.
    pub(crate) fn outcomes_of(&self, stream: &StreamName) -> Vec<Arc<Outcome>> {
        self.shared.outcomes_of(stream)
    }

    pub(super) fn define(&self, definition: Definition) -> Result<Arc<StreamShared>, StreamError> {
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
        self.sync.streams_defined(registry.streams.len());
        Ok(stream)
    }

    /// A new stream for a single task, at the place of a defined stream or at one that is given in one line.
    pub(super) fn single(&self, place: &str) -> Result<Arc<StreamShared>, StreamError> {
        let known = StreamName::new(place).ok().and_then(|name| self.shared.defined(&name));
        let (base, like) = match known {
            Some(stream) => (place.to_owned(), stream),
            None => {
                let kinds = Kinds { registered: reach::registered() };
                let parsed = definition::from_url("single", place, Origin::named("the test"), &kinds);
                let definition = parsed.map_err(|source| self.no_place(place, source))?;
                let stream = stream_of(definition, 0, &self.reaches)?;
                (if stream.is_local { "local".to_owned() } else { stream.host.clone() }, Arc::new(stream))
            }
        };
        let mut registry = self.shared.lock();
        let index = registry.streams.len();
        let name = counted_name(&registry, &base);
        let stream = Arc::new(StreamShared {
            name,
            index,
            reach: Arc::clone(&like.reach),
            host: like.host.clone(),
            definition: like.definition.clone(),
            defaults: like.defaults.clone(),
            is_local: like.is_local,
            exclusive: like.exclusive,
        });
        registry.by_name.insert(stream.name.clone(), index);
        registry.streams.push(Arc::clone(&stream));
        registry.counts.push(0);
        Ok(stream)
    }

    /// What is wrong with a place that is no definition, and may have been meant as a name.
    fn no_place(&self, place: &str, source: DefineStreamError) -> StreamError {
        if place.contains("://") {
            return source.into();
        }
        let registry = self.shared.lock();
        let names = registry.streams.iter().map(|stream| stream.name.as_str());
        let nearest = text::nearest(place, names).map(str::to_owned);
        StreamError::NoPlace { place: place.to_owned(), nearest, source }
    }

    /// The stream at an index; those that are missing before it are defined on the way.
    pub(super) fn at(&self, index: usize) -> Result<Arc<StreamShared>, StreamError> {
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

    pub(super) fn named(&self, name: &str) -> Result<Arc<StreamShared>, StreamError> {
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

/// The first free name of a place's single tasks: `server.1`, `server.2`.
fn counted_name(registry: &Registry, base: &str) -> StreamName {
    // Names of hosts are no longer than this, and some reaches describe theirs by a path.
    let is_plain = |c: char| c.is_alphanumeric() || matches!(c, '-' | '_' | '.');
    let base: String = base.chars().map(|c| if is_plain(c) { c } else { '_' }).take(64).collect();
    let mut number = 1_u64;
    loop {
        let parsed = StreamName::new(format!("{base}.{number}")).expect("its characters are valid in names");
        if !registry.by_name.contains_key(&parsed) {
            return parsed;
        }
        number += 1;
    }
}

/// A name for the stream at an index: its number, with a suffix where that is taken.
pub(super) fn free_name(registry: &Registry, index: usize) -> StreamName {
    let mut name = index.to_string();
    loop {
        let parsed = StreamName::new(&name).expect("digits and underscores are valid in names");
        if !registry.by_name.contains_key(&parsed) {
            return parsed;
        }
        name.push('_');
    }
}

pub(super) fn stream_of(
    definition: Definition,
    index: usize,
    reaches: &reach::Surroundings,
) -> Result<StreamShared, StreamError> {
    let line = definition.to_string();
    let place = definition.place();
    let reach = place.map_err(PlaceError::Reference).and_then(|place| reach::resolve(&place, reaches));
    let Definition { name, kind, exclusive, defaults, origin, .. } = definition;
    let reach = reach.map_err(|reason| StreamError::Place {
        name: name.clone(),
        origin: origin.to_string(),
        reason,
    })?;
    let host = reach.host();
    let is_local = kind == "local";
    Ok(StreamShared { name, index, host, definition: line, defaults, is_local, exclusive, reach })
}
