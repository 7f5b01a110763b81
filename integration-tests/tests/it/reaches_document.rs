//! `docs/reaches.md` does what it says: its definitions are understood, and those that can run here do, with their names
//! replaced by what this test has made.

use std::{fs, path::Path, process::Command};

use millstream::{Params, Result, Streams, shell};
use millstream_integration_tests::{engine::Engine, namespace::Namespace, tools};

use crate::{on_demand::Program, support::block_on};

/// The definitions of the page.
fn definitions() -> String {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/reaches.md");
    let page = fs::read_to_string(page).unwrap();
    let (_, block) = page.split_once("```yaml\n").unwrap();
    let (block, rest) = block.split_once("```").unwrap();
    assert!(!rest.contains("```yaml"), "another block of definitions has no test");
    block.to_owned()
}

fn open(text: &str, results: &Path) -> Result<Streams> {
    let yaml = results.join("lab.yaml");
    fs::write(&yaml, text).unwrap();
    Ok(Streams::builder("page").params(Params::load(yaml)?).only_given().results_dir(results).open()?)
}

#[test]
fn the_definitions_of_the_page_are_understood() {
    let directory = tempfile::tempdir().unwrap();
    let streams = open(&definitions(), directory.path()).unwrap();
    assert_eq!(streams.len(), 9);
    for index in 0..streams.len() {
        streams.try_get(index).unwrap();
    }
    block_on(streams.close()).unwrap();
}

#[test]
#[ignore = "needs root and podman: integration-tests/run"]
fn the_commands_of_the_page_lead_somewhere() {
    let (blue, engine, program) = (Namespace::create("page"), Engine::podman(), Program::new());
    engine.run(&["run", "--detach", "--name", "box", "box", "/bin/busybox", "sleep", "1000"]);
    let mut beside = blue.spawn(Command::new("sleep").arg("1000")).unwrap();
    let text = definitions()
        .replace("exec blue", &format!("exec {}", blue.name()))
        .replace("1234", &beside.id().to_string())
        .replace("podman exec", &format!("{} exec", engine.command().display()))
        .replace("millstream-agent stdio", &format!("{} stdio", program.path().display()))
        .replace("bring: yes", &format!("bring: yes, agent: {}", tools::static_agent_program().display()));
    let directory = tempfile::tempdir().unwrap();
    block_on(async {
        let streams = open(&text, directory.path())?;
        let network =
            format!("{}\n", fs::read_link(format!("/proc/{}/ns/net", beside.id())).unwrap().display());
        for name in ["blue", "blue-installed", "beside"] {
            let outcome = streams.get(name)?.run_fg(shell("readlink /proc/self/ns/net")).await?;
            assert_eq!(outcome.stdout(), network, "{name}");
        }
        let outcome = streams.get("box")?.run_fg(shell("ls /bin/busybox")).await?;
        assert_eq!(outcome.stdout(), "/bin/busybox\n");
        streams.close().await
    })
    .unwrap();
    beside.kill().unwrap();
    beside.wait().unwrap();
    program.wait_until_gone();
}
