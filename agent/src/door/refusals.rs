//! Which refusals are told one by one, in the log and on record: all, until somebody makes it a flood. Pure.
//!
//! Whoever looks for open ports all day long must not bury what a person needs to read. Each address and each local user has a
//! few lines a minute, and so have all together; what was left out is counted, and the next line says how much it was.

use std::{collections::BTreeMap, time::Duration};

use super::identity::Source;

/// How long lines are counted.
const WINDOW: Duration = Duration::from_secs(60);
/// Lines about one source in that time.
const LINES_OF_ONE: u32 = 5;
/// Lines in that time about all sources together.
const LINES_OF_ALL: u32 = 60;
/// Sources that are known apart: more than have lines.
const SOURCES_COUNT_MAX: usize = 128;

/// Lines of one source, or of all.
#[derive(Debug, Default)]
struct Count {
    begin: Duration,
    lines: u32,
    left_out: u64,
}

impl Count {
    /// Counts one; whether it is still told.
    fn take(&mut self, now: Duration, most: u32) -> bool {
        if now.saturating_sub(self.begin) >= WINDOW {
            (self.begin, self.lines) = (now, 0);
        }
        self.lines = self.lines.saturating_add(1);
        self.lines <= most
    }
}

/// What was told lately.
#[derive(Debug, Default)]
pub(super) struct Refusals {
    all: Count,
    by_source: BTreeMap<Source, Count>,
}

impl Refusals {
    /// Somebody was refused. Some: it is to be told, with the number of those that were not since the last that was. `now` is
    /// the time since any moment.
    pub(super) fn note(&mut self, from: Source, now: Duration) -> Option<u64> {
        if self.by_source.len() >= SOURCES_COUNT_MAX && !self.by_source.contains_key(&from) {
            self.by_source.retain(|_, count| now.saturating_sub(count.begin) < WINDOW);
        }
        let own = if self.by_source.len() >= SOURCES_COUNT_MAX && !self.by_source.contains_key(&from) {
            true
        } else {
            self.by_source.entry(from).or_default().take(now, LINES_OF_ONE)
        };
        // What its own count leaves out takes no line from the others.
        if own && self.all.take(now, LINES_OF_ALL) {
            Some(std::mem::take(&mut self.all.left_out))
        } else {
            self.all.left_out = self.all.left_out.saturating_add(1);
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;

    fn told(refusals: &mut Refusals, from: u32, second: u64) -> Option<u64> {
        refusals.note(Source::Address(IpAddr::from(from.to_be_bytes())), Duration::from_secs(1_000 + second))
    }

    #[test]
    fn one_address_has_few_lines_a_minute_and_takes_none_from_others() {
        let mut refusals = Refusals::default();
        for _ in 0..LINES_OF_ONE {
            assert_eq!(told(&mut refusals, 1, 0), Some(0));
        }
        for second in 0..10_000 {
            assert_eq!(told(&mut refusals, 1, second % 60), None);
        }
        assert_eq!(told(&mut refusals, 2, 30), Some(10_000));
        assert_eq!(told(&mut refusals, 1, 59), None);
        assert_eq!(told(&mut refusals, 1, 60), Some(1));
        let mut local = |uid| refusals.note(Source::User(uid), Duration::from_secs(1_060));
        assert_eq!((0..9).filter(|_| local(7).is_some()).count(), usize::try_from(LINES_OF_ONE).unwrap());
        assert_eq!(local(8), Some(4), "one local user hides nothing of another");
    }

    #[test]
    fn many_addresses_have_few_lines_together_and_take_little_memory() {
        let mut refusals = Refusals::default();
        let lines = (0..100_000).filter(|address| told(&mut refusals, *address, 0).is_some()).count();
        assert_eq!(lines, usize::try_from(LINES_OF_ALL).unwrap());
        assert_eq!(refusals.by_source.len(), SOURCES_COUNT_MAX);
        assert_eq!(told(&mut refusals, 7, 61), Some(100_000 - u64::from(LINES_OF_ALL)));
    }
}
