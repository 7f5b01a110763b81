//! Process trees: what a block starts ends with it, however it hides.

use millstream::shell;
use millstream_integration_tests::{lab::Lab, processes};

use crate::support::open;

#[test]
#[ignore = "needs root: integration-tests/run"]
fn a_daemon_that_forked_twice_is_gone_with_its_block_and_reported() {
    let lab = Lab::new(&["one"]);
    let _agent = lab.start_agent("one");
    lab.controller()
        .block_on(|| async {
            let streams = open(&lab, "daemon")?;
            // It holds the block's output open too: waiting for the end of the pipe would wait for ever. The block waits
            // until it has become its second program, by whose name it is reported.
            let block = shell(
                "mkfifo up\n\
                 (setsid sh -c 'sleep 76543210 & echo $$ >up; exec sleep 76543211' &)\n\
                 read -r daemon <up\n\
                 until grep -q ^sleep /proc/$daemon/cmdline; do :; done\n\
                 echo started",
            )
            .name("daemon");
            let outcome = streams.get("one")?.run_fg(block).await?;
            assert_eq!(outcome.stdout(), "started\n");
            let left = [processes::with_argument("76543210"), processes::with_argument("76543211")].concat();
            assert_eq!(left, Vec::<u32>::new());
            assert!(outcome.leaked_count >= 2, "{outcome:?}");
            let commands: Vec<_> = outcome.leaked.iter().map(|process| process.command.clone()).collect();
            assert!(commands.iter().any(|command| command.contains("76543211")), "{commands:?}");
            streams.close().await?;
            millstream::Result::<()>::Ok(())
        })
        .unwrap();
}

#[test]
#[ignore = "needs root: integration-tests/run"]
fn a_block_that_ignores_termination_is_killed_after_its_grace() {
    let lab = Lab::new(&["one"]);
    let _agent = lab.start_agent("one");
    lab.controller()
        .block_on(|| async {
            let streams = open(&lab, "stubborn")?;
            let block = shell("trap '' TERM\necho deaf\nwhile :; do sleep 65432109; done")
                .name("stubborn")
                .grace(std::time::Duration::from_millis(300));
            let task = streams.get("one")?.run_bg(block);
            task.ready(millstream::Ready::log("deaf")).await?;
            let outcome = task.stop().await;
            assert_eq!(outcome.kind, millstream::OutcomeKind::Stopped, "{outcome}");
            assert!(outcome.is_expected());
            assert_eq!(processes::with_argument("65432109"), Vec::<u32>::new());
            streams.close().await?;
            millstream::Result::<()>::Ok(())
        })
        .unwrap();
}
