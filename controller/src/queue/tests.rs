//! Transcripts of the queue, and what must hold whatever happens.

use expect_test::{Expect, expect};
use proptest::prelude::*;

use super::*;

/// The only caller of the room's API: plays a script and compares the transcript.
fn check(window: usize, script: &[Event], expected: Expect) {
    check_with(Queue::new(window), script, expected);
}

fn check_with(mut queue: Queue, script: &[Event], expected: Expect) {
    let mut transcript = String::new();
    for &event in script {
        let mut actions = Vec::new();
        queue.handle(event, &mut actions);
        transcript += &format!("{} -> {}\n", short(&event), listed(&actions));
    }
    expected.assert_eq(&transcript);
}

fn short(value: &impl std::fmt::Debug) -> String {
    format!("{value:?}")
        .replace("number: ", "")
        .replace("previous: ", "after ")
        .replace(" { ", "(")
        .replace(" }", ")")
}

fn listed(actions: &[Action]) -> String {
    if actions.is_empty() {
        return "nothing".to_owned();
    }
    actions.iter().map(short).collect::<Vec<_>>().join(", ")
}

fn scheduled(number: u32) -> Event {
    Event::Scheduled { number, held: false }
}

fn prepared(number: u32) -> Event {
    Event::Prepared { number }
}

#[test]
fn tasks_are_handed_over_in_order_whatever_is_prepared_first() {
    check(
        8,
        &[scheduled(1), scheduled(2), Event::SessionOpened, prepared(2), prepared(1)],
        expect![[r#"
            Scheduled(1, held: false) -> Connect
            Scheduled(2, held: false) -> nothing
            SessionOpened -> Prepare(1), Prepare(2)
            Prepared(2) -> nothing
            Prepared(1) -> Put(1, after 0, held: false), Put(2, after 1, held: false)
        "#]],
    );
}

#[test]
fn the_window_moves_when_a_task_ends() {
    check(
        1,
        &[
            Event::SessionOpened,
            scheduled(1),
            scheduled(2),
            prepared(1),
            Event::Ended { number: 1, drains: false },
            prepared(2),
        ],
        expect![[r#"
            SessionOpened -> nothing
            Scheduled(1, held: false) -> Prepare(1)
            Scheduled(2, held: false) -> nothing
            Prepared(1) -> Put(1, after 0, held: false)
            Ended(1, drains: false) -> Prepare(2)
            Prepared(2) -> Put(2, after 1, held: false)
        "#]],
    );
}

#[test]
fn a_task_that_was_not_handed_over_is_cancelled_here_and_the_other_by_the_host() {
    check(
        1,
        &[
            Event::SessionOpened,
            scheduled(1),
            scheduled(2),
            prepared(1),
            Event::Accepted { number: 1 },
            Event::CancelAsked { number: 2 },
            Event::CancelAsked { number: 1 },
            Event::StopAsked { number: 2 },
        ],
        expect![[r#"
            SessionOpened -> nothing
            Scheduled(1, held: false) -> Prepare(1)
            Scheduled(2, held: false) -> nothing
            Prepared(1) -> Put(1, after 0, held: false)
            Accepted(1) -> nothing
            CancelAsked(2) -> Finish(2, ending: Cancelled)
            CancelAsked(1) -> Cancel(1)
            StopAsked(2) -> nothing
        "#]],
    );
}

#[test]
fn a_held_task_keeps_its_place_and_goes_by_one_message() {
    check(
        8,
        &[
            Event::SessionOpened,
            Event::Scheduled { number: 1, held: true },
            scheduled(2),
            prepared(1),
            prepared(2),
            Event::Accepted { number: 1 },
            Event::GoAsked { number: 1 },
            Event::GoAsked { number: 1 },
        ],
        expect![[r#"
            SessionOpened -> nothing
            Scheduled(1, held: true) -> Prepare(1)
            Scheduled(2, held: false) -> Prepare(2)
            Prepared(1) -> Put(1, after 0, held: true)
            Prepared(2) -> Put(2, after 1, held: false)
            Accepted(1) -> nothing
            GoAsked(1) -> Go(1)
            GoAsked(1) -> nothing
        "#]],
    );
}

#[test]
fn the_host_is_told_nothing_of_a_task_that_it_may_not_know_yet() {
    check(
        8,
        &[
            Event::SessionOpened,
            Event::Scheduled { number: 1, held: true },
            scheduled(2),
            prepared(1),
            prepared(2),
            Event::GoAsked { number: 1 },
            Event::StopAsked { number: 2 },
            Event::Accepted { number: 1 },
            Event::Began { number: 2 },
            Event::Accepted { number: 2 },
        ],
        expect![[r#"
            SessionOpened -> nothing
            Scheduled(1, held: true) -> Prepare(1)
            Scheduled(2, held: false) -> Prepare(2)
            Prepared(1) -> Put(1, after 0, held: true)
            Prepared(2) -> Put(2, after 1, held: false)
            GoAsked(1) -> nothing
            StopAsked(2) -> nothing
            Accepted(1) -> Go(1)
            Began(2) -> Stop(2)
            Accepted(2) -> nothing
        "#]],
    );
}

#[test]
fn what_was_under_way_when_the_connection_broke_is_said_again() {
    check(
        8,
        &[
            Event::SessionOpened,
            scheduled(1),
            scheduled(2),
            prepared(1),
            Event::Accepted { number: 1 },
            prepared(2),
            Event::SessionSuspended,
            Event::StopAsked { number: 1 },
            scheduled(3),
            Event::SessionResumed,
        ],
        expect![[r#"
            SessionOpened -> nothing
            Scheduled(1, held: false) -> Prepare(1)
            Scheduled(2, held: false) -> Prepare(2)
            Prepared(1) -> Put(1, after 0, held: false)
            Accepted(1) -> nothing
            Prepared(2) -> Put(2, after 1, held: false)
            SessionSuspended -> nothing
            StopAsked(1) -> nothing
            Scheduled(3, held: false) -> nothing
            SessionResumed -> Stop(1), Put(2, after 1, held: false), Prepare(3)
        "#]],
    );
}

#[test]
fn a_lost_session_loses_what_was_handed_over_and_no_more() {
    check(
        8,
        &[Event::SessionOpened, scheduled(1), scheduled(2), prepared(1), Event::SessionLost, scheduled(3)],
        expect![[r#"
            SessionOpened -> nothing
            Scheduled(1, held: false) -> Prepare(1)
            Scheduled(2, held: false) -> Prepare(2)
            Prepared(1) -> Put(1, after 0, held: false)
            SessionLost -> Finish(1, ending: Lost), Finish(2, ending: Unreachable)
            Scheduled(3, held: false) -> Connect
        "#]],
    );
}

#[test]
fn a_draining_stream_hands_over_one_at_a_time_and_cancels_the_rest() {
    check_with(
        Queue::draining(2),
        &[
            Event::SessionOpened,
            scheduled(1),
            scheduled(2),
            scheduled(3),
            prepared(1),
            prepared(2),
            Event::Ended { number: 1, drains: true },
            scheduled(4),
            prepared(4),
        ],
        expect![[r#"
            SessionOpened -> nothing
            Scheduled(1, held: false) -> Prepare(1)
            Scheduled(2, held: false) -> Prepare(2)
            Scheduled(3, held: false) -> nothing
            Prepared(1) -> Put(1, after 0, held: false)
            Prepared(2) -> nothing
            Ended(1, drains: true) -> Finish(2, ending: Drained), Finish(3, ending: Drained)
            Scheduled(4, held: false) -> Prepare(4)
            Prepared(4) -> Put(4, after 1, held: false)
        "#]],
    );
}

#[test]
fn the_one_behind_a_rejected_task_is_put_behind_the_one_before() {
    check(
        8,
        &[
            Event::SessionOpened,
            scheduled(1),
            scheduled(2),
            scheduled(3),
            prepared(1),
            prepared(2),
            prepared(3),
            Event::Rejected { number: 2 },
            Event::Rejected { number: 3 },
            scheduled(4),
            prepared(4),
        ],
        expect![[r#"
            SessionOpened -> nothing
            Scheduled(1, held: false) -> Prepare(1)
            Scheduled(2, held: false) -> Prepare(2)
            Scheduled(3, held: false) -> Prepare(3)
            Prepared(1) -> Put(1, after 0, held: false)
            Prepared(2) -> Put(2, after 1, held: false)
            Prepared(3) -> Put(3, after 2, held: false)
            Rejected(2) -> Put(3, after 1, held: false)
            Rejected(3) -> nothing
            Scheduled(4, held: false) -> Prepare(4)
            Prepared(4) -> Put(4, after 1, held: false)
        "#]],
    );
}

#[test]
fn standing_names_what_is_waited_for() {
    let mut queue = Queue::new(8);
    let mut actions = Vec::new();
    queue.handle(Event::Scheduled { number: 1, held: true }, &mut actions);
    queue.handle(scheduled(2), &mut actions);
    assert_eq!(queue.standing(1), Standing::WaitsForHost);
    queue.handle(Event::SessionOpened, &mut actions);
    assert_eq!(queue.standing(1), Standing::Preparing);
    queue.handle(prepared(1), &mut actions);
    assert_eq!(queue.standing(1), Standing::Held);
    assert_eq!(queue.standing(2), Standing::BehindHeld { number: 1 });
    assert_eq!(queue.held_before(2, &[]), Some(1));
    assert_eq!(queue.held_before(2, &[1]), None);
    queue.handle(Event::GoAsked { number: 1 }, &mut actions);
    assert_eq!(queue.standing(2), Standing::Behind { number: 1 });
    assert_eq!(queue.standing(9), Standing::Unknown);
}

fn any_event() -> impl Strategy<Value = (u8, u32, bool)> {
    (0..14_u8, 1..12_u32, any::<bool>())
}

proptest! {
    /// A host that is fed by the queue sees every task at most once a session, in order, and every task ends.
    #[test]
    fn the_host_sees_each_task_once_and_in_order(script in prop::collection::vec(any_event(), 0..200), window in 1..5_usize, draining in any::<bool>()) {
        let mut queue = if draining { Queue::draining(window) } else { Queue::new(window) };
        let mut next = 0;
        let mut ended = std::collections::BTreeSet::new();
        let mut put = Vec::new();
        let mut up = false;
        let mut suspended = false;
        for (kind, number, flag) in script {
            let event = match kind {
                0..=3 => { next += 1; Event::Scheduled { number: next, held: flag && number % 3 == 0 } }
                4 if !up => { up = true; suspended = false; Event::SessionOpened }
                5 if up && !suspended => { suspended = true; Event::SessionSuspended }
                6 if up && suspended => { suspended = false; Event::SessionResumed }
                7 if flag => { up = false; suspended = false; Event::SessionLost }
                8 => Event::Prepared { number },
                9 if put.contains(&number) => Event::Accepted { number },
                10 if put.contains(&number) => Event::Ended { number, drains: flag },
                11 => Event::GoAsked { number },
                12 => Event::CancelAsked { number },
                13 if put.contains(&number) => Event::Began { number },
                _ => Event::StopAsked { number },
            };
            let mut actions = Vec::new();
            queue.handle(event, &mut actions);
            if let Event::Ended { number, .. } = event {
                ended.insert(number);
            }
            if event == Event::SessionLost {
                put.clear();
            }
            for action in actions {
                match action {
                    Action::Put { number, previous, .. } => {
                        prop_assert!(up && !suspended, "nothing is sent without a connection");
                        prop_assert!(!ended.contains(&number), "{number} was over");
                        if !put.contains(&number) {
                            prop_assert_eq!(put.last().copied().unwrap_or(0), previous, "each names the one before");
                            put.push(number);
                        }
                    }
                    Action::Finish { number, .. } => prop_assert!(ended.insert(number), "{number} ends once"),
                    _ => {}
                }
            }
            prop_assert!(put.is_sorted());
        }
        let mut actions = Vec::new();
        queue.handle(Event::SessionLost, &mut actions);
        prop_assert!(queue.is_empty());
    }
}
