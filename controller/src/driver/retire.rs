//! Closing single streams while the test goes on: their tasks end, and with the last stream at a place the session there.

use tokio::sync::oneshot;

use super::{Driver, LinkPhase, cut::Cut, together};
use crate::link::Order;

/// What could not be tidied behind a stream.
pub(crate) type Tidied = oneshot::Sender<Vec<String>>;

/// A stream that was closed. Nothing begins in it any more.
pub(super) enum Retired {
    /// Its tasks end; these are to be told.
    Ending(Vec<Tidied>),
    /// It was the last one of its place, and the session there is being closed.
    Closing(Vec<Tidied>),
    /// Nothing of it is left but this.
    Closed(Vec<String>),
}

impl Driver {
    pub(super) fn retire(&mut self, stream: usize, answer: Tidied) {
        match self.retired.entry(stream).or_insert_with(|| Retired::Ending(Vec::new())) {
            Retired::Ending(waiting) | Retired::Closing(waiting) => waiting.push(answer),
            Retired::Closed(left_behind) => {
                // Whoever asked may have gone.
                let _told = answer.send(left_behind.clone());
                return;
            }
        }
        self.end_tasks(Cut::Closed, |work| work.stream == stream);
        self.settle_retired(stream);
    }

    /// Goes on with a stream that is being closed, once its last task is over.
    pub(super) fn settle_retired(&mut self, stream: usize) {
        let ending = matches!(self.retired.get(&stream), Some(Retired::Ending(_)));
        if !ending || self.closing || self.works.values().any(|work| work.stream == stream) {
            return;
        }
        let link = self.streams.get(&stream).map(|state| state.link);
        let is_last = |link: usize| {
            let ending =
                |of: &usize| *of != stream && matches!(self.retired.get(of), Some(Retired::Ending(_)));
            self.is_left(link) && !self.links[link].streams.iter().any(ending)
        };
        match link.filter(|&link| is_last(link) && self.links[link].phase != LinkPhase::Idle) {
            Some(link) => {
                let Some(Retired::Ending(waiting)) = self.retired.remove(&stream) else { return };
                self.retired.insert(stream, Retired::Closing(waiting));
                self.rest(link);
            }
            // Others use its place, or nothing is there.
            None => self.tell_retired(stream, Vec::new()),
        }
    }

    /// Whether every stream that used this link is closed, or is being closed.
    pub(super) fn is_left(&self, link: usize) -> bool {
        let streams = &self.links[link].streams;
        !streams.is_empty() && streams.iter().all(|stream| self.retired.contains_key(stream))
    }

    /// Closes the session of a link that nobody needs now.
    fn rest(&mut self, link: usize) {
        if self.links[link].phase == LinkPhase::Closing {
            return;
        }
        self.links[link].enter(LinkPhase::Closing, self.setup.world.clock.now());
        self.links[link].link.order(Order::Close { for_good: false });
        // Hosts that are taken together with it do not wait for it.
        self.take_on(together::Event::Failed { link });
    }

    /// A link has closed its session and rests. Streams that were used meanwhile need another one.
    pub(super) fn rested(&mut self, link: usize, left_behind: &[String]) {
        self.links[link].enter(LinkPhase::Idle, self.setup.world.clock.now());
        for stream in self.links[link].streams.clone() {
            match self.retired.get(&stream) {
                Some(Retired::Closing(_)) => self.tell_retired(stream, left_behind.to_vec()),
                Some(_) => {}
                None if self.closing => {}
                None => {
                    if self.streams.get(&stream).is_some_and(|state| !state.tasks.is_empty()) {
                        self.connect(stream, link);
                    }
                }
            }
        }
    }

    fn tell_retired(&mut self, stream: usize, left_behind: Vec<String>) {
        let before = self.retired.insert(stream, Retired::Closed(left_behind.clone()));
        if let Some(Retired::Ending(waiting) | Retired::Closing(waiting)) = before {
            for answer in waiting {
                let _told = answer.send(left_behind.clone());
            }
        }
    }
}
