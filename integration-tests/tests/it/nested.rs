//! Streams inside blocks, across hosts: what a block on one host runs on another goes through the controller.

use millstream::{
    BlockContext, BlockResult, Streams,
    blocking::{BlockingStream as _, BlockingStreams as _},
    shell,
};
use millstream_integration_tests::lab::Lab;

use crate::support::open;

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
