//! What really happened on the simulated hosts, written down by the scripts themselves: the judge of every promise.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard},
};

use millstream_common::id::TaskId;

/// How a meeting ended for one party.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verdict {
    Released { arrival: u32 },
    Broken(String),
}

/// What one task did.
#[derive(Debug, Default)]
pub(crate) struct Life {
    pub(crate) stream: String,
    /// Times its program began.
    pub(crate) begun: u32,
    /// Whether the program came to its last step.
    pub(crate) completed: bool,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: Vec<u8>,
    /// By name of the barrier.
    pub(crate) meetings: Vec<(String, Verdict)>,
}

/// What happened to a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Event {
    Began(TaskId),
    Ended(TaskId),
}

#[derive(Debug, Default)]
pub(crate) struct Book {
    pub(crate) lives: BTreeMap<TaskId, Life>,
    /// What happened on each stream, in order.
    pub(crate) order: BTreeMap<String, Vec<Event>>,
    /// Programs that run now.
    pub(crate) running: usize,
}

/// Shared by all scripts of a simulation.
#[derive(Debug, Clone, Default)]
pub(crate) struct Ledger(Arc<Mutex<Book>>);

impl Ledger {
    pub(crate) fn open(&self) -> MutexGuard<'_, Book> {
        self.0.lock().unwrap()
    }

    /// A program begins; it has ended when the answer is dropped.
    pub(crate) fn begins(&self, task: TaskId, stream: &str) -> Running {
        let mut book = self.open();
        book.running += 1;
        let life = book.lives.entry(task).or_default();
        life.begun += 1;
        stream.clone_into(&mut life.stream);
        book.order.entry(stream.to_owned()).or_default().push(Event::Began(task));
        Running { ledger: self.clone(), task, stream: stream.to_owned() }
    }
}

/// A program that runs.
#[derive(Debug)]
pub(crate) struct Running {
    ledger: Ledger,
    task: TaskId,
    stream: String,
}

impl Running {
    pub(crate) fn note(&self, what: impl FnOnce(&mut Life)) {
        what(self.ledger.open().lives.entry(self.task).or_default());
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let mut book = self.ledger.open();
        book.running -= 1;
        book.order.entry(self.stream.clone()).or_default().push(Event::Ended(self.task));
    }
}
