//! The agent where nothing is to be had that Linux got after 2016: what it promises about processes holds all the same.
//!
//! What is refused, and how: `below-an-old-kernel`.

use std::{fs, path::Path, time::Duration};

use millstream::{Definition, OutcomeKind, Ready, Reason, Streams, exec, shell};
use millstream_integration_tests::{agent::Agent, processes, tools, wait::wait_until_true};

use crate::support::{SOON, block_on};

/// Leaves two processes behind that hold its output, one of them a daemon, when both are what they are named by: `NUMBER` and
/// a digit.
const DAEMON: &str = "mkfifo up\n\
    (setsid sh -c 'sleep NUMBER0 & echo $$ >up; exec sleep NUMBER1' &)\n\
    read -r daemon <up\n\
    until grep -q ^sleep /proc/$daemon/cmdline; do :; done\n\
    mkdir -p \"$MILLSTREAM_OUTPUT/deep/er\"\n\
    echo kept >\"$MILLSTREAM_OUTPUT/deep/er/file\"\n\
    mkdir deep && echo lost >deep/file\n\
    echo started";

/// `number` begins the arguments by which the processes of this run are found.
fn check(program: &Path, number: &str) {
    let named = |text: &str| text.replace("NUMBER", number);
    let left = |name: &str| processes::with_argument(&named(name));
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

        let daemon = one.run_fg(shell(named(DAEMON))).await?;
        assert_eq!(daemon.stdout(), "started\n");
        assert!(daemon.leaked_count >= 2, "{daemon:?}");
        let commands: Vec<_> = daemon.leaked.iter().map(|process| process.command.as_str()).collect();
        assert!(commands.contains(&named("sleep NUMBER1").as_str()), "{commands:?}");
        assert_eq!(fs::read_to_string(daemon.data().join("deep/er/file")).unwrap(), "kept\n");
        assert_eq!([left("NUMBER0"), left("NUMBER1")].concat(), Vec::<u32>::new());

        let missing = one.run_bg(exec(["no-such-program"])).outcome().await;
        assert_eq!((missing.kind, missing.reason), (OutcomeKind::Error, Reason::StartFailed), "{missing}");

        // Its descriptors are its own, though the kernel cannot close all others at once.
        let held = one.prepare(exec(["ls", "/proc/self/fd"]));
        held.staged().await?;
        assert_eq!(held.start().wait().await?.stdout(), "0\n1\n2\n3\n", "three, and the list");

        let deaf = shell(named("trap '' TERM\necho deaf\nwhile :; do sleep NUMBER2; done"));
        let deaf = one.run_bg(deaf.grace(Duration::from_millis(100)));
        let waiting = one.run_bg(exec(["true"]));
        deaf.ready(Ready::log("deaf")).await?;
        waiting.cancel();
        assert_eq!(waiting.outcome().await.kind, OutcomeKind::Cancelled);
        let stopped = deaf.stop().await;
        assert_eq!(stopped.kind, OutcomeKind::Stopped, "{stopped}");
        assert_eq!(left("NUMBER2"), Vec::<u32>::new());

        let sleeper = named("(setsid sleep NUMBER3 &)\necho up\nsleep NUMBER4");
        let timed = one.run_bg(shell(&sleeper).timeout(Duration::from_millis(500)));
        assert_eq!(timed.outcome().await.kind, OutcomeKind::TimedOut);

        // Its shim ends the tree when it is not told anything any more; the agent looks for what bears the mark.
        let orphan = one.run_bg(shell(&sleeper));
        orphan.ready(Ready::log("up")).await?;
        agent.supervisors().into_iter().for_each(processes::kill);
        let lost = orphan.outcome().await;
        assert_eq!(lost.kind, OutcomeKind::Lost, "{lost}");
        wait_until_true("what the supervisor has left ends", SOON, || {
            left("NUMBER3").is_empty() && left("NUMBER4").is_empty()
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
    check(&tools::agent_program(), "8654321");
}

#[test]
#[ignore = "needs the static agent (deploy/build-static): integration-tests/run"]
fn the_static_agent_needs_nothing_that_kernels_got_since() {
    check(&tools::static_agent_program(), "8754321");
}
