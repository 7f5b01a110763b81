//! Several tests share hosts: they wait in line for each other, for minutes of simulated time, and come to their ends.

use std::{
    future::Future,
    pin::Pin,
    sync::{Arc, Mutex},
    time::Duration,
};

use millstream::{Definition, OutcomeKind, Streams, StreamsBuilder, Task};
use millstream_common::clock::World;
use tokio::{runtime::Handle, sync::watch};

use crate::{
    dice::{Dice, world},
    hosts::{Agent, register_network},
    ledger::Ledger,
    scripts::pause,
    steps::{Program, Step},
};

pub(crate) type Test = Pin<Box<dyn Future<Output = turmoil::Result>>>;

/// Runs tests beside each other on hosts that nothing goes wrong with, until all have ended.
pub(crate) fn simulate(seed: u64, hosts: usize, tests: impl FnOnce(&World) -> Vec<(&'static str, Test)>) {
    register_network();
    let world = world(seed);
    let mut sim = turmoil::Builder::new()
        .tick_duration(Duration::from_millis(20))
        .simulation_duration(Duration::from_secs(3_000))
        .max_message_latency(Duration::from_millis(50))
        .tcp_capacity(4_096)
        .rng_seed(seed)
        .enable_tokio_io()
        .enable_random_order()
        .build();
    let states: Vec<_> =
        (0..hosts).map(|_| tempfile::Builder::new().prefix("ms").tempdir_in("/tmp").unwrap()).collect();
    for (number, state) in states.iter().enumerate() {
        let agent = Agent {
            state: state.path().to_owned(),
            number,
            world: world.clone(),
            ledger: Ledger::default(),
            told_later: false,
            disk: Arc::default(),
            cuts: watch::Sender::new(0),
        };
        agent.join(&mut sim);
    }
    for (name, test) in tests(&world) {
        sim.client(name, test);
    }
    sim.run().unwrap();
}

/// A test by its name, with the streams `a`, `b` … on the hosts in that order.
pub(crate) fn opened(
    name: &str,
    world: &World,
    results: &tempfile::TempDir,
    exclusive: &str,
    more: impl FnOnce(StreamsBuilder) -> StreamsBuilder,
) -> Streams {
    let mut builder = Streams::builder(name).only_given().results_dir(results.path());
    for (number, stream) in ["a", "b"].into_iter().enumerate() {
        let definition = Definition::url(format!("sim://door-{number}"));
        let definition = if exclusive.contains(stream) { definition.exclusive() } else { definition };
        builder = builder.stream(stream, definition);
    }
    more(builder).simulated(world.clone(), Handle::current()).open().unwrap()
}

/// Schedules a program that takes its time.
fn busy(streams: &Streams, stream: &str, seconds: u64) -> Task {
    let steps = vec![Step::Pause { millis: seconds * 1_000 }];
    streams.get(stream).unwrap().run_bg(Program::of(steps).block(0))
}

/// Asks a task why it does not run, until it says this.
async fn explained(task: &Task, what: &str) -> String {
    loop {
        let said = task.explain().await;
        if said.contains(what) {
            return said;
        }
        pause(Duration::from_millis(200)).await;
    }
}

#[test]
fn tests_wait_in_line_for_as_long_as_they_say_and_can_tell_for_whom() {
    let results = Arc::new(tempfile::tempdir().unwrap());
    let said = Arc::new(Mutex::new(Vec::new()));
    simulate(1, 1, |world| {
        let test = |name: &'static str, after: u64, wait: u64, said: Arc<Mutex<Vec<String>>>| {
            let (world, results) = (world.clone(), Arc::clone(&results));
            let test: Test = Box::pin(async move {
                pause(Duration::from_secs(after)).await;
                let begin = world.clock.now();
                let wait = Duration::from_secs(wait);
                let streams = opened(name, &world, &results, "a", |builder| builder.wait(wait));
                let task = busy(&streams, "a", 200);
                if after > 0 {
                    let waits = explained(&task, "waits in line").await;
                    said.lock().unwrap().push(waits);
                }
                let outcome = task.outcome().await;
                let waited = world.clock.now() - begin;
                said.lock().unwrap().push(format!("{name}: {} {}", outcome.kind, outcome.detail));
                // Neither sooner than it could be nor later than it must be.
                let expected = match name {
                    "alice" => 200..202,
                    "bob" => 398..402,
                    _ => 60..67,
                };
                assert!(expected.contains(&waited.as_secs()), "{name}: {waited:?}");
                streams.close().await?;
                Ok(())
            });
            (name, test)
        };
        vec![
            test("alice", 0, 600, Arc::clone(&said)),
            test("bob", 1, 600, Arc::clone(&said)),
            test("carol", 2, 60, Arc::clone(&said)),
        ]
    });
    let said = said.lock().unwrap().join("\n");
    for part in [
        "on stream a waits in line for door-0 since ",
        ", at most 10 min 0 s: the host is reserved by whoever started this agent (alice on ",
        "nobody else is in line\n",
        "; 1 is before this asking in line\n",
        "carol: error door-0 could not be had within 1 min 0 s: the host is reserved by",
        "Give the stream a longer `wait`, or run the test when the host is free",
        "bob: passed",
    ] {
        assert!(said.contains(part), "{part:?} is not in:\n{said}");
    }
}

#[test]
fn tests_that_use_the_same_hosts_in_opposite_orders_do_not_lock_each_other_out() {
    // All reserved by definition; and one of each reserved, both taken together because the test says so.
    for (seed, exclusive) in (10..).zip([["ab", "ab"], ["a", "b"], ["b", "a"], ["ab", "ab"]]) {
        let results = Arc::new(tempfile::tempdir().unwrap());
        let met = Arc::new(Mutex::new(0));
        simulate(seed, 2, |world| {
            let mut dice = Dice::new(seed);
            let mut test = |name: &'static str, order: [&'static str; 2], exclusive: &'static str| {
                let (world, results, met) = (world.clone(), Arc::clone(&results), Arc::clone(&met));
                let (before, between) = (dice.millis(0..=100), dice.millis(0..=500));
                let test: Test = Box::pin(async move {
                    pause(before).await;
                    let streams =
                        opened(name, &world, &results, exclusive, |builder| builder.take_together(order));
                    // Held up in a barrier, they need both hosts to come to an end.
                    let steps = vec![
                        Step::Meet { barrier: "both".to_owned(), parties: 2 },
                        Step::Pause { millis: 5_000 },
                    ];
                    let meet = || Program::of(steps.clone()).block(0);
                    let first = streams.get(order[0])?.run_bg(meet());
                    pause(between).await;
                    let second = streams.get(order[1])?.run_bg(meet());
                    for task in [first, second] {
                        let outcome = task.outcome().await;
                        assert!(outcome.passed(), "{name}: {outcome}");
                    }
                    streams.close().await?;
                    *met.lock().unwrap() += 1;
                    Ok(())
                });
                (name, test)
            };
            vec![test("alice", ["a", "b"], exclusive[0]), test("bob", ["b", "a"], exclusive[1])]
        });
        assert_eq!(*met.lock().unwrap(), 2);
    }
}

#[test]
fn of_two_tests_that_wait_for_each_other_the_one_that_waits_against_the_order_gives_up() {
    let results = Arc::new(tempfile::tempdir().unwrap());
    let ends = Arc::new(Mutex::new(Vec::new()));
    simulate(2, 2, |world| {
        let test = |name: &'static str, order: [&'static str; 2]| {
            let (world, results, ends) = (world.clone(), Arc::clone(&results), Arc::clone(&ends));
            let test: Test = Box::pin(async move {
                let begin = world.clock.now();
                // Only the first is taken before anything begins; the other when it is used.
                let streams =
                    opened(name, &world, &results, "ab", |builder| builder.take_together([order[0]]));
                let first = busy(&streams, order[0], 5).outcome().await;
                assert!(first.passed(), "{name}: {first}");
                let second = busy(&streams, order[1], 5).outcome().await;
                let took = (world.clock.now() - begin).as_secs();
                ends.lock().unwrap().push((name, second.kind, took, second.detail.clone()));
                streams.close().await?;
                Ok(())
            });
            (name, test)
        };
        vec![test("alice", ["a", "b"]), test("bob", ["b", "a"])]
    });
    let ends = ends.lock().unwrap();
    let (bob, alice) = (&ends[0], &ends[1]);
    assert_eq!(
        (bob.0, bob.1, alice.0, alice.1),
        ("bob", OutcomeKind::Error, "alice", OutcomeKind::Passed),
        "{ends:?}"
    );
    // Half a minute after bob has heard that somebody wants what it holds, which it hears within ten seconds.
    assert!((35..56).contains(&bob.2) && alice.2 < 66, "{ends:?}");
    assert!(bob.3.contains("This test holds door-1, which others wait for"), "{}", bob.3);
    assert!(bob.3.contains("reserved by") && bob.3.contains("(alice on "), "{}", bob.3);
}
