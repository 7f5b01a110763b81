//! Logs: every byte arrives, and neither end holds more than a few of them in memory.

use std::{
    io::{BufRead as _, BufReader},
    process::{Command, Stdio},
};

use millstream_integration_tests::{
    lab::Lab,
    processes::{peak_resident_bytes, resident_bytes},
    tools,
};

const MIB: u64 = 1024 * 1024;
/// How much a process may grow while 1 GiB passes: windows of HTTP/2 and a few chunks.
const GROWTH_MAX: u64 = 96 * MIB;
/// Prints 1 GiB in numbered lines of 4 KiB: no two are the same.
const PRINT: &str = r#"python3 -c 'for n in range(262144): print("%010d%s" % (n, "x" * 4085))'"#;

#[test]
#[ignore = "needs root, moves 1 GiB: integration-tests/run"]
fn a_gibibyte_of_log_arrives_byte_for_byte_in_little_memory() {
    let lab = Lab::new(&["one"]);
    let agent = lab.start_agent("one");
    let definitions = lab.directory().join("lab.yaml");
    std::fs::write(&definitions, lab.definitions(&lab.authority().controller("reader"))).unwrap();
    let results = lab.directory().join("results");
    let before = resident_bytes(agent.pid());
    let mut command = Command::new(tools::beside_this_program("controller-under-test"));
    // It holds itself open until its input ends, so that its peak can be read.
    command.arg(&definitions).arg(&results).args(["--linger", "one", PRINT]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut controller = lab.controller().namespace().spawn(&mut command).unwrap();
    let mut peak_of_supervisors = 0;
    let mut stdout = None;
    for line in BufReader::new(controller.stdout.take().unwrap()).lines() {
        let line = line.unwrap();
        for supervisor in agent.supervisors() {
            peak_of_supervisors = peak_of_supervisors.max(peak_resident_bytes(supervisor));
        }
        if let Some(path) = line.strip_prefix("stdout: ") {
            stdout = Some(path.to_owned());
            break;
        }
    }
    let stdout = stdout.expect("the controller tells where the log lies");
    let controller_peak = peak_resident_bytes(controller.id());
    let agent_peak = peak_resident_bytes(agent.pid());
    drop(controller.stdin.take());
    assert!(controller.wait().unwrap().success());

    let same = format!("{PRINT} | cmp - {stdout}");
    tools::run(Command::new("sh").args(["-c", &same]));
    assert_eq!(std::fs::metadata(&stdout).unwrap().len(), 1024 * MIB);
    println!(
        "peaks: controller {} MiB, agent {} MiB (from {}), supervisor {} MiB",
        controller_peak / MIB,
        agent_peak / MIB,
        before / MIB,
        peak_of_supervisors / MIB
    );
    assert!(agent_peak < before + GROWTH_MAX, "the agent grew from {before} to {agent_peak} bytes");
    assert!(controller_peak < GROWTH_MAX + 64 * MIB, "the controller held {controller_peak} bytes");
    assert!(
        peak_of_supervisors > 0 && peak_of_supervisors < GROWTH_MAX,
        "the supervisor held {peak_of_supervisors}"
    );
}
