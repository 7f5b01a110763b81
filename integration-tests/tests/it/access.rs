//! Who gets in: nobody without a certificate of the lab's authority, and an operator only looks.

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use millstream::{OutcomeKind, exec};
use millstream_integration_tests::{
    agent::Agent,
    authority::{Authority, Certificate},
    lab::Lab,
    tools,
    wait::wait_until_true,
};

use crate::support::{SOON, Ticker, open, open_with};

/// What comes of a block that somebody with this certificate tries to run.
fn attempt(lab: &Lab, test: &str, certificate: &Certificate, mark: &Path) -> String {
    lab.controller()
        .block_on(|| async {
            let streams = open_with(lab, test, certificate)?;
            let task = streams.get("one")?.run_bg(exec(["touch", tools::text(mark)]));
            let outcome = task.outcome().await;
            assert_eq!(outcome.kind, OutcomeKind::Error, "{outcome}");
            streams.close().await?;
            millstream::Result::<String>::Ok(outcome.to_string())
        })
        .unwrap()
}

#[test]
#[ignore = "needs root: integration-tests/run"]
fn a_controller_of_another_authority_runs_nothing_and_is_told_why() {
    let lab = Lab::new(&["one"]);
    let agent = lab.start_agent("one");
    let mark = lab.directory().join("mark");
    let other = Authority::create(&lab.directory().join("other"));

    // It trusts the lab's authority but was certified by another one.
    let stranger =
        Certificate { authority: lab.authority().controller("x").authority, ..other.controller("stranger") };
    let told = attempt(&lab, "stranger", &stranger, &mark);
    assert!(told.contains("certificate") && told.contains("10.77.0.2"), "{told}");

    // It trusts the other authority only: the agent is the stranger.
    let told = attempt(&lab, "mistrustful", &other.controller("mistrustful"), &mark);
    assert!(told.contains("certificate") && told.contains("10.77.0.2"), "{told}");
    assert!(!mark.exists());
    assert_eq!(agent.session_directories().len(), 0, "{}", agent.log());
}

#[test]
#[ignore = "needs root: integration-tests/run"]
fn an_operator_may_look_but_not_run() {
    let lab = Lab::new(&["one"]);
    let agent = lab.start_agent("one");
    let mark = lab.directory().join("mark");
    let told = attempt(&lab, "operator", &lab.authority().operator("olga"), &mark);
    assert!(told.contains("operator") && told.contains("olga"), "{told}");
    let told = attempt(&lab, "agent-as-client", &lab.authority().agent("mallory", "10.77.0.9"), &mark);
    assert!(told.contains("agent"), "{told}");
    assert!(!mark.exists());
    assert_eq!(agent.session_directories().len(), 0);
}

#[test]
#[ignore = "needs root: integration-tests/run"]
fn a_revoked_controller_is_cut_off_at_once_and_others_go_on() {
    let lab = Lab::new(&["one"]);
    let agent = lab.start_agent("one");
    let (alice, bob) = (lab.authority().controller("alice"), lab.authority().controller("bob"));
    let (of_alice, of_bob) =
        (Ticker::new(&lab.directory().join("alice")), Ticker::new(&lab.directory().join("bob")));
    let mark = lab.directory().join("mark");
    lab.controller()
        .block_on(|| async {
            let (streams, others) = (open_with(&lab, "alice", &alice)?, open_with(&lab, "bob", &bob)?);
            let _task = streams.get("one")?.run_bg(of_alice.block());
            let task = others.get("one")?.run_bg(of_bob.block());
            of_alice.wait_for_more(1);
            of_bob.wait_for_more(1);
            lab.authority().revoke(&alice);
            wait_until_true("the open connections end", SOON, || {
                agent.log().lines().any(|line| {
                    line.contains("connection ended: its certificate is not taken any more")
                        && line.contains("controller/alice")
                        && line.contains("was revoked")
                })
            });
            of_bob.release();
            let outcome = task.outcome().await;
            assert!(outcome.passed(), "{outcome}\n{}", agent.log());
            others.close().await?;
            drop(streams);
            millstream::Result::<()>::Ok(())
        })
        .unwrap();
    assert!(!agent.log().lines().any(|line| line.contains("connection ended") && line.contains("bob")));
    let refused = || agent.log().lines().filter(|line| line.contains("peer sent away")).count();
    let before = refused();
    lab.controller()
        .block_on(|| async {
            let streams = open_with(&lab, "revoked", &alice)?;
            let task = streams.get("one")?.run_bg(exec(["touch", tools::text(&mark)]));
            let outcome = task.outcome().await;
            assert_eq!(outcome.kind, OutcomeKind::Error, "{outcome}");
            // The session that it had before cannot be asked to end any more: that is told, and no failure here.
            let _untidy = streams.close().await;
            millstream::Result::<()>::Ok(())
        })
        .unwrap();
    wait_until_true("the agent says why it refused", SOON, || refused() > before);
    let log = agent.log();
    let last = log.lines().rfind(|line| line.contains("peer sent away")).unwrap();
    assert!(last.contains("certificate was revoked"), "{last}");
    assert!(!mark.exists());
}

#[test]
#[ignore = "needs root and grpcurl (integration-tests/setup): integration-tests/run"]
fn without_a_certificate_nothing_is_answered() {
    let lab = Lab::new(&["one"]);
    let agent = lab.start_agent("one");
    let authority = lab.authority().operator("olga").authority;
    let output = lab.controller().namespace().run(|| {
        let mut command = Command::new(tools::grpcurl());
        command
            .args(["-max-time", "10", "-cacert"])
            .arg(&authority)
            .arg(agent.address().to_string())
            .arg("list");
        tools::output(&mut command)
    });
    assert!(!output.status.success());
    assert!(!tools::both(&output).contains("AgentService"), "{}", tools::both(&output));
}

#[test]
#[ignore = "needs root: integration-tests/run"]
#[expect(clippy::disallowed_methods, reason = "the claim is about real time")]
fn a_silent_or_garbage_peer_is_gone_in_five_seconds() {
    let lab = Lab::new(&["one"]);
    let agent = lab.start_agent("one");
    lab.controller().namespace().run(|| {
        for greeting in [&b""[..], b"GET / HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", &[0; 4096]]
        {
            let mut peer = TcpStream::connect(agent.address()).unwrap();
            peer.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
            let begin = Instant::now();
            // It may be thrown out while it speaks.
            let _told = peer.write_all(greeting);
            let mut answer = Vec::new();
            // The end may come as a reset.
            let _ended = peer.read_to_end(&mut answer);
            assert!(begin.elapsed() < Duration::from_secs(8), "{:?} after {greeting:?}", begin.elapsed());
            assert!(answer.len() < 64, "{answer:?}");
        }
    });
    // And who has a certificate is served as before.
    lab.controller()
        .block_on(|| async {
            let streams = open(&lab, "after-garbage")?;
            streams.get("one")?.run_fg(exec(["true"])).await?;
            streams.close().await?;
            millstream::Result::<()>::Ok(())
        })
        .unwrap();
}

#[test]
#[ignore = "needs root: integration-tests/run"]
fn an_agent_refuses_to_be_open_to_the_network_without_tls() {
    let lab = Lab::new(&["one"]);
    let directory = lab.directory().join("bare");
    std::fs::create_dir(&directory).unwrap();
    let output = Agent::refused(
        &directory,
        &format!("listen: 0.0.0.0:7433\nstate_directory: {}\n", directory.display()),
    );
    assert!(output.contains("agent.yaml:1"), "{output}");
    assert!(output.contains("tls"), "{output}");
}
