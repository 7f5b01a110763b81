//! The page for operators, followed literally: every command on it is run against a real agent and a real test, and prints what
//! the page says. And nothing of it shows a secret.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
};

use millstream::{Params, Streams, shell};
use millstream_integration_tests::{agent::Agent, lab::Lab, tools, wait::wait_until_true};
use regex::Regex;

use crate::support::SOON;

/// A parameter that nobody but the block may see.
const SECRET: &str = "hunter2-and-more";

/// One command of the page, and what it is said to print.
struct Recipe {
    command: String,
    printed: Option<String>,
}

/// Commands stand in blocks of `sh`; a block of another kind that follows is what the one before it prints.
fn recipes(page: &str) -> Vec<Recipe> {
    let fence = Regex::new(r"(?ms)^```(\w+)\n(.*?)^```$").unwrap();
    let mut found: Vec<Recipe> = Vec::new();
    for block in fence.captures_iter(page) {
        let text = block[2].to_owned();
        match (&block[1], found.last_mut()) {
            ("sh", _) => found.push(Recipe { command: text, printed: None }),
            (_, Some(recipe)) if recipe.printed.is_none() => recipe.printed = Some(text),
            (kind, _) => panic!("a block of {kind} belongs to no command: {text}"),
        }
    }
    found
}

/// Whether a text is as the page says: spaces count once, `…` is anything in a line, and alone in a line any lines.
fn is_as_said(said: &str, printed: &str) -> bool {
    let spaces = Regex::new(r"[ \t]+").unwrap();
    let mut pattern = String::from("^");
    for line in said.lines() {
        if line == "…" {
            pattern.push_str("(?:.*\n)*?");
            continue;
        }
        let line = spaces.replace_all(line.trim(), " ");
        let pieces: Vec<String> = line.split('…').map(regex::escape).collect();
        pattern.push_str(&pieces.join(".*?"));
        pattern.push('\n');
    }
    pattern.push('$');
    let printed: String =
        printed.lines().map(|line| spaces.replace_all(line.trim(), " ").into_owned() + "\n").collect();
    Regex::new(&pattern).unwrap().is_match(&printed)
}

/// The places that the page names, as they are here.
struct Here {
    words: Vec<(&'static str, String)>,
    directory: PathBuf,
}

impl Here {
    fn new(lab: &Lab, agent: &Agent, board: &str, audit: &Path) -> Self {
        let directory = lab.directory().join("operator");
        let bin = directory.join("bin");
        fs::create_dir_all(&bin).unwrap();
        symlink(tools::grpcurl(), bin.join("grpcurl")).unwrap();
        symlink(tools::agent_program(), bin.join("millstream-agent")).unwrap();
        let olga = lab.authority().operator("olga");
        for (file, name) in [
            (&olga.authority, "ca.pem"),
            (&olga.certificate, "operator-olga.pem"),
            (&olga.key, "operator-olga.key"),
        ] {
            symlink(file, directory.join(name)).unwrap();
        }
        let text = |path: &Path| tools::text(path).to_owned();
        let words = vec![
            ("foo.example.com", lab.host("foo").address().to_string()),
            ("bar.example.com", lab.host("bar").address().to_string()),
            ("/run/millstream/agent.sock", text(&agent.socket())),
            ("/var/log/millstream/audit.jsonl", text(audit)),
            ("127.0.0.1:41235", board.to_owned()),
        ];
        Self { words, directory }
    }

    fn translated(&self, text: &str) -> String {
        self.words.iter().fold(text.to_owned(), |text, (said, here)| text.replace(said, here))
    }

    /// Runs a command where it would be run, and returns what it prints.
    fn run(&self, lab: &Lab, agent: &Agent, command: &str) -> String {
        let mut shell = Command::new("bash");
        let path = format!("{}:/usr/bin:/bin", self.directory.join("bin").display());
        shell.args(["-c", &self.translated(command)]).current_dir(&self.directory);
        shell.env("PATH", path).env("MILLSTREAM_SOCKET", agent.socket());
        // The test's own port is on loopback of the machine that the test runs on; the agent's numbers on that of its host.
        let board = command.contains("41235") || command.contains("foo.example.com");
        let place = if board { lab.controller() } else { lab.host("foo") };
        let output = place.namespace().run(|| tools::output(&mut shell));
        assert!(output.status.success(), "{command}\n{}", tools::both(&output));
        String::from_utf8(output.stdout).unwrap()
    }
}

/// A test of somebody else, which waits for the host until this is dropped.
fn somebody_in_line(lab: &Lab) -> Streams {
    let path = lab.directory().join("sweep.yaml");
    let yaml = lab.definitions(&lab.authority().controller("bob"));
    fs::write(&path, yaml.replace("type: tls\n", "type: tls\n    exclusive: yes\n")).unwrap();
    let builder = Streams::builder("sweep").params(Params::load(path).unwrap()).take_together(["foo"]);
    let streams = builder.results_dir(lab.directory().join("results")).open().unwrap();
    // It never begins; what becomes of it nobody asks.
    drop(streams.get("foo").unwrap().run_bg(shell("true")));
    streams
}

fn follow_the_page(lab: &Lab, agent: &Agent, board: &str, audit: &Path) {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/operating.md");
    let recipes = recipes(&fs::read_to_string(page).unwrap());
    assert!(recipes.len() >= 20, "{} recipes", recipes.len());
    let here = Here::new(lab, agent, board, audit);
    let mut complaints = String::new();
    let mut waiter = None;
    for Recipe { command, printed } in recipes {
        if command.contains("in line") {
            waiter = Some(somebody_in_line(lab));
            let waits = || here.run(lab, agent, "millstream-agent status").contains("in line");
            wait_until_true("somebody waits for the host", SOON, waits);
        } else if !command.contains("waiting") {
            waiter = None;
        }
        if command.contains("finished") {
            let came =
                || here.run(lab, agent, "millstream-agent board 127.0.0.1:41235").contains("finished: ");
            wait_until_true("the block comes to the second barrier", SOON, came);
        }
        let said = printed.map(|said| here.translated(&said));
        let printed = here.run(lab, agent, &command);
        assert!(!printed.contains(SECRET), "{command}{printed}");
        if !is_as_said(said.as_deref().unwrap_or("…"), &printed) {
            complaints += &format!("$ {command}is said to print\n{}but prints\n{printed}\n", said.unwrap());
        }
    }
    drop(waiter);
    assert!(complaints.is_empty(), "{complaints}");
}

/// What a parser of Prometheus's own client makes of the numbers: series with a value each.
fn assert_scrapable(lab: &Lab) {
    let script = "import sys, urllib.request\n\
                  from prometheus_client.parser import text_string_to_metric_families\n\
                  page = urllib.request.urlopen('http://127.0.0.1:9433/metrics').read().decode()\n\
                  families = list(text_string_to_metric_families(page))\n\
                  assert all(family.documentation and family.samples for family in families)\n\
                  samples = [s for family in families for s in family.samples]\n\
                  assert len({(s.name, tuple(s.labels.items())) for s in samples}) == len(samples)\n\
                  print(len(families), 'families')\n";
    let mut python = Command::new("/usr/bin/python3");
    python.args(["-c", script]);
    let counted = lab.host("foo").namespace().run(|| tools::run(&mut python));
    let families: usize = counted.split(' ').next().unwrap().parse().unwrap();
    assert!(families >= 19, "{counted}");
}

#[test]
#[ignore = "needs root, grpcurl and a parser of Prometheus (integration-tests/setup): integration-tests/run"]
fn every_command_for_operators_prints_what_the_page_says() {
    let lab = Lab::new(&["foo", "bar"]);
    let audit = lab.directory().join("audit.jsonl");
    let more = format!("audit: {}\nmetrics: 127.0.0.1:9433\nshipped_files_max: 32GiB\n", audit.display());
    let agent = lab.start_agent_configured("foo", &more);
    let definitions = lab.directory().join("lab.yaml");
    let yaml = lab.definitions(&lab.authority().controller("alice")).replace("  foo:\n", "  server:\n");
    fs::write(&definitions, yaml).unwrap();
    lab.controller()
        .block_on(|| async {
            let builder = Streams::builder("netperf").params(Params::load(&definitions)?);
            let streams = builder.results_dir(lab.directory().join("results")).open()?;
            let board = streams.listen("127.0.0.1:0".parse().unwrap()).await.unwrap().to_string();
            let block = shell(
                "millstream-sync publish port 5201 >/dev/null\n\
                 echo listening on port 5201\n\
                 millstream-sync barrier setup 2 --timeout 600 >/dev/null\n\
                 exec millstream-sync barrier finished 2 --timeout 600 >/dev/null",
            );
            let block = block.name("netserver").secret_param("password", SECRET).allow_failure();
            let task = streams.get("server")?.run_bg(block);
            task.ready(millstream::Ready::log("listening")).await?;
            let mut look = Command::new(tools::grpcurl());
            look.args(["-plaintext", &board, "millstream.v1.SyncService/ListBarriers"]);
            wait_until_true("the block comes to its barrier", SOON, || {
                tools::run(&mut look).contains("setup")
            });
            follow_the_page(&lab, &agent, &board, &audit);
            assert_scrapable(&lab);
            let outcome = task.outcome().await;
            assert!(outcome.to_string().contains("netserver"), "{outcome}");
            streams.close().await?;
            millstream::Result::<()>::Ok(())
        })
        .unwrap();
    let records = fs::read_to_string(&audit).unwrap();
    assert!(records.contains("\"outcome\":\"closed\"") && records.contains("\"task.ended\""), "{records}");
    for (place, text) in [("the audit log", records), ("the agent's log", agent.log())] {
        assert!(!text.contains(SECRET), "a secret is in {place}: {text}");
    }
    let results = fs::read_to_string(lab.directory().join("results/netperf/test.json")).unwrap();
    assert!(results.contains("by hand") && !results.contains(SECRET), "{results}");
}

#[test]
fn the_page_is_compared_word_by_word_with_blanks() {
    assert!(is_as_said("a …  c\n…\nend\n", "a b c\nx\ny\nend\n"));
    assert!(is_as_said("{\n…\n}\n", "{\n}\n"));
    assert!(!is_as_said("a …\n", "a b\nc\n"));
    assert!(!is_as_said("a.c\n", "abc\n"));
    let found = recipes("```sh\none\n```\n\n```text\n1\n```\n```sh\ntwo\n```\n");
    assert_eq!(found.len(), 2);
    assert_eq!((found[0].printed.as_deref(), &found[1].printed), (Some("1\n"), &None));
}
