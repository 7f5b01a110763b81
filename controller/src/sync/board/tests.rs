//! Scripts of events with their transcripts, and properties of a whole board: nobody waits for the dead.

use std::{collections::BTreeMap, time::Duration};

use bytes::Bytes;
use expect_test::{Expect, expect};
use millstream_common::id::BlockName;
use proptest::prelude::*;
use uuid::Uuid;

use super::*;
use crate::sync::topic::Content;

/// `server/1` is the first task of stream `server`.
fn id(name: &str) -> TaskId {
    let mut bytes = [0; 16];
    for (byte, from) in bytes.iter_mut().zip(name.bytes()) {
        *byte = from;
    }
    TaskId::from_uuid(Uuid::from_bytes(bytes))
}

fn speaker(name: &str) -> Speaker {
    match name {
        "main" => Speaker::Main,
        "person" => Speaker::ByHand,
        task => Speaker::Task(id(task)),
    }
}

#[derive(Debug, Clone)]
enum Step {
    Scheduled(String, Option<Vec<String>>, Option<u32>),
    Doing(String, String),
    Ended(String, bool, Option<String>),
    Main(bool),
    Declared(String),
    Enter(String, String, Option<u32>, Option<String>),
    Abort(String, String),
    Reset(String, String),
    Hold(String, String, bool),
    Publish(String, String, Option<String>),
    Await(String, String, u64),
    /// Who gives up its last call, and whether the link took it.
    Leave(String, bool),
    Suspend(String),
    Resume(String),
    After(u64),
}

fn tasks(names: &[&str]) -> Vec<Step> {
    names.iter().map(|name| Step::Scheduled((*name).into(), None, None)).collect()
}
fn joins(name: &str, barriers: &[&str]) -> Step {
    let barriers = barriers.iter().map(|barrier| (*barrier).to_owned()).collect();
    Step::Scheduled(name.into(), Some(barriers), None)
}
fn enter(who: &str, barrier: &str, parties: u32) -> Step {
    Step::Enter(who.into(), barrier.into(), Some(parties), None)
}
fn enter_as(who: &str, barrier: &str, parties: u32, token: &str) -> Step {
    Step::Enter(who.into(), barrier.into(), Some(parties), Some(token.into()))
}
fn fails(who: &str) -> Step {
    Step::Ended(who.into(), true, None)
}
fn fails_saying(who: &str, line: &str) -> Step {
    Step::Ended(who.into(), true, Some(line.into()))
}
fn passes(who: &str) -> Step {
    Step::Ended(who.into(), false, None)
}
fn waits_for(who: &str, topic: &str, count: u64) -> Step {
    Step::Await(who.into(), topic.into(), count)
}
fn publish(who: &str, topic: &str) -> Step {
    Step::Publish(who.into(), topic.into(), None)
}
fn main_waits() -> Step {
    Step::Main(true)
}
fn after(tenths: u64) -> Step {
    Step::After(tenths)
}

struct Script {
    board: Board,
    now: Instant,
    calls: u64,
    last_call: BTreeMap<String, CallId>,
    names: BTreeMap<CallId, String>,
    /// Calls that were not answered.
    open: BTreeMap<CallId, String>,
    told: Vec<String>,
}

fn board() -> Script {
    #[expect(clippy::disallowed_methods, reason = "any instant will do; it never runs")]
    let now = Instant::now();
    Script {
        board: Board::default(),
        now,
        calls: 0,
        last_call: BTreeMap::new(),
        names: BTreeMap::new(),
        open: BTreeMap::new(),
        told: Vec::new(),
    }
}

fn barrier_name(name: &str) -> BarrierName {
    BarrierName::new(name).unwrap()
}

impl Script {
    fn asked(&mut self, who: &str, request: Request) -> Event {
        self.calls += 1;
        let call = CallId(self.calls);
        self.last_call.insert(who.to_owned(), call);
        self.names.insert(call, who.to_owned());
        self.open.insert(call, who.to_owned());
        Event::Asked { call, speaker: speaker(who), request }
    }

    fn event(&mut self, step: &Step) -> Event {
        match step {
            Step::Scheduled(name, joins, group_size) => {
                let (stream, number) = name.split_once('/').unwrap();
                let joins = joins.as_ref().map(|names| names.iter().map(|name| barrier_name(name)).collect());
                let label = SpeakerLabel {
                    stream: StreamName::new(stream).unwrap(),
                    number: number.parse().unwrap(),
                    block: BlockName::new("block").unwrap(),
                };
                Event::TaskScheduled { task: id(name), label, joins, group_size: *group_size }
            }
            Step::Doing(name, text) => Event::TaskProgressed { task: id(name), text: text.clone() },
            Step::Ended(name, unexpected, last_line) => {
                let sentence = if *unexpected { "failed with exit code 1" } else { "passed" };
                let fate = TaskFate {
                    unexpected: *unexpected,
                    sentence: sentence.into(),
                    last_line: last_line.clone(),
                };
                self.open.retain(|_, who| who != name);
                Event::TaskEnded { task: id(name), fate }
            }
            Step::Main(waiting) => Event::MainWaited { waiting: *waiting },
            Step::Declared(name) => Event::MainDeclared { names: vec![barrier_name(name)] },
            Step::Enter(who, barrier, parties, token) => self.asked(
                who,
                Request::Enter {
                    barrier: barrier_name(barrier),
                    parties: *parties,
                    timeout: Duration::from_secs(60),
                    token: token.as_deref().map(Into::into),
                    payload: Bytes::new(),
                    display_name: None,
                },
            ),
            Step::Abort(who, barrier) => {
                self.asked(who, Request::Abort { barrier: barrier_name(barrier), reason: "enough".into() })
            }
            Step::Reset(who, barrier) => self.asked(who, Request::Reset { barrier: barrier_name(barrier) }),
            Step::Hold(who, barrier, release) => {
                self.asked(who, Request::Hold { barrier: barrier_name(barrier), release: *release })
            }
            Step::Publish(who, topic, token) => self.asked(
                who,
                Request::Publish {
                    topic: TopicName::new(topic).unwrap(),
                    content: Content::Text(format!("from {who}")),
                    token: token.as_deref().map(Into::into),
                },
            ),
            Step::Await(who, topic, count) => self.asked(
                who,
                Request::Await {
                    topic: TopicName::new(topic).unwrap(),
                    count: *count,
                    timeout: Duration::from_secs(60),
                },
            ),
            Step::Leave(who, link_down) => {
                let call = self.last_call.get(who).copied().unwrap_or(CallId(0));
                self.open.remove(&call);
                Event::Left { call, link_down: *link_down }
            }
            Step::Suspend(name) => Event::SessionSuspended { tasks: vec![id(name)] },
            Step::Resume(name) => Event::SessionResumed { tasks: vec![id(name)] },
            Step::After(tenths) => {
                self.now += Duration::from_millis(100 * tenths);
                Event::TimePassed
            }
        }
    }

    fn step(&mut self, step: &Step) {
        let event = self.event(step);
        let mut actions = Vec::new();
        self.board.handle(event, self.now, &mut actions);
        for action in actions {
            let Action::Answer { call, answer } = action else { continue };
            self.open.remove(&call);
            self.told.push(format!("{}: {}", self.names[&call], tell(&answer)));
        }
        self.board.assert_invariants();
    }
}

fn tell(answer: &Answer) -> String {
    match answer {
        Answer::Released { decided, arrival } => {
            let meeting = &decided.meeting;
            format!("released from {} {} as {arrival}", meeting.name, meeting.generation)
        }
        Answer::Broken { decided, arrival } => story::broken(decided, *arrival),
        Answer::Indexed(index) => format!("index {index}"),
        Answer::Values(values) => format!("{} values", values.len()),
        Answer::TimedOut(told) => format!("timed out: {told}"),
        Answer::GivenUp(told) => format!("given up: {told}"),
        Answer::Done => "done".into(),
        Answer::Refused(refusal) => format!("refused: {refusal}"),
    }
}

fn check(steps: impl IntoIterator<Item = Step>, expected: &Expect) -> Script {
    let mut script = board();
    for step in steps {
        script.step(&step);
    }
    expected.assert_eq(&(script.told.join("\n") + "\n"));
    script
}

fn script(first: Vec<Step>, then: &[Step]) -> Vec<Step> {
    first.into_iter().chain(then.iter().cloned()).collect()
}

#[test]
fn the_missing_one_has_failed_and_is_named_with_its_last_line() {
    check(
        script(
            tasks(&["server/1", "a/1", "b/1"]),
            &[
                main_waits(),
                enter("a/1", "x", 3),
                enter("b/1", "x", 3),
                fails_saying("server/1", "bind: address in use"),
            ],
        ),
        &expect![[r#"
            a/1: barrier `x` broke in generation 1: 2 of 3 entered; the third can no longer come: task 1-block on stream server failed with exit code 1, 0.0 s ago (last line: `bind: address in use`); a/1-block had waited 0.0 s
            b/1: barrier `x` broke in generation 1: 2 of 3 entered; the third can no longer come: task 1-block on stream server failed with exit code 1, 0.0 s ago (last line: `bind: address in use`); b/1-block had waited 0.0 s
        "#]],
    );
}

#[test]
fn a_failure_some_time_ago_is_told_with_its_age_to_whoever_waits_later() {
    let script = check(
        script(tasks(&["server/1", "a/1"]), &[fails("server/1"), after(2), enter("a/1", "x", 2)]),
        &expect![[r#"
            a/1: barrier `x` broke in generation 1: 1 of 2 entered; the second can no longer come: task 1-block on stream server failed with exit code 1, 0.2 s ago; a/1-block had waited 0.0 s
        "#]],
    );
    assert_eq!(script.board.broken_by(id("a/1")).and_then(Culprit::task), Some(id("server/1")));
}

#[test]
fn an_expected_end_lets_main_still_send_somebody() {
    check(
        script(tasks(&["server/1", "a/1"]), &[enter("a/1", "x", 2), passes("server/1"), main_waits()]),
        &expect![[r#"
            a/1: barrier `x` broke in generation 1: 1 of 2 entered; the second can no longer come: every other task that could have is over, the last was task 1-block on stream server passed, 0.0 s ago; a/1-block had waited 0.0 s
        "#]],
    );
}

#[test]
fn main_that_has_declared_a_name_is_waited_for() {
    check(
        script(
            tasks(&["a/1", "b/1"]),
            &[
                Step::Declared("x".into()),
                main_waits(),
                enter("a/1", "x", 3),
                enter("b/1", "y", 3),
                enter("main", "x", 3),
            ],
        ),
        &expect![[r#"
            b/1: barrier `y` broke in generation 1: 1 of 3 entered; of the other 2 only 1 can still come: no other task takes part in this barrier, and main starts no more; b/1-block had waited 0.0 s
        "#]],
    );
}

#[test]
fn tasks_that_do_not_join_are_no_candidates() {
    check(
        [joins("stress/1", &[]), joins("b/1", &["y"]), joins("a/1", &["x", "y"]), main_waits()]
            .into_iter()
            .chain([enter("a/1", "y", 2), enter("b/1", "y", 2), enter("a/1", "x", 2)]),
        &expect![[r#"
            a/1: released from y 1 as 0
            b/1: released from y 1 as 1
            a/1: barrier `x` broke in generation 1: 1 of 2 entered; the second can no longer come: no other task takes part in this barrier, and main starts no more; a/1-block had waited 0.0 s
        "#]],
    );
}

#[test]
fn two_tasks_that_wait_for_each_other_are_told_the_circle() {
    check(
        script(tasks(&["a/1", "b/1"]), &[main_waits(), enter("a/1", "x", 2), enter("b/1", "y", 2)]),
        &expect![[r#"
            a/1: barrier `x` broke in generation 1: 1 of 2 entered; the tasks wait for each other in a circle: barrier `x` needs task 1-block on stream b, which waits at barrier `y`; barrier `y` needs task 1-block on stream a, which waits at barrier `x`; a/1-block had waited 0.0 s
            b/1: barrier `y` broke in generation 1: 1 of 2 entered; the tasks wait for each other in a circle: barrier `x` needs task 1-block on stream b, which waits at barrier `y`; barrier `y` needs task 1-block on stream a, which waits at barrier `x`; b/1-block had waited 0.0 s
        "#]],
    );
}

#[test]
fn a_wait_behind_a_circle_goes_on_when_the_circle_is_broken() {
    check(
        script(
            tasks(&["a/1", "b/1", "c/1"]),
            &[
                main_waits(),
                enter("c/1", "z", 2),
                enter("a/1", "x", 2),
                enter("b/1", "y", 2),
                enter("a/1", "z", 2),
            ],
        ),
        &expect![[r#"
            a/1: barrier `x` broke in generation 1: 1 of 2 entered; the tasks wait for each other in a circle: barrier `x` needs task 1-block on stream b, which waits at barrier `y`; barrier `y` needs task 1-block on stream a, which waits at barrier `x`; a/1-block had waited 0.0 s
            b/1: barrier `y` broke in generation 1: 1 of 2 entered; the tasks wait for each other in a circle: barrier `x` needs task 1-block on stream b, which waits at barrier `y`; barrier `y` needs task 1-block on stream a, which waits at barrier `x`; b/1-block had waited 0.0 s
            c/1: released from z 1 as 0
            a/1: released from z 1 as 1
        "#]],
    );
}

#[test]
fn a_task_queued_behind_its_own_party_is_stuck() {
    check(
        script(tasks(&["a/1", "a/2"]), &[main_waits(), enter("a/1", "x", 2)]),
        &expect![[r#"
            a/1: barrier `x` broke in generation 1: 1 of 2 entered; nobody else can come: task 2-block on stream a is queued behind task 1-block on stream a, which waits here itself; a/1-block had waited 0.0 s
        "#]],
    );
}

#[test]
fn a_queued_task_comes_when_the_one_ahead_can_go_on() {
    check(
        script(
            tasks(&["a/1", "a/2", "b/1"]),
            &[
                main_waits(),
                enter("a/1", "x", 2),
                enter("b/1", "x", 2),
                enter("b/1", "y", 2),
                passes("a/1"),
                enter("a/2", "y", 2),
            ],
        ),
        &expect![[r#"
            a/1: released from x 1 as 0
            b/1: released from x 1 as 1
            b/1: released from y 1 as 0
            a/2: released from y 1 as 1
        "#]],
    );
}

#[test]
fn a_task_that_speaks_shows_that_the_one_ahead_is_over() {
    check(
        script(
            tasks(&["a/1", "a/2", "b/1"]),
            &[main_waits(), publish("a/2", "t"), passes("b/1"), enter("a/2", "x", 2), passes("a/1")],
        ),
        &expect![[r#"
            a/2: index 0
            a/2: barrier `x` broke in generation 1: 1 of 2 entered; the second can no longer come: every other task that could have is over, the last was task 1-block on stream b passed, 0.0 s ago; a/2-block had waited 0.0 s
        "#]],
    );
}

#[test]
fn a_topic_that_nobody_can_publish_to_is_given_up() {
    check(
        script(
            tasks(&["a/1", "b/1"]),
            &[waits_for("a/1", "t", 2), publish("b/1", "t"), fails("b/1"), publish("a/1", "u")],
        ),
        &expect![[r#"
            b/1: index 0
            a/1: given up: topic `t` has 1 of 2 values: nobody is left who could publish: task 1-block on stream b failed with exit code 1, 0.0 s ago
            a/1: index 0
        "#]],
    );
}

#[test]
fn waits_for_topics_and_barriers_make_circles_too() {
    check(
        script(tasks(&["a/1", "b/1"]), &[main_waits(), waits_for("a/1", "t", 1), enter("b/1", "x", 2)]),
        &expect![[r#"
            b/1: barrier `x` broke in generation 1: 1 of 2 entered; the tasks wait for each other in a circle: barrier `x` needs task 1-block on stream a, which waits at topic `t`; topic `t` needs task 1-block on stream b, which waits at barrier `x`; b/1-block had waited 0.0 s
            a/1: given up: topic `t` has 0 of 1 values: the tasks wait for each other in a circle: barrier `x` needs task 1-block on stream a, which waits at topic `t`; topic `t` needs task 1-block on stream b, which waits at barrier `x`
        "#]],
    );
}

#[test]
fn a_held_barrier_is_not_given_up() {
    check(
        script(
            tasks(&["a/1"]),
            &[
                Step::Hold("person".into(), "x".into(), false),
                main_waits(),
                enter("a/1", "x", 2),
                Step::Enter("person".into(), "x".into(), None, None),
                Step::Hold("person".into(), "x".into(), true),
            ],
        ),
        &expect![[r#"
            person: done
            a/1: released from x 1 as 0
            person: released from x 1 as 1
            person: done
        "#]],
    );
}

#[test]
fn patience_that_ends_tells_what_the_missing_one_does() {
    check(
        script(
            tasks(&["server/1", "a/1"]),
            &[Step::Doing("server/1".into(), "runs".into()), enter("a/1", "x", 2), after(600)],
        ),
        &expect![[r#"
            a/1: barrier `x` broke in generation 1: 1 of 2 entered before a/1-block had waited for 1 min 0 s; missing: task 1-block on stream server runs, told 1 min 0 s ago; a/1-block had waited 1 min 0 s
        "#]],
    );
}

#[test]
fn a_party_that_dies_while_it_waits_breaks_the_meeting() {
    let script = check(
        script(
            tasks(&["a/1", "b/1", "c/1"]),
            &[enter("a/1", "x", 3), enter("b/1", "x", 3), after(12), fails("b/1"), enter("c/1", "x", 3)],
        ),
        &expect![[r#"
            a/1: barrier `x` broke in generation 1: 2 of 3 entered; one of them is gone: task 1-block on stream b failed with exit code 1, 0.0 s ago; a/1-block had waited 1.2 s
            b/1: barrier `x` broke in generation 1: 2 of 3 entered; one of them is gone: task 1-block on stream b failed with exit code 1, 0.0 s ago; b/1-block had waited 1.2 s
            c/1: barrier `x` is broken since generation 1, until main or a person resets it: 2 of 3 entered; one of them is gone: task 1-block on stream b failed with exit code 1, 0.0 s ago
        "#]],
    );
    assert_eq!(script.board.broken_by(id("c/1")).and_then(Culprit::task), Some(id("b/1")));
}

#[test]
fn the_size_of_the_group_counts_when_no_number_is_given() {
    check(
        [
            Step::Scheduled("a/1".into(), None, Some(2)),
            Step::Scheduled("b/1".into(), None, Some(2)),
            Step::Scheduled("c/1".into(), None, None),
            Step::Enter("a/1".into(), "x".into(), None, None),
            Step::Enter("c/1".into(), "x".into(), None, None),
            Step::Enter("main".into(), "y".into(), None, None),
            Step::Enter("b/1".into(), "x".into(), None, None),
        ],
        &expect![[r#"
            c/1: refused: parties is missing, and the block was not run on a group: say how many parties there are
            main: refused: parties is missing, and nobody waits at this barrier who has said it: say how many parties there are
            a/1: released from x 1 as 0
            b/1: released from x 1 as 1
        "#]],
    );
}

#[test]
fn blocks_may_neither_reset_nor_hold() {
    check(
        script(
            tasks(&["a/1"]),
            &[
                Step::Reset("a/1".into(), "x".into()),
                Step::Hold("a/1".into(), "x".into(), false),
                Step::Abort("a/1".into(), "x".into()),
                Step::Reset("main".into(), "x".into()),
                enter("a/1", "x", 1),
                passes("a/1"),
                enter("a/1", "x", 1),
            ],
        ),
        &expect![[r#"
            a/1: refused: only main or a person may reset a barrier: a block may not
            a/1: refused: only main or a person may hold a barrier: a block may not
            a/1: done
            main: done
            a/1: released from x 2 as 0
            a/1: refused: task 612f3100-0000-0000-0000-000000000000 is not one of this test's unfinished tasks: it has no part in barriers and topics any more
        "#]],
    );
}

#[test]
fn a_lost_link_suspends_and_its_return_gives_the_grace() {
    check(
        script(
            tasks(&["a/1", "b/1"]),
            &[
                enter_as("a/1", "x", 2, "t"),
                Step::Leave("a/1".into(), true),
                after(20),
                Step::Suspend("a/1".into()),
                after(200),
                Step::Resume("a/1".into()),
                after(49),
                enter_as("a/1", "x", 2, "t"),
                after(100),
                enter("b/1", "x", 2),
            ],
        ),
        &expect![[r#"
            a/1: refused: the same party has come again with the same token: this older call is over
            a/1: released from x 1 as 0
            b/1: released from x 1 as 1
        "#]],
    );
}

#[test]
fn an_implicit_token_serves_the_link_and_not_the_caller() {
    check(
        script(
            tasks(&["a/1", "b/1"]),
            &[
                enter_as("a/1", "x", 2, "\0 7"),
                Step::Leave("a/1".into(), true),
                enter_as("a/1", "x", 2, "\0 7"),
                Step::Leave("a/1".into(), false),
            ],
        ),
        &expect![[r#"
            a/1: refused: the same party has come again with the same token: this older call is over
            a/1: barrier `x` broke in generation 1: a/1-block went away after waiting for 0.0 s; a/1-block had waited 0.0 s
        "#]],
    );
}

#[test]
fn a_repeated_publication_is_one_value() {
    check(
        script(
            tasks(&["a/1", "b/1"]),
            &[
                Step::Publish("a/1".into(), "t".into(), Some("k".into())),
                Step::Publish("a/1".into(), "t".into(), Some("k".into())),
                Step::Publish("b/1".into(), "t".into(), Some("k".into())),
                waits_for("b/1", "t", 2),
            ],
        ),
        &expect![[r#"
            a/1: index 0
            a/1: index 0
            b/1: index 1
            b/1: 2 values
        "#]],
    );
}

/// Three streams of two tasks each, three barriers, one topic.
fn any_step() -> impl Strategy<Value = Step> {
    let task = prop::sample::select(vec!["a/1", "a/2", "b/1", "b/2", "c/1", "c/2"]);
    let barrier = prop::sample::select(vec!["x", "y", "z"]);
    prop_oneof![
        10 => (task.clone(), barrier.clone()).prop_map(|(task, barrier)| {
            let parties = if barrier == "z" { 3 } else { 2 };
            enter(task, barrier, parties)
        }),
        3 => task.clone().prop_map(|task| waits_for(task, "t", 3)),
        2 => task.clone().prop_map(|task| publish(task, "t")),
        3 => task.clone().prop_map(passes),
        2 => task.clone().prop_map(fails),
        1 => Just(main_waits()),
        1 => Just(Step::Main(false)),
        1 => (task, any::<bool>()).prop_map(|(task, link)| Step::Leave(task.into(), link)),
        1 => barrier.clone().prop_map(|barrier| Step::Reset("main".into(), barrier.into())),
        1 => (barrier, any::<bool>()).prop_map(|(b, release)| Step::Hold("person".into(), b.into(), release)),
        1 => (0_u64..300).prop_map(after),
    ]
}

/// What a plain reading of the rules says of the open waits, from nothing but what the script did.
#[derive(Default)]
struct Model {
    /// Unfinished tasks, by stream in order.
    lines: BTreeMap<String, Vec<String>>,
    main_waits: usize,
    unexpected: bool,
}

impl Model {
    /// Waits of the board that cannot end well: every one that is not reached from tasks that can act.
    fn stuck(&self, board: &Board) -> usize {
        if self.main_waits == 0 && !self.unexpected {
            return 0;
        }
        // (needed, held, tasks inside)
        let mut waits: Vec<(usize, bool, Vec<String>)> = Vec::new();
        let unfinished: Vec<&String> = self.lines.values().flatten().collect();
        let inside = |wanted: &dyn Fn(&Place) -> bool| {
            let holds = |name: &&&String| {
                board.tasks[&id(name)].calls.iter().any(|call| board.calls.get(call).is_some_and(wanted))
            };
            unfinished.iter().filter(holds).map(|name| (**name).clone()).collect::<Vec<_>>()
        };
        for (index, slot) in board.barriers.values().enumerate() {
            if let Some(meeting) = slot.barrier.meeting() {
                let need = meeting.parties as usize - meeting.arrivals.len();
                let members = inside(&|place| matches!(place.wait, Wait::Barrier(at) if at == index));
                waits.push((need, slot.barrier.is_held(), members));
            }
        }
        let calls: BTreeMap<&CallId, &Place> = board.calls.iter().collect();
        for (call, place) in calls {
            if matches!(place.wait, Wait::Topic(_)) {
                waits.push((
                    1,
                    false,
                    inside(&|other| matches!(other.wait, Wait::Topic(at) if at == call.0)),
                ));
            }
        }
        let mut open: Vec<usize> = (0..waits.len()).collect();
        loop {
            let able: usize = self
                .lines
                .values()
                .map(|line| {
                    let held = |task: &String| open.iter().any(|&wait| waits[wait].2.contains(task));
                    line.iter().take_while(|task| !held(task)).count()
                })
                .sum();
            let before = open.len();
            // Whoever is inside a wait that is open is not counted as able, so nobody is counted twice.
            open.retain(|&wait| !waits[wait].1 && able < waits[wait].0);
            if open.len() == before {
                return open.len();
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn nobody_waits_for_the_dead(steps in prop::collection::vec(any_step(), 0..60)) {
        let mut script = board();
        let mut model = Model::default();
        for name in ["a/1", "a/2", "b/1", "b/2", "c/1", "c/2"] {
            script.step(&Step::Scheduled(name.into(), None, None));
            model.lines.entry(name[..1].to_owned()).or_default().push(name.to_owned());
        }
        for step in &steps {
            let by_task = match step {
                Step::Enter(who, ..) | Step::Await(who, ..) | Step::Publish(who, ..) => Some(who),
                Step::Ended(who, ..) => {
                    // A host tells ends in order.
                    if model.lines[&who[..1]].first() != Some(who) {
                        continue;
                    }
                    None
                }
                _ => None,
            };
            if let Some(who) = by_task {
                // A block that waits says nothing else, and only the first task of a stream runs.
                let first = model.lines[&who[..1]].first() == Some(who);
                if !first || !script.board.tasks[&id(who)].calls.is_empty() {
                    continue;
                }
            }
            match step {
                Step::Ended(who, unexpected, _) => {
                    model.lines.get_mut(&who[..1]).unwrap().remove(0);
                    model.unexpected |= unexpected;
                }
                Step::Main(true) => model.main_waits += 1,
                Step::Main(false) => model.main_waits = model.main_waits.saturating_sub(1),
                _ => {}
            }
            script.step(step);
            prop_assert_eq!(model.stuck(&script.board), 0, "after {:?}: {:#?}", step, script.told);
        }
    }

    /// The count never gives up what could still have ended well: with enough tasks, everything is met.
    #[test]
    fn nothing_is_given_up_that_could_be_met(order in Just(vec![0, 1, 2, 3, 4, 5]).prop_shuffle()) {
        let mut script = board();
        let names = ["a/1", "b/1", "c/1", "d/1", "e/1", "f/1"];
        for name in names {
            script.step(&Step::Scheduled(name.into(), None, None));
        }
        script.step(&main_waits());
        for round in 0..3 {
            for &number in &order {
                // Pairs first, then all six, then triples.
                let (barrier, parties) = match round {
                    0 => (format!("pair {}", number / 2), 2),
                    1 => ("all".to_owned(), 6),
                    _ => (format!("triple {}", number % 2), 3),
                };
                script.step(&enter(names[number], &barrier, parties));
            }
            prop_assert!(script.open.is_empty(), "{:?}", script.told);
        }
        prop_assert!(script.told.iter().all(|told| told.contains("released")), "{:#?}", script.told);
    }
}

#[test]
fn ten_thousand_parties_with_main_waiting_meet_without_searching_for_each() {
    let mut board = Board::default();
    #[expect(clippy::disallowed_methods, reason = "any instant will do; it never runs")]
    let now = Instant::now();
    let mut actions = Vec::new();
    let task = |number: u32| TaskId::from_uuid(Uuid::from_u128(u128::from(number) + 1));
    for number in 0..10_000 {
        let label = SpeakerLabel {
            stream: StreamName::new(format!("s{number}")).unwrap(),
            number: 1,
            block: BlockName::new("block").unwrap(),
        };
        let event = Event::TaskScheduled { task: task(number), label, joins: None, group_size: None };
        board.handle(event, now, &mut actions);
    }
    board.handle(Event::MainWaited { waiting: true }, now, &mut actions);
    for number in 0..10_000 {
        let request = Request::Enter {
            barrier: barrier_name("all"),
            parties: Some(10_000),
            timeout: Duration::from_secs(60),
            token: Some(number.to_string().into()),
            payload: Bytes::new(),
            display_name: None,
        };
        let speaker = Speaker::Task(task(number));
        board.handle(Event::Asked { call: CallId(number.into()), speaker, request }, now, &mut actions);
    }
    let released = actions
        .iter()
        .filter(|a| matches!(a, Action::Answer { answer: Answer::Released { .. }, .. }))
        .count();
    assert_eq!(released, 10_000);
    board.assert_invariants();
}
