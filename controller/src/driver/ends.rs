//! How tasks and the test end: who is told, and what is written.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use millstream_common::{
    id::TaskId,
    outcome::{OutcomeKind, Phase, Reason, TaskEnd},
};
use tokio::task::JoinSet;
use tracing::{debug, warn};

use super::{
    Driver, Input, StreamState, Work,
    cut::Cut,
    scribe::{Finish, Written, with_causes},
};
use crate::{
    outcome::{CausedBy, Outcome},
    reach,
    results::{
        report::{
            BarrierReport, ClockReport, HostReport, Moment, PartyReport, Seconds, StreamReport, TaskSubject,
            TestReport, WaitReport, in_global_order,
        },
        timeline::HostClock,
    },
    sync::host::{BarrierRecord, TaskFate, TopicWaitRecord},
    task::Stage,
};

impl Driver {
    /// Tells the board of barriers, once for each task, and learns from it who dragged the task along.
    pub(super) fn tell_end(&mut self, task: TaskId, end: &TaskEnd) {
        let Some(work) = self.works.get_mut(&task) else { return };
        if std::mem::replace(&mut work.told, true) {
            return;
        }
        // Nobody else should be told that a task is to blame which only follows another's failure.
        let unexpected = !end.is_expected(work.shared.expectation) && !end.reason.is_consequence();
        // Whom its host ended, or a loss, would have had that end without the barrier.
        let by_itself = matches!(end.reason, Reason::Exited | Reason::Signaled | Reason::PhaseTimeout);
        if unexpected
            && by_itself
            && let Some(culprit) = self.setup.sync.broken_by(task)
        {
            work.caused_by = culprit.task().map(|task| CausedBy::new(task, culprit.label.to_string()));
        }
        if unexpected && work.caused_by.is_none() && work.cut == Some(Cut::FailFast) {
            // It failed on its own between the order to stop and its arrival: of what the first failure has set off.
            work.caused_by = self.first_failure.as_ref().map(|(cause, _)| cause.clone());
        }
        let sentence = fate(end);
        if unexpected {
            self.note_failure(task, &sentence);
        }
        let fate = TaskFate { unexpected, sentence, last_line: end.last_lines.last().cloned() };
        self.setup.sync.task_ended(task, fate);
        self.setup.gate.forget(task);
    }

    /// The end of a task is decided: its files are completed.
    pub(super) fn complete(&mut self, task: TaskId, mut end: TaskEnd, problem: Option<String>) {
        if self.works.get(&task).is_none_or(|work| work.finishing) {
            return;
        }
        self.settle_cause(task, &mut end);
        self.tell_end(task, &end);
        let Some(work) = self.works.get_mut(&task) else { return };
        work.finishing = true;
        let clock = self
            .streams
            .get(&work.stream)
            .map_or_else(HostClock::default, |state| self.links[state.link].opened.clock);
        let shared = &work.shared;
        let unopened = match &work.recorder {
            Some(_) => None,
            None => Some(self.setup.writer.task(
                &shared.stream,
                shared.stream_number,
                shared.test_number,
                &shared.block,
            )),
        };
        let subject = TaskSubject {
            task_id: task,
            stream: shared.stream.clone(),
            host: shared.host.clone(),
            stream_number: shared.stream_number,
            test_number: shared.test_number,
            block: shared.block.clone(),
            command: work.commands.get(&Phase::Run).cloned().unwrap_or_default(),
            expectation: shared.expectation,
            enqueue_time_ns: shared.schedule_time_ns,
        };
        let inbox = Arc::clone(&self.setup.inbox);
        self.setup.scribe.finish(Finish {
            subject,
            end,
            clock,
            caused_by: work.caused_by.as_ref().map(|cause| cause.task.clone()),
            problem,
            runs_streams: shared.runs_streams,
            unopened,
            done: Box::new(move |written| {
                if inbox.put(Input::Written(Box::new(written))).is_err() {
                    debug!("a task was written after the end of the test");
                }
            }),
        });
    }

    pub(super) fn written(&mut self, written: Written) {
        let Written { task, report, end, results, problem, nested } = written;
        self.nested.extend(nested);
        let Some(work) = self.works.remove(&task) else { return };
        let clock = match self.streams.get_mut(&work.stream) {
            Some(state) => {
                state.tasks.remove(&work.shared.stream_number);
                self.links[state.link].opened.clock
            }
            None => HostClock::default(),
        };
        self.reports.insert(work.shared.test_number, report);
        let outcome = Arc::new(outcome(&work, end, clock, results, problem));
        if !outcome.is_expected() {
            warn!(task = outcome.label(), stream = %outcome.stream, "{}", outcome.sentence());
            if let Some(state) = self.streams.get(&work.stream) {
                state.shared.reach().task_failed();
            }
        }
        self.debug_line(&outcome.sentence());
        // The outcome is there before anybody is told that it is.
        if work.shared.outcome.set(Arc::clone(&outcome)).is_err() {
            debug!(%task, "a task ended twice");
        }
        self.setup.shared.finished(outcome);
        work.shared.stage.send_replace(Stage::Finished);
        self.settle_retired(work.stream);
    }

    pub(super) fn debug_line(&self, text: &str) {
        let now = self.setup.world.clock.wall_ns();
        if let Err(error) = self.setup.writer.debug(now, text) {
            debug!("{}", with_causes(&error));
        }
    }

    /// Reaches that somebody made by hand and no stream ever used are tidied as well: links see to those that were.
    pub(super) async fn release_unused(&mut self) {
        let mut releasing = JoinSet::new();
        for stream in self.setup.shared.streams() {
            let Some(reach) = stream.made_by_hand() else { continue };
            let place = reach.describe();
            if !self.links.iter().any(|link| link.place == place) {
                let reach = Arc::clone(reach);
                releasing.spawn(async move { reach::released(&*reach).await });
            }
        }
        // Streams that share a reach tell the same.
        let left: BTreeSet<String> = releasing.join_all().await.into_iter().flatten().collect();
        self.left_behind.extend(left);
    }

    /// Every session is closed: what had not ended was ended with it.
    pub(super) fn finish_remaining(&mut self) {
        let mut tasks: Vec<(u32, TaskId)> =
            self.works.iter().map(|(&task, work)| (work.shared.test_number, task)).collect();
        tasks.sort_unstable();
        for (_, task) in tasks {
            let Some(work) = self.works.get_mut(&task) else { continue };
            let (end, problem) = match work.end.take() {
                Some(end) => {
                    (end, Some("the streams were closed before everything of it had arrived".to_owned()))
                }
                None if work.cut == Some(Cut::Deadline) => (
                    TaskEnd::never_begun(OutcomeKind::TimedOut, Reason::TestDeadline, self.deadline_text()),
                    None,
                ),
                None if work.recorder.is_some() => {
                    let detail = "the streams were closed while it ran";
                    (TaskEnd::never_begun(OutcomeKind::Stopped, Reason::SessionClosed, detail), None)
                }
                None => {
                    let detail = "the streams were closed before it began";
                    (TaskEnd::never_begun(OutcomeKind::Cancelled, Reason::SessionClosed, detail), None)
                }
            };
            self.complete(task, end, problem);
        }
    }

    pub(super) fn stream_report(&self, state: &StreamState) -> StreamReport {
        let opened = &self.links[state.link].opened;
        let host = &opened.host;
        let reached = !opened.version.is_empty();
        StreamReport {
            name: state.shared.name.clone(),
            index: state.shared.index,
            definition: state.shared.definition(),
            host: reached.then(|| HostReport {
                host: state.shared.host().to_owned(),
                hostname: host.hostname.clone(),
                kernel: host.kernel.clone(),
                architecture: host.architecture.clone(),
                distribution: host.distribution.clone(),
                processors_count: host.processors_count,
                memory_bytes: host.memory_bytes,
                addresses: host.addresses.clone(),
                agent_version: opened.version.clone(),
                containment: opened.capabilities.containment.clone(),
                limits: opened.capabilities.limits.clone(),
                python: opened.capabilities.python.clone(),
            }),
            clock: ClockReport::of(opened.clock),
        }
    }

    pub(super) fn write_stream(&self, stream: usize) {
        if let Some(state) = self.streams.get(&stream)
            && let Err(error) = self.setup.writer.stream(&self.stream_report(state))
        {
            warn!("{}", with_causes(&error));
        }
    }

    /// Writes what came of the test and ends everything that the driver started.
    pub(super) fn end(mut self) -> Vec<String> {
        // From here on blocks that are scheduled come back to who schedules them.
        for input in self.setup.inbox.close() {
            if let Input::Schedule(schedule) = input {
                self.setup.shared.refuse(&schedule.task);
            }
        }
        let sync = self.setup.sync.records();
        let mut nested = std::mem::take(&mut self.nested);
        nested.sort_by_key(|task| task.enqueue_time_ns);
        let streams = self.streams.values().map(|state| self.stream_report(state)).collect();
        for &stream in self.streams.keys() {
            self.write_stream(stream);
        }
        let failures = self.setup.shared.report().failures();
        let report = TestReport {
            test: self.setup.test.clone(),
            success: failures.is_none(),
            failures_count: failures.as_ref().map_or(0, |report| report.count()),
            followers_count: failures
                .as_ref()
                .map_or(0, |report| report.failures.iter().map(|failure| failure.followers.len()).sum()),
            version: env!("CARGO_PKG_VERSION"),
            start_time: Moment(self.begin_ns),
            end_time: Moment(self.setup.world.clock.wall_ns()),
            streams,
            tasks: in_global_order(self.reports.into_values(), nested),
            barriers: barriers(sync.barriers),
            waits: waits(sync.waits),
            waits_omitted_count: sync.waits_omitted_count,
            left_behind: self.left_behind.clone(),
        };
        self.setup.scribe.stop();
        let mut left_behind = self.left_behind;
        if let Err(error) = self.setup.writer.finish_test(&report) {
            left_behind.push(with_causes(&error));
        }
        left_behind
    }
}

/// What a task did, to stand behind its name.
fn fate(end: &TaskEnd) -> String {
    let mut text = end.outcome.to_string();
    match end.exit {
        Some(exit) if end.outcome != OutcomeKind::Passed => text += &format!(" with {exit}"),
        None if end.reason != Reason::Exited => text += &format!(" ({})", end.reason),
        _ => {}
    }
    text
}

fn outcome(
    work: &Work,
    end: TaskEnd,
    clock: HostClock,
    results: std::path::PathBuf,
    results_error: Option<String>,
) -> Outcome {
    let shared = &work.shared;
    let command = work.commands.get(&end.phase.unwrap_or(Phase::Run)).cloned().unwrap_or_default();
    Outcome {
        task_id: shared.id,
        stream: shared.stream.clone(),
        host: shared.host.clone(),
        block: shared.block.clone(),
        stream_number: shared.stream_number,
        test_number: shared.test_number,
        kind: end.outcome,
        reason: end.reason,
        phase: end.phase,
        command,
        exit: end.exit,
        detail: end.detail,
        expectation: shared.expectation,
        schedule_time_ns: shared.schedule_time_ns,
        start_time_ns: end.start_time_ns.map(|time| clock.to_controller(time)),
        end_time_ns: end.end_time_ns.map(|time| clock.to_controller(time)),
        duration: end.run_duration,
        phases: end.phases,
        leaked: end.leaked,
        leaked_count: end.leaked_count,
        log: end.log,
        last_lines: end.last_lines,
        skipped: end.skipped,
        results,
        results_error,
        caused_by: work.caused_by.clone(),
    }
}

fn barriers(records: Vec<BarrierRecord>) -> Vec<BarrierReport> {
    records
        .into_iter()
        .map(|record| BarrierReport {
            name: record.name.to_string(),
            generation: record.generation,
            parties_count: record.parties,
            end_time: Some(Moment(record.decided_time_ns)),
            broken: record.broken,
            last: record.last.filter(|_| record.released),
            by_hand: record.by_hand,
            parties: record
                .waits
                .into_iter()
                .map(|wait| PartyReport {
                    name: wait.party,
                    task_id: wait.task,
                    enter_time: Moment(wait.entered_time_ns),
                    wait_seconds: Seconds(Duration::from_nanos(wait.waited_ns)),
                    by_hand: wait.by_hand,
                })
                .collect(),
        })
        .collect()
}

fn waits(records: Vec<TopicWaitRecord>) -> Vec<WaitReport> {
    records
        .into_iter()
        .map(|record| WaitReport {
            topic: record.topic.to_string(),
            party: record.party,
            task_id: record.task,
            count: record.count,
            begin_time: Moment(record.began_time_ns),
            wait_seconds: Seconds(Duration::from_nanos(record.waited_ns)),
            failed: record.failed,
            subscribed: record.subscribed,
            by_hand: record.by_hand,
        })
        .collect()
}
