//! Crashes and cuts: the agent killed, the link cut, the controller killed. What runs goes on as long as somebody may come
//! back for it, nothing is lost, and nothing stays when nobody does.

use std::{
    io::{BufRead as _, BufReader},
    path::PathBuf,
    process::{Command, Stdio},
    time::Duration,
};

use millstream::{Ready, Result, shell};
use millstream_integration_tests::{lab::Lab, processes, tools, wait::wait_until_true};

use crate::support::{SOON, Ticker, open};

#[test]
#[ignore = "needs root: integration-tests/run"]
fn a_block_outlives_its_agent_and_the_restarted_agent_finds_it() {
    let lab = Lab::new(&["one"]);
    let mut agent = lab.start_agent("one");
    let ticker = Ticker::new(&lab.directory().join("ticker"));
    lab.controller()
        .block_on(|| async {
            let streams = open(&lab, "agent-killed")?;
            let task = streams.get("one")?.run_bg(ticker.block());
            ticker.wait_for_more(5);
            agent.kill();
            ticker.wait_for_more(20);
            agent.restart(lab.host("one").namespace());
            ticker.wait_for_more(20);
            ticker.release();
            let outcome = task.outcome().await;
            assert!(outcome.passed(), "{outcome}\n{}", agent.log());
            ticker.assert_complete(&outcome.stdout());
            streams.close().await?;
            millstream::Result::<()>::Ok(())
        })
        .unwrap();
    assert_eq!(agent.session_directories(), Vec::<std::path::PathBuf>::new());
}

#[test]
#[ignore = "needs root: integration-tests/run"]
fn a_link_that_heals_within_the_lease_loses_nothing() {
    let lab = Lab::new(&["one"]);
    let agent = lab.start_agent("one");
    let ticker = Ticker::new(&lab.directory().join("ticker"));
    lab.controller()
        .block_on(|| async {
            let streams = open(&lab, "link-cut")?;
            let task = streams.get("one")?.run_bg(ticker.block());
            ticker.wait_for_more(5);
            lab.cut("one");
            // Both ends give a silent connection up after 10 s: longer than that, and well within the lease of 30 s.
            ticker.wait_for_more(250);
            lab.heal("one");
            ticker.wait_for_more(5);
            ticker.release();
            let outcome = task.outcome().await;
            assert!(outcome.passed(), "{outcome}\n{}", agent.log());
            ticker.assert_complete(&outcome.stdout());
            streams.close().await?;
            millstream::Result::<()>::Ok(())
        })
        .unwrap();
}

#[test]
#[ignore = "needs root: integration-tests/run"]
fn nothing_is_left_when_a_killed_controller_does_not_come_back() {
    let lab = Lab::new(&["one"]);
    let agent = lab.start_agent("one");
    let definitions = lab.directory().join("lab.yaml");
    std::fs::write(&definitions, lab.definitions(&lab.authority().controller("victim"))).unwrap();
    let mut command = Command::new(tools::beside_this_program("controller-under-test"));
    command.arg(&definitions).arg(lab.directory().join("results")).args([
        "--lease-ms",
        "2000",
        "one",
        // A daemon as well: it is in nobody's process group.
        "(setsid sleep 98765432 >/dev/null 2>&1 &)\necho begun\nexec sleep 87654321",
    ]);
    let mut controller = lab.controller().namespace().spawn(command.stdout(Stdio::piped())).unwrap();
    let mut lines = BufReader::new(controller.stdout.take().unwrap()).lines();
    let begun = lines.by_ref().map(|line| line.unwrap()).find(|line| line.contains("begun"));
    assert!(begun.is_some(), "the block has not begun\n{}", agent.log());
    let left = || [processes::with_argument("98765432"), processes::with_argument("87654321")].concat();
    wait_until_true("both processes run", SOON, || left().len() >= 2);

    controller.kill().unwrap();
    controller.wait().unwrap();
    wait_until_true("the lease ends what the controller has left", SOON, || left().is_empty());
    // The results are kept a while for a controller that comes back too late; their supervisor ends.
    wait_until_true("the supervisor ends", SOON, || agent.supervisors().is_empty());
    let sockets = Command::new("find").arg(agent.state()).args(["-type", "s"]).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&sockets.stdout), "", "sockets of blocks or supervisors stay");
}

#[test]
#[ignore = "needs root: integration-tests/run"]
fn a_supervisor_ends_its_tree_by_itself_when_agent_and_controller_are_gone() {
    let lab = Lab::new(&["one"]);
    let mut agent = lab.start_agent("one");
    let ticker = Ticker::new(&lab.directory().join("ticker"));
    let left = lab
        .controller()
        .block_on(|| async {
            let streams = open(&lab, "all-gone")?;
            let task = streams.get("one")?.run_bg(ticker.block());
            ticker.wait_for_more(2);
            let variable = format!("MILLSTREAM_TASK={}", task.id());
            let supervisors = agent.supervisors();
            assert!(!supervisors.is_empty());
            agent.kill();
            // Dropping tells that it could not ask the host to clean up; the lease does it.
            drop(streams);
            Result::<(String, Vec<u32>)>::Ok((variable, supervisors))
        })
        .unwrap();
    let (variable, supervisors) = left;
    wait_until_true("the lease ends the block", Duration::from_secs(60), || {
        processes::with_variable(&variable).is_empty()
    });
    wait_until_true("the supervisor has nothing left to do", SOON, || {
        !supervisors.iter().any(|pid| processes::is_live(*pid))
    });
    // Results are kept for the next agent; nothing else of the session is left.
    let left = Command::new("find").arg(agent.state()).args(["-type", "s", "-o", "-path", "*/work"]).output();
    assert_eq!(String::from_utf8_lossy(&left.unwrap().stdout), "");
    assert_eq!(agent.session_directories().len(), 1);
}

#[test]
#[ignore = "needs root: integration-tests/run"]
fn an_agent_that_comes_back_removes_the_control_groups_of_the_killed() {
    let lab = Lab::new(&["one"]);
    let mut agent = lab.start_agent("one");
    let (variable, session) = lab
        .controller()
        .block_on(|| async {
            let streams = open(&lab, "groups-left")?;
            // What it starts does not die with the supervisor as its first process does.
            let task = streams.get("one")?.run_bg(shell("sleep 54321098 &\necho up\nwait"));
            task.ready(Ready::log("up")).await?;
            let variable = format!("MILLSTREAM_TASK={}", task.id());
            let session =
                control_group_of(processes::with_variable(&variable)[0]).parent().unwrap().to_owned();
            let supervisors = agent.supervisors();
            agent.kill();
            supervisors.into_iter().for_each(processes::kill);
            drop(streams);
            Result::<(String, PathBuf)>::Ok((variable, session))
        })
        .unwrap();
    // Nobody is left to end what the block has started, which lives on in its group.
    assert!(session.exists());
    assert!(!processes::with_variable(&variable).is_empty());
    let own = session.parent().unwrap();
    let forgotten = own.join("s-0123456789ab");
    std::fs::create_dir_all(forgotten.join("t-0123456789ab")).unwrap();
    agent.restart(lab.host("one").namespace());
    wait_until_true("what the supervisor has left is ended", SOON, || {
        processes::with_variable(&variable).is_empty() && !session.exists()
    });
    wait_until_true("a group without a session is removed", SOON, || !forgotten.exists());
    assert!(own.exists(), "the agent lives");
    agent.terminate();
    assert!(!own.exists());
}

/// Directory of the control group of version 2 that a process is in.
fn control_group_of(pid: u32) -> PathBuf {
    let groups = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    let group = groups.lines().find_map(|line| line.strip_prefix("0::/")).unwrap();
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    let mount = mounts.lines().find(|line| line.split(' ').nth(2) == Some("cgroup2")).unwrap();
    PathBuf::from(mount.split(' ').nth(1).unwrap()).join(group)
}
