//! What agents do, as tables for people or as JSON for programs: one agent in full, many in a row each. Asks the same calls that
//! `grpcurl` would.

mod hosts;
mod shown;
mod watch;

use std::{
    env,
    io::{self, IsTerminal as _},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use clap::Args;
use millstream_common::pipe;
use millstream_proto::v1::{self, agent_service_client::AgentServiceClient};
use serde_json::{Value, json};
use tokio::{sync::Semaphore, task::JoinSet, time::timeout};

use self::{
    hosts::{HostsError, Target},
    shown::{as_json, as_table, rows},
};
use super::{
    dial::{DialError, Dialling, SOCKET_VARIABLE},
    print_on,
};
use crate::config::UNIX_SOCKET;

/// Agents that are asked at once.
const ASKED_COUNT_MAX: usize = 32;

/// Options of `status`.
#[derive(Debug, Args)]
pub(super) struct Status {
    /// Agents: each the path of its Unix socket, `tls://HOST[:PORT]`, or `tcp://ADDRESS[:PORT]` on this host. Without any,
    /// the one of this host, whose socket is the usual one or that in MILLSTREAM_SOCKET.
    agents: Vec<String>,
    /// File with more of them: one a line, or stream definitions in YAML.
    #[arg(long, value_name = "FILE")]
    hosts: Vec<PathBuf>,
    #[command(flatten)]
    dialling: Dialling,
    /// How long an agent may take to answer.
    #[arg(long, value_name = "SPAN", value_parser = humantime::parse_duration, default_value = "10s")]
    timeout: Duration,
    /// Print JSON: an object for one agent, a list for many, with `--watch` a line for each change.
    #[arg(long)]
    json: bool,
    /// Go on, and show each change: in place on a terminal, else line by line.
    #[arg(long)]
    watch: bool,
}

/// Why there is no status.
#[derive(Debug, thiserror::Error)]
pub(super) enum StatusError {
    #[error(transparent)]
    Hosts(#[from] HostsError),
    #[error("`{agent}`: {source}")]
    One {
        agent: String,
        #[source]
        source: AskError,
    },
    #[error("{missing} of {asked} agents gave no status")]
    Some { missing: usize, asked: usize },
    #[error("failed to write to standard output")]
    Print(#[source] io::Error),
}

/// Why one agent gave none.
#[derive(Debug, thiserror::Error)]
pub(super) enum AskError {
    #[error(transparent)]
    Dial(#[from] DialError),
    #[error("no status: {}", pipe::call_failure(source))]
    Call {
        #[source]
        source: Box<tonic::Status>,
    },
    #[error("no answer within {}", humantime::format_duration(*patience))]
    Silent { patience: Duration },
    #[error("a stream of type `{kind}` is at no agent that can be asked from here")]
    Kind { kind: String },
    #[error("the connection ended")]
    Ended,
}

impl From<tonic::Status> for AskError {
    fn from(source: tonic::Status) -> Self {
        Self::Call { source: Box::new(source) }
    }
}

/// What an agent said, or why it said nothing.
type Answer = Result<v1::AgentStatus, AskError>;

impl Status {
    pub(super) async fn run(self) -> Result<(), StatusError> {
        let targets = self.targets()?;
        if self.watch {
            return watch::run(targets, self.timeout, self.json, io::stdout().is_terminal()).await;
        }
        let alone = self.agents.len() <= 1 && self.hosts.is_empty();
        let mut answers = ask_all(&targets, self.timeout).await;
        if alone && let Some(answer) = answers.pop() {
            let agent = targets[0].name.clone();
            let status = answer.map_err(|source| StatusError::One { agent, source })?;
            let text = if self.json { format!("{:#}\n", as_json(&status)) } else { as_table(&status) };
            return print(&text).map(|_read| ());
        }
        let names = targets.iter().map(|target| target.name.as_str());
        let text = if self.json {
            let all = names.zip(&answers).map(|(name, answer)| answer_json(name, answer)).collect::<Vec<_>>();
            format!("{:#}\n", Value::from(all))
        } else {
            rows(names.zip(answers.iter().map(Some)))
        };
        let _read = print(&text)?;
        match answers.iter().filter(|answer| answer.is_err()).count() {
            0 => Ok(()),
            missing => Err(StatusError::Some { missing, asked: answers.len() }),
        }
    }

    fn targets(&self) -> Result<Vec<Target>, StatusError> {
        let given = |agent: &String| Target::new(agent, agent, &self.dialling);
        let mut targets: Vec<Target> = self.agents.iter().map(given).collect();
        for path in &self.hosts {
            targets.extend(hosts::read(path, &self.dialling)?);
        }
        if self.agents.is_empty() && self.hosts.is_empty() {
            let socket = env::var(SOCKET_VARIABLE).unwrap_or_else(|_| UNIX_SOCKET.to_owned());
            targets.push(Target::new(&socket, &socket, &self.dialling));
        }
        Ok(targets)
    }
}

/// All of them at once, in the order in which they were named.
async fn ask_all(targets: &[Target], patience: Duration) -> Vec<Answer> {
    let places = Arc::new(Semaphore::new(ASKED_COUNT_MAX));
    let mut asking = JoinSet::new();
    for (number, target) in targets.iter().cloned().enumerate() {
        let places = Arc::clone(&places);
        asking.spawn(async move {
            // Never closed: none of these waits can fail.
            let _place = places.acquire_owned().await;
            let answer = timeout(patience, ask(&target)).await;
            (number, answer.unwrap_or(Err(AskError::Silent { patience })))
        });
    }
    let mut answers = asking.join_all().await;
    answers.sort_by_key(|(number, _)| *number);
    answers.into_iter().map(|(_, answer)| answer).collect()
}

async fn ask(target: &Target) -> Answer {
    let mut client = AgentServiceClient::new(target.connect().await?);
    Ok(client.get_status(v1::GetStatusRequest {}).await?.into_inner().status.unwrap_or_default())
}

fn answer_json(agent: &str, answer: &Answer) -> Value {
    match answer {
        Ok(status) => json!({ "agent": agent, "status": as_json(status) }),
        Err(error) => json!({ "agent": agent, "error": error.to_string() }),
    }
}

/// Writes to standard output; answers whether anybody reads it still.
fn print(text: &str) -> Result<bool, StatusError> {
    print_on(io::stdout().lock(), text).map_err(StatusError::Print)
}
