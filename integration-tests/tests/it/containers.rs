//! Streams in containers: made, taken by name, given back as the definition says.

use std::{
    io::{BufRead as _, BufReader},
    os::unix::fs::MetadataExt as _,
    path::Path,
    process::{Command, Stdio},
    sync::Arc,
    time::Duration,
};

use millstream::{Definition, Error, OutcomeKind, Reason, Streams, conformance::check, exec, shell};
use millstream_integration_tests::{engine::Engine, tools, wait::wait_until_true};

use crate::{
    conformance::{is_sound, survivor},
    support::{SOON, block_on},
};

/// A container of an engine, with the agent that was built for tests.
fn definition(engine: &Engine) -> Definition {
    Definition::of(engine.kind())
        .key("engine", engine.command().display())
        .key("agent", tools::static_agent_program().display())
}

fn open(results: &Path) -> Streams {
    Streams::builder("containers").results_dir(results).open().unwrap()
}

#[test]
#[ignore = "needs root and podman: integration-tests/run"]
fn a_container_of_an_empty_image_runs_programs_and_meets_at_barriers() {
    let engine = Engine::podman();
    let results = tempfile::tempdir().unwrap();
    block_on(async {
        let streams = open(results.path());
        let stream = streams.add("bare", definition(&engine).key("image", "empty"))?;
        let told = stream.run_fg(exec(["/.millstream-agent", "--version"])).await?;
        assert!(told.stdout().starts_with("millstream-agent "), "{told}");
        let meeting = stream.run_bg(exec(["millstream-sync", "barrier", "met", "2"]));
        streams.barrier("met", 2).await?;
        meeting.wait().await?;
        let outcome = stream.run_bg(shell("true")).outcome().await;
        assert_eq!((outcome.kind, outcome.reason), (OutcomeKind::Error, Reason::StartFailed));
        assert!(outcome.sentence().contains("`/bin/sh` does not exist"), "{outcome}");
        streams.close().await?;
        millstream::Result::<()>::Ok(())
    })
    .unwrap();
    assert_eq!(engine.containers(), [""; 0]);
}

/// The whole suite over containers of an engine, of which none may stay.
fn is_sound_with(engine: Engine) {
    let engine = Arc::new(engine);
    let afterwards = Arc::clone(&engine);
    let check = check(definition(&engine).key("image", "box").key("network", "none")).afterwards(move || {
        let left = afterwards.containers();
        if left.is_empty() { Ok(()) } else { Err(format!("containers stay: {left:?}")) }
    });
    is_sound(check, &survivor());
}

#[test]
#[ignore = "needs root and podman: integration-tests/run"]
fn a_container_of_podman_is_a_sound_reach() {
    is_sound_with(Engine::podman());
}

#[test]
#[ignore = "needs root and docker: integration-tests/run"]
fn a_container_of_docker_is_a_sound_reach() {
    is_sound_with(Engine::docker());
}

#[test]
#[ignore = "needs root and podman: integration-tests/run"]
fn streams_of_one_definition_share_a_container_and_others_have_their_own() {
    let engine = Engine::podman();
    let results = tempfile::tempdir().unwrap();
    block_on(async {
        let streams = open(results.path());
        let first = streams.add("first", definition(&engine).key("image", "box"))?;
        let other = streams.add("other", definition(&engine).key("image", "box"))?;
        // What the image says of its environment reaches blocks.
        first.run_fg(shell("echo $GREETING >/kept")).await?;
        let again = streams.run_bg("first", shell("cat /kept"))?;
        assert_eq!(again.wait().await?.stdout(), "hello\n");
        let outcome = other.run_bg(shell("cat /kept")).outcome().await;
        assert_eq!(outcome.kind, OutcomeKind::Failed, "{outcome}");
        let running = engine.containers();
        assert!(running.len() == 2 && running.iter().all(|line| line.ends_with(" up")), "{running:?}");
        streams.close().await?;
        millstream::Result::<()>::Ok(())
    })
    .unwrap();
    assert_eq!(engine.containers(), [""; 0]);
}

#[test]
#[ignore = "needs root, podman and docker: integration-tests/run"]
fn a_container_is_removed_or_kept_as_its_definition_says() {
    for engine in [Engine::podman(), Engine::docker()] {
        removes_or_keeps(&engine);
    }
}

fn removes_or_keeps(engine: &Engine) {
    let results = tempfile::tempdir().unwrap();
    block_on(async {
        let streams = open(results.path());
        let made = |name: &str, remove: &str| {
            let definition = definition(engine).key("image", "box").key("name", name).key("remove", remove);
            streams.add(name, definition)
        };
        for (name, remove, text) in [
            ("always", "always", "exit 3"),
            ("passed", "on-success", "true"),
            ("failed", "on-success", "exit 3"),
            ("never", "never", "true"),
        ] {
            made(name, remove)?.run_bg(shell(text)).outcome().await;
        }
        streams.close().await?;
        millstream::Result::<()>::Ok(())
    })
    .unwrap();
    let mut kept = engine.containers();
    kept.sort();
    assert_eq!(kept, ["failed exited", "never exited"]);
}

#[test]
#[ignore = "needs root, podman and docker: integration-tests/run"]
fn a_container_that_runs_is_taken_by_its_name_and_stays() {
    for engine in [Engine::podman(), Engine::docker()] {
        takes_by_name(&engine);
    }
}

fn takes_by_name(engine: &Engine) {
    engine.run(&["run", "--detach", "--name", "lab", "box", "/bin/busybox", "sleep", "1000"]);
    let results = tempfile::tempdir().unwrap();
    for _ in 0..2 {
        block_on(async {
            let streams = open(results.path());
            let stream = streams.add("lab", definition(engine).key("name", "lab").key("idle", "1s"))?;
            let outcome = stream.run_fg(shell("/bin/busybox ps")).await?;
            assert!(outcome.stdout().contains("sleep 1000"), "{}", outcome.stdout());
            streams.close().await?;
            millstream::Result::<()>::Ok(())
        })
        .unwrap();
    }
    assert_eq!(engine.containers(), ["lab up"]);
    wait_until_true("the agent inside ends", SOON, || {
        !engine.run(&["exec", "lab", "/bin/busybox", "ps"]).contains(".millstream-agent")
    });
}

#[test]
#[ignore = "needs root and podman: integration-tests/run"]
fn a_container_is_removed_although_its_test_was_killed() {
    let engine = Engine::podman();
    let directory = tempfile::tempdir().unwrap();
    let lab = directory.path().join("lab.yaml");
    let text = format!(
        "streams:\n  box: {{type: podman, image: box, engine: {}, agent: {}, idle: 1s}}\n",
        engine.command().display(),
        tools::static_agent_program().display()
    );
    std::fs::write(&lab, text).unwrap();
    let mut controller = Command::new(tools::beside_this_program("controller-under-test"))
        .arg(&lab)
        .arg(directory.path().join("results"))
        .args(["--lease-ms", "2000", "box", "echo begun; exec /bin/busybox sleep 1000"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(controller.stdout.take().unwrap()).lines();
    let first = lines.next().unwrap().unwrap();
    assert!(first.contains("begun"), "{first}");
    assert_eq!(engine.containers().len(), 1);
    controller.kill().unwrap();
    controller.wait().unwrap();
    wait_until_true("the container is removed", SOON, || engine.containers().is_empty());
}

#[test]
#[ignore = "needs root and podman: integration-tests/run"]
fn what_an_engine_refuses_is_told_whole_with_the_next_step() {
    let engine = Engine::podman();
    engine.run(&["create", "--name", "taken", "box", "/bin/sh"]);
    let results = tempfile::tempdir().unwrap();
    block_on(async {
        let streams = open(results.path());
        let mut count = 0;
        let mut sentence = async |definition: Definition| {
            count += 1;
            let stream = streams.add(format!("stream-{count}"), definition)?;
            let outcome = stream.run_bg(exec(["/bin/sh"])).outcome().await;
            assert_eq!(
                (outcome.kind, outcome.reason),
                (OutcomeKind::Error, Reason::Unreachable),
                "{outcome}"
            );
            Ok::<_, Error>(outcome.sentence())
        };
        let missing = definition(&engine).key("image", "no-such-image").key("options", "--pull=never");
        let told = sentence(missing).await?;
        assert!(
            told.contains(
                "ended with exit code 125 (check the name of the image, or pull it first): Error: "
            ),
            "{told}"
        );
        let told = sentence(definition(&engine).key("image", "box").key("name", "taken")).await?;
        assert!(told.contains("the container name \"taken\" is already in use"), "{told}");
        assert!(told.contains("or leave `name` out"), "{told}");
        let told = sentence(definition(&engine).key("name", "taken")).await?;
        assert!(told.contains("(start a container of this name, or let one be made with `image`)"), "{told}");
        let told = sentence(definition(&engine).key("name", "nobody")).await?;
        assert!(told.contains("(start a container of this name"), "{told}");
        streams.close().await?;
        millstream::Result::<()>::Ok(())
    })
    .unwrap();
    // What was there before belongs to somebody else.
    assert_eq!(engine.containers(), ["taken created"]);
}

#[test]
#[ignore = "needs root, podman and docker: integration-tests/run"]
fn a_container_that_is_killed_is_told_and_followed_by_another_one() {
    for engine in [Engine::podman(), Engine::docker()] {
        is_followed(
            &engine,
            "always",
            "is gone: somebody has ended or removed it, or has killed the agent in it",
        );
        assert_eq!(engine.containers(), [""; 0]);
        is_followed(&engine, "on-success", "has ended with exit code 137");
        let mut kept = engine.containers();
        kept.sort();
        // One of its tasks has failed.
        assert_eq!(kept, ["mortal exited", "mortal-ended-1 exited"]);
    }
}

fn is_followed(engine: &Engine, remove: &str, fate: &str) {
    let results = tempfile::tempdir().unwrap();
    block_on(async {
        let streams =
            Streams::builder("killed").results_dir(results.path()).lease(Duration::from_secs(3)).open()?;
        let definition = definition(engine).key("image", "box").key("name", "mortal").key("remove", remove);
        let stream = streams.add("mortal", definition)?;
        let task = stream.run_bg(shell("echo here >/kept; echo begun; exec /bin/busybox sleep 1000"));
        task.ready(millstream::Ready::log("begun")).await?;
        engine.run(&["kill", "mortal"]);
        let outcome = task.outcome().await;
        assert_eq!(outcome.kind, OutcomeKind::Lost, "{outcome}");
        let told = format!("the container `mortal` {fate}; whatever runs there next gets a new one");
        assert!(outcome.detail.contains(&told), "{outcome}");
        let next = stream.run_fg(shell("cat /kept 2>/dev/null || echo new")).await?;
        assert_eq!(next.stdout(), "new\n");
        streams.close().await?;
        millstream::Result::<()>::Ok(())
    })
    .unwrap();
    let log = std::fs::read_to_string(results.path().join("killed/debug.log")).unwrap();
    assert!(log.contains("session lost: ") && log.contains("gets a new one"), "{log}");
}

#[test]
#[ignore = "needs root, podman and docker: integration-tests/run"]
fn what_a_dead_test_has_made_and_never_started_is_removed_by_the_next() {
    for engine in [Engine::podman(), Engine::docker()] {
        // As a test that was killed between the two leaves it, which was this process before this boot's first tick.
        let dead = |pid: u32| {
            let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
            let namespace = std::fs::metadata("/proc/self/ns/pid").unwrap().ino();
            format!("millstream.owner={}/{namespace}/{pid}/0", boot.trim())
        };
        let own = std::process::id();
        engine.run(&["create", "--name", "begun", "--label", &dead(own), "box", "/bin/sh"]);
        engine.run(&["create", "--name", "foreign", "--label", "millstream.owner=x/1/2/0", "box", "/bin/sh"]);
        engine.run(&["create", "--name", "others", "box", "/bin/sh"]);
        let results = tempfile::tempdir().unwrap();
        block_on(async {
            let streams = open(results.path());
            streams.add("box", definition(&engine).key("image", "box"))?.run_fg(shell("true")).await?;
            streams.close().await?;
            millstream::Result::<()>::Ok(())
        })
        .unwrap();
        let mut left = engine.containers();
        left.sort();
        assert_eq!(left, ["foreign created", "others created"]);
    }
}
