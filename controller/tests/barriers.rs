//! Barriers of groups, of all streams, with main, and after failures, in real local streams.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::time::Duration;

use millstream::{
    BlockContext, BlockResult, OutcomeKind, Parties, Phase, Streams, StreamsBuilder, python, shell,
};

millstream::entry!();

/// Streams on this machine alone, with results that are gone afterwards.
fn open_with(refine: impl FnOnce(StreamsBuilder) -> StreamsBuilder) -> (Streams, tempfile::TempDir) {
    let results = tempfile::tempdir().unwrap();
    let builder =
        Streams::builder("t").only_given().results_dir(results.path()).deadline(Duration::from_secs(120));
    (refine(builder).open().unwrap(), results)
}

#[millstream::block]
fn meet(ctx: &mut BlockContext) -> BlockResult {
    let met = ctx.barrier("rust", Parties::group())?;
    ctx.whiteboard(format!("met {}", met.parties.len()))?;
    Ok(())
}

#[tokio::test]
async fn a_block_on_a_group_need_not_know_its_size() {
    let (streams, _results) = open_with(|builder| builder);
    let group = streams.slice(0..3).unwrap();
    group.run_bg(shell("millstream-sync barrier setup | wc -l >$MILLSTREAM_WHITEBOARD"));
    let functions = group.run_synchronized(meet()).await.unwrap();
    let report = streams.wait().await.unwrap();
    for outcome in &report.outcomes[..3] {
        assert_eq!(outcome.whiteboard().trim(), "3", "{outcome}");
    }
    for task in &functions.tasks {
        assert_eq!(task.outcome().await.whiteboard(), "met 3\n");
    }
}

#[tokio::test]
async fn a_block_of_no_group_is_told_to_say_how_many() {
    let (streams, _results) = open_with(|builder| builder);
    let outcome =
        streams.get("a").unwrap().run_fg(shell("millstream-sync barrier setup")).await.unwrap_err().0;
    assert!(outcome.stderr().contains("the block was not run on a group"), "{outcome}");
}

#[tokio::test]
async fn main_meets_all_streams_and_a_named_subset_meets_beside_them() {
    let stream = |builder: StreamsBuilder, name: &str| builder.stream(name, "local://");
    let (streams, _results) = open_with(|builder| ["a", "b", "c"].into_iter().fold(builder, stream));
    let pair = streams.select("[ab]").unwrap();
    pair.run_bg(shell("set -e; millstream-sync barrier pair; millstream-sync barrier everybody all+1"));
    streams.get("c").unwrap().run_bg(shell("millstream-sync barrier everybody all+1"));
    let met = streams.barrier("everybody", Parties::all().and(1)).await.unwrap();
    assert_eq!(met.parties.len(), 4, "{met:?}");
    streams.wait().await.unwrap();
}

#[tokio::test]
async fn python_counts_as_everybody_else_does() {
    let stream = |builder: StreamsBuilder, name: &str| builder.stream(name, "local://");
    let (streams, _results) = open_with(|builder| ["a", "b", "c"].into_iter().fold(builder, stream));
    let says = "import millstream; print(len(millstream.barrier(NAME, PARTIES)['parties']))";
    let python = |name: &str, parties: &str| {
        python(says.replace("NAME", &format!("{name:?}")).replace("PARTIES", parties))
    };
    let everybody = streams.all().run_bg(python("everybody", "'all+1'"));
    assert_eq!(streams.barrier("everybody", Parties::all().and(1)).await.unwrap().parties.len(), 4);
    let group = streams.select("[ab]").unwrap().run_bg(python("group", "None"));
    let counted = streams.select("[bc]").unwrap().run_bg(python("counted", "2"));
    streams.wait().await.unwrap();
    for (tasks, parties) in [(everybody, "4\n"), (group, "2\n"), (counted, "2\n")] {
        for task in tasks {
            assert_eq!(task.outcome().await.stdout(), parties);
        }
    }
}

/// Hears what is said to it, and nothing else.
#[millstream::block]
fn hear(ctx: &mut BlockContext, topic: String) -> BlockResult {
    for value in ctx.subscribe::<String>(&topic)? {
        ctx.whiteboard(value?)?;
    }
    Ok(())
}

#[tokio::test]
async fn those_who_wait_for_each_others_values_are_told_in_every_language() {
    let (streams, _results) = open_with(|builder| builder);
    let run = |name: &str, block: millstream::Block| streams.get(name).unwrap().run_bg(block);
    let by_python =
        "import millstream\nfor value in millstream.subscribe('python'): millstream.whiteboard(value)";
    let by_shell = "from=0; while value=$(millstream-sync subscribe shell --once --from $from); do \
        millstream-sync whiteboard \"$value\"; from=$((from + 1)); done; exit 1";
    let tasks = [run("a", hear("rust".to_owned())), run("b", python(by_python)), run("c", shell(by_shell))];
    let speak = "for topic in rust python shell; do millstream-sync publish $topic hello; done";
    run("d", shell(speak));
    let report = streams.wait().await.unwrap_err();
    assert!(report.to_string().contains(" wait for each other in a circle: "), "{report}");
    for task in tasks {
        let outcome = task.outcome().await;
        assert_eq!(
            (outcome.kind, outcome.whiteboard().as_str()),
            (OutcomeKind::Failed, "hello\n"),
            "{outcome}"
        );
        assert!(outcome.stderr().contains(" has 1 value and gets no more: "), "{outcome}");
    }
}

#[tokio::test]
async fn an_expected_failure_breaks_nobody() {
    let (streams, _results) = open_with(|builder| builder);
    let waiting = streams.get("a").unwrap().run_bg(shell("echo up; millstream-sync barrier met 2"));
    waiting.ready(millstream::Ready::log("up")).await.unwrap();
    let failed = streams.get("b").unwrap().run_fg(shell("exit 7").expect_failure()).await.unwrap();
    assert_eq!(failed.kind, OutcomeKind::Failed, "{failed}");
    streams.get("b").unwrap().run_bg(shell("millstream-sync barrier met 2"));
    streams.wait().await.unwrap();
    assert!(waiting.outcome().await.passed());
}

#[tokio::test]
async fn a_teardown_meets_the_peer_after_a_failure() {
    let (streams, _results) = open_with(|builder| builder);
    let failing = shell("exit 3")
        .setup("millstream-sync barrier setup 2")
        .teardown("millstream-sync barrier finished 2 --timeout 100");
    let failing = streams.get("a").unwrap().run_bg(failing);
    let peer =
        shell("set -e; millstream-sync barrier setup 2; millstream-sync barrier finished 2 --timeout 100");
    let peer = streams.get("b").unwrap().run_bg(peer);
    let report = streams.wait().await.unwrap_err();
    assert_eq!(report.count(), 1, "{report}");
    let failed = failing.outcome().await;
    assert_eq!(
        (failed.kind, failed.phase, failed.exit_code()),
        (OutcomeKind::Failed, Some(Phase::Run), Some(3))
    );
    assert!(peer.outcome().await.passed(), "{}", peer.outcome().await);
}
