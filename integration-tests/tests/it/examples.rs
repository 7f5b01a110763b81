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
    run("hello", &[]);
    let told = run("netperf", &["--seconds", "1"]);
    assert!(told.contains("client | connected to") && told.contains("Gbit/s"), "{told}");
    let told = run("ping_all", &[]);
    assert!(told.contains("three answers after"), "{told}");
    let told = run("stress", &[]);
    assert!(told.contains("the stressor was stopped"), "{told}");
    check_python_examples(run);
    // Of several files the last one has the last word.
    let file = |name: &str, server: &str| {
        let path = directory.path().join(name);
        std::fs::write(&path, format!("streams: {{client: local, server: '{server}'}}\n")).unwrap();
        path
    };
    let (lab, mine) = (file("lab.yaml", "tls://nowhere.invalid"), file("mine.yaml", "local"));
    let told = run("client_server", &["--streams", tools::text(&lab), "--streams", tools::text(&mine)]);
    assert!(told.contains("the server answers: hello"), "{told}");
}

/// Both run classes of a Python file that lies beside them.
fn check_python_examples(run: impl Fn(&str, &[&str]) -> String) {
    let told = run("multi_netperf", &["--seconds", "0.5"]);
    assert!(told.contains("client-1: ") && told.contains("Gbit/s"), "{told}");
    assert!(told.contains("client-2: ") && told.contains("server: 2 connections, "), "{told}");
    let told = run("inter_communication", &["--connections", "10"]);
    assert!(told.contains("attacker-1: 10 of 10 answered\nattacker-2: 10 of 10 answered\n"), "{told}");
    assert!(
        told.contains("2 attackers began within ") && told.contains(" questions under attack, "),
        "{told}"
    );
}

#[test]
#[ignore = "needs the built examples: integration-tests/run"]
fn every_pattern_of_the_guide_runs() {
    // What each pattern prints, in this order.
    let patterns: [(&str, &[&str]); 8] = [
        ("client_server", &["the server answers: hello", "the server was stopped"]),
        ("many_clients", &["4 clients, 200 requests"]),
        (
            "slow_starter",
            &["worker | checks ssh", "http | http listens", "worker | checks http", "all three have ended"],
        ),
        (
            "migration",
            &["left after 1024 steps", "arrived after 1024 steps", "nothing of the guest was lost"],
        ),
        ("no_route", &["2-connect-internal on stream client", "failed", "as expected"]),
        (
            "variants",
            &["1-send.tiny: 1048576 bytes in 4096 writes", "2-send.small", "3-send.big", "3 results"],
        ),
        (
            "nested",
            &[
                "the test works beside it",
                "the inner scenario moved 67108864 bytes",
                "1-receive is there: true",
                "1-send is there: true",
            ],
        ),
        ("coordinated_start", &["3 attackers began", " ms apart", "cut and watch began", " ms apart"]),
    ];
    let directory = tempfile::tempdir().unwrap();
    for (name, expected) in patterns {
        let told =
            tools::run(example(name).arg("--results").arg(directory.path()).current_dir(directory.path()));
        let mut rest = told.as_str();
        for words in expected {
            let Some((_, after)) = rest.split_once(words) else {
                panic!("{name} does not print `{words}` where it should:\n{told}");
            };
            rest = after;
        }
        let report = std::fs::read_to_string(directory.path().join(name).join("test.json")).unwrap();
        assert!(report.contains("\"success\": true"), "{report}");
    }
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
    let told = run("client_server", &[]);
    assert!(told.contains("the server answers: hello"), "{told}");
    let told = run("ping_all", &[]);
    assert!(told.contains("client answers after") && told.contains("server answers after"), "{told}");
}

#[test]
#[ignore = "needs root, python3 and the built examples: integration-tests/run"]
fn classes_of_python_files_run_on_agents() {
    let lab = Lab::new(&["server", "client-1", "client-2", "service", "watcher", "attacker-1", "attacker-2"]);
    let _agents = lab.start_agents();
    let definitions = lab.directory().join("lab.yaml");
    std::fs::write(&definitions, lab.definitions(&lab.authority().controller("examples"))).unwrap();
    check_python_examples(|name, more| {
        let results = lab.directory().join("results");
        let mut command = example(name);
        command.arg("--streams").arg(&definitions).arg("--results").arg(results).args(more);
        lab.controller().namespace().run(|| tools::run(&mut command))
    });
}
