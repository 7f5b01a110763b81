//! One process per session: the one loop that selects, feeds the machines and performs their actions.
//!
//! It owns the session's queues, tasks, relay and lease, and outlives the agent's front door: a door that comes anew is
//! told everything, and replaces the one before it. It knows nothing of TLS, identities or kinds of blocks, and it
//! decides nothing that a machine in `queue.rs` or `task.rs` can decide.

pub(crate) mod account;
pub(crate) mod attendant;
pub mod blobs;
pub mod cgroup;
pub mod disk;
pub(crate) mod ended;
pub(crate) mod kernel;
pub mod process;
pub mod processes;
pub mod queue;
pub mod relay;
pub(crate) mod reports;
mod session;
pub mod shim;
pub mod spares;
pub mod spool;
pub(crate) mod stranger;
pub mod task;
pub(crate) mod tree;
pub mod wire;
pub mod workspace;

use std::{
    ffi::OsString,
    fs::{self, File},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use millstream_common::{clock::World, id::SessionId, limits};
use millstream_proto::supervisor::v1::{DoorFrame, RelayFrames};
use serde::{Deserialize, Serialize};
use tokio::{
    io::Interest,
    net::{
        UnixListener, UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::mpsc,
    time::{Instant, sleep_until},
};
use tracing::{debug, info, warn};

use crate::entry::Relaunch;
use cgroup::claim::{Claim, SESSION_GROUP};
use disk::Host;
use process::watch;
use session::Session;
use wire::{FrameReader, FrameWriter, WireError};

/// What a supervisor says on its standard output when it listens.
pub const READY: &str = "ready";
/// Its configuration, in the session's directory.
pub const CONFIG_FILE: &str = "supervisor.json";
/// Its socket.
pub const SOCKET_FILE: &str = "supervisor.sock";
/// The file that it holds locked as long as it lives.
pub const LOCK_FILE: &str = "lock";
/// Doors that wait to be talked to: one comes at a time, and the newest counts.
const DOORS_COUNT_MAX: usize = 4;
/// Bytes that wait to be read by a door before nothing more is added or taken from it.
const UNREAD_BYTES_MAX: usize = 1024 * 1024;

/// What a supervisor must know.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SupervisorConfig {
    /// The session's directory; it exists.
    pub session_dir: PathBuf,
    /// The session.
    pub session_id: SessionId,
    /// How long the session lives without a word from the controller.
    pub lease: Duration,
    /// Environment of every block.
    pub base_environment: Vec<(String, String)>,
    /// How to start this program again.
    pub relaunch: Relaunch,
    /// Control group of version 2 below which the session gets its own. Without one, trees are contained by shims.
    pub cgroup: Option<PathBuf>,
    /// Shipped files.
    pub blobs_dir: PathBuf,
}

impl SupervisorConfig {
    /// The session's control group, where there is one.
    #[must_use]
    pub fn session_cgroup(&self) -> Option<PathBuf> {
        self.cgroup.as_ref().map(|parent| parent.join(session_group_name(self.session_id)))
    }
}

/// How the control group of a session is named.
pub(crate) fn session_group_name(session: SessionId) -> String {
    format!("{SESSION_GROUP}{}", session.short())
}

/// Why a supervisor could not begin or go on.
#[derive(Debug, thiserror::Error)]
pub enum SupervisorError {
    /// A file or directory of the session.
    #[error("failed to {attempt} `{}`", path.display())]
    File {
        /// What was attempted.
        attempt: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// The configuration cannot be understood.
    #[error("failed to understand `{}`", path.display())]
    Configuration {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// Another supervisor lives in this directory.
    #[error("another supervisor holds `{}`: a session has one", path.display())]
    Locked {
        /// The lock.
        path: PathBuf,
    },
    /// The blob store cannot be used.
    #[error("failed to open the blob store")]
    Blobs(#[source] blobs::BlobError),
    /// The session's control group cannot be made.
    #[error("failed to make the session's control group")]
    Group(#[source] io::Error),
    /// No runtime.
    #[error("failed to start the runtime")]
    Runtime(#[source] io::Error),
}

fn failed(attempt: &'static str, path: &Path) -> impl FnOnce(io::Error) -> SupervisorError {
    move |source| SupervisorError::File { attempt, path: path.to_owned(), source }
}

/// Runs a session until it is closed, or until its lease is over and all its tasks have ended: their results stay for the
/// door to keep. Doors come by the channel; a new one replaces the one before it.
///
/// # Errors
/// When the session's directory or control group cannot be used.
///
/// # Cancel safety
/// Not safe: dropped, it leaves running what it started.
pub async fn run(
    config: SupervisorConfig,
    world: World,
    host: Host,
    mut doors: mpsc::Receiver<UnixStream>,
) -> Result<(), SupervisorError> {
    prepare_directory(&config)?;
    let claim = config.session_cgroup().map(|group| Claim::make(&group)).transpose();
    let claim = claim.map_err(SupervisorError::Group)?;
    let (told, mut happened) = mpsc::channel(limits::SUPERVISOR_FRAMES_COUNT_MAX);
    // The relay bounds its own queue; this one only hands over.
    let (relayed, mut relay) = mpsc::channel::<RelayFrames>(1);
    let mut session = Session::new(config, world, host, told, relayed)?;
    let mut alarm = BootAlarm::new().map_err(SupervisorError::Runtime)?;
    let (mut reader, mut writer): (Option<DoorReader>, Option<DoorWriter>) = (None, None);
    let mut doors_come = true;

    while !session.is_over() {
        session.pass_time();
        alarm.set(session.lease_ends());
        let mut left = false;
        let mut unread = 0;
        if let Some(writer) = &mut writer {
            if let Err(error) = session.tell_door(writer, UNREAD_BYTES_MAX) {
                warn!(%error, "the door cannot be told");
                left = true;
            }
            unread = writer.pending_bytes();
        }
        let has_door = writer.is_some();
        let deadline = session.next_deadline();
        let grown = session.grown();
        tokio::select! {
            biased;
            () = std::future::ready(()), if left => {}
            flushed = flush(&mut writer), if unread > 0 => left = is_broken(flushed),
            frame = next_frame(&mut reader), if unread < UNREAD_BYTES_MAX => match frame {
                Ok(Some(frame)) => session.take_frame(frame),
                Ok(None) => left = true,
                Err(error) => left = is_broken(Err(error)),
            },
            Some(told) = happened.recv() => {
                session.take_told(told);
                // What has happened by now is told to the door at once.
                while let Ok(told) = happened.try_recv() {
                    session.take_told(told);
                }
            }
            () = grown.bell.notified() => session.take_grown(),
            Some(frames) = relay.recv(), if has_door && unread < UNREAD_BYTES_MAX => {
                session.relay_to_door(frames);
            }
            came = doors.recv(), if doors_come => match came {
                Some(stream) => {
                    info!("a door came");
                    let (read, write) = stream.into_split();
                    (reader, writer) = (Some(FrameReader::new(read)), Some(FrameWriter::new(write)));
                    session.door_came();
                }
                None => doors_come = false,
            },
            () = wait_until(deadline) => {}
            () = alarm.rings() => {}
        }
        if left {
            debug!("the door left");
            (reader, writer) = (None, None);
            session.door_left();
        }
    }

    // Who closed the session is answered when the host is clean.
    let remains = session.remains();
    remains.end_group().await;
    drop(claim);
    if let Err(error) = tokio::task::spawn_blocking(move || remains.remove()).await {
        warn!(%error, "what belongs to the tasks was not removed");
    }
    if let Some(writer) = &mut writer {
        let telling = async {
            session.tell_door(writer, usize::MAX)?;
            writer.flush().await
        };
        if let Ok(Err(error)) = tokio::time::timeout(limits::CLOSE_MAX, telling).await {
            debug!(%error, "the door left before it was told that the session is over");
        }
    }
    Ok(())
}

type DoorReader = FrameReader<OwnedReadHalf>;
type DoorWriter = FrameWriter<OwnedWriteHalf>;

fn is_broken(result: Result<(), WireError>) -> bool {
    result.inspect_err(|error| debug!(%error, "the door's connection broke")).is_err()
}

async fn next_frame(door: &mut Option<DoorReader>) -> Result<Option<DoorFrame>, WireError> {
    match door {
        Some(door) => door.next().await,
        None => std::future::pending().await,
    }
}

async fn flush(door: &mut Option<DoorWriter>) -> Result<(), WireError> {
    match door {
        Some(door) => door.flush().await,
        None => std::future::pending().await,
    }
}

async fn wait_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

/// Wakes the loop when the lease is over by a clock that goes on while the host sleeps: the runtime's own does not. It
/// decides nothing; whoever is woken asks the clock that was handed in.
struct BootAlarm {
    timer: tokio::io::unix::AsyncFd<std::os::fd::OwnedFd>,
    set_to: Option<Duration>,
}

impl BootAlarm {
    fn new() -> io::Result<Self> {
        use rustix::time::{TimerfdClockId, TimerfdFlags, timerfd_create};
        let timer = timerfd_create(TimerfdClockId::Boottime, TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK)?;
        Ok(Self { timer: watch(timer, Interest::READABLE)?, set_to: None })
    }

    fn set(&mut self, moment: Option<Duration>) {
        use rustix::time::{Itimerspec, TimerfdTimerFlags, Timespec, timerfd_settime};
        if std::mem::replace(&mut self.set_to, moment) == moment {
            return;
        }
        let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
        let value = moment.map_or(zero, |moment| Timespec {
            tv_sec: i64::try_from(moment.as_secs()).unwrap_or(i64::MAX),
            // Zero would mean never.
            tv_nsec: i64::from(moment.subsec_nanos()).max(1),
        });
        let setting = Itimerspec { it_interval: zero, it_value: value };
        if let Err(error) = timerfd_settime(self.timer.get_ref(), TimerfdTimerFlags::ABSTIME, &setting) {
            warn!(%error, "the alarm of the lease cannot be set");
        }
    }

    async fn rings(&self) {
        let Ok(mut ready) = self.timer.readable().await else { return std::future::pending().await };
        ready.clear_ready();
        let mut count = [0; 8];
        // Read so that it does not ring for the same moment again.
        let _count = rustix::io::read(self.timer.get_ref(), &mut count);
    }
}

/// Makes what a session needs in its directory, and lets blocks of other users pass through it.
fn prepare_directory(config: &SupervisorConfig) -> Result<(), SupervisorError> {
    let directory = &config.session_dir;
    for (name, mode) in [("tasks", 0o711), ("sync", 0o711), ("bin", 0o755)] {
        let path = directory.join(name);
        match fs::DirBuilder::new().mode(mode).create(&path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(failed("make the directory", &path)(error));
            }
            _ => {}
        }
    }
    fs::set_permissions(directory, fs::Permissions::from_mode(0o711))
        .map_err(failed("open to blocks the directory", directory))?;
    let bin = directory.join("bin");
    config.relaunch.write_sync_command(&bin).map_err(failed("write the in-block command into", &bin))?;
    Ok(())
}

/// The role `supervisor`: its argument is the session's directory.
pub(crate) fn main(arguments: Vec<OsString>) -> ExitCode {
    let Some(directory) = arguments.first().map(PathBuf::from) else {
        say("a supervisor is started with the directory of its session");
        return ExitCode::FAILURE;
    };
    crate::cli::log_to_standard_error("info");
    match serve(&directory) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let mut told = error.to_string();
            let mut cause = std::error::Error::source(&error);
            while let Some(error) = cause {
                told = format!("{told}: {error}");
                cause = error.source();
            }
            say(&told);
            warn!(error = %told, "the supervisor ends");
            ExitCode::FAILURE
        }
    }
}

/// One line to whoever started this process.
fn say(line: &str) {
    let mut stdout = io::stdout();
    // Whoever started it may be gone.
    let _unheard: io::Result<()> = writeln!(stdout, "{line}").and_then(|()| stdout.flush());
}

fn serve(directory: &Path) -> Result<(), SupervisorError> {
    leave_terminal();
    cgroup::home::leave_agent();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        // Packing and copying only.
        .max_blocking_threads(4)
        .build()
        .map_err(SupervisorError::Runtime)?;
    let served = runtime.block_on(attend(directory, World::system(), real_host, || {
        say(READY);
        close_stdout();
    }));
    // What still copies or packs belongs to a session that is over.
    runtime.shutdown_background();
    served
}

/// Runs the supervisor whose configuration lies in a session's directory, as [`run`] does; doors come to its socket there.
/// `listening` is called once they can. Holds the lock of the directory meanwhile.
///
/// # Errors
/// When the directory cannot be used, or another supervisor lives in it.
///
/// # Cancel safety
/// Not safe: dropped, it leaves running what it started.
pub async fn attend(
    directory: &Path,
    world: World,
    host: impl FnOnce(&SupervisorConfig) -> Result<Host, SupervisorError>,
    listening: impl FnOnce(),
) -> Result<(), SupervisorError> {
    let path = directory.join(CONFIG_FILE);
    let text = fs::read(&path).map_err(failed("read", &path))?;
    let config: SupervisorConfig = serde_json::from_slice(&text)
        .map_err(|source| SupervisorError::Configuration { path: path.clone(), source })?;
    let _lock = lock(&directory.join(LOCK_FILE))?;
    let host = host(&config)?;
    let socket = directory.join(SOCKET_FILE);
    match fs::remove_file(&socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(failed("remove the old socket", &socket)(error));
        }
        _ => {}
    }
    let listener = UnixListener::bind(&socket).map_err(failed("listen on", &socket))?;
    fs::set_permissions(&socket, fs::Permissions::from_mode(0o600))
        .map_err(failed("close to others the socket", &socket))?;
    let (doors, came) = mpsc::channel(DOORS_COUNT_MAX);
    // It ends with this future, so that nobody is let in who would never be served.
    let _accepting = tokio_util::task::AbortOnDropHandle::new(tokio::spawn(accept(listener, doors)));
    listening();
    let served = run(config, world, host, came).await;
    // Results may be kept for a while; nobody answers here any more.
    if let Err(error) = fs::remove_file(&socket) {
        warn!(%error, "the socket of the session is left behind");
    }
    served
}

/// This host, for the supervisor of a session.
pub(crate) fn real_host(config: &SupervisorConfig) -> Result<Host, SupervisorError> {
    Host::real(config).map_err(failed("open", Path::new("/dev/null")))
}

async fn accept(listener: UnixListener, doors: mpsc::Sender<UnixStream>) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                if doors.send(stream).await.is_err() {
                    return;
                }
            }
            Err(error) => {
                warn!(%error, "a door cannot be let in");
                tokio::time::sleep(limits::ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Whoever started this process waits for the end of what it says.
fn close_stdout() {
    let null = fs::OpenOptions::new().write(true).open("/dev/null");
    if let Ok(null) = null
        && let Err(error) = rustix::stdio::dup2_stdout(&null)
    {
        warn!(%error, "standard output stays open");
    }
}

/// A supervisor is nobody's foreground job: what a terminal sends to its group, or to all when it is closed, is not for it.
#[expect(unsafe_code, reason = "rustix changes no signals")]
fn leave_terminal() {
    // Refused to the leader of a group, which is out of the terminal's reach as well.
    let _session = rustix::process::setsid();
    for signal in [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGTERM] {
        // SAFETY: no handler is installed, the signals are ignored. Blocks get them back as they were.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
}

/// The lock that tells others that this supervisor lives.
fn lock(path: &Path) -> Result<File, SupervisorError> {
    let file = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .map_err(failed("open the lock", path))?;
    match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(SupervisorError::Locked { path: path.to_owned() }),
        Err(error) => Err(failed("lock", path)(error.into())),
    }
}

#[cfg(test)]
mod tests;
