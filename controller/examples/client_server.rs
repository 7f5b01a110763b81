//! Client and server: the client starts when the server says that it is ready, the server is stopped when the client is done.

#![expect(clippy::print_stdout, reason = "an example shows what it does")]

mod common;

use std::{
    io::Write as _,
    net::{TcpListener, TcpStream},
    process::ExitCode,
};

use millstream::{BlockContext, BlockResult, Ready};

/// Serves until it is stopped.
#[millstream::block]
fn server(ctx: &mut BlockContext) -> BlockResult {
    let listener = TcpListener::bind("0.0.0.0:0")?;
    ctx.publish("port", listener.local_addr()?.port())?;
    println!("listening"); // what main waits for
    loop {
        let (mut client, _) = listener.accept()?;
        client.write_all(b"hello\n")?;
    }
}

/// Asks once, and keeps the answer.
#[millstream::block]
fn client(ctx: &mut BlockContext, server: String) -> BlockResult {
    let port = ctx.wait::<u16>("port", 1)?[0];
    let connection = TcpStream::connect((server.as_str(), port))?;
    ctx.whiteboard(std::io::read_to_string(connection)?.trim())?;
    Ok(())
}

async fn run(place: common::Place) -> millstream::Result<()> {
    let streams = place.builder("client_server")?.open()?;
    let place_of_server = streams.get("server")?;
    let serving = place_of_server.run_bg(server()); // returns at once
    serving.ready(Ready::log("^listening$")).await?; // an error if the server ends first
    let asking = client(place_of_server.host().to_owned());
    let outcome = streams.get("client")?.run_fg(asking).await?; // an error if the client fails
    println!("the server answers: {}", outcome.whiteboard().trim());
    println!("the server was {}", serving.stop().await.kind); // a stop is no failure
    streams.wait().await?;
    streams.close().await
}

fn main() -> ExitCode {
    common::main(run)
}
