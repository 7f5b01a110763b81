//! What every reach must carry: the same blocks, with the same ends.

use std::{fs, os::unix::fs::PermissionsExt as _, time::Duration};

use millstream_common::text::spoken;
use tokio::time::timeout;

use super::{
    samples::compare,
    stage::{STEP_MAX, Stage, ended, ended_as, is_text, passed, printed, read},
};
use crate::{
    block::{Block, exec, shell},
    outcome::{Outcome, OutcomeKind},
    task::{Ready, Task},
};

/// Tasks of one stream.
const TASKS: usize = 5;
/// Words that a shell, a command line or a configuration might take apart.
const AWKWARD: &str = "it's \"so\" \\ $HOME `x` %s ümlaut\n second line\t;";
/// How long a task that does not want to end may go on when it is told to.
const GRACE: Duration = Duration::from_millis(300);

pub(super) async fn runs_in_order(stage: &Stage) -> Result<(), String> {
    let act = stage.open("in-order")?;
    let step = |number: usize| {
        shell(
            "for word in begin end; do millstream-sync publish order \"$word $N\" >/dev/null || exit 1; done\n\
             echo \"ran $N\"",
        )
        .env("N", number.to_string())
    };
    let tasks = (1..=TASKS).map(|number| act.there(step(number))).collect::<Result<Vec<Task>, String>>()?;
    for (index, task) in tasks.iter().enumerate() {
        let outcome = passed(task).await?;
        is_text("standard output", &format!("ran {}\n", index + 1), &outcome.stdout())?;
    }
    let expected: Vec<String> =
        (1..=TASKS).flat_map(|number| [format!("begin {number}"), format!("end {number}")]).collect();
    let values = act.streams.wait_topic("order", expected.len() as u64).await;
    let values = values.map_err(|error| error.to_string())?;
    let came: Vec<String> =
        values.iter().map(|value| String::from_utf8_lossy(value.content.bytes()).into_owned()).collect();
    if came != expected {
        return Err(format!("they told {came:?} instead of {expected:?}"));
    }
    act.close().await
}

/// Prints both samples, one on each output, at the same time.
pub(super) fn printing(stage: &Stage) -> Block {
    shell("cat small >&2 & cat large; wait").file(stage.large_path()).file(stage.small_path())
}

/// Compares what [`printing`] printed.
pub(super) fn was_printed(stage: &Stage, outcome: &Outcome) -> Result<(), String> {
    let (stdout, stderr) = printed(outcome)?;
    let compared = compare("standard output", &stage.large, &stdout)
        .and_then(|()| compare("standard error", &stage.small, &stderr));
    // Why some of it is not there.
    compared.map_err(|why| {
        [Some(why), outcome.results_error.clone()].into_iter().flatten().collect::<Vec<_>>().join(": ")
    })
}

pub(super) async fn output_is_whole(stage: &Stage) -> Result<(), String> {
    let act = stage.open("output")?;
    let outcome = act.passes(printing(stage)).await?;
    was_printed(stage, &outcome)?;
    let outcome = act.passes(shell("printf 'no end of line'; printf '\\000\\377' >&2")).await?;
    let (stdout, stderr) = printed(&outcome)?;
    compare("standard output", b"no end of line", &stdout)?;
    compare("standard error", b"\0\xff", &stderr)?;
    act.close().await
}

pub(super) async fn log_is_live(stage: &Stage) -> Result<(), String> {
    let act = stage.open("live")?;
    // It goes on only when its first line was seen.
    let task = act.there(shell("echo first; millstream-sync wait seen >/dev/null && echo second"))?;
    ready(&task, "^first$").await?;
    act.streams.publish("seen", "yes").map_err(|error| error.to_string())?;
    let outcome = passed(&task).await?;
    is_text("standard output", "first\nsecond\n", &outcome.stdout())?;
    act.close().await
}

/// Waits until a task has printed a line.
pub(super) async fn ready(task: &Task, pattern: &str) -> Result<(), String> {
    match timeout(STEP_MAX, task.ready(Ready::log(pattern))).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_elapsed) => Err(format!(
            "task {} was not seen to print `{pattern}` within {}: {}",
            task.label(),
            spoken(STEP_MAX),
            task.explain().await
        )),
    }
}

pub(super) async fn ends_are_told(stage: &Stage) -> Result<(), String> {
    let act = stage.open("ends")?;
    let exits = act.there(shell("exit 7").expect_failure())?;
    let signalled = act.there(shell("kill -KILL $$").expect_failure())?;
    let absent = act.there(exec(["millstream-no-such-program"]).allow_failure())?;
    let outcome = ended_as(&exits, OutcomeKind::Failed).await?;
    if outcome.exit_code() != Some(7) {
        return Err(format!("exit code 7 was told as {:?}", outcome.exit));
    }
    let outcome = ended_as(&signalled, OutcomeKind::Killed).await?;
    if outcome.signal() != Some(9) {
        return Err(format!("signal SIGKILL was told as {:?}", outcome.exit));
    }
    let outcome = ended_as(&absent, OutcomeKind::Error).await?;
    if !outcome.detail.contains("millstream-no-such-program") {
        return Err(format!("the program that is not there is not named: {outcome}"));
    }
    act.close().await
}

pub(super) async fn files_arrive(stage: &Stage) -> Result<(), String> {
    let act = stage.open("files")?;
    let program = stage.program("tool", "#!/bin/sh\necho \"tool: $1\"\n")?;
    let directory = stage.shipped().join("tree");
    let write = || {
        fs::create_dir_all(directory.join("deep/er"))?;
        fs::write(directory.join("deep/er/ünï code"), "leaf")
    };
    write().map_err(|error| format!("the suite could not write `{}`: {error}", directory.display()))?;
    // A program of its own, and the same again: it is there already.
    for word in ["once", "again"] {
        let outcome = act.passes(exec(["./tool", word]).file(&program)).await?;
        is_text("what the shipped program printed", &format!("tool: {word}\n"), &outcome.stdout())?;
    }
    let outcome = act
        .passes(shell("cat large; cat 'tree/deep/er/ünï code' >&2").file(stage.large_path()).dir(&directory));
    let (stdout, stderr) = printed(&*outcome.await?)?;
    compare("the shipped file", &stage.large, &stdout)?;
    compare("the file in the shipped directory", b"leaf", &stderr)?;
    act.close().await
}

pub(super) async fn parameters_arrive(stage: &Stage) -> Result<(), String> {
    let act = stage.open("parameters")?;
    let outcome = act.passes(
        shell("printf %s \"$AWKWARD\"; printf %s \"$MILLSTREAM_PARAM_AWKWARD\" >&2")
            .env("AWKWARD", AWKWARD)
            .param("awkward", AWKWARD),
    );
    let outcome = outcome.await?;
    is_text("a variable", AWKWARD, &outcome.stdout())?;
    is_text("a parameter", AWKWARD, &outcome.stderr())?;
    let outcome = act
        .passes(
            shell("case \"$(cat \"$MILLSTREAM_PARAMS\")\" in *conformance-secret*) echo found;; esac; env | grep -c conformance-secret >&2; true")
                .secret_param("token", "conformance-secret"),
        )
        .await?;
    is_text("what was found of a secret in its file", "found\n", &outcome.stdout())?;
    is_text("the number of variables with the secret", "0\n", &outcome.stderr())?;
    act.close().await
}

/// Leaves a directory with all that an archive may have.
const LEAVING: &str = r#"
    cd "$MILLSTREAM_OUTPUT" || exit 1
    mkdir -p deep/er && cat "$OLDPWD/large" >deep/er/large && : >empty && ln -s deep/er/large link
    printf '#!/bin/sh\n' >program && chmod 755 program
    echo note >"$MILLSTREAM_WHITEBOARD"
"#;

/// Leaves an archive.
pub(super) fn leaving(stage: &Stage) -> Block {
    // `cd` inside it: a shell keeps the directory before in `OLDPWD`.
    shell(LEAVING).file(stage.large_path())
}

/// Compares what [`leaving`] left.
pub(super) fn was_left(stage: &Stage, outcome: &Outcome) -> Result<(), String> {
    let data = outcome.data();
    compare("the large file", &stage.large, &read(&data.join("deep/er/large"))?)?;
    compare("the empty file", b"", &read(&data.join("empty"))?)?;
    let link = fs::read_link(data.join("link")).map_err(|error| format!("the link did not come: {error}"))?;
    is_text("the link", "deep/er/large", &link.to_string_lossy())?;
    let mode =
        fs::metadata(data.join("program")).map_err(|error| format!("the program did not come: {error}"))?;
    if mode.permissions().mode() & 0o100 == 0 {
        return Err("the program came home as a file that cannot be executed".to_owned());
    }
    is_text("the whiteboard", "note\n", &outcome.whiteboard())?;
    if let Some(problem) = outcome.results_error.as_ref().or(outcome.skipped.first()) {
        return Err(problem.clone());
    }
    Ok(())
}

pub(super) async fn archive_comes_home(stage: &Stage) -> Result<(), String> {
    let act = stage.open("archive")?;
    let outcome = act.passes(leaving(stage)).await?;
    was_left(stage, &outcome)?;
    act.close().await
}

pub(super) async fn streams_meet(stage: &Stage) -> Result<(), String> {
    let act = stage.open("meeting")?;
    let party = || {
        shell(
            "millstream-sync publish \"from-$MILLSTREAM_STREAM\" \"hello from $MILLSTREAM_STREAM\" >/dev/null &&\n\
             for other in there beside here; do millstream-sync wait \"from-$other\" || exit 1; done\n\
             for meeting in 1 2 3; do millstream-sync barrier met 3 >/dev/null || exit 1; done",
        )
    };
    let tasks = [act.there(party())?, act.beside(party())?, act.here(party())?];
    for task in &tasks {
        let outcome = passed(task).await?;
        let expected = "hello from there\nhello from beside\nhello from here\n";
        is_text("what was heard", expected, &outcome.stdout())?;
    }
    act.close().await
}

pub(super) async fn stop_and_cancel(stage: &Stage) -> Result<(), String> {
    let act = stage.open("stopping")?;
    let running = act.there(shell("trap 'echo asked; exit 0' TERM; echo up; sleep 1000 & wait"))?;
    let waiting = act.there(shell("echo it ran"))?;
    let after = act.there(shell("echo after"))?;
    ready(&running, "^up$").await?;
    drop(waiting.cancel());
    ended_as(&waiting, OutcomeKind::Cancelled).await?;
    drop(running.stop());
    let outcome = ended_as(&running, OutcomeKind::Stopped).await?;
    is_text("what the stopped block printed", "up\nasked\n", &outcome.stdout())?;
    passed(&after).await?;
    act.close().await
}

/// Prints those of some processes that run. One that has ended and was not yet waited for by its parent, the host's first
/// process perhaps, runs no more.
const RUNNING: &str = r#"
    for pid in $PIDS; do
        kill -0 "$pid" 2>/dev/null || continue
        case "$(cat "/proc/$pid/stat" 2>/dev/null)" in *") Z "*) ;; *) echo "$pid" ;; esac
    done
"#;

pub(super) async fn trees_end(stage: &Stage) -> Result<(), String> {
    let act = stage.open("trees")?;
    let task = act.there(shell(
        "sleep 1000 & echo $!\n\
         (trap '' TERM; while :; do sleep 1; done) & echo $!\n\
         sh -c '(sleep 1000 & echo $!) & wait'\n\
         echo up; wait",
    ))?;
    ready(&task, "^up$").await?;
    drop(task.stop_within(GRACE));
    let outcome = ended_as(&task, OutcomeKind::Stopped).await?;
    let stdout = outcome.stdout();
    let pids: Vec<&str> =
        stdout.lines().filter(|line| line.bytes().all(|byte| byte.is_ascii_digit())).collect();
    if pids.len() != 3 {
        return Err(format!("three processes should have told their number: {stdout:?}"));
    }
    let outcome = act.passes(shell(RUNNING).env("PIDS", pids.join(" "))).await?;
    is_text("the list of processes that still run", "", &outcome.stdout())?;
    // The next one finds a clean place, whoever ended before it.
    ended(&act.there(shell("exit 0"))?).await?;
    act.close().await
}
