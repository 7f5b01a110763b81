//! Certificates that renew themselves, and what the log and the status say of them.

use std::{
    fs,
    path::Path,
    process::{Child, Command, Stdio},
};

use millstream_integration_tests::{
    agent::Agent,
    lab::{Host, Lab},
    tools,
    wait::{wait_until, wait_until_true},
};

use crate::support::{SOON, Ticker, open};

/// `pki serve`, as an administrator runs it. Dropping it kills it.
struct AuthorityServer {
    child: Child,
    log: std::path::PathBuf,
}

impl AuthorityServer {
    fn start(lab: &Lab) -> Self {
        let log = lab.directory().join("pki.log");
        let file = fs::File::create(&log).unwrap();
        let mut command = Command::new(tools::agent_program());
        let address = lab.controller().address().to_string();
        command
            .args(["pki", "serve", "--address", &address, "--listen", &format!("{address}:7434"), "--dir"])
            .arg(lab.directory().join("authority"))
            .stdin(Stdio::null())
            .stderr(file);
        let child = lab.controller().namespace().spawn(&mut command).unwrap();
        let started = Self { child, log };
        wait_until_true("the authority listens", SOON, || {
            started.log().contains("renewing certificates of agents")
        });
        started
    }

    fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }
}

impl Drop for AuthorityServer {
    fn drop(&mut self) {
        let _gone = self.child.kill();
        let _reaped = self.child.wait();
    }
}

/// An agent whose certificate lives for 20 s.
fn start_agent(lab: &Lab, host: &Host) -> Agent {
    let directory = lab.directory().join(host.name());
    let authority = lab.directory().join("authority");
    let mut command = Command::new(tools::agent_program());
    command.args(["pki", "issue", "--role", "agent", "--valid", "20s", "--name", host.name(), "--address"]);
    tools::run(command.arg(host.address().to_string()).arg("--dir").arg(&authority));
    let path = |name: String| authority.join(name).display().to_string();
    let tls = format!(
        "tls:\n  authority: {}\n  certificate: {}\n  key: {}\n  renew: {}:7434\n",
        path("ca.pem".to_owned()),
        path(format!("agent-{}.pem", host.name())),
        path(format!("agent-{}.key", host.name())),
        lab.controller().address(),
    );
    Agent::start_in(host.namespace(), host.address(), &directory, &tls)
}

fn count(log: &str, what: &str) -> usize {
    log.lines().filter(|line| line.contains(what)).count()
}

fn status(agent: &Agent) -> String {
    tools::run(Command::new(tools::agent_program()).arg("status").arg(agent.socket()))
}

#[test]
#[ignore = "needs root: integration-tests/run"]
fn an_agent_renews_its_certificate_while_a_block_runs_and_tells_when_it_cannot() {
    let lab = Lab::new(&["one"]);
    let server = AuthorityServer::start(&lab);
    let agent = start_agent(&lab, lab.host("one"));
    assert!(status(&agent).contains("millstream://agent/one, until "), "{}", status(&agent));
    let ticker = Ticker::new(&lab.directory().join("ticker"));
    lab.controller()
        .block_on(|| async {
            let streams = open(&lab, "renewed")?;
            let task = streams.get("one")?.run_bg(ticker.block());
            ticker.wait_for_more(1);
            // Each lives 20 s: at the second renewal the first certificate is over.
            for times in 1..=2 {
                wait_until("the certificate is renewed", SOON, || {
                    (count(&agent.log(), "certificate renewed") >= times).then_some(())
                });
            }
            ticker.release();
            let outcome = task.wait().await?;
            ticker.assert_complete(&outcome.stdout());
            // And whoever comes now is shown the new one.
            streams.close().await?;
            let streams = open(&lab, "afterwards")?;
            streams.get("one")?.run_fg(millstream::exec(["true"])).await?;
            streams.close().await
        })
        .unwrap();
    let log = agent.log();
    assert_eq!(count(&log, "resumed=true"), 0, "a connection broke:\n{log}");
    assert!(count(&server.log(), "certificate renewed") >= 2, "{}", server.log());
    assert!(server.log().contains("holder=\"millstream://agent/one\""), "{}", server.log());

    // Nobody is there any more: it says so while there is still time.
    drop(server);
    wait_until_true("the log tells of the failure", SOON, || agent.log().contains("could not be renewed"));
    let log = agent.log();
    let told = log.lines().rfind(|line| line.contains("could not be renewed")).unwrap();
    for part in ["it is still valid for", "connection refused", "pki serve", "10.77.0.1:7434"] {
        assert!(told.contains(part), "{part}: {told}");
    }
    wait_until_true("the status tells it too", SOON, || {
        status(&agent).contains("NOT RENEWED (failed to reach")
    });
    an_expired_one_is_told_and_replaced_by_hand(&lab, &agent);
}

/// As when a host was switched off for too long: whoever dials it is told both times, and one that is issued is taken at once.
fn an_expired_one_is_told_and_replaced_by_hand(lab: &Lab, agent: &Agent) {
    wait_until_true("the log tells that it has expired", SOON, || {
        agent.log().contains("and is not renewed any more") && agent.log().contains("pki issue")
    });
    assert!(status(agent).contains("NOT USABLE: it has expired"), "{}", status(agent));
    let dialled = |test: &str| {
        lab.controller()
            .block_on(|| async {
                let streams = open(lab, test)?;
                let outcome = streams.get("one")?.run_bg(millstream::exec(["true"])).outcome().await;
                streams.close().await.map(|()| outcome)
            })
            .unwrap()
            .to_string()
    };
    let told = dialled("too-late");
    for part in
        ["certificate has expired: it was valid until ", ", and the clock here says ", "issue a new one"]
    {
        assert!(told.contains(part), "{told}");
    }
    let directory = lab.directory().join("authority");
    for file in ["agent-one.pem", "agent-one.key"] {
        fs::remove_file(directory.join(file)).unwrap();
    }
    let mut command = Command::new(tools::agent_program());
    command.args(["pki", "issue", "--role", "agent", "--name", "one", "--address"]);
    tools::run(command.arg(lab.host("one").address().to_string()).arg("--dir").arg(&directory));
    wait_until_true("the new one is taken", SOON, || status(agent).contains(", is renewed at "));
    assert!(dialled("again").contains("passed"), "{}", agent.log());
}

#[test]
#[ignore = "needs root: integration-tests/run"]
fn a_revoked_agent_is_not_renewed_and_controllers_with_the_list_do_not_dial_it() {
    let lab = Lab::new(&["one"]);
    let server = AuthorityServer::start(&lab);
    let agent = start_agent(&lab, lab.host("one"));
    let authority = lab.directory().join("authority");
    let mut command = Command::new(tools::agent_program());
    tools::run(command.args(["pki", "revoke", "--dir"]).arg(&authority).arg(authority.join("agent-one.pem")));
    wait_until_true("the authority refuses", SOON, || server.log().contains("certificate not renewed"));
    assert!(server.log().contains("agent/one is not taken: it was revoked"), "{}", server.log());
    wait_until_true("the agent tells it", SOON, || agent.log().contains("it was revoked"));

    let with = |list: Option<&Path>, test: &str| {
        let certificate = lab.authority().controller(test);
        let mut yaml = lab.definitions(&certificate);
        if let Some(list) = list {
            yaml += &format!("    revocations: {}\n", list.display());
        }
        let path = lab.directory().join(format!("{test}.yaml"));
        fs::write(&path, yaml).unwrap();
        lab.controller().block_on(|| async {
            let params = millstream::Params::load(&path).unwrap();
            let builder = millstream::Streams::builder(test).params(params).only_given();
            let streams = builder.results_dir(lab.directory().join("results")).open().unwrap();
            let outcome = streams.get("one").unwrap().run_bg(millstream::exec(["true"])).outcome().await;
            let _untidy = streams.close().await;
            outcome.to_string()
        })
    };
    let told = with(Some(&authority.join("revoked.pem")), "careful");
    assert!(told.contains("the other end's certificate was revoked"), "{told}");
}
