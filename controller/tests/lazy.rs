//! What streams that nobody uses cost: nothing that the system knows of. Alone in its program, so that nobody else is
//! counted.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::fs;

use millstream::Streams;

/// Threads, open files and children of this program.
fn costs() -> usize {
    let count = |directory: &str| fs::read_dir(directory).unwrap().count();
    let mine = format!("/proc/self/task/{}/children", std::process::id());
    let children = fs::read_to_string(mine).unwrap_or_default().split_whitespace().count();
    count("/proc/self/task") + count("/proc/self/fd") + children
}

#[test]
fn defined_streams_have_no_thread_no_socket_and_no_process() {
    const COUNT: usize = 10_000;
    // What the test itself has: its driver, its runtime, its files. No stream has a hundredth of anything.
    const OWN: usize = COUNT / 100;
    let results = tempfile::tempdir().unwrap();
    let before = costs();
    let places = ["tls://lab.example.com", "local", "unix:///run/agent.sock", "docker://image=fedora"];
    let builder = Streams::builder("lazy").only_given().results_dir(results.path());
    let builder = (0..COUNT)
        .fold(builder, |builder, number| builder.stream(format!("s{number}"), places[number % places.len()]));
    let streams = builder.open().unwrap();
    assert_eq!((streams.len(), streams.initialized(), streams.all().len()), (COUNT, 0, COUNT));
    assert!(costs() < before + OWN, "{before} before, {} with {COUNT} streams", costs());
}
