//! A controller in a process of its own, for tests that kill it or weigh it: runs one shell block on one stream.
//!
//! `controller-under-test DEFINITIONS RESULTS [--lease-ms N] [--linger] STREAM SHELL-TEXT` prints the block's lines as they
//! arrive, then `stdout: PATH` and the outcome. With `--linger` it then waits for the end of its input. It decides nothing.

#![expect(clippy::print_stdout, reason = "a program for tests that read it")]

use std::{env, io::Read as _, time::Duration};

use millstream::{Params, Streams, shell};

#[tokio::main(flavor = "current_thread")]
async fn main() -> millstream::Result<()> {
    let mut arguments: Vec<String> = env::args().skip(1).collect();
    let linger = take_flag(&mut arguments, "--linger");
    let lease = take_value(&mut arguments, "--lease-ms").map(|text| text.parse().expect("a number"));
    let [definitions, results, stream, text] = arguments.as_slice() else {
        panic!("four arguments: definitions, results, stream, shell text");
    };
    let mut builder = Streams::builder("under-test").params(Params::load(definitions)?).results_dir(results);
    if let Some(lease) = lease {
        builder = builder.lease(Duration::from_millis(lease));
    }
    let streams = builder.open()?;
    let task = streams.get(stream.as_str())?.run_bg(shell(text.as_str()).name("block"));
    // A long log is counted, not shown: what reads this program would be the slow end.
    let mut logs = task.logs();
    let mut shown = 0;
    while let Some(line) = logs.next().await {
        if shown < 100 {
            println!("{line}");
            shown += 1;
        }
    }
    let outcome = task.outcome().await;
    println!("stdout: {}", outcome.stdout_path().display());
    println!("{outcome}");
    if linger {
        let mut rest = Vec::new();
        std::io::stdin().read_to_end(&mut rest).expect("standard input can be read");
    }
    streams.close().await
}

fn take_flag(arguments: &mut Vec<String>, name: &str) -> bool {
    let before = arguments.len();
    arguments.retain(|argument| argument != name);
    arguments.len() < before
}

fn take_value(arguments: &mut Vec<String>, name: &str) -> Option<String> {
    let at = arguments.iter().position(|argument| argument == name)?;
    arguments.remove(at);
    Some(arguments.remove(at))
}
