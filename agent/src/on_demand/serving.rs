//! The agent on demand itself: serves its socket until it was not used for a while, and then takes everything of it along.
//!
//! Its supervisors are processes, as those of an agent that is always there: killed, it is found again by the next one. A
//! session whose controller has vanished keeps it until the lease is over and the trees are dead.

use std::{
    ffi::OsString,
    fs, io,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use millstream_common::{limits, protocol::Build};
use rustix::event::{PollFd, PollFlags};
use tokio::task::spawn_blocking;
use tracing::info;

use super::{
    START_MAX,
    directory::{Directory, DirectoryError},
    place, sweeping,
};
use crate::{
    door::{DoorConfig, Ending, Supervisors},
    entry::Relaunch,
    private::{self, PrivateError, Served, failed},
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
    Serve(#[from] PrivateError),
}

/// The role `on-demand`, for a program that can be started again as it is.
pub(crate) fn main(arguments: Vec<OsString>, relaunch: Relaunch) -> ExitCode {
    private::told(match &arguments[..] {
        [directory, idle_ms] => match idle_ms.to_str().and_then(|text| text.parse().ok()) {
            Some(idle_ms) => run(Path::new(directory), Duration::from_millis(idle_ms), relaunch),
            None => Err(ServeError::Arguments),
        },
        _ => Err(ServeError::Arguments),
    })
}

fn run(path: &Path, idle: Duration, relaunch: Relaunch) -> Result<(), ServeError> {
    // Out of the terminal and the process group of whoever came: it outlives them. The starter's child leads no group.
    rustix::process::setsid().map_err(io::Error::from).map_err(failed("begin a session of its own"))?;
    private::run("info", serve(path, idle, relaunch))
}

async fn serve(path: &Path, idle: Duration, relaunch: Relaunch) -> Result<(), ServeError> {
    let mut directory = Directory::open(path)?;
    let config = move |state: PathBuf| DoorConfig {
        state,
        relaunch: relaunch.clone(),
        base_environment: place::environment(),
        supervisors: Supervisors::Processes,
        blobs_bytes_max: limits::BLOBS_BYTES_MAX,
        bounds: Bounds::default(),
        build: Build::OURS,
        audit: None,
    };
    let mut served = Served::begin(config(path.to_owned())).await?;
    served.say_ready()?;
    info!(directory = %path.display(), idle_s = idle.as_secs_f64(), "serving");
    let own = path.to_owned();
    drop(tokio::spawn(async move { sweeping::sweep(&own, config).await }));
    let (ending, arriving) = (served.ending.clone(), served.arriving.try_clone());
    let arriving = arriving.map_err(failed("watch its socket"))?;
    tokio::select! {
        () = unwanted(&directory, &arriving, &ending, idle) => {}
        () = served.asked() => {
            info!("asked to end");
            // Whoever is just connecting is cut off; whoever comes from now on waits for the end of this agent.
            let held = spawn_blocking(move || directory.hold(START_MAX)).await;
            directory = held.map_err(|error| failed("wait for its directory")(io::Error::other(error)))??;
        }
    }
    let ended = served.end().await;
    fs::remove_dir_all(path).map_err(failed("remove its directory"))?;
    drop(directory);
    Ok(ended?)
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
