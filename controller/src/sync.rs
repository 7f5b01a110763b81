//! Barriers and topics, hosted for blocks, for main and for people.
//!
//! The pure rooms decide ([`barrier`], [`topic`], [`hopeless`], [`board`]); [`host`] holds the one board of a scope and
//! wakes who waits; [`service`] and [`relay`] are its two doors. Nothing here schedules a task or knows where one runs.

use std::{fmt, sync::Arc};

use millstream_common::id::TaskId;

pub mod barrier;
pub mod board;
pub mod hopeless;
pub mod host;
pub mod port;
pub mod relay;
pub mod service;
pub mod story;
pub mod topic;

/// One call that waits or asks: given by the host, never used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CallId(pub u64);

/// Who speaks. Told by the door the call came through, never by the caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Speaker {
    /// A block: its agent vouches for it.
    Task(TaskId),
    /// The test's own thread of control.
    Main,
    /// A person on the debugging port. Everything done so is marked in the results.
    ByHand,
}

/// Who broke a barrier.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Culprit {
    /// Who it was.
    pub speaker: Speaker,
    /// What it is called, such as `server/1-netserver`, `main` or `by hand`.
    pub label: Arc<str>,
}

impl Culprit {
    /// The task, when it was one.
    #[must_use]
    pub fn task(&self) -> Option<TaskId> {
        match self.speaker {
            Speaker::Task(task) => Some(task),
            Speaker::Main | Speaker::ByHand => None,
        }
    }
}

impl fmt::Display for Culprit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.label)
    }
}

/// Why a call is refused, before anything has changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Something in the request cannot be.
    #[error("{field} {problem}")]
    Invalid {
        /// The field.
        field: &'static str,
        /// What is wrong with it, and what would be right.
        problem: String,
    },
    /// The token belongs to somebody else.
    #[error(
        "party token `{token}` of barrier `{barrier}` belongs to {owner}: make a new token for each entry"
    )]
    TokenTaken {
        /// The token.
        token: String,
        /// The barrier.
        barrier: String,
        /// Whose it is.
        owner: String,
    },
    /// Something is full.
    #[error("{what}: at most {limit} are allowed")]
    Full {
        /// What was exceeded, and where.
        what: String,
        /// The bound, with its unit.
        limit: String,
    },
    /// Blocks may not do that.
    #[error("only main or a person may {what}: a block may not")]
    NotForBlocks {
        /// What was asked.
        what: &'static str,
    },
    /// The speaker is over.
    #[error(
        "task {task} is not one of this test's unfinished tasks: it has no part in barriers and topics any more"
    )]
    NotATask {
        /// The task.
        task: TaskId,
    },
    /// A newer call has taken this one's place.
    #[error("the same party has come again with the same token: this older call is over")]
    Superseded,
}
