//! Parameters in real runs: what tests and blocks are given, and that what is secret is seen by nobody else.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::{
    fmt::Debug,
    fs,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    io,
    path::Path,
    sync::{Arc, Mutex, OnceLock},
    time::Duration,
};

use millstream::{
    BlockContext, BlockResult, OutcomeKind, Params, Stream, Streams,
    reach::{self, DialError, Dialing, Place, Reach},
    shell,
};
use proptest::{
    prelude::*,
    test_runner::{Config, TestRunner},
};

millstream::entry!();

fn digest(text: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    hasher.finish()
}

/// Tells whether it was given what it should have been, and nothing else.
#[millstream::block]
fn recognise(ctx: &mut BlockContext, digests: Vec<(String, u64)>) -> BlockResult {
    for (name, expected) in digests {
        let given: String = ctx.param(&name)?;
        if digest(&given) != expected {
            return Err(format!("parameter {name} is another").into());
        }
    }
    Ok(())
}

/// A place that cannot be reached, and whose author did not think of secrets.
#[derive(Debug)]
struct Careless {
    place: Place,
    #[expect(dead_code, reason = "it is here to be shown by `Debug`")]
    password: String,
}

impl Reach for Careless {
    fn dial(&self) -> Dialing<'_> {
        let address = self.describe();
        Box::pin(async { Err(DialError::Refused { address, reason: "it is not there".to_owned() }) })
    }

    fn describe(&self) -> String {
        format!("careless://{}", self.place.address)
    }

    fn host(&self) -> String {
        self.place.address.clone()
    }
}

/// Everything that was logged by this process.
fn log() -> &'static Mutex<Vec<u8>> {
    static LOG: OnceLock<Mutex<Vec<u8>>> = OnceLock::new();
    struct Append;
    impl io::Write for Append {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            log().lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    LOG.get_or_init(|| {
        let level = tracing_subscriber::filter::LevelFilter::TRACE;
        tracing_subscriber::fmt().with_max_level(level).with_writer(|| Append).init();
        Mutex::default()
    })
}

fn holds(bytes: &[u8], secret: &str) -> bool {
    bytes.windows(secret.len()).any(|window| window == secret.as_bytes())
}

fn assert_absent(bytes: &[u8], secrets: &[String], place: &str) {
    for (number, secret) in secrets.iter().enumerate() {
        assert!(!holds(bytes, secret), "secret {number} is in {place}: {}", String::from_utf8_lossy(bytes));
    }
}

fn assert_absent_below(directory: &Path, secrets: &[String]) -> usize {
    let mut count = 0;
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        assert_absent(path.as_os_str().as_encoded_bytes(), secrets, "a name");
        if path.is_dir() && !path.is_symlink() {
            count += assert_absent_below(&path, secrets);
        } else if path.is_file() {
            assert_absent(&fs::read(&path).unwrap(), secrets, &path.display().to_string());
            count += 1;
        }
    }
    count
}

const LAB: &str = "\
streams:
  here: {type: local}
  far: {type: careless, host: far.example.com, password: !secret SECRET0, key: !file key}
lab:
  login: !secret {user: SECRET3, password: &again SECRET4}
  password: *again
  token: !file token
  port: 80
";

/// One run of a test that uses each of its secrets in every way there is.
async fn run(secrets: &[String]) {
    let directory = tempfile::tempdir().unwrap();
    let mut text = LAB.to_owned();
    for (number, secret) in secrets.iter().enumerate() {
        text = text.replace(&format!("SECRET{number}"), secret);
    }
    let file = |name: &str| directory.path().join(name);
    fs::write(file("lab.yaml"), text).unwrap();
    fs::write(file("key"), format!("{}\n", secrets[1])).unwrap();
    fs::write(file("token"), &secrets[5]).unwrap();
    let params = Params::load(file("lab.yaml")).unwrap();
    let builder = Streams::builder("secrets")
        .only_given()
        .results_dir(file("results"))
        .deadline(Duration::from_secs(120))
        .params(params.clone())
        .stream("near", format!("careless://password=none,key=none,token={}", secrets[2]))
        .secret_param("late", "/lab", &secrets[6]);
    let mut seen = vec![format!("{params:?} {builder:?} {}", serde_json::to_string(&params).unwrap())];
    let mut look = |what: &dyn Debug| seen.push(format!("{what:?} {what:#?}"));

    let streams = builder.open().unwrap();
    assert_eq!(streams.params().get::<String>("late", "/lab").unwrap(), secrets[6]);
    look(&streams.params().get::<bool>("token", "/lab").unwrap_err());
    look(&streams.params().get::<bool>("password", "*").unwrap_err());
    let here = streams.get("here").unwrap();
    let given = [("password", &secrets[4]), ("token", &secrets[5]), ("late", &secrets[6])];
    let digests = given.map(|(name, secret)| (name.to_owned(), digest(secret))).to_vec();
    let block = recognise(digests).params(streams.params(), "/lab");
    look(&block);
    let outcome = here.run_fg(block).await.unwrap();
    look(&outcome);
    // Whatever a block can see of itself without opening its file of parameters, and how a failure is told.
    let block = shell("env; cat $MILLSTREAM_TOPOLOGY; ls -lR . $MILLSTREAM_OUTPUT; exit 1");
    let task = here.run_bg(block.params(streams.params(), "/lab").secret_param("own", &secrets[7]));
    let outcome = task.outcome().await;
    assert!(outcome.stdout().contains("MILLSTREAM_PARAM_PORT=80"), "{}", outcome.stdout());
    assert!(outcome.stdout().contains("far.example.com"), "{}", outcome.stdout());
    look(&outcome);
    look(&task);
    let far = streams.get("far").unwrap();
    let outcome = far.run_bg(shell("true").params(streams.params(), "/lab")).outcome().await;
    assert_eq!(outcome.kind, OutcomeKind::Error, "{outcome}");
    look(&outcome);
    look(&outcome.to_string());
    look(&far);
    look(&streams.get("near").unwrap());
    look(&streams.all());
    look(&streams);
    look(&streams.results().to_string());
    look(&streams.wait().await.unwrap_err());
    look(&streams.add("more", "careless://x?password=none&b").unwrap_err());
    streams.close().await.unwrap();

    assert_absent(seen.join("\n").as_bytes(), secrets, "what is shown");
    let files = assert_absent_below(&file("results"), secrets);
    assert!(files > 8, "{files} files of results");
    assert_absent(&log().lock().unwrap(), secrets, "the log");
}

#[test]
fn a_secret_is_in_no_result_no_log_and_no_text() {
    reach::register("careless", |place| {
        let password = place.options["password"].clone();
        assert!(
            place.secrets.contains("password")
                && place.secrets.contains("token") != place.secrets.contains("key")
        );
        Ok(Arc::new(Careless { place: place.clone(), password }) as Arc<dyn Reach>)
    });
    drop(log().lock().unwrap());
    let runtime = tokio::runtime::Runtime::new().unwrap();
    // Few cases: each is a whole test with its agent.
    let mut runner = TestRunner::new(Config {
        cases: 3,
        max_shrink_iters: 0,
        failure_persistence: None,
        ..Config::default()
    });
    let secrets = prop::collection::vec("[a-z][a-zA-Z0-9]{15,30}", 8);
    runner
        .run(&secrets, |secrets| {
            runtime.block_on(run(&secrets));
            Ok(())
        })
        .unwrap();
}

#[tokio::test]
async fn a_parameter_that_cannot_be_had_ends_the_block_and_says_why() {
    let results = tempfile::tempdir().unwrap();
    let streams = Streams::builder("clash").only_given().results_dir(results.path()).open().unwrap();
    let clashing: Params = "a: {x: 1}\nb: {x: 2}".parse().unwrap();
    let params: Params = "a: 1\nb: 1\nc: !env MILLSTREAM_NOT_SET".parse().unwrap();
    let ends = |params: &Params, path: &str| {
        let task = streams.get("s").unwrap().run_bg(shell("true").params(params, path));
        async move { task.outcome().await.detail.clone() }
    };
    let clash = "parameter `x` cannot be given to the block: parameter `x` at `/*` is `1` at parameters:1:8 and `2` at parameters:2:8: ask with a path that means one of them";
    assert_eq!(ends(&clashing, "/*").await, clash);
    let unset = "parameter `c` cannot be given to the block: parameters:3:9: the variable `MILLSTREAM_NOT_SET` is not set: set it for this program, or name another with `!env`";
    assert_eq!(ends(&params, "/").await, unset);
    let nowhere =
        "parameter `/nowhere` cannot be given to the block: this path of the tree has no parameters";
    assert_eq!(ends(&params, "/nowhere").await, nowhere);
    streams.close().await.unwrap();
}

/// Files, and questions with their answers.
type Example = (Vec<String>, Vec<(String, String)>);

/// What the page says of itself: files, then questions with their answers.
fn examples(page: &str) -> Vec<Example> {
    let mut examples: Vec<Example> = Vec::new();
    for piece in page.split("\n```").collect::<Vec<_>>().chunks(2) {
        let Some((kind, body)) = piece.get(1).and_then(|code| code.split_once('\n')) else { continue };
        match kind {
            "yaml" => match examples.last_mut().filter(|(_, questions)| questions.is_empty()) {
                Some((files, _)) => files.push(body.to_owned()),
                None => examples.push((vec![body.to_owned()], Vec::new())),
            },
            "text" => {
                let asked = body.lines().map(|line| line.split_once(" → ").expect("question → answer"));
                let asked = asked.map(|(question, answer)| (question.to_owned(), answer.to_owned()));
                examples.last_mut().unwrap().1.extend(asked);
            }
            other => panic!("the page has a piece of {other}"),
        }
    }
    examples
}

/// The answer to one question of the page.
fn answer(question: &str, params: &Params, results: &Path) -> millstream::Result<String> {
    let open = |path: &str| {
        Streams::builder("page").only_given().results_dir(results).params_at(params.clone(), path).open()
    };
    let words: Vec<&str> = question.split(' ').collect();
    Ok(match words[..] {
        ["get", key, "at", path] => params.get::<serde_json::Value>(key, path)?.to_string(),
        ["streams", "at", path] => {
            let streams = open(path)?.all();
            let line = |stream: &Stream| format!("{} = {}", stream.name(), stream.definition());
            streams.iter().map(line).collect::<Vec<_>>().join("; ")
        }
        ["try", name] => open("/streams/*")?.try_get(name)?.host().to_owned(),
        ["shown"] => serde_json::to_string(params).unwrap(),
        _ => panic!("the page asks `{question}`"),
    })
}

#[test]
fn the_page_of_parameters_says_what_is() {
    let page = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/parameters.md");
    let examples = examples(&fs::read_to_string(page).unwrap());
    assert!(examples.len() >= 5, "{} examples", examples.len());
    for (texts, questions) in examples {
        assert!(!questions.is_empty(), "nobody asks about {texts:?}");
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("token"), "0123456789\n").unwrap();
        fs::write(directory.path().join("port"), "7433\n").unwrap();
        let file = |text: &String| {
            let name = text.lines().next().and_then(|line| line.strip_prefix("# ")).unwrap();
            let path = directory.path().join(name);
            fs::write(&path, text).unwrap();
            path
        };
        let files: Vec<_> = texts.iter().map(file).collect();
        let params = Params::load_all(files).unwrap();
        for (question, expected) in questions {
            let told = answer(&question, &params, &directory.path().join("results"));
            let told = told.unwrap_or_else(|error| format!("error: {error}"));
            let told = told.replace(&format!("{}/", directory.path().display()), "");
            // Another test of this program registers a type for all of them.
            let told = told.replace(", `careless`", "");
            assert_eq!(told, expected, "{question}");
        }
    }
}
