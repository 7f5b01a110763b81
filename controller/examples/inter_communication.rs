//! One service under attack: somebody watches it all the time, the attackers are prepared on their hosts and then started
//! at once, and how far apart they began is told.
//!
//! Without arguments all streams are on this machine. With `--streams lab.yaml` the same runs on the hosts that are
//! defined there as `service`, `watcher` and `attacker-…`. Needs Python 3 where the blocks run.

#![expect(clippy::print_stdout, reason = "an example shows what it does")]

use std::{path::PathBuf, process::ExitCode};

use clap::Parser;
use millstream::{Params, Streams, blocking::block_on, reference};

/// Attacks a service from several streams at once.
#[derive(Parser)]
struct Arguments {
    /// Where the streams are; all of them on this machine when not given.
    #[arg(long)]
    streams: Option<PathBuf>,
    /// How many connections each attacker opens.
    #[arg(long, default_value_t = 20)]
    connections: u32,
    /// Where results go.
    #[arg(long, default_value = "results")]
    results: PathBuf,
}

/// The file with the classes.
const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/inter_communication.py");

fn main() -> ExitCode {
    millstream::enter();
    match block_on(run(&Arguments::parse())) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:?}");
            ExitCode::FAILURE
        }
    }
}

async fn run(arguments: &Arguments) -> millstream::Result<()> {
    let mut builder = Streams::builder("inter_communication").results_dir(&arguments.results);
    builder = match &arguments.streams {
        Some(path) => builder.params(Params::load(path)?),
        None => ["service", "watcher", "attacker-1", "attacker-2"]
            .into_iter()
            .fold(builder, |builder, name| builder.stream(name, "local")),
    };
    let streams = builder.open()?;
    let service = streams.get("service")?;
    let attackers = streams.select(r"attacker-\d+")?;
    let block = |class: &str| reference(format!("{FILE}:{class}.test")).param("service", service.host());

    let serving = service.run_bg(block("Service"));
    let watching = streams.get("watcher")?.run_bg(block("Watcher").param("attackers", attackers.len()));
    // Nobody attacks what nobody watches yet.
    streams.wait_topic("watching", 1).await?;
    let attack = block("Attacker").param("connections", arguments.connections);
    let started = attackers.run_synchronized(attack).await?;
    if let Some(skew) = started.skew {
        println!("{} attackers began within {:.1} ms", started.tasks.len(), skew.as_secs_f64() * 1000.0);
    }
    for task in &started.tasks {
        println!("{}: {}", task.stream(), task.wait().await?.whiteboard().trim());
    }
    println!("watcher: {}", watching.wait().await?.whiteboard().trim());
    println!("service: {}", serving.wait().await?.whiteboard().trim());
    streams.wait().await?;
    streams.close().await
}
