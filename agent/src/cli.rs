//! The command line of the agent: what each command does, in one place; how it does it lies in other rooms.

mod board;
mod dial;
mod logs;
mod pages;
mod status;
mod upkeep;

use std::{
    env,
    io::{self, IsTerminal as _, Write as _},
    net::SocketAddr,
    os::{linux::net::SocketAddrExt as _, unix::net::UnixDatagram},
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use clap::{Args, Parser, Subcommand, ValueEnum};
use millstream_common::{
    clock::World,
    protocol::{self, Build},
    text::spoken,
    tls::Role,
};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use tracing_subscriber::EnvFilter;

use crate::{
    child::{self, ChildError},
    config::{CONFIG_PATH, Config, ConfigError},
    door::{Door, DoorConfig, DoorError, Supervisors, base_environment, reload, renewing},
    entry::Relaunch,
    pki::{
        self, Authority, CERTIFICATE_LIFE, PkiError, Wanted, renewal,
        serve::{self, AuthorityServer, ServeError},
    },
    stdio::{Relay, RelayError},
    supervisor::cgroup::home,
};

/// Variable that says what is logged, such as `debug` or `millstream_agent=trace`.
const LOG_VARIABLE: &str = "MILLSTREAM_LOG";
/// Exit code when a person must change a file first: `EX_CONFIG` of `sysexits.h`, which the systemd unit names.
const EXIT_CONFIGURATION: u8 = 78;
/// Threads that serve connections: with two, TLS of one connection does not hold up another.
const WORKER_THREADS: usize = 2;

/// Runs blocks of code on this host for controllers.
#[derive(Debug, Parser)]
#[command(name = "millstream-agent", version = protocol::VERSION)]
struct CommandLine {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve controllers until stopped.
    Serve(Serve),
    /// Relay standard input and output to the agent on this host, or to one that is started on demand.
    Stdio(Stdio),
    /// Make and show certificates.
    #[command(subcommand)]
    Pki(Pki),
    /// Show what an agent does.
    Status(status::Status),
    /// Show what a task prints.
    Logs(logs::Logs),
    /// Show the barriers of a test that listens, and take a hand in them.
    Board(board::Board),
    /// Take no new sessions, and let those that are open go on to their end.
    Drain(upkeep::Drain),
    /// Take sessions again.
    Undrain(upkeep::Undrain),
    /// Try again to end and remove what ended sessions have left behind.
    Clean(upkeep::Clean),
    /// Print completions for a shell.
    Completions(pages::Completions),
    /// Write the manual pages of all commands.
    Manual(pages::Manual),
    /// Keep the control group of this process for agents until ended: for init systems.
    #[command(hide = true)]
    KeepGroup,
}

#[derive(Debug, Args)]
struct Serve {
    /// Configuration file. Without it, and without the default one, only this host is served.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Be the agent of a place that was made for a test, such as a container: serve the Unix socket alone, give blocks the
    /// whole environment of this program, and end when nobody has used it for so long.
    #[arg(long, value_name = "SPAN", value_parser = humantime::parse_duration, conflicts_with = "config")]
    idle: Option<Duration>,
}

#[derive(Debug, Args)]
struct Stdio {
    /// Unix socket of a running agent, which alone is meant. Without it: the system's, else one that is started on demand.
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// How long an agent that is started on demand stays when nobody uses it.
    #[arg(long, value_name = "SPAN", value_parser = humantime::parse_duration, default_value = "10s")]
    idle: Duration,
    /// What the first line of the output says behind `millstream-stdio`, instead of `ready`.
    #[arg(long, value_name = "WORD")]
    greeting: Option<String>,
    /// Be an agent of its own, on a socket in `--directory`, until standard input ends.
    #[arg(long, requires = "directory")]
    child: bool,
    /// Private directory of the child agent.
    #[arg(long, value_name = "DIR", requires = "child")]
    directory: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum Pki {
    /// Make a certificate authority.
    Init {
        /// Where its files go.
        #[arg(long, value_name = "DIR", default_value = "/etc/millstream/pki")]
        dir: PathBuf,
        /// Its name, for people.
        #[arg(long, default_value = "lab")]
        name: String,
    },
    /// Make a certificate with a role.
    Issue {
        /// Where the authority's files are and the new ones go.
        #[arg(long, value_name = "DIR", default_value = "/etc/millstream/pki")]
        dir: PathBuf,
        /// What its holder may do.
        #[arg(long, value_enum)]
        role: RoleWord,
        /// Name of its holder.
        #[arg(long)]
        name: String,
        /// Name or address by which an agent is dialled; once for each.
        #[arg(long, value_name = "HOST")]
        address: Vec<String>,
        /// How long it lives.
        #[arg(long, value_name = "SPAN", value_parser = humantime::parse_duration)]
        valid: Option<Duration>,
    },
    /// Take certificates back: agents that have the list refuse them, and end connections that were opened with them.
    Revoke {
        /// Where the authority's files are.
        #[arg(long, value_name = "DIR", default_value = "/etc/millstream/pki")]
        dir: PathBuf,
        /// Certificates in PEM form; their keys are not needed.
        #[arg(required = true, value_name = "FILE")]
        files: Vec<PathBuf>,
    },
    /// Renew certificates of agents that ask before theirs have expired: their `tls` has `renew` with this host.
    Serve {
        /// Where the authority's files are.
        #[arg(long, value_name = "DIR", default_value = "/etc/millstream/pki")]
        dir: PathBuf,
        /// Address to listen on.
        #[arg(long, value_name = "ADDRESS", default_value_t = SocketAddr::from(([0, 0, 0, 0], serve::PORT)))]
        listen: SocketAddr,
        /// Name or address by which agents dial this host; once for each.
        #[arg(long, required = true, value_name = "HOST")]
        address: Vec<String>,
    },
    /// Show certificates.
    Show {
        /// Files in PEM form.
        #[arg(required = true, value_name = "FILE")]
        files: Vec<PathBuf>,
    },
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum RoleWord {
    /// May run blocks.
    Controller,
    /// May only look.
    Operator,
    /// Is an agent.
    Agent,
}

impl From<RoleWord> for Role {
    fn from(word: RoleWord) -> Self {
        match word {
            RoleWord::Controller => Self::Controller,
            RoleWord::Operator => Self::Operator,
            RoleWord::Agent => Self::Agent,
        }
    }
}

/// Why a command did not do what it was asked.
#[derive(Debug, thiserror::Error)]
enum RunError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Door(#[from] DoorError),
    #[error(transparent)]
    Child(#[from] ChildError),
    #[error(transparent)]
    Pki(#[from] PkiError),
    #[error(transparent)]
    Serve(#[from] ServeError),
    #[error(transparent)]
    Relay(#[from] RelayError),
    #[error(transparent)]
    Status(#[from] status::StatusError),
    #[error(transparent)]
    Logs(#[from] logs::LogsError),
    #[error(transparent)]
    Board(#[from] board::BoardError),
    #[error(transparent)]
    Upkeep(#[from] upkeep::UpkeepError),
    #[error(transparent)]
    Page(#[from] pages::WritePageError),
    #[error("failed to {attempt}: {}", millstream_common::tls::reason(source))]
    System {
        attempt: &'static str,
        #[source]
        source: io::Error,
    },
}

fn system(attempt: &'static str) -> impl FnOnce(io::Error) -> RunError {
    move |source| RunError::System { attempt, source }
}

/// Does what the command line says.
#[must_use]
pub fn run() -> ExitCode {
    run_as(Build::OURS)
}

/// The same for an agent that says something else of itself: how tests get an agent of another build.
#[must_use]
pub fn run_as(build: Build) -> ExitCode {
    let done = match CommandLine::parse().command {
        Command::Serve(serve) => serve.run(build),
        Command::Stdio(stdio) => stdio.run(),
        Command::Pki(pki) => pki.run(),
        Command::Status(status) => run_alone(status.run()),
        Command::Logs(logs) => run_alone(logs.run()),
        Command::Board(board) => run_alone(board.run()),
        Command::Drain(drain) => run_alone(drain.run()),
        Command::Undrain(undrain) => run_alone(undrain.run()),
        Command::Clean(clean) => run_alone(clean.run()),
        Command::KeepGroup => keep_group(),
        Command::Completions(completions) => print(&completions.text()),
        Command::Manual(manual) => manual.write().map_err(RunError::from).and_then(|written| {
            print(&written.iter().map(|path| format!("made {}\n", path.display())).collect::<String>())
        }),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Standard error may be closed; the exit code says it as well.
            let _closed: io::Result<()> = writeln!(io::stderr(), "millstream-agent: {error}");
            error.exit_code()
        }
    }
}

impl RunError {
    /// Tells an init system whether trying again may help.
    fn exit_code(&self) -> ExitCode {
        match self {
            Self::Config(error) if !error.may_pass() => ExitCode::from(EXIT_CONFIGURATION),
            Self::Serve(ServeError::Authority(_)) => ExitCode::from(EXIT_CONFIGURATION),
            _ => ExitCode::FAILURE,
        }
    }
}

/// Runs what is done when it is done.
fn run_alone<E: Into<RunError>>(work: impl Future<Output = Result<(), E>>) -> Result<(), RunError> {
    runtime(1)?.block_on(work).map_err(Into::into)
}

fn runtime(threads: usize) -> Result<tokio::runtime::Runtime, RunError> {
    let mut builder = match threads {
        0 | 1 => tokio::runtime::Builder::new_current_thread(),
        _ => tokio::runtime::Builder::new_multi_thread(),
    };
    builder.worker_threads(threads.max(1)).enable_all().build().map_err(system("start the runtime"))
}

/// Writes to standard output.
fn print(text: &str) -> Result<(), RunError> {
    print_on(io::stdout().lock(), text).map(drop).map_err(system("write to standard output"))
}

/// Writes at once. A reader that has gone, such as `head`, is no error: whether one is there still is the answer.
fn print_on(mut output: impl io::Write, text: &str) -> io::Result<bool> {
    match output.write_all(text.as_bytes()).and_then(|()| output.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(error),
    }
}

/// Logs to standard error: with times and colours for people, without them for a journal that has its own.
pub(crate) fn log_to_standard_error(default: &str) {
    let filter = EnvFilter::try_from_env(LOG_VARIABLE).unwrap_or_else(|_| EnvFilter::new(default));
    let base = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_target(false)
        .with_ansi(io::stderr().is_terminal());
    let set = if env::var_os("JOURNAL_STREAM").is_some() {
        tracing::subscriber::set_global_default(base.without_time().finish())
    } else {
        tracing::subscriber::set_global_default(base.finish())
    };
    if set.is_err() {
        // Whoever embeds this program's rooms logs for itself.
        warn!("another subscriber has been set before");
    }
}

impl Serve {
    fn run(self, build: Build) -> Result<(), RunError> {
        log_to_standard_error("info");
        let built_in = || Config::built_in(Path::new("built-in configuration"));
        let config = match &self.config {
            Some(path) => Config::load(path)?,
            None if self.idle.is_some() => Config { listen: Vec::new(), ..built_in() },
            None if Path::new(CONFIG_PATH).exists() => Config::load(Path::new(CONFIG_PATH))?,
            None => built_in(),
        };
        let relaunch = Relaunch::of_this_program().map_err(system("find this program's own path"))?;
        let runtime = runtime(WORKER_THREADS)?;
        let served = runtime.block_on(serve(config, build, self.idle, relaunch));
        // Threads that wait for supervisors in the kernel hold nobody up.
        runtime.shutdown_background();
        served
    }
}

async fn serve(
    config: Config,
    build: Build,
    idle: Option<Duration>,
    relaunch: Relaunch,
) -> Result<(), RunError> {
    home::check();
    if let Some(paths) = &config.tls {
        renewal::finish_interrupted(&paths.value)?;
    }
    let tls = config.tls_config()?;
    let door_config = DoorConfig {
        state: config.state_directory.clone(),
        relaunch,
        base_environment: if idle.is_some() { child::whole_environment() } else { base_environment() },
        supervisors: Supervisors::Processes,
        build,
        blobs_bytes_max: config.shipped_files_bytes_max,
        audit: config.audit.clone(),
        bounds: config.bounds.clone(),
    };
    // First the state: an agent that may not use it must not take the socket of the one that does.
    let door = Door::open(door_config, World::system()).await?;
    let listeners = config.bind(tls.as_ref()).await?;
    let scraped = config.bind_metrics().await?;
    let shutdown = CancellationToken::new();
    end_on_signals(&shutdown)?;
    if let Some(idle) = idle {
        let (ending, shutdown) = (door.ending(), shutdown.clone());
        tokio::spawn(async move {
            ending.unused_for(idle).await;
            info!("not used for {}", spoken(idle));
            shutdown.cancel();
        });
    }
    if let (Some(paths), Some(tls)) = (&config.tls, &tls) {
        tokio::spawn(reload::keep_fresh(paths.value.clone(), tls.clone(), door.certificate()));
        let keeping = renewing::keep_valid(
            paths.value.clone(),
            config.renew.clone(),
            World::system(),
            door.certificate(),
        );
        tokio::spawn(keeping);
    }
    for listen in &config.listen {
        info!(address = %listen.value, tls = tls.is_some(), "listening");
    }
    info!(socket = %config.unix_socket.value.display(), state = %config.state_directory.display(), version = build.spoken.version, "listening");
    if let Some(listener) = scraped {
        tokio::spawn(door.metrics().serve(listener, shutdown.clone()));
    }
    if let Some(metrics) = &config.metrics {
        info!(address = %metrics.value, "numbers are served");
    }
    tell_init_system("READY=1");
    let served = door.serve(listeners, drop, shutdown).await;
    tell_init_system("STOPPING=1");
    // The next agent finds no socket that nobody listens on.
    let _gone_already = std::fs::remove_file(&config.unix_socket.value);
    info!("ended; sessions go on without this process until their leases end");
    Ok(served?)
}

fn end_on_signals(shutdown: &CancellationToken) -> Result<(), RunError> {
    let mut terminate = signal(SignalKind::terminate()).map_err(system("listen to SIGTERM"))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(system("listen to SIGINT"))?;
    let shutdown = shutdown.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        info!("asked to end");
        shutdown.cancel();
    });
    Ok(())
}

/// Holds a control group that outlives agents, until SIGTERM: then it asks the blocks there to end, and ends with them. On
/// a host without such groups there is nothing to hold, and the agent does without.
fn keep_group() -> Result<(), RunError> {
    log_to_standard_error("info");
    let kept = home::keep();
    match &kept {
        Ok(group) => info!(group = %group.display(), "kept for agents"),
        Err(error) => warn!(%error, "no control group is kept for agents"),
    }
    runtime(1)?.block_on(async {
        let mut terminate = signal(SignalKind::terminate()).map_err(system("listen to SIGTERM"))?;
        tell_init_system("READY=1");
        // None would mean that no signal can come any more.
        let _asked = terminate.recv().await;
        tell_init_system("STOPPING=1");
        if let Ok(group) = &kept {
            home::end_blocks(group).await;
        }
        Ok(())
    })
}

/// Tells an init system that waits for it; without one there is nobody to tell.
fn tell_init_system(word: &str) {
    let Some(path) = env::var_os("NOTIFY_SOCKET") else { return };
    let bytes = path.as_encoded_bytes();
    let address = match bytes.split_first() {
        Some((b'@', name)) => std::os::unix::net::SocketAddr::from_abstract_name(name),
        _ => std::os::unix::net::SocketAddr::from_pathname(&path),
    };
    let told = UnixDatagram::unbound()
        .and_then(|socket| address.and_then(|address| socket.send_to_addr(word.as_bytes(), &address)));
    if let Err(error) = told {
        warn!(%error, "the init system cannot be told");
    }
}

impl Stdio {
    fn run(self) -> Result<(), RunError> {
        match self.directory {
            Some(directory) if self.child => {
                let relaunch = Relaunch::of_this_program().map_err(system("find this program's own path"))?;
                Ok(child::run(&directory, relaunch)?)
            }
            _ => {
                let relaunch = Relaunch::of_this_program().map_err(system("find this program's own path"))?;
                let Self { socket, idle, greeting, .. } = self;
                Ok(Relay { socket, idle, greeting, relaunch }.run()?)
            }
        }
    }
}

impl Pki {
    fn run(self) -> Result<(), RunError> {
        let now_ns = World::system().clock.wall_ns();
        match self {
            Self::Init { dir, name } => {
                let authority = Authority::init(&dir, &name, now_ns)?;
                let (certificate, key) = (authority.certificate(), authority.key());
                print(&format!(
                    "made {} (every host and controller needs a copy)\nmade {} (keep it here, and secret)\nnext: \
                     millstream-agent pki issue --dir {} --role agent --name HOST --address ADDRESS\n",
                    certificate.display(),
                    key.display(),
                    dir.display(),
                ))
            }
            Self::Issue { dir, role, name, address, valid } => {
                let valid = valid.unwrap_or(CERTIFICATE_LIFE);
                let wanted = Wanted { role: role.into(), name, hosts: address, valid };
                let issued = Authority::at(&dir).issue(&wanted, now_ns)?;
                print(&format!(
                    "made {}\nmade {} (secret)\n",
                    issued.certificate.display(),
                    issued.key.display()
                ))?;
                print(&pki::show(&issued.certificate, now_ns)?.to_string())
            }
            Self::Revoke { dir, files } => {
                let authority = Authority::at(&dir);
                for revoked in authority.revoke(&files, now_ns)? {
                    let already = if revoked.already { " already" } else { "" };
                    print(&format!("revoked{already}: {} (serial {})\n", revoked.holder, revoked.serial))?;
                }
                print(&format!(
                    "wrote {0}\nnext: copy {0} to each agent, where `tls:` in agent.yaml has `revocations:` with its path; \
                     a running agent takes a new one at once\n",
                    authority.revocations().display()
                ))
            }
            Self::Serve { dir, listen, address } => serve_authority(&dir, listen, address),
            Self::Show { files } => {
                for file in files {
                    print(&pki::show(&file, now_ns)?.to_string())?;
                }
                Ok(())
            }
        }
    }
}

fn serve_authority(directory: &Path, listen: SocketAddr, hosts: Vec<String>) -> Result<(), RunError> {
    log_to_standard_error("info");
    runtime(1)?.block_on(async {
        let server = AuthorityServer::bind(directory, listen, hosts, World::system()).await?;
        let shutdown = CancellationToken::new();
        end_on_signals(&shutdown)?;
        let address = server.address().map_err(system("find the address that it listens on"))?;
        info!(%address, directory = %directory.display(), "renewing certificates of agents");
        tell_init_system("READY=1");
        Ok(server.serve(shutdown).await?)
    })
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        CommandLine::command().debug_assert();
    }

    #[test]
    fn the_units_know_the_exit_code_that_no_restart_helps() {
        let missing = RunError::from(Config::load(Path::new("/nonexistent/agent.yaml")).unwrap_err());
        assert_eq!(missing.exit_code(), ExitCode::from(EXIT_CONFIGURATION));
        let missing = RunError::from(ServeError::from(pki::show(Path::new("/nonexistent"), 0).unwrap_err()));
        assert_eq!(missing.exit_code(), ExitCode::from(EXIT_CONFIGURATION));
        for unit in [
            include_str!("../../deploy/systemd/millstream-agent.service"),
            include_str!("../../deploy/systemd/millstream-pki@.service"),
        ] {
            assert!(unit.contains(&format!("\nRestartPreventExitStatus={EXIT_CONFIGURATION}\n")), "{unit}");
        }
    }
}
