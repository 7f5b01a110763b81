//! One server and several clients, all of them classes in one Python file: the server is started first, every client by
//! the same reference, and two barriers hold them together.
//!
//! Without arguments all streams are on this machine. With `--streams lab.yaml` the same runs on the hosts that are
//! defined there as `server` and `client-…`. Needs Python 3 where the blocks run.

#![expect(clippy::print_stdout, reason = "an example shows what it does")]

use std::{path::PathBuf, process::ExitCode};

use clap::Parser;
use millstream::{Params, Streams, blocking::block_on, reference};

/// Measures TCP throughput from several streams to one.
#[derive(Parser)]
struct Arguments {
    /// Where the streams are; two clients and a server on this machine when not given.
    #[arg(long)]
    streams: Option<PathBuf>,
    /// How long each client sends.
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// Where results go.
    #[arg(long, default_value = "results")]
    results: PathBuf,
}

/// The file with the classes.
const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/multi_netperf.py");

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
    let mut builder = Streams::builder("multi_netperf").results_dir(&arguments.results);
    builder = match &arguments.streams {
        Some(path) => builder.params(Params::load(path)?),
        None => builder.stream("server", "local").stream("client-1", "local").stream("client-2", "local"),
    };
    let streams = builder.open()?;
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
