//! Times of many hosts on one clock: the controller's. Pure: what was measured comes in, nothing is asked.
//!
//! A host tells its clock when it answers. The true offset lies within half of the round trip of what the middle of it
//! suggests, so the answer with the shortest round trip is the best that is known.

use jiff::Timestamp;

/// How far a host's clock is from the controller's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct HostClock {
    best: Option<Measured>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Measured {
    /// Host's clock less the controller's.
    offset_ns: i64,
    /// Half of the round trip.
    uncertainty_ns: u64,
}

impl HostClock {
    /// The clock of a host that is this very machine, or shares its kernel: the same.
    #[must_use]
    pub(crate) fn same() -> Self {
        Self { best: Some(Measured { offset_ns: 0, uncertainty_ns: 0 }) }
    }

    /// Takes in one answer: when it was asked for and when it came, by the controller's clock, and the host's own time.
    pub(crate) fn measure(&mut self, sent_ns: u64, host_ns: u64, received_ns: u64) {
        let uncertainty_ns = received_ns.saturating_sub(sent_ns) / 2;
        if self.best.is_none_or(|best| uncertainty_ns < best.uncertainty_ns) {
            let middle = sent_ns.saturating_add(uncertainty_ns);
            self.best = Some(Measured { offset_ns: difference(host_ns, middle), uncertainty_ns });
        }
    }

    /// A moment of the host on the controller's clock, in nanoseconds since 1970.
    #[must_use]
    pub(crate) fn to_controller(self, host_ns: u64) -> u64 {
        host_ns.saturating_add_signed(-self.offset_ns())
    }

    /// Host's clock less the controller's, in nanoseconds; zero while nothing is known.
    #[must_use]
    pub(crate) fn offset_ns(self) -> i64 {
        self.best.map_or(0, |best| best.offset_ns)
    }

    /// How far the offset may be wrong; none while nothing is known.
    #[must_use]
    pub(crate) fn uncertainty_ns(self) -> Option<u64> {
        self.best.map(|best| best.uncertainty_ns)
    }
}

fn difference(a: u64, b: u64) -> i64 {
    let difference = i128::from(a) - i128::from(b);
    // The negation of the offset must exist, too.
    i64::try_from(difference.clamp(i128::from(i64::MIN + 1), i128::from(i64::MAX))).unwrap_or(0)
}

/// A moment as people and programs read it: RFC 3339 in UTC, to the microsecond, always of the same length.
#[must_use]
pub(crate) fn stamp(time_ns: u64) -> String {
    let time = Timestamp::from_nanosecond(i128::from(time_ns)).unwrap_or(Timestamp::MAX);
    time.strftime("%Y-%m-%dT%H:%M:%S.%6fZ").to_string()
}

/// The moment that such a text says.
#[must_use]
pub(crate) fn unstamp(text: &str) -> Option<u64> {
    u64::try_from(text.parse::<Timestamp>().ok()?.as_nanosecond()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shortest_round_trip_is_believed() {
        let mut clock = HostClock::default();
        clock.measure(1_000, 6_000, 3_000);
        assert_eq!((clock.offset_ns(), clock.uncertainty_ns()), (4_000, Some(1_000)));
        clock.measure(10_000, 13_100, 10_200);
        assert_eq!((clock.offset_ns(), clock.uncertainty_ns()), (3_000, Some(100)));
        clock.measure(20_000, 99_000, 30_000);
        assert_eq!(clock.to_controller(13_100), 10_100);
    }

    #[test]
    fn nothing_is_believed_more_than_the_same_clock() {
        let mut clock = HostClock::same();
        clock.measure(1_000, 6_000, 1_000);
        assert_eq!(clock.offset_ns(), 0);
    }

    #[test]
    fn absurd_clocks_do_no_harm() {
        let mut clock = HostClock::default();
        assert_eq!(clock.to_controller(5), 5);
        clock.measure(u64::MAX, 0, 0);
        assert_eq!(clock.to_controller(7), i64::MAX.unsigned_abs() + 7);
        assert_eq!(stamp(0), "1970-01-01T00:00:00.000000Z");
        assert_eq!(stamp(1_795_300_643_123_456_789), "2026-11-21T22:37:23.123456Z");
        assert_eq!(stamp(u64::MAX).len(), stamp(0).len());
        assert_eq!(unstamp("2026-11-21T22:37:23.123456Z"), Some(1_795_300_643_123_456_000));
        assert_eq!((unstamp("yesterday"), unstamp("1969-12-31T23:59:59Z")), (None, None));
    }
}
