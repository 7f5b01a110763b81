//! Streams behind OpenSSH: nothing is installed there, nothing but the program's copy stays, and a connection that is lost
//! is dialled again.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use millstream::{Definition, Ready, Result, Streams, conformance::check, shell};
use millstream_integration_tests::{lab::Lab, sshd::Sshd, tools};

use crate::{
    conformance::{is_sound, survivor},
    on_demand::{Program, agents_of, wait_until_gone},
    support::Ticker,
};

fn open(test: &str, lab: &Lab) -> Result<Streams> {
    Ok(Streams::builder(test).only_given().results_dir(lab.directory().join("results")).open()?)
}

/// A stream behind a server, with a program that nobody else brings.
fn behind(sshd: &Sshd, program: &Program) -> Definition {
    Definition::url(sshd.url()).key("agent", program.path().display())
}

/// Why nothing can be run on a stream.
fn refusal(lab: &Lab, definition: Definition) -> String {
    lab.controller().block_on(|| async {
        let streams = open("refused", lab).unwrap();
        let outcome = streams.add("nowhere", definition).unwrap().run_bg(shell("true")).outcome().await;
        assert!(!outcome.passed());
        streams.close().await.unwrap();
        outcome.to_string()
    })
}

#[test]
#[ignore = "needs root: integration-tests/run"]
fn a_host_behind_ssh_needs_nothing_and_keeps_nothing_but_the_program() {
    let lab = Lab::without_authority(&["one"]);
    let noise = "Banner /etc/os-release\nForceCommand sh -c 'echo welcome to the lab; printf no-newline; eval \"$SSH_ORIGINAL_COMMAND\"'\n";
    let sshd = Sshd::start_with(lab.host("one"), lab.directory(), noise);
    let program = Program::new();
    let run = |test: &str| {
        lab.controller()
            .block_on(|| async {
                let streams = open(test, &lab)?;
                let there = streams.add("there", behind(&sshd, &program))?;
                assert_eq!(there.host(), lab.host("one").address().to_string());
                let block = "echo begun; millstream-sync barrier both 2 >/dev/null; ip -o -4 address show dev lab0\n\
                             echo kept >\"$MILLSTREAM_OUTPUT/file\"";
                let task = there.run_bg(shell(block));
                task.ready(Ready::log("begun")).await?;
                streams.add("here", "local")?.run_fg(shell("millstream-sync barrier both 2")).await?;
                let outcome = task.wait().await?;
                assert!(outcome.stdout().contains(&there.host().to_string()), "{}", outcome.stdout());
                assert_eq!(std::fs::read_to_string(outcome.data().join("file")).unwrap(), "kept\n");
                streams.close().await
            })
            .unwrap();
    };
    run("first");
    let copies = sshd.cached();
    assert_eq!(copies.len(), 1, "{copies:?}");
    let brought = std::fs::metadata(&copies[0]).unwrap().created().unwrap();
    run("second");
    assert_eq!(sshd.cached(), copies);
    assert_eq!(std::fs::metadata(&copies[0]).unwrap().created().unwrap(), brought, "it was brought again");
    let states: Vec<PathBuf> = agents_of(&copies[0]).into_iter().map(state_of).collect();
    assert_eq!(states.len(), 1);
    wait_until_gone(&copies[0]);
    assert!(!states[0].exists());
}

/// Where an agent on demand lies.
fn state_of(agent: u32) -> PathBuf {
    let environment = std::fs::read_to_string(format!("/proc/{agent}/environ")).unwrap();
    environment.split('\0').find_map(|line| line.strip_prefix("MILLSTREAM_ARG_0=")).unwrap().into()
}

#[test]
#[ignore = "needs root: integration-tests/run"]
fn a_connection_that_is_killed_or_cut_is_dialled_again_and_no_byte_is_lost() {
    let lab = Lab::without_authority(&["one"]);
    let mut sshd = Sshd::start(lab.host("one"), lab.directory());
    let program = Program::new();
    let ticker = Ticker::new(&lab.directory().join("ticker"));
    lab.controller()
        .block_on(|| async {
            let streams = open("killed", &lab)?;
            let task = streams.add("one", behind(&sshd, &program))?.run_bg(ticker.block());
            ticker.wait_for_more(5);
            sshd.kill();
            ticker.wait_for_more(20);
            sshd.restart(lab.host("one"));
            ticker.wait_for_more(20);
            lab.cut("one");
            // Longer than either end waits for a silent connection, and well within the lease of 30 s.
            ticker.wait_for_more(250);
            lab.heal("one");
            ticker.wait_for_more(5);
            ticker.release();
            let outcome = task.outcome().await;
            assert!(outcome.passed(), "{outcome}\n{}", sshd.log());
            ticker.assert_complete(&outcome.stdout());
            streams.close().await
        })
        .unwrap();
    wait_until_gone(&sshd.cached()[0]);
}

#[test]
#[ignore = "needs root: integration-tests/run"]
fn a_host_behind_another_is_reached_through_it() {
    let lab = Lab::without_authority(&["gate", "inner"]);
    let gate = Sshd::start(lab.host("gate"), lab.directory());
    let inner = Sshd::start(lab.host("inner"), lab.directory());
    let program = Program::new();
    // One configuration for both: it holds for the jump, too.
    let known = [gate.file("known_hosts"), inner.file("known_hosts")]
        .map(|file| std::fs::read_to_string(file).unwrap());
    std::fs::write(inner.file("known_hosts"), known.concat()).unwrap();
    std::fs::copy(inner.file("authorized_keys"), gate.file("authorized_keys")).unwrap();
    lab.controller()
        .block_on(|| async {
            let streams = open("jump", &lab)?;
            let definition = behind(&inner, &program).key("jump", lab.host("gate").address());
            let outcome =
                streams.add("inner", definition)?.run_fg(shell("ip -o -4 address show dev lab0")).await?;
            assert!(outcome.stdout().contains(&lab.host("inner").address().to_string()));
            streams.close().await
        })
        .unwrap();
    let from_gate = format!("Connection from {}", lab.host("gate").address());
    assert!(inner.log().contains(&from_gate), "{}", inner.log());
}

#[test]
#[ignore = "needs root: integration-tests/run"]
fn what_the_client_says_is_told_with_what_to_do() {
    let lab = Lab::without_authority(&["one"]);
    let sshd = Sshd::start(lab.host("one"), lab.directory());
    let address = lab.host("one").address();
    let place = |more: &[(&str, String)]| {
        let definition = Definition::of("ssh").key("host", address).key("user", "root");
        more.iter().fold(definition, |definition, (key, value)| definition.key(*key, value))
    };
    let file = |name: &str| sshd.file(name).display().to_string();
    let config = ("config", file("ssh_config"));
    let empty = lab.directory().join("empty");
    std::fs::write(&empty, "").unwrap();

    let told = refusal(
        &lab,
        place(&[
            ("config", empty.display().to_string()),
            ("identity", file("identity")),
            ("options", "UserKnownHostsFile=/dev/null".into()),
        ]),
    );
    assert!(
        told.contains("Host key verification failed; log in by hand once to see and keep its key"),
        "{told}"
    );

    std::fs::write(&empty, format!("UserKnownHostsFile {}\n", file("known_hosts"))).unwrap();
    let told =
        refusal(&lab, place(&[("config", empty.display().to_string()), ("identity", file("stranger"))]));
    assert!(
        told.contains(&format!("root@{address}: Permission denied (publickey); log in by hand to see why")),
        "{told}"
    );

    let told = refusal(&lab, place(&[config, ("options", "NoSuchOption=yes".into())]));
    assert!(told.contains("Bad configuration option: nosuchoption; see ssh_config(5)"), "{told}");
}

#[test]
#[ignore = "needs root: integration-tests/run"]
fn a_host_that_cannot_be_reached_is_told_within_the_usual_time() {
    let lab = Lab::without_authority(&["one"]);
    let sshd = Sshd::start(lab.host("one"), lab.directory());
    let definition = lab.directory().join("lab.yaml");
    std::fs::write(&definition, format!("streams:\n  one: {}\n", sshd.url())).unwrap();
    let run = |path: &str| {
        let mut command = Command::new(tools::beside_this_program("controller-under-test"));
        command.arg(&definition).arg(lab.directory().join("results")).args(["one", "true"]).env("PATH", path);
        tools::both(&lab.controller().namespace().run(|| command.output().unwrap()))
    };
    let told = run("/nonexistent");
    assert!(
        told.contains("`ssh` cannot be started: no such file or directory; install the client of OpenSSH"),
        "{told}"
    );
    lab.controller().namespace().ip(&["route", "flush", "dev", "lab0"]);
    let told = run("/usr/bin:/bin");
    assert!(told.contains("error (unreachable): ssh://root@"), "{told}");
    assert!(
        told.contains("`ssh` gives no connection: it ended with exit code 255: ssh: connect to host"),
        "{told}"
    );
    assert!(told.contains("Network is unreachable"), "{told}");
}

#[test]
#[ignore = "needs root: integration-tests/run"]
fn a_host_behind_ssh_is_sound() {
    let lab = Lab::without_authority(&["one"]);
    let sshd = Sshd::start(lab.host("one"), lab.directory());
    let program = Program::new();
    let definition = behind(&sshd, &program);
    lab.controller().namespace().run(|| is_sound(check(definition).alone(), &survivor()));
    assert_eq!(sshd.cached().len(), 1);
    wait_until_gone(Path::new(&sshd.cached()[0]));
}
