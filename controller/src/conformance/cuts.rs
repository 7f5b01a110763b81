//! Pipes that are cut while something comes through them.

use millstream_common::{
    clock::{Ids as _, SystemIds},
    text::spoken,
};
use tokio::time::timeout;

use super::{
    cuttable::Cut,
    samples::{bytes, compare},
    scenario::{leaving, printing, ready, was_left, was_printed},
    stage::{LARGE_BYTES, STEP_MAX, Stage, ended_as, is_text, passed, printed},
};
use crate::{
    block::{Block, shell},
    outcome::OutcomeKind,
};

/// Where large things are cut: early, and again after more of them.
const PARTS: [usize; 3] = [LARGE_BYTES / 7, LARGE_BYTES / 5, LARGE_BYTES / 3];

/// The same block, which says first that it runs.
fn counted(block: Block) -> Block {
    block.setup("millstream-sync publish runs begun >/dev/null")
}

pub(super) async fn output_survives(stage: &Stage) -> Result<(), String> {
    let act = stage.open("cut-output")?;
    // Opens the session and ships the files, so that the cuts hit what they are meant for.
    was_printed(stage, &*act.passes(printing(stage)).await?)?;
    stage.there.cut_after(&PARTS.map(Cut::Come));
    let outcome = act.passes(counted(printing(stage))).await;
    let cuts = stage.there.planned_cuts(PARTS.len());
    was_printed(stage, &*outcome?)?;
    cuts?;
    let before = act.streams.publish("runs", "the suite").map_err(|error| error.to_string())?;
    if before != 1 {
        return Err(format!("the block has run {before} times"));
    }
    act.close().await
}

pub(super) async fn files_survive(stage: &Stage) -> Result<(), String> {
    let act = stage.open("cut-files")?;
    act.passes(shell("echo ready")).await?;
    // Hosts keep files by their content: nobody has shipped this one before.
    let mut sample = bytes(3, LARGE_BYTES);
    sample.extend(SystemIds.token().bytes());
    let path = stage.shipped().join("fresh");
    std::fs::write(&path, &sample)
        .map_err(|error| format!("the suite could not write `{}`: {error}", path.display()))?;
    stage.there.cut_after(&PARTS.map(Cut::Gone));
    let outcome = act.passes(shell("cat fresh").file(&path)).await;
    let cuts = stage.there.planned_cuts(PARTS.len());
    compare("the shipped file", &sample, &printed(&*outcome?)?.0)?;
    cuts?;
    act.close().await
}

pub(super) async fn archive_survives(stage: &Stage) -> Result<(), String> {
    let act = stage.open("cut-archive")?;
    act.passes(shell("echo ready")).await?;
    stage.there.cut_after(&PARTS.map(Cut::Come));
    let outcome = act.passes(leaving(stage)).await;
    let cuts = stage.there.planned_cuts(PARTS.len());
    was_left(stage, &*outcome?)?;
    cuts?;
    act.close().await
}

pub(super) async fn parties_survive(stage: &Stage) -> Result<(), String> {
    let act = stage.open("cut-barrier")?;
    let party = || shell("echo waits; millstream-sync barrier met 2 >/dev/null && echo met");
    let there = act.there(party())?;
    ready(&there, "^waits$").await?;
    stage.there.cut();
    let here = act.here(party())?;
    for task in [&there, &here] {
        is_text("standard output", "waits\nmet\n", &passed(task).await?.stdout())?;
    }
    act.close().await
}

/// Waits a while until a process is gone.
const LOOKING: &str = r#"
    tries=0
    while kill -0 "$PID" 2>/dev/null; do
        tries=$((tries + 1))
        [ $tries -lt 10 ] || exit 1
        sleep 1
    done
"#;

pub(super) async fn loss_is_told(stage: &Stage) -> Result<(), String> {
    let act = stage.open("cut")?;
    let task = act.there(shell("echo $$; echo up; sleep 1000"))?;
    ready(&task, "^up$").await?;
    stage.there.cut();
    let outcome = ended_as(&task, OutcomeKind::Lost).await?;
    let stdout = outcome.stdout();
    let pid = stdout.lines().next().unwrap_or_default();
    if pid.is_empty() {
        return Err("what was seen before the cut is not in its results".to_owned());
    }
    // What ran there ends with the pipe: otherwise it would go on until its lease is over, beside whatever comes. Another
    // test looks, because the one that lost it would end it before it runs anything else there.
    let later = stage.open("after-cut")?;
    let after = later.there(shell(LOOKING).env("PID", pid))?;
    match timeout(STEP_MAX, after.outcome()).await {
        Ok(outcome) if outcome.passed() => {}
        Ok(outcome) if outcome.exit_code() == Some(1) => {
            return Err("the block ran on after the cut: it would make sense to come back".to_owned());
        }
        Ok(outcome) => return Err(format!("no task can run after the cut: {outcome}")),
        Err(_elapsed) => return Err(format!("no task could run within {} after the cut", spoken(STEP_MAX))),
    }
    act.close().await?;
    later.close().await
}
