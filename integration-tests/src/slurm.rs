//! A cluster of Slurm on this machine: one controller, and a daemon for each node, in a network namespace of their own.
//!
//! Everything of it lies in one temporary directory, the socket of its authentication included, so that nothing meets a
//! cluster that this machine may belong to.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use tempfile::TempDir;

use crate::{
    namespace::Namespace,
    tools,
    wait::{wait_until, wait_until_true},
};

/// From starting a daemon to its being of use.
const READY_MAX: Duration = Duration::from_secs(60);
/// The address of the namespace: the resolver needs one beside loopback.
const ADDRESS: &str = "10.78.0.1/32";
/// The partition of all nodes.
pub const PARTITION: &str = "lab";

/// A cluster. Dropping it ends its daemons and whatever they run.
#[derive(Debug)]
pub struct Cluster {
    /// Ended with the namespace, unless the test ended them before.
    daemons: Vec<Child>,
    namespace: Namespace,
    directory: TempDir,
}

impl Cluster {
    /// Starts a cluster of so many nodes, `n1` and so on, and waits until all are idle.
    ///
    /// # Panics
    /// When the process may not, the packages are not there, or a daemon does not come up; the message has its log.
    #[must_use]
    pub fn start(nodes: usize) -> Self {
        let namespace = Namespace::create("slurm");
        namespace.ip(&["address", "add", ADDRESS, "dev", "lo"]);
        let directory = tempfile::Builder::new().prefix("slurm-").tempdir().expect("a directory");
        // Everybody must get at the socket in it.
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).expect("it is ours");
        let mut cluster = Self { daemons: Vec::new(), namespace, directory };
        cluster.configure(nodes);
        cluster.start_daemons(nodes);
        let idle = || {
            let states = cluster.command("sinfo", &["--noheader", "--format=%t %D"]);
            (states.trim() == format!("idle {nodes}")).then_some(())
        };
        wait_until("all nodes of the cluster are idle", READY_MAX, idle);
        cluster
    }

    fn configure(&self, nodes: usize) {
        let at = self.directory.path();
        let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
        let here = at.display();
        let last = 17_000 + nodes;
        let configuration = format!(
            "ClusterName=lab\n\
             SlurmctldHost={host}(127.0.0.1)\n\
             SlurmUser=root\n\
             AuthType=auth/munge\n\
             AuthInfo=socket={here}/munge.socket\n\
             CredType=cred/munge\n\
             SlurmctldPidFile={here}/slurmctld.pid\n\
             SlurmdPidFile={here}/slurmd-%n.pid\n\
             SlurmctldLogFile={here}/slurmctld.log\n\
             SlurmdLogFile={here}/slurmd-%n.log\n\
             SlurmdSpoolDir={here}/spool-%n\n\
             StateSaveLocation={here}/state\n\
             ProctrackType=proctrack/linuxproc\n\
             TaskPlugin=task/none\n\
             SelectType=select/linear\n\
             SlurmdParameters=config_overrides\n\
             SwitchType=switch/none\n\
             JobAcctGatherType=jobacct_gather/none\n\
             MpiDefault=none\n\
             ReturnToService=2\n\
             KillWait=2\n\
             SchedulerParameters=sched_interval=1,bf_interval=1\n\
             NodeName=n[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[17001-{last}] CPUs=1\n\
             PartitionName={PARTITION} Nodes=ALL Default=YES MaxTime=60 State=UP\n"
        );
        fs::write(self.configuration(), configuration).expect("the directory can be written");
        for directory in (1..=nodes).map(|node| format!("spool-n{node}")).chain(["state".to_owned()]) {
            fs::create_dir(at.join(directory)).expect("the directory can be written");
        }
        let key = at.join("munge.key");
        fs::write(&key, [uuid::Uuid::new_v4().into_bytes(), uuid::Uuid::new_v4().into_bytes()].concat())
            .and_then(|()| fs::set_permissions(&key, fs::Permissions::from_mode(0o600)))
            .expect("the directory can be written");
    }

    fn start_daemons(&mut self, nodes: usize) {
        let at = self.directory.path().to_path_buf();
        let option = |name: &str, file: &str| format!("--{name}={}", at.join(file).display());
        let mut munged = Command::new(tools::installed("munged"));
        munged.args(["--foreground", "--force", "--num-threads=1"]).args([
            option("socket", "munge.socket"),
            option("key-file", "munge.key"),
            option("pid-file", "munged.pid"),
            option("seed-file", "munged.seed"),
        ]);
        self.start_daemon("munged", &mut munged);
        wait_until_true("munged listens", READY_MAX, || at.join("munge.socket").exists());
        self.start_daemon("slurmctld", Command::new(tools::installed("slurmctld")).args(["-D", "-i"]));
        for node in (1..=nodes).map(|node| format!("n{node}")) {
            let mut slurmd = Command::new(tools::installed("slurmd"));
            self.start_daemon(&format!("slurmd-{node}"), slurmd.args(["-D", "-N", &node]));
        }
    }

    fn start_daemon(&mut self, name: &str, command: &mut Command) {
        let said = fs::File::create(self.directory.path().join(format!("{name}.said"))).expect("a file");
        command
            .env("SLURM_CONF", self.configuration())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(said);
        self.daemons.push(self.namespace.spawn(command).unwrap_or_else(|error| panic!("{name}: {error}")));
    }

    /// What the variable `SLURM_CONF` has to say to whoever uses the cluster.
    #[must_use]
    pub fn configuration(&self) -> PathBuf {
        self.directory.path().join("slurm.conf")
    }

    /// Where the cluster is.
    #[must_use]
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// A directory for the test's files; gone with the cluster.
    #[must_use]
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// What a command of Slurm prints.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn command(&self, program: &str, arguments: &[&str]) -> String {
        let mut command = Command::new(tools::installed(program));
        command.args(arguments).env("SLURM_CONF", self.configuration()).stdin(Stdio::null());
        let output = self.namespace.run(|| command.output()).expect("it is installed");
        tools::both(&output)
    }

    /// The jobs that wait or run, by number.
    #[must_use]
    pub fn jobs(&self) -> Vec<String> {
        let told = self.command("squeue", &["--noheader", "--format=%i"]);
        told.lines().map(|line| line.trim().to_owned()).collect()
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for daemon in self.daemons.iter_mut().rev() {
            // It may have ended already.
            let _gone = daemon.kill();
            let _reaped = daemon.wait();
        }
    }
}
