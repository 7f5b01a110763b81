//! The agent on demand itself: serves its socket until it was not used for a while, and then takes everything of it along.
//!
//! Its supervisors are processes, as those of an agent that is always there: killed, it is found again by the next one. A
//! session whose controller has vanished keeps it until the lease is over and the trees are dead.

use std::{
    ffi::OsString, fs, io, io::Write as _, os::fd::AsFd as _, path::Path, process::ExitCode, time::Duration,
};

use millstream_common::{clock::World, limits, protocol::Build};
use rustix::event::{PollFd, PollFlags};
use tokio::{
    net::UnixListener,
    signal::unix::{SignalKind, signal},
};
use tokio_util::sync::CancellationToken;
use tracing::{error, info};

use super::{
    READY, SOCKET,
    directory::{Directory, DirectoryError},
};
use crate::{
    door::{Door, DoorConfig, DoorError, Ending, Listener, Supervisors, base_environment},
    entry::Relaunch,
    session::Bounds,
};

/// Why the agent does not serve.
#[derive(Debug, thiserror::Error)]
enum ServeError {
    #[error("the role needs two arguments: a private directory and milliseconds")]
    Arguments,
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    #[error(transparent)]
    Door(#[from] DoorError),
    #[error("failed to {attempt}: {}", millstream_common::tls::reason(source))]
    System {
        attempt: &'static str,
        #[source]
        source: io::Error,
    },
}

fn failed(attempt: &'static str) -> impl FnOnce(io::Error) -> ServeError {
    move |source| ServeError::System { attempt, source }
}

/// The role `on-demand`, for a program that can be started again as it is.
pub(crate) fn main(arguments: Vec<OsString>, relaunch: Relaunch) -> ExitCode {
    let result = match &arguments[..] {
        [directory, idle_ms] => match idle_ms.to_str().and_then(|text| text.parse().ok()) {
            Some(idle_ms) => run(Path::new(directory), Duration::from_millis(idle_ms), relaunch),
            None => Err(ServeError::Arguments),
        },
        _ => Err(ServeError::Arguments),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Standard error is the log of this agent; whoever started it shows its last line.
            let _closed: io::Result<()> = writeln!(io::stderr(), "{error}");
            ExitCode::FAILURE
        }
    }
}

fn run(path: &Path, idle: Duration, relaunch: Relaunch) -> Result<(), ServeError> {
    // Out of the terminal and the process group of whoever came: it outlives them. The starter's child leads no group.
    rustix::process::setsid().map_err(io::Error::from).map_err(failed("begin a session of its own"))?;
    crate::cli::log_to_standard_error("info");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(failed("start the runtime"))?;
    let served = runtime.block_on(serve(path, idle, relaunch));
    // Threads that wait in the kernel for something that will not come hold nobody up.
    runtime.shutdown_background();
    served
}

async fn serve(path: &Path, idle: Duration, relaunch: Relaunch) -> Result<(), ServeError> {
    let directory = Directory::open(path)?;
    let config = DoorConfig {
        state: path.to_owned(),
        relaunch,
        base_environment: base_environment(),
        supervisors: Supervisors::Processes,
        blobs_bytes_max: limits::BLOBS_BYTES_MAX,
        bounds: Bounds::default(),
        build: Build::OURS,
        audit: None,
    };
    let door = Door::open(config, World::system()).await?;
    let ending = door.ending();
    let socket = path.join(SOCKET);
    // The door's own lock says that no other agent uses the directory: what is there was left behind.
    let _absent: io::Result<()> = fs::remove_file(&socket);
    let listener = UnixListener::bind(&socket).map_err(failed("listen on a socket"))?;
    only_for_this_user(&socket).map_err(failed("keep its socket for this user"))?;
    let arriving = listener.as_fd().try_clone_to_owned().map_err(failed("watch its socket"))?;
    let shutdown = CancellationToken::new();
    let serving = tokio::spawn(door.serve(vec![Listener::Unix(listener)], drop, shutdown.clone()));
    let mut terminate = signal(SignalKind::terminate()).map_err(failed("listen to SIGTERM"))?;
    say_ready().map_err(failed("say that it is ready"))?;
    info!(directory = %path.display(), idle_s = idle.as_secs_f64(), "serving");
    tokio::select! {
        () = unwanted(&directory, &arriving, &ending, idle) => {}
        _ = terminate.recv() => {
            info!("asked to end");
            // From now on whoever comes waits for the end of this agent. One that is just connecting is cut off.
            directory.try_hold();
        }
    }
    for survivor in ending.close_all().await {
        error!(%survivor, "left behind");
    }
    shutdown.cancel();
    let served = serving.await;
    fs::remove_dir_all(path).map_err(failed("remove its directory"))?;
    match served {
        Ok(served) => Ok(served?),
        Err(error) => Err(failed("serve")(io::Error::other(error))),
    }
}

/// Waits until the agent was not used for a while and nobody is about to connect. The directory is held from then on.
async fn unwanted(directory: &Directory, listener: impl std::os::fd::AsFd, ending: &Ending, idle: Duration) {
    loop {
        ending.unused_for(idle).await;
        // Whoever holds it is about to connect: that counts as use.
        if directory.try_hold() {
            if ending.is_unused() && !is_waited_at(&listener) {
                return;
            }
            directory.let_go();
        }
    }
}

/// Whether a connection has been made that was not accepted yet.
fn is_waited_at(listener: &impl std::os::fd::AsFd) -> bool {
    let mut watched = [PollFd::new(listener, PollFlags::IN)];
    // What cannot be asked is treated as wanted.
    !matches!(rustix::event::poll(&mut watched, Some(&rustix::time::Timespec::default())), Ok(0))
}

fn only_for_this_user(socket: &Path) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    fs::set_permissions(socket, fs::Permissions::from_mode(0o600))
}

/// Says that it listens, and lets go of the pipe on which it said so.
fn say_ready() -> io::Result<()> {
    let mut output = io::stdout().lock();
    output.write_all(READY.as_bytes())?;
    output.flush()?;
    let null = rustix::fs::open(c"/dev/null", rustix::fs::OFlags::WRONLY, rustix::fs::Mode::empty())?;
    rustix::stdio::dup2_stdout(&null)?;
    Ok(())
}
