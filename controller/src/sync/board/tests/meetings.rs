//! Parties that come, go, die and come back.

use super::*;

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
fn all_are_as_many_streams_as_there_were_for_the_first() {
    let all = |who: &str, more| Step::EnterAll(who.into(), "x".into(), more);
    check(
        script(
            tasks(&["a/1", "b/1"]),
            &[
                Step::Streams(2),
                all("a/1", 1),
                Step::Streams(3),
                all("b/1", 1),
                Step::Enter("main".into(), "x".into(), None, None),
                all("a/1", 0),
                all("b/1", 1),
            ],
        ),
        &expect![[r#"
            a/1: released from x 1 as 0
            b/1: released from x 1 as 1
            main: released from x 1 as 2
            a/1: barrier `x` broke in generation 2: a/1-block came for 3 parties, b/1-block for 4 parties; a/1-block had waited 0.0 s
            b/1: barrier `x` is broken since generation 2, until main or a person resets it: a/1-block came for 3 parties, b/1-block for 4 parties
        "#]],
    );
}

#[test]
fn main_that_counts_itself_must_be_counted_by_the_group_too() {
    let mut with_main = script(vec![], &[Step::Scheduled("a/1".into(), None, Some(2))]);
    with_main.extend([
        Step::Scheduled("b/1".into(), None, Some(2)),
        enter("main", "x", 3),
        Step::Enter("a/1".into(), "x".into(), None, None),
    ]);
    check(
        with_main,
        &expect![[r#"
        main: barrier `x` broke in generation 1: main came for 3 parties, a/1-block for 2 parties; main had waited 0.0 s
        a/1: barrier `x` is broken since generation 1, until main or a person resets it: main came for 3 parties, a/1-block for 2 parties
    "#]],
    );
}
