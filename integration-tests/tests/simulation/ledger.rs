//! What really happened on the simulated hosts, written down by the scripts themselves: the judge of every promise.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard},
};

use millstream::Phase;
use millstream_common::id::TaskId;

/// How a meeting ended for one party.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verdict {
    Released { arrival: u32 },
    Broken(String),
}

/// Whose program it is that runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Part {
    /// Which of the tests that come one after the other, from 0.
    pub(crate) test: u32,
    pub(crate) stream: String,
    pub(crate) task: TaskId,
    pub(crate) phase: Phase,
}

/// What one task did.
#[derive(Debug, Default)]
pub(crate) struct Life {
    pub(crate) test: u32,
    /// Times that the program of a phase began.
    pub(crate) begun: BTreeMap<Phase, u32>,
    /// How the programs ended that came to an end by themselves.
    pub(crate) exits: BTreeMap<Phase, i32>,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: Vec<u8>,
    /// By name of the barrier.
    pub(crate) meetings: Vec<(String, Verdict)>,
    /// Files that it left, by name.
    pub(crate) files: BTreeMap<String, Vec<u8>>,
    /// Topic and value, and the index that was told, if an answer came.
    pub(crate) published: Vec<(String, String, Option<u64>)>,
    /// Topic and values from the first on, each time that it read them.
    pub(crate) heard: Vec<(String, Vec<String>)>,
    /// What it was told when it did not get the values that it waited for.
    pub(crate) unheard: Vec<String>,
}

/// A program began or ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Event {
    pub(crate) part: Part,
    pub(crate) began: bool,
}

#[derive(Debug, Default)]
pub(crate) struct Book {
    pub(crate) lives: BTreeMap<TaskId, Life>,
    /// Everything that began and ended, in order.
    pub(crate) events: Vec<Event>,
    /// Programs that run now.
    pub(crate) running: usize,
    /// What must not happen and did, where nobody hears a panic.
    pub(crate) troubles: Vec<String>,
}

/// Shared by all scripts of a simulation.
#[derive(Debug, Clone, Default)]
pub(crate) struct Ledger(Arc<Mutex<Book>>);

impl Ledger {
    pub(crate) fn open(&self) -> MutexGuard<'_, Book> {
        self.0.lock().unwrap()
    }

    /// A program begins; it has ended when the answer is dropped.
    pub(crate) fn begins(&self, part: Part) -> Running {
        let mut book = self.open();
        book.running += 1;
        let life = book.lives.entry(part.task).or_default();
        life.test = part.test;
        *life.begun.entry(part.phase).or_default() += 1;
        book.events.push(Event { part: part.clone(), began: true });
        Running { ledger: self.clone(), part }
    }
}

/// A program that runs.
#[derive(Debug)]
pub(crate) struct Running {
    ledger: Ledger,
    part: Part,
}

impl Running {
    pub(crate) fn note(&self, what: impl FnOnce(&mut Life)) {
        what(self.ledger.open().lives.entry(self.part.task).or_default());
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let mut book = self.ledger.open();
        book.running -= 1;
        book.events.push(Event { part: self.part.clone(), began: false });
    }
}
