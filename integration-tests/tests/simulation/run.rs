//! One simulation from its seed to the complaints about it.

use std::{
    sync::{Arc, Mutex, atomic::Ordering},
    time::Duration,
};

use tokio::sync::watch;

use crate::{
    dice::{Dice, world},
    hosts::{Agent, test},
    ledger::Ledger,
    plan::{Fault, FaultKind, Plan},
    promises,
};

/// How much simulated time passes between two looks at the network.
const TICK: Duration = Duration::from_millis(5);
/// Simulated time within which every task has an outcome and the test is closed.
const END_MAX: Duration = Duration::from_secs(400);
/// Simulated time after a lease within which nothing runs any more.
const CLEAN_MAX: Duration = Duration::from_secs(30);
const CONTROLLER: &str = "controller";

/// Runs a seed and tells which promises were broken.
pub(crate) fn run(seed: u64) -> Vec<String> {
    let plan = Arc::new(Plan::of(seed));
    let world = world(seed);
    let ledger = Ledger::default();
    let results = tempfile::tempdir().unwrap();
    let states: Vec<_> =
        (0..plan.hosts).map(|_| tempfile::Builder::new().prefix("ms").tempdir_in("/tmp").unwrap()).collect();
    let mut sim = turmoil::Builder::new()
        .tick_duration(TICK)
        .simulation_duration(END_MAX)
        .max_message_latency(plan.latency)
        .tcp_capacity(4_096)
        .rng_seed(Dice::new(seed ^ 0x5eed).roll())
        .enable_tokio_io()
        .enable_random_order()
        .build();
    let agents: Vec<Agent> = states
        .iter()
        .enumerate()
        .map(|(number, state)| Agent {
            state: state.path().to_owned(),
            number,
            world: world.clone(),
            ledger: ledger.clone(),
            told_later: plan.told_later,
            disk: Arc::default(),
            cuts: watch::Sender::new(0),
        })
        .collect();
    for agent in &agents {
        agent.join(&mut sim);
    }
    let found = Arc::new(Mutex::new(None));
    sim.client(CONTROLLER, {
        let (plan, world, found) = (Arc::clone(&plan), world.clone(), Arc::clone(&found));
        let results = results.path().to_owned();
        async move { test(plan, world, &results, &found).await }
    });
    let mut faults: Vec<Running> = plan.faults.iter().map(|&fault| Running { fault, begun: false }).collect();
    loop {
        let now = sim.elapsed();
        faults.retain_mut(|fault| !fault.passes(now, &mut sim, &agents));
        match sim.step() {
            Ok(false) => {}
            Ok(true) => break,
            Err(error) => {
                let book = ledger.open();
                return vec![format!("{error}; {plan:?}; {:?}", book.order)];
            }
        }
    }
    let found = found.lock().unwrap().take().expect("a test that has ended has left its findings");
    if found.left_behind.is_some() {
        // Whoever could not be asked ends it by itself.
        let until = sim.elapsed() + plan.lease + CLEAN_MAX;
        while ledger.open().running > 0 && sim.elapsed() < until {
            sim.step().unwrap();
        }
    }
    let states: Vec<_> = states.iter().map(tempfile::TempDir::path).collect();
    let complaints = promises::check(&plan, &found, &ledger.open(), &states);
    if !complaints.is_empty() {
        eprintln!("seed {seed}: {plan:#?}");
        found.outcomes.iter().for_each(|outcome| eprintln!("{outcome}"));
    }
    complaints
}

/// A fault that has begun or will.
struct Running {
    fault: Fault,
    begun: bool,
}

impl Running {
    /// Begins or ends it when its time has come. True once it is over.
    fn passes(&mut self, now: Duration, sim: &mut turmoil::Sim<'_>, agents: &[Agent]) -> bool {
        let Fault { host, kind, begins, lasts } = self.fault;
        let (agent, door) = (&agents[host], agents[host].door());
        if !self.begun && now >= begins {
            self.begun = true;
            match kind {
                FaultKind::Partition => sim.partition(CONTROLLER, door.as_str()),
                FaultKind::Deaf => sim.partition_oneway(CONTROLLER, door.as_str()),
                FaultKind::Mute => sim.partition_oneway(door.as_str(), CONTROLLER),
                FaultKind::Hold => sim.hold(CONTROLLER, door.as_str()),
                FaultKind::Cut => agent.cuts.send_modify(|count| *count += 1),
                FaultKind::Crash => sim.crash(door.as_str()),
                FaultKind::Full => agent.disk.full.store(true, Ordering::Relaxed),
            }
            return false;
        }
        let over = self.begun && now >= begins + lasts;
        if over {
            match kind {
                FaultKind::Partition => sim.repair(CONTROLLER, door.as_str()),
                FaultKind::Deaf => sim.repair_oneway(CONTROLLER, door.as_str()),
                FaultKind::Mute => sim.repair_oneway(door.as_str(), CONTROLLER),
                FaultKind::Hold => sim.release(CONTROLLER, door.as_str()),
                FaultKind::Cut => {}
                FaultKind::Crash => sim.bounce(door.as_str()),
                FaultKind::Full => agent.disk.full.store(false, Ordering::Relaxed),
            }
        }
        over
    }
}
