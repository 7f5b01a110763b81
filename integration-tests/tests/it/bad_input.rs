//! Bad input: one clear error each, with place, cause and next step. The texts are part of the product: they are kept
//! here word for word.

use std::{fs, path::Path};

use expect_test::{Expect, expect};
use millstream::{Block, OutcomeKind, Params, Result, Streams, exec, python, script};

use crate::support::block_on;

/// Paths of the test become `DIR`, its current directory `CWD`, the search path a mark, and how often a host was tried a
/// number: what is left is the same on every machine, however busy.
fn plain(text: &str, directory: &Path) -> String {
    let current = std::env::current_dir().unwrap();
    let text = text.replace(directory.to_str().unwrap(), "DIR").replace(current.to_str().unwrap(), "CWD");
    let search_path = regex::Regex::new(r"host's PATH \([^)]*\)").unwrap();
    let text = search_path.replace(&text, "host's PATH (…)");
    let attempts = regex::Regex::new(r"in (29|3\d) s \(\d+ attempts\)").unwrap();
    attempts.replace(&text, "in 30 s (N attempts)").into_owned()
}

/// The error that this definition file gives when a test opens it and uses the stream `x`.
fn check_definition(yaml: &str, expected: &Expect) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("lab.yaml");
    fs::write(&path, yaml).unwrap();
    let opened = || -> Result<()> {
        let streams =
            Streams::builder("bad").params(Params::load(&path)?).results_dir(directory.path()).open()?;
        streams.get("x")?;
        Ok(())
    };
    let error = opened().unwrap_err();
    expected.assert_eq(&plain(&format!("{error:?}"), directory.path()));
}

/// The outcome of a block that cannot be begun, on a stream with this definition.
fn check_block(definition: &str, block: Block, expected: &Expect) {
    let directory = tempfile::tempdir().unwrap();
    let told = block_on(async {
        let streams = Streams::builder("bad").stream("x", definition).results_dir(directory.path()).open()?;
        let outcome = streams.get("x")?.run_bg(block).outcome().await;
        assert_eq!(outcome.kind, OutcomeKind::Error, "{outcome}");
        streams.close().await?;
        Result::<String>::Ok(outcome.to_string())
    });
    expected.assert_eq(&plain(&told.unwrap(), directory.path()));
}

#[test]
fn an_unknown_stream_type_is_refused_with_the_nearest_one() {
    check_definition(
        "streams:\n  x: tlss://foo\n",
        &expect![
            "stream `x`, defined by DIR/lab.yaml:2:3: stream type `tlss` is unknown: use one of `command`, `docker`, `local`, `podman`, `slurm`, `ssh`, `tls`, `unix` (did you mean `tls`?)"
        ],
    );
}

#[test]
fn bad_yaml_is_refused_with_its_place() {
    check_definition(
        "streams:\n  x: local\n  x: local\n",
        &expect!["DIR/lab.yaml:3:3: key `x` is given twice, first at DIR/lab.yaml:2:3: remove one"],
    );
    check_definition(
        "streams:\n\tx: local\n",
        &expect!["DIR/lab.yaml:2:2: tabs disallowed within this context (block indentation)"],
    );
    check_definition(
        "streams:\n  x: {type: tls, hots: foo}\n",
        &expect![
            "DIR/lab.yaml:2:18: stream `x` has the unknown key `hots`: did you mean `host`? (there are `host`, `port`, `authority`, `certificate`, `key`, `revocations`, `server_name`, `type`, `env`, `cwd`, `user`, `timeout`, `wrap`, `limits`, `on_failure`, `exclusive`, `wait`)"
        ],
    );
}

#[test]
fn a_name_with_a_slash_or_a_control_character_is_refused() {
    check_definition(
        "streams:\n  a/b: local\n",
        &expect![
            "DIR/lab.yaml:2:3: the stream name `a/b` has a `/` at byte 1: use letters, digits, `-`, `_` or `.`"
        ],
    );
    check_definition(
        "streams:\n  \"a\\nb\": local\n",
        &expect![[
            r#"DIR/lab.yaml:2:3: the stream name `a\nb` has a control character (U+000A) at byte 1: use letters, digits, `-`, `_` or `.`"#
        ]],
    );
    let directory = tempfile::tempdir().unwrap();
    for (name, expected) in [
        ("a/b", expect!["the test name `a/b` has a `/` at byte 1: use letters, digits, `-`, `_` or `.`"]),
        (
            "a\u{7}b",
            expect![[
                r#"the test name `a\u{7}b` has a control character (U+0007) at byte 1: use letters, digits, `-`, `_` or `.`"#
            ]],
        ),
        ("", expect!["the test name is empty: give it at least one character"]),
    ] {
        let error =
            millstream::Error::from(Streams::builder(name).results_dir(directory.path()).open().unwrap_err());
        expected.assert_eq(&format!("{error:?}"));
    }
}

#[test]
fn a_missing_certificate_is_named() {
    check_block(
        "tls://127.0.0.1:9?ca=/nowhere/ca.pem&certificate=/nowhere/x.pem&key=/nowhere/x.key",
        exec(["true"]),
        &expect![
            "task 1-true on stream x (127.0.0.1): error (unreachable): tls://127.0.0.1:9: failed to read the certificate `/nowhere/x.pem`: no such file or directory; make one with `millstream-agent pki issue`, or correct the path"
        ],
    );
}

#[test]
fn an_agent_that_cannot_be_reached_is_named_with_the_attempt() {
    check_block(
        "unix:///nowhere/agent.sock",
        exec(["true"]),
        &expect![
            "task 1-true on stream x (localhost): error (unreachable): unix:///nowhere/agent.sock could not be reached in 30 s (N attempts): failed to connect to unix:///nowhere/agent.sock: no such file or directory. Check that `millstream-agent` runs on this machine and listens on that socket"
        ],
    );
}

#[test]
fn a_script_that_is_not_there_is_named() {
    check_block(
        "local",
        script("/nowhere/netperf.sh"),
        &expect![
            "task 1-netperf on stream x (127.0.0.1): error (invalid_block): script `/nowhere/netperf.sh` does not exist (the current directory is `CWD`)"
        ],
    );
}

#[test]
fn a_program_that_is_not_there_is_named() {
    check_block(
        "local",
        exec(["no-such-program", "--fast"]),
        &expect![
            "task 1-no-such-program-fast on stream x (127.0.0.1): error in phase run (start_failed): `no-such-program` is not on this host's PATH (…): install it or give its whole path"
        ],
    );
}

#[test]
#[ignore = "needs root: integration-tests/run"]
fn a_host_without_python_is_named() {
    let lab = millstream_integration_tests::lab::Lab::new(&["one"]);
    let nowhere = lab.directory().join("nowhere");
    let _agent = lab.start_agent_with_path("one", &nowhere);
    let told = lab.controller().block_on(|| async {
        let streams = crate::support::open(&lab, "no-python")?;
        let outcome = streams.get("one")?.run_bg(python("print(1)")).outcome().await;
        assert_eq!(outcome.kind, OutcomeKind::Error, "{outcome}");
        streams.close().await?;
        Result::<String>::Ok(outcome.to_string())
    });
    expect!["task 1-print-1 on stream one (10.77.0.2): error (invalid_block): host 10.77.0.2 has no Python 3, which this block needs: install the package `python3` there"].assert_eq(&plain(&told.unwrap(), lab.directory()));
}

#[test]
fn a_results_directory_that_cannot_be_written_is_named() {
    let error =
        millstream::Error::from(Streams::builder("bad").results_dir("/proc/results").open().unwrap_err());
    expect![[r#"
        results cannot be kept in `/proc/results`: make it writable, or name another directory with `results_dir`
          caused by: No such file or directory (os error 2)"#]].assert_eq(&format!("{error:?}"));
}

/// What an agent with this configuration says instead of starting.
fn check_agent(directory: &Path, configuration: &str, expected: &Expect) {
    let told = millstream_integration_tests::agent::Agent::refused(directory, configuration);
    expected.assert_eq(&plain(&told, directory));
}

#[test]
fn an_agent_names_the_line_of_its_configuration_that_is_wrong() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let common =
        format!("unix_socket: {0}/agent.sock\nstate_directory: {0}/state\n", directory.to_str().unwrap());
    let check =
        |line: &str, expected: Expect| check_agent(directory, &format!("{common}{line}\n"), &expected);
    check(
        "listn: 127.0.0.1:0",
        expect![[r#"
        millstream-agent: DIR/agent.yaml:3:1: `listn` is no key of the configuration: did you mean `listen`?
    "#]],
    );
    check(
        "listen: [",
        expect![[r#"
        millstream-agent: DIR/agent.yaml:3:9: unclosed bracket '['
    "#]],
    );
    check(
        "listen: localhost:7433",
        expect![[r#"
        millstream-agent: DIR/agent.yaml:3:9: `localhost:7433` is no address to listen on: write numbers, such as 127.0.0.1:7433 or [::]:7433
    "#]],
    );
    check(
        "listen: 0.0.0.0:7433",
        expect![[r#"
        millstream-agent: DIR/agent.yaml:3:9: refusing to listen on 0.0.0.0:7433 without TLS: anybody who can reach it could run programs here. Change this line to 127.0.0.1:7433, or add `tls:` with `certificate`, `key` and `authority` (`millstream-agent pki init` and `pki issue` make them)
    "#]],
    );
    check(
        "tls: {authority: /nowhere/ca.pem, certificate: /nowhere/x.pem, key: /nowhere/x.key}",
        expect![[r#"
            millstream-agent: DIR/agent.yaml:3:6: failed to read the certificate `/nowhere/x.pem`: no such file or directory; make one with `millstream-agent pki issue`, or correct the path
        "#]],
    );
}

#[test]
fn an_agent_names_the_port_that_is_in_use() {
    let directory = tempfile::tempdir().unwrap();
    let holder = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = holder.local_addr().unwrap();
    let configuration = format!(
        "listen: {address}\nunix_socket: {0}/agent.sock\nstate_directory: {0}/state\n",
        directory.path().to_str().unwrap()
    );
    let told = millstream_integration_tests::agent::Agent::refused(directory.path(), &configuration);
    expect![[r#"
        millstream-agent: DIR/agent.yaml:1:9: failed to listen on ADDRESS: address already in use; another program has the port (`ss -ltnp sport = :PORT` names it): stop it, or change this line
    "#]].assert_eq(&plain(&told, directory.path()).replace(&address.to_string(), "ADDRESS").replace(&address.port().to_string(), "PORT"));
}

#[test]
fn commands_without_their_files_say_what_to_do() {
    let directory = tempfile::tempdir().unwrap();
    let nowhere = directory.path().join("nowhere");
    let nowhere = nowhere.to_str().unwrap();
    let check = |arguments: &[&str], expected: Expect| {
        let mut command = std::process::Command::new(millstream_integration_tests::tools::agent_program());
        let output = millstream_integration_tests::tools::output(command.args(arguments));
        assert!(!output.status.success());
        expected.assert_eq(&plain(&millstream_integration_tests::tools::both(&output), directory.path()));
    };
    check(
        &["serve", "--config", nowhere],
        expect![[r#"
        millstream-agent: failed to read the configuration `DIR/nowhere`: no such file or directory; write it, or name another with `--config`
    "#]],
    );
    check(
        &["pki", "issue", "--dir", nowhere, "--role", "operator", "--name", "olga"],
        expect![[r#"
        millstream-agent: failed to read `DIR/nowhere/ca.pem`: no such file or directory; make an authority with `millstream-agent pki init --dir DIR` first
    "#]],
    );
    check(
        &["pki", "show", nowhere],
        expect![[r#"
        millstream-agent: failed to read `DIR/nowhere`: no such file or directory
    "#]],
    );
    check(
        &["status", nowhere],
        expect![[r#"
        millstream-agent: `DIR/nowhere`: failed to reach the agent: no such file or directory
    "#]],
    );
}
