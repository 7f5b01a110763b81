//! What a seed decides: the blocks of a test, when they are ended by hand, and the faults of its world.

use std::{collections::BTreeMap, ops::Range, time::Duration};

use crate::{
    dice::Dice,
    steps::{Program, Step},
};

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
    /// Whether the test has its hosts for itself.
    pub(crate) exclusive: bool,
    pub(crate) kill: Option<Kill>,
}

/// The test is killed as a process is, and started again.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Kill {
    pub(crate) at: Duration,
    pub(crate) back_after: Duration,
}

/// What the test does, one after the other.
#[derive(Debug, Clone)]
pub(crate) enum Order {
    Run {
        stream: usize,
        program: Program,
    },
    /// Prepares a block, and lets it go later.
    Prepare {
        stream: usize,
        program: Program,
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
    /// All supervisors of the host are killed, with what they run; none can be started before the end.
    Supervisors,
}

/// Seeds whose plans are narrow: they have no topics, results, several phases or kills of controllers and supervisors. Some
/// of them once found something.
pub(crate) const NARROW: Range<u64> = 0..100;

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
        let (exclusive, kill) = (false, None);
        let mut plan = Self { hosts, streams, lease, orders, faults, told_later, latency, exclusive, kill };
        if !NARROW.contains(&seed) {
            plan.widen(&mut dice);
        }
        plan
    }

    fn widen(&mut self, dice: &mut Dice) {
        let mut published = BTreeMap::new();
        for order in &mut self.orders {
            if let Order::Run { program, .. } | Order::Prepare { program, .. } = order {
                widen(dice, program, &mut published);
            }
        }
        if dice.percent(35) {
            let lasts = dice.millis(5..=800);
            let kind = FaultKind::Supervisors;
            self.faults.push(Fault { kind, lasts, ..fault(dice, self.hosts) });
        }
        self.exclusive = dice.percent(30);
        if dice.percent(35) {
            let back_after =
                if dice.percent(80) { dice.millis(5..=3_000) } else { dice.millis(3_000..=12_000) };
            self.kill = Some(Kill { at: dice.millis(200..=6_000), back_after });
        }
    }

    /// The programs of the tasks, in the order in which they are scheduled.
    pub(crate) fn programs(&self) -> impl Iterator<Item = &Program> {
        self.orders.iter().filter_map(|order| match order {
            Order::Run { program, .. } | Order::Prepare { program, .. } => Some(program),
            _ => None,
        })
    }

    /// Whether the test wants this task ended, by its number from 0.
    pub(crate) fn ends(&self, number: usize) -> bool {
        self.orders
            .iter()
            .any(|order| matches!(order, Order::Stop { task } | Order::Cancel { task } if *task == number))
    }

    /// Whether a session may have been lost: a fault can outlast what a controller believes of its lease.
    pub(crate) fn may_lose_sessions(&self) -> bool {
        // Silent connections are noticed late, and coming back takes some attempts.
        let slack = Duration::from_secs(14);
        self.faults.iter().any(|fault| fault.lasts + slack >= self.lease)
    }

    /// Whether a fault of this kind happens.
    pub(crate) fn has(&self, kind: FaultKind) -> bool {
        self.faults.iter().any(|fault| fault.kind == kind)
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
                orders.push(Order::Run { stream, program: Program::of(steps) });
                tasks += 1;
            }
        } else {
            for _ in 0..dice.among(1..=6) {
                let (stream, program) = (dice.index(streams), Program::of(steps(dice)));
                let prepare = dice.percent(15);
                orders.push(if prepare {
                    Order::Prepare { stream, program }
                } else {
                    Order::Run { stream, program }
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

/// Adds results, values of topics and more phases. `published` counts what was published by then, by topic.
fn widen(dice: &mut Dice, program: &mut Program, published: &mut BTreeMap<String, u32>) {
    let mut put = |dice: &mut Dice, step: Step| {
        let place = dice.index(program.run.len() + 1);
        program.run.insert(place, step);
    };
    if dice.percent(30) {
        let bytes = if dice.percent(20) { 300_000 } else { 3_000 };
        let bytes = usize::try_from(dice.among(0..=bytes)).unwrap();
        put(dice, Step::Leave { bytes });
    }
    let topic = format!("topic-{}", dice.among(0..=1));
    let count = published.entry(topic.clone()).or_default();
    // Sometimes one more than there will be.
    let wanted = (*count).max(1) + u32::from(dice.percent(20));
    match dice.among(0..=9) {
        0..=2 => {
            *count += 1;
            put(dice, Step::Publish { topic });
        }
        3 => put(dice, Step::Await { topic, count: wanted }),
        4 => put(dice, Step::Follow { topic, count: wanted }),
        _ => {}
    }
    if dice.percent(20) {
        program.setup = steps(dice);
    }
    if dice.percent(25) {
        program.teardown = steps(dice);
        if dice.percent(30) {
            program.teardown.insert(0, Step::Leave { bytes: 100 });
        }
    }
}

fn fault(dice: &mut Dice, hosts: usize) -> Fault {
    use FaultKind::{Crash, Cut, Deaf, Hold, Mute, Partition};
    let kinds = [Partition, Deaf, Mute, Hold, Hold, Cut, Cut, Crash, Crash];
    let kind = kinds[dice.index(kinds.len())];
    let lasts = if dice.percent(70) { dice.millis(5..=800) } else { dice.millis(800..=9_000) };
    Fault { host: dice.index(hosts), kind, begins: dice.millis(0..=6_000), lasts }
}
