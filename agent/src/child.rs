//! The agent of local streams: a child of the test, with its supervisors inside.
//!
//! It is told a private directory, listens there on one Unix socket, says `ready` and one newline on its standard output,
//! and ends when its standard input does, which also happens when its parent dies in any way, or on SIGTERM: then every
//! session is closed, and the directory is removed. It is a session of its own for the kernel, so that a signal to the test's process group
//! does not take it along before it has cleaned up. It prints nothing else.

use std::{
    env,
    ffi::OsString,
    fs, io,
    io::Write as _,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    process::ExitCode,
};

use millstream_common::{clock::World, limits, protocol::Build};
use tokio::{
    io::AsyncReadExt as _,
    net::{UnixListener, unix::pipe},
    signal::unix::{SignalKind, signal},
};
use tokio_util::sync::CancellationToken;
use tracing::error;

use crate::{
    door::{Door, DoorConfig, DoorError, Listener, Supervisors},
    entry::{Relaunch, is_entry_variable},
    session::Bounds,
};

/// Its socket in its directory.
const SOCKET: &str = "agent.sock";
/// What it says when it listens.
const READY: &str = "ready\n";

/// Why the child agent does not run.
#[derive(Debug, thiserror::Error)]
pub enum ChildError {
    /// It was not told where.
    #[error("the role needs one argument: a private directory")]
    Arguments,
    /// A system call that cannot fail on a healthy host.
    #[error("failed to {attempt}: {}", millstream_common::tls::reason(source))]
    System {
        /// What was attempted.
        attempt: &'static str,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The directory is open to others.
    #[error("the directory `{}` can be entered by others: make it with mode 0700", path.display())]
    Open {
        /// The directory.
        path: PathBuf,
    },
    /// The door does not open.
    #[error(transparent)]
    Door(#[from] DoorError),
}

fn failed(attempt: &'static str) -> impl FnOnce(io::Error) -> ChildError {
    move |source| ChildError::System { attempt, source }
}

/// The role `child`, for a program that can be started again as it is: `arguments` are the directory, and how.
pub(crate) fn main(arguments: Vec<OsString>, relaunch: Relaunch) -> ExitCode {
    let mut arguments = arguments.into_iter();
    let result = match (arguments.next(), arguments.next()) {
        (Some(directory), None) => run(Path::new(&directory), relaunch),
        _ => Err(ChildError::Arguments),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Standard error is the log of this child; whoever started it shows its last line.
            let _closed: io::Result<()> = writeln!(io::stderr(), "{error}");
            ExitCode::FAILURE
        }
    }
}

/// Runs until standard input ends.
///
/// # Errors
/// When it cannot listen, or the directory is not private.
pub fn run(directory: &Path, relaunch: Relaunch) -> Result<(), ChildError> {
    // Fails only for the leader of a process group, which then is out of the test's reach already.
    let _leader = rustix::process::setsid();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(failed("start the runtime"))?;
    crate::cli::log_to_standard_error("warn");
    let served = runtime.block_on(serve(directory, relaunch));
    // Threads that wait in the kernel for something that will not come hold nobody up.
    runtime.shutdown_background();
    // Whatever happened, nothing of this agent stays.
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            error!(directory = %directory.display(), %error, "the directory of a local agent cannot be removed");
        }
        _ => {}
    }
    served
}

async fn serve(directory: &Path, relaunch: Relaunch) -> Result<(), ChildError> {
    check_private(directory)?;
    let lifeline = lifeline()?;
    let config = DoorConfig {
        state: directory.to_owned(),
        relaunch,
        base_environment: whole_environment(),
        supervisors: Supervisors::Inside,
        blobs_bytes_max: limits::BLOBS_BYTES_MAX,
        bounds: Bounds::default(),
        build: Build::OURS,
        audit: None,
    };
    let door = Door::open(config, World::system()).await?;
    let ending = door.ending();
    let socket = UnixListener::bind(directory.join(SOCKET)).map_err(failed("listen on a socket"))?;
    let shutdown = CancellationToken::new();
    let serving = tokio::spawn(door.serve(vec![Listener::Unix(socket)], drop, shutdown.clone()));
    let mut terminate = signal(SignalKind::terminate()).map_err(failed("listen to SIGTERM"))?;
    say_ready().map_err(failed("say that it is ready"))?;
    tokio::select! {
        () = end_of(lifeline) => {}
        _ = terminate.recv() => {}
    }
    // Connections stay open meanwhile: a controller that closes its sessions itself gets its answers.
    for survivor in ending.close_all().await {
        error!(%survivor, "left behind");
    }
    shutdown.cancel();
    match serving.await {
        Ok(served) => Ok(served?),
        Err(error) => Err(failed("serve")(io::Error::other(error))),
    }
}

fn check_private(directory: &Path) -> Result<(), ChildError> {
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
    let found = fs::metadata(directory).map_err(failed("look at its directory"))?;
    let mine = found.uid() == rustix::process::geteuid().as_raw();
    if !mine || found.permissions().mode() & 0o077 != 0 {
        return Err(ChildError::Open { path: directory.to_owned() });
    }
    Ok(())
}

/// Standard input as a pipe that the runtime can wait for; what this process starts gets `/dev/null` in its place.
fn lifeline() -> Result<pipe::Receiver, ChildError> {
    let input = rustix::io::fcntl_dupfd_cloexec(io::stdin().as_fd(), 3).map_err(io::Error::from);
    let input = input.map_err(failed("keep its standard input"))?;
    let null = rustix::fs::open(c"/dev/null", rustix::fs::OFlags::RDONLY, rustix::fs::Mode::empty());
    let null = null.map_err(io::Error::from).map_err(failed("open /dev/null"))?;
    rustix::stdio::dup2_stdin(&null)
        .map_err(io::Error::from)
        .map_err(failed("replace its standard input"))?;
    pipe::Receiver::from_owned_fd(input).map_err(failed("wait for its standard input, which must be a pipe"))
}

/// Waits until nobody holds the other end.
async fn end_of(mut lifeline: pipe::Receiver) {
    let mut buffer = [0; 64];
    // What is written to it means nothing.
    while !matches!(lifeline.read(&mut buffer).await, Ok(0) | Err(_)) {}
}

/// Says that it listens, and closes its standard output: nothing that it starts shall hold it.
fn say_ready() -> io::Result<()> {
    let mut output = io::stdout().lock();
    output.write_all(READY.as_bytes())?;
    output.flush()?;
    let null = rustix::fs::open(c"/dev/null", rustix::fs::OFlags::WRONLY, rustix::fs::Mode::empty())?;
    rustix::stdio::dup2_stdout(&null)?;
    Ok(())
}

/// The whole environment of this program: a block on a local stream finds what the test finds, and one in a container what
/// its image says.
pub(crate) fn whole_environment() -> Vec<(String, String)> {
    env::vars_os()
        .filter(|(name, _)| !is_entry_variable(name))
        // What is no text cannot be passed on; such variables are rare and nobody's business here.
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .collect()
}
