//! One service, attacked from many streams: all clients begin only when all are there, and the service counts them.

#![expect(clippy::print_stdout, reason = "an example shows what it does")]

mod common;

use std::{
    io::Write as _,
    net::{TcpListener, TcpStream},
    process::ExitCode,
};

use millstream::{BlockContext, BlockResult};

const CLIENTS: usize = 4;
const REQUESTS: usize = 50;

/// Answers a known number of requests and says how many came.
#[millstream::block]
fn service(ctx: &mut BlockContext, requests: usize) -> BlockResult {
    let listener = TcpListener::bind("0.0.0.0:0")?;
    ctx.publish("port", listener.local_addr()?.port())?;
    for _ in 0..requests {
        let (mut client, _) = listener.accept()?;
        client.write_all(b"served\n")?;
    }
    ctx.whiteboard(format!("{requests} requests"))?;
    Ok(())
}

/// Asks again and again, at the same time as its siblings.
#[millstream::block]
fn attack(ctx: &mut BlockContext, service: String, attackers: usize, requests: usize) -> BlockResult {
    let port = ctx.wait::<u16>("port", 1)?[0];
    ctx.barrier("attack", attackers)?;
    for _ in 0..requests {
        let connection = TcpStream::connect((service.as_str(), port))?;
        if std::io::read_to_string(connection)? != "served\n" {
            return Err("the service gave a wrong answer".into());
        }
    }
    Ok(())
}

async fn run(place: common::Place) -> millstream::Result<()> {
    let streams = place.builder("many_clients")?.open()?;
    let place_of_service = streams.get("service")?;
    for number in 1..=CLIENTS {
        streams.get(format!("client-{number}"))?; // defined in a file, or on this machine
    }
    let clients = streams.select(r"client-\d+")?;
    let serving = place_of_service.run_bg(service(clients.len() * REQUESTS));
    let attacking = attack(place_of_service.host().to_owned(), clients.len(), REQUESTS);
    clients.run_fg(attacking).await?; // the same block on each of them
    println!("{} clients, {}", clients.len(), serving.wait().await?.whiteboard().trim());
    streams.close().await
}

fn main() -> ExitCode {
    common::main(run)
}
