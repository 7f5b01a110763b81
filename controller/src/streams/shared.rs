//! What the handles of a test share with each other and with the driver: numbers, definitions, outcomes.

use std::{
    collections::{BTreeMap, BTreeSet},
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
use tokio::sync::{oneshot, watch};

use super::{StreamError, place::StreamShared};
use crate::{
    block::{Block, reference::Chain},
    definition::{Defined, Definition},
    driver::{Handle, Input, Schedule},
    nested::Gate,
    outcome::{Outcome, Report},
    params::{Origin, Params},
    reach,
    results::writer::ResultsWriter,
    sync::host::{SpeakerLabel, SyncHost},
    task::{Stage, Task, TaskLog, TaskShared},
};

/// What the driver and the handles of a test share.
#[derive(Debug)]
pub(crate) struct TestShared {
    pub(crate) test: TestName,
    pub(super) registry: Mutex<Registry>,
    /// Streams whose hosts are taken together; none: those that are defined as exclusive.
    pub(super) together: Option<BTreeSet<StreamName>>,
    /// Number of tasks without an outcome.
    pub(super) unfinished: watch::Sender<usize>,
}

#[derive(Debug, Default)]
pub(super) struct Registry {
    pub(super) streams: Vec<Arc<StreamShared>>,
    pub(super) by_name: BTreeMap<StreamName, usize>,
    /// Number of tasks of each stream.
    pub(super) counts: Vec<u32>,
    /// Streams that were closed.
    pub(super) closed: BTreeSet<usize>,
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
        self.lock().defined(name)
    }

    /// Outcomes of the tasks of one stream that have ended, in their order.
    pub(crate) fn outcomes_of(&self, stream: &StreamName) -> Vec<Arc<Outcome>> {
        self.lock().outcomes.values().filter(|outcome| outcome.stream == *stream).cloned().collect()
    }

    /// Whether the host of a stream is one of those that are taken together.
    pub(crate) fn takes_together(&self, stream: &StreamShared) -> bool {
        match &self.together {
            Some(names) => names.contains(&stream.name),
            None => stream.exclusive(),
        }
    }

    /// Every defined stream, in its order.
    pub(crate) fn streams(&self) -> Vec<Arc<StreamShared>> {
        self.lock().streams.clone()
    }

    /// Number of defined streams.
    pub(crate) fn streams_count(&self) -> usize {
        self.lock().streams.len()
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
        // The way to the host may have to be made, which is nothing to do under a lock.
        let host = stream.host().to_owned();
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
            host,
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
            self.gate.allow(task.id, stream.is_local());
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

    /// Ends a stream; what comes back is what could not be tidied.
    pub(crate) fn close_stream(&self, index: usize) -> oneshot::Receiver<Vec<String>> {
        let (answer, receiver) = oneshot::channel();
        let mut registry = self.shared.lock();
        registry.closed.insert(index);
        self.sync.streams_defined(registry.open_count());
        self.driver.send(Input::Retire { stream: index, answer });
        receiver
    }

    /// Outcomes of the tasks of one stream that have ended, in their order.
    pub(crate) fn outcomes_of(&self, stream: &StreamName) -> Vec<Arc<Outcome>> {
        self.shared.outcomes_of(stream)
    }

    /// Defines a stream whose place can be had.
    pub(super) fn define(&self, definition: Defined) -> Result<Arc<StreamShared>, StreamError> {
        let probe = StreamShared::new(definition.clone(), 0, &self.reaches);
        if !self.shared.lock().by_name.contains_key(&definition.name) {
            probe.locate()?;
        }
        let mut registry = self.shared.lock();
        if registry.by_name.contains_key(&definition.name) {
            return Err(StreamError::Taken { name: definition.name });
        }
        let index = registry.streams.len();
        Ok(self.push(&mut registry, probe.renamed(definition.name, index)))
    }

    fn push(&self, registry: &mut Registry, stream: StreamShared) -> Arc<StreamShared> {
        let stream = Arc::new(stream);
        registry.by_name.insert(stream.name.clone(), stream.index);
        registry.streams.push(Arc::clone(&stream));
        registry.counts.push(0);
        self.sync.streams_defined(registry.open_count());
        stream
    }

    fn define_in(
        &self,
        registry: &mut Registry,
        definition: Defined,
    ) -> Result<Arc<StreamShared>, StreamError> {
        if registry.by_name.contains_key(&definition.name) {
            return Err(StreamError::Taken { name: definition.name });
        }
        let index = registry.streams.len();
        Ok(self.push(registry, StreamShared::new(definition, index, &self.reaches)))
    }

    /// A new stream for a single task, at the place of a defined stream or at one that is given in one line.
    pub(super) fn single(&self, place: &str) -> Result<Arc<StreamShared>, StreamError> {
        let known = StreamName::new(place).ok().and_then(|name| self.shared.defined(&name));
        let (base, like) = match known {
            Some(stream) => (place.to_owned(), stream),
            None => {
                let parsed = Definition::url(place).named("single").map_err(StreamError::from);
                let stream = parsed.map(|defined| StreamShared::new(defined, 0, &self.reaches));
                let stream = stream.and_then(|stream| stream.locate().map(|()| stream));
                let stream = stream.map_err(|source| self.no_place(place, source))?;
                (
                    if stream.is_local() { "local".to_owned() } else { stream.host().to_owned() },
                    Arc::new(stream),
                )
            }
        };
        like.locate()?;
        let mut registry = self.shared.lock();
        let index = registry.streams.len();
        let name = counted_name(&registry, &base);
        Ok(self.push(&mut registry, like.renamed(name, index)))
    }

    /// What is wrong with a place that is no definition, and may have been meant as a name.
    fn no_place(&self, place: &str, source: StreamError) -> StreamError {
        if place.contains("://") {
            return source;
        }
        let registry = self.shared.lock();
        let names = registry.streams.iter().map(|stream| stream.name.as_str());
        let nearest = text::nearest(place, names).map(str::to_owned);
        StreamError::NoPlace { place: place.to_owned(), nearest, source: Box::new(source) }
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
            let stream = self.define_in(&mut registry, Defined::local(name, origin))?;
            if next == index {
                return Ok(stream);
            }
        }
    }

    /// The streams from one index to before another; those that are missing are defined.
    pub(super) fn range(&self, begin: usize, end: usize) -> Result<Vec<Arc<StreamShared>>, StreamError> {
        if begin >= end {
            return Ok(Vec::new());
        }
        // The last one first: when it cannot be, nothing is defined.
        self.at(end - 1)?;
        Ok(self.shared.lock().streams[begin..end].to_vec())
    }

    /// The stream of a name; one that nobody defined is defined.
    pub(super) fn named(&self, name: &str) -> Result<Arc<StreamShared>, StreamError> {
        let name = StreamName::new(name).map_err(StreamError::Name)?;
        let mut registry = self.shared.lock();
        match registry.defined(&name) {
            Some(stream) => Ok(stream),
            None if self.strict => Err(registry.unknown(name)),
            None => self.define_in(&mut registry, Defined::local(name, Origin::named("the test"))),
        }
    }

    /// The stream of a name, if there is one.
    pub(super) fn defined(&self, name: &str) -> Result<Arc<StreamShared>, StreamError> {
        let name = StreamName::new(name).map_err(StreamError::Name)?;
        let registry = self.shared.lock();
        registry.defined(&name).ok_or_else(|| registry.unknown(name))
    }

    /// The stream at an index, if there is one.
    pub(super) fn defined_at(&self, index: usize) -> Result<Arc<StreamShared>, StreamError> {
        let registry = self.shared.lock();
        let count = registry.streams.len();
        registry.streams.get(index).cloned().ok_or(StreamError::NoIndex { index, count })
    }
}

impl Registry {
    /// Number of streams that were not closed.
    fn open_count(&self) -> usize {
        self.streams.len() - self.closed.len()
    }

    fn defined(&self, name: &StreamName) -> Option<Arc<StreamShared>> {
        Some(Arc::clone(&self.streams[*self.by_name.get(name)?]))
    }

    /// Names of streams that are all defined.
    pub(super) fn known(&self, names: Vec<String>) -> Result<BTreeSet<StreamName>, StreamError> {
        let known = |name: String| {
            let name = StreamName::new(&name).map_err(StreamError::Name)?;
            if self.by_name.contains_key(&name) { Ok(name) } else { Err(self.unknown(name)) }
        };
        names.into_iter().map(known).collect()
    }

    /// What is told of a name that nobody defined.
    fn unknown(&self, name: StreamName) -> StreamError {
        const SHOWN: usize = 20;
        let mut known: Vec<String> =
            self.streams.iter().take(SHOWN).map(|stream| format!("`{}`", stream.name)).collect();
        if let Some(more) = self.streams.len().checked_sub(SHOWN + 1) {
            known.push(format!("and {} more", more + 1));
        }
        if known.is_empty() {
            known.push("none".to_owned());
        }
        let names = self.streams.iter().map(|stream| stream.name.as_str());
        let nearest = text::nearest(name.as_str(), names).map(str::to_owned);
        StreamError::Unknown { name, known: known.join(", "), nearest }
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
