//! Commands that tell their phases, with real processes.

use millstream_common::{
    log::LogChannel,
    outcome::{OutcomeKind, Phase, TaskEnd},
    spec::TaskSpec,
};
use millstream_proto::v1;

use super::fixture::{Fixture, containments, script};

fn telling(text: &str) -> TaskSpec {
    let mut spec = script(text);
    spec.phases[0].reports_phases = true;
    spec
}

fn ends(end: &TaskEnd) -> Vec<(Phase, OutcomeKind)> {
    end.phases.iter().map(|end| (end.phase, end.outcome)).collect()
}

#[tokio::test]
async fn phases_of_one_process_are_told_and_marked() {
    for containment in containments() {
        let mut fixture = Fixture::new(containment).await;
        let text = "echo begin setup >&$MILLSTREAM_PHASES; echo begin run >&$MILLSTREAM_PHASES
            echo failed no answer >&$MILLSTREAM_PHASES; echo begin teardown >&$MILLSTREAM_PHASES
            echo end >&$MILLSTREAM_PHASES; exit 1";
        let task = fixture.start(&telling(text)).await;
        let end = fixture.end_of(task).await;
        assert_eq!(
            (end.outcome, end.phase, &*end.detail),
            (OutcomeKind::Failed, Some(Phase::Run), "no answer")
        );
        assert_eq!(
            ends(&end),
            [
                (Phase::Setup, OutcomeKind::Passed),
                (Phase::Run, OutcomeKind::Failed),
                (Phase::Teardown, OutcomeKind::Passed)
            ]
        );
        assert_eq!(fixture.log(task, LogChannel::Mark), "setuprunteardown");
        fixture.close().await;
    }
}

#[tokio::test]
async fn a_command_that_is_terminated_tears_down() {
    for containment in containments() {
        let mut fixture = Fixture::new(containment).await;
        let text = "trap 'echo begin teardown >&$MILLSTREAM_PHASES; echo torn down
                echo end >&$MILLSTREAM_PHASES; exit 1' TERM
            echo begin run >&$MILLSTREAM_PHASES; echo up; while :; do sleep 1000 & wait; done";
        let task = fixture.start(&telling(text)).await;
        fixture.until(task, |task| task.last_line == "up").await;
        fixture.signal(task, v1::SignalKind::Stop).await;
        let end = fixture.end_of(task).await;
        assert_eq!((end.outcome, end.phase), (OutcomeKind::Stopped, Some(Phase::Run)), "{}", end.detail);
        assert_eq!(ends(&end), [(Phase::Run, OutcomeKind::Stopped), (Phase::Teardown, OutcomeKind::Passed)]);
        assert_eq!(fixture.log(task, LogChannel::Stdout), "up\ntorn down\n");
        fixture.close().await;
    }
}

#[tokio::test]
async fn a_command_that_dies_leaves_teardown_unrun() {
    for containment in containments() {
        let mut fixture = Fixture::new(containment).await;
        let text = "echo begin setup >&$MILLSTREAM_PHASES; echo begin run >&$MILLSTREAM_PHASES; kill -9 $$";
        let task = fixture.start(&telling(text)).await;
        let end = fixture.end_of(task).await;
        assert_eq!((end.outcome, end.phase), (OutcomeKind::Killed, Some(Phase::Run)));
        assert!(end.detail.ends_with("; teardown was not run"), "{}", end.detail);
        fixture.close().await;
    }
}
