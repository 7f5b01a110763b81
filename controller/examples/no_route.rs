//! Proof that two hosts can NOT talk: the block that should fail is expected to, and a control shows that it could succeed.

#![expect(clippy::print_stdout, reason = "an example shows what it does")]

mod common;

use std::{
    net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs as _},
    process::ExitCode,
    time::Duration,
};

use millstream::{BlockContext, BlockResult};

/// Listens for everybody on one port and for its own host alone on another, until the test has tried both.
#[millstream::block]
fn server(ctx: &mut BlockContext) -> BlockResult {
    let public = TcpListener::bind("0.0.0.0:0")?;
    let internal = TcpListener::bind("127.0.0.2:0")?;
    for listener in [&public, &internal] {
        ctx.publish("port", listener.local_addr()?.port())?;
    }
    ctx.barrier("tried", 2)?; // main is the other party
    Ok(())
}

/// Connects to the first or the second port of the server; fails when it cannot.
#[millstream::block]
fn connect(ctx: &mut BlockContext, server: String, which: usize) -> BlockResult {
    let port = ctx.wait::<u16>("port", 2)?[which];
    let address: SocketAddr = (server.as_str(), port).to_socket_addrs()?.next().ok_or("no address")?;
    TcpStream::connect_timeout(&address, Duration::from_secs(5))?;
    Ok(())
}

async fn run(place: common::Place) -> millstream::Result<()> {
    let streams = place.builder("no_route")?.open()?;
    let (server_stream, client) = (streams.get("server")?, streams.get("client")?);
    server_stream.run_bg(server());
    let host = server_stream.host().to_owned();
    // The control: this way is open, so that the failure below says something.
    client.run_fg(connect(host.clone(), 0).name("connect-public")).await?;
    // The proof: to pass would be the failure.
    let closed = connect(host, 1).name("connect-internal").expect_failure();
    println!("{}", client.run_fg(closed).await?.sentence());
    streams.barrier("tried", 2).await?;
    streams.wait().await?; // no failure: the expected one breaks no barrier and fails no test
    streams.close().await
}

fn main() -> ExitCode {
    common::main(run)
}
