//! A coordinated start: the same block on several streams at once, then different blocks on different streams at once.

#![expect(clippy::print_stdout, reason = "an example shows what it does")]

mod common;

use std::process::ExitCode;

use millstream::{shell, start_together};

async fn run(place: common::Place) -> millstream::Result<()> {
    let streams = place.builder("coordinated_start")?.open()?;
    let attackers = streams.slice(0..3)?;
    // One block on a group: files are shipped and processes made first, then each host is told to begin.
    let attack = attackers.run_synchronized(shell("echo attack").name("attack")).await?;
    println!("{} attackers began {} apart", attack.tasks.len(), told(attack.skew));
    // Different blocks: prepared one by one, each holds its place in its stream until it is started.
    let cut = streams.get(0)?.prepare(shell("echo cut the link").name("cut"));
    let watch = streams.get(1)?.prepare(shell("echo watch the traffic").name("watch"));
    let both = start_together([cut, watch]).await?;
    println!("cut and watch began {} apart", told(both.skew));
    streams.wait().await?;
    streams.close().await
}

fn told(skew: Option<std::time::Duration>) -> String {
    skew.map_or("an unknown time".to_owned(), |skew| format!("{:.1} ms", skew.as_secs_f64() * 1000.0))
}

fn main() -> ExitCode {
    common::main(run)
}
