//! One simulation from its seed to the complaints about it.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use tokio::sync::watch;

use crate::{
    dice::{Dice, world},
    hosts::{Agent, Killable, test},
    ledger::Ledger,
    plan::{Fault, FaultKind, Kill, Plan},
    promises,
};

/// How much simulated time passes between two looks at the network.
const TICK: Duration = Duration::from_millis(5);
/// Simulated time within which every task has an outcome and the test is closed.
const END_MAX: Duration = Duration::from_secs(400);
/// Simulated time after a lease within which nothing runs any more.
const CLEAN_MAX: Duration = Duration::from_secs(30);
/// Looks at the network between two looks at the disks.
const LOOKS_EVERY: u32 = 100;
const CONTROLLER: &str = "controller";

/// Runs a seed and tells which promises were broken.
pub(crate) fn run(seed: u64) -> Vec<String> {
    let plan = Arc::new(Plan::of(seed));
    let world = world(seed);
    let ledger = Ledger::default();
    let results = tempfile::tempdir().unwrap();
    let states: Vec<_> =
        (0..plan.hosts).map(|_| tempfile::Builder::new().prefix("ms").tempdir_in("/tmp").unwrap()).collect();
    let found = Arc::new(Mutex::new(None));
    let tests = AtomicU32::new(0);
    let mut sim = turmoil::Builder::new()
        .tick_duration(TICK)
        .simulation_duration(Duration::MAX)
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
    sim.host(CONTROLLER, || {
        let number = tests.fetch_add(1, Ordering::Relaxed);
        let (plan, world, found) = (Arc::clone(&plan), world.clone(), Arc::clone(&found));
        Killable::new(test(plan, number, world, results.path().to_owned(), found))
    });
    let mut faults: Vec<Running> = plan.faults.iter().map(|&fault| Running { fault, begun: false }).collect();
    let mut kill = plan.kill;
    while found.lock().unwrap().is_none() {
        let now = sim.elapsed();
        faults.retain_mut(|fault| !fault.passes(now, &mut sim, &agents));
        if let Some(Kill { at, back_after }) = kill {
            if now >= at && sim.is_host_running(CONTROLLER) {
                sim.crash(CONTROLLER);
            }
            if now >= at + back_after {
                sim.bounce(CONTROLLER);
                kill = None;
            }
        }
        let stuck = (now >= END_MAX).then(|| format!("the test has not ended after {END_MAX:?}"));
        if let Some(problem) = stuck.or_else(|| sim.step().err().map(|error| error.to_string())) {
            return vec![format!("{problem}; {plan:#?}; {:#?}", ledger.open().events)];
        }
    }
    let found = found.lock().unwrap().take().expect("it was there when it was looked for");
    let states: Vec<_> = states.iter().map(tempfile::TempDir::path).collect();
    if found.left_behind.is_some() || tests.load(Ordering::Relaxed) > 1 {
        // What nobody owns, or whoever could not be asked, ends by itself.
        let until = sim.elapsed() + plan.lease + CLEAN_MAX;
        while sim.elapsed() < until && (ledger.open().running > 0 || !promises::ownerless(&states).is_empty())
        {
            for _ in 0..LOOKS_EVERY {
                // A door that was killed comes back all the same.
                faults.retain_mut(|fault| !fault.passes(sim.elapsed(), &mut sim, &agents));
                sim.step().unwrap();
            }
        }
    }
    let complaints = promises::check(&plan, &found, &ledger.open(), &states, results.path());
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
                FaultKind::Supervisors => sim.crash(agent.supervisors()),
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
                FaultKind::Supervisors => sim.bounce(agent.supervisors()),
            }
        }
        over
    }
}
