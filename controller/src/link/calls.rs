//! The calls on the control connection: renewals, starts, signals, releases.
//!
//! Each says what its failure means for the connection or the session. None of them waits for another.

use std::{
    collections::BTreeSet,
    future::{Future, poll_fn},
    sync::{Arc, Mutex, PoisonError},
    task::Poll,
    time::Duration,
};

use millstream_common::{clock::World, convert, id::TaskId, limits, outcome::Reason, pipe, text::printable};
use millstream_proto::v1;
use tokio::{
    task::JoinSet,
    time::{Instant, timeout_at},
};
use tonic::Code;
use tracing::debug;

use super::{Break, Connection, Holdings, Report, Reports, believed, broken, session_is_gone};
use crate::results::timeline::HostClock;

/// Tasks named in one release.
const RELEASE_COUNT_MAX: usize = 1_000;

/// How often a start that the host answers with an unknown failure is tried on new connections.
const START_ATTEMPTS_MAX: u32 = 5;

/// Begins calls in the order in which they were ordered: each is sent on its way before the next one is looked at, and
/// its answer is awaited beside the others.
pub(super) async fn begin_in_order(
    calls: &mut JoinSet<Result<(), Break>>,
    call: impl Future<Output = Result<(), Break>> + Send + 'static,
) -> Result<(), Break> {
    let mut call = Box::pin(call);
    let first = poll_fn(|context| Poll::Ready(call.as_mut().poll(context))).await;
    match first {
        Poll::Ready(done) => done,
        Poll::Pending => {
            calls.spawn(call);
            Ok(())
        }
    }
}

/// Renews the lease three times in its course.
pub(super) async fn keep(
    connection: Connection,
    world: World,
    belief: Arc<Mutex<Instant>>,
    reports: Reports,
    (place, holdings): (String, Arc<Holdings>),
) -> Break {
    let lease = connection.lease;
    let mut clock = HostClock::default();
    let mut control = connection.control.clone();
    loop {
        let until = *belief.lock().unwrap_or_else(PoisonError::into_inner);
        // The answer also tells who waits for the host: with a long lease that would be old news.
        tokio::time::sleep((lease / 3).min(limits::LEASE)).await;
        let sent = world.clock.now();
        let sent_ns = world.clock.wall_ns();
        let request = v1::KeepSessionRequest { session: Some(connection.session.key()) };
        match timeout_at(until, control.keep_session(request)).await {
            Err(_elapsed) => {
                return Break::Connection("the renewal of the lease was not answered".to_owned());
            }
            Ok(Err(status)) => return broken(&status),
            Ok(Ok(response)) => {
                *belief.lock().unwrap_or_else(PoisonError::into_inner) = sent + believed(lease);
                let response = response.into_inner();
                holdings.wanted(&place, response.waiting_count, world.clock.now());
                if let Some(time) = &response.host_time {
                    let before = clock.uncertainty_ns();
                    clock.measure(sent_ns, convert::timestamp_ns(time), world.clock.wall_ns());
                    if clock.uncertainty_ns() != before {
                        reports(Report::Clock(clock)).await;
                    }
                }
            }
        }
    }
}

/// Hands a task over.
pub(super) async fn start(
    connection: Connection,
    task: TaskId,
    mut request: v1::StartTaskRequest,
    attempt: u32,
    reports: Reports,
) -> Result<(), Break> {
    request.session = Some(connection.session.key());
    let mut control = connection.control;
    let Err(status) = control.start_task(request).await else {
        reports(Report::Accepted { task }).await;
        return Ok(());
    };
    let again = pipe::is_transport_failure(&status) || status.code() == Code::Unavailable;
    if session_is_gone(&status) || (again && attempt < START_ATTEMPTS_MAX) {
        return Err(broken(&status));
    }
    let reason = match status.code() {
        Code::InvalidArgument => Reason::InvalidBlock,
        Code::ResourceExhausted => Reason::HostExhausted,
        Code::FailedPrecondition => Reason::FileRefused,
        Code::Unavailable => Reason::Unreachable,
        _ => Reason::Internal,
    };
    let why = printable(pipe::call_failure(&status).as_bytes(), limits::TEXT_BYTES_MAX);
    reports(Report::Rejected { task, reason, why: format!("the host does not take the task: {why}") }).await;
    Ok(())
}

/// Acts on a task.
pub(super) async fn signal(
    connection: Connection,
    task: TaskId,
    kind: v1::SignalKind,
    grace: Option<Duration>,
    reason: Option<Reason>,
) -> Result<(), Break> {
    let request = v1::SignalTaskRequest {
        session: Some(connection.session.key()),
        task_id: task.to_string(),
        kind: kind.into(),
        signal: 0,
        grace_duration: grace.map(convert::duration),
        reason: match reason {
            Some(Reason::TestDeadline) => v1::Reason::TestDeadline.into(),
            _ => v1::Reason::Unspecified.into(),
        },
    };
    let mut control = connection.control;
    match control.signal_task(request).await {
        Ok(_) => Ok(()),
        Err(status) if pipe::is_transport_failure(&status) || session_is_gone(&status) => {
            Err(broken(&status))
        }
        Err(status) => {
            // A task that the host has never got, or has forgotten, has nothing left to be told.
            debug!(%task, ?kind, why = status.message(), "signal was refused");
            Ok(())
        }
    }
}

/// Lets the host forget tasks. A release that is lost costs the host some space until the session ends.
pub(super) fn release(
    connection: Connection,
    released: &mut BTreeSet<TaskId>,
) -> impl Future<Output = ()> + Send + 'static {
    let mut task_ids = Vec::new();
    while task_ids.len() < RELEASE_COUNT_MAX
        && let Some(task) = released.pop_first()
    {
        task_ids.push(task.to_string());
    }
    async move {
        let request = v1::ReleaseTaskRequest { session: Some(connection.session.key()), task_ids };
        let mut control = connection.control;
        if let Err(status) = control.release_task(request).await {
            debug!(why = pipe::call_failure(&status), "tasks could not be released");
        }
    }
}
