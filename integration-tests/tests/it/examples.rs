//! The examples, unchanged, on this machine and on agents of two hosts.

use std::process::Command;

use millstream_integration_tests::{lab::Lab, tools};

fn example(name: &str) -> Command {
    Command::new(tools::beside_this_program(&format!("examples/{name}")))
}

#[test]
#[ignore = "needs the built examples: integration-tests/run"]
fn every_example_runs_on_this_machine() {
    let directory = tempfile::tempdir().unwrap();
    let run = |name: &str, more: &[&str]| {
        tools::run(
            example(name).arg("--results").arg(directory.path()).args(more).current_dir(directory.path()),
        )
    };
    let told = run("netperf", &["--seconds", "1"]);
    assert!(told.contains("client | connected to") && told.contains("Gbit/s"), "{told}");
    let told = run("ping_all", &[]);
    assert!(told.contains("three answers after"), "{told}");
    let told = run("stress", &[]);
    assert!(told.contains("the stressor was stopped"), "{told}");
}

#[test]
#[ignore = "needs root and the built examples: integration-tests/run"]
fn the_same_programs_run_on_agents() {
    let lab = Lab::new(&["server", "client"]);
    let _agents = lab.start_agents();
    let definitions = lab.directory().join("lab.yaml");
    std::fs::write(&definitions, lab.definitions(&lab.authority().controller("examples"))).unwrap();
    let run = |name: &str, more: &[&str]| {
        let results = lab.directory().join("results");
        let mut command = example(name);
        command.arg("--streams").arg(&definitions).arg("--results").arg(results).args(more);
        lab.controller().namespace().run(|| tools::run(&mut command))
    };
    let told = run("netperf", &["--seconds", "1"]);
    assert!(told.contains("connected to 10.77.0.2") && told.contains("Gbit/s"), "{told}");
    let told = run("ping_all", &[]);
    assert!(told.contains("client answers after") && told.contains("server answers after"), "{told}");
}
