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
#[cfg(test)]
mod tests;
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
