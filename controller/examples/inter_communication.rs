//! One service under attack: somebody watches it all the time, the attackers are prepared on their hosts and then started
//! at once, and how far apart they began is told.
//!
//! Without arguments all streams are on this machine. With `--streams lab.yaml` the same runs on the hosts that are
//! defined there as `service`, `watcher` and `attacker-…`. Needs Python 3 where the blocks run.

#![expect(clippy::print_stdout, reason = "an example shows what it does")]

mod common;

use std::process::ExitCode;

use clap::Parser;
use millstream::reference;

/// Attacks a service from several streams at once.
#[derive(Parser)]
struct Arguments {
    #[command(flatten)]
    place: common::Place,
    /// How many connections each attacker opens.
    #[arg(long, default_value_t = 20)]
    connections: u32,
}

/// The file with the classes.
const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/inter_communication.py");

async fn run(arguments: Arguments) -> millstream::Result<()> {
    let streams = arguments.place.builder("inter_communication")?.open()?;
    if streams.is_empty() {
        // Nobody defined any: two attackers on this machine.
        for name in ["service", "watcher", "attacker-1", "attacker-2"] {
            streams.get(name)?;
        }
    }
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

fn main() -> ExitCode {
    common::main(run)
}
