//! The collection of a test's streams: names, indexes, slices, patterns, what is defined when, and what cannot be had.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::{
    fs,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use millstream::{
    Definition, OutcomeKind, Params, Reason, StreamError, StreamGroup, Streams, StreamsBuilder,
    blocking::{BlockingStream as _, BlockingStreams as _, BlockingTask as _},
    exec, python,
    reach::{self, DialError, Dialing, PlaceError, Reach, Releasing},
    shell,
};
use proptest::prelude::*;

millstream::entry!();

struct Lab {
    streams: Streams,
    _results: tempfile::TempDir,
}

fn lab(refine: impl FnOnce(StreamsBuilder) -> StreamsBuilder) -> Lab {
    let results = tempfile::tempdir().unwrap();
    let builder =
        Streams::builder("t").only_given().results_dir(results.path()).deadline(Duration::from_secs(120));
    Lab { streams: refine(builder).open().unwrap(), _results: results }
}

fn names(group: &StreamGroup) -> Vec<&str> {
    group.iter().map(|stream| stream.name().as_str()).collect()
}

/// A place that counts what is done with it.
#[derive(Debug, Default)]
struct Counted {
    dialled: AtomicUsize,
    released: AtomicUsize,
    described: AtomicUsize,
    /// What it says that it could not tidy.
    left: Vec<String>,
}

impl Reach for Counted {
    fn dial(&self) -> Dialing<'_> {
        self.dialled.fetch_add(1, Ordering::SeqCst);
        let reason = "it only counts".to_owned();
        Box::pin(async { Err(DialError::Refused { address: self.describe(), reason }) })
    }

    fn describe(&self) -> String {
        self.described.fetch_add(1, Ordering::SeqCst);
        format!("counted://{self:p}")
    }

    fn host(&self) -> String {
        "counted".to_owned()
    }

    fn release(&self) -> Releasing<'_> {
        self.released.fetch_add(1, Ordering::SeqCst);
        Box::pin(async { self.left.clone() })
    }
}

#[test]
fn streams_are_had_by_name_index_slice_and_pattern() {
    let params: Params =
        "streams: {server: local, client-1: local, client-2: local, client-x: local}".parse().unwrap();
    let lab = lab(|builder| builder.params(params));
    let streams = &lab.streams;
    assert_eq!((streams.len(), streams.initialized()), (4, 0));
    assert_eq!(streams.get(1).unwrap().name().as_str(), "client-1");
    assert_eq!(streams.get("client-2").unwrap().index(), 2);
    assert_eq!(names(&streams.slice(1..).unwrap()), ["client-1", "client-2", "client-x"]);
    assert_eq!(names(&streams.slice(..=1).unwrap()), ["server", "client-1"]);
    assert_eq!(names(&streams.slice(2..2).unwrap()), [""; 0]);
    assert_eq!(names(&streams.select(r"client-\d+").unwrap()), ["client-1", "client-2"]);
    assert_eq!(names(&streams.select("client").unwrap()), [""; 0]);
    assert_eq!(names(&streams.select("x|server").unwrap()), ["server"]);
    assert!(matches!(streams.select("("), Err(StreamError::Pattern { .. })));
    assert_eq!(names(&streams.all()).len(), 4);
    streams.get(0).unwrap().run_bg(exec(["true"]));
    assert_eq!((streams.len(), streams.initialized()), (4, 1));
    lab.streams.close_blocking().unwrap();
}

#[test]
fn what_nobody_defined_is_defined_with_gaps_or_refused_by_name() {
    let open = lab(|builder| builder.stream("0", "local").stream("2", "local"));
    assert_eq!(open.streams.get(4).unwrap().name().as_str(), "4");
    assert_eq!(names(&open.streams.all()), ["0", "2", "2_", "3", "4"]);
    open.streams.get("by name").unwrap();
    assert_eq!(open.streams.get(5).unwrap().name().as_str(), "by name");
    let error = open.streams.slice(0..usize::MAX).unwrap_err();
    assert_eq!(error.to_string(), format!("there is no stream {}: 6 streams are defined", usize::MAX - 1));
    assert_eq!(open.streams.len(), 6);

    let strict = lab(|builder| builder.stream("server", "local").strict());
    let refused = |error: StreamError| error.to_string();
    assert_eq!(refused(strict.streams.get(1).unwrap_err()), "there is no stream 1: 1 stream is defined");
    assert_eq!(
        refused(strict.streams.get("servr").unwrap_err()),
        "stream `servr` is not defined: there are `server` (did you mean `server`?)"
    );
    assert_eq!(refused(strict.streams.slice(0..3).unwrap_err()), "there is no stream 2: 1 stream is defined");
    assert_eq!(strict.streams.len(), 1);
    let error = refused(strict.streams.add("server", "local").unwrap_err());
    assert_eq!(error, "stream `server` is defined already: give the new one another name");
}

#[test]
fn a_stream_that_cannot_be_had_is_a_value_to_look_at() {
    let params: Params = "\
streams:
  box: lxd://create=yes,image=fedora,remove=always
  far: rsh://tester@far.example.com:2222
  typo: {type: tsl, host: x}
  away: {type: tls, host: !env-shown MILLSTREAM_NOT_SET}
"
    .parse()
    .unwrap();
    let lab = lab(|builder| builder.params(params));
    let streams = &lab.streams;
    let reason = |name: &str| match streams.try_get(name).unwrap_err() {
        StreamError::Place { reason, .. } => reason,
        other => panic!("{other}"),
    };
    assert!(matches!(reason("box"), PlaceError::UnknownKind { kind, .. } if kind == "lxd"));
    assert!(matches!(reason("far"), PlaceError::UnknownKind { kind, .. } if kind == "rsh"));
    assert!(matches!(reason("typo"), PlaceError::UnknownKind { nearest: Some(near), .. } if near == "tls"));
    assert!(matches!(reason("away"), PlaceError::Reference(_)));
    assert!(matches!(streams.try_get("nobody"), Err(StreamError::Unknown { .. })));
    assert!(matches!(streams.try_get(9), Err(StreamError::NoIndex { index: 9, count: 4 })));
    assert_eq!(streams.len(), 4, "looking defines nothing");

    let error = streams.get("typo").unwrap_err().to_string();
    assert!(
        error.starts_with(
            "stream `typo`, defined by parameters:4:3: stream type `tsl` is unknown: use one of `"
        ),
        "{error}"
    );
    assert!(error.ends_with("(did you mean `tls`?)"), "{error}");
    let told = format!("{:?}", millstream::Error::from(streams.get("typo").unwrap_err()));
    assert_eq!(told.matches("`unix`").count(), 1, "{told}");
    assert_eq!(
        streams.get("away").unwrap_err().to_string(),
        "stream `away`, defined by parameters:5:3: parameters:5:38: the variable `MILLSTREAM_NOT_SET` is not set: set it for this program, or name another with `!env`"
    );
    // In a group it is an end like others.
    let outcome = streams.select("box").unwrap().run_bg(exec(["true"])).remove(0);
    let outcome = millstream::blocking::block_on(outcome.outcome());
    assert_eq!(outcome.kind, OutcomeKind::Error);
    assert!(outcome.detail.contains("stream type `lxd` is unknown"), "{outcome}");
    let error = streams.add("more", "vm://rawhide").unwrap_err().to_string();
    assert!(error.contains("stream type `vm` is unknown"), "{error}");
    assert_eq!(streams.len(), 4, "what cannot be had is not added");
    lab.streams.close_blocking().unwrap();
}

#[test]
fn a_type_that_somebody_registered_takes_the_same_grammar() {
    reach::register("rack", |place| {
        let slot = place.options.get("slot").cloned().unwrap_or_default();
        if slot != "3" {
            return Err(PlaceError::UnknownOption {
                kind: place.kind.clone(),
                key: format!("slot={slot}"),
                known: "`slot=3`".to_owned(),
                nearest: None,
            });
        }
        assert_eq!(place.options.get("power").map(String::as_str), Some("on"));
        Ok(Arc::new(Counted::default()) as Arc<dyn Reach>)
    });
    let params: Params = "\
streams:
  - a: {type: rack, slot: 3, power: 'on'}
  - b: rack://slot=3,power=on
  - rack://shelf?slot=3&power=on
  - d: rack://slot=4
"
    .parse()
    .unwrap();
    let lab = lab(|builder| {
        builder
            .params(params)
            .stream("e", Definition::of("rack").key("slot", 3).secret("power", "on").env("A", "b"))
    });
    for name in ["a", "b", "2", "e"] {
        assert_eq!(lab.streams.try_get(name).unwrap().host(), "counted");
    }
    let error = lab.streams.try_get("d").unwrap_err().to_string();
    assert_eq!(
        error,
        "stream `d`, defined by parameters:5:5: `rack` does not know the key `slot=4`: it takes `slot=3`"
    );
}

#[test]
fn reaches_that_were_made_by_hand_are_dialled_when_used_and_always_released() {
    let leaving = |what: &str| Arc::new(Counted { left: vec![what.to_owned()], ..Counted::default() });
    let (used, unused) = (leaving("a guest"), leaving("a disk"));
    let lab = lab(|builder| builder.stream("used", Arc::clone(&used) as Arc<dyn Reach>));
    let hand: Arc<dyn Reach> = Arc::clone(&unused) as _;
    lab.streams.add("unused", hand).unwrap();
    let counts =
        |reach: &Counted| (reach.dialled.load(Ordering::SeqCst), reach.released.load(Ordering::SeqCst));
    assert_eq!((counts(&used), counts(&unused)), ((0, 0), (0, 0)));
    let task = lab.streams.get("used").unwrap().run_bg(shell("true"));
    let outcome = millstream::blocking::block_on(task.outcome());
    assert!(outcome.detail.contains("it only counts"), "{outcome}");
    let error = lab.streams.close_blocking().unwrap_err().to_string();
    assert!(error.contains(": a guest; counted://") && error.ends_with(": a disk"), "{error}");
    assert!(used.dialled.load(Ordering::SeqCst) > 0);
    assert_eq!((used.released.load(Ordering::SeqCst), counts(&unused)), (1, (0, 1)));
    let error = lab_error(Definition::reach(unused).key("host", "x"));
    assert_eq!(
        error,
        "the test: stream `x` has the unknown key `host`: use one of `type`, `env`, `cwd`, `user`, `timeout`, `wrap`, `limits`, `on_failure`, `exclusive`, `wait`"
    );
}

fn lab_error(definition: Definition) -> String {
    Streams::builder("t").only_given().stream("x", definition).open().unwrap_err().to_string()
}

#[test]
fn definitions_in_code_are_checked_as_those_in_files() {
    assert_eq!(lab_error(Definition::of("tls")), "the test: stream `x` of type `tls` lacks the key `host`");
    assert_eq!(
        lab_error(Definition::local().key("cwd", "/a").key("cwd", "/b")),
        "the test: stream `x` is given the key `cwd` twice: remove one"
    );
    assert_eq!(
        lab_error(Definition::of("a b")),
        "the test: `type` of stream `x` is `a b`: write one word, such as `tls`"
    );
    assert_eq!(
        lab_error(Definition::url("tls://x").key("hots", "y")),
        "the test: stream `x` has the unknown key `hots`: did you mean `host`? (there are `host`, `port`, `authority`, `certificate`, `key`, `revocations`, `server_name`, `type`, `env`, `cwd`, `user`, `timeout`, `wrap`, `limits`, `on_failure`, `exclusive`, `wait`)"
    );
    let shown = format!("{:?}", Definition::url("vm://x?token=hunter2").secret("password", "hunter2"));
    assert_eq!(shown, r#"Definition { place: "vm://x?token=…", keys: ["password"], .. }"#);
}

#[test]
fn what_holds_for_a_stream_holds_for_its_blocks() {
    let here = Definition::url("local://").cwd("/").env("WORD", "from code").key("timeout", "90s");
    let lab = lab(|builder| builder.stream("a", here));
    let task = lab.streams.get("a").unwrap().run_bg(shell("pwd; echo $WORD"));
    let outcome = millstream::blocking::block_on(task.wait()).unwrap();
    assert_eq!(outcome.stdout(), "/\nfrom code\n");
    lab.streams.close_blocking().unwrap();
}

#[test]
fn paths_of_a_test_add_to_each_other_and_the_first_has_the_first_word() {
    let params: Params = "\
streams: {server: local, client: local}
test1: {streams: {server: {type: local, cwd: /tmp}}}
"
    .parse()
    .unwrap();
    let lab = lab(|builder| builder.params_at(params, "*/test1/streams/*").streams_at("/streams/*"));
    assert_eq!(names(&lab.streams.all()), ["server", "client"]);
    let pwd = |name: &str| {
        millstream::blocking::block_on(lab.streams.get(name).unwrap().run_fg(shell("pwd"))).unwrap().stdout()
    };
    assert_eq!(pwd("server"), "/tmp\n");
    assert_ne!(pwd("client"), "/tmp\n");
    lab.streams.close_blocking().unwrap();
}

#[test]
fn tests_are_closed_in_any_order_and_handles_outlive_them() {
    let [first, second, third] = [lab(|b| b), lab(|b| b), lab(|b| b)];
    let handles: Vec<_> = [&first, &second, &third].map(|lab| lab.streams.get("a").unwrap()).into();
    for stream in &handles {
        stream.run_bg(exec(["true"]));
    }
    second.streams.wait_blocking().unwrap();
    second.streams.close_blocking().unwrap();
    drop(third.streams);
    first.streams.wait_blocking().unwrap();
    first.streams.close_blocking().unwrap();
    for stream in handles {
        let outcome = millstream::blocking::block_on(stream.run_bg(exec(["true"])).outcome());
        assert_eq!(
            (outcome.kind, outcome.detail.as_str()),
            (OutcomeKind::Cancelled, "the streams are closed")
        );
    }
}

#[test]
fn streams_are_closed_in_any_order_while_the_others_run() {
    let lab = lab(|builder| builder.stream("a", "local").stream("b", "local").stream("c", "local"));
    let stream = |name: &str| lab.streams.get(name).unwrap();
    let met = "millstream-sync barrier everybody all";
    for name in ["a", "b", "c"] {
        stream(name).run_bg(shell(met));
    }
    lab.streams.wait_blocking().unwrap();
    let service = stream("a").run_bg(shell("echo up; exec sleep 1000"));
    service.ready_blocking(millstream::Ready::log("up")).unwrap();
    stream("a").close_blocking().unwrap();
    let outcome = service.outcome_blocking();
    assert_eq!((outcome.kind, outcome.reason), (OutcomeKind::Stopped, Reason::SessionClosed), "{outcome}");
    // It is no party any more.
    stream("c").run_bg(shell(met));
    stream("b").run_fg_blocking(shell(met)).unwrap();
    stream("c").close_blocking().unwrap();
    stream("b").close_blocking().unwrap();
    // There is no session on this machine now, until somebody needs one.
    let again = lab.streams.add("d", "local").unwrap();
    assert_eq!(again.run_fg_blocking(shell("echo again")).unwrap().stdout(), "again\n");
    lab.streams.wait_blocking().unwrap();
    lab.streams.close_blocking().unwrap();
}

#[test]
fn streams_are_added_while_others_run() {
    let lab = lab(|builder| builder);
    let running = lab.streams.get("a").unwrap().run_bg(shell("millstream-sync barrier met 2"));
    let added = lab.streams.add("b", Definition::local()).unwrap();
    added.run_bg(shell("millstream-sync barrier met 2"));
    millstream::blocking::block_on(running.wait()).unwrap();
    assert_eq!((lab.streams.len(), lab.streams.initialized()), (2, 2));
    lab.streams.wait_blocking().unwrap();
    lab.streams.close_blocking().unwrap();
}

#[derive(Debug, Clone)]
enum Step {
    Name(String),
    Index(usize),
    Look(usize),
    Add(String),
    Slice(usize, usize),
    Select(String),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let name = || "[ab0-2]{1,2}";
    let step = prop_oneof![
        name().prop_map(Step::Name),
        (0..6_usize).prop_map(Step::Index),
        (0..6_usize).prop_map(Step::Look),
        name().prop_map(Step::Add),
        (0..6_usize, 0..6_usize).prop_map(|(begin, end)| Step::Slice(begin, end)),
        "[ab.]{1,2}".prop_map(Step::Select),
    ];
    prop::collection::vec(step, 1..12)
}

/// What the documentation says of a collection: a list of names.
#[derive(Default)]
struct Model(Vec<String>);

impl Model {
    fn fill(&mut self, count: usize) {
        while self.0.len() < count {
            let mut name = self.0.len().to_string();
            while self.0.contains(&name) {
                name.push('_');
            }
            self.0.push(name);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_collection_is_a_list_of_names_that_only_grows(steps in steps()) {
        let lab = lab(|builder| builder);
        let (streams, mut model) = (&lab.streams, Model::default());
        for step in steps {
            match step {
                Step::Name(name) => {
                    let stream = streams.get(&name).unwrap();
                    if !model.0.contains(&name) {
                        model.0.push(name.clone());
                    }
                    prop_assert_eq!(model.0.get(stream.index()), Some(&name));
                }
                Step::Index(index) => {
                    let stream = streams.get(index).unwrap();
                    model.fill(index + 1);
                    prop_assert_eq!((stream.index(), stream.name().as_str()), (index, model.0[index].as_str()));
                }
                Step::Look(index) => prop_assert_eq!(streams.try_get(index).is_ok(), index < model.0.len()),
                Step::Add(name) => {
                    let is_new = !model.0.contains(&name);
                    prop_assert_eq!(streams.add(&name, "local").is_ok(), is_new);
                    if is_new {
                        model.0.push(name);
                    }
                }
                Step::Slice(begin, end) => {
                    let slice = streams.slice(begin..end).unwrap();
                    if begin < end {
                        model.fill(end);
                    }
                    prop_assert_eq!(names(&slice), model.0.get(begin..end).unwrap_or_default().iter().collect::<Vec<_>>());
                }
                Step::Select(pattern) => {
                    let fits = |name: &&String| {
                        name.len() == pattern.len()
                            && name.chars().zip(pattern.chars()).all(|(n, p)| p == '.' || n == p)
                    };
                    let selected = streams.select(&pattern).unwrap();
                    prop_assert_eq!(names(&selected), model.0.iter().filter(fits).collect::<Vec<_>>());
                }
            }
            let all = streams.all();
            prop_assert_eq!(names(&all), model.0.iter().collect::<Vec<_>>());
            prop_assert_eq!((streams.len(), streams.initialized()), (model.0.len(), 0));
        }
    }
}

#[test]
fn ten_thousand_streams_are_defined_and_none_is_made() {
    static MADE: AtomicUsize = AtomicUsize::new(0);
    reach::register("made", |_| {
        MADE.fetch_add(1, Ordering::SeqCst);
        Ok(Arc::new(Counted::default()) as Arc<dyn Reach>)
    });
    let lines: String =
        (0..10_000).map(|n| format!("  s{n}: {{type: made, key: !file /nonexistent}}\n")).collect();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("lab.yaml");
    fs::write(&path, format!("streams:\n{lines}")).unwrap();
    let params = Params::load(path).unwrap();
    let lab = lab(|builder| builder.params(params));
    assert_eq!((lab.streams.len(), lab.streams.initialized()), (10_000, 0));
    assert_eq!(lab.streams.select("s77.").unwrap().len(), 10);
    assert_eq!(lab.streams.slice(5..15).unwrap().len(), 10);
    lab.streams.close_blocking().unwrap();
    assert_eq!(MADE.load(Ordering::SeqCst), 0);
}

#[test]
fn many_streams_are_told_to_many_blocks_once() {
    const STREAMS: usize = 2_000;
    const TASKS: usize = 10;
    let reach = Arc::new(Counted::default());
    let lab = lab(|builder| {
        let add = |builder: StreamsBuilder, number| {
            builder.stream(format!("s{number}"), Arc::clone(&reach) as Arc<dyn Reach>)
        };
        (0..STREAMS).fold(builder.stream("here", "local"), add)
    });
    let here = lab.streams.get("here").unwrap();
    let count = "import millstream; print(len(millstream.topology()['streams']))";
    for _ in 0..TASKS {
        here.run_bg(python(count));
    }
    for outcome in lab.streams.wait_blocking().unwrap().outcomes {
        assert_eq!(outcome.stdout(), format!("{}\n", STREAMS + 1));
    }
    // Once before this machine was reached, at most, and once after it.
    let described = reach.described.load(Ordering::SeqCst);
    assert!(described <= 2 * STREAMS, "{described} times");
    assert_eq!(reach.dialled.load(Ordering::SeqCst), 0);
    lab.streams.close_blocking().unwrap();
}
