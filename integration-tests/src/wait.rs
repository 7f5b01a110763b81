//! Waiting for what has no event: processes that are not our children, files that others write. The one place where a test
//! looks twice; every wait has a bound and says what it waited for.

use std::{
    thread,
    time::{Duration, Instant},
};

/// Between two looks: short beside anything that is waited for, long beside the cost of a look.
const PAUSE: Duration = Duration::from_millis(10);

/// Looks until there is something to see and returns it.
///
/// # Panics
/// When there is nothing after `bound`; the message says `what` was missed.
#[expect(clippy::disallowed_methods, reason = "real time passes in the processes that are looked at")]
pub fn wait_until<T>(what: &str, bound: Duration, mut look: impl FnMut() -> Option<T>) -> T {
    let begin = Instant::now();
    loop {
        if let Some(seen) = look() {
            return seen;
        }
        assert!(begin.elapsed() < bound, "waited {bound:?} in vain: {what}");
        thread::sleep(PAUSE);
    }
}

/// As [`wait_until`], for what is either so or not.
///
/// # Panics
/// When it is not so after `bound`.
pub fn wait_until_true(what: &str, bound: Duration, mut look: impl FnMut() -> bool) {
    wait_until(what, bound, || look().then_some(()));
}

/// Whether something becomes so within a bound: for tidying, which may not panic.
#[expect(clippy::disallowed_methods, reason = "real time passes in the processes that are looked at")]
pub fn is_soon(bound: Duration, mut look: impl FnMut() -> bool) -> bool {
    let begin = Instant::now();
    loop {
        if look() {
            return true;
        }
        if begin.elapsed() >= bound {
            return false;
        }
        thread::sleep(PAUSE);
    }
}
