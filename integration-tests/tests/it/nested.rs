//! Streams inside blocks, across hosts: what a block on one host runs on another goes through the controller.

use std::time::Duration;

use millstream::{
    BlockContext, BlockResult, OutcomeKind, Params, Reason, Streams, Task,
    blocking::{BlockingStream as _, BlockingStreams as _, BlockingTask as _},
    shell,
};
use millstream_integration_tests::{lab::Lab, processes, wait::wait_until_true};

use crate::support::{SOON, Ticker, open};

const WHERE: &str = "readlink /proc/self/ns/net";

/// Tells where a block of its own runs, on the stream of another host.
#[millstream::block]
fn asks_the_other_host(ctx: &mut BlockContext) -> BlockResult {
    let streams = Streams::open("inner")?;
    let there = streams.get("two")?.run_fg_blocking(shell(WHERE).name("where"))?;
    ctx.whiteboard(there.stdout().trim())?;
    streams.close_blocking()?;
    Ok(())
}

#[test]
#[ignore = "needs root: integration-tests/run"]
fn a_block_on_one_host_runs_a_block_on_another() {
    let lab = Lab::new(&["one", "two"]);
    let _agents = lab.start_agents();
    lab.controller()
        .block_on(|| async {
            let streams = open(&lab, "nested")?;
            let one = streams.get("one")?.run_fg(shell(WHERE)).await?.stdout();
            let two = streams.get("two")?.run_fg(shell(WHERE)).await?.stdout();
            assert_ne!(one, two);
            let outcome = streams.get("one")?.run_fg(asks_the_other_host().may_run_streams()).await?;
            assert_eq!(outcome.whiteboard(), two);
            let inner = outcome.results.join("streams/two/1-where/stdout");
            assert_eq!(std::fs::read_to_string(inner).unwrap(), two);
            streams.close().await?;
            millstream::Result::<()>::Ok(())
        })
        .unwrap();
}

/// Runs a block on the stream of another host for as long as that takes, and hands on what it printed.
#[millstream::block]
fn waits_for_the_other_host(ctx: &mut BlockContext, text: String) -> BlockResult {
    let streams = Streams::open("inner")?;
    let there = streams.get("two")?.run_fg_blocking(shell(text).name("there"))?;
    std::fs::copy(there.stdout_path(), ctx.output_dir().join("stdout"))?;
    streams.close_blocking()?;
    Ok(())
}

#[test]
#[ignore = "needs root: integration-tests/run"]
fn a_cut_under_a_nested_pipe_that_heals_loses_nothing() {
    let lab = Lab::new(&["one", "two"]);
    let agents = lab.start_agents();
    lab.controller()
        .block_on(|| async {
            let streams = open(&lab, "nested-cut")?;
            // The link of the host that the inner block is on, and that of the host that the outer one is on.
            for cut in ["two", "one"] {
                let ticker = Ticker::new(&lab.directory().join(format!("ticker-{cut}")));
                let outer = waits_for_the_other_host(ticker.text()).may_run_streams();
                let task = streams.get("one")?.run_bg(outer);
                ticker.wait_for_more(5);
                lab.cut(cut);
                // Both ends give a silent connection up after 10 s: longer than that, and well within the lease of 30 s.
                ticker.wait_for_more(250);
                lab.heal(cut);
                ticker.wait_for_more(5);
                ticker.release();
                let outcome = task.outcome().await;
                assert!(outcome.passed(), "{cut}: {outcome}\n{}", agents[1].log());
                ticker.assert_complete(&std::fs::read_to_string(outcome.data().join("stdout")).unwrap());
            }
            streams.close().await?;
            millstream::Result::<()>::Ok(())
        })
        .unwrap();
}

/// A number of seconds that nobody else sleeps.
const LONG: &str = "71828182";

/// Runs a block on the stream of another host that only the end of its session ends: its lease is as long as the test.
#[millstream::block]
fn leaves_the_other_host_running(_ctx: &mut BlockContext) -> BlockResult {
    let streams = Streams::builder("inner").lease(Duration::from_secs(3_600)).open()?;
    let there = streams.get("two")?.run_bg(shell(format!("exec sleep {LONG}")).name("there"));
    there.wait_blocking()?;
    Ok(())
}

/// Opens streams with a short lease on the first host, begins the block above there, and waits until its own block runs.
async fn begin_leaving(lab: &Lab, test: &str) -> millstream::Result<(Streams, Task)> {
    let path = lab.directory().join(format!("{test}.yaml"));
    std::fs::write(&path, lab.definitions(&lab.authority().controller(test))).unwrap();
    let builder = Streams::builder(test).params(Params::load(&path)?).lease(Duration::from_secs(5));
    let streams = builder.results_dir(lab.directory().join("results")).open()?;
    let task = streams.get("one")?.run_bg(leaves_the_other_host_running().may_run_streams());
    wait_until_true("the inner block runs", SOON, || !processes::with_argument(LONG).is_empty());
    Ok((streams, task))
}

#[test]
#[ignore = "needs root: integration-tests/run"]
fn what_a_killed_block_has_left_on_another_host_ends_at_once() {
    let lab = Lab::new(&["one", "two"]);
    let agents = lab.start_agents();
    lab.controller()
        .block_on(|| async {
            let (streams, task) = begin_leaving(&lab, "nested-killed").await?;
            let variable = format!("MILLSTREAM_TASK={}", task.id());
            processes::with_variable(&variable).into_iter().for_each(processes::kill);
            let outcome = task.outcome().await;
            assert_eq!((outcome.kind, outcome.signal()), (OutcomeKind::Killed, Some(9)), "{outcome}");
            // The test is open still, and nobody else than the controller knows that nobody wants it any more.
            wait_until_true("the inner block ends", SOON, || processes::with_argument(LONG).is_empty());
            wait_until_true("its session ends", SOON, || agents[1].session_directories().is_empty());
            streams.close().await?;
            millstream::Result::<()>::Ok(())
        })
        .unwrap();
}

#[test]
#[ignore = "needs root: integration-tests/run"]
fn what_a_block_has_left_on_another_host_ends_when_its_own_host_is_lost() {
    let lab = Lab::new(&["one", "two"]);
    let agents = lab.start_agents();
    lab.controller()
        .block_on(|| async {
            let (streams, task) = begin_leaving(&lab, "nested-lost").await?;
            lab.cut("one");
            let outcome = task.outcome().await;
            assert_eq!(
                (outcome.kind, outcome.reason),
                (OutcomeKind::Lost, Reason::LeaseExpired),
                "{outcome}"
            );
            wait_until_true("the inner block ends", SOON, || processes::with_argument(LONG).is_empty());
            wait_until_true("its session ends", SOON, || agents[1].session_directories().is_empty());
            let left = streams.close().await.unwrap_err().to_string();
            assert!(left.contains("could not be asked to end its session"), "{left}");
            assert!(
                !left.contains("two") && !left.contains(&lab.host("two").address().to_string()),
                "{left}"
            );
            millstream::Result::<()>::Ok(())
        })
        .unwrap();
}
