//! Limits that last for a minute or more: simulated time has them over in a moment.

use std::sync::Arc;

use millstream::{Exit, OutcomeKind, Phase, Reason};

use crate::{
    sharing::{Test, opened, simulate},
    steps::{Program, Step},
};

#[test]
fn a_tear_down_that_hangs_is_ended_when_its_time_is_over() {
    let results = Arc::new(tempfile::tempdir().unwrap());
    simulate(3, 1, |world| {
        let (world, results) = (world.clone(), Arc::clone(&results));
        let test: Test = Box::pin(async move {
            let streams = opened("hanging", &world, &results, "", |builder| builder);
            let hangs = vec![Step::Pause { millis: 1_000_000 }];
            let stubborn = [vec![Step::Stubborn], hangs.clone()].concat();
            for (teardown, signal, took, how) in
                [(hangs, 15, 60_000..60_500, "terminated"), (stubborn, 9, 65_000..65_500, "killed")]
            {
                let program = Program { teardown, ..Program::of(vec![Step::Pause { millis: 10 }]) };
                let stream = streams.get("a")?;
                let task = stream.run_bg(program.block(0));
                let behind = stream.run_bg(Program::of(Vec::new()).block(0));
                let outcome = task.outcome().await;
                assert_eq!(
                    (outcome.kind, outcome.reason, outcome.phase, outcome.exit),
                    (
                        OutcomeKind::TimedOut,
                        Reason::PhaseTimeout,
                        Some(Phase::Teardown),
                        Some(Exit::Signal(signal))
                    ),
                    "{outcome}"
                );
                assert!(took.contains(&outcome.duration.as_millis()), "{outcome}");
                let said = format!("still ran after its limit of 1 min 0 s and was {how}");
                assert!(outcome.detail.contains(&said), "{outcome}");
                // Its stream goes on.
                assert!(behind.outcome().await.passed());
            }
            streams.close().await?;
            Ok(())
        });
        vec![("hanging", test)]
    });
}
