//! Scripts of events with their transcripts, and properties of one task's life.

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
    let (mut machine, origin, mut lines) = (Machine::new(spec), SystemClock.now().into_std(), String::new());
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
        &[(0, Event::TurnCame), (0, Event::CancelOrdered), (0, Event::CancelOrdered), (0, Event::Prepared)],
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
