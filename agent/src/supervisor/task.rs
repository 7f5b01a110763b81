//! Life of one task: queued, staged, running(phase), ending, finished. Pure.
//!
//! ```text
//! queued -> preparing -> ready --its turn--> starting -> running(phase) --next phase--> starting
//!    |          |          |        |                        |
//!    |          |          |        +--> held --go--> running(phase)
//!    |          |          |              |                  +--last phase--> ending the tree -> sealing
//!    +----------+----------+--------------+-- taken back, drained, refused --------------------> recording -> finished
//! ```
//!
//! A phase that has begun is followed by `teardown`, whatever came of it, unless the session is over. A phase is ended in
//! steps: terminate, grace, kill, give up. It owns no process, writes no record and asks no clock: it tells what is to be
//! done and is told what came of it.

mod reported;
mod verdict;
mod words;

use std::time::{Duration, Instant};

use millstream_common::{
    limits,
    outcome::{Exit, LeakedProcess, OutcomeKind, PhaseEnd, Reason},
    spec::{FailurePolicy, Phase, PhaseSpec, TaskSpec},
};

use reported::Told;
use verdict::Verdict;
pub use words::Refusal;
pub(crate) use words::{Action, Event, KILL, Sealed, SessionEnd, Stage, TERMINATE};

#[derive(Debug)]
enum State {
    /// Nothing was done for it yet.
    Queued,
    /// Files are being put in place.
    Preparing { turn_came: bool },
    /// Files are in place; its turn has not come.
    Ready,
    /// A process was ordered.
    Starting { index: usize, held: bool },
    /// The process of the first phase exists and waits.
    Held,
    /// A phase runs.
    Running(Running),
    /// The tree is being ended.
    EndingTree,
    /// Log and results are being completed.
    Sealing,
    /// The terminal record is being written.
    Recording,
    /// There is a terminal record.
    Finished,
}

#[derive(Debug)]
struct Running {
    index: usize,
    /// The phase of the specification, or the one that its command tells.
    phase: Phase,
    since: Instant,
    step: Step,
    told: Told,
}

/// How far the end of a phase has been forced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// It runs by itself.
    Free { limit: Option<Instant> },
    /// It was asked to end.
    Terminating { why: Why, kill_at: Instant },
    /// It was killed.
    Killing { why: Why, give_up_at: Instant },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Why {
    Timeout,
    Stop { deadline: bool },
}

impl Why {
    const fn outcome(self) -> (OutcomeKind, Reason) {
        match self {
            Self::Timeout => (OutcomeKind::TimedOut, Reason::PhaseTimeout),
            Self::Stop { deadline: false } => (OutcomeKind::Stopped, Reason::Stopped),
            Self::Stop { deadline: true } => (OutcomeKind::TimedOut, Reason::TestDeadline),
        }
    }
}

/// An order that could not be followed yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pending {
    Stop { grace: Duration, deadline: bool },
    SessionEnd(SessionEnd),
}

/// The life of one task.
#[derive(Debug)]
pub(crate) struct Machine {
    phases: Vec<PhaseSpec>,
    grace: Duration,
    hold: bool,
    drains: bool,
    expectation: millstream_common::outcome::Expectation,
    label: String,
    state: State,
    went: bool,
    pending: Option<Pending>,
    verdict: Option<Verdict>,
    pid: Option<u32>,
    began: Option<Instant>,
    start_time_ns: Option<u64>,
    end_time_ns: Option<u64>,
    run_duration: Duration,
    ends: Vec<PhaseEnd>,
    leaked: Vec<LeakedProcess>,
    leaked_count: u32,
    unexpected: bool,
    /// What a command that passed has to say about it.
    remark: String,
}

impl Machine {
    /// A task that was accepted and waits.
    pub(crate) fn new(spec: &TaskSpec) -> Self {
        Self {
            phases: spec.phases.clone(),
            grace: spec.grace,
            hold: spec.hold,
            drains: spec.failure_policy == FailurePolicy::Drain,
            expectation: spec.expectation,
            label: format!("{}-{}", spec.stream_number, spec.name),
            state: State::Queued,
            went: false,
            pending: None,
            verdict: None,
            pid: None,
            began: None,
            start_time_ns: None,
            end_time_ns: None,
            run_duration: Duration::ZERO,
            ends: Vec::new(),
            leaked: Vec::new(),
            leaked_count: 0,
            unexpected: false,
            remark: String::new(),
        }
    }

    /// A task that has its record already.
    pub(crate) fn ended(spec: &TaskSpec) -> Self {
        Self { state: State::Finished, ..Self::new(spec) }
    }

    /// Takes in one event. Never blocks and never reads a clock. Repeated orders are harmless, and so are orders that
    /// come too late.
    pub(crate) fn handle(&mut self, event: Event, now: Instant, actions: &mut Vec<Action>) {
        let before = (self.stage(), self.phase(), self.pid);
        match event {
            Event::BecameNext => self.prepare(false, actions),
            Event::TurnCame => self.take_turn(actions),
            Event::Prepared => self.go_on_prepared(actions),
            Event::NotPrepared(refusal) => self.refuse_to_prepare(refusal, actions),
            Event::GoOrdered => self.go(actions),
            Event::CancelOrdered => {
                self.withdraw(Reason::Cancelled, "the controller took it back before it began", actions);
            }
            Event::StopOrdered { grace, deadline } => {
                self.stop(grace.unwrap_or(self.grace), deadline, now, actions);
            }
            Event::SignalOrdered(signal) => {
                if let State::Running(_) = self.state {
                    actions.push(Action::Signal(signal));
                }
            }
            Event::Drained { after } => {
                let why = format!("{after} ended unexpectedly and its stream is drained then");
                self.withdraw(Reason::Drained, &why, actions);
            }
            Event::SessionEnded(why) => self.end_session(why, now, actions),
            Event::PhaseStarted { pid, wall_ns } => self.started(pid, wall_ns, now, actions),
            Event::Went { wall_ns } => self.began(wall_ns, now, actions),
            Event::PhaseNotStarted(refusal) => self.not_started(refusal, now, actions),
            Event::PhaseReported(report) => self.reported(report, now),
            Event::PhaseExited { exit, out_of_memory } => self.exited(exit, out_of_memory, now, actions),
            Event::TreeEnded { leaked, leaked_count, survivors, wall_ns } => {
                if let State::EndingTree = self.state {
                    (self.leaked, self.leaked_count) = (leaked, leaked_count);
                    self.tree_ended(survivors, wall_ns, actions);
                }
            }
            Event::Sealed(sealed) => self.record_sealed(*sealed, actions),
            Event::Recorded => {
                if let State::Recording = self.state {
                    self.state = State::Finished;
                }
            }
            Event::TimePassed => self.pass_time(now, actions),
        }
        if before != (self.stage(), self.phase(), self.pid) {
            actions.push(Action::Announce);
        }
        #[cfg(test)]
        self.assert_invariants();
    }

    /// The next moment at which time alone changes something.
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        match &self.state {
            State::Running(running) => match running.step {
                Step::Free { limit } => limit,
                Step::Terminating { kill_at, .. } => Some(kill_at),
                Step::Killing { give_up_at, .. } => Some(give_up_at),
            },
            _ => None,
        }
    }

    /// Where it is in its life.
    pub(crate) fn stage(&self) -> Stage {
        match self.state {
            State::Queued | State::Preparing { .. } | State::Ready => Stage::Queued,
            State::Starting { .. } if self.began.is_none() => Stage::Staged,
            State::Held => Stage::Staged,
            State::Starting { .. } | State::Running(_) => Stage::Running,
            State::EndingTree | State::Sealing | State::Recording => Stage::Ending,
            State::Finished => Stage::Finished,
        }
    }

    /// The phase that runs.
    pub(crate) fn phase(&self) -> Option<Phase> {
        match &self.state {
            State::Running(running) => Some(running.phase),
            _ => None,
        }
    }

    /// The process of the phase that runs or is held.
    pub(crate) fn pid(&self) -> Option<u32> {
        self.pid
    }

    /// Number in its stream and name.
    pub(crate) fn label(&self) -> &str {
        &self.label
    }

    /// Whether it has ended and the tasks behind it are to be cancelled.
    pub(crate) fn drains(&self) -> bool {
        self.drains && self.unexpected
    }

    fn prepare(&mut self, turn_came: bool, actions: &mut Vec<Action>) {
        if let State::Queued = self.state {
            self.state = State::Preparing { turn_came };
            actions.push(Action::Prepare);
        }
    }

    fn take_turn(&mut self, actions: &mut Vec<Action>) {
        match self.state {
            State::Queued => self.prepare(true, actions),
            State::Preparing { .. } => self.state = State::Preparing { turn_came: true },
            State::Ready => self.begin(actions),
            _ => {}
        }
    }

    fn go_on_prepared(&mut self, actions: &mut Vec<Action>) {
        let State::Preparing { turn_came } = self.state else { return };
        if self.verdict.is_some() {
            self.record_unbegun(actions);
        } else if turn_came {
            self.begin(actions);
        } else {
            self.state = State::Ready;
        }
    }

    fn refuse_to_prepare(&mut self, refusal: Refusal, actions: &mut Vec<Action>) {
        if let State::Preparing { .. } = self.state {
            self.decide(OutcomeKind::Error, refusal.reason, None, None, refusal.detail);
            self.record_unbegun(actions);
        }
    }

    fn begin(&mut self, actions: &mut Vec<Action>) {
        let held = self.hold && !self.went;
        self.state = State::Starting { index: 0, held };
        actions.push(Action::StartPhase { index: 0, held });
    }

    fn go(&mut self, actions: &mut Vec<Action>) {
        let first = !self.went;
        self.went = true;
        if let State::Held = self.state
            && first
        {
            actions.push(Action::LetGo);
        }
    }

    fn started(&mut self, pid: u32, wall_ns: u64, now: Instant, actions: &mut Vec<Action>) {
        let State::Starting { index, held } = self.state else { return };
        self.pid = Some(pid);
        if held {
            self.state = State::Held;
            if self.verdict.is_some() {
                // Taken back while it was being created.
                self.end_tree(actions);
            } else if self.went {
                actions.push(Action::LetGo);
            }
            return;
        }
        self.run(index, wall_ns, now);
        self.follow_pending(now, actions);
    }

    fn began(&mut self, wall_ns: u64, now: Instant, actions: &mut Vec<Action>) {
        if let State::Held = self.state {
            self.run(0, wall_ns, now);
            self.follow_pending(now, actions);
        }
    }

    fn follow_pending(&mut self, now: Instant, actions: &mut Vec<Action>) {
        match self.pending.take() {
            Some(Pending::Stop { grace, deadline }) => self.stop(grace, deadline, now, actions),
            Some(Pending::SessionEnd(why)) => self.end_session(why, now, actions),
            None => {}
        }
    }

    fn run(&mut self, index: usize, wall_ns: u64, now: Instant) {
        if self.began.is_none() {
            (self.began, self.start_time_ns) = (Some(now), Some(wall_ns));
        }
        let phase = &self.phases[index];
        let default = (phase.phase == Phase::Teardown).then_some(limits::TEARDOWN_MAX);
        let limit = phase.timeout.or(default).map(|timeout| now + timeout);
        let (phase, told) = (phase.phase, Told::Nothing);
        self.state = State::Running(Running { index, phase, since: now, step: Step::Free { limit }, told });
    }

    fn not_started(&mut self, refusal: Refusal, now: Instant, actions: &mut Vec<Action>) {
        let index = match &self.state {
            State::Starting { index, .. } => *index,
            State::Running(running) => running.index,
            State::Held => 0,
            _ => return,
        };
        if self.ends.is_empty() {
            // The system had made a process, but nothing of the block has run in it.
            (self.began, self.start_time_ns) = (None, None);
        }
        let phase = self.phases[index].phase;
        self.decide(OutcomeKind::Error, refusal.reason, Some(phase), None, refusal.detail);
        self.pid = None;
        let over = matches!(self.pending, Some(Pending::SessionEnd(_)));
        if self.ends.is_empty() || over {
            return self.end_tree(actions);
        }
        self.ends.push(PhaseEnd { phase, outcome: OutcomeKind::Error, exit: None, duration: Duration::ZERO });
        self.go_on(index, false, now, actions);
    }

    fn exited(&mut self, exit: Exit, out_of_memory: bool, now: Instant, actions: &mut Vec<Action>) {
        match &mut self.state {
            State::Running(running) => {
                let running = running.take();
                self.pid = None;
                self.end_phase(&running, Some(exit), out_of_memory, now, actions);
            }
            State::EndingTree => {
                // It was killed with the whole tree: only now is it known how it went.
                self.pid = None;
                if let Some(last) = self.ends.last_mut().filter(|last| last.outcome == OutcomeKind::Killed) {
                    last.exit.get_or_insert(exit);
                }
            }
            State::Held => {
                // Killed from outside before its program began.
                let detail = format!("the prepared process ended before it was let go, with {exit}");
                self.decide(
                    OutcomeKind::Error,
                    Reason::StartFailed,
                    Some(self.phases[0].phase),
                    None,
                    detail,
                );
                self.pid = None;
                self.end_tree(actions);
            }
            _ => {}
        }
    }

    fn end_phase(
        &mut self,
        running: &Running,
        exit: Option<Exit>,
        out_of_memory: bool,
        now: Instant,
        actions: &mut Vec<Action>,
    ) {
        let (index, phase) = (running.index, running.phase);
        let duration = now.saturating_duration_since(running.since);
        let (outcome, reason, detail) = self.judge(running, exit, out_of_memory, duration);
        if self.phases[index].reports_phases {
            self.end_reporting(running, (outcome, reason, detail), exit, duration);
            return self.go_on(index, false, now, actions);
        }
        self.ends.push(PhaseEnd { phase, outcome, exit, duration });
        let passed = outcome == OutcomeKind::Passed;
        if !passed {
            self.decide(outcome, reason, Some(phase), exit, detail);
        }
        self.go_on(index, passed, now, actions);
    }

    /// What follows a phase: the next one if it passed, else the teardown, else the end.
    fn go_on(&mut self, index: usize, passed: bool, now: Instant, actions: &mut Vec<Action>) {
        let next =
            (index + 1..self.phases.len()).find(|&i| passed || self.phases[i].phase == Phase::Teardown);
        if let Some(began) = self.began {
            self.run_duration = now.saturating_duration_since(began);
        }
        match next {
            Some(index) => {
                self.state = State::Starting { index, held: false };
                actions.push(Action::StartPhase { index, held: false });
            }
            None => self.end_tree(actions),
        }
    }

    fn end_tree(&mut self, actions: &mut Vec<Action>) {
        self.pending = None;
        self.state = State::EndingTree;
        actions.push(Action::EndTree);
    }

    fn tree_ended(&mut self, survivors: u32, wall_ns: u64, actions: &mut Vec<Action>) {
        self.pid = None;
        if survivors > 0
            && let Some(verdict) = &mut self.verdict
        {
            verdict.detail.push_str(&format!("; {survivors} of its processes could not be ended"));
        }
        if self.start_time_ns.is_some() {
            self.end_time_ns = Some(wall_ns);
        }
        self.state = State::Sealing;
        actions.push(Action::Seal);
    }

    /// Terminates, waits for the grace period, kills.
    fn stop(&mut self, grace: Duration, deadline: bool, now: Instant, actions: &mut Vec<Action>) {
        match &mut self.state {
            State::Running(running) => {
                let why = Why::Stop { deadline };
                // A teardown is how a stop ends: it has a limit of its own.
                if running.phase == Phase::Teardown {
                    return;
                }
                match running.step {
                    Step::Free { .. } => force(running, why, grace, now, actions),
                    Step::Terminating { why, kill_at } => {
                        // Asked again: the shorter patience counts, the first cause stands.
                        running.step = Step::Terminating { why, kill_at: kill_at.min(now + grace) };
                        self.pass_time(now, actions);
                    }
                    Step::Killing { .. } => {}
                }
            }
            State::Starting { held: false, .. } => {
                self.pending.get_or_insert(Pending::Stop { grace, deadline });
            }
            State::Held if self.went => {
                self.pending.get_or_insert(Pending::Stop { grace, deadline });
            }
            _ if deadline => {
                self.withdraw(
                    Reason::TestDeadline,
                    "the deadline of the whole test passed before it began",
                    actions,
                );
            }
            _ => self.withdraw(Reason::Cancelled, "the controller took it back before it began", actions),
        }
    }

    /// Takes back a task whose first phase has not begun; on any other it does nothing.
    fn withdraw(&mut self, reason: Reason, detail: &str, actions: &mut Vec<Action>) {
        let outcome = OutcomeKind::Cancelled;
        match self.state {
            State::Queued | State::Ready => {
                self.decide(outcome, reason, None, None, detail.to_owned());
                self.record_unbegun(actions);
            }
            State::Preparing { .. } | State::Starting { held: true, .. } => {
                self.decide(outcome, reason, None, None, detail.to_owned());
            }
            State::Held if !self.went => {
                self.decide(outcome, reason, None, None, detail.to_owned());
                self.end_tree(actions);
            }
            _ => {}
        }
    }

    fn end_session(&mut self, why: SessionEnd, now: Instant, actions: &mut Vec<Action>) {
        match &self.state {
            State::Running(running) => {
                let (index, since) = (running.index, running.since);
                let phase = running.phase;
                let has_teardown = |spec: &PhaseSpec| spec.phase == Phase::Teardown || spec.reports_phases;
                let unrun = phase != Phase::Teardown && self.phases.iter().any(has_teardown);
                let mut detail = format!("{} was killed: {}", self.command(index), why.sentence());
                if unrun {
                    detail.push_str("; teardown was not run");
                }
                let duration = now.saturating_duration_since(since);
                self.ends.push(PhaseEnd { phase, outcome: OutcomeKind::Killed, exit: None, duration });
                self.decide(OutcomeKind::Killed, why.reason(), Some(phase), None, detail);
                if let Some(began) = self.began {
                    self.run_duration = now.saturating_duration_since(began);
                }
                self.end_tree(actions);
            }
            State::Starting { held: false, .. } => self.pending = Some(Pending::SessionEnd(why)),
            State::Held if self.went => self.pending = Some(Pending::SessionEnd(why)),
            _ => self.withdraw(why.reason(), why.sentence(), actions),
        }
    }

    fn pass_time(&mut self, now: Instant, actions: &mut Vec<Action>) {
        let State::Running(running) = &mut self.state else { return };
        match running.step {
            Step::Free { limit: Some(limit) } if limit <= now => {
                force(running, Why::Timeout, self.grace, now, actions);
            }
            Step::Terminating { why, kill_at } if kill_at <= now => {
                running.step = Step::Killing { why, give_up_at: now + limits::KILL_MAX };
                actions.push(Action::Signal(KILL));
            }
            Step::Killing { give_up_at, .. } if give_up_at <= now => {
                let running = running.take();
                self.end_phase(&running, None, false, now, actions);
            }
            _ => {}
        }
    }

    #[cfg(test)]
    fn assert_invariants(&self) {
        let running = matches!(self.state, State::Running(_));
        assert!(!running || self.began.is_some(), "what runs has begun");
        assert!(self.next_deadline().is_none() || running, "only what runs has a deadline");
        let reports = self.phases.iter().any(|phase| phase.reports_phases);
        assert!(reports || self.ends.len() <= self.phases.len(), "a phase ends once");
        assert!(self.ends.is_sorted_by(|a, b| a.phase < b.phase), "phases keep their order");
        let over = matches!(self.state, State::Recording | State::Finished);
        assert!(!over || self.pid.is_none(), "who has ended has no process");
        assert!(
            self.pending.is_none() || matches!(self.state, State::Starting { .. } | State::Held),
            "orders do not rest"
        );
    }
}

/// Takes the first step of ending a phase.
fn force(running: &mut Running, why: Why, grace: Duration, now: Instant, actions: &mut Vec<Action>) {
    if grace.is_zero() {
        running.step = Step::Killing { why, give_up_at: now + limits::KILL_MAX };
        actions.push(Action::Signal(KILL));
    } else {
        running.step = Step::Terminating { why, kill_at: now + grace };
        actions.push(Action::Signal(TERMINATE));
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use expect_test::{Expect, expect};
    use millstream_common::{
        clock::{Clock as _, SystemClock},
        id::{BlockName, StreamName},
        outcome::Expectation,
        spec::{OutputDescriptors, ResourceLimits},
    };
    use proptest::prelude::*;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    pub(super) fn phases(phases: &[(Phase, &str)]) -> TaskSpec {
        let phase = |&(phase, program): &(Phase, &str)| PhaseSpec {
            phase,
            argv: vec![program.to_owned()],
            timeout: (phase == Phase::Run).then_some(10 * SECOND),
            output: OutputDescriptors::Standard,
            reports_phases: false,
        };
        TaskSpec {
            stream: StreamName::new("s").unwrap(),
            name: BlockName::new("block").unwrap(),
            stream_number: 1,
            test_number: 1,
            files: Vec::new(),
            phases: phases.iter().map(phase).collect(),
            environment: BTreeMap::new(),
            working_directory: String::new(),
            user: None,
            limits: ResourceLimits::default(),
            grace: 5 * SECOND,
            log_head_bytes: 0,
            log_tail_bytes: 0,
            expectation: Expectation::Pass,
            failure_policy: FailurePolicy::Drain,
            hold: false,
        }
    }

    fn simple() -> TaskSpec {
        phases(&[(Phase::Run, "work")])
    }

    fn full() -> TaskSpec {
        phases(&[(Phase::Setup, "up"), (Phase::Run, "work"), (Phase::Teardown, "down")])
    }

    fn held() -> TaskSpec {
        TaskSpec { hold: true, ..simple() }
    }

    pub(super) fn started(pid: u32) -> Event {
        Event::PhaseStarted { pid, wall_ns: 100 }
    }

    pub(super) fn exited(code: i32) -> Event {
        Event::PhaseExited { exit: Exit::Code(code), out_of_memory: false }
    }

    pub(super) fn signaled(signal: i32) -> Event {
        Event::PhaseExited { exit: Exit::Signal(signal), out_of_memory: false }
    }

    pub(super) fn tree_ended() -> Event {
        Event::TreeEnded { leaked: Vec::new(), leaked_count: 0, survivors: 0, wall_ns: 200 }
    }

    pub(super) fn sealed() -> Event {
        Event::Sealed(Box::default())
    }

    pub(super) fn stop() -> Event {
        Event::StopOrdered { grace: None, deadline: false }
    }

    /// Seconds since the beginning, and what happened then.
    pub(super) type Script<'a> = &'a [(u64, Event)];

    pub(super) fn check(spec: &TaskSpec, script: Script<'_>, transcript: &Expect) {
        let (mut machine, origin, mut lines) =
            (Machine::new(spec), SystemClock.now().into_std(), String::new());
        for (seconds, event) in script {
            let mut actions = Vec::new();
            machine.handle(event.clone(), origin + Duration::from_secs(*seconds), &mut actions);
            for action in actions {
                let line = match action {
                    Action::Prepare => "prepare".to_owned(),
                    Action::StartPhase { index, held } => {
                        let phase = spec.phases[index].phase;
                        format!("start {phase}{}", if held { ", held" } else { "" })
                    }
                    Action::LetGo => "let go".to_owned(),
                    Action::Signal(signal) => format!("signal {signal}"),
                    Action::EndTree => "end tree".to_owned(),
                    Action::Seal => "seal".to_owned(),
                    Action::Record(end) => {
                        let phase = end.phase.map_or("none".to_owned(), |phase| phase.to_string());
                        let ran: Vec<_> =
                            end.phases.iter().map(|end| format!("{} {}", end.phase, end.outcome)).collect();
                        format!(
                            "record {} ({}) in phase {phase}: {:?} [{}] {}",
                            end.outcome,
                            end.reason,
                            end.exit,
                            ran.join(", "),
                            end.detail
                        )
                    }
                    Action::Announce => format!("  {:?} {:?}", machine.stage(), machine.phase()),
                };
                lines += &format!("{line}\n");
            }
        }
        transcript.assert_eq(&lines);
    }

    #[test]
    fn a_simple_task_passes() {
        check(
            &simple(),
            &[
                (0, Event::TurnCame),
                (0, Event::Prepared),
                (0, started(7)),
                (3, exited(0)),
                (3, tree_ended()),
                (3, sealed()),
                (3, Event::Recorded),
            ],
            &expect![[r#"
                prepare
                start run
                  Staged None
                  Running Some(Run)
                end tree
                  Ending None
                seal
                record passed (exited) in phase run: Some(Code(0)) [run passed] 
                  Finished None
            "#]],
        );
    }

    #[test]
    fn teardown_runs_after_a_failed_setup_and_run_does_not() {
        check(
            &full(),
            &[
                (0, Event::BecameNext),
                (0, Event::Prepared),
                (1, Event::TurnCame),
                (1, started(7)),
                (2, exited(3)),
                (2, started(8)),
                (3, exited(0)),
                (3, tree_ended()),
                (3, sealed()),
            ],
            &expect![[r#"
                prepare
                start setup
                  Staged None
                  Running Some(Setup)
                start teardown
                  Running None
                  Running Some(Teardown)
                end tree
                  Ending None
                seal
                record failed (exited) in phase setup: Some(Code(3)) [setup failed, teardown passed] `up` ended with exit code 3
            "#]],
        );
    }

    #[test]
    fn a_timeout_is_terminated_killed_and_torn_down_within_the_limit_of_teardown() {
        check(
            &full(),
            &[
                (0, Event::TurnCame),
                (0, Event::Prepared),
                (0, started(7)),
                (1, exited(0)),
                (1, started(8)),
                (10, Event::TimePassed),
                (11, Event::TimePassed),
                (15, Event::TimePassed),
                (16, Event::TimePassed),
                (16, signaled(9)),
                (16, started(9)),
                (75, Event::TimePassed),
                (76, Event::TimePassed),
                (77, signaled(15)),
                (77, tree_ended()),
                (77, sealed()),
            ],
            &expect![[r#"
                prepare
                start setup
                  Staged None
                  Running Some(Setup)
                start run
                  Running None
                  Running Some(Run)
                signal 15
                signal 9
                start teardown
                  Running None
                  Running Some(Teardown)
                signal 15
                end tree
                  Ending None
                seal
                record timed out (phase_timeout) in phase run: Some(Signal(9)) [setup passed, run timed out, teardown timed out] `work` still ran after its limit of 10 s and was killed
            "#]],
        );
    }

    #[test]
    fn a_stop_terminates_and_teardown_still_runs_and_is_not_stopped() {
        check(
            &full(),
            &[
                (0, Event::TurnCame),
                (0, Event::Prepared),
                (0, started(7)),
                (1, stop()),
                (1, stop()),
                (2, exited(0)),
                (2, stop()),
                (2, started(8)),
                (3, stop()),
                (3, exited(0)),
                (3, tree_ended()),
                (3, sealed()),
                (4, stop()),
            ],
            &expect![[r#"
                prepare
                start setup
                  Staged None
                  Running Some(Setup)
                signal 15
                start teardown
                  Running None
                  Running Some(Teardown)
                end tree
                  Ending None
                seal
                record stopped (stopped) in phase setup: Some(Code(0)) [setup stopped, teardown passed] `up` was terminated after 2.0 s: the controller stopped it
            "#]],
        );
    }

    #[test]
    fn a_stop_without_patience_kills_at_once() {
        check(
            &simple(),
            &[
                (0, Event::TurnCame),
                (0, Event::Prepared),
                (0, started(7)),
                (1, stop()),
                (2, Event::StopOrdered { grace: Some(Duration::ZERO), deadline: false }),
                (2, signaled(9)),
                (2, tree_ended()),
                (2, sealed()),
            ],
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
                record stopped (stopped) in phase run: Some(Signal(9)) [run stopped] `work` was killed after 2.0 s: the controller stopped it
            "#]],
        );
    }

    #[test]
    fn a_process_that_cannot_be_killed_is_given_up() {
        check(
            &simple(),
            &[
                (0, Event::TurnCame),
                (0, Event::Prepared),
                (0, started(7)),
                (10, Event::TimePassed),
                (15, Event::TimePassed),
                (20, Event::TimePassed),
                (25, Event::TreeEnded { leaked: Vec::new(), leaked_count: 1, survivors: 1, wall_ns: 300 }),
                (25, sealed()),
            ],
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
                  Ending None
                record timed out (phase_timeout) in phase run: None [run timed out] `work` still ran after its limit of 10 s and was killed, and could not be ended; 1 of its processes could not be ended
            "#]],
        );
    }

    #[test]
    fn a_held_task_waits_for_go_and_can_be_taken_back() {
        check(
            &held(),
            &[
                (0, Event::TurnCame),
                (0, Event::Prepared),
                (0, started(7)),
                (1, Event::GoOrdered),
                (1, Event::GoOrdered),
                (1, Event::CancelOrdered),
                (1, Event::Went { wall_ns: 5 }),
                (1, Event::CancelOrdered),
            ],
            &expect![[r#"
                prepare
                start run, held
                  Staged None
                  Staged None
                let go
                  Running Some(Run)
            "#]],
        );
        check(
            &held(),
            &[
                (0, Event::TurnCame),
                (0, Event::Prepared),
                (0, started(7)),
                (1, Event::CancelOrdered),
                (1, Event::GoOrdered),
                (1, signaled(9)),
                (1, tree_ended()),
                (1, sealed()),
            ],
            &expect![[r#"
                prepare
                start run, held
                  Staged None
                  Staged None
                end tree
                  Ending None
                  Ending None
                seal
                record cancelled (cancelled) in phase none: None [] the controller took it back before it began
            "#]],
        );
    }

    #[test]
    fn go_may_come_before_the_turn() {
        check(
            &held(),
            &[(0, Event::GoOrdered), (0, Event::TurnCame), (0, Event::Prepared)],
            &expect![[r#"
                prepare
                start run
                  Staged None
            "#]],
        );
    }

    #[test]
    fn a_cancelled_task_never_begins_even_while_its_files_are_put_in_place() {
        check(
            &simple(),
            &[(0, Event::CancelOrdered), (0, Event::TurnCame), (0, Event::Recorded)],
            &expect![[r#"
                record cancelled (cancelled) in phase none: None [] the controller took it back before it began
                  Ending None
                  Finished None
            "#]],
        );
        check(
            &simple(),
            &[
                (0, Event::TurnCame),
                (0, Event::CancelOrdered),
                (0, Event::CancelOrdered),
                (0, Event::Prepared),
            ],
            &expect![[r#"
                prepare
                record cancelled (cancelled) in phase none: None [] the controller took it back before it began
                  Ending None
            "#]],
        );
    }

    #[test]
    fn a_program_that_does_not_start_is_an_error_and_needs_no_teardown() {
        let refusal =
            Refusal { reason: Reason::StartFailed, detail: "`up` is not in the PATH of the task".to_owned() };
        check(
            &full(),
            &[
                (0, Event::TurnCame),
                (0, Event::Prepared),
                (0, started(7)),
                (0, Event::PhaseNotStarted(refusal)),
                (0, tree_ended()),
                (0, sealed()),
            ],
            &expect![[r#"
                prepare
                start setup
                  Staged None
                  Running Some(Setup)
                end tree
                  Ending None
                seal
                record error (start_failed) in phase setup: None [] `up` is not in the PATH of the task
            "#]],
        );
    }

    #[test]
    fn the_end_of_a_session_kills_and_tells_that_teardown_was_not_run() {
        check(
            &full(),
            &[
                (0, Event::TurnCame),
                (0, Event::Prepared),
                (0, started(7)),
                (1, Event::SessionEnded(SessionEnd::LeaseExpired)),
                (1, signaled(9)),
                (1, tree_ended()),
                (1, sealed()),
            ],
            &expect![[r#"
                prepare
                start setup
                  Staged None
                  Running Some(Setup)
                end tree
                  Ending None
                  Ending None
                seal
                record killed (lease_expired) in phase setup: Some(Signal(9)) [setup killed] `up` was killed: the controller was silent for longer than the lease; teardown was not run
            "#]],
        );
    }

    #[test]
    fn an_order_that_comes_while_a_process_is_made_is_followed_when_it_is_there() {
        check(
            &simple(),
            &[(0, Event::TurnCame), (0, Event::Prepared), (0, stop()), (0, started(7))],
            &expect![[r#"
                prepare
                start run
                  Staged None
                signal 15
                  Running Some(Run)
            "#]],
        );
    }

    fn any_event() -> impl Strategy<Value = Event> {
        let refusal = || Refusal { reason: Reason::StartFailed, detail: "no".to_owned() };
        prop_oneof![
            1 => Just(Event::BecameNext),
            3 => Just(Event::TurnCame),
            3 => Just(Event::Prepared),
            1 => Just(Event::NotPrepared(refusal())),
            2 => Just(Event::GoOrdered),
            1 => Just(Event::CancelOrdered),
            1 => (any::<bool>(), 0_u64..8).prop_map(|(deadline, seconds)| Event::StopOrdered {
                grace: (seconds > 0).then(|| Duration::from_secs(seconds - 1)),
                deadline,
            }),
            1 => Just(Event::SignalOrdered(10)),
            1 => Just(Event::Drained { after: "1-a".to_owned() }),
            1 => Just(Event::SessionEnded(SessionEnd::LeaseExpired)),
            1 => Just(Event::SessionEnded(SessionEnd::Closed)),
            4 => Just(started(7)),
            2 => Just(Event::Went { wall_ns: 1 }),
            1 => Just(Event::PhaseNotStarted(refusal())),
            3 => Just(exited(0)),
            1 => Just(exited(1)),
            1 => Just(signaled(9)),
            3 => Just(tree_ended()),
            3 => Just(sealed()),
            3 => Just(Event::Recorded),
            2 => Just(Event::TimePassed),
        ]
    }

    proptest! {
        #[test]
        fn one_record_and_teardown_after_every_beginning(
            steps in prop::collection::vec((any_event(), 0_u64..20), 0..80),
            shape in 0_usize..3,
        ) {
            let spec = [simple(), full(), held()][shape].clone();
            let (mut machine, mut now) = (Machine::new(&spec), SystemClock.now().into_std());
            let (mut records, mut torn, mut over) = (0, false, false);
            for (event, seconds) in steps {
                now += Duration::from_secs(seconds);
                let mut actions = Vec::new();
                over |= matches!(event, Event::SessionEnded(_));
                machine.handle(event, now, &mut actions);
                for action in &actions {
                    match action {
                        Action::StartPhase { index, .. } if spec.phases[*index].phase == Phase::Teardown => torn = true,
                        Action::StartPhase { index, .. } => prop_assert!(!torn, "{index} after teardown"),
                        Action::Record(end) => {
                            records += 1;
                            let needs = spec.phases.len() > 1 && !end.phases.is_empty() && !over;
                            prop_assert!(!needs || torn, "begun without teardown: {end:?}");
                        }
                        _ => {}
                    }
                }
                prop_assert!(records <= 1, "one terminal record");
            }
        }
    }
}
