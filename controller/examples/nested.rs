//! A scenario inside another one: a block moves traffic between two streams, while the test works on the same hosts.

#![expect(clippy::print_stdout, reason = "an example shows what it does")]

mod common;

use std::{
    io::{self, Read as _},
    net::{TcpListener, TcpStream},
    process::ExitCode,
};

use millstream::{
    BlockContext, BlockResult, Streams,
    blocking::{BlockingStream as _, BlockingStreams as _, BlockingTask as _},
    shell,
};

const BYTES: u64 = 64 * 1024 * 1024;

#[millstream::block]
fn receive(ctx: &mut BlockContext) -> BlockResult {
    let listener = TcpListener::bind("0.0.0.0:0")?;
    ctx.publish("port", listener.local_addr()?.port())?;
    let (mut connection, _) = listener.accept()?;
    let received = io::copy(&mut connection, &mut io::sink())?;
    ctx.whiteboard(format!("{received} bytes"))?;
    Ok(())
}

#[millstream::block]
fn send(ctx: &mut BlockContext, host: String, bytes: u64) -> BlockResult {
    let port: Vec<u16> = ctx.wait("port", 1)?;
    let mut connection = TcpStream::connect((host.as_str(), port[0]))?;
    io::copy(&mut io::repeat(7).take(bytes), &mut connection)?;
    Ok(())
}

#[millstream::block]
fn traffic(ctx: &mut BlockContext, bytes: u64) -> BlockResult {
    let streams = Streams::open("traffic")?; // those of the test, with queues, barriers and topics of their own
    let sink = streams.get("sink")?;
    let receiving = sink.run_bg(receive());
    streams.get("source")?.run_fg_blocking(send(sink.host().to_owned(), bytes))?;
    ctx.whiteboard(receiving.wait_blocking()?.whiteboard().trim())?;
    streams.close_blocking()?;
    Ok(())
}

async fn run(place: common::Place) -> millstream::Result<()> {
    let streams = place.builder("nested")?.open()?;
    for stream in ["sink", "source"] {
        streams.get(stream)?; // defined in a file, or on this machine
    }
    let moving = streams.get("conductor")?.run_bg(traffic(BYTES).may_run_streams());
    // Neither waits for the other: inside the block, the stream `source` has a queue of its own.
    let working = streams.get("source")?.run_fg(shell("echo the test works beside it")).await?;
    print!("{}", working.stdout());
    let moved = moving.wait().await?;
    println!("the inner scenario moved {}", moved.whiteboard().trim());
    for inner in ["sink/1-receive", "source/1-send"] {
        println!("{inner} is there: {}", moved.results.join("streams").join(inner).is_dir());
    }
    streams.wait().await?;
    streams.close().await
}

fn main() -> ExitCode {
    common::main(run)
}
