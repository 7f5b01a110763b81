//! The host in an operator's hands: draining it, and a host that could not be cleaned.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use millstream::shell;
use millstream_integration_tests::{agent::Agent, lab::Lab, processes, tools, wait::wait_until_true};

use crate::support::{SOON, Ticker, open};

/// One of the agent's commands, on its host.
fn say(agent: &Agent, words: &[&str]) -> Output {
    let mut command = Command::new(tools::agent_program());
    tools::output(command.args(words).arg("--socket").arg(agent.socket()))
}

fn said(agent: &Agent, words: &[&str]) -> String {
    let output = say(agent, words);
    assert!(output.status.success(), "{words:?}: {}\n{}", tools::both(&output), agent.log());
    tools::both(&output)
}

fn status(agent: &Agent) -> serde_json::Value {
    let mut command = Command::new(tools::agent_program());
    serde_json::from_str(&tools::run(command.args(["status", "--json"]).arg(agent.socket()))).unwrap()
}

#[test]
#[ignore = "needs root: integration-tests/run"]
fn a_host_is_drained_while_its_tasks_end_and_taken_back() {
    let lab = Lab::new(&["one"]);
    let mut agent = lab.start_agent("one");
    let ticker = Ticker::new(&lab.directory().join("ticker"));
    lab.controller()
        .block_on(|| async {
            let streams = open(&lab, "before")?;
            let task = streams.get("one")?.run_bg(ticker.block());
            ticker.wait_for_more(3);
            assert_eq!(
                said(&agent, &["drain", "--reason", "new memory"]),
                "draining: takes nothing new; 1 session to go\n"
            );
            let late = open(&lab, "late")?;
            let outcome = late.get("one")?.run_bg(shell("true")).outcome().await;
            let told = outcome.to_string();
            assert!(told.contains("draining since ") && told.contains("new memory"), "{told}");
            late.close().await?;
            agent.terminate();
            agent.restart(lab.host("one").namespace());
            assert_eq!(status(&agent)["state"], "draining");
            let impatient = say(&agent, &["drain", "--wait", "--timeout", "10ms", "--reason", "new memory"]);
            assert!(!impatient.status.success());
            assert!(
                tools::both(&impatient).contains("after 10ms there is still 1 session to go"),
                "{}",
                tools::both(&impatient)
            );
            std::thread::scope(|scope| {
                let waiting = scope.spawn(|| said(&agent, &["drain", "--wait", "--timeout", "60s"]));
                ticker.release();
                let ended = || async {
                    let outcome = task.outcome().await;
                    assert!(outcome.passed(), "{outcome}");
                    streams.close().await
                };
                lab.controller().block_on(ended)?;
                assert!(waiting.join().unwrap().ends_with("drained: no session runs\n"));
                millstream::Result::<()>::Ok(())
            })?;
            assert_eq!(said(&agent, &["undrain"]), "takes sessions again\n");
            let streams = open(&lab, "after")?;
            streams.get("one")?.run_fg(shell("true")).await?;
            streams.close().await?;
            millstream::Result::<()>::Ok(())
        })
        .unwrap();
}

/// A control group that freezes: what is in it takes no signal, not even the one that kills, until it is thawed.
struct Freezer {
    mount: PathBuf,
    group: PathBuf,
}

impl Freezer {
    fn new(directory: &Path) -> Self {
        let mount = directory.join("freezer");
        fs::create_dir(&mount).unwrap();
        tools::run(Command::new("mount").args(["-t", "cgroup", "-o", "freezer", "freezer"]).arg(&mount));
        let group = mount.join(format!("millstream-test-{}", std::process::id()));
        fs::create_dir(&group).unwrap();
        Self { mount, group }
    }

    fn set(&self, state: &str) {
        fs::write(self.group.join("freezer.state"), state).unwrap();
        wait_until_true("the group freezes or thaws", SOON, || {
            fs::read_to_string(self.group.join("freezer.state")).unwrap().trim() == state
        });
    }
}

impl Drop for Freezer {
    fn drop(&mut self) {
        let _thawed = fs::write(self.group.join("freezer.state"), "THAWED");
        let group = &self.group;
        wait_until_true("nobody is left in the freezer", SOON, || fs::remove_dir(group).is_ok());
        tools::run(Command::new("umount").arg(&self.mount));
    }
}

#[test]
#[ignore = "needs root and the freezer of control groups of version 1: integration-tests/run"]
fn a_host_with_a_process_that_cannot_be_killed_is_not_reserved_until_it_is_gone() {
    let lab = Lab::new(&["one"]);
    let agent = lab.start_agent("one");
    let freezer = Freezer::new(lab.directory());
    lab.controller()
        .block_on(|| async {
            let streams = open(&lab, "frozen")?;
            // Frozen before it has become its program, it would still be called as the shell is.
            let script = format!(
                "sleep 54321098 &\nuntil grep -q sleep /proc/$!/comm; do :; done\necho $! >{}/cgroup.procs\necho up\nwait",
                freezer.group.display()
            );
            let task = streams.get("one")?.run_bg(shell(script).name("icy"));
            task.ready(millstream::Ready::log("up")).await?;
            freezer.set("FROZEN");
            let outcome = task.stop().await;
            assert!(outcome.to_string().contains("could not be ended"), "{outcome}");
            // It is named in the error of closing as well.
            let closed = streams.close().await.unwrap_err().to_string();
            assert!(closed.contains("sleep 54321098"), "{closed}");
            millstream::Result::<()>::Ok(())
        })
        .unwrap();
    let pid = processes::with_argument("54321098")[0];
    let seen = status(&agent);
    assert_eq!((&seen["state"], &seen["survivors"][0]["pid"]), (&"unclean".into(), &pid.into()), "{seen:#}");
    assert_eq!(seen["survivors"][0]["block"], "one/icy", "{seen:#}");
    assert_eq!(seen["survivors"][0]["owner"], "millstream://controller/frozen");

    let reserve = || {
        let request = r#"{"session_id":"01900000-0000-7000-8000-000000000000","secret":"00000000000000000000000000000001",
            "protocol_min":1,"protocol_max":1,"client":"a benchmark","exclusive":true}"#;
        let mut command = Command::new(tools::grpcurl());
        command.args(["-max-time", "20", "-plaintext", "-authority", "localhost", "-d", request, "-unix"]);
        tools::both(&tools::output(command.arg(agent.socket()).arg("millstream.v1.AgentService/OpenSession")))
    };
    let refused = reserve();
    assert!(refused.contains(&format!("process {pid} `sleep 54321098` of one/icy")), "{refused}");
    let left = say(&agent, &["clean"]);
    assert!(
        !left.status.success() && tools::both(&left).contains(&format!("process {pid}")),
        "{}",
        tools::both(&left)
    );
    freezer.set("THAWED");
    wait_until_true("the agent learns of its end", SOON, || status(&agent)["state"] == "ready");
    let reserved = reserve();
    assert!(reserved.contains("\"epoch\""), "{reserved}");
}

#[test]
#[ignore = "needs root: integration-tests/run"]
fn a_watched_agent_that_goes_away_is_shown_with_the_reason_until_it_is_back() {
    let lab = Lab::new(&["one"]);
    let mut agent = lab.start_agent("one");
    let mut command = Command::new(tools::agent_program());
    command.args(["status", "--watch"]).arg(agent.socket()).stdout(Stdio::piped());
    let mut watching = command.spawn().unwrap();
    let mut lines = BufReader::new(watching.stdout.take().unwrap()).lines();
    let mut next_with = |word: &str| {
        // Every change is a line: those of the same kind may be told more than once.
        let mut told = lines.by_ref().map(|line| line.unwrap());
        let mut told = told.by_ref().inspect(|line| assert!(!line.contains('\x1b'), "{line:?}"));
        told.find(|line| line.contains(word)).unwrap_or_else(|| panic!("nothing is said of `{word}`"))
    };
    assert!(next_with("ready").starts_with(tools::text(&agent.socket())));
    assert!(said(&agent, &["drain", "--reason", "a look"]).starts_with("draining"));
    assert!(next_with("draining").contains("by local user 0: a look"));
    agent.kill();
    assert!(next_with("unreachable").contains("unreachable: "));
    agent.restart(lab.host("one").namespace());
    next_with("draining");
    assert!(said(&agent, &["undrain"]).starts_with("takes sessions"));
    next_with("ready");
    watching.kill().unwrap();
    watching.wait().unwrap();
}
