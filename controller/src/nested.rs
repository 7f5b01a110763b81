//! Streams inside blocks: a block that was marked runs blocks itself, through the streams of its test.
//!
//! The block's process has a driver of its own, and so queues, barriers, topics and numbers of its own: a scope that knows
//! nothing of the test's. What it lacks it asks of the controller through its sync socket: how the streams are defined, and
//! byte pipes to their agents. So the same API serves both, credentials stay where they are, and a nested block may nest
//! again. `service` is the controller's end, `inside` the block's; `tunnel` is a pipe between them.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use millstream_common::{
    clock::World,
    convert,
    id::{SessionId, TaskId},
    limits,
    spec::FailurePolicy,
};
use millstream_proto::v1;
use tokio::task::JoinSet;
use tonic::Status;
use tracing::{info, warn};

use crate::{
    link::{Session, close::Closing},
    reach::{Entrusted, Reach},
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
    world: World,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    /// Tasks that may run streams, and whether they run on this machine.
    allowed: BTreeMap<TaskId, bool>,
    /// Reaches that were dialled for them, by place: what these have started is ended with the test.
    dialled: BTreeMap<String, Arc<dyn Reach>>,
    /// Sessions that they have opened and not closed.
    entrusted: BTreeMap<TaskId, BTreeMap<SessionId, Care>>,
    /// Sessions of tasks that are over, being ended; what cannot be ended comes back as text.
    ending: JoinSet<Vec<String>>,
    closed: bool,
}

/// A session in the care of the controller.
#[derive(Debug)]
struct Care {
    session: Session,
    lease: Duration,
    reach: Arc<dyn Reach>,
}

impl Gate {
    pub(crate) fn new(test: Arc<TestShared>, world: World) -> Self {
        Self { test, world, inner: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A task may run streams; `is_local` says whether its own stream is on this machine.
    pub(crate) fn allow(&self, task: TaskId, is_local: bool) {
        self.lock().allowed.insert(task, is_local);
    }

    /// A task is over: what it has left running in streams of its own ends now, and not only with its leases.
    pub(crate) fn forget(&self, task: TaskId) {
        let mut inner = self.lock();
        inner.allowed.remove(&task);
        for (_, care) in inner.entrusted.remove(&task).unwrap_or_default() {
            let world = self.world.clone();
            info!(%task, session = %care.session.id, place = care.reach.describe(), "ending what a block has left");
            inner.ending.spawn(async move {
                let closing = Closing { reach: &*care.reach, world: &world, lease: care.lease };
                let left = closing.unconnected(&care.session).await;
                left.iter()
                    .for_each(|left| warn!(%task, "what a block has left in a stream of its own: {left}"));
                left
            });
        }
    }

    /// A task that may run streams leaves a session in the controller's care, or takes it back.
    fn entrust(&self, task: TaskId, name: &str, session: Entrusted) -> Result<(), Status> {
        if session.over {
            self.check(task)?;
            if let Some(entrusted) = self.lock().entrusted.get_mut(&task) {
                entrusted.remove(&session.session_id);
            }
            return Ok(());
        }
        let reach = self.reach(task, name)?;
        let mut inner = self.lock();
        let entrusted = inner.entrusted.entry(task).or_default();
        if entrusted.len() >= limits::SESSIONS_COUNT_MAX {
            return Err(Status::resource_exhausted(format!(
                "a block has at most {} sessions in the care of its test: close streams that are not needed any more",
                limits::SESSIONS_COUNT_MAX
            )));
        }
        let Entrusted { session_id: id, secret, lease, .. } = session;
        entrusted.insert(id, Care { session: Session { id, secret, epoch: 0 }, lease, reach });
        Ok(())
    }

    /// The test is over: nothing is dialled any more, and what was started for blocks ends. What could not be ended comes
    /// back as text.
    pub(crate) async fn close(&self) -> Vec<String> {
        let (mut ending, dialled) = {
            let mut inner = self.lock();
            inner.closed = true;
            (std::mem::take(&mut inner.ending), std::mem::take(&mut inner.dialled))
        };
        let mut left_behind = Vec::new();
        while let Some(left) = ending.join_next().await {
            left_behind.extend(left.unwrap_or_default());
        }
        for (place, reach) in dialled {
            if tokio::time::timeout(limits::CLOSE_MAX, reach.release()).await.is_err() {
                warn!("what was started for {place} did not end in time");
            }
        }
        left_behind
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
