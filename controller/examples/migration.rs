//! Migration under memory stress, with a process as the guest: it moves from one host to the other while it works.
//!
//! The guest counts, and its memory changes with every step. The source sends that memory while the guest goes on, then stops
//! it, sends what has changed, and the destination goes on from there. A stressor keeps the memory of the source busy meanwhile.

#![expect(clippy::print_stdout, reason = "an example shows what it does")]

mod common;

use std::{
    hint::black_box,
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream},
    process::ExitCode,
};

use millstream::{BlockContext, BlockResult, Ready};

const PAGES: usize = 1024;
const PAGE: usize = 4096;

/// The guest: a memory, and how far it has counted.
struct Guest {
    memory: Vec<u8>,
    steps: usize,
}

impl Guest {
    /// One step changes one page, and says which.
    fn step(&mut self) -> usize {
        let page = self.steps * 7 % PAGES;
        self.steps += 1;
        let value = self.memory[page * PAGE].wrapping_add(1);
        self.memory[page * PAGE..][..PAGE].fill(value);
        page
    }

    fn checksum(&self) -> u64 {
        self.memory
            .iter()
            .fold(self.steps as u64, |sum, &byte| sum.wrapping_mul(31).wrapping_add(byte.into()))
    }
}

fn send_page(connection: &mut TcpStream, guest: &Guest, page: usize) -> std::io::Result<()> {
    connection.write_all(&(page as u64).to_be_bytes())?;
    connection.write_all(&guest.memory[page * PAGE..][..PAGE])
}

fn receive_number(connection: &mut TcpStream) -> std::io::Result<u64> {
    let mut bytes = [0; 8];
    connection.read_exact(&mut bytes)?;
    Ok(u64::from_be_bytes(bytes))
}

/// Runs the guest, and moves it away while it works.
#[millstream::block]
fn source(ctx: &mut BlockContext, destination: String) -> BlockResult {
    let mut guest = Guest { memory: vec![0; PAGES * PAGE], steps: 0 };
    let port = ctx.wait::<u16>("port", 1)?[0];
    ctx.barrier("migrate", 2)?;
    let mut connection = TcpStream::connect((destination.as_str(), port))?;
    let mut changed = Vec::new();
    for page in 0..PAGES {
        send_page(&mut connection, &guest, page)?;
        changed.push(guest.step()); // it goes on while it is being moved
    }
    // From here on it stands still: what it changed meanwhile is sent again, then where it stands.
    for &page in &changed {
        send_page(&mut connection, &guest, page)?;
    }
    connection.write_all(&u64::MAX.to_be_bytes())?;
    connection.write_all(&(guest.steps as u64).to_be_bytes())?;
    ctx.whiteboard(format!("left after {} steps with checksum {:x}", guest.steps, guest.checksum()))?;
    Ok(())
}

/// Takes the guest in and lets it go on.
#[millstream::block]
fn destination(ctx: &mut BlockContext) -> BlockResult {
    let listener = TcpListener::bind("0.0.0.0:0")?;
    ctx.publish("port", listener.local_addr()?.port())?;
    ctx.barrier("migrate", 2)?;
    let (mut connection, _) = listener.accept()?;
    let mut guest = Guest { memory: vec![0; PAGES * PAGE], steps: 0 };
    loop {
        match receive_number(&mut connection)? {
            u64::MAX => break,
            page => {
                let page = usize::try_from(page)?;
                connection.read_exact(&mut guest.memory[page * PAGE..][..PAGE])?;
            }
        }
    }
    guest.steps = usize::try_from(receive_number(&mut connection)?)?;
    ctx.whiteboard(format!("arrived after {} steps with checksum {:x}", guest.steps, guest.checksum()))?;
    guest.step();
    println!("the guest goes on: step {}", guest.steps);
    Ok(())
}

/// Keeps memory busy until it is stopped.
#[millstream::block]
fn memory_stress() -> BlockResult {
    let mut memory = vec![0_u8; 32 << 20];
    println!("stressing");
    loop {
        for byte in memory.iter_mut().step_by(PAGE) {
            *byte = black_box(byte.wrapping_add(1));
        }
    }
}

async fn run(place: common::Place) -> millstream::Result<()> {
    let streams = place.builder("migration")?.fail_fast().open()?;
    let stressing = streams.get("stress")?.run_bg(memory_stress().joins([])); // takes part in no barrier, and says so
    stressing.ready(Ready::log("^stressing$")).await?;
    let there = streams.get("destination")?;
    let arriving = there.run_bg(destination());
    let left = streams.get("source")?.run_fg(source(there.host().to_owned())).await?;
    let arrived = arriving.wait().await?;
    stressing.stop().await;
    println!("source: {}destination: {}", left.whiteboard(), arrived.whiteboard());
    let after = |text: String| text.split_once("after ").map(|(_, rest)| rest.to_owned());
    let same = after(left.whiteboard()) == after(arrived.whiteboard());
    println!("{}", if same { "nothing of the guest was lost" } else { "the guest has changed on its way" });
    streams.wait().await?;
    streams.close().await
}

fn main() -> ExitCode {
    common::main(run)
}
