//! What a seed decides: the blocks of a test, when they are ended by hand, and the faults of its world.

use std::time::Duration;

use crate::{dice::Dice, scripts::Step};

/// Everything that happens in one simulation.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) hosts: usize,
    /// For each stream, the host that it is on.
    pub(crate) streams: Vec<usize>,
    pub(crate) lease: Duration,
    pub(crate) orders: Vec<Order>,
    pub(crate) faults: Vec<Fault>,
    /// Whether processes are told to have started later than they are ordered to.
    pub(crate) told_later: bool,
    /// Longest time that a message is under way.
    pub(crate) latency: Duration,
}

/// What the test does, one after the other.
#[derive(Debug, Clone)]
pub(crate) enum Order {
    Run {
        stream: usize,
        steps: Vec<Step>,
    },
    /// Prepares a block, and lets it go later.
    Prepare {
        stream: usize,
        steps: Vec<Step>,
    },
    /// Lets the oldest prepared block go, if there is one.
    Go,
    /// Stops the task of this number in the test, from 0.
    Stop {
        task: usize,
    },
    Cancel {
        task: usize,
    },
    Pause {
        millis: u64,
    },
}

/// Something goes wrong on the way to a host, for a while.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Fault {
    pub(crate) host: usize,
    pub(crate) kind: FaultKind,
    pub(crate) begins: Duration,
    pub(crate) lasts: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FaultKind {
    /// Nothing comes through, in either direction, and nobody is told.
    Partition,
    /// What the controller says is lost.
    Deaf,
    /// What the host says is lost.
    Mute,
    /// Everything is held up, and comes through at the end.
    Hold,
    /// All connections are cut, and both ends know.
    Cut,
    /// The agent's door is killed, and started again at the end.
    Crash,
    /// Nothing of tasks can be written on the host.
    Full,
}

impl Plan {
    pub(crate) fn of(seed: u64) -> Self {
        let mut dice = Dice::new(seed);
        let hosts = if dice.percent(50) { 2 } else { 1 };
        let streams: Vec<usize> =
            (0..dice.among(1..=4)).map(|number| usize::try_from(number).unwrap() % hosts).collect();
        // A short lease makes it likely that a fault outlasts it.
        let lease = if dice.percent(25) { dice.millis(1_000..=4_000) } else { Duration::from_secs(30) };
        let orders = orders(&mut dice, streams.len());
        let mut faults: Vec<Fault> = (0..dice.among(0..=4)).map(|_| fault(&mut dice, hosts)).collect();
        let latency = dice.millis(2..=60);
        let told_later = dice.percent(30);
        // Rolled last: whatever is added goes here, so that seeds which once found something stay what they were.
        if dice.percent(20) {
            faults.push(Fault { kind: FaultKind::Full, ..fault(&mut dice, hosts) });
        }
        Self { hosts, streams, lease, orders, faults, told_later, latency }
    }

    /// Whether a session may have been lost: a fault can outlast what a controller believes of its lease.
    pub(crate) fn may_lose_sessions(&self) -> bool {
        // Silent connections are noticed late, and coming back takes some attempts.
        let slack = Duration::from_secs(14);
        self.faults.iter().any(|fault| fault.lasts + slack >= self.lease)
    }

    /// Whether a disk is full for a while.
    pub(crate) fn may_fill_disks(&self) -> bool {
        self.faults.iter().any(|fault| fault.kind == FaultKind::Full)
    }
}

fn orders(dice: &mut Dice, streams: usize) -> Vec<Order> {
    let mut orders = Vec::new();
    let mut tasks = 0;
    for round in 0..dice.among(1..=4) {
        if streams > 1 && dice.percent(60) {
            // A barrier of all streams, which somebody may miss.
            let barrier = format!("round-{round}");
            for stream in 0..streams {
                let parties = u32::try_from(streams).unwrap();
                let mut steps = vec![
                    Step::Pause { millis: dice.among(0..=400) },
                    Step::Meet { barrier: barrier.clone(), parties },
                ];
                if dice.percent(10) {
                    steps.insert(0, Step::Exit { code: 7 });
                }
                orders.push(Order::Run { stream, steps });
                tasks += 1;
            }
        } else {
            for _ in 0..dice.among(1..=6) {
                let (stream, steps) = (dice.index(streams), steps(dice));
                let prepare = dice.percent(15);
                orders.push(if prepare {
                    Order::Prepare { stream, steps }
                } else {
                    Order::Run { stream, steps }
                });
                tasks += 1;
                if prepare && dice.percent(70) {
                    orders.push(Order::Go);
                }
            }
        }
        if dice.percent(60) {
            orders.push(Order::Pause { millis: dice.among(0..=2_500) });
        }
        if dice.percent(25) {
            let task = dice.index(tasks);
            orders.push(if dice.percent(70) { Order::Stop { task } } else { Order::Cancel { task } });
        }
    }
    orders
}

fn steps(dice: &mut Dice) -> Vec<Step> {
    let mut steps = Vec::new();
    if dice.percent(10) {
        steps.push(Step::Stubborn);
    }
    for _ in 0..dice.among(1..=4) {
        steps.push(match dice.among(0..=9) {
            0..=3 => Step::Pause { millis: dice.among(1..=900) },
            4..=8 => {
                // Some more than comes with the events of a session.
                let bytes = if dice.percent(20) { 200_000 } else { 6_000 };
                let bytes = usize::try_from(dice.among(1..=bytes)).unwrap();
                Step::Print { stderr: dice.percent(30), bytes }
            }
            _ => Step::Exit { code: i32::from(dice.percent(50)) },
        });
    }
    steps
}

fn fault(dice: &mut Dice, hosts: usize) -> Fault {
    use FaultKind::{Crash, Cut, Deaf, Hold, Mute, Partition};
    let kinds = [Partition, Deaf, Mute, Hold, Hold, Cut, Cut, Crash, Crash];
    let kind = kinds[dice.index(kinds.len())];
    let lasts = if dice.percent(70) { dice.millis(5..=800) } else { dice.millis(800..=9_000) };
    Fault { host: dice.index(hosts), kind, begins: dice.millis(0..=6_000), lasts }
}
