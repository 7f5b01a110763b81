//! One server and several clients, all of them classes in one Python file: the server is started first, every client by
//! the same reference, and two barriers hold them together.
//!
//! Without arguments all streams are on this machine. With `--streams lab.yaml` the same runs on the hosts that are
//! defined there as `server` and `client-…`. Needs Python 3 where the blocks run.

#![expect(clippy::print_stdout, reason = "an example shows what it does")]

mod common;

use std::process::ExitCode;

use clap::Parser;
use millstream::reference;

/// Measures TCP throughput from several streams to one.
#[derive(Parser)]
struct Arguments {
    #[command(flatten)]
    place: common::Place,
    /// How long each client sends.
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
}

/// The file with the classes.
const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/multi_netperf.py");

async fn run(arguments: Arguments) -> millstream::Result<()> {
    let streams = arguments.place.builder("multi_netperf")?.open()?;
    if streams.is_empty() {
        // Nobody defined any: two clients and a server on this machine.
        for name in ["server", "client-1", "client-2"] {
            streams.get(name)?;
        }
    }
    let server = streams.get("server")?;
    let clients = streams.select(r"client-\d+")?;
    let parties = clients.len() + 1;

    let serving = server.run_bg(reference(format!("{FILE}:NetServer.test")).param("parties", parties));
    let client = reference(format!("{FILE}:NetPerf.test"))
        .param("parties", parties)
        .param("server", server.host())
        .param("seconds", arguments.seconds);
    for outcome in clients.run_fg(client).await? {
        println!("{}: {}", outcome.stream, outcome.whiteboard().trim());
    }
    println!("server: {}", serving.wait().await?.stdout().trim());
    streams.wait().await?;
    streams.close().await
}

fn main() -> ExitCode {
    common::main(run)
}
