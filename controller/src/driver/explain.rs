//! What a task does, or why it does not run, in one sentence. Reads everything and changes nothing.

use std::{sync::PoisonError, time::Duration};

use millstream_common::{
    id::TaskId,
    limits,
    text::{counted, printable, spoken},
};

use super::{Driver, LinkPhase, LinkState, StreamState, Work, cut::Cut};
use crate::{link::Sending, queue::Standing};

impl Driver {
    pub(super) fn explain(&self, task: TaskId) -> String {
        let Some(work) = self.works.get(&task) else { return "it is over".to_owned() };
        let name = self.name_of(work);
        let Some(state) = self.streams.get(&work.stream) else {
            return format!("{name} is not scheduled yet");
        };
        let place = &self.links[state.link].place;
        if !work.finishing
            && work.end.is_none()
            && let Standing::Behind { number } | Standing::BehindHeld { number } =
                state.queue.standing(work.shared.stream_number)
        {
            let before = state.tasks.get(&number).and_then(|task| Some((*task, self.works.get(task)?)));
            return match before {
                Some((before, of)) => format!(
                    "{name} waits for task {}, which {}",
                    of.shared.label(),
                    self.doing(before, of, state)
                ),
                None => format!("{name} is next on {place}"),
            };
        }
        format!("{name} {}", self.doing(task, work, state))
    }

    /// What a task does, as the rest of a sentence about it.
    fn doing(&self, task: TaskId, work: &Work, state: &StreamState) -> String {
        let link = &self.links[state.link];
        if work.finishing || work.end.is_some() {
            return "has ended; its output and results are being brought home".to_owned();
        }
        match state.queue.standing(work.shared.stream_number) {
            Standing::WaitsForHost => match self.together.awaited(state.link) {
                Some(other) if other != state.link => self.taking(link, &self.links[other]),
                _ => self.reaching(link),
            },
            Standing::Preparing => match &work.sending {
                Some(sending) => {
                    format!("is being prepared: {} to {}", sent(sending), link.place)
                }
                None => format!("is being prepared for {}", link.place),
            },
            Standing::Behind { number } | Standing::BehindHeld { number } => {
                format!("waits for {}", self.label_in(state, number))
            }
            Standing::Held => format!("is prepared on {} and was not started", link.place),
            Standing::Next => format!("is about to begin on {}", link.place),
            Standing::Running => self.running(task, work, link),
            Standing::Unknown => "is being ended".to_owned(),
        }
    }

    fn since(&self, begin: tokio::time::Instant) -> Duration {
        self.setup.world.clock.now().saturating_duration_since(begin)
    }

    /// Waits for a host that is taken together with its own.
    fn taking(&self, link: &LinkState, other: &LinkState) -> String {
        let other = self.reaching(other);
        let place = &link.place;
        if link.phase == LinkPhase::Idle {
            format!(
                "asks for {place} when another host that is taken together with it is had, and until then {other}"
            )
        } else {
            format!("has {place}, and as it is taken together with another host, {other}")
        }
    }

    /// Where the way to a host stands.
    fn reaching(&self, link: &LinkState) -> String {
        if let Some((since, why)) = &link.line {
            return format!(
                "waits in line for {} since {}, at most {}: {why}",
                link.place,
                spoken(self.since(*since)),
                spoken(link.wait)
            );
        }
        let mut text = match link.phase {
            LinkPhase::Suspended => {
                format!(
                    "waits until the connection to {}, lost {} ago, is back",
                    link.place,
                    spoken(self.since(link.since))
                )
            }
            LinkPhase::Opening => {
                format!(
                    "waits until {} is reached, which was begun {} ago",
                    link.place,
                    spoken(self.since(link.since))
                )
            }
            LinkPhase::Idle | LinkPhase::Up | LinkPhase::Closing | LinkPhase::Closed => {
                format!("waits for a session with {}", link.place)
            }
        };
        if let Some(trouble) = &link.trouble {
            text += &format!("; the last attempt failed: {trouble}");
        }
        text
    }

    fn running(&self, task: TaskId, work: &Work, link: &LinkState) -> String {
        let mut text = match (work.stopping, self.setup.sync.waiting(task), work.phase) {
            (Some(begin), _, _) => {
                let why = match work.cut {
                    Some(Cut::Deadline) => ", because the test has reached its deadline",
                    Some(Cut::FailFast) => ", because another task failed and this test fails fast",
                    Some(Cut::Closed) => ", because its stream is being closed",
                    None => "",
                };
                format!("was told to stop {} ago on {}{why}", spoken(self.since(begin)), link.place)
            }
            (None, Some(waiting), _) => waiting,
            (None, None, Some((phase, begin))) => {
                format!("runs its phase {phase} on {} for {}", link.place, spoken(self.since(begin)))
            }
            (None, None, None) => format!("runs on {}", link.place),
        };
        if link.phase == LinkPhase::Suspended {
            text += &format!("; the connection was lost {} ago", spoken(self.since(link.since)));
        }
        let log = work.shared.log.lock().unwrap_or_else(PoisonError::into_inner).upgrade();
        if let Some(line) = log.and_then(|log| log.last()) {
            let line = printable(line.text.as_bytes(), limits::LAST_LINE_BYTES_MAX);
            text += &format!("; its last line: `{line}`");
        }
        text
    }
}

/// How much of a task's files is on its host.
fn sent(sending: &Sending) -> String {
    let (files, bytes) = sending.so_far();
    format!(
        "{files} of {} and {} of {} are sent",
        counted(sending.files_count, "file"),
        sized(bytes),
        sized(sending.bytes)
    )
}

/// A size for people: `12.0 MiB`.
#[expect(clippy::cast_precision_loss, reason = "a figure for people")]
fn sized(bytes: u64) -> String {
    match bytes {
        0..1024 => format!("{bytes} bytes"),
        1024..1_048_576 => format!("{:.1} KiB", bytes as f64 / 1024.0),
        _ => format!("{:.1} MiB", bytes as f64 / 1_048_576.0),
    }
}
