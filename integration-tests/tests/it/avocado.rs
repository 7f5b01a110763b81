//! Tests of Avocado as blocks, on hosts that have it: what their own runner is needed for elsewhere, the harness does here.

use std::{env, sync::Arc, time::Duration};

use millstream::{Block, Outcome, OutcomeKind, Phase, Result, Streams, reference};
use millstream_integration_tests::{agent::Agent, lab::Lab, tools};

use crate::support::open;

const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/avocado/net_perf.py");

/// A lab whose hosts have Avocado for their Python 3.
fn lab(hosts: &[&str]) -> (Lab, Vec<Agent>) {
    let programs = tools::avocado_programs();
    let search_path = env::join_paths([programs.as_path(), "/usr/bin".as_ref(), "/bin".as_ref()]).unwrap();
    let lab = Lab::new(hosts);
    let agents = hosts.iter().map(|host| lab.start_agent_with_path(host, search_path.as_ref())).collect();
    (lab, agents)
}

fn named(inside: &str) -> Block {
    reference(format!("{FILE}:{inside}"))
}

#[test]
#[ignore = "needs root and Avocado: integration-tests/run"]
fn tests_of_avocado_measure_between_hosts() {
    let (lab, _agents) = lab(&["server", "client-1", "client-2"]);
    let measure = || async {
        let streams = open(&lab, "multi_netperf")?;
        let server = streams.get("server")?;
        let serving = server.run_bg(named("NetServer.test").param("parties", 3));
        // The file alone names the client: what is disabled in it is found only by its name.
        let client =
            reference(FILE).param("parties", 3).param("bytes", 1 << 20).param("server", server.host());
        for outcome in streams.select(r"client-\d")?.run_fg(client).await? {
            assert_eq!((outcome.phases.len(), outcome.stderr().as_str()), (3, ""), "{outcome}");
        }
        let outcome = serving.wait().await?;
        assert_eq!(
            (outcome.whiteboard().as_str(), outcome.stdout().as_str()),
            ("2097152 bytes\n", "listener closed\n")
        );
        let phases: Vec<Phase> = outcome.phases.iter().map(|end| end.phase).collect();
        assert_eq!(phases, [Phase::Setup, Phase::Run, Phase::Teardown]);
        streams.close().await
    };
    lab.controller().block_on(measure).unwrap();
}

#[test]
#[ignore = "needs root and Avocado: integration-tests/run"]
fn tests_of_avocado_fail_are_cancelled_and_time_out_as_blocks_do() {
    let (lab, _agents) = lab(&["one"]);
    let run = async |streams: &Streams, block: Block| -> Result<Arc<Outcome>> {
        // Otherwise what waits at a barrier would be told that somebody has failed.
        Ok(streams.get("one")?.run_bg(block.allow_failure()).outcome().await)
    };
    let all = || async {
        let streams = open(&lab, "others")?;
        let failed = run(&streams, named("Other.test_fails")).await?;
        assert_eq!((failed.kind, failed.phase), (OutcomeKind::Failed, Some(Phase::Run)), "{failed}");
        assert_eq!(failed.detail, "Other.test_fails raised TestFail: no such route (net_perf.py:62)");
        let cancelled = run(&streams, named("Other.test_cancels")).await?;
        assert!(cancelled.passed() && cancelled.detail == "skipped: no such card", "{cancelled}");
        for method in ["test_sleeps", "test_waits"] {
            let late =
                run(&streams, named(&format!("Other.{method}")).timeout(Duration::from_secs(1))).await?;
            assert_eq!((late.kind, late.phase), (OutcomeKind::TimedOut, Some(Phase::Run)), "{late}");
            let told = format!("Other.{method} raised Terminated: the block was asked to end (signal 15)");
            assert!(late.detail.contains(&told), "{late}");
            let last = late.phases.last().map(|end| (end.phase, end.outcome));
            assert_eq!(last, Some((Phase::Teardown, OutcomeKind::Passed)), "{late}");
            assert!(late.stdout().starts_with("torn down in /"), "{}", late.stdout());
        }
        streams.close().await
    };
    lab.controller().block_on(all).unwrap();
}
