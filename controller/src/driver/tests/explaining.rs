//! Every state of a task in one sentence.

use std::{io::Write as _, sync::atomic::Ordering};

use super::{Lab, lab, word};
use crate::{Ready, Task};

/// Asks until the answer begins as expected; gives the whole answer without its durations.
pub(super) async fn check(task: &Task, expected: &str) {
    let durations = regex::Regex::new(r"\d+(\.\d)? s\b").unwrap();
    let mut told = String::new();
    while task.try_outcome().is_none() {
        told = durations.replace_all(&task.explain().await, "N s").into_owned();
        if told == expected {
            return;
        }
        tokio::task::yield_now().await;
    }
    assert_eq!(told, expected);
}

fn run(lab: &Lab, stream: &str, name: &str) -> Task {
    lab.streams.get(stream).unwrap().run_bg(word(name))
}

#[tokio::test]
async fn a_host_that_does_not_answer_is_named_with_its_last_error() {
    let lab = lab();
    lab.fake.shared.unreachable.store(true, Ordering::SeqCst);
    let task = run(&lab, "a", "true");
    check(
        &task,
        "task 1-true on stream a waits until fake is reached, which was begun N s ago; the last attempt failed: \
         failed to connect to fake: connection refused",
    )
    .await;
    task.cancel().await;
    assert!(task.explain().await.contains("1-true on stream a (fakehost): cancelled"));
}

#[tokio::test]
async fn a_host_that_somebody_else_has_is_named_with_who_has_it() {
    let lab = lab();
    lab.fake.shared.reserved.store(true, Ordering::SeqCst);
    let task = run(&lab, "a", "true");
    check(
        &task,
        "task 1-true on stream a waits until fake is reached, which was begun N s ago; the last attempt failed: \
         the host is reserved by alice (nightly) for N s",
    )
    .await;
    lab.fake.shared.reserved.store(false, Ordering::SeqCst);
    task.wait().await.unwrap();
}

#[tokio::test]
async fn a_running_task_and_those_behind_it_say_what_it_does() {
    let lab = lab();
    let (running, second, third) = (run(&lab, "a", "hang"), run(&lab, "a", "true"), run(&lab, "a", "true"));
    running.ready(Ready::log("hang")).await.unwrap();
    let does = "runs its phase run on fake for N s; its last line: `hang`";
    check(&running, &format!("task 1-hang on stream a {does}")).await;
    check(&second, &format!("task 2-true on stream a waits for task 1-hang, which {does}")).await;
    check(&third, &format!("task 3-true on stream a waits for task 1-hang, which {does}")).await;
    lab.fake.shared.unreachable.store(true, Ordering::SeqCst);
    lab.fake.shared.cut.send_modify(|count| *count += 1);
    check(
        &running,
        "task 1-hang on stream a runs its phase run on fake for N s; the connection was lost N s ago; its last line: \
         `hang`",
    )
    .await;
    check(
        &second,
        "task 2-true on stream a waits until the connection to fake, lost N s ago, is back; the last attempt failed: \
         failed to connect to fake: connection refused",
    )
    .await;
    lab.fake.shared.unreachable.store(false, Ordering::SeqCst);
    running.stop().await;
    third.wait().await.unwrap();
    assert_eq!(third.explain().await, "task 3-true on stream a (fakehost): passed after 0.0 s");
}

#[tokio::test]
async fn a_held_task_says_so() {
    let lab = lab();
    let stream = lab.streams.get("a").unwrap();
    let held = stream.prepare(word("true"));
    let behind = stream.run_bg(word("true"));
    check(held.task(), "task 1-true on stream a is prepared on fake and was not started").await;
    check(
        &behind,
        "task 2-true on stream a waits for task 1-true, which is prepared on fake and was not started",
    )
    .await;
    held.start().wait().await.unwrap();
    behind.wait().await.unwrap();
}

#[tokio::test]
async fn files_that_are_under_way_are_counted() {
    let lab = lab();
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&vec![0; 3 << 20]).unwrap();
    lab.fake.shared.stalls.store(true, Ordering::SeqCst);
    let task = lab.streams.get("a").unwrap().run_bg(word("true").file(file.path()));
    let told = loop {
        let told = task.explain().await;
        if told.contains("MiB of") {
            break told;
        }
        assert!(task.try_outcome().is_none(), "{told}");
        tokio::task::yield_now().await;
    };
    assert!(told.starts_with("task 1-true on stream a is being prepared: 0 of 1 file and "), "{told}");
    assert!(told.ends_with(" MiB of 3.0 MiB are sent to fake"), "{told}");
    task.cancel().await;
}
