//! Commands that have set-up and tear-down of their own and tell which phase they are in. Pure.
//!
//! The process is one; its phases are judged one by one as if each were a command. When the process ends, so does the last
//! of them, and what it has not told is told for it.

use std::time::{Duration, Instant};

use millstream_common::{
    limits,
    outcome::{Exit, OutcomeKind, PhaseEnd, Reason},
    spec::Phase,
};

use super::{Machine, Running, State, Step};
use crate::supervisor::reports::Report;

/// What the command of a running phase has told.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) enum Told {
    /// Nothing of phases.
    #[default]
    Nothing,
    /// A phase runs; why it has failed, if it has.
    Runs(Option<String>),
    /// The last phase is over.
    Ended,
}

impl Running {
    /// The same, to be judged while the machine goes on.
    pub(super) fn take(&mut self) -> Self {
        let told = std::mem::take(&mut self.told);
        Self { index: self.index, phase: self.phase, since: self.since, step: self.step, told }
    }
}

impl Machine {
    pub(super) fn reported(&mut self, report: Report, now: Instant) {
        let State::Running(running) = &mut self.state else { return };
        if !self.phases[running.index].reports_phases {
            return;
        }
        match report {
            Report::Began(phase) => {
                let before = running.take();
                running.told = Told::Runs(None);
                running.phase = phase;
                // The first phase has begun with its process.
                if before.told != Told::Nothing {
                    running.since = now;
                }
                running.step = match before.step {
                    Step::Killing { .. } => before.step,
                    // A teardown is how an end that was asked for goes on: it has its own limit.
                    _ if phase == Phase::Teardown => Step::Free { limit: Some(now + limits::TEARDOWN_MAX) },
                    Step::Terminating { .. } => before.step,
                    Step::Free { .. } => {
                        let limit = self.phases[before.index].timeout.map(|timeout| running.since + timeout);
                        Step::Free { limit }
                    }
                };
                self.end_told(&before, now);
            }
            Report::Failed(why) => running.told = Told::Runs(Some(why)),
            Report::Ended(remark) => {
                let before = running.take();
                running.told = Told::Ended;
                self.remark = remark;
                self.end_told(&before, now);
            }
        }
    }

    /// A phase is over by the word of its command.
    fn end_told(&mut self, before: &Running, now: Instant) {
        let Told::Runs(failure) = &before.told else { return };
        let duration = now.saturating_duration_since(before.since);
        let (outcome, reason, detail) = match (before.step, failure) {
            (Step::Free { .. }, Some(why)) => (OutcomeKind::Failed, Reason::Exited, why.clone()),
            (Step::Free { .. }, None) => (OutcomeKind::Passed, Reason::Exited, String::new()),
            (Step::Terminating { .. } | Step::Killing { .. }, _) => {
                let (outcome, reason, detail) = self.judge(before, Some(Exit::Code(0)), false, duration);
                (outcome, reason, with_failure(detail, failure.as_deref()))
            }
        };
        self.ends.push(PhaseEnd { phase: before.phase, outcome, exit: None, duration });
        if outcome != OutcomeKind::Passed {
            self.decide(outcome, reason, Some(before.phase), None, detail);
        }
    }

    /// The process is gone: what it was judged by its exit, if it has not told its end.
    pub(super) fn end_reporting(
        &mut self,
        running: &Running,
        judged: (OutcomeKind, Reason, String),
        exit: Option<Exit>,
        duration: Duration,
    ) {
        let (mut outcome, reason, mut detail) = judged;
        let phase = running.phase;
        match &running.told {
            Told::Ended => {
                let last = self.ends.last_mut().filter(|_| self.verdict.is_none());
                if let Some(last) = last {
                    (last.outcome, last.exit) = (outcome, exit);
                    if outcome != OutcomeKind::Passed {
                        self.decide(outcome, reason, Some(phase), exit, detail);
                    }
                }
            }
            Told::Nothing => {
                if outcome != OutcomeKind::Passed {
                    detail.push_str(" before it told its first phase");
                    self.decide(outcome, reason, Some(phase), exit, detail);
                }
                self.ends.push(PhaseEnd { phase, outcome, exit, duration });
            }
            Told::Runs(failure) => {
                let unrun = phase != Phase::Teardown;
                if outcome == OutcomeKind::Passed && (unrun || failure.is_some()) {
                    outcome = OutcomeKind::Failed;
                    detail = format!("{} ended in the middle of phase {phase}", self.command(running.index));
                }
                if outcome != OutcomeKind::Passed {
                    detail = with_failure(detail, failure.as_deref());
                    if unrun {
                        detail.push_str("; teardown was not run");
                    }
                    self.decide(outcome, reason, Some(phase), exit, detail);
                }
                self.ends.push(PhaseEnd { phase, outcome, exit, duration });
            }
        }
        // One process, one exit: it belongs to whichever phase decided.
        if let Some(verdict) = &mut self.verdict {
            verdict.exit = verdict.exit.or(exit);
        }
    }
}

fn with_failure(detail: String, failure: Option<&str>) -> String {
    match failure {
        Some(failure) => format!("{detail}: {failure}"),
        None => detail,
    }
}

#[cfg(test)]
mod tests {
    use expect_test::{Expect, expect};
    use millstream_common::spec::TaskSpec;

    use super::{
        super::{
            Event,
            tests::{Script, check, exited, phases, sealed, signaled, started, stop, tree_ended},
        },
        *,
    };

    /// A command that tells its phases, started at 0.
    fn check_told(script: Script<'_>, transcript: &Expect) {
        let mut spec: TaskSpec = phases(&[(Phase::Run, "work")]);
        spec.phases[0].reports_phases = true;
        let begin = [(0, Event::TurnCame), (0, Event::Prepared), (0, started(7))];
        let end = [(900, tree_ended()), (900, sealed())];
        let script: Vec<_> = begin.into_iter().chain(script.iter().cloned()).chain(end).collect();
        check(&spec, &script, transcript);
    }

    fn began(phase: Phase) -> Event {
        Event::PhaseReported(Report::Began(phase))
    }

    fn failed(why: &str) -> Event {
        Event::PhaseReported(Report::Failed(why.to_owned()))
    }

    fn ended(remark: &str) -> Event {
        Event::PhaseReported(Report::Ended(remark.to_owned()))
    }

    #[test]
    fn phases_that_are_told_are_phases() {
        check_told(
            &[
                (1, began(Phase::Setup)),
                (2, began(Phase::Run)),
                (3, began(Phase::Teardown)),
                (4, ended("skipped: no disk")),
                (4, exited(0)),
            ],
            &expect![[r#"
                prepare
                start run
                  Staged None
                  Running Some(Run)
                  Running Some(Setup)
                  Running Some(Run)
                  Running Some(Teardown)
                end tree
                  Ending None
                seal
                record passed (exited) in phase teardown: Some(Code(0)) [setup passed, run passed, teardown passed] skipped: no disk
            "#]],
        );
    }

    #[test]
    fn the_phase_that_failed_is_named_with_what_it_told() {
        check_told(
            &[
                (1, began(Phase::Setup)),
                (2, failed("NetServer.setUp raised OSError: no port")),
                (2, began(Phase::Teardown)),
                (4, ended("")),
                (4, exited(1)),
            ],
            &expect![[r#"
                prepare
                start run
                  Staged None
                  Running Some(Run)
                  Running Some(Setup)
                  Running Some(Teardown)
                end tree
                  Ending None
                seal
                record failed (exited) in phase setup: Some(Code(1)) [setup failed, teardown passed] NetServer.setUp raised OSError: no port
            "#]],
        );
    }

    #[test]
    fn a_timeout_leaves_teardown_its_own_limit() {
        check_told(
            &[
                (1, began(Phase::Setup)),
                (9, began(Phase::Run)),
                (18, Event::TimePassed),
                (19, Event::TimePassed),
                (20, failed("Slow.test raised Terminated")),
                (20, began(Phase::Teardown)),
                (70, Event::TimePassed),
                (80, Event::TimePassed),
                (85, Event::TimePassed),
                (86, signaled(9)),
            ],
            &expect![[r#"
                prepare
                start run
                  Staged None
                  Running Some(Run)
                  Running Some(Setup)
                  Running Some(Run)
                signal 15
                  Running Some(Teardown)
                signal 15
                signal 9
                end tree
                  Ending None
                seal
                record timed out (phase_timeout) in phase run: Some(Signal(9)) [setup passed, run timed out, teardown timed out] `work` still ran after its limit of 10 s and was terminated: Slow.test raised Terminated
            "#]],
        );
    }

    #[test]
    fn a_stop_is_no_failure_and_is_torn_down() {
        check_told(
            &[
                (1, began(Phase::Run)),
                (3, stop()),
                (3, failed("Server.test raised Terminated")),
                (3, began(Phase::Teardown)),
                (4, stop()),
                (5, ended("")),
                (5, exited(1)),
            ],
            &expect![[r#"
                prepare
                start run
                  Staged None
                  Running Some(Run)
                signal 15
                  Running Some(Teardown)
                end tree
                  Ending None
                seal
                record stopped (stopped) in phase run: Some(Code(1)) [run stopped, teardown passed] `work` was terminated after 3.0 s: the controller stopped it: Server.test raised Terminated
            "#]],
        );
    }

    #[test]
    fn a_crash_leaves_teardown_unrun_and_says_so() {
        check_told(
            &[(1, began(Phase::Setup)), (2, began(Phase::Run)), (3, signaled(11))],
            &expect![[r#"
            prepare
            start run
              Staged None
              Running Some(Run)
              Running Some(Setup)
              Running Some(Run)
            end tree
              Ending None
            seal
            record killed (signaled) in phase run: Some(Signal(11)) [setup passed, run killed] `work` was ended by signal SIGSEGV; teardown was not run
        "#]],
        );
        check_told(
            &[(1, began(Phase::Run)), (3, exited(0))],
            &expect![[r#"
            prepare
            start run
              Staged None
              Running Some(Run)
            end tree
              Ending None
            seal
            record failed (exited) in phase run: Some(Code(0)) [run failed] `work` ended in the middle of phase run; teardown was not run
        "#]],
        );
        check_told(
            &[(1, exited(3))],
            &expect![[r#"
            prepare
            start run
              Staged None
              Running Some(Run)
            end tree
              Ending None
            seal
            record failed (exited) in phase run: Some(Code(3)) [run failed] `work` ended with exit code 3 before it told its first phase
        "#]],
        );
        check_told(
            &[(1, began(Phase::Teardown)), (1, ended("")), (2, exited(3))],
            &expect![[r#"
            prepare
            start run
              Staged None
              Running Some(Run)
              Running Some(Teardown)
            end tree
              Ending None
            seal
            record failed (exited) in phase teardown: Some(Code(3)) [teardown failed] `work` ended with exit code 3
        "#]],
        );
    }

    #[test]
    fn one_that_does_not_listen_is_killed() {
        check_told(
            &[(1, began(Phase::Run)), (11, Event::TimePassed), (16, Event::TimePassed), (16, signaled(9))],
            &expect![[r#"
                prepare
                start run
                  Staged None
                  Running Some(Run)
                signal 15
                signal 9
                end tree
                  Ending None
                seal
                record timed out (phase_timeout) in phase run: Some(Signal(9)) [run timed out] `work` still ran after its limit of 10 s and was killed; teardown was not run
            "#]],
        );
    }
}
