//! Commands of whoever keeps the host: drain it, take sessions again, clean up what ended sessions have left behind.
//!
//! They go through the agent's Unix socket: whoever may make these calls is on the host.

use std::{fmt::Write as _, path::PathBuf, time::Duration};

use clap::Args;
use millstream_common::{
    pipe::{self, BoxedPipe, ConnectError},
    text::counted,
};
use millstream_proto::v1::{self, agent_service_client::AgentServiceClient};
use tokio::{net::UnixStream, time::timeout};
use tonic::transport::Channel;

use super::{dial::SOCKET_VARIABLE, print};
use crate::config::UNIX_SOCKET;

/// Where the agent is.
#[derive(Debug, Args)]
struct Socket {
    /// Unix socket of the running agent.
    #[arg(long, value_name = "PATH", env = SOCKET_VARIABLE, default_value = UNIX_SOCKET)]
    socket: PathBuf,
}

/// Options of `drain`.
#[derive(Debug, Args)]
pub(super) struct Drain {
    #[command(flatten)]
    socket: Socket,
    /// Why, for everybody who is refused meanwhile.
    #[arg(long, value_name = "TEXT", default_value = "")]
    reason: String,
    /// Return when the last session has ended.
    #[arg(long)]
    wait: bool,
    /// With `--wait`: for how long at most.
    #[arg(long, value_name = "SPAN", value_parser = humantime::parse_duration, requires = "wait")]
    timeout: Option<Duration>,
}

/// Options of `undrain`.
#[derive(Debug, Args)]
pub(super) struct Undrain {
    #[command(flatten)]
    socket: Socket,
}

/// Options of `clean`.
#[derive(Debug, Args)]
pub(super) struct Clean {
    #[command(flatten)]
    socket: Socket,
    /// Forget even what is still there, so that the host can be reserved again.
    #[arg(long)]
    force: bool,
}

/// Why the host is not as it was asked to be.
#[derive(Debug, thiserror::Error)]
pub(super) enum UpkeepError {
    #[error("`{}`: {source}; is the agent running? (`--socket` names another)", socket.display())]
    Connect {
        socket: PathBuf,
        #[source]
        source: ConnectError,
    },
    #[error("the agent refused: {}", pipe::call_failure(source))]
    Call {
        #[source]
        source: Box<tonic::Status>,
    },
    #[error("the agent ended while its sessions were waited for: it drains still when it is back")]
    Ended,
    #[error("after {} there is still {} to go; the agent goes on draining", humantime::format_duration(*patience), counted(*count, "session"))]
    TimedOut { patience: Duration, count: usize },
    #[error("{} still there; end it by hand and say this again, or with `--force` if it does no harm", counted(*count, "thing"))]
    Unclean { count: usize },
    #[error(transparent)]
    Print(Box<super::RunError>),
}

impl From<tonic::Status> for UpkeepError {
    fn from(source: tonic::Status) -> Self {
        Self::Call { source: Box::new(source) }
    }
}

fn say(text: &str) -> Result<(), UpkeepError> {
    print(text).map_err(|error| UpkeepError::Print(Box::new(error)))
}

impl Socket {
    async fn client(&self) -> Result<AgentServiceClient<Channel>, UpkeepError> {
        let path = self.socket.clone();
        let dial = || async move { Ok(Box::new(UnixStream::connect(path).await?) as BoxedPipe) };
        let channel = pipe::endpoint_channel(dial).await;
        let failed = |source| UpkeepError::Connect { socket: self.socket.clone(), source };
        Ok(AgentServiceClient::new(channel.map_err(failed)?))
    }
}

impl Drain {
    pub(super) async fn run(self) -> Result<(), UpkeepError> {
        let mut client = self.socket.client().await?;
        let request = v1::DrainRequest { reason: self.reason };
        let running = client.drain(request).await?.into_inner().sessions_count;
        let running = usize::try_from(running).unwrap_or(usize::MAX);
        say(&format!("draining: takes nothing new; {} to go\n", counted(running, "session")))?;
        if !self.wait {
            return Ok(());
        }
        let mut left = running;
        let waiting = wait_until_idle(&mut client, &mut left);
        match self.timeout {
            None => waiting.await?,
            Some(patience) => match timeout(patience, waiting).await {
                Ok(waited) => waited?,
                Err(_) => return Err(UpkeepError::TimedOut { patience, count: left }),
            },
        }
        say("drained: no session runs\n")
    }
}

/// Watches the agent until no session has a supervisor or may still get one; those that are over and of which only results are
/// kept have neither that nor a lease.
async fn wait_until_idle(
    client: &mut AgentServiceClient<Channel>,
    left: &mut usize,
) -> Result<(), UpkeepError> {
    let mut watched = client.watch_status(v1::WatchStatusRequest {}).await?.into_inner();
    while let Some(message) = watched.message().await? {
        let sessions = message.status.unwrap_or_default().sessions;
        let has_lease = |session: &v1::SessionStatus| {
            session.lease_left.is_some_and(|left| left != prost_types::Duration::default())
        };
        let goes_on = |session: &&v1::SessionStatus| session.supervisor_pid > 0 || has_lease(session);
        *left = sessions.iter().filter(goes_on).count();
        if *left == 0 {
            return Ok(());
        }
    }
    Err(UpkeepError::Ended)
}

impl Undrain {
    pub(super) async fn run(self) -> Result<(), UpkeepError> {
        let mut client = self.socket.client().await?;
        let was_draining = client.undrain(v1::UndrainRequest {}).await?.into_inner().was_draining;
        say(if was_draining { "takes sessions again\n" } else { "takes sessions; it was not draining\n" })
    }
}

impl Clean {
    pub(super) async fn run(self) -> Result<(), UpkeepError> {
        let mut client = self.socket.client().await?;
        let request = v1::CleanRequest { force: self.force };
        let left = client.clean(request).await?.into_inner().survivors;
        let mut text = String::new();
        for survivor in &left {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "{}", survivor_line(survivor));
        }
        match (left.len(), self.force) {
            (0, _) => say("clean\n"),
            (_, true) => say(&format!("{text}forgotten: the host can be reserved again\n")),
            (count, false) => {
                say(&text)?;
                Err(UpkeepError::Unclean { count })
            }
        }
    }
}

/// Something that was left behind, in one line.
pub(super) fn survivor_line(survivor: &v1::Survivor) -> String {
    let what = match survivor.pid {
        0 => survivor.what.clone(),
        pid => format!("process {pid} `{}`", survivor.what),
    };
    let block = if survivor.block.is_empty() { String::new() } else { format!(" of {}", survivor.block) };
    format!(
        "left behind: {what}{block}, session {} of {} ({})",
        survivor.session_id, survivor.owner, survivor.client
    )
}
