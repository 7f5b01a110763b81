//! Waiting in line for a host that others have, without two tests waiting for each other for ever.
//!
//! Whoever waits for a host may hold others meanwhile, for which others wait. Were every test to take its hosts in one
//! order, that of their places as text, no circle could come about: along it the places would have to grow without end.
//! Hosts that are reserved are taken in that order (`crate::driver::together`). But streams start when they are first used,
//! so that a test may want a host while it holds one that comes later in the order. It may wait all the same, for as long as
//! nobody wants what it holds. Once somebody has wanted that for a while, the test gives up its place in line: of those who
//! form a circle at least one waits against the order, and that one leaves.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use millstream_common::{limits, text::spoken};
use tokio::time::Instant;

/// The hosts that a test holds by their places, each with the time since which others have waited for it.
#[derive(Debug, Default)]
pub(crate) struct Holdings(Mutex<BTreeMap<String, Option<Instant>>>);

impl Holdings {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Option<Instant>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The test has a session there.
    pub(super) fn hold(&self, place: &str) {
        self.lock().entry(place.to_owned()).or_default();
    }

    /// The session is over.
    pub(super) fn let_go(&self, place: &str) {
        self.lock().remove(place);
    }

    /// The host has told how many wait in line for it.
    pub(super) fn wanted(&self, place: &str, count: u32, now: Instant) {
        if let Some(since) = self.lock().get_mut(place) {
            *since = if count == 0 { None } else { Some(since.unwrap_or(now)) };
        }
    }

    /// The held host that comes later in the order than `place` and has been wanted for longest, with the time since when.
    fn held_against_the_order(&self, place: &str) -> Option<(String, Instant)> {
        let held = self.lock();
        let later = held.iter().filter(|(held, _)| held.as_str() > place);
        let wanted = later.filter_map(|(held, since)| Some(((*since)?, held)));
        wanted.min().map(|(since, held)| (held.clone(), since))
    }
}

/// One wait in line.
#[derive(Debug)]
pub(super) struct Line {
    begin: Instant,
    wait: Duration,
    in_block: bool,
    told: Option<Instant>,
}

/// How often the log says that somebody still waits.
const TOLD_AGAIN: Duration = Duration::from_secs(60);

impl Line {
    pub(super) fn begin(now: Instant, wait: Duration, in_block: bool) -> Self {
        Self { begin: now, wait, in_block, told: None }
    }

    /// How long the host may keep the next call before it answers who has it.
    pub(super) fn patience(&self, now: Instant) -> Duration {
        let left = self.wait.saturating_sub(now.saturating_duration_since(self.begin));
        left.min(limits::OPEN_WAIT_MAX)
    }

    /// Why this test waits no longer, if so. `why` is what the host says.
    pub(super) fn over(&self, place: &str, holdings: &Holdings, why: &str, now: Instant) -> Option<String> {
        let waited = now.saturating_duration_since(self.begin);
        if waited >= self.wait {
            let next_step = if self.in_block {
                "A block waits no longer, whatever `wait` says, because its own test may be in the way of whom it waits for: run the \
                 test when the host is free"
            } else {
                "Give the stream a longer `wait`, or run the test when the host is free"
            };
            return Some(format!(
                "{place} could not be had within {}: {why}. {next_step}",
                spoken(self.wait)
            ));
        }
        let (held, since) = holdings.held_against_the_order(place)?;
        (now.saturating_duration_since(since) >= limits::LINE_YIELD).then(|| {
            format!(
                "{place} could not be had in {}: {why}. This test holds {held}, which others wait for: two tests that each wait \
                 for what the other one holds would wait for ever. Run it again, and have both hosts before anything begins: name \
                 their streams in `take_together`, or define them as `exclusive`",
                spoken(waited)
            )
        })
    }

    /// What the log is told, if it is time again.
    pub(super) fn is_news(&mut self, now: Instant) -> bool {
        let news = self.told.is_none_or(|told| now.saturating_duration_since(told) >= TOLD_AGAIN);
        if news {
            self.told = Some(now);
        }
        news
    }
}

#[cfg(test)]
mod tests;
