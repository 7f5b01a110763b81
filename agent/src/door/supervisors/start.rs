//! Starts supervisors: as processes that outlive this one, or inside this process for an agent that nobody shares.

use std::{
    ffi::OsString,
    fmt,
    future::Future,
    io,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    pin::Pin,
    process::Stdio,
    sync::Arc,
    time::Duration,
};

use millstream_common::{clock::World, id::SessionId, text::printable};
use tokio::{io::AsyncReadExt as _, net::UnixStream, sync::mpsc, time::timeout};
use tracing::{error, warn};

use super::{HELLO_MAX, Notice, Page, SessionDirectory, Supervised};
use crate::{
    entry::{Relaunch, Role},
    supervisor::{self, SupervisorConfig, session_group_name, wire::WireError},
};

/// What a supervisor says when it listens.
const READY: &str = "ready";
/// Longest word that is read from a supervisor that starts.
const FIRST_WORDS_BYTES_MAX: u64 = 4 * 1024;

/// Why a session has no supervisor.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StartError {
    /// Its directory cannot be made.
    #[error("failed to make the directory `{}` of the session: {}", path.display(), millstream_common::tls::reason(source))]
    Directory {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Its process cannot be started.
    #[error("failed to start the supervisor `{}`: {}", program.display(), millstream_common::tls::reason(source))]
    Spawn {
        /// The program.
        program: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// It ended before it listened.
    #[error("the supervisor did not begin: {said}")]
    Said {
        /// What it said, made safe to print.
        said: String,
    },
    /// It said nothing in time.
    #[error("the supervisor did not begin within {} s", HELLO_MAX.as_secs())]
    TooSlow,
    /// It does not speak as it should.
    #[error("the supervisor cannot be talked to: {source}")]
    Talk {
        /// What happened.
        #[source]
        source: WireError,
    },
}

/// Where the supervisors of sessions run.
#[derive(Debug, Clone)]
pub enum Supervisors {
    /// Each in a process of its own, which outlives this agent.
    Processes,
    /// In this process, and they end with it: for an agent that ends with its one controller.
    Inside,
    /// Where whoever was handed in starts them: in a simulation.
    Elsewhere(Arc<dyn StartSupervisor>),
}

/// Starts supervisors that outlive the door.
pub trait StartSupervisor: Send + Sync + fmt::Debug {
    /// Starts the one whose configuration lies in a session's directory, as [`supervisor::attend`] does. Done once it
    /// listens there.
    fn start(&self, session_dir: PathBuf) -> Starting<'_>;
}

/// A supervisor that is about to listen.
pub type Starting<'a> = Pin<Box<dyn Future<Output = io::Result<()>> + Send + 'a>>;

/// How supervisors are started here.
#[derive(Debug, Clone)]
pub(crate) struct Starter {
    /// How this program starts itself again.
    pub(crate) relaunch: Relaunch,
    /// Environment that every block gets.
    pub(crate) base_environment: Vec<(String, String)>,
    /// Where the blobs are.
    pub(crate) blobs: PathBuf,
    /// Control group under which sessions get theirs, where there is one.
    pub(crate) cgroup: Option<PathBuf>,
    /// Clock and numbers.
    pub(crate) world: World,
    /// The agent's incarnation.
    pub(crate) incarnation: String,
    /// Where supervisors run.
    pub(crate) supervisors: Supervisors,
}

impl Starter {
    /// Control group of a session, where there are control groups.
    pub(crate) fn cgroup_of(&self, session: SessionId) -> Option<PathBuf> {
        self.cgroup.as_ref().map(|parent| parent.join(session_group_name(session)))
    }

    /// Starts the supervisor of a session whose directory exists, and connects to it.
    pub(crate) async fn start(
        &self,
        session_id: SessionId,
        directory: SessionDirectory,
        lease: Duration,
        notices: mpsc::Sender<(SessionId, Notice)>,
        page: Page,
    ) -> Result<Arc<Supervised>, StartError> {
        let configuration = SupervisorConfig {
            session_dir: directory.path().to_owned(),
            session_id,
            lease,
            base_environment: self.base_environment.clone(),
            relaunch: self.relaunch.clone(),
            cgroup: self.cgroup.clone(),
            blobs_dir: self.blobs.clone(),
        };
        let stream = if let Supervisors::Inside = self.supervisors {
            self.start_inside(configuration, directory.path())?
        } else {
            directory
                .write_configuration(&configuration)
                .map_err(|source| StartError::Directory { path: directory.path().to_owned(), source })?;
            match &self.supervisors {
                Supervisors::Elsewhere(starts) => {
                    let started = starts.start(directory.path().to_owned()).await;
                    started.map_err(|source| StartError::Talk { source: WireError::Broken(source) })?;
                }
                _ => self.start_process(&directory).await?,
            }
            let connected = UnixStream::connect(directory.socket()).await;
            connected.map_err(|source| StartError::Talk { source: WireError::Broken(source) })?
        };
        let incarnation = self.incarnation.clone();
        let reconnects = !matches!(self.supervisors, Supervisors::Inside);
        let begun =
            Supervised::begin(session_id, directory, stream, incarnation, notices, reconnects, page).await;
        begun.map(|(supervised, _)| supervised).map_err(|source| StartError::Talk { source })
    }

    fn start_inside(
        &self,
        configuration: SupervisorConfig,
        directory: &Path,
    ) -> Result<UnixStream, StartError> {
        let failed = |source| StartError::Directory { path: directory.to_owned(), source };
        let (near, far) = UnixStream::pair().map_err(failed)?;
        // One connection for the whole life of the supervisor: it ends when this process does.
        let (doors, incoming) = mpsc::channel(1);
        doors.try_send(far).map_err(|_| failed(io::ErrorKind::BrokenPipe.into()))?;
        let world = self.world.clone();
        tokio::spawn(async move {
            let _kept = doors;
            let supervising = async {
                let host = supervisor::real_host(&configuration)?;
                supervisor::run(configuration, world, host, incoming).await
            };
            if let Err(error) = supervising.await {
                error!(%error, "a supervisor inside this process failed");
            }
        });
        Ok(near)
    }

    async fn start_process(&self, directory: &SessionDirectory) -> Result<(), StartError> {
        let arguments = [OsString::from(directory.path())];
        let mut command = self.relaunch.command(Role::Supervisor, &arguments);
        command
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            // What it has to say later goes where this agent's own words go.
            .stderr(Stdio::inherit())
            // A signal for the agent's group is not for the supervisors: they outlive it.
            .process_group(0);
        let spawn = tokio::process::Command::from(command).kill_on_drop(false).spawn();
        let failed = |source| StartError::Spawn { program: self.relaunch.program.clone(), source };
        let mut child = spawn.map_err(failed)?;
        let stdout = child.stdout.take();
        // Reaped whenever it ends; what its end means is learned from its lock.
        tokio::spawn(async move {
            if let Err(error) = child.wait().await {
                warn!(%error, "a supervisor cannot be waited for");
            }
        });
        let mut said = String::new();
        if let Some(stdout) = stdout {
            let mut first_words = stdout.take(FIRST_WORDS_BYTES_MAX);
            let read = timeout(HELLO_MAX, first_words.read_to_string(&mut said)).await;
            read.map_err(|_| StartError::TooSlow)?.map_err(failed)?;
        }
        if said.trim() != READY {
            let said = if said.trim().is_empty() { "it ended without a word" } else { said.trim() };
            return Err(StartError::Said { said: printable(said.as_bytes(), 1_024) });
        }
        Ok(())
    }
}
