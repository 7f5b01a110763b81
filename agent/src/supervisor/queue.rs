//! FIFO of one stream as handed over by the controller. Pure.
//!
//! ```text
//! added -> waiting -- its turn --> current -- ended --> gone
//!             |                                           |
//!             +-- withdrawn, drained, closed --> gone     +-- next one's turn
//! ```
//!
//! A task's turn comes when the task before it has ended, and never sooner: nothing of it that a user wrote runs before
//! then. Tasks may overtake one another on their way here: one that names another before it waits for that one to arrive.
//! While one runs, the one behind it may have its files put in place. Time alone changes nothing here. It starts
//! nothing, and does not know what a task is.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Instant,
};

use millstream_common::id::TaskId;

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Event {
    /// A task was handed over. A task that is known already changes nothing.
    Added {
        /// The task.
        task: TaskId,
        /// Its number in the stream: lower numbers go first among those that wait.
        number: u32,
        /// Number of the task that was handed over before it; zero for the first.
        previous: u32,
    },
    /// A waiting task was handed over again, behind another one: the one before it was refused on its way and never
    /// comes. Any other task changes nothing.
    Follows {
        /// The task.
        task: TaskId,
        /// Number of the task before it.
        previous: u32,
    },
    /// A waiting task was taken back and needs no turn any more. One that does not wait changes nothing.
    Withdrawn {
        /// The task.
        task: TaskId,
    },
    /// The task whose turn it was has ended, with all that belongs to it. Any other task changes nothing.
    Ended {
        /// The task.
        task: TaskId,
        /// Whether it ended unexpectedly in a stream that is then drained.
        drains: bool,
    },
    /// The session is over: no turn comes any more.
    Closed,
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Action {
    /// Put the task's files in place, ahead of its turn.
    Prepare(TaskId),
    /// It is the task's turn.
    Begin(TaskId),
    /// Cancel the task: the one named ended unexpectedly.
    Drain {
        /// The task to cancel.
        task: TaskId,
        /// The task that ended.
        after: TaskId,
    },
}

/// The tasks of one stream that have not ended.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    /// By number, then by arrival: two tasks with one number keep the order in which they came.
    waiting: BTreeMap<(u32, u64), Waiting>,
    /// Those that were prepared ahead of their turn.
    prepared: BTreeSet<TaskId>,
    current: Option<TaskId>,
    arrivals: u64,
    /// The highest number that has left the line: it and all before it have arrived.
    passed: u32,
    closed: bool,
}

/// One place in the line.
#[derive(Debug)]
struct Waiting {
    /// None when the task was withdrawn: those behind it still need to know that it has arrived.
    task: Option<TaskId>,
    previous: u32,
}

impl Queue {
    /// Takes in one event. Never blocks and never reads a clock.
    pub(crate) fn handle(&mut self, event: Event, _now: Instant, actions: &mut Vec<Action>) {
        match event {
            Event::Added { task, number, previous } => self.add(task, number, previous),
            Event::Follows { task, previous } => self.follow(task, previous),
            Event::Withdrawn { task } => self.withdraw(task),
            Event::Ended { task, drains } if self.current == Some(task) => {
                self.current = None;
                if drains {
                    self.drain(task, actions);
                }
            }
            Event::Ended { .. } => {}
            Event::Closed => self.closed = true,
        }
        self.advance(actions);
        #[cfg(test)]
        self.assert_invariants();
    }

    /// The next moment at which time alone changes something: never.
    #[cfg(test)]
    #[expect(clippy::unused_self, reason = "every machine has this question")]
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        None
    }

    /// The task whose turn it is.
    pub(crate) fn current(&self) -> Option<TaskId> {
        self.current
    }

    /// How many are before `task`, the current one included; none when it does not wait.
    pub(crate) fn ahead_of(&self, task: TaskId) -> Option<usize> {
        let place = self.line().position(|waiting| waiting == task)?;
        Some(place + usize::from(self.current.is_some()))
    }

    /// Number of the task that the first in line waits for because it has not arrived.
    pub(crate) fn missing(&self) -> Option<u32> {
        let (_, first) = self.waiting.first_key_value()?;
        (first.previous > self.passed).then_some(first.previous)
    }

    fn line(&self) -> impl Iterator<Item = TaskId> {
        self.waiting.values().filter_map(|waiting| waiting.task)
    }

    fn add(&mut self, task: TaskId, number: u32, previous: u32) {
        let known = self.current == Some(task) || self.line().any(|waiting| waiting == task);
        if !known && !self.closed {
            self.waiting.insert((number, self.arrivals), Waiting { task: Some(task), previous });
            self.arrivals += 1;
        }
    }

    fn follow(&mut self, task: TaskId, previous: u32) {
        if let Some(again) = self.waiting.values_mut().find(|waiting| waiting.task == Some(task)) {
            again.previous = again.previous.min(previous);
        }
    }

    fn withdraw(&mut self, task: TaskId) {
        for waiting in self.waiting.values_mut() {
            if waiting.task == Some(task) {
                waiting.task = None;
            }
        }
        self.prepared.remove(&task);
    }

    fn drain(&mut self, after: TaskId, actions: &mut Vec<Action>) {
        self.prepared.clear();
        for ((number, _), waiting) in std::mem::take(&mut self.waiting) {
            self.passed = self.passed.max(number);
            actions.extend(waiting.task.map(|task| Action::Drain { task, after }));
        }
    }

    fn advance(&mut self, actions: &mut Vec<Action>) {
        if self.closed {
            return;
        }
        while self.current.is_none() && self.missing().is_none() {
            let Some(((number, _), first)) = self.waiting.pop_first() else { break };
            self.passed = self.passed.max(number);
            if let Some(task) = first.task {
                self.prepared.remove(&task);
                self.current = Some(task);
                actions.push(Action::Begin(task));
            }
        }
        let next = self.line().next();
        if let Some(next) = next
            && self.prepared.insert(next)
        {
            actions.push(Action::Prepare(next));
        }
    }

    #[cfg(test)]
    fn assert_invariants(&self) {
        let waiting: BTreeSet<TaskId> = self.line().collect();
        assert_eq!(waiting.len(), self.line().count(), "a task waits once");
        assert!(self.current.is_none_or(|current| !waiting.contains(&current)), "who runs does not wait");
        assert!(self.prepared.is_subset(&waiting), "only who waits is prepared ahead");
        let rests = self.current.is_none() && !self.waiting.is_empty();
        assert!(!rests || self.closed || self.missing().is_some(), "nobody waits for nothing");
    }
}

#[cfg(test)]
mod tests {
    use expect_test::{Expect, expect};
    use millstream_common::clock::{Clock as _, SystemClock};
    use proptest::prelude::*;
    use uuid::Uuid;

    use super::*;

    fn task(letter: char) -> TaskId {
        TaskId::from_uuid(Uuid::from_u128(u128::from(u32::from(letter))))
    }

    fn letter(task: TaskId) -> char {
        char::from_u32(u32::try_from(task.uuid().as_u128()).unwrap()).unwrap()
    }

    fn add(letter: char, number: u32) -> Event {
        Event::Added { task: task(letter), number, previous: 0 }
    }

    fn end(letter: char) -> Event {
        Event::Ended { task: task(letter), drains: false }
    }

    fn check(events: &[Event], transcript: &Expect) {
        let (mut queue, now, mut lines) = (Queue::default(), SystemClock.now().into_std(), String::new());
        for event in events {
            let mut actions = Vec::new();
            queue.handle(event.clone(), now, &mut actions);
            for action in actions {
                lines += &match action {
                    Action::Prepare(task) => format!("prepare {}\n", letter(task)),
                    Action::Begin(task) => format!("begin {}\n", letter(task)),
                    Action::Drain { task, after } => {
                        format!("drain {} after {}\n", letter(task), letter(after))
                    }
                };
            }
            assert_eq!(queue.next_deadline(), None);
        }
        transcript.assert_eq(&lines);
    }

    #[test]
    fn one_runs_and_the_next_is_prepared() {
        check(
            &[add('a', 1), add('b', 2), add('c', 3), end('a'), end('b'), end('c')],
            &expect![[r"
                begin a
                prepare b
                begin b
                prepare c
                begin c
            "]],
        );
    }

    #[test]
    fn numbers_decide_among_those_that_wait() {
        check(
            &[add('a', 1), add('c', 3), add('b', 2), end('a'), end('b')],
            &expect![[r"
                begin a
                prepare c
                prepare b
                begin b
                begin c
            "]],
        );
    }

    #[test]
    fn a_stream_that_drains_cancels_all_who_wait_and_takes_new_ones() {
        let failed = Event::Ended { task: task('a'), drains: true };
        check(
            &[add('a', 1), add('b', 2), add('c', 3), failed, add('d', 4)],
            &expect![[r"
                begin a
                prepare b
                drain b after a
                drain c after a
                begin d
            "]],
        );
    }

    #[test]
    fn repeats_and_strangers_change_nothing() {
        check(
            &[add('a', 1), add('a', 1), end('x'), Event::Withdrawn { task: task('x') }, end('a'), end('a')],
            &expect![[r"
                begin a
            "]],
        );
    }

    #[test]
    fn who_was_withdrawn_gets_no_turn() {
        let withdrawn = Event::Withdrawn { task: task('b') };
        check(
            &[add('a', 1), add('b', 2), withdrawn, end('a'), add('c', 3)],
            &expect![[r"
                begin a
                prepare b
                begin c
            "]],
        );
    }

    #[test]
    fn one_that_is_put_again_does_not_wait_for_what_was_refused() {
        let after = |letter, number, previous| Event::Added { task: task(letter), number, previous };
        check(
            &[
                after('c', 3, 2),
                after('a', 1, 0),
                end('a'),
                Event::Follows { task: task('c'), previous: 1 },
                Event::Follows { task: task('a'), previous: 0 },
            ],
            &expect![[r"
                prepare c
                begin a
                begin c
            "]],
        );
    }

    #[test]
    fn who_overtook_another_on_the_way_waits_for_it_to_arrive() {
        let after = |letter, number, previous| Event::Added { task: task(letter), number, previous };
        check(
            &[
                after('c', 5, 3),
                after('b', 3, 1),
                after('a', 1, 0),
                end('a'),
                end('b'),
                after('d', 9, 5),
                end('c'),
            ],
            &expect![[r"
                prepare c
                prepare b
                begin a
                begin b
                begin c
                prepare d
                begin d
            "]],
        );
        // One that was withdrawn has arrived all the same.
        let withdrawn = Event::Withdrawn { task: task('b') };
        check(
            &[after('c', 3, 2), after('b', 2, 1), withdrawn, after('a', 1, 0), end('a')],
            &expect![[r"
                prepare c
                prepare b
                begin a
                begin c
            "]],
        );
    }

    #[test]
    fn nobody_begins_in_a_closed_session() {
        check(
            &[add('a', 1), add('b', 2), Event::Closed, end('a'), add('c', 3)],
            &expect![[r"
                begin a
                prepare b
            "]],
        );
    }

    fn any_event() -> impl Strategy<Value = Event> {
        let any_task = || prop::sample::select(vec!['a', 'b', 'c', 'd', 'e', 'f']).prop_map(task);
        prop_oneof![
            4 => (any_task(), 1_u32..5, 0_u32..5).prop_map(|(task, number, previous)| Event::Added { task, number, previous: previous.min(number - 1) }),
            1 => any_task().prop_map(|task| Event::Withdrawn { task }),
            4 => (any_task(), prop::bool::weighted(0.2)).prop_map(|(task, drains)| Event::Ended { task, drains }),
            1 => prop::bool::weighted(0.05)
                .prop_map(|closes| if closes { Event::Closed } else { Event::Withdrawn { task: task('z') } }),
        ]
    }

    proptest! {
        #[test]
        fn one_task_at_a_time_whatever_happens(events in prop::collection::vec(any_event(), 0..60)) {
            let (mut queue, now) = (Queue::default(), SystemClock.now().into_std());
            let mut running = None;
            for event in events {
                if let Event::Ended { task, .. } = event && running == Some(task) {
                    running = None;
                }
                let mut actions = Vec::new();
                queue.handle(event, now, &mut actions);
                for action in actions {
                    if let Action::Begin(task) = action {
                        prop_assert_eq!(running, None, "two tasks at once");
                        running = Some(task);
                    }
                }
                prop_assert_eq!(running, queue.current());
            }
        }
    }
}
