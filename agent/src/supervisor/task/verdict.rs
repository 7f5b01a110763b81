//! What came of a task, in a record and in sentences. Pure.
//!
//! The first thing that goes wrong decides. When that happens is not decided here.

use std::time::Duration;

use millstream_common::{
    limits,
    outcome::{Exit, OutcomeKind, Reason, TaskEnd},
    spec::Phase,
    text::{printable, spoken},
};

use super::{Action, Machine, Running, Sealed, State, Step, Why};

/// How much of a command a sentence shows.
const COMMAND_SHOWN_BYTES: usize = 120;

/// What came of the task, decided by the first thing that went wrong.
#[derive(Debug, Clone)]
pub(super) struct Verdict {
    pub(super) outcome: OutcomeKind,
    pub(super) reason: Reason,
    pub(super) phase: Option<Phase>,
    pub(super) exit: Option<Exit>,
    pub(super) detail: String,
}

impl Machine {
    /// Why it is where it is, in one sentence; for a waiting task the queue knows more.
    pub(crate) fn explain(&self) -> String {
        match &self.state {
            State::Queued | State::Ready => "waits for the task before it".to_owned(),
            State::Preparing { .. } => "its files are being put in place".to_owned(),
            State::Starting { index, .. } => format!("phase {} is being started", self.phases[*index].phase),
            State::Held => "is ready and waits for the order to go".to_owned(),
            State::Running(Running { phase, step, .. }) => match step {
                Step::Free { .. } => format!("runs phase {phase}"),
                Step::Terminating { why, .. } => {
                    format!("phase {phase} was asked to end: {}", describe(*why))
                }
                Step::Killing { why, .. } => format!("phase {phase} was killed: {}", describe(*why)),
            },
            State::EndingTree => {
                "its last phase has ended and what it left running is being ended".to_owned()
            }
            State::Sealing => "its log and results are being completed".to_owned(),
            State::Recording => "its end is being recorded".to_owned(),
            State::Finished => "has ended".to_owned(),
        }
    }

    pub(super) fn judge(
        &self,
        running: &Running,
        exit: Option<Exit>,
        out_of_memory: bool,
        duration: Duration,
    ) -> (OutcomeKind, Reason, String) {
        let (index, step) = (running.index, running.step);
        let command = self.command(index);
        match (step, exit) {
            (Step::Terminating { why, .. } | Step::Killing { why, .. }, exit) => {
                let (outcome, reason) = why.outcome();
                let how = match (step, exit) {
                    (_, None) => "killed, and could not be ended",
                    (Step::Killing { .. }, _) => "killed",
                    _ => "terminated",
                };
                let detail = match why {
                    Why::Timeout => {
                        let limit = match &self.phases[index] {
                            spec if spec.phase == running.phase => spec.timeout,
                            spec if running.phase == Phase::Setup => spec.timeout,
                            _ => None,
                        };
                        let limit = limit.unwrap_or(limits::TEARDOWN_MAX);
                        format!("{command} still ran after its limit of {} and was {how}", spoken(limit))
                    }
                    Why::Stop { .. } => {
                        format!("{command} was {how} after {}: {}", spoken(duration), describe(why))
                    }
                };
                (outcome, reason, detail)
            }
            (Step::Free { .. }, Some(Exit::Code(0))) => (OutcomeKind::Passed, Reason::Exited, String::new()),
            (Step::Free { .. }, Some(exit)) if out_of_memory => {
                let detail = format!("{command} ended with {exit}: memory ran out in its process tree");
                (OutcomeKind::Killed, Reason::OutOfMemory, detail)
            }
            (Step::Free { .. }, Some(exit @ Exit::Code(_))) => {
                (OutcomeKind::Failed, Reason::Exited, format!("{command} ended with {exit}"))
            }
            (Step::Free { .. }, Some(exit @ Exit::Signal(_))) => {
                (OutcomeKind::Killed, Reason::Signaled, format!("{command} was ended by {exit}"))
            }
            (Step::Free { .. }, None) => {
                (OutcomeKind::Killed, Reason::Signaled, format!("{command} is gone without a trace"))
            }
        }
    }

    pub(super) fn record_sealed(&mut self, sealed: Sealed, actions: &mut Vec<Action>) {
        let State::Sealing = self.state else { return };
        let last = self.ends.last();
        let mut verdict = self.verdict.take().unwrap_or(Verdict {
            outcome: OutcomeKind::Passed,
            reason: Reason::Exited,
            phase: last.map(|end| end.phase),
            exit: last.and_then(|end| end.exit),
            detail: std::mem::take(&mut self.remark),
        });
        if verdict.exit.is_none()
            && let Some(end) = last.filter(|end| Some(end.phase) == verdict.phase)
        {
            verdict.exit = end.exit;
        }
        if let Some(trouble) = sealed.trouble {
            let between = if verdict.detail.is_empty() { "" } else { "; " };
            verdict.detail = format!("{}{between}{trouble}", verdict.detail);
        }
        let end = TaskEnd {
            outcome: verdict.outcome,
            reason: verdict.reason,
            phase: verdict.phase,
            exit: verdict.exit,
            detail: printable(verdict.detail.as_bytes(), limits::TEXT_BYTES_MAX - '…'.len_utf8()),
            start_time_ns: self.start_time_ns,
            end_time_ns: self.end_time_ns,
            run_duration: self.run_duration,
            phases: std::mem::take(&mut self.ends),
            leaked: std::mem::take(&mut self.leaked),
            leaked_count: self.leaked_count,
            log: sealed.log,
            archive: sealed.archive,
            last_lines: sealed.last_lines,
            skipped: sealed.skipped,
        };
        self.record(end, actions);
    }

    pub(super) fn record_unbegun(&mut self, actions: &mut Vec<Action>) {
        let verdict = self.verdict.take().expect("who is not begun was refused or taken back");
        let detail = printable(verdict.detail.as_bytes(), limits::TEXT_BYTES_MAX - '…'.len_utf8());
        self.record(TaskEnd::never_begun(verdict.outcome, verdict.reason, detail), actions);
    }

    pub(super) fn record(&mut self, end: TaskEnd, actions: &mut Vec<Action>) {
        self.unexpected = !end.is_expected(self.expectation);
        self.state = State::Recording;
        actions.push(Action::Record(Box::new(end)));
    }

    /// The first verdict stands.
    pub(super) fn decide(
        &mut self,
        outcome: OutcomeKind,
        reason: Reason,
        phase: Option<Phase>,
        exit: Option<Exit>,
        detail: String,
    ) {
        self.verdict.get_or_insert(Verdict { outcome, reason, phase, exit, detail });
    }

    pub(super) fn command(&self, index: usize) -> String {
        format!("`{}`", printable(self.phases[index].argv.join(" ").as_bytes(), COMMAND_SHOWN_BYTES))
    }
}

const fn describe(why: Why) -> &'static str {
    match why {
        Why::Timeout => "it had reached its limit",
        Why::Stop { deadline: false } => "the controller stopped it",
        Why::Stop { deadline: true } => "the deadline of the whole test had passed",
    }
}
