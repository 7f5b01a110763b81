//! What came of tasks, as people and programs read it.
//!
//! An [`Outcome`] is a complete value: whoever holds it needs to ask nobody else where, what, why and for how long. A
//! [`FailureReport`] counts one failure for each cause, not one for each task that was dragged along. Nothing here decides
//! an outcome: hosts do, and the driver where a host cannot.

use std::{
    collections::BTreeMap,
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

pub use millstream_common::outcome::{
    Exit, Expectation, LeakedProcess, LogTotals, OutcomeKind, Phase, PhaseEnd, Reason,
};
use millstream_common::{
    id::{BlockName, StreamName, TaskId, TestName},
    limits,
    text::{counted, printable, spoken},
};
use serde::Serialize;

/// What came of one task: always with the reason, the phase and the place of its log.
///
/// `Display` is one sentence that names task, stream and host, followed by the last lines of output unless the task
/// passed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Outcome {
    /// The task.
    pub task_id: TaskId,
    /// The stream that it ran on.
    pub stream: StreamName,
    /// The host of that stream, as its definition or the host itself names it.
    pub host: String,
    /// Name of the block.
    pub block: BlockName,
    /// Number in its stream, from 1.
    pub stream_number: u32,
    /// Number in the whole test, from 1.
    pub test_number: u32,
    /// What came of it.
    #[serde(rename = "outcome")]
    pub kind: OutcomeKind,
    /// Why.
    pub reason: Reason,
    /// The phase that decided; none when none was begun.
    pub phase: Option<Phase>,
    /// Program and arguments of that phase, or of the run phase when none was begun; empty when the block was not valid.
    pub command: Vec<String>,
    /// How the process of that phase ended.
    pub exit: Option<Exit>,
    /// Evidence, one line: what was attempted and what answered. May be empty.
    pub detail: String,
    /// Which end was expected.
    pub expectation: Expectation,
    /// When it was scheduled, in nanoseconds since 1970 by the controller's clock.
    pub schedule_time_ns: u64,
    /// When its first phase began, corrected to the controller's clock.
    pub start_time_ns: Option<u64>,
    /// When everything of it had ended, corrected to the controller's clock.
    pub end_time_ns: Option<u64>,
    /// From the beginning of the first phase to the end of the last, by a clock that is never set.
    pub duration: Duration,
    /// How each begun phase ended, in order.
    pub phases: Vec<PhaseEnd>,
    /// Processes that were left over and had to be ended; the first 64.
    pub leaked: Vec<LeakedProcess>,
    /// Number of all of them.
    pub leaked_count: u32,
    /// What was printed.
    pub log: LogTotals,
    /// The last lines of output, oldest first, safe to print.
    pub last_lines: Vec<String>,
    /// Entries of the output directory that did not come home, with the reason.
    pub skipped: Vec<String>,
    /// Directory of this task's results.
    pub results: PathBuf,
    /// What went wrong here while its results were written; the task ended as it says nevertheless.
    pub results_error: Option<String>,
    /// The task whose failure made this one fail or kept it from running, by breaking a barrier that it waited at, by
    /// draining its stream, or because the test fails fast: this one is a *follower*.
    pub caused_by: Option<CausedBy>,
}

/// Why a task is a follower.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct CausedBy {
    /// The task that failed.
    pub task_id: TaskId,
    /// That task as text, such as `server/1-netserver`.
    pub task: String,
}

impl CausedBy {
    /// Names the task.
    #[must_use]
    pub fn new(task_id: TaskId, task: impl Into<String>) -> Self {
        Self { task_id, task: task.into() }
    }
}

impl Outcome {
    /// Whether it passed.
    #[must_use]
    pub fn passed(&self) -> bool {
        self.kind == OutcomeKind::Passed
    }

    /// Whether this end was expected: a stop and a cancellation on request always are, an error and a loss never, nor what
    /// follows the failure of another task, nor what an expired lease has ended or kept from beginning.
    #[must_use]
    pub fn is_expected(&self) -> bool {
        self.reason.can_be_expected() && self.kind.is_expected(self.expectation)
    }

    /// Whether it only failed, or did not run, because of another task's failure.
    #[must_use]
    pub fn is_follower(&self) -> bool {
        self.caused_by.is_some()
    }

    /// Exit code of the phase that decided, when it exited by itself.
    #[must_use]
    pub fn exit_code(&self) -> Option<i32> {
        match self.exit {
            Some(Exit::Code(code)) => Some(code),
            _ => None,
        }
    }

    /// The signal that ended the phase that decided, when one did.
    #[must_use]
    pub fn signal(&self) -> Option<i32> {
        match self.exit {
            Some(Exit::Signal(signal)) => Some(signal),
            _ => None,
        }
    }

    /// What the block wrote on its whiteboard; empty when it wrote nothing. Read from the results, at most 1 MiB.
    #[must_use]
    pub fn whiteboard(&self) -> String {
        self.read("whiteboard", limits::WHITEBOARD_BYTES_MAX)
    }

    /// Standard output as text, at most its first 16 MiB. The whole is in [`Outcome::stdout_path`].
    #[must_use]
    pub fn stdout(&self) -> String {
        self.read("stdout", 16 * limits::WHITEBOARD_BYTES_MAX)
    }

    /// Standard error as text, at most its first 16 MiB. The whole is in [`Outcome::stderr_path`].
    #[must_use]
    pub fn stderr(&self) -> String {
        self.read("stderr", 16 * limits::WHITEBOARD_BYTES_MAX)
    }

    /// What a Rust block returned. One that returned nothing gives what `null` is read as, such as `()` or `None`. Read from
    /// the results, at most 16 MiB.
    ///
    /// # Errors
    /// When the task did not pass, or the value has another type.
    pub fn value<T: serde::de::DeserializeOwned>(&self) -> Result<T, ValueError> {
        let path = self.data().join(crate::context::VALUE_FILE);
        if !self.passed() {
            return Err(ValueError::NotPassed { sentence: self.sentence() });
        }
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => "null".to_owned(),
            Err(source) => return Err(ValueError::Read { path, source }),
        };
        serde_json::from_str(&text).map_err(|source| ValueError::Type {
            task: self.label(),
            type_name: std::any::type_name::<T>(),
            source,
        })
    }

    fn read(&self, name: &str, limit: u64) -> String {
        // A task that came after the end of the test has no directory.
        if self.results.as_os_str().is_empty() {
            String::new()
        } else {
            read_bounded(&self.results.join(name), limit)
        }
    }

    /// The file with standard output, byte for byte.
    #[must_use]
    pub fn stdout_path(&self) -> PathBuf {
        self.results.join("stdout")
    }

    /// The file with standard error, byte for byte.
    #[must_use]
    pub fn stderr_path(&self) -> PathBuf {
        self.results.join("stderr")
    }

    /// The directory with what the block left in `MILLSTREAM_OUTPUT`. It may not exist: nothing was left then.
    #[must_use]
    pub fn data(&self) -> PathBuf {
        self.results.join("data")
    }

    /// Number and block, such as `1-netserver`.
    #[must_use]
    pub fn label(&self) -> String {
        format!("{}-{}", self.stream_number, self.block)
    }

    /// One sentence without the last lines of output.
    #[must_use]
    pub fn sentence(&self) -> String {
        let mut text =
            format!("task {} on stream {} ({}): {}", self.label(), self.stream, self.host, self.kind);
        if let Some(phase) = self.phase
            && !self.passed()
        {
            text += &format!(" in phase {phase}");
        }
        match (self.exit, self.reason) {
            (Some(exit), Reason::Exited | Reason::Signaled) if !self.passed() => {
                text += &format!(" with {exit}")
            }
            (Some(exit @ Exit::Signal(_)), _) => text += &format!(" ({}, {exit})", self.reason),
            (None, Reason::Exited) | (_, Reason::Exited) => {}
            (_, reason) => text += &format!(" ({reason})"),
        }
        if self.start_time_ns.is_some() {
            text += &format!(" after {}", spoken(self.duration));
        }
        if !self.detail.is_empty() {
            text += ": ";
            text += &printable(self.detail.as_bytes(), limits::SENTENCE_BYTES_MAX);
        }
        if let Some(cause) = &self.caused_by
            && !self.reason.is_consequence()
        {
            text += &format!(", because of {}", cause.task);
        }
        if self.is_expected() && self.expectation == Expectation::Fail && !self.passed() {
            text += ", as expected";
        }
        if !self.is_expected() && self.passed() {
            text += ", although it was expected to fail";
        }
        if self.leaked_count > 0 {
            let count = usize::try_from(self.leaked_count).unwrap_or(usize::MAX);
            text += &format!("; {} left over and ended", counted_processes(count));
        }
        if let Some(error) = &self.results_error {
            text += &format!("; its results are incomplete: {error}");
        }
        text
    }
}

fn counted_processes(count: usize) -> String {
    if count == 1 { "1 process was".to_owned() } else { format!("{count} processes were") }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.sentence())?;
        if !self.passed() {
            for line in &self.last_lines {
                write!(f, "\n  | {line}")?;
            }
        }
        Ok(())
    }
}

/// Why the value of a task cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ValueError {
    /// Only a block that passed has a value.
    #[error("there is no value: {sentence}")]
    NotPassed {
        /// How the task ended.
        sentence: String,
    },
    /// The results cannot be read.
    #[error("failed to read the value in `{}`", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It has another type.
    #[error("what task {task} returned cannot be read as `{type_name}`")]
    Type {
        /// The task.
        task: String,
        /// The type that was wanted.
        type_name: &'static str,
        /// Why not.
        #[source]
        source: serde_json::Error,
    },
}

/// The beginning of a text file; empty when it cannot be read.
fn read_bounded(path: &Path, limit: u64) -> String {
    use std::io::Read as _;
    let mut bytes = Vec::new();
    if let Ok(file) = std::fs::File::open(path) {
        // What was read until an error is the best there is to show.
        let _read = file.take(limit).read_to_end(&mut bytes);
    }
    String::from_utf8(bytes).unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned())
}

/// One cause and what it dragged along.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Failure {
    /// The task that ended unexpectedly by itself.
    pub outcome: Arc<Outcome>,
    /// Tasks that ended unexpectedly because this one did: it broke their barriers, drained their stream or ended the test.
    pub followers: Vec<Arc<Outcome>>,
}

/// Every unexpected end of a test, one failure for each cause.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct FailureReport {
    /// The test.
    pub test: TestName,
    /// The failures, in the order in which their tasks were scheduled.
    pub failures: Vec<Failure>,
}

impl std::error::Error for FailureReport {}

impl FailureReport {
    /// Sorts unexpected ends into causes and followers; none when every end was expected.
    ///
    /// # Panics
    /// Never: a root is among the unexpected ends that it is the root of.
    #[must_use]
    pub fn of<'a>(test: &TestName, outcomes: impl IntoIterator<Item = &'a Arc<Outcome>>) -> Option<Self> {
        let unexpected: BTreeMap<u32, &Arc<Outcome>> =
            outcomes.into_iter().filter(|o| !o.is_expected()).map(|o| (o.test_number, o)).collect();
        if unexpected.is_empty() {
            return None;
        }
        let by_id: BTreeMap<TaskId, u32> = unexpected.values().map(|o| (o.task_id, o.test_number)).collect();
        let mut failures: BTreeMap<u32, Failure> = BTreeMap::new();
        let mut followers = Vec::new();
        for (&number, outcome) in &unexpected {
            match root_of(number, &unexpected, &by_id) {
                root if root == number => {
                    let failure = Failure { outcome: Arc::clone(outcome), followers: Vec::new() };
                    failures.insert(number, failure);
                }
                root => followers.push((root, Arc::clone(outcome))),
            }
        }
        for (root, follower) in followers {
            let failure = failures.get_mut(&root).expect("a root is an unexpected end that follows nobody");
            failure.followers.push(follower);
        }
        Some(Self { test: test.clone(), failures: failures.into_values().collect() })
    }

    /// Number of failures: followers are not counted.
    #[must_use]
    pub fn count(&self) -> usize {
        self.failures.len()
    }
}

/// Follows causes to the task that follows nobody. In a circle, the one with the lowest number is the root for all.
fn root_of(start: u32, unexpected: &BTreeMap<u32, &Arc<Outcome>>, by_id: &BTreeMap<TaskId, u32>) -> u32 {
    let mut path = vec![start];
    loop {
        let last = path[path.len() - 1];
        let next = unexpected[&last].caused_by.as_ref().and_then(|cause| by_id.get(&cause.task_id));
        let Some(&next) = next else { return last };
        if let Some(begin) = path.iter().position(|&number| number == next) {
            return path[begin..].iter().copied().min().unwrap_or(next);
        }
        path.push(next);
    }
}

impl fmt::Display for FailureReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} in test `{}`", counted(self.failures.len(), "failure"), self.test)?;
        for (index, failure) in self.failures.iter().enumerate() {
            let indented = failure.outcome.to_string().replace('\n', "\n   ");
            write!(f, "\n{}. {indented}", index + 1)?;
            write!(f, "\n   results: {}", failure.outcome.results.display())?;
            for follower in &failure.followers {
                write!(f, "\n   followed by {}", follower.sentence())?;
            }
        }
        Ok(())
    }
}

/// Everything that came of a test: what [`Streams::join`](crate::Streams::join) returns, failures or not.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Report {
    /// The test.
    pub test: TestName,
    /// Outcomes of all tasks, in the order in which they were scheduled.
    pub outcomes: Vec<Arc<Outcome>>,
}

impl Report {
    /// Whether every task ended as expected.
    #[must_use]
    pub fn success(&self) -> bool {
        self.outcomes.iter().all(|outcome| outcome.is_expected())
    }

    /// The unexpected ends, one failure for each cause; none when there are none.
    #[must_use]
    pub fn failures(&self) -> Option<FailureReport> {
        FailureReport::of(&self.test, &self.outcomes)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.failures() {
            Some(failures) => write!(f, "{failures}"),
            None => write!(f, "{} in test `{}`, no failure", counted(self.outcomes.len(), "task"), self.test),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use millstream_common::clock::{Ids as _, SystemIds};

    use super::*;

    /// An outcome as a test wants it.
    pub(crate) fn outcome(number: u32, kind: OutcomeKind) -> Outcome {
        Outcome {
            task_id: SystemIds.task_id(),
            stream: StreamName::new("server").unwrap(),
            host: "foo".to_owned(),
            block: BlockName::new("netserver").unwrap(),
            stream_number: number,
            test_number: number,
            kind,
            reason: Reason::Exited,
            phase: Some(Phase::Run),
            command: vec!["netserver".to_owned()],
            exit: Some(Exit::Code(i32::from(kind != OutcomeKind::Passed))),
            detail: String::new(),
            expectation: Expectation::Pass,
            schedule_time_ns: 1,
            start_time_ns: Some(2),
            end_time_ns: Some(3),
            duration: Duration::from_millis(200),
            phases: Vec::new(),
            leaked: Vec::new(),
            leaked_count: 0,
            log: LogTotals::default(),
            last_lines: Vec::new(),
            skipped: Vec::new(),
            results: PathBuf::from("results/t/streams/server/1-netserver"),
            results_error: None,
            caused_by: None,
        }
    }

    fn following(number: u32, cause: &Outcome) -> Outcome {
        let caused_by = CausedBy::new(cause.task_id, format!("task {}", cause.label()));
        Outcome { caused_by: Some(caused_by), ..outcome(number, OutcomeKind::Failed) }
    }

    fn report(outcomes: Vec<Outcome>) -> Option<FailureReport> {
        let outcomes: Vec<_> = outcomes.into_iter().map(Arc::new).collect();
        FailureReport::of(&TestName::new("t").unwrap(), &outcomes)
    }

    #[test]
    fn a_sentence_names_task_stream_host_phase_exit_and_duration() {
        let mut failed = outcome(1, OutcomeKind::Failed);
        failed.last_lines = vec!["no such host".to_owned()];
        assert_eq!(
            failed.to_string(),
            "task 1-netserver on stream server (foo): failed in phase run with exit code 1 after 0.2 s\n  | no such host"
        );
        assert_eq!(
            outcome(1, OutcomeKind::Passed).to_string(),
            "task 1-netserver on stream server (foo): passed after 0.2 s"
        );
    }

    #[test]
    fn a_follower_is_listed_under_its_cause_and_not_counted() {
        let cause = outcome(1, OutcomeKind::Failed);
        let follower = following(2, &cause);
        let second = following(3, &follower);
        let report = report(vec![cause, follower, second, outcome(4, OutcomeKind::Passed)]).unwrap();
        assert_eq!(report.count(), 1);
        assert_eq!(report.failures[0].followers.len(), 2);
        assert!(report.to_string().starts_with("1 failure in test `t`\n1. task 1-netserver"));
    }

    #[test]
    fn a_follower_of_an_expected_failure_is_a_failure_of_its_own() {
        let mut cause = outcome(1, OutcomeKind::Failed);
        cause.expectation = Expectation::Fail;
        let follower = following(2, &cause);
        assert_eq!(report(vec![cause, follower]).unwrap().count(), 1);
    }

    #[test]
    fn a_circle_of_followers_counts_once() {
        let mut one = outcome(1, OutcomeKind::Failed);
        let two = following(2, &one);
        one.caused_by = Some(CausedBy::new(two.task_id, "two"));
        let report = report(vec![one, two]).unwrap();
        assert_eq!((report.count(), report.failures[0].followers.len()), (1, 1));
    }

    #[test]
    fn no_unexpected_end_is_no_report() {
        assert!(report(vec![outcome(1, OutcomeKind::Passed), outcome(2, OutcomeKind::Stopped)]).is_none());
    }
}
