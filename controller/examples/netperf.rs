//! Two streams, one TCP connection between them, held together by barriers: how fast is the way from one to the other?
//!
//! Without arguments both streams are on this machine and nothing needs to be installed. With `--streams lab.yaml`, or with
//! the variable `MILLSTREAM_STREAMS`, the same two functions run on the hosts that are defined there as `server` and
//! `client`. This file holds no line that knows the difference.

#![expect(clippy::print_stdout, reason = "an example shows what it does")]

mod common;

use std::{
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use clap::Parser;
use millstream::{BlockContext, BlockResult};

/// Measures TCP throughput between two streams.
#[derive(Parser)]
struct Arguments {
    #[command(flatten)]
    place: common::Place,
    /// How long to send.
    #[arg(long, default_value_t = 2)]
    seconds: u64,
}

/// Takes one connection, reads until its end, and says how much came.
#[millstream::block]
fn netserver(ctx: &mut BlockContext, parties: usize) -> BlockResult {
    let listener = TcpListener::bind("0.0.0.0:0")?;
    let port = listener.local_addr()?.port();
    println!("listening on port {port}");
    ctx.publish("port", port)?;
    let server = thread::spawn(move || receive(&listener));
    ctx.barrier("setup", parties)?;
    ctx.barrier("finished", parties)?;
    let received = server.join().map_err(|_| "the receiving thread panicked")??;
    println!("received {received} bytes");
    ctx.whiteboard(format!("received {received} bytes"))?;
    Ok(())
}

fn receive(listener: &TcpListener) -> std::io::Result<u64> {
    let (mut connection, peer) = listener.accept()?;
    println!("connection from {peer}");
    let mut buffer = vec![0; 256 * 1024];
    let mut received = 0;
    loop {
        match connection.read(&mut buffer)? {
            0 => return Ok(received),
            length => received += length as u64,
        }
    }
}

/// Sends for some seconds and writes the throughput on its whiteboard.
#[millstream::block]
#[expect(clippy::disallowed_methods, reason = "it measures real time")]
fn netperf(ctx: &mut BlockContext, server: String, parties: usize, seconds: u64) -> BlockResult {
    let port = ctx.wait::<u16>("port", 1)?[0];
    ctx.barrier("setup", parties)?;
    let mut connection = TcpStream::connect((server.as_str(), port))?;
    println!("connected to {server} port {port}");
    let buffer = vec![0x5a; 256 * 1024];
    let begin = Instant::now();
    let mut sent = 0;
    let mut told = 0;
    while begin.elapsed() < Duration::from_secs(seconds) {
        connection.write_all(&buffer)?;
        sent += buffer.len() as u64;
        if begin.elapsed().as_millis() / 500 > told {
            told = begin.elapsed().as_millis() / 500;
            println!("{sent} bytes after {:.1} s", begin.elapsed().as_secs_f64());
        }
    }
    drop(connection);
    #[expect(clippy::cast_precision_loss, reason = "a figure for people")]
    let gigabits = sent as f64 * 8.0 / 1e9 / begin.elapsed().as_secs_f64();
    ctx.whiteboard(format!("{gigabits:.2} Gbit/s"))?;
    ctx.barrier("finished", parties)?;
    Ok(())
}

async fn run(arguments: Arguments) -> millstream::Result<()> {
    let builder = arguments.place.builder("netperf")?.on_log(|line| println!("{:>8} | {line}", line.stream));
    let streams = builder.open()?;
    let server = streams.get("server")?;
    let client = streams.get("client")?;

    server.run_bg(netserver(2));
    let outcome = client.run_fg(netperf(server.host().to_owned(), 2, arguments.seconds)).await?;
    streams.wait().await?;

    println!("\nthroughput: {}", outcome.whiteboard().trim());
    let results = streams.results_dir().to_path_buf();
    streams.close().await?;
    println!("results in {}:", results.display());
    show(&results, 1);
    Ok(())
}

/// Prints what lies in a directory, as a tree.
fn show(directory: &Path, depth: usize) {
    let Ok(entries) = std::fs::read_dir(directory) else { return };
    let mut paths: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    paths.sort();
    for path in paths {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let suffix = if path.is_dir() { "/" } else { "" };
        println!("{:indent$}{name}{suffix}", "", indent = depth * 2);
        if path.is_dir() {
            show(&path, depth + 1);
        }
    }
}

fn main() -> ExitCode {
    common::main(run)
}
