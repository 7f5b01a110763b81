//! Barriers and topics from shells and from Python, through the real `millstream-sync`: command, socket, relay, board.

use std::{
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
};

use millstream::sync::host::{SpeakerLabel, SyncHost};
use millstream_agent::{entry::Relaunch, supervisor::relay::Relay};
use millstream_common::{
    clock::World,
    id::{BlockName, StreamName},
};
use millstream_proto::supervisor::v1::RelayFrames;
use tokio::{runtime::Runtime, sync::mpsc};
use tokio_stream::{StreamExt as _, wrappers::ReceiverStream};

struct Scene {
    runtime: Runtime,
    host: SyncHost,
    relay: Relay,
    directory: tempfile::TempDir,
}

impl Scene {
    fn new() -> Self {
        let runtime = Runtime::new().unwrap();
        let entered = runtime.enter();
        let host = SyncHost::new(World::system(), runtime.handle());
        let (outgoing, frames) = mpsc::channel::<RelayFrames>(64);
        let relay = Relay::new(outgoing);
        let (outbound, mut answers) = mpsc::channel(64);
        let serving = host.clone();
        let inbound = ReceiverStream::new(frames).map(|message| message.frames);
        drop(runtime.spawn(async move { serving.serve_relay(inbound, outbound).await }));
        let told = relay.clone();
        drop(runtime.spawn(async move {
            while let Some(frames) = answers.recv().await {
                told.incoming(RelayFrames { frames });
            }
        }));
        relay.attached(true);
        drop(entered);
        let directory = tempfile::tempdir().unwrap();
        let agent = Relaunch::of_program(env!("CARGO_BIN_EXE_agent-under-test"));
        agent.write_sync_command(directory.path()).unwrap();
        Self { runtime, host, relay, directory }
    }

    /// A program as a block of a new stream, as an agent would start it.
    fn block(&self, stream: &str, program: &str, code: &str) -> Child {
        let task = World::system().ids.task_id();
        let label = SpeakerLabel {
            stream: StreamName::new(stream).unwrap(),
            number: 1,
            block: BlockName::new("block").unwrap(),
        };
        self.host.task_scheduled(task, label, None, None);
        let socket = self.path(&format!("{}.sock", task.short()));
        let entered = self.runtime.enter();
        self.relay.open(task, &socket, None).unwrap();
        drop(entered);
        std::fs::write(self.path("params"), r#"{"size": 7}"#).unwrap();
        let module = Path::new(env!("CARGO_MANIFEST_DIR")).join("../controller/src/block/python");
        let path = format!("{}:/usr/local/bin:/usr/bin:/bin", self.directory.path().display());
        Command::new(program)
            .args(["-c", code])
            .env_clear()
            .env("PATH", path)
            .env("PYTHONPATH", module)
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .env("MILLSTREAM_SYNC", socket)
            .env("MILLSTREAM_WHITEBOARD", self.path(&format!("{stream}.whiteboard")))
            .env("MILLSTREAM_PARAMS", self.path("params"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }
}

/// What a block printed. It must have passed.
fn printed(block: Child) -> String {
    let Output { status, stdout, stderr } = block.wait_with_output().unwrap();
    let complaint = String::from_utf8_lossy(&stderr);
    assert!(status.success(), "{status}: {complaint}");
    String::from_utf8(stdout).unwrap()
}

#[test]
fn shells_meet_with_payloads_and_exchange_values() {
    let scene = Scene::new();
    let server = scene.block(
        "server",
        "sh",
        "set -e\n\
         millstream-sync publish port 5201\n\
         millstream-sync barrier setup 2 --payload 'from server' >/dev/null\n\
         millstream-sync whiteboard one\n\
         millstream-sync whiteboard two\n\
         millstream-sync whiteboard",
    );
    let client = scene.block(
        "client",
        "sh",
        "set -e\n\
         millstream-sync wait port\n\
         millstream-sync barrier setup 2 --timeout 30s | cut -f 2,3 | sort\n\
         millstream-sync get port\n\
         millstream-sync subscribe port | head -n 1",
    );
    assert_eq!(printed(client), "5201\nclient/1-block\t\nserver/1-block\tfrom server\n5201\n5201\n");
    assert_eq!(printed(server), "0\none\ntwo\n");
}

#[test]
fn the_command_ends_with_1_for_what_happened_and_2_for_what_is_wrong() {
    let scene = Scene::new();
    let block = scene.block(
        "server",
        "sh",
        "millstream-sync barrier alone 2 --timeout 0.1; echo $?\n\
         millstream-sync barrier alone 2; echo $?\n\
         millstream-sync barier alone 2; echo $?\n\
         env -u MILLSTREAM_SYNC millstream-sync get x; echo $?",
    );
    let Output { stdout, stderr, .. } = block.wait_with_output().unwrap();
    let complaint = String::from_utf8_lossy(&stderr);
    assert_eq!(String::from_utf8_lossy(&stdout), "1\n1\n2\n2\n", "{complaint}");
    let lines: Vec<&str> = complaint.lines().collect();
    for (line, words) in lines.iter().zip([
        "1 of 2 entered before server/1-block had waited for 0.1 s",
        "is broken since generation 1",
        "perhaps `barrier` was meant",
        "MILLSTREAM_SYNC is not set",
    ]) {
        assert!(line.starts_with("millstream-sync: ") && line.contains(words), "{line}");
    }
    assert_eq!(lines.len(), 4, "one sentence each: {complaint}");
}

#[test]
#[ignore = "needs python3: integration-tests/run"]
fn python_meets_a_shell() {
    let scene = Scene::new();
    let shell = scene.block(
        "shell",
        "sh",
        "millstream-sync barrier setup 2 --payload hello >/dev/null; millstream-sync wait numbers 2",
    );
    let python = scene.block(
        "python",
        "python3",
        r#"
import millstream
released = millstream.barrier("setup", 2, payload=b"\xff\x00")
for party in sorted(released["parties"], key=lambda party: party["name"]):
    print(party["name"], party["payload"])
print(released["generation"], millstream.param("size"), millstream.param("none", 3))
print(millstream.publish("numbers", [1, 2]), millstream.publish("numbers", "text"))
print(millstream.get("numbers"), millstream.wait("numbers", 2), millstream.get("nothing"))
for value in millstream.subscribe("numbers"):
    print(value)
    break
millstream.whiteboard("done")
try:
    millstream.wait("nothing", timeout=0.1)
except millstream.TimedOut as error:
    print(error)
try:
    millstream.barrier("alone", 2, timeout=0.1)
except millstream.BarrierBroken as error:
    print("broken" if "1 of 2 entered" in str(error) else error)
millstream.abort("later", "enough")
try:
    millstream.barrier("later", 2)
except millstream.BarrierBroken as error:
    print("python/1-block aborted it: enough" in str(error))
"#,
    );
    assert_eq!(
        printed(python),
        "python/1-block b'\\xff\\x00'\nshell/1-block hello\n1 7 3\n0 1\n\
         ['[1,2]', 'text'] ['[1,2]', 'text'] []\n[1,2]\n\
         topic `nothing` had 0 of 1 values after 0.1 s\nbroken\nTrue\n"
    );
    assert_eq!(printed(shell), "[1,2]\ntext\n");
    assert_eq!(std::fs::read_to_string(scene.path("python.whiteboard")).unwrap(), "done\n");
}
