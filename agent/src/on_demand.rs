//! An agent that is started when somebody on this host wants one, and ends when nobody does: how it is found and started.
//!
//! There is one for each user, program and place (network, processes, root directory), and it lies in a private directory
//! with a short path. The lock of that directory settles every race: whoever holds it may connect to the agent, start it,
//! or, being the agent, end. So nobody finds an agent that is about to go, and no two are started.

mod directory;
mod place;
mod serving;
mod sweeping;

use std::{
    fs, io,
    os::{
        fd::{AsFd as _, AsRawFd as _, BorrowedFd},
        unix::{fs::MetadataExt as _, net::UnixStream},
    },
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use millstream_common::text::printable;

use self::directory::{Directory, DirectoryError};
pub(crate) use self::serving::main;
use crate::{
    door::STATE_PATH_BYTES_MAX,
    entry::{Relaunch, Role},
    private::{READY, SOCKET},
};

/// How long an agent stays without being used, unless it is told: a test that begins right after another finds it there.
pub const IDLE: Duration = Duration::from_secs(10);
/// How long a start may take.
const START_MAX: Duration = Duration::from_secs(20);
/// The most that is read of what an agent says that does not begin.
const SAID_BYTES_MAX: u64 = 64 * 1024;
/// How often an agent may be found ending, or its directory replaced, before somebody else must be at work there.
const ATTEMPTS_MAX: usize = 16;
/// Where private directories are made: the first of these that can be used. All of them outlive the login by which somebody
/// came, which a runtime directory of a user does not.
const PARENTS: [&str; 3] = ["/tmp", "/var/tmp", "/dev/shm"];
/// Digits of the digest in the name of such a directory.
const NAME_DIGITS: usize = 10;
/// What it says of itself.
const LOG: &str = "agent.log";
/// The namespaces that make a place another one. Not that of mounts: commands that enter a network often make a new one
/// each time.
const NAMESPACES: [&str; 5] = ["ipc", "net", "pid", "user", "uts"];

/// Why there is no agent on demand.
#[derive(Debug, thiserror::Error)]
pub enum OnDemandError {
    /// No directory for it.
    #[error("no agent can be started on demand: {source}")]
    Directory {
        /// Why the first of the possible directories cannot be used.
        #[source]
        source: DirectoryError,
    },
    /// The program does not know itself.
    #[error(
        "no agent can be started on demand: its own program cannot be looked at: {}",
        millstream_common::tls::reason(source)
    )]
    Program {
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// It cannot be started.
    #[error("the agent `{}` cannot be started on demand: {}", program.display(), millstream_common::tls::reason(source))]
    Spawn {
        /// The program.
        program: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// It ended before it listened.
    #[error("the agent that was started on demand in `{}` did not begin: {said}", path.display())]
    Said {
        /// Its directory.
        path: PathBuf,
        /// The last line of its log.
        said: String,
    },
    /// It cannot be connected to.
    #[error("the agent that was started on demand in `{}` cannot be connected to: {}", path.display(), millstream_common::tls::reason(source))]
    Connect {
        /// Its directory.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The directory changes all the time.
    #[error("the agent in `{}` ends again and again before it can be connected to: is its `--idle` too short?", path.display())]
    Restless {
        /// Its directory.
        path: PathBuf,
    },
}

/// Waits, in a place of its own, until the agent has ended that this process has started: a scheduler kills what is left when
/// this process ends, and the agent has things to tidy.
pub(crate) fn outlive_agent() {
    if place::name().is_some() {
        // It has no other children, and usually none at all.
        while let Ok(Some(_)) = rustix::process::wait(rustix::process::WaitOptions::empty()) {}
    }
}

/// Connects to the system's agent, if there is one that this user may run blocks with, and that is in this place: a Unix
/// socket is also seen from other networks of the host, where it leads to the wrong one.
pub(crate) fn agent_of_this_host(socket: &Path) -> Option<UnixStream> {
    if place::name().is_some() {
        return None;
    }
    let agent = UnixStream::connect(socket).ok()?;
    let peer = rustix::net::sockopt::socket_peercred(&agent).ok()?;
    let me = rustix::process::geteuid();
    ((me.is_root() || me == peer.uid) && shares_network(&agent, peer.pid)).then_some(agent)
}

/// Whether a process is in the network that this one is in. The kernel tells it of other users' processes only by what their
/// network holds: this very socket, or not.
fn shares_network(socket: &UnixStream, other: rustix::process::Pid) -> bool {
    let number = |path: String| Some(fs::metadata(path).ok()?.ino());
    let pid = other.as_raw_nonzero();
    match (number("/proc/self/ns/net".to_owned()), number(format!("/proc/{pid}/ns/net"))) {
        (Some(mine), Some(theirs)) => mine == theirs,
        _ => {
            let Ok(this) = rustix::fs::fstat(socket) else { return false };
            let sockets = fs::read_to_string(format!("/proc/{pid}/net/unix")).unwrap_or_default();
            let inode = this.st_ino.to_string();
            sockets.lines().any(|line| line.split_whitespace().nth(6) == Some(&inode))
        }
    }
}

/// Connects to the agent on demand of this user, program and place, and starts it when there is none.
///
/// # Errors
/// When there is none and none can be started.
pub(crate) fn connect(relaunch: &Relaunch, idle: Duration) -> Result<UnixStream, OnDemandError> {
    let idle = if place::name().is_some() { idle.min(place::IDLE) } else { idle };
    let name = name(relaunch).map_err(|source| OnDemandError::Program { source })?;
    let mut first_refusal = None;
    for parent in PARENTS {
        let path = Path::new(parent).join(&name);
        match connect_in(&path, relaunch, idle) {
            Err(OnDemandError::Directory { source }) => {
                first_refusal.get_or_insert(source);
            }
            other => return other,
        }
    }
    Err(OnDemandError::Directory { source: first_refusal.expect("at least one directory was tried") })
}

/// Name of the private directory: the user for people, everything else that makes an agent another one as a digest.
fn name(relaunch: &Relaunch) -> io::Result<String> {
    let mut digest = blake3::Hasher::new();
    // The file that runs, even when another has taken its name: its number is nobody else's as long as its agent runs.
    let file = fs::metadata("/proc/self/exe")?;
    digest.update(relaunch.program.as_os_str().as_encoded_bytes());
    let root = fs::metadata("/")?;
    let mut numbers = vec![file.dev(), file.ino(), root.dev(), root.ino()];
    for namespace in NAMESPACES {
        // A kernel may lack one.
        numbers.push(fs::metadata(format!("/proc/self/ns/{namespace}")).map_or(0, |found| found.ino()));
    }
    for number in numbers {
        digest.update(&number.to_le_bytes());
    }
    if let Some(place) = place::name() {
        digest.update(place.as_encoded_bytes());
    }
    Ok(format!("{}{}", prefix(), &digest.finalize().to_hex()[..NAME_DIGITS]))
}

/// With what the names of all private directories of this user begin.
fn prefix() -> String {
    format!("millstream-{}-", rustix::process::geteuid().as_raw())
}

fn connect_in(path: &Path, relaunch: &Relaunch, idle: Duration) -> Result<UnixStream, OnDemandError> {
    if path.as_os_str().len() > STATE_PATH_BYTES_MAX {
        let source = DirectoryError::TooLong { path: path.to_owned(), most: STATE_PATH_BYTES_MAX };
        return Err(OnDemandError::Directory { source });
    }
    for _ in 0..ATTEMPTS_MAX {
        let held = Directory::make(path).and_then(|directory| directory.hold(START_MAX));
        let held = held.map_err(|source| OnDemandError::Directory { source })?;
        // While it was waited for, the agent has ended and has taken its directory along.
        if !held.is_current() {
            continue;
        }
        if let Ok(agent) = UnixStream::connect(path.join(SOCKET)) {
            return Ok(agent);
        }
        start(path, relaunch, idle)?;
        let connected = UnixStream::connect(path.join(SOCKET));
        return connected.map_err(|source| OnDemandError::Connect { path: path.to_owned(), source });
    }
    Err(OnDemandError::Restless { path: path.to_owned() })
}

/// Starts an agent in a directory that is held, and waits until it listens.
fn start(path: &Path, relaunch: &Relaunch, idle: Duration) -> Result<(), OnDemandError> {
    let failed = |source| OnDemandError::Spawn { program: relaunch.program.clone(), source };
    keep_descriptors_from_children().map_err(failed)?;
    let log = directory::private_file(&path.join(LOG)).map_err(failed)?;
    let idle_ms = u64::try_from(idle.as_millis()).unwrap_or(u64::MAX).to_string();
    let mut command = relaunch.command(Role::OnDemand, &[path.into(), idle_ms.into()]);
    command.current_dir("/").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log);
    let mut child = command.spawn().map_err(failed)?;
    let output = child.stdout.take().expect("it was asked for");
    let said = directory::read_within(output, SAID_BYTES_MAX, START_MAX).map_err(failed)?;
    if said.trim_ascii() == READY.as_bytes() {
        // It goes on without this process, which therefore never waits for it.
        return Ok(());
    }
    // Nobody else would end one that is stuck; its directory is for the next.
    let _ended_already = child.kill();
    let status = child.wait().map_err(failed)?;
    let log = fs::read_to_string(path.join(LOG)).unwrap_or_default();
    let said = match log.lines().rev().find(|line| !line.trim().is_empty()) {
        Some(line) => printable(line.as_bytes(), 512),
        None => format!("it ended with {status} and without a word"),
    };
    Err(OnDemandError::Said { path: path.to_owned(), said })
}

/// Marks everything but the standard descriptors to be closed in what this process starts: an agent that held a pipe of
/// ssh would keep that connection open.
fn keep_descriptors_from_children() -> io::Result<()> {
    let entries = fs::read_dir("/proc/self/fd")?;
    let numbers = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok());
    let standard = io::stderr().as_fd().as_raw_fd();
    for number in numbers.filter(|number| *number > standard).collect::<Vec<_>>() {
        set_close_on_exec(number);
    }
    Ok(())
}

#[expect(
    unsafe_code,
    reason = "descriptors that nobody in this process owns can only be named by their number"
)]
fn set_close_on_exec(number: i32) {
    // SAFETY: the borrow lives for one system call that closes and reads nothing; a number that is closed meanwhile, such as
    // that of the directory that was just read, is refused by the kernel.
    let descriptor = unsafe { BorrowedFd::borrow_raw(number) };
    let _closed_meanwhile = rustix::io::fcntl_setfd(descriptor, rustix::io::FdFlags::CLOEXEC);
}
