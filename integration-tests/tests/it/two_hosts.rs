//! The whole way: two hosts with the real agent, iperf3 from the distribution as server and client, the controller on a
//! third, one test with barriers, and the report read back.

use millstream::{Result, shell};
use millstream_integration_tests::lab::Lab;

use crate::support::open;

/// Starts the server, tells that it listens by entering `setup`, and ends it when the client is done.
const SERVER: &str = r#"
set -e
mkfifo lines
iperf3 --server --forceflush >lines 2>&1 &
server=$!
exec 3<lines
while read -r line <&3; do
    echo "$line"
    case "$line" in *listening*) break ;; esac
done
cat <&3 &
millstream-sync barrier setup 2
millstream-sync barrier finished 2
kill "$server"
wait "$server" || true
"#;

const CLIENT: &str = r#"
set -e
millstream-sync barrier setup 2
iperf3 --client "$SERVER" --time 2 --json >"$MILLSTREAM_OUTPUT/iperf3.json"
millstream-sync barrier finished 2
echo "$SERVER" >"$MILLSTREAM_WHITEBOARD"
"#;

#[test]
#[ignore = "needs root and iperf3: integration-tests/run"]
fn iperf3_runs_between_two_hosts_held_by_barriers() {
    let lab = Lab::new(&["server", "client"]);
    let _agents = lab.start_agents();
    let server_address = lab.host("server").address().to_string();
    lab.controller()
        .block_on(|| async {
            let streams = open(&lab, "iperf3")?;
            let serving = streams.get("server")?.run_bg(shell(SERVER).name("iperf3-server"));
            let block = shell(CLIENT).name("iperf3-client").env("SERVER", &server_address);
            let outcome = streams.get("client")?.run_fg(block).await?;
            serving.wait().await?;

            assert_eq!(outcome.whiteboard().trim(), server_address);
            let report = std::fs::read_to_string(outcome.data().join("iperf3.json")).unwrap();
            let report: serde_json::Value = serde_json::from_str(&report).unwrap();
            assert_eq!(report["start"]["connected"][0]["remote_host"], server_address.as_str());
            let received = report["end"]["sum_received"]["bytes"].as_u64().unwrap();
            assert!(received > 1_000_000, "{received} bytes in 2 s");

            streams.wait().await?;
            let results = streams.results_dir().to_path_buf();
            streams.close().await?;
            let test: serde_json::Value =
                serde_json::from_slice(&std::fs::read(results.join("test.json")).unwrap()).unwrap();
            let barriers = test["barriers"].as_array().unwrap();
            let names: Vec<_> = barriers.iter().map(|barrier| barrier["name"].as_str().unwrap()).collect();
            assert_eq!(names, ["setup", "finished"], "{test:#}");
            Result::<()>::Ok(())
        })
        .unwrap();
}
