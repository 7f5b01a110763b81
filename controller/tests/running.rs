//! Order, groups, single tasks, expectations, and what one failure does to the rest: real blocks in local streams.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::{path::PathBuf, time::Duration};

use millstream::{
    Block, OutcomeKind, Ready, Reason, StartError, Streams, StreamsBuilder, Task, exec, script, shell,
    start_together,
};

millstream::entry!();

/// Streams on this machine alone, with results and a place for files that are gone afterwards.
struct Lab {
    streams: Streams,
    place: tempfile::TempDir,
}

fn lab_with(refine: impl FnOnce(StreamsBuilder) -> StreamsBuilder) -> Lab {
    let place = tempfile::tempdir().unwrap();
    let results = place.path().join("results");
    let builder = Streams::builder("t").only_given().results_dir(results).deadline(Duration::from_secs(300));
    Lab { streams: refine(builder).open().unwrap(), place }
}

fn lab() -> Lab {
    lab_with(|builder| builder)
}

impl Lab {
    fn file(&self, name: &str) -> PathBuf {
        self.place.path().join(name)
    }

    /// A block that notes its beginning and its end in one file.
    fn noting(&self, name: &str) -> Block {
        let order = self.file("order");
        shell(format!("echo '+{name}' >>{0}; echo '-{name}' >>{0}", order.display())).name(name)
    }

    fn order(&self) -> String {
        std::fs::read_to_string(self.file("order")).unwrap().replace('\n', " ")
    }

    fn single(&self, place: &str, name: &str) -> Task {
        self.streams.run_bg(place, exec(["true"]).name(name)).unwrap()
    }
}

fn waiting() -> Block {
    shell("echo up; exec sleep 1000").name("waits")
}

/// Asks what a task does until the answer has a word; gives the answer.
async fn explained(task: &Task, word: &str) -> String {
    loop {
        let text = task.explain().await;
        if text.contains(word) {
            return text;
        }
        assert!(task.try_outcome().is_none(), "over before `{word}` was said: {text}");
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn foreground_and_background_share_one_queue() {
    let lab = lab();
    let stream = lab.streams.get("a").unwrap();
    stream.run_bg(lab.noting("first"));
    stream.run_bg(lab.noting("second"));
    stream.run_fg(lab.noting("third")).await.unwrap();
    assert_eq!(lab.order(), "+first -first +second -second +third -third ");
    stream.run_bg(lab.noting("fourth"));
    // Scheduled by the call, not by the await.
    let last = stream.run_fg(lab.noting("fifth"));
    lab.streams.wait().await.unwrap();
    assert!(lab.order().ends_with("+fourth -fourth +fifth -fifth "), "{}", lab.order());
    assert_eq!(last.await.unwrap().stream_number, 5);
}

#[tokio::test]
async fn several_blocks_run_in_their_order_and_the_first_failure_is_told_after_all() {
    let lab = lab();
    let stream = lab.streams.get("a").unwrap();
    let tasks = stream.run_all_bg([lab.noting("one"), lab.noting("two")]);
    assert_eq!(tasks.iter().map(Task::label).collect::<Vec<_>>(), ["1-one", "2-two"]);
    let outcomes = stream.run_all_fg([lab.noting("three"), lab.noting("four")]).await.unwrap();
    assert_eq!(outcomes.iter().map(|o| o.label()).collect::<Vec<_>>(), ["3-three", "4-four"]);
    let error = stream.run_all_fg([shell("exit 4").name("bad"), lab.noting("five")]).await.unwrap_err();
    assert_eq!(error.0.label(), "5-bad");
    assert!(lab.order().ends_with("-five "), "{}", lab.order());
}

#[tokio::test]
async fn a_single_task_has_a_stream_of_its_own() {
    let lab = lab_with(|builder| builder.stream("server", "local://?timeout=50"));
    // Nothing that stands in the queue of `server` holds them up.
    let before = lab.streams.get("server").unwrap().run_bg(waiting());
    let tasks = [
        lab.single("server", "same"),
        lab.single("server", "same"),
        lab.single("local", "same"),
        lab.single("local", "same"),
    ];
    for task in &tasks {
        task.wait().await.unwrap();
    }
    let names: Vec<_> = tasks.iter().map(|task| task.stream().to_string()).collect();
    assert_eq!(names, ["server.1", "server.2", "local.1", "local.2"]);
    for task in &tasks {
        let expected = format!("streams/{}/1-same", task.stream());
        let results = task.outcome().await.results.clone();
        assert!(results.ends_with(&expected), "{} is not {expected}", results.display());
        assert!(results.join("result.json").exists());
    }
    let passed = lab.streams.run_fg("server", exec(["true"])).unwrap().await.unwrap();
    assert_eq!(passed.stream.as_str(), "server.3");
    before.stop().await;
    lab.streams.wait().await.unwrap();
}

#[tokio::test]
async fn a_place_that_is_neither_a_stream_nor_a_definition_is_refused_by_name() {
    let lab = lab_with(|builder| builder.stream("server", "local"));
    let error = lab.streams.run_bg("servre", exec(["true"])).unwrap_err();
    assert_eq!(
        error.to_string(),
        "`servre` is no defined stream (did you mean `server`?), and no definition in one line either"
    );
    let source = std::error::Error::source(&error).unwrap().to_string();
    assert!(source.contains("stream type `servre` is unknown: use one of `command`, "), "{source}");
    let error = lab.streams.run_bg("tls://", exec(["true"])).unwrap_err().to_string();
    assert!(error.starts_with("the test: stream `single`"), "{error}");
}

#[tokio::test]
async fn results_of_a_stream_are_a_list_in_its_order() {
    let lab = lab();
    let (a, b) = (lab.streams.get("a").unwrap(), lab.streams.get("b").unwrap());
    a.run_bg(exec(["true"]).name("good"));
    b.run_bg(exec(["true"]).name("other"));
    a.run_bg(shell("exit 3").name("bad").allow_failure());
    lab.streams.wait().await.unwrap();
    let results = a.results();
    let told: Vec<_> = results
        .as_array()
        .unwrap()
        .iter()
        .map(|o| (o["block"].as_str().unwrap(), o["outcome"].as_str().unwrap(), o["stream_number"].as_u64()))
        .collect();
    assert_eq!(told, [("good", "passed", Some(1)), ("bad", "failed", Some(2))]);
    assert_eq!(b.results().as_array().unwrap().len(), 1);
    assert_eq!(lab.streams.results()["tasks"].as_array().unwrap().len(), 3);
    assert_eq!(lab.streams.get("unused").unwrap().results(), serde_json::json!([]));
}

#[tokio::test]
async fn a_group_runs_one_block_on_each_and_its_size_is_the_number_of_parties() {
    let lab = lab();
    let group = lab.streams.slice(0..3).unwrap();
    let tasks = group.run_bg(shell("millstream-sync barrier all --timeout 60 && echo met").name("member"));
    assert_eq!(tasks.len(), 3);
    for task in &tasks {
        assert!(task.wait().await.unwrap().stdout().ends_with("met\n"));
    }
    let outcomes = group.run_fg(exec(["true"])).await.unwrap();
    assert_eq!(outcomes.iter().map(|o| o.stream.to_string()).collect::<Vec<_>>(), ["0", "1", "2"]);
}

#[tokio::test]
async fn a_group_that_is_synchronized_begins_together_behind_what_is_queued() {
    let lab = lab();
    let group = lab.streams.slice(0..3).unwrap();
    let busy = lab.streams.get(1).unwrap().run_bg(lab.noting("before"));
    let started = group.run_synchronized(lab.noting("attack")).await.unwrap();
    assert!(busy.try_outcome().is_some(), "the FIFO holds for prepared tasks, too");
    assert_eq!(started.tasks.len(), 3);
    assert!(started.skew.is_some());
    lab.streams.wait().await.unwrap();
    assert!(lab.order().starts_with("+before -before "), "{}", lab.order());
}

#[tokio::test]
async fn a_prepared_task_holds_its_place_begins_on_demand_and_is_cancelled_when_dropped() {
    let lab = lab();
    let stream = lab.streams.get("a").unwrap();
    let held = stream.prepare(lab.noting("held"));
    let behind = stream.run_bg(lab.noting("behind"));
    held.staged().await.unwrap();
    let told = behind.explain().await;
    assert!(told.contains("waits for task 1-held, which is prepared on"), "{told}");
    held.start().wait().await.unwrap();
    behind.wait().await.unwrap();
    assert_eq!(lab.order(), "+held -held +behind -behind ");

    let dropped = stream.prepare(lab.noting("dropped"));
    let outcome = dropped.task().clone();
    drop(dropped);
    assert_eq!(outcome.outcome().await.kind, OutcomeKind::Cancelled);
    let error = start_together([stream.prepare(script("no-such-script"))]).await.unwrap_err();
    assert!(matches!(&error, StartError::NotPrepared(_)), "{error}");
    assert!(error.to_string().contains("no-such-script"), "{error}");
}

#[tokio::test]
async fn expected_and_allowed_failures_are_no_failures_and_a_missing_one_is() {
    let lab = lab();
    let stream = lab.streams.get("a").unwrap();
    stream.run_fg(shell("exit 1").expect_failure()).await.unwrap();
    stream.run_fg(shell("exit 1").allow_failure()).await.unwrap();
    stream.run_fg(exec(["true"]).allow_failure()).await.unwrap();
    assert!(lab.streams.success());
    let error = stream.run_fg(exec(["true"]).name("too-good").expect_failure()).await.unwrap_err();
    assert!(error.to_string().contains("although it was expected to fail"), "{error}");
    assert!(!lab.streams.success());
    let report = lab.streams.join().await;
    assert_eq!((report.outcomes.len(), report.failures().unwrap().count()), (4, 1));
}

#[tokio::test]
async fn whoever_waits_says_where_and_for_whom() {
    let lab = lab();
    let one = lab
        .streams
        .get("one")
        .unwrap()
        .run_bg(shell("echo here; exec millstream-sync barrier met 2 --timeout 120").name("early"));
    let busy = lab.streams.get("two").unwrap().run_bg(waiting());
    let late = lab.streams.get("two").unwrap().run_bg(shell("millstream-sync barrier met 2").name("late"));
    let told = explained(&one, "waits at barrier `met`").await;
    assert!(told.starts_with("task 1-early on stream one waits at barrier `met` for "), "{told}");
    assert!(told.contains("(1 of 2 entered)") && told.contains("two/2-late"), "{told}");
    busy.ready(Ready::log("up")).await.unwrap();
    let told = late.explain().await;
    assert!(
        told.contains("task 2-late on stream two waits for task 1-waits, which runs its phase run"),
        "{told}"
    );
    assert!(told.ends_with("its last line: `up`"), "{told}");
    busy.stop().await;
    lab.streams.wait().await.unwrap();
    assert!(late.explain().await.contains("2-late on stream two (127.0.0.1): passed"));
}

#[tokio::test]
async fn a_task_that_does_not_want_to_end_says_that_it_was_told() {
    let lab = lab();
    let stubborn = shell("trap '' TERM; echo up; while :; do sleep 1000; done").name("stubborn");
    let task = lab.streams.get("a").unwrap().run_bg(stubborn.grace(Duration::from_secs(120)));
    task.ready(Ready::log("up")).await.unwrap();
    task.stop();
    let told = explained(&task, "was told to stop").await;
    assert!(told.starts_with("task 1-stubborn on stream a was told to stop "), "{told}");
    assert!(told.ends_with("; its last line: `up`"), "{told}");
    assert_eq!(task.stop_within(Duration::ZERO).await.kind, OutcomeKind::Stopped);
}

#[tokio::test]
async fn places_whose_names_are_alike_get_streams_of_different_names() {
    let lab = lab_with(|builder| builder.stream("a b", "local").stream("a_b", "local"));
    let names: Vec<_> = ["a b", "a_b", "a b"]
        .map(|place| lab.single(place, "same"))
        .iter()
        .map(|task| task.stream().to_string())
        .collect();
    assert_eq!(names, ["a_b.1", "a_b.2", "a_b.3"]);
    assert_eq!(lab.streams.wait().await.unwrap().outcomes.len(), 3);
}

#[tokio::test]
async fn the_deadline_takes_the_queue_along() {
    let lab = lab_with(|builder| builder.deadline(Duration::from_secs(2)));
    let stream = lab.streams.get("a").unwrap();
    let running = stream.run_bg(waiting());
    let queued = stream.run_bg(exec(["true"]));
    let outcome = queued.outcome().await;
    assert_eq!(outcome.reason, Reason::TestDeadline, "{outcome}");
    assert!(!outcome.is_expected() && outcome.start_time_ns.is_none(), "{outcome}");
    assert_eq!(running.outcome().await.kind, OutcomeKind::TimedOut);
    let late = stream.run_bg(exec(["true"])).outcome().await;
    assert_eq!((late.kind, late.reason), (OutcomeKind::Error, Reason::TestDeadline), "{late}");
}

#[tokio::test]
async fn without_fail_fast_the_others_go_on() {
    let lab = lab();
    lab.streams.get("a").unwrap().run_bg(shell("exit 1"));
    let queued = lab.streams.get("a").unwrap().run_bg(exec(["true"]));
    assert!(queued.wait().await.unwrap().passed());
}

#[tokio::test]
async fn the_first_failure_ends_a_test_that_fails_fast_and_is_named_by_all() {
    let lab = lab_with(StreamsBuilder::fail_fast);
    let (a, b) = (lab.streams.get("a").unwrap(), lab.streams.get("b").unwrap());
    let torn_down = lab.file("torn-down");
    let running = b.run_bg(waiting().teardown(["touch", torn_down.to_str().unwrap()]));
    running.ready(Ready::log("up")).await.unwrap();
    let queued = b.run_bg(exec(["true"]).name("queued"));
    let held = lab.streams.get("c").unwrap().prepare(exec(["true"]).name("held"));
    a.run_fg(shell("exit 1").expect_failure()).await.unwrap();
    assert!(running.try_outcome().is_none(), "an expected failure ends nothing");
    a.run_bg(shell("exit 7").name("culprit"));

    let stopped = running.outcome().await;
    assert_eq!((stopped.kind, stopped.reason), (OutcomeKind::Stopped, Reason::FailFast), "{stopped}");
    assert!(torn_down.exists(), "its teardown has run");
    let cancelled = queued.wait().await.unwrap_err().0;
    assert_eq!((cancelled.kind, cancelled.reason), (OutcomeKind::Cancelled, Reason::FailFast), "{cancelled}");
    let late = a.run_bg(exec(["true"]).name("late")).outcome().await;
    for outcome in [&stopped, &cancelled, &late, &held.task().outcome().await] {
        assert_eq!(outcome.caused_by.as_ref().unwrap().task, "a/2-culprit", "{outcome}");
        let told = outcome.sentence();
        assert!(told.ends_with("a/2-culprit failed with exit code 7, and this test fails fast"), "{told}");
    }
    let report = lab.streams.wait().await.unwrap_err();
    assert_eq!((report.count(), report.failures[0].followers.len()), (1, 4), "{report}");
    assert_eq!(report.failures[0].outcome.label(), "2-culprit");
}

#[tokio::test]
async fn failing_fast_and_broken_barriers_make_one_failure() {
    let lab = lab_with(StreamsBuilder::fail_fast);
    let meeting = || shell("echo here; exec millstream-sync barrier met 4 --timeout 120").name("party");
    for name in ["a", "b", "c"] {
        lab.streams.get(name).unwrap().run_bg(meeting()).ready(Ready::log("here")).await.unwrap();
        // One that is quick may pass before it is told to stop: that race is lost by design.
        lab.streams.get(name).unwrap().run_bg(waiting());
    }
    lab.streams.get("d").unwrap().run_bg(shell("echo no such file >&2; exit 2").name("culprit"));
    let report = lab.streams.wait().await.unwrap_err();
    assert_eq!(report.count(), 1, "{report}");
    assert_eq!(report.failures[0].outcome.label(), "1-culprit");
    assert_eq!(report.failures[0].followers.len(), 6, "{report}");
    assert!(report.failures[0].followers.iter().all(|o| o.is_follower()), "{report}");
}

#[tokio::test]
async fn failing_fast_ends_the_wait_of_main_and_names_the_culprit() {
    let lab = lab_with(StreamsBuilder::fail_fast);
    lab.streams.get("a").unwrap().run_bg(waiting()).ready(Ready::log("up")).await.unwrap();
    lab.streams.get("b").unwrap().run_bg(shell("exit 3").name("culprit"));
    let error = lab.streams.barrier("never", 2).await.unwrap_err().to_string();
    assert!(error.contains("task 1-culprit on stream b failed with exit code 3"), "{error}");
}

#[tokio::test]
async fn those_who_wait_for_a_dead_one_with_more_queued_behind_them_are_its_followers() {
    let lab = lab();
    for name in ["a", "b"] {
        let stream = lab.streams.get(name).unwrap();
        let meeting = shell("echo here; exec millstream-sync barrier met 3 --timeout 120").name("party");
        stream.run_bg(meeting).ready(Ready::log("here")).await.unwrap();
        stream.run_bg(exec(["true"]));
    }
    lab.streams.get("c").unwrap().run_bg(shell("exit 2").name("culprit"));
    let report = lab.streams.wait().await.unwrap_err();
    assert_eq!((report.count(), report.failures[0].followers.len()), (1, 2), "{report}");
    assert!(report.failures[0].followers[0].sentence().ends_with(", because of c/1-culprit"), "{report}");
}

#[tokio::test]
async fn a_stream_that_drains_cancels_what_is_queued_and_takes_what_comes_later() {
    let lab = lab_with(|builder| builder.stream("a", "local://?on_failure=drain"));
    let stream = lab.streams.get("a").unwrap();
    stream.run_bg(shell("exit 1").name("allowed").allow_failure());
    let gate = stream.prepare(shell("exit 5").name("culprit"));
    // More than are prepared ahead.
    let queued: Vec<_> = (0..150).map(|_| stream.run_bg(exec(["true"]))).collect();
    let other = lab.streams.get("b").unwrap().run_bg(exec(["true"]));
    let culprit = gate.start();
    for task in &queued {
        let outcome = task.outcome().await;
        assert_eq!((outcome.kind, outcome.reason), (OutcomeKind::Cancelled, Reason::Drained), "{outcome}");
        assert_eq!(outcome.caused_by.as_ref().unwrap().task_id, culprit.id(), "{outcome}");
        assert!(outcome.detail.contains("2-culprit ended unexpectedly"), "{outcome}");
    }
    assert!(other.wait().await.unwrap().passed());
    assert!(stream.run_fg(exec(["true"])).await.unwrap().passed());
    let report = lab.streams.wait().await.unwrap_err();
    assert_eq!((report.count(), report.failures[0].followers.len()), (1, 150));
}

#[test]
fn names_and_indexes_lead_to_the_same_streams() {
    let lab = lab_with(|builder| {
        builder.stream("server", "local").stream("client-1", "local").stream("client-2", "local")
    });
    let names = |group: millstream::StreamGroup| -> Vec<String> {
        group.into_iter().map(|stream| stream.name().to_string()).collect()
    };
    assert_eq!((lab.streams.len(), lab.streams.initialized()), (3, 0));
    assert_eq!(lab.streams.get("client-1").unwrap().index(), 1);
    assert_eq!(lab.streams.get(0).unwrap().name().as_str(), "server");
    assert_eq!(names(lab.streams.all()), ["server", "client-1", "client-2"]);
    assert_eq!(names(lab.streams.select(r"client-\d+").unwrap()), ["client-1", "client-2"]);
    assert_eq!(names(lab.streams.slice(1..2).unwrap()), ["client-1"]);
    assert_eq!(names(lab.streams.slice(1..).unwrap()), ["client-1", "client-2"]);
    // Beyond the end: those before it are defined on the way.
    assert_eq!(lab.streams.get(4).unwrap().name().as_str(), "4");
    assert_eq!((lab.streams.len(), lab.streams.initialized()), (5, 0));
}

#[test]
fn a_strict_test_has_the_streams_that_are_defined() {
    let lab = lab_with(|builder| builder.stream("server", "local").strict());
    lab.streams.get("server").unwrap();
    let told = lab.streams.get("servre").unwrap_err().to_string();
    assert_eq!(told, "stream `servre` is not defined: there are `server` (did you mean `server`?)");
    let told = lab.streams.get(1).unwrap_err().to_string();
    assert_eq!(told, "there is no stream 1: 1 stream is defined");
}
