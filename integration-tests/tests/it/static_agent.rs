//! The agent as one static file: it runs where there is nothing else.

use std::{
    fs, io,
    os::unix::fs::PermissionsExt as _,
    path::Path,
    process::{Child, Command, Stdio},
};

use millstream::{OutcomeKind, Reason, Streams, exec, shell};
use millstream_integration_tests::{
    namespace::Namespace,
    tools::{self, both, text},
    wait::wait_until_true,
};

use crate::support::{SOON, block_on};

/// What every container engine mounts, and then the agent as the only file of its root directory.
const ENTER: &str = "set -e\n\
    mount -t proc proc \"$1/proc\"\n\
    for device in null random urandom; do\n\
    \tmount --bind /dev/$device \"$1/dev/$device\"\n\
    done\n\
    exec chroot \"$1\" /millstream-agent serve";

/// A root directory with the static agent and nothing else.
fn empty_root() -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    fs::copy(tools::static_agent_program(), root.path().join("millstream-agent")).unwrap();
    // Blocks of other users may enter it.
    fs::set_permissions(root.path(), fs::Permissions::from_mode(0o755)).unwrap();
    root
}

/// What a command of the agent says in a root directory where not even the kernel's own files are mounted.
fn in_bare_root(root: &Path, arguments: &[&str]) -> (bool, String) {
    let mut command = Command::new("chroot");
    command.arg(root).arg("/millstream-agent").args(arguments).env_clear().stdin(Stdio::null());
    let output = tools::output(command.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"));
    (output.status.success(), both(&output))
}

/// A running agent that is killed with the test.
struct Served(Child);

impl Drop for Served {
    fn drop(&mut self) {
        let _ended_already = self.0.kill();
        let _reaped: io::Result<_> = self.0.wait();
    }
}

#[test]
#[ignore = "needs root: integration-tests/run"]
fn a_static_agent_serves_in_a_root_directory_that_holds_nothing_else() {
    let root = empty_root();
    fs::create_dir(root.path().join("proc")).unwrap();
    fs::create_dir(root.path().join("dev")).unwrap();
    for device in ["null", "random", "urandom"] {
        fs::write(root.path().join("dev").join(device), "").unwrap();
    }
    // In a network of its own: it listens on the port of every agent.
    let place = Namespace::create("static");
    let log = fs::File::create(root.path().join("log")).unwrap();
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", ENTER, "sh", text(root.path())]);
    command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").stdin(Stdio::null()).stderr(log);
    let served = Served(place.spawn(&mut command).unwrap());
    let socket = root.path().join("run/millstream/agent.sock");
    wait_until_true("the agent listens", SOON, || socket.exists());

    block_on(async {
        let streams = Streams::builder("static").results_dir(root.path().join("results")).open()?;
        let stream = streams.add("bare", format!("unix://{}", socket.display()))?;

        let told = stream.run_fg(exec(["/millstream-agent", "--version"])).await?;
        assert!(told.stdout().starts_with("millstream-agent "), "{told}");

        // Without a shell the command for barriers is there as well.
        let meeting = stream.run_bg(exec(["millstream-sync", "barrier", "met", "2"]));
        streams.barrier("met", 2).await?;
        meeting.wait().await?;

        let outcome = stream.run_bg(shell("true")).outcome().await;
        assert_eq!((outcome.kind, outcome.reason), (OutcomeKind::Error, Reason::StartFailed));
        assert!(outcome.sentence().contains("`/bin/sh` does not exist"), "{outcome}");
        let outcome = stream.run_bg(exec(["/millstream-agent"]).user("nobody")).outcome().await;
        assert_eq!(outcome.kind, OutcomeKind::Error);
        assert!(outcome.sentence().contains("/etc/passwd"), "{outcome}");
        streams.close().await?;
        millstream::Result::<()>::Ok(())
    })
    .unwrap();
    drop(served);
}

#[test]
#[ignore = "needs root: integration-tests/run"]
fn a_static_agent_says_what_a_bare_root_directory_lacks() {
    let root = empty_root();
    let (is_well, said) = in_bare_root(root.path(), &["--version"]);
    assert!(is_well && said.starts_with("millstream-agent "), "{said}");
    let (is_well, said) = in_bare_root(root.path(), &["pki", "init", "--dir", "/pki"]);
    assert!(is_well && root.path().join("pki/ca.pem").exists(), "{said}");
    let (is_well, said) = in_bare_root(root.path(), &["serve"]);
    assert!(!is_well && said.contains("Is /proc mounted?"), "{said}");
}
