//! Opens a door and serves: takes the state directory and the control group, prepares the services, and ends them.

use std::{
    fs, io,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, atomic::AtomicU64},
    time::Duration,
};

use millstream_common::{clock::World, id::SessionId, limits, pipe, protocol::Build, text::printable};
use millstream_proto::v1::{self, agent_service_server::AgentServiceServer};
use rustix::fs::FlockOperation;
use tokio::sync::{Notify, mpsc};
use tokio_stream::{StreamExt as _, wrappers::ReceiverStream};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic_health::ServingStatus;
use tracing::warn;

use super::{
    SERVED, Shared, Supervisors,
    acceptor::{self, Connection, Listener, Places},
    identity::{self, Caller},
    ledger::{
        Ledger,
        audit::{Audit, AuditError},
    },
    metrics::Metrics,
    renewing::CertificateNote,
    service::Service,
    shares::Starts,
    status::{self, LastErrors},
    store::Store,
    supervisors::{self, Notice, Starter},
};
use crate::{
    entry::Relaunch,
    host,
    session::{Bounds, Drain, Event, Sessions},
    supervisor::{
        blobs::BlobError,
        cgroup::{
            Hierarchies, LimitsSource,
            claim::{AGENT_GROUP, Claim},
        },
    },
};

/// Notices of supervisors that wait for the door: each session has at most three in its life.
const NOTICES_COUNT_MAX: usize = limits::SESSIONS_COUNT_MAX * 4;

/// What is needed of a host beside a kernel: processes to be seen, an empty input for blocks, random numbers.
const NEEDED: [&str; 4] = ["/proc/self/exe", "/dev/null", "/dev/random", "/dev/urandom"];

/// What the door needs to be told.
#[derive(Debug, Clone)]
pub struct DoorConfig {
    /// Where sessions and blobs lie.
    pub state: PathBuf,
    /// How this program starts itself again.
    pub relaunch: Relaunch,
    /// Environment that every block gets.
    pub base_environment: Vec<(String, String)>,
    /// Where supervisors run.
    pub supervisors: Supervisors,
    /// Bytes that shipped files may take together: [`limits::BLOBS_BYTES_MAX`] for a real agent.
    pub blobs_bytes_max: u64,
    /// How long leases may be, and how much one identity may have.
    pub bounds: Bounds,
    /// What the agent says of itself: [`Build::OURS`] for a real one.
    pub build: Build,
    /// Where audit records go: a file, or the socket of a journal. None: into the agent's own log.
    pub audit: Option<PathBuf>,
}

/// Why the door does not open.
#[derive(Debug, thiserror::Error)]
pub enum DoorError {
    /// What the kernel gives to everybody is not mounted here: a bare `chroot`.
    #[error("there is no `{path}` here: mount /proc and /dev, as every container engine does")]
    Bare {
        /// What was missed first.
        path: &'static str,
    },
    /// The state directory cannot be used.
    #[error("failed to use the state directory `{}`: {}; make it writable for this user, or set `state_directory` to another", path.display(), millstream_common::tls::reason(source))]
    State {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Sockets of blocks could not be bound below it.
    #[error("the state directory `{}` has a path of {length} bytes, but sockets below it leave room for {STATE_PATH_BYTES_MAX}: set `state_directory` (for local streams the variable TMPDIR) to a shorter one", path.display())]
    TooLong {
        /// The directory.
        path: PathBuf,
        /// Bytes of its path.
        length: usize,
    },
    /// The store of shipped files cannot be used.
    #[error("failed to use the store of shipped files: {}", millstream_common::tls::reason(source))]
    Blobs {
        /// Why not.
        #[source]
        source: BlobError,
    },
    /// Who runs what here cannot be put on record.
    #[error(transparent)]
    Audit(#[from] AuditError),
    /// Another agent uses it.
    #[error("the state directory is in use by the agent with process {pid} (lock `{}`): stop that agent, or set `state_directory` to another", path.display())]
    InUse {
        /// The file that is locked.
        path: PathBuf,
        /// Process that holds it, as it wrote itself down.
        pid: String,
    },
    /// The services cannot be described.
    #[error("failed to prepare reflection")]
    Reflection(#[source] tonic_reflection::server::Error),
    /// Serving ended with an error.
    #[error("failed to serve")]
    Serve(#[source] tonic::transport::Error),
}

/// An open door. Dropping it ends nothing: cancel the token that it was given.
#[derive(Debug)]
pub struct Door {
    pub(super) shared: Arc<Shared>,
    /// Held for as long as this agent uses the state directory.
    _lock: fs::File,
    notices: mpsc::Receiver<(SessionId, Notice)>,
}

impl Door {
    /// Where the status finds what is known of the agent's own certificate.
    #[must_use]
    pub fn certificate(&self) -> Arc<CertificateNote> {
        Arc::clone(&self.shared.certificate)
    }

    /// Prepares everything but listening: takes the state directory, finds what an earlier agent has left.
    ///
    /// # Errors
    /// When /proc or /dev is not mounted, the state directory cannot be used, or another agent uses it.
    pub async fn open(config: DoorConfig, world: World) -> Result<Self, DoorError> {
        if let Some(path) = NEEDED.into_iter().find(|path| !Path::new(path).exists()) {
            return Err(DoorError::Bare { path });
        }
        let state_error = |source| DoorError::State { path: config.state.clone(), source };
        status::prepare_state(&config.state).map_err(state_error)?;
        let lock = lock_state(&config.state)?;
        let audit = Audit::open(config.audit.as_deref())?;
        let sessions = supervisors::sessions_directory(&config.state);
        let store = Store::open(config.state.join("blobs"), sessions, config.blobs_bytes_max, world.clone())
            .map_err(|source| DoorError::Blobs { source })?;
        let incarnation = world.ids.token();
        let hierarchies = Hierarchies::find();
        let own = match config.supervisors {
            Supervisors::Processes | Supervisors::Inside => own_group(&hierarchies, &config.state),
            // What contains their trees is not this host.
            Supervisors::Elsewhere(_) => None,
        };
        let (cgroup, claim) = own.unzip();
        let (notices_in, notices) = mpsc::channel(NOTICES_COUNT_MAX);
        let starter = Starter {
            relaunch: config.relaunch,
            base_environment: config.base_environment,
            blobs: config.state.join("blobs"),
            cgroup: cgroup.clone(),
            world: world.clone(),
            incarnation: incarnation.clone(),
            supervisors: config.supervisors,
        };
        let (host, clock) = (host::facts(), Arc::clone(&world.clock));
        let shared = Arc::new(Shared {
            started: world.clock.since_boot(),
            world,
            incarnation,
            build: config.build,
            host: host.clone(),
            capabilities: v1::Capabilities {
                containment: if cgroup.is_some() { "cgroup-v2" } else { "subreaper" }.to_owned(),
                limits: limits_word(hierarchies.limits_source()).to_owned(),
                python: host::python().map(|path| path.display().to_string()).unwrap_or_default(),
                features: config.build.features.iter().map(|&feature| feature.to_owned()).collect(),
            },
            state: config.state,
            store,
            last_errors: LastErrors::default(),
            ledger: Ledger::new(audit, host.hostname.clone(), clock),
            disk_use: Arc::default(),
            starter,
            sessions: Mutex::new(Sessions::within(config.bounds)),
            record: Mutex::default(),
            deadline_changed: Notify::new(),
            askings: Mutex::default(),
            starts: Starts::default(),
            certificate: Arc::default(),
            next_ticket: AtomicU64::new(1),
            supervised: Mutex::default(),
            notices: notices_in,
            places: Places::new(),
            tracker: TaskTracker::new(),
            _claim: claim,
        });
        shared.recall();
        shared.find_sessions().await;
        shared.sweep_groups();
        Ok(Self { shared, _lock: lock, notices })
    }

    /// Serves until `shutdown` is cancelled and the calls that run then have ended, or a moment has passed. Connections come
    /// from the listeners, and from whoever holds the sender that `made_elsewhere` gets.
    ///
    /// # Errors
    /// When the services cannot be served.
    pub async fn serve(
        self,
        listeners: Vec<Listener>,
        made_elsewhere: impl FnOnce(mpsc::Sender<Connection>),
        shutdown: CancellationToken,
    ) -> Result<(), DoorError> {
        let Self { shared, _lock, mut notices } = self;
        let tracker = shared.tracker.clone();
        let (accepted, incoming) =
            acceptor::accept(listeners, &shared.places, &shared.ledger, &shutdown, &tracker);
        made_elsewhere(accepted);
        let noticing = {
            let shared = Arc::clone(&shared);
            async move {
                while let Some((session_id, notice)) = notices.recv().await {
                    shared.take_notice(session_id, notice);
                }
            }
        };
        let service = AgentServiceServer::new(Service::new(Arc::clone(&shared)))
            .max_decoding_message_size(limits::BULK_MESSAGE_BYTES_MAX)
            .max_encoding_message_size(limits::BULK_MESSAGE_BYTES_MAX);
        let (health, health_service) = tonic_health::server::health_reporter();
        let (reflection, reflection_alpha) = reflection().map_err(DoorError::Reflection)?;
        let serving = pipe::server()
            .layer(identity::AuthoriseLayer::new(Arc::clone(&shared.ledger)))
            .add_service(service)
            .add_service(health_service)
            .add_service(reflection)
            .add_service(reflection_alpha)
            .serve_with_incoming_shutdown(
                ReceiverStream::new(incoming).map(Ok::<_, io::Error>),
                shutdown.clone().cancelled_owned(),
            );
        let ended = async {
            shutdown.cancelled().await;
            tokio::time::sleep(limits::DOOR_END_MAX).await;
        };
        let served = tokio::select! {
            served = serving => served.map_err(DoorError::Serve),
            // Watchers never end by themselves.
            () = ended => Ok(()),
            () = noticing => Ok(()),
            () = tell_health(&shared, health) => Ok(()),
            () = Arc::clone(&shared).tell_time() => Ok(()),
        };
        shared.leave_group();
        // Records of what has just ended: nobody is left who would wait for them.
        drop(tokio::task::spawn_blocking(move || shared.ledger.audit.flush(limits::CLOSE_MAX)).await);
        served
    }

    /// What scrapers are answered by, on a listener of its own.
    #[must_use]
    pub fn metrics(&self) -> Metrics {
        Metrics { shared: Arc::clone(&self.shared) }
    }

    /// For an agent that ends when its one controller is gone, or when nobody uses it.
    pub(crate) fn ending(&self) -> Ending {
        Ending { shared: Arc::clone(&self.shared) }
    }
}

/// Tells whether anybody uses a door that serves, and ends all its sessions.
#[derive(Debug, Clone)]
pub(crate) struct Ending {
    shared: Arc<Shared>,
}

impl Ending {
    /// Whether there is neither a connection nor a session that runs, or could run, anything.
    pub(crate) fn is_unused(&self) -> bool {
        *self.shared.places.taken().borrow() == 0 && self.shared.sessions().all_settled()
    }

    /// Waits until the door was not used for a while.
    pub(crate) async fn unused_for(&self, span: Duration) {
        let mut taken = self.shared.places.taken();
        let mut sessions = self.shared.status_changes();
        loop {
            // The counter lives as long as this handle: none of these waits can fail.
            drop(taken.wait_for(|count| *count == 0).await);
            sessions.borrow_and_update();
            let is_unused = self.is_unused();
            tokio::select! {
                _ = taken.wait_for(|count| *count > 0) => {}
                _ = sessions.changed() => {}
                () = tokio::time::sleep(span), if is_unused => return,
            }
        }
    }

    /// Closes every session and waits until all that belongs to them is gone.
    pub(crate) async fn close_all(&self) -> Vec<String> {
        let since = status::clock_text(self.shared.world.clock.wall_ns());
        let (reason, by) = ("the agent is ending".to_owned(), Caller::Starter.owner());
        self.shared.tell(Event::DrainBegan(Drain { reason, by, since }));
        let sessions: Vec<SessionId> = self.shared.sessions().iter().map(|(id, _)| id).collect();
        let mut survivors = Vec::new();
        for session_id in sessions {
            survivors.extend(self.shared.close(session_id).await);
        }
        self.shared.leave_group();
        survivors
    }
}

/// Tells whoever asks for the agent's health whether it takes sessions: the service by its name, and the whole by none.
async fn tell_health(shared: &Shared, health: tonic_health::server::HealthReporter) {
    let mut changes = shared.status_changes();
    let mut told = None;
    loop {
        let draining = shared.sessions().draining().is_some();
        if told.replace(draining) != Some(draining) {
            let status = if draining { ServingStatus::NotServing } else { ServingStatus::Serving };
            for service in ["", SERVED[0]] {
                health.set_service_status(service, status).await;
            }
        }
        // It ends with the door.
        if changes.changed().await.is_err() {
            return;
        }
    }
}

/// The control group under which this agent's sessions get theirs: beside others of this host, and the same for the next
/// agent on this state directory. None where trees cannot be contained that way.
fn own_group(hierarchies: &Hierarchies, state: &Path) -> Option<(PathBuf, Claim)> {
    let parent = hierarchies.unified.as_ref()?;
    let state = state.canonicalize().unwrap_or_else(|_| state.to_owned());
    let digest = blake3::hash(state.as_os_str().as_encoded_bytes()).to_hex();
    let group = parent.join(format!("{AGENT_GROUP}{}", &digest[..12]));
    match Claim::make(&group) {
        Ok(claim) => Some((group, claim)),
        Err(error) => {
            warn!(group = %group.display(), %error, "no control group can be made: trees are contained by subreapers");
            None
        }
    }
}

/// How limits are set, as operators see it.
fn limits_word(source: LimitsSource) -> &'static str {
    match source {
        LimitsSource::Unified => "cgroup-v2",
        LimitsSource::Legacy => "cgroup-v1",
        LimitsSource::None => "none",
    }
}

/// Path of a state directory. The system takes 107 bytes for the path of a socket, and a block's needs 69 of them:
/// `/sessions/`, 36 digits, `/sync/`, 12 digits, `.sock`.
pub(crate) const STATE_PATH_BYTES_MAX: usize = 107 - 69;

/// Takes the state directory for this process alone.
fn lock_state(state: &Path) -> Result<fs::File, DoorError> {
    let length = state.as_os_str().len();
    if length > STATE_PATH_BYTES_MAX {
        return Err(DoorError::TooLong { path: state.to_owned(), length });
    }
    let path = state.join("agent.lock");
    let failed = |source| DoorError::State { path: state.to_owned(), source };
    let file =
        fs::OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(&path);
    let mut file = file.map_err(failed)?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => {
            let mut pid = String::new();
            io::Read::read_to_string(&mut file, &mut pid).map_err(failed)?;
            let pid = printable(pid.trim().as_bytes(), 16);
            return Err(DoorError::InUse { path, pid });
        }
        Err(error) => return Err(failed(error.into())),
    }
    file.set_len(0).map_err(failed)?;
    io::Write::write_all(&mut file, std::process::id().to_string().as_bytes()).map_err(failed)?;
    Ok(file)
}

/// Reflection of exactly what is served, in the version that tools speak today and in the one that older ones ask for.
fn reflection() -> Result<
    (
        tonic_reflection::server::v1::ServerReflectionServer<
            impl tonic_reflection::server::v1::ServerReflection,
        >,
        tonic_reflection::server::v1alpha::ServerReflectionServer<
            impl tonic_reflection::server::v1alpha::ServerReflection,
        >,
    ),
    tonic_reflection::server::Error,
> {
    let builder = || {
        let mut builder = tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(millstream_proto::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET);
        for service in SERVED.iter().filter(|service| !service.starts_with("grpc.reflection.")) {
            builder = builder.with_service_name(*service);
        }
        builder
    };
    Ok((builder().build_v1()?, builder().build_v1alpha()?))
}

/// The base environment of blocks on a shared agent: what a program needs to find its way, nothing of the agent's own.
#[must_use]
pub fn base_environment() -> Vec<(String, String)> {
    ["PATH", "HOME", "LANG", "USER", "SHELL", "TZ"]
        .into_iter()
        .filter_map(|name| Some((name.to_owned(), std::env::var(name).ok()?)))
        .collect()
}
