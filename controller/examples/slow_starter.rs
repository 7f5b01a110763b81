//! Three streams, one of which starts slowly: the worker begins with whoever is ready first, and tells all when it is done.

#![expect(clippy::print_stdout, reason = "an example shows what it does")]

mod common;

use std::process::ExitCode;

use millstream::shell;

const SSH: &str = r#"
    echo "ssh listens"
    millstream-sync barrier ssh_started 2
    millstream-sync barrier finished 3
    echo "ssh stops"
"#;

const HTTP: &str = r#"
    sleep 1 # this one takes its time
    echo "http listens"
    millstream-sync barrier http_started 2
    millstream-sync barrier finished 3
    echo "http stops"
"#;

const WORKER: &str = r#"
    millstream-sync barrier ssh_started 2
    echo "checks ssh while http is still starting"
    millstream-sync barrier http_started 2
    echo "checks http"
    millstream-sync barrier finished 3
"#;

async fn run(place: common::Place) -> millstream::Result<()> {
    let streams =
        place.builder("slow_starter")?.on_log(|line| println!("{:>6} | {line}", line.stream)).open()?;
    for (stream, text) in [("ssh", SSH), ("http", HTTP), ("worker", WORKER)] {
        streams.get(stream)?.run_bg(shell(text).name(stream));
    }
    streams.wait().await?; // names whoever failed, and counts those who waited for it as followers
    println!("all three have ended");
    streams.close().await
}

fn main() -> ExitCode {
    common::main(run)
}
