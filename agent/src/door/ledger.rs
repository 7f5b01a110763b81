//! What is put on record and counted: who asked for what here, and what came of it.
//!
//! One call for each thing that happens; where records go is [`audit`]'s business, what is made of the counts
//! [`super::metrics`]'s. Holds no names beyond the record it writes, and no secret ever: of a task it takes its names, its
//! program and how it ended, never arguments, environment, files or output.

pub(crate) mod audit;
pub(crate) mod counts;
mod refused;

use std::{
    fmt,
    sync::{Arc, Mutex},
};

use millstream_common::{
    clock::Clock,
    convert,
    id::{SessionId, TaskId},
};
use tokio::sync::watch;

use self::{
    audit::{Audit, Record},
    counts::{Count, Counts},
};
use super::{
    identity::Caller,
    refusals::Refusals,
    supervisors::{Change, TaskView},
};
use crate::session::Drain;

/// How a session can end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SessionEnd {
    /// Its controller closed it.
    Closed,
    /// Its lease was over.
    Expired,
    /// Its supervisor died.
    Lost,
}

impl SessionEnd {
    fn word(self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::Expired => "expired",
            Self::Lost => "lost",
        }
    }
}

/// What a task that was accepted runs, for the record.
#[derive(Debug)]
pub(crate) struct Accepted<'a> {
    pub(crate) task: &'a str,
    pub(crate) stream: &'a str,
    pub(crate) block: &'a str,
    pub(crate) program: &'a str,
    pub(crate) user: &'a str,
}

/// All records and counts of one agent.
#[derive(Debug)]
pub(crate) struct Ledger {
    pub(crate) counts: Counts,
    pub(crate) audit: Audit,
    host: String,
    clock: Arc<dyn Clock>,
    /// Which refusals are told.
    refusals: Mutex<Refusals>,
    /// Grows with each thing that operators see.
    version: watch::Sender<u64>,
}

impl Ledger {
    /// An empty ledger of this host.
    pub(crate) fn new(audit: Audit, host: String, clock: Arc<dyn Clock>) -> Arc<Self> {
        Arc::new(Self {
            counts: Counts::default(),
            audit,
            host,
            clock,
            refusals: Mutex::default(),
            version: watch::Sender::new(0),
        })
    }

    /// For tests that look elsewhere.
    #[cfg(test)]
    pub(crate) fn of_a_test() -> Arc<Self> {
        let audit = Audit::open(None).expect("nothing is opened");
        Self::new(audit, "a host".to_owned(), Arc::new(millstream_common::clock::SystemClock))
    }

    /// Wakes when something that operators see has changed.
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.version.subscribe()
    }

    /// Something that operators see has changed.
    pub(crate) fn changed(&self) {
        self.version.send_modify(|version| *version += 1);
    }

    fn record(&self, event: &'static str) -> Record {
        Record::new(event, convert::timestamp(self.clock.wall_ns()).to_string()).with("host", &self.host)
    }

    /// One session's page.
    pub(crate) fn page(
        self: &Arc<Self>,
        session_id: SessionId,
        owner: impl fmt::Display,
        client: &str,
    ) -> Page {
        let (session, owner, client) = (session_id.to_string(), owner.to_string(), client.to_owned());
        Page { ledger: Arc::clone(self), session, owner, client }
    }

    /// Somebody has drained the host.
    pub(crate) fn drained(&self, drain: &Drain) {
        self.audit.put(self.record("host.drained").with("owner", &drain.by).with("reason", &drain.reason));
    }

    /// Somebody has taken that back.
    pub(crate) fn undrained(&self, caller: &Caller) {
        self.audit.put(self.record("host.undrained").with("owner", caller));
    }

    /// Somebody has cleaned the host up.
    pub(crate) fn cleaned(&self, caller: &Caller, force: bool, left: usize) {
        let record = self.record("host.cleaned").with("owner", caller).with("force", force);
        self.audit.put(record.with("survivors", left));
    }
}

/// One session's page of the ledger: everything on it is in the name of its owner.
#[derive(Debug, Clone)]
pub(crate) struct Page {
    ledger: Arc<Ledger>,
    session: String,
    owner: String,
    client: String,
}

impl Page {
    fn record(&self, event: &'static str) -> Record {
        let record = self.ledger.record(event).with("owner", &self.owner).with("client", &self.client);
        record.with("session", &self.session)
    }

    /// The session was opened, or its controller came back to it.
    pub(crate) fn opened(&self, resumed: bool, exclusive: bool) {
        if !resumed {
            self.ledger.counts.add(Count::SessionsOpened, "");
        }
        let event = if resumed { "session.resumed" } else { "session.opened" };
        self.ledger.audit.put(self.record(event).with("exclusive", exclusive));
    }

    /// The session is over.
    pub(crate) fn ended(&self, how: SessionEnd) {
        self.ledger.counts.add(Count::SessionsEnded, how.word());
        self.ledger.audit.put(self.record("session.ended").with("outcome", how.word()));
    }

    /// Something of the session could not be ended.
    pub(crate) fn left_behind(&self, what: &str) {
        self.ledger.audit.put(self.record("session.left_behind").with("detail", what));
    }

    /// A task was taken in.
    pub(crate) fn task_accepted(&self, task: &Accepted<'_>) {
        self.ledger.counts.add(Count::TasksAccepted, "");
        if !self.ledger.audit.is_wanted() {
            return;
        }
        let record = self.record("task.accepted").with("task", task.task).with("stream", task.stream);
        let record = record.with("block", task.block).with("program", task.program);
        self.ledger.audit.put(record.with("user", task.user));
    }

    /// What is known of a task has changed.
    pub(crate) fn took_over(&self, task: TaskId, change: &Change) {
        self.ledger.counts.logged(change.logged_bytes);
        if let Some(view) = &change.ended {
            self.task_ended(task, view);
        }
        self.ledger.changed();
    }

    /// A task has its terminal record.
    fn task_ended(&self, task: TaskId, view: &TaskView) {
        let Some(end) = &view.end else { return };
        let outcome = counts::outcome_word(end.outcome());
        self.ledger.counts.add(Count::TasksEnded, outcome);
        if !self.ledger.audit.is_wanted() {
            return;
        }
        let mut record = self.record("task.ended").with("task", task).with("stream", &view.stream);
        record = record.with("block", &view.block).with("outcome", outcome);
        let reason = convert::reason_in("reason", end.reason).map_or("", |reason| reason.word());
        record = record.with("reason", reason);
        if let Some(code) = end.exit_code {
            record = record.with("exit_code", code);
        }
        if let Some(signal) = end.signal {
            record = record.with("signal", signal);
        }
        for (name, time) in [("start_time", &end.start_time), ("end_time", &end.end_time)] {
            if let Some(time) = time {
                record = record.with(name, time);
            }
        }
        self.ledger.audit.put(record.with("logged_bytes", view.logged_bytes));
    }
}
