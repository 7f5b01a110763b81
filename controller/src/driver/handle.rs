//! How handles reach the driver, and what they can say.

use std::{
    fmt,
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use millstream_common::id::TaskId;
use tokio::{sync::oneshot, task::JoinHandle};
use tracing::debug;

use super::{Ready, mailbox::Mailbox, retire::Tidied, scribe::Written};
use crate::{
    block::{Block, BlockError},
    link::Report,
    streams::StreamShared,
    task::TaskShared,
};

/// What the driver is told.
pub(crate) enum Input {
    /// A block was scheduled on a stream.
    Schedule(Box<Schedule>),
    /// Held tasks are to begin.
    Go { tasks: Vec<TaskId> },
    /// Can these held tasks begin together? If so and `start` is set, they are to.
    GoTogether { tasks: Vec<TaskId>, start: bool, answer: oneshot::Sender<Result<(), Blocked>> },
    /// A task is to be taken back.
    Cancel { task: TaskId },
    /// A task is to be ended.
    Stop { task: TaskId, grace: Option<Duration> },
    /// What does it do?
    Explain { task: TaskId, answer: oneshot::Sender<String> },
    /// A block was compiled, or cannot be.
    Compiled { task: TaskId, result: Result<Box<Ready>, BlockError> },
    /// A link says something.
    Link { link: usize, report: Report },
    /// The files of a task are complete.
    Written(Box<Written>),
    /// A stream is to be closed while the test goes on.
    Retire { stream: usize, answer: Tidied },
    /// The test is over.
    Close,
}

/// A block to be scheduled.
pub(crate) struct Schedule {
    pub(crate) task: Arc<TaskShared>,
    pub(crate) stream: Arc<StreamShared>,
    pub(crate) block: Block,
    pub(crate) held: bool,
}

/// A task that cannot begin with others.
#[derive(Debug, Clone)]
pub(crate) struct Blocked {
    /// The one that cannot.
    pub(crate) task: String,
    /// The prepared one before it in its stream.
    pub(crate) behind: String,
}

/// How handles reach the driver. Works in any thread, with or without a runtime.
#[derive(Clone)]
pub(crate) struct Handle {
    pub(super) inbox: Arc<Mailbox<Input>>,
    pub(super) runtime: tokio::runtime::Handle,
}

impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handle").finish_non_exhaustive()
    }
}

impl Handle {
    /// Says something. What is said after the end of the test changes nothing; a block scheduled then comes back.
    pub(crate) fn send(&self, input: Input) {
        if let Err(Input::Schedule(_)) = self.inbox.put(input) {
            debug!("a block was scheduled after the streams were closed");
        }
    }

    /// Schedules a block; false when the test is over.
    pub(crate) fn schedule(&self, schedule: Schedule) -> bool {
        self.inbox.put(Input::Schedule(Box::new(schedule))).is_ok()
    }

    /// Runs work on the driver's runtime, until the result is dropped.
    pub(crate) fn spawn<T: Send + 'static>(
        &self,
        work: impl Future<Output = T> + Send + 'static,
    ) -> Spawned<T> {
        Spawned(self.runtime.spawn(work))
    }
}

/// Work on the driver's runtime; ends when this is dropped. None when the runtime ended first.
pub(crate) struct Spawned<T>(JoinHandle<T>);

impl<T> Future for Spawned<T> {
    type Output = Option<T>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<T>> {
        Pin::new(&mut self.0).poll(context).map(Result::ok)
    }
}

impl<T> Drop for Spawned<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Makes the handle of a driver that is about to run.
pub(crate) fn handle(inbox: &Arc<Mailbox<Input>>, runtime: &tokio::runtime::Handle) -> Handle {
    Handle { inbox: Arc::clone(inbox), runtime: runtime.clone() }
}
