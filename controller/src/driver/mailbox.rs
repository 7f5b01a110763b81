//! A queue that anybody may put into without waiting and one loop takes out of.
//!
//! Handles of users put into it from any thread, with or without a runtime, and must never block: what they put is
//! bounded by the number of tasks of a test. Whoever reads from a peer uses [`Mailbox::offer`], which waits for room.

use std::{
    collections::VecDeque,
    sync::{Mutex, PoisonError},
};

use tokio::sync::Notify;

/// What peers may put before they have to wait: eight reports for each of a thousand tasks.
const ROOM_COUNT: usize = 8 * 1024;

/// The queue.
#[derive(Debug)]
pub(crate) struct Mailbox<T> {
    letters: Mutex<Letters<T>>,
    arrived: Notify,
    taken: Notify,
}

#[derive(Debug)]
struct Letters<T> {
    waiting: VecDeque<T>,
    /// Nobody takes any more: what is put is given back.
    closed: bool,
}

impl<T> Mailbox<T> {
    pub(crate) fn new() -> Self {
        let letters = Letters { waiting: VecDeque::new(), closed: false };
        Self { letters: Mutex::new(letters), arrived: Notify::new(), taken: Notify::new() }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Letters<T>> {
        self.letters.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts without waiting. Gives the letter back when the mailbox is closed.
    pub(crate) fn put(&self, letter: T) -> Result<(), T> {
        {
            let mut letters = self.lock();
            if letters.closed {
                return Err(letter);
            }
            letters.waiting.push_back(letter);
        }
        self.arrived.notify_one();
        Ok(())
    }

    /// Puts as soon as there is room.
    pub(crate) async fn offer(&self, letter: T) -> Result<(), T> {
        loop {
            // Made before looking, so that room made in between is not missed.
            let taken = self.taken.notified();
            {
                let letters = self.lock();
                if letters.closed || letters.waiting.len() < ROOM_COUNT {
                    break;
                }
            }
            taken.await;
        }
        self.put(letter)
    }

    /// Waits for at least one letter and takes all. For one taker only.
    ///
    /// # Cancel safety
    /// Nothing is taken unless the future completes.
    pub(crate) async fn take(&self) -> VecDeque<T> {
        loop {
            let letters = std::mem::take(&mut self.lock().waiting);
            if !letters.is_empty() {
                self.taken.notify_waiters();
                return letters;
            }
            self.arrived.notified().await;
        }
    }

    /// Refuses everything from now on and gives back what nobody took.
    pub(crate) fn close(&self) -> VecDeque<T> {
        let letters = {
            let mut letters = self.lock();
            letters.closed = true;
            std::mem::take(&mut letters.waiting)
        };
        self.taken.notify_waiters();
        letters
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[tokio::test]
    async fn whoever_offers_waits_for_room_and_whoever_puts_does_not() {
        let mailbox = Arc::new(Mailbox::new());
        for number in 0..=ROOM_COUNT {
            mailbox.put(number).unwrap();
        }
        let offering = tokio::spawn({
            let mailbox = Arc::clone(&mailbox);
            async move { mailbox.offer(7).await }
        });
        assert!(mailbox.take().await.len() > ROOM_COUNT);
        offering.await.unwrap().unwrap();
        assert_eq!(mailbox.take().await, [7]);
        mailbox.close();
        assert_eq!(mailbox.put(1), Err(1));
        assert_eq!(mailbox.offer(2).await, Err(2));
    }
}
