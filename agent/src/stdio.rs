//! Standard input and output as one connection to the agent of this host: what ssh, containers and commands run.
//!
//! It says one greeting line when it has a connection, so that whoever dials knows where the noise of shells ends, and
//! says nothing else on its standard output. Without a system's agent that this user may use, one is started on demand.

use std::{
    ffi::OsString,
    fs::File,
    io::{self, Write as _},
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::net::UnixStream,
    },
    path::{Path, PathBuf},
    process::ExitCode,
    sync::mpsc,
    thread,
    time::Duration,
};

use millstream_common::protocol::GREETING;

use crate::{
    config::UNIX_SOCKET,
    entry::Relaunch,
    on_demand::{self, OnDemandError},
};

/// What the greeting says behind its first word unless it is told.
const PLAIN: &str = "ready";
/// As much as a pipe of the system holds, and some more for sockets.
const BUFFER_BYTES: usize = 128 * 1024;

/// Why nothing is relayed.
#[derive(Debug, thiserror::Error)]
pub enum RelayError {
    /// No agent.
    #[error("no agent listens on `{}`: {}; start one with `millstream-agent serve`, or leave `--socket` out: then one is started on demand", path.display(), millstream_common::tls::reason(source))]
    NoAgent {
        /// Its socket.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// No agent of one's own.
    #[error(transparent)]
    OnDemand(#[from] OnDemandError),
    /// The standard descriptors.
    #[error("failed to take over the standard input and output: {}", millstream_common::tls::reason(source))]
    Standard {
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The role was started by something else than this program's other end.
    #[error("the role needs one argument: the word of its greeting")]
    Arguments,
}

/// What is relayed, and where to.
#[derive(Debug, Clone)]
pub struct Relay {
    /// The one agent that is meant. Without it: the system's, else one on demand.
    pub socket: Option<PathBuf>,
    /// How long an agent that is started on demand stays without being used.
    pub idle: Duration,
    /// What the greeting says behind its first word.
    pub greeting: Option<String>,
    /// How this program starts itself again.
    pub relaunch: Relaunch,
}

/// The role `stdio`, for a program that can be started again as it is: the argument is the greeting's word.
pub(crate) fn main(arguments: Vec<OsString>, relaunch: Relaunch) -> ExitCode {
    let mut arguments = arguments.into_iter();
    let relayed = match (arguments.next().map(OsString::into_string), arguments.next()) {
        (Some(Ok(word)), None) => {
            let relay = Relay { socket: None, idle: on_demand::IDLE, greeting: Some(word), relaunch };
            relay.run()
        }
        _ => Err(RelayError::Arguments),
    };
    match relayed {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Standard error may be closed; the exit code says it as well.
            let _closed: io::Result<()> = writeln!(io::stderr(), "millstream: {error}");
            ExitCode::FAILURE
        }
    }
}

impl Relay {
    /// Relays until either side ends.
    ///
    /// # Errors
    /// When there is no agent, and none can be started.
    pub fn run(self) -> Result<(), RelayError> {
        let standard = |source| RelayError::Standard { source };
        let (mut input, mut output) = take_standard().map_err(standard)?;
        let mut to_agent = match &self.socket {
            Some(path) => UnixStream::connect(path)
                .map_err(|source| RelayError::NoAgent { path: path.clone(), source })?,
            None => match on_demand::agent_of_this_host(Path::new(UNIX_SOCKET)) {
                Some(agent) => agent,
                None => on_demand::connect(&self.relaunch, self.idle)?,
            },
        };
        let mut from_agent = to_agent.try_clone().map_err(standard)?;
        // On a line of its own, whatever was said before.
        let word = self.greeting.as_deref().unwrap_or(PLAIN);
        output.write_all(format!("\n{GREETING} {word}\n").as_bytes()).map_err(standard)?;
        let (ended, end) = mpsc::sync_channel(2);
        let other = ended.clone();
        thread::spawn(move || {
            let _why = pass(&mut input, &mut to_agent);
            let _ending: Result<(), _> = ended.send(());
        });
        thread::spawn(move || {
            let _why = pass(&mut from_agent, &mut output);
            let _ending: Result<(), _> = other.send(());
        });
        // The end of one side is the end of both: a controller that has gone says nothing more, and neither does an agent.
        // Why a pipe broke is known to whoever broke it. The other thread ends with this process.
        let _first = end.recv();
        on_demand::outlive_agent();
        Ok(())
    }
}

/// Passes on what comes, as it comes. `io::copy` would let the kernel move the bytes, which on some holds the first of them
/// back until there are more.
fn pass(from: &mut impl io::Read, to: &mut impl io::Write) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(length) => to.write_all(&buffer[..length])?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Moves standard input and output away, so that nothing that prints can reach the connection.
fn take_standard() -> io::Result<(File, File)> {
    let input: OwnedFd = rustix::io::fcntl_dupfd_cloexec(io::stdin().as_fd(), 3)?;
    let output: OwnedFd = rustix::io::fcntl_dupfd_cloexec(io::stdout().as_fd(), 3)?;
    let null = rustix::fs::open(c"/dev/null", rustix::fs::OFlags::RDWR, rustix::fs::Mode::empty())?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(io::stderr().as_fd())?;
    Ok((input.into(), output.into()))
}
