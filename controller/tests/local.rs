//! Real blocks in real local streams: this very test binary is the agent.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::{
    path::Path,
    sync::{Arc, Mutex},
    time::Duration,
};

use millstream::{
    Block, BlockContext, BlockResult, Layout, OutcomeKind, Ready, Reason, Streams, StreamsBuilder,
    blocking::{BlockingStream as _, BlockingStreams as _},
    exec, shell, start_together,
};

millstream::entry!();

/// Streams on this machine alone, with results that are gone afterwards.
struct Lab {
    streams: Streams,
    results: tempfile::TempDir,
}

fn lab_with(refine: impl FnOnce(StreamsBuilder) -> StreamsBuilder) -> Lab {
    let results = tempfile::tempdir().unwrap();
    let builder =
        Streams::builder("t").only_given().results_dir(results.path()).deadline(Duration::from_secs(120));
    Lab { streams: refine(builder).open().unwrap(), results }
}

fn lab() -> Lab {
    lab_with(|builder| builder)
}

#[tokio::test]
async fn a_program_passes() {
    let lab = lab();
    let outcome = lab.streams.get("a").unwrap().run_fg(exec(["true"])).await.unwrap();
    assert!(outcome.passed(), "{outcome}");
    assert!(outcome.results.join("result.json").exists());
    lab.streams.close().await.unwrap();
    assert!(lab.results.path().join("t/test.json").exists());
}

#[test]
fn a_plain_test_needs_no_runtime() {
    let lab = lab();
    let outcome = lab.streams.get("a").unwrap().run_fg_blocking(shell("echo out; echo err >&2")).unwrap();
    assert_eq!((outcome.stdout().as_str(), outcome.stderr().as_str()), ("out\n", "err\n"));
    lab.streams.wait_blocking().unwrap();
    lab.streams.close_blocking().unwrap();
}

#[tokio::test]
async fn tasks_of_a_stream_run_one_after_another() {
    let lab = lab();
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("order");
    let stream = lab.streams.get("a").unwrap();
    for number in 0..20 {
        stream.run_bg(shell(format!("echo begin {number} >> {0}; echo end {number} >> {0}", file.display())));
    }
    lab.streams.wait().await.unwrap();
    let expected: String = (0..20).map(|number| format!("begin {number}\nend {number}\n")).collect();
    assert_eq!(std::fs::read_to_string(file).unwrap(), expected);
}

#[tokio::test]
async fn a_failure_says_where_and_why() {
    let lab = lab();
    let error =
        lab.streams.get("a").unwrap().run_fg(shell("echo broken pipe >&2; exit 3").name("plumber")).await;
    let outcome = error.unwrap_err().0;
    assert_eq!((outcome.kind, outcome.exit_code()), (OutcomeKind::Failed, Some(3)));
    let text = outcome.to_string();
    assert!(
        text.starts_with("task 1-plumber on stream a (127.0.0.1): failed in phase run with exit code 3"),
        "{text}"
    );
    assert!(text.ends_with("\n  | broken pipe"), "{text}");
    let report = lab.streams.wait().await.unwrap_err();
    assert_eq!(report.count(), 1);
}

#[tokio::test]
async fn a_program_that_is_not_there_is_an_error_with_its_name() {
    let lab = lab();
    let outcome = lab.streams.get("a").unwrap().run_fg(exec(["no-such-program"])).await.unwrap_err().0;
    assert_eq!((outcome.kind, outcome.reason), (OutcomeKind::Error, Reason::StartFailed), "{outcome}");
    assert!(outcome.to_string().contains("no-such-program"), "{outcome}");
}

#[tokio::test]
async fn stop_ends_what_runs_and_cancel_what_waits() {
    let lab = lab();
    let stream = lab.streams.get("a").unwrap();
    let running = stream.run_bg(shell("echo up; sleep 1000"));
    let waiting = stream.run_bg(exec(["true"]));
    running.ready(Ready::log("^up$")).await.unwrap();
    assert!(waiting.explain().await.contains("waits for task 1-"), "{}", waiting.explain().await);
    assert_eq!(waiting.cancel().await.kind, OutcomeKind::Cancelled);
    assert_eq!(running.stop().await.kind, OutcomeKind::Stopped);
    lab.streams.wait().await.unwrap();
}

#[tokio::test]
async fn lines_are_seen_live_by_all_who_look() {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let lab = lab_with(|builder| {
        let seen = Arc::clone(&seen);
        builder.on_log(move |line| seen.lock().unwrap().push(format!("{} {}", line.task, line.text)))
    });
    let task = lab
        .streams
        .get("a")
        .unwrap()
        .run_bg(shell("echo one; echo two >&2; read -r x || sleep 1000").name("b"));
    let mut logs = task.logs();
    let mut lines = [logs.next().await.unwrap().text, logs.next().await.unwrap().text];
    lines.sort();
    assert_eq!(lines, ["one", "two"]);
    assert_eq!(seen.lock().unwrap().len(), 2);
    task.stop().await;
    assert!(logs.next().await.is_none());
}

#[tokio::test]
async fn a_port_shows_that_a_block_is_ready() {
    let lab = lab();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let task = lab.streams.get("a").unwrap().run_bg(shell("sleep 1000"));
    task.ready(Ready::port(port)).await.unwrap();
    let ended = lab.streams.get("b").unwrap().run_bg(exec(["true"]));
    let error = ended.ready(Ready::log("never printed")).await.unwrap_err();
    assert!(error.to_string().contains("ended before it printed `never printed`"), "{error}");
    task.stop().await;
}

/// Processes of this machine whose command line has a word.
fn processes_with(word: &str) -> usize {
    let has = |entry: &std::fs::DirEntry| {
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).contains(word)
            && entry.file_name().to_string_lossy().parse::<u32>().is_ok()
    };
    std::fs::read_dir("/proc").unwrap().flatten().filter(has).count()
}

#[tokio::test]
async fn dropping_streams_leaves_nothing_behind() {
    let lab = lab();
    // A number that nobody else sleeps for.
    let seconds = format!("{}.25", 100_000 + std::process::id());
    let task =
        lab.streams.get("a").unwrap().run_bg(shell(format!("sleep {seconds} & echo up; sleep {seconds}")));
    task.ready(Ready::log("up")).await.unwrap();
    assert!(processes_with(&seconds) >= 2);
    drop(lab.streams);
    assert_eq!(task.outcome().await.reason, Reason::SessionClosed);
    assert_eq!(processes_with(&seconds), 0);
}

#[tokio::test]
async fn what_a_block_leaves_comes_home() {
    let lab = lab();
    let block = shell(
        "echo 42 > $MILLSTREAM_WHITEBOARD; mkdir $MILLSTREAM_OUTPUT/sub; echo x > $MILLSTREAM_OUTPUT/sub/file",
    );
    let outcome = lab.streams.get("a").unwrap().run_fg(block).await.unwrap();
    assert_eq!(outcome.whiteboard(), "42\n");
    assert_eq!(std::fs::read_to_string(outcome.data().join("sub/file")).unwrap(), "x\n");
}

#[tokio::test]
async fn a_large_result_comes_home_whole() {
    let lab = lab();
    let block =
        shell("head -c 3000000 /dev/zero > $MILLSTREAM_OUTPUT/zeros; head -c 400000 /dev/zero | tr '\\0' x");
    let outcome = lab.streams.get("a").unwrap().run_fg(block).await.unwrap();
    assert_eq!(std::fs::metadata(outcome.data().join("zeros")).unwrap().len(), 3_000_000);
    assert!(outcome.stdout() == "x".repeat(400_000), "{} bytes", outcome.stdout().len());
}

fn meet(name: &str) -> Block {
    shell(format!("millstream-sync barrier met 2 --timeout 30 && echo {name} passed"))
}

#[tokio::test]
async fn two_streams_meet_at_a_barrier() {
    let lab = lab();
    let one = lab.streams.get("one").unwrap().run_bg(meet("one"));
    let two = lab.streams.get("two").unwrap().run_bg(meet("two"));
    assert!(one.wait().await.unwrap().stdout().ends_with("one passed\n"));
    assert!(two.wait().await.unwrap().stdout().ends_with("two passed\n"));
}

#[tokio::test]
async fn main_meets_blocks_and_a_party_that_dies_is_named() {
    let lab = lab();
    lab.streams.get("one").unwrap().run_bg(shell("millstream-sync barrier met 2 --timeout 30"));
    lab.streams.barrier("met", 2).await.unwrap();
    let waiting =
        lab.streams.get("one").unwrap().run_bg(shell("millstream-sync barrier second 2").name("waits"));
    lab.streams.get("two").unwrap().run_bg(shell("exit 7").name("dies"));
    let report = lab.streams.wait().await.unwrap_err();
    assert_eq!(report.count(), 1, "{report}");
    assert_eq!(report.failures[0].followers.len(), 1, "{report}");
    assert!(waiting.outcome().await.stderr().contains("dies"), "{}", waiting.outcome().await.stderr());
}

#[millstream::block]
fn greet(ctx: &mut BlockContext, name: String, parties: usize) -> BlockResult {
    ctx.barrier("greeting", parties)?;
    ctx.whiteboard(format!("hello {name}"))?;
    Ok(())
}

#[tokio::test]
async fn functions_of_this_file_are_blocks() {
    let lab = lab();
    let one = lab.streams.get("one").unwrap().run_bg(greet("one".to_owned(), 2));
    let two = lab.streams.get("two").unwrap().run_fg(greet("two".to_owned(), 2)).await.unwrap();
    assert_eq!(two.whiteboard(), "hello two\n");
    assert_eq!(one.wait().await.unwrap().whiteboard(), "hello one\n");
}

#[tokio::test]
async fn prepared_tasks_start_together() {
    let lab = lab();
    let prepared = lab.streams.slice(0..3).unwrap().into_iter().map(|stream| stream.prepare(exec(["true"])));
    let started = start_together(prepared).await.unwrap();
    assert!(started.skew.unwrap() < Duration::from_secs(1), "{:?}", started.skew);
    lab.streams.wait().await.unwrap();
}

#[tokio::test]
async fn the_deadline_of_the_test_ends_what_runs() {
    let lab = lab_with(|builder| builder.deadline(Duration::from_secs(2)));
    let outcome = lab.streams.get("a").unwrap().run_bg(shell("sleep 1000")).outcome().await;
    assert_eq!((outcome.kind, outcome.reason), (OutcomeKind::TimedOut, Reason::TestDeadline), "{outcome}");
    assert!(!lab.streams.success());
}

#[test]
fn results_say_everything() {
    let lab = lab();
    lab.streams.get("a").unwrap().run_fg_blocking(exec(["true"])).unwrap();
    let directory = lab.streams.results_dir().to_owned();
    lab.streams.close_blocking().unwrap();
    let read = |path: &Path| std::fs::read_to_string(directory.join(path)).unwrap();
    assert!(read(Path::new("test.json")).contains("\"success\": true"), "{}", read(Path::new("test.json")));
    assert!(read(Path::new("streams/a/stream.json")).contains("\"kernel\": \"Linux"));
}

#[tokio::test]
async fn waits_for_values_are_in_the_results() {
    let lab = lab();
    let waits = shell("millstream-sync wait port && millstream-sync subscribe port").name("waits");
    let reader = lab.streams.get("reader").unwrap().run_bg(waits.allow_failure());
    let server = shell("millstream-sync publish port 5201; millstream-sync wait ready; true").name("server");
    lab.streams.get("server").unwrap().run_bg(server);
    assert_eq!(lab.streams.wait_topic("port", 1).await.unwrap()[0].publisher.as_ref(), "server/1-server");
    reader.ready(Ready::log("5201\n?")).await.unwrap();
    let mut listening = lab.streams.subscribe("port").unwrap();
    assert_eq!(listening.next().await.unwrap().len(), 1);
    lab.streams.publish("ready", "yes").unwrap();
    lab.streams.wait().await.unwrap();
    // Nobody is left: whoever only listens is told so instead of waiting for ever.
    assert!(reader.outcome().await.stderr().contains("gets no more"), "{}", reader.outcome().await.stderr());

    let directory = lab.streams.results_dir().to_owned();
    lab.streams.close().await.unwrap();
    let text = std::fs::read_to_string(directory.join("test.json")).unwrap();
    let test: serde_json::Value = serde_json::from_str(&text).unwrap();
    let mut told: Vec<String> = test["waits"]
        .as_array()
        .unwrap()
        .iter()
        .map(|wait| {
            assert!(
                wait["begin_time"].is_string() && wait["wait_seconds"].as_f64().unwrap() >= 0.0,
                "{wait}"
            );
            let is_task = wait["task_id"].is_string();
            let failed = wait["failed"].as_str().map_or("met", |why| why.split(':').next().unwrap());
            format!(
                "{} {} {} {is_task} {}: {failed}",
                wait["party"].as_str().unwrap(),
                wait["topic"].as_str().unwrap(),
                wait["count"],
                wait["subscribed"]
            )
        })
        .collect();
    told.sort();
    assert_eq!(
        told,
        [
            "main port 1 false null: met",
            "reader/1-waits port 1 true null: met",
            "reader/1-waits port 2 true true: topic `port` has 1 value and gets no more",
            "server/1-server ready 1 true null: met",
        ],
        "{text}"
    );
}

/// Runs blocks of one name in two streams, in turn.
fn run_alike(lab: &Lab) {
    for stream in ["a", "b", "a", "b"] {
        let block =
            shell("echo $MILLSTREAM_STREAM; echo $MILLSTREAM_TASK > $MILLSTREAM_WHITEBOARD").name("same");
        lab.streams.get(stream).unwrap().run_fg_blocking(block).unwrap();
    }
}

/// Directories of tasks below a directory, with what each block printed.
fn tasks_below(directory: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let mut directories = vec![directory.to_owned()];
    while let Some(next) = directories.pop() {
        for entry in std::fs::read_dir(next).unwrap() {
            let path = entry.unwrap().path();
            if path.join("result.json").exists() {
                let stdout = std::fs::read_to_string(path.join("stdout")).unwrap();
                let name = path.strip_prefix(directory).unwrap().display().to_string();
                found.push(format!("{name}: {}", stdout.trim()));
            } else if path.is_dir() {
                directories.push(path);
            }
        }
    }
    found.sort();
    found
}

#[test]
fn both_layouts_show_the_order_and_lose_nothing() {
    let queue = ["streams/a/1-same: a", "streams/a/2-same: a", "streams/b/1-same: b", "streams/b/2-same: b"];
    let flat = ["1-same: a", "2-same: b", "3-same: a", "4-same: b"];
    for (layout, expected) in [(Layout::Queue, queue), (Layout::Flat, flat)] {
        let results = tempfile::tempdir().unwrap();
        let whiteboards: std::collections::BTreeSet<String> = ["t", "t.2"]
            .into_iter()
            .flat_map(|run| {
                let lab = lab_with(|builder| builder.layout(layout).results_dir(results.path()));
                run_alike(&lab);
                let directory = lab.streams.results_dir().to_owned();
                assert_eq!(directory, results.path().join(run), "the run before is left alone");
                let outcomes = lab.streams.join_blocking().outcomes;
                lab.streams.close_blocking().unwrap();
                assert_eq!(tasks_below(&directory), expected);
                assert_eq!(std::fs::read_link(results.path().join("latest")).unwrap(), Path::new(run));
                assert!(directory.join("streams/b/stream.json").exists(), "the host is told in both");
                outcomes.into_iter().map(|outcome| outcome.whiteboard()).collect::<Vec<_>>()
            })
            .collect();
        assert_eq!(whiteboards.len(), 8, "each task has its own: {whiteboards:?}");
    }
}

#[test]
fn results_that_can_no_longer_be_written_fail_no_task_and_are_told() {
    let lab = lab();
    let directory = lab.streams.results_dir().to_owned();
    std::fs::remove_dir_all(&directory).unwrap();
    std::fs::write(&directory, "in the way").unwrap();
    let outcome = lab.streams.get("a").unwrap().run_fg_blocking(shell("echo x")).unwrap();
    assert!(outcome.passed(), "{outcome}");
    let told = outcome.results_error.clone().unwrap();
    assert!(told.contains("failed to write the results file") && told.contains("streams/a/1-"), "{told}");
    assert!(outcome.sentence().contains("; its results are incomplete: "), "{outcome}");
    let error = lab.streams.close_blocking().unwrap_err().to_string();
    assert!(error.contains("test.json"), "{error}");
}
