//! Blocks that run blocks in streams, in real local streams.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::time::Duration;

use millstream::{
    BlockContext, BlockResult, OutcomeKind, Streams, StreamsBuilder,
    blocking::{BlockingStream as _, BlockingStreams as _, BlockingTask as _},
    shell,
};

millstream::entry!();

fn open_with(refine: impl FnOnce(StreamsBuilder) -> StreamsBuilder) -> (Streams, tempfile::TempDir) {
    let results = tempfile::tempdir().unwrap();
    let builder =
        Streams::builder("t").only_given().results_dir(results.path()).deadline(Duration::from_secs(120));
    (refine(builder).open().unwrap(), results)
}

/// Runs a block on a stream of the test, from inside a block.
#[millstream::block]
fn outer(ctx: &mut BlockContext, text: String) -> BlockResult {
    let streams = Streams::open("inner")?;
    let outcome = streams
        .get("b")?
        .run_fg_blocking(shell(format!("echo {text}; echo kept >$MILLSTREAM_OUTPUT/file")).name("echo"))?;
    ctx.whiteboard(outcome.stdout().trim())?;
    streams.close_blocking()?;
    Ok(())
}

#[tokio::test]
async fn a_block_runs_a_block_in_a_stream_of_its_test() {
    let (streams, _results) = open_with(|builder| builder.stream("a", "local").stream("b", "local"));
    let outcome =
        streams.get("a").unwrap().run_fg(outer("hello".to_owned()).may_run_streams()).await.unwrap();
    assert_eq!(outcome.whiteboard(), "hello\n");
    streams.get("b").unwrap().run_fg(shell("true").name("after")).await.unwrap();
    let directory = streams.results_dir().to_owned();
    streams.close().await.unwrap();

    let inner = outcome.results.join("streams/b/1-echo");
    assert_eq!(std::fs::read_to_string(inner.join("stdout")).unwrap(), "hello\n");
    assert_eq!(std::fs::read_to_string(inner.join("data/file")).unwrap(), "kept\n");
    assert!(!outcome.data().join(".millstream-streams").exists());
    let text = std::fs::read_to_string(directory.join("test.json")).unwrap();
    let test: serde_json::Value = serde_json::from_str(&text).unwrap();
    let order: Vec<String> = test["tasks"]
        .as_array()
        .unwrap()
        .iter()
        .map(|task| format!("{} {}", task["directory"].as_str().unwrap(), task["within"]))
        .collect();
    assert_eq!(
        order,
        [
            "streams/a/1-outer null",
            "streams/a/1-outer/streams/b/1-echo \"a/1-outer\"",
            "streams/b/1-after null"
        ]
    );
}

#[tokio::test]
async fn a_block_that_is_not_marked_is_told_what_to_do() {
    let (streams, _results) = open_with(|builder| builder.stream("b", "local"));
    let outcome = streams.get("a").unwrap().run_fg(outer("x".to_owned())).await.unwrap_err().0;
    assert!(
        outcome.stderr().contains("mark it with `.may_run_streams()`"),
        "{outcome}\n{}",
        outcome.stderr()
    );
}

/// Barriers, topics and numbers of nested streams are their own.
#[millstream::block]
fn meets(ctx: &mut BlockContext) -> BlockResult {
    let streams = Streams::open("inner")?;
    let first =
        streams.get("b")?.run_bg(shell("millstream-sync publish t inner; millstream-sync barrier met 2"));
    let met = streams.barrier_blocking("met", 2)?;
    first.wait_blocking()?;
    let values: Vec<String> = ctx.get("t")?;
    ctx.whiteboard(format!("{} {} {values:?}", met.generation, first.stream_number()))?;
    let stuck = streams.get("b")?.run_bg(shell("millstream-sync barrier alone 2 --timeout 100"));
    let report = streams.join_blocking();
    ctx.whiteboard(report.success())?;
    ctx.whiteboard(stuck.outcome_blocking().stderr())?;
    Ok(())
}

#[tokio::test]
async fn nested_streams_have_barriers_topics_and_numbers_of_their_own() {
    let (streams, _results) = open_with(|builder| builder.stream("b", "local"));
    streams.publish("t", "outer").unwrap();
    streams.get("b").unwrap().run_fg(shell("true")).await.unwrap();
    let outcome = streams.get("b").unwrap().run_fg(meets().may_run_streams()).await.unwrap();
    let whiteboard = outcome.whiteboard();
    let lines: Vec<&str> = whiteboard.lines().collect();
    assert_eq!(&lines[..2], ["1 1 [\"outer\"]", "false"], "{whiteboard}");
    assert!(lines[2].contains("1 of 2 entered") && lines[2].contains("can no longer come"), "{whiteboard}");
}

/// Nests once more: the innermost prints more than any buffer on the way holds.
#[millstream::block]
fn twice(ctx: &mut BlockContext) -> BlockResult {
    let streams = Streams::open("middle")?;
    let outcome = streams.get("b")?.run_fg_blocking(prints_much().may_run_streams())?;
    ctx.whiteboard(outcome.whiteboard().trim())?;
    streams.close_blocking()?;
    Ok(())
}

#[millstream::block]
fn prints_much(ctx: &mut BlockContext) -> BlockResult {
    let streams = Streams::open("innermost")?;
    let outcome =
        streams.get("a")?.run_fg_blocking(shell("head -c 4000000 /dev/zero | tr '\\0' x").name("much"))?;
    ctx.whiteboard(outcome.stdout().len())?;
    streams.close_blocking()?;
    Ok(())
}

#[tokio::test]
async fn a_nested_block_may_nest_again_and_nothing_is_lost_on_the_way() {
    let (streams, _results) = open_with(|builder| builder.stream("a", "local").stream("b", "local"));
    let outcome = streams.get("a").unwrap().run_fg(twice().may_run_streams()).await.unwrap();
    assert_eq!(outcome.whiteboard(), "4000000\n");
    let directory = streams.results_dir().to_owned();
    streams.close().await.unwrap();
    let innermost = outcome.results.join("streams/b/1-prints_much/streams/a/1-much/stdout");
    assert_eq!(std::fs::metadata(innermost).unwrap().len(), 4_000_000);
    let text = std::fs::read_to_string(directory.join("test.json")).unwrap();
    let test: serde_json::Value = serde_json::from_str(&text).unwrap();
    let within: Vec<Option<&str>> =
        test["tasks"].as_array().unwrap().iter().map(|task| task["within"].as_str()).collect();
    assert_eq!(within, [None, Some("a/1-twice"), Some("a/1-twice/b/1-prints_much")], "{text}");
}

#[tokio::test]
async fn waiting_in_a_circle_is_refused_with_the_circle() {
    let (streams, _results) = open_with(|builder| builder.stream("b", "local://?exclusive=yes"));
    let outcome =
        streams.get("b").unwrap().run_fg(outer("x".to_owned()).may_run_streams()).await.unwrap_err().0;
    let told = outcome.stderr();
    let circle = "waiting for stream `b` inside a block would be a circle: the block would wait for local, which the test \
                  has reserved until it ends, and the test waits for the block. Leave `exclusive` out of the definition";
    assert!(told.contains(circle), "{told}");
}

/// Leaves without closing anything.
#[millstream::block]
fn vanishes() -> BlockResult {
    let streams = Streams::open("inner")?;
    let task =
        streams.get("b")?.run_bg(shell(format!("echo up; sleep {}.75", std::env::var("SECONDS_TO_SLEEP")?)));
    millstream::blocking::block_on(task.ready(millstream::Ready::log("up")))?;
    std::process::abort();
}

/// Whether a process of this machine has a word in its command line.
fn runs(word: &str) -> bool {
    std::fs::read_dir("/proc").unwrap().flatten().any(|entry| {
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).contains(word)
    })
}

/// Waits for what runs in its stream for ever.
#[millstream::block]
fn waits(ctx: &mut BlockContext) -> BlockResult {
    let streams = Streams::open("inner")?;
    let sleeping = shell(format!("echo up; sleep {}.5", std::env::var("SECONDS_TO_SLEEP")?));
    let task = streams.get("b")?.run_bg(sleeping);
    millstream::blocking::block_on(task.ready(millstream::Ready::log("up")))?;
    ctx.log("sleeps");
    streams.wait_blocking()?;
    Ok(())
}

#[tokio::test]
async fn a_block_that_is_stopped_closes_its_streams_first() {
    let (streams, _results) = open_with(|builder| builder.stream("a", "local").stream("b", "local"));
    let seconds = (300_000 + std::process::id()).to_string();
    // Long enough for the slowest machine: what counts is that the block ends by itself.
    let block = waits().env("SECONDS_TO_SLEEP", seconds.as_str()).grace(Duration::from_secs(100));
    let task = streams.get("a").unwrap().run_bg(block.may_run_streams());
    task.ready(millstream::Ready::log("sleeps")).await.unwrap();
    assert!(runs(&format!("{seconds}.5")));
    let outcome = task.stop().await;
    assert_eq!(outcome.kind, OutcomeKind::Stopped, "{outcome}");
    assert!(!runs(&format!("{seconds}.5")), "a nested block still runs");
    streams.close().await.unwrap();
}

#[tokio::test]
async fn a_block_that_dies_leaves_nothing_behind_when_the_test_closes() {
    let (streams, _results) = open_with(|builder| builder.stream("a", "local").stream("b", "local"));
    // A number that nobody else sleeps for.
    let seconds = (200_000 + std::process::id()).to_string();
    let block = vanishes().env("SECONDS_TO_SLEEP", seconds.as_str()).may_run_streams();
    streams.get("a").unwrap().run_fg(block).await.unwrap_err();
    streams.close().await.unwrap();
    assert!(!runs(&format!("{seconds}.75")), "a nested block still runs");
}
