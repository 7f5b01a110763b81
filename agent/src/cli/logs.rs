//! What a task prints, line by line, as an operator sees it: the last lines, and those that come.

use std::{env, io};

use clap::Args;
use millstream_common::{convert, pipe};
use millstream_proto::v1::{self, LogChannel, agent_service_client::AgentServiceClient};

use super::{
    dial::{DialError, Dialling, SOCKET_VARIABLE},
    print_on,
};
use crate::{config::UNIX_SOCKET, door::status::clock_text};

/// Options of `logs`.
#[derive(Debug, Args)]
pub(super) struct Logs {
    /// The task: its stream, `STREAM/BLOCK`, or its number or the beginning of that. Of several that are meant the one that runs.
    task: String,
    /// The agent: the path of its Unix socket, `tls://HOST[:PORT]`, or `tcp://ADDRESS[:PORT]` on this host. Without it the one of
    /// this host, whose socket is the usual one or that in MILLSTREAM_SOCKET.
    #[arg(long, value_name = "AGENT")]
    agent: Option<String>,
    #[command(flatten)]
    dialling: Dialling,
    /// How many of the last lines; at most 1000.
    #[arg(short = 'n', long, value_name = "COUNT", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1000))]
    lines: u32,
    /// Go on until the task ends.
    #[arg(short, long)]
    follow: bool,
}

/// Why there are no lines.
#[derive(Debug, thiserror::Error)]
pub(super) enum LogsError {
    #[error("`{agent}`: {source}")]
    Dial {
        agent: String,
        #[source]
        source: DialError,
    },
    #[error("the agent refused: {}", pipe::call_failure(source))]
    Call {
        #[source]
        source: Box<tonic::Status>,
    },
    #[error("no task `{task}` on this agent: it has {}", there_are(known))]
    Unknown { task: String, known: Vec<String> },
    #[error("`{task}` may be any of {}: name one", there_are(meant))]
    Several { task: String, meant: Vec<String> },
    #[error("failed to write to standard output")]
    Print(#[source] io::Error),
}

impl From<tonic::Status> for LogsError {
    fn from(source: tonic::Status) -> Self {
        Self::Call { source: Box::new(source) }
    }
}

fn there_are(tasks: &[String]) -> String {
    if tasks.is_empty() { "none".to_owned() } else { tasks.join(", ") }
}

impl Logs {
    pub(super) async fn run(self) -> Result<(), LogsError> {
        let usual = || env::var(SOCKET_VARIABLE).unwrap_or_else(|_| UNIX_SOCKET.to_owned());
        let agent = self.agent.unwrap_or_else(usual);
        let connected = self.dialling.connect(&agent).await;
        let mut client =
            AgentServiceClient::new(connected.map_err(|source| LogsError::Dial { agent, source })?);
        let status =
            client.get_status(v1::GetStatusRequest {}).await?.into_inner().status.unwrap_or_default();
        let task_id = find(&self.task, &status)?;
        let request = v1::ReadLogRequest { task_id, lines_count: self.lines, follow: self.follow };
        let mut lines = client.read_log(request).await?.into_inner();
        while let Some(message) = lines.message().await? {
            let text: String = message.lines.iter().map(shown).collect();
            if !print_on(io::stdout().lock(), &text).map_err(LogsError::Print)? {
                break;
            }
        }
        Ok(())
    }
}

fn shown(line: &v1::LogLine) -> String {
    let time = line.time.as_ref().map_or_else(String::new, |time| clock_text(convert::timestamp_ns(time)));
    let output = match line.channel() {
        LogChannel::Stdout => "stdout",
        LogChannel::Stderr => "stderr",
        LogChannel::Mark | LogChannel::Unspecified => "-",
    };
    format!("{time} {output:<6}  {}\n", line.text)
}

/// The number of the task that is meant.
fn find(wanted: &str, status: &v1::AgentStatus) -> Result<String, LogsError> {
    let tasks: Vec<_> = status.sessions.iter().flat_map(|session| &session.tasks).collect();
    let name = |task: &v1::TaskStatus| format!("{}/{}", task.stream, task.block);
    let is_meant = |task: &v1::TaskStatus| {
        task.stream == wanted
            || name(task) == wanted
            || (!wanted.is_empty() && task.task_id.starts_with(wanted))
    };
    let shown = |tasks: &[&v1::TaskStatus]| {
        tasks.iter().map(|task| format!("{} ({})", name(task), task.task_id)).collect::<Vec<_>>()
    };
    let meant: Vec<_> = tasks.iter().copied().filter(|task| is_meant(task)).collect();
    let runs =
        |task: &&v1::TaskStatus| matches!(task.state(), v1::TaskState::Running | v1::TaskState::Ending);
    let running: Vec<_> = meant.iter().copied().filter(runs).collect();
    match (meant.as_slice(), running.as_slice()) {
        ([one], _) | (_, [one]) => Ok(one.task_id.clone()),
        ([], _) => Err(LogsError::Unknown { task: wanted.to_owned(), known: shown(&tasks) }),
        _ => Err(LogsError::Several { task: wanted.to_owned(), meant: shown(&meant) }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn task(number: u8, stream: &str, state: v1::TaskState) -> v1::TaskStatus {
        v1::TaskStatus {
            task_id: format!("{number}0000000"),
            stream: stream.to_owned(),
            block: "b".to_owned(),
            state: state.into(),
            ..v1::TaskStatus::default()
        }
    }

    #[test]
    fn a_task_is_named_by_its_stream_its_block_or_its_number() {
        let tasks = vec![
            task(1, "server", v1::TaskState::Finished),
            task(2, "server", v1::TaskState::Running),
            task(3, "client", v1::TaskState::Queued),
            task(4, "idle", v1::TaskState::Finished),
            task(5, "idle", v1::TaskState::Finished),
        ];
        let session = v1::SessionStatus { tasks, ..v1::SessionStatus::default() };
        let status = v1::AgentStatus { sessions: vec![session], ..v1::AgentStatus::default() };
        let found = |wanted| find(wanted, &status).map_err(|error| error.to_string());
        assert_eq!(found("server").unwrap(), "20000000");
        assert_eq!(found("client/b").unwrap(), "30000000");
        assert_eq!(found("10").unwrap(), "10000000");
        assert_eq!(
            found("idle").unwrap_err(),
            "`idle` may be any of idle/b (40000000), idle/b (50000000): name one"
        );
        assert!(
            found("nobody").unwrap_err().starts_with("no task `nobody` on this agent: it has server/b (1")
        );
        let empty = v1::AgentStatus::default();
        assert_eq!(find("x", &empty).unwrap_err().to_string(), "no task `x` on this agent: it has none");
    }
}
