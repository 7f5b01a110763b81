//! Hosts check one another: every stream listens, tells all others where, and then connects to each of them.
//!
//! Without arguments it is three streams on this machine; with `--streams lab.yaml` it is every stream defined there. A
//! barrier keeps everybody listening until all have been answered.

#![expect(clippy::print_stdout, reason = "an example shows what it does")]

mod common;

use std::{
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream, ToSocketAddrs as _},
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use millstream::{BlockContext, BlockResult};

/// Answers everybody's greeting, greets everybody, and notes how long each answer took.
#[millstream::block]
#[expect(clippy::disallowed_methods, reason = "it measures real time")]
fn ping(ctx: &mut BlockContext, host: String, parties: usize) -> BlockResult {
    let listener = TcpListener::bind("0.0.0.0:0")?;
    let me = ctx.stream().to_string();
    ctx.publish("listening", format!("{me} {host} {}", listener.local_addr()?.port()))?;
    let answering = thread::spawn(move || answer(&listener, parties - 1));
    for peer in ctx.wait::<String>("listening", parties)? {
        let [name, host, port] = peer.split(' ').collect::<Vec<_>>()[..] else {
            return Err(format!("not a peer: {peer}").into());
        };
        if name == me {
            continue;
        }
        let address = (host, port.parse()?).to_socket_addrs()?.next().ok_or("no address")?;
        let begin = Instant::now();
        let mut connection = TcpStream::connect_timeout(&address, Duration::from_secs(5))
            .map_err(|error| format!("{name} at {address} does not answer: {error}"))?;
        connection.set_read_timeout(Some(Duration::from_secs(5)))?;
        connection.write_all(b"ping")?;
        connection.read_exact(&mut [0; 4])?;
        let took = begin.elapsed();
        println!("{me} -> {name} ({address}): {took:?}");
        ctx.whiteboard(format!("{name} answers after {took:?}"))?;
    }
    answering.join().map_err(|_| "the answering thread panicked")??;
    // Nobody stops listening before everybody has been answered.
    ctx.barrier("answered", parties)?;
    Ok(())
}

fn answer(listener: &TcpListener, peers: usize) -> std::io::Result<()> {
    for _ in 0..peers {
        let (mut connection, _) = listener.accept()?;
        let mut greeting = [0; 4];
        connection.read_exact(&mut greeting)?;
        connection.write_all(b"pong")?;
    }
    Ok(())
}

async fn run(place: common::Place) -> millstream::Result<()> {
    let streams = place.builder("ping_all")?.open()?;
    if streams.is_empty() {
        // Nobody defined any: three on this machine.
        for name in ["one", "two", "three"] {
            streams.get(name)?;
        }
    }
    let parties = streams.len();
    let mut tasks = Vec::new();
    for stream in streams.all().iter() {
        tasks.push(stream.run_bg(ping(stream.host().to_owned(), parties)));
    }
    streams.wait().await?;
    for task in tasks {
        println!("{}:\n  {}", task.stream(), task.outcome().await.whiteboard().trim().replace('\n', "\n  "));
    }
    println!("results in {}", streams.results_dir().display());
    streams.close().await
}

fn main() -> ExitCode {
    common::main(run)
}
