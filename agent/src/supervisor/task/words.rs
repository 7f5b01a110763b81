//! What a task's machine is told and what it orders. Pure.
//!
//! Events are facts, actions are orders. What follows from what is not written here.

use std::time::Duration;

use millstream_common::outcome::{ArchiveInfo, Exit, LeakedProcess, LogTotals, Reason, TaskEnd};

use crate::supervisor::reports::Report;

/// The signal that asks.
pub(crate) const TERMINATE: i32 = 15;
/// The signal that does not ask.
pub(crate) const KILL: i32 = 9;

/// Why something could not be begun.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Refusal {
    /// The fixed word.
    pub reason: Reason,
    /// What was attempted and what the system answered, in one sentence.
    pub detail: String,
}

/// Why the session is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SessionEnd {
    /// The controller was silent for longer than the lease.
    LeaseExpired,
    /// The controller closed it.
    Closed,
}

impl SessionEnd {
    pub(super) const fn reason(self) -> Reason {
        match self {
            Self::LeaseExpired => Reason::LeaseExpired,
            Self::Closed => Reason::SessionClosed,
        }
    }

    pub(super) const fn sentence(self) -> &'static str {
        match self {
            Self::LeaseExpired => "the controller was silent for longer than the lease",
            Self::Closed => "the controller closed the session",
        }
    }
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Event {
    /// The task is next in line: its files may be put in place.
    BecameNext,
    /// The task before it has ended.
    TurnCame,
    /// The files are in place.
    Prepared,
    /// The files could not be put in place.
    NotPrepared(Refusal),
    /// The controller lets a held task go.
    GoOrdered,
    /// The controller takes the task back.
    CancelOrdered,
    /// The controller ends the task.
    StopOrdered {
        /// Instead of the task's own grace period.
        grace: Option<Duration>,
        /// Whether the deadline of the whole test is why.
        deadline: bool,
    },
    /// The controller sends a signal to the running phase.
    SignalOrdered(i32),
    /// The task before it ended unexpectedly and the stream drains.
    Drained {
        /// Number and name of that task.
        after: String,
    },
    /// The session is over.
    SessionEnded(SessionEnd),
    /// The process of the ordered phase exists. A held one has not begun its program.
    PhaseStarted {
        /// Its number.
        pid: u32,
        /// Wall clock.
        wall_ns: u64,
    },
    /// A held process was let go.
    Went {
        /// Wall clock.
        wall_ns: u64,
    },
    /// The program of the ordered or running phase could not be started.
    PhaseNotStarted(Refusal),
    /// The process of the running phase has told something of phases of its own.
    PhaseReported(Report),
    /// The process of the running phase is gone.
    PhaseExited {
        /// How.
        exit: Exit,
        /// Whether memory ran out in the tree.
        out_of_memory: bool,
    },
    /// Nothing of the task's tree is left, or what is left cannot be ended; its output has been read.
    TreeEnded {
        /// Processes that had to be ended; the first few.
        leaked: Vec<LeakedProcess>,
        /// Number of all of them.
        leaked_count: u32,
        /// Those that could not be ended.
        survivors: u32,
        /// Wall clock.
        wall_ns: u64,
    },
    /// Log and results are complete on disk.
    Sealed(Box<Sealed>),
    /// The terminal record is written.
    Recorded,
    /// Time has passed.
    TimePassed,
}

/// What a task has left behind.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Sealed {
    /// What was printed.
    pub(crate) log: LogTotals,
    /// The results, if there are any.
    pub(crate) archive: Option<ArchiveInfo>,
    /// The last lines printed.
    pub(crate) last_lines: Vec<String>,
    /// What was left out of the results.
    pub(crate) skipped: Vec<String>,
    /// What went wrong while they were sealed, one sentence.
    pub(crate) trouble: Option<String>,
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Action {
    /// Make the directories and put the files in place.
    Prepare,
    /// Create the process of this phase; a held one waits before its program.
    StartPhase {
        /// Index of the phase in the specification.
        index: usize,
        /// Whether it is held.
        held: bool,
    },
    /// Let the held process begin its program.
    LetGo,
    /// Send a signal to the processes of the running phase.
    Signal(i32),
    /// End every process of the task, then read what is left of its output.
    EndTree,
    /// Complete log and results.
    Seal,
    /// Write the terminal record, then say so.
    Record(Box<TaskEnd>),
    /// Tell those who watch that state, phase or process changed.
    Announce,
}

/// Where a task is, in the words of the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Waits for the task before it.
    Queued,
    /// Its files are in place.
    Staged,
    /// A phase runs.
    Running,
    /// Its last phase has ended.
    Ending,
    /// It has a terminal record.
    Finished,
}
