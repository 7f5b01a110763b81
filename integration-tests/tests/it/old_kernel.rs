//! The agent where nothing is to be had that Linux got after 2016: what it promises about processes holds all the same.
//!
//! What is refused, and how: `below-an-old-kernel`.

use std::{fs, path::Path, time::Duration};

use millstream::{Definition, OutcomeKind, Ready, Reason, Streams, exec, shell};
use millstream_integration_tests::{agent::Agent, processes, tools, wait::wait_until_true};

use crate::support::{SOON, block_on};

/// Leaves two processes behind that hold its output, one of them a daemon, when both are what they are named by.
const DAEMON: &str = "mkfifo up\n\
    (setsid sh -c 'sleep 86543210 & echo $$ >up; exec sleep 86543211' &)\n\
    read -r daemon <up\n\
    until grep -q ^sleep /proc/$daemon/cmdline; do :; done\n\
    mkdir -p \"$MILLSTREAM_OUTPUT/deep/er\"\n\
    echo kept >\"$MILLSTREAM_OUTPUT/deep/er/file\"\n\
    mkdir deep && echo lost >deep/file\n\
    echo started";

fn check(program: &Path) {
    let directory = tempfile::tempdir().unwrap();
    let agent = Agent::start_below_an_old_kernel(&directory.path().join("agent"), program);
    let (url, results) = (agent.unix_url(), directory.path().join("results"));
    let open = || {
        let streams = Streams::builder("old").only_given().results_dir(&results);
        streams.stream("one", Definition::url(&url)).open()
    };
    block_on(async {
        let streams = open()?;
        let one = streams.get("one")?;

        let daemon = one.run_fg(shell(DAEMON)).await?;
        assert_eq!(daemon.stdout(), "started\n");
        assert!(daemon.leaked_count >= 2, "{daemon:?}");
        let commands: Vec<_> = daemon.leaked.iter().map(|process| process.command.as_str()).collect();
        assert!(commands.contains(&"sleep 86543211"), "{commands:?}");
        assert_eq!(fs::read_to_string(daemon.data().join("deep/er/file")).unwrap(), "kept\n");
        for left in ["86543210", "86543211"] {
            assert_eq!(processes::with_argument(left), Vec::<u32>::new());
        }

        let missing = one.run_bg(exec(["no-such-program"])).outcome().await;
        assert_eq!((missing.kind, missing.reason), (OutcomeKind::Error, Reason::StartFailed), "{missing}");

        // Its descriptors are its own, though the kernel cannot close all others at once.
        let held = one.prepare(exec(["ls", "/proc/self/fd"]));
        held.staged().await?;
        assert_eq!(held.start().wait().await?.stdout(), "0\n1\n2\n3\n", "three, and the list");

        let deaf = shell("trap '' TERM\necho deaf\nwhile :; do sleep 86543212; done");
        let deaf = one.run_bg(deaf.grace(Duration::from_millis(100)));
        let waiting = one.run_bg(exec(["true"]));
        deaf.ready(Ready::log("deaf")).await?;
        waiting.cancel();
        assert_eq!(waiting.outcome().await.kind, OutcomeKind::Cancelled);
        let stopped = deaf.stop().await;
        assert_eq!(stopped.kind, OutcomeKind::Stopped, "{stopped}");
        assert_eq!(processes::with_argument("86543212"), Vec::<u32>::new());

        let sleeper = "(setsid sleep 86543213 &)\necho up\nsleep 86543214";
        let timed = one.run_bg(shell(sleeper).timeout(Duration::from_millis(500)));
        assert_eq!(timed.outcome().await.kind, OutcomeKind::TimedOut);

        // Its shim ends the tree when it is not told anything any more; the agent looks for what bears the mark.
        let orphan = one.run_bg(shell(sleeper));
        orphan.ready(Ready::log("up")).await?;
        agent.supervisors().into_iter().for_each(processes::kill);
        let lost = orphan.outcome().await;
        assert_eq!(lost.kind, OutcomeKind::Lost, "{lost}");
        wait_until_true("what the supervisor has left ends", SOON, || {
            processes::with_argument("86543213").is_empty() && processes::with_argument("86543214").is_empty()
        });

        let stream = fs::read(streams.results_dir().join("streams/one/stream.json")).unwrap();
        let stream: serde_json::Value = serde_json::from_slice(&stream).unwrap();
        assert_eq!(stream["host"]["containment"], "subreaper", "{stream:#}");
        streams.close().await?;

        let again = open()?;
        assert_eq!(again.get("one")?.run_fg(exec(["echo", "again"])).await?.stdout(), "again\n");
        again.close().await
    })
    .unwrap();
    assert_eq!(agent.session_directories(), Vec::<std::path::PathBuf>::new());
    assert!(!agent.log().contains("os error"), "{}", agent.log());
}

#[test]
fn trees_end_and_results_come_home_without_what_kernels_got_since() {
    check(&tools::agent_program());
}

#[test]
#[ignore = "needs the static agent (deploy/build-static): integration-tests/run"]
fn the_static_agent_needs_nothing_that_kernels_got_since() {
    check(&tools::static_agent_program());
}
