//! The harness itself: hosts reach one another, a cut is silent and heals, and nothing of a lab stays.

use std::{path::Path, process::Command, time::Duration};

use millstream_integration_tests::{lab::Lab, namespace::Namespace, tools, wait::wait_until_true};

fn ping(from: &Namespace, to: &str) -> bool {
    let mut command = Command::new("ip");
    command.args(["netns", "exec", from.name(), "ping", "-c", "1", "-W", "1", to]);
    tools::output(&mut command).status.success()
}

#[test]
#[ignore = "needs root and iputils-ping: integration-tests/run"]
fn hosts_reach_one_another_until_one_is_cut_off() {
    let lab = Lab::without_authority(&["one", "two"]);
    let one = lab.host("one").namespace();
    let two = lab.host("two").address().to_string();
    wait_until_true("the switch forwards", Duration::from_secs(10), || ping(one, &two));
    lab.cut("two");
    assert!(!ping(one, &two));
    lab.heal("two");
    wait_until_true("the switch forwards again", Duration::from_secs(10), || ping(one, &two));
}

#[test]
#[ignore = "needs root: integration-tests/run"]
fn a_namespace_ends_with_what_runs_inside() {
    let namespace = Namespace::create("short");
    let path = Path::new("/run/netns").join(namespace.name());
    let mut child = namespace.spawn(Command::new("sleep").arg("600")).unwrap();
    assert!(path.exists());
    drop(namespace);
    assert!(!child.wait().unwrap().success());
    assert!(!path.exists());
}
