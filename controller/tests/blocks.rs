//! Every kind of block in a real local stream: what is shipped, what it finds, what comes home.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test that cannot go on fails, and the output of a block is its log"
)]

use std::{fs, os::unix::fs::PermissionsExt as _, path::Path, sync::Arc, time::Duration};

use millstream::{
    Block, BlockContext, BlockResult, Outcome, OutcomeKind, Phase, Reason, Streams,
    blocking::{BlockingStream as _, BlockingStreams as _},
    exec, python, script, shell,
};

millstream::entry!();

/// Runs one block, whatever comes of it.
fn run(block: Block) -> (Arc<Outcome>, tempfile::TempDir) {
    let results = tempfile::tempdir().unwrap();
    let streams = Streams::builder("blocks")
        .only_given()
        .results_dir(results.path())
        .deadline(Duration::from_secs(120))
        .open()
        .unwrap();
    let outcome = match streams.get("server").unwrap().run_fg_blocking(block) {
        Ok(outcome) => outcome,
        Err(unexpected) => unexpected.0,
    };
    streams.close_blocking().unwrap();
    (outcome, results)
}

/// Runs a block that passes, and gives what it printed.
fn printed(block: Block) -> String {
    let (outcome, _results) = run(block);
    assert!(outcome.passed(), "{outcome}");
    outcome.stdout()
}

fn write(path: &Path, content: &str, mode: u32) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, content).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

#[test]
fn python_meets_publishes_and_finds_its_parameters() {
    let code = "\
import millstream
index = millstream.publish('port', 5201)
millstream.barrier('alone', 1)
millstream.whiteboard('as ' + millstream.topology()['streams']['server']['place'])
print(index, millstream.get('port'), millstream.param('parties'))
";
    let (outcome, _results) = run(python(code).param("parties", 2));
    assert!(outcome.passed(), "{outcome}");
    assert_eq!(outcome.stdout(), "0 ['5201'] 2\n");
    assert!(outcome.whiteboard().starts_with("as local"), "{}", outcome.whiteboard());
}

#[test]
fn a_traceback_names_the_shipped_file() {
    let (outcome, _results) = run(python("\nimport nowhere"));
    assert_eq!((outcome.kind, outcome.exit_code()), (OutcomeKind::Failed, Some(1)));
    assert!(outcome.stderr().contains("__block__.py\", line 2"), "{}", outcome.stderr());
}

#[test]
fn scripts_find_what_is_shipped_with_them() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    write(&path("run.sh"), "#!/bin/sh\ncat data/a/one large | wc -c; ./tool; cat data/link\n", 0o755);
    write(&path("tool"), "#!/bin/sh\necho tool\n", 0o755);
    write(&path("data/a/one"), "1", 0o600);
    write(&path("large"), &"x".repeat(200_000), 0o644);
    std::os::unix::fs::symlink("a/one", path("data/link")).unwrap();
    let block = script(path("run.sh")).file(path("tool")).file(path("large")).dir(path("data"));
    assert_eq!(printed(block.clone()), "200001\ntool\n1");
    // From elsewhere, the script is found by its absolute path.
    let block = script(path("tool")).cwd("/");
    assert_eq!(printed(block), "tool\n");
    let block = exec(["cat", "large"]).file(path("large")).no_copy();
    assert_eq!(printed(block).len(), 200_000);
}

#[test]
fn a_script_that_is_not_there_is_an_outcome_with_its_path() {
    let (outcome, _results) = run(script("no/such/script.sh"));
    assert_eq!((outcome.kind, outcome.reason), (OutcomeKind::Error, Reason::InvalidBlock));
    let text = outcome.to_string();
    assert!(text.contains("script `no/such/script.sh` does not exist (the current directory is `"), "{text}");
}

#[test]
fn a_secret_reaches_the_block_and_nothing_else() {
    // Spelled so that the command itself does not hold the secret.
    let block = shell(
        "env | grep -c hun''ter2; grep -c hun''ter2 \"$MILLSTREAM_PARAMS\"; stat -c %a \"$MILLSTREAM_PARAMS\"; echo $MILLSTREAM_PARAM_OPEN",
    );
    let (outcome, results) = run(block.secret_param("password", "hunter2").param("open", "seen").name("b"));
    assert!(outcome.passed(), "{outcome}");
    assert_eq!(outcome.stdout(), "0\n1\n600\nseen\n");
    let mut directories = vec![results.path().to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_symlink() {
                continue;
            }
            if path.is_dir() {
                directories.push(path);
            } else {
                assert!(!fs::read_to_string(&path).unwrap().contains("hunter2"), "{}", path.display());
            }
        }
    }
}

#[test]
fn phases_run_in_their_order_and_the_teardown_always() {
    let block = shell("echo run; exit 3").setup("echo setup").teardown(["echo", "teardown"]);
    let (outcome, _results) = run(block.expect_failure());
    assert_eq!(outcome.stdout(), "setup\nrun\nteardown\n");
    assert_eq!((outcome.phase, outcome.exit_code()), (Some(Phase::Run), Some(3)));
    assert!(outcome.is_expected());
    let (outcome, _results) = run(shell("echo run").setup("exit 4").teardown("echo teardown"));
    assert_eq!(outcome.stdout(), "teardown\n");
    assert_eq!((outcome.phase, outcome.exit_code()), (Some(Phase::Setup), Some(4)));
}

#[test]
fn the_log_keeps_head_and_tail_and_marks_the_gap() {
    let block = shell("head -c 400000 /dev/zero | tr '\\0' a; head -c 100000 /dev/zero | tr '\\0' b");
    let (outcome, _results) = run(block.log_quota(100_000, 50_000));
    assert!(outcome.passed() && outcome.log.truncated, "{outcome}");
    let kept = outcome.stdout();
    assert!(kept.starts_with(&"a".repeat(100_000)) && kept.ends_with(&"b".repeat(50_000)));
    assert!(kept.contains("[millstream: 350000 bytes were not kept here]"), "{}", kept.len());
    assert_eq!(outcome.log.stdout_bytes, 500_000);
}

#[millstream::block]
fn speak(ctx: &mut BlockContext, text: String, complain: bool) -> BlockResult {
    println!("{text} {}", ctx.param::<String>("who")?);
    eprintln!("to standard error");
    if complain {
        return Err("as asked".into());
    }
    fs::write(ctx.output_dir().join("said"), text)?;
    Ok(())
}

#[millstream::block]
fn panic_at(depth: u32) {
    assert!(depth > 0, "too deep");
    panic_at_once(depth);
}

fn panic_at_once(depth: u32) {
    panic!("depth {depth}");
}

#[test]
fn functions_print_only_what_they_print() {
    let block = || speak("hello".to_owned(), false).param("who", "you");
    let (outcome, _results) = run(block());
    assert_eq!(
        (outcome.stdout().as_str(), outcome.stderr().as_str()),
        ("hello you\n", "to standard error\n")
    );
    assert_eq!(fs::read_to_string(outcome.data().join("said")).unwrap(), "hello");
    assert_eq!(printed(block().setup("echo before").teardown("echo after")), "before\nhello you\nafter\n");
    assert_eq!(printed(block().wrap(["env", "A=1"])), "hello you\n");
    assert_eq!(printed(block().cwd("/")), "hello you\n");
}

#[test]
fn functions_that_fail_say_why() {
    let (outcome, _results) = run(speak("hello".to_owned(), true).param("who", "you"));
    assert_eq!((outcome.kind, outcome.exit_code()), (OutcomeKind::Failed, Some(1)));
    assert!(outcome.stderr().ends_with("error: as asked\n"), "{}", outcome.stderr());
    let (outcome, _results) = run(panic_at(7));
    assert_eq!((outcome.kind, outcome.exit_code()), (OutcomeKind::Failed, Some(101)));
    let told = outcome.stderr();
    assert!(told.contains("tests/blocks.rs:") && told.contains("depth 7"), "{told}");
}

#[test]
fn limits_environment_and_time_are_held() {
    let block =
        shell("echo $A $B; sleep 100").env("A", "1").env("B", "2").timeout(Duration::from_millis(300));
    let (outcome, _results) = run(block.grace(Duration::ZERO));
    assert_eq!((outcome.kind, outcome.reason), (OutcomeKind::TimedOut, Reason::PhaseTimeout), "{outcome}");
    assert_eq!(outcome.stdout(), "1 2\n");
}
