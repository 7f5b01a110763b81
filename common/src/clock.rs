//! Clocks and numbers as values that are handed in, so that a test or a simulation can hold them.
//!
//! Loops at the edge ask a [`Clock`] once per turn and pass the instant on; pure rooms never ask.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, SystemTime},
};

use tokio::time::Instant;
use uuid::Uuid;

use crate::id::{SessionId, TaskId};

/// What time it is, on the three clocks that mean different things.
pub trait Clock: Send + Sync + fmt::Debug {
    /// A clock that never goes back and is never set; the runtime's own, so that its timers agree with it.
    fn now(&self) -> Instant;

    /// Since the host was started, time asleep included: what leases on a host are counted on.
    fn since_boot(&self) -> Duration;

    /// Wall clock, in nanoseconds since 1970: shown to people, never computed with.
    fn wall_ns(&self) -> u64;
}

/// The clocks of this host.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> Instant {
        Instant::now()
    }

    fn since_boot(&self) -> Duration {
        let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
        Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or(0))
    }

    #[expect(clippy::disallowed_methods, reason = "the one place where the wall clock is read")]
    fn wall_ns(&self) -> u64 {
        let since_1970 = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        u64::try_from(since_1970.as_nanos()).unwrap_or(u64::MAX)
    }
}

/// Numbers that nobody else has.
pub trait Ids: Send + Sync + fmt::Debug {
    /// A number for a task.
    fn task_id(&self) -> TaskId;

    /// A number for a session.
    fn session_id(&self) -> SessionId;

    /// 128 random bits as 32 hexadecimal digits: a secret or a token.
    fn token(&self) -> String;
}

/// Numbers from the system's randomness and clock.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemIds;

#[expect(clippy::disallowed_methods, reason = "the one place where numbers are made")]
impl Ids for SystemIds {
    fn task_id(&self) -> TaskId {
        TaskId::from_uuid(Uuid::now_v7())
    }

    fn session_id(&self) -> SessionId {
        SessionId::from_uuid(Uuid::now_v7())
    }

    fn token(&self) -> String {
        // The two lower halves have 62 random bits each; XOR-ing in the upper ones of two more fills the fixed bits.
        let bits = Uuid::new_v4().as_u128() ^ Uuid::new_v4().as_u128().rotate_left(64);
        format!("{bits:032x}")
    }
}

/// Clock and numbers together, as they are handed through the house.
#[derive(Debug, Clone)]
pub struct World {
    /// What time it is.
    pub clock: Arc<dyn Clock>,
    /// Numbers that nobody else has.
    pub ids: Arc<dyn Ids>,
}

impl World {
    /// The real one.
    #[must_use]
    pub fn system() -> Self {
        Self { clock: Arc::new(SystemClock), ids: Arc::new(SystemIds) }
    }
}
