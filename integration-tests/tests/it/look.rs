//! Looking with grpcurl: list, describe and call, over TLS, over plaintext loopback and over the Unix socket; and text
//! that people read is text.

use std::{path::Path, process::Command};

use millstream::shell;
use millstream_integration_tests::{authority::Certificate, lab::Lab, tools};

use crate::support::{Ticker, open};

/// The three things a person does first, on a connection given by `options` and `address`.
fn look(options: &[&str], address: &str) -> String {
    let grpcurl = |verb: &[&str]| {
        let mut command = Command::new(tools::grpcurl());
        tools::run(command.args(["-max-time", "20"]).args(options).arg(address).args(verb))
    };
    let services = grpcurl(&["list"]);
    for service in ["grpc.health.v1.Health", "millstream.v1.AgentService"] {
        assert!(services.contains(service), "{services}");
    }
    let described = grpcurl(&["describe", "millstream.v1.AgentService.GetStatus"]);
    assert!(described.contains("What runs here and who runs it"), "{described}");
    let health = grpcurl(&["grpc.health.v1.Health/Check"]);
    assert!(health.contains("SERVING"), "{health}");
    grpcurl(&["millstream.v1.AgentService/GetStatus"])
}

fn tls_options(certificate: &Certificate) -> Vec<&str> {
    vec![
        "-cacert",
        tools::text(&certificate.authority),
        "-cert",
        tools::text(&certificate.certificate),
        "-key",
        tools::text(&certificate.key),
    ]
}

#[test]
#[ignore = "needs root and grpcurl (integration-tests/setup): integration-tests/run"]
fn an_operator_sees_over_tls_and_over_the_unix_socket_what_runs() {
    let lab = Lab::new(&["one"]);
    let agent = lab.start_agent("one");
    let ticker = Ticker::new(&lab.directory().join("ticker"));
    let operator = lab.authority().operator("olga");
    lab.controller()
        .block_on(|| async {
            let streams = open(&lab, "watched")?;
            let task = streams.get("one")?.run_bg(ticker.block());
            ticker.wait_for_more(3);
            let over_tls = look(&tls_options(&operator), &agent.address().to_string());
            let over_socket =
                look(&["-plaintext", "-authority", "localhost", "-unix"], tools::text(&agent.socket()));
            for status in [&over_tls, &over_socket] {
                let status: serde_json::Value = serde_json::from_str(status).unwrap();
                let session = &status["status"]["sessions"][0];
                assert!(session["owner"].as_str().unwrap().contains("watched"), "{status:#}");
                let task = &session["tasks"][0];
                assert_eq!(task["block"], "ticker", "{status:#}");
                assert_eq!(task["state"], "TASK_STATE_RUNNING", "{status:#}");
                assert!(task["lastLine"].as_str().unwrap().starts_with("line "), "{status:#}");
            }
            ticker.release();
            task.wait().await?;
            streams.close().await?;
            millstream::Result::<()>::Ok(())
        })
        .unwrap();
}

#[test]
#[ignore = "needs root and grpcurl (integration-tests/setup): integration-tests/run"]
fn a_loopback_agent_answers_in_plaintext() {
    let lab = Lab::new(&["one"]);
    let agent = lab.start_loopback_agent("one");
    let status = lab
        .host("one")
        .namespace()
        .run(|| look(&["-plaintext"], &format!("127.0.0.1:{}", agent.address().port())));
    assert!(status.contains("AGENT_STATE_READY"), "{status}");
}

#[test]
#[ignore = "needs grpcurl (integration-tests/setup): integration-tests/run"]
fn a_person_sees_a_waiting_barrier_and_takes_part_in_it() {
    let directory = tempfile::tempdir().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime
        .block_on(async {
            let streams = millstream::Streams::builder("by-hand")
                .results_dir(directory.path().join("results"))
                .open()?;
            let address = streams.listen("127.0.0.1:0".parse().unwrap()).await.unwrap().to_string();
            let task = streams
                .get("local")?
                .run_bg(shell("echo waiting\nmillstream-sync barrier meet 2").name("patient"));
            task.ready(millstream::Ready::log("waiting")).await?;
            let grpcurl = |options: &[&str]| {
                let mut command = Command::new(tools::grpcurl());
                tools::run(command.args(["-max-time", "20", "-plaintext"]).args(options))
            };
            millstream_integration_tests::wait::wait_until_true(
                "the party enters",
                crate::support::SOON,
                || grpcurl(&[&address, "millstream.v1.SyncService/ListBarriers"]).contains("patient"),
            );
            assert!(grpcurl(&[&address, "list"]).contains("millstream.v1.SyncService"));
            let entered = grpcurl(&[
                "-d",
                r#"{"name":"meet","parties":2}"#,
                &address,
                "millstream.v1.SyncService/Enter",
            ]);
            assert!(entered.contains("by hand"), "{entered}");
            task.wait().await?;
            streams.close().await?;
            millstream::Result::<()>::Ok(())
        })
        .unwrap();
    assert!(Path::new(directory.path()).exists());
}

#[test]
#[ignore = "needs root and grpcurl (integration-tests/setup): integration-tests/run"]
fn a_controller_of_another_version_is_told_which_side_to_update() {
    let lab = Lab::new(&["one"]);
    let agent = lab.start_agent("one");
    let request = r#"{"session_id":"01900000-0000-7000-8000-000000000000","secret":"00000000000000000000000000000001",
        "protocol_min":99,"protocol_max":99,"version":"99.0.0","client":"a test of tomorrow"}"#;
    let mut command = Command::new(tools::grpcurl());
    command.args(["-max-time", "20", "-plaintext", "-authority", "localhost", "-d", request, "-unix"]);
    let output = tools::output(command.arg(agent.socket()).arg("millstream.v1.AgentService/OpenSession"));
    let told = tools::both(&output);
    assert!(!output.status.success(), "{told}");
    assert!(told.contains("FailedPrecondition"), "{told}");
    assert!(told.contains("99") && told.contains("update the agent"), "{told}");
}
