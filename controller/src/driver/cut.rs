//! What ends tasks from outside: the deadline of the test, the first failure in a test that fails fast, and the closing of
//! their stream.

use millstream_common::{
    id::TaskId,
    outcome::{OutcomeKind, Reason, TaskEnd},
    text::spoken,
};
use tracing::{info, warn};

use super::{DEADLINE_GRACE, Driver, Work};
use crate::{outcome::CausedBy, queue::Event};

/// Why a task is ended from outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cut {
    /// The test has reached its deadline.
    Deadline,
    /// Another task ended unexpectedly, and the test fails fast.
    FailFast,
    /// Its stream was closed.
    Closed,
}

impl Driver {
    /// Why a task that is scheduled on a stream now does not begin.
    pub(super) fn cut(&self, stream: usize) -> Option<Cut> {
        if self.deadline_passed {
            Some(Cut::Deadline)
        } else if self.first_failure.is_some() {
            Some(Cut::FailFast)
        } else {
            self.retired.contains_key(&stream).then_some(Cut::Closed)
        }
    }

    pub(super) fn deadline_text(&self) -> String {
        let limit = spoken(self.setup.deadline);
        format!("the test reached its deadline of {limit}: give it more with `deadline`")
    }

    fn fail_fast_text(&self) -> String {
        let culprit = self.first_failure.as_ref().map_or("another task", |(cause, _)| cause.task.as_str());
        let fate = self.first_failure.as_ref().map_or("failed", |(_, fate)| fate.as_str());
        format!("{culprit} {fate}, and this test fails fast")
    }

    /// The record of a task that was cut before it began.
    pub(super) fn never_begun(&self, cut: Cut) -> TaskEnd {
        match cut {
            Cut::Deadline => {
                TaskEnd::never_begun(OutcomeKind::Error, Reason::TestDeadline, self.deadline_text())
            }
            Cut::FailFast => {
                TaskEnd::never_begun(OutcomeKind::Cancelled, Reason::FailFast, self.fail_fast_text())
            }
            Cut::Closed => {
                let detail = "its stream was closed before it began";
                TaskEnd::never_begun(OutcomeKind::Cancelled, Reason::SessionClosed, detail)
            }
        }
    }

    /// A task was scheduled too late to begin.
    pub(super) fn cut_before_it_began(&mut self, task: TaskId, cut: Cut) {
        if let Some(work) = self.works.get_mut(&task) {
            work.cut = Some(cut);
        }
        let end = self.never_begun(cut);
        self.complete(task, end, None);
    }

    pub(super) fn pass_deadline(&mut self) {
        if self.deadline_passed {
            // What did not end within its grace is not waited for: closing the sessions ends it.
            warn!("tasks did not end in time after the deadline of the test");
            self.close();
            return;
        }
        warn!("{}", self.deadline_text());
        self.deadline_passed = true;
        self.deadline = self.setup.world.clock.now() + DEADLINE_GRACE;
        self.end_tasks(Cut::Deadline, |_| true);
    }

    /// A task ended unexpectedly: the first one ends all others in a test that fails fast.
    pub(super) fn note_failure(&mut self, task: TaskId, fate: &str) {
        let over = self.closing || self.deadline_passed || self.first_failure.is_some();
        if self.setup.fails_fast
            && !over
            && let Some(work) = self.works.get(&task)
        {
            self.first_failure = Some((CausedBy::new(task, work.path()), fate.to_owned()));
        }
    }

    /// Ends what is left after the first failure, once. Called between inputs, never from within a queue's own actions.
    pub(super) fn fail_fast(&mut self) {
        if self.first_failure.is_some() && !self.failed_fast && !self.deadline_passed {
            self.failed_fast = true;
            info!("{}", self.fail_fast_text());
            self.debug_line(&self.fail_fast_text());
            self.end_tasks(Cut::FailFast, |_| true);
        }
    }

    /// Ends those tasks that are meant.
    pub(super) fn end_tasks(&mut self, cut: Cut, meant: impl Fn(&Work) -> bool) {
        let now = self.setup.world.clock.now();
        let mut tasks: Vec<(u32, TaskId)> = self
            .works
            .iter()
            // What ends or is being ended on request keeps its own reason; a deadline spares nobody.
            .filter(|(_, work)| {
                meant(work) && !work.told && (cut == Cut::Deadline || work.stopping.is_none())
            })
            .map(|(&task, work)| (work.shared.test_number, task))
            .collect();
        // The last first, so that none of them moves up meanwhile.
        tasks.sort_unstable_by(|a, b| b.cmp(a));
        for (_, task) in tasks {
            if let Some(work) = self.works.get_mut(&task) {
                work.cut = Some(cut);
                work.stopping.get_or_insert(now);
            }
            self.wish(task, |number| Event::StopAsked { number });
        }
    }

    /// What a host says of a task that was cut, in the words of who cut it, and whose fault it was.
    pub(super) fn settle_cause(&mut self, task: TaskId, end: &mut TaskEnd) {
        let Some(work) = self.works.get(&task) else { return };
        let told_to_end = matches!(end.reason, Reason::Stopped | Reason::Cancelled);
        if end.reason == Reason::TestDeadline && end.outcome != OutcomeKind::Error {
            // A stop that the test's user asked for is no failure; this one is.
            end.outcome = OutcomeKind::TimedOut;
        }
        if work.cut == Some(Cut::FailFast) && told_to_end {
            end.reason = Reason::FailFast;
            end.detail = self.fail_fast_text();
        }
        if work.cut == Some(Cut::Closed) && told_to_end {
            end.reason = Reason::SessionClosed;
        }
        let cause = match end.reason {
            Reason::FailFast => self.first_failure.as_ref().map(|(cause, _)| cause.clone()),
            Reason::Drained => self.streams.get(&work.stream).and_then(|state| state.drained_by.clone()),
            _ => return,
        };
        if let Some(work) = self.works.get_mut(&task) {
            work.caused_by = cause;
        }
    }
}
