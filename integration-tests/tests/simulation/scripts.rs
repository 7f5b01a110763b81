//! Programs that are words, run: what the supervisors of a simulation have in place of processes.

use std::{
    fmt, io,
    os::fd::OwnedFd,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use millstream::Phase;
use millstream_agent::supervisor::processes::{
    Doing, Ended, Happened, Launch, OutputEnds, ProcessTree, Processes, Refusal, Started,
};
use millstream_common::{
    clock::World,
    id::TaskId,
    outcome::{Exit, LeakedProcess, Reason},
    spec::ResourceLimits,
    sync_client::{Content, Entry, Parties, SyncClient, SyncError},
};
use tokio::{io::AsyncWriteExt as _, net::unix::pipe, sync::oneshot, task::JoinHandle};

use crate::{
    ledger::{Ledger, Part, Running, Verdict},
    steps::{PROGRAM, Step, TEST_VARIABLE},
};

const TERMINATE: i32 = 15;
const KILL: i32 = 9;

/// Runs scripts in place of processes.
#[derive(Debug)]
pub(crate) struct Scripts {
    pub(crate) ledger: Ledger,
    pub(crate) world: World,
    /// Whether starts are told as those of a shim are, not at once.
    pub(crate) told_later: bool,
    pub(crate) pids: AtomicU32,
}

impl Processes for Scripts {
    fn tree(
        &self,
        task: TaskId,
        _limits: &ResourceLimits,
        outputs: OutputEnds,
    ) -> Result<Box<dyn ProcessTree>, Refusal> {
        Ok(Box::new(ScriptTree {
            task,
            ledger: self.ledger.clone(),
            world: self.world.clone(),
            told_later: self.told_later,
            pid: self.pids.fetch_add(1, Ordering::Relaxed) + 2,
            outputs: Some(outputs),
            untold: false,
            running: None,
        }))
    }

    fn end_marked(&self, _is_ours: &dyn Fn(&str) -> bool) -> Vec<LeakedProcess> {
        // A script has nowhere else to go.
        Vec::new()
    }
}

#[derive(Debug)]
struct ScriptTree {
    task: TaskId,
    ledger: Ledger,
    world: World,
    told_later: bool,
    pid: u32,
    outputs: Option<OutputEnds>,
    /// Whether its start is still to be told.
    untold: bool,
    running: Option<Process>,
}

#[derive(Debug)]
struct Process {
    script: JoinHandle<i32>,
    go: Option<oneshot::Sender<()>>,
    stubborn: bool,
    ended_by: Option<i32>,
}

impl Process {
    async fn exit(&mut self) -> Exit {
        match (&mut self.script).await {
            Ok(code) => Exit::Code(code),
            Err(_ended) => Exit::Signal(self.ended_by.unwrap_or(KILL)),
        }
    }
}

fn refusal(detail: impl fmt::Display) -> Refusal {
    Refusal { reason: Reason::StartFailed, detail: detail.to_string() }
}

impl ScriptTree {
    fn begin(&mut self, launch: &Launch) -> Result<(), Refusal> {
        let [program, phase, words @ ..] = &launch.argv[..] else { return Err(refusal("no program")) };
        let phase =
            [Phase::Setup, Phase::Run, Phase::Teardown].into_iter().find(|one| one.to_string() == *phase);
        let Some(phase) = phase.filter(|_| program == PROGRAM) else {
            return Err(refusal(format!("there is no program `{program}`")));
        };
        let steps: Option<Vec<Step>> = words.iter().map(|word| Step::parse(word)).collect();
        let steps = steps.ok_or_else(|| refusal(format!("not a script: {words:?}")))?;
        let outputs = self.outputs.as_ref().ok_or_else(|| refusal("the tree has ended"))?;
        let sender = |end: &OwnedFd| pipe::Sender::from_owned_fd(end.try_clone()?);
        let variable = |name: &str| {
            let found = launch.environment.iter().find(|(key, _)| key == name);
            found.map(|(_, value)| value.clone()).unwrap_or_default()
        };
        let (go, gone) = oneshot::channel();
        let stubborn = steps.contains(&Step::Stubborn);
        let script = Script {
            ledger: self.ledger.clone(),
            world: self.world.clone(),
            part: Part {
                test: variable(TEST_VARIABLE).parse().map_err(refusal)?,
                stream: variable("MILLSTREAM_STREAM"),
                task: self.task,
                phase,
            },
            socket: variable("MILLSTREAM_SYNC"),
            output: variable("MILLSTREAM_OUTPUT").into(),
            stdout: sender(&outputs.stdout).map_err(refusal)?,
            stderr: sender(&outputs.stderr).map_err(refusal)?,
        };
        let held = launch.held;
        let script = tokio::spawn(async move {
            if held {
                gone.await.expect("a held script is let go or ended");
            }
            script.run(&steps).await
        });
        self.running = Some(Process { script, go: Some(go), stubborn, ended_by: None });
        Ok(())
    }
}

impl ProcessTree for ScriptTree {
    fn start<'a>(&'a mut self, launch: &'a Launch) -> Doing<'a, Result<Started, Refusal>> {
        Box::pin(async move {
            self.begin(launch)?;
            self.untold = self.told_later;
            Ok(if self.told_later { Started::ToldLater } else { Started::Now(self.pid) })
        })
    }

    fn let_go(&mut self) -> Doing<'_, ()> {
        Box::pin(async move {
            if let Some(go) = self.running.as_mut().and_then(|process| process.go.take()) {
                // It may have been ended meanwhile.
                let _ended = go.send(());
            }
        })
    }

    fn signal(&mut self, signal: i32) -> Doing<'_, io::Result<()>> {
        Box::pin(async move {
            if let Some(process) = &mut self.running
                && (signal == KILL || signal == TERMINATE && !process.stubborn)
            {
                process.ended_by = Some(signal);
                process.script.abort();
            }
            Ok(())
        })
    }

    fn next(&mut self) -> Doing<'_, Happened> {
        Box::pin(async move {
            if std::mem::take(&mut self.untold) {
                return Happened::Started { pid: self.pid };
            }
            let Some(process) = &mut self.running else { return std::future::pending().await };
            let exit = process.exit().await;
            self.running = None;
            Happened::Exited { exit, failure: None }
        })
    }

    fn end(&mut self) -> Doing<'_, Ended> {
        Box::pin(async move {
            let mut ended = Ended::default();
            if let Some(mut process) = self.running.take() {
                process.script.abort();
                ended.exit = Some(process.exit().await);
            }
            self.outputs = None;
            ended
        })
    }

    fn out_of_memory(&self) -> bool {
        false
    }

    fn remove_limits(&mut self) {}
}

/// A script that runs.
struct Script {
    ledger: Ledger,
    world: World,
    part: Part,
    socket: String,
    output: PathBuf,
    stdout: pipe::Sender,
    stderr: pipe::Sender,
}

impl Script {
    async fn run(mut self, steps: &[Step]) -> i32 {
        let running = self.ledger.begins(self.part.clone());
        let code = self.follow(&running, steps).await;
        running.note(|life| {
            life.exits.insert(self.part.phase, code);
        });
        code
    }

    async fn follow(&mut self, running: &Running, steps: &[Step]) -> i32 {
        for (number, step) in steps.iter().enumerate() {
            let went_on = match step {
                Step::Print { stderr, bytes } => {
                    self.print(running, *stderr, *bytes).await;
                    true
                }
                Step::Pause { millis } => {
                    pause(Duration::from_millis(*millis)).await;
                    true
                }
                Step::Meet { barrier, parties } => {
                    let verdict = self.meet(barrier, *parties).await;
                    let released = matches!(verdict, Verdict::Released { .. });
                    running.note(|life| life.meetings.push((barrier.clone(), verdict)));
                    released
                }
                Step::Stubborn => true,
                Step::Leave { bytes } => {
                    self.leave(running, number, *bytes);
                    true
                }
                Step::Publish { topic } => self.publish(running, number, topic).await,
                Step::Await { topic, count } => self.hear(running, topic, *count, false).await,
                Step::Follow { topic, count } => self.hear(running, topic, *count, true).await,
                Step::Exit { code } => return *code,
            };
            if !went_on {
                return 1;
            }
        }
        0
    }

    fn leave(&self, running: &Running, number: usize, bytes: usize) {
        let name = format!("{}-{number}", self.part.phase);
        let text = format!("{} left by {}\n", name, self.part.task).repeat(bytes / 32 + 1);
        let content = text.as_bytes()[..bytes].to_vec();
        // Nothing can end the program between the two.
        std::fs::write(self.output.join(&name), &content).unwrap();
        running.note(|life| {
            life.files.insert(name, content);
        });
    }

    async fn publish(&self, running: &Running, number: usize, topic: &str) -> bool {
        let value = format!("{}/{}/{number}", self.part.task, self.part.phase);
        running.note(|life| life.published.push((topic.to_owned(), value.clone(), None)));
        let publishing = async {
            let client = SyncClient::connect_in(&self.socket, self.world.clone()).await?;
            client.publish(topic, value).await
        };
        match publishing.await {
            Ok(index) => running.note(|life| life.published.last_mut().unwrap().2 = Some(index)),
            Err(error) => {
                running.note(|life| life.unheard.push(error.to_string()));
                return false;
            }
        }
        true
    }

    async fn hear(&self, running: &Running, topic: &str, count: u32, listens: bool) -> bool {
        let hearing = async {
            let client = SyncClient::connect_in(&self.socket, self.world.clone()).await?;
            if !listens {
                return client.wait(topic, count, None).await;
            }
            let (mut values, mut subscription) = (Vec::new(), client.subscribe(topic, 0));
            while values.len() < count as usize {
                match subscription.wait_next().await? {
                    Some(value) => values.push(value),
                    None => return Err(SyncError::Broken(format!("topic {topic} has ended"))),
                }
            }
            Ok(values)
        };
        match hearing.await {
            Ok(values) => {
                let said = values.into_iter().map(|value| match value.content {
                    Content::Text(text) => text,
                    Content::Data(data) => format!("{data:?}"),
                });
                let said: Vec<String> = said.collect();
                let enough = said.len() == count as usize;
                running.note(|life| life.heard.push((topic.to_owned(), said)));
                if !enough {
                    let trouble =
                        format!("{:?} waited for {count} values of {topic} and got others", self.part);
                    self.ledger.open().troubles.push(trouble);
                }
                true
            }
            Err(error) => {
                running.note(|life| life.unheard.push(error.to_string()));
                false
            }
        }
    }

    async fn print(&mut self, running: &Running, stderr: bool, bytes: usize) {
        let mut left = bytes;
        let mut line = 0_u32;
        while left > 0 {
            line += 1;
            let text =
                format!("{} {} line {line} of {bytes} bytes\n", self.part.stream, self.part.task.short());
            let text = text.repeat(16);
            let mut rest = &text.as_bytes()[..text.len().min(left)];
            while !rest.is_empty() {
                let pipe = if stderr { &mut self.stderr } else { &mut self.stdout };
                // Nobody reads any more: a program would be ended by that.
                let Ok(count) = pipe.write(rest).await else { return };
                running.note(|life| {
                    let kept = if stderr { &mut life.stderr } else { &mut life.stdout };
                    kept.extend_from_slice(&rest[..count]);
                });
                left -= count;
                rest = &rest[count..];
            }
        }
    }

    async fn meet(&self, barrier: &str, parties: u32) -> Verdict {
        let meeting = async {
            let client = SyncClient::connect_in(&self.socket, self.world.clone()).await?;
            client.barrier(barrier, Entry { parties: Parties::Count(parties), ..Entry::default() }).await
        };
        match meeting.await {
            Ok(released) => Verdict::Released { arrival: released.arrival },
            Err(error) => Verdict::Broken(error.to_string()),
        }
    }
}

/// Simulated time passes.
pub(crate) async fn pause(span: Duration) {
    tokio::time::sleep(span).await;
}

/// What makes processes on one simulated host.
pub(crate) fn scripts(ledger: &Ledger, world: &World, told_later: bool) -> Arc<dyn Processes> {
    Arc::new(Scripts { ledger: ledger.clone(), world: world.clone(), told_later, pids: AtomicU32::new(0) })
}
