//! The agent as operators see it: text and numbers that need no decoding by hand.

use std::{
    collections::VecDeque,
    fs, io,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use millstream_common::{clock::Clock, convert, text::printable};
use millstream_proto::v1;
use tokio::time::Instant;

use super::{Shared, survivors::Survivor, upkeep};
use crate::{
    host,
    session::{Session, Stage, Waiting},
};

/// Tasks of one session that are shown.
const TASKS_COUNT_MAX: usize = 64;
/// Errors that are shown.
const ERRORS_COUNT_MAX: usize = 16;
/// One of them.
const ERROR_BYTES_MAX: usize = 512;
/// For how long a measured use of disk is shown again: measuring means walking directories.
const USE_KEPT: Duration = Duration::from_secs(10);
/// Entries that one measurement looks at: beyond that the figure is a lower bound.
const ENTRIES_COUNT_MAX: usize = 100_000;

/// The last errors, each with its time.
#[derive(Debug, Default)]
pub(crate) struct LastErrors(Mutex<VecDeque<String>>);

impl LastErrors {
    /// Adds one line.
    pub(crate) fn add(&self, clock: &dyn Clock, what: &str) {
        let mut lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if lines.len() == ERRORS_COUNT_MAX {
            lines.pop_front();
        }
        lines.push_back(format!(
            "{} {}",
            clock_text(clock.wall_ns()),
            printable(what.as_bytes(), ERROR_BYTES_MAX)
        ));
    }

    fn lines(&self) -> Vec<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }
}

/// An instant as people and tools read it: `2026-11-21T22:37:25Z`.
pub(crate) fn clock_text(ns_since_1970: u64) -> String {
    let timestamp = convert::timestamp(ns_since_1970 / 1_000_000_000 * 1_000_000_000);
    timestamp.to_string()
}

/// The last measurement of disk use.
#[derive(Debug, Default)]
pub(crate) struct DiskUse(Mutex<Option<(Instant, v1::SpoolUse)>>);

impl DiskUse {
    /// Measures, unless that was done a moment ago. Runs where it may block.
    pub(super) async fn measure(self: &Arc<Self>, shared: &Shared) -> v1::SpoolUse {
        let now = shared.world.clock.now();
        if let Some((at, found)) = &*self.0.lock().unwrap_or_else(PoisonError::into_inner)
            && now.saturating_duration_since(*at) < USE_KEPT
        {
            return found.clone();
        }
        let (state, store) = (shared.state.clone(), shared.store.clone());
        let measured = tokio::task::spawn_blocking(move || {
            let mut entries = 0;
            v1::SpoolUse {
                sessions_bytes: used_bytes(&super::supervisors::sessions_directory(&state), &mut entries),
                blobs_bytes: store.used_bytes(),
                blobs_bytes_max: store.limit_bytes(),
                free_bytes: host::free_bytes(&state),
                directory: state.display().to_string(),
            }
        });
        let found = measured.await.unwrap_or_default();
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some((now, found.clone()));
        found
    }
}

/// Bytes on disk below a directory; what vanishes meanwhile counts nothing.
fn used_bytes(directory: &Path, entries: &mut usize) -> u64 {
    let mut waiting = vec![directory.to_owned()];
    let mut bytes = 0;
    while let Some(directory) = waiting.pop() {
        let Ok(found) = fs::read_dir(&directory) else { continue };
        for entry in found.flatten() {
            *entries += 1;
            if *entries > ENTRIES_COUNT_MAX {
                return bytes;
            }
            let Ok(known) = entry.metadata() else { continue };
            if known.is_dir() {
                waiting.push(entry.path());
            } else {
                bytes += std::os::unix::fs::MetadataExt::blocks(&known) * 512;
            }
        }
    }
    bytes
}

impl Shared {
    /// Everything, as it is now.
    pub(crate) async fn status(&self) -> v1::AgentStatus {
        let spool = self.disk_use.measure(self).await;
        let now = self.world.clock.since_boot();
        let (state, state_reason) = self.state();
        let (drain, waiting) = {
            let sessions = self.sessions();
            let drain = sessions.draining().map(upkeep::drain_status);
            (drain, sessions.waiting().map(waiting_status).collect())
        };
        v1::AgentStatus {
            version: self.build.spoken.version.to_owned(),
            protocol_min: self.build.spoken.min,
            protocol_max: self.build.spoken.max,
            incarnation: self.incarnation.clone(),
            uptime: Some(convert::duration(now.saturating_sub(self.started))),
            host: Some(self.host.clone()),
            capabilities: Some(self.capabilities.clone()),
            load: Some(host::load()),
            state: state.into(),
            state_reason,
            sessions: self.session_statuses(now),
            spool: Some(spool),
            last_errors: self.last_errors.lines(),
            drain,
            survivors: self.survivors().iter().map(Survivor::status).collect(),
            certificate: self.certificate.status(),
            waiting,
        }
    }

    fn state(&self) -> (v1::AgentState, String) {
        let sessions = self.sessions();
        if let Some(drain) = sessions.draining() {
            return (v1::AgentState::Draining, drain.to_string());
        }
        match sessions.survivors() {
            [] => (v1::AgentState::Ready, String::new()),
            survivors => {
                let list = survivors.join(", ");
                (v1::AgentState::Unclean, format!("left behind: {}", printable(list.as_bytes(), 1_024)))
            }
        }
    }

    fn session_statuses(&self, now: Duration) -> Vec<v1::SessionStatus> {
        let known: Vec<_> = self.sessions().iter().map(|(id, session)| (id, session.clone())).collect();
        known.into_iter().map(|(id, session)| self.session_status(id, &session, now)).collect()
    }

    fn session_status(
        &self,
        id: millstream_common::id::SessionId,
        session: &Session,
        now: Duration,
    ) -> v1::SessionStatus {
        let lease_left = match session.stage {
            Stage::Open => session.lease_end.saturating_sub(now),
            Stage::Expired | Stage::Settled | Stage::Closing => Duration::ZERO,
        };
        let (tasks, tasks_count, supervisor_pid) =
            self.supervised(id).map_or_else(Default::default, |supervised| {
                let mirror = supervised.mirror();
                (shown_tasks(&mirror), mirror.received_count(), mirror.supervisor_pid())
            });
        v1::SessionStatus {
            session_id: id.to_string(),
            owner: session.owner.to_string(),
            client: session.client.clone(),
            open_time: Some(convert::timestamp(session.open_time_ns)),
            lease_left: Some(convert::duration(lease_left)),
            exclusive: session.exclusive,
            connected: session.connections > 0,
            supervisor_pid,
            tasks,
            tasks_count,
        }
    }
}

fn waiting_status(waiting: Waiting<'_>) -> v1::WaitingStatus {
    v1::WaitingStatus {
        owner: waiting.owner.to_string(),
        client: waiting.client.to_owned(),
        exclusive: waiting.exclusive,
        asked_time: Some(convert::timestamp(waiting.asked_time_ns)),
    }
}

/// Unfinished tasks, and the newest finished ones in the places that are left, in the order in which they came.
fn shown_tasks(mirror: &super::supervisors::Mirror) -> Vec<v1::TaskStatus> {
    let unfinished = mirror.iter().filter(|(_, task)| !task.is_finished()).take(TASKS_COUNT_MAX);
    let mut shown: Vec<_> = unfinished.collect();
    let places = TASKS_COUNT_MAX - shown.len();
    shown.extend(mirror.iter().rev().filter(|(_, task)| task.is_finished()).take(places));
    shown.sort_by_key(|(id, _)| *id);
    shown.into_iter().map(|(id, task)| task.status(id)).collect()
}

/// Makes the state directory: others may pass through it, because blocks of other users live below, but not look around.
pub(crate) fn prepare_state(state: &Path) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt as _;
    for directory in [state.to_owned(), super::supervisors::sessions_directory(state)] {
        fs::DirBuilder::new().recursive(true).mode(0o711).create(&directory)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use millstream_common::clock::SystemClock;

    use super::*;

    #[test]
    fn only_the_last_errors_are_kept_and_they_are_safe_to_print() {
        let errors = LastErrors::default();
        for number in 0..40 {
            errors.add(&SystemClock, &format!("error {number} \x1b[31m"));
        }
        let lines = errors.lines();
        assert_eq!(lines.len(), ERRORS_COUNT_MAX);
        assert!(lines[15].ends_with("error 39 \\u{1b}[31m"), "{}", lines[15]);
    }

    #[test]
    fn instants_are_readable() {
        assert_eq!(clock_text(1_000_000_000_123_456_789), "2001-09-09T01:46:40Z");
    }
}
