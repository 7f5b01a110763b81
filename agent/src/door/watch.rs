//! Events of tasks for watchers: states, output, ends, in order for each task, from any position.
//!
//! Two kinds of stream. One carries all tasks of a session, and of each so little output that no task can hold up the others
//! or the lease; the other carries one task at full speed. Both read output from disk, so a watcher that is slow or away
//! costs nothing but its place in a file. The end of a task comes after its last byte of output.

use std::{
    collections::{HashMap, HashSet},
    io,
    sync::Arc,
};

use millstream_common::{id::TaskId, limits};
use millstream_proto::v1::{self, task_event::Event};
use tokio::sync::mpsc;
use tonic::Status;
use tracing::{debug, error};

use super::supervisors::{Supervised, TaskView};
use crate::supervisor::spool::SpoolReader;

/// Messages that wait for a slow watcher: reading the next one overlaps with sending this one, more would be memory only.
const MESSAGES_COUNT_MAX: usize = 2;
/// Tasks that are reported in one message.
const TASKS_A_MESSAGE: usize = 256;
/// Bytes of events in one message, after which it is sent.
const EVENTS_BYTES_MAX: usize = 1024 * 1024;

/// Messages of one watcher.
pub(crate) type Events = mpsc::Receiver<Result<v1::WatchTaskResponse, Status>>;
type Sender = mpsc::Sender<Result<v1::WatchTaskResponse, Status>>;

/// How far a watcher has come with one task.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Cursor {
    /// Where its output goes on.
    pub(crate) position: u64,
    /// Whether it has the terminal record.
    pub(crate) ended: bool,
    /// Output sent on a stream of all tasks.
    sent_bytes: u64,
    /// Whether it was told to get the rest elsewhere.
    continues: bool,
    /// The last state that was sent.
    state: Option<(v1::TaskState, v1::Phase, u32)>,
}

impl Cursor {
    /// A watcher that comes back.
    pub(crate) fn at(position: u64, ended: bool) -> Self {
        Self { position, ended, ..Self::default() }
    }
}

fn event(task: TaskId, event: Event) -> v1::TaskEvent {
    v1::TaskEvent { task_id: task.to_string(), event: Some(event) }
}

/// The state of a task, if it is another than the one that was sent last. A finished task is reported by its end alone.
fn progress(task: TaskId, view: &TaskView, cursor: &mut Cursor) -> Option<v1::TaskEvent> {
    let state = (view.state, view.phase, view.pid);
    if view.is_finished() || view.state == v1::TaskState::Unspecified || cursor.state == Some(state) {
        return None;
    }
    cursor.state = Some(state);
    let progress = v1::TaskProgress {
        state: view.state.into(),
        phase: view.phase.into(),
        pid: view.pid,
        time: view.time,
    };
    Some(event(task, Event::Progress(progress)))
}

/// The terminal record with its small archive, which may have been left on disk.
fn end(supervised: &Supervised, task: TaskId, end: &v1::TaskEnd) -> v1::TaskEvent {
    let mut end = end.clone();
    if let Some(archive) = &mut end.archive
        && archive.inline.is_empty()
        && archive.size_bytes <= limits::ARCHIVE_INLINE_BYTES_MAX
    {
        match std::fs::read(supervised.directory.archive(task)) {
            Ok(bytes) if u64::try_from(bytes.len()) == Ok(archive.size_bytes) => {
                archive.inline = bytes.into()
            }
            // The watcher will fetch it, and be told what is wrong.
            Ok(_) => debug!(%task, "an archive has another length than its record"),
            Err(error) => debug!(%task, %error, "an archive cannot be read"),
        }
    }
    event(task, Event::End(end))
}

pub(super) fn damaged(task: TaskId, error: &io::Error) -> Status {
    error!(%task, %error, "output cannot be read");
    Status::data_loss(format!(
        "the output of task {task} cannot be read: {}",
        millstream_common::tls::reason(error)
    ))
}

/// Records as the wire has them; their bytes stay where they were read.
fn records(records: Vec<millstream_common::log::LogRecord>) -> Vec<v1::LogRecord> {
    records.into_iter().map(v1::LogRecord::from).collect()
}

/// Watches all tasks of a session. `known` is what the watcher has already.
pub(crate) fn session(supervised: Arc<Supervised>, known: HashMap<TaskId, Cursor>) -> Events {
    let (sender, events) = mpsc::channel(MESSAGES_COUNT_MAX);
    let watcher = SessionWatcher { supervised, cursors: known, sender, version: 0 };
    tokio::spawn(watcher.run());
    events
}

struct SessionWatcher {
    supervised: Arc<Supervised>,
    cursors: HashMap<TaskId, Cursor>,
    sender: Sender,
    version: u64,
}

impl SessionWatcher {
    async fn run(mut self) {
        let mut changes = self.supervised.changes();
        loop {
            changes.borrow_and_update();
            loop {
                let (changed, version) =
                    self.supervised.mirror().changed_since(self.version, TASKS_A_MESSAGE);
                self.version = version;
                if changed.is_empty() {
                    break;
                }
                for message in self.report(changed) {
                    if self.sender.send(message).await.is_err() {
                        return;
                    }
                }
            }
            self.forget_released();
            tokio::select! {
                changed = changes.changed() => if changed.is_err() { return },
                () = self.sender.closed() => return,
            }
        }
    }

    /// Events of tasks that have changed, in messages of bounded size.
    fn report(
        &mut self,
        changed: Vec<(TaskId, Arc<TaskView>)>,
    ) -> Vec<Result<v1::WatchTaskResponse, Status>> {
        let mut messages = Vec::new();
        let mut events = Vec::new();
        let mut bytes = 0;
        for (task, view) in changed {
            let mut cursor = self.cursors.get(&task).copied().unwrap_or_default();
            for event in self.events(task, &view, &mut cursor) {
                bytes += prost::Message::encoded_len(&event);
                events.push(event);
            }
            self.cursors.insert(task, cursor);
            if bytes >= EVENTS_BYTES_MAX {
                messages.push(Ok(v1::WatchTaskResponse { events: std::mem::take(&mut events) }));
                bytes = 0;
            }
        }
        if !events.is_empty() {
            messages.push(Ok(v1::WatchTaskResponse { events }));
        }
        messages
    }

    fn events(&self, task: TaskId, view: &TaskView, cursor: &mut Cursor) -> Vec<v1::TaskEvent> {
        let mut events = Vec::new();
        if cursor.ended {
            return events;
        }
        events.extend(progress(task, view, cursor));
        events.extend(self.log(task, view, cursor));
        if let Some(record) = &view.end {
            cursor.ended = true;
            events.push(end(&self.supervised, task, record));
        }
        events
    }

    /// Output within the budget of the task, then the word where the rest is to be had.
    ///
    /// Reads on this thread: at most 64 KiB that were written a moment ago, which costs less than handing the work to
    /// another thread and stands on the way of every short task.
    fn log(&self, task: TaskId, view: &TaskView, cursor: &mut Cursor) -> Vec<v1::TaskEvent> {
        if cursor.continues || view.spool_position <= cursor.position {
            return Vec::new();
        }
        let mut events = Vec::new();
        let budget = limits::LOG_INLINE_BYTES_MAX.saturating_sub(cursor.sent_bytes);
        let budget = usize::try_from(budget).unwrap_or(0);
        let read = SpoolReader::open(self.supervised.directory.spool(task))
            .and_then(|reader| reader.read(cursor.position, view.spool_position, budget));
        match read {
            Ok((found, next_position)) => {
                if !found.is_empty() {
                    cursor.sent_bytes += next_position.saturating_sub(cursor.position);
                    let chunk = v1::LogChunk { records: records(found), next_position };
                    events.push(event(task, Event::Log(chunk)));
                }
                cursor.position = cursor.position.max(next_position);
            }
            // Whoever asks for the rest by the task's number is told what is wrong with it.
            Err(error) => debug!(%task, %error, "output cannot be read"),
        }
        if cursor.position < view.spool_position {
            cursor.continues = true;
            events.push(event(task, Event::LogContinues(v1::LogContinues { position: cursor.position })));
        }
        events
    }

    /// Cursors of tasks that are gone would grow for ever.
    fn forget_released(&mut self) {
        let known = self.supervised.mirror().len();
        if self.cursors.len() > 2 * known + TASKS_A_MESSAGE {
            let alive: HashSet<TaskId> = self.supervised.mirror().iter().map(|(task, _)| task).collect();
            self.cursors.retain(|task, _| alive.contains(task));
        }
    }
}

/// Watches one task from `position`.
pub(crate) fn task(supervised: Arc<Supervised>, task: TaskId, position: u64) -> Events {
    let (sender, events) = mpsc::channel(MESSAGES_COUNT_MAX);
    let watcher = TaskWatcher { supervised, task, cursor: Cursor::at(position, false), sender };
    tokio::spawn(watcher.run());
    events
}

struct TaskWatcher {
    supervised: Arc<Supervised>,
    task: TaskId,
    cursor: Cursor,
    sender: Sender,
}

impl TaskWatcher {
    async fn run(mut self) {
        let mut changes = self.supervised.changes();
        let mut reader = None;
        loop {
            changes.borrow_and_update();
            let view = self.supervised.mirror().get(self.task).cloned();
            let Some(view) = view else {
                self.give_up(Status::not_found(format!("task {} was released", self.task))).await;
                return;
            };
            if let Some(progress) = progress(self.task, &view, &mut self.cursor)
                && !self.send(vec![progress]).await
            {
                return;
            }
            match self.log(&view, &mut reader).await {
                Ok(true) => {}
                Ok(false) => return,
                Err(error) => {
                    self.give_up(damaged(self.task, &error)).await;
                    return;
                }
            }
            if let Some(record) = &view.end {
                let end = end(&self.supervised, self.task, record);
                self.send(vec![end]).await;
                return;
            }
            tokio::select! {
                changed = changes.changed() => if changed.is_err() { return },
                () = self.sender.closed() => return,
            }
        }
    }

    /// Sends output as far as it may be read. False when the watcher has gone.
    async fn log(&mut self, view: &TaskView, reader: &mut Option<Arc<SpoolReader>>) -> io::Result<bool> {
        while self.cursor.position < view.spool_position {
            let reader = match reader {
                Some(reader) => Arc::clone(reader),
                None => {
                    let path = self.supervised.directory.spool(self.task);
                    let opened = blocking(move || SpoolReader::open(path)).await?;
                    Arc::clone(reader.insert(Arc::new(opened)))
                }
            };
            let (position, limit) = (self.cursor.position, view.spool_position);
            let read =
                blocking(move || reader.read(position, limit, limits::CHUNKS_MESSAGE_BYTES_MAX)).await?;
            let (found, next_position) = read;
            if found.is_empty() {
                // Less than a record is left, which the writer never announces.
                break;
            }
            self.cursor.position = next_position;
            let chunk = v1::LogChunk { records: records(found), next_position };
            if !self.send(vec![event(self.task, Event::Log(chunk))]).await {
                return Ok(false);
            }
        }
        Ok(true)
    }

    async fn send(&self, events: Vec<v1::TaskEvent>) -> bool {
        self.sender.send(Ok(v1::WatchTaskResponse { events })).await.is_ok()
    }

    async fn give_up(&self, status: Status) {
        // The watcher may have gone already.
        let _gone = self.sender.send(Err(status)).await;
    }
}

/// Runs what reads from disk where it may block.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}
