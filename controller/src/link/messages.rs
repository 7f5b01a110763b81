//! What a driver and a link say to each other.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use millstream_common::{
    id::TaskId,
    limits,
    outcome::{Phase, Reason, TaskEnd},
};
use millstream_proto::v1;

use super::Holdings;
use crate::{block::compile::Upload, driver::scribe::Recorder, results::timeline::HostClock};

/// What the driver wants of a link.
#[derive(Debug)]
pub(crate) enum Order {
    /// Open a session, unless one is open or being opened.
    Connect,
    /// Bring these blobs to the host if it lacks them.
    Upload { task: TaskId, uploads: Vec<Upload>, sending: Arc<Sending> },
    /// Hand a task over.
    Put(Box<Put>),
    /// Act on a task.
    Signal { task: TaskId, kind: v1::SignalKind, grace: Option<Duration>, reason: Option<Reason> },
    /// Everything of these tasks is here: the host may forget them.
    Release { task: TaskId },
    /// Close the session, and end `for_good`. Otherwise the link rests until it is told to connect again, which it is told
    /// only after it has said that the session is closed.
    Close { for_good: bool },
}

/// How much of a task's files has come to its host: for people who ask while they are under way.
#[derive(Debug)]
pub(crate) struct Sending {
    /// Number of files.
    pub(crate) files_count: usize,
    /// Their length together.
    pub(crate) bytes: u64,
    files_there: AtomicUsize,
    bytes_there: AtomicU64,
}

impl Sending {
    pub(crate) fn of(uploads: &[Upload]) -> Self {
        Self {
            files_count: uploads.len(),
            bytes: uploads.iter().map(|upload| upload.size_bytes).sum(),
            files_there: AtomicUsize::new(0),
            bytes_there: AtomicU64::new(0),
        }
    }

    /// A piece of a file was sent.
    pub(crate) fn piece(&self, length: usize) {
        self.bytes_there.fetch_add(u64::try_from(length).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// A file is there; `unsent` bytes of it did not have to be sent.
    pub(crate) fn arrived(&self, unsent: u64) {
        self.files_there.fetch_add(1, Ordering::Relaxed);
        self.bytes_there.fetch_add(unsent, Ordering::Relaxed);
    }

    /// Files and bytes that are there, at most as many as there are: a file that is sent again counts once.
    pub(crate) fn so_far(&self) -> (usize, u64) {
        let bytes = self.bytes_there.load(Ordering::Relaxed);
        (self.files_there.load(Ordering::Relaxed), bytes.min(self.bytes))
    }
}

/// A task to be handed over.
#[derive(Debug)]
pub(crate) struct Put {
    pub(crate) task: TaskId,
    /// All but the session's key.
    pub(crate) request: v1::StartTaskRequest,
    /// Where its output goes.
    pub(crate) recorder: Recorder,
}

/// What a link tells the driver.
#[derive(Debug)]
pub(crate) enum Report {
    /// A new session is open.
    Opened(Box<Opened>),
    /// The connection broke; coming back is being tried.
    Suspended,
    /// The connection and the session are back.
    Resumed,
    /// No session: it could not be opened, or it is over.
    Lost { why: String, reason: Reason },
    /// An attempt to reach the host failed, and is made again.
    AttemptFailed { why: String },
    /// Others have the host, and this test waits in line. `why` says who has it and how many are before.
    InLine { why: String },
    /// The clock of the host was measured.
    Clock(HostClock),
    /// The blobs are there, or cannot be.
    Uploaded { task: TaskId, result: Result<(), String> },
    /// The host has taken the task.
    Accepted { task: TaskId },
    /// The host does not take the task.
    Rejected { task: TaskId, reason: Reason, why: String },
    /// The task is prepared and, if it is held, waits.
    Staged { task: TaskId },
    /// A phase began.
    Began { task: TaskId, phase: Option<Phase>, time_ns: u64 },
    /// How the task ended; its output and results may still be under way.
    Ended { task: TaskId, end: Box<TaskEnd> },
    /// All output and results of an ended task were handed to its recorder, or cannot be had.
    Arrived { task: TaskId, problem: Option<String> },
    /// The session is closed, or could not be closed in time; `for_good` the link has ended.
    Closed { left_behind: Vec<String>, for_good: bool },
}

/// What opening a session found.
#[derive(Debug, Clone, Default)]
pub(crate) struct Opened {
    pub(crate) version: String,
    pub(crate) host: v1::HostFacts,
    pub(crate) capabilities: v1::Capabilities,
    pub(crate) clock: HostClock,
}

/// What a link needs to know from its beginning.
#[derive(Debug, Clone)]
pub(crate) struct LinkOptions {
    pub(crate) lease: Duration,
    pub(crate) exclusive: bool,
    /// How long it waits in line for a host that others have.
    pub(crate) wait: Duration,
    /// Whether a block of another test asks. That test waits for the block, and may itself be in the way of whom it waits for: so it
    /// waits for a moment only, whatever it is told.
    pub(crate) in_block: bool,
    /// The hosts that the test holds.
    pub(crate) holdings: Arc<Holdings>,
    /// What the controller calls itself, for people.
    pub(crate) client: String,
}

impl LinkOptions {
    /// The same for a host of which it is said how long to wait, and whether it is to be reserved.
    pub(crate) fn of_host(&self, wait: Option<Duration>, exclusive: bool) -> Self {
        let wait = wait.unwrap_or(self.wait);
        let wait = if self.in_block { wait.min(limits::REACH_MAX) } else { wait };
        Self { exclusive, wait, ..self.clone() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_never_waits_long_whatever_a_definition_says() {
        let of = |in_block, said| {
            let wait = limits::LINE_WAIT;
            let (lease, holdings, client) = (limits::LEASE, Arc::default(), String::new());
            LinkOptions { lease, exclusive: false, wait, in_block, holdings, client }
                .of_host(said, false)
                .wait
        };
        let (hour, moment) = (Duration::from_secs(3600), Duration::from_secs(1));
        assert_eq!([of(false, None), of(false, Some(hour))], [limits::LINE_WAIT, hour]);
        let block = [of(true, None), of(true, Some(hour)), of(true, Some(moment))];
        assert_eq!(block, [limits::REACH_MAX, limits::REACH_MAX, moment]);
    }
}
