//! Streams inside blocks: a block that was marked runs blocks itself, through the streams of its test.
//!
//! The block's process has a driver of its own, and so queues, barriers, topics and numbers of its own: a scope that knows
//! nothing of the test's. What it lacks it asks of the controller through its sync socket: how the streams are defined, and
//! byte pipes to their agents. So the same API serves both, credentials stay where they are, and a nested block may nest
//! again. `service` is the controller's end, `inside` the block's; `tunnel` is a pipe between them.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use millstream_common::{convert, id::TaskId, limits, spec::FailurePolicy};
use millstream_proto::v1;
use tonic::Status;
use tracing::warn;

use crate::{
    reach::Reach,
    streams::{StreamShared, TestShared},
    sync::service::Page,
};

pub(crate) mod inside;
mod service;
mod tunnel;

/// Where a block finds room for the results of its own streams, in its output directory. At home it becomes `streams/`.
pub(crate) const RESULTS_DIRECTORY: &str = ".millstream-streams";

/// What a test offers to its blocks, and to which of them.
#[derive(Debug)]
pub(crate) struct Gate {
    test: Arc<TestShared>,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    /// Tasks that may run streams, and whether they run on this machine.
    allowed: BTreeMap<TaskId, bool>,
    /// Reaches that were dialled for them, by place: what these have started is ended with the test.
    dialled: BTreeMap<String, Arc<dyn Reach>>,
    closed: bool,
}

impl Gate {
    pub(crate) fn new(test: Arc<TestShared>) -> Self {
        Self { test, inner: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A task may run streams; `is_local` says whether its own stream is on this machine.
    pub(crate) fn allow(&self, task: TaskId, is_local: bool) {
        self.lock().allowed.insert(task, is_local);
    }

    /// A task is over.
    pub(crate) fn forget(&self, task: TaskId) {
        self.lock().allowed.remove(&task);
    }

    /// The test is over: nothing is dialled any more, and what was started for blocks ends.
    pub(crate) async fn close(&self) {
        let dialled = {
            let mut inner = self.lock();
            inner.closed = true;
            std::mem::take(&mut inner.dialled)
        };
        for (place, reach) in dialled {
            if tokio::time::timeout(limits::CLOSE_MAX, reach.release()).await.is_err() {
                warn!("what was started for {place} did not end in time");
            }
        }
    }

    /// Whether a task that may run streams is on this machine.
    fn check(&self, task: TaskId) -> Result<bool, Status> {
        self.lock().allowed.get(&task).copied().ok_or_else(|| {
            Status::permission_denied(
                "it was not marked as one that may: mark it with `.may_run_streams()`, or start a program whose streams \
                 are its own without the variable MILLSTREAM_SYNC",
            )
        })
    }

    fn list(&self, task: TaskId, page: &mut Page) -> Result<Vec<v1::NestedStream>, Status> {
        let is_local = self.check(task)?;
        let streams = self.test.streams();
        let rest = streams.iter().skip(page.from());
        Ok(rest.map_while(|stream| page.take(described(stream, is_local))).collect())
    }

    fn reach(&self, task: TaskId, name: &str) -> Result<Arc<dyn Reach>, Status> {
        self.check(task)?;
        let streams = self.test.streams();
        let Some(stream) = streams.iter().find(|stream| stream.name.as_str() == name) else {
            return Err(Status::not_found(format!("the test has no stream `{}`", name.escape_debug())));
        };
        let place = stream.reach().describe();
        let reserved = streams.iter().any(|other| other.exclusive() && other.reach().describe() == place);
        if reserved {
            return Err(Status::failed_precondition(format!(
                "waiting for stream `{name}` inside a block would be a circle: the block would wait for {place}, which the \
                 test has reserved until it ends, and the test waits for the block. Leave `exclusive` out of the \
                 definition"
            )));
        }
        let mut inner = self.lock();
        if inner.closed {
            return Err(Status::unavailable("the streams of the test are closed"));
        }
        inner.dialled.insert(place, Arc::clone(stream.reach()));
        Ok(Arc::clone(stream.reach()))
    }
}

/// A stream as a block has it that may run streams, and runs on this machine itself or not.
fn described(stream: &StreamShared, is_local: bool) -> v1::NestedStream {
    let defaults = stream.defaults();
    v1::NestedStream {
        name: stream.name.to_string(),
        definition: stream.definition(),
        place: stream.reach().describe(),
        host: stream.host().to_owned(),
        survives_disconnect: stream.reach().survives_disconnect(),
        environment: defaults
            .env
            .iter()
            .map(|(name, value)| v1::EnvironmentVariable { name: name.clone(), value: value.clone() })
            .collect(),
        working_directory: defaults.cwd.clone().unwrap_or_default(),
        user: defaults.user.clone().unwrap_or_default(),
        timeout: defaults.timeout.map(convert::duration),
        wrap: defaults.wrap.clone(),
        limits: (!defaults.limits.is_none()).then(|| v1::ResourceLimits {
            memory_bytes: defaults.limits.memory_bytes.unwrap_or(0),
            pids_count: defaults.limits.pids_count.unwrap_or(0),
            cpu_millis: defaults.limits.cpu_millis.unwrap_or(0),
        }),
        failure_policy: match defaults.on_failure {
            FailurePolicy::Continue => v1::FailurePolicy::Continue,
            FailurePolicy::Drain => v1::FailurePolicy::Drain,
        }
        .into(),
        same_host: is_local && stream.is_local(),
    }
}
