//! The whole controller against an agent that is a script: what it says is real gRPC, what it runs is a word.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use expect_test::expect;
use millstream_common::protocol::{Build, Spoken};

use crate::{
    Block, Expectation, OutcomeKind, Ready, Reason, Streams, exec,
    reach::{PlaceError, Reach, register},
    start_together,
};

mod explaining;
mod fake;
mod payloads;
mod retiring;

use fake::{Fake, LEASE, PIECE};

/// Streams `a` and `b` on one scripted agent.
struct Lab {
    fake: Fake,
    streams: Streams,
    results: tempfile::TempDir,
}

fn lab() -> Lab {
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    let kind = format!("fake{}", COUNT.fetch_add(1, Ordering::SeqCst));
    let fake = Fake::default();
    let reach: Arc<dyn Reach> = Arc::new(fake.clone());
    register(&kind, move |_| Ok::<_, PlaceError>(Arc::clone(&reach)));
    let results = tempfile::tempdir().unwrap();
    let streams = Streams::builder("t")
        .only_given()
        .results_dir(results.path())
        .stream("a", format!("{kind}://x"))
        .stream("b", format!("{kind}://x"))
        .deadline(Duration::from_secs(60))
        .lease(LEASE)
        .open()
        .unwrap();
    Lab { fake, streams, results }
}

fn word(word: &str) -> Block {
    exec([word])
}

#[tokio::test]
async fn a_task_passes_and_its_results_are_on_disk() {
    let lab = lab();
    let outcome = lab.streams.get("a").unwrap().run_fg(word("true")).await.unwrap();
    assert_eq!(outcome.to_string(), "task 1-true on stream a (fakehost): passed after 0.0 s");
    let written = std::fs::read_to_string(outcome.results.join("result.json")).unwrap();
    assert!(written.contains("\"passed\""), "{written}");
    assert_eq!(lab.streams.initialized(), 1);
    lab.streams.close().await.unwrap();
    let test = std::fs::read_to_string(lab.results.path().join("t/test.json")).unwrap();
    assert!(test.contains("streams/a/1-true"), "{test}");
    assert_eq!(lab.fake.lock().closed, 1);
}

#[tokio::test]
async fn tasks_of_a_stream_are_handed_over_in_their_order() {
    let lab = lab();
    let stream = lab.streams.get("a").unwrap();
    for _ in 0..300 {
        stream.run_bg(word("true"));
    }
    lab.streams.wait().await.unwrap();
    assert_eq!(lab.streams.join().await.outcomes.len(), 300);
    let mut received = lab.fake.lock().received.clone();
    received.sort_unstable();
    let numbered: Vec<(u32, u32)> = (1..=300).map(|number| (number, number - 1)).collect();
    assert_eq!(received, numbered);
}

#[tokio::test]
async fn unexpected_ends_are_errors_and_expected_ones_are_not() {
    let lab = lab();
    let stream = lab.streams.get("a").unwrap();
    stream.run_fg(word("false").expect_failure()).await.unwrap();
    let error = stream.run_fg(word("false")).await.unwrap_err();
    assert_eq!(error.0.exit_code(), Some(1));
    let refused = stream.run_fg(word("refused")).await.unwrap_err();
    assert_eq!((refused.0.kind, refused.0.reason), (OutcomeKind::Error, Reason::InvalidBlock));
    stream.run_fg(word("true")).await.unwrap();
    let report = lab.streams.wait().await.unwrap_err();
    assert_eq!(report.count(), 2);
    assert_eq!(lab.streams.join().await.outcomes[0].expectation, Expectation::Fail);
}

#[tokio::test]
async fn a_stopped_task_is_no_failure_and_the_next_one_runs() {
    let lab = lab();
    let stream = lab.streams.get("a").unwrap();
    let hanging = stream.run_bg(word("hang"));
    let queued = stream.run_bg(word("hang"));
    let last = stream.run_bg(word("true"));
    hanging.ready(Ready::log("^hang$")).await.unwrap();
    assert!(queued.explain().await.contains("waits for task 1-hang"), "{}", queued.explain().await);
    let outcome = hanging.stop().await;
    assert_eq!(outcome.kind, OutcomeKind::Stopped);
    assert_eq!(hanging.logs().next().await.unwrap().text, "hang");
    queued.ready(Ready::log("hang")).await.unwrap();
    queued.stop().await;
    assert!(last.wait().await.unwrap().passed());
    lab.streams.wait().await.unwrap();
}

#[tokio::test]
async fn a_long_log_arrives_by_the_bulk_connection() {
    let lab = lab();
    let outcome = lab.streams.get("a").unwrap().run_fg(word("large")).await.unwrap();
    let expected = "a".repeat(PIECE) + &"b".repeat(PIECE);
    assert!(outcome.stdout() == expected, "{} bytes", outcome.stdout().len());
    assert_eq!(lab.fake.shared.dials.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn prepared_tasks_start_together_and_are_cancelled_when_dropped() {
    let lab = lab();
    let (a, b) = (lab.streams.get("a").unwrap(), lab.streams.get("b").unwrap());
    let started = start_together([a.prepare(word("true")), b.prepare(word("true"))]).await.unwrap();
    assert_eq!(started.skew, Some(Duration::ZERO));
    let held = a.prepare(word("true"));
    let behind = a.prepare(word("true"));
    let error = start_together([behind]).await.unwrap_err();
    assert!(error.to_string().contains("cannot begin with the others"), "{error}");
    let outcome = held.start().wait().await.unwrap();
    assert!(outcome.passed(), "{outcome}");
}

#[tokio::test]
async fn a_cut_is_not_noticed_by_tasks() {
    let lab = lab();
    let stream = lab.streams.get("a").unwrap();
    let hanging = stream.run_bg(word("hang"));
    hanging.ready(Ready::log("hang")).await.unwrap();
    lab.fake.shared.cut.send_modify(|count| *count += 1);
    let next = stream.run_bg(word("true"));
    // What is said before the other end has come to cut it still goes through.
    let beside = lab.streams.get("b").unwrap();
    for _ in 0..1_000 {
        beside.run_fg(word("true")).await.unwrap();
        if lab.fake.lock().epoch >= 2 {
            break;
        }
    }
    assert!(lab.fake.lock().epoch >= 2);
    assert_eq!(hanging.stop().await.kind, OutcomeKind::Stopped);
    assert!(next.wait().await.unwrap().passed());
    assert_eq!(hanging.outcome().await.stdout(), "hang\n");
}

#[tokio::test]
async fn a_session_that_the_host_forgot_loses_its_tasks_and_a_new_one_serves_the_next() {
    let lab = lab();
    let stream = lab.streams.get("a").unwrap();
    let hanging = stream.run_bg(word("hang"));
    hanging.ready(Ready::log("hang")).await.unwrap();
    lab.fake.shared.forgets.store(true, Ordering::SeqCst);
    lab.fake.shared.cut.send_modify(|count| *count += 1);
    let outcome = hanging.outcome().await;
    assert_eq!(outcome.kind, OutcomeKind::Lost, "{outcome}");
    assert!(stream.run_fg(word("true")).await.unwrap().passed());
    assert_eq!(lab.fake.lock().closed, 1, "the lost session was closed before the new one was opened");
}

#[tokio::test]
async fn a_session_that_was_lost_is_ended_when_its_host_can_be_asked_again() {
    let lab = lab();
    let hanging = lab.streams.get("a").unwrap().run_bg(word("hang"));
    hanging.ready(Ready::log("hang")).await.unwrap();
    lab.fake.shared.unreachable.store(true, Ordering::SeqCst);
    lab.fake.shared.cut.send_modify(|count| *count += 1);
    assert_eq!(hanging.outcome().await.kind, OutcomeKind::Lost);
    assert_eq!(lab.fake.lock().closed, 0);
    lab.fake.shared.unreachable.store(false, Ordering::SeqCst);
    lab.streams.close().await.unwrap();
    assert_eq!(lab.fake.lock().closed, 1);
}

#[tokio::test]
async fn an_agent_of_another_version_is_refused_with_both_versions_and_the_end_to_update() {
    let newer = Spoken { min: 2, max: 4, version: "9.0.0" };
    let older = Spoken { min: 0, max: 0, version: "0.0.1" };
    let mut told = String::new();
    for spoken in [newer, older] {
        let lab = lab();
        *lab.fake.shared.build.lock().unwrap() = Some(Build { spoken, features: &[] });
        let failed = lab.streams.get("a").unwrap().run_fg(word("true")).await.unwrap_err();
        assert_eq!((failed.0.kind, failed.0.reason), (OutcomeKind::Error, Reason::Unreachable));
        told += &format!("{}\n", failed.0).replace(Spoken::OURS.version, "VERSION");
        lab.streams.close().await.unwrap();
        let state = lab.fake.lock();
        assert_eq!(state.closed, usize::try_from(state.epoch).unwrap(), "no session stays open");
        assert!(state.received.is_empty(), "nothing is started on it");
    }
    expect![[r#"
        task 1-true on stream a (fakehost): error (unreachable): fake: the agent of version 9.0.0 speaks protocols 2 to 4, the controller of version VERSION speaks protocol 1: update the controller
        task 1-true on stream a (fakehost): error (unreachable): fake: the agent of version 0.0.1 speaks protocol 0, the controller of version VERSION speaks protocol 1: update the agent
    "#]].assert_eq(&told);
}

#[tokio::test]
async fn a_task_that_needs_what_the_agent_lacks_says_so_and_the_others_run() {
    let of = |version, features| Build { spoken: Spoken { version, ..Spoken::OURS }, features };
    // What a newer agent has more is nothing to this controller.
    let newer = of("9.0.0", &["hold", "teleport"]);
    let older = of("0.0.9", &["secret-files"]);
    let mut told = String::new();
    for build in [newer, older] {
        let lab = lab();
        *lab.fake.shared.build.lock().unwrap() = Some(build);
        let a = lab.streams.get("a").unwrap();
        a.run_fg(word("true")).await.unwrap();
        let secret = a.run_bg(word("true").name("secret").secret_param("password", "x"));
        let held = a.prepare(word("true").name("held"));
        // Only what is really held needs an agent that can.
        let _ended_without = held.staged().await;
        for task in [secret, held.start()] {
            let outcome = task.outcome().await;
            let ran = outcome.kind == OutcomeKind::Passed;
            assert!(ran || (outcome.kind, outcome.reason) == (OutcomeKind::Error, Reason::Unsupported));
            told += &format!("{outcome}\n").replace(Spoken::OURS.version, "VERSION");
        }
        a.run_fg(word("true")).await.unwrap();
        lab.streams.close().await.unwrap();
        assert_eq!(lab.fake.lock().taken.len(), 3, "what cannot be done as it was meant is not begun");
    }
    expect![[r#"
        task 2-secret on stream a (fakehost): error (unsupported): the controller of version VERSION needs the feature `secret-files` (to hand over secret parameters), which the agent of version 9.0.0 lacks: update the controller
        task 3-held on stream a (fakehost): passed after 0.0 s
        task 2-secret on stream a (fakehost): passed after 0.0 s
        task 3-held on stream a (fakehost): error (unsupported): the controller of version VERSION needs the feature `hold` (to hold a prepared task until it is started), which the agent of version 0.0.9 lacks: update the agent
    "#]].assert_eq(&told);
}

#[tokio::test]
async fn dropping_streams_closes_sessions_and_ends_tasks() {
    let lab = lab();
    let hanging = lab.streams.get("a").unwrap().run_bg(word("hang"));
    hanging.ready(Ready::log("hang")).await.unwrap();
    drop(lab.streams);
    let outcome = hanging.outcome().await;
    assert_eq!((outcome.kind, outcome.reason), (OutcomeKind::Stopped, Reason::SessionClosed));
    assert_eq!(lab.fake.lock().closed, 1);
    let late = hanging.clone();
    assert_eq!(late.explain().await, outcome.sentence());
}
