//! Several controllers share real agents: reservations, the line of those who wait, and what an administrator allows.

use std::{path::Path, sync::Arc, thread, time::Duration};

use millstream::{Definition, Outcome, OutcomeKind, Streams, Task, exec};
use millstream_integration_tests::{agent::Agent, wait::wait_until};

use crate::support::{SOON, Ticker, block_on};

/// A test with one stream for each agent, named `a`, `b` …
fn opened(name: &str, directory: &Path, agents: &[&Agent], exclusive: bool) -> Streams {
    let mut builder = Streams::builder(name).only_given().results_dir(directory.join("results"));
    for (stream, agent) in ["a", "b"].into_iter().zip(agents) {
        let definition = Definition::url(agent.unix_url()).wait(Duration::from_secs(300));
        let definition = if exclusive { definition.exclusive() } else { definition };
        builder = builder.stream(stream, definition);
    }
    builder.open().unwrap()
}

/// What became of a task that ends soon.
fn ended(task: &Task) -> Arc<Outcome> {
    block_on(async {
        let ended = tokio::time::timeout(SOON, task.outcome()).await;
        match ended {
            Ok(outcome) => outcome,
            Err(_elapsed) => panic!("the task does not end: {}", task.explain().await),
        }
    })
}

fn explained(task: &Task, what: &str) -> String {
    wait_until(what, SOON, || Some(block_on(task.explain())).filter(|said| said.contains(what)))
}

#[test]
fn a_reserved_host_is_had_in_the_order_of_asking_and_whoever_waits_sees_for_whom() {
    let directory = tempfile::tempdir().unwrap();
    let agent = Agent::start_here(&directory.path().join("a"), "");
    let open = |name: &str, exclusive| opened(name, directory.path(), &[&agent], exclusive);
    let (alice, bob, carol) = (open("alice", true), open("bob", true), open("carol", false));
    let ticker = Ticker::new(&directory.path().join("ticker"));
    let holding = alice.get("a").unwrap().run_bg(ticker.block());
    ticker.wait_for_more(1);
    let second = bob.get("a").unwrap().run_bg(exec(["true"]));
    let said = explained(&second, "waits in line for");
    assert!(said.contains("task 1-true on stream a waits in line for unix://"), "{said}");
    assert!(said.contains("at most 5 min 0 s: the host is reserved by local user "), "{said}");
    assert!(said.contains("(alice on ") && said.contains("; nobody else is in line"), "{said}");
    let third = carol.get("a").unwrap().run_bg(exec(["true"]));
    explained(&third, "; 1 is before this asking in line");
    // Whoever gives up makes room at once for those behind it.
    block_on(bob.close()).unwrap();
    explained(&third, "; nobody else is in line");
    ticker.release();
    assert!(ended(&holding).passed());
    block_on(alice.close()).unwrap();
    assert!(ended(&third).passed(), "{}", agent.log());
    block_on(carol.close()).unwrap();
    assert!(!ended(&second).passed());
}

/// Uses both hosts, the one that is named first before the other.
fn uses_both(name: &str, directory: &Path, agents: [&Agent; 2], order: [&str; 2]) -> [Arc<Outcome>; 2] {
    let streams = opened(name, directory, &agents, true);
    // Each is held until the other is there too.
    let meet = || exec(["millstream-sync", "barrier", "both", "2"]);
    let tasks = order.map(|stream| streams.get(stream).unwrap().run_bg(meet()));
    let outcomes = tasks.map(|task| ended(&task));
    block_on(streams.close()).unwrap();
    outcomes
}

#[test]
fn two_controllers_with_opposite_orders_of_use_do_not_lock_each_other_out() {
    let directory = tempfile::tempdir().unwrap();
    let agents = ["a", "b"].map(|name| Agent::start_here(&directory.path().join(name), ""));
    thread::scope(|scope| {
        let both = [("alice", ["a", "b"]), ("bob", ["b", "a"])].map(|(name, order)| {
            let (directory, agents) = (directory.path(), [&agents[0], &agents[1]]);
            scope.spawn(move || {
                (0..5).flat_map(|_| uses_both(name, directory, agents, order)).collect::<Vec<_>>()
            })
        });
        for test in both {
            for outcome in test.join().unwrap() {
                assert!(outcome.passed(), "{outcome}");
            }
        }
    });
}

#[test]
fn an_administrators_limits_are_kept_and_told() {
    let directory = tempfile::tempdir().unwrap();
    let limits = "limits:\n  lease: 5s\n  sessions: 1\n  tasks: 3\n";
    let agent = Agent::start_here(&directory.path().join("a"), limits);
    let first = opened("first", directory.path(), &[&agent], false);
    let stream = first.get("a").unwrap();
    let ticker = Ticker::new(&directory.path().join("ticker"));
    let running = stream.run_bg(ticker.block());
    ticker.wait_for_more(1);
    assert!(agent.log().contains("a session was granted a shorter lease"), "{}", agent.log());

    let second = opened("second", directory.path(), &[&agent], false);
    let refused = ended(&second.get("a").unwrap().run_bg(exec(["true"])));
    assert_eq!(refused.kind, OutcomeKind::Error);
    let told = &refused.detail;
    assert!(
        told.contains("has 1 session here, which is its limit `sessions` on this host: first on "),
        "{told}"
    );
    block_on(second.close()).unwrap();

    // Three may be there, and one runs: which of four the host takes depends on the order in which they come.
    let queued: Vec<Task> = (0..4).map(|_| stream.run_bg(exec(["true"]))).collect();

    // Longer than the lease that was granted, which is renewed in time.
    let from = ticker.ticks();
    wait_until("more than a lease passes", SOON, || (ticker.ticks() > from + 120).then_some(()));
    ticker.release();
    let outcome = ended(&running);
    assert!(outcome.passed(), "{outcome}");
    let (taken, refused): (Vec<_>, Vec<_>) = queued.iter().map(ended).partition(|outcome| outcome.passed());
    assert_eq!((taken.len(), refused.len()), (2, 2), "{refused:?}");
    for outcome in refused {
        let told = "has 3 tasks here, which is its limit `tasks` on this host";
        assert!(outcome.detail.contains(told), "{outcome}");
    }
    block_on(first.close()).unwrap();
}
