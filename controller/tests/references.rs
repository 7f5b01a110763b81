//! Blocks that are named by a text, run for real on this machine: classes of Python files above all.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test that cannot go on fails, and the output of a block is its log"
)]

use std::{fs, path::PathBuf, sync::Arc, time::Duration};

use millstream::{
    Block, BlockReference, Outcome, OutcomeKind, Phase, Ready, Reason, Resolution, Resolver, Streams,
    blocking::block_on, reference, shell,
};

millstream::entry!();

const CLASSES: &str = r#"
import os, signal, time, unittest
import beside

class Plain:
    def setUp(self):
        self.port = beside.PORT
        if self.params.get("fail") == "setUp":
            raise OSError("no port left")

    def test(self):
        print("run", self.port, self.params.get("depth", "/tree/*"), self.params.get("none", default=3))
        with open(os.path.join(self.outputdir, "kept"), "w") as file:
            file.write("data")
        if self.params.get("fail") == "test":
            raise ValueError("as asked")
        self.whiteboard = "noted"

    def tearDown(self):
        print("torn down")

class Unit(unittest.TestCase):
    def test_first(self):
        self.assertEqual(1, 1)

    def test_second(self):
        self.skipTest("no such disk")

class Expected(unittest.TestCase):
    """:millstream: hidden"""
    @unittest.expectedFailure
    def test_fails(self):
        self.fail("as it should")

    @unittest.expectedFailure
    def test_passes(self):
        pass

class Odd:
    """:millstream: hidden"""
    def test_crash(self):
        os.kill(os.getpid(), signal.SIGKILL)

    def test_long(self):
        print("up")
        time.sleep(1000)

    def test_greedy(self):
        while True:
            try:
                time.sleep(1000)
            except Exception:
                pass

    def test_deaf(self):
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        time.sleep(1000)

    def tearDown(self):
        if self.params.get("crash"):
            os.kill(os.getpid(), signal.SIGSEGV)
        print("torn down")
"#;

struct Place {
    directory: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("classes.py"), CLASSES).unwrap();
        fs::write(directory.path().join("beside.py"), "PORT = 5201\n").unwrap();
        Self { directory }
    }

    fn file(&self) -> PathBuf {
        self.directory.path().join("classes.py")
    }

    fn named(&self, inside: &str) -> Block {
        reference(format!("{}:{inside}", self.file().display()))
    }

    fn open(&self) -> Streams {
        let results = self.directory.path().join("results");
        Streams::builder("references").only_given().results_dir(results).resolver(Greetings).open().unwrap()
    }

    fn run(&self, block: Block) -> Arc<Outcome> {
        let streams = self.open();
        let outcome = block_on(streams.get("s").unwrap().run_bg(block).outcome());
        block_on(streams.close()).unwrap();
        outcome
    }
}

/// A resolver of this test's own.
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

fn phases(outcome: &Outcome) -> Vec<(Phase, OutcomeKind)> {
    outcome.phases.iter().map(|end| (end.phase, end.outcome)).collect()
}

#[test]
fn a_class_runs_with_what_lies_beside_its_file() {
    let place = Place::new();
    let block = place.named("Plain.test").param("tree", serde_json::json!({"depth": 2}));
    let outcome = place.run(block);
    assert!(outcome.passed(), "{outcome}");
    assert_eq!(outcome.stdout(), "run 5201 2 3\ntorn down\n");
    assert_eq!((outcome.whiteboard().as_str(), outcome.exit_code()), ("noted\n", Some(0)));
    assert_eq!(fs::read_to_string(outcome.data().join("kept")).unwrap(), "data");
    let passed = OutcomeKind::Passed;
    assert_eq!(phases(&outcome), [(Phase::Setup, passed), (Phase::Run, passed), (Phase::Teardown, passed)]);
    assert_eq!(outcome.label(), "1-Plain.test");
    // Where it is on the host already, nothing is shipped.
    let outcome = place.run(place.named("Plain.test").no_copy());
    assert!(outcome.passed(), "{outcome}");
}

#[test]
fn the_phase_that_failed_is_named_with_its_cause_and_place() {
    let place = Place::new();
    let outcome = place.run(place.named("Plain.test").param("fail", "setUp"));
    assert_eq!((outcome.kind, outcome.phase), (OutcomeKind::Failed, Some(Phase::Setup)), "{outcome}");
    assert_eq!(outcome.detail, "Plain.setUp raised OSError: no port left (classes.py:9)");
    assert_eq!(outcome.stdout(), "torn down\n");
    assert!(outcome.stderr().starts_with("Traceback (most recent call last):\n"), "{}", outcome.stderr());
    let outcome = place.run(place.named("Plain.test").param("fail", "test"));
    assert_eq!((outcome.kind, outcome.phase), (OutcomeKind::Failed, Some(Phase::Run)), "{outcome}");
    let sentence = outcome.sentence();
    assert!(sentence.contains(": failed in phase run with exit code 1 after "), "{sentence}");
    assert!(sentence.ends_with(": Plain.test raised ValueError: as asked (classes.py:16)"), "{sentence}");
    assert!(place.run(place.named("Expected.test_fails")).passed());
    let outcome = place.run(place.named("Expected.test_passes"));
    assert_eq!((outcome.kind, outcome.phase), (OutcomeKind::Failed, Some(Phase::Run)), "{outcome}");
    assert_eq!(outcome.detail, "Expected.test_passes was expected to fail and passed");
    // A command beside it is a phase; then those of the class are not.
    let outcome = place.run(place.named("Plain.test").param("fail", "setUp").setup("echo before"));
    assert_eq!((outcome.phase, phases(&outcome).len()), (Some(Phase::Run), 2), "{outcome}");
}

#[test]
fn everything_in_a_file_runs_one_after_another() {
    let place = Place::new();
    let streams = place.open();
    let stream = streams.get("s").unwrap();
    let outcomes = block_on(stream.run_all_fg(reference(place.file().display().to_string()))).unwrap();
    let names: Vec<_> = outcomes.iter().map(|outcome| outcome.label()).collect();
    assert_eq!(names, ["1-Plain.test", "2-Unit.test_first", "3-Unit.test_second"]);
    assert_eq!(outcomes[2].detail, "skipped: no such disk");
    assert!(outcomes[2].sentence().contains(": passed after "), "{}", outcomes[2]);
    let several = block_on(stream.run_bg(place.named("Unit")).outcome());
    assert_eq!((several.kind, several.reason), (OutcomeKind::Error, Reason::InvalidBlock));
    assert!(several.detail.contains("run one of them, or all with `run_all_bg`"), "{several}");
    let none = stream.run_all_bg(place.named("Unti"));
    assert_eq!(none.len(), 1);
    let none = block_on(none[0].outcome());
    assert!(none.detail.contains("classes.py:Unit`?"), "{none}");
    block_on(streams.close()).unwrap();
}

#[test]
fn a_class_that_dies_is_not_torn_down_and_one_that_is_stopped_is() {
    let place = Place::new();
    let outcome = place.run(place.named("Odd.test_crash"));
    assert_eq!((outcome.kind, outcome.phase), (OutcomeKind::Killed, Some(Phase::Run)), "{outcome}");
    assert!(outcome.detail.ends_with("; teardown was not run"), "{outcome}");
    let streams = place.open();
    let task = streams.get("s").unwrap().run_bg(place.named("Odd.test_long"));
    block_on(task.ready(Ready::log("up"))).unwrap();
    let outcome = block_on(async { task.stop().await });
    assert_eq!((outcome.kind, outcome.phase), (OutcomeKind::Stopped, Some(Phase::Run)), "{outcome}");
    assert_eq!(outcome.stdout(), "up\ntorn down\n");
    assert!(outcome.stderr().contains("Terminated: the block was asked to end"), "{}", outcome.stderr());
    block_on(streams.close()).unwrap();
}

#[test]
fn a_class_that_is_too_slow_is_torn_down_and_one_that_does_not_listen_is_killed() {
    let place = Place::new();
    // Long enough for Python to begin on a machine that has other things to do.
    let limited = |method: &str| place.named(&format!("Odd.{method}")).timeout(Duration::from_secs(4));
    // Nothing that the class does may swallow what asks it to end.
    for method in ["test_long", "test_greedy"] {
        let outcome = place.run(limited(method));
        assert_eq!((outcome.kind, outcome.phase), (OutcomeKind::TimedOut, Some(Phase::Run)), "{outcome}");
        let ends = [OutcomeKind::Passed, OutcomeKind::TimedOut, OutcomeKind::Passed];
        let all = [Phase::Setup, Phase::Run, Phase::Teardown];
        assert_eq!(phases(&outcome), all.into_iter().zip(ends).collect::<Vec<_>>(), "{outcome}");
        assert!(outcome.stdout().ends_with("torn down\n"), "{outcome}");
        assert!(
            outcome.detail.contains(" still ran after its limit of 4.0 s and was terminated: "),
            "{outcome}"
        );
        let raised =
            format!("Odd.{method} raised Terminated: the block was asked to end (signal 15) (classes.py:");
        assert!(outcome.detail.contains(&raised), "{outcome}");
    }
    let outcome = place.run(limited("test_deaf").grace(Duration::from_millis(100)));
    assert_eq!((outcome.kind, outcome.phase), (OutcomeKind::TimedOut, Some(Phase::Run)), "{outcome}");
    assert!(outcome.detail.ends_with(" was killed; teardown was not run"), "{outcome}");
    assert_eq!((outcome.stdout().as_str(), outcome.signal()), ("", Some(9)), "{outcome}");
    // The first to fail decides, and a tear-down that dies on the way is told.
    let outcome = place.run(limited("test_long").param("crash", true));
    assert_eq!((outcome.kind, outcome.phase), (OutcomeKind::TimedOut, Some(Phase::Run)), "{outcome}");
    let last = outcome.phases.last().map(|end| (end.phase, end.outcome));
    assert_eq!(last, Some((Phase::Teardown, OutcomeKind::Killed)), "{outcome}");
}

#[millstream::block]
fn count(from: u32, names: Vec<String>) {
    println!("{from} {}", names.join("+"));
}

#[test]
fn functions_programs_and_resolvers_of_a_user_run_by_their_names() {
    let place = Place::new();
    let block = reference("count").param("names", ["a", "b"]).param("from", 3);
    assert_eq!(place.run(block).stdout(), "3 a+b\n");
    assert_eq!(place.run(reference("echo 'a b'")).stdout(), "a b\n");
    assert_eq!(place.run(reference("greet you")).stdout(), "hello you\n");
    let outcome = place.run(reference("count").param("from", 3));
    assert!(outcome.detail.contains("`count` takes `names`: give it to the reference with"), "{outcome}");
}
