//! What the JSON files of a test say: one shape for each file, in words that people and programs read.
//!
//! Times are texts in UTC on the controller's clock, durations are seconds. Nothing here is computed from other parts of
//! a report: the driver knows, and fills in.

use std::time::Duration;

use millstream_common::{
    id::{BlockName, StreamName, TaskId, TestName},
    outcome::{Exit, Expectation, LeakedProcess, LogTotals, OutcomeKind, Phase, PhaseEnd, Reason, TaskEnd},
};
use serde::{Serialize, Serializer};

use super::{
    nested::NestedTask,
    timeline::{HostClock, stamp},
};

/// A moment on the controller's clock, in nanoseconds since 1970; written as RFC 3339.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Moment(pub(crate) u64);

impl Serialize for Moment {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&stamp(self.0))
    }
}

/// A duration; written in seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Seconds(pub(crate) Duration);

impl Serialize for Seconds {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_f64(self.0.as_secs_f64())
    }
}

/// `test.json`: everything, in order.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct TestReport {
    /// The test.
    pub(crate) test: TestName,
    /// Whether no task ended unexpectedly.
    pub(crate) success: bool,
    /// Tasks that ended unexpectedly by themselves.
    pub(crate) failures_count: usize,
    /// Tasks that ended unexpectedly because of another.
    pub(crate) followers_count: usize,
    /// Version of the library.
    pub(crate) version: &'static str,
    /// When the streams were opened.
    pub(crate) start_time: Moment,
    /// When they were closed.
    pub(crate) end_time: Moment,
    /// Streams in their order.
    pub(crate) streams: Vec<StreamReport>,
    /// Tasks in their global order, those of nested streams among them.
    pub(crate) tasks: Vec<TaskEntry>,
    /// Barriers in the order in which they were decided.
    pub(crate) barriers: Vec<BarrierReport>,
    /// Waits for values of topics, in the order in which they ended.
    pub(crate) waits: Vec<WaitReport>,
    /// Such waits that are not listed, because too many are.
    #[serde(skip_serializing_if = "is_zero")]
    pub(crate) waits_omitted_count: usize,
    /// What could not be tidied, in words.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) left_behind: Vec<String>,
}

/// `stream.json`: a stream and the host that it ran on.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct StreamReport {
    /// Its name.
    pub(crate) name: StreamName,
    /// Its place among the streams, from 0.
    pub(crate) index: usize,
    /// Its definition as one line, without secrets.
    pub(crate) definition: String,
    /// The host, once it was reached.
    pub(crate) host: Option<HostReport>,
    /// Clock of the host.
    pub(crate) clock: Option<ClockReport>,
}

/// A host.
#[derive(Debug, Clone, Default, Serialize)]
pub(crate) struct HostReport {
    /// As blocks of other hosts name it: the destination in the definition.
    pub(crate) host: String,
    /// Its own name.
    pub(crate) hostname: String,
    /// Kernel name and release.
    pub(crate) kernel: String,
    /// Machine.
    pub(crate) architecture: String,
    /// Distribution.
    pub(crate) distribution: String,
    /// Processors.
    pub(crate) processors_count: u32,
    /// Memory.
    pub(crate) memory_bytes: u64,
    /// Addresses of its interfaces.
    pub(crate) addresses: Vec<String>,
    /// Version of its agent.
    pub(crate) agent_version: String,
    /// How process trees are ended there.
    pub(crate) containment: String,
    /// How limits are set there.
    pub(crate) limits: String,
    /// Its Python 3 interpreter; empty when there is none.
    pub(crate) python: String,
}

/// How a host's clock compares.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct ClockReport {
    /// The host's clock less the controller's.
    pub(crate) offset_seconds: f64,
    /// How far that may be wrong.
    pub(crate) uncertainty_seconds: f64,
}

impl ClockReport {
    /// What is known of a clock; none while nothing is.
    #[must_use]
    pub(crate) fn of(clock: HostClock) -> Option<Self> {
        let uncertainty = Duration::from_nanos(clock.uncertainty_ns()?).as_secs_f64();
        let offset = Duration::from_nanos(clock.offset_ns().unsigned_abs()).as_secs_f64();
        let offset_seconds = if clock.offset_ns() < 0 { -offset } else { offset };
        Some(Self { offset_seconds, uncertainty_seconds: uncertainty })
    }
}

/// Which task a report is about: what the controller knows before the host says anything.
#[derive(Debug, Clone)]
pub(crate) struct TaskSubject {
    /// Its number.
    pub(crate) task_id: TaskId,
    /// Its stream.
    pub(crate) stream: StreamName,
    /// What the stream's host is called.
    pub(crate) host: String,
    /// Number in its stream.
    pub(crate) stream_number: u32,
    /// Number in the test.
    pub(crate) test_number: u32,
    /// Its block.
    pub(crate) block: BlockName,
    /// Program and arguments of phase `run`; empty when the block was not valid.
    pub(crate) command: Vec<String>,
    /// Which end was expected.
    pub(crate) expectation: Expectation,
    /// When it was enqueued, by the controller's clock.
    pub(crate) enqueue_time_ns: u64,
}

/// `result.json`: what came of a task.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct TaskReport {
    task_id: TaskId,
    stream: StreamName,
    host: String,
    stream_number: u32,
    test_number: u32,
    block: BlockName,
    command: Vec<String>,
    outcome: OutcomeKind,
    expectation: Expectation,
    is_expected: bool,
    reason: Reason,
    phase: Option<Phase>,
    exit_code: Option<i32>,
    signal: Option<i32>,
    detail: String,
    /// The task that broke this one's barrier.
    caused_by: Option<String>,
    enqueue_time: Moment,
    start_time: Option<Moment>,
    end_time: Option<Moment>,
    run_seconds: Seconds,
    phases: Vec<PhaseReport>,
    leaked: Vec<LeakedProcess>,
    leaked_count: u32,
    log: LogReport,
    archive: Option<ArchiveReport>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    skipped: Vec<String>,
    last_lines: Vec<String>,
    /// Seen from the test's directory.
    directory: String,
}

/// One task of a test.
#[derive(Debug, Clone, Serialize)]
#[serde(untagged)]
pub(crate) enum TaskEntry {
    /// Of one of its streams.
    Own(Box<TaskReport>),
    /// Of a stream that one of its blocks opened: as its own test reports it, with `within`, the task of the block.
    Nested(serde_json::Value),
}

/// Own tasks by their number, each nested one behind the last that was enqueued before it. Nested ones come sorted.
#[must_use]
pub(crate) fn in_global_order(
    own: impl IntoIterator<Item = TaskReport>,
    nested: Vec<NestedTask>,
) -> Vec<TaskEntry> {
    let mut nested = nested.into_iter().peekable();
    let mut tasks = Vec::new();
    for task in own {
        while let Some(before) = nested.next_if(|nested| nested.enqueue_time_ns < task.enqueue_time.0) {
            tasks.push(TaskEntry::Nested(before.report));
        }
        tasks.push(TaskEntry::Own(Box::new(task)));
    }
    tasks.extend(nested.map(|nested| TaskEntry::Nested(nested.report)));
    tasks
}

#[derive(Debug, Clone, Serialize)]
struct PhaseReport {
    phase: Phase,
    outcome: OutcomeKind,
    exit_code: Option<i32>,
    signal: Option<i32>,
    seconds: Seconds,
}

#[derive(Debug, Clone, Serialize)]
struct LogReport {
    stdout_bytes: u64,
    stderr_bytes: u64,
    stdout_sha256: String,
    stderr_sha256: String,
    truncated: bool,
}

#[derive(Debug, Clone, Serialize)]
struct ArchiveReport {
    size_bytes: u64,
    sha256: String,
}

impl TaskReport {
    /// Puts together what both ends know. `directory` is the task's, seen from the test's.
    #[must_use]
    pub(crate) fn new(
        subject: TaskSubject,
        end: &TaskEnd,
        clock: HostClock,
        caused_by: Option<String>,
        directory: String,
    ) -> Self {
        let moment = |time_ns: Option<u64>| time_ns.map(|time_ns| Moment(clock.to_controller(time_ns)));
        let (exit_code, signal) = code_and_signal(end.exit);
        Self {
            task_id: subject.task_id,
            stream: subject.stream,
            host: subject.host,
            stream_number: subject.stream_number,
            test_number: subject.test_number,
            block: subject.block,
            command: subject.command,
            outcome: end.outcome,
            expectation: subject.expectation,
            is_expected: end.is_expected(subject.expectation),
            reason: end.reason,
            phase: end.phase,
            exit_code,
            signal,
            detail: end.detail.clone(),
            caused_by,
            enqueue_time: Moment(subject.enqueue_time_ns),
            start_time: moment(end.start_time_ns),
            end_time: moment(end.end_time_ns),
            run_seconds: Seconds(end.run_duration),
            phases: end.phases.iter().map(PhaseReport::from).collect(),
            leaked: end.leaked.clone(),
            leaked_count: end.leaked_count,
            log: LogReport::from(&end.log),
            archive: end.archive.as_ref().map(|archive| ArchiveReport {
                size_bytes: archive.size_bytes,
                sha256: archive.sha256.clone(),
            }),
            skipped: end.skipped.clone(),
            last_lines: end.last_lines.clone(),
            directory,
        }
    }
}

impl From<&PhaseEnd> for PhaseReport {
    fn from(end: &PhaseEnd) -> Self {
        let (exit_code, signal) = code_and_signal(end.exit);
        Self { phase: end.phase, outcome: end.outcome, exit_code, signal, seconds: Seconds(end.duration) }
    }
}

impl From<&LogTotals> for LogReport {
    fn from(totals: &LogTotals) -> Self {
        Self {
            stdout_bytes: totals.stdout_bytes,
            stderr_bytes: totals.stderr_bytes,
            stdout_sha256: totals.stdout_sha256.clone(),
            stderr_sha256: totals.stderr_sha256.clone(),
            truncated: totals.truncated,
        }
    }
}

fn code_and_signal(exit: Option<Exit>) -> (Option<i32>, Option<i32>) {
    match exit {
        None => (None, None),
        Some(Exit::Code(code)) => (Some(code), None),
        Some(Exit::Signal(signal)) => (None, Some(signal)),
    }
}

/// One generation of a barrier.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct BarrierReport {
    /// Its name.
    pub(crate) name: String,
    /// Its generation, from 1.
    pub(crate) generation: u64,
    /// How many parties it needed.
    pub(crate) parties_count: u32,
    /// When it was released or broken; none when the test ended first.
    pub(crate) end_time: Option<Moment>,
    /// Why it is broken; none when it was released.
    pub(crate) broken: Option<String>,
    /// Who came last; none when it was not released.
    pub(crate) last: Option<String>,
    /// What people did to it through the debugging port.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) by_hand: Vec<String>,
    /// Everybody who came, in order.
    pub(crate) parties: Vec<PartyReport>,
}

/// One party of a generation.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct PartyReport {
    /// What it is called.
    pub(crate) name: String,
    /// Its task, when it is one.
    pub(crate) task_id: Option<TaskId>,
    /// When it entered.
    pub(crate) enter_time: Moment,
    /// How long it waited.
    pub(crate) wait_seconds: Seconds,
    /// Whether a person did it.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(crate) by_hand: bool,
}

/// One wait for values of a topic.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct WaitReport {
    /// The topic.
    pub(crate) topic: String,
    /// Who waited.
    pub(crate) party: String,
    /// Its task, when it is one.
    pub(crate) task_id: Option<TaskId>,
    /// How many values the topic had to have.
    pub(crate) count: u64,
    /// When it began.
    pub(crate) begin_time: Moment,
    /// How long it waited.
    pub(crate) wait_seconds: Seconds,
    /// Why it ended without them; none when it got them.
    pub(crate) failed: Option<String>,
    /// Whether it was a subscription that waited for its next value.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(crate) subscribed: bool,
    /// Whether a person did it.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(crate) by_hand: bool,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks with a reference")]
fn is_zero(count: &usize) -> bool {
    *count == 0
}
