//! What a user reads when something is wrong, brought about by a test's own calls: each with its causes, as a test that
//! returns it prints it.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::{fmt::Debug, os::unix::ffi::OsStringExt as _, time::Duration};

use expect_test::{Expect, expect};
use millstream::{
    Block, BlockContext, BlockResult, Error, Ready, Streams, blocking::block_on, exec, reference,
    start_together,
};

millstream::entry!();

fn open() -> (Streams, tempfile::TempDir) {
    let results = tempfile::tempdir().unwrap();
    let builder = Streams::builder("wording").only_given().results_dir(results.path());
    (builder.deadline(Duration::from_secs(120)).open().unwrap(), results)
}

fn check<T: Debug, E: Into<Error>>(result: Result<T, E>, expected: &Expect) {
    let error: Error = result.map_err(Into::into).unwrap_err();
    expected.assert_eq(&plain(&format!("{error:?}")));
}

/// Temporary directories become `DIR`.
fn plain(text: &str) -> String {
    let paths = format!(r"{}/\.tmp\w+", std::env::temp_dir().display());
    regex::Regex::new(&paths).unwrap().replace_all(text, "DIR").into_owned()
}

/// What becomes of a block that cannot be run.
fn check_block(streams: &Streams, block: impl Into<Block>, expected: &Expect) {
    let outcome = block_on(streams.get("x").unwrap().run_bg(block).outcome());
    expected.assert_eq(&plain(&outcome.detail));
}

#[test]
fn spans_and_patterns_that_cannot_be() {
    check(
        Streams::builder("x").only_given().deadline(Duration::ZERO).open(),
        &expect!["a deadline of 0.0 s is not possible: at least 0.1 s, at most 168 h 0 min"],
    );
    let (streams, _results) = open();
    check(
        streams.select("client-("),
        &expect![[r#"
        `client-(` selects no streams: regex parse error:
            ^(?:client-()$
             ^
        error: unclosed group"#]],
    );
    let task = streams.get("x").unwrap().run_bg(exec(["true"]));
    check(
        block_on(task.ready(Ready::log("("))),
        &expect![[r#"
        the task cannot be waited for until it printed a line: regex parse error:
            (
            ^
        error: unclosed group"#]],
    );
    let told = block_on(task.ready(Ready::log("never printed"))).unwrap_err().to_string();
    let ran = regex::Regex::new(r"passed after .*").unwrap();
    expect!["the task ended before it printed `never printed`: task 1-true on stream x (127.0.0.1): passed"]
        .assert_eq(&ran.replace(&told, "passed"));
    check(
        block_on(streams.listen("192.0.2.1:0".parse().unwrap())).map_err(std::io::Error::other),
        &expect![
            "the sync service listens on loopback addresses only, not on 192.0.2.1:0: use 127.0.0.1:0 or [::1]:0"
        ],
    );
}

#[test]
fn what_cannot_begin_together() {
    let (streams, _results) = open();
    let stream = streams.get("x").unwrap();
    let first = stream.prepare(exec(["true"]));
    check(
        block_on(start_together([stream.prepare(exec(["true"]))])),
        &expect![
            "task 2-true on stream x cannot begin with the others: task 1-true, before it in its stream, is prepared and was not started"
        ],
    );
    drop(first);
    check(
        block_on(start_together([stream.prepare(exec([""]))])),
        &expect![[r#"
        a task could not be prepared: task 3-block on stream x (127.0.0.1): error (invalid_block): the run command of the block is empty: name a program
          results: DIR/wording/streams/x/3-block"#]],
    );
}

#[test]
fn what_main_may_not_say_and_when_it_is_too_late() {
    let (streams, _results) = open();
    check(
        block_on(streams.barrier("met", 0)),
        &expect![[r#"
        barrier `met` was not entered
          caused by: parties must be 1 to 100,000"#]],
    );
    check(
        streams.publish("t", "x".repeat(70_000)),
        &expect![[r#"
        nothing was published to topic `t`
          caused by: the value for topic `t` has 70000 bytes: at most 65536 bytes are allowed"#]],
    );
    check(
        block_on(streams.wait_topic("a\u{7}", 1)),
        &expect![[
            r#"the topic name `a\u{7}` has a control character (U+0007) at byte 1: use letters, digits, `-`, `_` or `.`"#
        ]],
    );
    let mut subscription = streams.subscribe("t").unwrap();
    block_on(streams.close()).unwrap();
    check(
        block_on(subscription.next()).map_err(|error| Error::Meet(error.into())),
        &expect![
            "topic `t` has 0 values and gets no more: nobody is left who could publish: there is no other task, and main starts no more"
        ],
    );
}

#[millstream::block]
fn counts(ctx: &mut BlockContext, number: u32) -> BlockResult<u32> {
    ctx.log(number);
    Ok(number)
}

#[test]
fn blocks_that_cannot_be_shipped_or_called() {
    let (streams, _results) = open();
    let directory = tempfile::tempdir().unwrap();
    let many = (0..5_000).fold(exec(["true"]), |block, number| block.env(format!("V{number}"), "x"));
    check_block(
        &streams,
        many,
        &expect!["the block has 5000 environment variables: at most 4096 are allowed"],
    );
    let odd = directory.path().join(std::ffi::OsString::from_vec(b"odd\xff".to_vec()));
    std::fs::write(&odd, "").unwrap();
    check_block(
        &streams,
        exec(["true"]).file(&odd),
        &expect!["`DIR/odd�` cannot be shipped under its name: it is not UTF-8, rename it"],
    );
    let tree = directory.path().join("tree");
    std::fs::create_dir(&tree).unwrap();
    for number in 0..10_001 {
        std::fs::File::create(tree.join(number.to_string())).unwrap();
    }
    check_block(
        &streams,
        exec(["true"]).dir(&tree),
        &expect![
            "the block ships too many files: at most 10000, with at most 786432 bytes of names together, are allowed; pack them into one"
        ],
    );
    let large = directory.path().join("large");
    std::fs::File::create(&large).unwrap().set_len(9 << 30).unwrap();
    check_block(
        &streams,
        exec(["true"]).file(&large),
        &expect![
            "`DIR/large` has 9663676416 bytes: at most 8589934592 are shipped; put it on the host and use `no_copy`"
        ],
    );
    check_block(
        &streams,
        reference("counts"),
        &expect![[
            r#"the function cannot be run as a block: `counts` takes `number`: give it to the reference with `.param("number", …)`"#
        ]],
    );
    let misled = streams.get("x").unwrap().run_bg(reference("counts").param("number", "many"));
    expect![[r#"
        error: argument `number` cannot be read back from JSON: invalid type: string "many", expected u32 at line 1 column 6
    "#]].assert_eq(&block_on(misled.outcome()).stderr());
    block_on(streams.close()).unwrap();
}

#[test]
fn a_value_that_is_gone() {
    let (streams, _results) = open();
    let outcome = block_on(streams.get("x").unwrap().run_fg(counts(3))).unwrap();
    assert_eq!(outcome.value::<u32>().unwrap(), 3);
    let file = outcome.data().join(".millstream/value.json");
    std::fs::remove_file(&file).unwrap();
    std::fs::create_dir(&file).unwrap();
    check(
        outcome.value::<u32>(),
        &expect![[r#"
        failed to read the value in `DIR/wording/streams/x/1-counts/data/.millstream/value.json`
          caused by: Is a directory (os error 21)"#]],
    );
    block_on(streams.close()).unwrap();
}

/// Tells what its context says of an environment that somebody has spoiled.
#[millstream::block]
fn spoils(ctx: &mut BlockContext) -> BlockResult {
    let file = std::env::var("MILLSTREAM_PARAMS")?;
    std::fs::write(file, "[")?;
    ctx.param::<u32>("number")?;
    Ok(())
}

#[test]
fn a_context_that_somebody_has_spoiled() {
    let (streams, _results) = open();
    let outcome = block_on(streams.get("x").unwrap().run_bg(spoils()).outcome());
    let told = outcome.stderr();
    let paths = regex::Regex::new(r"`/[^`]*/").unwrap();
    expect![[r#"
        error: `DIR/params.json` is not the JSON that it should be: invalid type: sequence, expected a map at line 1 column 0
    "#]].assert_eq(&paths.replace_all(&told, "`DIR/"));
    block_on(streams.close()).unwrap();
}
