//! A block beside a stressor: how much slower is a computation while the host is kept busy?
//!
//! The stressor runs in the background in a stream of its own until it is stopped, which is no failure. It takes part in no
//! barrier, and says so. With `--streams lab.yaml` the streams `test` and `stress` are where that file puts them: on one
//! host, or on two.

#![expect(clippy::print_stdout, reason = "an example shows what it does")]

mod common;

use std::{
    hint::black_box,
    io::{Write as _, stdout},
    process::ExitCode,
    thread,
    time::Instant,
};

use millstream::{BlockContext, BlockResult, Ready};

/// Keeps every processor of the host busy until it is terminated.
#[millstream::block]
fn stressor() -> BlockResult {
    let processors = thread::available_parallelism()?.get();
    println!("stressing {processors} processors");
    stdout().flush()?;
    let workers: Vec<_> = (0..processors).map(|_| thread::spawn(|| work(u64::MAX))).collect();
    for worker in workers {
        worker.join().map_err(|_| "a worker panicked")?;
    }
    Ok(())
}

/// Computes and writes on its whiteboard how many milliseconds that took.
#[millstream::block]
#[expect(clippy::disallowed_methods, reason = "it measures real time")]
fn compute(ctx: &mut BlockContext) -> BlockResult {
    let begin = Instant::now();
    work(60_000_000);
    ctx.whiteboard(begin.elapsed().as_millis())?;
    Ok(())
}

fn work(rounds: u64) -> u64 {
    let mut value: u64 = 1;
    for round in 0..rounds {
        value = black_box(value.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(round));
    }
    value
}

async fn run(place: common::Place) -> millstream::Result<()> {
    let streams = place.builder("stress")?.open()?;
    let test = streams.get("test")?;
    let quiet = test.run_fg(compute().name("compute-quiet")).await?;
    let stressing = streams.get("stress")?.run_bg(stressor().joins([]));
    stressing.ready(Ready::log("stressing")).await?;
    let busy = test.run_fg(compute().name("compute-busy")).await?;
    println!("the stressor was {}", stressing.stop().await.kind);
    println!("quiet: {} ms, busy: {} ms", quiet.whiteboard().trim(), busy.whiteboard().trim());
    streams.wait().await?;
    println!("results in {}", streams.results_dir().display());
    streams.close().await
}

fn main() -> ExitCode {
    common::main(run)
}
