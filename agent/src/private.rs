//! An agent behind one Unix socket in a private directory, as this program starts it again for itself: what the agent of local
//! streams and the one on demand have in common.
//!
//! It says `ready` and one newline on its standard output when it listens, and nothing else; standard error is its log,
//! of which whoever started it shows the last line.

use std::{
    fmt, fs,
    future::Future,
    io,
    io::Write as _,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::fs::PermissionsExt as _,
    },
    process::ExitCode,
};

use millstream_common::clock::World;
use tokio::{
    net::UnixListener,
    signal::unix::{Signal, SignalKind, signal},
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;
use tracing::error;

use crate::door::{Door, DoorConfig, DoorError, Ending, Listener};

/// Its socket in its directory.
pub(crate) const SOCKET: &str = "agent.sock";
/// What it says when it listens; a newline follows.
pub(crate) const READY: &str = "ready";

/// Why such an agent does not serve.
#[derive(Debug, thiserror::Error)]
pub enum PrivateError {
    /// A system call that cannot fail on a healthy host.
    #[error("failed to {attempt}: {}", millstream_common::tls::reason(source))]
    System {
        /// What was attempted.
        attempt: &'static str,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The door does not open.
    #[error(transparent)]
    Door(#[from] DoorError),
}

pub(crate) fn failed(attempt: &'static str) -> impl FnOnce(io::Error) -> PrivateError {
    move |source| PrivateError::System { attempt, source }
}

/// The end of the role: what went wrong is the last word in the log.
pub(crate) fn told(result: Result<(), impl fmt::Display>) -> ExitCode {
    let Err(error) = result else { return ExitCode::SUCCESS };
    // Standard error may be closed; the exit code says it as well.
    let _closed: io::Result<()> = writeln!(io::stderr(), "{error}");
    ExitCode::FAILURE
}

/// Serves on a runtime of its own.
pub(crate) fn run<E: From<PrivateError>>(
    log: &str,
    serving: impl Future<Output = Result<(), E>>,
) -> Result<(), E> {
    crate::cli::log_to_standard_error(log);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(failed("start the runtime"))?;
    let served = runtime.block_on(serving);
    // Threads that wait in the kernel for something that will not come hold nobody up.
    runtime.shutdown_background();
    served
}

/// An agent that listens.
pub(crate) struct Served {
    pub(crate) ending: Ending,
    /// Readable when a connection has been made that was not accepted yet.
    pub(crate) arriving: OwnedFd,
    terminate: Signal,
    shutdown: CancellationToken,
    serving: JoinHandle<Result<(), DoorError>>,
}

impl Served {
    /// Opens the door in its directory and serves. Nobody is told yet: see [`Served::say_ready`].
    pub(crate) async fn begin(config: DoorConfig) -> Result<Self, PrivateError> {
        let socket = config.state.join(SOCKET);
        let door = Door::open(config, World::system()).await?;
        let ending = door.ending();
        // The door's own lock says that no other agent uses the directory: what is there was left behind.
        let _absent: io::Result<()> = fs::remove_file(&socket);
        let listener = UnixListener::bind(&socket).map_err(failed("listen on a socket"))?;
        fs::set_permissions(&socket, fs::Permissions::from_mode(0o600))
            .map_err(failed("keep its socket for this user"))?;
        let arriving = listener.as_fd().try_clone_to_owned().map_err(failed("watch its socket"))?;
        let terminate = signal(SignalKind::terminate()).map_err(failed("listen to SIGTERM"))?;
        let shutdown = CancellationToken::new();
        let serving = tokio::spawn(door.serve(vec![Listener::Unix(listener)], drop, shutdown.clone()));
        Ok(Self { ending, arriving, terminate, shutdown, serving })
    }

    /// Says that it listens, and closes its standard output: nothing that it starts shall hold it.
    pub(crate) fn say_ready(&self) -> Result<(), PrivateError> {
        let say = || -> io::Result<()> {
            let mut output = io::stdout().lock();
            writeln!(output, "{READY}")?;
            output.flush()?;
            let null = rustix::fs::open(c"/dev/null", rustix::fs::OFlags::WRONLY, rustix::fs::Mode::empty())?;
            Ok(rustix::stdio::dup2_stdout(&null)?)
        };
        say().map_err(failed("say that it is ready"))
    }

    /// Waits until it is asked to end.
    pub(crate) async fn asked(&mut self) {
        self.terminate.recv().await;
    }

    /// Ends every session, and then the connections: a controller that closes its sessions itself gets its answers.
    pub(crate) async fn end(self) -> Result<(), PrivateError> {
        for survivor in self.ending.close_all().await {
            error!(%survivor, "left behind");
        }
        self.shutdown.cancel();
        match self.serving.await {
            Ok(served) => Ok(served?),
            Err(error) => Err(failed("serve")(io::Error::other(error))),
        }
    }
}
