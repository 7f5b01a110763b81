//! Standard input and output as one connection to the agent on this host: what ssh and containers run.

use std::{
    io,
    os::fd::{AsFd as _, OwnedFd},
    path::{Path, PathBuf},
};

use tokio::{
    io::{AsyncWriteExt as _, copy},
    net::UnixStream,
};

/// Why nothing is relayed.
#[derive(Debug, thiserror::Error)]
pub(super) enum RelayError {
    /// No agent.
    #[error("no agent listens on `{}`: {}; start one with `millstream-agent serve`, or name its socket with `--socket`", path.display(), millstream_common::tls::reason(source))]
    NoAgent {
        /// Its socket.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The standard descriptors.
    #[error("failed to take over the standard input and output")]
    Standard(#[source] io::Error),
}

/// Relays until either side ends.
pub(super) async fn run(socket: &Path) -> Result<(), RelayError> {
    let (input, output) = take_standard().map_err(RelayError::Standard)?;
    let agent = UnixStream::connect(socket)
        .await
        .map_err(|source| RelayError::NoAgent { path: socket.to_owned(), source })?;
    let (mut from_agent, mut to_agent) = agent.into_split();
    let mut input = tokio::fs::File::from_std(input.into());
    let mut output = tokio::fs::File::from_std(output.into());
    let inward = async {
        let copied = copy(&mut input, &mut to_agent).await;
        let ended = to_agent.shutdown().await;
        copied.and(ended)
    };
    let outward = async {
        copy(&mut from_agent, &mut output).await?;
        output.flush().await
    };
    // The end of one side is the end of both: a controller that has gone says nothing more, and neither does an agent. Why
    // a pipe broke is known to whoever broke it.
    let _why: io::Result<()> = tokio::select! {
        ended = inward => ended,
        ended = outward => ended,
    };
    Ok(())
}

/// Moves standard input and output away, so that nothing that prints can reach the connection.
fn take_standard() -> io::Result<(OwnedFd, OwnedFd)> {
    let input = rustix::io::fcntl_dupfd_cloexec(io::stdin().as_fd(), 3)?;
    let output = rustix::io::fcntl_dupfd_cloexec(io::stdout().as_fd(), 3)?;
    let null = rustix::fs::open(c"/dev/null", rustix::fs::OFlags::RDWR, rustix::fs::Mode::empty())?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(io::stderr().as_fd())?;
    Ok((input, output))
}
