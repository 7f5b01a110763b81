//! What ways to hosts say when the programs that they use do what the real ones do on nobody's demand: programs that the test
//! wrote stand in for those of Slurm, of a container engine and of OpenSSH.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use millstream::{Definition, Streams, shell};
use millstream_integration_tests::tools;

use crate::support::block_on;

/// Programs that stand before those of the system.
struct StandIns {
    directory: tempfile::TempDir,
}

impl StandIns {
    fn new() -> Self {
        Self { directory: tempfile::tempdir().unwrap() }
    }

    fn write(&self, program: &str, script: &str) -> PathBuf {
        let path = self.path().join(program);
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    fn path(&self) -> &Path {
        self.directory.path()
    }

    /// A machine with nothing but what any has.
    fn bare() -> Self {
        let bare = Self::new();
        for program in ["sh", "cat", "kill", "setsid"] {
            std::os::unix::fs::symlink(tools::installed(program), bare.path().join(program)).unwrap();
        }
        bare
    }

    /// What a test says that runs one block at a place.
    fn told(&self, definition: &str) -> String {
        self.told_in(definition, &format!("{}:/usr/bin:/bin", self.path().display()))
    }

    fn told_in(&self, definition: &str, path: &str) -> String {
        let definitions = self.path().join("lab.yaml");
        fs::write(&definitions, format!("streams:\n  there: {definition}\n")).unwrap();
        let mut command = Command::new(tools::beside_this_program("controller-under-test"));
        command.arg(&definitions).arg(self.path().join("results")).args(["there", "true"]);
        command.env("PATH", path);
        tools::both(&tools::output(&mut command))
    }
}

/// Takes the greeting's word from what the shell of a host is told.
const TOKEN: &str = "read -r _; read -r line; token=${line#token=}; token=${token%% *}";

/// An allocation of one node, whatever was asked for. Its holder ends when `$0.end` is there.
const GRANTS: &str = "while [ $# -gt 0 ] && [ \"$1\" != sh ]; do shift; done\n\
                      export SLURM_JOB_ID=7 SLURM_JOB_NODELIST=n1\n\"$@\" & exec sh -c 'while ! [ -e \"$1.end\" ]; do sleep 0.1; done' sh \"$0\"";

/// A cluster that grants what is asked for, and does these things where it is asked for a step and to end.
fn cluster(srun: &str, scancel: &str) -> StandIns {
    let cluster = StandIns::new();
    cluster.write("salloc", GRANTS);
    cluster.write("scontrol", "echo n1");
    cluster.write("squeue", "");
    cluster.write("srun", srun);
    cluster.write("scancel", &format!("touch \"${{0%/*}}/salloc.end\"; {scancel}"));
    cluster
}

#[test]
fn what_is_wrong_with_an_allocation_is_told() {
    let definition = |more: &str| {
        format!("{{type: slurm, allocation: sweep, agent: {}{more}}}", tools::agent_program().display())
    };
    let bare = StandIns::bare();
    let told = bare.told_in(&definition(""), tools::text(bare.path()));
    assert!(
        told.contains("This machine needs the commands of Slurm: salloc, srun, squeue, scancel and scontrol"),
        "{told}"
    );
    let told = cluster("", "").told(&definition(", nodes: 2, node: 2"));
    assert!(told.contains("allocation 7 has 1 node, and this stream is on its node 2"), "{told}");

    let told = cluster(&format!("{TOKEN}; echo \"millstream-stdio $token\""), "").told(&definition(""));
    assert!(told.contains("node n1: its agent does not answer: "), "{told}");
    assert!(told.contains(". Check what `squeue` says of its job, and `sinfo` of its node"), "{told}");

    let told = cluster("touch \"${0%/*}/salloc.end\"; exit 1", "").told(&definition(""));
    assert!(
        told.contains("allocation 7 is over: ")
            && told.contains("; give it more `time` if that was its limit"),
        "{told}"
    );
    let told = cluster("", "echo 'slurm is down' >&2; exit 1").told(&definition(", nodes: 2, node: 2"));
    assert!(
        told.contains("slurm://sweep/2: `scancel --name millstream-sweep-")
            && told.contains("should give the allocation back: it ended with exit status: 1: slurm is down"),
        "{told}"
    );
}

/// An engine that makes containers whose agents do not answer, and removes none.
const ENGINE: &str = "case $1 in\n\
    create) echo \"$*\" >>\"$0.asked\"; echo id-1 ;;\n\
    cp | start) ;;\n\
    ps) case $* in *status=created*) ;; *) echo id-1 ;; esac ;;\n\
    rm) echo 'the disk is busy' >&2; exit 2 ;;\n\
    exec) echo 'no agent listens on it' >&2; echo \"token $*\" >&2; exit 1 ;;\n\
    esac";

#[test]
fn a_container_that_cannot_be_removed_is_part_of_what_closing_tells() {
    let engine = StandIns::new();
    let podman = engine.write("podman", ENGINE);
    let error = block_on(async {
        let streams = Streams::builder("removing").only_given().results_dir(engine.path()).open().unwrap();
        let definition = Definition::of("podman")
            .key("image", "x")
            .key("name", "box")
            .key("engine", podman.display())
            .key("agent", tools::agent_program().display());
        streams.add("box", definition).unwrap().run_bg(shell("true").allow_failure()).outcome().await;
        streams.close().await.unwrap_err().to_string()
    });
    assert!(
        error.contains("podman://box?image=x: the container `id-1` could not be removed: ")
            && error.contains("rm --force id-1` ended with exit code 2: the disk is busy"),
        "{error}"
    );
    let results = fs::read_to_string(engine.path().join("removing/test.json")).unwrap();
    assert!(results.contains("the container `id-1` could not be removed"), "{results}");
}

#[test]
fn an_engine_that_talks_without_end_or_leaves_somebody_behind_holds_nobody_up() {
    let engine = StandIns::new();
    // What it leaves behind has its outputs, and ends with the test's directory.
    let leaves = "while [ -d \"$0.d\" ]; do sleep 0.2; done";
    fs::create_dir(engine.path().join("podman.d")).unwrap();
    engine.write(
        "podman",
        &format!("sh -c '{leaves}' \"$0\" &\nyes 'and so on' | head -c 9000000 >&2\necho 'the end of it' >&2; exit 7"),
    );
    let agent = tools::agent_program();
    let told = engine.told(&format!("{{type: podman, image: x, agent: {}}}", agent.display()));
    assert!(told.contains("; and so on; ") && told.contains("; the end of it\n"), "{told}");
    assert!(told.len() < 30_000, "{} bytes", told.len());
}

#[test]
fn what_is_secret_in_the_options_of_a_container_is_in_no_error() {
    let engine = StandIns::new();
    engine.write("podman", "echo \"what does $* mean?\" >&2; exit 125");
    let agent = tools::agent_program();
    let options = "!secret '--env=TOKEN=hunter2 --privileged'";
    let told =
        engine.told(&format!("{{type: podman, image: x, agent: {}, options: {options}}}", agent.display()));
    assert!(told.contains("--rm … x serve --idle 90s` ended with exit code 125"), "{told}");
    assert!(!told.contains("hunter2"), "{told}");
}

#[test]
fn whoever_cannot_be_reached_in_time_says_what_to_check() {
    let agent = tools::agent_program();
    let agent = agent.display();
    let cases = [
        (
            format!("{{type: ssh, host: lab, user: tester, agent: {agent}}}"),
            ". Check that `ssh tester@lab` logs in from here, with nothing to answer",
        ),
        (
            "command://gate to the lab".to_owned(),
            ". Check by hand that `gate to the lab` prints `millstream-stdio ready`",
        ),
        (
            format!("{{type: command, command: gate lab, bring: yes, agent: {agent}}}"),
            ". Check by hand that `gate lab sh` is a shell there",
        ),
        (
            format!("{{type: podman, image: x, name: box, agent: {agent}}}"),
            ". Check what `podman ps --all` says of the container `box`",
        ),
    ];
    // Each of them waits for half a minute.
    std::thread::scope(|scope| {
        let asked = cases.map(|(definition, advice)| {
            scope.spawn(move || {
                let hosts = StandIns::new();
                hosts.write("ssh", "echo 'ssh: connect to host lab port 22: No route to host' >&2; exit 255");
                hosts.write("gate", "echo shut >&2; exit 1");
                hosts.write("podman", ENGINE);
                (hosts.told(&definition), advice)
            })
        });
        for asked in asked {
            let (told, advice) = asked.join().unwrap();
            assert!(told.contains(advice), "{told}");
        }
    });
}
