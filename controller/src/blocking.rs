//! The same API for plain tests: every wait blocks the thread.
//!
//! No runtime is needed: the driver has its own. Inside an asynchronous test use the asynchronous API; blocking there
//! holds up whatever else runs on that thread, but no stream.

use std::{
    future::{Future, IntoFuture},
    pin::pin,
    sync::Arc,
    task::{Context, Poll, Wake, Waker},
    thread::{self, Thread},
    time::Duration,
};

use millstream_common::clock::Clock;

use crate::{
    block::Block,
    error::{Error, Result, UnexpectedEnd},
    outcome::{FailureReport, Outcome, Report},
    stream::Stream,
    streams::{Parties, Streams},
    task::{Ready, ReadyError, Task},
};

/// Wakes a thread that is parked.
struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Blocks the thread until the future completes.
pub fn block_on<F: IntoFuture>(future: F) -> F::Output {
    let mut future = pin!(future.into_future());
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut context = Context::from_waker(&waker);
    loop {
        match future.as_mut().poll(&mut context) {
            Poll::Ready(output) => return output,
            Poll::Pending => thread::park(),
        }
    }
}

/// Blocks the thread until the future completes, at most for a time.
pub(crate) fn block_on_for<F: Future>(future: F, limit: Duration, clock: &dyn Clock) -> Option<F::Output> {
    let until = clock.now() + limit;
    let mut future = pin!(future);
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut context = Context::from_waker(&waker);
    loop {
        if let Poll::Ready(output) = future.as_mut().poll(&mut context) {
            return Some(output);
        }
        let left = until.saturating_duration_since(clock.now());
        if left.is_zero() {
            return None;
        }
        thread::park_timeout(left);
    }
}

/// What a plain test calls on [`Streams`].
pub trait BlockingStreams {
    /// As [`Streams::wait`].
    ///
    /// # Errors
    /// When a task ended unexpectedly.
    fn wait_blocking(&self) -> std::result::Result<Report, FailureReport>;

    /// As [`Streams::join`].
    fn join_blocking(&self) -> Report;

    /// As [`Streams::barrier`].
    ///
    /// # Errors
    /// When the barrier broke or was refused.
    fn barrier_blocking(&self, name: &str, parties: impl Into<Parties>) -> Result<crate::streams::Released>;

    /// As [`Streams::close`].
    ///
    /// # Errors
    /// When something could not be tidied.
    fn close_blocking(self) -> crate::Result<()>;
}

impl BlockingStreams for Streams {
    fn wait_blocking(&self) -> std::result::Result<Report, FailureReport> {
        block_on(self.wait())
    }

    fn join_blocking(&self) -> Report {
        block_on(self.join())
    }

    fn barrier_blocking(&self, name: &str, parties: impl Into<Parties>) -> Result<crate::streams::Released> {
        block_on(self.barrier(name, parties)).map_err(Error::from)
    }

    fn close_blocking(self) -> crate::Result<()> {
        block_on(self.close())
    }
}

/// What a plain test calls on a [`Stream`].
pub trait BlockingStream {
    /// As [`Stream::run_fg`].
    ///
    /// # Errors
    /// When the task ended unexpectedly.
    fn run_fg_blocking(&self, block: impl Into<Block>) -> std::result::Result<Arc<Outcome>, UnexpectedEnd>;

    /// As [`Stream::close`].
    ///
    /// # Errors
    /// When something could not be tidied.
    fn close_blocking(&self) -> crate::Result<()>;
}

impl BlockingStream for Stream {
    fn run_fg_blocking(&self, block: impl Into<Block>) -> std::result::Result<Arc<Outcome>, UnexpectedEnd> {
        block_on(self.run_fg(block))
    }

    fn close_blocking(&self) -> crate::Result<()> {
        block_on(self.close())
    }
}

/// What a plain test calls on a [`Task`].
pub trait BlockingTask {
    /// As [`Task::wait`].
    ///
    /// # Errors
    /// When the task ended unexpectedly.
    fn wait_blocking(&self) -> std::result::Result<Arc<Outcome>, UnexpectedEnd>;

    /// As [`Task::outcome`].
    fn outcome_blocking(&self) -> Arc<Outcome>;

    /// As [`Task::ready`].
    ///
    /// # Errors
    /// When the task ended first.
    fn ready_blocking(&self, ready: Ready) -> std::result::Result<(), ReadyError>;
}

impl BlockingTask for Task {
    fn wait_blocking(&self) -> std::result::Result<Arc<Outcome>, UnexpectedEnd> {
        block_on(self.wait())
    }

    fn outcome_blocking(&self) -> Arc<Outcome> {
        block_on(self.outcome())
    }

    fn ready_blocking(&self, ready: Ready) -> std::result::Result<(), ReadyError> {
        block_on(self.ready(ready))
    }
}
