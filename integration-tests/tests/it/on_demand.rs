//! Agents on demand: `millstream-agent stdio` finds one or starts one; it serves as long as somebody wants it, and leaves
//! nothing.

use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
};

use millstream_integration_tests::{processes, tools, wait::wait_until_true};

use crate::support::SOON;

/// What a client of HTTP/2 sends first, with an empty SETTINGS frame.
const HELLO: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
/// Kind of the frame with which a server answers.
const SETTINGS: u8 = 4;

/// A program of one's own: its agents on demand are nobody else's.
pub(crate) struct Program {
    directory: tempfile::TempDir,
}

impl Program {
    pub(crate) fn new() -> Self {
        let program = tools::agent_program();
        // Beside the original, so that it can be another name for the same file.
        let directory = tempfile::tempdir_in(program.parent().unwrap()).unwrap();
        let new = Self { directory };
        fs::hard_link(&program, new.path()).or_else(|_| fs::copy(&program, new.path()).map(drop)).unwrap();
        new
    }

    /// A copy with another digest: nobody else has brought it anywhere.
    pub(crate) fn of_its_own() -> Self {
        let new = Self { directory: tempfile::tempdir().unwrap() };
        fs::copy(tools::agent_program(), new.path()).unwrap();
        let mut file = fs::OpenOptions::new().append(true).open(new.path()).unwrap();
        file.write_all(new.path().as_os_str().as_encoded_bytes()).unwrap();
        new
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.directory.path().join("agent")
    }

    fn stdio(&self, idle: &str) -> Relay {
        Relay::start(Command::new(self.path()).args(["stdio", "--idle", idle]))
    }

    /// The agents that run, found by the name of their program and what they were told.
    pub(crate) fn agents(&self) -> Vec<u32> {
        agents_of(&self.path())
    }

    /// Where the one agent lies.
    fn state(&self) -> PathBuf {
        let environment = fs::read(format!("/proc/{}/environ", self.agents()[0])).unwrap();
        let environment = String::from_utf8(environment).unwrap();
        let argument =
            environment.split('\0').find_map(|line| line.strip_prefix("MILLSTREAM_ARG_0=")).unwrap();
        PathBuf::from(argument)
    }

    pub(crate) fn wait_until_gone(&self) {
        wait_until_gone(&self.path());
    }
}

/// The agents on demand of a program.
pub(crate) fn agents_of(program: &Path) -> Vec<u32> {
    let all = processes::with_variable("MILLSTREAM_ENTRY=on-demand");
    all.into_iter().filter(|pid| runs_as(*pid, program)).collect()
}

/// The relays that lead to them.
pub(crate) fn relays_of(program: &Path) -> Vec<u32> {
    processes::with_argument("stdio").into_iter().filter(|pid| runs_as(*pid, program)).collect()
}

fn runs_as(pid: u32, program: &Path) -> bool {
    fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|runs| runs == program)
}

/// Waits until nobody wants an agent of this program any more, and it has ended.
pub(crate) fn wait_until_gone(program: &Path) {
    wait_until_true("the agent on demand ends", SOON, || agents_of(program).is_empty());
}

/// One relay, as a test of its bytes sees it.
struct Relay {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Relay {
    fn start(command: &mut Command) -> Self {
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let (input, output) = (child.stdin.take(), BufReader::new(child.stdout.take().unwrap()));
        Self { child, input, output }
    }

    /// Says hello to the agent behind it, which must answer.
    fn talk(&mut self) {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        self.output.read_line(&mut line).unwrap();
        assert_eq!(line, "\nmillstream-stdio ready\n", "{}", self.complaint());
        self.input.as_mut().unwrap().write_all(HELLO).unwrap();
        let mut head = [0; 9];
        self.output.read_exact(&mut head).unwrap();
        assert_eq!(head[3], SETTINGS);
    }

    fn complaint(&mut self) -> String {
        let mut said = String::new();
        if let Ok(Some(_)) = self.child.try_wait() {
            self.child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        }
        said
    }

    fn end(mut self) {
        drop(self.input.take());
        assert!(self.child.wait().unwrap().success());
    }
}

#[test]
fn an_agent_is_started_once_serves_while_it_is_wanted_and_leaves_nothing() {
    let program = Program::new();
    let mut first = program.stdio("100ms");
    first.talk();
    let state = program.state();
    let found = fs::metadata(&state).unwrap();
    assert_eq!(found.mode() & 0o066, 0, "others can read or write in {}", state.display());
    let mut relays: Vec<Relay> = (0..10).map(|_| program.stdio("100ms")).collect();
    relays.iter_mut().for_each(Relay::talk);
    assert_eq!(program.agents().len(), 1);
    relays.into_iter().for_each(Relay::end);
    // The first one still holds it.
    assert_eq!(program.agents().len(), 1);
    first.end();
    program.wait_until_gone();
    assert!(!state.exists(), "{} is left", state.display());
}

#[test]
fn relays_that_come_together_start_one_agent() {
    let program = Program::new();
    let mut relays: Vec<Relay> = (0..10).map(|_| program.stdio("100ms")).collect();
    relays.iter_mut().for_each(Relay::talk);
    assert_eq!(program.agents().len(), 1);
    relays.into_iter().for_each(Relay::end);
    program.wait_until_gone();
}

#[test]
fn whoever_comes_while_an_agent_ends_finds_the_next_one() {
    let program = Program::new();
    // It ends as soon as nobody is there, so that every arrival meets its end somewhere else.
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                for _ in 0..15 {
                    let mut relay = program.stdio("0ms");
                    relay.talk();
                    relay.end();
                }
            });
        }
    });
    program.wait_until_gone();
}

#[test]
fn a_killed_agent_is_followed_by_another_in_the_same_directory() {
    let program = Program::new();
    let mut relay = program.stdio("100ms");
    relay.talk();
    let (state, agent) = (program.state(), program.agents()[0]);
    processes::kill(agent);
    relay.child.wait().unwrap();
    let mut relay = program.stdio("100ms");
    relay.talk();
    assert_eq!(program.state(), state);
    assert_ne!(program.agents(), [agent]);
    relay.end();
    program.wait_until_gone();
    assert!(!state.exists());
}

#[test]
fn a_socket_that_is_named_is_the_only_one_that_is_meant() {
    let program = Program::new();
    let socket = program.directory.path().join("none.sock");
    let output = Command::new(program.path())
        .args(["stdio", "--socket"])
        .arg(&socket)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(!output.status.success());
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(
        said,
        format!(
            "millstream-agent: no agent listens on `{}`: no such file or directory; start one with `millstream-agent serve`, or leave `--socket` out: then one is started on demand\n",
            socket.display()
        )
    );
    assert_eq!(program.agents(), Vec::<u32>::new());
}

#[test]
fn a_test_binary_relays_as_well() {
    let program = std::env::current_exe().unwrap();
    let relaunch = millstream_agent::entry::Relaunch::of_test_binary(program, "__millstream_entry");
    let mut relay =
        Relay::start(&mut relaunch.command(millstream_agent::entry::Role::Stdio, &["ready".into()]));
    relay.talk();
    relay.end();
}

#[test]
#[ignore = "needs root: integration-tests/run"]
fn a_directory_that_another_user_has_made_is_left_alone() {
    let program = Program::new();
    let mut relay = program.stdio("100ms");
    relay.talk();
    let state = program.state();
    relay.end();
    program.wait_until_gone();
    fs::create_dir(&state).unwrap();
    std::os::unix::fs::chown(&state, Some(65_534), Some(65_534)).unwrap();
    let mut relay = program.stdio("100ms");
    relay.talk();
    assert_eq!(program.state().parent(), Some(Path::new("/var/tmp")));
    relay.end();
    program.wait_until_gone();
    assert_eq!(fs::read_dir(&state).unwrap().count(), 0);
    fs::remove_dir(&state).unwrap();
}

#[test]
#[ignore = "needs root: integration-tests/run"]
fn the_agent_of_the_system_is_used_in_its_own_network_only() {
    let program = Program::new();
    let directory = program.directory.path();
    let configuration = directory.join("agent.yaml");
    let state = tempfile::tempdir().unwrap();
    fs::write(&configuration, format!("state_directory: {}\n", state.path().display())).unwrap();
    // A `/run` and a network of its own, so that it is nobody else's agent.
    let script = "mount -t tmpfs tmpfs /run && ip link set lo up && exec \"$0\" serve --config \"$1\"";
    let mut system = Command::new("unshare")
        .args(["--mount", "--net", "sh", "-c", script])
        .args([program.path(), configuration])
        .stdin(Stdio::null())
        .stderr(fs::File::create(directory.join("log")).unwrap())
        .spawn()
        .unwrap();
    let socket = format!("/proc/{}/root/run/millstream/agent.sock", system.id());
    wait_until_true("the system's agent listens", SOON, || Path::new(&socket).exists());
    let pid = system.id().to_string();
    let inside = |command: &[&str]| {
        let mut relay = Command::new("nsenter");
        relay.args(["--target", &pid, "--mount", "--net"]).args(command).arg(program.path());
        Relay::start(relay.args(["stdio", "--idle", "100ms"]))
    };
    let mut relay = inside(&[]);
    relay.talk();
    assert_eq!(program.agents(), Vec::<u32>::new());
    relay.end();
    let mut relay = inside(&["unshare", "--net"]);
    relay.talk();
    assert_eq!(program.agents().len(), 1, "the agent of another network was used");
    relay.end();
    program.wait_until_gone();
    system.kill().unwrap();
    system.wait().unwrap();
}

#[test]
fn an_agent_removes_what_killed_ones_have_left_elsewhere() {
    let (dead, other) = (Program::new(), Program::new());
    let mut relay = dead.stdio("100ms");
    relay.talk();
    let left = dead.state();
    processes::kill(dead.agents()[0]);
    relay.child.wait().unwrap();
    assert!(left.exists());
    // One that is held is somebody's, and so is one whose agent lives.
    let alive = Program::new();
    let mut held = alive.stdio("100ms");
    held.talk();
    let kept = alive.state();
    let mut relay = other.stdio("100ms");
    relay.talk();
    wait_until_true("what the killed one had left is removed", SOON, || !left.exists());
    assert!(kept.exists());
    for relay in [relay, held] {
        relay.end();
    }
    other.wait_until_gone();
    alive.wait_until_gone();
}

#[test]
#[ignore = "needs root: integration-tests/run"]
fn what_other_users_and_programs_have_is_not_swept() {
    let program = Program::new();
    let foreign = Path::new("/tmp/millstream-0-00000000aa");
    let (programs, file) =
        (Path::new("/tmp/millstream-0-not-one"), Path::new("/tmp/millstream-0-00000000ab"));
    fs::create_dir(foreign).unwrap();
    std::os::unix::fs::chown(foreign, Some(65_534), Some(65_534)).unwrap();
    fs::create_dir(programs).unwrap();
    fs::write(file, "").unwrap();
    let swept = Path::new("/tmp/millstream-0-00000000ac");
    fs::create_dir(swept).unwrap();
    fs::set_permissions(swept, fs::Permissions::from_mode(0o711)).unwrap();
    let mut relay = program.stdio("100ms");
    relay.talk();
    wait_until_true("an empty one is removed", SOON, || !swept.exists());
    relay.end();
    program.wait_until_gone();
    assert!(foreign.exists() && programs.exists() && file.exists());
    fs::remove_dir(foreign).unwrap();
    fs::remove_dir(programs).unwrap();
    fs::remove_file(file).unwrap();
}
