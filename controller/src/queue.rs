//! One stream's FIFO and its window. Pure.
//!
//! ```text
//! waiting -> preparing -> ready -> put -> accepted -> running -> (ended: forgotten)
//!    `----------`----------'  finished here: cancelled, drained, unreachable
//!                                `------`-----------'  finished here only when the session is lost
//! ```
//!
//! Decides what is prepared, what is handed to the host and in which order, and what becomes of tasks that the host never
//! got. What becomes of those it has is the host's to decide. Knows tasks by their number in the stream alone; holds no
//! blocks, sends nothing, knows no time.

use std::collections::VecDeque;

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Event {
    /// A block was scheduled. Numbers grow.
    Scheduled { number: u32, held: bool },
    /// A new session is open on the host: it knows no task yet.
    SessionOpened,
    /// The connection broke; the session may still live.
    SessionSuspended,
    /// The connection is back and the session with it.
    SessionResumed,
    /// There is no session any more, or the host could not be reached at all.
    SessionLost,
    /// The block is compiled and its files are on the host.
    Prepared { number: u32 },
    /// The block cannot be compiled, or its files cannot be brought to the host: the task is over.
    Refused { number: u32 },
    /// The host has taken the task.
    Accepted { number: u32 },
    /// The host does not take the task: it is over.
    Rejected { number: u32 },
    /// Its first phase began.
    Began { number: u32 },
    /// The host says how it ended. `drains`: those behind it are to be cancelled.
    Ended { number: u32, drains: bool },
    /// A held task was told to begin.
    GoAsked { number: u32 },
    /// A task is to be taken back if it has not begun.
    CancelAsked { number: u32 },
    /// A task is to be ended.
    StopAsked { number: u32 },
}

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Action {
    /// Open a session on the host.
    Connect,
    /// Compile the block and bring its files to the host.
    Prepare { number: u32 },
    /// Hand the task over. `previous` was handed over before it, zero when none was.
    Put { number: u32, previous: u32, held: bool },
    /// Let a held task begin.
    Go { number: u32 },
    /// Ask the host to take the task back.
    Cancel { number: u32 },
    /// Ask the host to end the task.
    Stop { number: u32 },
    /// The task is over without the host having decided it.
    Finish { number: u32, ending: Ending },
}

/// How a task ends that the host does not decide.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ending {
    /// Taken back before it was handed over.
    Cancelled,
    /// The one before it failed, and its stream drains.
    Drained,
    /// Never handed over, and there is no host to hand it to.
    Unreachable,
    /// Handed over, and nobody can say what became of it.
    Lost,
}

/// Why a task does not run, or that it does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Standing {
    /// The host is not reached yet, or not any more.
    WaitsForHost,
    /// Its block is being compiled or its files are under way.
    Preparing,
    /// The task with that number comes first.
    Behind { number: u32 },
    /// The task with that number is held and was not told to begin.
    BehindHeld { number: u32 },
    /// It is held itself.
    Held,
    /// The host has it and starts it next.
    Next,
    /// It runs.
    Running,
    /// It is over, or was never here.
    Unknown,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Life {
    Waiting,
    Preparing,
    Ready,
    Put,
    Accepted,
    Running,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Wish {
    Cancel,
    Stop,
}

#[derive(Debug)]
struct Entry {
    number: u32,
    life: Life,
    /// Held and not told to begin.
    held: bool,
    /// Whether the host was given it as a held one: telling it to begin then takes a message.
    put_held: bool,
    /// What was asked of the host: passed on once it has the task, and again after the connection broke.
    wish: Option<Wish>,
}

impl Entry {
    fn is_handed_over(&self) -> bool {
        self.life >= Life::Put
    }

    /// Whether the host is known to have it: only then can it be told anything about it.
    fn is_with_host(&self) -> bool {
        self.life >= Life::Accepted
    }

    /// Everything that the host should have been told about it. Telling it twice changes nothing.
    fn repeat_orders(&self, actions: &mut Vec<Action>) {
        if self.put_held && !self.held && self.life < Life::Running {
            actions.push(Action::Go { number: self.number });
        }
        match self.wish {
            Some(Wish::Cancel) => actions.push(Action::Cancel { number: self.number }),
            Some(Wish::Stop) => actions.push(Action::Stop { number: self.number }),
            None => {}
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Session {
    /// None, and nobody has asked for one.
    Closed,
    /// Asked for.
    Opening,
    Up,
    Suspended,
}

/// The unfinished tasks of one stream.
#[derive(Debug)]
pub(crate) struct Queue {
    /// In the order of their numbers. Those that were handed over stand before all others.
    entries: VecDeque<Entry>,
    session: Session,
    /// The task that was handed over last in this session; zero when none was.
    last_put: u32,
    window: usize,
    /// Whether nothing is handed over before everything before it has ended.
    one_at_a_time: bool,
}

impl Queue {
    /// An empty queue that prepares at most `window` tasks ahead, and hands over as many.
    pub(crate) fn new(window: usize) -> Self {
        Self { entries: VecDeque::new(), session: Session::Closed, last_put: 0, window, one_at_a_time: false }
    }

    /// The same for a stream that drains: nobody could tell a task that was under way to the host when the one before it
    /// failed from one that was scheduled after that, so each is handed over when all before it have ended.
    pub(crate) fn draining(window: usize) -> Self {
        Self { one_at_a_time: true, ..Self::new(window) }
    }

    /// Whether every task is over.
    #[cfg(test)]
    pub(crate) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Numbers of all tasks that are not over.
    #[cfg(test)]
    pub(crate) fn numbers(&self) -> impl Iterator<Item = u32> + '_ {
        self.entries.iter().map(|entry| entry.number)
    }

    /// Takes in one event. Events about tasks that are over change nothing: messages cross on their way.
    pub(crate) fn handle(&mut self, event: Event, actions: &mut Vec<Action>) {
        match event {
            Event::Scheduled { number, held } => self.schedule(number, held),
            Event::SessionOpened => {
                self.session = Session::Up;
                self.last_put = 0;
            }
            Event::SessionSuspended => {
                if self.session == Session::Up {
                    self.session = Session::Suspended;
                }
            }
            Event::SessionResumed => self.resume(actions),
            Event::SessionLost => self.lose(actions),
            Event::Prepared { number } => self.ready(number),
            Event::Accepted { number } => self.accept(number, actions),
            Event::Began { number } => self.begin(number, actions),
            Event::Refused { number } => {
                self.remove(number);
            }
            Event::Rejected { number } => self.reject(number, actions),
            Event::Ended { number, drains } => self.end(number, drains, actions),
            Event::GoAsked { number } => self.go(number, actions),
            Event::CancelAsked { number } => self.wish(number, Wish::Cancel, actions),
            Event::StopAsked { number } => self.wish(number, Wish::Stop, actions),
        }
        self.advance(actions);
        #[cfg(test)]
        self.assert_invariants();
    }

    fn index(&self, number: u32) -> Option<usize> {
        self.entries.binary_search_by_key(&number, |entry| entry.number).ok()
    }

    fn entry(&mut self, number: u32) -> Option<&mut Entry> {
        self.index(number).map(|index| &mut self.entries[index])
    }

    fn remove(&mut self, number: u32) -> Option<Entry> {
        self.index(number).and_then(|index| self.entries.remove(index))
    }

    fn schedule(&mut self, number: u32, held: bool) {
        debug_assert!(self.entries.back().is_none_or(|last| last.number < number), "numbers grow");
        let entry = Entry { number, life: Life::Waiting, held, put_held: false, wish: None };
        self.entries.push_back(entry);
    }

    fn ready(&mut self, number: u32) {
        if let Some(entry) = self.entry(number)
            && entry.life == Life::Preparing
        {
            entry.life = Life::Ready;
        }
    }

    /// What was asked of a task while it was on its way is passed on now: sooner, the host might not know the task yet.
    fn accept(&mut self, number: u32, actions: &mut Vec<Action>) {
        let up = self.session == Session::Up;
        if let Some(entry) = self.entry(number)
            && entry.life == Life::Put
        {
            entry.life = Life::Accepted;
            if up {
                entry.repeat_orders(actions);
            }
        }
    }

    /// The news that a task runs may overtake the answer that it was taken.
    fn begin(&mut self, number: u32, actions: &mut Vec<Action>) {
        self.accept(number, actions);
        if let Some(entry) = self.entry(number)
            && entry.is_handed_over()
        {
            entry.life = Life::Running;
            entry.held = false;
        }
    }

    /// The host has forgotten nothing, but messages that were under way may have been lost: they are repeated.
    fn resume(&mut self, actions: &mut Vec<Action>) {
        self.session = Session::Up;
        let mut previous = 0;
        for entry in self.entries.iter().filter(|entry| entry.is_handed_over()) {
            if entry.life == Life::Put {
                actions.push(Action::Put { number: entry.number, previous, held: entry.put_held });
            } else {
                entry.repeat_orders(actions);
            }
            previous = entry.number;
        }
    }

    fn lose(&mut self, actions: &mut Vec<Action>) {
        self.session = Session::Closed;
        self.last_put = 0;
        for entry in self.entries.drain(..) {
            let ending = if entry.is_handed_over() { Ending::Lost } else { Ending::Unreachable };
            actions.push(Action::Finish { number: entry.number, ending });
        }
    }

    /// The host waits for the rejected task before it starts the next one: that one is handed over again, behind the
    /// one before.
    fn reject(&mut self, number: u32, actions: &mut Vec<Action>) {
        let Some(index) = self.index(number) else { return };
        self.entries.remove(index);
        let previous = match index.checked_sub(1) {
            Some(before) => self.entries[before].number,
            None => 0,
        };
        match self.entries.get_mut(index) {
            Some(next) if next.is_handed_over() && self.session == Session::Up => {
                next.life = next.life.min(Life::Put);
                actions.push(Action::Put { number: next.number, previous, held: next.put_held });
            }
            Some(next) if next.is_handed_over() => next.life = next.life.min(Life::Put),
            _ if self.last_put == number => self.last_put = previous,
            _ => {}
        }
    }

    fn end(&mut self, number: u32, drains: bool, actions: &mut Vec<Action>) {
        if self.remove(number).is_none() || !drains {
            return;
        }
        // One that was handed over nevertheless is the host's to drain. Those stand in front: the rest is cut off.
        let kept = self.entries.iter().take_while(|entry| entry.is_handed_over()).count();
        for entry in self.entries.drain(kept..) {
            actions.push(Action::Finish { number: entry.number, ending: Ending::Drained });
        }
    }

    fn go(&mut self, number: u32, actions: &mut Vec<Action>) {
        let up = self.session == Session::Up;
        if let Some(entry) = self.entry(number)
            && entry.held
        {
            entry.held = false;
            if entry.put_held && entry.is_with_host() && up {
                actions.push(Action::Go { number });
            }
        }
    }

    fn wish(&mut self, number: u32, wish: Wish, actions: &mut Vec<Action>) {
        let up = self.session == Session::Up;
        let Some(index) = self.index(number) else { return };
        let entry = &mut self.entries[index];
        if !entry.is_handed_over() {
            self.entries.remove(index);
            actions.push(Action::Finish { number, ending: Ending::Cancelled });
            return;
        }
        // A stop goes further than a cancellation and replaces it, never the other way round.
        entry.wish = entry.wish.max(Some(wish));
        if up && entry.is_with_host() {
            actions.push(match wish {
                Wish::Cancel => Action::Cancel { number },
                Wish::Stop => Action::Stop { number },
            });
        }
    }

    /// Prepares and hands over what the window allows.
    fn advance(&mut self, actions: &mut Vec<Action>) {
        match self.session {
            Session::Closed if !self.entries.is_empty() => {
                self.session = Session::Opening;
                actions.push(Action::Connect);
            }
            Session::Up => {
                let mut in_order = true;
                let one_at_a_time = self.one_at_a_time;
                for entry in self.entries.iter_mut().take(self.window) {
                    match entry.life {
                        Life::Waiting => {
                            entry.life = Life::Preparing;
                            actions.push(Action::Prepare { number: entry.number });
                        }
                        Life::Ready if in_order => {
                            entry.life = Life::Put;
                            entry.put_held = entry.held;
                            let (number, previous, held) = (entry.number, self.last_put, entry.held);
                            actions.push(Action::Put { number, previous, held });
                            self.last_put = number;
                        }
                        _ => {}
                    }
                    in_order &= entry.life >= Life::Put && !one_at_a_time;
                }
            }
            _ => {}
        }
    }

    /// Why a task does not run.
    pub(crate) fn standing(&self, number: u32) -> Standing {
        let Some(index) = self.index(number) else { return Standing::Unknown };
        let entry = &self.entries[index];
        if entry.life == Life::Running {
            return Standing::Running;
        }
        if let Some(held) = self.entries.iter().take(index).find(|before| before.held) {
            return Standing::BehindHeld { number: held.number };
        }
        if self.session != Session::Up {
            return Standing::WaitsForHost;
        }
        if index > 0 {
            return Standing::Behind { number: self.entries[0].number };
        }
        match entry.life {
            Life::Waiting | Life::Preparing | Life::Ready => Standing::Preparing,
            _ if entry.held => Standing::Held,
            _ => Standing::Next,
        }
    }

    /// The first task before this one that is held and not among `others`: nothing behind it can begin.
    pub(crate) fn held_before(&self, number: u32, others: &[u32]) -> Option<u32> {
        let before = self.entries.iter().take_while(|entry| entry.number < number);
        before.filter(|entry| entry.held && !others.contains(&entry.number)).map(|entry| entry.number).next()
    }

    #[cfg(test)]
    fn assert_invariants(&self) {
        let numbers: Vec<u32> = self.numbers().collect();
        assert!(numbers.is_sorted_by(|a, b| a < b), "numbers grow: {numbers:?}");
        let handed_over = self.entries.iter().take_while(|entry| entry.is_handed_over()).count();
        let all = self.entries.iter().filter(|entry| entry.is_handed_over()).count();
        assert_eq!(handed_over, all, "what was handed over stands in front: {:?}", self.entries);
        let ahead = if self.one_at_a_time { 1 } else { self.window };
        assert!(handed_over <= ahead, "the window is kept");
        if matches!(self.session, Session::Closed | Session::Opening) {
            assert_eq!(handed_over, 0, "nothing is handed over without a session");
            assert!(self.session != Session::Closed || self.entries.is_empty(), "work asks for a session");
        }
    }
}

#[cfg(test)]
mod tests;
