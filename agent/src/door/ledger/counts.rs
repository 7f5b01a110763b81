//! Numbers that only grow, each with at most one label whose values are words of this program: their number is bounded by
//! construction, whatever peers send.

use std::{
    collections::BTreeMap,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use millstream_proto::v1;

use crate::session::OpenRefusal;

/// What is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Count {
    PeersRefused,
    CallsRefused,
    SessionsOpened,
    SessionsRefused,
    SessionsEnded,
    TasksAccepted,
    TasksRefused,
    TasksEnded,
}

/// All counts of one agent.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    by_word: Mutex<BTreeMap<(Count, &'static str), u64>>,
    logged_bytes: AtomicU64,
}

impl Counts {
    /// One more.
    pub(crate) fn add(&self, count: Count, word: &'static str) {
        let mut by_word = self.by_word.lock().unwrap_or_else(PoisonError::into_inner);
        *by_word.entry((count, word)).or_default() += 1;
    }

    /// So many with this word.
    pub(crate) fn of(&self, count: Count, word: &'static str) -> u64 {
        let by_word = self.by_word.lock().unwrap_or_else(PoisonError::into_inner);
        by_word.get(&(count, word)).copied().unwrap_or(0)
    }

    /// Tasks have printed this much more.
    pub(crate) fn logged(&self, bytes: u64) {
        self.logged_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Bytes that tasks have printed.
    pub(crate) fn logged_bytes(&self) -> u64 {
        self.logged_bytes.load(Ordering::Relaxed)
    }
}

/// Words of [`Count::PeersRefused`].
pub(crate) const PEER_REFUSALS: &[&str] =
    &["broken", "handshake", "identity", "no_credentials", "not_http2", "not_taken", "too_many", "too_slow"];
/// Words of [`Count::CallsRefused`].
pub(crate) const CALL_REFUSALS: &[&str] =
    &["keeper", "no_such_call", "not_yours", "reader", "role", "unknown"];
/// Words of [`Count::TasksRefused`].
pub(crate) const TASK_REFUSALS: &[&str] = &["share_used_up"];
/// Words of [`Count::SessionsEnded`].
pub(crate) const SESSION_ENDS: &[&str] = &["closed", "expired", "lost"];
/// Words of [`Count::SessionsRefused`].
pub(crate) const SESSION_REFUSALS: &[&str] = &[
    "draining",
    "ended",
    "not_yours",
    "share_used_up",
    "superseded",
    "too_many",
    "unclean",
    "unknown",
    VERSION_REFUSAL,
];
/// Of [`SESSION_REFUSALS`]: the controller and this agent speak no common protocol, or one lacks what the other needs.
pub(crate) const VERSION_REFUSAL: &str = "version";

/// Why a session was not given, in one word. None: it may still be, its asking is in line.
pub(crate) fn refusal_word(refusal: &OpenRefusal) -> Option<&'static str> {
    Some(match refusal {
        OpenRefusal::NotYours => "not_yours",
        OpenRefusal::Over(_) => "ended",
        OpenRefusal::Unknown => "unknown",
        OpenRefusal::Draining { .. } => "draining",
        OpenRefusal::Unclean { .. } => "unclean",
        OpenRefusal::TooMany { .. } => "too_many",
        OpenRefusal::ShareUsedUp { .. } => "share_used_up",
        OpenRefusal::Superseded => "superseded",
        OpenRefusal::Reserved { .. } => return None,
    })
}

/// Every outcome that there is.
pub(crate) fn outcomes() -> impl Iterator<Item = &'static str> {
    (1..).map_while(|number| v1::OutcomeKind::try_from(number).ok()).map(outcome_word)
}

/// An outcome in one word. Labels are texts of this program, so each is written out.
pub(crate) fn outcome_word(outcome: v1::OutcomeKind) -> &'static str {
    match outcome {
        v1::OutcomeKind::Unspecified => "unspecified",
        v1::OutcomeKind::Passed => "passed",
        v1::OutcomeKind::Failed => "failed",
        v1::OutcomeKind::Killed => "killed",
        v1::OutcomeKind::TimedOut => "timed_out",
        v1::OutcomeKind::Cancelled => "cancelled",
        v1::OutcomeKind::Stopped => "stopped",
        v1::OutcomeKind::Error => "error",
        v1::OutcomeKind::Lost => "lost",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_never_counted_is_zero() {
        let counts = Counts::default();
        counts.add(Count::TasksEnded, "passed");
        counts.add(Count::TasksEnded, "passed");
        assert_eq!((counts.of(Count::TasksEnded, "passed"), counts.of(Count::TasksEnded, "lost")), (2, 0));
    }

    #[test]
    fn every_outcome_has_its_word() {
        let words: Vec<_> = outcomes().collect();
        assert_eq!(words.len(), 8);
        assert!(words.contains(&"timed_out") && !words.contains(&"unspecified"));
    }
}
