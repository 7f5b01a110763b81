//! Barriers across hosts: when a party dies, everybody who waits is told at once, and by whom.

use std::time::{Duration, Instant};

use millstream::shell;
use millstream_integration_tests::lab::Lab;

use crate::support::open;

#[test]
#[ignore = "needs root: integration-tests/run"]
#[expect(clippy::disallowed_methods, reason = "the claim is about real time")]
fn the_death_of_a_party_is_told_at_once_and_by_name() {
    let lab = Lab::new(&["server", "client"]);
    let _agents = lab.start_agents();
    lab.controller()
        .block_on(|| async {
            let streams = open(&lab, "party-dies")?;
            let waiting = streams
                .get("client")?
                .run_bg(shell("echo waiting\nmillstream-sync barrier meet 2 --timeout 60").name("patient"));
            waiting.ready(millstream::Ready::log("waiting")).await?;
            let begin = Instant::now();
            let dying = streams
                .get("server")?
                .run_bg(shell("echo 'no such interface' >&2\nexit 3").name("netserver"));
            let outcome = waiting.outcome().await;
            let waited = begin.elapsed();
            assert!(waited < Duration::from_secs(10), "{waited:?}");
            assert!(!outcome.passed());
            let told = outcome.stderr();
            for word in ["meet", "1-netserver", "server", "exit code 3"] {
                assert!(told.contains(word), "`{word}` is missing in: {told}");
            }
            assert_eq!(dying.outcome().await.exit_code(), Some(3));
            streams.close().await?;
            millstream::Result::<()>::Ok(())
        })
        .unwrap();
}

#[test]
#[ignore = "needs root: integration-tests/run"]
fn values_and_payloads_cross_hosts() {
    let lab = Lab::new(&["server", "client"]);
    let _agents = lab.start_agents();
    lab.controller()
        .block_on(|| async {
            let streams = open(&lab, "topics")?;
            let publishing = streams.get("server")?.run_bg(
                shell("millstream-sync publish port 5201\nmillstream-sync barrier setup 3").name("publisher"),
            );
            let reading = streams.get("client")?.run_bg(
                shell(
                    "millstream-sync wait port >\"$MILLSTREAM_WHITEBOARD\"\nmillstream-sync barrier setup 3",
                )
                .name("reader"),
            );
            streams.barrier("setup", 3).await?;
            publishing.wait().await?;
            assert!(reading.wait().await?.whiteboard().contains("5201"));
            streams.close().await?;
            millstream::Result::<()>::Ok(())
        })
        .unwrap();
}
