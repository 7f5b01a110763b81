//! The image of deploy/Containerfile: built and run by a real engine, and used.

use std::{fs, path::Path};

use millstream::{Result, Streams, exec};
use millstream_integration_tests::{
    engine::Engine,
    tools::{self, text},
    wait::wait_until_true,
};

use crate::support::{SOON, block_on};

#[test]
#[ignore = "needs root and podman: integration-tests/run"]
fn the_image_of_the_recipe_runs_blocks() {
    let engine = Engine::podman();
    let recipe = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/Containerfile");
    let program = tools::static_agent_program();
    let context = program.parent().unwrap();
    engine.run(&["build", "--quiet", "--tag", "millstream-agent", "--file", text(&recipe), text(context)]);

    let directory = tempfile::tempdir().unwrap();
    let place = |name: &str, inside: &str| {
        let path = directory.path().join(name);
        fs::create_dir(&path).unwrap();
        format!("{}:{inside}", path.display())
    };
    let configuration = place("etc", "/etc/millstream:ro");
    // The network of the engine is this machine's: nothing is listened on there.
    fs::write(directory.path().join("etc/agent.yaml"), "listen: []\n").unwrap();
    let socket = place("run", "/run/millstream");
    let run = ["run", "--detach", "--name", "agent", "--volume", &configuration, "--volume", &socket];
    engine.run(&[&run[..], &["millstream-agent"]].concat());
    let agent = directory.path().join("run/agent.sock");
    wait_until_true("the agent in the container listens", SOON, || agent.exists());

    let told = block_on(async {
        let streams = Streams::builder("image")
            .stream("box", format!("unix://{}", agent.display()))
            .results_dir(directory.path().join("results"))
            .open()?;
        let outcome = streams.get("box")?.run_fg(exec(["/millstream-agent", "--version"])).await?;
        streams.close().await?;
        Result::<String>::Ok(outcome.stdout())
    });
    let told = told.unwrap_or_else(|error| panic!("{error}\n{}", engine.run(&["logs", "agent"])));
    assert!(told.starts_with("millstream-agent "), "{told}");
    engine.run(&["stop", "--time", "10", "agent"]);
    assert_eq!(engine.run(&["inspect", "--format", "{{.State.ExitCode}}", "agent"]).trim(), "0");
}
