//! The loop with real processes, in both ways of containing them.

mod fixture;
mod phases;

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    process::Command,
    sync::atomic::Ordering,
    time::Duration,
};

use millstream_common::{
    id::StreamName,
    log::LogChannel,
    outcome::{Exit, OutcomeKind, Phase, Reason, TaskEnd},
    spec::{FailurePolicy, TaskSpec},
};
use millstream_proto::{
    supervisor::v1::{
        CloseSession, DoorFrame, ReleaseTasks, door_frame::Frame as Ask, supervisor_frame::Frame as Told,
    },
    v1,
};

use tonic::Code;

use super::{cgroup::Hierarchies, ended::Ended, *};
use fixture::{Fixture, PATIENCE, Process, containments, exec, is_alive, script, spec};

#[tokio::test]
async fn a_block_runs_in_its_place_and_its_output_is_kept() {
    for containment in containments() {
        let mut fixture = Fixture::new(containment).await;
        let mut block = script(
            "pwd; echo to standard error >&2; echo $MILLSTREAM_STREAM $GREETING; command -v millstream-sync; \
             test -S $MILLSTREAM_SYNC && echo noted > $MILLSTREAM_WHITEBOARD; echo kept > $MILLSTREAM_OUTPUT/file",
        );
        block.environment.insert("GREETING".to_owned(), "hello".to_owned());
        let task = fixture.start(&block).await;
        let end = fixture.end_of(task).await;
        assert_eq!(
            (end.outcome, end.reason, end.exit),
            (OutcomeKind::Passed, Reason::Exited, Some(Exit::Code(0)))
        );
        let directory = attendant::task_dir(&fixture.config.session_dir, task);
        let command = fixture.config.session_dir.join("bin/millstream-sync");
        let expected = format!("{}\nstream hello\n{}\n", directory.join("work").display(), command.display());
        assert_eq!(fixture.log(task, LogChannel::Stdout), expected);
        assert_eq!(fixture.log(task, LogChannel::Stderr), "to standard error\n");
        assert_eq!(fixture.log(task, LogChannel::Mark), "run");
        assert_eq!(end.log.end_position, fixture.tasks[&task.to_string()].spool_position);
        let archive = end.archive.unwrap();
        assert_eq!(archive.inline.len() as u64, archive.size_bytes);
        assert!(end.phases.len() == 1 && end.leaked_count == 0 && end.start_time_ns <= end.end_time_ns);
        assert!(directory.join("started").exists() && directory.join("end.pb").exists());
        let released = fixture.ask(Ask::Release(ReleaseTasks { task_ids: vec![task.to_string()] })).await;
        assert_eq!(released.code, 0);
        fixture.close().await;
    }
}

#[tokio::test]
async fn fifty_tasks_run_one_after_another() {
    for containment in containments() {
        let mut fixture = Fixture::new(containment).await;
        let path = fixture.directory.path().join("order");
        let mut tasks = Vec::new();
        for number in 0..50 {
            let text = format!("echo begin {number} >> {0}; echo end {number} >> {0}", path.display());
            tasks.push(fixture.start(&script(&text)).await);
        }
        for task in tasks {
            assert_eq!(fixture.end_of(task).await.outcome, OutcomeKind::Passed);
        }
        let expected: String = (0..50).map(|number| format!("begin {number}\nend {number}\n")).collect();
        assert_eq!(fs::read_to_string(&path).unwrap(), expected);
        fixture.close().await;
    }
}

#[tokio::test]
async fn directories_of_released_tasks_serve_those_that_come() {
    for containment in containments() {
        let mut fixture = Fixture::new(containment).await;
        let mut seen = BTreeSet::new();
        // A directory is emptied beside everything else, and nobody is told when that is done.
        let is_used_again = async {
            for _ in 0..100 {
                let task = fixture.start(&script("ls -A")).await;
                let work = attendant::task_dir(&fixture.config.session_dir, task).join("work");
                assert_eq!(fixture.end_of(task).await.outcome, OutcomeKind::Passed);
                assert_eq!(fixture.log(task, LogChannel::Stdout), "", "nothing of another task is there");
                // The number of an inode may be given again; when it was made then is another time.
                let found = fs::metadata(work).unwrap();
                let is_new = seen.insert((found.ino(), found.created().unwrap()));
                fixture.ask(Ask::Release(ReleaseTasks { task_ids: vec![task.to_string()] })).await;
                if !is_new {
                    return true;
                }
            }
            false
        };
        assert!(is_used_again.await, "{containment:?}");
        fixture.close().await;
    }
}

#[tokio::test]
async fn a_task_that_a_full_disk_did_not_take_may_be_asked_for_again() {
    let mut fixture = Fixture::new(containments()[0]).await;
    // With a directory of its own, and sooner or later with one that an earlier task has left.
    for number in 1..=100 {
        let (task, block) = (fixture.world.ids.task_id(), script("ls -A"));
        let block = TaskSpec { stream_number: number, ..block };
        fixture.disk.full.store(true, Ordering::Relaxed);
        let refused = fixture.put(task, &block).await;
        let expected = "the task cannot be kept in the session's directory: no storage space";
        assert_eq!(
            (Code::from(i32::try_from(refused.code).unwrap()), &*refused.message),
            (Code::ResourceExhausted, expected)
        );
        fixture.disk.full.store(false, Ordering::Relaxed);
        assert_eq!(fixture.put(task, &block).await.code, 0);
        let end = fixture.end_of(task).await;
        assert_eq!((end.outcome, &*end.detail), (OutcomeKind::Passed, ""), "task {number}");
        assert_eq!(fixture.log(task, LogChannel::Stdout), "", "nothing of another task is there");
        fixture.ask(Ask::Release(ReleaseTasks { task_ids: vec![task.to_string()] })).await;
    }
    fixture.close().await;
}

#[tokio::test]
async fn a_daemon_ends_with_its_task_and_is_reported_while_it_holds_the_output() {
    for containment in containments() {
        let mut fixture = Fixture::new(containment).await;
        let daemon = "(setsid bash -c 'echo $BASHPID; exec sleep 1000' &) ; sleep 0.1; echo done";
        let task = fixture.start(&script(daemon)).await;
        let end = fixture.end_of(task).await;
        assert_eq!((end.outcome, end.leaked_count), (OutcomeKind::Passed, 1), "{containment:?}");
        assert_eq!(end.leaked[0].command, "sleep 1000");
        let printed = fixture.log(task, LogChannel::Stdout);
        let pid = printed.lines().next().unwrap().parse::<u32>().unwrap();
        assert_eq!(printed, format!("{pid}\ndone\n"));
        assert_eq!(end.leaked[0].pid, pid);
        assert!(!is_alive(pid));
        fixture.close().await;
    }
}

#[tokio::test]
async fn what_setup_started_lives_until_teardown_is_over() {
    for containment in containments() {
        let mut fixture = Fixture::new(containment).await;
        let phases = [
            (Phase::Setup, "setsid sleep 1000 & echo $! > pid"),
            (Phase::Run, "kill -0 $(cat pid) && echo alive in run; exit 3"),
            (Phase::Teardown, "kill -0 $(cat pid) && echo alive in teardown; kill $(cat pid)"),
        ];
        let task = fixture.start(&spec("stream", &phases)).await;
        let end = fixture.end_of(task).await;
        assert_eq!(
            (end.outcome, end.phase, end.exit),
            (OutcomeKind::Failed, Some(Phase::Run), Some(Exit::Code(3)))
        );
        assert_eq!(fixture.log(task, LogChannel::Stdout), "alive in run\nalive in teardown\n");
        assert_eq!(fixture.log(task, LogChannel::Mark), "setuprunteardown");
        assert_eq!(end.phases.len(), 3);
        fixture.close().await;
    }
}

#[tokio::test]
async fn a_timeout_terminates_and_teardown_runs() {
    for containment in containments() {
        let mut fixture = Fixture::new(containment).await;
        let mut block = spec(
            "stream",
            &[
                (Phase::Run, "trap 'echo asked; exit 0' TERM; sleep 1000 & wait"),
                (Phase::Teardown, "echo cleaned"),
            ],
        );
        block.phases[0].timeout = Some(Duration::from_millis(300));
        let task = fixture.start(&block).await;
        let end = fixture.end_of(task).await;
        assert_eq!(
            (end.outcome, end.reason),
            (OutcomeKind::TimedOut, Reason::PhaseTimeout),
            "{}",
            end.detail
        );
        assert_eq!(fixture.log(task, LogChannel::Stdout), "asked\ncleaned\n");
        assert_eq!(end.phases[1].outcome, OutcomeKind::Passed);
        fixture.close().await;
    }
}

#[tokio::test]
async fn a_stop_that_is_ignored_becomes_a_kill() {
    for containment in containments() {
        let mut fixture = Fixture::new(containment).await;
        let mut block = script("trap '' TERM; echo up; while :; do sleep 1000; done");
        block.grace = Duration::from_millis(200);
        let task = fixture.start(&block).await;
        fixture.until(task, |task| task.last_line == "up").await;
        fixture.signal(task, v1::SignalKind::Stop).await;
        let end = fixture.end_of(task).await;
        assert_eq!((end.outcome, end.exit), (OutcomeKind::Stopped, Some(Exit::Signal(9))), "{}", end.detail);
        let again = fixture.signal(task, v1::SignalKind::Stop).await;
        assert_eq!(again.state, i32::from(v1::TaskState::Finished));
        fixture.close().await;
    }
}

#[tokio::test]
async fn why_a_block_cannot_begin_is_one_sentence() {
    for containment in containments() {
        let mut fixture = Fixture::new(containment).await;
        let told = |end: TaskEnd| (end.outcome, end.reason, end.detail);

        let end = fixture.run(&exec(&["no-such-program"])).await;
        let path = format!("{}/bin:/usr/bin:/bin", fixture.config.session_dir.display());
        let expected = format!(
            "`no-such-program` is not on this host's PATH ({path}): install it or give its whole path"
        );
        assert_eq!(told(end), (OutcomeKind::Error, Reason::StartFailed, expected));

        let file = fixture.directory.path().join("plain");
        fs::write(&file, "#!/bin/sh\n").unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
        let end = fixture.run(&exec(&[file.to_str().unwrap()])).await;
        let expected = format!(
            "`{}` may not be executed: give it and its directories execute permission",
            file.display()
        );
        assert_eq!(told(end), (OutcomeKind::Error, Reason::StartFailed, expected));

        let homeless = TaskSpec { working_directory: "/no/such/place".to_owned(), ..exec(&["true"]) };
        let (outcome, reason, detail) = told(fixture.run(&homeless).await);
        assert_eq!((outcome, reason), (OutcomeKind::Error, Reason::StartFailed));
        assert!(detail.contains("`/no/such/place`") && detail.contains("No such file"), "{detail}");

        let stranger = TaskSpec { user: Some("no-such-user".to_owned()), ..exec(&["true"]) };
        let expected =
            "user `no-such-user` does not exist on this host: `/etc/passwd` has no such line".to_owned();
        assert_eq!(told(fixture.run(&stranger).await), (OutcomeKind::Error, Reason::UserRefused, expected));

        // The stream goes on.
        assert_eq!(fixture.run(&exec(&["true"])).await.outcome, OutcomeKind::Passed);
        fixture.close().await;
    }
}

#[tokio::test]
async fn a_start_is_a_put() {
    let mut fixture = Fixture::new(containments()[0]).await;
    let path = fixture.directory.path().join("count");
    let block = script(&format!("echo once >> {}", path.display()));
    let task = fixture.world.ids.task_id();
    assert!(fixture.put(task, &block).await.start.unwrap().accepted_by_this_call);
    assert!(!fixture.put(task, &block).await.start.unwrap().accepted_by_this_call);
    fixture.end_of(task).await;
    let again = fixture.put(task, &block).await.start.unwrap();
    assert_eq!((again.state, again.accepted_by_this_call), (v1::TaskState::Finished.into(), false));
    let other = fixture.put(task, &script("echo other")).await;
    assert_eq!(other.code, Code::AlreadyExists as u32);
    assert_eq!(fs::read_to_string(&path).unwrap(), "once\n");
    fixture.close().await;
}

#[tokio::test]
async fn a_held_task_waits_for_the_order_to_go() {
    for containment in containments() {
        let mut fixture = Fixture::new(containment).await;
        let block = TaskSpec { hold: true, ..script("echo gone") };
        let task = fixture.start(&block).await;
        fixture.until(task, |task| task.state == i32::from(v1::TaskState::Staged) && task.pid > 0).await;
        let started = attendant::task_dir(&fixture.config.session_dir, task).join("started");
        assert!(!started.exists());
        fixture.signal(task, v1::SignalKind::Go).await;
        assert_eq!(fixture.end_of(task).await.outcome, OutcomeKind::Passed);
        assert_eq!(fixture.log(task, LogChannel::Stdout), "gone\n");
        let taken_back = fixture.start(&block).await;
        fixture
            .until(taken_back, |task| task.state == i32::from(v1::TaskState::Staged) && task.pid > 0)
            .await;
        fixture.signal(taken_back, v1::SignalKind::Cancel).await;
        let end = fixture.end_of(taken_back).await;
        assert_eq!((end.outcome, end.leaked_count, end.log.stdout_bytes), (OutcomeKind::Cancelled, 0, 0));
        fixture.close().await;
    }
}

#[tokio::test]
async fn a_failure_drains_the_stream_and_no_other() {
    let mut fixture = Fixture::new(containments()[0]).await;
    let failing = TaskSpec { failure_policy: FailurePolicy::Drain, hold: true, ..script("exit 1") };
    let first = fixture.start(&failing).await;
    let second = fixture.start(&exec(&["true"])).await;
    let mut elsewhere = exec(&["true"]);
    elsewhere.stream = StreamName::new("other").unwrap();
    let other = fixture.start(&elsewhere).await;
    let waiting = fixture.until(second, |task| task.explanation.contains("waits")).await;
    assert!(waiting.explanation.starts_with("waits for 1-block before it in stream stream"), "{waiting:?}");
    fixture.signal(first, v1::SignalKind::Go).await;
    assert_eq!(fixture.end_of(first).await.outcome, OutcomeKind::Failed);
    let drained = fixture.end_of(second).await;
    assert_eq!((drained.outcome, drained.reason), (OutcomeKind::Cancelled, Reason::Drained));
    assert_eq!(fixture.end_of(other).await.outcome, OutcomeKind::Passed);
    fixture.close().await;
}

#[tokio::test]
async fn silence_for_longer_than_the_lease_ends_everything_and_results_stay() {
    for containment in containments() {
        let mut fixture = Fixture::with_lease(containment, Duration::from_millis(800)).await;
        let task = fixture.start(&script("(setsid sleep 1000 &); echo $$; sleep 1000")).await;
        let waiting = fixture.start(&exec(&["true"])).await;
        fixture.until(task, |task| !task.last_line.is_empty()).await;
        let pid: u32 = fixture.log(task, LogChannel::Stdout).trim().parse().unwrap();
        let end = fixture.end_of(task).await;
        assert_eq!((end.outcome, end.reason), (OutcomeKind::Killed, Reason::LeaseExpired), "{}", end.detail);
        assert!(!is_alive(pid) && fixture.lease_expired);
        assert_eq!(fixture.end_of(waiting).await.reason, Reason::LeaseExpired);
        // Nothing is left to do: the supervisor ends by itself, and leaves what can be asked for and nothing else.
        tokio::time::timeout(PATIENCE, &mut fixture.running).await.unwrap().unwrap().unwrap();
        assert_eq!(fixture.log(task, LogChannel::Stdout), format!("{pid}\n"));
        let session = &fixture.config.session_dir;
        assert!(!Ended::read(session).unwrap().lost);
        let names = |directory: &Path| {
            let entries = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name());
            entries.map(|name| name.into_string().unwrap()).collect::<BTreeSet<_>>()
        };
        assert_eq!(names(session), BTreeSet::from(["ended.json".to_owned(), "tasks".to_owned()]));
        let kept = names(&session.join("tasks").join(task.to_string()));
        assert_eq!(kept, ["end.pb", "spec.pb", "spool", "started"].map(str::to_owned).into());
        if let Some(group) = fixture.config.session_cgroup() {
            assert!(!group.exists());
        }
    }
}

#[tokio::test]
async fn a_new_door_is_told_everything() {
    let mut fixture = Fixture::new(containments()[0]).await;
    let done = fixture.start(&exec(&["true"])).await;
    fixture.end_of(done).await;
    let running = fixture.start(&script("echo up; sleep 1000")).await;
    // Where a shim starts the block, its first line may be read before the word that it runs.
    fixture.until(running, |task| task.last_line == "up" && task.state() == v1::TaskState::Running).await;
    fixture.new_door().await;
    let hello = fixture.hello.clone().unwrap();
    assert_eq!((hello.tasks.len(), hello.lease_expired, hello.pid), (2, false, std::process::id()));
    assert!(fixture.tasks[&done.to_string()].end.is_some());
    let seen = &fixture.tasks[&running.to_string()];
    assert_eq!((seen.state, &*seen.last_line, seen.logged_bytes), (v1::TaskState::Running.into(), "up", 3));
    fixture.close().await;
}

#[tokio::test]
async fn closing_kills_what_runs_and_nothing_is_left() {
    for containment in containments() {
        let mut fixture = Fixture::new(containment).await;
        let task = fixture.start(&script("trap '' TERM; (setsid sleep 1000 &); echo $$; sleep 1000")).await;
        fixture.until(task, |task| !task.last_line.is_empty()).await;
        let pid: u32 = fixture.log(task, LogChannel::Stdout).trim().parse().unwrap();
        fixture.close().await;
        assert!(!is_alive(pid));
    }
}

#[tokio::test]
async fn much_output_is_kept_byte_for_byte() {
    for containment in containments() {
        let mut fixture = Fixture::new(containment).await;
        let task = fixture.start(&script("seq 1 1000000; seq 1 1000 >&2")).await;
        let end = fixture.end_of(task).await;
        let expected: String = (1..=1_000_000).map(|number| format!("{number}\n")).collect();
        assert!(fixture.log(task, LogChannel::Stdout) == expected);
        assert_eq!(end.log.stdout_bytes, expected.len() as u64);
        assert_eq!(end.last_lines.len(), limits::LAST_LINES_COUNT);
        fixture.close().await;
    }
}

#[tokio::test]
async fn a_lost_task_is_not_begun_again() {
    let mut fixture = Fixture::new(containments()[0]).await;
    let task = fixture.start(&script("echo $$; sleep 1000")).await;
    fixture.until(task, |task| !task.last_line.is_empty()).await;
    let spec_of_it = TaskSpec { stream_number: 1, ..script("echo $$; sleep 1000") };
    // As if the supervisor had been killed: nothing is ended in order.
    fixture.running.abort();
    assert!((&mut fixture.running).await.unwrap_err().is_cancelled());
    let (doors, came) = mpsc::channel(DOORS_COUNT_MAX);
    fixture.doors = doors;
    let host = real_host(&fixture.config).unwrap();
    fixture.running = tokio::spawn(run(fixture.config.clone(), fixture.world.clone(), host, came));
    fixture.new_door().await;
    let end = fixture.end_of(task).await;
    assert_eq!((end.outcome, end.reason), (OutcomeKind::Lost, Reason::SupervisorDied));
    let again = fixture.put(task, &spec_of_it).await.start.unwrap();
    assert_eq!((again.state, again.accepted_by_this_call), (v1::TaskState::Finished.into(), false));
    fixture.close().await;
}

#[tokio::test]
async fn limits_hold_and_are_told_apart_from_other_deaths() {
    if Hierarchies::find().limits_source() == cgroup::LimitsSource::None {
        // Told by the error that such a task gets.
        let mut fixture = Fixture::new(containments()[0]).await;
        let mut block = exec(&["true"]);
        block.limits.memory_bytes = Some(32 << 20);
        assert_eq!(fixture.run(&block).await.reason, Reason::LimitsUnavailable);
        return fixture.close().await;
    }
    for containment in containments() {
        let mut fixture = Fixture::new(containment).await;
        // A line without an end is kept in memory.
        let mut block = script("set -o pipefail; head -c 200m /dev/zero | tail -n 1 > /dev/null");
        block.limits.memory_bytes = Some(32 << 20);
        let end = fixture.run(&block).await;
        assert_eq!((end.outcome, end.reason), (OutcomeKind::Killed, Reason::OutOfMemory), "{}", end.detail);
        fixture.close().await;
    }
}

#[tokio::test]
async fn the_process_listens_survives_the_terminal_and_ends_when_it_is_closed() {
    let mut process = Process::start();
    assert_eq!(Process::first_words(&mut process.child), format!("{READY}\n"));
    // One lives here already.
    let mut second = Process::command(&process.config).spawn().unwrap();
    let told = Process::first_words(&mut second);
    assert!(told.starts_with("another supervisor holds "), "{told}");
    assert!(!second.wait().unwrap().success());
    for signal in ["-HUP", "-INT", "-TERM"] {
        assert!(
            Command::new("kill").args([signal, &process.child.id().to_string()]).status().unwrap().success()
        );
    }
    for _ in 0..2 {
        // A door that leaves is replaced by the next.
        let stream = UnixStream::connect(process.config.session_dir.join(SOCKET_FILE)).await.unwrap();
        let (reader, _writer) = stream.into_split();
        let mut reader = FrameReader::new(reader);
        let frame: Option<millstream_proto::supervisor::v1::SupervisorFrame> = reader.next().await.unwrap();
        let Some(Told::Hello(hello)) = frame.unwrap().frame else { panic!("a hello comes first") };
        assert_eq!(hello.pid, process.child.id());
    }
    let stream = UnixStream::connect(process.config.session_dir.join(SOCKET_FILE)).await.unwrap();
    let (_reader, writer) = stream.into_split();
    let close = DoorFrame { request_id: 1, frame: Some(Ask::Close(CloseSession {})) };
    FrameWriter::new(writer).send(&close).await.unwrap();
    let ended = tokio::task::spawn_blocking(move || process.child.wait().unwrap());
    assert!(tokio::time::timeout(PATIENCE, ended).await.unwrap().unwrap().success());
}

#[tokio::test]
#[ignore = "needs root: it alone can become another user"]
async fn a_block_of_another_user_reaches_its_directories() {
    let mut fixture = Fixture::new(containments()[0]).await;
    fs::set_permissions(fixture.directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let text = "id -un; echo $HOME $USER; touch file && echo out > $MILLSTREAM_OUTPUT/x && echo w > $MILLSTREAM_WHITEBOARD";
    let block = TaskSpec { user: Some("nobody".to_owned()), ..script(text) };
    let task = fixture.start(&block).await;
    let end = fixture.end_of(task).await;
    assert_eq!((end.outcome, &*end.detail), (OutcomeKind::Passed, ""), "{:?}", end.last_lines);
    let home = account::find("nobody").unwrap().home;
    assert_eq!(fixture.log(task, LogChannel::Stdout), format!("nobody\n{} nobody\n", home.display()));
    fixture.close().await;
}
