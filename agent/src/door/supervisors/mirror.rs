//! What the door knows of the tasks of one session. Holds no bytes of logs; sends nothing.
//!
//! Each task remembers the version of the mirror at which it last changed, so that a watcher asks for what changed since it
//! last looked: one that is slow skips what lies between and misses no task.

use std::{collections::BTreeMap, sync::Arc};

use millstream_common::{id::TaskId, limits, outcome::OutcomeKind};
use millstream_proto::{supervisor::v1::TaskChanged, v1};
use prost_types::Timestamp;

/// Bytes of small archives that are kept with the records of tasks, for one session; beyond it they are read from disk.
const INLINE_BYTES_MAX: usize = 16 * 1024 * 1024;

/// One task as its supervisor last told.
#[derive(Debug, Clone, Default)]
pub(crate) struct TaskView {
    /// Its stream.
    pub(crate) stream: String,
    /// Name of its block.
    pub(crate) block: String,
    /// Where it is in its life.
    pub(crate) state: v1::TaskState,
    /// The phase that runs.
    pub(crate) phase: v1::Phase,
    /// Process of that phase.
    pub(crate) pid: u32,
    /// When it entered this state or phase.
    pub(crate) time: Option<Timestamp>,
    /// When it began to run.
    pub(crate) start_time: Option<Timestamp>,
    /// How far its spool may be read.
    pub(crate) spool_position: u64,
    /// Bytes printed so far.
    pub(crate) logged_bytes: u64,
    /// Last line printed, made safe.
    pub(crate) last_line: String,
    /// Why it is where it is.
    pub(crate) explanation: String,
    /// Its terminal record.
    pub(crate) end: Option<Arc<v1::TaskEnd>>,
    version: u64,
}

impl TaskView {
    /// Whether its terminal record is there.
    pub(crate) fn is_finished(&self) -> bool {
        self.end.is_some()
    }
}

/// What was new in what was told of a task.
#[derive(Debug, Default)]
pub(crate) struct Change {
    /// Bytes printed since it was told before.
    pub(crate) logged_bytes: u64,
    /// The task, when its terminal record has just come.
    pub(crate) ended: Option<Arc<TaskView>>,
}

/// All tasks of one session that were not released.
#[derive(Debug, Default)]
pub(crate) struct Mirror {
    /// Numbers of tasks sort by the time at which they were made.
    tasks: BTreeMap<TaskId, Arc<TaskView>>,
    changes: BTreeMap<u64, TaskId>,
    version: u64,
    /// Tasks that were ever seen.
    received_count: u32,
    unfinished_count: usize,
    inline_bytes: usize,
    supervisor_pid: u32,
    lease_expired: bool,
    closing: bool,
    /// Whether the supervisor has died.
    died: bool,
}

impl Mirror {
    pub(super) fn new() -> Self {
        Self::default()
    }

    /// Grows with each change.
    pub(crate) fn version(&self) -> u64 {
        self.version
    }

    /// Process of the supervisor; zero when it is gone.
    pub(crate) fn supervisor_pid(&self) -> u32 {
        self.supervisor_pid
    }

    /// Number of tasks that were ever seen.
    pub(crate) fn received_count(&self) -> u32 {
        self.received_count
    }

    /// Number of tasks that were not released.
    pub(crate) fn len(&self) -> usize {
        self.tasks.len()
    }

    /// One task.
    pub(crate) fn get(&self, task: TaskId) -> Option<&Arc<TaskView>> {
        self.tasks.get(&task)
    }

    /// All tasks, oldest first.
    pub(crate) fn iter(&self) -> impl DoubleEndedIterator<Item = (TaskId, &Arc<TaskView>)> {
        self.tasks.iter().map(|(id, task)| (*id, task))
    }

    /// At most `count` tasks that have changed after `version`, with the version up to which they are reported.
    pub(crate) fn changed_since(&self, version: u64, count: usize) -> (Vec<(TaskId, Arc<TaskView>)>, u64) {
        let mut changed = Vec::new();
        for (&at, task) in self.changes.range(version + 1..) {
            if changed.len() == count {
                return (changed, at - 1);
            }
            if let Some(view) = self.tasks.get(task) {
                changed.push((*task, Arc::clone(view)));
            }
        }
        (changed, self.version)
    }

    pub(super) fn is_lease_expired(&self) -> bool {
        self.lease_expired
    }

    /// Whether the supervisor is gone without having been told to.
    pub(super) fn has_died(&self) -> bool {
        self.died
    }

    pub(crate) fn is_closing(&self) -> bool {
        self.closing
    }

    pub(super) fn begin_closing(&mut self) {
        self.closing = true;
    }

    /// Whether every task has its terminal record.
    pub(crate) fn all_finished(&self) -> bool {
        self.unfinished_count == 0
    }

    pub(super) fn hello(&mut self, pid: u32, lease_expired: bool) {
        self.supervisor_pid = pid;
        self.lease_expired |= lease_expired;
    }

    pub(super) fn lease_expired(&mut self) {
        self.lease_expired = true;
        self.version += 1;
    }

    /// The supervisor is gone, because it was told to, because the lease was over, or because it died.
    pub(super) fn supervisor_gone(&mut self, died: bool) {
        self.died = died;
        self.supervisor_pid = 0;
        self.lease_expired = true;
        self.version += 1;
    }

    /// Takes over what is told of a task; what is unset has not changed. A record that is there is never replaced.
    pub(super) fn update(&mut self, id: TaskId, told: TaskChanged) -> Change {
        let known = self.tasks.contains_key(&id);
        if !known {
            self.received_count = self.received_count.saturating_add(1);
            self.unfinished_count += 1;
        }
        let entry = self.tasks.entry(id).or_default();
        self.changes.remove(&entry.version);
        self.version += 1;
        self.changes.insert(self.version, id);
        let view = Arc::make_mut(entry);
        view.version = self.version;
        if view.end.is_some() {
            return Change::default();
        }
        let logged_before = view.logged_bytes;
        view.take_over(told, &mut self.inline_bytes);
        let logged_bytes = view.logged_bytes - logged_before;
        if view.end.is_some() {
            self.unfinished_count -= 1;
        }
        Change { logged_bytes, ended: entry.is_finished().then(|| Arc::clone(entry)) }
    }

    /// Forgets tasks.
    pub(super) fn release(&mut self, tasks: &[TaskId]) {
        for task in tasks {
            let Some(view) = self.tasks.remove(task) else { continue };
            self.changes.remove(&view.version);
            match &view.end {
                Some(end) => self.inline_bytes -= inline_length(end),
                None => self.unfinished_count -= 1,
            }
        }
        self.version += 1;
    }
}

fn inline_length(end: &v1::TaskEnd) -> usize {
    end.archive.as_ref().map_or(0, |archive| archive.inline.len())
}

impl TaskView {
    fn take_over(&mut self, told: TaskChanged, inline_bytes: &mut usize) {
        let state = told.state();
        let phase = told.phase();
        if state != v1::TaskState::Unspecified {
            if state == v1::TaskState::Running && self.start_time.is_none() {
                self.start_time = told.time;
            }
            let moved = state != self.state || (phase != v1::Phase::Unspecified && phase != self.phase);
            if moved || told.time.is_some() {
                self.time = told.time;
            }
            self.state = state;
        }
        if phase != v1::Phase::Unspecified {
            self.phase = phase;
        }
        if told.pid != 0 {
            self.pid = told.pid;
        }
        for (mine, theirs) in [
            (&mut self.stream, told.stream),
            (&mut self.block, told.block),
            (&mut self.last_line, told.last_line),
            (&mut self.explanation, told.explanation),
        ] {
            if !theirs.is_empty() {
                *mine = theirs;
            }
        }
        self.spool_position = self.spool_position.max(told.spool_position);
        self.logged_bytes = self.logged_bytes.max(told.logged_bytes);
        if let Some(mut end) = told.end {
            self.finish(&mut end, inline_bytes);
            self.end = Some(Arc::new(end));
        }
    }

    fn finish(&mut self, end: &mut v1::TaskEnd, inline_bytes: &mut usize) {
        self.state = v1::TaskState::Finished;
        self.pid = 0;
        self.start_time = end.start_time.or(self.start_time);
        if let Some(log) = &end.log {
            self.spool_position = self.spool_position.max(log.end_position);
            self.logged_bytes = self.logged_bytes.max(log.stdout_bytes + log.stderr_bytes);
        }
        let length = inline_length(end);
        if *inline_bytes + length > INLINE_BYTES_MAX {
            // It is on disk as well and is read from there when it is asked for.
            if let Some(archive) = &mut end.archive {
                archive.inline = bytes::Bytes::new();
            }
        } else {
            *inline_bytes += length;
        }
    }

    /// The task as operators see it.
    pub(crate) fn status(&self, id: TaskId) -> v1::TaskStatus {
        let outcome = self.end.as_ref().map_or(v1::OutcomeKind::Unspecified, |end| end.outcome());
        let explanation = match &self.end {
            Some(end) => how_it_ended(end),
            None => self.explanation.clone(),
        };
        v1::TaskStatus {
            task_id: id.to_string(),
            stream: self.stream.clone(),
            block: self.block.clone(),
            state: self.state.into(),
            phase: self.phase.into(),
            pid: self.pid,
            start_time: self.start_time,
            logged_bytes: self.logged_bytes,
            last_line: millstream_common::text::printable(
                self.last_line.as_bytes(),
                limits::LAST_LINE_BYTES_MAX,
            ),
            outcome: outcome.into(),
            explanation,
        }
    }
}

fn how_it_ended(end: &v1::TaskEnd) -> String {
    let outcome = millstream_common::convert::outcome_in("outcome", end.outcome)
        .map_or_else(|_| "ended".to_owned(), |outcome: OutcomeKind| outcome.to_string());
    let reason =
        millstream_common::convert::reason_in("reason", end.reason).map_or("", |reason| reason.word());
    match (end.exit_code, end.signal, end.detail.as_str()) {
        (Some(code), _, "") => format!("{outcome}: exit code {code}"),
        (_, Some(signal), "") => format!("{outcome}: {}", millstream_common::outcome::Exit::Signal(signal)),
        (_, _, "") => format!("{outcome}: {reason}"),
        (_, _, detail) => format!("{outcome}: {detail}"),
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    fn id(number: u8) -> TaskId {
        TaskId::from_uuid(Uuid::from_u128(0x7000_8000_0000_0000_0000 | u128::from(number)))
    }

    fn told(number: u8, state: v1::TaskState) -> TaskChanged {
        TaskChanged { task_id: id(number).to_string(), state: state.into(), ..TaskChanged::default() }
    }

    fn ended(number: u8) -> TaskChanged {
        let end = v1::TaskEnd { exit_code: Some(3), ..v1::TaskEnd::default() };
        TaskChanged { end: Some(end), ..told(number, v1::TaskState::Finished) }
    }

    #[test]
    fn a_slow_watcher_misses_no_task() {
        let mut mirror = Mirror::new();
        for number in 1..=5 {
            mirror.update(id(number), told(number, v1::TaskState::Queued));
        }
        mirror.update(id(1), told(1, v1::TaskState::Running));
        let (first, at) = mirror.changed_since(0, 3);
        assert_eq!(first.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [id(2), id(3), id(4)]);
        let (rest, at) = mirror.changed_since(at, 3);
        assert_eq!(rest.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [id(5), id(1)]);
        assert_eq!(rest[1].1.state, v1::TaskState::Running);
        assert!(mirror.changed_since(at, 3).0.is_empty());
    }

    #[test]
    fn a_record_is_never_replaced() {
        let mut mirror = Mirror::new();
        mirror.update(id(1), ended(1));
        mirror.update(id(1), told(1, v1::TaskState::Running));
        assert_eq!(mirror.get(id(1)).unwrap().state, v1::TaskState::Finished);
        assert!(mirror.all_finished());
        assert_eq!(mirror.get(id(1)).unwrap().status(id(1)).explanation, "ended: exit code 3");
    }

    #[test]
    fn releasing_leaves_nothing() {
        let mut mirror = Mirror::new();
        mirror.update(id(1), ended(1));
        mirror.update(id(2), told(2, v1::TaskState::Running));
        mirror.release(&[id(1), id(2), id(3)]);
        assert!(mirror.changes.is_empty() && mirror.tasks.is_empty() && mirror.all_finished());
        assert_eq!((mirror.received_count(), mirror.inline_bytes), (2, 0));
    }
}
