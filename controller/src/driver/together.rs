//! Hosts that a test takes together: one after another in one order for all tests, and nothing begins on any of them before
//! all are had. Pure.
//!
//! ```text
//! untaken --begun--> taking: ask the first --had or failed--> ask the next … --last one--> done: begin everywhere
//! ```
//!
//! Two tests that take the same hosts in different orders would wait for each other for ever, and a task that begins while
//! the next host is still waited for only waits in barriers for tasks that cannot come. Knows links by their numbers; the
//! order is that of their places. Dials nothing and knows no time.

use std::collections::VecDeque;

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Event {
    /// One of the hosts is needed. They are here in their order.
    Begun { links: Vec<usize> },
    /// A host is had.
    Had { link: usize },
    /// A host cannot be had, or is lost again.
    Failed { link: usize },
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Action {
    /// Ask for a host.
    Ask { link: usize },
    /// Whatever waited for these hosts may begin.
    Begin { links: Vec<usize> },
}

/// The hosts of one test.
#[derive(Debug, Default)]
pub(crate) struct Together {
    taking: Option<Taking>,
    begun: bool,
}

#[derive(Debug)]
struct Taking {
    had: Vec<usize>,
    asked: usize,
    rest: VecDeque<usize>,
}

impl Together {
    /// Takes in one event.
    pub(crate) fn handle(&mut self, event: Event, actions: &mut Vec<Action>) {
        match event {
            Event::Begun { links } if !self.begun => {
                self.begun = true;
                let mut rest = VecDeque::from(links);
                if let Some(asked) = rest.pop_front() {
                    self.taking = Some(Taking { had: Vec::new(), asked, rest });
                    actions.push(Action::Ask { link: asked });
                }
            }
            Event::Begun { .. } => {}
            Event::Had { link } => self.settled(link, true, actions),
            Event::Failed { link } => self.settled(link, false, actions),
        }
    }

    fn settled(&mut self, link: usize, had: bool, actions: &mut Vec<Action>) {
        let Some(taking) = &mut self.taking else { return };
        if !had {
            taking.had.retain(|&other| other != link);
        }
        if link != taking.asked {
            return;
        }
        if had {
            taking.had.push(link);
        }
        if let Some(next) = taking.rest.pop_front() {
            taking.asked = next;
            actions.push(Action::Ask { link: next });
        } else if let Some(Taking { had, .. }) = self.taking.take() {
            actions.push(Action::Begin { links: had });
        }
    }

    /// Whether hosts were taken or are being taken already: a test does so once.
    pub(crate) fn has_begun(&self) -> bool {
        self.begun
    }

    /// The host that is waited for, when this one may not be used before that is settled.
    pub(crate) fn awaited(&self, link: usize) -> Option<usize> {
        let taking = self.taking.as_ref()?;
        let among = link == taking.asked || taking.had.contains(&link) || taking.rest.contains(&link);
        among.then_some(taking.asked)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn check(script: &[Event], expected: &[Action]) -> Together {
        let mut together = Together::default();
        let mut actions = Vec::new();
        for event in script {
            together.handle(event.clone(), &mut actions);
        }
        assert_eq!(actions, expected);
        together
    }

    #[test]
    fn hosts_are_asked_for_one_after_another_and_begin_together() {
        let script = [Event::Begun { links: vec![4, 1, 7] }, Event::Had { link: 4 }, Event::Had { link: 1 }];
        let asked = [4, 1, 7].map(|link| Action::Ask { link });
        let together = check(&script, &asked);
        assert_eq!([4, 1, 7, 2].map(|link| together.awaited(link)), [Some(7), Some(7), Some(7), None]);
        let script = [&script[..], &[Event::Had { link: 7 }]].concat();
        let all = [&asked[..], &[Action::Begin { links: vec![4, 1, 7] }]].concat();
        let together = check(&script, &all);
        assert_eq!(together.awaited(4), None);
    }

    #[test]
    fn a_host_that_cannot_be_had_or_is_lost_again_holds_nobody_up() {
        check(
            &[
                Event::Begun { links: vec![1, 2, 3] },
                Event::Had { link: 1 },
                Event::Failed { link: 2 },
                Event::Failed { link: 1 },
                Event::Had { link: 3 },
                Event::Begun { links: vec![1] },
                Event::Failed { link: 3 },
            ],
            &[
                Action::Ask { link: 1 },
                Action::Ask { link: 2 },
                Action::Ask { link: 3 },
                Action::Begin { links: vec![3] },
            ],
        );
    }

    proptest! {
        #[test]
        fn at_most_one_host_is_asked_for_at_a_time_and_all_begin_once(
            count in 1..6_usize, answers in prop::collection::vec((0..6_usize, any::<bool>()), 0..40)
        ) {
            let mut together = Together::default();
            let mut actions = Vec::new();
            together.handle(Event::Begun { links: (0..count).collect() }, &mut actions);
            for (link, had) in answers {
                together.handle(if had { Event::Had { link } } else { Event::Failed { link } }, &mut actions);
            }
            // Whatever is still asked for is answered in the end.
            while let Some(link) = together.awaited(count - 1) {
                together.handle(Event::Failed { link }, &mut actions);
            }
            let asked: Vec<_> = actions.iter().filter_map(|action| match action {
                Action::Ask { link } => Some(*link),
                Action::Begin { .. } => None,
            }).collect();
            prop_assert_eq!(asked, (0..count).collect::<Vec<_>>());
            let begun = actions.iter().filter(|action| matches!(action, Action::Begin { .. })).count();
            prop_assert_eq!(begun, 1);
        }
    }
}
