//! One block scheduled on one stream, as its user holds it.
//!
//! A handle only asks and waits: the driver decides. Dropping it changes nothing for the task.

use std::{
    fmt,
    future::{Future, IntoFuture},
    net::{IpAddr, SocketAddr},
    pin::Pin,
    sync::{Arc, Mutex, OnceLock, Weak},
    task::{Context, Poll},
    time::Duration,
};

use millstream_common::{
    id::{BlockName, StreamName, TaskId},
    limits,
    outcome::Expectation,
};
use regex::Regex;
use tokio::sync::{oneshot, watch};

mod log;

pub(crate) use log::TaskLog;
pub use log::{LogLine, Logs};

use crate::{
    driver::{Handle, Input},
    error::UnexpectedEnd,
    outcome::Outcome,
};

/// How far a task has come, as its handles need to know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Stage {
    /// Waiting for its turn, or being prepared.
    Queued,
    /// Prepared on its host and, if it is held, waiting to be told to begin.
    Staged,
    /// A phase has begun; when, in nanoseconds since 1970 by the controller's clock.
    Began { time_ns: u64 },
    /// Its outcome is known and its results are on disk.
    Finished,
}

/// What the driver and the handles of a task share.
#[derive(Debug)]
pub(crate) struct TaskShared {
    pub(crate) id: TaskId,
    pub(crate) stream: StreamName,
    pub(crate) stream_number: u32,
    pub(crate) test_number: u32,
    pub(crate) block: BlockName,
    /// Whether it may run streams itself.
    pub(crate) runs_streams: bool,
    pub(crate) expectation: Expectation,
    pub(crate) schedule_time_ns: u64,
    /// Where blocks on other hosts find this one's host.
    pub(crate) host: String,
    pub(crate) outcome: OnceLock<Arc<Outcome>>,
    pub(crate) stage: watch::Sender<Stage>,
    /// Lines, as long as somebody holds the task.
    pub(crate) log: Mutex<Weak<TaskLog>>,
}

impl TaskShared {
    /// Number in the stream and block, such as `1-netserver`.
    pub(crate) fn label(&self) -> String {
        format!("{}-{}", self.stream_number, self.block)
    }

    /// Waits for the outcome.
    pub(crate) async fn finished(&self) -> Arc<Outcome> {
        let mut stage = self.stage.subscribe();
        // The sender lives in `self`, so the wait cannot fail.
        let _stage = stage.wait_for(|stage| *stage == Stage::Finished).await;
        Arc::clone(self.outcome.get().expect("the outcome is set before the stage says so"))
    }
}

/// One block scheduled on one stream.
///
/// Cloning gives another handle to the same task. Dropping handles does not cancel it.
#[derive(Clone)]
pub struct Task {
    pub(crate) shared: Arc<TaskShared>,
    pub(crate) log: Arc<TaskLog>,
    pub(crate) driver: Handle,
}

impl fmt::Debug for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Task")
            .field("id", &self.shared.id)
            .field("stream", &self.shared.stream)
            .field("label", &self.shared.label())
            .field("stage", &*self.shared.stage.borrow())
            .finish_non_exhaustive()
    }
}

impl Task {
    /// Its number, which no other task anywhere has.
    #[must_use]
    pub fn id(&self) -> TaskId {
        self.shared.id
    }

    /// Number in its stream and name of its block, such as `1-netserver`.
    #[must_use]
    pub fn label(&self) -> String {
        self.shared.label()
    }

    /// The stream that it was scheduled on.
    #[must_use]
    pub fn stream(&self) -> &StreamName {
        &self.shared.stream
    }

    /// Number in its stream, from 1.
    #[must_use]
    pub fn stream_number(&self) -> u32 {
        self.shared.stream_number
    }

    /// Number in the whole test, from 1.
    #[must_use]
    pub fn test_number(&self) -> u32 {
        self.shared.test_number
    }

    /// Waits for the end of the task, whatever it is.
    ///
    /// # Cancel safety
    /// Dropping the future changes nothing.
    pub async fn outcome(&self) -> Arc<Outcome> {
        self.shared.finished().await
    }

    /// The outcome, when it is known already.
    #[must_use]
    pub fn try_outcome(&self) -> Option<Arc<Outcome>> {
        self.shared.outcome.get().cloned()
    }

    /// Waits for the end of the task. All its results are on disk then.
    ///
    /// # Errors
    /// When the end was not expected.
    ///
    /// # Cancel safety
    /// Dropping the future changes nothing.
    pub async fn wait(&self) -> Result<Arc<Outcome>, UnexpectedEnd> {
        expected(self.outcome().await)
    }

    /// Terminates the task, waits for its grace period, kills it. Its teardown runs. It ends as `stopped`, which is no
    /// failure; a task that has not begun ends as `cancelled`, one that is over stays as it is.
    ///
    /// The order is given at once. The result may be awaited for the outcome, or dropped.
    pub fn stop(&self) -> Ending {
        self.driver.send(Input::Stop { task: self.shared.id, grace: None });
        Ending { task: Arc::clone(&self.shared) }
    }

    /// As [`Task::stop`], with another time between SIGTERM and SIGKILL: at most 10 minutes.
    pub fn stop_within(&self, grace: Duration) -> Ending {
        let grace = Some(grace.min(limits::GRACE_MAX));
        self.driver.send(Input::Stop { task: self.shared.id, grace });
        Ending { task: Arc::clone(&self.shared) }
    }

    /// Takes the task back if its first phase has not begun; otherwise nothing happens.
    ///
    /// The order is given at once. The result may be awaited for the outcome, or dropped.
    pub fn cancel(&self) -> Ending {
        self.driver.send(Input::Cancel { task: self.shared.id });
        Ending { task: Arc::clone(&self.shared) }
    }

    /// Waits until the block has begun to do its work, which only it can tell: by a line of its output, or by listening
    /// on a port.
    ///
    /// # Errors
    /// When the task ends first.
    ///
    /// # Cancel safety
    /// Dropping the future changes nothing.
    pub async fn ready(&self, ready: Ready) -> Result<(), ReadyError> {
        let wanted = ready.to_string();
        let begun: Pin<Box<dyn Future<Output = bool> + Send>> = match ready.0 {
            Sign::Log(pattern) => {
                let pattern =
                    pattern.map_err(|reason| ReadyError::Pattern { wanted: wanted.clone(), reason })?;
                let found = self.log.matching(pattern);
                Box::pin(async move { found.await.is_ok() })
            }
            Sign::Port(port) => {
                let connecting = connect_to(self.shared.host.clone(), port);
                let connecting = self.driver.spawn(connecting);
                Box::pin(async move { connecting.await.is_some() })
            }
        };
        tokio::select! {
            biased;
            true = begun => Ok(()),
            outcome = self.shared.finished() => Err(ReadyError::Ended { wanted, outcome }),
        }
    }

    /// The lines that the block prints, from the oldest that is still kept (1,000 lines or 256 KiB while it runs) until its
    /// end. Everything is in the results.
    #[must_use]
    pub fn logs(&self) -> Logs {
        Logs {
            log: Arc::clone(&self.log),
            count: self.log.count.subscribe(),
            stage: self.shared.stage.subscribe(),
            next: 0,
        }
    }

    /// What the task does now, why it does not run, or how it ended: one sentence.
    ///
    /// # Cancel safety
    /// Dropping the future changes nothing.
    pub async fn explain(&self) -> String {
        if let Some(outcome) = self.shared.outcome.get() {
            return outcome.sentence();
        }
        let (answer, receiver) = oneshot::channel();
        self.driver.send(Input::Explain { task: self.shared.id, answer });
        match receiver.await {
            Ok(sentence) => sentence,
            Err(_) => match self.shared.outcome.get() {
                Some(outcome) => outcome.sentence(),
                None => "its streams are closed".to_owned(),
            },
        }
    }
}

/// An outcome that was expected, or the error that it was not.
pub(crate) fn expected(outcome: Arc<Outcome>) -> Result<Arc<Outcome>, UnexpectedEnd> {
    if outcome.is_expected() { Ok(outcome) } else { Err(UnexpectedEnd(outcome)) }
}

/// Tries to connect until it works. The pauses grow to half a second; the caller stops it when the task has ended.
async fn connect_to(host: String, port: u16) {
    let mut pause = Duration::from_millis(10);
    loop {
        let connected = match host.parse::<IpAddr>() {
            Ok(address) => tokio::net::TcpStream::connect(SocketAddr::new(address, port)).await,
            Err(_) => tokio::net::TcpStream::connect((host.as_str(), port)).await,
        };
        if connected.is_ok() {
            return;
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_millis(500));
    }
}

/// What shows that a block has begun to do its work.
#[derive(Debug, Clone)]
pub struct Ready(Sign);

#[derive(Debug, Clone)]
enum Sign {
    Log(Result<Regex, String>),
    Port(u16),
}

impl Ready {
    /// A line of its output, standard output or error, that matches this regular expression; plain text is one, too.
    #[must_use]
    pub fn log(pattern: impl AsRef<str>) -> Self {
        Self(Sign::Log(Regex::new(pattern.as_ref()).map_err(|error| error.to_string())))
    }

    /// A port on which it accepts TCP connections. Checked by connecting from the controller to the host of the stream
    /// (127.0.0.1 for a local one): at once, then with pauses that double from 10 ms to 500 ms, until it works or the task
    /// ends. The block sees these connections. A port that the controller cannot reach through a firewall is never ready.
    #[must_use]
    pub fn port(port: u16) -> Self {
        Self(Sign::Port(port))
    }
}

impl fmt::Display for Ready {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Sign::Log(Ok(pattern)) => write!(f, "printed `{pattern}`"),
            Sign::Log(Err(_)) => f.write_str("printed a line"),
            Sign::Port(port) => write!(f, "listened on port {port}"),
        }
    }
}

/// Why a block was never ready.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum ReadyError {
    /// The task ended first.
    #[error("the task ended before it {wanted}: {outcome}")]
    Ended {
        /// What was waited for.
        wanted: String,
        /// How it ended.
        outcome: Arc<Outcome>,
    },
    /// The pattern is no regular expression.
    #[error("the task cannot be waited for until it {wanted}: {reason}")]
    Pattern {
        /// What was waited for.
        wanted: String,
        /// What is wrong with it.
        reason: String,
    },
}

/// The end of a task that was asked to end: may be awaited, or dropped.
#[derive(Debug)]
pub struct Ending {
    task: Arc<TaskShared>,
}

impl IntoFuture for Ending {
    type Output = Arc<Outcome>;
    type IntoFuture = Pin<Box<dyn Future<Output = Arc<Outcome>> + Send>>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(async move { self.task.finished().await })
    }
}

/// A task that is being run: completes with its outcome.
///
/// The task was scheduled when this was made. Dropping it does not cancel the task.
#[must_use = "the task runs anyway; await this for its outcome, or use `run_bg`"]
pub struct Running {
    pub(crate) task: Task,
    pub(crate) waiting: Pin<Box<dyn Future<Output = Arc<Outcome>> + Send>>,
}

impl Running {
    pub(crate) fn new(task: Task) -> Self {
        let shared = Arc::clone(&task.shared);
        Self { task, waiting: Box::pin(async move { shared.finished().await }) }
    }

    /// The task itself.
    #[must_use]
    pub fn task(&self) -> &Task {
        &self.task
    }
}

impl fmt::Debug for Running {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.task.fmt(f)
    }
}

impl Future for Running {
    type Output = Result<Arc<Outcome>, UnexpectedEnd>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        self.waiting.as_mut().poll(context).map(expected)
    }
}

/// A task that is prepared on its host and held: its files are there and its first process exists.
///
/// It holds its place in the stream: what was scheduled behind it waits. Dropping it cancels the task.
#[derive(Debug)]
#[must_use = "a prepared task is cancelled when this is dropped"]
pub struct Prepared {
    task: Option<Task>,
}

impl Prepared {
    pub(crate) fn new(task: Task) -> Self {
        Self { task: Some(task) }
    }

    /// The task.
    ///
    /// # Panics
    /// Never: it is there until it is started.
    #[must_use]
    pub fn task(&self) -> &Task {
        self.task.as_ref().expect("it is taken out only by `start`, which consumes this")
    }

    /// Waits until the task is held on its host, or over.
    ///
    /// # Errors
    /// When it has ended: it could not be prepared.
    ///
    /// # Cancel safety
    /// Dropping the future changes nothing.
    pub async fn staged(&self) -> Result<(), UnexpectedEnd> {
        let mut stage = self.task().shared.stage.subscribe();
        let _stage = stage.wait_for(|stage| *stage >= Stage::Staged).await;
        match self.task().try_outcome() {
            Some(outcome) => Err(UnexpectedEnd(outcome)),
            None => Ok(()),
        }
    }

    /// Lets the task begin: one message. It begins as soon as it is its turn.
    ///
    /// # Panics
    /// Never: the task is there until this takes it.
    pub fn start(mut self) -> Task {
        let task = self.task.take().expect("`start` consumes this");
        task.driver.send(Input::Go { tasks: vec![task.shared.id] });
        task
    }

    /// Takes the task out without cancelling it.
    pub(crate) fn release(mut self) -> Task {
        self.task.take().expect("this is consumed")
    }
}

impl Drop for Prepared {
    fn drop(&mut self) {
        if let Some(task) = self.task.take() {
            task.driver.send(Input::Cancel { task: task.shared.id });
        }
    }
}
