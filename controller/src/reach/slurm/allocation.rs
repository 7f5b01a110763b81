//! One allocation of a Slurm cluster, and the ways to its nodes.
//!
//! It is asked for when the first of its nodes is dialled, held by a child process whose input is ours, and given back when
//! that input ends: when the last node was released, when this is dropped, when this process dies in any way, its holder
//! with it or not. What of a step outlives the step is for the cluster to decide; so one step of each node stays for as long as the node is used,
//! and has the agent, while every pipe is a step of its own beside it.

use std::{
    collections::BTreeSet,
    env,
    future::Future as _,
    pin::{Pin, pin},
    process::Command,
    sync::{Arc, Mutex as StdMutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
    time::Duration,
};

use millstream_common::{
    clock::{Ids as _, SystemIds},
    pipe,
    text::{counted, printable, spoken},
};
use millstream_proto::v1::{self, agent_service_client::AgentServiceClient};
use tokio::{process, sync::Mutex, time::timeout};
use tonic::transport::Channel;

use crate::reach::{
    child::{AnswerError, ChildPipe, Children},
    program::{self, BringError},
};

/// How long one look waits for the scheduler, before it is told how the request stands.
const LOOK: Duration = Duration::from_secs(3);
/// How long the scheduler may take to say so.
const WORDS_MAX: Duration = Duration::from_secs(5);
/// How long an agent may take to answer something small.
const ANSWER_MAX: Duration = Duration::from_secs(5);
/// With what a shell ends when a program is not there.
const EXIT_NOT_FOUND: i32 = 127;
/// What everybody else's steps set: none of it is meant for ours.
const PREFIXES: [&str; 3] = ["SLURM_", "SALLOC_", "SRUN_"];
/// What says where the cluster is.
const KEPT: [&str; 2] = ["SLURM_CONF", "SLURM_CONF_SERVER"];

/// What of a step's variables is true of the whole job or of the node, and meant for whatever runs there.
const PASSED_ON: &str = "SLURM_JOB_* SLURM_JOBID SLURM_CLUSTER_NAME SLURM_CONF SLURM_CPUS_ON_NODE SLURM_SUBMIT_* \
                         SLURM_TOPOLOGY_* SLURMD_NODENAME CUDA_VISIBLE_DEVICES GPU_DEVICE_ORDINAL ROCR_VISIBLE_DEVICES \
                         ZE_AFFINITY_MASK";

/// Why there is no pipe to a node.
#[derive(Debug, thiserror::Error)]
pub(super) enum NodeError {
    /// The scheduler has not decided.
    #[error("{0}")]
    Pending(String),
    /// It has refused.
    #[error("the allocation was refused: {0}{hint}", hint = hint(.0))]
    Refused(AnswerError),
    /// The allocation is over before its streams are.
    #[error("allocation {job} is over: {why}; give it more `time` if that was its limit")]
    Over {
        /// Number of the job.
        job: String,
        /// What was said last.
        why: String,
    },
    /// It has fewer nodes than were asked for.
    #[error("allocation {job} has {}, and this stream is on its node {node}", counted(*count, "node"))]
    NoNode {
        /// Number of the job.
        job: String,
        /// Its nodes.
        count: usize,
        /// The one that was meant, from 1.
        node: usize,
    },
    /// A program of this machine.
    #[error("`{program}` cannot be started: {}", millstream_common::tls::reason(source))]
    Spawn {
        /// Which.
        program: &'static str,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The agent.
    #[error("node {node}: {source}")]
    Bring {
        /// Name of the node.
        node: String,
        /// Why not.
        #[source]
        source: BringError,
    },
    /// The agent of a node does not answer.
    #[error("node {node}: its agent does not answer: {why}")]
    Silent {
        /// Name of the node.
        node: String,
        /// What happened.
        why: String,
    },
}

impl NodeError {
    /// Whether trying again is useless.
    pub(super) fn is_final(&self) -> bool {
        match self {
            Self::Pending(_) | Self::Silent { .. } => false,
            // A controller of the cluster that is just restarting will take the request later.
            Self::Refused(error) => {
                let said = error.to_string();
                !(said.contains("Unable to contact slurm controller") || said.contains("Socket timed out"))
            }
            Self::Over { .. } | Self::NoNode { .. } | Self::Spawn { .. } => true,
            Self::Bring { source, .. } => source.is_final(),
        }
    }
}

fn hint(error: &AnswerError) -> &'static str {
    match error {
        AnswerError::Ended { ended, .. } if ended.code() == Some(EXIT_NOT_FOUND) => {
            ". This machine needs the commands of Slurm: salloc, srun, squeue, scancel and scontrol"
        }
        _ => "",
    }
}

/// What is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Request {
    /// What it is called; may be empty.
    pub(super) name: String,
    pub(super) nodes: usize,
    /// What else salloc is told.
    pub(super) arguments: Vec<String>,
    /// Where the cluster is described, when it is not the one of this machine.
    pub(super) configuration: Option<String>,
    /// The program to bring, when one was named.
    pub(super) agent: Option<String>,
}

/// A granted allocation.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Job {
    number: String,
    nodes: Vec<String>,
}

/// How far it has come.
#[derive(Debug, Default)]
enum Held {
    #[default]
    Nothing,
    Asked(Holder),
    Granted(Holder, Job),
    /// It ended by itself.
    Over(Job, String),
}

/// The child that holds it. Dropping it gives the allocation back.
#[derive(Debug)]
struct Holder {
    pipe: ChildPipe,
    token: String,
    /// Name of the job, which nobody else has.
    job_name: String,
}

/// The agent of one node, held by a connection of its own.
type Keeper = AgentServiceClient<Channel>;

/// The steps on one node.
#[derive(Debug, Default)]
struct Steps {
    all: Children,
    keeper: Mutex<Option<Keeper>>,
}

/// One allocation.
#[derive(Debug)]
pub(super) struct Allocation {
    pub(super) request: Request,
    /// The child that holds it.
    holders: Children,
    held: Mutex<Held>,
    /// How the request stood when somebody asked last.
    standing: StdMutex<String>,
    nodes: Vec<Steps>,
    /// Nodes that are used, from 0, and the names of all as far as they are known.
    used: StdMutex<(BTreeSet<usize>, Vec<String>)>,
}

impl Allocation {
    pub(super) fn new(request: Request) -> Self {
        Self {
            holders: Children::default(),
            held: Mutex::default(),
            standing: StdMutex::new("the scheduler has not decided yet".to_owned()),
            nodes: (0..request.nodes).map(|_| Steps::default()).collect(),
            used: StdMutex::default(),
            request,
        }
    }

    fn used(&self) -> MutexGuard<'_, (BTreeSet<usize>, Vec<String>)> {
        self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn standing(&self) -> MutexGuard<'_, String> {
        self.standing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The name of a node, once it is known.
    pub(super) fn name(&self, node: usize) -> Option<String> {
        self.used().1.get(node).cloned()
    }

    /// How often something large came on, on its way to a node.
    pub(super) fn progress(&self, node: usize) -> u64 {
        self.nodes[node].all.progress()
    }

    /// A pipe to the agent of a node, from 0.
    ///
    /// # Cancel safety
    /// The request stands, for whoever dials next.
    pub(super) async fn dial(self: &Arc<Self>, node: usize) -> Result<ChildPipe, NodeError> {
        self.used().0.insert(node);
        let job = self.granted().await?;
        let Some(name) = job.nodes.get(node) else {
            let (job, count) = (job.number, job.nodes.len());
            return Err(NodeError::NoNode { job, count, node: node + 1 });
        };
        // It must not end with whoever gives up this dial: pipes of others may lead to the agent that it has begun.
        let (this, name_there, job_there) = (Arc::clone(self), name.clone(), job.clone());
        let kept = tokio::spawn(async move { this.keep(node, &name_there, &job_there).await });
        kept.await.expect("keeping a node does not panic and is not given up")?;
        self.step(node, name, &job).await
    }

    /// A node is not used any more; with the last one the allocation is given back. What could not be is told.
    ///
    /// # Cancel safety
    /// It goes on when the caller has waited long enough.
    pub(super) async fn release(self: &Arc<Self>, node: usize) -> Vec<String> {
        let this = Arc::clone(self);
        let releasing = tokio::spawn(async move { this.let_go(node).await });
        releasing.await.expect("nothing in it panics, and it is not given up")
    }

    async fn let_go(&self, node: usize) -> Vec<String> {
        let steps = &self.nodes[node];
        // The agent first, which has things to tidy. One that is just coming goes with its step, which may hang.
        if let Ok(mut keeper) = steps.keeper.try_lock() {
            keeper.take();
        }
        steps.all.end().await;
        steps.keeper.lock().await.take();
        let is_last = {
            let mut used = self.used();
            used.0.remove(&node) && used.0.is_empty()
        };
        if !is_last {
            return Vec::new();
        }
        let held = std::mem::take(&mut *self.held.lock().await);
        let left = match &held {
            Held::Asked(holder) | Held::Granted(holder, _) => self.request.give_back(&holder.job_name).await,
            Held::Nothing | Held::Over(..) => None,
        };
        drop(held);
        self.holders.end().await;
        left.into_iter().collect()
    }

    /// Waits a moment until the scheduler has granted it, which is asked to when it was not yet.
    async fn granted(&self) -> Result<Job, NodeError> {
        // Somebody else may be asking, who also finds out how it stands.
        let Ok(mut held) = timeout(LOOK, self.held.lock()).await else {
            return Err(NodeError::Pending(self.standing().clone()));
        };
        if let Held::Nothing = &*held {
            *held = Held::Asked(self.ask()?);
        }
        match &mut *held {
            Held::Nothing => unreachable!("it was asked for just now"),
            Held::Over(job, why) => Err(NodeError::Over { job: job.number.clone(), why: why.clone() }),
            Held::Granted(holder, job) => {
                let job = job.clone();
                if let Some(why) = holder.has_ended() {
                    *held = Held::Over(job.clone(), why.clone());
                    return Err(NodeError::Over { job: job.number, why });
                }
                Ok(job)
            }
            Held::Asked(holder) => match timeout(LOOK, holder.pipe.answer(&holder.token)).await {
                Ok(Ok(answer)) => {
                    let mut words = answer.rest.split_whitespace().map(str::to_owned);
                    let number = words.next().unwrap_or_default();
                    let job = Job { number, nodes: words.collect() };
                    self.used().1.clone_from(&job.nodes);
                    if let Held::Asked(holder) = std::mem::take(&mut *held) {
                        *held = Held::Granted(holder, job.clone());
                    }
                    Ok(job)
                }
                Ok(Err(error)) => {
                    *held = Held::Nothing;
                    Err(NodeError::Refused(error))
                }
                Err(_elapsed) => {
                    let standing = self.request.standing(&holder.job_name).await;
                    self.standing().clone_from(&standing);
                    Err(NodeError::Pending(standing))
                }
            },
        }
    }

    /// Asks the scheduler.
    fn ask(&self) -> Result<Holder, NodeError> {
        let token = SystemIds.token();
        let given = if self.request.name.is_empty() { "test" } else { &self.request.name };
        let job_name = format!("millstream-{given}-{}", &token[..8]);
        let mut command = self.request.command("sh");
        command.args(["-c", include_str!("hold.sh"), "hold", &token, &job_name, "--nodes"]);
        command.arg(self.request.nodes.to_string()).args(&self.request.arguments);
        let spawned = self.holders.spawn(command);
        let pipe = spawned.map_err(|source| NodeError::Spawn { program: "sh", source })?;
        Ok(Holder { pipe, token, job_name })
    }

    /// Has a step on a node that stays, and so an agent.
    async fn keep(&self, node: usize, name: &str, job: &Job) -> Result<(), NodeError> {
        let mut keeper = self.nodes[node].keeper.lock().await;
        if let Some(agent) = &mut *keeper
            && answers(agent).await.is_ok()
        {
            return Ok(());
        }
        *keeper = None;
        let pipe = self.step(node, name, job).await?;
        let silent = |why: String| NodeError::Silent { node: name.to_owned(), why };
        let channel = timeout(ANSWER_MAX, pipe::endpoint_channel(|| async { Ok(Box::new(pipe) as _) })).await;
        let channel = channel.map_err(|_| silent("nothing came".to_owned()))?;
        let mut agent = AgentServiceClient::new(channel.map_err(|error| silent(error.to_string()))?);
        answers(&mut agent).await.map_err(silent)?;
        *keeper = Some(agent);
        Ok(())
    }

    /// One more step on a node, which becomes a relay to the agent of the node.
    async fn step(&self, node: usize, name: &str, job: &Job) -> Result<ChildPipe, NodeError> {
        let mut command = self.request.command("srun");
        command.arg(format!("--jobid={}", job.number)).arg(format!("--nodelist={name}"));
        command.args([
            "--nodes=1",
            "--ntasks=1",
            "--overlap",
            "--unbuffered",
            "--cpu-bind=none",
            "--mpi=none",
        ]);
        command.args(["--chdir=/", "--export=ALL", "sh"]);
        // The agent is for this job alone: it ends with it, and so does whatever it runs.
        command.env("MILLSTREAM_PLACE", format!("slurm-{}-{name}", job.number));
        command.env("MILLSTREAM_PLACE_VARIABLES", job.variables(node));
        let agent = self.request.agent.as_deref();
        let dialled = program::dial(&self.nodes[node].all, command, agent).await;
        dialled.map_err(|source| NodeError::Bring { node: name.to_owned(), source })
    }
}

impl Job {
    /// The variables that blocks on a node have, besides the usual ones: those of the job and of the node, as a batch script
    /// has them, and what the scheduler says of devices. What is about the agent's own step is not for them; a step finds
    /// its own nodes for those of the job.
    fn variables(&self, node: usize) -> String {
        let (count, names) = (self.nodes.len(), self.nodes.join(","));
        format!(
            "{PASSED_ON} SLURM_NODEID={node} SLURM_NNODES={count} SLURM_JOB_NUM_NODES={count} SLURM_NODELIST={names} \
             SLURM_JOB_NODELIST={names}"
        )
    }
}

impl Holder {
    /// What was said last, if the child has ended.
    fn has_ended(&mut self) -> Option<String> {
        let mut answer = pin!(self.pipe.answer(&self.token));
        // Nobody needs to be woken: it is looked at again with the next dial.
        match Pin::as_mut(&mut answer).poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(Err(error)) => Some(error.to_string()),
            Poll::Ready(Ok(_)) | Poll::Pending => None,
        }
    }
}

impl Request {
    /// A command that another job's variables do not change.
    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        for (name, _) in env::vars_os() {
            let text = name.to_string_lossy();
            if PREFIXES.iter().any(|prefix| text.starts_with(prefix)) && !KEPT.contains(&&*text) {
                command.env_remove(&name);
            }
        }
        if let Some(configuration) = &self.configuration {
            command.env("SLURM_CONF", configuration);
        }
        command
    }

    /// Tells the scheduler that the allocation is not wanted any more. The end of its holder says the same, but a holder is not
    /// waited for as long as a busy scheduler may take.
    async fn give_back(&self, job_name: &str) -> Option<String> {
        let mut scancel = process::Command::from(self.command("scancel"));
        scancel.args(["--quiet", "--name", job_name]).kill_on_drop(true);
        let why = match timeout(WORDS_MAX, scancel.output()).await {
            Ok(Ok(output)) if output.status.success() => return None,
            Ok(Ok(output)) => format!("it ended with {}: {}", output.status, printable(&output.stderr, 512)),
            Ok(Err(error)) => millstream_common::tls::reason(&error),
            Err(_elapsed) => format!("it did not answer within {}", spoken(WORDS_MAX)),
        };
        Some(format!(
            "`scancel --name {job_name}` should give the allocation back: {why}; its holder goes on trying"
        ))
    }

    /// How a request stands that was not granted yet, in words.
    async fn standing(&self, job_name: &str) -> String {
        let mut squeue = process::Command::from(self.command("squeue"));
        squeue.args(["--noheader", "--format=%i %P %r %S", "--name", job_name]).kill_on_drop(true);
        let output = match timeout(WORDS_MAX, squeue.output()).await {
            Ok(Ok(output)) => output,
            Ok(Err(error)) => {
                return format!("the scheduler has not decided, and squeue cannot be started: {error}");
            }
            Err(_elapsed) => return "the scheduler has not decided, and squeue does not answer".to_owned(),
        };
        let said = printable(&output.stdout, 200);
        match said.split_whitespace().collect::<Vec<_>>()[..] {
            [job, partition, reason, begin, ..] => {
                let begin =
                    if begin == "N/A" { String::new() } else { format!(", expected to begin at {begin}") };
                format!("job {job} waits in the queue of partition {partition} ({reason}){begin}")
            }
            _ => "the scheduler has not decided yet".to_owned(),
        }
    }
}

async fn answers(agent: &mut Keeper) -> Result<(), String> {
    match timeout(ANSWER_MAX, agent.get_status(v1::GetStatusRequest::default())).await {
        Ok(Ok(_status)) => Ok(()),
        Ok(Err(status)) => Err(pipe::call_failure(&status)),
        Err(_elapsed) => Err("nothing came".to_owned()),
    }
}
