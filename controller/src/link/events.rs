//! What happens to the tasks of a session, as the host tells it: progress, output, ends.
//!
//! Output and small archives go to the tasks' recorders, everything else to the driver; what is large is left to the bulk
//! connection. Positions are kept, so that after a break nothing is missed and nothing is taken in twice.

use millstream_common::{
    convert,
    id::TaskId,
    outcome::{Phase, TaskEnd},
};
use millstream_proto::v1;

use super::{Break, Connection, Report, Reports, Shared, broken, lock};
use crate::driver::scribe::Recorder;

/// A part of a task that does not come with the session's events.
#[derive(Debug)]
pub(super) enum Wanted {
    /// The rest of its log.
    Log { task: TaskId },
    /// Its archive.
    Archive { task: TaskId },
}

/// Reads the events of all tasks of the session.
pub(super) async fn watch_session(connection: Connection, shared: Shared, reports: Reports) -> Break {
    let known = lock(&shared.progress)
        .iter()
        .map(|(task, incoming)| v1::TaskPosition {
            task_id: task.to_string(),
            position: incoming.position,
            ended: incoming.end.is_some(),
        })
        .collect();
    let request = v1::WatchTaskRequest {
        session: Some(connection.session.key()),
        task_id: String::new(),
        position: 0,
        known,
    };
    let mut control = connection.control.clone();
    let mut events = match control.watch_task(request).await {
        Ok(response) => response.into_inner(),
        Err(status) => return broken(&status),
    };
    loop {
        match events.message().await {
            Ok(Some(message)) => {
                for event in message.events {
                    if let Err(why) = take_event(event, &shared, &reports).await {
                        return Break::Connection(why);
                    }
                }
            }
            Ok(None) => return Break::Connection("the agent ended the session's events".to_owned()),
            Err(status) => return broken(&status),
        }
    }
}

/// Takes in one event of one task. An error is a peer that does not keep to the protocol.
pub(super) async fn take_event(
    event: v1::TaskEvent,
    shared: &Shared,
    reports: &Reports,
) -> Result<(), String> {
    use v1::task_event::Event;
    let task: TaskId = convert::id_in("task_id", &event.task_id).map_err(|error| error.to_string())?;
    // Tasks that were released may still have a last word under way.
    let Some(recorder) = lock(&shared.progress).get(&task).map(|incoming| incoming.recorder.clone()) else {
        return Ok(());
    };
    match event.event {
        None => Ok(()),
        Some(Event::Progress(progress)) => {
            let time_ns = progress.time.as_ref().map_or(0, convert::timestamp_ns);
            match progress.state() {
                v1::TaskState::Staged => reports(Report::Staged { task }).await,
                v1::TaskState::Running => {
                    let phase = match progress.phase() {
                        v1::Phase::Unspecified => None,
                        v1::Phase::Setup => Some(Phase::Setup),
                        v1::Phase::Run => Some(Phase::Run),
                        v1::Phase::Teardown => Some(Phase::Teardown),
                    };
                    reports(Report::Began { task, phase, time_ns }).await;
                }
                _ => {}
            }
            Ok(())
        }
        Some(Event::Log(chunk)) => {
            // The rest of a long log comes on the bulk connection, whatever is repeated here.
            if lock(&shared.progress).get(&task).is_none_or(|incoming| incoming.in_bulk) {
                return Ok(());
            }
            let next = chunk.next_position;
            record(&recorder, chunk).await?;
            if let Some(incoming) = lock(&shared.progress).get_mut(&task) {
                incoming.position = next;
            }
            Ok(())
        }
        Some(Event::LogContinues(from)) => {
            let begin = match lock(&shared.progress).get_mut(&task) {
                Some(incoming) if !incoming.in_bulk => {
                    incoming.in_bulk = true;
                    incoming.position = from.position;
                    true
                }
                _ => false,
            };
            if begin {
                want(shared, Wanted::Log { task });
            }
            Ok(())
        }
        Some(Event::End(end)) => {
            let end = TaskEnd::try_from(end).map_err(|error| error.to_string())?;
            take_end(task, end, shared, reports).await;
            Ok(())
        }
    }
}

pub(super) async fn take_end(task: TaskId, end: TaskEnd, shared: &Shared, reports: &Reports) {
    let end = Box::new(end);
    let archive = end.archive.clone();
    let is_inline = |size: u64, length: usize| u64::try_from(length).is_ok_and(|length| length == size);
    let fetched = archive.as_ref().filter(|info| !is_inline(info.size_bytes, info.inline.len()));
    let recorder = {
        let mut progress = lock(&shared.progress);
        let Some(incoming) = progress.get_mut(&task) else { return };
        if incoming.end.is_some() {
            return;
        }
        incoming.end = Some(end.clone());
        incoming.log_arrived |= !incoming.in_bulk;
        incoming.archive_arrived = fetched.is_none();
        incoming.recorder.clone()
    };
    reports(Report::Ended { task, end }).await;
    if fetched.is_some() {
        want(shared, Wanted::Archive { task });
    } else if let Some(info) = archive {
        recorder.archive_whole(info.size_bytes, &info.sha256, info.inline);
    }
    settle(task, shared, reports).await;
}

/// Asks for what comes on the bulk connection. Waits for nothing: whoever is dropped at a wait loses what it had in hand.
fn want(shared: &Shared, wanted: Wanted) {
    // It is never closed: it lives as long as the session.
    let _put = shared.wanted.put(wanted);
}

/// Reports a task as arrived once its end is known and both its log and its archive are here.
pub(super) async fn settle(task: TaskId, shared: &Shared, reports: &Reports) {
    let problem = {
        let mut progress = lock(&shared.progress);
        let Some(incoming) = progress.get_mut(&task) else { return };
        let complete = incoming.end.is_some() && incoming.log_arrived && incoming.archive_arrived;
        if !complete || incoming.reported {
            return;
        }
        incoming.reported = true;
        incoming.problem.take()
    };
    reports(Report::Arrived { task, problem }).await;
}

/// Hands records to a task's recorder.
pub(super) async fn record(recorder: &Recorder, chunk: v1::LogChunk) -> Result<(), String> {
    let records: Result<Vec<_>, _> = chunk.records.into_iter().map(TryInto::try_into).collect();
    recorder.records(records.map_err(|error: convert::ConvertError| error.to_string())?).await;
    Ok(())
}
