//! Scripts of events with their transcripts, and properties of all sessions of an agent.

use expect_test::{Expect, expect};
use proptest::prelude::*;
use uuid::Uuid;

use super::*;

impl Sessions {
    fn assert_invariants(&self) {
        let holding: Vec<_> = self.sessions.values().filter(|session| session.holds_host()).collect();
        let reserved = holding.iter().any(|session| session.exclusive);
        assert!(!reserved || holding.len() == 1, "a reserved host has one session: {holding:?}");
        assert!(self.sessions.len() <= limits::SESSIONS_COUNT_MAX);
        for waiter in &self.waiting {
            assert!(!self.sessions.contains_key(&waiter.asking.session_id), "waits and has");
        }
        assert!(
            self.draining.is_none() || self.waiting.is_empty(),
            "waits for an agent that takes nothing new"
        );
        let reserves = self.waiting.iter().any(|waiter| waiter.asking.exclusive);
        assert!(self.survivors.is_empty() || !reserves, "waits to have a host alone that is not clean");
        for id in &self.closed {
            assert!(!self.sessions.contains_key(id), "a closed number lives again");
        }
    }
}

fn id(number: u8) -> SessionId {
    SessionId::from_uuid(Uuid::from_u128(0x7000_8000_0000_0000_0000 | u128::from(number)))
}

fn secret(number: u8) -> Secret {
    Secret::parse(&format!("{number:032x}")).unwrap()
}

fn asking(number: u8) -> Asking {
    Asking {
        session_id: id(number),
        secret: secret(number),
        owner: Owner(format!("owner-{number}")),
        client: format!("test-{number}"),
        lease: Duration::from_secs(30),
        exclusive: false,
        resume: false,
        patience: limits::OPEN_WAIT_MAX,
    }
}

fn asked(ticket: Ticket, asking: Asking) -> Event {
    Event::Asked { ticket, asking, wall_ns: 0 }
}

fn exclusive(number: u8) -> Asking {
    Asking { exclusive: true, ..asking(number) }
}

/// Feeds events at their seconds and writes down what is answered.
fn check(script: Vec<(u64, Event)>, expected: &Expect) -> Sessions {
    check_in(Sessions::new(), script, expected)
}

fn check_in(mut sessions: Sessions, script: Vec<(u64, Event)>, expected: &Expect) -> Sessions {
    let mut transcript = String::new();
    for (second, event) in script {
        let mut actions = Vec::new();
        sessions.handle(event, Duration::from_secs(second), &mut actions);
        sessions.assert_invariants();
        for action in actions {
            let line = match action {
                Action::Admit { ticket, epoch, resumed, .. } => {
                    format!("{second} s: {ticket} admitted, epoch {epoch}, resumed {resumed}\n")
                }
                Action::Refuse { ticket, refusal } => {
                    format!("{second} s: {ticket} refused: {refusal}\n")
                }
            };
            transcript.push_str(&line);
        }
    }
    expected.assert_eq(&transcript);
    sessions
}

#[test]
fn coming_back_raises_the_epoch_and_nobody_else_can() {
    let thief = Asking { owner: Owner("thief".into()), ..asking(1) };
    let guesser = Asking { secret: secret(9), ..asking(1) };
    let sessions = check(
        vec![
            (0, asked(1, asking(1))),
            (1, asked(2, thief)),
            (1, asked(3, guesser)),
            (2, asked(4, Asking { resume: true, ..asking(1) })),
            (3, asked(5, Asking { resume: true, ..asking(2) })),
        ],
        &expect![[r#"
            0 s: 1 admitted, epoch 1, resumed false
            1 s: 2 refused: the session belongs to another identity, or its secret is another: open one with a number of your own
            1 s: 3 refused: the session belongs to another identity, or its secret is another: open one with a number of your own
            2 s: 4 admitted, epoch 2, resumed true
            3 s: 5 refused: session unknown: this host has never had it or has forgotten it; open another
        "#]],
    );
    assert_eq!(sessions.get(id(1)).unwrap().epoch, 2);
}

#[test]
fn a_reserved_host_is_given_on_in_the_order_of_asking() {
    check(
        vec![
            (0, asked(1, exclusive(1))),
            (1, asked(2, asking(2))),
            (2, asked(3, exclusive(3))),
            (3, asked(4, asking(4))),
            (6, Event::TimePassed),
            (7, asked(5, asking(2))),
            (8, Event::Closed { session_id: id(1) }),
            (9, Event::Closed { session_id: id(2) }),
        ],
        &expect![[r#"
            0 s: 1 admitted, epoch 1, resumed false
            6 s: 2 refused: the host is reserved by owner-1 (test-1) for 6.0 s; this asking is the next in line: ask again, the place is kept
            7 s: 3 refused: the host is reserved by owner-1 (test-1) for 7.0 s; 1 is before this asking in line: ask again, the place is kept
            8 s: 5 admitted, epoch 1, resumed false
            8 s: 4 refused: the host is awaited by owner-3 (test-3) for 6.0 s; 1 is before this asking in line: ask again, the place is kept
        "#]],
    );
}

#[test]
fn whoever_is_not_patient_is_told_at_once_and_keeps_its_place_until_it_withdraws() {
    let at_once = |number| Asking { patience: Duration::ZERO, ..exclusive(number) };
    let withdrawn =
        |number, owner: u8| Event::Withdrawn { key: key(number, 0), owner: Owner(format!("owner-{owner}")) };
    let sessions = check(
        vec![
            (0, asked(1, asking(1))),
            (1, asked(2, at_once(2))),
            (2, asked(3, at_once(3))),
            (3, asked(4, exclusive(4))),
            // Somebody else's place is nobody else's to give up.
            (4, withdrawn(2, 3)),
            (4, asked(5, at_once(3))),
            (5, withdrawn(2, 2)),
            (5, asked(6, at_once(3))),
            (6, withdrawn(4, 4)),
            (6, withdrawn(1, 1)),
        ],
        &expect![[r#"
            0 s: 1 admitted, epoch 1, resumed false
            1 s: 2 refused: the host is in use by owner-1 (test-1) for 1.0 s; nobody else is in line: ask again, the place is kept
            2 s: 3 refused: the host is in use by owner-1 (test-1) for 2.0 s; 1 is before this asking in line: ask again, the place is kept
            4 s: 5 refused: the host is in use by owner-1 (test-1) for 4.0 s; 1 is before this asking in line: ask again, the place is kept
            5 s: 6 refused: the host is in use by owner-1 (test-1) for 5.0 s; this asking is the next in line: ask again, the place is kept
            6 s: 4 refused: session ended: it was closed; open another
        "#]],
    );
    assert_eq!(sessions.waiting_count(), 1);
    assert_eq!(sessions.get(id(1)).unwrap().stage, Stage::Open, "an open session is closed, not withdrawn");
}

#[test]
fn an_identity_has_no_more_sessions_than_its_share_and_is_told_who_has_them() {
    let of_ci = |number| Asking { owner: Owner("millstream://controller/ci".into()), ..asking(number) };
    let each = Share { sessions: Some(1), tasks: None };
    let named = [("ci".to_owned(), Share { sessions: Some(2), tasks: None })];
    let bounds = Bounds { each, named: named.into(), ..Bounds::default() };
    let mut waiting = of_ci(3);
    waiting.exclusive = true;
    check_in(
        Sessions::within(bounds),
        vec![
            (0, asked(1, asking(1))),
            (0, asked(2, Asking { owner: Owner("owner-1".into()), ..asking(2) })),
            (1, asked(3, waiting.clone())),
            // It waits, and asks again: that is the same one.
            (2, asked(4, waiting)),
            (2, asked(5, of_ci(4))),
            (3, asked(6, of_ci(5))),
            (4, Event::Closed { session_id: id(1) }),
            (5, asked(7, of_ci(5))),
            (6, Event::Closed { session_id: id(3) }),
            (7, asked(8, of_ci(5))),
        ],
        &expect![[r#"
            0 s: 1 admitted, epoch 1, resumed false
            0 s: 2 refused: owner-1 has 1 session here, which is its limit `sessions` on this host: test-1; end one of them, or ask the administrator to raise `limits` in agent.yaml
            2 s: 3 refused: the same session was asked for again: the newer call gets the answer
            3 s: 6 refused: millstream://controller/ci has 2 sessions here, which is its limit `sessions` on this host: test-3, test-4; end one of them, or ask the administrator to raise `limits` in agent.yaml
            4 s: 4 admitted, epoch 1, resumed false
            5 s: 7 refused: millstream://controller/ci has 2 sessions here, which is its limit `sessions` on this host: test-3, test-4; end one of them, or ask the administrator to raise `limits` in agent.yaml
            6 s: 5 admitted, epoch 1, resumed false
            7 s: 8 admitted, epoch 1, resumed false
        "#]],
    );
}

#[test]
fn a_place_that_nobody_comes_back_for_is_given_up() {
    check(
        vec![
            (0, asked(1, exclusive(1))),
            (0, asked(2, exclusive(2))),
            (1, Event::Left { ticket: 2 }),
            (2, asked(3, asking(3))),
            (3, Event::Closed { session_id: id(1) }),
            (6, Event::TimePassed),
            (11, asked(4, asking(3))),
        ],
        &expect![[r#"
            0 s: 1 admitted, epoch 1, resumed false
            11 s: 3 refused: the same session was asked for again: the newer call gets the answer
            11 s: 4 admitted, epoch 1, resumed false
        "#]],
    );
}

fn drain(reason: &str) -> Event {
    let (by, since) = (Owner("local user 0".into()), "2026-11-21T22:37:25Z".into());
    Event::DrainBegan(Drain { reason: reason.into(), by, since })
}

fn left_behind(survivors: &[&str]) -> Event {
    Event::LeftBehind { survivors: survivors.iter().map(|survivor| (*survivor).to_owned()).collect() }
}

#[test]
fn nothing_new_is_taken_while_draining() {
    check(
        vec![
            (0, asked(1, asking(1))),
            (1, drain("kernel update")),
            (1, asked(2, asking(2))),
            (1, asked(3, Asking { resume: true, ..asking(1) })),
            (2, drain("")),
            (2, asked(4, asking(2))),
            (3, Event::DrainEnded),
            (3, asked(5, asking(2))),
        ],
        &expect![[r#"
            0 s: 1 admitted, epoch 1, resumed false
            1 s: 2 refused: draining since 2026-11-21T22:37:25Z by local user 0: kernel update; use another host, or wait for `millstream-agent undrain` there
            1 s: 3 admitted, epoch 2, resumed true
            2 s: 4 refused: draining since 2026-11-21T22:37:25Z by local user 0; use another host, or wait for `millstream-agent undrain` there
            3 s: 5 admitted, epoch 1, resumed false
        "#]],
    );
}

#[test]
fn an_unclean_host_is_shared_but_not_reserved() {
    check(
        vec![
            (0, asked(1, asking(1))),
            (0, asked(2, exclusive(2))),
            (0, asked(3, asking(3))),
            (1, left_behind(&["process 1234 `dd`", "process 1235 `dd`"])),
            (1, asked(4, exclusive(4))),
            (2, left_behind(&["process 1234 `dd`"])),
            (2, asked(5, exclusive(4))),
            (3, left_behind(&[])),
            (3, Event::Closed { session_id: id(1) }),
            (3, Event::Closed { session_id: id(3) }),
            (3, asked(6, exclusive(4))),
        ],
        &expect![[r#"
            0 s: 1 admitted, epoch 1, resumed false
            1 s: 2 refused: unclean: an ended session has left process 1234 `dd` behind, and 1 more; say `millstream-agent clean` on that host, or open the session without `exclusive`
            1 s: 3 admitted, epoch 1, resumed false
            1 s: 4 refused: unclean: an ended session has left process 1234 `dd` behind, and 1 more; say `millstream-agent clean` on that host, or open the session without `exclusive`
            2 s: 5 refused: unclean: an ended session has left process 1234 `dd` behind; say `millstream-agent clean` on that host, or open the session without `exclusive`
            3 s: 6 admitted, epoch 1, resumed false
        "#]],
    );
}

#[test]
fn a_closed_number_is_never_used_again_but_one_that_never_began_may_be() {
    check(
        vec![
            (0, asked(1, asking(1))),
            (1, Event::Closed { session_id: id(1) }),
            (1, asked(2, asking(1))),
            (2, asked(3, asking(2))),
            (2, Event::Abandoned { session_id: id(2), epoch: 1 }),
            (3, asked(4, asking(2))),
        ],
        &expect![[r#"
            0 s: 1 admitted, epoch 1, resumed false
            1 s: 2 refused: session ended: it was closed; open another
            2 s: 3 admitted, epoch 1, resumed false
            3 s: 4 admitted, epoch 1, resumed false
        "#]],
    );
}

#[test]
fn a_session_that_its_controller_came_back_to_is_not_abandoned() {
    let sessions = check(
        vec![
            (0, asked(1, exclusive(1))),
            (0, asked(2, Asking { resume: true, ..exclusive(1) })),
            (1, Event::Abandoned { session_id: id(1), epoch: 1 }),
        ],
        &expect![[r#"
            0 s: 1 admitted, epoch 1, resumed false
            0 s: 2 admitted, epoch 2, resumed true
        "#]],
    );
    assert_eq!(sessions.get(id(1)).unwrap().epoch, 2);
}

#[test]
fn those_who_wait_are_listed_in_their_order_and_a_session_is_as_old_as_its_admission() {
    let wall = |ticket, asking, wall_ns| Event::Asked { ticket, asking, wall_ns };
    let script = vec![
        (0, wall(1, exclusive(1), 1_000)),
        (2, wall(2, asking(2), 2_000)),
        (3, wall(3, exclusive(3), 3_000)),
        // Asked again: the place and its time are the first one's.
        (4, wall(4, asking(2), 4_000)),
    ];
    let refused = expect![[r#"
        0 s: 1 admitted, epoch 1, resumed false
        4 s: 2 refused: the same session was asked for again: the newer call gets the answer
    "#]];
    let mut sessions = check(script, &refused);
    let shown = |sessions: &Sessions| -> Vec<_> {
        let line = |waiting: Waiting<'_>| {
            format!("{} {} {} {}", waiting.owner, waiting.client, waiting.exclusive, waiting.asked_time_ns)
        };
        sessions.waiting().map(line).collect()
    };
    assert_eq!(shown(&sessions), ["owner-2 test-2 false 2000", "owner-3 test-3 true 3000"]);
    sessions.handle(Event::Closed { session_id: id(1) }, Duration::from_secs(7), &mut Vec::new());
    assert_eq!(shown(&sessions), ["owner-3 test-3 true 3000"]);
    assert_eq!(sessions.get(id(2)).unwrap().open_time_ns, 5_000_002_000, "five seconds after it asked");
}

fn key(number: u8, epoch: u64) -> Key {
    Key { session_id: id(number), epoch, secret: secret(number) }
}

#[test]
fn every_wrong_key_is_refused_for_its_own_reason() {
    let mut sessions = Sessions::new();
    let mut actions = Vec::new();
    let at = Duration::from_secs;
    sessions.handle(asked(1, asking(1)), at(0), &mut actions);
    sessions.handle(asked(2, asking(1)), at(1), &mut actions);
    let owner = Owner("owner-1".into());
    let refusal = |sessions: &Sessions, key: Key, owner: &Owner, access, now| {
        sessions.check(&key, owner, access, now).err()
    };
    let changed = Access::Change;
    assert_eq!(refusal(&sessions, key(1, 2), &owner, changed, at(2)), None);
    assert_eq!(refusal(&sessions, key(2, 1), &owner, changed, at(2)), Some(KeyRefusal::Unknown));
    let old = KeyRefusal::Superseded { given: 1, newest: 2 };
    assert_eq!(refusal(&sessions, key(1, 1), &owner, changed, at(2)), Some(old));
    // Whoever has given a session up may end it, whether or not it heard how often it came back; nobody guesses ahead.
    assert_eq!(refusal(&sessions, key(1, 0), &owner, Access::End, at(2)), None);
    let ahead = KeyRefusal::Superseded { given: 3, newest: 2 };
    assert_eq!(refusal(&sessions, key(1, 3), &owner, Access::End, at(2)), Some(ahead));
    let guess = Key { secret: secret(7), ..key(1, 2) };
    assert_eq!(refusal(&sessions, guess, &owner, changed, at(2)), Some(KeyRefusal::NotYours));
    let thief = Owner("thief".into());
    assert_eq!(refusal(&sessions, key(1, 2), &thief, changed, at(2)), Some(KeyRefusal::NotYours));
    // The supervisor has not said so yet, but the lease is over.
    let expired = KeyRefusal::Expired { lease: at(30) };
    assert_eq!(refusal(&sessions, key(1, 2), &owner, changed, at(31)), Some(expired));
    assert_eq!(refusal(&sessions, key(1, 2), &owner, Access::Read, at(31)), None);
    sessions.handle(Event::Closed { session_id: id(1) }, at(32), &mut actions);
    assert_eq!(refusal(&sessions, key(1, 2), &owner, changed, at(32)), Some(KeyRefusal::Ended));
}

#[test]
fn a_lease_that_is_over_cannot_be_renewed() {
    let mut sessions = Sessions::new();
    let mut actions = Vec::new();
    sessions.handle(asked(1, asking(1)), Duration::ZERO, &mut actions);
    sessions.handle(Event::LeaseExpired { session_id: id(1) }, Duration::from_secs(30), &mut actions);
    sessions.handle(Event::Kept { session_id: id(1) }, Duration::from_secs(31), &mut actions);
    assert_eq!(sessions.get(id(1)).unwrap().stage, Stage::Expired);
    sessions.handle(asked(2, asking(1)), Duration::from_secs(32), &mut actions);
    let over = KeyRefusal::Expired { lease: Duration::from_secs(30) };
    assert_eq!(actions.last(), Some(&Action::Refuse { ticket: 2, refusal: OpenRefusal::Over(over) }));
}

fn any_event() -> impl Strategy<Value = Event> {
    let number = 0..6_u8;
    prop_oneof![
        4 => (number.clone(), any::<bool>(), any::<bool>()).prop_map(|(n, exclusive, resume)| asked(
            0, Asking { exclusive, resume, ..asking(n) })),
        1 => (0..200_u64).prop_map(|ticket| Event::Left { ticket }),
        1 => number.clone().prop_map(|n| Event::Kept { session_id: id(n) }),
        1 => number.clone().prop_map(|n| Event::LeaseExpired { session_id: id(n) }),
        1 => number.clone().prop_map(|n| Event::Settled { session_id: id(n) }),
        1 => number.clone().prop_map(|n| Event::Closing { session_id: id(n) }),
        2 => number.clone().prop_map(|n| Event::Closed { session_id: id(n) }),
        1 => number.clone().prop_map(|n| Event::Withdrawn { key: key(n, 0), owner: asking(n).owner }),
        1 => (number, 1..3_u64).prop_map(|(n, epoch)| Event::Abandoned { session_id: id(n), epoch }),
        2 => Just(Event::TimePassed),
        1 => any::<bool>().prop_map(|begins| if begins { drain("") } else { Event::DrainEnded }),
        1 => any::<bool>().prop_map(|any| left_behind(if any { &["process 1 `a`"] } else { &[] })),
    ]
}

proptest! {
    #[test]
    fn every_asking_is_answered_once_and_a_reservation_holds(
        script in prop::collection::vec((any_event(), 0..4_u64), 1..120)
    ) {
        let mut sessions = Sessions::new();
        let mut now = Duration::ZERO;
        let (mut open, mut left) = (std::collections::BTreeSet::new(), std::collections::BTreeSet::new());
        for (number, (mut event, pause)) in (1..).zip(script) {
            if let Event::Asked { ticket, .. } = &mut event {
                *ticket = number;
                open.insert(number);
            }
            if let Event::Left { ticket } = &event {
                left.insert(*ticket);
            }
            now += Duration::from_secs(pause);
            let mut actions = Vec::new();
            sessions.handle(event, now, &mut actions);
            sessions.assert_invariants();
            for action in actions {
                let (Action::Admit { ticket, .. } | Action::Refuse { ticket, .. }) = action;
                prop_assert!(open.remove(&ticket), "{ticket} answered twice or never asked");
            }
        }
        // Whoever still waits is answered by time alone.
        while let Some(deadline) = sessions.next_deadline() {
            let mut actions = Vec::new();
            sessions.handle(Event::TimePassed, deadline, &mut actions);
            for action in actions {
                let (Action::Admit { ticket, .. } | Action::Refuse { ticket, .. }) = action;
                prop_assert!(open.remove(&ticket));
            }
        }
        prop_assert!(open.is_subset(&left), "never answered: {open:?}");
    }
}
