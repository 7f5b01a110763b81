//! Waits for values, and listeners.

use super::*;

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

#[test]
fn a_listener_is_given_what_it_has_not_seen() {
    check(
        script(
            tasks(&["a/1", "b/1"]),
            &[
                publish("b/1", "t"),
                publish("b/1", "t"),
                listens("a/1", "t", 0),
                listens("a/1", "t", 2),
                publish("b/1", "t"),
            ],
        ),
        &expect![[r#"
            b/1: index 0
            b/1: index 1
            a/1: 2 values
            b/1: index 2
            a/1: 1 values
        "#]],
    );
}

#[test]
fn a_listener_is_told_when_nobody_else_is_left() {
    let script = check(
        script(
            tasks(&["a/1", "a/2", "b/1"]),
            &[
                main_waits(),
                listens("a/1", "t", 0),
                publish("b/1", "t"),
                listens("a/1", "t", 1),
                fails("b/1"),
            ],
        ),
        &expect![[r#"
            b/1: index 0
            a/1: 1 values
            a/1: given up: topic `t` has 1 value and gets no more: nobody is left who could publish: task 1-block on stream b failed with exit code 1, 0.0 s ago
        "#]],
    );
    assert_eq!(script.board.broken_by(id("a/1")).and_then(Culprit::task), Some(id("b/1")));
}

#[test]
fn a_listener_may_still_come_to_a_barrier() {
    check(
        script(
            tasks(&["a/1", "b/1"]),
            &[
                main_waits(),
                listens("a/1", "t", 0),
                enter("b/1", "x", 2),
                enter("a/1", "x", 2),
                passes("b/1"),
            ],
        ),
        &expect![[r#"
            b/1: released from x 1 as 0
            a/1: released from x 1 as 1
            a/1: given up: topic `t` has 0 values and gets no more: nobody is left who could publish: every other task that could have is over, the last was task 1-block on stream b passed, 0.0 s ago
        "#]],
    );
}

#[test]
fn two_that_listen_may_tell_each_other_something() {
    check(
        script(
            tasks(&["a/1", "b/1"]),
            &[
                main_waits(),
                listens("a/1", "t", 0),
                listens("b/1", "t", 0),
                publish("b/1", "t"),
                listens("a/1", "t", 1),
                passes("b/1"),
            ],
        ),
        &expect![[r#"
            b/1: index 0
            a/1: 1 values
            b/1: 1 values
            a/1: given up: topic `t` has 1 value and gets no more: nobody is left who could publish: every other task that could have is over, the last was task 1-block on stream b passed, 0.0 s ago
        "#]],
    );
}

#[test]
fn two_that_wait_for_each_others_next_value_are_told_the_circle() {
    check(
        script(
            tasks(&["a/1", "b/1", "c/1"]),
            &[
                main_waits(),
                waits_next("a/1", "t", 0),
                publish("b/1", "t"),
                waits_next("b/1", "u", 0),
                publish("c/1", "u"),
                waits_next("a/1", "t", 1),
                waits_next("b/1", "u", 1),
                passes("c/1"),
            ],
        ),
        &expect![[r#"
            b/1: index 0
            a/1: 1 values
            c/1: index 0
            b/1: 1 values
            a/1: given up: topic `t` has 1 value and gets no more: the tasks wait for each other in a circle: topic `t` needs task 1-block on stream b, which waits at topic `u`; topic `u` needs task 1-block on stream a, which waits at topic `t`
            b/1: given up: topic `u` has 1 value and gets no more: the tasks wait for each other in a circle: topic `t` needs task 1-block on stream b, which waits at topic `u`; topic `u` needs task 1-block on stream a, which waits at topic `t`
        "#]],
    );
}

#[test]
fn workers_whose_producer_has_failed_are_told_of_it() {
    let script = check(
        script(
            tasks(&["producer/1", "a/1", "b/1"]),
            &[
                main_waits(),
                waits_next("a/1", "work", 0),
                waits_next("b/1", "work", 0),
                publish("producer/1", "work"),
                waits_next("b/1", "work", 1),
                fails_saying("producer/1", "no more disk"),
                waits_next("a/1", "work", 1),
            ],
        ),
        &expect![[r#"
            producer/1: index 0
            a/1: 1 values
            b/1: 1 values
            b/1: given up: topic `work` has 1 value and gets no more: the tasks wait for each other in a circle: topic `work` needs task 1-block on stream a, which waits at topic `work`; topic `work` needs task 1-block on stream b, which waits at topic `work`; nor can another that might have: task 1-block on stream producer failed with exit code 1, 0.0 s ago (last line: `no more disk`)
            a/1: given up: topic `work` has 1 value and gets no more: the tasks wait for each other in a circle: topic `work` needs task 1-block on stream a, which waits at topic `work`; topic `work` needs task 1-block on stream b, which waits at topic `work`; nor can another that might have: task 1-block on stream producer failed with exit code 1, 0.0 s ago (last line: `no more disk`)
        "#]],
    );
    assert_eq!(script.board.broken_by(id("a/1")).and_then(Culprit::task), Some(id("producer/1")));
}

#[test]
fn one_that_listens_may_still_speak_to_one_that_waits() {
    check(
        script(
            tasks(&["a/1", "b/1"]),
            &[
                main_waits(),
                listens("a/1", "t", 0),
                waits_next("b/1", "u", 0),
                publish("a/1", "u"),
                passes("a/1"),
                waits_next("b/1", "u", 1),
            ],
        ),
        &expect![[r#"
            a/1: index 0
            b/1: 1 values
            b/1: given up: topic `u` has 1 value and gets no more: nobody is left who could publish: every other task that could have is over, the last was task 1-block on stream a passed, 0.0 s ago
        "#]],
    );
}

#[test]
fn a_listener_goes_on_when_a_circle_is_broken() {
    check(
        [
            joins("a/1", &[]),
            Step::Scheduled("b/1".into(), None, None),
            Step::Scheduled("c/1".into(), None, None),
        ]
        .into_iter()
        .chain([main_waits(), listens("a/1", "t", 0), enter("b/1", "x", 2), enter("c/1", "y", 2)]),
        &expect![[r#"
            b/1: barrier `x` broke in generation 1: 1 of 2 entered; the tasks wait for each other in a circle: barrier `x` needs task 1-block on stream c, which waits at barrier `y`; barrier `y` needs task 1-block on stream b, which waits at barrier `x`; b/1-block had waited 0.0 s
            c/1: barrier `y` broke in generation 1: 1 of 2 entered; the tasks wait for each other in a circle: barrier `x` needs task 1-block on stream c, which waits at barrier `y`; barrier `y` needs task 1-block on stream b, which waits at barrier `x`; c/1-block had waited 0.0 s
        "#]],
    );
}

#[test]
fn main_that_listens_is_told_and_a_person_is_not() {
    check(
        script(tasks(&["a/1"]), &[listens("main", "t", 0), listens("person", "t", 0), fails("a/1")]),
        &expect![[r#"
            main: given up: topic `t` has 0 values and gets no more: nobody is left who could publish: task 1-block on stream a failed with exit code 1, 0.0 s ago
        "#]],
    );
}

#[test]
fn every_wait_is_on_record_with_its_end() {
    let script = check(
        script(
            tasks(&["a/1", "b/1", "c/1"]),
            &[
                waits_for("a/1", "t", 1),
                after(5),
                publish("b/1", "t"),
                waits_for("a/1", "t", 1),
                listens("b/1", "t", 0),
                listens("b/1", "t", 1),
                waits_for("c/1", "u", 3),
                after(5),
                Step::Leave("b/1".into(), false),
                waits_for("person", "u", 1),
                waits_for("main", "t", 1),
                after(600),
                waits_for("c/1", "u", 3),
                fails("c/1"),
            ],
        ),
        &expect![[r#"
            b/1: index 0
            a/1: 1 values
            a/1: 1 values
            b/1: 1 values
            main: 1 values
            c/1: timed out: topic `u` had 0 of 3 values after 1 min 0 s
            person: timed out: topic `u` had 0 of 1 values after 1 min 0 s
        "#]],
    );
    let (waits, omitted) = script.board.topic_waits();
    let told: Vec<String> = waits
        .iter()
        .map(|wait| {
            let verb = if wait.subscribed { "listened to" } else { "waited for" };
            let end = wait.failed.as_deref().unwrap_or("met");
            format!("{} {verb} {} of `{}` for {:?}: {end}", wait.label, wait.count, wait.topic, wait.waited)
        })
        .collect();
    expect![[r#"
        a/1-block waited for 1 of `t` for 500ms: met
        a/1-block waited for 1 of `t` for 0ns: met
        b/1-block listened to 2 of `t` for 500ms: it was given up
        main waited for 1 of `t` for 0ns: met
        c/1-block waited for 3 of `u` for 60.5s: topic `u` had 0 of 3 values after 1 min 0 s
        by hand waited for 1 of `u` for 60s: topic `u` had 0 of 1 values after 1 min 0 s
        c/1-block waited for 3 of `u` for 0ns: its task is over: it failed with exit code 1
    "#]]
    .assert_eq(&(told.join("\n") + "\n"));
    assert_eq!(omitted, 0);
}
