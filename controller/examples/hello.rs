//! Two local streams: one waits for the other, and both are seen live.

use millstream::{
    Ready, Streams,
    blocking::{BlockingStream as _, BlockingStreams as _, BlockingTask as _, block_on},
    exec, shell,
};

fn main() -> millstream::Result<()> {
    millstream::enter();
    let streams =
        Streams::builder("hello").on_log(|line| eprintln!("{}/{}: {line}", line.stream, line.task)).open()?;
    eprintln!("{}", streams.get("one")?.run_fg_blocking(exec(["true"]))?);
    let server = streams.get("server")?.run_bg(shell("echo listening; exec sleep 60"));
    server.ready_blocking(Ready::log("listening"))?;
    let outcome = streams.get("client")?.run_fg_blocking(shell("echo hello > \"$MILLSTREAM_WHITEBOARD\""))?;
    eprintln!("whiteboard: {}", outcome.whiteboard());
    eprintln!("{}", block_on(server.stop()));
    streams.wait_blocking()?;
    eprintln!("results: {}", streams.results_dir().display());
    streams.close_blocking()
}
