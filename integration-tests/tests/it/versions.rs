//! Ends that are not of one build: what both have works, and what one lacks is said before anything of it runs.
//!
//! With builds that really are older: `integration-tests/previous`.

use std::fs;

use expect_test::{Expect, expect};
use millstream::{Definition, OutcomeKind, Reason, Streams, exec, reference};
use millstream_common::protocol::VERSION;
use millstream_integration_tests::agent::Agent;

use crate::support::block_on;

/// Tells its phases, which every class does.
const CLASS: &str = "import unittest\n\nclass Case(unittest.TestCase):\n    def test(self):\n        pass\n";

/// Runs a plain task, one for each feature, and a plain one in the end; then one on the host alone.
fn check(build: &str, expected: Expect) {
    let directory = tempfile::tempdir().unwrap();
    let agent = Agent::start_of_another_build(&directory.path().join("agent"), build);
    let script = directory.path().join("case.py");
    fs::write(&script, CLASS).unwrap();
    let results = directory.path().join("results");
    let url = agent.unix_url();
    let open = |definition: Definition| {
        Streams::builder("t").only_given().results_dir(&results).stream("one", definition).open().unwrap()
    };
    let told = block_on(async {
        let streams = open(Definition::url(&url));
        let one = streams.get("one").unwrap();
        let mut tasks = vec![
            one.run_bg(exec(["true"])),
            one.run_bg(exec(["true"]).name("secret").secret_param("password", "x")),
            one.run_bg(reference(format!("{}:Case.test", script.display())).name("class")),
        ];
        let held = one.prepare(exec(["true"]).name("held"));
        // Only what is really held needs an agent that can.
        let _ended_without = held.staged().await;
        tasks.extend([held.start(), one.run_bg(exec(["true"]))]);
        let mut told = String::new();
        for task in &tasks {
            let outcome = task.outcome().await;
            if outcome.kind == OutcomeKind::Error {
                assert_eq!(outcome.reason, Reason::Unsupported, "{outcome}");
            }
            told += &format!("{}\n", outcome.sentence());
        }
        streams.close().await.unwrap();
        let alone = open(Definition::url(&url).exclusive());
        let outcome = alone.get("one").unwrap().run_bg(exec(["true"])).outcome().await;
        told += &format!("{}\n", outcome.sentence());
        alone.close().await.unwrap();
        told
    });
    let took = regex::Regex::new(r"passed after [^\n]*").unwrap();
    let told = took.replace_all(&told, "passed");
    let told = told.replace(&url, "PLACE").replace(&format!("version {VERSION}"), "version OURS");
    expected.assert_eq(&told);
}

#[test]
fn an_older_agent_runs_what_it_can_and_is_to_be_updated_for_the_rest() {
    check(
        "older",
        expect![[r#"
        task 1-true on stream one (localhost): passed
        task 2-secret on stream one (localhost): error (unsupported): the controller of version OURS needs the feature `secret-files` (to hand over secret parameters), which the agent of version 0.0.9 lacks: update the agent
        task 3-class on stream one (localhost): error (unsupported): the controller of version OURS needs the feature `reported-phases` (to judge set-up and tear-down of a class apart), which the agent of version 0.0.9 lacks: update the agent
        task 4-held on stream one (localhost): error (unsupported): the controller of version OURS needs the feature `hold` (to hold a prepared task until it is started), which the agent of version 0.0.9 lacks: update the agent
        task 5-true on stream one (localhost): passed
        task 1-true on stream one (localhost): error (unreachable): PLACE: the controller of version OURS needs the feature `line` (to wait in line for a host that is to be reserved), which the agent of version 0.0.9 lacks: update the agent
    "#]],
    );
}

#[test]
fn a_newer_agent_runs_what_it_still_has_and_the_controller_is_to_be_updated_for_the_rest() {
    check(
        "newer",
        expect![[r#"
        task 1-true on stream one (localhost): passed
        task 2-secret on stream one (localhost): error (unsupported): the controller of version OURS needs the feature `secret-files` (to hand over secret parameters), which the agent of version 9.0.0 lacks: update the controller
        task 3-class on stream one (localhost): error (unsupported): the controller of version OURS needs the feature `reported-phases` (to judge set-up and tear-down of a class apart), which the agent of version 9.0.0 lacks: update the controller
        task 4-held on stream one (localhost): passed
        task 5-true on stream one (localhost): passed
        task 1-true on stream one (localhost): error (unreachable): PLACE: the controller of version OURS needs the feature `line` (to wait in line for a host that is to be reserved), which the agent of version 9.0.0 lacks: update the controller
    "#]],
    );
}
