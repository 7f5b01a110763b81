//! The agent of local streams: one child process for each test, started when first needed, gone when the test is.
//!
//! The child is this very program, started again through its entry, or `millstream-agent` from the path. It is told a
//! private directory, in which it listens on `agent.sock`; it says one line on its standard output when it does; and it
//! cleans up and ends when its standard input ends, which also happens when this process dies in any way.

use std::{
    env,
    ffi::OsString,
    fs::{self, DirBuilder, File},
    io::{self, BufRead as _, BufReader, Read as _},
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use millstream_agent::entry::{Relaunch, Role};
use millstream_common::{
    clock::{Ids as _, SystemIds},
    text::printable,
};
use tokio::{net::UnixStream, sync::Mutex, task::spawn_blocking};

use super::{DialError, Dialing, Reach, Releasing};
use crate::{alone::ALONE_VARIABLE, entry};

/// The agent's program, when this one cannot be started again.
const PROGRAM: &str = "millstream-agent";
/// Its socket in its directory.
const SOCKET: &str = "agent.sock";
/// What it says of itself.
const LOG: &str = "agent.log";
/// Directories of sockets must be short: the path of a socket has at most 107 bytes.
const DIRECTORY_BYTES_MAX: usize = 40;

/// The child agent of one test.
#[derive(Debug, Default)]
pub(crate) struct Local {
    agent: Mutex<Option<Agent>>,
}

/// A running child. Dropping it ends its standard input, and with it the child.
#[derive(Debug)]
struct Agent {
    child: Child,
    program: PathBuf,
    directory: PathBuf,
}

impl Local {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// The socket of the child, which is started when there is none.
    async fn socket(&self) -> Result<PathBuf, DialError> {
        let mut agent = self.agent.lock().await;
        if let Some(running) = &mut *agent {
            return match running.child.try_wait() {
                Ok(None) => Ok(running.directory.join(SOCKET)),
                Ok(Some(status)) => Err(running.failed(format!("it ended by itself with {status}"))),
                Err(error) => Err(running.failed(error.to_string())),
            };
        }
        let started = spawn_blocking(Agent::start).await.expect("starting a process does not panic")?;
        let socket = started.directory.join(SOCKET);
        *agent = Some(started);
        Ok(socket)
    }
}

impl Reach for Local {
    fn dial(&self) -> Dialing<'_> {
        Box::pin(async {
            let socket = self.socket().await?;
            let pipe = UnixStream::connect(&socket)
                .await
                .map_err(|source| DialError::Connect { address: self.describe(), source })?;
            Ok(Box::new(pipe) as _)
        })
    }

    fn describe(&self) -> String {
        "local".to_owned()
    }

    fn host(&self) -> String {
        "127.0.0.1".to_owned()
    }

    fn what_to_check(&self) -> String {
        "Check that nothing has ended the agent of the local streams, a child of this test".to_owned()
    }

    fn release(&self) -> Releasing<'_> {
        Box::pin(async {
            if let Some(agent) = self.agent.lock().await.take() {
                // The caller waits only so long; the thread ends with the child.
                let _ended = spawn_blocking(move || agent.end()).await;
            }
            Vec::new()
        })
    }
}

impl Agent {
    /// Starts the child and waits until it listens. Blocks the thread.
    fn start() -> Result<Self, DialError> {
        let relaunch = match entry::relaunch() {
            Ok(relaunch) => Some(relaunch),
            Err(entry::EntryError::NoEntry) => None,
            Err(error) => {
                return Err(DialError::LocalAgent {
                    program: env::args_os().next().unwrap_or_default().into(),
                    reason: error.to_string(),
                });
            }
        };
        let directory = private_directory().map_err(|error| DialError::LocalAgent {
            program: PROGRAM.into(),
            reason: format!("no private directory can be made for it: {error}"),
        })?;
        let (program, command) = match relaunch {
            Some(relaunch) => (relaunch.program.clone(), again(&relaunch, &directory)),
            None => match in_path(PROGRAM) {
                Some(program) => (program.clone(), separate(&program, &directory)),
                None => {
                    let _removed = fs::remove_dir_all(&directory);
                    return Err(DialError::NoLocalAgent);
                }
            },
        };
        let started = Self::spawn(program, command, directory.clone());
        if started.is_err() {
            // Nothing is in it but what was said above.
            let _removed = fs::remove_dir_all(&directory);
        }
        started
    }

    fn spawn(program: PathBuf, mut command: Command, directory: PathBuf) -> Result<Self, DialError> {
        let failed = |reason: String| DialError::LocalAgent { program: program.clone(), reason };
        let log = File::create(directory.join(LOG)).map_err(|error| failed(error.to_string()))?;
        let child = command
            .env_remove(ALONE_VARIABLE)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .map_err(|error| failed(error.to_string()))?;
        let mut agent = Self { child, program: program.clone(), directory };
        let output = agent.child.stdout.take().expect("it was asked for");
        let mut line = String::new();
        // It says one line when it listens, and ends its output when it cannot.
        match BufReader::new(output.take(4_096)).read_line(&mut line) {
            Ok(_) if line.trim_end() == "ready" => Ok(agent),
            Ok(0) => {
                let status = agent.child.wait().map(|status| status.to_string()).unwrap_or_default();
                Err(agent.failed(format!("it ended with {status} before it listened")))
            }
            Ok(_) => {
                Err(agent.failed(format!("it said `{}` instead of `ready`", printable(line.as_bytes(), 128))))
            }
            Err(error) => Err(agent.failed(error.to_string())),
        }
    }

    /// An error with the last thing that the child said.
    fn failed(&self, reason: String) -> DialError {
        let mut said = String::new();
        if let Ok(file) = File::open(self.directory.join(LOG)) {
            // Whatever could be read is the best there is to show.
            let _read = file.take(64 * 1024).read_to_string(&mut said);
        }
        let reason = match said.lines().rev().find(|line| !line.trim().is_empty()) {
            Some(last) => format!("{reason}: {}", printable(last.as_bytes(), 512)),
            None => reason,
        };
        DialError::LocalAgent { program: self.program.clone(), reason }
    }

    /// Ends the child and waits for it. Blocks the thread.
    fn end(mut self) {
        drop(self.child.stdin.take());
        let _status = self.child.wait();
        // The child removes its own directory; this is for one that was killed.
        let _removed = fs::remove_dir_all(&self.directory);
    }
}

/// This program as the child agent.
fn again(relaunch: &Relaunch, directory: &Path) -> Command {
    relaunch.command(Role::Child, &[OsString::from(directory)])
}

/// The agent's own program as the child agent.
fn separate(program: &Path, directory: &Path) -> Command {
    let mut command = Command::new(program);
    command.args(["stdio", "--child"]).arg("--directory").arg(directory);
    command
}

/// A directory that only this user can enter.
fn private_directory() -> io::Result<PathBuf> {
    let base = env::temp_dir();
    let base = if base.as_os_str().len() > DIRECTORY_BYTES_MAX { PathBuf::from("/tmp") } else { base };
    let path = base.join(format!("millstream-{}", &SystemIds.token()[..12]));
    DirBuilder::new().mode(0o700).create(&path)?;
    Ok(path)
}

fn in_path(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH")?;
    env::split_paths(&path).map(|directory| directory.join(program)).find(|path| path.is_file())
}
