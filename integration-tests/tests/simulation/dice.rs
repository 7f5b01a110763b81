//! Everything that a seed decides is rolled here, and what time and numbers are in a simulation.

use std::{
    ops::RangeInclusive,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use millstream_common::{
    clock::{Clock, Ids, World},
    id::{SessionId, TaskId},
};
use tokio::time::Instant;
use uuid::{Builder, Uuid};

/// Numbers that follow from a seed (SplitMix64).
#[derive(Debug, Clone)]
pub(crate) struct Dice(u64);

impl Dice {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    pub(crate) fn among(&mut self, range: RangeInclusive<u64>) -> u64 {
        range.start() + self.roll() % (range.end() - range.start() + 1)
    }

    pub(crate) fn index(&mut self, length: usize) -> usize {
        usize::try_from(self.among(0..=length as u64 - 1)).unwrap()
    }

    pub(crate) fn millis(&mut self, range: RangeInclusive<u64>) -> Duration {
        Duration::from_millis(self.among(range))
    }

    pub(crate) fn percent(&mut self, chance: u64) -> bool {
        self.among(1..=100) <= chance
    }
}

/// How long the simulated hosts have been up when a simulation begins.
const UPTIME: Duration = Duration::from_secs(1_000);
/// Wall clock at the beginning: some day in 2025.
const BEGIN_NS: u64 = 1_750_000_000_000_000_000;

/// The clocks of the host that asks.
#[derive(Debug)]
struct SimulatedClock;

impl Clock for SimulatedClock {
    fn now(&self) -> Instant {
        Instant::now()
    }

    fn since_boot(&self) -> Duration {
        UPTIME + turmoil::sim_elapsed().unwrap_or_default()
    }

    fn wall_ns(&self) -> u64 {
        BEGIN_NS + u64::try_from(self.since_boot().as_nanos()).unwrap()
    }
}

#[derive(Debug)]
struct SeededIds {
    seed: u64,
    made: AtomicU64,
}

impl SeededIds {
    /// In order of their making, as those of version 7 are.
    fn uuid(&self) -> Uuid {
        let number = self.made.fetch_add(1, Ordering::Relaxed);
        let mut dice = Dice::new(self.seed ^ number);
        let mut random = [0; 10];
        random[..8].copy_from_slice(&dice.roll().to_le_bytes());
        random[8..].copy_from_slice(&dice.roll().to_le_bytes()[..2]);
        Builder::from_unix_timestamp_millis(BEGIN_NS / 1_000_000 + number, &random).into_uuid()
    }
}

impl Ids for SeededIds {
    fn task_id(&self) -> TaskId {
        TaskId::from_uuid(self.uuid())
    }

    fn session_id(&self) -> SessionId {
        SessionId::from_uuid(self.uuid())
    }

    fn token(&self) -> String {
        let bits = self.uuid().as_u128() ^ self.uuid().as_u128().rotate_left(64);
        format!("{bits:032x}")
    }
}

/// Clocks and numbers of everybody in a simulation.
pub(crate) fn world(seed: u64) -> World {
    World { clock: Arc::new(SimulatedClock), ids: Arc::new(SeededIds { seed, made: AtomicU64::new(1) }) }
}
