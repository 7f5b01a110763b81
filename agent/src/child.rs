//! The agent of local streams: a child of the test, with its supervisors inside.
//!
//! It is told a private directory, listens there, and ends when its standard input does, which also happens when its parent dies in any way, or on SIGTERM: then every
//! session is closed, and the directory is removed. It is a session of its own for the kernel, so that a signal to the test's process group
//! does not take it along before it has cleaned up.

use std::{
    env,
    ffi::OsString,
    fs, io,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    process::ExitCode,
};

use millstream_common::{limits, protocol::Build};
use tokio::{io::AsyncReadExt as _, net::unix::pipe};
use tracing::error;

use crate::{
    door::{DoorConfig, Supervisors},
    entry::{Relaunch, is_entry_variable},
    private::{self, PrivateError, Served, failed},
    session::Bounds,
};

/// Why the child agent does not run.
#[derive(Debug, thiserror::Error)]
pub enum ChildError {
    /// It was not told where.
    #[error("the role needs one argument: a private directory")]
    Arguments,
    /// The directory is open to others.
    #[error("the directory `{}` can be entered by others: make it with mode 0700", path.display())]
    Open {
        /// The directory.
        path: PathBuf,
    },
    /// It does not serve.
    #[error(transparent)]
    Serve(#[from] PrivateError),
}

/// The role `child`, for a program that can be started again as it is: `arguments` are the directory, and how.
pub(crate) fn main(arguments: Vec<OsString>, relaunch: Relaunch) -> ExitCode {
    let mut arguments = arguments.into_iter();
    private::told(match (arguments.next(), arguments.next()) {
        (Some(directory), None) => run(Path::new(&directory), relaunch),
        _ => Err(ChildError::Arguments),
    })
}

/// Runs until standard input ends.
///
/// # Errors
/// When it cannot listen, or the directory is not private.
pub fn run(directory: &Path, relaunch: Relaunch) -> Result<(), ChildError> {
    // Fails only for the leader of a process group, which then is out of the test's reach already.
    let _leader = rustix::process::setsid();
    let served = private::run("warn", serve(directory, relaunch));
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
    let mut served = Served::begin(config).await?;
    served.say_ready()?;
    tokio::select! {
        () = end_of(lifeline) => {}
        () = served.asked() => {}
    }
    Ok(served.end().await?)
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
fn lifeline() -> Result<pipe::Receiver, PrivateError> {
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

/// The whole environment of this program: a block on a local stream finds what the test finds, and one in a container what
/// its image says.
pub(crate) fn whole_environment() -> Vec<(String, String)> {
    env::vars_os()
        .filter(|(name, _)| !is_entry_variable(name))
        // What is no text cannot be passed on; such variables are rare and nobody's business here.
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .collect()
}
