//! What can no longer be met ends at once, and whoever waited is told why.

use super::*;

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
fn a_circle_of_those_who_waited_for_a_dead_one_is_the_dead_ones_fault() {
    let script = check(
        script(
            tasks(&["server/1", "a/1", "a/2"]),
            &[main_waits(), enter("a/1", "x", 2), fails_saying("server/1", "no such file")],
        ),
        &expect![[r#"
            a/1: barrier `x` broke in generation 1: 1 of 2 entered; nobody else can come: task 2-block on stream a is queued behind task 1-block on stream a, which waits here itself; nor can another that might have: task 1-block on stream server failed with exit code 1, 0.0 s ago (last line: `no such file`); a/1-block had waited 0.0 s
        "#]],
    );
    assert_eq!(script.board.broken_by(id("a/1")).and_then(Culprit::task), Some(id("server/1")));
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
