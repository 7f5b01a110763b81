//! Streams behind commands: any program whose standard input and output reach an agent, or a shell that it is brought to.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
    time::UNIX_EPOCH,
};

use millstream::{Definition, Params, Result, Streams, conformance::check, shell};
use millstream_integration_tests::{lab::Lab, processes, tools};

use crate::{
    conformance::{is_sound, survivor},
    on_demand::{Program, relays_of, wait_until_gone},
    support::{Ticker, block_on},
};

fn open(test: &str, results: &Path) -> Result<Streams> {
    Ok(Streams::builder(test).only_given().results_dir(results).open()?)
}

/// A stream at a shell that is reached through a command.
fn brought(prefix: &[&str], program: &Path) -> Definition {
    let line = prefix.iter().map(|word| format!("'{word}'")).collect::<Vec<_>>().join(" ");
    Definition::of("command").key("command", line).key("bring", "yes").key("agent", program.display())
}

/// What lies below a home where programs are put.
fn cached(home: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(home.join(".cache/millstream")).into_iter().flatten();
    entries.map(|entry| entry.unwrap().path()).collect()
}

/// Why nothing can be run on a stream.
fn refusal(definition: impl Into<Definition>) -> String {
    let directory = tempfile::tempdir().unwrap();
    block_on(async {
        let streams = open("refused", directory.path()).unwrap();
        let stream = streams.add("nowhere", definition).unwrap();
        let outcome = stream.run_bg(shell("true")).outcome().await;
        assert!(!outcome.passed());
        streams.close().await.unwrap();
        outcome.to_string()
    })
}

#[test]
fn a_command_is_a_place_like_any_other() {
    let (program, directory) = (Program::new(), tempfile::tempdir().unwrap());
    let yaml = directory.path().join("lab.yaml");
    let agent = program.path();
    fs::write(
        &yaml,
        format!(
            "streams:\n  listed: {{type: command, command: [sh, -c, 'exec \"$0\" stdio', {0}]}}\n  line: command://{0} stdio\n  here:\n",
            agent.display()
        ),
    )
    .unwrap();
    block_on(async {
        let builder = Streams::builder("commands").params(Params::load(&yaml)?).only_given();
        let streams = builder.results_dir(directory.path().join("results")).open()?;
        let meet =
            "millstream-sync barrier here 3 >/dev/null; echo met; echo kept >\"$MILLSTREAM_OUTPUT/file\"";
        let tasks: Vec<_> = ["listed", "line", "here"]
            .into_iter()
            .map(|name| Ok(streams.get(name)?.run_bg(shell(meet))))
            .collect::<Result<_>>()?;
        for task in tasks {
            let outcome = task.wait().await?;
            assert_eq!(outcome.stdout(), "met\n");
            assert_eq!(fs::read_to_string(outcome.data().join("file")).unwrap(), "kept\n");
        }
        assert_eq!(program.agents().len(), 1);
        streams.close().await
    })
    .unwrap();
    assert_eq!(relays_of(&agent), Vec::<u32>::new());
    program.wait_until_gone();
}

#[test]
fn a_relay_that_is_killed_is_started_again_and_no_byte_is_lost() {
    let (program, directory) = (Program::new(), tempfile::tempdir().unwrap());
    let ticker = Ticker::new(&directory.path().join("ticker"));
    block_on(async {
        let streams = open("killed-relay", directory.path())?;
        let stream = streams.add("one", format!("command://{} stdio", program.path().display()))?;
        let task = stream.run_bg(ticker.block());
        ticker.wait_for_more(3);
        relays_of(&program.path()).into_iter().for_each(processes::kill);
        ticker.wait_for_more(10);
        ticker.release();
        let outcome = task.wait().await?;
        ticker.assert_complete(&outcome.stdout());
        streams.close().await
    })
    .unwrap();
    program.wait_until_gone();
}

#[test]
fn the_agent_is_brought_once_and_stays_for_the_next_test() {
    let (program, directory) = (Program::new(), tempfile::tempdir().unwrap());
    let home = directory.path().join("home");
    fs::create_dir(&home).unwrap();
    let place = format!("HOME={}", home.display());
    let prefix = ["env", "-u", "XDG_CACHE_HOME", &place, "sh", "-c", "echo welcome; exec \"$@\"", "sh"];
    let run = |test: &str| {
        block_on(async {
            let streams = open(test, directory.path())?;
            // Two that come at once bring it at once.
            let other = [&prefix[..4], &["A=1"], &prefix[4..]].concat();
            let one = streams.add("one", brought(&prefix, &program.path()))?.run_bg(shell("echo one"));
            let two = streams.add("two", brought(&other, &program.path()))?.run_bg(shell("echo two"));
            assert_eq!(
                (one.wait().await?.stdout(), two.wait().await?.stdout()),
                ("one\n".into(), "two\n".into())
            );
            streams.close().await
        })
        .unwrap();
    };
    run("first");
    let found = cached(&home);
    assert_eq!(found.len(), 1, "{found:?}");
    let copy = &found[0];
    assert_eq!(fs::read(copy).unwrap(), fs::read(program.path()).unwrap());
    let written = fs::metadata(copy).unwrap().created().unwrap();
    run("second");
    assert_eq!(cached(&home), found);
    assert_eq!(fs::metadata(copy).unwrap().created().unwrap(), written, "it was brought again");
    wait_until_gone(copy);
}

#[test]
fn a_copy_that_is_cut_off_leaves_nothing() {
    let (program, directory) = (Program::new(), tempfile::tempdir().unwrap());
    let place = format!("HOME={}", directory.path().display());
    let prefix =
        ["env", "-u", "XDG_CACHE_HOME", &place, "sh", "-c", "dd bs=64k count=16 2>/dev/null | \"$@\"", "sh"];
    let told = refusal(brought(&prefix, &program.path()));
    assert!(told.contains("millstream: the copy of the program was cut off"), "{told}");
    assert_eq!(cached(directory.path()), Vec::<PathBuf>::new());
}

#[test]
fn a_program_for_other_machines_is_not_brought() {
    let directory = tempfile::tempdir().unwrap();
    let foreign = directory.path().join("agent");
    let mut head = vec![0; 64];
    head[..6].copy_from_slice(b"\x7fELF\x02\x01");
    // The number of RISC-V.
    head[18] = 243;
    fs::write(&foreign, head).unwrap();
    let place = format!("HOME={}", directory.path().display());
    let told = refusal(brought(&["env", "-u", "XDG_CACHE_HOME", &place], &foreign));
    let machine = tools::run(Command::new("uname").arg("-m"));
    let machine = machine.trim();
    assert!(
        told.contains(&format!(
            "the host is of the kind {machine}, but `{}` is for riscv64: give `agent:` the static build for {machine}",
            foreign.display()
        )),
        "{told}"
    );
}

#[test]
fn a_block_has_the_mask_of_whoever_came_and_not_that_of_the_way() {
    let (program, directory) = (Program::new(), tempfile::tempdir().unwrap());
    let place = format!("HOME={}", directory.path().display());
    let prefix = ["env", "-u", "XDG_CACHE_HOME", &place, "sh", "-c", "umask 027; exec \"$@\"", "sh"];
    block_on(async {
        let streams = open("mask", directory.path())?;
        // As it was brought, and as it was found.
        for name in ["one", "two"] {
            let stream = streams.add(name, brought(&prefix, &program.path()))?;
            assert_eq!(stream.run_fg(shell("umask")).await?.stdout().trim(), "0027");
        }
        streams.close().await
    })
    .unwrap();
    wait_until_gone(&cached(directory.path())[0]);
}

/// The path of a place where a program is installed as `millstream-agent`.
fn with_its_own(directory: &Path, program: &Path) -> String {
    let installed = directory.join("installed");
    fs::create_dir(&installed).unwrap();
    fs::hard_link(program, installed.join("millstream-agent")).unwrap();
    format!("PATH={}:/usr/bin:/bin", installed.display())
}

#[test]
fn the_same_program_is_not_brought_where_it_is_installed() {
    let program = Program::new();
    let directory = tempfile::tempdir_in(program.path().parent().unwrap()).unwrap();
    let path = with_its_own(directory.path(), &program.path());
    let place = format!("HOME={}", directory.path().display());
    block_on(async {
        let streams = open("same", directory.path())?;
        let definition = brought(&["env", "-u", "XDG_CACHE_HOME", &place, &path], &program.path());
        streams.add("one", definition)?.run_fg(shell("true")).await?;
        streams.close().await
    })
    .unwrap();
    assert_eq!(cached(directory.path()), Vec::<PathBuf>::new());
    wait_until_gone(&directory.path().join("installed/millstream-agent"));
}

#[test]
fn another_program_stands_in_only_where_one_cannot_be_run_that_nobody_named() {
    let (program, other) = (Program::new(), Program::of_its_own());
    let directory = tempfile::tempdir_in(program.path().parent().unwrap()).unwrap();
    let path = with_its_own(directory.path(), &program.path());
    let place = format!("HOME={}", directory.path().display());
    // It says that it is a machine of another kind.
    let uname = directory.path().join("installed/uname");
    fs::write(&uname, "#!/bin/sh\necho vax\n").unwrap();
    fs::set_permissions(&uname, fs::Permissions::from_mode(0o755)).unwrap();
    let prefix = ["env", "-u", "XDG_CACHE_HOME", &place, &path];
    let told = refusal(brought(&prefix, &other.path()));
    assert!(told.contains("the host is of the kind vax"), "{told}");

    let yaml = directory.path().join("lab.yaml");
    let command = prefix.map(|word| format!("'{word}'")).join(", ");
    fs::write(&yaml, format!("streams:\n  a: {{type: command, command: [{command}], bring: yes}}\n"))
        .unwrap();
    // What would be brought is another one than that which is installed there.
    let near = directory.path().join("near");
    fs::create_dir(&near).unwrap();
    fs::copy(other.path(), near.join("millstream-agent")).unwrap();
    let mut test = Command::new(tools::beside_this_program("controller-under-test"));
    test.arg(&yaml).arg(directory.path().join("results")).args(["a", "echo from there"]);
    test.env_remove("MILLSTREAM_AGENT").env("PATH", format!("{}:/usr/bin:/bin", near.display()));
    let said = tools::both(&tools::output(&mut test));
    assert!(said.contains("from there"), "{said}");
    wait_until_gone(&directory.path().join("installed/millstream-agent"));
}

#[test]
fn programs_that_run_are_not_among_those_that_are_removed_for_their_age() {
    let directory = tempfile::tempdir().unwrap();
    let place = format!("HOME={}", directory.path().display());
    let prefix = ["env", "-u", "XDG_CACHE_HOME", &place];
    let kept = directory.path().join(".cache/millstream");
    let oldest = Program::of_its_own();
    let streams = open("running", directory.path()).unwrap();
    block_on(async {
        let stream = streams.add("oldest", brought(&prefix, &oldest.path()))?;
        stream.run_fg(shell("true")).await?;
        let [running] = &cached(directory.path())[..] else { panic!("one copy") };
        for number in 0..6 {
            let old = kept.join(format!("agent-{number}"));
            fs::write(&old, "").unwrap();
        }
        fs::File::open(running).unwrap().set_times(fs::FileTimes::new().set_accessed(UNIX_EPOCH)).unwrap();
        // Bringing another one tidies.
        let other = Program::of_its_own();
        streams.add("other", brought(&prefix, &other.path()))?.run_fg(shell("true")).await?;
        assert!(running.exists());
        let left = cached(directory.path());
        assert_eq!(left.len(), 6, "{left:?}");
        // A session of its own is another supervisor, which is the program started again.
        let again = open("again", directory.path())?;
        again.add("oldest", brought(&prefix, &oldest.path()))?.run_fg(shell("true")).await?;
        again.close().await?;
        streams.close().await
    })
    .unwrap();
    cached(directory.path()).iter().for_each(|program| wait_until_gone(program));
}

#[test]
fn what_a_command_says_is_told_when_there_is_no_connection() {
    let told = refusal("command://millstream-no-such-program stdio");
    assert!(
        told.contains("`millstream-no-such-program` cannot be started: no such file or directory"),
        "{told}"
    );
    let told = refusal("command://sh -c 'echo hello; echo the gate is shut >&2; exit 127'");
    assert!(told.contains("it ended with exit code 127: the gate is shut; it printed `hello`"), "{told}");
    let directory = tempfile::tempdir().unwrap();
    let streams = open("keys", directory.path()).unwrap();
    let told =
        streams.add("a", Definition::of("command").key("command", "ssh").key("agent", "x")).unwrap_err();
    assert!(told.to_string().contains("`agent` names a program to bring: add `bring: yes`"), "{told}");
    let told = streams.add("b", "command://it's").unwrap_err().to_string();
    assert!(told.contains("a quote is not closed"), "{told}");
}

/// Where [`brings_itself`] is at home; unset, it does nothing.
const HOME_OF_ITS_OWN: &str = "MILLSTREAM_TEST_HOME";

/// What [`a_test_brings_itself`] starts, where no agent is near. It is no test: an ordinary run does nothing here.
#[test]
#[ignore = "started by another test, in a directory of its own"]
fn brings_itself() {
    let Ok(home) = std::env::var(HOME_OF_ITS_OWN) else { return };
    block_on(async {
        let streams = open("itself", Path::new(&home))?;
        let there = Definition::of("command").key("command", "env THERE=1").key("bring", "yes");
        let outcome = streams.add("there", there)?.run_fg(shell("echo from there")).await?;
        assert_eq!(outcome.stdout(), "from there\n");
        streams.close().await
    })
    .unwrap();
}

#[test]
fn a_test_brings_itself() {
    let this = std::env::current_exe().unwrap();
    let directory = tempfile::tempdir_in(this.parent().unwrap()).unwrap();
    // Two below, for the directory above is looked into as well.
    let inner = directory.path().join("a/b");
    fs::create_dir_all(&inner).unwrap();
    let copy = inner.join("it");
    fs::hard_link(&this, &copy).unwrap();
    let mut command = Command::new(&copy);
    command.args(["--exact", "commands::brings_itself", "--ignored", "--nocapture"]);
    command.env_remove("MILLSTREAM_AGENT").env_remove("XDG_CACHE_HOME").env("PATH", "/usr/bin:/bin");
    tools::run(command.env("HOME", &inner).env(HOME_OF_ITS_OWN, &inner));
    let found = cached(&inner);
    assert_eq!(found.len(), 1);
    wait_until_gone(&found[0]);
}

#[test]
#[ignore = "needs root: integration-tests/run"]
fn networks_are_places_and_meet_at_a_barrier() {
    let lab = Lab::without_authority(&["blue", "red"]);
    let program = Program::new();
    block_on(async {
        let streams = open("networks", lab.directory())?;
        let mut tasks = Vec::new();
        for name in ["blue", "red"] {
            let namespace = lab.host(name).namespace().name();
            // One has the agent's program, the other has it brought.
            let exec = format!("ip netns exec {namespace}");
            let definition = if name == "blue" {
                Definition::url(format!("command://{exec} {} stdio", program.path().display()))
            } else {
                let words: Vec<&str> = exec.split(' ').collect();
                brought(&words, &program.path())
            };
            let block = shell("millstream-sync barrier both 2 >/dev/null; ip -o -4 address show dev lab0");
            tasks.push((name, streams.add(name, definition)?.run_bg(block)));
        }
        for (name, task) in tasks {
            let address = lab.host(name).address().to_string();
            let outcome = task.wait().await?;
            assert!(outcome.stdout().contains(&address), "{name}: {}", outcome.stdout());
        }
        streams.close().await
    })
    .unwrap();
    program.wait_until_gone();
}

#[test]
#[ignore = "needs root: integration-tests/run"]
fn a_home_from_which_nothing_can_be_run_is_passed_over() {
    let (program, directory) = (Program::of_its_own(), tempfile::tempdir().unwrap());
    let home = directory.path().join("home");
    fs::create_dir(&home).unwrap();
    let mount = "mount -t tmpfs -o noexec tmpfs \"$HOME\" && exec \"$@\"";
    let place = format!("HOME={}", home.display());
    let prefix = ["env", "-u", "XDG_CACHE_HOME", &place, "unshare", "--mount", "sh", "-c", mount, "sh"];
    block_on(async {
        let streams = open("noexec", directory.path())?;
        streams.add("one", brought(&prefix, &program.path()))?.run_fg(shell("true")).await?;
        streams.close().await
    })
    .unwrap();
    let digest = tools::run(Command::new("sha256sum").arg(program.path()));
    let copy = PathBuf::from(format!("/tmp/millstream-0-programs/agent-{}", &digest[..16]));
    assert!(copy.is_file());
    wait_until_gone(&copy);
    fs::remove_file(&copy).unwrap();
}

#[test]
fn a_place_behind_a_command_is_sound() {
    let program = Program::new();
    is_sound(check(format!("command://{} stdio", program.path().display())), &survivor());
    program.wait_until_gone();
}
