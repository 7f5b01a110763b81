//! Scripts of events with their transcripts, and properties of one barrier.

use bytes::Bytes;
use expect_test::{Expect, expect};
use millstream_common::id::TaskId;
use proptest::prelude::*;
use uuid::Uuid;

use super::*;
use std::{collections::BTreeMap, time::Duration};

/// The party called `a` is task 1, `b` task 2, and so on.
fn task(name: &str) -> Speaker {
    Speaker::Task(TaskId::from_uuid(Uuid::from_u128(u128::from(name.as_bytes()[0]))))
}

#[derive(Debug, Clone)]
enum Step {
    /// Name, token, parties when they differ, payload bytes.
    Enter(String, Option<String>, Option<u32>, usize),
    Leave(String),
    Lose(String),
    Suspend(String),
    Die(String),
    Abort(String),
    AbortByHand,
    Reset,
    Hold,
    LetGo,
    Hopeless,
    After(u64),
}

fn enter(name: &str) -> Step {
    Step::Enter(name.into(), None, None, 0)
}
fn enter_as(name: &str, token: &str) -> Step {
    Step::Enter(name.into(), Some(token.into()), None, 0)
}
fn enter_for(name: &str, parties: u32) -> Step {
    Step::Enter(name.into(), None, Some(parties), 0)
}
fn enter_with(name: &str, payload_bytes: usize) -> Step {
    Step::Enter(name.into(), None, None, payload_bytes)
}
fn leave(name: &str) -> Step {
    Step::Leave(name.into())
}
fn lose(name: &str) -> Step {
    Step::Lose(name.into())
}
fn suspend(name: &str) -> Step {
    Step::Suspend(name.into())
}
fn die(name: &str) -> Step {
    Step::Die(name.into())
}
fn abort(name: &str) -> Step {
    Step::Abort(name.into())
}
fn after(seconds: u64) -> Step {
    Step::After(seconds)
}

struct Script {
    barrier: Barrier,
    parties: u32,
    now: Instant,
    began: Instant,
    calls: u64,
    last_call: BTreeMap<String, CallId>,
    names: BTreeMap<CallId, String>,
    told: Vec<String>,
    /// Decisions that each call was told.
    decisions: BTreeMap<CallId, Vec<(u64, bool)>>,
}

fn parties(parties: u32) -> Script {
    #[expect(clippy::disallowed_methods, reason = "any instant will do; it never runs")]
    let now = Instant::now();
    Script {
        barrier: Barrier::new(BarrierName::new("x").unwrap()),
        parties,
        now,
        began: now,
        calls: 0,
        last_call: BTreeMap::new(),
        names: BTreeMap::new(),
        told: Vec::new(),
        decisions: BTreeMap::new(),
    }
}

impl Script {
    fn step(&mut self, step: &Step) {
        let last = |name: &String| self.last_call.get(name).copied().unwrap_or(CallId(0));
        let event = match step {
            Step::Enter(name, token, parties, payload_bytes) => {
                self.calls += 1;
                let call = CallId(self.calls);
                self.last_call.insert(name.clone(), call);
                self.names.insert(call, name.clone());
                Event::Entered(Entry {
                    call,
                    speaker: task(name),
                    label: name.as_str().into(),
                    token: token.as_deref().map(Into::into),
                    parties: parties.unwrap_or(self.parties),
                    timeout: Duration::from_secs(60),
                    payload: vec![0; *payload_bytes].into(),
                })
            }
            Step::Leave(name) => Event::Lost { call: last(name), grace: Grace::None },
            Step::Lose(name) => {
                Event::Lost { call: last(name), grace: Grace::For(limits::RECONNECTION_GRACE) }
            }
            Step::Suspend(name) => Event::Lost { call: last(name), grace: Grace::Suspended },
            Step::Die(name) => Event::Died { call: last(name), sentence: format!("{name} died") },
            Step::Abort(name) => {
                let by = Culprit { speaker: task(name), label: name.as_str().into() };
                Event::Aborted { by, reason: "enough".into() }
            }
            Step::AbortByHand => {
                let by = Culprit { speaker: Speaker::ByHand, label: "by hand".into() };
                Event::Aborted { by, reason: "enough".into() }
            }
            Step::Reset => Event::Reset,
            Step::Hold => Event::Held,
            Step::LetGo => Event::LetGo,
            Step::Hopeless => Event::FoundHopeless { sentence: "nobody is left".into(), culprit: None },
            Step::After(seconds) => {
                self.now += Duration::from_secs(*seconds);
                Event::TimePassed
            }
        };
        let before = self.told.len();
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            let mut actions = Vec::new();
            self.barrier.handle(event, self.now, &mut actions);
            for action in actions {
                self.perform(action);
            }
            events.extend(self.barrier.take_early().into_iter().map(Event::Entered));
        }
        if self.told.len() == before {
            self.told.push("-".into());
        }
        self.barrier.assert_invariants();
        assert!(
            self.barrier.next_deadline().is_none_or(|at| at > self.now || !matches!(step, Step::After(_))),
            "what is due is done"
        );
    }

    fn perform(&mut self, action: Action) {
        match action {
            Action::Wait { call } => self.told.push(format!("{} waits", self.names[&call])),
            Action::Supersede { call, .. } => self.told.push(format!("{} is back", self.names[&call])),
            Action::Refuse { call, refusal } => {
                self.told.push(format!("{} refused: {refusal}", self.names[&call]));
            }
            Action::Deliver { call, decided, arrival, .. } => {
                self.hear(call, &decided);
                let place = arrival.map_or_else(|| "late".to_owned(), |arrival| format!("place {arrival}"));
                self.told.push(format!("{} hears: {} ({place})", self.names[&call], tell(&decided)));
            }
            Action::Decide(decided) => {
                let decided = Arc::new(*decided);
                self.barrier.latch(&decided);
                for arrival in &decided.meeting.arrivals {
                    self.hear(arrival.call, &decided);
                }
                self.told.push(tell(&decided));
            }
        }
    }

    fn hear(&mut self, call: CallId, decided: &Decided) {
        let released = decided.as_break().is_none();
        self.decisions.entry(call).or_default().push((decided.meeting.generation, released));
    }
}

fn tell(decided: &Decided) -> String {
    let meeting = &decided.meeting;
    let names: Vec<&str> = meeting.arrivals.iter().map(|a| &*a.label).collect();
    let mut told = match decided.as_break() {
        None => format!("released {}: {}", meeting.generation, names.join(" ")),
        Some(cause) => format!("broken {}: {} [{}]", meeting.generation, cause.sentence, names.join(" ")),
    };
    if !meeting.by_hand.is_empty() {
        told.push_str(&format!(" (by hand: {})", meeting.by_hand.join(", ")));
    }
    told
}

fn check(mut script: Script, steps: &[Step], expected: &Expect) {
    for step in steps {
        script.step(step);
    }
    expected.assert_eq(&(script.told.join("\n") + "\n"));
}

#[test]
fn the_last_one_releases_all_and_the_name_is_used_again() {
    check(
        parties(2),
        &[enter("a"), enter("b"), enter("b"), enter("a")],
        &expect![[r#"
            a waits
            b waits
            released 1: a b
            b waits
            a waits
            released 2: b a
        "#]],
    );
}

#[test]
fn one_party_passes_at_once() {
    check(
        parties(1),
        &[enter("a"), enter("a")],
        &expect![[r#"
        a waits
        released 1: a
        a waits
        released 2: a
    "#]],
    );
}

#[test]
fn leaving_breaks_the_barrier_until_it_is_reset() {
    check(
        parties(2),
        &[enter("a"), leave("a"), enter("b"), Step::Reset, enter("b"), enter("a"), Step::Reset],
        &expect![[r#"
            a waits
            broken 1: a went away after waiting for 0.0 s [a]
            b hears: broken 1: a went away after waiting for 0.0 s [a] (late)
            -
            b waits
            a waits
            released 2: b a
            -
        "#]],
    );
}

#[test]
fn a_timeout_breaks_it_for_all_and_names_the_impatient_one() {
    check(
        parties(3),
        &[enter("a"), after(30), enter("b"), after(29), after(1), enter("c")],
        &expect![[r#"
            a waits
            -
            b waits
            -
            broken 1: 2 of 3 entered before a had waited for 1 min 0 s [a b]
            c hears: broken 1: 2 of 3 entered before a had waited for 1 min 0 s [a b] (late)
        "#]],
    );
}

#[test]
fn another_number_breaks_it_and_names_both() {
    check(
        parties(2),
        &[enter("a"), enter_for("b", 3), enter("c")],
        &expect![[r#"
        a waits
        broken 1: a came for 2 parties, b for 3 parties [a]
        b hears: broken 1: a came for 2 parties, b for 3 parties [a] (late)
        c hears: broken 1: a came for 2 parties, b for 3 parties [a] (late)
    "#]],
    );
}

#[test]
fn a_death_and_an_abort_break_it() {
    check(
        parties(3),
        &[enter("a"), enter("b"), die("b"), Step::Reset, enter("a"), abort("c"), abort("c")],
        &expect![[r#"
            a waits
            b waits
            broken 1: b died [a b]
            -
            a waits
            broken 2: c aborted it: enough [a]
            -
        "#]],
    );
}

#[test]
fn an_abort_breaks_a_name_that_nobody_has_entered() {
    check(
        parties(2),
        &[abort("c"), enter("a")],
        &expect![[r#"
        broken 1: c aborted it: enough []
        a hears: broken 1: c aborted it: enough [] (late)
    "#]],
    );
}

#[test]
fn a_lost_party_counts_as_entered_within_the_grace() {
    check(
        parties(2),
        &[enter_as("a", "t"), lose("a"), after(4), enter("b")],
        &expect![[r#"
        a waits
        -
        -
        b waits
        released 1: a b
    "#]],
    );
    check(
        parties(2),
        &[enter_as("a", "t"), lose("a"), after(5), enter("b")],
        &expect![[r#"
        a waits
        -
        broken 1: a lost its connection and did not come back within 5.0 s [a]
        b hears: broken 1: a lost its connection and did not come back within 5.0 s [a] (late)
    "#]],
    );
}

#[test]
fn a_party_that_returns_is_the_same_party() {
    check(
        parties(2),
        &[
            enter_as("a", "t"),
            lose("a"),
            after(4),
            enter_as("a", "t"),
            after(10),
            enter("b"),
            enter_as("a", "t"),
        ],
        &expect![[r#"
            a waits
            -
            -
            a is back
            -
            b waits
            released 1: a b
            a hears: released 1: a b (place 0)
        "#]],
    );
}

#[test]
fn a_party_that_returns_has_no_new_patience() {
    check(
        parties(2),
        &[enter_as("a", "t"), after(59), enter_as("a", "t"), after(1)],
        &expect![[r#"
        a waits
        -
        a is back
        broken 1: 1 of 2 entered before a had waited for 1 min 0 s [a]
    "#]],
    );
}

#[test]
fn a_decision_is_delivered_on_return_even_after_a_reset() {
    check(
        parties(2),
        &[
            enter_as("a", "t"),
            lose("a"),
            after(5),
            Step::Reset,
            enter_as("a", "t"),
            enter_as("a", "u"),
            enter("b"),
        ],
        &expect![[r#"
            a waits
            -
            broken 1: a lost its connection and did not come back within 5.0 s [a]
            -
            a hears: broken 1: a lost its connection and did not come back within 5.0 s [a] (place 0)
            a waits
            b waits
            released 2: a b
        "#]],
    );
}

#[test]
fn a_token_belongs_to_one_task() {
    check(
        parties(2),
        &[enter_as("a", "t"), enter_as("b", "t"), enter("b"), enter_as("b", "t")],
        &expect![[r#"
        a waits
        b refused: party token `t` of barrier `x` belongs to a: make a new token for each entry
        b waits
        released 1: a b
        b refused: party token `t` of barrier `x` belongs to a: make a new token for each entry
    "#]],
    );
}

#[test]
fn a_suspended_party_waits_for_its_host() {
    check(
        parties(2),
        &[enter_as("a", "t"), suspend("a"), after(50), enter("b")],
        &expect![[r#"
        a waits
        -
        -
        b waits
        released 1: a b
    "#]],
    );
}

#[test]
fn patience_stands_still_while_it_is_held() {
    check(
        parties(2),
        &[
            enter("a"),
            after(30),
            Step::Hold,
            Step::Hold,
            after(1000),
            enter("b"),
            enter("c"),
            after(1000),
            Step::LetGo,
            after(59),
            after(1),
        ],
        &expect![[r#"
            a waits
            -
            -
            -
            -
            b waits
            c waits
            -
            released 1: a b (by hand: held, let go after 33 min 20 s)
            c waits
            -
            broken 2: 1 of 2 entered before c had waited for 1 min 0 s [c]
        "#]],
    );
}

#[test]
fn a_held_barrier_still_breaks_for_the_dead() {
    check(
        parties(2),
        &[Step::Hold, enter("a"), enter("b"), enter("c"), die("a"), Step::LetGo],
        &expect![[r#"
            -
            a waits
            b waits
            c waits
            broken 1: a died [a b] (by hand: held)
            c hears: broken 1: a died [a b] (by hand: held) (late)
            -
        "#]],
    );
}

#[test]
fn what_people_do_is_marked() {
    check(
        parties(2),
        &[Step::Hold, enter("a"), after(3), Step::LetGo, Step::AbortByHand],
        &expect![[r#"
        -
        a waits
        -
        -
        broken 1: it was aborted by hand: enough [a] (by hand: held, let go after 3.0 s, aborted: enough)
    "#]],
    );
}

#[test]
fn payloads_of_one_meeting_are_bounded() {
    let most = limits::BARRIER_PAYLOADS_BYTES_MAX;
    check(
        parties(2),
        &[enter_with("a", most), enter_with("b", 1), enter("c")],
        &expect![[r#"
        a waits
        b refused: with this payload the parties of barrier `x` bring 524289 bytes: at most 524288 bytes are allowed
        c waits
        released 1: a c
    "#]],
    );
    check(
        parties(2),
        &[enter_with("a", most + 1)],
        &expect![[r#"
        a refused: with this payload the parties of barrier `x` bring 524289 bytes: at most 524288 bytes are allowed
    "#]],
    );
}

#[test]
fn a_hopeless_meeting_ends_and_an_idle_one_is_left_alone() {
    check(
        parties(2),
        &[Step::Hopeless, enter("a"), Step::Hopeless],
        &expect![[r#"
        -
        a waits
        broken 1: nobody is left [a]
    "#]],
    );
}

#[test]
fn ten_thousand_parties_meet() {
    let mut script = parties(10_000);
    for number in 0..10_000_u64 {
        let mut actions = Vec::new();
        let entry = Entry {
            call: CallId(number + 1),
            speaker: Speaker::Main,
            label: "x".into(),
            token: Some(number.to_string().into()),
            parties: 10_000,
            timeout: Duration::from_secs(60),
            payload: Bytes::new(),
        };
        script.barrier.handle(Event::Entered(entry), script.now, &mut actions);
        let decided = actions.iter().any(|action| matches!(action, Action::Decide(_)));
        assert_eq!(decided, number == 9_999);
    }
}

fn any_step() -> impl Strategy<Value = Step> {
    let name = prop::sample::select(vec!["a", "b", "c", "d"]);
    let token = prop::option::of(prop::sample::select(vec!["t", "u", "v"]));
    prop_oneof![
        8 => (name.clone(), token).prop_map(|(name, token)| {
            Step::Enter(name.into(), token.map(|token| format!("{name}-{token}")), None, 0)
        }),
        1 => name.clone().prop_map(|name| enter_for(name, 3)),
        2 => name.clone().prop_map(leave),
        3 => name.clone().prop_map(lose),
        2 => name.clone().prop_map(suspend),
        1 => name.clone().prop_map(die),
        1 => name.prop_map(abort),
        2 => Just(Step::Reset),
        1 => Just(Step::Hold),
        2 => Just(Step::LetGo),
        1 => Just(Step::Hopeless),
        3 => (0_u64..40).prop_map(Step::After),
    ]
}

proptest! {
    /// A meeting is decided once, the same way for all, and is released only when all have entered it.
    #[test]
    fn a_meeting_is_decided_once_for_all(steps in prop::collection::vec(any_step(), 0..60)) {
        let mut script = parties(2);
        for step in &steps {
            script.step(step);
        }
        let mut ends: BTreeMap<u64, bool> = BTreeMap::new();
        for (call, decisions) in &script.decisions {
            prop_assert!(decisions.len() == 1, "call {call:?} was told {decisions:?}");
            for &(generation, released) in decisions {
                prop_assert_eq!(*ends.entry(generation).or_insert(released), released);
            }
        }
        for line in script.told.iter().filter(|line| line.starts_with("released")) {
            let names = line.split(": ").nth(1).unwrap().split(" (").next().unwrap();
            prop_assert!(matches!(names.split(' ').count(), 2 | 3), "{}", line);
        }
        prop_assert!(script.began <= script.now);
    }
}
