//! What `docs/blocks.md` shows, run as it stands there; and that it shows nothing else.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test that cannot go on fails, and the output of a block is its log"
)]

use std::{fs, os::unix::fs::PermissionsExt as _, path::Path, process::Command};

use millstream::{
    BlockContext, BlockReference, BlockResult, OutcomeKind, Phase, Resolution, Resolver, Streams,
    blocking::block_on, exec, python, reference, shell,
};
use serde::{Deserialize, Serialize};

millstream::entry!();

const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/blocks_page.py");

fn open(results: &Path) -> Streams {
    Streams::builder("page").only_given().results_dir(results).resolver(Greetings).open().unwrap()
}

#[test]
fn kinds_of_block() {
    let results = tempfile::tempdir().unwrap();
    let streams = open(results.path());
    let stream = streams.get("any").unwrap();
    let blocks = [
        shell("ls | wc -l; echo done >\"$MILLSTREAM_WHITEBOARD\"").file(FILE),
        exec(["env"]).env("GREETING", "hello").param("parties", 2).secret_param("password", "hunter2"),
        python("import millstream; print(millstream.param('parties') + 1)").param("parties", 2),
        shell("exit 3").setup("mkdir cache").teardown(["rm", "-r", "cache"]).expect_failure(),
    ];
    let outcomes = block_on(stream.run_all_fg(blocks)).unwrap();
    assert_eq!(outcomes[0].whiteboard(), "done\n");
    assert!(outcomes[1].stdout().contains("MILLSTREAM_PARAM_PARTIES=2\n"));
    assert!(!outcomes[1].stdout().contains("hunter2"));
    assert_eq!(outcomes[2].stdout(), "3\n");
    assert_eq!((outcomes[3].kind, outcomes[3].phase), (OutcomeKind::Failed, Some(Phase::Run)));
    block_on(streams.close()).unwrap();
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Throughput {
    bytes: u64,
    seconds: f64,
}

#[millstream::block]
fn measure(ctx: &mut BlockContext, chunks: Vec<u64>, seconds: f64) -> BlockResult<Throughput> {
    println!("{} chunks", chunks.len());
    ctx.whiteboard("measured")?;
    Ok(Throughput { bytes: chunks.iter().sum(), seconds })
}

#[test]
fn functions_take_and_give_values() {
    let results = tempfile::tempdir().unwrap();
    let streams = open(results.path());
    let stream = streams.get("any").unwrap();
    let outcome = block_on(stream.run_fg(measure(vec![1, 2, 4], 0.5))).unwrap();
    let measured: Throughput = outcome.value().unwrap();
    assert_eq!(measured, Throughput { bytes: 7, seconds: 0.5 });
    // Of another type, of none, and of one that failed.
    assert_eq!(
        outcome.value::<String>().unwrap_err().to_string(),
        "what task 1-measure returned cannot be read as `alloc::string::String`"
    );
    block_on(stream.run_fg(exec(["true"]))).unwrap().value::<()>().unwrap();
    let failed = block_on(stream.run_fg(exec(["false"]).expect_failure())).unwrap();
    let told = failed.value::<()>().unwrap_err().to_string();
    assert!(told.starts_with("there is no value: task 3-false on stream any (127.0.0.1): failed"), "{told}");
    block_on(streams.close()).unwrap();
}

#[millstream::block]
fn ask(ctx: &mut BlockContext, host: String) -> BlockResult<String> {
    use std::io::{BufRead as _, Write as _};
    let port = ctx.wait::<u16>("port", 1)?[0];
    let mut connection = std::net::TcpStream::connect((host.as_str(), port))?;
    connection.write_all(b"hello\n")?;
    let mut answer = String::new();
    std::io::BufReader::new(connection).read_line(&mut answer)?;
    Ok(answer)
}

#[test]
fn references_name_classes_functions_and_programs() {
    let results = tempfile::tempdir().unwrap();
    let streams = open(results.path());
    let server = streams.get("server").unwrap();
    let client = streams.get("client").unwrap();
    let serving = server.run_bg(reference(format!("{FILE}:Echo.test")));
    let asked = block_on(client.run_fg(reference("ask").param("host", server.host()))).unwrap();
    assert_eq!(asked.value::<String>().unwrap(), "HELLO\n");
    assert_eq!(block_on(serving.wait()).unwrap().whiteboard(), "answered\n");

    let all = reference(FILE).param("numbers", [1, 2, 3]); // but for `Echo`, which is hidden
    let outcomes = block_on(client.run_all_fg(all)).unwrap();
    let labels: Vec<_> = outcomes.iter().map(|outcome| outcome.label()).collect();
    assert_eq!(labels, ["2-Numbers.test_sum", "3-Numbers.test_order"]);
    let phases: Vec<_> = outcomes[0].phases.iter().map(|end| end.phase).collect();
    assert_eq!(phases, [Phase::Setup, Phase::Run, Phase::Teardown]);

    let failed = reference(format!("{FILE}:Numbers.test_order")).param("numbers", [2, 1]).expect_failure();
    let failed = block_on(client.run_fg(failed)).unwrap();
    assert_eq!(failed.phase, Some(Phase::Run));
    assert_eq!(failed.detail, "Numbers.test_order raised AssertionError (blocks_page.py:35)");

    assert_eq!(block_on(client.run_fg(reference("echo 'a b'"))).unwrap().stdout(), "a b\n");
    assert_eq!(block_on(client.run_fg(reference("greet you"))).unwrap().stdout(), "hello you\n");
    block_on(streams.close()).unwrap();
}

/// Knows references such as `greet you`.
struct Greetings;

impl Resolver for Greetings {
    fn name(&self) -> &str {
        "greetings"
    }

    fn resolve(&self, reference: &BlockReference) -> Resolution {
        match reference.text().strip_prefix("greet ") {
            Some(whom) => Resolution::Found(vec![shell("echo hello $WHOM").env("WHOM", whom)]),
            None => Resolution::NotFound { tried: "not of the form `greet whom`".to_owned(), nearest: None },
        }
    }
}

fn alone(reference: &str, parameters: &str) -> (Option<i32>, String, String) {
    let results = tempfile::tempdir().unwrap();
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "__millstream_entry", "--nocapture"])
        .env("MILLSTREAM_ALONE", reference)
        .env("MILLSTREAM_ALONE_PARAMS", parameters)
        .env("MILLSTREAM_RESULTS_DIR", results.path())
        .output()
        .unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

#[test]
fn a_block_runs_alone() {
    let (code, stdout, stderr) = alone("measure", r#"{"chunks": [1, 2], "seconds": 1}"#);
    assert_eq!(code, Some(0), "{stderr}");
    assert!(stdout.ends_with("2 chunks\n"), "{stdout}");
    assert!(stderr.contains("whiteboard: measured\n") && stderr.contains("results: "), "{stderr}");
    let (code, _, stderr) = alone("sh -c 'exit 7'", "{}");
    assert_eq!(code, Some(7), "{stderr}");
    assert!(stderr.contains(": failed in phase run with exit code 7"), "{stderr}");
    let (code, _, stderr) = alone("measrue", "{}");
    assert_eq!(code, Some(1), "{stderr}");
    assert!(stderr.contains("did you mean `measure`?"), "{stderr}");
    let (code, _, stderr) = alone("measure", "[1]");
    assert_eq!(code, Some(125), "{stderr}");
    assert!(
        stderr.contains("MILLSTREAM_ALONE_PARAMS is no JSON object, such as {\"parties\": 1}"),
        "{stderr}"
    );
}

/// What the page shows in a language, piece by piece.
fn shown(language: &str) -> Vec<String> {
    let page = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/blocks.md")).unwrap();
    let begin = format!("```{language}\n");
    let pieces = page.split(&begin).skip(1).map(|piece| piece.split("```").next().unwrap().to_owned());
    let pieces: Vec<String> = pieces.collect();
    assert!(!pieces.is_empty(), "nothing in {language}");
    pieces
}

/// Every command on the page, as it stands there. What stands in for cargo builds nothing: it runs the programs that cargo
/// has built beside this one, and cargo itself where there is none yet.
#[test]
fn the_commands_of_the_page_run() {
    const CARGO: &str = r#"#!/bin/sh
case "$*" in
    "run --example hello -p millstream") [ -x "$BUILT/examples/hello" ] && exec "$BUILT/examples/hello" ;;
    "test -p millstream --test blocks_page -- "*) shift 6; exec "$THIS" "$@" ;;
esac
exec "$CARGO_ITSELF" "$@"
"#;
    let directory = tempfile::tempdir().unwrap();
    let cargo = directory.path().join("cargo");
    fs::write(&cargo, CARGO).unwrap();
    fs::set_permissions(&cargo, fs::Permissions::from_mode(0o755)).unwrap();
    let this = std::env::current_exe().unwrap();
    let search_path = format!("{}:{}", directory.path().display(), std::env::var("PATH").unwrap());
    let mut told = String::new();
    for commands in shown("sh") {
        let output = Command::new("/bin/sh")
            .args(["-e", "-c", &commands])
            .env("PATH", &search_path)
            .env("THIS", &this)
            .env("BUILT", this.ancestors().nth(2).unwrap())
            .env("CARGO_ITSELF", env!("CARGO"))
            .env("MILLSTREAM_RESULTS_DIR", directory.path())
            .output()
            .unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        let (stdout, stderr) = (text(output.stdout), text(output.stderr));
        assert!(output.status.success(), "{commands}: {}\n{stdout}{stderr}", output.status);
        told += &stdout;
    }
    let lines: Vec<&str> = told.lines().filter(|line| ["hello", "2 chunks"].contains(line)).collect();
    assert_eq!(lines, ["hello", "2 chunks"], "{told}");
}

/// Every line of Rust and Python on the page stands in these files, in the same order.
#[test]
fn the_page_shows_what_runs_here() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let lines = |text: &str| {
        let lines = text.lines().map(|line| line.trim().to_owned());
        lines.filter(|line| !line.is_empty()).collect::<Vec<_>>()
    };
    for (language, file) in [("rust", "tests/blocks_page.rs"), ("python", "tests/blocks_page.py")] {
        let source = lines(&fs::read_to_string(here.join(file)).unwrap());
        for fence in shown(language) {
            let fence = lines(&fence);
            let stands = source.windows(fence.len()).any(|window| window == fence);
            assert!(stands, "{file} lacks what docs/blocks.md shows:\n{}", fence.join("\n"));
        }
    }
}
