//! Streams on the nodes of a cluster, by a real scheduler: `slurm://`.

use std::{
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Command, Stdio},
};

use expect_test::expect;
use millstream::{
    Definition, OutcomeKind, Ready, Result, Streams, StreamsBuilder, conformance::check, shell,
};
use millstream_integration_tests::{
    processes,
    slurm::{Cluster, PARTITION},
    tools,
    wait::{wait_until, wait_until_true},
};

use rustix::process::{Pid, Signal, kill_process_group};

use crate::{
    conformance::{is_sound, survivor},
    support::{SOON, block_on},
};

/// Tells the node and the job that it is on, and meets the others.
const TELLS_NODE: &str = r#"
    echo "$SLURMD_NODENAME $SLURM_NODEID/$SLURM_NNODES $SLURM_JOB_NODELIST $SLURM_NODELIST ${SLURM_STEP_ID-} $SLURM_JOB_ID"
    millstream-sync barrier met 3 >/dev/null
"#;

/// A node of an allocation of one or two.
fn node(cluster: &Cluster, allocation: &str, nodes: usize) -> Definition {
    Definition::url(format!("slurm://{allocation}"))
        .key("partition", PARTITION)
        .key("nodes", nodes)
        .key("time", "5m")
        .key("configuration", cluster.configuration().display())
        .key("agent", tools::agent_program().display())
}

fn builder(cluster: &Cluster, test: &str) -> StreamsBuilder {
    Streams::builder(test).only_given().results_dir(cluster.directory().join("results"))
}

/// Runs a test inside of the cluster's network, and then waits until no job is left.
fn run(cluster: &Cluster, test: impl Future<Output = Result<()>> + Send) {
    cluster.namespace().run(|| block_on(test)).unwrap();
    wait_until("the allocation is given back", SOON, || cluster.jobs().is_empty().then_some(()));
}

#[test]
#[ignore = "needs root and Slurm (integration-tests/setup): integration-tests/run"]
fn a_node_of_an_allocation_is_sound() {
    let cluster = Cluster::start(1);
    cluster.namespace().run(|| is_sound(check(node(&cluster, "sound", 1)).alone(), &survivor()));
    wait_until("the allocation is given back", SOON, || cluster.jobs().is_empty().then_some(()));
}

#[test]
#[ignore = "needs root and Slurm (integration-tests/setup): integration-tests/run"]
fn streams_of_one_allocation_are_its_nodes() {
    let cluster = Cluster::start(2);
    run(&cluster, async {
        let definition = || node(&cluster, "sweep", 2);
        let streams = builder(&cluster, "sweep")
            .stream("server", definition())
            .stream("client", definition())
            .stream("beside", definition().key("node", 2))
            .stream("third", definition())
            .open()?;
        let tells = || shell(TELLS_NODE);
        let mut tasks = Vec::new();
        for name in ["server", "client", "beside"] {
            tasks.push(streams.get(name)?.run_bg(tells()));
        }
        let mut told = Vec::new();
        for task in &tasks {
            told.push(task.wait().await?.stdout());
        }
        let job = told[0].strip_prefix("n1 0/2 n1,n2 n1,n2  ").unwrap_or_else(|| panic!("{told:?}"));
        let other = format!("n2 1/2 n1,n2 n1,n2  {job}");
        assert_eq!(told[1..], [other.clone(), other]);
        let hosts: Vec<String> =
            streams.slice(0..3).unwrap().iter().map(|stream| stream.host().to_owned()).collect();
        assert_eq!(hosts, ["n1", "n2", "n2"]);
        let error = streams.get("third").unwrap_err().to_string();
        expect!["stream `third`, defined by the test: `slurm` cannot be had: the allocation `sweep` has 2 nodes, and other streams have taken all: raise `nodes`, or share one with `node: 1`"].assert_eq(&error);
        streams.close().await
    });
}

#[test]
#[ignore = "needs root and Slurm (integration-tests/setup): integration-tests/run"]
fn a_test_waits_in_the_queue_and_says_so() {
    let cluster = Cluster::start(1);
    run(&cluster, async {
        let first = builder(&cluster, "first").stream("a", node(&cluster, "one", 1)).open()?;
        let running = first.get("a")?.run_bg(shell("echo up; sleep 1000"));
        running.ready(Ready::log("^up$")).await?;
        let second = builder(&cluster, "second").stream("b", node(&cluster, "two", 1)).open()?;
        let waiting = second.get("b")?.run_bg(shell("echo granted"));
        let begin = tokio::time::Instant::now();
        let words = loop {
            let words = waiting.explain().await;
            if words.contains("queue") {
                break words;
            }
            assert!(begin.elapsed() < SOON, "{words}");
            tokio::task::yield_now().await;
        };
        assert!(words.contains("waits in the queue of partition lab (Resources)"), "{words}");
        first.close().await?;
        assert_eq!(waiting.wait().await?.stdout(), "granted\n");
        second.close().await
    });
}

#[test]
#[ignore = "needs root and Slurm (integration-tests/setup): integration-tests/run"]
fn what_the_scheduler_refuses_is_told_whole() {
    let cluster = Cluster::start(1);
    run(&cluster, async {
        let definition = Definition::of("slurm")
            .key("partition", "no-such-partition")
            .key("configuration", cluster.configuration().display());
        let streams = builder(&cluster, "refused").stream("a", definition).open()?;
        let outcome = streams.get("a")?.run_bg(shell("true").allow_failure()).outcome().await;
        assert_eq!(outcome.kind, OutcomeKind::Error);
        expect!["slurm://partition=no-such-partition/1: the allocation was refused: it ended with exit code 1: salloc: error: invalid partition specified: no-such-partition; salloc: error: Job submit/allocate failed: Invalid partition name specified"].assert_eq(&outcome.detail);
        streams.close().await
    });
}

#[test]
#[ignore = "needs root and Slurm (integration-tests/setup): integration-tests/run"]
fn an_allocation_that_ends_by_itself_loses_its_tasks_and_is_not_asked_for_again() {
    let cluster = Cluster::start(1);
    run(&cluster, async {
        let streams = builder(&cluster, "cancelled").stream("a", node(&cluster, "short", 1)).open()?;
        let stream = streams.get("a")?;
        let task = stream.run_bg(shell("echo up; sleep 1000").allow_failure());
        task.ready(Ready::log("^up$")).await?;
        let job = cluster.jobs().remove(0);
        cluster.command("scancel", &[&job]);
        let outcome = task.outcome().await;
        // The scheduler ends the block, and then the agent: whichever is told first.
        assert!(matches!(outcome.kind, OutcomeKind::Killed | OutcomeKind::Lost), "{outcome}");
        let after = stream.run_bg(shell("true").allow_failure()).outcome().await;
        assert!(after.detail.contains(&format!("allocation {job} is over: ")), "{after}");
        // Nobody can be asked any more; the scheduler has ended what there was.
        let error = streams.close().await.unwrap_err().to_string();
        assert!(error.contains(&format!("allocation {job} is over: ")), "{error}");
        Ok(())
    });
}

/// Starts a test in a process of its own; its standard output is read by the caller.
fn victim(cluster: &Cluster, text: &str) -> std::process::Child {
    victim_with(cluster, text, None)
}

/// As [`victim`], with programs that stand before the system's.
fn victim_with(cluster: &Cluster, text: &str, programs: Option<&Path>) -> std::process::Child {
    let definitions = cluster.directory().join("victim.yaml");
    std::fs::write(
        &definitions,
        format!(
            "streams:\n  a: {{type: slurm, allocation: victim, configuration: {}, agent: {}}}\n",
            cluster.configuration().display(),
            tools::agent_program().display()
        ),
    )
    .unwrap();
    let mut command = Command::new(tools::beside_this_program("controller-under-test"));
    command.arg(&definitions).arg(cluster.directory().join("results")).args(["a", text]);
    if let Some(programs) = programs {
        command.env("PATH", format!("{}:{}", programs.display(), std::env::var("PATH").unwrap()));
    }
    cluster.namespace().spawn(command.stdout(Stdio::piped())).unwrap()
}

#[test]
#[ignore = "needs root and Slurm (integration-tests/setup): integration-tests/run"]
fn a_killed_test_gives_its_allocation_back_whether_it_was_granted_or_not() {
    let cluster = Cluster::start(1);
    let mut running = victim(&cluster, "echo begun; exec sleep 76543219");
    let mut lines = BufReader::new(running.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().contains("begun")));
    let mut waiting = victim(&cluster, "true");
    wait_until_true("the second waits in the queue", SOON, || cluster.jobs().len() == 2);
    for child in [&mut waiting, &mut running] {
        child.kill().unwrap();
        child.wait().unwrap();
    }
    wait_until("both are given back", SOON, || cluster.jobs().is_empty().then_some(()));
    let left = || processes::with_argument("76543219");
    wait_until_true("what ran there has ended", SOON, || left().is_empty());
}

#[test]
#[ignore = "needs root and Slurm (integration-tests/setup): integration-tests/run"]
fn an_allocation_is_given_back_although_its_holder_was_killed_with_its_test() {
    let cluster = Cluster::start(1);
    let mut test = victim(&cluster, "echo begun; exec sleep 76543220");
    let mut lines = BufReader::new(test.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().contains("begun")));
    // The shell that holds it, and with it salloc, which gives nothing back so.
    let holders: Vec<u32> = processes::children(test.id())
        .into_iter()
        .filter(|pid| processes::with_argument("hold").contains(pid))
        .collect();
    let [holder] = holders[..] else { panic!("{holders:?}") };
    let group = Pid::from_raw(i32::try_from(holder).unwrap()).unwrap();
    kill_process_group(group, Signal::KILL).unwrap();
    assert_eq!(cluster.jobs().len(), 1);
    test.kill().unwrap();
    test.wait().unwrap();
    wait_until("it is given back", SOON, || cluster.jobs().is_empty().then_some(()));
}

#[test]
#[ignore = "needs root and Slurm (integration-tests/setup): integration-tests/run"]
fn a_step_that_hangs_keeps_no_allocation() {
    let cluster = Cluster::start(1);
    // A node that is stopped takes no step and refuses none.
    let script = cluster.directory().join("srun");
    std::fs::write(&script, "#!/bin/sh\ntrap '' TERM\nwhile :; do sleep 1; done\n").unwrap();
    tools::run(Command::new("chmod").arg("755").arg(&script));
    let mut test = victim_with(&cluster, "true", Some(cluster.directory()));
    wait_until_true("the step hangs", SOON, || !processes::with_argument(tools::text(&script)).is_empty());
    assert_eq!(cluster.jobs().len(), 1);
    // It closes its streams when its two attempts of half a minute are over.
    wait_until("it is given back", 4 * SOON, || cluster.jobs().is_empty().then_some(()));
    test.wait().unwrap();
}
