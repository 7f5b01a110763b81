//! Three variants of one block, one after another in one stream: each has a name, a place and a result of its own.

#![expect(clippy::print_stdout, reason = "an example shows what it does")]

mod common;

use std::{
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream},
    process::ExitCode,
    thread,
};

use millstream::{BlockContext, BlockResult};

const BYTES: usize = 1 << 20;

/// Sends a megabyte through a connection in pieces of some size, and notes how many writes that took.
#[millstream::block]
fn send(ctx: &mut BlockContext, buffer: usize) -> BlockResult {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let mut connection = TcpStream::connect(listener.local_addr()?)?;
    let reading = thread::spawn(move || listener.accept()?.0.read_to_end(&mut Vec::new()));
    let mut writes = 0;
    for _ in 0..BYTES / buffer {
        connection.write_all(&vec![0; buffer])?;
        writes += 1;
    }
    drop(connection);
    let read = reading.join().map_err(|_| "the reading thread panicked")??;
    ctx.whiteboard(format!("{read} bytes in {writes} writes"))?;
    Ok(())
}

async fn run(place: common::Place) -> millstream::Result<()> {
    let streams = place.builder("variants")?.open()?;
    let stream = streams.get("client")?;
    let variants = [("tiny", 256), ("small", 4096), ("big", 65536)];
    let blocks = variants.map(|(name, buffer)| send(buffer).name(format!("send.{name}")));
    for outcome in stream.run_all_fg(blocks).await? {
        println!("{}: {}", outcome.label(), outcome.whiteboard().trim());
    }
    println!("{} results in the list of this stream", stream.results().as_array().map_or(0, Vec::len));
    streams.close().await
}

fn main() -> ExitCode {
    common::main(run)
}
